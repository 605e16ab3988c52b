# SPDX-License-Identifier: Apache-2.0
"""The initramfs images that are installed, and what the unlock in each of them reads.

An image says it by the names of empty files: usr/lib/unlock/reads/NAME-N (initramfs/manifest).
"""

import glob
import os
import re
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import NamedTuple

from ..errors import CommandFailed, Malformed, Refused
from ..paths import Paths
from ..run import run
from . import pe

_AGENT = "usr/lib/unlock/unlock/boot/agent.pyc"
_READS = re.compile(r"usr/lib/unlock/reads/([a-z]+)-(\d+)")
_ASKPASS = ("lib/cryptsetup/askpass", "usr/lib/cryptsetup/askpass")

Listing = Callable[[list[str]], str]


class Contents(NamedTuple):
    unlock: bool
    reads: dict[str, int]
    """Format -> its newest version that is read."""
    asks: bool
    """There is a program that asks for a PIN or a key."""


def installed(paths: Paths) -> list[str]:
    """Paths of the images, the newest kernel last."""
    found = sorted(glob.glob(os.path.join(paths.root, "boot/initrd.img-*")), key=natural)
    return [each for each in found if not each.endswith((".bak", ".dpkg-bak", ".new"))]


def kernel(image: str) -> str:
    """Its kernel's version."""
    return os.path.basename(image).removeprefix("initrd.img-")


def is_unified(image: str) -> bool:
    """Whether it is a unified kernel image."""
    return image.lower().endswith(".efi")


def contents(image: str, listing: Listing = run) -> Contents:
    """Of an initramfs, or of the one in a unified kernel image. Raises CommandFailed."""
    with _initramfs(image) as path:
        names = set(listing(["lsinitramfs", path]).split())
    reads: dict[str, int] = {}
    for found in filter(None, map(_READS.fullmatch, names)):
        reads[found[1]] = max(int(found[2]), reads.get(found[1], 0))
    return Contents(_AGENT in names, reads, not names.isdisjoint(_ASKPASS))


@contextmanager
def _initramfs(image: str) -> Iterator[str]:
    """Its file."""
    if not is_unified(image):
        yield image
        return
    try:
        with open(image, "rb") as file:
            data = file.read()
        inside = pe.section(data, pe.read(data), ".initrd")
    except (OSError, Malformed) as error:
        raise CommandFailed(f"{os.path.basename(image)}: {error}") from error
    with tempfile.NamedTemporaryFile() as copy:
        copy.write(inside or b"")
        copy.flush()
        yield copy.name


def need_pin(paths: Paths, listing: Listing = run) -> None:
    """Raises Refused, code `old-initramfs`, for an installed image that could not ask for a PIN. One without unlock
    unseals nothing, and does not count. Raises CommandFailed for one that cannot be read."""
    for image in installed(paths):
        found = contents(image, listing)
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
                f"update-initramfs -u -k {kernel(image)}",
                code="old-initramfs",
            )


def natural(name: str) -> list[tuple[bool, int, str]]:
    """Sorts versions in names as numbers: 6.9 before 6.12."""
    return [(part.isdecimal(), int(part) if part.isdecimal() else 0, part) for part in re.split(r"(\d+)", name)]
