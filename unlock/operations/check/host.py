# SPDX-License-Identifier: Apache-2.0
"""Checks the configuration, and what could keep a reboot from being one: kexec, hibernation, a stopped command."""

import os
import re
from collections.abc import Iterator

from ...disks import devices, fstab
from ...errors import UnlockError
from ...host import config
from ...host.state import State
from ...paths import Paths
from .finding import UNPROVEN, UNSAFE, Finding


def check_configuration(paths: Paths) -> Iterator[Finding]:
    """Whether each group of unlock.toml can be mounted."""
    try:
        groups = config.load(paths.config).groups
    except (UnlockError, OSError) as error:
        yield Finding("unlock.toml", UNSAFE, f"no group that it names is mounted: {error}", f"edit {paths.config}")
        return
    taken = fstab.fstab_targets(paths.fstab)
    for group in groups.values():
        if group.mount in taken:
            why = f"group {group.name} is not mounted: /etc/fstab or another group has {group.mount}"
            yield Finding("unlock.toml", UNSAFE, why, f"edit {paths.config}")
        taken |= {group.mount} - {""}


def check_stopped_operation(state: State) -> Iterator[Finding]:
    """A command that was stopped, and that must be run again to its end."""
    if what := state.to_finish:
        yield Finding("operation", UNPROVEN, f"`{what}` was stopped before its end", what)


def check_kexec(paths: Paths) -> Iterator[Finding]:
    """Whether the next reboot is one by kexec, which leaves the TPM locked."""
    if _read_line(paths, "sys/kernel/kexec_loaded") == "1":
        why = "a kernel is loaded, and a reboot may start it without a reset of the TPM, which is locked until then"
        yield Finding("kexec", UNSAFE, why, "kexec --unload")
    if re.search("(?m)^LOAD_KEXEC=[\"']?true", _read_line(paths, "etc/default/kexec")):
        why = "kexec-tools loads a kernel at each reboot, which starts without a reset of the TPM"
        yield Finding("kexec", UNSAFE, why, "LOAD_KEXEC=false in /etc/default/kexec")


def check_hibernation(paths: Paths) -> Iterator[Finding]:
    """Whether hibernation writes keys to a disk that is not encrypted."""
    number = _read_line(paths, "sys/power/resume")
    if number not in ("", "0:0") and not devices.is_encrypted(number, paths.root):
        why = "the host hibernates to a disk that is not encrypted, with all keys in memory; unlock resumes from none"
        yield Finding("hibernation", UNSAFE, why, "take resume= away, or put the swap on an encrypted disk")


def _read_line(paths: Paths, name: str) -> str:
    """The content of a small file below the root directory; "" when it cannot be read."""
    try:
        with open(os.path.join(paths.root, name), encoding="ascii", errors="replace") as file:
            return file.read().strip()
    except OSError:
        return ""
