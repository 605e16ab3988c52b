# SPDX-License-Identifier: Apache-2.0
"""A refused boot that the operator accepts: the recovery key once, `unlock rebind`, and the next boot asks nobody."""

import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.lab.guest import Guest
from tests.lab.machine import RECOVERY, SENT, Machine, agent_commands, report
from tests.lab.stories import (
    BACKUP,
    CAPPED,
    MEASURED,
    PASSWORD,
    checked,
    measured,
    pcr,
    replayed,
    status,
    unseal_as_root,
    up,
)

pytestmark = [pytest.mark.vm, pytest.mark.always]

ALL = ("", "root", "data")


@pytest.fixture
def story(tmp_path: Path) -> Iterator[Machine]:
    """A clone of the enrolled machine."""
    yield measured().clone(tmp_path / "machine")
    shutil.rmtree(tmp_path / "machine", ignore_errors=True)


def refused_then_bound(story: Machine, verdict: str, cause: str, **changed: Any) -> None:
    """`changed`: how this boot, and those to come, differ from the ones before."""
    with story.boot(**changed) as booted:
        booted.console.expect("recovery key: ", 300)
        booted.console.send(story.recovery_key + "\n")
        console = up(booted)
        assert replayed(console) >= MEASURED
        assert report(console)["verdict"] == verdict
        assert json.loads(console.sh("unlock explain --json").out)["causes"][0]["code"] == cause
        assert checked(console) == {"": "unsafe", "root": "unproven", "data": "unproven"}
        rebind(console, story)
        assert checked(console) == dict.fromkeys(ALL, "unproven") | {"root": "safe", "data": "safe"}
        rebind(console, story)
        booted.poweroff()
    with story.boot(**changed) as booted:
        console = up(booted)
        assert report(console)["verdict"] == "unsealed"
        assert "recovery" not in booted.console.text
        assert status(console) == {"root": "open", "data": "open"}
        assert checked(console) == dict.fromkeys(ALL, "safe")
        assert pcr(console, 15) == CAPPED
        assert unseal_as_root(console) == "pcr-mismatch"
        assert [name for name in agent_commands(booted) if name in SENT] == list(SENT)
        console.sh("sha256sum --quiet -c /root/sums && systemctl is-active app-data.service")
        booted.kill()


def rebind(console: Guest, story: Machine) -> None:
    console.write(RECOVERY, story.recovery_key.encode(), 0o600)
    console.write("/run/password", PASSWORD.encode(), 0o600)
    files = f"--recovery-key-file {RECOVERY} --backup {BACKUP} --backup-password-file /run/password"
    done = console.sh(f"unlock rebind {files}", timeout=240)
    assert "4 disk(s)" in done.err


def test_another_command_line_is_accepted(story: Machine) -> None:
    refused_then_bound(story, "pcr-mismatch", "command-line", append="audit=0")


def test_another_board(story: Machine) -> None:
    refused_then_bound(story, "no-slot", "tpm-replaced", tpm="another")
