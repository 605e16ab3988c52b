# SPDX-License-Identifier: Apache-2.0
"""`unlock disk decrypt`: takes the encryption away from the only disk of a group, in place, while it is in use; its
data becomes a plain partition.

    checks ──> journal ──> operation key and token with the plan ──> the header says so ──> hotzone by hotzone
    (disks.reencrypt) ──> all in clear, and the header still opens it ──> mapping closed ──> journal: trace of the
    header ──> the partition begins where the data does (disks.partition_table) ──> journal: placed ──> state: no such
    group ──> header erased ──> journal closed, narrowed ──> a new persistence key

The header stays at the start of the disk until the end, so the disk opens like any other at each instant, in early boot
too, by the recovery key and by stock cryptsetup. The data does not move: one sector of the partition table takes the
header's place. That needs the disk closed; where its file system is mounted, all waits there, and the same command goes
on. Nothing needs a person after the start.

Once the partition is there, no header says which disk it is, and anybody can make another one with such a partition.
Only a disk that still has the trace of the header ends the group. Who can copy that has had the disk, and all of it is
in clear by then.

A header of that time is authentic: put back later, with the boundary moved, it would open any content of the disk, in
clear. So the persistence key is replaced at the end, and after a cancellation too, and the group's KEK must be kept on
this host, wrapped by that. The recovery key opens such a header only while the journal has the operation (boot.gate).
"""

import os
from contextlib import suppress
from typing import NamedTuple

from .. import journald, log, messages
from ..disks import (
    adoptable,
    devices,
    disk_keys,
    find,
    fstab,
    luks,
    partition_table,
    raw_header,
    reencrypt,
    reencrypt_plan,
)
from ..disks.groups import Group, Member
from ..disks.reencrypt import Tell
from ..disks.reencrypt_plan import NO_DIGEST, OLD, WHOLE, Plan
from ..errors import CommandFailed, DiskFailed, Malformed, NotOurs, Refused, Tampered
from ..host import config, this_boot
from ..host.journal import DiskDecryption
from ..host.lock import alone, exclusive
from ..host.state import State
from ..keys import access
from ..keys.access import Work
from ..paths import TPM_DEVICE, Paths
from ..predict.boot_tree import BootTree
from ..run import run
from ..secret import Secret
from . import consent as agreement
from . import leaving, membership, moving, new_persistence_key, relink_mapping
from .consent import Consent
from .consent import Plan as Steps
from .moving import Begun

_LOCK = "decrypt.lock", "another process decrypts the disk already"
"""One process at a time moves data: its lock, and what another one is told."""


class Outcome(NamedTuple):
    """The result."""

    group: str
    """The one that has ended, or will."""
    disk: str
    """Mapping name."""
    outcome: str
    """`done`; `stopped`: it goes on with the same command; `waiting`: all is in clear, and the disk is in use."""
    partition: str
    """Node of the partition that the data is, or becomes."""
    hint: str = ""
    """What to do where it waits."""


def decrypt_disk(
    paths: Paths,
    device: str,
    tell: Tell,
    consent: Consent = agreement.agree,
    look: find.Look = find.look,
    connect: access.Connect = access.connect,
    tcti: str = TPM_DEVICE,
) -> Outcome | None:
    """Decrypts the disk, or goes on with that. None when the plan was only shown.

    Raises Usage, Refused, DiskFailed, Tampered, NoKey: then nothing has changed, or the same command goes on.
    """
    name = os.path.basename(device)
    if _has_ended(State.load(paths), name):  # it was cut off after the disk was done
        return _end(paths, look, tcti, Outcome("", name, "done", ""))
    with exclusive(paths), Work(paths, look, connect) as work:
        work.settings.check()
        state = work.state
        entry = state.journal
        found = membership.member_named(state, device)
        if isinstance(entry, DiskDecryption) and (found[1] == entry.member if found else _names(entry, device)):
            if not consent(Steps((f"go on with the decryption of {entry.about}",))):
                return None
        else:
            if not found:
                raise membership.not_a_member(device)
            state.refuse_other("disk decrypt", found[1].name)
            node = membership.member_node(work.look(), found[1])
            entry = _check(work, *found, node)
            if not consent(_describe(entry, node)):
                return None
            state.begin(entry)
    return resume(paths, tell, look, connect, tcti)


def resume(
    paths: Paths,
    tell: Tell,
    look: find.Look = find.look,
    connect: access.Connect = access.connect,
    tcti: str = TPM_DEVICE,
) -> Outcome | None:
    """Goes on with what the journal says, without a person; None where that has no decryption. `tell` gets the bytes
    that are done and those of the disk; when it returns True, the run stops there, and the disk opens.

    Raises Refused when the disk is not here, or another process does it; DiskFailed, Tampered.
    """
    with alone(paths, *_LOCK):
        begun = None
        with exclusive(paths), Work(paths, look, connect) as work:
            entry = work.state.journal
            if not isinstance(entry, DiskDecryption):
                return None
            if not entry.placed and _was_placed(work, entry):
                entry = _save(work, entry._replace(placed=True))  # it was cut off just then
            if not entry.placed:
                begun = _begin_or_settle(work, entry)
        if begun is not None:
            begun.move(tell)
        with exclusive(paths), Work(paths, look, connect) as work:
            if begun is not None and reencrypt.settle(begun.node, begun.plan, None) != WHOLE:
                return _outcome(entry, "stopped")
            if not entry.placed:
                if hint := _close(work, entry):
                    return _outcome(entry, "waiting", hint)
                entry = _place(work, entry)
            _finish(work, entry, tcti)
    return _end(paths, look, tcti, _outcome(entry, "done"))


def describe_waiting(found: Outcome) -> str:
    return f"{found.disk} is in clear, but for its header, and still opens: {found.hint}"


def _outcome(entry: DiskDecryption, outcome: str, hint: str = "") -> Outcome:
    return Outcome(entry.group, entry.about, outcome, entry.place.partition, hint)


def _has_ended(state: State, name: str) -> bool:
    """Whether only the new persistence key is left."""
    due = new_persistence_key.is_due(state) and state.narrowed == _narrowed(name)
    return due and not membership.member_named(state, name)


def _names(entry: DiskDecryption, device: str) -> bool:
    """Whether a person means the disk of the journal, of which there may be no header and no group any more."""
    place = entry.place
    node = place.disk if place.table == "none" else place.partition
    return os.path.basename(device) in (entry.about, entry.member.uuid) or os.path.realpath(device) == node


def _narrowed(name: str) -> str:
    return f"{name} was decrypted in place"


def _end(paths: Paths, look: find.Look, tcti: str, outcome: Outcome) -> Outcome:
    """The new persistence key, which makes the headers of the time before open nothing."""
    new_persistence_key.replace_if_due(paths, tcti, look=look)
    return outcome


def cancel(paths: Paths, look: find.Look = find.look, connect: access.Connect = access.connect) -> list[str]:
    """Takes back what was prepared. Returns what a person should know. Raises Refused once the header says that the
    disk is decrypted: it can only go forward."""
    with alone(paths, *_LOCK), exclusive(paths), Work(paths, look, connect) as work:
        entry = work.state.journal
        if not isinstance(entry, DiskDecryption):
            return []
        if entry.placed or moving.read_phase(work, moving.require_node(work, entry.member)) not in ("", OLD):
            raise Refused(
                f"{entry.about} is half decrypted, and can only go forward",
                "unlock operation resume; where the disk is lost for good: unlock operation cancel --lost",
                code="cannot-cancel",
            )
        moving.remove_preparation(work, moving.require_node(work, entry.member), entry.keyslots)
        work.state.journal = None
        work.state.narrowed = f"{entry.about} was to be decrypted, and is not"
        work.state.save()
        return [f"{entry.about} stays encrypted", "next: unlock rekey --fresh"]


def give_up(
    paths: Paths, consent: Consent = agreement.agree, look: find.Look = find.look, tcti: str = TPM_DEVICE
) -> list[str] | None:
    """Ends a decryption whose disk is lost, so that other operations may begin; its group too, where that has begun to
    end. Returns what a person should know; None when the plan was only shown. Raises Refused when the disk is here,
    TpmFailed."""
    with alone(paths, *_LOCK), exclusive(paths), Work(paths, look, access.connect) as work:
        entry = work.state.journal
        if not isinstance(entry, DiskDecryption):
            return []
        name, members = entry.about, (entry.member,)
        if here := find.find_node(work.look(), entry.member) or _find_placed(entry)[0]:
            raise Refused(f"{name} is here: {here}", "unlock operation resume", code="present")
        lost = f"what {name} holds: this host will not open it, half in clear as it is, should it come back"
        if entry.placed:
            lost = f"{name} is in clear to its end, and what is left of its header is not erased, should it come back"
        if not consent(Steps((f"give up the decryption of {name}",), (lost,), name)):
            return None
        has_group = entry.group in work.state.groups
        work.state.narrowed = f"{name}, half in clear, is lost"
        if has_group:
            work.state.journal = None
            work.state.save()
        else:
            leaving.end_group(work, entry.group, members, tcti, stay=False)
            leaving.close(work, entry.group, members, entry.kek)
    ended = f"group {entry.group} has lost its only disk: unlock group delete {entry.group}"
    return [ended if has_group else f"group {entry.group} has ended", "next: unlock sync"]


# Checks, before anything is changed


def _check(work: Work, group: Group, member: Member, node: str) -> DiskDecryption:
    """Raises Refused, Tampered, NoKey, DiskFailed."""
    state = work.state
    if len(group.members) > 1:
        raise Refused(
            f"{member.name} is one of {len(group.members)} disks of group {group.name}, whose data lies on all of them",
            "unlock disk remove, until one is left; where there is no btrfs, copy the data",
            code="member",
        )
    config.check_removable(work.paths.config, group.name)
    if needed := _needed_mounts(member.name):
        raise Refused(
            f"{member.name} holds {needed}, and this host gets its keys because that is encrypted",
            "install the system again on a plain disk",
            code="root-disk",
        )
    if not state.persistent or group.policy != "persistent":
        raise Refused(
            f"the key of group {group.name} is not kept on this host, so a later key could not put an end to it",
            f"unlock persistence enable; unlock group set {group.name} --policy persistent",
            code="needs-persistence",
        )
    mapping = f"/dev/mapper/{member.name}"
    if mapping in fstab.fstab_sources(work.paths.fstab):
        raise Refused(
            f"{work.paths.fstab} mounts {mapping}, which will not be there any more",
            f"edit it: UUID=... of the file system in place of {mapping}, see blkid",
            code="fstab",
        )
    moving.require_initramfs(BootTree(work.paths))
    reencrypt.unlock_after_kill(node)
    with luks.Container(node) as container:
        access.find_volume_key(work, container, group).wipe()  # authenticates the header
        size = container.disk_size
        adoptable.check_supported(container, size, container.volume_key_size)
        adoptable.check_room_for(container, container.volume_key_size, keyslots=1)
        segment = container.metadata["segments"]["0"]
        offset, sector = int(segment["offset"]), int(segment["sector_size"])
        odd = segment["size"] != "dynamic" or int(segment["iv_tweak"]) or (size - offset) % sector
        if len(container.metadata["segments"]) > 1 or odd:
            raise Refused(
                f"{node}: its data is not all of the disk behind the header, in whole sectors",
                f"cryptsetup luksDump {node}",
                code="not-supported",
            )
        slots = tuple(container.keyslots())
        areas = adoptable.areas_of_keys(container, container.volume_key_size, more=1)
    place = partition_table.find_place(node, offset, group.name)
    partition_table.refuse_keyslots_in_scratch(place, areas, node, group.name)
    reencrypt.choose_resilience(node, 512)
    relink_mapping.refuse_left(devices.active_mapping_name(member.uuid), "decrypted")
    return DiskDecryption(
        "disk decrypt",
        member.name,
        group=group.name,
        kek=group.kek,
        member=member,
        keyslots=slots,
        place=place,
        placed=False,
    )


def _needed_mounts(name: str) -> str:
    """Mount points on a mapping that the host is built on, in words; ''."""
    where = devices.mount_points_on({name})
    return ", ".join(each for each in where if each == "/" or config.is_needed_before_groups(each))


def _describe(entry: DiskDecryption, node: str) -> Steps:
    name, place = entry.about, entry.place
    if place.table == "none":
        last = f"a partition table in place of the header: {place.partition} begins where the data does"
    else:
        last = f"{place.partition} begins {place.offset >> 20} MiB later, where the data does"
    return Steps(
        (
            f"a key for the operation, and a token that says what is done, on {name}",
            f"decrypt {name} ({node}), {(place.size - place.offset) >> 20} MiB, in use or closed",
            f"when it is closed: {last}; the header is erased",
            f"group {entry.group} ends",
            "a new persistence key, so that no header from before opens anything",
        ),
        (f"the encryption of {name}: who has the disk reads it",),
        name,
    )


# On the way


def _begin_or_settle(work: Work, entry: DiskDecryption) -> Begun | None:
    """Brings the header to where the data can be decrypted. None when all of it is. Raises DiskFailed, Tampered,
    CommandFailed, Refused when the disk is not here or a killed run has left its mapping."""
    node = moving.require_node(work, entry.member)
    mapping = devices.active_mapping_name(entry.member.uuid)
    relink_mapping.refuse_left(mapping, "decrypted")
    reencrypt.unlock_after_kill(node)
    with luks.Container(node) as container:
        if _was_ended_by_cryptsetup(work, container, entry):
            return None
        prepared = moving.find_plan_token(work, container) is not None
    if not prepared:
        moving.remove_preparation(work, node, entry.keyslots)
        _prepare(work, entry, node)
    with luks.Container(node) as container:
        each = moving.find_plan_token(work, container)
        if not each or not each.reencryption:
            raise DiskFailed(f"{node}: the token that was written does not read back")
        plan = each.reencryption.plan
        if not plan.decrypts:
            raise Tampered(f"{node}: its header is of another operation than the journal's", "unlock operation show")
        with disk_keys.unwrap_kek(each, work.persistence) as kek:
            keys = disk_keys.unwrap_reencryption_keys(container, each, kek)
    with keys.old, keys.new:
        relink_mapping.remove_temporary(node)
        phase = reencrypt.settle(node, plan, keys.operation)
        if phase == OLD:
            with reencrypt.Disk(node) as half:
                half.start(mapping, keys.operation, plan)
        elif phase == WHOLE:
            keys.operation.wipe()
            return None
    return Begun(node, plan, keys.operation, mapping)


def _prepare(work: Work, entry: DiskDecryption, node: str) -> None:
    """The operation key's keyslot, then the token with the plan beside the present one, proven. Raises DiskFailed,
    Tampered, NoKey."""
    state, uuid = work.state, entry.member.uuid
    group = state.groups[entry.group]
    raw_header.make_whole(node)
    with luks.Container(node) as container:
        dek = access.find_volume_key(work, container, group)
    deks = disk_keys.ReencryptionKeys(dek, dek, Secret.random(32))
    with dek, deks.operation:
        with reencrypt.Disk(node) as disk:
            slot = disk.add_keyslot(dek, passphrase=deks.operation)
            disk.prefer_keyslot(slot)
        kek, _ = access.find_kek(work, group, {uuid: node})
        with kek, access.token_keys(work, kek=kek, mac_key=state.mac_key(work.persistence, uuid)) as keys:
            with luks.Container(node) as container:
                number, digest = next(
                    (number, each)
                    for number, each in container.metadata["digests"].items()
                    if str(slot) in each["keyslots"]
                )
                facts = reencrypt_plan.digest_facts(digest)
                plan = Plan(int(number), facts, NO_DIGEST, "", slot, slot)
                each = disk_keys.make_token(container, state.host, group, entry.member, dek, keys)
                each = disk_keys.make_reencryption_token(container, each, plan, deks, keys)
            disk_keys.write_token(node, each, dek, keys)


def _was_ended_by_cryptsetup(work: Work, container: luks.Container, entry: DiskDecryption) -> bool:
    """Whether `cryptsetup reencrypt --resume-only` has decrypted the rest: nothing opens the disk then, and no key says
    that the header is right, so there must be a file system. Raises Refused where there is none, and for another disk:
    this one still has its token."""
    header = container.metadata
    final = {"type": "linear", "offset": str(entry.place.offset), "size": "dynamic"}
    if header["segments"] != {"0": final} or header["keyslots"] or container.requirements:
        return False
    if not _has_its_token(work, container, entry):
        raise Refused(
            f"{container.device} has the UUID of {entry.about}, and is another disk",
            "unplug it, and plug in the right one; then: unlock operation resume",
            "another-disk",
        )
    probe = ["blkid", "--probe", "--offset", str(entry.place.offset), "--output", "value", "--match-tag", "TYPE"]
    try:
        return bool(run([*probe, container.device], timeout=60).strip())
    except CommandFailed as error:
        raise Refused(
            f"another program has decrypted {container.device}, and no file system is at byte {entry.place.offset}",
            f"blkid --probe --offset {entry.place.offset} {container.device}",
            code="not-supported",
        ) from error


def _has_its_token(work: Work, container: luks.Container, entry: DiskDecryption) -> bool:
    """Whether it has the KEK of the group, wrapped by the persistence key: no other disk has."""
    try:
        found = disk_keys.read_tokens(container, work.state.host)
    except (NotOurs, Malformed):
        return False
    for each in (each for each in found if each.kek_id == entry.kek):
        for persistence in work.persistence_keys(entry.member.uuid):
            with suppress(Tampered):
                disk_keys.unwrap_kek(each, persistence).wipe()
                return True
    return False


# The end, once all is in clear


def _close(work: Work, entry: DiskDecryption) -> str:
    """Closes the mapping. '' when that is done, else what a person does first."""
    name = devices.active_mapping_name(entry.member.uuid)
    if not name:
        return ""
    again = f"unlock disk decrypt {entry.about}"
    if where := devices.mount_points_on({name}):
        return f"umount {' '.join(where)}; then: {again}"
    try:
        luks.deactivate(name)
    except DiskFailed:
        return f"end what uses it: lsblk /dev/mapper/{name}; then: {again}"
    this_boot.unmark(work.paths, "open", entry.group)
    return ""


def _place(work: Work, entry: DiskDecryption) -> DiskDecryption:
    """The partition, then the journal. Raises Tampered, DiskFailed; then the disk opens as before."""
    node = moving.require_node(work, entry.member)
    with luks.Container(node) as container:
        in_clear = _was_ended_by_cryptsetup(work, container, entry)
    if not in_clear and moving.read_phase(work, node) != WHOLE:
        raise DiskFailed(f"{node} is not decrypted to its end", "unlock operation resume")
    place = partition_table.find_place(node, entry.place.offset, entry.group)
    if place.table == "none":
        place = place._replace(identity=entry.place.identity)
    trace = partition_table.read_trace(place, place.disk)
    entry = _save(work, entry._replace(place=place, trace=trace))  # it may have another name than at the start
    partition_table.put(place, node)
    return _save(work, entry._replace(placed=True))


def _was_placed(work: Work, entry: DiskDecryption) -> bool:
    """Whether a run was cut off just after the disk got its partition, before the journal says so. None counts while a
    header of this disk is elsewhere; the node of the partition itself may show the old header, until the kernel reads
    the table. Raises Refused where two disks are it, or only another one is here."""
    if not entry.trace:
        return False
    disk, other = _find_placed(entry)
    headers = work.look().get(entry.member.uuid, [])
    if other and not disk and not headers:
        raise _not_here(entry, other)
    return bool(disk) and all(partition_table.lies_on(each.node, disk) for each in headers)


def _find_placed(entry: DiskDecryption) -> tuple[str, str]:
    """The disk that has the partition already, and another one that has such a partition; '' for none. Raises Refused
    where two are one of them."""
    found = partition_table.find_disks(entry.place)
    ours = [each for each in found if entry.trace and partition_table.read_trace(entry.place, each) == entry.trace]
    others = [each for each in found if each not in ours]
    for same in ours, [] if ours else others:
        if len(same) > 1:
            raise Refused(f"{same[0]} and {same[1]} are one disk twice", "unplug one of them", "duplicate")
    return next(iter(ours), ""), next(iter(others), "")


def _not_here(entry: DiskDecryption, other: str) -> Refused:
    name, again = entry.about, "plug it in; then: unlock operation resume"
    if other:
        lost = "where it is lost: unlock operation cancel --lost"
        return Refused(f"{other} has the partition of {name}, and is another disk", f"{again}; {lost}", "another-disk")
    return Refused(f"{name} is not here", again, "missing")


def _save(work: Work, entry: DiskDecryption) -> DiskDecryption:
    work.state.journal = entry
    work.state.save()
    return entry


def _finish(work: Work, entry: DiskDecryption, tcti: str) -> None:
    """The group goes, then the header; then the journal is closed. May be killed and run again anywhere. Raises
    Refused when the disk is not here, DiskFailed, TpmFailed."""
    state, members, name = work.state, (entry.member,), entry.about
    disk, other = _find_placed(entry)
    if not disk and entry.group not in state.groups:  # a cut has left a part of the trace
        disk = other
    if not disk:
        raise _not_here(entry, other)
    place = entry.place._replace(disk=disk)
    mount = leaving.describe_mounts(work.paths, entry.group)
    if state.groups.pop(entry.group, None):
        state.save()
    partition_table.tidy(place)
    is_told = partition_table.tell_kernel(place)
    leaving.end_group(work, entry.group, members, tcti, stay=False)
    state.narrowed = _narrowed(name)
    leaving.close(work, entry.group, members, entry.kek)
    words = f"{name} is decrypted: {place.partition} is in clear"
    journald.record(work.paths, messages.DISK_DECRYPTED, words, disk=name, uuid=entry.member.uuid, group=entry.group)
    if not is_told:
        log.note(f"the kernel does not know {place.partition} yet: partprobe {disk}; or reboot")
    if mount:
        log.note(f"{mount} is not mounted at the next boot: it needs a line of fstab, see blkid {place.partition}")
    if name in fstab.crypttab_names(work.paths.crypttab):
        log.note(f"the line of {name} in {work.paths.crypttab} names a disk that is gone: remove it")
