# SPDX-License-Identifier: Apache-2.0
"""Every error that a user can get: a message, the next command to type, a stable code, an exit status.

Codes and exit statuses are an interface for scripts; they never change meaning.
"""


class UnlockError(Exception):
    """`message` says what failed on which thing, `hint` is the next command to type: a line each, without secrets."""

    code = "error"
    status = 1
    transient = False
    """The same may succeed a moment later."""

    def __init__(self, message: str, hint: str = "", code: str = "") -> None:
        super().__init__(message)
        self.hint = hint
        if code:
            self.code = code

    def to_json(self) -> dict[str, object]:
        return {"code": self.code, "message": str(self), "hint": self.hint, "status": self.status}


class Usage(UnlockError):
    """The command line or the configuration asks for something impossible."""

    code, status = "usage", 2


class Refused(UnlockError):
    """A safety check failed. The hint names the override, if there is one."""

    code, status = "refused", 3


class Malformed(UnlockError):
    """Bytes from a disk, a TPM or a file that are not in the documented format."""

    code, status = "malformed", 4


class NewerFormat(Malformed):
    """A format of a later version of this program."""

    code = "newer-format"


class NotOurs(UnlockError):
    """Well formed, but of another host or for another key: the caller tries the next one."""

    code, status = "not-ours", 5


class Tampered(UnlockError):
    """Authentication failed: the thing was changed, swapped or moved, or it is the wrong key."""

    code, status = "tampered", 6


class TpmAbsent(UnlockError):
    """No TPM, or its driver is not there."""

    code, status = "no-tpm", 7
    transient = True


class TpmRefused(UnlockError):
    """The TPM works and refuses: its PCR policy is not satisfied."""

    code, status = "pcr-mismatch", 8


class TpmFailed(UnlockError):
    """The TPM or its driver does not work as it should."""

    code, status = "tpm-failed", 9


class TpmLockout(TpmFailed):
    """After wrong authorizations, of whatever object, the TPM takes none for a while."""

    code = "tpm-lockout"


class NoSlot(UnlockError):
    """The TPM holds nothing of this host: it was never enrolled, was cleared, or is another TPM."""

    code, status = "no-slot", 10


class DiskFailed(UnlockError):
    """libcryptsetup, the kernel or the device refused an operation on one disk."""

    code, status = "disk-failed", 11


class NoKey(UnlockError):
    """A key that is needed is not in the key cache."""

    code, status = "no-key", 12


class CommandFailed(UnlockError):
    """A program that unlock ran (mkfs, mount, systemctl) failed."""

    code, status = "command-failed", 13


class PinWrong(UnlockError):
    """The TPM asks for a PIN, and no right one was typed."""

    code, status = "pin-wrong", 14


class PinLockout(UnlockError):
    """After too many wrong PINs the TPM accepts none for a while."""

    code, status = "pin-lockout", 15


class Stopped(UnlockError):
    """A long operation has stopped at a safe point, as it was asked to, and is not finished."""

    code, status = "stopped", 17


class ProviderError(UnlockError):
    """A key provider did not do what it was asked. The classes below differ in what to do next."""

    code, status = "provider", 20

    retry_after = 0.0
    """Seconds after which asking again may succeed."""


class ProviderUnavailable(ProviderError):
    """No answer in time: try the next endpoint, then back off."""

    code, status = "provider-unavailable", 20


class PeerUntrusted(ProviderError):
    """The server's certificate is for another name, expired, or of an unknown CA."""

    code, status = "peer-untrusted", 21


class ClientAuth(ProviderError):
    """The server refuses our certificate or password: a retry needs new ones."""

    code, status = "client-auth", 22


class ClockWrong(ProviderError):
    """A certificate is not valid yet: the clock is not set."""

    code, status = "clock-wrong", 23


class ProviderProtocol(ProviderError):
    """An answer that violates the protocol or does not belong to the request."""

    code, status = "provider-protocol", 24


class Integrity(ProviderError):
    """The answer has a key that cannot be the requested one, or several keys: none is used."""

    code, status = "integrity", 25


class NotFoundOrDenied(ProviderError):
    """The key does not exist, or access is denied. Nothing is ever deleted because of this."""

    code, status = "not-found-or-denied", 26


class StateBlocked(ProviderError):
    """The key is deactivated, compromised or destroyed: nothing new is wrapped with it."""

    code, status = "state-blocked", 27


class Unsupported(ProviderError):
    """The server does not offer the operation: the caller uses another one."""

    code, status = "unsupported", 28
