# SPDX-License-Identifier: Apache-2.0
"""The entry of a key provider in state.json: which provider it is, and the wrapped keys that this host needs to ask it.

Each wrapped field is base64 of a key wrapped by the persistence key. docs/formats.md specifies the fields.
"""

import time
from typing import Literal, NamedTuple


class NativeEntry(NamedTuple):
    """The native provider: it derives every key from one key-derivation key (KDK)."""

    name: str
    kind: Literal["native"]
    id: str
    scope: str
    """What the KDK's derivations are bound to: the id of the host that made it."""
    kdk: str
    """Wrapped."""


class Offers(NamedTuple):
    """What a key manager was seen to offer: so it need not be asked each time."""

    version: tuple[int, int]
    """Of KMIP."""
    rekey: bool
    """It has the operation Re-key."""


class KmipEntry(NamedTuple):
    """A KMIP key manager, and the credentials of this host as its client."""

    name: str
    kind: Literal["kmip"]
    id: str
    client_cert: str
    """PEM."""
    client_until: int
    """When the certificate ends, in seconds since 1970."""
    client_key: str | None
    """Wrapped PEM; None when the key stays in a file."""
    password: str | None = None
    """Of the user name in unlock.toml, wrapped; None where there is none."""
    offers: Offers | None = None


ProviderEntry = NativeEntry | KmipEntry


def has_made(entry: ProviderEntry, key_id: str) -> bool:
    """Whether this provider has made the key; `key_id` as this host names keys: PROVIDER/ID."""
    return key_id.startswith(f"{entry.id}/")


def days_left(entry: ProviderEntry) -> int | None:
    """Whole days for which the client certificate is valid; None for a provider without one."""
    return int((entry.client_until - time.time()) // 86400) if entry.kind == "kmip" else None
