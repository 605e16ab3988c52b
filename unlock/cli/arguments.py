# SPDX-License-Identifier: Apache-2.0
"""Arguments that several commands take, and where commands get secrets from; for the other modules of this folder."""

import argparse
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

from .. import ask
from ..errors import Usage
from ..paths import Paths
from ..secret import Secret

if TYPE_CHECKING:
    from ..keys.escrow import Escrow

    Commands = argparse._SubParsersAction[argparse.ArgumentParser]

Run = Callable[[Paths, argparse.Namespace], int]
"""Runs a command that was parsed. Returns the exit status. Raises UnlockError."""

BACKUP_PASSWORD = "unlock.backup-password"
CLIENT_PASSWORD = "unlock.kms-password"
PASSPHRASE = "unlock.passphrase"
PIN = "unlock.pin"
RECOVERY_KEY = "unlock.recovery-key"
"""Names of systemd credentials."""

RECOVERY_KEY_SOURCE = f"default: credential {RECOVERY_KEY}, else you are asked"
BACKUP_PASSWORD_SOURCE = f"default: credential {BACKUP_PASSWORD}, else you are asked"


# Commands


def add_command(commands: "Commands", name: str, run: Run, help: str, then: str = "") -> argparse.ArgumentParser:
    """A command that `run` carries out. `then`: what to type next."""
    parser = commands.add_parser(name, help=help, allow_abbrev=False)
    parser.set_defaults(run=run, then=then)
    return parser


def add_noun(commands: "Commands", name: str, help: str) -> "Commands":
    """The verbs of a noun, to be added to."""
    return commands.add_parser(name, help=help).add_subparsers(metavar="VERB", required=True)


# Arguments


def add_json(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--json", action="store_true", help="print JSON, for scripts")


def add_pcrs(parser: argparse.ArgumentParser, flag: str, help: str) -> None:
    parser.add_argument(flag, type=_pcr_numbers, default=(), metavar="N,N", help=help)


def _pcr_numbers(text: str) -> tuple[int, ...]:
    """Raises ArgumentTypeError."""
    try:
        return tuple(int(part) for part in text.split(","))
    except ValueError as error:
        raise argparse.ArgumentTypeError(f"{text!r}: PCR numbers are wanted, as in 4,7,9") from error


def add_accept(parser: argparse.ArgumentParser, risks: Sequence[str], what: str = "go on") -> None:
    parser.add_argument(
        "--accept",
        action="append",
        default=[],
        choices=risks,
        metavar="RISK",
        help=f"{what} although this check refuses: {', '.join(risks)}",
    )


def add_owner_auth(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--owner-auth-file", metavar="FILE", help="password of the TPM's owner, if the TPM has one")


def owner_auth(options: argparse.Namespace) -> Secret:
    """The password of the TPM's owner; empty without the option. Raises Usage."""
    return ask.from_file(options.owner_auth_file) if options.owner_auth_file else Secret(b"")


def add_recovery_key_and_escrow(parser: argparse.ArgumentParser) -> None:
    """For a command that makes the recovery key the first time, and asks for it later."""
    parser.add_argument(
        "--recovery-key-file",
        default="",
        metavar="FILE",
        help="the recovery key: read if FILE exists, else written there; default: typed, or shown when it is new",
    )
    add_escrow(parser)


def add_escrow(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--escrow-to",
        default="",
        metavar="KEY",
        help="encrypt the recovery key to this X.509 certificate or age recipient",
    )
    parser.add_argument("--escrow-file", default="", metavar="FILE", help="new file for the encrypted recovery key")


def escrow(options: argparse.Namespace) -> "Escrow | None":
    """Raises Usage for one of the two options without the other."""
    if bool(options.escrow_to) != bool(options.escrow_file):
        raise Usage("escrow needs a public key and a file", "--escrow-to KEY --escrow-file FILE")
    if not options.escrow_to:
        return None
    from ..keys.escrow import Escrow

    return Escrow(options.escrow_to, options.escrow_file)


# Secrets


def existing_secret(file: str | None, *, credential: str, prompt: str, flag: str) -> Secret:
    """A secret from a file, a systemd credential, or the terminal, in this order. Raises Usage that names `flag`."""
    if file:
        return ask.from_file(file)
    return ask.credential(credential) or ask.terminal(prompt, flag)


def new_secret(file: str | None, *, credential: str, prompt: str, flag: str) -> Secret:
    """The same for a secret that a person chooses now: it is typed twice at a terminal. Raises Usage."""
    typed = existing_secret(file, credential=credential, prompt=prompt, flag=flag)
    if not file and not ask.credential(credential):
        with ask.terminal("the same again", flag) as again:
            if again != typed or not len(typed):
                raise Usage(
                    f"{prompt}: the two entries differ, or are empty",
                    "type the same command again; nothing was changed",
                )
    return typed


def new_backup_password(file: str | None, *, flag: str) -> Secret:
    return new_secret(file, credential=BACKUP_PASSWORD, prompt="password for the backup", flag=flag)


def existing_backup_password(file: str | None, *, flag: str) -> Secret:
    return existing_secret(file, credential=BACKUP_PASSWORD, prompt="password of the backup", flag=flag)


def bytes_a_second(text: str) -> int:
    """Raises ArgumentTypeError."""
    number, unit = (text[:-1], text[-1]) if text[-1:] in ("K", "M", "G") else (text, "")
    if not number.isdecimal() or not int(number):
        raise argparse.ArgumentTypeError(f"{text!r}: bytes a second are wanted, as in 50M")
    return int(number) << {"": 0, "K": 10, "M": 20, "G": 30}[unit]
