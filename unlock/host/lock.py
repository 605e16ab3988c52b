# SPDX-License-Identifier: Apache-2.0
"""The lock in /run/unlock that every command takes before it changes this host: one operation at a time."""

import fcntl
import os
import time
from collections.abc import Iterator
from contextlib import contextmanager

from .. import log
from ..errors import Refused
from ..paths import Paths

PATIENCE = 120.0
"""Seconds to wait for another command to end."""


@contextmanager
def exclusive(paths: Paths, patience: float = PATIENCE) -> Iterator[None]:
    """Holds the lock. The sync that the timer starts takes it too. Raises Refused when another command still holds it
    after `patience`, in seconds."""
    os.makedirs(paths.run, mode=0o700, exist_ok=True)
    fd = os.open(paths.of_this_boot("lock"), os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    end = time.monotonic() + patience
    try:
        noted = False
        while not try_lock(fd):
            if not noted:
                log.note("waiting for another unlock command to end")
                noted = True
            if time.monotonic() >= end:
                raise Refused("another unlock command is changing this host", "run it again later", code="busy")
            time.sleep(0.2)
        yield
    finally:
        fcntl.flock(fd, fcntl.LOCK_UN)  # a forked process that a device holds has the file open too
        os.close(fd)


@contextmanager
def alone(paths: Paths, name: str, busy: str) -> Iterator[None]:
    """Holds a lock of its own in /run/unlock while data moves and other commands go on. Raises Refused with the words
    `busy` where another process holds it."""
    os.makedirs(paths.run, mode=0o700, exist_ok=True)
    fd = os.open(paths.of_this_boot(name), os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    try:
        if not try_lock(fd):
            raise Refused(busy, "unlock status", code="busy")
        yield
    finally:
        os.close(fd)


def try_lock(fd: int) -> bool:
    """Locks an open file for this process alone; False where another process holds it."""
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        return False
    return True


def is_held(paths: Paths) -> bool:
    """Whether a command changes this host now. Takes no lock: the command that tries next would wait for it."""
    try:
        found = os.stat(paths.of_this_boot("lock"))
        with open("/proc/locks", encoding="ascii") as file:
            place = f"{os.major(found.st_dev):02x}:{os.minor(found.st_dev):02x}:{found.st_ino}"
            return any(place in line.split() and "->" not in line.split() for line in file)
    except OSError:
        return False
