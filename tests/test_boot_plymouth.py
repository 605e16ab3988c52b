# SPDX-License-Identifier: Apache-2.0
"""A host with a boot splash: Plymouth has the console, shows what happened, and asks."""

from pathlib import Path

import pytest

from tests.lab import image
from tests.lab.stories import measured, status, up

pytestmark = [pytest.mark.vm, pytest.mark.long]

INSTALL = """
echo "deb http://deb.debian.org/debian trixie main" >/tmp/main.list
lists="-o Dir::State::Lists=/tmp/lists -o Dir::Etc::SourceList=/tmp/main.list -o Dir::Etc::SourceParts=/dev/null"
mkdir -p /tmp/lists/partial
apt-get -qq $lists update
DEBIAN_FRONTEND=noninteractive apt-get -qq $lists -o APT::Sandbox::User=root install --no-install-recommends plymouth
rm -rf /tmp/lists /tmp/main.list
"""
LOG = "/run/plymouth.log"


def test_plymouth_says_what_changed_and_asks_for_the_recovery_key(tmp_path: Path) -> None:
    """An initramfs with a splash comes in place of the one that was enrolled."""
    story = measured().clone(tmp_path / "machine")
    splash = image.build(commands=(INSTALL,)).initrd
    with story.boot(initrd=splash, append=f"splash plymouth.debug=file:{LOG}") as booted:
        booted.console.expect("unlock: recovery key:", 600)
        booted.console.send(story.recovery_key[:-1] + str((int(story.recovery_key[-1]) + 1) % 10) + "\r")
        booted.console.expect("group 8 of the recovery key", 120)
        booted.console.expect("unlock: recovery key:", 120)
        booted.console.send(story.recovery_key + "\r")
        console = up(booted)
        assert status(console) == {"root": "open", "data": "open"}
        told = console.read(LOG).decode("utf-8", "replace")
        for line in ("cannot unseal: the TPM refuses", "group 8 of the recovery key", "unlock: recovery key:"):
            assert line in told
        assert story.recovery_key not in told and story.recovery_key not in booted.console.text
        booted.kill()
