# SPDX-License-Identifier: Apache-2.0
"""Keys of a key manager that speaks KMIP 1.1 to 1.4 (OASIS): the only file that imports PyKMIP.

    question ──> first endpoint that is not backing off ──> one connection ──> one batch ──> answer, checked ──> result
                      └── any failure of a read: the next endpoint

PyKMIP writes the questions. The answers are read here: its parser gives up on Link and on x- attributes, and believes
lengths, ids and counts that nobody checked. Everything that a server says is compared with what it was asked: batch
ids are random, so an answer to another question never fits.

Two rules protect keys from a server that lies, lags or was replaced. A key that it does not know has no successor
there, unless that one says by a Link that it replaces this very key. And dates are no evidence: a migration resets
them, so of two keys with one name neither is the newer.
"""

import calendar
import os
import random as _random
import socket
import ssl
import sys
import threading
import time
from collections.abc import Callable, Sequence
from functools import partial
from importlib import import_module
from importlib.util import find_spec, module_from_spec
from typing import Any, NamedTuple, TypeVar

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
    Usage,
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
ANSWER_MAX = 1 << 20
"""Bytes."""
VERSIONS = ((1, 4), (1, 3), (1, 2), (1, 1))
"""Of KMIP, the best first; 2.x encodes attributes differently."""
_HOPS = 16
"""Replacements of one key that are followed in one `resolve`."""
_NAMESAKES_MAX = 100
"""More keys than that for one name: the server did not look at the name."""
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
    ProviderUnavailable: "check the network and the key manager; what is open stays open",
    PeerUntrusted: "check the endpoint's name and the CA; do not go on if neither is wrong",
    ClientAuth: "renew the client certificate, or let the key manager accept it",
    ClockWrong: "wait until the time is set: timedatectl",
    ProviderProtocol: "check that the endpoint is a KMIP server, version 1.1 to 1.4",
    Integrity: "find out why the key manager answers that; nothing of it was used",
    NotFoundOrDenied: "look for the key in the key manager, and what this client may do with it; delete nothing",
    StateBlocked: "see in the key manager who revoked it and why",
    Unsupported: "see what the key manager offers: unlock-kmip(7)",
}


class Endpoint(NamedTuple):
    host: str
    """A name or an address."""
    port: int = 5696
    server_name: str = ""
    """What the server's certificate must be for; '' is the host."""

    @classmethod
    def parse(cls, text: str) -> "Endpoint":
        """`HOST[:PORT][=SERVER_NAME]`; an IPv6 address with a port is in brackets. Raises Usage."""
        place, _, server_name = text.strip().partition("=")
        host, port = place, "5696"
        if place.startswith("["):
            host, _, rest = place[1:].partition("]")
            port = rest.removeprefix(":") if rest else port
        elif place.count(":") == 1:
            host, _, port = place.partition(":")
        number = int(port) if port.isascii() and port.isdecimal() else 0
        if not host or not place.isprintable() or " " in text.strip() or not 0 < number < 65536:
            raise Usage(
                f"{text!r} is not an endpoint", "HOST, HOST:PORT, [IPV6]:PORT, each with =SERVER_NAME if need be"
            )
        return cls(host, number, server_name)

    def __str__(self) -> str:
        """As `parse` reads it."""
        host = f"[{self.host}]" if ":" in self.host else self.host
        return f"{host}:{self.port}" + (f"={self.server_name}" if self.server_name else "")


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


def new_id() -> str:
    return f"kmip-{os.urandom(16).hex()}"


class Kmip:
    """The provider `kmip`. Owns the secrets in its settings and wipes them when closed. Not thread-safe.

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
        self._validity = _validity(settings.certificate)
        context = _tls_context(settings)
        self._servers = [_Server(each, settings, context, clock, random) for each in settings.endpoints]
        self._capabilities: Capabilities | None = None

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
        """What one endpoint does not know (it may lag), the others are asked for."""
        first, statuses = self._read(lambda server: (server, _statuses(server, refs, USABLE)))
        for server in self._order():
            missing = [at for at, status in enumerate(statuses) if not status.found]
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
                if status.found:
                    statuses[at] = status
        return statuses

    def fetch(self, key_id: str, states: frozenset[str] = USABLE, prove: Callable[[Secret], None] = no_proof) -> Secret:
        return self._read(lambda server: _fetch(server, key_id, states, prove))

    def health(self) -> Health:
        found = []
        for server in self._servers:
            problem = None
            server.drop()
            try:
                self._ask(server, lambda server: server.ask([_discover()]))
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
        try:
            result = work(server)
        except _Garbage as garbage:
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
    named = {ref: _ids(next(answers)) if ref.name else [] for ref in refs}
    wanted = {each for ids in named.values() if len(ids) <= _NAMESAKES_MAX for each in ids} | _links(facts)
    for _ in range(_HOPS):
        unknown = sorted(wanted - facts.keys())
        if not unknown:
            break
        answers = iter(server.ask([_get_attributes(each) for each in unknown]))
        facts |= {each: _facts_or_problem(next(answers), each) for each in unknown}
        wanted = _links(facts)
    return [_judge(server, ref, facts, named[ref], ready) for ref in refs]


def _judge(
    server: "_Server", ref: Ref, facts: dict[str, _Facts | ProviderError], named: list[str], ready: frozenset[str]
) -> Status:
    """Which key `ref` is now. In doubt it stays what it is, with the doubt as its problem."""
    known = {key: each for key, each in facts.items() if isinstance(each, _Facts)}
    usable = {key for key, each in known.items() if each.state in ready and each.is_aes_256}
    bearers = {key for key in named if key in usable and ref.name in known[key].names} - {ref.id}
    own = facts[ref.id]
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
    """One sick key does not stop the others."""
    return answer.problem or _read_facts(answer, key_id)


def _read_facts(answer: "_Answer", key_id: str) -> _Facts:
    payload = answer.good()
    _check_id(answer, payload, key_id)
    found: dict[str, list[_Node]] = {}
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
    ids = [str(node.value) for node in answer.good().all(Tags.UNIQUE_IDENTIFIER)]
    if not all(ids):
        raise _Garbage("a key without an id")
    return list(dict.fromkeys(ids))


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


def _check_id(answer: "_Answer", payload: "_Node", key_id: str) -> None:
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
        password = bytes(settings.password).decode() if settings.password else None
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


class _Garbage(Exception):
    """An answer that is not KMIP."""


_Value = Any
"""list[_Node], int, str, or Secret for bytes: key material is never in another type."""


class _Node(NamedTuple):
    """One TTLV item (KMIP 1.4, 9.1)."""

    tag: int
    value: _Value

    def all(self, tag: Any) -> list["_Node"]:
        return [node for node in self.value if node.tag == tag.value] if isinstance(self.value, list) else []

    def first(self, tag: Any) -> "_Node | None":
        found = self.all(tag)
        if len(found) > 1:
            raise _Garbage(f"{tag.name} more than once")
        return found[0] if found else None

    def within(self, *tags: Any) -> "_Node | None":
        node: _Node | None = self
        for tag in tags:
            node = node.first(tag) if node else None
        return node

    def text(self, tag: Any) -> str:
        """'' when absent."""
        node = self.first(tag)
        if node and not isinstance(node.value, str):
            raise _Garbage(f"{tag.name} is not a text")
        return node.value if node else ""

    def number(self, tag: Any) -> int | None:
        node = self.first(tag)
        return node.as_number() if node else None

    def numbers(self, tag: Any) -> list[int]:
        return [node.as_number() for node in self.all(tag)]

    def as_number(self) -> int:
        if not isinstance(self.value, int):
            raise _Garbage(f"{self.tag:#x} is not a number")
        return self.value

    def wipe(self) -> None:
        if isinstance(self.value, Secret):
            self.value.wipe()
        elif isinstance(self.value, list):
            for node in self.value:
                node.wipe()


_STRUCTURE, _INTEGER, _LONG, _BIG, _ENUMERATION, _BOOLEAN, _TEXT, _BYTES, _DATE, _INTERVAL = range(1, 11)
_FIXED = {_INTEGER: 4, _LONG: 8, _ENUMERATION: 4, _BOOLEAN: 8, _DATE: 8, _INTERVAL: 4}
"""Length in bytes by type."""


def _nodes(data: memoryview, depth: int = 0) -> list[_Node]:
    """The TTLV items that fill `data`."""
    found, at = [], 0
    while at < len(data):
        tag, kind, length = (
            int.from_bytes(data[at : at + 3]),
            data[at + 3 : at + 4],
            int.from_bytes(data[at + 4 : at + 8]),
        )
        value = data[at + 8 : at + 8 + length]
        at += 8 + (length + 7) // 8 * 8
        if at > len(data) or depth > 12:
            raise _Garbage("a TTLV item that does not fit in its place")
        found.append(_Node(tag, _value(kind[0], value, depth)))
    return found


def _value(kind: int, data: memoryview, depth: int) -> _Value:
    if len(data) != _FIXED.get(kind, len(data)):
        raise _Garbage("a TTLV item of the wrong length")
    if kind == _STRUCTURE:
        return _nodes(data, depth + 1)
    if kind in (_BYTES, _BIG):
        return Secret(data)  # type: ignore[arg-type]
    if kind == _TEXT:
        try:
            return bytes(data).decode()
        except UnicodeDecodeError as error:
            raise _Garbage("a text that is not UTF-8") from error
    if kind in _FIXED:
        return int.from_bytes(data, signed=kind != _ENUMERATION)
    raise _Garbage(f"an unknown TTLV type {kind}")


class _Answer(NamedTuple):
    """What the server answered to one item."""

    payload: _Node | None
    problem: ProviderError | None
    error: Callable[[type[ProviderError], str], ProviderError]

    def good(self) -> _Node:
        """The payload. Raises what the server answered instead."""
        if self.problem:
            raise self.problem
        if self.payload is None:
            raise _Garbage("success without a payload")
        return self.payload

    def wipe(self) -> None:
        if self.payload:
            self.payload.wipe()


# One endpoint.


class _Refused(Exception):
    """The server refused the whole message, not one item of it."""

    def __init__(self, error: ProviderError) -> None:
        self.error = error


class _Silent(Exception):
    """The server closed the connection instead of answering."""


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
        self._settings = settings
        self._context = context
        self._clock = clock
        self._random = random
        self._line: _Line | None = None
        self._most = 2 * KEYS_A_REQUEST

    @property
    def connected(self) -> bool:
        return self._line is not None

    def off(self) -> bool:
        """Whether it is not to be asked now."""
        return self._clock() < self.off_until

    def worked(self) -> None:
        self._failures, self.off_until, self.off_for = 0, 0.0, None

    def failed(self, error: ProviderError) -> None:
        """Backs off, with jitter; after a wrong key, for good."""
        if isinstance(error, NotFoundOrDenied | StateBlocked | Unsupported | _Ambiguous):
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

        Raises ProviderError and _Garbage, for the whole exchange. Without `repeat` nothing is sent twice.
        """
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
        until = _Until(self._clock, self._settings.timeout)
        fresh = not self.connected
        try:
            return self._send(items, self.version or VERSIONS[0], until)
        except _Silent as silent:
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
        except _Silent as silent:
            raise self.error(ProviderUnavailable, str(silent)) from silent

    def _negotiate(self, until: "_Until") -> None:
        """For a server that does not take our best version: which one it does."""
        problem = self.error(Unsupported, "the server speaks no KMIP version of 1.1 to 1.4")
        for version in VERSIONS[1:]:
            self.drop()
            try:
                [answer] = self._send([_discover()], version, until)
            except _Silent as silent:
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

    def _send(self, items: Sequence[_Item], version: tuple[int, int], until: "_Until") -> list[_Answer]:
        ids = [os.urandom(8) for _ in items]
        request = _request(items, ids, version, self._settings)
        try:
            if self._line is None:
                self._line = _Line(self.endpoint, self._context, until)
            with self._line.exchange(request, until) as raw:
                [message] = _nodes(memoryview(raw.value))
        except OSError as error:
            raise self._explained(error) from error
        answers = self._matched(message, items, ids)
        self.version = version
        return answers

    def _matched(self, message: _Node, items: Sequence[_Item], ids: Sequence[bytes]) -> list[_Answer]:
        """The answers in the order of the questions. Raises _Garbage, _Refused, ClientAuth."""
        header, batch = message.first(Tags.RESPONSE_HEADER), message.all(Tags.RESPONSE_BATCH_ITEM)
        version = header.within(Tags.PROTOCOL_VERSION) if header else None
        if not header or not version or version.number(Tags.PROTOCOL_VERSION_MAJOR) != 1:
            raise _Garbage("an answer of another protocol version")
        if header.number(Tags.BATCH_COUNT) != len(batch) or not batch:
            raise _Garbage("the batch count is wrong")
        by_id = {_batch_id(node): node for node in batch}
        if len(items) == 1 and by_id.keys() == {b""} and batch[0].first(Tags.OPERATION):
            by_id = {ids[0]: batch[0]}
        if len(batch) == 1 and not by_id.keys() & set(ids) and batch[0].number(Tags.RESULT_STATUS):
            problem = self._problem(batch[0])
            raise problem if isinstance(problem, ClientAuth) else _Refused(problem)
        if by_id.keys() != set(ids) or len(batch) != len(ids):
            raise _Garbage("an answer to another question")
        return [self._answer(by_id[each], item) for each, item in zip(ids, items, strict=True)]

    def _answer(self, node: _Node, item: _Item) -> _Answer:
        failed = node.number(Tags.RESULT_STATUS) != enums.ResultStatus.SUCCESS.value
        operation = node.number(Tags.OPERATION)
        if operation != item.operation.value and not (failed and operation is None):
            raise _Garbage("an answer to another operation")
        problem = self._problem(node) if failed else None
        if isinstance(problem, ClientAuth):
            raise problem
        return _Answer(node.first(Tags.RESPONSE_PAYLOAD), problem, self.error)

    def _problem(self, node: _Node) -> ProviderError:
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


def _batch_id(node: _Node) -> bytes:
    found = node.first(Tags.UNIQUE_BATCH_ITEM_ID)
    return bytes(found.value) if found and isinstance(found.value, Secret) else b""


_NOT_YET_VALID = 9
"""X509_V_ERR_CERT_NOT_YET_VALID."""

_ALERTS_OF_CLIENT_AUTH = ("CERTIFICATE", "UNKNOWN_CA", "ACCESS_DENIED", "DECRYPT_ERROR")
"""RFC 8446, 6.2. With TLS 1.3 they come after the handshake, with the first answer."""


# The wire.


class _Until:
    """One deadline for many steps."""

    def __init__(self, clock: Callable[[], float], seconds: float) -> None:
        self._clock = clock
        self._end = clock() + seconds

    def left(self) -> float:
        """Seconds. Raises TimeoutError."""
        left = self._end - self._clock()
        if left <= 0:
            raise TimeoutError
        return left


class _Line:
    """One TLS connection; each step ends at `until`. Raises OSError."""

    def __init__(self, endpoint: Endpoint, context: ssl.SSLContext, until: _Until) -> None:
        plain = _connect(endpoint, until)
        plain.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        name = endpoint.server_name or endpoint.host
        self._socket = context.wrap_socket(plain, server_hostname=name, do_handshake_on_connect=False)
        try:
            self._socket.settimeout(until.left())
            self._socket.do_handshake()
        except BaseException:
            self._socket.close()
            raise

    def close(self) -> None:
        self._socket.close()

    def exchange(self, request: bytes, until: _Until) -> Secret:
        """The whole answer, header included. Raises _Silent, _Garbage, OSError."""
        try:
            rest = memoryview(request)
            while rest:
                self._socket.settimeout(until.left())
                rest = rest[self._socket.send(rest) :]
        except TimeoutError:
            raise
        except OSError:
            """The server hung up; what it said first is still to be read."""
        head = bytearray(8)
        self._read(memoryview(head), until, started=False)
        length = int.from_bytes(head[4:])
        if int.from_bytes(head[:3]) != Tags.RESPONSE_MESSAGE.value or head[3] != _STRUCTURE:
            raise _Garbage("the answer is not KMIP")
        if length > ANSWER_MAX - 8:
            raise _Garbage(f"an answer of {length} bytes")
        answer = Secret(bytes(head) + bytes(length))
        try:
            self._read(memoryview(answer.value)[8:], until, started=True)
        except BaseException:
            answer.wipe()
            raise
        return answer

    def _read(self, into: memoryview, until: _Until, started: bool) -> None:
        while into:
            self._socket.settimeout(until.left())
            try:
                count = self._socket.recv_into(into)
            except ConnectionError as error:
                count, said = 0, error.strerror
            else:
                said = "the server closed the connection instead of answering"
            if not count and not started:
                raise _Silent(said)
            if not count:
                raise _Garbage("the connection ended in the middle of an answer")
            into, started = into[count:], True


def _connect(endpoint: Endpoint, until: _Until) -> socket.socket:
    """The first address that answers; each gets its share of the time."""
    addresses = _addresses(endpoint, until)
    problem = OSError(f"{endpoint.host} has no address")
    for at, (family, kind, protocol, _, address) in enumerate(addresses):
        plain = socket.socket(family, kind, protocol)
        try:
            plain.settimeout(until.left() / (len(addresses) - at))
            plain.connect(address)
            return plain
        except OSError as error:
            plain.close()
            problem = error
        except BaseException:
            plain.close()
            raise
    raise problem


def _addresses(endpoint: Endpoint, until: _Until) -> list[Any]:
    """Of a name, from the resolver, which knows no deadline: it is left alone when it is late."""
    found: list[Any] = []

    def look_up() -> None:
        try:
            found.extend(socket.getaddrinfo(endpoint.host, endpoint.port, type=socket.SOCK_STREAM))
        except (OSError, UnicodeError):
            """No address."""

    thread = threading.Thread(target=look_up, daemon=True)
    thread.start()
    thread.join(until.left())
    if thread.is_alive():
        raise TimeoutError
    return found


def _tls_context(settings: Settings) -> ssl.SSLContext:
    """TLS 1.2 or later, host names checked, our certificate. Ignores SSLKEYLOGFILE. Raises Malformed."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.minimum_version = ssl.TLSVersion.TLSv1_2
    try:
        context.load_verify_locations(cadata=settings.ca)
    except (ssl.SSLError, ValueError) as error:
        raise Malformed("the key manager's CA is not a certificate in PEM", "give the CA's certificate") from error
    fd = os.memfd_create("unlock", os.MFD_CLOEXEC)
    try:
        with Secret(settings.certificate.encode() + b"\n") as pem:
            pem.value += settings.key.value
            for at in range(0, len(pem), 4096):
                os.write(fd, memoryview(pem.value)[at : at + 4096])
            context.load_cert_chain(f"/proc/self/fd/{fd}", password="")
            os.pwrite(fd, bytes(len(pem)), 0)
    except OSError as error:
        raise Malformed(
            "the client certificate and its key do not go together, or are not PEM",
            "give the certificate and its unencrypted key",
        ) from error
    finally:
        os.close(fd)
    return context


def _validity(certificate: str) -> tuple[float, float]:
    """From when until when the first certificate of a PEM is valid, seconds since 1970. Raises Malformed.

    X.509, RFC 5280, 4.1: Certificate ::= { tbs { [0] version, serial, signature, issuer, validity { from, to } ... } }
    """
    end = "-----END CERTIFICATE-----"
    start = certificate.find("-----BEGIN CERTIFICATE-----")
    try:
        der = memoryview(ssl.PEM_cert_to_DER_cert(certificate[start : certificate.index(end) + len(end)]))
        fields = _der(_der(_der(der)[0][1])[0][1])
        times = _der(fields[4 if fields[0][0] == 0xA0 else 3][1])
        begins, ends = (_der_time(tag, bytes(value).decode()) for tag, value in times)
    except (ValueError, IndexError) as error:
        raise Malformed("the client certificate is not a certificate in PEM", "give it in PEM") from error
    return begins, ends


def _der(data: memoryview) -> list[tuple[int, memoryview]]:
    """Tags and values of the DER items in `data`."""
    found, at = [], 0
    while at < len(data):
        tag, length, at = data[at], data[at + 1], at + 2
        if length & 0x80:
            size = length & 0x7F
            length, at = int.from_bytes(data[at : at + size]), at + size
        found.append((tag, data[at : at + length]))
        at += length
    return found


def _der_time(tag: int, text: str) -> float:
    """UTCTime has two digits of the year, of 1950 to 2049."""
    if tag == 0x17:
        text = ("20" if text < "50" else "19") + text
    return float(calendar.timegm(time.strptime(text, "%Y%m%d%H%M%SZ")))
