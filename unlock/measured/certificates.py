# SPDX-License-Identifier: Apache-2.0
"""Reads the names in X.509 certificates (RFC 5280): whom the event log names, and who signed an EFI program.

It verifies nothing: the firmware and shim have done that, or will.
"""

import struct

from ..der import elements

_COMMON_NAME = bytes.fromhex("0603550403")  # OBJECT IDENTIFIER 2.5.4.3
_PKCS_SIGNED_DATA = 2  # WIN_CERT_TYPE_PKCS_SIGNED_DATA
_OPTIONAL = 0xA0  # tag [0]: the version of a certificate, the certificates of a SignedData


def common_name(certificate: bytes) -> str:
    """The subject's common name of an X.509 certificate; '' when there is none, or it is no certificate."""
    try:
        _, subject = _names(certificate)
        found = subject.rfind(_COMMON_NAME)
        if found < 0:
            return ""
        name = next(elements(subject[found + len(_COMMON_NAME) :])).content
    except (IndexError, ValueError, StopIteration):
        return ""
    return name.decode("utf-8", "replace")


def signing_authorities(table: bytes) -> set[bytes]:
    """The authorities that vouch for an EFI program, by its table of signatures, a sequence of WIN_CERTIFICATE: UEFI
    specification 2.10, section 32.2.4.

    An authority is the issuer of a certificate, or a certificate that issued itself. A signature that cannot be read
    is its own authority.
    """
    found: set[bytes] = set()
    at = 0
    while at + 8 < len(table):
        length, _, kind = struct.unpack_from("<IHH", table, at)
        if not 8 < length <= len(table) - at:
            break
        body = table[at + 8 : at + length]
        found |= (_issuers(body) if kind == _PKCS_SIGNED_DATA else set()) or {body}
        at += -(-length // 8) * 8
    return found


def _issuers(signed: bytes) -> set[bytes]:
    """The authorities in a PKCS #7 SignedData (RFC 2315, section 9.1); empty when there are none."""
    found = set()
    try:
        parts = elements(next(elements(signed)).content)
        next(parts)  # the content type
        data = elements(next(elements(next(parts).content)).content)
        for _ in ("version", "algorithms", "what is signed"):
            next(data)
        certificates = next(data)
        for each in elements(certificates.content) if certificates.tag == _OPTIONAL else ():
            issuer, subject = _names(each.whole)
            found.add(each.whole if issuer == subject else issuer)
    except (IndexError, ValueError, StopIteration):
        return set()
    return found


def _names(certificate: bytes) -> tuple[bytes, bytes]:
    """Issuer and subject of an X.509 certificate. Raises IndexError, ValueError, StopIteration."""
    body = elements(next(elements(next(elements(certificate)).content)).content)  # TBSCertificate
    if next(body).tag == _OPTIONAL:
        next(body)  # the serial number
    next(body)  # the algorithm
    issuer = next(body).content
    next(body)  # the validity
    return issuer, next(body).content
