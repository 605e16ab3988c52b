# SPDX-License-Identifier: Apache-2.0
"""What `disk add`, `disk remove`, `disk replace` and `group grow` ask first: which member a person means, what lies on
the disks of a group, whether a disk may become a member. Then: how such a disk is formatted.
"""

import os
from collections.abc import Iterable
from contextlib import suppress
from typing import NamedTuple

from ..disks import btrfs, devices, disk_keys, luks, token, udev
from ..disks.groups import Group, Member
from ..errors import CommandFailed, Refused, UnlockError, Usage
from ..host import this_boot, units
from ..host.state import State
from ..paths import Paths
from ..run import run
from ..secret import Secret
from . import membership

SMALLEST = 128 << 20
"""Bytes of the smallest disk that is added: the header, and a little that btrfs can use."""
ON_ONE_DISK = frozenset(("ext2", "ext3", "ext4", "jfs", "reiserfs", "swap", "xfs"))
"""What lies on one device, by its name for blkid and mount."""


def find_group(state: State, name: str) -> Group:
    """Raises Usage."""
    if name not in state.groups:
        raise Usage(f"there is no group {name}", "unlock status")
    return state.groups[name]


def find_member(state: State, text: str) -> tuple[Group, Member]:
    """The member that a person names, as `membership.member_named`. Raises Refused."""
    found = membership.member_named(state, text)
    if not found:
        raise membership.not_a_member(text)
    return found


def refuse_root(group: Group, hint: str) -> None:
    """Raises Refused for a group that holds what a boot needs before it opens groups: the initramfs and crypttab know
    its disks too."""
    names = {each.name for each in group.members}
    where = ["/"] if names & devices.mappings_below("/") else []
    where += [each for name in names for each in membership.mounts_needed_before_groups(name)]
    if where:
        raise Refused(f"group {group.name} holds {where[0]}, which a boot needs first", hint, "root-needs")


# What lies on the disks of a group


class FileSystem(NamedTuple):
    """What lies on the disks of a group."""

    kind: str
    """As wipefs names it: `btrfs`, `ext4`, `LVM2_member` ...; '' for nothing that it knows."""
    mount: str
    """Where a btrfs of the group is mounted; ''."""


def find_file_system(group: Group) -> FileSystem:
    """Raises Refused when a member is not open, or when the members hold several."""
    kinds: dict[str, str] = {}
    for each in group.members:
        if devices.active_mapping_name(each.uuid) != each.name:
            raise Refused(f"{each.name} of group {group.name} is not open", f"unlock open {group.name}", "not-open")
        kinds[each.name] = kind_on(each.name)
    found = sorted(set(kinds.values()))
    if len(found) > 1:
        words = ", ".join(f"{name}: {kind or 'nothing'}" for name, kind in kinds.items())
        raise Refused(f"the disks of group {group.name} hold several things ({words})", "lsblk --fs", "several")
    if found == ["btrfs"]:
        mounts = btrfs_mounts({each.name for each in group.members})
        if len({tuple(sorted(each.node for each in btrfs.read_devices(where))) for where in mounts}) > 1:
            raise Refused(f"group {group.name} holds several btrfs", "lsblk --fs", "several")
        return FileSystem("btrfs", mounts[0] if mounts else "")
    return FileSystem(found[0] if found else "", "")


def kind_on(mapping: str) -> str:
    """What wipefs finds on a mapping; '' for nothing. Raises CommandFailed."""
    return devices.list_signatures(f"/dev/mapper/{mapping}").partition(",")[0]


def btrfs_mounts(names: set[str]) -> list[str]:
    """Where a btrfs is mounted that lies on these mappings themselves."""
    nodes = {os.path.realpath(f"/dev/mapper/{name}") for name in names}
    found = []
    for where in devices.mount_points_on(names):
        if devices.mount_type(where) == "btrfs":
            with suppress(CommandFailed):
                if nodes & {os.path.realpath(each.node) for each in btrfs.read_devices(where) if each.node}:
                    found.append(where)
    return found


def mounted_btrfs(group: Group, system: FileSystem) -> str:
    """Where the group's btrfs is mounted. Raises Refused."""
    if not system.mount:
        raise Refused(f"the btrfs of group {group.name} is not mounted", f"unlock open {group.name}", "not-mounted")
    return system.mount


def refuse_busy(mount: str, *allowed: str) -> None:
    """Raises Refused while btrfs does something that excludes a move, other than what is `allowed`."""
    running = btrfs.running_operation(mount)
    if running and running not in allowed:
        hint = f"btrfs balance status {mount}" if "balance" in running else "wait for its end"
        raise Refused(f"btrfs on {mount} is busy: {running}", hint, "busy")


def hold_mount(paths: Paths, name: str) -> None:
    """systemd is not to unmount a btrfs while a disk leaves it that it was mounted by: see the udev rule."""
    this_boot.mark(paths, "leaving", name)


def let_close(paths: Paths) -> None:
    """systemd sees by which disk a btrfs is mounted now, so that the one before can be closed. Raises CommandFailed."""
    if units.is_systemd_running() and paths.root == "/":
        run(["systemctl", "daemon-reload"])


# A disk that is to become a member


def check_new_disk(state: State, node: str, erase: Iterable[str], *, least: int, begun: Member | None) -> str:
    """What the disk holds and will lose, in words; ''. `begun`: the member that an earlier run has begun to make of it.
    Raises Usage, Refused, DiskFailed."""
    named = {os.path.realpath(each) for each in erase}
    if not named <= {node}:
        raise Usage("--erase names the new disk alone", f"--erase {node}")
    disk = udev.find_disk(node)
    if begun and disk.serial != begun.serial:
        raise Refused(
            f"{node} is not the disk that this was begun with (serial {begun.serial or 'unknown'})",
            "name the same disk, by /dev/disk/by-id",
            code="unfinished",
        )
    if begun and is_half_made(node, begun):
        return ""
    _refuse_member(state, node)
    if used := devices.describe_use(node):
        raise Refused(f"{node} is in use: {used}", "lsblk", code="in-use")
    if disk.size < least:
        raise Refused(f"{node} has {disk.size} bytes, and {least} are needed", "a larger disk", code="too-small")
    content = devices.list_signatures(node)
    if content and _is_of_another_host(node, state.host):
        content = f"{content}, a disk of another host that has unlock"
    if content and node not in named:
        raise Refused(f"{node} holds {content}", f"--erase {node} if it may go", code="has-data")
    return content


def _refuse_member(state: State, node: str) -> None:
    """Raises Refused."""
    uuid = ""
    with suppress(UnlockError), luks.Container(node) as container:
        uuid = container.uuid
    for group in state.groups.values():
        if any(each.uuid == uuid for each in group.members):
            raise Refused(f"{node} is in group {group.name} already", "unlock status", code="member")


def _is_of_another_host(node: str, host: str) -> bool:
    with suppress(UnlockError), luks.Container(node) as container:
        return any(fields.get("host") != host for _, fields in container.tokens(token.TYPE))
    return False


def is_half_made(node: str, member: Member) -> bool:
    """Whether the disk has the LUKS UUID of this member."""
    with suppress(UnlockError), luks.Container(node) as container:
        return container.uuid == member.uuid
    return False


def common_flags(nodes: Iterable[str]) -> frozenset[str]:
    """The flags that the headers of all these disks have. Raises DiskFailed and others."""
    found: frozenset[str] | None = None
    for node in nodes:
        with luks.Container(node) as container:
            found = container.flags if found is None else found & container.flags
    return found or frozenset()


def format_member(node: str, member: Member, recovery: Secret, flags: frozenset[str]) -> Secret:
    """A fresh header with the recovery keyslot and these flags; the volume key. A header that an earlier run has
    finished stays: other disks may rely on it. Raises DiskFailed, CommandFailed, NotOurs."""
    if is_half_made(node, member):
        with luks.Container(node) as container:
            if container.keyslots():
                dek = disk_keys.dek_by_recovery_key(container, recovery)
                if not flags <= container.flags:
                    container.set_flags(container.flags | flags)
                return dek
    run(["wipefs", "--all", "--quiet", node])
    dek = Secret.random(64)
    try:
        with luks.format(node, dek, uuid=member.uuid) as container:
            if flags:
                container.set_flags(flags)
            container.add_keyslot(dek, passphrase=recovery)
    except BaseException:
        dek.wipe()
        raise
    return dek
