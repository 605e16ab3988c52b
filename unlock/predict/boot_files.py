# SPDX-License-Identifier: Apache-2.0
"""Reads files below /boot and on the EFI system partition: finds them by the names that firmware and GRUB have for
them, and computes what is measured of them. Paths are below the root directory.
"""

import glob
import os
import re
from collections.abc import Iterator
from hashlib import file_digest, sha256

from ..errors import Malformed
from ..measured import certificates, uefi
from ..measured.eventlog import Event
from ..paths import Paths
from . import pe

MAX_FILE = 1 << 30
ESPS = ("boot/efi", "efi", "boot")
"""Where the EFI system partition, or an extended boot loader partition, may be mounted."""
BASES = ("boot", "boot/efi", "efi", "")
"""The folders that GRUB's names may be relative to."""
COUNTER = re.compile(r"\+(\d+)(-\d+)?(?=\.(efi|conf)$)", re.I)
"""systemd's automatic boot assessment: tries left, tries done. A good boot takes it out of the name."""


def sidecar_digests(paths: Paths, image: str) -> dict[str, bytes]:
    """The add-ons, extensions and credentials that systemd-stub(7) measures with this image: name -> SHA-256."""
    found = {}
    for folder in (
        f"{COUNTER.sub('', image)}.extra.d",
        *(os.path.join(mount_point_of(image), "loader", each) for each in ("addons", "credentials")),
    ):
        for path in sorted(glob.glob(os.path.join(glob.escape(os.path.join(paths.root, folder)), "*"))):
            found[os.path.basename(path)] = file_sha256(paths, os.path.relpath(path, paths.root)) or bytes(32)
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


def list_files(paths: Paths) -> Iterator[tuple[str, bytes]]:
    """Yields path and SHA-256 of all files below /boot and on the EFI system partition."""
    for top in ("boot", "efi"):
        for folder, _, names in os.walk(os.path.join(paths.root, top)):
            for name in sorted(names):
                path = os.path.relpath(os.path.join(folder, name), paths.root)
                if os.path.isfile(os.path.join(paths.root, path)) and (digest := file_sha256(paths, path)):
                    yield path, digest


def read_file(paths: Paths, path: str) -> bytes | None:
    """The content of a file; None when there is none, or it is too large."""
    try:
        with open(os.path.join(paths.root, path), "rb") as file:
            return file.read() if os.fstat(file.fileno()).st_size <= MAX_FILE else None
    except (OSError, ValueError):
        return None


def authenticode(paths: Paths, path: str) -> bytes | None:
    """What the firmware measures of an EFI program; None for a file that is not there, or is none."""
    data = read_file(paths, path)
    try:
        return pe.authenticode(data) if data is not None else None
    except Malformed:
        return None


def signers_digest(paths: Paths, path: str) -> bytes | None:
    """SHA-256 over the authorities that have signed an EFI program: certificates.signing_authorities.

    b"" when none has; None for a file that is not there, or is no EFI program.
    """
    try:
        found = sorted(certificates.signing_authorities(pe.read_signatures(read_file(paths, path) or b"")))
    except Malformed:
        return None
    return sha256(b"".join(sha256(each).digest() for each in found)).digest() if found else b""


def file_sha256(paths: Paths, path: str) -> bytes | None:
    """None for a file that cannot be read."""
    try:
        with open(os.path.join(paths.root, path), "rb") as file:
            return file_digest(file, "sha256").digest()
    except (OSError, ValueError):
        return None


def paths_of_grub_name(name: str) -> Iterator[str]:
    """The paths that a file may have that GRUB names."""
    _, inside, rest = name.partition(")") if name.startswith("(") else ("", "", name)
    if rest.startswith("/") and ".." not in rest.split("/") and (inside or not name.startswith("(")):
        yield from (os.path.join(base, rest.lstrip("/")) for base in BASES)


def find_started_file(paths: Paths, event: Event) -> str:
    """The file of an EFI program that was started; "" when no file has its digest."""
    found = find_programs(paths, program_name(event))
    return next((path for path in found if authenticode(paths, path) == event.digest), "")


def program_name(event: Event) -> str:
    """The name of an EFI program that was started: \\EFI\\debian\\shimx64.efi, or where else it came from."""
    try:
        return uefi.parse_image_path(event.data)
    except Malformed:
        return ""


def find_programs(paths: Paths, name: str) -> Iterator[str]:
    """The files on the EFI system partition that have this name."""
    name = name.replace("\\", "/").lstrip("/")
    if name and ".." not in name.split("/"):
        for esp in ESPS:
            yield from _find_without_counter(paths, esp, without_counter(name).split("/"))


def _find_without_counter(paths: Paths, folder: str, parts: list[str]) -> Iterator[str]:
    try:
        names = os.listdir(os.path.join(paths.root, folder))
    except OSError:
        return
    for name in names:
        if without_counter(name) == parts[0]:
            path = os.path.join(folder, name)
            if parts[1:]:
                yield from _find_without_counter(paths, path, parts[1:])
            else:
                yield path


def list_initrds(paths: Paths) -> Iterator[str]:
    """The initramfs files in the usual places."""
    for pattern in ("boot/initr*", "boot/efi/initr*", "efi/initr*", "boot/efi/EFI/*/initr*", "efi/EFI/*/initr*"):
        for path in sorted(glob.glob(os.path.join(paths.root, pattern))):
            yield os.path.relpath(path, paths.root)
