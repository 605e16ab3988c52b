# SPDX-License-Identifier: Apache-2.0
"""Segments and keyslots of a header whose data moves. Pure JSON, for `reencrypt_plan`, `encrypt_plan`, `decrypt_plan`.

While data moves, libcryptsetup keeps in segments with the flag `backup-...` how the data was and will be, and in a
keyslot of the type `reencrypt` how it moves.
"""

from ..light import Any, NamedTuple

RESILIENCE = ("checksum", "journal")
"""Types of the area of such a keyslot, where the data stays at its place."""


class DoesNotFit(Exception):
    """A header that no run of this plan leaves."""


class Found(NamedTuple):
    """A header that fits, of a disk that is encrypted or decrypted in place."""

    segment: Any
    """The one of which all others are parts."""
    encrypted: list[int]
    """Numbers of the segments that the volume key covers."""
    is_crashed: bool
    """It has a hotzone."""
    is_whole: bool
    """All data has moved."""


def need(condition: bool, what: str) -> None:
    """Raises DoesNotFit with `what` unless the condition holds."""
    if not condition:
        raise DoesNotFit(what)


def without(fields: Any, *names: str) -> dict[str, Any]:
    """The same without these."""
    return {name: value for name, value in fields.items() if name not in names}


def is_backup(segment: Any) -> bool:
    """Whether it says how the data was or will be."""
    return any(flag.startswith("backup-") for flag in segment.get("flags", []))


def backup_numbers(segments: dict[int, Any], *flags: str) -> list[int]:
    """Of the segments with these flags, in their order. Raises DoesNotFit unless there are these and no other ones."""
    found = {str(each["flags"]): number for number, each in segments.items() if is_backup(each)}
    wanted = [str([flag]) for flag in flags]
    need(sorted(found) == sorted(wanted) and len(found) == sum(map(is_backup, segments.values())), "backups")
    return [found[each] for each in wanted]


def regular_numbers(segments: dict[int, Any]) -> list[int]:
    """Of the segments that are no backups, in the order of the data. Raises DoesNotFit for gaps between them."""
    found = sorted(number for number, each in segments.items() if not is_backup(each))
    need(found == list(range(len(found))) and bool(found), "number of segments")
    return found


def need_move(moves: list[Any], mode: str, direction: str) -> Any:
    """The area of the keyslot that moves the data. Raises DoesNotFit unless there is one, of this kind. `moves`:
    keyslots of another type than `luks2`."""
    need(len(moves) == 1, "mode")
    kind = moves[0].get("type"), moves[0].get("mode"), moves[0].get("direction")
    need(kind == ("reencrypt", mode, direction), "mode")
    return moves[0]["area"]


def need_resilience(area: Any) -> None:
    """Raises DoesNotFit for data that moves to another place, or without protection."""
    need(area["type"] in RESILIENCE and "shift_size" not in area, "mode")
