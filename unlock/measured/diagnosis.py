# SPDX-License-Identifier: Apache-2.0
"""Names the causes of a refusal of the TPM, in the order of the boot.

    Evidence ──diagnose──> Explanation: causes, notes, and the status of each PCR of the policy

The verdict of early boot names the cause, but for `pcr-mismatch`. There the verified events are compared with those of
the baseline; a PCR without them is judged by its value alone.
"""

import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import NamedTuple

from ..tpm import pcr_policy
from ..tpm.chip import NO_BANK
from . import eventlog, verify
from .baseline import Baseline, TpmIdentity
from .causes import DETAILS, HOLDS, TITLES, USUAL
from .compare import Difference, compare_boots
from .describe import Item
from .describe_ipl import GRUB_COMMAND, is_kernel
from .evidence import Evidence
from .log_text import TEXT_MAX, printable

COPIED = "by the copy on the EFI partition, which anyone could have edited"
_IMA = 10
"""The PCR of the kernel's IMA, which keeps a log of its own."""
_MENU_LINE = re.compile(f"{GRUB_COMMAND}(menuentry|submenu|setparams|echo|initrd|initrdefi) ")
_MAIN_CONFIG = re.compile("GRUB configuration (?!.*/EFI/).*/grub\\.cfg", re.IGNORECASE)
_PLACE = re.compile(
    rf"{GRUB_COMMAND}((search|configfile|loopback|cryptomount)\b|(set )?(root|prefix)=)|GRUB configuration .*/EFI/",
    re.IGNORECASE,
)
"""What says on which file system GRUB looks for the rest."""
_SHOWN = 160
"""Characters of an old or new text."""


class Cause(NamedTuple):
    """One thing that differs; its fields are those of the JSON of `unlock explain`."""

    code: str
    """A key of TITLES: stable."""
    pcr: int | None
    title: str
    old: str
    """What the baseline has; '' when that is not known."""
    new: str
    usually: str
    """What usually causes it."""
    do: str
    """What to type."""


class Explanation(NamedTuple):
    """Why the TPM refused this boot."""

    verdict: str
    """Early boot's; '' without a report."""
    summary: str
    causes: tuple[Cause, ...]
    notes: tuple[str, ...]
    """What could not be found out, and what else is worth knowing."""
    pcrs: Mapping[int, str]
    """For each PCR of the policy: same, changed, unexplained, or unknown."""
    copied: bool
    """The baseline was the copy that anybody could have edited."""


def diagnose(evidence: Evidence) -> Explanation:
    """Explains the verdict of early boot."""
    verdict, detail = (evidence.early.verdict, evidence.early.detail) if evidence.early else ("", "")
    notes = [] if evidence.early else ["early boot left no report"]
    if evidence.lockout:
        notes.append(f"the TPM is locked out; it forgets one wrong try every {evidence.lockout} s")
    causes: list[Cause] = []
    pcrs: Mapping[int, str] = {}
    if verdict == "no-tpm":
        causes = [_cause_without_event("no-tpm")]
    elif evidence.bank_off and verdict in ("pcr-mismatch", "tpm-failed", ""):
        causes = [_cause_without_event(NO_BANK)]
    elif verdict == "no-slot" and evidence.policy_allows_log():
        notes.append("since then the key was sealed to this boot")
    elif verdict == "no-slot":
        causes = [_cause_without_event(_code_for_no_slot(evidence))]
    elif verdict == "tpm-failed":
        causes = [_cause_without_event("tpm-lockout" if evidence.lockout else "tpm-failed", new=detail)]
    elif verdict in ("pin-wrong", "pin-lockout", "unmeasured-input"):
        causes = [_cause_without_event(verdict, new=detail)]
    elif verdict in ("tampered", "malformed", "newer-format"):
        causes = [_cause_without_event(_code_for_broken_slot(evidence), new=detail)]
    elif verdict != "unsealed":
        causes, pcrs = _diagnose_mismatch(evidence, notes)
    copied = evidence.copied and verdict not in ("unsealed", "handed-over")
    summary = _summarise(verdict, causes, pcrs) + (f" ({COPIED})" if copied else "")
    return Explanation(
        verdict=verdict, summary=summary, causes=tuple(causes), notes=tuple(notes), pcrs=pcrs, copied=copied
    )


def _summarise(verdict: str, causes: Sequence[Cause], pcrs: Mapping[int, str]) -> str:
    """The first cause, and the subjects of the others."""
    if verdict in ("unsealed", "handed-over"):
        return "nothing to explain: the TPM released the key"
    if not causes and "unknown" in pcrs.values():
        return "what differs from the last good boot cannot be told"
    if not causes:
        return "nothing that was measured differs from the last good boot"
    first = causes[0]
    also = sorted({TITLES[each.code] for each in causes[1:]} - {TITLES[first.code]})
    return first.title + (f"; and with it {', '.join(also)}" if also else "")


def _code_for_no_slot(evidence: Evidence) -> str:
    """TPM2_Clear makes another SRK; another chip has another endorsement key too."""
    unknown = TpmIdentity(srk="", identity="")
    before = evidence.baseline.chip if evidence.baseline else unknown
    chip = evidence.chip or unknown
    if chip.identity and before.identity and chip.identity != before.identity:
        return "tpm-replaced"
    if evidence.record or (chip.srk and (not before.srk or chip.srk == before.srk)):  # TPM2_Clear removes records too
        return "slot-gone"
    return "tpm-cleared" if chip.identity and before.identity else "tpm-cleared-or-replaced"


def _code_for_broken_slot(evidence: Evidence) -> str:
    if evidence.record and evidence.chip and evidence.chip.srk != evidence.record.srk_name.hex():
        return "srk-changed"
    return "slot-broken"


def _diagnose_mismatch(evidence: Evidence, notes: list[str]) -> tuple[list[Cause], dict[int, str]]:
    """Causes, and the status of each PCR of the policy, when the TPM refused the PCRs. Adds to `notes`."""
    selection = evidence.record.selection if evidence.record else range(16)
    pcrs = tuple(pcr for pcr in selection if pcr != pcr_policy.CAP_PCR)
    notes += _missing_evidence(evidence)
    verified = evidence.verified_events()
    comparable = [pcr for pcr in pcrs if pcr in verified and _baseline_has_events(evidence.baseline, pcr)]
    old = evidence.baseline.items if evidence.baseline else ()
    differences = compare_boots(old, evidence.measured_items(verified), comparable)
    status = dict.fromkeys(comparable, "same") | {each.pcr: "changed" for each in differences}
    status |= {pcr: _status_by_value(pcr, evidence, pcr in verified) for pcr in pcrs if pcr not in status}
    causes = _causes_of_differences(differences, evidence)
    if not evidence.kexec:  # kexec loses what systemd logged before
        causes += [_cause_without_log(pcr, evidence, pcr in verified) for pcr in pcrs if status[pcr] == "unexplained"]
    return _causes_before_unlock(evidence) + causes, {pcr: status[pcr] for pcr in pcrs}


def _missing_evidence(evidence: Evidence) -> list[str]:
    notes = []
    if not evidence.live:
        notes.append(f"the TPM cannot be asked: {evidence.tpm_problem}")
    elif not evidence.record:
        notes.append("the TPM has no policy record of this host: all PCRs are compared")
    if not evidence.baseline:
        notes.append(evidence.baseline_problem)
    if not evidence.log:
        notes.append(evidence.log_problem)
    elif evidence.log.problem:
        notes.append(f"the event log cannot be read to its end: {evidence.log.problem}")
    return notes


def _causes_before_unlock(evidence: Evidence) -> list[Cause]:
    """The cap PCR was extended already when early boot began."""
    before = evidence.early.facts.cap_pcr_before if evidence.early else ""
    if evidence.kexec:
        return [_cause_without_event("kexec")]
    if before and before != pcr_policy.UNSET.hex():
        return [_cause_without_event("cap-pcr-extended")]
    return []


def _baseline_has_events(baseline: Baseline | None, pcr: int) -> bool:
    """Whether the baseline lists what this PCR was extended with; else it has the value alone, or nothing."""
    if baseline is None or pcr not in baseline.pcrs:
        return False
    return baseline.pcrs[pcr] == eventlog.initial_pcrs()[pcr] or any(each.pcr == pcr for each in baseline.items)


def _status_by_value(pcr: int, evidence: Evidence, verified: bool) -> str:
    """The status of a PCR whose events cannot be compared."""
    good = evidence.baseline.pcrs.get(pcr) if evidence.baseline else None
    if pcr not in evidence.live or (good is None and (verified or not evidence.log)):
        return "unknown"
    if good is not None and pcr in evidence.noted:
        return "same" if good == evidence.noted[pcr] else "unexplained"
    if good is not None and verify.extensions_between(pcr, good, evidence.later, evidence.live[pcr]) is not None:
        return "same"
    return "unexplained"


def _cause_without_log(pcr: int, evidence: Evidence, verified: bool) -> Cause:
    """The PCR is not what it was, and no event says why."""
    if pcr == _IMA:
        return _cause_without_event("ima", pcr)
    good = evidence.baseline.pcrs.get(pcr) if evidence.baseline else None
    if evidence.log and not verified:
        _, logged = verify.replay_each_pcr(evidence.log).get(pcr, ((), b""))
        as_before = good is not None and verify.extensions_between(pcr, logged, evidence.later, good) is not None
        if as_before or evidence.policy_allows_log():
            return _cause_without_event("pcr-extended", pcr)
        if good is None or _baseline_has_events(evidence.baseline, pcr):  # else the log was no better then
            return _cause_without_event("log-mismatch", pcr)
    return _cause_without_event("pcr-changed", pcr)


def _cause_without_event(code: str, pcr: int | None = None, new: str = "") -> Cause:
    where = f"PCR {pcr}: " if pcr is not None else ""
    if code == "pcr-extended":
        where = f"PCR {pcr} was extended by "
    elif pcr in HOLDS and code in ("pcr-changed", "log-mismatch"):
        where = f"PCR {pcr}, {HOLDS[pcr]}: "
    usually, do = USUAL[code]
    new = printable(new, _SHOWN)
    return Cause(code=code, pcr=pcr, title=where + TITLES[code], old="", new=new, usually=usually, do=do)


# Differences between two boots ------------------------------------------------------------------------------


def _causes_of_differences(differences: Sequence[Difference], evidence: Evidence) -> list[Cause]:
    """One for each. An update changes several things at once, which makes another cause of one of them the usual."""
    menu = _menu_differences(differences)
    unified = any(each.pcr == 11 for each in differences)
    return [_cause_of_difference(each, evidence, _usual_cause(each, menu, unified=unified)) for each in differences]


def _menu_differences(differences: Sequence[Difference]) -> list[Difference]:
    """The menu's lines in which nothing is new but a kernel's name; and grub.cfg, when no other command differs."""
    kernels = [each.new for each in differences if each.cause == "kernel" and each.new]
    versions = {version for each in kernels for version in _versions(each)}
    commands = [each for each in differences if each.cause == "boot-loader-config" and _is_command(each)]
    menu = [each for each in commands if _names_only_new(each, versions)]
    if menu == commands:
        menu += [each for each in differences if each.old and each.new and _MAIN_CONFIG.fullmatch(each.new.text)]
    return menu if versions and commands else []


def _versions(kernel: Item) -> Iterator[str]:
    """The versions in the names of kernel files in a text."""
    for word in kernel.text.split():
        name = word.rpartition("/")[2]
        if is_kernel(name.lower()) and (version := name.partition("-")[2]):
            yield version


def _is_command(each: Difference) -> bool:
    return any(item is not None and item.text.startswith(GRUB_COMMAND) for item in (each.old, each.new))


def _names_only_new(each: Difference, versions: Iterable[str]) -> bool:
    """Whether each word that is new in this line of the menu names one of the kernels."""
    if not (each.old and each.new and _MENU_LINE.match(each.new.text)):
        return False
    known, words = set(each.old.text.split()), each.new.text.split()
    if len(each.new.text) >= TEXT_MAX - 1:  # it is cut
        words.pop()
    kernel = re.compile("|".join(rf"(?<![\d.]){re.escape(version)}(?![\d.])" for version in versions) or "$^")
    return all(word in known or kernel.search(word) for word in words)


def _usual_cause(each: Difference, menu: Sequence[Difference], *, unified: bool) -> tuple[str, str]:
    """What usually causes it, and what to type. `unified`: a section of the unified kernel image differs."""
    old, new = (item.text if item else "" for item in (each.old, each.new))
    if each in menu:
        return DETAILS["kernel-update"]
    if each.cause == "boot-loader-config" and (_PLACE.match(old) or _PLACE.match(new)):
        return DETAILS["elsewhere"]
    if each.cause == "boot-loader" and unified:
        return DETAILS["uki-started"]
    if _is_deny_list(each):
        return DETAILS["mokx"]
    if each.cause in ("dbx", "sbat") and old and (not new or _revocations(new) < _revocations(old)):
        return DETAILS[f"{each.cause}-reset"]
    return USUAL[each.cause]


def _is_deny_list(each: Difference) -> bool:
    return each.cause == "mok" and any(item and item.text.startswith("MokListX") for item in (each.old, each.new))


def _revocations(text: str) -> int:
    """How much a dbx or an SBAT level revokes: its entries, or its date. 0 when that is not known."""
    found = re.match(r"dbx: (\d+) entr|SbatLevel: sbat,\d+,(\d+)", text)
    return int(found[1] or found[2]) if found else 0


def _cause_of_difference(each: Difference, evidence: Evidence, words: tuple[str, str]) -> Cause:
    """`words`: what usually causes it, and what to type."""
    old, new = _texts_of_difference(each, evidence)
    usually, do = words
    old, new = excerpts(old, new)
    title = f"PCR {each.pcr}: {_change_in_words(each)}"
    return Cause(code=each.cause, pcr=each.pcr, title=title, old=old, new=new, usually=usually, do=do)


def _change_in_words(each: Difference) -> str:
    what = "shim's deny list (MokListX)" if _is_deny_list(each) else TITLES[each.cause]
    if each.cause == "secure-boot" and each.new and each.new.text in ("Secure Boot off", "Secure Boot on"):
        return f"Secure Boot was switched {each.new.text.rpartition(' ')[2]}"
    if each.moved:
        return f"{what}: the same events in another order"
    if each.old is None:
        return f"{what}: an event is new"
    if each.new is None:
        return f"{what}: an event is gone"
    return f"{what} changed"


def _texts_of_difference(each: Difference, evidence: Evidence) -> tuple[str, str]:
    """What the two events say; where they say the same, what else is known to differ."""
    old, new = (item.text if item else "" for item in (each.old, each.new))
    before = evidence.baseline
    if each.cause == "kernel" and before and old == new and before.kernel != evidence.kernel:
        old, new = f"{old}, Linux {before.kernel}", f"{new}, Linux {evidence.kernel}"
    if each.cause == "command-line" and before and old == new and before.cmdline != evidence.cmdline:
        old, new = before.cmdline, evidence.cmdline
    if each.old and each.new and old == new:  # the log says no more of it
        old, new = (f"{text} (SHA-256 {item.digest[:8].hex()}…)" for text, item in ((old, each.old), (new, each.new)))
    return old, new


def excerpts(old: str, new: str, most: int = _SHOWN) -> tuple[str, str]:
    """The part of two long texts where they begin to differ: `most` characters of each, from a word's start if that
    is near."""
    same = next((at for at, (a, b) in enumerate(zip(old, new, strict=False)) if a != b), min(len(old), len(new)))
    start = max(0, same - most // 2) if max(len(old), len(new)) > most else 0
    word = old.rfind(" ", 0, start + 1) + 1
    if same - word <= most * 3 // 4:
        start = word
    return _cut_text(old, start, most), _cut_text(new, start, most)


def _cut_text(text: str, start: int, most: int) -> str:
    part = text[start : start + most]
    return ("… " if start and part else "") + part + ("…" if len(text) > start + most else "")
