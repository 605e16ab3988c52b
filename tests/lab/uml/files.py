# SPDX-License-Identifier: Apache-2.0
"""What a tree needs beside Debian, to be booted by User-Mode Linux: lists of modules, the line to the TPM, an agent."""

import shutil
from pathlib import Path

from .kernel import kernel, vtpm
from .line import AGENT, SHARED

CMDLINE = "console=ttyS0 quiet panic=-1 systemd.show_status=no init_on_alloc=0 pty.legacy_count=0 dummy.numdummies=0"
"""udev would trigger each of 256 old pseudo-terminals, zeroing memory costs time, and a dummy is no network card."""
START_TPM = "/usr/lib/lab/vtpm /dev/ttyS3 </dev/null >/dev/kmsg 2>&1"
START_TPM_BEFORE = START_TPM.replace("ttyS3", "ttyS4")
FIRST = f"""#!/bin/sh
# First in the initramfs: what the host shares, the clock, what the firmware would have left, the TPM.
[ "$1" = prereqs ] && {{ echo udev; exit; }}
mkdir -p {SHARED}
mount -t hostfs none {SHARED}
[ ! -e {SHARED}/clock ] || date -s "$(tr T ' ' <{SHARED}/clock)" >/dev/null
[ -e {SHARED}/eventlog ] || exit 0
mount -t tmpfs firmware /sys/firmware
mkdir -p /sys/firmware/acpi/tables
: >/sys/firmware/acpi/tables/TPM2
[ ! -s {SHARED}/eventlog ] || {{
    cat {SHARED}/eventlog >/run/tpm-eventlog
    mkdir -p /sys/firmware/efi/efivars
}}
[ ! -e {SHARED}/tpm-before ] || {START_TPM_BEFORE}
{START_TPM}
"""
HOOK = """#!/bin/sh
[ "$1" = prereqs ] && exit
. /usr/share/initramfs-tools/hook-functions
copy_exec /usr/lib/lab/vtpm
copy_file rule /usr/lib/udev/rules.d/61-lab.rules
"""
FILES = {
    "etc/initramfs-tools/scripts/init-top/lab-first": FIRST,
    "etc/initramfs-tools/hooks/lab-first": HOOK,
    "usr/lib/lab/agent": AGENT,
}


def prepare(tree: Path) -> None:
    """Takes away the kernel that Debian brought, and puts this one's lists and program there."""
    built = kernel()
    shutil.rmtree(tree / "usr/lib/modules")
    shutil.copytree(built.modules, tree / "usr/lib/modules")
    for each in (tree / "boot").iterdir():
        each.unlink()
    shutil.copy(built.program, tree / f"boot/vmlinuz-{built.release}")
    shutil.copy(vtpm(), tree / "usr/lib/lab/vtpm")
