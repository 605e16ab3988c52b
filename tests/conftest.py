# SPDX-License-Identifier: Apache-2.0
"""For all tests. What one wants shown, it gives to `record_property("shown", ...)`: it is printed when all is done."""

import fcntl
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
    from tests.kmipfixture import AUTHORITY
    from tests.lab.kmipliar import Liar

    with Liar(AUTHORITY) as liar:
        yield liar


ORDER = ("test_boot_attacks", "", "test_boot_faults", "test_boot_good", "test_boot_keys", "test_power_cuts")
"""Machines beside all that needs none, which waits for the one key cache: two of the latter would wait for each other.
"": the rest."""


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    items.sort(key=lambda item: ORDER.index(item.path.stem if item.path.stem in ORDER else ""))


def pytest_terminal_summary(terminalreporter: Any) -> None:
    reports = [each for kind in ("passed", "failed") for each in terminalreporter.stats.get(kind, [])]
    shown = [text for each in reports for name, text in getattr(each, "user_properties", ()) if name == "shown"]
    if shown:
        terminalreporter.section("properties")
        for text in shown:
            terminalreporter.write_line(text)
