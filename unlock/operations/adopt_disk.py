# SPDX-License-Identifier: Apache-2.0
"""`unlock disk adopt`: takes in an existing LUKS2 disk. Its data, keyslots and mapping name stay."""

from collections.abc import Iterable
from contextlib import suppress

from .. import journald, log, messages
from ..disks import adoptable, changes, devices, disk_keys, fstab, luks, other_tokens, token, udev
from ..disks.groups import Group, Member, check_name
from ..errors import CommandFailed, NotOurs, Refused, UnlockError
from ..host import config, this_boot
from ..host.journal import DiskAdoption
from ..host.lock import exclusive
from ..keys import access, rotation
from ..keys.escrow import Escrow
from ..paths import TPM_DEVICE, Paths
from ..predict import allowed_states
from ..run import run
from ..secret import Secret
from . import group_disks, membership


def adopt_disk(
    paths: Paths,
    device: str,
    group_name: str,
    passphrase: Secret | None,
    recovery_file: str,
    name: str = "",
    escrow: Escrow | None = None,
    tcti: str = TPM_DEVICE,
    accepted: Iterable[str] = (),
    separate: bool = False,
    via: str = "",
) -> Group:
    """Makes an existing LUKS2 disk a member. Its data, keyslots and mapping name stay; a recovery keyslot and a token
    are added. On a disk that is a member already, adds what is missing. `accepted`: mapping names of members whose
    headers were changed by the operator. `separate`: the disk may join file systems that it cannot be a part of. `via`:
    instead of a passphrase, a kind of token that the disk has: a key of other_tokens.TYPES.

    Raises NotOurs when it is not LUKS2 or the passphrase is wrong, DiskFailed, Refused; Tampered, code
    `changed-header`, with what differs in the header of a member.
    """
    check_name(group_name)
    with exclusive(paths), access.Work(paths) as work:
        work.settings.check()
        state, persistence = work.state, work.persistence
        node = membership.device_node(device)
        with luks.Container(node) as container:
            uuid = container.uuid
            about = f"/dev/disk/by-uuid/{uuid} --group {group_name}"
            known = {each.uuid: (group.name, each) for group in state.groups.values() for each in group.members}
            unfinished = state.unfinished(DiskAdoption, about)
            begun = uuid in known or bool(unfinished)
            adoptable.check_supported(container, container.disk_size, container.volume_key_size)
            facts = container.facts()  # raises what else is wrong with it
            adoptable.check_room(container, container.volume_key_size, state.host, has_keyslot=begun)
            _check_signatures(node)
            before = tuple(container.keyslots()), tuple(sorted(container.flags))
            dek = container.volume_key(passphrase) if passphrase else other_tokens.volume_key(container, via)
        old = state.groups.get(group_name)
        if uuid in known and known[uuid][0] != group_name:
            raise Refused(f"{device} is in group {known[uuid][0]} already", "unlock status", code="member")
        if uuid in known:
            assert old
            group, member = old, known[uuid][1]
        else:
            line = fstab.find_crypttab_line(paths.crypttab, node=node, luks_uuid=uuid)
            name = name or (unfinished.name if unfinished else "") or ""
            name = membership.choose_mapping_name(state, uuid, line, group_name, name)
            _check_not_needed(name, group_name, old.members if old else ())
            if old and not separate:
                _check_file_system(work.settings, old, name)
            member = Member(uuid, name, udev.find_disk(node).serial)
            manifest = unfinished.manifest if unfinished else state.next_manifest(group_name)
            group = (old or Group(group_name, "", 0, 0, ()))._replace(
                manifest=manifest, members=(*(old.members if old else ()), member)
            )
        _check_policy(work, group, member)
        seen = work.look() if len(group.members) > 1 else {}
        others = {each.uuid: membership.member_node(seen, each) for each in group.members if each.uuid != uuid}
        checked = membership.check_headers(work, group, {**others, uuid: node}, frozenset(accepted))
        with dek, membership.obtain_recovery_key(state, persistence, recovery_file, escrow) as recovery:
            if unfinished and unfinished.keyslots is not None and unfinished.flags is not None:
                before = unfinished.keyslots, unfinished.flags
            entry = DiskAdoption("disk adopt", about, group.manifest, member.name, *before)
            state.begin(entry)
            try:
                with luks.Container(node) as container:
                    changes.require_unchanged(container, facts)
                    disk_keys.ensure_recovery_keyslot(container, dek=dek, recovery=recovery)
                    if uuid not in known and line:
                        _take_options_over(container, line)
                    checked[uuid] = container.facts()
                if group.kek:
                    kek, _ = access.find_kek(work, group, {**others, uuid: node})
                else:
                    group, kek = membership.new_group(work, group_name, group.members, group.manifest)
                membership.write_member_list(work, group, {**others, uuid: node}, checked, kek=kek, recovery=recovery)
            except UnlockError:
                if uuid not in known:
                    _undo(node, entry, state.host, recovery)
                    state.headers.pop(uuid, None)
                state.journal = None
                state.save()
                rotation.retire_or_tell(work)
                raise
        if not _is_opened_early(member.name):
            fstab.set_noauto(paths.crypttab, member.name)
            membership.add_to_config(paths, config.GroupConfig(group_name, "", "", "", config.DEADLINE))
        state.groups[group_name] = group._replace(behind=())
        for each in group.members:  # all are here, and under the present persistence key now
            state.drop_old_key(each.uuid)
        state.journal = None
        state.save()
        words = f"{member.name} ({uuid}) is adopted into group {group_name}"
        journald.record(paths, messages.DISK_ADOPTED, words, disk=member.name, uuid=uuid, group=group_name)
        if all(devices.active_mapping_name(each.uuid) == each.name for each in group.members):
            this_boot.mark_open(paths, group_name, [each.name for each in group.members])
        allowed_states.tell_root(paths, state, persistence, tcti)
        return group


def _undo(node: str, entry: DiskAdoption, host: str, recovery: Secret) -> None:
    """Takes away the keyslot and the flags that this run, or one that was killed, has added to a disk that is no member
    yet. Does nothing on a disk that has its token: other members may have theirs by then. Best effort: the error that
    led here is the one to tell."""
    try:
        with luks.Container(node) as container:
            if any(fields.get("host") == host for _, fields in container.tokens(token.TYPE)):
                return
            with suppress(NotOurs):
                slot, dek = disk_keys.recovery_keyslot(container, recovery)
                dek.wipe()
                if entry.keyslots is not None and slot not in entry.keyslots:
                    container.remove_keyslot(slot)
            if entry.flags is not None and container.flags != frozenset(entry.flags):
                container.set_flags(frozenset(entry.flags))
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
    where = membership.mounts_needed_before_groups(name)
    if where and devices.mappings_below("/").isdisjoint({name, *(each.name for each in members)}):
        raise Refused(
            f"{name} holds {where[0]}, which is needed before group {group} can open",
            f"adopt it into the group of the root file system, or move {where[0]} there",
            code="needed-before-groups",
        )


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
        if kind in group_disks.ON_ONE_DISK:
            raise Refused(
                f"{name} of group {group.name} holds {kind}, which cannot use a second disk: with {new} as a "
                "member, the group would not open when either is away",
                "--group OTHER, which then begins; or --accept separate-disk",
                code="separate-disk",
            )


def _is_opened_early(name: str) -> bool:
    """Whether nothing but early boot, or crypttab, can open the mapping in time."""
    return name in devices.mappings_below("/") or bool(membership.mounts_needed_before_groups(name))


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
