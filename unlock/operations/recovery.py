# SPDX-License-Identifier: Apache-2.0
"""`unlock recovery`: is the key that the operator keeps the one that opens the disks; and another key instead.

    test      each disk: header authenticated, keyslot tried; nothing is opened
    rotate    a new key for this host ──> journal ──> with its keeper ──>
              each disk here: keyslot beside the old one, proven; token with the new MAC beside the old one, proven ──>
              state: the new MAC key, and which disks are behind ──>
              each disk here: the old keyslot goes, then the old token; the journal is closed
    new       a new keyslot for the key that there is, on disks that lost theirs or were away when it was rotated

Until the state says otherwise each disk opens with the old key, from then on with the new one, its header authenticated
either way. A disk that was away keeps the old key until `new` finds it.

A keyslot is taken away only when the state knows its salt: others that are as cheap to try are not ours (clevis and
systemd make such).
"""

import os
import time
from typing import NamedTuple

from ..disks import disk_keys, find, luks, token
from ..disks.groups import Group, Member
from ..errors import DiskFailed, Malformed, NotOurs, Refused, Tampered, UnlockError, Usage
from ..host.journal import RecoveryRenewal, RecoveryRotation
from ..host.lock import exclusive
from ..host.state import State
from ..keys import access, delivery, escrow, recovery_key
from ..keys.access import Work
from ..paths import Paths
from ..secret import Secret

VERSION = 1


class Tested(NamedTuple):
    """What the recovery key is worth on one disk."""

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
    """Mapping names of the disks that have the key now, and of those that do not: they were away."""

    done: tuple[str, ...]
    behind: tuple[str, ...]


class Place(NamedTuple):
    """A member that is here."""

    group: Group
    member: Member
    node: str


# Test


def test(paths: Paths, recovery: Secret, look: find.Look = find.look) -> list[Tested]:
    """Every member of every group. Needs no other key; remembers when each disk last was ok. Raises Refused."""
    with exclusive(paths):
        state = State.load(paths)
        seen = look()
        found = [
            _test(state, group, member, find.find_node(seen, member), len(seen.get(member.uuid, ())), recovery)
            for group in state.groups.values()
            for member in group.members
        ]
        state.save()
        return found


def _test(state: State, group: Group, member: Member, node: str, count: int, recovery: Secret) -> Tested:
    row = Tested(member.name, group.name, node, "ok")
    if not node:
        return row._replace(outcome="absent", detail=f"{count} disks have its UUID" if count else "")
    try:
        with luks.Container(node) as container:
            slot, dek = _authentic(state, container, recovery)
            dek.wipe()
            state.recovery.keyslots[member.uuid] = container.salt(slot)
    except Tampered as error:
        return row._replace(outcome="altered", detail=str(error))
    except NotOurs as error:
        return row._replace(outcome="wrong-key", detail=_behind_says(state, member) or str(error))
    except UnlockError as error:
        return row._replace(outcome="failed", detail=str(error))
    state.recovery.tested[member.uuid] = int(time.time())
    return row


def _authentic(state: State, container: luks.Container, recovery: Secret) -> tuple[int, Secret]:
    """Keyslot and volume key, the header's MAC checked first. Raises NotOurs for another key, Tampered, DiskFailed."""
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


def _behind_says(state: State, member: Member) -> str:
    away = member.uuid in state.recovery.behind
    return "it was away when the key was rotated: unlock recovery new" if away else ""


def status(rows: list[Tested]) -> int:
    """The exit status."""
    order = list(STATUS)
    return STATUS[max((each.outcome for each in rows), key=order.index, default="ok")]


# Rotate and new


def rotate(
    paths: Paths,
    keep: delivery.Keep,
    look: find.Look = find.look,
    connect: access.Connect = access.connect,
) -> Changed:
    """A new recovery key for every disk of this host; the old one is not needed.

    A failure before every disk has it is undone; what fails later is left to `new`. After a kill the same command
    finishes with the key that it had made, and sees to it that its keeper has it.
    Raises Refused, NoKey, ProviderError, DiskFailed, Usage, Malformed, CommandFailed, OSError.
    """
    with exclusive(paths), Work(paths, look, connect) as work:
        state = work.state
        if not state.has_recovery_key:
            raise Refused("this host has no recovery key yet", "unlock group create", code="no-recovery-key")
        places, absent = _places(work)
        if not places:
            raise Refused("no disk of this host is here", "unlock status", code="missing")
        begun = state.unfinished(RecoveryRotation, "rotate")
        entry = begun or _begin(work, places, keep)
        with state.unwrap_recovery_key(work.persistence, entry.key) as recovery:
            try:
                entry = _hand_out(work, entry, keep, recovery)
            except BaseException:
                if not begun:
                    state.journal = None
                    state.save()
                raise
            if not entry.written:
                _write_or_undo(work, places, recovery)
                state.journal = entry._replace(written=True)
                _switch(work, places, recovery, [member.uuid for member in absent])
            return _finish(work, recovery)


def new(
    paths: Paths,
    recovery: Secret,
    look: find.Look = find.look,
    connect: access.Connect = access.connect,
) -> Changed:
    """Every disk that is here takes the present recovery key, and no earlier one. Writes nothing where that is so.

    Killed, the same command finishes. Raises Refused for another key, NoKey, ProviderError, DiskFailed.
    """
    with exclusive(paths), Work(paths, look, connect) as work:
        check_present(work.state, work.persistence, recovery)
        work.state.begin(RecoveryRenewal("recovery", "new"))
        return _finish(work, recovery)


def check_present(state: State, persistence: Secret, recovery: Secret) -> None:
    """Raises Refused unless it is the recovery key of this host."""
    if not state.has_recovery_key:
        raise Refused("this host has no recovery key yet", "unlock group create", code="no-recovery-key")
    with disk_keys.mac_key(recovery, state.host) as mac_key, state.mac_key(persistence) as expected:
        if mac_key != expected:
            raise Refused("this is not the recovery key of this host", "unlock recovery rotate", code="recovery-key")


def _begin(work: Work, places: list[Place], keep: delivery.Keep) -> RecoveryRotation:
    """The journal's entry, with a new key."""
    state = work.state
    state.refuse_other("recovery", "rotate")
    _check_known(work, places)
    if keep.file and os.path.lexists(keep.file):
        raise Usage(f"{keep.file} exists already", f"{delivery.FLAG} with a file that does not exist yet")
    if keep.escrow:
        escrow.check(keep.escrow)
    with recovery_key.new() as key:
        wrapped = state.wrap_recovery_key(persistence=work.persistence, recovery=key)
    file, escrow_file = _where(keep)
    entry = RecoveryRotation(
        "recovery", "rotate", key=wrapped, file=file, escrow=escrow_file, kept=False, written=False
    )
    state.begin(entry)
    return entry


def _where(keep: delivery.Keep) -> tuple[str, str]:
    """Absolute paths of the key's file and of the escrow file, '' for none."""
    return (
        os.path.abspath(keep.file) if keep.file else "",
        os.path.abspath(keep.escrow.file) if keep.escrow else "",
    )


def _hand_out(work: Work, entry: RecoveryRotation, keep: delivery.Keep, recovery: Secret) -> RecoveryRotation:
    """Durable before any disk depends on it. Whoever finishes a rotation names another place, or leaves the key where
    it is: Refused when it is not there any more."""
    file, escrow_file = _where(keep)
    if entry.kept and not file and not escrow_file:
        _check_kept(entry, recovery)
        return entry
    if keep.escrow and escrow_file != entry.escrow:
        escrow.check(keep.escrow)
    delivery.hand(keep, recovery)
    entry = entry._replace(file=file, escrow=escrow_file, kept=True)
    work.state.journal = entry
    work.state.save()
    return entry


def _check_kept(entry: RecoveryRotation, recovery: Secret) -> None:
    """It may have been in memory when the power went. Raises Refused."""
    places = [each for each in (entry.file, entry.escrow) if each]
    if os.path.exists(entry.file):
        with delivery.given(entry.file) as held:
            if held == recovery:
                return
    if places and not os.path.exists(entry.escrow):
        raise Refused(
            f"the new recovery key is not in {' or '.join(places)} any more, and the old one is about to go",
            f"unlock recovery rotate {delivery.FLAG} FILE, which writes it again",
            code="recovery-key-gone",
        )


def _check_known(work: Work, places: list[Place]) -> None:
    """Raises Refused when the keyslot that is to go cannot be told from an operator's own."""
    for each in places:
        with luks.Container(each.node) as container:
            if container.cheap_keyslots() and not _ours(work.state, container):
                raise Refused(
                    f"which keyslot of {each.member.name} takes the present recovery key is not known",
                    "unlock recovery test, with that key, finds it; if it is lost: cryptsetup luksKillSlot",
                    code="unknown-keyslot",
                )


def _ours(state: State, container: luks.Container) -> list[int]:
    """The keyslots of recovery keys, as far as the state knows them."""
    known = {state.recovery.keyslots.get(container.uuid), *state.recovery.former.get(container.uuid, ())}
    return [slot for slot in container.cheap_keyslots() if container.salt(slot) in known]


def _places(work: Work) -> tuple[list[Place], list[Member]]:
    """Members that are here, and those that are not."""
    places: list[Place] = []
    absent: list[Member] = []
    for group in work.state.groups.values():
        nodes = work.nodes(group)
        places += [Place(group, each, nodes[each.uuid]) for each in group.members if each.uuid in nodes]
        absent += [each for each in group.members if each.uuid not in nodes]
    return places, absent


def _write_or_undo(work: Work, places: list[Place], recovery: Secret) -> None:
    for number, each in enumerate(places, 1):
        try:
            _write(work, each, recovery)
        except UnlockError as error:
            for begun in places[:number]:
                _undo(work, begun, recovery)
            work.state.journal = None
            work.state.save()
            raise _of(each, error) from error


def _of(place: Place, error: UnlockError) -> UnlockError:
    """The same, with the disk's name."""
    return type(error)(f"{place.member.name}: {error}", error.hint, error.code)


def _write(work: Work, place: Place, recovery: Secret) -> None:
    """Keyslot and token beside what is there, each proven from a fresh read. Nothing that is there is written twice."""
    with luks.Container(place.node) as container:
        dek = access.dek(work, container, place.group)
    with dek:
        with luks.Container(place.node) as container:
            try:
                disk_keys.dek_by_recovery_key(container, recovery).wipe()
            except NotOurs:
                container.add_keyslot(dek, recovery)
        with luks.Container(place.node) as container, disk_keys.dek_by_recovery_key(container, recovery) as found:
            if found != dek:
                raise DiskFailed(f"{place.node}: the keyslot that was written gives another key")
        with _Keys(work, place.group, recovery) as keys:
            with luks.Container(place.node) as container:
                each = disk_keys.make_token(container, work.state.host, place.group, place.member, dek, keys)
            disk_keys.write_token(place.node, each, dek, keys)


def _switch(work: Work, places: list[Place], recovery: Secret, behind: list[str]) -> None:
    """From here on the new key counts. Which keyslots go is remembered in the same save."""
    state = work.state
    for each in places:
        _note(state, each, recovery)
    with disk_keys.mac_key(recovery, state.host) as mac_key:
        state.change_mac_key(persistence=work.persistence, mac_key=mac_key, behind=behind)
    state.recovery.tested.clear()
    state.save()


def _note(state: State, place: Place, recovery: Secret) -> None:
    """The disk has the key: what its keyslot was before is former."""
    with luks.Container(place.node) as container:
        slot, dek = disk_keys.recovery_keyslot(container, recovery)
        dek.wipe()
        salt = container.salt(slot)
    before = state.recovery.keyslots.get(place.member.uuid, salt)
    if before != salt:
        state.recovery.former.setdefault(place.member.uuid, []).append(before)
    state.recovery.keyslots[place.member.uuid] = salt
    state.recovery.behind.pop(place.member.uuid, None)


def _finish(work: Work, recovery: Secret) -> Changed:
    """All disks that are here: the key is on them, then nothing of an earlier one. One disk's trouble stops no other.

    Raises that trouble at the end. The journal is closed then too: the state says of each disk what is left to do.
    """
    state = work.state
    trouble: UnlockError | None = None
    done: list[str] = []
    places, absent = _places(work)
    for each in places:
        try:
            _write(work, each, recovery)
            _note(state, each, recovery)
            state.save()
            _clean(work, each, recovery)
            done.append(each.member.name)
        except UnlockError as error:
            trouble = _of(each, error)
    state.journal = None
    state.save()
    if trouble:
        trouble.hint = trouble.hint or "unlock recovery new, when it is mended"
        raise trouble
    return Changed(tuple(done), tuple(each.name for each in absent if _lags(state, each)))


def _lags(state: State, member: Member) -> bool:
    return member.uuid in state.recovery.behind or member.uuid in state.recovery.former


def _clean(work: Work, place: Place, recovery: Secret) -> None:
    """Former keyslots first: a key whose keyslot is gone is a wrong key, not an altered header. Then other tokens."""
    former = work.state.recovery.former.get(place.member.uuid, [])
    with luks.Container(place.node) as container:
        slot, dek = disk_keys.recovery_keyslot(container, recovery)
        for other in container.cheap_keyslots():
            if other != slot and container.salt(other) in former:
                container.remove_keyslot(other)
    with dek, _Keys(work, place.group, recovery) as keys:
        with luks.Container(place.node) as container:
            each = disk_keys.make_token(container, work.state.host, place.group, place.member, dek, keys)
        disk_keys.drop_other_tokens(place.node, each, dek, keys)
    if former:
        del work.state.recovery.former[place.member.uuid]
        work.state.save()


def _undo(work: Work, place: Place, recovery: Secret) -> None:
    """Token and keyslot of a key that is not used after all. Raises DiskFailed: the journal stays open then."""
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


class _Keys:
    """What a member's token is made with, wiped together."""

    def __init__(self, work: Work, group: Group, recovery: Secret) -> None:
        kek, _ = access.find_kek(work, group)
        self._keys = disk_keys.Keys(
            Secret(bytes(work.persistence)), work.host_key(), kek, disk_keys.mac_key(recovery, work.state.host)
        )

    def __enter__(self) -> disk_keys.Keys:
        return self._keys

    def __exit__(self, *_: object) -> None:
        for each in self._keys:
            each.wipe()
