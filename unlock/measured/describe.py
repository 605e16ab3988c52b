# SPDX-License-Identifier: Apache-2.0
"""Describes the events of a log in words.

    Events ──describe_events──> Item: what a person calls it, and a stable code of its cause

Pure. The texts come from a log that anybody may have written, and are made printable.
"""

import re
from collections.abc import Iterable, Iterator, Sequence
from hashlib import sha256
from typing import NamedTuple

from ..errors import Malformed
from . import eventlog, uefi
from .describe_ipl import describe_ipl, is_grubs, is_kernel
from .eventlog import Event
from .log_text import TEXT_MAX, decode_text, printable, readable_text

_ON = b"\x01"
_NAMES = 8
"""Names of partitions in a text."""
_FIRST_OF_LOADERS = 8
"""PCRs 0 to 7 are the firmware's: the separators there end its own measurements."""
_SEPARATORS = (sha256(bytes(4)).digest(), sha256(b"\xff" * 4).digest())


class Item(NamedTuple):
    """One event in words: a row of the baseline."""

    pcr: int
    kind: int
    digest: bytes
    cause: str
    """A key of CAUSES."""
    text: str


def describe_events(events: Sequence[Event]) -> Iterator[Item]:
    """What a person calls the events of a boot, in their order."""
    grub = next((at for at, event in enumerate(events) if is_grubs(event)), 0)
    for at, event in enumerate(events):
        item = describe_event(event)
        if at < grub and (event.kind, item.cause, event.pcr) == (eventlog.EFI_APPLICATION, "kernel", 4):
            item = item._replace(cause="boot-loader", text="image without a name, before GRUB: the boot loader")
        yield item


def describe_event(event: Event) -> Item:
    """What a person calls the event by itself. Never fails: data of another form than is documented gets a plain
    name."""
    try:
        cause, text = _describe(event)
    except Malformed:
        cause, text = _describe_by_pcr(event)
    digest = event.digest or b""
    return Item(pcr=event.pcr, kind=event.kind, digest=digest, cause=cause, text=printable(text, TEXT_MAX))


def _describe(event: Event) -> tuple[str, str]:
    """Cause and text. Raises Malformed."""
    kind, pcr = event.kind, event.pcr
    if kind == eventlog.SYSTEMD:
        return _describe_systemd(event.data)
    if kind in (eventlog.EFI_VARIABLE_DRIVER_CONFIG, eventlog.EFI_VARIABLE_BOOT, eventlog.EFI_VARIABLE_BOOT2):
        return _describe_variable(event)
    if kind == eventlog.EFI_VARIABLE_AUTHORITY:
        return _describe_authority(event)
    if kind == eventlog.EFI_APPLICATION:
        return _describe_efi_program(uefi.parse_image_path(event.data))
    if kind in (eventlog.EFI_BOOT_DRIVER, eventlog.EFI_RUNTIME_DRIVER):
        path = uefi.parse_image_path(event.data)
        return ("option-rom" if pcr == 2 else "firmware"), f"driver {path}".rstrip()
    if kind == eventlog.IPL:
        return describe_ipl(event)
    if kind == eventlog.EVENT_TAG:
        return _describe_tag(event)
    if kind == eventlog.SEPARATOR:
        if pcr >= _FIRST_OF_LOADERS:
            return "other", "separator"
        wrong = event.digest not in _SEPARATORS
        return "boot-path", "separator: an error of the firmware" if wrong else "separator"
    if kind in (eventlog.ACTION, eventlog.EFI_ACTION):
        return _describe_action(event)
    if kind in (eventlog.EFI_GPT, eventlog.EFI_GPT2):
        return "partition-table", _describe_partitions(event.data)
    return _describe_firmware_event(event)


def _describe_partitions(data: bytes) -> str:
    try:
        disk, names = uefi.parse_partition_table(data)
    except Malformed:
        return "partition table of the boot disk"
    more = f", and {len(names) - _NAMES} more" if len(names) > _NAMES else ""
    return f"partition table of disk {disk}: {', '.join(name or 'no name' for name in names[:_NAMES])}{more}"


def _describe_by_pcr(event: Event) -> tuple[str, str]:
    """Cause and text of an event whose data is not of the documented form."""
    return _BY_PCR.get(event.pcr, "other"), f"event of type {event.kind:#x}"


_BY_PCR = {
    0: "firmware",
    1: "firmware-settings",
    2: "option-rom",
    3: "firmware-settings",
    4: "boot-loader",
    5: "partition-table",
    6: "firmware",
    7: "secure-boot-keys",
}


def _describe_action(event: Event) -> tuple[str, str]:
    text = decode_text(event.data)
    if text in _SWITCHES:
        return "firmware-settings", f"{_SWITCHES[text]} ({text})"
    cause = "secure-boot" if event.pcr == 7 else "boot-path" if event.pcr < _FIRST_OF_LOADERS else "other"
    return cause, text or "nothing said"


_SWITCHES = {
    "DMA Protection Disabled": "the protection against devices that read memory is off",
    "UEFI Debug Mode": "the firmware can be debugged",
}
"""Texts of actions in PCR 7 that are no part of Secure Boot."""


def _describe_firmware_event(event: Event) -> tuple[str, str]:
    """The name of the kind, and the text of the firmware's, if any: a version, or what is in a volume."""
    if event.kind not in _FIRMWARE:
        return _describe_by_pcr(event)
    cause, text = _FIRMWARE[event.kind]
    if cause == "firmware" and event.kind != eventlog.CPU_MICROCODE:
        cause = {1: "firmware-settings", 2: "option-rom", 3: "firmware-settings"}.get(event.pcr, cause)
    data = event.data
    if event.kind in (eventlog.EFI_BLOB2, eventlog.EFI_TABLES2):
        data = data[1 : 1 + data[0]] if data else b""
    detail = readable_text(data)
    if not detail and event.kind == eventlog.CRTM_VERSION and len(data) == 16:
        detail = uefi.format_guid(data)
    return cause, f"{text} {detail}".rstrip()


_FIRMWARE = {
    0x00: ("firmware", "firmware, before its code"),
    0x01: ("firmware", "firmware code (POST)"),
    0x07: ("firmware", "firmware root of trust"),
    0x08: ("firmware", "firmware version"),
    0x09: ("firmware", "CPU microcode"),
    0x0A: ("firmware-settings", "platform configuration"),
    0x0B: ("firmware-settings", "table of devices"),
    0x0C: ("firmware", "firmware, compact hash"),
    0x0E: ("partition-table", "partition of the boot loader"),
    0x0F: ("option-rom", "code of another processor"),
    0x10: ("firmware-settings", "settings of another processor"),
    0x11: ("firmware", "information about another processor"),
    0x12: ("boot-path", "boot devices left out"),
    0x13: ("firmware", "firmware code (POST)"),
    0x80000008: ("firmware", "firmware volume"),
    0x80000009: ("firmware-settings", "firmware tables (SMBIOS)"),
    0x8000000A: ("firmware", "firmware volume"),
    0x8000000B: ("firmware-settings", "firmware tables"),
    0x80000010: ("firmware", "hardware root of trust"),
    0x800000E1: ("option-rom", "firmware of a device (SPDM)"),
    0x800000E2: ("option-rom", "settings of a device (SPDM)"),
    0x800000E3: ("option-rom", "policy for devices (SPDM)"),
    0x800000E4: ("option-rom", "identity of a device (SPDM)"),
}


def _describe_variable(event: Event) -> tuple[str, str]:
    try:
        name, data = uefi.parse_variable(event.data)
    except Malformed:  # Intel Boot Guard logs a string instead
        text = readable_text(event.data)
        return ("firmware", text) if text else _describe_by_pcr(event)
    if name in ("SecureBoot", "AuditMode", "DeployedMode", "SetupMode"):
        title = "Secure Boot" if name == "SecureBoot" else name
        return "secure-boot", f"{title} {'on' if data[:1] == _ON else 'off'}"
    if name in ("PK", "KEK", "db", "dbx", "dbt", "dbr"):
        return ("dbx" if name == "dbx" else "secure-boot-keys"), f"{name}: {_describe_signatures(data)}"
    if name == "BootOrder":
        numbers = (f"{data[at + 1]:02X}{data[at]:02X}" for at in range(0, len(data) & ~1, 2))
        return "boot-order", f"BootOrder: {' '.join(numbers)}"
    if re.fullmatch("Boot[0-9A-F]{4}", name):
        return "boot-order", f"{name}: {uefi.parse_load_option(data).description}"
    if name == "DriverOrder":
        return "firmware-settings", "DriverOrder: the firmware runs drivers before any boot loader"
    if re.fullmatch("Driver[0-9A-F]{4}", name):
        return "firmware-settings", f"{name}, a driver: {uefi.parse_load_option(data).description}"
    return ("secure-boot-keys" if event.pcr == 7 else "firmware-settings"), f"UEFI variable {name}"


def _describe_signatures(data: bytes) -> str:
    try:
        found = uefi.parse_signature_lists(data)
    except Malformed:
        return f"{len(data)} bytes"
    many = f"{found.entries} entr{'y' if found.entries == 1 else 'ies'}"
    return many + (f" ({'; '.join(each or 'no name' for each in found.names)})" if found.names else "")


def _describe_authority(event: Event) -> tuple[str, str]:
    name, data = uefi.parse_variable(event.data)
    if name == "SbatLevel":
        return "sbat", f"SbatLevel: {decode_text(data)}"
    if name.startswith("Mok") and name != "MokList":
        return "mok", name
    who = uefi.signer_name(data)
    return ("mok" if name == "MokList" else "signer"), f"{name}: {who or 'a hash'}"


def _describe_efi_program(path: str) -> tuple[str, str]:
    """Cause and text of an EFI program, by its file's name: nothing else in the log says what it is."""
    file = path.replace("/", "\\").rpartition("\\")[2].lower()
    if file.endswith(".addon.efi"):
        return "extension", f"add-on {path}"
    if "\\efi\\linux\\" in path.lower():
        return "uki", f"unified kernel image {path}"
    if is_kernel(file):
        return "kernel", f"kernel image {path}"
    if not path or path == "memory":
        return "kernel", "image that a boot loader handed on: the kernel"
    if path.startswith(("firmware file", "PCI device", "ROM at")) or _IN_FIRMWARE.fullmatch(path):
        return "firmware", f"EFI program from {path}"
    if file.startswith(_ONCE):
        return "boot-path", f"EFI program {path}, which runs for one boot"
    return "boot-loader", f"EFI program {path}"


_IN_FIRMWARE = re.compile(r"(?!network)[^\\/.]+")
"""A name that is no path of a file: System_Services."""
_ONCE = ("fwupd", "mmx64", "mmaa64", "fbx64", "fbaa64", "mokmanager", "fallback")
"""A firmware update of fwupd's, shim's MokManager, and shim's fallback that makes the boot entries anew."""


_TAGS = {
    0x8F3B22EC: ("initrd", "initramfs, as the kernel got it"),
    0x8F3B22ED: ("command-line", "command line, as the kernel got it"),
    0xF5BC582A: ("boot-loader-config", "systemd-boot's loader.conf"),
    0x6C46F751: ("extension", "device tree add-on"),
    0x49DFFE0F: ("extension", "initrd add-on"),
    0xDAC08E1A: ("extension", "microcode add-on"),
    0x13AED6DB: ("uki", "profile of the unified kernel image"),
    0xD5CB7CBC: ("firmware-settings", "SMBIOS system information"),
    0xE0D47BC8: ("firmware-settings", "SMBIOS board information"),
    0xC0B3BD23: ("extension", "SMBIOS vendor strings"),
}
"""TCG_PCClientTaggedEvent ids: linux drivers/firmware/efi/libstub/efistub.h, systemd src/fundamental/tpm2-pcr.h."""


def _describe_tag(event: Event) -> tuple[str, str]:
    tag = int.from_bytes(event.data[:4], "little")
    return _TAGS.get(tag) or (_BY_PCR.get(event.pcr, "other"), f"tagged event {tag:#x}")


def _describe_systemd(data: bytes) -> tuple[str, str]:
    kind, _, text = data.decode("utf-8", "replace").partition("\0")
    if text == eventlog.OS_SEPARATOR:
        return "systemd", "systemd's separator after the boot loader (systemd 261 and later)"
    return "systemd", f"systemd {kind}: {text}"


def with_command_line(items: Iterable[Item], command_line: str) -> tuple[Item, ...]:
    """The items, with the command line in those that have its digest: the kernel's EFI stub logs the digest alone."""
    texts = {sha256((command_line + end).encode("utf-16-le", "replace")).digest() for end in ("\0", "")}
    line = printable(f"command line {command_line}", TEXT_MAX)
    return tuple(item._replace(text=line) if item.digest in texts else item for item in items)
