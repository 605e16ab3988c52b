# SPDX-License-Identifier: Apache-2.0
"""Bootable images: the Debian rootfs, unlock's packages in it, an initramfs, a root disk."""

import shutil
import subprocess
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Literal, NamedTuple

from . import cache, covered, dracut, guest, loader, luks
from .loader import Kind
from .packages import packages
from .rootfs import LOADERS, rootfs
from .uml import files as uml
from .uml.kernel import kernel, vtpm

PASSPHRASE = "lab passphrase"  # of the root disk's LUKS header
LUKS_UUID = "6c616220-726f-4f74-8000-6c756b730001"
FS_UUID = "6c616220-726f-4f74-8000-657874340001"
ROOT_SIZE = 1 << 30

Root = Literal["luks", "plain"]
Builder = Literal["initramfs-tools", "dracut"]
"""What makes the initramfs."""
Runs = Literal["uml", "qemu"]
"""What runs it: User-Mode Linux wherever that can be believed (uml/machine.py says where not)."""
DISK_RULES = """\
KERNEL=="ubd*", ENV{DEVTYPE}=="disk", ATTR{serial}=="?*", ENV{ID_SERIAL}="$attr{serial}"
KERNEL=="sd*", ENV{DEVTYPE}=="disk", ENV{ID_SCSI_SERIAL}=="?*", SYMLINK+="disk/by-id/lab-$env{ID_SCSI_SERIAL}"
KERNEL=="ubd*", ENV{DEVTYPE}=="disk", ENV{ID_SERIAL}=="?*", SYMLINK+="disk/by-id/lab-$env{ID_SERIAL}"
"""
"""Of udev: a disk has the same name whatever runs the machine."""

# The modules cost 14 s of emulated boot and have no use here. Zeroing memory costs up to 90 s, after which systemd
# gives up: most of it in huge pages, by `rep stos`, which QEMU is slow at where code has been.
CONSOLE = (
    "console=ttyS0 quiet panic=-1 mitigations=off systemd.show_status=no "
    "transparent_hugepage=never init_on_alloc=0 clearcpuid=rep_good module_blacklist=ip_tables,x_tables,qemu_fw_cfg"
)
PATIENT = "systemd.default_device_timeout_sec=900 rd.retry=900"
"""Of an emulated machine whose initramfs has systemd: on a host with much to do it looks for disks after minutes."""
MASKED = """
    apt-daily.timer apt-daily-upgrade.timer dpkg-db-backup.timer fstrim.timer e2scrub_all.timer
    e2scrub_reap.service systemd-firstboot.service getty@tty1.service serial-getty@ttyS0.service
    modprobe@drm.service sys-kernel-debug.mount sys-kernel-tracing.mount
    modprobe@configfs.service modprobe@fuse.service modprobe@efi_pstore.service sys-kernel-config.mount
    sys-fs-fuse-connections.mount systemd-binfmt.service proc-sys-fs-binfmt_misc.automount systemd-pstore.service
    lvm2-monitor.service blk-availability.service systemd-udev-load-credentials.service systemd-hostnamed.socket
"""  # what takes time in a boot and nothing here needs

GENERATORS = "debug getty gpt-auto hibernate-resume integritysetup rc-local run ssh system-update sysv tpm2 veritysetup"
"""Of systemd, the same."""


class Image(NamedTuple):
    """A built image; everything in it is read-only to the tests (machines write to an overlay)."""

    directory: Path
    root: Root
    runs: Runs = "qemu"
    loader: Kind = ""
    """What boots it from its own disks; else kernel and initramfs are given to the machine."""
    builder: Builder = "initramfs-tools"

    @property
    def disk(self) -> Path:
        """The root disk, raw."""
        return self.directory / "root.raw"

    @property
    def kernel(self) -> Path:
        return self.directory / "vmlinuz"

    @property
    def initrd(self) -> Path:
        return self.directory / "initrd"

    @property
    def cmdline(self) -> str:
        device = "/dev/mapper/root" if self.root == "luks" else f"UUID={FS_UUID}"
        # an image of dracut for any host has no crypttab: the stock prompt comes by this
        crypttab = f" rd.luks.name={LUKS_UUID}=root" if self.builder == "dracut" and self.root == "luks" else ""
        if self.runs == "uml":
            return f"root={device} ro {uml.CMDLINE}{crypttab}"
        return f"root={device} ro {CONSOLE}{crypttab}" + (f" {PATIENT}" if self.builder == "dracut" else "")

    @property
    def plain(self) -> Path:
        """The root file system by itself, ext4; of a LUKS image."""
        return self.directory / "root.ext4"

    def initramfs(self, files: Mapping[str, str], changes: Sequence[tuple[str, str, str]] = ()) -> Path:
        """Another initramfs: `files` are put into /etc/initramfs-tools (scripts/init-top/x, hooks/y).

        `changes`: (file in the tree, old text, new text), to see what happens without a piece of code.
        guest.EARLY gives it a test agent. Cached beside the image.
        """
        name = cache.key(*(part for item in [*sorted(files.items()), *changes] for part in item))

        def make(work: Path) -> None:
            base, changed = self.directory / "tree", work / "changed"
            _write(changed, _settings(self.builder, files))
            for path, old, new in changes:
                file = changed / path
                if not file.exists():
                    file.parent.mkdir(parents=True, exist_ok=True)
                    shutil.copy2(base / path, file)
                before = file.read_text()
                assert before.count(old) == 1, f"{path} has not exactly one {old!r}"
                file.write_text(before.replace(old, new))
            _mkinitramfs_over(base, changed, work / "initrd", self.builder)
            shutil.rmtree(changed)

        return cache.entry(f"{self.directory.name}-{name}", make) / "initrd"


def build(
    root: Root = "luks",
    *,
    runs: Runs = "uml",
    product: bool = True,
    commands: Sequence[str] = (),
    boots: Kind = "",
    builder: Builder = "initramfs-tools",
    programs: str = "",
) -> Image:
    """The image of the checkout as it is now; with product=False of stock Debian.

    `commands` are run by sh in the tree before the initramfs is made. `boots`: what starts it from its own disks, by
    QEMU. `programs`: packages of Debian with what the host has beside it.
    """
    runs = "qemu" if boots else runs
    cache.ROOT.mkdir(parents=True, exist_ok=True)
    debs = packages() if product else None
    base = rootfs((LOADERS if boots else "") + programs, dracut=builder == "dracut")
    sources = [Path(module).read_bytes() for module in (__file__, guest.__file__, luks.__file__)]
    if boots:
        sources += [boots.encode(), Path(loader.__file__).read_bytes()]
    if runs == "uml":
        sources += [str(each).encode() for each in (kernel().directory, vtpm(), uml.FILES)]
        sources.append(Path(uml.__file__).read_bytes())
    if builder == "dracut":
        sources.append(Path(dracut.__file__).read_bytes())
    measured = covered.WANTED and runs == "uml" and product
    if measured:
        sources.append(Path(covered.__file__).read_bytes())
    name = cache.key(root, runs, base.parent.name, debs.directory.name if debs else "", *commands, *sources)
    cache.prune("image-")

    def make(work: Path) -> None:
        tree = work / "tree"
        _copy(base, tree)
        if debs:
            install(tree, debs.core, debs.dracut if builder == "dracut" else debs.initramfs)
        cmdline = Image(work, root, runs, boots, builder).cmdline
        _configure(tree, root, runs, boots)
        if runs == "uml":
            uml.prepare(tree)
        if builder == "dracut":
            _write(tree, dracut.files({"scripts/init-top/lab-first": uml.FIRST} if runs == "uml" else {}))
        loader.prepare(boots, tree, cmdline, _chroot)
        if measured:
            covered.prepare(tree, _chroot)
        for command in commands:
            _chroot(tree, command)
        _kernel(tree).rename(work / "vmlinuz")
        _mkinitramfs(tree, work / "initrd", builder)
        loader.disks(boots, tree, work, cmdline, FS_UUID, _chroot)
        _disk(tree, root, work / "root.raw")

    return Image(cache.entry(f"image-{name}", make), root, runs, boots, builder)


def install(tree: Path, *debs: Path) -> None:
    """Installs packages whose dependencies are there. No initramfs is made: the image's is made last."""
    settings = tree / "etc/initramfs-tools/update-initramfs.conf"
    before = settings.read_text() if settings.exists() else None
    if before is not None:
        settings.write_text("update_initramfs=no\n")
    for deb in debs:
        _copy(deb, tree / deb.name)
    # dracut's trigger heeds INITRD; one that stays pending makes the guest's next installation twice as long
    environment = "INITRD=No DEBIAN_FRONTEND=noninteractive"
    _chroot(tree, f"{environment} dpkg -i {' '.join(f'/{deb.name}' for deb in debs)}")
    for deb in debs:
        (tree / deb.name).unlink()
    if before is not None:
        settings.write_text(before)


def _copy(source: Path, target: Path) -> None:
    subprocess.run(["cp", "-a", "--reflink=auto", source, target], check=True)


def _write(tree: Path, files: Mapping[str, str]) -> None:
    for name, text in files.items():
        path = tree / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
        path.chmod(0o755 if text.startswith("#!") else 0o644)


def _configure(tree: Path, root: Root, runs: Runs, boots: Kind) -> None:
    device = "/dev/mapper/root" if root == "luks" else f"UUID={FS_UUID}"
    files = {
        "etc/fstab": f"{device} / ext4 defaults 0 0\n{loader.FSTAB[boots]}",
        "etc/hostname": "lab\n",
        "etc/systemd/journald.conf.d/lab.conf": "[Journal]\nStorage=volatile\n",
        "usr/lib/lab/agent": guest.AGENT,
        "usr/lib/systemd/system/lab-agent.service": guest.UNIT,
        "usr/lib/udev/rules.d/61-lab.rules": DISK_RULES,
        **(uml.FILES if runs == "uml" else {}),
    }
    if boots:  # it makes initramfs images itself, emulated
        files["etc/initramfs-tools/conf.d/lab"] = "COMPRESS=zstd\nCOMPRESSLEVEL=1\n"
        files["etc/dracut.conf.d/fast.conf"] = 'compress="zstd -1"\n'
    if root == "luks":
        files["etc/crypttab"] = f"root UUID={LUKS_UUID} none luks,initramfs\n"
    _write(tree, files)
    (tree / "etc/systemd/system-generators").mkdir(exist_ok=True)
    for each in GENERATORS.split():
        (tree / f"etc/systemd/system-generators/systemd-{each}-generator").symlink_to("/dev/null")
    _chroot(tree, f"systemctl --quiet enable lab-agent.service && systemctl --quiet mask {' '.join(MASKED.split())}")
    _chroot(tree, "systemd-machine-id-setup && /usr/lib/systemd/systemd-update-done")  # no work of a first boot


_ENTER = 'mount -t proc proc "$1/proc" && mount --rbind /dev "$1/dev" && chroot "$1" sh -ec "$2"'


def _chroot(tree: Path, command: str) -> None:
    """Run sh in the tree, with /proc and /dev, in a mount namespace that ends with it."""
    _in_namespace(_ENTER, tree, command)


def _in_namespace(script: str, tree: Path, command: str, *more: Path) -> None:
    environment = {"PATH": "/usr/sbin:/usr/bin:/sbin:/bin", "LC_ALL": "C", "HOME": "/root"}
    unshare = ["unshare", "--mount", "--propagation", "private", "sh", "-ec", script, "sh"]
    done = subprocess.run([*unshare, tree, command, *more], env=environment, capture_output=True, text=True)
    if done.returncode != 0:  # else it only has warnings: no device-mapper here, no console-setup there
        raise RuntimeError(f"{command}: exit code {done.returncode}\n{done.stdout}{done.stderr}")


def _kernel(tree: Path) -> Path:
    (kernel,) = tree.glob("boot/vmlinuz-*")
    return kernel


def _settings(builder: Builder, files: Mapping[str, str]) -> dict[str, str]:
    """Where a tree has what `Image.initramfs` is given."""
    if builder == "dracut":
        return dracut.files(files)
    return {f"etc/initramfs-tools/{path}": text for path, text in files.items()}


def _mkinitramfs(tree: Path, to: Path, builder: Builder) -> None:
    _chroot(tree, _builds(builder, tree))
    (initrd,) = (tree / "boot").glob("initrd.img-*")
    _copy(initrd, to)


def _builds(builder: Builder, tree: Path) -> str:
    """What makes the tree's initramfs, for sh in it."""
    (modules,) = (tree / "usr/lib/modules").iterdir()
    image = f"/boot/initrd.img-{modules.name}"
    return dracut.command(image, modules.name) if builder == "dracut" else f"mkinitramfs -o {image} {modules.name}"


_OVERLAY = f"""
mount -t tmpfs none "$4" && mkdir "$4/new" "$4/work" "$4/tree"
mount -t overlay none -o "lowerdir=$3:$1,upperdir=$4/new,workdir=$4/work" "$4/tree"
set -- "$4/tree" "$2" "$5"
{_ENTER}
cp "$1"/boot/initrd.img-* "$3"
"""


def _mkinitramfs_over(tree: Path, changed: Path, to: Path, builder: Builder) -> None:
    """Of the tree with the files of `changed` over it, neither of which is written."""
    memory = to.with_name("memory")
    memory.mkdir()
    _in_namespace(_OVERLAY, tree, _builds(builder, tree), changed, memory, to)
    memory.rmdir()


def _disk(tree: Path, root: Root, to: Path) -> None:
    plain = to.with_name("root.ext4") if root == "luks" else to
    with plain.open("wb") as file:
        file.truncate(ROOT_SIZE)
    options = ["-q", "-F", "-b", "4096", "-U", FS_UUID, "-E", "lazy_itable_init=0"]
    subprocess.run(["mkfs.ext4", *options, "-d", tree, plain], check=True)
    if root == "luks":
        luks.format_disk(to, PASSPHRASE, size=luks.DATA_OFFSET + ROOT_SIZE, uuid=LUKS_UUID)
        luks.fill(to, PASSPHRASE, plain)
