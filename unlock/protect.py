# SPDX-License-Identifier: Apache-2.0
"""A process that will hold keys: not dumpable, no core file, its memory locked."""

import ctypes
import resource

from .light import signal

_PR_SET_PDEATHSIG, _PR_SET_DUMPABLE = 1, 4
_MCL_CURRENT, _MCL_FUTURE, _MCL_ONFAULT = 1, 2, 4

_libc = ctypes.CDLL(None, use_errno=True)


def protect() -> None:
    """Before the first key is in memory. Best effort where the kernel refuses."""
    _libc.prctl(_PR_SET_DUMPABLE, 0, 0, 0, 0)
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    _libc.mlockall(_MCL_CURRENT | _MCL_FUTURE | _MCL_ONFAULT)


def end_with_parent() -> None:
    """In a worker: killed when the process that forked it ends, however that ends."""
    _libc.prctl(_PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)
