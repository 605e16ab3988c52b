# SPDX-License-Identifier: Apache-2.0
"""The JSON of a report in /run/unlock (docs/formats.md): writes it, and checks all that it reads.

A report comes from an earlier stage of this boot, which may have another version of unlock. A report with a value of
the wrong type is refused as a whole.
"""

from ..errors import Malformed
from ..light import Any
from .report import BootEvent, BootFacts, DiskRow, GroupRow, Report

VERSION = 1


def read(path: str) -> Report:
    """A report that an earlier stage of this boot wrote. Raises OSError, Malformed."""
    with open(path, "rb") as file:
        return decode(file.read(), path)


def encode(record: Report) -> bytes:
    """The file's content."""
    from .. import strictjson  # not before the TPM works

    return strictjson.indented(to_json(record)).encode()


def to_json(record: Report) -> dict[str, Any]:
    """The file's content as plain values."""
    return {
        "version": VERSION,
        "phase": record.phase,
        "verdict": record.verdict,
        "detail": record.detail,
        "disks": [_disk_to_json(each) for each in record.disks.values()],
        "groups": [_group_to_json(each) for each in record.groups.values()],
        "facts": facts_to_json(record.facts),
        "events": record.events,
    }


def facts_to_json(facts: BootFacts) -> dict[str, Any]:
    """Those that are known."""
    return {name: value for name, value in facts._asdict().items() if value is not None}


def _disk_to_json(row: DiskRow) -> dict[str, Any]:
    texts = {"node": row.node, "uuid": row.uuid, "name": row.name, "group": row.group}
    found: dict[str, Any] = {name: text for name, text in texts.items() if text}
    if row.seen is not None:
        found["seen"] = row.seen
    found |= {"outcome": row.outcome, "detail": row.detail}
    if row.opened is not None:
        found["opened"] = row.opened
    return found


def _group_to_json(row: GroupRow) -> dict[str, Any]:
    counts = {"present": row.present, "members": row.members}
    found: dict[str, Any] = {"name": row.name, **{name: count for name, count in counts.items() if count is not None}}
    if row.mappings:
        found["mappings"] = list(row.mappings)
    more = {"kind": row.kind, "generation": row.generation}
    found |= {name: value for name, value in more.items() if value is not None}
    return {**found, "outcome": row.outcome}


def decode(text: bytes, path: str) -> Report:
    """The report in a file's content; `path` is for the message.

    Raises Malformed unless every value that is used has its type. Unknown fields and words are ignored.
    """
    from .. import strictjson

    try:
        fields = strictjson.parse(text.decode())
        if not isinstance(fields, dict) or fields.get("version") != VERSION:
            raise ValueError("it has no known version")
        return _decode_fields(fields)
    except (ValueError, RecursionError) as error:
        raise Malformed(f"{path} is not a report: {error}") from error


def _decode_fields(fields: dict[str, Any]) -> Report:
    record = Report(_text(fields, "phase"))
    record.verdict, record.detail = _text(fields, "verdict"), _text(fields, "detail")
    for each in _list(fields, "disks"):
        row = DiskRow(
            node=_text(each, "node"),
            outcome=_text(each, "outcome"),
            detail=_text(each, "detail"),
            uuid=_text(each, "uuid", ""),
            name=_text(each, "name", ""),
            group=_text(each, "group", ""),
            seen=_optional(each, "seen", float),
            opened=_optional(each, "opened", float),
        )
        record.disks[row.node] = row
    for each in _list(fields, "groups"):
        group = GroupRow(
            name=_text(each, "name"),
            outcome=_text(each, "outcome"),
            present=_optional(each, "present", int),
            members=_optional(each, "members", int),
            mappings=tuple(_check_text(name) for name in _list(each, "mappings", [])),
            kind=_optional(each, "kind", str),
            generation=_optional(each, "generation", int),
        )
        record.groups[group.name] = group
    facts = fields.get("facts")
    record.facts = BootFacts(
        slot=_optional(facts, "slot", str),
        generation=_optional(facts, "generation", int),
        unauthenticated_root=_optional(facts, "unauthenticated_root", bool),
        pin=_optional(facts, "pin", bool),
        cap_pcr_before=_optional(facts, "cap_pcr_before", str),
        opened_from_provider=_optional(facts, "opened_from_provider", str),
    )
    record.events = [_decode_event(each) for each in _list(fields, "events")]
    return record


def _decode_event(fields: Any) -> BootEvent:
    if not isinstance(fields, list) or len(fields) != 3 or type(fields[0]) not in (int, float):
        raise ValueError("an event is not a time and two texts")
    event = BootEvent(float(fields[0]), _check_text(fields[1]), _check_text(fields[2]))
    if event.kind in ("disk", "group") and len(event.text.split()) < 2:
        raise ValueError(f"an event of a {event.kind} does not name it and its outcome")
    return event


def _text(fields: Any, name: str, default: object = None) -> str:
    if not isinstance(fields, dict):
        raise ValueError("a row is not an object")
    try:
        return _check_text(fields.get(name, default))
    except ValueError:
        raise ValueError(f"{name} is not a text") from None


def _check_text(value: object) -> str:
    if not isinstance(value, str):
        raise ValueError("not a text")
    value.encode()  # raises a ValueError for what no terminal takes
    return value


def _list(fields: Any, name: str, default: object = None) -> list[Any]:
    found = fields.get(name, default)
    if not isinstance(found, list):
        raise ValueError(f"{name} is not a list")
    return found


def _optional(fields: Any, name: str, kind: type) -> Any:
    """None if it is absent or null."""
    if not isinstance(fields, dict):
        raise ValueError("a row is not an object")
    value = fields.get(name)
    if kind is float and type(value) is int:
        return float(value)
    if value is not None and type(value) is not kind:
        raise ValueError(f"{name} is not of type {kind.__name__}")
    return value if kind is not str or value is None else _check_text(value)
