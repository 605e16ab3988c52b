# SPDX-License-Identifier: Apache-2.0
"""The command line: one file a noun. A command imports its operation only when it runs.

Each module has `add`, which adds its commands to the parser, and a function for each command, which calls one operation
and prints what it returns: results on standard output, notes and errors on standard error.
"""

import argparse
import os

from .. import __version__, log
from ..errors import Refused
from ..paths import Paths
from ..protect import protect
from . import (
    cache,
    disk,
    dump,
    group,
    init,
    open_groups,
    operation,
    persistence,
    policy,
    provider,
    rebind,
    recovery,
    rekey,
    status,
    sync,
)
from .arguments import Run, add_command
from .examples import add_examples

_NOUNS = (
    init,
    group,
    disk,
    open_groups,
    recovery,
    status,
    sync,
    rekey,
    operation,
    provider,
    persistence,
    cache,
    policy,
    rebind,
    dump,
)
"""In the order of the help text."""


def cli(argv: list[str]) -> int:
    """Runs one command and returns its exit status. Raises UnlockError; argparse exits with 2 by itself."""
    options = _parser().parse_args(argv)
    if os.geteuid() != 0:
        raise Refused("unlock needs root", f"sudo unlock {' '.join(argv)}", code="not-root")
    protect()
    run: Run = options.run
    status = run(Paths(), options)
    if status == 0 and options.then:
        log.note(f"next: {options.then}")
    return status


def _parser() -> argparse.ArgumentParser:
    top = argparse.ArgumentParser(
        prog="unlock",
        description="Opens this host's encrypted disks at boot, with no network.",
        allow_abbrev=False,
    )
    top.add_argument("--version", action="version", version=f"unlock {__version__}")
    commands = top.add_subparsers(metavar="COMMAND", required=True)
    for noun in _NOUNS:
        noun.add(commands)

    def print_help(paths: Paths, options: argparse.Namespace) -> int:
        log.show(top.format_help().rstrip())
        return 0

    add_command(commands, "help", print_help, "this text")
    add_examples(top)
    return top
