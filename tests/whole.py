# SPDX-License-Identifier: Apache-2.0
"""`make test`: its parts one after the other, how long each took, and what of `unlock` they ran.

A machine that measures leaves its data files in the directory that UNLOCK_COVERAGE names: they are counted in.

    python -m tests.whole         what each commit must pass: some of the dear tests, by turns
    python -m tests.whole fast    the same without a machine
    python -m tests.whole all     without turns, but those of the long tests
"""

import json
import os
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

WANTED = 90
"""Percent of the lines and branches of a module: those with less are told."""

NO_MACHINE = ("-n4", "--alone", "--dist=loadfile", "--no-loadscope-reorder", "-m", "not vm and not root and not long")
ROOT = ("-n2", "--dist=load", "-m", "root and not long")
MACHINES = ("-n3", "--dist=load", "--long=8", "-m", "vm or root or long")
"""Two machines run at a time; who types slowly at one, or clones the next, needs no core."""

ROOM = 4 << 30
"""Bytes of memory that must be free for the files of tests without a machine; they need some hundred megabytes."""


def no_machine(*options: str) -> bool:
    """With the files of each worker in memory, see alone.py."""
    free = int(re.findall(r"MemAvailable: *([0-9]+) kB", Path("/proc/meminfo").read_text())[0]) << 10
    if free < ROOM:
        return pytest(*NO_MACHINE, *options)
    with tempfile.TemporaryDirectory(prefix="unlock-test-") as folder:
        os.environ["UNLOCK_TEST_MEMORY"] = folder
        try:
            return pytest(*NO_MACHINE, *options, f"--basetemp={folder}/files")
        finally:
            del os.environ["UNLOCK_TEST_MEMORY"]


def pytest(*options: str) -> bool:
    return run(sys.executable, "-m", "coverage", "run", "-m", "pytest", "--durations=10", *options)


def run(*command: str) -> bool:
    return subprocess.run(command, check=False).returncode == 0


def quietly(*command: str) -> bool:
    """A process that was killed while it wrote its data left half a file, which coverage tells at length."""
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        print(done.stdout, done.stderr)
    return done.returncode == 0


def coverage() -> bool:
    """One table of the modules with less than WANTED."""
    data = os.environ["UNLOCK_COVERAGE"]
    with tempfile.NamedTemporaryFile("r") as file:
        if not quietly(sys.executable, "-m", "coverage", "combine", "-q", data) or not run(
            sys.executable, "-m", "coverage", "json", "-q", "-o", file.name
        ):
            return False
        found = json.load(file)
    for name, module in sorted(found["files"].items()):
        if (percent := module["summary"]["percent_covered"]) < WANTED:
            lines = module["summary"]["missing_lines"]
            print(f"{percent:5.1f} %  {name}, {lines} lines were not run")
    print(f"{found['totals']['percent_covered']:5.1f} %  of all lines and branches of unlock")
    return True


def main() -> int:
    fast = sys.argv[1:] == ["fast"]
    turns = () if sys.argv[1:] == ["all"] else ("--turns=3",)
    parts: dict[str, Callable[[], bool]] = {
        "lint": lambda: run("make", "--no-print-directory", "lint"),
        "no machine": lambda: no_machine(*turns),
        "root" if fast else "machines": lambda: pytest(*(ROOT if fast else MACHINES), *turns),
        "coverage": coverage,
    }
    told = []
    ok = True
    with tempfile.TemporaryDirectory() as folder:
        os.environ["UNLOCK_COVERAGE"] = folder
        os.environ["PYTHONPYCACHEPREFIX"] = str(Path(os.environ["UNLOCK_CACHE"], "compiled"))
        os.environ.pop("PYTHONDONTWRITEBYTECODE", None)
        os.environ["COVERAGE_FILE"] = str(Path(folder, "coverage"))
        for name, part in parts.items():
            begun = time.monotonic()
            ok = part()
            minutes, seconds = divmod(round(time.monotonic() - begun), 60)
            told.append(f"{minutes:3}:{seconds:02}  {name}{'' if ok else ': failed'}")
            if not ok:
                break
    print("\n" + "\n".join(told))
    return not ok


if __name__ == "__main__":
    sys.exit(main())
