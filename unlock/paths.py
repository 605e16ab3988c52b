# SPDX-License-Identifier: Apache-2.0
"""Where the files of unlock and of the system are, and writing a file so that a power cut cannot tear it."""

import os

TPM_DEVICE = "device:/dev/tpmrm0"
"""The TCTI of the first TPM on nearly every host; `host.this_boot.tpm_device` looks which one there is."""


class Paths:
    """All paths of one system, below `root`, which is not / in tests and image builds."""

    def __init__(self, root: str = "/") -> None:
        self.root = root
        self.config = os.path.join(root, "etc/unlock/unlock.toml")
        self.crypttab = os.path.join(root, "etc/crypttab")
        self.fstab = os.path.join(root, "etc/fstab")
        self.state = os.path.join(root, "var/lib/unlock/state.json")
        self.run = os.path.join(root, "run/unlock")
        self.journald = os.path.join(root, "run/systemd/journal/socket")
        self.efi = os.path.join(root, "sys/firmware/efi")
        self.baseline = os.path.join(root, "var/lib/unlock/baseline.json")
        self.booted = os.path.join(root, "var/lib/unlock/booted.json")
        self.boot_files = os.path.join(root, "var/lib/unlock/boot-files.json")
        self.dumps = os.path.join(root, "var/lib/unlock/dumps")
        self.dump_recipient = os.path.join(root, "var/lib/unlock/dump-recipient")
        self.kernel_dump = os.path.join(root, "var/lib/unlock/kernel-dump")
        self.boot_id = os.path.join(root, "proc/sys/kernel/random/boot_id")
        self.event_log = os.path.join(root, "sys/kernel/security/tpm0/binary_bios_measurements")
        self.systemd_log = os.path.join(root, "run/log/systemd/tpm2-measure.log")
        self.efivars = os.path.join(root, "sys/firmware/efi/efivars")
        self.dmi = os.path.join(root, "sys/firmware/dmi/tables/DMI")
        self.fw_cfg = os.path.join(root, "sys/firmware/qemu_fw_cfg/by_name/opt/io.systemd.credentials")
        self.cmdline = os.path.join(root, "proc/cmdline")
        self.bootloader = os.path.join(root, "proc/sys/kernel/bootloader_type")

    def of_this_boot(self, name: str) -> str:
        """A file in /run/unlock."""
        return os.path.join(self.run, name)


def write_atomically(path: str, data: bytes, mode: int = 0o600) -> None:
    """Replaces `path` so that a power cut leaves the old or the new content, whole.

    Raises OSError; the old file is then still there.
    """
    folder = os.path.dirname(path)
    os.makedirs(folder, mode=0o700, exist_ok=True)
    temporary = f"{path}.new"
    fill(create(temporary, mode), temporary, data, shown=path)
    try:
        os.replace(temporary, path)
    except OSError:
        os.unlink(temporary)
        raise
    sync_folder(folder)


def fill(fd: int, path: str, data: bytes | bytearray, shown: str = "") -> None:
    """Writes all of a new file, durably, and closes it; on an error, or when it is interrupted, there is no file. No
    copy of the data is left in memory. Raises OSError, which names `shown`, else the file: what is written to a
    descriptor names none by itself."""
    try:
        try:
            with memoryview(data) as left:
                at = 0
                while at < len(data):
                    at += os.write(fd, left[at:])
            os.fsync(fd)
        finally:
            os.close(fd)
    except BaseException as error:
        os.unlink(path)
        if isinstance(error, OSError):
            error.filename = shown or path
        raise


def create(path: str, mode: int = 0o600) -> int:
    """Creates a file and returns its descriptor. A file or link that exists, left over or planted, is removed first.
    Raises OSError."""
    if os.path.lexists(path):
        os.unlink(path)
    return os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, mode)


def sync_folder(folder: str) -> None:
    """Makes the entries of a folder durable."""
    fd = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)
