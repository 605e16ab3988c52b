# SPDX-License-Identifier: Apache-2.0
"""`unlock boot scrub` in the initramfs: overwrites free memory, for a shell or a system that may not have the keys.

Whoever is root reads all memory in /proc/kcore, the freed pages of ended processes, pipes and caches included. What was
in them is overwritten as the kernel gives each page to a process that asks for more and more, filled with zeros, until
no page is free and it ends that process. There is one for each CPU, so that many gigabytes take seconds.
"""

import ctypes
import mmap
import os

from .. import log
from ..light import signal
from ..protect import end_with_parent

_PIECE = 32 << 20
"""Bytes that are asked for at a time: less when there is no more room for so much."""
PASSES = 3
"""The kernel keeps a few pages back, which are others each time."""
_MAP_POPULATE = 0x8000
_FAILED = ctypes.c_void_p(-1).value
_VM = "/proc/sys/vm"
_SETTINGS = {
    f"{_VM}/panic_on_oom": "0",
    f"{_VM}/oom_dump_tasks": "0",
    f"{_VM}/overcommit_memory": "1",
    f"{_VM}/lowmem_reserve_ratio": "0 0 0 0",  # else low memory is kept for devices
    f"{_VM}/min_free_kbytes": "0",  # else so much is never given out
    "/proc/sys/kernel/printk": "1 1 1 1",  # the kernel tells at length that it ends a process
}
"""For the time of it; see Documentation/admin-guide/sysctl/vm.rst of the kernel."""


def scrub() -> int:
    """Returns 0 when every process was ended for want of memory; 1, with words, when free memory may be left."""
    before = {path: old for path, new in _SETTINGS.items() if (old := _set(path, new))}
    _set(f"{_VM}/drop_caches", "3")
    ends = []
    try:
        for _ in range(PASSES):
            ends += [os.waitpid(pid, 0)[1] for pid in [_start(cpu) for cpu in sorted(os.sched_getaffinity(0))]]
    finally:
        for path, old in before.items():
            _set(path, old)
    if all(os.WIFSIGNALED(each) and os.WTERMSIG(each) == signal.SIGKILL for each in ends):
        return 0
    log.console("free memory could not be overwritten")
    return 1


def _start(cpu: int) -> int:
    pid = os.fork()
    if pid == 0:
        try:
            end_with_parent()
            os.sched_setaffinity(0, [cpu])  # pages that were freed are kept for their CPU
            _fill()
        finally:
            os._exit(1)
    return pid


def _fill() -> None:
    """Takes memory until the kernel ends this process. Returns only if the kernel would end another one first."""
    if not _set("/proc/self/oom_score_adj", "1000"):
        return
    libc = ctypes.CDLL(None)
    libc.mmap.restype = ctypes.c_void_p
    libc.mmap.argtypes = (ctypes.c_void_p, ctypes.c_size_t, *[ctypes.c_int] * 3, ctypes.c_long)
    flags = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | _MAP_POPULATE
    while libc.mmap(None, _PIECE, mmap.PROT_READ | mmap.PROT_WRITE, flags, -1, 0) != _FAILED:
        pass


def _set(path: str, text: str) -> str:
    """Writes a setting of the kernel; what it was, '' if it could not be written."""
    try:
        with open(path, "r+", encoding="ascii") as file:
            old = file.read().strip()
            file.seek(0)
            file.write(text)
            return old
    except OSError:
        return ""
