# SPDX-License-Identifier: Apache-2.0
"""Commands in a running guest, over a virtio-serial port.

The agent is POSIX sh, so that the same one serves the real root and an initramfs. A request is the line
`NUMBER SECONDS SCRIPT-SIZE INPUT-SIZE` and then both, in bytes; the answer is the line
`NUMBER CODE STDOUT-SIZE STDERR-SIZE` and then both. The port is 8 bit clean: nothing is quoted or encoded.
"""

import socket
import time
from typing import NamedTuple

AGENT = r"""#!/bin/sh
# Runs what the host sends to the virtio port named $1.
for entry in /sys/class/virtio-ports/*; do
    [ "$(cat "$entry/name")" = "$1" ] && port=/dev/${entry##*/}
done
exec 3<>"$port" || exit 1
work=/run/$1
mkdir -p -m 700 "$work"
cd /
while read -r number seconds script input <&3; do
    head -c "$script" <&3 >"$work/script"
    head -c "$input" <&3 >"$work/in"
    timeout "$seconds" sh "$work/script" <"$work/in" >"$work/out" 2>"$work/err" 3>&-
    echo "$number $? $(wc -c <"$work/out") $(wc -c <"$work/err")" >&3
    cat "$work/out" "$work/err" >&3
    rm -f "$work"/*
done
"""

# Started early and kept whatever fails, so that a test can look at a boot that went wrong.
UNIT = """[Unit]
Description=Test agent
DefaultDependencies=no
IgnoreOnIsolate=yes

[Service]
ExecStart=/usr/lib/lab/agent lab
Environment=HOME=/root
KeyringMode=shared
KillMode=process

[Install]
WantedBy=sysinit.target emergency.target rescue.target
"""

# The same in an initramfs (see image.Image.initramfs); it ends before the real root starts.
EARLY_START = """#!/bin/sh
[ "$1" = prereqs ] && { echo udev; exit; }
/usr/lib/lab/agent lab.early </dev/null >/dev/null 2>&1 &
echo $! >/run/lab.early.pid
"""
EARLY_STOP = """#!/bin/sh
[ "$1" = prereqs ] && exit
kill "$(cat /run/lab.early.pid)"
"""
EARLY_HOOK = """#!/bin/sh
[ "$1" = prereqs ] && exit
. /usr/share/initramfs-tools/hook-functions
copy_exec /usr/lib/lab/agent
"""
# For Image.initramfs(): commands run in the initramfs too, through `vm.early`.
EARLY = {
    "hooks/lab": EARLY_HOOK,
    "scripts/init-top/lab": EARLY_START,
    "scripts/init-bottom/lab": EARLY_STOP,
}


class GuestError(Exception):
    """The guest gave no answer, or a command failed that had to succeed."""


class NoAnswer(GuestError):
    """Not in time."""


class Done(NamedTuple):
    """A command that ended: its exit code (124: it ran out of time) and what it wrote."""

    code: int
    stdout: bytes
    stderr: bytes

    @property
    def out(self) -> str:
        """Standard output as text, without the last newline."""
        return self.stdout.decode(errors="replace").rstrip("\n")

    @property
    def err(self) -> str:
        """Standard error as text, without the last newline."""
        return self.stderr.decode(errors="replace").rstrip("\n")


class Guest:
    """The host's end of one agent port."""

    def __init__(self, port: socket.socket) -> None:
        self._port = port
        self._buffer = bytearray()
        self._number = 0

    def ready(self, timeout: float = 180) -> None:
        """Wait until the agent answers. Raises GuestError after `timeout` seconds, or when the VM is gone.

        Asks again and again: what was sent before a kexec'ed kernel has its agent is lost.
        """
        end = time.monotonic() + timeout
        while True:
            try:
                self._call(b"true", b"", 30, max(1.0, min(60.0, end - time.monotonic())))
                return
            except NoAnswer:
                if time.monotonic() > end:
                    raise

    def booted(self, timeout: int = 240) -> str:
        """Wait until systemd has done all of its start; its verdict, `running` or `degraded`.

        The agent answers long before that, even before udev runs.
        """
        self.ready(timeout)
        return self.sh("systemctl is-system-running --wait", timeout=timeout, check=False).out

    def sh(self, script: str, *, stdin: bytes = b"", timeout: int = 60, check: bool = True) -> Done:
        """Run a shell script as root; `timeout` in seconds, in the guest.

        Raises GuestError if no answer comes, or with `check` if it exits with another code than 0.
        """
        done = self._call(script.encode(), stdin, timeout, timeout + 30)
        if check and done.code != 0:
            raise GuestError(f"exit code {done.code}: {script}\n{done.out}\n{done.err}")
        return done

    def read(self, path: str) -> bytes:
        """The content of a file."""
        return self.sh(f"cat '{path}'").stdout

    def write(self, path: str, data: bytes, mode: int = 0o644) -> None:
        """Make a file, and the directory that it is in."""
        self.sh(f"mkdir -p \"$(dirname '{path}')\" && cat >'{path}' && chmod {mode:o} '{path}'", stdin=data)

    def appears(self, path: str, timeout: int = 60) -> None:
        """Wait until a file is there: a disk that was just plugged in, a report. Raises GuestError."""
        self.sh(f"while [ ! -e '{path}' ]; do sleep 0.1; done", timeout=timeout)

    def _call(self, script: bytes, stdin: bytes, seconds: int, timeout: float) -> Done:
        self._number += 1
        until = time.monotonic() + timeout
        self._port.settimeout(timeout)
        try:
            self._port.sendall(b"%d %d %d %d\n" % (self._number, seconds, len(script), len(stdin)))
            self._port.sendall(script + stdin)
            while True:
                number, code, out, err = map(int, self._line(until).split())
                done = Done(code, self._take(out, until), self._take(err, until))
                if number == self._number:  # else the late answer to a call that was given up
                    return done
        except TimeoutError:
            raise NoAnswer(f"no answer in {timeout:.0f} s to: {script.decode()}") from None
        except OSError as problem:
            raise GuestError(f"the VM is gone: {problem}") from None

    def _line(self, until: float) -> bytes:
        while b"\n" not in self._buffer:
            self._receive(until)
        return self._take(self._buffer.index(b"\n") + 1, until)

    def _take(self, size: int, until: float) -> bytes:
        while len(self._buffer) < size:
            self._receive(until)
        taken = bytes(self._buffer[:size])
        del self._buffer[:size]
        return taken

    def _receive(self, until: float) -> None:
        left = until - time.monotonic()
        if left <= 0:
            raise TimeoutError
        self._port.settimeout(left)
        data = self._port.recv(1 << 16)
        if not data:
            raise GuestError("the VM is gone")
        self._buffer += data
