# SPDX-License-Identifier: Apache-2.0
"""The md arrays that lie on a group's mappings and lack disks, from /sys (Documentation/admin-guide/md.rst of Linux).

A member that was away and is back is open, and md may still do without it: it takes nothing in that it finds too old.
What LVM's raid lacks is not in /sys: lvs(8) tells.
"""

import os
from typing import NamedTuple

from .devices import device_lies_on_mappings, read_line


class Array(NamedTuple):
    """One that is degraded."""

    node: str
    lacks: int
    disks: int
    """As many as it should have."""
    rebuilding: bool

    def describe(self) -> str:
        """In words."""
        words = f"{self.node} lacks {self.lacks} of its {self.disks} disks"
        return f"{words}, and is being rebuilt" if self.rebuilding else words

    @property
    def hint(self) -> str:
        """What to type next."""
        return "cat /proc/mdstat" if self.rebuilding else f"mdadm --detail {self.node}"


def find_degraded(names: set[str], root: str = "/") -> list[Array]:
    """Those that lie on mappings of these names alone."""
    blocks = os.path.join(root, "sys/block")
    try:
        listed = sorted(os.listdir(blocks))
    except OSError:
        return []
    found = []
    for name in listed:
        folder = os.path.join(blocks, name)
        lacks, disks = (read_line(folder, "md", each).partition(" ")[0] for each in ("degraded", "raid_disks"))
        if lacks.isdigit() and int(lacks) and device_lies_on_mappings(read_line(folder, "dev"), names, root):
            rebuilding = read_line(folder, "md", "sync_action") == "recover"
            found.append(Array(f"/dev/{name}", int(lacks), int(disks) if disks.isdigit() else 0, rebuilding))
    return found
