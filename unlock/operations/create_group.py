# SPDX-License-Identifier: Apache-2.0
"""`unlock group create`: formats disks and makes them a group."""

import os
import shlex
import uuid as uuids
from typing import NamedTuple

from .. import journald, messages, strictjson
from ..disks import btrfs, changes, devices, disk_keys, find, fstab, luks, token, udev
from ..disks.groups import Group, Member, check_name, mapping_names
from ..errors import Refused, UnlockError, Usage
from ..host import config, this_boot, units
from ..host.journal import GroupCreation
from ..host.lock import exclusive
from ..host.state import State
from ..keys import access, rotation
from ..keys.escrow import Escrow
from ..paths import Paths
from ..run import run
from ..secret import Secret
from . import membership


class NewGroup(NamedTuple):
    """The options of `group create`."""

    name: str
    devices: tuple[str, ...]
    mount: str
    profile: str
    """btrfs data profile; '' is raid1 for two disks or more."""
    erase: frozenset[str]
    """Devices whose content may go, by name."""
    recovery_file: str
    """Read if it exists, else written; '' asks at the terminal."""
    policy: str = "persistent"
    """`provider`: the KEK is never kept on this host."""
    escrow: Escrow | None = None
    discard: bool = False
    """Unused blocks are told to the disks."""
    degraded: str = config.DEGRADED[0]
    """`allow`: it opens without all of its disks, if its profile can do without the others."""


def create_group(paths: Paths, wanted: NewGroup) -> Group:
    """Formats disks and makes them a group. Destroys their content. Raises Refused, DiskFailed, Usage.

    An error is undone, and any command may follow; after a kill the same command finishes.
    """
    check_name(wanted.name)
    wanted = wanted._replace(mount=config.normalise_mount_point(wanted.mount))
    with exclusive(paths), access.Work(paths) as work:
        work.settings.check()
        state = work.state
        nodes = [membership.device_node(device) for device in wanted.devices]
        unfinished = state.unfinished(GroupCreation, wanted.name)
        if wanted.name in state.groups and not unfinished:
            raise Refused(f"there is a group {wanted.name} already", "unlock status", code="group-exists")
        if wanted.name not in state.groups:
            _check_mount_point(paths, wanted)
            _check_profile(wanted)
            _create(work, wanted, nodes, unfinished)
        group = state.groups[wanted.name]
        kind = _file_system_type(group, wanted)
        membership.add_to_config(
            paths,
            config.GroupConfig(
                wanted.name, wanted.mount, kind, "", config.DEADLINE, wanted.policy, degraded=wanted.degraded
            ),
        )
        this_boot.mark_open(paths, group.name, [member.name for member in group.members])
        _start(units.mount_unit(wanted.mount))
        state.journal = None
        state.save()
        names = [member.name for member in group.members]
        words = f"group {group.name} is made of {', '.join(names)}, for {wanted.mount}"
        journald.record(paths, messages.GROUP_CREATED, words, group=group.name, disks=names)
        return group


def cancel_creation(state: State, entry: GroupCreation, look: find.Look = find.look) -> list[str]:
    """Forgets a group that `group create` was killed in making. Its disks keep their fresh header without this host's
    token. Returns the mapping names of those that are not here. Raises Refused when the group is made, DiskFailed when
    a disk is in use; may be called again."""
    if entry.about in state.groups:
        raise Refused(f"group {entry.about} is made, but for its mount", state.to_finish, "not-cancellable")
    seen = look()
    nodes = {member: find.find_node(seen, member) for member in entry.members}
    for member in entry.members:
        if devices.active_mapping_name(member.uuid) == member.name:
            luks.deactivate(member.name)
    for node in filter(None, nodes.values()):
        with luks.Container(node) as container:
            for number, fields in container.tokens(token.TYPE):
                if fields.get("host") == state.host:
                    container.remove_token(number)
    for member in entry.members:
        state.headers.pop(member.uuid, None)
        state.recovery.keyslots.pop(member.uuid, None)
    state.journal = None
    state.save()
    return [member.name for member, node in nodes.items() if not node]


def _create(work: access.Work, wanted: NewGroup, nodes: list[str], unfinished: GroupCreation | None) -> None:
    state, persistence = work.state, work.persistence
    before = list(unfinished.members) if unfinished else []
    if before and len(before) != len(nodes):
        raise Refused(
            f"group {wanted.name} was begun with {len(before)} disks", "name the same disks", code="unfinished"
        )
    _check_disks(nodes, wanted, before)
    with membership.obtain_recovery_key(state, persistence, wanted.recovery_file, wanted.escrow) as recovery:
        if not before:
            names = mapping_names(
                wanted.name, len(nodes), membership.mapping_names_in_use(state).union(devices.active_mappings())
            )
            before = [
                Member(str(uuids.uuid4()), name, udev.find_disk(node).serial)
                for name, node in zip(names, nodes, strict=True)
            ]
            state.begin(GroupCreation("group create", wanted.name, members=tuple(before), options=_options(wanted)))
        try:
            group, kek = membership.new_group(work, wanted.name, tuple(before), 1, wanted.policy)
            made = _format(group, nodes, recovery, wanted.discard)
            _make_file_system(group, wanted)
            with access.token_keys(work, kek=kek, mac_key=disk_keys.mac_key(recovery, state.host)) as keys:
                for member, node in zip(group.members, nodes, strict=True):
                    with (
                        luks.Container(node) as container,
                        membership.open_by_recovery_key(state, container, recovery) as dek,
                    ):
                        changes.require_unchanged(container, made[member.uuid])
                        each = disk_keys.make_token(container, state.host, group, member, dek, keys)
                        disk_keys.write_token(node, each, dek, keys)
                        state.headers[member.uuid] = strictjson.canonical(container.facts()).decode()
        except UnlockError:
            for member in before:
                luks.abandon(member.name)
            state.journal = None
            state.save()
            rotation.retire_or_tell(work)
            raise
    state.groups[group.name] = group
    state.save()


def _options(wanted: NewGroup) -> str:
    """The words after the name, without --erase: at another boot another disk may have that name."""
    words = ["--disk", *wanted.devices, "--mount", wanted.mount, "--policy", wanted.policy]
    if wanted.profile:
        words += ["--profile", wanted.profile]
    if wanted.discard:
        words.append("--discard")
    if wanted.degraded != config.DEGRADED[0]:
        words += ["--degraded", wanted.degraded]
    if wanted.recovery_file:
        words += ["--recovery-key-file", os.path.abspath(wanted.recovery_file)]
    if wanted.escrow:
        to = wanted.escrow.to if wanted.escrow.to.startswith("age1") else os.path.abspath(wanted.escrow.to)
        words += ["--escrow-to", to, "--escrow-file", os.path.abspath(wanted.escrow.file)]
    return shlex.join(words)


def _check_mount_point(paths: Paths, wanted: NewGroup) -> None:
    where = wanted.mount
    if where in fstab.fstab_targets(paths.fstab):
        raise Refused(f"{paths.fstab} mounts something at {where}", "another --mount", code="mount-taken")
    for group in config.load(paths.config).groups.values():
        if group.mount == where:
            raise Refused(f"group {group.name} is mounted at {where}", "another --mount", code="mount-taken")
    if os.path.realpath(where) != where or (os.path.lexists(where) and not os.path.isdir(where)):
        raise Refused(f"{where} is not a directory, or reached by a link", "another --mount", code="mount-taken")
    if os.path.isdir(where) and (os.path.ismount(where) or os.listdir(where)):
        raise Refused(f"{where} is mounted or not empty", "another --mount", code="mount-taken")


def _check_profile(wanted: NewGroup) -> None:
    """Raises Usage for a profile that needs more disks: mkfs.btrfs would refuse it only after the disks are
    formatted."""
    if wanted.profile and wanted.profile not in btrfs.PROFILES:
        raise Usage(f"{wanted.profile!r} is no btrfs profile", f"--profile takes {', '.join(btrfs.PROFILES)}")
    least = btrfs.PROFILES[wanted.profile].least if wanted.profile else 1
    if len(wanted.devices) < least:
        raise Usage(f"profile {wanted.profile} needs {least} disks", f"name {least} with --disk, or another --profile")


def _check_disks(nodes: list[str], wanted: NewGroup, before: list[Member]) -> None:
    """Raises Usage, Refused. `before`: the members with which an unfinished run began. A disk with the UUID of one of
    them is half made by that run, and may be formatted again."""
    erase = {os.path.realpath(device) for device in wanted.erase}
    if len(set(nodes)) != len(nodes) or not erase <= set(nodes):
        raise Usage("each disk is named once with --disk, and --erase names some of them")
    for i, node in enumerate(nodes):
        if before and udev.find_disk(node).serial != before[i].serial:
            raise Refused(
                f"{node} is not the disk that group {wanted.name} was begun with (serial {before[i].serial})",
                "name the disks in the same order as before, by /dev/disk/by-id",
                code="unfinished",
            )
        if before and _is_half_made(node, before[i]):
            continue
        used = devices.describe_use(node)
        if used:
            raise Refused(f"{node} is in use: {used}", "lsblk", code="in-use")
        content = devices.list_signatures(node)
        if content and node not in erase:
            raise Refused(f"{node} holds {content}", f"--erase {node} if it may go", code="has-data")


def _is_half_made(node: str, member: Member) -> bool:
    try:
        with luks.Container(node) as container:
            return container.uuid == member.uuid
    except UnlockError:
        return False


def _format(group: Group, nodes: list[str], recovery: Secret, discard: bool) -> membership.Facts:
    """Writes fresh headers with the recovery keyslot, and opens the disks under their mapping names. Returns what the
    headers say."""
    made: membership.Facts = {}
    for member, node in zip(group.members, nodes, strict=True):
        if devices.active_mapping_name(member.uuid):
            luks.deactivate(member.name)
        run(["wipefs", "--all", "--quiet", node])
        with Secret.random(64) as dek, luks.format(node, dek, uuid=member.uuid) as container:
            container.add_keyslot(dek, passphrase=recovery)
            if discard:
                container.set_flags(frozenset({"allow-discards"}))
            container.activate(member.name, dek)
            made[member.uuid] = container.facts()
    return made


def _file_system_type(group: Group, wanted: NewGroup) -> str:
    return "btrfs" if len(group.members) > 1 or wanted.profile else "ext4"


def _make_file_system(group: Group, wanted: NewGroup) -> None:
    mappings = [f"/dev/mapper/{member.name}" for member in group.members]
    if _file_system_type(group, wanted) == "ext4":
        run(["mkfs.ext4", "-q", "-F", "-L", group.name[:16], *mappings])
        return
    metadata = "raid1" if len(mappings) > 1 else "dup"
    profile = wanted.profile or metadata
    run(["mkfs.btrfs", "-q", "-f", "-L", group.name, "-d", profile, "-m", metadata, *mappings])


def _start(unit: str) -> None:
    if units.is_systemd_running():
        run(["systemctl", "start", unit])
