# SPDX-License-Identifier: Apache-2.0
"""The arrays of md and raids of LVM that lie on a group's mappings and lack disks, as the kernel tells it
(Documentation/admin-guide/md.rst and device-mapper/dm-raid.rst of Linux).

A member that was away and is back is open, and they may still do without it: they take nothing in that they find too
old.
"""

import os
from contextlib import suppress
from typing import NamedTuple

from ..errors import CommandFailed
from ..run import run
from .devices import device_lies_on_mappings, read_line


class Array(NamedTuple):
    """One that is degraded."""

    node: str
    lacks: int
    disks: int
    """As many as it should have."""
    rebuilding: bool
    hint: str
    """What to type next."""

    def describe(self) -> str:
        """In words."""
        words = f"{self.node} lacks {self.lacks} of its {self.disks} disks"
        return f"{words}, and is being rebuilt" if self.rebuilding else words


def find_degraded(names: set[str], root: str = "/") -> list[Array]:
    """Those that lie on mappings of these names alone."""
    blocks = os.path.join(root, "sys/block")
    try:
        listed = sorted(os.listdir(blocks))
    except OSError:
        return []
    folders = [os.path.join(blocks, each) for each in listed]
    ours = [each for each in folders if device_lies_on_mappings(read_line(each, "dev"), names, root)]
    arrays = [_read_md(each) for each in ours]
    volumes = {read_line(each, "dm", "name") for each in ours if read_line(each, "dm", "uuid").startswith("LVM-")}
    if volumes:
        with suppress(CommandFailed):  # a volume has gone meanwhile
            raids = read_raids(run(["dmsetup", "status", "--target", "raid"]))
            arrays += [each for name, each in raids if name in volumes]
    return [each for each in arrays if each and each.lacks]


def _read_md(folder: str) -> Array | None:
    """None for what is no array of md with redundancy."""
    lacks, disks = (read_line(folder, "md", each).partition(" ")[0] for each in ("degraded", "raid_disks"))
    if not lacks.isdigit():
        return None
    node = f"/dev/{os.path.basename(folder)}"
    rebuilding = read_line(folder, "md", "sync_action") == "recover"
    hint = "cat /proc/mdstat" if rebuilding else f"mdadm --detail {node}"
    return Array(node, int(lacks), int(disks) if disks.isdigit() else 0, rebuilding, hint)


def read_raids(text: str) -> list[tuple[str, Array]]:
    """The raids of LVM in what `dmsetup status` says, with their names.

    `vg-lv: 0 8192 raid raid1 2 A- 8192/8192 idle 0 0 -`: each disk is a letter. `D` is dead, `-` is not there, and `a`
    is not in sync, as all are while a new raid is made alike.
    """
    found = []
    for line in text.splitlines():
        name, _, status = line.partition(": ")
        words = status.split()
        if len(words) > 7 and words[2] == "raid":
            health, action = words[5], words[7]
            lacks = sum(health.count(each) for each in ("D-" if action == "resync" else "D-a"))
            node, rebuilding = f"/dev/mapper/{name}", action == "recover"
            do = f"lvs -a -o +lv_health_status,sync_percent,devices {node}"
            found.append((name, Array(node, lacks, len(health), rebuilding, do)))
    return found
