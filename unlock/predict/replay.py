# SPDX-License-Identifier: Apache-2.0
"""Replays the log of this boot with what has changed on disk: the events of a boot that has not happened.

    Changes, each from a digest that the log has to one that it will have ──apply_changes──> events

    grub_learn, grub_replay    shim + GRUB (PCRs 4, 8, 9): grub.cfg is run again
    uki_replay                 a unified kernel image (PCRs 4, 11)
    efistub                    a kernel that the firmware starts (PCRs 4, 9)

Every change names the old content too, and the log must have its digest: what this boot measured is reproduced from
the files before anything is predicted. Where that fails, the answer is Refused, never a guess.
"""

from collections.abc import Iterable
from hashlib import sha256
from typing import NamedTuple

from ..errors import Refused
from ..measured.eventlog import Event, Log


class Change(NamedTuple):
    """A measured thing, as it was and as it will be: SHA-256 digests."""

    what: str
    old: bytes
    new: bytes


def apply_changes(log: Log, changes: Iterable[Change]) -> list[Event]:
    """The log's events with these changes.

    Raises Refused when the log does not have a change's old digest, or two changes contradict each other.
    """
    replaced: dict[bytes, Change] = {}
    for change in changes:
        before = replaced.setdefault(change.old, change)
        if before.new != change.new:
            raise cannot_predict(f"{change.what} and {before.what} are measured alike now, and not later")
    logged = {event.digest for event in log.events}
    for change in replaced.values():
        if change.old not in logged:
            raise cannot_predict(f"this boot has not measured {change.what} as it is on disk")
    return [
        event._replace(digest=replaced[event.digest].new) if event.digest in replaced else event for event in log.events
    ]


def command_line_change(*, old: bytes, new: bytes) -> Change:
    """Other load options, which the kernel's EFI stub measures as they are (PCR 9): UTF-16, most often with its NUL."""
    return Change(what="the kernel command line", old=sha256(old).digest(), new=sha256(new).digest())


def cannot_predict(why: str) -> Refused:
    """Refused, code `cannot-predict`."""
    return Refused(
        f"the next boot's measurements cannot be predicted: {why}", "unlock policy window --reboots 1", "cannot-predict"
    )
