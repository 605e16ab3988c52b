# SPDX-License-Identifier: Apache-2.0
"""KMIP as unlock writes and reads it, against PyKMIP: the same bytes, and each decodes what the other has written."""

from collections.abc import Callable, Iterator
from enum import Enum, IntEnum
from typing import Any

import pytest
from kmip.core import attributes, enums, objects, secrets
from kmip.core.enums import AttributeType, CryptographicAlgorithm, CryptographicUsageMask
from kmip.core.factories.attributes import AttributeFactory
from kmip.core.messages import contents, messages, payloads
from kmip.core.utils import BytearrayStream

from tests.lab import kmipliar
from unlock.endpoint import Endpoint
from unlock.errors import NotFoundOrDenied
from unlock.providers import ACTIVE
from unlock.providers.kmip import key_facts, protocol, requests
from unlock.providers.kmip.answers import match_answers
from unlock.providers.kmip.protocol import VERSIONS, Operation
from unlock.providers.kmip.requests import Credential, RequestItem
from unlock.providers.kmip.ttlv import TtlvItem, parse
from unlock.secret import Secret

WORDS = ["k", "1234567", "12345678", "unlock/0f3c/kek/data/1", "x" * 218]
"""Ids and names; 8 bytes need no padding."""

make = AttributeFactory().create_attribute


def identifier(key_id: str) -> attributes.UniqueIdentifier:
    return attributes.UniqueIdentifier(key_id)


def name(text: str) -> Any:
    value = attributes.Name.create(text, enums.NameType.UNINTERPRETED_TEXT_STRING)
    return make(AttributeType.NAME, value)


def new_key(text: str) -> payloads.CreateRequestPayload:
    return create_payload(text, [CryptographicUsageMask.ENCRYPT, CryptographicUsageMask.DECRYPT])


def new_key_for_export(text: str) -> payloads.CreateRequestPayload:
    masks = CryptographicUsageMask
    return create_payload(text, [masks.ENCRYPT, masks.DECRYPT, masks.EXPORT])


def create_payload(text: str, usage: list[CryptographicUsageMask]) -> payloads.CreateRequestPayload:
    wanted = [
        make(AttributeType.CRYPTOGRAPHIC_ALGORITHM, CryptographicAlgorithm.AES),
        make(AttributeType.CRYPTOGRAPHIC_LENGTH, 256),
        make(AttributeType.CRYPTOGRAPHIC_USAGE_MASK, usage),
        name(text),
    ]
    return payloads.CreateRequestPayload(enums.ObjectType.SYMMETRIC_KEY, objects.TemplateAttribute(attributes=wanted))


def revoked(key_id: str) -> payloads.RevokeRequestPayload:
    reason = objects.RevocationReason(enums.RevocationReasonCode.CESSATION_OF_OPERATION)
    return payloads.RevokeRequestPayload(identifier(key_id), reason)


ATTRIBUTES = ["State", "Name", "Link", "Object Type", "Cryptographic Algorithm", "Cryptographic Length"]

REQUESTS: dict[str, tuple[Callable[[str], RequestItem], Callable[[str], Any]]] = {
    "get_attributes": (requests.get_attributes, lambda key: payloads.GetAttributesRequestPayload(key, ATTRIBUTES)),
    "get_attributes, plain": (
        lambda key: plain(requests.get_attributes(key)),
        lambda key: payloads.GetAttributesRequestPayload(key),
    ),
    "get": (requests.get, lambda key: payloads.GetRequestPayload(key, enums.KeyFormatType.RAW)),
    "get, plain": (lambda key: plain(requests.get(key)), lambda key: payloads.GetRequestPayload(key)),
    "locate": (requests.locate, lambda text: payloads.LocateRequestPayload(attributes=[name(text)])),
    "create": (requests.create, new_key_for_export),
    "create, plain": (lambda text: plain(requests.create(text)), new_key),
    "rekey": (requests.rekey, lambda key: payloads.RekeyRequestPayload(key)),
    "activate": (requests.activate, lambda key: payloads.ActivateRequestPayload(identifier(key))),
    "revoke": (requests.revoke, revoked),
    "discover_versions": (
        lambda _: requests.discover_versions(),
        lambda _: payloads.DiscoverVersionsRequestPayload([contents.ProtocolVersion(*each) for each in VERSIONS]),
    ),
    "query_operations": (
        lambda _: requests.query_operations(),
        lambda _: payloads.QueryRequestPayload([enums.QueryFunction.QUERY_OPERATIONS]),
    ),
}
"""Our request, and PyKMIP's payload for the same."""


def plain(item: RequestItem) -> RequestItem:
    assert item.plain_payload is not None
    return RequestItem(item.operation, item.plain_payload)


def pykmip_request(
    batch: list[tuple[Operation, Any]],
    ids: list[bytes],
    version: tuple[int, int],
    user: str,
    password: str | None,
    *,
    in_turn: bool = False,
) -> bytes:
    """The same request as `requests.encode` writes, by PyKMIP's encoder."""
    value = objects.UsernamePasswordCredential(user, password) if user else None
    credential = objects.Credential(enums.CredentialType.USERNAME_AND_PASSWORD, value)
    options = enums.BatchErrorContinuationOption
    header = messages.RequestHeader(
        protocol_version=contents.ProtocolVersion(*version),
        maximum_response_size=contents.MaximumResponseSize(1 << 20),
        authentication=contents.Authentication([credential]) if user else None,
        batch_error_cont_option=contents.BatchErrorContinuationOption(options.STOP if in_turn else options.CONTINUE)
        if len(batch) > 1
        else None,
        batch_order_option=contents.BatchOrderOption(True) if in_turn else None,
        batch_count=contents.BatchCount(len(batch)),
    )
    items = [
        messages.RequestBatchItem(
            contents.Operation(enums.Operation(operation)), contents.UniqueBatchItemID(batch_id), payload
        )
        for (operation, payload), batch_id in zip(batch, ids, strict=True)
    ]
    stream = BytearrayStream()
    messages.RequestMessage(header, items).write(
        stream, contents.protocol_version_to_kmip_version(header.protocol_version)
    )
    return bytes(stream.buffer)


def batch_ids(count: int) -> list[bytes]:
    return [bytes([at]) * 8 for at in range(count)]


def credential_of(user: str, password: str | None) -> Credential | None:
    return Credential(user, Secret(password.encode()) if password else None) if user else None


@pytest.mark.parametrize("word", WORDS, ids=len)
@pytest.mark.parametrize("which", REQUESTS)
def test_a_request_has_the_bytes_that_pykmip_writes(which: str, word: str) -> None:
    ours, theirs = REQUESTS[which]
    item = ours(word)
    for version in VERSIONS:
        written = requests.encode([item], batch_ids(1), version, None)
        assert written == pykmip_request([(item.operation, theirs(word))], batch_ids(1), version, "", None)


@pytest.mark.parametrize(("user", "password"), [("", None), ("host-1", None), ("host-1", 'pass "word"')])
def test_a_batch_of_all_of_them_has_the_bytes_that_pykmip_writes(user: str, password: str | None) -> None:
    items = [ours(word) for word in WORDS for ours, _ in REQUESTS.values()]
    theirs = [payload(word) for word in WORDS for _, payload in REQUESTS.values()]
    ids = batch_ids(len(items))
    written = requests.encode(items, ids, (1, 4), credential_of(user, password))
    batch = [(item.operation, payload) for item, payload in zip(items, theirs, strict=True)]
    assert written == pykmip_request(batch, ids, (1, 4), user, password)


def test_a_key_made_and_read_in_one_request_has_the_bytes_that_pykmip_writes() -> None:
    items = [requests.create("k"), *requests.read_made_key()]
    theirs = [new_key_for_export("k"), payloads.GetAttributesRequestPayload(), payloads.GetRequestPayload()]
    written = requests.encode(items, batch_ids(3), (1, 4), None, in_turn=True)
    batch = [(item.operation, payload) for item, payload in zip(items, theirs, strict=True)]
    assert written == pykmip_request(batch, batch_ids(3), (1, 4), "", None, in_turn=True)


@pytest.mark.parametrize("which", REQUESTS)
def test_pykmip_decodes_what_unlock_writes(which: str) -> None:
    item = REQUESTS[which][0]("key-1")
    written = requests.encode([item], batch_ids(1), (1, 4), credential_of("host-1", "secret"))
    message = messages.RequestMessage()
    message.read(BytearrayStream(written))
    [found] = message.batch_items
    assert found.operation.value.value == item.operation
    assert fields(found.request_payload) == fields(REQUESTS[which][1]("key-1"))
    [credential] = message.request_header.authentication.credentials
    assert (credential.credential_value.username, credential.credential_value.password) == ("host-1", "secret")


def fields(value: Any) -> Any:
    """All that is in one of PyKMIP's objects, as not every class of it can be compared."""
    if isinstance(value, list):
        return [fields(each) for each in value]
    if isinstance(value, Enum) or not hasattr(value, "__dict__"):
        return value
    return {name: fields(each) for name, each in vars(value).items() if name not in ("length", "padding_length")}


@pytest.mark.parametrize("which", REQUESTS)
def test_unlock_and_the_lab_decode_what_pykmip_writes(which: str) -> None:
    item = REQUESTS[which][0]("key-1")
    written = pykmip_request([(item.operation, REQUESTS[which][1]("key-1"))], batch_ids(1), (1, 4), "host-1", "secret")
    assert [as_lab(each) for each in parse(memoryview(written))] == kmipliar.decode(written)


def as_lab(item: TtlvItem) -> tuple[int, Any]:
    """An item in the lab's form: its decoder is another one, so that a mistake does not hide behind itself."""
    value = item.value
    if isinstance(value, list):
        return item.tag, [as_lab(each) for each in value]
    return item.tag, bytes(value) if isinstance(value, Secret) else value


def pykmip_answer(batch: list[tuple[Operation, Any]], ids: list[bytes]) -> TtlvItem:
    """A successful Response Message by PyKMIP's encoder, as unlock reads it."""
    header = messages.ResponseHeader(
        contents.ProtocolVersion(1, 4), contents.TimeStamp(1), contents.BatchCount(len(batch))
    )
    items = [
        messages.ResponseBatchItem(
            operation=contents.Operation(enums.Operation(operation)),
            unique_batch_item_id=contents.UniqueBatchItemID(batch_id),
            result_status=contents.ResultStatus(enums.ResultStatus.SUCCESS),
            response_payload=payload,
        )
        for (operation, payload), batch_id in zip(batch, ids, strict=True)
    ]
    stream = BytearrayStream()
    messages.ResponseMessage(header, items).write(stream)
    [message] = parse(memoryview(bytes(stream.buffer)))
    return message


def test_unlock_reads_what_pykmip_answers() -> None:
    material = bytes(range(32))
    block = objects.KeyBlock(
        key_format_type=objects.KeyFormatType(enums.KeyFormatType.RAW),
        key_value=objects.KeyValue(objects.KeyMaterial(material)),
        cryptographic_algorithm=attributes.CryptographicAlgorithm(CryptographicAlgorithm.AES),
        cryptographic_length=attributes.CryptographicLength(256),
    )
    found = [
        make(AttributeType.STATE, enums.State.ACTIVE),
        make(AttributeType.CRYPTOGRAPHIC_ALGORITHM, CryptographicAlgorithm.AES),
        make(AttributeType.CRYPTOGRAPHIC_LENGTH, 256),
        name("a name"),
    ]
    kind = enums.ObjectType.SYMMETRIC_KEY
    batch: list[tuple[Operation, Any]] = [
        (Operation.GET_ATTRIBUTES, payloads.GetAttributesResponsePayload("key-1", found)),
        (Operation.GET, payloads.GetResponsePayload(kind, "key-1", secrets.SymmetricKey(block))),
        (Operation.LOCATE, payloads.LocateResponsePayload(unique_identifiers=["key-1", "key-2"])),
    ]
    items = [requests.get_attributes("key-1"), requests.get("key-1"), requests.locate("a name")]
    message = pykmip_answer(batch, batch_ids(3))
    facts, key, ids = match_answers(message, items, batch_ids(3), Endpoint("kms"))
    assert key_facts.read_facts(facts, "key-1") == key_facts.KeyFacts(ACTIVE, frozenset({"a name"}), "", "", True)
    assert bytes(key_facts.read_key(key, "key-1")) == material
    assert key_facts.read_ids(ids) == ["key-1", "key-2"]


def enumerations() -> Iterator[tuple[IntEnum, Any]]:
    pairs = [(protocol.Tag, enums.Tags), (Operation, enums.Operation)]
    pairs += [(protocol.ResultStatus, enums.ResultStatus), (protocol.LinkType, enums.LinkType)]
    for ours, theirs in pairs:
        for each in ours:
            yield each, theirs[each.name]


@pytest.mark.parametrize(("ours", "theirs"), list(enumerations()), ids=str)
def test_a_number_of_kmip_is_that_of_pykmip(ours: IntEnum, theirs: Any) -> None:
    assert ours == theirs.value


def test_the_words_for_a_result_reason_are_the_names_of_pykmip() -> None:
    from unlock.providers.kmip.failures import _REASONS

    for reason, (words, _) in _REASONS.items():
        assert enums.ResultReason(reason).name == words.upper().replace(" ", "_")


@pytest.mark.parametrize("ask", [requests.get, requests.get_attributes, requests.activate, requests.revoke])
def test_a_key_without_an_id_is_not_asked_for(ask: Callable[[str], RequestItem]) -> None:
    with pytest.raises(NotFoundOrDenied):
        ask("")
