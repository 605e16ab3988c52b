# SPDX-License-Identifier: Apache-2.0
"""`unlock group delete`: a group ends. Its disks stay plain LUKS2, open and mounted as they are, and the recovery key
opens them; or they are erased.

    recovery key proven on each disk (or: mappings closed) ──> journal, and the state has no such group ──>
    crypttab, unlock.toml, TPM ──> each disk: its token goes (or: all keyslots and tokens) ──> journal closed ──>
    KEK retired ──> a new persistence key, where a disk was away and has its token still
"""

from functools import partial
from typing import NamedTuple

from .. import journald, messages
from ..disks import devices, disk_keys, find, forget, luks
from ..disks.groups import Group, Member
from ..errors import DiskFailed, NotOurs, Refused, UnlockError, Usage
from ..host import config
from ..host.journal import GroupDeletion
from ..host.lock import exclusive
from ..host.state import State
from ..keys import access, delivery
from ..keys.access import Work
from ..paths import TPM_DEVICE, Paths
from ..secret import Secret
from . import erase_disk, leaving, new_persistence_key
from .consent import Consent, Plan, agree


class Deleted(NamedTuple):
    """The result."""

    group: str
    done: tuple[str, ...]
    """Mapping names of the disks that have nothing of this host any more, or nothing at all."""
    left: dict[str, str]
    """Mapping name -> why that disk has its token still."""
    erased: bool


def delete_group(
    paths: Paths,
    name: str,
    *,
    erase: bool = False,
    recovery_file: str = "",
    consent: Consent = agree,
    look: find.Look = find.look,
    connect: access.Connect = access.connect,
    tcti: str = TPM_DEVICE,
    owner_auth: Secret | None = None,
) -> Deleted | None:
    """Ends a group. None for a plan that was only to be shown. `recovery_file`: the recovery key, which is asked for
    without it, unless the disks are erased.

    Killed, the same command finishes. Raises Usage, Refused, NotOurs: then nothing has changed; TpmFailed,
    DiskFailed for a disk that was not erased.
    """
    if _has_ended(State.load(paths), name):
        if consent(Plan((f"a new persistence key, for the disks of group {name} that were not here",))):
            new_persistence_key.replace_if_due(paths, tcti, owner_auth, look)
        return None
    with exclusive(paths), Work(paths, look, connect) as work:
        work.settings.check()
        state = work.state
        state.refuse_other("group delete", name)
        entry = state.unfinished(GroupDeletion, name)
        if not entry:
            if name not in state.groups:
                raise Usage(f"there is no group {name}", "unlock group list")
            group = state.groups[name]
            nodes = leaving.find_nodes(work, group.members)
            _check(work, group, nodes, erase)
            if not consent(_plan(paths, group, nodes, erase)):
                return None
            if not erase:
                _prove_recovery_key(state, group, nodes, recovery_file)
            entry = GroupDeletion("group delete", name, "--erase" if erase else None, group.kek, group.members, False)
            if erase:
                _close_mappings(group.members)
            del state.groups[name]
            if len(nodes) < len(group.members):
                _narrow(state, name)
            state.begin(entry)
        deleted = _finish(work, entry, tcti)
    new_persistence_key.replace_if_due(paths, tcti, owner_auth, look)
    if entry.options and deleted.left:
        raise DiskFailed(
            f"not erased: {'; '.join(f'{each}: {why}' for each, why in deleted.left.items())}",
            "unlock disk erase DEV, when it can be written",
        )
    return deleted


def _has_ended(state: State, name: str) -> bool:
    """Whether a run that was killed has done all but the new persistence key."""
    due = new_persistence_key.is_due(state) and name not in state.groups
    return due and state.narrowed == _narrowing(name)


def _narrowing(name: str) -> str:
    return f"a disk of group {name}, which is deleted, has its token still"


def _narrow(state: State, name: str) -> None:
    state.narrowed = state.narrowed or _narrowing(name)


def _check(work: Work, group: Group, nodes: dict[str, str], erase: bool) -> None:
    """Raises Refused."""
    config.check_removable(work.paths.config, group.name)
    leaving.check_root(work.paths, work.state, group.name, group.members)
    if not erase:
        return
    if away := [each.name for each in group.members if each.uuid not in nodes]:
        raise Refused(
            f"{', '.join(away)} is not here, and cannot be erased",
            f"plug it in, or: unlock disk forget {away[0]}; or: unlock group delete {group.name}",
            code="missing",
        )
    _check_unused(group.name, group.members)


def _check_unused(name: str, members: tuple[Member, ...]) -> None:
    for each in members:
        if where := devices.mount_points_on({each.name}):
            raise Refused(f"group {name} is mounted at {', '.join(where)}", f"umount {where[0]}", code="in-use")
        if each.name in devices.active_mappings() and (used := _use_of_mapping(each)):
            raise Refused(f"group {name} is in use: {used}", f"lsblk /dev/mapper/{each.name}", code="in-use")


def _use_of_mapping(member: Member) -> str:
    """'' for nothing but LVM volumes and a btrfs that nothing has mounted: those are given up with the mapping."""
    used = devices.describe_use(f"/dev/mapper/{member.name}")
    return "" if " is part of /dev/" in used else used


def _plan(paths: Paths, group: Group, nodes: dict[str, str], erase: bool) -> Plan:
    names = [each.name for each in group.members if each.uuid in nodes]
    away = [each.name for each in group.members if each.uuid not in nodes]
    steps = [f"group {group.name} goes out of {paths.config}"]
    if erase:
        steps += [f"every keyslot and token of {each} is destroyed, and its header overwritten" for each in names]
    else:
        steps += [f"the token of {each} goes; it stays LUKS2, and the recovery key opens it" for each in names]
    steps.append("the KEK is retired at its provider")
    if away:
        steps.append(f"a new persistence key, as {', '.join(away)} is not here and has its token still")
    destroys = tuple(f"all data on {each.name} ({nodes[each.uuid]})" for each in group.members) if erase else ()
    return Plan(tuple(steps), destroys, group.name)


def _prove_recovery_key(state: State, group: Group, nodes: dict[str, str], file: str) -> None:
    """Raises NotOurs, code `no-key`, for a disk that the recovery key does not open; Usage."""
    if not nodes:
        return
    with delivery.read_recovery_key(file) as recovery:
        for each in group.members:
            if each.uuid in nodes:
                try:
                    with luks.Container(nodes[each.uuid]) as container:
                        disk_keys.dek_by_recovery_key(container, recovery).wipe()
                except NotOurs as error:
                    raise NotOurs(
                        f"{each.name}: no keyslot takes this recovery key, and nothing else of ours would open it",
                        "unlock recovery test; unlock recovery new gives it one",
                        "no-key",
                    ) from error


def _close_mappings(members: tuple[Member, ...]) -> None:
    """Raises DiskFailed, code `busy`: then nothing has changed on a disk."""
    open_ones = [each.name for each in members if each.name in devices.active_mappings()]
    for name in open_ones:
        forget.forget_file_system(name)
    for name in open_ones:
        luks.deactivate(name)


def _finish(work: Work, entry: GroupDeletion, tcti: str) -> Deleted:
    state, name = work.state, entry.about
    erase = entry.options is not None
    nodes = leaving.find_nodes(work, entry.members)
    mount = leaving.describe_mounts(work.paths, name)
    leaving.end_group(work, name, entry.members, tcti, stay=not erase)
    if erase:  # a boot after a kill may have opened them again
        _check_unused(name, entry.members)
        _close_mappings(entry.members)
    left = {each.name: "it is not here" for each in entry.members if each.uuid not in nodes and not entry.keyless}
    step = erase_disk.destroy_keys if erase else partial(leaving.remove_tokens, host=state.host)
    for member in entry.members:
        if member.uuid in nodes:
            try:
                step(nodes[member.uuid])
            except UnlockError as error:
                left[member.name] = str(error)
    if erase and not entry.keyless:
        state.journal = entry._replace(keyless=not left)
        state.save()
    for member in entry.members if erase else ():
        if member.uuid in nodes and member.name not in left:
            erase_disk.overwrite_header(nodes[member.uuid])
    done = tuple(each.name for each in entry.members if each.name not in left)
    if left:
        _narrow(state, name)
    leaving.close(work, name, entry.members, entry.kek)
    words = f"group {name} is deleted; its disks {'are erased' if erase else 'stay LUKS2'}"
    journald.record(work.paths, messages.GROUP_DELETED, words, group=name, disks=done, behind=left)
    if not erase:
        leaving.tell_how_to_open(work.paths, entry.members, mount)
    return Deleted(name, done, left, erase)
