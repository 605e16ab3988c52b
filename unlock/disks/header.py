# SPDX-License-Identifier: Apache-2.0
"""The header of a LUKS2 disk: parses its JSON, checks it, and gives the facts that the keys are bound to.

Pure Python: `luks.Container` gets the JSON from libcryptsetup, `boot.worker` from the process that read the disk, and
both are a `Header`. What decides whether libcryptsetup may see a header at all is read here from the disk itself.
The format: the LUKS2 On-Disk Format Specification 1.1.
"""

import os
from hashlib import sha256

from .. import strictjson
from ..errors import DiskFailed, Malformed, Tampered
from ..light import Any
from ..secret import Secret
from ..strictjson import canonical

ANY = -1
"""Any keyslot: each is tried in turn, which costs its PBKDF."""
MAX_HEADER = 4 << 20
"""Bytes of one copy of the header, the most that LUKS2 has; the default is 16 KiB."""
MAX_TEXT = 252 << 10
"""Bytes of the JSON in it: libcryptsetup takes 80 bytes of memory for each."""
MAX_METADATA = 1 << 20
"""Bytes of the metadata as libcryptsetup prints it, with indents."""
KEYSLOT_ITERATIONS = 1000
"""Of PBKDF2 in a keyslot that `luks.Container.add_keyslot` makes: the least that libcryptsetup takes."""

REENCRYPTION = "online-reencrypt"
"""In the name of the requirement that a header has while its disk is re-encrypted."""

_KEYSLOT_CIPHER = "aes-xts-plain64"
"""libcryptsetup encrypts a new keyslot with this, or with the cipher of the data."""
_COPIES = (0, *(0x4000 << shift for shift in range(9)))
"""Offsets at which the first copy of the header is, and the second may be."""


class Header:
    """UUID and metadata of one LUKS2 disk, from one reading of the header.

    Each member raises Malformed for metadata that is not as the specification says.
    """

    def __init__(self, device: str, uuid: str, dump: bytes) -> None:
        self.device = device
        self._uuid, self._metadata = uuid, parse_metadata(dump, device)

    @property
    def uuid(self) -> str:
        """The LUKS UUID."""
        return self._uuid

    @property
    def metadata(self) -> dict[str, Any]:
        """The metadata as JSON."""
        return self._metadata

    def volume_key(self, passphrase: Secret, slot: int = ANY) -> Secret:
        """The volume key from a keyslot. Raises NotOurs if the passphrase opens none."""
        raise NotImplementedError

    @property
    def requirements(self) -> Any:
        """The features that a program must support to use this disk, mostly an unfinished re-encryption; else None or
        empty. Raises Malformed."""
        return _get_object(self.metadata, "config", self.device).get("requirements")

    def tokens(self, kind: str) -> list[tuple[int, dict[str, Any]]]:
        """(number, object) of each token of a type, in order. Raises Malformed."""
        return [
            (number, fields)
            for number, fields in _get_numbered(self.metadata, "tokens", self.device)
            if isinstance(fields, dict) and fields.get("type") == kind
        ]

    def keyslots(self) -> list[int]:
        """Numbers of the keyslots in use. Raises Malformed."""
        return [number for number, _ in _get_numbered(self.metadata, "keyslots", self.device)]

    def salt(self, slot: int) -> str:
        """The salt of a keyslot's PBKDF, base64. It is random, so it identifies the keyslot. Raises Malformed."""
        for number, fields in _get_numbered(self.metadata, "keyslots", self.device):
            if number == slot:
                return str(fields["kdf"]["salt"])
        raise Malformed(f"{self.device} has no keyslot {slot}")

    def cheap_keyslots(self) -> list[int]:
        """Keyslots as `luks.Container.add_keyslot` makes them, for the volume key of the data: trying one costs little.

        An operator's Argon2 keyslot, or one of a hostile header, could take all memory or hours: in its own PBKDF, in
        that of another digest that it is bound to, or in a cipher that needs a mapping. Raises Malformed, Tampered.
        """
        self.facts()
        return self.cheap_keyslots_of(_data_digest(self.metadata, self.device))

    def cheap_keyslots_of(self, digest: dict[str, Any]) -> list[int]:
        """The same for the volume key of one digest of this header, which the caller has checked."""
        metadata = self.metadata
        ciphers = {_KEYSLOT_CIPHER, *(segment.get("encryption") for segment in metadata["segments"].values())}
        return [
            number
            for number, fields in _get_numbered(metadata, "keyslots", self.device)
            if str(number) in digest["keyslots"]
            and fields["type"] == "luks2"
            and fields["kdf"]["type"] == "pbkdf2"
            and fields["kdf"]["iterations"] == KEYSLOT_ITERATIONS
            and fields["area"]["encryption"] in ciphers
        ]

    def facts(self) -> dict[str, Any]:
        """Everything in the header that decides how the data is read and by which key; the token's MACs bind it.

        `digest` is the one that covers the data, without its list of keyslots: a new keyslot changes no fact.
        Raises Malformed unless exactly one digest covers every segment (two do while the disk is being
        re-encrypted), Tampered for a keyslot that any passphrase opens.
        """
        metadata = self.metadata
        digest, config = _data_digest(metadata, self.device), _get_object(metadata, "config", self.device)
        self.refuse_open_keyslots()
        return {
            "uuid": self.uuid,
            "segments": _get_object(metadata, "segments", self.device),
            "requirements": config.get("requirements"),
            "flags": config.get("flags"),
            "digest": {name: value for name, value in digest.items() if name != "keyslots"},
        }

    def refuse_open_keyslots(self) -> None:
        """Raises Tampered for a keyslot that any passphrase opens."""
        for number, fields in _get_numbered(self.metadata, "keyslots", self.device):
            if "null" in fields["area"].get("encryption", ""):
                hint = f"cryptsetup luksKillSlot {self.device} {number}"
                raise Tampered(f"{self.device}: keyslot {number} is not encrypted", hint)


def parse_metadata(text: bytes, device: str) -> dict[str, Any]:
    """Parses LUKS2 metadata of at most MAX_METADATA bytes. Raises Malformed."""
    if len(text) > MAX_METADATA:
        raise Malformed(f"{device}: the LUKS2 metadata is too large")
    try:
        metadata = strictjson.parse(text.decode())
    except (ValueError, RecursionError) as error:
        raise Malformed(f"{device}: the LUKS2 metadata is not proper JSON") from error
    if not isinstance(metadata, dict):
        raise Malformed(f"{device}: the LUKS2 metadata is not an object")
    return metadata


def _get_object(metadata: dict[str, Any], name: str, device: str) -> dict[str, Any]:
    found = metadata.get(name)
    if not isinstance(found, dict):
        raise Malformed(f"{device}: the LUKS2 metadata has no {name}")
    return found


def _get_numbered(metadata: dict[str, Any], name: str, device: str) -> list[tuple[int, Any]]:
    found = _get_object(metadata, name, device)
    if not all(number.isdecimal() and len(number) < 5 for number in found):
        raise Malformed(f"{device}: the LUKS2 metadata has {name} without a number")
    return sorted(((int(number), fields) for number, fields in found.items()), key=lambda each: each[0])


def _data_digest(metadata: dict[str, Any], device: str) -> dict[str, Any]:
    """The one digest that covers all of the data. Raises Malformed."""
    segments = _get_object(metadata, "segments", device)
    digests: list[dict[str, Any]] = [each for _, each in _get_numbered(metadata, "digests", device) if each["segments"]]
    if not segments or len(digests) != 1 or canonical(digests[0]["segments"]) != canonical(sorted(segments)):
        if REENCRYPTION in str(_get_object(metadata, "config", device).get("requirements")):
            tokens = _get_object(metadata, "tokens", device).values()
            ours = any(isinstance(fields, dict) and fields.get("reencrypt") for fields in tokens)
            hint = "unlock operation resume" if ours else f"cryptsetup reencrypt --resume-only {device}"
            raise Malformed(f"{device}: its header says that it is being re-encrypted", hint)
        raise Malformed(f"{device}: not exactly one digest covers all of the data")
    return digests[0]


def read_copies(device: str, *, every: bool) -> list[tuple[int, bytes]]:
    """(offset, content) of the copies of the header: those that libcryptsetup needs, or `every` one.

    A copy after one with a valid checksum has the same size, so it need not be read where that bounds its JSON.
    Raises Malformed for more than MAX_HEADER bytes, or MAX_TEXT bytes of JSON; DiskFailed if the disk cannot be read.
    """
    found: list[tuple[int, bytes]] = []
    try:
        file = os.open(device, os.O_RDONLY | os.O_CLOEXEC)
        try:
            forget_cached(file)
            for offset in _COPIES:
                copy = os.pread(file, 4096, offset)
                size = int.from_bytes(copy[8:16], "big")
                if copy[:8] != _magic(offset) + b"\0\2":
                    continue
                if size > MAX_HEADER:
                    raise Malformed(f"{device}: the LUKS2 header claims more than {MAX_HEADER} bytes")
                copy += os.pread(file, max(0, size - 4096), offset + 4096)
                found.append((offset, copy))
                if size <= 4096 + MAX_TEXT:
                    if not every and has_valid_checksum(copy):
                        break
                elif copy.find(b"\0", 4096, 4096 + MAX_TEXT + 1) < 0:
                    raise Malformed(f"{device}: the LUKS2 header has more than {MAX_TEXT} bytes of JSON")
        finally:
            os.close(file)
    except OSError as error:
        raise DiskFailed(f"{device} cannot be read: {error.strerror}") from error
    return found


def forget_cached(file: int) -> None:
    """What is read next comes from the disk. libcryptsetup writes past the page cache, which may keep what was there
    before, when another process reads at that moment."""
    os.posix_fadvise(file, 0, 0, os.POSIX_FADV_DONTNEED)


def are_whole(copies: list[tuple[int, bytes]]) -> bool:
    """Whether both copies of a header are there, and of the same write."""
    valid = [copy for _, copy in copies if has_valid_checksum(copy)]
    return len(valid) > 1 and valid[0][16:24] == valid[1][16:24] and valid[0][4096:] == valid[1][4096:]


def has_valid_checksum(copy: bytes) -> bool:
    return copy[448:480] == sha256(copy[:448] + bytes(64) + copy[512:]).digest()


def _magic(offset: int) -> bytes:
    return b"SKUL\xba\xbe" if offset else b"LUKS\xba\xbe"


def read_luks_version(device: str) -> int:
    """2, 1, or 0 for no LUKS: for the message when libcryptsetup refuses the disk. Raises DiskFailed."""
    try:
        with open(device, "rb", buffering=0) as file:
            for offset in _COPIES:
                found = os.pread(file.fileno(), 8, offset)
                if found[:6] == _magic(offset):
                    return 1 if found[6:] == b"\0\1" else 2
    except OSError as error:
        raise DiskFailed(f"{device} cannot be read: {error.strerror}") from error
    return 0
