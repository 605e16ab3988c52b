# SPDX-License-Identifier: Apache-2.0
"""How long to wait before a key manager is asked again, so that a site whose hosts all boot at once is served."""

import os
import struct
from typing import NamedTuple

_PAUSE_MAX = 30.0
"""Seconds of jitter; more only after a try that took long."""
SHORTEST = 1.0
"""Seconds."""
_RECORD = struct.Struct("<Id")


class SharedPause(NamedTuple):
    """What the gates of one host that need the same provider tell each other, in the file that they lock to ask it."""

    tries: int
    """That failed, since one that did not."""
    until: float
    """Nobody asks before this (report.now())."""

    @classmethod
    def read(cls, fd: int) -> "SharedPause":
        raw = os.pread(fd, _RECORD.size, 0)
        return cls(*_RECORD.unpack(raw)) if len(raw) == _RECORD.size else cls(0, 0.0)

    def write(self, fd: int) -> None:
        os.pwrite(fd, _RECORD.pack(*self), 0)


def pause_before_retry(*, tries: int, took: float, left: float, random: float) -> float | None:
    """Seconds to wait after `tries` failed ones, the last of which took `took`; None when there is no time for another.

    The jitter (`random`, 0 to 1) doubles each time, and no pause is shorter than the try was: a server that lets a
    client wait has too many of them. `left`: seconds until the deadline; a pause that does not fit ends somewhere in
    the rest of the time.
    """
    if left < SHORTEST:
        return None
    least, jitter = max(took, SHORTEST), max(min(2.0 ** min(tries, 10), _PAUSE_MAX), 4 * took)
    return least + random * jitter if least + jitter <= left else max(SHORTEST, random * left)
