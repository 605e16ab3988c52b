# SPDX-License-Identifier: Apache-2.0
"""SIGKILL for a flow: in a forked child, at its Nth call or return of a function of ours, or after some time."""

import os
import signal
import sys
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


def killed_after(seconds: float, work: Callable[[], object]) -> bool:
    """The same by time, from outside: in the middle of anything."""
    pid = _fork(work)
    time.sleep(seconds)
    os.kill(pid, signal.SIGKILL)
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == -signal.SIGKILL


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
