# SPDX-License-Identifier: Apache-2.0
"""The requests that unlock sends, as bytes: one function an operation, and the message around a batch of them.

Byte for byte what PyKMIP writes for the same request; `tests/test_kmip_encoding.py` compares them.
"""

from collections.abc import Sequence
from typing import NamedTuple

from ...errors import NotFoundOrDenied
from ...secret import Secret
from . import protocol
from .failures import HINTS, printable
from .protocol import Operation, Tag
from .ttlv import boolean, byte_string, enumeration, integer, structure, text

AES_256 = {
    "Object Type": protocol.SYMMETRIC_KEY,
    "Cryptographic Algorithm": protocol.AES,
    "Cryptographic Length": 256,
}
"""Attributes of every key that unlock uses, by the names that KMIP gives them."""


KEY_ID_MAX = 218
"""Characters. A token has room for 256, of which 38 are the provider's id and a slash."""


def is_key_id(text: str) -> bool:
    """Whether an id that a server gives can be kept in a token and in the state."""
    return 0 < len(text) <= KEY_ID_MAX and text.isascii() and text.isprintable()


class RequestItem(NamedTuple):
    """One operation of a batch."""

    operation: Operation
    payload: bytes
    """Items of the Request Payload."""
    plain_payload: bytes | None = None
    """The same request without details that some servers refuse: an attribute, a key format, or a usage."""


class Credential(NamedTuple):
    """A user name and a password that are sent in every request."""

    username: str
    password: Secret | None


def get_attributes(key_id: str) -> RequestItem:
    names = ["State", "Name", "Link", *AES_256]
    return RequestItem(
        Operation.GET_ATTRIBUTES,
        _identifier(key_id) + b"".join(text(Tag.ATTRIBUTE_NAME, name) for name in names),
        _identifier(key_id),
    )


def get(key_id: str) -> RequestItem:
    return RequestItem(
        Operation.GET,
        _identifier(key_id) + enumeration(Tag.KEY_FORMAT_TYPE, protocol.RAW),
        _identifier(key_id),
    )


def locate(name: str) -> RequestItem:
    return RequestItem(Operation.LOCATE, _name(name))


def create(name: str) -> RequestItem:
    """A new AES-256 key, not active yet."""

    def payload(usage: int) -> bytes:
        template = structure(
            Tag.TEMPLATE_ATTRIBUTE,
            _attribute("Cryptographic Algorithm", enumeration(Tag.ATTRIBUTE_VALUE, protocol.AES)),
            _attribute("Cryptographic Length", integer(Tag.ATTRIBUTE_VALUE, 256)),
            _attribute("Cryptographic Usage Mask", integer(Tag.ATTRIBUTE_VALUE, usage)),
            _name(name),
        )
        return enumeration(Tag.OBJECT_TYPE, protocol.SYMMETRIC_KEY) + template

    usage = protocol.ENCRYPT_AND_DECRYPT
    return RequestItem(Operation.CREATE, payload(usage | protocol.EXPORT), payload(usage))


def rekey(key_id: str) -> RequestItem:
    return RequestItem(Operation.REKEY, _identifier(key_id))


def activate(key_id: str) -> RequestItem:
    return RequestItem(Operation.ACTIVATE, _identifier(key_id))


def revoke(key_id: str) -> RequestItem:
    """Deactivates a key: its reason is that it is no longer used."""
    code = enumeration(Tag.REVOCATION_REASON_CODE, protocol.CESSATION_OF_OPERATION)
    return RequestItem(Operation.REVOKE, _identifier(key_id) + structure(Tag.REVOCATION_REASON, code))


def read_made_key() -> list[RequestItem]:
    """Get Attributes and Get of the key that the same request makes before them: they name none, and mean that one
    (KMIP 1.4, 4: ID Placeholder)."""
    return [RequestItem(Operation.GET_ATTRIBUTES, b""), RequestItem(Operation.GET, b"")]


def discover_versions() -> RequestItem:
    return RequestItem(Operation.DISCOVER_VERSIONS, b"".join(map(_protocol_version, protocol.VERSIONS)))


def query_operations() -> RequestItem:
    """Asks which operations the server offers."""
    return RequestItem(Operation.QUERY, enumeration(Tag.QUERY_FUNCTION, protocol.QUERY_OPERATIONS))


def encode(
    items: Sequence[RequestItem],
    batch_ids: Sequence[bytes],
    version: tuple[int, int],
    credential: Credential | None,
    *,
    in_turn: bool = False,
) -> bytes:
    """The Request Message (KMIP 1.4, 7.1) for a batch that goes on after an error in one item or, `in_turn`, is worked
    off in its order and ends at an error. For a single item it does not say so: some servers refuse the option."""
    goes_on = enumeration(Tag.BATCH_ERROR_CONTINUATION_OPTION, protocol.CONTINUE_AFTER_ERROR)
    if in_turn:
        goes_on = enumeration(Tag.BATCH_ERROR_CONTINUATION_OPTION, protocol.STOP_AT_ERROR)
        goes_on += boolean(Tag.BATCH_ORDER_OPTION, True)
    header = structure(
        Tag.REQUEST_HEADER,
        _protocol_version(version),
        integer(Tag.MAXIMUM_RESPONSE_SIZE, protocol.ANSWER_MAX),
        _authentication(credential) if credential else b"",
        goes_on if len(items) > 1 else b"",
        integer(Tag.BATCH_COUNT, len(items)),
    )
    batch = [
        structure(
            Tag.BATCH_ITEM,
            enumeration(Tag.OPERATION, item.operation),
            byte_string(Tag.UNIQUE_BATCH_ITEM_ID, batch_id),
            structure(Tag.REQUEST_PAYLOAD, item.payload),
        )
        for item, batch_id in zip(items, batch_ids, strict=True)
    ]
    return structure(Tag.REQUEST_MESSAGE, header, *batch)


def _authentication(credential: Credential) -> bytes:
    password = text(Tag.PASSWORD, bytes(credential.password)) if credential.password else b""
    return structure(
        Tag.AUTHENTICATION,
        structure(
            Tag.CREDENTIAL,
            enumeration(Tag.CREDENTIAL_TYPE, protocol.CREDENTIAL_USERNAME_AND_PASSWORD),
            structure(Tag.CREDENTIAL_VALUE, text(Tag.USERNAME, credential.username), password),
        ),
    )


def _protocol_version(version: tuple[int, int]) -> bytes:
    major, minor = version
    return structure(
        Tag.PROTOCOL_VERSION,
        integer(Tag.PROTOCOL_VERSION_MAJOR, major),
        integer(Tag.PROTOCOL_VERSION_MINOR, minor),
    )


def _identifier(key_id: str) -> bytes:
    """Raises NotFoundOrDenied for an empty id, which would mean whichever key the server touched last, and for one that
    no server can have given to this host."""
    if not is_key_id(key_id):
        what = (
            f"there is no key with the id {printable(key_id)}" if key_id else "a key without an id cannot be asked for"
        )
        raise NotFoundOrDenied(what, HINTS[NotFoundOrDenied])
    return text(Tag.UNIQUE_IDENTIFIER, key_id)


def _name(name: str) -> bytes:
    value = structure(
        Tag.ATTRIBUTE_VALUE,
        text(Tag.NAME_VALUE, name),
        enumeration(Tag.NAME_TYPE, protocol.UNINTERPRETED_TEXT_STRING),
    )
    return _attribute("Name", value)


def _attribute(name: str, value: bytes) -> bytes:
    return structure(Tag.ATTRIBUTE, text(Tag.ATTRIBUTE_NAME, name), value)
