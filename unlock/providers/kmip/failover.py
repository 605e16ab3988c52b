# SPDX-License-Identifier: Apache-2.0
"""Which endpoint of a key manager is asked, and which error is raised when all of them fail; for `provider`.

read:    first endpoint whose breaker is closed ──> the result
             └── any failure: the next endpoint
change:  read whether it is done already ──> if not: sent once, to that endpoint
             └── that endpoint refuses it, a read-only replica perhaps: the same with the next endpoint
"""

import threading
import time
from collections.abc import Callable, Iterator, Sequence
from typing import TypeVar

from ...errors import (
    ClientAuth,
    ClockWrong,
    Integrity,
    NotFoundOrDenied,
    PeerUntrusted,
    ProviderError,
    ProviderProtocol,
    ProviderUnavailable,
    StateBlocked,
    Unsupported,
)
from .failures import AmbiguousKeys
from .server import Server
from .ttlv import MalformedAnswer

T = TypeVar("T")

_WORST_FIRST = (
    Integrity,
    PeerUntrusted,
    ClientAuth,
    ClockWrong,
    NotFoundOrDenied,
    StateBlocked,
    ProviderProtocol,
    Unsupported,
    ProviderUnavailable,
)
"""Of several endpoints' errors the first of these is raised: what most needs a person."""


_FINAL = (StateBlocked, AmbiguousKeys)
"""After these answers to a question no other endpoint is asked: it would say the same."""


class Failover:
    """The endpoints in the configured order. Threads take turns.

    `certificate_begins`: when this host's certificate becomes valid, in seconds since 1970.
    """

    def __init__(self, servers: Sequence[Server], *, clock: Callable[[], float], certificate_begins: float) -> None:
        self.servers = servers
        self._clock = clock
        self._certificate_begins = certificate_begins
        self._turn = threading.Lock()

    def close(self) -> None:
        for server in self.servers:
            server.drop()

    def read(self, work: Callable[[Server], T], final: tuple[type[ProviderError], ...] = _FINAL) -> T:
        """`work`, which may be repeated, with the first endpoint that can do it. Raises the worst of their errors, or
        at once one of `final`."""
        failures = []
        for server in self._in_order():
            if server.breaker.is_open():
                failures.append(server.breaker.cause or ProviderUnavailable(f"{server.endpoint}: not asked"))
                continue
            try:
                return self.ask(server, work)
            except final:
                raise
            except ProviderError as error:
                failures.append(error)
        raise self._worst(failures)

    def change(self, find_done: Callable[[Server], T | None], make: Callable[[Server], T]) -> T:
        """`make`, done once, and never when `find_done` finds it done: the answer to an earlier one may have been lost.
        Only an endpoint's own refusal, which says that nothing was done, is a reason to send it to another."""
        server, found = self.read(lambda server: (server, find_done(server)))
        if found is not None:
            return found
        try:
            return self.ask(server, make)
        except ProviderError as error:
            if not _is_definite(server, error):
                raise
            failures = [error]
        for other in self.others(server):
            try:
                found = self.ask(other, find_done)
            except ProviderError as error:
                failures.append(error)
                continue
            if found is not None:
                return found
            try:
                return self.ask(other, make)
            except ProviderError as error:
                failures.append(error)
                if not _is_definite(other, error):
                    break
        raise failures[0] if len(failures) == 1 else self._worst(failures)

    def change_unasked(self, make: Callable[[Server], T | None]) -> T | None:
        """`make`, once, at the first endpoint that takes a connection: for what was never asked for before. None where
        no endpoint takes one."""
        for server in self._in_order():
            if server.breaker.is_open():
                continue
            try:
                self.ask(server, Server.connect)
            except ProviderError:
                continue
            return self.ask(server, make)
        return None

    def others(self, asked: Server) -> Iterator[Server]:
        """All other endpoints that may be asked now."""
        for server in self._in_order():
            if server is not asked and not server.breaker.is_open():
                yield server

    def ask(self, server: Server, work: Callable[[Server], T]) -> T:
        """`work` with this endpoint, and with no other. Raises ProviderError."""
        with self._turn:
            return self._ask(server, work)

    def _ask(self, server: Server, work: Callable[[Server], T]) -> T:
        server.begin_call()
        try:
            result = work(server)
        except MalformedAnswer as malformed:
            error = server.error(ProviderProtocol, str(malformed))
            server.record_failure(error)
            raise error from malformed
        except ClientAuth as refused:
            error = refused
            if time.time() < self._certificate_begins:
                error = server.error(ClockWrong, "the client certificate is not valid yet")
            server.record_failure(error)
            raise error from refused
        except ProviderError as error:
            server.record_failure(error)
            raise
        server.breaker.record_success()
        return result

    def _in_order(self) -> list[Server]:
        """The connected one first, then as configured."""
        return sorted(self.servers, key=lambda server: not server.connected)

    def _worst(self, failures: list[ProviderError]) -> ProviderError:
        """One error for all, with the messages of all, and with the time until an endpoint may be asked again."""
        if not failures:
            return ProviderUnavailable("the provider has no endpoint", "add one in unlock.toml")
        worst = min(
            failures, key=lambda error: next(at for at, kind in enumerate(_WORST_FIRST) if isinstance(error, kind))
        )
        error = type(worst)("; ".join(dict.fromkeys(map(str, failures))), worst.hint)
        error.retry_after = max(0.0, min(server.breaker.open_until for server in self.servers) - self._clock())
        return error


def _is_definite(server: Server, error: ProviderError) -> bool:
    """Whether the server has said that it did not do what it was asked, and another endpoint may do it."""
    return server.has_refused(error) and not isinstance(error, ProviderUnavailable | ClientAuth)
