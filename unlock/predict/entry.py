# SPDX-License-Identifier: Apache-2.0
"""Boots that may come next: what is looked at, what is said of each, and what all ways of booting have in common.

grub_menu  shim ──> GRUB ──> kernel and initramfs
uki        a unified kernel image, with or without systemd-boot
efistub    the firmware starts the kernel
"""

import os
from collections.abc import Iterable, Mapping
from hashlib import sha256
from typing import NamedTuple

from ..measured import eventlog
from ..measured.eventlog import Event, Log
from ..paths import Paths
from ..tpm import pcr_policy
from . import boot_files
from .boot_files import Booted

_UNSIGNED = "it is not signed, and Secure Boot is on"


class Entry(NamedTuple):
    """A boot that may come next."""

    words: str
    """kernel 6.12.48; with the boot menu's title for all but the default entry."""
    changes: tuple[str, ...]
    """What differs from this boot."""
    values: Mapping[int, bytes] | None
    """PCRs 0 to 15 when early boot asks the TPM; None when they cannot be told."""
    why: str
    """Why not; empty when they can."""
    default: bool
    initrd: str = ""
    """The file with its initramfs, or the unified kernel image that it is in, below the root directory; "" when that is
    not known."""
    doubt: str = ""
    """What the values depend on; "" when that is nothing."""


class World(NamedTuple):
    """All that is looked at."""

    paths: Paths
    log: Log
    before: Booted
    later: tuple[Event, ...]
    """What systemd measured before early boot asked the TPM."""
    values: Mapping[int, bytes]
    """PCRs of this boot at that time."""
    secure: bool
    """Whether Secure Boot is on, and who signed counts: the policy has PCR 7."""


def predicted(
    world: World, words: str, changes: Iterable[str], events: Iterable[Event], default: bool, kernel: str
) -> Entry:
    """PCRs that are as the log has them now keep their value, whatever that is; of the others, the log must account.
    `kernel`: the file that comes in the place of this boot's kernel, or unified kernel image; "" for one on no disk."""
    before = loaders(world)
    old = next((path for digest, path in reversed(world.before.images) if (digest, path) not in before), "")
    unsigned, doubt = signed(world, old, kernel)
    if unsigned:
        return Entry(words, tuple(changes), None, unsigned, default)
    now = {digest: boot_files.authenticode(world.paths, path) or digest for digest, path in before}
    changes = [*changes, *(["boot loader"] if any(old != new for old, new in now.items()) else [])]
    events = [each._replace(digest=now.get(each.digest or b"", each.digest)) for each in events]
    was = eventlog.replay([*world.log.events, *world.later], world.log.locality)
    will = eventlog.replay([*events, *world.later], world.log.locality)
    values = dict(world.values)
    for pcr in range(16):
        if pcr == pcr_policy.CAP_PCR or was.get(pcr) == will.get(pcr):
            continue
        if was.get(pcr) != world.values.get(pcr) or pcr not in will:
            return Entry(words, tuple(changes), None, f"the event log does not account for PCR {pcr}", default)
        values[pcr] = will[pcr]
    return Entry(words, tuple(changes), values, "", default, doubt=doubt)


def signed(world: World, old: str, new: str) -> tuple[str, str]:
    """Why a program that comes in the place of another will not start, and what is doubtful about it."""
    was = world.before.signed.get(old)
    if not world.secure or not was or (now := boot_files.signed(world.paths, new)) in (was, None):
        return "", ""
    return ("", f"{new} is signed by another key: PCR 7 may change") if now else (_UNSIGNED, "")


def loaders(world: World) -> list[tuple[bytes, str]]:
    """The programs before the kernel, or before the unified kernel image: shim, and what has a boot menu."""
    read = {path for path, _ in world.before.files.values()}
    found = [(digest, path) for digest, path in world.before.images if path not in read]
    return found if world.before.files else found[:-1]


def unvouched(world: World, loaded: Iterable[str]) -> str:
    """Why nothing vouches for one of these files; empty when something does."""
    for path in loaded:
        data = boot_files.read(world.paths, path) or b""
        real = os.path.relpath(
            os.path.realpath(os.path.join(world.paths.root, path)), os.path.realpath(world.paths.root)
        )
        digest = sha256(data).digest()
        if any(world.before.is_foreign(name, digest) for name in (path, real)):
            return f"{path} was changed while this host was off, or before it was looked at: --trust-files if by you"
    return ""


def version_of(name: str) -> str:
    """Of /vmlinuz-6.12.48 or /initrd.img-6.12.48."""
    return os.path.basename(name).partition("-")[2] or os.path.basename(name)
