# SPDX-License-Identifier: Apache-2.0
"""The provider `kmip`, method by method: each asks the first endpoint that answers, and checks what it says.

method ──> Failover.read or .change ──> a function of `key_operations`, with one Server ──> result
"""

import hashlib
import random as _random
import time
from collections.abc import Callable, Sequence
from functools import partial
from typing import NamedTuple

from ... import log
from ...endpoint import Endpoint
from ...errors import Integrity, Malformed, NotFoundOrDenied, ProviderError
from ...host.provider_entry import Offers
from ...secret import Secret
from .. import USABLE, Capabilities, EndpointHealth, Health, KeyStatus, Ref, no_proof
from . import key_operations
from .failover import Failover
from .failures import printable
from .requests import Credential
from .server import KEYS_PER_REQUEST, Server
from .tls import client_context, validity

PLAIN_NAME_MAX = 64


class KmipSettings(NamedTuple):
    """A key manager and this host as its client. Give the fields by name."""

    id: str
    """Made once, when the provider is added: it outlives endpoints and certificates."""
    endpoints: tuple[Endpoint, ...]
    """In the order in which they are tried."""
    ca: str
    """PEM: the CA that server certificates must come from."""
    certificate: str
    """PEM: the client's, with intermediates if there are any."""
    key: Secret
    """PEM: the client's private key, not encrypted."""
    username: str = ""
    password: Secret | None = None
    timeout: float = 10.0
    """Seconds for one exchange with one endpoint: name, connection, TLS, request, whole answer."""
    plain_names: bool = False
    """New keys get the `plain_name` of what they are to be called."""
    offers: Offers | None = None
    """What it was seen to offer; None when not known."""
    common_name: bool = False
    """Accept a server's certificate that has its name in the Common Name alone."""


class KmipProvider:
    """Implements `unlock.providers.Provider`. Owns the secrets in its settings and wipes them when closed.

    Threads take turns. Connects at the first request. Raises Malformed for a certificate, key or password that cannot
    be used.
    """

    def __init__(
        self,
        settings: KmipSettings,
        *,
        clock: Callable[[], float] = time.monotonic,
        random: Callable[[], float] = _random.random,
    ) -> None:
        self.id = settings.id
        self._settings = settings
        begins, self._certificate_ends = validity(settings.certificate)
        _check_password(settings.password)
        context = client_context(ca=settings.ca, certificate=settings.certificate, key=settings.key)
        context.hostname_checks_common_name = settings.common_name
        credential = Credential(settings.username, settings.password) if settings.username else None
        servers = [
            Server(each, context, credential, timeout=settings.timeout, clock=clock, random=random)
            for each in settings.endpoints
        ]
        self._failover = Failover(servers, clock=clock, certificate_begins=begins)
        self._capabilities: Capabilities | None = None

    def __enter__(self) -> "KmipProvider":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        self._failover.close()
        self._settings.key.wipe()
        if self._settings.password:
            self._settings.password.wipe()

    def capabilities(self) -> Capabilities:
        if self._capabilities is None:
            self._capabilities = self._failover.read(key_operations.query_capabilities)
        return self._capabilities

    def offers(self) -> Offers | None:
        rekey = self.capabilities().rekey
        version = next((server.version for server in self._failover.servers if server.version), None)
        return Offers(version, rekey) if version else None

    def health(self) -> Health:
        return Health(
            tuple(map(self._endpoint_health, self._failover.servers)),
            int((self._certificate_ends - time.time()) // 86400),
        )

    def _endpoint_health(self, server: Server) -> EndpointHealth:
        try:
            self._failover.ask(server, key_operations.try_connection)
        except ProviderError as error:
            return EndpointHealth(str(server.endpoint), "", error)
        version = f"KMIP {server.version[0]}.{server.version[1]}" if server.version else ""
        return EndpointHealth(str(server.endpoint), version, None)

    def resolve(self, refs: Sequence[Ref]) -> list[KeyStatus]:
        statuses: list[KeyStatus] = []
        for at in range(0, len(refs), KEYS_PER_REQUEST):
            statuses += self._resolve(refs[at : at + KEYS_PER_REQUEST])
        return statuses

    def _resolve(self, refs: Sequence[Ref]) -> list[KeyStatus]:
        """The statuses from one endpoint, and from the others where it lags or fails to say."""
        statuses_of = partial(key_operations.key_statuses, ready=USABLE)
        first, statuses = self._failover.read(lambda server: (server, statuses_of(server, refs)))
        for server in self._failover.others(first):
            missing = [at for at, status in enumerate(statuses) if _may_be_known_elsewhere(status)]
            if not missing:
                break
            try:
                again = self._failover.ask(server, partial(statuses_of, refs=[refs[at] for at in missing]))
            except ProviderError:
                continue
            for at, status in zip(missing, again, strict=True):
                if not _may_be_known_elsewhere(status):
                    statuses[at] = status
        return statuses

    def fetch(self, key_id: str, states: frozenset[str] = USABLE, prove: Callable[[Secret], None] = no_proof) -> Secret:
        return self._failover.read(lambda server: key_operations.fetch_key(server, key_id, states, prove))

    def _name(self, name: str) -> str:
        return plain_name(name) if self._settings.plain_names else name

    def locate(self, name: str) -> Ref | None:
        name = self._name(name)
        return self._failover.read(lambda server: key_operations.find_key(server, name))

    def create(self, name: str) -> Ref:
        name = self._name(name)
        return self._failover.change(
            lambda server: key_operations.find_key(server, name),
            lambda server: key_operations.create_key(server, name),
        )

    def activate(self, key_id: str) -> None:
        self._failover.read(lambda server: key_operations.activate_key(server, key_id), final=())

    def rotate(self, ref: Ref, name: str) -> Ref:
        name = self._name(name)
        rekey = self.capabilities().rekey
        new = self._failover.change(
            lambda server: key_operations.find_replacement(server, ref, name),
            lambda server: key_operations.replace_key(server, ref, name, rekey=rekey),
        )
        self.activate(new.id)
        return new

    def rotate_unasked(self, ref: Ref, name: str) -> tuple[Ref, Secret | None]:
        offers, name = self._settings.offers, self._name(name)
        if offers and (not offers.rekey or self._is_in_use(ref)):
            made = self._failover.change_unasked(
                lambda server: key_operations.make_key_at_once(server, ref, name, offers.version, rekey=offers.rekey)
            )
            if made:
                if not made.active:
                    self._activate_made(made)
                return made.ref, made.key
        return self.rotate(ref, name), None

    def _activate_made(self, made: key_operations.MadeKey) -> None:
        try:
            self.activate(made.ref.id)
        except BaseException:
            if made.key:
                made.key.wipe()
            raise

    def _is_in_use(self, ref: Ref) -> bool:
        """Whether a Re-key of the key makes the first replacement of it, and an active one."""
        [status] = self.resolve([ref])
        return not status.changed and status.problem is None and status.state in USABLE

    def retire(self, key_id: str) -> None:
        try:
            self._failover.read(lambda server: key_operations.deactivate_key(server, key_id), final=())
        except NotFoundOrDenied:
            if not all(self._has_no(server, key_id) for server in self._failover.servers):
                raise
            log.note(f"the key manager does not have the replaced key {printable(key_id)} any more")

    def _has_no(self, server: Server, key_id: str) -> bool:
        """Whether this endpoint answers, and says that there is no such key."""
        try:
            return not server.breaker.is_open() and self._failover.ask(
                server, lambda server: key_operations.is_unknown(server, key_id)
            )
        except ProviderError:
            return False


def plain_name(name: str) -> str:
    """The name of a key in at most 64 of A-Z a-z 0-9 . _ -; another one for each name of `keys.access.key_name`."""
    plain = name.replace("/", "-")
    if len(plain) <= PLAIN_NAME_MAX:
        return plain
    head, _, generation = name.rpartition("/")
    digest = hashlib.sha256(head.encode()).hexdigest()
    return f"{plain[: PLAIN_NAME_MAX - 24]}.{digest[:12]}-{generation}"


def _may_be_known_elsewhere(status: KeyStatus) -> bool:
    """Whether another endpoint may know better. Two keys with one name are at all of them."""
    return not status.found or (status.problem is not None and not isinstance(status.problem, Integrity))


def _check_password(password: Secret | None) -> None:
    """Raises Malformed for a password that is not ASCII: servers differ in how they read one in UTF-8."""
    if password and not password.value.isascii():
        raise Malformed("the key manager's password is not ASCII", "give the client one of ASCII characters")
