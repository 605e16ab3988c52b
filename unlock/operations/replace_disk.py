# SPDX-License-Identifier: Apache-2.0
"""`unlock disk replace OLD NEW`: a new disk takes the place of another one, which may be dead or away.

    checks ──> journal ──> NEW formatted; member list with it, on every disk ──> btrfs replace ──>
    member list without OLD ──> OLD closed, its tokens removed ──> state, the journal closed

While btrfs copies, a boot needs both disks: with one of them away btrfs does not mount. So the first list has both,
and only the last one is without OLD. A dead or absent OLD is left out at once, and the file system is mounted degraded;
when the copy is done, the group gets a new KEK and the host a new persistence key, as by `disk forget`: the disk that
has the old ones may be in other hands.
The lock is not held while data moves: the journal keeps other operations out.
"""

import contextlib
import os
import shlex
import uuid as uuids
from typing import NamedTuple

from .. import journald, log, messages
from ..disks import btrfs, devices, find, luks, udev
from ..disks.groups import Group, Member, mapping_names
from ..disks.reencrypt import Tell
from ..errors import Refused, UnlockError
from ..host import this_boot
from ..host.journal import DiskReplacement, Rekey
from ..host.lock import exclusive
from ..keys import access, rotation
from ..paths import TPM_DEVICE, Paths
from ..secret import Secret
from . import add_disk, group_disks, membership, new_persistence_key, remove_disk
from .consent import Consent, Plan, agree

DATA_OFFSET = 16 << 20
"""Bytes before the data of a disk that is formatted now."""


class Replacing(NamedTuple):
    """The options of `disk replace`."""

    old: str
    new: str
    erase: frozenset[str]
    """The new disk, when its content may go."""
    recovery_file: str
    """The recovery key; '' asks at the terminal."""


class Replaced(NamedTuple):
    """What `disk replace` did."""

    group: str
    old: str
    new: str
    """Mapping names."""
    absent: bool
    """The old disk was dead or away."""
    next: str
    """What to type next; ''."""


def replace_disk(
    paths: Paths,
    wanted: Replacing,
    *,
    consent: Consent = agree,
    tell: Tell = lambda *_: False,
    look: find.Look = find.look,
    tcti: str = TPM_DEVICE,
    owner_auth: Secret | None = None,
) -> Replaced | None:
    """Returns None when the plan was only to be shown, or `tell` has stopped the copy; then, and after a kill, the same
    command finishes. Raises Refused, Usage, CommandFailed, DiskFailed."""
    with exclusive(paths), access.Work(paths, look) as work:
        began = _begin(work, wanted, consent)
    return _copy(paths, *began, tell, look, tcti, owner_auth) if began else None


def go_on(paths: Paths, tell: Tell, look: find.Look = find.look, tcti: str = TPM_DEVICE) -> Replaced | None:
    """Finishes a replacement whose new disk is a member already: then nothing is needed from a person. None when `tell`
    has stopped it. Raises Refused and others."""
    with exclusive(paths), access.Work(paths, look) as work:
        state = work.state
        entry = state.journal
        if not isinstance(entry, DiskReplacement):
            return None
        group_disks.hold_mount(paths, entry.old.name)  # at once: the kernel goes on with the copy since the mount
        if entry.new not in state.groups[entry.group].members:
            raise Refused(f"`{state.to_finish}` needs the recovery key", state.to_finish, "by-command")
        node = membership.member_node(work.look(), entry.new)
        began = _begin(work, Replacing(entry.old.name, node, frozenset(), ""), agree)
    return _copy(paths, *began, tell, look, tcti, None) if began else None


def _by_hand(group: Group, old: Member, *, absent: bool) -> str:
    """What to do for the disks of the root. A group takes a disk in while all the others are here."""
    adopt = f"unlock disk adopt NEW --group {group.name}"
    if not absent:
        return f"{adopt}; then btrfs replace by hand"
    return f"cryptsetup luksFormat NEW; btrfs replace by hand; unlock disk forget {old.name}; {adopt}"


def _copy(
    paths: Paths,
    entry: DiskReplacement,
    mount: str,
    tell: Tell,
    look: find.Look,
    tcti: str,
    owner_auth: Secret | None,
) -> Replaced | None:
    """The copy, and what follows it. None when `tell` has stopped it."""
    if mount:
        node = f"/dev/mapper/{entry.new.name}"
        group_disks.hold_mount(paths, entry.old.name)
        devid = _old_device(mount, entry.old)
        if devid and not btrfs.replace_device(mount, devid, node, tell):
            return None
        new = btrfs.find_device(mount, node)
        if not new or not new.devid:
            raise Refused(f"btrfs has not taken {node} in", f"btrfs replace status {mount}", "not-replaced")
        btrfs.resize(mount, new.devid)
    with exclusive(paths), access.Work(paths, look) as work:
        replaced = _finish(work, entry, mount)
    new_persistence_key.replace_if_due(paths, tcti, owner_auth, look)
    return replaced


def _begin(work: access.Work, wanted: Replacing, consent: Consent) -> tuple[DiskReplacement, str] | None:
    """The checks, the journal, and the new disk as a member. Returns the journal's record and where the btrfs is
    mounted, '' for none; None when the plan was only to be shown."""
    work.settings.check()
    state = work.state
    entry = _unfinished(state.journal, wanted.old)
    if entry:
        group, old = state.groups[entry.group], entry.old
    else:
        group, old = group_disks.find_member(state, wanted.old)
    state.refuse_other("disk replace", old.name)
    seen = work.look()
    absent = entry.absent if entry else not seen.get(old.uuid)
    group_disks.refuse_root(group, _by_hand(group, old, absent=absent))
    node = membership.device_node(wanted.new)
    old_gone = absent or all(each.uuid != old.uuid for each in group.members)
    others = group.without(old.uuid, *([entry.new.uuid] if entry else []))
    if not others.members and absent:
        hint = f"unlock group delete {group.name}"
        raise Refused(f"{old.name} is the only disk of group {group.name}, and it is not here", hint, "last-member")
    remaining = others if old_gone else others._replace(members=(*others.members, old))
    system = _find_file_system(remaining, entry)
    mount, least = _check_file_system(remaining, system, old, absent=absent)
    content = group_disks.check_new_disk(state, node, wanted.erase, least=least, begun=entry.new if entry else None)
    nodes = {each.uuid: membership.member_node(seen, each) for each in remaining.members}
    taken = membership.mapping_names_in_use(state).union(devices.active_mappings())
    new = (
        entry.new
        if entry
        else Member(str(uuids.uuid4()), mapping_names(group.name, 1, taken)[0], udev.find_disk(node).serial)
    )
    if not consent(_plan(group, old, new, node, content, mount, absent=absent)):
        return None
    begins = entry is None
    if entry is None:
        manifests = state.next_manifest(group.name), state.next_manifest(group.name)
        options = _options(wanted)
        entry = DiskReplacement("disk replace", old.name, group.name, old, new, manifests, absent, options)
    if new not in group.members:
        with membership.obtain_recovery_key(state, work.persistence, wanted.recovery_file) as recovery:
            if begins:
                state.begin(entry)
            _take_in(work, remaining, entry, {**nodes, new.uuid: node}, recovery)
    add_disk.open_member(work, state.groups[group.name], new, node)
    return entry, mount


def _take_in(
    work: access.Work, remaining: Group, entry: DiskReplacement, nodes: dict[str, str], recovery: Secret
) -> None:
    members = (*remaining.members, entry.new)
    listed = remaining._replace(members=members, manifest=entry.manifests[0])
    add_disk.make_member(work, listed, entry.new, nodes, recovery)


def _find_file_system(group: Group, entry: DiskReplacement | None) -> group_disks.FileSystem:
    """Once btrfs has replaced a disk, it has no signature any more."""
    if entry:
        mounts = group_disks.btrfs_mounts({entry.old.name, entry.new.name, *(each.name for each in group.members)})
        if mounts:
            return group_disks.FileSystem("btrfs", mounts[0])
    return group_disks.find_file_system(group)


def _unfinished(journal: object, text: str) -> DiskReplacement | None:
    """The record of an earlier run for the same old disk."""
    if not isinstance(journal, DiskReplacement):
        return None
    named = text.removeprefix("/dev/mapper/")
    if named in (journal.old.name, journal.old.uuid):
        return journal
    with contextlib.suppress(UnlockError), luks.Container(os.path.realpath(text)) as container:
        if container.uuid == journal.old.uuid:
            return journal
    return None


def _check_file_system(group: Group, system: group_disks.FileSystem, old: Member, *, absent: bool) -> tuple[str, int]:
    """Where the btrfs is mounted, and the bytes that the new disk must have; '' where the person's own tools rebuild.
    Raises Refused."""
    if system.kind == "btrfs":
        mount = group_disks.mounted_btrfs(group, system)
        group_disks.refuse_busy(mount, "device replace")
        present = btrfs.read_devices(mount)
        missing = [each for each in present if not each.node and each.devid]
        if len(missing) > absent:
            raise Refused(
                f"disks of the btrfs on {mount} are missing: devid {', '.join(str(each.devid) for each in missing)}",
                "btrfs filesystem show",
                "missing",
            )
        devid = _old_device(mount, old)
        size = next((each.size for each in present if each.devid == devid), 0)
        return mount, max(group_disks.SMALLEST, size + DATA_OFFSET)
    if system.kind in group_disks.ON_ONE_DISK or not absent:
        hint = "unlock group create OTHER --disk NEW --mount DIR; copy what is there"
        if system.kind not in group_disks.ON_ONE_DISK:
            hint = (
                f"unlock disk add NEW --group {group.name} --no-filesystem; move the data there (pvmove, mdadm "
                f"--replace); unlock disk remove {old.name}"
            )
        raise Refused(
            f"group {group.name} holds {system.kind or 'nothing that is known'}, which unlock does not copy",
            hint,
            "other-file-system",
        )
    return "", group_disks.SMALLEST


def _old_device(mount: str, old: Member) -> int:
    """The devid of the disk that is replaced; 0 when the new one has taken its place. Raises CommandFailed."""
    found = btrfs.find_device(mount, f"/dev/mapper/{old.name}")
    if found:
        return found.devid
    return next((each.devid for each in btrfs.read_devices(mount) if not each.node and each.devid), 0)


def _plan(group: Group, old: Member, new: Member, node: str, content: str, mount: str, *, absent: bool) -> Plan:
    lost = f"; what it holds is lost: {content}" if content else ""
    others = [each.name for each in group.members if each.uuid not in (old.uuid, new.uuid)]
    first = [*others, *([] if absent else [old.name]), new.name]
    steps = [
        f"format {node} as LUKS2 with the recovery key{lost}",
        f"write the member list with {new.name} to {', '.join(first)}",
        f"open it as /dev/mapper/{new.name}",
        *([f"btrfs replace {old.name} by {new.name} on {mount}"] if mount else []),
    ]
    if absent:
        steps.append(f"a new KEK for group {group.name}, and a new persistence key: {old.name} is not here")
    else:
        steps.append(f"write the member list without {old.name} to {', '.join([*others, new.name])}")
        steps.append(f"close /dev/mapper/{old.name}, and remove its token; the recovery key still opens the disk")
    return Plan(tuple(steps))


def _options(wanted: Replacing) -> str:
    """The words after the old disk, without --erase: at another boot another disk may have that name."""
    words = [wanted.new]
    if wanted.recovery_file:
        words += ["--recovery-key-file", os.path.abspath(wanted.recovery_file)]
    return shlex.join(words)


def _finish(work: access.Work, entry: DiskReplacement, mount: str) -> Replaced:
    """The list, the mapping, the token, the state: each may run twice."""
    state, old = work.state, entry.old
    if state.unfinished(DiskReplacement, old.name) != entry:
        raise Refused(f"{old.name} was replaced meanwhile", "unlock status", code="not-a-member")
    group = state.groups[entry.group]
    if not entry.absent:
        seen = work.look()
        left = group.without(old.uuid)._replace(manifest=entry.manifests[1])
        nodes = {each.uuid: membership.member_node(seen, each) for each in left.members}
        kek, _ = access.find_kek(work, group)
        with kek:
            group = membership.rewrite_member_list(work, left, nodes, kek=kek)
        remove_disk.take_out(work, old)
    elif devices.active_mapping_name(old.uuid) == old.name:
        btrfs.forget(f"/dev/mapper/{old.name}")
        luks.abandon(old.name)
    this_boot.unmark(work.paths, "leaving", old.name)
    remove_disk.forget_member(work, group, old)
    state.journal = None
    if entry.absent:
        state.narrowed = f"{old.name} {old.uuid} has left group {group.name} and may be in other hands"
        state.journal = Rekey("rekey", group.name, state.next_generation(group.name), made=None, theirs=False)
    state.save()
    journald.record(
        work.paths,
        messages.DISK_REPLACED,
        f"{entry.new.name} has taken the place of {old.name} ({old.uuid}) in group {group.name}",
        disk=old.name,
        uuid=old.uuid,
        group=group.name,
        new=entry.new.name,
    )
    if entry.absent:
        try:
            rotation.rotate_kek(work, group.name)
        except UnlockError as error:
            log.error(f"group {group.name} has its old key still: {error}", f"unlock rekey {group.name}")
    return Replaced(group.name, old.name, entry.new.name, entry.absent, _next(mount, entry))


def _next(mount: str, entry: DiskReplacement) -> str:
    if not mount:
        return f"rebuild onto /dev/mapper/{entry.new.name}: vgextend and lvconvert --repair, or mdadm --add"
    if mixed := btrfs.mixed_profiles(mount):  # a degraded btrfs writes what has one copy
        filters = " ".join(f"-{kind}convert={profile},soft" for kind, profile in mixed.items())
        return f"btrfs balance start {filters} {mount}"
    return f"btrfs scrub start {mount}" if entry.absent else ""
