# SPDX-License-Identifier: Apache-2.0
"""The public areas of the TPM objects that unlock makes or relies on: SRK, sealed object, NV index of the record.

Their names, which the TPM computes as well, tell whether an object is the one that this host was enrolled with. The
structures are those of the TCG "TPM 2.0 Library", part 2; integers are big-endian.
"""

import struct
from hashlib import sha256

from ..light import Sequence
from . import pcr_policy
from .pcr_policy import BANK
from .record import RECORD_SIZE, Slot

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
    return struct.pack(">HHIH32sHH", _KEYEDHASH, BANK, attributes, 32, pcr_policy.auth_policy(branches, pin), _NULL, 0)


def nv_public(slot: Slot, written: bool) -> bytes:
    """TPMS_NV_PUBLIC of a policy record: anyone reads it, the owner writes it."""
    return struct.pack(">IHIHH", slot.nv, BANK, _NV | (_NV_WRITTEN if written else 0), 0, RECORD_SIZE)


def is_sealed_under(public: bytes, branches: Sequence[bytes], pin: bool = False) -> bool:
    """Whether this TPMT_PUBLIC is `sealed_template(branches, pin)`, its unique field filled in."""
    template = sealed_template(branches, pin)
    return len(public) == len(template) + 32 and public.startswith(template[:-2])


def srk_problem(public: bytes) -> str:
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
