# SPDX-License-Identifier: Apache-2.0
"""Wrapped keys: what `cryptography` and OpenSSL make of each other's, of known answers, and of every changed bit."""

import pytest
from cryptography.hazmat.primitives.ciphers.aead import AESGCM
from hypothesis import given
from hypothesis import strategies as st

from unlock import wrap
from unlock.errors import Tampered
from unlock.secret import Secret

KEY = bytes(range(32))


def test_a_known_answer() -> None:
    """Test case 16 of McGrew and Viega, "The Galois/Counter Mode of Operation (GCM)"."""
    key = bytes.fromhex("feffe9928665731c6d6a8f9467308308" * 2)
    plain = bytes.fromhex(
        "d9313225f88406e5a55909c5aff5269a86a7a9531534f7da2e4c303d8a318a72"
        "1c3c0c95956809532fcf0e2449a6b525b16aedf5aa0de657ba637b39"
    )
    aad = bytes.fromhex("feedfacedeadbeeffeedfacedeadbeefabaddad2")
    wrapped = bytes.fromhex(
        "cafebabefacedbaddecaf888"
        "522dc1f099567d07f47f37a32a84427d643a8cdcbfe5c0c97598a2bd2555d1aa"
        "8cb08e48590dbb3da7b08b1056828838c5f61e6393ba7a0abcc9f662"
        "76fc6ece0f4e1768cddf8853bb2d551b"
    )
    assert bytes(wrap.unwrap(Secret(key), wrapped, aad)) == plain


@given(st.binary(min_size=1, max_size=200), st.binary(max_size=300))
def test_what_one_wraps_the_other_unwraps(plain: bytes, aad: bytes) -> None:
    wrapped = wrap.wrap(Secret(KEY), plain=Secret(plain), aad=aad)
    assert len(wrapped) == len(plain) + 28
    assert bytes(wrap.unwrap(Secret(KEY), wrapped, aad)) == plain
    assert AESGCM(KEY).decrypt(wrapped[:12], wrapped[12:], aad) == plain


def test_every_changed_bit_is_found() -> None:
    aad = b"the facts"
    wrapped = wrap.wrap(Secret(KEY), plain=Secret(b"k" * 32), aad=aad)
    for at in range(len(wrapped) * 8):
        changed = bytearray(wrapped)
        changed[at // 8] ^= 1 << at % 8
        with pytest.raises(Tampered):
            wrap.unwrap(Secret(KEY), bytes(changed), aad)
    for at in range(len(KEY) * 8):
        key = bytearray(KEY)
        key[at // 8] ^= 1 << at % 8
        with pytest.raises(Tampered):
            wrap.unwrap(Secret(key), wrapped, aad)
    for other in (b"", b"the fact", b"the facts.", b"The facts"):
        with pytest.raises(Tampered):
            wrap.unwrap(Secret(KEY), wrapped, other)
    assert bytes(wrap.unwrap(Secret(KEY), wrapped, aad)) == b"k" * 32, "a refusal changes nothing"


@pytest.mark.parametrize("length", [0, 1, 11, 12, 27])
def test_what_is_too_short_is_refused(length: int) -> None:
    with pytest.raises(Tampered):
        wrap.unwrap(Secret(KEY), bytes(length), b"")


@pytest.mark.parametrize("length", [0, 16, 24, 31, 33])
def test_a_key_of_another_length_is_refused(length: int) -> None:
    wrapped = wrap.wrap(Secret(KEY), plain=Secret(b"k"), aad=b"")
    with pytest.raises(Tampered):
        wrap.unwrap(Secret(KEY[:length].ljust(length, b"x")), wrapped, b"")


def test_a_secret_that_nobody_has_any_more_is_wiped() -> None:
    """As after an error between its making and its `with`."""
    secret = Secret(KEY)
    value = secret.value
    del secret
    assert not any(value)
