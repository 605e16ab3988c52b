# SPDX-License-Identifier: Apache-2.0
"""`unlock rebind`."""

import argparse
import os
from typing import TYPE_CHECKING

from .. import ask, log
from ..paths import Paths
from ..secret import Secret
from .arguments import (
    BACKUP_PASSWORD_SOURCE,
    RECOVERY_KEY_SOURCE,
    add_accept,
    add_command,
    add_owner_auth,
    add_pcrs,
    existing_backup_password,
    new_backup_password,
    owner_auth,
)
from .pin import add_pin, new_pin

if TYPE_CHECKING:
    from .arguments import Commands

_RISKS = ("unmeasured-boot", "unmeasured-drivers", "unauthenticated-root", "slots-in-use")


def add(commands: "Commands") -> None:
    rebind = add_command(
        commands, "rebind", _rebind, "seal to another board or TPM, or to a boot that changed", "unlock check"
    )
    rebind.add_argument("--recovery-key-file", metavar="FILE", help=RECOVERY_KEY_SOURCE)
    rebind.add_argument(
        "--backup", default="", metavar="FILE", help="native: the backup of its key, or a new file for a new key"
    )
    rebind.add_argument("--backup-password-file", metavar="FILE", help=BACKUP_PASSWORD_SOURCE)
    rebind.add_argument(
        "--client-key", metavar="FILE", help="kmip: the client's key, PEM, if it was wrapped by the TPM's key"
    )
    rebind.add_argument("--password-file", metavar="FILE", help="kmip: password of the user name, if there is one")
    add_pcrs(rebind, "--pcrs", "PCRs to seal to; default: as before, and what measures this boot where it was left out")
    add_accept(rebind, _RISKS)
    rebind.add_argument(
        "--accept-changed-header",
        action="append",
        default=[],
        metavar="DISK",
        help="the header of this disk is not as this host wrote it, and you changed it; may be repeated",
    )
    add_pin(rebind)
    add_owner_auth(rebind)


def _rebind(paths: Paths, options: argparse.Namespace) -> int:
    """Shows what will be allowed before it asks for the recovery key."""
    from ..host import this_boot
    from ..host.state import State
    from ..keys import delivery
    from ..measured import diagnosis, evidence, explain
    from ..operations import baseline, rebind

    State.load(paths)
    tcti = this_boot.tpm_device()
    log.note("the TPM will allow the state of this boot, which is:")
    log.show(explain.to_text(diagnosis.diagnose(evidence.gather_evidence(paths, tcti))))
    pin = new_pin(options)
    if pin is None and rebind.needs_pin(paths, tcti):
        log.note("a PIN is set, and the key cache cannot keep it: type the same one, or another, or give --no-pin")
        pin = new_pin(options, needed=True)
    with (
        (pin and pin.typed) or Secret(b""),
        delivery.read_recovery_key(options.recovery_key_file) as recovery,
        _backup_password(options) as password,
        ask.from_file(options.client_key) if options.client_key else Secret(b"") as client_key,
        ask.from_file(options.password_file) if options.password_file else Secret(b"") as client_password,
        owner_auth(options) as owner,
    ):
        choices = rebind.RebindChoices(
            recovery=recovery,
            backup=options.backup,
            password=password if len(password) else None,
            client_key=client_key if len(client_key) else None,
            client_password=client_password if len(client_password) else None,
            pcrs=options.pcrs,
            pin=pin,
            accept=frozenset(options.accept),
            accepted=frozenset(options.accept_changed_header),
            owner_auth=owner,
            tcti=tcti,
        )
        found = rebind.rebind(paths, choices)
    baseline.record_good_boot(paths, tcti, first=True)
    log.note(f"sealed to this boot, under PCRs {', '.join(map(str, found.selection))}: {len(found.done)} disk(s)")
    if found.dropped:
        gone = ", ".join(map(str, found.dropped))
        why = "as one of the PCRs that were sealed to before is all zero in this boot"
        log.error(f"not sealed to PCRs {gone} any more, {why}", "to choose PCRs: unlock policy set --pcrs N,N")
    for name, why in found.left.items():
        back = "when it is back: unlock sync, or unlock rebind"
        if name in found.changed:
            back = f"if you changed it: unlock rebind --accept-changed-header {name}"
        log.error(f"{name}: {why}: it opens with the recovery key", back)
    for name in found.lost:
        log.error(
            f"provider {name}: the key that it needs was wrapped by the old TPM key and is lost", "unlock provider list"
        )
    return 0


def _backup_password(options: argparse.Namespace) -> Secret:
    """Of --backup: typed twice when that file is new; empty without the option."""
    if not options.backup:
        return Secret(b"")
    flag = "--backup-password-file"
    if not os.path.exists(options.backup):
        return new_backup_password(options.backup_password_file, flag=flag)
    return existing_backup_password(options.backup_password_file, flag=flag)
