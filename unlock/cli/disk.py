# SPDX-License-Identifier: Apache-2.0
"""`unlock disk adopt`, `unlock disk flags`; the others are in cli.decrypt, cli.encrypt, cli.group_disks, cli.leave and
cli.lists."""

import argparse
from contextlib import nullcontext
from typing import TYPE_CHECKING

from .. import ask, log
from ..errors import NotOurs, Usage
from ..paths import Paths
from ..secret import Secret
from . import decrypt, encrypt, group_disks, leave, lists
from .arguments import PASSPHRASE, add_command, add_noun, add_recovery_key_and_escrow, escrow, existing_secret

if TYPE_CHECKING:
    from .arguments import Commands


def add(commands: "Commands") -> None:
    verbs = add_noun(commands, "disk", "single disks")
    adopt = add_command(verbs, "adopt", _adopt, "take in an existing LUKS2 disk, data untouched", "unlock check")
    adopt.add_argument("device", metavar="DEV")
    adopt.add_argument("--group", required=True, metavar="GROUP", help="the group that it joins, or begins")
    adopt.add_argument("--name", default="", metavar="NAME", help="mapping name; default: the one that it has")
    adopt.add_argument(
        "--passphrase-file",
        metavar="FILE",
        help=f"a passphrase that opens the disk; default: credential {PASSPHRASE}, else you are asked",
    )
    adopt.add_argument(
        "--key-file", metavar="FILE", help="the same, byte by byte as cryptsetup takes it: a last newline counts"
    )
    adopt.add_argument("--keyfile-offset", type=int, default=0, metavar="N", help="bytes of it to leave out first")
    adopt.add_argument("--keyfile-size", type=int, default=0, metavar="N", help="bytes of it to take; default: all")
    adopt.add_argument(
        "--via",
        choices=("clevis", "tpm2"),
        default="",
        help="no passphrase: by the disk's token of clevis, or of systemd-cryptenroll for a TPM",
    )
    adopt.add_argument(
        "--accept-changed-header",
        action="append",
        default=[],
        metavar="DISK",
        help="the header of this member is not as this host wrote it, and you changed it; may be repeated",
    )
    adopt.add_argument(
        "--accept",
        action="append",
        default=[],
        choices=("separate-disk",),
        metavar="RISK",
        help="separate-disk: the group's file system cannot use this disk, and will not open without it",
    )
    add_recovery_key_and_escrow(adopt)
    group_disks.add_to_disk(verbs)
    lists.add_to_disk(verbs)
    leave.add_to_disk(verbs)
    encrypt.add_to_disk(verbs)
    decrypt.add_to_disk(verbs)
    flags = add_command(verbs, "flags", _flags, "change how a member is opened: flags of its header")
    flags.add_argument("device", metavar="DEV")
    flags.add_argument("--set", action="append", default=[], metavar="FLAG", help="as allow-discards; may be repeated")
    flags.add_argument("--clear", action="append", default=[], metavar="FLAG", help="the same, to be taken away")


def _adopt(paths: Paths, options: argparse.Namespace) -> int:
    from ..host.this_boot import tpm_device
    from ..operations.adopt_disk import adopt_disk

    if options.via and (options.passphrase_file or options.key_file or options.keyfile_offset or options.keyfile_size):
        raise Usage("with --via no passphrase and no key file is taken", "unlock disk adopt --help")
    try:
        with nullcontext() if options.via else _passphrase(options) as passphrase:
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
                separate="separate-disk" in options.accept,
                via=options.via,
            )
    except NotOurs as error:
        if options.passphrase_file and error.code == NotOurs.code:
            error.hint = f"if it is a key file: --key-file {options.passphrase_file}"
        raise
    log.note(f"{options.device} is in group {group.name}; its data, keyslots and mapping name are unchanged")
    return 0


def _flags(paths: Paths, options: argparse.Namespace) -> int:
    from ..disks.luks import FLAGS
    from ..operations.flags import change_flags

    unknown = [each for each in (*options.set, *options.clear) if each not in FLAGS]
    if unknown or not (options.set or options.clear):
        raise Usage(
            f"{unknown[0]!r} is no flag that a header can have" if unknown else "no flag is to be changed",
            f"--set FLAG, --clear FLAG; FLAG is one of {', '.join(FLAGS)}",
        )
    flags = change_flags(paths, options.device, add=frozenset(options.set), remove=frozenset(options.clear))
    words = ", ".join(sorted(flags)) or "none"
    log.note(f"{options.device}: flags {words}, from when it is opened next; its token is for this header")
    return 0


def _passphrase(options: argparse.Namespace) -> Secret:
    """What opens the disk. Raises Usage."""
    if not options.key_file:
        if options.keyfile_offset or options.keyfile_size:
            raise Usage("--keyfile-offset and --keyfile-size are about a key file", "--key-file FILE")
        try:
            return existing_secret(
                options.passphrase_file,
                credential=PASSPHRASE,
                prompt=f"passphrase of {options.device}",
                flag="--passphrase-file",
            )
        except Usage as error:
            if options.passphrase_file and error.hint:
                error.hint = f"if it is a key file: --key-file {options.passphrase_file}"
            raise
    if options.passphrase_file:
        raise Usage("one of --key-file and --passphrase-file is taken, not both", "unlock disk adopt --help")
    if options.keyfile_offset < 0 or options.keyfile_size < 0:
        raise Usage("--keyfile-offset and --keyfile-size are not negative", "unlock disk adopt --help")
    return ask.key_file(options.key_file, offset=options.keyfile_offset, size=options.keyfile_size)
