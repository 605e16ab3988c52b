# SPDX-License-Identifier: Apache-2.0
"""The manual pages: what they refer to exists, and each error of a provider is in the page of that provider."""

import re
from pathlib import Path

import pytest

from unlock import cli, clikeys, errors

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


def test_each_option_for_key_managers_is_in_the_manual() -> None:
    parser = cli._parser()
    words = next(each for each in parser._actions if isinstance(each, clikeys.argparse._SubParsersAction))
    verbs = words.choices["provider"]._actions[-1]
    assert isinstance(verbs, clikeys.argparse._SubParsersAction)
    pages = "".join(PAGES.values())
    for parser in (words.choices["init"], words.choices["persistence"], *verbs.choices.values()):
        for action in parser._actions:
            for flag in action.option_strings:
                assert flag in ("-h", "--help") or f"**{flag}**" in pages or f"**{flag} " in pages, flag
