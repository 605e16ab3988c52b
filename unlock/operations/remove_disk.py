# SPDX-License-Identifier: Apache-2.0
"""`unlock disk remove`: a disk leaves its group, after its data was moved to the others.

    checks ──> journal ──> btrfs device remove ──> member list without the disk, on every other ──> mapping closed ──>
    the disk's tokens removed ──> state, the journal closed

btrfs comes before the member list: until the new list is complete the group opens with the old one, which has the disk,
whether btrfs still needs it or not. A move that was cut off leaves the disk in the file system, with less on it.
The lock is not held while data moves: the journal keeps other operations out.
"""

from typing import NamedTuple

from .. import journald, messages
from ..disks import btrfs, devices, find, luks
from ..disks.groups import Group, Member
from ..disks.reencrypt import Tell
from ..errors import Refused
from ..host import this_boot
from ..host.journal import DiskRemoval
from ..host.lock import exclusive
from ..keys import access
from ..paths import Paths
from . import group_disks, leaving, membership
from .consent import Consent, Plan, agree

_SMALL_CHUNK, _LARGEST_CHUNK = 64 << 20, 1 << 30
"""Bytes, on one device. btrfs makes chunks smaller in a small file system, and where there is less room."""


class Removed(NamedTuple):
    """What `disk remove` did."""

    group: str
    name: str
    """Mapping name that the disk had."""
    node: str


class _Removal(NamedTuple):
    """What is to be done."""

    group: Group
    member: Member
    mount: str
    """Of the btrfs that still has the disk; ''."""


def remove_disk(
    paths: Paths,
    device: str,
    *,
    migrate: bool = True,
    consent: Consent = agree,
    tell: Tell = lambda *_: False,
    look: find.Look = find.look,
) -> Removed | None:
    """Without `migrate`, a file system that lies on this disk alone stays on it. Returns None when the plan was only to
    be shown, or `tell` has stopped the move; then, and after a kill, the same command finishes. Raises Refused, Usage,
    CommandFailed, DiskFailed.
    """
    with exclusive(paths), access.Work(paths, look) as work:
        removal = _begin(work, device, migrate, consent)
    if not removal:
        return None
    node = f"/dev/mapper/{removal.member.name}"
    group_disks.hold_mount(paths, removal.member.name)
    if removal.mount and not btrfs.remove_device(removal.mount, node, tell):
        return None
    with exclusive(paths), access.Work(paths, look) as work:
        return _finish(work, removal)


def _begin(work: access.Work, device: str, migrate: bool, consent: Consent) -> _Removal | None:
    """The checks, and the journal. None when the plan was only to be shown."""
    work.settings.check()
    state = work.state
    group, member = group_disks.find_member(state, device)
    state.refuse_other("disk remove", member.name)
    if len(group.members) == 1:
        raise Refused(
            f"{member.name} is the last disk of group {group.name}", f"unlock group delete {group.name}", "last-member"
        )
    group_disks.refuse_root(group, f"btrfs device remove by hand; then unlock disk release {member.name}")
    nodes = _nodes_of_others(work, group, member)
    entry = state.unfinished(DiskRemoval, member.name)
    has_left = entry and membership.has_member_list(state, group._replace(manifest=entry.manifest), nodes)
    mount = "" if has_left else _check_content(group, member, migrate)
    steps = (
        *([f"move the data of {member.name} to the other disks of {mount}, and take it out of btrfs"] if mount else []),
        f"write the new member list to {', '.join(each.name for each in group.members if each != member)}",
        f"close /dev/mapper/{member.name}, and remove its token; the recovery key still opens the disk",
    )
    if not consent(Plan(steps)):
        return None
    if not entry:
        manifest = state.next_manifest(group.name)
        state.begin(DiskRemoval("disk remove", member.name, group.name, manifest=manifest))
    return _Removal(group, member, mount)


def _nodes_of_others(work: access.Work, group: Group, member: Member) -> dict[str, str]:
    """LUKS UUID -> node. Raises Refused when one is missing."""
    seen = work.look()
    return {each.uuid: membership.member_node(seen, each) for each in group.members if each.uuid != member.uuid}


def _check_content(group: Group, member: Member, migrate: bool) -> str:
    """Where the btrfs is mounted that is to give the disk up; '' when nothing uses the disk. Raises Refused."""
    node = f"/dev/mapper/{member.name}"
    if devices.active_mapping_name(member.uuid) != member.name:
        words = f"{member.name} is not open, so that it is not known what the group would lose"
        raise Refused(words, f"unlock open {group.name}", "not-open")
    mounts = group_disks.btrfs_mounts({member.name})
    if mounts and not migrate:
        raise Refused(
            f"the btrfs on {mounts[0]} uses {member.name}, and cannot let go of a disk without moving its data",
            f"leave --no-migrate out; for a disk that fails: unlock disk replace {member.name} NEW",
            "in-use",
        )
    if mounts:
        _check_btrfs(mounts[0], node)
        return mounts[0]
    kind = group_disks.kind_on(member.name)
    if used := devices.describe_use(node):
        raise Refused(f"{node} is in use: {used}", _how_to_free(kind, group, node), "in-use")
    if kind in group_disks.ON_ONE_DISK and not migrate:
        return ""
    if kind:
        hint = "--no-migrate: it stays on the disk" if kind in group_disks.ON_ONE_DISK else ""
        raise Refused(f"{node} holds {kind}", hint or _how_to_free(kind, group, node), "has-data")
    return ""


def _how_to_free(kind: str, group: Group, node: str) -> str:
    if kind == "btrfs":
        return f"unlock open {group.name}"
    if kind == "LVM2_member":
        return f"pvmove {node}; vgreduce VG {node}; pvremove {node}"
    if kind == "linux_raid_member":
        return f"mdadm --manage /dev/mdX --fail {node} --remove {node}; mdadm --zero-superblock {node}"
    return f"lsblk {node}; umount what lies on it"


def _check_btrfs(mount: str, node: str) -> None:
    """Raises Refused for what btrfs could not give up: too few disks for a profile, or too little space."""
    group_disks.refuse_busy(mount, "device remove")
    present = btrfs.read_devices(mount)
    missing = [each for each in present if not each.node]
    if missing:
        raise Refused(
            f"a disk of the btrfs on {mount} is missing: devid {missing[0].devid}",
            "unlock disk replace OLD NEW first",
            "missing",
        )
    device = btrfs.find_device(mount, node)
    assert device
    others = [each for each in present if each.devid != device.devid]
    for space in btrfs.read_space(mount):
        least = btrfs.PROFILES[space.profile].least
        if len(others) < least:
            raise Refused(
                f"btrfs on {mount} has {space.kind} in profile {space.profile}, which needs {least} disks",
                f"unlock disk replace {node} NEW; or btrfs balance start -f -dconvert=single -mconvert=dup {mount}",
                "too-few-disks",
            )
    if words := _describe_no_space(device, others, btrfs.read_space(mount)):
        raise Refused(
            f"the other disks of {mount} have too little room for what is on {node}: {words}",
            f"btrfs balance start -dusage=80 {mount} frees what is set aside; else delete files, or unlock disk add",
            "no-space",
        )


def _describe_no_space(device: btrfs.Device, others: list[btrfs.Device], spaces: list[btrfs.Space]) -> str:
    """Why the move would not fit, in words; '' where it does. What is free inside of chunks does not count: they may
    lie on this disk too, and a move that runs out of space in its midst makes the file system read-only."""
    profiles = [btrfs.PROFILES[each.profile] for each in spaces]
    size = sum(profile.copies * each.size for profile, each in zip(profiles, spaces, strict=True))
    used = sum(profile.copies * each.used for profile, each in zip(profiles, spaces, strict=True))
    needed = device.used * used // size if size else 0
    chunk = min(needed, _LARGEST_CHUNK, max(_SMALL_CHUNK, sum(each.size for each in others) // 100))
    rooms = sorted((each.size - each.used for each in others), reverse=True)
    if sum(rooms) < needed + chunk:
        return f"{needed + chunk} bytes are needed, {sum(rooms)} are in no chunk"
    width = max((each.least for each in profiles), default=1)
    if rooms[width - 1] < chunk:
        return f"a chunk of {chunk} bytes is needed on {width} disks"
    return ""


def _finish(work: access.Work, removal: _Removal) -> Removed:
    """The list, the mapping, the token, the state: each may run twice."""
    state, member = work.state, removal.member
    entry = state.unfinished(DiskRemoval, member.name)
    if not entry:
        raise Refused(f"{member.name} was removed meanwhile", "unlock status", code="not-a-member")
    group = state.groups[entry.group]
    nodes = _nodes_of_others(work, group, member)
    new = group.without(member.uuid)._replace(manifest=entry.manifest)
    kek, _ = access.find_kek(work, group)
    with kek:
        new = membership.rewrite_member_list(work, new, nodes, kek=kek)
    node = take_out(work, member)
    forget_member(work, new, member)
    state.journal = None
    state.save()
    words = f"{member.name} ({member.uuid}) is out of group {new.name}"
    journald.record(work.paths, messages.DISK_REMOVED, words, disk=member.name, uuid=member.uuid, group=new.name)
    return Removed(new.name, member.name, node)


def cancel_removal(paths: Paths, look: find.Look = find.look) -> None:
    """Takes a removal back that was stopped or killed: what was moved stays where it is. Raises Refused when the disk
    is not needed any more."""
    with exclusive(paths), access.Work(paths, look) as work:
        state = work.state
        if not isinstance(state.journal, DiskRemoval):
            return
        entry = state.journal
        group, member = group_disks.find_member(state, entry.about)
        nodes = _nodes_of_others(work, group, member)
        listed = group._replace(manifest=entry.manifest)
        if membership.has_member_list(state, listed, nodes) or not group_disks.btrfs_mounts({member.name}):
            words = f"{member.name} is out of the file system, or that is not mounted"
            raise Refused(words, f"unlock open {group.name}; or {state.to_finish}", "not-cancellable")
        group_disks.refuse_busy(group_disks.btrfs_mounts({member.name})[0])
        this_boot.unmark(paths, "leaving", member.name)
        state.journal = None
        state.save()


def take_out(work: access.Work, member: Member) -> str:
    """Closes a disk and removes this host's tokens from it: its recovery keyslot stays. Returns its node; '' when it is
    not here. Raises DiskFailed, Refused."""
    if devices.active_mapping_name(member.uuid) == member.name:
        group_disks.let_close(work.paths)
        btrfs.forget(f"/dev/mapper/{member.name}")
        luks.deactivate(member.name)
    this_boot.unmark(work.paths, "leaving", member.name)
    node = find.find_node(work.look(), member)
    if node:
        leaving.remove_tokens(node, work.state.host)
    return node


def forget_member(work: access.Work, group: Group, member: Member) -> None:
    """The group as it is now, without a disk that was a member, in the state and in this boot. Saves nothing."""
    state = work.state
    state.groups[group.name] = group
    state.drop_disk(member.uuid)
    if all(devices.active_mapping_name(each.uuid) == each.name for each in group.members):
        this_boot.mark_open(work.paths, group.name, [each.name for each in group.members])
