# SPDX-License-Identifier: Apache-2.0
"""The stand-ins for `typing` and `json` say what the originals say."""

import json
import typing

import pytest
from hypothesis import given
from hypothesis import strategies as st

from unlock import light, strictjson


class Ours(light.NamedTuple):
    """With a default, a method and a property."""

    name: str
    size: int = 4
    """Bytes."""

    @property
    def double(self) -> int:
        return 2 * self.size

    def plus(self, more: int) -> "Ours":
        return self._replace(size=self.size + more)


class Theirs(typing.NamedTuple):
    name: str
    size: int = 4


@pytest.mark.parametrize("kind", [Ours, Theirs])
def test_a_named_tuple_is_a_tuple_with_names(kind: typing.Any) -> None:
    one = kind("a", 5)
    assert one == ("a", 5) and (one.name, one.size, len(one)) == ("a", 5, 2)
    assert kind("a") == kind(name="a") == kind("a", size=4) == ("a", 4)
    assert one._replace(size=6) == ("a", 6) and one._asdict() == {"name": "a", "size": 5}
    assert repr(one) == f"{kind.__name__}(name='a', size=5)"
    assert hash(one) == hash(("a", 5)) and kind._fields == ("name", "size")
    for wrong in ((), ("a", 1, 2)):
        with pytest.raises(TypeError):
            kind(*wrong)
    with pytest.raises(TypeError):
        kind("a", length=3)
    with pytest.raises(AttributeError):
        one.size = 7
    with pytest.raises(AttributeError):
        one.other = 7


def test_methods_and_properties_stay() -> None:
    assert Ours("a").double == 8
    assert Ours("a").plus(2) == ("a", 6)
    assert Ours.__doc__ == "With a default, a method and a property."


values = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-(10**18), 10**18)
    | st.text()
    | st.floats(allow_nan=False, allow_infinity=False),
    lambda inner: st.lists(inner) | st.dictionaries(st.text(), inner),
)


@given(values)
def test_json_is_that_of_the_standard_library(value: object) -> None:
    text = strictjson.canonical(value)
    assert text == json.dumps(value, sort_keys=True, separators=(",", ":")).encode()
    assert strictjson.parse(text.decode()) == value
    assert strictjson.indented(value) == json.dumps(value, indent=1)
    assert strictjson.parse(f"\n {json.dumps(value, indent=2)} \t") == value


@pytest.mark.parametrize(
    "text",
    ["", " ", "{", "[1,]", '{"a":1,"a":2}', "NaN", "[Infinity]", "1e999", "1" * 21, "{} {}", "nul", "'a'", '"\n"'],
)
def test_what_is_no_json_or_says_a_thing_twice_is_refused(text: str) -> None:
    with pytest.raises(ValueError):
        strictjson.parse(text)


def test_what_nests_without_end_is_refused() -> None:
    with pytest.raises((ValueError, RecursionError)):
        strictjson.parse("[" * 100_000)


def test_no_number_that_is_none_is_written() -> None:
    with pytest.raises(ValueError):
        strictjson.canonical({"a": float("nan")})
    with pytest.raises(TypeError):
        strictjson.canonical({"a": b"bytes"})
