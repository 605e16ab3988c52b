# SPDX-License-Identifier: Apache-2.0
"""Wrapping keys with keys: AES-256-GCM, HKDF-SHA256, scrypt. The only file that imports `cryptography`.

A wrapped key is 12 bytes of random nonce, the ciphertext, 16 bytes of tag (NIST SP 800-38D).
AESGCM is taken from the compiled part of the package, and its exception where it is raised: every boot would else
import all other ciphers, and `typing`.
"""

import os

from cryptography.hazmat.bindings._rust import openssl

from .errors import Tampered
from .secret import Secret

_NONCE = 12
_SCRYPT = {"n": 2**17, "r": 8, "p": 1}
"""RFC 7914; 128 MiB and about half a second: for a password that a person chose."""


def wrap(key: Secret, plain: Secret, aad: bytes) -> bytes:
    """`plain` encrypted and authenticated together with `aad`; 28 bytes longer than `plain`."""
    nonce = os.urandom(_NONCE)
    return nonce + openssl.aead.AESGCM(key.value).encrypt(nonce, plain.value, aad)


def unwrap(key: Secret, wrapped: bytes, aad: bytes) -> Secret:
    """The plain key. Raises Tampered when key, bytes or `aad` are not those of the wrapping."""
    try:
        return Secret(openssl.aead.AESGCM(key.value).decrypt(wrapped[:_NONCE], wrapped[_NONCE:], aad))
    except Exception as error:
        from cryptography.exceptions import InvalidTag

        if isinstance(error, InvalidTag | ValueError):
            raise Tampered("a wrapped key does not authenticate") from error
        raise


def derive(key: Secret, salt: bytes, info: bytes, size: int = 32) -> Secret:
    """HKDF-SHA256 (RFC 5869): `size` bytes."""
    from cryptography.hazmat.primitives.hashes import SHA256
    from cryptography.hazmat.primitives.kdf.hkdf import HKDF

    return Secret(HKDF(SHA256(), size, salt, info).derive(bytes(key)))


def mac(key: Secret, data: bytes) -> bytes:
    """HMAC-SHA256, 32 bytes."""
    import hmac

    return hmac.digest(key.value, data, "sha256")


def check_mac(key: Secret, data: bytes, expected: bytes) -> None:
    """Raises Tampered unless `expected` is the HMAC-SHA256 of `data`; constant time."""
    import hmac

    if not hmac.compare_digest(mac(key, data), expected):
        raise Tampered("the header does not authenticate under this recovery key")


def from_password(password: Secret, salt: bytes) -> Secret:
    """A 32 byte key from a person's password, by scrypt."""
    from cryptography.hazmat.primitives.kdf.scrypt import Scrypt

    return Secret(Scrypt(salt=salt, length=32, **_SCRYPT).derive(bytes(password)))
