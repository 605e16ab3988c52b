# SPDX-License-Identifier: Apache-2.0
"""What the kernel knows of a btrfs across disks: ioctls of linux/btrfs.h."""

import fcntl
import os
import struct

from . import udev

_SCAN, _FORGET = 0x50009404, 0x50009405
"""BTRFS_IOC_SCAN_DEV, BTRFS_IOC_FORGET_DEV. Their argument is a signed 64-bit fd and a name of 4088 bytes."""


def forget(node: str) -> None:
    """The kernel does not count this device to any btrfs any more. Nothing happens to one that is mounted."""
    try:
        _control(_FORGET, node)
    except OSError:
        pass


def forget_copies(members: list[str]) -> None:
    """Devices that carry the UUID of a btrfs of these members, and are none of them, are forgotten; then the members
    are told to the kernel again, as it may have held a copy for one of them. Best effort."""
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


def _control(request: int, node: str) -> None:
    fd = os.open("/dev/btrfs-control", os.O_RDWR | os.O_CLOEXEC)
    try:
        fcntl.ioctl(fd, request, bytearray(struct.pack("<q4088s", 0, node.encode())))
    finally:
        os.close(fd)
