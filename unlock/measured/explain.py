# SPDX-License-Identifier: Apache-2.0
"""`unlock explain`: why the TPM refused; and the baseline that it compares with.

    gather(): this boot's report, the TPM, the event log, the baseline ──> World
    judge(World) ──> Explanation: causes in the order of the boot, the first one first
    keep_baseline(): after a good boot, what was measured, for the next refusal

It works in the recovery shell too, with what is there: without a baseline it cannot say what was before.
"""

import json
import os
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from .. import log
from ..errors import Malformed, Refused, UnlockError
from ..host import report, this_boot
from ..paths import Paths, write_atomically
from ..tpm import pcr_policy
from ..tpm.chip import Tpm
from ..tpm.record import SLOTS, Record
from . import at_unseal, describe, esp_copy, eventlog
from .describe import CAUSES, Baseline, Chip, Difference, Item
from .eventlog import Event, Log

_KEXEC = 0xD
"""The type in /proc/sys/kernel/bootloader_type when kexec started the kernel (linux, Documentation/arch/x86/boot.rst).

Other architectures do not tell; there the cap PCR does.
"""
_NEW_ROOT = "root"
"""Where initramfs-tools mounts the root file system, with the baseline in it."""
_INITRAMFS = "/scripts/unlock-functions"
"""Is there in an initramfs alone."""
COPIED = "by the copy on the EFI partition, which anyone could have edited"
_IMA = 10
"""The PCR of the kernel's IMA, which keeps a log of its own."""
_SHOWN = 160
"""Characters of an old or new text."""
_RETYPE = "type the recovery key; then, if the change was yours: unlock rebind"
_REBIND = "type the recovery key, then: unlock rebind"
_WINDOW = "; before the next one: unlock policy window --reboots 1"
_PREDICT = "; after the next one, before the reboot: unlock policy predict"

USUAL = {
    "firmware": ("a firmware update", "fwupdmgr get-history; " + _RETYPE + _WINDOW),
    "firmware-settings": (
        "a change in the firmware's setup, or another device",
        "undo it in the firmware's setup, or " + _RETYPE,
    ),
    "option-rom": (
        "a device was added, removed, or got new firmware",
        "lspci -nn, and compare with what should be there; " + _RETYPE,
    ),
    "boot-order": ("the boot order was changed, or another entry was chosen", "efibootmgr -v"),
    "boot-path": (
        "another boot entry came first and failed, or was chosen by hand; or a firmware update, or MokManager, ran",
        "efibootmgr -v, and reboot",
    ),
    "partition-table": ("the boot disk was partitioned anew, or is another one", "lsblk -f; " + _RETYPE),
    "secure-boot": ("Secure Boot was switched in the firmware's setup", "switch it back: mokutil --sb-state shows it"),
    "secure-boot-keys": (
        "the firmware's keys were reset, or updated by fwupd, Windows or the firmware",
        "mokutil --pk; mokutil --kek; mokutil --db; " + _RETYPE,
    ),
    "dbx": (
        "an update of the revocation list, by fwupd, Windows or the firmware",
        "fwupdmgr get-history; " + _RETYPE + _WINDOW,
    ),
    "signer": ("a boot loader or kernel signed by somebody else", "reinstall the distribution's shim and boot loader"),
    "sbat": ("an update of shim, or another system on this host that raised the level", _RETYPE),
    "mok": ("a key was enrolled or deleted: DKMS, mokutil", "mokutil --list-enrolled; " + _RETYPE),
    "boot-loader": (
        "an update of shim, GRUB or systemd-boot",
        _RETYPE + _PREDICT + "; where that refuses a new shim: unlock policy window --reboots 1",
    ),
    "boot-loader-files": ("an update of GRUB or its theme", _RETYPE),
    "boot-loader-config": (
        "grub.cfg or loader.conf was generated anew, or edited",
        "compare it with what you expect; " + _RETYPE + _PREDICT,
    ),
    "grubenv": ("the boot before did not finish, or grub-reboot was used", "grub-editenv list; " + _RETYPE),
    "kernel": ("a kernel update", "boot the previous kernel, or " + _RETYPE + _PREDICT),
    "initrd": ("update-initramfs ran: after an update, or a change in its configuration", _RETYPE + _PREDICT),
    "command-line": (
        "somebody edited it: in the boot menu for once, or in the configuration",
        "cat /proc/cmdline; reboot, or " + _RETYPE,
    ),
    "uki": ("an update of the unified kernel image", "boot the previous image, or " + _RETYPE + _PREDICT),
    "extension": (
        "a file beside the kernel on the EFI partition came, went or changed",
        "look into the EFI partition; " + _RETYPE,
    ),
    "ima": ("IMA is in a PCR of the policy: it changes at every boot", _REBIND + " --pcrs N,N without 10"),
    "systemd": ("the initramfs, or systemd, is another version", _RETYPE),
    "other": ("not known", _RETYPE),
    "pcr-extended": ("a program extended it, by hand or on its own, before the TPM was asked", "reboot"),
    "log-mismatch": ("the firmware's event log is incomplete or wrong", "reboot; " + _RETYPE),
    "pcr-changed": ("no event log tells", _RETYPE),
    "kexec": ("kexec keeps the PCRs, and the TPM has been locked since the last real boot", "reboot, not kexec"),
    "cap-pcr-extended": ("kexec, or a program that ran before unlock in the initramfs", "reboot, not kexec"),
    "no-tpm": ("it is off in the firmware's setup, or its driver is not in the initramfs", "ls /sys/class/tpm"),
    "tpm-cleared": ("cleared in the firmware's setup, or by a firmware update", _REBIND),
    "tpm-replaced": ("another board, another TPM, or another virtual machine's state", _REBIND),
    "tpm-cleared-or-replaced": ("cleared in the firmware's setup; or another board", _REBIND),
    "slot-gone": ("another program evicted it, or this host was never enrolled", _REBIND + "; or unlock init"),
    "srk-changed": ("another program evicted it, or made a new one", _REBIND),
    "slot-broken": ("another program wrote to it", _REBIND),
    "tpm-lockout": ("wrong passwords were tried on the TPM", "wait, or tpm2_dictionarylockout --clear-lockout"),
    "pin-wrong": (
        "it was mistyped, or is another one by now",
        "reboot and type the PIN; forgotten: type the recovery key, then: unlock rebind --pin",
    ),
    "pin-lockout": (
        "wrong PINs were typed, here or by somebody who tried; each power cut after a right one counts too",
        "wait with the power on, reboot and type the PIN; or type the recovery key",
    ),
    "tpm-failed": ("the TPM's firmware, or its driver", "dmesg | grep -i tpm"),
}
"""What usually causes it, and what to type. The keys of CAUSES, and those that no event stands for."""

HOLDS = {
    0: "the firmware",
    1: "the firmware's settings and tables",
    2: "the firmware of devices",
    3: "the settings of devices",
    4: "shim, the boot loader, and what else the firmware starts",
    5: "the boot disk's partition table",
    6: "what the vendor of the board measures",
    7: "Secure Boot, its keys, and who signed",
    8: "GRUB's commands and the kernel command line",
    9: "the files that GRUB read, the initramfs",
    11: "the unified kernel image",
    12: "the command line and what is beside a unified kernel image",
    13: "system extensions",
    14: "the Machine Owner Keys",
}
"""For PCRs of which no event tells: what they are extended with."""

TITLES = CAUSES | {
    "pcr-extended": "something that is not in the event log",
    "log-mismatch": "the event log is not what the TPM has seen",
    "pcr-changed": "it is not what it was",
    "kexec": "this kernel was started by kexec",
    "cap-pcr-extended": "PCR 15 was extended before unlock ran",
    "no-tpm": "there is no TPM",
    "tpm-cleared": "the TPM was cleared",
    "tpm-replaced": "this is another TPM",
    "tpm-cleared-or-replaced": "the TPM was cleared, or is another one",
    "slot-gone": "what unlock kept in the TPM is gone",
    "srk-changed": "the TPM's storage root key is gone, or another one",
    "slot-broken": "what unlock kept in the TPM was changed",
    "tpm-lockout": "the TPM is locked out",
    "pin-wrong": "no right PIN was typed",
    "pin-lockout": "the TPM is locked out after wrong PINs",
    "tpm-failed": "the TPM does not work as it should",
}


class World(NamedTuple):
    """All that `judge` looks at."""

    early: dict[str, Any] | None
    """The report of early boot."""
    record: Record | None
    """The policy record of the current slot."""
    live: Mapping[int, bytes]
    """PCRs 0 to 23; empty when the TPM cannot be asked."""
    tpm_problem: str
    """Why it cannot be asked, or not all of it; empty when it can."""
    log: Log | None
    log_problem: str
    """Why there is no log; empty when there is one."""
    later: Sequence[Event]
    """What systemd logged."""
    baseline: Baseline | None
    baseline_problem: str
    chip: Chip | None
    lockout: int
    """Seconds until the TPM forgets one wrong try, when it is locked out; else 0."""
    kexec: bool
    kernel: str
    cmdline: str
    copied: bool = False
    """Whether the baseline is the copy that anybody could have edited."""


class Cause(NamedTuple):
    """One thing that differs."""

    code: str
    """A key of TITLES: stable."""
    pcr: int | None
    title: str
    old: str
    new: str
    usually: str
    do: str


class Explanation(NamedTuple):
    verdict: str
    summary: str
    causes: tuple[Cause, ...]
    notes: tuple[str, ...]
    """What could not be found out, and what else is worth knowing."""
    pcrs: Mapping[int, str]
    """For each PCR of the policy: same, changed, unexplained, or unknown."""
    copied: bool = False
    """Whether this is by the copy of the baseline that anybody could have edited."""


# Judging ----------------------------------------------------------------------------------------------------


def judge(world: World) -> Explanation:
    verdict = world.early["verdict"] if world.early else ""
    notes = [] if world.early else ["early boot left no report"]
    if world.lockout:
        notes.append(f"the TPM is locked out; it forgets one wrong try every {world.lockout} s")
    causes: list[Cause] = []
    pcrs: Mapping[int, str] = {}
    if verdict == "no-tpm":
        causes = [_plain("no-tpm")]
    elif verdict == "no-slot" and _log_is_allowed(world):
        notes.append("since then the key was sealed to this boot")
    elif verdict == "no-slot":
        causes = [_plain(_no_slot(world))]
    elif verdict == "tpm-failed":
        detail = world.early["detail"] if world.early else ""
        causes = [_plain("tpm-lockout" if world.lockout else "tpm-failed", new=detail)]
    elif verdict in ("pin-wrong", "pin-lockout"):
        causes = [_plain(verdict, new=world.early["detail"] if world.early else "")]
    elif verdict in ("tampered", "malformed", "newer-format"):
        causes = [_broken(world)]
    elif verdict != "unsealed":
        causes, pcrs = _mismatch(world, notes)
    copied = world.copied and verdict not in ("unsealed", "handed-over")
    summary = _summary(verdict, causes, pcrs) + (f" ({COPIED})" if copied else "")
    return Explanation(verdict, summary, tuple(causes), tuple(notes), pcrs, copied)


def _summary(verdict: str, causes: Sequence[Cause], pcrs: Mapping[int, str]) -> str:
    if verdict in ("unsealed", "handed-over"):
        return "nothing to explain: the TPM released the key"
    if not causes and "unknown" in pcrs.values():
        return "what differs from the last good boot cannot be told"
    if not causes:
        return "nothing that was measured differs from the last good boot"
    first = causes[0]
    also = sorted({TITLES[each.code] for each in causes[1:]} - {TITLES[first.code]})
    return first.title + (f"; and with it {', '.join(also)}" if also else "")


def _no_slot(world: World) -> str:
    known = world.baseline.chip if world.baseline else Chip("", "")
    chip = world.chip or Chip("", "")
    if chip.identity and known.identity and chip.identity != known.identity:
        return "tpm-replaced"
    if world.record or (chip.srk and (not known.srk or chip.srk == known.srk)):  # TPM2_Clear takes records away too
        return "slot-gone"
    return "tpm-cleared" if chip.identity and known.identity else "tpm-cleared-or-replaced"


def _broken(world: World) -> Cause:
    detail = world.early["detail"] if world.early else ""
    if world.record and world.chip and world.chip.srk != world.record.srk_name.hex():
        return _plain("srk-changed", new=detail)
    return _plain("slot-broken", new=detail)


def _mismatch(world: World, notes: list[str]) -> tuple[list[Cause], dict[int, str]]:
    """The TPM refused for what it has measured."""
    causes = []
    before = world.early["facts"].get("cap_pcr_before", "") if world.early else ""
    if world.kexec:
        causes.append(_plain("kexec"))
    elif before and before != pcr_policy.UNSET.hex():
        causes.append(_plain("cap-pcr-extended"))
    selection = tuple(
        pcr for pcr in (world.record.selection if world.record else range(16)) if pcr != pcr_policy.CAP_PCR
    )
    if not world.live:
        notes.append(f"the TPM cannot be asked: {world.tpm_problem}")
    elif not world.record:
        notes.append("the TPM has no policy record of this host: all PCRs are compared")
    if not world.baseline:
        notes.append(world.baseline_problem)
    if not world.log:
        notes.append(world.log_problem)
    elif world.log.problem:
        notes.append(f"the event log cannot be read to its end: {world.log.problem}")
    trusted = _trusted(world)
    comparable = [pcr for pcr in selection if pcr in trusted and _has_events(world.baseline, pcr)]
    old = world.baseline.items if world.baseline else ()
    differences = describe.compare(old, items_now(world, trusted), comparable)
    causes += [_difference(each, world) for each in differences]
    status = dict.fromkeys(comparable, "same") | {each.pcr: "changed" for each in differences}
    status |= {pcr: _status(pcr, world, pcr in trusted) for pcr in selection if pcr not in status}
    if any(each.code == "kernel" for each in causes):
        menu = "a kernel update: the boot menu names another kernel"
        causes = [each._replace(usually=menu) if each.code == "boot-loader-config" else each for each in causes]
    if any(each.pcr == 11 for each in differences):
        image = "an update of the unified kernel image, which the firmware starts"
        causes = [each._replace(usually=image) if each.code == "boot-loader" else each for each in causes]
    if not world.kexec:  # it loses what systemd logged before
        causes += [_unlogged(pcr, world, pcr in trusted) for pcr in selection if status[pcr] == "unexplained"]
    return causes, {pcr: status[pcr] for pcr in selection}


def _trusted(world: World) -> dict[int, tuple[Event, ...]]:
    return describe.believed(world.log, world.later, world.live) if world.log else {}


def _has_events(baseline: Baseline | None, pcr: int) -> bool:
    """Whether the baseline tells what this PCR was extended with; else it has the value alone, or nothing."""
    if baseline is None or pcr not in baseline.pcrs:
        return False
    return baseline.pcrs[pcr] == eventlog.start()[pcr] or any(each.pcr == pcr for each in baseline.items)


def _status(pcr: int, world: World, trusted: bool) -> str:
    """By its value alone."""
    good = world.baseline.pcrs.get(pcr) if world.baseline else None
    if pcr not in world.live or (good is None and (trusted or not world.log)):
        return "unknown"
    if good is not None and describe.continued(pcr, good, world.later, world.live[pcr]) is not None:
        return "same"
    return "unexplained"


def _unlogged(pcr: int, world: World, trusted: bool) -> Cause:
    """No event tells why this PCR is not what it was."""
    if pcr == _IMA:
        return _plain("ima", pcr)
    good = world.baseline.pcrs.get(pcr) if world.baseline else None
    if world.log and not trusted:
        _, reached = describe.replayed(world.log).get(pcr, ((), b""))
        as_before = good is not None and describe.continued(pcr, reached, world.later, good) is not None
        if as_before or _log_is_allowed(world):
            return _plain("pcr-extended", pcr)
        if good is None or _has_events(world.baseline, pcr):  # else the log was no better then
            return _plain("log-mismatch", pcr)
    return _plain("pcr-changed", pcr)


def _log_is_allowed(world: World) -> bool:
    """Whether the policy would have been satisfied, had nothing but the log's events been measured."""
    if not world.record or not world.log:
        return False
    return _is_allowed(world.record, {pcr: value for pcr, (_, value) in describe.replayed(world.log).items()})


def _is_allowed(record: Record, values: Mapping[int, bytes]) -> bool:
    """Whether these PCRs, with a cap PCR that nothing has extended, are a state that the policy allows."""
    if not set(record.selection) - {record.cap} <= values.keys():
        return False
    return pcr_policy.branch(record.selection, values, record.cap) in record.branches


def items_now(world: World, trusted: Mapping[int, Sequence[Event]]) -> tuple[Item, ...]:
    """What was measured before the TPM was asked, of believed PCRs."""
    asked = at_unseal.asked(world.early, float("inf"))
    events = [event for event in (world.log.events if world.log else ()) if event.pcr in trusted]
    later = (event for kept in trusted.values() for event in kept if event.kind == eventlog.SYSTEMD)
    events += sorted((event for event in later if event.time < asked), key=lambda event: event.time)
    return describe.with_command_line(map(describe.describe, events), world.cmdline)


def _plain(code: str, pcr: int | None = None, new: str = "") -> Cause:
    where = f"PCR {pcr}: " if pcr is not None else ""
    if code == "pcr-extended":
        where = f"PCR {pcr} was extended by "
    elif pcr in HOLDS and code in ("pcr-changed", "log-mismatch"):
        where = f"PCR {pcr}, {HOLDS[pcr]}: "
    return Cause(code, pcr, where + TITLES[code], "", describe.printable(new, _SHOWN), *USUAL[code])


def _difference(each: Difference, world: World) -> Cause:
    old, new = (item.text if item else "" for item in (each.old, each.new))
    what = TITLES[each.cause]
    if each.moved:
        how = f"{what}: the same events in another order"
    elif each.old is None:
        how = f"{what}: an event is new"
    elif each.new is None:
        how = f"{what}: an event is gone"
    else:
        how = f"{what} changed"
    if each.cause == "secure-boot" and new in ("Secure Boot off", "Secure Boot on"):
        how = f"Secure Boot was switched {new.rpartition(' ')[2]}"
    if each.cause == "kernel" and world.baseline and old == new and world.baseline.kernel != world.kernel:
        old, new = f"{old}, Linux {world.baseline.kernel}", f"{new}, Linux {world.kernel}"
    if each.cause == "command-line" and world.baseline and old == new and world.baseline.cmdline != world.cmdline:
        old, new = world.baseline.cmdline, world.cmdline
    if each.old and each.new and old == new:  # the log says no more of it
        old, new = (f"{text} (SHA-256 {item.digest[:8].hex()}…)" for text, item in ((old, each.old), (new, each.new)))
    return Cause(each.cause, each.pcr, f"PCR {each.pcr}: {how}", *excerpts(old, new), *USUAL[each.cause])


def excerpts(old: str, new: str, most: int = _SHOWN) -> tuple[str, str]:
    """The part of two long texts where they begin to differ: `most` characters of each, from a word's start if that
    is near."""
    same = next((at for at, (a, b) in enumerate(zip(old, new, strict=False)) if a != b), min(len(old), len(new)))
    start = max(0, same - most // 2) if max(len(old), len(new)) > most else 0
    word = old.rfind(" ", 0, start + 1) + 1
    if same - word <= most * 3 // 4:
        start = word
    return _cut(old, start, most), _cut(new, start, most)


def _cut(text: str, start: int, most: int) -> str:
    part = text[start : start + most]
    return ("… " if start and part else "") + part + ("…" if len(text) > start + most else "")


# Gathering --------------------------------------------------------------------------------------------------


def gather(paths: Paths, tcti: str = "device:/dev/tpmrm0") -> World:
    """Changes nothing but, in an initramfs, mounting the kernel's securityfs. What is not there is told in words."""
    record, live, tpm_problem, chip, lockout = _ask_tpm(tcti)
    later = eventlog.parse_systemd(at_unseal.read(paths.systemd_log, eventlog.MAX_SYSTEMD_LOG))
    found, problem = at_unseal.event_log(paths, later, live)
    baseline, baseline_problem = _baseline(paths)
    copy = _copied(paths) if not baseline and os.path.exists(_INITRAMFS) else None
    cmdline = at_unseal.read(paths.cmdline, describe.TEXT_MAX).decode("utf-8", "replace")
    return World(
        this_boot.read_early_report(paths),
        record,
        live,
        tpm_problem,
        found,
        problem,
        later,
        baseline or copy,
        baseline_problem,
        chip,
        lockout,
        _started_by_kexec(at_unseal.read(paths.bootloader, 16)),
        describe.printable(os.uname().release, 256),
        describe.printable(cmdline, describe.TEXT_MAX),
        copy is not None,
    )


def _started_by_kexec(bootloader: bytes) -> bool:
    return bootloader.strip().isdigit() and int(bootloader) >> 4 == _KEXEC


def _ask_tpm(tcti: str) -> tuple[Record | None, Mapping[int, bytes], str, Chip | None, int]:
    """Policy record, PCRs, what failed, which chip, and its lockout; what cannot be had is None or empty."""
    record: Record | None = None
    live: Mapping[int, bytes] = {}
    problem, chip, lockout = "", None, 0
    try:
        with Tpm(tcti) as tpm:
            live = tpm.read_pcrs(range(eventlog.PCRS))
            record = _current(tpm)
            facts = tpm.facts()
            lockout = facts.lockout_interval if facts.in_lockout else 0
            chip = Chip(tpm.srk_name().hex(), "")
            chip = chip._replace(identity=tpm.chip_name().hex())
    except UnlockError as error:
        problem = str(error)
    return record, live, problem, chip, lockout


def _current(tpm: Tpm) -> Record | None:
    """The record of the highest generation that can be read."""
    found = []
    for slot in SLOTS:
        try:
            found.append(tpm.read_record(slot))
        except UnlockError:
            continue
    return max(found, key=lambda each: each.generation, default=None)


def _baseline(paths: Paths) -> tuple[Baseline | None, str]:
    for path in (paths.baseline, Paths(os.path.join(paths.root, _NEW_ROOT)).baseline):
        try:
            if data := at_unseal.read(path, describe.BASELINE_MAX + 1):
                return Baseline.decode(data), ""
        except Malformed as error:
            return None, str(error)
    return None, "there is no record of a good boot here: what was measured then cannot be told"


def _copied(paths: Paths) -> Baseline | None:
    """The first copy on an EFI partition that can be read."""
    for data in esp_copy.read(paths):
        try:
            return Baseline.decode(data)
        except Malformed:
            continue
    return None


# The baseline -----------------------------------------------------------------------------------------------


def keep_baseline(paths: Paths, tcti: str = "device:/dev/tpmrm0", sealed: bool = False) -> Baseline | None:
    """After a boot that the TPM allowed: keeps what was measured. None after any other, which teaches nothing.
    `sealed`: it is one that the TPM would allow now.

    Kept by PCR, and only where the log replays to the live value. Of a PCR of the policy that the log does not account
    for, the value alone, if the policy proves it: what the TPM looked at is what there is now. Where there is no log,
    the values alone.
    Raises OSError, Malformed.
    """
    world = gather(paths, tcti)
    if not sealed and (not world.early or world.early["verdict"] != "unsealed"):
        return None
    trusted = _trusted(world)
    items = items_now(world, trusted)
    if world.log:
        kept = {pcr: value for pcr, value in _values(items, world.log.locality).items() if pcr in trusted}
        now = {**world.live, **kept}
        if world.record and _is_allowed(world.record, now):
            kept |= {pcr: now[pcr] for pcr in world.record.selection if pcr != pcr_policy.CAP_PCR}
    else:  # systemd goes on extending 11 and the cap PCR
        kept = {pcr: value for pcr, value in world.live.items() if pcr < 16 and pcr not in (11, pcr_policy.CAP_PCR)}
    baseline = Baseline(world.kernel, world.cmdline, world.chip or Chip("", ""), kept, items)
    data = baseline.encode()
    if at_unseal.read(paths.baseline, describe.BASELINE_MAX) != data:
        write_atomically(paths.baseline, data)
    try:
        esp_copy.write(paths, data)
    except OSError as error:
        log.note(f"no copy for the recovery shell: {error}")
    return baseline


def _values(items: Sequence[Item], locality: int) -> dict[int, bytes]:
    return eventlog.replay((Event(each.pcr, each.kind, each.digest, b"") for each in items), locality)


# Telling ----------------------------------------------------------------------------------------------------


def explain(paths: Paths, as_json: bool) -> int:
    """`unlock explain`. Raises Refused without root."""
    if os.geteuid() != 0:
        raise Refused("unlock needs root", "sudo unlock explain", code="not-root")
    found = judge(gather(paths, this_boot.tpm_device()))
    print(json.dumps(fields(found), indent=1) if as_json else text(found))
    return 0


def fields(found: Explanation) -> dict[str, Any]:
    """For scripts."""
    return {
        "version": 1,
        "verdict": found.verdict,
        "summary": found.summary,
        "causes": [each._asdict() for each in found.causes],
        "notes": list(found.notes),
        "copied": found.copied,
        "pcrs": {str(pcr): status for pcr, status in found.pcrs.items()},
    }


def text(found: Explanation) -> str:
    """For people: the first event of each kind in each PCR."""
    lines = [found.summary]
    if found.verdict not in ("", "unsealed"):
        lines.insert(0, f"verdict   {report.VERDICTS.get(found.verdict, found.verdict)}")
    kinds: dict[tuple[str, int | None], list[Cause]] = {}
    for cause in found.causes:
        kinds.setdefault((cause.code, cause.pcr), []).append(cause)
    for number, (cause, *more) in enumerate(kinds.values(), 1):
        also = f"{len(more)} more such event{'s' if more[1:] else ''}: --json lists them" if more else ""
        lines += ["", f"{number}. {cause.title}"]
        rows = [("was", cause.old), ("is", cause.new), ("and", also), ("usually", cause.usually), ("do", cause.do)]
        lines += [f"   {name:<8} {value}" for name, value in rows if value]
    if found.notes:
        lines += ["", *(f"note: {each}" for each in found.notes)]
    return "\n".join(lines)
