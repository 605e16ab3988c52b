# SPDX-License-Identifier: Apache-2.0
"""What unlock stores in the TPM, as bytes: the two slots, the policy record in NV, and the sealed payload.

A slot is a sealed object and an NV index. The object releases the payload, the persistence key; the record in the index
says under which policy the object is sealed, so that early boot can satisfy it. docs/formats.md specifies both.
"""

import struct
from hashlib import sha256

from ..errors import Malformed, NewerFormat
from ..light import Iterable, NamedTuple
from ..secret import Secret
from .pcr_policy import BANK, MAX_BRANCHES, pcr_bitmap, selection_problem

SRK = 0x81000001
"""The storage root key's persistent handle (TCG TPM v2.0 Provisioning Guidance)."""
RECORD_SIZE = 448
"""Bytes. Below 512, the least NV buffer of a PC Client TPM: read and written by one command."""
MAX_SEALED = 128
"""Bytes that the TPM seals in one object."""
_PAYLOAD_SIZE = 2 + 32 + 1 + 48
_MAGIC = b"unlock\0"
RECORD_VERSION = 2
"""The newest that is read. Without a PIN version 1 is written: an initramfs of an earlier unlock reads that alone."""
_PIN = 0x01
_RECORD = struct.Struct(">7sBQ16sBB3sBBx34s34s256s48s")
_MAX_GENERATION = 1 << 63
_VERSION = 1
"""Of the sealed payload."""
_UNAUTHENTICATED_ROOT = 0x01
NEEDS_MAX = 12
"""Mappings that the root file system needs and that record and payload name, by 4 bytes each."""
_ALL = 0xFF


class Slot(NamedTuple):
    """A sealed object and the NV index that describes it, both in the owner's range of handles."""

    name: str
    object: int
    nv: int


A = Slot("A", 0x81104C41, 0x01814C41)
B = Slot("B", 0x81104C42, 0x01814C42)
SLOTS = (A, B)


class Needs(NamedTuple):
    """The mappings of this host's disks that its root file system lies on, so that early boot can tell a root disk
    whose token was taken away from one that unlock never had.

    49 bytes: number u8, and twelve times the first 4 bytes of SHA-256("unlock needs ", name), sorted, then zeros. The
    number 255 stands for more than twelve: every disk of the initramfs's crypttab is one of them. Short digests are
    enough: they are compared with names in that crypttab, which are not the attacker's to choose.
    """

    digests: tuple[bytes, ...] = ()
    every: bool = False

    @classmethod
    def of(cls, names: Iterable[str]) -> "Needs":
        digests = tuple(sorted({_digest(name) for name in names}))
        return cls((), True) if len(digests) > NEEDS_MAX else cls(digests)

    def covers(self, name: str) -> bool:
        """Whether the root file system needs the mapping of this name."""
        return self.every or _digest(name) in self.digests

    def __bool__(self) -> bool:
        return self.every or bool(self.digests)

    def encode(self) -> bytes:
        count = _ALL if self.every else len(self.digests)
        return bytes([count]) + b"".join(self.digests).ljust(4 * NEEDS_MAX, b"\0")

    @classmethod
    def decode(cls, data: bytes) -> "Needs":
        """Malformed for anything that `encode` did not write."""
        if len(data) != 1 + 4 * NEEDS_MAX:
            raise Malformed("what the root file system needs is not in its format")
        count = min(data[0], NEEDS_MAX)
        found = tuple(data[at : at + 4] for at in range(1, 1 + 4 * count, 4))
        needs = cls((), True) if data[0] == _ALL else cls(found)
        if needs.encode() != data or list(needs.digests) != sorted(set(needs.digests)):
            raise Malformed("what the root file system needs is not in its format")
        return needs


def _digest(name: str) -> bytes:
    return sha256(b"unlock needs " + name.encode()).digest()[:4]


class Record(NamedTuple):
    """The public part of the policy, in the NV index beside the sealed object.

    448 bytes: magic "unlock\\0", version u8, generation u64, host id 16, cap PCR u8, number of branches u8,
    PCR bitmap 3, flags u8, number of needs u8, zero 1, SRK name 34, object name 34, eight branches of 32, the rest of
    `Needs` 48, zeros, and SHA-256 of all before it. Version 1 has no flags, version 2 has 0x01: the TPM asks for a PIN.
    The checksum finds torn writes; it authenticates nothing: a flag that does not fit the object's public area is found
    by `is_sealed_under`, and needs that are not those of the sealed payload when that is unsealed.
    """

    generation: int
    host: bytes
    selection: tuple[int, ...]
    cap: int
    branches: tuple[bytes, ...]
    srk_name: bytes
    object_name: bytes
    pin: bool = False
    needs: Needs = Needs()

    @property
    def version(self) -> int:
        """Of the format that `encode` writes."""
        return 2 if self.pin else 1

    def encode(self) -> bytes:
        """RECORD_SIZE bytes; Malformed for what `decode` would refuse."""
        if problem := self._problem():
            raise Malformed(f"policy record: {problem}")
        needs = self.needs.encode()
        body = _RECORD.pack(
            _MAGIC, self.version, self.generation, self.host, self.cap, len(self.branches),
            pcr_bitmap(self.selection), _PIN if self.pin else 0, needs[0], self.srk_name, self.object_name,
            b"".join(self.branches), needs[1:],
        ).ljust(RECORD_SIZE - 32, b"\0")  # fmt: skip
        return body + sha256(body).digest()

    @classmethod
    def decode(cls, data: bytes) -> "Record":
        """Malformed, or NewerFormat, for anything that `encode` did not write."""
        body, checksum = data[:-32], data[-32:]
        if len(data) != RECORD_SIZE or not body.startswith(_MAGIC):
            raise Malformed("policy record: not one of ours")
        if sha256(body).digest() != checksum:
            raise Malformed("policy record: the checksum is wrong")
        fields = _RECORD.unpack_from(body)
        _, version, generation, host, cap, count, bitmap, flags, needed, srk_name, object_name, digests, needs = fields
        if version > RECORD_VERSION or (version == RECORD_VERSION and flags & ~_PIN):
            raise NewerFormat("policy record: written by a newer version", hint="update unlock")
        record = cls(
            generation,
            host,
            tuple(pcr for pcr in range(24) if bitmap[pcr // 8] >> pcr % 8 & 1),
            cap,
            tuple(digests[at : at + 32] for at in range(0, 32 * min(count, MAX_BRANCHES), 32)),
            srk_name,
            object_name,
            bool(flags & _PIN),
            Needs.decode(bytes([needed]) + needs),
        )
        if version != record.version or count > MAX_BRANCHES or record.encode() != data:
            raise Malformed("policy record: a field is out of its range")
        return record

    def _problem(self) -> str:
        if not 0 < self.generation <= _MAX_GENERATION:
            return "the generation is out of range"
        if len(self.host) != 16:
            return "the host id is not 16 bytes"
        if not 1 <= len(self.branches) <= MAX_BRANCHES or any(len(digest) != 32 for digest in self.branches):
            return f"not 1 to {MAX_BRANCHES} branches of 32 bytes"
        if any(len(n) != 34 or n[:2] != struct.pack(">H", BANK) for n in (self.srk_name, self.object_name)):
            return "a name is not a SHA-256 name"
        return selection_problem(self.selection, self.cap)


class Payload(NamedTuple):
    """What is sealed: version u8, flags u8, the persistence key of 32 bytes, `Needs` of 49."""

    key: Secret
    unauthenticated_root: bool = False
    """The operator accepted by name that keys cross into a root file system that nothing authenticated."""
    needs: Needs = Needs()

    def encode(self) -> Secret:
        if len(self.key) != 32:
            raise Malformed("sealed payload: the persistence key is not 32 bytes")
        data = Secret(bytes(_PAYLOAD_SIZE))
        data.value[:2] = _VERSION, _UNAUTHENTICATED_ROOT if self.unauthenticated_root else 0
        data.value[2:34] = self.key.value
        data.value[34:] = self.needs.encode()
        return data

    @classmethod
    def decode(cls, data: Secret) -> "Payload":
        """Malformed, or NewerFormat for a later version or a flag that this one does not know."""
        value = data.value
        if len(value) > MAX_SEALED or len(value) < 2:
            raise Malformed("sealed payload: not one of ours")
        if value[0] > _VERSION or value[1] & ~_UNAUTHENTICATED_ROOT:
            raise NewerFormat("sealed payload: written by a newer version", hint="update unlock")
        if value[0] != _VERSION or len(value) != _PAYLOAD_SIZE:
            raise Malformed("sealed payload: not one of ours")
        needs = Needs.decode(bytes(value[34:]))
        return cls(data.copy(2, 34), bool(value[1] & _UNAUTHENTICATED_ROOT), needs)
