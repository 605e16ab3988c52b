# SPDX-License-Identifier: Apache-2.0
"""Tells the kernel which devices belong to a btrfs across disks, and asks it about a mounted one: ioctls of
linux/btrfs.h."""

import errno
import fcntl
import os
import struct

from . import udev

_SCAN, _FORGET = 0x50009404, 0x50009405
"""BTRFS_IOC_SCAN_DEV, BTRFS_IOC_FORGET_DEV. Their argument is a signed 64-bit fd and a name of 4088 bytes."""


_FS_INFO, _DEV_INFO, _SPACE_INFO = 0x8400941F, 0xD000941E, 0xC0109414
"""BTRFS_IOC_FS_INFO, BTRFS_IOC_DEV_INFO, BTRFS_IOC_SPACE_INFO."""
_PROFILE_BITS = {
    1 << 4: "raid1",
    1 << 6: "raid10",
    1 << 7: "raid5",
    1 << 8: "raid6",
    1 << 9: "raid1c3",
    1 << 10: "raid1c4",
}
"""Bit of a block group's type -> a profile that can lose a device."""
_GLOBAL_RESERVE = 1 << 49
"""Bit of what is no block group: BTRFS_SPACE_INFO_GLOBAL_RSV."""


def forget(node: str) -> None:
    """Makes the kernel forget that a device belongs to a btrfs. Does nothing if the file system is mounted."""
    try:
        _control(_FORGET, node)
    except OSError:
        pass


def forget_copies(members: list[str]) -> None:
    """Makes the kernel forget every device that has the UUID of a btrfs on these members and is none of them.

    Then it scans the members again, as the kernel may have registered a copy instead of one. Best effort.
    """
    ours = {os.path.realpath(each) for each in members}
    systems = [udev.file_system(each) for each in members]
    uuids = {each.uuid for each in systems if each.kind == "btrfs"}
    copies = {disk.node for uuid in uuids for disk in udev.disks_with_uuid(uuid)} - ours
    for node in copies:
        forget(node)
    for node in members if copies else ():
        try:
            _control(_SCAN, node)
        except OSError:
            pass


def missing_devids(mount_point: str, here: set[str]) -> list[int]:
    """The ids of devices of a mounted btrfs that are not among the nodes `here`. Raises OSError."""
    found = []
    fd = os.open(mount_point, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        answer = bytearray(1024)
        fcntl.ioctl(fd, _FS_INFO, answer)
        for devid in range(1, int.from_bytes(answer[:8], "little") + 1):
            info = bytearray(4096)
            info[:8] = devid.to_bytes(8, "little")
            try:
                fcntl.ioctl(fd, _DEV_INFO, info)
            except OSError as error:
                if error.errno != errno.ENODEV:
                    raise
                continue
            if os.path.realpath(os.fsdecode(bytes(info[3072:]).partition(b"\0")[0]) or "/") not in here:
                found.append(devid)
    finally:
        os.close(fd)
    return found


def mixed_profiles(mount_point: str) -> dict[str, str]:
    """Of a mounted btrfs: `d` for data or `m` for metadata -> the profile that can lose a device, where some chunks of
    that kind have another one. Raises OSError."""
    profiles: dict[str, set[str]] = {}
    fd = os.open(mount_point, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        answer = bytearray(struct.pack("<QQ", 100, 0) + bytes(100 * 24))
        fcntl.ioctl(fd, _SPACE_INFO, answer)
    finally:
        os.close(fd)
    for at in range(min(100, int.from_bytes(answer[8:16], "little"))):
        kind, size, _ = struct.unpack_from("<QQQ", answer, 16 + at * 24)
        if size and not kind & _GLOBAL_RESERVE:
            profile = next((name for bit, name in _PROFILE_BITS.items() if kind & bit), "")
            profiles.setdefault("d" if kind & 1 else "m", set()).add(profile)
    return {letter: max(names) for letter, names in profiles.items() if len(names) > 1}


def _control(request: int, node: str) -> None:
    fd = os.open("/dev/btrfs-control", os.O_RDWR | os.O_CLOEXEC)
    try:
        fcntl.ioctl(fd, request, bytearray(struct.pack("<q4088s", 0, node.encode())))
    finally:
        os.close(fd)
