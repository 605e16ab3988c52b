# SPDX-License-Identifier: Apache-2.0
"""Which part of an answer belongs to which request item, for `server`: by batch id, operation, count and version.

Servers differ in what they echo. Whatever cannot be assigned without doubt is a MalformedAnswer.
"""

from collections.abc import Sequence
from typing import NamedTuple

from ...endpoint import Endpoint
from ...errors import ClientAuth, NotFoundOrDenied, ProviderError, ProviderProtocol, Unsupported
from ...secret import Secret
from .failures import provider_error, result_error
from .protocol import NO_SUCH_KEY, ResultReason, ResultStatus, Tag
from .requests import RequestItem
from .ttlv import MalformedAnswer, TtlvItem

_CANCELLED = ResultReason.OPERATION_CANCELED_BY_REQUESTER
NO_COMMON_VERSION = "the server speaks no KMIP version of 1.1 to 1.4"


class ResponseItem(NamedTuple):
    """What the server answered to one request item."""

    endpoint: Endpoint
    payload: TtlvItem | None
    problem: ProviderError | None
    reason: int | None = None
    """The Result Reason of the problem, if the server gave one."""

    def checked_payload(self) -> TtlvItem:
        """The payload. Raises the error that the server reported instead, or MalformedAnswer."""
        if self.problem:
            raise self.problem
        if self.payload is None:
            raise MalformedAnswer("success without a payload")
        return self.payload

    def error(self, kind: type[ProviderError], what: str) -> ProviderError:
        """An error about this answer, not raised."""
        return provider_error(self.endpoint, kind, what)

    def wipe(self) -> None:
        if self.payload:
            self.payload.wipe()


class RequestRefused(Exception):
    """The server refused the whole message, not one item of it."""

    def __init__(self, error: ProviderError, *, about_client: bool = False) -> None:
        self.error = error
        self.about_client = about_client
        """It may be the client that is refused: its user name or password."""


def match_answers(
    message: TtlvItem, items: Sequence[RequestItem], batch_ids: Sequence[bytes], endpoint: Endpoint
) -> list[ResponseItem]:
    """The answers in the order of the request items; fewer when the server stopped at a failure.

    Raises MalformedAnswer, RequestRefused, and ClientAuth when the server refuses this client in any item.
    """
    header, batch = message.first(Tag.RESPONSE_HEADER), message.all(Tag.BATCH_ITEM)
    version = header.within(Tag.PROTOCOL_VERSION) if header else None
    if not header or not version:
        raise MalformedAnswer("an answer without a protocol version")
    if header.number(Tag.BATCH_COUNT) != len(batch) or not batch:
        raise MalformedAnswer("the batch count is wrong")
    failed = [item for item in batch if item.number(Tag.RESULT_STATUS)]
    if version.number(Tag.PROTOCOL_VERSION_MAJOR) != 1:
        if len(failed) == len(batch):
            raise RequestRefused(provider_error(endpoint, Unsupported, NO_COMMON_VERSION))
        raise MalformedAnswer("an answer of another protocol version")
    by_id = {_batch_id(item): item for item in batch}
    if len(items) == 1 and by_id.keys() == {b""} and batch[0].first(Tag.OPERATION):
        by_id = {batch_ids[0]: batch[0]}  # the only item needs no id
    if len(batch) == 1 and failed and (len(items) > 1 or not by_id.keys() & set(batch_ids)):
        problem = result_error(endpoint, batch[0])
        if isinstance(problem, ClientAuth):
            raise problem
        about_key = batch[0].number(Tag.RESULT_REASON) in NO_SUCH_KEY
        raise RequestRefused(problem, about_client=isinstance(problem, NotFoundOrDenied) and not about_key)
    if len(items) > 1 and by_id.keys() == {b""}:
        what = "the server does not say which answer is to which question"
        raise RequestRefused(provider_error(endpoint, ProviderProtocol, what))
    if failed and batch[-1] is failed[0] and len(batch) < len(items):  # it stops at a failure, though asked not to
        batch_ids = batch_ids[: len(batch)]
    if by_id.keys() != set(batch_ids) or len(batch) != len(batch_ids):
        raise MalformedAnswer("an answer to another question")
    answers = [_response_item(by_id[each], item, endpoint) for each, item in zip(batch_ids, items, strict=False)]
    return answers[: _first_cancelled(answers)]


def _first_cancelled(answers: Sequence[ResponseItem]) -> int:
    """How many answers come before those that a server marks as cancelled when it stops at a failure. They are asked
    again; the first one is an answer, whatever it says."""
    cancelled = (at for at, each in enumerate(answers) if at and each.reason == _CANCELLED)
    return next(cancelled, len(answers))


def _response_item(found: TtlvItem, item: RequestItem, endpoint: Endpoint) -> ResponseItem:
    failed = found.number(Tag.RESULT_STATUS) != ResultStatus.SUCCESS
    operation = found.number(Tag.OPERATION)
    if operation != item.operation and not (failed and operation is None):
        raise MalformedAnswer("an answer to another operation")
    problem = result_error(endpoint, found) if failed else None
    if isinstance(problem, ClientAuth):
        raise problem
    return ResponseItem(endpoint, found.first(Tag.RESPONSE_PAYLOAD), problem, found.number(Tag.RESULT_REASON))


def _batch_id(item: TtlvItem) -> bytes:
    """b'' when absent."""
    found = item.first(Tag.UNIQUE_BATCH_ITEM_ID)
    return bytes(found.value) if found and isinstance(found.value, Secret) else b""
