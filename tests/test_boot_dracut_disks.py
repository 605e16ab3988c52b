# SPDX-License-Identifier: Apache-2.0
"""What lies below and above the root's disk, and what rd.luks.* says of it, on a host whose initramfs dracut makes."""

import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.lab import attacks, image
from tests.lab.image import LUKS_UUID
from tests.lab.luks import format_disk
from tests.lab.machine import RECOVERY, Machine, report
from tests.lab.running import Disk
from tests.lab.stories import checked, open_shell, outcomes, status, unmeasured, up
from tests.test_boot_attacks import give_recovery_key
from tests.test_boot_degraded_root import TELL_TPM
from tests.test_boot_dracut import FORCE, MODULE, STOCK, in_shell
from tests.test_boot_dracut import story as story
from tests.test_disk import edit

pytestmark = pytest.mark.vm

STACK = """
set -e
mdadm --quiet --create /dev/md/lab --metadata=1.2 --level=1 --raid-devices=2 --assume-clean --bitmap=none --run {0} {1}
udevadm settle
vgcreate -qq below /dev/md/lab && lvcreate -qq -y -n disk -l 100%FREE below
cryptsetup luksFormat -q --pbkdf pbkdf2 --pbkdf-force-iterations 1000 --key-file {2} /dev/below/disk
cryptsetup open --key-file {2} /dev/below/disk sys
unlock disk adopt /dev/below/disk --group sys --passphrase-file {2} --recovery-key-file {2}
vgcreate -qq above /dev/mapper/sys && lvcreate -qq -y -n root -l 100%FREE above
mkfs.ext4 -q /dev/above/root
mkdir /srv/sys && mount /dev/above/root /srv/sys
cp -ax / /srv/sys
cd /srv/sys
echo '/dev/mapper/above-root / ext4 defaults 0 0' >etc/fstab
echo "sys UUID=$(blkid -s UUID -o value /dev/below/disk) none luks" >etc/crypttab
sed -i /^mount/d etc/unlock/unlock.toml
echo of the root >root/kept
"""
NAMES = "echo $(blkid -s UUID -o value /dev/below/disk) $(mdadm --detail --export /dev/md/lab | sed -n s/MD_UUID=//p)"
UNORDERED = (f"{MODULE}/keydev.mount.conf", "After=unlock-initrd-cap.service\n", "")
"""A disk with a key file is mounted as soon as it is there."""
UNHELD = (f"{MODULE}/systemd-cryptsetup@.conf", "ExecCondition=/usr/lib/unlock/early cryptsetup %I\n", "")
"""systemd-cryptsetup asks for and opens what it likes, after unlock."""
KEY = """#!/bin/sh
(umask 077; printf '{}' >/etc/root.key)
"""
KEY_FILE = {"scripts/init-top/key": KEY.format(image.PASSPHRASE)}
"""An image with a key file for the root's disk."""
STARTED = "39f53479d3a045ac8e11786248231fbf"
"""The MESSAGE_ID of systemd for a unit that was started."""


@pytest.fixture
def stack(tmp_path: Path) -> Iterator[Machine]:
    """A clone of an enrolled machine that has mdadm, with two more disks."""
    made = unmeasured(builder="dracut", programs=" mdadm").clone(tmp_path / "machine")
    for serial in ("half-1", "half-2"):
        made.disk(serial, 2600)
    yield made
    shutil.rmtree(tmp_path / "machine", ignore_errors=True)


@pytest.mark.long(minutes=4)
def test_an_image_for_this_host_alone_opens_all_its_groups(story: Machine, tmp_path: Path) -> None:
    """dracut leaves out what the root file system does not lie on, when it is told to; data disks are none of that."""
    initrd = tmp_path / "initrd"
    with story.boot() as booted:
        console = up(booted)
        console.sh("dracut --quiet --force --hostonly --hostonly-cmdline /var/tmp/initrd", timeout=280)
        console.sh("lsinitrd /var/tmp/initrd | grep -q 'etc/cmdline.d/.*crypt'")
        initrd.write_bytes(console.read("/var/tmp/initrd"))
        booted.poweroff()
    with story.boot(initrd=initrd) as booted:
        console = up(booted)
        assert report(console)["verdict"] == "unsealed"
        assert set(outcomes(console).values()) == {"opened"}
        assert set(status(console).values()) == {"open"}
        assert STOCK not in booted.console.text and "recovery key" not in booted.console.text
        booted.poweroff()


@pytest.mark.long(minutes=5)
def test_a_root_on_lvm_above_its_disk_which_lies_on_lvm_and_md(stack: Machine) -> None:
    others = tuple(each for each in stack.disks if not each.startswith("half"))
    with stack.boot(memory="900M") as booted:
        console = up(booted)
        console.write(RECOVERY, stack.recovery_key.encode(), 0o600)
        halves = (stack.disks[each].device for each in ("half-1", "half-2"))
        console.sh(STACK.format(*halves, RECOVERY), timeout=280)
        console.sh(TELL_TPM.format("/srv/sys", "/dev/below/disk", RECOVERY), timeout=120)
        luks, array = console.sh(NAMES).out.split()
        booted.kill()
    words = f"rd.luks.name={luks}=sys rd.lvm.vg=below rd.lvm.vg=above rd.md.uuid={array} rd.retry=15"
    root = stack.image.cmdline.replace("root=/dev/mapper/root", "root=/dev/mapper/above-root")
    cmdline = f"{root.partition(' rd.luks')[0]} {words}"
    with stack.boot(memory="900M", without=others, cmdline=cmdline) as booted:
        console = up(booted)
        assert report(console)["verdict"] == "unsealed"
        assert console.sh("findmnt -no SOURCE /; cat /root/kept").out.splitlines() == [
            "/dev/mapper/above-root",
            "of the root",
        ]
        console.sh("test -e /run/unlock/authentic; grep -qx sys /run/unlock/needed")
        assert (status(console)["sys"], checked(console)["sys"]) == ("open", "safe")
        assert STOCK not in booted.console.text and "recovery key" not in booted.console.text
        booted.poweroff()
    with stack.boot(memory="900M", without=(*others, "half-2"), cmdline=cmdline) as booted:  # dead, so it comes late
        console = up(booted)
        assert report(console)["verdict"] == "unsealed"
        console.sh("test -e /run/unlock/authentic; grep -q '_U\\|U_' /proc/mdstat")
        assert STOCK not in booted.console.text and "recovery key" not in booted.console.text
        booted.poweroff()


def test_systemd_cryptsetup_opens_nothing_that_the_agent_refused(story: Machine) -> None:
    """The host's own command line has a key file for its root disk, which would open what a thief put behind its
    header."""
    attacks.plaintext_root(story)
    edit(str(story.home / "root.raw"), drop_token)
    options = f"{FORCE} rd.luks.key={LUKS_UUID}=/etc/root.key rd.luks.options={LUKS_UUID}=headless"
    for changes in ((), (UNHELD,)):
        with story.boot(append=options, initrd=story.image.initramfs(KEY_FILE, changes)) as booted:
            give_recovery_key(booted, story)
            booted.console.expect("another header than this host wrote", 120)
            open_shell(booted)
            in_shell(booted, "systemctl restart systemd-cryptsetup@root")
            assert in_shell(booted, "ls /dev/mapper").split() == ["control", "root"][: 1 + len(changes)]
            assert STOCK not in booted.console.text
            booted.kill()


def drop_token(fields: dict[str, Any]) -> None:
    """Takes unlock's away."""
    fields["tokens"] = {number: each for number, each in fields["tokens"].items() if each["type"] != "unlock"}


@pytest.mark.long(minutes=3)
def test_systemd_cryptsetup_opens_other_disks_by_a_key_that_is_read_when_the_tpm_is_locked(story: Machine) -> None:
    """The disk with the key is anybody's. For the root systemd makes a name up. A data disk that the thief has changed
    would open by the key file that it has too."""
    other = "6c616220-6f74-4872-8000-6c756b730002"
    format_disk(story.home / "other.raw", "of the other", uuid=other)
    changed = story.home / story.disks["copy-1"].path
    attacks.plaintext_data(changed)
    bad = subprocess.run(["cryptsetup", "luksUUID", changed], check=True, capture_output=True, text=True).stdout.strip()
    stick = story.home / "stick"
    stick.mkdir()
    (stick / "key").write_text("of the other")
    with (story.home / "stick.raw").open("wb") as file:
        file.truncate(16 << 20)
    subprocess.run(["mkfs.ext4", "-q", "-L", "stick", "-d", stick, story.home / "stick.raw"], check=True)
    story.disks |= {each: Disk(f"{each}.raw", each) for each in ("other", "stick")}
    words = f"rd.luks.uuid={LUKS_UUID} rd.luks.name={other}=other rd.luks.key={other}=/key:LABEL=stick"
    words += f" rd.luks.name={bad}=bad rd.luks.key={bad}=/etc/root.key rd.luks.options=headless"
    cmdline = f"{story.image.cmdline.partition(' rd.luks')[0]} {words}"
    files = {"scripts/init-top/key": KEY.format(story.recovery_key)}
    for changes in ((), (UNORDERED, UNHELD)):
        initrd = story.image.initramfs(files, changes)
        with story.boot(cmdline=cmdline, tpm_delays={"Unseal": 6000}, initrd=initrd) as booted:
            console = up(booted)
            assert report(console)["verdict"] == "unsealed"
            console.sh("test -e /dev/mapper/other")
            assert STOCK not in booted.console.text
            units = console.sh(f"journalctl -b -o cat --output-fields=UNIT MESSAGE_ID={STARTED}").out.splitlines()
            mounted = units.index(r"run-systemd-cryptsetup-keydev\x2dother.mount")
            assert (mounted > units.index("unlock-initrd-cap.service")) == (not changes)
            assert console.sh("test -e /dev/mapper/bad", check=False).code == (0 if changes else 1)
            for told in (
                f"its disk is open as root: not opened as luks-{LUKS_UUID}",
                "its header is not the one that this host wrote: not opened as bad",
            ):
                assert (told in booted.console.text) == (not changes)
            booted.kill()


@pytest.mark.long(minutes=3)
def test_every_luks_disk_by_itself_and_no_stock_prompt_comes_before_the_root_is_there(story: Machine) -> None:
    """systemd makes a name up for each. The root's disk without its token is one of them."""
    cmdline = f"{story.image.cmdline.partition(' rd.luks')[0]} rd.auto rd.retry=10 {FORCE}"
    with story.boot(cmdline=cmdline) as booted:
        console = up(booted)
        assert report(console)["verdict"] == "unsealed"
        assert set(outcomes(console).values()) == {"opened"}
        assert STOCK not in booted.console.text
        booted.poweroff()
    attacks.plaintext_root(story)
    edit(str(story.home / "root.raw"), drop_token)
    for changes in ((), (UNHELD,)):
        with story.boot(cmdline=cmdline, initrd=story.image.initramfs(KEY_FILE, changes)) as booted:
            if changes:
                booted.console.expect(STOCK, 300)
            else:
                open_shell(booted)
                assert f"needs none of these mappings: not opened as luks-{LUKS_UUID}" in booted.console.text
                assert STOCK not in booted.console.text
            booted.kill()
