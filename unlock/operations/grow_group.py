# SPDX-License-Identifier: Apache-2.0
"""`unlock group grow`: a disk has become larger; its mapping and the file system on it follow.

    each disk: dm-crypt resized ──> file system resized

No header is written, and each step does nothing where it was done: killed, the same command finishes without a journal.
"""

from typing import NamedTuple

from ..disks import btrfs, devices, ext4, find, luks, udev
from ..disks.groups import Group, Member
from ..errors import Refused
from ..host.lock import exclusive
from ..keys import access
from ..paths import Paths
from ..run import run
from . import group_disks, membership
from .consent import Consent, Plan, agree

_SECTOR = 4096
"""Bytes: no file system uses less than this at the end of a disk."""


class Grown(NamedTuple):
    """One disk of the group."""

    name: str
    before: int
    after: int
    """Bytes of its mapping."""


class Result(NamedTuple):
    """What `group grow` did."""

    disks: tuple[Grown, ...]
    next: str
    """What to type next; ''."""


def grow_group(paths: Paths, name: str, *, consent: Consent = agree, look: find.Look = find.look) -> Result | None:
    """Returns None when the plan was only to be shown. Raises Usage, Refused, DiskFailed, CommandFailed."""
    with exclusive(paths), access.Work(paths, look) as work:
        group = group_disks.find_group(work.state, name)
        seen = work.look()
        nodes = {each.uuid: membership.member_node(seen, each) for each in group.members}
        system = group_disks.find_file_system(group)
        disks = [_measure(each, nodes[each.uuid]) for each in group.members]
        steps = [
            f"make /dev/mapper/{each.name} larger: {each.before} to {each.after} bytes"
            for each in disks
            if each.after > each.before
        ]
        steps += _file_system_steps(group, system, disks)
        if not consent(Plan(tuple(steps) or ("nothing: no disk has become larger",))):
            return None
        for member, each in zip(group.members, disks, strict=True):
            if each.after > each.before:
                node = nodes[member.uuid]
                with luks.Container(node) as container, access.find_volume_key(work, container, group) as dek:
                    container.resize(member.name, dek)
        for member in group.members:
            _grow_file_system(system, member)
        return Result(tuple(disks), _next(system, group))


def _measure(member: Member, node: str) -> Grown:
    """The size that the mapping has, and the one that it can have. Raises Refused, DiskFailed."""
    size = udev.find_disk(f"/dev/mapper/{member.name}").size
    with luks.Container(node) as container:
        segments = list(container.facts()["segments"].values())
        if len(segments) != 1 or segments[0].get("size") != "dynamic":
            raise Refused(
                f"{member.name} has a fixed size in its header, not that of its disk",
                f"cryptsetup luksDump {node}",
                "fixed-size",
            )
        sector = int(segments[0]["sector_size"])
        room = (container.disk_size - int(segments[0]["offset"])) // sector * sector
    if room < size:
        raise Refused(f"{node} has become smaller than its mapping {member.name}", f"lsblk --bytes {node}", "smaller")
    return Grown(member.name, size, room)


def _file_system_steps(group: Group, system: group_disks.FileSystem, disks: list[Grown]) -> list[str]:
    """What is told of the file system: a mapping that a boot opened has the size of its disk already. Raises Refused
    where it cannot be made larger now."""
    if system.kind == "btrfs":
        where = group_disks.mounted_btrfs(group, system)
        group_disks.refuse_busy(where)
        devices_now = {each.name: btrfs.find_device(where, f"/dev/mapper/{each.name}") for each in disks}
        smaller = [each for each in disks if (now := devices_now[each.name]) and now.size + _SECTOR <= each.after]
        return [f"make the btrfs on {where} larger"] if smaller else []
    found = []
    for each in group.members if system.kind in ("ext4", "xfs") else ():
        where = _mount_of(each)
        if not where:
            words = f"the {system.kind} on {each.name} is not mounted"
            raise Refused(words, f"unlock open {group.name}", "not-mounted")
        found.append(f"make the {system.kind} on {where} as large as its mapping")
    return found


def _mount_of(member: Member) -> str:
    return next(iter(devices.mount_points_on({member.name})), "")


def _grow_file_system(system: group_disks.FileSystem, member: Member) -> None:
    """Raises CommandFailed."""
    node = f"/dev/mapper/{member.name}"
    if system.kind == "btrfs":
        device = btrfs.find_device(system.mount, node)
        if device and device.size + _SECTOR <= udev.find_disk(node).size:
            btrfs.resize(system.mount, device.devid)
    elif system.kind == "ext4":
        ext4.grow(_mount_of(member), udev.find_disk(node).size)
    elif system.kind == "xfs":
        run(["xfs_growfs", _mount_of(member)])


def _next(system: group_disks.FileSystem, group: Group) -> str:
    nodes = " ".join(f"/dev/mapper/{each.name}" for each in group.members)
    if system.kind == "LVM2_member":
        return f"pvresize {nodes}"
    if system.kind == "linux_raid_member":
        return "mdadm --grow /dev/mdX --size=max"
    return "" if system.kind in ("btrfs", "ext4", "xfs") else f"make what lies on {nodes} larger"
