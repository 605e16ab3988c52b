# SPDX-License-Identifier: Apache-2.0
"""`unlock rekey`, and how a rotation is printed."""

import argparse
from typing import TYPE_CHECKING

from .. import log
from ..paths import Paths
from .arguments import add_command, add_json, add_owner_auth, owner_auth

if TYPE_CHECKING:
    from ..keys import rotation
    from .arguments import Commands


def add(commands: "Commands") -> None:
    rekey = add_command(commands, "rekey", _rekey, "give a group a new key-encryption key; data untouched")
    rekey.add_argument("group", nargs="?", default="", help="default: every group")
    rekey.add_argument(
        "--fresh", action="store_true", help="a new persistence key too: earlier copies of headers open nothing"
    )
    add_json(rekey)
    add_owner_auth(rekey)


def _rekey(paths: Paths, options: argparse.Namespace) -> int:
    from ..host import this_boot
    from ..operations.rekey import rekey, rekey_fresh

    if options.fresh:
        with owner_auth(options) as owner:
            outcomes = rekey_fresh(paths, options.group, this_boot.tpm_device(), owner)
    else:
        outcomes = rekey(paths, options.group)
    return print_outcomes(outcomes, as_json=options.json)


def print_outcomes(outcomes: "list[rotation.Outcome]", *, as_json: bool = False) -> int:
    """Prints one line a group, and the disks that still have the old key. Returns 0."""
    if as_json:
        log.show_json({"version": 1, "groups": [each._asdict() for each in outcomes]})
    for each in outcomes:
        if not as_json:
            log.show(f"group {each.group}: generation {each.generation}, {len(each.done)} disk(s)")
        for name, why in each.behind.items():
            log.error(f"{name}: {why}: it opens with its old key until it is back", "when it is back: unlock sync")
    return 0
