# SPDX-License-Identifier: Apache-2.0
"""`unlock operation show|pause|resume|cancel`: the operation that the journal has.

`_HANDLINGS` says for each kind of journal entry how it goes on, and whether it may be paused or cancelled. A new kind
of operation gets its line there; one that needs nobody after a boot is in `journal.GOES_ON_BY_ITSELF` too.
"""

import time
from collections.abc import Callable
from typing import NamedTuple

from .. import log
from ..disks import find
from ..disks.reencrypt import Tell
from ..errors import Refused, UnlockError
from ..host import journal, resumption
from ..host.journal import (
    DeepRekey,
    DiskAddition,
    DiskAdoption,
    DiskDecryption,
    DiskEncryption,
    DiskErasure,
    DiskForgetting,
    DiskRelease,
    DiskRemoval,
    DiskReplacement,
    GroupCreation,
    GroupDeletion,
    Init,
    JournalEntry,
    NewPersistenceKey,
    PersistenceChange,
    ProviderSwitch,
    Rebind,
    RecoveryRenewal,
    RecoveryRotation,
    Rekey,
    StoredKeysRemoval,
)
from ..host.lock import exclusive
from ..host.state import State
from ..keys import access, rotation
from ..paths import TPM_DEVICE, Paths
from . import (
    add_disk,
    create_group,
    decrypt_disk,
    delete_group,
    encrypt_disk,
    erase_disk,
    forget_disk,
    new_persistence_key,
    persistence,
    rekey,
    rekey_deep,
    remove_disk,
    replace_disk,
    switch,
    under_way,
)
from .consent import Consent, Plan, agree
from .under_way import UnderWay

PATIENCE = 120.0
"""Seconds that `pause` waits for the operation to reach a safe point."""


class Run(NamedTuple):
    """What an operation that goes on is given."""

    paths: Paths
    tell: Tell
    look: find.Look
    tcti: str


GoOn = Callable[[Run], list[str]]
"""Finishes the operation in the journal. Returns what a person should know, a line each. Raises UnlockError."""
Cancel = Callable[[Paths, find.Look], list[str]]
"""Takes the operation in the journal back. Returns the same. Raises Refused where that is not safe any more."""

GiveUp = Callable[[Paths, Consent, find.Look, str], list[str] | None]
"""Ends the operation in the journal without its disk. As `give_up`."""


class Handling(NamedTuple):
    """How an operation goes on."""

    go_on: GoOn | None = None
    needs: str = ""
    """Without `go_on`: what a person gives to its own command."""
    pausable: bool = False
    """It tells how far it is, and stops where it is told to."""
    cancel: Cancel | None = None
    cancelled: str = ""
    """With `cancel`: what that leaves. Without: why there is none, and what to do after its end."""
    give_up: GiveUp | None = None
    """Where it can only go forward: what ends it when its disk is lost."""


# Going on, and going back


def _finish_rekey(run: Run) -> list[str]:
    entry = State.load(run.paths).journal
    assert isinstance(entry, Rekey)
    return _describe(rekey.rekey(run.paths, entry.about, run.look))


def _finish_removal(run: Run) -> list[str]:
    entry = State.load(run.paths).journal
    assert isinstance(entry, DiskRemoval)
    remove_disk.remove_disk(run.paths, entry.about, tell=run.tell, look=run.look)
    return []


def _finish_replacement(run: Run) -> list[str]:
    replaced = replace_disk.go_on(run.paths, run.tell, run.look, run.tcti)
    return [f"next: {replaced.next}"] if replaced and replaced.next else []


def _finish_deep_rekey(run: Run) -> list[str]:
    outcomes = rekey_deep.resume(run.paths, run.tell, run.look)
    return [f"{each.disk}: {each.detail or each.outcome}" for each in outcomes if each.outcome != "done"]


def _finish_forgetting(run: Run) -> list[str]:
    entry = State.load(run.paths).journal
    assert isinstance(entry, DiskForgetting)
    forgotten = forget_disk.forget_disk(run.paths, entry.about, look=run.look, tcti=run.tcti)
    return forget_disk.describe_next(forgotten) if forgotten else []


def _finish_erasure(run: Run) -> list[str]:
    entry = State.load(run.paths).journal
    assert isinstance(entry, DiskErasure)
    erase_disk.erase_disk(run.paths, entry.about)
    return []


def _finish_deletion(run: Run) -> list[str]:
    entry = State.load(run.paths).journal
    assert isinstance(entry, GroupDeletion)
    deleted = delete_group.delete_group(run.paths, entry.about, look=run.look, tcti=run.tcti)
    return [f"{name}: {why}" for name, why in deleted.left.items()] if deleted else []


def _finish_persistence_change(run: Run) -> list[str]:
    entry = State.load(run.paths).journal
    assert isinstance(entry, PersistenceChange)
    change = persistence.enable if entry.about == "enable" else persistence.disable
    return _describe(change(run.paths, run.look, run.tcti))


def _finish_encryption(run: Run) -> list[str]:
    encrypt_disk.resume(run.paths, run.tell, run.look, tcti=run.tcti)
    return []


def _finish_decryption(run: Run) -> list[str]:
    done = decrypt_disk.resume(run.paths, run.tell, run.look, tcti=run.tcti)
    return [decrypt_disk.describe_waiting(done)] if done and done.outcome == "waiting" else []


def _finish_removal_of_keys(run: Run) -> list[str]:
    persistence.remove_all_stored_keys(run.paths, run.tcti)
    return []


def _finish_switch(run: Run) -> list[str]:
    entry = State.load(run.paths).journal
    assert isinstance(entry, ProviderSwitch)
    return _describe(switch.switch(run.paths, entry.about, look=run.look, tcti=run.tcti))


def _finish_new_persistence_key(run: Run) -> list[str]:
    found = new_persistence_key.replace(run.paths, run.tcti, look=run.look)
    return [f"{name}: {why}" for name, why in found.behind.items()]


def _describe(outcomes: list[rotation.Outcome]) -> list[str]:
    return [f"{name}: {why}" for each in outcomes for name, why in each.behind.items()]


def _cancel_rekey(paths: Paths, look: find.Look) -> list[str]:
    with exclusive(paths), access.Work(paths, look) as work:
        if isinstance(work.state.journal, Rekey):
            rotation.cancel_rotation(work, work.state.journal)
    return []


def _cancel_group_creation(paths: Paths, look: find.Look) -> list[str]:
    with exclusive(paths):
        state = State.load(paths)
        entry = state.journal
        if not isinstance(entry, GroupCreation):
            return []
        away = create_group.cancel_creation(state, entry, look)
        try:
            with access.Work(paths, look) as work:
                rotation.retire_or_tell(work)
        except UnlockError as error:  # without keys in this boot a sync of the next does it
            log.error(f"the key of group {entry.about} may still be active: {error}", "unlock sync")
        return [f"{name}: it is not here, and may keep a token" for name in away]


def _cancel_addition(paths: Paths, look: find.Look) -> list[str]:
    add_disk.cancel_addition(paths, look)
    return []


def _cancel_removal(paths: Paths, look: find.Look) -> list[str]:
    remove_disk.cancel_removal(paths, look)
    return []


def _cancel_deep_rekey(paths: Paths, look: find.Look) -> list[str]:
    return [f"{name} keeps its volume key" for name in rekey_deep.cancel(paths, look)]


_HANDLINGS: dict[type[JournalEntry], Handling] = {
    Init: Handling(
        needs="where the backup or the key manager is",
        cancelled="no disk depends on this host's keys yet, and no other command works before it is finished",
    ),
    GroupCreation: Handling(
        needs="the recovery key",
        cancel=_cancel_group_creation,
        cancelled="the disks were formatted and stay so, empty, without a token of this host",
    ),
    DiskAdoption: Handling(
        needs="a passphrase of the disk, and the recovery key",
        cancelled="some members may have the new member list and others not: only its end makes them one again",
    ),
    DiskAddition: Handling(
        needs="the recovery key",
        cancel=_cancel_addition,
        cancelled="the new disk was formatted, perhaps, and is in no group; refused once a member has the new list",
    ),
    DiskRemoval: Handling(
        go_on=_finish_removal,
        pausable=True,
        cancel=_cancel_removal,
        cancelled="the disk stays in the group, and what was moved stays moved; refused once btrfs has let it go",
    ),
    DiskReplacement: Handling(
        go_on=_finish_replacement,
        cancelled="the new disk may be a member already: finish it; what is not wanted then: unlock disk remove",
    ),
    DiskForgetting: Handling(
        go_on=_finish_forgetting,
        cancelled="some members may have the new member list: only its end makes them one again",
    ),
    DiskRelease: Handling(
        needs="the passphrase that opens the disk from then on",
        cancelled="the disk may be in no group any more: unlock disk adopt takes it in again",
    ),
    DiskErasure: Handling(go_on=_finish_erasure, cancelled="what opened the disk may be destroyed already"),
    GroupDeletion: Handling(go_on=_finish_deletion, cancelled="the group is gone, and its disks may be in part"),
    DiskEncryption: Handling(
        go_on=_finish_encryption,
        pausable=True,
        cancel=encrypt_disk.cancel,
        cancelled="the disk holds what it held, in clear; refused once its data has moved",
        give_up=lambda paths, consent, look, _: encrypt_disk.give_up(paths, consent, look),
    ),
    DiskDecryption: Handling(
        go_on=_finish_decryption,
        pausable=True,
        cancel=decrypt_disk.cancel,
        cancelled="the disk stays encrypted; refused once its header says that it is decrypted",
        give_up=decrypt_disk.give_up,
    ),
    Rekey: Handling(
        go_on=_finish_rekey,
        cancel=_cancel_rekey,
        cancelled="the group keeps the key that it has; refused once a disk has the new one",
    ),
    DeepRekey: Handling(
        go_on=_finish_deep_rekey,
        pausable=True,
        cancel=_cancel_deep_rekey,
        cancelled="every disk keeps its volume key; refused once a disk is half re-encrypted: it can only go forward",
        give_up=lambda paths, consent, look, _: rekey_deep.give_up(paths, consent, look),
    ),
    RecoveryRotation: Handling(
        needs="a terminal, or the file of the new recovery key",
        cancelled="disks may have the new recovery key beside the old one: finish it, then rotate again",
    ),
    RecoveryRenewal: Handling(
        needs="the recovery key",
        cancelled="it changes nothing but disks that lack the recovery key, and needs no way back",
    ),
    PersistenceChange: Handling(
        go_on=_finish_persistence_change,
        cancelled="some disks carry their key and others do not: finish it, then change it back",
    ),
    StoredKeysRemoval: Handling(
        go_on=_finish_removal_of_keys,
        cancelled="until the next boot `unlock persistence enable` takes it back",
    ),
    ProviderSwitch: Handling(
        go_on=_finish_switch,
        cancelled="groups may be at either provider: finish it, then switch back",
    ),
    Rebind: Handling(
        needs="the recovery key",
        cancelled="the TPM may have either key already: only its end leaves one",
    ),
    NewPersistenceKey: Handling(
        go_on=_finish_new_persistence_key,
        cancelled="the TPM may have either key already: only its end leaves one",
    ),
}


def handling(entry: JournalEntry) -> Handling:
    """How it goes on."""
    return _HANDLINGS[type(entry)]


# The four verbs


class Resumed(NamedTuple):
    """What came of it."""

    lines: list[str]
    """What a person should know."""
    is_finished: bool
    """Nothing is left that `unlock operation resume` could do now."""


class Shown(NamedTuple):
    """What `show` tells."""

    under_way: UnderWay
    needs: str
    """What a person must give; '' where `unlock operation resume` needs nothing."""
    can_pause: bool
    can_cancel: bool
    cancelled: str
    """What `cancel` would leave, or why there is none."""


def show(paths: Paths, look: find.Look = find.look) -> Shown | None:
    """None where nothing is under way. Changes nothing."""
    state = State.load(paths)
    found = under_way.read(paths, state, look)
    if state.journal is None or found is None:
        return None
    how = handling(state.journal)
    return Shown(found, how.needs, how.pausable, how.cancel is not None, how.cancelled)


def pause(
    paths: Paths, consent: Consent = agree, look: find.Look = find.look, patience: float = PATIENCE
) -> UnderWay | None:
    """Lets the operation stop at its next safe point, and not go on before it is resumed, after a reboot neither.
    Waits for that, at most `patience` seconds: it may be `running` still on return. None where a plan was only shown.
    Raises Refused."""
    state, found, how = _find(paths, look)
    if not how.pausable:
        why = f"`{found.command}` has no safe point to wait at"
        raise Refused(why, found.finish or "wait until it ends", "not-pausable")
    steps = ["mark the operation as paused, for reboots too"]
    if found.state == "running":
        steps.append("wait until its process has stopped at a safe point")
    if not consent(Plan(tuple(steps))):
        return None
    assert state.journal
    resumption.pause(paths, state.journal)
    end = time.monotonic() + patience
    while found.state == "running" and time.monotonic() < end:
        time.sleep(0.2)
        state = State.load(paths)
        if not (seen := under_way.read(paths, state, look)):
            resumption.lift_pause(paths.state)
            return found._replace(state="finished", done=found.total)
        found = seen
    return found


def resume(
    paths: Paths, tell: Tell, consent: Consent = agree, look: find.Look = find.look, tcti: str = ""
) -> Resumed | None:
    """Goes on with the operation to its end, and with those that go on after it. None where a plan was only shown.
    Raises Refused where a person must give something: the hint is the command; what the operation raises."""
    state, found, _ = _find(paths, look)
    _refuse_running(found)
    entries = journal.chain(state.journal)
    if handling(entries[0]).go_on is None:
        raise Refused(_describe_need(entries[0]), journal.command(entries[0]), "by-command")
    if not consent(Plan(tuple(f"finish `{journal.command(each)}`" for each in entries))):
        return None
    lines: list[str] = []
    run = Run(paths, tell, look, tcti)
    while entry := State.load(paths).journal:
        go_on = handling(entry).go_on
        if go_on is None:
            return Resumed([*lines, f"{_describe_need(entry)}: {journal.command(entry)}"], True)
        lines += go_on(run)
        left = State.load(paths).journal
        if left and (left.operation, left.about) == (entry.operation, entry.about):  # it was stopped, or a disk failed
            return Resumed(lines, False)
    return Resumed(lines, True)


def let_go_on(paths: Paths, consent: Consent = agree, look: find.Look = find.look) -> bool:
    """Lifts the pause of an operation that goes on by itself. False where a plan was only shown. Raises Refused."""
    _, found, _ = _find(paths, look)
    _refuse_running(found)
    if not found.by_itself:
        raise Refused(f"`{found.command}` does not go on by itself", "unlock operation resume", "by-command")
    if not consent(Plan((f"leave `{found.command}` to unlock-resume.service",))):
        return False
    resumption.lift_pause(paths.state)
    return True


def resume_unattended(paths: Paths, tell: Tell, look: find.Look = find.look, tcti: str = "") -> Resumed:
    """After a boot: the same for an operation that goes on by itself and is not paused; else says why nothing is
    done."""
    found = under_way.read(paths, State.load(paths), look)
    if not found:
        return Resumed([], True)
    if not found.by_itself:
        return Resumed([f"`{found.command}` does not go on by itself"], True)
    if found.state == "paused":
        return Resumed([f"`{found.command}` is paused: unlock operation resume"], True)
    return resume(paths, tell, agree, look, tcti) or Resumed([], True)


def cancel(paths: Paths, consent: Consent = agree, look: find.Look = find.look) -> list[str] | None:
    """Takes the operation back where that is safe. Returns what a person should know, a line each; None where a plan
    was only shown. Raises Refused, which says what will be, where it is not."""
    _, found, how = _find(paths, look)
    _refuse_running(found)
    if how.cancel is None:
        raise Refused(f"`{found.command}` cannot be cancelled: {how.cancelled}", found.finish, "not-cancellable")
    if not consent(Plan((f"take `{found.command}` back: {how.cancelled}",))):
        return None
    return how.cancel(paths, look)


def give_up(
    paths: Paths, consent: Consent = agree, look: find.Look = find.look, tcti: str = TPM_DEVICE
) -> list[str] | None:
    """Ends the operation although it could only go forward, as its disk is lost. Returns as `cancel`. Raises Refused
    when the disk is here, and for an operation that does not depend on one."""
    _, found, how = _find(paths, look)
    _refuse_running(found)
    if how.give_up is None:
        raise Refused(f"`{found.command}` does not end with a disk that is lost", found.finish, "not-cancellable")
    return how.give_up(paths, consent, look, tcti)


def _find(paths: Paths, look: find.Look) -> tuple[State, UnderWay, Handling]:
    """Raises Refused where nothing is under way."""
    state = State.load(paths)
    found = under_way.read(paths, state, look)
    if state.journal is None or found is None:
        raise Refused("no operation is under way", "unlock status", "no-operation")
    return state, found, handling(state.journal)


def _refuse_running(found: UnderWay) -> None:
    if found.state == "running":
        raise Refused(f"`{found.command}` runs now", "unlock operation show", "busy")


def _describe_need(entry: JournalEntry) -> str:
    return f"`{journal.command(entry)}` needs {handling(entry).needs}"
