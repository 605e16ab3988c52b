# SPDX-License-Identifier: Apache-2.0
"""The key path alone, natively: Debian 13's own Python and libraries in a chroot, a software TPM, no device-mapper."""

import json
import subprocess
import time
from pathlib import Path
from typing import Any, NamedTuple

from tests.lab import luks
from tests.lab.image import Image
from tests.lab.process import start

RUNS = 41
PLACE = "/root/bench"
TCTI = f"swtpm:path={PLACE}/tpm"
PASSPHRASE = "bench"

SEAL = f"""
import sys
sys.path.insert(0, "/usr/lib/unlock")
from unlock.disks import disk_keys, luks
from unlock.tpm import chip, pcr_policy, slots
from unlock.tpm.record import Payload
from unlock.disks.groups import Group, Member
from unlock.secret import Secret
persistence, host = Secret.random(32), b"h" * 16
with chip.Tpm("{TCTI}") as tpm:
    selection = pcr_policy.select((7,))
    branch = pcr_policy.branch(selection, tpm.read_pcrs(range(16)))
    slots.seal_slot(tpm, host, selection, (branch,), Payload(persistence, False))
with luks.Container("{PLACE}/disk") as container, container.volume_key(Secret(b"{PASSPHRASE}")) as dek:
    member = Member(container.uuid, "b", "")
    keys = disk_keys.Keys(persistence, Secret.random(32), Secret.random(32), Secret.random(32))
    token = disk_keys.make_token(container, host.hex(), Group("b", "k", 1, 1, (member,)), member, dek, keys)
    disk_keys.write_token("{PLACE}/disk", token, dek, keys)
"""
"""What `init` and `disk adopt` would leave: a sealed slot and a disk with a token."""

KEYPATH = f"""
import time
marks = [time.monotonic()]
import unlock.__main__
from unlock import protect
from unlock.boot import activation, agent
from unlock.disks import disk_keys, luks, udev
from unlock.tpm import chip, pcr_policy, slots
marks.append(time.monotonic())
protect.protect()
monitor = udev.Monitor()
marks.append(time.monotonic())
with chip.Tpm("{TCTI}") as tpm:
    unsealed = slots.unseal(tpm)
    marks.append(time.monotonic())
    tpm.extend(16, pcr_policy.CAP_DIGEST)
marks.append(time.monotonic())
with luks.Container("{PLACE}/disk") as container:
    token = disk_keys.read_tokens(container, unsealed.record.host.hex())[0]
    marks.append(time.monotonic())
    disk_keys.unwrap_volume_key(container, token, unsealed.payload.key).wipe()
marks.append(time.monotonic())
print(marks)
"""
"""What early boot does until it has a volume key, one thing after the other. The cap goes to a PCR of no policy."""
MARKS = ("interpreter", "imports", "udev", "TPM, unsealed", "capped", "header", "volume key")

RACE = r"""
import json, os, subprocess, sys, time
job = json.load(sys.stdin)
found = {name: [] for name in job["cases"]}
for number in range(job["runs"] + 1):  # the first fills the caches
    for name, command in job["cases"].items():
        began = time.monotonic()
        child = subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
        said = child.stdout.read().decode()
        _, status, used = os.wait4(child.pid, 0)
        took = time.monotonic() - began
        child.returncode = status
        if number:
            cpu = used.ru_utime + used.ru_stime
            found[name].append({"began": began, "took": took, "cpu": cpu, "status": status, "said": said})
json.dump(found, sys.stdout)
"""
KEY, ATTACH, BARE, VERSION = "unlock", "systemd-cryptsetup attach", "python3 -I -c pass", "systemd-cryptsetup --version"


class Native(NamedTuple):
    """Milliseconds, a list for each case."""

    wall: dict[str, list[float]]
    cpu: dict[str, list[float]]
    key: list[float]
    """From unlock's exec to the volume key."""
    phases: dict[str, list[float]]
    """Of that: what each part takes."""


def measure(built: Image, home: Path) -> Native:
    """All cases in turn, RUNS times."""
    tree, state = home / "tree", home / "chip"
    subprocess.run(["cp", "-a", built.directory / "tree", tree], check=True)
    place = tree / PLACE.lstrip("/")
    place.mkdir()
    state.mkdir()
    launcher = (tree / "usr/sbin/unlock").read_text()
    before, entry, _ = launcher.partition("from unlock.__main__ import main\n")
    assert entry, "/usr/sbin/unlock starts otherwise than it did"
    (place / "keypath").write_text(before + KEYPATH)
    (place / "keypath").chmod(0o755)
    luks.format_disk(place / "disk", PASSPHRASE, size=luks.DATA_OFFSET + (1 << 20))
    (place / "passphrase").write_text(PASSPHRASE)
    command = ["swtpm", "socket", "--tpm2", "--tpmstate", f"dir={state}", "--flags", "not-need-init,startup-clear"]
    command += ["--server", f"type=unixio,path={place}/tpm", "--ctrl", f"type=unixio,path={place}/tpm.ctrl"]
    chip = start(command, [], home / "swtpm.log")
    try:
        while not (place / "tpm.ctrl").exists():
            assert chip.poll() is None, (home / "swtpm.log").read_text()
            time.sleep(0.01)
        enroll = ["systemd-cryptenroll", f"--tpm2-device={TCTI}", "--tpm2-pcrs=7"]
        _inside(tree, [*enroll, f"--unlock-key-file={PLACE}/passphrase", f"{PLACE}/disk"])
        _inside(tree, ["python3", "-I", "-c", SEAL])
        attach = ["systemd-cryptsetup", "attach", "none", f"{PLACE}/disk", "-", f"tpm2-device={TCTI},headless=1"]
        cases = {
            KEY: [f"{PLACE}/keypath", "boot", "agent"],
            ATTACH: attach,
            BARE: ["python3", "-I", "-c", "pass"],
            VERSION: ["systemd-cryptsetup", "--version"],
        }
        job = json.dumps({"runs": RUNS, "cases": cases})
        return _told(json.loads(_inside(tree, ["python3", "-I", "-c", RACE], job)))
    finally:
        chip.kill()
        chip.wait()


def _inside(tree: Path, command: list[str], job: str = "") -> str:
    """Runs it in the tree, with /proc and /dev but without device-mapper."""
    mounts = 'mount -t proc proc "$1/proc"; mount --rbind /dev "$1/dev"; [ ! -e "$1/dev/mapper" ] || '
    mounts += 'mount -t tmpfs none "$1/dev/mapper"; exec chroot "$@"'
    environment = {"PATH": "/usr/sbin:/usr/bin", "LC_ALL": "C"}
    inside = ["unshare", "--mount", "--propagation", "private", "sh", "-ec", mounts, "sh", str(tree), *command]
    done = subprocess.run(inside, input=job, env=environment, capture_output=True, text=True)
    if done.returncode != 0:
        raise RuntimeError(f"{command[:3]}: exit code {done.returncode}\n{done.stdout}{done.stderr}")
    return done.stdout


def _told(found: dict[str, list[dict[str, Any]]]) -> Native:
    wall = {name: [1000 * each["took"] for each in runs] for name, runs in found.items()}
    cpu = {name: [1000 * each["cpu"] for each in runs] for name, runs in found.items()}
    for each in found[ATTACH]:
        assert "device-mapper" in each["said"], f"systemd-cryptsetup did not get so far: {each['said']}"
    key: list[float] = []
    phases: dict[str, list[float]] = {name: [] for name in MARKS}
    for each in found[KEY]:
        assert each["status"] == 0, each["said"]
        marks = [each["began"], *json.loads(each["said"])]
        key.append(1000 * (marks[-1] - marks[0]))
        for number, name in enumerate(MARKS):
            phases[name].append(1000 * (marks[number + 1] - marks[number]))
    return Native(wall, cpu, key, phases)
