# SPDX-License-Identifier: Apache-2.0
"""Whole boots of one host, a LUKS root and a group of three disks, by an initramfs of each builder; and how much larger
unlock makes an image."""

from pathlib import Path
from typing import NamedTuple, get_args

from tests.lab import image
from tests.lab.image import Builder
from tests.lab.machine import Machine, report
from tests.lab.stories import measured, up

BUILDERS: tuple[Builder, ...] = get_args(Builder)
ROUNDS = 5
_STARTED, _UNSEALED, _ROOT, _ALL = "agent started", "unsealed", "root open", "last of 4 disks open"
PHASES = (_STARTED, _UNSEALED, _ROOT, _ALL)
_WITHOUT = {
    "initramfs-tools": {
        "conf.d/remove": "rm -rf /usr/share/initramfs-tools/hooks/unlock /usr/share/initramfs-tools/scripts/*/unlock\n"
    },
    "dracut": {"dracut.conf.d/remove.conf": 'omit_dracutmodules+=" unlock "\n'},
}
_LIKE_DEBIAN = {
    "initramfs-tools": {"conf.d/level": "COMPRESS=zstd\n"},
    "dracut": {"dracut.conf.d/level.conf": 'compress="zstd"\n'},
}


class Boot(NamedTuple):
    builder: Builder
    phases: dict[str, float]
    """Seconds after the kernel has started."""


class Size(NamedTuple):
    """Of an image, in bytes."""

    without: int
    whole: int


def boots(home: Path) -> list[Boot]:
    """The builders take turns."""
    machines = {each: measured(builder=each).clone(home / each) for each in BUILDERS}
    found = []
    for _ in range(ROUNDS):
        for builder, machine in machines.items():
            found.append(Boot(builder, _boot(machine)))
            told = ", ".join(f"{name} {at:.2f}" for name, at in found[-1].phases.items())
            print(f"  {builder:16} {told}", flush=True)
    return found


def _boot(machine: Machine) -> dict[str, float]:
    with machine.boot() as booted:
        found = report(up(booted))
        booted.poweroff()
    assert found["verdict"] == "unsealed"
    at: dict[str, float] = {}
    for when, kind, text in found["events"]:
        if kind == "start":
            at.setdefault(_STARTED, when)
        if kind == "key":
            at.setdefault(_UNSEALED, when)
        if kind == "disk" and text.endswith(" opened"):
            at[_ALL] = when
            if text.split()[1] == "root":
                at[_ROOT] = when
    return {name: at[name] for name in PHASES}


def sizes(builder: Builder) -> Size:
    """Compressed as Debian does it, with the modules of Debian's kernel."""
    built = image.build("luks", runs="qemu", builder=builder)
    level = _LIKE_DEBIAN[builder]
    whole, without = (built.initramfs(files).stat().st_size for files in (level, {**level, **_WITHOUT[builder]}))
    return Size(without=without, whole=whole)
