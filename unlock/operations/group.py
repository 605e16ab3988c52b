# SPDX-License-Identifier: Apache-2.0
"""`unlock group create` and `unlock disk adopt`: make disks members of a group.

A group opens only when every disk has a token with the same member list, so one that is half made never opens.
"""

import os
import shlex
import uuid as uuids
from collections.abc import Iterable
from contextlib import suppress
from typing import Any, NamedTuple

from .. import log, strictjson
from ..disks import adoptable, changes, devices, disk_keys, find, fstab, luks, token, udev
from ..disks.groups import Group, Member, check_name, mapping_names
from ..errors import CommandFailed, Malformed, NotOurs, Refused, Tampered, UnlockError, Usage
from ..host import config, this_boot, units
from ..host.journal import DiskAdoption, GroupCreation
from ..host.lock import exclusive
from ..host.state import State
from ..keys import access, delivery
from ..keys.escrow import Escrow
from ..keys.escrow import check_escrow as check_escrow
from ..keys.escrow import write_escrow as put_in_escrow
from ..paths import TPM_DEVICE, Paths
from ..predict import allowed_states
from ..run import run
from ..secret import Secret

Facts = dict[str, dict[str, Any]]
"""LUKS UUID -> the facts of that header."""


class NewGroup(NamedTuple):
    """The options of `group create`."""

    name: str
    devices: tuple[str, ...]
    mount: str
    profile: str
    """btrfs data profile; '' is raid1 for two disks or more."""
    erase: frozenset[str]
    """Devices whose content may go, by name."""
    recovery_file: str
    """Read if it exists, else written; '' asks at the terminal."""
    policy: str = "persistent"
    """`provider`: the KEK is never kept on this host."""
    escrow: Escrow | None = None
    discard: bool = False
    """Unused blocks are told to the disks."""


def create_group(paths: Paths, wanted: NewGroup) -> Group:
    """Formats disks and makes them a group. Destroys their content. Raises Refused, DiskFailed, Usage.

    An error is undone, and any command may follow; after a kill the same command finishes.
    """
    check_name(wanted.name)
    wanted = wanted._replace(mount=config.normalise_mount_point(wanted.mount))
    with exclusive(paths), access.Work(paths) as work:
        work.settings.check()
        state = work.state
        nodes = [_node(device) for device in wanted.devices]
        unfinished = state.unfinished(GroupCreation, wanted.name)
        if wanted.name in state.groups and not unfinished:
            raise Refused(f"there is a group {wanted.name} already", "unlock status", code="group-exists")
        if wanted.name not in state.groups:
            _check_mount_point(paths, wanted)
            _check_profile(wanted)
            _create(work, wanted, nodes, unfinished)
        group = state.groups[wanted.name]
        kind = _file_system_type(group, wanted)
        _add_to_config(paths, config.GroupConfig(wanted.name, wanted.mount, kind, "", config.DEADLINE, wanted.policy))
        this_boot.mark_open(paths, group.name, [member.name for member in group.members])
        _start(units.mount_unit(wanted.mount))
        state.journal = None
        state.save()
        return group


def _create(work: access.Work, wanted: NewGroup, nodes: list[str], unfinished: GroupCreation | None) -> None:
    state, persistence = work.state, work.persistence
    before = list(unfinished.members) if unfinished else []
    if before and len(before) != len(nodes):
        raise Refused(
            f"group {wanted.name} was begun with {len(before)} disks", "name the same disks", code="unfinished"
        )
    _check_disks(nodes, wanted, before)
    with obtain_recovery_key(state, persistence, wanted.recovery_file, wanted.escrow) as recovery:
        if not before:
            names = mapping_names(
                wanted.name, len(nodes), _mapping_names_in_use(state).union(devices.active_mappings())
            )
            before = [
                Member(str(uuids.uuid4()), name, udev.find_disk(node).serial)
                for name, node in zip(names, nodes, strict=True)
            ]
            state.begin(GroupCreation("group create", wanted.name, members=tuple(before), options=_options(wanted)))
        try:
            group, kek = _new_group(work, wanted.name, tuple(before), 1, wanted.policy)
            made = _format(group, nodes, recovery, wanted.discard)
            _make_file_system(group, wanted)
            with access.token_keys(work, kek=kek, mac_key=disk_keys.mac_key(recovery, state.host)) as keys:
                for member, node in zip(group.members, nodes, strict=True):
                    with luks.Container(node) as container, _open_by_recovery_key(state, container, recovery) as dek:
                        changes.require_unchanged(container, made[member.uuid])
                        each = disk_keys.make_token(container, state.host, group, member, dek, keys)
                        disk_keys.write_token(node, each, dek, keys)
                        state.headers[member.uuid] = strictjson.canonical(container.facts()).decode()
        except UnlockError:
            for member in before:
                luks.abandon(member.name)
            state.journal = None
            state.save()
            raise
    state.groups[group.name] = group
    state.save()


def _options(wanted: NewGroup) -> str:
    """The words after the name, without --erase: at another boot another disk may have that name."""
    words = ["--disk", *wanted.devices, "--mount", wanted.mount, "--policy", wanted.policy]
    if wanted.profile:
        words += ["--profile", wanted.profile]
    if wanted.discard:
        words.append("--discard")
    if wanted.recovery_file:
        words += ["--recovery-key-file", os.path.abspath(wanted.recovery_file)]
    if wanted.escrow:
        to = wanted.escrow.to if wanted.escrow.to.startswith("age1") else os.path.abspath(wanted.escrow.to)
        words += ["--escrow-to", to, "--escrow-file", os.path.abspath(wanted.escrow.file)]
    return shlex.join(words)


def adopt_disk(
    paths: Paths,
    device: str,
    group_name: str,
    passphrase: Secret,
    recovery_file: str,
    name: str = "",
    escrow: Escrow | None = None,
    tcti: str = TPM_DEVICE,
    accepted: Iterable[str] = (),
    separate: bool = False,
) -> Group:
    """Makes an existing LUKS2 disk a member. Its data, keyslots and mapping name stay; a recovery keyslot and a token
    are added. On a disk that is a member already, adds what is missing. `accepted`: mapping names of members whose
    headers were changed by the operator. `separate`: the disk may join file systems that it cannot be a part of.

    Raises NotOurs when it is not LUKS2 or the passphrase is wrong, DiskFailed, Refused; Tampered, code
    `changed-header`, with what differs in the header of a member.
    """
    check_name(group_name)
    with exclusive(paths), access.Work(paths) as work:
        work.settings.check()
        state, persistence = work.state, work.persistence
        node = _node(device)
        with luks.Container(node) as container:
            uuid = container.uuid
            about = f"/dev/disk/by-uuid/{uuid} --group {group_name}"
            known = {each.uuid: (group.name, each) for group in state.groups.values() for each in group.members}
            begun = uuid in known or bool(state.unfinished(DiskAdoption, about))
            adoptable.check_supported(container, container.disk_size, container.volume_key_size)
            facts = container.facts()  # raises what else is wrong with it
            adoptable.check_room(container, container.volume_key_size, state.host, has_keyslot=begun)
            _check_signatures(node)
            dek = container.volume_key(passphrase)
        old = state.groups.get(group_name)
        if uuid in known and known[uuid][0] != group_name:
            raise Refused(f"{device} is in group {known[uuid][0]} already", "unlock status", code="member")
        if uuid in known:
            assert old
            group, member = old, known[uuid][1]
        else:
            line = fstab.find_crypttab_line(paths.crypttab, node=node, luks_uuid=uuid)
            name = _mapping_name(state, uuid, line, group_name, name)
            _check_not_needed(name, group_name, old.members if old else ())
            if old and not separate:
                _check_file_system(work.settings, old, name)
            member = Member(uuid, name, udev.find_disk(node).serial)
            unfinished = state.unfinished(DiskAdoption, about)
            manifest = unfinished.manifest if unfinished else state.next_manifest(group_name)
            group = (old or Group(group_name, "", 0, 0, ()))._replace(
                manifest=manifest, members=(*(old.members if old else ()), member)
            )
        _check_policy(work, group, member)
        seen = work.look() if len(group.members) > 1 else {}
        others = {each.uuid: _node_of(seen, each) for each in group.members if each.uuid != uuid}
        checked = _check_headers(work, group, {**others, uuid: node}, frozenset(accepted))
        with dek, obtain_recovery_key(state, persistence, recovery_file, escrow) as recovery:
            state.begin(DiskAdoption("disk adopt", about, manifest=group.manifest))
            changed = _Changed(node)
            try:
                with luks.Container(node) as container:
                    changes.require_unchanged(container, facts)
                    changed.keyslot = disk_keys.ensure_recovery_keyslot(container, dek=dek, recovery=recovery)
                    changed.flags = container.flags
                    if uuid not in known and line:
                        _take_options_over(container, line)
                    checked[uuid] = container.facts()
                if group.kek:
                    kek, _ = access.find_kek(work, group, {**others, uuid: node})
                else:
                    group, kek = _new_group(work, group_name, group.members, group.manifest)
                _write_member_list(work, group, {**others, uuid: node}, checked, kek=kek, recovery=recovery)
            except UnlockError:
                if uuid not in known:
                    changed.undo(state.host)
                    state.headers.pop(uuid, None)
                state.journal = None
                state.save()
                raise
        if not _is_opened_early(member.name):
            fstab.set_noauto(paths.crypttab, member.name)
            _add_to_config(paths, config.GroupConfig(group_name, "", "", "", config.DEADLINE))
        state.groups[group_name] = group._replace(behind=())
        for each in group.members:  # all are here, and under the present persistence key now
            state.drop_old_key(each.uuid)
        state.journal = None
        state.save()
        if all(devices.active_mapping_name(each.uuid) == each.name for each in group.members):
            this_boot.mark_open(paths, group_name, [each.name for each in group.members])
        allowed_states.tell_root(paths, state, persistence, tcti)
        return group


class _Changed:
    """What `adopt_disk` has changed in the header of a disk that is no member yet, besides the token."""

    def __init__(self, node: str) -> None:
        self.node = node
        self.keyslot: int | None = None
        """The one that was added."""
        self.flags: frozenset[str] | None = None
        """Those that were there before; None while none were changed."""

    def undo(self, host: str) -> None:
        """Does nothing on a disk that has its token. Best effort: the error that led here is the one to tell."""
        try:
            with luks.Container(self.node) as container:
                if any(fields.get("host") == host for _, fields in container.tokens(token.TYPE)):
                    return
                if self.keyslot is not None:
                    container.remove_keyslot(self.keyslot)
                if self.flags is not None and container.flags != self.flags:
                    container.set_flags(self.flags)
        except UnlockError:
            pass


_OPTIONS = {
    "discard": "allow-discards",
    "same-cpu-crypt": "same-cpu-crypt",
    "submit-from-crypt-cpus": "submit-from-crypt-cpus",
    "no-read-workqueue": "no-read-workqueue",
    "no-write-workqueue": "no-write-workqueue",
}
"""Options of crypttab(5) that a header can have -> its flags."""

_ABOUT_OPENING = """
luks noauto auto nofail noearly initramfs quiet loud tries timeout keyscript keyfile-size keyfile-offset
keyfile-timeout key-slot keyslot tpm2-device tpm2-pcrs tpm2-signature tpm2-pin tpm2-measure-pcr tpm2-measure-bank
fido2-device fido2-cid fido2-rp pkcs11-uri token-timeout try-empty-password password-echo password-cache headless cipher
hash size check checkargs precheck _netdev x-initrd.attach x-initrd-attach link-volume-key
"""
"""Options about the passphrase and when it is asked for, or without effect on LUKS2: nothing is lost with them."""


def _take_options_over(container: luks.Container, line: fstab.CrypttabLine) -> None:
    """Puts the options of crypttab that the mapping would lose into the header, and says which are lost."""
    names = {each.partition("=")[0]: each for each in line.options}
    flags = container.flags.union(_OPTIONS[name] for name in names if name in _OPTIONS)
    if flags != container.flags:
        log.note(f"{line.name}: into its header, from crypttab: {', '.join(sorted(flags - container.flags))}")
        container.set_flags(flags)
    expected = {*_OPTIONS, *_ABOUT_OPENING.split()}
    lost = [each for name, each in names.items() if name not in expected and not name.startswith("x-systemd.")]
    if lost:
        log.note(f"{line.name}: without effect from now on, in crypttab: {', '.join(lost)}")


def _new_group(
    work: access.Work, name: str, members: tuple[Member, ...], manifest: int, policy: str = "persistent"
) -> tuple[Group, Secret]:
    """A new group and its KEK, which the provider makes. The disks carry the KEK, unless a policy says otherwise."""
    generation = work.state.next_generation(name)
    provider = work.provider()
    made, kek = access.make_key(provider, access.key_name(work.state.host, f"kek/{name}", generation))
    policy = policy if work.state.persistent else "provider"
    return Group(name, f"{provider.id}/{made.id}", generation, manifest, members, made.name, policy), kek


def _check_policy(work: access.Work, group: Group, member: Member) -> None:
    """The root file system cannot wait for the network. Raises Refused."""
    if member.name in devices.mappings_below("/") and (group.policy == "provider" or not work.state.persistent):
        raise Refused(
            f"{member.name} holds the root file system, and its key would not be kept on this host",
            "unlock persistence enable",
            code="root-needs-persistence",
        )


def _check_not_needed(name: str, group: str, members: tuple[Member, ...]) -> None:
    """Raises Refused for a mapping that holds what the gate of the group waits for. The group that holds the root file
    system has no gate: its members are opened in early boot, or not at all."""
    where = mounts_needed_before_groups(name)
    if where and devices.mappings_below("/").isdisjoint({name, *(each.name for each in members)}):
        raise Refused(
            f"{name} holds {where[0]}, which is needed before group {group} can open",
            f"adopt it into the group of the root file system, or move {where[0]} there",
            code="needed-before-groups",
        )


_ON_ONE_DISK = frozenset(("ext2", "ext3", "ext4", "jfs", "reiserfs", "swap", "xfs"))
"""What lies on one device, by its name for blkid and mount."""


def _check_file_system(settings: config.Config, group: Group, new: str) -> None:
    """Raises Refused where a file system of the group lies on one disk: with another member it opens only when both are
    here. A disk that the boot needs anyway costs nothing."""
    if _is_opened_early(new):
        return
    configured = settings.groups.get(group.name)
    kinds = {each.name: configured.type if configured else "" for each in group.members}
    for each in group.members:
        if name := devices.active_mapping_name(each.uuid):
            with suppress(CommandFailed):
                kinds[each.name] = devices.list_signatures(f"/dev/mapper/{name}").partition(",")[0]
    for name, kind in kinds.items():
        if kind in _ON_ONE_DISK:
            raise Refused(
                f"{name} of group {group.name} holds {kind}, which cannot use a second disk: with {new} as a "
                "member, the group would not open when either is away",
                "--group OTHER, which then begins; or --accept separate-disk",
                code="separate-disk",
            )


def mounts_needed_before_groups(name: str, root: str = "/") -> list[str]:
    """The mount points on this mapping that a boot needs before it can mount a group, other than the root."""
    return [
        where
        for where in devices.mount_points(root)
        if where != "/" and config.is_needed_before_groups(where) and name in devices.mappings_below(where, root)
    ]


def _is_opened_early(name: str) -> bool:
    """Whether nothing but early boot, or crypttab, can open the mapping in time."""
    return name in devices.mappings_below("/") or bool(mounts_needed_before_groups(name))


def _check_headers(work: access.Work, group: Group, nodes: dict[str, str], accepted: frozenset[str]) -> Facts:
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


def _write_member_list(
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
                dek = _open_by_recovery_key(state, container, recovery)
                each = disk_keys.make_token(container, state.host, group, member, dek, keys)
                state.headers[member.uuid] = strictjson.canonical(container.facts()).decode()
            disk_keys.write_token(node, each, dek, keys)
            written.append((node, each, dek))
        for node, each, dek in written:
            with dek:
                disk_keys.drop_other_tokens(node, each, dek, keys)


def _mapping_name(state: State, uuid: str, line: fstab.CrypttabLine | None, group: str, asked: str) -> str:
    """The name that the disk has, in device-mapper or crypttab; else the one asked for, or a new one."""
    has = devices.active_mapping_name(uuid) or (line.name if line else "")
    if has and asked and asked != has:
        raise Refused(f"the disk's mapping name is {has}", "leave --name out", code="name-taken")
    taken = _mapping_names_in_use(state).union(
        name for name, other in devices.active_mappings().items() if other != uuid
    )
    name = has or asked or mapping_names(group, 1, taken)[0]
    check_name(name, "mapping")
    if name in taken:
        raise Refused(f"there is a mapping {name} already", "--name NAME", code="name-taken")
    return name


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
        put_in_escrow(escrow, recovery)
    return recovery


def _node(device: str) -> str:
    node = os.path.realpath(device)
    if not os.path.exists(node):
        raise Usage(f"{device} does not exist", "lsblk")
    return node


def _open_by_recovery_key(state: State, container: luks.Container, recovery: Secret) -> Secret:
    """The volume key, by the recovery key, whose keyslot's salt goes into the state. Raises NotOurs, DiskFailed."""
    try:
        slot, dek = disk_keys.recovery_keyslot(container, recovery)
    except NotOurs as error:
        raise NotOurs(str(error), "unlock recovery new", "no-key") from error
    state.recovery.keyslots[container.uuid] = container.salt(slot)
    return dek


def _mapping_names_in_use(state: State) -> set[str]:
    return {member.name for group in state.groups.values() for member in group.members}


def _node_of(seen: dict[str, list[find.Found]], member: Member) -> str:
    """The node of a member that must be there. Raises Refused."""
    node = find.find_node(seen, member)
    if not node:
        raise Refused(
            f"{member.name} of the group is {'there twice' if seen.get(member.uuid) else 'missing'}",
            "plug in every member, once: all are rewritten",
            code="missing",
        )
    return node


def _check_mount_point(paths: Paths, wanted: NewGroup) -> None:
    where = wanted.mount
    if where in fstab.fstab_targets(paths.fstab):
        raise Refused(f"{paths.fstab} mounts something at {where}", "another --mount", code="mount-taken")
    for group in config.load(paths.config).groups.values():
        if group.mount == where:
            raise Refused(f"group {group.name} is mounted at {where}", "another --mount", code="mount-taken")
    if os.path.realpath(where) != where or (os.path.lexists(where) and not os.path.isdir(where)):
        raise Refused(f"{where} is not a directory, or reached by a link", "another --mount", code="mount-taken")
    if os.path.isdir(where) and (os.path.ismount(where) or os.listdir(where)):
        raise Refused(f"{where} is mounted or not empty", "another --mount", code="mount-taken")


PROFILES = {
    "single": 1,
    "dup": 1,
    "raid0": 1,
    "raid1": 2,
    "raid1c3": 3,
    "raid1c4": 4,
    "raid10": 2,
    "raid5": 2,
    "raid6": 3,
}
"""btrfs data profile -> the fewest disks that mkfs.btrfs takes for it (mkfs.btrfs(8), since btrfs-progs 5.15)."""


def _check_profile(wanted: NewGroup) -> None:
    """Raises Usage for a profile that needs more disks: mkfs.btrfs would refuse it only after the disks are
    formatted."""
    if wanted.profile and wanted.profile not in PROFILES:
        raise Usage(f"{wanted.profile!r} is no btrfs profile", f"--profile takes {', '.join(PROFILES)}")
    least = PROFILES[wanted.profile] if wanted.profile else 1
    if len(wanted.devices) < least:
        raise Usage(f"profile {wanted.profile} needs {least} disks", f"name {least} with --disk, or another --profile")


def _check_disks(nodes: list[str], wanted: NewGroup, before: list[Member]) -> None:
    """Raises Usage, Refused. `before`: the members with which an unfinished run began. A disk with the UUID of one of
    them is half made by that run, and may be formatted again."""
    erase = {os.path.realpath(device) for device in wanted.erase}
    if len(set(nodes)) != len(nodes) or not erase <= set(nodes):
        raise Usage("each disk is named once with --disk, and --erase names some of them")
    for i, node in enumerate(nodes):
        if before and udev.find_disk(node).serial != before[i].serial:
            raise Refused(
                f"{node} is not the disk that group {wanted.name} was begun with (serial {before[i].serial})",
                "name the disks in the same order as before, by /dev/disk/by-id",
                code="unfinished",
            )
        if before and _is_half_made(node, before[i]):
            continue
        used = devices.describe_use(node)
        if used:
            raise Refused(f"{node} is in use: {used}", "lsblk", code="in-use")
        content = devices.list_signatures(node)
        if content and node not in erase:
            raise Refused(f"{node} holds {content}", f"--erase {node} if it may go", code="has-data")


def _is_half_made(node: str, member: Member) -> bool:
    try:
        with luks.Container(node) as container:
            return container.uuid == member.uuid
    except UnlockError:
        return False


def _format(group: Group, nodes: list[str], recovery: Secret, discard: bool) -> Facts:
    """Writes fresh headers with the recovery keyslot, and opens the disks under their mapping names. Returns what the
    headers say."""
    made: Facts = {}
    for member, node in zip(group.members, nodes, strict=True):
        if devices.active_mapping_name(member.uuid):
            luks.deactivate(member.name)
        run(["wipefs", "--all", "--quiet", node])
        with Secret.random(64) as dek, luks.format(node, dek, uuid=member.uuid) as container:
            container.add_keyslot(dek, passphrase=recovery)
            if discard:
                container.set_flags(frozenset({"allow-discards"}))
            container.activate(member.name, dek)
            made[member.uuid] = container.facts()
    return made


def _file_system_type(group: Group, wanted: NewGroup) -> str:
    return "btrfs" if len(group.members) > 1 or wanted.profile else "ext4"


def _make_file_system(group: Group, wanted: NewGroup) -> None:
    mappings = [f"/dev/mapper/{member.name}" for member in group.members]
    if _file_system_type(group, wanted) == "ext4":
        run(["mkfs.ext4", "-q", "-F", "-L", group.name[:16], *mappings])
        return
    metadata = "raid1" if len(mappings) > 1 else "dup"
    profile = wanted.profile or metadata
    run(["mkfs.btrfs", "-q", "-f", "-L", group.name, "-d", profile, "-m", metadata, *mappings])


def _add_to_config(paths: Paths, group: config.GroupConfig) -> None:
    """Appends the group to unlock.toml, unless it is there already."""
    if group.name not in config.load(paths.config).groups:
        config.append_table(paths.config, config.group_table(group))
    if units.is_systemd_running() and paths.root == "/":
        run(["systemctl", "daemon-reload"])


def _start(unit: str) -> None:
    if units.is_systemd_running():
        run(["systemctl", "start", unit])


def _check_signatures(node: str) -> None:
    """Raises Refused for a disk on which blkid, and so udev, finds something else than LUKS2: nothing would open it."""
    try:
        found = run(["blkid", "--probe", "--output", "value", "--match-tag", "TYPE", node]).strip()
    except CommandFailed:  # it finds several
        found = ""
    if found == "crypto_LUKS":
        return
    others = [each for each in devices.list_signatures(node).split(", ") if each and not each.startswith("crypto_LUKS")]
    kinds = ",".join(dict.fromkeys([found] * bool(found) + [each for each in others if not each.startswith("label ")]))
    raise Refused(
        f"{node} has an older signature beside LUKS2 ({kinds}), so that udev takes it for something else",
        f"if that is not in use: wipefs --backup --all --types {kinds} {node}",
        "other-signature",
    )
