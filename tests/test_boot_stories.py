# SPDX-License-Identifier: Apache-2.0
"""What a user lives through, in real virtual machines: each boot is a story, and one boot carries many groups.

A machine is enrolled once with each firmware (the product's own commands, in the guest), powered off, and then
cloned for each story. None of them has a network card.
"""

import json
import re
import shutil
import uuid
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.lab import guest, image, luks
from tests.lab.machine import RECOVERY, SENT, Machine, agent_commands, report
from tests.lab.vm import VM, Disk

pytestmark = pytest.mark.vm

CAPPED = "C07F2888CEEB55738145657AC754AA052AC7CB24FAF81D0857304456E7589499"
"""PCR 15 after the cap and nothing else: SHA-256(32 zero bytes || SHA-256("unlock cap"))."""
UNSEAL = """
import sys
sys.path.insert(0, "/usr/lib/unlock")
from unlock import slots, tpm
from unlock.errors import UnlockError
try:
    with tpm.Tpm() as chip:
        slots.unseal(chip)
except UnlockError as error:
    print(error.code)
else:
    print("UNSEALED")
"""
"""What root could try after the cap."""


def up(machine: VM) -> guest.Guest:
    """Waits until the machine has booted, well or degraded; no job may be left."""
    machine.guest.booted()
    return machine.guest


def outcomes(console: guest.Guest) -> dict[str, str]:
    """Mapping name, or serial number of a disk that has none, -> outcome."""
    serials = json.loads(console.sh("lsblk --json --nodeps -o PATH,SERIAL").out)["blockdevices"]
    names = {each["path"]: each["serial"] for each in serials}
    return {names.get(each["node"], each["node"]): each["outcome"] for each in report(console)["disks"]}


def status(console: guest.Guest) -> dict[str, str]:
    """Group -> state."""
    return {each["name"]: each["state"] for each in json.loads(console.sh("unlock status --json").out)["groups"]}


def pcr(console: guest.Guest, number: int) -> str:
    return console.sh(f"cat /sys/class/tpm/tpm0/pcr-sha256/{number}").out


def unseal_as_root(console: guest.Guest) -> str:
    return console.sh(f"python3 -I -c '{UNSEAL}'").out


def enroll(machine: Machine, init: str, groups: dict[str, tuple[str, ...]], sizes: dict[str, int]) -> None:
    """Boots with the root's passphrase and does what the README says, unattended."""
    for serials in groups.values():
        for serial in serials:
            machine.disk(serial, sizes.get(serial, 40))
    with machine.boot() as booted:
        booted.console.expect("unlock disk root", 240)
        booted.console.send(image.PASSPHRASE + "\n")
        console = up(booted)
        console.write("/root/password", b"of the backup\n", 0o600)
        console.write("/root/passphrase", image.PASSPHRASE.encode(), 0o600)
        console.sh(f"unlock init --backup /root/kdk.backup --backup-password-file /root/password {init}", timeout=180)
        again = console.sh("unlock init --backup /root/x --backup-password-file /root/password", check=False)
        assert (again.code, again.err.splitlines()[0]) == (3, "unlock: this host is initialised already")
        adopt = f"unlock disk adopt /dev/disk/by-uuid/{image.LUKS_UUID} --group root --passphrase-file /root/passphrase"
        before = console.sh("cryptsetup luksDump /dev/disk/by-uuid/" + image.LUKS_UUID).out
        console.sh(f"{adopt} --recovery-key-file {RECOVERY}", timeout=120)
        console.sh(f"{adopt} --recovery-key-file {RECOVERY}", timeout=120)  # twice is once
        after = console.sh("cryptsetup luksDump /dev/disk/by-uuid/" + image.LUKS_UUID).out
        assert re.search(r"  0: luks2\n(\t.*\n)+", before)[0] in after  # type: ignore[index]
        assert "root UUID=" in console.read("/etc/crypttab").decode()
        for name, serials in groups.items():
            create = f"unlock group create {name} --disk {machine.devices(*serials)} --mount /srv/{name}"
            create += f" --recovery-key-file {RECOVERY}"
            console.sh(create, timeout=240)
            if name in ("data", "pair"):
                again = console.sh(create, check=False)
                assert (again.code, f"there is a group {name} already" in again.err) == (3, True)
            console.sh(
                f"head -c 3000000 /dev/urandom > /srv/{name}/blob; sha256sum /srv/{name}/blob >> /root/sums; sync"
            )
            start = f"touch /srv/{name}/ran; exec sleep infinity"
            service = f"[Unit]\nRequiresMountsFor=/srv/{name}\n[Service]\nExecStart=/bin/sh -c '{start}'\n"
            service += "[Install]\nWantedBy=multi-user.target\n"
            console.write(f"/etc/systemd/system/app-{name}.service", service.encode())
        console.sh("systemctl --quiet enable " + " ".join(f"app-{name}.service" for name in groups))
        states = status(console)
        assert states == dict.fromkeys(["root", *groups], "open")
        (machine.home / "recovery-key").write_bytes(console.read(RECOVERY))
        slow = r"/^\[group.\(pair\|ruined\|far\)\]/a deadline = 25"
        console.sh(f"sed -i '{slow}' /etc/unlock/unlock.toml; rm /root/recovery /root/password /root/passphrase")
        booted.poweroff()


@pytest.fixture(scope="session")
def measured(tmp_path_factory: pytest.TempPathFactory) -> Machine:
    """Enrolled under UEFI, which measures kernel, initramfs and command line: a LUKS root and three disks."""
    machine = Machine(tmp_path_factory.mktemp("measured"), image.build("luks"), uefi=True)
    enroll(machine, "", {"data": ("d1", "d2", "d3")}, dict.fromkeys(("d1", "d2", "d3"), 200))
    return machine


@pytest.fixture(scope="session")
def unmeasured(tmp_path_factory: pytest.TempPathFactory) -> Machine:
    """Enrolled under a firmware that measures nothing, with many groups."""
    machine = Machine(tmp_path_factory.mktemp("bios"), image.build("luks"))
    groups: dict[str, tuple[str, ...]] = {each: (f"{each}-1",) for each in ("late", "copy", "ruined", "twin", "far")}
    groups["pair"] = ("pair-1", "pair-2")
    enroll(machine, "--accept unmeasured-boot", groups, {"pair-1": 200, "pair-2": 200})
    return machine


@pytest.fixture
def story(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Machine]:
    """A clone of the enrolled machine that the test is parametrized with."""
    machine: Machine = request.getfixturevalue(request.param)
    yield machine.clone(tmp_path / "machine")
    shutil.rmtree(tmp_path / "machine", ignore_errors=True)


on_measured = pytest.mark.parametrize("story", ["measured"], indirect=True)
on_unmeasured = pytest.mark.parametrize("story", ["unmeasured"], indirect=True)


@on_measured
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


@on_measured
def test_an_edited_command_line_is_refused_and_the_recovery_key_still_opens_everything(story: Machine) -> None:
    with story.boot(append="init=/bin/bash") as booted:
        booted.console.expect("cannot unseal: .*PCR", 240)
        booted.console.expect("recovery key: ", 60)
        booted.kill()
    with story.boot(append="quiet") as booted:
        booted.console.expect("recovery key: ", 240)
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


@on_unmeasured
def test_one_boot_with_many_faults(story: Machine, tmp_path: Path) -> None:
    """Every group has a fault of its own, and no fault reaches another group."""
    home = story.home
    luks.ruin(home / "copy-1.raw", copy=0)
    for copy in (0, 1):
        luks.ruin(home / "ruined-1.raw", copy=copy)
    shutil.copyfile(home / "twin-1.raw", home / "twin-2.raw")
    story.disks["twin-2"] = Disk("twin-2.raw", "twin-2")
    shutil.copyfile(home / "far-1.raw", home / "far-a.raw")  # both copies have serials that the token does not name
    shutil.copyfile(home / "far-1.raw", home / "far-b.raw")
    del story.disks["far-1"]
    story.disks |= {each: Disk(f"{each}.raw", each) for each in ("far-a", "far-b")}
    luks.format_disk(home / "foreign.raw", "of somebody else")
    story.disks["foreign"] = Disk("foreign.raw", "foreign")
    other_host(home / "twin-1.raw", home / "other.raw")
    story.disks = {"other": Disk("other.raw", "other")} | story.disks
    before = {each: (home / f"{each}.raw").read_bytes() for each in ("foreign", "other", "twin-2", "far-a", "far-b")}

    with story.boot(without=("late-1", "pair-2")) as booted:
        booted.guest.ready()
        console = booted.guest
        console.sh("until systemctl is-active --quiet sysinit.target; do sleep 1; done", timeout=120)
        found = outcomes(console)
        assert found == {
            "root": "opened",
            "copy-1": "opened",
            "twin-1": "opened",
            "twin-2": "duplicate",
            "far-a": "duplicate",
            "far-b": "duplicate",
            "pair-1": "waiting",
            "foreign": "foreign",
            "other": "other-host",
            "ruined-1": "damaged",
        }
        # a disk that comes late: until then its service has not written into the bare directory
        assert console.sh("systemctl is-active app-late.service", check=False).out in ("inactive", "activating")
        assert console.sh("ls -A /srv/late").out == ""
        booted.plug(story.disks["late-1"])
        console.sh("until systemctl is-active --quiet app-late.service; do sleep 1; done", timeout=120)
        console.sh("mountpoint -q /srv/late && test -e /srv/late/ran")

        # members that never come: the service fails by dependency, within the deadline, and the host is up
        console.sh("systemctl is-system-running --wait", check=False, timeout=300)
        assert console.sh("systemctl list-jobs --no-legend").out == ""
        assert console.sh("systemctl is-active multi-user.target").out == "active"
        for group in ("pair", "ruined", "far"):
            assert console.sh(f"systemctl is-active unlock-group@{group}", check=False).out == "failed"
            assert console.sh(f"systemctl is-active app-{group}.service", check=False).out == "inactive"
            assert console.sh(f"ls -A /srv/{group}").out == ""
        assert "pair-b (serial pair-2) is missing" in console.sh("journalctl -b -u unlock-group@pair --no-pager").out
        assert console.sh("ls /dev/mapper").out.split() == ["control", "copy-a", "late-a", "root", "twin-a"]
        states = status(console)
        assert (states["pair"], states["ruined"], states["late"]) == ("missing", "missing", "open")

        # it heals, service included, when the disk is plugged in
        booted.plug(story.disks["pair-2"])
        console.sh("until systemctl is-active --quiet app-pair.service; do sleep 1; done", timeout=120)
        console.sh("mountpoint -q /srv/pair && test -e /srv/pair/ran && grep pair /root/sums | sha256sum --quiet -c")
        assert status(console)["pair"] == "open"
        assert console.sh("systemctl is-active app-ruined.service", check=False).out == "inactive"
        booted.poweroff()
    for each, content in before.items():
        assert (home / f"{each}.raw").read_bytes() == content, f"{each} was written to"


def other_host(source: Path, target: Path) -> None:
    """A disk like `source`, in a group of the same name, of another unlock host."""
    from tests.test_disk import edit

    shutil.copyfile(source, target)
    with target.open("r+b") as file:  # another UUID, as another host would have made it
        area = file.read(32768)
        old = re.search(rb"[0-9a-f]{8}-[0-9a-f-]{27}", area[:4096])
        assert old
        file.seek(0)
        file.write(area.replace(old[0], str(uuid.uuid4()).encode()))
    edit(str(target), lambda fields: [each.update(host="0" * 32) for each in fields["tokens"].values()])


@on_unmeasured
def test_without_its_tpm_the_host_asks_for_the_recovery_key(story: Machine) -> None:
    with story.boot(tpm=None) as booted:
        booted.console.expect("no TPM", 240)
        booted.console.expect("recovery key: ", 60)
        booted.console.send("\n")  # skip ours: the stock prompt takes it too
        booted.console.expect("unlock disk root", 60)
        booted.console.send(story.recovery_key + "\n")
        console = up(booted)
        assert report(console)["verdict"] == "no-tpm"
        assert outcomes(console)["root"] == "no-key"
        assert console.sh("systemctl is-active app-copy.service", check=False).out == "inactive"
        assert "there is no TPM" in console.sh("journalctl -b -u unlock-group@copy --no-pager").out
        booted.poweroff()


@on_unmeasured
def test_on_another_board_nothing_opens_by_itself(story: Machine) -> None:
    with story.boot(tpm="another") as booted:
        booted.console.expect("recovery key: ", 240)
        booted.console.send(story.recovery_key.replace("-", "") + "\n")  # without the dashes
        console = up(booted)
        assert report(console)["verdict"] == "no-slot"
        assert set(status(console).values()) == {"open"}
        console.sh("sha256sum --quiet -c /root/sums")
        assert pcr(console, 15) == CAPPED
        booted.poweroff()


TPM_LATE = """#!/bin/sh
[ "$1" != prereqs ] || exit 0
cd /sys/bus/acpi/drivers/tpm_crb
device=$(echo MSFT*)
echo "$device" > unbind
(sleep 8; echo "$device" > bind) >/dev/null 2>&1 &
"""


@on_unmeasured
def test_a_tpm_driver_that_comes_late_is_waited_for(story: Machine) -> None:
    late = story.image.initramfs({"scripts/init-top/late": TPM_LATE})
    with story.boot(initrd=late, without=tuple(story.disks)) as booted:
        console = up(booted)
        found = report(console)
        times = {kind: time for time, kind, _ in found["events"]}
        assert found["verdict"] == "unsealed"
        assert times["tpm"] - times["start"] > 2
        assert outcomes(console) == {"root": "opened"}
        ONE_DISK.extend(agent_commands(booted))
        booted.poweroff()


ONE_DISK: list[str] = []
"""The TPM commands of a boot with one disk."""


KILL_AGENT = """#!/bin/sh
[ "$1" != prereqs ] || exit 0
(until [ -s /run/unlock/agent.pid ]; do sleep 0.05; done; sleep 0.3; kill -KILL "$(cat /run/unlock/agent.pid)") &
"""


@on_unmeasured
def test_the_agent_is_killed_and_the_stock_prompt_takes_the_recovery_key(story: Machine) -> None:
    initrd = story.image.initramfs({"scripts/init-top/kill": KILL_AGENT})
    with story.boot(initrd=initrd, without=("late-1",)) as booted:
        booted.console.expect("unlock disk root", 240)
        booted.console.send(story.recovery_key + "\n")
        console = up(booted)
        assert pcr(console, 15) == CAPPED
        assert unseal_as_root(console) == "pcr-mismatch"
        assert console.sh("keyctl list @u; true").out.count("unlock:") == 0
        booted.poweroff()


@on_unmeasured
def test_the_panic_shell_finds_a_capped_tpm_and_closed_disks(story: Machine) -> None:
    early = story.image.initramfs(guest.EARLY)
    cmdline = story.image.cmdline.replace("panic=-1", "")
    with story.boot(initrd=early, cmdline=cmdline, append="break=bottom", without=("late-1",)) as booted:
        booted.console.expect(r"\(initramfs\)", 240)
        shell = booted.early
        shell.ready()
        assert shell.sh("cat /sys/class/tpm/tpm0/pcr-sha256/15").out == CAPPED
        assert unseal_as_root(shell) == "pcr-mismatch"
        mapped = set(shell.sh("ls /dev/mapper").out.split())
        assert mapped == {"control"}, "what the TPM opened is closed, the root file system too"
        assert "/root " not in shell.sh("cat /proc/mounts").out
        assert "unlock:" not in shell.sh("cat /proc/keys").out
        booted.kill()


@pytest.fixture(scope="module")
def many(tmp_path_factory: pytest.TempPathFactory) -> Machine:
    """A plain root file system and a group of 24 disks: what `init` refuses until it is told to, by name."""
    machine = Machine(tmp_path_factory.mktemp("many"), image.build("plain"))
    devices = " ".join(machine.disk(f"m{number:02}", 200) for number in range(24))
    with machine.boot() as booted:
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
    with many.boot() as booted:
        console = up(booted)
        found = report(console)
        assert found["verdict"] == "unsealed"
        assert len(found["disks"]) == 24
        assert {each["outcome"] for each in found["disks"]} == {"opened"}
        console.sh("sha256sum --quiet -c /root/sums")
        assert "not encrypted" in console.sh("unlock status").out
        ours = agent_commands(booted)
        assert [name for name in ours if name in SENT] == list(SENT)
        assert ours == ONE_DISK
        booted.poweroff()
