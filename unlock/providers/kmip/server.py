# SPDX-License-Identifier: Apache-2.0
"""One endpoint of a key manager: its connection, the KMIP version that it speaks, and how much it takes at a time.

ask(items) ──> as many requests as the server needs ──> exchange ──> send on the open or a new connection
                                                          └── negotiates a version where ours is refused
"""

import os
import ssl
from collections.abc import Callable, Sequence

from ...endpoint import Endpoint
from ...errors import (
    ClientAuth,
    NotFoundOrDenied,
    PeerUntrusted,
    ProviderError,
    ProviderProtocol,
    ProviderUnavailable,
    StateBlocked,
    Unsupported,
)
from . import requests
from .answers import NO_COMMON_VERSION, RequestRefused, ResponseItem, match_answers
from .breaker import Breaker
from .failures import HUNG_UP, WRONG_PASSWORD, AmbiguousKeys, UnusableId, connection_error, provider_error
from .protocol import NO_SUCH_KEY, VERSIONS, Tag
from .requests import Credential, RequestItem
from .tls import ConnectionEnded, Deadline, TlsConnection, UnusableServerName
from .ttlv import parse

KEYS_PER_REQUEST = 50
_ITEMS_PER_REQUEST = 2 * KEYS_PER_REQUEST
"""Two items for each key: its attributes, and the keys that have its name."""
_EXCHANGES = 6
"""One call may take this many times the timeout at one endpoint, whatever it needs to know."""


class Server:
    """Not for several threads at once. `timeout`: seconds for one exchange: name, connection, TLS, whole answer."""

    def __init__(
        self,
        endpoint: Endpoint,
        context: ssl.SSLContext,
        credential: Credential | None,
        *,
        timeout: float,
        clock: Callable[[], float],
        random: Callable[[], float],
    ) -> None:
        self.endpoint = endpoint
        self.breaker = Breaker(clock=clock, random=random)
        self.version: tuple[int, int] | None = None
        """The KMIP version that it speaks; None before the first answer."""
        self._context = context
        self._credential = credential
        self._timeout = timeout
        self._clock = clock
        self._connection: TlsConnection | None = None
        self._call_ends = 0.0
        self._items_per_request = _ITEMS_PER_REQUEST
        self._item_problems: list[ProviderError] = []
        """Errors that it reported for single items since `begin_call`: the endpoint itself works."""
        self._refusals: list[ProviderError] = []
        """Errors that it reported for whole requests since `begin_call`."""

    @property
    def connected(self) -> bool:
        return self._connection is not None

    def drop(self) -> None:
        """Closes the connection, if there is one."""
        if self._connection:
            self._connection.close()
            self._connection = None

    def begin_call(self) -> None:
        """Starts the time for all exchanges of one call."""
        self._call_ends = self._clock() + _EXCHANGES * self._timeout
        self._item_problems.clear()
        self._refusals.clear()

    def has_refused(self, error: ProviderError) -> bool:
        """Whether the server itself reported this error in the present call: then it has not done what it was asked."""
        return any(error is each for each in (*self._item_problems, *self._refusals))

    def record_failure(self, error: ProviderError) -> None:
        """Drops the connection and lets the endpoint rest, unless the error is about a key and not the endpoint."""
        if isinstance(error, NotFoundOrDenied | StateBlocked | Unsupported | AmbiguousKeys | UnusableId):
            return
        if any(error is each for each in self._item_problems):
            return
        self.drop()
        self.breaker.record_failure(error)

    def error(self, kind: type[ProviderError], what: str) -> ProviderError:
        """An error about this endpoint, not raised."""
        return provider_error(self.endpoint, kind, what)

    def ask(self, items: Sequence[RequestItem]) -> list[ResponseItem]:
        """One answer an item, in that order; one request, if the server takes that many items.

        Items that the server does not understand are asked once more without details. Raises ProviderError and
        MalformedAnswer, for the whole exchange.
        """
        return self._ask(items, may_repeat=True)

    def ask_once(self, item: RequestItem) -> ResponseItem:
        """The answer to a change, which is sent once: whether it was carried out is unknown when no answer comes.

        Raises ProviderError, also the one that the answer reports, and MalformedAnswer.
        """
        [answer] = self._ask([item], may_repeat=False)
        answer.checked_payload()
        return answer

    def connect(self) -> None:
        """A new connection, on which nothing has been asked yet."""
        self.drop()
        self._open(Deadline(self._clock, min(self._timeout, self._call_ends - self._clock())))

    def ask_in_turn(self, items: Sequence[RequestItem], version: tuple[int, int]) -> list[ResponseItem]:
        """The answers to changes of which each follows from the one before: one request, sent once, in a version that
        the server is known to speak. None comes for what follows a failure.

        Raises ProviderError, also when the first item or the whole is refused, and MalformedAnswer.
        """
        deadline = Deadline(self._clock, min(self._timeout, self._call_ends - self._clock()))
        try:
            return self._send(items, self.version or version, deadline, in_turn=True)
        except ConnectionEnded as ended:
            self.drop()
            raise self.error(ProviderUnavailable, str(ended)) from ended
        except RequestRefused as refused:
            self._refusals.append(refused.error)
            raise refused.error from refused

    def _ask(self, items: Sequence[RequestItem], *, may_repeat: bool) -> list[ResponseItem]:
        answers = self._ask_in_parts(items, may_repeat=may_repeat)
        plain = {
            at: RequestItem(item.operation, item.plain_payload)
            for at, item in enumerate(items)
            if item.plain_payload is not None and _may_be_about_details(answers[at])
        }
        again = self._ask_in_parts(list(plain.values()), may_repeat=may_repeat)
        for at, answer in zip(plain, again, strict=True):
            if not answer.problem:
                answers[at] = answer
        return answers

    def _ask_in_parts(self, items: Sequence[RequestItem], *, may_repeat: bool) -> list[ResponseItem]:
        answers: list[ResponseItem] = []
        while len(answers) < len(items):
            part = items[len(answers) : len(answers) + self._items_per_request]
            try:
                answers += self._exchange(part, may_repeat=may_repeat)
            except RequestRefused as refused:
                if len(part) == 1:
                    self._refusals.append(refused.error)
                    raise refused.error from refused
                self._items_per_request = len(part) // 2
        return answers

    def _exchange(self, items: Sequence[RequestItem], *, may_repeat: bool) -> list[ResponseItem]:
        """The answers to one request; it is sent again on a new connection, or in another version, where it may be."""
        deadline = Deadline(self._clock, min(self._timeout, self._call_ends - self._clock()))
        if not may_repeat:
            self.drop()  # the server may have closed it, which would look as if it did not answer
        fresh = not self.connected
        try:
            return self._send(items, self.version or VERSIONS[0], deadline)
        except ConnectionEnded as ended:
            self.drop()
            if not may_repeat or (fresh and self.version):
                raise self.error(ProviderUnavailable, str(ended)) from ended
            hung_up = fresh
        except RequestRefused:
            if not may_repeat or self.version:
                raise
            hung_up = False
        if not self.version:
            self._negotiate(deadline, hung_up=hung_up)
        try:
            return self._send(items, self.version or VERSIONS[0], deadline)
        except ConnectionEnded as ended:
            raise self.error(ProviderUnavailable, str(ended)) from ended

    def _negotiate(self, deadline: Deadline, *, hung_up: bool) -> None:
        """Finds the best version that the server speaks, for one that does not take our best version. `hung_up`: it
        closed the connection after that question."""
        problem = self.error(Unsupported, NO_COMMON_VERSION)
        for version in VERSIONS[1:]:
            self.drop()
            try:
                [answer] = self._send([requests.discover_versions()], version, deadline)
            except ConnectionEnded as ended:
                problem = self.error(ProviderUnavailable, str(ended))
                continue
            except RequestRefused as refused:
                problem, hung_up = refused.error, False
                continue
            items = answer.payload.all(Tag.PROTOCOL_VERSION) if answer.payload else []
            offered = {
                (item.number(Tag.PROTOCOL_VERSION_MAJOR), item.number(Tag.PROTOCOL_VERSION_MINOR)) for item in items
            }
            self.version = next((each for each in VERSIONS if each in offered), version)
            return
        if hung_up:
            raise ProviderProtocol(f"{self.endpoint}: the server closes each connection after the question", HUNG_UP)
        raise problem

    def _open(self, deadline: Deadline) -> TlsConnection:
        """The connection, which is made where there is none."""
        if self._connection is None:
            try:
                self._connection = TlsConnection(self.endpoint, self._context, deadline)
            except UnusableServerName as error:
                raise self.error(PeerUntrusted, str(error)) from error
            except OSError as error:
                raise self._connection_error(error) from error
        return self._connection

    def _connection_error(self, error: OSError) -> ProviderError:
        common_name = self._context.hostname_checks_common_name
        return connection_error(self.endpoint, error, timeout=self._timeout, common_name=common_name)

    def _send(
        self, items: Sequence[RequestItem], version: tuple[int, int], deadline: Deadline, *, in_turn: bool = False
    ) -> list[ResponseItem]:
        """Sends one request and reads its answer. Batch ids are random: an answer to another request never fits."""
        batch_ids = [os.urandom(8) for _ in items]
        request = requests.encode(items, batch_ids, version, self._credential, in_turn=in_turn)
        connection = self._open(deadline)
        try:
            with connection.exchange(request, deadline) as raw:
                [message] = parse(memoryview(raw.value))
        except OSError as error:
            raise self._connection_error(error) from error
        try:
            answers = match_answers(message, items, batch_ids, self.endpoint)
        except RequestRefused as refused:
            if not (refused.about_client and self._credential):
                raise
            raise ClientAuth(str(refused.error), WRONG_PASSWORD) from refused
        except ClientAuth as error:
            error.hint = WRONG_PASSWORD if self._credential else error.hint
            raise
        self._item_problems += [answer.problem for answer in answers if answer.problem]
        self.version = version
        return answers


def _may_be_about_details(answer: ResponseItem) -> bool:
    """Whether a server may take the same request without details. Item Not Found may be said of an attribute."""
    return isinstance(answer.problem, Unsupported | ProviderProtocol) or (
        answer.problem is not None and answer.reason in NO_SUCH_KEY
    )
