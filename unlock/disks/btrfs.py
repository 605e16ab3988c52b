# SPDX-License-Identifier: Apache-2.0
"""Tells the kernel which devices belong to a btrfs across disks: ioctls of linux/btrfs.h."""

import fcntl
import os
import struct

from . import udev

_SCAN, _FORGET = 0x50009404, 0x50009405
"""BTRFS_IOC_SCAN_DEV, BTRFS_IOC_FORGET_DEV. Their argument is a signed 64-bit fd and a name of 4088 bytes."""


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


def _control(request: int, node: str) -> None:
    fd = os.open("/dev/btrfs-control", os.O_RDWR | os.O_CLOEXEC)
    try:
        fcntl.ioctl(fd, request, bytearray(struct.pack("<q4088s", 0, node.encode())))
    finally:
        os.close(fd)
