# SPDX-License-Identifier: Apache-2.0
"""What differs between the facts of a disk's header as this host wrote it, and as it is now. Pure."""

from collections.abc import Iterator
from typing import Any

from ..strictjson import canonical

_SHOWN = 100
"""Characters of one value."""


def describe_changes(before: Any, now: Any) -> list[str]:
    """A text for each value of `Header.facts` that differs, with its place. Printable, whatever is in a header."""
    return list(_differences(before, now, ""))


def _differences(before: Any, now: Any, where: str) -> Iterator[str]:
    if isinstance(before, dict) and isinstance(now, dict):
        for name in sorted({*before, *now}):
            yield from _differences(before.get(name), now.get(name), f"{where}.{name}" if where else name)
    elif canonical(before) != canonical(now):
        yield f"{_text(where)} was {_text(before)}, is {_text(now)}"


def _text(value: Any) -> str:
    if value is None:
        return "none"
    text = canonical(value).decode()[1:-1] if isinstance(value, str) else canonical(value).decode()
    return text if len(text) <= _SHOWN else f"{text[:_SHOWN]}..."
