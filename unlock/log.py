# SPDX-License-Identifier: Apache-2.0
"""Prints lines for people: on the console during boot, else on standard error. Never a secret."""

import os
import sys

from .light import Sequence


def console(line: str) -> None:
    """Writes a line to /dev/console. Errors are ignored: a missing console must not stop a boot."""
    try:
        fd = os.open("/dev/console", os.O_WRONLY | os.O_NOCTTY | os.O_NONBLOCK | os.O_CLOEXEC)
    except OSError:
        return
    try:
        os.write(fd, f"unlock: {line}\r\n".encode("utf-8", "replace"))
    except OSError:
        pass
    finally:
        os.close(fd)


def error(message: str, hint: str = "") -> None:
    """Prints an error and the command to type next to standard error."""
    print(f"unlock: {message}", file=sys.stderr)
    if hint:
        print(f"hint: {hint}", file=sys.stderr)


def note(message: str) -> None:
    """Prints progress to standard error, so that standard output has the result alone."""
    print(message, file=sys.stderr, flush=True)


def columns(rows: Sequence[tuple[str, ...]]) -> list[str]:
    """A line for each row, with each column as wide as its longest cell and two blanks between columns."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows]
