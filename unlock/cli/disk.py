# SPDX-License-Identifier: Apache-2.0
"""`unlock disk adopt`."""

import argparse
from typing import TYPE_CHECKING

from .. import log
from ..paths import Paths
from .arguments import PASSPHRASE, add_command, add_noun, add_recovery_key_and_escrow, escrow, existing_secret

if TYPE_CHECKING:
    from .arguments import Commands


def add(commands: "Commands") -> None:
    verbs = add_noun(commands, "disk", "single disks")
    adopt = add_command(verbs, "adopt", _adopt, "take in an existing LUKS2 disk, data untouched")
    adopt.add_argument("device")
    adopt.add_argument("--group", required=True, metavar="G", help="the group that it joins, or begins")
    adopt.add_argument("--name", default="", help="mapping name; default: the one that it has")
    adopt.add_argument(
        "--passphrase-file",
        metavar="FILE",
        help=f"a passphrase that opens the disk; default: credential {PASSPHRASE}, else you are asked",
    )
    adopt.add_argument(
        "--accept-changed-header",
        action="append",
        default=[],
        metavar="NAME",
        help="the header of this member is not as this host wrote it, and you changed it; may be repeated",
    )
    add_recovery_key_and_escrow(adopt)


def _adopt(paths: Paths, options: argparse.Namespace) -> int:
    from ..host.this_boot import tpm_device
    from ..operations.group import adopt_disk

    with existing_secret(
        options.passphrase_file,
        credential=PASSPHRASE,
        prompt=f"passphrase of {options.device}",
        flag="--passphrase-file",
    ) as passphrase:
        group = adopt_disk(
            paths,
            options.device,
            options.group,
            passphrase,
            options.recovery_key_file,
            options.name,
            escrow(options),
            tpm_device(),
            options.accept_changed_header,
        )
    log.note(f"{options.device} is in group {group.name}; its data, keyslots and mapping name are unchanged")
    return 0
