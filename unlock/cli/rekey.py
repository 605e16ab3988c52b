# SPDX-License-Identifier: Apache-2.0
"""`unlock rekey`, and how a rotation is printed."""

import argparse
from contextlib import ExitStack
from typing import TYPE_CHECKING

from .. import ask, log
from ..errors import Usage
from ..paths import Paths
from . import progress
from .arguments import RECOVERY_KEY_SOURCE, add_command, add_owner_auth, bytes_a_second, owner_auth
from .consent import add_consent, consent

if TYPE_CHECKING:
    from ..keys import rotation
    from ..operations import rekey_deep
    from .arguments import Commands


def add(commands: "Commands") -> None:
    rekey = add_command(commands, "rekey", _rekey, "give a group a new key-encryption key, or new volume keys too")
    rekey.add_argument("group", nargs="?", default="", metavar="GROUP", help="default: every group")
    rekey.add_argument(
        "--fresh", action="store_true", help="a new persistence key too: earlier copies of headers open nothing"
    )
    add_owner_auth(rekey)
    _add_deep(rekey)


def _add_deep(rekey: argparse.ArgumentParser) -> None:
    rekey.add_argument(
        "--deep", action="store_true", help="new volume keys too: all data is re-encrypted, while it is in use"
    )
    rekey.add_argument("--all", action="store_true", help="with --deep: every group")
    rekey.add_argument(
        "--max-rate",
        type=bytes_a_second,
        default=0,
        metavar="BYTES",
        help="with --deep: a second, at most; 50M is 50 MiB",
    )
    rekey.add_argument("--recovery-key-file", default="", metavar="FILE", help=f"with --deep: {RECOVERY_KEY_SOURCE}")
    rekey.add_argument(
        "--passphrase-file",
        action="append",
        default=[],
        metavar="FILE",
        help="with --deep: the passphrase of a keyslot of yours, which then opens the new volume key; may be repeated",
    )
    add_consent(rekey)


def _rekey(paths: Paths, options: argparse.Namespace) -> int:
    from ..host import this_boot
    from ..operations.rekey import rekey, rekey_fresh

    if options.deep:
        return _rekey_deep(paths, options)
    for name in "all", "max_rate", "recovery_key_file", "passphrase_file", "dry_run", "yes":
        if getattr(options, name):
            raise Usage(f"--{name.replace('_', '-')} is for --deep alone", "unlock rekey --help")
    if options.fresh:
        with owner_auth(options) as owner:
            outcomes = rekey_fresh(paths, options.group, this_boot.tpm_device(), owner)
    else:
        outcomes = rekey(paths, options.group)
    return print_outcomes(outcomes, as_json=options.json)


def _rekey_deep(paths: Paths, options: argparse.Namespace) -> int:
    from ..keys import delivery
    from ..operations import rekey_deep

    if options.fresh:
        raise Usage("--fresh and --deep are two commands", "unlock rekey --fresh; then: unlock rekey --deep")
    if options.all == bool(options.group):
        raise Usage("--deep wants a group, or --all", "unlock status")
    with ExitStack() as secrets:
        choices = rekey_deep.Choices(
            options.group,
            lambda: delivery.read_recovery_key(options.recovery_key_file),
            tuple(secrets.enter_context(ask.from_file(file)) for file in options.passphrase_file),
            options.max_rate,
        )
        with progress.shown(paths, as_json=options.json) as tell:
            outcomes = rekey_deep.rekey_deep(paths, choices, tell, consent(options))
    return _print_deep_outcomes(outcomes, as_json=options.json)


def _print_deep_outcomes(outcomes: "list[rekey_deep.Outcome]", *, as_json: bool = False) -> int:
    """Prints one line a disk. Returns 1 when a disk that is here is not done."""
    if as_json:
        log.show_json({"version": 1, "disks": [each._asdict() for each in outcomes]})
    for each in outcomes:
        if each.outcome == "done" and not as_json:
            log.show(f"group {each.group}: {each.disk} has a new volume key")
        elif each.outcome != "done":
            log.error(f"{each.disk}: {each.detail or each.outcome}", each.hint)
    return int(any(each.outcome not in ("done", "away") for each in outcomes))


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
