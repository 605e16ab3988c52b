# SPDX-License-Identifier: Apache-2.0
"""`unlock disk encrypt` on a machine: the power is cut nine times while a disk is encrypted and written to; each boot
opens it, and goes on by itself."""

import json
import os
import random
import shutil
import subprocess
from collections import Counter
from collections.abc import Callable, Iterator
from hashlib import sha256
from pathlib import Path

import pytest

from tests.deepfixture import loop
from tests.inplace import RESERVED, read_clear, sh
from tests.killing import commit
from tests.lab import writes
from tests.lab.guest import Guest
from tests.lab.machine import RECOVERY, Machine
from tests.lab.stories import checked as checked_groups
from tests.lab.stories import measured, outcomes, up
from tests.test_boot_rekey_deep import in_background, requirement, wait_for_start
from tests.test_rekey_deep_cuts import cuts
from unlock.disks import disk_keys, luks, reencrypt, reencrypt_plan
from unlock.errors import Malformed, NotOurs, Tampered
from unlock.secret import Secret

pytestmark = [pytest.mark.vm, pytest.mark.long(minutes=12)]

Show = Callable[[str, object], None]
TIMES, CUTS = 9, int(os.environ.get("UNLOCK_CUTS", "30"))
SIZE = 1400
"""MiB."""

WRITER = """
import hashlib, os, sys, time
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
    time.sleep(0.05)  # or it would end before the cut, where the disk is fast
    number = (number + 1) % 30
    if not number:
        run += "x"
    if len(run) > 3:
        break
"""
"""Writes files until /run/enough is there; notes the sum of each one that is durable. Arguments: name of this run."""


WHOLE = """
import hashlib, os, sys
number = 0
while not os.path.exists("/run/enough"):
    data = os.urandom(300000)
    path = f"/srv/photos/whole-{number % 60}"
    with open(path + ".new", "wb") as file:
        file.write(hashlib.sha256(data).digest() + data)
        os.fsync(file.fileno())
    os.rename(path + ".new", path)
    number += 1
print(number)
"""
"""Writes files that are whole where they have their name, also after a power cut: each begins with its sum."""


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
    for number in range(1, TIMES):
        with story.boot() as booted:
            console = up(booted)
            assert outcomes(console)["plain"] == "opened"
            console.sh("mount /dev/mapper/photos-a /srv/photos")
            check_files(console)
            told = [console.sh(f"unlock {each}", check=False).out for each in ("status", "check")]
            half = requirement(console, device)
            midst += half
            assert all("in clear" in each for each in told) or not half
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
        record_property("shown", f"disk encrypt: {TIMES} power cuts, {midst + 1} in its midst, {written} files written")
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
        again = console.sh("unlock disk encrypt /dev/mapper/photos-a --group more", check=False)
        assert (again.code, "encrypted disk already" in again.err) == (3, True), again.err
        assert checked_groups(console)["photos"] == "safe"
        booted.kill()


def test_cut_anywhere_in_its_midst_what_is_written_meanwhile_is_whole(
    story: Machine, tmp_path: Path, record_property: Show
) -> None:
    """Each write and flush of dm-crypt, the file system and libcryptsetup: random cuts of them, with what was not
    flushed there or not, judged by the product's code."""
    device = story.disk("cut", (RESERVED >> 20) + 200)
    log, disk = story.home / "cut.raw.writes", story.home / "cut.raw"
    with story.boot(log_writes=True) as booted:
        console = up(booted)
        console.write(RECOVERY, story.recovery_key.encode(), 0o600)
        console.sh(f"mkfs.ext4 -q {device}; mkdir /srv/photos; mount {device} /srv/photos")
        console.sh("cd /srv/photos; cp -r /usr/sbin .; cd /; umount /srv/photos; sync")
        begins = log.stat().st_size
        in_background(console, f"unlock disk encrypt {device} --group photos --recovery-key-file {RECOVERY}")
        console.write("/run/writer.py", WHOLE.encode())
        console.sh("until mount /dev/mapper/photos-a /srv/photos; do sleep 0.1; done")
        console.sh("systemd-run --quiet --unit=writer python3 /run/writer.py")
        console.sh("while systemctl is-active --quiet deep; do sleep 0.2; done", timeout=280)
        said = console.sh("journalctl -u deep -u writer --no-pager; touch /run/enough").out
        console.sh("while systemctl is-active --quiet writer; do sleep 0.1; done; umount /srv/photos; sync")
        assert not requirement(console, device), said
        host = json.loads(console.read("/var/lib/unlock/state.json"))["host"]
        booted.kill()
    recovery, old = Secret(story.recovery_key.encode()), Secret(bytes.fromhex(story.secrets()["unlock:persistence"]))
    with log.open("rb") as whole, (tmp_path / "before").open("wb") as before:
        before.write(whole.read(begins))
    size = disk.stat().st_size
    entries, start = list(writes.read(log, size)), bytearray(size)
    first = len(list(writes.read(tmp_path / "before", size)))
    for each in entries[:first]:
        writes.apply(start, each)
    seen: Counter[str] = Counter()
    lost = files = 0
    for cut in cuts(bytes(start), entries[first:], CUTS, random.Random(commit())):
        disk.write_bytes(cut.content)
        with loop(disk) as node:
            phase, found = judge(node, host, old, recovery, tmp_path)
        seen[phase] += 1
        files += found
        lost += cut.lost > 0
    where = f"in {len(entries) - first} writes and flushes of an open disk, {lost} with writes lost, {files} new files"
    record_property("shown", f"disk encrypt: power cut {CUTS} times {where}: {dict(seen)}")
    assert {"moving", "crash"} <= seen.keys() and files


def judge(node: str, host: str, persistence: Secret, recovery: Secret, folder: Path) -> tuple[str, int]:
    """The phase, and how many new files there are. It opens as by early boot and by the recovery key, holds what it
    held, and is encrypted to its end. Before and after the move, other tests look."""
    try:
        with luks.Container(node) as container:
            each = disk_keys.read_tokens(container, host)[0]
            key = disk_keys.unwrap_volume_key(container, each, persistence)
            if not each.reencryption:
                return "done", 0
            plan = each.reencryption.plan
            phase = reencrypt_plan.phase(container, plan)
            disk_keys.dek_by_checked_recovery_key(container, each, recovery, in_clear=True).wipe()
    except (NotOurs, Malformed, IndexError):
        return "before", 0
    except Tampered:
        return "done", 0
    with key:
        settled = reencrypt.settle(node, plan, key if phase not in ("new", "old") else None)
        data = read_clear(node, persistence, host)
        found = check_whole(data, folder)
        if settled != "new":
            with reencrypt.Disk(node) as half:
                half.run("", key, lambda done, size: False)
            assert reencrypt.settle(node, plan, None) == "new"
            assert read_clear(node, persistence, host) == data
    return phase, found


def check_whole(data: bytes, folder: Path) -> int:
    """The number of files that were written meanwhile."""
    plain, out = folder / "plain", folder / "out"
    plain.write_bytes(data)
    done = subprocess.run(["e2fsck", "-p", plain], capture_output=True, text=True, check=False)
    assert done.returncode in (0, 1), done.stdout + done.stderr
    sh("e2fsck", "-f", "-n", plain)
    out.mkdir()
    sh("debugfs", "-R", f"rdump / {out}", plain)
    assert len(list((out / "sbin").iterdir())) > 20
    new = [each.read_bytes() for each in out.glob("whole-*") if each.suffix != ".new"]
    assert all(sha256(each[32:]).digest() == each[:32] for each in new)
    shutil.rmtree(out)
    return len(new)
