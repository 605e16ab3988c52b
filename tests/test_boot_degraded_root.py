# SPDX-License-Identifier: Apache-2.0
"""A root file system on a btrfs raid1 of two disks, one of which is dead: early boot opens the group degraded, the root
is mounted, a new disk takes the place of the dead one, and the next boot is clean."""

import re
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.lab.guest import Guest
from tests.lab.machine import RECOVERY, Machine
from tests.lab.running import Running
from tests.lab.stories import checked, findings, outcomes, status, unmeasured, up

pytestmark = [pytest.mark.vm, pytest.mark.long(minutes=5)]

MOVE = """
set -e
cp -ax / /srv/sys
cd /srv/sys
uuid=$(findmnt -no UUID /srv/sys)
echo "UUID=$uuid / btrfs defaults 0 0" >etc/fstab
blkid -s UUID -o value {0} {1} | sed 's/^/UUID=/' >/run/uuids
printf 'sys-%s\\n' a b | paste -d ' ' - /run/uuids | sed 's/$/ none luks,initramfs,nofail/' >etc/crypttab
cp etc/crypttab /run/crypttab
sed -i /^mount/d etc/unlock/unlock.toml
mkdir -p root; echo of the root >root/kept
cat >etc/systemd/system/app-root.service <<END
[Service]
ExecStart=/bin/sh -c 'touch /root/ran; exec sleep infinity'
[Install]
WantedBy=multi-user.target
END
ln -s ../app-root.service etc/systemd/system/multi-user.target.wants/
"""
TELL_TPM = """
set -e
cd {0}
for each in dev proc sys run; do mount --rbind /$each $each; done
chroot . unlock disk adopt {1} --group sys --passphrase-file {2} --recovery-key-file {2}
sync
"""
"""In the copy of the system: the TPM is to say that this is the host's root from now on."""
HOOK = """\
#!/bin/sh
case $1 in prereqs) echo cryptroot; exit 0 ;; esac
mkdir -p "$DESTDIR/cryptroot"
cat >"$DESTDIR/cryptroot/crypttab" <<END
{}END
"""
"""What the hook of cryptsetup-initramfs writes on such a host."""
FIRST = """\
#!/bin/sh
cat >/etc/crypttab <<END
{}END
"""
"""The same in an image of dracut for this host alone: its module crypt copies the lines of the root's disks."""


@pytest.fixture
def story(tmp_path: Path) -> Iterator[Machine]:
    yield unmeasured().clone(tmp_path / "machine")
    shutil.rmtree(tmp_path / "machine", ignore_errors=True)


def image_with(story: Machine, crypttab: str) -> Path:
    """An initramfs that has these lines of crypttab."""
    if story.image.builder == "dracut":
        return story.image.initramfs({"scripts/init-top/crypttab": FIRST.format(crypttab)})
    return story.image.initramfs({"hooks/zz-crypttab": HOOK.format(crypttab)})


def group_findings(console: Guest) -> list[tuple[str, str]]:
    """(verdict, detail) of what `check` says of the group."""
    found = findings(console)["findings"]
    return [(each["verdict"], each["detail"]) for each in found if each["what"].startswith("group sys")]


def test_a_root_on_two_disks_lives_with_one(story: Machine) -> None:
    for serial in ("sys-1", "sys-2", "sys-3"):
        story.disk(serial, 2600)
    one, two = (story.disks[f"sys-{number}"].device for number in (1, 2))
    others = tuple(each for each in story.disks if not each.startswith("sys"))
    with story.boot(memory="900M", limit=900) as booted:
        console = up(booted)
        console.write(RECOVERY, story.recovery_key.encode(), 0o600)
        console.sh(f"unlock group create sys --disk {one} {two} --mount /srv/sys --recovery-key-file {RECOVERY}")
        console.sh(MOVE.format(one, two), timeout=280)
        console.sh(TELL_TPM.format("/srv/sys", one, RECOVERY), timeout=120)
        uuid = console.sh("findmnt -no UUID /srv/sys").out.strip()
        crypttab = console.read("/run/crypttab").decode()
        booted.kill()  # the prediction at shutdown would be for the root that is left
    initrd = image_with(story, crypttab)
    cmdline = story.image.cmdline.replace("root=/dev/mapper/root", f"root=UUID={uuid}").partition(" rd.luks")[0]

    def boot(*without: str) -> Running:
        return story.boot(memory="900M", without=(*others, *without), initrd=initrd, cmdline=cmdline, limit=900)

    with boot("sys-3") as booted:
        console = up(booted)
        assert console.sh("findmnt -no FSTYPE /").out.strip() == "btrfs"
        assert (status(console)["sys"], checked(console)["sys"]) == ("open", "safe")
        allow = "unlock group set sys --degraded allow --yes"
        console.sh(f"{allow}; {allow}", timeout=240)
        assert checked(console)["sys"] == "safe"
        booted.poweroff()

    if story.image.builder == "dracut":  # another way to name the disks
        initrd = story.image.initrd
        cmdline += "".join(f" rd.luks.uuid={each}" for each in re.findall("UUID=([^ ]+)", crypttab))
    with boot("sys-2", "sys-3") as booted:  # dead
        booted.patience = 300  # for 90 s systemd waits for a disk of the command line
        console = up(booted)
        assert "unlock: group sys: degraded with 1 of 2 disks" in booted.console.text
        assert outcomes(console) == {"root": "opened", "sys-1": "opened"}
        console.sh("mount | grep ' on / type btrfs (rw,.*degraded'; systemctl is-active app-root")
        console.sh("systemctl is-active multi-user.target; grep -qx 'of the root' /root/kept; echo later >/root/later")
        said = console.sh("unlock open sys", check=False)
        words = "group sys is open degraded, without sys-b (serial sys-2)"
        assert (said.code, words in said.err) == (16, True), said.err
        assert status(console)["sys"] == "degraded"
        assert words.partition(" (")[0] in console.sh("unlock status").out
        assert group_findings(console) == [("note", "it is not here (serial sys-2): a boot opens its group without it")]
        replace_by_hand(booted, story, console)
        crypttab = console.read("/etc/crypttab").decode()
        booted.poweroff()

    initrd, cmdline = image_with(story, crypttab), cmdline.partition(" rd.luks")[0]
    with boot("sys-2") as booted:
        console = up(booted)
        assert outcomes(console) == {"root": "opened", "sys-1": "opened", "sys-3": "opened"}
        assert (status(console)["sys"], checked(console)["sys"]) == ("open", "safe")
        console.sh("! mount | grep ' on / .*degraded'; btrfs scrub start -B /; grep -qx later /root/later")
        booted.plug(story.disks["sys-2"])
        console.appears(two)
        console.sh("udevadm settle; sleep 2; ! ls /dev/mapper | grep sys-b")
        booted.poweroff()


def replace_by_hand(booted: Running, story: Machine, console: Guest) -> None:
    """A boot needs the disks of the root before it opens groups: `disk replace` refuses, and says what to do."""
    console.write(RECOVERY, story.recovery_key.encode(), 0o600)
    console.write("/run/new", b"of the new disk", 0o600)
    booted.plug(story.disks["sys-3"])
    new = story.disks["sys-3"].device
    console.appears(new)
    refused = console.sh(f"unlock disk replace sys-b {new} --recovery-key-file {RECOVERY}", check=False)
    steps = "btrfs replace by hand; unlock disk forget sys-b; unlock disk adopt NEW --group sys"
    assert (refused.code, steps in refused.err) == (3, True), refused.err
    luks = "-q --pbkdf pbkdf2 --pbkdf-force-iterations 1000 --key-file /run/new"
    console.sh(f"cryptsetup luksFormat {luks} {new} && cryptsetup open --key-file /run/new {new} sys-c")
    adopt = f"unlock disk adopt {new} --group sys --passphrase-file /run/new --recovery-key-file {RECOVERY}"
    assert "sys-b of the group is missing" in console.sh(adopt, check=False).err
    console.sh("btrfs replace start -B 2 /dev/mapper/sys-c /", timeout=240)
    lost = console.sh("unlock disk forget sys-b --yes", check=False)
    assert (lost.code, "has chunks of single" in lost.err) == (3, True), "what was written meanwhile has one copy"
    console.sh("btrfs balance start -f -dconvert=raid1,soft -mconvert=raid1,soft -sconvert=raid1,soft /", timeout=240)
    console.sh("unlock disk forget sys-b --yes", timeout=120)
    console.sh(f"{adopt}; {adopt}", timeout=120)
    uuid = console.sh(f"blkid -s UUID -o value {new}").out.strip()
    console.sh(f"sed -i 's/^sys-b UUID=[^ ]*/sys-c UUID={uuid}/' /etc/crypttab")
    assert (status(console)["sys"], checked(console)["sys"]) == ("open", "safe"), console.sh(
        "unlock check", check=False
    )
