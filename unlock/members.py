# SPDX-License-Identifier: Apache-2.0
"""Disks become members of groups: `unlock group create`, `unlock disk adopt`.

Nothing half-made is believed: a group opens only when every disk has a token with the same member list.
"""

import os
import uuid as uuids
from typing import NamedTuple

from . import ask, config, devices, disk, keyring, log, luks, recoverykey, tables, thisboot, units
from .errors import NoKey, Refused, UnlockError, Usage
from .groups import Group, Member, check_name, mapping_names
from .paths import Paths, write_atomically
from .providers import native
from .run import run
from .secret import Secret
from .state import State, exclusive


class NewGroup(NamedTuple):
    """What `group create` was asked for."""

    name: str
    devices: tuple[str, ...]
    mount: str
    profile: str
    """btrfs data profile; '' is raid1 for two disks or more."""
    erase: frozenset[str]
    """Devices whose content may go, by name."""
    recovery_file: str
    """Read if it exists, else written; '' asks at the terminal."""


def group_create(paths: Paths, wanted: NewGroup) -> Group:
    """Formats disks and makes them a group. Destroys what is on them. Raises Refused, DiskFailed, Usage."""
    check_name(wanted.name)
    config.check_mount_point(wanted.mount)
    with exclusive(paths):
        state = State.load(paths)
        persistence = _persistence()
        nodes = [_node(device) for device in wanted.devices]
        if wanted.name in state.groups:
            return _finish_create(paths, state, wanted, nodes)
        journal = _unfinished(state, "group create", wanted.name, nodes)
        _check_mount_is_free(paths, wanted)
        _check_disks(nodes, wanted, journal)
        with recovery_key(state, persistence, wanted.recovery_file) as recovery:
            if journal:
                members = tuple(Member(**each) for each in journal["members"])
            else:
                names = mapping_names(wanted.name, len(nodes), _names(state).union(devices.mappings()))
                members = tuple(
                    Member(str(uuids.uuid4()), name, devices.disk(node).serial)
                    for name, node in zip(names, nodes, strict=True)
                )
                state.begin(
                    {
                        "operation": "group create",
                        "group": wanted.name,
                        "nodes": nodes,
                        "members": [member._asdict() for member in members],
                    }
                )
            kek_id = f"{state.provider_id}/kek/{wanted.name}"
            group = Group(wanted.name, kek_id, 1, 1, members)
            _format(group, nodes, recovery)
            file_system = _make_file_system(group, wanted.profile)
            with _keys(state, persistence, group, recovery) as keys:
                for member, node in zip(members, nodes, strict=True):
                    with luks.Container(node) as container, container.volume_key(recovery) as dek:
                        each = disk.make_token(container, state.host, group, member, dek, keys.keys)
                        disk.write_token(node, each, dek, persistence)
        state.groups[group.name] = group
        state.journal = None
        state.save()
        _add_to_config(paths, wanted, file_system)
        _start(paths, wanted, group)
        return group


def disk_adopt(
    paths: Paths, device: str, group_name: str, passphrase: Secret, recovery_file: str, name: str = ""
) -> Group:
    """Takes in an existing LUKS2 disk. Its data, keyslots and mapping name stay; a recovery keyslot and a token
    are added. Raises NotOurs when it is not LUKS2, DiskFailed for a wrong passphrase, Refused."""
    check_name(group_name)
    with exclusive(paths):
        state = State.load(paths)
        persistence = _persistence()
        node = _node(device)
        with luks.Container(node) as container:
            luks_uuid = container.uuid
            known = {member.uuid: group for group in state.groups.values() for member in group.members}
            if luks_uuid in known:
                if known[luks_uuid].name == group_name:
                    return known[luks_uuid]
                raise Refused(f"{device} is in group {known[luks_uuid].name} already", "unlock status", code="member")
            _check_adoptable(container, device)
            dek = container.volume_key(passphrase)
        mapping = name or devices.mapping_of(luks_uuid) or tables.name_of(paths.crypttab, node, luks_uuid)
        taken = _names(state)
        if not mapping:
            mapping = mapping_names(group_name, 1, taken.union(devices.mappings()))[0]
        check_name(mapping, "mapping")
        if mapping in taken:
            raise Refused(
                f"a disk of this host has the mapping name {mapping} already",
                "--name NAME",
                code="name-taken",
            )
        old = state.groups.get(group_name)
        others = {member.uuid: _device_of(member) for member in (old.members if old else ())}
        member = Member(luks_uuid, mapping, devices.disk(node).serial)
        group = Group(
            group_name,
            old.kek if old else f"{state.provider_id}/kek/{group_name}",
            old.generation if old else 1,
            (old.manifest if old else 0) + 1,
            ((*old.members,) if old else ()) + (member,),
        )
        with dek, recovery_key(state, persistence, recovery_file) as recovery:
            state.begin({"operation": "disk adopt", "group": group_name, "uuid": luks_uuid})
            with luks.Container(node) as container:
                _add_recovery_keyslot(container, dek, recovery)
            with _keys(state, persistence, group, recovery) as keys:
                written = []
                for each_member in group.members:
                    where = others.get(each_member.uuid, node)
                    with luks.Container(where) as container:
                        each_dek = Secret(dek.value) if where == node else container.volume_key(recovery)
                        each = disk.make_token(container, state.host, group, each_member, each_dek, keys.keys)
                    disk.write_token(where, each, each_dek, persistence)
                    written.append((where, each, each_dek))
                for where, each, each_dek in written:
                    with each_dek:
                        disk.drop_other_tokens(where, each, each_dek, persistence)
        if mapping not in devices.names_below("/"):
            tables.set_noauto(paths.crypttab, mapping)
        state.groups[group_name] = group
        state.journal = None
        state.save()
        if devices.mapping_of(luks_uuid) == mapping and all(devices.mapping_of(each.uuid) for each in group.members):
            thisboot.mark_open(paths, group_name, mapping)
        return group


def recovery_key(state: State, persistence: Secret, file: str) -> Secret:
    """This host's recovery key: made the first time, asked for later.

    A named file is read if it exists and written if not. At a terminal a new key is shown and typed back.
    Raises Usage for a typo, Refused for a key of another host.
    """
    if file and os.path.exists(file):
        with ask.from_file(file) as text:
            recovery = recoverykey.parse(text)
    elif state.has_recovery_key:
        with ask.terminal("recovery key of this host", "--recovery-key-file") as typed:
            recovery = recoverykey.parse(typed)
    elif file:
        recovery = recoverykey.new()
        recoverykey.write_new_file(file, recovery)
    else:
        recovery = _show_and_type_back()
    with disk.mac_key(recovery, state.host) as mac_key:
        if not state.has_recovery_key:
            state.set_mac_key(persistence, mac_key)
            state.save()
        else:
            with state.mac_key(persistence) as expected:
                if mac_key != expected:
                    raise Refused("this is not the recovery key of this host", "unlock status", code="recovery-key")
    return recovery


def _show_and_type_back() -> Secret:
    recovery = recoverykey.new()
    shown = b"\nRecovery key of this host. It opens every disk, on any machine. Keep it off this host:\n\n    "
    if not ask.show(shown + bytes(recovery) + b"\n\n"):
        raise Usage("there is no terminal to show the recovery key on", "--recovery-key-file FILE")
    for _ in range(5):
        with ask.terminal("type it back", "--recovery-key-file") as typed:
            try:
                if recoverykey.parse(typed) == recovery:
                    return recovery
                log.note("that is another key")
            except Usage as error:
                log.note(str(error))
    raise Refused("the recovery key was not typed back; nothing was changed", code="recovery-key")


class _Keys:
    """The keys of one operation, wiped together."""

    def __init__(self, *secrets: Secret) -> None:
        self.keys = disk.Keys(*secrets)

    def __enter__(self) -> "_Keys":
        return self

    def __exit__(self, *_: object) -> None:
        for secret in self.keys[1:]:
            secret.wipe()


def _keys(state: State, persistence: Secret, group: Group, recovery: Secret) -> _Keys:
    with native.Native(state.kdk(persistence), state.host) as provider:
        kek = provider.key(f"kek/{group.name}", group.generation)
    return _Keys(persistence, state.host_key(persistence), kek, disk.mac_key(recovery, state.host))


def _persistence() -> Secret:
    try:
        return keyring.get("unlock:persistence")
    except NoKey as error:
        raise NoKey(
            "the persistence key is not in the key cache: this boot was not unsealed", "unlock status"
        ) from error


def _node(device: str) -> str:
    node = os.path.realpath(device)
    if not os.path.exists(node):
        raise Usage(f"{device} does not exist", "lsblk")
    return node


def _add_recovery_keyslot(container: luks.Container, dek: Secret, recovery: Secret) -> None:
    """Unless an earlier attempt did. The other keyslots are left alone."""
    try:
        container.test_passphrase(recovery)
    except UnlockError:
        container.add_keyslot(dek, recovery)


def _names(state: State) -> set[str]:
    return {member.name for group in state.groups.values() for member in group.members}


def _device_of(member: Member) -> str:
    """The node of a member that must be there. Raises Refused."""
    for found in devices.marked():
        try:
            with luks.Container(found.node) as container:
                if container.uuid == member.uuid:
                    return found.node
        except UnlockError:
            continue
    raise Refused(
        f"{member.name} of the group is missing",
        "plug it in first: every member is rewritten",
        code="missing",
    )


def _unfinished(state: State, operation: str, group: str, nodes: list[str]) -> dict[str, list[dict[str, str]]] | None:
    """The journal entry of the same operation on the same disks, killed earlier."""
    entry = state.journal
    if not entry:
        return None
    if entry["operation"] != operation or entry["group"] != group or entry["nodes"] != nodes:
        raise Refused(
            f"`unlock {entry['operation']} {entry.get('group', '')}` is not finished",
            "run it again as before: " + " ".join(entry.get("nodes", [])),
            code="unfinished",
        )
    return entry


def _check_mount_is_free(paths: Paths, wanted: NewGroup) -> None:
    if wanted.mount in tables.fstab_targets(paths.fstab):
        raise Refused(f"{paths.fstab} mounts something at {wanted.mount}", "another --mount", code="mount-taken")
    for group in config.load(paths.config).groups.values():
        if group.mount == wanted.mount:
            raise Refused(f"group {group.name} is mounted at {wanted.mount}", "another --mount", code="mount-taken")


def _check_disks(nodes: list[str], wanted: NewGroup, journal: object) -> None:
    if len(set(nodes)) != len(nodes):
        raise Usage("one disk is named twice")
    erase = {os.path.realpath(device) for device in wanted.erase}
    for node in nodes:
        if journal:
            continue  # checked then; what is on it now is ours, half made
        used = devices.in_use(node)
        if used:
            raise Refused(f"{node} is in use: {used}", "lsblk", code="in-use")
        content = devices.contents(node)
        if content and node not in erase:
            raise Refused(f"{node} holds {content}", f"--erase {node} if it may go", code="has-data")


def _format(group: Group, nodes: list[str], recovery: Secret) -> None:
    """Fresh headers with the recovery keyslot, open under their names."""
    for member, node in zip(group.members, nodes, strict=True):
        if devices.mapping_of(member.uuid):
            luks.deactivate(member.name)
        run(["wipefs", "--all", "--quiet", node])
        with Secret.random(64) as dek, luks.format(node, dek, uuid=member.uuid) as container:
            container.add_keyslot(dek, recovery)
            container.activate(member.name, dek)


def _make_file_system(group: Group, profile: str) -> str:
    mappings = [f"/dev/mapper/{member.name}" for member in group.members]
    if len(mappings) == 1 and not profile:
        run(["mkfs.ext4", "-q", "-F", "-L", group.name[:16], *mappings])
        return "ext4"
    profile = profile or "raid1"
    metadata = "raid1" if len(mappings) > 1 else "dup"
    run(["mkfs.btrfs", "-q", "-f", "-L", group.name, "-d", profile, "-m", metadata, *mappings])
    return "btrfs"


def _add_to_config(paths: Paths, wanted: NewGroup, file_system: str) -> None:
    try:
        with open(paths.config, encoding="utf-8") as file:
            text = file.read()
    except FileNotFoundError:
        text = config.HEAD
    table = config.GroupConfig(wanted.name, wanted.mount, file_system, "", config.DEADLINE)
    write_atomically(paths.config, (text.rstrip("\n") + "\n" + config.group_table(table)).encode(), mode=0o644)


def _finish_create(paths: Paths, state: State, wanted: NewGroup, nodes: list[str]) -> Group:
    """The group is whole but the command was killed before it was configured and mounted."""
    group = state.groups[wanted.name]
    if wanted.name in config.load(paths.config).groups:
        raise Refused(f"there is a group {wanted.name} already", "unlock status", code="group-exists")
    _add_to_config(paths, wanted, "ext4" if len(nodes) == 1 and not wanted.profile else "btrfs")
    _start(paths, wanted, group)
    return group


def _start(paths: Paths, wanted: NewGroup, group: Group) -> None:
    """The group's units, as at the next boot."""
    thisboot.mark_open(paths, group.name, group.members[0].name)
    if os.path.exists("/run/systemd/system"):
        run(["systemctl", "daemon-reload"])
        run(["systemctl", "start", units.mount(wanted.mount)])


def _check_adoptable(container: luks.Container, device: str) -> None:
    facts = container.facts()
    if facts["requirements"]:
        raise Refused(f"{device} is being re-encrypted", "cryptsetup reencrypt --resume-only", code="reencrypting")
    for segment in facts["segments"].values():
        if segment.get("type") != "crypt" or "cipher_null" in str(segment.get("encryption")):
            raise Refused(f"{device} is not encrypted throughout", "cryptsetup luksDump", code="not-encrypted")
