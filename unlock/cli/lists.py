# SPDX-License-Identifier: Apache-2.0
"""`unlock disk list`, `unlock group list`: the rows of `unlock status`, one a line."""

import argparse
from collections.abc import Sequence
from typing import TYPE_CHECKING

from .. import log
from ..paths import Paths
from .arguments import add_command, add_json

if TYPE_CHECKING:
    from .arguments import Commands


def add_to_disk(verbs: "Commands") -> None:
    add_json(add_command(verbs, "list", _list_disks, "the disks of this host's groups"))


def add_to_group(verbs: "Commands") -> None:
    add_json(add_command(verbs, "list", _list_groups, "the groups of this host"))


def _list_disks(paths: Paths, options: argparse.Namespace) -> int:
    from ..operations.status import read_status

    found = read_status(paths)
    groups, in_clear = found.groups, found.in_clear
    if options.json:
        disks = [
            {"group": group.name, **disk._asdict(), "in_clear": disk.name in in_clear}
            for group in groups
            for disk in group.disks
        ]
        log.show_json({"version": 1, "disks": disks, "forgotten": [each._asdict() for each in found.forgotten]})
        return 0
    rows = [
        (
            each.name,
            group.name,
            each.device or "-",
            f"{each.state}, in clear" if each.name in in_clear else each.state,
            each.serial or "-",
            each.uuid,
        )
        for group in groups
        for each in group.disks
    ]
    rows += [(each.name, each.group, each.device, "forgotten", "-", each.uuid) for each in found.forgotten]
    _show_table(("DISK", "GROUP", "DEVICE", "STATE", "SERIAL", "UUID"), rows)
    return 0


def _list_groups(paths: Paths, options: argparse.Namespace) -> int:
    from ..operations.status import read_status, to_json

    found = read_status(paths)
    if options.json:
        log.show_json({"version": 1, "groups": to_json(found)["groups"]})
        return 0
    rows = [(each.name, each.state, str(len(each.disks)), each.policy, each.describe_mount()) for each in found.groups]
    _show_table(("GROUP", "STATE", "DISKS", "POLICY", "MOUNT"), rows)
    return 0


def _show_table(head: tuple[str, ...], rows: Sequence[tuple[str, ...]]) -> None:
    for line in log.columns([head, *rows]) if rows else ():
        log.show(line)
    if not rows:
        log.note("no groups yet: unlock group create, or unlock disk adopt")
