# SPDX-License-Identifier: Apache-2.0
"""`unlock disk decrypt`."""

import argparse
from typing import TYPE_CHECKING

from .. import log
from ..paths import Paths
from . import progress
from .arguments import add_command
from .consent import add_consent, consent

if TYPE_CHECKING:
    from .arguments import Commands


def add_to_disk(verbs: "Commands") -> None:
    what = "take the encryption away from a disk, in place"
    decrypt = add_command(verbs, "decrypt", _decrypt, what, "unlock check")
    decrypt.add_argument(
        "disk", metavar="DISK", help="its LUKS UUID, mapping name or device; the only one of its group"
    )
    add_consent(decrypt)


def _decrypt(paths: Paths, options: argparse.Namespace) -> int:
    from ..host.this_boot import tpm_device
    from ..operations.decrypt_disk import decrypt_disk, describe_waiting

    with progress.shown(paths, as_json=options.json) as tell:
        done = decrypt_disk(paths, options.disk, tell, consent(options), tcti=tpm_device())
    if done and options.json:
        log.show_json({"version": 1, **done._asdict()})
    elif done and done.outcome == "waiting":
        log.note(describe_waiting(done))
    elif done and done.outcome == "done":
        log.note(f"{done.disk} is decrypted: {done.partition or 'it'} is not encrypted any more")
    return 0
