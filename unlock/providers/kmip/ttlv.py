# SPDX-License-Identifier: Apache-2.0
"""TTLV, the encoding of KMIP (1.4, 9.1): written for requests, read strictly for answers, bytes read as secrets.

An item is a tag of 3 bytes, a type of 1, a length of 4, and the value, padded to a multiple of 8. The reader ignores
items whose tags nobody asks for, whatever they hold.
"""

from enum import IntEnum
from typing import Any, NamedTuple

from ...secret import Secret

STRUCTURE, _INTEGER, _LONG, _BIG, _ENUMERATION, _BOOLEAN, _TEXT, _BYTES, _DATE, _INTERVAL, _MICROSECONDS = range(1, 12)
_FIXED = {_INTEGER: 4, _LONG: 8, _ENUMERATION: 4, _BOOLEAN: 8, _DATE: 8, _INTERVAL: 4, _MICROSECONDS: 8}
"""Length in bytes by type."""

_DEPTH_MAX = 12


class MalformedAnswer(Exception):
    """An answer that is not KMIP, or is not an answer to the request."""


# Writing


def structure(tag: IntEnum, *items: bytes) -> bytes:
    """An item that holds other items."""
    return _encode(tag, STRUCTURE, b"".join(items))


def integer(tag: IntEnum, number: int) -> bytes:
    return _encode(tag, _INTEGER, number.to_bytes(4, signed=True))


def enumeration(tag: IntEnum, number: int) -> bytes:
    return _encode(tag, _ENUMERATION, number.to_bytes(4))


def boolean(tag: IntEnum, value: bool) -> bytes:
    return _encode(tag, _BOOLEAN, int(value).to_bytes(8))


def text(tag: IntEnum, value: str | bytes) -> bytes:
    """A text; `value` as bytes is UTF-8."""
    return _encode(tag, _TEXT, value.encode() if isinstance(value, str) else value)


def byte_string(tag: IntEnum, value: bytes) -> bytes:
    return _encode(tag, _BYTES, value)


def _encode(tag: int, kind: int, value: bytes) -> bytes:
    return (tag << 8 | kind).to_bytes(4) + len(value).to_bytes(4) + value + bytes(-len(value) % 8)


# Reading


_Value = Any
"""list[TtlvItem], int, str, or Secret for bytes: key material is never in another type."""


class TtlvItem(NamedTuple):
    """One item as it was read. Its methods raise MalformedAnswer."""

    tag: int
    value: _Value

    def all(self, tag: IntEnum) -> list["TtlvItem"]:
        """The items directly in this structure that have the tag."""
        return [item for item in self.value if item.tag == tag] if isinstance(self.value, list) else []

    def first(self, tag: IntEnum) -> "TtlvItem | None":
        """The only item with the tag; None when absent."""
        found = self.all(tag)
        if len(found) > 1:
            raise MalformedAnswer(f"{tag.name} more than once")
        return found[0] if found else None

    def within(self, *tags: IntEnum) -> "TtlvItem | None":
        """The item at the end of a path of tags; None when one of them is absent."""
        item: TtlvItem | None = self
        for tag in tags:
            item = item.first(tag) if item else None
        return item

    def text(self, tag: IntEnum) -> str:
        """'' when absent."""
        item = self.first(tag)
        if item and not isinstance(item.value, str):
            raise MalformedAnswer(f"{tag.name} is not a text")
        return item.value if item else ""

    def number(self, tag: IntEnum) -> int | None:
        """None when absent."""
        item = self.first(tag)
        return item.as_number() if item else None

    def numbers(self, tag: IntEnum) -> list[int]:
        return [item.as_number() for item in self.all(tag)]

    def as_number(self) -> int:
        if not isinstance(self.value, int):
            raise MalformedAnswer(f"{self.tag:#x} is not a number")
        return self.value

    def wipe(self) -> None:
        """Wipes all bytes in this item and below it."""
        if isinstance(self.value, Secret):
            self.value.wipe()
        elif isinstance(self.value, list):
            for item in self.value:
                item.wipe()


def parse(data: memoryview, depth: int = 0) -> list[TtlvItem]:
    """The items that fill `data`. Raises MalformedAnswer."""
    found, at = [], 0
    while at < len(data):
        tag, kind, length = (
            int.from_bytes(data[at : at + 3]),
            data[at + 3 : at + 4],
            int.from_bytes(data[at + 4 : at + 8]),
        )
        value = data[at + 8 : at + 8 + length]
        at += 8 + (length + 7) // 8 * 8
        if at > len(data) or depth > _DEPTH_MAX:
            raise MalformedAnswer("a TTLV item that does not fit in its place")
        found.append(TtlvItem(tag, _parse_value(kind[0], value, depth)))
    return found


def _parse_value(kind: int, data: memoryview, depth: int) -> _Value:
    if len(data) != _FIXED.get(kind, len(data)):
        raise MalformedAnswer("a TTLV item of the wrong length")
    if kind == STRUCTURE:
        return parse(data, depth + 1)
    if kind in (_BYTES, _BIG):
        return Secret(data)
    if kind == _TEXT:
        try:
            return bytes(data).decode()
        except UnicodeDecodeError:  # perhaps a vendor's own attribute: an error only for a caller that asks for a text
            return Secret(data)
    if kind in _FIXED:
        return int.from_bytes(data, signed=kind != _ENUMERATION)
    raise MalformedAnswer(f"an unknown TTLV type {kind}")
