# SPDX-License-Identifier: Apache-2.0
"""What makes a file system smaller is found on a copy of its metadata; the disk gets it later, at once."""

import os
from pathlib import Path

import pytest

from tests.inplace import MIB, files_in, fill, sh
from unlock.disks import shrink
from unlock.errors import DiskFailed, Refused

SIZE, LESS = 200 * MIB, 168 * MIB


@pytest.mark.parametrize("block", [1024, 4096])
def test_the_changes_make_it_smaller_and_no_file_changes(tmp_path: Path, block: int) -> None:
    disk = tmp_path / "disk"
    with disk.open("wb") as file:
        file.truncate(SIZE)
    fill(str(disk), tmp_path, SIZE, block=block, files=40)
    expected = {each.name: each.read_bytes() for each in (tmp_path / "files").iterdir()}
    found = shrink.read_file_system(str(disk))
    assert (found.size, found.block) == (SIZE, block)
    shrink.check_ext(str(disk))
    before = disk.read_bytes()
    changes = shrink.plan_smaller_ext(str(disk), found, LESS, str(tmp_path / "scratch"))
    after = disk.read_bytes()
    assert [at for at in range(0, SIZE, block) if after[at : at + block] != before[at : at + block]] in (
        [],
        [1024 // block * block],
    )
    assert 0 < len(changes) < 200 and not (tmp_path / "scratch").exists()
    assert all(each.offset + len(each.content) <= LESS for each in changes)
    with disk.open("r+b") as file:
        for each in changes:
            file.seek(each.offset)
            file.write(each.content)
    assert shrink.read_file_system(str(disk)).size == LESS
    assert files_in(disk.read_bytes()[:LESS], tmp_path) == expected


def test_one_that_fits_is_not_changed(tmp_path: Path) -> None:
    disk = tmp_path / "disk"
    disk.touch()
    fill(str(disk), tmp_path, LESS)
    found = shrink.read_file_system(str(disk))
    assert shrink.plan_smaller_ext(str(disk), found, LESS, str(tmp_path / "scratch")) == []


def test_blocks_at_the_end_are_not_moved(tmp_path: Path) -> None:
    disk = tmp_path / "disk"
    disk.touch()
    fill(str(disk), tmp_path, SIZE, files=110)
    found = shrink.read_file_system(str(disk))
    with pytest.raises(Refused) as caught:
        shrink.plan_smaller_ext(str(disk), found, 100 * MIB, str(tmp_path / "scratch"))
    assert caught.value.code == "no-room"
    assert not list(tmp_path.glob("scratch*"))


@pytest.mark.parametrize(("size", "flags"), [(2060, []), (2060, ["-O", "^metadata_csum"]), (276, ["-t", "ext3"])])
def test_tables_of_an_empty_group_at_the_end_are_needed_until_it_is_smaller(
    tmp_path: Path, size: int, flags: list[str]
) -> None:
    """The disk may be mounted again, or checked, after a power cut: its end has another content by then."""
    disk = tmp_path / "disk"
    with disk.open("wb") as file:
        file.truncate(size * MIB)
    sh("mkfs.ext4", "-q", "-F", "-b", 4096, *flags, disk)
    found = shrink.read_file_system(str(disk))
    with pytest.raises(Refused, match="last 32 MiB"):
        shrink.check_end_is_free(str(disk), found, (size - 32) * MIB)
    shrink.check_end_is_free(str(disk), found, size * MIB)


@pytest.mark.parametrize("size", [150, 300, 1100, 2100])
def test_what_is_written_to_an_end_that_is_free_breaks_nothing(tmp_path: Path, size: int) -> None:
    disk = tmp_path / "disk"
    with disk.open("wb") as file:
        file.truncate(size * MIB)
    sh("mkfs.ext4", "-q", "-F", "-b", 4096, disk)
    shrink.check_end_is_free(str(disk), shrink.read_file_system(str(disk)), (size - 32) * MIB)
    with disk.open("r+b") as file:
        file.seek((size - 16) * MIB)
        file.write(os.urandom(16 * MIB))
    shrink.check_ext(str(disk))


def test_one_with_errors_is_left_to_a_person(tmp_path: Path) -> None:
    disk = tmp_path / "disk"
    disk.touch()
    fill(str(disk), tmp_path, LESS)
    found = shrink.read_file_system(str(disk))
    with disk.open("r+b") as file:
        file.seek(4096)
        file.write(bytes(4096))  # group descriptors
    with pytest.raises((Refused, DiskFailed)) as caught:
        shrink.plan_smaller_ext(str(disk), found, LESS - MIB, str(tmp_path / "scratch"))
    assert "e2fsck" in caught.value.hint
