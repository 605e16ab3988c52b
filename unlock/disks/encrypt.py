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
from collections.abc import Iterator
from ctypes import c_void_p
from hashlib import sha256

from ..errors import DiskFailed
from ..paths import sync_folder
from ..secret import Secret
from . import luks
from .encrypt_plan import SHIFT
from .header import ANY
from .luks import Luks2Parameters, sized
from .raw_header import WriteLock, flush, read_valid_copies, write_header
from .reencrypt import BACKWARD, ENCRYPT, INITIALIZE_ONLY, MOVE_FIRST_SEGMENT, Disk, Parameters

_SUPERBLOCKS, _SECTOR = (1024, 64 << 10), 512
"""Where ext2 to ext4 and btrfs have theirs."""
_HEADERS = 32 << 10
"""Bytes of both copies of the header."""
_COPY = 16 << 10
_PIECE = 1 << 20


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
        self._do(
            "cannot be encrypted", "crypt_reencrypt_init_by_passphrase",
            None, *sized(passphrase), ANY, keyslot, cipher.encode(), mode.encode(), ctypes.byref(parameters),
        )  # fmt: skip


def start(path: str, device: str, passphrase: Secret, keyslot: int, clear: int) -> str:
    """Moves the first part to the end of the disk; disk and file are durable. Returns the SHA-256 of that part, in hex.
    The data is whole where it was until `put`. Raises DiskFailed."""
    with Prepared(path, device) as header:
        header.start_encryption(passphrase, keyslot)
    sync(path)
    return _make_durable(device, clear)


def move_again(path: str, device: str, clear: int) -> str:
    """The same when the file says so already, in one copy of the header at least, and the disk may not have the part.
    Raises Malformed too."""
    newest = read_valid_copies(path)[0]
    write_header(path, newest.metadata(path), newest, newest.sequence + 1)
    try:
        with open(device, "r+b", buffering=0) as disk:
            for at in range(0, SHIFT, _PIECE):
                _write(disk.fileno(), os.pread(disk.fileno(), _PIECE, at), clear + SHIFT + at)
    except OSError as error:
        raise DiskFailed(f"{device} cannot be written: {error.strerror}") from error
    return _make_durable(device, clear)


def _make_durable(device: str, clear: int) -> str:
    flush(device)
    first, moved = digest_of_part(device, 0), digest_of_part(device, clear + SHIFT)
    if first != moved:
        raise DiskFailed(f"{device}: what was written to its end does not read back")
    return moved


def digest_of_part(device: str, offset: int) -> str:
    """SHA-256, in hex, of SHIFT bytes, read from the disk itself. Raises DiskFailed."""
    digest = sha256()
    try:
        with open(device, "rb", buffering=0) as file:
            os.posix_fadvise(file.fileno(), offset, SHIFT, os.POSIX_FADV_DONTNEED)
            for at in range(offset, offset + SHIFT, _PIECE):
                digest.update(os.pread(file.fileno(), _PIECE, at))
    except OSError as error:
        raise DiskFailed(f"{device} cannot be read: {error.strerror}") from error
    return digest.hexdigest()


def put(path: str, device: str, moved: str) -> None:
    """Writes the header to the disk, durably. May be cut off and repeated. `moved`: the digest of what was moved; over
    anything else nothing is written. Raises DiskFailed, OSError."""
    with open(path, "rb") as file:
        content = file.read()
    if len(content) != SHIFT:
        raise DiskFailed(f"{path} has not the size of a header")
    with open(device, "rb", buffering=0) as disk:
        if _has(disk.fileno(), content):
            return
    try:
        with WriteLock(device), open(os.open(device, os.O_RDWR | os.O_EXCL | os.O_CLOEXEC), "r+b", buffering=0) as disk:
            if not _has_begun(disk.fileno(), content) and digest_of_part(device, 0) != moved:
                raise DiskFailed(f"{device} was written to meanwhile")
            for start, part in _parts(content):
                _write(disk.fileno(), part, start)
                os.fsync(disk.fileno())
    except OSError as error:
        raise DiskFailed(f"{device}: its header cannot be written: {error.strerror}") from error


def _parts(content: bytes) -> Iterator[tuple[int, bytes]]:
    """The superblocks go first, each a sector that is written whole or not at all: from then on nobody takes what is
    left for a file system. The first copy of the header comes last: where it is, everything is."""
    for at in _SUPERBLOCKS:
        yield at, bytes(_SECTOR)
    yield _HEADERS, content[_HEADERS:]
    yield _COPY, content[_COPY:_HEADERS]
    yield 0, content[:_COPY]


def _has_begun(disk: int, content: bytes) -> bool:
    return all(os.pread(disk, _SECTOR, at) in (bytes(_SECTOR), content[at : at + _SECTOR]) for at in _SUPERBLOCKS)


def _has(disk: int, content: bytes) -> bool:
    return all(os.pread(disk, _PIECE, at) == content[at : at + _PIECE] for at in range(0, len(content), _PIECE))


def _write(disk: int, content: bytes, offset: int) -> None:
    left = memoryview(content)
    while left:
        count = os.pwrite(disk, left[:_PIECE], offset)
        left, offset = left[count:], offset + count


def sync(path: str) -> None:
    with open(path, "rb") as file:
        os.fsync(file.fileno())
    sync_folder(os.path.dirname(path))
