# SPDX-License-Identifier: Apache-2.0
"""The baseline's copy on the EFI partition: written at a good boot, read in the recovery shell, never believed."""

import json
import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.eventlogs import Boot
from tests.test_explain import Host, good
from unlock.errors import Malformed
from unlock.measured import diagnosis, esp_copy, evidence, explain
from unlock.measured.baseline import BASELINE_MAX, Baseline
from unlock.tpm import pcr_policy

CMDLINE = "root=/dev/mapper/root ro init=/bin/sh"


@pytest.fixture
def host(tmp_path: Path) -> Iterator[Host]:
    host = Host(tmp_path)
    yield host
    host.chip.kill()
    host.chip.proxy.close()


def mount_efi(host: Host, kind: str = "vfat", where: str = "boot/efi") -> Path:
    """As /proc/self/mounts and the directory tree show it."""
    host.write("proc/self/mountinfo", f"36 25 8:1 / /{where} rw - {kind} /dev/sda1 rw\n".encode())
    host.write(f"{where}/EFI/debian/grubx64.efi", b"MZ")
    return host.home / "root" / where / esp_copy.NAME


def refused(host: Host) -> evidence.Evidence:
    host.boot(Boot("direct")._replace(cmdline=CMDLINE))
    return evidence.gather_evidence(host.paths, host.chip.tcti)


def test_a_good_boot_leaves_the_same_bytes_there_and_writes_them_once(host: Host) -> None:
    copy = mount_efi(host)
    good(host, Boot("direct"))
    assert copy.read_bytes() == Path(host.paths.baseline).read_bytes()
    before = copy.stat().st_ino
    host.keep()
    assert copy.stat().st_ino == before
    copy.write_bytes(b"edited")
    host.keep()
    assert copy.read_bytes() == Path(host.paths.baseline).read_bytes()


@pytest.mark.parametrize("kind", ["ext4", "btrfs"])
def test_a_folder_of_another_file_system_is_left_alone(host: Host, kind: str) -> None:
    """/boot/efi on the encrypted root would be of no use."""
    copy = mount_efi(host, kind)
    good(host, Boot("direct"))
    assert not copy.exists()


def test_one_that_is_too_long_takes_the_old_copy_away(host: Host) -> None:
    copy = mount_efi(host)
    assert esp_copy.write_copy(host.paths, b"x") == str(copy)
    assert esp_copy.write_copy(host.paths, b"x" * (esp_copy.COPY_MAX + 1)) == ""
    assert not copy.exists()


def test_a_full_partition_costs_nothing_but_the_copy(host: Host) -> None:
    copy = mount_efi(host)
    copy.parent.parent.joinpath("unlock").write_bytes(b"")  # no directory can be made in its place
    good(host, Boot("direct"))
    assert os.path.exists(host.paths.baseline)


def test_with_the_copy_the_first_event_is_named_and_marked(host: Host) -> None:
    copy = mount_efi(host)
    good(host, Boot("direct"))
    os.unlink(host.paths.baseline)
    world = refused(host)
    assert world.baseline is None
    found = diagnosis.diagnose(
        world._replace(baseline=Baseline.decode(esp_copy.read_copy_file(str(copy))), copied=True)
    )
    assert (found.causes[0].code, found.causes[0].pcr) == ("command-line", 9)
    assert "init=/bin/sh" in found.causes[0].new
    assert diagnosis.COPIED in found.summary
    assert diagnosis.COPIED in explain.to_text(found)
    assert explain.to_json(found)["copied"]


def test_an_edited_copy_changes_words_and_no_policy(host: Host) -> None:
    """A thief blesses his command line in it: the TPM refuses as before."""
    copy = mount_efi(host)
    good(host, Boot("direct"))
    world = refused(host)
    thiefs = json.loads(copy.read_bytes()) | {"cmdline": CMDLINE}
    host.write("boot/efi/EFI/unlock/baseline.json", json.dumps(thiefs).encode())
    assert host.boot(Boot("direct")._replace(cmdline=CMDLINE)) == "pcr-mismatch"
    assert world.record and pcr_policy.branch(world.record.selection, world.live) not in world.record.branches


@pytest.mark.parametrize(
    "data",
    [b"", b"{}", b"[" * 200_000, b'{"version": 1}', b"\xff" * 1000, b'{"version": 99999}', b"1" * esp_copy.COPY_MAX],
    ids=range(7),
)
def test_a_hostile_copy_is_no_baseline(host: Host, data: bytes) -> None:
    host.write("copy", data)
    read = esp_copy.read_copy_file(str(host.home / "root/copy"))
    assert len(read) <= esp_copy.COPY_MAX
    with pytest.raises(Malformed):
        Baseline.decode(read)


def test_terminal_commands_in_a_copy_are_refused(host: Host) -> None:
    copy = mount_efi(host)
    good(host, Boot("direct"))
    fields = json.loads(copy.read_bytes())
    fields["cmdline"] = "\x1b]0;evil\x07"
    with pytest.raises(Malformed):
        Baseline.decode(json.dumps(fields).encode())


def test_what_is_no_regular_file_is_not_read(tmp_path: Path) -> None:
    secret = tmp_path / "secret"
    secret.write_bytes(b"x")
    (tmp_path / "link").symlink_to(secret)
    os.mkfifo(tmp_path / "fifo")
    (tmp_path / "long").write_bytes(bytes(esp_copy.COPY_MAX + 1))
    for name in ("link", "fifo", "long", "none"):
        assert esp_copy.read_copy_file(str(tmp_path / name)) == b""
    assert esp_copy.read_copy_file(str(secret)) == b"x"


def test_the_image_can_mount_the_partition() -> None:
    manifest = (Path(__file__).parents[1] / "initramfs/manifest").read_text()
    assert "module vfat\n" in manifest
    assert BASELINE_MAX > esp_copy.COPY_MAX
