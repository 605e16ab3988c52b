# SPDX-License-Identifier: Apache-2.0
"""Two files beside state.json, about an operation that outlives a reboot.

under-way      there while the journal has an operation that goes on by itself: a condition of unlock-resume.service
paused.json    the operation that a person has paused: it does not go on by itself until it is resumed

`pause` works while the operation runs, which has the lock and writes state.json: so this is no field of the journal. A
pause of an operation that the journal does not have is without effect.
"""

import json
import os
import time
from contextlib import suppress
from typing import NamedTuple

from ..errors import Malformed
from ..paths import Paths, write_atomically
from . import codec
from .journal import JournalEntry

VERSION = 1
_UNDER_WAY, _PAUSED = "under-way", "paused.json"


class Pause(NamedTuple):
    """paused.json."""

    version: int
    operation: str
    about: str
    """Of the journal entry."""
    at: float
    """Seconds since 1970."""

    def is_of(self, entry: JournalEntry) -> bool:
        return (self.operation, self.about) == (entry.operation, entry.about)


def mark(state: str) -> None:
    """Before the file `state` gets such an operation; durable with that file, whose folder is synced. A mark without
    an operation costs a start of the service."""
    folder = os.path.dirname(state)
    os.makedirs(folder, mode=0o700, exist_ok=True)
    os.close(os.open(os.path.join(folder, _UNDER_WAY), os.O_WRONLY | os.O_CREAT | os.O_CLOEXEC, 0o600))


def unmark(state: str) -> None:
    """After the file `state` has lost the operation."""
    _remove(os.path.join(os.path.dirname(state), _UNDER_WAY))


def pause(paths: Paths, entry: JournalEntry) -> None:
    """Durable on return: also an operation that a power cut stops stays paused. Raises OSError."""
    content = Pause(VERSION, entry.operation, entry.about, time.time())
    write_atomically(_path(paths.state), json.dumps(content._asdict(), indent=1).encode() + b"\n")


def read_pause(paths: Paths) -> Pause | None:
    """None where there is none that can be read."""
    try:
        with open(_path(paths.state), "rb") as file:
            return codec.decode(Pause, json.loads(file.read()))
    except (OSError, ValueError, RecursionError, Malformed):
        return None


def is_paused(paths: Paths, entry: JournalEntry) -> bool:
    """Whether a person has paused this operation."""
    found = read_pause(paths)
    return bool(found and found.is_of(entry))


def lift_pause(state: str) -> None:
    """The operation may go on; without effect where none is paused."""
    _remove(_path(state))


def _remove(path: str) -> None:
    if os.path.lexists(path):
        with suppress(OSError):
            os.unlink(path)


def _path(state: str) -> str:
    return os.path.join(os.path.dirname(state), _PAUSED)
