# SPDX-License-Identifier: Apache-2.0
"""Boots in which systemd would obey more than the measured command line, each also without its defence."""

import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.lab.guest import Guest
from tests.lab.machine import Machine, report
from tests.lab.stories import begun, open_shell, status, unmeasured, up
from tests.lab.uml.files import FIRST
from unlock.boot.unmeasured import OPTIONS

pytestmark = pytest.mark.vm

AGENT = "usr/lib/unlock/unlock/boot/agent.py"
BLIND = ((AGENT, "(found := close_channels(paths))", "(found := '')"),)
EMERGENCY = "systemd.unit=emergency.target systemd.setenv=SYSTEMD_SULOGIN_FORCE=1"
UNIT = "io.systemd.credential:systemd.extra-unit.thief.service=[Service]\\nExecStart=/bin/touch /run/thief\\n"


@pytest.fixture
def story(tmp_path: Path) -> Iterator[Machine]:
    """A clone of the enrolled machine, whose firmware measures nothing."""
    yield unmeasured().clone(tmp_path / "machine")
    shutil.rmtree(tmp_path / "machine", ignore_errors=True)


def firmware(content: bytes, path: str) -> dict[str, str]:
    """An initramfs with such a file, as the firmware would have it."""
    octal = "".join(f"\\{byte:03o}" for byte in content)
    shown = f"mount -t tmpfs firmware /sys/firmware\nmkdir -p /sys/firmware/acpi/tables {Path(path).parent}\n"
    shown += f"printf '{octal}' >{path}\n"
    before = "mount -t tmpfs firmware /sys/firmware\nmkdir -p /sys/firmware/acpi/tables\n"
    assert before in FIRST
    return {"scripts/init-top/lab-first": FIRST.replace(before, shown)}


def test_systemds_options_in_an_efi_variable_give_no_shell(story: Machine) -> None:
    variable = f"/sys/firmware/efi/efivars/{OPTIONS}"
    files = firmware(b"\7\0\0\0" + f"{EMERGENCY}\0".encode("utf-16-le"), variable)
    with story.boot(initrd=story.image.initramfs(files)) as booted:
        console = up(booted)
        assert "the EFI variable SystemdOptions was deleted" in booted.console.text
        console.sh(f"test ! -e {variable}")
        assert report(console)["verdict"] == "unsealed"
        assert set(status(console).values()) == {"open"}
        booted.kill()
    with story.boot(initrd=story.image.initramfs(files, BLIND)) as booted:  # without the defence
        open_shell(booted)
        booted.console.send("echo uid=$(id -u) $(cat /run/unlock/verdict)\n")
        booted.console.expect("uid=0 unsealed", 30)
        booted.kill()


def test_a_unit_in_the_firmwares_credentials_does_not_run_on_an_open_host(story: Machine) -> None:
    table = b"\x0b\x05\x00\x00\x01" + UNIT.encode() + b"\0\0"
    files = firmware(table, "/sys/firmware/dmi/tables/DMI")
    with story.boot(initrd=story.image.initramfs(files)) as booted:
        booted.console.expect("gives systemd credentials .systemd.extra-unit.thief.service", 120)
        booted.console.expect("recovery key: ", 120)
        booted.console.send(story.recovery_key + "\n")  # who types it has been told
        console = begun(booted)
        assert report(console)["verdict"] == "unmeasured-input"
        assert "firmware's setup" in console.sh("unlock explain", check=False).out
        booted.kill()
    with story.boot(initrd=story.image.initramfs(files), append="systemd.import_credentials=no") as booted:
        console = up(booted)
        assert report(console)["verdict"] == "unsealed"
        booted.kill()


GIVEN = (
    *("-smbios", "type=11,value=io.systemd.credential:tmpfiles.extra=f /run/thief"),
    *("-fw_cfg", "name=opt/io.systemd.credentials/sysctl.extra,string=kernel.domainname=thief"),
)
"""QEMU's options by which systemd makes a file, and changes a setting of the kernel."""


def obeyed(console: Guest) -> list[str]:
    """What systemd has done of it."""
    return console.sh("ls -d /run/thief; cat /proc/sys/kernel/domainname", check=False).out.split()


@pytest.mark.long(minutes=10)
def test_what_smbios_and_fw_cfg_give_systemd_does_not_run_on_an_open_host(tmp_path: Path) -> None:
    """By the real firmware of QEMU. Without the defence systemd obeys both on a host whose disks are open."""
    story = unmeasured("qemu").clone(tmp_path / "machine")
    seen = story.image.cmdline.replace(",qemu_fw_cfg", "")
    assert seen != story.image.cmdline
    with story.boot(extra=GIVEN, cmdline=seen) as booted:
        booted.console.expect("recovery key: ", 600)
        told = booted.console.text
        assert "tmpfiles.extra" in told and "sysctl.extra" in told
        booted.kill()
    with story.boot(extra=GIVEN, cmdline=seen, append="systemd.import_credentials=no") as booted:
        console = up(booted)
        assert (report(console)["verdict"], obeyed(console)) == ("unsealed", ["(none)"])
        booted.kill()
    with story.boot(extra=GIVEN, cmdline=seen, initrd=story.image.initramfs({}, BLIND)) as booted:
        console = up(booted)
        assert report(console)["verdict"] == "unsealed"
        assert obeyed(console) == ["/run/thief", "thief"]
        booted.kill()
