# SPDX-License-Identifier: Apache-2.0
"""Block devices as the kernel knows them: what uses one, what a mounted file system lies on, which mappings are active.

Commands ask it before they format a disk; early boot asks it whether the root file system is authenticated before keys
cross into it. Mounts, holders and what lies below a mapping are read from /proc and /sys below `root`, a prefix for
tests: udev's database is not asked, since only the kernel tells these reliably.
"""

import errno
import os
import stat

from ..errors import DiskFailed
from ..light import Iterable, NamedTuple, Sequence
from .fstab import read_table, split_fields, unescape

_BTRFS_IOC_FS_INFO = 0x8400941F
_SYSTEM = ("/bin", "/etc", "/lib", "/lib32", "/lib64", "/opt", "/root", "/sbin", "/usr", "/var")
_WITHOUT_CONTENT = frozenset(
    [
        "autofs",
        "binfmt_misc",
        "bpf",
        "cgroup2",
        "debugfs",
        "fusectl",
        "mqueue",
        "nsfs",
        "overlay",
        "proc",
        "ramfs",
        "rpc_pipefs",
        "securityfs",
        "squashfs",
        "sysfs",
        "tmpfs",
        "tracefs",
    ]
)
_LAYERS_MAX = 32
"""Layers of a storage stack that are followed; no real one has as many."""


# What uses a device


def describe_use(node: str, root: str = "/") -> str:
    """Says what uses a device or one of its partitions, for the refusal to format it; '' if nothing does.

    Raises DiskFailed if it is not a block device.
    """
    number = device_number(node, root)
    folder = _sysfs_folder(f"{os.major(number)}:{os.minor(number)}", root)
    if not folder:
        raise DiskFailed(f"{node} is not there")
    for part in [folder, *_partitions(folder)]:
        if found := _describe_user(part, root):
            return f"{os.path.basename(part)} {found}"
    if read_line(folder, "ro") == "1":
        return "it is read-only"
    if read_line(folder, "size") == "0":
        return "it has no medium"
    try:
        os.close(os.open(path_below(root, node), os.O_RDONLY | os.O_EXCL | os.O_CLOEXEC))
    except OSError as error:
        if error.errno == errno.EBUSY:
            return "the kernel or another program holds it"
    return ""


def list_signatures(node: str) -> str:
    """The signatures on a device or file (`ext4, label data`; `gpt`), '' if wipefs finds none.

    wipefs knows partition tables, file systems, RAID and LVM members, and unlike blkid fails when it cannot read.
    Raises CommandFailed.
    """
    from ..run import run

    listed = run(["wipefs", "--no-act", "--noheadings", "--output", "TYPE,LABEL", node], timeout=60)
    found = [line.split(maxsplit=1) for line in listed.splitlines() if line.strip()]
    return ", ".join(dict.fromkeys(", label ".join(words) for words in found))


def _describe_user(folder: str, root: str) -> str:
    number, name = read_line(folder, "dev"), os.path.basename(folder)
    for holder in _entries(folder, "holders"):
        mapping = read_line(folder, "holders", holder, "dm", "name")
        return f"is part of /dev/{f'mapper/{mapping}' if mapping else holder}"
    for device, mountpoint, _, _ in _mounts(root):
        if device == number:
            return f"is mounted on {mountpoint}"
    btrfs = path_below(root, "sys/fs/btrfs")
    for uuid in _entries(btrfs):
        if name in _entries(btrfs, uuid, "devices"):
            return f"is part of the mounted btrfs {uuid}"
    for line in read_table(path_below(root, "proc/swaps"))[1:]:
        if _node_number(unescape(split_fields(line)[0]), root) == number:
            return "is swap"
    return ""


def _partitions(folder: str) -> list[str]:
    return [f"{folder}/{each}" for each in _entries(folder) if os.path.exists(f"{folder}/{each}/partition")]


# What a mounted file system lies on


def devices_of_mount(mountpoint: str, root: str = "/") -> list[str]:
    """MAJOR:MINOR of the devices that a mounted file system lies on: one, or all of a btrfs.

    Empty if nothing is mounted there, or nothing on a block device (overlay, nfs, zfs).
    """
    found: list[str] = []
    for device, where, source, kind in _mounts(root):  # the last mount on a mountpoint is what one sees
        if where == mountpoint:
            found = _btrfs_devices(where, source, root) if kind == "btrfs" else [device]
    return [each for each in found if _sysfs_folder(each, root)]


def lies_on_mappings(mountpoint: str, names: set[str], root: str = "/") -> bool:
    """Whether every path from a mounted file system down to a disk passes a LUKS mapping of one of these names, or
    dm-verity. False if nothing is mounted there, or when in doubt.
    """
    devices = devices_of_mount(mountpoint, root)
    return bool(devices) and all(_is_authenticated(_sysfs_folder(each, root), names, _LAYERS_MAX) for each in devices)


def foreign_devices(mountpoint: str, names: set[str], root: str = "/") -> list[str]:
    """The block devices of a mounted file system that neither are LUKS2 mappings of these names nor lie on such
    mappings alone, by sysfs name; `nothing` where it lies on no block device."""
    folders = [_sysfs_folder(each, root) for each in devices_of_mount(mountpoint, root)]
    foreign = [each for each in folders if not _is_authenticated(each, names, _LAYERS_MAX, verity=False)]
    return [os.path.basename(each) for each in foreign] if folders else ["nothing"]


def is_encrypted(number: str, root: str = "/") -> bool:
    """Whether every path from MAJOR:MINOR down to a disk passes a dm-crypt mapping, whoever opened it."""
    return _is_below_crypt(_sysfs_folder(number, root), _LAYERS_MAX)


def device_lies_on_mappings(number: str, names: set[str], root: str = "/") -> bool:
    """Whether every path from MAJOR:MINOR down to a disk passes a LUKS mapping of one of these names."""
    return _is_authenticated(_sysfs_folder(number, root), names, _LAYERS_MAX, verity=False)


def unproven_system_mounts(names: set[str], root: str = "/") -> list[str]:
    """Mount points of file systems that root runs programs or reads settings from, and that lie neither on LUKS
    mappings of these names nor on dm-verity: whoever edits one of them controls this system."""
    found = {where for _, where, _, kind in _mounts(root) if _is_system_mount(where, kind)}
    return sorted(where for where in found if not lies_on_mappings(where, names, root))


def _is_system_mount(where: str, kind: str) -> bool:
    """Without what has no content of its own (proc, tmpfs), and what lies on files of another mount (overlay, loop)."""
    if where == "/":
        return True
    return any(f"{where}/".startswith(f"{each}/") for each in _SYSTEM) and kind not in _WITHOUT_CONTENT


def mount_type(mountpoint: str, root: str = "/") -> str:
    """The type of the file system that is mounted there, '' if none is."""
    return next((kind for _, where, _, kind in reversed(list(_mounts(root))) if where == mountpoint), "")


def mount_points(root: str = "/") -> list[str]:
    """All mount points, sorted."""
    return sorted({where for _, where, _, _ in _mounts(root)})


def mount_points_on(names: set[str], root: str = "/") -> list[str]:
    """The mount points of file systems that lie on mappings of these names, in the order of their mounts."""
    found: dict[str, bool] = {}
    for device, where, source, kind in _mounts(root):
        devices = _btrfs_devices(where, source, root) if kind == "btrfs" else [device]
        found[where] = any(names & _mapping_names(_sysfs_folder(each, root), _LAYERS_MAX) for each in devices)
    return [where for where, ours in found.items() if ours]


def mappings_below(mountpoint: str, root: str = "/") -> set[str]:
    """Names of the mappings that a mounted file system lies on."""
    return set().union(
        *(_mapping_names(_sysfs_folder(each, root), _LAYERS_MAX) for each in devices_of_mount(mountpoint, root))
    )


def nodes_below(mountpoint: str, root: str = "/") -> set[str]:
    """Nodes of every device, in all layers, that a mounted file system lies on."""
    found: set[str] = set()
    todo = [_sysfs_folder(each, root) for each in devices_of_mount(mountpoint, root)]
    while todo:
        folder = todo.pop()
        node = f"/dev/{os.path.basename(folder)}"
        if node not in found:
            found.add(node)
            todo += _lower_folders(folder)
    return found


def has_holders(number: str, root: str = "/") -> bool:
    """Whether the device MAJOR:MINOR is a part of another one, as a physical volume is of a logical one."""
    return bool(_entries(_sysfs_folder(number, root), "holders"))


def holders(node: str, root: str = "/") -> list[str]:
    """Nodes of the devices that a device is directly a part of: of an array, for one."""
    return [f"/dev/{each}" for each in _entries(_sysfs_folder(_node_number(node, root), root), "holders")]


def active_mappings(root: str = "/") -> dict[str, str]:
    """Name -> LUKS UUID of every active mapping; '' for one that is not LUKS2."""
    return {read_line(folder, "name"): luks2_uuid(read_line(folder, "uuid")) for folder in _dm_folders(root)}


def active_mapping_name(luks_uuid: str, root: str = "/") -> str:
    """The name of the mapping of a LUKS2 disk, '' if it is not open."""
    return next((name for name, uuid in active_mappings(root).items() if uuid == luks_uuid), "")


def dm_uuid(name: str, root: str = "/") -> str | None:
    """The device-mapper UUID of a mapping, '' if it has none; None if there is no mapping of this name."""
    return next((read_line(each, "uuid") for each in _dm_folders(root) if read_line(each, "name") == name), None)


def luks2_uuid(dm_uuid: str) -> str:
    """The LUKS UUID in a device-mapper UUID `CRYPT-LUKS2-<32 hex digits>-<name>`; '' for a mapping of another kind.

    A hostile header may have another UUID than 32 digits: its mapping still gives a text that is not ''.
    """
    digits = dm_uuid.removeprefix("CRYPT-LUKS2-")[:32]
    if not digits or not dm_uuid.startswith("CRYPT-LUKS2-"):
        return ""
    return "-".join((digits[:8], digits[8:12], digits[12:16], digits[16:20], digits[20:]))


def _dm_folders(root: str) -> Iterable[str]:
    """The sysfs folder with `name` and `uuid` of each device-mapper device."""
    blocks = path_below(root, "sys/block")
    return (f"{blocks}/{each}/dm" for each in _entries(blocks) if each.startswith("dm-"))


def _is_authenticated(folder: str, names: set[str], deep: int, verity: bool = True) -> bool:
    kind = read_line(folder, "dm", "uuid")
    if verity and kind.startswith("CRYPT-VERITY-"):
        return True
    if kind.startswith("CRYPT-LUKS") and read_line(folder, "dm", "name") in names:
        return True
    below = _lower_folders(folder)
    if not below and kind.startswith("LVM-") and "-missing_" in kind:
        return True  # LVM has put it in the place of an absent disk, and it gives no data
    return deep > 0 and bool(below) and all(_is_authenticated(each, names, deep - 1, verity) for each in below)


def _is_below_crypt(folder: str, deep: int) -> bool:
    if read_line(folder, "dm", "uuid").startswith("CRYPT-"):
        return True
    below = _lower_folders(folder)
    return deep > 0 and bool(below) and all(_is_below_crypt(each, deep - 1) for each in below)


def _mapping_names(folder: str, deep: int) -> set[str]:
    found = {name} if (name := read_line(folder, "dm", "name")) else set()
    if deep:
        found = found.union(*(_mapping_names(each, deep - 1) for each in _lower_folders(folder)))
    return found


def _lower_folders(folder: str) -> list[str]:
    """The sysfs folders of the devices directly below one. A loop device counts as a disk: its file is not followed."""
    if not folder:
        return []
    if slaves := _slaves(folder):
        return sorted(slaves)
    if os.path.exists(f"{folder}/partition"):
        return [os.path.dirname(folder)]
    return []


def _btrfs_devices(mountpoint: str, source: str, root: str) -> list[str]:
    """All devices of a mounted btrfs, as the kernel says; where there is no kernel to ask (`root`), by its source."""
    btrfs = path_below(root, "sys/fs/btrfs")
    devices = {
        uuid: [read_line(btrfs, uuid, "devices", each, "dev") for each in _entries(btrfs, uuid, "devices")]
        for uuid in _entries(btrfs)
    }
    if root == "/":
        return devices.get(_btrfs_id(mountpoint), [])
    return next((each for each in devices.values() if _node_number(source, root) in each), [])


def _btrfs_id(mountpoint: str) -> str:
    """The name in /sys/fs/btrfs of the btrfs that is mounted there; '' if none is. BTRFS_IOC_FS_INFO of linux/btrfs.h
    gives the id by which the kernel knows it, which is not always that of the superblock (temp_fsid, Linux 6.7)."""
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


# One disk in several devices


class Found(NamedTuple):
    """A block device with a LUKS2 header."""

    node: str
    serial: str
    """Of the disk itself, see udev.serial_number; '' without one."""
    number: str = ""
    """MAJOR:MINOR"""
    size: int = 0
    """Bytes."""


def distinct_disks(found: Sequence[Found], root: str = "/") -> list[Found]:
    """One device for each disk, of devices with one LUKS UUID. Left out are what another of them is made of (the paths
    of a multipath map), LVM snapshots of another, and further paths to one disk: the same identity (see `_identity`),
    serial number, size and partition."""
    folders = {each.node: _sysfs_folder(each.number, root) for each in found}
    parts = set().union(*(_all_slaves(folder) for folder in folders.values()))
    disks: dict[tuple[object, ...], Found] = {}
    for each in sorted(found):
        folder = folders[each.node]
        if folder not in parts and not any(_is_snapshot(folder, other) for other in folders.values()):
            identity = _identity(folder) if each.serial else ()
            one = (*identity, each.serial, each.size, read_line(folder, "partition")) if identity else (each.node,)
            disks.setdefault(one, each)
    return list(disks.values())


def _identity(folder: str) -> tuple[str, ...]:
    """What two paths to one disk, given by sysfs folders, have in common besides its serial number; empty for a disk
    that may have its serial number from what it is connected to: the bridge of a USB dock, the controller of an NVMe
    namespace. The kernel makes a wwid of the unit's own identifiers: VPD page 0x83 for SCSI, NGUID or EUI-64 for NVMe.
    """
    disk = os.path.dirname(folder) if os.path.exists(f"{folder}/partition") else folder
    if any(part.startswith("usb") and part[3:].isdecimal() for part in disk.split("/")):
        return ()
    if wwid := read_line(disk, "wwid") or read_line(disk, "device", "wwid"):
        return (wwid,)
    if os.path.basename(disk).startswith("nvme"):
        return ()
    return "", read_line(disk, "device", "vendor"), read_line(disk, "device", "model")


def _all_slaves(folder: str) -> set[str]:
    """The sysfs folders of everything that a device is made of."""
    found: set[str] = set()
    todo = [folder] if folder else []
    while todo:
        below = _slaves(todo.pop()) - found
        found |= below
        todo += below
    return found


def _is_snapshot(folder: str, origin: str) -> bool:
    """Whether a device is an LVM snapshot of another one: both stand on the hidden volume `-real`, the snapshot alone
    on a `-cow` too."""
    shared, own = _slaves(folder) & _slaves(origin), _slaves(folder) - _slaves(origin)
    return any(_is_hidden(each, "-real") for each in shared) and any(_is_hidden(each, "-cow") for each in own)


def _is_hidden(folder: str, layer: str) -> bool:
    kind = read_line(folder, "dm", "uuid")
    return kind.startswith("LVM-") and kind.endswith(layer)


def _slaves(folder: str) -> set[str]:
    return {os.path.realpath(f"{folder}/slaves/{each}") for each in _entries(folder, "slaves")} if folder else set()


# /proc and /sys


def _mounts(root: str) -> list[tuple[str, str, str, str]]:
    """(MAJOR:MINOR, mountpoint, source, file system) of each mount, oldest first: proc_pid_mountinfo(5)."""
    found = []
    for line in read_table(path_below(root, "proc/self/mountinfo")):
        fields = split_fields(line)
        rest = fields[fields.index("-", 6) + 1 :]
        found.append((fields[2], unescape(fields[4]), unescape(rest[1]), rest[0]))
    return found


def _sysfs_folder(number: str, root: str) -> str:
    """The sysfs folder of a block device; '' if there is none."""
    path = path_below(root, f"sys/dev/block/{number}")
    return os.path.realpath(path) if number and os.path.exists(path) else ""


def _node_number(node: str, root: str) -> str:
    """MAJOR:MINOR of a node, '' if it is not one."""
    try:
        number = device_number(node, root)
    except DiskFailed:
        return ""
    return f"{os.major(number)}:{os.minor(number)}"


def device_number(node: str, root: str) -> int:
    """The device number of a block device's node, as os.stat gives it. Raises DiskFailed if it is none."""
    try:
        found = os.stat(path_below(root, node))
    except OSError as error:
        raise DiskFailed(f"{node}: {error.strerror}") from error
    if not stat.S_ISBLK(found.st_mode):
        raise DiskFailed(f"{node} is not a block device", "lsblk")
    return found.st_rdev


def path_below(root: str, path: str) -> str:
    """An absolute path, below the prefix `root`."""
    return os.path.join(root, path.lstrip("/"))


def _entries(*path: str) -> list[str]:
    try:
        return sorted(os.listdir(os.path.join(*path)))
    except OSError:
        return []


def read_line(*path: str) -> str:
    """The content of a file of one line in /sys, '' if it cannot be read. `path`: its parts, to be joined."""
    try:
        with open(os.path.join(*path), encoding="utf-8", errors="replace") as file:
            return file.read().strip()
    except OSError:
        return ""
