# SPDX-License-Identifier: Apache-2.0
"""Whether the members of a group that are here suffice for what lies on them. They are open, and nothing is mounted.

btrfs is judged by its own profiles and by the number of devices that are missing. md, LVM and ZFS know by themselves
which of their members they can do without, and start or refuse: they get what is here. What lies on one disk has no
other one to go on with.
"""

from .. import log
from ..disks import udev
from ..errors import CommandFailed, Malformed, UnlockError
from ..host import this_boot
from ..host.report import Report
from ..light import TYPE_CHECKING, Iterable, NamedTuple, Sequence
from ..paths import Paths
from ..run import run

if TYPE_CHECKING:
    from ..disks.btrfs_layout import Device

_DECIDE_THEMSELVES = ("LVM2_member", "linux_raid_member", "zfs_member")
"""By udev's names."""


class Judgement(NamedTuple):
    """What the open members of a group say."""

    kind: str
    """What lies on them, as udev calls it."""
    generation: int
    """How far their btrfs was written; 0 for anything else."""
    why_not: str
    """Why they do not suffice, in words; ''."""


def judge(mappings: Sequence[str]) -> Judgement:
    """Looks at the mappings of the members that are here."""
    from ..disks import btrfs_layout  # only where a member is missing

    file_systems: dict[bytes, list[Device]] = {}
    kind = ""
    for name in mappings:
        node = f"/dev/mapper/{name}"
        try:
            device = btrfs_layout.read_device(node)
            kind = "btrfs" if device else udev.file_system(node).kind
        except (OSError, UnlockError) as error:
            return Judgement("", 0, f"{name} cannot be read: {error}")
        if device:
            file_systems.setdefault(device.file_system, []).append(device)
        elif kind not in _DECIDE_THEMSELVES:
            return Judgement(kind, 0, f"{name} holds {kind or 'nothing known'}, which is not spread over several disks")
    for devices in file_systems.values():
        try:
            if why_not := btrfs_layout.why_not_enough(devices):
                return Judgement("btrfs", 0, why_not)
        except (OSError, Malformed):
            continue  # the kernel refuses to mount what lacks too much
    generations = [each.generation for devices in file_systems.values() for each in devices]
    return Judgement("btrfs" if generations else kind, max(generations, default=0), "")


def look_again(mappings: Sequence[str]) -> list[str]:
    """The command that has udev look at these mappings again: systemd waits for all devices of a btrfs else."""
    return ["udevadm", "trigger", "--settle", "--action=change", *(f"/dev/mapper/{name}" for name in mappings)]


def bring_up_early(paths: Paths, record: Report) -> None:
    """Marks each group that opened without all of its members, as soon as it did, and has udev look at its btrfs: an
    initramfs whose PID 1 is systemd does not mount a root before udev says that it is ready."""
    rows = [row for row in record.groups.values() if row.outcome == "degraded"]
    known = this_boot.degraded_groups(paths) if rows else {}
    for row in rows:
        if row.name not in known:
            this_boot.mark_open(paths, row.name, row.mappings, row)
            if row.kind == "btrfs":
                try:
                    run(look_again(row.mappings), timeout=20)
                except CommandFailed as error:
                    log.console(f"group {row.name}: {error}")


def find_lagging(mappings: Iterable[str]) -> list[str]:
    """Names of those of the mappings whose btrfs lacks what others of it have."""
    from ..disks import btrfs_layout

    found: list[str] = []
    for names in _read_file_systems(mappings):
        try:
            behind = btrfs_layout.lagging(list(names.values()))
        except (OSError, Malformed):
            continue
        found += [name for name, device in names.items() if device in behind]
    return found


def find_written_apart(mappings: Iterable[str]) -> str:
    """Which of the mappings were written while others were away, and those without them, in words; '' for none that
    shows it."""
    from ..disks import btrfs_layout

    for names in _read_file_systems(mappings):
        try:
            apart = btrfs_layout.written_apart(list(names.values()))
        except (OSError, Malformed):
            continue
        if apart:
            mine = ", ".join(name for name, device in names.items() if device in apart)
            others = ", ".join(name for name, device in names.items() if device not in apart)
            return f"{mine} was written without {others}, and {others} without {mine}"
    return ""


def _read_file_systems(mappings: Iterable[str]) -> "list[dict[str, Device]]":
    """Of each btrfs on more than one of the mappings: name of the mapping -> what its superblock says."""
    from ..disks import btrfs_layout

    found: dict[bytes, dict[str, Device]] = {}
    for name in sorted(mappings):
        try:
            device = btrfs_layout.read_device(f"/dev/mapper/{name}")
        except (OSError, Malformed):
            continue
        if device:
            found.setdefault(device.file_system, {})[name] = device
    return [names for names in found.values() if len(names) > 1]
