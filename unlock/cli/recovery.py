# SPDX-License-Identifier: Apache-2.0
"""The command line's words for recovery: recovery test|new|rotate, open, help. Imports a flow only when chosen."""

import argparse
import json
from typing import TYPE_CHECKING

from .. import log
from ..errors import UnlockError, Usage
from ..paths import Paths

if TYPE_CHECKING:
    from ..keys.escrow import Escrow
    from ..operations.recovery import Changed

    Words = argparse._SubParsersAction[argparse.ArgumentParser]

_GIVEN = "else credential unlock.recovery-key, else asked"


def add(words: "Words", top: argparse.ArgumentParser) -> None:
    """Adds the commands to the top parser."""
    opened = words.add_parser("open", help="open and mount groups now", allow_abbrev=False)
    opened.set_defaults(run=_open)
    opened.add_argument("group", nargs="*", help="default: every group")
    opened.add_argument("--recovery", action="store_true", help="by the recovery key, not from the key cache")
    opened.add_argument("--recovery-key-file", action="append", default=[], metavar="FILE", help=_GIVEN)

    verbs = words.add_parser("recovery", help="the key that opens every disk, on any machine").add_subparsers(
        metavar="VERB", required=True
    )
    test = verbs.add_parser("test", help="is your copy of it good? opens nothing", allow_abbrev=False)
    test.set_defaults(run=_test)
    test.add_argument("--recovery-key-file", default="", metavar="FILE", help=_GIVEN)
    test.add_argument("--json", action="store_true")
    new = verbs.add_parser("new", help="bring it to disks that lost it, or were away", allow_abbrev=False)
    new.set_defaults(run=_new)
    new.add_argument("--recovery-key-file", default="", metavar="FILE", help=_GIVEN)
    _add_escrow(new)
    rotate = verbs.add_parser("rotate", help="another one in its place, on every disk", allow_abbrev=False)
    rotate.set_defaults(run=_rotate)
    rotate.add_argument("--recovery-key-file", default="", metavar="FILE", help="written; without it, shown")
    _add_escrow(rotate)

    words.add_parser("help", help="this text").set_defaults(run=lambda *_: print(top.format_help(), end="") or 0)


def add_keep(parser: argparse.ArgumentParser) -> None:
    """Options of a command that makes the recovery key the first time, and needs it later."""
    parser.add_argument(
        "--recovery-key-file",
        default="",
        metavar="FILE",
        help="read if it exists, else written; without it, asked or shown",
    )
    _add_escrow(parser)


def _add_escrow(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--escrow-to", default="", metavar="KEY", help="encrypt it: X.509 certificate, or age recipient"
    )
    parser.add_argument("--escrow-file", default="", metavar="FILE", help="where to; must not exist")


def escrow(options: argparse.Namespace) -> "Escrow | None":
    """Raises Usage for one of the two options without the other."""
    if bool(options.escrow_to) != bool(options.escrow_file):
        raise Usage("escrow needs a public key and a file", "--escrow-to KEY --escrow-file FILE")
    if not options.escrow_to:
        return None
    from ..keys.escrow import Escrow

    return Escrow(options.escrow_to, options.escrow_file)


def _test(paths: Paths, options: argparse.Namespace) -> int:
    from ..keys import delivery
    from ..operations import recovery as recovery_operations

    with delivery.read_recovery_key(options.recovery_key_file) as recovery:
        rows = recovery_operations.test_recovery_key(paths, recovery)
    if options.json:
        disks = [each._asdict() for each in rows]
        print(json.dumps({"version": recovery_operations.VERSION, "disks": disks}, indent=1))
        return recovery_operations.exit_status(rows)
    for each in rows:
        what = {"altered": "header altered", "wrong-key": "wrong key"}.get(each.outcome, each.outcome)
        print(f"{each.disk}: {what}" + (f" ({each.detail})" if each.detail else ""))
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
    return _tell(changed, options, "")


def _rotate(paths: Paths, options: argparse.Namespace) -> int:
    from ..keys import delivery
    from ..operations import recovery as recovery_operations

    changed = recovery_operations.rotate_recovery_key(
        paths, delivery.Keeper(options.recovery_key_file, escrow(options))
    )
    return _tell(changed, options, "the recovery key was replaced; next: unlock recovery test")


def _tell(changed: "Changed", options: argparse.Namespace, end: str) -> int:
    log.note(f"the recovery key opens {', '.join(changed.done) or 'no disk that is here'}")
    if options.escrow_file:
        log.note(f"in escrow: {options.escrow_file}, read back; move it off this host")
    for name in changed.behind:
        log.error(f"{name} is not here: it opens with the key before, until it is back", "unlock recovery new")
    if end:
        log.note(end)
    return 0


def _open(paths: Paths, options: argparse.Namespace) -> int:
    from .. import ask
    from ..boot import gate
    from ..host.state import State
    from ..keys import delivery, recovery_key

    names = options.group or sorted(State.load(paths).groups)
    if options.recovery_key_file and not options.recovery:
        raise Usage("--recovery-key-file goes with --recovery", "unlock open --recovery --recovery-key-file FILE")
    keys = [delivery.read_recovery_key(file) for file in options.recovery_key_file]
    if options.recovery and not keys:
        with ask.credential(delivery.CREDENTIAL) or ask.anyone("recovery key", delivery.FLAG) as text:
            keys = [recovery_key.parse(text)]
    status = 0
    for name in names:
        try:
            gate.open_group(paths, name, *keys)
            print(f"group {name}: open")
        except UnlockError as error:
            log.error(str(error), error.hint)
            status = max(status, error.status)
    for each in keys:
        each.wipe()
    return status
