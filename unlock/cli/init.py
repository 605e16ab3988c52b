# SPDX-License-Identifier: Apache-2.0
"""`unlock init`."""

import argparse
from typing import TYPE_CHECKING

from .. import log
from ..errors import Usage
from ..paths import Paths
from ..secret import Secret
from .arguments import (
    BACKUP_PASSWORD_SOURCE,
    add_accept,
    add_command,
    add_owner_auth,
    add_pcrs,
    new_backup_password,
    owner_auth,
)
from .key_manager import add_key_manager, note_where_key_is, read_key_manager

if TYPE_CHECKING:
    from ..operations import init
    from .arguments import Commands


_NEXT = "unlock disk adopt (for an encrypted root), unlock group create"
_RISKS = (
    "initramfs-without-unlock",
    "unmeasured-boot",
    "unmeasured-drivers",
    "unauthenticated-root",
    "slots-in-use",
    "lost-state",
    "plain-dumps",
)


def add(commands: "Commands") -> None:
    init = add_command(commands, "init", _init, "make this host's keys and seal them to the TPM", _NEXT)
    init.add_argument("--backup", default="", metavar="FILE", help="native: new file for the key-derivation key")
    init.add_argument("--backup-password-file", metavar="FILE", help=BACKUP_PASSWORD_SOURCE)
    add_accept(init, _RISKS)
    add_pcrs(init, "--pcrs", "PCRs to seal to; default: those that measure how this host boots")
    add_owner_auth(init)
    init.add_argument("--provider", choices=("native", "kmip"), default="native", help="where keys come from")
    init.add_argument("--name", default="kms", metavar="NAME", help="kmip: the key manager's name on this host")
    init.add_argument(
        "--persistence", choices=("enabled", "disabled"), help="kmip: whether its keys are kept on this host, wrapped"
    )
    add_key_manager(init)


def _init(paths: Paths, options: argparse.Namespace) -> int:
    from ..host import this_boot
    from ..operations import baseline
    from ..operations.init import InitChoices, init

    kms = _key_manager(options) if options.provider == "kmip" else None
    if not kms and not options.backup:
        raise Usage("the native provider's key needs a backup before anything depends on it", "give --backup FILE")
    password = Secret(b"") if kms else new_backup_password(options.backup_password_file, flag="--backup-password-file")
    with password, owner_auth(options) as owner:
        choices = InitChoices(
            backup=options.backup,
            password=password,
            accept=frozenset(options.accept),
            pcrs=options.pcrs,
            owner_auth=owner,
            kms=kms,
            tcti=this_boot.tpm_device(),
        )
        found = init(paths, choices)
    baseline.record_good_boot(paths, this_boot.tpm_device(), first=True)
    log.note(f"boot: {found.boot}; sealed under PCRs {', '.join(map(str, found.selection))}: {found.why}")
    if kms:
        log.note(f"keys come from {', '.join(kms.settings.endpoints)}; the host key was made and fetched")
        note_where_key_is(options)
    else:
        log.note(f"the backup was written and restored once: {options.backup}; move it off this host")
    return 0


def _key_manager(options: argparse.Namespace) -> "init.KeyManager":
    """Raises Usage, also unless --persistence was given."""
    from ..operations import init, provider

    if not options.persistence:
        raise Usage(
            "unlock init --provider kmip does not choose whether keys are kept on this host",
            "--persistence enabled (it boots without the network, for whoever takes all of it too) or disabled",
        )
    typed = read_key_manager(options, options.name)
    client = provider.Client(certificate=typed.certificate, key=typed.key, password=typed.password)
    return init.KeyManager(settings=typed.settings, client=client, persistent=options.persistence == "enabled")
