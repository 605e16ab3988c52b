# SPDX-License-Identifier: Apache-2.0
"""`unlock disk release`: takes back what `disk adopt` or `group create` did to a disk. It stays plain LUKS2, opens by a
passphrase that its owner has, on any machine, and has nothing of this host; its data is not touched, and it may be
mounted meanwhile.

    journal ──> keyslot with the passphrase, unless it has one, proven ──> state: the group is gone ──>
    crypttab, unlock.toml, TPM ──> token removed ──> passphrase proven again ──> recovery keyslot removed ──>
    journal closed ──> KEK retired

At every instant the passphrase or the recovery key opens it, and both in the middle.
"""

from typing import NamedTuple

from .. import journald, messages
from ..disks import devices, disk_keys, find, luks, token
from ..disks.groups import Group, Member
from ..errors import DiskFailed, NotOurs, Refused, Tampered, UnlockError, Usage
from ..host import config
from ..host.journal import DiskRelease
from ..host.lock import exclusive
from ..host.state import State
from ..keys import access, delivery
from ..keys.access import Work
from ..paths import TPM_DEVICE, Paths
from ..secret import Secret
from . import leaving, membership
from .consent import Consent, Plan, agree


class Released(NamedTuple):
    """The result."""

    disk: str
    """Mapping name; its node where it was in no group."""
    group: str
    """The group that has ended with it, or ''."""
    keyslot: int
    """The one that the passphrase opens."""
    added: bool
    """The disk did not have it before."""


class _Keyslots(NamedTuple):
    """Those that this needs to know of."""

    ours: tuple[int, ...]
    """The recovery key's, this one and earlier ones."""
    theirs: int | None
    """The first that the passphrase opens; None for none."""


def release_disk(
    paths: Paths,
    device: str,
    passphrase: Secret,
    *,
    recovery_file: str = "",
    consent: Consent = agree,
    look: find.Look = find.look,
    connect: access.Connect = access.connect,
    tcti: str = TPM_DEVICE,
) -> Released | None:
    """Gives a disk back, with a passphrase that opens it or that it gets. None for a plan that was only to be shown.
    `recovery_file`: the recovery key, read or asked for where the state does not know its keyslot.

    Killed, the same command finishes. Raises Usage, Refused, NotOurs, Tampered: then nothing has changed; DiskFailed,
    TpmFailed.
    """
    if not len(passphrase):
        raise Usage("an empty passphrase opens the disk for everybody", "another passphrase")
    with exclusive(paths), Work(paths, look, connect) as work:
        work.settings.check()
        state = work.state
        node = membership.device_node(device)
        with luks.Container(node) as container:
            uuid = container.uuid
            about = f"/dev/disk/by-uuid/{uuid}"
            state.refuse_other("disk release", about)
            entry = state.unfinished(DiskRelease, about)
            begun = entry is not None
            group, member = _find(state, container, entry, device)
            if not entry:
                _check(work, group, member)
            with _volume_key(work, container, group, passphrase, recovery_file) as dek:
                slots = _find_keyslots(state, container, dek, passphrase, recovery_file)
                if not entry:
                    if not consent(_plan(paths, group, member, slots, node)):
                        return None
                    kek = group.kek if group else ""
                    entry = DiskRelease("disk release", about, group.name if group else "", kek, member)
                    state.begin(entry)
                slot, added = _ensure_passphrase(state, node, slots, dek, passphrase, begun=begun and group is None)
        return _finish(work, node, entry, slots, slot, added, passphrase, tcti)


def _find(
    state: State, container: luks.Container, entry: DiskRelease | None, device: str
) -> tuple[Group | None, Member]:
    """The group that the disk is in, None for none or where a run that was killed has ended it. Raises Refused, NotOurs
    for a disk of another host, or with nothing of this one."""
    found = membership.member_named(state, container.uuid)
    if found:
        return found
    if entry:
        return None, entry.member
    hosts = {fields.get("host") for _, fields in container.tokens(token.TYPE)}
    if hosts - {state.host}:
        raise NotOurs(f"{device} belongs to another unlock host", "release it there", "other-host")
    if not hosts and not container.cheap_keyslots():
        raise Refused(f"{device} has nothing of this host", "unlock disk list", "not-a-member")
    return None, Member(container.uuid, device, "")


def _check(work: Work, group: Group | None, member: Member) -> None:
    """Raises Refused."""
    if not group:
        return
    if len(group.members) > 1:
        raise Refused(
            f"{member.name} is one of {len(group.members)} disks of group {group.name}, whose data lies on all of them",
            f"unlock disk remove {member.name} first; or unlock group delete {group.name} for all",
            code="member",
        )
    config.check_removable(work.paths.config, group.name)
    leaving.check_root(work.paths, work.state, group.name, group.members)


def _volume_key(
    work: Work, container: luks.Container, group: Group | None, passphrase: Secret, recovery_file: str
) -> Secret:
    """By the token, which authenticates the header; of a disk that is in no group by the passphrase, else the recovery
    key. Raises Tampered, NotOurs, ProviderError, Usage."""
    if group:
        try:
            return access.find_volume_key(work, container, group)
        except Tampered as error:
            raise Tampered(
                f"{container.device} has another header than this host wrote",
                f"unlock disk adopt {container.device} --group {group.name}, which shows what differs",
                "changed-header",
            ) from error
    try:
        return container.volume_key(passphrase)
    except UnlockError:
        with delivery.read_recovery_key(recovery_file) as recovery:
            return disk_keys.dek_by_recovery_key(container, recovery)


def _find_keyslots(
    state: State, container: luks.Container, dek: Secret, passphrase: Secret, recovery_file: str
) -> _Keyslots:
    """Raises Usage, where the recovery key must be typed and is not one."""
    uuid = container.uuid
    salts = {state.recovery.keyslots.get(uuid, ""), *state.recovery.former.get(uuid, ())} - {""}
    ours = [slot for slot in container.cheap_keyslots() if container.salt(slot) in salts]
    if not salts and container.cheap_keyslots():
        with delivery.read_recovery_key(recovery_file) as recovery:
            try:
                slot, found = disk_keys.recovery_keyslot(container, recovery)
                found.wipe()
                ours = [slot]
            except NotOurs:
                pass  # those that are as cheap are of others
    for slot in container.keyslots():
        if slot in ours:
            continue
        try:
            with container.volume_key(passphrase, slot) as found:
                if found == dek:
                    return _Keyslots(tuple(ours), slot)
        except UnlockError:
            continue
    return _Keyslots(tuple(ours), None)


def _plan(paths: Paths, group: Group | None, member: Member, slots: _Keyslots, node: str) -> Plan:
    where = f"{member.name} ({node})" if group else node
    steps = []
    if slots.theirs is None:
        steps.append(f"{where} gets a keyslot with the passphrase, by Argon2id")
    if group:
        steps.append(f"group {group.name}, of this one disk, goes out of {paths.config}")
        if devices.mappings_below("/").isdisjoint({member.name}):
            steps.append(f"noauto goes out of the line of {member.name} in crypttab, where there is one")
    steps += [f"the token of {where} is removed", f"the recovery key's keyslot of {where} is removed"]
    if group:
        steps.append("the KEK is retired at its provider")
    return Plan(tuple(steps))


def _ensure_passphrase(
    state: State, node: str, slots: _Keyslots, dek: Secret, passphrase: Secret, *, begun: bool
) -> tuple[int, bool]:
    """The keyslot that the passphrase opens, proven from the disk as it is now, and whether it was added. An error is
    undone while nothing else has changed."""
    try:
        slot = slots.theirs
        if slot is None:
            with luks.Container(node) as container:
                slot = container.add_keyslot(dek, passphrase=passphrase, slow=True)
        _prove(node, passphrase, slot, dek)
        return slot, slots.theirs is None
    except UnlockError:
        if not begun:
            state.journal = None
            state.save()
        raise


def _prove(node: str, passphrase: Secret, slot: int, dek: Secret | None = None) -> None:
    """Raises DiskFailed."""
    try:
        with luks.Container(node) as container, container.volume_key(passphrase, slot) as found:
            container.verify_volume_key(found)
            if dek is None or found == dek:
                return
    except NotOurs:
        pass
    raise DiskFailed(f"{node}: keyslot {slot} does not open by the passphrase, so the other ways stay", "unlock status")


def _finish(
    work: Work,
    node: str,
    entry: DiskRelease,
    slots: _Keyslots,
    slot: int,
    added: bool,
    passphrase: Secret,
    tcti: str,
) -> Released:
    state, members = work.state, (entry.member,)
    mount = leaving.describe_mounts(work.paths, entry.group) if entry.group else ""
    if entry.group:
        if state.groups.pop(entry.group, None):
            state.save()
        leaving.end_group(work, entry.group, members, tcti, stay=True)
    leaving.remove_tokens(node, state.host)
    _prove(node, passphrase, slot)
    with luks.Container(node) as container:
        for each in slots.ours:
            if each in container.keyslots():
                container.remove_keyslot(each)
    leaving.close(work, entry.group, members, entry.kek)
    name, uuid = entry.member.name, entry.member.uuid
    words = f"{name} ({uuid}) is released: plain LUKS2 with a passphrase"
    journald.record(work.paths, messages.DISK_RELEASED, words, disk=name, uuid=uuid, group=entry.group)
    if entry.group:
        leaving.tell_how_to_open(work.paths, members, mount)
    return Released(entry.member.name, entry.group, slot, added)
