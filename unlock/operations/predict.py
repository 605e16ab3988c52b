# SPDX-License-Identifier: Apache-2.0
"""`unlock policy predict`: allows the boots that may come next, so that an update does not lock the host out.

    gather_input(): this boot's event log and files, and the files as they are now ──> PredictionInput
    predict_next_boots(): for each boot that may come next, what changed, and PCR values or why they are not known
    predict_and_allow(): the TPM releases the key to those boots too

It predicts only from a boot that the TPM allowed, and only with files that this boot has measured, or that this system
has written since: nothing else vouches for /boot (predict.trusted_files). What a file does not tell (firmware, its
settings, a new shim) is never guessed: those PCRs stay as they are, or the prediction is Refused.
"""

import os
from collections.abc import Iterable
from typing import NamedTuple, TypedDict

from .. import journald, log, messages
from ..errors import CommandFailed, Refused, UnlockError
from ..host import this_boot
from ..host.state import State
from ..measured import at_unseal, efivars, eventlog, logs, verify
from ..paths import Paths
from ..predict import allowed_states, boot_files, booted, efistub, grub_menu, initramfs_images, uki
from ..predict.boot_tree import BootTree
from ..predict.next_boot import NextBoot, PredictionInput, boot_loaders, check_signer
from ..predict.replay import cannot_predict
from ..tpm.chip import Tpm
from .baseline import log_accepted

BOOTS_MAX = 6
"""Boots that are predicted: a policy holds eight states, and two are this boot's and the one before."""
_BY_FILES = {4, 5, 8, 9, 11, 12, 13}
"""PCRs in which programs, configuration, kernel and initramfs are measured."""
_SOME = b"\xff" * 32
"""Stands for the value of a PCR that was extended by something unknown."""


class Prediction(NamedTuple):
    """What may boot next. Construct it by keywords."""

    boots: tuple[NextBoot, ...]
    """The default one first."""
    notes: tuple[str, ...]
    """What is worth knowing; `doubts` among them."""
    states: int
    """How many states the policy has now."""
    doubts: tuple[str, ...] = ()
    """What the prediction of the default boot depends on."""
    needed: bool = True
    """Whether the TPM looks at what an update of files changes; else `boots` is empty."""


# Predicting -------------------------------------------------------------------------------------------------


def predict_next_boots(inputs: PredictionInput) -> tuple[list[NextBoot], list[str], list[str]]:
    """The boots that may come next, the default one first; doubts about that one; and notes. Raises Refused."""
    doubts, notes = _check_boot_loaders(inputs), list[str]()
    method = at_unseal.boot_method(inputs.paths, {pcr: inputs.values.get(pcr, _SOME) for pcr in range(16)})
    if method == "shim+GRUB":
        found = grub_menu.next_boots(inputs)
        if inputs.booted.disks != boot_files.disk_locations(inputs.paths):
            doubts.append("disks came or went since this boot: GRUB measures their numbers, which may be others then")
    elif method == "UKI":
        found = uki.next_boots(inputs)
    elif method == "direct kernel":
        found = efistub.next_boots(inputs)
    else:
        raise cannot_predict("how this host boots is not known")
    boots = sorted(found, key=lambda each: not each.default)
    if not boots or not boots[0].default:
        raise cannot_predict("what it would start by itself is not there any more")
    doubts += dict.fromkeys(each.doubt for each in boots if each.doubt and each.default)
    notes += dict.fromkeys(each.doubt for each in boots if each.doubt and each.doubt not in doubts)
    if len(boots) > BOOTS_MAX:
        left = ", ".join(each.words for each in boots[BOOTS_MAX:])
        notes.append(f"the policy has no room for all entries of the boot menu; not predicted: {left}")
    return boots[:BOOTS_MAX], doubts, notes


def _check_boot_loaders(inputs: PredictionInput) -> list[str]:
    """Doubts about a GRUB or systemd-boot that is new, or not on disk as it was booted. Raises Refused for a new
    shim."""
    doubts = []
    shim = any(event.pcr == 14 and event.data.startswith(b"MokList") for event in inputs.log.events)
    loaders, images = dict(boot_loaders(inputs)), dict(inputs.booted.images)
    started = [each for each in inputs.log.events if each.kind == eventlog.EFI_APPLICATION and each.pcr == 4]
    files = [(each, name) for each in started if "\\" in (name := boot_files.program_name(each))]
    for number, (event, name) in enumerate(files):
        digest = event.digest or b""
        path = images.get(digest) or boot_files.find_started_file(inputs.tree, event)
        if path and (digest not in loaders or boot_files.authenticode(inputs.tree, path) == digest):
            continue
        there = path or next(boot_files.find_programs(inputs.tree, name), "")
        if shim and not number and there:
            why = "is not this boot's: which revocations a new shim measures is not known"
            raise cannot_predict(f"{there} {why}")
        if path:
            doubts.append(f"{path} is not this boot's: predicted as if it did the same")
        elif there:
            doubts.append(f"{there} is not on disk as it was booted")
        else:
            doubts.append(f"{name} cannot be seen: is the EFI system partition mounted?")
    for path in loaders.values():
        why, doubt = check_signer(inputs, old=path, new=path)
        if why:
            raise cannot_predict(f"{path}: {why}")
        doubts += [doubt] if doubt else []
    return doubts


def gather_input(paths: Paths, tpm: Tpm) -> PredictionInput:
    """Reads what is predicted from. Sends reading commands alone to the TPM.

    Raises Refused when the TPM does not allow this boot, or the event log does not account for what files change.
    """
    later = logs.read_systemd_log(paths)
    live = tpm.read_pcrs(range(eventlog.PCRS))
    found, problem = logs.read_event_log(paths, later, live)
    if found is None:
        raise cannot_predict(problem)
    allowed = allowed_states.current(paths, tpm)
    if not allowed.opened:
        raise Refused(
            "this boot is none that the TPM allows: nothing is predicted from it", "unlock explain", "boot-not-allowed"
        )
    selection = set(allowed.record.selection)
    unknown = _BY_FILES & selection - verify.verified_events(found, later, live).keys()
    if unknown:
        raise cannot_predict(f"the event log does not account for PCR {min(unknown)}: what is measured is not known")
    asked = at_unseal.unseal_time(this_boot.read_early_report(paths), 0.0)
    tree = BootTree(paths)
    return PredictionInput(
        paths=paths,
        tree=tree,
        log=found,
        booted=booted.load_booted_files(tree, found),
        later=tuple(event for event in later if event.time < asked),
        values=at_unseal.read_pcrs(paths, tpm),
        secure=7 in selection and efivars.measured_variables(found).get("SecureBoot") == b"\1",
    )


def predict_and_allow(paths: Paths, tcti: str, dry_run: bool = False, trust_files: bool = False) -> Prediction:
    """Predicts, and allows what was predicted, but with `dry_run`. `trust_files`: the operator vouches for the foreign
    ones.

    A boot that cannot be predicted prevents no other. Raises Refused, and whatever `allowed_states.predicted` raises.
    """
    State.load(paths)
    with Tpm(tcti) as tpm:
        allowed = allowed_states.current(paths, tpm)
        if not _BY_FILES & set(allowed.record.selection):
            note = "no update of files changes what the TPM looks at: there is nothing to predict"
            return Prediction(boots=(), notes=(note,), states=len(allowed.states), needed=False)
        inputs = gather_input(paths, tpm)
        if trust_files:
            now, accepted, left = booted.accept_boot_files(inputs.tree, inputs.booted)
            log_accepted(accepted, left, dry_run=dry_run)
            inputs = inputs._replace(booted=now)
        boots, doubts, notes = predict_next_boots(inputs)
        boots = [_with_all_pcrs(each, allowed.record.selection) for each in boots]
        boots = [_with_unlock(inputs, each, notes) for each in boots]
        states = len(allowed_states.current(paths, tpm).states)
    predicted = {each.words: each.values for each in boots if each.values is not None}
    if predicted and not dry_run:
        states = len(allowed_states.predicted(paths, predicted, tcti).states)
        words = f"the TPM allows what was predicted: {'; '.join(predicted)}"
        journald.record(paths, messages.POLICY_PREDICTED, words, boots=predicted)
    if not dry_run:
        if trust_files:
            booted.save_booted_files(paths, inputs.booted)
        booted.trust_boot_files(inputs.tree, inputs.booted)
    for why in list(booted.Judge(inputs.tree, inputs.booted).foreign_sources().values())[:1]:
        notes.append(f"no new file below /boot is trusted: {why}")
    return Prediction(boots=tuple(boots), notes=(*doubts, *notes), states=states, doubts=tuple(doubts))


def _with_all_pcrs(boot: NextBoot, selection: Iterable[int]) -> NextBoot:
    """The boot; not predicted when the value of a PCR of the policy is not known."""
    unknown = set(selection) - boot.values.keys() if boot.values is not None else set()
    if unknown:
        return boot._replace(values=None, why=f"what it will measure into PCR {min(unknown)} cannot be told")
    return boot


def _with_unlock(inputs: PredictionInput, boot: NextBoot, notes: list[str]) -> NextBoot:
    """The boot; not predicted when unlock is not in its initramfs: nothing would lock the TPM then. Adds a note where
    the image cannot be listed. The image of this boot has unlock, as the TPM has released the key."""
    tree, image = inputs.tree, boot.initrd
    measured = {each.digest for each in inputs.log.events}
    if boot.values is None or not image or {tree.digest(image), boot_files.authenticode(tree, image)} & measured:
        return boot
    name = os.path.basename(image)
    try:
        contents = initramfs_images.read_contents(tree, image)
    except CommandFailed as error:
        notes.append(f"whether unlock is in {name} is not known: {error}")
        return boot
    if contents.unlock:
        return boot
    do = initramfs_images.how_to_rebuild(tree, image)
    return boot._replace(values=None, why=f"unlock is not in {name}, so nothing would lock the TPM: {do}")


def default_boot_refusal(found: Prediction) -> Refused | None:
    """Why the default boot is not predicted; None when it is."""
    bad = [each for each in found.boots if each.default and each.values is None]
    prefix = "the next boot's measurements cannot be predicted: "
    return cannot_predict(bad[0].why.removeprefix(prefix)) if bad else None


# After an update --------------------------------------------------------------------------------------------


def predict_after_update(paths: Paths, tcti: str) -> int:
    """`unlock boot predict`: predicts, and says on stderr what the next boot will do.

    Returns 1 when it is worth trying again though no file changes: another command was running, or the TPM failed.
    """
    if not os.path.exists(paths.state):
        return 0
    try:
        found = predict_and_allow(paths, tcti)
    except UnlockError as problem:
        if problem.code == "not-initialised":
            return 0
        _log_problem(problem)
        return 0 if problem.code in ("cannot-predict", "boot-not-allowed", "no-key", "pin-needed") else 1
    except OSError as problem:
        _log_problem(cannot_predict(str(problem)))
        return 1
    for each in found.boots:
        if each.values is not None and each.changes:
            log.note(f"unlock: next boot: {each.words} is predicted: {', '.join(each.changes)}")
    for note in found.notes:
        log.note(f"unlock: {note}")
    if refusal := default_boot_refusal(found):
        _log_problem(refusal)
    return 0


def _log_problem(problem: UnlockError) -> None:
    log.error(str(problem), problem.hint)
    log.note("unlock: at the next boot the TPM may refuse; the recovery key opens the disks then")


# Output -----------------------------------------------------------------------------------------------------


class NextBootJson(TypedDict):
    """A boot that may come next, as JSON."""

    words: str
    default: bool
    predicted: bool
    changes: list[str]
    why: str
    pcrs: dict[str, str]
    """Number -> 64 hex digits."""


class PredictionJson(TypedDict):
    """What `unlock policy predict --json` prints."""

    version: int
    entries: list[NextBootJson]
    notes: list[str]
    states: int


def to_json(found: Prediction) -> PredictionJson:
    """For scripts."""
    return {
        "version": 1,
        "entries": [_boot_to_json(each) for each in found.boots],
        "notes": list(found.notes),
        "states": found.states,
    }


def _boot_to_json(boot: NextBoot) -> NextBootJson:
    return {
        "words": boot.words,
        "default": boot.default,
        "predicted": boot.values is not None,
        "changes": list(boot.changes),
        "why": boot.why,
        "pcrs": {str(pcr): value.hex() for pcr, value in sorted((boot.values or {}).items())},
    }


def to_text(found: Prediction) -> str:
    """For people."""
    lines = []
    for each in found.boots:
        what = ", ".join(each.changes) or "as this boot"
        lines.append(f"{each.words}: " + (f"predicted: {what}" if each.values is not None else f"not: {each.why}"))
    return log.join_lines([*lines, *(f"note: {each}" for each in found.notes)])
