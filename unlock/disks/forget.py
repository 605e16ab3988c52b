# SPDX-License-Identifier: Apache-2.0
"""Makes the kernel release a mapping that is to be closed: its LVM volume groups, its registration with btrfs."""

import os

from ..errors import CommandFailed
from ..run import run


def forget_file_system(mapping: str) -> None:
    """Deactivates the volume groups on a mapping, and makes btrfs forget the device. Best effort."""
    node = f"/dev/mapper/{mapping}"
    if os.path.exists("/sbin/lvm") or os.path.exists("/usr/sbin/lvm"):
        try:
            run(["vgchange", "--activate", "n", "--select", f"pv_name={node}"], timeout=10)
        except CommandFailed:
            pass
    from . import btrfs  # early boot rarely closes one

    btrfs.forget(node)
