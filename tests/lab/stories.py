# SPDX-License-Identifier: Apache-2.0
"""What the boot stories share: a machine is enrolled once, by the product's own commands in the guest; each story
plays on a clone of it. None has a network card."""

import contextlib
import inspect
import json
import re
from typing import Any

from . import cache, image
from .console import ConsoleError
from .guest import Guest
from .image import Builder, Image, Runs
from .loader import Kind
from .machine import RECOVERY, Machine, report
from .running import Disk, Running
from .uml.machine import measured_boot

CAPPED = "C07F2888CEEB55738145657AC754AA052AC7CB24FAF81D0857304456E7589499"
"""PCR 15 after the cap and nothing else: SHA-256(32 zero bytes || SHA-256("unlock cap"))."""
BACKUP, PASSWORD = "/root/kdk.backup", "of the backup"
"""Of the native provider's key, in the guest."""
UNSEAL = """
import sys
sys.path.insert(0, "/usr/lib/unlock")
from unlock.errors import UnlockError
from unlock.tpm import slots
from unlock.tpm.chip import Tpm
try:
    with Tpm() as chip:
        slots.unseal(chip)
except UnlockError as error:
    print(error.code)
else:
    print("UNSEALED")
"""
"""What root could try after the cap."""
STOCK_PROMPT = "unlock disk root|passphrase for disk"
"""Of cryptsetup-initramfs and of systemd-cryptsetup."""
UNMEASURED = "--accept unmeasured-boot"
"""For a firmware that measures nothing, and for an initramfs that the kernel's command line names."""
SECRETS = """
import json, sys
sys.path.insert(0, "/usr/lib/unlock")
from unlock.host import keyring
print(json.dumps({name: bytes(keyring.get(name)).hex() for name in keyring.names()}))
"""
REPLAY = """
import sys
sys.path.insert(0, "/usr/lib/unlock")
from unlock.measured import eventlog, logs, verify
from unlock.paths import Paths
from unlock.tpm.chip import Tpm
later = logs.read_systemd_log(Paths())
with Tpm() as chip:
    live = chip.read_pcrs(range(eventlog.PCRS))
log, _ = logs.read_event_log(Paths(), later, live)
print(*verify.verified_events(log, later, live))
"""
MEASURED = {*range(10), *range(11, 15)}
"""PCRs that only early boot extends, which the event log must account for; IMA has 10, the cap is in 15."""


def begun(machine: Running) -> Guest:
    """Waits until early boot and what it handed over to are through; services may still be starting."""
    machine.guest.ready(machine.patience)
    machine.guest.sh("systemctl start sysinit.target", timeout=240)  # waits for the job that is there
    return machine.guest


def up(machine: Running) -> Guest:
    """Waits until the machine has booted, well or degraded; no job may be left."""
    machine.guest.booted(machine.patience)
    return machine.guest


def outcomes(console: Guest) -> dict[str, str]:
    """Mapping name, or serial number of a disk that has none, -> outcome."""
    serials = json.loads(console.sh("lsblk --json --nodeps -o PATH,SERIAL").out)["blockdevices"]
    names = {each["path"]: each["serial"] for each in serials}
    return {names.get(each["node"], each["node"]): each["outcome"] for each in report(console)["disks"]}


def status(console: Guest) -> dict[str, str]:
    """Group -> state."""
    return {each["name"]: each["state"] for each in json.loads(console.sh("unlock status --json").out)["groups"]}


def checked(console: Guest) -> dict[str, str]:
    """What `unlock check` says: "" -> its verdict, group -> the worst of its disks."""
    return verdicts(findings(console))


def findings(console: Guest) -> dict[str, Any]:
    """What `unlock check` says, in full."""
    done = console.sh("unlock check --json", check=False, timeout=600)
    assert done.out, f"exit status {done.code}: {done.err}"
    found: dict[str, Any] = json.loads(done.out)
    return found


def verdicts(found: dict[str, Any]) -> dict[str, str]:
    """The empty name -> the verdict, group -> the worst of its disks."""
    by_group = {"": str(found["verdict"])}
    for each in sorted(
        found["findings"], key=lambda each: ("note", "safe", "unproven", "unsafe").index(each["verdict"])
    ):
        if each["what"].startswith("group "):
            by_group[each["what"].removeprefix("group ").partition(",")[0]] = each["verdict"]
    return by_group


def pcr(console: Guest, number: int) -> str:
    return console.sh(f"cat /sys/class/tpm/tpm0/pcr-sha256/{number}").out


def replayed(console: Guest) -> set[int]:
    """PCRs of which the replayed event log gives the TPM's value."""
    return set(map(int, console.sh(f"python3 -I -c '{REPLAY}'").out.split()))


def unseal_as_root(console: Guest) -> str:
    return console.sh(f"python3 -I -c '{UNSEAL}'").out


def measured(runs: Runs = "uml", builder: Builder = "initramfs-tools") -> Machine:
    """Enrolled under UEFI, which measures kernel, initramfs and command line: a LUKS root and three disks."""
    built = image.build("luks", runs=runs, builder=builder)
    return _enrolled(built, "", {"data": ("d1", "d2", "d3")}, dict.fromkeys(("d1", "d2", "d3"), 200), uefi=True)


def unmeasured(runs: Runs = "uml", builder: Builder = "initramfs-tools", programs: str = "") -> Machine:
    """Enrolled under a firmware that measures nothing, with many groups."""
    groups: dict[str, tuple[str, ...]] = {each: (f"{each}-1",) for each in ("late", "copy", "ruined", "twin", "far")}
    groups["pair"] = ("pair-1", "pair-2")
    built = image.build("luks", runs=runs, builder=builder, programs=programs)
    return _enrolled(built, UNMEASURED, groups, {"pair-1": 200, "pair-2": 200})


def by_itself(kind: Kind) -> Machine:
    """Enrolled on a machine that boots from its own disks: a LUKS root and three more."""
    init = UNMEASURED if kind == "direct" else ""
    built = image.build("luks", boots=kind)
    return _enrolled(built, init, {"data": ("d1", "d2", "d3")}, dict.fromkeys(("d1", "d2", "d3"), 200))


def _enrolled(
    built: Image, init: str, groups: dict[str, tuple[str, ...]], sizes: dict[str, int], uefi: bool = False
) -> Machine:
    """Made once for all test files; the machine is for cloning only."""
    sources = [inspect.getsource(each) for each in (enroll, take_in_root, measured_boot)]
    name = cache.key(built.directory.name, str(uefi), init, repr(groups), repr(sizes), *sources)
    home = cache.entry(
        f"image-{name}-enrolled",
        lambda work: enroll(Machine(work, built, uefi=uefi), init, groups, sizes),
    )
    machine = Machine(home, built, uefi=uefi)
    for serial in (serial for serials in groups.values() for serial in serials):
        machine.disks[serial] = Disk(f"{serial}.raw", serial)
    return machine


def enroll(machine: Machine, init: str, groups: dict[str, tuple[str, ...]], sizes: dict[str, int]) -> None:
    """Boots with the root's passphrase and does what the README says, unattended."""
    for serials in groups.values():
        for serial in serials:
            machine.disk(serial, sizes.get(serial, 40))
    options: dict[str, Any] = {"log_writes": True} if machine.image.runs == "uml" else {}
    with machine.boot(**options) as booted:
        console = take_in_root(booted, machine, init)
        for name, serials in groups.items():
            create = f"unlock group create {name} --disk {machine.devices(*serials)} --mount /srv/{name}"
            create += f" --recovery-key-file {RECOVERY}"
            console.sh(create, timeout=240)
            if name in ("data", "pair"):
                again = console.sh(create, check=False)
                assert (again.code, f"there is a group {name} already" in again.err) == (3, True)
            console.sh(
                f"head -c 3000000 /dev/urandom > /srv/{name}/blob; sha256sum /srv/{name}/blob >> /root/sums; sync"
            )
            start = f"touch /srv/{name}/ran; exec sleep infinity"
            service = f"[Unit]\nRequiresMountsFor=/srv/{name}\n[Service]\nExecStart=/bin/sh -c '{start}'\n"
            service += "[Install]\nWantedBy=multi-user.target\n"
            console.write(f"/etc/systemd/system/app-{name}.service", service.encode())
        if groups:
            console.sh("systemctl --quiet enable " + " ".join(f"app-{name}.service" for name in groups))
        states = status(console)
        assert states == dict.fromkeys(["root", *groups], "open")
        (machine.home / "secrets.json").write_bytes(console.sh(f"python3 -I -c '{SECRETS}'").stdout)
        slow = r"/^\[group.\(pair\|ruined\|far\)\]/a deadline = 25"
        console.sh(f"sed -i '{slow}' /etc/unlock/unlock.toml")
        booted.poweroff()


def take_in_root(booted: Running, machine: Machine, init: str = "") -> Guest:
    """The root disk, opened at the first boot by its passphrase; each command twice."""
    booted.console.expect(STOCK_PROMPT, 300)
    booted.console.send(image.PASSPHRASE + "\n")
    console = up(booted)
    console.write("/root/password", PASSWORD.encode(), 0o600)
    console.write("/root/passphrase", image.PASSPHRASE.encode(), 0o600)
    first = f"unlock init --backup {BACKUP} --backup-password-file /root/password"
    if init == UNMEASURED:
        refused = console.sh(first, check=False, timeout=180)
        assert (refused.code, UNMEASURED in refused.err) == (3, True)
    console.sh(f"{first} {init}", timeout=180)
    again = console.sh("unlock init --backup /root/x --backup-password-file /root/password", check=False)
    assert (again.code, again.err.splitlines()[0]) == (3, "unlock: this host is initialised already")
    adopt = f"unlock disk adopt /dev/disk/by-uuid/{image.LUKS_UUID} --group root --passphrase-file /root/passphrase"
    before = console.sh("cryptsetup luksDump /dev/disk/by-uuid/" + image.LUKS_UUID).out
    console.sh(f"{adopt} --recovery-key-file {RECOVERY}", timeout=120)
    console.sh(f"{adopt} --recovery-key-file {RECOVERY}", timeout=120)  # twice is once
    after = console.sh("cryptsetup luksDump /dev/disk/by-uuid/" + image.LUKS_UUID).out
    assert re.search(r"  0: luks2\n(\t.*\n)+", before)[0] in after  # type: ignore[index]
    assert "root UUID=" in console.read("/etc/crypttab").decode()
    (machine.home / "recovery-key").write_bytes(console.read(RECOVERY))
    console.sh("rm /root/password /root/passphrase")
    return console


def open_shell(booted: Running) -> None:
    """Takes the shell of sulogin, which may drop what is typed early: so Enter is typed again."""
    booted.console.expect("Press Enter for .*maintenance", 300)
    booted.console.expect("continue.: ", 30)
    for patience in (5, 10, 20, 60):
        booted.console.send("\n")
        with contextlib.suppress(ConsoleError):
            booted.console.expect("# ", patience)
            return
    raise ConsoleError("sulogin opens no shell")
