# SPDX-License-Identifier: Apache-2.0
"""The command line's words for keys: provider, persistence, cache, sync, rekey. Imports a flow only when chosen."""

import argparse
import json
import os
from typing import TYPE_CHECKING, Any

from .. import ask, log
from ..errors import Refused, Usage
from ..paths import TPM_DEVICE, Paths
from ..secret import Secret

if TYPE_CHECKING:
    from ..host import config
    from ..keys import rotation
    from ..operations import init, provider

    Words = argparse._SubParsersAction[argparse.ArgumentParser]

PASSWORD = "unlock.kms-password"
"""The systemd credential."""


def add(words: "Words") -> None:
    """Adds the commands to the top parser."""
    sync = words.add_parser("sync", help="bring what changed at the key manager to the disks", allow_abbrev=False)
    sync.set_defaults(run=_sync)
    sync.add_argument("--json", action="store_true")

    rekey = words.add_parser("rekey", help="new key-encryption key; data untouched", allow_abbrev=False)
    rekey.set_defaults(run=_rekey)
    rekey.add_argument("group", nargs="?", default="", help="default: every group")
    rekey.add_argument("--json", action="store_true")

    _add_provider(
        words.add_parser("provider", help="where keys come from").add_subparsers(metavar="VERB", required=True)
    )
    _add_persistence(
        words.add_parser("persistence", help="whether a key manager's keys are kept on this host").add_subparsers(
            metavar="VERB", required=True
        )
    )
    cache = words.add_parser("cache", help="keys in the kernel keyring").add_subparsers(metavar="VERB", required=True)
    show = cache.add_parser("show", help="names and sources, never keys", allow_abbrev=False)
    show.set_defaults(run=_cache_show)
    show.add_argument("--json", action="store_true")
    flush = cache.add_parser("flush", help="forget them until the next boot", allow_abbrev=False)
    flush.set_defaults(run=_cache_flush)
    flush.add_argument("--yes", action="store_true", help="without a question")


def _add_provider(verbs: "Words") -> None:
    listed = verbs.add_parser("list", help="providers, groups, days left of certificates", allow_abbrev=False)
    listed.set_defaults(run=_provider_list)
    listed.add_argument("--json", action="store_true")
    added = verbs.add_parser("add", help="a key manager beside the one in use", allow_abbrev=False)
    added.set_defaults(run=_provider_add)
    added.add_argument("name")
    add_client(added)
    test = verbs.add_parser("test", help="ask every endpoint; fetch and prove every key", allow_abbrev=False)
    test.set_defaults(run=_provider_test)
    test.add_argument("name", nargs="?", default="", help="default: the one in use")
    test.add_argument("--json", action="store_true")
    switch = verbs.add_parser("switch", help="move this host to another provider", allow_abbrev=False)
    switch.set_defaults(run=_provider_switch)
    switch.add_argument("name")
    switch.add_argument("--persistence", choices=("enabled", "disabled"))
    switch.add_argument("--json", action="store_true")
    renew = verbs.add_parser("renew", help="a new client certificate or password", allow_abbrev=False)
    renew.set_defaults(run=_provider_renew)
    renew.add_argument("name", nargs="?", default="", help="default: the one in use")
    renew.add_argument("--client-cert", default="", metavar="FILE", help="PEM; without it only the password is new")
    renew.add_argument("--client-key", default="", metavar="FILE", help="PEM, not encrypted; read once")
    renew.add_argument("--password-file", metavar="FILE", help=f"else credential {PASSWORD}; alone, else asked")
    backup = verbs.add_parser("backup", help="the native provider's key, under a password", allow_abbrev=False)
    backup.set_defaults(run=_provider_backup)
    backup.add_argument("file", metavar="FILE", help="must not exist")
    restore = verbs.add_parser("restore", help="a native provider from its backup", allow_abbrev=False)
    restore.set_defaults(run=_provider_restore)
    restore.add_argument("file", metavar="FILE")
    restore.add_argument("--name", default="native")
    for each in (backup, restore):
        each.add_argument("--password-file", metavar="FILE", help="else credential unlock.backup-password, else asked")


def _add_persistence(verbs: "Words") -> None:
    status = verbs.add_parser("status", help="which disks carry which key", allow_abbrev=False)
    status.set_defaults(run=_persistence_status)
    status.add_argument("--json", action="store_true")
    enable = verbs.add_parser("enable", help="keep them", allow_abbrev=False)
    enable.set_defaults(run=_persistence_enable)
    disable = verbs.add_parser("disable", help="keep them no more", allow_abbrev=False)
    disable.set_defaults(run=_persistence_disable)
    disable.add_argument("--remove-all-stored-keys", action="store_true", help="evict the TPM's sealed objects too")
    for each in (enable, disable):
        each.add_argument("--owner-auth-file", metavar="FILE", help="password of the TPM's owner, where one is set")


def add_client(parser: argparse.ArgumentParser) -> None:
    """The options that describe a key manager and this host as its client."""
    parser.add_argument("--endpoint", action="append", default=[], metavar="HOST[:PORT][=NAME]", help="in order")
    parser.add_argument("--ca", default="", metavar="FILE", help="PEM: who may sign the servers' certificates")
    parser.add_argument("--client-cert", default="", metavar="FILE", help="PEM")
    parser.add_argument("--client-key", default="", metavar="FILE", help="PEM, not encrypted; read once")
    parser.add_argument(
        "--client-key-stays",
        action="store_true",
        help="use the key from its file at every start, instead of wrapped by the TPM's key: a risk",
    )
    parser.add_argument("--username", default="", metavar="NAME", help="where the key manager wants one")
    parser.add_argument(
        "--password-file", metavar="FILE", help=f"of --username; else credential {PASSWORD}, else asked"
    )


def _client(options: argparse.Namespace, name: str) -> "tuple[config.ProviderConfig, provider.Client]":
    from ..host import config
    from ..keys import access
    from ..operations import provider

    for flag in ("endpoint", "ca", "client_cert", "client_key"):
        if not getattr(options, flag):
            raise Usage(f"a key manager needs --{flag.replace('_', '-')}", "unlock-kmip(7)")
    if options.password_file and not options.username:
        raise Usage("a password is for a user name", "--username NAME")
    key_file = os.path.abspath(options.client_key) if options.client_key_stays else ""
    ca = os.path.abspath(options.ca)
    settings = config.ProviderConfig(
        name, tuple(options.endpoint), ca, key_file, config.TIMEOUT, config.check_username(options.username)
    )
    certificate, key = access.read_public_pem(options.client_cert), ask.from_file(options.client_key)
    return settings, provider.Client(certificate, key, _password(options) if options.username else None)


def _password(options: argparse.Namespace) -> Secret:
    """Of the client's user name. Raises Usage."""
    return secret(options.password_file, PASSWORD, "password at the key manager", "--password-file")


def kmip_at_init(options: argparse.Namespace) -> "init.KeyManager":
    """Raises Usage unless the choice of persistence was made by name."""
    from ..operations import init

    if not options.persistence:
        raise Usage(
            "whether the key manager's keys are kept on this host is a choice",
            "--persistence enabled (it boots without the network, for whoever takes all of it too) or disabled",
        )
    settings, client = _client(options, options.name)
    return init.KeyManager(settings, client, options.persistence == "enabled")


def secret(file: str | None, credential: str, prompt: str, flag: str) -> Secret:
    """From a file, a systemd credential, or the terminal. Raises Usage."""
    if file:
        return ask.from_file(file)
    return ask.credential(credential) or ask.terminal(prompt, flag)


def new_password(file: str | None, flag: str = "--backup-password-file") -> Secret:
    """A backup's password; typed twice at a terminal. Raises Usage."""
    return new_secret(file, "unlock.backup-password", "password for the backup", flag)


def new_secret(file: str | None, credential: str, prompt: str, flag: str) -> Secret:
    """One that a person makes; typed twice at a terminal. Raises Usage."""
    typed = secret(file, credential, prompt, flag)
    if not file and not ask.credential(credential):
        with ask.terminal("the same again", flag) as again:
            if again != typed or not len(typed):
                raise Usage("the two are not the same, or empty", "run it again; nothing was changed")
    return typed


# Flows


def _sync(paths: Paths, options: argparse.Namespace) -> int:
    from ..operations import sync

    lines = sync.sync(paths)
    if options.json:
        keys = [{"key": each.key, "outcome": each.outcome, "detail": each.detail} for each in lines]
        print(json.dumps({"version": sync.VERSION, "keys": keys}, indent=1))
    for each in lines:
        if each.error:
            log.error(f"{each.key}: {each.detail}", each.error.hint)
        elif not options.json:
            print(f"{each.key}: {each.outcome}" + (f" ({each.detail})" if each.detail else ""))
    return max((each.error.status for each in lines if each.error), default=0)


def _rekey(paths: Paths, options: argparse.Namespace) -> int:
    from ..operations.rekey import rekey

    return _tell(rekey(paths, options.group), options.json)


def _tell(outcomes: "list[rotation.Outcome]", as_json: bool = False) -> int:
    """A line a group, and what is behind."""
    if as_json:
        print(json.dumps([each._asdict() for each in outcomes], indent=1))
    for each in outcomes:
        if not as_json:
            print(f"group {each.group}: generation {each.generation}, {len(each.done)} disk(s)")
        for name, why in each.behind.items():
            log.error(f"{name}: {why}: it still opens, and gets its key when it is back", "unlock sync")
    return 0


def _provider_list(paths: Paths, options: argparse.Namespace) -> int:
    from ..operations import provider

    rows = provider.list_providers(paths)
    if options.json:
        print(json.dumps(rows, indent=1))
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
        print(f"{row['name']}: {'; '.join(filter(None, facts))}")
    return 0


def _provider_add(paths: Paths, options: argparse.Namespace) -> int:
    from ..operations import provider

    settings, client = _client(options, options.name)
    with client.key, client.password or Secret(b""):
        provider.add_provider(paths, settings, client)
    log.note(f"provider {options.name} answers; next: unlock provider test {options.name}, unlock provider switch")
    tell_key_file(options)
    return 0


def tell_key_file(options: argparse.Namespace) -> None:
    if options.client_key_stays:
        log.note(f"the client key stays in {options.client_key}: whoever reads it is this host for the key manager")
    else:
        log.note(f"the client key is kept, wrapped by the TPM's key; {options.client_key} is not needed any more")


def _provider_test(paths: Paths, options: argparse.Namespace) -> int:
    from ..operations import provider

    proofs = provider.test_provider(paths, options.name)
    rows: list[dict[str, Any]] = [
        {"what": each.what, "error": each.error.code if each.error else "", "detail": str(each.error or "")}
        for each in proofs
    ]
    if options.json:
        print(json.dumps(rows, indent=1))
    for each in proofs:
        if each.error:
            log.error(f"{each.what}: {each.error}", each.error.hint)
        elif not options.json:
            print(f"{each.what}: good")
    return max((each.error.status for each in proofs if each.error), default=0)


def _provider_switch(paths: Paths, options: argparse.Namespace) -> int:
    from ..operations.switch import switch

    kept = {"enabled": True, "disabled": False, None: None}[options.persistence]
    return _tell(switch(paths, options.name, kept), options.json)


def _provider_renew(paths: Paths, options: argparse.Namespace) -> int:
    from ..keys import access
    from ..operations import provider

    if bool(options.client_cert) != bool(options.client_key):
        raise Usage("a certificate and its key go together", "--client-cert FILE --client-key FILE")
    certificate, key, password = "", Secret(b""), ask.credential(PASSWORD)
    if options.password_file or not (options.client_cert or password):
        password = _password(options)
    if options.client_cert:
        certificate, key = access.read_public_pem(options.client_cert), ask.from_file(options.client_key)
    with key, password or Secret(b""):
        days = provider.renew_client(paths, provider.Client(certificate, key, password), options.name)
    log.note(f"accepted by the key manager, and in use; the certificate is valid for {days} days")
    return 0


def _provider_backup(paths: Paths, options: argparse.Namespace) -> int:
    from ..operations import native_backup

    with new_password(options.password_file, "--password-file") as password:
        native_backup.backup(paths, options.file, password)
    log.note(f"backup written and test-restored: {options.file}; move it off this host")
    return 0


def _provider_restore(paths: Paths, options: argparse.Namespace) -> int:
    from ..operations import native_backup

    flag = "--password-file"
    with secret(options.password_file, "unlock.backup-password", "password of the backup", flag) as password:
        entry = native_backup.restore(paths, options.file, password, options.name)
    log.note(f"provider {entry.name} is {entry.id}; if it is not in use: unlock provider switch {entry.name}")
    return 0


def _persistence_status(paths: Paths, options: argparse.Namespace) -> int:
    from ..operations import persistence

    found = persistence.status(paths)
    if options.json:
        print(json.dumps(found, indent=1))
        return 0
    print(f"persistence: {'enabled' if found['enabled'] else 'disabled'}")
    for group in found["groups"]:
        print(f"group {group['name']}: policy {group['policy']}, kept on {len(group['kept_on'])} of {group['members']}")
    return 0


def _persistence_enable(paths: Paths, options: argparse.Namespace) -> int:
    from ..operations import persistence

    with _owner(options) as owner:
        return _tell(persistence.enable(paths, owner_auth=owner))


def _persistence_disable(paths: Paths, options: argparse.Namespace) -> int:
    from ..operations import persistence

    _tell(persistence.disable(paths))
    if options.remove_all_stored_keys:
        with _owner(options) as owner:
            persistence.remove_all_stored_keys(paths, TPM_DEVICE, owner)
        log.note("until the next boot, unlock persistence enable takes that back")
        log.note("the TPM keeps nothing of this host: after the next boot every key comes from the key manager")
    return 0


def _owner(options: argparse.Namespace) -> Secret:
    """The password of the TPM's owner; empty where there is none. Raises Usage."""
    return ask.from_file(options.owner_auth_file) if options.owner_auth_file else Secret(b"")


def _cache_show(paths: Paths, options: argparse.Namespace) -> int:
    from ..operations import cache

    rows = cache.list_keys(paths)
    if options.json:
        print(json.dumps(rows, indent=1))
        return 0
    for row in rows:
        print(f"{row['key']}: {row['what']}, from {row['source']}")
    return 0


def _cache_flush(paths: Paths, options: argparse.Namespace) -> int:
    from ..operations import cache

    log.note("until the next boot:")
    for line in cache.describe_flush(paths):
        log.note(f"  {line}")
    if not options.yes:
        try:
            answer = bytes(ask.terminal("type yes to forget the keys", "--yes"))
        except Usage as error:
            error.hint = "unlock cache flush --yes"
            raise
        if answer.strip() != b"yes":
            raise Refused("nothing was forgotten", "unlock cache flush --yes", code="not-confirmed")
    for name in cache.flush(paths):
        print(f"forgotten: {name}")
    return 0
