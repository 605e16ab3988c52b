# SPDX-License-Identifier: Apache-2.0
"""`unlock provider list | add | test | switch | renew | backup | restore`."""

import argparse
from typing import TYPE_CHECKING

from .. import ask, log
from ..errors import Usage
from ..paths import Paths
from ..secret import Secret
from .arguments import (
    BACKUP_PASSWORD_SOURCE,
    CLIENT_PASSWORD,
    add_command,
    add_json,
    add_noun,
    add_owner_auth,
    existing_backup_password,
    new_backup_password,
    owner_auth,
)
from .key_manager import add_key_manager, client_password, note_where_key_is, read_key_manager
from .rekey import print_outcomes

if TYPE_CHECKING:
    from .arguments import Commands


def add(commands: "Commands") -> None:
    verbs = add_noun(commands, "provider", "where keys come from")
    add_json(add_command(verbs, "list", _list, "providers, their groups, days that certificates have left"))
    added = add_command(verbs, "add", _add, "add a key manager beside the provider in use")
    added.add_argument("name", metavar="NAME", help="its name on this host")
    add_key_manager(added)
    test = add_command(verbs, "test", _test, "ask every endpoint; fetch every key and try it on the disks")
    test.add_argument("name", nargs="?", default="", metavar="PROVIDER", help="default: the one in use")
    add_json(test)
    switch = add_command(verbs, "switch", _switch, "move this host to another provider")
    switch.add_argument("name", metavar="PROVIDER")
    switch.add_argument(
        "--persistence", choices=("enabled", "disabled"), help="whether a key manager's keys are kept on this host"
    )
    add_json(switch)
    add_owner_auth(switch)
    renew = add_command(verbs, "renew", _renew, "use a new client certificate or password")
    renew.add_argument("name", nargs="?", default="", metavar="PROVIDER", help="default: the one in use")
    renew.add_argument("--client-cert", default="", metavar="FILE", help="PEM; without it only the password is new")
    renew.add_argument("--client-key", default="", metavar="FILE", help="PEM, not encrypted; read once")
    renew.add_argument(
        "--password-file",
        metavar="FILE",
        help=f"default: credential {CLIENT_PASSWORD}; without that and --client-cert, you are asked",
    )
    backup = add_command(verbs, "backup", _backup, "write the native provider's key to a file, under a password")
    backup.add_argument("file", metavar="FILE", help="must not exist")
    restore = add_command(verbs, "restore", _restore, "add a native provider from its backup")
    restore.add_argument("file", metavar="FILE")
    restore.add_argument("--name", default="native", metavar="NAME", help="its name on this host")
    for each in (backup, restore):
        each.add_argument("--password-file", metavar="FILE", help=BACKUP_PASSWORD_SOURCE)


def _list(paths: Paths, options: argparse.Namespace) -> int:
    from ..operations import provider

    rows = provider.list_providers(paths)
    if options.json:
        log.show_json({"version": 1, "providers": rows})
        return 0
    for row in rows:
        days = row["certificate_days"]
        facts = [
            row["kind"],
            "in use" if row["in_use"] else "",
            ", ".join(row["endpoints"]),
            f"certificate: {days} days" if days is not None else "",
            f"groups: {', '.join(row['groups'])}" if row["groups"] else "",
            f"replaced keys still active there: {row['not_retired']}" if row["not_retired"] else "",
        ]
        log.show(f"{row['name']}: {'; '.join(filter(None, facts))}")
    return 0


def _add(paths: Paths, options: argparse.Namespace) -> int:
    from ..operations import provider

    typed = read_key_manager(options, options.name)
    with typed.key, typed.password or Secret(b""):
        client = provider.Client(certificate=typed.certificate, key=typed.key, password=typed.password)
        provider.add_provider(paths, typed.settings, client)
    name = options.name
    log.note(f"provider {name} answers; next: unlock provider test {name}, unlock provider switch {name}")
    note_where_key_is(options)
    return 0


def _test(paths: Paths, options: argparse.Namespace) -> int:
    """Prints one line a check. The exit status is the highest of the errors."""
    from ..operations import provider

    proofs = provider.test_provider(paths, options.name)
    if options.json:
        rows = [
            {"what": each.what, "error": each.error.code if each.error else "", "detail": str(each.error or "")}
            for each in proofs
        ]
        log.show_json({"version": 1, "checks": rows})
    for each in proofs:
        if each.error:
            log.error(f"{each.what}: {each.error}", each.error.hint)
        elif not options.json:
            log.show(f"{each.what}: good")
    return max((each.error.status for each in proofs if each.error), default=0)


def _switch(paths: Paths, options: argparse.Namespace) -> int:
    from ..host import this_boot
    from ..operations.switch import switch

    persistent = {"enabled": True, "disabled": False, None: None}[options.persistence]
    with owner_auth(options) as owner:
        outcomes = switch(paths, options.name, persistent, tcti=this_boot.tpm_device(), owner_auth=owner)
    return print_outcomes(outcomes, as_json=options.json)


def _renew(paths: Paths, options: argparse.Namespace) -> int:
    from ..keys import access
    from ..operations import provider

    if bool(options.client_cert) != bool(options.client_key):
        raise Usage("a client certificate is renewed together with its key", "--client-cert FILE --client-key FILE")
    certificate, key, password = "", Secret(b""), ask.credential(CLIENT_PASSWORD)
    if options.password_file or not (options.client_cert or password):
        password = client_password(options.password_file)
    if options.client_cert:
        certificate, key = access.read_public_pem(options.client_cert), ask.from_file(options.client_key)
    with key, password or Secret(b""):
        client = provider.Client(certificate=certificate, key=key, password=password)
        days = provider.renew_client(paths, client, options.name)
    log.note(f"the key manager accepts it, and it is in use; the client certificate is valid for {days} days")
    return 0


def _backup(paths: Paths, options: argparse.Namespace) -> int:
    from ..operations import native_backup

    with new_backup_password(options.password_file, flag="--password-file") as password:
        native_backup.backup(paths, options.file, password)
    log.note(f"the backup was written and restored once: {options.file}; move it off this host")
    return 0


def _restore(paths: Paths, options: argparse.Namespace) -> int:
    from ..operations import native_backup

    with existing_backup_password(options.password_file, flag="--password-file") as password:
        entry = native_backup.restore(paths, options.file, password, options.name)
    log.note(f"provider {entry.name} is {entry.id}; if it is not in use: unlock provider switch {entry.name}")
    return 0
