# SPDX-License-Identifier: Apache-2.0
"""What is measured in the fast lab: the same disks, opened by one system after the other in the same boot.

The clock runs from the exec of the first process until every mapper node and its by-uuid link exist. The machine has
one core, and its TPM takes what chips.py says.
"""

import json
import shutil
import subprocess
import uuid
from collections.abc import Iterable
from pathlib import Path
from typing import Any, NamedTuple

from tests.lab import luks
from tests.lab.guest import Guest
from tests.lab.machine import Machine
from tests.lab.running import Disk, Running
from tests.lab.stories import SECRETS, up
from tests.lab.swtpm import Delays
from tests.lab.uml.machine import Uml
from unlock.disks import disk_keys
from unlock.disks import luks as containers
from unlock.disks.groups import Group, Member
from unlock.secret import Secret

from .chips import CHIPS, NONE

ROUNDS = {
    1: {"no latency": 9, "firmware": 9, "discrete": 6},
    8: {"no latency": 4, "firmware": 3, "discrete": 2},
    24: {"no latency": 6, "firmware": 4, "discrete": 2},
}
"""Number of disks, chip -> how often; the longer a chip takes, the less other work on this machine disturbs."""
CLEVIS_TOO = {
    (1, "no latency"),
    (1, "firmware"),
    (1, "discrete"),
    (8, "no latency"),
    (8, "discrete"),
    (24, "no latency"),
}
"""Once for each, as it takes so long."""
MANY = (25, 50, 100)
MANY_ROUNDS = 3
SLICE = luks.DATA_OFFSET + (1 << 20)
PASSPHRASE = "bench"
UNLOCK, SYSTEMD, CLEVIS = "unlock", "systemd-cryptsetup", "clevis"
FLOOR, FORKED = "libcryptsetup alone", "a process a disk"
"""Nothing but libcryptsetup's own work: by one process a core; by one a disk, as unlock has."""
COMMANDS = (
    "apt-get update -qq && DEBIAN_FRONTEND=noninteractive "
    "apt-get install -y -qq --no-install-recommends clevis-luks clevis-tpm2 tpm2-tools",
)
"""For the image."""
SERIALS = """\
ENV{DM_NAME}=="b*", ENV{ID_SERIAL}="$env{DM_NAME}"
"""
"""A udev rule: a part of a disk has a serial number, as a disk has."""

WATCH = r"""
import json, os, signal, subprocess, sys, time
job = json.load(sys.stdin)
quiet = {"stdin": subprocess.DEVNULL, "stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
now = lambda: time.clock_gettime(time.CLOCK_BOOTTIME)
def udev():
    with open("/sys/fs/cgroup/system.slice/systemd-udevd.service/cpu.stat") as file:
        return int(file.readline().split()[1]) / 1e6
before, began = udev(), now()
children = [subprocess.Popen(command, **quiet) for command in job["commands"]]
there = []
for paths in (job["nodes"], job["links"]):
    for path in paths:
        while not os.path.exists(path) and now() - began < 240:
            time.sleep(0.004)
    there.append(now())
missing = [path for path in job["nodes"] + job["links"] if not os.path.exists(path)]
for child in children:
    if job["end"]:
        child.send_signal(signal.SIGTERM)
    child.wait()
used = os.times()
print(json.dumps({
    "began": began, "nodes": there[0] - began, "seconds": there[1] - began, "missing": missing,
    "cpu": used.children_user + used.children_system, "udev": udev() - before,
}))
"""

RESEAL = r"""
import sys
sys.path.insert(0, "/usr/lib/unlock")
from unlock.host import keyring
from unlock.tpm import pcr_policy, slots
from unlock.tpm.record import SLOTS, Payload
from unlock.tpm.chip import Tpm
with Tpm() as chip:
    record = next(state.record for state in map(chip.slot_state, SLOTS) if state.complete)
    branch = pcr_policy.policy_pcr(record.selection, chip.read_pcrs(range(16)))
    payload = Payload(keyring.get("unlock:persistence"), True)
    slots.seal_slot(chip, record.host, record.selection, (branch,), payload)
"""
"""The cap of the last run is in the PCRs: seal anew, to the PCRs as they are."""

ACTIVATE = r"""
import json, os, sys, time
sys.path.insert(0, "/usr/lib/unlock")
from unlock.disks import luks
from unlock.secret import Secret
disks = json.load(open(sys.argv[1]))
luks.is_active("none")  # loads the library
with open("/run/floor", "w") as file:
    file.write(repr(time.clock_gettime(time.CLOCK_BOOTTIME)))
workers = int(sys.argv[2]) or len(os.sched_getaffinity(0))
for number in range(workers):
    if os.fork() == 0:
        try:
            for name, device, key in disks[number::workers]:
                with luks.Container(device) as container:
                    container.activate(name, Secret(bytes.fromhex(key)))
        finally:
            os._exit(0)
for number in range(workers):
    os.wait()
"""
"""Processes that load headers and activate by volume key. /run/floor has when they began, with the interpreter started
and all loaded."""


class Enrolled(NamedTuple):
    """A disk that all systems open."""

    serial: str
    file: Path
    link: str
    """The UUID of the file system on it."""
    key: str
    """The volume key, in hex."""
    device: str

    @property
    def name(self) -> str:
        """Of the mapping."""
        return f"m{self.serial}"


class Run(NamedTuple):
    """One system that has opened the disks once."""

    chip: str
    system: str
    disks: int
    seconds: float
    cpu: float
    """Of its own processes."""
    udev: float
    """CPU of udevd."""
    tpm: float
    """Seconds that the TPM was busy."""
    commands: int
    """That reached the TPM. Now and then one is of the kernel itself: it wants random bytes."""
    phases: dict[str, float]
    """Milliseconds after the exec."""


class Bench:
    """A booted machine with disks to open."""

    def __init__(self, booted: Running, console: Guest) -> None:
        assert isinstance(booted, Uml)
        self.booted, self.console = booted, console
        console.sh("systemctl --quiet mask --runtime unlock-heal@.service")  # nothing else opens what appears
        console.write("/run/watch.py", WATCH.encode())
        console.write("/run/reseal.py", RESEAL.encode())
        console.write("/run/activate.py", ACTIVATE.encode())

    def once(self, system: str, disks: list[Enrolled], chip: str = "no latency") -> Run:
        """One run, and its clean-up."""
        self._prepare(system, disks)
        mark = len(self.booted.tpm_line.done)
        took = self._watch(system, disks, CHIPS[chip])
        done = self.booted.tpm_line.done[mark:]
        began, seconds = took["began"], took["seconds"]
        phases: dict[str, float] = {}
        if system == UNLOCK:
            phases = reported(json.loads(self.console.read("/run/unlock/report.json"))["events"], began)
        if system in (FLOOR, FORKED):
            late = float(self.console.read("/run/floor")) - began
            phases, seconds = {"loaded": 1000 * late}, seconds - late
        phases |= {"nodes": 1000 * took["nodes"], "links": 1000 * took["seconds"]}
        self._close(disks)
        busy = sum(each for _, each in done)
        run = Run(chip, system, len(disks), seconds, took["cpu"], took["udev"], busy, len(done), phases)
        print(f"  {chip:10} {system:19} {len(disks):3} disks {seconds:7.3f} s, CPU {run.cpu:.2f} s", flush=True)
        return run

    def sent(self, system: str, disks: list[Enrolled]) -> int:
        """How many commands it sends to the TPM. More reach the chip: the kernel's resource manager has its own."""
        self._prepare(system, disks)
        self._watch(system, disks, NONE, trace=True)
        count = self.console.sh("cat /run/trace.* | grep -c 'write(.*</dev/tpmrm0>'; rm /run/trace.*").out
        self._close(disks)
        return int(count)

    def _prepare(self, system: str, disks: list[Enrolled]) -> None:
        self.booted.tpm_line.delays = NONE
        script = "rm -rf /run/unlock /run/trace.*; mkdir -m 700 /run/unlock; sync"
        if system == UNLOCK:
            script += "; python3 -I /run/reseal.py"
        if system in (FLOOR, FORKED):
            job = [(each.name, each.device, each.key) for each in disks]
            self.console.write("/run/disks.json", json.dumps(job).encode())
        self.console.sh(script, timeout=120)

    def _watch(self, system: str, disks: list[Enrolled], delays: Delays, trace: bool = False) -> dict[str, Any]:
        commands = started(system, disks)
        if trace:
            strace = ["strace", "-D", "-f", "-qq", "-y", "-e", "trace=write", "-o"]
            commands = [[*strace, f"/run/trace.{number}", *each] for number, each in enumerate(commands)]
        job = {
            "commands": commands,
            "nodes": [f"/dev/mapper/{each.name}" for each in disks],
            "links": [f"/dev/disk/by-uuid/{each.link}" for each in disks],
            "end": system == UNLOCK,
        }
        self.booted.tpm_line.delays = delays
        done = self.console.sh("python3 -I /run/watch.py", stdin=json.dumps(job).encode(), timeout=300)
        self.booted.tpm_line.delays = NONE
        if not done.out:
            raise RuntimeError(f"{system}: no answer; it has said: {done.err or 'nothing'}")
        took: dict[str, Any] = json.loads(done.out)
        if took["missing"]:
            raise RuntimeError(f"{system} did not open {took['missing'][:3]}")
        return took

    def _close(self, disks: list[Enrolled]) -> None:
        names = " ".join(each.name for each in disks)
        self.console.sh(f"for name in {names}; do dmsetup remove --retry $name; done; udevadm settle", timeout=240)


def started(system: str, disks: list[Enrolled]) -> list[list[str]]:
    """What is started, all at once."""
    if system == UNLOCK:
        return [["/usr/sbin/unlock", "boot", "agent"]]
    if system in (FLOOR, FORKED):
        return [["python3", "-I", "/run/activate.py", "/run/disks.json", str(len(disks) if system == FORKED else 0)]]
    if system == SYSTEMD:
        attach, options = "/usr/bin/systemd-cryptsetup", "tpm2-device=auto,headless=1"
        return [[attach, "attach", each.name, each.device, "-", options] for each in disks]
    return [["clevis", "luks", "unlock", "-d", each.device, "-n", each.name] for each in disks]


def reported(events: Iterable[tuple[float, str, str]], began: float) -> dict[str, float]:
    """The agent's phases, in milliseconds: when each ended."""
    at: dict[str, float] = {}
    names = {"start": "interpreter, imports", "tpm": "TPM found", "key": "unsealed", "capped": "capped"}
    for when, kind, text in events:
        ms = 1000 * (when - began)
        if kind in names:
            at.setdefault(names[kind], ms)
        if kind == "disk" and text.endswith(" waiting"):
            at.setdefault("first header", ms)
            at["last header"] = ms
        if kind == "disk" and text.endswith(" opened"):
            at.setdefault("first disk", ms)
            at["last disk"] = ms
    return at


# The disks


def enroll(machine: Machine, count: int) -> list[Enrolled]:
    """Enrols one disk with all three systems, by their own commands, and makes `count` of it."""
    machine.disk("template", 0)
    template = luks.format_disk(machine.home / "template.raw", PASSPHRASE, size=SLICE)
    with machine.boot(memory="1G") as booted:
        console = up(booted)
        device = machine.devices("template")
        console.write("/etc/udev/rules.d/61-parts.rules", SERIALS.encode())
        console.write("/root/pass", PASSPHRASE.encode(), 0o600)
        accept = "--accept unmeasured-boot --accept unauthenticated-root"
        console.sh(f"unlock init --backup /root/kdk --backup-password-file /root/pass {accept}", timeout=180)
        keys = json.loads(console.sh(f"python3 -I -c '{SECRETS}'").out)
        token = "systemd-cryptenroll --tpm2-device=auto --tpm2-pcrs=7 --unlock-key-file=/root/pass"
        console.sh(f"{token} {device}", timeout=180)
        console.sh(f'clevis luks bind -y -k /root/pass -d {device} tpm2 \'{{"pcr_ids":"7"}}\'', timeout=300)
        host = json.loads(console.sh("unlock status --json").out)["host"]
        booted.poweroff()
    del machine.disks["template"]
    secrets = {name: Secret(bytes.fromhex(value)) for name, value in keys.items()}
    return [_copy(template, number, host, secrets) for number in range(count)]


def _copy(template: Path, number: int, host: str, secrets: dict[str, Secret]) -> Enrolled:
    """One disk of the template's keyslots and tokens, with UUIDs and an unlock token of its own."""
    serial = f"b{number:02}"
    path = template.with_name(f"{serial}.raw")
    subprocess.run(["cp", "--sparse=always", template, path], check=True)
    subprocess.run(["cryptsetup", "luksUUID", "-q", "--uuid", str(uuid.uuid4()), path], check=True)
    inner, plain = str(uuid.uuid4()), template.with_name("plain")
    with plain.open("wb") as file:
        file.truncate(SLICE - luks.DATA_OFFSET)
    subprocess.run(["mkfs.ext4", "-q", "-F", "-b", "4096", "-U", inner, plain], check=True, stderr=subprocess.DEVNULL)
    luks.fill(path, PASSPHRASE, plain)
    with containers.Container(str(path)) as container, container.volume_key(Secret(PASSPHRASE.encode())) as dek:
        member = Member(container.uuid, f"m{serial}", serial)
        group = Group(member.name, "kek", 1, 1, (member,))
        made = disk_keys.Keys(
            secrets["unlock:persistence"], secrets["unlock:host"], Secret.random(32), Secret.random(32)
        )
        token = disk_keys.make_token(container, host, group, member, dek, made)
        disk_keys.write_token(str(path), token, dek, made)
        return Enrolled(serial, path, inner, bytes(dek).hex(), f"/dev/disk/by-id/lab-{serial}")


# What is measured


class Found(NamedTuple):
    """All of it."""

    runs: list[Run]
    sent: dict[str, int]
    """TPM commands for one disk, by system."""


def compare(machine: Machine, enrolled: list[Enrolled]) -> Found:
    """All systems in turn, in one boot."""
    runs: list[Run] = []
    sent: dict[str, int] = {}
    with _boot(machine, "compare", 1500) as booted:
        bench = Bench(booted, up(booted))
        for count, rounds in ROUNDS.items():
            disks = enrolled[:count]
            for each in disks[len(machine.disks) :]:
                machine.disks[each.serial] = Disk(each.file.name, each.serial)
                booted.plug(machine.disks[each.serial])
            for each in disks:
                bench.console.appears(each.device)
            bench.console.sh("udevadm settle")
            if count == 1:
                sent = {system: bench.sent(system, disks) for system in (UNLOCK, SYSTEMD, CLEVIS)}
            for number in range(max(rounds.values())):
                for chip in (chip for chip in CHIPS if number < rounds[chip]):
                    turn = [UNLOCK, SYSTEMD, *([FLOOR, FORKED] if chip == "no latency" else [])]
                    turn += [CLEVIS] if number == 0 and (count, chip) in CLEVIS_TOO else []
                    runs += [bench.once(system, disks, chip) for system in turn]
        booted.kill()
    return Found(runs, sent)


def many(machine: Machine, enrolled: list[Enrolled]) -> list[Run]:
    """unlock and the floor, with more disks than the machine takes: they are parts of one, made by device-mapper."""
    whole = machine.home / "whole.raw"
    for number, each in enumerate(enrolled):
        place = f"seek={number * SLICE >> 20}"
        copy = ["dd", f"if={each.file}", f"of={whole}", "bs=1M", place, "conv=notrunc,sparse", "status=none"]
        subprocess.run(copy, check=True)
    with whole.open("r+b") as file:
        file.truncate(len(enrolled) * SLICE)
    machine.disks = {"whole": Disk(whole.name, "whole")}
    sectors = SLICE // 512
    runs: list[Run] = []
    with _boot(machine, "many", 900) as booted:
        bench = Bench(booted, up(booted))
        device, made = machine.disks["whole"].device, 0
        for count in MANY:
            disks = [each._replace(device=f"/dev/mapper/{each.serial}") for each in enrolled[:count]]
            tables = [
                f"dmsetup create {each.serial} --table '0 {sectors} linear {device} {number * sectors}'"
                for number, each in enumerate(disks)
            ]
            bench.console.sh("\n".join(["set -e", *tables[made:], "udevadm settle"]), timeout=240)
            made = count
            runs += [bench.once(system, disks) for _ in range(MANY_ROUNDS) for system in (UNLOCK, FLOOR)]
        booted.kill()
    return runs


def _boot(machine: Machine, name: str, limit: float) -> Running:
    """With the TPM as enrolled: what a boot has sealed, to PCRs with its caps, is of no use to the next."""
    shutil.copytree(machine.home / "tpm", machine.home / name)
    return machine.boot(memory="1G", tpm=name, tpm_delays=NONE, limit=limit)
