# SPDX-License-Identifier: Apache-2.0
"""A FAT as a thief left it, in the kernel's own driver: a name has two files, though the folder lists it once."""

import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.lab.machine import Machine
from tests.lab.stories import unmeasured, up

pytestmark = pytest.mark.vm

READS = """
import os, sys
sys.path.insert(0, "/usr/lib/unlock")
from unlock.paths import Paths
from unlock.predict.boot_tree import BootTree

def shown():
    tree = BootTree(Paths("/lab"))
    print(sorted(os.listdir("/lab/boot/EFI")), [tree.read("boot/EFI/" + name) for name in sys.argv[1:]])

shown()
os.rename("/lab/boot/EFI/vmlinuz.efi", "/lab/boot/EFI/old")
os.unlink("/lab/boot/EFI/old")
print(open("/lab/boot/EFI/vmlinuz.efi").read())
shown()
"""


@pytest.fixture
def story(tmp_path: Path) -> Iterator[Machine]:
    yield unmeasured().clone(tmp_path / "machine")
    shutil.rmtree(tmp_path / "machine", ignore_errors=True)


def checksum(short: bytes) -> int:
    """Of the short name, in each part of the long one: Microsoft FAT Specification, section 7."""
    total = 0
    for byte in short:
        total = ((total & 1) << 7) + (total >> 1) + byte & 0xFF
    return total


def crafted(folder: Path) -> bytes:
    """The thief's file is listed under a long name of its own, and is found by its short one too."""
    image = folder / "fat.img"
    with image.open("wb") as file:
        file.truncate(256 << 10)
    subprocess.run(["mkfs.vfat", image], check=True, capture_output=True)
    subprocess.run(["mmd", "-i", image, "::EFI"], check=True)
    for name, text in (("vmlinuz.efi", "good"), ("a long name.bin", "his")):
        (folder / "content").write_text(text)
        subprocess.run(["mcopy", "-i", image, folder / "content", f"::EFI/{name}"], check=True)
    data = bytearray(image.read_bytes())
    at, wanted = data.index(b"ALONGN~1BIN"), b"VMLINUZ EFI"
    for entry in range(at - 32, 0, -32):  # the parts of the long name come before it
        if data[entry + 11] != 0x0F or data[entry + 13] != checksum(b"ALONGN~1BIN"):
            break
        data[entry + 13] = checksum(wanted)
    data[at : at + 11] = wanted
    return bytes(data)


def test_a_short_name_that_is_anothers(story: Machine, tmp_path: Path) -> None:
    """After the host has removed its own file, the thief's is opened by the name: the folder does not list it."""
    with story.boot() as booted:
        console = up(booted)
        console.write("/lab/fat.img", crafted(tmp_path))
        console.sh("mkdir -p /lab/boot && mount -o loop /lab/fat.img /lab/boot")
        console.write("/lab/reads", READS.encode())
        said = console.sh("python3 -I /lab/reads vmlinuz.efi VMLINUZ.EFI 'a long name.bin'").out.splitlines()
        assert said == [
            "['a long name.bin', 'vmlinuz.efi'] [b'good', b'good', b'his']",
            "his",
            "['a long name.bin'] [None, None, b'his']",
        ]
        booted.kill()
