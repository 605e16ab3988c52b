# SPDX-License-Identifier: Apache-2.0
"""`unlock disk encrypt` on a machine: the power is cut while a disk is half encrypted; it opens, and goes on in use."""

import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.lab.machine import RECOVERY, Machine
from tests.lab.stories import checked as checked_groups
from tests.lab.stories import measured, outcomes, up
from tests.test_boot_rekey_deep import in_background, requirement, wait_for_start

pytestmark = pytest.mark.vm


@pytest.fixture
def story(tmp_path: Path) -> Iterator[Machine]:
    yield measured().clone(tmp_path / "machine")
    shutil.rmtree(tmp_path / "machine", ignore_errors=True)


def test_a_disk_that_is_cut_off_half_encrypted_opens_at_boot_and_goes_on_while_it_is_mounted(story: Machine) -> None:
    device = story.disk("plain", 600)
    with story.boot() as booted:
        console = up(booted)
        console.write(RECOVERY, story.recovery_key.encode(), 0o600)
        console.sh(f"mkfs.ext4 -q {device}; mkdir /srv/photos; mount {device} /srv/photos")
        console.sh("cd /srv/photos; cp -r /usr/bin /usr/sbin .; find . -type f -exec sha256sum {} + >/root/sums; sync")
        said = console.sh(f"unlock disk encrypt {device} --group photos", check=False)
        assert (said.code, "umount /srv/photos" in said.err) == (3, True), said.err
        console.sh("umount /srv/photos")
        in_background(console, f"unlock disk encrypt {device} --group photos --recovery-key-file {RECOVERY}")
        wait_for_start(console, device)
        booted.kill()
    with story.boot() as booted:
        console = up(booted)
        assert outcomes(console)["photos-a"] == "opened"
        console.sh("mount /dev/mapper/photos-a /srv/photos; cd /srv/photos; sha256sum --quiet -c /root/sums")
        if requirement(console, device):
            assert "in clear" in console.sh("unlock status").out
        console.sh("systemctl stop unlock-resume; head -c 9000000 /dev/urandom >/srv/photos/new", check=False)
        console.sh("cd /srv/photos; sha256sum new >>/root/sums; sync")
        done = console.sh("unlock operation resume", check=False, timeout=240)
        assert not requirement(console, device), done.out + done.err
        console.sh("echo 3 >/proc/sys/vm/drop_caches; cd /srv/photos; sha256sum --quiet -c /root/sums")
        assert console.sh("dmsetup ls").out.count("photos-a") == 1
        assert "in clear" not in console.sh("unlock status").out
        booted.poweroff()
    with story.boot() as booted:
        console = up(booted)
        assert outcomes(console)["photos-a"] == "opened"
        console.sh("mount /dev/mapper/photos-a /srv/photos; cd /srv/photos; sha256sum --quiet -c /root/sums")
        assert checked_groups(console)["photos"] == "safe"
        booted.kill()
