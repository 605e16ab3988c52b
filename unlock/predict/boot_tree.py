# SPDX-License-Identifier: Apache-2.0
"""Reads what is below /boot and on the EFI system partition. Whoever had the disk may have made anything of it.

    a path below the root directory ──BootTree──> a regular file: content, SHA-256 and size, all from one read
                                             or > why it is none that can be trusted: Unreadable

It goes from the mount point down, a folder at a time, and follows no link anywhere. What lies on another file system
than the mount point does not count. Nothing is opened for reading but regular files, so that no pipe or device blocks
it, and all is bounded: the constants below.

A name counts only if its folder lists it once, also but for case, and the file that is opened is the one that is
listed. Else whoever made the file system decides which file a name means, and can let that change by itself: a second
file of the name appears when the host removes its own. FAT's short names and folders that ignore case do the same.

One BootTree serves one prediction, or one look at boot: a file that is read twice must have the SHA-256 of the first
read.
"""

import os
import stat
import unicodedata
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from hashlib import sha256
from typing import NamedTuple

from ..paths import Paths
from .replay import cannot_predict

TOPS = ("boot", "boot/efi", "efi")
"""Folders that may be mount points."""
MAX_FILE = 1 << 30
"""Bytes of a file."""
MAX_LOOK = 4 << 30
"""Bytes that `names` reads in all. Holes of a file count."""
MAX_NAMES = 8192
"""Names in all folders that are listed."""
MAX_DEPTH = 16
"""Folders in each other."""
_CHUNK = 1 << 20
_FOLDER = os.O_RDONLY | os.O_DIRECTORY | os.O_NONBLOCK | os.O_NOCTTY | os.O_CLOEXEC
_KINDS = (
    (stat.S_ISLNK, "a link"),
    (stat.S_ISFIFO, "a pipe"),
    (stat.S_ISSOCK, "a socket"),
    (stat.S_ISBLK, "a device"),
    (stat.S_ISCHR, "a device"),
    (stat.S_ISDIR, "a folder"),
)
TWICE = "its folder has two files of this name"


class Unreadable(Exception):
    """A path that is no regular file, or not one alone; the words say why."""


class _Absent(Unreadable):
    """There is no such path."""


class Name(NamedTuple):
    """A name below one of TOPS that is no folder which could be listed."""

    path: str
    digest: bytes
    """SHA-256 of a regular file; b"" for anything else."""
    target: str
    """Of a link; "" for anything else."""
    why: str
    """Why it is no file that can be trusted; "" for a regular file."""


class _Listing(NamedTuple):
    """What a folder lists."""

    inodes: dict[str, int]
    by_key: dict[str, list[str]]
    """Name without its case -> names, as often as they are listed."""
    twice: set[str]
    """Names that may mean more than one file."""


class BootTree:
    """Reads files by their paths below the root directory. Files outside of TOPS can be read too, not listed."""

    def __init__(self, paths: Paths) -> None:
        self.paths = paths
        self._digests: dict[str, bytes] = {}
        self._listings: dict[str, _Listing] = {}
        self._left = MAX_NAMES

    # Files --------------------------------------------------------------------------------------------------

    def read(self, path: str) -> bytes | None:
        """The content; None when it is no regular file. Raises Refused when it has changed since it was first read."""
        parts: list[bytes] = []
        try:
            self._take(path, parts.append)
        except Unreadable:
            return None
        return b"".join(parts)

    def digest(self, path: str) -> bytes | None:
        """SHA-256 of the content as it was first read; None when it is no regular file."""
        try:
            return self._digests.get(path) or self._take(path)
        except Unreadable:
            return None

    def why_unreadable(self, path: str) -> str:
        """Why `read` has nothing; "" when it has something."""
        try:
            with self._open(path) as (_, found):
                return "" if stat.S_ISREG(found.st_mode) else _kind(found)
        except Unreadable as problem:
            return str(problem)

    def size(self, path: str) -> int | None:
        """Bytes of a regular file; None for anything else."""
        try:
            with self._open(path) as (_, found):
                return found.st_size if stat.S_ISREG(found.st_mode) else None
        except Unreadable:
            return None

    def is_file(self, path: str) -> bool:
        return self.size(path) is not None

    def is_there(self, path: str) -> bool:
        """Whether it has a name, whatever it is."""
        try:
            with self._open(path):
                return True
        except Unreadable as problem:
            return not isinstance(problem, _Absent)

    @contextmanager
    def name_for_programs(self, path: str) -> Iterator[str]:
        """A name by which another program can open this regular file, whatever becomes of its path. Raises
        Unreadable."""
        with self._open(path) as (fd, found):
            if not stat.S_ISREG(found.st_mode):
                raise Unreadable(_kind(found))
            yield f"/proc/{os.getpid()}/fd/{fd}"

    # Folders ------------------------------------------------------------------------------------------------

    def list_names(self, folder: str) -> list[str]:
        """The names in a folder that it lists once; none when there is no such folder."""
        try:
            with self._open(folder) as (fd, _):
                listing = self._listing(fd, folder)
        except Unreadable:
            return []
        return sorted(listing.inodes.keys() - listing.twice)

    def folder_id(self, folder: str) -> tuple[int, int] | None:
        """What tells a folder from others, also if it has several paths; None when there is none."""
        try:
            with self._open(folder) as (_, found):
                return (found.st_dev, found.st_ino) if stat.S_ISDIR(found.st_mode) else None
        except Unreadable:
            return None

    def device_of(self, path: str) -> str:
        """The device number of the file system that the path is on; "" for one that is not there."""
        try:
            with self._open(path) as (_, found):
                return f"{os.major(found.st_dev)}:{os.minor(found.st_dev)}"
        except Unreadable:
            return ""

    def names(self) -> Iterator[Name]:
        """Every name below TOPS, with its SHA-256 where it is a regular file. Raises Refused as `read` does."""
        left = MAX_LOOK
        for top in ("boot", "efi"):
            for each in self._names_below(top):
                if not each.why:
                    left -= self.size(each.path) or 0
                    try:
                        each = each._replace(digest=self._digests.get(each.path) or self._take(each.path, most=left))
                    except Unreadable as problem:
                        each = each._replace(why=str(problem))
                yield each

    def _names_below(self, folder: str) -> Iterator[Name]:
        try:
            with self._open(folder) as (fd, found):
                listing = self._listing(fd, folder) if stat.S_ISDIR(found.st_mode) else None
                target = os.readlink("", dir_fd=fd) if stat.S_ISLNK(found.st_mode) else ""
                why = "" if listing or stat.S_ISREG(found.st_mode) else _kind(found)
        except Unreadable as problem:
            if folder in TOPS and isinstance(problem, _Absent):
                return
            listing, target, why = None, "", str(problem)
        if listing is None:
            yield Name(folder, b"", target, why)
            return
        if folder.count("/") >= MAX_DEPTH:
            yield Name(folder, b"", "", "it is too deep a folder")
            return
        for name in sorted(listing.inodes):
            path = os.path.join(folder, name)
            if name in listing.twice:
                yield Name(path, b"", "", TWICE)
            else:
                yield from self._names_below(path)

    # One step at a time -------------------------------------------------------------------------------------

    def _take(self, path: str, keep: Callable[[bytes], object] = len, most: int = MAX_FILE) -> bytes:
        """Reads a file; its SHA-256. Raises Unreadable; Refused when it has changed since it was first read."""
        try:
            digest = self._hash(path, keep, min(most, MAX_FILE))
        except Unreadable:
            if path in self._digests:
                raise cannot_predict(f"{path} was changed while it was read") from None
            raise
        if self._digests.setdefault(path, digest) != digest:
            raise cannot_predict(f"{path} was changed while it was read")
        return digest

    def _hash(self, path: str, keep: Callable[[bytes], object], most: int) -> bytes:
        digest, size = sha256(), 0
        with self._open(path) as (fd, found):
            if not stat.S_ISREG(found.st_mode):
                raise Unreadable(_kind(found))
            try:
                again = os.open(f"/proc/self/fd/{fd}", os.O_RDONLY | os.O_NONBLOCK | os.O_NOCTTY | os.O_CLOEXEC)
                with open(again, "rb", buffering=0) as file:
                    while size <= most and found.st_size <= most and (part := file.read(_CHUNK)):
                        size += len(part)
                        digest.update(part)
                        keep(part)
            except OSError as error:
                raise Unreadable(f"it cannot be read: {error.strerror}") from None
        if max(size, found.st_size) > most:
            raise Unreadable("it is too large")
        return digest.digest()

    @contextmanager
    def _open(self, path: str) -> Iterator[tuple[int, os.stat_result]]:
        """The last component, by a descriptor that reads a folder, and names anything else. Raises Unreadable."""
        fd = -1
        try:
            fd, found = self._descend(path)
            yield fd, found
        except FileNotFoundError:
            raise _Absent("it is not there") from None
        except (OSError, ValueError) as error:
            raise Unreadable(f"it cannot be read: {getattr(error, 'strerror', error)}") from None
        finally:
            if fd >= 0:
                os.close(fd)

    def _descend(self, path: str) -> tuple[int, os.stat_result]:
        fd = os.open(self.paths.root, _FOLDER)
        try:
            found = os.fstat(fd)
            device, folder = found.st_dev, ""
            for part in path.split("/"):
                below = self._step(fd, folder, part)
                os.close(fd)
                fd, found = below, os.fstat(below)
                folder = f"{folder}/{part}" if folder else part
                if folder in TOPS:
                    device = found.st_dev
                elif found.st_dev != device:
                    raise Unreadable("another file system is mounted there")
            return fd, found
        except BaseException:
            os.close(fd)
            raise

    def _step(self, fd: int, folder: str, part: str) -> int:
        if part in ("", ".", ".."):
            raise Unreadable("it is no path below a folder")
        if not stat.S_ISDIR(os.fstat(fd).st_mode):
            raise _Absent("it is not there")
        listing = self._listing(fd, folder)
        name = part if part in listing.inodes else next(iter(listing.by_key.get(_key(part), [""])))
        if name in listing.twice:
            raise Unreadable(TWICE)
        if not name or (name != part and not _same_file(fd, name, part)):
            raise _Absent("it is not there")
        is_folder = stat.S_ISDIR(os.stat(name, dir_fd=fd, follow_symlinks=False).st_mode)
        flags = _FOLDER if is_folder else os.O_PATH | os.O_CLOEXEC
        below = os.open(name, flags | os.O_NOFOLLOW, dir_fd=fd)
        found = os.fstat(below)
        # a folder lists the number of what is below a mount; /boot and /efi may be mounted from the root's file system
        is_mounted = found.st_dev != os.fstat(fd).st_dev or (not folder and part in TOPS)
        # FAT numbers a file anew unless it is open
        if not is_mounted and found.st_ino not in (listing.inodes[name], _listed_inode(fd, name)):
            os.close(below)
            raise Unreadable("its folder lists another file under this name")
        return below

    def _listing(self, fd: int, folder: str) -> _Listing:
        """Raises Unreadable when there are too many names."""
        if folder in self._listings:
            return self._listings[folder]
        listing = _Listing({}, {}, set())
        with os.scandir(fd) as entries:
            for entry in entries:
                self._left -= 1
                if self._left < 0:
                    raise Unreadable(f"there are more than {MAX_NAMES} names")
                listing.by_key.setdefault(_key(entry.name), []).append(entry.name)
                listing.inodes[entry.name] = entry.inode()
        for names in listing.by_key.values():
            if len(names) > 1 and not _are_different(fd, names):
                listing.twice.update(names)
        self._listings[folder] = listing
        return listing


def top_of(path: str) -> str:
    """The one of TOPS that the path is below; "" for none."""
    return max((top for top in TOPS if f"{path}/".startswith(f"{top}/")), key=len, default="")


def _key(name: str) -> str:
    return unicodedata.normalize("NFD", unicodedata.normalize("NFD", name).casefold())


def _kind(found: os.stat_result) -> str:
    return "it is " + next((words for test, words in _KINDS if test(found.st_mode)), "no file")


def _same_file(fd: int, name: str, other: str) -> bool:
    """Whether the folder's file system ignores case, so that both are names of one file."""
    one = os.open(name, os.O_PATH | os.O_NOFOLLOW | os.O_CLOEXEC, dir_fd=fd)
    try:
        return os.path.samestat(os.fstat(one), os.stat(other, dir_fd=fd, follow_symlinks=False))
    finally:
        os.close(one)


def _are_different(fd: int, names: list[str]) -> bool:
    """Whether the names, which differ in their case at most, are those of as many files: of a folder that heeds it."""
    try:
        found = [os.stat(name, dir_fd=fd, follow_symlinks=False) for name in names]
    except OSError:
        return False
    return len({(each.st_dev, each.st_ino) for each in found}) == len(names)


def _listed_inode(fd: int, name: str) -> int:
    with os.scandir(fd) as entries:
        return next((entry.inode() for entry in entries if entry.name == name), -1)
