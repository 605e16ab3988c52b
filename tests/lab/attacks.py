# SPDX-License-Identifier: Apache-2.0
"""What a thief prepares on a bench, with the host's disks and its TPM before him and no key of the host."""

import shutil
import subprocess
from pathlib import Path
from typing import Any

from tests.test_disk import edit
from tests.tpmfixture import Swtpm
from unlock.disks import disk_keys, luks
from unlock.disks.groups import Group, Member
from unlock.secret import Secret
from unlock.tpm.record import SLOTS, Payload

from . import image
from .luks import DATA_OFFSET, fill, format_disk
from .machine import Machine

FS_UUID = image.FS_UUID
PASSPHRASE = "the thief's own"
MARK = "stolen"
"""A file in each file system that the thief made, and the label of his data disks."""


def null_cipher(fields: dict[str, Any]) -> None:
    """The data is plaintext; keyslots, digest and token stay as the host wrote them."""
    for segment in fields["segments"].values():
        segment["encryption"] = "cipher_null-ecb"


def plaintext_root(machine: Machine) -> None:
    """The thief's system, readable, behind the host's own root header with a null cipher."""
    rogue = machine.root_header(machine.home / "rogue.raw")
    edit(str(rogue), null_cipher)
    _append(plain_system(machine), rogue)
    machine.replace_root(rogue)


def own_root(machine: Machine) -> Path:
    """The thief's system on a LUKS2 disk of his own, with the UUID of the host's; opened by his PASSPHRASE."""
    system = plain_system(machine)
    rogue = machine.home / "rogue.raw"
    format_disk(rogue, PASSPHRASE, size=DATA_OFFSET + system.stat().st_size, uuid=image.LUKS_UUID)
    fill(rogue, PASSPHRASE, system)
    return machine.replace_root(rogue)


def own_key(machine: Machine) -> None:
    """Into the free slot of the TPM, under the host's public policy and as the newest, a key of the thief's, which
    the host will unseal; and a root disk with a token that this key opens."""
    rogue = own_root(machine)
    with Secret.random(32) as persistence, Secret.random(32) as host_key, Secret.random(32) as kek:
        with Swtpm(machine.home / "tpm") as chip, chip.open() as tpm:
            states = {slot: tpm.slot_state(slot) for slot in SLOTS}
            ((_, genuine),) = [(slot, state.record) for slot, state in states.items() if state.record]
            (free,) = [slot for slot, state in states.items() if not state.record]
            tpm.ensure_srk()
            with Payload(persistence, False, genuine.needs).encode() as sealed:
                name = tpm.seal(free, genuine.branches, sealed)
            tpm.write_record(free, genuine._replace(generation=genuine.generation + 1, object_name=name))
        host = genuine.host.hex()
        group = Group("root", "thief/kek", 1, 1, (Member(image.LUKS_UUID, "root", ""),))
        with luks.Container(str(rogue)) as container, container.volume_key(Secret(PASSPHRASE.encode())) as dek:
            keys = disk_keys.Keys(persistence, host_key, kek, Secret.random(32))
            token = disk_keys.make_token(container, host, group, group.members[0], dek, keys)
            disk_keys.write_token(str(rogue), token, dek, keys)


def plaintext_data(path: Path) -> None:
    """A data disk whose header is the host's, but for the null cipher, with the thief's file system."""
    content = path.with_suffix(".rogue")
    with content.open("wb") as file:
        file.truncate(path.stat().st_size - DATA_OFFSET)
    subprocess.run(["mkfs.ext4", "-q", "-F", "-L", MARK, content], check=True)
    edit(str(path), null_cipher)
    _append(content, path)


def swap_tokens(one: Path, other: Path) -> None:
    """Two disks of the host with each other's tokens."""
    found: dict[Path, Any] = {}
    for path in (one, other):
        edit(str(path), lambda fields, path=path: found.update({path: fields["tokens"]}))
    for path, tokens in ((one, found[other]), (other, found[one])):
        edit(str(path), lambda fields, tokens=tokens: fields.update(tokens=tokens))


def plain_system(machine: Machine) -> Path:
    """The host's own system, as anybody could install it, with a mark."""
    system = machine.home / "system.ext4"
    subprocess.run(["cp", "--sparse=always", machine.image.plain, system], check=True)
    mark = machine.home / "mark"
    mark.write_text("")
    subprocess.run(["debugfs", "-w", "-R", f"write {mark} etc/{MARK}", system], check=True, capture_output=True)
    return system


def _append(content: Path, disk_file: Path) -> None:
    with content.open("rb") as source, disk_file.open("r+b") as target:
        target.seek(DATA_OFFSET)
        shutil.copyfileobj(source, target, 1 << 20)
    content.unlink()
