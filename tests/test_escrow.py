# SPDX-License-Identifier: Apache-2.0
"""The recovery key in escrow: stock OpenSSL or age and the organisation's private key give it back, and nothing else
does."""

import datetime
import os
import subprocess
import sys
from pathlib import Path

import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec, rsa

from tests.flowfixture import Host
from tests.killing import child, killed_in
from unlock import run
from unlock.errors import CommandFailed, Malformed, Refused, UnlockError, Usage
from unlock.keys import delivery, escrow, recovery_key
from unlock.keys.escrow import Escrow
from unlock.operations import membership
from unlock.operations import recovery as recovery_operations
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
    key = delivery.make_recovery_key(delivery.Keeper("", Escrow(certificate, file)))
    assert decrypted(file, private) == bytes(key)
    assert recovery_key.parse(key) == key
    assert Path(file).stat().st_mode & 0o777 == 0o600
    for path in tmp_path.iterdir():
        assert bytes(key) not in path.read_bytes()


def test_a_key_in_a_file_goes_into_escrow_as_well(tmp_path: Path) -> None:
    certificate, private = organisation(tmp_path)
    file = str(tmp_path / "escrow.pem")
    key = delivery.make_recovery_key(delivery.Keeper(str(tmp_path / "key"), Escrow(certificate, file)))
    assert (tmp_path / "key").read_bytes() == bytes(key)
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
        delivery.make_recovery_key(
            delivery.Keeper(str(tmp_path / "key"), Escrow(certificate, str(tmp_path / "escrow.pem")))
        )
    assert caught.value.code == "escrow-certificate"
    assert {each.name for each in tmp_path.iterdir()} == {"org.pem", "org.key"}


@pytest.mark.parametrize(
    "content",
    [b"", b"\n# nobody\n", b"\0" * 9, b"-----BEGIN CERTIFICATE-----\nAAAA\n-----END CERTIFICATE-----"],
)
def test_what_is_neither_a_certificate_nor_a_recipient_is_refused(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "to").write_bytes(content)
    with pytest.raises(Malformed):
        escrow.check_escrow(Escrow(str(tmp_path / "to"), str(tmp_path / "escrow.pem")))
    with pytest.raises(Usage):
        escrow.check_escrow(Escrow(str(tmp_path / "none"), str(tmp_path / "escrow.pem")))


def test_a_file_that_is_too_long_is_refused_not_cut(tmp_path: Path) -> None:
    """The recipients behind the cut would be left out."""
    (tmp_path / "to").write_text(f"{age(tmp_path)[0]}\n" * 1100)
    with pytest.raises(Malformed, match="larger than 64 KiB"):
        escrow.check_escrow(Escrow(str(tmp_path / "to"), str(tmp_path / "escrow.age")))


def test_the_key_that_a_host_has_goes_into_escrow_when_it_is_given(tmp_path: Path, key_cache: None) -> None:
    """As `disk adopt` and `group create` do for a later group."""
    host = Host(tmp_path, 0)
    certificate, private = organisation(tmp_path)
    escrow = Escrow(certificate, str(tmp_path / "escrow.pem"))
    recovery_key.write_new_file(str(tmp_path / "key"), host.recovery)
    recovery_key.write_new_file(str(tmp_path / "other"), recovery_key.new())
    with pytest.raises(Refused, match="not the recovery key"):
        membership.obtain_recovery_key(host.state, host.persistence, str(tmp_path / "other"), escrow)
    assert not Path(escrow.file).exists()
    membership.obtain_recovery_key(host.state, host.persistence, str(tmp_path / "key"), escrow)
    assert decrypted(escrow.file, private) == bytes(host.recovery)


def test_an_existing_file_is_never_overwritten(tmp_path: Path) -> None:
    certificate, _ = organisation(tmp_path)
    (tmp_path / "escrow.pem").write_text("precious")
    with pytest.raises(Usage, match="exists already"):
        delivery.make_recovery_key(
            delivery.Keeper(str(tmp_path / "key"), Escrow(certificate, str(tmp_path / "escrow.pem")))
        )
    assert (tmp_path / "escrow.pem").read_text() == "precious"
    assert not (tmp_path / "key").exists()


def test_what_reads_back_for_another_certificate_or_cut_short_does_not_count(tmp_path: Path) -> None:
    mine, _ = organisation(tmp_path)
    other, _ = organisation(tmp_path, name="other")
    file = str(tmp_path / "escrow.pem")
    escrow.write_escrow(Escrow(mine, file), Secret(b"x" * 55))
    content = Path(file).read_bytes()
    escrow._check_envelope(content, x509.load_pem_x509_certificate(Path(mine).read_bytes()))
    with pytest.raises(Malformed):
        escrow._check_envelope(content, x509.load_pem_x509_certificate(Path(other).read_bytes()))
    for end in range(0, len(content) - 2, 7):
        with pytest.raises(UnlockError):
            escrow._check_envelope(content[:end], x509.load_pem_x509_certificate(Path(mine).read_bytes()))


# age


def age(folder: Path, name: str = "age") -> tuple[str, str]:
    """A recipient, and the file with its identity."""
    identity = folder / f"{name}.identity"
    subprocess.run(["age-keygen", "-o", str(identity)], capture_output=True, check=True)
    return said("age-keygen", "-y", str(identity)), str(identity)


def ssh(folder: Path, kind: str) -> tuple[str, str]:
    file = str(folder / kind)
    said(
        "ssh-keygen",
        "-q",
        "-t",
        kind,
        *(("-b", "2048") if kind == "rsa" else ()),
        "-N",
        "",
        "-C",
        "Zoë, the one with the key",
        "-f",
        file,
    )
    return Path(f"{file}.pub").read_text().strip(), file


def said(*command: str) -> str:
    return subprocess.run(command, capture_output=True, check=True, text=True).stdout.strip()


def by_age(file: str, identity: str) -> bytes:
    return subprocess.run(["age", "-d", "-i", identity, file], capture_output=True, check=True).stdout


def in_escrow(folder: Path, to: str) -> tuple[Secret, str]:
    """The key, and the escrow file."""
    file = str(folder / "escrow.age")
    return delivery.make_recovery_key(delivery.Keeper("", Escrow(to, file))), file


def test_age_gives_the_printed_key_to_the_recipient_alone(tmp_path: Path) -> None:
    recipient, identity = age(tmp_path)
    key, file = in_escrow(tmp_path, recipient)
    assert by_age(file, identity) == bytes(key)
    assert recovery_key.parse(key) == key
    assert Path(file).stat().st_mode & 0o777 == 0o600
    for path in tmp_path.iterdir():
        assert bytes(key) not in path.read_bytes()
    with pytest.raises(subprocess.CalledProcessError):
        by_age(file, age(tmp_path, "other")[1])


def test_each_recipient_of_a_file_reads_it_alone(tmp_path: Path) -> None:
    keys = [age(tmp_path), ssh(tmp_path, "ed25519"), age(tmp_path, "second"), ssh(tmp_path, "rsa")]
    lines = ["# the organisation", "", f"  {keys[0][0]}", *(recipient for recipient, _ in keys[1:])]
    (tmp_path / "to").write_text("\r\n".join(lines))
    key, file = in_escrow(tmp_path, str(tmp_path / "to"))
    assert [by_age(file, identity) for _, identity in keys] == [bytes(key)] * 4


def test_who_has_the_identity_proves_on_the_host_that_the_escrow_opens_its_disks(
    tmp_path: Path, key_cache: None
) -> None:
    """`age -d -i IDENTITY FILE | unlock recovery test --recovery-key-file /dev/stdin`, with disks that are here."""
    host = Host(tmp_path, 2)
    recipient, identity = age(tmp_path)
    for key, outcome in ((host.recovery, "ok"), (recovery_key.new(), "wrong-key")):
        file = str(tmp_path / outcome)
        escrow.write_escrow(Escrow(recipient, file), key)
        with subprocess.Popen(["age", "-d", "-i", identity, file], stdout=subprocess.PIPE) as decrypts:
            assert decrypts.stdout

            def test(pipe: int = decrypts.stdout.fileno(), outcome: str = outcome) -> None:
                os.dup2(pipe, 0)
                with delivery.read_recovery_key("/dev/stdin") as recovery:
                    rows = recovery_operations.test_recovery_key(host.paths, recovery, host.look)
                assert [each.outcome for each in rows] == [outcome] * 2

            assert child(test) == 0


def test_a_rotation_into_an_age_file_alone(tmp_path: Path, key_cache: None) -> None:
    host = Host(tmp_path, 2)
    recovery_operations.test_recovery_key(host.paths, host.recovery, host.look)
    recipient, identity = age(tmp_path)
    file = str(tmp_path / "escrow.age")
    recovery_operations.rotate_recovery_key(host.paths, delivery.Keeper(escrow=Escrow(recipient, file)), host.look)
    rows = recovery_operations.test_recovery_key(host.paths, Secret(by_age(file, identity)), host.look)
    assert [each.outcome for each in rows] == ["ok"] * 2


@pytest.mark.parametrize("kind", ["age", "age, typed", "plugin, typed", "ed25519", "certificate"])
def test_a_private_key_is_refused_and_not_repeated(tmp_path: Path, kind: str) -> None:
    if kind.startswith("age"):
        secret = Path(age(tmp_path)[1]).read_text().splitlines()[-1]
        to = secret.lower() if "typed" in kind else str(tmp_path / "age.identity")
    elif kind == "plugin, typed":
        to = secret = "AGE-PLUGIN-YUBIKEY-1QQPSXQVZQGQP"
    else:
        to = ssh(tmp_path, kind)[1] if kind == "ed25519" else organisation(tmp_path)[1]
        secret = Path(to).read_text().splitlines()[1]
    with pytest.raises(Refused, match="private") as caught:
        in_escrow(tmp_path, to)
    assert caught.value.code == "escrow-private"
    assert secret.lower() not in f"{caught.value} {caught.value.hint}".lower()
    assert not (tmp_path / "escrow.age").exists()


@pytest.mark.parametrize(
    "line", ["age1bad", "age1yubikey1qqqq", "age1pq1qqqq", "age1" + "q" * 58, "age1" + "q" * 60_000]
)
def test_what_age_does_not_take_is_said_in_one_line(tmp_path: Path, line: str) -> None:
    """A mistyped recipient, a plugin that is not installed, a kind that this age does not know."""
    (tmp_path / "to").write_text(f"{age(tmp_path)[0]}\n{line}\n")
    for to in (line, str(tmp_path / "to")):
        with pytest.raises(CommandFailed, match="age --encrypt: age: error: ") as caught:
            in_escrow(tmp_path, to)
        assert len(str(caught.value)) < 400 and "\n" not in str(caught.value)
        assert caught.value.hint
    assert not (tmp_path / "escrow.age").exists()


@pytest.mark.parametrize(
    "line", ["ecdsa-sha2-nistp256 AAAA", "-o /etc/passwd", "age1\0", "age1 a", "ssh-rsa", "github:me"]
)
def test_a_line_that_is_no_recipient_is_never_passed_over(tmp_path: Path, line: str) -> None:
    """age leaves out kinds of SSH keys that it does not know, with a warning: who has them would be locked out."""
    (tmp_path / "to").write_text(f"{age(tmp_path)[0]}\n{line}\n")
    with pytest.raises(Malformed, match="line 2 of"):
        in_escrow(tmp_path, str(tmp_path / "to"))


def test_without_age_it_says_what_to_install_and_certificates_still_do(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    recipient, _ = age(tmp_path)
    certificate, private = organisation(tmp_path)
    monkeypatch.setitem(run.ENVIRONMENT, "PATH", str(tmp_path))
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(CommandFailed, match="age is not installed") as caught:
        in_escrow(tmp_path, recipient)
    assert (caught.value.code, caught.value.hint) == ("command-missing", "apt install age")
    key, file = in_escrow(tmp_path, certificate)
    monkeypatch.undo()
    assert decrypted(file, private) == bytes(key)


def test_an_age_file_that_is_cut_short_damaged_or_for_fewer_does_not_count(tmp_path: Path) -> None:
    recipient, _ = age(tmp_path)
    escrow.write_escrow(Escrow(recipient, str(tmp_path / "file")), Secret(b"x" * 55))
    content = (tmp_path / "file").read_bytes()
    escrow._check_age(content, 1, 55)
    for recipients, size in ((2, 55), (1, 54), (1, 56), (1, 0)):
        with pytest.raises(Malformed):
            escrow._check_age(content, recipients, size)
    for end in range(len(content)):
        with pytest.raises(Malformed):
            escrow._check_age(content[:end], 1, 55)


def test_no_argument_of_a_program_holds_the_key(tmp_path: Path) -> None:
    recipient, _ = age(tmp_path)
    watched = str(tmp_path / "execve")
    (tmp_path / "go.py").write_text(
        "import sys\nfrom unlock.keys import escrow, recovery_key\n"
        "recovery_key.write_new_file(sys.argv[2] + '.key', key := recovery_key.new())\n"
        "escrow.write_escrow(escrow.Escrow(*sys.argv[1:]), key)\n"
    )
    command = [sys.executable, str(tmp_path / "go.py"), recipient, str(tmp_path / "escrow.age")]
    trace = ["strace", "-f", "-v", "-s", "4096", "-e", "trace=execve,openat", "-o", watched]
    subprocess.run([*trace, *command], check=True, env={"PYTHONPATH": str(Path(escrow.__file__).parents[2])})
    key = (tmp_path / "escrow.age.key").read_bytes().strip()
    assert b'"--recipient"' in Path(watched).read_bytes()
    for path in tmp_path.iterdir():
        assert (key in path.read_bytes()) == path.name.endswith(".age.key")


@pytest.mark.parametrize("kind", ["age", "certificate"])
def test_killed_anywhere_the_escrow_file_is_there_or_not_never_half(tmp_path: Path, kind: str) -> None:
    (to, private), read = (age(tmp_path), by_age) if kind == "age" else (organisation(tmp_path), decrypted)
    file = tmp_path / "escrow"

    def write() -> None:
        escrow.write_escrow(Escrow(to, str(file)), Secret(b"x" * 55))

    write()
    file.unlink()
    seen = set()
    for call in ("openat", "write", "fsync", "rename", "close"):
        number = 1
        while killed_in(call, number, write):
            number += 1
            seen.add(file.exists())
            if file.exists():
                assert read(str(file), private) == b"x" * 55
                file.unlink()
        assert number > 1, call
        file.unlink()
    write()
    assert read(str(file), private) == b"x" * 55, "what a killed one has left is in nobody's way"
    assert seen == {True, False}


@pytest.mark.parametrize("kind", ["age", "certificate"])
def test_a_disk_that_does_not_keep_what_was_written_is_noticed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str
) -> None:
    to = (age(tmp_path) if kind == "age" else organisation(tmp_path))[0]
    monkeypatch.setattr(escrow, "write_atomically", lambda path, data: Path(path).write_bytes(data[:-1] + b" "))
    with pytest.raises(Malformed, match="does not read back"):
        in_escrow(tmp_path, to)
