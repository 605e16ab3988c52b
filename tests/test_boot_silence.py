# SPDX-License-Identifier: Apache-2.0
"""A root disk without its token, which looks like one that unlock never had; each boot also without its defence."""

import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.lab import attacks
from tests.lab.machine import Machine
from tests.lab.stories import begun, measured, unmeasured
from tests.test_disk import edit

pytestmark = pytest.mark.vm

CODE = "usr/lib/unlock/unlock"
UNTOLD = ((f"{CODE}/host/needed.py", 'with open(paths.of_this_boot("needs"), enc', 'with open("/none", enc'),)
"""Nobody hears what the TPM says of the root."""
ALTERED = "its header is not the one that this host wrote: it has no unlock token"


@pytest.fixture(params=["unsealed", "refused"])
def story(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Machine]:
    """A clone of an enrolled machine, with the thief's system in plain text behind genuine keyslots. Its firmware
    measures nothing, or another command line than before."""
    machine = (unmeasured() if request.param == "unsealed" else measured()).clone(tmp_path / "machine")
    attacks.plaintext_root(machine)
    edit(str(machine.home / "root.raw"), lambda fields: fields["tokens"].clear())
    yield machine
    shutil.rmtree(tmp_path / "machine", ignore_errors=True)


def test_plain_text_without_a_token_is_told_and_no_stock_prompt_comes(story: Machine) -> None:
    shell = story.image.cmdline.replace("panic=-1", "")
    with story.boot(cmdline=shell) as booted:
        booted.console.expect(ALTERED, 300)
        booted.console.expect("Enter alone to give up", 60)
        booted.console.expect("recovery key: ", 60)
        booted.console.send(story.recovery_key + "\n")
        booted.console.expect("another header than this host wrote", 120)
        booted.console.expect(r"\(initramfs\)", 60)
        booted.console.send("exit\n")
        booted.console.expect(r"\(initramfs\)", 240)
        assert ("cannot unseal" in booted.console.text) == story.uefi
        assert "unlock disk" not in booted.console.text
        booted.kill()


def test_it_would_start_by_the_recovery_key_if_the_tpm_did_not_say_what_the_root_needs(story: Machine) -> None:
    with story.boot(initrd=story.image.initramfs({}, UNTOLD)) as booted:
        if story.uefi:  # for the data's sake
            booted.console.expect("recovery key: ", 300)
            booted.console.send(story.recovery_key + "\n")
        booted.console.expect("unlock disk root", 300)
        assert ALTERED not in booted.console.text
        booted.console.send(story.recovery_key + "\n")
        begun(booted).sh(f"test -e /etc/{attacks.MARK}")
        booted.kill()


def test_a_plain_root_in_the_place_of_the_hosts_own_is_told_before_it_starts(tmp_path: Path) -> None:
    """The command line names the root by the UUID of a file system, which anybody can give his own."""
    machine = unmeasured().clone(tmp_path / "machine")
    machine.replace_root(attacks.plain_system(machine))
    cmdline = machine.image.cmdline.replace("panic=-1", "").replace("/dev/mapper/root", f"UUID={attacks.FS_UUID}")
    for initrd in (None, machine.image.initramfs({}, UNTOLD)):
        with machine.boot(cmdline=cmdline, initrd=initrd) as booted:
            if initrd is None:
                booted.console.expect("not on the disk that this host keeps it on .root.", 300)
                booted.console.expect(r"\(initramfs\)", 60)
            else:
                begun(booted).sh(f"test -e /etc/{attacks.MARK}")
            booted.kill()
    shutil.rmtree(tmp_path / "machine", ignore_errors=True)
