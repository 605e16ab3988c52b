# SPDX-License-Identifier: Apache-2.0
"""Checks the configuration, and what could keep a reboot from being one: kexec, hibernation, a stopped command."""

import glob
import os
import re
from collections.abc import Iterator

from ...boot import unmeasured
from ...disks import devices, find, fstab
from ...errors import UnlockError
from ...host import config, this_boot
from ...host.journal import IN_CLEAR, disks_in_clear
from ...host.progress import percent
from ...host.state import State
from ...paths import Paths
from .. import under_way
from .finding import NOTE, UNPROVEN, UNSAFE, Finding


def check_configuration(paths: Paths) -> Iterator[Finding]:
    """Whether each group of unlock.toml can be mounted."""
    try:
        settings = config.load(paths.config)
    except (UnlockError, OSError) as error:
        yield Finding("unlock.toml", UNSAFE, f"no group that it names is mounted: {error}", f"edit {paths.config}")
        return
    taken = fstab.fstab_targets(paths.fstab)
    for table, fault in settings.faults.items():
        what = f"group {table.removeprefix('group.')} is not mounted: " if table.startswith("group.") else ""
        yield Finding("unlock.toml", UNSAFE, f"{what}{fault.error}", f"edit {paths.config}")
    for group in settings.groups.values():
        if group.deadline_asked:
            why = (
                f"group {group.name}: its deadline of {group.deadline_asked} s is taken for {group.deadline} s, a week"
            )
            yield Finding("unlock.toml", NOTE, why, f"edit {paths.config}")
        if group.mount in taken:
            why = f"group {group.name} is not mounted: /etc/fstab or another group has {group.mount}"
            yield Finding("unlock.toml", UNSAFE, why, f"edit {paths.config}")
        taken |= {group.mount} - {""}


def check_operation(paths: Paths, state: State, look: find.Look) -> Iterator[Finding]:
    """An operation that is under way: what it may have changed until its end is not what the other checks expect."""
    now = under_way.read(paths, state, look)
    if now is None:
        return
    stopped = f"`{now.command}` was stopped before its end"
    what = {"running": f"`{now.command}` is under way", "paused": f"`{now.command}` is paused"}.get(now.state, stopped)
    where = f": {percent(now.done, now.total)} %" if now.total else ""
    yield Finding("operation", UNPROVEN, f"{what}{where}", now.finish or "unlock operation show")
    for name in disks_in_clear(state.journal):
        yield Finding(name, NOTE, IN_CLEAR, "unlock operation show")
    for each in now.then:
        yield Finding("operation", UNPROVEN, f"`{each}` goes on after it", each)


def check_kexec(paths: Paths) -> Iterator[Finding]:
    """Whether the next reboot is one by kexec, which leaves the TPM locked."""
    if _read_line(paths, "sys/kernel/kexec_loaded") == "1":
        why = "a kernel is loaded, and a reboot may start it without a reset of the TPM, which is locked until then"
        yield Finding("kexec", UNSAFE, why, "kexec --unload")
    if re.search("(?m)^LOAD_KEXEC=[\"']?true", _read_line(paths, "etc/default/kexec")):
        why = "kexec-tools loads a kernel at each reboot, which starts without a reset of the TPM"
        yield Finding("kexec", UNSAFE, why, "LOAD_KEXEC=false in /etc/default/kexec")


def check_hibernation(paths: Paths, ours: set[str]) -> Iterator[Finding]:
    """Whether hibernation writes keys to a disk that is not encrypted."""
    number = _read_line(paths, "sys/power/resume")
    if number in ("", "0:0"):
        return
    if not devices.is_encrypted(number, paths.root):
        why = "the host hibernates to a disk that is not encrypted, with all keys in memory; unlock resumes from none"
        yield Finding("hibernation", UNSAFE, why, "take resume= away, or put the swap on an encrypted disk")
    elif not devices.device_lies_on_mappings(number, ours, paths.root):
        why = "the host hibernates to a disk that unlock does not open: nothing is resumed from it"
        yield Finding("hibernation", NOTE, why, "unlock disk adopt")


def check_system(paths: Paths, ours: set[str]) -> Iterator[Finding]:
    """What controls this system beside the root file system: other file systems, systemd's other inputs, its shells."""
    for where in devices.unproven_system_mounts(ours, paths.root):
        if where != "/":
            why = "it lies on no disk that unlock opens: whoever edits it controls this system, and gets the keys"
            yield Finding(where, NOTE, why, "unlock disk adopt, or move it to the root file system")
    if unmeasured.has_options(paths):
        deleted = "the EFI variable SystemdOptions is set, which nothing measures: the next boot deletes it"
        yield Finding("systemd", NOTE, deleted, "bootctl systemd-efi-options ''")
    if credentials := unmeasured.credentials(paths):
        closed = f"add {unmeasured.CLOSED} to the kernel command line, then: unlock policy predict"
        yield Finding("systemd", UNSAFE, f"{credentials}: the next boot opens nothing by itself", closed)
    if shell := _describe_emergency_shell(paths):
        yield Finding("console", NOTE, shell, "passwd root, or systemctl mask emergency.service rescue.service")


def check_cap(paths: Paths) -> Iterator[Finding]:
    """Whether every TPM is locked in this boot."""
    if this_boot.read_early_report(paths) is None:
        return
    for name in sorted(set(this_boot.list_tpms()) - this_boot.capped_tpms(paths)):
        why = f"{name} was not locked in this boot: whoever is root here can ask it for the key"
        yield Finding("TPM", UNSAFE, why, "systemctl start unlock-cap")


def _describe_emergency_shell(paths: Paths) -> str:
    """Who gets systemd's emergency shell at the console, where it asks for no password; ''."""
    shadow = _read_line(paths, "etc/shadow")
    password = next((line.split(":")[1] for line in shadow.splitlines() if line.startswith("root:")), "*")
    if password == "":
        return "root has no password: whoever is at the console has a shell once a unit of the boot fails"
    for unit in ("emergency.service", "rescue.service"):
        for path in glob.glob(os.path.join(glob.escape(paths.root), "etc/systemd/system", f"{unit}.d", "*.conf")):
            if "SYSTEMD_SULOGIN_FORCE=1" in _read_line(paths, os.path.relpath(path, paths.root)):
                return f"{path} has SYSTEMD_SULOGIN_FORCE=1: whoever is at the console has a shell once a unit fails"
    return ""


def _read_line(paths: Paths, name: str) -> str:
    """The content of a small file below the root directory; "" when it cannot be read."""
    try:
        with open(os.path.join(paths.root, name), encoding="ascii", errors="replace") as file:
            return file.read().strip()
    except OSError:
        return ""
