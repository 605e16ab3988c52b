# SPDX-License-Identifier: Apache-2.0
"""Gives the data behind a LUKS2 header a partition of its own, without moving it: the start of the partition moves
forward, or a disk without partitions gets one.

    find_place   where the device lies, and what becomes of it; refuses what cannot be done
    find_disks   which disks have that partition already
    read_trace   what tells the disk from another with such a partition
    put          writes the table, then erases the header; may be cut off and repeated

One write of one sector is the step: before it the disk has its header, after it the partition.

    DOS      sector 0, with the entry of the partition
    GPT      the new entries beside, in the room of the header; then the primary GPT header, which says where entries
             are. Then the usual place, and the backup
    none     the second copy of the LUKS2 header goes; then sector 0, in place of the first copy, with a DOS table:
             a GPT would need the end of the disk too, which the data has

Formats: UEFI Specification 2.10, section 5.
"""

import ctypes
import errno
import fcntl
import os
import stat
import struct
import zlib
from collections.abc import Iterable
from hashlib import sha256
from typing import NamedTuple

from ..errors import DiskFailed, Malformed, Refused, UnlockError
from . import devices, luks
from .place import Place

_BLKSSZGET, _BLKRRPART, _BLKPG = 0x1268, 0x125F, 0x1269
_ADD, _DELETE = 1, 2  # BLKPG_*
_SECTOR = 512
"""Bytes of a sector in /sys."""
_SCRATCH = 64 << 10
"""Bytes before the data that entries of a GPT may need for a moment."""
_PIECE = 1 << 20
_TRACE = 4 << 10, 16 << 10
"""Bytes of the LUKS2 device: behind the binary header, and before the first place that a second copy may have."""

_BOOT_MAGIC, _BOOT_MAGIC_AT = b"\x55\xaa", 510
_SIGNATURE_AT, _ENTRIES_AT, _ENTRY = 440, 446, 16
_LINUX, _LINUX_LUKS, _PROTECTIVE = 0x83, 0xE8, 0xEE
_EXTENDED = (0x05, 0x0F, 0x85)
_NO_CHS = b"\xfe\xff\xff"
_DOS_SECTORS = 2**32 - 1
_LUKS_MAGIC = b"LUKS\xba\xbe"

_GPT = struct.Struct("<8sIIIIQQQQ16sQIII")
_GPT_MAGIC = b"EFI PART"
_GPT_LUKS = bytes.fromhex("cb7c7dcaed63534c861c1742536059cc")
_GPT_LINUX = bytes.fromhex("af3dc60f838472478e793d69d8477de4")


# Before anything is changed


def find_place(node: str, offset: int, group: str) -> Place:
    """Raises Refused for a device whose data cannot become a partition, DiskFailed. `group`: for the hint."""
    folder, parent, number = _find_folders(node)
    disk = f"/dev/{os.path.basename(parent)}"
    _refuse_layer(node, parent, group)
    size = luks.disk_size(node)
    if not number:
        return whole_disk(disk, size, offset, group)
    start = int(devices.read_line(folder, "start")) * _SECTOR
    with _Disk(disk, os.O_RDONLY) as opened:
        return opened.find(int(number), start, size, offset, group)


def _find_folders(node: str) -> tuple[str, str, str]:
    """In sysfs: the device, the whole disk, and the number of the partition; '' for a whole disk."""
    folder = os.path.realpath(f"/sys/class/block/{os.path.basename(node)}")
    number = devices.read_line(folder, "partition")
    return folder, os.path.dirname(folder) if number else folder, number


def _copy_data(group: str) -> str:
    """The hint where the data cannot become a partition."""
    return f"copy its data to another disk; then: unlock group delete {group}"


def whole_disk(disk: str, size: int, offset: int, group: str) -> Place:
    """The place of a disk without partitions. Raises Refused."""
    with _Disk(disk, os.O_RDONLY) as opened:
        if size // opened.sector > _DOS_SECTORS:
            raise Refused(
                f"{disk} has more than 2^32 sectors, for which its end would need a partition table too, where data is",
                _copy_data(group),
                "not-supported",
            )
    return Place(disk, "none", 1, os.urandom(4).hex(), 0, size, offset, (0, 0))


def _refuse_layer(node: str, disk: str, group: str) -> None:
    """Raises Refused for what is not on a disk of its own."""
    kinds = {"dm": "a logical volume, or another mapping", "md": "an array"}
    what = next((words for name, words in kinds.items() if os.path.isdir(f"{disk}/{name}")), "")
    if devices.read_line(disk, "loop", "partscan") == "0" or devices.read_line(disk, "ext_range") in ("0", "1"):
        what = "a device without partitions"
    if what or not os.path.exists(disk):
        raise Refused(
            f"{node} is {what or 'no disk'}: its data cannot begin where its header ends",
            _copy_data(group),
            "no-partition",
        )


def refuse_keyslots_in_scratch(place: Place, areas: Iterable[range], device: str, group: str) -> None:
    """Raises Refused where the entries of a GPT would be written over what opens the disk until the step is done.
    `areas`: in the device, of what its header needs, as both copies of the header and keyslots."""
    scratch = place.offset - _SCRATCH
    if place.table == "gpt" and any(each.start < place.offset and scratch < each.stop for each in areas):
        raise Refused(
            f"{device}: a keyslot, or the next one, ends less than {_SCRATCH >> 10} KiB before the data, where the new "
            "partition table lies for a moment",
            _copy_data(group),
            "no-room",
        )


class _Gpt(NamedTuple):
    """One header of a GPT with its entries. Both checksums are right."""

    header: bytes
    """Its sector."""
    other: int
    """Sector of the other header."""
    entries_at: int
    """Sector."""
    entry_size: int
    entries: bytes

    def entry(self, number: int) -> bytes:
        return self.entries[(number - 1) * self.entry_size : number * self.entry_size]


class _Disk:
    """An opened disk, or an image of one. udev waits until it is closed. Raises DiskFailed."""

    def __init__(self, path: str, flags: int) -> None:
        self._path, self._flags = path, flags
        self._fd = -1
        self.sector = _SECTOR

    def __enter__(self) -> "_Disk":
        try:
            self._fd = os.open(self._path, self._flags | os.O_CLOEXEC)
            fcntl.flock(self._fd, fcntl.LOCK_EX if self._flags & os.O_RDWR else fcntl.LOCK_SH)
            os.posix_fadvise(self._fd, 0, 0, os.POSIX_FADV_DONTNEED)
            if stat.S_ISBLK(os.fstat(self._fd).st_mode):
                size = bytearray(4)
                fcntl.ioctl(self._fd, _BLKSSZGET, size)
                self.sector = int.from_bytes(size, "little")
        except OSError as error:
            if self._fd >= 0:
                os.close(self._fd)
            raise DiskFailed(f"{self._path} cannot be opened: {error.strerror}", "lsblk") from error
        return self

    def __exit__(self, *_: object) -> None:
        os.close(self._fd)

    def read(self, sector: int, size: int) -> bytes:
        try:
            content = os.pread(self._fd, size, sector * self.sector)
        except (OSError, OverflowError) as error:  # a table of another disk may say anything
            raise DiskFailed(f"{self._path} cannot be read at sector {sector}: {error}") from error
        if len(content) != size:
            raise DiskFailed(f"{self._path} ends before sector {sector}")
        return content

    def write(self, offset: int, content: bytes) -> None:
        """Durable on return."""
        try:
            left = memoryview(content)
            while left:
                count = os.pwrite(self._fd, left[:_PIECE], offset)
                left, offset = left[count:], offset + count
            os.fsync(self._fd)
        except OSError as error:
            raise DiskFailed(f"{self._path} cannot be written: {error.strerror}") from error

    def find(self, number: int, start: int, size: int, offset: int, group: str) -> Place:
        """The place of a partition, which must be as the kernel has it. Raises Refused."""
        if start % self.sector or offset % self.sector:
            raise Refused(
                f"partition {number} of {self._path} is not of whole sectors", _copy_data(group), "no-partition"
            )
        first = self.read(0, self.sector)
        kinds = [first[_ENTRIES_AT + _ENTRY * each + 4] for each in range(4)]
        if first[_BOOT_MAGIC_AT : _BOOT_MAGIC_AT + 2] != _BOOT_MAGIC:
            raise self._refuse("no partition table that unlock knows", "sfdisk --dump")
        if _PROTECTIVE in kinds:
            if sorted(kinds) != [0, 0, 0, _PROTECTIVE]:
                raise self._refuse("a hybrid of two partition tables", "sfdisk --dump")
            return self._find_in_gpt(number, start, size, offset)
        place = Place(
            self._path, "dos", number, first[_SIGNATURE_AT : _SIGNATURE_AT + 4].hex(), start, size, offset, (0, 0)
        )
        if number > 4 or kinds[number - 1] in (0, *_EXTENDED):
            raise Refused(
                f"partition {number} of {self._path} is a logical one, whose place is in a chain of tables",
                _copy_data(group),
                "no-partition",
            )
        if self.state(place) != "before":
            raise self._refuse("another partition table than the kernel has read", "partprobe")
        return place

    def _find_in_gpt(self, number: int, start: int, size: int, offset: int) -> Place:
        main = self._read_gpt(1)
        backup = self._read_gpt(main.other) if main else None
        if not main or not backup or main.entries != backup.entries:
            raise self._refuse("a GPT whose copies are damaged or differ", "sfdisk --verify")
        guid = main.entry(number)[16:32].hex()
        entries = (main.entries_at, backup.entries_at)
        place = Place(self._path, "gpt", number, guid, start, size, offset, entries)
        if self.state(place) != "before":
            raise self._refuse("another partition table than the kernel has read", "partprobe")
        if len(main.entries) > _SCRATCH:
            raise self._refuse("too many entries in its GPT", "sfdisk --dump")
        return place

    def _refuse(self, what: str, command: str) -> Refused:
        return Refused(f"{self._path} has {what}", f"{command} {self._path}", "no-partition")

    def _read_gpt(self, at: int) -> _Gpt | None:
        """None where it is not valid."""
        try:
            header = self.read(at, self.sector)
            magic, _, length, crc, _, mine, other, _, _, _, entries_at, count, size, entries_crc = _GPT.unpack_from(
                header
            )
            if magic != _GPT_MAGIC or mine != at or not _GPT.size <= length <= self.sector:
                return None
            if zlib.crc32(header[:16] + bytes(4) + header[20:length]) != crc or size < 128 or count * size > 1 << 20:
                return None
            entries = self.read(entries_at, count * size)
        except DiskFailed:
            return None
        return _Gpt(header, other, entries_at, size, entries) if zlib.crc32(entries) == entries_crc else None

    # What a table says

    def state(self, place: Place) -> str:
        """`before`, `placed`, or '' for a disk that has neither."""
        first = self.read(0, self.sector)
        if place.table == "none" and first[:6] == _LUKS_MAGIC:
            return "before"
        if place.table == "gpt":
            main = self._read_gpt(1)
            if not main or main.entry(place.number)[16:32].hex() != place.identity:
                return ""
            begin, last = struct.unpack_from("<QQ", main.entry(place.number), 32)
            count = last - begin + 1
        else:
            signature = first[_SIGNATURE_AT : _SIGNATURE_AT + 4].hex()
            if first[_BOOT_MAGIC_AT : _BOOT_MAGIC_AT + 2] != _BOOT_MAGIC or signature != place.identity:
                return ""
            begin, count = struct.unpack_from("<II", first, _ENTRIES_AT + _ENTRY * (place.number - 1) + 8)
        found = begin * self.sector, count * self.sector
        if found == (place.start + place.offset, place.size - place.offset):
            return "placed"
        return "before" if found == (place.start, place.size) else ""

    # The step

    def switch(self, place: Place) -> None:
        if place.table == "gpt":
            self._switch_gpt(place)
        elif place.table == "dos":
            self.write(0, self._dos_sector(place, self.read(0, self.sector)))
        else:
            second = int.from_bytes(self.read(0, 16)[8:16], "big")
            self.write(second, bytes(self.sector))
            self.write(0, self._dos_sector(place, _empty_table(place, self.sector)))

    def _dos_sector(self, place: Place, before: bytes) -> bytes:
        sector = bytearray(before)
        at = _ENTRIES_AT + _ENTRY * (place.number - 1)
        begin, count = (place.start + place.offset) // self.sector, (place.size - place.offset) // self.sector
        kind = sector[at + 4] if sector[at + 4] not in (0, _LINUX_LUKS) else _LINUX
        sector[at + 1 : at + _ENTRY] = _NO_CHS + bytes([kind]) + _NO_CHS + struct.pack("<II", begin, count)
        return bytes(sector)

    def _switch_gpt(self, place: Place) -> None:
        main = self._read_gpt(1)
        assert main
        entry = bytearray(main.entry(place.number))
        if entry[:16] == _GPT_LUKS:
            entry[:16] = _GPT_LINUX
        struct.pack_into("<Q", entry, 32, (place.start + place.offset) // self.sector)
        at = (place.number - 1) * main.entry_size
        entries = main.entries[:at] + entry + main.entries[at + main.entry_size :]
        beside = (place.start + place.offset - _SCRATCH) // self.sector
        self.write(beside * self.sector, entries)
        self._write_gpt(1, main, beside, entries)

    def _write_gpt(self, at: int, like: _Gpt, entries_at: int, entries: bytes) -> None:
        fields = list(_GPT.unpack_from(like.header))
        if at != 1:
            fields[5], fields[6] = at, 1
        fields[3], fields[10], fields[13] = 0, entries_at, zlib.crc32(entries)
        length = fields[2]
        header = bytearray(like.header)
        _GPT.pack_into(header, 0, *fields)
        struct.pack_into("<I", header, 16, zlib.crc32(bytes(header[:length])))
        self.write(at * self.sector, bytes(header))

    def tidy(self, place: Place) -> None:
        """The entries of a GPT to their usual place, and the backup; then the header goes."""
        if place.table == "gpt":
            self._tidy_gpt(*place.entries)
        begin = self.sector if place.table == "none" else place.start
        for at in range(begin, place.start + place.offset, _PIECE):
            self._erase(at, min(_PIECE, place.start + place.offset - at))

    def _tidy_gpt(self, home: int, backup_home: int) -> None:
        main = self._read_gpt(1)
        assert main
        if main.entries_at != home:
            self.write(home * self.sector, main.entries)
            self._write_gpt(1, main, home, main.entries)
        backup = self._read_gpt(main.other)
        if not backup or backup.entries != main.entries:
            self.write(backup_home * self.sector, main.entries)
            self._write_gpt(main.other, main, backup_home, main.entries)

    def _erase(self, offset: int, size: int) -> None:
        try:
            is_clean = not os.pread(self._fd, size, offset).strip(b"\0")
        except OSError:
            is_clean = False  # a disk mostly replaces a sector that it cannot read when it is written
        if not is_clean:
            self.write(offset, bytes(size))


def _empty_table(place: Place, size: int) -> bytes:
    sector = bytearray(size)
    sector[_SIGNATURE_AT : _SIGNATURE_AT + 4] = bytes.fromhex(place.identity)
    sector[_BOOT_MAGIC_AT : _BOOT_MAGIC_AT + 2] = _BOOT_MAGIC
    return bytes(sector)


# The step, and after a cut


def is_placed(place: Place, disk: str) -> bool:
    """Whether this disk has the partition. False for what is no disk."""
    try:
        with _Disk(disk, os.O_RDONLY) as opened:
            return opened.state(place) == "placed"
    except UnlockError:
        return False


def find_disks(place: Place) -> list[str]:
    """The disks that have the partition already. Anybody can make another one."""
    folder = "/sys/class/block"
    nodes = [f"/dev/{each}" for each in sorted(os.listdir(folder)) if not os.path.exists(f"{folder}/{each}/partition")]
    return [each for each in dict.fromkeys([place.disk, *nodes]) if is_placed(place, each)]


def read_trace(place: Place, disk: str) -> str:
    """SHA-256, in hex, of the JSON of the header's first copy, which is left before the partition until `tidy`. Nobody
    makes it who has not read the disk: it has salts and wraps. Raises DiskFailed."""
    with _Disk(disk, os.O_RDONLY) as opened:
        begin, end = ((place.start + each) // opened.sector for each in _TRACE)
        return sha256(opened.read(begin, (end - begin) * opened.sector)).hexdigest()


def lies_on(node: str, disk: str) -> bool:
    """Whether a device is this whole disk or a partition of it."""
    return os.path.basename(_find_folders(node)[1]) == os.path.basename(os.path.realpath(disk))


def put(place: Place, node: str) -> None:
    """Makes the data of a device a partition: the caller has checked that all of it is in clear. `node`: the device.
    Raises DiskFailed, also when it is in use; then nothing has changed."""
    try:
        held = os.open(node, os.O_RDWR | os.O_EXCL | os.O_CLOEXEC)
    except OSError as error:
        raise DiskFailed(f"{node} is in use: {error.strerror}", "lsblk", "in-use") from error
    try:
        with _Disk(place.disk, os.O_RDWR) as disk:
            if disk.state(place) != "before":
                raise Malformed(f"{place.disk} has another partition table than before", f"sfdisk --dump {place.disk}")
            disk.switch(place)
    finally:
        os.close(held)


def tidy(place: Place) -> None:
    """Erases the header before the partition, and what else is left to do once the partition is there. Raises
    DiskFailed, Malformed."""
    with _Disk(place.disk, os.O_RDWR) as disk:
        if disk.state(place) != "placed":
            raise Malformed(f"{place.disk} has another partition table than before", f"sfdisk --dump {place.disk}")
        disk.tidy(place)


class _Partition(ctypes.Structure):
    """struct blkpg_partition"""

    _fields_ = [
        ("start", ctypes.c_longlong),
        ("length", ctypes.c_longlong),
        ("number", ctypes.c_int),
        ("device", ctypes.c_char * 64),
        ("volume", ctypes.c_char * 64),
    ]


class _Request(ctypes.Structure):
    """struct blkpg_ioctl_arg"""

    _fields_ = [
        ("operation", ctypes.c_int),
        ("flags", ctypes.c_int),
        ("size", ctypes.c_int),
        ("data", ctypes.c_void_p),
    ]


def tell_kernel(place: Place) -> bool:
    """Makes the kernel take the partition as it is now. False where that has to wait: something is in use, or it is an
    image."""
    if _is_known(place):  # a boot has read the table, and the partition may be in use
        return True
    try:
        disk = os.open(place.disk, os.O_RDONLY | os.O_CLOEXEC)
    except OSError:
        return False
    try:
        if not stat.S_ISBLK(os.fstat(disk).st_mode):
            return False
        if place.table == "none":
            fcntl.ioctl(disk, _BLKRRPART)
            return True
        for operation in _DELETE, _ADD:
            found = _Partition(place.start + place.offset, place.size - place.offset, place.number)
            size = ctypes.sizeof(found)
            request = _Request(operation, 0, size, ctypes.cast(ctypes.pointer(found), ctypes.c_void_p))
            try:
                fcntl.ioctl(disk, _BLKPG, request)
            except OSError as error:
                if operation == _ADD or error.errno != errno.ENXIO:
                    raise
        return True
    except OSError:
        return False
    finally:
        os.close(disk)


def _is_known(place: Place) -> bool:
    """Whether the kernel has the partition as it is now."""
    folder = f"/sys/class/block/{os.path.basename(place.partition)}"
    found = [devices.read_line(folder, each) for each in ("start", "size")]
    return found == [str((place.start + place.offset) // _SECTOR), str((place.size - place.offset) // _SECTOR)]
