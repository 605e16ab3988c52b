# SPDX-License-Identifier: Apache-2.0
"""`unlock group heal`: takes a member in again that was away while its group was written.

    the old btrfs is wiped off it, out of the kernel's sight ──> opened ──> `btrfs replace` copies all that it had
      ──> `btrfs balance` gives a second copy to what was written meanwhile ──> the state forgets that it was away

It is not put back as it is, for a scrub to repair: data without checksums (nodatacow) would be read from it as they
were, and a member that was written by itself while the others were away would be mixed with them. `btrfs replace` works
while the file system is in use, and reads about as much as a scrub.

The state has the member as away until the last step, and no boot opens it before that: killed at any instant, the
same command begins again. What md, LVM and ZFS have is theirs to mend: the member is opened, and they see it.
"""

import os
import time
from typing import NamedTuple

from .. import journald, log, messages
from ..boot import gate
from ..disks import btrfs, btrfs_layout, devices, disk_keys, find, luks
from ..disks.groups import Away, Group, Member
from ..errors import CommandFailed, Malformed, Refused, UnlockError, Usage
from ..host import report, this_boot
from ..host.lock import exclusive
from ..host.state import State
from ..paths import Paths
from ..run import run
from ..secret import Secret
from .consent import Consent, Plan

_LOOKED_AT = "unlock-heal"
"""Mapping of a member that neither udev nor the kernel looks at: what is on it, is read and wiped there."""
_AS_LONG_AS_IT_TAKES = 10.0**6
"""Seconds: a timeout of poll(2) has 31 bits of milliseconds."""

_USAGES = (5, 25, 60, 90)
"""Percent, from the quickest balance to the one that frees most. btrfs replace needs room for a new chunk, which a disk
that is all allotted does not have, however much is free in its chunks."""
_NO_SPACE = "No space left on device"
_MAKE_ROOM = "delete or move files; then the same command again"


class Healed(NamedTuple):
    """What was done."""

    members: tuple[str, ...]
    """Names of those that are in again."""
    left: tuple[str, ...]
    """Names of those that are still away."""


class _Returned(NamedTuple):
    """A member that is here again, and what is on it."""

    member: Member
    away: Away
    node: str
    dek: Secret
    changed: bool
    """It was written while the others were away."""
    taken_in: bool
    """What the group holds has it already: md, LVM or ZFS, or a btrfs that somebody mounted with it."""


def heal_group(paths: Paths, name: str, consent: Consent, look: find.Look = find.look) -> Healed:
    """Raises Usage, Refused (`not-mounted`, `busy`, `missing`, `in-use`, `stale`), NoKey, DiskFailed, CommandFailed."""
    with exclusive(paths):
        state = State.load(paths)
        if name not in state.groups:
            raise Usage(f"there is no group {name}", "unlock status")
        group = state.groups[name]
        if not group.away:
            return Healed((), ())
        mount_point = _find_mount_point(group)
        returned = _read_returned(paths, state, group, look(), mount_point)
        try:
            if not consent(_make_plan(returned, mount_point)):
                return Healed((), _names(group, {each.uuid for each in group.away}))
            for each in returned:
                if not each.taken_in:
                    _open_without_its_content(each)
        finally:
            for each in returned:
                each.dek.wipe()
    for each in returned:
        if each.away.kind == "btrfs" and each.taken_in:
            run(["btrfs", "scrub", "start", "-B", mount_point], timeout=_AS_LONG_AS_IT_TAKES)
        elif each.away.kind == "btrfs":
            _rebuild(mount_point, each.member.name)
    if mount_point and not btrfs.missing_devids(mount_point, devices.nodes_below(mount_point)):
        _balance(mount_point)
    done = {each.member.uuid for each in returned}
    _forget_that_they_were_away(paths, name, done)
    names = _names(group, done)
    words = f"group {name}: {', '.join(names) or 'nothing'} healed"
    journald.record(paths, messages.DISK_HEALED, words, group=name, disks=names)
    return Healed(_names(group, done), _names(group, {each.uuid for each in group.away} - done))


def _names(group: Group, uuids: set[str]) -> tuple[str, ...]:
    return tuple(each.name for each in group.members if each.uuid in uuids)


def _find_mount_point(group: Group) -> str:
    """Where the group's btrfs is mounted for writing; '' where a group holds something else. Raises Refused."""
    if not group.left_out():
        return ""
    names = {each.name for each in group.members if each.uuid not in group.left_out()}
    for where in devices.mount_points_on(names):
        if devices.mount_type(where) == "btrfs" and not os.statvfs(where).f_flag & os.ST_RDONLY:
            _refuse_running(where)
            return where
    raise Refused(
        f"group {group.name} is not mounted for writing, and btrfs copies only what is mounted",
        f"unlock open {group.name} --degraded",
        "not-mounted",
    )


def _refuse_running(mount_point: str) -> None:
    """A replace or balance outlives the process that began it. Raises Refused."""
    if running := btrfs.running_operation(mount_point):
        told = next((f"{each} status" for each in ("replace", "balance") if each in running), "filesystem show")
        words = f"{mount_point}: btrfs has a {running} under way, of a heal perhaps that was killed"
        raise Refused(words, f"btrfs {told} {mount_point}; when it is done, the same command", "busy")


def _read_returned(
    paths: Paths, state: State, group: Group, seen: dict[str, list[find.Found]], mount_point: str
) -> list[_Returned]:
    """The members that are here again, authenticated as every boot does it. Raises Refused when none is."""
    found = []
    if devices.dm_uuid(_LOOKED_AT) is not None:  # a killed run has left it, of whichever member
        luks.deactivate(_LOOKED_AT)
    unwrap = gate.make_unwrap(paths, group.name, report.Report(f"heal {group.name}"), report.now())
    for away in group.away:
        member = next((each for each in group.members if each.uuid == away.uuid), None)
        if not member or not (node := find.find_node(seen, member)):
            continue
        if devices.active_mapping_name(member.uuid) == member.name and _is_taken_in(away, member, mount_point):
            found.append(_Returned(member, away, node, Secret(b""), changed=False, taken_in=True))
            continue
        _close_if_open(member)
        with luks.Container(node) as container:
            tokens = disk_keys.read_tokens(container, state.host)
            current = [each for each in tokens if each.manifest == group.manifest and each.group == group.name]
            if not current:
                words = f"{member.name} ({node}) has a token of another member list"
                raise Refused(words, f"unlock disk adopt {node} --group {group.name}", "stale")
            dek = unwrap(container, current[0])
            changed = away.kind == "btrfs" and _was_written(container, dek, away)
        found.append(_Returned(member, away, node, dek, changed, taken_in=False))
    if not found:
        names = ", ".join(_names(group, {each.uuid for each in group.away}))
        raise Refused(f"{names} of group {group.name} is not here", "plug it in, or unlock disk replace", "missing")
    return found


def _is_taken_in(away: Away, member: Member, mount_point: str) -> bool:
    if away.kind != "btrfs":
        return True
    return os.path.realpath(f"/dev/mapper/{member.name}") in devices.nodes_below(mount_point)


def _close_if_open(member: Member) -> None:
    """Closes what an earlier run has left open. Raises Refused for a member that is in use."""
    if not (name := devices.active_mapping_name(member.uuid)):
        return
    try:
        luks.deactivate(name)
    except UnlockError as error:
        raise Refused(f"{name} is open and in use: {error}", f"lsblk /dev/mapper/{name}", "in-use") from error


def _was_written(container: luks.Container, dek: Secret, away: Away) -> bool:
    """Whether its btrfs has more than the others had when they were opened without it, or cannot be read. Device 0 is
    what a replace has begun to write, which a cut has stopped: it has nothing of its own."""
    container.activate(_LOOKED_AT, dek, private=True)
    try:
        device = btrfs_layout.read_device(f"/dev/mapper/{_LOOKED_AT}")
    except Malformed:
        return True
    finally:
        luks.deactivate(_LOOKED_AT)
    return device is not None and device.devid != 0 and device.generation > away.generation


def _make_plan(returned: list[_Returned], mount_point: str) -> Plan:
    steps: list[str] = []
    for each in returned:
        name = each.member.name
        if each.away.kind != "btrfs":
            steps.append(f"open {name}: {each.away.kind} mends it")
            continue
        if each.taken_in:
            steps.append(f"btrfs scrub {mount_point}, which has {name} already")
            continue
        steps.append(f"wipe the old btrfs off {name}, and open it")
        steps.append(f"btrfs replace onto {name}: all that it had is copied from the other disks of {mount_point}")
    if mount_point:
        steps.append(f"btrfs balance {mount_point}, where something was written without a second copy")
    lost = tuple(
        f"what was written to {each.member.name} while the others were away" for each in returned if each.changed
    )
    return Plan(tuple(steps), lost, next((each.member.name for each in returned if each.changed), ""))


def _open_without_its_content(each: _Returned) -> None:
    """Opens a member under its name; of a btrfs, when that is wiped off it: the kernel would take it in as it is."""
    with luks.Container(each.node) as container:
        if each.away.kind == "btrfs":
            container.activate(_LOOKED_AT, each.dek, private=True)
            try:
                run(["wipefs", "--all", "--quiet", "--types", "btrfs", f"/dev/mapper/{_LOOKED_AT}"])
            finally:
                luks.deactivate(_LOOKED_AT)
        container.activate(each.member.name, each.dek)


def _rebuild(mount_point: str, name: str) -> None:
    """Raises CommandFailed, Refused."""
    try:
        run(["btrfs", "replace", "cancel", mount_point])  # one that a power cut has stopped
    except CommandFailed:
        pass
    missing = btrfs.missing_devids(mount_point, devices.nodes_below(mount_point))
    if not missing:
        raise Refused(f"the btrfs on {mount_point} lacks no device", f"btrfs filesystem show {mount_point}", "missing")
    began = time.monotonic()
    log.note(f"{name}: btrfs replace copies what it had from the other disks")
    replace = ["btrfs", "replace", "start", "-B", "-f", str(missing[0]), f"/dev/mapper/{name}", mount_point]
    for usage in _USAGES:
        try:
            run(replace, timeout=_AS_LONG_AS_IT_TAKES)
            break
        except CommandFailed as error:
            if _NO_SPACE not in str(error):
                raise
        log.note(f"{name}: no chunk is free: btrfs balance empties those that are filled to less than {usage} %")
        try:
            run(["btrfs", "balance", "start", f"-dusage={usage}", mount_point], timeout=_AS_LONG_AS_IT_TAKES)
        except CommandFailed as error:  # what it has emptied until then may be enough
            if _NO_SPACE not in str(error):
                raise
    else:
        words = f"btrfs needs a chunk of free space on each disk of {mount_point} for a replacement"
        raise CommandFailed(words, _MAKE_ROOM, "no-space")
    log.note(f"{name}: done in {time.monotonic() - began:.0f} s")


def _balance(mount_point: str) -> None:
    """Gives the profile that can lose a device to the chunks that were written meanwhile with another one. Raises
    CommandFailed."""
    filters = [f"-{kind}convert={profile},soft" for kind, profile in btrfs.mixed_profiles(mount_point).items()]
    if filters:
        log.note(f"btrfs balance {' '.join(filters)} {mount_point}")
        try:
            run(["btrfs", "balance", "start", *filters, mount_point], timeout=_AS_LONG_AS_IT_TAKES)
        except CommandFailed as error:
            if _NO_SPACE not in str(error):
                raise
            words = f"btrfs has no room on {mount_point} for the second copy of what was written meanwhile"
            raise CommandFailed(words, _MAKE_ROOM, "no-space") from error


def _forget_that_they_were_away(paths: Paths, name: str, healed: set[str]) -> None:
    """The state comes last: while it has a member as away, the same command does this again."""
    with exclusive(paths):
        state = State.load(paths)
        group = state.groups[name]
        group = group._replace(away=tuple(each for each in group.away if each.uuid not in healed))
        if not group.away and all(devices.active_mapping_name(each.uuid) == each.name for each in group.members):
            this_boot.mark_open(paths, name, [each.name for each in group.members])
        state.groups[name] = group
        state.save()
