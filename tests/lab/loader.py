# SPDX-License-Identifier: Apache-2.0
"""Disks that a machine boots from by itself: an EFI system partition, and /boot for GRUB. Whole disks, without a
partition table.

    grub    shim ──> GRUB ──> kernel and initramfs of /boot, all signed by Debian, without Secure Boot
    uki     a unified kernel image, signed with the key of ovmf's snakeoil variables; Secure Boot with that key
"""

import os
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Literal

from . import cache

Kind = Literal["", "grub", "uki"]
Chroot = Callable[[Path, str], None]

BOOT_UUID = "6c616220-626f-4f74-8000-657874340002"
ESP_UUID = "6C61-6203"
_WAITS = "x-systemd.device-timeout=infinity"
_ESP_LINE = f"UUID={ESP_UUID} /boot/efi vfat umask=0077,{_WAITS} 0 0\n"
FSTAB = {"": "", "grub": f"UUID={BOOT_UUID} /boot ext4 {_WAITS} 0 0\n{_ESP_LINE}", "uki": _ESP_LINE}
DISKS = {"": (), "grub": ("esp", "boot"), "uki": ("esp",)}
ESP_SIZE, BOOT_SIZE = 160 << 20, 256 << 20
KEYS = Path("/usr/share/ovmf")
DEFAULTS = """\
GRUB_DEFAULT=0
GRUB_TIMEOUT=5
GRUB_DISTRIBUTOR=Debian
GRUB_CMDLINE_LINUX_DEFAULT=""
GRUB_CMDLINE_LINUX="{}"
GRUB_DISABLE_LINUX_UUID=true
GRUB_TERMINAL=console
"""
FIRST = f"""\
search.fs_uuid {BOOT_UUID} root hd1
set prefix=($root)'/grub'
configfile $prefix/grub.cfg
"""
"""What grub-install writes to the EFI system partition."""

# What grub-probe says in the guest of / and /boot; here there are no such devices.
PROBE = """\
#!/bin/sh
for word; do
    case $word in --target=*) target=${word#*=} ;; esac
    about=$word
done
case $about in / | /dev/mapper/root) at=root ;; *) at=boot ;; esac
case $target:$at in
device:root) echo /dev/mapper/root ;;
device:boot) echo /dev/sdb ;;
fs_uuid:root) echo ROOT-UUID ;;
fs_uuid:boot) echo BOOT-UUID ;;
fs:*) echo ext2 ;;
hints_string:*) echo --hint-bios=hd1 --hint-efi=hd1 --hint-baremetal=ahci1 ;;
esac
"""
MKCONFIG = """
mount -t tmpfs none /mnt && cp -a /boot/. /mnt/ && mount --move /mnt /boot
mount --bind /grub-probe /usr/sbin/grub-probe
grub-mkconfig -o /boot/grub/grub.cfg
cp /boot/grub/grub.cfg /grub.cfg
"""
UPDATE = """
cd /usr/lib/lab
lists="-o Dir::State::Lists=/tmp/lists -o Dir::Etc::SourceList=/tmp/security.list -o Dir::Etc::SourceParts=/dev/null"
mkdir -p /tmp/lists/partial
echo "deb http://deb.debian.org/debian-security trixie-security main" >/tmp/security.list
apt-get -qq $lists update
newest=$(apt-cache $lists pkgnames linux-image-6.12. | grep -E 'deb13(\\.[0-9]+)?-cloud-amd64$' |
    grep -vxF "linux-image-$(ls /lib/modules)" | sort -V | tail -n 1)
apt-get -qq $lists -o APT::Sandbox::User=root download "$newest"
mv linux-image-*.deb linux-image.deb
rm -rf /tmp/lists /tmp/security.list
"""
"""Another kernel of the same release, as a file."""


def prepare(kind: Kind, tree: Path, cmdline: str, chroot: Chroot) -> None:
    """What the operator's system has beside the kernel, before the initramfs is made."""
    if kind == "grub":
        (tree / "etc/default/grub").write_text(DEFAULTS.format(cmdline))
        to = tree / "usr/lib/lab/linux-image.deb"

        def download(work: Path) -> None:
            chroot(tree, UPDATE)
            to.rename(work / to.name)

        (modules,) = (tree / "usr/lib/modules").iterdir()
        shutil.copy(cache.entry(f"kernel-{cache.key(modules.name, UPDATE)}", download) / to.name, to)


def disks(kind: Kind, tree: Path, work: Path, cmdline: str, root_uuid: str, chroot: Chroot) -> None:
    """esp.raw in `work`; for GRUB boot.raw too, and /boot is empty then."""
    if kind == "grub":
        _grub(tree, work, root_uuid, chroot)
    elif kind == "uki":
        files = unified(tree, work, {"debian.efi": (work / "vmlinuz", work / "initrd", cmdline)}, chroot)
        esp(work / "esp.raw", files)


def unified(tree: Path, work: Path, images: dict[str, tuple[Path, Path, str]], chroot: Chroot) -> dict[str, Path]:
    """systemd-boot, and unified kernel images: name -> kernel, initramfs, command line. Signed. What `esp` takes."""
    inside = tree / "uki"
    inside.mkdir()
    unlocked = ["openssl", "pkey", "-in", KEYS / "PkKek-1-snakeoil.key", "-passin", "pass:snakeoil"]
    subprocess.run([*unlocked, "-out", inside / "key"], check=True)
    shutil.copy(KEYS / "PkKek-1-snakeoil.pem", inside / "certificate")
    for name, (kernel, initrd, cmdline) in images.items():
        shutil.copy(kernel, inside / "linux")
        shutil.copy(initrd, inside / "initrd")
        (inside / "cmdline").write_text(cmdline)
        keys = "--secureboot-private-key=key --secureboot-certificate=certificate"
        chroot(tree, f"cd /uki; ukify build --linux=linux --initrd=initrd --cmdline=@cmdline {keys} --output={name}")
    stub = "/usr/lib/systemd/boot/efi/systemd-bootx64.efi"
    chroot(tree, f"cd /uki; sbsign --key key --cert certificate --output systemd-boot {stub}")
    found = {f"EFI/Linux/{name}": inside / name for name in images} | {"EFI/BOOT/BOOTX64.EFI": inside / "systemd-boot"}
    out = work / "uki"
    inside.rename(out)
    return {name: out / path.name for name, path in found.items()}


def _grub(tree: Path, work: Path, root_uuid: str, chroot: Chroot) -> None:
    (modules,) = (tree / "usr/lib/modules").iterdir()
    shutil.copy(work / "vmlinuz", tree / f"boot/vmlinuz-{modules.name}")
    fonts = tree / "boot/grub/fonts"
    fonts.mkdir(parents=True)
    shutil.copy(tree / "usr/share/grub/unicode.pf2", fonts)
    (tree / "boot/efi").mkdir()
    (tree / "grub-probe").write_text(PROBE.replace("ROOT-UUID", root_uuid).replace("BOOT-UUID", BOOT_UUID))
    (tree / "grub-probe").chmod(0o755)
    chroot(tree, MKCONFIG)
    (tree / "grub.cfg").rename(tree / "boot/grub/grub.cfg")
    (tree / "grub-probe").unlink()
    boot = work / "boot"
    (tree / "boot").rename(boot)
    (tree / "boot").mkdir()
    _ext4(boot, work / "boot.raw")
    shutil.rmtree(boot)
    signed = tree / "usr/lib/grub/x86_64-efi-signed/grubx64.efi.signed"
    files = {
        "EFI/BOOT/BOOTX64.EFI": tree / "usr/lib/shim/shimx64.efi.signed",
        "EFI/BOOT/grubx64.efi": signed,
        "EFI/BOOT/mmx64.efi": tree / "usr/lib/shim/mmx64.efi.signed",
    }
    (work / "grub.cfg").write_text(FIRST)
    esp(work / "esp.raw", files | {"EFI/debian/grub.cfg": work / "grub.cfg"})


def _ext4(tree: Path, to: Path) -> None:
    with to.open("wb") as file:
        file.truncate(BOOT_SIZE)
    subprocess.run(["mkfs.ext4", "-q", "-F", "-b", "4096", "-U", BOOT_UUID, "-d", tree, to], check=True)


def esp(to: Path, files: dict[str, Path]) -> None:
    """A FAT file system with these files."""
    with to.open("wb") as file:
        file.truncate(ESP_SIZE)
    subprocess.run(["mkfs.vfat", "-F", "32", "-i", ESP_UUID.replace("-", ""), to], check=True, capture_output=True)
    folders = sorted({str(parent) for name in files for parent in Path(name).parents} - {"."})
    environment = os.environ | {"MTOOLS_SKIP_CHECK": "1"}
    subprocess.run(["mmd", "-i", to, *(f"::{each}" for each in folders)], check=True, env=environment)
    for name, source in files.items():
        subprocess.run(["mcopy", "-i", to, source, f"::{name}"], check=True, env=environment)
