# SPDX-License-Identifier: Apache-2.0
"""`unlock recovery test | new | rotate`."""

import argparse
from typing import TYPE_CHECKING

from .. import log
from ..paths import Paths
from .arguments import (
    RECOVERY_KEY_SOURCE,
    add_command,
    add_escrow,
    add_json,
    add_noun,
    add_owner_auth,
    escrow,
    owner_auth,
)

if TYPE_CHECKING:
    from ..operations.recovery import Changed
    from .arguments import Commands


def add(commands: "Commands") -> None:
    verbs = add_noun(commands, "recovery", "the key that opens every disk, on any machine")
    test = add_command(verbs, "test", _test, "does your copy of it open the disks? opens nothing")
    test.add_argument("--recovery-key-file", default="", metavar="FILE", help=RECOVERY_KEY_SOURCE)
    add_json(test)
    new = add_command(verbs, "new", _new, "write it to disks that lost it, or were away", "unlock recovery test")
    new.add_argument("--recovery-key-file", default="", metavar="FILE", help=RECOVERY_KEY_SOURCE)
    add_escrow(new)
    rotate = add_command(verbs, "rotate", _rotate, "replace it by another one on every disk", "unlock recovery test")
    rotate.add_argument(
        "--recovery-key-file", default="", metavar="FILE", help="new file for the new key; default: it is shown"
    )
    rotate.add_argument(
        "--leaked", action="store_true", help="somebody may have read this host by it: a new persistence key too"
    )
    add_escrow(rotate)
    add_owner_auth(rotate)


def _test(paths: Paths, options: argparse.Namespace) -> int:
    from ..keys import delivery
    from ..operations import recovery as recovery_operations

    with delivery.read_recovery_key(options.recovery_key_file) as recovery:
        rows = recovery_operations.test_recovery_key(paths, recovery)
    if options.json:
        disks = [each._asdict() for each in rows]
        log.show_json({"version": recovery_operations.VERSION, "disks": disks})
        return recovery_operations.exit_status(rows)
    for each in rows:
        what = {"altered": "header altered", "wrong-key": "wrong key"}.get(each.outcome, each.outcome)
        log.show(f"{each.disk}: {what}" + (f" ({each.detail})" if each.detail else ""))
    return recovery_operations.exit_status(rows)


def _new(paths: Paths, options: argparse.Namespace) -> int:
    from ..keys import delivery
    from ..keys import escrow as door
    from ..operations import recovery as recovery_operations

    wanted = escrow(options)
    if wanted:
        door.check_escrow(wanted)
    with delivery.read_recovery_key(options.recovery_key_file) as recovery:
        changed = recovery_operations.renew_keyslots(paths, recovery)
        if wanted:
            door.write_escrow(wanted, recovery)
    return _print_changed(changed, options)


def _rotate(paths: Paths, options: argparse.Namespace) -> int:
    from ..host import this_boot
    from ..keys import delivery
    from ..operations import recovery as recovery_operations

    with owner_auth(options) as owner:
        changed = recovery_operations.rotate_recovery_key(
            paths,
            delivery.Keeper(options.recovery_key_file, escrow(options)),
            leaked=options.leaked,
            tcti=this_boot.tpm_device(),
            owner_auth=owner,
        )
    status = _print_changed(changed, options)
    log.note("the recovery key was replaced")
    return status


def _print_changed(changed: "Changed", options: argparse.Namespace) -> int:
    log.note(f"the recovery key opens {', '.join(changed.done) or 'no disk that is here'}")
    if options.escrow_file:
        log.note(f"in escrow: {options.escrow_file}, read back; move it off this host")
    for name in changed.behind:
        log.error(
            f"{name} is not here: it still opens with the recovery key that it had",
            "when it is back: unlock recovery new",
        )
    return 0
