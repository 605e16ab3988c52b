# SPDX-License-Identifier: Apache-2.0
"""A group of one disk, with an ext4, that is decrypted in place: the disk, a GPT or a DOS partition; what it holds."""

import json
import os
import subprocess
from pathlib import Path

from tests.deepfixture import crypt, read_plain
from tests.flowfixture import HOST, Host
from tests.inplace import MIB, fill, sh
from unlock.disks import disk_keys, find, luks, reencrypt_plan, token
from unlock.disks.header import Header
from unlock.errors import Malformed, Tampered
from unlock.secret import Secret

HEADER = 16 * MIB
BEFORE, AFTER = 2 * MIB, 4 * MIB
"""Bytes of other partitions before the disk's and after it."""


class Loop:
    """A loop device, with its partition: the kernel here may know no partition tables, but takes partitions."""

    def __init__(self, folder: Path, table: str, data: int, *, name: str = "disk", partition: bool = True) -> None:
        self.table, self.data = table, data
        self.image = folder / name
        size = HEADER + data
        with self.image.open("wb") as file:
            file.truncate(size if table == "none" else size + BEFORE + AFTER + 2 * MIB)
        if table != "none":
            kind = "CA7D7CCB-63ED-4C53-861C-1742536059CC" if table == "gpt" else "e8"
            rows = f"start={MIB // 512},size={BEFORE // 512}\n"
            rows += f"start={(MIB + BEFORE) // 512},size={size // 512},type={kind}\n"
            rows += f"start={(MIB + BEFORE + size) // 512},size={AFTER // 512}\n"
            sh("sfdisk", "--quiet", self.image, text=f"label: {table}\n{rows}".encode())
        self._has_partition = table != "none" and partition
        self.attach()

    def attach(self) -> None:
        self.disk = self.node = sh("losetup", "--find", "--show", "--partscan", self.image)
        if self._has_partition:
            self.node = f"{self.disk}p2"
            if not os.path.exists(self.node):
                sh("addpart", self.disk, 2, self.start // 512, (HEADER + self.data) // 512)

    def detach(self) -> None:
        for number in 1, 2, 3:
            subprocess.run(["delpart", self.disk, str(number)], stderr=subprocess.DEVNULL, check=False)
        subprocess.run(["losetup", "--detach", self.disk], stderr=subprocess.DEVNULL, check=False)

    @property
    def start(self) -> int:
        """Bytes before the header."""
        return 0 if self.table == "none" else MIB + BEFORE

    def partitions(self) -> list[tuple[int, int]]:
        """Start and size of each, as sfdisk reads them."""
        found = json.loads(sh("sfdisk", "--json", self.disk))["partitiontable"]["partitions"]
        return [(each["start"] * 512, each["size"] * 512) for each in found]

    def plain(self) -> bytes:
        """What lies where the data is, as the disk has it."""
        with open(self.disk, "rb", buffering=0) as file:
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
            return os.pread(file.fileno(), self.data, self.start + HEADER)


def protect(host: Host, loop: Loop, folder: Path, group: str = "photos", sector: int = 4096) -> bytes:
    """Makes the disk the only one of a group, with files. Returns its data in clear. `sector`: of its encryption, 512
    or 4096; the block of a loop device is 512, so that a hotzone has checksums or a journal."""
    host.disk_bytes = HEADER + loop.data + sector % 4096
    made = host.add_group(group, 1)
    image = host.disks.pop()
    host.disks.append(Path(loop.node))
    clear = folder / "clear"
    with clear.open("wb") as file:
        file.truncate(loop.data)
    fill(str(clear), folder, loop.data, files=min(4, loop.data // (3 * MIB)))
    data = clear.read_bytes()
    with luks.Container(str(image)) as container:
        assert container.metadata["segments"]["0"]["sector_size"] == sector
    with open(loop.node, "r+b", buffering=0) as disk, image.open("rb") as header:
        disk.write(header.read(HEADER))
        content = memoryview(crypt(host.deks[made.members[0].uuid], data, encrypt=True, sector=sector))
        while content:
            content = content[disk.write(content[: 8 * MIB]) :]
        os.fsync(disk.fileno())
    image.unlink()
    return data


def look(*nodes: str) -> find.Look:
    return lambda: find.read_headers(find.Found(each, "") for each in nodes)


def read_half(node: str, persistence: Secret) -> bytes:
    """The data of a half decrypted disk, by what early boot has. Only for a header without a hotzone."""
    with luks.Container(node) as container:
        each = fitting_token(container, persistence)
        with disk_keys.unwrap_kek(each, persistence) as kek:
            if each.reencryption:
                keys = disk_keys.unwrap_reencryption_keys(container, each, kek)
                return read_plain(Path(node), {str(each.reencryption.plan.old): bytes(keys.old)})
            digest = next(iter(container.metadata["digests"]))
            return read_plain(Path(node), {digest: bytes(disk_keys.unwrap_by_kek(container, each, kek))})


def fitting_token(header: Header, persistence: Secret) -> token.Token:
    """The token that opens the disk as its header is, the one with a plan first."""
    found = [each for each in disk_keys.read_tokens(header, HOST) if opens_by(header, each, persistence)]
    return next((each for each in found if each.reencryption), found[0])


def opens_by(header: Header, each: token.Token, persistence: Secret) -> bool:
    try:
        disk_keys.unwrap_volume_key(header, each, persistence).wipe()
    except (Malformed, Tampered):
        return False
    return True


def phase(node: str) -> str:
    """Of the plan in its token; '' without one."""
    with luks.Container(node) as container:
        for each in disk_keys.read_tokens(container, HOST):
            if each.reencryption:
                return reencrypt_plan.phase(container, each.reencryption.plan)
    return ""
