# SPDX-License-Identifier: Apache-2.0
"""How much of a disk is re-encrypted, encrypted or decrypted, from its header. Names: LUKS2 On-Disk Format
Specification 1.1, sections 3.3 and 3.7."""

from collections.abc import Iterable
from typing import Any

from ..errors import Malformed
from .header import Header

_BACKUP = "backup-final"
"""Flag of the segment that says what the whole disk will be."""


def read_progress(header: Header, disk_size: int) -> tuple[int, int] | None:
    """Bytes that are done, and bytes of the whole; None where the header has no re-encryption under way. It shows: it
    proves nothing, and a header that makes no sense has None."""
    try:
        if "reencrypt" not in str(header.requirements):
            return None
        metadata: dict[str, Any] = header.metadata
        final = next(each for each in metadata["segments"].values() if _BACKUP in each.get("flags", ()))
        key = _digest(metadata, next(n for n, each in metadata["segments"].items() if each is final))
        done = total = 0
        for number, each in metadata["segments"].items():
            if any(flag.startswith("backup-") for flag in each.get("flags", ())):
                continue
            size = disk_size - int(each["offset"]) if each["size"] == "dynamic" else int(each["size"])
            total += size
            is_new = each["type"] == final["type"] and _digest(metadata, number) == key
            done += size if is_new and "in-reencryption" not in each.get("flags", ()) else 0
        return (done, total) if 0 <= done <= total else None
    except (Malformed, KeyError, TypeError, ValueError, AttributeError, StopIteration):
        return None


def _digest(metadata: dict[str, Any], segment: str) -> str:
    """The number of the digest that covers a segment; '' for none: it is not encrypted."""
    covering: Iterable[str] = (n for n, each in metadata["digests"].items() if segment in each["segments"])
    return next(iter(covering), "")
