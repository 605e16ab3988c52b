# SPDX-License-Identifier: Apache-2.0
"""How a long operation is shown while it runs, and how it is stopped at a safe point.

    with progress.shown(paths, as_json=options.json) as tell:
        rekey_deep.rekey(paths, ..., tell)

At a terminal: one line that is written again and again. Elsewhere, as in the journal: a line a minute. With `--json`:
an object on one line of standard error each second.
"""

import signal
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from typing import TYPE_CHECKING, Any

from .. import log
from ..errors import Stopped
from ..paths import Paths
from ..protect import never_kill_for_memory

if TYPE_CHECKING:
    from ..disks.reencrypt import Tell
    from ..host.progress import Progress

MINUTE = 60.0
_BAR = 24
"""Characters."""


@contextmanager
def shown(paths: Paths, *, as_json: bool = False, lifts: bool = True) -> Iterator["Tell"]:
    """Gives the operation its `tell`. SIGTERM and SIGINT stop it at its next safe point, `unlock operation pause` too;
    a terminal that is lost does not. `lifts`: as of `Reporter`. Raises Stopped when the operation has returned before
    its end."""
    from ..host.progress import Reporter, describe

    front = _Front(as_json=as_json)
    reporter = Reporter(paths, front.show, lifts=lifts)
    old: dict[int, Any] = {}

    def tell(done: int, total: int) -> bool:
        if not old:  # before, nothing has begun, and a signal ends the command
            old.update(_catch_signals(reporter.stop))
            never_kill_for_memory()
        stops = reporter.tell(done, total)
        if stops:
            front.stopping()
        return stops

    try:
        yield tell
        if (last := reporter.last) and reporter.has_stopped:
            raise Stopped(
                f"`{last.command}` has stopped: {describe(last.done, last.total, 0.0)}", "unlock operation resume"
            )
    finally:
        front.end()
        reporter.end()
        for number, handler in old.items():
            signal.signal(number, handler)


def _catch_signals(stop: Callable[[], None]) -> dict[int, Any]:
    """Returns the handlers that were there before, by signal."""

    def handle(number: int, frame: object) -> None:
        stop()

    wanted: dict[int, Any] = {signal.SIGTERM: handle, signal.SIGINT: handle, signal.SIGHUP: signal.SIG_IGN}
    return {number: signal.signal(number, handler) for number, handler in wanted.items()}


class _Front:
    """Where progress is shown."""

    def __init__(self, *, as_json: bool) -> None:
        self._as_json, self._is_terminal = as_json, not as_json and log.is_terminal()
        self._line = ""
        """What stands on the terminal's last line."""
        self._shown = float("-inf")
        self._stopping = False

    def show(self, progress: "Progress") -> None:
        """Raises OSError for a terminal that is gone."""
        from ..host.progress import describe, percent

        now = time.monotonic()
        words = describe(progress.done, progress.total, progress.rate)
        if self._as_json:
            log.note_json({"version": 1, "progress": progress._asdict()})
        elif self._is_terminal:
            filled = _BAR * percent(progress.done, progress.total) // 100
            line = f"{progress.command}  [{'#' * filled}{'-' * (_BAR - filled)}]  {words}"
            log.overwrite(line, last=self._line)
            self._line = line
        elif now - self._shown >= MINUTE or progress.done == progress.total:
            self._shown = now
            log.note(f"{progress.command}: {words}")

    def stopping(self) -> None:
        """Says once that the operation goes on to its next safe point."""
        if not self._stopping:
            self._stopping = True
            self.end()
            with suppress(OSError):
                log.note("stopping at the next safe point")

    def end(self) -> None:
        """Ends the line of a terminal."""
        if self._line:
            self._line = ""
            with suppress(OSError):
                log.note("")
