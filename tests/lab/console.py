# SPDX-License-Identifier: Apache-2.0
"""The serial console of a VM: logged with times, searched, typed into."""

import re
import socket
import threading
import time
from pathlib import Path


class ConsoleError(Exception):
    """What was expected did not appear."""


class Console:
    """Reads in a thread of its own, so that the guest never waits for the test."""

    def __init__(self, port: socket.socket, log: Path) -> None:
        self._port = port
        self._start = time.monotonic()
        self._text = ""
        self._seen = 0
        self._closed = False
        self._changed = threading.Condition()
        self._thread = threading.Thread(target=self._read, args=(log,), daemon=True)
        self._thread.start()

    @property
    def text(self) -> str:
        """All that the guest has written so far."""
        with self._changed:
            return self._text

    def expect(self, pattern: str, timeout: float = 60) -> re.Match[str]:
        """Wait for a regular expression after the last match (multi-line mode); `timeout` in seconds.

        Raises ConsoleError, with the last lines, if it does not come or the VM ends.
        """
        wanted = re.compile(pattern, re.MULTILINE)
        until = time.monotonic() + timeout
        with self._changed:
            while True:
                match = wanted.search(self._text, self._seen)
                if match:
                    self._seen = match.end()
                    return match
                left = until - time.monotonic()
                if self._closed or left <= 0:
                    why = "the VM ended" if self._closed else f"not in {timeout:.0f} s"
                    raise ConsoleError(f"{why}: {pattern!r}; the console ends with:\n{self._text[-2000:]}")
                self._changed.wait(left)

    def send(self, text: str) -> None:
        """Type `text`; the caller adds the newline."""
        self._port.sendall(text.encode())

    def join(self) -> None:
        """Wait until everything is read, after the VM ended."""
        self._thread.join(10)

    def _read(self, log: Path) -> None:
        with log.open("w") as out:
            at_start = True
            while data := self._receive():
                text = data.decode(errors="replace").replace("\r", "")
                stamp = f"[{time.monotonic() - self._start:8.3f}] "
                for line in text.splitlines(keepends=True):
                    out.write(stamp * at_start + line)
                    at_start = line.endswith("\n")
                out.flush()
                with self._changed:
                    self._text += text
                    self._changed.notify_all()
        with self._changed:
            self._closed = True
            self._changed.notify_all()

    def _receive(self) -> bytes:
        try:
            return self._port.recv(1 << 16)
        except OSError:  # closed or reset: the VM was killed
            return b""
