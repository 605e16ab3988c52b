# SPDX-License-Identifier: Apache-2.0
"""Whether unlock can take in a LUKS2 disk as it is: features of its header, and room for tokens and keyslots.

Fields and limits: the LUKS2 On-Disk Format Specification 1.1; requirements and segments of later versions of
cryptsetup by their names.
"""

from collections.abc import Iterator
from itertools import islice
from typing import Any

from ..errors import Refused
from ..strictjson import canonical
from . import token
from .header import Header

_COPY_DATA = "copy its data to a new group: unlock group create NAME --disk DEV --mount DIR"
_TOKENS_MAX, _KEYSLOTS_MAX = 32, 32
_TOKENS_NEEDED, _KEYSLOTS_NEEDED = 2, 2
"""While one is replaced, the old and the new one are there."""
_KEYSLOT_TEXT = 400
"""Bytes of JSON that a keyslot takes at most."""
_STRIPES, _ALIGNED = 4000, 4096
"""Key material is so many times as long as the key, in areas of whole 4 KiB."""


def check_supported(header: Header, disk_size: int, key_size: int) -> None:
    """Raises Refused for a disk that unlock could not open, or whose data is not encrypted; each with what to type."""
    device, config = header.device, header.metadata["config"]
    segments: dict[str, dict[str, Any]] = header.metadata["segments"]
    for name in _requirements(header):
        _check_requirement(device, name)
    for segment in segments.values():
        _check_segment(device, segment)
    if key_size > token.DEK_MAX:
        raise Refused(f"{device} has a volume key longer than {token.DEK_MAX} bytes", _COPY_DATA, "not-supported")
    areas_end = 2 * (int(config["json_size"]) + 4096) + int(config["keyslots_size"])
    for segment in segments.values():
        start = int(segment["offset"])
        end = start + (1 if segment["size"] == "dynamic" else int(segment["size"]))
        if start < areas_end:
            raise Refused(f"{device} is the detached header of another disk", _COPY_DATA, "not-supported")
        if end > disk_size:
            raise Refused(
                f"{device} ends at byte {disk_size}, before its data at byte {start}: it is the detached header of "
                "another disk, or was cut off",
                f"lsblk --bytes {device}",
                "not-supported",
            )


def _requirements(header: Header) -> list[str]:
    found = header.requirements
    names = found.get("mandatory") if isinstance(found, dict) else found
    return [str(each) for each in names] if isinstance(names, list) else [str(names)] * bool(names)


def _check_requirement(device: str, name: str) -> None:
    if "reencrypt" in name:
        raise Refused(f"{device} is being re-encrypted", f"cryptsetup reencrypt --resume-only {device}", "reencrypting")
    if name.startswith("opal"):
        raise Refused(f"{device} is encrypted by its drive (OPAL)", _COPY_DATA, "not-supported")
    if name.startswith("inline"):
        raise Refused(f"{device} has integrity tags inside its sectors", _COPY_DATA, "not-supported")
    raise Refused(
        f"{device} needs the feature {name[:40]!r}, which unlock does not know",
        f"cryptsetup luksDump {device}",
        "not-supported",
    )


def _check_segment(device: str, segment: dict[str, Any]) -> None:
    kind, cipher = str(segment["type"]), str(segment.get("encryption", ""))
    if kind.startswith("hw-opal"):
        _check_requirement(device, "opal")
    if "integrity" in segment:
        raise Refused(f"{device} has integrity protection", _COPY_DATA, "not-supported")
    if kind != "crypt":
        raise Refused(f"{device} is not encrypted throughout", f"cryptsetup luksDump {device}", "not-encrypted")
    if "null" in cipher:
        raise Refused(
            f"{device} is not encrypted: its cipher is {cipher[:40]}",
            f"cryptsetup reencrypt --cipher aes-xts-plain64 --key-size 512 {device}",
            "not-encrypted",
        )


def check_room(header: Header, key_size: int, host: str, *, has_keyslot: bool) -> None:
    """Raises Refused, with what can be removed, unless the header has room for our tokens and keyslots.

    `has_keyslot`: it has the recovery key's keyslot already.
    """
    ours = sum(fields.get("host") == host for _, fields in header.tokens(token.TYPE))
    _check_room(header, key_size, tokens=max(0, _TOKENS_NEEDED - ours), keyslots=_KEYSLOTS_NEEDED - has_keyslot)


def check_room_for(header: Header, key_size: int, *, keyslots: int) -> None:
    """The same for so many keyslots of a new volume key, a token, and what a re-encryption writes: as much room as two
    more keyslots in the JSON, and one in the area of keyslots, at least."""
    _check_room(header, key_size, tokens=1, keyslots=keyslots + 1, text=_KEYSLOT_TEXT)


def _check_room(header: Header, key_size: int, *, tokens: int, keyslots: int, text: int = 0) -> None:
    config, all_tokens = header.metadata["config"], header.metadata["tokens"]
    if len(all_tokens) + tokens > _TOKENS_MAX:
        raise _no_room(
            header, f"it has {len(all_tokens)} tokens of {_TOKENS_MAX}, and needs room for {tokens}", by_size=False
        )
    if len(header.keyslots()) + keyslots > _KEYSLOTS_MAX or _free_areas(header, key_size) < keyslots:
        hint = _COPY_DATA
        if len(header.keyslots()) > 1:  # never the only one
            slots = ", ".join(map(str, header.keyslots()))
            hint = f"cryptsetup luksKillSlot {header.device} N, N being one that nothing needs: {slots}"
        raise Refused(f"{header.device} has no room for {keyslots} more keyslot{'s' * (keyslots > 1)}", hint, "no-room")
    free = int(config["json_size"]) - 1 - len(canonical(header.metadata))
    needed = tokens * (token.SIZE + 8) + keyslots * _KEYSLOT_TEXT + text
    if free < needed:
        raise _no_room(header, f"{max(0, free)} bytes are free, and {needed} are needed", by_size=True)


def _no_room(header: Header, why: str, *, by_size: bool) -> Refused:
    sizes = [
        (len(canonical(fields)), int(number), str(fields.get("type"))[:20])
        for number, fields in header.metadata["tokens"].items()
        if fields.get("type") != token.TYPE
    ]
    chosen = sorted(sizes, key=lambda each: (-each[0] if by_size else 0, each[1]))[:8]
    names = ", ".join(f"{number} ({kind}, {size} bytes)" for size, number, kind in chosen)
    return Refused(
        f"{header.device} has no room in its header: {why}",
        f"cryptsetup token remove --token-id N {header.device}, N being one that nothing needs: {names}"
        if names
        else _COPY_DATA,
        "no-room",
    )


def _free_areas(header: Header, key_size: int) -> int:
    """How many keyslots for a key of this size have room in the area of keyslots."""
    wanted = _area_size(key_size)
    return sum(len(each) // wanted for each in _gaps(header))


def areas_of_keys(header: Header, key_size: int, *, more: int) -> list[range]:
    """Where on the disk the header is, its keyslots, and so many more for a key of this size, where libcryptsetup would
    put them: in the first room that is large enough. The caller has checked that there is room."""
    wanted = _area_size(key_size)
    places = (start for gap in _gaps(header) for start in range(gap.start, gap.stop - wanted + 1, wanted))
    new = [range(start, start + wanted) for start in islice(places, more)]
    return [range(_areas_start(header)), *_used_areas(header), *new]


def _area_size(key_size: int) -> int:
    return -(-key_size * _STRIPES // _ALIGNED) * _ALIGNED


def _areas_start(header: Header) -> int:
    """Behind both copies of the header."""
    return 2 * (int(header.metadata["config"]["json_size"]) + 4096)


def _used_areas(header: Header) -> list[range]:
    areas = [each["area"] for each in header.metadata["keyslots"].values()]
    return [
        range(start, start + size) for start, size in sorted((int(each["offset"]), int(each["size"])) for each in areas)
    ]


def _gaps(header: Header) -> Iterator[range]:
    """Free parts of the area of keyslots, in order."""
    at = _areas_start(header)
    end = at + int(header.metadata["config"]["keyslots_size"])
    for used in [*_used_areas(header), range(end, end)]:
        if used.start > at:
            yield range(at, used.start)
        at = max(at, used.stop)
