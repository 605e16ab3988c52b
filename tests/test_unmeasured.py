# SPDX-License-Identifier: Apache-2.0
"""What systemd obeys beside the measured command line: the EFI variable SystemdOptions, credentials of the firmware."""

import random
from pathlib import Path

import pytest

from unlock.boot import unmeasured
from unlock.paths import Paths

OPTIONS = b"\7\0\0\0" + "systemd.unit=emergency.target\0".encode("utf-16-le")


class Host:
    def __init__(self, root: Path) -> None:
        self.root, self.paths = root, Paths(str(root))
        self.write(self.paths.cmdline, b"root=/dev/mapper/root ro quiet\n")

    def write(self, path: str, content: bytes) -> Path:
        file = Path(path)
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_bytes(content)
        return file

    def options(self, secure_boot: bytes | None = None) -> Path:
        if secure_boot is not None:
            self.write(f"{self.paths.efivars}/{unmeasured.SECURE_BOOT}", b"\6\0\0\0" + secure_boot)
        return self.write(f"{self.paths.efivars}/{unmeasured.OPTIONS}", OPTIONS)


@pytest.fixture
def host(tmp_path: Path) -> Host:
    return Host(tmp_path)


def test_a_host_without_any_has_nothing_to_close(host: Host) -> None:
    assert unmeasured.close_channels(host.paths) == ""


@pytest.mark.parametrize("secure_boot", [None, b"\0"], ids=["no-secure-boot", "off"])
def test_systemds_options_are_deleted(
    host: Host, secure_boot: bytes | None, capsys: pytest.CaptureFixture[str]
) -> None:
    variable = host.options(secure_boot)
    assert "SystemdOptions is set" in unmeasured.open_channels(host.paths)
    assert unmeasured.close_channels(host.paths) == ""
    assert not variable.exists()
    assert unmeasured.close_channels(host.paths) == ""  # again


def test_under_secure_boot_systemd_ignores_its_options(host: Host) -> None:
    variable = host.options(b"\1")
    assert unmeasured.close_channels(host.paths) == ""
    assert variable.exists()


def test_options_that_cannot_be_deleted_are_told(host: Host) -> None:
    variable = host.options()
    variable.unlink()
    variable.mkdir()  # no unlink takes it away
    assert "SystemdOptions is set" in unmeasured.close_channels(host.paths)


@pytest.mark.parametrize(
    "table",
    [
        b"\x0b\x05\x00\x00\x01io.systemd.credential:systemd.extra-unit.x.service=a\0\0",
        b"\x0b\x05\x00\x00\x02vendor\0io.systemd.credential.binary:passwd.hashed-password.root=eA==\0\0\x7f\x04\0\0\0\0",
        b"\x01\x00\xff" + b"\0" * 40 + b"io.systemd.credential:x=1",  # in no structure that a parser would find
    ],
    ids=["text", "binary", "no-structure"],
)
def test_credentials_of_the_firmware_are_told(host: Host, table: bytes) -> None:
    host.write(host.paths.dmi, b"\0\x04\0\0\0\0" + table)
    assert "the firmware gives systemd credentials (" in unmeasured.open_channels(host.paths)


def test_credentials_of_a_virtual_machines_host_are_told_and_printable(host: Host) -> None:
    host.write(f"{host.paths.fw_cfg}/a\x1b[2J\nsafe/raw", b"x")
    found = unmeasured.open_channels(host.paths)
    assert found == "the firmware gives systemd credentials (a?[2J?safe)"


@pytest.mark.parametrize(
    ("words", "closed"),
    [
        ("systemd.import_credentials=no", True),
        ("quiet systemd.import-credentials=0 ro", True),
        ("systemd.import_credentials=off systemd.import_credentials=no", True),
        ("rd.systemd.import_credentials=no", False),  # of the initramfs alone
        ("systemd.import_credentials=no systemd.import_credentials=yes", False),
        ("systemd.import_credentials", False),
        ("systemd.import_credentials=maybe", False),
        ("xsystemd.import_credentials=no", False),
        ('"systemd.import_credentials=no"', False),
    ],
)
def test_the_command_line_turns_credentials_off(host: Host, words: str, closed: bool) -> None:
    host.write(host.paths.dmi, b"\x0b\x05\0\0\x01io.systemd.credential:x=1\0\0")
    host.write(host.paths.cmdline, words.encode() + b"\n")
    assert (unmeasured.open_channels(host.paths) == "") == closed


def test_any_table_is_read_in_bounded_time(host: Host) -> None:
    source = random.Random(1)
    for _ in range(200):
        table = b"".join(
            source.choice([b"\0", b"io.systemd.credential", b":", b"=", b"\x0b", bytes([source.randrange(256)])])
            for _ in range(source.randrange(300))
        )
        host.write(host.paths.dmi, table)
        found = unmeasured.open_channels(host.paths)
        assert found.isprintable() and (b"io.systemd.credential" in table) == bool(found)
    host.write(host.paths.dmi, b"io.systemd.credential:" * (1 << 16))
    assert len(unmeasured.open_channels(host.paths)) < 300
