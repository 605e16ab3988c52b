# SPDX-License-Identifier: Apache-2.0
"""`unlock open`."""

import argparse
from typing import TYPE_CHECKING

from .. import log
from ..errors import Degraded, UnlockError, Usage
from ..paths import Paths
from .arguments import RECOVERY_KEY_SOURCE, add_command

if TYPE_CHECKING:
    from .arguments import Commands


def add(commands: "Commands") -> None:
    opened = add_command(commands, "open", _open, "open and mount groups now")
    opened.add_argument("group", nargs="*", metavar="GROUP", help="default: every group")
    opened.add_argument("--recovery", action="store_true", help="by the recovery key, not from the key cache")
    opened.add_argument(
        "--recovery-key-file",
        action="append",
        default=[],
        metavar="FILE",
        help=f"with --recovery; {RECOVERY_KEY_SOURCE}",
    )
    opened.add_argument(
        "--degraded", action="store_true", help="without missing members, if the others suffice; names each GROUP"
    )


def _open(paths: Paths, options: argparse.Namespace) -> int:
    """Goes on with the next group when one fails. The exit status is the highest of the failures."""
    from .. import ask
    from ..boot import gate
    from ..host.state import State
    from ..keys import delivery, recovery_key

    if options.degraded and not options.group:
        raise Usage("--degraded is for groups that are named", "unlock open GROUP --degraded")
    names = options.group or sorted(State.load(paths).groups)
    if options.recovery_key_file and not options.recovery:
        raise Usage("--recovery-key-file is for --recovery", "unlock open --recovery --recovery-key-file FILE")
    keys = [delivery.read_recovery_key(file) for file in options.recovery_key_file]
    if options.recovery and not keys:
        if text := ask.credential(delivery.CREDENTIAL):
            with text:
                keys = [recovery_key.parse(text)]
        else:
            keys = [delivery.type_recovery_key(lambda: ask.anyone("recovery key", delivery.FLAG))]
    status = 0
    for name in names:
        try:
            if lacks := gate.open_group(paths, name, *keys, degraded=options.degraded):
                raise Degraded(lacks, f"unlock group heal {name}")
            log.show(f"group {name}: open")
        except UnlockError as error:
            log.error(str(error), error.hint)
            status = max(status, error.status)
    for each in keys:
        each.wipe()
    return status
