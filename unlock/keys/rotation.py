# SPDX-License-Identifier: Apache-2.0
"""Replaces the KEK of a group: the one sequence of writes, which `rekey`, `sync` and `provider switch` all use.

    journal ──> key made and active at the provider, found by its name after a kill ──> fetched, proven ──>
    each disk: token with the new KEK beside the old, read back, proven, the old removed ──>
    state: the new KEK, members that were away, the KEK to retire; the journal closed in the same rename ──>
    cache ──> the old KEK retired at the provider once no disk may need it, never destroyed

Volume keys and data stay as they are. A disk that fails or is away keeps its old token, and `sync` rewrites it when it
is back.
"""

from collections.abc import Callable
from typing import NamedTuple

from .. import journald, log, messages
from ..disks import disk_keys, luks
from ..disks.groups import Group, Member
from ..errors import NoKey, Refused, StateBlocked, Tampered, UnlockError
from ..host import keyring, this_boot
from ..host.journal import (
    DeepRekey,
    DiskDecryption,
    DiskEncryption,
    DiskForgetting,
    JournalEntry,
    NewPersistenceKey,
    Rekey,
)
from ..host.state import State
from ..host.state_file import KeyEntry, ReplacedKek
from ..providers import USABLE, Ref
from ..secret import Secret
from . import access, dump_key
from .access import Work

FORMER_MAX = 64
"""Ids of replaced KEKs that a group remembers."""


class Outcome(NamedTuple):
    """The result for one group."""

    group: str
    generation: int
    """Of its KEK now."""
    done: tuple[str, ...]
    """Mapping names of the members whose token is current."""
    behind: dict[str, str]
    """Mapping name -> why its token is not."""


class StillActive(NamedTuple):
    """A replaced KEK that its provider did not deactivate, or does not say so of."""

    kek: ReplacedKek
    error: UnlockError

    def describe(self) -> str:
        return f"{self.kek.id}, not in use in group {self.kek.group}, may still be active: {self.error}"


Write = Callable[[Work, Group, Secret], tuple[Outcome, Group]]
"""Writes a KEK to a group's disks, and returns the group as it is then."""


def rotate_kek(work: Work, name: str, adopt: Ref | None = None) -> Outcome:
    """Replaces the KEK of a group by one that the provider makes, or, with `adopt`, by the one that the key manager
    made.

    Raises ProviderError, DiskFailed, Refused ("missing" when no member is here): then no disk has changed. After a
    kill, call it again.
    """
    state = work.state
    group = state.groups[name]
    entry = state.unfinished(Rekey, name)
    unasked = False
    if not entry:
        if not work.nodes(group):
            raise Refused(f"no disk of group {name} is here", "unlock status", code="missing")
        made = (adopt.id, adopt.name) if adopt else None
        entry = Rekey("rekey", name, generation=state.next_generation(name), made=made, theirs=bool(adopt))
        unasked = state.take_name(name, entry.generation)
        state.begin(entry)
    try:
        new = successor(group, work.provider().id, make_successor(work, group, entry, unasked), entry.generation)
        with fetch_new_kek(work, new) as kek:
            return replace_kek(work, group, new, kek, journal=None, retires=not entry.theirs)
    except UnlockError as error:
        if not _has_reached_a_disk(work, group, entry.generation):
            if isinstance(error, StateBlocked):
                state.skip_generation(name, entry.generation)
            state.journal = None
            state.save()
        raise


def cancel_rotation(work: Work, entry: Rekey) -> None:
    """Closes the journal of a rotation that has reached no disk. The key that it may have made stays at the provider,
    for the next rotation. Raises Refused where a disk has the new KEK, or may have it."""
    state = work.state
    group = state.groups[entry.about]
    nodes = work.nodes(group)
    if away := [member.name for member in group.members if member.uuid not in nodes]:
        raise Refused(f"{', '.join(away)}: not here, and may have the new key", state.to_finish, "not-cancellable")
    if _has_reached_a_disk(work, group, entry.generation):
        raise Refused(f"disks of group {group.name} have the new key", state.to_finish, "not-cancellable")
    state.journal = None
    state.save()


def make_successor(work: Work, group: Group, entry: Rekey | DiskForgetting, unasked: bool) -> Ref:
    """The new key at the provider, from the journal or made now. `unasked`: no run before has asked for it."""
    if entry.made:
        return Ref(*entry.made)
    old = access.key_ref(work.state.provider_of(group.kek), group.kek, group.kek_name)
    name = access.key_name(work.state.host, f"kek/{group.name}", entry.generation)
    if unasked:
        made, key = work.provider().rotate_unasked(old, name)
        if key:
            work.fetched[f"{work.provider().id}/{made.id}", entry.generation] = key
    else:
        made = work.provider().rotate(old, name)
    access.keep_offers(work)
    work.state.journal = entry._replace(made=(made.id, made.name))
    work.state.save()
    return made


def fetch_new_kek(work: Work, new: Group) -> Secret:
    """The new KEK. When an earlier run was killed, a disk or the cache may have it already; the provider must then give
    the same one."""
    return access.find_kek(work, new, states=USABLE)[0]


def successor(group: Group, provider_id: str, made: Ref, generation: int) -> Group:
    """The group under its new KEK, with every member marked as behind."""
    return group._replace(
        kek=f"{provider_id}/{made.id}",
        kek_name=made.name,
        generation=generation,
        former=(*group.former, group.kek)[-FORMER_MAX:],
        behind=_uuids(group),
    )


def _has_reached_a_disk(work: Work, group: Group, generation: int) -> bool:
    """Whether a disk has a token under the KEK that this rotation was to bring."""
    for node in work.nodes(group).values():
        try:
            with luks.Container(node) as container:
                if any(each.kek_generation == generation for each in disk_keys.read_tokens(container, work.state.host)):
                    return True
        except UnlockError:
            continue
    return False


def replace_kek(
    work: Work,
    group: Group,
    new: Group,
    kek: Secret,
    journal: JournalEntry | None,
    retires: bool = True,
    write: Write | None = None,
) -> Outcome:
    """Writes the new KEK to the disks, then the state with `journal` as its new entry, then the cache; then deactivates
    the old KEK. `write`: what writes it to the disks, instead of `rewrap_disks`.

    Raises DiskFailed and others when no disk took the new KEK.
    """
    state = work.state
    if new.policy == "provider":  # no disk will have it
        _cache_kek(work, new, kek)
    outcome, new = (write or rewrap_disks)(work, new, kek)
    state.groups[new.name] = new
    if retires:
        state.retire.append(ReplacedKek(group.kek, new.name))
    state.journal = journal
    state.save()
    journald.record(
        work.paths,
        messages.KEK_REPLACED,
        f"group {new.name} has a new key-encryption key, generation {new.generation}",
        group=new.name,
        generation=str(new.generation),
        disks=outcome.done,
        behind=outcome.behind,
    )
    if new.policy != "provider":
        try:
            _cache_kek(work, new, kek)
        except UnlockError as error:  # every disk carries it
            log.error(str(error), error.hint)
    retire_keks(work)
    return outcome


def _cache_kek(work: Work, group: Group, kek: Secret, source: str = "provider") -> None:
    this_boot.cache_keys(work.paths, source, {access.cache_name(group.kek, group.generation): kek})


def rewrap_disks(work: Work, group: Group, kek: Secret) -> tuple[Outcome, Group]:
    """Writes a new token to every member that is here; returns the group with its other members marked as behind.

    A disk that fails does not stop the others. Raises the last failure when no disk was rewritten.
    """
    nodes = work.nodes(group)
    behind: dict[str, str] = {}
    done: list[str] = []
    trouble: UnlockError | None = None
    for member in group.members:
        try:
            if member.uuid not in nodes:
                behind[member.name] = "it is not here"
                continue
            rewrap_disk(work, group, member, nodes[member.uuid], kek)
            done.append(member.name)
        except UnlockError as error:
            trouble = error
            behind[member.name] = describe(error)
    if trouble and not done:
        raise trouble
    left = tuple(member.uuid for member in group.members if member.name in behind)
    return Outcome(group.name, group.generation, tuple(done), behind), group._replace(behind=left)


def rewrap_disk(work: Work, group: Group, member: Member, node: str, kek: Secret) -> None:
    """Writes a token beside the old one, reads it back and proves it; then removes the old one. Raises DiskFailed,
    Tampered; Refused while a new persistence key is on its way, as the next boot may have that one, and for a disk that
    is to get a new volume key."""
    state = work.state
    if isinstance(state.journal, NewPersistenceKey):
        raise Refused(f"`{state.to_finish}` is not finished", "run it again first", code="unfinished")
    moving = [each.uuid for each in state.journal.disks] if isinstance(state.journal, DeepRekey) else []
    moving += [state.journal.member.uuid] if isinstance(state.journal, DiskEncryption | DiskDecryption) else []
    if member.uuid in moving:
        raise Refused(f"`{state.to_finish}` is not finished", "unlock status", code="unfinished")
    with work.host_key() as host_key, state.mac_key(work.persistence, member.uuid) as mac_key:
        keys = disk_keys.Keys(persistence=work.persistence, host_key=host_key, kek=kek, mac_key=mac_key)
        with luks.Container(node) as container:
            dek = access.find_volume_key(work, container, group)
            each = disk_keys.make_token(container, state.host, group, member, dek, keys)
        with dek:
            disk_keys.write_token(node, each, dek, keys)
            disk_keys.drop_other_tokens(node, each, dek, keys)
    state.drop_old_key(member.uuid)


def set_host_key(work: Work, provider_id: str, ref: Ref, key: Secret) -> None:
    """Replaces the host key: first in the state, which keeps the former one, then for dumps and in every token. Killed
    in between, `dump_key.refresh` and `catch_up_disks` do the rest."""
    state = work.state
    entry = KeyEntry(f"{provider_id}/{ref.id}", ref.name, state.host_key_ref.generation + 1)
    state.set_host_key(entry, persistence=work.persistence, key=key)
    for group in list(state.groups.values()):
        state.groups[group.name] = group._replace(behind=_uuids(group))
    state.save()
    record_host_key(work)
    dump_key.write_recipient(work.paths, state, key)
    this_boot.cache_keys(work.paths, "provider", {"unlock:host": key})
    catch_up_disks(work)


def record_host_key(work: Work) -> None:
    """Records in the journal that the host key is a new one."""
    generation = str(work.state.host_key_ref.generation)
    words = f"the host has a new host key, generation {generation}"
    journald.record(work.paths, messages.HOST_KEY_REPLACED, words, generation=generation)


def set_policy(work: Work, group: Group, policy: str) -> Outcome:
    """Puts the KEK into the members' tokens (`persistent`), or takes it out of them (`provider`). The KEK stays the
    same. Raises NoKey, ProviderError, DiskFailed."""
    state = work.state
    if group.policy == policy and not group.behind:
        return Outcome(group.name, group.generation, tuple(member.name for member in group.members), {})
    kek, source = access.find_kek(work, group)
    with kek:
        if policy == "provider" or source == "provider":
            _cache_kek(work, group, kek, source)
        new = group._replace(policy=policy, behind=_uuids(group))
        if policy == "provider":
            state.narrowed = f"the key of group {group.name} is not kept any more"
        outcome = _rewrap_all(work, new, kek)
    if group.policy != policy:
        words = f"group {group.name}: policy = {policy}"
        journald.record(work.paths, messages.GROUP_CHANGED, words, group=group.name, setting="policy", value=policy)
    return outcome


def set_degraded(work: Work, group: Group, degraded: bool) -> Outcome:
    """Lets early boot open the group without all of its members, or forbids it: each token says so. Members that are
    away get theirs when they are back. Raises NoKey, ProviderError, DiskFailed."""
    if group.degraded == degraded and not group.behind:
        return Outcome(group.name, group.generation, tuple(member.name for member in group.members), {})
    kek, _ = access.find_kek(work, group)
    with kek:
        return _rewrap_all(work, group._replace(degraded=degraded, behind=_uuids(group)), kek)


def _rewrap_all(work: Work, group: Group, kek: Secret) -> Outcome:
    """Writes the tokens of a group that has changed. The state has the change first, with every member behind."""
    work.state.groups[group.name] = group
    work.state.save()
    outcome, written = rewrap_disks(work, group, kek)
    work.state.groups[group.name] = written
    work.state.save()
    return outcome


def _uuids(group: Group) -> tuple[str, ...]:
    return tuple(member.uuid for member in group.members)


def catch_up_disks(work: Work) -> list[Outcome]:
    """Rewrites the tokens of members that were away and are back. Asks the provider only when neither cache nor disks
    have the KEK. Writes nothing when no member is behind."""
    outcomes = []
    for group in list(work.state.groups.values()):
        nodes = work.nodes(group) if group.behind else {}
        back = [member for member in group.members if member.uuid in group.behind and member.uuid in nodes]
        done: list[str] = []
        behind: dict[str, str] = {}
        for member in back:
            try:
                if not _is_current(work, group, member, nodes[member.uuid]):
                    with access.find_kek(work, group)[0] as kek:
                        rewrap_disk(work, group, member, nodes[member.uuid], kek)
                done.append(member.uuid)
            except UnlockError as error:
                behind[member.name] = describe(error)
        if done:
            for uuid in done:
                work.state.drop_old_key(uuid)
            left = tuple(uuid for uuid in group.behind if uuid not in done)
            work.state.groups[group.name] = group._replace(behind=left)
            work.state.save()
        if back:
            names = tuple(member.name for member in back if member.uuid in done)
            outcomes.append(Outcome(group.name, group.generation, names, behind))
    return outcomes


def _is_current(work: Work, group: Group, member: Member, node: str) -> bool:
    """Whether a disk's one token is what the group says; needs no KEK."""
    with luks.Container(node) as container:
        found = disk_keys.read_tokens(container, work.state.host)
        if len(found) != 1:
            return False
        each = found[0]
        try:
            with disk_keys.unwrap_host_key(each, work.persistence) as kept, work.host_key() as host_key:
                same = kept == host_key
            disk_keys.unwrap_volume_key(container, each, work.persistence).wipe()
            policy = "persistent"
        except NoKey:
            policy = "provider"
        except Tampered:
            return False
    says = (each.kek_id, each.kek_generation, each.manifest, each.name, each.degraded, policy)
    return same and says == (group.kek, group.generation, group.manifest, member.name, group.degraded, group.policy)


def retire_keks(work: Work, left: bool = False) -> list[StillActive]:
    """Deactivates replaced KEKs of groups in which no member is behind; with `left`, also at providers that this host
    has left.

    A KEK stays in the state, for the next time, until its provider says that it is out of use. Returns those.
    """
    state = work.state
    still_active = _give_up_unused(work)
    for each in list(state.retire):
        group = state.groups.get(each.group)
        if group and (group.behind or group.kek == each.id):
            continue
        try:
            entry = state.provider_of(each.id)
            if entry != state.provider and not left:
                continue
            work.provider(entry).retire(access.key_ref(entry, each.id, "").id)
        except UnlockError as error:
            still_active.append(StillActive(each, error))
            continue
        state.retire.remove(each)
        state.save()
    _forget_former(state)
    return still_active


def _give_up_unused(work: Work) -> list[StillActive]:
    """Keys that a provider was asked to make for groups that are not there, as what would have made the group was taken
    back, are to be deactivated. Returns those that the provider does not tell of now."""
    state = work.state
    still_active: list[StillActive] = []
    for group, generation in state.unused_names().items() if state.journal is None else ():
        name = access.key_name(state.host, f"kek/{group}", generation)
        try:
            provider = work.provider()
            found = provider.locate(name)
        except UnlockError as error:
            still_active.append(StillActive(ReplacedKek(name, group), error))
            continue
        if found:
            state.retire.append(ReplacedKek(f"{provider.id}/{found.id}", group))
            forget_cached(state.retire[-1].id)
        state.drop_name(group)
        state.save()
    return still_active


def retire_or_tell(work: Work) -> None:
    """The same as `retire_keks`, for commands: prints what is left to a sync."""
    for left in retire_keks(work):
        log.error(left.describe(), "unlock sync")


def forget_cached(kek: str) -> None:
    """Removes every generation of a KEK from the cache."""
    for name in keyring.names():
        if name.startswith(f"unlock:kek:{kek}:"):
            keyring.forget(name)


def _forget_former(state: State) -> None:
    """Removes replaced KEKs from the cache when no disk may need them."""
    former = {kek for group in state.groups.values() if not group.behind for kek in group.former}
    for name in keyring.names():
        if name.startswith("unlock:kek:") and name.removeprefix("unlock:kek:").rpartition(":")[0] in former:
            keyring.forget(name)


def describe(error: UnlockError) -> str:
    """Why a disk still has its old key, with what to type where waiting for it does not help."""
    return f"{error}; {error.hint}" if error.code == "no-room" else str(error)
