# SPDX-License-Identifier: Apache-2.0
"""The token's form: what is read is what was written, and nothing else is read."""

import copy
import json
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from unlock.disks import token
from unlock.errors import Malformed, NewerFormat
from unlock.strictjson import canonical

GOOD = token.Token(
    host="ab" * 16,
    group="data",
    members=3,
    manifest=2,
    name="data-a",
    serial="S3RIAL",
    kek_id="native-00/kek/data",
    kek_generation=1,
    kek=bytes(60),
    dek=bytes(92),
    host_key=bytes(60),
    mac=bytes(32),
)


def test_what_is_written_is_what_is_read_and_always_of_one_size() -> None:
    long = GOOD._replace(group="g" * 64, name="n" * 64, serial="s" * 128, manifest=token.GENERATION_MAX)
    for each in (GOOD, long):
        fields = token.encode(each)
        assert len(canonical(fields)) == token.SIZE
        assert token.decode(json.loads(canonical(fields))) == each


def test_a_later_format_is_told_from_a_broken_one() -> None:
    with pytest.raises(NewerFormat):
        token.decode({**token.encode(GOOD), "version": 3, "news": True})


def test_a_token_is_of_the_oldest_format_that_says_it() -> None:
    """An initramfs of an earlier unlock reads format 1 alone."""
    degraded = GOOD._replace(degraded=True)
    assert token.encode(GOOD)["version"] == 1 and "degraded" not in token.encode(GOOD)
    assert token.encode(degraded)["version"] == 2
    assert len(canonical(token.encode(degraded))) == token.SIZE
    assert token.decode(json.loads(canonical(token.encode(degraded)))) == degraded
    assert token.dek_aad(degraded, {}) != token.dek_aad(GOOD, {})
    assert token.mac_data(degraded, {}) != token.mac_data(GOOD, {})


@pytest.mark.parametrize("changes", [{"degraded": False}, {"degraded": 1}, {"reencrypt": {}}, {"version": 1}])
def test_a_later_format_without_what_it_is_for_is_malformed(changes: dict[str, Any]) -> None:
    with pytest.raises(Malformed):
        token.decode({**token.encode(GOOD._replace(degraded=True)), **changes})


@pytest.mark.parametrize("field", sorted(token.encode(GOOD)))
@pytest.mark.parametrize("value", [None, True, -1, 2**80, 1.5, "", "\x00", "é", "x" * 5000, [], {}, [[]]])
def test_a_field_of_another_kind_is_malformed(field: str, value: Any) -> None:
    fields = {**token.encode(GOOD), field: value}
    if fields == token.encode(GOOD) or (field, value) in (("serial", ""), ("pad", "")) or field == "pad":
        return
    with pytest.raises(Malformed):
        token.decode(fields)


@pytest.mark.parametrize("field", sorted(token.encode(GOOD)))
def test_a_missing_field_is_malformed(field: str) -> None:
    fields = token.encode(GOOD)
    del fields[field]
    with pytest.raises(Malformed):
        token.decode(fields)


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3),
    max_leaves=8,
)


@given(st.sampled_from(sorted(token.encode(GOOD))), json_values)
def test_no_value_gets_anything_but_a_token_or_a_typed_error(field: str, value: Any) -> None:
    fields = copy.deepcopy(token.encode(GOOD))
    fields[field] = value
    try:
        token.decode(fields)
    except Malformed as error:
        assert len(str(error)) < 200
