# SPDX-License-Identifier: Apache-2.0
"""Boots of a host as it should be, of one whose command line was edited, with 24 disks, and on a plain root."""

import shutil
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.lab import image
from tests.lab.machine import REACHED, SENT, Machine, agent_commands, noted_in, report
from tests.lab.stories import (
    CAPPED,
    MEASURED,
    begun,
    checked,
    measured,
    outcomes,
    pcr,
    replayed,
    status,
    unmeasured,
    unseal_as_root,
    up,
)
from unlock.disks import disk_keys, luks
from unlock.disks.groups import Group, Member
from unlock.secret import Secret

pytestmark = [pytest.mark.vm, pytest.mark.always]


@pytest.fixture
def story(tmp_path: Path) -> Iterator[Machine]:
    """A clone of the enrolled machine."""
    yield measured().clone(tmp_path / "machine")
    shutil.rmtree(tmp_path / "machine", ignore_errors=True)


INTERRUPTED = """
import signal, sys
sys.path.insert(0, "/usr/lib/unlock")
from unlock.tpm.chip import Tpm
signal.signal(signal.SIGALRM, lambda *_: None)
with Tpm() as chip:
    signal.setitimer(signal.ITIMER_REAL, 0.0003, 0.0003)
    for _ in range(400):
        chip.read_pcrs(range(8))
    signal.setitimer(signal.ITIMER_REAL, 0)
print("answered")
"""
"""Signals while the TPM works: early boot is asked by SIGUSR1 to look at the disks again, whenever a script wants."""
BY_PYUDEV = """
import os, sys
sys.path.insert(0, "/usr/lib/unlock")
import pyudev
from unlock.disks import udev
theirs = {
    (each.device_node, each.sys_name, f"{os.major(each.device_number)}:{os.minor(each.device_number)}",
     each.properties.get("ID_SERIAL", ""), each.attributes.asint("size") * 512, each.is_initialized)
    for each in pyudev.Context().list_devices(subsystem="block").match_tag("unlock")
}
ours = {
    (each.node, each.sysname, each.number, each.serial, each.size, each.initialized > 0)
    for each in udev.marked_disks()
}
assert ours == theirs == {
    (each.node, each.sysname, each.number, each.serial, each.size, each.initialized > 0)
    for each in map(udev.find_disk, (node for node, *_ in theirs))
}, (ours, theirs)
print(len(ours))
"""
"""libudev as we call it and as pyudev does say the same of the marked disks."""


def test_a_host_boots_offline(story: Machine) -> None:
    with story.boot() as booted:
        console = up(booted)
        assert report(console)["verdict"] == "unsealed"
        assert outcomes(console) == dict.fromkeys(("root", "d1", "d2", "d3"), "opened")
        assert status(console) == {"root": "open", "data": "open"}
        console.sh("sha256sum --quiet -c /root/sums && systemctl is-active app-data.service srv-data.mount")
        assert console.sh("systemctl --failed --no-legend").out == ""
        assert pcr(console, 15) == CAPPED
        assert unseal_as_root(console) == "pcr-mismatch"
        assert replayed(console) >= MEASURED
        assert "recovery" not in booted.console.text
        assert console.sh(f"python3 -I -c '{BY_PYUDEV}'").out == "4"
        assert console.sh(f"python3 -I -c '{INTERRUPTED}'").out == "answered"
        assert checked(console) == {"": "safe", "root": "safe", "data": "safe"}
        ours = agent_commands(booted)
        assert [name for name in ours if name in SENT] == list(SENT)
        assert len(ours) <= 45
        assert noted_in(booted) == ["PCR_Read", "PCR_Read"]
        noted = dict(map(str.split, console.read("/run/unlock/pcrs").decode().splitlines()))
        assert noted == {str(number): pcr(console, number).lower() for number in range(15)}
        booted.poweroff()


def test_an_edited_command_line_is_refused_and_the_recovery_key_still_opens_everything(story: Machine) -> None:
    with story.boot(append="audit=0") as booted:
        booted.console.expect("cannot unseal: .*PCR", 300)
        booted.console.expect("recovery key: ", 60)
        wrong = story.recovery_key[:-1] + str((int(story.recovery_key[-1]) + 1) % 10)
        booted.console.send(wrong + "\n")
        booted.console.expect("group 8 of the recovery key is mistyped", 60)
        booted.console.expect("recovery key: ", 60)
        booted.console.send(story.recovery_key + "\n")
        booted.console.expect("PCR 9: the kernel command line changed", 120)
        console = up(booted)
        assert replayed(console) >= MEASURED
        found = report(console)
        assert found["verdict"] == "pcr-mismatch"
        assert "PCR" in found["detail"]
        assert status(console) == {"root": "open", "data": "open"}
        console.sh("sha256sum --quiet -c /root/sums")
        assert console.sh("keyctl list @u; true").out.count("unlock:") == 0
        assert pcr(console, 15) == CAPPED
        assert unseal_as_root(console) == "pcr-mismatch"
        booted.poweroff()


def test_a_plain_root_is_refused_until_it_is_accepted_by_name(tmp_path: Path) -> None:
    with Machine(tmp_path, image.build("plain")).boot() as booted:
        console = begun(booted)
        console.write("/root/password", b"of the backup\n", 0o600)
        init = "unlock init --backup /root/kdk.backup --backup-password-file /root/password"
        refused = console.sh(init, check=False)
        assert (refused.code, "--accept unmeasured-boot" in refused.err) == (3, True)
        refused = console.sh(f"{init} --accept unmeasured-boot", check=False)
        assert (refused.code, "--accept unauthenticated-root" in refused.err) == (3, True)
        assert console.sh("ls /root/kdk.backup /var/lib/unlock", check=False).out == ""
        console.sh(f"{init} --accept unmeasured-boot --accept unauthenticated-root", timeout=120)
        booted.kill()


def test_twenty_four_disks_cost_the_tpm_no_more_than_one(
    tmp_path: Path, record_property: Callable[[str, object], None]
) -> None:
    """Beside the root disk, whose boot alone is another test's."""
    many = unmeasured().clone(tmp_path / "machine")
    many.disks = {}
    add_group(many, "many", 24)
    with many.boot() as booted:
        console = begun(booted)
        found = report(console)
        assert found["verdict"] == "unsealed"
        assert outcomes(console) == {"root": "opened"} | dict.fromkeys(many.disks, "opened")
        reached = agent_commands(booted)
        assert [name for name in reached if name in SENT] == list(SENT)
        assert reached == list(REACHED)
        assert noted_in(booted) == ["PCR_Read", "PCR_Read"]
        sent = f"{len(SENT)} TPM commands sent, {len(reached)} reached it"
        record_property("shown", f"early boot: {sent}, for 1 disk and for 24")
        booted.kill()


def add_group(machine: Machine, name: str, count: int) -> None:
    """Disks of a group that only their tokens know of, made with the host's keys."""
    secrets = {name: Secret(bytes.fromhex(value)) for name, value in machine.secrets().items()}
    recovery = Secret(machine.recovery_key.encode())
    with luks.Container(str(machine.root_header(machine.home / "header"))) as root:
        (token,) = disk_keys.read_tokens(root, "")
    members = tuple(Member(str(uuid.uuid4()), f"{name}-{i:02}", f"{name}{i:02}") for i in range(count))
    group = Group(name, "lab/kek", 1, 1, members)
    with Secret.random(32) as kek, disk_keys.mac_key(recovery, token.host) as mac_key:
        keys = disk_keys.Keys(secrets["unlock:persistence"], secrets["unlock:host"], kek, mac_key)
        for member in members:
            machine.disk(member.serial, 24)
            path = str(machine.home / f"{member.serial}.raw")
            with Secret.random(64) as dek, luks.format(path, dek, uuid=member.uuid) as container:
                container.add_keyslot(dek, passphrase=recovery)
                each = disk_keys.make_token(container, token.host, group, member, dek, keys)
                disk_keys.write_token(path, each, dek, keys)
