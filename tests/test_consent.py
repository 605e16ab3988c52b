# SPDX-License-Identifier: Apache-2.0
"""How a person agrees to what a command is about to do: at a real terminal, and without one."""

import os
import pty
import select
import signal
import subprocess
import sys
import time
from collections.abc import Iterator

import pytest

from tests.killing import CHECKOUT

PLAN = """
import argparse, sys
from unlock import log
from unlock.cli.consent import consent
from unlock.errors import UnlockError
from unlock.operations.consent import Plan

options = argparse.Namespace(dry_run="--dry-run" in sys.argv, yes="--yes" in sys.argv, json="--json" in sys.argv)
plan = Plan(("first", "second"), ("all data on /dev/sdb (ext4)",) if "--lossless" not in sys.argv else (), "/dev/sdb")
try:
    print("agreed" if consent(options)(plan) else "shown")
except UnlockError as error:
    log.error(str(error), error.hint)
    sys.exit(error.status)
"""


def at_terminal(types: bytes, *options: str) -> tuple[int, str]:
    """Exit status and what the terminal shows. It types after `: `, once."""
    pid, terminal = pty.fork()
    if pid == 0:
        signal.signal(signal.SIGINT, signal.SIG_DFL)  # a shell's background job ignores it
        os.chdir(CHECKOUT)
        os.execv(sys.executable, [sys.executable, "-c", PLAN, *options])
    shown, end = b"", time.monotonic() + 60
    while time.monotonic() < end:
        if select.select([terminal], [], [], 0.1)[0]:
            try:
                piece = os.read(terminal, 4096)
            except OSError:  # it has ended
                break
            shown += piece
            if shown.endswith(b"to go on: ") and types:
                os.write(terminal, types)
                types = b""
    status = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
    os.close(terminal)
    return status, shown.decode()


def without_terminal(*options: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-c", PLAN, *options],
        cwd=CHECKOUT,
        capture_output=True,
        text=True,
        check=False,
        stdin=subprocess.DEVNULL,
        start_new_session=True,
    )


@pytest.fixture(autouse=True)
def plain(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.delenv("COVERAGE_PROCESS_CONFIG", raising=False)
    yield


def test_a_person_types_the_name_of_what_is_lost() -> None:
    status, shown = at_terminal(b"/dev/sdb\n")
    assert (status, "agreed" in shown) == (0, True)
    assert "lost for good: all data on /dev/sdb (ext4)" in shown
    assert "type /dev/sdb to go on: " in shown


@pytest.mark.parametrize("typed", [b"yes\n", b"y\n", b"\n", b"/dev/sdc\n", b"/dev/sdb1\n", b"\x04"])
def test_anything_else_changes_nothing(typed: bytes) -> None:
    status, shown = at_terminal(typed)
    assert (status, "agreed" in shown) == (3, False)
    assert "nothing was changed" in shown


def test_an_interrupt_ends_it() -> None:
    status, shown = at_terminal(b"\x03")
    assert status != 0
    assert "agreed" not in shown


def test_yes_and_what_loses_nothing_ask_nobody() -> None:
    for options in (["--yes"], ["--lossless"]):
        status, shown = at_terminal(b"", *options)
        assert (status, shown.strip()) == (0, "agreed")
        assert without_terminal(*options).stdout == "agreed\n"


def test_without_a_terminal_it_wants_the_option() -> None:
    done = without_terminal()
    assert (done.returncode, done.stdout) == (3, "")
    assert "hint: --yes" in done.stderr


def test_the_steps_are_shown_to_people_and_scripts() -> None:
    assert without_terminal("--dry-run").stdout.splitlines() == [
        "1. first",
        "2. second",
        "lost for good: all data on /dev/sdb (ext4)",
        "shown",
    ]
    shown = without_terminal("--dry-run", "--yes", "--json").stdout
    assert '"dry_run": true' in shown and shown.endswith("shown\n")
