# SPDX-License-Identifier: Apache-2.0
"""Encrypts a disk in place: makes the header of a disk that holds data in clear, and puts it on the disk.

    Prepared   the header in a file on another disk: keyslots, token
    start      the first part of the data goes to the end of the disk, which is free; the header in the file says so
    put        the file's content over the first part: while it is written, nothing opens the disk

libcryptsetup (2.6 to 2.8) does not flush the moved part before it overwrites the place that it comes from, and writes
the header in one unflushed piece. So it gets a file as the disk's header here, and the disk is flushed and read again
before `put`, which may be cut off and repeated until the data moves. From then on disks.reencrypt runs it.
"""

import ctypes
import os
import struct
from collections.abc import Iterator
from ctypes import c_void_p
from hashlib import sha256
from typing import NamedTuple

from ..errors import DiskFailed, Malformed, Refused
from ..paths import sync_folder, write_atomically
from ..secret import Secret
from . import luks
from .encrypt_plan import SHIFT
from .header import ANY
from .luks import Luks2Parameters, sized
from .raw_header import WriteLock, flush, read_valid_copies, write_header
from .reencrypt import BACKWARD, ENCRYPT, INITIALIZE_ONLY, MOVE_FIRST_SEGMENT, Disk, Parameters
from .shrink import Change

_EXT_SUPERBLOCK, _BTRFS_SUPERBLOCK = 1024, 64 << 10
_EXT_MAGIC_AT, _EXT_MAGIC = 1024 + 56, b"\x53\xef"
_SECTOR = 512
_UUID = slice(168, 208)
"""In a copy of the header."""
_HEADERS = 32 << 10
"""Bytes of both copies of the header."""
_COPY = 16 << 10
_PIECE = 1 << 20
_CHANGE = struct.Struct("<QQ")
"""Offset and size, before each content."""


def prepare(path: str, device: str, volume_key: Secret, *, uuid: str, sector: int) -> None:
    """Makes the file of the header, for data that begins at SHIFT. `sector`: of the encryption, 0 for what suits the
    disk. Raises DiskFailed, OSError."""
    if os.path.exists(path):
        os.unlink(path)
    with open(os.open(path, os.O_CREAT | os.O_EXCL | os.O_WRONLY | os.O_CLOEXEC, 0o600), "wb") as file:
        file.truncate(4096)
    luks.format_detached(path, device, volume_key, uuid=uuid, offset=SHIFT, sector=sector)


class Prepared(Disk):
    """The file of the header, as that of the disk. What is written goes to the file, but for `start`."""

    def __init__(self, path: str, device: str) -> None:
        self.device = path
        self._cd = c_void_p()
        self._memory = -1
        self.is_whole = True
        try:
            self._load(path, data_device=device)
        except BaseException:
            self.close()
            raise

    def __enter__(self) -> "Prepared":
        return self

    def _use_disk(self) -> None:
        pass

    def start_encryption(self, passphrase: Secret, keyslot: int) -> None:
        """Moves the first part, not yet durably. Raises DiskFailed."""
        segment = self.metadata["segments"]["0"]
        cipher, _, mode = str(segment["encryption"]).partition("-")
        luks2 = Luks2Parameters(sector_size=int(segment["sector_size"]))
        parameters = Parameters(
            mode=ENCRYPT,
            direction=BACKWARD,
            resilience=b"datashift",
            hash=b"sha256",
            data_shift=SHIFT // 512,
            luks2=ctypes.cast(ctypes.pointer(luks2), c_void_p),
            flags=INITIALIZE_ONLY | MOVE_FIRST_SEGMENT,
        )
        self._minimal_pbkdf()
        self._do(
            "cannot be encrypted", "crypt_reencrypt_init_by_passphrase",
            None, *sized(passphrase), ANY, keyslot, cipher.encode(), mode.encode(), ctypes.byref(parameters),
        )  # fmt: skip


class Moved(NamedTuple):
    """SHA-256, in hex, of SHIFT bytes."""

    first: str
    """Of the first part, where it was."""
    moved: str
    """Of the same at the end of the disk, with its changes."""


def start(path: str, device: str, passphrase: Secret, keyslot: int, clear: int, changes: list[Change]) -> Moved:
    """Moves the first part to the end of the disk, with the changes of it; disk and file are durable. The data is whole
    where it was until `put`. Raises DiskFailed."""
    with Prepared(path, device) as header:
        header.start_encryption(passphrase, keyslot)
    return move_again(path, device, clear, changes)


def move_again(path: str, device: str, clear: int, changes: list[Change]) -> Moved:
    """The same when the file says so already, in one copy of the header at least, and the disk may not have the part.
    Raises Malformed too."""
    newest = read_valid_copies(path)[0]
    write_header(path, newest.metadata(path), newest, newest.sequence + 1)
    sync(path)
    first = _read_part(device, 0)
    moved = bytearray(first)
    for each in changes:
        if each.offset < SHIFT:
            moved[each.offset : each.offset + len(each.content)] = each.content
    try:
        with open(device, "r+b", buffering=0) as disk:
            _write(disk.fileno(), moved, clear + SHIFT)
    except OSError as error:
        raise DiskFailed(f"{device} cannot be written: {error.strerror}") from error
    flush(device)
    found = Moved(sha256(first).hexdigest(), sha256(moved).hexdigest())
    if found != (digest_of_part(device, 0), digest_of_part(device, clear + SHIFT)):
        raise DiskFailed(f"{device}: what was written to its end does not read back")
    return found


def _read_part(device: str, offset: int) -> bytes:
    """SHIFT bytes, from the disk itself. Raises DiskFailed."""
    try:
        with open(device, "rb", buffering=0) as file:
            os.posix_fadvise(file.fileno(), offset, SHIFT, os.POSIX_FADV_DONTNEED)
            return b"".join(os.pread(file.fileno(), _PIECE, at) for at in range(offset, offset + SHIFT, _PIECE))
    except OSError as error:
        raise DiskFailed(f"{device} cannot be read: {error.strerror}") from error


def digest_of_part(device: str, offset: int) -> str:
    """SHA-256, in hex, of SHIFT bytes, read from the disk itself. Raises DiskFailed."""
    return sha256(_read_part(device, offset)).hexdigest()


def put(path: str, device: str, found: Moved, clear: int, changes: list[Change]) -> None:
    """Writes the header to the disk, and the changes of what was not moved, durably. May be cut off and repeated.
    Raises Refused where the disk has something that
    it did not hold and `put` does not write; DiskFailed, OSError."""
    with open(path, "rb") as file:
        content = file.read()
    if len(content) != SHIFT:
        raise DiskFailed(f"{path} has not the size of a header")
    if _has_header(device, content):
        flush(device)
        return
    try:
        with WriteLock(device), open(os.open(device, os.O_RDWR | os.O_EXCL | os.O_CLOEXEC), "r+b", buffering=0) as disk:
            moved = _read_part(device, clear + SHIFT)
            superblock = _superblock_offset(moved)
            _refuse_written(device, content, found, moved, superblock, changes)
            for start, part in _parts(content, superblock, changes):
                _write(disk.fileno(), part, start)
                if start < SHIFT:
                    os.fsync(disk.fileno())
    except OSError as error:
        raise DiskFailed(f"{device}: its header cannot be written: {error.strerror}") from error


def _parts(content: bytes, superblock: int, changes: list[Change]) -> Iterator[tuple[int, bytes]]:
    """The superblock goes first, a sector that is written whole or not at all: from then on nobody takes what is left
    for a file system. The first copy of the header comes last: where either copy is, all the rest is."""
    yield superblock, bytes(_SECTOR)
    yield from (each for each in changes if each.offset >= SHIFT)
    yield _HEADERS, content[_HEADERS:]
    yield _COPY, content[_COPY:_HEADERS]
    yield 0, content[:_COPY]


def _has_header(device: str, content: bytes) -> bool:
    """Whether a copy of the header is on the disk: what opens the disk may have written both again since."""
    try:
        return any(copy.content[_UUID] == content[_UUID] for copy in read_valid_copies(device))
    except Malformed:
        return False


def _superblock_offset(first: bytes) -> int:
    return _EXT_SUPERBLOCK if first[_EXT_MAGIC_AT : _EXT_MAGIC_AT + 2] == _EXT_MAGIC else _BTRFS_SUPERBLOCK


def _refuse_written(
    device: str, content: bytes, found: Moved, moved: bytes, superblock: int, changes: list[Change]
) -> None:
    """Raises Refused unless each sector is as it was or as `put` leaves it. The superblock tells whether `put` has
    begun: if not, all is as it was."""
    first = _read_part(device, 0)
    is_moved = sha256(moved).hexdigest() == found.moved
    if first[superblock : superblock + _SECTOR] in (bytes(_SECTOR), content[superblock : superblock + _SECTOR]):
        unknown = {superblock}  # what was there before a change is not known any more
        for each in changes:
            unknown.update(range(each.offset // _SECTOR * _SECTOR, each.offset + len(each.content), _SECTOR))
        is_ours = all(
            first[at : at + _SECTOR] in (moved[at : at + _SECTOR], content[at : at + _SECTOR]) or at in unknown
            for at in range(0, SHIFT, _SECTOR)
        )
    else:
        is_ours = sha256(first).hexdigest() == found.first
    if not (is_moved and is_ours):
        raise Refused(
            f"{device}: another program has written to it since its first part was copied to its end",
            f"wipefs {device}",
            code="written",
        )


def _write(disk: int, content: bytes | bytearray, offset: int) -> None:
    left = memoryview(content)
    while left:
        count = os.pwrite(disk, left[:_PIECE], offset)
        left, offset = left[count:], offset + count


def write_changes(path: str, changes: list[Change]) -> None:
    """Durable on return. Raises OSError."""
    write_atomically(path, b"".join(_CHANGE.pack(each.offset, len(each.content)) + each.content for each in changes))


def read_changes(path: str) -> list[Change]:
    """Raises Malformed, OSError."""
    with open(path, "rb") as file:
        content = file.read()
    found, at = [], 0
    while at < len(content):
        if at + _CHANGE.size > len(content):
            raise Malformed(f"{path} is not whole")
        offset, size = _CHANGE.unpack_from(content, at)
        at += _CHANGE.size + size
        found.append(Change(offset, content[at - size : at]))
    if at != len(content):
        raise Malformed(f"{path} is not whole")
    return found


def sync(path: str) -> None:
    with open(path, "rb") as file:
        os.fsync(file.fileno())
    sync_folder(os.path.dirname(path))
