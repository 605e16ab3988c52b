# SPDX-License-Identifier: Apache-2.0
"""Makes and parses recovery keys: 128 random bits, printed as 8 groups of 6 digits, e.g. 123453-003520-….

The passphrase of the LUKS2 keyslot is exactly the printed ASCII, dashes included. Group i (0 to 7) prints
16 bits v as the number 11 v + i + 1. A digit typed wrong changes the number by d * 10^k, which 11 does not
divide, so the remainder, i + 1, no longer fits; two groups that changed places do not fit either.
The idea of multiples of 11 is that of BitLocker's recovery password; the position in the remainder is ours.
"""

import os

from ..errors import Usage
from ..paths import create, fill, sync_folder
from ..secret import Secret, taken

GROUPS = 8
DIGITS = 6
_ESCAPE, _DASH = 0x1B, ord("-")
_DIGIT = {byte: byte for byte in b"0123456789"}
_UNSHIFTED = {**_DIGIT, **dict(zip(b")!@#$%^&*(", b"0123456789", strict=True))}
"""What Shift makes of the digits on a US keyboard, which is what an initramfs without a keymap takes any for."""


def new() -> Secret:
    """A new recovery key, as printed."""
    key = Secret(bytes(GROUPS * (DIGITS + 1) - 1))
    with Secret.random(2 * GROUPS) as raw:
        for i in range(GROUPS):
            number = (raw.value[2 * i] << 8 | raw.value[2 * i + 1]) * 11 + i + 1
            for place in range(i * (DIGITS + 1) + DIGITS - 1, i * (DIGITS + 1) - 1, -1):
                number, digit = divmod(number, 10)
                key.value[place] = ord("0") + digit
            if i:
                key.value[i * (DIGITS + 1) - 1] = _DASH
    return key


def parse(typed: Secret) -> Secret:
    """The key as printed, from what a person typed: its digits count, whatever separates them. Shift held on a US
    keyboard is undone.

    Raises Usage that names the first group that cannot be right; the digits are never in the message.
    """
    with _take_digits(typed.value, _DIGIT) as digits, _take_digits(typed.value, _UNSHIFTED) as unshifted:
        if len(digits) != GROUPS * DIGITS == len(unshifted):
            return _join_groups(unshifted)
        if len(digits) == GROUPS * DIGITS:
            return _join_groups(digits)
        wrong_keys = len(typed) - len(digits) > len(digits)
        raise Usage(
            f"a recovery key is {GROUPS} groups of {DIGITS} digits; {len(digits)} digits were typed"
            + (": keyboard layout, Shift or NumLock?" if wrong_keys else ""),
            code="recovery-key-form",
        )


def _take_digits(typed: bytearray, digit_of: dict[int, int]) -> Secret:
    """The digits in a text. Those in the escape sequences of function keys, of a keypad without NumLock and of a
    paste (ECMA-48, 5.4) were not typed."""
    found, size = bytearray(len(typed)), 0
    before = sequence = 0
    for byte in typed:
        if before == _ESCAPE and byte in b"[O":
            sequence = byte
        elif not sequence and byte in digit_of:
            found[size] = digit_of[byte]
            size += 1
        elif sequence and not 0x20 <= byte < 0x40:
            sequence = 0
        before = byte
    return taken(found, size)


def _join_groups(digits: Secret) -> Secret:
    key = Secret(bytes([_DASH]) * (GROUPS * (DIGITS + 1) - 1))
    for i in range(GROUPS):
        number = 0
        for j in range(DIGITS):
            digit = key.value[i * (DIGITS + 1) + j] = digits.value[i * DIGITS + j]
            number = number * 10 + digit - ord("0")
        if not group_fits(i, number):
            key.wipe()
            raise Usage(
                f"group {i + 1} of the recovery key is mistyped, or not in its place",
                code="recovery-key-typo",
            )
    return key


def group_fits(place: int, number: int) -> bool:
    """Whether a group of this number may stand at this place, 0 to 7."""
    word, rest = divmod(number, 11)
    return rest == place + 1 and word <= 0xFFFF


def write_new_file(path: str, key: Secret) -> None:
    """Writes the key to a new file, mode 0600, whole and durable or not at all.

    Raises Usage if the file exists, OSError otherwise.
    """
    partial = f"{path}.new"
    fill(create(partial), partial, key.value, shown=path)  # no newline: cryptsetup --key-file takes it as it is
    if os.path.lexists(path):
        os.unlink(partial)
        raise Usage(f"{path} exists already", "name a file that does not exist yet")
    os.rename(partial, path)
    sync_folder(os.path.dirname(os.path.abspath(path)))
