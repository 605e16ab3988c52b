# SPDX-License-Identifier: Apache-2.0
"""Disks that are encrypted in place: what they hold, at any instant, by the product's own opening code."""

import os
import subprocess
from pathlib import Path

from cryptography.hazmat.primitives.ciphers import Cipher, algorithms, modes

from tests.flowfixture import HOST, Host
from unlock.disks import disk_keys, luks, reencrypt_plan
from unlock.disks.encrypt_plan import RESERVED, SHIFT
from unlock.keys import recovery_key
from unlock.secret import Secret

MIB = 1 << 20


def sh(*command: object, text: bytes = b"") -> str:
    done = subprocess.run(list(map(str, command)), input=text, capture_output=True, check=False)
    assert done.returncode == 0, done.stderr.decode()
    return done.stdout.decode().strip()


def fill(disk: str, folder: Path, size: int, *, files: int = 6, block: int = 4096) -> None:
    """An ext4 of `size` bytes with files; the disk may be larger."""
    source = folder / "files"
    if not source.exists():
        source.mkdir()
        for number in range(files):
            (source / f"file-{number}").write_bytes(os.urandom(3 * MIB // 2))
    sh("mkfs.ext4", "-q", "-F", "-b", block, "-L", "photos", "-d", source, disk, f"{size >> 10}K")


def recovery_file(host: Host) -> str:
    path = host.folder / "recovery"
    if not path.exists():
        recovery_key.write_new_file(str(path), host.recovery)
    return str(path)


def read_clear(disk: str, persistence: Secret, host: str = HOST) -> bytes:
    """The data, by the token of the header as it is, through the segments that the header has: what is encrypted is
    decrypted, the rest is in clear. Only for a header without a hotzone."""
    with luks.Container(disk) as container:
        each = disk_keys.read_tokens(container, host)[0]
        with disk_keys.unwrap_kek(each, persistence) as kek:
            if each.reencryption:
                keys = disk_keys.unwrap_reencryption_keys(container, each, kek)
                dek = bytes(keys.new)
            else:
                dek = bytes(disk_keys.unwrap_by_kek(container, each, kek))
        segments = container.metadata["segments"]
        clear = container.disk_size - RESERVED
    parts: list[bytes] = []
    raw = os.open(disk, os.O_RDONLY)
    try:
        os.posix_fadvise(raw, 0, 0, os.POSIX_FADV_DONTNEED)
        for _, segment in sorted(segments.items(), key=lambda item: int(item[0])):
            flags = segment.get("flags", [])
            if any(flag.startswith("backup-") for flag in flags):
                continue
            assert not flags, "a hotzone"
            size = clear - sum(len(part) for part in parts) if segment["size"] == "dynamic" else int(segment["size"])
            content = os.pread(raw, size, int(segment["offset"]))
            parts.append(_decrypted(content, dek, segment) if segment["type"] == "crypt" else content)
    finally:
        os.close(raw)
    return b"".join(parts)


def _decrypted(content: bytes, dek: bytes, segment: dict[str, object]) -> bytes:
    size, tweak = int(str(segment["sector_size"])), int(str(segment["iv_tweak"]))
    found = bytearray()
    for at in range(0, len(content), size):
        iv = (tweak + at // 512).to_bytes(16, "little")
        found += Cipher(algorithms.AES(dek), modes.XTS(iv)).decryptor().update(content[at : at + size])
    return bytes(found)


def phase(disk: str) -> str:
    """Of the plan in its token; '' without one."""
    with luks.Container(disk) as container:
        for each in disk_keys.read_tokens(container, HOST):
            if each.reencryption:
                return reencrypt_plan.phase(container, each.reencryption.plan)
    return ""


def files_in(image: bytes, folder: Path) -> dict[str, bytes]:
    """Name -> content of the files of an ext4, which must be without errors."""
    plain, out = folder / "plain", folder / "out"
    plain.write_bytes(image)
    sh("e2fsck", "-f", "-n", plain)
    out.mkdir(exist_ok=True)
    sh("debugfs", "-R", f"rdump / {out}", plain)
    return {each.name: each.read_bytes() for each in sorted(out.glob("file-*"))}


__all__ = ["MIB", "RESERVED", "SHIFT"]
