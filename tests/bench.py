# SPDX-License-Identifier: Apache-2.0
"""`make bench`: unlock beside systemd-cryptsetup and clevis, on the same disks in the same boot of a VM.

The clock runs from the exec of the first process until every mapper node and its by-uuid link exist. Emulated
seconds are no one's seconds: ratios and counts are what to look at. Writes build/bench.json.

    python -m tests.bench [keys] [boot]      the key path alone, natively; the boot comparison; default both
"""

import json
import os
import resource
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
import uuid
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

from tests.lab import image, luks
from tests.lab.guest import Guest
from tests.lab.machine import SENT, Machine
from tests.lab.stories import SECRETS, up
from tests.lab.vm import VM
from tests.tpmfixture import Swtpm
from unlock import disk, policy, slots, wrap
from unlock import luks as containers
from unlock.groups import Group, Member
from unlock.secret import Secret

COUNTS = (1, 8, 24)
ROUNDS = 5
PASSPHRASE = "bench"
CHECKOUT = Path(__file__).resolve().parents[1]

CHIP_MS = {
    "StartAuthSession": (232, "wolfTPM, ECDHE agree: a session salted to an ECC key makes the chip do one"),
    "CreatePrimary": (231, "wolfTPM, ECC 256 key gen"),
    "Create": (231, "wolfTPM, ECC 256 key gen"),
    "RSA": (163, "wolfTPM, RSA 2048 private"),
    "": (5, "systemd issue 42615: systemd-pcrextend, one PCR after the other, 3 to 9 ms each"),
}
"""Milliseconds a command on an Infineon SLB 9670 and the like, by kind; '' is every other one.

https://github.com/wolfSSL/wolfTPM (README, TPM2 Benchmarks), https://github.com/systemd/systemd/issues/42615
"""

WATCH = r"""
import json, os, signal, subprocess, sys, time
job = json.load(sys.stdin)
left = set(job["paths"])
quiet = {"stdin": subprocess.DEVNULL, "stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
began = time.monotonic()
children = [subprocess.Popen(command, **quiet) for command in job["commands"]]
peak = 0
def memory(pid):
    size, below = 0, open(f"/proc/{pid}/task/{pid}/children").read().split()
    for line in open(f"/proc/{pid}/smaps_rollup"):
        size += int(line.split()[1]) if line.startswith("Pss:") else 0
    return size + sum(map(memory, below))
while left and time.monotonic() - began < 600:
    left = {path for path in left if not os.path.exists(path)}
    if job["memory"]:
        try:
            peak = max(peak, sum(memory(child.pid) for child in children))
        except OSError:
            pass
    time.sleep(0.005)
took = time.monotonic() - began
for child in children:
    if job["term"]:
        child.send_signal(signal.SIGTERM)
    child.wait()
print(json.dumps({"seconds": took, "missing": sorted(left), "pss_kib": peak}))
"""

RESEAL = r"""
import sys
sys.path.insert(0, "/usr/lib/unlock")
from unlock import keyring, policy, slots, tpm
from unlock.secret import Secret
with tpm.Tpm() as chip:
    record = next(state.record for state in map(chip.slot_state, policy.SLOTS) if state.complete)
    branch = policy.pcr_policy(record.selection, chip.read_pcrs(range(16)))
    payload = policy.Payload(keyring.get("unlock:persistence"), True)
    slots.persist(chip, record.host, record.selection, (branch,), payload)
"""
"""The cap of the last run is in the PCRs: seal anew, to the PCRs as they are."""


class Result(NamedTuple):
    """One system and number of disks; `tpm_commands` is what reached the TPM."""

    system: str
    disks: int
    seconds: list[float]
    tpm_commands: int


def main() -> int:
    wanted = set(sys.argv[1:]) or {"keys", "boot"}
    if "keys" in wanted:
        keys()
    if "boot" in wanted:
        boot()
    return 0


# The key path alone


def keys() -> None:
    """Interpreter, imports, unseal, unwraps: native, with swtpm."""
    print(f"\nThe key path on this machine, {os.uname().machine}, Python {sys.version.split()[0]}, swtpm; medians")
    bare = median(15, lambda: run("pass"))
    load = "import unlock.__main__, unlock.boot, unlock.devices, unlock.luks, unlock.tpm, unlock.wrap; "
    load += "unlock.devices._udev(); unlock.luks.prepare(); unlock.tpm._load()"
    ours = median(15, lambda: run(load))
    whole = median(
        15, lambda: run("import tpm2_pytss, cryptography.hazmat.primitives.ciphers.aead, ctypes, json, typing")
    )
    print(f"  bare interpreter                       {bare * 1000:8.1f} ms of CPU")
    print(f"  with all that early boot imports       {ours * 1000:8.1f} ms, {1000 * (ours - bare):.1f} ms more")
    print(f"  the same libraries, imported whole     {whole * 1000:8.1f} ms, {1000 * (whole - bare):.1f} ms more")
    with tempfile.TemporaryDirectory() as folder, Secret.random(32) as persistence:
        with Swtpm(Path(folder, "tpm")) as chip:
            with chip.open() as tpm:
                selection = policy.select((7,))
                branch = policy.branch(selection, tpm.read_pcrs(range(16)))
                slots.persist(tpm, b"h" * 16, selection, (branch,), policy.Payload(persistence, False))

            def unseal() -> None:
                with chip.open() as tpm:
                    slots.unseal(tpm).payload.key.wipe()

            print(f"  unseal, {len(SENT) - 1} TPM commands                  {clock(15, unseal) * 1000:8.1f} ms")
        path = Path(folder, "disk")
        path.write_bytes(bytes(64 << 20))
        with Secret.random(64) as dek, Secret.random(32) as kek, containers.format(str(path), dek) as container:
            member = Member(container.uuid, "b", "")
            made = disk.Keys(persistence, Secret.random(32), kek, Secret.random(32))
            token = disk.make_token(container, "0" * 32, Group("b", "k", 1, 1, (member,)), member, dek, made)

            def unwrap() -> None:
                for _ in range(1000):
                    disk.volume_key(container, token, persistence).wipe()

            wrapped = wrap.wrap(kek, dek, b"")

            def bare_unwrap() -> None:
                for _ in range(1000):
                    wrap.unwrap(kek, wrapped, b"").wipe()

            print(f"  1,000 disks' keys: facts, KEK, DEK     {clock(5, unwrap) * 1000:8.1f} ms")
            print(f"  1,000 unwraps and no more              {clock(5, bare_unwrap) * 1000:8.1f} ms")


def run(code: str) -> float:
    """Seconds of CPU of a fresh interpreter."""
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    environment = {"PATH": "/usr/bin", "CRYPTOGRAPHY_OPENSSL_NO_LEGACY": "1"}
    command = [sys.executable, "-I", "-S", "-c", f"import sys; sys.path[:] = {[str(CHECKOUT), *sys.path]!r}; {code}"]
    subprocess.run(command, check=True, env=environment)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    return after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime


def median(times: int, measure: Callable[[], float]) -> float:
    return statistics.median(measure() for _ in range(times))


def clock(times: int, work: Callable[[], None]) -> float:
    def once() -> float:
        began = time.perf_counter()
        work()
        return time.perf_counter() - began

    return median(times, once)


# Side by side in a VM


def boot() -> None:
    """Enrols one disk with all three systems, makes 24 of it, and opens them again and again in one boot."""
    commands = (
        "apt-get update -qq && DEBIAN_FRONTEND=noninteractive "
        "apt-get install -y -qq --no-install-recommends clevis-luks clevis-tpm2 tpm2-tools",
    )
    with tempfile.TemporaryDirectory(prefix="unlock-bench-", dir="/var/tmp") as home:
        built = image.build("plain", commands=commands)
        machine = Machine(Path(home), built)
        links = enroll(machine)
        results, more = compare(machine, links)
    table = [{**each._asdict(), "seconds": statistics.median(each.seconds)} for each in results]
    target = CHECKOUT / "build" / "bench.json"
    target.parent.mkdir(exist_ok=True)
    target.write_text(json.dumps(table, indent=1) + "\n")
    show(results, more)
    initramfs(built)
    print(f"\nwritten: {target.relative_to(CHECKOUT)}")


def enroll(machine: Machine) -> list[str]:
    """24 disks that each of the three systems can open; the UUIDs of their file systems."""
    machine.disk("template", 0)
    template = luks.format_disk(machine.home / "template.raw", PASSPHRASE, size=luks.DATA_OFFSET + (8 << 20))
    with machine.boot(cores=2) as booted:
        console = up(booted)
        device = machine.devices("template")
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
    return [make(machine, template, number, host, secrets) for number in range(max(COUNTS))]


def make(machine: Machine, template: Path, number: int, host: str, secrets: dict[str, Secret]) -> str:
    """One disk of the template's keyslots and tokens, with UUIDs and an unlock token of its own."""
    machine.disk(f"b{number:02}", 0)
    path = machine.home / f"b{number:02}.raw"
    shutil.copyfile(template, path)
    subprocess.run(["cryptsetup", "luksUUID", "-q", "--uuid", str(uuid.uuid4()), path], check=True)
    inner, plain = str(uuid.uuid4()), machine.home / "plain"
    with plain.open("wb") as file:
        file.truncate(8 << 20)
    subprocess.run(["mkfs.ext4", "-q", "-F", "-U", inner, plain], check=True)
    luks.fill(path, PASSPHRASE, plain)
    with containers.Container(str(path)) as container, container.volume_key(Secret(PASSPHRASE.encode())) as dek:
        member = Member(container.uuid, f"b{number:02}", f"b{number:02}")
        group = Group(member.name, "kek", 1, 1, (member,))
        made = disk.Keys(secrets["unlock:persistence"], secrets["unlock:host"], Secret.random(32), Secret.random(32))
        token = disk.make_token(container, host, group, member, dek, made)
        disk.write_token(str(path), token, dek, made)
    return inner


def compare(machine: Machine, links: list[str]) -> tuple[list[Result], dict[str, Any]]:
    """All systems in turn, ROUNDS times, for each number of disks; clevis on all 24 once."""
    results: list[Result] = []
    more: dict[str, Any] = {}
    disks, machine.disks = machine.disks, {}
    with machine.boot(cores=2, limit=7200) as booted:
        assert isinstance(booted, VM)
        console = up(booted)
        for count in COUNTS:
            names = [f"b{number:02}" for number in range(count)]
            for name in names[len(machine.disks) :]:
                machine.disks[name] = disks[name]
                booted.plug(disks[name])
            for name in names:
                console.appears(disks[name].device)
            console.sh("udevadm settle; rm -rf /run/unlock/failed-groups")
            job = Job(names, [disks[name].device for name in names], links[:count])
            seconds: dict[str, list[float]] = {"unlock": [], "systemd-cryptsetup": [], "clevis": []}
            commands: dict[str, Counter[str]] = {}
            for number in range(ROUNDS):
                for system in seconds:
                    if system == "clevis" and count == max(COUNTS) and number:
                        continue
                    took, sent = once(booted, console, system, job)
                    seconds[system].append(took["seconds"])
                    commands[system] = sent
                    print(f"  {system:20} {count:2} disks {took['seconds']:8.2f} s {sent.total():5} TPM commands")
            results += [Result(name, count, each, commands[name].total()) for name, each in seconds.items()]
            more[f"commands {count}"] = commands
        once(booted, console, "unlock", job, keep=more)
        booted.kill()
    return results, more


class Job(NamedTuple):
    """Mapping names, devices, and the UUIDs of the file systems on them."""

    names: list[str]
    devices: list[str]
    links: list[str]

    def commands(self, system: str) -> list[list[str]]:
        """What is started, all at once."""
        pairs = list(zip(self.names, self.devices, strict=True))
        if system == "unlock":
            return [["/usr/sbin/unlock", "boot", "agent"]]
        if system == "systemd-cryptsetup":
            attach = "/usr/bin/systemd-cryptsetup"
            return [[attach, "attach", name, device, "-", "tpm2-device=auto,headless=1"] for name, device in pairs]
        return [["clevis", "luks", "unlock", "-d", device, "-n", name] for name, device in pairs]


def once(
    booted: VM, console: Guest, system: str, job: Job, keep: dict[str, Any] | None = None
) -> tuple[dict[str, Any], Counter[str]]:
    """One run and its clean-up: what WATCH says, and the commands that reached the TPM. `keep`: memory and phases."""
    console.sh("rm -rf /run/unlock; mkdir -m 700 /run/unlock; sync")
    if system == "unlock":
        console.sh(f"python3 -I -c '{RESEAL}'", timeout=120)
    paths = [f"/dev/mapper/{name}" for name in job.names] + [f"/dev/disk/by-uuid/{link}" for link in job.links]
    what = {"commands": job.commands(system), "paths": paths, "term": system == "unlock", "memory": keep is not None}
    mark = len(booted.tpm_commands())
    done = console.sh(f"python3 -I -c '{WATCH}'", stdin=json.dumps(what).encode(), timeout=660)
    took = json.loads(done.out)
    sent = Counter(command.name for command in booted.tpm_commands(mark))
    if took["missing"]:
        raise RuntimeError(f"{system} did not open {took['missing'][:3]}")
    if keep is not None:
        keep["pss_kib"] = took["pss_kib"]
        keep["report"] = json.loads(console.read("/run/unlock/report.json"))
    close = " ".join(job.names)
    console.sh(f"for name in {close}; do dmsetup remove --retry $name; done; udevadm settle", timeout=240)
    return took, sent


def show(results: list[Result], more: dict[str, Any]) -> None:
    """The tables."""
    by = {(each.system, each.disks): each for each in results}
    print("\nseconds (median), ratio to unlock's, and commands that reached the TPM")
    print(f"{'disks':>5}" + "".join(f"{system:>34}" for system in ("unlock", "systemd-cryptsetup", "clevis")))
    for count in COUNTS:
        ours = statistics.median(by["unlock", count].seconds)
        row = f"{count:5}"
        for system in ("unlock", "systemd-cryptsetup", "clevis"):
            each = by[system, count]
            took = statistics.median(each.seconds)
            row += f"{took:12.2f} s {ours / took:7.2f} {each.tpm_commands:7} TPM"
        print(row)
    print("\nwhat a discrete chip would add, by published latencies (not measured here)")
    for count in COUNTS:
        row = f"{count:5}"
        for system, sent in more[f"commands {count}"].items():
            row += f"   {system} {sum(number * chip_ms(name) for name, number in sent.items()) / 1000:6.1f} s"
        print(row)
    for name, (ms, source) in CHIP_MS.items():
        print(f"    {name or 'other commands':18} {ms:4} ms  {source}")
    events = more["report"]["events"]
    at = {kind: when for when, kind, _ in reversed(events)}
    opened = [when for when, kind, text in events if kind == "disk" and text.endswith(" opened")]
    print(f"\nunlock, {max(COUNTS)} disks: phases in seconds after its first line of Python")
    start = at["start"]
    for name, when in (("TPM opened", at["tpm"]), ("unsealed", at["key"]), ("capped", at["capped"])):
        print(f"    {name:18} {when - start:6.2f}")
    print(
        f"    {'first disk open':18} {min(opened) - start:6.2f}\n    {'last disk open':18} {max(opened) - start:6.2f}"
    )
    print(f"    summed PSS, workers included: {more['pss_kib'] / 1024:.1f} MiB at its peak")


def chip_ms(name: str) -> float:
    return CHIP_MS.get(name, CHIP_MS[""])[0]


def initramfs(built: image.Image) -> None:
    """What unlock adds to the initramfs, compressed as Debian does it."""
    hook = "#!/bin/sh\nrm -rf /usr/share/initramfs-tools/hooks/unlock /usr/share/initramfs-tools/scripts/*/unlock\n"
    whole = built.initramfs({"conf.d/level": "COMPRESS=zstd\n"}).stat().st_size
    without = built.initramfs({"conf.d/level": "COMPRESS=zstd\n", "conf.d/remove": hook}).stat().st_size
    print(f"    initramfs: {whole - without:,} bytes more than the {without:,} without unlock")


if __name__ == "__main__":
    sys.exit(main())
