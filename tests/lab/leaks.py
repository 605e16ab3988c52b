# SPDX-License-Identifier: Apache-2.0
"""Where a host may leave its secrets: everything that it wrote or shows, searched for each of them."""

import base64
import os
import subprocess
import tempfile
from collections.abc import Iterator

from unlock.disks import disk_keys, luks
from unlock.secret import Secret

from .guest import Guest
from .luks import decrypt
from .machine import Machine

EVERYWHERE = (
    "journalctl -b --no-pager -o export",
    "dmesg",
    "tar -C /run --exclude=./lab -cf - . 2>/dev/null",
    "cat /proc/[0-9]*/cmdline /proc/[0-9]*/environ 2>/dev/null",
    "dmsetup table --showkeys",
)
"""What root can look at, by the commands that show it."""


def secrets(machine: Machine) -> dict[str, bytes]:
    """Every key of an enrolled machine that is off, by name."""
    found = {name: bytes.fromhex(value) for name, value in machine.secrets().items()}
    persistence = Secret(found["unlock:persistence"])
    files = {serial: machine.home / each.path for serial, each in machine.disks.items()}
    files["root"] = machine.root_header(machine.home / "header")
    for serial, path in files.items():
        with luks.Container(str(path)) as container:
            for token in disk_keys.read_tokens(container, ""):
                found[f"DEK of {serial}"] = bytes(disk_keys.unwrap_volume_key(container, token, persistence))
                found[f"KEK of {serial}"] = bytes(disk_keys.unwrap_kek(token, persistence))
    found["recovery key"] = machine.recovery_key.encode()
    return found


def forms(secret: bytes) -> set[bytes]:
    """A secret as it is, and as a program may print it."""
    written = {secret, secret.hex().encode(), secret.hex().upper().encode(), repr(secret)[2:-1].encode()}
    written |= (
        {secret.replace(b"-", b"")} if secret.isascii() else {secret[: len(secret) // 2], secret[len(secret) // 2 :]}
    )
    for skip in range(3):  # base64 of a longer text that has the secret in it
        body = base64.b64encode(bytes(skip) + secret)
        written.add(body[4 if skip else 0 : len(body) // 4 * 4 - 4])
    return written


def search(data: bytes, wanted: dict[str, bytes]) -> set[str]:
    """Names of the secrets that are in `data`, in any form."""
    written = [form for secret in wanted.values() for form in forms(secret)]
    with tempfile.NamedTemporaryFile() as pieces:  # grep looks for all of them at once, in lines
        pieces.write(b"\n".join(max(form.split(b"\n"), key=len) for form in written))
        pieces.flush()
        command = ["grep", "--quiet", "--text", "--fixed-strings", f"--file={pieces.name}"]
        if subprocess.run(command, input=data, env={"PATH": os.defpath, "LC_ALL": "C"}).returncode == 1:
            return set()
    return {name for name, secret in wanted.items() if any(form in data for form in forms(secret))}


def shown(guest: Guest) -> Iterator[tuple[str, bytes]]:
    """What a running guest shows: (command, output)."""
    for command in EVERYWHERE:
        yield command, guest.sh(command, timeout=120, check=False).stdout


def stored(machine: Machine, found: dict[str, bytes]) -> Iterator[tuple[str, bytes]]:
    """What a machine that is off has written: (file, content), each disk as it is and, of the root, decrypted."""
    raw = machine.root_disk(machine.home / "root-now.raw")
    yield "root as it is", raw.read_bytes()
    yield "root, decrypted", decrypt(raw, found["DEK of root"])
    raw.unlink()
    for path in machine.home.glob("*.raw"):
        yield path.name, path.read_bytes()
    for path in machine.home.glob("console-*.log"):
        yield path.name, path.read_bytes()
