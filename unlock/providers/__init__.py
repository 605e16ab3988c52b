# SPDX-License-Identifier: Apache-2.0
"""Key providers: the interface through which `keys` and `operations` get keys, and its two implementations.

`native` derives keys on this host, `kmip` asks a key manager. What they are used for:

    what has changed:  resolve(refs) ──> fetch(id, prove=...) of what has
    a new key:         create(name) ──> activate(id) ──> fetch(id)
    a rotation:        rotate(ref, name) ──> fetch(id) ──> retire(id of the old key)
                       rotate_unasked(ref, name) ──> retire(id of the old key): as few requests as can be

Errors (`unlock.errors`) and what the caller does. A provider raises one only after it has tried all its endpoints:

| error | meaning | the caller |
|---|---|---|
| ProviderUnavailable | no endpoint answers in time | keeps what it has; asks again after `retry_after` seconds |
| PeerUntrusted | the server's certificate is not trusted; nothing was sent | alerts |
| ClientAuth | the server refuses our certificate or password | alerts; does not retry before they are renewed |
| ClockWrong | a certificate is not valid yet | waits until the clock is set |
| ProviderProtocol | an answer is not KMIP, or not to the request | as ProviderUnavailable, and alerts |
| Integrity | a wrong key, or several for one name | never adopts the key; alerts |
| NotFoundOrDenied | no such key, or not for this client | deletes nothing; alerts |
| StateBlocked | the key is deactivated, compromised or destroyed | wraps nothing new with it; policy decides the rest |
| Unsupported | the server does not offer the operation | uses what else `capabilities` offers |
"""

from collections.abc import Callable, Sequence
from typing import NamedTuple, Protocol

from ..errors import ProviderError
from ..host.provider_entry import Offers
from ..secret import Secret

PRE_ACTIVE = "pre-active"
ACTIVE = "active"
DEACTIVATED = "deactivated"
COMPROMISED = "compromised"
DESTROYED = "destroyed"
UNKNOWN = "unknown"
"""The server names no state, or one that we do not know."""

USABLE = frozenset({ACTIVE, UNKNOWN})
"""States in which a key may get new wraps."""

BLOCKED = frozenset({DEACTIVATED, COMPROMISED, DESTROYED})


class Ref(NamedTuple):
    """How the host refers to a key."""

    id: str
    """The provider's own identifier."""
    name: str
    """The name that unlock gave it; '' for a key without one."""


class KeyStatus(NamedTuple):
    """What the provider says of one key. It is never a reason to drop a key that the host has."""

    ref: Ref
    found: bool
    state: str
    """Of the key `ref.id`; UNKNOWN when it was not found."""
    current: str
    """Id of the key that has replaced it, ready to be fetched; `ref.id` when none has."""
    problem: ProviderError | None = None
    """NotFoundOrDenied when not found; Integrity when no single key has the name. `current` is `ref.id` then."""

    @property
    def changed(self) -> bool:
        return self.current != self.ref.id


class Capabilities(NamedTuple):
    create: bool
    rekey: bool
    """`rotate` uses the server's Re-key, and the new key has the old name; else a new key is made with the new name."""


class EndpointHealth(NamedTuple):
    endpoint: str
    """HOST:PORT[=NAME], as in unlock.toml."""
    protocol: str
    """'KMIP 1.4', or '' when it did not answer."""
    problem: ProviderError | None


class Health(NamedTuple):
    endpoints: tuple[EndpointHealth, ...]
    """In the configured order; none for a provider without a server."""
    certificate_days: int | None
    """Whole days for which the client certificate is still valid, negative when expired; None without one."""


def no_proof(key: Secret) -> None:
    """Accepts any key: for one that nothing is wrapped with yet."""


class Provider(Protocol):
    """A source of keys. Every method raises only ProviderError. A `with` closes it."""

    def __enter__(self) -> "Provider": ...

    def __exit__(self, *_: object) -> None: ...

    @property
    def id(self) -> str:
        """Stored in the state with each key; the same as long as the keys are the same."""

    def capabilities(self) -> Capabilities: ...

    def resolve(self, refs: Sequence[Ref]) -> list[KeyStatus]:
        """One status a ref, in that order. Asks for no secrets; one request for 50 refs when nothing has changed."""

    def fetch(self, key_id: str, states: frozenset[str] = USABLE, prove: Callable[[Secret], None] = no_proof) -> Secret:
        """The AES-256 key, 32 bytes, of exactly that id. StateBlocked when it is in none of `states`.

        `prove` raises Tampered when the key does not unwrap what it must; then the next endpoint is asked.
        """

    def health(self) -> Health:
        """Asks every endpoint; raises nothing."""

    def locate(self, name: str) -> Ref | None:
        """The one key of that name that is not BLOCKED. Raises Integrity when there are two."""

    def create(self, name: str) -> Ref:
        """Makes an AES-256 key that is not active yet. Called again with the same name, it finds the same key."""

    def activate(self, key_id: str) -> None:
        """Activates a key. May be repeated."""

    def rotate(self, ref: Ref, name: str) -> Ref:
        """Makes an active key that replaces `ref`: by Re-key, with the old name, or else a new key named `name`.

        Called again with the same arguments, after a kill too, it finds the key that it has made.
        """

    def rotate_unasked(self, ref: Ref, name: str) -> tuple[Ref, Secret | None]:
        """As `rotate`, for a name that no key was ever asked for by: in as few requests as the provider can. Then the
        key's bytes may come with it; else it is still to be fetched."""

    def offers(self) -> Offers | None:
        """What the state keeps of what the provider offers; None for nothing."""

    def retire(self, key_id: str) -> None:
        """Deactivates a key; never destroys it. May be repeated. One that no endpoint has any more is out of use."""

    def close(self) -> None:
        """Closes connections and wipes the secrets that the provider holds."""
