# SPDX-License-Identifier: Apache-2.0
"""Protects a process that will hold keys: not dumpable, no core file, memory locked."""

import ctypes
import resource

from .light import signal

_PR_SET_PDEATHSIG, _PR_SET_DUMPABLE = 1, 4
_MCL_CURRENT, _MCL_FUTURE, _MCL_ONFAULT = 1, 2, 4

_libc = ctypes.CDLL(None, use_errno=True)


def protect() -> None:
    """To be called before the first key is in memory. Best effort: the kernel may refuse."""
    _libc.prctl(_PR_SET_DUMPABLE, 0, 0, 0, 0)
    resource.setrlimit(resource.RLIMIT_CORE, (0, resource.getrlimit(resource.RLIMIT_CORE)[1]))
    _libc.mlockall(_MCL_CURRENT | _MCL_FUTURE | _MCL_ONFAULT)


def never_kill_for_memory() -> None:
    """Makes the kernel take another process when memory is short: this one must not end between two steps."""
    try:
        with open("/proc/self/oom_score_adj", "w", encoding="ascii") as file:
            file.write("-1000")
    except OSError:
        pass


def kill_first_for_memory() -> None:
    """Makes the kernel take this process, and those that it starts, before any other when memory is short."""
    with open("/proc/self/oom_score_adj", "w", encoding="ascii") as file:
        file.write("1000")


def end_with_parent() -> None:
    """Makes the kernel kill this process when its parent ends, for whatever reason."""
    _libc.prctl(_PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)


def hold_in_memory() -> None:
    """Reads every page of this process into memory, and keeps it there: a step of a re-encryption suspends a part of
    the disk, on which the program itself may lie. Best effort."""
    _libc.mlockall(_MCL_CURRENT | _MCL_FUTURE)
