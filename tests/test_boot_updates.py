# SPDX-License-Identifier: Apache-2.0
"""Hosts that boot from their own disks are updated with the distribution's own tools, and boot on; offline, with no
prompt. Each is enrolled and updated in its first boot, whose root disk opens by its passphrase."""

import json
import re
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.lab import image, loader
from tests.lab.guest import Guest
from tests.lab.loader import Kind
from tests.lab.machine import Machine, report
from tests.lab.running import Running
from tests.lab.stories import CAPPED, MEASURED, UNMEASURED, checked, pcr, replayed, take_in_root, unseal_as_root, up

pytestmark = pytest.mark.vm

DOWN, ENTER = "\x1b[B", "\r"
OWNER = "605dab50-e046-4300-abb6-3dd810dd8b23"
"""Of a key or a hash in the firmware's lists: shim's GUID, here."""
SECURE_BOOT = "/sys/firmware/efi/efivars/SecureBoot-8be4df61-93ca-11d2-aa0d-00e098032b8c"
SAFE = {"": "safe", "root": "safe"}
NEW = {"": "unproven", "root": "safe"}
"""What `check` says in the boot in which the host was initialised: the TPM has not been asked yet."""
INSTALL = "DEBIAN_FRONTEND=noninteractive apt-get -qq install /usr/lib/lab/linux-image.deb"


@pytest.fixture
def home(tmp_path: Path) -> Iterator[Path]:
    yield tmp_path / "machine"
    shutil.rmtree(tmp_path / "machine", ignore_errors=True)


def host(home: Path, boots: Kind, secure: bool = False) -> Machine:
    return Machine(home, image.build("luks", boots=boots), secure=secure)


def install_kernel(console: Guest) -> str:
    """The kernel that ran until now."""
    old = console.sh("uname -r").out
    assert console.sh("ls /lib/modules").out == old
    said = console.sh(f"{INSTALL} 2>&1", timeout=1200).out
    assert "unlock: next boot: " in said and "is predicted" in said, said
    assert any(each.startswith("predicted: ") for each in allowed(console))
    again = json.loads(console.sh("unlock policy predict --json", timeout=600).out)
    assert all(each["predicted"] for each in again["entries"])
    return old


def allowed(console: Guest) -> list[str]:
    """Why the TPM allows each of its states."""
    return [each["why"] for each in json.loads(console.sh("unlock policy show --json").out)["states"]]


def unsealed(booted: Running) -> Guest:
    """Waits for a boot in which nobody was asked for anything."""
    console = up(booted)
    assert report(console)["verdict"] == "unsealed"
    assert "recovery key" not in booted.console.text
    assert replayed(console) >= MEASURED
    assert unseal_as_root(console) == "pcr-mismatch"
    return console


@pytest.mark.long(minutes=12)
@pytest.mark.parametrize("secure", [False, True], ids=["", "under Secure Boot"])
def test_an_update_by_grub(home: Path, secure: bool) -> None:
    """A kernel package, then another command line with update-grub by hand, which no hook sees but shutdown's. The new
    kernel boots; the old one does too, from the submenu."""
    story = host(home, "grub", secure)
    with story.boot(limit=1800) as booted:
        console = taken_in(booted, story)
        old = install_kernel(console)
        console.sh("sed -i 's/CMDLINE_LINUX=\"/&audit=0 /' /etc/default/grub && update-grub", timeout=300)
        assert checked(console) == {"": "unsafe", "root": "safe"}  # no hook has seen that
        booted.poweroff(300)
    with story.boot() as booted:
        console = unsealed(booted)
        assert console.sh("uname -r").out != old
        assert "audit=0" in console.read("/proc/cmdline").decode()
        assert checked(console) == SAFE
        booted.poweroff(300)
    with story.boot() as booted:
        booted.console.expect("Advanced options", 300)
        booted.console.send(DOWN + ENTER)
        booted.console.expect("recovery mode", 60)
        booted.console.send(DOWN + DOWN + ENTER)
        assert unsealed(booted).sh("uname -r").out == old
        booted.kill()


@pytest.mark.long(minutes=9)
@pytest.mark.parametrize("secure", [False, True], ids=["", "under Secure Boot"])
def test_what_a_thief_writes_into_grub_cfg_is_named_and_gets_no_key(home: Path, secure: bool) -> None:
    """Then a key for shim, which the host's owner has not put there."""
    story = host(home, "grub", secure)
    with story.boot(limit=1800, cache="writeback") as booted:
        console = taken_in(booted, story)
        booted.poweroff(300)
    with story.boot(cache="writeback") as booted:
        console = unsealed(booted)
        console.sh("sed -i '/^[[:space:]]*linux/s/panic=-1/break=mount/' /boot/grub/grub.cfg; sync")
        booted.kill()
    with story.boot() as booted:
        console = recovered_in_the_shell(booted, story)
        causes = {each["code"] for each in json.loads(console.sh("unlock explain --json").out)["causes"]}
        assert causes & {"boot-loader-config", "command-line"}
        refused = console.sh("unlock policy predict", check=False)
        assert refused.code == 3 and "none that the TPM allows" in refused.err
        booted.poweroff(300)
    with loader.variables(story.home / "vars.fd") as firmware:
        firmware.add_cert("MokList", OWNER, str(loader.KEYS / "PkKek-1-snakeoil.pem"))
    with story.boot() as booted:  # shim measures its keys before GRUB is there
        booted.console.expect("first     PCR 14: the Machine Owner Keys", 600)
        booted.kill()


def taken_in(booted: Running, story: Machine) -> Guest:
    console = take_in_root(booted, story)
    assert console.sh(f"tail -c 1 {SECURE_BOOT}").stdout == (b"\1" if story.secure else b"\0")
    return console


def recovered_in_the_shell(booted: Running, story: Machine) -> Guest:
    """The shell of break=mount, which may come before the agent has asked the TPM: a screen that says what differs; a
    mistyped key, then the right one; exit boots on."""

    def typed(command: str) -> str:
        booted.console.send(f"{command}\n")
        return booted.console.expect(r"((.|\n)*?)\(initramfs\) ", 120)[1]

    booted.console.expect(r"\(initramfs\) ", 600)
    screen = booted.console.text
    shown = screen[screen.rindex("boot      ") :].splitlines()
    assert len(shown) <= 24 and all(len(line) <= 80 for line in shown)
    assert "pcr-mismatch" in shown[0] or "no report" in shown[0]
    assert "first     PCR 9: the boot loader's configuration changed" in shown
    assert any("unlock open --recovery" in line for line in shown)
    assert CAPPED.lower() in typed("cat /sys/class/tpm/tpm0/pcr-sha256/15").lower()
    assert re.search("root +root +(no-key|closed)", typed("unlock status"))
    said = typed("unlock explain")
    assert "PCR 8" in said and "break=mount" in said
    assert "TPM is locked" in typed("unlock open")
    booted.console.send("unlock open --recovery\n")
    booted.console.expect("recovery key: ", 60)
    wrong = story.recovery_key[:-1] + str((int(story.recovery_key[-1]) + 1) % 10)
    booted.console.send(wrong + "\n")
    booted.console.expect("group 8 of the recovery key is mistyped", 60)
    booted.console.expect(r"\(initramfs\)", 60)
    booted.console.send("unlock open --recovery\n")
    booted.console.expect("recovery key: ", 60)
    booted.console.send(story.recovery_key + "\n")
    booted.console.expect('"exit" goes on booting', 120)
    booted.console.expect(r"\(initramfs\)", 60)
    assert "open" in typed("unlock status")
    booted.console.send("exit\n")
    console = up(booted)
    assert story.recovery_key not in booted.console.text
    assert pcr(console, 15) == CAPPED
    assert unseal_as_root(console) == "pcr-mismatch"
    assert console.sh("keyctl list @u; true").out.count("unlock:") == 0
    return console


@pytest.mark.long(minutes=12)
def test_an_update_of_a_unified_kernel_image_under_secure_boot(home: Path) -> None:
    """kernel-install makes and signs an image of the new kernel, systemd-boot starts it by itself, and the old one
    once, when it is told to."""
    story = host(home, "uki")
    with story.boot(limit=2400) as booted:
        console = take_in_root(booted, story)
        assert "enabled" in console.sh("bootctl status 2>/dev/null | grep -m 1 'Secure Boot'").out
        old = install_kernel(console)
        assert checked(console) == NEW
        booted.poweroff(300)
    with story.boot() as booted:
        console = unsealed(booted)
        assert console.sh("uname -r").out != old
        assert checked(console) == SAFE
        console.sh(f"bootctl set-oneshot debian-{old}.efi")
        booted.poweroff(300)
    with story.boot() as booted:
        console = unsealed(booted)
        assert console.sh("uname -r").out == old
        booted.kill()


@pytest.mark.long(minutes=9)
def test_a_revocation_and_secure_boot_switched_off_are_told_at_the_prompt(home: Path) -> None:
    story = host(home, "uki")
    with story.boot(limit=1800) as booted:
        take_in_root(booted, story)
        booted.poweroff(300)
    with loader.variables(story.home / "vars.fd") as firmware:
        firmware.add_hash("dbx", OWNER, "ab" * 32)
    refused(story, "PCR 7: the Secure Boot revocation list (dbx) changed")
    with loader.variables(story.home / "vars.fd") as firmware:
        firmware.set_bool("SecureBootEnable", False)
    refused(story, "PCR 7: Secure Boot was switched off")


def refused(story: Machine, first: str) -> None:
    with story.boot() as booted:
        booted.console.expect("recovery key: ", 600)
        assert f"first     {first}" in booted.console.text
        booted.kill()


@pytest.mark.long(minutes=11)
def test_an_update_of_a_kernel_that_the_firmware_starts(home: Path) -> None:
    """Its files on the EFI system partition are replaced with each update; then by one that changes only unlock. The
    initramfs is the one that `initrd=` names, which Linux does not measure."""
    story = host(home, "direct")
    with story.boot(limit=1800) as booted:
        console = take_in_root(booted, story, UNMEASURED)
        old = install_kernel(console)
        assert checked(console) == NEW
        booted.poweroff(300)
    with story.boot() as booted:
        console = unsealed(booted)
        assert console.sh("uname -r").out != old
        before = console.sh("sha256sum /boot/efi/EFI/debian/*").out.split()
        console.sh("echo 'NEW = 1' >>/usr/lib/unlock/unlock/log.py && update-initramfs -u", timeout=600)
        after = console.sh("sha256sum /boot/efi/EFI/debian/*").out.split()
        assert [a == b for a, b in zip(before[::2], after[::2], strict=True)] == [False, True]
        booted.poweroff(300)
    with story.boot() as booted:
        assert checked(unsealed(booted)) == SAFE
        booted.kill()
