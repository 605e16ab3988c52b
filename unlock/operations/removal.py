# SPDX-License-Identifier: Apache-2.0
"""`unlock boot removal`: what the removal of unlock from this host means, and whether the operator accepts it by name.
The package's scripts run it before any file goes.

    state, unlock.toml ──> what no boot opens any more ──> each name accepted ──> crypttab ──> guards ──> what stays

- crypttab: a line for each disk of the root file system that has none, so that the stock initramfs asks for it.
- guards: /etc/unlock/guards has a mount unit that fails for each mount point of a group. The generator unlock-guard,
  which stays, gives them to systemd while unlock.toml names the mount point: no service writes into the bare directory.
- what stays in the TPM and on the disks, in words, for the purge, which has no program any more.

Nothing is removed here. What is written hurts no host that keeps unlock: its own generator's units come before the
guards.
"""

import os
import shutil
from collections.abc import Iterable
from typing import NamedTuple

from .. import initramfs, log
from ..disks import devices, fstab
from ..disks.groups import Group, Member
from ..errors import Malformed, Refused, UnlockError
from ..host import config, units, wrong_config
from ..host.journal import command
from ..host.state import State
from ..paths import Paths, sync_folder, write_atomically
from ..predict import initramfs_images
from ..predict.boot_tree import BootTree
from ..tpm.chip import Tpm
from ..tpm.record import SLOTS
from .membership import mounts_needed_before_groups

UNFINISHED = "unfinished-operation"
"""The word for an operation under way."""
UNKNOWN = "unknown-groups"
"""The word where the state cannot be read."""

GUARD = """\
# {place}
[Unit]
Description={where}, of a group that unlock does not open any more
SourcePath=/etc/unlock/unlock.toml
DefaultDependencies=no
After=local-fs-pre.target
Conflicts=umount.target
Before=umount.target

[Mount]
What=/etc/unlock/unlock.toml
Where={where}
Type=unlock
"""
"""Without mount.unlock there is nothing that mounts this type."""


class Loss(NamedTuple):
    """What a host without unlock does not do any more."""

    words: tuple[str, ...]
    """Each is to be named by the operator."""
    lines: tuple[str, ...]
    """The same in sentences."""
    bare: tuple[str, ...]
    """Mount points of groups."""
    roots: tuple[Member, ...]
    """Disks that the initramfs has to open."""
    members: tuple[Member, ...]


def removal(paths: Paths, accepted: Iterable[str]) -> int:
    """Says what is lost. Raises Refused, code `groups-stay-closed`, where a word of it is not among `accepted`."""
    lost = find_loss(paths)
    for line in lost.lines:
        log.note(line)
    if missing := set(lost.words).difference(accepted):
        words = " ".join(lost.words)
        raise Refused(
            f"unlock is not removed: not accepted by name: {' '.join(sorted(missing))}",
            f"type {words} as the answer, or: echo 'unlock unlock/remove string {words}' | debconf-set-selections",
            code="groups-stay-closed",
        )
    if lost.words or os.path.exists(paths.state):
        _prepare(paths, lost)
    return 0


def find_loss(paths: Paths) -> Loss:
    """Reads state and configuration."""
    words, lines = list[str](), list[str]()
    groups: dict[str, Group] = {}
    try:
        state = State.load(paths)
        groups = state.groups
        if state.journal:
            words.append(UNFINISHED)
            lines.append(f"`{command(state.journal)}` is not finished; without unlock, nothing finishes it")
    except Refused:
        pass  # never initialised, or unlock.toml still names the groups
    except Malformed as error:
        words.append(UNKNOWN)
        lines.append(f"{error}: there may be groups that are not listed here")
    mounts, bare = _read_mounts(paths)
    roots = [each for group in groups.values() for each in group.members if _is_needed_early(each)]
    for name in sorted({*groups, *mounts}):
        members = groups[name].members if name in groups else ()
        lines.append(_describe(name, members, mounts.get(name, ""), set(members) & set(roots) != set()))
    if older := initramfs_images.list_images(BootTree(paths))[:-1]:
        names, rebuild = " ".join(map(os.path.basename, older)), initramfs.of_host(paths.root).rebuild_every
        lines.append(f"only the newest kernel's initramfs is made anew; unlock may stay in {names} until: {rebuild}")
    if groups or mounts:
        lines.append("each disk opens with the recovery key: cryptsetup open DEVICE NAME")
    return Loss(
        words=(*sorted({*groups, *mounts}), *words),
        lines=tuple(lines),
        bare=tuple(bare),
        roots=tuple(roots),
        members=tuple(each for group in groups.values() for each in group.members),
    )


def _describe(name: str, members: tuple[Member, ...], where: str, root: bool) -> str:
    disks = ", ".join(each.name for each in members) or "disks not known"
    if root:
        return f"group {name} ({disks}): without unlock, each boot asks for a passphrase of it, or its recovery key"
    words = f"group {name} ({disks}): without unlock, no boot opens it"
    return f"{words}; nothing is mounted at {where}, and what requires that fails" if where else words


def _is_needed_early(member: Member) -> bool:
    return member.name in devices.mappings_below("/") or bool(mounts_needed_before_groups(member.name))


def _read_mounts(paths: Paths) -> tuple[dict[str, str], list[str]]:
    """(group -> mount point, all mount points, those of a file that is wrong too), as the generator finds them."""
    try:
        with open(paths.config, "rb") as file:
            content = file.read()
    except FileNotFoundError:
        return {}, []
    try:
        settings = config.parse(content.decode())
    except (Malformed, ValueError):
        names, places = wrong_config.find_in_text(content.decode(errors="replace"))
        return dict.fromkeys(names, ""), sorted(places.named | places.guessed)
    mounts = {group.name: group.mount for group in settings.groups.values()}
    bare = {each for each in mounts.values() if each}
    for table, fault in settings.faults.items():
        kind, _, name = table.partition(".")
        if kind == "group":
            mounts[name] = ""
            bare |= wrong_config.find_mount_points(fault.value).named
    return mounts, sorted(bare)


def _prepare(paths: Paths, lost: Loss) -> None:
    """Writes what a host without unlock needs; durable when it returns. Raises OSError."""
    lined = fstab.crypttab_names(paths.crypttab)
    for each in lost.roots:
        if each.name not in lined:
            fstab.add_crypttab_line(paths.crypttab, f"{each.name} UUID={each.uuid} none luks,initramfs")
            log.note(f"{paths.crypttab}: a line for {each.name}, so that the initramfs asks for it")
    folder = os.path.join(os.path.dirname(paths.config), "guards")
    shutil.rmtree(folder, ignore_errors=True)
    for where in lost.bare:
        unit = GUARD.format(place=where, where=where.replace("%", "%%"))
        write_atomically(os.path.join(folder, units.mount_unit(where)), unit.encode(), mode=0o644)
    sync_folder(os.path.dirname(paths.config))
    if os.path.isdir(os.path.dirname(paths.state)):
        text = log.join_lines(_what_stays(lost))
        write_atomically(os.path.join(os.path.dirname(paths.state), "after-removal"), f"{text}\n".encode())


def _what_stays(lost: Loss) -> list[str]:
    lines = []
    taken = _taken_handles()
    for slot in SLOTS:
        if slot.object in taken:
            lines.append(f"in the TPM, a sealed key: tpm2_evictcontrol -C o -c {slot.object:#x}")
        if slot.nv in taken:
            lines.append(f"in the TPM, its record: tpm2_nvundefine -C o {slot.nv:#x}")
    lines += [
        f"on disk {each.name} (UUID {each.uuid}): keys that only this host's TPM and state unwrap, and the keyslot of "
        "the recovery key: cryptsetup luksDump"
        for each in lost.members
    ]
    lines += [
        f"{where} is a bare directory from now on: what requires it does not wait any more" for where in lost.bare
    ]
    return lines


def _taken_handles() -> tuple[int, ...]:
    """All there may be, where the TPM does not answer."""
    from ..host.this_boot import tpm_device

    try:
        with Tpm(tpm_device()) as tpm:
            return tpm.facts().taken
    except UnlockError:
        return tuple(handle for slot in SLOTS for handle in (slot.object, slot.nv))
