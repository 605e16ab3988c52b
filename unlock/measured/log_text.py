# SPDX-License-Identifier: Apache-2.0
"""Texts from an event log, which anybody may have written, made fit for a terminal and for the baseline."""

from . import uefi

TEXT_MAX = 4096
"""Characters of one text in the baseline: GRUB logs whole menu entries."""


def printable(text: str, limit: int) -> str:
    """The text as one line of at most `limit` characters, without those that a terminal takes for a command."""
    line = " ".join(text[: 4 * limit].split())
    return "".join(each if each.isprintable() else "?" for each in line)[:limit].rstrip()


def printable_line(text: str, limit: int) -> str:
    """The same as `printable`, but with its blanks as they are."""
    return "".join(each if each.isprintable() else "?" for each in text[:limit]).rstrip()


def readable_text(data: bytes) -> str:
    """The text in the data, when it looks like one; else ''."""
    text = decode_text(data).strip()
    return text if len(text) > 2 and text.isascii() and text.isprintable() else ""


def decode_text(data: bytes) -> str:
    """A string as the log has it, or its beginning: ASCII or UTF-16, with or without NUL."""
    data = data[: 4 * TEXT_MAX]
    if len(data) >= 4 and not any(data[1:64:2]) and any(data[:64:2]):
        return uefi.decode_utf16(data)
    return data.partition(b"\0")[0].decode("utf-8", "replace")
