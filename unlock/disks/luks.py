# SPDX-License-Identifier: Apache-2.0
"""LUKS2 disks through libcryptsetup, called by ctypes. No other file calls it, but for disks.reencrypt, which has
the calls of a re-encryption.

A `Container` reads the header once. Keys are authenticated against the metadata of its libcryptsetup context, and the
same context activates the disk. The library is not thread-safe: boot.worker activates each disk in its own process.
The calls: libcryptsetup.h of cryptsetup 2.6 to 2.7. What the header says: disks.header.
"""

import ctypes
import errno
import os
import stat
from ctypes import POINTER, c_char, c_char_p, c_int, c_size_t, c_uint32, c_uint64, c_void_p

from ..errors import DiskFailed, Malformed, NotOurs
from ..light import Any, Callable
from ..secret import Secret
from ..strictjson import canonical
from . import devices
from .header import (
    ANY,
    KEYSLOT_ITERATIONS,
    REENCRYPTION,
    Header,
    are_whole,
    forget_cached,
    parse_metadata,
    read_copies,
    read_luks_version,
)

MAX_KEY = 512
"""Bytes; volume keys with integrity are longer than the 64 of aes-xts."""


FLAGS = {
    "allow-discards": 1 << 3,
    "same-cpu-crypt": 1 << 6,
    "submit-from-crypt-cpus": 1 << 7,
    "no-read-workqueue": 1 << 24,
    "no-write-workqueue": 1 << 25,
}
"""Flags of a header that an activation obeys, and their bits, CRYPT_ACTIVATE_*."""

_PIECE = 1 << 20
_KEYRING_KEY = 1 << 11  # CRYPT_ACTIVATE_KEYRING_KEY
_PRIVATE = 1 << 4  # CRYPT_ACTIVATE_PRIVATE
_FOR_ACTIVATION = 0  # CRYPT_FLAGS_ACTIVATION
_DEFERRED = 1 << 0  # crypt_deactivate_by_name flag
_NO_BENCHMARK = 1 << 1  # pbkdf flag
_LOG_ERROR = 1
_MFD_NOEXEC_SEAL = 8  # since Linux 6.3; vm.memfd_noexec=2 demands it
_INVALID, _INACTIVE = 0, 1  # crypt_status

_WRONG_KEY = {
    "crypt_volume_key_get": (errno.EPERM, errno.ENOENT),  # ENOENT: no keyslot that could be tried
    "crypt_activate_by_volume_key": (errno.EPERM,),
    "crypt_volume_key_verify": (errno.EPERM,),
    "crypt_keyslot_add_by_volume_key": (errno.EPERM,),
    "crypt_activate_by_passphrase": (errno.EPERM, errno.ENOENT),
    "crypt_reencrypt_init_by_passphrase": (errno.EPERM, errno.ENOENT),
}
"""What means that the key is another one, by call."""

_LogCallback = ctypes.CFUNCTYPE(None, c_int, c_char_p, c_void_p)
_SIGNATURES: dict[str, tuple[Any, ...]] = {
    "crypt_init": (POINTER(c_void_p), c_char_p),
    "crypt_load": (c_void_p, c_char_p, c_void_p),
    "crypt_set_data_offset": (c_void_p, c_uint64),
    "crypt_metadata_locking": (c_void_p, c_int),
    "crypt_format": (
        c_void_p, c_char_p, c_char_p, c_char_p, c_char_p, POINTER(c_char), c_size_t, c_void_p,
    ),
    "crypt_persistent_flags_get": (c_void_p, c_int, POINTER(c_uint32)),
    "crypt_persistent_flags_set": (c_void_p, c_int, c_uint32),
    "crypt_set_pbkdf_type": (c_void_p, c_void_p),
    "crypt_dump_json": (c_void_p, POINTER(c_char_p), c_uint32),
    "crypt_token_json_set": (c_void_p, c_int, c_char_p),
    "crypt_volume_key_get": (c_void_p, c_int, POINTER(c_char), POINTER(c_size_t), POINTER(c_char), c_size_t),
    "crypt_volume_key_verify": (c_void_p, POINTER(c_char), c_size_t),
    "crypt_keyslot_context_init_by_token": (
        c_void_p, c_int, c_char_p, c_char_p, c_size_t, c_void_p, POINTER(c_void_p),
    ),
    "crypt_volume_key_get_by_keyslot_context": (
        c_void_p, c_int, POINTER(c_char), POINTER(c_size_t), c_void_p,
    ),
    "crypt_keyslot_add_by_volume_key": (
        c_void_p, c_int, POINTER(c_char), c_size_t, POINTER(c_char), c_size_t,
    ),
    "crypt_keyslot_destroy": (c_void_p, c_int),
    "crypt_keyslot_set_priority": (c_void_p, c_int, c_int),
    "crypt_keyslot_add_by_key": (
        c_void_p, c_int, POINTER(c_char), c_size_t, POINTER(c_char), c_size_t, c_uint32,
    ),
    "crypt_activate_by_volume_key": (c_void_p, c_char_p, POINTER(c_char), c_size_t, c_uint32),
    "crypt_resize": (c_void_p, c_char_p, c_uint64),
    "crypt_activate_by_passphrase": (c_void_p, c_char_p, c_int, POINTER(c_char), c_size_t, c_uint32),
    "crypt_init_data_device": (POINTER(c_void_p), c_char_p, c_char_p),
    "crypt_reencrypt_init_by_passphrase": (
        c_void_p, c_char_p, POINTER(c_char), c_size_t, c_int, c_int, c_char_p, c_char_p, c_void_p,
    ),
    "crypt_reencrypt_run": (c_void_p, c_void_p, c_void_p),
    "crypt_deactivate_by_name": (c_void_p, c_char_p, c_uint32),
    "crypt_status": (c_void_p, c_char_p),
    "crypt_get_uuid": (c_void_p,),
    "crypt_get_volume_key_size": (c_void_p,),
}  # fmt: skip


class _Pbkdf(ctypes.Structure):
    """struct crypt_pbkdf_type"""

    _fields_ = [
        ("type", c_char_p),
        ("hash", c_char_p),
        ("time_ms", c_uint32),
        ("iterations", c_uint32),
        ("max_memory_kb", c_uint32),
        ("parallel_threads", c_uint32),
        ("flags", c_uint32),
    ]


class Luks2Parameters(ctypes.Structure):
    """struct crypt_params_luks2; a sector size of 0 means: choose by the device."""

    _fields_ = [
        ("pbkdf", POINTER(_Pbkdf)),
        ("integrity", c_char_p),
        ("integrity_params", c_void_p),
        ("data_alignment", c_size_t),
        ("data_device", c_char_p),
        ("sector_size", c_uint32),
        ("label", c_char_p),
        ("subsystem", c_char_p),
    ]


class Container(Header):
    """One LUKS2 disk or image file, its header read and validated by libcryptsetup.

    Nothing is written to a disk that is only looked at. libcryptsetup would repair one ruined copy of the header from
    the other, on a disk of another host too, which may be writing to it: it gets the header in memory, and the disk
    when a method writes to it or activates it.

    Raises NotOurs if there is no LUKS2 header, Malformed if both copies are ruined, DiskFailed if the disk cannot
    be read. Close it, or use `with`.
    A forked child may use it, but never two processes at once: they share the file offset of its device.
    """

    def __init__(self, device: str) -> None:
        self.device = device
        self._cd = c_void_p()
        self._memory = -1
        self.is_whole = True
        """Whether both copies of the header were good and the same; not known after `only_read`."""
        try:
            copies = read_copies(device, every=not _only_reads)
            if _only_reads:
                self._load(device)
            else:
                self.is_whole = are_whole(copies)
                self._memory = _copy_to_memory(device, copies)
                self._load(f"{DESCRIPTORS}{self._memory}")
        except BaseException:
            self.close()
            raise

    def _load(self, path: str, *, data_device: str = "") -> None:
        if data_device:
            paths = os.fsencode(path), os.fsencode(data_device)
            _do(self.device, "cannot be used", "crypt_init_data_device", ctypes.byref(self._cd), *paths)
        else:
            _do(self.device, "cannot be used", "crypt_init", ctypes.byref(self._cd), os.fsencode(path))
        _logged_errors.clear()
        result = _lib().crypt_load(self._cd, b"LUKS2", None)
        if result == 0:
            return
        logged = _error_text(self.device)
        version = read_luks_version(self.device)
        if version == 0:
            raise NotOurs(f"{self.device} is not LUKS2", code="not-luks2")
        if version == 1:
            hint = f"cryptsetup convert --type luks2 {self.device}"
            raise NotOurs(f"{self.device} is LUKS1", hint=hint, code="not-luks2")
        if result != -errno.EINVAL or "lock" in logged:
            raise DiskFailed(f"{self.device} cannot be read{logged or ': ' + os.strerror(-result)}")
        hint = f"cryptsetup luksHeaderRestore {self.device} --header-backup-file FILE"
        raise Malformed(f"{self.device}: the LUKS2 header is ruined", hint=hint)

    def _use_disk(self) -> None:
        """Gives libcryptsetup the disk instead of the header in memory. Raises DiskFailed unless it has that header."""
        if self._memory < 0:
            return
        if REENCRYPTION in str(self.requirements):  # the older copy of its header may be the right one
            raise DiskFailed(f"{self.device} is being re-encrypted", "unlock status", code="unmet-requirements")
        seen = self.uuid, self.dump()
        self.close()
        self._load(self.device)
        if (self.uuid, self.dump()) != seen:
            raise DiskFailed(f"{self.device}: its header was changed meanwhile", "type the same command again")

    def _copy_keyslots(self, slot: int) -> None:
        """Copies the material of keyslots to the header in memory. Raises DiskFailed."""
        try:
            disk = os.open(self.device, os.O_RDONLY | os.O_CLOEXEC)
            try:
                forget_cached(disk)
                for number, fields in self.metadata["keyslots"].items():
                    if slot in (ANY, int(number)):
                        at, size = int(fields["area"]["offset"]), int(fields["area"]["size"])
                        os.pwrite(self._memory, os.pread(disk, size, at), at)
            finally:
                os.close(disk)
        except OSError as error:
            raise DiskFailed(f"{self.device} cannot be read: {error.strerror}") from error

    def close(self) -> None:
        """Frees the context; safe to call twice."""
        if self._cd:
            _lib().crypt_free(self._cd)
            self._cd = c_void_p()
        if self._memory >= 0:
            os.close(self._memory)
            self._memory = -1

    def __enter__(self) -> "Container":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    @property
    def uuid(self) -> str:
        return (_lib().crypt_get_uuid(self._cd) or b"").decode("ascii", "replace")

    @property
    def volume_key_size(self) -> int:
        """Bytes."""
        return int(_lib().crypt_get_volume_key_size(self._cd))

    @property
    def disk_size(self) -> int:
        """Bytes. Raises DiskFailed."""
        return disk_size(self.device)

    @property
    def metadata(self) -> dict[str, Any]:
        """The JSON of this context; the disk is not read again. Raises Malformed."""
        return parse_metadata(self.dump(), self.device)

    def dump(self) -> bytes:
        """The metadata of this context as libcryptsetup prints it; the disk is not read again."""
        text = c_char_p()
        self._do("has no readable metadata", "crypt_dump_json", ctypes.byref(text), 0)
        return text.value or b""

    # Tokens

    def set_token(self, fields: dict[str, Any], number: int | None = None) -> int:
        """Writes a token (`keyslots` may be left out) and returns its number. The token is durable on return.

        Raises DiskFailed, also when the header has no room.
        """
        self._use_disk()
        text = canonical({"keyslots": [], **fields})
        try:
            return self._do("cannot take the token", "crypt_token_json_set", ANY if number is None else number, text)
        except DiskFailed as error:
            error.hint = f"if its header is full: cryptsetup token remove --token-id N {self.device}"
            raise

    def remove_token(self, number: int) -> None:
        """Durable on return, also if there was none of that number. Raises DiskFailed."""
        self._use_disk()
        self._do(f"cannot remove token {number}", "crypt_token_json_set", number, None)

    # Keys

    def volume_key(self, passphrase: Secret, slot: int = ANY) -> Secret:
        if slot != ANY and slot not in self.keyslots():
            raise NotOurs(f"{self.device} has no keyslot {slot}")
        if self._memory >= 0:
            self._copy_keyslots(slot)
        size = c_size_t(max(_lib().crypt_get_volume_key_size(self._cd), 0) or MAX_KEY)
        key = Secret(bytes(size.value))
        try:
            self._do(
                "does not open with this passphrase", "crypt_volume_key_get",
                slot, _buffer(key), ctypes.byref(size), *sized(passphrase),
            )  # fmt: skip
            if size.value == len(key):
                return key
            with key:
                return key.copy(0, size.value)
        except BaseException:
            key.wipe()
            raise

    def verify_volume_key(self, volume_key: Secret) -> None:
        """Raises NotOurs unless this is the key of the header's digest."""
        self._do("has another volume key", "crypt_volume_key_verify", *sized(volume_key))

    def add_keyslot(self, volume_key: Secret, *, passphrase: Secret, slot: int = ANY, slow: bool = False) -> int:
        """Adds a keyslot with KEYSLOT_ITERATIONS of PBKDF2 and returns its number: for a `passphrase` of full strength.
        `slow`: for one that a person has chosen, with libcryptsetup's own choice, Argon2id for two seconds.

        Raises NotOurs for another volume key, DiskFailed.
        """
        self._use_disk()
        if not slow:
            self._minimal_pbkdf()
        try:
            return self._do(
                "cannot take a keyslot", "crypt_keyslot_add_by_volume_key",
                slot, *sized(volume_key), *sized(passphrase),
            )  # fmt: skip
        except DiskFailed as error:
            error.hint = f"if its header is full: cryptsetup luksKillSlot {self.device} N"
            raise

    def remove_keyslot(self, slot: int) -> None:
        """Overwrites a keyslot and its place in the header. Raises DiskFailed."""
        self._use_disk()
        self._do(f"cannot remove keyslot {slot}", "crypt_keyslot_destroy", slot)

    def destroy_keys(self) -> None:
        """Overwrites and removes every keyslot, and removes every token. Durable on return. Raises DiskFailed."""
        for slot in self.keyslots():
            self.remove_keyslot(slot)
        for number in sorted(map(int, self.metadata["tokens"])):
            self.remove_token(number)

    @property
    def areas_end(self) -> int:
        """Bytes from the start of the disk to the end of both copies of the header and the areas of keyslots; none of
        them is the data's."""
        config = self.metadata["config"]
        end = 2 * (int(config["json_size"]) + 4096) + int(config["keyslots_size"])
        return min([end, *(int(each["offset"]) for each in self.metadata["segments"].values())])

    # Flags

    @property
    def flags(self) -> frozenset[str]:
        """Those of FLAGS that the header has."""
        return frozenset(name for name, bit in FLAGS.items() if self._flag_bits() & bit)

    def set_flags(self, flags: frozenset[str], *, in_memory: bool = False) -> None:
        """Sets those of FLAGS, and no others of them; other flags stay. Raises DiskFailed.

        `in_memory`: this context alone, which then says what the header will be; nothing more can be done with it.
        """
        if not in_memory:
            self._use_disk()
        bits = self._flag_bits() & ~sum(FLAGS.values()) | sum(FLAGS[name] for name in flags)
        self._do("cannot take the flags", "crypt_persistent_flags_set", _FOR_ACTIVATION, bits)

    def _flag_bits(self) -> int:
        bits = c_uint32()
        self._do("has no readable flags", "crypt_persistent_flags_get", _FOR_ACTIVATION, ctypes.byref(bits))
        return bits.value

    # Mappings

    def activate(self, name: str, volume_key: Secret, *, private: bool = False) -> None:
        """Activates the disk as /dev/mapper/NAME. The volume key goes to the kernel's keyring, never into the dm table.
        `private`: udev does not look at what is on it, so that neither btrfs nor LVM takes it in.

        The header's persistent flags apply. Raises NotOurs for another key, DiskFailed ("name-taken" if NAME
        is active already: a mapping is never replaced).
        """
        self._use_disk()
        self._do(
            f"cannot be opened as {name}", "crypt_activate_by_volume_key",
            name.encode(), *sized(volume_key), _KEYRING_KEY | (_PRIVATE if private else 0),
        )  # fmt: skip

    def resize(self, name: str, volume_key: Secret) -> None:
        """Lets the active mapping have all of a disk that has become larger. Raises NotOurs for another key,
        DiskFailed."""
        self._use_disk()
        trouble = f"cannot be made larger as {name}"
        self._do(trouble, "crypt_activate_by_volume_key", None, *sized(volume_key), _KEYRING_KEY)
        self._do(trouble, "crypt_resize", name.encode(), 0)

    def _minimal_pbkdf(self) -> None:
        self._do("cannot use PBKDF2", "crypt_set_pbkdf_type", ctypes.byref(_minimum()))

    def _do(self, trouble: str, function: str, *arguments: Any) -> int:
        if not self._cd:
            raise ValueError("the container is closed")
        return _do(self.device, trouble, function, self._cd, *arguments)


def format(device: str, volume_key: Secret, *, uuid: str | None = None, label: str = "") -> Container:
    """Writes a new LUKS2 header over whatever is there: aes-xts-plain64 with this key (64 random bytes), no keyslot.

    The key's digest has KEYSLOT_ITERATIONS of PBKDF2, not the usual 125 ms of them: the key is random, and every
    activation checks it. Returns the container as read back from the disk. Raises DiskFailed.
    """
    context = c_void_p()
    _do(device, "cannot be used", "crypt_init", ctypes.byref(context), os.fsencode(device))
    try:
        pbkdf = _minimum()
        parameters = Luks2Parameters(ctypes.pointer(pbkdf), label=label.encode())
        _do(device, "cannot be formatted", "crypt_set_pbkdf_type", context, ctypes.byref(pbkdf))
        _do(
            device, "cannot be formatted", "crypt_format",
            context, b"LUKS2", b"aes", b"xts-plain64", uuid.encode() if uuid else None,
            *sized(volume_key), ctypes.byref(parameters),
        )  # fmt: skip
    finally:
        _lib().crypt_free(context)
    return Container(device)


def format_detached(header: str, data: str, volume_key: Secret, *, uuid: str, offset: int, sector: int) -> None:
    """Writes a new header for a disk into a file; the disk's data begins at `offset`. `sector`: 0 for what suits the
    disk. Raises DiskFailed."""
    context = c_void_p()
    paths = os.fsencode(header), os.fsencode(data)
    _do(data, "cannot be used", "crypt_init_data_device", ctypes.byref(context), *paths)
    try:
        pbkdf = _minimum()
        parameters = Luks2Parameters(ctypes.pointer(pbkdf), sector_size=sector)
        _do(data, "cannot be formatted", "crypt_set_data_offset", context, offset // 512)
        _do(data, "cannot be formatted", "crypt_set_pbkdf_type", context, ctypes.byref(pbkdf))
        _do(
            data, "cannot be formatted", "crypt_format",
            context, b"LUKS2", b"aes", b"xts-plain64", uuid.encode(), *sized(volume_key), ctypes.byref(parameters),
        )  # fmt: skip
    finally:
        _lib().crypt_free(context)


def overwrite(device: str, start: int, end: int, tell: Callable[[int], None] = lambda at: None) -> None:
    """Writes zeros from byte `start` to byte `end`, durably. `tell` gets the place of each piece. Raises DiskFailed."""
    try:
        disk = os.open(device, os.O_WRONLY | os.O_CLOEXEC)
        try:
            at = start
            while at < end:
                at += os.pwrite(disk, bytes(min(_PIECE, end - at)), at)
                tell(at)
            os.fsync(disk)
        finally:
            os.close(disk)
    except OSError as error:
        raise DiskFailed(f"{device} cannot be overwritten: {error.strerror}", "the same command again") from error


def only_read() -> None:
    """From now on this process writes to no header: it can load one from its disk without repairing it, and takes no
    lock. libcryptsetup cannot be told to lock again."""
    global _only_reads
    _lib().crypt_metadata_locking(None, 0)
    _only_reads = True


def prepare() -> None:
    """Loads libcryptsetup and the crypto library it uses, once for all processes that are forked later. Raises
    DiskFailed."""
    if _library is None:
        context = c_void_p()
        _do("libcryptsetup", "cannot be used", "crypt_init", ctypes.byref(context), None)
        _lib().crypt_set_pbkdf_type(context, ctypes.byref(_minimum()))  # the first call that needs a hash
        _lib().crypt_free(context)


def volume_key_by_plugin(device: str, number: int) -> Secret:
    """The volume key by a token of another program, through libcryptsetup's plugin for tokens of that type, which may
    speak with a TPM. For a process of its own: nowhere else is a plugin loaded. Raises DiskFailed."""
    global _loads_plugins
    assert _library is None
    _loads_plugins = True
    with Container(device) as container:
        container._copy_keyslots(ANY)
        context = c_void_p()
        size = c_size_t(container.volume_key_size)
        key = Secret(bytes(size.value))
        trouble = f"does not open by its token {number}"
        container._do(
            trouble, "crypt_keyslot_context_init_by_token", number, None, None, 0, None, ctypes.byref(context)
        )
        try:
            container._do(
                trouble, "crypt_volume_key_get_by_keyslot_context", ANY, _buffer(key), ctypes.byref(size), context
            )
        finally:
            _lib().crypt_keyslot_context_free(context)
        return key


def deactivate(name: str, deferred: bool = False) -> None:
    """Removes a mapping; with `deferred`, when its last user closes it. Raises DiskFailed ("busy", "not-active")."""
    flags = _DEFERRED if deferred else 0
    _do(name, "cannot be closed", "crypt_deactivate_by_name", None, name.encode(), flags)


def is_active(name: str) -> bool:
    """Whether device-mapper has a mapping of this name, of any kind. Raises DiskFailed."""
    if not os.path.exists("/sys/class/misc/device-mapper"):
        return False  # the driver is not even loaded
    _logged_errors.clear()
    status = _lib().crypt_status(None, name.encode())
    if status == _INVALID:
        raise DiskFailed(f"{name}: device-mapper does not say whether it is open{_error_text(name)}")
    return bool(status > _INACTIVE)


def active_uuid(name: str, root: str = "/") -> str | None:
    """The LUKS UUID of an active mapping; for a mapping of another kind its device-mapper UUID, or `unknown`.

    None if there is no mapping of this name. Raises DiskFailed.
    """
    if root == "/" and not is_active(name):
        return None
    found = devices.dm_uuid(name, root)
    if found is None:
        return None if root != "/" else "unknown"
    return devices.luks2_uuid(found) or found or "unknown"


def abandon(name: str) -> None:
    """Removes the mapping that a killed activation may have left, complete or not; at the latest when udev closes it.

    It does not wait and never raises; `is_active` says whether the mapping is gone. The udev cookie of the killed
    process stays: a semaphore that nobody waits for. Nothing says which one it was, and completing all cookies would
    release activations that are still running.
    """
    import fcntl

    try:
        control = os.open("/dev/mapper/control", os.O_RDWR | os.O_CLOEXEC)
    except OSError:
        return
    try:
        fcntl.ioctl(control, 0xC138FD04, _removal(name))  # DM_DEV_REMOVE
    except OSError:
        pass
    finally:
        os.close(control)


def _removal(name: str) -> bytes:
    """The request: struct dm_ioctl of linux/dm-ioctl.h, with DM_DEFERRED_REMOVE."""
    import struct

    version, size, flags = (4, 27, 0), 312, 1 << 17
    return struct.pack("=10IQ128s129s7s", *version, size, size, 0, 0, flags, 0, 0, 0, name.encode(), b"", b"")


def _copy_to_memory(device: str, copies: list[tuple[int, bytes]]) -> int:
    """A file in memory, as large as the disk, with these copies of its header. Raises DiskFailed."""
    return memory_file(device, disk_size(device), copies)


def memory_file(device: str, size: int, parts: list[tuple[int, bytes]]) -> int:
    """A file in memory with these parts, for libcryptsetup to read instead of the disk. Raises DiskFailed."""
    try:
        try:
            file = os.memfd_create("header", os.MFD_CLOEXEC | _MFD_NOEXEC_SEAL)
        except OSError as error:
            if error.errno != errno.EINVAL:
                raise
            file = os.memfd_create("header")
        try:
            os.ftruncate(file, size)
            for offset, copy in parts:
                os.pwrite(file, copy, offset)
        except BaseException:
            os.close(file)
            raise
    except OSError as error:
        raise DiskFailed(f"{device}: no memory for its header: {error.strerror}") from error
    return file


def disk_size(device: str) -> int:
    """Bytes of a block device or file. Raises DiskFailed."""
    try:
        disk = os.open(device, os.O_RDONLY | os.O_CLOEXEC)
        try:
            mode, size = os.fstat(disk).st_mode, os.lseek(disk, 0, os.SEEK_END)
        finally:
            os.close(disk)
    except OSError as error:
        raise DiskFailed(f"{device} cannot be read: {error.strerror}") from error
    if not (stat.S_ISBLK(mode) or stat.S_ISREG(mode)):
        raise DiskFailed(f"{device} is not a block device")
    return size


def _minimum() -> _Pbkdf:
    """PBKDF2 with KEYSLOT_ITERATIONS, without libcryptsetup's benchmark of one second."""
    return _Pbkdf(b"pbkdf2", b"sha256", 0, KEYSLOT_ITERATIONS, 0, 0, _NO_BENCHMARK)


def _buffer(secret: Secret) -> Any:
    """The secret's own memory, not a copy."""
    return (c_char * len(secret)).from_buffer(secret.value)


def sized(secret: Secret) -> tuple[Any, int]:
    return _buffer(secret), len(secret)


DESCRIPTORS = "/proc/self/fd/"
_only_reads = False
_loads_plugins = False

_logged_errors: list[str] = []
"""Errors of the call under way. One list is enough: the library is not thread-safe, nor is this module."""


def _log(level: int, message: bytes, _: object) -> None:
    if level == _LOG_ERROR and len(_logged_errors) < 4:
        _logged_errors.append(message.decode("utf-8", "replace").strip()[:200])


_log_callback = _LogCallback(_log)
_library: Any = None


def _lib() -> Any:
    """libcryptsetup, loaded once. It prints nothing and loads no token plugins: systemd's would call the TPM."""
    global _library
    if _library is None:
        try:
            library = ctypes.CDLL("libcryptsetup.so.12")
        except OSError as error:
            raise DiskFailed("libcryptsetup is not installed", hint="apt install libcryptsetup12") from error
        for name, arguments in _SIGNATURES.items():
            getattr(library, name).argtypes = arguments
        library.crypt_get_uuid.restype = c_char_p
        library.crypt_free.argtypes = (c_void_p,)
        library.crypt_free.restype = None
        library.crypt_set_log_callback.argtypes = (c_void_p, _LogCallback, c_void_p)
        library.crypt_set_log_callback.restype = None
        library.crypt_set_log_callback(None, _log_callback, None)
        library.crypt_keyslot_context_free.argtypes = (c_void_p,)
        library.crypt_keyslot_context_free.restype = None
        library.crypt_token_external_disable.argtypes = ()
        library.crypt_token_external_disable.restype = None
        if not _loads_plugins:
            library.crypt_token_external_disable()
        _library = library
    return _library


def _do(thing: str, trouble: str, function: str, *arguments: Any) -> int:
    """Calls libcryptsetup. Raises the error that a negative result stands for, with libcryptsetup's message.

    `thing` and `trouble` begin the message: "/dev/sda cannot be read".
    """
    _logged_errors.clear()
    result: int = getattr(_lib(), function)(*arguments)
    if result >= 0:
        return result
    if -result in _WRONG_KEY.get(function, ()):
        raise NotOurs(f"{thing} {trouble}{_error_text(thing)}")
    codes = {
        errno.EEXIST: "name-taken",
        errno.EBUSY: "busy",
        errno.ENODEV: "not-active",
        errno.ETXTBSY: "unmet-requirements",
    }
    raise DiskFailed(
        f"{thing} {trouble}{_error_text(thing) or ': ' + os.strerror(-result)}", code=codes.get(-result, "")
    )


def _error_text(thing: str) -> str:
    """ ": " and the errors that libcryptsetup logged in this call, or "". Only printable characters: they may quote a
    hostile header. `thing` replaces the name of a file in memory."""
    text = "; ".join(dict.fromkeys(_logged_errors))
    if DESCRIPTORS in text:
        text = " ".join(thing if each.startswith(DESCRIPTORS) else each for each in text.split(" "))
    return ": " + "".join(each if each.isprintable() else "?" for each in text) if text else ""
