# SPDX-License-Identifier: Apache-2.0
"""The options that describe a key manager and this host as its client, for `unlock init` and `unlock provider`."""

import argparse
import os
from typing import TYPE_CHECKING, NamedTuple

from .. import ask, log
from ..errors import Usage
from ..secret import Secret
from .arguments import CLIENT_PASSWORD, existing_secret

if TYPE_CHECKING:
    from ..host import config


class KeyManagerOptions(NamedTuple):
    """What was typed, and what the files hold."""

    settings: "config.ProviderConfig"
    certificate: str
    """The client's, PEM."""
    key: Secret
    """The client's, PEM."""
    password: Secret | None
    """Of the user name; None without one."""


def add_key_manager(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--endpoint",
        action="append",
        default=[],
        metavar="HOST[:PORT][=NAME]",
        help="a server of the key manager; NAME is what its certificate is for; repeat, in the order to try them",
    )
    parser.add_argument("--ca", default="", metavar="FILE", help="PEM: the CA of the servers' certificates")
    parser.add_argument("--client-cert", default="", metavar="FILE", help="PEM: this host's certificate")
    parser.add_argument(
        "--client-key", default="", metavar="FILE", help="PEM: its private key, not encrypted; read once"
    )
    parser.add_argument(
        "--client-key-stays",
        action="store_true",
        help="read the private key from its file each time, instead of keeping it wrapped by the TPM's key: a risk",
    )
    parser.add_argument(
        "--plain-key-names",
        action="store_true",
        help="name keys by letters, digits, . _ - alone, at most 64, for a key manager that takes no /",
    )
    parser.add_argument(
        "--common-name",
        action="store_true",
        help="accept a server's certificate that has its name in the Common Name alone",
    )
    parser.add_argument("--username", default="", metavar="NAME", help="user name, if the key manager wants one")
    parser.add_argument(
        "--password-file",
        metavar="FILE",
        help=f"password of --username; default: credential {CLIENT_PASSWORD}, else you are asked",
    )


def read_key_manager(options: argparse.Namespace, name: str) -> KeyManagerOptions:
    """The key manager that gets the name `name` on this host. Raises Usage."""
    from ..host import config
    from ..keys import access

    for flag in ("endpoint", "ca", "client_cert", "client_key"):
        if not getattr(options, flag):
            word = f"--{flag.replace('_', '-')}"
            raise Usage(f"the key manager {name} needs {word}", f"give {word}; its options: man unlock-kmip")
    if options.password_file and not options.username:
        raise Usage(f"the key manager {name} has a password and no user name", "give --username NAME too")
    settings = config.ProviderConfig(
        name,
        tuple(options.endpoint),
        os.path.abspath(options.ca),
        os.path.abspath(options.client_key) if options.client_key_stays else "",
        config.TIMEOUT,
        config.check_username(options.username),
        config.KEY_NAMES[options.plain_key_names],
        options.common_name,
    )
    certificate, key = access.read_public_pem(options.client_cert), ask.from_file(options.client_key)
    password = client_password(options.password_file) if options.username else None
    return KeyManagerOptions(settings, certificate, key, password)


def client_password(file: str | None) -> Secret:
    """Raises Usage."""
    prompt, flag = "password at the key manager", "--password-file"
    return existing_secret(file, credential=CLIENT_PASSWORD, prompt=prompt, flag=flag)


def note_where_key_is(options: argparse.Namespace) -> None:
    """Says on standard error where the client's private key is kept from now on."""
    if options.client_key_stays:
        log.note(f"the client key stays in {options.client_key}: whoever reads it is this host for the key manager")
    else:
        log.note(f"the client key is kept, wrapped by the TPM's key; {options.client_key} is not needed any more")
