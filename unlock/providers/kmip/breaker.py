# SPDX-License-Identifier: Apache-2.0
"""The circuit breaker of one endpoint: when an endpoint that failed may be asked again.

Each failure in a row doubles the pause, with jitter. After a wrong key the endpoint is not asked again.
"""

from collections.abc import Callable

from ...errors import ClientAuth, Integrity, ProviderError

_PAUSE_MAX = 300.0
"""Seconds."""
_CLIENT_AUTH_PAUSE = 60.0
"""Seconds; servers lock out clients that insist."""


class Breaker:
    """`clock` is in seconds, `random` gives 0 to 1."""

    def __init__(self, *, clock: Callable[[], float], random: Callable[[], float]) -> None:
        self._clock = clock
        self._random = random
        self._failures = 0
        self.open_until = 0.0
        """Time of the clock before which the endpoint is not asked; infinity after a wrong key."""
        self.cause: ProviderError | None = None
        """The last failure since the endpoint worked."""

    def is_open(self) -> bool:
        """Whether the endpoint must not be asked now."""
        return self._clock() < self.open_until

    def record_success(self) -> None:
        self._failures, self.open_until, self.cause = 0, 0.0, None

    def record_failure(self, error: ProviderError) -> None:
        self._failures += 1
        base = _CLIENT_AUTH_PAUSE if isinstance(error, ClientAuth) else 2.0 ** min(self._failures, 10)
        pause = min(base, _PAUSE_MAX) * (0.5 + self._random() / 2)
        self.open_until = float("inf") if isinstance(error, Integrity) else self._clock() + pause
        self.cause = error
