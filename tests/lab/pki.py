# SPDX-License-Identifier: Apache-2.0
"""Certificates for a test: authorities, servers and clients, with the names and dates that it wants."""

import datetime
import ipaddress
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec, rsa
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

NOW = datetime.datetime.now(datetime.UTC)
DAY = datetime.timedelta(days=1)


class Leaf(NamedTuple):
    """A certificate and its key, both PEM."""

    certificate: str
    key: bytes

    def write(self, folder: Path, name: str) -> tuple[Path, Path]:
        """As two files: certificate, key."""
        certificate, key = folder / f"{name}.pem", folder / f"{name}.key"
        certificate.write_text(self.certificate)
        key.write_bytes(self.key)
        return certificate, key


class Authority:
    """A certificate authority. `certificate` is its own, PEM."""

    def __init__(self, name: str = "test CA", root: "Authority | None" = None) -> None:
        """An intermediate one with `root`."""
        self._key = ec.generate_private_key(ec.SECP256R1())
        self._name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, name)])
        issuer = root or self
        built = (
            _builder(self._name, issuer._name, self._key, -1, 3650)
            .add_extension(x509.BasicConstraints(ca=True, path_length=None), critical=True)
            .add_extension(_usage(sign_certificates=True), critical=True)
            .sign(issuer._key, hashes.SHA256())
        )
        self.certificate = _pem(built)

    def server(self, *names: str, days: tuple[float, float] = (-1, 365)) -> Leaf:
        """For DNS names and addresses; valid from and until so many days from now."""
        return self._leaf(names[0], names, ExtendedKeyUsageOID.SERVER_AUTH, days)

    def server_by_common_name(self, name: str) -> Leaf:
        """Without a Subject Alternative Name."""
        return self._leaf(name, (), ExtendedKeyUsageOID.SERVER_AUTH, (-1, 365))

    def client(self, name: str, days: tuple[float, float] = (-1, 365), rsa_bits: int = 0) -> Leaf:
        return self._leaf(name, (), ExtendedKeyUsageOID.CLIENT_AUTH, days, rsa_bits)

    def _leaf(
        self,
        common: str,
        names: Sequence[str],
        use: x509.ObjectIdentifier,
        days: tuple[float, float],
        rsa_bits: int = 0,
    ) -> Leaf:
        key = rsa.generate_private_key(65537, rsa_bits) if rsa_bits else ec.generate_private_key(ec.SECP256R1())
        subject = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, common)])
        builder = (
            _builder(subject, self._name, key, *days)
            .add_extension(x509.BasicConstraints(ca=False, path_length=None), critical=True)
            .add_extension(x509.ExtendedKeyUsage([use]), critical=False)
        )
        if names:
            builder = builder.add_extension(x509.SubjectAlternativeName([_general(name) for name in names]), False)
        plain = serialization.NoEncryption()
        encoding, form = serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8
        return Leaf(_pem(builder.sign(self._key, hashes.SHA256())), key.private_bytes(encoding, form, plain))


def _builder(
    subject: x509.Name,
    issuer: x509.Name,
    key: ec.EllipticCurvePrivateKey | rsa.RSAPrivateKey,
    start: float,
    end: float,
) -> x509.CertificateBuilder:
    return (
        x509.CertificateBuilder()
        .subject_name(subject)
        .issuer_name(issuer)
        .public_key(key.public_key())
        .serial_number(x509.random_serial_number())
        .not_valid_before(NOW + start * DAY)
        .not_valid_after(NOW + end * DAY)
    )


def _usage(sign_certificates: bool) -> x509.KeyUsage:
    return x509.KeyUsage(True, False, False, False, False, sign_certificates, sign_certificates, False, False)


def _general(name: str) -> x509.GeneralName:
    try:
        return x509.IPAddress(ipaddress.ip_address(name))
    except ValueError:
        return x509.DNSName(name)


def _pem(certificate: x509.Certificate) -> str:
    return certificate.public_bytes(serialization.Encoding.PEM).decode()
