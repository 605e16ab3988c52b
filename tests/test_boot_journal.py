# SPDX-License-Identifier: Apache-2.0
"""What a boot that the TPM refused leaves on the console and in the journal: a line for each group and each disk."""

import json
import re
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.lab import luks
from tests.lab.guest import Guest
from tests.lab.machine import Machine
from tests.lab.running import Disk, Running
from tests.lab.stories import unmeasured, up

pytestmark = pytest.mark.vm

GROUPS = {"late", "copy", "ruined", "twin", "far", "pair"}
DISKS = 9


@pytest.fixture
def story(tmp_path: Path) -> Iterator[Machine]:
    """A clone of the enrolled machine: seven groups on eight disks, and a disk of somebody else."""
    machine = unmeasured().clone(tmp_path / "machine")
    luks.format_disk(machine.home / "foreign.raw", "of somebody else")
    machine.disks["foreign"] = Disk("foreign.raw", "foreign")
    yield machine
    shutil.rmtree(tmp_path / "machine", ignore_errors=True)


def entries(console: Guest, options: str) -> list[dict[str, Any]]:
    return [json.loads(line) for line in console.sh(f"journalctl -o json --no-pager {options}").out.splitlines()]


def refused(booted: Running, key: str) -> Guest:
    """Boots without the TPM's key, the root by the stock prompt alone."""
    booted.console.expect("recovery key: ", 300)
    booted.console.send("\n")
    booted.console.expect("unlock disk root", 60)
    booted.console.send(key + "\n")
    return up(booted)


def test_a_refused_boot_with_nine_disks_takes_a_line_a_group_and_a_line_a_disk(story: Machine) -> None:
    with story.boot(tpm="another") as booted:
        console = refused(booted, story.recovery_key)
        console.sh("echo '[Journal]\nStorage=persistent' >/etc/systemd/journald.conf.d/lab.conf")
        console.sh("systemctl restart systemd-journald && journalctl --flush")
        # gates: one line each, which says what to type
        for group in GROUPS:
            (line,) = console.sh(f"journalctl -b -u unlock-group@{group} -t gate -o cat").out.splitlines()
            assert line.startswith(f"unlock: group {group}: no key: ")
            assert line.endswith(f" (hint: unlock open {group} --recovery)")
        assert {each["_SYSTEMD_UNIT"] for each in entries(console, "-b -p err -t gate")} == {
            f"unlock-group@{group}.service" for group in GROUPS
        }
        # heals: nothing that a gate has said
        nodes = sorted(Path(each).name for each in console.sh("ls /dev/ubd[a-z]").out.split())
        assert len(nodes) == DISKS
        for node in nodes:
            console.sh(f"systemctl start unlock-heal@{node}")
        assert console.sh("journalctl -b -o json --no-pager | grep -c unlock-heal@ || true").out == "0"
        # the record of early boot
        found = entries(console, "-b -u unlock-early-boot -t unlock UNLOCK_PHASE=early-boot")
        assert [each["UNLOCK_VERDICT"] for each in found] == ["no-slot"]
        ours = console.sh("journalctl -b -o cat --no-pager -t unlock -t gate").out.splitlines()
        assert len(ours) == len(GROUPS) + DISKS + 1, ours
        assert len(re.findall("^unlock: ", booted.console.text, re.MULTILINE)) <= 5
        # each looks at its own group alone
        for serial, group in (("pair-2", "pair"), ("copy-1", "copy"), ("foreign", ""), ("root", "")):
            console.sh("rm -rf /run/unlock/last-errors")
            node = Path(console.sh(f"readlink -f /dev/disk/by-id/lab-{serial}").out).name
            console.sh(f"systemctl start unlock-heal@{node}")
            said = console.sh("ls /run/unlock/last-errors 2>/dev/null", check=False).out.split()
            assert said == [group] * bool(group)
        booted.poweroff()

    with story.boot() as booted:
        console = up(booted)
        disks = entries(console, "-b -1 -u unlock-early-boot UNLOCK_NODE=/dev/ubdb")
        assert [each["UNLOCK_OUTCOME"] for each in disks] == ["no-key"]
        lines = console.sh("journalctl -b -1 -u unlock-early-boot -t unlock -o cat --no-pager").out.splitlines()
        assert len(lines) == 1 + DISKS and lines[0].startswith("no-slot: "), lines
        now = entries(console, "-b -u unlock-early-boot -t unlock")
        assert {each["UNLOCK_GROUP"] for each in now if "UNLOCK_MEMBERS" in each} == {"root", *GROUPS}
        assert {each.get("UNLOCK_OUTCOME", "opened") for each in now} == {"open", "opened", "foreign"}
        assert all(re.fullmatch("[0-9a-f]{32}", each["MESSAGE_ID"]) for each in now)
        console.sh("systemctl restart unlock-early-boot")
        assert len(entries(console, "-b -u unlock-early-boot -t unlock")) == len(now), "once in a boot"
        booted.kill()
