# SPDX-License-Identifier: Apache-2.0
"""`unlock disk add`: formats a disk and makes it a member of a group, and of its btrfs.

    checks ──> journal ──> header with the recovery keyslot ──> member list with the new disk, on every disk ──>
    state ──> mapping ──> btrfs device add ──> journal closed

The member list comes before btrfs. Cut off between the two, the group opens by the new list, one mapping more than its
file system needs. The other way round the file system would need a disk that the list does not have: not mounted at the
next boot.
"""

import os
import shlex
import uuid as uuids
from typing import NamedTuple

from .. import journald, messages, strictjson
from ..disks import btrfs, devices, find, luks, udev
from ..disks.groups import Group, Member, mapping_names
from ..errors import Refused, UnlockError
from ..host import this_boot
from ..host.journal import DiskAddition
from ..host.lock import exclusive
from ..keys import access
from ..paths import Paths
from ..secret import Secret
from . import group_disks, membership
from .consent import Consent, Plan, agree


class NewDisk(NamedTuple):
    """The options of `disk add`."""

    device: str
    group: str
    erase: frozenset[str]
    """The device, when its content may go."""
    recovery_file: str
    """The recovery key; '' asks at the terminal."""
    file_system: bool = True
    """False: nothing is put on the disk; the person adds it to LVM, md or ZFS."""


class Added(NamedTuple):
    """What `disk add` did."""

    group: str
    name: str
    """Mapping name of the new member."""
    next: str
    """What to type next."""


def add_disk(paths: Paths, wanted: NewDisk, *, consent: Consent = agree, look: find.Look = find.look) -> Added | None:
    """Returns None when the plan was only to be shown. An error before the list is on a disk is undone; after a kill
    the same command finishes. Raises Refused, Usage, DiskFailed, CommandFailed."""
    with exclusive(paths), access.Work(paths, look) as work:
        work.settings.check()
        state = work.state
        node = membership.device_node(wanted.device)
        group = group_disks.find_group(state, wanted.group)
        about = f"--group {group.name}"
        state.refuse_other("disk add", about)
        entry = state.unfinished(DiskAddition, about)
        group_disks.refuse_root(group, "format it with cryptsetup, name it in /etc/crypttab; then: unlock disk adopt")
        begun = entry.member if entry else None
        others = group.without(begun.uuid) if begun else group
        system = group_disks.find_file_system(others)
        mount = _check_file_system(others, system, wanted)
        content = group_disks.check_new_disk(state, node, wanted.erase, least=group_disks.SMALLEST, begun=begun)
        seen = work.look()
        nodes = {each.uuid: membership.member_node(seen, each) for each in others.members}
        member = begun or _new_member(work, others, node)
        if not consent(_plan(others, member, node, content, mount)):
            return None
        if member not in group.members:
            with membership.obtain_recovery_key(state, work.persistence, wanted.recovery_file) as recovery:
                if not entry:
                    manifest = state.next_manifest(group.name)
                    entry = DiskAddition("disk add", about, member, manifest=manifest, options=_options(wanted))
                    state.begin(entry)
                new = others._replace(members=(*others.members, member), manifest=entry.manifest)
                make_member(work, new, member, {**nodes, member.uuid: node}, recovery)
        open_member(work, state.groups[group.name], member, node)
        if mount and not btrfs.find_device(mount, f"/dev/mapper/{member.name}"):
            btrfs.add_device(mount, f"/dev/mapper/{member.name}")
        state.journal = None
        state.save()
        words = f"{member.name} ({member.uuid}) is a new disk of group {group.name}"
        journald.record(paths, messages.DISK_ADDED, words, disk=member.name, uuid=member.uuid, group=group.name)
        return Added(group.name, member.name, _next(system, mount, member))


def _check_file_system(group: Group, system: group_disks.FileSystem, wanted: NewDisk) -> str:
    """Where the btrfs is mounted that the disk is for; '' with `--no-filesystem`. Raises Refused."""
    name = group.name
    if system.kind in group_disks.ON_ONE_DISK:
        raise Refused(
            f"group {name} holds {system.kind}, which lies on one disk and cannot use another",
            "unlock group create OTHER --disk DEV --mount DIR",
            "separate-disk",
        )
    if not wanted.file_system:
        if system.kind == "btrfs":
            raise Refused(
                f"group {name} holds btrfs: a member that is no part of it would be needed at each boot for nothing",
                "leave --no-filesystem out",
                "separate-disk",
            )
        return ""
    if system.kind != "btrfs":
        raise Refused(
            f"group {name} holds {system.kind or 'nothing that is known'}, which unlock does not extend",
            "--no-filesystem; you add /dev/mapper/NAME to it",
            "other-file-system",
        )
    mount = group_disks.mounted_btrfs(group, system)
    group_disks.refuse_busy(mount)
    return mount


def _new_member(work: access.Work, group: Group, node: str) -> Member:
    taken = membership.mapping_names_in_use(work.state).union(devices.active_mappings())
    return Member(str(uuids.uuid4()), mapping_names(group.name, 1, taken)[0], udev.find_disk(node).serial)


def _plan(group: Group, member: Member, node: str, content: str, mount: str) -> Plan:
    lost = f"; what it holds is lost: {content}" if content else ""
    names = ", ".join([*(each.name for each in group.members), member.name])
    steps = [
        f"format {node} as LUKS2 with the recovery key{lost}",
        f"write the new member list to {names}",
        f"open it as /dev/mapper/{member.name}",
    ]
    return Plan((*steps, *([f"btrfs device add /dev/mapper/{member.name} {mount}"] if mount else [])))


def make_member(work: access.Work, group: Group, member: Member, nodes: dict[str, str], recovery: Secret) -> None:
    """Formats the disk of a new member, writes the group's member list to all, saves the group. The journal names the
    member. Run again, it goes on. Raises DiskFailed and others: then, unless the list is on a disk, the journal is
    closed again, and the disk is a formatted one of no group."""
    state, node = work.state, nodes[member.uuid]
    others = {each.uuid: nodes[each.uuid] for each in group.members if each.uuid != member.uuid}
    try:
        flags = group_disks.common_flags(others.values())
        with group_disks.format_member(node, member, recovery, flags) as dek:
            with luks.Container(node) as container:
                membership.open_by_recovery_key(state, container, recovery).wipe()
                state.headers[member.uuid] = strictjson.canonical(container.facts()).decode()
            kek, _ = access.find_kek(work, group, others)
            with kek:
                written = membership.rewrite_member_list(work, group, nodes, kek=kek, new={member.uuid: dek})
    except UnlockError:
        if not membership.has_member_list(state, group, nodes):
            state.drop_disk(member.uuid)
            state.journal = None
            state.save()
        raise
    state.groups[group.name] = written
    state.save()


def open_member(work: access.Work, group: Group, member: Member, node: str) -> None:
    """Opens a new member of an open group, unless it is open. Raises DiskFailed, Tampered, ProviderError."""
    if devices.active_mapping_name(member.uuid) != member.name:
        with luks.Container(node) as container, access.find_volume_key(work, container, group) as dek:
            container.activate(member.name, dek)
    this_boot.mark_open(work.paths, group.name, [each.name for each in group.members])


def cancel_addition(paths: Paths, look: find.Look = find.look) -> None:
    """Takes an addition back that was killed. Raises Refused when a disk has the list with the new one."""
    with exclusive(paths), access.Work(paths, look) as work:
        state = work.state
        if not isinstance(state.journal, DiskAddition):
            return
        entry, name = state.journal, state.journal.about.removeprefix("--group ")
        group = state.groups[name]
        if entry.member in group.members or membership.has_member_list(
            state, group._replace(manifest=entry.manifest), work.nodes(group)
        ):
            words = f"{entry.member.name} is in the member list already"
            raise Refused(words, f"{state.to_finish}; then unlock disk remove {entry.member.name}", "not-cancellable")
        state.drop_disk(entry.member.uuid)
        state.journal = None
        state.save()


def _options(wanted: NewDisk) -> str:
    """The words after the group's name, without --erase: at another boot another disk may have that name."""
    words = [wanted.device]
    if wanted.recovery_file:
        words += ["--recovery-key-file", os.path.abspath(wanted.recovery_file)]
    if not wanted.file_system:
        words.append("--no-filesystem")
    return shlex.join(words)


def _next(system: group_disks.FileSystem, mount: str, member: Member) -> str:
    node = f"/dev/mapper/{member.name}"
    if mount:
        return f"btrfs balance start --full-balance {mount}, if what is there is to be spread over all disks"
    if system.kind == "LVM2_member":
        return f"pvcreate {node}; vgextend VG {node}"
    if system.kind == "linux_raid_member":
        return f"mdadm --manage /dev/mdX --add {node}"
    return f"add {node} to what the group holds"
