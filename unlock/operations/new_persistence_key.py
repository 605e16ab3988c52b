# SPDX-License-Identifier: Apache-2.0
"""A new persistence key: after each narrowing of a policy, and by `unlock rekey --fresh`.

A narrower policy (a PIN, a window that is closed, keys that are not kept any more) holds back the persistence key. An
earlier copy of a header, or of what the TPM kept, would still give what the old key wraps; nothing is under it any more
when this has run.

    journal: either key wrapped by the other ──> each disk here: its token under the new key beside the old, proven ──>
    TPM: the new key under the present policy ──> key cache ──> state under the new key ──> each disk: the old token
    removed ──> journal closed

Needs no KEK and no key manager: a token's wrapped volume key stays as it is. Killed anywhere, each disk that is here
opens by either key, so with whichever the TPM gives, until the TPM has the new one; `replace` finishes.

The old key is kept for disks that are away, wrapped by the new one in the state, until `unlock sync` or healing has
brought the last of them on. They would need the recovery key else, where no key manager answers. It is used for those
disks alone, by their UUID, and neither in early boot nor at a gate: an old header of any other disk opens nothing.
"""

from contextlib import suppress
from typing import NamedTuple

from .. import journald, log, messages
from ..disks import disk_keys, find
from ..disks.groups import Group, Member
from ..errors import DiskFailed, NoSlot, Refused, UnlockError
from ..host import this_boot
from ..host.journal import DeepRekey, DiskDecryption, DiskEncryption, NewPersistenceKey, Rebind
from ..host.state import State, changing
from ..keys import access
from ..paths import TPM_DEVICE, Paths
from ..predict import allowed_states, trusted_files
from ..secret import Secret
from ..tpm import slots
from ..tpm.chip import Tpm
from ..tpm.record import Record


class Replaced(NamedTuple):
    """The result of `replace`."""

    done: tuple[str, ...]
    """Mapping names of the disks that are under the new key."""
    behind: dict[str, str]
    """Mapping name -> why that disk is not: `unlock sync` brings it on when it is back."""


def is_due(state: State) -> bool:
    """Whether a policy has narrowed since the persistence key was made, or a replacement is not finished. Not while a
    rebind is, which makes a new key itself, nor while disks get new volume keys: their tokens cannot be written."""
    if isinstance(state.journal, Rebind | DeepRekey | DiskEncryption | DiskDecryption):
        return False
    return state.narrowed is not None or isinstance(state.journal, NewPersistenceKey)


def replace_if_due(
    paths: Paths, tcti: str = TPM_DEVICE, owner_auth: Secret | None = None, look: find.Look = find.look
) -> Replaced | None:
    """`replace`, and says so, when `is_due`. Raises what it raises; the change that made it due stays."""
    state = State.load(paths)
    if not is_due(state):
        return None
    try:
        found = replace(paths, tcti, owner_auth, look)
    except UnlockError as error:
        why = f"{state.narrowed or 'a new persistence key was begun'}, but earlier headers still open: {error}"
        raise type(error)(why, error.hint or "unlock rekey --fresh", error.code) from error
    describe(found)
    return found


def finish(paths: Paths, tcti: str = TPM_DEVICE, owner_auth: Secret | None = None, look: find.Look = find.look) -> None:
    """Finishes a replacement that was killed: for commands that end with one, so that the same command finishes. Raises
    what `replace` raises."""
    if isinstance(State.load(paths).journal, NewPersistenceKey):
        replace(paths, tcti, owner_auth, look)


def describe(found: Replaced) -> None:
    """Notes for a person."""
    log.note(f"a new persistence key, {len(found.done)} disk(s): earlier copies of their headers open nothing")
    for name, why in found.behind.items():
        log.error(f"{name}: {why}: it opens when it has been brought on", "when it is back: unlock sync")


def replace(
    paths: Paths, tcti: str = TPM_DEVICE, owner_auth: Secret | None = None, look: find.Look = find.look
) -> Replaced:
    """Makes a new persistence key, under the policy as it is, and brings every disk that is here under it.

    Raises Refused (code `pin-needed` when a PIN is set and what it makes is not in the key cache; `removed` when the
    TPM keeps nothing), NoKey, DiskFailed, TpmFailed: then nothing has changed, or the same command finishes. Where a
    killed run was finished and a policy may have narrowed since it began, another key follows: that run's key may be
    in a recording from before.
    """
    found = _replace(paths, tcti, owner_auth, look)
    return found if State.load(paths).narrowed is None else _replace(paths, tcti, owner_auth, look)


def _replace(paths: Paths, tcti: str, owner_auth: Secret | None, look: find.Look) -> Replaced:
    with changing(paths) as state, Tpm(tcti) as tpm:
        if isinstance(state.journal, Rebind | DeepRekey | DiskEncryption | DiskDecryption):
            state.refuse_other("rekey --fresh", "")
        record = _current_record(tpm, state)
        slots.require_owner_auth(tpm, owner_auth, "unlock rekey --fresh --owner-auth-file FILE")
        with (
            access.read_persistence_key(state) as mine,
            allowed_states.auth_for(state.host, record.pin) as pin_auth,
        ):
            begun = state.journal if isinstance(state.journal, NewPersistenceKey) else None
            entry, old, new = _begin(state, mine)
            with old, new:
                nodes = _find_nodes(state, look)
                behind: dict[str, str] = {}
                if not entry.sealed:
                    payload = allowed_states.payload_for(paths, state, new)
                    try:
                        behind = _add_tokens(state, nodes, old=old, new=new)
                        slots.seal_slot(
                            tpm,
                            record.host,
                            record.selection,
                            record.branches,
                            payload,
                            owner_auth=owner_auth,
                            pin_auth=pin_auth,
                            cap=record.cap,
                        )
                    except UnlockError:
                        if not begun and _is_still(tpm, record):
                            _undo(state, nodes, entry, old)
                        raise
                    _put_state_under(paths, state, entry, behind, old=old, new=new)
                if not begun:
                    state.narrowed = None
                found = _remove_old_tokens(state, nodes, behind, new)
    words = f"the host has a new persistence key: earlier headers of {len(found.done)} disk(s) open nothing"
    journald.record(paths, messages.PERSISTENCE_KEY_REPLACED, words, disks=found.done, behind=found.behind)
    return found


def _current_record(tpm: Tpm, state: State) -> Record:
    try:
        _, record = slots.current_slot(tpm)
    except NoSlot:
        raise Refused("the TPM keeps nothing of this host", "unlock persistence enable", code="removed") from None
    if record.host.hex() != state.host:
        raise Refused("the TPM keeps the key of another installation", "unlock status", code="not-ours")
    return record


def _begin(state: State, mine: Secret) -> tuple[NewPersistenceKey, Secret, Secret]:
    """The journal entry, durable; the old and the new key. Those of a killed run where there was one."""
    if isinstance(state.journal, NewPersistenceKey):
        return state.journal, *state.unwrap_pair(state.journal, mine)
    state.prove(mine)
    old, new = mine.copy(), Secret.random(32)
    under_old, under_new = state.wrap_pair(old=old, new=new)
    entry = NewPersistenceKey("rekey --fresh", "", new=under_old, old=under_new, sealed=False, before=state.journal)
    state.journal = entry
    state.save()
    return entry, old, new


def _find_nodes(state: State, look: find.Look) -> dict[str, str]:
    """LUKS UUID -> node of the members that are here."""
    if not state.groups:
        return {}
    seen = look()
    found = {member.uuid: find.find_node(seen, member) for _, member in _members(state)}
    return {uuid: node for uuid, node in found.items() if node}


def _members(state: State) -> list[tuple[Group, Member]]:
    return [(group, member) for group in state.groups.values() for member in group.members]


def _add_tokens(state: State, nodes: dict[str, str], *, old: Secret, new: Secret) -> dict[str, str]:
    """Writes tokens under the new key beside the old ones. Returns the disks, by mapping name, that do not open by the
    old key either, and why. Raises DiskFailed for one that does and does not take the token: the next boot needs it."""
    behind = {}
    for group, member in _members(state):
        node = nodes.get(member.uuid)
        if not node:
            behind[member.name] = "it is not here"
            continue
        try:
            disk_keys.add_rewrapped_tokens(node, state.host, old=old, new=new, keeps_kek=group.policy == "persistent")
        except DiskFailed:
            raise
        except UnlockError as error:
            behind[member.name] = str(error)
    return behind


def _is_still(tpm: Tpm, record: Record) -> bool:
    """Whether the TPM has the same policy as before, and so the same key. False where that cannot be told."""
    try:
        return slots.current_record(tpm) == record
    except UnlockError:
        return False


def _undo(state: State, nodes: dict[str, str], entry: NewPersistenceKey, old: Secret) -> None:
    """Removes what was written; the old key stays in use. What cannot be removed opens nothing: nobody has its key."""
    for node in nodes.values():
        with suppress(UnlockError):
            disk_keys.drop_tokens_not_under(node, state.host, old)
    state.journal = entry.before
    state.save()


def _put_state_under(
    paths: Paths, state: State, entry: NewPersistenceKey, behind: dict[str, str], *, old: Secret, new: Secret
) -> None:
    """Key cache, boot-files.json and state under the new key, which the TPM has now. The old one is kept for disks that
    are away."""
    trusted_files.put_under_new_key(paths, old=old, new=new)
    before = state.rewrapped(entry.before, old=old, new=new)
    state.rewrap(old=old, new=new)
    state.forget_strangers()
    for name, group in list(state.groups.items()):
        left = {member.uuid for member in group.members if member.name in behind}
        for member in group.members:
            if member.uuid in left:
                state.keep_old_key(member.uuid, new=new, old=old)
            else:
                state.drop_old_key(member.uuid)
        state.groups[name] = group._replace(behind=tuple({**dict.fromkeys(group.behind), **dict.fromkeys(left)}))
    state.journal = entry._replace(sealed=True, before=before)
    this_boot.cache_keys(paths, "made", {"unlock:persistence": new})
    state.save()


def _remove_old_tokens(state: State, nodes: dict[str, str], behind: dict[str, str], new: Secret) -> Replaced:
    """Removes the tokens under the old key, and closes the journal. A disk that fails does not stop the others: it is
    left to `unlock sync`."""
    done = []
    for name, group in list(state.groups.items()):
        failed = []
        for member in group.members:
            if member.name in behind:
                continue
            node = nodes.get(member.uuid)
            try:
                if not node:
                    raise DiskFailed("it is not here")
                disk_keys.drop_tokens_not_under(node, state.host, new)
                done.append(member.name)
            except UnlockError as error:
                behind[member.name] = str(error)
                failed.append(member.uuid)
        if failed:
            state.groups[name] = group._replace(behind=tuple(dict.fromkeys([*group.behind, *failed])))
    journal = state.journal
    state.journal = journal.before if isinstance(journal, NewPersistenceKey) else None
    state.save()
    return Replaced(tuple(done), behind)
