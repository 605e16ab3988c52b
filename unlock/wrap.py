# SPDX-License-Identifier: Apache-2.0
"""Wrapping keys with keys: AES-256-GCM, HKDF-SHA256, scrypt; X25519. The only file that imports `cryptography`, but
for certificates (keys.escrow, providers.kmip.tls).

A wrapped key is 12 bytes of random nonce, the ciphertext, 16 bytes of tag (NIST SP 800-38D).
Unwrapping, which every boot does, calls OpenSSL directly. libcryptsetup has loaded it already, while importing the
package takes half as long as starting the interpreter. The plain key is written into its Secret alone.
"""

import ctypes
import os

from .errors import Tampered
from .light import Any
from .secret import Secret

_NONCE, _TAG = 12, 16
_KEY = 32
_SCRYPT = {"n": 2**17, "r": 8, "p": 1}
"""RFC 7914; 128 MiB and about half a second: for a password that a person chose."""


def wrap(key: Secret, *, plain: Secret, aad: bytes) -> bytes:
    """Encrypts `plain` and authenticates it together with `aad`. The result is 28 bytes longer than `plain`."""
    from cryptography.hazmat.primitives.ciphers.aead import AESGCM

    nonce = os.urandom(_NONCE)
    return nonce + AESGCM(key.value).encrypt(nonce, plain.value, aad)


def unwrap(key: Secret, wrapped: bytes, aad: bytes) -> Secret:
    """The plain key. Raises Tampered when `key`, `wrapped` or `aad` differ from those of the wrapping."""
    plain = Secret(bytes(max(0, len(wrapped) - _NONCE - _TAG)))
    if len(wrapped) < _NONCE + _TAG or len(key) != _KEY or not _decrypt(key, wrapped, aad, plain):
        plain.wipe()
        raise Tampered("a wrapped key does not authenticate")
    return plain


def _decrypt(key: Secret, wrapped: bytes, aad: bytes, plain: Secret) -> bool:
    """Decrypts into `plain`. True if it authenticates; `plain` must not be used otherwise (EVP_EncryptInit(3))."""
    evp, count = _libcrypto(), ctypes.byref(ctypes.c_int())
    nonce, text, tag = wrapped[:_NONCE], wrapped[_NONCE:-_TAG], wrapped[-_TAG:]
    context, out = evp.EVP_CIPHER_CTX_new(), _buffer(plain)
    try:
        return bool(
            evp.EVP_DecryptInit_ex(context, evp.EVP_aes_256_gcm(), None, _buffer(key), nonce) == 1
            and evp.EVP_DecryptUpdate(context, None, count, aad, len(aad)) == 1
            and evp.EVP_DecryptUpdate(context, out, count, text, len(text)) == 1
            and evp.EVP_CIPHER_CTX_ctrl(context, _SET_TAG, _TAG, tag) == 1
            and evp.EVP_DecryptFinal_ex(context, None, count) == 1
        )
    finally:
        evp.EVP_CIPHER_CTX_free(context)


def derive(key: Secret, salt: bytes, info: bytes, size: int = 32) -> Secret:
    """HKDF-SHA256 (RFC 5869): `size` bytes."""
    from cryptography.hazmat.primitives.hashes import SHA256
    from cryptography.hazmat.primitives.kdf.hkdf import HKDF

    return Secret(HKDF(SHA256(), size, salt, info).derive(bytes(key)))


def x25519_public(private: Secret) -> bytes:
    """The public key of an X25519 private key (RFC 7748), 32 bytes each."""
    from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey

    return X25519PrivateKey.from_private_bytes(private.value).public_key().public_bytes_raw()


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


# OpenSSL's libcrypto: openssl/evp.h

_SET_TAG = 0x11  # EVP_CTRL_AEAD_SET_TAG
_POINTER, _BYTES, _INT = ctypes.c_void_p, ctypes.c_char_p, ctypes.c_int
_SIGNATURES: dict[str, tuple[Any, ...]] = {
    "EVP_aes_256_gcm": (_POINTER,),
    "EVP_CIPHER_CTX_new": (_POINTER,),
    "EVP_CIPHER_CTX_free": (None, _POINTER),
    "EVP_CIPHER_CTX_ctrl": (_INT, _POINTER, _INT, _INT, _BYTES),
    "EVP_DecryptInit_ex": (_INT, _POINTER, _POINTER, _POINTER, _POINTER, _BYTES),
    "EVP_DecryptUpdate": (_INT, _POINTER, _POINTER, _POINTER, _BYTES, _INT),
    "EVP_DecryptFinal_ex": (_INT, _POINTER, _POINTER, _POINTER),
}
"""Result and arguments."""
_library: Any = None


def library_version() -> str:
    """Of the package cryptography."""
    from cryptography import __version__

    return __version__


def _libcrypto() -> Any:
    global _library
    if not _library:
        library = ctypes.CDLL("libcrypto.so.3")
        for name, (result, *arguments) in _SIGNATURES.items():
            function = getattr(library, name)
            function.restype, function.argtypes = result, arguments
        _library = library
    return _library


def _buffer(secret: Secret) -> Any:
    """The secret's own memory, not a copy."""
    return (ctypes.c_char * len(secret)).from_buffer(secret.value)
