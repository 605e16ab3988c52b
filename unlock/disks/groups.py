# SPDX-License-Identifier: Apache-2.0
"""Groups of disks: the records of groups and members, and the rules for names. Pure."""

from ..errors import Usage
from ..light import NamedTuple

_ALLOWED = frozenset("abcdefghijklmnopqrstuvwxyz0123456789_.-")
NAME_MAX = 64
MEMBERS_MAX = 1024
SERIAL_MAX = 128
"""Characters of a serial number that count."""


def is_name(text: object) -> bool:
    """[a-z0-9_.-], 1 to 64 characters, the first a letter or a digit: safe in a path, a unit and a dm name."""
    return isinstance(text, str) and 0 < len(text) <= NAME_MAX and text[0] not in "_.-" and _ALLOWED.issuperset(text)


def check_name(text: str, what: str = "group") -> str:
    """Returns the name. Raises Usage if it is not valid."""
    if not is_name(text):
        raise Usage(
            f"{text!r} cannot be the name of a {what}",
            "use up to 64 of a-z 0-9 _ . - and begin with a letter or a digit",
        )
    return text


def mapping_names(group: str, count: int, taken: set[str]) -> list[str]:
    """`count` mapping names GROUP-a, GROUP-b, …, GROUP-z, GROUP-aa that are not taken."""
    names: list[str] = []
    number = 0
    while len(names) < count:
        name = f"{group}-{_letters(number)}"
        if name not in taken:
            names.append(name)
        number += 1
    return names


def _letters(number: int) -> str:
    text = ""
    number += 1
    while number:
        number, rest = divmod(number - 1, 26)
        text = chr(ord("a") + rest) + text
    return text


POLICIES = ("persistent", "provider")


class Member(NamedTuple):
    """One disk of a group, as state.json has it."""

    uuid: str
    """LUKS UUID."""
    name: str
    """Name of the mapping in /dev/mapper."""
    serial: str
    """Serial number of the device, or ''."""


class Away(NamedTuple):
    """A member that was not here when the group was opened degraded: what was written since is not on it."""

    uuid: str
    """LUKS UUID."""
    kind: str
    """What lies on the group's mappings, as udev calls it: `btrfs`, `linux_raid_member`."""
    generation: int
    """How far its btrfs was written then, on the disks that were here; 0 for anything else. A member that has more was
    written while the others were away."""


class Group(NamedTuple):
    """A set of disks that open together, under one KEK."""

    name: str
    kek: str
    """The provider's id of the KEK."""
    generation: int
    """Generation of the KEK."""
    manifest: int
    """Generation of the member list; each token carries it."""
    members: tuple[Member, ...]
    kek_name: str = ""
    """The provider's name of the KEK."""
    policy: str = "persistent"
    """`persistent`: each disk carries the KEK, wrapped by the persistence key. `provider`: only the provider has it."""
    former: tuple[str, ...] = ()
    """Ids of KEKs that this one replaced, the latest last: a provider that returns one of them is not up to date."""
    behind: tuple[str, ...] = ()
    """LUKS UUIDs of members whose token may still hold an earlier KEK, as they were away."""
    degraded: bool = False
    """Early boot may open it without all of its members: each token says so. For the group of the root file system."""
    away: tuple[Away, ...] = ()
    """Members without which it was opened, until they are healed."""

    def without(self, *uuids: str) -> "Group":
        """The same when the members of these LUKS UUIDs have left it. Its list is another one then, and wants a new
        `manifest`."""
        return self._replace(
            members=tuple(each for each in self.members if each.uuid not in uuids),
            behind=tuple(each for each in self.behind if each not in uuids),
            away=tuple(each for each in self.away if each.uuid not in uuids),
        )

    def left_out(self) -> frozenset[str]:
        """LUKS UUIDs of the members that are not opened with the others, as their btrfs was written without them. What
        md, LVM and ZFS have on them is told apart by those, each by its own record on the disks."""
        return frozenset(each.uuid for each in self.away if each.kind == "btrfs")
