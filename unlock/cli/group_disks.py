# SPDX-License-Identifier: Apache-2.0
"""`unlock disk add|remove|replace`, `unlock group grow`: added to their nouns by cli.disk and cli.group."""

import argparse
from typing import TYPE_CHECKING

from .. import log
from ..paths import Paths
from . import progress
from .arguments import add_command, add_owner_auth, owner_auth
from .consent import add_consent, consent

if TYPE_CHECKING:
    from .arguments import Commands

_MEMBER = "the disk, its mapping's name, or its LUKS UUID"


def add_to_disk(verbs: "Commands") -> None:
    add = add_command(verbs, "add", _add, "format a disk and make it a member of a group")
    add.add_argument("device", metavar="DEV")
    add.add_argument("--group", required=True, metavar="GROUP", help="the group that it joins")
    add.add_argument(
        "--no-filesystem",
        action="store_true",
        help="put nothing on it: for LVM, md and ZFS, to which you add the mapping yourself",
    )
    _add_new_disk(add)
    remove = add_command(verbs, "remove", _remove, "move a member's data to the others, and take it out of its group")
    remove.add_argument("device", metavar="DISK", help=_MEMBER)
    remove.add_argument("--no-migrate", action="store_true", help="leave a file system that is on this disk alone")
    add_consent(remove)
    replace = add_command(verbs, "replace", _replace, "let a new disk take the place of a member, dead or alive")
    replace.add_argument("old", metavar="DISK", help=_MEMBER)
    replace.add_argument("new", metavar="DEV")
    add_owner_auth(replace)
    _add_new_disk(replace)


def add_to_group(verbs: "Commands") -> None:
    grow = add_command(verbs, "grow", _grow, "use what a disk of the group has become larger by")
    grow.add_argument("name", metavar="GROUP")
    add_consent(grow)


def _add_new_disk(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--erase", action="append", default=[], metavar="DEV", help="the new disk, when its data may be destroyed"
    )
    parser.add_argument(
        "--recovery-key-file", default="", metavar="FILE", help="the recovery key of this host; default: you are asked"
    )
    add_consent(parser)


def _add(paths: Paths, options: argparse.Namespace) -> int:
    from ..operations.add_disk import NewDisk, add_disk

    wanted = NewDisk(
        options.device,
        options.group,
        frozenset(options.erase),
        options.recovery_key_file,
        file_system=not options.no_filesystem,
    )
    added = add_disk(paths, wanted, consent=consent(options))
    if added and options.json:
        log.show_json({"version": 1, **added._asdict()})
    elif added:
        log.note(f"{options.device} is {added.name} of group {added.group}")
        log.note(f"next: {added.next}")
    return 0


def _remove(paths: Paths, options: argparse.Namespace) -> int:
    from ..operations.remove_disk import remove_disk

    with progress.shown(paths, as_json=options.json) as tell:
        removed = remove_disk(
            paths, options.device, migrate=not options.no_migrate, consent=consent(options), tell=tell
        )
    if removed and options.json:
        log.show_json({"version": 1, **removed._asdict()})
    elif removed:
        log.note(f"{removed.name} is out of group {removed.group}; the recovery key still opens {removed.node}")
        log.note(f"next: unlock disk erase {removed.node}; if it leaves your hands as it is: unlock rekey --fresh")
    return 0


def _replace(paths: Paths, options: argparse.Namespace) -> int:
    from ..host import this_boot
    from ..operations.replace_disk import Replacing, replace_disk

    wanted = Replacing(options.old, options.new, frozenset(options.erase), options.recovery_key_file)
    with owner_auth(options) as owner, progress.shown(paths, as_json=options.json) as tell:
        replaced = replace_disk(
            paths, wanted, consent=consent(options), tell=tell, tcti=this_boot.tpm_device(), owner_auth=owner
        )
    if replaced and options.json:
        log.show_json({"version": 1, **replaced._asdict()})
    elif replaced:
        log.note(f"{replaced.new} has taken the place of {replaced.old} in group {replaced.group}")
        if replaced.absent:
            log.note(f"neither {replaced.old} nor a copy of its header opens by the TPM any more")
        if replaced.next:
            log.note(f"next: {replaced.next}")
    return 0


def _grow(paths: Paths, options: argparse.Namespace) -> int:
    from ..operations.grow_group import grow_group

    result = grow_group(paths, options.name, consent=consent(options))
    if result is None:
        return 0
    grown = [each for each in result.disks if each.after > each.before]
    if options.json:
        disks = [each._asdict() for each in result.disks]
        log.show_json({"version": 1, "group": options.name, "disks": disks, "next": result.next})
        return 0
    for each in grown:
        log.note(f"{each.name}: {each.before} bytes, now {each.after}")
    if not grown:
        log.note("no disk has become larger; if one has: echo 1 > /sys/class/block/DISK/device/rescan, growpart")
    if result.next:
        log.note(f"next: {result.next}")
    return 0
