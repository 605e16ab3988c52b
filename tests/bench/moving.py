# SPDX-License-Identifier: Apache-2.0
"""How fast data moves: deep rekey, encryption in place and the rebuild by `disk replace`, in turn with the stock
command that does the same with the same resilience, on disks of one size in one boot. And a shallow rekey of many
disks, beside `cryptsetup luksChangeKey` of one.

What does not grow with the disk is told apart: the clock is read before a command, when its first byte and its last one
have moved, and at its end. The disks are in memory, where there is room.
"""

import json
import shutil
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

from tests.lab.guest import Guest
from tests.lab.machine import RECOVERY, Machine
from tests.lab.running import Running
from tests.lab.stories import unmeasured, up

UNLOCK = "unlock"
STOCK = {
    "deep rekey": "cryptsetup reencrypt",
    "encrypt": "cryptsetup reencrypt --encrypt",
    "replace": "btrfs replace",
    "rekey": "cryptsetup luksChangeKey",
}
"""Operation -> what it is compared with."""
PAIRS = 6
SIZE = {"deep rekey": 4096, "encrypt": 2048, "replace": 1536}
"""MiB that move."""
DISKS = 24
HEADER = 16
RESERVED = 32
"""MiB before the data, and what an encryption in place needs at the end."""
PASSPHRASE = "/run/passphrase"
PBKDF = f"-q --key-file {PASSPHRASE} --pbkdf pbkdf2 --pbkdf-force-iterations 1000"
"""As cheap as that of a recovery key."""

OURS = """
import json, sys, time
sys.path.insert(0, "/usr/lib/unlock")
from unlock.operations import encrypt_disk, rekey_deep
from unlock.paths import Paths
from unlock.secret import Secret
told = []

def tell(done, total):
    told.append((time.monotonic(), done))
    return False

operation, group, recovery, device = sys.argv[1:]
began = time.monotonic()
if operation == "rekey":
    choices = rekey_deep.Choices(group, lambda: Secret(open(recovery, "rb").read().strip()))
    done = [each.outcome for each in rekey_deep.rekey_deep(Paths(), choices, tell)]
else:
    choices = encrypt_disk.Choices(device, group, recovery_file=recovery)
    done = [encrypt_disk.encrypt_disk(Paths(), choices, tell).outcome]
assert done == ["done"], done
print(json.dumps([began, told, time.monotonic()]))
"""
THEIRS = """
import json, subprocess, sys, time
told = []
began = time.monotonic()
begin, run = (each.split() for each in sys.argv[1:])
subprocess.run(begin, check=True, stdout=subprocess.DEVNULL)
run += ["--progress-json", "--progress-frequency", "1"]
with subprocess.Popen(run, stdout=subprocess.PIPE) as child:
    for line in child.stdout:
        told.append((time.monotonic(), int(json.loads(line)["device_bytes"])))
assert child.returncode == 0
print(json.dumps([began, told, time.monotonic()]))
"""
REPLACE = r"""
import json, re, subprocess, sys, time
began = time.monotonic()
subprocess.run(sys.argv[1], shell=True, check=True, stdout=subprocess.DEVNULL)
ended = time.monotonic()
said = subprocess.run("dmesg", capture_output=True, text=True).stdout
lines = re.findall(r"\[ *([0-9.]+)\] .*dev_replace from .* (started|finished)", said)
(first, _), (last, what) = lines[-2:]
assert what == "finished", lines
print(json.dumps([began, [[float(first), 0], [float(last), int(sys.argv[2])]], ended]))
"""
"""The kernel says when it began and ended."""


class Move(NamedTuple):
    """One command."""

    operation: str
    system: str
    seconds: float
    """All of it."""
    begin: float
    end: float
    """Seconds before the first byte has moved, and after the last."""
    rate: float
    """Bytes a second between them."""


def measure(pairs: int = PAIRS, operations: tuple[str, ...] = tuple(STOCK)) -> list[Move]:
    """In the order in which they were measured."""
    moves: list[Move] = []
    memory = Path("/dev/shm")
    room = memory.is_dir() and shutil.disk_usage(memory).free > 12 << 30
    with tempfile.TemporaryDirectory(prefix="unlock-bench-", dir=memory if room else "/var/tmp") as home:
        for operation in operations:
            machine = unmeasured().clone(Path(home, "machine"))
            for move in _OPERATIONS[operation](machine, pairs, SIZE.get(operation, 0)):
                parts = f": before {move.begin:.2f}, after {move.end:.2f}; " if move.rate else ""
                parts += f"{move.rate / 1e6:.1f} MB/s" if move.rate else ""
                print(f"  {operation:10} {move.system:30} {move.seconds:7.2f} s{parts}", flush=True)
                moves.append(move)
            shutil.rmtree(machine.home)
    return moves


def _deep(machine: Machine, pairs: int, mib: int) -> Iterator[Move]:
    ours, stock = machine.disk("ours", mib + HEADER), machine.disk("stock", mib + HEADER)
    with _boot(machine) as booted:
        console = _begin(booted, machine)
        create = f"unlock group create deep --disk {ours} --mount /srv/deep --recovery-key-file {RECOVERY}"
        console.sh(f"{create}; mkdir /srv/stock; {_open_stock(stock, 'stock')}", timeout=240)
        console.sh("mkfs.ext4 -q /dev/mapper/stock && mount /dev/mapper/stock /srv/stock")
        reencrypt = f"cryptsetup reencrypt {PBKDF}"
        commands = {
            UNLOCK: f"ours.py rekey deep {RECOVERY} {ours}",
            STOCK["deep rekey"]: f"theirs.py '{reencrypt} --resilience checksum --init-only {stock}' "
            f"'{reencrypt} --resume-only {stock}'",
        }
        for system in _turns("deep rekey", pairs):
            yield _move(console, "deep rekey", system, commands[system])
        booted.kill()


def _encrypt(machine: Machine, pairs: int, mib: int) -> Iterator[Move]:
    with _boot(machine) as booted:
        console = _begin(booted, machine)
        for number, system in enumerate(_turns("encrypt", pairs)):
            serial = f"disk{number}"
            device = _plug(booted, machine, serial, mib + RESERVED)
            console.sh(f"udevadm settle; mkfs.ext4 -q {device} {mib}M")
            if system == UNLOCK:
                yield _move(console, "encrypt", system, f"ours.py encrypt g{number} {RECOVERY} {device}")
                console.sh(f"unlock group delete g{number} --yes --recovery-key-file {RECOVERY}", timeout=120)
                console.sh(f"cryptsetup close g{number}-a")
            else:
                reencrypt = f"cryptsetup reencrypt {PBKDF}"
                begin = f"{reencrypt} --encrypt --reduce-device-size {RESERVED}M --init-only {device} stock"
                yield _move(console, "encrypt", system, f"theirs.py '{begin}' '{reencrypt} --resume-only {device}'")
                console.sh("cryptsetup close stock")
            _unplug(booted, machine, serial)
        booted.kill()


def _replace(machine: Machine, pairs: int, mib: int) -> Iterator[Move]:
    size = 3 * mib  # btrfs copies no full chunk without room for another
    first = [machine.disk(f"first{number}", size) for number in range(4)]
    with _boot(machine) as booted:
        console = _begin(booted, machine)
        create = f"unlock group create ours --disk {first[0]} {first[1]} --mount /srv/ours"
        console.sh(f"{create} --recovery-key-file {RECOVERY}", timeout=240)
        console.sh(f"{_open_stock(first[2], 'first2')} && {_open_stock(first[3], 'first3')}")
        console.sh("mkfs.btrfs -q -m raid1 -d raid1 /dev/mapper/first2 /dev/mapper/first3; mkdir /srv/stock")
        console.sh("mount /dev/mapper/first2 /srv/stock")
        for each in "ours", "stock":
            console.sh(f"head -c {mib}M /dev/urandom >/srv/{each}/data; sync", timeout=240)
        ours, stock = ("ours-a", "first0"), ("first2", "first2")  # mapping and serial number of what goes next
        for number, system in enumerate(_turns("replace", pairs)):
            serial = f"disk{number}"
            device = _plug(booted, machine, serial, size)
            console.sh("udevadm settle; sync; echo 3 >/proc/sys/vm/drop_caches")
            if system == UNLOCK:
                command = f"unlock disk replace {ours[0]} {device} --recovery-key-file {RECOVERY} --yes"
                yield _move(console, "replace", system, f"replace.py '{command}' {mib << 20}")
                _unplug(booted, machine, ours[1])
                ours = console.sh(f"lsblk -nro NAME {device} | tail -n 1").out.strip(), serial
            else:
                command = f"{_open_stock(device, serial)} && "
                command += f"btrfs replace start -B -f /dev/mapper/{stock[0]} /dev/mapper/{serial} /srv/stock"
                yield _move(console, "replace", system, f"replace.py '{command}' {mib << 20}")
                console.sh(f"cryptsetup close {stock[0]}")
                _unplug(booted, machine, stock[1])
                stock = serial, serial
        booted.kill()


def _rekey(machine: Machine, pairs: int, _: int) -> Iterator[Move]:
    others = tuple(machine.disks)  # a machine has 26 disks
    disks = " ".join(machine.disk(f"disk{number}", 300) for number in range(DISKS))
    stock = machine.disk("stock", 32)
    with machine.boot(memory="2500M", limit=3000, without=others) as booted:
        console = _begin(booted, machine)
        create = f"unlock group create many --disk {disks} --mount /srv/many --recovery-key-file {RECOVERY}"
        console.sh(create, timeout=600)
        console.sh(f"cryptsetup luksFormat {PBKDF} {stock}")
        commands = {
            UNLOCK: "unlock rekey many",
            STOCK["rekey"]: f"cryptsetup luksChangeKey {PBKDF} {stock} {PASSPHRASE}",
        }
        for system in _turns("rekey", pairs):
            timed = f"sync; a=$(date +%s%N); {commands[system]} >&2; echo $(($(date +%s%N) - a))"
            seconds = int(console.sh(timed, timeout=120).out) / 1e9
            yield Move("rekey", system, seconds, seconds, 0.0, 0.0)
        booted.kill()


_OPERATIONS: dict[str, Callable[[Machine, int, int], Iterator[Move]]] = {
    "deep rekey": _deep,
    "encrypt": _encrypt,
    "replace": _replace,
    "rekey": _rekey,
}


def _turns(operation: str, pairs: int) -> Iterator[str]:
    """Each is as often the first of a pair as the second."""
    systems = [UNLOCK, STOCK[operation]]
    for number in range(pairs):
        yield from systems if number % 2 == 0 else reversed(systems)


def _boot(machine: Machine) -> Running:
    return machine.boot(memory="2500M", limit=3000)


def _begin(booted: Running, machine: Machine) -> Guest:
    console = up(booted)
    console.write(RECOVERY, machine.recovery_key.encode(), 0o600)
    console.write(PASSPHRASE, b"of the stock command", 0o600)
    for name, program in {"ours": OURS, "theirs": THEIRS, "replace": REPLACE}.items():
        console.write(f"/run/{name}.py", program.encode())
    return console


def _move(console: Guest, operation: str, system: str, program: str) -> Move:
    """Runs one of the programs above."""
    began, told, ended = json.loads(console.sh(f"sync; sleep 1; python3 -I /run/{program}", timeout=900).out)
    (first, none), (last, size) = told[0], told[-1]
    return Move(operation, system, ended - began, first - began, ended - last, (size - none) / (last - first))


def _open_stock(device: str, name: str) -> str:
    return f"cryptsetup luksFormat {PBKDF} {device} && cryptsetup open --key-file {PASSPHRASE} {device} {name}"


def _plug(booted: Running, machine: Machine, serial: str, mib: int) -> str:
    device = machine.disk(serial, mib)
    booted.plug(machine.disks[serial])
    booted.guest.appears(device)
    return device


def _unplug(booted: Running, machine: Machine, serial: str) -> None:
    booted.unplug(machine.disks[serial])
    (machine.home / f"{serial}.raw").unlink()
    del machine.disks[serial]
