# SPDX-License-Identifier: Apache-2.0
"""For all tests. What one wants shown, it gives to `record_property("shown", ...)`: it is printed when all is done."""

import faulthandler
import fcntl
import os
import sys
import tempfile
from collections.abc import Callable, Generator, Iterator
from pathlib import Path
from typing import Any

import pytest

from tests import killing
from unlock import wrap


@pytest.fixture
def key_cache() -> Iterator[None]:
    """The user keyring is one for all processes of root in a user namespace: whoever puts keys into it is alone with
    it."""
    from unlock import keyring

    namespace = os.stat("/proc/self/ns/user").st_ino
    with Path(tempfile.gettempdir(), f"unlock-test-keyring-{namespace}.lock").open("w") as lock:
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


@pytest.fixture
def killer(request: pytest.FixtureRequest, record_property: Callable[[str, object], None]) -> killing.Killer:
    """Kills a flow at each of its steps."""
    return killing.Killer(lambda told: record_property("shown", f"{request.node.name}: {told}"))


@pytest.fixture
def unmeasured(monkeypatch: pytest.MonkeyPatch) -> None:
    """For programs that tell what they import: coverage imports much."""
    monkeypatch.delenv("COVERAGE_PROCESS_CONFIG", raising=False)


@pytest.fixture
def cheap_passwords(monkeypatch: pytest.MonkeyPatch) -> None:
    """Scrypt with 1 MiB and not 128, for what makes and reads a backup dozens of times, in this process and its
    forks."""
    monkeypatch.setitem(wrap._SCRYPT, "n", 2**10)


STDERR = pytest.StashKey[int]()
"""As it was before pytest took it."""


def pytest_configure(config: pytest.Config) -> None:
    config.stash[STDERR] = os.dup(2)


LIMITS = {"vm": 1800}
"""Seconds for a test with that marker; pyproject.toml has those of the others."""


@pytest.hookimpl(wrapper=True)
def pytest_runtest_protocol(item: pytest.Item) -> Generator[None, object, object]:
    """A test whose time is over fails (pytest-timeout), unless it is stuck in C code that a signal does not end: after
    the same time again its worker ends, and xdist starts another for the tests that are left."""
    marker = item.get_closest_marker("timeout")
    limit = float(marker.args[0] if marker else item.config.getini("timeout"))
    faulthandler.dump_traceback_later(2 * limit, exit=True, file=item.config.stash[STDERR])
    try:
        return (yield)
    finally:
        faulthandler.cancel_dump_traceback_later()


def pytest_xdist_setupnodes(config: pytest.Config, specs: list[Any]) -> None:
    if config.getoption("--alone"):
        for spec in specs:
            spec.python = f"{sys.executable} {Path(__file__).with_name('alone.py')}"


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--alone", action="store_true", help="each worker in a user namespace, with its own key cache")


ORDER = ("test_boot_attacks", "", "test_boot_faults", "test_boot_good", "test_boot_keys", "test_power_cuts")
"""Machines beside all that needs none, which waits for the one key cache: two of the latter would wait for each other.
"": the rest."""


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    items.sort(key=lambda item: ORDER.index(item.path.stem if item.path.stem in ORDER else ""))
    for item in items:
        for name, limit in LIMITS.items():
            if item.get_closest_marker(name) and not item.get_closest_marker("timeout"):
                item.add_marker(pytest.mark.timeout(limit))


def pytest_terminal_summary(terminalreporter: Any) -> None:
    reports = [each for kind in ("passed", "failed") for each in terminalreporter.stats.get(kind, [])]
    shown = [text for each in reports for name, text in getattr(each, "user_properties", ()) if name == "shown"]
    if shown:
        terminalreporter.section("properties")
        for text in shown:
            terminalreporter.write_line(text)
