# SPDX-License-Identifier: Apache-2.0
"""`unlock rekey --deep`: a new KEK, then a new volume key for each disk: all data is re-encrypted, while it is in use.

    checks ──> new KEK (rekey) ──> journal ──> each disk: keyslots for its new volume key, the token with the plan ──>
    journal: prepared ──> one disk after another: started ──> hotzone by hotzone ──> header finished ──>
    token for the new volume key, proven ──> keyslots of the old one and the operation key go, then the old token ──>
    state: the disk is done; the last one closes the journal

What needs a person, the recovery key and operators' passphrases, comes before `prepared`. Until then a killed run is
taken back; from then on `resume` goes on by itself, with what the tokens say. A disk that has been started opens by
either kind of key at every instant (disks.reencrypt), at boot too, and can only go forward.

The lock of all commands is held for the steps that change headers, not while data moves: sync and status go on. The
journal keeps every other operation away.
"""

from collections.abc import Callable, Sequence
from typing import NamedTuple

from .. import journald, log, messages
from ..disks import adoptable, devices, disk_keys, find, luks, raw_header, reencrypt, reencrypt_plan, token
from ..disks.groups import Group, Member
from ..disks.reencrypt import Tell
from ..disks.reencrypt_plan import NEW, OLD, Plan
from ..errors import DiskFailed, NotOurs, Refused, UnlockError, Usage
from ..host.journal import DeepRekey, DeepRekeyDisk, Rekey
from ..host.lock import alone, exclusive
from ..keys import access, rotation
from ..keys.access import Work
from ..paths import Paths
from ..predict.boot_tree import BootTree
from ..secret import Secret
from ..strictjson import canonical
from . import consent as agreement
from . import moving, relink_mapping
from .consent import Consent
from .consent import Plan as Steps
from .moving import Begun
from .throttled import Throttled

ALL = "--all"
"""In place of a group, in the journal: every group."""

_LOCK = "rekey-deep.lock", "another process re-encrypts the disks already"
"""One process at a time moves data: its lock, and what another one is told."""


class Choices(NamedTuple):
    """What a person gives."""

    group: str
    """Its name; '' for all."""
    recovery: Callable[[], Secret]
    """Reads the recovery key, where it is needed: not to go on with disks that are prepared."""
    passphrases: Sequence[Secret] = ()
    """Of operators' keyslots, so that those open the new volume key too."""
    max_rate: int = 0
    """Bytes a second at most; 0 for no limit."""


class Outcome(NamedTuple):
    """The result for one disk."""

    group: str
    disk: str
    """Mapping name."""
    outcome: str
    """`done`; `stopped`: it goes on with `unlock rekey --deep`; `away`: it keeps its volume key; or an error's code."""
    detail: str = ""
    hint: str = ""


class _Place(NamedTuple):
    """A member that is here."""

    group: Group
    member: Member
    node: str


# The command


def rekey_deep(
    paths: Paths,
    choices: Choices,
    tell: Tell,
    consent: Consent = agreement.agree,
    look: find.Look = find.look,
    connect: access.Connect = access.connect,
) -> list[Outcome]:
    """Gives the disks of a group, or of all, new volume keys, or goes on with that. Returns the outcomes; empty when
    the plan was only shown.

    Raises Usage, Refused, NotOurs, NoKey, ProviderError, DiskFailed: then no volume key has changed.
    """
    with alone(paths, *_LOCK):
        outcomes = _prepare_or_find(paths, choices, consent, look, connect)
        return [] if outcomes is None else [*outcomes, *_go_on(paths, tell, look, connect)]


def _prepare_or_find(
    paths: Paths, choices: Choices, consent: Consent, look: find.Look, connect: access.Connect
) -> list[Outcome] | None:
    """Outcomes of disks that are not here; the journal has the others, prepared. None when the plan was only shown."""
    about = choices.group or ALL
    with exclusive(paths), Work(paths, look, connect) as work:
        if choices.group and choices.group not in work.state.groups:
            raise Usage(f"there is no group {choices.group}", "unlock status")
        if not _is_rotating(work, choices.group):
            work.state.refuse_other("rekey --deep", about)
        entry = work.state.unfinished(DeepRekey, about)
        if entry and not entry.prepared:
            _take_back(work, entry.disks)
            entry = None
        if entry is None:
            places, outcomes = _find_places(work, choices.group)
            with choices.recovery() as recovery:
                _check(work, places, choices, recovery)
                if not consent(Steps(_describe(places, choices))):
                    return None
                _prepare_all(work, about, places, choices, recovery)
        else:
            if not consent(Steps((f"go on with {len(entry.disks)} disk(s)",))):
                return None
            outcomes = []
        return outcomes


def _is_rotating(work: Work, group: str) -> bool:
    """Whether a run was killed while a group got its new KEK: the next one finishes that first."""
    return isinstance(work.state.journal, Rekey) and group in ("", work.state.journal.about)


def resume(
    paths: Paths, tell: Tell, look: find.Look = find.look, connect: access.Connect = access.connect
) -> list[Outcome]:
    """Finishes what the journal says, or takes it back where a person must give the recovery key again. `tell` gets the
    bytes that are done and those of all disks that were left; when it returns True, the run stops at once, and the
    journal keeps what is left.

    A disk that fails does not stop the others. Raises Refused when another process does it.
    """
    with alone(paths, *_LOCK):
        return _go_on(paths, tell, look, connect)


def _go_on(paths: Paths, tell: Tell, look: find.Look, connect: access.Connect) -> list[Outcome]:
    with exclusive(paths), Work(paths, look, connect) as work:
        entry = work.state.journal
        if not isinstance(entry, DeepRekey):
            return []
        if not entry.prepared:
            _take_back(work, entry.disks)
            raise Refused(
                "it was cut off before a disk had begun, and was taken back",
                f"unlock rekey --deep {entry.about}",
                code="taken-back",
            )
        sizes = _sizes(work, entry)
    outcomes: list[Outcome] = []
    done = 0
    for disk in entry.disks:
        progress = Throttled(tell, entry.rate, done, sum(sizes.values()))
        try:
            outcomes.append(_do_disk(paths, disk, progress, look, connect))
        except UnlockError as error:
            name = _name_of(paths, look, connect, disk.uuid)
            outcomes.append(Outcome(*name, error.code, str(error), error.hint))
        if progress.stops:
            break
        done += sizes.get(disk.uuid, 0)
    return outcomes


def cancel(paths: Paths, look: find.Look = find.look, connect: access.Connect = access.connect) -> list[str]:
    """Takes back what was prepared. Returns the mapping names of disks that keep their volume key. Raises Refused when
    a disk is half re-encrypted: it can only go forward."""
    with alone(paths, *_LOCK), exclusive(paths), Work(paths, look, connect) as work:
        entry = work.state.journal
        if not isinstance(entry, DeepRekey):
            return []
        lost = "where it is lost for good: unlock operation cancel --lost"
        if entry.prepared and (away := _names(work, _away(work, entry))):
            words = f"{', '.join(away)}: not here, and may be half re-encrypted"
            raise Refused(words, f"plug it in, then the same command; {lost}", code="missing")
        for disk in entry.disks:
            if (place := _place(work, disk.uuid)) and moving.read_phase(work, place.node) not in ("", OLD):
                raise Refused(
                    f"{place.member.name} is half re-encrypted, and can only go forward",
                    "unlock operation pause; to go on: unlock operation resume",
                    code="cannot-cancel",
                )
        return _take_back(work, entry.disks)


def give_up(paths: Paths, consent: Consent = agreement.agree, look: find.Look = find.look) -> list[str] | None:
    """Takes disks that are lost from the operation; it ends, where none is left to do. They stay in their groups.
    Returns what a person should know; None when the plan was only shown. Raises Refused when every disk is here."""
    with alone(paths, *_LOCK), exclusive(paths), Work(paths, look, access.connect) as work:
        entry = work.state.journal
        if not isinstance(entry, DeepRekey):
            return []
        lost = _away(work, entry)
        names = _names(work, lost)
        if not names:
            hint = "unlock operation resume; if one does not work any more: take it out, then the same command"
            raise Refused("every disk that is left to do is here", hint, code="present")
        what = f"what {', '.join(names)} holds, half re-encrypted perhaps: nothing goes on with it, should it come back"
        if not consent(Steps((f"give up the re-encryption of {', '.join(names)}",), (what,), names[0])):
            return None
        _save_without(work, lost)
        left = work.state.journal
        groups = [(each, member.name) for each in work.state.groups.values() for member in each.members]
    lines = []
    for group, name in groups:
        if name in names:
            others = f"disk replace {name} NEW, or unlock disk forget {name}"
            what = others if len(group.members) > 1 else f"group delete {group.name}"
            lines.append(f"{name} is still in group {group.name}: unlock {what}")
    return [*lines, *(["the other disks go on: unlock operation resume"] if left else [])]


def _away(work: Work, entry: DeepRekey) -> tuple[DeepRekeyDisk, ...]:
    """The disks that are left to do and not here."""
    return tuple(disk for disk in entry.disks if not _place(work, disk.uuid))


def _names(work: Work, disks: Sequence[DeepRekeyDisk]) -> list[str]:
    """Mapping names; the UUID of one that is in no group any more."""
    known = {member.uuid: member.name for group in work.state.groups.values() for member in group.members}
    return [known.get(each.uuid, each.uuid) for each in disks]


# Checks, before anything is changed


def _find_places(work: Work, name: str) -> tuple[list[_Place], list[Outcome]]:
    """The members that are here, and an outcome for each that is not. Raises Refused when none is here."""
    places, outcomes = [], []
    for group in work.state.groups.values() if not name else [work.state.groups[name]]:
        nodes = work.nodes(group)
        for member in group.members:
            if member.uuid in nodes:
                places.append(_Place(group, member, nodes[member.uuid]))
            else:
                why = "it is not here, and keeps its volume key"
                outcomes.append(Outcome(group.name, member.name, "away", why, f"unlock rekey --deep {group.name}"))
    if not places:
        raise Refused(f"no disk of {name or 'any group'} is here", "unlock status", code="missing")
    return places, outcomes


def _check(work: Work, places: list[_Place], choices: Choices, recovery: Secret) -> None:
    """Raises Refused, NotOurs, DiskFailed, Tampered."""
    state = work.state
    if not access.is_recovery_key(state, persistence=work.persistence, recovery=recovery):
        raise Refused("this is not the recovery key of this host", "unlock recovery test", code="recovery-key")
    moving.require_initramfs(BootTree(work.paths))
    for place in places:
        reencrypt.unlock_after_kill(place.node)
        with luks.Container(place.node) as container:
            access.find_volume_key(work, container, place.group).wipe()  # authenticates the header
            adoptable.check_supported(container, container.disk_size, container.volume_key_size)
            if state.recovery.is_behind(place.member.uuid):
                raise Refused(f"{place.member.name} takes an earlier recovery key", "unlock recovery new", "recovery")
            extra = _operators_keyslots(container, place, choices, recovery)
            adoptable.check_room_for(container, container.volume_key_size, keyslots=3 + len(extra))
        reencrypt.choose_resilience(place.node, 512)
        relink_mapping.refuse_left(devices.active_mapping_name(place.member.uuid), "re-encrypted")


def _operators_keyslots(
    container: luks.Container, place: _Place, choices: Choices, recovery: Secret
) -> dict[int, Secret]:
    """Keyslots of the volume key that are none of ours, with the passphrase of each. Raises Refused for those without
    one, NotOurs when the recovery key has no keyslot."""
    try:
        ours, dek = disk_keys.recovery_keyslot(container, recovery)
    except NotOurs as error:
        raise NotOurs(str(error), "unlock recovery new", "no-key") from error
    dek.wipe()
    digests = container.metadata["digests"]
    covering = next(each for each in digests.values() if each["segments"])
    found: dict[int, Secret] = {}
    unknown = []
    for slot in sorted(map(int, covering["keyslots"])):
        if slot == ours:
            continue
        for passphrase in choices.passphrases:
            try:
                container.volume_key(passphrase, slot).wipe()
            except NotOurs:
                continue
            found[slot] = passphrase
            break
        else:
            unknown.append(str(slot))
    if unknown:
        raise Refused(
            f"{place.member.name} ({place.node}): keyslot {', '.join(unknown)} would open nothing afterwards",
            f"--passphrase-file FILE with its passphrase; or: cryptsetup luksKillSlot {place.node} {unknown[0]}",
            code="keyslots",
        )
    return found


def _describe(places: list[_Place], choices: Choices) -> tuple[str, ...]:
    names = ", ".join(each.member.name for each in places)
    groups = ", ".join(dict.fromkeys(each.group.name for each in places))
    rate = f", at most {choices.max_rate} bytes a second" if choices.max_rate else ""
    return (
        f"a new key-encryption key for {groups}",
        f"keyslots for new volume keys, and tokens that open either, on {names}",
        *(f"re-encrypt {each.member.name} ({each.node}){rate}" for each in places),
        "remove the keyslots of the old volume key from each disk that is done",
    )


# Preparing, with what a person gives


def _prepare_all(work: Work, about: str, places: list[_Place], choices: Choices, recovery: Secret) -> None:
    """New KEKs, then keyslots and token on each disk. Takes the disks back when one fails. Raises what fails."""
    unfinished = work.state.journal.about if work.state.journal else ""
    for name in sorted({each.group.name for each in places}, key=lambda name: (name != unfinished, name)):
        outcome = rotation.rotate_kek(work, name)
        for disk, why in outcome.behind.items():
            log.error(f"{disk}: {why}: it opens with its old key until it is back", "when it is back: unlock sync")
    places = [each._replace(group=work.state.groups[each.group.name]) for each in places]
    disks = []
    for each in places:
        with luks.Container(each.node) as container:
            disks.append(DeepRekeyDisk(each.member.uuid, tuple(container.keyslots()), ""))
    entry = DeepRekey("rekey --deep", about, tuple(disks), prepared=False, rate=choices.max_rate)
    work.state.begin(entry)
    try:
        salts = [_prepare(work, each, choices, recovery) for each in places]
    except UnlockError:
        _take_back(work, entry.disks)
        raise
    ready = tuple(each._replace(recovery=salt) for each, salt in zip(disks, salts, strict=True))
    work.state.journal = entry._replace(disks=ready, prepared=True)
    work.state.save()


def _prepare(work: Work, place: _Place, choices: Choices, recovery: Secret) -> str:
    """Keyslots for a new volume key, which cover nothing yet, then the token with the plan, each durable. Returns the
    salt of the recovery key's new keyslot. Raises DiskFailed, Tampered."""
    with luks.Container(place.node) as container:
        old = access.find_volume_key(work, container, place.group)
        extra = _operators_keyslots(container, place, choices, recovery)
    raw_header.make_whole(place.node)
    deks = disk_keys.ReencryptionKeys(old, Secret.random(len(old)), Secret.random(32))
    with deks.old, deks.new, deks.operation:
        with reencrypt.Disk(place.node) as disk:
            old_slot = disk.add_keyslot(deks.old, passphrase=deks.operation)
            disk.prefer_keyslot(old_slot)
            new_slot = disk.add_unbound_keyslot(deks.new, deks.operation, reuse=False, preferred=True)
            recovery_slot = disk.add_unbound_keyslot(deks.new, recovery, reuse=True)
            for passphrase in extra.values():
                disk.add_unbound_keyslot(deks.new, passphrase, reuse=True, is_random=False)
        _write_plan(work, place, deks, old_slot=old_slot, new_slot=new_slot)
        with luks.Container(place.node) as container:
            _prove_keyslots(container, deks, recovery, (old_slot, new_slot, recovery_slot))
            return container.salt(recovery_slot)


def _write_plan(work: Work, place: _Place, deks: disk_keys.ReencryptionKeys, *, old_slot: int, new_slot: int) -> None:
    """The token for the time of the re-encryption, beside the present one, and proven. Raises DiskFailed, Tampered."""
    mac_key = work.state.mac_key(work.persistence, place.member.uuid)
    with _kek(work, place) as kek, access.token_keys(work, kek=kek, mac_key=mac_key) as keys:
        with luks.Container(place.node) as container:
            plan = _make_plan(container, old_slot, new_slot)
            each = disk_keys.make_token(container, work.state.host, place.group, place.member, deks.old, keys)
            each = disk_keys.make_reencryption_token(container, each, plan, deks, keys)
        disk_keys.write_token(place.node, each, deks.old, keys)
        with luks.Container(place.node) as container:
            found = disk_keys.unwrap_reencryption_keys(container, _plan_token(work, container), keys.kek)
            with found.old, found.new, found.operation:
                if (found.new, found.operation) != (deks.new, deks.operation):
                    raise DiskFailed(f"{place.node}: the token that was written does not read back")


def _kek(work: Work, place: _Place) -> Secret:
    return access.find_kek(work, place.group, {place.member.uuid: place.node})[0]


def _make_plan(container: luks.Container, old_slot: int, new_slot: int) -> Plan:
    """Raises Malformed."""
    digests = container.metadata["digests"]
    numbers = [
        next(number for number, each in digests.items() if str(slot) in each["keyslots"])
        for slot in (old_slot, new_slot)
    ]
    old, new = ((int(each), reencrypt_plan.digest_facts(digests[each])) for each in numbers)
    return Plan(*old, *new, old_slot, new_slot)


def _prove_keyslots(
    container: luks.Container, deks: disk_keys.ReencryptionKeys, recovery: Secret, slots: tuple[int, int, int]
) -> None:
    """Each keyslot gives its volume key. Raises DiskFailed."""
    expected = ((deks.operation, deks.old), (deks.operation, deks.new), (recovery, deks.new))
    for slot, (passphrase, dek) in zip(slots, expected, strict=True):
        try:
            with container.volume_key(passphrase, slot) as found:
                same = found == dek
        except NotOurs:
            same = False
        if not same:
            raise DiskFailed(f"{container.device}: keyslot {slot} that was written does not read back")


def _take_back(work: Work, disks: Sequence[DeepRekeyDisk]) -> list[str]:
    """Removes what was prepared from disks of which no data has moved, and takes them from the journal. Returns their
    mapping names. A disk that is away keeps what it has: keyslots for a key that covers nothing."""
    names = []
    for disk in disks:
        place = _place(work, disk.uuid)
        if not place:
            continue
        moving.remove_preparation(work, place.node, disk.keyslots)
        names.append(place.member.name)
    _save_without(work, disks)
    return names


def _save_without(work: Work, disks: Sequence[DeepRekeyDisk]) -> None:
    """Saves the state; these disks are not left to do any more."""
    entry = work.state.journal
    assert isinstance(entry, DeepRekey)
    left = tuple(each for each in entry.disks if each not in disks)
    work.state.journal = entry._replace(disks=left) if left else None
    work.state.save()


# One disk, without a person


def _do_disk(
    paths: Paths, disk: DeepRekeyDisk, progress: Throttled, look: find.Look, connect: access.Connect
) -> Outcome:
    """Starts or goes on, and finishes. Raises DiskFailed, Tampered, NoKey, Refused when it is not here."""
    with exclusive(paths), Work(paths, look, connect) as work:
        place = _place(work, disk.uuid)
        if not place:
            raise Refused(f"{disk.uuid} is not here", "plug it in; then: unlock rekey --deep", code="missing")
        begun = _begin_or_settle(work, place, disk)
    if begun is not None:
        begun.move(progress.tell, progress.hotzone)
    with exclusive(paths), Work(paths, look, connect) as work:
        place = _place(work, disk.uuid) or place
        if begun is not None and reencrypt.settle(place.node, begun.plan, None) != NEW:
            return Outcome(place.group.name, place.member.name, "stopped", "", "unlock rekey --deep")
        _clean(work, place, disk)
    return Outcome(place.group.name, place.member.name, "done")


def _begin_or_settle(work: Work, place: _Place, disk: DeepRekeyDisk) -> Begun | None:
    """Brings the header, and the mapping that a killed run has left, to where the data can move. None when there is
    nothing to move. Raises DiskFailed, Tampered, CommandFailed."""
    mapping = devices.active_mapping_name(place.member.uuid)
    reencrypt.unlock_after_kill(place.node)
    with luks.Container(place.node) as container:
        each = moving.find_plan_token(work, container)
        if each is None:
            _require_done(work, place, container, disk)
            return None
        assert each.reencryption
        plan = each.reencryption.plan
        with _kek(work, place) as kek:
            keys = disk_keys.unwrap_reencryption_keys(container, each, kek)
    with keys.old, keys.new:
        if mapping and relink_mapping.is_left(mapping):
            relink_mapping.relink(place.node, mapping, plan, keys)
        relink_mapping.remove_temporary(place.node)
        phase = reencrypt.settle(place.node, plan, keys.operation)
        if phase == OLD:
            with reencrypt.Disk(place.node) as half:
                half.start(mapping, keys.operation, plan)
        elif phase == NEW:
            keys.operation.wipe()
            return None
    return Begun(place.node, plan, keys.operation, mapping)


def _require_done(work: Work, place: _Place, container: luks.Container, disk: DeepRekeyDisk) -> None:
    """Raises Refused for a disk without its plan that has the old volume key yet: another command, as a rebind, has
    written its token again. It is taken from the journal."""
    covering = next(each for each in container.metadata["digests"].values() if each["segments"])
    if disk.recovery in [container.salt(int(slot)) for slot in covering["keyslots"]]:
        return
    _take_back(work, (disk,))
    raise Refused(
        f"{place.member.name} was prepared, and another command has undone that: it keeps its volume key",
        f"unlock rekey --deep {place.group.name}",
        code="taken-back",
    )


def _clean(work: Work, place: _Place, disk: DeepRekeyDisk) -> None:
    """The token for the new volume key alone; then the old keyslots and the operation key go, then the old tokens; then
    the state. May be killed and run again anywhere. Raises DiskFailed, Tampered."""
    raw_header.make_whole(place.node)
    mac_key = work.state.mac_key(work.persistence, place.member.uuid)
    with _kek(work, place) as kek, access.token_keys(work, kek=kek, mac_key=mac_key) as keys:
        with luks.Container(place.node) as container:
            before = moving.find_plan_token(work, container)
            dek = access.find_volume_key(work, container, place.group)
            each = disk_keys.make_token(container, work.state.host, place.group, place.member, dek, keys)
            work.state.headers[place.member.uuid] = canonical(container.facts()).decode()
        with dek:
            disk_keys.write_token(place.node, each, dek, keys)
            if before and before.reencryption:
                _remove_old_keyslots(place.node, before.reencryption.plan)
            disk_keys.drop_other_tokens(place.node, each, dek, keys)
    work.state.recovery.keyslots[disk.uuid] = disk.recovery
    work.state.recovery.tested.pop(disk.uuid, None)
    _save_without(work, (disk,))
    member, group = place.member, place.group.name
    words = f"{member.name} has a new volume key"
    journald.record(work.paths, messages.VOLUME_KEY_REPLACED, words, disk=member.name, uuid=member.uuid, group=group)


def _remove_old_keyslots(node: str, plan: Plan) -> None:
    with luks.Container(node) as container:
        digest = container.metadata["digests"].get(str(plan.old), {"keyslots": []})
        for slot in sorted({*map(int, digest["keyslots"]), plan.new_keyslot} & {*container.keyslots()}):
            container.remove_keyslot(slot)


# Where a disk is, and how far


def _place(work: Work, uuid: str) -> _Place | None:
    for group in work.state.groups.values():
        for member in group.members:
            if member.uuid == uuid and (node := work.nodes(group).get(uuid)):
                return _Place(group, member, node)
    return None


def _name_of(paths: Paths, look: find.Look, connect: access.Connect, uuid: str) -> tuple[str, str]:
    """Group and mapping name of a member."""
    with Work(paths, look, connect) as work:
        for group in work.state.groups.values():
            for member in group.members:
                if member.uuid == uuid:
                    return group.name, member.name
    return "", uuid


def _plan_token(work: Work, container: luks.Container) -> token.Token:
    """The same where there must be one. Raises DiskFailed."""
    if each := moving.find_plan_token(work, container):
        return each
    raise DiskFailed(f"{container.device}: the token that was written does not read back")


def _sizes(work: Work, entry: DeepRekey) -> dict[str, int]:
    """LUKS UUID -> bytes of data, of the disks that are here."""
    sizes = {}
    for disk in entry.disks:
        if place := _place(work, disk.uuid):
            with luks.Container(place.node) as container:
                sizes[disk.uuid] = container.disk_size - int(container.metadata["segments"]["0"]["offset"])
    return sizes
