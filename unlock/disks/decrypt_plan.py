# SPDX-License-Identifier: Apache-2.0
"""What a header may say while its disk is decrypted in place. Pure JSON, for `reencrypt_plan`.

The data stays where it is, behind the header, and comes out of its encryption from the start to the end:

    header │ encrypted ...                           start
    header │ in clear │ (hotzone) │ encrypted ...    moving
    header │ in clear ...                            whole

A part in clear is a linear segment, for libcryptsetup too; the one digest is that of the volume key. A header is never
`new`: it stays `whole` until it goes. The boundary alone cannot be bound, as with every re-encryption.
"""

from ..light import Any
from ..strictjson import canonical
from .segments import Found, backup_numbers, need, need_move, need_resilience, regular_numbers, without

FACTS = {"mode": "decrypt", "direction": "forward"}
"""What the token binds besides the segment."""

_PREVIOUS, _FINAL, _HOT = "backup-previous", "backup-final", "in-reencryption"


def examine(segments: dict[int, Any], moves: list[Any]) -> Found:
    """Raises DoesNotFit; KeyError and others for what is no metadata. `moves`: keyslots of another type than `luks2`.
    The caller checks which digest covers what."""
    need_resilience(need_move(moves, "decrypt", "forward"))
    previous, last = backup_numbers(segments, _PREVIOUS, _FINAL)
    before, after = segments[previous], segments[last]
    need(before["size"] == "dynamic" and int(before["iv_tweak"]) == 0, "its start")
    segment = without(before, "flags")
    final = {"type": "linear", "offset": segment["offset"], "size": "dynamic", "flags": [_FINAL]}
    need(canonical(after) == canonical(final), "its end")
    regular = regular_numbers(segments)
    need(len(regular) <= 3, "number of segments")
    encrypted, hot = _walk([segments[number] for number in regular], segment)
    whole = not hot and not encrypted
    return Found(segment, [*encrypted, previous], is_crashed=hot, is_whole=whole)


def _walk(regular: list[Any], segment: Any) -> tuple[list[int], bool]:
    """The numbers of the encrypted segments, and whether there is a hotzone. In order of the data: what is in clear, at
    most one hotzone, what is encrypted."""
    at = start = int(segment["offset"])
    encrypted: list[int] = []
    hot = False
    for number, each in enumerate(regular):
        last = number == len(regular) - 1
        need(not encrypted, "data after what is encrypted")
        if each["type"] == "linear":
            flags = each.get("flags", [])
            need(flags in ([], [_HOT]) and not hot and (number == 0 or bool(flags)), "a part in clear")
            like = {"type": "linear", "offset": str(at), "size": each["size"]}
            need(canonical(without(each, "flags")) == canonical(like), "a part in clear")
            need((each["size"] == "dynamic") == (last and not flags), "the size of a part in clear")
            hot = bool(flags)
        else:
            place = {"offset": str(at), "size": each["size"], "iv_tweak": str((at - start) // 512)}
            need(last and canonical(each) == canonical({**segment, **place}), "an encrypted segment")
            encrypted.append(number)
        # libcryptsetup gives the last part in figures after a recovery
        size = 0 if each["size"] == "dynamic" else int(each["size"])
        need(size > 0 or each["size"] == "dynamic", "a segment's size")
        at += size
    return encrypted, hot
