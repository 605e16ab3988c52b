# SPDX-License-Identifier: Apache-2.0
"""Lists the installed initramfs images, and reads which formats the unlock in each of them understands.

Empty files in the image say that: usr/lib/unlock/reads/NAME-N (initramfs/manifest).
"""

import os
import re
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import NamedTuple

from .. import initramfs
from ..errors import CommandFailed, Malformed, Refused
from ..run import run
from . import pe
from .boot_tree import BootTree, Unreadable

_AGENT = "usr/lib/unlock/unlock/boot/agent.pyc"
_READS = re.compile(r"usr/lib/unlock/reads/([a-z]+)-(\d+)")
_NAMES = re.compile(r"initrd\.img-(.+)|initramfs-(.+)\.img")
_ASKPASS = ("lib/cryptsetup/askpass", "usr/lib/cryptsetup/askpass")
_ASKS_BY_SYSTEMD = {"usr/bin/systemd-ask-password", "usr/lib/unlock/early"}
"""In an image of dracut."""

_PATIENCE = 120.0
"""Seconds."""

Listing = Callable[[list[str]], str]


class ImageContents(NamedTuple):
    """What `unlock check` looks for in an image."""

    unlock: bool
    """unlock is in it."""
    reads: dict[str, int]
    """Format -> the newest version that the unlock in it reads."""
    asks: bool
    """A program is in it that asks for a PIN or a key."""


def list_images(tree: BootTree) -> list[str]:
    """The paths of the images below the root directory, the newest kernel last."""
    names = filter(_NAMES.fullmatch, tree.list_names("boot"))
    found = [f"boot/{each}" for each in names if not each.endswith((".bak", ".dpkg-bak", ".new"))]
    return sorted(found, key=version_sort_key)


def kernel_version(image: str) -> str:
    """The version of the kernel that the image is for."""
    name = os.path.basename(image)
    found = _NAMES.fullmatch(name)
    return (found[1] or found[2]) if found else name


def how_to_rebuild(tree: BootTree, image: str) -> str:
    """What a person types to make the image anew."""
    if is_unified(image):
        return "kernel-install add-all"
    return initramfs.of_host(tree.paths.root).rebuild(version=kernel_version(image), image=image)


def is_unified(image: str) -> bool:
    """Whether it is a unified kernel image."""
    return image.lower().endswith(".efi")


def list_contents(argv: list[str]) -> str:
    """Runs a program that lists an image, which may have been made to take for ever. Raises CommandFailed."""
    return run(argv, timeout=_PATIENCE)


def read_contents(tree: BootTree, image: str, listing: Listing = list_contents) -> ImageContents:
    """What is in an initramfs, or in the one of a unified kernel image. Raises CommandFailed."""
    try:
        with _initramfs_file(tree, image) as path:
            try:
                names = set(listing([*initramfs.of_host(tree.paths.root).listing, path]).split())
            except CommandFailed as error:
                raise CommandFailed(str(error).replace(path, os.path.basename(image))) from error
    except Unreadable as problem:
        raise CommandFailed(f"{os.path.basename(image)}: {problem}") from None
    reads: dict[str, int] = {}
    for found in filter(None, map(_READS.fullmatch, names)):
        reads[found[1]] = max(int(found[2]), reads.get(found[1], 0))
    asks = not names.isdisjoint(_ASKPASS) or names >= _ASKS_BY_SYSTEMD
    return ImageContents(_AGENT in names, reads, asks)


@contextmanager
def _initramfs_file(tree: BootTree, image: str) -> Iterator[str]:
    """A path of the initramfs; of one in a unified kernel image, and where the program that lists it takes no link,
    that of a temporary copy. Raises Unreadable."""
    unified = is_unified(image)
    if not unified and initramfs.of_host(tree.paths.root).lists_links:
        with tree.name_for_programs(image) as path:
            yield path
        return
    data = tree.read(image)
    if data is None:
        raise Unreadable(tree.why_unreadable(image))
    try:
        inside = pe.read_section(data, pe.read_layout(data), ".initrd") if unified else data
    except Malformed as error:
        raise CommandFailed(f"{os.path.basename(image)}: {error}") from error
    with tempfile.NamedTemporaryFile() as copy:
        copy.write(inside or b"")
        copy.flush()
        yield copy.name


def require_pin_support(tree: BootTree, listing: Listing = list_contents) -> None:
    """Raises Refused, code `old-initramfs`, when an installed image could not ask for a PIN.

    An image without unlock unseals nothing, and does not count. Raises CommandFailed for one that cannot be read.
    """
    for image in list_images(tree):
        found = read_contents(tree, image, listing)
        why = (
            "does not read policies with a PIN"
            if found.reads.get("record", 0) < 2
            else "has no program that asks"
            if not found.asks
            else ""
        )
        if found.unlock and why:
            raise Refused(
                f"the unlock in {os.path.basename(image)} {why}",
                how_to_rebuild(tree, image),
                code="old-initramfs",
            )


def require_tokens(tree: BootTree, version: int, listing: Listing = list_contents) -> None:
    """Raises Refused, code `old-initramfs`, when an installed image has an unlock that does not read tokens of this
    version: its boots would not open the disks. Raises CommandFailed for one that cannot be read."""
    for image in list_images(tree):
        found = read_contents(tree, image, listing)
        if found.unlock and found.reads.get("token", 0) < version:
            raise Refused(
                f"the unlock in {os.path.basename(image)} does not read tokens of version {version}",
                how_to_rebuild(tree, image),
                code="old-initramfs",
            )


def version_sort_key(name: str) -> list[tuple[bool, int, str]]:
    """A key that sorts versions in names as numbers: 6.9 before 6.12."""
    return [(part.isdecimal(), int(part) if part.isdecimal() else 0, part) for part in re.split(r"(\d+)", name)]
