# SPDX-License-Identifier: Apache-2.0
"""system/dump as the kernel runs it, with its paths below a directory; a core that gdb makes of a crash."""

import os
import signal
import subprocess
import time
from pathlib import Path

from unlock.paths import Paths

TOP = Path(__file__).parents[1]
MOVED = (
    "/var/lib/unlock",
    "/dev/kmsg",
    "/run/unlock",
    "/usr/lib/systemd",
    "/sys/fs/cgroup",
    "/run/systemd",
)
CRASHES = """
#include <unistd.h>
char secret[64];
volatile int *volatile nowhere;
__attribute__((noinline)) void inner(int x) { if (x == 7) *nowhere = 1; }
__attribute__((noinline)) void outer(int x) { inner(x + 1); __asm__ volatile(""); }
int main(void) { if (read(0, secret, sizeof secret) < 1) return 1; outer(6); return 0; }
"""
"""Reads a secret, then crashes in inner, called by outer, called by main."""


class Writer:
    """Runs system/dump for a process that lives."""

    def __init__(self, top: Path) -> None:
        self.top = top
        self.paths = Paths(str(top))
        self.log = top / "dev/kmsg"
        for name in ("dev", "run/unlock", "var/lib/unlock"):
            (top / name).mkdir(parents=True, exist_ok=True)
        self.log.touch()
        text = (TOP / "system/dump").read_text()
        for name in MOVED:
            assert name in text
            text = text.replace(name, f"{top}{name}").replace(f"{top}{top}", f"{top}")
        text = text.replace(f">{top}/dev/kmsg", f">>{top}/dev/kmsg")
        assert "/proc/$pid/cgroup" in text
        text = text.replace("/proc/$pid/cgroup", f"{top}/proc/$pid/cgroup")
        self.script = top / "dump"
        self.script.write_text(text)
        self.script.chmod(0o755)

    def settings(self, **values: int) -> None:
        text = "".join(f"{name}={value}\n" for name, value in values.items())
        (self.top / "run/unlock/dump-limits").write_text(text)

    def group(self, pid: int, path: str) -> None:
        """The control group of a process; without it, its user ID tells whose it is."""
        file = self.top / f"proc/{pid}/cgroup"
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(f"0::{path}\n")

    def start(
        self, pid: int, stdin: int, prefix: tuple[str, ...] = (), path: str = "", uid: int = 1000
    ) -> "subprocess.Popen[bytes]":
        arguments = (pid, uid, 1000, 11, int(time.time()), 0, "host", 1, "")
        environment = {"PATH": path or os.environ["PATH"]}
        command = [*prefix, str(self.script), *map(str, arguments)]
        return subprocess.Popen(command, stdin=stdin, env=environment, cwd="/", start_new_session=True)

    def write(self, core: Path, pid: int, prefix: tuple[str, ...] = (), path: str = "", uid: int = 1000) -> int:
        with core.open("rb") as source:
            return self.start(pid, source.fileno(), prefix, path, uid).wait(60)

    def files(self) -> list[Path]:
        """All that is in the folder of dumps, those that are being written too."""
        return sorted(Path(self.paths.dumps).iterdir()) if os.path.isdir(self.paths.dumps) else []

    def said(self) -> list[str]:
        return self.log.read_text().splitlines()


class Crashing:
    """`core` is what gdb makes of the crash of CRASHES; `process` is one that lives, to write it for."""

    def __init__(self, folder: Path, secret: bytes) -> None:
        source, self.program = folder / "crashes.c", folder / "crashes"
        source.write_text(CRASHES)
        subprocess.run(["gcc", "-g", "-O1", "-o", self.program, source], check=True)
        commands = folder / "commands"
        self.core = folder / "core"
        (folder / "secret").write_bytes(secret)
        commands.write_text(f"run < {folder / 'secret'}\ngenerate-core-file {self.core}\nkill\n")
        subprocess.run(["gdb", "-q", "-nx", "-batch", "-x", commands, self.program], check=True, capture_output=True)
        self.process = subprocess.Popen(["sleep", "1000"])

    def __enter__(self) -> "Crashing":
        return self

    def __exit__(self, *_: object) -> None:
        self.process.send_signal(signal.SIGKILL)
        self.process.wait()
