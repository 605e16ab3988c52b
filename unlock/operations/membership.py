# SPDX-License-Identifier: Apache-2.0
"""What the commands share that change the disks of a group: the member list in each token, the recovery key, the checks
of headers. A group opens only when every disk has a token with the same member list, so a change that was cut off never
opens half a group.
"""

import os
from collections.abc import Mapping
from contextlib import ExitStack, suppress
from types import MappingProxyType
from typing import Any, NamedTuple

from .. import log, strictjson
from ..disks import adoptable, changes, devices, disk_keys, find, fstab, luks, token, udev
from ..disks.groups import Group, Member, check_name, mapping_names
from ..errors import Malformed, NotOurs, Refused, Tampered, UnlockError, Usage
from ..host import config, units
from ..host.state import State
from ..keys import access, delivery
from ..keys.escrow import Escrow, check_escrow, write_escrow
from ..paths import Paths
from ..run import run
from ..secret import Secret

Facts = dict[str, dict[str, Any]]
"""LUKS UUID -> the facts of that header."""


def obtain_recovery_key(state: State, persistence: Secret, file: str, escrow: Escrow | None = None) -> Secret:
    """The recovery key of this host: the first call makes it, later ones read it from `file` or ask for it.

    A new key is written to `file`, or shown at the terminal and typed back, unless it goes into escrow alone. Raises
    Usage for a typo, Refused for a key of another host.
    """
    if not state.has_recovery_key:
        recovery = delivery.make_recovery_key(delivery.Keeper(file, escrow))
        with disk_keys.mac_key(recovery, state.host) as mac_key:
            state.set_mac_key(persistence=persistence, mac_key=mac_key)
        state.save()
        return recovery
    recovery = delivery.read_recovery_key(file if os.path.exists(file) else "")
    if not access.is_recovery_key(state, persistence=persistence, recovery=recovery):
        raise Refused("this is not the recovery key of this host", "unlock recovery test", code="recovery-key")
    if escrow:
        check_escrow(escrow)
        write_escrow(escrow, recovery)
    return recovery


def new_group(
    work: access.Work, name: str, members: tuple[Member, ...], manifest: int, policy: str = "persistent"
) -> tuple[Group, Secret]:
    """A new group and its KEK, which the provider makes. The disks carry the KEK, unless a policy says otherwise. The
    state knows of the KEK before it is made: where no group comes of it, `rotation.retire_keks` deactivates it."""
    generation = work.state.next_generation(name)
    if work.state.take_name(name, generation):
        work.state.save()
    provider = work.provider()
    made, kek = access.make_key(provider, access.key_name(work.state.host, f"kek/{name}", generation))
    policy = policy if work.state.persistent else "provider"
    return Group(name, f"{provider.id}/{made.id}", generation, manifest, members, made.name, policy), kek


def check_headers(work: access.Work, group: Group, nodes: dict[str, str], accepted: frozenset[str]) -> Facts:
    """Raises Tampered for a member whose header is not as it was when this host made its token: a new token would make
    that authentic. Refused for one that was accepted and does not protect its data. Returns what was checked."""
    facts: Facts = {}
    for member in group.members:
        with luks.Container(nodes[member.uuid]) as container:
            found = _find_changes(work, container)
            if found and member.name in accepted:
                adoptable.check_supported(container, container.disk_size, container.volume_key_size)
                log.note(f"{member.name}: accepted: {'; '.join(found)}")
            facts[member.uuid] = container.facts()
        if found and member.name not in accepted:
            raise Tampered(
                f"{member.name} ({nodes[member.uuid]}) has another header than this host wrote: {'; '.join(found)}",
                f"if you changed it: --accept-changed-header {member.name}",
                "changed-header",
            )
    return facts


def _find_changes(work: access.Work, container: luks.Container) -> list[str]:
    """What differs from the header that this host made a token for, in words; empty where it made none. A token that
    is for the header counts more than what the state has: a command may have been cut off before it saved that."""
    state = work.state
    known = known_changes(state, container)
    try:
        tokens = disk_keys.read_tokens(container, state.host)
    except (NotOurs, Malformed) as error:
        if known is not None:
            return known
        if isinstance(error, Malformed):
            raise
        members = {each.uuid for group in state.groups.values() for each in group.members}
        return ["its token is gone"] if container.uuid in members else []
    keys = work.persistence_keys(container.uuid)
    if any(disk_keys.is_authentic(container, each, key) for each in tokens for key in keys):
        return []
    return known if known is not None else ["what it was is not known, and its token does not authenticate what it is"]


def known_changes(state: State, container: luks.Container) -> list[str] | None:
    """What differs from the header that this host made a token for, by what the state has of it, in words; None where
    it has nothing."""
    known = state.headers.get(container.uuid)
    return changes.describe_changes(strictjson.parse(known), container.facts()) if known else None


def write_member_list(
    work: access.Work, group: Group, nodes: dict[str, str], checked: Facts, *, kek: Secret, recovery: Secret
) -> None:
    """Writes a token with the group's present member list to every member; then removes the old tokens. Takes the KEK
    over. Raises Tampered for a header that is not the one that was checked."""
    state = work.state
    with access.token_keys(work, kek=kek, mac_key=disk_keys.mac_key(recovery, state.host)) as keys:
        written = []
        for member in group.members:
            node = nodes[member.uuid]
            with luks.Container(node) as container:
                changes.require_unchanged(container, checked[member.uuid])
                dek = open_by_recovery_key(state, container, recovery)
                each = disk_keys.make_token(container, state.host, group, member, dek, keys)
                state.headers[member.uuid] = strictjson.canonical(container.facts()).decode()
            disk_keys.write_token(node, each, dek, keys)
            written.append((node, each, dek))
        for node, each, dek in written:
            with dek:
                disk_keys.drop_other_tokens(node, each, dek, keys)


def rewrite_member_list(
    work: access.Work,
    group: Group,
    nodes: Mapping[str, str],
    *,
    kek: Secret,
    new: Mapping[str, Secret] = MappingProxyType({}),
) -> Group:
    """Writes a token with the group's present member list, under its present KEK, to every member in `nodes`, beside
    the old one; when each of them has it, removes the old tokens. Needs no recovery key: the old tokens give the volume
    keys, and authenticate the headers. `new`: LUKS UUID -> volume key of members that have no token yet. The caller
    keeps the keys; nothing is saved.

    Returns the group with those members as behind that are not in `nodes`, or whose old token could not be removed:
    `unlock sync` brings them on. An absent one has an older list, and opens with the group only after that.

    Raises DiskFailed, Tampered, ProviderError when a member does not take the token: then no old token is gone, and
    what was added is taken away again. Killed, the same call finishes. A disk with both lists says that the change is
    not decided: no member may be left out for the newer list while each disk that has it has the older one too.
    """
    with ExitStack() as secrets:
        host_key = secrets.enter_context(work.host_key())
        written: list[_Written] = []
        try:
            for member in group.members:
                if node := nodes.get(member.uuid):
                    mac_key = secrets.enter_context(work.state.mac_key(work.persistence, member.uuid))
                    keys = disk_keys.Keys(persistence=work.persistence, host_key=host_key, kek=kek, mac_key=mac_key)
                    with luks.Container(node) as container:
                        known = new.get(member.uuid)
                        dek = known.copy() if known else access.find_volume_key(work, container, group)
                        secrets.enter_context(dek)
                        each = disk_keys.make_token(container, work.state.host, group, member, dek, keys)
                    written.append(_Written(member, node, each, dek, keys))
                    disk_keys.write_token(node, each, dek, keys)
        except UnlockError:
            _take_back(work.state, group, nodes, written)
            raise
        behind = {each.uuid for each in group.members if each.uuid not in nodes}
        for done in written:
            work.state.drop_old_key(done.member.uuid)
            try:
                disk_keys.drop_other_tokens(done.node, done.token, done.dek, done.keys)
            except UnlockError as error:
                log.error(f"{done.member.name}: its old token stays: {error}", "unlock sync")
                behind.add(done.member.uuid)
    return group._replace(behind=tuple(each.uuid for each in group.members if each.uuid in behind))


class _Written(NamedTuple):
    """A member to which a token was written."""

    member: Member
    node: str
    token: token.Token
    dek: Secret
    keys: disk_keys.Keys


def has_member_list(state: State, group: Group, nodes: Mapping[str, str]) -> bool:
    """Whether a disk has a token with the group's present member list: a change that has got so far is finished, not
    given up."""
    return any(group.manifest in _manifests(state, node) for node in nodes.values())


def _manifests(state: State, node: str) -> list[object]:
    """The member lists of this host's tokens on a disk; empty where it cannot be read."""
    try:
        with luks.Container(node) as container:
            found = container.tokens(token.TYPE)
            return [fields.get("manifest") for _, fields in found if fields.get("host") == state.host]
    except UnlockError:
        return []


def _take_back(state: State, group: Group, nodes: Mapping[str, str], written: list[_Written]) -> None:
    """Removes the tokens that were added, unless an earlier run has removed an old one. Best effort: the error that led
    here is the one to tell."""
    if any(_manifests(state, node) == [group.manifest] for node in nodes.values()):
        return
    for each in written:
        with suppress(UnlockError), luks.Container(each.node) as container:
            for number, fields in container.tokens(token.TYPE):
                if (fields.get("host"), fields.get("manifest")) == (state.host, group.manifest):
                    container.remove_token(number)


def choose_mapping_name(state: State, uuid: str, line: fstab.CrypttabLine | None, group: str, asked: str) -> str:
    """The name that the disk has, in device-mapper or crypttab; else the one asked for, or a new one."""
    has = devices.active_mapping_name(uuid) or (line.name if line else "")
    if has and asked and asked != has:
        raise Refused(f"the disk's mapping name is {has}", "leave --name out", code="name-taken")
    taken = mapping_names_in_use(state).union(
        name for name, other in devices.active_mappings().items() if other != uuid
    )
    name = has or asked or mapping_names(group, 1, taken)[0]
    check_name(name, "mapping")
    if name in taken:
        raise Refused(f"there is a mapping {name} already", "--name NAME", code="name-taken")
    return name


def member_named(state: State, thing: str) -> tuple[Group, Member] | None:
    """The member that a person names: by its device, also one whose header cannot be read, by its LUKS UUID, or by its
    mapping name; the last two also as a path in /dev. None when it names none."""
    members = [(group, member) for group in state.groups.values() for member in group.members]
    folder, _, word = thing.rpartition("/")
    if "/" in thing and os.path.exists(thing) and folder != "/dev/mapper":
        node = os.path.realpath(thing)
        try:
            with luks.Container(node) as container:
                uuid = container.uuid
            return next(((group, member) for group, member in members if member.uuid == uuid), None)
        except UnlockError:
            serial = _serial(node)
            return next(((group, member) for group, member in members if serial and member.serial == serial), None)
    return next(((group, each) for group, each in members if word.lower() == each.uuid or word == each.name), None)


def _serial(node: str) -> str:
    try:
        return udev.find_disk(node).serial
    except UnlockError:
        return ""


def not_a_member(thing: str) -> Refused:
    return Refused(f"{thing} is no disk of a group of this host", "unlock disk list", code="not-a-member")


def mapping_names_in_use(state: State) -> set[str]:
    return {member.name for group in state.groups.values() for member in group.members}


def mounts_needed_before_groups(name: str, root: str = "/") -> list[str]:
    """The mount points on this mapping that a boot needs before it can mount a group, other than the root."""
    return [
        where
        for where in devices.mount_points(root)
        if where != "/" and config.is_needed_before_groups(where) and name in devices.mappings_below(where, root)
    ]


def device_node(device: str) -> str:
    node = os.path.realpath(device)
    if not os.path.exists(node):
        raise Usage(f"{device} does not exist", "lsblk")
    return node


def member_node(seen: dict[str, list[find.Found]], member: Member) -> str:
    """The node of a member that must be there. Raises Refused."""
    node = find.find_node(seen, member)
    if not node:
        raise Refused(
            f"{member.name} of the group is {'there twice' if seen.get(member.uuid) else 'missing'}",
            "plug in every member, once: all are rewritten",
            code="missing",
        )
    return node


def open_by_recovery_key(state: State, container: luks.Container, recovery: Secret) -> Secret:
    """The volume key, by the recovery key, whose keyslot's salt goes into the state. Raises NotOurs, DiskFailed."""
    try:
        slot, dek = disk_keys.recovery_keyslot(container, recovery)
    except NotOurs as error:
        raise NotOurs(str(error), "unlock recovery new", "no-key") from error
    state.recovery.keyslots[container.uuid] = container.salt(slot)
    return dek


def add_to_config(paths: Paths, group: config.GroupConfig) -> None:
    """Appends the group to unlock.toml, unless it is there already."""
    if group.name not in config.load(paths.config).groups:
        config.append_table(paths.config, config.group_table(group))
    if units.is_systemd_running() and paths.root == "/":
        run(["systemctl", "daemon-reload"])
