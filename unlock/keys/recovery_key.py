# SPDX-License-Identifier: Apache-2.0
"""Makes and parses recovery keys: 128 random bits, printed as 8 groups of 6 digits, e.g. 123453-003520-….

The passphrase of the LUKS2 keyslot is exactly the printed ASCII, dashes included. Group i (0 to 7) prints
16 bits v as the number 11 v + i + 1. A digit typed wrong changes the number by d * 10^k, which 11 does not
divide, so the remainder, i + 1, no longer fits; two groups that changed places do not fit either.
The idea of multiples of 11 is that of BitLocker's recovery password; the position in the remainder is ours.
"""

import os

from ..errors import Usage
from ..paths import create, sync_folder
from ..secret import Secret

GROUPS = 8
DIGITS = 6


def new() -> Secret:
    """A new recovery key, as printed."""
    with Secret.random(2 * GROUPS) as raw:
        words = [int.from_bytes(raw.value[2 * i : 2 * i + 2], "big") for i in range(GROUPS)]
    return Secret("-".join(f"{word * 11 + i + 1:0{DIGITS}d}" for i, word in enumerate(words)).encode())


def parse(typed: Secret) -> Secret:
    """The key as printed, from what a person typed: dashes and blanks may be missing, or be others.

    Raises Usage that names the first group that cannot be right; the digits are never in the message.
    """
    digits = bytes(b for b in typed.value if b in b"0123456789")
    if any(b not in b"0123456789- \t\r\n" for b in typed.value) or len(digits) != GROUPS * DIGITS:
        raise Usage(
            f"a recovery key is {GROUPS} groups of {DIGITS} digits; {len(digits)} digits were typed",
            code="recovery-key-form",
        )
    parts = [digits[i * DIGITS : (i + 1) * DIGITS] for i in range(GROUPS)]
    for i, part in enumerate(parts):
        if not group_fits(i, int(part)):
            raise Usage(
                f"group {i + 1} of the recovery key is mistyped, or not in its place",
                code="recovery-key-typo",
            )
    return Secret(b"-".join(parts))


def group_fits(place: int, number: int) -> bool:
    """Whether a group of this number may stand at this place, 0 to 7."""
    word, rest = divmod(number, 11)
    return rest == place + 1 and word <= 0xFFFF


def write_new_file(path: str, key: Secret) -> None:
    """Writes the key to a new file, mode 0600, whole and durable or not at all.

    Raises Usage if the file exists, OSError otherwise.
    """
    partial = f"{path}.new"
    with os.fdopen(create(partial), "wb") as file:
        file.write(key.value)  # without a newline: cryptsetup --key-file takes the bytes as they are
        file.flush()
        os.fsync(file.fileno())
    if os.path.lexists(path):
        os.unlink(partial)
        raise Usage(f"{path} exists already", "name a file that does not exist yet")
    os.rename(partial, path)
    sync_folder(os.path.dirname(os.path.abspath(path)))
