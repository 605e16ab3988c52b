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
