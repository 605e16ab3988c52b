# SPDX-License-Identifier: Apache-2.0
"""btrfs across disks: which devices the kernel knows, what lies on them, and their moves. No other file speaks of it.

What the kernel knows is asked by the ioctls of linux/btrfs.h; btrfs(8) changes it. A move runs in the kernel, for hours
perhaps: it is begun in a child, and polled.
"""

import errno
import fcntl
import os
import struct

from ..errors import CommandFailed
from ..light import TYPE_CHECKING, Callable, NamedTuple
from ..run import run
from . import udev
from .devices import read_line

if TYPE_CHECKING:
    import subprocess

    from .reencrypt import Tell

_SCAN, _FORGET = 0x50009404, 0x50009405
"""BTRFS_IOC_SCAN_DEV, BTRFS_IOC_FORGET_DEV. Their argument is a signed 64-bit fd and a name of 4088 bytes."""
_FS_INFO, _DEV_INFO = 0x8400941F, 0xD000941E
"""BTRFS_IOC_FS_INFO: 1024 bytes; BTRFS_IOC_DEV_INFO: 4096."""
_SPACE_INFO, _DEV_REPLACE = 0xC0109414, 0xCA289435
"""BTRFS_IOC_SPACE_INFO: 16 bytes, and 24 for each slot; BTRFS_IOC_DEV_REPLACE: 2600 bytes."""
_REPLACE_STATUS = 1
_PATH = 3072
"""Offset of the path in struct btrfs_ioctl_dev_info_args."""
POLL = 1.0
"""Seconds between two looks at a move."""


class Device(NamedTuple):
    """One device of a mounted btrfs."""

    devid: int
    """0 for the target of a replace that is not finished."""
    size: int
    """Bytes that the file system uses of it."""
    used: int
    """Bytes of it that belong to a chunk."""
    node: str
    """'' when it is missing."""


class Space(NamedTuple):
    """The chunks of one type and profile."""

    kind: str
    """`data`, `system`, `metadata`, or two of them with a plus."""
    profile: str
    size: int
    """Bytes, each copy counted once."""
    used: int


class Profile(NamedTuple):
    """What a profile needs of its devices."""

    bit: int
    """BTRFS_BLOCK_GROUP_*"""
    least: int
    """The fewest devices that it works on."""
    spare: int
    """The devices of a chunk that can be lost."""
    copies: int


PROFILES = {
    "single": Profile(0, 1, 0, 1),
    "raid0": Profile(1 << 3, 1, 0, 1),
    "raid1": Profile(1 << 4, 2, 1, 2),
    "dup": Profile(1 << 5, 1, 0, 2),
    "raid10": Profile(1 << 6, 2, 1, 2),
    "raid5": Profile(1 << 7, 2, 1, 1),
    "raid6": Profile(1 << 8, 3, 2, 1),
    "raid1c3": Profile(1 << 9, 3, 2, 3),
    "raid1c4": Profile(1 << 10, 4, 3, 4),
}
"""Since Linux 5.15, as btrfs_raid_array in its fs/btrfs/volumes.c."""
_KINDS = {"data": 1 << 0, "system": 1 << 1, "metadata": 1 << 2}
_RESERVE = 1 << 49
"""Of BTRFS_IOC_SPACE_INFO: the global reserve, which is a part of the metadata."""


class Replace(NamedTuple):
    """The last replace of a file system."""

    state: str
    """`never`, `started`, `finished`, `canceled`, `suspended`."""
    permille: int


# Registration


def forget(node: str) -> None:
    """Makes the kernel forget that a device belongs to a btrfs. Does nothing if the file system is mounted."""
    try:
        _control(_FORGET, node)
    except OSError:
        pass


def forget_copies(members: list[str]) -> None:
    """Makes the kernel forget every device that has the UUID of a btrfs on these members and is none of them.

    Then it scans the members again, as the kernel may have registered a copy instead of one. Best effort.
    """
    ours = {os.path.realpath(each) for each in members}
    systems = [udev.file_system(each) for each in members]
    uuids = {each.uuid for each in systems if each.kind == "btrfs"}
    copies = {disk.node for uuid in uuids for disk in udev.disks_with_uuid(uuid)} - ours
    for node in copies:
        forget(node)
    for node in members if copies else ():
        try:
            _control(_SCAN, node)
        except OSError:
            pass


def _control(request: int, node: str) -> None:
    fd = os.open("/dev/btrfs-control", os.O_RDWR | os.O_CLOEXEC)
    try:
        fcntl.ioctl(fd, request, bytearray(struct.pack("<q4088s", 0, node.encode())))
    finally:
        os.close(fd)


# What a mounted btrfs says


def read_devices(mountpoint: str) -> list[Device]:
    """The devices of a mounted btrfs, those that are missing too. Raises CommandFailed."""
    info = _ask(mountpoint, _FS_INFO, bytearray(1024))
    (highest,) = struct.unpack_from("<Q", info)
    found = []
    for devid in range(highest + 1):
        asked = bytearray(4096)
        struct.pack_into("<Q", asked, 0, devid)
        try:
            answer = _ask(mountpoint, _DEV_INFO, asked)
        except _NoDevice:
            continue
        used, size = struct.unpack_from("<QQ", answer, 24)
        path = os.fsdecode(bytes(answer[_PATH:]).split(b"\0")[0])
        found.append(Device(devid, size, used, path if path.startswith("/") else ""))
    return found


def find_device(mountpoint: str, node: str) -> Device | None:
    """The device of a mounted btrfs that is this node. Raises CommandFailed."""
    real = os.path.realpath(node)
    return next((each for each in read_devices(mountpoint) if each.node and os.path.realpath(each.node) == real), None)


def read_space(mountpoint: str) -> list[Space]:
    """What the chunks of a mounted btrfs hold. Raises CommandFailed."""
    (count,) = struct.unpack_from("<8xQ", _ask(mountpoint, _SPACE_INFO, bytearray(16)))
    asked = bytearray(16 + 24 * count)
    struct.pack_into("<Q", asked, 0, count)
    answer = _ask(mountpoint, _SPACE_INFO, asked)
    (given,) = struct.unpack_from("<8xQ", answer)
    found = []
    for at in range(16, 16 + 24 * min(count, given), 24):
        flags, size, used = struct.unpack_from("<QQQ", answer, at)
        if not flags & _RESERVE:
            kind = "+".join(name for name, bit in _KINDS.items() if flags & bit)
            found.append(Space(kind, _profile(mountpoint, flags), size, used))
    return found


def _profile(mountpoint: str, flags: int) -> str:
    """Raises CommandFailed for one that a later kernel has."""
    bits = flags & ~sum(_KINDS.values())
    for name, profile in PROFILES.items():
        if profile.bit == bits:
            return name
    raise CommandFailed(f"{mountpoint} has a btrfs profile that is not known here: {bits:#x}")


def missing_devids(mountpoint: str, here: set[str]) -> list[int]:
    """The ids of devices of a mounted btrfs that are not among the nodes `here`. Raises CommandFailed."""
    devices = read_devices(mountpoint)
    return [each.devid for each in devices if each.devid and os.path.realpath(each.node or "/") not in here]


def mixed_profiles(mountpoint: str) -> dict[str, str]:
    """Of a mounted btrfs: `d` for data or `m` for metadata -> the profile that can lose most devices, where some chunks
    of that kind have another one. Raises CommandFailed."""
    profiles: dict[str, set[str]] = {}
    for space in read_space(mountpoint):
        if space.size:
            profiles.setdefault("d" if "data" in space.kind.split("+") else "m", set()).add(space.profile)
    return {kind: max(names, key=_spare) for kind, names in profiles.items() if len(names) > 1}


def _spare(profile: str) -> int:
    return PROFILES[profile].spare


def read_replace(mountpoint: str) -> Replace:
    """Raises CommandFailed."""
    asked = bytearray(2600)
    struct.pack_into("<Q", asked, 0, _REPLACE_STATUS)
    state, permille = struct.unpack_from("<16xQQ", _ask(mountpoint, _DEV_REPLACE, asked))
    names = ("never", "started", "finished", "canceled", "suspended")
    if state >= len(names):
        raise CommandFailed(f"{mountpoint}: btrfs gives {state} as the state of a replace")
    return Replace(names[state], permille)


def running_operation(mountpoint: str) -> str:
    """What the file system does that excludes a move: `balance`, `device remove` ...; '' for nothing. Raises
    CommandFailed."""
    folder = f"/sys/fs/btrfs/{_file_system_id(mountpoint)}"
    found = read_line(folder, "exclusive_operation")
    return "" if found == "none" else found


def _file_system_id(mountpoint: str) -> str:
    digits = _ask(mountpoint, _FS_INFO, bytearray(1024))[16:32].hex()
    return "-".join((digits[:8], digits[8:12], digits[12:16], digits[16:20], digits[20:]))


class _NoDevice(Exception):
    """No device has this devid."""


def _ask(mountpoint: str, request: int, argument: bytearray) -> bytearray:
    """Raises CommandFailed, _NoDevice."""
    try:
        fd = os.open(mountpoint, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        try:
            fcntl.ioctl(fd, request, argument)
        finally:
            os.close(fd)
    except OSError as error:
        if request == _DEV_INFO and error.errno == errno.ENODEV:
            raise _NoDevice from error
        words = f"{mountpoint}: btrfs does not answer: {error.strerror}"
        raise CommandFailed(words, f"findmnt {mountpoint}") from error
    return argument


# Moves


def add_device(mountpoint: str, node: str) -> None:
    """Durable when it returns. Raises CommandFailed."""
    run(["btrfs", "device", "add", "-f", node, mountpoint])


def remove_device(mountpoint: str, node: str, tell: "Tell") -> bool:
    """Moves what lies on a device to the others, and takes it out of the file system. A move that was cut off leaves
    the device where it is, with less on it; the next call goes on. False when `tell` has stopped it. Raises
    CommandFailed."""

    def used() -> int:
        device = find_device(mountpoint, node)
        return device.used if device else 0

    total = used()
    return _move(
        mountpoint,
        "device remove",
        begin=["btrfs", "device", "remove", node, mountpoint],
        cancel=["btrfs", "device", "remove", "cancel", mountpoint],
        is_done=lambda: not find_device(mountpoint, node),
        tell=lambda: tell(max(0, total - used()), total),
    )


def replace_device(mountpoint: str, devid: int, node: str, tell: "Tell") -> bool:
    """Copies a device, which may be missing, to a new one that takes its place. False when `tell` has stopped it: the
    kernel goes on nevertheless, after a reboot too, from the mount of the file system on. Raises CommandFailed."""
    total = next((each.used for each in read_devices(mountpoint) if each.devid == devid), 0)

    def has_taken_over() -> bool:
        device = find_device(mountpoint, node)
        return bool(device and device.devid == devid)

    return _move(
        mountpoint,
        "device replace",
        begin=["btrfs", "replace", "start", "-B", "-f", str(devid), node, mountpoint],
        cancel=None,
        is_done=has_taken_over,
        tell=lambda: tell(total * read_replace(mountpoint).permille // 1000, total),
    )


def _move(
    mountpoint: str,
    name: str,
    *,
    begin: list[str],
    cancel: list[str] | None,
    is_done: Callable[[], bool],
    tell: Callable[[], bool],
) -> bool:
    """Waits for the move that runs already: the mount of a file system goes on with a replace, and a replace goes on
    when its program was killed. Then begins it, unless that one has done it. Without `cancel`, the move outlives this
    process."""
    stopped = False
    while True:
        while running_operation(mountpoint) == name and _goes_on(None):
            stopped = _stop(stopped, tell, cancel)
            if stopped and not cancel:
                return False
        if stopped or is_done():
            return is_done()
        program = _start(begin, outlives=not cancel)
        while _goes_on(program):
            stopped = _stop(stopped, tell, cancel)
            if stopped and not cancel:
                return False
        if stopped or not program.returncode:
            return is_done()
        if running_operation(mountpoint) != name and not is_done():  # else another one was faster
            raise CommandFailed(f"{' '.join(begin[:3])}: {_last_words(program)}")


def _last_words(program: "subprocess.Popen[bytes]") -> str:
    """The error that a program has printed."""
    assert program.stderr
    words = program.stderr.read().decode("utf-8", "replace").strip().splitlines()
    said = next((line for line in words if "error" in line.lower()), words[-1] if words else "")
    return said[:300] or f"status {program.returncode}"


def _stop(stopped: bool, tell: Callable[[], bool], cancel: list[str] | None) -> bool:
    """Whether the move is to stop. It is cancelled at each look: before it has really begun that has no effect."""
    if not stopped and not tell():
        return False
    try:
        if cancel:
            run(cancel)
    except CommandFailed:
        pass
    return True


def _goes_on(program: "subprocess.Popen[bytes] | None") -> bool:
    """Whether the program still runs after POLL seconds; without one, only waits."""
    import subprocess
    import time

    if not program:
        time.sleep(POLL)
        return True
    try:
        program.wait(POLL)
    except subprocess.TimeoutExpired:
        return True
    return False


def _start(command: list[str], *, outlives: bool) -> "subprocess.Popen[bytes]":
    """In a session of its own: what a terminal interrupts is this process, which then stops the move in order."""
    import subprocess

    from ..protect import end_with_parent

    return subprocess.Popen(
        command,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        env={"PATH": "/usr/sbin:/usr/bin:/sbin:/bin", "LC_ALL": "C"},
        start_new_session=True,
        preexec_fn=None if outlives else end_with_parent,
    )


def resize(mountpoint: str, devid: int) -> None:
    """Lets the file system use all of a device. Raises CommandFailed."""
    run(["btrfs", "filesystem", "resize", f"{devid}:max", mountpoint])
