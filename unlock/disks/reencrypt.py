# SPDX-License-Identifier: Apache-2.0
"""Re-encrypts a disk by libcryptsetup, so that a power cut at any instant loses neither data nor the header.

    prepare   keyslots for the new volume key, which cover no data; the caller then writes the token with the plan
    start     the header says that it is being re-encrypted; nothing has moved
    run       hotzone by hotzone, the mapping in use or the disk closed
    settle    after a cut or a kill: the header that is right, the hotzone recovered, the end finished
    finish    the header without what belongs to the re-encryption; the old keyslots go later

What libcryptsetup (2.6 to 2.8) does in another order, and what is done here instead:

- At the end it wipes the old keyslots before the header is whole, with thousands of writes in between, in which nothing
  opens the disk. So it is kept from its end, and `finish` writes the header: deletions alone.
- It writes a header that relies on the checksums of a hotzone before it has flushed those. When the two copies of the
  header differ so, no data of the hotzone has been touched, and the older copy is right.
- It recovers a hotzone in place and writes the header before it has flushed the data. So it recovers with a copy of the
  header in memory; the data is flushed, then the header written.

The keyslots' passphrase is the operation key, or the recovery key: both volume keys have a keyslot for each.
"""

import ctypes
import fcntl
import os
import time
from ctypes import c_char_p, c_int, c_uint32, c_uint64, c_void_p

from ..errors import DiskFailed, Malformed
from ..light import Any, Callable
from ..secret import Secret
from . import raw_header
from .encrypt_plan import SHIFT
from .header import ANY, are_whole, forget_cached, read_copies
from .luks import DESCRIPTORS, Container, Luks2Parameters, memory_file, sized
from .raw_header import WriteLock, flush, lock_path, overwrite, read_valid_copies, was_cut_before_second, write_header
from .reencrypt_plan import CRASH, MOVING, NEW, WHOLE, Plan, all_new, finished, phase_of, plan_facts, without_hotzone

HOTZONE = 32 << 20
"""Bytes that are re-encrypted at a time, at least; `journal` has less room. A step of a disk that is slow takes about a
second."""
LARGEST_HOTZONE = 256 << 20
STEP_SECONDS = 3.0
"""Who reads or writes where the hotzone is waits until its step is done. But each step has a cost of its own: flushes,
headers, tables of device-mapper. So where the disk is fast, a hotzone is as large as takes about this time."""
_OF_MEMORY = _OF_DISK = 8
"""A hotzone has at most this part of the machine's memory, as it is read whole, in early boot too after a power cut;
and of the disk, so that the progress can be seen."""

Tell = Callable[[int, int], bool]
"""What a long operation calls at least every few seconds, here after each hotzone: with the bytes that are done and
those of the whole. True stops it at its next safe point: every disk then opens, and the journal keeps its entry."""

_NO_SEGMENT, _DIGEST_REUSE = 1 << 0, 1 << 2  # CRYPT_VOLUME_KEY_*
INITIALIZE_ONLY, MOVE_FIRST_SEGMENT, _RESUME_ONLY, _RECOVERY = 1 << 0, 1 << 1, 1 << 2, 1 << 3  # CRYPT_REENCRYPT_*
_PREFER = 2  # CRYPT_SLOT_PRIORITY_PREFER
_REENCRYPT, _FORWARD = 0, 0
ENCRYPT, BACKWARD = 1, 1
_DECRYPT = 2
_PHYSICAL_BLOCK_SIZE = 0x127B  # BLKPBSZGET of linux/fs.h
_SECTOR = 512

_Progress = ctypes.CFUNCTYPE(c_int, c_uint64, c_uint64, c_void_p)


class Parameters(ctypes.Structure):
    """struct crypt_params_reencrypt"""

    _fields_ = [
        ("mode", c_int),
        ("direction", c_int),
        ("resilience", c_char_p),
        ("hash", c_char_p),
        ("data_shift", c_uint64),
        ("max_hotzone_size", c_uint64),
        ("device_size", c_uint64),
        ("luks2", c_void_p),
        ("flags", c_uint32),
    ]


class Disk(Container):
    """A disk that is to be re-encrypted, or half is. What its methods raise: DiskFailed, NotOurs for a passphrase or
    volume key that is not the disk's."""

    def _use_disk(self) -> None:
        """Gives libcryptsetup the disk; both copies of its header must be the same, else it would choose."""
        if self._memory >= 0 and not self.is_whole:
            raise DiskFailed(f"{self.device}: the copies of its header differ", f"cryptsetup repair {self.device}")
        if self._memory >= 0:
            self.close()
            self._load(self.device)

    def __enter__(self) -> "Disk":
        return self

    def add_unbound_keyslot(
        self, volume_key: Secret, passphrase: Secret, *, reuse: bool, is_random: bool = True, preferred: bool = False
    ) -> int:
        """Adds a keyslot for a volume key that covers no data yet, and returns its number.

        `reuse`: the key has a digest already. `is_random`: the passphrase is of full strength; for another one the
        library measures how costly it can be. `preferred`: the keyslot is tried before an operator's.
        """
        self._use_disk()
        if is_random:
            self._minimal_pbkdf()
        else:
            self._do("cannot use its PBKDF", "crypt_set_pbkdf_type", None)
        flags = _NO_SEGMENT | (_DIGEST_REUSE if reuse else 0)
        slot = self._do(
            "cannot take a keyslot", "crypt_keyslot_add_by_key",
            ANY, *sized(volume_key), *sized(passphrase), flags,
        )  # fmt: skip
        if preferred:
            self.prefer_keyslot(slot)
        return slot

    def prefer_keyslot(self, slot: int) -> None:
        self._use_disk()
        self._do(f"cannot prefer keyslot {slot}", "crypt_keyslot_set_priority", slot, _PREFER)

    def start(self, name: str, passphrase: Secret, plan: Plan) -> None:
        """Writes into the header that the disk is being re-encrypted or decrypted. `name`: its mapping, or '' for a
        closed disk."""
        self._use_disk()
        self._minimal_pbkdf()  # of a digest over both volume keys
        segment = self.metadata["segments"]["0"]
        cipher, _, mode = str(segment["encryption"]).partition("-")
        luks2 = Luks2Parameters(sector_size=int(segment["sector_size"]))
        resilience = choose_resilience(self.device, int(segment["sector_size"]))
        parameters = Parameters(
            mode=_DECRYPT if plan.decrypts else _REENCRYPT,
            direction=_FORWARD,
            resilience=resilience.encode(),
            hash=b"sha256",
            max_hotzone_size=HOTZONE // _SECTOR,
            luks2=None if plan.decrypts else ctypes.cast(ctypes.pointer(luks2), c_void_p),
            flags=INITIALIZE_ONLY,
        )
        new = (ANY, None, None) if plan.decrypts else (plan.new_keyslot, cipher.encode(), mode.encode())
        self._do(
            "cannot be decrypted" if plan.decrypts else "cannot be re-encrypted", "crypt_reencrypt_init_by_passphrase",
            name.encode() or None, *sized(passphrase), plan.old_keyslot, *new, ctypes.byref(parameters),
        )  # fmt: skip

    def run(self, name: str, passphrase: Secret, tell: Tell, hotzone: int = 0) -> None:
        """Re-encrypts until the end, or until `tell` returns True. The header may be `whole` then, never finished.
        `hotzone`: bytes of one; 0 for what takes STEP_SECONDS."""
        self._use_disk()
        self._run(name, passphrase, tell, hotzone or self._choose_hotzone())

    def _choose_hotzone(self) -> int:
        """Bytes, a multiple of HOTZONE, by the time in which the disk reads that much: writing takes as long again."""
        metadata = self.metadata
        if any(each["type"] == "reencrypt" and each["mode"] != "reencrypt" for each in metadata["keyslots"].values()):
            return HOTZONE  # the shift of the data is the length
        offset = int(metadata["segments"]["0"]["offset"])
        memory = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
        most = min(LARGEST_HOTZONE, memory // _OF_MEMORY, (self.disk_size - offset) // _OF_DISK)
        if most < 2 * HOTZONE:
            return HOTZONE
        began = time.monotonic()
        _read(self.device, offset, HOTZONE)
        fitting = int(HOTZONE * STEP_SECONDS / 2 / max(time.monotonic() - began, 0.001))
        return max(min(most, fitting) // HOTZONE, 1) * HOTZONE

    def _run(self, name: str, passphrase: Secret, tell: Tell, hotzone: int) -> None:
        end = _LibrarysEnd(self.device)
        trouble: list[BaseException] = []

        def progress(size: int, done: int, _: object) -> int:
            try:
                stops = tell(done, size)
            except BaseException as error:  # ctypes would print and forget it
                trouble.append(error)
                stops = True
            try:
                # stopped at its last hotzone, the library ends without another call
                if stops or done >= size:
                    end.prevent()
            except BaseException as error:
                trouble.append(error)
                os._exit(1)  # as if killed: better than the library's end
            return int(stops)

        self._resume(name, passphrase, _RESUME_ONLY, hotzone)
        callback = _Progress(progress)
        try:
            self._do("re-encryption stopped", "crypt_reencrypt_run", ctypes.cast(callback, c_void_p), None)
        except DiskFailed:
            if not end.is_prevented:
                raise
        finally:
            end.allow()
        if trouble:
            raise trouble[0]

    def _resume(self, name: str, passphrase: Secret, flags: int, hotzone: int) -> None:
        """Any other parameter would be refused, or change what the header says."""
        metadata = self.metadata
        last = next(each for each in metadata["segments"].values() if "backup-final" in each.get("flags", ()))
        encrypts = any(each.get("mode") == "encrypt" for each in metadata["keyslots"].values())
        decrypts = last["type"] == "linear"
        luks2 = Luks2Parameters(sector_size=int(last.get("sector_size", _SECTOR)))
        parameters = Parameters(
            mode=ENCRYPT if encrypts else _DECRYPT if decrypts else _REENCRYPT,
            direction=BACKWARD if encrypts else _FORWARD,
            max_hotzone_size=hotzone // _SECTOR,
            luks2=ctypes.cast(ctypes.pointer(luks2), c_void_p),
            flags=flags,
        )
        self._do(
            "re-encryption cannot go on", "crypt_reencrypt_init_by_passphrase",
            name.encode() or None, *sized(passphrase), ANY, ANY, None, None, ctypes.byref(parameters),
        )  # fmt: skip


class _Alias(Disk):
    """A disk that is in use, as libcryptsetup takes it for one that is not: its data by another block device."""

    def __init__(self, device: str, data: str) -> None:
        self.device = device
        self._cd = c_void_p()
        self._memory = -1
        self.is_whole = True
        self._load(device, data_device=data)

    def __enter__(self) -> "_Alias":
        return self


class _HeaderInMemory(Disk):
    """A disk behind a copy of its header in memory: what libcryptsetup writes to the header, or wipes, stays there.
    `data`: another block device with the disk's data; '' for the disk itself."""

    def __init__(self, device: str, copy: raw_header.Copy, data: str = "") -> None:
        self.device = device
        self._cd = c_void_p()
        self._memory = -1
        self.is_whole = True
        size = len(copy.content)
        areas = 2 * size + int(copy.metadata(device)["config"]["keyslots_size"])
        parts = [(2 * size, _read(device, 2 * size, areas - 2 * size)), *_both_copies(copy)]
        try:
            self._memory = memory_file(device, areas, parts)
            self._load(self.path, data_device=data or device)
        except BaseException:
            self.close()
            raise

    def __enter__(self) -> "_HeaderInMemory":
        return self

    @property
    def path(self) -> str:
        return f"{DESCRIPTORS}{self._memory}"

    def _use_disk(self) -> None:
        pass

    def recover(self, passphrase: Secret) -> None:
        """Recovers the hotzone on the disk."""
        self._resume("", passphrase, _RECOVERY, 0)

    def activate_half(self, name: str, passphrase: Secret) -> None:
        """Activates the disk as /dev/mapper/NAME, under both volume keys."""
        self._do(
            f"cannot be opened as {name}", "crypt_activate_by_passphrase",
            name.encode(), ANY, *sized(passphrase), 0,
        )  # fmt: skip


def _both_copies(copy: raw_header.Copy) -> list[tuple[int, bytes]]:
    size = len(copy.content)
    metadata = copy.content[4096:].rstrip(b"\0")
    return [(offset, raw_header.copy_content(copy.content, metadata, offset, copy.sequence)) for offset in (0, size)]


def _read(device: str, offset: int, size: int) -> bytes:
    """Raises DiskFailed."""
    try:
        with open(device, "rb", buffering=0) as file:
            forget_cached(file.fileno())
            return os.pread(file.fileno(), size, offset)
    except OSError as error:
        raise DiskFailed(f"{device} cannot be read: {error.strerror}") from error


class _LibrarysEnd:
    """Keeps libcryptsetup from what it does at the end of a re-encryption: the name of its lock becomes a folder, so
    that each write to the header fails before it has begun. The mapping is as it should be by then."""

    def __init__(self, device: str) -> None:
        self._path = lock_path(device)
        if not self._path:
            raise DiskFailed(f"{device} is not a block device")
        self.is_prevented = False

    def prevent(self) -> None:
        while not self.is_prevented:
            try:
                os.mkdir(self._path, 0o700)
                self.is_prevented = True
            except FileExistsError:
                self._wait_for_holder()

    def _wait_for_holder(self) -> None:
        """Another process has the lock, or was killed with it: waits as the library does, and removes the name."""
        try:
            fd = os.open(self._path, os.O_RDWR | os.O_NOFOLLOW | os.O_CLOEXEC)
        except OSError:
            time.sleep(0.001)
            return
        try:
            fcntl.flock(fd, fcntl.LOCK_EX)
            if os.path.samestat(os.stat(self._path), os.fstat(fd)):
                os.unlink(self._path)
        except FileNotFoundError:
            pass
        finally:
            os.close(fd)

    def allow(self) -> None:
        if self.is_prevented:
            os.rmdir(self._path)
        self.is_prevented = False


def unlock_after_kill(device: str) -> None:
    """Gives the lock of a disk back that a killed run has kept: to be called where no other run can be. Raises
    DiskFailed."""
    try:
        os.rmdir(lock_path(device))
    except OSError:  # there is none, or another process has it as a lock
        pass


def choose_resilience(device: str, sector: int) -> str:
    """How the hotzone survives a power cut. Checksums tell which sectors are new only where the disk writes a sector
    whole or not at all. Raises DiskFailed."""
    block = bytearray(4)
    try:
        with open(device, "rb", buffering=0) as file:
            fcntl.ioctl(file, _PHYSICAL_BLOCK_SIZE, block)
    except OSError as error:
        raise DiskFailed(f"{device} does not tell the size of its blocks: {error.strerror}") from error
    return "checksum" if int.from_bytes(block, "little") >= sector else "journal"


def step(device: str, passphrase: Secret, hotzone: int, data: str) -> None:
    """Re-encrypts one hotzone of so many bytes, of a disk that is in use. `data`: another block device with the disk's
    data. Raises DiskFailed, NotOurs."""
    calls: list[int] = []

    def tell(done: int, total: int) -> bool:
        calls.append(done)
        return len(calls) > 1

    with _Alias(device, data) as disk:
        disk.run("", passphrase, tell, hotzone)


def settle(device: str, plan: Plan, passphrase: Secret | None, data: str = "") -> str:
    """Brings the header to a phase in which libcryptsetup may see it, and returns the phase: `old`, `moving` or `new`;
    of a disk that is decrypted, `whole` in place of `new`.

    Without a passphrase a hotzone cannot be recovered: `crash` stays. `data`: another block device with the disk's
    data, which a mapping may hold then; '' for a disk that is closed. Raises Tampered for a header that is not the
    plan's; then nothing was written. DiskFailed, NotOurs.
    """
    with WriteLock(device):
        copies = read_valid_copies(device)
        newest = copies[0]
        sequence = newest.sequence
        metadata = newest.metadata(device)
        found = phase_of(metadata, plan, device)
        if found == CRASH and not plan.clear and was_cut_before_second(device, newest):
            # libcryptsetup flushes both copies before it touches the hotzone
            metadata, found = without_hotzone(metadata, plan), MOVING
            sequence += 1
            write_header(device, metadata, newest, sequence)
        if found == CRASH and passphrase is not None:
            metadata = _recover(device, newest, plan, passphrase, data)
            found = phase_of(metadata, plan, device)
            sequence += 1
            write_header(device, metadata, newest, sequence)
        if found == WHOLE and not plan.decrypts:
            if plan.clear:
                overwrite(device, plan.clear + SHIFT, SHIFT)  # what was in clear
            metadata, found = finished(metadata, plan), NEW
            sequence += 1
            write_header(device, metadata, newest, sequence)
        if sequence == newest.sequence and found != CRASH and not are_whole(read_copies(device, every=True)):
            write_header(device, metadata, newest, sequence + 1)
        return found


def _recover(device: str, copy: raw_header.Copy, plan: Plan, passphrase: Secret, data: str) -> dict[str, Any]:
    """Recovers the hotzone of a `crash` header; the data is durable. Returns the metadata that the header gets."""
    with _HeaderInMemory(device, copy, data) as disk:
        disk.recover(passphrase)
        if data:
            flush(data)
        flush(device)
        after = read_valid_copies(disk.path)[0].metadata(device)
    if plan.decrypts and not after["config"].get("requirements"):  # the library went to its end, in memory
        return all_new(copy.metadata(device), plan)
    found = phase_of(after, plan, device)
    if found == NEW:  # the same
        return all_new(copy.metadata(device), plan)
    if found != MOVING:
        raise DiskFailed(f"{device}: the recovery of its re-encryption left it {found}")
    return after


def activate(device: str, name: str, plan: Plan, passphrase: Secret, expected: dict[str, Any]) -> None:
    """Activates a half re-encrypted disk as /dev/mapper/NAME, by the operation key or the recovery key.

    `expected`: the facts of its header as they were authenticated. The header that libcryptsetup activates is a copy of
    what is on the disk after `settle`, and must have the same facts. Raises Tampered, NotOurs, DiskFailed.
    """
    settle(device, plan, passphrase)
    with _HeaderInMemory(device, read_valid_copies(device)[0]) as disk:
        if plan_facts(disk, plan) != expected:
            raise Malformed(f"{device}: its header was changed meanwhile")
        disk.activate_half(name, passphrase)


def finish(device: str, plan: Plan) -> bool:
    """Ends a re-encryption whose data is all new: two writes of the header. False when it has data to move yet."""
    return settle(device, plan, None) == NEW
