# SPDX-License-Identifier: Apache-2.0
"""What is left in a machine's memory for whoever gets a root shell, or a system of his own, in a boot that unsealed."""

import os
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.lab import attacks, leaks
from tests.lab.machine import Machine
from tests.lab.running import Running
from tests.lab.stories import begun, unmeasured
from tests.test_boot_silence import UNTOLD

pytestmark = pytest.mark.vm

FUNCTIONS = "usr/share/initramfs-tools/scripts/unlock-functions"
KEPT = ((FUNCTIONS, "unlock_bounded 1200 boot scrub", "true"),)
"""Free memory stays as it is."""
PIECE = 64 << 20


@pytest.fixture
def story(tmp_path: Path) -> Iterator[Machine]:
    """A clone of the enrolled machine."""
    yield unmeasured().clone(tmp_path / "machine")
    shutil.rmtree(tmp_path / "machine", ignore_errors=True)


def memory(booted: Running) -> Iterator[bytes]:
    """All of the machine's memory, which is a file of the process that is its kernel; each piece with the end of the
    one before."""
    assert booted._process
    (file,) = {
        found
        for each in tree(booted._process.pid)
        for number in os.listdir(f"/proc/{each}/fd")
        if "vm_file" in os.readlink(found := f"/proc/{each}/fd/{number}") and os.stat(found).st_size >= 640 << 20
    } or [""]
    assert file, "no file of the machine's memory"
    with open(file, "rb") as source:
        last = b""
        while piece := source.read(PIECE):
            yield last + piece
            last = piece[-128:]


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
        return {name for piece in memory(booted) for name in leaks.search(piece, wanted)}


@pytest.mark.parametrize("kept", [False, True], ids=["overwritten", "kept"])
def test_with_the_roots_disk_pulled_a_shell_finds_no_key_in_memory(story: Machine, kept: bool) -> None:
    wanted = leaks.secrets(story)
    empty = story.home / "empty.raw"
    with empty.open("wb") as file:
        file.truncate(64 << 20)
    story.replace_root(empty)
    shell = story.image.cmdline.replace("panic=-1", "")
    initrd = story.image.initramfs({}, KEPT) if kept else None
    with story.boot(cmdline=shell, initrd=initrd, append="rootdelay=2", without=("late-1",)) as booted:
        booted.console.expect(r"\(initramfs\)", 300)
        wanted["planted"] = os.urandom(16).hex().encode()
        booted.console.send(f"echo {wanted['planted'].decode()} >/run/planted\n")
        booted.console.expect(r"\(initramfs\)", 60)
        found = left(booted, wanted)
        assert "planted" in found
        if kept:
            assert "unlock:persistence" in found, "nothing would be found"
        else:
            assert found == {"planted"}
        booted.console.send("cat /run/unlock/verdict /proc/sys/vm/min_free_kbytes\n")
        booted.console.expect("unsealed", 30)
        booted.kill()


@pytest.mark.parametrize("kept", [False, True], ids=["overwritten", "kept"])
def test_a_thiefs_root_finds_no_key_in_memory(story: Machine, kept: bool) -> None:
    """He opens it by his passphrase, on a host that does not know that its root has to have a token."""
    wanted = leaks.secrets(story)
    attacks.own_root(story)
    with story.boot(initrd=story.image.initramfs({}, (*UNTOLD, *(KEPT if kept else ())))) as booted:
        booted.console.expect("unlock disk root", 300)
        booted.console.send(attacks.PASSPHRASE + "\n")
        begun(booted).sh(f"test -e /etc/{attacks.MARK}")
        found = left(booted, wanted)
        assert bool(found) == kept, found
        booted.kill()
