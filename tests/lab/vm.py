# SPDX-License-Identifier: Apache-2.0
"""Virtual machines: QEMU without KVM, a software TPM, disks, a console and an agent; a network card if asked for."""

import contextlib
import json
import os
import shutil
import socket
import subprocess
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from .console import Console
from .guest import Guest
from .loader import DISKS, NO_VARIABLES, VARIABLES, Kind
from .process import start
from .qmp import Qmp
from .running import Bootable, Disk, Running
from .swtpm import SoftwareTpm

# A third less work than `-cpu max` when emulated: no AVX state to keep, but the AES instructions are there.
CPU = "qemu64,svm=off,+aes,+pclmulqdq,+ssse3,+sse4.1,+sse4.2,+popcnt,+rdrand,+rdseed"
ACCELERATORS = {"tcg": ("tcg,thread=multi", CPU), "kvm": ("kvm", "host")}
SECURE_CPU = "max,la57=off"  # the firmware with Secure Boot does not start on the one above
FIRMWARE = Path("/usr/share/OVMF/OVMF_CODE_4M.fd")
SECURE = Path("/usr/share/OVMF/OVMF_CODE_4M.secboot.fd")
MICROSOFT = Path("/usr/share/OVMF/OVMF_VARS_4M.ms.fd")
"""The keys of most computers: Debian's shim starts."""
CACHE = {  # what QEMU's -drive cache=MODE means: (O_DIRECT, ignore flushes, the guest sees a write cache)
    "unsafe": (False, True, True),
    "writeback": (False, False, True),
    "none": (True, False, True),
    "writethrough": (False, False, False),
}


class VM(Running):
    """One boot of a virtual machine.

    What stays in `home` from boot to boot: `root.qcow2` (over the image's disk, which never changes), the TPM states,
    the UEFI variables.
    `loader`: the machine boots by itself, from its disks esp.qcow2 and boot.qcow2 (loader.DISKS).
    `secure`: with Secure Boot and Microsoft's keys; a unified kernel image has Secure Boot with keys of its own.
    `tpm` names the TPM's state directory: another name is a replaced board, None is no TPM.
    `network`: a card; this host's loopback is at GATEWAY, the guest is ADDRESS.
    `accelerator`: a key of ACCELERATORS.
    `clock`: the guest's at the start, as YYYY-MM-DDTHH:MM:SS in UTC.
    """

    patience = 360

    def __init__(
        self,
        home: Path,
        image: Bootable,
        *,
        disks: Sequence[Disk] = (),
        tpm: str | None = "tpm",
        uefi: bool = False,
        secure: bool = False,
        loader: Kind = "",
        initrd: Path | None = None,
        cmdline: str | None = None,
        append: str = "",
        cache: str = "unsafe",
        memory: str = "1G",
        cores: int = 1,
        limit: float = 1200,
        network: bool = False,
        clock: str = "utc",
        accelerator: str = "tcg",
        extra: Sequence[str] = (),
    ) -> None:
        super().__init__(home, limit)
        self._image = image
        self._initrd = initrd or image.initrd
        self._cmdline = f"{cmdline or image.cmdline} {append}".strip()
        self._loader = loader
        self._loaders = [Disk(f"{name}.qcow2", name, cache) for name in DISKS[loader]]
        self._disks = [*self._loaders, Disk("root.qcow2", "root", cache), *disks]
        self._tpm_name = tpm
        self._uefi = uefi
        self._secure = secure
        self._memory = memory
        self._cores = cores
        self._extra = extra
        self._network = network
        self._clock = clock
        self._accelerator = accelerator

    def powerdown(self, timeout: float = 120) -> None:
        """Press the power button, and wait."""
        self.qmp.do("system_powerdown")
        self.wait(timeout)

    @contextlib.contextmanager
    def frozen(self) -> Iterator[None]:
        """See Running."""
        self.qmp.do("stop")
        yield
        self.qmp.do("cont")

    # disks while it runs

    def plug(self, disk: Disk) -> None:
        """Hot-plug a disk."""
        self.qmp.do("blockdev-add", **self._blockdev(disk))
        self.qmp.do("device_add", **self._scsi(disk))

    def unplug(self, disk: Disk) -> None:
        """Pull a disk out, used or not."""
        self.qmp.do("device_del", id=disk.serial)
        self.qmp.event("DEVICE_DELETED")
        self.qmp.do("blockdev-del", **{"node-name": f"disk-{disk.serial}"})

    def cut_network(self) -> None:
        """Pull the card's cable."""
        self.qmp.do("set_link", name="network", up=False)

    # starting and stopping

    def _start(self) -> None:
        secure = self._secure or self._loader == "uki"
        how, cpu = ACCELERATORS[self._accelerator]
        arguments = ["-accel", how, "-cpu", SECURE_CPU if secure else cpu]
        arguments += ["-machine", "q35", "-rtc", f"base={self._clock}"]
        arguments += ["-smp", str(self._cores), "-m", self._memory, "-nodefaults", "-display", "none", "-no-reboot"]
        arguments += ["-nic", "user,id=network,ipv6=off,model=virtio-net-pci" if self._network else "none"]
        if secure:
            arguments += ["-machine", "smm=on", "-global", "ICH9-LPC.disable_s3=1"]
            arguments += ["-global", "driver=cfi.pflash01,property=secure,value=on"]
        if not self._loader:
            arguments += ["-append", self._cmdline, "-kernel", str(self._image.kernel), "-initrd", str(self._initrd)]
        if self._uefi or self._loader:
            variables = self.home / "vars.fd"
            if not variables.exists():
                own = self._image.kernel.with_name("vars.fd")
                first = own if own.exists() else VARIABLES.get(self._loader, NO_VARIABLES)
                shutil.copyfile(MICROSOFT if self._secure else first, variables)
            firmware = SECURE if secure else FIRMWARE
            arguments += ["-drive", f"if=pflash,format=raw,readonly=on,file={firmware}"]
            arguments += ["-drive", f"if=pflash,format=raw,file={variables}"]
        ends: list[socket.socket] = []

        def port(name: str) -> socket.socket:
            ours, theirs = self._pair()
            chardev(name, theirs)
            return ours

        def chardev(name: str, theirs: socket.socket) -> None:
            arguments.extend(["-chardev", f"socket,id={name},fd={theirs.fileno()}"])
            ends.append(theirs)

        qmp = port("qmp")
        arguments += ["-mon", "chardev=qmp,mode=control"]
        console = port("console")
        arguments += ["-serial", "chardev:console"]
        arguments += ["-device", "virtio-serial-pci"]
        guest, early = port("lab"), port("early")
        arguments += ["-device", "virtserialport,chardev=lab,name=lab"]
        arguments += ["-device", "virtserialport,chardev=early,name=lab.early"]
        if self._tpm_name is not None:
            self._tpm = SoftwareTpm(self.home / self._tpm_name, self.home / f"tpm-{self.boot}.log")
            chardev("tpm", self._tpm.port)
            arguments += ["-tpmdev", "emulator,id=tpm,chardev=tpm", "-device", "tpm-crb,tpmdev=tpm"]
        arguments += ["-device", "virtio-scsi-pci,id=scsi"]
        for disk in [*self._loaders, Disk("root.qcow2", "root")]:
            if not (self.home / disk.path).exists():
                overlay(self._image.disk.with_name(f"{disk.serial}.raw"), self.home / disk.path)
        for disk in self._disks:
            arguments += ["-blockdev", json.dumps(self._blockdev(disk))]
            arguments += ["-device", json.dumps(self._scsi(disk))]
        log = self.home / f"qemu-{self.boot}.log"
        try:
            self._process = start(["qemu-system-x86_64", *arguments, *self._extra], ends, log)
        finally:
            for end in ends:
                end.close()
        self._guard()
        self.console = Console(console, self.home / f"console-{self.boot}.log")
        self.guest = Guest(guest)
        self.early = Guest(early)
        try:
            self.qmp = Qmp(qmp)
        except Exception as problem:
            raise RuntimeError(f"QEMU did not start: {log.read_text()}") from problem

    def _blockdev(self, disk: Disk) -> dict[str, Any]:
        direct, no_flush, _ = CACHE[disk.cache]
        cache = {"direct": direct, "no-flush": no_flush}
        path = self.home / disk.path
        node = {
            "driver": "qcow2" if path.suffix == ".qcow2" else "raw",
            "cache": cache,
            "file": {"driver": "file", "filename": str(path), "cache": cache},
        }
        return {"node-name": f"disk-{disk.serial}", **node}

    def _scsi(self, disk: Disk) -> dict[str, Any]:
        write_cache = CACHE[disk.cache][2]
        return {
            "driver": "scsi-hd",
            "id": disk.serial,
            "serial": disk.serial,
            "bus": "scsi.0",
            "drive": f"disk-{disk.serial}",
            "write-cache": "on" if write_cache else "off",
            **({"bootindex": DISKS[self._loader].index(disk.serial)} if disk in self._loaders else {}),
        }


def accelerator(kernel: Path) -> str:
    """`kvm` where it runs this kernel, which takes a moment to see; not every /dev/kvm does."""
    if not os.access("/dev/kvm", os.R_OK | os.W_OK):
        return "tcg"
    how, cpu = ACCELERATORS["kvm"]
    command = ["timeout", "10", "qemu-system-x86_64", "-accel", how, "-cpu", cpu, "-machine", "q35", "-m", "512"]
    command += ["-nodefaults", "-display", "none", "-no-reboot", "-serial", "stdio", "-kernel", os.fspath(kernel)]
    command += ["-append", "console=ttyS0 earlyprintk=ttyS0 panic=-1"]  # without a root file system it ends at once
    done = subprocess.run(command, stdin=subprocess.DEVNULL, capture_output=True)
    return "kvm" if b"Kernel panic" in done.stdout else "tcg"


def overlay(base: Path, path: Path) -> Path:
    """A qcow2 file that holds what is written over `base`, which stays as it is."""
    base_format = "qcow2" if base.suffix == ".qcow2" else "raw"
    command = ["qemu-img", "create", "-q", "-f", "qcow2", "-b", os.fspath(base.resolve()), "-F", base_format]
    subprocess.run([*command, os.fspath(path)], check=True)
    return path
