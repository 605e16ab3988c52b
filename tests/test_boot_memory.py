# SPDX-License-Identifier: Apache-2.0
"""What is left in a machine's memory for whoever gets a root shell, or a system of his own, in a boot that unsealed."""

import os
import re
import shutil
from collections.abc import Iterator
from hashlib import sha256
from pathlib import Path

import pytest

from tests.lab import attacks, leaks
from tests.lab.machine import Machine
from tests.lab.running import Running
from tests.lab.stories import begun, unmeasured
from tests.test_boot_silence import UNTOLD

pytestmark = pytest.mark.vm

FUNCTIONS = "usr/lib/unlock/functions"
KEPT = ((FUNCTIONS, "unlock_bounded 1200 boot scrub", "true"),)
"""Free memory stays as it is."""
CLEARS = "init_on_alloc=1"
"""As Debian's kernels do by themselves: what is in use has nothing in it of what was there before."""
PIECE, MEMORY = 16 << 20, 640 << 20
NOTHING = re.compile(rb"\0{1024,}")
"""Most of the memory."""


@pytest.fixture
def story(tmp_path: Path) -> Iterator[Machine]:
    """A clone of the enrolled machine."""
    yield unmeasured().clone(tmp_path / "machine")
    shutil.rmtree(tmp_path / "machine", ignore_errors=True)


def memory(booted: Running) -> Iterator[bytes]:
    """All of the machine's memory, in pieces: a file of the process that is its kernel, and what that has beside it.

    Each piece begins with the end of the one before."""
    assert booted._process
    below = tree(booted._process.pid)
    kernel = next(each for each in below if os.readlink(f"/proc/{each}/exe").endswith("/linux"))
    places = [f"/proc/{kernel}/fd/{number}" for number in os.listdir(f"/proc/{kernel}/fd")]
    (file,) = (each for each in places if os.readlink(each).startswith("/dev/shm/"))
    with open(file, "rb") as source:
        assert os.fstat(source.fileno()).st_size >= MEMORY
        last = b""
        while piece := source.read(PIECE):
            yield last + piece
            last = piece[-128:]
    with open(f"/proc/{kernel}/maps") as maps, open(f"/proc/{kernel}/mem", "rb", buffering=0) as source:
        for line in maps:
            span, rights = line.split()[:2]
            start, end = (int(each, 16) for each in span.split("-"))
            if rights.startswith("rw") and rights.endswith("p"):
                source.seek(start)
                yield source.read(end - start)


def tree(process: int) -> list[int]:
    """A process and those below it."""
    found = [process]
    for each in found:
        children = Path(f"/proc/{each}/task/{each}/children")
        found += map(int, children.read_text().split()) if children.exists() else []
    return found


def left(booted: Running, wanted: dict[str, bytes]) -> set[str]:
    """Names of the secrets that are in the machine's memory, half of one too."""
    with booted.frozen():
        used = (NOTHING.sub(bytes(64), piece) for piece in memory(booted))
        return {name for piece in used for name in leaks.search(piece, wanted)}


FREED = """#!/bin/sh
[ "$1" != prereqs ] || exit 0
python3 -I -c 'import hashlib; x = hashlib.sha256(b"of a process that ended").digest() * (3 << 20)'
"""
"""Leaves 96 MiB of free memory full of a key."""
BEFORE = {"scripts/init-top/freed": FREED}


def secrets(story: Machine) -> dict[str, bytes]:
    """Those of the host, and what FREED leaves."""
    return {**leaks.secrets(story), "freed": sha256(b"of a process that ended").digest()}


@pytest.mark.parametrize("kept", [False, True], ids=["overwritten", "kept"])
def test_with_the_roots_disk_pulled_a_shell_finds_no_key_in_memory(story: Machine, kept: bool) -> None:
    wanted = secrets(story)
    empty = story.home / "empty.raw"
    with empty.open("wb") as file:
        file.truncate(64 << 20)
    story.replace_root(empty)
    shell = story.image.cmdline.replace("panic=-1", "")
    initrd = story.image.initramfs(BEFORE, KEPT if kept else ())
    with story.boot(cmdline=shell, initrd=initrd, append=f"rootdelay=2 {CLEARS}", without=("late-1",)) as booted:
        booted.console.expect(r"\(initramfs\)", 300)
        planted = os.urandom(16).hex()
        booted.console.send(f"echo {planted} >/run/planted; cat /run/unlock/verdict\n")
        booted.console.expect("unsealed", 60)
        found = left(booted, {**wanted, "planted": planted.encode()})
        assert found == ({"planted", "freed"} if kept else {"planted"}), "what is in a file is found, and must be"
        booted.kill()


@pytest.mark.parametrize("kept", [False, True], ids=["overwritten", "kept"])
def test_a_thiefs_root_finds_no_key_in_memory(story: Machine, kept: bool) -> None:
    """He opens it by his passphrase, on a host that does not know that its root has to have a token."""
    wanted = secrets(story)
    attacks.own_root(story)
    initrd = story.image.initramfs(BEFORE, (*UNTOLD, *(KEPT if kept else ())))
    with story.boot(initrd=initrd, append=CLEARS) as booted:
        booted.console.expect("unlock disk root", 300)
        booted.console.send(attacks.PASSPHRASE + "\n")
        begun(booted).sh(f"test -e /etc/{attacks.MARK}")
        assert left(booted, wanted) == ({"freed"} if kept else set())
        booted.kill()
