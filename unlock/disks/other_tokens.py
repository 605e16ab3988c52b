# SPDX-License-Identifier: Apache-2.0
"""The volume key of a disk by a token of clevis or of systemd-cryptenroll, for `unlock disk adopt --via`.

Each is asked for in a process of its own, which alone loads libcryptsetup's plugins or runs clevis, and returns the key
through a pipe. What the token needs, a TPM or a server, is the other program's business.
"""

import os
import sys
from contextlib import suppress

from ..errors import CommandFailed, NotOurs, UnlockError
from ..protect import protect
from ..run import run_for_secret
from ..secret import Secret
from . import luks

TYPES = {"clevis": "clevis", "tpm2": "systemd-tpm2"}
"""What `--via` takes -> the type of the token."""
_INSTALL = {"clevis": "apt install clevis-luks", "tpm2": "apt install systemd-cryptsetup"}
_OTHERWISE = "give a passphrase: --passphrase-file FILE"
_PASSPHRASE_MAX = 4096
_TIMEOUT = 120.0
"""Seconds for one token."""
_HOME = os.path.dirname(os.path.dirname(os.path.dirname(os.path.abspath(__file__))))


def volume_key(container: luks.Container, via: str) -> Secret:
    """The volume key by the first token of this kind that gives it. Raises NotOurs without one, CommandFailed."""
    tokens = container.tokens(TYPES[via])
    if not tokens:
        raise NotOurs(f"{container.device} has no token of type {TYPES[via]}", _OTHERWISE)
    trouble: UnlockError | None = None
    for number, fields in tokens:
        try:
            return _by_clevis(container, fields) if via == "clevis" else _by_plugin(container, number)
        except (CommandFailed, NotOurs) as error:
            trouble = error
    assert trouble
    hint = _INSTALL[via] if trouble.code == "command-missing" else _OTHERWISE
    if via == "tpm2" and hint == _OTHERWISE:
        hint += " (a token with a PIN is not taken, nor one for PCR 15, which early boot has extended)"
    raise CommandFailed(str(trouble), hint, trouble.code if trouble.code == "command-missing" else "")


def _by_clevis(container: luks.Container, fields: dict[str, object]) -> Secret:
    """Raises CommandFailed, NotOurs."""
    slots = fields.get("keyslots")
    trouble: UnlockError = NotOurs(f"{container.device}: its token of clevis is for no keyslot")
    for slot in slots if isinstance(slots, list) else ():
        try:
            command = ["clevis", "luks", "pass", "-d", container.device, "-s", str(int(slot))]
            with run_for_secret(command, _PASSPHRASE_MAX, _TIMEOUT) as passphrase:
                return container.volume_key(passphrase, int(slot))
        except (CommandFailed, NotOurs) as error:
            trouble = error
    raise trouble


def _by_plugin(container: luks.Container, number: int) -> Secret:
    """Raises CommandFailed, NotOurs."""
    program = f"import sys; sys.path.insert(0, {_HOME!r}); from {__name__} import print_volume_key; print_volume_key()"
    command = [sys.executable, "-I", "-c", program, container.device, str(number)]
    try:
        key = run_for_secret(command, luks.MAX_KEY, _TIMEOUT)
    except CommandFailed as error:
        raise CommandFailed(str(error).removeprefix(f"{sys.executable} -I -c: ")) from error
    try:
        container.verify_volume_key(key)
    except UnlockError:
        key.wipe()
        raise
    return key


def print_volume_key() -> None:
    """The process of its own: writes the key to standard output, or an error's line to standard error."""
    protect()
    try:
        with luks.volume_key_by_plugin(sys.argv[1], int(sys.argv[2])) as key:
            os.write(1, key.value)
    except UnlockError as error:
        with suppress(OSError):
            os.write(2, str(error).encode("utf-8", "replace"))
        os._exit(1)
    os._exit(0)
