# SPDX-License-Identifier: Apache-2.0
"""Disks that pass for a group's: a file system is mounted only if it lies on the group's mappings alone."""

import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.lab.guest import Guest
from tests.lab.machine import Machine
from tests.lab.running import Disk
from tests.lab.stories import checked, status, unmeasured, up

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
        assert status(console)["pair"] == "spoofed"
        console.sh(f"sed -i 's/Type={{kind}}/Type=btrfs/' {GENERATOR}")
        booted.poweroff()
    own = ["/dev/mapper/pair-a", "/dev/mapper/pair-b"]
    with story.boot() as booted:  # without a look, what is written goes to the thief
        console = up(booted)
        assert below(console) != own
        assert (status(console)["pair"], checked(console)["pair"]) == ("spoofed", "unproven")
        console.sh("test -e /srv/pair/of-the-thief -a -e /srv/pair/ran")
        console.sh(f"sed -i 's/Type=btrfs/Type={{kind}}/' {GENERATOR}; mv /root/mount.py {CODE}")
        booted.poweroff()
    with story.boot() as booted:  # the kernel is told to forget it, and the group's own is mounted
        console = up(booted)
        assert below(console) == own
        console.sh("grep pair /root/sums | sha256sum --quiet -c && systemctl is-active app-pair.service")
        assert status(console)["pair"] == "open"
        booted.kill()


VOLUME = """
set -e
printf secret >/root/passphrase
cryptsetup luksFormat -q --type luks2 --pbkdf pbkdf2 --pbkdf-force-iterations 1000 {disk} /root/passphrase
cryptsetup open --key-file /root/passphrase {disk} vol-a
pvcreate -q /dev/mapper/vol-a
vgcreate -q pool /dev/mapper/vol-a
lvcreate -q -l 100%FREE -n data pool
mkfs.ext4 -q /dev/pool/data
vgchange -q -an pool
dd if=/dev/mapper/vol-a of={thief} bs=1M status=none
cryptsetup close vol-a
unlock disk adopt {disk} --group vol --name vol-a --passphrase-file /root/passphrase --recovery-key-file /root/key
"""
"""A group with a physical volume in it, and a copy of that on a plain disk."""


@pytest.mark.parametrize("defended", [True, False])
def test_a_late_group_is_not_in_service_beside_an_active_copy_of_its_volume(tmp_path: Path, defended: bool) -> None:
    machine = unmeasured().clone(tmp_path / "machine")
    disk, thief = machine.disk("vol-1", 64), machine.disk("thief-1", 48)
    with machine.boot() as booted:
        console = up(booted)
        console.write("/root/key", machine.recovery_key.encode())
        console.sh(VOLUME.format(disk=disk, thief=thief), timeout=120)
        if not defended:
            console.sh("sed -i '/    _refuse_active_copies(paths, name, /d' /usr/lib/unlock/unlock/boot/gate.py")
        booted.poweroff()
    with machine.boot(without=("vol-1",)) as booted:
        console = up(booted)
        console.sh("until [ -e /dev/pool/data ]; do sleep 0.1; done")
        booted.plug(machine.disks["vol-1"])
        done = console.sh(f"udevadm wait {disk}; systemctl start unlock-group@vol", check=False, timeout=120)
        if defended:
            console.sh("journalctl -b -o cat | grep 'has the LVM UUID of its disks, and its volume group is active'")
            assert (done.code, status(console)["vol"]) == (1, "spoofed")
            console.sh(f"vgchange -q -an pool && wipefs -qa {thief} && systemctl restart unlock-group@vol", timeout=120)
            assert status(console)["vol"] == "open"
        else:
            assert done.code == 0
            console.sh(f"lsblk -nspo NAME /dev/pool/data | grep $(realpath {thief})")
        booted.kill()
    shutil.rmtree(tmp_path / "machine", ignore_errors=True)
