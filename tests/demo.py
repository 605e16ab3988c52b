# SPDX-License-Identifier: Apache-2.0
"""`make demo`, real boots: a host is enrolled, boots offline, and refuses an edited kernel command line. Then its keys
come from a key manager, one is rotated there, and the host boots without it. Fast machines (User-Mode Linux) show that;
a second act shows the first part once more, under a real UEFI firmware in an emulated machine.

    python -m tests.demo [story] [firmware]      either act; default both
"""

import json
import sys
import tempfile
import time
from pathlib import Path

from tests.kmipfixture import AUTHORITY, add_command, join, rotate_there
from tests.lab import image
from tests.lab.guest import Guest
from tests.lab.image import Runs
from tests.lab.kmipserver import KmipServer
from tests.lab.machine import RECOVERY, SENT, Machine, agent_commands
from tests.lab.stories import status

DATA = ("data-1", "data-2", "data-3")


def main() -> int:
    """Exit status 0 when everything that is shown was also checked."""
    acts = {"story": story, "firmware": firmware}
    for name in sys.argv[1:] or acts:
        began = time.monotonic()
        try:
            with tempfile.TemporaryDirectory(prefix="unlock-demo-", dir="/var/tmp") as home:
                what = acts[name](Path(home))
        except (Exception, KeyboardInterrupt) as error:
            print(f"\nFAILED: {type(error).__name__}: {error}")
            return 1
        print(f"\nSUCCESS: {what} ({time.monotonic() - began:.0f} s)", flush=True)
    return 0


def story(home: Path) -> str:
    """What it showed."""
    machine = build(home, "uml")
    enroll(machine)
    offline(machine)
    edited(machine)
    with KmipServer(home / "kms", AUTHORITY) as kms:
        moved(machine, kms)
    without_it(machine)
    return "enrolled, booted offline, refused an edited command line, outlived its key manager"


def firmware(home: Path) -> str:
    """What it showed."""
    say("Second act: a real UEFI firmware measures the boot. An emulated machine takes minutes")
    machine = build(home, "qemu")
    enroll(machine)
    offline(machine)
    edited(machine)
    return "the same under a real UEFI firmware"


def build(home: Path, runs: Runs) -> Machine:
    say("Building a Debian 13 image with unlock in it: minutes the first time, then from the cache")
    machine = Machine(home, image.build("luks", runs=runs), uefi=True)
    for serial in DATA:
        machine.disk(serial, 200)
    return machine


def enroll(machine: Machine) -> None:
    say("Boot 1: UEFI, a TPM, a LUKS2 root opened by its passphrase, three empty disks")
    with machine.boot() as booted:
        booted.console.expect("unlock disk root", 300)
        booted.console.send(image.PASSPHRASE + "\n")
        console = booted.guest
        console.booted()
        console.write("/root/password", b"correct horse\n", 0o600)
        console.write("/root/passphrase", image.PASSPHRASE.encode(), 0o600)
        key = f"--recovery-key-file {RECOVERY}"
        show(console, "unlock init --backup /root/kdk.backup --backup-password-file /root/password")
        root = f"/dev/disk/by-uuid/{image.LUKS_UUID}"
        show(console, f"unlock disk adopt {root} --group root --passphrase-file /root/passphrase {key}")
        show(console, f"unlock group create data --disk {machine.devices(*DATA)} --mount /srv/data {key}")
        show(console, "head -c 20000000 /dev/urandom > /srv/data/payload; sha256sum /srv/data/payload | tee /root/sums")
        (machine.home / "recovery-key").write_bytes(console.read(RECOVERY))
        console.sh(f"rm {RECOVERY} /root/password /root/passphrase; sync")
        booted.poweroff()


def offline(machine: Machine) -> None:
    say("Boot 2: no network card, nobody at the console")
    with machine.boot() as booted:
        console = booted.guest
        console.booted()
        show(console, "unlock status --boot")
        show(console, "unlock status")
        show(console, "ls /sys/class/net; sha256sum -c /root/sums")
        reached = agent_commands(booted)
        if tuple(name for name in reached if name in SENT) != SENT:
            raise RuntimeError(f"other TPM commands than expected: {reached}")
        tell(f"TPM: {len(SENT)} commands sent for 4 disks, {len(reached)} reached it through the resource manager")
        booted.poweroff()


def edited(machine: Machine) -> None:
    say("Boot 3: somebody has edited the kernel command line")
    with machine.boot(append="audit=0") as booted:
        booted.console.expect("cannot unseal", 300)
        booted.console.expect("recovery key: ", 60)
        lines = [line for line in booted.console.text.splitlines() if line.startswith("unlock: ")]
        tell(*lines)
        if any(line.endswith(": open") for line in lines):
            raise RuntimeError("a disk was opened")
        say("Refused: nothing is open, nothing is mounted, the TPM is locked. The operator has the recovery key")
        booted.console.send(machine.recovery_key + "\n")
        console = booted.guest
        console.booted()
        show(console, "unlock status")
        show(console, "cat /run/unlock/verdict; sha256sum -c /root/sums")
        if console.read("/run/unlock/verdict") != b"pcr-mismatch\n":
            raise RuntimeError("the cause is not recorded")
        booted.poweroff()


def moved(machine: Machine, kms: KmipServer) -> None:
    say("Boot 4: a network, and a key manager on it (PyKMIP's server, mutual TLS)")
    with machine.boot(network=True) as booted:
        console = booted.guest
        console.booted()
        join(console, kms)
        show(console, add_command(kms))
        show(console, "unlock provider switch kms --persistence enabled")
        host = json.loads(console.read("/var/lib/unlock/state.json"))["host"]
        say("The key manager's administrator rotates the KEK of data there")
        rotate_there(kms, host, "data", 2)
        show(console, "unlock sync")
        show(console, "unlock status")
        say("Power cut. The key manager and the network are gone too")
        booted.kill()


def without_it(machine: Machine) -> None:
    say("Boot 5: no network card, no key manager")
    with machine.boot() as booted:
        console = booted.guest
        console.booted()
        show(console, "unlock status")
        show(console, "ls /sys/class/net; sha256sum -c /root/sums")
        if status(console) != {"root": "open", "data": "open"}:
            raise RuntimeError("not every group is open")
        booted.poweroff()


def say(text: str) -> None:
    print(f"\n== {text}", flush=True)


def tell(*lines: str) -> None:
    for line in lines:
        print(f"    {line}", flush=True)


def show(console: Guest, command: str, timeout: int = 300) -> None:
    """Runs a command in the guest as an operator would, and shows it."""
    tell(f"# {command}")
    done = console.sh(command, timeout=timeout)
    tell(*filter(None, f"{done.out}\n{done.err}".splitlines()))


if __name__ == "__main__":
    sys.exit(main())
