# SPDX-License-Identifier: Apache-2.0
"""Decrypts a dump by age(1), and zstd(1) where it is compressed, as a stream.

age releases a piece of 64 KiB when that is authentic, so what was read is true, and may yet be cut: only the end of
`read_dump` says that all of it was there. The identity goes to age through a pipe.
"""

import os
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from typing import IO, TypeAlias

from ...errors import CommandFailed, Tampered
from ...keys import dump_key
from ...secret import Secret
from .kept import Dump

Process: TypeAlias = "subprocess.Popen[bytes]"

PIECE = 1 << 20
"""Bytes that are read at once."""
ENVIRONMENT = {"PATH": "/usr/sbin:/usr/bin:/sbin:/bin", "LC_ALL": "C"}


def read_dump(dump: Dump, identity: Secret) -> Iterator[bytes]:
    """The core in pieces. Raises Tampered at the end of what is authentic, CommandFailed, OSError."""
    with _decrypting(dump, identity) as age, _unpacking(age, dump.packed) as last:
        assert last.stdout
        while piece := last.stdout.read(PIECE):
            yield piece
        if words := _failure(age):
            raise Tampered(f"{dump.name} was changed, cut, or is not of this key: {words}", "unlock dump list")
        if last is not age and (words := _failure(last)):
            raise Tampered(f"{dump.name} is not a whole zstd stream: {words}", "unlock dump list")


def read_packed(dump: Dump, identity: Secret) -> Iterator[bytes]:
    """The same, compressed as it is."""
    return read_dump(dump._replace(packed=False), identity)


@contextmanager
def _decrypting(dump: Dump, identity: Secret) -> Iterator[Process]:
    read, write = os.pipe()
    try:
        with dump_key.identity_file(identity) as line:
            os.write(write, line.value)
        os.close(write)
        with open(dump.path, "rb") as source:
            command = ["age", "--decrypt", "--identity", f"/dev/fd/{read}"]
            age = _start(command, stdin=source, pass_fds=(read,))
    finally:
        os.close(read)
    try:
        yield age
    finally:
        _end(age)


@contextmanager
def _unpacking(age: Process, packed: bool) -> Iterator[Process]:
    """zstd behind age; age itself where nothing is packed."""
    if not packed:
        yield age
        return
    assert age.stdout
    zstd = _start(["zstd", "-q", "-d", "-c"], stdin=age.stdout)
    age.stdout.close()  # zstd has it
    try:
        yield zstd
    finally:
        _end(zstd)


def _start(command: list[str], *, stdin: IO[bytes], pass_fds: tuple[int, ...] = ()) -> Process:
    try:
        return subprocess.Popen(
            command, stdin=stdin, stdout=subprocess.PIPE, stderr=subprocess.PIPE, pass_fds=pass_fds, env=ENVIRONMENT
        )
    except FileNotFoundError as error:
        hint = f"apt install {command[0]}"
        raise CommandFailed(f"{command[0]} is not installed", hint, code="command-missing") from error


def _failure(process: Process) -> str:
    """Why a program failed, whose output was read to its end; '' when it did not."""
    assert process.stderr
    words = process.stderr.read().decode("utf-8", "replace").strip().splitlines() or [""]
    status = process.wait()
    return (words[0].removeprefix("age: error: ") or f"status {status}") if status else ""


def _end(process: Process) -> None:
    """Ends a program that may still run, and closes its pipes."""
    if process.poll() is None:
        process.kill()
    process.wait()
    for pipe in (process.stdout, process.stderr):
        if pipe:
            pipe.close()
