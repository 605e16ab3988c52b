# SPDX-License-Identifier: Apache-2.0
"""Power cuts while a process writes to a block device, from a log of its writes and flushes (writelog.c).

What was written before the last flush is there. Of what came after, each piece may be there or not, in any order, and
one may be torn at a sector.
"""

import os
import random
import struct
import subprocess
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

_HEAD = struct.Struct("<QQQ")
_PIECE, _SECTOR = 64 << 10, 512
_SOURCE = Path(__file__).with_name("writelog.c")
CHECKOUT = Path(__file__).parents[2]


class Event(NamedTuple):
    kind: str
    """`w`, `f` or `m`."""
    at: int
    """Offset of a write, number of a mark."""
    data: bytes


def build(folder: Path) -> Path:
    library = folder / "writelog.so"
    command: list[str] = ["cc", "-O2", "-shared", "-fPIC", "-o", str(library), str(_SOURCE), "-ldl"]
    subprocess.run(command, check=True)
    return library


def log_of(library: Path, device: str, log: Path, *program: str) -> list[Event]:
    """What a Python program writes to the device. Its own programs are logged too."""
    log.unlink(missing_ok=True)
    told = {"LD_PRELOAD": str(library), "WRITELOG_DEVICE": device, "WRITELOG_FILE": str(log)}
    done = subprocess.run(
        [sys.executable, *program],
        cwd=CHECKOUT,
        env={**os.environ, **told},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-4000:]
    return list(_events(log))


def _events(log: Path) -> Iterator[Event]:
    with log.open("rb") as file:
        while len(head := file.read(_HEAD.size)) == _HEAD.size:
            kind, at, size = _HEAD.unpack(head)
            yield Event(chr(kind), at, file.read(size))


def choose(kinds: Sequence[str], count: int, chance: random.Random) -> list[int]:
    """So many numbers of events before a cut, in order; 0: each five times. Most of them are after a write that is not
    flushed, so that at least half of the cuts lose something. `kinds`: of the events; `w` for a write."""
    if not count:
        return sorted([*range(1, len(kinds) + 1)] * 5)
    after = [number for number, kind in enumerate(kinds, 1) if kind == "w"]
    other = [number for number, kind in enumerate(kinds, 1) if kind != "w"]
    return sorted(chance.choice(after if chance.random() < 0.9 else other) for _ in range(count))


class Cut(NamedTuple):
    number: int
    """Of events before it."""
    mark: int
    """The last before it; 0."""
    lost: int
    """Bytes that had been written and are not there."""
    pending: int
    """Bytes that had been written and not flushed."""


def cuts(disk: bytearray, events: list[Event], numbers: list[int], seed: int, sector: int = _SECTOR) -> Iterator[Cut]:
    """For each number of events, makes `disk` what such a cut leaves. `disk` begins as it was before the first.
    `sector`: bytes that it writes whole or not at all."""
    chance = random.Random(seed)
    durable = disk
    done = 0
    mark = 0
    pending: list[Event] = []
    for number in sorted(numbers):
        for each in events[done:number]:
            if each.kind == "w":
                pending.append(each)
            elif each.kind == "m":
                mark = each.at
            else:
                for write in pending:
                    durable[write.at : write.at + len(write.data)] = write.data
                pending.clear()
        done = number
        kept = [(at, durable[at : at + size]) for at, size in ((each.at, len(each.data)) for each in pending)]
        pieces = [
            (each.at + start, each.data[start : start + _PIECE])
            for each in pending
            for start in range(0, len(each.data), _PIECE)
        ]
        total = sum(len(piece) for _, piece in pieces)
        there = _choose(chance, pieces, sector)
        for at, piece in there:
            durable[at : at + len(piece)] = piece
        yield Cut(number, mark, total - sum(len(piece) for _, piece in there), total)
        for at, before in reversed(kept):
            durable[at : at + len(before)] = before


def _choose(chance: random.Random, pieces: list[tuple[int, bytes]], sector: int) -> list[tuple[int, bytes]]:
    """All, none, or some in another order, one of them torn."""
    how = chance.randrange(5)
    if how == 0 or not pieces:
        return pieces
    if how == 1:
        return []
    there = [each for each in pieces if chance.random() < (0.1, 0.5, 0.9)[how - 2]]
    chance.shuffle(there)
    if there:
        index = chance.randrange(len(there))
        at, piece = there[index]
        there[index] = (at, piece[: chance.randrange(0, len(piece) + 1, sector)])
    return there
