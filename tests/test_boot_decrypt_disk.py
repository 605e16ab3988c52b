# SPDX-License-Identifier: Apache-2.0
"""`unlock disk decrypt` on a machine: the power is cut while a disk is decrypted and written to; each boot opens it,
and goes on by itself; in the end it is a plain partition, for stock programs."""

import os
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.lab.guest import Guest
from tests.lab.machine import RECOVERY, Machine
from tests.lab.stories import checked as checked_groups
from tests.lab.stories import measured, outcomes, status, up
from tests.test_boot_rekey_deep import in_background, requirement

pytestmark = [pytest.mark.vm, pytest.mark.long(minutes=10)]

Show = Callable[[str, object], None]
TIMES = int(os.environ.get("UNLOCK_CUTS", "3"))
SIZE = 700
"""MiB."""

WRITER = """
import hashlib, os, sys
number = 0
while not os.path.exists("/run/enough"):
    data = os.urandom(1 << 19)
    path = f"/srv/photos/written-{sys.argv[1]}-{number}"
    with open(path, "wb") as file:
        file.write(data)
        os.fsync(file.fileno())
    with open("/root/sums", "a") as sums:
        sums.write(f"{hashlib.sha256(data).hexdigest()}  {path}\\n")
        sums.flush()
        os.fsync(sums.fileno())
    number += 1
    if number > 60:
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


def wait_until_it_moves(console: Guest) -> None:
    begun = "dmsetup ls | grep -q overlay || ! systemctl is-active --quiet deep"
    console.sh(f"until {begun}; do sleep 0.05; done", timeout=280)


def check_files(console: Guest) -> None:
    console.sh("sha256sum --quiet -c /root/sums", timeout=280)


def test_cut_while_it_is_written_to_a_disk_is_decrypted_in_place(story: Machine, record_property: Show) -> None:
    device = story.disk("plain", SIZE)
    with story.boot() as booted:
        console = up(booted)
        console.write(RECOVERY, story.recovery_key.encode(), 0o600)
        create = f"unlock group create photos --disk {device} --mount /srv/photos --recovery-key-file {RECOVERY}"
        console.sh(f"{create}; cd /srv/photos; cp -r /usr/sbin .; sync", timeout=280)
        console.sh("find /srv/photos -type f -exec sha256sum {} + >/root/sums; sync", timeout=240)
        shown = console.sh("unlock disk decrypt photos-a --dry-run", timeout=240)
        assert "decrypt photos-a" in shown.out
        assert not requirement(console, device)
        in_background(console, "unlock disk decrypt photos-a --yes")
        wait_until_it_moves(console)
        start_writer(console, 9)
        console.sh("sleep 2; systemctl is-active writer")
        booted.kill()
    midst = 0
    for number in range(1, TIMES):
        with story.boot() as booted:
            console = up(booted)
            assert outcomes(console)["plain"] == "opened"
            check_files(console)
            midst += "linear" in console.sh("dmsetup table photos-a").out
            assert "in clear" in console.sh("unlock status").out
            assert "in clear" in console.sh("unlock check", check=False).out
            start_writer(console, number)
            console.sh("sleep 2")
            booted.kill()
    with story.boot() as booted:
        console = up(booted)
        assert outcomes(console)["plain"] == "opened"
        check_files(console)
        start_writer(console, 0)
        console.sh("while systemctl is-active --quiet unlock-resume; do sleep 0.5; done", timeout=280)
        said = console.sh("unlock operation resume", check=False, timeout=280)
        assert "umount /srv/photos" in said.err + said.out, said
        console.sh("touch /run/enough; while systemctl is-active --quiet writer; do sleep 0.1; done; sync")
        console.sh("echo 3 >/proc/sys/vm/drop_caches")
        check_files(console)
        assert console.sh("dmsetup table photos-a").out.split()[2] == "linear"
        written = console.sh("grep -c written- /root/sums").out.strip()
        console.sh("umount /srv/photos")
        done = console.sh("unlock disk decrypt photos-a", timeout=120)
        partition = console.sh(f"realpath {device}").out.strip() + "1"
        assert partition in done.err + done.out, done
        assert "photos" not in status(console)
        console.sh(f"mount {partition} /srv/photos")
        check_files(console)
        assert "LUKS" not in console.sh(f"wipefs --no-act {device}").out
        record_property("shown", f"disk decrypt: {TIMES} power cuts, {midst} in its midst, {written} files written")
        booted.poweroff()
    with story.boot() as booted:
        console = up(booted)
        kind = console.sh(f"blkid -o value -s TYPE {partition}").out.strip()
        assert kind == "ext4"
        console.sh(f"mount -t {kind} {partition} /srv/photos")
        check_files(console)
        console.sh(f"umount /srv/photos; e2fsck -fn {partition}", timeout=240)
        assert "photos" not in checked_groups(console)
        booted.kill()
    assert midst
