# SPDX-License-Identifier: Apache-2.0
"""Checks the firmware: does it start what it has started now, and has anything changed that it measures?"""

from collections.abc import Iterator, Sequence

from ...errors import Malformed
from ...measured import efivars, uefi
from ...measured.eventlog import Log
from ...paths import Paths
from ...predict import boot_files
from ...predict.boot_tree import BootTree
from .finding import UNPROVEN, UNSAFE, Finding

_SETUP, _CAPSULE = 0x1, 0x4
"""Of OsIndications: UEFI Specification 2.10, section 8.5.4."""
_IMAGE_SECURITY = "d719b2cb-3d3a-4596-a3bc-dad00e67656f"
"""EFI_IMAGE_SECURITY_DATABASE_GUID: UEFI Specification 2.10, section 32.4.1."""
_KEYS = {"PK": efivars.GLOBAL, "KEK": efivars.GLOBAL, "db": _IMAGE_SECURITY, "dbx": _IMAGE_SECURITY}
_SHIM = "605dab50-e046-4300-abb6-3dd810dd8b23"
_REQUESTS = ("MokNew", "MokDel", "MokXNew", "MokXDel", "MokSB", "MokDB", "MokPW", "MokListTrustedNew")
"""Variables that mokutil leaves for shim's MokManager, which then runs before the boot loader."""


def check_firmware(paths: Paths, log: Log | None) -> Iterator[Finding]:
    """Whether the firmware starts again what it has started now.

    The boot order is compared with the log's, not with the entry that was started: the first entry may be one that
    never starts, such as the network.
    """
    current, once = (efivars.boot_entry_name(paths, which) for which in ("BootCurrent", "BootNext"))
    if once and once != current:
        why = f"it will start {once} once: a firmware update, or another system"
        yield Finding("firmware", UNPROVEN, why, "efibootmgr -v; efibootmgr -N, or unlock policy window --reboots 1")
    elif current and not once and (why := _why_starts_another(paths, current)):
        yield Finding("firmware", UNPROVEN, why, "efibootmgr -v; efibootmgr -o")
    was = efivars.measured_variables(log) if log else {}
    for name, what in {"BootOrder": "boot order", current: f"boot entry {current}"}.items():
        now = efivars.read_variable(paths, name)
        if now and was.get(name) and now != was[name]:
            yield Finding("firmware", UNPROVEN, f"its {what} has changed since this boot", "efibootmgr -v")
    asked = int.from_bytes(efivars.read_variable(paths, "OsIndications"), "little")
    if asked & _CAPSULE:
        why = "an update of it waits on the EFI system partition"
        yield Finding("firmware", UNPROVEN, why, "unlock policy window --reboots 1")
    if asked & _SETUP:
        yield Finding("firmware", UNPROVEN, "it will stop in its setup, where anything may be changed", "efibootmgr -v")


def _why_starts_another(paths: Paths, current: str) -> str:
    """Why the firmware may start another entry than this boot's; "" when it does not.

    An earlier entry that names no file that is there (the network, a removable disk) counts as one that never starts.
    """
    order = efivars.read_variable(paths, "BootOrder")
    entries = [f"Boot{int.from_bytes(order[at : at + 2], 'little'):04X}" for at in range(0, len(order), 2)]
    if current not in entries:
        return f"this boot was started by {current}, which is not in its boot order"
    own = _file_of_entry(paths, current)
    for entry in entries[: entries.index(current)]:
        if (file := _file_of_entry(paths, entry)) and file != own:
            return f"this boot was started by {current}, and {entry}, {file}, comes before it"
    return ""


def _file_of_entry(paths: Paths, entry: str) -> str:
    """The file on the EFI system partition that an active boot entry starts; "" when there is none."""
    try:
        option = uefi.parse_load_option(efivars.read_variable(paths, entry))
    except Malformed:
        return ""
    return next(boot_files.find_programs(BootTree(paths), option.file), "") if option.active else ""


def check_secure_boot(paths: Paths, log: Log | None, selection: Sequence[int]) -> Iterator[Finding]:
    """What fwupd and mokutil have changed since this boot, and the next one measures."""
    was = efivars.measured_variables(log) if log else {}
    for name, vendor in _KEYS.items():
        now = efivars.read_variable(paths, name, vendor)
        if 7 in selection and now and name in was and now != was[name]:
            why = f"{name} was updated since this boot: the TPM will refuse the next one"
            yield Finding("Secure Boot", UNSAFE, why, "unlock policy window --reboots 1")
    waits = [name for name in _REQUESTS if efivars.read_variable(paths, name, _SHIM)]
    shim = log and any(event.pcr == 14 for event in log.events)
    if waits and shim and {4, 14} & set(selection):
        why = f"shim's MokManager comes first ({', '.join(waits)}): the TPM will refuse that boot, and the new keys"
        do = "mokutil --revoke-import, --revoke-delete; or the recovery key then, and unlock rebind"
        yield Finding("Secure Boot", UNSAFE, why, do)
    if efivars.read_variable(paths, "SbatPolicy", _SHIM) and shim and 7 in selection:
        why = "shim is told to choose its revocations anew (SbatPolicy): the TPM may refuse that boot"
        yield Finding("Secure Boot", UNPROVEN, why, "unlock policy window --reboots 1")
