# SPDX-License-Identifier: Apache-2.0
"""The power goes while a disk gets a new volume key: from a log of every write and flush of the disk.

What was written before the last flush is there; of the rest all, nothing, or any part. At each write of the header,
with all, some and none of it there, the disk opens. After random cuts the command also finishes: UNLOCK_CUTS=1000, as
in `make soak`, tries more of them.
"""

import os
import random
import shutil
import subprocess
import sys
import tempfile
from collections import Counter
from collections.abc import Callable, Iterator
from hashlib import sha256
from pathlib import Path
from typing import NamedTuple

import pytest

from tests.deepfixture import DATA, HEADER, DeepHost, judge, loop, metadata
from tests.killing import CHECKOUT, commit
from tests.lab import writes
from tests.lab.cuts import choose
from tests.lab.uml.kernel import compiled
from tests.test_rekey_deep import assert_done
from unlock.disks import reencrypt
from unlock.host import keyring
from unlock.host.journal import DeepRekey
from unlock.host.state import State

pytestmark = [pytest.mark.root, pytest.mark.long(minutes=5), pytest.mark.usefixtures("key_cache")]

CUTS = int(os.environ.get("UNLOCK_CUTS", "100"))
STEP = 1 << 20


@pytest.fixture
def tmp_path() -> Iterator[Path]:
    """In memory: many gigabytes are written, and flushed."""
    with tempfile.TemporaryDirectory(dir="/dev/shm") as folder:
        yield Path(folder)


METADATA = 32 << 10
"""Bytes of both copies of the header."""
RUN = """
import shutil, sys
from unlock.disks import find, reencrypt
from unlock.operations import rekey_deep
from unlock.paths import Paths
from unlock.secret import Secret
root, node, state, steps, hotzone = sys.argv[1:]
reencrypt.HOTZONE = int(hotzone)
paths, recovery = Paths(root), sys.stdin.buffer.read()
calls = []

def tell(done, total):
    shutil.copy(paths.state, state)
    calls.append(done)
    return len(calls) > int(steps)

choices = rekey_deep.Choices("data", lambda: Secret(recovery))
done = rekey_deep.rekey_deep(paths, choices, tell, look=lambda: find.read_headers([find.Found(node, "")]))
assert [each.outcome for each in done] in (["done"], ["stopped"]), done
"""
"""With a log, in a process of its own. The state when all is prepared is kept."""

Show = Callable[[str, object], None]


class Cut(NamedTuple):
    """What a disk holds then."""

    at: int
    """The number of the last write or flush before it."""
    content: bytes
    lost: int
    """Writes that were not flushed and are gone."""


def cuts(start: bytes, log: list[writes.Write], count: int, dice: random.Random) -> Iterator[Cut]:
    """At `count` places in the log, in their order. At least half of them lose something, if there are many."""
    chosen = [number - 1 for number in choose(["f" if each.flush else "w" for each in log], count, dice)]
    durable, pending = bytearray(start), list[writes.Write]()
    for at, each in enumerate(log):
        if each.flush:
            for write in pending:
                writes.apply(durable, write)
            pending.clear()
        else:
            pending.append(each)
        while chosen and chosen[0] == at:
            chosen.pop(0)
            share = dice.choice((0.0, 0.1, 0.5, 0.9, 1.0))
            kept = [write for write in pending if dice.random() < share]
            if kept and share < 1 and len(kept) == len(pending):  # a part is never all
                kept.pop(dice.randrange(len(kept)))
            content = bytearray(durable)
            for write in kept:
                writes.apply(content, write)
            yield Cut(at, bytes(content), len(pending) - len(kept))


@pytest.mark.parametrize(("resilience", "sector"), [("checksum", 512), ("journal", 4096)])
def test_at_each_write_of_the_header_it_opens(
    tmp_path: Path, record_property: Show, monkeypatch: pytest.MonkeyPatch, resilience: str, sector: int
) -> None:
    """As data disks mostly are, and as root disks are. Of two hotzones."""
    monkeypatch.setattr(reencrypt, "HOTZONE", DATA // 2)
    host = DeepHost(tmp_path, sector=sector)
    (image,) = host.disks
    start = image.read_bytes()
    log = logged_run(host, image, tmp_path / "state", hotzone=DATA // 2)
    phases: Counter[str] = Counter()
    judged = lost = 0
    seen = set[bytes]()
    for content, pending in header_boundaries(start, log):
        if (digest := sha256(content).digest()) in seen:
            continue
        seen.add(digest)
        copy = tmp_path / "copy"
        copy.write_bytes(content)
        if any(each["type"] == "reencrypt" for each in metadata(copy)["keyslots"].values()):
            assert resilience in str(metadata(copy)["keyslots"])
        phases[judge(host, copy, host.plain[image]) or "at rest"] += 1
        judged += 1
        lost += pending
    keyring.flush()
    where = f"{judged} at the writes of the header, {lost} with writes lost"
    record_property("shown", f"rekey --deep, {resilience}, sectors of {sector}: power cuts: {where}: {dict(phases)}")
    assert {"at rest", "moving", "crash", "whole", "new"} <= phases.keys() and lost > judged / 4


def header_boundaries(start: bytes, log: list[writes.Write]) -> Iterator[tuple[bytes, bool]]:
    """What is on the disk before each flush of a header, with all, some and none of what it would flush; and whether
    something is lost."""
    durable, pending = bytearray(start), list[writes.Write]()
    for each in log:
        if not each.flush:
            pending.append(each)
            continue
        if header := [write for write in pending if write.offset < METADATA]:
            other = [write for write in pending if write not in header]
            for kept in (pending, header, other, pending[::2], pending[1::2], []):
                content = bytearray(durable)
                for write in kept:
                    writes.apply(content, write)
                yield bytes(content), len(kept) < len(pending)
        for write in pending:
            writes.apply(durable, write)
        pending.clear()


def test_after_a_cut_it_opens_and_finishes(
    tmp_path: Path, record_property: Show, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(reencrypt, "HOTZONE", STEP)
    host = DeepHost(tmp_path)
    (image,) = host.disks
    start = image.read_bytes()
    state = tmp_path / "state"
    log = logged_run(host, image, state)
    begun = next(at for at, each in enumerate(log) if b'"online-reencrypt-v2"' in each.data)
    prepared, unprepared = state.read_bytes(), without_preparation(host, state)
    phases: Counter[str] = Counter()
    lost = 0
    for cut in cuts(start, log, CUTS, random.Random(commit())):
        image.write_bytes(cut.content)
        phases[judge(host, Path(shutil.copy(image, tmp_path / "copy")), host.plain[image]) or "at rest"] += 1
        lost += cut.lost > 0
        Path(host.paths.state).write_bytes(prepared if cut.at >= begun else unprepared)
        with loop(image) as host.nodes[image]:
            assert [each.outcome for each in host.rekey()] == ["done"], cut.at
        assert_done(host, image)
    keyring.flush()
    where = f"in {len(log)} writes and flushes, {lost} with writes lost"
    record_property("shown", f"rekey --deep: power cut {CUTS} times {where}: {dict(phases)}")
    assert lost >= CUTS // 2
    assert {"at rest", "moving", "crash"} <= phases.keys()


def logged_run(host: DeepHost, image: Path, state: Path, steps: int = 1000, hotzone: int = STEP) -> list[writes.Write]:
    """Every write and flush of the disk, from the start of the command to its end, or for so many hotzones."""
    path = state.with_name("log")
    with loop(image) as node:
        shim = str(compiled("writelog.c", "-shared", "-fPIC"))
        environment = {**os.environ, "LD_PRELOAD": shim, "WRITELOG": str(path), "WRITELOG_DISK": node}
        command = [sys.executable, "-c", RUN, host.paths.root, node, str(state), str(steps), str(hotzone)]
        done = subprocess.run(
            command, input=bytes(host.recovery), env=environment, cwd=CHECKOUT, capture_output=True, check=False
        )
        assert done.returncode == 0, done.stderr.decode()
    return list(writes.read(path, HEADER + DATA))


def without_preparation(host: DeepHost, state: Path) -> bytes:
    """The state before the disks were prepared."""
    Path(host.paths.state).write_bytes(state.read_bytes())
    found = State.load(host.paths)
    assert isinstance(found.journal, DeepRekey)
    disks = tuple(each._replace(recovery="") for each in found.journal.disks)
    found.journal = found.journal._replace(disks=disks, prepared=False)
    found.save()
    return Path(host.paths.state).read_bytes()


def test_cut_again_and_again_in_one_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """In the midst of a hotzone each time; a boot recovers it, and the run goes on from there."""
    monkeypatch.setattr(reencrypt, "HOTZONE", STEP)
    host = DeepHost(tmp_path)
    (image,) = host.disks
    start, state = image.read_bytes(), tmp_path / "state"
    for _ in range(3):
        log = logged_run(host, image, state, steps=1)
        Path(host.paths.state).write_bytes(state.read_bytes())
        hot = [at for at, each in enumerate(log) if b"in-reencryption" in each.data]
        content = bytearray(start)
        for each in log[: hot[1] + 1]:
            writes.apply(content, each)
        copy = tmp_path / "copy"
        copy.write_bytes(content)
        assert judge(host, copy, host.plain[image]) == "crash"
        start = copy.read_bytes()
        image.write_bytes(start)
        (tmp_path / "log").unlink()
    with loop(image) as host.nodes[image]:
        assert [each.outcome for each in host.rekey()] == ["done"]
    assert_done(host, image)
    keyring.flush()
