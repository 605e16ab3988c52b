# SPDX-License-Identifier: Apache-2.0
"""Which of the dear tests a commit runs: chosen by its hash, so that all who test it run the same, and in time each
test has its turn."""

from collections.abc import Sequence
from hashlib import sha256

import pytest


def takes_turns(item: pytest.Item) -> bool:
    """What boots a machine, unless it is marked `always`, and what is marked `turns`."""
    if item.get_closest_marker("vm"):
        return item.get_closest_marker("always") is None
    return item.get_closest_marker("turns") is not None


def one_in(items: Sequence[pytest.Item], turns: int, commit: str) -> list[pytest.Item]:
    """Of neighbours, each has its turn at other commits."""
    now = int.from_bytes(sha256(commit.encode()).digest())
    return [each for place, each in enumerate(items) if (place + now) % turns == 0]


def rotation(items: Sequence[pytest.Item], budget: float, commit: str) -> list[pytest.Item]:
    """As many of the long ones as `budget` minutes allow. One that is longer than that has no turn: `make test-long`
    alone runs it."""
    chosen = []
    for each in sorted(items, key=lambda item: sha256((commit + item.nodeid).encode()).digest()):
        if minutes(each) <= budget:
            chosen.append(each)
            budget -= minutes(each)
    return chosen


def minutes(item: pytest.Item) -> float:
    """What a long test takes beside another machine, its enrolment included."""
    marker = item.get_closest_marker("long")
    return float(marker.kwargs["minutes"]) if marker else 0
