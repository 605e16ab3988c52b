# SPDX-License-Identifier: Apache-2.0
"""Writes entries with fields into the systemd journal (systemd.io/JOURNAL_NATIVE_PROTOCOL). Never a secret."""

import os

from .light import TYPE_CHECKING, Iterable, Mapping
from .log import printable
from .messages import Message
from .paths import Paths

if TYPE_CHECKING:
    from socket import socket

_PATIENCE = 1.0
"""Seconds to wait for a journald that takes nothing."""


def record(paths: Paths, message: Message, text: str, **fields: str | Iterable[str]) -> None:
    """Records what was done, once it lasts. `fields`: names in lower case, without UNLOCK_; those that are empty are
    left out. Does nothing without a journal, and raises nothing: what was done is done."""
    if not os.path.exists(paths.journald):
        return
    values = {
        f"UNLOCK_{name.upper()}": each if isinstance(each, str) else ", ".join(each) for name, each in fields.items()
    }
    try:
        with connect(paths) as journal:
            journal.settimeout(_PATIENCE)
            journal.send(encode(message, text, values))
    except OSError:
        pass


def connect(paths: Paths) -> "socket":
    """Raises OSError without a journal."""
    import socket

    journal = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
    try:
        journal.connect(paths.journald)
    except OSError:
        journal.close()
        raise
    return journal


def encode(message: Message, text: str, fields: Mapping[str, str], priority: str = "") -> bytes:
    """One datagram. No value has a line break in it, so none needs the binary form."""
    all_fields = {
        "MESSAGE": text,
        "MESSAGE_ID": message.id,
        "PRIORITY": priority or message.priority,
        "SYSLOG_IDENTIFIER": "unlock",
        **fields,
    }
    lines = "".join(f"{name}={printable(value)}\n" for name, value in all_fields.items() if value)
    return lines.encode("utf-8", "replace")
