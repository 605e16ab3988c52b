# SPDX-License-Identifier: Apache-2.0
"""For all tests. What one wants shown, it gives to `record_property("shown", ...)`: it is printed when all is done."""

import fcntl
import hashlib
import subprocess
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest


@pytest.fixture
def key_cache() -> Iterator[None]:
    """The user keyring is one for all processes of this user: whoever puts keys into it is alone with it."""
    from unlock import keyring

    with Path(tempfile.gettempdir(), "unlock-test-keyring.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        keyring.flush()
        yield
        keyring.flush()


@pytest.fixture
def kms() -> Iterator[Any]:
    """A key manager, scripted, over mutual TLS."""
    from kmipfixture import AUTHORITY

    from tests.lab.kmipliar import Liar

    with Liar(AUTHORITY) as liar:
        yield liar


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--long", default="all", metavar="MINUTES", help="of the long tests, as many as take so long")


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """The dearest first, so that the last worker does not work alone."""
    if config.getoption("--long") != "all":
        chosen = rotation(
            [each for each in items if each.get_closest_marker("long")], float(config.getoption("--long"))
        )
        left = [each for each in items if each.get_closest_marker("long") and each not in chosen]
        config.hook.pytest_deselected(items=left)
        items[:] = [each for each in items if each not in left]
    items.sort(key=lambda item: (-minutes(item), item.get_closest_marker("vm") is None))


def rotation(items: list[pytest.Item], budget: float) -> list[pytest.Item]:
    """Those of `items` that this commit's hash chooses, as many as `budget` minutes allow: in time, each has a turn."""
    git = subprocess.run(["git", "rev-parse", "HEAD"], cwd=Path(__file__).parent, capture_output=True)
    chosen = []
    for each in sorted(items, key=lambda item: hashlib.sha256(git.stdout + item.nodeid.encode()).digest()):
        if minutes(each) <= budget:
            chosen.append(each)
            budget -= minutes(each)
    return chosen


def minutes(item: pytest.Item) -> float:
    """What a long test takes beside another machine, its enrolment included."""
    marker = item.get_closest_marker("long")
    return float(marker.kwargs["minutes"]) if marker else 0


def pytest_terminal_summary(terminalreporter: Any) -> None:
    reports = [each for kind in ("passed", "failed") for each in terminalreporter.stats.get(kind, [])]
    shown = [text for each in reports for name, text in getattr(each, "user_properties", ()) if name == "shown"]
    if shown:
        terminalreporter.section("properties")
        for text in shown:
            terminalreporter.write_line(text)
