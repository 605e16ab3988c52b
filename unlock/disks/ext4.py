# SPDX-License-Identifier: Apache-2.0
"""Makes a mounted ext4 larger: the ioctl of fs/ext4/ext4.h that resize2fs ends in. resize2fs itself opens the device
for writing, which a kernel without CONFIG_BLK_DEV_WRITE_MOUNTED refuses.
"""

import fcntl
import os
import struct

from ..errors import CommandFailed

_RESIZE_FS = 0x40086610
"""EXT4_IOC_RESIZE_FS: the number of blocks, 64 bit."""


def grow(mountpoint: str, size: int) -> None:
    """Lets the file system have so many bytes of its device. Does nothing if it has them. Raises CommandFailed."""
    try:
        fd = os.open(mountpoint, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        try:
            blocks = size // os.fstatvfs(fd).f_bsize
            fcntl.ioctl(fd, _RESIZE_FS, struct.pack("<Q", blocks))
        finally:
            os.close(fd)
    except OSError as error:
        words = f"{mountpoint}: ext4 cannot be made larger: {error.strerror}"
        raise CommandFailed(words, "dmesg | grep EXT4-fs") from error
