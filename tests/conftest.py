# SPDX-License-Identifier: Apache-2.0
"""For all tests. What one wants shown, it gives to `record_property("shown", ...)`: it is printed when all is done."""

import faulthandler
import os
import sys
from collections.abc import Callable, Generator, Iterator
from pathlib import Path
from typing import Any

import pytest

from tests import blank, forked, killing
from tests.flowfixture import key_cache_alone
from tests.turns import minutes, one_in, rotation, takes_turns
from unlock import wrap


@pytest.fixture
def key_cache() -> Iterator[None]:
    with key_cache_alone():
        yield


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
    """For programs that tell what they import, as coverage imports much, or whose time is limited."""
    monkeypatch.delenv("COVERAGE_PROCESS_CONFIG", raising=False)


@pytest.fixture
def cheap_passwords(monkeypatch: pytest.MonkeyPatch) -> None:
    """Scrypt with 1 MiB and not 128, in this process and its forks: half a second less for each backup."""
    monkeypatch.setitem(wrap._SCRYPT, "n", 2**10)


@pytest.fixture(autouse=True)
def cheap_where_no_machine_is(request: pytest.FixtureRequest) -> None:
    """Not for the backups that a machine makes, nor for those that are committed."""
    if not any(request.node.get_closest_marker(name) for name in ("vm", "long", "root", "real_passwords")):
        request.getfixturevalue("cheap_passwords")


@pytest.fixture(autouse=True)
def other_disks_than_in_this_test() -> None:
    blank.begin()


STDERR = pytest.StashKey[int]()
"""As it was before pytest took it."""


TURNS = pytest.StashKey[tuple[int, int]]()
"""Of the tests that take turns: how many run, and how many there are."""


def pytest_configure(config: pytest.Config) -> None:
    config.stash[STDERR] = os.dup(2)
    forked.forget_the_parent()


LIMITS = {"long": 7200, "vm": 1200}
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


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_setupnodes(config: pytest.Config, specs: list[Any]) -> None:
    if config.getoption("--alone"):
        for spec in specs:
            spec.python = f"{sys.executable} {Path(__file__).with_name('alone.py')}"


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--alone", action="store_true", help="each worker in a user namespace, with its own key cache")
    parser.addoption("--long", default="all", metavar="MINUTES", help="of the long tests, as many as take so long")
    parser.addoption("--turns", type=int, default=1, metavar="N", help="one in N of the other tests that take turns")


@pytest.hookimpl(trylast=True)
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Of those that were asked for. The dearest first, so that the last worker does not work alone."""
    long = [each for each in items if each.get_closest_marker("long")]
    if config.getoption("--long") != "all":
        chosen = rotation(long, float(config.getoption("--long")), killing.commit())
        leave_out(config, items, [each for each in long if each not in chosen])
    others = [each for each in items if each not in long and takes_turns(each)]
    chosen = one_in(others, config.getoption("--turns"), killing.commit())
    leave_out(config, items, [each for each in others if each not in chosen])
    config.stash[TURNS] = len(chosen), len(others)
    items.sort(key=lambda item: (-minutes(item), item.get_closest_marker("vm") is None))
    for item in items:
        for name, limit in LIMITS.items():
            if name == "long" and item.get_closest_marker(name):
                item.user_properties.append(("long", True))
            if item.get_closest_marker(name) and not item.get_closest_marker("timeout"):
                item.add_marker(pytest.mark.timeout(limit))


def leave_out(config: pytest.Config, items: list[pytest.Item], left: list[pytest.Item]) -> None:
    config.hook.pytest_deselected(items=left)
    items[:] = [each for each in items if each not in left]


def pytest_sessionfinish(session: pytest.Session) -> None:
    """Tests are collected in workers, where there are some; the summary is written by another process."""
    if output := getattr(session.config, "workeroutput", None):
        output["turns"] = session.config.stash.get(TURNS, (0, 0))


@pytest.hookimpl(optionalhook=True)
def pytest_testnodedown(node: Any) -> None:
    ran, of = getattr(node, "workeroutput", {}).get("turns", (0, 0))
    if of:
        node.config.stash[TURNS] = ran, of


def pytest_terminal_summary(terminalreporter: Any) -> None:
    reports = [each for kind in ("passed", "failed") for each in terminalreporter.stats.get(kind, [])]
    ran, of = terminalreporter.config.stash.get(TURNS, (0, 0))
    if ran < of:
        terminalreporter.write_line(f"{ran} of {of} tests that take turns had theirs; make test-all runs all of them")
    shown = [text for each in reports for name, text in getattr(each, "user_properties", ()) if name == "shown"]
    if shown:
        terminalreporter.section("properties")
        for text in shown:
            terminalreporter.write_line(text)
    for each in reports:
        if each.when == "call" and ("long", True) in each.user_properties:
            terminalreporter.write_line(f"long, its turn: {each.nodeid}: {each.outcome} in {each.duration:.0f} s")
