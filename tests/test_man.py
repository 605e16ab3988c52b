# SPDX-License-Identifier: Apache-2.0
"""The manual pages: what they refer to exists; commands, options, exit statuses and errors are those that there are."""

import argparse
import os
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

from unlock import cli, errors
from unlock.measured import at_unseal
from unlock.operations import check, init, rebind

PAGES = {path.name.removesuffix(".md"): path.read_text() for path in (Path(__file__).parents[1] / "man").glob("*.md")}

PROVIDER_ERRORS = [
    each for each in vars(errors).values() if isinstance(each, type) and issubclass(each, errors.ProviderError)
]


@pytest.mark.parametrize("name", PAGES)
def test_a_page_says_what_it_is_and_refers_to_all_others_of_ours(name: str) -> None:
    title, section = name.rsplit(".", 1)
    assert PAGES[name].startswith(f"% {title.upper()}({section}) | ")
    assert f"# NAME\n\n{title} - " in PAGES[name]
    see_also = PAGES[name].partition("# SEE ALSO\n")[2]
    for other in PAGES:
        reference = "{}({})".format(*other.rsplit(".", 1))
        assert other == name or reference in see_also, reference


@pytest.mark.parametrize("name", PAGES)
def test_no_page_refers_to_a_page_of_ours_that_is_not_there(name: str) -> None:
    for title, section in re.findall(r"\b(unlock[a-z.-]*)\((\d)\)", PAGES[name]):
        assert f"{title}.{section}" in PAGES


@pytest.mark.parametrize("kind", PROVIDER_ERRORS, ids=lambda kind: kind.code)
def test_each_error_of_a_key_manager_is_explained(kind: type[errors.ProviderError]) -> None:
    if kind is not errors.ProviderError:
        assert f"**{kind.status} {kind.code}**\n:   " in PAGES["unlock-kmip.7"]


def commands(parser: argparse.ArgumentParser, path: tuple[str, ...] = ()) -> Iterator[tuple[tuple[str, ...], set[str]]]:
    """The words of each command, and its options."""
    options = {flag for each in parser._actions for flag in each.option_strings} - {"-h", "--help"}
    verbs = [each for each in parser._actions if isinstance(each, argparse._SubParsersAction)]
    if options or not verbs:
        yield path, options
    for each in verbs:
        for word, below in each.choices.items():
            yield from commands(below, (*path, word))


def synopsis() -> dict[tuple[str, ...], set[str]]:
    """The same, from the page: a paragraph has one command, or several of one noun with bars between."""
    found: dict[tuple[str, ...], set[str]] = {}
    for paragraph in section("SYNOPSIS").split("\n\n"):
        noun: list[str] = []
        for part in outside_of_brackets(paragraph):
            words = part.removeprefix("**").partition("**")[0].split()
            if words[0] == "unlock":
                noun = words[1:-1]
            path = tuple(each for each in (*noun, words[-1]) if not each.startswith("--"))
            found.setdefault(path, set()).update(re.findall(r"--[a-z-]+", part))
    return found


def outside_of_brackets(text: str) -> list[str]:
    """Split at the bars that are in no brackets."""
    parts, depth = [""], 0
    for piece in re.split(r"( \| |\[|\])", text):
        depth += (piece == "[") - (piece == "]")
        if piece == " | " and not depth:
            parts.append("")
        else:
            parts[-1] += piece
    return parts


def section(title: str) -> str:
    return PAGES["unlock.8"].partition(f"\n# {title}\n")[2].partition("\n# ")[0].strip()


COMMANDS = dict(commands(cli._parser()))


def test_the_synopsis_has_every_command_and_no_other() -> None:
    assert synopsis().keys() == COMMANDS.keys()


@pytest.mark.parametrize("path", COMMANDS, ids=" ".join)
def test_the_synopsis_has_every_option_of_a_command_and_no_other(path: tuple[str, ...]) -> None:
    assert synopsis()[path] == COMMANDS[path]


def test_every_exit_status_is_in_the_manual() -> None:
    kinds = [each for each in vars(errors).values() if isinstance(each, type) and issubclass(each, errors.UnlockError)]
    statuses = {0, *check.EXIT_STATUS.values(), *(each.status for each in kinds)}
    assert {int(each) for each in re.findall(r"\b(\d+) ", section("EXIT STATUS"))} == statuses


@pytest.mark.parametrize(
    ("command", "risks"), [("init", init.OVERRIDES), ("rebind", rebind.RISKS), ("policy set", at_unseal.RISKS)]
)
def test_every_risk_that_can_be_accepted_is_named(
    command: str, risks: dict[str, str], capsys: pytest.CaptureFixture[str]
) -> None:
    """In the manual and in --help, and no other is accepted."""
    told = section("COMMANDS").partition(f"**{command}**\n:   ")[2].partition("\n\n")[0]
    assert set(re.findall(r"\*\*([a-z]+(?:-[a-z]+)+)\*\*", told)) >= risks.keys()
    with pytest.raises(SystemExit):
        cli._parser().parse_args([*command.split(), "--help"])
    help = "".join(capsys.readouterr().out.split())
    assert all(risk in help for risk in risks)
    with pytest.raises(SystemExit):
        cli._parser().parse_args([*command.split(), "--accept", "none"])
    for risk in risks:
        assert cli._parser().parse_args([*command.split(), "--accept", risk]).accept == [risk]


MINIMAL = {
    "init": "init --backup FILE",
    "group create": "group create data --disk DEV --mount DIR",
    "disk adopt": "disk adopt DEV --group G",
    "recovery new": "recovery new",
    "recovery rotate": "recovery rotate",
    "rebind": "rebind",
}
"""The commands after which there is something to type."""


@pytest.mark.parametrize("status", [0, 3])
@pytest.mark.parametrize("command", MINIMAL)
def test_a_command_that_succeeded_names_the_next_one(
    command: str, status: int, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    noun, _, verb = command.partition(" ")
    monkeypatch.setattr(getattr(cli, noun), f"_{verb or noun}", lambda paths, options: status)
    monkeypatch.setattr(cli, "protect", lambda: None)
    monkeypatch.setattr(os, "geteuid", lambda: 0)
    assert cli.cli(MINIMAL[command].split()) == status
    told = capsys.readouterr().err
    assert bool(told) == (status == 0)
    for each in re.findall(r"unlock ([a-z]+(?: [a-z]+)?)", told):
        assert tuple(each.split()) in COMMANDS
    assert not told or re.fullmatch(r"next: unlock .+\n", told)
