# SPDX-License-Identifier: Apache-2.0
"""What a TPM's response codes mean, and what to do next: the only place where they are put into words.

The numbers are those of the TCG "TPM 2.0 Library", part 2, "Response Codes", without the number of the handle,
parameter or session that is wrong. Above 16 bits it is not the TPM that answers, but a layer of libtss2 or the kernel.
"""

from ..light import NamedTuple
from .record import SRK

NOT_THE_TPM = 0
"""The code of what another layer reports: the line to the TPM broke, or its answer cannot be believed."""
PCR_CHANGED, NV_RANGE, NV_LOCKED, NV_AUTHORIZATION, NV_UNINITIALIZED = 0x128, 0x146, 0x148, 0x149, 0x14A
VALUE, HANDLE, AUTH_FAIL, POLICY_FAIL, BAD_AUTH, AUTH_UNAVAILABLE = 0x84, 0x8B, 0x8E, 0x9D, 0xA2, 0x12F
LOCKOUT = 0x921
BUSY = (0x922, 0x908, 0x90A, 0x920)
"""RETRY, YIELDED, TESTING, NV_RATE."""
_LOCALITY = 0x907

_REPAIR = "power off and on; where that does not help, turn the TPM off in the firmware's setup"
_FREE_OBJECT = "tpm2_flushcontext --transient-object"
_FREE_SESSION = "tpm2_flushcontext --loaded-session"
_FREE_INDEX = "free an NV index: tpm2_getcap handles-nv-index; tpm2_nvundefine INDEX"
_FREE_PERSISTENT = "free a persistent object: tpm2_getcap handles-persistent; tpm2_evictcontrol -c HANDLE"
_OWNER = "--owner-auth-file FILE"
_SRK = f"if nothing else uses it: tpm2_evictcontrol -c {SRK:#x}, and the same command again makes one without"


class Meaning(NamedTuple):
    """One answer in words."""

    words: str
    hint: str = ""


ANSWERS = {
    NOT_THE_TPM: Meaning("the line to the TPM broke, or its answer makes no sense", "dmesg | grep -i tpm"),
    0x100: Meaning("the firmware has not started the TPM", _REPAIR),
    0x101: Meaning("the TPM is in failure mode", _REPAIR),
    0x120: Meaning("the command is switched off in this TPM"),
    0x121: Meaning("another program has the TPM for itself"),
    PCR_CHANGED: Meaning("a PCR was extended meanwhile"),
    0x12D: Meaning("a firmware update of the TPM was not finished", "finish it with the vendor's tool"),
    0x12E: Meaning("the TPM keeps too many sessions", _FREE_SESSION),
    AUTH_UNAVAILABLE: Meaning("the object takes no authorization of this kind"),
    0x130: Meaning("the TPM wants to be restarted", "power off and on"),
    0x143: Meaning("the TPM does not know this command"),
    0x144: Meaning("the TPM finds the command's size wrong"),
    NV_RANGE: Meaning("the NV index is shorter than what was asked for"),
    NV_LOCKED: Meaning("the NV index is locked until the next start of the TPM", "power off and on"),
    NV_AUTHORIZATION: Meaning("the NV index does not allow this authorization"),
    NV_UNINITIALIZED: Meaning("nothing was written to the NV index yet"),
    0x14B: Meaning("the TPM has no room for one more NV index", _FREE_INDEX),
    0x14C: Meaning("an NV index is there already"),
    0x153: Meaning("the TPM has not tested itself yet", "power off and on"),
    0x81: Meaning("the TPM does not offer this kind of key"),
    0x82: Meaning("the attributes do not go together"),
    0x83: Meaning("the TPM does not offer SHA-256 here"),
    VALUE: Meaning("the TPM does not accept a value"),
    0x85: Meaning("this hierarchy of the TPM is off", "turn it on in the firmware's setup"),
    0x87: Meaning("the TPM does not offer this size of key"),
    0x89: Meaning("the TPM does not offer the mode CFB"),
    0x8A: Meaning("the TPM does not offer this type of object"),
    HANDLE: Meaning("nothing is at this handle of the TPM"),
    0x8C: Meaning("the TPM does not offer this key derivation"),
    0x8D: Meaning("a value is out of its range"),
    AUTH_FAIL: Meaning("the authorization is wrong, and the TPM counts that"),
    0x92: Meaning("the TPM does not offer this scheme"),
    0x95: Meaning("a structure has the wrong size"),
    0x96: Meaning("the TPM does not offer AES-128 here"),
    0x9A: Meaning("a structure is cut short"),
    0x9C: Meaning("a key of the TPM cannot be used for this"),
    POLICY_FAIL: Meaning("the policy is not satisfied"),
    0x9F: Meaning("the TPM did not make this object, or it was changed"),
    BAD_AUTH: Meaning("the authorization is wrong"),
    0xA6: Meaning("the TPM does not offer the curve P-256"),
    0x901: Meaning("a saved session is too old to be loaded", _FREE_SESSION),
    0x902: Meaning("the TPM has no room for one more object", _FREE_OBJECT),
    0x903: Meaning("the TPM has no room for one more session", _FREE_SESSION),
    0x904: Meaning("the TPM is out of memory", _FREE_OBJECT),
    0x905: Meaning("the TPM has no free number for a session", _FREE_SESSION),
    0x906: Meaning("the TPM has no free number for an object", _FREE_OBJECT),
    _LOCALITY: Meaning("the TPM does not allow this from the operating system"),
    0x908: Meaning("the TPM has put the command off"),
    0x909: Meaning("the command was cancelled"),
    0x90A: Meaning("the TPM is still testing itself", "wait, and try again"),
    0x910: Meaning("an object is not loaded"),
    0x918: Meaning("a session is not loaded"),
    0x920: Meaning("the TPM slows down writes to spare its memory", "wait, and try again"),
    LOCKOUT: Meaning(
        "the TPM is in lockout after wrong authorizations", "wait, or tpm2_dictionarylockout --clear-lockout"
    ),
    0x922: Meaning("the TPM is busy", "wait, and try again"),
    0x923: Meaning("the TPM's memory cannot be used now", "wait, and try again"),
}
"""By code. Codes 0x910 to 0x91E are of an object or session by its position: 0x910 and 0x918 stand for them."""

OF_A_COMMAND = {
    ("EvictControl", 0x14B): Meaning("the TPM has no room for one more persistent object", _FREE_PERSISTENT),
    **{
        (command, code): Meaning("the owner authorization is wrong", _OWNER)
        for command in (
            "CreatePrimary",
            "EvictControl",
            "NV_DefineSpace",
            "NV_UndefineSpace",
            "NV_Write",
            "PolicySecret",
        )
        for code in (AUTH_FAIL, BAD_AUTH)
    },
    **{
        (command, code): Meaning("the storage root key has a password", _SRK)
        for command in ("Create", "Load")
        for code in (AUTH_FAIL, BAD_AUTH)
    },
}
"""What a code means of one command alone."""
_OTHER = Meaning("the TPM refuses it", "dmesg | grep -i tpm")


def code_of(rc: int) -> int:
    """The TPM's own code: a key of ANSWERS, if it is known."""
    if rc >> 16:
        return NOT_THE_TPM
    if rc & 0x80:
        return rc & 0xBF
    return rc & 0xFF8 if 0x910 <= rc < 0x920 else rc


def describe(command: str, rc: int) -> Meaning:
    """An answer to this command, in words."""
    code = code_of(rc)
    return OF_A_COMMAND.get((command, code)) or ANSWERS.get(code, _OTHER)


def is_transient(rc: int) -> bool:
    """Whether the same may succeed a moment later: a TPM's warning, or a line that broke. Neither speaks of PCRs, of
    the slot or of the PIN."""
    code = code_of(rc)
    return code == NOT_THE_TPM or (code & 0xF80 == 0x900 and code not in (LOCKOUT, _LOCALITY))
