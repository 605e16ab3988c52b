# SPDX-License-Identifier: Apache-2.0
"""Compares what two boots measured: the last good one and this one.

    Items of the baseline, Items of this boot ──compare_boots──> Differences, the first event first

Pure, and linear in the number of events: the log may be hostile.
"""

import re
from collections import Counter, deque
from collections.abc import Iterable, Sequence
from typing import NamedTuple

from . import eventlog
from .describe import Item


class Difference(NamedTuple):
    """One event that differs. `old` is None for an event that is new, `new` for one that is gone."""

    pcr: int
    cause: str
    old: Item | None
    new: Item | None
    place: int
    """Index in the new log: differences are sorted by it."""

    @property
    def moved(self) -> bool:
        """The same events in another order."""
        return self.old is not None and self.new is not None and self.old.digest == self.new.digest


def compare_boots(old: Sequence[Item], new: Sequence[Item], pcrs: Iterable[int]) -> tuple[Difference, ...]:
    """All differences in these PCRs, in the order of the new log. An event that is gone follows the last one before it
    that is still there.

    In each PCR, events with the same digest are the same, wherever they are. Of the rest, an old and a new event with
    the same subject (a variable, a file, a command) make one difference.
    """
    found: list[Difference] = []
    places: dict[int, int] = {}
    wanted = set(pcrs)
    for pcr in sorted(wanted):
        before, now = ([each for each in enumerate(items) if each[1].pcr == pcr] for items in (old, new))
        found += _differences_in_pcr(pcr, before, now, places)
    place = 0
    for at, item in enumerate(old):
        if at in places:
            place = places[at] + 1
        elif item.pcr in wanted:
            found.append(Difference(item.pcr, item.cause, item, None, place))
    return tuple(sorted(found, key=lambda each: each.place))


def _differences_in_pcr(
    pcr: int, old: list[tuple[int, Item]], new: list[tuple[int, Item]], places: dict[int, int]
) -> list[Difference]:
    """The events that are new or changed. Adds old index -> new index of the others to `places`."""
    same = 0
    while same < min(len(old), len(new)) and old[same][1].digest == new[same][1].digest:
        same += 1
    places |= {before: now for (before, _), (now, _) in zip(old[:same], new[:same], strict=True)}
    old, new = old[same:], new[same:]
    before, now = [item for _, item in old], [item for _, item in new]
    gone, came = _unmatched_indices(before, now), _unmatched_indices(now, before)
    common = _without_indices(old, gone), _without_indices(new, came)
    places |= {at: place for (at, _), (place, _) in zip(*common, strict=True)}
    if old and not gone and not came:
        (place, item), (_, was) = new[0], old[0]
        return [Difference(pcr, item.cause, was, item, place)]
    waiting: dict[tuple[object, ...], deque[int]] = {}
    for at in gone:
        waiting.setdefault(_subject(before[at]), deque()).append(at)
    found = []
    for at in came:
        place, item = new[at]
        partner = None
        if partners := waiting.get(_subject(item)):
            replaced, partner = old[partners.popleft()]
            places[replaced] = place
        found.append(Difference(pcr, _cause_of_change(partner, item), partner, item, place))
    return found


def _without_indices(items: list[tuple[int, Item]], left_out: Iterable[int]) -> list[tuple[int, Item]]:
    out = set(left_out)
    return [each for at, each in enumerate(items) if at not in out]


def _unmatched_indices(these: list[Item], others: list[Item]) -> list[int]:
    """Indices in `these` of what `others` lacks; a digest that both have is matched as often as both have it, and first
    where the text is the same: two network cards have one option ROM."""
    exact = Counter((item.digest, item.text) for item in others)
    left = []
    for at, item in enumerate(these):
        if exact[item.digest, item.text]:
            exact[item.digest, item.text] -= 1
        else:
            left.append(at)
    count: Counter[bytes] = Counter()
    for (digest, _), many in exact.items():
        count[digest] += many
    lacking = []
    for at in left:
        if count[these[at].digest]:
            count[these[at].digest] -= 1
        else:
            lacking.append(at)
    return lacking


def _subject(item: Item) -> tuple[object, ...]:
    """What an event is about, without what it says of it."""
    if item.text.startswith("section "):
        return item.kind, item.text
    if item.cause in ("kernel", "initrd", "command-line"):  # a file of a version has another name in the next
        return item.kind, item.cause, item.text.partition(" ")[0]
    if item.kind == eventlog.IPL and item.cause == "boot-loader-config":
        words = [*item.text.split(" "), ""]
        if words[2:3] in (["["], ["test"]):
            return item.kind, *_subject_of_test(words[3:-1])
        if words[2:3] == ["set"] and words[3:]:
            return item.kind, "variable", words[3].partition("=")[0]
        if words[1:2] == ["command"] and "=" in words[2]:
            return item.kind, "variable", words[2].partition("=")[0]
        return item.kind, *words[:3]
    if item.kind in (eventlog.EFI_VARIABLE_DRIVER_CONFIG, eventlog.EFI_VARIABLE_BOOT, eventlog.EFI_VARIABLE_BOOT2):
        return item.kind, re.split("[: ]", item.text)[0]
    if item.kind in _ONE_OF_ITS_CAUSE:
        return item.kind, item.cause
    return item.kind, item.text


def _subject_of_test(words: list[str]) -> tuple[str, ...]:
    """Of `[ VALUE = WORD ]` and the like, all but the value, which GRUB has put there for a variable."""
    words = words[:-1] if words[-1:] == ["]"] else words
    if len(words) == 3 and words[1] in ("=", "==", "!="):
        return "test", *words[1:]
    if len(words) == 1:
        return "test", "whether it is empty"
    return "test", *words


_ONE_OF_ITS_CAUSE = (
    eventlog.EFI_VARIABLE_AUTHORITY, eventlog.EFI_APPLICATION, eventlog.SYSTEMD, eventlog.CRTM_VERSION,
    eventlog.EFI_GPT, eventlog.EFI_GPT2, eventlog.SEPARATOR,
)  # fmt: skip
"""Kinds whose text is what changes, not the name of a thing."""
_KERNEL_BEFORE = re.compile("^command line (BOOT_IMAGE=)?")


def _cause_of_change(old: Item | None, new: Item) -> str:
    """The cause of the new event; of GRUB's line with both kernel and command line, the one that changed."""
    if old and new.cause == "command-line":
        before, now = (_KERNEL_BEFORE.sub("", item.text).partition(" ")[0] for item in (old, new))
        if "/" in now and "=" not in now and before != now:
            return "kernel"
    return new.cause
