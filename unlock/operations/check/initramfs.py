# SPDX-License-Identifier: Apache-2.0
"""Checks the installed initramfs images: is unlock in them, and does it read what is on the disks and in the TPM?"""

import os
import shlex
from collections.abc import Iterator

from ...disks import disk_keys, find, luks, token
from ...errors import CommandFailed, Refused, UnlockError
from ...host.state import State
from ...measured.eventlog import Log
from ...paths import Paths
from ...predict import booted, initramfs_images
from ...predict.boot_tree import BootTree
from ...tpm.chip import Tpm
from ..predict import Prediction
from .finding import NOTE, SAFE, UNPROVEN, UNSAFE, Finding
from .tpm import current_slot


def foreign_boot_files(paths: Paths, log: Log | None) -> dict[str, str]:
    """File below /boot that may be a thief's, and that boot files may be made from -> why nothing vouches for it."""
    tree = BootTree(paths)
    try:
        found = booted.load_booted_files(tree, log) if log else booted.read_booted_files(paths)
    except Refused:
        found = None
    return booted.Judge(tree, found).foreign_sources() if found else {}


def check_boot_files(foreign: dict[str, str]) -> Iterator[Finding]:
    """Files that nothing vouches for. A boot that depends on one is told by the prediction."""
    for path, why in foreign.items():
        detail = f"{why}. Until then no new file below /boot is trusted"
        yield Finding(f"/{path}", NOTE, detail, f"rm {shlex.quote(f'/{path}')}, or {booted.ACCEPT}")


def check_initramfs_images(
    paths: Paths,
    state: State,
    tcti: str,
    predicted: Prediction | UnlockError,
    foreign: dict[str, str],
    present: dict[str, list[find.Found]],
) -> Iterator[Finding]:
    """The image of the default boot must be usable; where that is not known, the newest image.

    Into one that may be a thief's it does not look.
    """
    tree = BootTree(paths)
    found = initramfs_images.list_images(tree)
    written = _formats_in_use(state, tcti, present)
    boots = () if isinstance(predicted, UnlockError) else predicted.boots
    needed = [each.initrd for each in boots if each.default and each.initrd] or found[-1:]
    if not needed:
        yield Finding("initramfs", UNPROVEN, "there is no initramfs in /boot: whether unlock is in it is not known")
    for image in dict.fromkeys([*found, *needed]):
        name = os.path.basename(image)
        if why := foreign.get(image):
            yield Finding(name, UNPROVEN if image in needed else NOTE, f"it was not looked into: {why}", booted.ACCEPT)
            continue
        try:
            wrong = _why_unusable(initramfs_images.read_contents(tree, image), written)
        except CommandFailed as error:
            wrong = str(error)
        if wrong:
            do = initramfs_images.how_to_rebuild(tree, image)
            yield Finding(name, UNSAFE if image in needed else NOTE, wrong, do)
        else:
            yield Finding(name, SAFE, "unlock is in it, and reads what is on the disks and in the TPM")


def _formats_in_use(state: State, tcti: str, present: dict[str, list[find.Found]]) -> dict[str, int]:
    """Format -> the version of it that is on the disks or in the TPM, and that an image must read."""
    try:
        with Tpm(tcti) as tpm:
            found = current_slot(tpm)
    except UnlockError:
        found = None
    return {"token": _newest_token(state, present), "record": found[1].version if found else 1}


def _newest_token(state: State, present: dict[str, list[find.Found]]) -> int:
    """The newest format of this host's tokens: on the disks that are here, and as the state says on the others."""
    newest = max((2 for group in state.groups.values() if group.degraded), default=token.OLDEST_VERSION)
    for disk in (each for found in present.values() for each in found):
        try:
            with luks.Container(disk.node) as container:
                tokens = disk_keys.read_tokens(container, state.host)
        except UnlockError:
            continue
        newest = max(newest, *(each.version for each in tokens))
    return newest


def _why_unusable(image: initramfs_images.ImageContents, written: dict[str, int]) -> str:
    """Why the image cannot open the disks; '' when it can."""
    if not image.unlock:
        return "unlock is not in it"
    for kind, version in written.items():
        if image.reads.get(kind, 0) < version:
            return f"the unlock in it does not read {kind}s of version {version}"
    if written["record"] > 1 and not image.asks:
        return "no program is in it that asks for the PIN"
    return ""
