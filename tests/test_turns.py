# SPDX-License-Identifier: Apache-2.0
"""Each commit runs its share of the dear tests, and none of them waits for ever."""

from typing import Any, NamedTuple

import pytest

from tests import turns

COMMITS = [f"{each:040x}" for each in range(300)]


class Item(NamedTuple):
    """What of a collected test is looked at."""

    nodeid: str
    marks: dict[str, pytest.Mark]

    def get_closest_marker(self, name: str) -> pytest.Mark | None:
        return self.marks.get(name)


def item(name: str, *marks: pytest.MarkDecorator) -> Any:
    return Item(f"tests/test_{name}.py::test_{name}", {each.name: each.mark for each in marks})


@pytest.mark.parametrize("count", [1, 2, 50, 69])
def test_of_all_that_take_turns_a_commit_runs_a_third_and_each_is_run_by_some(count: int) -> None:
    items = [item(f"{each}") for each in range(count)]
    shares = [turns.one_in(items, 3, commit) for commit in COMMITS]
    assert {len(share) for share in shares} <= {count // 3, count // 3 + 1}
    assert {each.nodeid for share in shares for each in share} == {each.nodeid for each in items}
    assert turns.one_in(items, 1, COMMITS[0]) == items


def test_long_ones_fill_their_minutes_and_each_that_fits_is_run_by_some_commit() -> None:
    items = [item(f"{each}", pytest.mark.long(minutes=each / 2)) for each in range(1, 31)]
    shares = [turns.rotation(items, 12, commit) for commit in COMMITS]
    assert all(10 <= sum(map(turns.minutes, share)) <= 12 for share in shares)
    assert {turns.minutes(each) for share in shares for each in share} == {each / 2 for each in range(1, 25)}


@pytest.mark.parametrize(
    ("marks", "takes"),
    [
        ((), False),
        ((pytest.mark.turns,), True),
        ((pytest.mark.root,), False),
        ((pytest.mark.vm,), True),
        ((pytest.mark.vm, pytest.mark.always), False),
    ],
)
def test_what_boots_a_machine_takes_turns_and_what_needs_none_only_if_it_is_dear(marks: Any, takes: bool) -> None:
    assert turns.takes_turns(item("it", *marks)) is takes
