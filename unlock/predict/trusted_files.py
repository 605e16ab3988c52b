# SPDX-License-Identifier: Apache-2.0
"""Which files below /boot and on the EFI system partition this host trusts: /var/lib/unlock/boot-files.json.

Nothing authenticates these file systems, and a boot measures only the files that it reads. A file of another boot
entry, such as an older kernel's initramfs, may come from somebody who had the disk while the host was off. So the
running system records the files as it knows them; at the next boot, a file that is neither recorded nor measured is
foreign (booted.BootedFiles.foreign).

/var may be as plain as /boot. So the record has a MAC, by a key that only a boot which the TPM allowed has. Without a
right one nothing is trusted but what the boot has measured, nor when the record is not there. `unlock init`, `rebind`
and `policy predict --trust-files` begin one with all files, as somebody is there who vouches for them. An older record
of this host has a right MAC too: whoever brings it back has the host trust again what it trusted then.

JSON, version 1: {"version", "files": PATH -> 64 hex digits, "links": PATH -> target, "mac": 64 hex digits}. PATH is
below the root directory; the MAC is of the canonical JSON of the others.
"""

import os
import stat
from collections.abc import Mapping
from contextlib import suppress
from typing import NamedTuple

from .. import wrap
from ..errors import Malformed, NewerFormat, NoKey, Refused, Tampered
from ..host import keyring
from ..host.state import State, changing
from ..keys import access
from ..measured.baseline import parse_digest
from ..paths import Paths, write_atomically
from ..secret import Secret
from ..strictjson import canonical, parse

TRUSTED_MAX = 2 << 20
"""Bytes."""
_VERSION = 1
_LABEL = b"unlock-boot-files-1"


class TrustedFiles(NamedTuple):
    """What this host had below /boot and on the EFI system partition when it last looked."""

    files: Mapping[str, bytes]
    """Path -> SHA-256."""
    links: Mapping[str, str]
    """Path -> target. No link is ever followed; the programs that make boot files may."""

    def encode(self, persistence: Secret) -> bytes:
        """The content of boot-files.json. Raises Malformed when it would be too long to be read."""
        fields: dict[str, object] = {
            "version": _VERSION,
            "files": {path: digest.hex() for path, digest in self.files.items()},
            "links": dict(self.links),
        }
        with wrap.derive(persistence, b"", _LABEL) as key:
            data = canonical({**fields, "mac": wrap.mac(key, canonical(fields)).hex()})
        if len(data) > TRUSTED_MAX:
            raise Malformed(f"the files below /boot take too much room to keep: {len(data)} bytes")
        return data

    @classmethod
    def decode(cls, data: bytes, persistence: Secret) -> "TrustedFiles":
        """Raises Tampered unless the MAC is right, Malformed, NewerFormat."""
        try:
            fields = parse(data.decode("ascii"))
            expected = parse_digest(fields.pop("mac"))
            with wrap.derive(persistence, b"", _LABEL) as key:
                wrap.check_mac(key, canonical(fields), expected)
            if type(fields["version"]) is int and fields["version"] > _VERSION:
                raise NewerFormat("boot-files.json: written by a newer version", hint="update unlock")
            return cls(
                {parse_text(path): parse_digest(hexed) for path, hexed in fields["files"].items()},
                {parse_text(path): parse_text(target) for path, target in fields["links"].items()},
            )
        except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
            raise Malformed("boot-files.json: it is not as unlock writes it") from None


def save_trusted_files(paths: Paths, trusted: TrustedFiles) -> None:
    """Writes the record, when it differs from what is there. Raises NoKey, OSError, Refused as `exclusive` does,
    Malformed when it is too long."""
    with changing(paths) as state:
        with access.read_persistence_key(state) as persistence:
            data = trusted.encode(persistence)
        if read_own_file(paths.boot_files, TRUSTED_MAX) != data:
            write_atomically(paths.boot_files, data)


def load_trusted_files(paths: Paths) -> TrustedFiles | None:
    """None without a record whose MAC is right, and while the persistence key is not in the key cache. While one
    replaces the other, the record may be under either."""
    try:
        keys = State.load(paths).known_keys(keyring.get("unlock:persistence"))
    except (NoKey, Refused, Tampered, Malformed):
        return None
    data, found = read_own_file(paths.boot_files, TRUSTED_MAX), None
    for each in keys:
        with each, suppress(Tampered, Malformed):
            found = found or TrustedFiles.decode(data, each)
    return found


def put_under_new_key(paths: Paths, *, old: Secret, new: Secret) -> None:
    """The record gets a MAC by a new persistence key. One that is under neither key, or not there, stays as it is, and
    vouches for nothing. May be repeated."""
    try:
        trusted = TrustedFiles.decode(read_own_file(paths.boot_files, TRUSTED_MAX), old)
    except (Tampered, Malformed):
        return
    write_atomically(paths.boot_files, trusted.encode(new))


def parse_text(value: object) -> str:
    """A string from JSON. Raises ValueError for anything else."""
    if type(value) is not str:
        raise ValueError
    return value


def read_own_file(path: str, most: int) -> bytes:
    """A file in /var/lib/unlock; b"" when there is none, or more than `most` bytes, or no regular file: a pipe there
    blocks nothing."""
    try:
        fd = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_NOCTTY | os.O_CLOEXEC)
        with open(fd, "rb") as file:
            data = file.read(most + 1) if stat.S_ISREG(os.fstat(fd).st_mode) else b""
    except OSError:
        return b""
    return data if len(data) <= most else b""
