# SPDX-License-Identifier: Apache-2.0
"""What a disk holds when the power is cut: from the log of its writes, every state that it can be left in.

The log is that of uml/ubdlog.c, in the format of the kernel's dm-log-writes
(https://docs.kernel.org/admin-guide/device-mapper/log-writes.html). A disk keeps what was written before its last
flush; of what came after, any part may be missing, and what is there may have come in any order.
"""

import itertools
import struct
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

_MAGIC = 0x6A736677736872
_FLUSH, _FUA, _DISCARD = 1, 2, 4
_SECTOR = 512
_PENDING = 4
"""Writes between two flushes of which every subset is tried; of more, each prefix, and all without one."""


class Write(NamedTuple):
    """`data` at `offset`, in bytes; a flush has neither."""

    offset: int
    data: bytes
    flush: bool


def read(log: Path, below: int) -> Iterator[Write]:
    """The writes that reach into the first `below` bytes, and all flushes, in order."""
    with log.open("rb") as file:
        magic, _, _, sector = struct.unpack("<QQQI", file.read(28))
        assert magic == _MAGIC, f"{log} is not a log of writes"
        file.seek(sector)
        while len(head := file.read(32)) == 32:
            at, sectors, flags, _ = struct.unpack("<QQQQ", head)
            file.seek(sector - 32, 1)
            size = sectors * sector
            if flags & _FLUSH:
                yield Write(0, b"", True)
            if not size:
                continue
            if at * sector < below:
                data = bytes(size) if flags & _DISCARD else file.read(size)
                yield Write(at * sector, data[: below - at * sector], False)
                if flags & _FUA:
                    yield Write(0, b"", True)
            elif not flags & _DISCARD:
                file.seek(size, 1)


def states(start: bytes, writes: Iterator[Write]) -> Iterator[bytes]:
    """Every content that a power cut can leave, beginning with `start`; neighbours that are equal come once."""
    durable = bytearray(start)
    pending: list[Write] = []
    last = b""
    for each in itertools.chain(writes, [Write(0, b"", True)]):
        if not each.flush:
            pending.append(each)
            continue
        for chosen in _chosen(len(pending)):
            state = bytearray(durable)
            for index in chosen:
                apply(state, pending[index])
            if state != last:
                last = bytes(state)
                yield last
        for write in pending:
            apply(durable, write)
        pending.clear()


def _chosen(count: int) -> Iterator[tuple[int, ...]]:
    """Which of `count` unflushed writes have reached the disk."""
    whole = tuple(range(count))
    if count <= _PENDING:
        for size in range(count + 1):
            yield from itertools.combinations(whole, size)
        return
    for size in range(count + 1):
        yield whole[:size]
    for missing in whole:
        yield whole[:missing] + whole[missing + 1 :]


def apply(content: bytearray, write: Write) -> None:
    """The content after a write."""
    content[write.offset : write.offset + len(write.data)] = write.data
