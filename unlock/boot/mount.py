# SPDX-License-Identifier: Apache-2.0
"""`mount.unlock`, which mount(8) runs for the mount unit of a group: mounts the group's file system, and no other.

    in a mount namespace of its own: mount ──> check that every device below is a mapping of the group ──> attach

A disk can claim to be part of any btrfs or volume group. The kernel would mount it instead of the group's own, and data
would be written there in clear. So the file system becomes visible only after each device below it has been checked.
Before that the kernel is made to forget copies of the group's btrfs; only the check afterwards is relied on.
"""

import ctypes
import os

from ..disks import btrfs, devices, udev
from ..errors import CommandFailed, Refused, Tampered, UnlockError, Usage
from ..host import this_boot
from ..light import NamedTuple, Sequence
from ..paths import Paths
from ..run import run
from . import degraded

TYPE = "unlock"
"""The type in a mount unit: mount(8) then runs mount.unlock. `unlock.btrfs` names the file system."""
_CLONE_NEWNS = 0x20000
_SYS_OPEN_TREE, _SYS_MOVE_MOUNT = 428, 429
"""The same on all architectures, since Linux 5.2: open_tree(2), move_mount(2)."""
_AT_FDCWD = -100
_OPEN_TREE_CLONE, _OPEN_TREE_CLOEXEC, _MOVE_MOUNT_F_EMPTY_PATH = 1, os.O_CLOEXEC, 4


class Request(NamedTuple):
    """The arguments of mount(8)."""

    source: str
    where: str
    kind: str
    """The type of the file system; '' lets mount(8) detect it."""
    options: str


def mount(paths: Paths, argv: Sequence[str]) -> int:
    """Mounts a group's file system. Raises Tampered (`spoofed`), CommandFailed, Usage."""
    request = parse_arguments(argv)
    group, names = find_group(paths, request.source)
    try:
        btrfs.forget_copies([f"/dev/mapper/{name}" for name in names])
        _refuse_former_members(paths, group, names)
        _refuse_written_apart(group, names)
        if group in this_boot.degraded_groups(paths) and _is_btrfs(request):
            request = request._replace(options=",".join(filter(None, (request.options, "degraded"))))
        _mount_checked(request, group, names)
    except Tampered as error:
        this_boot.mark_spoofed(paths, group, str(error))
        raise
    this_boot.unmark(paths, "spoofed", group)
    return 0


def parse_arguments(argv: Sequence[str]) -> Request:
    """SOURCE DIRECTORY [-sfnv] [-N NAMESPACE] [-o OPTIONS] [-t TYPE[.SUBTYPE]], as in mount(8), EXTERNAL HELPERS."""
    words, source, options, kind = list(argv), [], "", ""
    while words:
        word = words.pop(0)
        if word in ("-o", "-t", "-N") and words:
            value = words.pop(0)
            options = value if word == "-o" else options
            kind = value.partition(".")[2] if word == "-t" else kind
        elif not word.startswith("-"):
            source.append(word)
    if len(source) != 2:
        raise Usage("usage: mount.unlock SOURCE DIRECTORY [-o OPTIONS] [-t unlock.TYPE]")
    return Request(source[0], source[1], kind, options)


def find_group(paths: Paths, source: str) -> tuple[str, set[str]]:
    """The open group that `source` is a mapping of, and the names of all its mappings. Raises Usage."""
    if source == paths.config:  # by the generator's mount unit for a group that is wrong there
        raise Usage(f"nothing is mounted here: {source} is wrong", "unlock check")
    node = os.path.realpath(source)
    for group, names in this_boot.open_groups(paths).items():
        if node in (os.path.realpath(f"/dev/mapper/{name}") for name in names):
            return group, names
    raise Usage(f"{source} is no disk of a group that is open", "unlock status")


def _refuse_former_members(paths: Paths, group: str, names: set[str]) -> None:
    """Raises Refused for a mapping of a disk that has left the group: early boot, which has no state, opens what is
    complete by an older member list. A host that has lost its state still mounts."""
    from ..host.state import State  # 60 ms, and no other part of the mount needs it

    try:
        members = State.load(paths).groups[group].members
    except (UnlockError, OSError, KeyError):
        return
    uuids = devices.active_mappings()
    former = sorted(name for name in names if uuids.get(name) not in {each.uuid for each in members})
    if former:
        words = f"group {group}: {', '.join(former)} is open, and is no member of it any more"
        raise Refused(words, f"cryptsetup close {former[0]}; unlock open {group}", "stale")


def _refuse_written_apart(group: str, names: set[str]) -> None:
    """Raises Refused for a btrfs whose disks were written without each other: the kernel would mix them."""
    if len(names) > 1 and not _is_mounted(names) and (words := degraded.find_written_apart(names)):
        raise Refused(
            f"group {group}: {words}",
            f"choose whose is to stay, take the others out, reboot; then: unlock open {group} --degraded",
            "written-apart",
        )


def _is_mounted(names: set[str]) -> bool:
    """Whether a file system on these mappings is in use: its superblocks are being written then."""
    return bool(devices.mount_points_on(names))


def _is_btrfs(request: Request) -> bool:
    """Whether it is a btrfs, which mounts without all of its devices by an option alone. Raises DiskFailed."""
    return (request.kind or udev.file_system(os.path.realpath(request.source)).kind) == "btrfs"


def _mount_checked(request: Request, group: str, names: set[str]) -> None:
    """Mounts in a new mount namespace, checks the devices below, then attaches the mount. Raises Tampered."""
    home = os.open("/proc/self/ns/mnt", os.O_RDONLY | os.O_CLOEXEC)
    _call_libc("unshare", _CLONE_NEWNS)
    run(["mount", "--make-rprivate", "/"])
    kind = ["-t", request.kind] if request.kind else []
    options = ["-o", request.options] if request.options else []
    run(["mount", "--no-mtab", *kind, *options, request.source, request.where])
    if foreign := devices.foreign_devices(request.where, names):
        raise Tampered(
            f"group {group}: what was mounted on {request.where} lies on {', '.join(foreign)}, no disk of the group",
            f"take it out, or wipe it: it is a copy, or passes for one; then: unlock open {group}",
            "spoofed",
        )
    tree = _call_libc(
        "syscall", _SYS_OPEN_TREE, _AT_FDCWD, request.where.encode(), _OPEN_TREE_CLONE | _OPEN_TREE_CLOEXEC
    )
    _call_libc("setns", home, _CLONE_NEWNS)
    _call_libc("syscall", _SYS_MOVE_MOUNT, tree, b"", _AT_FDCWD, request.where.encode(), _MOVE_MOUNT_F_EMPTY_PATH)


def _call_libc(name: str, *arguments: int | bytes) -> int:
    """Calls a function of the C library. Raises CommandFailed if it returns a negative number."""
    libc = ctypes.CDLL(None, use_errno=True)
    result = int(getattr(libc, name)(*arguments))
    if result < 0:
        raise CommandFailed(f"{name}: {os.strerror(ctypes.get_errno())}")
    return result
