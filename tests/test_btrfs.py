# SPDX-License-Identifier: Apache-2.0
"""What a mounted btrfs says of its devices, and their moves. A real one, on loop devices."""

import os
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.test_members import Loops, loops, mounted, sh
from unlock.disks import btrfs
from unlock.errors import CommandFailed, Refused
from unlock.operations import remove_disk

pytestmark = pytest.mark.root

__all__ = ["loops", "mounted"]

SIZE = 256 << 20
CONTENT = os.urandom(24 << 20)


@pytest.fixture
def disks(loops: Loops) -> list[str]:
    return loops(4, SIZE)


@pytest.fixture
def where(disks: list[str], mounted: Callable[..., Path]) -> str:
    """A raid1 of the first two."""
    sh("mkfs.btrfs", "-q", "-d", "raid1", "-m", "raid1", *disks[:2])
    path = mounted(disks[0])
    (path / "file").write_bytes(CONTENT)
    sh("sync", "-f", path)
    return str(path)


def nodes(where: str) -> list[str]:
    return [each.node for each in btrfs.read_devices(where)]


def intact(where: str) -> bool:
    sh("btrfs", "scrub", "start", "-B", where)
    return (Path(where) / "file").read_bytes() == CONTENT


def test_devices_and_space_are_what_btrfs_progs_say(where: str, disks: list[str]) -> None:
    first, second = btrfs.read_devices(where)
    assert (first.devid, first.node, second.node) == (1, *disks[:2])
    said = sh("btrfs", "device", "usage", "-b", where)
    assert f"Device size: {first.size}" in " ".join(said.split())
    unallocated = next(line.split()[1] for line in said.splitlines() if "Unallocated" in line)
    assert first.size - first.used == int(unallocated)
    space = {(each.kind, each.profile) for each in btrfs.read_space(where)}
    assert space == {(kind, "raid1") for kind in ("data", "metadata", "system")}
    assert next(each.used for each in btrfs.read_space(where) if each.kind == "data") >= len(CONTENT)
    assert btrfs.running_operation(where) == ""
    assert btrfs.read_replace(where) == ("never", 0)


def test_a_directory_of_another_file_system_is_told(tmp_path: Path) -> None:
    with pytest.raises(CommandFailed, match="btrfs does not answer"):
        btrfs.read_devices(str(tmp_path))


def test_a_device_comes_and_another_goes_with_its_data_moved(where: str, disks: list[str]) -> None:
    told: list[tuple[int, int]] = []
    btrfs.add_device(where, disks[2])
    assert nodes(where) == disks[:3]
    assert btrfs.remove_device(where, disks[0], lambda *each: told.__iadd__([each]) == [])
    assert nodes(where) == disks[1:3]
    assert all(0 <= done <= total for done, total in told)
    assert intact(where)


def test_a_new_device_takes_the_place_of_another(where: str, disks: list[str]) -> None:
    assert btrfs.replace_device(where, 1, disks[3], lambda *_: False)
    assert sorted(nodes(where)) == sorted([disks[1], disks[3]])
    assert btrfs.read_replace(where).state == "finished"
    assert intact(where)


def test_a_missing_device_is_told_and_replaced(where: str, disks: list[str], mounted: Callable[..., Path]) -> None:
    sh("umount", where)
    sh("btrfs", "device", "scan", "--forget", disks[1])
    sh("wipefs", "--all", disks[1])
    sh("mount", "-o", "degraded", disks[0], where)
    assert [(each.devid, bool(each.node)) for each in btrfs.read_devices(where)] == [(1, True), (2, False)]
    assert btrfs.replace_device(where, 2, disks[2], lambda *_: False)
    assert sorted(nodes(where)) == sorted([disks[0], disks[2]])
    assert intact(where)


def test_what_btrfs_could_not_give_up_is_refused_before_it_is_asked(where: str, disks: list[str]) -> None:
    def refused(node: str) -> str:
        with pytest.raises(Refused) as caught:
            remove_disk._check_btrfs(where, node)
        assert caught.value.hint
        return caught.value.code

    assert refused(disks[0]) == "too-few-disks"
    btrfs.add_device(where, disks[2])
    remove_disk._check_btrfs(where, disks[0])
    (Path(where) / "more").write_bytes(os.urandom(140 << 20))
    sh("sync", "-f", where)
    assert refused(disks[0]) == "no-space"
    (Path(where) / "more").unlink()
    sh("sync", "-f", where)
    sh("btrfs", "balance", "start", "-dusage=80", where)
    remove_disk._check_btrfs(where, disks[0])
    assert btrfs.remove_device(where, disks[0], lambda *_: False)
    assert intact(where)


def test_what_btrfs_refuses_is_told_in_its_words(where: str, disks: list[str]) -> None:
    with pytest.raises(CommandFailed, match=r"btrfs device remove: .*two devices"):
        btrfs.remove_device(where, disks[1], lambda *_: False)
    with pytest.raises(CommandFailed, match="btrfs replace start"):
        btrfs.replace_device(where, 7, disks[2], lambda *_: False)
    assert nodes(where) == disks[:2]


def test_a_move_that_is_stopped_leaves_the_device_and_goes_on(
    where: str, disks: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Stopped at the first look, unless it was through before."""
    monkeypatch.setattr(btrfs, "POLL", 0.005)
    btrfs.add_device(where, disks[2])
    assert not btrfs.remove_device(where, disks[0], lambda *_: True)
    assert nodes(where) == disks[:3]
    assert btrfs.remove_device(where, disks[0], lambda *_: False)
    assert nodes(where) == disks[1:3]
    devid = btrfs.read_devices(where)[0].devid
    assert not btrfs.replace_device(where, devid, disks[3], lambda *_: True)
    assert btrfs.replace_device(where, devid, disks[3], lambda *_: False), "the kernel went on, or it is begun again"
    assert disks[3] in nodes(where) and btrfs.running_operation(where) == ""
    assert intact(where)
