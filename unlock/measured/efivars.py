# SPDX-License-Identifier: Apache-2.0
"""UEFI variables: as efivarfs has them now, and as this boot's event log says they were measured.

`unlock check` and the predictions compare the two: a variable that changed since this boot is measured otherwise by the
next one.
"""

import os
from hashlib import sha256

from ..errors import Malformed
from ..paths import Paths
from . import eventlog, uefi
from .eventlog import Event, Log
from .logs import read_up_to

_MAX = 1 << 20
"""Bytes; a dbx has some 20,000."""
GLOBAL = "8be4df61-93ca-11d2-aa0d-00e098032b8c"
"""EFI_GLOBAL_VARIABLE: UEFI Specification 2.10, section 3.3."""
_VARIABLES = (eventlog.EFI_VARIABLE_DRIVER_CONFIG, eventlog.EFI_VARIABLE_BOOT, eventlog.EFI_VARIABLE_BOOT2)


def read_variable(paths: Paths, name: str, vendor: str = GLOBAL) -> bytes:
    """The content of a UEFI variable now, without its 4 bytes of attributes; b"" when there is none.

    Linux, Documentation/filesystems/efivarfs.rst.
    """
    return read_up_to(os.path.join(paths.efi, f"efivars/{name}-{vendor}"), _MAX)[4:]


def boot_entry_name(paths: Paths, which: str = "BootCurrent") -> str:
    """The name of the boot entry in BootCurrent, or in BootNext: Boot0001; "" when there is none."""
    number = read_variable(paths, which)
    return f"Boot{int.from_bytes(number[:2], 'little'):04X}" if number else ""


def remeasured(paths: Paths, event: Event) -> bytes | None:
    """The digest of a boot entry's or the boot order's event, with the content that the variable has now. That of the
    event where nothing has changed, or where firmware measures something else than `measured_variables` knows."""
    if event.kind not in (eventlog.EFI_VARIABLE_BOOT, eventlog.EFI_VARIABLE_BOOT2):
        return event.digest
    try:
        name, was = uefi.parse_variable(event.data)
    except Malformed:
        return event.digest
    now = read_variable(paths, name)
    if not now or now == was:
        return event.digest
    if event.digest == sha256(was).digest():
        return sha256(now).digest()
    if event.digest != sha256(event.data).digest():
        return event.digest
    names = event.data[32 : 32 + 2 * int.from_bytes(event.data[16:24], "little")]
    return sha256(event.data[:24] + len(now).to_bytes(8, "little") + names + now).digest()


def measured_variables(log: Log) -> dict[str, bytes]:
    """Name -> content of the UEFI variables in the log whose digest is that of their content.

    Firmware hashes the whole event data or the content alone: TCG "PC Client Platform Firmware Profile", section 10.4.
    """
    found = {}
    for event in log.events:
        if event.kind in _VARIABLES:
            try:
                each = uefi.parse_variable(event.data)
            except Malformed:
                continue
            if event.digest in (sha256(event.data).digest(), sha256(each.data).digest()):
                found[each.name] = each.data
    return found
