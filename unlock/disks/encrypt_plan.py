# SPDX-License-Identifier: Apache-2.0
"""What a header may say while its disk is encrypted in place. Pure JSON, for `reencrypt_plan`.

The data was in clear from the first byte on, and moves up by SHIFT, from its end to its start; its first SHIFT bytes
were moved to the end of the disk before the header took their place:

    header, SHIFT │ second part, in clear ... │ free, SHIFT │ first part, in clear, SHIFT          start
    header, SHIFT │ ... in clear │ (free) encrypted ...     │ first part, in clear, SHIFT          moving
    header, SHIFT │ encrypted ...                           │ nothing that counts, SHIFT           whole

So the disk has `clear` + 2 * SHIFT bytes. A part in clear is at the one place that the plan gives it, and no header of
another plan may have any. The boundary alone cannot be bound, as with every re-encryption: who moves it lets a part be
written in clear, until the end of this one; the disk is told to be in clear as long.
"""

from ..light import Any
from ..strictjson import canonical
from .segments import Found, backup_numbers, is_backup, need, need_move, regular_numbers, without

SHIFT = 16 << 20
"""Bytes of the header and its keyslots, and of a step."""
RESERVED = 2 * SHIFT
"""Bytes at the end of the disk that the data does not need."""
FACTS = {"mode": "encrypt", "direction": "backward", "shift": SHIFT}
"""What the token binds besides the last segment and the size of the data."""

_MOVED, _PREVIOUS, _FINAL = "backup-moved-segment", "backup-previous", "backup-final"


def examine(segments: dict[int, Any], moves: list[Any], clear: int) -> Found:
    """Raises DoesNotFit; KeyError and others for what is no metadata. `moves`: keyslots of another type than `luks2`.
    The caller checks which digest covers what."""
    area = need_move(moves, "encrypt", "backward")
    need(clear > SHIFT and area["type"] == "datashift" and area["shift_size"] == str(SHIFT), "mode")
    first, before, after = backup_numbers(segments, _MOVED, _PREVIOUS, _FINAL)
    _need_linear(segments[first], [_MOVED], clear + SHIFT, SHIFT)
    _need_linear(segments[before], [_PREVIOUS], 0, clear)
    segment = without(segments[after], "flags")
    need((int(segment["offset"]), segment["size"], int(segment["iv_tweak"])) == (SHIFT, "dynamic", 0), "its end")
    regular = regular_numbers(segments)
    if canonical(segments[0]) == canonical(segment):
        need(len(regular) == 1, "segments after the whole")
        return Found(segment, [0, after], is_crashed=False, is_whole=True)
    encrypted, hot = _walk([segments[number] for number in regular], segment, clear)
    return Found(segment, [*encrypted, after], is_crashed=hot, is_whole=False)


def _walk(regular: list[Any], segment: Any, clear: int) -> tuple[list[int], bool]:
    """The numbers of the encrypted segments, and whether one of them is a hotzone. In order of the data: the first part
    in clear, the second, at most one hotzone, all that is encrypted."""
    at = 0
    encrypted: list[int] = []
    hot = False
    for number, each in enumerate(regular):
        size = int(each["size"])
        need(size > 0, "a segment's size")
        if each["type"] == "linear":
            need(not encrypted and number < 2 and (at == 0 or at == SHIFT), "a part in clear after others")
            _need_linear(each, None, clear + SHIFT if at == 0 else at, SHIFT if at == 0 else size)
        else:
            flags = each.get("flags", [])
            need(flags in ([], ["in-reencryption"]) and not (flags and encrypted), "a hotzone")
            need(not (flags and size > SHIFT), "a hotzone's size")
            hot = hot or bool(flags)
            place = {"offset": str(SHIFT + at), "size": each["size"], "iv_tweak": str(at // 512)}
            need(canonical(without(each, "flags")) == canonical({**segment, **place}), "an encrypted segment")
            encrypted.append(number)
        at += size
    need(at == clear and len(encrypted) <= 1 + hot, "the size of the data")
    need(bool(encrypted) or len(regular) == 2, "nothing is encrypted, and a part is missing")
    return encrypted, hot


def _need_linear(segment: Any, flags: list[str] | None, offset: int, size: int) -> None:
    wanted: dict[str, Any] = {"type": "linear", "offset": str(offset), "size": str(size)}
    need(canonical(segment) == canonical({**wanted, "flags": flags} if flags else wanted), "a part in clear")


def all_encrypted(segments: dict[int, Any]) -> list[Any]:
    """The segments when the last hotzone of a header that fits has been recovered."""
    first, before, after = backup_numbers(segments, _MOVED, _PREVIOUS, _FINAL)
    return [without(segments[after], "flags"), segments[before], segments[after], segments[first]]


def bytes_done(segments: dict[int, Any], clear: int) -> int:
    """Bytes of the data that are encrypted."""
    regular = [each for each in segments.values() if not is_backup(each)]
    if any(each["size"] == "dynamic" for each in regular):
        return clear
    return sum(int(each["size"]) for each in regular if each["type"] == "crypt" and "flags" not in each)
