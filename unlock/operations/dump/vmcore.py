# SPDX-License-Identifier: Apache-2.0
"""Whether a dump of the kernel is whole: makedumpfile(8), flattened format, which crash(8) reads as it is."""

import struct

_HEADER = 4096
_SIGNATURE = b"makedumpfile\0\0\0\0"
_RECORD = struct.Struct(">qq")
"""Offset and size of the data that follows; -1 and -1 at the end."""


class VmCore:
    """Reads a flattened dump that passes by, piece by piece."""

    def __init__(self) -> None:
        self.size = 0
        self._start = b""
        self._record = b""
        """What there is of the next record's head."""
        self._left = 0
        """Bytes of data until there."""
        self._ended = self._wrong = False

    def add(self, piece: bytes) -> None:
        self.size += len(piece)
        if len(self._start) < _HEADER:
            take = _HEADER - len(self._start)
            self._start, piece = self._start + piece[:take], piece[take:]
        at = 0
        while at < len(piece) and not self._wrong:
            if self._ended:
                self._wrong = True
            elif self._left:
                step = min(self._left, len(piece) - at)
                self._left, at = self._left - step, at + step
            else:
                step = min(_RECORD.size - len(self._record), len(piece) - at)
                self._record, at = self._record + piece[at : at + step], at + step
                if len(self._record) == _RECORD.size:
                    self._next(*_RECORD.unpack(self._record))
                    self._record = b""

    def problem(self) -> str:
        """Why it is no whole dump, in words; '' when it is one."""
        if self._wrong or not self._start.startswith(_SIGNATURE):
            return "it is no dump of a kernel"
        return "" if self._ended else f"it ends after {self.size} bytes, before its end mark"

    def program(self) -> str:
        return ""

    def _next(self, offset: int, size: int) -> None:
        self._ended = offset == size == -1
        self._wrong = not self._ended and (offset < 0 or size < 0)
        self._left = 0 if self._ended else size


class KernelLog:
    """The log of a kernel is text: age alone says that it is whole."""

    def add(self, piece: bytes) -> None:
        pass

    def problem(self) -> str:
        return ""

    def program(self) -> str:
        return ""
