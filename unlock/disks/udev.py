# SPDX-License-Identifier: Apache-2.0
"""Block devices as udev knows them: which disks carry the tag of our udev rule, and an event for each change.

libudev is called by ctypes, from this file alone. Early boot and the gates follow the `Monitor`; commands enumerate.
What the kernel says of a device is in disks.devices.
"""

import ctypes
import errno
import os

from ..errors import DiskFailed
from ..light import Any, Iterable, Mapping, NamedTuple
from .devices import device_number, path_below, read_line
from .groups import SERIAL_MAX

TAG = "unlock"
"""The tag that our udev rule puts on every LUKS2 disk."""
BUFFER = 16 << 20
"""Bytes for udev's events: some 10,000 of them while the agent is busy."""
_EFI_PARTITION = "c12a7328-f81f-11d2-ba4b-00a0c93ec93b"
"""UEFI Specification 2.10, table 5.8."""
_SERIALS = ("ID_SCSI_SERIAL", "ID_SERIAL_SHORT", "ID_SERIAL")


class Disk(NamedTuple):
    """A block device as udev knows it."""

    node: str
    """/dev/sda"""
    sysname: str
    number: str
    """MAJOR:MINOR"""
    serial: str
    """See `serial_number`; '' for a device that has none (loop, dm)."""
    model: str
    size: int
    """Bytes; 0 if it is gone."""
    initialized: float
    """When udev first finished with it, in seconds of CLOCK_MONOTONIC; 0 if never."""


class Monitor:
    """Disks with our tag: those that are present, and events. It listens from its first use on, so no event is lost
    between the two."""

    def __init__(self) -> None:
        self._monitor: Any = None

    def fileno(self) -> int:
        """The netlink socket: readable when `read_events` has an event."""
        udev = libudev()
        if not self._monitor:
            self._monitor = udev.udev_monitor_new_from_netlink(udev.context, b"udev")
            udev.udev_monitor_filter_add_match_subsystem_devtype(self._monitor, b"block", None)
            udev.udev_monitor_filter_add_match_tag(self._monitor, TAG.encode())
            # without CAP_NET_ADMIN the kernel's default has to do
            udev.udev_monitor_set_receive_buffer_size(self._monitor, BUFFER)
            if udev.udev_monitor_enable_receiving(self._monitor) < 0:
                raise DiskFailed("udev's events cannot be received")
        return int(udev.udev_monitor_get_fd(self._monitor))

    def marked_disks(self) -> list[Disk]:
        """The disks that have our tag now; `read_events` returns every change from now on."""
        self.fileno()
        return marked_disks()

    def read_events(self) -> list[tuple[str, Disk]]:
        """(action, disk) of the events that have arrived; never waits. Actions are udev's: add, change, remove.

        A disk that has lost its tag is reported once more, as `change`. When the kernel dropped events because the
        buffer was full, every tagged disk is reported as `change`; a `remove` may then be missed.
        """
        self.fileno()
        found = []
        while device := libudev().udev_monitor_receive_device(self._monitor):
            action = os.fsdecode(libudev().udev_device_get_action(device) or b"change")
            found.append((action, _make_disk(device)))
            libudev().udev_device_unref(device)
        if ctypes.get_errno() == errno.ENOBUFS:
            found += [("change", each) for each in marked_disks()]
        return found


def marked_disks() -> list[Disk]:
    """The disks that have our tag now, in order of their sysfs paths."""
    # TAGS keeps every tag; CURRENT_TAGS (since udev 247) has those of the last event: reformatting a disk removes ours
    found = _enumerate("udev_enumerate_add_match_tag", TAG)
    return [_make_disk(each) for each in found if f":{TAG}:" in _property(each, "CURRENT_TAGS")]


def luks2_disks() -> list[Disk]:
    """The disks that our udev rule marks, and those that it would have marked: udev saw them before it was installed.
    It asks udev about each block device, so early boot takes `marked_disks`."""
    found = _enumerate("udev_enumerate_add_match_property", "ID_FS_TYPE", "crypto_LUKS")
    return [
        _make_disk(each)
        for each in found
        if _property(each, "ID_FS_VERSION") == "2" and _property(each, "DM_UDEV_DISABLE_OTHER_RULES_FLAG") != "1"
    ]


def unmarked_disks() -> set[str]:
    """Nodes of the LUKS2 disks that nothing reports to a `Monitor`, until `udevadm trigger`."""
    return {each.node for each in luks2_disks()} - {each.node for each in marked_disks()}


def find_disk(node: str) -> Disk:
    """What udev knows of one device, with our tag or without. Raises DiskFailed."""
    udev, number = libudev(), device_number(node, "/")
    device = udev.udev_device_new_from_devnum(udev.context, b"b", number)
    if not device:
        raise DiskFailed(f"{node} is not known to udev")
    try:
        return _make_disk(device)
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
    udev = libudev()
    device = udev.udev_device_new_from_devnum(udev.context, b"b", device_number(node, "/"))
    if not device:
        raise DiskFailed(f"{node} is not known to udev")
    try:
        return FileSystem(_property(device, "ID_FS_TYPE"), _property(device, "ID_FS_UUID"))
    finally:
        udev.udev_device_unref(device)


def disks_with_uuid(uuid: str) -> list[Disk]:
    """All devices on which udev found a file system, or a part of one, with this UUID."""
    return [_make_disk(each) for each in _enumerate("udev_enumerate_add_match_property", "ID_FS_UUID", uuid)]


def has_settled(root: str = "/") -> bool:
    """Whether udev has processed every event of the kernel."""
    return not os.path.exists(path_below(root, "run/udev/queue"))


def serial_number(properties: Mapping[str, str]) -> str:
    """The serial number of the disk itself, which stays the same at another port or host, from its udev properties.

    ID_SCSI_SERIAL is the unit serial number (VPD page 0x80; virtio-scsi's `serial=`). ID_SERIAL_SHORT is the
    same for ATA, NVMe and USB; for SCSI it is a WWN, or what the host adapter made up. virtio-blk has only
    ID_SERIAL.
    """
    for name in _SERIALS:
        found = properties.get(name, "").strip()
        if found and found.isascii() and found.isprintable():
            return found[:SERIAL_MAX]
    return ""


def efi_partitions() -> list[str]:
    """Nodes of the EFI system partitions, on disks with a GPT."""
    found = _enumerate("udev_enumerate_add_match_property", "ID_PART_ENTRY_TYPE", _EFI_PARTITION)
    return [each.node for each in map(_make_disk, found)]


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


def libudev() -> Any:
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


def _enumerate(match: str, *what: str) -> Iterable[int]:
    """Block devices that match, in order of their sysfs paths."""
    udev = libudev()
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
    return os.fsdecode(libudev().udev_device_get_property_value(device, name.encode()) or b"")


def _make_disk(device: int) -> Disk:
    udev = libudev()
    sysname = os.fsdecode(udev.udev_device_get_sysname(device))
    number = udev.udev_device_get_devnum(device)
    names = (*_SERIALS, "ID_MODEL", "USEC_INITIALIZED")
    properties = {name: _property(device, name) for name in names}
    return Disk(
        node=os.fsdecode(udev.udev_device_get_devnode(device) or f"/dev/{sysname}".encode()),
        sysname=sysname,
        number=f"{os.major(number)}:{os.minor(number)}",
        serial=serial_number(properties),
        model=properties["ID_MODEL"],
        size=int(read_line(os.fsdecode(udev.udev_device_get_syspath(device)), "size") or 0) * 512,
        initialized=int(properties["USEC_INITIALIZED"] or 0) / 1e6,
    )
