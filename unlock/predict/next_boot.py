# SPDX-License-Identifier: Apache-2.0
"""A boot that may come next, and what the three ways of booting have in common when they predict one.

    PredictionInput ──> grub_menu.next_boots()    shim ──> GRUB ──> kernel and initramfs
                        uki.next_boots()          a unified kernel image, with or without systemd-boot
                        efistub.next_boots()      the firmware starts the kernel
      ──events of that boot──> predict_boot() ──> NextBoot: PCR values, or why they are not known

operations.predict chooses the way, and allows what was predicted.
"""

import os
from collections.abc import Iterable, Mapping
from typing import NamedTuple

from ..measured import efivars, eventlog
from ..measured.eventlog import Event, Log
from ..paths import Paths
from ..tpm import pcr_policy
from . import boot_files
from .boot_tree import BootTree
from .booted import BootedFiles, Judge

_UNSIGNED = "it is not signed, and Secure Boot is on"


class NextBoot(NamedTuple):
    """A boot that may come next. Construct it by keywords."""

    words: str
    """kernel 6.12.48; with the boot menu's title for all but the default entry."""
    changes: tuple[str, ...]
    """What differs from this boot."""
    values: Mapping[int, bytes] | None
    """PCRs 0 to 15 when early boot asks the TPM; None when they are not known."""
    why: str
    """Why not; empty when they are."""
    default: bool
    """Whether it is started when nobody chooses."""
    initrd: str = ""
    """The file with its initramfs, or the unified kernel image that it is in, below the root directory; "" when that is
    not known."""
    doubt: str = ""
    """What the values depend on; "" when that is nothing."""


def not_predicted(words: str, why: str, *, default: bool, changes: Iterable[str] = ()) -> NextBoot:
    """A boot whose PCR values are not known."""
    return NextBoot(words=words, changes=tuple(changes), values=None, why=why, default=default)


class PredictionInput(NamedTuple):
    """All that a prediction looks at. Construct it by keywords."""

    paths: Paths
    tree: BootTree
    log: Log
    """Of this boot."""
    booted: BootedFiles
    later: tuple[Event, ...]
    """What systemd measured before early boot asked the TPM."""
    values: Mapping[int, bytes]
    """PCRs of this boot at that time."""
    secure: bool
    """Whether Secure Boot is on, and who signed counts: the policy has PCR 7."""


def predict_boot(
    inputs: PredictionInput, words: str, changes: Iterable[str], events: Iterable[Event], *, default: bool, kernel: str
) -> NextBoot:
    """The boot that measures these events, with the boot loaders as they are on disk now.

    `kernel`: the file that replaces this boot's kernel, or unified kernel image; "" for one that is no file.
    A PCR that the events leave as it is keeps its value, whatever that is. For any other, the log must account.
    """
    loaders = boot_loaders(inputs)
    there = [path for _, path in loaders if inputs.tree.is_file(path)]
    if why := why_untrusted(inputs, there):
        return not_predicted(words, why, default=default, changes=changes)
    old_kernel = next((path for digest, path in reversed(inputs.booted.images) if (digest, path) not in loaders), "")
    unsigned, doubt = check_signer(inputs, old=old_kernel, new=kernel)
    if unsigned:
        return not_predicted(words, unsigned, default=default, changes=changes)
    now = {digest: boot_files.authenticode(inputs.tree, path) or digest for digest, path in loaders}
    changes = [*changes, *(["boot loader"] if any(old != new for old, new in now.items()) else [])]
    events = [each._replace(digest=now.get(each.digest or b"", each.digest)) for each in events]
    was = eventlog.replay([*inputs.log.events, *inputs.later], inputs.log.locality)
    if was.get(1) == inputs.values.get(1):
        again = [
            each._replace(digest=efivars.remeasured(inputs.paths, each)) if each.pcr == 1 else each for each in events
        ]
        changes += ["boot entry or boot order"] if again != events and not changes else []
        events = again
    will = eventlog.replay([*events, *inputs.later], inputs.log.locality)
    values = dict(inputs.values)
    for pcr in range(16):
        if pcr == pcr_policy.CAP_PCR or was.get(pcr) == will.get(pcr):
            continue
        if was.get(pcr) != inputs.values.get(pcr) or pcr not in will:
            why = f"the event log does not account for PCR {pcr}"
            return not_predicted(words, why, default=default, changes=changes)
        values[pcr] = will[pcr]
    return NextBoot(words=words, changes=tuple(changes), values=values, why="", default=default, doubt=doubt)


def check_signer(inputs: PredictionInput, *, old: str, new: str) -> tuple[str, str]:
    """Why the program `new`, which replaces `old`, will not start; and what is doubtful about it. "" for neither."""
    was = inputs.booted.signed.get(old)
    if not inputs.secure or not was or (now := boot_files.signers_digest(inputs.tree, new)) in (was, None):
        return "", ""
    return ("", f"{new} is signed by another key: PCR 7 may change") if now else (_UNSIGNED, "")


def boot_loaders(inputs: PredictionInput) -> list[tuple[bytes, str]]:
    """The programs before the kernel, or before the unified kernel image, such as shim: Authenticode, file."""
    read = {path for path, _ in inputs.booted.files.values()}
    found = [(digest, path) for digest, path in inputs.booted.images if path not in read]
    return found if inputs.booted.files else found[:-1]


def why_untrusted(inputs: PredictionInput, loaded: Iterable[str]) -> str:
    """Why one of these files is not trusted; "" when all are: booted.Judge."""
    judge = Judge(inputs.tree, inputs.booted)
    for path in dict.fromkeys(loaded):
        digest = inputs.tree.digest(path)
        why = judge.why_foreign(path, digest) if digest else f"{path}: {inputs.tree.why_unreadable(path)}"
        if why:
            return why
    return ""


def version_in_name(name: str) -> str:
    """The version in the name of a kernel or initramfs: /vmlinuz-6.12.48, /initrd.img-6.12.48."""
    return os.path.basename(name).partition("-")[2] or os.path.basename(name)
