# SPDX-License-Identifier: Apache-2.0
"""`unlock disk encrypt`."""

import argparse
from typing import TYPE_CHECKING

from .. import log
from ..paths import Paths
from . import progress
from .arguments import add_command, add_recovery_key_and_escrow, bytes_a_second, escrow
from .consent import add_consent, consent

if TYPE_CHECKING:
    from .arguments import Commands


def add_to_disk(verbs: "Commands") -> None:
    encrypt = add_command(verbs, "encrypt", _encrypt, "encrypt a disk that holds data, in place", "unlock check")
    encrypt.add_argument("device", metavar="DEV")
    encrypt.add_argument("--group", required=True, metavar="GROUP", help="a new group, for this disk alone")
    encrypt.add_argument("--name", default="", metavar="NAME", help="mapping name; default: made of the group's")
    encrypt.add_argument(
        "--max-rate", type=bytes_a_second, default=0, metavar="BYTES", help="a second, at most; 50M is 50 MiB"
    )
    add_recovery_key_and_escrow(encrypt)
    add_consent(encrypt)


def _encrypt(paths: Paths, options: argparse.Namespace) -> int:
    from ..host.this_boot import tpm_device
    from ..operations.encrypt_disk import Choices, encrypt_disk

    choices = Choices(
        options.device, options.group, options.name, options.recovery_key_file, escrow(options), options.max_rate
    )
    with progress.shown(paths, as_json=options.json) as tell:
        done = encrypt_disk(paths, choices, tell, consent(options), tcti=tpm_device())
    if done and options.json:
        log.show_json({"version": 1, **done._asdict()})
    elif done:
        log.note(f"{options.device} is encrypted: /dev/mapper/{done.disk}, group {done.group}")
    return 0
