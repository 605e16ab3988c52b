# SPDX-License-Identifier: Apache-2.0
"""`--dry-run` and `--yes`: shows what a command would do, or asks before something is lost."""

import argparse
from typing import TYPE_CHECKING

from .. import ask, log
from ..errors import Refused
from .arguments import add_json

if TYPE_CHECKING:
    from ..operations.consent import Consent, Plan


def add_consent(parser: argparse.ArgumentParser) -> None:
    """Adds `--dry-run`, `--yes` and `--json`."""
    add_dry_run(parser)
    parser.add_argument("--yes", action="store_true", help="do not ask before something is lost")


def add_dry_run(parser: argparse.ArgumentParser) -> None:
    """Adds `--dry-run` and `--json`, for a command after which nothing is lost."""
    parser.add_argument("--dry-run", action="store_true", help="print what would be done, in order, and change nothing")
    parser.set_defaults(yes=False)
    add_json(parser)


def consent(options: argparse.Namespace) -> "Consent":
    """The answer to a plan: `--dry-run` prints it, `--yes` agrees; else a person at the terminal types the name of what
    is lost."""

    def decide(plan: "Plan") -> bool:
        if options.dry_run:
            _show(plan, as_json=options.json)
            return False
        if plan.destroys and not options.yes:
            _ask(plan)
        return True

    return decide


def _show(plan: "Plan", *, as_json: bool) -> None:
    if as_json:
        log.show_json({"version": 1, "dry_run": True, "steps": plan.steps, "destroys": plan.destroys})
        return
    for number, step in enumerate(plan.steps, 1):
        log.show(f"{number}. {step}")
    for each in plan.destroys:
        log.show(f"lost for good: {each}")


def _ask(plan: "Plan") -> None:
    """Raises Refused."""
    for each in plan.destroys:
        log.note(f"lost for good: {each}")
    typed = ask.line(f"type {plan.thing} to go on: ")
    if typed is None:
        raise Refused(f"nobody was asked whether it may go: {'; '.join(plan.destroys)}", "--yes", "not-confirmed")
    if typed != plan.thing:
        raise Refused(f"that is not {plan.thing}; nothing was changed", "--dry-run shows the steps", "not-confirmed")
