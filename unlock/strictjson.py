# SPDX-License-Identifier: Apache-2.0
"""Strict JSON for what is authenticated or comes from a disk, by the compiled part of `json`.

The Python part of `json` would import `re` at every boot.
"""

from _json import encode_basestring_ascii, make_encoder, make_scanner

from .light import Any

_BLANKS = " \t\n\r"


def parse(text: str) -> Any:
    """Parses one JSON value. Raises ValueError, also for a repeated name, NaN or a number of more than 20 digits;
    RecursionError."""
    text = text.strip(_BLANKS)
    try:
        value, end = _scan(text, 0)
    except StopIteration:
        raise ValueError("not JSON") from None
    if end != len(text):
        raise ValueError("more than one value")
    return value


def canonical(value: object) -> bytes:
    """The canonical encoding of a JSON value: names sorted, no blanks, ASCII. Raises ValueError for NaN."""
    encode = make_encoder({}, _unknown, encode_basestring_ascii, None, ":", ",", True, False, False)
    return "".join(encode(value, 0)).encode()


def indented(value: Any, margin: str = "\n") -> str:
    """The text of `json.dumps(value, indent=1)`."""
    deeper = f"{margin} "
    if isinstance(value, dict) and value:
        rows = [f"{encode_basestring_ascii(name)}: {indented(each, deeper)}" for name, each in value.items()]
        return "{" + deeper + f",{deeper}".join(rows) + margin + "}"
    if isinstance(value, list | tuple) and value:
        return "[" + deeper + f",{deeper}".join(indented(each, deeper) for each in value) + margin + "]"
    return canonical(value).decode()


def _unknown(value: object) -> object:
    raise TypeError(f"no JSON for {type(value).__name__}")


def _no_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) != len(pairs):
        raise ValueError("a name twice")
    return found


def _bounded(digits: str) -> int:
    if len(digits) > 20:
        raise ValueError("a number too long")
    return int(digits)


def _finite(digits: str) -> float:
    value = float(digits)
    if value - value != 0:
        raise ValueError("not a finite number")
    return value


class _Rules:
    """The attributes that the scanner expects of a json.JSONDecoder."""

    strict = True
    object_hook = None
    object_pairs_hook = staticmethod(_no_duplicates)
    parse_float = parse_constant = staticmethod(_finite)
    parse_int = staticmethod(_bounded)


_scan = make_scanner(_Rules())  # type: ignore[arg-type]
