# SPDX-License-Identifier: Apache-2.0
"""SIGKILL for a flow: in a forked child, at its Nth call or return of a function of ours, or at a system call."""

import os
import re
import signal
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from types import FrameType

PACKAGE = str(Path(__file__).parents[1] / "unlock")


EVERY = int(os.environ.get("UNLOCK_KILL_EVERY", "5"))
"""Which of the steps below are tried: each fifth; 1 for a soak."""
LASTING = frozenset(("save", "put", "forget", "write_backup", "set_token", "remove_token"))
TPM_WRITES = frozenset(("_create", "_keep", "_define", "_undefine", "write_record"))
"""What changes something that outlives the process, in a state, keyring, header or TPM."""


def killed_at(number: int, work: Callable[[], object], steps: frozenset[str] = frozenset()) -> bool:
    """Runs `work` in a child that kills itself at that event; False when it had ended before. `steps` are the names of
    the functions that count; all of ours when it is empty."""
    return child(lambda: _count_down(number, work, steps)) == -signal.SIGKILL


def killed_in(call: str, number: int, work: Callable[[], object]) -> bool:
    """The same as it enters its Nth system call of that name, in the middle of a library too, whatever the load."""
    return _traced(["-e", f"trace={call}", "-e", f"inject={call}:signal=KILL:when={number}"], work) == -signal.SIGKILL


def calls_of(work: Callable[[], object]) -> dict[str, int]:
    """The system calls of a child that runs `work`, by name."""
    with tempfile.NamedTemporaryFile("r") as file:
        code = _traced(["-c", "-U", "calls,name", "-o", file.name], work)
        assert code == 0, f"the child ended with {code}"
        counts = re.findall(r"^ *(\d+) +([a-z]\w*)$", file.read(), re.MULTILINE)
    return {name: int(count) for count, name in counts if name != "total"}


def _traced(options: list[str], work: Callable[[], object]) -> int:
    """The exit code of a child whose main thread strace(1) watches from before it begins."""
    waits, go = os.pipe()

    def begin() -> None:
        os.close(go)
        os.read(waits, 1)
        work()

    pid = _fork(begin)
    os.close(waits)
    output = [] if "-o" in options else ["-o", "/dev/null"]
    with subprocess.Popen(["strace", "-qq", "-p", str(pid), *output, *options], stderr=subprocess.PIPE) as tracer:
        while "TracerPid:\t0\n" in Path(f"/proc/{pid}/status").read_text():
            assert tracer.poll() is None, tracer.communicate()[1].decode()
            time.sleep(0.001)
        os.write(go, b"!")
        os.close(go)
        return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


def _count_down(number: int, work: Callable[[], object], steps: frozenset[str]) -> None:
    left = number

    def event(frame: FrameType, kind: str, _: object) -> None:
        nonlocal left
        code = frame.f_code
        counts = code.co_filename.startswith(PACKAGE) and (not steps or code.co_name in steps)
        if kind in ("call", "return") and counts:
            left -= 1
            if left == 0:
                os.kill(os.getpid(), signal.SIGKILL)

    sys.setprofile(event)
    work()
    sys.setprofile(None)


def child(work: Callable[[], object]) -> int:
    """The exit code of a forked child that runs `work`: 0, 1 for an exception, or minus a signal."""
    return os.waitstatus_to_exitcode(os.waitpid(_fork(work), 0)[1])


def _fork(work: Callable[[], object]) -> int:
    pid = os.fork()
    if pid == 0:
        code = 1
        try:
            work()
            code = 0
        except BaseException:
            traceback.print_exc()
        finally:
            os._exit(code)
    return pid
