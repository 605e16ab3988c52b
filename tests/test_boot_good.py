# SPDX-License-Identifier: Apache-2.0
"""Boots of a host as it should be, of one whose command line was edited, and of one with 24 disks."""

import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.lab import image
from tests.lab.machine import RECOVERY, SENT, Machine, agent_commands, report
from tests.lab.stories import CAPPED, enroll, outcomes, pcr, status, unseal_as_root, up

pytestmark = pytest.mark.vm


@pytest.fixture(scope="module")
def measured(tmp_path_factory: pytest.TempPathFactory) -> Machine:
    """Enrolled under UEFI, which measures kernel, initramfs and command line: a LUKS root and three disks."""
    machine = Machine(tmp_path_factory.mktemp("measured"), image.build("luks"), uefi=True)
    enroll(machine, "", {"data": ("d1", "d2", "d3")}, dict.fromkeys(("d1", "d2", "d3"), 200))
    return machine


@pytest.fixture
def story(measured: Machine, tmp_path: Path) -> Iterator[Machine]:
    """A clone of the enrolled machine."""
    yield measured.clone(tmp_path / "machine")
    shutil.rmtree(tmp_path / "machine", ignore_errors=True)


def test_a_host_boots_offline_again_and_again(story: Machine) -> None:
    for _ in range(2):
        with story.boot() as booted:
            console = up(booted)
            assert report(console)["verdict"] == "unsealed"
            assert outcomes(console) == dict.fromkeys(("root", "d1", "d2", "d3"), "opened")
            assert status(console) == {"root": "open", "data": "open"}
            console.sh("sha256sum --quiet -c /root/sums && systemctl is-active app-data.service srv-data.mount")
            assert console.sh("systemctl --failed --no-legend").out == ""
            assert pcr(console, 15) == CAPPED
            assert unseal_as_root(console) == "pcr-mismatch"
            assert "recovery" not in booted.console.text
            ours = agent_commands(booted)
            assert [name for name in ours if name in SENT] == list(SENT)
            assert len(ours) <= 45
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
        console = up(booted)
        found = report(console)
        assert found["verdict"] == "pcr-mismatch"
        assert "PCR" in found["detail"]
        assert status(console) == {"root": "open", "data": "open"}
        console.sh("sha256sum --quiet -c /root/sums")
        assert console.sh("keyctl list @u; true").out.count("unlock:") == 0
        assert pcr(console, 15) == CAPPED
        assert unseal_as_root(console) == "pcr-mismatch"
        booted.poweroff()


@pytest.fixture(scope="module")
def many(tmp_path_factory: pytest.TempPathFactory) -> Machine:
    """A plain root file system and a group of 24 disks: what `init` refuses until it is told to, by name."""
    machine = Machine(tmp_path_factory.mktemp("many"), image.build("plain"))
    devices = " ".join(machine.disk(f"m{number:02}", 200) for number in range(24))
    with machine.boot(cores=2) as booted:
        console = up(booted)
        console.write("/root/password", b"of the backup\n", 0o600)
        init = "unlock init --backup /root/kdk.backup --backup-password-file /root/password"
        refused = console.sh(init, check=False)
        assert (refused.code, "--accept unmeasured-boot" in refused.err) == (3, True)
        refused = console.sh(f"{init} --accept unmeasured-boot", check=False)
        assert (refused.code, "--accept unauthenticated-root" in refused.err) == (3, True)
        assert console.sh("ls /root/kdk.backup /var/lib/unlock", check=False).out == ""
        console.sh(f"{init} --accept unmeasured-boot --accept unauthenticated-root", timeout=120)
        create = f"unlock group create many --disk {devices} --mount /srv/many --profile single"
        console.sh(f"{create} --recovery-key-file {RECOVERY}", timeout=600)
        console.sh("head -c 3000000 /dev/urandom > /srv/many/blob; sha256sum /srv/many/blob > /root/sums; sync")
        booted.poweroff()
    return machine


def test_twenty_four_disks_cost_the_tpm_no_more_than_one(many: Machine) -> None:
    with many.boot(without=tuple(f"m{number:02}" for number in range(1, 24))) as booted:
        booted.guest.ready(360)
        assert len(report(booted.guest)["disks"]) == 1
        one = agent_commands(booted)
        booted.kill()
    with many.boot(cores=2) as booted:
        console = up(booted)
        found = report(console)
        assert found["verdict"] == "unsealed"
        assert len(found["disks"]) == 24
        assert {each["outcome"] for each in found["disks"]} == {"opened"}
        console.sh("sha256sum --quiet -c /root/sums")
        assert "not encrypted" in console.sh("unlock status").out
        reached = agent_commands(booted)
        assert [name for name in reached if name in SENT] == list(SENT)
        assert reached == one
        print(f"TPM: {len(SENT)} commands sent, {len(reached)} reached it, for 1 disk and for 24")
        booted.poweroff()
