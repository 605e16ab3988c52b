# SPDX-License-Identifier: Apache-2.0
"""Describes events of the type EV_IPL: what shim, GRUB, systemd-boot and systemd-stub measure."""

import re
from hashlib import sha256

from .eventlog import IPL, Event
from .log_text import decode_text

_EXTENSION = re.compile(r"credential|extension|initrd", re.IGNORECASE)
_COMMAND_LINES = ("kernel_cmdline", "grub_kernel_cmdline", "module_cmdline")
"""How GRUB's measurement of a kernel's command line begins; grub_: of the GRUB of RHEL 8."""
GRUB_COMMAND = "GRUB command "
"""How the text of a command begins."""
_SECTIONS = {
    ".linux": "kernel",
    ".uname": "kernel",
    ".osrel": "kernel",
    ".initrd": "initrd",
    ".cmdline": "command-line",
}


def describe_ipl(event: Event) -> tuple[str, str]:
    """Cause and text."""
    text = decode_text(event.data)
    if event.pcr == 11 and text.startswith("."):
        name = event.digest in (sha256(event.data).digest(), sha256(f"{text}\0".encode()).digest())
        return _SECTIONS.get(text, "uki"), f"section {text}{', its name' if name else ''}"
    if event.pcr == 14 or text.startswith("Mok"):
        return "mok", text or "nothing said"
    for prefix in _COMMAND_LINES:
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


def is_grubs(event: Event) -> bool:
    """Whether GRUB has measured this: a command, the kernel's command line, a file."""
    text = decode_text(event.data[:64]) if event.kind == IPL else ""
    return text.startswith(("grub_", *_COMMAND_LINES)) or (event.pcr == 9 and "/" in text)


def _describe_grub_command(line: str) -> tuple[str, str]:
    word, _, rest = line.partition(" ")
    loaded = is_kernel(rest.partition(" ")[0].rpartition("/")[2].lower())
    if word in ("linux", "linuxefi", "linux16") or (word in ("module", "module2", "xen_module") and loaded):
        return "command-line", f"command line {rest}"
    return "boot-loader-config", f"{GRUB_COMMAND}{line}"


def _describe_grub_file(path: str) -> tuple[str, str]:
    file = path.rpartition("/")[2].lower()
    if is_kernel(file):
        return "kernel", f"kernel file {path}"
    if is_initrd(file):
        return "initrd", f"initramfs file {path}"
    if file == "grubenv":
        return "grubenv", f"GRUB environment {path}"
    if file.endswith((".cfg", ".conf")):
        return "boot-loader-config", f"GRUB configuration {path}"
    return "boot-loader-files", f"file {path}"


def is_kernel(file: str) -> bool:
    """Whether a file of this name, in lower case, is a kernel."""
    return bool(re.match(r"(vmlinu|bzimage|kernel|linux|image|xen[-.])", file)) and not file.endswith(
        (".cfg", ".mod", ".conf")
    )


def is_initrd(file: str) -> bool:
    """Whether a file of this name, in lower case, is an initramfs."""
    return bool(re.match(r"(initrd|initramfs|ramdisk|booster)", file)) or file.endswith(("ucode.img", "ucode.cpio"))
