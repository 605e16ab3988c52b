# SPDX-License-Identifier: Apache-2.0
"""Every error that a user can meet: a message, the next command to type, a stable code, an exit status.

Codes and exit statuses are an interface for scripts; they never change meaning.
"""


class UnlockError(Exception):
    """What failed, on which thing; `hint` is the next command to type. One line each, never a secret in either."""

    code = "error"
    status = 1

    def __init__(self, message: str, hint: str = "", code: str = "") -> None:
        super().__init__(message)
        self.hint = hint
        if code:
            self.code = code


class Usage(UnlockError):
    """The command line or the configuration asks for something that cannot be."""

    code, status = "usage", 2


class Refused(UnlockError):
    """A safety check said no; the hint names the override, where there is one."""

    code, status = "refused", 3


class Malformed(UnlockError):
    """Bytes from a disk, a TPM or a file that are not in the documented format."""

    code, status = "malformed", 4


class NewerFormat(Malformed):
    """A format of a later version of this program."""

    code = "newer-format"


class NotOurs(UnlockError):
    """Well formed, but of another host or key: the caller tries the next one."""

    code, status = "not-ours", 5


class Tampered(UnlockError):
    """Authentication failed: the thing was changed, swapped or moved, or the key is another one."""

    code, status = "tampered", 6


class TpmAbsent(UnlockError):
    """No TPM, or its driver is not there."""

    code, status = "no-tpm", 7


class TpmRefused(UnlockError):
    """The TPM works and says no: the PCR policy is not satisfied."""

    code, status = "pcr-mismatch", 8


class TpmFailed(UnlockError):
    """The TPM, or the way to it, does not work as it should."""

    code, status = "tpm-failed", 9


class NoSlot(UnlockError):
    """The TPM holds nothing of this host: never enrolled, cleared, or another TPM."""

    code, status = "no-slot", 10


class DiskFailed(UnlockError):
    """libcryptsetup, the kernel or the device refused an operation on one disk."""

    code, status = "disk-failed", 11


class NoKey(UnlockError):
    """A key that is needed is not in the key cache."""

    code, status = "no-key", 12


class CommandFailed(UnlockError):
    """A program that we ran (mkfs, mount, systemctl) failed."""

    code, status = "command-failed", 13


class PinWrong(UnlockError):
    """The TPM asks for a PIN, and none was typed that is right."""

    code, status = "pin-wrong", 14


class PinLockout(UnlockError):
    """Too many wrong tries: the TPM takes no PIN for a while."""

    code, status = "pin-lockout", 15


class ProviderError(UnlockError):
    """A key provider did not do what it was asked; the kinds below differ in what to do next."""

    code, status = "provider", 20

    retry_after = 0.0
    """Seconds before which asking again is no use."""


class ProviderUnavailable(ProviderError):
    """Nothing answers, or not in time: the next endpoint, then back off."""

    code, status = "provider-unavailable", 20


class PeerUntrusted(ProviderError):
    """The server's certificate is not that of the one we asked, expired, or of an unknown CA."""

    code, status = "peer-untrusted", 21


class ClientAuth(ProviderError):
    """The server refuses our certificate or password: no retry before they are renewed."""

    code, status = "client-auth", 22


class ClockWrong(ProviderError):
    """A certificate is not valid yet: the clock is not set."""

    code, status = "clock-wrong", 23


class ProviderProtocol(ProviderError):
    """An answer that is not to the question, or is not of the protocol."""

    code, status = "provider-protocol", 24


class Integrity(ProviderError):
    """A key that cannot be the one that was asked for, or more than one: never adopted."""

    code, status = "integrity", 25


class NotFoundOrDenied(ProviderError):
    """No such key, or none that we may have: nothing is ever deleted for that."""

    code, status = "not-found-or-denied", 26


class StateBlocked(ProviderError):
    """The key is deactivated, compromised or destroyed: no new wraps."""

    code, status = "state-blocked", 27


class Unsupported(ProviderError):
    """The server does not offer the operation: use the other way."""

    code, status = "unsupported", 28
