# SPDX-License-Identifier: Apache-2.0
"""QEMU's control protocol: https://www.qemu.org/docs/master/interop/qmp-spec.html"""

import json
import socket
from typing import Any


class QmpError(Exception):
    """QEMU refused a command, or is gone."""


class Qmp:
    """One control connection, commands one after another."""

    def __init__(self, port: socket.socket) -> None:
        port.settimeout(60)
        self._stream = port.makefile("rw")
        self._events: list[str] = []
        self._read()  # the greeting
        self.do("qmp_capabilities")

    def do(self, command: str, **arguments: Any) -> Any:
        """Run a command and return its result. Raises QmpError."""
        self._stream.write(json.dumps({"execute": command, "arguments": arguments}) + "\n")
        self._stream.flush()
        while True:
            answer = self._read()
            if "error" in answer:
                raise QmpError(f"{command}: {answer['error']['desc']}")
            if "return" in answer:
                return answer["return"]

    def event(self, name: str) -> None:
        """Wait for an event, or take one that came before and was not asked for."""
        while name not in self._events:
            self._read()
        self._events.remove(name)

    def _read(self) -> dict[str, Any]:
        try:
            line = self._stream.readline()
        except OSError as problem:
            raise QmpError(f"no answer: {problem}") from None
        if not line:
            raise QmpError("QEMU is gone")
        answer: dict[str, Any] = json.loads(line)
        if "event" in answer:
            self._events.append(answer["event"])
        return answer
