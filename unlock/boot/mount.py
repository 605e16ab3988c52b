# SPDX-License-Identifier: Apache-2.0
"""`mount.unlock`, which mount(8) runs for the mount unit of a group: the file system of that group, or none.

    a mount namespace of its own: mount ──> every device below is a mapping of the group ──> attach it in its place

A disk can claim to be part of any btrfs or volume group: the kernel then mounts it in place of the group's own, and
what is written goes there in clear. So nobody sees the file system before each device below it has been looked at.
Copies of the group's btrfs are made unknown to the kernel first; what counts is the look afterwards.
"""

import ctypes
import os

from ..disks import btrfs, devices
from ..errors import CommandFailed, Tampered, Usage
from ..host import this_boot
from ..light import NamedTuple, Sequence
from ..paths import Paths
from ..run import run

TYPE = "unlock"
"""The type in a mount unit: mount(8) then runs mount.unlock. `unlock.btrfs` names the file system."""
_CLONE_NEWNS = 0x20000
_SYS_OPEN_TREE, _SYS_MOVE_MOUNT = 428, 429
"""The same on all architectures, since Linux 5.2: open_tree(2), move_mount(2)."""
_AT_FDCWD = -100
_OPEN_TREE_CLONE, _OPEN_TREE_CLOEXEC, _MOVE_MOUNT_F_EMPTY_PATH = 1, os.O_CLOEXEC, 4


class Request(NamedTuple):
    """What mount(8) asks for."""

    source: str
    where: str
    kind: str
    """Of the file system; '' lets mount(8) find out."""
    options: str


def mount(paths: Paths, argv: Sequence[str]) -> int:
    """Mounts a group's file system. Raises Tampered (`spoofed`), CommandFailed, Usage."""
    request = parse(argv)
    group, names = group_of(paths, request.source)
    try:
        btrfs.forget_copies([f"/dev/mapper/{name}" for name in names])
        _mount_proven(request, group, names)
    except Tampered as error:
        this_boot.mark_spoofed(paths, group, str(error))
        raise
    this_boot.unmark(paths, "spoofed", group)
    return 0


def parse(argv: Sequence[str]) -> Request:
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


def group_of(paths: Paths, source: str) -> tuple[str, set[str]]:
    """The group that `source` is a mapping of, and the names of all its mappings. Raises Usage."""
    node = os.path.realpath(source)
    for group, names in this_boot.open_groups(paths).items():
        if node in (os.path.realpath(f"/dev/mapper/{name}") for name in names):
            return group, names
    raise Usage(f"{source} is no disk of a group that is open", "unlock status")


def _mount_proven(request: Request, group: str, names: set[str]) -> None:
    home = os.open("/proc/self/ns/mnt", os.O_RDONLY | os.O_CLOEXEC)
    _system("unshare", _CLONE_NEWNS)
    run(["mount", "--make-rprivate", "/"])
    kind = ["-t", request.kind] if request.kind else []
    options = ["-o", request.options] if request.options else []
    run(["mount", "--no-mtab", *kind, *options, request.source, request.where])
    if foreign := devices.foreign_devices(request.where, names):
        raise Tampered(
            f"group {group}: what was mounted on {request.where} lies on {', '.join(foreign)}, no disk of the group",
            f"take it out, or wipe it: it is a copy, or passes for one; then: systemctl start {group}",
            "spoofed",
        )
    tree = _system("syscall", _SYS_OPEN_TREE, _AT_FDCWD, request.where.encode(), _OPEN_TREE_CLONE | _OPEN_TREE_CLOEXEC)
    _system("setns", home, _CLONE_NEWNS)
    _system("syscall", _SYS_MOVE_MOUNT, tree, b"", _AT_FDCWD, request.where.encode(), _MOVE_MOUNT_F_EMPTY_PATH)


def _system(name: str, *arguments: int | bytes) -> int:
    """A function of the C library. Raises CommandFailed."""
    libc = ctypes.CDLL(None, use_errno=True)
    result = int(getattr(libc, name)(*arguments))
    if result < 0:
        raise CommandFailed(f"{name}: {os.strerror(ctypes.get_errno())}")
    return result
