# SPDX-License-Identifier: Apache-2.0
"""`unlock disk encrypt`: encrypts a disk that holds data, in place, and makes it the only member of a new group.

    checks ──> the header in a file in /var: keyslots, token ──> journal ──> what makes the file system smaller, in a
    file too ──> first part of the data copied to the free end, durable ──> journal: moved ──> superblock gone, file
    system made smaller, header on the disk ──> state: a group; journal: written ──> open, as far as it can be ──> step
    by step, from the end to the start (disks.reencrypt) ──> what was in clear at the end overwritten, header finished
    ──> token for the finished header, proven ──> the operation key and the old token go ──> journal closed, narrowed
    ──> a new persistence key

Until `moved` the disk is what it was, and an error is undone. While the header is written nothing opens the disk, for
less than a second: after a cut in there, `resume` writes it again from the file, before anything else has touched the
disk; the part that was moved tells which disk it is. Once `written`, the disk opens like any other, in early boot too,
and can only go forward. What needs a person, the recovery key, comes before the journal.

The header of that time has a part in clear. Put back later, it would be authentic, and what is written to that part
would go out in clear: so the persistence key is replaced at the end, and the group's KEK must be kept on this host,
wrapped by that. The recovery key opens such a header only while the journal has the operation (boot.gate).
"""

import os
import stat
import uuid as uuids
from collections.abc import Callable
from contextlib import suppress
from typing import NamedTuple

from .. import journald, log, messages
from ..disks import (
    devices,
    disk_keys,
    encrypt,
    find,
    fstab,
    header,
    luks,
    reencrypt,
    reencrypt_plan,
    shrink,
    token,
    udev,
)
from ..disks.encrypt_plan import RESERVED, SHIFT
from ..disks.groups import Group, Member, check_name
from ..disks.reencrypt import Tell
from ..disks.reencrypt_plan import NEW, NO_DIGEST, Plan
from ..errors import DiskFailed, Malformed, Refused, UnlockError
from ..host import config, this_boot
from ..host.journal import DiskEncryption
from ..host.lock import alone, exclusive
from ..host.state import State
from ..keys import access, rotation
from ..keys.access import Work
from ..keys.escrow import Escrow
from ..paths import TPM_DEVICE, Paths, sync_folder
from ..predict.boot_tree import BootTree
from ..secret import Secret
from ..strictjson import canonical
from . import consent as agreement
from . import membership, moving, new_persistence_key, relink_mapping
from .consent import Consent
from .consent import Plan as Steps
from .moving import Begun
from .throttled import Throttled

SMALLEST = 2 * RESERVED
"""Bytes of a disk that can be encrypted."""
_HEADER_FILE = "encrypt.header"
SPARE = 4 << 20
"""Bytes that are left free in /var beside the file of the header."""
VOLATILE: tuple[str, ...] = ("tmpfs", "ramfs")

_LOCK = "encrypt.lock", "another process encrypts the disk already"
"""One process at a time moves data: its lock, and what another one is told."""


class Choices(NamedTuple):
    """What a person gives."""

    device: str
    group: str
    name: str = ""
    """Mapping name; '' for one made of the group's."""
    recovery_file: str = ""
    """Read if it exists, else written; '' asks at the terminal."""
    escrow: Escrow | None = None
    max_rate: int = 0
    """Bytes a second at most; 0 for no limit."""


class Outcome(NamedTuple):
    """The result."""

    group: str
    disk: str
    """Mapping name."""
    outcome: str
    """`done`, or `stopped`: it goes on with the same command."""


def encrypt_disk(
    paths: Paths,
    choices: Choices,
    tell: Tell,
    consent: Consent = agreement.agree,
    look: find.Look = find.look,
    connect: access.Connect = access.connect,
    tcti: str = TPM_DEVICE,
) -> Outcome | None:
    """Encrypts the disk, or goes on with that. None when the plan was only shown.

    Raises Usage, Refused, DiskFailed, CommandFailed, ProviderError: then the disk holds what it held, in clear, or the
    same command goes on.
    """
    check_name(choices.group)
    if _has_ended(State.load(paths), choices.group):  # it was cut off after the disk was done
        return _end(paths, look, tcti, choices.group)
    with exclusive(paths), Work(paths, look, connect) as work:
        work.settings.check()
        state = work.state
        begun = state.journal if isinstance(state.journal, DiskEncryption) else None
        if begun and begun.group == choices.group:
            if not consent(Steps((f"go on with the encryption of {begun.member.name}",))):
                return None
        else:
            state.refuse_other("disk encrypt", f"{choices.device} --group {choices.group}")
            found = _check(work, choices)
            if not consent(Steps(_describe(found, choices))):
                return None
            try:
                _prepare(work, choices, found)
            except UnlockError:
                rotation.retire_or_tell(work)
                raise
    return resume(paths, tell, look, connect, tcti)


def resume(
    paths: Paths,
    tell: Tell,
    look: find.Look = find.look,
    connect: access.Connect = access.connect,
    tcti: str = TPM_DEVICE,
) -> Outcome | None:
    """Goes on with what the journal says, without a person; None where that has no encryption. `tell` gets the bytes
    that are done and those of the disk; when it returns True, the run stops there, and the disk opens.

    Raises Refused when the disk is not here, or another process does it; DiskFailed, Tampered.
    """
    with alone(paths, *_LOCK):
        with exclusive(paths), Work(paths, look, connect) as work:
            entry = work.state.journal
            if not isinstance(entry, DiskEncryption):
                return None
            if entry.moved and not entry.written and _is_in_clear(entry):
                entry = _save(work, entry._replace(moved=""))  # it may have been mounted since
            if not entry.moved:
                entry = _make_room_and_move(work, entry)
            is_new = not entry.written
            if is_new:
                entry = _put_header(work, entry)
            begun = _settle(work, entry)
            if begun and is_new:
                begun = _open(work, entry, begun)
        if begun is not None:
            begun.move(Throttled(tell, entry.rate).tell)
        with exclusive(paths), Work(paths, look, connect) as work:
            if begun is not None and reencrypt.settle(begun.node, begun.plan, None) != NEW:
                return Outcome(entry.group, entry.member.name, "stopped")
            _clean(work, entry)
    return _end(paths, look, tcti, entry.group)


def _has_ended(state: State, group: str) -> bool:
    """Whether only the new persistence key is left."""
    due = new_persistence_key.is_due(state) and group in state.groups
    return due and state.narrowed == _narrowed(state.groups[group].members[0].name)


def _narrowed(name: str) -> str:
    return f"{name} was encrypted in place"


def _end(paths: Paths, look: find.Look, tcti: str, group: str) -> Outcome:
    """The new persistence key, which makes the headers of the time before open nothing."""
    new_persistence_key.replace_if_due(paths, tcti, look=look)
    return Outcome(group, State.load(paths).groups[group].members[0].name, "done")


def cancel(paths: Paths, look: find.Look = find.look, connect: access.Connect = access.connect) -> list[str]:
    """Gives up an encryption before the header may be on the disk. Returns what a person
    should know. Raises Refused when the header may be on the disk: it can only go forward."""
    with alone(paths, *_LOCK), exclusive(paths), Work(paths, look, connect) as work:
        entry = work.state.journal
        if not isinstance(entry, DiskEncryption):
            return []
        if entry.moved:
            raise Refused(
                f"{entry.member.name} is half encrypted, and can only go forward",
                "unlock operation resume; where the disk is lost for good: unlock operation cancel --lost",
                code="cannot-cancel",
            )
        _undo(work)
        return [f"{entry.node} holds what it held, in clear; a btrfs may be {RESERVED >> 20} MiB smaller than the disk"]


def give_up(paths: Paths, consent: Consent = agreement.agree, look: find.Look = find.look) -> list[str] | None:
    """Ends an encryption whose disk is lost, so that other operations may begin. Returns what a person should know;
    None when the plan was only shown. Raises Refused when the disk is here."""
    with alone(paths, *_LOCK), exclusive(paths), Work(paths, look, access.connect) as work:
        entry = work.state.journal
        if not isinstance(entry, DiskEncryption):
            return []
        _refuse_here(work, entry)
        name = entry.member.name
        lost = f"what {name} holds: this host will not open it, half encrypted as it is, should it come back"
        if not consent(Steps((f"give up the encryption of {name}, which was {entry.node}",), (lost,), name)):
            return None
        if entry.written:
            work.state.narrowed = f"{name}, half in clear, is lost"
        elif config.load(paths.config).groups.get(entry.group) == _settings_of(entry.group):  # none of a person
            config.remove_group(paths.config, entry.group)
        _undo(work)
    if not entry.written:
        return [f"{name} is in no group; whether it holds what it held, in clear: wipefs DEV"]
    return [f"group {entry.group} has lost its only disk: unlock group delete {entry.group}", "next: unlock sync"]


def _refuse_here(work: Work, entry: DiskEncryption) -> None:
    """Raises Refused when the disk is here, or one that may be it."""
    here = find.find_node(work.look(), entry.member)
    for search in (_find_in_clear, _find_moved) if not (here or entry.written) else ():
        try:
            here = search(entry)
        except Refused as error:
            if error.code != "missing":
                raise
    if here:
        raise Refused(f"{entry.member.name} is here: {here}", "unlock operation resume", code="present")


# Checks, before anything is changed


class _Disk(NamedTuple):
    """A disk that can be encrypted."""

    node: str
    size: int
    serial: str
    name: str
    """Mapping name that it gets."""
    file_system: shrink.FileSystem

    @property
    def clear(self) -> int:
        """Bytes that the file system may have."""
        return self.size - RESERVED


def _check(work: Work, choices: Choices) -> _Disk:
    """Raises Usage, Refused, CommandFailed."""
    state, group = work.state, choices.group
    node = membership.device_node(choices.device)
    _check_unused(node)
    _check_in_clear(state, node)
    if group in state.groups:
        raise Refused(
            f"there is a group {group} already, and what is on {node} would not open without its other disks",
            "--group OTHER, which then begins",
            code="group-exists",
        )
    settings = work.settings.group(group)
    if not state.persistent or (settings and settings.policy == "provider"):
        raise Refused(
            f"the key of group {group} would not be kept on this host, and then an old copy of the header of {node}, "
            "from the time when it was half in clear, could be put back",
            "unlock persistence enable; or copy the data to a new group: unlock group create",
            code="needs-persistence",
        )
    size = luks.disk_size(node)
    if size < SMALLEST:
        raise Refused(f"{node} is smaller than {SMALLEST >> 20} MiB", "unlock group create, and copy", "too-small")
    found = shrink.read_file_system(node)
    shrink.check_end_is_free(node, found, size - RESERVED)
    if source := fstab.source_of_node(work.paths.fstab, node):
        raise Refused(
            f"{work.paths.fstab} mounts {source}, which will not be the file system any more",
            f"edit it: UUID={found.uuid} in place of {source}",
            code="fstab",
        )
    _check_var(work.paths)
    moving.require_initramfs(BootTree(work.paths))
    name = membership.choose_mapping_name(state, "", None, group, choices.name)
    return _Disk(node, size, udev.find_disk(node).serial, name, found)


def _check_unused(node: str) -> None:
    """Raises Refused, with what to do."""
    if node in devices.nodes_below("/"):
        raise Refused(
            f"{node} holds the root file system, which cannot be encrypted in place",
            "install the system again on an encrypted disk; then: unlock disk adopt",
            code="root-disk",
        )
    if used := devices.describe_use(node):
        where = used.partition(" is mounted on ")[2]
        hint = f"umount {where}; the same command again; it can be mounted again soon after" if where else "lsblk"
        raise Refused(f"{node} is in use: {used}", hint, code="in-use")


def _check_in_clear(state: State, node: str) -> None:
    """Raises Refused."""
    number = os.stat(node).st_rdev
    if devices.is_encrypted(f"{os.major(number)}:{os.minor(number)}"):
        raise Refused(f"{node} lies on an encrypted disk already", "unlock disk list", "luks")
    if not header.read_luks_version(node):
        return
    hosts: set[str] = set()
    half = False
    with suppress(UnlockError), luks.Container(node) as container:
        half = header.REENCRYPTION in str(container.requirements)
        hosts = {str(fields.get("host")) for _, fields in container.tokens(token.TYPE)}
    if hosts and state.host not in hosts:
        raise Refused(f"{node} is LUKS, and a disk of another host", f"unlock disk adopt {node}", "other-host")
    if half:
        what = f"{node} is LUKS, and another program has begun to re-encrypt it"
        raise Refused(
            what, f"cryptsetup reencrypt --resume-only {node}; then: unlock disk adopt {node} --group G", "luks"
        )
    raise Refused(f"{node} is LUKS already", f"unlock disk adopt {node} --group G", "luks")


def _check_var(paths: Paths) -> None:
    """Raises Refused unless the file of the header has room, and outlives a power cut."""
    folder = os.path.dirname(paths.state)
    where = os.path.realpath(folder)
    while not os.path.ismount(where):
        where = os.path.dirname(where)
    if devices.mount_type(where) in VOLATILE:
        raise Refused(f"{folder} is in memory, and the header is kept there first", "lsblk", "volatile")
    room = os.statvfs(folder)
    if room.f_bavail * room.f_frsize < SHIFT + SPARE:
        raise Refused(f"{folder} has no room for {SHIFT >> 20} MiB", f"df {folder}", "no-space")


def _describe(found: _Disk, choices: Choices) -> tuple[str, ...]:
    node, kind = found.node, found.file_system.kind
    room = f"make the {kind} on {node} smaller, to {found.clear >> 20} MiB"
    rate = f", at most {choices.max_rate} bytes a second" if choices.max_rate else ""
    return (
        f"check the {kind} on {node}",
        *([room] if found.file_system.size > found.clear else []),
        f"a new key-encryption key for group {choices.group}, {node} its only disk, as {found.name}",
        f"move the first {SHIFT >> 20} MiB of {node} to its end, and put the header there",
        f"encrypt {node}, {found.clear >> 20} MiB{rate}; it is told to be in clear until the last sector is done",
        "a new persistence key, so that no header from before opens anything",
    )


# The header in its file, with what a person gives


def _header_file(paths: Paths) -> str:
    return os.path.join(os.path.dirname(paths.state), _HEADER_FILE)


def _changes_file(paths: Paths) -> str:
    """What makes the file system smaller."""
    return f"{_header_file(paths)}.changes"


def _prepare(work: Work, choices: Choices, found: _Disk) -> None:
    """The file of the header, durable, then the journal. Raises ProviderError, DiskFailed, Refused, OSError."""
    state, path = work.state, _header_file(work.paths)
    with membership.obtain_recovery_key(state, work.persistence, choices.recovery_file, choices.escrow) as recovery:
        member = Member(str(uuids.uuid4()), found.name, found.serial)
        manifest = state.next_manifest(choices.group)
        group, kek = membership.new_group(work, choices.group, (member,), manifest)
        fine = found.file_system.block < 4096 or found.size % 4096
        try:
            with Secret.random(64) as dek, Secret.random(32) as operation:
                encrypt.prepare(path, found.node, dek, uuid=member.uuid, sector=512 if fine else 0)
                with encrypt.Prepared(path, found.node) as prepared:
                    recovery_slot = prepared.add_keyslot(dek, passphrase=recovery)
                    slot = prepared.add_keyslot(dek, passphrase=operation)
                    prepared.prefer_keyslot(slot)
                    plan = _make_plan(prepared, slot, found.clear)
                    mac_key = disk_keys.mac_key(recovery, state.host)
                    with access.token_keys(work, kek=kek, mac_key=mac_key) as keys:
                        deks = disk_keys.ReencryptionKeys(dek, dek, operation)
                        each = disk_keys.make_token(prepared, state.host, group, member, dek, keys)
                        each = disk_keys.make_reencryption_token(prepared, each, plan, deks, keys)
                    prepared.set_token(token.encode(each))
                    salt = prepared.salt(recovery_slot)
                _prove(work, path, dek, operation, recovery)
            encrypt.sync(path)
        except BaseException:
            with suppress(OSError):
                os.unlink(path)
            raise
    state.begin(
        DiskEncryption(
            "disk encrypt",
            f"{choices.device} --group {choices.group}",
            group=group.name,
            kek=(group.kek, group.kek_name),
            generation=group.generation,
            manifest=group.manifest,
            member=member,
            recovery=salt,
            node=found.node,
            file_system=found.file_system.uuid,
            size=found.size,
            first="",
            moved="",
            written=False,
            rate=choices.max_rate,
        )
    )


def _make_plan(prepared: encrypt.Prepared, slot: int, clear: int) -> Plan:
    number, digest = next(iter(prepared.metadata["digests"].items()))
    return Plan(NO_DIGEST, "", int(number), reencrypt_plan.digest_facts(digest), slot, slot, clear)


def _prove(work: Work, path: str, dek: Secret, operation: Secret, recovery: Secret) -> None:
    """The header as the next boot will read it gives the keys. Raises DiskFailed, Tampered, NotOurs."""
    with luks.Container(path) as container:
        each = disk_keys.read_tokens(container, work.state.host)[0]
        with disk_keys.unwrap_kek(each, work.persistence) as kek:
            keys = disk_keys.unwrap_reencryption_keys(container, each, kek)
        with keys.old, keys.new, keys.operation, disk_keys.dek_by_recovery_key(container, recovery) as found:
            if (keys.new, keys.operation, found) != (dek, operation, dek):
                raise DiskFailed(f"{path}: the header that was made does not read back")


def _undo(work: Work) -> None:
    """Closes the journal of an encryption that has changed nothing that counts; the KEK is of no use then."""
    _remove_files(work.paths)
    work.state.journal = None
    work.state.save()
    rotation.retire_or_tell(work)


def _remove_files(paths: Paths) -> None:
    for path in (_header_file(paths), _changes_file(paths)):
        with suppress(FileNotFoundError):
            os.unlink(path)
    sync_folder(os.path.dirname(paths.state))


# Onto the disk


def _make_room_and_move(work: Work, entry: DiskEncryption) -> DiskEncryption:
    """What makes the file system smaller, and its first part copied to the free end. The disk holds what it held.
    Raises Refused when the disk is not here or in use; for what else fails the journal is closed."""
    node = _find_in_clear(entry)
    _check_unused(node)
    path, clear = _header_file(work.paths), entry.size - RESERVED
    try:
        found = shrink.read_file_system(node)
        changes: list[shrink.Change] = []
        if found.kind in shrink.EXT:
            changes = shrink.plan_smaller_ext(node, found, clear, f"{path}.scratch")
        else:
            shrink.shrink_btrfs(node, found, clear, os.path.join(work.paths.run, "encrypt"))
        encrypt.write_changes(_changes_file(work.paths), changes)
        _check_unused(node)
        operation, plan = _operation_key(work, path)
        with operation:
            if _phase(path, plan) == NEW:  # else it was cut off after its file was written
                done = encrypt.start(path, node, operation, plan.new_keyslot, clear, changes)
            else:
                done = encrypt.move_again(path, node, clear, changes)
    except (UnlockError, OSError):
        _undo(work)
        log.note(f"{node} holds what it held, in clear")
        raise
    return _save(work, entry._replace(first=done.first, moved=done.moved))


def _put_header(work: Work, entry: DiskEncryption) -> DiskEncryption:
    """The header on the disk, and the group in the state. Raises Refused when the disk is not here or another
    program has written to it, DiskFailed."""
    path = _header_file(work.paths)
    node = find.find_node(work.look(), entry.member) or _find_moved(entry)
    changes = _changes_file(work.paths)
    reencrypt.unlock_after_kill(node)  # of another disk with this device number
    done = encrypt.Moved(entry.first, entry.moved)
    encrypt.put(path, node, done, entry.size - RESERVED, encrypt.read_changes(changes))
    group = Group(
        entry.group, entry.kek[0], entry.generation, entry.manifest, (entry.member,), entry.kek[1], "persistent"
    )
    membership.add_to_config(work.paths, _settings_of(group.name))
    work.state.groups[group.name] = group
    work.state.recovery.keyslots[entry.member.uuid] = entry.recovery
    entry = _save(work, entry._replace(written=True))
    _remove_files(work.paths)
    return entry


def _settings_of(group: str) -> config.GroupConfig:
    """What unlock.toml gets for it."""
    return config.GroupConfig(group, "", "", "", config.DEADLINE)


def _save(work: Work, entry: DiskEncryption) -> DiskEncryption:
    work.state.journal = entry
    work.state.save()
    return entry


def _operation_key(work: Work, device: str) -> tuple[Secret, Plan]:
    """From the token of a header. Raises Tampered, NotOurs, Malformed."""
    with luks.Container(device) as container:
        for each in disk_keys.read_tokens(container, work.state.host):
            if each.reencryption:
                with disk_keys.unwrap_kek(each, work.persistence) as kek:
                    keys = disk_keys.unwrap_reencryption_keys(container, each, kek)
                keys.old.wipe()
                keys.new.wipe()
                return keys.operation, each.reencryption.plan
    raise Malformed(f"{device} has no token of its encryption", "unlock status")


def _phase(path: str, plan: Plan) -> str:
    with luks.Container(path) as container:
        return reencrypt_plan.phase(container, plan)


# Which disk it is, before it has a header


def _find_in_clear(entry: DiskEncryption) -> str:
    """The disk of that size with that file system. Raises Refused."""
    return _find(entry, lambda node: shrink.file_system_uuid(node) == entry.file_system)


def _is_in_clear(entry: DiskEncryption) -> bool:
    """Whether no byte of the header has reached the disk."""
    try:
        return bool(_find_in_clear(entry))
    except Refused as error:
        if error.code != "missing":
            raise
        return False


def _find_moved(entry: DiskEncryption) -> str:
    """The disk of that size that has the moved part at its end. Raises Refused."""

    def is_it(node: str) -> bool:
        try:
            return encrypt.digest_of_part(node, entry.size - SHIFT) == entry.moved
        except DiskFailed:
            return False

    return _find(entry, is_it)


def _find(entry: DiskEncryption, is_it: Callable[[str], bool]) -> str:
    nodes = dict.fromkeys([entry.node, *(f"/dev/{each}" for each in sorted(os.listdir("/sys/class/block")))])
    there: list[str] = []
    for each in nodes:
        if _size(each) == entry.size and is_it(each):
            if each == entry.node:
                return each
            there.append(each)
    if len(there) == 1:
        return there[0]
    words = "there twice" if there else "not here"
    raise Refused(f"the disk that was {entry.node} is {words}", "plug it in; then: unlock operation resume", "missing")


def _size(node: str) -> int:
    """Bytes; 0 for no block device."""
    try:
        return luks.disk_size(node) if stat.S_ISBLK(os.stat(node).st_mode) else 0
    except (OSError, DiskFailed):
        return 0


# While data moves, and the end


def _settle(work: Work, entry: DiskEncryption) -> Begun | None:
    """Brings the header to where the data can move. None when all is encrypted. Raises DiskFailed, Tampered, Refused
    when the disk is not here or a killed run has left its mapping."""
    node = moving.require_node(work, entry.member)
    mapping = devices.active_mapping_name(entry.member.uuid)
    relink_mapping.refuse_left(mapping, "encrypted")
    with luks.Container(node) as container:
        if not any(each.reencryption for each in disk_keys.read_tokens(container, work.state.host)):
            return None
    operation, plan = _operation_key(work, node)
    reencrypt.unlock_after_kill(node)
    if reencrypt.settle(node, plan, operation) == NEW:
        operation.wipe()
        return None
    return Begun(node, plan, operation, mapping)


def _open(work: Work, entry: DiskEncryption, begun: Begun) -> Begun:
    """Opens the disk, so that it can be mounted while its data moves. Where it cannot be opened, the data moves all the
    same, and nothing opens it meanwhile."""
    name = entry.member.name
    try:
        with luks.Container(begun.node) as container:
            expected = reencrypt_plan.plan_facts(container, begun.plan)
        reencrypt.activate(begun.node, name, begun.plan, begun.operation, expected)
    except UnlockError as error:
        log.note(f"{name} is not open while its data moves: {error}")
        return begun
    this_boot.mark_open(work.paths, entry.group, [name])
    log.note(f"/dev/mapper/{name} can be mounted now, while its data moves")
    return begun._replace(mapping=name)


def _clean(work: Work, entry: DiskEncryption) -> None:
    """The token for the finished header; then the operation key goes, then the other token; then the journal is closed.
    May be killed and run again anywhere. Raises DiskFailed, Tampered."""
    state, node = work.state, moving.require_node(work, entry.member)
    group = state.groups[entry.group]
    kek, _ = access.find_kek(work, group, {entry.member.uuid: node})
    with access.token_keys(work, kek=kek, mac_key=state.mac_key(work.persistence, entry.member.uuid)) as keys:
        with luks.Container(node) as container:
            slots = [
                each.reencryption.plan.new_keyslot
                for each in disk_keys.read_tokens(container, state.host)
                if each.reencryption
            ]
            dek = access.find_volume_key(work, container, group)
            each = disk_keys.make_token(container, state.host, group, entry.member, dek, keys)
            state.headers[entry.member.uuid] = canonical(container.facts()).decode()
        with dek:
            disk_keys.write_token(node, each, dek, keys)
            with luks.Container(node) as container:
                for slot in {*slots} & {*container.keyslots()}:
                    container.remove_keyslot(slot)
            disk_keys.drop_other_tokens(node, each, dek, keys)
    state.journal = None
    state.narrowed = _narrowed(entry.member.name)
    state.save()
    name = entry.member.name
    words = f"{name} is encrypted to its last sector"
    journald.record(work.paths, messages.DISK_ENCRYPTED, words, disk=name, uuid=entry.member.uuid, group=entry.group)
    if devices.active_mapping_name(entry.member.uuid) == name:
        this_boot.mark_open(work.paths, entry.group, [name])
