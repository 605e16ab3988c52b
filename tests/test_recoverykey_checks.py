# SPDX-License-Identifier: Apache-2.0
"""Every mistake of one digit, and every two groups in each other's place, is found: all keys, not a sample."""

import itertools
import random
from collections.abc import Callable

import pytest

from unlock.errors import Usage
from unlock.keys import recovery_key
from unlock.secret import Secret

NUMBERS = 10**recovery_key.DIGITS


@pytest.fixture(scope="module")
def valid() -> list[int]:
    """For each place, a bit for every number that may stand there."""
    found = []
    for place in range(recovery_key.GROUPS):
        bits = bytearray(NUMBERS)
        for number in range(NUMBERS):
            bits[number] = recovery_key.group_fits(place, number)
        assert sum(bits) == 1 << 16, "16 bits a group"
        found.append(int(bits.translate(b"01" + bytes(254)).decode()[::-1], 2))
    return found


def test_no_valid_group_becomes_another_by_one_wrong_digit(valid: list[int]) -> None:
    """A wrong digit adds or takes d x 10^k: shift all valid numbers by each of these, and none meets a valid one."""
    for bits, digit, exponent in itertools.product(valid, range(1, 10), range(recovery_key.DIGITS)):
        assert not bits & bits << digit * 10**exponent


def test_no_valid_group_becomes_another_by_two_neighbouring_digits_that_changed_places(valid: list[int]) -> None:
    """It adds or takes 9 x d x 10^k."""
    for bits, digit, exponent in itertools.product(valid, range(1, 10), range(recovery_key.DIGITS - 1)):
        assert not bits & bits << 9 * digit * 10**exponent


def test_no_group_is_valid_in_two_places(valid: list[int]) -> None:
    for one, other in itertools.combinations(valid, 2):
        assert not one & other


def test_digits_at_random_are_no_key(record_property: Callable[[str, object], None]) -> None:
    """0.065^8 of them would be: three in ten thousand million."""
    dice = random.Random(8)
    passed = 0
    for _ in range(100_000):
        try:
            recovery_key.parse(Secret(b"%048d" % dice.randrange(10**48)))
            passed += 1
        except Usage:
            pass
    record_property("shown", f"recovery key: {passed} of 100,000 times 48 random digits pass")
    assert passed == 0
