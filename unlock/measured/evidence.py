# SPDX-License-Identifier: Apache-2.0
"""Gathers what explains a refusal of the TPM: early boot's report, the TPM, the event logs, the baseline.

    gather_evidence() ──> Evidence ──> diagnosis.diagnose()               `unlock explain`
                                   ──> operations.baseline                the baseline of a good boot

It works in the recovery shell of the initramfs too. What cannot be read is None there, beside the reason in words.
"""

import os
from collections.abc import Mapping, Sequence
from types import MappingProxyType
from typing import NamedTuple

from .. import initramfs
from ..errors import Malformed, UnlockError
from ..host import report, this_boot
from ..paths import TPM_DEVICE, Paths
from ..tpm import pcr_policy
from ..tpm.chip import NO_BANK, Tpm
from ..tpm.record import SLOTS, Record
from . import at_unseal, describe, esp_copy, eventlog, logs, verify
from .baseline import BASELINE_MAX, Baseline, TpmIdentity
from .describe import Item
from .eventlog import Event, Log
from .log_text import TEXT_MAX, printable

_KEXEC = 0xD
"""The type in /proc/sys/kernel/bootloader_type when kexec started the kernel (linux, Documentation/arch/x86/boot.rst).

Other architectures do not tell; there the cap PCR does.
"""
"""Exists in an initramfs alone."""


class Evidence(NamedTuple):
    """All that `diagnose` looks at. Construct it by keywords."""

    early: report.Report | None
    """The report of early boot."""
    record: Record | None
    """The policy record of the current slot."""
    live: Mapping[int, bytes]
    """PCRs 0 to 23; empty when the TPM cannot be asked."""
    tpm_problem: str
    """Why it cannot be asked, or not all of it; empty when it can."""
    log: Log | None
    """The firmware's event log."""
    log_problem: str
    """Why there is no log; empty when there is one."""
    later: Sequence[Event]
    """What systemd logged."""
    baseline: Baseline | None
    baseline_problem: str
    """Why there is no baseline; empty when there is one."""
    chip: TpmIdentity | None
    lockout: int
    """Seconds until the TPM forgets one wrong try, when it is locked out; else 0."""
    kexec: bool
    """kexec started this kernel."""
    kernel: str
    """`uname -r`."""
    cmdline: str
    copied: bool
    """The baseline is the copy on the EFI partition, which anybody could have edited."""
    bank_off: bool = False
    """The TPM has no SHA-256 value of a PCR."""
    noted: Mapping[int, bytes] = MappingProxyType({})
    """PCRs as early boot noted them when it had asked the TPM, confirmed by `live`."""

    def verified_events(self) -> dict[int, tuple[Event, ...]]:
        """By PCR, the logged events that account for its value; empty without a log. Where early boot has noted it,
        those until then."""
        return verify.verified_events(self.log, self.later, {**self.live, **self.noted}) if self.log else {}

    def measured_items(self, verified: Mapping[int, Sequence[Event]]) -> tuple[Item, ...]:
        """The verified events that were measured before early boot asked the TPM, in words."""
        asked = at_unseal.unseal_time(self.early, float("inf"))
        events = [event for event in (self.log.events if self.log else ()) if event.pcr in verified]
        later = (event for each in verified.values() for event in each if event.kind == eventlog.SYSTEMD)
        events += sorted((event for event in later if event.time < asked), key=lambda event: event.time)
        return describe.with_command_line(describe.describe_events(events), self.cmdline)

    def policy_allows(self, values: Mapping[int, bytes]) -> bool:
        """Whether the policy allows these PCR values, with a cap PCR that nothing has extended."""
        if not self.record or not set(self.record.selection) - {self.record.cap} <= values.keys():
            return False
        return pcr_policy.branch(self.record.selection, values, self.record.cap) in self.record.branches

    def policy_allows_log(self) -> bool:
        """Whether the policy would have allowed this boot, had nothing but the log's events been measured."""
        if not self.log:
            return False
        return self.policy_allows({pcr: value for pcr, (_, value) in verify.replay_each_pcr(self.log).items()})


def gather_evidence(paths: Paths, tcti: str = TPM_DEVICE) -> Evidence:
    """Reads it all. Changes nothing, but mounts the kernel's securityfs in an initramfs."""
    tpm = _read_tpm(tcti)
    later = logs.read_systemd_log(paths)
    log, log_problem = logs.read_event_log(paths, later, tpm.live)
    baseline, baseline_problem = _load_baseline(paths)
    copy = _load_baseline_copy(paths) if not baseline and initramfs.of_image() else None
    cmdline = logs.read_up_to(paths.cmdline, TEXT_MAX).decode("utf-8", "replace")
    return Evidence(
        early=this_boot.read_early_report(paths),
        record=tpm.record,
        live=tpm.live,
        tpm_problem=tpm.problem,
        log=log,
        log_problem=log_problem,
        later=later,
        baseline=baseline or copy,
        baseline_problem=baseline_problem,
        chip=tpm.chip,
        lockout=tpm.lockout,
        kexec=_started_by_kexec(logs.read_up_to(paths.bootloader, 16)),
        kernel=printable(os.uname().release, 256),
        cmdline=printable(cmdline, TEXT_MAX),
        copied=copy is not None,
        bank_off=tpm.bank_off,
        noted=verify.confirm_note(this_boot.noted_pcrs(paths), later, tpm.live),
    )


def _started_by_kexec(bootloader: bytes) -> bool:
    return bootloader.strip().isdigit() and int(bootloader) >> 4 == _KEXEC


class _TpmAnswers(NamedTuple):
    """What the TPM answered before it failed; the fields of Evidence."""

    record: Record | None = None
    live: Mapping[int, bytes] = {}
    problem: str = ""
    chip: TpmIdentity | None = None
    lockout: int = 0
    bank_off: bool = False


def _read_tpm(tcti: str) -> _TpmAnswers:
    found = _TpmAnswers()
    try:
        with Tpm(tcti) as tpm:
            found = found._replace(live=tpm.read_pcrs(range(eventlog.PCRS)))
            found = found._replace(record=_newest_record(tpm))
            facts = tpm.facts()
            found = found._replace(lockout=facts.lockout_interval if facts.in_lockout else 0)
            chip = TpmIdentity(srk=tpm.srk_name().hex(), identity="")
            found = found._replace(chip=chip)
            found = found._replace(chip=chip._replace(identity=tpm.chip_name().hex()))
    except UnlockError as error:
        found = found._replace(problem=str(error), bank_off=error.code == NO_BANK)
    return found


def _newest_record(tpm: Tpm) -> Record | None:
    """The record of the highest generation that can be read."""
    found = []
    for slot in SLOTS:
        try:
            found.append(tpm.read_record(slot))
        except UnlockError:
            continue
    return max(found, key=lambda each: each.generation, default=None)


def _load_baseline(paths: Paths) -> tuple[Baseline | None, str]:
    """The host's own baseline, or None and why."""
    new_root = (initramfs.of_image() or initramfs.INITRAMFS_TOOLS).new_root
    for path in (paths.baseline, Paths(os.path.join(paths.root, new_root.lstrip("/"))).baseline):
        try:
            if data := logs.read_up_to(path, BASELINE_MAX + 1):
                return Baseline.decode(data), ""
        except Malformed as error:
            return None, str(error)
    return None, "there is no record of a good boot here: what was measured then cannot be told"


def _load_baseline_copy(paths: Paths) -> Baseline | None:
    """The first copy on an EFI partition that can be read."""
    for data in esp_copy.read_copies(paths):
        try:
            return Baseline.decode(data)
        except Malformed:
            continue
    return None
