# SPDX-License-Identifier: Apache-2.0
"""Escrow: the recovery key encrypted to an organisation's certificate, for whoever has that private key to read.

The file is CMS EnvelopedData (RFC 5652) as PEM: one recipient, the content key by RSA, the content by AES-CBC. The
content is the recovery key as printed, no line end behind it, so that stock OpenSSL gives what cryptsetup takes:

    openssl cms -decrypt -inform PEM -in FILE -inkey PRIVATE.pem
"""

import os
from binascii import Error as Base64Error
from binascii import a2b_base64
from datetime import UTC, datetime
from typing import NamedTuple

from cryptography import x509
from cryptography.exceptions import UnsupportedAlgorithm
from cryptography.hazmat.primitives.asymmetric.rsa import RSAPublicKey
from cryptography.hazmat.primitives.serialization import Encoding
from cryptography.hazmat.primitives.serialization.pkcs7 import PKCS7EnvelopeBuilder, PKCS7Options

from .errors import Malformed, Refused, Usage
from .paths import write_atomically
from .secret import Secret

RSA_BITS = 2048
"""The least."""
_MAX = 1 << 20
_LOOK = "openssl x509 -noout -text -in FILE"
_ENVELOPED_DATA = bytes.fromhex("2a864886f70d010703")  # 1.2.840.113549.1.7.3
_BEGIN, _END = b"-----BEGIN PKCS7-----", b"-----END PKCS7-----"


class Escrow(NamedTuple):
    """Where the recovery key goes besides, or instead of, a person."""

    to: str
    """PEM file with the organisation's certificate."""
    file: str
    """The encrypted key; must not exist."""


def check(escrow: Escrow) -> None:
    """Before anything is changed. Raises Usage, Refused, Malformed."""
    _certificate(escrow.to)
    if os.path.lexists(escrow.file):
        raise Usage(f"{escrow.file} exists already", "name a file that does not exist yet")


def write(escrow: Escrow, key: Secret) -> None:
    """Durable, and read back: the file is for this certificate. Raises Usage, Refused, Malformed, OSError."""
    check(escrow)
    certificate = _certificate(escrow.to)
    builder = PKCS7EnvelopeBuilder().set_data(bytes(key)).add_recipient(certificate)
    write_atomically(os.path.abspath(escrow.file), builder.encrypt(Encoding.PEM, [PKCS7Options.Binary]))
    with open(escrow.file, "rb") as file:
        _check_envelope(file.read(_MAX), certificate)


def _certificate(path: str) -> x509.Certificate:
    try:
        with open(path, "rb") as file:
            certificate = x509.load_pem_x509_certificate(file.read(_MAX))
    except OSError as error:
        raise Usage(f"{path} cannot be read: {error.strerror}", "--escrow-to FILE") from error
    except ValueError as error:
        raise Malformed(f"{path} is not a PEM certificate", _LOOK) from error
    _check_certificate(path, certificate)
    return certificate


def _check_certificate(path: str, certificate: x509.Certificate) -> None:
    now = datetime.now(UTC)
    if now > certificate.not_valid_after_utc:
        raise _refused(path, f"ended on {certificate.not_valid_after_utc:%Y-%m-%d}")
    if now < certificate.not_valid_before_utc:
        raise _refused(path, "is not valid yet, or the clock is behind")
    try:
        key = certificate.public_key()
        if not isinstance(key, RSAPublicKey) or key.key_size < RSA_BITS:
            raise _refused(path, f"is not of an RSA key of {RSA_BITS} bits or more")
        usage = certificate.extensions.get_extension_for_class(x509.KeyUsage).value
    except x509.ExtensionNotFound:
        return
    except (ValueError, UnsupportedAlgorithm) as error:
        raise Malformed(f"{path} has a key or extensions that cannot be read", _LOOK) from error
    if not usage.key_encipherment:
        raise _refused(path, "forbids encryption: its key usage lacks keyEncipherment")


def _refused(path: str, why: str) -> Refused:
    return Refused(f"the certificate in {path} {why}", _LOOK, code="escrow-certificate")


# Reading back


def _check_envelope(content: bytes, certificate: x509.Certificate) -> None:
    """Raises Malformed unless it is EnvelopedData with content, for this certificate alone."""
    try:
        oid, enveloped = _children(_only(_from_pem(content)))
        _, recipients, encrypted = _children(_only(enveloped[1]))
        (recipient,) = _children(recipients[1])
        _, who, _, wrapped = _children(recipient[1])
        issuer, serial = _children(who[1])
        _, _, data = _children(encrypted[1])
        key = certificate.public_key()
        assert isinstance(key, RSAPublicKey)
        said = (oid[1], issuer[2], int.from_bytes(serial[1], "big"), len(wrapped[1]))
        wanted = (_ENVELOPED_DATA, certificate.issuer.public_bytes(), certificate.serial_number, key.key_size // 8)
        whole = len(data[1]) > 48 and len(data[1]) % 16 == 0
    except (ValueError, IndexError) as error:
        raise Malformed("the escrow file does not read back") from error
    if said != wanted or not whole:
        raise Malformed("the escrow file does not read back as one for this certificate")


def _from_pem(content: bytes) -> bytes:
    """Raises ValueError."""
    _, begin, rest = content.partition(_BEGIN)
    text, end, _ = rest.partition(_END)
    if not begin or not end:
        raise ValueError
    try:
        return a2b_base64(b"".join(text.split()), strict_mode=True)
    except Base64Error as error:
        raise ValueError from error


Element = tuple[int, bytes, bytes]
"""Tag, content, and both with their length: one element of DER (X.690)."""


def _only(data: bytes) -> bytes:
    """The content of the one element that there is. Raises ValueError."""
    ((_, content, _),) = _children(data)
    return content


def _children(data: bytes) -> list[Element]:
    """Raises ValueError, IndexError."""
    found, at = [], 0
    while at < len(data):
        tag, size, start = data[at], data[at + 1], at + 2
        if size & 0x80:
            start += size & 0x7F
            size = int.from_bytes(data[at + 2 : start], "big")
        if start + size > len(data):
            raise ValueError
        found.append((tag, data[start : start + size], data[at : start + size]))
        at = start + size
    return found
