# SPDX-License-Identifier: Apache-2.0
"""Prints lines for people: on the console during boot, else on standard output and error. Never a secret.

What is printed may quote a disk, the EFI partition, the firmware, a key manager or the TPM: names and texts that an
attacker chose. So nothing else in unlock prints a line, and each line goes through `printable`: none of it moves the
cursor, begins another line, or turns text around.
"""

import os
import sys

from .light import Iterable, Mapping, Sequence


def printable(line: str) -> str:
    """The line, with `?` for each character that a terminal does not show as itself."""
    return line if line.isprintable() else "".join(each if each.isprintable() else "?" for each in line)


def join_lines(lines: Iterable[str]) -> str:
    """Lines as one text, each made printable."""
    return "\n".join(map(printable, lines))


def show(text: str) -> None:
    """Prints a result to standard output: one line, or what `join_lines` made."""
    print(join_lines(text.split("\n")), flush=True)


def show_json(value: Mapping[str, object]) -> None:
    """Prints a result for scripts to standard output: an object with its `version`. JSON escapes what no terminal may
    get."""
    import json

    print(json.dumps(value, indent=1), flush=True)


def console(line: str) -> None:
    """Writes a line to /dev/console. Errors are ignored: a missing console must not stop a boot."""
    try:
        fd = os.open("/dev/console", os.O_WRONLY | os.O_NOCTTY | os.O_NONBLOCK | os.O_CLOEXEC)
    except OSError:
        return
    try:
        os.write(fd, f"unlock: {printable(line)}\r\n".encode("utf-8", "replace"))
    except OSError:
        pass
    finally:
        os.close(fd)


def error(message: str, hint: str = "") -> None:
    """Prints an error and the command to type next to standard error."""
    print(f"unlock: {printable(message)}", file=sys.stderr)
    if hint:
        print(f"hint: {printable(hint)}", file=sys.stderr)


def note(message: str) -> None:
    """Prints progress to standard error, so that standard output has the result alone."""
    print(printable(message), file=sys.stderr, flush=True)


def note_json(value: Mapping[str, object]) -> None:
    """The same for scripts: an object on one line."""
    import json

    print(json.dumps(value), file=sys.stderr, flush=True)


def is_terminal() -> bool:
    """Whether what `note` prints goes to a terminal."""
    return sys.stderr.isatty()


def overwrite(line: str, *, last: str = "") -> None:
    """Prints a line in the place of `last`, the one before it, to a terminal; without a line end, which `note("")`
    prints."""
    width = (os.get_terminal_size(sys.stderr.fileno()).columns or 80) - 1
    line, last = printable(line)[:width], printable(last)[:width]
    print(f"\r{line.ljust(len(last))}", end="", file=sys.stderr, flush=True)


def columns(rows: Sequence[tuple[str, ...]]) -> list[str]:
    """A printable line for each row, with each column as wide as its longest cell and two blanks between columns."""
    rows = [tuple(map(printable, row)) for row in rows]
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows]
