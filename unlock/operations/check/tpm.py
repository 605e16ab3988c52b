# SPDX-License-Identifier: Apache-2.0
"""Checks the TPM: its slot, what this boot was, the PIN; and whether it will allow the next boot."""

from collections.abc import Iterator

from ...errors import NewerFormat, NoSlot, UnlockError
from ...host import keyring, report, this_boot
from ...host.state import State
from ...measured import at_unseal
from ...measured.eventlog import Log
from ...paths import Paths
from ...predict import allowed_states
from ...tpm import pcr_policy
from ...tpm.chip import Facts, Tpm
from ...tpm.record import SLOTS, Record, Slot
from .. import policy, predict
from ..predict import Prediction
from .finding import NOTE, SAFE, UNPROVEN, UNSAFE, Finding
from .firmware import check_secure_boot


def check_tpm(
    paths: Paths, state: State, tcti: str, predicted: Prediction | UnlockError, log: Log | None
) -> Iterator[Finding]:
    """The slot, and whether the TPM allowed this boot and will allow the next one."""
    early = this_boot.read_early_report(paths)
    try:
        with Tpm(tcti) as tpm:
            found = current_slot(tpm)
            if found is None:
                yield Finding("TPM", UNSAFE, "it keeps nothing of this host", "unlock explain")
                return
            slot, record = found
            if record.host.hex() != state.host:
                yield Finding("TPM", UNSAFE, f"slot {slot.name} is of another installation", "unlock explain")
                return
            tpm.verify(slot, record)
            opened = allowed_states.current(paths, tpm).opened
            facts = tpm.facts()
            boot = at_unseal.boot_method(paths, at_unseal.read_pcrs(paths, tpm))
    except UnlockError as error:
        yield Finding("TPM", UNSAFE, str(error), error.hint or "unlock explain")
        return
    proven = f"slot {slot.name}: object and policy are what the record says, {len(record.branches)} allowed state(s)"
    yield Finding("TPM", SAFE, proven)
    verdict = early.verdict if early else ""
    if opened and verdict != "unsealed":
        later = "the TPM allows what it has measured, and has not been asked yet"
        yield Finding("this boot", UNPROVEN, later, "reboot")
    if opened or verdict == "unsealed":
        yield from check_next_boot(predicted, record)
        yield from check_secure_boot(paths, log, record.selection)
    else:
        why = report.VERDICTS.get(verdict, "early boot left no report")
        yield Finding("this boot", UNSAFE, f"{why}; the next one is like this one", "unlock explain")
    yield from _check_pin(record, facts)
    when_closed = {*record.selection, *(state.tpm.window.pcrs if state.tpm.window else ())}
    if missing := at_unseal.missing_for_kernel(boot, log, when_closed):
        yield Finding("policy", NOTE, policy.describe_not_checked(missing), "unlock policy set --pcrs N,N")
    if missing := at_unseal.missing_for_drivers(boot, log, when_closed):
        unseen = f"Secure Boot is off, and PCRs {', '.join(map(str, missing))} are not checked: drivers run unseen"
        yield Finding("policy", NOTE, unseen, "unlock policy set --pcrs N,N")
    if record.needs != allowed_states.needs_of_root(state, paths.root):
        silent = "it does not say which disks the root needs: one without its token would not be called altered"
        yield Finding("TPM", NOTE, silent, "unlock disk adopt, of the root's disk once more")
    if at_unseal.initramfs_unmeasured(boot, log):
        edited = "nothing measures it, as `initrd=` names it: whoever edits it gets the keys"
        yield Finding("initramfs", NOTE, edited, "boot a unified kernel image")
    if state.narrowed is not None:
        earlier = f"{state.narrowed}, but earlier copies of headers still open: there is no new persistence key yet"
        yield Finding("policy", NOTE, earlier, "unlock rekey --fresh")
    if window := state.tpm.window:
        yield Finding("policy", NOTE, policy.describe_window(window.since, window.reboots), "unlock policy close")


def _check_pin(record: Record, facts: Facts) -> Iterator[Finding]:
    """What follows from a PIN: its lockout, and who can take it back."""
    if not record.pin:
        return
    if facts.in_lockout:
        locked = f"the TPM is locked out after wrong PINs, and forgets one in {facts.lockout_interval} s"
        yield Finding("PIN", UNSAFE, locked, "wait, or tpm2_dictionarylockout --clear-lockout")
    asked = "the TPM asks for it at every boot: this host does not boot unattended"
    yield Finding("PIN", NOTE, asked, "unlock policy set --no-pin")
    if not facts.lockout_auth_set:
        free = "the TPM's lockout has no password: whoever boots another system clears the count, and tries on"
        yield Finding("PIN", NOTE, free, "tpm2_changeauth -c lockout")
    if allowed_states.PIN_AUTH not in keyring.names():
        lost = "what it makes is not in the key cache: no change of the policy, so no prediction either"
        yield Finding("PIN", NOTE, lost, "unlock policy set --pin")


def predict_or_error(paths: Paths, tcti: str) -> Prediction | UnlockError:
    """What the files on disk will measure, or why that is not known."""
    try:
        return predict.predict_and_allow(paths, tcti, dry_run=True)
    except UnlockError as error:
        return error


def check_next_boot(predicted: Prediction | UnlockError, record: Record) -> Iterator[Finding]:
    """Whether the TPM allows the boots that may come next."""
    if isinstance(predicted, UnlockError):
        yield Finding("next boot", UNPROVEN, str(predicted), predicted.hint)
        return
    for each in predicted.boots:
        what, verdict = ("next boot", UNSAFE) if each.default else ("boot menu", NOTE)
        if each.values is None:
            yield Finding(what, verdict, f"{each.words}: {each.why}", "unlock policy predict")
            continue
        changes = ", ".join(each.changes) or "measures what this boot did"
        branch = pcr_policy.branch(record.selection, at_unseal.known_values(record.selection, each.values), record.cap)
        if branch in record.branches:
            yield Finding(what, SAFE, f"{each.words}: the TPM allows it: {changes}")
        else:
            yield Finding(what, verdict, f"{each.words}: the TPM will refuse it: {changes}", "unlock policy predict")
    if not predicted.needed:
        yield Finding("next boot", SAFE, predicted.notes[0])
    for doubt in predicted.doubts:
        yield Finding("next boot", UNPROVEN, doubt, "unlock policy window --reboots 1")


def current_slot(tpm: Tpm) -> tuple[Slot, Record] | None:
    """The slot that early boot tries first; None when there is none. A damaged slot counts only when no other is whole.

    Raises UnlockError.
    """
    found, problems = [], []
    for slot in SLOTS:
        state = tpm.slot_state(slot)
        if state.record and state.complete:
            found.append((slot, state.record))
        elif state.problem and not isinstance(state.problem, NoSlot):
            problems.append(state.problem)
    newer = [each for each in problems if isinstance(each, NewerFormat)]
    if newer or (problems and not found):
        raise (newer or problems)[0]
    return max(found, key=lambda pair: pair[1].generation, default=None)
