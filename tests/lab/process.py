# SPDX-License-Identifier: Apache-2.0
"""Child processes that never outlive the test run."""

import socket
import subprocess
from collections.abc import Sequence
from pathlib import Path


def start(
    command: Sequence[str], ports: Sequence[socket.socket], log: Path, directory: Path | None = None
) -> subprocess.Popen[bytes]:
    """Start a program that inherits the sockets `ports`, in `directory`; its output goes to `log`.

    The kernel kills it when this process (strictly: the thread that called) ends, however it ends.
    """
    with log.open("wb") as out:
        return subprocess.Popen(
            ["setpriv", "--pdeathsig", "KILL", *command],
            stdin=subprocess.DEVNULL,
            stdout=out,
            stderr=out,
            cwd=directory,
            pass_fds=[port.fileno() for port in ports],
        )
