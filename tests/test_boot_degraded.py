# SPDX-License-Identifier: Apache-2.0
"""A btrfs raid1 of two disks, one of which is dead: opened by hand, opened at boot, healed, and never mixed."""

import json
import os
import re
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from tests import killing
from tests.lab.guest import Guest
from tests.lab.machine import RECOVERY, Machine
from tests.lab.running import Running
from tests.lab.stories import begun, checked, findings, status, unmeasured, up

pytestmark = pytest.mark.vm

Show = Callable[[str, object], None]

BY_ITSELF = """
set -e
printf %s {key} | cryptsetup open --key-file - {device} lone
btrfs device scan --forget
mount -o degraded /dev/mapper/lone /mnt
echo {name} > /mnt/of-{name}
umount /mnt
cryptsetup close lone
"""
"""Another system writes to one disk of the group, as far as it can be opened with stock tools."""
SET_TOKENS = """
import sys
sys.path.insert(0, "/usr/lib/unlock")
from unlock.keys import access, rotation
from unlock.paths import Paths
with access.Work(Paths()) as work:
    print(rotation.set_degraded(work, work.state.groups["pair"], {allowed}).done)
"""
"""What `unlock group set` does for the group of the root file system."""
EARLY = """
import json, os, signal, sys, threading
sys.path.insert(0, "/usr/lib/unlock")
from unlock.boot import agent
from unlock.boot.activation import GroupOpener
from unlock.disks import disk_keys, udev
from unlock.host import keyring, report
from unlock.paths import Paths
agent.DEGRADED_AFTER = 3.0
paths, record = Paths("/tmp/early"), report.Report("early-boot")
os.makedirs(paths.run, exist_ok=True)
key = keyring.get("unlock:persistence")
opener = GroupOpener("", lambda header, token: disk_keys.unwrap_volume_key(header, token, key), record)
signals = agent.Signals()
threading.Timer(15, os.kill, (os.getpid(), signal.SIGTERM)).start()
agent.open_groups(paths, opener, udev.Monitor(), signals, record)
opener.stop(5)
opener.wipe()
print(json.dumps([record.group_outcome("pair"), {row.name: row.outcome for row in record.disks.values()}]))
"""
"""Early boot, which reads neither unlock.toml nor the state."""
KILLED = """
import os, sys
sys.path[:0] = ["/usr/lib/unlock", "/root"]
import killing
from unlock.disks import luks
from unlock.operations import consent, delete_group, heal_group, release_disk
from unlock.paths import Paths
from unlock.run import run
from unlock.secret import Secret
killing.PACKAGE = "/usr/lib/unlock/unlock"
what, step, recovery = sys.argv[1:]
of_a_disk = (luks.Container.activate, luks.deactivate, luks.Container.remove_token, luks.Container.add_keyslot)
steps = (run, *of_a_disk, luks.Container.remove_keyslot, os.replace, os.symlink, os.unlink)
work = {
    "delete": lambda: delete_group.delete_group(Paths(), "pair", recovery_file=recovery),
    "heal": lambda: heal_group.heal_group(Paths(), "pair", consent.agree),
    "release": lambda: release_disk.release_disk(
        Paths(), "/dev/disk/by-id/lab-copy-1", Secret(b"its owner's"), recovery_file=recovery
    ),
}
print(killing.killed_at(int(step), work[what], steps))
"""
"""`unlock group heal`, `group delete` or `disk release`, killed before or after a step that lasts."""
ARRAYS = """
set -e
encrypt() {{
    cryptsetup luksFormat -q --pbkdf pbkdf2 --pbkdf-force-iterations 1000 $2 /run/passphrase
    cryptsetup open --key-file /run/passphrase $2 $1
}}
adopt() {{
    unlock disk adopt $2 --group ${{1%-?}} --passphrase-file /run/passphrase --recovery-key-file {4}
}}
use() {{
    unlock group set $1 --degraded allow
    sed -i "/^.group.$1/a degraded_after = 5" /etc/unlock/unlock.toml
    mkfs.ext4 -q $2
    mkdir /srv/$1
    echo "$2 /srv/$1 ext4 nofail,x-systemd.requires=unlock-group@$1.service 0 0" >>/etc/fstab
}}
printf secret >/run/passphrase
for each in 'array-a {0}' 'array-b {1}' 'volume-a {2}' 'volume-b {3}'; do encrypt $each; done
mdadm --quiet --create /dev/md/array --metadata=1.2 --level=1 --raid-devices=2 --assume-clean --bitmap=internal --run \\
    /dev/mapper/array-a /dev/mapper/array-b
vgcreate -qq pool /dev/mapper/volume-a /dev/mapper/volume-b
lvcreate -qq -y --type raid1 -m 1 --nosync -L 64M -n data pool
for each in 'array-a {0}' 'array-b {1}' 'volume-a {2}' 'volume-b {3}'; do adopt $each; done
use array /dev/md/array
use volume /dev/pool/data
systemctl daemon-reload
mount /srv/array && mount /srv/volume
head -c 8M /dev/urandom | tee /srv/array/blob >/srv/volume/blob
sha256sum /srv/array/blob /srv/volume/blob >/root/arrays
"""
"""Two groups of two disks: one with an array of md, one with a raid of LVM."""
SLOW = "echo 4M > /sys/fs/btrfs/$(findmnt -no UUID /srv/pair)/devinfo/1/scrub_speed_max"
STARTED = (
    "until grep -q replace /sys/fs/btrfs/*/exclusive_operation; do sleep 0.01; done; dmsetup suspend --noflush pair-a"
)
"""btrfs copies, and does not get further."""
STOP = "systemctl stop app-pair.service srv-pair.mount unlock-group@pair.service"


@pytest.fixture
def story(tmp_path: Path) -> Iterator[Machine]:
    """A clone of the enrolled machine. The disks of its pair are larger than their file system, which has no room for
    three rebuilds."""
    made = unmeasured().clone(tmp_path / "machine")
    for serial in ("pair-1", "pair-2"):
        os.truncate(made.home / f"{serial}.raw", 600 << 20)
    yield made
    shutil.rmtree(made.home, ignore_errors=True)


def group(console: Guest, name: str = "pair") -> dict[str, Any]:
    groups = json.loads(console.sh("unlock status --json").out)["groups"]
    return next(each for each in groups if each["name"] == name)


def details(console: Guest) -> list[tuple[str, str]]:
    """(verdict, detail) of what `check` says of the group."""
    found = findings(console)["findings"]
    return [(each["verdict"], each["detail"]) for each in found if each["what"].startswith("group pair")]


def heal(console: Guest, *options: str) -> Any:
    """Without a terminal, at which it would ask."""
    command = ("setsid -w unlock group heal pair", *options, "</dev/null")
    return console.sh(" ".join(command), check=False, timeout=240)


def test_a_group_of_two_lives_with_one(story: Machine) -> None:
    with story.boot(without=("pair-2",)) as booted:
        console = begun(booted)
        never(console)
        by_hand(console)
        the_other_comes_back(booted, story, console)
        console.sh("sed -i '/^\\[group.pair\\]/a degraded = \"allow\"\\ndegraded_after = 5' /etc/unlock/unlock.toml")
        booted.poweroff()
    with story.boot(without=("pair-1",)) as booted:
        console = begun(booted)
        at_boot(booted, console)
        written_while_the_other_was_away(booted, story, console)
        by_early_boot(booted, story, console)
        written_apart(story, console)
        booted.poweroff()


def never(console: Guest) -> None:
    """The policy where nobody says anything: the group stays closed, and what needs it does not run."""
    console.sh("systemctl is-system-running --wait", check=False, timeout=300)
    assert console.sh("systemctl is-active app-pair.service", check=False).out == "inactive"
    failed = console.sh("unlock open pair", check=False)
    assert failed.code == 1 and "pair-b (serial pair-2) is missing" in failed.err
    assert "hint: unlock open pair --degraded" in failed.err
    assert details(console) == [("unsafe", "it is not here (serial pair-2), and its group opens whole or not at all")]


def by_hand(console: Guest) -> None:
    opened = console.sh("unlock open pair --degraded", check=False)
    words = "group pair is open degraded, without pair-b (serial pair-2)"
    assert (opened.code, words in opened.err) == (16, True), opened.err
    assert console.sh("unlock open pair --degraded", check=False).code == 16, "run twice"
    console.sh("mountpoint -q /srv/pair && grep pair /root/sums | sha256sum --quiet -c")
    console.sh("systemctl start app-pair.service && mount | grep /srv/pair | grep degraded")
    found = group(console)
    assert (found["state"], found["degraded"], found["away"]) == ("degraded", "never", ["pair-b"])
    assert "group pair is open degraded, without pair-b" in console.sh("unlock status").out
    console.sh("head -c 30000000 /dev/urandom > /srv/pair/later; sha256sum /srv/pair/later >> /root/sums; sync")


def the_other_comes_back(booted: Running, story: Machine, console: Guest) -> None:
    missing = heal(console)
    assert missing.code == 3 and "pair-b of group pair is not here" in missing.err
    booted.plug(story.disks["pair-2"])
    console.sh("udevadm settle; sleep 2")
    assert "pair-b" not in console.sh("ls /dev/mapper").out.split()
    assert group(console)["state"] == "degraded"
    assert "unlock group heal pair" in console.sh("unlock status").out
    assert ("unsafe", "its group was written while it was away, and opens without it by hand alone") in details(console)
    shown = heal(console, "--dry-run")
    assert shown.code == 0 and "btrfs replace onto pair-b" in shown.out
    healed = heal(console)
    assert healed.code == 0, healed.err
    assert heal(console).code == 0, "run twice"
    console.sh("unlock group grow pair")
    print(console.sh("btrfs filesystem usage /srv/pair; dmesg | tail -30").out)
    console.sh('test -z "$(btrfs filesystem df /srv/pair | grep -i single | grep -v GlobalReserve)"')
    console.sh("btrfs scrub start -B /srv/pair && grep pair /root/sums | sha256sum --quiet -c")
    found = group(console)
    assert (found["state"], found["away"]) == ("open", [])
    assert checked(console)["pair"] == "safe"


def at_boot(booted: Running, console: Guest) -> None:
    console.sh("until systemctl is-active --quiet app-pair.service; do sleep 1; done", timeout=120)
    console.sh("grep pair /root/sums | sha256sum --quiet -c")
    assert "group pair is open degraded, without pair-a (serial pair-1)" in booted.console.text
    journal = console.sh("journalctl -b -u unlock-group@pair --no-pager").out
    assert "group pair is open degraded, without pair-a (serial pair-1)" in journal
    assert status(console)["pair"] == "degraded"
    assert details(console) == [("note", "it is not here (serial pair-1): a boot opens its group without it")]
    opened = console.sh("unlock open pair", check=False)
    assert (opened.code, "unlock group heal pair" in opened.err) == (16, True)


def early(console: Guest) -> tuple[str, dict[str, str]]:
    """What early boot makes of the group: its outcome, and that of each disk."""
    console.sh(f"{STOP}; for each in a b; do cryptsetup close pair-$each; done; btrfs device scan --forget; true")
    outcome, disks = json.loads(console.sh(f"python3 -I -c '{EARLY}'", timeout=120).out)
    return outcome, {name: each for name, each in disks.items() if name.startswith("pair-")}


def written_while_the_other_was_away(booted: Running, story: Machine, console: Guest) -> None:
    booted.plug(story.disks["pair-1"])
    console.sh("udevadm settle; echo newest > /srv/pair/newest; sync")
    console.sh(f"{STOP}; cryptsetup close pair-b")
    console.sh(BY_ITSELF.format(key=story.recovery_key, device=story.disks["pair-1"].device, name="one"))
    console.sh("systemctl start app-pair.service", timeout=120)
    assert "pair-a" not in console.sh("ls /dev/mapper").out.split(), "whoever was away is not mixed with the others"
    console.sh("test -e /srv/pair/newest -a ! -e /srv/pair/of-one")
    # early boot, which has no state, opens both: the gate closes the one again before the mount
    assert early(console) == ("open", {"pair-a": "opened", "pair-b": "opened"})
    console.sh("rm /run/unlock/degraded/pair /run/unlock/degraded-disks/pair-b")
    console.write("/run/unlock/members/pair", b"/dev/mapper/pair-a\n/dev/mapper/pair-b\n")
    console.sh("ln -sfn /dev/mapper/pair-a /run/unlock/open/pair")
    console.sh("systemctl start app-pair.service", timeout=120)
    assert "pair-a" not in console.sh("ls /dev/mapper").out.split()
    console.sh("test -e /srv/pair/newest -a ! -e /srv/pair/of-one")
    refused = heal(console)
    assert (refused.code, "what was written to pair-a while the others were away" in refused.err) == (3, True)
    assert group(console)["away"] == ["pair-a"]
    assert heal(console, "--yes").code == 0
    console.sh("test -e /srv/pair/newest -a ! -e /srv/pair/of-one; btrfs scrub start -B /srv/pair")
    assert (group(console)["state"], group(console)["away"]) == ("open", [])
    assert checked(console)["pair"] == "safe"


def by_early_boot(booted: Running, story: Machine, console: Guest) -> None:
    """A group whose tokens allow it, as that of a root file system: without a disk, and with one that lags."""
    assert console.sh(f"python3 -I -c '{SET_TOKENS.format(allowed=True)}'").out == "('pair-a', 'pair-b')"
    assert early(console) == ("open", {"pair-a": "opened", "pair-b": "opened"})
    console.sh("cryptsetup close pair-a; cryptsetup close pair-b; btrfs device scan --forget")
    console.sh(BY_ITSELF.format(key=story.recovery_key, device=story.disks["pair-2"].device, name="two"))
    assert early(console) == ("degraded", {"pair-a": "was-away", "pair-b": "opened"})
    booted.unplug(story.disks["pair-1"])
    assert early(console) == ("degraded", {"pair-b": "opened"})
    booted.plug(story.disks["pair-1"])
    console.sh("udevadm settle; cryptsetup close pair-b")
    assert console.sh("unlock open pair", check=False).code == 16
    healed = heal(console)
    assert healed.code == 0, healed.err
    console.sh("test -e /srv/pair/of-two")


def written_apart(story: Machine, console: Guest) -> None:
    """Somebody mounts each of the two without the other, and this host knows nothing of it."""
    console.sh(f"{STOP}; cryptsetup close pair-a; cryptsetup close pair-b; btrfs device scan --forget")
    for serial in ("pair-1", "pair-2"):
        device = story.disks[serial].device
        console.sh(BY_ITSELF.format(key=story.recovery_key, device=device, name=serial))
    words = re.compile("pair-(a|b) was written without pair-(a|b)")
    refused = console.sh("unlock open pair", check=False, timeout=120)  # by what reads no state
    assert refused.code == 1 and words.search(refused.err), refused.err
    console.sh(f"python3 -I -c '{SET_TOKENS.format(allowed=False)}'")
    assert console.sh("unlock open pair", check=False, timeout=120).code != 0  # before the mount
    assert words.search(console.sh("journalctl -b -u srv-pair.mount --no-pager").out)
    assert console.sh("mountpoint -q /srv/pair", check=False).code != 0


@pytest.mark.long(minutes=5)
def test_an_array_of_md_and_a_raid_of_lvm_live_with_one_disk(tmp_path: Path) -> None:
    """They start without the other as they see fit, tell what they lack, and take it in by their own tools."""
    story = unmeasured(programs=" mdadm").clone(tmp_path / "machine")
    serials = ("array-1", "array-2", "volume-1", "volume-2")
    disks = [story.disk(serial, 128) for serial in serials]
    with story.boot() as booted:
        console = up(booted)
        console.write(RECOVERY, story.recovery_key.encode(), 0o600)
        console.sh(ARRAYS.format(*disks, RECOVERY), timeout=240)
        assert status(console)["array"] == status(console)["volume"] == "open"
        booted.poweroff()
    with story.boot(without=("array-1", "volume-1")) as booted:
        console = up(booted)
        console.sh("sha256sum --quiet -c /root/arrays")
        assert {each: status(console)[each] for each in ("array", "volume")} == {
            "array": "degraded",
            "volume": "degraded",
        }
        console.sh("for each in array volume; do echo later >/srv/$each/later; done; sync")
        for serial in ("array-1", "volume-1"):
            booted.plug(story.disks[serial])
        console.sh("udevadm settle; unlock group heal array; unlock group heal volume")
        lacking = [each for name in ("array", "volume") for each in group(console, name)["arrays"]]
        assert [(each["node"], each["lacks"]) for each in lacking] == [("/dev/md127", 1), ("/dev/mapper/pool-data", 1)]
        for each in lacking:
            assert f"{each['node']} lacks 1 of its 2 disks: {each['hint']}" in console.sh("unlock status").out
            console.sh(each["hint"])
        console.sh("mdadm /dev/md127 --re-add /dev/mapper/array-a; lvchange --refresh pool/data")
        console.sh("until [ $(unlock status | grep -c lacks) = 0 ]; do sleep 1; done", timeout=120)
        assert status(console)["array"] == status(console)["volume"] == "open"
        console.sh("sha256sum --quiet -c /root/arrays")
        booted.poweroff()


@pytest.mark.long(minutes=7)
def test_healing_in_use_is_killed_at_each_step(story: Machine, record_property: Show) -> None:
    """All that was written stays whole, whoever was away stays out, and the same command begins again, without a
    question."""
    steps = 0
    with story.boot(without=("pair-2",), limit=1800) as booted:
        console = begun(booted)
        give_programs(console)
        opened_alone(booted, story, console)
        while killed_at(console, "heal", steps + 1):
            steps += 1
            whole(console)
            healed_again(console)
            opened_alone(booted, story, console)
        whole(console)
        booted.poweroff()
    record_property("shown", f"group heal: killed at {steps} steps")
    assert steps > 15


@pytest.mark.long(minutes=7)
def test_deletion_in_use_is_killed_at_each_step(story: Machine, record_property: Show) -> None:
    command = f"unlock group delete pair --yes --recovery-key-file {RECOVERY}"
    disks = story.devices("pair-1", "pair-2").split()
    leaves_in_use(story, record_property, "delete", "pair", disks, command, "there is no group pair")


@pytest.mark.long(minutes=15)
def test_release_in_use_is_killed_at_each_step(story: Machine, record_property: Show) -> None:
    disk = story.devices("copy-1")
    command = f"unlock disk release {disk} --yes --passphrase-file /run/own --recovery-key-file {RECOVERY}"
    leaves_in_use(story, record_property, "release", "copy", [disk], command, "has nothing of this host")


def leaves_in_use(story: Machine, show: Show, what: str, name: str, disks: list[str], command: str, ended: str) -> None:
    """The disks stay mounted all the time, and the same command finishes; then they are taken in again."""
    steps = 0
    adopt = (
        f"unlock disk adopt {each} --group {name} --passphrase-file /run/own --recovery-key-file {RECOVERY}; "
        f"cryptsetup luksRemoveKey -q {each} /run/own"
        for each in disks
    )
    own = (f"cryptsetup luksAddKey -q --key-file {RECOVERY} {each} /run/own" for each in disks if what == "delete")
    again = "; ".join((*own, *adopt, "cp /root/unlock.toml /etc/unlock; systemctl daemon-reload"))
    with story.boot(limit=1800) as booted:
        console = begun(booted)
        give_programs(console)
        console.write(RECOVERY, story.recovery_key.encode(), 0o600)
        console.write("/run/own", b"its owner's", 0o600)
        console.sh("cp /etc/unlock/unlock.toml /root")
        while killed_at(console, what, steps + 1):
            steps += 1
            whole(console, name)
            finished = console.sh(command, check=False)
            assert finished.code == 0 or ended in finished.err, finished.err
            whole(console, name)
            console.sh(again, timeout=120)
            assert (group(console, name)["state"], checked(console)[name]) == ("open", "safe")
        whole(console, name)
        booted.poweroff()
    show("shown", f"{what}: killed at {steps} steps")
    assert steps > 10


@pytest.mark.long(minutes=8)
def test_power_cuts_while_it_is_healed(story: Machine, record_property: Show) -> None:
    """Each boot opens the group without whoever was away, and the same command begins again. btrfs's own log is there
    for what it writes meanwhile."""
    with story.boot(without=("pair-2",)) as booted:
        console = begun(booted)
        console.sh("sed -i '/^\\[group.pair\\]/a degraded = \"allow\"\\ndegraded_after = 5' /etc/unlock/unlock.toml")
        give_programs(console)
        opened_alone(booted, story, console)
        assert killed_at(console, "heal", 8)  # the old btrfs is wiped
        booted.kill()
    with story.boot() as booted:
        console = without_the_other(booted)
        healed_again(console)
        opened_alone(booted, story, console)
        console.sh(f"{SLOW}; systemd-run --quiet --unit=heal unlock group heal pair; {STARTED}", timeout=120)
        console.sh("systemctl kill --signal=KILL --kill-whom=main heal")
        busy = heal(console)
        assert (busy.code, "btrfs has a device replace under way" in busy.err) == (3, True), busy.err
        booted.kill()
    with story.boot() as booted:
        console = without_the_other(booted)
        healed_again(console)
        opened_alone(booted, story, console)
        assert killed_at(console, "heal", 16)  # btrfs has it again, and the state does not know
        booted.kill()
    with story.boot() as booted:
        console = without_the_other(booted)
        asked = heal(console)
        assert (asked.code, "what was written to pair-b" in asked.err) == (3, True), asked.err
        healed_again(console, "--yes")
        booted.poweroff()
    record_property("shown", "group heal: 3 power cuts")


def give_programs(console: Guest) -> None:
    console.sh("systemctl is-system-running --wait", check=False, timeout=300)
    console.write("/root/killing.py", Path(killing.__file__).read_bytes())
    console.write("/root/killed.py", KILLED.encode())


def killed_at(console: Guest, what: str, step: int) -> bool:
    killed = console.sh(f"python3 -I /root/killed.py {what} {step} {RECOVERY}", timeout=240)
    print(step, killed.out, killed.err)
    return killed.out == "True"


def without_the_other(booted: Running) -> Guest:
    console = begun(booted)
    console.sh("until systemctl is-active --quiet app-pair.service; do sleep 1; done", timeout=120)
    whole(console)
    assert (group(console)["state"], group(console)["away"]) == ("degraded", ["pair-b"])
    return console


def opened_alone(booted: Running, story: Machine, console: Guest) -> None:
    """The group without its second disk, which then comes back; something was written meanwhile."""
    if console.sh("mountpoint -q /srv/pair", check=False).code == 0:
        console.sh(f"{STOP}; cryptsetup close pair-a; cryptsetup close pair-b; btrfs device scan --forget")
        booted.unplug(story.disks["pair-2"])
        console.sh("udevadm settle")
    assert console.sh("unlock open pair --degraded", check=False, timeout=120).code == 16
    console.sh("sed -i /alone$/d /root/sums; head -c 8M /dev/urandom > /srv/pair/alone")
    console.sh("sha256sum /srv/pair/alone >> /root/sums; sync")
    booted.plug(story.disks["pair-2"])
    console.sh("udevadm settle; sleep 1")
    assert group(console)["away"] == ["pair-b"]


def whole(console: Guest, name: str = "pair") -> None:
    console.sh(f"mountpoint -q /srv/{name} && grep {name} /root/sums | sha256sum --quiet -c")


def healed_again(console: Guest, *options: str) -> None:
    healed = heal(console, *options)
    assert healed.code == 0, healed.err
    console.sh("unlock group grow pair")
    whole(console)
    assert (group(console)["state"], group(console)["away"]) == ("open", [])
    console.sh("btrfs scrub start -B /srv/pair")
    console.sh('test -z "$(btrfs filesystem df /srv/pair | grep -i single | grep -v GlobalReserve)"')
