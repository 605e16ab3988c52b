# SPDX-License-Identifier: Apache-2.0
"""`unlock provider add`, `list`, `test` and `renew`: key managers, which are asked before anything depends on them."""

import os
from collections.abc import Callable, Iterator
from contextlib import ExitStack, closing, contextmanager
from typing import NamedTuple, TypedDict

from .. import ask, journald, messages
from ..disks import find
from ..disks.groups import check_name
from ..errors import Integrity, ProviderError, Refused, Tampered, UnlockError, Usage
from ..host import config
from ..host.lock import exclusive
from ..host.provider_entry import KmipEntry, Offers, ProviderEntry, days_left, has_made
from ..host.state import State
from ..keys import access, rotation
from ..paths import Paths
from ..providers import Provider, Ref
from ..secret import Secret
from . import selfhosted


class Client(NamedTuple):
    """The credentials of this host as a KMIP client."""

    certificate: str
    """PEM."""
    key: Secret
    """PEM."""
    password: Secret | None = None
    """Of the user name in unlock.toml."""


class Proof(NamedTuple):
    """One check of `test_provider`."""

    what: str
    error: UnlockError | None = None
    """None where the check passed."""


class ProviderRow(TypedDict):
    """One provider in `unlock provider list --json`."""

    name: str
    kind: str
    id: str
    in_use: bool
    endpoints: list[str]
    username: str
    certificate_days: int | None
    client_key: str
    """`file`, `wrapped`, or '' for a provider without one."""
    groups: list[str]
    """Names of the groups whose KEK it has made."""
    not_retired: int
    """Replaced KEKs that it has not deactivated yet."""


def list_providers(paths: Paths) -> list[ProviderRow]:
    """The providers of this host, the one in use first. Asks no server. Raises Refused, Malformed."""
    state, settings = State.load(paths), config.load(paths.config)
    rows: list[ProviderRow] = []
    for entry in state.providers:
        setting = settings.provider(entry.name)
        groups = [group.name for group in state.groups.values() if has_made(entry, group.kek)]
        rows.append(
            {
                "name": entry.name,
                "kind": entry.kind,
                "id": entry.id,
                "in_use": entry == state.provider,
                "endpoints": list(setting.endpoints) if setting else [],
                "username": setting.username if setting else "",
                "certificate_days": days_left(entry),
                "client_key": "" if entry.kind == "native" else "file" if entry.client_key is None else "wrapped",
                "groups": groups,
                "not_retired": len(state.not_retired(entry)),
            }
        )
    return rows


def add_provider(paths: Paths, settings: config.ProviderConfig, client: Client, look: find.Look = find.look) -> None:
    """Adds a key manager beside the provider in use; it must answer and accept this host's certificate.

    Raises Refused, Usage, Malformed, ProviderError: then nothing has changed. Called again, it mends what is there.
    """
    check_name(settings.name, "provider")
    with exclusive(paths), access.Work(paths, look) as work:
        work.settings.check()
        state = work.state
        known = state.others.get(settings.name)
        if settings.name == state.provider.name or (known and known.kind == "native"):
            raise Refused(f"there is a provider {settings.name} already", "unlock provider list", code="exists")
        selfhosted.refuse_self_hosted(work.state.groups, settings.endpoints)
        provider_id = known.id if known else f"kmip-{os.urandom(16).hex()}"
        with closing(connect_as(client, settings, provider_id)) as provider:
            offers = provider.offers()
        if settings.name not in work.settings.providers:
            config.append_table(paths.config, config.provider_table(settings))
        elif work.settings.providers[settings.name] != settings:
            raise Refused(f"unlock.toml has another [provider.{settings.name}]", f"edit {paths.config}", code="differs")
        state.put_provider(_entry(work, settings, provider_id, client, offers))
        state.save()
        words = f"provider {settings.name} is added"
        journald.record(paths, messages.PROVIDER_ADDED, words, provider=settings.name)


def _entry(
    work: access.Work, settings: config.ProviderConfig, provider_id: str, client: Client, offers: Offers | None
) -> KmipEntry:
    return work.state.kmip_entry(
        name=settings.name,
        provider_id=provider_id,
        certificate=client.certificate,
        until=access.certificate_end(client.certificate),
        persistence=work.persistence,
        key=None if settings.client_key else client.key,
        password=client.password,
        offers=offers,
    )


def connect_as(client: Client, settings: config.ProviderConfig, provider_id: str) -> Provider:
    """The key manager, asked as this client, whose key and password are copied. Raises Usage, Malformed."""
    password = client.password.copy() if client.password else None
    key = client.key.copy()
    return access.connect_kmip(
        settings, provider_id=provider_id, certificate=client.certificate, key=key, password=password
    )


def test_provider(paths: Paths, name: str = "", look: find.Look = find.look) -> list[Proof]:
    """Asks every endpoint, fetches every key of this host and proves it on its disks, which it does not change.
    Deactivates the replaced KEKs that a switch could not deactivate.

    For a provider that is not in use yet, makes the host key that `switch` would take, and fetches it twice.
    """
    with exclusive(paths), access.Work(paths, look) as work:
        entry = work.state.provider_named(name)
        if entry.kind == "kmip":
            selfhosted.refuse_self_hosted(work.state.groups, access.provider_settings(paths, entry).endpoints)
        provider = work.provider(entry)
        proofs = [
            Proof(f"endpoint {each.endpoint} {each.protocol}".rstrip(), each.problem)
            for each in provider.health().endpoints
        ]
        mine = [group for group in work.state.groups.values() if has_made(entry, group.kek)]
        for group in mine:
            ref = access.key_ref(entry, group.kek, group.kek_name)
            nodes = work.nodes(group)
            what = f"KEK of group {group.name}: fetched, proven on {len(nodes)} of {len(group.members)} disks"
            proofs.append(_prove(what, provider, ref, work.opens(), access.kek_prover(work, group, nodes)))
        proofs.append(_prove_host_key(work, entry, provider))
        if left := len(work.state.not_retired(entry)):
            rotation.retire_keks(work, left=True)
            proofs.append(Proof(f"replaced keys: {len(work.state.not_retired(entry))} of {left} still active there"))
        if work.settings.sync.open_from_provider_after_refusal and entry.kind == "kmip" and entry.client_key:
            what = "client key in a file, for open_from_provider_after_refusal"
            trouble = Refused("it is wrapped by the TPM's key, which that boot does not have", "unlock.toml(5)")
            proofs.append(Proof(what, trouble))
        if work.settings.sync.open_from_provider_after_refusal and entry.kind == "kmip" and entry.password:
            what = "no password, for open_from_provider_after_refusal"
            trouble = Refused("it is wrapped by the TPM's key, which that boot does not have", "unlock.toml(5)")
            proofs.append(Proof(what, trouble))
        return proofs


def _prove(what: str, provider: Provider, ref: Ref, states: frozenset[str], prove: Callable[[Secret], None]) -> Proof:
    try:
        provider.fetch(ref.id, states, prove).wipe()
    except ProviderError as error:
        return Proof(what, error)
    return Proof(what)


def _prove_host_key(work: access.Work, entry: ProviderEntry, provider: Provider) -> Proof:
    key_id, name, generation = work.state.host_key_ref
    try:
        if not has_made(entry, key_id):
            ref, key = access.make_key(provider, access.key_name(work.state.host, "host", generation + 1))
            with key, provider.fetch(ref.id) as again:
                if key != again:
                    raise Integrity(f"provider {entry.name} gives two keys for one id", "unlock provider list")
            return Proof("host key for `unlock provider switch`: made, fetched twice")

        def prove(found: Secret) -> None:
            kept = work.state.host_key(work.persistence)
            if kept and kept != found:
                raise Tampered("it is not the host key that is kept")

        provider.fetch(access.key_ref(entry, key_id, name).id, work.opens(), prove).wipe()
        return Proof("host key: fetched, and the one that is kept")
    except ProviderError as error:
        return Proof("host key", error)


def renew_client(paths: Paths, client: Client, name: str = "", look: find.Look = find.look) -> int:
    """Takes a new client certificate, password, or both, once the key manager has given a key for them. Returns the
    days for which the certificate is valid. What `client` leaves empty stays as it is.

    Raises ProviderError, Malformed, Refused, Usage: the old ones are then still in use.
    """
    with exclusive(paths), access.Work(paths, look) as work:
        state = work.state
        entry = work.state.provider_named(name)
        if entry.kind != "kmip":
            raise Refused(f"provider {entry.name} has no client certificate", "unlock provider list", code="native")
        settings = access.provider_settings(paths, entry)
        if client.password and not settings.username:
            hint = f"edit {paths.config}"
            raise Usage(f"[provider.{settings.name}] has no username that the password is for", hint)
        with _completed(work, settings, entry, client) as client:
            with closing(connect_as(client, settings, entry.id)) as provider:
                proof = _prove_host_key(work, entry, provider)
                if proof.error:
                    raise proof.error
                new = _entry(work, settings, entry.id, client, provider.offers())
            if settings.client_key:
                _same_file(settings.client_key, client)
        state.put_provider(new)
        state.save()
        words = f"provider {new.name} has a new client certificate or password"
        journald.record(paths, messages.PROVIDER_RENEWED, words, provider=new.name)
        return days_left(new) or 0


@contextmanager
def _completed(
    work: access.Work, settings: config.ProviderConfig, entry: KmipEntry, client: Client
) -> Iterator[Client]:
    """`client`, completed with the credentials in use. Wipes those at the end."""
    with ExitStack() as wiped:
        if not client.certificate:
            key = work.state.client_key(work.persistence, entry) or ask.from_file(settings.client_key)
            client = client._replace(certificate=entry.client_cert, key=wiped.enter_context(key))
        if settings.username and not client.password:
            password = work.state.client_password(work.persistence, entry)
            client = client._replace(password=wiped.enter_context(password) if password else None)
        yield client


def _same_file(path: str, client: Client) -> None:
    """Raises Usage unless the file in which the client key stays holds the new key already."""
    with ask.from_file(path) as kept:
        if bytes(kept).strip() != bytes(client.key).strip():
            raise Usage(f"{path}, which unlock.toml names, holds another key", f"put the new key into {path}")
