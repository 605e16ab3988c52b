# SPDX-License-Identifier: Apache-2.0
"""Which disks are here now, by LUKS UUID. Operations on a running host find the members of groups by it."""

from collections.abc import Callable, Iterable

from ..errors import UnlockError
from . import luks, udev
from .devices import Found as Found
from .devices import distinct_disks
from .groups import Member

Look = Callable[[], dict[str, list[Found]]]
"""Returns LUKS UUID -> the disks that have it."""


def look() -> dict[str, list[Found]]:
    """The LUKS2 disks that udev knows, except those whose header cannot be read."""
    return read_headers(Found(each.node, each.serial, each.number, each.size) for each in udev.luks2_disks())


def read_headers(disks: Iterable[Found]) -> dict[str, list[Found]]:
    """These disks by LUKS UUID, except those whose header cannot be read."""
    seen: dict[str, list[Found]] = {}
    for each in disks:
        try:
            with luks.Container(each.node) as container:
                seen.setdefault(container.uuid, []).append(each)
        except UnlockError:
            continue
    return seen


def find_node(seen: dict[str, list[Found]], member: Member) -> str:
    """The node of a member, '' when it is not here. Of two disks with its UUID, the one with its serial number."""
    found = distinct_disks(seen.get(member.uuid, []))
    if len(found) > 1:
        found = [each for each in found if each.serial and each.serial == member.serial]
    return found[0].node if len(found) == 1 else ""
