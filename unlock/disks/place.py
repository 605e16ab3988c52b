# SPDX-License-Identifier: Apache-2.0
"""Where a LUKS2 device lies, for `partition_table` and the journal."""

from typing import NamedTuple


class Place(NamedTuple):
    """Where a LUKS2 device lies on its disk, in bytes, and which partition its data becomes."""

    disk: str
    """Node of the whole disk."""
    table: str
    """`gpt`, `dos`, or `none` where the device is the disk."""
    number: int
    """Of the partition."""
    identity: str
    """In hex: the GUID of a partition of a GPT; the signature of the disk that a DOS table has, or will have."""
    start: int
    size: int
    offset: int
    """Of the data in the device."""
    entries: tuple[int, int]
    """Where a GPT has its entries and their backup, in sectors; 0 and 0 without."""

    @property
    def partition(self) -> str:
        """Its node."""
        return f"{self.disk}{'p' if self.disk[-1].isdigit() else ''}{self.number}"
