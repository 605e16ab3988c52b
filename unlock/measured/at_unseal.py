# SPDX-License-Identifier: Apache-2.0
"""PCR values as they were when early boot asked the TPM for the key, told by a system that runs.

    firmware's event log + systemd's log == the live PCR  ──> both are believed, and systemd's later part is taken off
    a PCR without a believed log                          ──> its live value, if nothing extends it after early boot

What is sealed to must be what the next boot has at that moment: systemd goes on measuring boot phases into PCR 11 of a
unified kernel image, and IMA measures into PCR 10 for as long as the system runs.
"""

import glob
import os
from collections.abc import Iterable, Mapping, Sequence
from hashlib import sha256
from types import MappingProxyType
from typing import Any

from ..errors import CommandFailed, Malformed, Refused
from ..host import this_boot
from ..paths import Paths
from ..run import run
from ..tpm import pcr_policy
from ..tpm.chip import Tpm
from . import describe, eventlog, uefi
from .eventlog import Event, Log

MEASURED_BY = {
    "shim+GRUB": (4, 7, 8, 9, 14),
    "UKI": (4, 7, 11, 12),
    "direct kernel": (4, 7, 9),
}
"""PCRs by how the host boots; the cap PCR always comes on top."""
_VARIABLE_MAX = 1 << 20
"""Bytes; a dbx has some 20,000."""


def values(paths: Paths, tpm: Tpm) -> dict[int, bytes]:
    """PCRs 0 to 15 but those whose value at that moment cannot be told; the cap PCR as the policy wants it.

    PCR_Read x2.
    """
    live = tpm.read_pcrs(range(16))
    later = eventlog.parse_systemd(read(paths.systemd_log, eventlog.MAX_SYSTEMD_LOG))
    log, _ = event_log(paths, later, live)
    return {
        **describe.at(asked(this_boot.read_early_report(paths), 0.0), log, later, live),
        pcr_policy.CAP_PCR: pcr_policy.UNSET,
    }


def of(selection: Iterable[int], found: Mapping[int, bytes]) -> dict[int, bytes]:
    """The values of these PCRs. Refused, code `pcr-unknown`, when one of them cannot be told."""
    for pcr in selection:
        if pcr not in found:
            raise Refused(
                f"PCR {pcr}: what it was when early boot asked the TPM cannot be told: no event log accounts for it",
                "choose PCRs without it: --pcrs",
                code="pcr-unknown",
            )
    return {pcr: found[pcr] for pcr in selection}


def how_booted(paths: Paths, values: dict[int, bytes]) -> str:
    """By which way kernel and initramfs were measured; `values` are PCRs 0 to 15."""
    if not os.path.exists(paths.efi):
        return "unmeasured"
    if values[11] != pcr_policy.UNSET and glob.glob(os.path.join(paths.efi, "efivars/StubInfo-*")):
        return "UKI"
    if values[8] != pcr_policy.UNSET and values[9] != pcr_policy.UNSET:
        return "shim+GRUB"
    if values[4] != pcr_policy.UNSET and values[9] != pcr_policy.UNSET:
        return "direct kernel"
    return "unmeasured"


def asked(early: dict[str, Any] | None, otherwise: float) -> float:
    """When early boot asked the TPM for the key: seconds since the kernel started."""
    times = [time for time, kind, _ in early["events"] if kind == "key"] if early else []
    return float(times[0]) if times else otherwise


def event_log(
    paths: Paths, later: Sequence[Event] = (), live: Mapping[int, bytes] = MappingProxyType({})
) -> tuple[Log | None, str]:
    """The firmware's log, settled by what systemd measured `later` and the `live` PCRs; or why there is none. In an
    initramfs it mounts the kernel's securityfs."""
    _mount_securityfs(paths)
    data = read(paths.event_log, eventlog.MAX_LOG + 1)
    if not data:
        return None, (
            "the boot loader or the firmware passed no event log (GRUB before 2.12 does not): "
            "which event changed cannot be told"
        )
    try:
        return describe.settled(eventlog.parse(data), later, live), ""
    except Malformed as error:
        hint = f"; {error.hint}" if error.hint else ""
        return None, f"{error}: which event changed cannot be told{hint}"


def _mount_securityfs(paths: Paths) -> None:
    """An initramfs leaves it unmounted."""
    if paths.root == "/" and not os.path.exists(paths.event_log) and not os.path.ismount("/sys/kernel/security"):
        try:
            run(["mount", "-t", "securityfs", "securityfs", "/sys/kernel/security"], timeout=10)
        except CommandFailed:
            pass


def hides_initramfs(boot: str, log: Log | None) -> bool:
    """Whether a host that boots so may have an initramfs that nothing has measured. Linux's EFI stub measures what a
    boot loader hands on to it, and nothing that `initrd=` names: linux drivers/firmware/efi/libstub,
    efi_load_initrd(). GRUB and systemd-stub measure it themselves."""
    tags = [event.data[:4] for event in log.events if event.kind == eventlog.EVENT_TAG] if log else []
    return boot == "direct kernel" and eventlog.INITRD not in tags


GLOBAL = "8be4df61-93ca-11d2-aa0d-00e098032b8c"
"""EFI_GLOBAL_VARIABLE: UEFI Specification 2.10, section 3.3."""
_VARIABLES = (eventlog.EFI_VARIABLE_DRIVER_CONFIG, eventlog.EFI_VARIABLE_BOOT, eventlog.EFI_VARIABLE_BOOT2)


def variable(paths: Paths, name: str, vendor: str = GLOBAL) -> bytes:
    """A UEFI variable as it is now, without its attributes; b"" when there is none (Linux,
    Documentation/filesystems/efivarfs.rst)."""
    return read(os.path.join(paths.efi, f"efivars/{name}-{vendor}"), _VARIABLE_MAX)[4:]


def boot_entry(paths: Paths, which: str = "BootCurrent") -> str:
    """The firmware's entry that this boot was started by, or BootNext's: Boot0001; "" when there is none."""
    number = variable(paths, which)
    return f"Boot{int.from_bytes(number[:2], 'little'):04X}" if number else ""


def variables(log: Log) -> dict[str, bytes]:
    """Name -> content of the UEFI variables that this boot has measured, where the log says it truly. The digest is of
    the content with its name, or of it alone (TCG "PC Client Platform Firmware Profile", section 10.4)."""
    found = {}
    for event in log.events:
        if event.kind in _VARIABLES:
            try:
                each = uefi.variable(event.data)
            except Malformed:
                continue
            if event.digest in (sha256(event.data).digest(), sha256(each.data).digest()):
                found[each.name] = each.data
    return found


def read(path: str, limit: int) -> bytes:
    """At most `limit` bytes; b"" when the file cannot be read."""
    try:
        with open(path, "rb") as file:
            return file.read(limit)
    except OSError:
        return b""
