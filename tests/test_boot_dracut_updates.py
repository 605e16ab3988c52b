# SPDX-License-Identifier: Apache-2.0
"""Hosts that boot from their own disks and have dracut: updates, an initramfs made by hand, and what lies beside a
unified kernel image. By QEMU, whose firmware measures. The same of initramfs-tools: test_boot_updates.py."""

import json
import shutil
from pathlib import Path

import pytest

from tests.lab import image, loader
from tests.lab.machine import RECOVERY, Machine
from tests.lab.stories import BACKUP, PASSWORD, findings, take_in_root, up, verdicts
from tests.test_boot_updates import NEW, SAFE, install_kernel, unsealed
from tests.test_boot_updates import home as home

pytestmark = pytest.mark.vm

STUB = (0, 1, 2, 3, 4, 7, 11, 12, 13, 15)
"""PCRs of a unified kernel image without Secure Boot."""
ATTACK = """
cd /boot/efi/EFI/Linux && mkdir "$1.extra.d" && cd "$1.extra.d"
ukify build --cmdline=systemd.hostname=thief --output=thief.addon.efi >&2
echo 'f /run/thief' | systemd-creds encrypt --with-key=null --name=tmpfiles.extra - tmpfiles.extra.cred
echo 'a system extension' >thief.raw
ls
"""
"""What a thief puts beside the image: more of a command line, a credential, an extension."""
ACCEPTED = "--accept unmeasured-boot --accept unmeasured-drivers"


@pytest.mark.long(minutes=35)
def test_an_update_by_grub_and_an_initramfs_that_is_made_by_hand(home: Path) -> None:
    """The power fails before the prediction of the shutdown. What `check` said of that comes true."""
    story = Machine(home, image.build("luks", boots="grub", builder="dracut"))
    with story.boot(limit=3600, cache="writeback") as booted:
        console = take_in_root(booted, story)
        old = install_kernel(console)
        assert findings(console)["verdict"] == NEW[""]
        booted.poweroff(300)
    with story.boot(limit=3600, cache="writeback") as booted:
        console = unsealed(booted)
        assert console.sh("uname -r").out != old
        assert verdicts(findings(console)) == SAFE
        console.sh("echo 'NEW = 1' >>/usr/lib/unlock/unlock/log.py && dracut -f", timeout=1800)
        found = findings(console)
        assert verdicts(found) == {"": "unsafe", "root": "safe"}
        (told,) = [each for each in found["findings"] if each["verdict"] == "unsafe"]
        assert told["what"] == "next boot" and told["do"] == "unlock policy predict"
        assert "the TPM will refuse it: initramfs" in told["detail"]
        booted.kill()
    with story.boot(limit=3600, cache="writeback") as booted:
        booted.console.expect("first     PCR 9: the initramfs changed", 600)
        booted.console.expect("recovery key: ", 60)
        booted.kill()


@pytest.mark.long(minutes=30)
def test_a_unified_kernel_image_by_dracut_and_what_a_thief_puts_beside_it(home: Path) -> None:
    """The first image is ukify's; the next, by the hook of a kernel's package, dracut makes for this host alone. A
    policy without PCRs 4, 12 and 13 releases the key to the thief's additions, and systemd obeys them."""
    story = Machine(
        home,
        image.build("luks", boots="uki", builder="dracut", programs=" binutils", commands=(loader.BY_DRACUT,)),
    )
    shutil.copyfile(loader.VARIABLES["uki"], home / "vars.fd")
    with loader.variables(home / "vars.fd") as firmware:  # else a thief's credentials and add-ons are not obeyed
        firmware.set_bool("SecureBootEnable", False)
    with story.boot(limit=3600) as booted:
        console = take_in_root(booted, story)
        shown = json.loads(console.sh("unlock policy show --json").out)
        assert tuple(shown["pcrs"]) == STUB
        old = install_kernel(console)
        assert findings(console)["verdict"] == NEW[""]
        booted.poweroff(300)
    with story.boot(limit=3600) as booted:
        console = unsealed(booted)
        new = console.sh("uname -r").out
        assert new != old
        assert verdicts(findings(console)) == SAFE
        assert "etc/crypttab" in console.sh(f"lsinitrd /boot/efi/EFI/Linux/debian-{new}.efi", timeout=300).out
        console.sh(f"set -- debian-{new}.efi\n{ATTACK}", timeout=300)
        found = findings(console)
        assert found["verdict"] == "unsafe" and "add-ons or credentials beside it" in json.dumps(found)
        booted.poweroff(300)  # the prediction at shutdown allows none of it
    with story.boot(limit=3600) as booted:
        booted.console.expect("first     PCR 4: a credential, add-on or extension image beside the kernel", 600)
        booted.console.expect("recovery key: ", 60)
        booted.console.send(story.recovery_key + "\n")
        console = up(booted)
        causes = json.loads(console.sh("unlock explain --json").out)["causes"]
        assert {each["pcr"] for each in causes} == {4, 12, 13}  # the stub has the firmware load an add-on
        console.write(RECOVERY, (story.recovery_key + "\n").encode(), 0o600)
        console.write("/run/password", PASSWORD.encode(), 0o600)
        files = f"--recovery-key-file {RECOVERY} --backup {BACKUP} --backup-password-file /run/password"
        console.sh(f"unlock rebind {files} --pcrs 7,11 {ACCEPTED}", timeout=300)
        booted.poweroff(300)
    with story.boot(limit=3600) as booted:  # without the defence
        console = unsealed(booted)
        assert console.sh("hostname; ls /run/thief").out.split() == ["thief", "/run/thief"]
        booted.kill()
