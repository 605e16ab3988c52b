# SPDX-License-Identifier: Apache-2.0
"""Commands in a guest over a serial line: as in guest.py, with scripts, input and output by way of hostfs.

The line carries numbers alone: it loses bytes when more than some 4 KiB come at once. A request is the line
`NUMBER SECONDS`, the answer `NUMBER CODE`; NAME.NUMBER.script, .in, .out and .err lie in the directory that both see.
"""

import os
import socket
import time
from pathlib import Path

from ..guest import Done, Guest, GuestError, NoAnswer

SHARED = "/run/lab.host"
"""The machine's directory `line`, in the guest, from the first script of the initramfs on."""
HELLO = b"lab-agent"
AGENT = f"""#!/bin/sh
# Runs what the host asks for on the serial line of $1.
case $1 in lab) port=/dev/ttyS1 ;; *) port=/dev/ttyS2 ;; esac
exec 3<>"$port" || exit 1
stty raw -echo <&3
work=/run/$1
mkdir -p -m 700 "$work"
cd /
echo {HELLO.decode()} >&3 # until now the line echoed: the host sends nothing before this
while read -r number seconds <&3; do
    at={SHARED}/$1.$number
    timeout "$seconds" sh "$at.script" <"$at.in" >"$work/out" 2>"$work/err" 3>&-
    code=$?
    cp "$work/out" "$at.out"
    cp "$work/err" "$at.err"
    echo "$number $code" >&3
    rm -f "$work"/*
done
"""


class LineGuest(Guest):
    """The host's end of a serial line; `shared` is what the guest sees as SHARED."""

    def __init__(self, port: socket.socket, shared: Path, name: str) -> None:
        super().__init__(port)
        self._shared, self._name = shared, name
        self._up = False

    def ready(self, timeout: float = 180) -> None:
        """Wait until the agent has come up. Raises GuestError after `timeout` seconds, or when the machine is gone."""
        until = time.monotonic() + timeout
        try:
            while not self._up:
                self._up = HELLO in self._line(until)
        except TimeoutError:
            raise NoAnswer(f"no agent in {timeout:.0f} s") from None
        except OSError as problem:
            raise GuestError(f"the machine is gone: {problem}") from None

    def _call(self, script: bytes, stdin: bytes, seconds: int, timeout: float) -> Done:
        until = time.monotonic() + timeout
        self.ready(timeout)
        self._number += 1
        parts = {each: self._shared / f"{self._name}.{self._number}.{each}" for each in ("script", "in", "out", "err")}
        for part, data in (("script", script), ("in", stdin), ("out", b""), ("err", b"")):
            with open(os.open(parts[part], os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "wb") as file:
                file.write(data)
        try:
            self._port.sendall(b"%d %d\n" % (self._number, seconds))
            while True:
                number, code = map(int, self._line(until).split())
                if number == self._number:  # else the late answer to a call that was given up
                    return Done(code, parts["out"].read_bytes(), parts["err"].read_bytes())
        except TimeoutError:
            raise NoAnswer(f"no answer in {timeout:.0f} s to: {script.decode()}") from None
        except OSError as problem:
            raise GuestError(f"the machine is gone: {problem}") from None
        finally:
            for path in parts.values():
                path.unlink()
