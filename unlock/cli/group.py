# SPDX-License-Identifier: Apache-2.0
"""`unlock group create`, `unlock group set` and `unlock group heal`."""

import argparse
from typing import TYPE_CHECKING

from .. import log
from ..paths import Paths
from . import group_disks, leave, lists
from .arguments import add_command, add_noun, add_recovery_key_and_escrow, escrow
from .consent import add_consent, consent

if TYPE_CHECKING:
    from ..operations.create_group import NewGroup
    from .arguments import Commands


def add(commands: "Commands") -> None:
    verbs = add_noun(commands, "group", "groups of disks")
    create = add_command(verbs, "create", _create, "format disks and make them a group", "unlock check")
    create.add_argument("name", metavar="NAME")
    create.add_argument("--disk", nargs="+", action="extend", required=True, metavar="DEV", help="the disks")
    create.add_argument("--mount", required=True, metavar="DIR", help="where the group's file system is mounted")
    create.add_argument(
        "--policy",
        choices=("persistent", "provider"),
        default="persistent",
        help="provider: the group's key-encryption key is never kept on this host",
    )
    create.add_argument(
        "--profile", default="", metavar="PROFILE", help="btrfs data profile; default: raid1 for two disks or more"
    )
    create.add_argument(
        "--erase", nargs="+", action="extend", default=[], metavar="DEV", help="a disk whose data may be destroyed"
    )
    create.add_argument(
        "--discard", action="store_true", help="tell the disks which blocks are unused (TRIM); they then show which are"
    )
    create.add_argument(
        "--degraded",
        choices=("never", "allow"),
        default="never",
        help="allow: a boot opens the group without all of its disks, if its profile can do without the others",
    )
    add_recovery_key_and_escrow(create)
    group_disks.add_to_group(verbs)
    lists.add_to_group(verbs)
    leave.add_to_group(verbs)
    change = add_command(verbs, "set", _set, "whether a boot opens a group without all of its disks", "unlock check")
    change.add_argument("name", metavar="GROUP")
    change.add_argument(
        "--degraded", choices=("never", "allow"), required=True, help="whether a boot opens it without all of its disks"
    )
    add_consent(change)
    heal = add_command(
        verbs, "heal", _heal, "take in a disk that was away while its group was written", "unlock status"
    )
    heal.add_argument("name", metavar="GROUP")
    add_consent(heal)


def _create(paths: Paths, options: argparse.Namespace) -> int:
    from ..operations.create_group import create_group

    group = create_group(paths, wanted(options))
    log.note(f"group {group.name}: {len(group.members)} disk(s) at {options.mount}")
    return 0


def _set(paths: Paths, options: argparse.Namespace) -> int:
    from ..operations.set_group import set_degraded

    behind = set_degraded(paths, options.name, options.degraded, consent(options))
    if options.json and not options.dry_run:
        log.show_json({"version": 1, "group": options.name, "degraded": options.degraded, "behind": behind})
    elif not options.dry_run:
        log.note(f"group {options.name}: degraded = {options.degraded}")
        if behind:
            log.note(f"not yet on {', '.join(behind)}: done when back, by unlock sync")
    return 0


def _heal(paths: Paths, options: argparse.Namespace) -> int:
    from ..operations.heal_group import heal_group

    done = heal_group(paths, options.name, consent(options))
    if options.json and not options.dry_run:
        log.show_json({"version": 1, "healed": done.members, "away": done.left})
    elif not options.dry_run:
        log.note(f"group {options.name}: {', '.join(done.members) or 'nothing'} healed")
        if done.left:
            log.note(f"still away: {', '.join(done.left)}")
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
        degraded=options.degraded,
    )
