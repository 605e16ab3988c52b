# SPDX-License-Identifier: Apache-2.0
"""Makes the file system on a disk smaller, so that a power cut leaves the old one or the new one.

ext2 to ext4: resize2fs writes in no order that a power cut respects, and e2fsck does not always mend what is left. So
it gets a copy of the metadata, in a sparse file, and what it changes there is returned: disks.encrypt writes it when
there is no superblock any more, and again after a cut. The end of the file system must be free: the copy has no data.

btrfs moves its blocks by copy on write: it is made smaller where it is, mounted at a place of its own.
"""

import errno
import os
import re
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import NamedTuple

from ..errors import CommandFailed, DiskFailed, Refused
from ..run import ENVIRONMENT, run
from . import devices

EXT = ("ext2", "ext3", "ext4")
_CHANGES_MAX = 64 << 20
"""Bytes."""


class FileSystem(NamedTuple):
    """What lies on a disk, in clear."""

    kind: str
    uuid: str
    size: int
    """Bytes."""
    block: int
    """Bytes of its smallest unit."""


def read_file_system(node: str) -> FileSystem:
    """Raises Refused for what cannot be made smaller, with what to do instead; CommandFailed."""
    kinds = [each for each in devices.list_signatures(node).split(", ") if each and not each.startswith("label ")]
    if len(kinds) != 1:
        what = f"holds {', '.join(kinds)}" if kinds else "holds no file system"
        raise Refused(f"{node} {what}", "unlock group create, if nothing on it is needed", "file-system")
    if kinds[0] in EXT:
        return _read_ext(node, kinds[0])
    if kinds[0] == "btrfs":
        return _read_btrfs(node)
    raise Refused(
        f"{node} holds {kinds[0]}, which cannot be made smaller, and the header needs room",
        "unlock group create NAME --disk OTHER --mount DIR; copy the data there",
        "file-system",
    )


def file_system_uuid(node: str) -> str:
    """Of any file system, mounted or not; '' for none."""
    try:
        return run(["blkid", "--probe", "--output", "value", "--match-tag", "UUID", node]).strip()
    except CommandFailed:
        return ""


def _read_ext(node: str, kind: str) -> FileSystem:
    fields = dict(_colons(run(["dumpe2fs", "-h", node])))
    if "needs_recovery" in fields.get("Filesystem features", ""):
        raise Refused(f"{node} was not unmounted cleanly", f"e2fsck -f {node}", "file-system")
    if "journal_dev" in fields.get("Filesystem features", "") or "Journal device" in fields:
        raise Refused(
            f"the {kind} on {node} has its journal on another device", "tune2fs -O ^has_journal; -j", "file-system"
        )
    try:
        block = int(fields["Block size"])
        return FileSystem(kind, fields["Filesystem UUID"], int(fields["Block count"]) * block, block)
    except (KeyError, ValueError) as error:
        raise DiskFailed(f"{node}: dumpe2fs does not tell its size") from error


def _read_btrfs(node: str) -> FileSystem:
    lines = run(["btrfs", "inspect-internal", "dump-super", node]).splitlines()
    fields = {words[0]: words[1] for words in (line.split() for line in lines) if len(words) > 1}
    if fields.get("num_devices") != "1":
        raise Refused(
            f"the btrfs on {node} lies on {fields.get('num_devices')} disks",
            "unlock group create with other disks; copy the data there",
            "file-system",
        )
    try:
        return FileSystem("btrfs", fields["fsid"], int(fields["dev_item.total_bytes"]), int(fields["sectorsize"]))
    except (KeyError, ValueError) as error:
        raise DiskFailed(f"{node}: btrfs does not tell its size") from error


def _colons(text: str) -> Iterator[tuple[str, str]]:
    for line in text.splitlines():
        name, _, value = line.partition(":")
        yield name.strip(), value.strip()


def check_end_is_free(node: str, found: FileSystem, size: int) -> None:
    """Raises Refused when blocks of the file system lie behind `size`, and making it smaller would have to move them in
    a way that a power cut would ruin; CommandFailed."""
    if found.kind in EXT and found.size > size and not _is_free(run(["dumpe2fs", node]), size // found.block):
        raise Refused(
            f"the {found.kind} on {node} has blocks in its last {(found.size - size) >> 20} MiB, and a power cut "
            "could ruin it while resize2fs moves them",
            f"with a backup: e2fsck -f {node} && resize2fs {node} {size >> 10}K",
            "no-room",
        )


class Change(NamedTuple):
    """A part of the disk that another content replaces."""

    offset: int
    content: bytes


def plan_smaller_ext(node: str, found: FileSystem, size: int, scratch: str) -> list[Change]:
    """What makes the file system fit into `size` bytes; nothing is written to the disk but by a check, which mends what
    is safe. `scratch`: begin of the names of files that are made and removed. Raises CommandFailed, DiskFailed,
    Refused, OSError."""
    check_ext(node)
    if found.size <= size:
        return []
    check_end_is_free(node, found, size)
    copies = f"{scratch}.before", f"{scratch}.after"
    try:
        for each in copies:
            run(["e2image", "-r", node, each], timeout=24 * 3600)
        before, after = copies
        if _differences(before, after, found.block, size):
            raise DiskFailed(f"{node}: two copies of its metadata are not the same", "lsblk")
        run(["resize2fs", after, f"{size >> 10}K"], timeout=24 * 3600)
        run(["e2fsck", "-f", "-n", after], timeout=24 * 3600)
        if _read_ext(after, found.kind).size > size:
            raise DiskFailed(f"{node}: resize2fs does not make its file system smaller")
        return _differences(before, after, found.block, size)
    finally:
        for each in copies:
            with suppress(FileNotFoundError):
                os.unlink(each)


def _differences(before: str, after: str, block: int, size: int) -> list[Change]:
    """The blocks that one sparse file has other than another, below `size`. Raises OSError, DiskFailed for too much."""
    found: dict[int, Change] = {}
    with open(before, "rb") as old, open(after, "rb") as new:
        for start, end in {*_data_of(old.fileno(), size), *_data_of(new.fileno(), size)}:
            for at in range(start // block * block, end, block):
                content = os.pread(new.fileno(), block, at).ljust(block, b"\0")
                if content != os.pread(old.fileno(), block, at).ljust(block, b"\0"):
                    found[at] = Change(at, content)
            if len(found) * block > _CHANGES_MAX:
                raise DiskFailed(f"{before}: too much of the metadata would change")
    return [found[at] for at in sorted(found)]


def _data_of(file: int, size: int) -> Iterator[tuple[int, int]]:
    """The parts of a sparse file that are no holes, below `size`."""
    end = 0
    while end < size:
        try:
            start = os.lseek(file, end, os.SEEK_DATA)
        except OSError as error:
            if error.errno == errno.ENXIO:  # no more data
                return
            raise
        end = os.lseek(file, start, os.SEEK_HOLE)
        if start < size:
            yield start, min(end, size)


def shrink_btrfs(node: str, found: FileSystem, size: int, mount_point: str) -> None:
    """Makes it fit into `size` bytes; does nothing where it does. May be killed and repeated. `mount_point`: a folder
    of ours. Raises CommandFailed, DiskFailed."""
    if found.size > size:
        with _mounted(node, mount_point) as where:
            run(["btrfs", "filesystem", "resize", str(size), where], timeout=24 * 3600)
        if read_file_system(node).size > size:
            raise DiskFailed(f"{node}: its file system is not smaller than before")


def check_ext(node: str) -> None:
    """A full check, which mends what is safe. Raises Refused for what is not."""
    done = subprocess.run(["e2fsck", "-f", "-p", node], capture_output=True, env=ENVIRONMENT)
    if done.returncode not in (0, 1):
        raise Refused(f"{node}: its file system has errors that need a person", f"e2fsck -f {node}", "file-system")


@contextmanager
def _mounted(node: str, where: str) -> Iterator[str]:
    os.makedirs(where, mode=0o700, exist_ok=True)
    run(["mount", "-t", "btrfs", "-o", "noatime,nosuid,nodev,noexec", node, where])
    try:
        yield where
    finally:
        run(["umount", where])
        with suppress(OSError):
            os.rmdir(where)


# dumpe2fs


_GROUP = re.compile(r"Group \d+: \(Blocks (\d+)-(\d+)\)")
_RANGE = re.compile(r"(\d+)(?:-(\d+))?")


def _is_free(dump: str, first: int) -> bool:
    """Whether from block `first` on nothing lies but free blocks and copies of the superblock and group descriptors.
    Not where a group has its tables there, though it be empty: they are needed until the file system is smaller."""
    groups = re.split(r"(?m)^(?=Group \d+: )", dump)[1:]
    return bool(groups) and all(_group_is_free(each, first) for each in groups)


def _group_is_free(text: str, first: int) -> bool:
    bounds = _GROUP.match(text)
    if not bounds or _own_tables_end(text) >= first:
        return False
    start, end = max(int(bounds[1]), first), int(bounds[2])
    free = list(_ranges(text, "Free blocks: "))
    free += [part for name in ("Backup superblock at ", "Group descriptors at ", "Reserved GDT blocks at ")
             for part in _ranges(text, name)]  # fmt: skip
    at = start
    for low, high in sorted(free):
        if low <= at <= high:
            at = high + 1
    return at > end


_TABLES = ("Block bitmap at ", "Inode bitmap at ", "Inode table at ")


def _own_tables_end(text: str) -> int:
    """The last block of the group's own tables, which may lie in an earlier group."""
    return max((high for name in _TABLES for _, high in _ranges(text, name)), default=0)


def _ranges(text: str, name: str) -> Iterator[tuple[int, int]]:
    """The blocks after this name: `1-3, 7`, or one of them."""
    for line in re.findall(rf"{re.escape(name)}([0-9, -]+)", text):
        for low, high in _RANGE.findall(line if name == "Free blocks: " else line.split(",")[0]):
            yield int(low), int(high or low)
