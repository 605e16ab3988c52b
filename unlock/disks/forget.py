# SPDX-License-Identifier: Apache-2.0
"""What the kernel remembers of a file system on a mapping, and making it forget."""

import os

from ..errors import CommandFailed
from ..run import run


def forget(mapping: str) -> None:
    """Before a mapping is closed: its volume groups go, and btrfs forgets the device. Best effort."""
    node = f"/dev/mapper/{mapping}"
    if os.path.exists("/sbin/lvm") or os.path.exists("/usr/sbin/lvm"):
        try:
            run(["vgchange", "--activate", "n", "--select", f"pv_name={node}"], timeout=10)
        except CommandFailed:
            pass
    from . import btrfs  # early boot rarely closes one

    btrfs.forget(node)
