# SPDX-License-Identifier: Apache-2.0
"""The disks that the root file system needs: what early boot knows of them, and whether their headers are this host's.

The boot scripts list the initramfs's crypttab in /run/unlock, a line `NAME SOURCE`, without SOURCE while that disk is
not here. The agent writes beside it what the TPM says of the root (`tpm.record.Needs`). A disk of such a line that the
root needs has a token of this host; without one its header was changed, whatever else it looks like.
"""

import os

from .. import initramfs
from ..errors import Malformed
from ..light import Iterator
from ..paths import Paths
from ..tpm.record import Needs
from .report import CHANGED, OPEN, DiskRow, Report

_AS_WRITTEN = frozenset(
    (*OPEN, "waiting", "no-key", "provider", "name-taken", "duplicate", "closed-again", "tampered", "was-away")
)
"""Outcomes of disks that have a token of this host; `tampered` says enough itself."""
_AFTER_READING = frozenset(("failed", "timed-out"))
"""Outcomes that may come before or after the token was read."""


def write_needs(paths: Paths, needs: Needs) -> None:
    """What the TPM says of the root."""
    with open(paths.of_this_boot("needs"), "w", encoding="ascii") as file:
        file.write(needs.encode().hex())


def read_needs(paths: Paths) -> Needs:
    """What `write_needs` wrote; none where it did not."""
    try:
        with open(paths.of_this_boot("needs"), encoding="ascii") as file:
            return Needs.decode(bytes.fromhex(file.read()))
    except (OSError, ValueError, Malformed):
        return Needs()


def list_needed(paths: Paths) -> list[tuple[str, str]]:
    """Lists the mappings that the root needs for the boot scripts. Returns those that a stock prompt would open, each
    with its disk, or "" while that is not here."""
    needs = read_needs(paths)
    lines = [(name, source) for name, source in _read_lines(paths) if needs.covers(name)]
    names = [name for name, _ in lines]
    builder = initramfs.of_image()
    if needs and not names and builder and not builder.lists_root:
        from ..disks import devices  # not before the TPM works

        names = [each for each in devices.active_mappings() if needs.covers(each)] or [""]
    if names:
        with open(paths.of_this_boot("needed"), "w", encoding="utf-8", errors="surrogateescape") as file:
            file.writelines(f"{name}\n" for name in names)
    return lines


def mark_altered(paths: Paths, record: Report) -> bool:
    """Gives the outcome `altered` to each disk that the root needs and that has no token of this host. True when the
    header of such a disk was changed."""
    changed = False
    for name, source in list_needed(paths):
        if source and not any(row.name == name and row.outcome in OPEN for row in record.disks.values()):
            node = os.path.realpath(source)
            row = record.disks.get(node)
            if not _has_token(row):
                why = row.describe() if row else "it is not LUKS2"
                record.set_disk(node, "altered", f"its header is not the one that this host wrote: {why}", name=name)
            changed = changed or record.outcome(node) in CHANGED
    return changed


def is_unproven(paths: Paths, record: Report) -> bool:
    """Whether a disk that the root needs is here, and no key that was tried has authenticated its header."""
    needs = read_needs(paths)
    nodes = [os.path.realpath(source) for name, source in _read_lines(paths) if source and needs.covers(name)]
    return any(record.outcome(node) == "no-key" for node in nodes)


def has_stock_prompt(paths: Paths) -> bool:
    """Whether the initramfs would ask for any disk itself: its crypttab has a line, or for dracut the command line."""
    return any(True for _ in _read_lines(paths))


def _has_token(row: DiskRow | None) -> bool:
    if row is None:
        return False
    return row.outcome in _AS_WRITTEN or row.outcome == "altered" or (row.outcome in _AFTER_READING and row.uuid != "")


def _read_lines(paths: Paths) -> Iterator[tuple[str, str]]:
    """(name, source) of each line of the initramfs's crypttab; the source is '' while its disk is not here."""
    try:
        with open(paths.of_this_boot("lines"), encoding="utf-8", errors="surrogateescape") as file:
            for line in file:
                name, _, source = line.strip().partition(" ")
                if name:
                    yield name, source
    except OSError:
        return
