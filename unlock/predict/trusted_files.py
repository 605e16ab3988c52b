# SPDX-License-Identifier: Apache-2.0
"""Which files below /boot and on the EFI system partition this host trusts: /var/lib/unlock/boot-files.json.

Nothing authenticates these file systems, and a boot measures only the files that it reads. A file of another boot
entry, such as an older kernel's initramfs, may come from somebody who had the disk while the host was off. So the
running system records the files as it knows them; at the next boot, a file that is neither recorded nor measured is
foreign (booted.BootedFiles.foreign). A file that changed after that boot was changed by the running system.

JSON, version 1: {"version", "files": PATH -> 64 hex digits}. PATH is below the root directory.
"""

import json
from collections.abc import Mapping

from ..measured.baseline import parse_digest
from ..paths import Paths, write_atomically
from .boot_files import without_counter

TRUSTED_MAX = 2 << 20
"""Bytes."""
_VERSION = 1


def save_trusted_files(paths: Paths, files: Mapping[str, bytes]) -> None:
    """Writes path -> SHA-256, when it differs from what is there. Raises OSError."""
    fields = {"version": _VERSION, "files": {path: digest.hex() for path, digest in files.items()}}
    data = json.dumps(fields, separators=(",", ":")).encode()
    if _read_file(paths.boot_files) != data:
        write_atomically(paths.boot_files, data)


def load_trusted_files(paths: Paths) -> set[tuple[str, bytes]] | None:
    """Paths without a boot counter, SHA-256. None before `init` and the first prediction: all files are trusted then.
    Empty when the record cannot be read."""
    data = _read_file(paths.boot_files)
    if data is None:
        return None
    try:
        files = json.loads(data)["files"]
        return {(without_counter(parse_text(path)), parse_digest(hexed)) for path, hexed in files.items()}
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
        return set()


def parse_text(value: object) -> str:
    """A string from JSON. Raises ValueError for anything else."""
    if type(value) is not str:
        raise ValueError
    return value


def _read_file(path: str) -> bytes | None:
    try:
        with open(path, "rb") as file:
            return file.read(TRUSTED_MAX + 1)
    except FileNotFoundError:
        return None
