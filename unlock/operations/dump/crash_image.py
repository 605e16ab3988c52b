# SPDX-License-Identifier: Apache-2.0
"""The initramfs of the crash kernel: system/crash-init, busybox, makedumpfile, age, the drivers of one partition, and
the recipient. It is made in memory at each boot, of the files of this system, so none on a disk is out of date.

There is no key in it, no program that could open a disk, and no unlock.
"""

import lzma
import os
import re
import shutil
import subprocess
import zlib
from typing import NamedTuple

from ...errors import CommandFailed, Refused
from ...keys.dump_key import Recipient
from ...paths import Paths
from ...run import run

INIT = "usr/lib/unlock/crash-init"
PROGRAMS = {"age": "age", "makedumpfile": "makedumpfile", "busybox": "busybox"}
"""Name -> Debian's package."""
APPLETS = [
    *("cat", "date", "dd", "head", "insmod", "mkfifo", "mount", "rm", "sh", "sleep", "sync", "tail", "tee"),
    *("uname", "wc"),
]
"""Of busybox: what crash-init calls."""
_DIRECTORIES = ("bin", "dev", "modules", "proc", "sys", "tmp")


class Config(NamedTuple):
    """What the crash kernel is told. All of it is public."""

    id: str
    """Of the partition."""
    recipient: Recipient

    def in_shell(self) -> str:
        to = self.recipient
        return f"id={self.id}\ngeneration={to.generation}\nfingerprint={to.fingerprint}\nrecipient={to.text}\n"


def make_image(paths: Paths, config: Config, modules: list[str]) -> bytes:
    """A cpio archive, compressed by gzip. `modules`: paths, in the order in which they are loaded. Raises Refused,
    CommandFailed, OSError."""
    files = {"init": _read(os.path.join(paths.root, INIT)), "config": config.in_shell().encode()}
    modes = {"init": 0o755}
    for name in PROGRAMS:
        for inside, path in _with_libraries(name).items():
            files[inside], modes[inside] = _read(path), 0o755
    names = []
    for path in modules:
        name = re.sub(r"\.(xz|zst|gz)$", "", os.path.basename(path))
        files[f"modules/{name}"] = _unpacked(path)
        names.append(name)
    files["modules/order"] = "".join(f"{name}\n" for name in names).encode()
    links = {f"bin/{name}": "busybox" for name in APPLETS}
    packer = zlib.compressobj(1, zlib.DEFLATED, 31)
    return packer.compress(_cpio(files, modes, links)) + packer.flush()


def modules_of(node_number: str, release: str, root: str = "/") -> list[str]:
    """Paths of the modules that a block device (MAJOR:MINOR) needs, each after those that it needs. Raises
    CommandFailed."""
    folder = os.path.realpath(os.path.join(root, f"sys/dev/block/{node_number}"))
    names = []
    while folder.startswith(os.path.join(root, "sys/devices/")):
        for link in ("driver/module", "device/driver/module"):
            path = os.path.join(folder, link)
            if os.path.exists(path):
                names.append(os.path.basename(os.path.realpath(path)))
        folder = os.path.dirname(folder)
    found: dict[str, None] = {}
    for name in reversed(list(dict.fromkeys(names))):  # the bus before the disk
        for line in run(["modprobe", "--show-depends", "--set-version", release, name]).splitlines():
            word, _, path = line.partition(" ")
            if word == "insmod":
                found[path.split(" ")[0]] = None
    return list(found)


def refuse_without_programs() -> None:
    """Raises Refused where a program is missing that kernel dumps need."""
    for name, package in {**PROGRAMS, "kexec": "kexec-tools"}.items():
        if not shutil.which(name):
            raise Refused(f"{name} is not installed", f"apt install {package}", code="command-missing")


def _with_libraries(name: str) -> dict[str, str]:
    """Path in the image -> path here, of a program and its libraries."""
    program = shutil.which(name)
    if not program:
        raise Refused(f"{name} is not installed", f"apt install {PROGRAMS[name]}", code="command-missing")
    found = {f"bin/{name}": program}
    listed = subprocess.run(["ldd", program], capture_output=True, text=True, env={"PATH": os.environ["PATH"]})
    if listed.returncode:
        if "not a dynamic executable" in listed.stdout + listed.stderr:
            return found
        raise CommandFailed(f"ldd {program}: {listed.stderr.strip()}")
    for path in re.findall(r"(?:=> |^\s+)(/\S+) \(0x", listed.stdout, re.M):
        found[path.lstrip("/")] = path
    return found


def _unpacked(path: str) -> bytes:
    """A module, as insmod of busybox takes it."""
    data = _read(path)
    if path.endswith(".xz"):
        return lzma.decompress(data)
    if path.endswith(".gz"):
        return zlib.decompress(data, 31)
    if path.endswith(".zst"):
        done = subprocess.run(["zstd", "-q", "-d", "-c", path], capture_output=True)
        if done.returncode:
            raise CommandFailed(f"zstd -d {path}: {done.stderr.decode('utf-8', 'replace').strip()}")
        return done.stdout
    return data


def _read(path: str) -> bytes:
    with open(path, "rb") as file:
        return file.read()


def _cpio(files: dict[str, bytes], modes: dict[str, int], links: dict[str, str]) -> bytes:
    """The format `newc` (cpio(5)); the same input gives the same bytes."""
    folders = {*_DIRECTORIES}
    for name in (*files, *links):
        while name := os.path.dirname(name):
            folders.add(name)
    archive = bytearray()

    def add(name: str, mode: int, data: bytes) -> None:
        fields = (len(archive) % 0xFFFF + 1, mode, 0, 0, 1, 0, len(data), 0, 0, 0, 0, len(name) + 1, 0)
        archive.extend(b"070701" + "".join(f"{each:08x}" for each in fields).encode())
        for part in (name.encode() + b"\0", data):
            archive.extend(part)
            archive.extend(bytes(-len(archive) % 4))

    for name in sorted(folders):
        add(name, 0o040755, b"")
    for name, to in sorted(links.items()):
        add(name, 0o120777, to.encode())
    for name, data in sorted(files.items()):
        add(name, 0o100000 | modes.get(name, 0o644), data)
    add("TRAILER!!!", 0, b"")
    return bytes(archive)
