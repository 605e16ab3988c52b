# SPDX-License-Identifier: Apache-2.0
"""A host with a boot splash: Plymouth has the console, shows what happened, and asks."""

from pathlib import Path

import pytest

from tests.lab import image
from tests.lab.guest import Guest
from tests.lab.machine import Machine
from tests.lab.running import Running
from tests.lab.stories import measured, status, up

pytestmark = [pytest.mark.vm, pytest.mark.long(minutes=8)]

INSTALL = """
echo "deb http://deb.debian.org/debian trixie main" >/tmp/main.list
lists="-o Dir::State::Lists=/tmp/lists -o Dir::Etc::SourceList=/tmp/main.list -o Dir::Etc::SourceParts=/dev/null"
mkdir -p /tmp/lists/partial
apt-get -qq $lists update
DEBIAN_FRONTEND=noninteractive apt-get -qq $lists -o APT::Sandbox::User=root install --no-install-recommends plymouth
rm -rf /tmp/lists /tmp/main.list
"""


def test_plymouth_says_why_and_asks_for_the_recovery_key(tmp_path: Path) -> None:
    """An initramfs with a splash comes in place of the one that was enrolled."""
    story = measured("qemu").clone(tmp_path / "machine")
    splash = image.build(runs="qemu", commands=(INSTALL,)).initrd
    with story.boot(initrd=splash, append="splash") as booted:
        console = answered(booted, story, "cannot unseal: the TPM refuses")
        assert status(console) == {"root": "open", "data": "open"}
        booted.kill()


def answered(booted: Running, story: Machine, why: str) -> Guest:
    """A person mistypes the recovery key once. Plymouth shows the lines of unlock without its name."""
    booted.console.expect("unlock: recovery key:", 600)
    booted.console.send(story.recovery_key[:-1] + str((int(story.recovery_key[-1]) + 1) % 10) + "\r")
    booted.console.expect("group 8 of the recovery key", 120)
    booted.console.expect("unlock: recovery key:", 120)
    booted.console.send(story.recovery_key + "\r")
    console = up(booted)
    lines = booted.console.text.splitlines()
    for told in (why, "group 8 of the recovery key is mistyped"):
        assert any(line.startswith(told) for line in lines), told
    assert "*" * len(story.recovery_key) in booted.console.text, "Plymouth has asked"
    assert story.recovery_key not in booted.console.text
    return console
