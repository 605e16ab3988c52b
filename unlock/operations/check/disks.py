# SPDX-License-Identifier: Apache-2.0
"""Checks every disk of every group, and the root: do they open as early boot opens them?"""

from collections.abc import Iterator, Sequence
from typing import NamedTuple

from ...disks import arrays, devices, disk_keys, find, luks, spoofed, token
from ...disks.groups import Group, Member
from ...errors import NoKey, NotOurs, UnlockError
from ...host import config, this_boot
from ...host.state import State
from ...paths import Paths
from ...predict import allowed_states
from ...secret import Secret
from ..membership import known_changes, mounts_needed_before_groups
from .finding import NOTE, SAFE, UNPROVEN, UNSAFE, Finding


def check_group(
    paths: Paths, state: State, group: Group, present: dict[str, list[find.Found]], persistence: Secret | None
) -> Iterator[Finding]:
    """A group opens whole, unless its policy allows less: the worst of its disks counts. One finding when all are
    alike."""
    what = f"group {group.name}"
    degradation = _read_degradation(paths, group)
    found = [_check_member(state, group, member, present, persistence, degradation) for member in group.members]
    wrong = [each for each in found if each.verdict != SAFE]
    if not wrong:
        yield Finding(what, SAFE, f"{len(found)} disk(s) open with the key that the TPM keeps")
    elif len({each[1:] for each in wrong}) == 1 and len(wrong) == len(found):
        yield wrong[0]._replace(what=what)
    else:
        yield from wrong


def check_headers(state: State, present: dict[str, list[find.Found]]) -> Iterator[Finding]:
    """Members whose header has one good copy of the two: nothing repairs it that only opens the disk."""
    for group in state.groups.values():
        for member in group.members:
            try:
                with luks.Container(find.find_node(present, member)) as container:
                    if container.is_whole:
                        continue
            except UnlockError:
                continue
            why = "one of the two copies of its header is ruined; it opens by the other"
            hint = f"cryptsetup repair {container.device}"
            yield Finding(f"group {group.name}, disk {member.name}", NOTE, why, hint)


def check_copies(state: State) -> Iterator[Finding]:
    """Other disks with the UUIDs of what lies on a group's mappings: what mounts by UUID may take them."""
    for group in state.groups.values():
        for copy in spoofed.find_copies(each.name for each in group.members):
            why = f"{copy.node} has the UUID of what is on its disks, and may be mounted in its place"
            yield Finding(f"group {group.name}", UNPROVEN, why, f"take {copy.node} out, or wipefs it")


def check_arrays(paths: Paths, state: State) -> Iterator[Finding]:
    """Arrays of md and raids of LVM on a group's disks that lack some, though all of the group may be open."""
    for group in state.groups.values():
        for each in arrays.find_degraded({member.name for member in group.members}, paths.root):
            yield Finding(f"group {group.name}", NOTE, each.describe(), each.hint)


def check_needed(paths: Paths, state: State) -> Iterator[Finding]:
    """Whether a group that is opened after early boot holds what its gate waits for."""
    root = devices.mappings_below("/", paths.root)
    for group in state.groups.values():
        names = [each.name for each in group.members]
        for name in names if root.isdisjoint(names) else ():
            for where in mounts_needed_before_groups(name, paths.root):
                why = f"disk {name} holds {where}, which its gate waits for: it opens in early boot, or not at all"
                yield Finding(f"group {group.name}", UNPROVEN, why, f"move {where} to the root file system")


class _Degradation(NamedTuple):
    """Whether a group opens without all of its members."""

    allowed: bool
    """A boot does it, if the others suffice."""
    proven: bool
    """It is open so now."""


def _read_degradation(paths: Paths, group: Group) -> _Degradation:
    try:
        settings = config.load(paths.config).groups.get(group.name)
    except UnlockError:  # a finding of its own
        settings = None
    allowed = group.degraded or bool(settings and settings.degraded == "allow")
    return _Degradation(allowed, group.name in this_boot.degraded_groups(paths))


def _check_absent(what: str, member: Member, degradation: _Degradation) -> Finding:
    why, do = f"it is not here (serial {member.serial or 'unknown'})", "unlock status"
    if not degradation.allowed:
        return Finding(what, UNSAFE, f"{why}, and its group opens whole or not at all", do)
    if degradation.proven:
        return Finding(what, NOTE, f"{why}: a boot opens its group without it", do)
    return Finding(what, UNPROVEN, f"{why}: a boot opens its group without it, if the others suffice", do)


def _check_member(
    state: State,
    group: Group,
    member: Member,
    present: dict[str, list[find.Found]],
    persistence: Secret | None,
    degradation: _Degradation,
) -> Finding:
    what = f"group {group.name}, disk {member.name}"
    node = find.find_node(present, member)
    if not node and len(present.get(member.uuid, ())) > 1:
        return Finding(what, UNSAFE, "several disks have its UUID", "unlock status")
    if not node:
        return _check_absent(what, member, degradation)
    if member.uuid in group.left_out():
        why, do = "its group was written while it was away, and opens without it", f"unlock group heal {group.name}"
        if degradation.allowed:
            return Finding(what, NOTE, why, do)
        return Finding(what, UNSAFE, f"{why} by hand alone", do)
    adopt = f"unlock disk adopt {node} --group {group.name}"
    try:
        with luks.Container(node) as container:
            tokens = [
                each
                for each in disk_keys.read_tokens(container, state.host)
                if (each.group, each.manifest, each.members) == (group.name, group.manifest, len(group.members))
            ]
            proven = persistence and any(disk_keys.is_authentic(container, each, persistence) for each in tokens)
            if not proven and (differs := known_changes(state, container)):
                return Finding(what, UNSAFE, f"its header was changed: {'; '.join(differs)}", adopt)
            if not tokens:
                return Finding(what, UNSAFE, "its token is not of the group as it is now", "unlock sync")
            if persistence is None:
                return Finding(
                    what, UNPROVEN, "the key cache is empty: whether it opens cannot be tried", "unlock status"
                )
            return _check_opens(what, container, tokens, persistence)
    except NotOurs:
        return Finding(what, UNSAFE, "its header is not the one that this host wrote: its token is gone", adopt)
    except UnlockError as error:
        return Finding(what, UNSAFE, str(error), error.hint)


def _check_opens(what: str, container: luks.Container, tokens: Sequence[token.Token], persistence: Secret) -> Finding:
    """Opens it as early boot does: by the newest token that unwraps. Raises UnlockError."""
    problem: UnlockError | None = None
    for each in tokens:
        try:
            with disk_keys.unwrap_volume_key(container, each, persistence) as key:
                if each.reencryption and disk_keys.is_moving(container, each):
                    container.volume_key(key, each.reencryption.plan.new_keyslot).wipe()
                else:
                    container.verify_volume_key(key)
                return Finding(what, SAFE, "")
        except NoKey as error:  # only the key manager keeps it
            return Finding(what, UNPROVEN, str(error), "unlock provider test")
        except UnlockError as error:
            problem = error
    assert problem
    raise problem


def check_root(paths: Paths, state: State) -> Iterator[Finding]:
    """Whether the root file system opens by itself, and early boot gives it the keys."""
    ours = {member.name for group in state.groups.values() for member in group.members}
    if devices.lies_on_mappings("/", ours, paths.root):
        yield Finding("root", SAFE, "it lies on disks that unlock opens")
    elif ours and not allowed_states.unauthenticated_root(paths, state):
        closed = "unlock does not open it: early boot gives it no keys, and closes all disks"
        yield Finding("root", UNSAFE, closed, "unlock disk adopt")
    elif any(devices.is_encrypted(number, paths.root) for number in devices.devices_of_mount("/", paths.root)):
        yield Finding("root", UNPROVEN, "it is encrypted, and something else than unlock opens it", "unlock disk adopt")
    else:
        yield Finding("root", SAFE, "it is not encrypted: nothing has to open it")
