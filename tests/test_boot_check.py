# SPDX-License-Identifier: Apache-2.0
"""`unlock check` against reality: something befalls a healthy host, check says what will come of it, the power is cut,
and the host boots. Every row is printed: what was done, what check said, what the boot did.

Rows are done to one running host, and undone again; copies of its disks, TPM and firmware variables are booted. What
has nothing to do with how a host boots is done to a fast machine; the rest to hosts with a real firmware.
"""

import shutil
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import pytest

from tests.lab import image
from tests.lab.console import ConsoleError
from tests.lab.guest import Guest, GuestError
from tests.lab.image import Runs
from tests.lab.loader import Kind
from tests.lab.machine import Machine, report
from tests.lab.running import Running
from tests.lab.stories import by_itself, findings, measured, up, verdicts
from tests.test_boot_attacks import load_kexec

pytestmark = [pytest.mark.vm, pytest.mark.always]

Show = Callable[[str, object], None]
POWER_CUT: dict[Runs, dict[str, Any]] = {"uml": {}, "qemu": {"cache": "writeback"}}
"""What a machine needs so that its disks hold what was flushed."""

ESP = "/boot/efi/EFI"
KERNEL, INITRD = "/boot/efi/EFI/debian/vmlinuz", "/boot/efi/EFI/debian/initrd.img"
VARIABLE = "/sys/firmware/efi/efivars/{}-8be4df61-93ca-11d2-aa0d-00e098032b8c"
"""EFI_GLOBAL_VARIABLE (UEFI Specification 2.10, section 3.3)."""
ENTRY, SECOND, NEXT, ORDER = (VARIABLE.format(each) for each in ("Boot0000", "Boot0042", "BootNext", "BootOrder"))
SCRIPTS = {
    # a boot entry with another kernel command line: options come last (UEFI Specification 2.10, section 3.1.3)
    "edited": """
import sys
entry = open(sys.argv[1], "rb").read()
open(sys.argv[2], "wb", 0).write(entry.removesuffix(bytes(2)) + " audit=0".encode("utf-16-le") + bytes(2))
""",
    "take-token": """
import json, subprocess, sys
dump = subprocess.run(["cryptsetup", "luksDump", "--dump-json-metadata", sys.argv[1]], stdout=-1, check=True)
ours = next(n for n, each in json.loads(dump.stdout)["tokens"].items() if each["type"] == "unlock")
for what in ("export", "remove"):
    subprocess.run(["cryptsetup", "token", what, "--token-id", ours, sys.argv[1]], check=True)
""",
    "extend-pcr": """
import sys
sys.path.insert(0, "/usr/lib/unlock")
from unlock.tpm.chip import Tpm
with Tpm() as chip:
    chip.extend(9, bytes(32))
""",
    "clear-tpm": """
from tpm2_pytss import ESAPI, ESYS_TR
with ESAPI("device:/dev/tpmrm0") as chip:
    chip.clear(ESYS_TR.LOCKOUT)
""",
}
UNIFIED = "edited.efi"
"""The host's image with another command line, signed."""
SCRIPTS["unify"] = f"""
import glob, subprocess, sys
sys.path.insert(0, "/usr/lib/unlock")
from unlock.predict import pe
(own,) = glob.glob("{ESP}/Linux/*.efi")
data = open(own, "rb").read()
found = {{name: pe.section(data, pe.read(data), "." + name) for name in ("linux", "initrd", "osrel")}}
for name, content in found.items():
    open(name, "wb").write(content)
line = open("/etc/kernel/cmdline").read().strip() + " audit=0"
sections = ["--linux=linux", "--initrd=initrd", "--os-release=@osrel", "--cmdline=" + line]
subprocess.run(["ukify", "build", "--config=/etc/kernel/uki.conf", *sections, "--output={UNIFIED}"], check=True)
"""
OPENS = "opens by itself"
PART = "opens root alone by itself"
ASKS = "asks for the recovery key"
ALTERED = "opens root with no key and says that its header changed"
STOCK = "asks for root's passphrase"


class Row(NamedTuple):
    """Something that befalls a host between two boots."""

    what: str
    do: str
    """Run in the guest, in a directory with SCRIPTS."""
    undo: str
    says: dict[str, str]
    """What check says: of all, of each group."""
    because: str
    """A part of its reasons."""
    does: str
    """What the next boot does."""
    why: str = ""
    """Stands before the prompt: what differs first."""


SAFE = {"": "safe", "root": "safe", "data": "safe"}
UNPROVEN, UNSAFE = SAFE | {"": "unproven"}, SAFE | {"": "unsafe"}
UNTRIED = dict.fromkeys(SAFE, "unproven")
EDITED = "PCR 9: the kernel command line changed"
ENTRIES = "PCR 1: the firmware's boot entries or their order changed"
NOTHING = Row("nothing", "", "", SAFE, "the TPM allows it", OPENS)
ANYWHERE = (
    NOTHING,
    Row(
        "a window for a firmware update is opened",
        "unlock policy window --reboots 1",
        "unlock policy close",
        SAFE,
        "OPEN since",
        OPENS,
    ),
    Row(
        "the configuration is mangled",
        "cp /etc/unlock/unlock.toml .; echo '[' >>/etc/unlock/unlock.toml",
        "cp unlock.toml /etc/unlock/unlock.toml",
        UNSAFE,
        "no group that it names is mounted",
        PART,
    ),
    Row(
        "fstab names the mount point of a group",
        "cp /etc/fstab .; echo 'LABEL=x /srv/data ext4 nofail,x-systemd.device-timeout=5 0 0' >>/etc/fstab",
        "cp fstab /etc/fstab",
        UNSAFE,
        "group data is not mounted",
        PART,
    ),
    Row(
        "a data disk has lost its token",
        "python3 take-token {d2} >token",
        "cryptsetup token import --token-id 0 --json-file token {d2}",
        UNSAFE | {"data": "unsafe"},
        "its token is gone",
        PART,
    ),
    Row(
        "the root disk has lost its token",
        "python3 take-token {root} >token",
        "cryptsetup token import --token-id 0 --json-file token {root}",
        UNSAFE | {"root": "unsafe"},
        "its token is gone",
        ALTERED,
    ),
    Row("a program extends a PCR of this boot", "python3 extend-pcr", "", UNPROVEN, "this boot is none that", OPENS),
    Row("the key cache is flushed", "unlock cache flush --yes", "", UNTRIED, "the key cache is empty", OPENS),
    Row(
        "the TPM is cleared",
        "python3 clear-tpm",
        "",
        UNTRIED | {"": "unsafe"},
        "it keeps nothing of this host",
        ASKS,
        "the TPM was cleared",
    ),
)
"""What has nothing to do with how a host boots."""
BY_FIRMWARE = (
    NOTHING,
    Row(
        "the kernel command line is edited in the firmware's boot entry",
        f"chattr -i {ENTRY}; cat {ENTRY} >entry; python3 edited entry {ENTRY}",
        f"chattr -i {ENTRY}; cat entry >{ENTRY}",
        UNSAFE,
        "the TPM will refuse it: kernel command line",
        ASKS,
        ENTRIES,
    ),
    Row(
        "the firmware is told to start another entry once",
        f"python3 edited {ENTRY} {SECOND}; printf '\\7\\0\\0\\0\\102\\0' >{NEXT}",
        f"chattr -i {SECOND} {NEXT}; rm {SECOND} {NEXT}",
        UNPROVEN,
        "it will start Boot0042 once",
        ASKS,
        EDITED,
    ),
    Row(
        "another entry comes first in the firmware's boot order",
        f"""
        python3 edited {ENTRY} {SECOND}; cat {ORDER} >order; chattr -i {ORDER}
        (head -c 4 order; printf '\\102\\0'; tail -c +5 order) >new; cat new >{ORDER}
        """,
        f"chattr -i {SECOND} {ORDER}; rm {SECOND}; cat order >{ORDER}",
        UNPROVEN,
        "its boot order has changed",
        ASKS,
        ENTRIES,
    ),
    Row(
        "the kernel is replaced, and no hook has seen it",
        f"cp {KERNEL} kernel; head -c 8 /dev/zero >>{KERNEL}",
        f"cp kernel {KERNEL}",
        UNSAFE,
        "the TPM will refuse it: kernel vmlinuz was replaced",
        ASKS,
        "PCR 4: the kernel changed",
    ),
    Row(
        "the initramfs is edited, which Linux does not measure",
        f"cp {INITRD} initrd; (echo take-token | cpio --quiet -o -H newc; cat initrd) >{INITRD}",
        f"cp initrd {INITRD}",
        SAFE,
        "whoever edits it gets the keys",
        OPENS,
    ),
    Row(
        "the initramfs is one without unlock",
        f"cp {INITRD} initrd; cp stock {INITRD}",
        f"cp initrd {INITRD}",
        UNSAFE,
        "unlock is not in it",
        STOCK,
    ),
)


GRUB_CFG, LINUX = "/boot/grub/grub.cfg", r"s/^\s*linux\s.*/& {}/"
PATCH = "LC_ALL=C sed 's/DOS mode/dos mode/'"
REQUEST = "/sys/firmware/efi/efivars/MokNew-605dab50-e046-4300-abb6-3dd810dd8b23"
BY_GRUB = (
    NOTHING,
    Row(
        "grub.cfg is edited by hand",
        f"cp {GRUB_CFG} .; sed -i '{LINUX.format('audit=1')}' {GRUB_CFG}",
        f"cp grub.cfg {GRUB_CFG}",
        UNSAFE,
        "the TPM will refuse it: kernel command line, grub.cfg",
        ASKS,
        "PCR 9: the boot loader's configuration changed",
    ),
    Row(
        "grub.cfg is edited by hand, and predicted",
        f"cp {GRUB_CFG} .; sed -i '{LINUX.format('audit=0')}' {GRUB_CFG}; unlock policy predict",
        f"cp grub.cfg {GRUB_CFG}",
        SAFE,
        "the TPM allows it: kernel command line, grub.cfg",
        OPENS,
    ),
    Row(
        "another menu entry is to boot once",
        "cp /boot/grub/grubenv . || true; grub-reboot '1>0'",
        "if test -e grubenv; then cp grubenv /boot/grub/; else rm /boot/grub/grubenv; fi",
        UNSAFE,
        "the TPM will refuse it: another menu entry",
        ASKS,
        "PCR ",
    ),
    Row(
        "another menu entry is to boot once, and predicted",
        "grub-reboot '1>0'; unlock policy predict",
        "if test -e grubenv; then cp grubenv /boot/grub/; else rm /boot/grub/grubenv; fi",
        SAFE,
        "the TPM allows it: another menu entry",
        OPENS,
    ),
    Row(
        "the kernel is replaced, and no hook has seen it",
        "cp /boot/vmlinuz-* .; for each in /boot/vmlinuz-*; do head -c 8 /dev/zero >>$each; done",
        "cp vmlinuz-* /boot",
        UNSAFE,
        "was replaced",
        ASKS,
        "PCR ",
    ),
    Row(
        "the initramfs is edited",
        """
        cp /boot/initrd.img-* .
        for each in initrd.img-*; do (echo edited | cpio --quiet -o -H newc; cat $each) >/boot/$each; done
        """,
        "cp initrd.img-* /boot",
        UNSAFE,
        "the TPM will refuse it: initramfs of",
        ASKS,
        "PCR 9: the initramfs changed",
    ),
    Row(
        "GRUB is replaced",
        f"cp {ESP}/BOOT/grubx64.efi .; {PATCH} grubx64.efi >{ESP}/BOOT/grubx64.efi",
        f"cp grubx64.efi {ESP}/BOOT",
        UNSAFE,
        "the TPM will refuse it: boot loader",
        ASKS,
        "PCR 4: ",
    ),
    Row(
        "shim is replaced",
        f"cp {ESP}/BOOT/BOOTX64.EFI .; {PATCH} BOOTX64.EFI >{ESP}/BOOT/BOOTX64.EFI",
        f"cp BOOTX64.EFI {ESP}/BOOT",
        UNPROVEN,
        "a new shim",
        ASKS,
        "PCR 4: ",
    ),
    Row(
        "a key for shim waits to be confirmed",
        f"printf '\\7\\0\\0\\0x' >{REQUEST}",
        f"chattr -i {REQUEST}; rm {REQUEST}",
        UNSAFE,
        "shim's MokManager comes first (MokNew)",
        ASKS,
        "PCR 4: ",
    ),
)
OWN, BOOT = f"{ESP}/Linux/debian-*.efi", f"{ESP}/BOOT/BOOTX64.EFI"
BY_UNIFIED = (
    NOTHING,
    Row(
        "the image is built again, and no hook has seen it",
        f"cp {OWN} own.efi; for each in {OWN}; do cp {UNIFIED} $each; done",
        f"for each in {OWN}; do cp own.efi $each; done",
        UNSAFE,
        "the TPM will refuse it: unified kernel image",
        ASKS,
        "PCR 4: ",
    ),
    Row(
        "a newer image comes beside it",
        f"cp {UNIFIED} {ESP}/Linux/debian-99.efi",
        f"rm {ESP}/Linux/debian-99.efi",
        UNSAFE,
        "the TPM will refuse it: unified kernel image, another menu entry",
        ASKS,
        "PCR 4: ",
    ),
    Row(
        "a newer image comes beside it, and is predicted",
        f"cp {UNIFIED} {ESP}/Linux/debian-99.efi; unlock policy predict",
        f"rm {ESP}/Linux/debian-99.efi",
        SAFE,
        "debian-99.efi: the TPM allows it",
        OPENS,
    ),
    Row(
        "an entry comes first that is no unified kernel image",
        f"""
        mkdir -p {ESP}/other /boot/efi/loader/entries; cp {OWN} {ESP}/other/linux.efi
        printf 'title x\\nsort-key a\\nefi /EFI/other/linux.efi\\noptions audit=0\\n' >/boot/efi/loader/entries/x.conf
        """,
        f"rm -r {ESP}/other /boot/efi/loader/entries",
        UNSAFE,
        "boot entry x.conf: it is no unified kernel image like this boot's",
        ASKS,
        "PCR ",
    ),
    Row(
        "systemd-boot is replaced",
        f"""
        cp {BOOT} loader.efi; cp {BOOT} new.efi; sbattach --remove new.efi; head -c 8 /dev/zero >>new.efi
        sbsign --key /etc/kernel/secure-boot.key --cert /etc/kernel/secure-boot.pem --output {BOOT} new.efi
        """,
        f"cp loader.efi {BOOT}",
        UNSAFE,
        "the TPM will refuse it: boot loader",
        ASKS,
        "PCR 4: ",
    ),
    Row(
        "a credential is put beside the image",
        "mkdir -p /boot/efi/loader/credentials; echo x >/boot/efi/loader/credentials/x.cred",
        "rm -r /boot/efi/loader/credentials",
        UNSAFE,
        "add-ons or credentials beside it are not those of this boot",
        ASKS,
        "PCR 12: ",
    ),
)
HOSTS: dict[Kind, tuple[str, tuple[Row, ...]]] = {
    "direct": ("true", BY_FIRMWARE),
    "grub": ("true", BY_GRUB),
    "uki": ("python3 unify", BY_UNIFIED),
}
"""What the rows need, and the rows."""
AT_ONCE = 2
"""Rows of one test of an emulated machine."""


def test_what_check_says_is_what_the_next_boot_does(tmp_path: Path, record_property: Show) -> None:
    play(measured(), "", "true", ANYWHERE, tmp_path, record_property)


@pytest.mark.long(minutes=7)
@pytest.mark.parametrize(
    ("kind", "first"), [(kind, first) for kind, (_, rows) in HOSTS.items() for first in range(0, len(rows), AT_ONCE)]
)
def test_what_check_says_is_what_the_next_boot_does_by(
    kind: Kind, first: int, tmp_path: Path, record_property: Show
) -> None:
    prepare, rows = HOSTS[kind]
    play(by_itself(kind), kind, prepare, rows[first : first + AT_ONCE], tmp_path, record_property)


def play(
    enrolled: Machine, kind: Kind, prepare: str, rows: Sequence[Row], tmp_path: Path, record_property: Show
) -> None:
    story = enrolled.clone(tmp_path / "machine")
    disks = {"d2": story.disks["d2"].device, "root": f"/dev/disk/by-uuid/{image.LUKS_UUID}"}
    before, otherwise = [], []
    with story.boot(**POWER_CUT[story.image.runs]) as booted:
        console = up(booted)
        for name, text in SCRIPTS.items():
            console.write(f"/root/{name}", text.encode())
        if any("stock" in row.do for row in rows):
            console.write("/root/stock", image.build(runs="qemu", product=False).initrd.read_bytes())
        run(console, prepare)
        run(console, "sed -i '/^\\[group.data\\]/a deadline = 20' /etc/unlock/unlock.toml")
        for number, row in enumerate(rows):
            run(console, row.do.format(**disks))
            said = findings(console)
            reasons = [f"{each['verdict']} {each['what']}: {each['detail']}" for each in said["findings"]]
            if verdicts(said) != row.says or not any(row.because in each for each in reasons):
                otherwise.append("\n".join((row.what, str(verdicts(said)), *reasons)))
            before.append(powerless(booted, story, tmp_path / f"row-{number}"))
            run(console, row.undo.format(**disks))
        booted.kill()
    shutil.rmtree(story.home)
    assert not otherwise, "\n\n".join(otherwise)
    for row, machine in zip(rows, before, strict=True):
        with machine.boot() as booted:
            try:
                happens(booted, row)
            except (AssertionError, ConsoleError, GuestError) as problem:
                otherwise.append(f"{row.what}: {problem}\n{booted.console.text[-2000:]}")
                continue
            if kind == "direct" and row is NOTHING:
                load_kexec(machine, booted)
                said = findings(booted.guest)
                assert verdicts(said) == UNSAFE
                booted.guest.sh("systemctl kexec --no-block")
                booted.console.expect("cannot unseal: .*PCR", 600)
                record_property("shown", "check: unsafe; the boot asks for the recovery key: kexec is used")
            booted.kill()
        record_property("shown", f"{kind or 'anywhere'}: check: {row.says['']}; the boot {row.does}: {row.what}")
        shutil.rmtree(machine.home)
    assert not otherwise, "\n\n".join(otherwise)


def run(console: Guest, script: str) -> None:
    console.sh(f"set -e; cd /root; {script or 'true'}", timeout=900)


def powerless(booted: Running, story: Machine, to: Path) -> Machine:
    """A copy of the machine as it would be if its power were cut now."""
    booted.guest.sh("if mountpoint -q /boot/efi; then sync -f /boot/efi; fi; sync")
    with booted.frozen():
        return story.clone(to)


def happens(booted: Running, row: Row) -> None:
    """The boot does what the row says."""
    if row.does == STOCK:
        booted.console.expect("unlock disk root", 600)
        assert "recovery key" not in booted.console.text
    elif row.does == ALTERED:
        booted.console.expect("its header is not the one that this host wrote: it has no unlock token", 600)
        booted.console.expect("recovery key: ", 60)
        assert "unlock disk" not in booted.console.text
    elif row.does == ASKS:
        booted.console.expect("recovery key: ", 600)
        assert f"first     {row.why}" in booted.console.text
    else:
        console = up(booted)
        assert report(console)["verdict"] == "unsealed"
        assert "recovery key" not in booted.console.text and "unlock disk" not in booted.console.text
        mounted = console.sh("mountpoint -q /srv/data", check=False).code == 0
        assert mounted == (row.does == OPENS)
