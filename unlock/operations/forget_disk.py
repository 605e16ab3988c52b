# SPDX-License-Identifier: Apache-2.0
"""`unlock disk forget`: a member that is dead, lost or stolen leaves the list of its group.

    journal ──> new KEK at the provider ──> each disk here: a token with the new list and the new KEK beside the old
    one, proven ──> each disk: the old one removed ──> state: the new list; the journal closed in the same rename ──>
    the old KEK retired ──> a new persistence key: neither the lost disk nor a copy of its header opens by the TPM

With `destroyed` nobody has the disk, and the keys stay: then no provider and no TPM is needed. A disk that turns up
again opens by the recovery key alone.

The list says which disks the group opens with, and nothing of the data. The file system still counts the disk as
missing, until it is told otherwise.
"""

import os
from typing import NamedTuple

from .. import journald, log, messages
from ..disks import btrfs, devices, find
from ..disks.groups import Group, Member
from ..errors import Refused, UnlockError
from ..host import this_boot
from ..host.journal import DiskForgetting
from ..host.lock import exclusive
from ..host.state import State
from ..keys import access, rotation
from ..keys.access import Work
from ..paths import TPM_DEVICE, Paths
from ..secret import Secret
from . import group_disks, membership, new_persistence_key
from .consent import Consent, Plan, agree

_NEW_PERSISTENCE_KEY = "a new persistence key: no earlier copy of a header opens by the TPM any more"


class Forgotten(NamedTuple):
    """The result."""

    group: str
    disk: str
    """Mapping name of the disk that has left."""
    members: tuple[str, ...]
    """Mapping names of those that are left."""
    generation: int
    """Of the KEK."""


def forget_disk(
    paths: Paths,
    thing: str,
    *,
    destroyed: bool = False,
    accept_loss: bool = False,
    consent: Consent = agree,
    look: find.Look = find.look,
    connect: access.Connect = access.connect,
    tcti: str = TPM_DEVICE,
    owner_auth: Secret | None = None,
) -> Forgotten | None:
    """Takes a member that is not here out of the list of its group, by its device, LUKS UUID or mapping name. None for
    a plan that was only to be shown, and where all but the new persistence key was done already.

    `destroyed`: nobody can have the disk, so that the keys stay. `accept_loss`: the file system does not have all of
    its data without it. Killed, the same command finishes. Raises Refused, Tampered, ProviderError, DiskFailed: then
    nothing has changed; and what `new_persistence_key.replace` raises: then the list is the new one.
    """
    if _has_left(State.load(paths), thing):
        if consent(Plan((_NEW_PERSISTENCE_KEY,))):
            new_persistence_key.replace_if_due(paths, tcti, owner_auth, look)
        return None
    with exclusive(paths), Work(paths, look, connect) as work:
        found = membership.member_named(work.state, thing)
        if not found:
            raise membership.not_a_member(thing)
        forgotten = _forget(work, *found, destroyed=destroyed, accept_loss=accept_loss, consent=consent)
    if forgotten:
        new_persistence_key.replace_if_due(paths, tcti, owner_auth, look)
    return forgotten


def _has_left(state: State, thing: str) -> bool:
    """Whether a run that was killed has taken the disk out of the list, and only the persistence key is left."""
    if not new_persistence_key.is_due(state) or membership.member_named(state, thing):
        return False
    return os.path.basename(thing) in (state.narrowed or "").split()


def _forget(
    work: Work, group: Group, member: Member, *, destroyed: bool, accept_loss: bool, consent: Consent
) -> Forgotten | None:
    state = work.state
    entry = state.unfinished(DiskForgetting, member.uuid)
    state.refuse_other("disk forget", member.uuid)
    left = group.without(member.uuid)
    nodes = _check(work, left, member)
    unasked = False
    if not entry:
        if not accept_loss:
            _check_data(group, member)
        membership.check_headers(work, left, nodes, frozenset())
        if not consent(_plan(work, left, member, destroyed)):
            return None
        entry = DiskForgetting(
            "disk forget",
            member.uuid,
            options="--destroyed" if destroyed else None,
            manifest=state.next_manifest(group.name),
            generation=group.generation if destroyed else state.next_generation(group.name),
            made=None,
        )
        unasked = not destroyed and state.take_name(group.name, entry.generation)
        state.begin(entry)
    try:
        left = _write_list(work, left._replace(manifest=entry.manifest), member, nodes, entry, unasked)
    except UnlockError:
        if not membership.has_member_list(state, left._replace(manifest=entry.manifest), nodes):
            state.journal = None
            state.save()
        raise
    words = f"{member.name} ({member.uuid}) is forgotten: group {group.name} opens without it"
    journald.record(work.paths, messages.DISK_FORGOTTEN, words, disk=member.name, uuid=member.uuid, group=group.name)
    names = [each.name for each in left.members]
    if group.name in this_boot.open_groups(work.paths):
        this_boot.mark_open(work.paths, group.name, names)
    return Forgotten(group.name, member.name, tuple(names), left.generation)


def _check(work: Work, left: Group, member: Member) -> dict[str, str]:
    """The nodes of the members that are left. Raises Refused."""
    if not left.members:
        raise Refused(
            f"{member.name} is the only disk of group {left.name}", f"unlock group delete {left.name}", "last-member"
        )
    seen = work.look()
    if here := seen.get(member.uuid):
        raise Refused(
            f"{member.name} is here: {', '.join(each.node for each in here)}",
            f"unlock disk remove {member.name}; if it does not work any more: take it out, then the same command",
            code="present",
        )
    nodes = {each.uuid: find.find_node(seen, each) for each in left.members}
    if missing := [each.name for each in left.members if not nodes[each.uuid]]:
        raise Refused(
            f"{', '.join(missing)} of group {left.name} is missing too, or there twice",
            "plug in every other member, once: all get the new list",
            code="missing",
        )
    return nodes


def _check_data(group: Group, member: Member) -> None:
    """Raises Refused where a mounted btrfs of the group needs the disk."""
    for where in group_disks.btrfs_mounts({each.name for each in group.members}):
        if short := profiles_that_lose_data(where):
            raise Refused(
                f"the btrfs at {where} has chunks of {', '.join(short)}: without {member.name}, a part of it is lost",
                f"unlock disk replace {member.name} NEW while it can be read; --accept data-loss if it is gone",
                code="data-loss",
            )


def profiles_that_lose_data(mountpoint: str) -> list[str]:
    """The profiles of a mounted btrfs that have not all of their data without its missing devices, or without one where
    the kernel misses none yet. Raises CommandFailed."""
    missing = max(1, sum(not each.node for each in btrfs.read_devices(mountpoint)))
    profiles = {each.profile for each in btrfs.read_space(mountpoint)}
    return sorted(each for each in profiles if btrfs.PROFILES[each].spare < missing)


def _plan(work: Work, left: Group, member: Member, destroyed: bool) -> Plan:
    names = ", ".join(each.name for each in left.members)
    key = "" if destroyed else f", under a new KEK made by provider {work.state.provider.name}"
    steps = [
        f"new tokens on {names}: group {left.name} opens without {member.name}{key}",
        f"the old tokens on {names} are removed",
    ]
    if not destroyed:
        steps += ["the old KEK is retired at its provider", _NEW_PERSISTENCE_KEY]
    return Plan(tuple(steps))


def _write_list(
    work: Work, left: Group, member: Member, nodes: dict[str, str], entry: DiskForgetting, unasked: bool
) -> Group:
    state = work.state

    def write(work: Work, group: Group, kek: Secret) -> tuple[rotation.Outcome, Group]:
        written = membership.rewrite_member_list(work, group, nodes, kek=kek)
        state.forget_member(member, group.name)
        if not entry.options:
            state.narrowed = f"{member.name} {member.uuid} has left group {left.name} and may be in other hands"
        names = tuple(each.name for each in written.members if each.uuid not in written.behind)
        return rotation.Outcome(group.name, group.generation, names, {}), written

    if entry.options:
        with access.find_kek(work, left, nodes)[0] as kek:
            state.groups[left.name] = write(work, left, kek)[1]
        state.journal = None
        state.save()
        return state.groups[left.name]
    made = rotation.make_successor(work, left, entry, unasked)
    new = rotation.successor(left, work.provider().id, made, entry.generation)
    with rotation.fetch_new_kek(work, new) as kek:
        rotation.replace_kek(work, left, new, kek, journal=None, write=write)
    return state.groups[left.name]


def describe_next(forgotten: Forgotten) -> list[str]:
    """What a person does next, in words."""
    where = devices.mount_points_on(set(forgotten.members))
    steps = []
    if not any(name in devices.active_mappings() for name in forgotten.members):
        steps.append(f"to open it: unlock open {forgotten.group}")
    if any(devices.mount_type(each) == "btrfs" for each in where) or not where:
        steps.append(
            f"a btrfs still has {forgotten.disk} as missing, and mounts with -o degraded alone, until its data is on "
            f"the others: unlock disk add NEW --group {forgotten.group}, then btrfs device remove missing "
            f"{where[0] if where else 'DIR'}"
        )
    if forgotten.disk in devices.active_mappings():
        steps.append(f"the mapping {forgotten.disk} is still there, until what uses it lets it go")
    return steps


def tell(forgotten: Forgotten) -> None:
    """Notes for a person."""
    names = ", ".join(forgotten.members)
    log.note(f"group {forgotten.group} opens with {names}; {forgotten.disk} opens by the recovery key alone")
    for each in describe_next(forgotten):
        log.note(each)
