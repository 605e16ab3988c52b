# SPDX-License-Identifier: Apache-2.0
"""Computes the policy digests under which the TPM releases the persistence key.

Each PCR state that may boot is one branch: the digest of a PolicyPCR over the selected PCRs. PolicyOR joins the
branches; with a PIN, PolicyAuthValue follows. The digests are those of the TCG "TPM 2.0 Library", part 3; integers are
big-endian. Early boot checks the TPM against them, and every change of the policy seals to them.
"""

import struct
from hashlib import sha256

from ..errors import Usage
from ..light import Iterable, Mapping, Sequence
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
NOTED = tuple(range(CAP_PCR))
"""The PCRs that early boot notes when the TPM is locked. What the cap PCR was, its policy says."""
MAX_BRANCHES = 8
PIN_MIN, PIN_MAX = 4, 256
"""Bytes of a PIN, any text: systemd-cryptenroll sets no least length, and a TPM that forgets one wrong try every two
hours takes two years for the 10,000 PINs of 4 digits; where its lockout has no password, it takes minutes."""


def select(pcrs: Iterable[int], cap: int = CAP_PCR) -> tuple[int, ...]:
    """The PCR selection: sorted, with the cap PCR. Usage for PCRs that software can reset: 16 to 23."""
    selection = tuple(sorted({*pcrs, cap}))
    if problem := selection_problem(selection, cap):
        raise Usage(problem, hint="choose from PCRs 0 to 15")
    return selection


def selection_bytes(selection: Iterable[int]) -> bytes:
    """TPML_PCR_SELECTION with one bank, sha256, and 24 PCRs."""
    return struct.pack(">IHB", 1, BANK, 3) + pcr_bitmap(selection)


def policy_pcr(selection: Iterable[int], values: Mapping[int, bytes]) -> bytes:
    """The policyDigest after one PolicyPCR: `values` are 32 bytes by PCR number."""
    chosen = sorted(selection)
    composite = sha256(b"".join(values[pcr] for pcr in chosen)).digest()
    return sha256(bytes(32) + struct.pack(">I", 0x17F) + selection_bytes(chosen) + composite).digest()


def branch(selection: Iterable[int], values: Mapping[int, bytes], cap: int = CAP_PCR) -> bytes:
    """The policyDigest of one allowed state; the cap PCR counts as not extended, whatever `values` says."""
    return policy_pcr(select(selection, cap), {**values, cap: UNSET})


def alternatives(branches: Sequence[bytes]) -> tuple[bytes, ...]:
    """The digest list of PolicyOR, which takes 2 to 8: a single branch is listed twice."""
    if not 1 <= len(branches) <= MAX_BRANCHES:
        raise Usage(f"{len(branches)} PCR states: a policy holds 1 to {MAX_BRANCHES}")
    return (branches[0], branches[0]) if len(branches) == 1 else tuple(branches)


def policy_or(branches: Sequence[bytes]) -> bytes:
    """The policyDigest after PolicyOR."""
    return sha256(bytes(32) + struct.pack(">I", 0x171) + b"".join(alternatives(branches))).digest()


def auth_policy(branches: Sequence[bytes], pin: bool = False) -> bytes:
    """The authPolicy of the sealed object: PolicyOR, and with a PIN PolicyAuthValue after it."""
    digest = policy_or(branches)
    return sha256(digest + struct.pack(">I", 0x16B)).digest() if pin else digest


def pin_auth(host: bytes, pin: Secret) -> Secret:
    """The sealed object's authValue: SHA-256 of a label, the host id and the PIN. Usage for one too short or too long.

    No salt and no slow hash: the value never leaves the TPM, which counts the tries. The host id keeps one PIN on two
    hosts from being one value.
    """
    if not PIN_MIN <= len(pin) <= PIN_MAX:
        raise Usage(f"a PIN is {PIN_MIN} to {PIN_MAX} bytes long", "digits, letters or both")
    return Secret(sha256(b"unlock PIN\0" + host + pin.value).digest())


def selection_problem(selection: tuple[int, ...], cap: int) -> str:
    """Why a policy must not be over this selection; empty where it may."""
    if selection != tuple(sorted(set(selection))) or any(not 0 <= pcr < 24 for pcr in selection):
        return "the selection is not a sorted set of PCRs"
    if any(pcr >= 16 for pcr in selection):
        return "PCRs 16 to 23 can be reset by running software: they protect nothing"
    if not 1 <= cap <= 15 or cap not in selection:
        return "the cap PCR is not selected"
    return ""


def pcr_bitmap(selection: Iterable[int]) -> bytes:
    """The PCRs as 24 bits, PCR 0 the lowest bit of the first byte: pcrSelect of TPMS_PCR_SELECTION."""
    return sum(1 << pcr for pcr in selection).to_bytes(3, "little")
