# SPDX-License-Identifier: Apache-2.0
"""The core of a process with 1 GiB of memory: system/dump beside systemd-coredump, each as the kernel would start it,
by turns, in a container of Debian 13 with its own systemd. gdb makes the core, of a process here."""

import json
import shutil
import subprocess
from pathlib import Path
from typing import Any, NamedTuple

from tests.lab.image import Image

OURS, THEIRS = "unlock", "systemd-coredump"
ROUNDS = 5
CORES = {"a quarter noise": 4, "all noise": 1}
"""What the memory has, and of how many pages one is noise; the others have numbers as text, or are zero."""

HOLDS = r"""
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>
int main(int count, char **words) {
    const size_t size = (size_t)1 << 30, page = 4096;
    unsigned char *memory = malloc(size);
    unsigned long long noise = 88172645463325252ULL;
    for (size_t at = 0; at < size; at += page) {
        if (at / page / 4 % atoi(words[1]) == 0)
            for (size_t i = 0; i < page; i += 8) {
                noise ^= noise << 13, noise ^= noise >> 7, noise ^= noise << 17;
                memcpy(memory + at + i, &noise, 8);
            }
        else if (at / page / 4 % atoi(words[1]) == 1)
            memset(memory + at, 0, page);
        else
            for (size_t i = 0; i < page; i += 16) {
                char text[17];
                snprintf(text, sizeof text, "%015zu ", (at + i) / 64);
                memcpy(memory + at + i, text, 16);
            }
    }
    puts("ready");
    fflush(stdout);
    pause();
}
"""
RACE = r"""
import json, os, subprocess, threading, time
from pathlib import Path

class Peak(threading.Thread):
    def __init__(self, session):
        super().__init__(daemon=True)
        self.session, self.most, self.ended = session, 0, False

    def run(self):
        while not self.ended:
            together = 0
            for folder in Path("/proc").glob("[0-9]*"):
                try:
                    if int((folder / "stat").read_text().rpartition(")")[2].split()[3]) == self.session:
                        words = (folder / "status").read_text().partition("VmHWM:")[2].split()
                        together += int(words[0]) << 10 if words else 0
                except (OSError, ValueError, IndexError):
                    pass
            self.most = max(self.most, together)
            time.sleep(0.02)

def store(core, program, folder, end, limit):
    crashed = subprocess.Popen(["sleep", "1000"])
    for each in folder.glob("core.*"):
        each.unlink()
    os.sync()
    with open(core, "rb") as file:  # it is in memory, as that of a process is
        while file.read(1 << 20):
            pass
    read, write = os.pipe()
    begun = time.monotonic()
    words = [program, crashed.pid, 0, 0, 11, int(time.time()), limit, "host"]
    handler = subprocess.Popen(list(map(str, words)), stdin=read, cwd="/", start_new_session=True)
    peak = Peak(handler.pid)
    peak.start()
    kernel = subprocess.Popen(["cat", core], stdout=write)
    os.close(read)
    os.close(write)
    while not (found := [each for each in folder.glob("core.*") if each.name.endswith(end)]):
        if time.monotonic() > begun + 300:
            raise SystemExit(f"{program} has stored nothing")
        time.sleep(0.005)
    took = time.monotonic() - begun
    status = kernel.wait(), handler.wait(100)
    peak.ended = True
    crashed.kill()
    crashed.wait()
    if any(status):
        raise SystemExit(f"{program}: {status}")
    return {"seconds": took, "bytes": found[0].stat().st_size, "memory": peak.most}

job = json.loads(Path("/job.json").read_text())
found = {core: {name: [] for name in job["programs"]} for core in job["cores"]}
for core, of_core in found.items():
    for _ in range(job["rounds"]):
        for name, (program, folder, end, limit) in job["programs"].items():
            of_core[name].append(store(core, program, Path(folder), end, limit))
Path("/found.json").write_text(json.dumps(found))
"""
"""Time is that until the file has its name. `limit`: the size that the process allows a core to have."""
PROGRAMS = {
    OURS: ("/usr/lib/unlock/dump", "/var/lib/unlock/dumps", ".age", 0),
    THEIRS: ("/usr/lib/systemd/systemd-coredump", "/var/lib/systemd/coredump", ".zst", 2**64 - 1),
}
SERVICE = """\
[Unit]
After=multi-user.target
[Service]
Type=oneshot
# That of systemd-coredump@.service.
Nice=9
ExecStart=python3 /race.py
ExecStopPost=systemctl poweroff --no-block
StandardOutput=file:/said
StandardError=file:/said
[Install]
WantedBy=graphical.target
"""


class Stored(NamedTuple):
    """One core, stored once."""

    seconds: float
    bytes: int
    """Of the file."""
    memory: int
    """The largest sum, of the processes of the writer that live at once, of what each has had in memory at the most.
    Not for systemd-coredump: a service does its work."""


def measure(built: Image, home: Path) -> dict[str, dict[str, list[Stored]]]:
    """Core -> program -> its runs."""
    tree = home / "container"
    subprocess.run(["cp", "-a", "--reflink=auto", built.directory / "tree", tree], check=True)
    try:
        _prepare(tree, home)
        command = ["systemd-nspawn", "--quiet", "--register=no", "--keep-unit", "--boot", f"--directory={tree}"]
        subprocess.run(command, stdin=subprocess.DEVNULL, capture_output=True, timeout=1800)
        if not (tree / "found.json").exists():
            raise RuntimeError(f"the container has measured nothing: {(tree / 'said').read_text()}")
        found: dict[str, dict[str, list[dict[str, Any]]]] = json.loads((tree / "found.json").read_text())
    finally:
        shutil.rmtree(tree)
    return {
        name: {program: [Stored(**each) for each in runs] for program, runs in found[f"/core-{number}"].items()}
        for name, number in CORES.items()
    }


def _prepare(tree: Path, home: Path) -> None:
    for number in CORES.values():
        _make_core(home, tree / f"core-{number}", number)
    made = subprocess.run(["age-keygen"], capture_output=True, check=True, text=True).stdout
    recipient = next(line.split()[-1] for line in made.splitlines() if "public key" in line)
    (tree / "var/lib/unlock").mkdir(parents=True, exist_ok=True)
    (tree / "var/lib/unlock/dump-recipient").write_text(f"# unlock: host key 1 {'0' * 16}\n{recipient}\n")
    job = {"rounds": ROUNDS, "cores": [f"/core-{number}" for number in CORES.values()], "programs": PROGRAMS}
    (tree / "job.json").write_text(json.dumps(job))
    (tree / "race.py").write_text(RACE)
    units = tree / "etc/systemd/system"
    (units / "race.service").write_text(SERVICE)
    (units / "graphical.target.wants").mkdir(exist_ok=True)
    (units / "graphical.target.wants/race.service").symlink_to("../race.service")
    (units / "lab-agent.service").unlink(missing_ok=True)
    (units / "lab-agent.service").symlink_to("/dev/null")
    for name in ("fstab", "crypttab"):
        (tree / "etc" / name).write_text("")


def _make_core(home: Path, path: Path, number: int) -> None:
    """Of a process in whose memory one of `number` pages is noise."""
    (home / "holds.c").write_text(HOLDS)
    subprocess.run(["gcc", "-O1", "-o", home / "holds", home / "holds.c"], check=True)
    with subprocess.Popen([home / "holds", str(number)], stdout=subprocess.PIPE) as holds:
        assert holds.stdout and holds.stdout.readline()
        command = ["gdb", "-q", "-nx", "-batch", "-p", str(holds.pid), "-ex", f"generate-core-file {path}"]
        subprocess.run(command, check=True, capture_output=True)
        holds.kill()
