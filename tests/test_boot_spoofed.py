# SPDX-License-Identifier: Apache-2.0
"""Disks that pass for a group's: a file system is mounted only if it lies on the group's mappings alone."""

import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.lab.guest import Guest
from tests.lab.machine import Machine
from tests.lab.running import Disk
from tests.lab.stories import status, unmeasured, up

pytestmark = pytest.mark.vm

CODE = "/usr/lib/unlock/unlock/boot/mount.py"
GENERATOR = "/usr/lib/systemd/system-generators/unlock-generator"
TAKE_AWAY = """
set -e
systemctl stop app-pair.service srv-pair.mount
fsid=$(blkid -s UUID -o value /dev/mapper/pair-a)
"""
TURNS = """
mkdir -p /mnt
touch /mnt/of-the-thief
for each in $(seq 40); do echo $each >/mnt/turn; sync -f /mnt; done
umount /mnt
btrfs device scan --forget
"""
"""Its generation is higher then."""
MADE = """
cryptsetup close pair-a
cryptsetup close pair-b
btrfs device scan --forget
mkfs.btrfs -q -f -U $fsid -d raid1 -m raid1 {first} {second}
mount {first} /mnt
"""
"""A btrfs of the same id, on two plain disks."""
CLONED = """
dd if=/dev/mapper/pair-b of={second} bs=1M status=none
btrfs device scan --forget
btrfs device scan /dev/mapper/pair-a {second}
mount /dev/mapper/pair-a /mnt
"""
"""One member was copied to a new disk, which was then used in its place: no attacker is needed for that."""


@pytest.fixture(params=[MADE, CLONED], ids=["made", "cloned"])
def story(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Machine]:
    """A machine with disks that pass for those of its group of two."""
    machine = unmeasured().clone(tmp_path / "machine")
    for each, like in {"thief-1": "pair-1", "thief-2": "pair-2"}.items():
        with (machine.home / f"{each}.raw").open("wb") as file:
            file.truncate((machine.home / f"{like}.raw").stat().st_size)
        machine.disks[each] = Disk(f"{each}.raw", each)
    with machine.boot() as booted:
        first, second = (machine.disks[each].device for each in ("thief-1", "thief-2"))
        script = (TAKE_AWAY + request.param + TURNS).format(first=first, second=second)
        console = up(booted)
        console.sh(script, timeout=120)
        console.sh(f"cp -a {CODE} /root; sed -i '/forget_copies/d' {CODE}")
        booted.poweroff()
    yield machine
    shutil.rmtree(machine.home, ignore_errors=True)


def below(console: Guest) -> list[str]:
    """The devices of what is mounted on /srv/pair."""
    return sorted(console.sh("btrfs filesystem show /srv/pair | grep -o '/dev/[^ ]*'", check=False).out.split())


def test_what_passes_for_a_group_is_not_mounted_in_its_place(story: Machine) -> None:
    with story.boot() as booted:  # the kernel prefers it; that is seen before anybody else sees it
        console = up(booted)
        console.sh("journalctl -b -o cat | grep 'what was mounted on /srv/pair lies on .*no disk of the group'")
        assert console.sh("mountpoint -q /srv/pair || ls -A /srv/pair", check=False).out == ""
        assert console.sh("systemctl is-active app-pair.service", check=False).out == "inactive"
        console.sh(f"sed -i 's/Type={{kind}}/Type=btrfs/' {GENERATOR}")
        booted.poweroff()
    own = ["/dev/mapper/pair-a", "/dev/mapper/pair-b"]
    with story.boot() as booted:  # without a look, what is written goes to the thief
        console = up(booted)
        assert below(console) != own
        console.sh("test -e /srv/pair/of-the-thief -a -e /srv/pair/ran")
        console.sh(f"sed -i 's/Type=btrfs/Type={{kind}}/' {GENERATOR}; mv /root/mount.py {CODE}")
        booted.poweroff()
    with story.boot() as booted:  # the kernel is told to forget it, and the group's own is mounted
        console = up(booted)
        assert below(console) == own
        console.sh("grep pair /root/sums | sha256sum --quiet -c && systemctl is-active app-pair.service")
        assert status(console)["pair"] == "open"
        booted.kill()
