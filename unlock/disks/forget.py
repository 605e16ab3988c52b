# SPDX-License-Identifier: Apache-2.0
"""Makes the kernel release a mapping that is to be closed: its LVM volume groups, its registration with btrfs."""

import os
import struct

from ..errors import CommandFailed
from ..run import run

_BTRFS_IOC_FORGET_DEV = 0x50009405
"""_IOW(0x94, 5, struct btrfs_ioctl_vol_args): linux/btrfs.h. The struct is a signed 64 bit fd and a 4088 byte name."""


def forget_file_system(mapping: str) -> None:
    """Deactivates the volume groups on a mapping, and makes btrfs forget the device. Best effort."""
    node = f"/dev/mapper/{mapping}"
    if os.path.exists("/sbin/lvm") or os.path.exists("/usr/sbin/lvm"):
        try:
            run(["vgchange", "--activate", "n", "--select", f"pv_name={node}"], timeout=10)
        except CommandFailed:
            pass
    try:
        import fcntl

        control = os.open("/dev/btrfs-control", os.O_RDWR | os.O_CLOEXEC)
    except OSError:
        return
    try:
        fcntl.ioctl(control, _BTRFS_IOC_FORGET_DEV, bytearray(struct.pack("<q4088s", 0, node.encode())))
    except OSError:
        pass
    finally:
        os.close(control)
