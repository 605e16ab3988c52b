# SPDX-License-Identifier: Apache-2.0
"""`make bench`: what unlock takes, beside systemd-cryptsetup, clevis and systemd-coredump, and whether that is as good
as it should be.

The systems take turns. Other work on this machine only adds, so a goal is met by the least of the runs; in brackets is
the median, of ratios that of each turn. All of it is in build/bench.json.

    python -m tests.bench [native] [compare] [many] [boots] [size] [move] [dump]       default: all
"""

import json
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, NamedTuple

from tests.lab import image
from tests.lab.machine import Machine

from . import boots, dump, machine, moving, native
from .chips import CHIPS
from .machine import CLEVIS, FLOOR, FORKED, SYSTEMD, UNLOCK, Run

CHECKOUT = Path(__file__).resolve().parents[2]
PARTS = ("native", "compare", "many", "boots", "size", "move", "dump")
RATIO = {
    1: {"no latency": 1.2, "firmware": 1.0, "discrete": 0.4},
    24: {"no latency": 0.6, "firmware": 0.4, "discrete": 0.13},
}
"""Number of disks, chip -> unlock's time, systemd-cryptsetup's being 1."""
KEY_MS = 60.0
TIMES_FLOOR = 1.2
"""unlock's time with 24 disks and no latency, that of libcryptsetup alone being 1."""
DUMP_RATIO = 1.0
"""unlock's time for a dump of 1 GiB, systemd-coredump's being 1."""
DUMP_MIB = 64.0
"""All processes of the writer, whatever the core."""
TIMES_INITRAMFS_TOOLS = 1.0
"""When the last of four disks is open with dracut, the time with initramfs-tools being 1."""
GROWTH_MB = 7.0
"""Of an image, compressed."""
LINEAR = 1.25
"""What one of the last 50 of 100 disks takes more, one of the 25 before them being 1."""

MOVED = 0.95
"""The rate at which unlock moves data, at least, that of the stock command being 1."""


class Goal(NamedTuple):
    """A measured value that should not be more than `most`."""

    what: str
    measured: float
    """By the least of the runs."""
    median: float
    most: float
    profile: list[str]
    """Where the time went."""

    @property
    def verdict(self) -> str:
        return "hit" if self.measured <= self.most else "MISS"


def main() -> int:
    parts = sys.argv[1:] or PARTS
    if wrong := set(parts) - set(PARTS):
        print(f"no such part: {', '.join(wrong)}; there are {', '.join(PARTS)}", file=sys.stderr)
        return 2
    began = time.monotonic()
    found: dict[str, Any] = {"load": [os.getloadavg()[0]], "cores": os.cpu_count()}
    goals: list[Goal] = []
    with tempfile.TemporaryDirectory(prefix="unlock-bench-", dir="/var/tmp") as home:
        if {"native", "compare", "many", "dump"} & set(parts):
            built = image.build("plain", commands=machine.COMMANDS)
        if "native" in parts:
            goals += keys(built, Path(home), found)
        if "dump" in parts:
            goals += dumps(built, Path(home), found)
        if {"compare", "many"} & set(parts):
            bench = Machine(Path(home, "machine"), built)
            enrolled = machine.enroll(bench, max(machine.MANY) if "many" in parts else max(machine.ROUNDS))
            if "compare" in parts:
                goals += side_by_side(machine.compare(bench, enrolled), found)
            if "many" in parts:
                goals += many(machine.many(bench, enrolled), found)
        if "boots" in parts:
            goals += by_builder(boots.boots(Path(home)), found)
    if "size" in parts:
        goals += growth(found)
    if "move" in parts:
        goals += moved(moving.measure(), found)
    found["load"].append(os.getloadavg()[0])
    verdicts(goals)
    found["goals"] = [{**each._asdict(), "verdict": each.verdict} for each in goals]
    found["minutes"] = round((time.monotonic() - began) / 60, 1)
    target = CHECKOUT / "build" / "bench.json"
    target.parent.mkdir(exist_ok=True)
    target.write_text(json.dumps(found, indent=1) + "\n")
    print(f"\n{found['minutes']} minutes; load {found['load'][0]:.1f} before, {found['load'][1]:.1f} after")
    print(f"written: {target.relative_to(CHECKOUT)}")
    return 0


def verdicts(goals: list[Goal]) -> None:
    """The table of goals, and the profile of each that is missed."""
    print(f"\n{'goal':60} {'measured':>9} {'(median)':>9} {'at most':>8}")
    for each in goals:
        print(f"{each.what:60} {each.measured:9.2f} {f'({each.median:.2f})':>9} {each.most:8.2f}  {each.verdict}")
    for each in goals:
        if each.verdict == "MISS":
            print(f"\nmissed: {each.what}")
            print("\n".join(f"    {line}" for line in each.profile))


# The key path


def keys(built: image.Image, home: Path, found: dict[str, Any]) -> list[Goal]:
    """Natively, from exec to the volume key."""
    taken = native.measure(built, home)
    found["native"] = taken._asdict()
    print(f"\nthe key path, natively, {native.RUNS} runs: ms, median (least); ms of CPU, median (least)")
    for name, wall in taken.wall.items():
        print(f"    {name:30} {both(wall)}    {both(taken.cpu[name])}")
    print(f"    {'unlock, to the volume key':30} {both(taken.key)}")
    print(f"    {'of that, imports':30} {both(taken.phases['imports'])}")
    profile = [f"{name:22} {both(each)} ms" for name, each in taken.phases.items()]
    what = "unlock, natively, exec to volume key, ms"
    return [Goal(what, min(taken.key), statistics.median(taken.key), KEY_MS, profile)]


# A core


def dumps(built: image.Image, home: Path, found: dict[str, Any]) -> list[Goal]:
    """Of 1 GiB, until its file has its name."""
    taken = dump.measure(built, home)
    found["dumps"] = {
        core: {name: [each._asdict() for each in runs] for name, runs in by.items()} for core, by in taken.items()
    }
    print(f"\na core of 1 GiB, {dump.ROUNDS} runs: seconds, median (least); size of the file")
    goals = []
    for core, by in taken.items():
        for name, runs in by.items():
            print(f"    {core:16} {name:18} {both([each.seconds for each in runs])}    {runs[0].bytes >> 20} MiB")
        ours, theirs = ([each.seconds for each in by[name]] for name in (dump.OURS, dump.THEIRS))
        pairs = statistics.median(one / another for one, another in zip(ours, theirs, strict=True))
        what = f"unlock / systemd-coredump, 1 GiB, {core}"
        goals.append(Goal(what, min(ours) / min(theirs), pairs, DUMP_RATIO, []))
    memory = [each.memory / (1 << 20) for by in taken.values() for each in by[dump.OURS]]
    what = "memory of all processes that write a dump of 1 GiB, MiB"
    return [*goals, Goal(what, max(memory), statistics.median(memory), DUMP_MIB, [])]


# In the machine


def side_by_side(measured: machine.Found, found: dict[str, Any]) -> list[Goal]:
    """The table of seconds, and the ratios."""
    found["runs"] = [each._asdict() for each in measured.runs]
    found["sent"] = measured.sent
    print("\nseconds, median (least); x: unlock's least, this one's being 1; commands that reach the TPM")
    for count in machine.ROUNDS:
        for chip in CHIPS:
            ours = least(runs_of(measured.runs, UNLOCK, count, chip)).seconds
            print(f"    {count} disks, {chip}")
            for system in (UNLOCK, SYSTEMD, CLEVIS, FLOOR, FORKED):
                if runs := runs_of(measured.runs, system, count, chip):
                    times, reached = ours / least(runs).seconds, min(each.commands for each in runs)
                    print(f"        {system:20} {both(seconds(runs))} {times:6.2f} x {reached:6} commands")
    told = (f"{system} {sent}" for system, sent in measured.sent.items())
    print(f"    TPM commands that are sent for one disk: {', '.join(told)}; unlock sends no more for many")
    imports = [each.phases["interpreter, imports"] for each in measured.runs if each.system == UNLOCK]
    print(f"    interpreter and imports at the start of unlock, in the machine: {both(imports)} ms")
    goals = [
        ratio(measured.runs, SYSTEMD, count, chip, most)
        for count, by_chip in RATIO.items()
        for chip, most in by_chip.items()
    ]
    return [*goals, ratio(measured.runs, FLOOR, 24, "no latency", TIMES_FLOOR)]


def ratio(runs: list[Run], other: str, count: int, chip: str, most: float) -> Goal:
    """unlock's time, the other's being 1."""
    ours, theirs = (runs_of(runs, system, count, chip) for system in (UNLOCK, other))
    pairs = [one.seconds / another.seconds for one, another in zip(ours, theirs, strict=True)]
    measured = least(ours).seconds / least(theirs).seconds
    what = f"unlock / {other}, disks: {count}, {chip}"
    return Goal(what, measured, statistics.median(pairs), most, profile(least(ours)))


def many(runs: list[Run], found: dict[str, Any]) -> list[Goal]:
    """Whether the time is linear."""
    found["many"] = [each._asdict() for each in runs]
    print("\nunlock with many disks, parts of one: seconds, median (least)")
    few, some, most = machine.MANY

    def growth(system: str, one: Callable[[list[float]], float]) -> float:
        took = {count: one(seconds(runs_of(runs, system, count, "no latency"))) for count in machine.MANY}
        return (took[most] - took[some]) / (most - some) / ((took[some] - took[few]) / (some - few))

    for system in (UNLOCK, FLOOR):
        for count in machine.MANY:
            each = seconds(runs_of(runs, system, count, "no latency"))
            print(f"    {count:4} disks {system:20} {both(each)}   {1000 * min(each) / count:.0f} ms a disk")
    alone = growth(FLOOR, min), growth(FLOOR, statistics.median)
    print(f"    a disk more, {some} to {most} / {few} to {some}: {FLOOR} {alone[0]:.2f} ({alone[1]:.2f})")
    slowest = least(runs_of(runs, UNLOCK, most, "no latency"))
    what = f"unlock, a disk more: {some} to {most} / {few} to {some}"
    return [Goal(what, growth(UNLOCK, min), growth(UNLOCK, statistics.median), LINEAR, profile(slowest))]


# Whole boots


def by_builder(runs: list[boots.Boot], found: dict[str, Any]) -> list[Goal]:
    """When the disks of one host are open, with an initramfs of each builder."""
    found["boots"] = [each._asdict() for each in runs]
    print("\nboots: seconds after the kernel's start, median (least)")
    at = {
        builder: {name: [each.phases[name] for each in runs if each.builder == builder] for name in boots.PHASES}
        for builder in boots.BUILDERS
    }
    for builder, phases in at.items():
        for name, times in phases.items():
            print(f"    {builder:16} {name:24} {both(times)}")
    theirs, ours = (at[builder][boots.PHASES[-1]] for builder in boots.BUILDERS)
    median = statistics.median(one / other for one, other in zip(ours, theirs, strict=True))
    lines = [f"{name:24} {both(times)} s" for name, times in at["dracut"].items()]
    what = "last of 4 disks open, dracut / initramfs-tools"
    return [Goal(what, min(ours) / min(theirs), median, TIMES_INITRAMFS_TOOLS, lines)]


def growth(found: dict[str, Any]) -> list[Goal]:
    """What unlock adds to an image."""
    goals = []
    for builder in boots.BUILDERS:
        size = boots.sizes(builder)
        more = (size.whole - size.without) / 1e6
        found[f"image of {builder}"] = size._asdict()
        print(f"\nimage of {builder}: {size.whole:,} bytes, {size.without:,} without unlock")
        goals.append(Goal(f"image of {builder}: more by unlock, MB", more, more, GROWTH_MB, []))
    return goals


def moved(moves: list[moving.Move], found: dict[str, Any]) -> list[Goal]:
    """Rates, and what is spent beside them."""
    found["move"] = [each._asdict() for each in moves]
    print("\nMB/s, median (most); seconds before the first byte has moved and after the last, median (least)")
    goals = []
    for operation, stock in moving.STOCK.items():
        ours, theirs = (
            [each for each in moves if (each.operation, each.system) == (operation, system)]
            for system in (moving.UNLOCK, stock)
        )
        for each in ours, theirs:
            fixed = both([move.begin + move.end for move in each])
            rates = [move.rate / 1e6 for move in each]
            rate = f"{statistics.median(rates):8.1f} ({max(rates):7.1f})" if rates[0] else f"{'':18}"
            print(f"    {operation:12} {each[0].system:32} {rate} {fixed}")
        if operation == "rekey":
            what, most = f"unlock rekey, {moving.DISKS} disks / {stock} of one", float(moving.DISKS)
            costs = [[each.seconds for each in moves] for moves in (ours, theirs)]
        else:
            what, most = f"unlock {operation} / {stock}, time a byte", 1 / MOVED
            costs = [[1 / each.rate for each in moves] for moves in (ours, theirs)]
        pairs = [one / another for one, another in zip(*costs, strict=True)]
        goals.append(Goal(what, min(costs[0]) / min(costs[1]), statistics.median(pairs), most, []))
    return goals


def profile(run: Run) -> list[str]:
    """Where the time of a run went, by the agent's own report."""
    lines, before = [], 0.0
    for name, at in sorted(run.phases.items(), key=lambda each: each[1]):
        lines.append(f"{name:22} {at:9.0f} ms  {at - before:+9.0f}")
        before = at
    lines.append(
        f"CPU: unlock and its workers {run.cpu:.2f} s, udevd {run.udev:.2f} s; the TPM was busy for {run.tpm:.2f} s"
    )
    return lines


def runs_of(runs: Iterable[Run], system: str, disks: int, chip: str) -> list[Run]:
    return [each for each in runs if (each.system, each.disks, each.chip) == (system, disks, chip)]


def least(runs: list[Run]) -> Run:
    return min(runs, key=lambda each: each.seconds)


def seconds(runs: list[Run]) -> list[float]:
    return [each.seconds for each in runs]


def both(values: list[float]) -> str:
    """Median and least."""
    return f"{statistics.median(values):8.2f} ({min(values):7.2f})"


if __name__ == "__main__":
    sys.exit(main())
