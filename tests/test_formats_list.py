# SPDX-License-Identifier: Apache-2.0
"""docs/formats.md lists what is frozen; tests/mutate_formats.py changes each of it, where it stands now."""

from tests import mutate_formats


def test_what_is_listed_is_changed_and_nothing_else() -> None:
    assert not mutate_formats.disagreement()


def test_everything_that_is_listed_stands_somewhere() -> None:
    """A change that finds nothing to change would show nothing."""
    for item in mutate_formats.listed():
        assert list(mutate_formats.places(mutate_formats.TOP, item)), item
