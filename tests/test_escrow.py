# SPDX-License-Identifier: Apache-2.0
"""The recovery key in escrow: stock OpenSSL and the organisation's private key give it back, and nothing else does."""

import datetime
import subprocess
from pathlib import Path

import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec, rsa
from flowfixture import Host

from unlock import escrow, handout, members, recoverykey
from unlock.errors import Malformed, Refused, UnlockError, Usage
from unlock.escrow import Escrow
from unlock.secret import Secret

DAY = datetime.timedelta(days=1)
KEY = rsa.generate_private_key(65537, 2048)


def organisation(
    folder: Path,
    key: rsa.RSAPrivateKey | ec.EllipticCurvePrivateKey = KEY,
    days: tuple[int, int] = (-1, 30),
    encrypts: bool | None = True,
    name: str = "org",
) -> tuple[str, str]:
    """Files: its certificate and its private key. `encrypts` None: without a key usage."""
    subject = x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, name)])
    now = datetime.datetime.now(datetime.UTC)
    builder = (
        x509.CertificateBuilder()
        .subject_name(subject)
        .issuer_name(subject)
        .public_key(key.public_key())
        .serial_number(x509.random_serial_number())
        .not_valid_before(now + days[0] * DAY)
        .not_valid_after(now + days[1] * DAY)
    )
    if encrypts is not None:
        usage = x509.KeyUsage(not encrypts, False, encrypts, False, False, False, False, False, False)
        builder = builder.add_extension(usage, critical=True)
    certificate, private = folder / f"{name}.pem", folder / f"{name}.key"
    certificate.write_bytes(builder.sign(key, hashes.SHA256()).public_bytes(serialization.Encoding.PEM))
    form, plain = serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
    private.write_bytes(key.private_bytes(serialization.Encoding.PEM, form, plain))
    return str(certificate), str(private)


def decrypted(file: str, private: str) -> bytes:
    command = ["openssl", "cms", "-decrypt", "-inform", "PEM", "-in", file, "-inkey", private]
    return subprocess.run(command, capture_output=True, check=True).stdout


@pytest.mark.parametrize("encrypts", [True, None])
def test_stock_openssl_gives_the_printed_key(tmp_path: Path, encrypts: bool | None) -> None:
    certificate, private = organisation(tmp_path, encrypts=encrypts)
    file = str(tmp_path / "escrow.pem")
    key = handout.made(handout.Keep("", Escrow(certificate, file)))
    assert decrypted(file, private) == bytes(key)
    assert recoverykey.parse(key) == key
    assert Path(file).stat().st_mode & 0o777 == 0o600
    for path in tmp_path.iterdir():
        assert bytes(key) not in path.read_bytes()


def test_a_key_in_a_file_goes_into_escrow_as_well(tmp_path: Path) -> None:
    certificate, private = organisation(tmp_path)
    file = str(tmp_path / "escrow.pem")
    key = handout.made(handout.Keep(str(tmp_path / "key"), Escrow(certificate, file)))
    assert (tmp_path / "key").read_bytes() == bytes(key) + b"\n"
    assert decrypted(file, private) == bytes(key)


@pytest.mark.parametrize(
    "what,words",
    [
        ({"days": (-30, -1)}, "ended on"),
        ({"days": (1, 30)}, "not valid yet"),
        ({"encrypts": False}, "forbids encryption"),
        ({"key": ec.generate_private_key(ec.SECP256R1())}, "RSA key of 2048"),
        ({"key": rsa.generate_private_key(65537, 1024)}, "RSA key of 2048"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_a_certificate_that_cannot_be_used_is_refused_before_there_is_a_key(
    tmp_path: Path, what: dict[str, object], words: str
) -> None:
    certificate, _ = organisation(tmp_path, **what)  # type: ignore[arg-type]
    with pytest.raises(Refused, match=words) as caught:
        handout.made(handout.Keep(str(tmp_path / "key"), Escrow(certificate, str(tmp_path / "escrow.pem"))))
    assert caught.value.code == "escrow-certificate"
    assert {each.name for each in tmp_path.iterdir()} == {"org.pem", "org.key"}


@pytest.mark.parametrize("content", [b"", b"age1qqqq", b"-----BEGIN CERTIFICATE-----\nAAAA\n-----END CERTIFICATE-----"])
def test_what_is_no_certificate_is_refused(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "to").write_bytes(content)
    with pytest.raises(Malformed):
        escrow.check(Escrow(str(tmp_path / "to"), str(tmp_path / "escrow.pem")))
    with pytest.raises(Usage):
        escrow.check(Escrow(str(tmp_path / "none"), str(tmp_path / "escrow.pem")))


def test_the_key_that_a_host_has_goes_into_escrow_when_it_is_given(tmp_path: Path, key_cache: None) -> None:
    """As `disk adopt` and `group create` do for a later group."""
    host = Host(tmp_path, 0)
    certificate, private = organisation(tmp_path)
    escrow = Escrow(certificate, str(tmp_path / "escrow.pem"))
    recoverykey.write_new_file(str(tmp_path / "key"), host.recovery)
    recoverykey.write_new_file(str(tmp_path / "other"), recoverykey.new())
    with pytest.raises(Refused, match="not the recovery key"):
        members.recovery_key(host.state, host.persistence, str(tmp_path / "other"), escrow)
    assert not Path(escrow.file).exists()
    members.recovery_key(host.state, host.persistence, str(tmp_path / "key"), escrow)
    assert decrypted(escrow.file, private) == bytes(host.recovery)


def test_an_existing_file_is_never_overwritten(tmp_path: Path) -> None:
    certificate, _ = organisation(tmp_path)
    (tmp_path / "escrow.pem").write_text("precious")
    with pytest.raises(Usage, match="exists already"):
        handout.made(handout.Keep(str(tmp_path / "key"), Escrow(certificate, str(tmp_path / "escrow.pem"))))
    assert (tmp_path / "escrow.pem").read_text() == "precious"
    assert not (tmp_path / "key").exists()


def test_what_reads_back_for_another_certificate_or_cut_short_does_not_count(tmp_path: Path) -> None:
    mine, _ = organisation(tmp_path)
    other, _ = organisation(tmp_path, name="other")
    file = str(tmp_path / "escrow.pem")
    escrow.write(Escrow(mine, file), Secret(b"x" * 55))
    content = Path(file).read_bytes()
    escrow._check_envelope(content, x509.load_pem_x509_certificate(Path(mine).read_bytes()))
    with pytest.raises(Malformed):
        escrow._check_envelope(content, x509.load_pem_x509_certificate(Path(other).read_bytes()))
    for end in range(0, len(content) - 2, 7):
        with pytest.raises(UnlockError):
            escrow._check_envelope(content[:end], x509.load_pem_x509_certificate(Path(mine).read_bytes()))
