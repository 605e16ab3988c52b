# SPDX-License-Identifier: Apache-2.0
"""A host that boots by shim and GRUB is updated with the distribution's own tools, and boots on; offline."""

import json
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.lab.guest import Guest
from tests.lab.machine import Machine, report
from tests.lab.stories import by_grub, checked, up

pytestmark = pytest.mark.vm

DOWN, ENTER = "\x1b[B", "\r"


@pytest.fixture
def story(tmp_path: Path) -> Iterator[Machine]:
    yield by_grub().clone(tmp_path / "machine")
    shutil.rmtree(tmp_path / "machine", ignore_errors=True)


def why(console: Guest) -> list[str]:
    return [each["why"] for each in json.loads(console.sh("unlock policy show --json").out)["states"]]


def test_kernel_initramfs_command_line_and_menu_are_updated_and_a_thief_is_not(story: Machine) -> None:
    """A kernel package, then another command line with update-grub by hand, which no hook sees but shutdown's. The new
    kernel boots; the old one does too, from the submenu; what a thief writes into grub.cfg does not, and is named."""
    with story.boot() as booted:
        console = up(booted)
        assert report(console)["verdict"] == "unsealed"
        old = console.sh("uname -r").out
        done = console.sh("dpkg -i /usr/lib/lab/linux-image.deb", timeout=900)
        assert "next boot: kernel 6.12." in done.err and "is predicted" in done.err
        assert len([each for each in why(console) if each.startswith("predicted: kernel")]) >= 2
        again = json.loads(console.sh("unlock policy predict --json", timeout=120).out)
        assert again["entries"][0]["predicted"] and again["entries"][0]["default"]
        console.sh("sed -i 's/CMDLINE_LINUX=\"/&audit=0 /' /etc/default/grub && update-grub", timeout=300)
        assert checked(console) == {"": "unsafe", "root": "safe"}  # no hook has seen that
        booted.poweroff(300)
    with story.boot() as booted:
        console = up(booted)
        assert report(console)["verdict"] == "unsealed"
        assert checked(console) == {"": "safe", "root": "safe"}
        assert console.sh("uname -r").out != old
        assert "audit=0" in console.read("/proc/cmdline").decode()
        assert "recovery" not in booted.console.text.partition("Loading Linux")[2]
        booted.poweroff(300)
    with story.boot() as booted:
        booted.console.expect("Advanced options", 300)
        booted.console.send(DOWN + ENTER)
        booted.console.expect("recovery mode", 60)
        booted.console.send(DOWN + DOWN + ENTER)
        console = up(booted)
        assert report(console)["verdict"] == "unsealed"
        assert console.sh("uname -r").out == old
        console.sh("sed -i s/audit=0/audit=1/ /boot/grub/grub.cfg; sync; reboot -f >/dev/null 2>&1 &")
        booted.wait(120)
    with story.boot() as booted:
        booted.console.expect("cannot unseal: .*PCR", 600)
        booted.console.expect("recovery key: ", 60)
        booted.console.send(story.recovery_key + "\n")
        console = up(booted)
        causes = {each["code"] for each in json.loads(console.sh("unlock explain --json").out)["causes"]}
        assert causes & {"boot-loader-config", "command-line"}
        refused = console.sh("unlock policy predict", check=False)
        assert refused.code == 3 and "none that the TPM allows" in refused.err
