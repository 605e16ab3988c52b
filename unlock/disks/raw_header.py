# SPDX-License-Identifier: Apache-2.0
"""Reads and writes both copies of a LUKS2 header, for the steps of a re-encryption that libcryptsetup (2.6 to 2.8) does
in an order that loses data or the header when the power is cut in between.

The library's lock of the disk is held meanwhile. The binary header: LUKS2 On-Disk Format Specification 1.1.2,
section 2.
"""

import fcntl
import os
import stat
from hashlib import sha256

from ..errors import DiskFailed, Malformed
from ..light import Any, NamedTuple
from ..strictjson import canonical
from .header import MAX_TEXT, are_whole, has_valid_checksum, parse_metadata, read_copies

LOCKS = "/run/cryptsetup"
"""Where libcryptsetup has its locks of block devices."""
_PIECE = 1 << 20
_BINARY = 4096
"""Bytes of the binary header before the JSON."""


class Copy(NamedTuple):
    """A copy of the header whose checksum is right."""

    offset: int
    sequence: int
    content: bytes

    def metadata(self, device: str) -> dict[str, Any]:
        """Raises Malformed."""
        return parse_metadata(self.content[_BINARY:].rstrip(b"\0"), device)


def read_valid_copies(device: str) -> list[Copy]:
    """The copies whose checksum is right, the newest first; of one write, the first on the disk. Raises DiskFailed;
    Malformed when there is none."""
    found = [
        Copy(offset, int.from_bytes(content[16:24], "big"), content)
        for offset, content in read_copies(device, every=True)
        if has_valid_checksum(content)
    ]
    if not found:
        raise Malformed(f"{device}: the LUKS2 header is ruined", f"cryptsetup repair {device}")
    return sorted(found, key=lambda each: (-each.sequence, each.offset))


def was_cut_before_second(device: str, newest: Copy) -> bool:
    """Whether the second copy is of the write before, whole or half overwritten. Not when it is ruined otherwise, nor
    when the newest is itself the second. Raises DiskFailed."""
    if newest.offset:
        return False
    before = newest.sequence - 1
    for offset, content in read_copies(device, every=True):
        sequence = int.from_bytes(content[16:24], "big")
        if offset == len(newest.content) and not (sequence == newest.sequence and has_valid_checksum(content)):
            return sequence in (before, newest.sequence)
    return False


def write_header(device: str, metadata: dict[str, Any], like: Copy, sequence: int) -> None:
    """Writes both copies with this metadata and sequence number; the first is durable before the second is touched.
    Everything else is as in `like`. Raises DiskFailed."""
    size = len(like.content)
    text = canonical(metadata)
    if len(text) >= min(size - _BINARY, MAX_TEXT):
        raise DiskFailed(f"{device} has no room in its header", code="no-room")
    try:
        disk = os.open(device, os.O_WRONLY | os.O_CLOEXEC)
        try:
            for offset in (0, size):
                _write(disk, copy_content(like.content, text, offset, sequence), offset)
                os.fsync(disk)
        finally:
            os.close(disk)
    except OSError as error:
        raise DiskFailed(f"{device}: its header cannot be written: {error.strerror}") from error


def copy_content(like: bytes, text: bytes, offset: int, sequence: int) -> bytes:
    """A copy of the header for this offset, with this JSON; the rest is as in `like`, a copy of the same size."""
    head = bytearray(like[:_BINARY])
    head[:6] = b"SKUL\xba\xbe" if offset else b"LUKS\xba\xbe"
    head[16:24] = sequence.to_bytes(8, "big")
    head[104:168] = os.urandom(64)
    head[256:264] = offset.to_bytes(8, "big")
    head[448:512] = bytes(64)
    body = text.ljust(len(like) - _BINARY, b"\0")
    head[448:480] = sha256(head + body).digest()
    return bytes(head) + body


def _write(file: int, content: bytes, offset: int) -> None:
    left = memoryview(content)
    while left:
        count = os.pwrite(file, left, offset)
        left, offset = left[count:], offset + count


def make_whole(device: str) -> None:
    """Writes the newest copy over the other one, where a power cut has left two that differ. Not for the header of a
    disk that is being re-encrypted: there the older one may be right. Raises DiskFailed, Malformed."""
    with WriteLock(device):
        if not are_whole(read_copies(device, every=True)):
            newest = read_valid_copies(device)[0]
            write_header(device, newest.metadata(device), newest, newest.sequence + 1)


def flush(device: str) -> None:
    """Makes what was written to a disk durable. Raises DiskFailed."""
    try:
        disk = os.open(device, os.O_RDWR | os.O_CLOEXEC)
        try:
            os.fsync(disk)
        finally:
            os.close(disk)
    except OSError as error:
        raise DiskFailed(f"{device} cannot be written: {error.strerror}") from error


def overwrite(device: str, offset: int, size: int) -> None:
    """Replaces a part of a disk by random bytes, durably. Raises DiskFailed."""
    try:
        disk = os.open(device, os.O_WRONLY | os.O_CLOEXEC)
        try:
            for start in range(offset, offset + size, _PIECE):
                _write(disk, os.urandom(min(_PIECE, offset + size - start)), start)
            os.fsync(disk)
        finally:
            os.close(disk)
    except OSError as error:
        raise DiskFailed(f"{device} cannot be written: {error.strerror}") from error


class WriteLock:
    """libcryptsetup's lock for writing to the header of a disk, in a `with`: a flock of a file named by the device
    number, or of an image file itself. It waits for other holders. Raises DiskFailed."""

    def __init__(self, device: str) -> None:
        self._device = device
        self._path = lock_path(device)
        self._fd = -1

    def __enter__(self) -> None:
        try:
            if not self._path:
                self._fd = os.open(self._device, os.O_RDWR | os.O_CLOEXEC)
                fcntl.flock(self._fd, fcntl.LOCK_EX)
                return
            os.makedirs(LOCKS, 0o700, exist_ok=True)
            while not self._take():
                os.close(self._fd)
        except OSError as error:
            raise DiskFailed(f"{self._device}: its lock {self._path} cannot be taken: {error.strerror}") from error

    def _take(self) -> bool:
        """False when the holder before has removed the name meanwhile."""
        self._fd = os.open(self._path, os.O_CREAT | os.O_RDWR | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600)
        fcntl.flock(self._fd, fcntl.LOCK_EX)
        try:
            return os.path.samestat(os.stat(self._path), os.fstat(self._fd))
        except FileNotFoundError:
            return False

    def __exit__(self, *_: object) -> None:
        if self._path:
            os.unlink(self._path)
        os.close(self._fd)


def lock_path(device: str) -> str:
    """The name of libcryptsetup's lock of a block device; '' for an image file, which it locks itself. Raises
    DiskFailed."""
    try:
        found = os.stat(device)
    except OSError as error:
        raise DiskFailed(f"{device} cannot be read: {error.strerror}") from error
    if not stat.S_ISBLK(found.st_mode):
        return ""
    return f"{LOCKS}/L_{os.major(found.st_rdev)}:{os.minor(found.st_rdev)}"
