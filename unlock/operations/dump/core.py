# SPDX-License-Identifier: Apache-2.0
"""What the beginning of a core says: an ELF file (elf(5)) whose program headers name its size and, in the note NT_FILE,
the program."""

import struct

_HEADERS_MAX = 4 << 20
"""Bytes of the beginning that are looked at: 65535 program headers and the notes of a usual process."""
_NT_FILE = 0x46494C45
_PT_NOTE = 4
_MANY = 0xFFFF
"""PN_XNUM: the number of program headers is elsewhere."""


class Core:
    """Reads a core that passes by, piece by piece."""

    def __init__(self) -> None:
        self.head = bytearray()
        self.size = 0

    def add(self, piece: bytes) -> None:
        self.head += piece[: max(0, _HEADERS_MAX - len(self.head))]
        self.size += len(piece)

    def problem(self) -> str:
        """Why it is no whole core, in words; '' when it is one."""
        try:
            segments = self._segments()
        except (struct.error, LookupError):
            return "it is no core"
        end = max((offset + size for _, offset, size in segments), default=0)
        return f"it ends after {self.size} of {end} bytes" if self.size < end else ""

    def end(self) -> int:
        """The size that its headers name; 0 while they are not there."""
        try:
            return max((offset + size for _, offset, size in self._segments()), default=0)
        except (struct.error, LookupError):
            return 0

    def program(self) -> str:
        """The path of the program: the first file that the process had mapped; '' when that is not known."""
        try:
            for kind, offset, size in self._segments():
                if kind == _PT_NOTE:
                    return self._first_file(offset, offset + size)
        except (struct.error, LookupError, ValueError):
            pass
        return ""

    def _segments(self) -> list[tuple[int, int, int]]:
        """(type, offset, size in the file) of each program header. Raises struct.error, LookupError."""
        if self.head[:4] != b"\x7fELF":
            raise LookupError
        order = {1: "<", 2: ">"}[self.head[5]]
        wide = {1: False, 2: True}[self.head[4]]
        start = struct.unpack_from(order + ("Q" if wide else "I"), self.head, 32 if wide else 28)[0]
        each, count = struct.unpack_from(order + "HH", self.head, 54 if wide else 42)
        if count == _MANY:
            return []
        found = []
        for number in range(count):
            at = start + number * each
            if wide:
                kind, _, offset, _, _, size = struct.unpack_from(order + "IIQQQQ", self.head, at)
            else:
                kind, offset, _, _, size = struct.unpack_from(order + "IIIII", self.head, at)
            found.append((kind, offset, size))
        return found

    def _first_file(self, at: int, end: int) -> str:
        """Of NT_FILE: count, page size, three words a mapping, then the names. 64 bit alone."""
        while at < min(end, len(self.head)):
            name, size, kind = struct.unpack_from("<III", self.head, at)
            at += 12 + (name + 3 & ~3)
            if kind == _NT_FILE:
                (count,) = struct.unpack_from("<Q", self.head, at)
                names = at + 16 + 24 * count
                return self.head[names : self.head.index(b"\0", names)].decode() if count else ""
            at += size + 3 & ~3
        return ""
