# SPDX-License-Identifier: Apache-2.0
"""The kernel of a running host crashes: a crash kernel encrypts its dump to a plain disk, nothing of the memory is on a
disk in plain, and after the next boot the host key opens it."""

import hashlib
import inspect
import json
import os
import shutil
import subprocess
import zlib
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.lab import cache, image, leaks
from tests.lab.guest import Guest
from tests.lab.machine import Machine
from tests.lab.running import Disk, Running
from tests.lab.stories import UNMEASURED, enroll, findings, take_in_root, unseal_as_root, up
from unlock.operations.dump import crash_kernel

pytestmark = pytest.mark.vm

PACKAGES = "makedumpfile kexec-tools kdump-tools"
KERNEL_IN_IMAGE = "for each in /usr/lib/modules/*; do cp /boot/vmlinuz-* $each/vmlinuz; done"
ZLIB = b"\x78\x01"
"""The beginning of a stream of its fastest level."""
HOLDER = """
import hashlib, sys, time
text = [hashlib.sha256(sys.stdin.buffer.read()).hexdigest() * 1000]
open("/run/holds", "w").close()
time.sleep(1000)
"""
SHARED = """
import ctypes, hashlib, sys
text = hashlib.sha256(sys.stdin.buffer.read()).hexdigest().encode()
libc = ctypes.CDLL(None)
assert libc.syscall(248, b"user", b"probe", text, len(text), -4) > 0  # add_key, to the user keyring
"""


def enrolled() -> Machine:
    """A LUKS root, by QEMU, with kdump-tools as Debian has it."""
    built = image.build("luks", runs="qemu", programs=PACKAGES, commands=[KERNEL_IN_IMAGE])
    name = cache.key(built.directory.name, "kernel-dump", *(inspect.getsource(each) for each in (enroll, take_in_root)))
    home = cache.entry(f"image-{name}-enrolled", lambda work: enroll(Machine(work, built), UNMEASURED, {}, {}))
    return Machine(home, built)


@pytest.mark.long(minutes=15)
def test_what_the_kernel_knew_is_on_no_disk_and_comes_back_by_the_host_key(tmp_path: Path) -> None:
    story = enrolled().clone(tmp_path / "machine")
    device = story.disk("dumps", 256)
    sent = [os.urandom(24).hex().encode() for _ in range(2)]
    process, kernel = (hashlib.sha256(each).hexdigest().encode() for each in sent)
    plain = os.urandom(24).hex().encode()
    append = f"crashkernel={crash_kernel.MEMORY}"
    with story.boot(append=append) as booted:
        console = up(booted)
        is_set_up(console, device)
        is_not_replaced(console)
        hold(console, process=sent[0], kernel=sent[1], plain=plain)
        unsealed = sum(each.name == "Unseal" for each in booted.tpm_commands())
        crash(booted)
    said = "".join(each.read_text(errors="replace") for each in story.home.glob("console-*.log"))
    assert "unlock: its log is there" in said and "unlock: the dump is whole" in said
    assert unsealed == sum(each.name == "Unseal" for each in booted.tpm_commands()), "the crash kernel unsealed nothing"
    del story.disks["dumps"]  # which has no LUKS header
    wanted = {"process": process, "kernel": kernel, "plain": plain, **leaks.secrets(story)}
    found = {where: leaks.search(data, wanted) for where, data in leaks.stored(story, leaks.secrets(story))}
    told = {where: names for where, names in found.items() if names}
    assert told.pop("root, decrypted") == {"plain"} and not told
    story.disks["dumps"] = Disk("dumps.raw", "dumps")
    with story.boot(append=append) as booted:
        console = up(booted)
        assert unseal_as_root(console) == "pcr-mismatch"
        name = is_listed(console)
        assert (
            "Kernel panic - not syncing: sysrq triggered crash"
            in console.sh(f"unlock dump extract {name.replace('kernel.', 'kernel-log.', 1)}").out
        )
        core = tmp_path / "core"
        take(console, name, core)
        opens(core, process=process, kernel=kernel)
        assert json.loads(console.sh("unlock dump kernel status --json").out)["state"] == "empty"
        booted.kill()
    shutil.rmtree(tmp_path / "machine", ignore_errors=True)


def is_set_up(console: Guest, device: str) -> None:
    before = findings(console)["findings"]
    (note,) = [each for each in before if each["what"] == "kernel dumps"]
    assert note["verdict"] == "note" and "kdump-tools" in note["detail"]
    enable = f"unlock dump kernel enable {device}"
    refused = console.sh(enable, check=False, timeout=120)
    assert refused.code == 3 and "--yes" in refused.err
    plan = json.loads(console.sh(f"{enable} --dry-run --json").out)
    assert len(plan["destroys"]) == 1 and device in plan["destroys"][0]
    console.sh(f"{enable} --yes", timeout=240)
    status = json.loads(console.sh("unlock dump kernel status --json").out)
    assert [status[each] for each in ("encrypted", "state", "loaded", "locked", "do")] == [
        True,
        "empty",
        True,
        True,
        "",
    ]
    assert status["memory"] == int(crash_kernel.MEMORY[:-1]) << 20
    assert "good" in console.sh("unlock dump kernel test", timeout=120).out
    (safe,) = [each for each in findings(console)["findings"] if each["what"] == "kernel dumps"]
    assert safe["verdict"] == "safe"


def is_not_replaced(console: Guest) -> None:
    """By an update of kdump-tools, by its commands, nor by hand."""
    for command in (
        "DEBIAN_FRONTEND=noninteractive DPKG_MAINTSCRIPT_NAME=postinst DPKG_MAINTSCRIPT_PACKAGE=kdump-tools "
        "sh /var/lib/dpkg/info/kdump-tools.postinst configure 1:1.8",
        "systemctl restart kdump-tools.service",
        "systemctl start kdump-tools-dump.service",
        "/etc/init.d/kdump-tools restart",
        "kdump-config load",
        "kdump-config try-reload",
        "kdump-config unload",
        "kexec -p -u",
    ):
        done = console.sh(command, check=False, timeout=240)
        print(command, done.code, done.out[-300:], done.err[-300:])
        assert console.sh("cat /sys/kernel/kexec_crash_loaded").out == "1", command
        assert json.loads(console.sh("unlock dump kernel status --json").out)["encrypted"] is True, command
    script = "kexec -p --reuse-cmdline --initrd=/usr/lib/unlock/crash-init /usr/lib/modules/*/vmlinuz"
    assert "not permitted" in console.sh(script, check=False).err


def hold(console: Guest, *, process: bytes, kernel: bytes, plain: bytes) -> None:
    """A process knows one text, the kernel another, each the hash of what is sent: a buffer of the port, which is the
    kernel's, keeps that. A third is in a file, as the control."""
    console.write("/dev/shm/held", process)
    console.write("/run/holder", HOLDER.encode())
    unit = "systemd-run --quiet --unit=hold --property=StandardInput=file:/dev/shm/held"
    console.sh(f"{unit} python3 -IS /run/holder; until [ -e /run/holds ]; do sleep 0.2; done; shred -u /dev/shm/held")
    console.sh(f"python3 -IS -c '{SHARED}'", stdin=kernel)
    console.write("/root/control", plain)


def crash(booted: Running) -> None:
    """The machine ends when the crash kernel reboots it."""
    booted.guest.sh("(sleep 2; unlock dump kernel test --panic --yes) >/dev/null 2>&1 &", timeout=30)
    booted.wait(600)


def is_listed(console: Guest) -> str:
    dump, log = sorted(json.loads(console.sh("unlock dump list --json").out)["dumps"], key=lambda each: each["kind"])
    release = console.sh("uname -r").out
    assert [(each["kind"], each["comm"]) for each in (dump, log)] == [("kernel", release), ("kernel-log", release)]
    assert (dump["generation"], dump["key"]) == (1, "here")
    return str(dump["name"])


def take(console: Guest, name: str, core: Path) -> None:
    """Piece by piece: what a command says is in the machine's /run, which is small."""
    console.sh(f"unlock dump extract {name} --output /dev/shm/core", timeout=240)
    piece = 32 << 20
    with core.open("wb") as file:
        for number in range(-(-int(console.sh("stat -c %s /dev/shm/core").out) // piece)):
            read = f"dd if=/dev/shm/core bs={piece} skip={number} count=1 status=none"
            file.write(console.sh(read, timeout=120).stdout)
    console.sh("shred -n 0 -z -u /dev/shm/core")


def opens(core: Path, *, process: bytes, kernel: bytes) -> None:
    """makedumpfile reads it: the kernel log has the panic, the pages have what the kernel knew, and no process's."""
    rearranged, log = core.with_name("rearranged"), core.with_name("log")
    with core.open("rb") as source:
        subprocess.run(["makedumpfile", "-R", rearranged], stdin=source, check=True, capture_output=True)
    subprocess.run(["makedumpfile", "--dump-dmesg", rearranged, log], check=True, capture_output=True)
    assert "Kernel panic - not syncing: sysrq triggered crash" in log.read_text(errors="replace")
    seen = dict.fromkeys(("process", "kernel"), False)
    for page in pages(rearranged.read_bytes()):
        seen["process"] |= process in page
        seen["kernel"] |= kernel in page
    assert seen["kernel"], "the control"
    assert not seen["process"], "a page of a process was kept"


def pages(dump: bytes) -> Iterator[bytes]:
    """The pages of a file of makedumpfile that it has compressed, by zlib: one after another."""
    at = dump.find(ZLIB)
    while at >= 0:
        unpacker, piece = zlib.decompressobj(), dump[at : at + 4096]
        try:
            page = unpacker.decompress(piece)
        except zlib.error:
            page = b""
        whole = unpacker.eof and len(page) == 4096
        if whole:
            yield page
        at = dump.find(ZLIB, at + (len(piece) - len(unpacker.unused_data) if whole else 1))
