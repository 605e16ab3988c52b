# SPDX-License-Identifier: Apache-2.0
"""Finds what passes for a part of a group: another block device with the UUID of a file system, PV or RAID member that
lies on the group's mappings, and what is mounted from it.

The kernel, LVM and mount(8) go by UUIDs, which anyone can copy. Where a group's mount unit is ours, boot.mount looks at
every device before the mount is seen. Here are the others: what fstab mounts, and volume groups.
"""

import os
from collections.abc import Iterable
from typing import NamedTuple

from ..errors import DiskFailed
from . import devices, udev

_LVM = "LVM2_member"


class Copy(NamedTuple):
    """A device that has the UUID of a group's mapping, and is none of them."""

    node: str
    kind: str
    """As udev.FileSystem.kind."""
    in_use: bool
    """Another device is made of it: a logical volume, for one."""


def find_copies(names: Iterable[str]) -> list[Copy]:
    """The copies of what lies on these mappings, without the mappings themselves, in order of their nodes."""
    nodes = {os.path.realpath(f"/dev/mapper/{name}") for name in names}
    found = set()
    for system in filter(None, map(_file_system, sorted(nodes))):
        for disk in udev.disks_with_uuid(system.uuid) if system.uuid else ():
            if disk.node not in nodes:
                found.add(Copy(disk.node, system.kind, devices.has_holders(disk.number)))
    return sorted(found)


def find_active_volumes(names: Iterable[str]) -> list[Copy]:
    """Those of the copies that are physical volumes of an active volume group: LVM would give their logical volumes in
    place of the group's."""
    return [each for each in find_copies(names) if each.kind == _LVM and each.in_use]


def mounts_of_copies(names: Iterable[str]) -> dict[str, list[str]]:
    """Mount point -> nodes of copies below what is mounted there."""
    copies = {each.node for each in find_copies(names)}
    found = {}
    for where in devices.mount_points() if copies else ():
        if below := copies & devices.nodes_below(where):
            found[where] = sorted(below)
    return found


def _file_system(node: str) -> udev.FileSystem | None:
    try:
        return udev.file_system(node)
    except DiskFailed:
        return None
