# SPDX-License-Identifier: Apache-2.0
"""The key cache: keys of type `user` in root's user keyring, which lasts until the next boot, across switch_root.

Names: unlock:persistence, unlock:pin-auth, unlock:host, unlock:kek:ID:GENERATION, unlock:rebind. The system
calls are used directly (keyctl(2)). A later root process, whatever its session keyring, reads them by its uid; nobody
else may.
"""

import ctypes
import errno
import os

from ..errors import NoKey, UnlockError
from ..secret import Secret

PREFIX = "unlock:"

_THREAD, _SESSION, _USER = -1, -3, -4  # special keyrings
_SETPERM, _DESCRIBE, _LINK, _UNLINK, _SEARCH, _READ, _TIMEOUT, _INVALIDATE = 5, 6, 8, 9, 10, 11, 15, 21
_PERMISSIONS = 0x3F0B0000
"""The possessor: all; the same uid: view, read, search; group and others: nothing."""
_SYSCALLS = {"x86_64": (248, 250), "ppc64le": (269, 271), "s390x": (278, 280)}
_ADD_KEY, _KEYCTL = _SYSCALLS.get(os.uname().machine, (217, 219))  # arm64, riscv64, loong64

_GONE = (errno.ENOKEY, errno.EKEYEXPIRED, errno.EKEYREVOKED)

_syscall = ctypes.CDLL(None, use_errno=True).syscall
_syscall.restype = ctypes.c_long


def put(name: str, key: Secret, timeout: int | None = None) -> None:
    """Caches a key, in place of an older one of that name; `timeout` in seconds, None for never.

    It is made where only this thread sees it, and linked when its permissions are set: no moment at which
    another process finds half of it. Raises UnlockError ("keyring-full" when the kernel's quota is used up).
    """
    data = (ctypes.c_char * len(key)).from_buffer(key.value)
    try:
        serial = _call(_ADD_KEY, b"user", name.encode(), data, len(key), _THREAD)
        try:
            _keyctl(_SETPERM, serial, _PERMISSIONS)
            if timeout is not None:
                _keyctl(_TIMEOUT, serial, timeout)
            _keyctl(_LINK, serial, _USER)
        finally:
            _keyctl(_UNLINK, serial, _THREAD)
    except OSError as error:
        full = error.errno == errno.EDQUOT
        raise UnlockError(
            f"the kernel's keyring does not take {name}: {error.strerror}",
            hint="see /proc/key-users; raise kernel.keys.root_maxkeys and root_maxbytes" if full else "",
            code="keyring-full" if full else "keyring-failed",
        ) from error


class Lent:
    """A key that device-mapper takes over by its description, in a `with`: of type `logon`, which no process reads, in
    the session keyring, where a program that is started meanwhile finds it. Raises UnlockError."""

    def __init__(self, description: str, key: Secret) -> None:
        self._description, self._key = description, key

    def __enter__(self) -> None:
        data = (ctypes.c_char * len(self._key)).from_buffer(self._key.value)
        try:
            self._serial = _call(_ADD_KEY, b"logon", self._description.encode(), data, len(self._key), _SESSION)
        except OSError as error:
            raise UnlockError(f"the kernel's keyring does not take a volume key: {error.strerror}") from error

    def __exit__(self, *_: object) -> None:
        _keyctl(_UNLINK, self._serial, _SESSION)


def get(name: str) -> Secret:
    """A cached key. Raises NoKey when it is absent, expired or not readable."""
    try:
        serial = _keyctl(_SEARCH, _USER, b"user", name.encode(), 0)
        size = _keyctl(_READ, serial, None, 0)
        key = Secret(bytes(size))
        read = _keyctl(_READ, serial, (ctypes.c_char * size).from_buffer(key.value), size)
        if read != size:  # updated in between; our own keys never are
            key.wipe()
            raise OSError(errno.EAGAIN, os.strerror(errno.EAGAIN))
        return key
    except OSError as error:
        if error.errno == errno.EACCES:
            hint = "run it as root; in a systemd service, with KeyringMode=shared"
            raise NoKey(f"the key cache does not let this process read {name}", hint=hint) from error
        why = "is not in the key cache" if error.errno == errno.ENOKEY else f"cannot be used: {error.strerror}"
        raise NoKey(f"{name} {why}", hint="unlock status") from error


def forget(name: str) -> None:
    """Removes a key at once, wherever it is linked; one that is not there is fine. Raises UnlockError."""
    try:
        _keyctl(_INVALIDATE, _keyctl(_SEARCH, _USER, b"user", name.encode(), 0))
    except OSError as error:
        if error.errno not in _GONE:
            raise UnlockError(f"{name} cannot be removed: {error.strerror}", code="keyring-failed") from error


def names() -> list[str]:
    """Names of our cached keys, sorted; expired ones are not among them. Raises UnlockError."""
    found = []
    for serial in _serials():
        try:
            kind, _, _, _, name = _text(_DESCRIBE, serial).split(";", 4)
        except OSError as error:
            if error.errno in (*_GONE, errno.EACCES):
                continue
            raise UnlockError(f"the keyring cannot be listed: {error.strerror}", code="keyring-failed") from error
        if kind == "user" and name.startswith(PREFIX):
            found.append(name)
    return sorted(found)


def flush() -> None:
    """Removes all of our keys."""
    for name in names():
        forget(name)


def _serials() -> list[int]:
    """Serial numbers of all keys in the user keyring."""
    import struct

    try:
        size = _keyctl(_READ, _USER, None, 0)
        room = size + 64  # others may add keys in between
        buffer = ctypes.create_string_buffer(room)
        size = min(_keyctl(_READ, _USER, buffer, room), room) & ~3
    except OSError as error:
        raise UnlockError(f"the keyring cannot be listed: {error.strerror}", code="keyring-failed") from error
    return list(struct.unpack(f"{size // 4}i", buffer.raw[:size]))


def _text(operation: int, serial: int) -> str:
    buffer = ctypes.create_string_buffer(5000)  # the longest description is 4,095 bytes
    _keyctl(operation, serial, buffer, len(buffer))
    return buffer.value.decode("utf-8", "replace")


def _keyctl(operation: int, *arguments: object) -> int:
    return _call(_KEYCTL, operation, *arguments)


def _call(number: int, *arguments: object) -> int:
    """A system call; integers go as longs. Raises OSError."""
    words = [ctypes.c_long(each) if isinstance(each, int) else each for each in arguments]
    result: int = _syscall(ctypes.c_long(number), *words)
    if result < 0:
        code = ctypes.get_errno()
        raise OSError(code, os.strerror(code))
    return result
