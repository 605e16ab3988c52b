# SPDX-License-Identifier: Apache-2.0
"""A host with unlock on it, from boot to boot: its disks, its enrolment, its report."""

import io
import json
import subprocess
from pathlib import Path
from typing import Any

from . import image
from .guest import Guest
from .luks import DATA_OFFSET
from .running import Disk, Running
from .uml import cow
from .uml.machine import ROOT, Uml
from .vm import VM, overlay

RECOVERY = "/run/recovery"
"""Where the recovery key is in the guest while a host is being enrolled: not on a disk, where it could be found."""

SENT = (
    "NV_Read",
    "NV_Read",
    "ReadPublic",
    "ReadPublic",
    "StartAuthSession",
    "PolicyPCR",
    "PolicyOR",
    "Unseal",
    "PCR_Extend",
)
"""What early boot sends to the TPM, beside the GetRandom with which the TPM library opens it."""
REACHED = (
    *("NV_Read", "NV_Read", "ReadPublic", "ReadPublic", "StartAuthSession", "ContextSave"),
    *("ContextLoad", "PolicyPCR", "ContextSave", "ContextLoad", "PolicyOR", "ContextSave"),
    *("ContextLoad", "Unseal", "ContextSave", "PCR_Extend"),
)
"""What reaches the TPM of it, with what the kernel's resource manager adds, for any number of disks."""


class Machine:
    """A machine that is off: its home, image and disks. `uefi`, `secure`: its firmware, see VM and Uml."""

    def __init__(self, home: Path, built: image.Image, uefi: bool = False, secure: bool = False) -> None:
        self.home, self.image, self.uefi, self.secure = home, built, uefi, secure
        self.disks: dict[str, Disk] = {}
        home.mkdir(parents=True, exist_ok=True)

    def disk(self, serial: str, mib: int) -> str:
        """Adds an empty disk; its path in the guest."""
        with (self.home / f"{serial}.raw").open("wb") as file:
            file.truncate(mib << 20)
        self.disks[serial] = Disk(f"{serial}.raw", serial)
        return self.disks[serial].device

    def devices(self, *serials: str) -> str:
        """Paths of disks in the guest, as arguments."""
        return " ".join(self.disks[serial].device for serial in serials)

    def boot(self, *, without: tuple[str, ...] = (), **options: Any) -> Running:
        """One boot, by what its image is for. `without`: disks that are not plugged in. `options`: of Uml or VM."""
        present = [disk for serial, disk in self.disks.items() if serial not in without]
        if self.image.runs == "uml":
            return Uml(self.home, self.image, disks=present, uefi=self.uefi, **options)
        loader = self.image.loader
        return VM(self.home, self.image, disks=present, uefi=self.uefi, secure=self.secure, loader=loader, **options)

    def clone(self, to: Path) -> "Machine":
        """A copy, disks and TPM and all: to try several things from one state."""
        other = Machine(to, self.image, self.uefi, self.secure)
        what = [each for each in self.home.iterdir() if each.suffix != ".writes"]
        subprocess.run(["cp", "-a", *what, to], check=True)
        other.disks = dict(self.disks)
        return other

    def root_header(self, to: Path) -> Path:
        """Copies what comes before the data of the root disk, and a little data."""
        size = DATA_OFFSET + (1 << 20)
        if self.image.runs == "uml":
            whole, over = (self.home / each for each in ROOT)
            with whole.open("rb") if whole.exists() else io.BytesIO(cow.read(over, size)) as source:
                to.write_bytes(source.read(size))
            return to
        command = ["qemu-img", "dd", "-f", "qcow2", "-O", "raw", f"bs={size}", "count=1"]
        subprocess.run([*command, f"if={self.home / 'root.qcow2'}", f"of={to}"], check=True, capture_output=True)
        return to

    def root_disk(self, to: Path) -> Path:
        """Copies the whole root disk."""
        if self.image.runs == "uml":
            to.write_bytes(cow.read(self.home / "root.cow", self.image.disk.stat().st_size))
        else:
            subprocess.run(["qemu-img", "convert", "-O", "raw", self.home / "root.qcow2", to], check=True)
        return to

    def replace_root(self, by: Path) -> Path:
        """Another disk, a file in this machine's directory, is in the root disk's place; the file that it is then."""
        if self.image.runs == "uml":
            return by.rename(self.home / ROOT[0])
        (self.home / "root.qcow2").unlink()
        overlay(by, self.home / "root.qcow2")
        return by

    def secrets(self) -> dict[str, str]:
        """The keys in the key cache when it was enrolled, in hex."""
        found: dict[str, str] = json.loads((self.home / "secrets.json").read_text())
        return found

    @property
    def recovery_key(self) -> str:
        """As printed. The operator keeps it outside the host."""
        return (self.home / "recovery-key").read_text().strip()


def report(console: Guest) -> dict[str, Any]:
    """What early boot did."""
    found: dict[str, Any] = json.loads(console.read("/run/unlock/report.json"))
    return found


def noted_in(booted: Running) -> list[str]:
    """The two commands that follow the agent's last of `agent_commands`."""
    names = [command.name for command in booted.tpm_commands() if command.name != "GetRandom"]
    locked = names.index("PCR_Extend", names.index("Unseal"))
    return names[locked + 1 : locked + 3]


def agent_commands(booted: Running) -> list[str]:
    """The commands at the TPM from the agent's first to its last, the resource manager's own among them; without the
    GetRandom of the kernel's random number generator, which comes at any time."""
    names = [command.name for command in booted.tpm_commands()]
    first = names.index("NV_Read")
    unsealed = names.index("Unseal", first)
    return [name for name in names[first : names.index("PCR_Extend", unsealed) + 1] if name != "GetRandom"]
