# SPDX-License-Identifier: Apache-2.0
"""Power cuts while a disk is encrypted in place: from a log of every write and flush of the disk, with what was not
flushed there, partly there or lost. After each the disk opens, or is finished from the header in /var; it holds what it
held. UNLOCK_CUTS=1000 tries more of them, 0 each write and flush five times."""

import os
import random
import shutil
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path

import pytest

from tests.encryptchild import NO_TPM, look
from tests.flowfixture import HOST, Host
from tests.inplace import MIB, RESERVED, SHIFT, files_in, fill, read_clear, recovery_file, sh
from tests.killing import Killer
from tests.lab import cuts
from unlock.disks import disk_keys, encrypt, luks, raw_header, reencrypt, reencrypt_plan
from unlock.disks.header import Header, has_valid_checksum
from unlock.errors import Malformed, NotOurs, TpmAbsent
from unlock.host.journal import DiskEncryption
from unlock.host.state import State
from unlock.operations import encrypt_disk
from unlock.strictjson import canonical

pytestmark = [
    pytest.mark.usefixtures("key_cache"),
    pytest.mark.long(minutes=6),
]

CUTS = int(os.environ.get("UNLOCK_CUTS", "100"))
SEED = int(os.environ.get("UNLOCK_SEED", "1"))
SIZE = RESERVED + 36 * MIB
SECTOR = 4096
"""Of the disk."""


@pytest.fixture
def folder() -> Iterator[Path]:
    """In memory, where there is room: all of it is written again for each cut."""
    with tempfile.TemporaryDirectory(dir="/dev/shm" if os.path.isdir("/dev/shm") else None) as made:
        yield Path(made)


@pytest.fixture
def disk(folder: Path) -> Iterator[str]:
    image = folder / "disk"
    with image.open("wb") as file:
        file.truncate(SIZE)
    loop = sh("losetup", "--find", "--show", "--sector-size", 4096, image)
    yield loop
    sh("losetup", "--detach", loop)


def write(disk: str, content: bytes | bytearray) -> None:
    with open(disk, "r+b", buffering=0) as file:
        left = memoryview(content)
        while left:
            left = left[file.write(left[: 8 * MIB]) :]


@pytest.mark.timeout(200 + 4 * (CUTS or 1000))
def test_power_cuts(
    folder: Path,
    disk: str,
    record_property: Callable[[str, object], None],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(encrypt_disk, "VOLATILE", ())
    host = Host(folder, 0)
    fill(disk, folder, SIZE)
    sh("e2fsck", "-f", "-p", disk)
    start = bytearray(Path(disk).read_bytes())
    copies = folder / "copies"
    var = os.path.dirname(host.paths.state)
    shutil.copytree(var, copies / "0")
    config = Path(host.paths.config).read_bytes()
    events = cuts.log_of(
        cuts.build(folder), disk, folder / "log",
        "-m", "tests.encryptchild", host.paths.root, disk, recovery_file(host), str(copies),
    )  # fmt: skip
    events = list(whole_sectors(start, events))
    assert State.load(host.paths).narrowed == "photos-a was encrypted in place"
    data = read_clear(disk, host.persistence)
    assert files_in(data, folder) == {each.name: each.read_bytes() for each in (folder / "files").iterdir()}
    expected = Expected(data, bytes(start))
    numbers = cuts.choose([each.kind for each in events], CUTS, random.Random(SEED))
    seen: Counter[str] = Counter()
    lossy = 0
    for cut in cuts.cuts(start, events, numbers, SEED, SECTOR):
        write(disk, start)
        shutil.rmtree(var)
        shutil.copytree(copies / str(cut.mark), var)
        Path(host.paths.config).write_bytes(config)
        lossy += cut.lost > 0
        found = judge(host, disk, expected)
        seen[found] += 1
    told = ", ".join(f"{count} {name}" for name, count in sorted(seen.items()))
    record_property("shown", f"{len(numbers)} power cuts, {lossy} lost unflushed writes: {told}")
    assert lossy >= len(numbers) // 2
    assert {"in clear", "header half written", "moving", "crash", "new"} <= seen.keys()


def whole_sectors(start: bytes | bytearray, events: list[cuts.Event]) -> Iterator[cuts.Event]:
    """The same, where a sector that is written in parts, as e2fsck does with the superblock, is written once."""
    disk = bytearray(start)
    parts = range(0)
    for each in (*events, cuts.Event("f", 0, b"")):
        within = range(each.at // SECTOR * SECTOR, (each.at // SECTOR + 1) * SECTOR)
        is_part = each.kind == "w" and len(each.data) < SECTOR and each.at + len(each.data) <= within.stop
        if parts and not (is_part and within == parts):
            yield cuts.Event("w", parts.start, bytes(disk[parts.start : parts.stop]))
        parts = within if is_part else range(0)
        if each.kind == "w":
            disk[each.at : each.at + len(each.data)] = each.data
        if not is_part:
            yield each


class Expected:
    """What the disk must hold. Blocks in which the check and the change of size leave their time may differ."""

    def __init__(self, data: bytes, start: bytes) -> None:
        self.data = data
        self._fixed = [at for at in range(0, len(data), 4096) if data[at : at + 4096] == start[at : at + 4096]]
        assert len(self._fixed) * 4096 > len(data) - MIB // 4

    def check(self, found: bytes) -> None:
        assert len(found) == len(self.data)
        assert all(found[at : at + 4096] == self.data[at : at + 4096] for at in self._fixed)


def judge(host: Host, disk: str, expected: Expected) -> str:
    """What state the disk is in; it opens in that state by what a boot has, and the operation finishes."""
    entry = host.state.journal
    held = os.path.isdir(raw_header.lock_path(disk))
    reencrypt.unlock_after_kill(disk)  # as a boot does, with its new /run
    where = opens(host, disk, expected)
    if held:
        os.mkdir(raw_header.lock_path(disk))
    if where == "nothing":
        assert isinstance(entry, DiskEncryption) and entry.moved and not entry.written
        where = "header half written"
    if not isinstance(entry, DiskEncryption):
        if not host.state.groups:
            assert where == "in clear"
            choices = encrypt_disk.Choices(disk, "photos", recovery_file=recovery_file(host))
            with pytest.raises(TpmAbsent):
                encrypt_disk.encrypt_disk(host.paths, choices, never, look=look(disk), tcti=NO_TPM)
    else:
        with pytest.raises(TpmAbsent):
            encrypt_disk.resume(host.paths, never, look=look(disk), tcti=NO_TPM)
    state = host.state
    assert state.journal is None and state.narrowed and list(state.groups) == ["photos"]
    assert opens(host, disk, expected) == "new"
    with luks.Container(disk) as container:
        assert not left_in_clear(disk, expected.data)
        assert len(container.keyslots()) == 1 and len(container.tokens("unlock")) == 1
    return where


def left_in_clear(disk: str, expected: bytes) -> bool:
    """Whether the end of the disk still has blocks of the part that was moved there."""
    with open(disk, "rb", buffering=0) as file:
        file.seek(SIZE - SHIFT)
        end = file.read(SHIFT)
    blocks = (at for at in range(0, SHIFT, 4096) if any(expected[at : at + 16]))
    return any(end[at : at + 4096] == expected[at : at + 4096] for at in blocks)


def never(done: int, size: int) -> bool:
    return False


def opens(host: Host, disk: str, expected: Expected) -> str:
    try:
        with luks.Container(disk) as container:
            each = disk_keys.read_tokens(container, HOST)[0]
            key = disk_keys.unwrap_volume_key(container, each, host.persistence)
            plan = each.reencryption.plan if each.reencryption else None
            phase = reencrypt_plan.phase(container, plan) if plan else "new"
            container.volume_key(host.recovery).wipe() if phase == "new" else None
    except (NotOurs, Malformed):
        with open(disk, "rb") as file:
            content = file.read(SIZE - RESERVED)
        if content[1024:1536] == bytes(512):
            return "nothing"
        expected.check(content)
        sh("e2fsck", "-f", "-n", disk)
        return "in clear"
    with key:
        if plan:
            settled = reencrypt.settle(disk, plan, key if phase not in ("new", "old") else None)
            assert settled in ("moving", "new")
    expected.check(read_clear(disk, host.persistence))
    return phase


def test_every_header_of_a_run_fits_its_plan(disk: str, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whichever the power leaves: from the log, both copies after each write."""
    monkeypatch.setattr(encrypt_disk, "VOLATILE", ())
    host = Host(folder, 0)
    fill(disk, folder, SIZE - RESERVED)
    (folder / "copies").mkdir()
    events = cuts.log_of(
        cuts.build(folder), disk, folder / "log",
        "-m", "tests.encryptchild", host.paths.root, disk, recovery_file(host), str(folder / "copies"),
    )  # fmt: skip
    head = bytearray(32 << 10)
    seen: Counter[str] = Counter()
    facts = set()
    for each in (event for event in events if event.kind == "w" and event.at < len(head)):
        part = each.data[: len(head) - each.at]
        head[each.at : each.at + len(part)] = part
        for at in (0, 16 << 10):
            copy = bytes(head[at : at + (16 << 10)])
            if copy[:4] not in (b"LUKS", b"SKUL") or not has_valid_checksum(copy):
                continue
            header = Header(disk, copy[168:204].decode(), copy[4096:].rstrip(b"\0"))
            for token in disk_keys.read_tokens(header, HOST):
                if token.reencryption:
                    seen[reencrypt_plan.phase(header, token.reencryption.plan)] += 1
                    facts.add(canonical(disk_keys.facts(header, token)))
    assert len(facts) == 1 and {"moving", "crash", "whole", "new"} <= seen.keys(), seen


STEPS = (
    os.replace,
    os.unlink,
    luks.Container.set_token,
    luks.Container.remove_token,
    luks.Container.remove_keyslot,
    encrypt.Prepared.start_encryption,
    encrypt._write,
    raw_header.write_header,
    raw_header.overwrite,
)


@pytest.mark.timeout(2400)
def test_killed_at_every_step_it_goes_on(
    disk: str, folder: Path, monkeypatch: pytest.MonkeyPatch, killer: Killer
) -> None:
    monkeypatch.setattr(encrypt_disk, "VOLATILE", ())
    host = Host(folder, 0)
    fill(disk, folder, SIZE - RESERVED)
    sh("e2fsck", "-f", "-p", disk)
    start = Path(disk).read_bytes()
    time.sleep(1.1)
    sh("e2fsck", "-f", "-p", disk)
    expected = Expected(Path(disk).read_bytes()[: SIZE - RESERVED], start)
    recovery_file(host)
    var = os.path.dirname(host.paths.state)
    shutil.copytree(var, folder / "var")
    config = Path(host.paths.config).read_bytes()

    def begin(_: int) -> Callable[[], object]:
        write(disk, start)
        shutil.rmtree(var)
        shutil.copytree(folder / "var", var)
        Path(host.paths.config).write_bytes(config)
        return run

    def run() -> None:
        choices = encrypt_disk.Choices(disk, "photos", recovery_file=recovery_file(host))
        with suppress(TpmAbsent):
            encrypt_disk.encrypt_disk(host.paths, choices, never, look=look(disk), tcti=NO_TPM)

    seen: Counter[str] = Counter()
    for _, killed in killer(begin, STEPS):
        if killed:
            seen[judge(host, disk, expected)] += 1
    assert {"in clear", "header half written", "moving", "whole", "new"} <= seen.keys(), seen
