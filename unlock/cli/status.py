# SPDX-License-Identifier: Apache-2.0
"""What this host says of itself: `unlock status | check | explain`. All of them change nothing."""

import argparse
import os
from typing import TYPE_CHECKING

from .. import log
from ..errors import Usage
from ..paths import Paths
from .arguments import add_command, add_json

if TYPE_CHECKING:
    from .arguments import Commands


def add(commands: "Commands") -> None:
    status = add_command(commands, "status", _status, "groups, disks, and where each key comes from")
    add_json(status)
    status.add_argument("--boot", action="store_true", help="the timeline of this boot")
    status.add_argument("--svg", action="store_true", help="with --boot: the timeline as a picture")
    add_json(add_command(commands, "check", _check, "is it safe to reboot?"))
    add_json(add_command(commands, "explain", _explain, "why the TPM refused this boot, and what to do"))


def _status(paths: Paths, options: argparse.Namespace) -> int:
    from ..host import report_file, this_boot
    from ..operations import status

    if options.svg and not (options.boot and not options.json):
        raise Usage("--svg is for --boot, without --json", "unlock status --boot --svg")
    if options.boot:
        record = status.read_boot(paths)
        if options.svg:
            from ..boot import plot

            log.show(plot.svg(record).rstrip())
        else:
            if options.json:
                log.show_json(report_file.to_json(record))
            else:
                log.show(status.boot_to_text(record))
        return 0
    found = status.read_status(paths, this_boot.tpm_device())
    if options.json:
        log.show_json(status.to_json(found))
    else:
        log.show(status.to_text(found))
    return 0


def _check(paths: Paths, options: argparse.Namespace) -> int:
    from ..host import this_boot
    from ..operations import check

    found = check.check(paths, this_boot.tpm_device())
    if options.json:
        log.show_json(check.to_json(found))
    else:
        log.show(check.to_text(found))
    return check.EXIT_STATUS[found.verdict]


def _explain(paths: Paths, options: argparse.Namespace) -> int:
    from ..host.missing_state import NEVER_INITIALISED, explain_missing_state
    from ..measured.explain import explain

    if not os.path.exists(paths.state):
        missing = explain_missing_state(paths)
        if missing.code == NEVER_INITIALISED:
            raise missing
        log.error(str(missing), missing.hint)
    return explain(paths, options.json)
