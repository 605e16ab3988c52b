# SPDX-License-Identifier: Apache-2.0
"""A partition for dumps of the kernel: a header of 4096 bytes, lines of text, and at 1 MiB an age file. Between them,
in the same form, is the kernel's log, which is there when the dump itself has no room or fails.

system/crash-init writes both, and the state `whole` of a header last. Nothing in a header is authentic: what the age
file has in it, age proves. docs/formats.md has the format.
"""

import os
import re
from collections.abc import Iterator
from typing import NamedTuple

from ...errors import DiskFailed, Malformed, NewerFormat

HEADER_SIZE = 4096
DATA_OFFSET = 1 << 20
LOG_HEADER_OFFSET, LOG_OFFSET = 4096, 8192
SIZE_MIN = 64 << 20
"""Bytes of a partition; a kernel that has just booted takes that much."""
_MAGIC, _LOG_MAGIC = "unlock kernel dump", "unlock kernel log"
_VERSION = 1
EMPTY, WRITING, WHOLE = "empty", "writing", "whole"
_PATTERNS = {
    "id": "[0-9a-f]{32}",
    "state": f"{EMPTY}|{WRITING}|{WHOLE}",
    "time": "[0-9]{1,12}",
    "kernel": "[A-Za-z0-9._+~-]{1,64}",
    "generation": "[0-9]{1,16}",
    "fingerprint": "[0-9a-f]{16}",
    "size": "[0-9]{1,16}",
}
"""Of each line: a word, a blank, a text of this form. An empty partition has the first two alone."""


class Header(NamedTuple):
    """The header of a partition."""

    id: str
    """32 hex digits, chosen when the partition was set up; the crash kernel looks for it."""
    state: str
    time: int = 0
    """Of the crash, in seconds since 1970."""
    kernel: str = ""
    """The release of the kernel that crashed."""
    generation: int = 0
    """Of the host key that the dump is encrypted to."""
    fingerprint: str = ""
    """Of the recipient."""
    size: int = 0
    """Bytes of the age file."""


def empty_header(id: str) -> bytes:
    return _in_bytes([f"{_MAGIC} {_VERSION}", f"id {id}", f"state {EMPTY}"])


def parse_header(data: bytes, magic: str = _MAGIC) -> Header | None:
    """None for a partition without this header. Raises Malformed, NewerFormat."""
    lines = data[:HEADER_SIZE].rstrip(b"\0").decode("ascii", "replace").split("\n")
    if not lines[0].startswith(f"{magic} "):
        return None
    version = lines[0].removeprefix(f"{magic} ")
    if re.fullmatch("[0-9]{1,4}", version, re.A) and int(version) > _VERSION:
        raise NewerFormat(f"the partition for kernel dumps has format {version}; this unlock reads {_VERSION}")
    words = [line.partition(" ")[::2] for line in lines[1:-1]]
    names = [name for name, _ in words]
    well_formed = all(name in _PATTERNS and re.fullmatch(_PATTERNS[name], text, re.A) for name, text in words)
    found = dict(words)
    wanted = list(_PATTERNS)[: 2 if found.get("state") == EMPTY else None]
    if lines[0] != f"{magic} {_VERSION}" or lines[-1] or names != wanted or not well_formed:
        raise Malformed("the partition for kernel dumps has a header that is not as unlock writes it")
    numbers = {name: int(found[name]) for name in ("time", "generation", "size") if name in found}
    return Header(
        found["id"],
        found["state"],
        numbers.get("time", 0),
        found.get("kernel", ""),
        numbers.get("generation", 0),
        found.get("fingerprint", ""),
        numbers.get("size", 0),
    )


def read_header(node: str) -> Header | None:
    """None where there is none. Raises DiskFailed, Malformed, NewerFormat."""
    try:
        with open(node, "rb", buffering=0) as disk:
            return parse_header(disk.read(HEADER_SIZE))
    except OSError as error:
        raise DiskFailed(f"{node}: {error.strerror}") from error


def read_log_header(node: str, crash: Header) -> Header | None:
    """The header of the log of a crash, the header of whose dump is given; None where that is not whole. Raises
    DiskFailed."""
    try:
        with open(node, "rb", buffering=0) as disk:
            disk.seek(LOG_HEADER_OFFSET)
            log = parse_header(disk.read(HEADER_SIZE), _LOG_MAGIC)
    except (Malformed, NewerFormat):
        return None
    except OSError as error:
        raise DiskFailed(f"{node}: {error.strerror}") from error
    same = log is not None and log._replace(state=crash.state, size=crash.size) == crash
    return log if log and same and log.state == WHOLE and log.size <= DATA_OFFSET - LOG_OFFSET else None


def write_empty(node: str, id: str) -> None:
    """From now on the partition is for kernel dumps, and has none. Raises DiskFailed."""
    try:
        fd = os.open(node, os.O_WRONLY | os.O_EXCL | os.O_CLOEXEC)
        try:
            os.pwrite(fd, empty_header(id), 0)
            os.fsync(fd)
        finally:
            os.close(fd)
    except OSError as error:
        raise DiskFailed(f"{node}: {error.strerror}") from error


def read_stream(node: str, size: int, offset: int = DATA_OFFSET) -> Iterator[bytes]:
    """An age file in pieces. Raises DiskFailed where the partition ends before it does, OSError."""
    with open(node, "rb", buffering=0) as disk:
        disk.seek(offset)
        left = size
        while left:
            piece = disk.read(min(left, 1 << 20))
            if not piece:
                raise DiskFailed(f"{node} ends before the dump that its header names")
            left -= len(piece)
            yield piece


def _in_bytes(lines: list[str]) -> bytes:
    return "".join(f"{line}\n" for line in lines).encode().ljust(HEADER_SIZE, b"\0")
