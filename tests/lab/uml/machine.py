# SPDX-License-Identifier: Apache-2.0
"""One boot of a machine by User-Mode Linux: a kernel that is a program, ten times as fast as an emulated machine.

What is real: the initramfs, udev, systemd, device-mapper, the file systems, /dev/tpmrm0 on a software TPM, each write
and flush of a disk. **What it cannot be believed for**: firmware, Secure Boot, GRUB, systemd-boot, unified kernel
images, kexec, Plymouth, the probing of TPM and disk drivers, ACPI, races of more than one CPU, a disk that is pulled
while it is used, and what a power cut loses on a real disk's own cache (log_writes tells that). The PCRs and the event
log are what this file says: they try a policy's logic, not a firmware's habits. Such stories need vm.VM.

A long read of a disk that lies over another file (root.cow) is wrong after a page of which one half was written and the
other was not, as the end of a keyslot: ubd's do_io goes on by the length of the last piece. Who reads several keyslots
at once needs a whole root disk.
"""

import contextlib
import os
import shutil
import socket
import string
import struct
import subprocess
import time
from collections.abc import Iterator, Sequence
from hashlib import sha256
from pathlib import Path

from tests import eventlogs

from .. import covered
from ..console import Console
from ..process import start
from ..running import Bootable, Disk, Running
from ..swtpm import Delays, LineTpm, SlowLine
from .kernel import kernel, ubdlog
from .line import LineGuest

ROOT = ("root.raw", "root.cow")
"""The root disk in a machine's directory: one that a test has put there, or what was written over the image's."""
UMID = "control"
"""The directory of the kernel's own console."""
NETWORK = """
ip link add bridge type bridge
ip tuntap add guest mode tap
until ip link set host master bridge 2>/dev/null; do sleep 0.05; done
ip link set guest master bridge
for each in bridge guest host; do ip link set "$each" up; done
exec "$@"
"""
"""In a network namespace of the machine's own; slirp4netns makes `host` there, behind which is this host's loopback."""
_MCONSOLE = struct.Struct("<III")
_MAGIC, _VERSION = 0xCAFEBABE, 2


class Uml(Running):
    """One boot by User-Mode Linux.

    What stays in `home` from boot to boot: one of ROOT, the disks, the TPM states. `tpm` names the TPM's state
    directory: another name is a replaced board, None is no TPM.
    `tpm_before`: the state directory of another TPM, which the kernel finds first.
    `uefi`: the PCRs and the event log are those of a UEFI that starts this kernel, initramfs and command line.
    `network`: a card; this host's loopback is at running.GATEWAY, the guest is running.ADDRESS.
    `clock`: the guest's at the start, as YYYY-MM-DDTHH:MM:SS in UTC.
    `tpm_delays`: what the TPM's commands take, see swtpm.Delays; `tpm_line` can change that while the machine runs.
    `tpm_fails_from`: from the first command of this name on the TPM is in failure mode.
    `root_later`: without the root disk, until `plug_root`.
    `log_writes`: each disk FILE's writes and flushes go to FILE.writes, in the order in which the guest made them; the
    root disk's only if it is a whole one, as ubd does not flush what lies over another file.
    """

    patience = 90
    tpm_line: SlowLine
    """With `tpm_delays` or `tpm_fails_from`."""

    def __init__(
        self,
        home: Path,
        image: Bootable,
        *,
        disks: Sequence[Disk] = (),
        tpm: str | None = "tpm",
        tpm_before: str = "",
        tpm_delays: Delays | None = None,
        tpm_fails_from: str = "",
        uefi: bool = False,
        initrd: Path | None = None,
        cmdline: str | None = None,
        append: str = "",
        memory: str = "640M",
        limit: float = 300,
        root_later: bool = False,
        log_writes: bool = False,
        network: bool = False,
        clock: str = "",
    ) -> None:
        super().__init__(home, limit)
        self._image = image
        self._initrd = initrd or image.initrd
        self._cmdline = f"{cmdline or image.cmdline} {append}".strip()
        self._disks = list(disks)
        self._tpm_name = tpm
        self._tpm_before = tpm_before
        self._other_tpm: LineTpm | None = None
        self._tpm_delays, self._tpm_fails_from = tpm_delays, tpm_fails_from
        self._uefi = uefi
        self._memory = memory
        self._root_later = root_later
        self._log_writes = log_writes
        self._network = network
        self._clock = clock
        self._letters: dict[str, str] = {}
        self._slirp: subprocess.Popen[bytes] | None = None

    @contextlib.contextmanager
    def frozen(self) -> Iterator[None]:
        """See Running."""
        self._ask("stop")
        yield
        self._ask("go")

    def plug(self, disk: Disk) -> None:
        """Hot-plug a disk."""
        self._ask(f"config {self._drive(disk)}")

    def plug_root(self) -> None:
        """The root disk, with `root_later`."""
        self._letters["root"] = next(each for each in string.ascii_lowercase if each not in self._letters.values())
        self._ask(f"config {self._root()}")

    def unplug(self, disk: Disk) -> None:
        """Pull a disk out that nothing has open."""
        self._ask(f"remove ubd{self._letters[disk.serial]}")
        del self._letters[disk.serial]

    def cut_network(self) -> None:
        """Pull the card's cable."""
        assert self._slirp
        self._slirp.kill()

    def _drive(self, disk: Disk) -> str:
        letter = next(each for each in string.ascii_lowercase if each not in self._letters.values())
        self._letters[disk.serial] = letter
        if self._log_writes:
            (self.home / f"{disk.path}.writes").touch()
        return f"ubd{letter}={disk.path},,{disk.serial}"

    def _root(self) -> str:
        whole, over = ROOT
        drive = f"ubd{self._letters['root']}"
        if not (self.home / whole).exists():
            return f"{drive}={over},{self._image.disk},root"
        if self._log_writes:
            (self.home / f"{whole}.writes").touch()
        return f"{drive}={whole},,root"

    def _start(self) -> None:
        shared = self.home / "line"
        shared.mkdir(exist_ok=True, mode=0o700)
        for each in shared.iterdir():
            each.unlink()
        covered.begin(shared)
        shutil.rmtree(self.home / UMID, ignore_errors=True)  # of a boot that was killed: it would seem to be in use
        if self._clock:
            (shared / "clock").write_text(self._clock)
        arguments = [
            f"mem={self._memory}",
            "uml_dir=./",
            f"umid={UMID}",
            "noreboot",
            f"hostfs={shared}",
            "con=null",
            "ssl=null",
        ]
        self._letters["root"] = "a"
        root = [self._root()]
        if self._root_later:  # without its first disk the kernel looks for a file of its own choice
            (self.home / "first.raw").write_bytes(bytes(1 << 20))
            root = ["ubda=first.raw,,first"]
        arguments += [f"initrd={self._initrd}", *root, *map(self._drive, self._disks)]
        ends: list[socket.socket] = []

        def line(name: str) -> socket.socket:
            ours, theirs = self._pair()
            ends.append(theirs)
            arguments.append(f"{name}=fd:{theirs.fileno()}")
            return ours

        console, guest, early = line("ssl0"), line("ssl1"), line("ssl2")
        if self._tpm_name is not None:
            measured = measured_boot(self._initrd, self._cmdline) if self._uefi else []
            (shared / "eventlog").write_bytes(eventlogs.log(measured) if measured else b"")
            tpm = LineTpm(self.home / self._tpm_name, self.home / f"tpm-{self.boot}.log")
            self._tpm = tpm
            for entry in measured:
                tpm.extend(entry.pcr, entry.sha256)
            port = tpm.port
            if self._tpm_delays is not None or self._tpm_fails_from:
                self.tpm_line = SlowLine(tpm.port, self._tpm_delays or {}, self._tpm_fails_from)
                port = self.tpm_line.port
            ends.append(port)
            arguments.append(f"ssl3=fd:{port.fileno()}")
        if self._tpm_before:
            (shared / "tpm-before").touch()
            self._other_tpm = LineTpm(self.home / self._tpm_before, self.home / f"tpm-before-{self.boot}.log")
            ends.append(self._other_tpm.port)
            arguments.append(f"ssl4=fd:{self._other_tpm.port.fileno()}")
        assert self._turn
        command = ["taskset", "--cpu-list", str(self._turn.core), "unshare", "--pid", "--fork", "--kill-child"]
        if self._network:
            arguments.append("vec0:transport=tap,ifname=guest,depth=64")
            command += ["--net", "sh", "-ec", NETWORK, "sh"]
        command += ["env", "GLIBC_TUNABLES=glibc.pthread.rseq=0"]
        if self._log_writes:
            command.append(f"LD_PRELOAD={ubdlog()}")
        command += [str(kernel().program), *arguments, *self._cmdline.split()]
        try:
            self._process = start(command, ends, self.home / f"uml-{self.boot}.log", self.home)
        finally:
            for end in ends:
                end.close()
        self._guard()
        if self._network:
            self._slirp = self._join_host()
        self.console = Console(console, self.home / f"console-{self.boot}.log")
        self.guest = LineGuest(guest, shared, "lab")
        self.early = LineGuest(early, shared, "lab.early")

    def _join_host(self) -> subprocess.Popen[bytes]:
        assert self._process
        ours, theirs = (Path(f"/proc/{each}/ns/net") for each in ("self", self._process.pid))
        while os.readlink(ours) == os.readlink(theirs):
            time.sleep(0.01)
        command = ["slirp4netns", "--netns-type=path", str(theirs), "host"]
        return start(command, [], self.home / f"slirp-{self.boot}.log")

    def _stop(self) -> None:
        super()._stop()
        if self._other_tpm:
            self._other_tpm.stop()
        covered.collect(self.home / "line")
        if self._slirp:
            self._slirp.kill()
            self._slirp.wait()

    def _ask(self, request: str) -> None:
        """The kernel's own console: https://docs.kernel.org/virt/uml/user_mode_linux_howto_v2.html#mconsole"""
        directory = os.open(self.home / UMID, os.O_PATH)
        try:  # a path of any length
            with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as port:
                port.bind("")
                port.settimeout(30)
                text = request.encode()
                message = _MCONSOLE.pack(_MAGIC, _VERSION, len(text)) + text.ljust(512, b"\0")
                port.sendto(message, f"/proc/self/fd/{directory}/mconsole")
                answer = port.recv(4096)
        finally:
            os.close(directory)
        failed, _, length = _MCONSOLE.unpack(answer[: _MCONSOLE.size])
        if failed:
            said = answer[_MCONSOLE.size :][:length].rstrip(b"\0").decode()
            raise RuntimeError(f"{request}: {said}")


def measured_boot(initrd: Path, cmdline: str) -> list[eventlogs.Entry]:
    """What UEFI, and the kernel's EFI stub, would have measured of a boot whose kernel came from no file system."""
    digest = sha256(initrd.read_bytes()).digest()

    def true(entry: eventlogs.Entry) -> eventlogs.Entry:
        if b"Linux initrd" in entry.data:
            return entry._replace(digest=digest)
        return eventlogs.program("", "kernel") if entry.pcr == 4 and entry.kind == 0x80000003 else entry

    return [true(each) for each in eventlogs.Boot(kind="direct", cmdline=cmdline).entries()]
