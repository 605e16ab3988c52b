# SPDX-License-Identifier: Apache-2.0
"""How far the operation under way has come: /run/unlock/operation.json, written by its process, read by any other.

A long operation is given a `Tell` (disks.reencrypt), which `Reporter.tell` is. It is called from libcryptsetup too,
where an exception would be lost: it raises none.
"""

import os
import time
from collections import deque
from collections.abc import Callable
from contextlib import suppress
from typing import NamedTuple

from ..errors import Malformed, UnlockError
from ..paths import Paths
from . import codec, resumption, this_boot
from .journal import JournalEntry
from .state import State

VERSION = 1
FILE = "operation.json"
INTERVAL = 1.0
"""Seconds between two records."""
_SPAN = 30.0
"""Seconds over which the rate is taken."""


class Progress(NamedTuple):
    """operation.json."""

    version: int
    operation: str
    about: str
    """Of the journal entry."""
    done: int
    total: int
    """Bytes."""
    since: float
    """When this run began to tell, in seconds since 1970."""
    rate: float
    """Bytes a second of late; 0 while that is not known."""
    pid: int
    """The process that runs the operation; 0 when it has ended."""
    started: int
    """When that process was started, as field 22 of proc(5): another one may get its number."""

    @property
    def command(self) -> str:
        """What a person has typed, but for its options."""
        return " ".join(filter(None, ("unlock", self.operation, self.about)))

    @property
    def is_running(self) -> bool:
        return self.pid > 0 and _start_time(self.pid) == self.started

    def is_of(self, entry: JournalEntry) -> bool:
        return (self.operation, self.about) == (entry.operation, entry.about)


def read(paths: Paths) -> Progress | None:
    """The record of this boot, also of a process that has ended. None where there is none that can be read."""
    try:
        return codec.decode(Progress, this_boot.read_json(paths, FILE))
    except (Malformed, RecursionError):
        return None


def percent(done: int, total: int) -> int:
    """100 only for all of it."""
    return min(100 * done // total, 100) if total > 0 else 0


def seconds_left(done: int, total: int, rate: float) -> int | None:
    """None while the rate is not known."""
    return round((total - done) / rate) if rate > 0 and total >= done else None


def describe(done: int, total: int, rate: float) -> str:
    """In words: `34 %, 118 MB/s, 2 h 10 min left`; '' while nothing is known."""
    if total <= 0:
        return ""
    words = [f"{percent(done, total)} %"]
    left = seconds_left(done, total, rate)
    if left is not None and done < total:
        words += [f"{rate / 1e6:.{0 if rate >= 1e7 else 1}f} MB/s", f"{describe_time(left)} left"]
    return ", ".join(words)


def describe_time(seconds: int) -> str:
    """In words: `40 s`, `12 min`, `2 h 10 min`, `3 d 4 h`."""
    if seconds < 60:
        return f"{seconds} s"
    minutes = round(seconds / 60)
    if minutes < 60:
        return f"{minutes} min"
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes} min" if hours < 48 else f"{hours // 24} d {hours % 24} h"


class Reporter:
    """Records the progress of the operation that this process runs, and hears of what is to stop it.

    `show` gets each record. `lifts`: a person has typed the command, which resumes an operation that was paused before.
    """

    def __init__(
        self,
        paths: Paths,
        show: Callable[[Progress], None],
        *,
        lifts: bool,
        now: Callable[[], float] = time.monotonic,
    ) -> None:
        self._paths, self._show, self._now = paths, show, now
        self._before = resumption.read_pause(paths) if lifts else None
        self._entry: JournalEntry | None = None
        self._last: Progress | None = None
        self._written = float("-inf")
        self._seen: deque[tuple[float, int]] = deque()
        """Time and bytes done, of the last `_SPAN` seconds."""
        self._stops = False

    @property
    def last(self) -> Progress | None:
        """None before the operation has told anything."""
        return self._last

    def stop(self) -> None:
        """The operation is to stop. May be called by a signal handler."""
        self._stops = True

    def tell(self, done: int, total: int) -> bool:
        """As `Tell`."""
        with suppress(OSError, UnlockError):  # what cannot be shown stops nothing
            self._record(done, total)
        return self.is_to_stop

    @property
    def is_to_stop(self) -> bool:
        return self._stops or (self._entry is not None and resumption.is_paused(self._paths, self._entry))

    @property
    def has_stopped(self) -> bool:
        """Whether the operation was to stop and is not finished: its entry is in the journal. Raises UnlockError."""
        return self.is_to_stop and self._is_journaled()

    def end(self) -> None:
        """The process does not run the operation any more. The record goes with the journal entry."""
        if not self._last:
            return
        with suppress(OSError, UnlockError):
            if self._is_journaled():
                this_boot.write_json(self._paths, FILE, self._last._replace(pid=0)._asdict())
            else:
                this_boot.unmark(self._paths, FILE)

    def _record(self, done: int, total: int) -> None:
        at = self._now()
        if self._last is None:
            self._last = self._begin(done, total)
        self._last = self._last._replace(done=done, total=total, rate=self._rate(at, done))
        if at - self._written >= INTERVAL or done == total:
            self._written = at
            this_boot.write_json(self._paths, FILE, self._last._asdict())
            self._show(self._last)

    def _begin(self, done: int, total: int) -> Progress:
        """What is under way is in the journal by now."""
        entry = self._entry = State.load(self._paths).journal
        before = self._before
        if entry and before and before.is_of(entry) and resumption.read_pause(self._paths) == before:
            resumption.lift_pause(self._paths.state)
        operation, about = (entry.operation, entry.about) if entry else ("", "")
        pid = os.getpid()
        return Progress(VERSION, operation, about, done, total, time.time(), 0.0, pid, _start_time(pid))

    def _rate(self, at: float, done: int) -> float:
        if self._seen and done < self._seen[-1][1]:  # another disk
            self._seen.clear()
        self._seen.append((at, done))
        while len(self._seen) > 2 and at - self._seen[1][0] >= _SPAN:
            self._seen.popleft()
        begun, first = self._seen[0]
        return round((done - first) / (at - begun), 1) if at > begun else 0.0

    def _is_journaled(self) -> bool:
        journal = State.load(self._paths).journal
        return bool(self._last and journal and self._last.is_of(journal))


def _start_time(pid: int) -> int:
    """0 where there is no such process."""
    try:
        with open(f"/proc/{pid}/stat", "rb") as file:
            return int(file.read().rpartition(b")")[2].split()[19])
    except (OSError, ValueError, IndexError):
        return 0
