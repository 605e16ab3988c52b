# SPDX-License-Identifier: Apache-2.0
"""What this host says of itself: `unlock status | check | explain`. All of them change nothing."""

import argparse
import json
from typing import TYPE_CHECKING

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
    from ..host import report_file
    from ..operations import status

    if options.svg and not (options.boot and not options.json):
        raise Usage("--svg is for --boot, without --json", "unlock status --boot --svg")
    if options.boot:
        record = status.read_boot(paths)
        if options.svg:
            from ..boot import plot

            print(plot.svg(record), end="")
        else:
            print(json.dumps(report_file.to_json(record), indent=1) if options.json else status.boot_to_text(record))
        return 0
    found = status.read_status(paths)
    print(json.dumps(status.to_json(found), indent=1) if options.json else status.to_text(found))
    return 0


def _check(paths: Paths, options: argparse.Namespace) -> int:
    from ..operations import check

    found = check.check(paths)
    print(json.dumps(check.to_json(found), indent=1) if options.json else check.to_text(found))
    return check.EXIT_STATUS[found.verdict]


def _explain(paths: Paths, options: argparse.Namespace) -> int:
    from ..measured.explain import explain

    return explain(paths, options.json)
