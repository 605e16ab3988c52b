# SPDX-License-Identifier: Apache-2.0
"""`unlock boot scrub` in the initramfs: overwrites free memory, for a shell or a system that may not have the keys.

Whoever is root reads all memory in /proc/kcore, the freed pages of ended processes, pipes and caches included. What was
in them is overwritten as the kernel gives each page to a process that asks for more and more, filled with zeros, until
no page is free and it ends that process. There is one for each CPU, so that many gigabytes take seconds.

The kernel takes memory for programs from one list of free pages, for itself from others. Each CPU has put some pages of
each list by, and a program that wants memory gets none of the others': a short process between two that fill all takes
those, as it makes the kernel build page tables, buffers of sockets, and names of files.
"""

import ctypes
import mmap
import os
from _socket import socketpair

from .. import log
from ..light import Callable, signal
from ..protect import end_with_parent

_PIECE = 32 << 20
"""Bytes of memory that are asked for at a time."""
_SPAN = mmap.PAGESIZE**2 // 8
"""Bytes of addresses that one page of a page table is for."""
_TABLES, _MESSAGES, _FILES = 8192, 64, 4096
"""More than a CPU has put by of each kind of page when memory is short."""
_MAP_POPULATE = 0x8000
_MADV_NOHUGEPAGE = 15
_FAILED = ctypes.c_void_p(-1).value
_VM = "/proc/sys/vm"
_SETTINGS = {
    f"{_VM}/panic_on_oom": "0",
    f"{_VM}/oom_dump_tasks": "0",
    f"{_VM}/overcommit_memory": "1",
    f"{_VM}/lowmem_reserve_ratio": "0 0 0 0",  # else low memory is kept for devices
    f"{_VM}/min_free_kbytes": "0",  # else so much is never given out
    f"{_VM}/watermark_boost_factor": "0",  # nor this, when memory is short
    "/proc/sys/kernel/printk": "1 1 1 1",  # the kernel tells at length that it ends a process
}
"""For the time of it; see Documentation/admin-guide/sysctl/vm.rst of the kernel."""


def scrub() -> int:
    """Returns 0 when every process did its part; 1, with words, when free memory may be left."""
    before = {path: old for path, new in _SETTINGS.items() if (old := _set(path, new))}
    _set(f"{_VM}/drop_caches", "3")
    ends = []
    try:
        for fill in (_fill_programs, _fill_kernel, _fill_programs):
            started = [_start(cpu, fill) for cpu in sorted(os.sched_getaffinity(0))]
            ends += [os.waitpid(pid, 0)[1] for pid in started]
    finally:
        for path, old in before.items():
            _set(path, old)
    if all(each == 0 or (os.WIFSIGNALED(each) and os.WTERMSIG(each) == signal.SIGKILL) for each in ends):
        return 0
    log.console("free memory could not be overwritten")
    return 1


def _start(cpu: int, fill: Callable[[], bool]) -> int:
    """A process that fills memory. It fails if the kernel would end another one before it."""
    pid = os.fork()
    if pid == 0:
        done = False
        try:
            end_with_parent()
            os.sched_setaffinity(0, [cpu])  # pages that were freed are kept for their CPU
            done = bool(_set("/proc/self/oom_score_adj", "1000")) and fill()
        finally:
            os._exit(not done)
    return pid


def _fill_programs() -> bool:
    """Until the kernel ends this process. False when it gives no more and does not."""
    while _map(_PIECE, mmap.PROT_READ | mmap.PROT_WRITE, _MAP_POPULATE):
        pass
    return False


def _fill_kernel() -> bool:
    """Page tables, for what is read and was never written; messages of one to eight pages; files without content."""
    size = _SPAN * _TABLES
    start = _map(size, mmap.PROT_READ)
    if not start:
        return False
    ctypes.CDLL(None).madvise(ctypes.c_void_p(start), ctypes.c_size_t(size), _MADV_NOHUGEPAGE)
    for address in range(start, start + size, _SPAN):
        ctypes.string_at(address, 1)
    lines = [socketpair() for _ in range(_MESSAGES)]
    for near, _ in lines:
        near.setblocking(False)
        for pages in (1, 2, 4, 8):
            near.send(bytes((pages + 1) * mmap.PAGESIZE - 1024))
    names = [f"/run/unlock-{os.getpid()}-{number}" for number in range(_FILES)]
    for name in names:
        os.close(os.open(name, os.O_CREAT | os.O_CLOEXEC))
    for name in names:
        os.unlink(name)
    return True


def _map(size: int, rights: int, flags: int = 0) -> int | None:
    """The address of new memory; None when the kernel gives no more addresses."""
    call = ctypes.CDLL(None).mmap
    call.restype = ctypes.c_void_p
    call.argtypes = (ctypes.c_void_p, ctypes.c_size_t, *[ctypes.c_int] * 3, ctypes.c_long)
    start: int = call(None, size, rights, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | flags, -1, 0)
    return None if start == _FAILED else start


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
