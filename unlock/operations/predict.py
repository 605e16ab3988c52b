# SPDX-License-Identifier: Apache-2.0
"""`unlock policy predict`: an update must not lock the host out.

    Booted (what this boot has read), its event log, the files as they are now
      ──foresee──> for each entry that may come next: words, what changed, PCR values or why they cannot be told
      ──predict──> allowed.predicted: the TPM releases the key to those boots too

Only a boot that the TPM allowed may predict, and only from files that it has measured, or that this system has written
since: nothing else vouches for /boot (predict.boot_files). What a file does not tell (firmware, its settings, a new
shim) is never guessed: those PCRs stay as they are, or it is Refused.
"""

import os
from collections.abc import Iterable
from typing import Any, NamedTuple

from .. import log
from ..errors import Refused, UnlockError
from ..host import this_boot
from ..host.state import State
from ..measured import at_unseal, efivars, eventlog, logs, verify
from ..paths import Paths
from ..predict import allowed_states, boot_files, efistub, grub_menu, replay, uki
from ..predict.entry import Entry, World, loaders, signed
from ..tpm.chip import Tpm

MOST = 6
"""Entries that are predicted: a policy holds eight states, and two are this boot's and the one before."""

_BY_FILES = {4, 5, 8, 9, 11, 12, 13}
"""PCRs in which programs, configuration, kernel and initramfs are measured."""
_SOME = b"\xff" * 32
"""Of a PCR that was extended, and by what cannot be told."""


class Foreseen(NamedTuple):
    entries: tuple[Entry, ...]
    notes: tuple[str, ...]
    states: int
    """How many the policy has now."""
    doubts: tuple[str, ...] = ()
    """Those of the notes that what is predicted depends on."""
    needed: bool = True
    """Whether the TPM looks at what an update of files changes; else there are no entries."""


# Foreseeing -------------------------------------------------------------------------------------------------


def foresee(world: World) -> tuple[list[Entry], list[str], list[str]]:
    """The entries that may boot next, the default one first, what that depends on, and what else is worth knowing.
    Raises Refused."""
    doubts, notes = _programs(world), list[str]()
    kind = at_unseal.boot_method(world.paths, {pcr: world.values.get(pcr, _SOME) for pcr in range(16)})
    if kind == "shim+GRUB":
        found = grub_menu.entries(world)
        if world.before.disks != boot_files.disks(world.paths):
            doubts.append("disks came or went since this boot: GRUB measures their numbers, which may be others then")
    elif kind == "UKI":
        found = uki.entries(world)
    elif kind == "direct kernel":
        found = efistub.entries(world)
    else:
        raise replay.cannot("how this host boots is not known")
    entries = sorted(found, key=lambda each: not each.default)
    if not entries or not entries[0].default:
        raise replay.cannot("what it would start by itself is not there any more")
    doubts += dict.fromkeys(each.doubt for each in entries if each.doubt and each.default)
    notes += dict.fromkeys(each.doubt for each in entries if each.doubt and each.doubt not in doubts)
    if len(entries) > MOST:
        left = ", ".join(each.words for each in entries[MOST:])
        notes.append(f"the policy has no room for all entries of the boot menu; not predicted: {left}")
    return entries[:MOST], doubts, notes


def _programs(world: World) -> list[str]:
    """What is said of a GRUB or systemd-boot that is new, or not on disk as it was booted. Refused for such a shim."""
    notes = []
    shim = any(event.pcr == 14 and event.data.startswith(b"MokList") for event in world.log.events)
    known, images = dict(loaders(world)), dict(world.before.images)
    started = [each for each in world.log.events if each.kind == eventlog.EFI_APPLICATION and each.pcr == 4]
    files = [(each, name) for each in started if "\\" in (name := boot_files.program(each))]
    for number, (event, name) in enumerate(files):
        digest = event.digest or b""
        path = images.get(digest) or boot_files.started(world.paths, event)
        if path and (digest not in known or boot_files.authenticode(world.paths, path) == digest):
            continue
        there = path or next(boot_files.programs(world.paths, name), "")
        if shim and not number and there:
            why = "is not this boot's: which revocations a new shim measures is not known"
            raise replay.cannot(f"{there} {why}")
        if path:
            notes.append(f"{path} is not this boot's: predicted as if it did the same")
        elif there:
            notes.append(f"{there} is not on disk as it was booted")
        else:
            notes.append(f"{name} cannot be seen: is the EFI system partition mounted?")
    for path in known.values():
        why, doubt = signed(world, path, path)
        if why:
            raise replay.cannot(f"{path}: {why}")
        notes += [doubt] if doubt else []
    return notes


# The host ---------------------------------------------------------------------------------------------------


def gather(paths: Paths, tpm: Tpm) -> World:
    """Refused when this boot left no log, or one that does not account for what files change, or is none that the TPM
    allows. Sends reading commands alone."""
    later = logs.read_systemd_log(paths)
    live = tpm.read_pcrs(range(eventlog.PCRS))
    found, problem = logs.read_event_log(paths, later, live)
    if found is None:
        raise replay.cannot(problem)
    allows = allowed_states.current(paths, tpm)
    if not allows.opened:
        raise Refused(
            "this boot is none that the TPM allows: nothing is predicted from it", "unlock explain", "boot-not-allowed"
        )
    unknown = _BY_FILES & set(allows.record.selection) - verify.verified_events(found, later, live).keys()
    if unknown:
        raise replay.cannot(f"the event log does not account for PCR {min(unknown)}: what is measured is not known")
    asked = at_unseal.unseal_time(this_boot.early(paths), 0.0)
    early = tuple(event for event in later if event.time < asked)
    secure = 7 in allows.record.selection and efivars.measured_variables(found).get("SecureBoot") == b"\1"
    return World(paths, found, boot_files.load(paths, found), early, at_unseal.read_pcrs(paths, tpm), secure)


def run(paths: Paths, tcti: str, dry_run: bool = False, trust_files: bool = False) -> Foreseen:
    """Foresees, and reseals. `trust_files`: the operator vouches for those that are foreign. An entry that cannot be
    predicted leaves out no other. Raises Refused, and whatever `allowed.predicted` raises."""
    State.load(paths)
    with Tpm(tcti) as tpm:
        found = allowed_states.current(paths, tpm)
        if not _BY_FILES & set(found.record.selection):
            note = "no update of files changes what the TPM looks at: there is nothing to predict"
            return Foreseen((), (note,), len(found.states), needed=False)
        world = gather(paths, tpm)
        if trust_files:
            world = world._replace(before=world.before._replace(foreign={}))
        entries, doubts, notes = foresee(world)
        entries = [_told(each, found.record.selection) for each in entries]
        states = len(allowed_states.current(paths, tpm).states)
    good = {each.words: each.values for each in entries if each.values is not None}
    if good and not dry_run:
        states = len(allowed_states.predicted(paths, good, tcti).states)
    if not dry_run:
        if trust_files:
            boot_files.save(paths, world.before)
        boot_files.vouch(paths, world.before)
    return Foreseen(tuple(entries), (*doubts, *notes), states, tuple(doubts))


def _told(entry: Entry, selection: Iterable[int]) -> Entry:
    """Not predicted when a PCR of the policy is not told."""
    try:
        at_unseal.known_values(selection, entry.values or {})
    except Refused:
        if entry.values is not None:
            unknown = min(set(selection) - entry.values.keys())
            return entry._replace(values=None, why=f"what it will measure into PCR {unknown} cannot be told")
    return entry


def refused(found: Foreseen) -> Refused | None:
    """When the default entry cannot be predicted."""
    bad = [each for each in found.entries if each.default and each.values is None]
    return replay.cannot(bad[0].why.removeprefix("the next boot's measurements cannot be predicted: ")) if bad else None


def hook(paths: Paths, tcti: str) -> int:
    """`unlock boot predict`, after an update: says on stderr what the next boot will do. 1 when it is worth
    trying again though no file changes: another command was at work, or the TPM failed."""
    if not os.path.exists(paths.state):
        return 0
    try:
        found = run(paths, tcti)
    except UnlockError as problem:
        if problem.code == "not-initialised":
            return 0
        _warn(problem)
        return 0 if problem.code in ("cannot-predict", "boot-not-allowed", "no-key", "pin-needed") else 1
    except OSError as problem:
        _warn(replay.cannot(str(problem)))
        return 1
    for each in found.entries:
        if each.values is not None and each.changes:
            log.note(f"unlock: next boot: {each.words} is predicted: {', '.join(each.changes)}")
    for note in found.notes:
        log.note(f"unlock: {note}")
    if bad := refused(found):
        _warn(bad)
    return 0


def _warn(problem: UnlockError) -> None:
    log.error(str(problem), problem.hint)
    log.note("unlock: at the next boot the TPM may refuse; the recovery key opens the disks then")


def fields(found: Foreseen) -> dict[str, Any]:
    """For scripts."""
    return {
        "version": 1,
        "entries": [
            {
                "words": each.words,
                "default": each.default,
                "predicted": each.values is not None,
                "changes": list(each.changes),
                "why": each.why,
                "pcrs": {str(pcr): value.hex() for pcr, value in sorted((each.values or {}).items())},
            }
            for each in found.entries
        ],
        "notes": list(found.notes),
        "states": found.states,
    }


def text(found: Foreseen) -> str:
    lines = []
    for each in found.entries:
        what = ", ".join(each.changes) or "as this boot"
        lines.append(f"{each.words}: " + (f"predicted: {what}" if each.values is not None else f"not: {each.why}"))
    return "\n".join([*lines, *(f"note: {each}" for each in found.notes)])
