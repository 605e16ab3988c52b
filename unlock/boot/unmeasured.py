# SPDX-License-Identifier: Apache-2.0
"""Finds input that PID 1 of the real root obeys and no PCR of the policy measures: it could give a thief a root shell.

    SystemdOptions      an EFI variable, a second command line: systemd 252 to 257 read it where Secure Boot is off
    SMBIOS type 11      strings of the firmware: credentials, which can carry units (systemd.extra-unit.*)
    QEMU's fw_cfg       the same, from a virtual machine's host

Sources: systemd src/basic/efivars.c and src/core/import-creds.c, systemd.system-credentials(7).
"""

import os

from .. import log
from ..light import Iterable
from ..paths import Paths

OPTIONS = "SystemdOptions-8cf2644b-4b0b-428f-9387-6d876050dc67"
SECURE_BOOT = "SecureBoot-8be4df61-93ca-11d2-aa0d-00e098032b8c"
CLOSED = "systemd.import_credentials=no"
"""On the command line, which is measured: PID 1 imports no credential."""
_OFF = frozenset(("0", "no", "n", "false", "f", "off"))
_CREDENTIAL = b"io.systemd.credential"
_TABLE_MAX = 1 << 20
_VARIABLE_MAX = 1 << 16
_FS_IOC_GETFLAGS, _FS_IOC_SETFLAGS = 0x80086601, 0x40086602
_IMMUTABLE = 0x10
"""linux/fs.h: the kernel sets it on most EFI variables."""


def close_channels(paths: Paths) -> str:
    """Deletes SystemdOptions if systemd would obey it; nobody else does. Returns what `open_channels` still finds."""
    if has_options(paths) and delete_options(paths):
        log.console("the EFI variable SystemdOptions was deleted: a command line that nothing measures")
    return open_channels(paths)


def close_before_systemd(paths: Paths) -> int:
    """`unlock boot close-channels`, in an initramfs whose PID 1 is systemd, before that starts. Returns 1 where
    something stays that it would obey: then no key may be had in this boot."""
    found = close_channels(paths)
    if found:
        log.console(f"{found}: the TPM is locked")
    return 1 if found else 0


def open_channels(paths: Paths) -> str:
    """What PID 1 would obey in this boot beside the command line, in words; '' for nothing."""
    found = (
        ["the EFI variable SystemdOptions is set, a command line that nothing measures"] if has_options(paths) else []
    )
    return "; ".join([*found, *filter(None, [credentials(paths)])])


def credentials(paths: Paths) -> str:
    """The credentials of the firmware that PID 1 would import in this boot, in words; '' for none."""
    if credentials_off(_read(paths.cmdline, 1 << 16).decode("utf-8", "replace")):
        return ""
    names = sorted({*_smbios(_read(paths.dmi, _TABLE_MAX)), *_fw_cfg(paths.fw_cfg)})
    return f"the firmware gives systemd credentials ({', '.join(names)[:200]})" if names else ""


def has_options(paths: Paths) -> bool:
    """Whether systemd would read SystemdOptions: the variable exists, and Secure Boot is off."""
    secure = _read(os.path.join(paths.efivars, SECURE_BOOT), _VARIABLE_MAX)
    return secure[4:] != b"\x01" and os.path.lexists(os.path.join(paths.efivars, OPTIONS))


def delete_options(paths: Paths) -> bool:
    """Deletes the variable, which the kernel has made immutable. False if it still exists."""
    path = os.path.join(paths.efivars, OPTIONS)
    try:
        import fcntl

        fd = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC)
        try:
            flags = bytearray(8)
            fcntl.ioctl(fd, _FS_IOC_GETFLAGS, flags)
            flags[0] &= ~_IMMUTABLE
            fcntl.ioctl(fd, _FS_IOC_SETFLAGS, bytes(flags))
        finally:
            os.close(fd)
    except OSError:
        pass  # a file system without such flags
    try:
        os.unlink(path)
    except OSError:
        pass
    return not os.path.lexists(path)


def credentials_off(command_line: str) -> bool:
    """Whether the command line has systemd.import_credentials=no, and no other value of it."""
    off = False
    for word in command_line.split():
        key, _, value = word.partition("=")
        if "import_credentials" in key.replace("-", "_"):
            if key.replace("-", "_") != "systemd.import_credentials" or value.lower() not in _OFF:
                return False
            off = True
    return off


def _smbios(table: bytes) -> Iterable[str]:
    """The names of the credentials in the SMBIOS table. It is searched as a whole, so no malformed entry hides one."""
    for text in table.split(_CREDENTIAL)[1:]:
        yield _name(text.removeprefix(b".binary").removeprefix(b":").partition(b"=")[0].partition(b"\0")[0])


def _fw_cfg(directory: str) -> list[str]:
    try:
        return [_name(os.fsencode(each)) for each in os.listdir(directory)]
    except OSError:
        return []


def _name(raw: bytes) -> str:
    return log.printable(raw[:64].decode("ascii", "replace"))


def _read(path: str, most: int) -> bytes:
    try:
        with open(path, "rb") as file:
            return file.read(most)
    except OSError:
        return b""
