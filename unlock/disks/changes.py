# SPDX-License-Identifier: Apache-2.0
"""What differs between the facts of a disk's header as this host wrote or checked it, and as it is now."""

from collections.abc import Iterator
from typing import Any

from ..errors import Tampered
from ..strictjson import canonical
from .header import Header

_SHOWN = 100
"""Characters of one value."""


def describe_changes(before: Any, now: Any) -> list[str]:
    """A text for each value of `Header.facts` that differs, with its place. Printable, whatever is in a header."""
    return list(_differences(before, now, ""))


def require_unchanged(header: Header, checked: dict[str, Any]) -> None:
    """Raises Tampered, code `changed-header`, unless the facts of a header are still those that were checked. A disk
    may answer otherwise the second time, and a token is for whatever was read last."""
    now = header.facts()
    if canonical(now) != canonical(checked):
        raise Tampered(
            f"{header.device}: its header was changed meanwhile: {'; '.join(describe_changes(checked, now))}",
            "type the same command again",
            "changed-header",
        )


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
