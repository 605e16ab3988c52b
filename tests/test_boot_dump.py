# SPDX-License-Identifier: Apache-2.0
"""A process crashes on a running host: what it knew is on no disk and in no swap, and comes back by the host key."""

import json
import os
import shutil
import subprocess
from pathlib import Path

import pytest

from tests.dumps import CRASHES
from tests.lab import leaks
from tests.lab.guest import Guest
from tests.lab.stories import findings, unmeasured, up

pytestmark = pytest.mark.vm

CROWD = """
import mmap, os, signal
for _ in range(16):
    if not os.fork():
        memory = mmap.mmap(-1, 1 << 36, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | 0x4000)  # MAP_NORESERVE
        memory[0] = 1  # or it is not in the core
        os.kill(os.getpid(), signal.SIGSEGV)
signal.pause()
"""


def secret() -> bytes:
    return os.urandom(24).hex().encode()


def crash(console: Guest, text: bytes) -> str:
    """The PID of a process that had the text in memory; through /dev/shm, which is memory, and is cleared."""
    console.write("/dev/shm/secret", text)
    script = "/usr/local/bin/crashes </dev/shm/secret & wait $!; code=$?; shred -u /dev/shm/secret; echo $! $code"
    pid, code = console.sh(script, timeout=120).out.split()
    assert code == "139", "it was killed by SIGSEGV"
    return pid


def pids(console: Guest) -> list[str]:
    return [str(each["pid"]) for each in json.loads(console.sh("unlock dump list --json").out)["dumps"]]


def dump_findings(console: Guest) -> dict[str, str]:
    found = findings(console)["findings"]
    return {each["what"]: each["verdict"] for each in found if each["what"] in ("core dumps", "swap")}


def test_what_a_crashing_process_knew_is_on_no_disk(tmp_path: Path) -> None:
    story = unmeasured().clone(tmp_path / "machine")
    swap = story.disk("swap", 64)
    program = tmp_path / "crashes"
    (tmp_path / "crashes.c").write_text(CRASHES)
    subprocess.run(["gcc", "-g", "-O1", "-static", "-o", program, tmp_path / "crashes.c"], check=True)
    encrypted, unkept, flushed, updated = (secret() for _ in range(4))
    controls = {"swapped": secret(), "plain": secret()}
    with story.boot() as booted:
        console = up(booted)
        console.write("/usr/local/bin/crashes", program.read_bytes(), 0o755)
        assert dump_findings(console) == {"core dumps": "safe"}
        console.sh(f"mkswap -q {swap} && swapon {swap}")
        assert dump_findings(console) == {"core dumps": "safe", "swap": "note"}

        pid = crash(console, encrypted)
        is_kept_and_told(console, pid)
        core = tmp_path / "core"
        core.write_bytes(console.sh(f"unlock dump extract {pid} | cat", timeout=120).stdout)
        assert encrypted in core.read_bytes()
        gdb = subprocess.run(["gdb", "-q", "-nx", "-batch", "-ex", "bt", program, core], capture_output=True, text=True)
        for frame in ("#0", "inner (x=", "outer (x=", "main ()"):
            assert frame in gdb.stdout, gdb.stdout + gdb.stderr
        stays_out_of_swap(console, pid)
        console.sh("unlock dump test", timeout=120)
        assert pids(console) == [pid]
        is_kept_beside_a_crowd(console)
        assert pids(console) == [pid]

        console.sh("mv /var/lib/unlock/dump-recipient /run/kept")
        is_told(console, crash(console, unkept))
        assert pids(console) == [pid]
        assert "no dump is kept" in console.sh("journalctl -b --no-pager -g 'no dump is kept'").out
        console.sh("mv /run/kept /var/lib/unlock/dump-recipient")

        console.sh("/usr/lib/systemd/systemd-sysctl /usr/lib/sysctl.d/50-coredump.conf")  # as its package does
        crash(console, updated)
        assert dump_findings(console)["core dumps"] == "note" and pids(console) == [pid]
        console.sh("unlock dump enable")
        assert dump_findings(console)["core dumps"] == "safe"

        is_the_control(console, controls)
        console.sh("unlock cache flush --yes")
        last = crash(console, flushed)
        assert pids(console) == [pid, last]
        assert console.sh(f"unlock dump extract {last}", check=False).code == 12
        booted.poweroff()
    del story.disks["swap"]  # which has no header
    wanted = {"encrypted": encrypted, "unkept": unkept, "flushed": flushed, "updated": updated, **controls}
    found = {where: leaks.search(data, wanted) for where, data in leaks.stored(story, leaks.secrets(story))}
    assert {where: names for where, names in found.items() if names} == {
        "root, decrypted": {"plain"},
        "swap.raw": {"swapped"},
    }
    shutil.rmtree(tmp_path / "machine", ignore_errors=True)


def is_kept_and_told(console: Guest, pid: str) -> None:
    """By us with the core, by systemd-coredump without; the writers ran where nothing is swapped."""
    assert pids(console) == [pid]
    is_told(console, pid)
    group = "/sys/fs/cgroup/unlock-dump"
    assert console.sh(f"cat {group}/memory.swap.max").out == "0"
    assert int(console.sh(f"cat {group}/memory.peak").out) > 1 << 20
    info = json.loads(console.sh(f"unlock dump info --json {pid}").out)
    assert (info["comm"], info["signal"], info["generation"], info["key"]) == ("crashes", 11, 1, "here")


def is_told(console: Guest, pid: str) -> None:
    """By systemd-coredump, whether we have the core or not."""
    for _ in range(100):
        told = console.sh(f"coredumpctl list --no-pager --json=short {pid}", check=False)
        if told.code == 0:
            break
        console.sh("sleep 0.1")
    (entry,) = json.loads(told.out)
    assert (entry["sig"], entry["corefile"], entry["exe"]) == (11, "none", "/usr/local/bin/crashes")


def is_kept_beside_a_crowd(console: Guest) -> None:
    """Sixteen processes of one service crash at once, as many as the kernel waits for, and their cores hardly end. Four
    of them are written or wait; another crash is kept meanwhile."""
    console.write("/run/crowd", CROWD.encode())
    console.sh("systemd-run --quiet --unit=crowd --uid=nobody python3 -IS /run/crowd")
    told = "journalctl -b --no-pager -o cat -g 'others of its user or service' | wc -l"
    for _ in range(120):
        if int(console.sh(told).out) >= 12:
            break
        console.sh("sleep 1")
    places = "grep -l 'CoreDumping:.1' /proc/[0-9]*/status 2>/dev/null | wc -l"
    console.sh(f"while [ $({places}) -gt 4 ]; do sleep 0.5; done", timeout=120)  # the others go to systemd-coredump
    other = crash(console, secret())
    assert other in pids(console) and console.sh("pgrep -c -x age").out == "1"
    assert int(console.sh(told).out) >= 12
    console.sh("systemctl kill --signal=KILL crowd; while pgrep -x dump; do sleep 0.5; done", timeout=120)
    cut = [each["name"] for each in json.loads(console.sh("unlock dump list --json").out)["dumps"]]
    console.sh(
        f"unlock dump delete --yes {' '.join(each for each in cut if '.python3.' in each or f'.{other}.' in each)}"
    )


def stays_out_of_swap(console: Guest, pid: str) -> None:
    """A core that gdb reads, also when the kernel wants the memory. There is a plain swap."""
    group = "/sys/fs/cgroup/unlock-dump"
    script = (
        "#!/bin/sh\ncat /proc/self/cgroup\n"
        f"echo 64M >{group}/memory.reclaim\n"
        'for each; do case $each in --core=*) head -c 4 "${each#--core=}" | tail -c 3; echo ;; esac; done\n'
        "cat /proc/self/oom_score_adj\n"
    )
    console.write("/usr/local/bin/gdb", script.encode(), 0o755)
    said = console.sh(f"unlock dump extract {pid} --gdb", check=False, timeout=120)
    assert said.out.split("\n") == ["0::/unlock-dump", "ELF", "1000"], said
    console.sh("rm /usr/local/bin/gdb")
    refused = console.sh(f"unlock dump extract {pid} --output /dev/shm/core", check=False)
    assert refused.code == 3 and "which is not encrypted" in refused.err


def is_the_control(console: Guest, controls: dict[str, bytes]) -> None:
    """Memory that is swapped out is found in the swap, and a core as systemd-coredump keeps it on the root disk."""
    console.write("/dev/shm/held", controls["swapped"] + b"\n")
    holder = "import sys, time; x = [sys.stdin.read() * 1000]; time.sleep(1000)"
    unit = "systemd-run --quiet --unit=hold --property=StandardInput=file:/dev/shm/held"
    console.sh(f'{unit} python3 -IS -c "{holder}"; sleep 3')
    reclaim = "echo 16M >/sys/fs/cgroup/system.slice/hold.service/memory.reclaim"
    console.sh(f"{reclaim}; systemctl stop --no-block hold; shred -u /dev/shm/held", check=False)
    console.sh("unlock dump disable --accept plain-dumps")
    console.write("/etc/systemd/coredump.conf.d/control.conf", b"[Coredump]\nCompress=no\n")
    pid = crash(console, controls["plain"])
    for _ in range(300):
        if console.sh(f"ls /var/lib/systemd/coredump | grep -F .{pid}.", check=False).code == 0:
            break
        console.sh("sleep 0.1")
    console.sh("sync; unlock dump enable; rm /etc/systemd/coredump.conf.d/control.conf")
