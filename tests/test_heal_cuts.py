# SPDX-License-Identifier: Apache-2.0
"""The power goes while a group is opened without a disk, or the disk is healed: neither writes to a header, so that
there is no state of one to judge. But for a copy of a header that an earlier cut has ruined, which libcryptsetup writes
again from the other one when `group heal` opens the disk.

As far as a kernel without device-mapper goes: to the mapping, which is refused. What comes after is behind it.
"""

import random
import tempfile
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.flowfixture import Host
from tests.inplace import sh
from tests.killing import Killer, _traced
from tests.lab import cuts
from tests.saved import Saved
from tests.test_degraded import leave_out
from tests.test_leave_cuts import CUTS, Lab, Show, by_passphrase, by_token
from unlock.boot import gate
from unlock.disks import btrfs_layout, devices, luks, udev
from unlock.disks.groups import Away
from unlock.errors import DiskFailed
from unlock.host import keyring, report, this_boot
from unlock.operations import heal_group
from unlock.operations.consent import agree
from unlock.secret import Secret

pytestmark = [pytest.mark.usefixtures("key_cache"), pytest.mark.timeout(600 + 2 * CUTS)]
COPY = 16 << 10
"""Bytes of each of the two copies of a header."""
RUINED = {"none": (), "the first": (0,), "the second": (COPY,)}


@pytest.fixture
def trio(tmp_path: Path) -> Host:
    return Host(tmp_path, 3)


def ruin(image: Path, which: str) -> None:
    for at in RUINED[which]:
        with image.open("r+b") as file:
            file.seek(at + 5000)
            file.write(b"x" * 512)


def writes_to(images: list[Path], work: Callable[[], object]) -> list[str]:
    """The calls by which a child, with all of its own, writes to these files, or opens them to be written to."""
    calls = "write,pwrite64,writev,pwritev,pwritev2,ftruncate,fallocate,copy_file_range,sendfile"
    with tempfile.NamedTemporaryFile("r") as log:
        assert _traced(["-f", "-y", "-e", f"trace={calls}", "-o", log.name], work) == 0
        return [line for line in log if any(str(each) in line for each in images)]


@pytest.mark.parametrize("which", RUINED)
def test_a_degraded_open_writes_to_no_header(trio: Host, which: str) -> None:
    """Nor does it repair one."""
    here = trio.disks[:2]
    ruin(here[0], which)
    before = [each.read_bytes() for each in here]

    def open_degraded() -> None:
        found = gate._opener(trio.state, "data", gate.make_unwrap(trio.paths, "data", record, 0), record)
        for each in here:
            found.add_disk(udev.Disk(str(each), each.name, "", "", "", 0, 0))
        found.read_headers()
        assert found.start_degraded("data", settled=True)
        found.start_complete_groups(settled=True)
        while found.is_busy():
            found.take_answers(1)
        outcomes = [record.disks[str(each)] for each in here]
        assert all("cannot be opened as data-" in each.detail for each in outcomes), outcomes
        found.stop(1)
        found.wipe()

    record = report.Report("gate data")
    assert writes_to(here, open_degraded) == []
    assert [each.read_bytes() for each in here] == before


@pytest.mark.parametrize(("which", "kind"), [*((each, "btrfs") for each in RUINED), ("none", "linux_raid_member")])
def test_heal_writes_to_no_header_but_a_ruined_copy(
    trio: Host, record_property: Show, monkeypatch: pytest.MonkeyPatch, which: str, kind: str
) -> None:
    """After a cut in that, the disk opens by its token and by the recovery key, and the same command goes on."""
    monkeypatch.setattr(heal_group, "_find_mount_point", lambda group: str(trio.folder))
    leave_out(trio, (1, kind))
    disk = trio.disks[1]
    good = disk.read_bytes()[: 2 * COPY]
    ruin(disk, which)

    def heal() -> None:
        with pytest.raises(DiskFailed, match="cannot be opened as"):
            heal_group.heal_group(trio.paths, "data", agree, trio.look)

    if which == "none":
        before = [each.read_bytes() for each in trio.disks]
        assert writes_to(trio.disks, heal) == []
        assert [each.read_bytes() for each in trio.disks] == before
        return
    lab = Lab(trio, record_property)
    for total in lab.states(f"group heal, {which} copy of a header ruined before", heal):
        assert by_token(trio, disk, trio.persistence) == [(1, 3)]
        assert by_passphrase(disk, trio.recovery)
        if total["states"] % 10 == 1:
            now = disk.read_bytes()
            heal()
            total["run again"] += 1
            disk.write_bytes(now)
    kept, again = (slice(COPY), slice(COPY, 2 * COPY))[:: -1 if which == "the first" else 1]
    content = disk.read_bytes()
    assert content[kept] == good[kept], "the good copy is not touched"
    assert content[again][4096:] == good[again][4096:], "the other one says the same again"
    keyring.flush()


WIPE = """
import os, subprocess, sys
subprocess.run(["wipefs", "--all", "--quiet", "--types", "btrfs", sys.argv[1]], env=os.environ, check=True)
"""


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[str]:
    image = tmp_path / "disk"
    with image.open("wb") as file:
        file.truncate(128 << 20)
    loop = sh("losetup", "--find", "--show", image)
    yield loop
    sh("losetup", "--detach", loop)


def test_a_btrfs_that_is_wiped_in_part_is_wiped_again(disk: str, tmp_path: Path, record_property: Show) -> None:
    """What is left of it after a cut is read as it was, or not found, and the same command wipes the rest."""
    sh("mkfs.btrfs", "-q", disk)
    made = btrfs_layout.read_device(disk)
    start = bytearray(Path(disk).read_bytes())
    events = cuts.log_of(cuts.build(tmp_path), disk, tmp_path / "log", "-c", WIPE, disk)
    assert btrfs_layout.read_device(disk) is None
    seen: Counter[str] = Counter()
    numbers = cuts.choose([each.kind for each in events], CUTS, random.Random(1))
    for cut in cuts.cuts(start, events, numbers, 1):
        with open(disk, "r+b") as file:
            file.write(start)
        found = btrfs_layout.read_device(disk)
        assert found in (made, None)
        seen["there" if found else "wiped"] += 1
        seen["with writes lost"] += cut.lost > 0
        sh("wipefs", "--all", "--quiet", "--types", "btrfs", disk)
        assert btrfs_layout.read_device(disk) is None
        assert not sh("wipefs", "--noheadings", disk)
    record_property("shown", f"group heal, wipefs: {len(numbers)} power cuts in {len(events)} writes: {dict(seen)}")
    assert {"there", "wiped"} <= seen.keys()


@pytest.mark.parametrize(("devid", "node_size", "written"), [(2, 16384, True), (0, 16384, False), (2, 1, True)])
def test_what_a_replace_has_begun_to_write_was_not_written_apart(
    trio: Host, disk: str, monkeypatch: pytest.MonkeyPatch, devid: int, node_size: int, written: bool
) -> None:
    """A power cut leaves it as device 0. What cannot be read may be anything."""
    sh("mkfs.btrfs", "-q", disk)
    with open(disk, "r+b") as file:
        for at, content in (0x94, node_size.to_bytes(4, "little")), (0xC9, devid.to_bytes(8, "little")):
            file.seek((64 << 10) + at)
            file.write(content)
    read = btrfs_layout.read_device
    monkeypatch.setattr(luks.Container, "activate", lambda *_, **__: None)
    monkeypatch.setattr(luks, "deactivate", lambda name: None)
    monkeypatch.setattr(btrfs_layout, "read_device", lambda node: read(disk))
    with luks.Container(str(trio.disks[0])) as container:
        assert heal_group._was_written(container, Secret(b""), Away("", "btrfs", 1)) == written


def test_killed_at_its_last_step_the_group_is_open_or_the_same_command_says_so(
    trio: Host, monkeypatch: pytest.MonkeyPatch, killer: Killer
) -> None:
    leave_out(trio, (1, "btrfs"))
    names = {each.uuid: each.name for each in trio.group.members}
    monkeypatch.setattr(devices, "active_mapping_name", names.get)
    saved = Saved(trio.paths.state)

    def begin(_: int) -> Callable[[], object]:
        saved.restore()
        this_boot.unmark(trio.paths, "open", "data")
        return lambda: heal_group._forget_that_they_were_away(trio.paths, "data", set(names))

    for _, killed in killer(begin):
        assert this_boot.open_groups(trio.paths).get("data") or (killed and trio.group.away)
