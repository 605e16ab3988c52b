# SPDX-License-Identifier: Apache-2.0
"""What `provider` asks of one server, operation by operation, and what follows from the answers.

Every function raises ProviderError and MalformedAnswer; none goes to another endpoint.
"""

import os
from collections.abc import Callable, Sequence
from typing import NamedTuple

from ...errors import (
    ClientAuth,
    Integrity,
    ProviderError,
    ProviderProtocol,
    ProviderUnavailable,
    StateBlocked,
    Tampered,
)
from ...secret import Secret
from .. import ACTIVE, BLOCKED, PRE_ACTIVE, USABLE, Capabilities, KeyStatus, Ref
from . import requests
from .answers import ResponseItem
from .failures import PLAIN_NAMES, AmbiguousKeys, printable
from .key_facts import (
    KeyFacts,
    check_key_id,
    facts_or_problem,
    ids_or_problem,
    is_same_id,
    read_facts,
    read_ids,
    read_key,
)
from .protocol import NO_SUCH_KEY, Operation, Tag
from .replacement import NAMESAKES_MAX, linked_ids, status_of
from .requests import RequestItem
from .server import Server
from .ttlv import MalformedAnswer

_HOPS = 16
"""Replacements of one key that are followed in one `key_statuses`."""


# Questions


def try_connection(server: Server) -> None:
    """Makes a new connection and has the server answer on it."""
    server.drop()
    server.ask([requests.discover_versions()])


def query_capabilities(server: Server) -> Capabilities:
    """What the server offers. A server that refuses to say is asked for Create, and not for Re-key."""
    try:
        [answer] = server.ask([requests.query_operations()])
    except ProviderError as error:
        if server.has_refused(error):
            return Capabilities(create=True, rekey=False)
        raise
    if answer.problem and not isinstance(answer.problem, ProviderUnavailable):
        return Capabilities(create=True, rekey=False)
    offered = answer.checked_payload().numbers(Tag.OPERATION)
    return Capabilities(Operation.CREATE in offered, Operation.REKEY in offered)


def key_statuses(server: Server, refs: Sequence[Ref], *, ready: frozenset[str]) -> list[KeyStatus]:
    """One status a key, by one request, and more only for keys that seem to have changed.

    `ready`: states in which a replacement counts.
    """
    items = [requests.get_attributes(ref.id) for ref in refs]
    items += [requests.locate(ref.name) for ref in refs if ref.name]
    answers = iter(server.ask(items))
    facts = {ref.id: facts_or_problem(next(answers), ref.id) for ref in refs}
    named = {ref: ids_or_problem(next(answers)) if ref.name else [] for ref in refs}
    spelled = {key_id.lower(): key_id for key_id in facts}
    named = {
        ref: [_spell(spelled, each) for each in ids] if isinstance(ids, list) else ids for ref, ids in named.items()
    }
    found = [ids for ids in named.values() if isinstance(ids, list) and len(ids) <= NAMESAKES_MAX]
    wanted = {each for ids in found for each in ids}
    for _ in range(_HOPS):
        facts = {key_id: _spell_links(spelled, each) for key_id, each in facts.items()}
        wanted |= linked_ids(facts)
        unknown = sorted(wanted - facts.keys())
        if not unknown:
            break
        answers = iter(server.ask([requests.get_attributes(each) for each in unknown]))
        facts |= {each: facts_or_problem(next(answers), each) for each in unknown}
    return [status_of(ref, facts, named[ref], ready=ready, endpoint=server.endpoint) for ref in refs]


def _spell(spelled: dict[str, str], key_id: str) -> str:
    """One spelling of each id, the host's own where it has one: some servers change the case of letters."""
    return spelled.setdefault(key_id.lower(), key_id)


def _spell_links(spelled: dict[str, str], facts: KeyFacts | ProviderError) -> KeyFacts | ProviderError:
    if isinstance(facts, ProviderError):
        return facts
    return facts._replace(
        replacement=facts.replacement and _spell(spelled, facts.replacement),
        replaces=facts.replaces and _spell(spelled, facts.replaces),
    )


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
    usable: list[str] = []
    altered = ""
    for answer, key_id in zip(answers, ids, strict=True):
        facts = facts_or_problem(answer, key_id)
        if isinstance(facts, ProviderError):
            if answer.reason in NO_SUCH_KEY or isinstance(facts, StateBlocked):
                continue
            raise facts
        if facts.state in BLOCKED or not facts.is_aes_256:
            continue
        if name in facts.names:
            usable.append(key_id)
        else:
            altered = min(facts.names, default=altered)
    if altered and not usable and _filters_by_name(server):
        what = f"the server keeps the name {printable(name)} as {printable(altered)}"
        raise AmbiguousKeys(f"{server.endpoint}: {what}", PLAIN_NAMES)
    return usable


def _filters_by_name(server: Server) -> bool:
    """Whether a Locate returns only keys of the name that was asked for."""
    return not read_ids(server.ask([requests.locate(f"unlock-{os.urandom(8).hex()}")])[0])


def find_replacement(server: Server, ref: Ref, new_name: str) -> Ref | None:
    """The key that an earlier rotation of `ref` has made, not yet active perhaps. Raises AmbiguousKeys."""
    if made := find_key(server, new_name):
        return made
    [status] = key_statuses(server, [ref], ready=USABLE | {PRE_ACTIVE})
    if isinstance(status.problem, Integrity):
        raise AmbiguousKeys(str(status.problem), status.problem.hint)
    if isinstance(status.problem, ProviderUnavailable | ProviderProtocol):
        raise status.problem
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


def is_unknown(server: Server, key_id: str) -> bool:
    """Whether the server says that it has no such key."""
    [answer] = server.ask([requests.get_attributes(key_id)])
    return answer.problem is not None and answer.reason in NO_SUCH_KEY


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
            key_id = _make_key(server, requests.rekey(ref.id), other_than=ref.id)
        except ProviderError as error:  # offered, but not to this client or not for this key: a new key does as well
            if not server.has_refused(error) or isinstance(error, ProviderUnavailable):
                raise
        else:
            if _state(server, key_id) not in BLOCKED:  # some copy the state of a key that is out of use
                return Ref(key_id, ref.name)
    return create_key(server, new_name)


class MadeKey(NamedTuple):
    """A key that was made and read in one request."""

    ref: Ref
    key: Secret | None
    """None where the answer does not give it: it is to be asked for by its id, which says why."""
    active: bool


def make_key_at_once(
    server: Server, ref: Ref, new_name: str, version: tuple[int, int], *, rekey: bool
) -> MadeKey | None:
    """A new key in the place of `ref`, as `replace_key` makes it, read in the same request; to be activated. None where
    the server refuses to do it so."""
    make = requests.rekey(ref.id) if rekey else requests.create(new_name)
    try:
        answers = server.ask_in_turn([make, *requests.read_made_key()], version)
        answers[0].checked_payload()
    except ClientAuth:  # of the client, or for this operation alone: one request after the other shows which
        return None
    except ProviderError as error:
        if not server.has_refused(error) or isinstance(error, ProviderUnavailable):
            raise
        return None
    try:
        key_id = _id_of_made(server, answers[0], other_than=ref.id if rekey else "")
        made = Ref(key_id, ref.name if rekey else new_name)
        try:
            _, attributes, key = answers
            return MadeKey(made, read_key(key, key_id), active=read_facts(attributes, key_id).state == ACTIVE)
        except (ProviderError, MalformedAnswer, ValueError):
            return MadeKey(made, None, active=False)
    finally:
        for each in answers:
            each.wipe()


def _make_key(server: Server, item: RequestItem, *, other_than: str = "") -> str:
    """The id of the key that the server makes."""
    return _id_of_made(server, server.ask_once(item), other_than=other_than)


def _id_of_made(server: Server, answer: ResponseItem, *, other_than: str) -> str:
    key_id = answer.checked_payload().text(Tag.UNIQUE_IDENTIFIER)
    if not key_id or is_same_id(key_id, other_than):
        raise server.error(ProviderProtocol, "the server made a key without an id of its own")
    return check_key_id(answer, key_id)


def activate_key(server: Server, key_id: str) -> None:
    """Asks for the key's state in the same request: a refusal is no failure where the key is active, and a server that
    names no state refuses to do it twice. May be repeated. Raises StateBlocked for a key that cannot be active again.
    """
    activated, attributes = server.ask([requests.activate(key_id), requests.get_attributes(key_id)])
    state = read_facts(attributes, key_id).state
    if state in BLOCKED:
        raise server.error(StateBlocked, f"the key {printable(key_id)} is {state}")
    may_be_active = state in USABLE and isinstance(activated.problem, StateBlocked | ProviderProtocol)
    if activated.problem and state != ACTIVE and not may_be_active:
        raise activated.problem


def deactivate_key(server: Server, key_id: str) -> None:
    """Asks for the key's state in the same request: a refusal is no failure where the key is out of use, or was never
    activated. May be repeated. Raises ProviderProtocol when the key is still active after it."""
    revoked, attributes = server.ask([requests.revoke(key_id), requests.get_attributes(key_id)])
    state = read_facts(attributes, key_id).state
    if revoked.problem and state not in BLOCKED | {PRE_ACTIVE}:
        raise revoked.problem
    if state == ACTIVE and _state(server, key_id) == ACTIVE:  # a server may answer the items in any order
        raise server.error(ProviderProtocol, f"the key {printable(key_id)} is still active after a Revoke")
