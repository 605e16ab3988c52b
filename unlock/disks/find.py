# SPDX-License-Identifier: Apache-2.0
"""Which disks are here now, by LUKS UUID: for what is done to members on the running host."""

from collections.abc import Callable, Iterable
from typing import NamedTuple

from ..errors import UnlockError
from . import luks, udev
from .groups import Member


class Found(NamedTuple):
    """A disk with a LUKS2 header."""

    node: str
    serial: str


Look = Callable[[], dict[str, list[Found]]]
"""LUKS UUID -> the disks that carry it."""


def look() -> dict[str, list[Found]]:
    """The disks that udev marked; one whose header cannot be read is not among them."""
    return read(Found(each.node, each.serial) for each in udev.marked_disks())


def read(disks: Iterable[Found]) -> dict[str, list[Found]]:
    """The same for these disks."""
    seen: dict[str, list[Found]] = {}
    for each in disks:
        try:
            with luks.Container(each.node) as container:
                seen.setdefault(container.uuid, []).append(each)
        except UnlockError:
            continue
    return seen


def node_of(seen: dict[str, list[Found]], member: Member) -> str:
    """The node of a member, '' when it is not here. Of two with one UUID, the one with the member's serial."""
    found = seen.get(member.uuid, [])
    if len(found) > 1:
        found = [each for each in found if each.serial and each.serial == member.serial]
    return found[0].node if len(found) == 1 else ""
