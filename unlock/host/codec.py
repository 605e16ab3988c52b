# SPDX-License-Identifier: Apache-2.0
"""Reads records from parsed JSON and makes JSON values of them: the only place where state.json is untyped.

A record is a NamedTuple; its JSON object has the record's fields, in the record's order. The annotations are the
format: str, int, bool, None, Literal, list, tuple, dict[str, X], other records, and unions of those. In a union of
records, the Literal fields tell which record it is. A field with a default may be missing from the JSON. A field whose
default is None is left out of the JSON while it is None.
"""

from functools import cache
from types import NoneType, UnionType
from typing import Any, Literal, TypeVar, Union, get_args, get_origin, get_type_hints

from ..errors import Malformed

Record = TypeVar("Record")


def decode(record: type[Record], value: object) -> Record:
    """The record in a JSON value. Raises Malformed that names the field, RecursionError. Other fields are ignored."""
    found: Record = _decode(record, value, "")
    return found


def encode(value: object) -> Any:
    """A JSON value of a record, or of a list, tuple or dict that holds records."""
    kind: Any = type(value)
    if _is_record(kind):
        omitted = {name for name, default in _defaults(kind).items() if default is None}
        values = {name: getattr(value, name) for name in _fields(kind)}
        return {name: encode(each) for name, each in values.items() if each is not None or name not in omitted}
    if isinstance(value, dict):
        return {key: encode(each) for key, each in value.items()}
    if isinstance(value, list | tuple):
        return [encode(each) for each in value]
    return value


def _decode(kind: Any, value: Any, where: str) -> Any:
    origin, arguments = get_origin(kind), get_args(kind)
    if origin in (Union, UnionType):
        return _decode(_alternative(arguments, value, where), value, where)
    if origin is Literal:
        return _checked(value in arguments, value, where, f"one of {', '.join(map(repr, arguments))}")
    if origin in (list, tuple):
        _checked(type(value) is list, value, where, "a list")
        return origin(_decode(each, item, f"{where}[{i}]") for i, (each, item) in _items(arguments, value, where))
    if origin is dict:
        _checked(type(value) is dict, value, where, "an object")
        return {key: _decode(arguments[1], each, f"{where}.{key}") for key, each in value.items()}
    if _is_record(kind):
        return _decode_record(kind, _checked(type(value) is dict, value, where, "an object"), where)
    return _checked(type(value) is kind, value, where, f"of type {kind.__name__}")


def _items(arguments: tuple[Any, ...], value: list[Any], where: str) -> Any:
    """Each item's place, type and value: of `list[X]`, `tuple[X, ...]`, or a tuple of so many."""
    if len(arguments) == 1 or arguments[1] is Ellipsis:
        return enumerate((arguments[0], item) for item in value)
    _checked(len(value) == len(arguments), value, where, f"a list of {len(arguments)}")
    return enumerate(zip(arguments, value, strict=True))


def _decode_record(record: Any, value: dict[str, Any], where: str) -> Any:
    defaults = _defaults(record)
    found = {}
    for name, kind in _fields(record).items():
        place = f"{where}.{name}" if where else name
        if name in value:
            found[name] = _decode(kind, value[name], place)
        elif name not in defaults:
            raise Malformed(f"{place} is missing")
    return record(**found)


def _alternative(kinds: tuple[Any, ...], value: Any, where: str) -> Any:
    """Which type of a union the value is of; the first that is no record where none fits, whose check then fails."""
    if value is None and NoneType in kinds:
        return NoneType
    records = [each for each in kinds if _is_record(each)]
    for record in records:
        literals = {name: get_args(kind) for name, kind in _fields(record).items() if get_origin(kind) is Literal}
        if type(value) is dict and all(value.get(name) in values for name, values in literals.items()):
            return record
    others = [each for each in kinds if each is not NoneType and each not in records]
    _checked(bool(others), value, where, "of a known kind")
    return others[0]


def _checked(fits: bool, value: Any, where: str, what: str) -> Any:
    """The value. Raises Malformed where it does not fit; never says what the value is: it may be a secret's wrap."""
    if not fits:
        raise Malformed(f"{where or 'its content'} is not {what}")
    return value


def _is_record(kind: Any) -> bool:
    return isinstance(kind, type) and issubclass(kind, tuple) and hasattr(kind, "_fields")


@cache
def _fields(record: Any) -> dict[str, Any]:
    """Field -> its type."""
    return get_type_hints(record)


def _defaults(record: Any) -> dict[str, Any]:
    found: dict[str, Any] = getattr(record, "_field_defaults", {})
    return found
