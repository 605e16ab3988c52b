# SPDX-License-Identifier: Apache-2.0
"""A copy of the event-log baseline on the EFI partition, for the recovery shell: the root, which has the real one, is
not open there.

The partition is not encrypted, and anyone who has the disk can edit it. The copy has nothing but what was measured,
which is public. It is read, up to COPY_MAX bytes, for words on a screen alone; no policy ever depends on it.
"""

import os
from collections.abc import Iterator

from ..disks import devices, udev
from ..errors import CommandFailed
from ..paths import Paths, write_atomically
from ..run import run

COPY_MAX = 256 << 10
"""Bytes; an EFI partition is small."""
_PARTITIONS_MAX = 8
NAME = "EFI/unlock/baseline.json"
_IN_USE = ("efi", "boot/efi", "boot")
"""Where distributions mount it."""
_MOUNT = ("mount", "-t", "vfat", "-o", "ro,nosuid,nodev,noexec")


def write_copy(paths: Paths, data: bytes) -> str:
    """Replaces the copy on the mounted EFI partition. Returns its path, or '' when there is no place for it.

    For data that is too long it removes the old copy, which would describe another boot. Raises OSError.
    """
    for folder in (os.path.join(paths.root, each) for each in _IN_USE):
        if not os.path.isdir(os.path.join(folder, "EFI")) or not _is_fat(paths, folder):
            continue
        path = os.path.join(folder, NAME)
        if len(data) > COPY_MAX:
            if os.path.exists(path):
                os.unlink(path)
            return ""
        if read_copy_file(path) != data:
            write_atomically(path, data)
        return path
    return ""


def read_copies(paths: Paths) -> Iterator[bytes]:
    """Yields the copy on each EFI partition that has one. Nothing authenticates it."""
    folder = paths.of_this_boot("efi")
    for node in udev.efi_partitions()[:_PARTITIONS_MAX]:
        os.makedirs(folder, mode=0o700, exist_ok=True)
        try:
            run([*_MOUNT, node, folder], timeout=10)
        except CommandFailed:
            continue
        data = read_copy_file(os.path.join(folder, NAME))
        try:
            run(["umount", folder], timeout=10)
        except CommandFailed:
            pass
        if data:
            yield data


def _is_fat(paths: Paths, folder: str) -> bool:
    """Whether the folder is on a FAT file system: a directory of the encrypted root is of no use."""
    return devices.mount_type(os.path.join("/", os.path.relpath(folder, paths.root)), paths.root) == "vfat"


def read_copy_file(path: str) -> bytes:
    """At most COPY_MAX bytes of a regular file; b"" when it is longer, or cannot be read."""
    try:
        with open(os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC), "rb") as file:
            data = file.read(COPY_MAX + 1)
    except OSError:
        return b""
    return data if len(data) <= COPY_MAX else b""
