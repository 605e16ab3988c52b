# SPDX-License-Identifier: Apache-2.0
"""Describes the events of a log in words.

    Event ──describe_event──> Item: what a person calls it, and a stable code of its cause

Pure. The texts come from a log that anybody may have written, and are made printable.
"""

import re
from collections.abc import Iterable
from hashlib import sha256
from typing import NamedTuple

from ..errors import Malformed
from . import eventlog, uefi
from .eventlog import Event

TEXT_MAX = 4096
"""Characters of one text that are kept: GRUB logs whole menu entries."""
_ON = b"\x01"
_SEPARATORS = (sha256(bytes(4)).digest(), sha256(b"\xff" * 4).digest())


class Item(NamedTuple):
    """One event in words: a row of the baseline."""

    pcr: int
    kind: int
    digest: bytes
    cause: str
    """A key of CAUSES."""
    text: str


def describe_event(event: Event) -> Item:
    """What a person calls the event. Never fails: data that is not of the documented form gets a plain name."""
    try:
        cause, text = _describe(event)
    except Malformed:
        cause, text = _describe_by_pcr(event)
    return Item(event.pcr, event.kind, event.digest or b"", cause, printable(text, TEXT_MAX))


def printable(text: str, limit: int) -> str:
    """The text as one line of at most `limit` characters, without those that a terminal takes for a command."""
    line = " ".join(text[: 4 * limit].split())
    return "".join(each if each.isprintable() else "?" for each in line)[:limit].rstrip()


def printable_line(text: str, limit: int) -> str:
    """The same, with its blanks as they are."""
    return "".join(each if each.isprintable() else "?" for each in text[:limit]).rstrip()


def _describe(event: Event) -> tuple[str, str]:
    kind, pcr = event.kind, event.pcr
    if kind == eventlog.SYSTEMD:
        return _describe_systemd(event.data)
    if kind in (eventlog.EFI_VARIABLE_DRIVER_CONFIG, eventlog.EFI_VARIABLE_BOOT, eventlog.EFI_VARIABLE_BOOT2):
        return _describe_variable(event)
    if kind == eventlog.EFI_VARIABLE_AUTHORITY:
        return _describe_authority(event)
    if kind == eventlog.EFI_APPLICATION:
        return _describe_efi_program(uefi.image_path(event.data))
    if kind in (eventlog.EFI_BOOT_DRIVER, eventlog.EFI_RUNTIME_DRIVER):
        path = uefi.image_path(event.data)
        return ("option-rom" if pcr == 2 else "firmware"), f"driver {path}".rstrip()
    if kind == eventlog.IPL:
        return _describe_ipl(event)
    if kind == eventlog.EVENT_TAG:
        return _describe_tag(event)
    if kind == eventlog.SEPARATOR:
        wrong = event.digest not in _SEPARATORS
        return "boot-path", "separator: an error of the firmware" if wrong else "separator"
    if kind in (eventlog.ACTION, eventlog.EFI_ACTION):
        return _describe_action(event)
    if kind in (eventlog.EFI_GPT, eventlog.EFI_GPT2):
        return "partition-table", _describe_partitions(event.data)
    return _describe_firmware_event(event)


def _describe_partitions(data: bytes) -> str:
    try:
        disk, names = uefi.partitions(data)
    except Malformed:
        return "partition table of the boot disk"
    more = f", and {len(names) - _NAMES} more" if len(names) > _NAMES else ""
    return f"partition table of disk {disk}: {', '.join(name or 'no name' for name in names[:_NAMES])}{more}"


_NAMES = 8


def _describe_by_pcr(event: Event) -> tuple[str, str]:
    """For an event whose data is not of the documented form."""
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
    text = _decode_text(event.data)
    if text in _SWITCHES:
        return "firmware-settings", f"{_SWITCHES[text]} ({text})"
    return ("secure-boot" if event.pcr == 7 else "boot-path"), text or "nothing said"


_SWITCHES = {
    "DMA Protection Disabled": "the protection against devices that read memory is off",
    "UEFI Debug Mode": "the firmware can be debugged",
}
"""In PCR 7, and no part of Secure Boot."""


def _describe_firmware_event(event: Event) -> tuple[str, str]:
    """Kinds that have a name, and perhaps a word of the firmware's: a version, or what is in a volume."""
    if event.kind not in _FIRMWARE:
        return _describe_by_pcr(event)
    cause, text = _FIRMWARE[event.kind]
    if cause == "firmware":
        cause = {1: "firmware-settings", 2: "option-rom", 3: "firmware-settings"}.get(event.pcr, cause)
    data = event.data
    if event.kind in (eventlog.EFI_BLOB2, eventlog.EFI_TABLES2):
        data = data[1 : 1 + data[0]] if data else b""
    said = _readable_text(data)
    if not said and event.kind == eventlog.CRTM_VERSION and len(data) == 16:
        said = uefi.guid(data)
    return cause, f"{text} {said}".rstrip()


def _readable_text(data: bytes) -> str:
    """A text, when it looks like one."""
    text = _decode_text(data).strip()
    return text if len(text) > 2 and text.isascii() and text.isprintable() else ""


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
        name, data = uefi.variable(event.data)
    except Malformed:  # Intel Boot Guard logs a string instead
        said = _readable_text(event.data)
        return ("firmware", said) if said else _describe_by_pcr(event)
    if name in ("SecureBoot", "AuditMode", "DeployedMode", "SetupMode"):
        title = "Secure Boot" if name == "SecureBoot" else name
        return "secure-boot", f"{title} {'on' if data[:1] == _ON else 'off'}"
    if name in ("PK", "KEK", "db", "dbx", "dbt", "dbr"):
        return ("dbx" if name == "dbx" else "secure-boot-keys"), f"{name}: {_describe_signatures(data)}"
    if name == "BootOrder":
        numbers = (f"{data[at + 1]:02X}{data[at]:02X}" for at in range(0, len(data) & ~1, 2))
        return "boot-order", f"BootOrder: {' '.join(numbers)}"
    if re.fullmatch("Boot[0-9A-F]{4}", name):
        return "boot-order", f"{name}: {uefi.load_option(data).description}"
    return ("secure-boot-keys" if event.pcr == 7 else "firmware-settings"), f"UEFI variable {name}"


def _describe_signatures(data: bytes) -> str:
    try:
        found = uefi.signatures(data)
    except Malformed:
        return f"{len(data)} bytes"
    many = f"{found.entries} entr{'y' if found.entries == 1 else 'ies'}"
    return many + (f" ({'; '.join(each or 'no name' for each in found.names)})" if found.names else "")


def _describe_authority(event: Event) -> tuple[str, str]:
    name, data = uefi.variable(event.data)
    if name == "SbatLevel":
        return "sbat", f"SbatLevel: {_decode_text(data)}"
    if name.startswith("Mok") and name != "MokList":
        return "mok", name
    who = uefi.signer(data)
    return ("mok" if name == "MokList" else "signer"), f"{name}: {who or 'a hash'}"


def _describe_efi_program(path: str) -> tuple[str, str]:
    """An EFI program, by its file's name: nothing else in the log says what it is."""
    file = path.replace("/", "\\").rpartition("\\")[2].lower()
    if "\\efi\\linux\\" in path.lower():
        return "uki", f"unified kernel image {path}"
    if _is_kernel(file):
        return "kernel", f"kernel image {path}"
    if not path or path == "memory":
        return "kernel", "image that a boot loader handed on: the kernel"
    if path.startswith(("firmware file", "PCI device")):
        return "firmware", f"EFI program from {path}"
    if file.startswith(_ONCE):
        return "boot-path", f"EFI program {path}, which runs for one boot"
    return "boot-loader", f"EFI program {path}"


_ONCE = ("fwupd", "mmx64", "mmaa64", "fbx64", "fbaa64", "mokmanager", "fallback")
"""A firmware update of fwupd's, shim's MokManager, and shim's fallback that makes the boot entries anew."""


def _is_kernel(file: str) -> bool:
    return bool(re.match(r"(vmlinu|bzimage|kernel|linux|image|xen[-.])", file)) and not file.endswith(
        (".cfg", ".mod", ".conf")
    )


def _is_initrd(file: str) -> bool:
    return bool(re.match(r"(initrd|initramfs|ramdisk|booster)", file)) or file.endswith(("ucode.img", "ucode.cpio"))


def _describe_ipl(event: Event) -> tuple[str, str]:
    text = _decode_text(event.data)
    if event.pcr == 11 and text.startswith("."):
        name = event.digest == sha256(event.data).digest()
        return _SECTIONS.get(text, "uki"), f"section {text}{', its name' if name else ''}"
    if event.pcr == 14 or text.startswith("Mok"):
        return "mok", text or "nothing said"
    for prefix in ("kernel_cmdline", "grub_kernel_cmdline", "module_cmdline"):  # grub_: of the GRUB of RHEL 8
        if text.startswith(prefix):
            return "command-line", f"command line {text[len(prefix) :].lstrip(': ')}"
    if text.startswith("grub_cmd"):
        return _describe_grub_command(text[len("grub_cmd") :].lstrip(": "))
    if event.pcr == 12:
        return ("extension", text) if _EXTENSION.search(text) else ("command-line", f"command line {text}")
    if event.pcr == 13:
        return "extension", text or "nothing said"
    if event.pcr == 9 and text:
        return _describe_grub_file(text.removeprefix("grub_linuxefi "))
    if event.pcr == 8:  # systemd before 251
        return "command-line", f"command line {text}"
    return ("boot-loader" if event.pcr in (4, 5) else "other"), text or "nothing said"


_EXTENSION = re.compile(r"credential|extension|initrd", re.IGNORECASE)

_SECTIONS = {
    ".linux": "kernel",
    ".uname": "kernel",
    ".osrel": "kernel",
    ".initrd": "initrd",
    ".cmdline": "command-line",
}


def _describe_grub_command(line: str) -> tuple[str, str]:
    word, _, rest = line.partition(" ")
    loaded = _is_kernel(rest.partition(" ")[0].rpartition("/")[2].lower())
    if word in ("linux", "linuxefi", "linux16") or (word in ("module", "module2", "xen_module") and loaded):
        return "command-line", f"command line {rest}"
    return "boot-loader-config", f"GRUB command {line}"


def _describe_grub_file(path: str) -> tuple[str, str]:
    file = path.rpartition("/")[2].lower()
    if _is_kernel(file):
        return "kernel", f"kernel file {path}"
    if _is_initrd(file):
        return "initrd", f"initramfs file {path}"
    if file == "grubenv":
        return "grubenv", f"GRUB environment {path}"
    if file.endswith((".cfg", ".conf")):
        return "boot-loader-config", f"GRUB configuration {path}"
    return "boot-loader-files", f"file {path}"


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
    return "systemd", f"systemd {kind}: {text}"


def _decode_text(data: bytes) -> str:
    """A string as the log has it, or its beginning: ASCII or UTF-16, with or without NUL."""
    data = data[: 4 * TEXT_MAX]
    if len(data) >= 4 and not any(data[1:64:2]) and any(data[:64:2]):
        return uefi.utf16(data)
    return data.partition(b"\0")[0].decode("utf-8", "replace")


def with_command_line(items: Iterable[Item], command_line: str) -> tuple[Item, ...]:
    """Adds the text to the events that have its digest: the kernel's EFI stub logs only that there was one."""
    texts = {sha256((command_line + end).encode("utf-16-le", "replace")).digest() for end in ("\0", "")}
    line = printable(f"command line {command_line}", TEXT_MAX)
    return tuple(item._replace(text=line) if item.digest in texts else item for item in items)
