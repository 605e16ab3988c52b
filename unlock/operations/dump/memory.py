# SPDX-License-Identifier: Apache-2.0
"""Keeps what is decrypted in memory: never in swap, and no more than the host has room for."""

import os

from ... import log
from ...disks import devices
from ...errors import Refused
from ...paths import Paths
from .core import Core
from .protection import plain_swaps

_GROUP = "sys/fs/cgroup/unlock-dump"
"""That of system/dump too."""


def stay_out_of_swap(paths: Paths) -> bool:
    """Moves this process, and so all that it starts, into a control group whose memory is never swapped out: programs
    that decrypt, the files in memory that they write, and gdb. False where the kernel has no such groups."""
    group = os.path.join(paths.root, _GROUP)
    try:
        if not os.path.isdir(group):
            os.mkdir(group, 0o755)
        for name, value in (("memory.swap.max", "0"), ("cgroup.procs", str(os.getpid()))):
            fd = os.open(os.path.join(group, name), os.O_WRONLY | os.O_CLOEXEC)  # those that the kernel has made
            try:
                os.write(fd, value.encode())
            finally:
                os.close(fd)
    except OSError:
        return False
    return True


def note_plain_swap(paths: Paths) -> None:
    """`stay_out_of_swap` for what passes through memory, a few MiB at once. Where the kernel has no such groups, pages
    of age and zstd may be swapped out; that is told where a swap is not encrypted, and stops nothing."""
    if not stay_out_of_swap(paths) and (swaps := plain_swaps(paths)):
        log.note(
            f"the swap {swaps[0]} is not encrypted, and the kernel cannot keep age and zstd out of it: a piece of what "
            f"is decrypted may stay there; before the next time: swapoff {swaps[0]}"
        )


def available(paths: Paths) -> int:
    """Bytes of memory that programs can have without swap."""
    for line in devices.read_line(paths.root, "proc/meminfo").splitlines():
        if line.startswith("MemAvailable:"):
            return int(line.split()[1]) << 10
    return 0


class Room:
    """Half of the memory that is available now, for one core."""

    def __init__(self, paths: Paths, name: str) -> None:
        self.name, self.available = name, available(paths)
        self._core, self._end = Core(), 0

    def take(self, piece: bytes) -> None:
        """Counts a piece of the core. Raises Refused for one that is too large, at the first piece where its headers
        say so."""
        self._core.add(piece)
        self._end = self._end or self._core.end()
        size = max(self._core.size, self._end)
        if size > self.available // 2:
            raise Refused(
                f"the core of {self.name} has {size >> 20} MiB or more, and {self.available >> 20} MiB of memory are "
                "available: gdb gets at most half of that",
                "unlock dump extract DUMP --output FILE, on an encrypted disk, then gdb PROGRAM FILE",
                code="no-room",
            )
