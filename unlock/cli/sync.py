# SPDX-License-Identifier: Apache-2.0
"""`unlock sync`."""

import argparse
from typing import TYPE_CHECKING

from .. import log
from ..paths import Paths
from .arguments import add_command, add_json

if TYPE_CHECKING:
    from .arguments import Commands


def add(commands: "Commands") -> None:
    add_json(add_command(commands, "sync", _sync, "write keys that changed at the key manager to the disks"))


def _sync(paths: Paths, options: argparse.Namespace) -> int:
    """Prints one line a key. The exit status is the highest of the errors."""
    from ..operations import sync

    lines = sync.sync(paths)
    if options.json:
        keys = [{"key": each.key, "outcome": each.outcome, "detail": each.detail} for each in lines]
        log.show_json({"version": sync.VERSION, "keys": keys})
    for each in lines:
        if each.error:
            log.error(f"{each.key}: {each.detail}", each.error.hint)
        elif not options.json:
            log.show(f"{each.key}: {each.outcome}" + (f" ({each.detail})" if each.detail else ""))
    return max((each.error.status for each in lines if each.error), default=0)
