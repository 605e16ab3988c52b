# SPDX-License-Identifier: Apache-2.0
"""What the TPM keeps for this host, as bytes: policy digests, the policy record, the sealed payload.

Structures and digests are those of the TCG "TPM 2.0 Library", part 2 (structures) and part 3 (PolicyPCR,
PolicyOR, PolicyAuthValue); integers are big-endian.
"""

import struct
from hashlib import sha256

from ..errors import Malformed, NewerFormat, Usage
from ..light import Iterable, Mapping, NamedTuple, Sequence
from ..secret import Secret

BANK = 0x000B
"""TPM_ALG_SHA256: the PCR bank and the name algorithm, everywhere."""
CAP_PCR = 15
CAP_DIGEST = sha256(b"unlock cap").digest()
"""What early boot extends the cap PCR with, right after the one unseal."""
CAPPED = sha256(bytes(32) + CAP_DIGEST).digest()
"""A cap PCR that only our cap has extended."""
UNSET = bytes(32)
"""PCRs 0 to 15 after a TPM reset."""
SRK = 0x81000001
"""The storage root key's persistent handle (TCG TPM v2.0 Provisioning Guidance)."""
RECORD_SIZE = 448
"""Below 512, the least NV buffer of a PC Client TPM: read and written by one command."""
MAX_BRANCHES = 8
MAX_SEALED = 128
PIN_MIN, PIN_MAX = 4, 256
"""Bytes of a PIN, any text: systemd-cryptenroll sets no least length, and a TPM that forgets one wrong try every two
hours takes two years for the 10,000 PINs of 4 digits; where its lockout has no password, it takes minutes."""


class Slot(NamedTuple):
    """A sealed object and the NV index that describes it, both in the owner's range of handles."""

    name: str
    object: int
    nv: int


A = Slot("A", 0x81104C41, 0x01814C41)
B = Slot("B", 0x81104C42, 0x01814C42)
SLOTS = (A, B)


def select(pcrs: Iterable[int], cap: int = CAP_PCR) -> tuple[int, ...]:
    """The PCR selection: sorted, with the cap PCR. Usage for PCRs that software can reset: 16 to 23."""
    selection = tuple(sorted({*pcrs, cap}))
    if problem := _selection_problem(selection, cap):
        raise Usage(problem, hint="choose from PCRs 0 to 15")
    return selection


def selection_bytes(selection: Iterable[int]) -> bytes:
    """TPML_PCR_SELECTION with one bank, sha256, and 24 PCRs."""
    return struct.pack(">IHB", 1, BANK, 3) + _bitmap(selection)


def pcr_policy(selection: Iterable[int], values: Mapping[int, bytes]) -> bytes:
    """The policyDigest after one PolicyPCR: `values` are 32 bytes by PCR number."""
    chosen = sorted(selection)
    composite = sha256(b"".join(values[pcr] for pcr in chosen)).digest()
    return sha256(bytes(32) + struct.pack(">I", 0x17F) + selection_bytes(chosen) + composite).digest()


def branch(selection: Iterable[int], values: Mapping[int, bytes], cap: int = CAP_PCR) -> bytes:
    """The policyDigest of one allowed state; the cap PCR counts as not extended, whatever `values` says."""
    return pcr_policy(select(selection, cap), {**values, cap: UNSET})


def alternatives(branches: Sequence[bytes]) -> tuple[bytes, ...]:
    """The digest list of PolicyOR, which takes 2 to 8: a single branch is listed twice."""
    if not 1 <= len(branches) <= MAX_BRANCHES:
        raise Usage(f"{len(branches)} PCR states: a policy holds 1 to {MAX_BRANCHES}")
    return (branches[0], branches[0]) if len(branches) == 1 else tuple(branches)


def either(branches: Sequence[bytes]) -> bytes:
    """The policyDigest after PolicyOR."""
    return sha256(bytes(32) + struct.pack(">I", 0x171) + b"".join(alternatives(branches))).digest()


def auth_policy(branches: Sequence[bytes], pin: bool = False) -> bytes:
    """The authPolicy of the sealed object: PolicyOR, and with a PIN PolicyAuthValue after it."""
    digest = either(branches)
    return sha256(digest + struct.pack(">I", 0x16B)).digest() if pin else digest


def pin_auth(host: bytes, pin: Secret) -> Secret:
    """The sealed object's authValue: SHA-256 of a label, the host id and the PIN. Usage for one too short or too long.

    No salt and no slow hash: the value never leaves the TPM, which counts the tries. The host id keeps one PIN on two
    hosts from being one value.
    """
    if not PIN_MIN <= len(pin) <= PIN_MAX:
        raise Usage(f"a PIN is {PIN_MIN} to {PIN_MAX} bytes long", "digits, letters or both")
    return Secret(sha256(b"unlock PIN\0" + host + pin.value).digest())


# Public areas -----------------------------------------------------------------------------------------------

_FIXED = 0x02 | 0x10  # fixedTPM, fixedParent
_NO_DA = 0x400
_STORAGE = _FIXED | 0x20 | 0x40 | _NO_DA | 0x10000 | 0x20000  # sensitiveDataOrigin, userWithAuth, restricted, decrypt
_SIGN = 0x40000
_NV = 0x02 | 0x20000 | 0x40000 | 0x02000000  # OWNERWRITE, OWNERREAD, AUTHREAD, NO_DA
_NV_WRITTEN = 0x20000000
_AES, _CFB, _NULL, _P256 = 0x06, 0x43, 0x10, 0x03
_RSA, _KEYEDHASH, _ECC = 0x01, 0x08, 0x23


def name(public: bytes) -> bytes:
    """The name of the object or NV index with this public area (part 1, "Names")."""
    return struct.pack(">H", BANK) + sha256(public).digest()


def srk_template() -> bytes:
    """TPMT_PUBLIC of the ECC P-256 SRK, as systemd makes it: the same key results."""
    return struct.pack(">HHIH HHHHHH HH", _ECC, BANK, _STORAGE, 0, _AES, 128, _CFB, _NULL, _P256, _NULL, 0, 0)


def sealed_template(branches: Sequence[bytes], pin: bool = False) -> bytes:
    """TPMT_PUBLIC of the sealed object: for this TPM only, opened by the policy only; with a PIN the TPM counts wrong
    tries and locks itself, without one it is outside the lockout."""
    attributes = _FIXED if pin else _FIXED | _NO_DA
    return struct.pack(">HHIH32sHH", _KEYEDHASH, BANK, attributes, 32, auth_policy(branches, pin), _NULL, 0)


def nv_public(slot: Slot, written: bool) -> bytes:
    """TPMS_NV_PUBLIC of a policy record: anyone reads it, the owner writes it."""
    return struct.pack(">IHIHH", slot.nv, BANK, _NV | (_NV_WRITTEN if written else 0), 0, RECORD_SIZE)


def is_sealed_under(public: bytes, branches: Sequence[bytes], pin: bool = False) -> bool:
    """Whether this TPMT_PUBLIC is `sealed_template(branches, pin)`, its unique field filled in."""
    template = sealed_template(branches, pin)
    return len(public) == len(template) + 32 and public.startswith(template[:-2])


def storage_problem(public: bytes) -> str:
    """Why this TPMT_PUBLIC is no SRK (RSA, or ECC P-256); empty if it is one."""
    try:
        kind, name_alg, attributes, policy_size = struct.unpack_from(">HHIH", public)
        symmetric, bits, mode, _scheme, detail = struct.unpack_from(">HHHHH", public, 10 + policy_size)
    except struct.error:
        return "its public area is cut short"
    if name_alg != BANK:
        return "its name is not a SHA-256"
    if attributes & _STORAGE != _STORAGE or attributes & _SIGN:
        return f"its attributes {attributes:#x} are not those of a storage root key"
    if symmetric != _AES or bits not in (128, 256) or mode != _CFB:
        return "it does not protect its children with AES-CFB"
    if not (kind == _RSA and detail >= 2048) and not (kind == _ECC and detail == _P256):
        return "it is neither RSA 2048 nor ECC P-256"
    return ""


# The policy record ------------------------------------------------------------------------------------------

_MAGIC = b"unlock\0"
_VERSION = 1
"""Of the sealed payload."""
RECORD_VERSION = 2
"""The newest that is read. Without a PIN version 1 is written: an initramfs of an earlier unlock reads that alone."""
_PIN = 0x01
_RECORD = struct.Struct(">7sBQ16sBB3sB2x34s34s256s")
_MAX_GENERATION = 1 << 63


class Record(NamedTuple):
    """The public part of the policy, in the NV index beside the sealed object.

    448 bytes: magic "unlock\\0", version u8, generation u64, host id 16, cap PCR u8, number of branches u8,
    PCR bitmap 3, flags u8, zero 2, SRK name 34, object name 34, eight branches of 32, zeros, and SHA-256 of all before
    it. Version 1 has no flags, version 2 has 0x01: the TPM asks for a PIN. The checksum finds torn writes; it
    authenticates nothing: a flag that does not fit the object's public area is found by `is_sealed_under`.
    """

    generation: int
    host: bytes
    selection: tuple[int, ...]
    cap: int
    branches: tuple[bytes, ...]
    srk_name: bytes
    object_name: bytes
    pin: bool = False

    @property
    def version(self) -> int:
        """Of the format that `encode` writes."""
        return 2 if self.pin else 1

    def encode(self) -> bytes:
        """RECORD_SIZE bytes; Malformed for what `decode` would refuse."""
        if problem := self._problem():
            raise Malformed(f"policy record: {problem}")
        body = _RECORD.pack(
            _MAGIC, self.version, self.generation, self.host, self.cap, len(self.branches),
            _bitmap(self.selection), _PIN if self.pin else 0, self.srk_name, self.object_name, b"".join(self.branches),
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
        _, version, generation, host, cap, count, bitmap, flags, srk_name, object_name, digests = _RECORD.unpack_from(
            body
        )
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
        return _selection_problem(self.selection, self.cap)


def _selection_problem(selection: tuple[int, ...], cap: int) -> str:
    if selection != tuple(sorted(set(selection))) or any(not 0 <= pcr < 24 for pcr in selection):
        return "the selection is not a sorted set of PCRs"
    if any(pcr >= 16 for pcr in selection):
        return "PCRs 16 to 23 can be reset by running software: they protect nothing"
    if not 1 <= cap <= 15 or cap not in selection:
        return "the cap PCR is not selected"
    return ""


def _bitmap(selection: Iterable[int]) -> bytes:
    return sum(1 << pcr for pcr in selection).to_bytes(3, "little")


# The sealed payload -----------------------------------------------------------------------------------------

_UNAUTHENTICATED_ROOT = 0x01


class Payload(NamedTuple):
    """What is sealed: version u8, flags u8, the persistence key of 32 bytes."""

    key: Secret
    unauthenticated_root: bool = False
    """The operator accepted by name that keys cross into a root file system that nothing authenticated."""

    def encode(self) -> Secret:
        if len(self.key) != 32:
            raise Malformed("sealed payload: the persistence key is not 32 bytes")
        data = Secret(bytes(34))
        data.value[:2] = _VERSION, _UNAUTHENTICATED_ROOT if self.unauthenticated_root else 0
        data.value[2:] = self.key.value
        return data

    @classmethod
    def decode(cls, data: Secret) -> "Payload":
        """Malformed, or NewerFormat for a later version or a flag that this one does not know."""
        value = data.value
        if len(value) > MAX_SEALED or len(value) < 2:
            raise Malformed("sealed payload: not one of ours")
        if value[0] > _VERSION or value[1] & ~_UNAUTHENTICATED_ROOT:
            raise NewerFormat("sealed payload: written by a newer version", hint="update unlock")
        if value[0] != _VERSION or len(value) != 34:
            raise Malformed("sealed payload: not one of ours")
        return cls(Secret(value[2:]), bool(value[1] & _UNAUTHENTICATED_ROOT))
