# SPDX-License-Identifier: Apache-2.0
"""Which key has replaced which, from what a server says of them, for `key_operations`. Asks nothing itself.

A Link to a replacement counts, and a name that moved to another key. Dates do not: a migration resets them. A key that
the server does not know has no replacement there, except one that says by a Link that it replaces this very key. In
doubt a key stays what it is.
"""

from collections.abc import Mapping

from ...endpoint import Endpoint
from ...errors import Integrity, ProviderError
from .. import BLOCKED, UNKNOWN, KeyStatus, Ref
from .failures import printable, provider_error
from .key_facts import KeyFacts

NAMESAKES_MAX = 2000
"""A server that did not look at the name returns all keys. So many are asked for their names."""


def status_of(
    ref: Ref,
    facts: Mapping[str, KeyFacts | ProviderError],
    named: list[str] | ProviderError,
    *,
    ready: frozenset[str],
    endpoint: Endpoint,
) -> KeyStatus:
    """Which key `ref` is now; a doubt is the status's problem.

    `facts`: by key id, of `ref` and of all keys that may replace it. `named`: ids of the keys that have its name.
    `ready`: states in which a replacement counts.
    """
    own = facts[ref.id]
    if isinstance(named, ProviderError):
        found, state = (True, own.state) if isinstance(own, KeyFacts) else (False, UNKNOWN)
        return KeyStatus(ref, found, state, ref.id, named)
    known = {key: each for key, each in facts.items() if isinstance(each, KeyFacts)}
    usable = {key for key, each in known.items() if each.state in ready and each.is_aes_256}
    namesakes = {key for key in named if key in usable and ref.name in known[key].names} - {ref.id}
    if isinstance(own, ProviderError):
        heirs = [key for key in namesakes if known[key].replaces == ref.id]
        return (
            KeyStatus(ref, False, UNKNOWN, heirs[0]) if len(heirs) == 1 else KeyStatus(ref, False, UNKNOWN, ref.id, own)
        )
    chain = _replacements(ref.id, known)
    namesakes -= _predecessors(ref.id, known)
    heirs = [key for key in chain if key in usable]
    if len(named) > NAMESAKES_MAX:
        doubt = f"the server returns {len(named)} keys for the name {printable(ref.name)}"
    elif heirs and namesakes - set(chain):
        doubt = (
            f"{printable(heirs[-1])} replaces {printable(ref.id)}, and other keys have its name {printable(ref.name)}"
        )
    elif heirs or not namesakes:
        return KeyStatus(ref, True, own.state, heirs[-1] if heirs else ref.id)
    elif len(namesakes) == 1 and not (own.state not in BLOCKED and ref.name in own.names):
        return KeyStatus(ref, True, own.state, namesakes.pop())
    else:
        doubt = f"several keys have the name {printable(ref.name)}"
    return KeyStatus(ref, True, own.state, ref.id, provider_error(endpoint, Integrity, doubt))


def linked_ids(facts: Mapping[str, KeyFacts | ProviderError]) -> set[str]:
    """Ids of all keys that one of these names as its replacement."""
    return {each.replacement for each in facts.values() if isinstance(each, KeyFacts) and each.replacement}


def _replacements(key_id: str, known: Mapping[str, KeyFacts]) -> list[str]:
    """The replacements of a key by Links, in order; Links in a circle end it."""
    chain: list[str] = []
    while (key_id := known[key_id].replacement if key_id in known else "") and key_id not in chain:
        chain.append(key_id)
    return chain


def _predecessors(key_id: str, known: Mapping[str, KeyFacts]) -> set[str]:
    """Keys that this one has replaced: a name that stayed with one of them does not lead back to it."""
    return {known[key_id].replaces} | {key for key in known if key_id in _replacements(key, known)}
