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
