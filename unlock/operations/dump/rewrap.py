# SPDX-License-Identifier: Apache-2.0
"""`unlock dump rewrap`: encrypts a dump anew, for somebody else or to the present host key.

The core goes from age to age through pipes, compressed as it is. A copy for others opens with stock age, and zstd, and
not with the host key. `--all` moves dumps from former host keys to the present one: the new file is whole, durable and
proven before the old one goes; killed in between, both are there, and the next run removes the old one.
"""

import fcntl
import os
import select
import subprocess
import termios
from collections.abc import Iterable, Iterator
from typing import NamedTuple

from ... import journald, messages
from ...errors import CommandFailed, Refused, UnlockError
from ...keys import dump_key
from ...keys.access import Work
from ...secret import Secret
from . import kept, memory
from .extract import give_name, new_file
from .kept import Dump
from .opened import ENVIRONMENT, read_packed

PATIENCE = 10.0
"""Seconds until age asks."""


class Moved(NamedTuple):
    """What became of one dump."""

    name: str
    """Of its file now."""
    outcome: str
    """`rewrapped`, `unchanged`, or an error's code."""
    error: UnlockError | None = None


def for_others(work: Work, dump: Dump, path: str, *, recipient: str = "", password: Secret | None = None) -> None:
    """Writes a copy to a new file, for a recipient (age1..., or an SSH key), or, without one, for a password, which age
    asks for at the terminal where none is given. Raises Usage, NoKey, Tampered, CommandFailed, OSError; then there is
    no file."""
    memory.note_plain_swap(work.paths)
    how = ["--recipient", recipient] if recipient else ["--passphrase"]
    with (
        new_file(path) as fd,
        dump_key.find_identity(work, dump.fingerprint, dump.generation) as identity,
    ):
        encrypt(read_packed(dump, identity), how, fd, password)
        give_name(fd, path)
    words = f"{dump.name} was encrypted for {recipient or 'a password'}, in {path}"
    journald.record(work.paths, messages.DUMP_DECRYPTED, words, dump=dump.name)


def rewrap_all(work: Work) -> list[Moved]:
    """Moves each dump to the present host key. A dump that cannot be opened stays, and does not stop the others. Raises
    Refused when there is no recipient."""
    memory.note_plain_swap(work.paths)
    dump_key.refresh(work)
    to = dump_key.read_recipient(work.paths)
    if to is None:
        raise Refused("there is no recipient that dumps are encrypted to", "unlock dump enable", code="no-recipient")
    return list(_rewrap_each(work, to))


def _rewrap_each(work: Work, to: dump_key.Recipient) -> Iterator[Moved]:
    for dump in kept.list_dumps(work.paths):
        if dump.fingerprint == to.fingerprint:
            yield Moved(dump.name, "unchanged")
            continue
        try:
            yield Moved(_move(work, dump, to), "rewrapped")
        except UnlockError as error:
            yield Moved(dump.name, error.code, error)


def _move(work: Work, dump: Dump, to: dump_key.Recipient) -> str:
    """Returns the new name. Raises NoKey, Tampered, CommandFailed, OSError."""
    new = dump._replace(generation=to.generation, fingerprint=to.fingerprint)
    new = new._replace(path=os.path.join(work.paths.dumps, kept.dump_name(new)))
    if os.path.lexists(new.path):
        _prove_readable(work, new)
    else:
        with new_file(new.path) as fd:
            with dump_key.find_identity(work, dump.fingerprint, dump.generation) as identity:
                encrypt(read_packed(dump, identity), ["--recipient", to.text], fd)
            _prove_readable(work, new._replace(path=f"/proc/self/fd/{fd}"))
            os.utime(fd, ns=(os.stat(dump.path).st_atime_ns, os.stat(dump.path).st_mtime_ns))
            give_name(fd, new.path)
    os.unlink(dump.path)
    return new.name


def _prove_readable(work: Work, dump: Dump) -> None:
    """Raises NoKey, Tampered. A core without its end, which the old dump had too, is none of its business."""
    with dump_key.find_identity(work, dump.fingerprint, dump.generation) as identity:
        for _ in read_packed(dump, identity):
            pass


def encrypt(pieces: Iterable[bytes], how: list[str], fd: int, password: Secret | None = None) -> None:
    """Writes what age makes of `pieces` to an open file. Raises CommandFailed, and what `pieces` raises."""
    ours, theirs = os.openpty() if password else (-1, -1)
    try:
        age = subprocess.Popen(
            ["age", "--encrypt", *how],
            stdin=subprocess.PIPE,
            stdout=fd,
            stderr=subprocess.PIPE,
            env=ENVIRONMENT,
            start_new_session=password is not None,
            preexec_fn=(lambda: fcntl.ioctl(theirs, termios.TIOCSCTTY, 0)) if password else None,
        )
    except FileNotFoundError as error:
        raise CommandFailed("age is not installed", "apt install age", code="command-missing") from error
    assert age.stdin and age.stderr
    try:
        if password:
            _answer(ours, password)
        for piece in pieces:
            age.stdin.write(piece)
        age.stdin.close()
    except BrokenPipeError:
        pass  # it says why
    except BaseException:
        age.kill()
        raise
    finally:
        words = age.stderr.read().decode("utf-8", "replace").strip()
        status = age.wait()
        for end in (ours, theirs) if password else ():
            os.close(end)  # earlier, age would find it gone
        for pipe in (age.stdin, age.stderr):
            try:
                pipe.close()
            except BrokenPipeError:
                pass
    if status:
        said = (words.splitlines() or [f"status {status}"])[0].removeprefix("age: error: ")
        raise CommandFailed(f"age did not encrypt: {said}", "age --encrypt --recipient KEY, by hand, says more")


def _answer(terminal: int, password: Secret) -> None:
    """age takes a password from its terminal alone, twice; it turns the echo off before it asks."""
    said = b""
    for number in (1, 2):
        while said.count(b"assphrase") < number:
            if not select.select([terminal], [], [], PATIENCE)[0]:
                raise CommandFailed("age did not ask for a password", "--password, at a terminal")
            said += os.read(terminal, 4096)
        for part in (password.value, b"\n"):
            os.write(terminal, part)
