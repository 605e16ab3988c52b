# SPDX-License-Identifier: Apache-2.0
"""Encrypts the recovery key to an organisation's public key, and writes the escrow file.

To an X.509 certificate the file is CMS EnvelopedData (RFC 5652) as PEM: one recipient, the content key by RSA, the
content by AES-CBC. To age recipients it is an armored age file (age-encryption.org/v1), by age(1). The content is the
recovery key as printed, no line end behind it, so that stock tools give what cryptsetup takes:

    openssl cms -decrypt -inform PEM -in FILE -inkey PRIVATE.pem
    age --decrypt --identity IDENTITY FILE
"""

import os
import re
from binascii import Error as Base64Error
from binascii import a2b_base64
from datetime import UTC, datetime
from typing import NamedTuple

from cryptography import x509
from cryptography.exceptions import UnsupportedAlgorithm
from cryptography.hazmat.primitives.asymmetric.rsa import RSAPublicKey
from cryptography.hazmat.primitives.serialization import Encoding
from cryptography.hazmat.primitives.serialization.pkcs7 import PKCS7EnvelopeBuilder, PKCS7Options

from ..der import elements
from ..errors import CommandFailed, Malformed, Refused, Usage
from ..paths import write_atomically
from ..run import run
from ..secret import Secret
from . import recovery_key

RSA_BITS = 2048
"""The least."""
MAX = 1 << 16
"""Bytes of a file with a public key; what is longer is refused, not cut."""
_AGE_TIMEOUT = 60.0
"""Seconds; a plugin may have to ask its device."""
_LOOK = "openssl x509 -noout -text -in FILE"
_ENVELOPED_DATA = bytes.fromhex("2a864886f70d010703")  # 1.2.840.113549.1.7.3
_PRIVATE = re.compile(rb"^\s*(AGE-SECRET-KEY-|AGE-PLUGIN-|-----BEGIN [A-Z ]*PRIVATE KEY-----)", re.M | re.I)
_RECIPIENT = re.compile(r"age1[!-~]+|ssh-(?:ed25519|rsa) [!-~]+")
_AGE_HEADER = re.compile(
    rb"age-encryption\.org/v1\n"
    rb"((?:-> [!-~ ]+\n(?:[A-Za-z0-9+/]{64}\n)*[A-Za-z0-9+/]{0,63}\n)+)"
    rb"--- [A-Za-z0-9+/]{43}\n"
)


class Escrow(NamedTuple):
    """Where the recovery key goes besides, or instead of, a person."""

    to: str
    """File with the organisation's certificate (PEM), or with age recipients; or one recipient itself, age1..."""
    file: str
    """The encrypted key; must not exist."""


def check_escrow(escrow: Escrow) -> None:
    """Encrypts a sample to the recipients, and writes nothing: callers do it before they change anything. Raises Usage,
    Refused, Malformed, CommandFailed."""
    if os.path.lexists(escrow.file):
        raise Usage(f"{escrow.file} exists already", "name a file that does not exist yet")
    with recovery_key.new() as sample:
        _sealed(escrow.to, sample)


def write_escrow(escrow: Escrow, key: Secret) -> None:
    """Writes the escrow file durably, in place of what is there, and reads it back. Checks that it is for these
    recipients, as far as that can be told without a private key. Raises Usage, Refused, Malformed, CommandFailed,
    OSError."""
    sealed = _sealed(escrow.to, key)
    write_atomically(os.path.abspath(escrow.file), sealed)
    with open(escrow.file, "rb") as file:
        if file.read(len(sealed) + 1) != sealed:
            raise Malformed(f"{escrow.file} does not read back")


def _sealed(to: str, key: Secret) -> bytes:
    itself = to.encode("utf-8", "replace")
    content = itself if itself.startswith(b"age1") or _PRIVATE.match(itself) else _content(to)
    if _PRIVATE.search(content):
        raise Refused(
            "--escrow-to takes a public key, and this is a private one (typed here, others may have seen it)",
            "age-keygen -y FILE, or ssh-keygen -y -f FILE, prints the public one",
            code="escrow-private",
        )
    if b"-----BEGIN " in content:
        return _by_cms(_certificate(to, content), key)
    return _by_age(_recipients(to, content), key)


def _content(path: str) -> bytes:
    try:
        with open(path, "rb") as file:
            content = file.read(MAX + 1)
    except (OSError, ValueError) as error:
        why = error.strerror if isinstance(error, OSError) else "not a name of a file"
        raise Usage(f"{path} cannot be read: {why}", "--escrow-to FILE") from error
    if len(content) > MAX:
        raise Malformed(f"{path} is larger than {MAX >> 10} KiB", "give the certificate or the recipients alone")
    return content


# age


def _recipients(path: str, content: bytes) -> list[str]:
    """One a line; blank lines and # comments aside. The comment behind an SSH key is left out."""
    found = []
    for number, line in enumerate(content.decode("ascii", "replace").splitlines(), 1):
        words = " ".join(line.split()[:2])
        if not words or words.startswith("#"):
            continue
        if not _RECIPIENT.fullmatch(words):
            raise Malformed(
                f"neither a PEM certificate nor age recipients: line {number} of {path[:80]}",
                "age1..., ssh-ed25519 ... or ssh-rsa ..., one a line",
            )
        found.append(words)
    if not found:
        raise Malformed(
            f"neither a PEM certificate nor an age recipient is in {path}", "age-keygen -y IDENTITY prints one"
        )
    return found


def _by_age(recipients: list[str], key: Secret) -> bytes:
    options = [word for each in recipients for word in ("--recipient", each)]
    try:
        sealed = run(["age", "--encrypt", "--armor", *options], bytes(key), _AGE_TIMEOUT).encode()
    except CommandFailed as error:
        missing = error.code == "command-missing"
        error.hint = "apt install age" if missing else "age --encrypt --recipient KEY, by hand, says more"
        raise
    _check_age(sealed, len(recipients), len(key))
    return sealed


def _check_age(content: bytes, recipients: int, size: int) -> None:
    """Raises Malformed unless it is an age file for no fewer recipients, with a content of that size."""
    try:
        data = _from_pem(content, b"AGE ENCRYPTED FILE")
    except ValueError as error:
        raise Malformed("age's file is cut short or damaged") from error
    header = _AGE_HEADER.match(data)
    stanzas = sum(line.startswith(b"-> ") for line in header[1].splitlines()) if header else 0
    nonce, tag = 16, 16
    if not header or len(data) != header.end() + nonce + size + tag:
        raise Malformed("age's file is cut short or damaged")
    if stanzas < recipients:
        raise Malformed(f"age encrypted to {stanzas} of {recipients} recipients")


# X.509


def _by_cms(certificate: x509.Certificate, key: Secret) -> bytes:
    builder = PKCS7EnvelopeBuilder().set_data(bytes(key)).add_recipient(certificate)
    sealed = builder.encrypt(Encoding.PEM, [PKCS7Options.Binary])
    _check_envelope(sealed, certificate)
    return sealed


def _certificate(path: str, content: bytes) -> x509.Certificate:
    try:
        certificate = x509.load_pem_x509_certificate(content)
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


def _check_envelope(content: bytes, certificate: x509.Certificate) -> None:
    """Raises Malformed unless it is EnvelopedData with content, for this certificate alone."""
    try:
        oid, enveloped = elements(_only(_from_pem(content, b"PKCS7")))
        _, recipients, encrypted = elements(_only(enveloped.content))
        _, who, _, wrapped = elements(_only(recipients.content))
        issuer, serial = elements(who.content)
        _, _, data = (each.content for each in elements(encrypted.content))
        key = certificate.public_key()
        assert isinstance(key, RSAPublicKey)
        said = (oid.content, issuer.whole, int.from_bytes(serial.content, "big"), len(wrapped.content))
        wanted = (_ENVELOPED_DATA, certificate.issuer.public_bytes(), certificate.serial_number, key.key_size // 8)
        whole = len(data) > 48 and len(data) % 16 == 0
    except (ValueError, IndexError) as error:
        raise Malformed("the escrow file does not read back") from error
    if said != wanted or not whole:
        raise Malformed("the escrow file does not read back as one for this certificate")


def _from_pem(content: bytes, label: bytes) -> bytes:
    """Raises ValueError."""
    _, begin, rest = content.partition(b"-----BEGIN %s-----\n" % label)
    text, end, _ = rest.partition(b"\n-----END %s-----\n" % label)
    if not begin or not end:
        raise ValueError
    try:
        return a2b_base64(b"".join(text.split()), strict_mode=True)
    except Base64Error as error:
        raise ValueError from error


def _only(data: bytes) -> bytes:
    """The content of the one element of DER that there is. Raises ValueError, IndexError."""
    (only,) = elements(data)
    return only.content
