# SPDX-License-Identifier: Apache-2.0
"""Years of a group in three boots: disks added, removed, replaced, grown and dead, under a service that writes and a
power cut. Real dm-crypt, btrfs and systemd. Headers and journal, killed at each step: test_group_disks.py.
"""

import json
import os
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.lab.guest import Guest
from tests.lab.machine import Machine
from tests.lab.stories import checked, status, unmeasured, up

pytestmark = pytest.mark.vm

KEY = "--recovery-key-file /run/key"
WRITER = """
cd /srv/mem
while :; do
    head -c 400000 /dev/urandom >new
    sum=$(sha256sum new); sum=${sum%% *}
    sync new
    mv new $sum
    ls -t | grep -x '[0-9a-f]*' | tail -n +20 | xargs -r rm
done
"""
"""The name of each file is the checksum of its content."""
VERIFY = """
cd /srv/mem
sha256sum --quiet -c big.sum
test $(ls | grep -x '[0-9a-f]*' | wc -l) -ge 5
for each in $(ls | grep -x '[0-9a-f]*'); do
    sum=$(sha256sum $each)
    [ ${sum%% *} = $each ] || { echo $each is not what was written; exit 1; }
done
btrfs scrub start -B . | grep 'no errors found'
"""
BEGUN = "until [ -e /sys/fs/btrfs/*/devinfo/0 ]; do sleep 0.1; done"
"""btrfs has the target of a replace."""
FINISHED = "until unlock operation show | grep -q 'no operation'; do sleep 1; done"


@pytest.fixture
def machine(tmp_path: Path) -> Iterator[Machine]:
    made = unmeasured().clone(tmp_path / "machine")
    for serial in ("m1", "m2", "m3", "m4", "m5"):
        made.disk(serial, 3200)
    made.disk("small", 200)
    yield made
    shutil.rmtree(made.home, ignore_errors=True)


def start_writer(console: Guest) -> None:
    console.write("/root/writer", WRITER.encode())
    console.sh("systemd-run --quiet --unit=writer -p RequiresMountsFor=/srv/mem sh /root/writer")


def is_in_service(console: Guest) -> bool:
    return console.sh("systemctl is-active srv-mem.mount writer").out.split() == ["active", "active"]


def members(console: Guest) -> dict[str, str]:
    """Mapping name -> serial number of the disk, of the group and, the same, of its btrfs."""
    state = json.loads(console.read("/var/lib/unlock/state.json"))
    known = {each["name"]: each["serial"] for each in state["groups"]["mem"]["members"]}
    nodes = console.sh("btrfs filesystem show /srv/mem | grep -o '/dev/mapper/.*'").out.split()
    assert {os.path.basename(each) for each in nodes} == known.keys()
    return known


def refusals(console: Guest, machine: Machine) -> None:
    """Bad input: words, and nothing is changed."""
    before = console.read("/var/lib/unlock/state.json")
    free, small, mounted = (machine.disks[each].device for each in ("m3", "small", "late-1"))
    for command, code in {
        f"disk add {free} --group nothing": "usage",
        f"disk add {free} --group root": "root-needs",
        f"disk add {free} --group late": "separate-disk",
        f"disk add {free} --group mem --no-filesystem": "separate-disk",
        f"disk add {mounted} --group mem": "member",
        "disk add /dev/mapper/root --group mem": "in-use",
        f"disk add /dev/disk/by-id/lab-root --group mem --erase {mounted}": "usage",
        "disk add /dev/disk/by-id/nothing --group mem": "usage",
        "disk remove mem-a": "too-few-disks",
        "disk remove mem-a --no-migrate": "in-use",
        "disk remove late-a": "last-member",
        "disk remove root": "last-member",
        f"disk remove {free}": "not-a-member",
        f"disk replace mem-a {small}": "too-small",
        f"disk replace late-a {free}": "other-file-system",
        f"disk replace mem-a {mounted}": "member",
        "disk replace mem-a /dev/mapper/mem-b": "in-use",
        "group grow nothing": "usage",
    }.items():
        key = KEY if command.startswith(("disk add", "disk replace")) else ""
        done = console.sh(f"unlock {command} --json {key}", check=False)
        error = json.loads(done.out)["error"]
        assert (error["code"], bool(error["hint"])) == (code, True), (command, error)
    assert console.read("/var/lib/unlock/state.json") == before


def test_a_group_lives_for_years(machine: Machine) -> None:
    m1, m2, m3, m4, m5 = (machine.disks[each].device for each in ("m1", "m2", "m3", "m4", "m5"))
    with machine.boot(memory="900M") as booted:
        console = up(booted)
        console.write("/run/key", f"{machine.recovery_key}\n".encode(), 0o600)
        console.sh(f"unlock group create mem --disk {m1} {m2} --mount /srv/mem --discard {KEY}", timeout=240)
        console.sh("cd /srv/mem; head -c 200M /dev/urandom >big; sha256sum big >big.sum; sync big", timeout=240)
        refusals(console, machine)
        start_writer(console)

        plan = console.sh(f"unlock disk add {m3} --group mem --dry-run").out
        assert plan.splitlines()[-1] == "4. btrfs device add /dev/mapper/mem-c /srv/mem"
        console.sh(f"unlock disk add {m3} --group mem {KEY}", timeout=240)
        assert members(console) == {"mem-a": "m1", "mem-b": "m2", "mem-c": "m3"}
        console.sh(f"cryptsetup luksDump {m3} | grep 'Flags:.*allow-discards'")

        # the disk by which it is mounted leaves; killed while its data moves
        console.sh("systemd-run --quiet --unit=leaving -p KeyringMode=shared unlock disk remove mem-a")
        console.sh("until [ $(cat /sys/fs/btrfs/*/exclusive_operation | grep -c remove) = 1 ]; do sleep 0.1; done")
        console.sh("systemctl kill --signal=SIGKILL leaving; systemctl reset-failed leaving", check=False)
        assert "unlock disk remove mem-a" in console.sh("unlock operation show").out
        refused = json.loads(console.sh(f"unlock disk replace mem-b {m4} --json", check=False).out)
        assert refused["error"]["code"] == "unfinished"
        console.sh("unlock disk remove mem-a", timeout=240)
        assert members(console) == {"mem-b": "m2", "mem-c": "m3"}
        assert is_in_service(console) and not console.sh("ls /dev/mapper | grep mem-a", check=False).out
        console.sh(f"cryptsetup open --test-passphrase --key-file=- {m1}", stdin=machine.recovery_key.encode())
        assert json.loads(console.sh(f"unlock disk add {m1} --group mem --json", check=False).out)["error"]["code"] == (
            "has-data"
        )

        # a power cut while another one is replaced
        console.sh(f"systemd-run --quiet --unit=new -p KeyringMode=shared unlock disk replace mem-b {m4} {KEY}")
        console.sh(BEGUN, timeout=120)
        booted.kill()

    with (machine.home / "m3.raw").open("r+b") as file:
        file.truncate(3300 << 20)
    with machine.boot(memory="900M") as booted:
        console = up(booted)
        console.sh(FINISHED, timeout=180)
        assert members(console) == {"mem-c": "m3", "mem-a": "m4"}
        assert status(console)["mem"] == "open" and checked(console)["mem"] in ("safe", "unproven")
        console.sh(VERIFY, timeout=240)
        start_writer(console)
        size = int(console.sh("blockdev --getsize64 /dev/mapper/mem-c").out)  # the boot has opened it as large as it is
        assert size > 3200 << 20
        assert "make the btrfs on /srv/mem larger" in console.sh("unlock group grow mem --dry-run").out
        grown = json.loads(console.sh("unlock group grow mem --json").out)["disks"]
        assert {each["name"]: each["after"] - each["before"] for each in grown} == {"mem-a": 0, "mem-c": 0}
        assert f"size {size} " in console.sh("btrfs filesystem show --raw /srv/mem").out
        assert "nothing" in console.sh("unlock group grow mem --dry-run").out
        assert is_in_service(console)

        # a disk dies
        console.write("/run/key", f"{machine.recovery_key}\n".encode(), 0o600)
        console.sh("systemctl stop writer srv-mem.mount; cryptsetup close mem-a; btrfs device scan --forget")
        booted.unplug(machine.disks["m4"])
        console.sh(f"until [ ! -e {m4} ]; do sleep 0.1; done; mount -o degraded /dev/mapper/mem-c /srv/mem")
        done = console.sh(f"unlock disk replace mem-a {m5} --json {KEY}", timeout=240)
        assert (json.loads(done.out)["absent"], members(console)) == (True, {"mem-c": "m3", "mem-b": "m5"})
        console.sh(json.loads(done.out)["next"], timeout=240)
        console.sh(VERIFY, timeout=240)
        booted.poweroff()

    with machine.boot(memory="900M") as booted:  # the dead disk is back
        console = up(booted)
        assert members(console) == {"mem-c": "m3", "mem-b": "m5"}
        assert status(console)["mem"] == "open" and checked(console)["mem"] in ("safe", "unproven")
        assert not console.sh("ls /dev/mapper | grep mem-a", check=False).out
        console.sh(VERIFY, timeout=240)
        booted.kill()
