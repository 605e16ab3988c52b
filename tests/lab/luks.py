# SPDX-License-Identifier: Apache-2.0
"""LUKS2 disks made without device-mapper, and broken on purpose."""

import multiprocessing
import os
import subprocess
import tempfile
from collections.abc import Sequence
from pathlib import Path

from cryptography.hazmat.primitives.ciphers import Cipher, algorithms, modes

SECTOR = 4096
DATA_OFFSET = 16 << 20  # where luksFormat puts the data
COPY_SIZE = 16 << 10  # of each of the two metadata copies, at 0 and at COPY_SIZE; keyslots follow


def format_disk(
    path: Path, passphrase: str, *, size: int = 64 << 20, uuid: str = "", options: Sequence[str] = ()
) -> Path:
    """A sparse file of `size` bytes that cryptsetup has formatted, with the cheapest PBKDF.

    `options` go to luksFormat, after those used here: `--label=x`, `--sector-size=512`.
    """
    with path.open("wb") as file:
        file.truncate(size)
    command = ["cryptsetup", "luksFormat", "--batch-mode", "--type=luks2", "--key-file=-"]
    command += ["--pbkdf=pbkdf2", "--pbkdf-force-iterations=1000", f"--sector-size={SECTOR}"]
    command += ["--cipher=aes-xts-plain64", "--key-size=512"] + [f"--uuid={uuid}"] * bool(uuid)
    subprocess.run([*command, *options, os.fspath(path)], input=passphrase.encode(), check=True)
    return path


def volume_key(path: Path, passphrase: str) -> bytes:
    """The volume key of a LUKS2 disk."""
    with tempfile.TemporaryDirectory() as directory:
        key = Path(directory, "key")
        command = ["cryptsetup", "luksDump", "--batch-mode", "--dump-volume-key", "--key-file=-"]
        command += [f"--volume-key-file={key}", os.fspath(path)]
        subprocess.run(command, input=passphrase.encode(), check=True, stdout=subprocess.DEVNULL)
        return key.read_bytes()


def fill(path: Path, passphrase: str, plain: Path) -> None:
    """Encrypt the content of `plain` (a multiple of the sector size) into the data area of `path`."""
    key = volume_key(path, passphrase)
    workers = os.cpu_count() or 1
    sectors = plain.stat().st_size // SECTOR
    step = -(-sectors // (workers * 8))
    jobs = [(path, plain, key, first, min(first + step, sectors)) for first in range(0, sectors, step)]
    with multiprocessing.Pool(workers) as pool:
        pool.starmap(_encrypt, jobs, chunksize=1)


def decrypt(path: Path, key: bytes) -> bytes:
    """The whole data area of `path`."""
    workers = os.cpu_count() or 1
    sectors = (path.stat().st_size - DATA_OFFSET) // SECTOR
    step = -(-sectors // (workers * 8))
    jobs = [(path, key, first, min(first + step, sectors)) for first in range(0, sectors, step)]
    with multiprocessing.Pool(workers) as pool:
        return b"".join(pool.starmap(_decrypt, jobs, chunksize=1))


def ruin(path: Path, *, copy: int) -> None:
    """Overwrite the first (0) or second (1) metadata copy of a LUKS2 header."""
    with path.open("r+b") as disk:
        disk.seek(copy * COPY_SIZE)
        disk.write(b"\xa5" * COPY_SIZE)


def _decrypt(path: Path, key: bytes, first: int, last: int) -> bytes:
    cipher = algorithms.AES(key)
    plain = []
    with path.open("rb") as source:
        source.seek(DATA_OFFSET + first * SECTOR)
        for sector in range(first, last):
            data = source.read(SECTOR)
            decryptor = Cipher(cipher, modes.XTS(_tweak(sector))).decryptor()
            plain.append(decryptor.update(data) if any(data) else data)
    return b"".join(plain)


def _tweak(sector: int) -> bytes:
    """aes-xts-plain64. dm-crypt counts in 512-byte units whatever the sector size is.

    Without `iv_large_sectors`, which LUKS2 does not set:
    https://docs.kernel.org/admin-guide/device-mapper/dm-crypt.html
    """
    return (sector * SECTOR // 512).to_bytes(16, "little")


def _encrypt(path: Path, plain: Path, key: bytes, first: int, last: int) -> None:
    cipher = algorithms.AES(key)
    with plain.open("rb") as source, path.open("r+b") as target:
        source.seek(first * SECTOR)
        target.seek(DATA_OFFSET + first * SECTOR)
        for sector in range(first, last):
            target.write(Cipher(cipher, modes.XTS(_tweak(sector))).encryptor().update(source.read(SECTOR)))
