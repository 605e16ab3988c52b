# SPDX-License-Identifier: Apache-2.0
"""A process that will hold keys: not dumpable, no core file, its memory locked."""

import ctypes
import resource
import signal

_PR_SET_PDEATHSIG, _PR_SET_DUMPABLE = 1, 4
_MCL_CURRENT, _MCL_FUTURE, _MCL_ONFAULT = 1, 2, 4


def protect() -> None:
    """Before the first key is in memory. Best effort where the kernel refuses."""
    libc = ctypes.CDLL(None, use_errno=True)
    libc.prctl(_PR_SET_DUMPABLE, 0, 0, 0, 0)
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    libc.mlockall(_MCL_CURRENT | _MCL_FUTURE | _MCL_ONFAULT)


def end_with_parent() -> None:
    """In a worker: killed when the process that forked it ends, however that ends."""
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)
