# SPDX-License-Identifier: Apache-2.0
"""What a header may say while unlock re-encrypts its disk: the plan in the token, and the phases of the header.

The library moves the boundary between new and old data thousands of times; the plan stays. A header fits it when it is
one that a run of ours can leave, and only then do the keys in the token unwrap: a re-encryption that somebody else
began, or that was put into the header (CVE-2021-4122), does not fit. Pure JSON: the LUKS2 On-Disk Format Specification
1.1.2, sections 3 (metadata) and 5 (re-encryption).

    old       nothing has moved; the new volume key has keyslots, and covers no data
    moving    new segment, old segment; the library's requirement is set
    crash     the same, with a hotzone between them: only a recovery says which of its sectors are new
    whole     all data is new; the requirement is still set
    new       finished; the old volume key may still have keyslots

That is of one volume key to another. Where a disk is encrypted or decrypted in place, there is one volume key, and the
old or the new data is in clear (encrypt_plan, decrypt_plan): the first has no `old`, the other no `new`.

Two headers that a run leaves cannot be told from forged ones: a moved boundary, and `new` too early. Who writes such a
one makes data unreadable, as he could by overwriting it. Between two volume keys nothing is read or written in clear
then. In place it would be: so the recovery key opens such a header only while the journal has the operation
(boot.gate), and the persistence key is replaced at the end.
"""

from hashlib import sha256

from ..errors import Malformed, Tampered
from ..light import Any, NamedTuple
from ..strictjson import canonical
from .header import Header
from .segments import (
    DoesNotFit,
    Found,
    backup_numbers,
    is_backup,
    need,
    need_move,
    need_resilience,
    regular_numbers,
    without,
)

REQUIREMENT = "online-reencrypt-v2"
OLD, MOVING, CRASH, WHOLE, NEW = "old", "moving", "crash", "whole", "new"

_MOVED = ("offset", "size", "iv_tweak", "flags")
"""Fields of a segment that change while the data moves."""
_BEFORE, _AFTER = "backup-previous", "backup-final"

NO_DIGEST = -1
"""Of data in clear."""


class Plan(NamedTuple):
    """One re-encryption, as the token has it. The segment of the encrypted disk is one and the same before and after;
    only the volume key changes, or there is none before (`clear`) or after (`decrypts`)."""

    old: int
    """Number of the digest of the old volume key; NO_DIGEST."""
    old_facts: str
    """SHA-256, in hex, of that digest without its lists."""
    new: int
    """NO_DIGEST for a disk that is decrypted."""
    new_facts: str
    old_keyslot: int
    """The operation key's keyslot for the old volume key."""
    new_keyslot: int
    clear: int = 0
    """Bytes of data in clear, of a disk that is encrypted in place (encrypt_plan): there is no old volume key then."""

    @property
    def decrypts(self) -> bool:
        """The data will be in clear (decrypt_plan). Both keyslots are one then."""
        return self.new == NO_DIGEST

    @property
    def leaves_clear(self) -> bool:
        """A part of the data is in clear on the way."""
        return bool(self.clear) or self.decrypts

    @property
    def digests(self) -> list[Any]:
        """As in the token."""
        new = None if self.decrypts else [self.new, self.new_facts]
        return [self.clear or [self.old, self.old_facts], new]

    @property
    def keyslots(self) -> list[int]:
        """As in the token."""
        return [self.old_keyslot, self.new_keyslot]


def digest_facts(digest: Any) -> str:
    """What identifies a volume key by its digest: SHA-256 in hex."""
    return sha256(
        canonical({name: digest[name] for name in digest if name not in ("keyslots", "segments")})
    ).hexdigest()


def plan_facts(header: Header, plan: Plan) -> dict[str, Any]:
    """The facts of a header that fits the plan; they are the same in every phase. Raises Tampered, Malformed."""
    header.refuse_open_keyslots()
    _, segment = _examine(header.metadata, plan, header.device)
    return {
        "uuid": header.uuid,
        "segment": segment,
        "flags": header.metadata["config"].get("flags"),
        "reencrypt": _mode(plan),
    }


def _mode(plan: Plan) -> dict[str, Any]:
    from . import decrypt_plan, encrypt_plan  # only where a disk is re-encrypted

    if plan.decrypts:
        return decrypt_plan.FACTS
    return encrypt_plan.FACTS if plan.clear else {"mode": "reencrypt", "direction": "forward"}


def phase(header: Header, plan: Plan) -> str:
    """One of the five. Raises Tampered when the header does not fit the plan, Malformed."""
    return _examine(header.metadata, plan, header.device)[0]


def phase_of(metadata: dict[str, Any], plan: Plan, device: str) -> str:
    """The same of metadata that was read from the disk itself."""
    return _examine(metadata, plan, device)[0]


def is_moving(header: Header, plan: Plan) -> bool:
    """Whether the data is under two volume keys, or in part in clear, or the header still says so."""
    return phase(header, plan) in (MOVING, CRASH, WHOLE)


def _examine(metadata: dict[str, Any], plan: Plan, device: str) -> tuple[str, Any]:
    """The phase, and the segment as it was and will be."""
    try:
        return _phase_and_segment(metadata, plan)
    except DoesNotFit as error:
        raise Tampered(f"{device}: its header is not that of the re-encryption in its token: {error}") from error
    except (KeyError, TypeError, ValueError, AttributeError, IndexError) as error:
        raise Malformed(f"{device}: the LUKS2 metadata is not as the specification says") from error


def _phase_and_segment(metadata: dict[str, Any], plan: Plan) -> tuple[str, Any]:
    from . import decrypt_plan, encrypt_plan

    segments = {int(number): fields for number, fields in metadata["segments"].items()}
    covers = {int(number): set(fields["segments"]) for number, fields in metadata["digests"].items()}
    moves = [fields for fields in metadata["keyslots"].values() if fields["type"] not in ("luks2",)]
    for number, known in (plan.old, plan.old_facts), (plan.new, plan.new_facts):
        found = metadata["digests"].get(str(number))
        need(found is None or digest_facts(found) == known, f"digest {number}")
    need(all(not covered for number, covered in covers.items() if number not in (plan.old, plan.new)), "other digest")
    requirements = metadata["config"].get("requirements")
    if not requirements:
        return _at_rest(segments, covers, moves, plan)
    need(canonical(requirements) == canonical({"mandatory": [REQUIREMENT]}), "requirements")
    if plan.clear:
        return _in_place(encrypt_plan.examine(segments, moves, plan.clear), covers.get(plan.new))
    if plan.decrypts:
        return _in_place(decrypt_plan.examine(segments, moves), covers.get(plan.old))
    need_resilience(need_move(moves, "reencrypt", "forward"))
    return _under_way(segments, covers, plan)


def _in_place(found: Found, covered: set[str] | None) -> tuple[str, Any]:
    """`covered`: segments of the one volume key."""
    _need_crypt(found.segment)
    need(covered == set(map(str, found.encrypted)), "a digest's segments")
    return CRASH if found.is_crashed else WHOLE if found.is_whole else MOVING, found.segment


def _at_rest(segments: dict[int, Any], covers: dict[int, set[str]], moves: list[Any], plan: Plan) -> tuple[str, Any]:
    need(not moves, "a keyslot of a re-encryption")
    need(list(segments) == [0] and "flags" not in segments[0], "segments")
    _need_crypt(segments[0])
    for number, name in (plan.old, OLD), (plan.new, NEW):
        if covers.get(number) == {"0"}:
            need(all(not covered for other, covered in covers.items() if other != number), "two digests")
            return name, segments[0]
    raise DoesNotFit("the digest of the data")


def _under_way(segments: dict[int, Any], covers: dict[int, set[str]], plan: Plan) -> tuple[str, Any]:
    """Segments in order of the data: all new, at most one of both, all old; then a backup of each kind."""
    before, after = backup_numbers(segments, _BEFORE, _AFTER)
    segment = without(segments[before], "flags")
    need(canonical(segment) == canonical(without(segments[after], "flags")), "another cipher")
    _need_crypt(segment)
    regular = regular_numbers(segments)
    need(len(regular) <= 3, "number of segments")
    expected = {plan.old: {str(before)}, plan.new: {str(after)}}
    at = start = int(segment["offset"])
    part = NEW
    for number in regular:
        each = segments[number]
        need(canonical(without(each, *_MOVED)) == canonical(without(segment, *_MOVED)), "a segment's cipher")
        need(int(each["offset"]) == at, "a segment's place")
        need(int(each["iv_tweak"]) == int(segment["iv_tweak"]) + (at - start) // 512, "a segment's IV")
        keys = {digest for digest, covered in covers.items() if str(number) in covered}
        if "flags" in each:
            need(each["flags"] == ["in-reencryption"] and keys == {plan.old, plan.new} and part == NEW, "a hotzone")
            part = CRASH
        elif keys == {plan.new}:
            need(part == NEW, "new data after old")
        else:
            need(keys == {plan.old} and part != OLD, "a segment's digest")
            part = OLD
        for digest in keys:
            expected[digest].add(str(number))
        if each["size"] == "dynamic":
            need(number == regular[-1] and segment["size"] == "dynamic", "a segment's size")
        else:
            at += int(each["size"])
            # libcryptsetup gives the last part in figures when it is a hotzone, and after a recovery
            ends = segment["size"] in ("dynamic", str(at - start))
            need(number != regular[-1] or ends, "a segment's size")
    for digest, covered in covers.items():
        need(covered == expected.get(digest, set()), "a digest's segments")
    need(plan.old in covers and plan.new in covers, "digests")
    if any("flags" in segments[number] for number in regular):
        return CRASH, segment
    return WHOLE if covers[plan.old] == {str(before)} else MOVING, segment


def _need_crypt(segment: Any) -> None:
    need(segment["type"] == "crypt" and "null" not in segment["encryption"], "data that is not encrypted")


def parts(metadata: dict[str, Any], plan: Plan) -> list[tuple[int, Any]]:
    """The segments of the data in order, each with the digest of its volume key; of a hotzone, the new one."""
    segments = {int(number): each for number, each in metadata["segments"].items()}
    if plan.decrypts:
        new = {number for number, each in segments.items() if each["type"] == "linear"}
    else:
        new = {int(number) for number in metadata["digests"][str(plan.new)]["segments"]}
    regular = sorted(number for number, each in segments.items() if not is_backup(each))
    return [(plan.new if number in new else plan.old, segments[number]) for number in regular]


# What a header becomes where libcryptsetup does not write it


def without_hotzone(metadata: dict[str, Any], plan: Plan) -> dict[str, Any]:
    """The `moving` header before a `crash` one: its hotzone is old data again."""
    segments = {int(number): each for number, each in metadata["segments"].items()}
    before, after = backup_numbers(segments, _BEFORE, _AFTER)
    regular = [segments[number] for number in sorted(segments.keys() - {before, after})]
    hot = next(each for each in regular if "flags" in each)
    moved = regular[: regular.index(hot)]
    left = segments[before]["size"]
    if left != "dynamic":
        left = str(int(left) - sum(int(each["size"]) for each in moved))
    rest = {
        **without(segments[before], "flags"),
        "offset": hot["offset"],
        "iv_tweak": str(
            int(segments[before]["iv_tweak"]) + (int(hot["offset"]) - int(segments[before]["offset"])) // 512
        ),
        "size": left,
    }
    count = len(moved)
    covered = {plan.old: [count, count + 1], plan.new: [*range(count), count + 2]}
    return _with_segments(metadata, [*moved, rest, segments[before], segments[after]], covered)


def all_new(metadata: dict[str, Any], plan: Plan) -> dict[str, Any]:
    """The `whole` header after a `crash` one whose hotzone was the last and has been recovered."""
    from . import encrypt_plan

    segments = {int(number): each for number, each in metadata["segments"].items()}
    if plan.clear:
        return _with_segments(metadata, encrypt_plan.all_encrypted(segments), {plan.new: [0, 2]})
    before, after = backup_numbers(segments, _BEFORE, _AFTER)
    parts = [without(segments[after], "flags"), segments[before], segments[after]]
    return _with_segments(metadata, parts, {plan.old: [1], plan.new: [0, 2]})


def finished(metadata: dict[str, Any], plan: Plan) -> dict[str, Any]:
    """The header after a `whole` one: nothing but deletions. The old volume key keeps its keyslots."""
    moves = {number for number, each in metadata["keyslots"].items() if each["type"] == "reencrypt"}
    after = next(each for each in metadata["segments"].values() if each.get("flags") == ["backup-final"])
    ended = _with_segments(metadata, [without(after, "flags")], {plan.new: [0]})
    digests = {
        number: {**each, "keyslots": [slot for slot in each["keyslots"] if slot not in moves]}
        for number, each in ended["digests"].items()
    }
    return {
        **ended,
        "keyslots": {number: each for number, each in metadata["keyslots"].items() if number not in moves},
        "digests": {number: each for number, each in digests.items() if each["segments"] or each["keyslots"]},
        "config": {name: value for name, value in metadata["config"].items() if name != "requirements"},
    }


def _with_segments(metadata: dict[str, Any], segments: list[Any], covered: dict[int, list[int]]) -> dict[str, Any]:
    """The same with these segments, numbered in order, and by digest the segments that it covers."""
    return {
        **metadata,
        "segments": {str(number): each for number, each in enumerate(segments)},
        "digests": {
            number: {**each, "segments": [str(segment) for segment in covered.get(int(number), [])]}
            for number, each in metadata["digests"].items()
        },
    }
