# SPDX-License-Identifier: Apache-2.0
"""The operation under way, for `status`, `check` and `operation show`: from the journal, its process, and the disks."""

from collections.abc import Iterable
from typing import NamedTuple

from ..disks import find, luks, reencryption
from ..errors import UnlockError
from ..host import lock, progress, resumption
from ..host.journal import chain, command, goes_on_by_itself
from ..host.state import State
from ..paths import Paths


class UnderWay(NamedTuple):
    """What is known of it."""

    operation: str
    about: str
    command: str
    """What a person types to finish it."""
    then: tuple[str, ...]
    """The same of the operations that go on after it."""
    state: str
    """`running`; `paused`: it waits for `unlock operation resume`; `interrupted`: its process has ended before it."""
    by_itself: bool
    """unlock-resume.service goes on with it after a boot."""
    done: int
    total: int
    """Bytes; 0 and 0 while that is not known."""
    since: float
    """When the present run began, in seconds since 1970; 0 where there is none."""
    rate: float
    """Bytes a second; 0 while that is not known."""
    left: int | None
    """Seconds; None while that is not known."""

    @property
    def finish(self) -> str:
        """What to type next: to resume it, or to run it again; '' while it runs."""
        if self.state == "running":
            return ""
        return "unlock operation resume" if self.by_itself or self.state == "paused" else self.command

    def describe(self) -> str:
        """In words: `running, 34 %, 118 MB/s, 2 h 10 min left`."""
        return ", ".join(filter(None, (self.state, progress.describe(self.done, self.total, self.rate))))


def read(paths: Paths, state: State, look: find.Look = find.look) -> UnderWay | None:
    """None where the journal is empty. Reads the disks only where no process of this boot has told how far it is."""
    entry = state.journal
    if entry is None:
        return None
    told = progress.read(paths)
    if told and not any(told.is_of(each) for each in chain(entry)):
        told = None
    by_itself = goes_on_by_itself(entry)
    running = told.is_running if told else not by_itself and lock.is_held(paths)
    done, total = (told.done, told.total) if told else _read_disks(state, look) if by_itself else (0, 0)
    rate = told.rate if told and running else 0.0
    paused = not running and any(resumption.is_paused(paths, each) for each in chain(entry))
    return UnderWay(
        operation=entry.operation,
        about=entry.about,
        command=command(entry),
        then=tuple(command(each) for each in chain(entry)[1:]),
        state="running" if running else "paused" if paused else "interrupted",
        by_itself=by_itself,
        done=done,
        total=total,
        since=told.since if told and running else 0.0,
        rate=rate,
        left=progress.seconds_left(done, total, rate) if running else None,
    )


def _read_disks(state: State, look: find.Look) -> tuple[int, int]:
    """Bytes done and in all, of the members that are half re-encrypted."""
    members = [member for group in state.groups.values() for member in group.members]
    seen = look()
    found = [_read_disk(node) for node in (find.find_node(seen, each) for each in members) if node]
    return _sum(each for each in found if each)


def _read_disk(node: str) -> tuple[int, int] | None:
    try:
        with luks.Container(node) as container:
            return reencryption.read_progress(container, container.disk_size)
    except UnlockError:
        return None


def _sum(pairs: Iterable[tuple[int, int]]) -> tuple[int, int]:
    pairs = list(pairs)
    return sum(done for done, _ in pairs), sum(total for _, total in pairs)
