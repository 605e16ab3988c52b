# SPDX-License-Identifier: Apache-2.0
"""`unlock dump extract`: the core of a dump, to a new file, to standard output, or into gdb.

A file appears when all of it is authentic and written, or never: until then it has no name. Standard output cannot be
taken back, so the dump is read twice: once for the proof. gdb reads the core from memory, which has room for it and is
not swapped out.
"""

import os
import re
import stat
import subprocess
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TypeAlias

from ... import journald, log, messages, protect
from ...disks import devices
from ...errors import CommandFailed, Malformed, Refused, UnlockError, Usage
from ...keys import dump_key
from ...keys.access import Work
from ...paths import Paths
from ...secret import Secret
from . import memory
from .core import Core
from .kept import Dump
from .opened import read_dump
from .protection import plain_swaps
from .vmcore import KernelLog, VmCore

Content: TypeAlias = "Core | VmCore | KernelLog"

_OUTPUT = 1
"""Standard output: it gets the core itself, and no text."""

PLAIN, CUT = "plain-dumps", "cut-dump"
RISKS = {
    PLAIN: "the core is written to a disk that is not encrypted, or may be",
    CUT: "the core is used although its end is missing",
}
"""What `--accept NAME` can accept, and what that means."""


def to_file(work: Work, dump: Dump, path: str, accept: frozenset[str]) -> None:
    """Writes the core to a new file. Raises Usage, Refused, NoKey, Tampered, Malformed, OSError; then there is none."""
    memory.note_plain_swap(work.paths)
    with new_file(path) as fd:
        _refuse_plain_disk(work.paths, path, accept)
        with dump_key.find_identity(work, dump.fingerprint, dump.generation) as identity:
            _copy(dump, identity, accept, lambda piece: write_all(fd, piece))
        give_name(fd, path)
    _record(work, dump, path)


def to_output(work: Work, dump: Dump, accept: frozenset[str]) -> None:
    """Writes the core to standard output; a log to a terminal as `escape_controls` makes it. Raises as `to_file`; then
    nothing was written."""
    memory.note_plain_swap(work.paths)
    terminal = os.isatty(_OUTPUT)
    if terminal and not dump.is_log:
        raise Usage("standard output is a terminal, and a core is no text", "--gdb, --output FILE, or a pipe")
    if stat.S_ISREG(os.fstat(_OUTPUT).st_mode):
        _refuse_plain_disk(work.paths, os.path.realpath(f"/proc/self/fd/{_OUTPUT}"), accept)
    with dump_key.find_identity(work, dump.fingerprint, dump.generation) as identity:
        _copy(dump, identity, accept, lambda piece: None)
        _record(work, dump, "standard output")
        _copy(dump, identity, accept, lambda piece: write_all(_OUTPUT, escape_controls(piece) if terminal else piece))


def to_gdb(work: Work, dump: Dump, accept: frozenset[str]) -> int:
    """Opens the core in gdb; returns its exit status. Raises as `to_file`, Refused where memory has no room for it;
    CommandFailed."""
    if dump.of_kernel:
        raise Usage("gdb does not read the dump of a kernel; crash(8) does", "unlock dump extract DUMP --output FILE")
    if not memory.stay_out_of_swap(work.paths):
        _refuse_plain_swap(work.paths, "the core in memory", accept)
    protect.kill_first_for_memory()
    room = memory.Room(work.paths, dump.name)

    def hold(piece: bytes) -> None:
        room.take(piece)
        write_all(fd, piece)

    fd = os.memfd_create("core", os.MFD_CLOEXEC)
    try:
        with dump_key.find_identity(work, dump.fingerprint, dump.generation) as identity:
            core = _copy(dump, identity, accept, hold)
        _record(work, dump, "gdb")
        program = core.program()
        known = os.path.isabs(program) and os.path.isfile(program)
        command = ["gdb", "-q", *([program] if known else []), f"--core=/proc/self/fd/{fd}"]
        return subprocess.run(command, pass_fds=(fd,)).returncode
    except FileNotFoundError as error:
        raise CommandFailed("gdb is not installed", "apt install gdb", code="command-missing") from error
    finally:
        os.close(fd)


def _record(work: Work, dump: Dump, to: str) -> None:
    words = f"{dump.name} was decrypted, for {to}"
    journald.record(work.paths, messages.DUMP_DECRYPTED, words, dump=dump.name)


def prove(dump: Dump, identity: Secret, seen: Callable[[bytes], object] = lambda piece: None) -> None:
    """Reads all of a dump. Raises Tampered, Malformed unless it is authentic and whole."""
    _copy(dump, identity, frozenset(), seen)


def _copy(dump: Dump, identity: Secret, accept: frozenset[str], write: Callable[[bytes], object]) -> Content:
    core: Content = KernelLog() if dump.is_log else VmCore() if dump.of_kernel else Core()
    for piece in read_dump(dump, identity):
        core.add(piece)
        write(piece)
    if why := core.problem():
        if CUT not in accept:
            cut = "makedumpfile did not end" if dump.of_kernel else "the process was killed while the kernel wrote it"
            said = cut if "ends" in why else "age opened it"
            raise Malformed(f"{dump.name}: {why}: {said}", f"--accept {CUT}", code=CUT)
        log.note(f"accepted: {CUT}: {why}")
    return core


def escape_controls(piece: bytes) -> bytes:
    """Text for a terminal: whoever writes to the disk can encrypt a log of his own, so it has \\xNN for each byte but
    printable ASCII, tab and line end."""
    return re.sub(rb"[^\t\n -~]", lambda found: b"\\x%02x" % found[0][0], piece)


def write_all(fd: int, piece: bytes) -> None:
    with memoryview(piece) as left:
        done = 0
        while done < len(left):
            done += os.write(fd, left[done:])


# A new file, which has no name before it is whole


@contextmanager
def new_file(path: str) -> Iterator[int]:
    """A file in the folder of `path` that has no name yet; gone at the end unless `give_name` was called. Raises Usage
    where `path` exists, OSError."""
    if os.path.lexists(path):
        raise Usage(f"{path} exists already", "name a file that does not exist yet")
    fd = os.open(os.path.dirname(os.path.abspath(path)), os.O_TMPFILE | os.O_WRONLY | os.O_CLOEXEC, 0o600)
    try:
        yield fd
    finally:
        os.close(fd)


def give_name(fd: int, path: str) -> None:
    """Makes a file of `new_file` durable, then gives it its name, durably. Raises OSError, which names it."""
    folder, name = os.path.split(os.path.abspath(path))
    folder_fd = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(fd)
        os.link(f"/proc/self/fd/{fd}", name, dst_dir_fd=folder_fd, follow_symlinks=True)  # linkat(2) alone follows it
        os.fsync(folder_fd)
    except OSError as error:
        error.filename, error.filename2 = path, None
        raise
    finally:
        os.close(folder_fd)


def _refuse_plain_disk(paths: Paths, path: str, accept: frozenset[str]) -> None:
    """Raises Refused where the file system is on a disk that is not encrypted, or that is not known, or in memory that
    goes to such a swap."""
    folder = os.path.dirname(os.path.abspath(path))
    if is_swapped(folder):
        _refuse_plain_swap(paths, path, accept)
    elif not is_protected(folder):
        _refuse(f"{path} is on a disk that is not encrypted: the core would be there in plain", accept, "--gdb")


def _refuse_plain_swap(paths: Paths, what: str, accept: frozenset[str]) -> None:
    """Raises Refused where there is a swap on a disk that is not encrypted."""
    if swaps := plain_swaps(paths):
        _refuse(f"{what} can go to the swap {swaps[0]}, which is not encrypted", accept, f"swapoff {swaps[0]}")


def _refuse(why: str, accept: frozenset[str], instead: str) -> None:
    if PLAIN not in accept:
        raise Refused(why, f"{instead}, --output FILE on an encrypted disk, or --accept {PLAIN}", code=PLAIN)
    log.note(f"accepted: {PLAIN}: {RISKS[PLAIN]}")


def is_swapped(folder: str) -> bool:
    """Whether files in a folder are in memory that may be swapped out."""
    return devices.mount_type(_mount_of(folder)) == "tmpfs"


def is_protected(folder: str) -> bool:
    """Whether files in a folder are in memory alone, or on encrypted disks."""
    where = _mount_of(folder)
    try:
        if devices.mount_type(where) in ("tmpfs", "ramfs"):
            return True
        numbers = devices.devices_of_mount(where)
    except (UnlockError, OSError):
        return False
    return bool(numbers) and all(devices.is_encrypted(each) for each in numbers)


def _mount_of(folder: str) -> str:
    where = os.path.realpath(folder)
    while not os.path.ismount(where):
        where = os.path.dirname(where)
    return where
