# SPDX-License-Identifier: Apache-2.0
"""docs/boot-stories.md lists every boot of the tests, with what shows the same on dracut and when it runs; or why none
does. This compares it with the tests."""

import ast
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

TESTS = Path(__file__).parent
PAGE = TESTS.parent / "docs/boot-stories.md"
TEST, LONG, BY, NONE = "test", "long", "by: ", "none: "
"""Runs in `make test`, in `make test-long` (and by turns in `make test`); shown by other stories; not, and why."""


class Story(NamedTuple):
    file: str
    name: str
    runs: str


def marks(tree: ast.AST) -> set[str]:
    return {each.attr for each in ast.walk(tree) if isinstance(each, ast.Attribute)} & {"vm", "long"}


def stories(path: Path) -> Iterator[tuple[Story, bool]]:
    """The tests of a file that boot a machine; and whether each is one of another file, played on this one's."""
    body = ast.parse(path.read_text()).body
    of_all = set[str]()
    for each in body:
        if isinstance(each, ast.Assign) and "pytestmark" in {getattr(name, "id", "") for name in each.targets}:
            of_all = marks(each)
    for each in body:
        found = list[tuple[str, set[str], bool]]()
        if isinstance(each, ast.FunctionDef):
            found.append((each.name, of_all.union(*map(marks, each.decorator_list)), False))
        elif isinstance(each, ast.ImportFrom) and "vm" in of_all:
            found += [(name.name, of_all, True) for name in each.names]
        for name, marked, others in found:
            if name.startswith("test_") and "vm" in marked:
                words = name.removeprefix("test_").replace("_", " ")
                yield Story(path.stem, words, LONG if "long" in marked else TEST), others


def rows() -> Iterator[tuple[Story, str]]:
    """The page's table: a story, as initramfs-tools has it, and what it says of dracut."""
    for line in PAGE.read_text().splitlines():
        cells = [each.strip() for each in line.strip("|").split("|")]
        if line.startswith("| `test_") and len(cells) == 4:
            yield Story(cells[0].strip("`"), cells[1], cells[2]), cells[3]


def by_builder() -> tuple[list[Story], dict[str, str], dict[str, str]]:
    """Stories of initramfs-tools; name -> when, of those that are played on dracut too, and of those that it alone
    has."""
    tools, both, alone = list[Story](), dict[str, str](), dict[str, str]()
    for path in sorted(TESTS.glob("test_boot_*.py")):
        of_dracut = "_dracut" in path.stem
        for story, others in stories(path):
            if of_dracut:
                (both if others else alone)[story.name] = story.runs
            elif not others:
                tools.append(story)
    return tools, both, alone


def test_the_page_lists_each_story_and_when_it_runs() -> None:
    tools, _, alone = by_builder()
    listed = [story for story, _ in rows()]
    assert sorted(listed) == sorted(tools)
    page = PAGE.read_text()
    assert [name for name, runs in alone.items() if f"| {name} | {runs} |" not in page] == []


def test_the_page_says_what_shows_the_same_on_dracut() -> None:
    _, both, alone = by_builder()
    for story, dracut in rows():
        if story.name in both:
            assert dracut == both[story.name], story
        elif dracut.startswith(BY):
            named = dracut.removeprefix(BY).partition(" (")[0].split("; ")
            assert set(named) <= {*both, *alone}, story
        else:
            assert dracut.startswith(NONE) and len(dracut) > len(NONE) + 10, story
