# SPDX-License-Identifier: Apache-2.0
"""The writes and flushes of image files by a program, in their order, and what a power cut leaves of all of them.

strace(1) records the calls of a child. A file keeps what was written before its last flush; of what came after, all,
nothing or any part may be there.
"""

import random
import re
import tempfile
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

from tests.killing import _traced
from tests.lab.writes import Write

_CALLS = "lseek,write,pwrite64,writev,pwritev,pwritev2,fsync,fdatasync,mmap,ftruncate,fallocate"
_LINE = re.compile(r'^(\w+)\((\d+)<([^>]*)>(?:, "((?:\\x[0-9a-f]{2})*)")?(.*)\) += (-?\d+)')
_LONGEST = 2 << 20


class Event(NamedTuple):
    """A write or flush of one file."""

    file: Path
    write: Write


def record(files: list[Path], work: Callable[[], object]) -> list[Event]:
    """What a child that runs `work` writes to these files."""
    with tempfile.NamedTemporaryFile("r") as log:
        options = ["-y", "-xx", "-e", f"trace={_CALLS}", "-s", str(_LONGEST), "-o", log.name]
        assert _traced(options, work) == 0
        return list(_parse(log.read(), {str(each): each for each in files}))


def _parse(text: str, files: dict[str, Path]) -> Iterator[Event]:
    places: dict[str, int] = {}
    for line in text.splitlines():
        found = _LINE.match(line)
        if not found:
            continue
        call, fd, name, data, rest, result = found.groups()
        name = bytes.fromhex(name.replace("\\x", "")).decode() if name.startswith("\\x") else name
        if name not in files or int(result) < 0:
            continue
        key = f"{fd} {name}"
        if call == "lseek":
            places[key] = int(result)
        elif call in ("write", "pwrite64"):
            content = bytes.fromhex(data.replace("\\x", ""))[: int(result)]
            assert len(content) == int(result), "the log is not whole"
            offset = int(rest.rpartition(", ")[2]) if call == "pwrite64" else places.get(key, 0)
            if call == "write":
                places[key] = offset + len(content)
            yield Event(files[name], Write(offset, content, False))
        elif "sync" in call:
            yield Event(files[name], Write(0, b"", True))
        else:
            assert call == "mmap" and "MAP_SHARED" not in rest, line


class Cut(NamedTuple):
    """What the files hold then."""

    contents: dict[Path, bytes]
    lost: int
    """Writes that were not flushed and are gone."""


def cuts(start: dict[Path, bytes], log: list[Event], dice: random.Random, count: int = 0) -> Iterator[Cut]:
    """After each write: with all that was not flushed, with nothing of it, and twice with a part that is never all;
    or `count` of those at random. At the end: what the files hold when all is flushed."""
    shares = (1.0, 0.0, 0.5, 0.5)
    writes = [number for number, each in enumerate(log) if not each.write.flush]
    chosen = Counter(dice.choice(writes) for _ in range(count))
    durable = {file: bytearray(content) for file, content in start.items()}
    pending: dict[Path, list[Write]] = {file: [] for file in start}
    for number, (file, write) in enumerate(log):
        if write.flush:
            for each in pending[file]:
                _apply(durable[file], each)
            pending[file].clear()
            continue
        pending[file].append(write)
        for share in [dice.choice(shares) for _ in range(chosen[number])] if count else shares:
            unflushed = [(name, each) for name in durable for each in pending[name]]
            lost = {at for at in range(len(unflushed)) if dice.random() >= share}
            if share < 1 and not lost:
                lost = {dice.randrange(len(unflushed))}
            now = {name: bytearray(content) for name, content in durable.items()}
            for at, (name, each) in enumerate(unflushed):
                if at not in lost:
                    _apply(now[name], each)
            yield Cut({name: bytes(content) for name, content in now.items()}, len(lost))
    assert not any(pending.values()), "what is written last is flushed"
    yield Cut({file: bytes(content) for file, content in durable.items()}, 0)


def _apply(content: bytearray, write: Write) -> None:
    content[write.offset : write.offset + len(write.data)] = write.data
