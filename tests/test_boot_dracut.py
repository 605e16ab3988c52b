# SPDX-License-Identifier: Apache-2.0
"""The boot stories and attacks of other files on a host whose initramfs dracut makes, and those that only an initramfs
with systemd has. More of them, which take their turns: test_boot_dracut_more.py."""

import json
import shutil
import time
from collections.abc import Iterator
from hashlib import sha256
from pathlib import Path

import pytest

from tests.lab import attacks
from tests.lab.image import LUKS_UUID, PATIENT
from tests.lab.machine import Machine, noted_in, report
from tests.lab.running import Disk, Running
from tests.lab.stories import begun, measured, open_shell, pcr, status, unmeasured, unseal_as_root, up
from tests.lab.uml.machine import Uml
from tests.test_boot_attacks import TRY, give_recovery_key
from tests.test_boot_good import (  # noqa: F401 - played here on the machine below
    test_a_host_boots_offline,
    test_an_edited_command_line_is_refused_and_the_recovery_key_still_opens_everything,
)
from tests.test_boot_plymouth import answered
from tests.test_boot_silence import ALTERED
from tests.test_boot_unmeasured import (  # noqa: F401
    firmware,
    test_a_unit_in_the_firmwares_credentials_does_not_run_on_an_open_host,
)
from tests.test_disk import edit
from unlock.boot.unmeasured import OPTIONS

pytestmark = pytest.mark.vm

WITH_MEASUREMENTS = ("tests.test_boot_good", "tests.test_boot_pin", "tests.test_boot_rebind")
"""Files whose stories play on a machine whose firmware measures."""
MODULE = "usr/lib/dracut/modules.d/90unlock"
UNGUARDED = ((f"{MODULE}/shell.conf", "ExecStartPre=/usr/lib/unlock/early shell\n", ""),)
"""Shells open as they always did."""
UNSEEN = (
    (f"{MODULE}/init", "if [ -e /sys/firmware/efi/efivars/Sys", "if false && [ -e /sys/firmware/efi/efivars/Sys"),
    ("usr/lib/unlock/unlock/boot/agent.py", "(found := close_channels(paths))", "(found := '')"),
)
"""Nobody looks at what systemd obeys beside the command line."""
EARLY_SHELLS, LATE_SHELLS = ("cmdline", "pre-udev", "pre-trigger"), ("initqueue", "pre-mount", "mount", "pre-pivot")
"""Of rd.break=, before and after the disks are there."""
STOCK = "passphrase for disk"
SEPARATOR = """#!/bin/sh
units=/run/systemd/system
mkdir -p $units/sysinit.target.wants
cat >$units/systemd-pcrosseparator.service <<'END'
[Unit]
DefaultDependencies=no
ConditionPathExists=/etc/initrd-release
Before=cryptsetup-pre.target sysinit.target
[Service]
Type=oneshot
RemainAfterExit=yes
ExecStart=/usr/bin/python3 -I /run/separator
END
ln -s ../systemd-pcrosseparator.service $units/sysinit.target.wants/
cat >/run/separator <<'END'
import sys
sys.path.insert(0, "/usr/lib/unlock")
from hashlib import sha256
from unlock.tpm.chip import Tpm
with Tpm() as chip:
    for pcr in (0, 1, 2, 3, 4, 5, 6, 7, 9, 12, 13, 14):
        chip.extend(pcr, sha256(b"os-separator").digest())
END
"""
"""What systemd 261 does in an initramfs of its own."""
FORCE = "SYSTEMD_SULOGIN_FORCE=1"
"""dracut's shells open although root has no password."""
EMERGENCY = f"rd.systemd.unit=emergency.target {FORCE} systemd.setenv={FORCE}"


@pytest.fixture
def story(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Machine]:
    """A clone of the enrolled machine; of that which the test's own file has."""
    enrolled = measured if request.function.__module__ in WITH_MEASUREMENTS else unmeasured
    yield enrolled(builder="dracut").clone(tmp_path / "machine")
    shutil.rmtree(tmp_path / "machine", ignore_errors=True)


def in_shell(booted: Running, command: str) -> str:
    """What a command prints in the shell, which is at its prompt."""
    booted.console.send(f'{command} >/run/lab.out 2>&1; echo "<$(cat /run/lab.out)>"\n')
    said = booted.console.expect(r"^<((.|\n)*?)>", 60)[1].strip()
    booted.console.expect("# ", 60)
    return said


def test_no_shell_of_dracut_can_unseal_and_no_image_is_resumed(story: Machine) -> None:
    """The first ends the agent, so a person opens the disks."""
    story.disks = {"swap": Disk("swap.raw", "swap")}
    swap = bytearray(64 << 20)
    swap[4086:4096] = b"SWAPSPACE2"
    swap[1024:1036] = (1).to_bytes(4, "little") + ((64 << 20) // 4096 - 1).to_bytes(4, "little") + bytes(4)
    (story.home / "swap.raw").write_bytes(swap)
    breaks = " ".join(f"rd.break={name}" for name in (*EARLY_SHELLS, *LATE_SHELLS))
    with story.boot(append=f"{FORCE} {breaks} resume={story.disks['swap'].device}") as booted:
        for name in (*EARLY_SHELLS, *LATE_SHELLS):
            if name == LATE_SHELLS[0]:
                give_recovery_key(booted, story)
            open_shell(booted)
            assert in_shell(booted, TRY) == "pcr-mismatch", name
            assert in_shell(booted, "grep -c unlock: /proc/keys") == "0", name
            booted.console.send("exit\n")
        console = up(booted)
        assert report(console)["verdict"] != "no-slot"
        assert status(console)["root"] == "open"
        assert unseal_as_root(console) == "pcr-mismatch"
        assert "no resume from /dev/disk/by-id/lab-swap" in booted.console.text
        assert STOCK not in booted.console.text
        booted.kill()


def test_what_the_tpm_opened_is_closed_before_the_last_shell(story: Machine) -> None:
    with story.boot(append=f"{FORCE} rd.break=pre-pivot") as booted:
        open_shell(booted)
        assert in_shell(booted, "cat /run/unlock/verdict") == "unsealed"
        assert in_shell(booted, TRY) == "pcr-mismatch"
        assert in_shell(booted, "ls /dev/mapper") == "control"
        assert in_shell(booted, "grep -c ' /sysroot ' /proc/mounts") == "0"
        assert in_shell(booted, "test -e /run/unlock/scrubbed && echo scrubbed") == "scrubbed"
        assert in_shell(booted, "grep -c unlock: /proc/keys") == "0"
        booted.kill()
    with story.boot(append=f"{FORCE} rd.break=pre-pivot", initrd=story.image.initramfs({}, UNGUARDED)) as booted:
        open_shell(booted)
        assert "root" in in_shell(booted, "ls /dev/mapper").split()
        booted.kill()


@pytest.mark.long(minutes=4)
def test_a_root_disk_that_comes_late_with_crypttab_in_the_image_and_nobody_asks_without(story: Machine) -> None:
    """Without rd.luks.*, crypttab is what systemd-cryptsetup goes by; with neither, no prompt but unlock's own is
    promised. That comes in the place of a replaced TPM too."""
    cmdline = story.image.cmdline.partition(" rd.luks")[0]
    initrd = story.image.initramfs({"dracut.conf.d/crypttab.conf": 'install_items+=" /etc/crypttab "\n'})
    with story.boot(cmdline=cmdline, initrd=initrd, root_later=True, append=PATIENT) as booted:
        assert isinstance(booted, Uml)
        booted.console.expect("group pair: open", 120)
        time.sleep(8)
        booted.plug_root()
        console = up(booted)
        assert report(console)["verdict"] == "unsealed"
        assert set(status(console).values()) == {"open"}
        assert "recovery key" not in booted.console.text and STOCK not in booted.console.text
        assert unseal_as_root(console) == "pcr-mismatch"
        booted.poweroff()
    with story.boot(cmdline=cmdline, tpm="another") as booted:
        booted.console.expect("Enter alone to give up: no other prompt follows", 300)
        give_recovery_key(booted, story)
        console = begun(booted)
        assert (report(console)["verdict"], status(console)["root"]) == ("no-slot", "open")
        assert STOCK not in booted.console.text
        booted.kill()


@pytest.mark.long(minutes=3)
def test_a_root_disk_that_comes_after_the_recovery_key_is_asked_for_by_unlock_again(story: Machine) -> None:
    """A stock prompt in its place would open any disk that somebody plugs in."""
    with story.boot(tpm="another", root_later=True, append=PATIENT) as booted:
        assert isinstance(booted, Uml)
        give_recovery_key(booted, story)
        booted.console.expect("group pair: open", 120)
        time.sleep(5)  # the prompt looks for disks as long as there is one to open
        booted.plug_root()
        give_recovery_key(booted, story)
        console = begun(booted)
        assert status(console)["root"] == status(console)["pair"] == "open"
        console.sh("test -e /run/unlock/authentic")
        assert STOCK not in booted.console.text
        booted.kill()


@pytest.mark.long(minutes=3)
def test_plymouth_of_dracut_says_why_and_asks_for_the_recovery_key(tmp_path: Path) -> None:
    story = unmeasured(builder="dracut", programs=" plymouth").clone(tmp_path / "machine")
    with story.boot(tpm="another", append="splash") as booted:
        console = answered(booted, story, "the TPM was cleared, or is another one")
        assert status(console)["root"] == "open"
        booted.kill()


@pytest.mark.long(minutes=4)
def test_systemds_separator_comes_after_the_unseal_and_a_policy_is_sealed_to_what_was_noted(story: Machine) -> None:
    with story.boot(initrd=story.image.initramfs({"scripts/init-top/separator": SEPARATOR})) as booted:
        console = up(booted)
        assert report(console)["verdict"] == "unsealed"
        noted = dict(map(str.split, console.read("/run/unlock/pcrs").decode().splitlines()))
        separated = sha256(bytes.fromhex(noted["7"]) + sha256(b"os-separator").digest()).hexdigest()
        assert pcr(console, 7).lower() == separated
        assert pcr(console, 8).lower() == noted["8"]
        shown = json.loads(console.sh("unlock policy show --json").out)
        assert [each["this_boot"] for each in shown["states"]] == [True]
        console.sh("unlock policy set --pcrs 7,9", timeout=120)
        booted.poweroff()
    # a name that systemd makes up; the disk is open under its own
    cmdline = story.image.cmdline.replace(f"rd.luks.name={LUKS_UUID}=root", f"rd.luks.uuid={LUKS_UUID}")
    with story.boot(cmdline=cmdline) as booted:
        assert report(begun(booted))["verdict"] == "unsealed"
        assert f"its disk is open as root: not opened as luks-{LUKS_UUID}" in booted.console.text
        assert STOCK not in booted.console.text
        assert noted_in(booted) == ["PCR_Read", "PCR_Read"]
        booted.kill()


def test_shells_of_systemd_do_not_unseal(story: Machine) -> None:
    """The emergency target starts nothing of ours before its shell."""
    with story.boot(append=EMERGENCY) as booted:
        open_shell(booted)
        assert in_shell(booted, TRY) == "pcr-mismatch"
        booted.console.send("exit\n")
        give_recovery_key(booted, story)
        assert unseal_as_root(begun(booted)) == "pcr-mismatch"
        booted.kill()
    with story.boot(append="rd.systemd.debug_shell=ttyS0") as booted:
        console = begun(booted)  # there is none in the initramfs
        assert report(console)["verdict"] == "unsealed"
        assert "Started debug-shell" not in console.sh("journalctl -b -u debug-shell --no-pager").out
        assert unseal_as_root(console) == "pcr-mismatch"
        booted.kill()
    with story.boot(append=EMERGENCY, initrd=story.image.initramfs({}, UNGUARDED)) as booted:
        open_shell(booted)
        assert in_shell(booted, TRY) == "UNSEALED"
        booted.kill()


def test_systemds_options_in_an_efi_variable_give_no_shell_of_the_initramfs(story: Machine) -> None:
    variable = f"/sys/firmware/efi/efivars/{OPTIONS}"
    files = firmware(b"\7\0\0\0" + f"{EMERGENCY}\0".encode("utf-16-le"), variable)
    with story.boot(initrd=story.image.initramfs(files)) as booted:
        console = up(booted)
        assert "the EFI variable SystemdOptions was deleted" in booted.console.text
        console.sh(f"test ! -e {variable}")
        assert report(console)["verdict"] == "unsealed"
        assert set(status(console).values()) == {"open"}
        booted.kill()
    with story.boot(initrd=story.image.initramfs(files, (*UNSEEN, *UNGUARDED)), append=FORCE) as booted:
        open_shell(booted)
        assert in_shell(booted, TRY) == "UNSEALED"
        booted.kill()


def test_plain_text_without_a_token_is_told_and_no_stock_prompt_comes(story: Machine) -> None:
    attacks.plaintext_root(story)
    edit(str(story.home / "root.raw"), lambda fields: fields["tokens"].clear())
    with story.boot(append=FORCE) as booted:
        booted.console.expect(ALTERED, 300)
        booted.console.expect("Enter alone to give up", 60)
        give_recovery_key(booted, story)
        booted.console.expect("another header than this host wrote", 120)
        open_shell(booted)
        assert in_shell(booted, TRY) == "pcr-mismatch"
        assert in_shell(booted, "ls /dev/mapper") == "control"
        booted.console.send("exit\n")
        booted.console.expect("Press Enter for .*maintenance", 240)
        assert STOCK not in booted.console.text
        booted.kill()


def test_a_plain_root_in_the_place_of_the_hosts_own_is_told_before_it_starts(story: Machine) -> None:
    """Without rd.luks.name: nothing but the TPM says what the root needs."""
    story.replace_root(attacks.plain_system(story))
    cmdline = story.image.cmdline.replace("/dev/mapper/root", f"UUID={attacks.FS_UUID}").partition(" rd.luks")[0]
    with story.boot(cmdline=cmdline, append=FORCE) as booted:
        booted.console.expect("not on the disk that this host keeps it on", 300)
        open_shell(booted)
        assert in_shell(booted, TRY) == "pcr-mismatch"
        booted.kill()
