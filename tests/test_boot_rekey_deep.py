# SPDX-License-Identifier: Apache-2.0
"""`unlock rekey --deep` on a machine: disks in use, a root disk, power cuts, reboots, without a network."""

import json
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.lab import image
from tests.lab.guest import Guest
from tests.lab.machine import RECOVERY, Machine
from tests.lab.stories import checked, measured, outcomes, up

pytestmark = pytest.mark.vm

Show = Callable[[str, object], None]
PASSPHRASE = "/run/passphrase"
ROOT = f"/dev/disk/by-uuid/{image.LUKS_UUID}"


@pytest.fixture
def story(tmp_path: Path) -> Iterator[Machine]:
    """A clone of the enrolled machine."""
    yield measured().clone(tmp_path / "machine")
    shutil.rmtree(tmp_path / "machine", ignore_errors=True)


def give_secrets(console: Guest, story: Machine) -> None:
    console.write(RECOVERY, story.recovery_key.encode(), 0o600)
    console.write(PASSPHRASE, image.PASSPHRASE.encode(), 0o600)


def requirement(console: Guest, disk: str) -> bool:
    """Whether the disk's header says that it is being re-encrypted."""
    return "online-reencrypt" in console.sh(f"cryptsetup luksDump --dump-json-metadata {disk}").out


def in_background(console: Guest, command: str) -> None:
    console.sh(f"systemd-run --quiet --unit=deep -p KeyringMode=shared {command}")


def wait_for_start(console: Guest, disk: str) -> None:
    """Until the data moves; then shows what the command has said, should it have failed."""
    moving = f"cryptsetup luksDump --dump-json-metadata {disk} | grep -q online-reencrypt"
    console.sh(f"until {moving} || ! systemctl is-active --quiet deep; do sleep 0.2; done")
    assert requirement(console, disk), console.sh("journalctl -u deep --no-pager").out


def test_a_host_reboots_in_the_midst_of_its_root_disk(story: Machine) -> None:
    """Cut off twice, once in use: it opens by itself, offline, and goes on without any secret."""
    with story.boot() as booted:
        console = up(booted)
        give_secrets(console, story)
        refused = console.sh(f"unlock rekey --deep root --recovery-key-file {RECOVERY}", check=False)
        assert (refused.code, "keyslot 0 would open nothing afterwards" in refused.err) == (3, True), refused.err
        assert not requirement(console, ROOT)
        console.sh("head -c 20000000 /dev/urandom >/root/blob; sha256sum /root/blob >/root/blob.sum; sync")
        command = f"unlock rekey --deep root --recovery-key-file {RECOVERY} --passphrase-file {PASSPHRASE}"
        in_background(console, f"{command} --max-rate 40M")
        wait_for_start(console, ROOT)
        console.sh("sleep 6; systemctl is-active deep")
        booted.kill()
    for _ in range(2):
        with story.boot() as booted:
            console = up(booted)
            assert outcomes(console)["root"] == "opened"
            assert requirement(console, ROOT)
            console.sh("sha256sum --quiet -c /root/blob.sum")
            in_background(console, "unlock rekey --deep root --max-rate 40M")
            console.sh("sleep 4; systemctl is-active deep")
            console.sh("head -c 3000000 /dev/urandom >/root/more; sync")
            booted.kill()
    with story.boot() as booted:
        console = up(booted)
        done = console.sh("unlock rekey --deep root", timeout=240)
        assert "root has a new volume key" in done.out, done.out + done.err
        assert not requirement(console, ROOT)
        console.sh("sha256sum --quiet -c /root/blob.sum")
        header = json.loads(console.sh(f"cryptsetup luksDump --dump-json-metadata {ROOT}").out)
        assert len(header["digests"]) == len(header["segments"]) == 1 and len(header["keyslots"]) == 2
        give_secrets(console, story)
        for file in RECOVERY, PASSPHRASE:
            console.sh(f"cryptsetup open --test-passphrase --key-file {file} {ROOT}")
        assert console.sh("dmsetup ls").out.count("root") == 1
        booted.poweroff()
    with story.boot() as booted:
        console = up(booted)
        assert set(outcomes(console).values()) == {"opened"}
        assert checked(console)["root"] == "safe"
        booted.kill()
