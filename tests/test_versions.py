# SPDX-License-Identifier: Apache-2.0
"""The order of systemd-boot's menu: systemd's own comparison of versions says the same."""

import random
import subprocess

import pytest

from unlock.predict.systemd_boot import compare_versions

NEWER_FIRST = (
    ("1.10", "1.10~rc1"),
    ("25", "25~devel"),
    ("6.17.0-1", "6.17.0-rc5"),
    ("6.12.48+deb13+1-amd64", "6.12.48+deb13-amd64"),
    ("6.12.48+deb13-amd64", "6.12.48-amd64"),
    ("6.12", "6.9"),
    ("123a", "123.a"),
    ("1.1^2025", "1.1"),
    ("00124", "123"),
    ("b", "B"),
    ("1--2", "1-^2"),
)


def by_systemd(one: str, other: str) -> int:
    """systemd-analyze(1): 0 for equal, 11 where the first is newer, 12 where the second is."""
    run = subprocess.run(["systemd-analyze", "compare-versions", "--", one, other], capture_output=True)
    return {0: 0, 11: 1, 12: -1}[run.returncode]


@pytest.mark.parametrize("newer,older", NEWER_FIRST)
def test_which_is_newer(newer: str, older: str) -> None:
    assert compare_versions(newer, older) > 0 > compare_versions(older, newer)
    assert by_systemd(newer, older) == 1


def test_made_up_versions() -> None:
    dice = random.Random(7)
    for _ in range(60):
        one, other = ("".join(dice.choices("01239abzZ~^.-+_ é", k=dice.randrange(9))) for _ in "12")
        if dice.random() < 0.7:
            other = one[: dice.randrange(len(one) + 1)] + other[:3]
        found = compare_versions(one, other)
        assert (found > 0) - (found < 0) == by_systemd(one, other), (one, other)
