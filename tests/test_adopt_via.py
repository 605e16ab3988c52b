# SPDX-License-Identifier: Apache-2.0
"""`unlock disk adopt --via`: a disk is taken in by its token of clevis, or of systemd-cryptenroll."""

import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.flowfixture import Host
from tests.killing import child
from tests.lab import luks as lab_luks
from tests.lab.machine import RECOVERY, Machine
from tests.lab.running import Disk
from tests.lab.stories import status, unmeasured, up
from tests.test_members import OPERATOR, Loops, Unchanged, host, loops, luks_format, recovery_file, sh
from unlock import run
from unlock.disks import luks, other_tokens
from unlock.errors import CommandFailed, NotOurs, UnlockError, Usage
from unlock.operations import adopt_disk
from unlock.secret import Secret

__all__ = ["host", "loops"]

pytestmark = pytest.mark.usefixtures("key_cache")
needs_clevis = pytest.mark.skipif(not shutil.which("clevis-decrypt-null"), reason="clevis is not installed")


def by_token(host: Host, disk: str, via: str) -> None:
    adopt_disk.adopt_disk(host.paths, disk, "data", None, recovery_file(host), via=via)


def refused(host: Host, disk: str, via: str) -> UnlockError:
    return Unchanged(host, disk).after(lambda: by_token(host, disk, via))


def bind(disk: str) -> None:
    """By the pin that keeps nothing secret: the rest is as with a TPM or a server."""
    sh("clevis", "luks", "bind", "-y", "-k", "-", "-d", disk, "null", "{}", text=OPERATOR)


@needs_clevis
def test_a_disk_of_clevis_is_taken_in_without_its_passphrase(host: Host, loops: Loops) -> None:
    (disk,) = loops()
    luks_format(disk)
    bind(disk)
    before = sh("cryptsetup", "token", "export", "--token-id=0", disk)
    by_token(host, disk, "clevis")
    host.disks.append(Path(disk))
    with luks.Container(disk) as container, container.volume_key(Secret(OPERATOR)) as dek:
        host.deks[container.uuid] = bytes(dek)
    assert host.boot_opens() and host.recovery_opens()
    assert sh("cryptsetup", "token", "export", "--token-id=0", disk) == before
    assert sh("clevis", "luks", "pass", "-d", disk, "-s", "1")


@needs_clevis
def test_of_two_tokens_of_clevis_the_second_gives_the_key_when_the_first_does_not(host: Host, loops: Loops) -> None:
    (disk,) = loops()
    luks_format(disk)
    bind(disk)
    bind(disk)
    sh("cryptsetup", "luksKillSlot", "--batch-mode", disk, "1")  # the token stays, for no keyslot
    by_token(host, disk, "clevis")


@needs_clevis
def test_a_token_of_clevis_that_gives_nothing_is_told_and_changes_nothing(host: Host, loops: Loops) -> None:
    (disk,) = loops()
    luks_format(disk)
    sh(
        "cryptsetup",
        "token",
        "import",
        disk,
        text=json.dumps({"type": "clevis", "keyslots": ["0"], "jwe": {}}).encode(),
    )
    error = refused(host, disk, "clevis")
    assert isinstance(error, CommandFailed) and "clevis luks pass" in str(error) and "--passphrase-file" in error.hint


@pytest.mark.parametrize("via", ["clevis", "tpm2"])
def test_a_disk_without_such_a_token_is_not_taken_in(host: Host, loops: Loops, via: str) -> None:
    (disk,) = loops()
    luks_format(disk)
    error = refused(host, disk, via)
    assert isinstance(error, NotOurs) and other_tokens.TYPES[via] in str(error) and "--passphrase-file" in error.hint


def test_a_token_of_systemd_that_gives_nothing_is_told_and_changes_nothing(host: Host, loops: Loops) -> None:
    (disk,) = loops()
    luks_format(disk)
    text = {"type": "systemd-tpm2", "keyslots": ["0"], "tpm2-blob": "eA==", "tpm2-pcrs": [7], "tpm2-policy-hash": "00"}
    sh("cryptsetup", "token", "import", disk, text=json.dumps(text).encode())
    error = refused(host, disk, "tpm2")
    assert isinstance(error, CommandFailed) and "token 0" in str(error) and "PCR 15" in error.hint
    assert "\n" not in str(error) and sys.executable not in str(error)


def test_no_plugin_is_loaded_in_the_process_of_a_command(host: Host, loops: Loops) -> None:
    (disk,) = loops()
    luks_format(disk)
    refused(host, disk, "tpm2")
    assert "libcryptsetup-token" not in Path("/proc/self/maps").read_text()

    def loads() -> None:
        luks._library = None
        with pytest.raises(UnlockError):
            luks.volume_key_by_plugin(disk, 0)

    assert child(loads) == 0


@pytest.mark.parametrize("option", [["--passphrase-file", "x"], ["--key-file", "x"], ["--keyfile-size", "2"]])
def test_via_and_a_passphrase_exclude_each_other(option: list[str]) -> None:
    from unlock import cli
    from unlock.paths import Paths

    parsed = cli._parser().parse_args(["disk", "adopt", "/dev/null", "--group", "data", "--via", "clevis", *option])
    with pytest.raises(Usage, match="--via"):
        parsed.run(Paths("/nowhere"), parsed)


# A program that prints a secret


def program(text: str) -> list[str]:
    return ["sh", "-c", text]


def test_a_secret_that_a_program_prints_is_taken_byte_by_byte() -> None:
    for printed in (b"a", b"with a line end\n", bytes(range(256)) * 16):
        command = [sys.executable, "-c", f"import os; os.write(1, {printed!r})"]
        with run.run_for_secret(command, 4096, 30) as secret:
            assert bytes(secret) == printed


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("exit 0", "printed 0 bytes"),
        ("head -c 17 /dev/zero", "printed 17 bytes"),
        ("yes", "status "),
        ("echo secret; echo first >&2; echo last >&2; exit 3", "last"),
        ("head -c 200000 /dev/zero | tr '\\0' x >&2; exit 1", "x" * 300),
        ("sleep 600", "did not finish in 1 s"),
        ("echo secret; sleep 600", "did not finish in 1 s"),
        ("echo secret; sleep 600 & exec >&-; wait", "did not finish in 1 s"),
    ],
)
def test_a_program_that_prints_no_secret_is_told_and_is_gone(text: str, said: str) -> None:
    begun = time.monotonic()
    with pytest.raises(CommandFailed) as caught:
        run.run_for_secret(program(text), 16, 1)
    assert said in str(caught.value) and "secret" not in str(caught.value).replace(text, "")
    assert time.monotonic() - begun < 10
    left = subprocess.run(["pgrep", "-P", str(os.getpid()), "-x", "sh"], capture_output=True, text=True).stdout
    assert not left


def test_a_program_that_is_not_installed_is_told() -> None:
    with pytest.raises(CommandFailed) as caught:
        run.run_for_secret(["unlock-test-absent"], 16, 1)
    assert caught.value.code == "command-missing"


# A TPM


@pytest.fixture
def enrolled(tmp_path: Path) -> Iterator[Machine]:
    machine = unmeasured().clone(tmp_path / "machine")
    lab_luks.format_disk(machine.home / "other.raw", OPERATOR.decode())
    machine.disks["other"] = Disk("other.raw", "other")
    yield machine
    shutil.rmtree(tmp_path / "machine", ignore_errors=True)


@pytest.mark.vm
def test_a_disk_of_systemd_cryptenroll_is_taken_in_by_the_tpm(enrolled: Machine) -> None:
    device = enrolled.devices("other")
    with enrolled.boot() as booted:
        console = up(booted)
        console.write("/root/passphrase", OPERATOR, 0o600)
        console.write(RECOVERY, enrolled.recovery_key.encode(), 0o600)
        enroll = f"systemd-cryptenroll --unlock-key-file=/root/passphrase --tpm2-device=auto {device}"
        adopt = f"unlock disk adopt {device} --group other --recovery-key-file {RECOVERY} --via tpm2"
        console.sh(f"{enroll} --tpm2-pcrs=7")
        console.sh("rm /root/passphrase")
        tokens = console.sh(f"cryptsetup luksDump --dump-json-metadata {device}").out
        console.sh(adopt, timeout=240)
        after = json.loads(console.sh(f"cryptsetup luksDump --dump-json-metadata {device}").out)
        for number, each in json.loads(tokens)["tokens"].items():
            assert after["tokens"][number] == each
        assert status(console)["other"] in ("closed", "ready", "open")
        booted.poweroff()
    with enrolled.boot() as booted:
        console = up(booted)
        assert status(console)["other"] == "open"
        booted.kill()
