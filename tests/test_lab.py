# SPDX-License-Identifier: Apache-2.0
"""The fast machines themselves: two boot side by side, and nothing of one is left on this host when it was killed."""

import os
import shutil
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.lab.machine import Machine, report
from tests.lab.stories import measured, up

pytestmark = pytest.mark.vm


@pytest.fixture
def machine(tmp_path: Path) -> Iterator[Machine]:
    yield measured().clone(tmp_path / "machine")
    shutil.rmtree(tmp_path / "machine", ignore_errors=True)


def left_behind(home: Path) -> list[str]:
    """Processes that have anything of the machine's directory open or in their arguments, and its mounts."""
    found = []
    for process in Path("/proc").glob("[0-9]*"):
        try:
            told = (process / "cmdline").read_bytes() + os.fsencode(os.readlink(process / "cwd"))
        except OSError:  # it has ended
            continue
        if os.fsencode(home) in told and int(process.name) != os.getpid():
            found.append(f"process {process.name}: {told!r}")
    return found + [line for line in Path("/proc/mounts").read_text().splitlines() if str(home) in line]


@pytest.mark.parametrize("after", [0.3, 1.5])
def test_nothing_is_left_of_a_machine_that_was_killed(machine: Machine, after: float) -> None:
    """In its kernel's start, in its initramfs; then it boots whole from the same disks."""
    shared = set(os.listdir("/dev/shm"))
    with machine.boot(network=True) as booted:
        time.sleep(after)
        booted.kill()
    assert left_behind(machine.home) == []
    assert not {each for each in set(os.listdir("/dev/shm")) - shared if "vm_file" in each}
    with machine.boot() as booted:
        assert report(up(booted))["verdict"] == "unsealed"
        assert left_behind(machine.home), "the search finds a machine that runs"
        booted.kill()
    assert left_behind(machine.home) == []
