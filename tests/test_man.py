# SPDX-License-Identifier: Apache-2.0
"""The manual pages: what they refer to exists; commands, options, examples, exit statuses and errors are those that
there are; what `make man` makes of them has all of it, and man(1) and mandoc(1) have nothing to say against it."""

import argparse
import os
import re
import shlex
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from unlock import cli, errors
from unlock.cli.examples import EXAMPLES
from unlock.measured import at_unseal
from unlock.operations import check, init, rebind

TOP = Path(__file__).parents[1]
PAGES = {path.name.removesuffix(".md"): path.read_text() for path in (TOP / "man").glob("*.md")}

PROVIDER_ERRORS = [
    each for each in vars(errors).values() if isinstance(each, type) and issubclass(each, errors.ProviderError)
]


@pytest.mark.parametrize("name", PAGES)
def test_a_page_says_what_it_is_and_refers_to_the_first_one_which_refers_to_all(name: str) -> None:
    title, number = name.rsplit(".", 1)
    assert PAGES[name].startswith(f"% {title.upper()}({number}) | ")
    assert f"# NAME\n\n{title} - " in PAGES[name]
    assert name == "unlock.8" or re.match(r"unlock\(8\)", section("SEE ALSO", name))
    assert name == "unlock.8" or f"{title}({number})" in section("SEE ALSO", "unlock.8")


@pytest.mark.parametrize("name", PAGES)
def test_no_page_refers_to_a_page_of_ours_that_is_not_there(name: str) -> None:
    for title, number in re.findall(r"\b(unlock[a-z.-]*)\((\d)\)", PAGES[name]):
        assert f"{title}.{number}" in PAGES


def section(title: str, name: str) -> str:
    return PAGES[name].partition(f"\n# {title}\n")[2].partition("\n# ")[0].strip()


@pytest.mark.parametrize("kind", PROVIDER_ERRORS, ids=lambda kind: kind.code)
def test_each_error_of_a_key_manager_is_explained(kind: type[errors.ProviderError]) -> None:
    if kind is not errors.ProviderError:
        assert f"**{kind.status} {kind.code}**\n:   " in PAGES["unlock-kmip.7"]


def commands(
    parser: argparse.ArgumentParser, path: tuple[str, ...] = ()
) -> Iterator[tuple[tuple[str, ...], argparse.ArgumentParser]]:
    """The words of each command, and its parser."""
    verbs = [each for each in parser._actions if isinstance(each, argparse._SubParsersAction)]
    if len(parser._actions) > 2 or not verbs:
        yield path, parser
    for each in verbs:
        for word, below in each.choices.items():
            yield from commands(below, (*path, word))


COMMANDS = dict(commands(cli._parser()))
NOUNS = {path[0] for path in COMMANDS if path} - {"help"}


def page_of(path: tuple[str, ...]) -> str:
    return f"unlock-{path[0]}.8" if path and path[0] in NOUNS else "unlock.8"


def options(path: tuple[str, ...]) -> set[str]:
    return {flag for each in COMMANDS[path]._actions for flag in each.option_strings} - {"-h", "--help"}


def arguments(path: tuple[str, ...]) -> list[str]:
    """What a command takes beside options, in order."""
    return [str(each.metavar) for each in COMMANDS[path]._actions if not each.option_strings]


def synopsis(name: str) -> dict[tuple[str, ...], tuple[set[str], list[str]]]:
    """Options and other arguments of each command, from a page: a paragraph has one form of one command."""
    found: dict[tuple[str, ...], tuple[set[str], list[str]]] = {}
    for paragraph in section("SYNOPSIS", name).split("\n\n"):
        words = paragraph.removeprefix("**unlock").partition("**")[0].split()
        flags, plain = found.setdefault(tuple(words), (set(), []))
        flags.update(re.findall(r"--[a-z-]+", paragraph))
        beside = re.sub(r"\*\*--[a-z-]+\*\*( \*[^*]+\*)?", "", paragraph.partition("**unlock")[2].partition("**")[2])
        plain[:] = re.findall(r"\*([^*]+)\*", beside)
    return found


def test_each_command_has_its_page_and_the_first_page_a_line_for_it() -> None:
    assert {name.removeprefix("unlock-").removesuffix(".8") for name in PAGES if name.endswith(".8")} == NOUNS | {
        "unlock"
    }
    listed = re.findall(
        r"^\*\*([a-z]+)\*\*, unlock-([a-z]+)\(8\)\n:   .+$", section("COMMANDS", "unlock.8"), re.MULTILINE
    )
    assert {noun for noun, page in listed if noun == page} == NOUNS and len(listed) == len(NOUNS)


def test_the_synopses_have_every_command_and_no_other() -> None:
    found = {path for noun in NOUNS for path in synopsis(f"unlock-{noun}.8")}
    assert found == {path for path in COMMANDS if path[:1] != ("help",) and path}
    for noun in NOUNS:
        assert {path[0] for path in synopsis(f"unlock-{noun}.8")} == {noun}


@pytest.mark.parametrize("path", [path for path in COMMANDS if path and path != ("help",)], ids=" ".join)
def test_a_page_has_every_option_and_argument_of_a_command_and_no_other(path: tuple[str, ...]) -> None:
    assert synopsis(page_of(path))[path] == (options(path), arguments(path))
    described = re.findall(r"^\*\*(--[a-z-]+)\*\*.*\n:   ", section("OPTIONS", page_of(path)), re.MULTILINE)
    assert options(path) <= set(described)
    of_noun = [each for each in COMMANDS if each[:1] == path[:1]]
    assert set(described) == set().union(*map(options, of_noun))
    terms = re.findall(r"^(\*\*.*)\n:   ", PAGES[page_of(path)], re.MULTILINE)
    assert path == (path[0],) or any(f"**{' '.join(path[1:])}**" in each for each in terms)


@pytest.mark.parametrize("path", [path for path in COMMANDS if path], ids=" ".join)
def test_help_ends_with_an_example_which_the_page_has_too(
    path: tuple[str, ...], capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit):
        cli._parser().parse_args([*path, "--help"])
    title = page_of(path).removesuffix(".8")
    example = EXAMPLES[" ".join(path)]
    assert capsys.readouterr().out.endswith(f"\nexample:\n  {example}\n\nmanual: {title}(8)\n")
    assert path == ("help",) or f"\n    {example}\n" in section("EXAMPLES", page_of(path)) + "\n"


GROUPS = {" ".join(path[:count]) for path in COMMANDS for count in range(len(path))}
"""Words that other words follow."""


def test_there_is_no_example_of_a_command_that_is_not_there() -> None:
    assert EXAMPLES.keys() == {" ".join(path) for path in COMMANDS} | GROUPS


@pytest.mark.parametrize("words", EXAMPLES)
def test_an_example_is_one_of_its_command(words: str) -> None:
    assert parses(EXAMPLES[words])
    assert re.match(f"unlock {words}( |$)" if words not in GROUPS else f"unlock {words}", EXAMPLES[words])


@pytest.mark.parametrize("name", PAGES)
def test_every_command_line_in_a_page_parses(name: str) -> None:
    code = "\n".join(section(title, name) for title in ("EXAMPLES", "RECOVERY KEY", "A SECOND HOST"))
    lines = re.findall(r"^    ((?:.* \| )?unlock .+)$", code, re.MULTILINE)
    assert lines or name not in {f"unlock-{noun}.8" for noun in NOUNS}
    for each in lines:
        assert parses(re.sub(r"^.* \| (?=unlock )| && .*$| > .*$", "", each)), each


def parses(line: str) -> bool:
    """A shell's words of it are a command of unlock."""
    program, *words = shlex.split(line)
    return program == "unlock" and callable(cli._parser().parse_args(words).run)


def test_every_exit_status_is_in_the_manual() -> None:
    kinds = [each for each in vars(errors).values() if isinstance(each, type) and issubclass(each, errors.UnlockError)]
    statuses = {0, *check.EXIT_STATUS.values(), *(each.status for each in kinds)}
    assert {int(each) for each in re.findall(r"\b(\d+) ", section("EXIT STATUS", "unlock.8"))} == statuses


@pytest.mark.parametrize(
    ("command", "risks"), [("init", init.OVERRIDES), ("rebind", rebind.RISKS), ("policy set", at_unseal.RISKS)]
)
def test_every_risk_that_can_be_accepted_is_named(
    command: str, risks: dict[str, str], capsys: pytest.CaptureFixture[str]
) -> None:
    """In the manual and in --help, and no other is accepted."""
    noun, _, verb = command.partition(" ")
    page = f"unlock-{noun}.8"
    told = section("COMMANDS", page).partition(f"**{verb}**\n:   ")[2].partition("\n\n")[0] or section(
        "DESCRIPTION", page
    )
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


# What `make man` makes


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("man")
    sources = sorted((TOP / "man").glob("*.md"))
    subprocess.run([sys.executable, TOP / "man/roff.py", *sources, folder], check=True)
    return folder


@pytest.mark.parametrize("name", PAGES)
def test_man_and_mandoc_have_nothing_to_say_against_a_page(name: str, made: Path) -> None:
    page = (made / name).read_text()
    shown = subprocess.run(  # man(1) runs as another user, who cannot read the file
        ["man", "--warnings", "-E", "UTF-8", "-Tutf8", "-Z", "-l", "-"],
        input=page,
        capture_output=True,
        text=True,
        check=True,
        env={**os.environ, "MANWIDTH": "80", "LC_ALL": "C.UTF-8"},
    )
    assert shown.stdout and not shown.stderr
    lint = subprocess.run(["mandoc", "-T", "lint"], input=page, capture_output=True, text=True)
    assert not [each for each in lint.stdout.splitlines() if "missing date" not in each]


@pytest.mark.parametrize("name", PAGES)
def test_the_page_that_is_shown_has_every_word(name: str, made: Path) -> None:
    """In order, and no other, but for the first line and the last one. At this width no cell has two lines."""
    shown = subprocess.run(
        ["groff", "-t", "-man", "-Tutf8", "-P-cbou", "-rLL=1000n", made / name],
        capture_output=True,
        text=True,
        check=True,
    )
    head, *lines, foot = shown.stdout.strip().splitlines()
    assert name.rpartition(".")[0].upper() in head and "unlock 0" in foot
    found = "".join(" ".join(lines).replace("\N{BULLET}", "-").split())
    assert found == "".join(words_of(PAGES[name]).split())


def words_of(page: str) -> str:
    """The text of the Markdown without its marks."""
    body = re.sub(r"^ *\|[-|]+\|$|^# ", "", page.partition("\n")[2], flags=re.MULTILINE)
    body = re.sub(r"^ *\| | \|$| \| (?=.*\|$)", " ", body, flags=re.MULTILINE)
    body = re.sub(r"^:   ", "", body, flags=re.MULTILINE)
    return re.sub(r"(?<!\\)\*", "", body).replace("\\*", "*")


@pytest.mark.parametrize(
    "wrong", ["<b>bold</b>", "**not closed", "`code`", "## smaller", "| a | b |\n| c | d |", "   three"]
)
def test_what_is_not_known_is_an_error_and_no_page_that_lacks_it(wrong: str, tmp_path: Path) -> None:
    source = tmp_path / "unlock-x.8.md"
    source.write_text(f"% UNLOCK-X(8) | System administration\n\n# NAME\n\nunlock-x - x\n\n# DESCRIPTION\n\n{wrong}\n")
    done = subprocess.run([sys.executable, TOP / "man/roff.py", source, tmp_path], capture_output=True, text=True)
    assert done.returncode == 1 and str(source) in done.stderr and not (tmp_path / "unlock-x.8").exists()


def test_man_finds_the_pages_that_are_installed(tmp_path: Path) -> None:
    subprocess.run(["make", "--quiet", "-C", TOP, "install-docs", f"DESTDIR={tmp_path}"], check=True)
    where = tmp_path / "usr/share/man"
    subprocess.run(["mandb", "--quiet", "--create", where], check=True)
    for name in PAGES:
        title, number = name.rsplit(".", 1)
        shown = subprocess.run(["man", "-M", where, number, title], capture_output=True, text=True, check=True)
        assert shown.stdout
        about = subprocess.run(["whatis", "-M", where, title], capture_output=True, text=True, check=True)
        assert f"{title} ({number})" in about.stdout
    subprocess.run(["make", "--quiet", "-C", TOP, "uninstall", f"DESTDIR={tmp_path}"], check=True)
    assert not list(where.glob("man*/unlock*"))
