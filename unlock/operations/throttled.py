# SPDX-License-Identifier: Apache-2.0
"""Holds down the rate at which data moves while a disk is encrypted or re-encrypted."""

import time

from ..disks import reencrypt
from ..disks.reencrypt import Tell


class Throttled:
    """Tells the caller how far the disks are, and waits where they are ahead of the rate. `rate`: bytes a second at
    most; 0 for no limit. `before`: bytes of disks that are done; `total`: of all."""

    def __init__(self, tell: Tell, rate: int, before: int = 0, total: int = 0) -> None:
        self._tell, self._rate, self._before, self._total = tell, rate, before, total
        self._begun = time.monotonic()
        self._first = -1
        self.stops = False

    @property
    def hotzone(self) -> int:
        """Bytes, for `Disk.run`: small steps keep a rate even."""
        return reencrypt.HOTZONE if self._rate else 0

    def tell(self, done: int, size: int) -> bool:
        """As `Tell`, for one disk."""
        if self._first < 0:
            self._first = done
        self.stops = self._tell(self._before + done, max(self._total, self._before + size))
        while not self.stops and (left := self._seconds_ahead(done)) > 0:
            time.sleep(min(left, 1.0))
            self.stops = self._tell(self._before + done, max(self._total, self._before + size))
        return self.stops

    def _seconds_ahead(self, done: int) -> float:
        if not self._rate:
            return 0.0
        return (done - self._first) / self._rate - (time.monotonic() - self._begun)
