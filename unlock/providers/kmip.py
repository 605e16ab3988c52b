# SPDX-License-Identifier: Apache-2.0
"""Keys of a key manager that speaks KMIP 1.1 to 1.4 (OASIS): the only file that imports PyKMIP.

    question ──> first endpoint that is not backing off ──> one connection ──> one batch ──> answer, checked ──> result
                      └── any failure of a read: the next endpoint

PyKMIP writes the questions. The answers are read by `ttlv`: PyKMIP's parser gives up on Link and on x- attributes.
Everything that a server says is compared with what it was asked; batch ids are random, so an answer to another question
never fits.

A server may lie, lag or have been replaced. So a key that it does not know has no successor there, unless that one
says by a Link that it replaces this very key; and of two keys with one name neither is the newer: a migration resets
dates.
"""

import os
import random as _random
import ssl
import sys
import threading
import time
from collections.abc import Callable, Sequence
from functools import partial
from importlib import import_module
from importlib.util import find_spec, module_from_spec
from typing import Any, NamedTuple, TypeVar

from ..endpoint import Endpoint as Endpoint
from ..errors import (
    ClientAuth,
    ClockWrong,
    Integrity,
    Malformed,
    NotFoundOrDenied,
    PeerUntrusted,
    ProviderError,
    ProviderProtocol,
    ProviderUnavailable,
    StateBlocked,
    Tampered,
    Unsupported,
)
from ..secret import Secret
from . import (
    ACTIVE,
    BLOCKED,
    COMPROMISED,
    DEACTIVATED,
    DESTROYED,
    PRE_ACTIVE,
    UNKNOWN,
    USABLE,
    Capabilities,
    EndpointHealth,
    Health,
    Ref,
    Status,
    no_proof,
)
from .tls import ANSWER_MAX, Line, Silent, Until, client_context, validity
from .ttlv import Garbage, Node, nodes


def _load_codec_alone() -> None:
    """The package's own import brings a client, which is not used here, and SQLAlchemy: 0.6 s and 300 modules."""
    spec = find_spec("kmip")
    if "kmip" not in sys.modules and spec:
        sys.modules["kmip"] = package = module_from_spec(spec)
        package.enums = import_module("kmip.core.enums")  # type: ignore[attr-defined]


_load_codec_alone()

from kmip.core import enums, objects  # noqa: E402
from kmip.core.attributes import Name, UniqueIdentifier  # noqa: E402
from kmip.core.enums import Operation, Tags  # noqa: E402
from kmip.core.factories.attributes import AttributeFactory  # noqa: E402
from kmip.core.messages import contents, messages, payloads  # noqa: E402
from kmip.core.utils import BytearrayStream  # noqa: E402

T = TypeVar("T")

KEYS_A_REQUEST = 50
VERSIONS = ((1, 4), (1, 3), (1, 2), (1, 1))
"""Of KMIP, the best first; 2.x encodes attributes differently."""
_HOPS = 16
"""Replacements of one key that are followed in one `resolve`."""
_NAMESAKES_MAX = 100
"""More keys than that for one name: the server did not look at the name."""
_EXCHANGES = 6
"""The time of so many is what one endpoint gets for all that one call needs to know."""
_BACKOFF_MAX = 300.0
_CLIENT_AUTH_BACKOFF = 60.0
"""Seconds; servers lock out clients that insist."""

_STATES = {1: PRE_ACTIVE, 2: ACTIVE, 3: DEACTIVATED, 4: COMPROMISED, 5: DESTROYED, 6: DESTROYED}
"""KMIP 1.4, 9.1.3.2.18."""

_REASONS: dict[int, type[ProviderError]] = {
    **dict.fromkeys((0x01, 0x0C, 0x16, 0x17, 0x37, 0x39), NotFoundOrDenied),
    **dict.fromkeys((0x03, 0x14, 0x15), ClientAuth),
    **dict.fromkeys((0x05, 0x08, 0x10, 0x11, 0x12), Unsupported),
    **dict.fromkeys((0x0B, 0x0D, 0x13, 0x36), StateBlocked),
    **dict.fromkeys((0x02, 0x09, 0x0A, 0x2A, 0x100), ProviderUnavailable),
}
"""Result Reason, KMIP 1.4, 9.1.3.2.29 (0x2A and above are 2.0's). All others: ProviderProtocol."""

_WORST_FIRST = (
    Integrity,
    PeerUntrusted,
    ClientAuth,
    ClockWrong,
    NotFoundOrDenied,
    ProviderProtocol,
    Unsupported,
    ProviderUnavailable,
)
"""What is raised when the endpoints failed in different ways: what most needs a person."""

_HINTS: dict[type[ProviderError], str] = {
    ProviderUnavailable: "unlock provider test",
    PeerUntrusted: "check the endpoint's server name and CA in unlock.toml; if both are right, somebody else answers",
    ClientAuth: "let the key manager accept this client, or unlock provider renew",
    ClockWrong: "timedatectl",
    ProviderProtocol: "check that the endpoint is a KMIP server, version 1.1 to 1.4",
    Integrity: "find out why the key manager answers that; nothing of it was used",
    NotFoundOrDenied: "look for the key in the key manager, and what this client may do with it; delete nothing",
    StateBlocked: "see in the key manager who revoked it and why",
    Unsupported: "see what the key manager offers: unlock-kmip(7)",
}


class Settings(NamedTuple):
    id: str
    """From `new_id`, once, when the provider is added: it outlives endpoints and certificates."""
    endpoints: tuple[Endpoint, ...]
    """In the order in which they are tried."""
    ca: str
    """PEM: what server certificates must come from."""
    certificate: str
    """PEM: the client's, with intermediates if there are any."""
    key: Secret
    """PEM, not encrypted."""
    username: str = ""
    password: Secret | None = None
    timeout: float = 10.0
    """Seconds for one exchange with one endpoint: name, connection, TLS, question, whole answer."""


def _check_password(password: Secret | None) -> None:
    """PyKMIP writes texts of one byte a character. Raises Malformed."""
    if password and not password.value.isascii():
        raise Malformed("the key manager's password is not ASCII", "give the client one of ASCII characters")


def new_id() -> str:
    return f"kmip-{os.urandom(16).hex()}"


class Kmip:
    """The provider `kmip`. Owns the secrets in its settings and wipes them when closed. Threads take turns.

    Raises Malformed when certificates or key cannot be used. Connects when first asked.
    """

    def __init__(
        self,
        settings: Settings,
        clock: Callable[[], float] = time.monotonic,
        random: Callable[[], float] = _random.random,
    ) -> None:
        self.id = settings.id
        self._settings = settings
        self._clock = clock
        self._validity = validity(settings.certificate)
        _check_password(settings.password)
        context = client_context(settings.ca, settings.certificate, settings.key)
        self._servers = [_Server(each, settings, context, clock, random) for each in settings.endpoints]
        self._capabilities: Capabilities | None = None
        self._turn = threading.Lock()

    def __enter__(self) -> "Kmip":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        for server in self._servers:
            server.drop()
        self._settings.key.wipe()
        if self._settings.password:
            self._settings.password.wipe()

    def capabilities(self) -> Capabilities:
        if self._capabilities is None:
            self._capabilities = self._read(_capabilities)
        return self._capabilities

    def resolve(self, refs: Sequence[Ref]) -> list[Status]:
        statuses: list[Status] = []
        for at in range(0, len(refs), KEYS_A_REQUEST):
            statuses += self._resolve(refs[at : at + KEYS_A_REQUEST])
        return statuses

    def _resolve(self, refs: Sequence[Ref]) -> list[Status]:
        """What one endpoint does not know (it may lag) or fails to say, the others are asked for."""
        first, statuses = self._read(lambda server: (server, _statuses(server, refs, USABLE)))
        for server in self._order():
            missing = [at for at, status in enumerate(statuses) if _unanswered(status)]
            if not missing:
                break
            if server is first or server.off():
                continue
            lost = [refs[at] for at in missing]
            try:
                again = self._ask(server, partial(_statuses, refs=lost, ready=USABLE))
            except ProviderError:
                continue
            for at, status in zip(missing, again, strict=True):
                if not _unanswered(status):
                    statuses[at] = status
        return statuses

    def fetch(self, key_id: str, states: frozenset[str] = USABLE, prove: Callable[[Secret], None] = no_proof) -> Secret:
        return self._read(lambda server: _fetch(server, key_id, states, prove))

    def health(self) -> Health:
        found = []
        for server in self._servers:
            problem = None
            try:
                self._ask(server, _greet)
            except ProviderError as error:
                problem = error
            version = f"KMIP {server.version[0]}.{server.version[1]}" if server.version and not problem else ""
            found.append(EndpointHealth(str(server.endpoint), version, problem))
        return Health(tuple(found), int((self._validity[1] - time.time()) // 86400))

    def locate(self, name: str) -> Ref | None:
        bearers = self._read(lambda server: _bearers(server, name))
        return _only(bearers, name)

    def create(self, name: str) -> Ref:
        return self._change(
            lambda server: _only(_bearers(server, name), name),
            lambda server: Ref(_created(server, _create(name)), name),
        )

    def activate(self, key_id: str) -> None:
        def is_active(server: "_Server") -> bool:
            state = _facts(server, key_id).state
            if state in BLOCKED:
                raise server.error(StateBlocked, f"the key {_shown(key_id)} is {state}")
            return state == ACTIVE

        self._change(lambda server: is_active(server) or None, lambda server: bool(_done(server, _activate(key_id))))

    def rotate(self, ref: Ref, name: str) -> Ref:
        rekey = self.capabilities().rekey
        new = self._change(
            lambda server: _successor(server, ref, name), lambda server: _replacement(server, ref, name, rekey)
        )
        self.activate(new.id)
        return new

    def retire(self, key_id: str) -> None:
        self._change(
            lambda server: _facts(server, key_id).state in BLOCKED | {PRE_ACTIVE} or None,
            lambda server: bool(_done(server, _revoke(key_id))),
        )

    def _order(self) -> list["_Server"]:
        """The one that we are connected to, then as configured."""
        return sorted(self._servers, key=lambda server: not server.connected)

    def _read(self, work: Callable[["_Server"], T]) -> T:
        """`work` with the first endpoint that can do it. Raises the worst of their errors."""
        failures = []
        for server in self._order():
            if server.off():
                failures.append(server.off_for or ProviderUnavailable(f"{server.endpoint}: not asked"))
                continue
            try:
                return self._ask(server, work)
            except (StateBlocked, _Ambiguous):
                raise
            except ProviderError as error:
                failures.append(error)
        raise self._all_failed(failures)

    def _change(self, look: Callable[["_Server"], T | None], change: Callable[["_Server"], T]) -> T:
        """`change`, once, and never when `look` finds it done: its answer may have been lost."""
        server, found = self._read(lambda server: (server, look(server)))
        return self._ask(server, change) if found is None else found

    def _ask(self, server: "_Server", work: Callable[["_Server"], T]) -> T:
        with self._turn:
            return self._asked(server, work)

    def _asked(self, server: "_Server", work: Callable[["_Server"], T]) -> T:
        server.begin()
        try:
            result = work(server)
        except Garbage as garbage:
            error = server.error(ProviderProtocol, str(garbage))
            server.failed(error)
            raise error from garbage
        except ClientAuth as refused:
            error = (
                server.error(ClockWrong, "the client certificate is not valid yet") if self._too_early() else refused
            )
            server.failed(error)
            raise error from refused
        except ProviderError as error:
            server.failed(error)
            raise
        server.worked()
        return result

    def _too_early(self) -> bool:
        return time.time() < self._validity[0]

    def _all_failed(self, failures: list[ProviderError]) -> ProviderError:
        if not failures:
            return ProviderUnavailable("the provider has no endpoint", "add one in unlock.toml")
        worst = min(failures, key=lambda error: _WORST_FIRST.index(type(error)))
        error = type(worst)("; ".join(dict.fromkeys(map(str, failures))), worst.hint)
        error.retry_after = max(0.0, min(server.off_until for server in self._servers) - self._clock())
        return error


# What is asked, and what follows from the answers.


class _Facts(NamedTuple):
    """What a server says of one key."""

    state: str
    names: frozenset[str]
    replacement: str
    """Id, by Link; ''."""
    replaces: str
    is_aes_256: bool
    """False when the server says otherwise."""


def _greet(server: "_Server") -> None:
    server.drop()
    server.ask([_discover()])


def _capabilities(server: "_Server") -> Capabilities:
    [answer] = server.ask(
        [_Item(Operation.QUERY, payloads.QueryRequestPayload([enums.QueryFunction.QUERY_OPERATIONS]))]
    )
    if isinstance(answer.problem, Unsupported | NotFoundOrDenied):
        return Capabilities(create=True, rekey=False)
    offered = set(answer.good().numbers(Tags.OPERATION))
    return Capabilities(Operation.CREATE.value in offered, Operation.REKEY.value in offered)


def _statuses(server: "_Server", refs: Sequence[Ref], ready: frozenset[str]) -> list[Status]:
    """One request, and more only for keys that seem to have changed."""
    items = [_get_attributes(ref.id) for ref in refs] + [_locate(ref.name) for ref in refs if ref.name]
    answers = iter(server.ask(items))
    facts = {ref.id: _facts_or_problem(next(answers), ref.id) for ref in refs}
    named = {ref: _ids_or_problem(next(answers)) if ref.name else [] for ref in refs}
    found = [ids for ids in named.values() if isinstance(ids, list) and len(ids) <= _NAMESAKES_MAX]
    wanted = {each for ids in found for each in ids} | _links(facts)
    for _ in range(_HOPS):
        unknown = sorted(wanted - facts.keys())
        if not unknown:
            break
        answers = iter(server.ask([_get_attributes(each) for each in unknown]))
        facts |= {each: _facts_or_problem(next(answers), each) for each in unknown}
        wanted = _links(facts)
    return [_judge(server, ref, facts, named[ref], ready) for ref in refs]


def _unanswered(status: Status) -> bool:
    """Whether another endpoint may know better. Two keys with one name are in all of them."""
    return not status.found or (status.problem is not None and not isinstance(status.problem, Integrity))


def _judge(
    server: "_Server",
    ref: Ref,
    facts: dict[str, _Facts | ProviderError],
    named: list[str] | ProviderError,
    ready: frozenset[str],
) -> Status:
    """Which key `ref` is now. In doubt it stays what it is, with the doubt as its problem."""
    own = facts[ref.id]
    if isinstance(named, ProviderError):
        return Status(ref, isinstance(own, _Facts), own.state if isinstance(own, _Facts) else UNKNOWN, ref.id, named)
    known = {key: each for key, each in facts.items() if isinstance(each, _Facts)}
    usable = {key for key, each in known.items() if each.state in ready and each.is_aes_256}
    bearers = {key for key in named if key in usable and ref.name in known[key].names} - {ref.id}
    if isinstance(own, ProviderError):
        heirs = [key for key in bearers if known[key].replaces == ref.id]
        return Status(ref, False, UNKNOWN, heirs[0]) if len(heirs) == 1 else Status(ref, False, UNKNOWN, ref.id, own)
    chain = _chain(ref.id, known)
    bearers -= _ancestors(ref.id, known)
    heirs = [key for key in chain if key in usable]
    if len(named) > _NAMESAKES_MAX:
        doubt = f"the server returns {len(named)} keys for the name {_shown(ref.name)}"
    elif heirs and bearers - set(chain):
        doubt = f"{_shown(heirs[-1])} replaces {_shown(ref.id)}, and other keys have its name {_shown(ref.name)}"
    elif heirs or not bearers:
        return Status(ref, True, own.state, heirs[-1] if heirs else ref.id)
    elif len(bearers) == 1 and not (own.state not in BLOCKED and ref.name in own.names):
        return Status(ref, True, own.state, bearers.pop())
    else:
        doubt = f"several keys have the name {_shown(ref.name)}"
    return Status(ref, True, own.state, ref.id, server.error(Integrity, doubt))


def _links(facts: dict[str, _Facts | ProviderError]) -> set[str]:
    return {each.replacement for each in facts.values() if isinstance(each, _Facts) and each.replacement}


def _chain(key_id: str, known: dict[str, _Facts]) -> list[str]:
    """The replacements of a key, in order."""
    chain: list[str] = []
    while (key_id := known[key_id].replacement if key_id in known else "") and key_id not in chain:
        chain.append(key_id)
    return chain


def _ancestors(key_id: str, known: dict[str, _Facts]) -> set[str]:
    """Keys that this one has replaced: a name that stayed with them does not lead back."""
    return {known[key_id].replaces} | {key for key in known if key_id in _chain(key, known)}


def _successor(server: "_Server", ref: Ref, name: str) -> Ref | None:
    """The key that an earlier `rotate` has made, not yet active perhaps. Raises Integrity."""
    if made := _only(_bearers(server, name), name):
        return made
    [status] = _statuses(server, [ref], USABLE | {PRE_ACTIVE})
    if isinstance(status.problem, Integrity):
        raise _Ambiguous(str(status.problem), status.problem.hint)
    return Ref(status.current, ref.name) if status.changed else None


def _replacement(server: "_Server", ref: Ref, name: str, rekey: bool) -> Ref:
    if rekey:
        try:
            return Ref(_created(server, _rekey(ref.id), other_than=ref.id), ref.name)
        except (Unsupported, NotFoundOrDenied, StateBlocked):
            """Offered, but not to us or not for this key: a new key does as well."""
    return Ref(_created(server, _create(name)), name)


def _bearers(server: "_Server", name: str) -> list[str]:
    """Ids of the keys of that name that may be used, now or when activated."""
    ids = _ids(server.ask([_locate(name)])[0])
    if len(ids) > _NAMESAKES_MAX:
        raise server.error(ProviderProtocol, f"the server returns {len(ids)} keys for the name {_shown(name)}")
    answers = server.ask([_get_attributes(each) for each in ids]) if ids else []
    found = [_facts_or_problem(answer, each) for answer, each in zip(answers, ids, strict=True)]
    for problem in found:
        if isinstance(problem, ProviderUnavailable | ProviderProtocol):
            raise problem
    return [
        each
        for each, facts in zip(ids, found, strict=True)
        if isinstance(facts, _Facts) and name in facts.names and facts.state not in BLOCKED and facts.is_aes_256
    ]


class _Ambiguous(Integrity):
    """What the key manager holds, not what one endpoint makes of it: no reason to leave the endpoint."""


def _only(ids: list[str], name: str) -> Ref | None:
    if len(ids) > 1:
        raise _Ambiguous(
            f"{len(ids)} keys have the name {_shown(name)}", "retire all but one of them in the key manager"
        )
    return Ref(ids[0], name) if ids else None


def _fetch(server: "_Server", key_id: str, states: frozenset[str], prove: Callable[[Secret], None]) -> Secret:
    attributes, answer = server.ask([_get_attributes(key_id), _get(key_id)])
    key = None
    try:
        state = _read_facts(attributes, key_id).state
        if state not in states:
            raise server.error(StateBlocked, f"the key {_shown(key_id)} is {state}")
        key = _key(answer, key_id)
        prove(key)
    except BaseException as error:
        answer.wipe()
        if key:
            key.wipe()
        if isinstance(error, Tampered):
            raise server.error(Integrity, f"the key {_shown(key_id)} is another one than before") from error
        raise
    answer.wipe()
    return key


def _key(answer: "_Answer", key_id: str) -> Secret:
    """A copy of the key material (KMIP 1.4, 2.1.3 and 4.11). Raises Integrity."""
    payload = answer.good()
    _check_id(answer, payload, key_id)
    block = payload.within(Tags.SYMMETRIC_KEY, Tags.KEY_BLOCK)
    if payload.number(Tags.OBJECT_TYPE) != enums.ObjectType.SYMMETRIC_KEY.value or not block:
        raise answer.error(Integrity, f"{_shown(key_id)} is not a symmetric key")
    if block.first(Tags.KEY_WRAPPING_DATA):
        raise answer.error(Integrity, f"the key {_shown(key_id)} came wrapped by another key")
    if block.number(Tags.CRYPTOGRAPHIC_ALGORITHM) not in (None, enums.CryptographicAlgorithm.AES.value):
        raise answer.error(Integrity, f"the key {_shown(key_id)} is not for AES")
    value = block.within(Tags.KEY_VALUE)
    material = value.first(Tags.KEY_MATERIAL) if value else None
    if material and isinstance(material.value, list):  # Transparent Symmetric Key
        material = material.first(Tags.KEY)
    if material is None or not isinstance(material.value, Secret):
        raise answer.error(Integrity, f"the key {_shown(key_id)} came without its bytes")
    if len(material.value) != 32 or block.number(Tags.CRYPTOGRAPHIC_LENGTH) not in (None, 256):
        raise answer.error(Integrity, f"the key {_shown(key_id)} does not have 256 bits")
    if len(set(material.value.value)) == 1:
        raise answer.error(Integrity, f"the key {_shown(key_id)} is one byte repeated")
    return Secret(material.value.value)


def _facts(server: "_Server", key_id: str) -> _Facts:
    return _read_facts(server.ask([_get_attributes(key_id)])[0], key_id)


def _facts_or_problem(answer: "_Answer", key_id: str) -> _Facts | ProviderError:
    """One sick key does not stop the others. Raises Integrity for an answer about another key."""
    try:
        return answer.problem or _read_facts(answer, key_id)
    except Garbage as garbage:
        return answer.error(ProviderProtocol, f"the key {_shown(key_id)}: {garbage}")


def _read_facts(answer: "_Answer", key_id: str) -> _Facts:
    payload = answer.good()
    _check_id(answer, payload, key_id)
    found: dict[str, list[Node]] = {}
    for attribute in payload.all(Tags.ATTRIBUTE):
        value = attribute.first(Tags.ATTRIBUTE_VALUE)
        if value:
            found.setdefault(attribute.text(Tags.ATTRIBUTE_NAME), []).append(value)
    links = {link.number(Tags.LINK_TYPE): link.text(Tags.LINKED_OBJECT_IDENTIFIER) for link in found.get("Link", ())}
    return _Facts(
        _STATES.get(found["State"][0].as_number(), UNKNOWN) if "State" in found else UNKNOWN,
        frozenset(name.text(Tags.NAME_VALUE) for name in found.get("Name", ())),
        links.get(enums.LinkType.REPLACEMENT_OBJECT_LINK.value, ""),
        links.get(enums.LinkType.REPLACED_OBJECT_LINK.value, ""),
        all(found[name][0].as_number() == value for name, value in _AES_256.items() if name in found),
    )


_AES_256 = {
    "Object Type": enums.ObjectType.SYMMETRIC_KEY.value,
    "Cryptographic Algorithm": enums.CryptographicAlgorithm.AES.value,
    "Cryptographic Length": 256,
}


def _ids(answer: "_Answer") -> list[str]:
    """Of a Locate; servers report "none" as success and as Item Not Found."""
    if isinstance(answer.problem, NotFoundOrDenied | Unsupported):
        return []
    ids = [node.value for node in answer.good().all(Tags.UNIQUE_IDENTIFIER)]
    if not all(isinstance(each, str) and each for each in ids):
        raise Garbage("a key without an id")
    return list(dict.fromkeys(ids))


def _ids_or_problem(answer: "_Answer") -> list[str] | ProviderError:
    try:
        return _ids(answer)
    except Garbage as garbage:
        return answer.error(ProviderProtocol, str(garbage))
    except ProviderError as error:
        return error


def _created(server: "_Server", item: "_Item", other_than: str = "") -> str:
    """The id of a key that was just made."""
    answer = _done(server, item)
    key_id = answer.good().text(Tags.UNIQUE_IDENTIFIER)
    if not key_id or key_id == other_than:
        raise server.error(ProviderProtocol, "the server made a key without an id of its own")
    return key_id


def _done(server: "_Server", item: "_Item") -> "_Answer":
    """A change, asked for once."""
    [answer] = server.ask([item], repeat=False)
    answer.good()
    return answer


def _check_id(answer: "_Answer", payload: "Node", key_id: str) -> None:
    if payload.text(Tags.UNIQUE_IDENTIFIER) != key_id:
        raise answer.error(Integrity, f"asked for the key {_shown(key_id)}, the server answers with another one")


def _shown(text: str) -> str:
    """What a server or a file says, fit for a terminal and a log."""
    short = text if len(text) <= 80 else f"{text[:77]}..."
    return short if short.isascii() and short.isprintable() else ascii(short)


# Questions, as PyKMIP writes them.


class _Item(NamedTuple):
    operation: Any
    payload: Any


def _get_attributes(key_id: str) -> _Item:
    names = ["State", "Name", "Link", *_AES_256]
    return _Item(Operation.GET_ATTRIBUTES, payloads.GetAttributesRequestPayload(_checked(key_id), names))


def _get(key_id: str) -> _Item:
    return _Item(Operation.GET, payloads.GetRequestPayload(_checked(key_id), enums.KeyFormatType.RAW))


def _locate(name: str) -> _Item:
    return _Item(Operation.LOCATE, payloads.LocateRequestPayload(attributes=[_name(name)]))


def _create(name: str) -> _Item:
    make = AttributeFactory().create_attribute
    usage = [enums.CryptographicUsageMask.ENCRYPT, enums.CryptographicUsageMask.DECRYPT]
    template = objects.TemplateAttribute(
        attributes=[
            make(enums.AttributeType.CRYPTOGRAPHIC_ALGORITHM, enums.CryptographicAlgorithm.AES),
            make(enums.AttributeType.CRYPTOGRAPHIC_LENGTH, 256),
            make(enums.AttributeType.CRYPTOGRAPHIC_USAGE_MASK, usage),
            _name(name),
        ]
    )
    return _Item(Operation.CREATE, payloads.CreateRequestPayload(enums.ObjectType.SYMMETRIC_KEY, template))


def _rekey(key_id: str) -> _Item:
    return _Item(Operation.REKEY, payloads.RekeyRequestPayload(_checked(key_id)))


def _activate(key_id: str) -> _Item:
    return _Item(Operation.ACTIVATE, payloads.ActivateRequestPayload(UniqueIdentifier(_checked(key_id))))


def _revoke(key_id: str) -> _Item:
    reason = objects.RevocationReason(enums.RevocationReasonCode.CESSATION_OF_OPERATION)
    return _Item(Operation.REVOKE, payloads.RevokeRequestPayload(UniqueIdentifier(_checked(key_id)), reason))


def _discover() -> _Item:
    offered = [contents.ProtocolVersion(*version) for version in VERSIONS]
    return _Item(Operation.DISCOVER_VERSIONS, payloads.DiscoverVersionsRequestPayload(offered))


def _name(name: str) -> Any:
    value = Name.create(name, enums.NameType.UNINTERPRETED_TEXT_STRING)
    return AttributeFactory().create_attribute(enums.AttributeType.NAME, value)


def _checked(key_id: str) -> str:
    """An empty id would mean whichever key the server touched last."""
    if not key_id:
        raise NotFoundOrDenied("a key without an id cannot be asked for", _HINTS[NotFoundOrDenied])
    return key_id


def _request(items: Sequence[_Item], ids: Sequence[bytes], version: tuple[int, int], settings: Settings) -> bytes:
    authentication = None
    if settings.username:
        password = bytes(settings.password).decode("ascii") if settings.password else None
        value = objects.UsernamePasswordCredential(settings.username, password)
        credential = objects.Credential(enums.CredentialType.USERNAME_AND_PASSWORD, value)
        authentication = contents.Authentication([credential])
    header = messages.RequestHeader(
        protocol_version=contents.ProtocolVersion(*version),
        maximum_response_size=contents.MaximumResponseSize(ANSWER_MAX),
        authentication=authentication,
        batch_error_cont_option=contents.BatchErrorContinuationOption(enums.BatchErrorContinuationOption.CONTINUE),
        batch_count=contents.BatchCount(len(items)),
    )
    batch = [
        messages.RequestBatchItem(contents.Operation(item.operation), contents.UniqueBatchItemID(each), item.payload)
        for item, each in zip(items, ids, strict=True)
    ]
    stream = BytearrayStream()
    kmip_version = contents.protocol_version_to_kmip_version(header.protocol_version)
    messages.RequestMessage(header, batch).write(stream, kmip_version)
    return bytes(stream.buffer)


# Answers.


class _Answer(NamedTuple):
    """What the server answered to one item."""

    payload: Node | None
    problem: ProviderError | None
    error: Callable[[type[ProviderError], str], ProviderError]

    def good(self) -> Node:
        """The payload. Raises what the server answered instead."""
        if self.problem:
            raise self.problem
        if self.payload is None:
            raise Garbage("success without a payload")
        return self.payload

    def wipe(self) -> None:
        if self.payload:
            self.payload.wipe()


# One endpoint.


def _is_too_much(answer: _Answer) -> bool:
    return isinstance(answer.problem, Unsupported | ProviderProtocol)


def _plainer(item: _Item) -> _Item | None:
    """The same question without its details, for a server that does not know an attribute, or a key format."""
    if item.operation is Operation.GET_ATTRIBUTES:
        return _Item(item.operation, payloads.GetAttributesRequestPayload(item.payload.unique_identifier))
    if item.operation is Operation.GET:
        return _Item(item.operation, payloads.GetRequestPayload(item.payload.unique_identifier))
    return None


class _Refused(Exception):
    """The server refused the whole message, not one item of it."""

    def __init__(self, error: ProviderError) -> None:
        self.error = error


class _Server:
    """An endpoint: its connection, the KMIP version that it speaks, and when it may be asked again."""

    def __init__(
        self,
        endpoint: Endpoint,
        settings: Settings,
        context: ssl.SSLContext,
        clock: Callable[[], float],
        random: Callable[[], float],
    ) -> None:
        self.endpoint = endpoint
        self.version: tuple[int, int] | None = None
        self.off_until = 0.0
        self.off_for: ProviderError | None = None
        self._failures = 0
        self._end = 0.0
        self._settings = settings
        self._context = context
        self._clock = clock
        self._random = random
        self._line: Line | None = None
        self._most = 2 * KEYS_A_REQUEST
        self._said: list[ProviderError] = []
        """What it answered to single items since `begin`: it works."""

    @property
    def connected(self) -> bool:
        return self._line is not None

    def off(self) -> bool:
        """Whether it is not to be asked now."""
        return self._clock() < self.off_until

    def begin(self) -> None:
        self._end = self._clock() + _EXCHANGES * self._settings.timeout
        self._said.clear()

    def worked(self) -> None:
        self._failures, self.off_until, self.off_for = 0, 0.0, None

    def failed(self, error: ProviderError) -> None:
        """Backs off, with jitter; after a wrong key, for good."""
        if isinstance(error, NotFoundOrDenied | StateBlocked | Unsupported | _Ambiguous):
            return
        if any(error is each for each in self._said):
            return
        self.drop()
        self._failures += 1
        base = _CLIENT_AUTH_BACKOFF if isinstance(error, ClientAuth) else 2.0 ** min(self._failures, 10)
        wait = min(base, _BACKOFF_MAX) * (0.5 + self._random() / 2)
        self.off_until = float("inf") if isinstance(error, Integrity) else self._clock() + wait
        self.off_for = error

    def drop(self) -> None:
        if self._line:
            self._line.close()
            self._line = None

    def error(self, kind: type[ProviderError], what: str) -> ProviderError:
        return kind(f"{self.endpoint}: {what}", _HINTS[kind])

    def ask(self, items: Sequence[_Item], repeat: bool = True) -> list[_Answer]:
        """One answer an item, in that order; one request, if the server takes that many items.

        Raises ProviderError and Garbage, for the whole exchange. Without `repeat` nothing is sent twice.
        """
        answers = self._ask_all(items, repeat)
        plainer = {at: _plainer(item) for at, item in enumerate(items) if _is_too_much(answers[at])}
        again = {at: item for at, item in plainer.items() if item}
        for at, answer in zip(again, self._ask_all(list(again.values()), repeat), strict=True):
            if not answer.problem:
                answers[at] = answer
        return answers

    def _ask_all(self, items: Sequence[_Item], repeat: bool) -> list[_Answer]:
        answers: list[_Answer] = []
        while len(answers) < len(items):
            part = items[len(answers) : len(answers) + self._most]
            try:
                answers += self._exchange(part, repeat)
            except _Refused as refused:
                if len(part) == 1:
                    raise refused.error from refused
                self._most = len(part) // 2
        return answers

    def _exchange(self, items: Sequence[_Item], repeat: bool) -> list[_Answer]:
        until = Until(self._clock, min(self._settings.timeout, self._end - self._clock()))
        if not repeat:
            self.drop()  # the server may have closed it, which would look as if it did not answer
        fresh = not self.connected
        try:
            return self._send(items, self.version or VERSIONS[0], until)
        except Silent as silent:
            self.drop()
            if not repeat or (fresh and self.version):
                raise self.error(ProviderUnavailable, str(silent)) from silent
        except _Refused:
            if not repeat or self.version:
                raise
        if not self.version:
            self._negotiate(until)
        try:
            return self._send(items, self.version or VERSIONS[0], until)
        except Silent as silent:
            raise self.error(ProviderUnavailable, str(silent)) from silent

    def _negotiate(self, until: Until) -> None:
        """For a server that does not take our best version: which one it does."""
        problem = self.error(Unsupported, "the server speaks no KMIP version of 1.1 to 1.4")
        for version in VERSIONS[1:]:
            self.drop()
            try:
                [answer] = self._send([_discover()], version, until)
            except Silent as silent:
                problem = self.error(ProviderUnavailable, str(silent))
                continue
            except _Refused as refused:
                problem = refused.error
                continue
            nodes = answer.payload.all(Tags.PROTOCOL_VERSION) if answer.payload else []
            offered = {
                (node.number(Tags.PROTOCOL_VERSION_MAJOR), node.number(Tags.PROTOCOL_VERSION_MINOR)) for node in nodes
            }
            self.version = next((each for each in VERSIONS if each in offered), version)
            return
        raise problem

    def _send(self, items: Sequence[_Item], version: tuple[int, int], until: Until) -> list[_Answer]:
        ids = [os.urandom(8) for _ in items]
        request = _request(items, ids, version, self._settings)
        try:
            if self._line is None:
                self._line = Line(self.endpoint, self._context, until)
            with self._line.exchange(request, until) as raw:
                [message] = nodes(memoryview(raw.value))
        except OSError as error:
            raise self._explained(error) from error
        answers = self._matched(message, items, ids)
        self.version = version
        return answers

    def _matched(self, message: Node, items: Sequence[_Item], ids: Sequence[bytes]) -> list[_Answer]:
        """The answers in the order of the questions. Raises Garbage, _Refused, ClientAuth."""
        header, batch = message.first(Tags.RESPONSE_HEADER), message.all(Tags.RESPONSE_BATCH_ITEM)
        version = header.within(Tags.PROTOCOL_VERSION) if header else None
        if not header or not version:
            raise Garbage("an answer without a protocol version")
        if header.number(Tags.BATCH_COUNT) != len(batch) or not batch:
            raise Garbage("the batch count is wrong")
        failed = [node for node in batch if node.number(Tags.RESULT_STATUS)]
        if version.number(Tags.PROTOCOL_VERSION_MAJOR) != 1:
            if len(failed) == len(batch):
                raise _Refused(self.error(Unsupported, "the server speaks no KMIP version of 1.1 to 1.4"))
            raise Garbage("an answer of another protocol version")
        by_id = {_batch_id(node): node for node in batch}
        if len(items) == 1 and by_id.keys() == {b""} and batch[0].first(Tags.OPERATION):
            by_id = {ids[0]: batch[0]}
        if len(batch) == 1 and failed and (len(items) > 1 or not by_id.keys() & set(ids)):
            problem = self._problem(batch[0])
            raise problem if isinstance(problem, ClientAuth) else _Refused(problem)
        if len(items) > 1 and by_id.keys() == {b""}:
            raise _Refused(self.error(ProviderProtocol, "the server does not say which answer is to which question"))
        if failed and batch[-1] is failed[0] and len(batch) < len(items):  # it stops at a failure, though asked not to
            ids = ids[: len(batch)]
        if by_id.keys() != set(ids) or len(batch) != len(ids):
            raise Garbage("an answer to another question")
        items = items[: len(ids)]
        return [self._answer(by_id[each], item) for each, item in zip(ids, items, strict=True)]

    def _answer(self, node: Node, item: _Item) -> _Answer:
        failed = node.number(Tags.RESULT_STATUS) != enums.ResultStatus.SUCCESS.value
        operation = node.number(Tags.OPERATION)
        if operation != item.operation.value and not (failed and operation is None):
            raise Garbage("an answer to another operation")
        problem = self._problem(node) if failed else None
        if isinstance(problem, ClientAuth):
            raise problem
        if problem:
            self._said.append(problem)
        return _Answer(node.first(Tags.RESPONSE_PAYLOAD), problem, self.error)

    def _problem(self, node: Node) -> ProviderError:
        reason = node.number(Tags.RESULT_REASON)
        said = node.text(Tags.RESULT_MESSAGE)
        if node.number(Tags.RESULT_STATUS) == enums.ResultStatus.OPERATION_PENDING.value:
            return self.error(Unsupported, "the server answers later (asynchronously)")
        kind = _REASONS.get(reason or 0x100, ProviderProtocol)
        name = next((each.name for each in enums.ResultReason if each.value == reason), f"reason {reason}")
        return self.error(kind, name.lower().replace("_", " ") + (f": {_shown(said)}" if said else ""))

    def _explained(self, error: OSError) -> ProviderError:
        if isinstance(error, ssl.SSLCertVerificationError):
            kind = ClockWrong if error.verify_code == _NOT_YET_VALID else PeerUntrusted
            return self.error(kind, f"the server's certificate: {error.verify_message}")
        if isinstance(error, TimeoutError):
            return self.error(ProviderUnavailable, f"no answer within {self._settings.timeout:g} s")
        if isinstance(error, ssl.SSLEOFError | ssl.SSLZeroReturnError | ssl.SSLSyscallError) or not isinstance(
            error, ssl.SSLError
        ):
            return self.error(ProviderUnavailable, error.strerror or str(error))
        reason = error.reason or "TLS failed"
        if "ALERT" in reason and any(part in reason for part in _ALERTS_OF_CLIENT_AUTH):
            return self.error(ClientAuth, f"the server refuses our certificate: {reason}")
        return self.error(ProviderUnavailable if "INTERNAL_ERROR" in reason else ProviderProtocol, f"TLS: {reason}")


def _batch_id(node: Node) -> bytes:
    found = node.first(Tags.UNIQUE_BATCH_ITEM_ID)
    return bytes(found.value) if found and isinstance(found.value, Secret) else b""


_NOT_YET_VALID = 9
"""X509_V_ERR_CERT_NOT_YET_VALID."""

_ALERTS_OF_CLIENT_AUTH = ("CERTIFICATE", "UNKNOWN_CA", "ACCESS_DENIED", "DECRYPT_ERROR")
"""RFC 8446, 6.2. With TLS 1.3 they come after the handshake, with the first answer."""
