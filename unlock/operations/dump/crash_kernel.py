# SPDX-License-Identifier: Apache-2.0
"""Loads the kernel that runs now once more, with the initramfs of crash_image.py, as the one that a panic starts.

Then `kernel.kexec_load_limit_panic` is set to 0: until the next boot nothing replaces it, kdump-tools neither, whose
crash kernel may write a dump in plain.
"""

import os
import subprocess

from ...disks import devices
from ...errors import CommandFailed, Refused
from ...keys.dump_key import Recipient
from ...paths import Paths, write_atomically
from .crash_image import Config, make_image, modules_of

MEMORY = "256M"
"""What docs and messages advise for crashkernel=; tests/test_boot_kernel_dump.py measures it."""
_LIMIT = "proc/sys/kernel/kexec_load_limit_panic"
_APPENDED = "irqpoll nr_cpus=1 reset_devices nokaslr transparent_hugepage=never cgroup_disable=memory panic=10"
_DROPPED = (
    *(
        "BOOT_IMAGE",
        "crashkernel",
        "root",
        "ro",
        "rw",
        "quiet",
        "splash",
        "resume",
        "init",
        "rdinit",
        "initrd",
        "panic",
    ),
    *("hugepages", "hugepagesz", "default_hugepagesz", "memmap", "nr_cpus", "maxcpus", "cgroup_disable", "break"),
    *("module_blacklist", "nokaslr", "irqpoll", "reset_devices", "transparent_hugepage"),
)
"""Words of this boot's command line that the crash kernel does not get; nor those with a dot, which are modules' and
systemd's. What is left names consoles and works around hardware."""


def load(paths: Paths, node: str, config: Config) -> None:
    """Raises Refused, CommandFailed, OSError."""
    if reserved(paths) == 0:
        raise Refused(
            "no memory is kept for a crash kernel",
            f"crashkernel={MEMORY} on the kernel's command line, and a reboot",
            code="no-crash-memory",
        )
    if os.path.exists(paths.of_this_boot("uncapped")):
        raise Refused("a TPM is not locked: a crash kernel would start with it", "reboot", code="not-capped")
    release = os.uname().release
    number = os.stat(node).st_rdev
    modules = modules_of(f"{os.major(number)}:{os.minor(number)}", release)
    image = make_image(paths, config, modules)
    fd = os.memfd_create("crash", os.MFD_CLOEXEC)
    with os.fdopen(fd, "wb") as file:
        file.write(image)
        file.flush()
        command = ["kexec", "-p", "-a", f"--initrd=/proc/self/fd/{fd}", f"--command-line={_command_line(paths)}"]
        done = subprocess.run([*command, _kernel(paths, release)], pass_fds=(fd,), capture_output=True)
    if done.returncode:
        words = done.stderr.decode("utf-8", "replace").strip().splitlines() or [f"status {done.returncode}"]
        raise CommandFailed(f"kexec -p: {words[-1]}", "dmesg")
    write_atomically(paths.of_this_boot("crash-kernel"), config.in_shell().encode())
    _forbid_others(paths)


def reserved(paths: Paths) -> int:
    """Bytes of memory that are kept for a crash kernel."""
    return int(devices.read_line(paths.root, "sys/kernel/kexec_crash_size") or 0)


def loaded_config(paths: Paths) -> Config | None:
    """What the crash kernel was told that was loaded in this boot; None where unlock has loaded none."""
    found = dict(line.partition("=")[::2] for line in devices.read_line(paths.of_this_boot("crash-kernel")).split())
    try:
        return Config(found["id"], Recipient(int(found["generation"]), found["recipient"]))
    except (LookupError, ValueError):
        return None


def estimate(paths: Paths) -> int:
    """Bytes of memory that are the kernel's own now, by meminfo; makedumpfile -d 31 may keep more."""
    kib: dict[str, int] = {}
    for line in devices.read_line(paths.root, "proc/meminfo").splitlines():
        name, _, rest = line.partition(":")
        kib[name] = int(rest.split()[0])
    users = ("MemFree", "Buffers", "Cached", "SwapCached", "AnonPages")
    return max(0, kib.get("MemTotal", 0) - sum(kib.get(each, 0) for each in users)) << 10


def is_loaded(paths: Paths) -> bool:
    """Whether a panic starts a kernel, whoever loaded it."""
    return devices.read_line(paths.root, "sys/kernel/kexec_crash_loaded") == "1"


def is_locked(paths: Paths) -> bool:
    """Whether no other can be loaded in this boot."""
    return devices.read_line(paths.root, _LIMIT) == "0"


def _forbid_others(paths: Paths) -> None:
    path = os.path.join(paths.root, _LIMIT)
    if os.path.exists(path):  # from Linux 6.3
        with open(path, "w", encoding="ascii") as file:
            file.write("0")


def _kernel(paths: Paths, release: str) -> str:
    for name in (f"boot/vmlinuz-{release}", f"usr/lib/modules/{release}/vmlinuz"):
        path = os.path.join(paths.root, name)
        if os.path.exists(path):
            return path
    raise Refused(f"the kernel {release}, which runs now, is not in /boot any more", "reboot", code="no-kernel")


def _command_line(paths: Paths) -> str:
    words = devices.read_line(paths.cmdline).split()
    kept = [each for each in words if each.split("=")[0] not in _DROPPED and "." not in each.split("=")[0]]
    return " ".join([*kept, _APPENDED])
