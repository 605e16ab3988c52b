# SPDX-License-Identifier: Apache-2.0
"""The systemd units of a group: their names, and starting them. For the gates and for the commands that open groups."""

import os

from ..run import run

_PLAIN = frozenset("ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789:_.")


def escape_path(path: str) -> str:
    """A normalised absolute path escaped as a unit name, as `systemd-escape --path` (systemd.unit(5))."""
    text = path.strip("/")
    return (
        "".join(
            "-" if c == "/" else c if c in _PLAIN and (i or c != ".") else "".join(f"\\x{b:02x}" for b in c.encode())
            for i, c in enumerate(text)
        )
        or "-"
    )


def gate_unit(group: str) -> str:
    """The service of the group's gate, which ends when the group is open. A group's name needs no escaping."""
    return f"unlock-group@{group}.service"


def is_systemd_running() -> bool:
    """Whether systemd is the init of this system."""
    return os.path.exists("/run/systemd/system")


def start_group(group: str, mount_point: str) -> None:
    """Starts the gate and the mount of a group that is open. Raises CommandFailed."""
    run(["systemctl", "start", gate_unit(group)])
    if mount_point:
        run(["systemctl", "start", mount_unit(mount_point)])


def mount_unit(path: str) -> str:
    """The mount unit of a mount point."""
    return f"{escape_path(path)}.mount"
