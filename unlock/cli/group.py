# SPDX-License-Identifier: Apache-2.0
"""`unlock group create`."""

import argparse
from typing import TYPE_CHECKING

from .. import log
from ..paths import Paths
from . import group_disks, leave, lists
from .arguments import add_command, add_noun, add_recovery_key_and_escrow, escrow

if TYPE_CHECKING:
    from ..operations.create_group import NewGroup
    from .arguments import Commands


def add(commands: "Commands") -> None:
    verbs = add_noun(commands, "group", "groups of disks")
    create = add_command(verbs, "create", _create, "format disks and make them a group", "unlock check")
    create.add_argument("name")
    create.add_argument("--disk", nargs="+", action="extend", required=True, metavar="DEV")
    create.add_argument("--mount", required=True, metavar="DIR", help="where the group's file system is mounted")
    create.add_argument(
        "--policy",
        choices=("persistent", "provider"),
        default="persistent",
        help="provider: the group's key-encryption key is never kept on this host",
    )
    create.add_argument("--profile", default="", help="btrfs data profile; default: raid1 for two disks or more")
    create.add_argument(
        "--erase", nargs="+", action="extend", default=[], metavar="DEV", help="a disk whose data may be destroyed"
    )
    create.add_argument(
        "--discard", action="store_true", help="tell the disks which blocks are unused (TRIM); they then show which are"
    )
    add_recovery_key_and_escrow(create)
    group_disks.add_to_group(verbs)
    lists.add_to_group(verbs)
    leave.add_to_group(verbs)


def _create(paths: Paths, options: argparse.Namespace) -> int:
    from ..operations.create_group import create_group

    group = create_group(paths, wanted(options))
    log.note(f"group {group.name}: {len(group.members)} disk(s) at {options.mount}")
    return 0


def wanted(options: argparse.Namespace) -> "NewGroup":
    """What was typed. Raises Usage."""
    from ..operations.create_group import NewGroup

    return NewGroup(
        name=options.name,
        devices=tuple(options.disk),
        mount=options.mount,
        profile=options.profile,
        erase=frozenset(options.erase),
        recovery_file=options.recovery_key_file,
        policy=options.policy,
        escrow=escrow(options),
        discard=options.discard,
    )
