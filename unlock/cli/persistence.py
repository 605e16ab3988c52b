# SPDX-License-Identifier: Apache-2.0
"""`unlock persistence status | enable | disable`."""

import argparse
from typing import TYPE_CHECKING

from .. import log
from ..paths import Paths
from .arguments import add_command, add_json, add_noun, add_owner_auth, owner_auth
from .rekey import print_outcomes

if TYPE_CHECKING:
    from .arguments import Commands


def add(commands: "Commands") -> None:
    verbs = add_noun(commands, "persistence", "whether a key manager's keys are kept on this host")
    add_json(add_command(verbs, "status", _status, "which disks carry their group's key, wrapped"))
    enable = add_command(verbs, "enable", _enable, "keep them, wrapped by the TPM's key")
    disable = add_command(verbs, "disable", _disable, "remove them; groups then open when the key manager answers")
    disable.add_argument("--remove-all-stored-keys", action="store_true", help="evict the TPM's sealed objects too")
    for each in (enable, disable):
        add_owner_auth(each)


def _status(paths: Paths, options: argparse.Namespace) -> int:
    from ..operations import persistence

    found = persistence.status(paths)
    if options.json:
        log.show_json(found)
        return 0
    log.show(f"persistence: {'enabled' if found['enabled'] else 'disabled'}")
    for group in found["groups"]:
        log.show(
            f"group {group['name']}: policy {group['policy']}, kept on {len(group['kept_on'])} of {group['members']}"
        )
    return 0


def _enable(paths: Paths, options: argparse.Namespace) -> int:
    from ..host import this_boot
    from ..operations import persistence

    with owner_auth(options) as owner:
        return print_outcomes(persistence.enable(paths, tcti=this_boot.tpm_device(), owner_auth=owner))


def _disable(paths: Paths, options: argparse.Namespace) -> int:
    from ..host import this_boot
    from ..operations import persistence

    tcti = this_boot.tpm_device()
    with owner_auth(options) as owner:
        print_outcomes(persistence.disable(paths, tcti=tcti, owner_auth=owner))
        if options.remove_all_stored_keys:
            persistence.remove_all_stored_keys(paths, tcti, owner)
    if options.remove_all_stored_keys:
        log.note("until the next boot, unlock persistence enable takes that back")
        log.note("the TPM keeps nothing of this host: after the next boot every key comes from the key manager")
    return 0
