# SPDX-License-Identifier: Apache-2.0
"""How a recovery key comes to whoever keeps it, and back: a file, a terminal, escrow.

Nothing depends on a new key before it is with its keeper: the file is durable, the escrow read back, or the key typed
back by a person.
"""

import os
from typing import NamedTuple

from .. import ask, log
from ..errors import Refused, Usage
from ..secret import Secret
from . import recovery_key
from .escrow import Escrow, check, write

CREDENTIAL = "unlock.recovery-key"
FLAG = "--recovery-key-file"


class Keep(NamedTuple):
    """Where the key is, or goes. With neither, a terminal."""

    file: str = ""
    escrow: Escrow | None = None


def given(file: str = "") -> Secret:
    """The recovery key that there is: from a file, a systemd credential, or asked for. Raises Usage."""
    text = ask.from_file(file) if file else ask.credential(CREDENTIAL)
    with text or ask.terminal("recovery key of this host", FLAG) as typed:
        return recovery_key.parse(typed)


def made(keep: Keep) -> Secret:
    """A new one, with its keeper; or the one that a file holds, which an attempt that was killed may have written.

    Raises Usage, Refused, Malformed, CommandFailed, OSError.
    """
    if keep.escrow:
        check(keep.escrow)
    recovery = given(keep.file) if keep.file and os.path.exists(keep.file) else recovery_key.new()
    hand(keep, recovery)
    return recovery


def hand(keep: Keep, recovery: Secret) -> None:
    """Brings a key to its keeper; a file that holds it already will do. Raises Usage for a file that holds another,
    Refused, Malformed, CommandFailed, OSError."""
    if keep.file and os.path.exists(keep.file):
        with given(keep.file) as held:
            if held != recovery:
                raise Usage(f"{keep.file} holds another key", f"{FLAG} with a file that does not exist yet")
    elif keep.file:
        recovery_key.write_new_file(keep.file, recovery)
    if keep.escrow:
        write(keep.escrow, recovery)
    if not keep.file and not keep.escrow:
        _show_and_type_back(recovery)


def _show_and_type_back(recovery: Secret) -> None:
    shown = b"\nRecovery key of this host. It opens every disk, on any machine. Keep it off this host:\n\n    "
    if not ask.write_to_terminal(shown + bytes(recovery) + b"\n\n"):
        raise Usage("there is no terminal to show the recovery key on", f"{FLAG} FILE")
    for _ in range(5):
        with ask.terminal("type it back", FLAG) as typed:
            try:
                if recovery_key.parse(typed) == recovery:
                    return
                log.note("that is another key")
            except Usage as error:
                log.note(str(error))
    again = f"run it again, or give {FLAG} FILE"
    raise Refused("the recovery key was not typed back; nothing was changed", again, code="recovery-key")
