# SPDX-License-Identifier: Apache-2.0
"""A host whose disks are loop devices with data on them, for re-encryption: image files have no lock of their own."""

import os
import shutil
import subprocess
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

from cryptography.hazmat.primitives.ciphers import Cipher, algorithms, modes

from tests.flowfixture import HOST, Host
from tests.killing import child
from unlock.disks import disk_keys, find, luks, reencrypt, reencrypt_plan
from unlock.disks.raw_header import read_valid_copies
from unlock.errors import Malformed, Tampered
from unlock.keys import access
from unlock.operations import rekey_deep
from unlock.secret import Secret

DATA = 4 << 20
"""Bytes of data of a disk."""
HEADER = 16 << 20


@contextmanager
def loop(image: Path) -> Iterator[str]:
    """The image as a block device."""
    shown = subprocess.run(["losetup", "-f", "--show", image], capture_output=True, text=True, check=True)
    node = shown.stdout.strip()
    try:
        yield node
    finally:
        subprocess.run(["losetup", "-d", node], check=True)


class DeepHost(Host):
    """With `count` disks in the group `data`, each with random data. `sector`: of its encryption, 512 or 4096; the
    block of a loop device is 512, so that a hotzone has checksums or a journal."""

    def __init__(self, folder: Path, count: int = 1, sector: int = 4096) -> None:
        self.disk_bytes += sector % 4096
        super().__init__(folder, count)
        self.nodes: dict[Path, str] = {}
        self.plain: dict[Path, bytes] = {}
        for image in self.disks:
            os.truncate(image, HEADER + DATA)
            self.plain[image] = os.urandom(DATA)
            with image.open("r+b") as file:
                file.seek(HEADER)
                file.write(crypt(self.dek(image), self.plain[image], encrypt=True, sector=sector))

    @contextmanager
    def plugged_in(self) -> Iterator["DeepHost"]:
        """The images as block devices."""
        with ExitStack() as loops:
            for image in self.disks:
                self.nodes[image] = loops.enter_context(loop(image))
            yield self
        self.nodes.clear()

    def dek(self, image: Path) -> bytes:
        """The volume key that the disk had at first."""
        return self.deks[read_valid_copies(str(image))[0].content[168:208].rstrip(b"\0").decode()]

    def look(self) -> dict[str, list[find.Found]]:
        return find.read_headers(find.Found(node, "") for node in self.nodes.values())

    def choices(self, *passphrases: Secret, recovery: Secret | None = None) -> rekey_deep.Choices:
        return rekey_deep.Choices("data", lambda: (recovery or self.recovery).copy(), passphrases)

    def rekey(self, tell: Any = lambda done, total: False, **options: Any) -> list[rekey_deep.Outcome]:
        return rekey_deep.rekey_deep(self.paths, self.choices(), tell, look=self.look, **options)

    def resume(self, tell: Any = lambda done, total: False) -> list[rekey_deep.Outcome]:
        return rekey_deep.resume(self.paths, tell, self.look, access.connect)


def metadata(image: Path) -> dict[str, Any]:
    """Of the newest copy of the header."""
    return read_valid_copies(str(image))[0].metadata(str(image))


def crypt(key: bytes, data: bytes, *, encrypt: bool, sector: int = 4096, first: int = 0) -> bytes:
    """aes-xts-plain64 as dm-crypt does it. `first`: the IV of the first sector, in units of 512 bytes."""
    out = bytearray()
    for at in range(0, len(data), sector):
        iv = (first + at // 512).to_bytes(16, "little")
        cipher = Cipher(algorithms.AES(key), modes.XTS(iv))
        worker = cipher.encryptor() if encrypt else cipher.decryptor()
        out += worker.update(data[at : at + sector]) + worker.finalize()
    return bytes(out)


def read_plain(image: Path, keys: dict[str, bytes]) -> bytes:
    """The data as a mapping over the disk would show it. `keys`: by number of their digest. A hotzone has none."""
    header = metadata(image)
    with image.open("rb") as file:
        size = file.seek(0, os.SEEK_END)
        out = b""
        for number, each in sorted(header["segments"].items(), key=lambda item: int(item[0])):
            if any(flag.startswith("backup") for flag in each.get("flags", ())):
                continue
            assert "flags" not in each, "a hotzone that is not recovered"
            start = int(each["offset"])
            length = size - start if each["size"] == "dynamic" else int(each["size"])
            file.seek(start)
            data = file.read(length)
            if each["type"] == "linear":
                out += data
                continue
            key = next(keys[digest] for digest, fields in header["digests"].items() if number in fields["segments"])
            out += crypt(key, data, encrypt=False, sector=each["sector_size"], first=int(each["iv_tweak"]))
    return out


class Keys(NamedTuple):
    """What a host has in its key cache, and its operator."""

    host: str
    persistence: Secret
    recovery: Secret


def judge(host: DeepHost, path: Path, plain: bytes) -> str:
    """See `judge_disk`."""
    return judge_disk(Keys(HOST, host.persistence, host.recovery), path, plain)


def judge_disk(have: Keys, path: Path, plain: bytes) -> str:
    """Opens a disk as early boot does, on a copy of it that this changes, and by the recovery key; compares the data.
    Returns the phase that it was in; '' where no token has a plan."""
    phase = ""
    keys: dict[str, bytes] = {}
    opens = moving = False
    with luks.Container(str(path)) as container:
        for each in disk_keys.read_tokens(container, have.host):
            try:
                with disk_keys.unwrap_volume_key(container, each, have.persistence) as key:
                    opens = True
                    covering = [n for n, fields in container.metadata["digests"].items() if fields["segments"]]
                    if not disk_keys.is_moving(container, each):
                        container.verify_volume_key(key)
                        keys[covering[0]] = bytes(key)
            except (Tampered, Malformed):
                continue
            with disk_keys.dek_by_checked_recovery_key(container, each, have.recovery) as by_recovery:
                moves = disk_keys.is_moving(container, each)
                assert bytes(by_recovery) in (bytes(have.recovery) if moves else b"", *keys.values())
            if each.reencryption:
                plan = each.reencryption.plan
                phase, moving = reencrypt_plan.phase(container, plan), moves
                with disk_keys.unwrap_kek(each, have.persistence) as kek:
                    found = disk_keys.unwrap_reencryption_keys(container, each, kek)
                keys[str(plan.old)], keys[str(plan.new)] = bytes(found.old), bytes(found.new)
    assert opens, "no token opens it"
    stock_opens(path, have.recovery)
    if moving:
        facts = host_facts(path, plan)
        assert child(partial(settle_as_a_worker, path, plan, found.operation)) == 0
        assert host_facts(path, plan) == facts
    assert read_plain(path, keys) == plain
    return phase


def plain_of(path: Path, have: Keys) -> bytes:
    """The data of a disk at rest."""
    with luks.Container(str(path)) as container:
        (each,) = disk_keys.read_tokens(container, have.host)
        with disk_keys.unwrap_volume_key(container, each, have.persistence) as dek:
            return read_plain(path, dict.fromkeys(container.metadata["digests"], bytes(dek)))


def finish_disk(have: Keys, path: Path, plain: bytes) -> bool:
    """Re-encrypts the rest of a disk, if it has a plan: then the new volume key gives the same data."""
    with luks.Container(str(path)) as container:
        plans = [each for each in disk_keys.read_tokens(container, have.host) if each.reencryption]
        if not plans:
            return True
        (each,) = plans
        assert each.reencryption
        plan = each.reencryption.plan
        with disk_keys.unwrap_kek(each, have.persistence) as kek:
            found = disk_keys.unwrap_reencryption_keys(container, each, kek)
    with loop(path) as node:
        phase = reencrypt.settle(node, plan, found.operation)
        if phase == reencrypt_plan.OLD:
            with reencrypt.Disk(node) as disk:
                disk.start("", found.operation, plan)
        if phase != reencrypt_plan.NEW:
            with reencrypt.Disk(node) as disk:
                disk.run("", found.operation, lambda done, total: False)
        assert reencrypt.finish(node, plan)
    return read_plain(path, {str(plan.new): bytes(found.new)}) == plain


def settle_as_a_worker(path: Path, plan: reencrypt_plan.Plan, passphrase: Secret) -> None:
    """In a process that early boot has forked: boot.worker."""
    luks.only_read()
    reencrypt.settle(str(path), plan, passphrase)


def host_facts(path: Path, plan: reencrypt_plan.Plan) -> dict[str, Any]:
    with luks.Container(str(path)) as container:
        return reencrypt_plan.plan_facts(container, plan)


def stock_opens(path: Path, passphrase: Secret) -> None:
    """cryptsetup itself takes the passphrase. On a copy: it repairs the older copy of the header by the newer, which
    may rely on checksums that were lost."""
    copy = shutil.copy(path, f"{path}.stock")
    command = ["cryptsetup", "open", "--test-passphrase", "--key-file", "-", copy]
    done = subprocess.run(command, input=bytes(passphrase), capture_output=True)
    os.unlink(copy)
    assert done.returncode == 0, done.stderr.decode()
