# SPDX-License-Identifier: Apache-2.0
"""The recovery key as a person types it."""

import itertools

import pytest

from unlock import paths
from unlock.errors import Usage
from unlock.keys import recovery_key
from unlock.secret import Secret


def test_a_key_is_read_as_printed_with_blanks_and_without_dashes() -> None:
    key = recovery_key.new()
    text = bytes(key).decode()
    assert len(text) == 55
    for typed in (text, text.replace("-", ""), text.replace("-", " "), f" {text}\n"):
        assert recovery_key.parse(Secret(typed.encode())) == key


SEPARATORS = ["\u2013", "\u2011", "\u2014", "\u2212", "\u00a0", "\u202f", "_", "/", ",", ".", ":", "\t", "", " - "]


@pytest.mark.parametrize("separator", SEPARATORS)
def test_whatever_separates_the_groups_is_ignored(separator: str) -> None:
    """Documents, password safes and phones turn dashes into others."""
    key = recovery_key.new()
    groups = bytes(key).decode().split("-")
    assert recovery_key.parse(Secret(separator.join(groups).encode())) == key


@pytest.mark.parametrize(
    ("before", "after"),
    [("\ufeff", ""), ('"', '"'), ("\u201c", "\u201d\n"), ("'", "'"), ("", "-"), ("(", ")"), ("\x1b[200~", "\x1b[201~")],
)
def test_what_surrounds_a_key_is_ignored(before: str, after: str) -> None:
    key = recovery_key.new()
    assert recovery_key.parse(Secret(f"{before}{bytes(key).decode()}{after}".encode())) == key


def test_a_key_in_a_text_of_utf_16_is_read() -> None:
    key = recovery_key.new()
    assert recovery_key.parse(Secret(bytes(key).decode().encode("utf-16"))) == key


def test_shift_held_on_a_us_keyboard_is_undone() -> None:
    """Who has an AZERTY keyboard holds it, and the initramfs may know only the US layout."""
    key = recovery_key.new()
    shifted = str.maketrans("1234567890-", "!@#$%^&*()_")
    text = bytes(key).decode()
    assert recovery_key.parse(Secret(text.translate(shifted).encode())) == key
    assert recovery_key.parse(Secret((text[:20] + text[20:].translate(shifted)).encode())) == key


AZERTY = str.maketrans("1234567890", "&\u00e9\"'(-\u00e8_\u00e7\u00e0")
KEYPAD = ["\x1b[2~", "\x1b[4~", "\x1b[B", "\x1b[6~", "\x1b[D", "\x1b[G", "\x1b[C", "\x1b[1~", "\x1b[A", "\x1b[5~"]
"""What 0 to 9 of a keypad send on the Linux console while NumLock is off."""


def test_wrong_keys_are_told_from_a_short_key() -> None:
    text = bytes(recovery_key.new()).decode()
    keypad = "".join(KEYPAD[int(each)] if each.isdigit() else each for each in text)
    application = "".join(f"\x1bO{chr(0x70 + int(each))}" if each.isdigit() else each for each in text)
    for typed in (text.translate(AZERTY), keypad, application):
        with pytest.raises(Usage, match=r"; 0 digits were typed: keyboard layout, Shift or NumLock\?$"):
            recovery_key.parse(Secret(typed.encode()))
    for typed in ("", text[:6], text[:-1], f"{text}7"):
        with pytest.raises(Usage, match=f"; {sum(map(str.isdigit, typed))} digits were typed$"):
            recovery_key.parse(Secret(typed.encode()))


def test_every_wrong_digit_is_found_and_its_group_named() -> None:
    text = bytearray(bytes(recovery_key.new()))
    for place, digit in itertools.product(range(len(text)), b"0123456789"):
        if text[place] in (digit, ord("-")):
            continue
        typed = bytearray(text)
        typed[place] = digit
        with pytest.raises(Usage, match=f"group {place // 7 + 1} "):
            recovery_key.parse(Secret(typed))


def test_any_two_groups_that_changed_places_are_found() -> None:
    groups = bytes(recovery_key.new()).split(b"-")
    for i, j in itertools.combinations(range(8), 2):
        swapped = list(groups)
        swapped[i], swapped[j] = swapped[j], swapped[i]
        with pytest.raises(Usage, match=f"group {i + 1} "):
            recovery_key.parse(Secret(b"-".join(swapped)))


@pytest.mark.parametrize("typed", [b"", b"123456", b"x" * 55, b"9" * 48, "１".encode() * 48, b"0" * 4000])
def test_what_is_no_key_at_all_is_refused_without_showing_it(typed: bytes) -> None:
    with pytest.raises(Usage) as caught:
        recovery_key.parse(Secret(typed))
    assert typed.decode() not in str(caught.value) or not typed


def test_what_lies_under_the_passing_name_gives_nobody_the_key(tmp_path) -> None:  # type: ignore[no-untyped-def]
    """Left by an attempt that was killed, or put there by who wants to read along."""
    planted, path, mine = tmp_path / "recovery.new", tmp_path / "recovery", tmp_path / "mine"
    planted.write_text("")
    planted.chmod(0o666)
    with planted.open() as reader:
        recovery_key.write_new_file(str(path), recovery_key.new())
        assert reader.read() == ""
    assert path.stat().st_mode & 0o777 == 0o600
    mine.write_text("precious")
    for name in ("other", "third"):
        (tmp_path / f"{name}.new").symlink_to(mine)
    recovery_key.write_new_file(str(tmp_path / "other"), recovery_key.new())
    paths.write_atomically(str(tmp_path / "third"), b"escrow")
    assert mine.read_text() == "precious"
    assert not (tmp_path / "third").is_symlink()


def test_a_key_file_is_new_private_and_never_overwritten(tmp_path) -> None:  # type: ignore[no-untyped-def]
    path = tmp_path / "recovery"
    key = recovery_key.new()
    recovery_key.write_new_file(str(path), key)
    assert path.read_bytes() == bytes(key), "cryptsetup --key-file takes a newline for a part of the key"
    assert path.stat().st_mode & 0o777 == 0o600
    with pytest.raises(Usage, match="exists already"):
        recovery_key.write_new_file(str(path), recovery_key.new())
    assert path.read_bytes() == bytes(key)
