# SPDX-License-Identifier: Apache-2.0
"""What a machine boots from by itself: a disk with an EFI system partition, and for GRUB another that is /boot.

grub    shim ──> GRUB ──> kernel and initramfs of /boot, all signed by Debian, with Secure Boot or without
uki     systemd-boot ──> a unified kernel image, both signed with the key of ovmf's snakeoil variables; Secure Boot
direct  kernel and initramfs on the EFI system partition, by an entry of the firmware's own boot menu
"""

import os
import shutil
import subprocess
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal

from . import cache

Kind = Literal["", "grub", "uki", "direct"]
Chroot = Callable[[Path, str], None]

BOOT_UUID = "6c616220-626f-4f74-8000-657874340002"
ESP_UUID = "6C61-6203"
_WAITS = "x-systemd.device-timeout=infinity"
_ESP_LINE = f"UUID={ESP_UUID} /boot/efi vfat umask=0077,{_WAITS} 0 0\n"
FSTAB = {
    "": "",
    "grub": f"UUID={BOOT_UUID} /boot ext4 {_WAITS} 0 0\n{_ESP_LINE}",
    "uki": _ESP_LINE,
    "direct": _ESP_LINE,
}
DISKS = {"": (), "grub": ("esp", "boot"), "uki": ("esp",), "direct": ("esp",)}
ESP_SIZE, BOOT_SIZE = 160 << 20, 256 << 20
ESP_START = 1 << 20
VARIABLES = {"uki": Path("/usr/share/OVMF/OVMF_VARS_4M.snakeoil.fd")}
"""Of the firmware, at the first boot; those of `direct` are the image's own."""
NO_VARIABLES = Path("/usr/share/OVMF/OVMF_VARS_4M.fd")
KEYS = Path("/usr/share/ovmf")
KERNEL, INITRD = "EFI/debian/vmlinuz", "initrd=\\EFI\\debian\\initrd.img "
"""Of `direct`: the kernel on the EFI system partition, and how its options begin."""
BY_DRACUT = "sed -i s/=ukify/=dracut/ /etc/kernel/install.conf && rm /etc/kernel/postinst.d/dracut"
"""For sh in the tree: kernel-install has dracut make the unified kernel image too. Without Debian's hook, which would
make another initramfs before."""
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
INSTALL = {
    "etc/kernel/install.conf": "layout=uki\nuki_generator=ukify\n",
    "etc/kernel/entry-token": "debian\n",
    "etc/kernel/uki.conf": """\
[UKI]
SecureBootPrivateKey=/etc/kernel/secure-boot.key
SecureBootCertificate=/etc/kernel/secure-boot.pem
""",
}
"""With these, kernel-install makes a signed unified kernel image of each kernel that is installed."""
COPY = """\
#!/bin/sh
# To the EFI system partition, when a kernel has got its initramfs; whole, whenever the power goes.
cd /boot/efi/EFI/debian && cp "/boot/vmlinuz-$1" vmlinuz.new && cp "$2" initrd.img.new &&
	sync vmlinuz.new initrd.img.new && mv vmlinuz.new vmlinuz && mv initrd.img.new initrd.img && sync .
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
dpkg-deb --raw-extract linux-image-*.deb /tmp/kernel
dpkg-deb --build -Znone /tmp/kernel linux-image.deb
rm -rf linux-image-*.deb /tmp/lists /tmp/security.list /tmp/kernel
"""
"""Another kernel of the same release, as a file; not compressed, which would cost the emulated guest a minute."""


def prepare(kind: Kind, tree: Path, cmdline: str, chroot: Chroot) -> None:
    """What the operator's system has beside the kernel, before the initramfs is made. `cmdline`: the kernel's."""
    if kind == "":
        return
    (tree / "boot/efi").mkdir()
    if kind == "grub":
        (tree / "etc/default/grub").write_text(DEFAULTS.format(cmdline.partition(" ro ")[2]))
    elif kind == "uki":
        for name, text in (INSTALL | {"etc/kernel/cmdline": f"{cmdline}\n"}).items():
            (tree / name).write_text(text)
        by_dracut = tree / "etc/dracut.conf.d/uki.conf"
        if by_dracut.parent.exists():  # of /etc/kernel/cmdline it takes nothing
            by_dracut.write_text(f'kernel_cmdline="{cmdline}"\n')
        unlocked: list[str | Path] = [
            "openssl",
            "pkey",
            "-in",
            KEYS / "PkKek-1-snakeoil.key",
            "-passin",
            "pass:snakeoil",
        ]
        subprocess.run([*unlocked, "-out", tree / "etc/kernel/secure-boot.key"], check=True)
        shutil.copy(KEYS / "PkKek-1-snakeoil.pem", tree / "etc/kernel/secure-boot.pem")
    else:
        hook = tree / "etc/initramfs/post-update.d/zz-esp"
        hook.write_text(COPY)
        hook.chmod(0o755)
    to = tree / "usr/lib/lab/linux-image.deb"

    def download(work: Path) -> None:
        chroot(tree, UPDATE)
        to.rename(work / to.name)

    (modules,) = (tree / "usr/lib/modules").iterdir()
    shutil.copy(cache.entry(f"kernel-{cache.key(modules.name, UPDATE)}", download) / to.name, to)


def disks(kind: Kind, tree: Path, work: Path, cmdline: str, root_uuid: str, chroot: Chroot) -> None:
    """esp.raw in `work`, from its vmlinuz and initrd; for GRUB boot.raw too, and /boot is empty then."""
    if kind == "grub":
        _grub(tree, work, root_uuid, chroot)
    elif kind == "uki":
        _uki(tree, work, cmdline, chroot)
    elif kind == "direct":
        esp(work / "esp.raw", {KERNEL: work / "vmlinuz", "EFI/debian/initrd.img": work / "initrd"})
        entry(work / "vars.fd", KERNEL, INITRD + cmdline)


def entry(to: Path, name: str, options: str) -> None:
    """The firmware's one boot entry, in its variables `to`, as `efibootmgr --create --unicode OPTIONS` makes it."""
    from virt.firmware.efi import devpath, ucs16

    if not to.exists():
        shutil.copyfile(NO_VARIABLES, to)
    path = devpath.DevicePath.filepath("\\" + name.replace("/", "\\"))
    with variables(to) as found:
        found.set_boot_entry(0, "Debian", path, bytes(ucs16.from_string(options)))
        if "BootOrder" not in found:
            found.append_boot_order(0)


@contextmanager
def variables(path: Path) -> Iterator[Any]:
    """The firmware's variables, to be changed while the machine is off: virt-firmware's EfiVarList."""
    from virt.firmware.varstore import edk2

    store = edk2.Edk2VarStore(os.fspath(path))
    found = store.get_varlist()
    yield found
    store.write_varstore(os.fspath(path), found)


def _uki(tree: Path, work: Path, cmdline: str, chroot: Chroot) -> None:
    (modules,) = (tree / "usr/lib/modules").iterdir()
    inside = tree / "uki"
    inside.mkdir()
    shutil.copy(work / "vmlinuz", inside / "linux")
    shutil.copy(work / "initrd", inside / "initrd")
    kernel = f"--linux=linux --initrd=initrd --cmdline=@/etc/kernel/cmdline --uname={modules.name}"
    chroot(tree, f"cd /uki; ukify build --config=/etc/kernel/uki.conf {kernel} --output=unified")
    stub, keys = "/usr/lib/systemd/boot/efi/systemd-bootx64.efi", "/etc/kernel/secure-boot"
    chroot(tree, f"cd /uki; sbsign --key {keys}.key --cert {keys}.pem --output systemd-boot {stub}")
    loaders = ("EFI/BOOT/BOOTX64.EFI", "EFI/systemd/systemd-bootx64.efi")
    files = dict.fromkeys(loaders, inside / "systemd-boot")
    esp(work / "esp.raw", files | {f"EFI/Linux/debian-{modules.name}.efi": inside / "unified"})
    shutil.rmtree(inside)


def _grub(tree: Path, work: Path, root_uuid: str, chroot: Chroot) -> None:
    (modules,) = (tree / "usr/lib/modules").iterdir()
    shutil.copy(work / "vmlinuz", tree / f"boot/vmlinuz-{modules.name}")
    fonts = tree / "boot/grub/fonts"
    fonts.mkdir(parents=True)
    shutil.copy(tree / "usr/share/grub/unicode.pf2", fonts)
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
    """A disk with an EFI system partition that has these files."""
    with to.open("wb") as file:
        file.truncate(ESP_SIZE)
    table = f"label: gpt\nstart={ESP_START >> 9}, type=uefi\n"
    subprocess.run(["sfdisk", "--quiet", to], input=table, text=True, check=True)
    room = str((ESP_SIZE - 2 * ESP_START) >> 10)
    make = ["mkfs.vfat", "-F", "32", "-i", ESP_UUID.replace("-", ""), "--offset", str(ESP_START >> 9), str(to), room]
    subprocess.run(make, check=True, capture_output=True)
    folders = sorted({str(parent) for name in files for parent in Path(name).parents} - {"."})
    environment = os.environ | {"MTOOLS_SKIP_CHECK": "1"}
    inside = f"{to}@@{ESP_START}"
    subprocess.run(["mmd", "-i", inside, *(f"::{each}" for each in folders)], check=True, env=environment)
    for name, source in files.items():
        subprocess.run(["mcopy", "-i", inside, source, f"::{name}"], check=True, env=environment)
