# SPDX-License-Identifier: Apache-2.0
"""The policy record and the sealed payload: round trips, vectors, and hostile bytes."""

from hashlib import sha256
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from unlock.errors import Malformed, NewerFormat, Usage
from unlock.secret import Secret
from unlock.tpm import pcr_policy, public_area
from unlock.tpm.record import MAX_SEALED, NEEDS_MAX, RECORD_SIZE, SLOTS, Needs, Payload, Record

names = st.binary(min_size=32, max_size=32).map(lambda digest: b"\0\x0b" + digest)
needs = st.sets(st.text(), max_size=14).map(Needs.of)
records = st.builds(
    Record,
    generation=st.integers(1, 1 << 63),
    host=st.binary(min_size=16, max_size=16),
    selection=st.sets(st.integers(0, 15)).map(pcr_policy.select),
    cap=st.just(pcr_policy.CAP_PCR),
    branches=st.lists(st.binary(min_size=32, max_size=32), min_size=1, max_size=8).map(tuple),
    srk_name=names,
    object_name=names,
    pin=st.booleans(),
    needs=needs,
)
RECORD = Record(7, b"h" * 16, (4, 7, 9, 15), 15, (b"1" * 32, b"2" * 32), b"\0\x0b" + b"s" * 32, b"\0\x0b" + b"o" * 32)


def resealed(data: bytes, at: int, new: bytes) -> bytes:
    """`data` changed, with a checksum that fits."""
    body = bytearray(data[:-32])
    body[at : at + len(new)] = new
    return bytes(body) + sha256(body).digest()


@given(records)
def test_a_record_reads_back(record: Record) -> None:
    data = record.encode()
    assert len(data) == RECORD_SIZE
    assert Record.decode(data) == record


@given(st.binary(max_size=600) | st.binary(min_size=448, max_size=448))
def test_any_bytes_are_refused(data: bytes) -> None:
    with pytest.raises(Malformed):
        Record.decode(data)


@given(records, st.integers(0, 415), st.binary(min_size=1, max_size=40))
def test_a_well_summed_record_is_canonical_or_refused(record: Record, at: int, new: bytes) -> None:
    data = resealed(record.encode(), at, new[: 416 - at])
    try:
        assert Record.decode(data).encode() == data
    except Malformed:
        pass


@given(records, st.integers(0, 8 * 448 - 1))
def test_a_flipped_bit_is_found(record: Record, bit: int) -> None:
    data = bytearray(record.encode())
    data[bit // 8] ^= 1 << bit % 8
    with pytest.raises(Malformed):
        Record.decode(bytes(data))


@given(records, st.integers(0, 447))
def test_a_torn_write_is_found(record: Record, size: int) -> None:
    with pytest.raises(Malformed):
        Record.decode(record.encode()[:size])
    if any(record.encode()[size:]):
        with pytest.raises(Malformed):
            Record.decode(record.encode()[:size].ljust(448, b"\0"))


def test_a_newer_record_is_named_as_such() -> None:
    with pytest.raises(NewerFormat):
        Record.decode(resealed(RECORD.encode(), 7, b"\x03"))
    with pytest.raises(Malformed) as refused:
        Record.decode(resealed(RECORD.encode(), 7, b"\0"))
    assert refused.value.code == "malformed"


@pytest.mark.parametrize(
    "change",
    [
        {"generation": 0},
        {"generation": (1 << 63) + 1},
        {"host": b"short"},
        {"selection": (4, 7)},
        {"selection": (15, 4)},
        {"selection": (4, 15, 16)},
        {"selection": (15, 23)},
        {"selection": ()},
        {"cap": 14},
        {"cap": 0},
        {"branches": ()},
        {"branches": (b"1" * 32,) * 9},
        {"branches": (b"1" * 31,)},
        {"srk_name": b"\0\x0c" + b"s" * 32},
        {"object_name": b""},
    ],
)
def test_a_record_out_of_range_is_not_written(change: dict[str, Any]) -> None:
    with pytest.raises(Malformed):
        RECORD._replace(**change).encode()


def test_the_format_is_frozen() -> None:
    """Version 1, byte for byte: an installed initramfs must read what is written today."""
    data = RECORD.encode()
    assert data[:40].hex() == "756e6c6f636b00010000000000000007" + "68" * 16 + "0f02908200000000"
    assert data[40:108] == RECORD.srk_name + RECORD.object_name
    assert data[108:172] == b"1" * 32 + b"2" * 32
    assert data[172:416] == bytes(244)
    assert data[416:] == sha256(data[:416]).digest()


@pytest.mark.parametrize("pcr", [16, 17, 23, 24, -1])
def test_pcrs_that_software_resets_are_refused(pcr: int) -> None:
    with pytest.raises(Usage):
        pcr_policy.select([4, pcr])


def test_a_selection_has_the_cap_once_and_is_sorted() -> None:
    assert pcr_policy.select([9, 4, 9]) == (4, 9, 15)
    assert pcr_policy.select([15]) == (15,)
    assert pcr_policy.select([4], cap=8) == (4, 8)


def test_a_branch_counts_the_cap_as_reset() -> None:
    values = {4: b"4" * 32, 15: b"extended" * 4}
    assert pcr_policy.branch((4, 15), values) == pcr_policy.policy_pcr((4, 15), {**values, 15: bytes(32)})
    assert pcr_policy.branch((4, 15), {4: b"4" * 32}) == pcr_policy.branch((4, 15), values)
    assert pcr_policy.branch((4, 15), values) != pcr_policy.branch((4, 15), {4: b"5" * 32})


def test_one_branch_is_listed_twice_and_nine_are_too_many() -> None:
    assert pcr_policy.alternatives([b"a"]) == (b"a", b"a")
    assert pcr_policy.policy_or([b"a" * 32]) == pcr_policy.policy_or([b"a" * 32, b"a" * 32])
    for branches in ([], [b"a" * 32] * 9):
        with pytest.raises(Usage):
            pcr_policy.policy_or(branches)


@given(st.booleans(), needs)
def test_a_payload_reads_back(accepted: bool, needed: Needs) -> None:
    payload = Payload(Secret.random(32), accepted, needed)
    assert len(payload.encode()) <= MAX_SEALED
    assert Payload.decode(payload.encode()) == payload


@pytest.mark.parametrize(
    "data",
    [
        *(b"", b"\x01", b"\0" * 83, b"\x01\0" + b"k" * 32, b"\x01\0" + b"\0" * 80, b"\x01\0" + b"\0" * 82),
        *(b"\x01\0" + b"k" * 32 + rest.ljust(49, b"\0") for rest in (b"\x0d", b"\2aaaaaaaa", b"\2bbbbaaaa", b"\0a")),
        b"\x01" * 129,
    ],
)
def test_a_foreign_payload_is_refused(data: bytes) -> None:
    with pytest.raises(Malformed):
        Payload.decode(Secret(data))


@given(st.lists(st.text(), max_size=14), st.text())
def test_what_the_root_needs_is_what_was_named_and_too_many_are_everything(names: list[str], other: str) -> None:
    found = Needs.decode(Needs.of(names).encode())
    assert all(map(found.covers, names))
    assert bool(found) == bool(names)
    assert found.every == (len(set(names)) > NEEDS_MAX)
    assert found.every or other in names or not found.covers(other)


@given(st.binary(max_size=140))
def test_hostile_payloads(data: bytes) -> None:
    try:
        assert bytes(Payload.decode(Secret(data)).encode()) == data
    except Malformed:
        pass


@pytest.mark.parametrize("data", [b"\x02\0" + b"k" * 32, b"\x01\x02" + b"k" * 32])
def test_a_newer_payload_is_named_as_such(data: bytes) -> None:
    with pytest.raises(NewerFormat):
        Payload.decode(Secret(data))


def test_a_payload_never_shows_its_key() -> None:
    assert "kkkk" not in repr(Payload(Secret(b"k" * 32)))


@given(st.binary(max_size=200))
def test_storage_problem_survives_any_bytes(public: bytes) -> None:
    assert public_area.srk_problem(public)


def test_handles_are_in_the_owners_range() -> None:
    for slot in SLOTS:
        assert 0x81000000 <= slot.object <= 0x817FFFFF
        assert 0x01800000 <= slot.nv <= 0x01BFFFFF
