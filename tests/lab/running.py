# SPDX-License-Identifier: Apache-2.0
"""One boot of a machine, whatever runs it: QEMU (vm.VM) or User-Mode Linux (uml.machine.Uml)."""

import contextlib
import fcntl
import os
import socket
import subprocess
import tempfile
import threading
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple, Protocol, Self

from .console import Console
from .guest import Guest, GuestError
from .swtpm import Command, SoftwareTpm

GATEWAY, ADDRESS = "10.0.2.2", "10.0.2.15"
"""On a machine's network: this host's loopback, and the guest."""


class Disk(NamedTuple):
    """A disk of a machine. `path` is relative to the machine's directory; *.qcow2 is that, else raw.

    `cache`: how QEMU writes it, a key of vm.CACHE; not `unsafe` where a test cuts the power of QEMU.
    """

    path: Path | str
    serial: str
    cache: str = "unsafe"

    @property
    def device(self) -> str:
        """The disk in the guest."""
        return f"/dev/disk/by-id/lab-{self.serial}"


class Bootable(Protocol):
    """What a machine starts from: image.Image is one."""

    @property
    def disk(self) -> Path: ...
    @property
    def kernel(self) -> Path: ...
    @property
    def initrd(self) -> Path: ...
    @property
    def cmdline(self) -> str: ...


class Running:
    """One boot of the machine that lives in the directory `home`. Use it in `with`.

    What is in `home` stays from boot to boot: what was written to the root disk, the TPM states. Boot N leaves
    `console-N.log` and `tpm-N.log` there. After `limit` seconds the machine is killed, whatever happens.
    """

    patience: int
    """Seconds in which it boots, whatever else this host has to do."""
    console: Console
    guest: Guest
    """Commands in the booted system."""
    early: Guest
    """Commands in the initramfs, if it was made with guest.EARLY."""
    boot: int

    def __init__(self, home: Path, limit: float) -> None:
        self.home, self.limit = home, limit
        self._tpm: SoftwareTpm | None = None
        self._process: subprocess.Popen[bytes] | None = None
        self._timer: threading.Timer | None = None
        self._ports: list[socket.socket] = []
        self._turn: Turn | None = None

    def __enter__(self) -> Self:
        self._turn = turn()
        self.home.mkdir(parents=True, exist_ok=True)
        self.boot = 1 + sum(1 for _ in self.home.glob("console-*.log"))
        try:
            self._start()
        except BaseException:
            self._stop()
            raise
        return self

    def __exit__(self, *exception: object) -> None:
        if exception[0]:  # the machine's directory is gone when the test has failed
            self._print_journal()
        self._stop()
        if exception[0]:
            print(f"the machine ended with {self._process and self._process.returncode}; the end of its console:")
            print("\n".join(self.console.text.splitlines()[-60:]))

    # the life of the machine

    def wait(self, timeout: float = 120) -> None:
        """Wait until the guest has powered off, or reset: that ends it too, the next boot is another object.

        Raises TimeoutError.
        """
        assert self._process
        try:
            self._process.wait(timeout)
        except subprocess.TimeoutExpired:
            raise TimeoutError(f"still running after {timeout:.0f} s:\n{self.console.text[-2000:]}") from None
        self.console.join()

    def poweroff(self, timeout: float = 120) -> None:
        """Shut down through the agent, and wait."""
        self.guest.sh("systemctl poweroff --no-block")
        self.wait(timeout)

    def kill(self) -> None:
        """Cut the power."""
        assert self._process
        self._process.kill()
        self.wait(30)

    @contextlib.contextmanager
    def frozen(self) -> Iterator[None]:
        """Nothing runs in the guest meanwhile: what is in `home` can be copied as a power cut would leave it."""
        raise NotImplementedError
        yield

    # disks while it runs

    def plug(self, disk: Disk) -> None:
        """Hot-plug a disk."""
        raise NotImplementedError

    def unplug(self, disk: Disk) -> None:
        """Pull a disk out."""
        raise NotImplementedError

    def cut_network(self) -> None:
        """Pull the card's cable."""
        raise NotImplementedError

    # the TPM

    def tpm_commands(self, skip: int = 0) -> list[Command]:
        """What was sent to the TPM in this boot, without the first `skip`: the length so far is a mark."""
        return self._tpm.commands(skip) if self._tpm else []

    # starting and stopping

    def _start(self) -> None:
        raise NotImplementedError

    def _pair(self) -> tuple[socket.socket, socket.socket]:
        """Both ends of a line to the machine; ours is closed when it stops."""
        ours, theirs = socket.socketpair()
        self._ports.append(ours)
        return ours, theirs

    def _guard(self) -> None:
        """The machine, which has been started, is killed when its time is over."""
        assert self._process
        self._timer = threading.Timer(self.limit, self._process.kill)
        self._timer.daemon = True
        self._timer.start()

    def _stop(self) -> None:
        if self._timer:
            self._timer.cancel()
        if self._process:
            self._process.kill()
            self._process.wait()
            if hasattr(self, "console"):
                self.console.join()
        if self._tpm:
            self._tpm.stop()
        for port in self._ports:
            port.close()
        if self._turn:
            os.close(self._turn.lock)

    def _print_journal(self) -> None:
        with contextlib.suppress(GuestError):
            print(self.guest.sh("journalctl -b --no-pager -o short-monotonic -n 150", timeout=30).out)


class Turn(NamedTuple):
    """A machine's leave to run."""

    lock: int
    """A file descriptor that is closed when it ends."""
    core: int


def turn() -> Turn:
    """Waits until fewer machines run here than there are cores, and takes a core that none has.
    More of them, each in need of a core, would only take longer than the tests wait."""
    cores: Sequence[int] = sorted(os.sched_getaffinity(0))
    while True:
        for core in cores:
            path = Path(tempfile.gettempdir(), f"unlock-lab-core-{core}.lock")
            lock = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                return Turn(lock, core)
            except BlockingIOError:
                os.close(lock)
        time.sleep(0.1)
