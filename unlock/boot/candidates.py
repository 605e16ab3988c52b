# SPDX-License-Identifier: Apache-2.0
"""Which of the authentic disks are the members of a group: one for each UUID, all of one member list.

`boot.activation` collects the candidates and opens those that are chosen here. Nothing here has a side effect; what a
device is made of is read from /sys.
"""

from ..disks.devices import Found, distinct_disks
from ..disks.token import Token
from ..disks.udev import Disk
from ..light import NamedTuple
from ..secret import Secret
from .worker import WorkerHeader


class Candidate(NamedTuple):
    """A disk whose header is authentic, with the token that made it so and the volume key; the passphrase of both
    volume keys where `disk_keys.is_moving`."""

    disk: Disk
    header: WorkerHeader
    token: Token
    dek: Secret


class Chosen(NamedTuple):
    """What `choose_members` found."""

    members: list[Candidate]
    """One disk for each member; empty unless all are here."""
    duplicates: list[Candidate]
    """Disks that have the UUID of another one and are not the one that the token names."""


def choose_members(candidates: list[Candidate], settled: bool) -> Chosen:
    """All members of the newest member list of which all are here.

    Until udev has `settled`, a disk without the serial number in its token does not count: the disk with that serial
    number may still appear.
    """
    by_manifest: dict[int, list[Candidate]] = {}
    for candidate in candidates:
        by_manifest.setdefault(candidate.token.manifest, []).append(candidate)
    duplicates: list[Candidate] = []
    for manifest in sorted(by_manifest, reverse=True):
        found = _choose_by_uuid(by_manifest[manifest], settled)
        duplicates += found.duplicates
        if found.members and len(found.members) == found.members[0].token.members:
            return Chosen(found.members, duplicates)
    return Chosen([], duplicates)


def choose_present(candidates: list[Candidate], settled: bool) -> Chosen:
    """The members that are here, for a group that is opened without the others: all of one member list, the newest that
    is known here. Empty if none is here.

    While a new list is written, its first disks have both: such a list counts as newer only where a disk has it alone.
    So disks that left a list never open by it again once one disk is here that knows a newer one.
    """
    newest = {each.disk.node: 0 for each in candidates}
    for each in candidates:
        newest[each.disk.node] = max(newest[each.disk.node], each.token.manifest)
    best = Chosen([], [])
    for manifest in sorted({each.token.manifest for each in candidates}, reverse=True):
        of_list = [each for each in candidates if each.token.manifest == manifest]
        nodes = {each.disk.node for each in of_list}
        if all(node in nodes for node, its_newest in newest.items() if its_newest > manifest):
            found = _choose_by_uuid(of_list, settled)
            if len(found.members) > len(best.members):
                best = found
    return best


def _choose_by_uuid(candidates: list[Candidate], settled: bool) -> Chosen:
    """One disk for each UUID, whether all members are here or not."""
    by_uuid: dict[str, list[Candidate]] = {}
    for candidate in {each.disk.node: each for each in candidates}.values():
        by_uuid.setdefault(candidate.header.uuid, []).append(candidate)
    members: list[Candidate] = []
    duplicates: list[Candidate] = []
    for same in by_uuid.values():
        if len(same) > 1:
            same = _distinct(same)
        named = [each for each in same if each.token.serial and each.token.serial == each.disk.serial]
        if len(named) == 1:
            members += named
            duplicates += [each for each in same if each is not named[0]]
        elif len(same) == 1:
            members += same if settled else []
        else:
            duplicates += same
    return Chosen(members, duplicates)


def _distinct(same: list[Candidate]) -> list[Candidate]:
    """One candidate for each disk."""
    disks = [each.disk for each in same]
    kept = distinct_disks([Found(each.node, each.serial, each.number, each.size) for each in disks])
    nodes = {each.node for each in kept}
    return [each for each in same if each.disk.node in nodes]
