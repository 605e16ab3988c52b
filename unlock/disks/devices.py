# SPDX-License-Identifier: Apache-2.0
"""Block devices: which disks udev marked, what one is used for, and what a mounted file system stands on.

What udev knows comes through libudev by ctypes; this is the only file that knows of it. What only the kernel can
say truthfully (mounts, holders, what is below a mapping) comes from /proc and /sys below `root`, a prefix for
tests.
"""

import ctypes
import errno
import os
import stat

from ..errors import DiskFailed
from ..light import Any, Iterable, Mapping, NamedTuple
from .fstab import unescape
from .groups import SERIAL_MAX

TAG = "unlock"
"""What our udev rule puts on every LUKS2 disk."""
BUFFER = 16 << 20
"""Bytes for udev's events: some 10,000 of them while the agent is busy."""
_EFI_PARTITION = "c12a7328-f81f-11d2-ba4b-00a0c93ec93b"
"""UEFI Specification 2.10, table 5.8."""
_SERIALS = ("ID_SCSI_SERIAL", "ID_SERIAL_SHORT", "ID_SERIAL")
_BTRFS_IOC_FS_INFO = 0x8400941F
_DEEP = 32
"""More layers than any storage stack has."""


class Disk(NamedTuple):
    """A block device as udev knows it."""

    node: str
    """/dev/sda"""
    sysname: str
    number: str
    """MAJOR:MINOR"""
    serial: str
    """See `serial()`; '' for a device that has none (loop, dm)."""
    model: str
    size: int
    """Bytes; 0 if it is gone."""
    initialized: float
    """When udev had first dealt with it, in seconds of CLOCK_MONOTONIC; 0 if never."""


class Monitor:
    """Marked disks: those that are there, and events. It listens from its first use on: none falls between the two."""

    def __init__(self) -> None:
        self._monitor: Any = None

    def fileno(self) -> int:
        """Readable when `read` has something to give."""
        udev = _udev()
        if not self._monitor:
            self._monitor = udev.udev_monitor_new_from_netlink(udev.context, b"udev")
            udev.udev_monitor_filter_add_match_subsystem_devtype(self._monitor, b"block", None)
            udev.udev_monitor_filter_add_match_tag(self._monitor, TAG.encode())
            # without CAP_NET_ADMIN the kernel's default has to do
            udev.udev_monitor_set_receive_buffer_size(self._monitor, BUFFER)
            if udev.udev_monitor_enable_receiving(self._monitor) < 0:
                raise DiskFailed("udev's events cannot be received")
        return int(udev.udev_monitor_get_fd(self._monitor))

    def marked(self) -> list[Disk]:
        """The disks that carry our mark now; what changes from now on, `read` tells."""
        self.fileno()
        return marked()

    def read(self) -> list[tuple[str, Disk]]:
        """(action, disk) of the events that are there; never waits. Actions are udev's: add, change, remove.

        A disk that has lost its mark comes once more, as `change`. When the kernel dropped events because the
        buffer was full, all marked disks come as `change`; a `remove` may then be missed.
        """
        self.fileno()
        found = []
        while device := _udev().udev_monitor_receive_device(self._monitor):
            action = os.fsdecode(_udev().udev_device_get_action(device) or b"change")
            found.append((action, _disk(device)))
            _udev().udev_device_unref(device)
        if ctypes.get_errno() == errno.ENOBUFS:
            found += [("change", disk) for disk in marked()]
        return found


def marked() -> list[Disk]:
    """The disks that carry our mark now, in order of their sysfs paths."""
    # TAGS is for life, CURRENT_TAGS (since udev 247) of the last event: a disk that was reformatted lost it
    found = _found("udev_enumerate_add_match_tag", TAG)
    return [_disk(each) for each in found if f":{TAG}:" in _property(each, "CURRENT_TAGS")]


def disk(node: str) -> Disk:
    """What udev knows of one device, marked or not. Raises DiskFailed."""
    udev, number = _udev(), _rdev(node, "/")
    device = udev.udev_device_new_from_devnum(udev.context, b"b", number)
    if not device:
        raise DiskFailed(f"{node} is not known to udev")
    try:
        return _disk(device)
    finally:
        udev.udev_device_unref(device)


class FileSystem(NamedTuple):
    """What udev found on a device."""

    kind: str
    """ID_FS_TYPE: btrfs, ext4, LVM2_member; '' for nothing that it knows."""
    uuid: str
    """ID_FS_UUID: members of one btrfs or md have the same."""


def file_system(node: str) -> FileSystem:
    """What is on a device, as udev knows it. Raises DiskFailed."""
    udev = _udev()
    device = udev.udev_device_new_from_devnum(udev.context, b"b", _rdev(node, "/"))
    if not device:
        raise DiskFailed(f"{node} is not known to udev")
    try:
        return FileSystem(_property(device, "ID_FS_TYPE"), _property(device, "ID_FS_UUID"))
    finally:
        udev.udev_device_unref(device)


def carriers(uuid: str) -> list[Disk]:
    """All devices on which udev found a file system, or a part of one, with this UUID."""
    return [_disk(each) for each in _found("udev_enumerate_add_match_property", "ID_FS_UUID", uuid)]


def settled(root: str = "/") -> bool:
    """Whether udev has dealt with every device that the kernel has shown."""
    return not os.path.exists(_at(root, "run/udev/queue"))


def serial(properties: Mapping[str, str]) -> str:
    """The serial number of the disk itself, which moves with it to another port or host.

    ID_SCSI_SERIAL is the unit serial number (VPD page 0x80; virtio-scsi's `serial=`). ID_SERIAL_SHORT is the
    same for ATA, NVMe and USB; for SCSI it is a WWN, or what the host adapter made up. virtio-blk has only
    ID_SERIAL.
    """
    for name in _SERIALS:
        found = properties.get(name, "").strip()
        if found and found.isascii() and found.isprintable():
            return found[:SERIAL_MAX]
    return ""


# What a device is used for: asked before it is formatted


def in_use(node: str, root: str = "/") -> str:
    """What uses a device or one of its partitions, in words for a refusal; '' if nothing does.

    Raises DiskFailed if it is not a block device.
    """
    number = _rdev(node, root)
    folder = _folder(f"{os.major(number)}:{os.minor(number)}", root)
    if not folder:
        raise DiskFailed(f"{node} is not there")
    for part in [folder, *_partitions(folder)]:
        if found := _used_by(part, root):
            return f"{os.path.basename(part)} {found}"
    if _line(folder, "ro") == "1":
        return "it is read-only"
    if _line(folder, "size") == "0":
        return "it has no medium"
    try:
        os.close(os.open(_at(root, node), os.O_RDONLY | os.O_EXCL | os.O_CLOEXEC))
    except OSError as error:
        if error.errno == errno.EBUSY:
            return "the kernel or another program holds it"
    return ""


def contents(node: str) -> str:
    """What signatures are on a device or file (`ext4, label data`; `gpt`), '' if none is known.

    From wipefs, which knows partition tables, file systems, RAID and LVM members, and unlike blkid fails when
    it cannot read. Raises CommandFailed.
    """
    from ..run import run

    said = run(["wipefs", "--no-act", "--noheadings", "--output", "TYPE,LABEL", node], timeout=60)
    found = [line.split(maxsplit=1) for line in said.splitlines() if line.strip()]
    return ", ".join(dict.fromkeys(", label ".join(words) for words in found))


def _used_by(folder: str, root: str) -> str:
    number, name = _line(folder, "dev"), os.path.basename(folder)
    for holder in _entries(folder, "holders"):
        mapping = _line(folder, "holders", holder, "dm", "name")
        return f"is part of /dev/{f'mapper/{mapping}' if mapping else holder}"
    for device, mountpoint, _, _ in _mounts(root):
        if device == number:
            return f"is mounted on {mountpoint}"
    btrfs = _at(root, "sys/fs/btrfs")
    for uuid in _entries(btrfs):
        if name in _entries(btrfs, uuid, "devices"):
            return f"is part of the mounted btrfs {uuid}"
    with open(_at(root, "proc/swaps"), encoding="utf-8") as swaps:
        for line in swaps.readlines()[1:]:
            if _number(unescape(line.split()[0]), root) == number:
                return "is swap"
    return ""


def _partitions(folder: str) -> list[str]:
    return [f"{folder}/{each}" for each in _entries(folder) if os.path.exists(f"{folder}/{each}/partition")]


# What a mounted file system stands on


def root_chain(mountpoint: str, root: str = "/") -> list[str]:
    """MAJOR:MINOR of the devices that a mounted file system lies on: one, or all of a btrfs.

    Empty if nothing is mounted there, or nothing on a block device (overlay, nfs, zfs).
    """
    found: list[str] = []
    for device, where, source, kind in _mounts(root):  # the last mount on a mountpoint is what one sees
        if where == mountpoint:
            found = _btrfs_devices(where, source, root) if kind == "btrfs" else [device]
    return [each for each in found if _folder(each, root)]


def opened_by(mountpoint: str, names: set[str], root: str = "/") -> bool:
    """Whether all that a mounted file system stands on is authenticated.

    Each way down to a disk must pass a LUKS mapping of one of these names, or dm-verity. False if nothing is
    mounted there, or when in doubt.
    """
    devices = root_chain(mountpoint, root)
    return bool(devices) and all(_passes(_folder(each, root), names, _DEEP) for each in devices)


def not_on(mountpoint: str, names: set[str], root: str = "/") -> list[str]:
    """The block devices below a mounted file system that are no LUKS2 mapping of one of these names, and do not lie on
    such mappings alone: by sysfs name; `nothing` where no block device is below it."""
    below = root_chain(mountpoint, root)
    foreign = [each for each in below if not _passes(_folder(each, root), names, _DEEP, verity=False)]
    return [os.path.basename(_folder(each, root)) for each in foreign] if below else ["nothing"]


def is_encrypted(number: str, root: str = "/") -> bool:
    """Whether each way down from MAJOR:MINOR to a disk passes a dm-crypt mapping, whoever opened it."""
    return _crypted(_folder(number, root), _DEEP)


def type_of_mount(mountpoint: str, root: str = "/") -> str:
    """Type of the file system that is mounted there, '' if none is."""
    return next((kind for _, where, _, kind in reversed(list(_mounts(root))) if where == mountpoint), "")


def mount_points(root: str = "/") -> list[str]:
    """Where something is mounted, sorted."""
    return sorted({where for _, where, _, _ in _mounts(root)})


def efi_partitions() -> list[str]:
    """Nodes of the EFI system partitions, on disks with a GPT."""
    found = _found("udev_enumerate_add_match_property", "ID_PART_ENTRY_TYPE", _EFI_PARTITION)
    return [disk.node for disk in map(_disk, found)]


def names_below(mountpoint: str, root: str = "/") -> set[str]:
    """Names of the mappings that a mounted file system stands on."""
    return set().union(*(_names(_folder(each, root), _DEEP) for each in root_chain(mountpoint, root)))


def mappings(root: str = "/") -> dict[str, str]:
    """Name -> LUKS UUID of every active mapping; '' for one that is not LUKS2."""
    found = {}
    for name in _entries(_at(root, "sys/block")):
        if name.startswith("dm-"):
            kind = _line(_at(root, f"sys/block/{name}/dm/uuid"))
            digits = kind.removeprefix("CRYPT-LUKS2-")[:32] if kind.startswith("CRYPT-LUKS2-") else ""
            uuid = "-".join((digits[:8], digits[8:12], digits[12:16], digits[16:20], digits[20:])) if digits else ""
            found[_line(_at(root, f"sys/block/{name}/dm/name"))] = uuid
    return found


def mapping_of(luks_uuid: str, root: str = "/") -> str:
    """The name under which a LUKS2 disk is open, or ''."""
    return next((name for name, uuid in mappings(root).items() if uuid == luks_uuid), "")


def _passes(folder: str, names: set[str], deep: int, verity: bool = True) -> bool:
    kind = _line(folder, "dm", "uuid")
    if verity and kind.startswith("CRYPT-VERITY-"):
        return True
    if kind.startswith("CRYPT-LUKS") and _line(folder, "dm", "name") in names:
        return True
    below = _below(folder)
    return deep > 0 and bool(below) and all(_passes(each, names, deep - 1, verity) for each in below)


def _crypted(folder: str, deep: int) -> bool:
    if _line(folder, "dm", "uuid").startswith("CRYPT-"):
        return True
    below = _below(folder)
    return deep > 0 and bool(below) and all(_crypted(each, deep - 1) for each in below)


def _names(folder: str, deep: int) -> set[str]:
    found = {name} if (name := _line(folder, "dm", "name")) else set()
    if deep:
        found = found.union(*(_names(each, deep - 1) for each in _below(folder)))
    return found


def _below(folder: str) -> list[str]:
    """The folders of what a device is made of. A loop device's file is not looked at: it counts as a disk."""
    if not folder:
        return []
    if slaves := _entries(folder, "slaves"):
        return [os.path.realpath(f"{folder}/slaves/{each}") for each in slaves]
    if os.path.exists(f"{folder}/partition"):
        return [os.path.dirname(folder)]
    return []


def _btrfs_devices(mountpoint: str, source: str, root: str) -> list[str]:
    """All devices of a mounted btrfs, as the kernel says; where there is no kernel to ask (`root`), by its source."""
    btrfs = _at(root, "sys/fs/btrfs")
    devices = {
        uuid: [_line(btrfs, uuid, "devices", each, "dev") for each in _entries(btrfs, uuid, "devices")]
        for uuid in _entries(btrfs)
    }
    if root == "/":
        return devices.get(_btrfs_id(mountpoint), [])
    return next((each for each in devices.values() if _number(source, root) in each), [])


def _btrfs_id(mountpoint: str) -> str:
    """The name in /sys/fs/btrfs of the btrfs that is mounted there; '' if none is. BTRFS_IOC_FS_INFO, linux/btrfs.h:
    the id by which the kernel knows it, not always that of the superblock (temp_fsid, Linux 6.7)."""
    import fcntl

    answer = bytearray(1024)
    try:
        fd = os.open(mountpoint, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    except OSError:
        return ""
    try:
        fcntl.ioctl(fd, _BTRFS_IOC_FS_INFO, answer)
    except OSError:
        return ""
    finally:
        os.close(fd)
    digits = answer[16:32].hex()
    return "-".join((digits[:8], digits[8:12], digits[12:16], digits[16:20], digits[20:]))


# /proc and /sys


def _mounts(root: str) -> list[tuple[str, str, str, str]]:
    """(MAJOR:MINOR, mountpoint, source, file system) of each mount, oldest first: proc_pid_mountinfo(5)."""
    found = []
    with open(_at(root, "proc/self/mountinfo"), encoding="utf-8", errors="surrogateescape") as file:
        for line in file:
            fields = line.split()
            rest = fields[fields.index("-", 6) + 1 :]
            found.append((fields[2], unescape(fields[4]), unescape(rest[1]), rest[0]))
    return found


def _folder(number: str, root: str) -> str:
    """The sysfs folder of a block device; '' if there is none."""
    path = _at(root, f"sys/dev/block/{number}")
    return os.path.realpath(path) if number and os.path.exists(path) else ""


def _number(node: str, root: str) -> str:
    """MAJOR:MINOR of a node, '' if it is not one."""
    try:
        number = _rdev(node, root)
    except DiskFailed:
        return ""
    return f"{os.major(number)}:{os.minor(number)}"


def _rdev(node: str, root: str) -> int:
    try:
        found = os.stat(_at(root, node))
    except OSError as error:
        raise DiskFailed(f"{node}: {error.strerror}") from error
    if not stat.S_ISBLK(found.st_mode):
        raise DiskFailed(f"{node} is not a block device")
    return found.st_rdev


def _at(root: str, path: str) -> str:
    return os.path.join(root, path.lstrip("/"))


def _entries(*path: str) -> list[str]:
    try:
        return sorted(os.listdir(os.path.join(*path)))
    except OSError:
        return []


def _line(*path: str) -> str:
    try:
        with open(os.path.join(*path), encoding="utf-8", errors="replace") as file:
            return file.read().strip()
    except OSError:
        return ""


# libudev: libudev.h of systemd. Contexts, devices and searches are opaque pointers.

_POINTER, _TEXT, _INT = ctypes.c_void_p, ctypes.c_char_p, ctypes.c_int
_SIGNATURES: dict[str, tuple[Any, ...]] = {
    "udev_new": (_POINTER,),
    "udev_enumerate_new": (_POINTER, _POINTER),
    "udev_enumerate_add_match_subsystem": (_INT, _POINTER, _TEXT),
    "udev_enumerate_add_match_tag": (_INT, _POINTER, _TEXT),
    "udev_enumerate_add_match_property": (_INT, _POINTER, _TEXT, _TEXT),
    "udev_enumerate_scan_devices": (_INT, _POINTER),
    "udev_enumerate_get_list_entry": (_POINTER, _POINTER),
    "udev_enumerate_unref": (_POINTER, _POINTER),
    "udev_list_entry_get_next": (_POINTER, _POINTER),
    "udev_list_entry_get_name": (_TEXT, _POINTER),
    "udev_device_new_from_syspath": (_POINTER, _POINTER, _TEXT),
    "udev_device_new_from_devnum": (_POINTER, _POINTER, ctypes.c_char, ctypes.c_ulonglong),
    "udev_device_get_devnode": (_TEXT, _POINTER),
    "udev_device_get_sysname": (_TEXT, _POINTER),
    "udev_device_get_syspath": (_TEXT, _POINTER),
    "udev_device_get_devnum": (ctypes.c_ulonglong, _POINTER),
    "udev_device_get_action": (_TEXT, _POINTER),
    "udev_device_get_property_value": (_TEXT, _POINTER, _TEXT),
    "udev_device_unref": (_POINTER, _POINTER),
    "udev_monitor_new_from_netlink": (_POINTER, _POINTER, _TEXT),
    "udev_monitor_filter_add_match_subsystem_devtype": (_INT, _POINTER, _TEXT, _TEXT),
    "udev_monitor_filter_add_match_tag": (_INT, _POINTER, _TEXT),
    "udev_monitor_set_receive_buffer_size": (_INT, _POINTER, _INT),
    "udev_monitor_enable_receiving": (_INT, _POINTER),
    "udev_monitor_get_fd": (_INT, _POINTER),
    "udev_monitor_receive_device": (_POINTER, _POINTER),
}
"""Result and arguments."""
_library: Any = None


def _udev() -> Any:
    """libudev, loaded once, with a `context`. Raises DiskFailed."""
    global _library
    if not _library:
        try:
            library: Any = ctypes.CDLL("libudev.so.1", use_errno=True)
        except OSError as error:
            raise DiskFailed("libudev is not installed", hint="apt install libudev1") from error
        for name, (result, *arguments) in _SIGNATURES.items():
            function = getattr(library, name)
            function.restype, function.argtypes = result, arguments
        library.context = library.udev_new()
        _library = library
    return _library


def _found(match: str, *what: str) -> Iterable[int]:
    """Block devices, in order of their sysfs paths."""
    udev = _udev()
    search = udev.udev_enumerate_new(udev.context)
    try:
        udev.udev_enumerate_add_match_subsystem(search, b"block")
        getattr(udev, match)(search, *(each.encode() for each in what))
        udev.udev_enumerate_scan_devices(search)
        entry = udev.udev_enumerate_get_list_entry(search)
        while entry:
            if device := udev.udev_device_new_from_syspath(udev.context, udev.udev_list_entry_get_name(entry)):
                yield device
                udev.udev_device_unref(device)
            entry = udev.udev_list_entry_get_next(entry)
    finally:
        udev.udev_enumerate_unref(search)


def _property(device: int, name: str) -> str:
    return os.fsdecode(_udev().udev_device_get_property_value(device, name.encode()) or b"")


def _disk(device: int) -> Disk:
    udev = _udev()
    sysname = os.fsdecode(udev.udev_device_get_sysname(device))
    number = udev.udev_device_get_devnum(device)
    names = (*_SERIALS, "ID_MODEL", "USEC_INITIALIZED")
    properties = {name: _property(device, name) for name in names}
    return Disk(
        node=os.fsdecode(udev.udev_device_get_devnode(device) or f"/dev/{sysname}".encode()),
        sysname=sysname,
        number=f"{os.major(number)}:{os.minor(number)}",
        serial=serial(properties),
        model=properties["ID_MODEL"],
        size=int(_line(os.fsdecode(udev.udev_device_get_syspath(device)), "size") or 0) * 512,
        initialized=int(properties["USEC_INITIALIZED"] or 0) / 1e6,
    )
