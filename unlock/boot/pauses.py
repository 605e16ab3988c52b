# SPDX-License-Identifier: Apache-2.0
"""How long to wait before a key manager is asked again, so that a site whose hosts all boot at once is served."""

_PAUSE_MAX = 30.0
"""Seconds of jitter; more only after a try that took long."""
_SHORTEST = 1.0
"""Seconds."""


def pause_before_retry(*, tries: int, took: float, left: float, random: float) -> float | None:
    """Seconds to wait after `tries` failed ones, the last of which took `took`; None when there is no time for another.

    The jitter (`random`, 0 to 1) doubles each time, and no pause is shorter than the try was: a server that lets a
    client wait has too many of them. `left`: seconds until the deadline; a pause that does not fit ends somewhere in
    the rest of the time.
    """
    if left < _SHORTEST:
        return None
    least, jitter = max(took, _SHORTEST), max(min(2.0**tries, _PAUSE_MAX), 4 * took)
    return least + random * jitter if least + jitter <= left else max(_SHORTEST, random * left)
