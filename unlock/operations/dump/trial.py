# SPDX-License-Identifier: Apache-2.0
"""`unlock dump test`: crashes a process that knows a random text, and follows the text to its dump and back.

The text must be in what the host key opens, and not in the file. The dump is removed afterwards.
"""

import os
import resource
import signal
import subprocess
import time
from typing import NamedTuple

from ...errors import Refused, UnlockError
from ...keys import dump_key
from ...keys.access import Work
from . import kept, memory
from .extract import prove
from .kept import Dump
from .protection import read_protection

PATIENCE = 30.0
"""Seconds until the dump must be there; the kernel waits for its end before the process does."""


class Trial(NamedTuple):
    """What was seen."""

    name: str
    """Of the file, which is gone again."""
    size: int
    generation: int
    seconds: float
    """From the crash to the dump."""


def test(work: Work) -> Trial:
    """Raises Refused when no dump came of the crash, or one that is not encrypted; NoKey, Tampered."""
    protection = read_protection(work.paths)
    if not protection.encrypted or protection.do:
        raise Refused(f"dumps of processes: {protection.detail}", protection.do, code="plain-dumps")
    memory.note_plain_swap(work.paths)
    mark = os.urandom(32).hex().encode()
    begun = time.monotonic()
    pid = _crash(mark)
    dump = _wait_for(work, pid, begun + PATIENCE)
    seconds = time.monotonic() - begun
    try:
        with open(dump.path, "rb") as file:
            if mark in file.read():
                raise Refused(f"{dump.name} is not encrypted", "unlock check", code="plain-dumps")
        with dump_key.find_identity(work, dump.fingerprint, dump.generation) as identity:
            seen = _Search(mark)
            prove(dump, identity, seen.add)
        if not seen.found:
            raise Refused(
                f"{dump.name} is not the core of the process that crashed", "unlock check", code="dump-failed"
            )
    finally:
        os.unlink(dump.path)
    return Trial(dump.name, dump.size, dump.generation, seconds)


def _crash(mark: bytes) -> int:
    """The PID of a shell that has read the text and was killed by SIGSEGV."""

    def may_dump() -> None:
        resource.setrlimit(resource.RLIMIT_CORE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))

    command = ["/bin/sh", "-c", "read -r mark; kill -s SEGV $$; sleep 5"]
    child = subprocess.Popen(command, stdin=subprocess.PIPE, preexec_fn=may_dump)
    child.communicate(mark + b"\n")
    if child.returncode != -signal.SIGSEGV:
        raise UnlockError(f"the process for the test ended with {child.returncode}, and not by SIGSEGV")
    return child.pid


def _wait_for(work: Work, pid: int, until: float) -> Dump:
    while True:
        found = [each for each in kept.list_dumps(work.paths) if each.pid == pid]
        if found:
            return found[-1]
        if time.monotonic() > until:
            raise Refused(
                f"process {pid} crashed, and no dump of it is in {work.paths.dumps}",
                "journalctl -b -g unlock:, dmesg",
                code="dump-failed",
            )
        time.sleep(0.1)


class _Search:
    """Looks for a text in pieces that pass by."""

    def __init__(self, wanted: bytes) -> None:
        self.wanted, self.found = wanted, False
        self._end = b""

    def add(self, piece: bytes) -> None:
        self.found = self.found or self.wanted in self._end + piece
        self._end = piece[-len(self.wanted) :]
