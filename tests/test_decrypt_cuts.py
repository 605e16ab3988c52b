# SPDX-License-Identifier: Apache-2.0
"""Power cuts while a disk is decrypted in place: from a log of every write and flush of the disk, with what was not
flushed there, partly there or lost. After each the disk opens, or is the plain partition; it holds what it held, and
the command finishes. UNLOCK_CUTS=1000 tries more of them, 0 each write and flush five times."""

import os
import random
import struct
import tempfile
import zlib
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path

import pytest

from tests.decryptchild import NO_TPM, keep, put_back
from tests.decrypting import AFTER, BEFORE, HEADER, Loop, fitting_token, look, phase, protect, read_half
from tests.deepfixture import stock_opens
from tests.flowfixture import HOST, Host
from tests.inplace import MIB, sh
from tests.killing import Killer
from tests.lab import cuts
from unlock.disks import disk_keys, luks, partition_table, raw_header, reencrypt, reencrypt_plan
from unlock.disks.header import Header, has_valid_checksum
from unlock.disks.place import Place
from unlock.errors import Malformed, NotOurs, TpmAbsent
from unlock.host.journal import DiskDecryption
from unlock.operations import decrypt_disk
from unlock.secret import Secret
from unlock.strictjson import canonical

pytestmark = [pytest.mark.usefixtures("key_cache"), pytest.mark.long(minutes=4)]

CUTS = int(os.environ.get("UNLOCK_CUTS", "100"))
SEED = int(os.environ.get("UNLOCK_SEED", "1"))
DATA = 6 * MIB
HOTZONE = 2 * MIB
SECTOR = 512
Show = Callable[[str, object], None]


@pytest.fixture
def folder() -> Iterator[Path]:
    """In memory, where there is room: all of it is written again for each cut."""
    with tempfile.TemporaryDirectory(dir="/dev/shm" if os.path.isdir("/dev/shm") else None) as made:
        yield Path(made)


@pytest.fixture
def loop(folder: Path) -> Iterator[Loop]:
    made = Loop(folder, "none", DATA)
    yield made
    made.detach()


def write(disk: str, content: bytes | bytearray) -> None:
    with open(disk, "r+b", buffering=0) as file:
        left = memoryview(content)
        while left:
            left = left[file.write(left[: 8 * MIB]) :]


def run_logged(host: Host, loop: Loop, folder: Path) -> list[cuts.Event]:
    (folder / "copies").mkdir()
    keep(host.paths, folder / "copies/0")
    arguments = "-m", "tests.decryptchild", host.paths.root, loop.node, str(HOTZONE), str(folder / "copies")
    return cuts.log_of(cuts.build(folder), loop.disk, folder / "log", *arguments)


@pytest.mark.timeout(200 + 4 * (CUTS or 1000))
def test_power_cuts(folder: Path, loop: Loop, record_property: Show, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(reencrypt, "HOTZONE", HOTZONE)
    host = Host(folder, 0)
    data = protect(host, loop, folder, sector=512)
    start = bytearray(Path(loop.disk).read_bytes())
    events = run_logged(host, loop, folder)
    assert host.state.narrowed == "photos-0 was decrypted in place" and loop.plain() == data
    numbers = cuts.choose([each.kind for each in events], CUTS, random.Random(SEED))
    seen: Counter[str] = Counter()
    lossy = 0
    for cut in cuts.cuts(start, events, numbers, SEED, SECTOR):
        write(loop.disk, start)
        put_back(host.paths, folder / "copies" / str(cut.mark))
        lossy += cut.lost > 0
        seen[judge(host, loop, data)] += 1
    told = ", ".join(f"{count} {name}" for name, count in sorted(seen.items()))
    where = f"in {len(events)} writes and flushes, {lossy} lost unflushed writes"
    record_property("shown", f"disk decrypt: {len(numbers)} power cuts {where}: {told}")
    assert lossy >= len(numbers) // 2
    assert {"moving", "crash", "plain"} <= seen.keys()


@pytest.mark.timeout(2400)
def test_at_each_write_of_the_header_and_of_the_end(
    folder: Path, loop: Loop, record_property: Show, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With all, some and none of what was not flushed."""
    monkeypatch.setattr(reencrypt, "HOTZONE", HOTZONE)
    host = Host(folder, 0)
    data = protect(host, loop, folder)
    start = bytearray(Path(loop.disk).read_bytes())
    events = run_logged(host, loop, folder)
    seen: Counter[str] = Counter()
    durable, pending, mark, lost = bytearray(start), list[cuts.Event](), 0, 0
    known = set[bytes]()
    for each in events:
        if each.kind == "m":
            mark = each.at
        if each.kind == "w":
            pending.append(each)
        if each.kind != "f":
            continue
        if head := [one for one in pending if one.at < 32 << 10]:
            for kept in (pending, head, [one for one in pending if one not in head], pending[::2], pending[1::2], []):
                content = bytearray(durable)
                for one in kept:
                    content[one.at : one.at + len(one.data)] = one.data
                if (digest := zlib.adler32(content).to_bytes(4, "big")) in known:
                    continue
                known.add(digest)
                write(loop.disk, content)
                put_back(host.paths, folder / "copies" / str(mark))
                lost += len(kept) < len(pending)
                seen[judge(host, loop, data)] += 1
        for one in pending:
            durable[one.at : one.at + len(one.data)] = one.data
        pending.clear()
    where = f"{sum(seen.values())} at the writes of the header, {lost} with writes lost"
    record_property("shown", f"disk decrypt: power cuts: {where}: {dict(seen)}")
    assert {"encrypted", "moving", "crash", "whole", "plain"} <= seen.keys(), seen


def judge(host: Host, loop: Loop, data: bytes) -> str:
    """What state the disk is in; it opens in that state by what a boot has, and by stock cryptsetup with the recovery
    key; then the operation finishes."""
    held = os.path.isdir(raw_header.lock_path(loop.node))
    reencrypt.unlock_after_kill(loop.node)  # as a boot does, with its new /run
    where = opens(host, loop, data)
    if held:
        os.mkdir(raw_header.lock_path(loop.node))
    state = host.state
    if state.journal is None and state.groups:
        assert where == "encrypted"
        with pytest.raises(TpmAbsent):
            decrypt_disk.decrypt_disk(host.paths, "photos-0", never, look=look(loop.node), tcti=NO_TPM)
    elif state.journal:
        assert isinstance(state.journal, DiskDecryption)
        with pytest.raises(TpmAbsent):
            decrypt_disk.resume(host.paths, never, look=look(loop.node), tcti=NO_TPM)
    state = host.state
    assert (state.journal, state.narrowed, state.groups) == (None, "photos-0 was decrypted in place", {})
    assert opens(host, loop, data) == "plain"
    return where


def never(done: int, size: int) -> bool:
    return False


def opens(host: Host, loop: Loop, data: bytes) -> str:
    try:
        with luks.Container(loop.node) as container:
            each = fitting_token(container, host.persistence)
            key = disk_keys.unwrap_volume_key(container, each, host.persistence)
            plan = each.reencryption.plan if each.reencryption else None
    except (NotOurs, Malformed):
        assert loop.partitions() == [(HEADER, DATA)] and loop.plain() == data
        return "plain"
    found = phase(loop.node) or "encrypted"
    copy = Path(loop.image.with_name("copy"))
    copy.write_bytes(Path(loop.node).read_bytes())
    with key:
        stock_opens(copy, host.recovery)
        if plan:
            settled = reencrypt.settle(loop.node, plan, key if found not in ("encrypted", "old") else None)
            assert settled in ("old", "moving", "whole")
    assert read_half(loop.node, host.persistence) == data
    return found


def test_every_header_of_a_run_fits_its_plan(loop: Loop, folder: Path) -> None:
    """Whichever the power leaves: from the log, both copies after each write."""
    host = Host(folder, 0)
    protect(host, loop, folder)
    head = bytearray(32 << 10)
    seen: Counter[str] = Counter()
    facts = set()
    for each in (event for event in run_logged(host, loop, folder) if event.kind == "w" and event.at < len(head)):
        part = each.data[: len(head) - each.at]
        head[each.at : each.at + len(part)] = part
        for at in (0, 16 << 10):
            copy = bytes(head[at : at + (16 << 10)])
            if copy[:4] not in (b"LUKS", b"SKUL") or not has_valid_checksum(copy):
                continue
            header = Header(loop.node, copy[168:204].decode(), copy[4096:].rstrip(b"\0"))
            for token in disk_keys.read_tokens(header, HOST):
                if token.reencryption:
                    seen[reencrypt_plan.phase(header, token.reencryption.plan)] += 1
                    facts.add(canonical(disk_keys.facts(header, token)))
    assert len(facts) == 1 and {"old", "moving", "crash", "whole"} == seen.keys(), seen


STEPS = (
    os.replace,
    os.unlink,
    luks.Container.set_token,
    luks.Container.remove_token,
    luks.Container.add_keyslot,
    luks.Container.remove_keyslot,
    reencrypt.Disk.start,
    raw_header.write_header,
    partition_table._Disk.write,
)


@pytest.mark.timeout(2400)
def test_killed_at_every_step_it_goes_on(
    loop: Loop, folder: Path, monkeypatch: pytest.MonkeyPatch, killer: Killer
) -> None:
    monkeypatch.setattr(reencrypt, "HOTZONE", HOTZONE)
    host = Host(folder, 0)
    data = protect(host, loop, folder)
    start = Path(loop.disk).read_bytes()
    keep(host.paths, folder / "kept")

    def begin(_: int) -> Callable[[], object]:
        write(loop.disk, start)
        put_back(host.paths, folder / "kept")
        return run

    def run() -> None:
        with suppress(TpmAbsent):
            decrypt_disk.decrypt_disk(host.paths, "photos-0", never, look=look(loop.node), tcti=NO_TPM)

    seen: Counter[str] = Counter()
    for _, killed in killer(begin, STEPS):
        if killed:
            seen[judge(host, loop, data)] += 1
    assert {"encrypted", "old", "whole", "plain"} <= seen.keys(), seen


# The step itself, in a table with other partitions


SWITCH = """
import sys
from unlock.disks import partition_table
from unlock.disks.place import Place
place = Place(*eval(sys.argv[1]))
partition_table.put(place, place.disk)
partition_table.tidy(place)
"""


@pytest.mark.parametrize("table", ["gpt", "dos", "none"])
def test_at_each_cut_the_table_has_all_partitions(folder: Path, record_property: Show, table: str) -> None:
    """Each write and flush, with all, none and parts of what was not flushed: the kernel finds the other partitions,
    and this one with its header or where its data begins; then it goes on."""
    loop = Loop(folder, table, DATA, partition=False)
    try:
        header = folder / "header"
        header.write_bytes(bytes(HEADER + DATA))
        luks.format(str(header), Secret(bytes(range(64)))).close()
        with open(loop.disk, "r+b", buffering=0) as disk:
            disk.seek(loop.start)
            disk.write(header.read_bytes()[:HEADER])
            os.fsync(disk.fileno())
        place = place_of(loop)
        start = Path(loop.disk).read_bytes()
        events = cuts.log_of(cuts.build(folder), loop.disk, folder / "log", "-c", SWITCH, repr(tuple(place)))
        durable, pending = bytearray(start), list[cuts.Event]()
        seen: Counter[str] = Counter()
        for each in [*events, cuts.Event("f", 0, b"")]:
            if each.kind == "w":
                pending.append(each)
                continue
            assert len(pending) < 2, "two writes before a flush"
            for one in pending:
                half = len(one.data) // 2 // SECTOR * SECTOR
                for size in [half] if len(one.data) == MIB else sorted({0, SECTOR, half, len(one.data)}):
                    content = bytearray(durable)
                    content[one.at : one.at + size] = one.data[:size]
                    seen[judge_table(loop, place, content)] += 1
                durable[one.at : one.at + len(one.data)] = one.data
            pending.clear()
        assert judge_table(loop, place, durable) == "placed"
        record_property("shown", f"disk decrypt, {table}: {sum(seen.values())} cuts of the step: {dict(seen)}")
        assert {"before", "placed"} <= seen.keys()
    finally:
        loop.detach()


def place_of(loop: Loop) -> Place:
    if loop.table == "none":
        return partition_table.whole_disk(loop.disk, HEADER + DATA, HEADER, "photos")
    with partition_table._Disk(loop.disk, os.O_RDONLY) as disk:
        return disk.find(2, loop.start, HEADER + DATA, HEADER, "photos")


def judge_table(loop: Loop, place: Place, content: bytes | bytearray) -> str:
    write(loop.disk, content)
    others = [] if loop.table == "none" else [(MIB, BEFORE), (loop.start + HEADER + DATA, AFTER)]
    found = kernel_finds(content, loop.table)
    copies = [content[loop.start + at :][: 16 << 10] for at in (0, 16 << 10)]
    whole = [has_valid_checksum(bytes(each)) for each in copies]
    if (loop.start + HEADER, DATA) in found:
        where = "placed"
    else:
        where = "before"
        assert (loop.start, HEADER + DATA) in found or (loop.table == "none" and not found)
        assert all(whole) if loop.table != "none" else whole[0]
    assert sorted({*found} - {(loop.start, HEADER + DATA), (loop.start + HEADER, DATA)}) == others
    assert partition_table.is_placed(place, loop.disk) == (where == "placed")
    if where == "before":
        partition_table.put(place, loop.disk)
    partition_table.tidy(place)
    assert sorted([*others, (loop.start + HEADER, DATA)]) == loop.partitions()
    assert "No errors" in sh("sfdisk", "--verify", loop.disk) or loop.table != "gpt"
    return where


def kernel_finds(content: bytes | bytearray, table: str) -> list[tuple[int, int]]:
    """Start and size of the partitions that Linux takes from a disk: of a GPT by its primary header alone, where that
    is good (block/partitions/efi.c)."""
    if content[510:512] != b"\x55\xaa":
        return []
    if table != "gpt":
        rows = [struct.unpack_from("<II", content, 446 + 16 * number + 8) for number in range(4)]
        return [(first * SECTOR, count * SECTOR) for first, count in rows if count]
    head = bytearray(content[512:1024])
    size, crc, mine = *struct.unpack_from("<II", head, 12), struct.unpack_from("<Q", head, 24)[0]
    at, count, length, entries_crc = struct.unpack_from("<QIII", head, 72)
    head[16:20] = bytes(4)
    entries = bytes(content[at * SECTOR :][: count * length])
    good = head[:8] == b"EFI PART" and mine == 1 and zlib.crc32(head[:size]) == crc
    if not good or zlib.crc32(entries) != entries_crc:
        return []
    rows = [struct.unpack_from("<QQ", entries, number * length + 32) for number in range(count)]
    return [(first * SECTOR, (last - first + 1) * SECTOR) for first, last in rows if first]
