# SPDX-License-Identifier: Apache-2.0
"""The files in which ubd, the disk driver of User-Mode Linux, keeps what was written over another file.

Version 3 of the format in arch/um/drivers/cow_user.c: a header, a bitmap with a bit for each sector that was written
(least significant first), and at `data_offset` the sectors, at the offsets that they have on the disk. Big-endian.
"""

import struct
from pathlib import Path
from typing import NamedTuple

_HEADER = struct.Struct(">IIIQIII4096s")
_MAGIC = 0x4F4F4F4D


class Layout(NamedTuple):
    """Where things are in a file, in bytes."""

    size: int
    """Of the disk."""
    sector: int
    bitmap: int
    data: int
    backing: Path


def layout(path: Path) -> Layout:
    """That of a file which exists. Raises ValueError."""
    with path.open("rb") as file:
        magic, version, _, size, sector, align, _, backing = _HEADER.unpack(file.read(_HEADER.size))
    if (magic, version) != (_MAGIC, 3):
        raise ValueError(f"{path} is no COW file of version 3")
    bitmap = -(-_HEADER.size // align) * align
    data = -(-(bitmap + -(-(size // sector) // 8)) // align) * align
    return Layout(size, sector, bitmap, data, path.parent / backing.rstrip(b"\0").decode())


def read(path: Path, size: int) -> bytes:
    """The first `size` bytes of the disk, a multiple of the sector size."""
    there = layout(path)
    with path.open("rb") as file, there.backing.open("rb") as backing:
        content = bytearray(backing.read(size))
        file.seek(there.bitmap)
        written = file.read(-(-(size // there.sector) // 8))
        file.seek(there.data)
        for number in range(size // there.sector):
            each = file.read(there.sector)
            if written[number >> 3] >> (number & 7) & 1:
                content[number * there.sector : (number + 1) * there.sector] = each
    return bytes(content)
