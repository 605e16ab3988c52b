# SPDX-License-Identifier: Apache-2.0
"""What one answer says of one key: its id, attributes and key material, for `key_operations`.

An answer about another key than the one asked for is an Integrity error.
"""

from typing import NamedTuple

from ...errors import Integrity, ProviderError, ProviderProtocol
from ...secret import Secret
from .. import ACTIVE, COMPROMISED, DEACTIVATED, DESTROYED, PRE_ACTIVE, UNKNOWN
from . import protocol
from .answers import ResponseItem
from .failures import UnusableId, printable
from .protocol import NO_SUCH_KEY, LinkType, Tag
from .requests import AES_256, KEY_ID_MAX, is_key_id
from .ttlv import MalformedAnswer, TtlvItem

_STATES = {1: PRE_ACTIVE, 2: ACTIVE, 3: DEACTIVATED, 4: COMPROMISED, 5: DESTROYED, 6: DESTROYED}
"""KMIP 1.4, 9.1.3.2.18."""


class KeyFacts(NamedTuple):
    """The attributes of one key."""

    state: str
    """UNKNOWN when the server names none."""
    names: frozenset[str]
    replacement: str
    """Id of the key that replaces this one, by a Link; '' for none."""
    replaces: str
    """Id of the key that this one replaces, by a Link; '' for none."""
    is_aes_256: bool
    """False when the server says otherwise."""


def read_facts(answer: ResponseItem, key_id: str) -> KeyFacts:
    """The answer to a Get Attributes. Raises ProviderError, MalformedAnswer."""
    payload = answer.checked_payload()
    _check_id(answer, payload, key_id)
    found: dict[str, list[TtlvItem]] = {}
    for attribute in payload.all(Tag.ATTRIBUTE):
        value = attribute.first(Tag.ATTRIBUTE_VALUE)
        if value:
            found.setdefault(attribute.text(Tag.ATTRIBUTE_NAME), []).append(value)
    links = {link.number(Tag.LINK_TYPE): link.text(Tag.LINKED_OBJECT_IDENTIFIER) for link in found.get("Link", ())}
    replacement = links.get(LinkType.REPLACEMENT_OBJECT_LINK, "")
    if replacement:
        check_key_id(answer, replacement)
    return KeyFacts(
        state=_STATES.get(found["State"][0].as_number(), UNKNOWN) if "State" in found else UNKNOWN,
        names=frozenset(name.text(Tag.NAME_VALUE) for name in found.get("Name", ())),
        replacement=replacement,
        replaces=links.get(LinkType.REPLACED_OBJECT_LINK, ""),
        is_aes_256=all(found[name][0].as_number() == value for name, value in AES_256.items() if name in found),
    )


def facts_or_problem(answer: ResponseItem, key_id: str) -> KeyFacts | ProviderError:
    """The same, with what is wrong with this key as a value: the other keys of the batch are still read.

    Raises Integrity for an answer about another key.
    """
    try:
        return answer.problem or read_facts(answer, key_id)
    except UnusableId as error:
        return error
    except MalformedAnswer as malformed:
        return answer.error(ProviderProtocol, f"the key {printable(key_id)}: {malformed}")


def read_ids(answer: ResponseItem) -> list[str]:
    """The answer to a Locate. Servers report "none" as success or as Item Not Found. Any other refusal is no answer: a
    second key would be made beside one that exists."""
    if answer.problem and answer.reason in NO_SUCH_KEY:
        return []
    ids = [item.value for item in answer.checked_payload().all(Tag.UNIQUE_IDENTIFIER)]
    return list(dict.fromkeys(check_key_id(answer, each) for each in ids))


def check_key_id(answer: ResponseItem, key_id: object) -> str:
    """An id that this host can keep. Raises UnusableId, MalformedAnswer."""
    if not isinstance(key_id, str) or not key_id:
        raise MalformedAnswer("a key without an id")
    if not is_key_id(key_id):
        what = f"the key id {printable(key_id)} is not one of 1 to {KEY_ID_MAX} printable ASCII characters"
        raise answer.error(UnusableId, what)
    return key_id


def ids_or_problem(answer: ResponseItem) -> list[str] | ProviderError:
    """The same, with what is wrong as a value. Raises nothing."""
    try:
        return read_ids(answer)
    except MalformedAnswer as malformed:
        return answer.error(ProviderProtocol, str(malformed))
    except ProviderError as error:
        return error


def read_key(answer: ResponseItem, key_id: str) -> Secret:
    """The 32 bytes of an AES-256 key, copied from the answer to a Get (KMIP 1.4, 2.1.3, 4.11). Raises Integrity."""
    payload = answer.checked_payload()
    _check_id(answer, payload, key_id)
    name = printable(key_id)
    block = payload.within(Tag.SYMMETRIC_KEY, Tag.KEY_BLOCK)
    if payload.number(Tag.OBJECT_TYPE) != protocol.SYMMETRIC_KEY or not block:
        raise answer.error(Integrity, f"{name} is not a symmetric key")
    if block.first(Tag.KEY_WRAPPING_DATA):
        raise answer.error(Integrity, f"the key {name} came wrapped by another key")
    if block.number(Tag.CRYPTOGRAPHIC_ALGORITHM) not in (None, protocol.AES):
        raise answer.error(Integrity, f"the key {name} is not for AES")
    value = block.within(Tag.KEY_VALUE)
    material = value.first(Tag.KEY_MATERIAL) if value else None
    if material and isinstance(material.value, list):  # Transparent Symmetric Key
        material = material.first(Tag.KEY)
    if material is None or not isinstance(material.value, Secret):
        raise answer.error(Integrity, f"the key {name} came without its bytes")
    if len(material.value) != 32 or block.number(Tag.CRYPTOGRAPHIC_LENGTH) not in (None, 256):
        raise answer.error(Integrity, f"the key {name} does not have 256 bits")
    if len(set(material.value.value)) == 1:
        raise answer.error(Integrity, f"the key {name} is one byte repeated")
    return Secret(material.value.value)


def _check_id(answer: ResponseItem, payload: TtlvItem, key_id: str) -> None:
    if not is_same_id(payload.text(Tag.UNIQUE_IDENTIFIER), key_id):
        raise answer.error(Integrity, f"asked for the key {printable(key_id)}, the server answers with another one")


def is_same_id(one: str, other: str) -> bool:
    """Some servers write the letters of an id in another case than they were given."""
    return one.lower() == other.lower()
