# SPDX-License-Identifier: Apache-2.0
"""`unlock rekey --deep` on a machine: disks in use, a root disk, power cuts, reboots, without a network."""

import json
import random
import shutil
import tempfile
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.deepfixture import Keys, finish_disk, judge_disk, plain_of
from tests.killing import commit
from tests.lab import image, writes
from tests.lab.guest import Guest
from tests.lab.machine import RECOVERY, Machine
from tests.lab.stories import checked as checked_groups
from tests.lab.stories import measured, outcomes, status, up
from tests.test_rekey_deep_cuts import CUTS, cuts
from unlock.secret import Secret

pytestmark = [pytest.mark.vm, pytest.mark.long(minutes=6)]

Show = Callable[[str, object], None]
PASSPHRASE = "/run/passphrase"
ROOT = f"/dev/disk/by-uuid/{image.LUKS_UUID}"


@pytest.fixture
def story(tmp_path: Path) -> Iterator[Machine]:
    """A clone of the enrolled machine."""
    yield measured().clone(tmp_path / "machine")
    shutil.rmtree(tmp_path / "machine", ignore_errors=True)


def give_secrets(console: Guest, story: Machine) -> None:
    console.write(RECOVERY, story.recovery_key.encode(), 0o600)
    console.write(PASSPHRASE, image.PASSPHRASE.encode(), 0o600)


def requirement(console: Guest, disk: str) -> bool:
    """Whether the disk's header says that it is being re-encrypted."""
    return "online-reencrypt" in console.sh(f"cryptsetup luksDump --dump-json-metadata {disk}").out


def in_background(console: Guest, command: str) -> None:
    console.sh(f"systemd-run --quiet --unit=deep -p KeyringMode=shared {command}")


def wait_for_start(console: Guest, disk: str) -> None:
    """Until the data moves; then shows what the command has said, should it have failed."""
    moving = f"cryptsetup luksDump --dump-json-metadata {disk} | grep -q online-reencrypt"
    console.sh(f"until {moving} || ! systemctl is-active --quiet deep; do sleep 0.2; done")
    assert requirement(console, disk), console.sh("journalctl -u deep --no-pager").out


def test_a_host_reboots_in_the_midst_of_its_root_disk(story: Machine) -> None:
    """Cut off twice, once in use: it opens by itself, offline, and goes on without any secret. The root disk is a whole
    one: what lies over another file, ubd reads wrong where a page lies in both."""
    story.replace_root(story.root_disk(story.home / "whole"))
    with story.boot() as booted:
        console = up(booted)
        give_secrets(console, story)
        refused = console.sh(f"unlock rekey --deep root --recovery-key-file {RECOVERY}", check=False)
        assert (refused.code, "keyslot 0 would open nothing afterwards" in refused.err) == (3, True), refused.err
        assert not requirement(console, ROOT)
        console.sh("head -c 20000000 /dev/urandom >/root/blob; sha256sum /root/blob >/root/blob.sum; sync")
        command = f"unlock rekey --deep root --recovery-key-file {RECOVERY} --passphrase-file {PASSPHRASE}"
        in_background(console, f"{command} --max-rate 40M")
        wait_for_start(console, ROOT)
        console.sh("sleep 6; systemctl is-active deep")
        booted.kill()
    for _ in range(2):
        with story.boot() as booted:
            console = up(booted)
            assert outcomes(console)["root"] == "opened"
            assert requirement(console, ROOT)
            console.sh("sha256sum --quiet -c /root/blob.sum")
            in_background(console, "unlock rekey --deep root --max-rate 40M")
            console.sh("sleep 4; systemctl is-active deep")
            console.sh("head -c 3000000 /dev/urandom >/root/more; sync")
            booted.kill()
    with story.boot() as booted:
        console = up(booted)
        done = console.sh("unlock rekey --deep root", timeout=240)
        assert "root has a new volume key" in done.out, done.out + done.err
        assert not requirement(console, ROOT)
        console.sh("sha256sum --quiet -c /root/blob.sum")
        header = json.loads(console.sh(f"cryptsetup luksDump --dump-json-metadata {ROOT}").out)
        assert len(header["digests"]) == len(header["segments"]) == 1 and len(header["keyslots"]) == 2
        give_secrets(console, story)
        for file in RECOVERY, PASSPHRASE:
            console.sh(f"cryptsetup open --test-passphrase --key-file {file} {ROOT}")
        assert console.sh("dmsetup ls").out.count("root") == 1
        booted.poweroff()
    with story.boot() as booted:
        console = up(booted)
        assert set(outcomes(console).values()) == {"opened"}
        assert checked_groups(console)["root"] == "safe"
        booted.kill()


def test_power_cuts_while_a_disk_is_open(story: Machine, tmp_path: Path, record_property: Show) -> None:
    """Each write and flush of dm-crypt and libcryptsetup, in use: random cuts of them, judged by the product's code."""
    device = story.disk("cut", 40)
    log, disk = story.home / "cut.raw.writes", story.home / "cut.raw"
    with story.boot(log_writes=True) as booted:
        console = up(booted)
        give_secrets(console, story)
        create = f"unlock group create cut --disk {device} --mount /srv/cut --recovery-key-file {RECOVERY}"
        console.sh(f"{create}; head -c 16M /dev/urandom >/srv/cut/data; umount /srv/cut; sync", timeout=240)
        begins = log.stat().st_size
        console.sh(f"unlock rekey --deep cut --recovery-key-file {RECOVERY}; sync", timeout=240)
        assert console.sh("dmsetup ls").out.count("cut-a") == 1
        booted.kill()
    with log.open("rb") as whole, (tmp_path / "before").open("wb") as before:
        before.write(whole.read(begins))
    size = disk.stat().st_size
    entries, start = list(writes.read(log, size)), bytearray(size)
    first = len(list(writes.read(tmp_path / "before", size)))
    for each in entries[:first]:
        writes.apply(start, each)
    keys = Keys("", Secret(bytes.fromhex(story.secrets()["unlock:persistence"])), Secret(story.recovery_key.encode()))
    phases: Counter[str] = Counter()
    lost = 0
    with tempfile.TemporaryDirectory(dir="/dev/shm") as memory:
        path = Path(memory) / "disk"
        path.write_bytes(start)
        plain = plain_of(path, keys)
        for cut in cuts(bytes(start), entries[first:], CUTS, random.Random(commit())):
            path.write_bytes(cut.content)
            phases[judge_disk(keys, path, plain) or "at rest"] += 1
            assert finish_disk(keys, path, plain)
            lost += cut.lost > 0
    where = f"in {len(entries) - first} writes and flushes of an open disk, {lost} with writes lost"
    record_property("shown", f"rekey --deep: power cut {CUTS} times {where}: {dict(phases)}")
    assert {"moving", "crash"} <= phases.keys()


KILLS, RUNS = 6, 3


def test_killed_without_a_reboot_it_goes_on_in_use(story: Machine, record_property: Show) -> None:
    """SIGKILL while the group is written to: the same command puts each mapping on its disk again, and goes on."""
    dice = random.Random(commit())
    suspended = left = 0
    with story.boot() as booted:
        console = up(booted)
        give_secrets(console, story)
        console.write("/run/writer.py", WRITER.encode())
        console.sh("systemd-run --quiet --unit=writer python3 /run/writer.py")
        command = f"unlock rekey --deep data --recovery-key-file {RECOVERY}"
        begun = "dmsetup ls | grep -q overlay"
        step = "for _ in $(seq 300); do dmsetup info -c --noheadings -o suspended | grep -q Suspended && break; done"
        for number in range(KILLS):
            in_background(console, command)
            console.sh(f"until {begun} || ! systemctl is-active --quiet deep; do sleep 0.05; done", timeout=240)
            wait = step if number % 2 else f"sleep {dice.uniform(0, 5):.2f}"
            console.sh(f"{wait}; systemctl kill --signal=KILL deep", check=False)
            console.sh("while systemctl is-active --quiet deep; do sleep 0.05; done; systemctl reset-failed deep")
            stack = console.sh("dmsetup info -c --noheadings -o name,suspended").out
            suspended += "Suspended" in stack
            left += "overlay" in stack
        console.sh(command, timeout=280)
        stack = console.sh("dmsetup info -c --noheadings -o name,suspended").out
        assert "Suspended" not in stack and "overlay" not in stack and "hotzone" not in stack, stack
        assert_nothing_is_lost(console)
        where = f"{left} left their mappings, {suspended} with a part suspended"
        record_property("shown", f"rekey --deep: killed {KILLS} times without a reboot: {where}")
        assert suspended
        booted.poweroff()
    with story.boot() as booted:
        console = up(booted)
        assert status(console)["data"] == "open"
        booted.kill()


def assert_nothing_is_lost(console: Guest) -> int:
    """Ends the writer; of each file what was written last is there, and what was there before. Returns how many files
    were written."""
    console.sh("touch /run/enough; while systemctl is-active --quiet writer; do sleep 0.1; done")
    console.sh("umount /srv/data && mount /dev/mapper/data-a /srv/data")
    written = console.sh("tac /run/sums.new | awk '!seen[$2]++' | sha256sum -c --quiet && wc -l </run/sums.new").out
    console.sh("grep data /root/sums | sha256sum --quiet -c; btrfs scrub start -B /srv/data")
    return int(written)


WRITER = """
import hashlib, os, time
number = 0
while not os.path.exists("/run/enough"):
    data = os.urandom(1 << 20)
    path = f"/srv/data/written-{number % 40}"
    with open(path, "wb") as file:
        file.write(data)
        os.fsync(file.fileno())
    with open("/run/sums.new", "a") as sums:
        sums.write(f"{hashlib.sha256(data).hexdigest()}  {path}\\n")
    number += 1
    time.sleep(0.05)
print(number)
"""


RATE = """
import sys, time
sys.path.insert(0, "/usr/lib/unlock")
from unlock.operations import rekey_deep
from unlock.paths import Paths
from unlock.secret import Secret
times = []

def tell(done, total):
    times.append(time.monotonic())
    return False

choices = rekey_deep.Choices("data", lambda: Secret(open(sys.argv[1], "rb").read()))
assert all(each.outcome == "done" for each in rekey_deep.rekey_deep(Paths(), choices, tell))
print(time.monotonic() - times[0])
"""
"""Seconds from the first disk's start to the last one's end."""


def test_what_is_written_meanwhile_is_there_and_the_rate_is_that_of_cryptsetup(
    story: Machine, record_property: Show
) -> None:
    """As much data with either, in turns; cryptsetup's own command goes on with what it has begun."""
    device = story.disk("plain", 3 * 184 + 16)
    with story.boot() as booted:
        console = up(booted)
        give_secrets(console, story)
        luks = f"-q --key-file {PASSPHRASE} --pbkdf pbkdf2 --pbkdf-force-iterations 1000"
        console.sh(f"cryptsetup luksFormat {luks} {device} && cryptsetup open --key-file {PASSPHRASE} {device} plain")
        console.write("/run/rate.py", RATE.encode())
        plain = f"cryptsetup reencrypt {luks} --resilience checksum --hotzone-size 32M"
        ours = f"unlock rekey --deep data --recovery-key-file {RECOVERY}"
        took: dict[str, list[float]] = {"ours": [], "plain": []}
        for _ in range(RUNS):
            took["ours"].append(float(console.sh(f"sync; python3 /run/rate.py {RECOVERY}", timeout=280).out))
            console.sh(f"{plain} --init-only {device}; sync")
            timed = f"a=$(date +%s%N); {plain} --resume-only {device} >&2; echo $(($(date +%s%N) - a))"
            took["plain"].append(int(console.sh(timed, timeout=280).out) / 1e9)
        ratio = sum(took["plain"]) / sum(took["ours"])
        shown = {name: [f"{(3 * 184 << 20) / each / 1e6:.0f}" for each in times] for name, times in took.items()}
        record_property("shown", f"rekey --deep: {ratio:.2f} of the rate of cryptsetup reencrypt; MB/s: {shown}")
        console.write("/run/writer.py", WRITER.encode())
        console.sh("systemd-run --quiet --unit=writer python3 /run/writer.py")
        console.sh(ours, timeout=280)
        written = assert_nothing_is_lost(console)
        record_property("shown", f"rekey --deep: {written} MiB were written meanwhile, none lost")
        assert written > 20
        booted.poweroff()
    with story.boot() as booted:
        console = up(booted)
        assert status(console)["data"] == "open"
        assert checked_groups(console)["data"] == "safe"
        booted.kill()
