# SPDX-License-Identifier: Apache-2.0
"""Where keys come from: one interface, one file a provider.

    resolve(refs) ──> changed? ──> fetch(id, prove=...) ──> the flow rotates what depends on it
    create(name) ──> activate(id) ──> fetch(id) ... rotate(ref, name) ──> fetch ... retire(id)

What each error asks of the caller (`unlock.errors`; a provider has tried all its endpoints before it raises one):

| error | means | do |
|---|---|---|
| ProviderUnavailable | nothing answers, or not in time | keep what is there; again after `retry_after` seconds |
| PeerUntrusted | somebody else answers, or its certificate is not trusted | alert; nothing was sent to it |
| ClientAuth | our certificate or password is refused | alert; no retry before they are renewed |
| ClockWrong | a certificate is not valid yet | wait for the time to be set, then again |
| ProviderProtocol | an answer that is not to the question, or not KMIP | as ProviderUnavailable, and alert |
| Integrity | a wrong key, or no single one: id, type, length, proof | never adopt; alert; the endpoint is out |
| NotFoundOrDenied | no such key, or not for us: servers do not tell these apart | never delete anything; alert |
| StateBlocked | deactivated, compromised, destroyed | no new wraps; policy decides whether it may open disks |
| Unsupported | the server cannot do this | use what else `capabilities` offers |
"""

from collections.abc import Callable, Sequence
from typing import NamedTuple, Protocol

from ..errors import ProviderError
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
    """What the host keeps of a key."""

    id: str
    """The provider's own identifier."""
    name: str
    """The one that unlock gave it; '' for a key that has none."""


class Status(NamedTuple):
    """What the provider says of one key. Never a reason to drop a key that the host has."""

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
    """`rotate` makes the server replace the key under its old name; else a new key gets the new name."""


class EndpointHealth(NamedTuple):
    endpoint: str
    """As a person would write it."""
    protocol: str
    """'KMIP 1.4', or '' when it did not answer."""
    problem: ProviderError | None


class Health(NamedTuple):
    endpoints: tuple[EndpointHealth, ...]
    """In the configured order; none for a provider without a server."""
    certificate_days: int | None
    """Whole days for which the client certificate is still valid, negative when expired; None without one."""


def no_proof(key: Secret) -> None:
    """For a key that nothing is wrapped with yet."""


class Provider(Protocol):
    """Every method raises ProviderError only. Usable in a `with`, which closes it."""

    def __enter__(self) -> "Provider": ...

    def __exit__(self, *_: object) -> None: ...

    @property
    def id(self) -> str:
        """Identity that is stored in the state: the same for as long as the keys are."""

    def capabilities(self) -> Capabilities: ...

    def resolve(self, refs: Sequence[Ref]) -> list[Status]:
        """One status a ref, in that order; one request for up to 50 of them when nothing has changed. No secrets."""

    def fetch(self, key_id: str, states: frozenset[str] = USABLE, prove: Callable[[Secret], None] = no_proof) -> Secret:
        """The AES-256 key, 32 bytes, of exactly that id. StateBlocked when it is in none of `states`.

        `prove` raises Tampered when the key does not unwrap what it must: then the next endpoint is asked.
        """

    def health(self) -> Health:
        """Asks every endpoint; raises nothing."""

    def locate(self, name: str) -> Ref | None:
        """The one key of that name that is not BLOCKED. Raises Integrity when there are two."""

    def create(self, name: str) -> Ref:
        """A new AES-256 key, to be activated. Called again with its name it finds the same key."""

    def activate(self, key_id: str) -> None:
        """May be repeated."""

    def rotate(self, ref: Ref, name: str) -> Ref:
        """A key that replaces `ref`, active: by Re-key, under the old name, or a new one under `name`.

        Killed, call it again with the same arguments: it finds the key that it has made.
        """

    def retire(self, key_id: str) -> None:
        """Deactivates, never destroys. May be repeated."""

    def close(self) -> None:
        """Ends connections and wipes what secrets the provider holds."""
