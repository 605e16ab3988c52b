# SPDX-License-Identifier: Apache-2.0
"""What `provider` asks of one server, operation by operation, and what follows from the answers.

Every function raises ProviderError and MalformedAnswer; none goes to another endpoint.
"""

from collections.abc import Callable, Sequence

from ...errors import (
    Integrity,
    NotFoundOrDenied,
    ProviderProtocol,
    ProviderUnavailable,
    StateBlocked,
    Tampered,
    Unsupported,
)
from ...secret import Secret
from .. import ACTIVE, BLOCKED, PRE_ACTIVE, USABLE, Capabilities, Ref, Status
from . import requests
from .failures import AmbiguousKeys, printable
from .key_facts import KeyFacts, facts_or_problem, ids_or_problem, read_facts, read_ids, read_key
from .protocol import Operation, Tag
from .replacement import NAMESAKES_MAX, linked_ids, status_of
from .requests import RequestItem
from .server import Server

_HOPS = 16
"""Replacements of one key that are followed in one `key_statuses`."""


# Questions


def try_connection(server: Server) -> None:
    """Makes a new connection and has the server answer on it."""
    server.drop()
    server.ask([requests.discover_versions()])


def query_capabilities(server: Server) -> Capabilities:
    """What the server offers. A server that does not say so is asked for Create, and not for Re-key."""
    [answer] = server.ask([requests.query_operations()])
    if isinstance(answer.problem, Unsupported | NotFoundOrDenied):
        return Capabilities(create=True, rekey=False)
    offered = answer.checked_payload().numbers(Tag.OPERATION)
    return Capabilities(Operation.CREATE in offered, Operation.REKEY in offered)


def key_statuses(server: Server, refs: Sequence[Ref], *, ready: frozenset[str]) -> list[Status]:
    """One status a key, by one request, and more only for keys that seem to have changed.

    `ready`: states in which a replacement counts.
    """
    items = [requests.get_attributes(ref.id) for ref in refs]
    items += [requests.locate(ref.name) for ref in refs if ref.name]
    answers = iter(server.ask(items))
    facts = {ref.id: facts_or_problem(next(answers), ref.id) for ref in refs}
    named = {ref: ids_or_problem(next(answers)) if ref.name else [] for ref in refs}
    found = [ids for ids in named.values() if isinstance(ids, list) and len(ids) <= NAMESAKES_MAX]
    wanted = {each for ids in found for each in ids} | linked_ids(facts)
    for _ in range(_HOPS):
        unknown = sorted(wanted - facts.keys())
        if not unknown:
            break
        answers = iter(server.ask([requests.get_attributes(each) for each in unknown]))
        facts |= {each: facts_or_problem(next(answers), each) for each in unknown}
        wanted = linked_ids(facts)
    return [status_of(ref, facts, named[ref], ready=ready, endpoint=server.endpoint) for ref in refs]


def find_key(server: Server, name: str) -> Ref | None:
    """The one usable key of that name, not yet active perhaps. Raises AmbiguousKeys for several."""
    ids = _usable_ids(server, name)
    if len(ids) > 1:
        raise AmbiguousKeys(
            f"{len(ids)} keys have the name {printable(name)}", "retire all but one of them in the key manager"
        )
    return Ref(ids[0], name) if ids else None


def _usable_ids(server: Server, name: str) -> list[str]:
    """Ids of the keys of that name that may be used, now or when activated."""
    ids = read_ids(server.ask([requests.locate(name)])[0])
    if len(ids) > NAMESAKES_MAX:
        raise server.error(ProviderProtocol, f"the server returns {len(ids)} keys for the name {printable(name)}")
    answers = server.ask([requests.get_attributes(each) for each in ids]) if ids else []
    found = [facts_or_problem(answer, each) for answer, each in zip(answers, ids, strict=True)]
    for problem in found:
        if isinstance(problem, ProviderUnavailable | ProviderProtocol):
            raise problem
    return [
        each
        for each, facts in zip(ids, found, strict=True)
        if isinstance(facts, KeyFacts) and name in facts.names and facts.state not in BLOCKED and facts.is_aes_256
    ]


def find_replacement(server: Server, ref: Ref, new_name: str) -> Ref | None:
    """The key that an earlier rotation of `ref` has made, not yet active perhaps. Raises AmbiguousKeys."""
    if made := find_key(server, new_name):
        return made
    [status] = key_statuses(server, [ref], ready=USABLE | {PRE_ACTIVE})
    if isinstance(status.problem, Integrity):
        raise AmbiguousKeys(str(status.problem), status.problem.hint)
    return Ref(status.current, ref.name) if status.changed else None


def fetch_key(server: Server, key_id: str, states: frozenset[str], prove: Callable[[Secret], None]) -> Secret:
    """As `Provider.fetch`, from this server."""
    attributes, answer = server.ask([requests.get_attributes(key_id), requests.get(key_id)])
    key = None
    try:
        state = read_facts(attributes, key_id).state
        if state not in states:
            raise server.error(StateBlocked, f"the key {printable(key_id)} is {state}")
        key = read_key(answer, key_id)
        prove(key)
    except BaseException as error:
        answer.wipe()
        if key:
            key.wipe()
        if isinstance(error, Tampered):
            raise server.error(Integrity, f"the key {printable(key_id)} is another one than before") from error
        raise
    answer.wipe()
    return key


def is_active(server: Server, key_id: str) -> bool:
    """Raises StateBlocked for a key that cannot become active again."""
    state = _state(server, key_id)
    if state in BLOCKED:
        raise server.error(StateBlocked, f"the key {printable(key_id)} is {state}")
    return state == ACTIVE


def is_out_of_use(server: Server, key_id: str) -> bool:
    """Whether a key is deactivated or destroyed, or was never activated."""
    return _state(server, key_id) in BLOCKED | {PRE_ACTIVE}


def _state(server: Server, key_id: str) -> str:
    return read_facts(server.ask([requests.get_attributes(key_id)])[0], key_id).state


# Changes, each sent once


def create_key(server: Server, name: str) -> Ref:
    """A new key of that name, to be activated."""
    return Ref(_make_key(server, requests.create(name)), name)


def replace_key(server: Server, ref: Ref, new_name: str, *, rekey: bool) -> Ref:
    """A new key in the place of `ref`: by Re-key, with the name of `ref`, or else one of its own, with `new_name`."""
    if rekey:
        try:
            return Ref(_make_key(server, requests.rekey(ref.id), other_than=ref.id), ref.name)
        except (Unsupported, NotFoundOrDenied, StateBlocked):
            """Offered, but not to this client or not for this key: a new key does as well."""
    return create_key(server, new_name)


def _make_key(server: Server, item: RequestItem, *, other_than: str = "") -> str:
    """The id of the key that the server makes."""
    key_id = server.ask_once(item).checked_payload().text(Tag.UNIQUE_IDENTIFIER)
    if not key_id or key_id == other_than:
        raise server.error(ProviderProtocol, "the server made a key without an id of its own")
    return key_id


def activate_key(server: Server, key_id: str) -> None:
    server.ask_once(requests.activate(key_id))


def deactivate_key(server: Server, key_id: str) -> None:
    server.ask_once(requests.revoke(key_id))
