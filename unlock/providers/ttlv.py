# SPDX-License-Identifier: Apache-2.0
"""TTLV, the encoding of KMIP (1.4, 9.1), as it is read: strictly, and with bytes as secrets.

An item is a tag of 3 bytes, a type of 1, a length of 4, and the value, padded to 8. Tags that are not asked for are
passed over, whatever they hold.
"""

from typing import Any, NamedTuple

from ..secret import Secret


class Garbage(Exception):
    """An answer that is not KMIP."""


_Value = Any
"""list[Node], int, str, or Secret for bytes: key material is never in another type."""


class Node(NamedTuple):
    """One TTLV item (KMIP 1.4, 9.1)."""

    tag: int
    value: _Value

    def all(self, tag: Any) -> list["Node"]:
        return [node for node in self.value if node.tag == tag.value] if isinstance(self.value, list) else []

    def first(self, tag: Any) -> "Node | None":
        found = self.all(tag)
        if len(found) > 1:
            raise Garbage(f"{tag.name} more than once")
        return found[0] if found else None

    def within(self, *tags: Any) -> "Node | None":
        node: Node | None = self
        for tag in tags:
            node = node.first(tag) if node else None
        return node

    def text(self, tag: Any) -> str:
        """'' when absent."""
        node = self.first(tag)
        if node and not isinstance(node.value, str):
            raise Garbage(f"{tag.name} is not a text")
        return node.value if node else ""

    def number(self, tag: Any) -> int | None:
        node = self.first(tag)
        return node.as_number() if node else None

    def numbers(self, tag: Any) -> list[int]:
        return [node.as_number() for node in self.all(tag)]

    def as_number(self) -> int:
        if not isinstance(self.value, int):
            raise Garbage(f"{self.tag:#x} is not a number")
        return self.value

    def wipe(self) -> None:
        if isinstance(self.value, Secret):
            self.value.wipe()
        elif isinstance(self.value, list):
            for node in self.value:
                node.wipe()


STRUCTURE, _INTEGER, _LONG, _BIG, _ENUMERATION, _BOOLEAN, _TEXT, _BYTES, _DATE, _INTERVAL, _MICROSECONDS = range(1, 12)
_FIXED = {_INTEGER: 4, _LONG: 8, _ENUMERATION: 4, _BOOLEAN: 8, _DATE: 8, _INTERVAL: 4, _MICROSECONDS: 8}
"""Length in bytes by type."""


def nodes(data: memoryview, depth: int = 0) -> list[Node]:
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
            raise Garbage("a TTLV item that does not fit in its place")
        found.append(Node(tag, _value(kind[0], value, depth)))
    return found


def _value(kind: int, data: memoryview, depth: int) -> _Value:
    if len(data) != _FIXED.get(kind, len(data)):
        raise Garbage("a TTLV item of the wrong length")
    if kind == STRUCTURE:
        return nodes(data, depth + 1)
    if kind in (_BYTES, _BIG):
        return Secret(data)  # type: ignore[arg-type]
    if kind == _TEXT:
        try:
            return bytes(data).decode()
        except UnicodeDecodeError:  # a vendor's own attribute, perhaps; no text for whoever asks for one
            return Secret(data)  # type: ignore[arg-type]
    if kind in _FIXED:
        return int.from_bytes(data, signed=kind != _ENUMERATION)
    raise Garbage(f"an unknown TTLV type {kind}")
