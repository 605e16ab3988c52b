# SPDX-License-Identifier: Apache-2.0
"""Reads the event logs of the running system: the firmware's, from securityfs, and systemd's, from /run.

    read_systemd_log(paths), PCRs of the TPM ──> read_event_log(): the firmware's log, its known flaws repaired

`unlock explain` in the initramfs reads them too, so a log that is missing is no error here but a reason in words.
"""

import os
from collections.abc import Mapping, Sequence
from types import MappingProxyType

from ..errors import CommandFailed, Malformed
from ..paths import Paths
from ..run import run
from . import eventlog, verify
from .eventlog import Event, Log


def read_event_log(
    paths: Paths, later: Sequence[Event] = (), live: Mapping[int, bytes] = MappingProxyType({})
) -> tuple[Log | None, str]:
    """The firmware's log, or None and the reason why there is none. In an initramfs it mounts securityfs.

    `later` (systemd's log) and `live` (the PCRs now) prove repairs of the log: `verify.repair_log`.
    """
    _mount_securityfs(paths)
    data = read_up_to(paths.event_log, eventlog.MAX_LOG + 1)
    if not data:
        return None, (
            "the boot loader or the firmware passed no event log (GRUB before 2.12 does not): "
            "which event changed cannot be told"
        )
    try:
        return verify.repair_log(eventlog.parse_event_log(data), later, live), ""
    except Malformed as error:
        hint = f"; {error.hint}" if error.hint else ""
        return None, f"{error}: which event changed cannot be told{hint}"


def read_systemd_log(paths: Paths) -> tuple[Event, ...]:
    """What systemd measured in this boot; empty before systemd 255, which keeps no log."""
    return eventlog.parse_systemd_log(read_up_to(paths.systemd_log, eventlog.MAX_SYSTEMD_LOG))


def _mount_securityfs(paths: Paths) -> None:
    """An initramfs leaves it unmounted."""
    if paths.root == "/" and not os.path.exists(paths.event_log) and not os.path.ismount("/sys/kernel/security"):
        try:
            run(["mount", "-t", "securityfs", "securityfs", "/sys/kernel/security"], timeout=10)
        except CommandFailed:
            pass


def read_up_to(path: str, limit: int) -> bytes:
    """At most `limit` bytes; b"" when the file cannot be read."""
    try:
        with open(path, "rb") as file:
            return file.read(limit)
    except OSError:
        return b""
