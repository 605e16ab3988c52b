# SPDX-License-Identifier: Apache-2.0
"""The Debian 13 file system that every guest starts from, made with mmdebstrap."""

import inspect
import os
import subprocess
from pathlib import Path

from . import cache

SUITE = "trixie"
PACKAGES = """
    linux-image-cloud-amd64 systemd-sysv systemd-cryptsetup udev dbus kmod procps make zstd busybox
    initramfs-tools cryptsetup cryptsetup-initramfs keyutils strace lvm2 btrfs-progs e2fsprogs
    age systemd-coredump
    python3 python3-tpm2-pytss python3-cryptography python3-pyudev python3-pykmip libcryptsetup12
"""
LOADERS = """
    shim-signed grub-efi-amd64-signed grub-efi-amd64-bin grub2-common
    systemd-boot systemd-boot-efi systemd-ukify sbsigntool efibootmgr
"""
"""What a machine needs beside that to boot from its own disk; the second kernel is for updates."""
INITRAMFS_TOOLS = frozenset(("initramfs-tools", "cryptsetup-initramfs"))
DRACUT = "dracut"
"""In the place of those."""
EXCLUDED = ("/usr/share/man/*", "/usr/share/doc/*", "/usr/share/info/*", "/usr/share/locale/*")


def rootfs(more: str = "", *, dracut: bool = False) -> Path:
    """The directory of the cached file system, with `more` packages, by `dracut` without initramfs-tools; copy it
    before changing anything."""
    packages = PACKAGES + more
    if dracut:
        packages = " ".join([each for each in packages.split() if each not in INITRAMFS_TOOLS] + [DRACUT])
    name = cache.key(SUITE, packages, *EXCLUDED, inspect.getsource(_bootstrap))
    return cache.entry(f"rootfs-{name}", lambda work: _bootstrap(work, packages)) / "root"


def _bootstrap(work: Path, listed: str) -> None:
    packages = ",".join(listed.split())
    command = ["mmdebstrap", "--mode=root", "--variant=minbase", "--quiet", f"--include={packages}"]
    command += [f"--dpkgopt=path-exclude={pattern}" for pattern in EXCLUDED]
    # its scripts run in the tree: with PYTHONPYCACHEPREFIX they would put what they compile elsewhere
    environment = {name: value for name, value in os.environ.items() if not name.startswith("PYTHON")}
    subprocess.run([*command, SUITE, str(work / "root"), debian_mirror()], check=True, env=environment)


def debian_mirror() -> str:
    """The Debian mirror that this machine's apt uses, or else Debian's own."""
    targets = ["Created-By: Packages", "Origin: Debian", "Label: Debian"]
    listed = subprocess.run(
        ["apt-get", "indextargets", "--format", "$(REPO_URI)", *targets], capture_output=True, text=True
    )
    return next(iter(listed.stdout.split()), "http://deb.debian.org/debian")
