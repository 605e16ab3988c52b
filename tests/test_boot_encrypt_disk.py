# SPDX-License-Identifier: Apache-2.0
"""`unlock disk encrypt` on a machine: the power is cut nine times while a disk is encrypted and written to; each boot
opens it, and goes on by itself."""

import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.lab.guest import Guest
from tests.lab.machine import RECOVERY, Machine
from tests.lab.stories import checked as checked_groups
from tests.lab.stories import measured, outcomes, up
from tests.test_boot_rekey_deep import in_background, requirement, wait_for_start

pytestmark = [pytest.mark.vm, pytest.mark.long(minutes=12)]

Show = Callable[[str, object], None]
CUTS = 9
SIZE = 1400
"""MiB."""

WRITER = """
import hashlib, os, sys
run, number = sys.argv[1], 0
while not os.path.exists("/run/enough"):
    data = os.urandom(1 << 19)
    path = f"/srv/photos/written-{run}-{number}"
    with open(path, "wb") as file:
        file.write(data)
        os.fsync(file.fileno())
    with open("/root/sums", "a") as sums:
        sums.write(f"{hashlib.sha256(data).hexdigest()}  {path}\\n")
        sums.flush()
        os.fsync(sums.fileno())
    number = (number + 1) % 30
    if not number:
        run += "x"
    if len(run) > 3:
        break
"""
"""Writes files until /run/enough is there; notes the sum of each one that is durable. Arguments: name of this run."""


@pytest.fixture
def story(tmp_path: Path) -> Iterator[Machine]:
    yield measured().clone(tmp_path / "machine")
    shutil.rmtree(tmp_path / "machine", ignore_errors=True)


def start_writer(console: Guest, run: int) -> None:
    console.write("/run/writer.py", WRITER.encode())
    console.sh(f"systemd-run --quiet --unit=writer -p TimeoutStopSec=5 python3 /run/writer.py {run}")


def check_files(console: Guest) -> None:
    console.sh("sha256sum --quiet -c /root/sums", timeout=240)


def test_cut_nine_times_a_disk_is_encrypted_in_place_while_it_is_written_to(
    story: Machine, record_property: Show
) -> None:
    device = story.disk("plain", SIZE)
    with story.boot() as booted:
        console = up(booted)
        console.write(RECOVERY, story.recovery_key.encode(), 0o600)
        console.sh(f"mkfs.ext4 -q {device}; mkdir /srv/photos; mount {device} /srv/photos")
        console.sh("cd /srv/photos; cp -r /usr/bin /usr/sbin .; sync")
        console.sh("find /srv/photos -type f -exec sha256sum {} + >/root/sums; sync", timeout=240)
        said = console.sh(f"unlock disk encrypt {device} --group photos", check=False)
        assert (said.code, "umount /srv/photos" in said.err) == (3, True), said.err
        console.sh("umount /srv/photos")
        shown = console.sh(f"unlock disk encrypt {device} --group photos --dry-run")
        assert "1. check the ext4 on " in shown.out
        in_background(console, f"unlock disk encrypt {device} --group photos --recovery-key-file {RECOVERY}")
        wait_for_start(console, device)
        console.sh("until mount /dev/mapper/photos-a /srv/photos; do sleep 0.2; done")
        check_files(console)
        start_writer(console, 9)
        console.sh("sleep 2; systemctl is-active writer")
        assert requirement(console, device)
        booted.kill()
    midst = 0
    for number in range(1, CUTS):
        with story.boot() as booted:
            console = up(booted)
            assert outcomes(console)["plain"] == "opened"
            console.sh("mount /dev/mapper/photos-a /srv/photos")
            check_files(console)
            half = requirement(console, device)
            midst += half
            assert half == ("in clear" in console.sh("unlock status").out)
            assert half == ("in clear" in console.sh("unlock check", check=False).out)
            start_writer(console, number)
            console.sh("sleep 2")
            assert console.sh("systemctl is-active writer", check=False).out.strip() == "active" or not half
            booted.kill()
    with story.boot() as booted:
        console = up(booted)
        assert outcomes(console)["plain"] == "opened"
        console.sh("mount /dev/mapper/photos-a /srv/photos")
        check_files(console)
        start_writer(console, 0)
        done = console.sh("unlock operation resume", check=False, timeout=280)
        console.sh("touch /run/enough; while systemctl is-active --quiet writer; do sleep 0.1; done")
        console.sh("while systemctl is-active --quiet unlock-resume; do sleep 0.5; done", timeout=240)
        assert not requirement(console, device), done.out + done.err
        console.sh("sync; echo 3 >/proc/sys/vm/drop_caches")
        check_files(console)
        written = console.sh("grep -c written- /root/sums").out.strip()
        record_property("shown", f"disk encrypt: {CUTS} power cuts, {midst + 1} in its midst, {written} files written")
        assert console.sh("dmsetup ls").out.count("photos-a") == 1
        assert "in clear" not in console.sh("unlock status").out
        booted.poweroff()
    assert midst >= 3
    with story.boot() as booted:
        console = up(booted)
        assert outcomes(console)["plain"] == "opened"
        console.sh("mount /dev/mapper/photos-a /srv/photos")
        check_files(console)
        console.sh("umount /srv/photos; e2fsck -fn /dev/mapper/photos-a")
        assert checked_groups(console)["photos"] == "safe"
        booted.kill()
