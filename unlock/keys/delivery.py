# SPDX-License-Identifier: Apache-2.0
"""Delivers a recovery key to whoever keeps it, by a file, the terminal or escrow, and reads it back from them.

`group create`, `disk adopt` and `recovery rotate` deliver a new key before any disk depends on it: its file is durable,
its escrow file has been read back, or a person has typed it back.
"""

import os
from collections.abc import Callable
from typing import NamedTuple

from .. import ask, log
from ..errors import Refused, Usage
from ..secret import Secret
from . import recovery_key
from .escrow import Escrow, check_escrow, write_escrow

CREDENTIAL = "unlock.recovery-key"
FLAG = "--recovery-key-file"
TRIES = 5
"""How often a person may type a key."""


class Keeper(NamedTuple):
    """Where the recovery key is kept. With neither file nor escrow, a person keeps it: the key is shown at the
    terminal."""

    file: str = ""
    escrow: Escrow | None = None


def read_recovery_key(file: str = "") -> Secret:
    """The present recovery key, from a file, a systemd credential, or typed at the terminal. Raises Usage."""
    text = ask.from_file(file) if file else ask.credential(CREDENTIAL)
    if text:
        with text:
            return recovery_key.parse(text)
    return type_recovery_key(lambda: ask.terminal("recovery key of this host", FLAG))


def type_recovery_key(ask_once: Callable[[], Secret]) -> Secret:
    """A recovery key that a person types, who is asked again after a typo. Raises Usage."""
    for _ in range(TRIES - 1):
        with ask_once() as typed:
            try:
                return recovery_key.parse(typed)
            except Usage as error:
                log.note(str(error))
    with ask_once() as typed:
        return recovery_key.parse(typed)


def make_recovery_key(keep: Keeper) -> Secret:
    """Makes a recovery key and delivers it; takes the key in a file that exists, as a killed attempt may have left it.

    Raises Usage, Refused, Malformed, CommandFailed, OSError.
    """
    if keep.escrow:
        check_escrow(keep.escrow)
    recovery = read_recovery_key(keep.file) if keep.file and os.path.exists(keep.file) else recovery_key.new()
    deliver(keep, recovery)
    return recovery


def deliver(keep: Keeper, recovery: Secret) -> None:
    """Writes the key to its file and its escrow file, or shows it and has it typed back. A file that holds the key
    already stays. Raises Usage for a file that holds another key, Refused, Malformed, CommandFailed, OSError."""
    if keep.file and os.path.exists(keep.file):
        with read_recovery_key(keep.file) as held:
            if held != recovery:
                raise Usage(f"{keep.file} holds another key", f"{FLAG} with a file that does not exist yet")
    elif keep.file:
        recovery_key.write_new_file(keep.file, recovery)
    if keep.escrow:
        write_escrow(keep.escrow, recovery)
    if not keep.file and not keep.escrow:
        _show_and_type_back(recovery)


def _show_and_type_back(recovery: Secret) -> None:
    shown = b"\nRecovery key of this host. It opens every disk, on any machine. Keep it off this host:\n\n    "
    if not ask.write_to_terminal(shown + bytes(recovery) + b"\n\n"):
        raise Usage("there is no terminal to show the recovery key on", f"{FLAG} FILE")
    for _ in range(TRIES):
        with ask.terminal("type it back", FLAG) as typed:
            try:
                if recovery_key.parse(typed) == recovery:
                    return
                log.note("that is another key")
            except Usage as error:
                log.note(str(error))
    again = f"run it again, or give {FLAG} FILE"
    raise Refused("the recovery key was not typed back; nothing was changed", again, code="recovery-key")
