# SPDX-License-Identifier: Apache-2.0
"""LUKS2 containers, through libcryptsetup by ctypes. The only file that knows of it.

One context is read once: what its own dump says is what is authenticated, and what activates. The library is
not thread-safe: activations in parallel go to forked processes, each with a context that its parent loaded.
The format: the LUKS2 On-Disk Format Specification 1.1; the calls: libcryptsetup.h of cryptsetup 2.6 to 2.7.
"""

import ctypes
import errno
import os
from ctypes import POINTER, c_char, c_char_p, c_int, c_size_t, c_uint32, c_void_p
from hashlib import sha256

from .. import strictjson
from ..errors import DiskFailed, Malformed, NotOurs, Tampered
from ..light import Any
from ..secret import Secret
from ..strictjson import canonical

ANY = -1
"""Any keyslot: each is tried in turn, which costs its PBKDF."""
MAX_HEADER = 256 << 10
"""Bytes of one copy of the metadata; the default is 16 KiB."""
MAX_METADATA = 1 << 20
"""Bytes of the library's own dump of it, which is indented."""
MAX_KEY = 512
"""Bytes; volume keys with integrity are longer than the 64 of aes-xts."""

_KEYSLOT_CIPHER = "aes-xts-plain64"
"""What the library encrypts a new keyslot with, or with the cipher of the data."""

_ALLOW_DISCARDS, _KEYRING_KEY = 1 << 3, 1 << 11  # crypt_activate_* flags
_DEFERRED = 1 << 0  # crypt_deactivate_by_name flag
_NO_BENCHMARK = 1 << 1  # pbkdf flag
_LOG_ERROR = 1
_INVALID, _INACTIVE = 0, 1  # crypt_status

_WRONG_KEY = {
    "crypt_volume_key_get": (errno.EPERM, errno.ENOENT),  # ENOENT: no keyslot that could be tried
    "crypt_activate_by_passphrase": (errno.EPERM, errno.ENOENT),
    "crypt_activate_by_volume_key": (errno.EPERM,),
    "crypt_volume_key_verify": (errno.EPERM,),
    "crypt_keyslot_add_by_volume_key": (errno.EPERM,),
}
"""What means that the key is another one, by call."""

_LogCallback = ctypes.CFUNCTYPE(None, c_int, c_char_p, c_void_p)
_SIGNATURES: dict[str, tuple[Any, ...]] = {
    "crypt_init": (POINTER(c_void_p), c_char_p),
    "crypt_load": (c_void_p, c_char_p, c_void_p),
    "crypt_format": (
        c_void_p, c_char_p, c_char_p, c_char_p, c_char_p, POINTER(c_char), c_size_t, c_void_p,
    ),
    "crypt_set_pbkdf_type": (c_void_p, c_void_p),
    "crypt_dump_json": (c_void_p, POINTER(c_char_p), c_uint32),
    "crypt_token_json_set": (c_void_p, c_int, c_char_p),
    "crypt_volume_key_get": (c_void_p, c_int, POINTER(c_char), POINTER(c_size_t), POINTER(c_char), c_size_t),
    "crypt_volume_key_verify": (c_void_p, POINTER(c_char), c_size_t),
    "crypt_keyslot_add_by_volume_key": (
        c_void_p, c_int, POINTER(c_char), c_size_t, POINTER(c_char), c_size_t,
    ),
    "crypt_keyslot_destroy": (c_void_p, c_int),
    "crypt_activate_by_passphrase": (c_void_p, c_char_p, c_int, POINTER(c_char), c_size_t, c_uint32),
    "crypt_activate_by_volume_key": (c_void_p, c_char_p, POINTER(c_char), c_size_t, c_uint32),
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


class _Luks2(ctypes.Structure):
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


class Header:
    """What the header of one LUKS2 disk says: its UUID and metadata, of one reading. Raises Malformed."""

    def __init__(self, device: str, uuid: str, dump: bytes) -> None:
        self.device = device
        self._uuid, self._metadata = uuid, parse(dump, device)

    @property
    def uuid(self) -> str:
        """The LUKS UUID."""
        return self._uuid

    @property
    def metadata(self) -> dict[str, Any]:
        """The metadata as JSON."""
        return self._metadata

    def volume_key(self, passphrase: Secret, slot: int = ANY) -> Secret:
        """The volume key, out of a keyslot. Raises NotOurs if the passphrase opens none."""
        raise NotImplementedError

    @property
    def requirements(self) -> Any:
        """What the header says that a program must understand: a re-encryption that is not finished, mostly; None or
        empty else. Raises Malformed."""
        return _object(self.metadata, "config", self.device).get("requirements")

    def tokens(self, kind: str) -> list[tuple[int, dict[str, Any]]]:
        """(number, object) of each token of a type, in order. Raises Malformed."""
        return [
            (number, fields)
            for number, fields in _numbered(self.metadata, "tokens", self.device)
            if isinstance(fields, dict) and fields.get("type") == kind
        ]

    def keyslots(self) -> list[int]:
        """Numbers of the keyslots in use. Raises Malformed."""
        return [number for number, _ in _numbered(self.metadata, "keyslots", self.device)]

    def salt(self, slot: int) -> str:
        """The salt of a keyslot's PBKDF, as in the header: random, so no other keyslot has it. Raises Malformed."""
        for number, fields in _numbered(self.metadata, "keyslots", self.device):
            if number == slot:
                return str(fields["kdf"]["salt"])
        raise Malformed(f"{self.device} has no keyslot {slot}")

    def cheap_keyslots(self) -> list[int]:
        """Keyslots that cost next to nothing to try: what `add_keyslot` makes, for the key of the data alone.

        An operator's Argon2 slot, or what a hostile header asks for, could take all memory or hours: in the
        keyslot's own PBKDF, in that of another digest it is bound to, in a cipher that needs a mapping. Raises
        Malformed, Tampered.
        """
        facts, metadata = self.facts(), self.metadata
        ciphers = {_KEYSLOT_CIPHER, *(segment.get("encryption") for segment in facts["segments"].values())}
        slots = _digest(metadata, self.device)["keyslots"]
        return [
            number
            for number, fields in _numbered(metadata, "keyslots", self.device)
            if str(number) in slots
            and fields["type"] == "luks2"
            and fields["kdf"]["type"] == "pbkdf2"
            and fields["kdf"]["iterations"] == _minimum().iterations
            and fields["area"]["encryption"] in ciphers
        ]

    def facts(self) -> dict[str, Any]:
        """What an attacker would change: everything that decides how the data is read and which key reads it.

        `digest` is the one that covers the data, without its list of keyslots, so that a new keyslot changes
        no fact. Raises Malformed unless exactly one digest covers every segment (two do while the disk is
        being re-encrypted), Tampered for a keyslot that any passphrase opens.
        """
        metadata = self.metadata
        digest, config = _digest(metadata, self.device), _object(metadata, "config", self.device)
        for number, fields in _numbered(metadata, "keyslots", self.device):
            if "null" in fields["area"].get("encryption", ""):
                hint = f"cryptsetup luksKillSlot {self.device} {number}"
                raise Tampered(f"{self.device}: keyslot {number} is not encrypted", hint)
        return {
            "uuid": self.uuid,
            "segments": _object(metadata, "segments", self.device),
            "requirements": config.get("requirements"),
            "flags": config.get("flags"),
            "digest": {name: value for name, value in digest.items() if name != "keyslots"},
        }


class Container(Header):
    """One LUKS2 disk or image file, its header read and validated by libcryptsetup.

    Raises NotOurs if there is no LUKS2 header, Malformed if both copies are ruined, DiskFailed if it cannot
    be read. One ruined copy is repaired from the other, as cryptsetup does. Close it, or use `with`.
    A forked child may use it, but two processes never at once: they share the file offset of its device.
    """

    def __init__(self, device: str) -> None:
        self.device = device
        self._cd = c_void_p()
        _do(device, "cannot be used", "crypt_init", ctypes.byref(self._cd), os.fsencode(device))
        try:
            self._load()
        except BaseException:
            self.close()
            raise

    def _load(self) -> None:
        _said.clear()
        _check_size(self.device)
        result = _lib().crypt_load(self._cd, b"LUKS2", None)
        if result == 0:
            return
        said = _words()
        version = _luks_version(self.device)
        if version == 0:
            raise NotOurs(f"{self.device} is not LUKS2", code="not-luks2")
        if version == 1:
            hint = f"cryptsetup convert --type luks2 {self.device}"
            raise NotOurs(f"{self.device} is LUKS1", hint=hint, code="not-luks2")
        if result != -errno.EINVAL or "lock" in said:
            raise DiskFailed(f"{self.device} cannot be read{said or ': ' + os.strerror(-result)}")
        hint = f"cryptsetup luksHeaderRestore {self.device} --header-backup-file FILE"
        raise Malformed(f"{self.device}: the LUKS2 header is ruined", hint=hint)

    def close(self) -> None:
        """Frees the context; safe to call twice."""
        if self._cd:
            _lib().crypt_free(self._cd)
            self._cd = c_void_p()

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
    def metadata(self) -> dict[str, Any]:
        """The JSON of this context, never read anew from the disk. Raises Malformed."""
        return parse(self.dump(), self.device)

    def dump(self) -> bytes:
        """The metadata of this context as the library writes it, never read anew from the disk."""
        text = c_char_p()
        self._do("has no readable metadata", "crypt_dump_json", ctypes.byref(text), 0)
        return text.value or b""

    # Tokens

    def set_token(self, fields: dict[str, Any], number: int | None = None) -> int:
        """Writes a token (`keyslots` may be left out), durable on return; gives its number.

        Raises DiskFailed, also when the header has no room.
        """
        text = canonical({"keyslots": [], **fields})
        return self._do("cannot take the token", "crypt_token_json_set", ANY if number is None else number, text)

    def remove_token(self, number: int) -> None:
        """Durable on return, also if there was none of that number. Raises DiskFailed."""
        self._do(f"cannot remove token {number}", "crypt_token_json_set", number, None)

    # Keys

    def volume_key(self, passphrase: Secret, slot: int = ANY) -> Secret:
        if slot != ANY and slot not in self.keyslots():
            raise NotOurs(f"{self.device} has no keyslot {slot}")
        size = c_size_t(max(_lib().crypt_get_volume_key_size(self._cd), 0) or MAX_KEY)
        key = Secret(bytes(size.value))
        try:
            self._do(
                "does not open with this passphrase", "crypt_volume_key_get",
                slot, _buffer(key), ctypes.byref(size), *_sized(passphrase),
            )  # fmt: skip
            if size.value == len(key):
                return key
            with key:
                return Secret(key.value[: size.value])
        except BaseException:
            key.wipe()
            raise

    def verify_volume_key(self, volume_key: Secret) -> None:
        """Raises NotOurs unless this is the key of the header's digest."""
        self._do("has another volume key", "crypt_volume_key_verify", *_sized(volume_key))

    def test_passphrase(self, passphrase: Secret, slot: int = ANY) -> int:
        """The keyslot that it opens; nothing is activated. Raises NotOurs if none."""
        return self._do(
            "does not open with this passphrase", "crypt_activate_by_passphrase",
            None, slot, *_sized(passphrase), 0,
        )  # fmt: skip

    def add_keyslot(self, volume_key: Secret, passphrase: Secret, slot: int = ANY) -> int:
        """A keyslot with PBKDF2 at its minimum: for a `passphrase` of full strength, not for a password.

        Gives its number. Raises NotOurs for another volume key, DiskFailed.
        """
        self._minimal_pbkdf()
        return self._do(
            "cannot take a keyslot", "crypt_keyslot_add_by_volume_key",
            slot, *_sized(volume_key), *_sized(passphrase),
        )  # fmt: skip

    def remove_keyslot(self, slot: int) -> None:
        """Overwrites a keyslot and its place in the header. Raises DiskFailed."""
        self._do(f"cannot remove keyslot {slot}", "crypt_keyslot_destroy", slot)

    # Mappings

    def activate(self, name: str, volume_key: Secret, allow_discards: bool = False) -> None:
        """/dev/mapper/NAME by volume key, which goes to the kernel's keyring, never into the table.

        The header's persistent flags apply. Raises NotOurs for another key, DiskFailed ("name-taken" if NAME
        is active already: a mapping is never replaced).
        """
        flags = _KEYRING_KEY | (_ALLOW_DISCARDS if allow_discards else 0)
        self._do(
            f"cannot be opened as {name}", "crypt_activate_by_volume_key",
            name.encode(), *_sized(volume_key), flags,
        )  # fmt: skip

    def activate_by_passphrase(
        self, name: str, passphrase: Secret, slot: int = ANY, allow_discards: bool = False
    ) -> int:
        """The same by passphrase; gives the keyslot. Raises NotOurs if the passphrase opens none."""
        flags = _KEYRING_KEY | (_ALLOW_DISCARDS if allow_discards else 0)
        return self._do(
            f"cannot be opened as {name}", "crypt_activate_by_passphrase",
            name.encode(), slot, *_sized(passphrase), flags,
        )  # fmt: skip

    def _minimal_pbkdf(self) -> None:
        self._do("cannot use PBKDF2", "crypt_set_pbkdf_type", ctypes.byref(_minimum()))

    def _do(self, trouble: str, function: str, *arguments: Any) -> int:
        if not self._cd:
            raise ValueError("the container is closed")
        return _do(self.device, trouble, function, self._cd, *arguments)


def format(device: str, volume_key: Secret, uuid: str | None = None, label: str = "") -> Container:
    """A new LUKS2 header over whatever is there: aes-xts-plain64 with this key (64 random bytes), no keyslot.

    The key's digest has 1,000 PBKDF2 iterations, not the usual 125 ms of them: the key is random, and every
    activation checks it. Gives the container as read back from the disk. Raises DiskFailed.
    """
    context = c_void_p()
    _do(device, "cannot be used", "crypt_init", ctypes.byref(context), os.fsencode(device))
    try:
        pbkdf = _minimum()
        parameters = _Luks2(ctypes.pointer(pbkdf), label=label.encode())
        _do(device, "cannot be formatted", "crypt_set_pbkdf_type", context, ctypes.byref(pbkdf))
        _do(
            device, "cannot be formatted", "crypt_format",
            context, b"LUKS2", b"aes", b"xts-plain64", uuid.encode() if uuid else None,
            *_sized(volume_key), ctypes.byref(parameters),
        )  # fmt: skip
    finally:
        _lib().crypt_free(context)
    return Container(device)


def prepare() -> None:
    """Loads the library and its cryptography, so that forked processes need not. Raises DiskFailed."""
    if _library is None:
        context = c_void_p()
        _do("libcryptsetup", "cannot be used", "crypt_init", ctypes.byref(context), None)
        _lib().crypt_set_pbkdf_type(context, ctypes.byref(_minimum()))  # the first call that needs a hash
        _lib().crypt_free(context)


def deactivate(name: str, deferred: bool = False) -> None:
    """Removes a mapping; `deferred`: when its last user closes it. DiskFailed: "busy", "not-active"."""
    flags = _DEFERRED if deferred else 0
    _do(name, "cannot be closed", "crypt_deactivate_by_name", None, name.encode(), flags)


def is_active(name: str) -> bool:
    """Whether device-mapper has a mapping of this name, of any kind. Raises DiskFailed."""
    if not os.path.exists("/sys/class/misc/device-mapper"):
        return False  # the driver is not even loaded
    _said.clear()
    status = _lib().crypt_status(None, name.encode())
    if status == _INVALID:
        raise DiskFailed(f"{name}: device-mapper does not say whether it is open{_words()}")
    return bool(status > _INACTIVE)


def active_uuid(name: str, root: str = "/") -> str | None:
    """The LUKS UUID of an active mapping, or device-mapper's own words if it is of another kind.

    None if there is no mapping of this name. Raises DiskFailed.
    """
    if root == "/" and not is_active(name):
        return None
    blocks = os.path.join(root, "sys/block")
    for block in os.listdir(blocks):
        if block.startswith("dm-") and _line(f"{blocks}/{block}/dm/name") == name:
            kind = _line(f"{blocks}/{block}/dm/uuid")
            digits = kind.removeprefix("CRYPT-LUKS2-")[:32]
            if digits == kind[:32] or len(digits) != 32:
                return kind or "unknown"
            return "-".join((digits[:8], digits[8:12], digits[12:16], digits[16:20], digits[20:]))
    return None if root != "/" else "unknown"


def abandon(name: str) -> None:
    """Removes the mapping that a killed activation may have left, complete or not; at the latest when udev
    closes it. Waits for nobody and never raises: `is_active` tells.

    The udev cookie of the killed process stays, a semaphore that nobody waits for: which one it was cannot be
    told, and completing all of them would release activations that are not done.
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
    """struct dm_ioctl of linux/dm-ioctl.h, with DM_DEFERRED_REMOVE."""
    import struct

    version, size, flags = (4, 27, 0), 312, 1 << 17
    return struct.pack("=10IQ128s129s7s", *version, size, size, 0, 0, flags, 0, 0, 0, name.encode(), b"", b"")


def parse(text: bytes, device: str) -> dict[str, Any]:
    """LUKS2 metadata, strictly and bounded. Raises Malformed."""
    if len(text) > MAX_METADATA:
        raise Malformed(f"{device}: the LUKS2 metadata is too large")
    try:
        metadata = strictjson.parse(text.decode())
    except (ValueError, RecursionError) as error:
        raise Malformed(f"{device}: the LUKS2 metadata is not proper JSON") from error
    if not isinstance(metadata, dict):
        raise Malformed(f"{device}: the LUKS2 metadata is not an object")
    return metadata


def _object(metadata: dict[str, Any], name: str, device: str) -> dict[str, Any]:
    found = metadata.get(name)
    if not isinstance(found, dict):
        raise Malformed(f"{device}: the LUKS2 metadata has no {name}")
    return found


def _numbered(metadata: dict[str, Any], name: str, device: str) -> list[tuple[int, Any]]:
    found = _object(metadata, name, device)
    if not all(number.isdecimal() and len(number) < 5 for number in found):
        raise Malformed(f"{device}: the LUKS2 metadata has {name} without a number")
    return sorted(((int(number), fields) for number, fields in found.items()), key=lambda each: each[0])


def _digest(metadata: dict[str, Any], device: str) -> dict[str, Any]:
    """The one digest that covers all of the data. Raises Malformed."""
    segments = _object(metadata, "segments", device)
    digests: list[dict[str, Any]] = [each for _, each in _numbered(metadata, "digests", device) if each["segments"]]
    if not segments or len(digests) != 1 or canonical(digests[0]["segments"]) != canonical(sorted(segments)):
        raise Malformed(f"{device}: not exactly one digest covers all of the data")
    return digests[0]


def _line(path: str) -> str:
    try:
        with open(path, encoding="utf-8", errors="replace") as file:
            return file.read().strip()
    except OSError:
        return ""


_COPIES = (0, *(0x4000 << shift for shift in range(9)))
"""Where the first copy of the header is, and where the second may be."""


def _check_size(device: str) -> None:
    """libcryptsetup takes 80 bytes of memory for each byte of JSON: a header larger than any that has a use is not
    given to it. It looks for a second copy until it finds a whole one. Raises Malformed, DiskFailed."""
    try:
        file = os.open(device, os.O_RDONLY | os.O_CLOEXEC)
        try:
            for offset in _COPIES:
                head = os.pread(file, 4096, offset)
                size = int.from_bytes(head[8:16], "big")
                if head[:8] != _magic(offset) + b"\0\2":
                    continue
                if size > MAX_HEADER:
                    raise Malformed(f"{device}: the LUKS2 header claims more than {MAX_HEADER} bytes")
                if _is_whole(head + os.pread(file, max(0, size - 4096), offset + 4096)):
                    return
        finally:
            os.close(file)
    except OSError as error:
        raise DiskFailed(f"{device} cannot be read: {error.strerror}") from error


def _is_whole(copy: bytes) -> bool:
    return copy[448:480] == sha256(copy[:448] + bytes(64) + copy[512:]).digest()


def _magic(offset: int) -> bytes:
    return b"SKUL\xba\xbe" if offset else b"LUKS\xba\xbe"


def _luks_version(device: str) -> int:
    """2, 1, or 0 for no LUKS: only to say why the library refused. Raises DiskFailed."""
    try:
        with open(device, "rb", buffering=0) as file:
            for offset in _COPIES:
                found = os.pread(file.fileno(), 8, offset)
                if found[:6] == _magic(offset):
                    return 1 if found[6:] == b"\0\1" else 2
    except OSError as error:
        raise DiskFailed(f"{device} cannot be read: {error.strerror}") from error
    return 0


def _minimum() -> _Pbkdf:
    """1,000 iterations, the least that libcryptsetup takes, without its second of benchmark."""
    return _Pbkdf(b"pbkdf2", b"sha256", 0, 1000, 0, 0, _NO_BENCHMARK)


def _buffer(secret: Secret) -> Any:
    """The secret's own memory, not a copy."""
    return (c_char * len(secret)).from_buffer(secret.value)


def _sized(secret: Secret) -> tuple[Any, int]:
    return _buffer(secret), len(secret)


_said: list[str] = []
"""Errors of the call under way. One list is enough: the library is not thread-safe, nor is this module."""


def _listen(level: int, message: bytes, _: object) -> None:
    if level == _LOG_ERROR and len(_said) < 4:
        _said.append(message.decode("utf-8", "replace").strip()[:200])


_listener = _LogCallback(_listen)
_library: Any = None


def _lib() -> Any:
    """libcryptsetup, loaded once: quiet, and never trying tokens of others (systemd's would call the TPM)."""
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
        library.crypt_set_log_callback(None, _listener, None)
        library.crypt_token_external_disable.argtypes = ()
        library.crypt_token_external_disable.restype = None
        library.crypt_token_external_disable()
        _library = library
    return _library


def _do(thing: str, trouble: str, function: str, *arguments: Any) -> int:
    """Calls the library; raises what a negative result means, in the library's words."""
    _said.clear()
    result: int = getattr(_lib(), function)(*arguments)
    if result >= 0:
        return result
    if -result in _WRONG_KEY.get(function, ()):
        raise NotOurs(f"{thing} {trouble}{_words()}")
    codes = {
        errno.EEXIST: "name-taken",
        errno.EBUSY: "busy",
        errno.ENODEV: "not-active",
        errno.ETXTBSY: "reencrypting",
    }
    raise DiskFailed(f"{thing} {trouble}{_words() or ': ' + os.strerror(-result)}", code=codes.get(-result, ""))


def _words() -> str:
    """The library's words, fit for a terminal: a header's strings may be in them."""
    said = "; ".join(dict.fromkeys(_said))
    return ": " + "".join(each if each.isprintable() else "?" for each in said) if said else ""
