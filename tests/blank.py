# SPDX-License-Identifier: Apache-2.0
"""Disks with a LUKS2 header and no keyslot, for tests that begin with some: libcryptsetup makes each of them once in a
process. It takes 50 ms, as it fills 16 MiB of keyslots with random bytes; here they stay a hole, quick to compare."""

import os
import tempfile
from pathlib import Path
from typing import NamedTuple

from unlock.disks import luks
from unlock.secret import Secret

_COPIES = 32 << 10
"""Bytes of both copies of the metadata, before the keyslots."""


class Blank(NamedTuple):
    uuid: str
    volume_key: bytes
    header: bytes


_made: dict[int, list[Blank]] = {}
"""Size in bytes -> those that were made so far, in the order in which a test gets them."""
_given = 0
"""How many the test has."""


def begin() -> None:
    """A test begins: it may get those of the test before."""
    global _given
    _given = 0


def disk(path: Path, size: int) -> Blank:
    """Makes `path` a disk of `size` bytes, with another UUID and volume key than those before it in this test."""
    global _given
    made = _made.setdefault(size, [])
    while len(made) <= _given:
        made.append(_make(size))
    blank = made[_given]
    _given += 1
    with path.open("wb") as file:
        file.write(blank.header)
        file.truncate(size)
    return blank


def _make(size: int) -> Blank:
    with tempfile.NamedTemporaryFile() as file, Secret.random(64) as volume_key:
        os.truncate(file.fileno(), size)
        with luks.format(file.name, volume_key) as container:
            return Blank(container.uuid, bytes(volume_key), os.pread(file.fileno(), _COPIES, 0))
