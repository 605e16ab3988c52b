# SPDX-License-Identifier: Apache-2.0
"""`unlock recovery test`, `rotate` and `new`: tests the recovery key on every disk, and replaces it.

    test      each disk: header authenticated, keyslot tried; opens nothing
    rotate    a new key for this host ──> journal ──> delivered to its keeper ──>
              each disk here: keyslot beside the old one, proven; token with the new MAC beside the old one, proven ──>
              state: the new MAC key, and which disks are behind ──>
              each disk here: the old keyslot goes, then the old token; the journal is closed
    new       a keyslot for the present key, on disks that lost theirs or were away when the key was rotated

Until the state has the new MAC key, each disk opens with the old recovery key, from then on with the new one; its
header is authenticated by either. A disk that was away keeps the old key until `new` finds it.

A keyslot is removed only when the state knows its salt: others that are as cheap to try may be those of clevis or
systemd.
"""

import os
import time
from contextlib import AbstractContextManager
from typing import NamedTuple

from .. import journald, log, messages
from ..disks import changes, disk_keys, find, luks, token
from ..disks.groups import Group, Member
from ..errors import DiskFailed, Malformed, NotOurs, Refused, Tampered, UnlockError, Usage
from ..host.journal import NewPersistenceKey, RecoveryRenewal, RecoveryRotation
from ..host.lock import exclusive
from ..host.state import State
from ..keys import access, delivery, escrow, recovery_key
from ..keys.access import Work
from ..paths import TPM_DEVICE, Paths
from ..secret import Secret
from . import new_persistence_key

VERSION = 1
_LEAKED = "the recovery key has leaked"


class Tested(NamedTuple):
    """The result of the test on one disk."""

    disk: str
    """Mapping name."""
    group: str
    device: str
    outcome: str
    """ok, wrong-key, altered (the header is not what this host wrote), absent, or failed."""
    detail: str = ""


STATUS = {
    "ok": 0,
    "absent": UnlockError.status,
    "wrong-key": NotOurs.status,
    "failed": DiskFailed.status,
    "altered": Tampered.status,
}
"""Exit status of each outcome; the last in this order counts."""


class Changed(NamedTuple):
    """The result of `rotate` and `new`."""

    done: tuple[str, ...]
    """Mapping names of the disks that have the key now."""
    behind: tuple[str, ...]
    """Mapping names of the disks that do not: they were away."""


class PresentMember(NamedTuple):
    """A member that is here."""

    group: Group
    member: Member
    node: str


# Test


def test_recovery_key(paths: Paths, recovery: Secret, look: find.Look = find.look) -> list[Tested]:
    """Tests the recovery key on every member of every group. Needs no other key. Records when each disk was last ok,
    until a test on it fails. Raises Refused."""
    with exclusive(paths):
        state = State.load(paths)
        seen = look()
        found = [
            _test(state, group, member, find.find_node(seen, member), len(seen.get(member.uuid, ())), recovery)
            for group in state.groups.values()
            for member in group.members
        ]
        try:
            state.save()
        except OSError as error:
            log.error(f"the test is not recorded: {paths.state} cannot be written: {error.strerror}", "df /var")
        return found


def _test(state: State, group: Group, member: Member, node: str, count: int, recovery: Secret) -> Tested:
    row = Tested(member.name, group.name, node, "ok")
    if not node:
        return row._replace(outcome="absent", detail=f"{count} disks have its UUID" if count else "")
    state.recovery.tested.pop(member.uuid, None)
    try:
        with luks.Container(node) as container:
            slot, dek = _open_authenticated(state, container, recovery)
            dek.wipe()
            state.recovery.keyslots[member.uuid] = container.salt(slot)
    except Tampered as error:
        return row._replace(outcome="altered", detail=str(error))
    except NotOurs as error:
        return row._replace(outcome="wrong-key", detail=_explain_wrong_key(state, member) or str(error))
    except UnlockError as error:
        return row._replace(outcome="failed", detail=str(error))
    state.recovery.tested[member.uuid] = int(time.time())
    return row


def _open_authenticated(state: State, container: luks.Container, recovery: Secret) -> tuple[int, Secret]:
    """Keyslot and volume key, after a check of the header's MAC. Raises NotOurs for another key, Tampered,
    DiskFailed."""
    trouble: UnlockError | None = None
    try:
        for each in disk_keys.read_tokens(container, state.host):
            try:
                disk_keys.dek_by_checked_recovery_key(container, each, recovery).wipe()
                return disk_keys.recovery_keyslot(container, recovery)
            except UnlockError as error:
                trouble = error
    except UnlockError as error:
        disk_keys.dek_by_recovery_key(container, recovery).wipe()
        raise Tampered(f"this host's token is gone or ruined: {error}") from error
    assert trouble
    raise trouble


def _explain_wrong_key(state: State, member: Member) -> str:
    away = member.uuid in state.recovery.behind
    return "it was away when the key was rotated: unlock recovery new" if away else ""


def exit_status(rows: list[Tested]) -> int:
    """The exit status of `unlock recovery test`: that of the worst outcome."""
    order = list(STATUS)
    return STATUS[max((each.outcome for each in rows), key=order.index, default="ok")]


# Rotate and new


def rotate_recovery_key(
    paths: Paths,
    keep: delivery.Keeper,
    look: find.Look = find.look,
    connect: access.Connect = access.connect,
    *,
    leaked: bool = False,
    tcti: str = TPM_DEVICE,
    owner_auth: Secret | None = None,
) -> Changed:
    """Gives every disk of this host a new recovery key; the old one is not needed. `leaked`: whoever had it may have
    read more of this host, so that a new persistence key follows.

    A failure before every disk has the new key is undone; what fails later is left to `renew_keyslots`. After a kill
    the same command finishes with the key that it had made, and makes sure that its keeper has it. Raises Refused,
    NoKey, ProviderError, DiskFailed, Usage, Malformed, CommandFailed, OSError.
    """
    if leaked and _awaits_persistence_key(State.load(paths)):
        return _finish_leaked(paths, keep, look, tcti, owner_auth)
    new_persistence_key.finish(paths, tcti, owner_auth, look)
    changed = _rotate(paths, keep, look, connect, leaked)
    new_persistence_key.replace_if_due(paths, tcti, owner_auth, look)
    return changed


def _awaits_persistence_key(state: State) -> bool:
    """Whether `rotate --leaked` was killed when every disk had the new recovery key."""
    journal = state.journal.before if isinstance(state.journal, NewPersistenceKey) else state.journal
    return state.narrowed == _LEAKED and not isinstance(journal, RecoveryRotation)


def _finish_leaked(
    paths: Paths, keep: delivery.Keeper, look: find.Look, tcti: str, owner_auth: Secret | None
) -> Changed:
    """The second half of `rotate --leaked`. Raises Refused when `keep` names a place that the first has not used."""
    for file in filter(None, _destinations(keep)):
        if not os.path.exists(file):
            raise Refused(
                f"the recovery key was rotated already, and is not in {file}", "unlock rekey --fresh", code="unfinished"
            )
    new_persistence_key.replace_if_due(paths, tcti, owner_auth, look)
    state = State.load(paths)
    members = [member for group in state.groups.values() for member in group.members]
    away = state.recovery.behind
    return Changed(
        tuple(each.name for each in members if each.uuid not in away),
        tuple(each.name for each in members if each.uuid in away),
    )


def _record(paths: Paths, message: messages.Message, words: str, changed: Changed) -> Changed:
    journald.record(paths, message, words, disks=changed.done, behind=changed.behind)
    return changed


def _rotate(paths: Paths, keep: delivery.Keeper, look: find.Look, connect: access.Connect, leaked: bool) -> Changed:
    with exclusive(paths), Work(paths, look, connect) as work:
        state = work.state
        if not state.has_recovery_key:
            raise Refused("this host has no recovery key yet", "unlock group create", code="no-recovery-key")
        if leaked:
            state.narrowed = _LEAKED
        places, absent = _present_and_absent(work)
        if not places:
            raise Refused("no disk of this host is here", "unlock status", code="missing")
        begun = state.unfinished(RecoveryRotation, "rotate")
        entry = begun or _begin_rotation(work, places, keep)
        with state.unwrap_recovery_key(work.persistence, entry.key) as recovery:
            try:
                entry = _deliver(work, entry, keep, recovery)
            except BaseException:
                if not begun:
                    state.journal = None
                    state.save()
                raise
            if not entry.written:
                _write_or_undo(work, places, recovery)
                state.journal = entry._replace(written=True)
                _use_new_key(work, places, recovery, [member.uuid for member in absent])
            changed = _finish_disks(work, recovery)
            return _record(paths, messages.RECOVERY_KEY_ROTATED, "the recovery key was replaced", changed)


def renew_keyslots(
    paths: Paths,
    recovery: Secret,
    look: find.Look = find.look,
    connect: access.Connect = access.connect,
) -> Changed:
    """Gives every disk that is here the present recovery key, and removes earlier ones. Writes nothing where that is
    so.

    Killed, the same command finishes. Raises Refused for another key, NoKey, ProviderError, DiskFailed.
    """
    with exclusive(paths), Work(paths, look, connect) as work:
        if work.state.has_recovery_key and not work.state.journal and _is_known_to_disks_alone(work, recovery):
            _take_from_disks(work, recovery)
        check_recovery_key(work.state, persistence=work.persistence, recovery=recovery)
        work.state.begin(RecoveryRenewal("recovery", "new"))
        changed = _finish_disks(work, recovery)
        words = f"the recovery key opens {', '.join(changed.done) or 'no disk that is here'}"
        return _record(paths, messages.RECOVERY_KEY_WRITTEN, words, changed)


def check_recovery_key(state: State, *, persistence: Secret, recovery: Secret) -> None:
    """Raises Refused unless it is the recovery key of this host."""
    if not state.has_recovery_key:
        raise Refused("this host has no recovery key yet", "unlock group create", code="no-recovery-key")
    if not access.is_recovery_key(state, persistence=persistence, recovery=recovery):
        raise Refused("this is not the recovery key of this host", "unlock recovery rotate", code="recovery-key")


def _is_known_to_disks_alone(work: Work, recovery: Secret) -> bool:
    """Whether the root file system was brought back from before a rotation: every disk that is here, but for those of
    which the state knows an earlier key, is authenticated by this key and not by that of the state."""
    state = work.state
    with disk_keys.mac_key(recovery, state.host) as typed, state.mac_key(work.persistence) as known:
        if typed == known:
            return False
        places = [each for each in _present_and_absent(work)[0] if each.member.uuid not in state.recovery.behind]
        return bool(places) and all(
            _is_authenticated(work, each, typed) and not _is_authenticated(work, each, known) for each in places
        )


def _is_authenticated(work: Work, place: PresentMember, mac_key: Secret) -> bool:
    """Whether a token that this host's persistence key proves has a recovery MAC by this key."""
    with luks.Container(place.node) as container:
        for each in disk_keys.read_tokens(container, work.state.host):
            try:
                disk_keys.check_recovery(container, each, mac_key)
            except Tampered:
                continue
            if any(disk_keys.is_authentic(container, each, key) for key in work.persistence_keys(place.member.uuid)):
                return True
    return False


def _take_from_disks(work: Work, recovery: Secret) -> None:
    """Makes it the recovery key of this host, as its disks say. Those that are away may have it or an earlier one."""
    state = work.state
    log.note("the disks have another recovery key than the state, which is older: this one is right")
    absent = [each.uuid for each in _present_and_absent(work)[1]]
    with disk_keys.mac_key(recovery, state.host) as mac_key:
        state.change_mac_key(persistence=work.persistence, mac_key=mac_key, behind=absent)
    state.recovery.tested.clear()
    state.save()


def _begin_rotation(work: Work, places: list[PresentMember], keep: delivery.Keeper) -> RecoveryRotation:
    """Makes a new recovery key and journals the rotation, durably. Raises Refused, Usage, Malformed, CommandFailed."""
    state = work.state
    state.refuse_other("recovery", "rotate")
    _check_known(work, places)
    if keep.file and os.path.lexists(keep.file):
        raise Usage(f"{keep.file} exists already", f"{delivery.FLAG} with a file that does not exist yet")
    if keep.escrow:
        escrow.check_escrow(keep.escrow)
    with recovery_key.new() as key:
        wrapped = state.wrap_recovery_key(persistence=work.persistence, recovery=key)
    file, escrow_file = _destinations(keep)
    entry = RecoveryRotation(
        "recovery", "rotate", key=wrapped, file=file, escrow=escrow_file, kept=False, written=False
    )
    state.begin(entry)
    return entry


def _destinations(keep: delivery.Keeper) -> tuple[str, str]:
    """Absolute paths of the key's file and of the escrow file, '' for none."""
    return (
        os.path.abspath(keep.file) if keep.file else "",
        os.path.abspath(keep.escrow.file) if keep.escrow else "",
    )


def _deliver(work: Work, entry: RecoveryRotation, keep: delivery.Keeper, recovery: Secret) -> RecoveryRotation:
    """Delivers the key before any disk depends on it; returns the journal entry that says so. Whoever finishes a killed
    rotation names another place, or none where the key was delivered: raises Refused when it is not there any more."""
    file, escrow_file = _destinations(keep)
    if entry.kept and not file and not escrow_file:
        _check_delivered(entry, recovery)
        return entry
    if keep.escrow and escrow_file != entry.escrow:
        escrow.check_escrow(keep.escrow)
    delivery.deliver(keep, recovery)
    entry = entry._replace(file=file, escrow=escrow_file, kept=True)
    work.state.journal = entry
    work.state.save()
    return entry


def _check_delivered(entry: RecoveryRotation, recovery: Secret) -> None:
    """Raises Refused when the delivered key is gone: its file may have been lost in a power cut."""
    places = [each for each in (entry.file, entry.escrow) if each]
    if os.path.exists(entry.file):
        with delivery.read_recovery_key(entry.file) as held:
            if held == recovery:
                return
    if places and not os.path.exists(entry.escrow):
        raise Refused(
            f"the new recovery key is not in {' or '.join(places)} any more, and the old one is about to go",
            f"unlock recovery rotate {delivery.FLAG} FILE, which writes it again",
            code="recovery-key-gone",
        )


def _check_known(work: Work, places: list[PresentMember]) -> None:
    """Raises Refused when the keyslot that is to go cannot be told from an operator's own."""
    for each in places:
        with luks.Container(each.node) as container:
            if container.cheap_keyslots() and not _recovery_keyslots(work.state, container):
                raise Refused(
                    f"which keyslot of {each.member.name} takes the present recovery key is not known",
                    "unlock recovery test, with that key, finds it; if it is lost: cryptsetup luksKillSlot",
                    code="unknown-keyslot",
                )


def _recovery_keyslots(state: State, container: luks.Container) -> list[int]:
    """The keyslots of recovery keys whose salt the state knows."""
    known = {state.recovery.keyslots.get(container.uuid), *state.recovery.former.get(container.uuid, ())}
    return [slot for slot in container.cheap_keyslots() if container.salt(slot) in known]


def _present_and_absent(work: Work) -> tuple[list[PresentMember], list[Member]]:
    """Members that are here, and those that are not."""
    places: list[PresentMember] = []
    absent: list[Member] = []
    for group in work.state.groups.values():
        nodes = work.nodes(group)
        places += [PresentMember(group, each, nodes[each.uuid]) for each in group.members if each.uuid in nodes]
        absent += [each for each in group.members if each.uuid not in nodes]
    return places, absent


def _write_or_undo(work: Work, places: list[PresentMember], recovery: Secret) -> None:
    for number, each in enumerate(places, 1):
        try:
            _write_keyslot_and_token(work, each, recovery)
        except UnlockError as error:
            for begun in places[:number]:
                _remove_new(work, begun, recovery)
            work.state.journal = None
            work.state.save()
            raise _with_disk_name(each, error) from error


def _with_disk_name(place: PresentMember, error: UnlockError) -> UnlockError:
    """The same error, with the disk's name."""
    return type(error)(f"{place.member.name}: {error}", error.hint, error.code)


def _write_keyslot_and_token(work: Work, place: PresentMember, recovery: Secret) -> None:
    """Writes keyslot and token beside the old ones, and proves each from a fresh read. Writes neither again where it is
    there already."""
    with luks.Container(place.node) as container:
        facts = container.facts()
        dek = access.find_volume_key(work, container, place.group)
    with dek:
        with luks.Container(place.node) as container:
            changes.require_unchanged(container, facts)
            disk_keys.ensure_recovery_keyslot(container, dek=dek, recovery=recovery)
        with luks.Container(place.node) as container, disk_keys.dek_by_recovery_key(container, recovery) as found:
            if found != dek:
                raise DiskFailed(f"{place.node}: the keyslot that was written gives another key")
        with _token_keys(work, place.group, recovery) as keys:
            with luks.Container(place.node) as container:
                changes.require_unchanged(container, facts)
                each = disk_keys.make_token(container, work.state.host, place.group, place.member, dek, keys)
            disk_keys.write_token(place.node, each, dek, keys)


def _use_new_key(work: Work, places: list[PresentMember], recovery: Secret, behind: list[str]) -> None:
    """Saves the new MAC key, and which keyslots are to be removed: from here on the new recovery key counts."""
    state = work.state
    for each in places:
        _remember_keyslot(state, each, recovery)
    with disk_keys.mac_key(recovery, state.host) as mac_key:
        state.change_mac_key(persistence=work.persistence, mac_key=mac_key, behind=behind)
    state.recovery.tested.clear()
    state.save()


def _remember_keyslot(state: State, place: PresentMember, recovery: Secret) -> None:
    """Records the salt of the key's keyslot on this disk; the keyslot that was recorded before becomes a former one."""
    with luks.Container(place.node) as container:
        slot, dek = disk_keys.recovery_keyslot(container, recovery)
        dek.wipe()
        salt = container.salt(slot)
    before = state.recovery.keyslots.get(place.member.uuid, salt)
    if before != salt:
        state.recovery.former.setdefault(place.member.uuid, []).append(before)
    state.recovery.keyslots[place.member.uuid] = salt
    state.recovery.behind.pop(place.member.uuid, None)


def _finish_disks(work: Work, recovery: Secret) -> Changed:
    """Gives every disk that is here the key, then removes what is left of earlier keys, and closes the journal.

    A disk that fails does not stop the others. Raises the last failure at the end; the journal is closed then too, as
    the state records for each disk what is left to do.
    """
    state = work.state
    trouble: UnlockError | None = None
    done: list[str] = []
    places, absent = _present_and_absent(work)
    for each in places:
        try:
            _write_keyslot_and_token(work, each, recovery)
            _remember_keyslot(state, each, recovery)
            state.save()
            _remove_former(work, each, recovery)
            done.append(each.member.name)
        except UnlockError as error:
            trouble = _with_disk_name(each, error)
    state.journal = None
    state.save()
    if trouble:
        trouble.hint = trouble.hint or "unlock recovery new, when it is mended"
        raise trouble
    return Changed(tuple(done), tuple(each.name for each in absent if state.recovery.is_behind(each.uuid)))


def _remove_former(work: Work, place: PresentMember, recovery: Secret) -> None:
    """Removes former keyslots, then other tokens. In this order, a former key is reported as a wrong key, not as an
    altered header."""
    former = work.state.recovery.former.get(place.member.uuid, [])
    with luks.Container(place.node) as container:
        slot, dek = disk_keys.recovery_keyslot(container, recovery)
        for other in container.cheap_keyslots():
            if other != slot and container.salt(other) in former:
                container.remove_keyslot(other)
    with dek, _token_keys(work, place.group, recovery) as keys:
        with luks.Container(place.node) as container:
            each = disk_keys.make_token(container, work.state.host, place.group, place.member, dek, keys)
        disk_keys.drop_other_tokens(place.node, each, dek, keys)
    if former:
        del work.state.recovery.former[place.member.uuid]
        work.state.save()


def _remove_new(work: Work, place: PresentMember, recovery: Secret) -> None:
    """Removes token and keyslot of a key that is not used after all. Raises DiskFailed: the journal stays open then."""
    with luks.Container(place.node) as container, disk_keys.mac_key(recovery, work.state.host) as mac_key:
        try:
            slot, dek = disk_keys.recovery_keyslot(container, recovery)
        except (NotOurs, Tampered, Malformed):  # this disk was not begun
            return
        dek.wipe()
        for number, fields in container.tokens(token.TYPE):
            try:
                disk_keys.check_recovery(container, token.decode(fields), mac_key)
                container.remove_token(number)
            except (Tampered, Malformed):
                continue
        container.remove_keyslot(slot)


def _token_keys(work: Work, group: Group, recovery: Secret) -> AbstractContextManager[disk_keys.Keys]:
    """What a member's token is made with, its MAC by the key that belongs to `recovery`."""
    kek, _ = access.find_kek(work, group)
    return access.token_keys(work, kek=kek, mac_key=disk_keys.mac_key(recovery, work.state.host))
