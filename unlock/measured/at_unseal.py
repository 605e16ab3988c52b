# SPDX-License-Identifier: Apache-2.0
"""PCR values as they were when early boot asked the TPM for the key, worked out later by the running system.

    early boot's note + systemd's later log == the live PCR  ──> the note; without equality the PCR is not known
    no note, as an image of an older unlock booted:
    firmware's event log + systemd's log == the live PCR     ──> both are verified; systemd's later part is taken off
    a PCR without a verified log                             ──> its live value, if nothing extends it later

A policy must be sealed to these values, not to the live ones: systemd goes on measuring boot phases into PCR 11 of a
unified kernel image, and IMA measures into PCR 10 for as long as the system runs.
"""

import glob
import os
from collections.abc import Iterable, Mapping

from ..errors import Refused
from ..host import report, this_boot
from ..paths import Paths
from ..tpm import pcr_policy
from ..tpm.chip import Tpm
from . import efivars, eventlog, verify
from .eventlog import Log
from .logs import read_event_log, read_systemd_log

MEASURED_BY = {
    "shim+GRUB": (4, 7, 8, 9, 14),
    "UKI": (4, 7, 11, 12, 13),
    "direct kernel": (4, 7, 9),
}
"""PCRs of the policy, by how the host boots; the cap PCR always comes on top. systemd-stub measures into 13 the system
extensions that it finds beside a unified kernel image: systemd of an initramfs merges those that are signed."""
_KERNEL = {
    "shim+GRUB": (8, 9),
    "UKI": (11, 12),
    "direct kernel": (4, 9),
}
"""PCRs that kernel, initramfs and command line are measured into, by how the host boots. PCR 4 has the whole of a
unified kernel image as well."""
RISKS = {
    "unmeasured-boot": "the kernel, the initramfs or the command line is not measured, or its PCR is not chosen: "
    "whoever edits it gets the keys",
    "unmeasured-drivers": "Secure Boot is off, and PCRs 0 to 3 are not all chosen: whoever adds a driver (a "
    "Driver#### variable, an option ROM) gets the keys",
}
"""Of a selection of PCRs, by the name with which it is accepted."""
DRIVERS = frozenset((0, 1, 2, 3))
"""PCRs of the firmware, its settings, and the drivers that it runs before any boot loader: of option ROMs and of the
variables Driver#### (TCG "PC Client Platform Firmware Profile", section 3.3.4)."""


def read_pcrs(paths: Paths, tpm: Tpm) -> dict[int, bytes]:
    """PCRs 0 to 15 as they were then; the cap PCR as the policy wants it. A PCR whose value is not known is left out.

    Sends PCR_Read twice.
    """
    live = tpm.read_pcrs(range(16))
    later = read_systemd_log(paths)
    asked = unseal_time(this_boot.read_early_report(paths), 0.0)
    log, _ = read_event_log(paths, later, live)
    note = this_boot.noted_pcrs(paths)
    values = verify.values_at_unseal(asked, log, later, live)
    values = {pcr: value for pcr, value in values.items() if pcr not in note}
    return values | verify.confirm_note(note, later, live) | {pcr_policy.CAP_PCR: pcr_policy.UNSET}


def known_values(selection: Iterable[int], found: Mapping[int, bytes]) -> dict[int, bytes]:
    """The values of these PCRs. Raises Refused, code `pcr-unknown`, when one of them is not known."""
    for pcr in selection:
        if pcr not in found:
            raise Refused(
                f"PCR {pcr}: what it was when early boot asked the TPM cannot be told: no event log accounts for it",
                "choose PCRs without it: --pcrs",
                code="pcr-unknown",
            )
    return {pcr: found[pcr] for pcr in selection}


def boot_method(paths: Paths, values: Mapping[int, bytes]) -> str:
    """How kernel and initramfs were measured: a key of MEASURED_BY, or "unmeasured". `values`: as `read_pcrs` returns
    them, as systemd's separator makes a PCR look measured into. One that is not known counts as measured, so that who
    needs its value is told."""

    def measured(pcr: int) -> bool:
        return values.get(pcr) != pcr_policy.UNSET

    if not os.path.exists(paths.efi):
        return "unmeasured"
    if measured(11) and glob.glob(os.path.join(paths.efi, "efivars/StubInfo-*")):
        return "UKI"
    if measured(8) and measured(9):
        return "shim+GRUB"
    if measured(4) and measured(9):
        return "direct kernel"
    return "unmeasured"


def default_pcrs(boot: str, log: Log | None) -> tuple[int, ...]:
    """The PCRs for a host that boots by the method `boot`, whose event log this is. DRIVERS too, where Secure Boot is
    not on: the firmware runs any driver then, before what the others measure, and it can do all that the system can."""
    if boot not in MEASURED_BY:
        return (7,)
    return tuple(sorted({*MEASURED_BY[boot], *(() if is_secure_boot_on(log) else DRIVERS)}))


def missing_for_drivers(boot: str, log: Log | None, selection: Iterable[int]) -> tuple[int, ...]:
    """Those of DRIVERS that `selection` lacks, where Secure Boot lets any driver run; () where a kernel that nothing
    measures makes no difference of it."""
    if boot not in MEASURED_BY or is_secure_boot_on(log):
        return ()
    return tuple(sorted(DRIVERS.difference(selection)))


def missing_for_kernel(boot: str, log: Log | None, selection: Iterable[int]) -> tuple[int, ...]:
    """The PCRs that `selection` lacks to notice another kernel, initramfs or command line; () where nothing measures
    them. Without Secure Boot and its PCR 7, PCR 4 is among them: any boot loader can measure what is not so."""
    chosen = set(selection)
    if boot not in MEASURED_BY:
        return ()
    needed = set(_KERNEL[boot])
    if boot == "UKI" and 4 in chosen:
        needed.discard(11)
    if 7 not in chosen or not is_secure_boot_on(log):
        needed.add(4)
    return tuple(sorted(needed - chosen))


def risks(boot: str, log: Log | None, selection: Iterable[int]) -> dict[str, tuple[int, ...]]:
    """Those of RISKS that a policy over `selection` has -> the PCRs that it lacks."""
    chosen = frozenset(selection)
    found = {
        "unmeasured-boot": missing_for_kernel(boot, log, chosen),
        "unmeasured-drivers": missing_for_drivers(boot, log, chosen),
    }
    return {risk: missing for risk, missing in found.items() if missing}


def is_secure_boot_on(log: Log | None) -> bool:
    """Whether this boot's event log says so. Without a log it counts as off."""
    return log is not None and efivars.measured_variables(log).get("SecureBoot") == b"\1"


def unseal_time(early: report.Report | None, otherwise: float) -> float:
    """When early boot asked the TPM for the key, in seconds since the kernel started; `otherwise` without a report."""
    times = [time for time, kind, _ in early.events if kind == "key"] if early else []
    return float(times[0]) if times else otherwise


def initramfs_unmeasured(boot: str, log: Log | None) -> bool:
    """Whether nothing measured the initramfs of a host that boots by the method `boot`.

    Linux's EFI stub measures an initramfs that a boot loader hands on to it, and none that `initrd=` names: linux
    drivers/firmware/efi/libstub, efi_load_initrd(). GRUB and systemd-stub measure it themselves.
    """
    tags = [event.data[:4] for event in log.events if event.kind == eventlog.EVENT_TAG] if log else []
    return boot == "direct kernel" and eventlog.INITRD not in tags
