# SPDX-License-Identifier: Apache-2.0
"""`unlock cache show | flush`."""

import argparse
from typing import TYPE_CHECKING

from .. import ask, log
from ..errors import Refused, Usage
from ..paths import Paths
from .arguments import add_command, add_json, add_noun

if TYPE_CHECKING:
    from .arguments import Commands


def add(commands: "Commands") -> None:
    verbs = add_noun(commands, "cache", "keys in the kernel keyring")
    add_json(add_command(verbs, "show", _show, "names of the keys and where they came from, never the keys"))
    flush = add_command(verbs, "flush", _flush, "remove the keys until the next boot")
    flush.add_argument("--yes", action="store_true", help="do not ask first")


def _show(paths: Paths, options: argparse.Namespace) -> int:
    from ..operations import cache

    rows = cache.list_keys(paths)
    if options.json:
        log.show_json({"version": 1, "keys": rows})
        return 0
    for row in rows:
        log.show(f"{row['key']}: {row['what']}, from {row['source']}")
    return 0


def _flush(paths: Paths, options: argparse.Namespace) -> int:
    """Says what will not be possible, and asks, before it removes anything."""
    from ..operations import cache

    log.note("until the next boot:")
    for line in cache.describe_flush(paths):
        log.note(f"  {line}")
    if not options.yes:
        try:
            answer = bytes(ask.terminal("type yes to forget the keys", "--yes"))
        except Usage as error:
            error.hint = "unlock cache flush --yes"
            raise
        if answer.strip() != b"yes":
            raise Refused(
                "the keys stay in the key cache: yes was not typed", "unlock cache flush --yes", code="not-confirmed"
            )
    for name in cache.flush(paths):
        log.show(f"forgotten: {name}")
    return 0
