# SPDX-License-Identifier: Apache-2.0
"""Reads files below /boot and on the EFI system partition: finds them by the names that firmware and GRUB have for
them, and computes what is measured of them. Paths are below the root directory.
"""

import glob
import os
import re
from collections.abc import Iterator
from hashlib import sha256

from ..errors import Malformed
from ..measured import certificates, uefi
from ..measured.eventlog import Event
from ..paths import Paths
from . import pe
from .boot_tree import TOPS, BootTree

ESPS = ("boot/efi", "efi", "boot")
"""Where the EFI system partition, or an extended boot loader partition, may be mounted."""
BASES = ("boot", "boot/efi", "efi", "")
"""The folders that GRUB's names may be relative to."""
COUNTER = re.compile(r"\+(\d+)(-\d+)?(?=\.(efi|conf)$)", re.I)
"""systemd's automatic boot assessment: tries left, tries done. A good boot takes it out of the name."""


def sidecar_digests(tree: BootTree, image: str) -> dict[str, bytes]:
    """The add-ons, extensions and credentials that systemd-stub(7) measures with this image: name -> SHA-256."""
    found = {}
    for folder in (
        f"{COUNTER.sub('', image)}.extra.d",
        *(os.path.join(mount_point_of(image), "loader", each) for each in ("addons", "credentials")),
    ):
        for name in tree.list_names(folder):
            found[name] = tree.digest(os.path.join(folder, name)) or bytes(32)
    return found


def disk_locations(paths: Paths) -> tuple[str, ...]:
    """The whole disks that the firmware may number: their folders below /sys/devices, without their kernel names."""
    top = os.path.realpath(os.path.join(paths.root, "sys/devices"))
    found = [os.path.realpath(each) for each in glob.glob(os.path.join(glob.escape(paths.root), "sys/block/*"))]
    hard = (each for each in found if not each.startswith(f"{top}/virtual/block/"))
    disks = (each for each in hard if not os.path.basename(each).startswith(("sr", "fd")))
    return tuple(sorted(os.path.relpath(os.path.dirname(each), top) for each in disks))


def mount_point_of(path: str) -> str:
    """The mount point of a file in EFI/Linux, EFI/BOOT or loader/entries."""
    return os.path.dirname(os.path.dirname(os.path.dirname(path)))


def without_counter(path: str) -> str:
    """The name without the boot counter of systemd-boot, in lower case: FAT ignores case."""
    return COUNTER.sub("", path).lower()


def authenticode(tree: BootTree, path: str) -> bytes | None:
    """What the firmware measures of an EFI program; None for a file that is not there, or is none."""
    data = tree.read(path)
    try:
        return pe.authenticode(data) if data is not None else None
    except Malformed:
        return None


def signers_digest(tree: BootTree, path: str) -> bytes | None:
    """SHA-256 over the authorities that have signed an EFI program: certificates.signing_authorities.

    b"" when none has; None for a file that is not there, or is no EFI program.
    """
    try:
        found = sorted(certificates.signing_authorities(pe.read_signatures(tree.read(path) or b"")))
    except Malformed:
        return None
    return sha256(b"".join(sha256(each).digest() for each in found)).digest() if found else b""


def paths_of_grub_name(name: str) -> Iterator[str]:
    """The paths that a file may have that GRUB names."""
    _, inside, rest = name.partition(")") if name.startswith("(") else ("", "", name)
    if rest.startswith("/") and ".." not in rest.split("/") and (inside or not name.startswith("(")):
        yield from (os.path.join(base, rest.lstrip("/")) for base in BASES)


def find_started_file(tree: BootTree, event: Event) -> str:
    """The file of an EFI program that was started; "" when no file has its digest."""
    found = find_programs(tree, program_name(event))
    return next((path for path in found if authenticode(tree, path) == event.digest), "")


def program_name(event: Event) -> str:
    """The name of an EFI program that was started: \\EFI\\debian\\shimx64.efi, or where else it came from."""
    try:
        return uefi.parse_image_path(event.data)
    except Malformed:
        return ""


def find_programs(tree: BootTree, name: str) -> Iterator[str]:
    """The files on the EFI system partition that have this name."""
    name = name.replace("\\", "/").lstrip("/")
    if name and ".." not in name.split("/"):
        for esp in ESPS:
            yield from _find_without_counter(tree, esp, without_counter(name).split("/"))


def _find_without_counter(tree: BootTree, folder: str, parts: list[str]) -> Iterator[str]:
    for name in tree.list_names(folder):
        if without_counter(name) == parts[0]:
            path = os.path.join(folder, name)
            if parts[1:]:
                yield from _find_without_counter(tree, path, parts[1:])
            else:
                yield path


def list_initrds(tree: BootTree) -> Iterator[str]:
    """The initramfs files in the usual places."""
    folders = [*TOPS, *(f"{esp}/EFI/{name}" for esp in TOPS for name in tree.list_names(f"{esp}/EFI"))]
    for folder in folders:
        for name in tree.list_names(folder):
            if name.startswith("initr") and tree.is_file(path := os.path.join(folder, name)):
                yield path
