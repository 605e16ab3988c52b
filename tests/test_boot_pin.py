# SPDX-License-Identifier: Apache-2.0
"""Boots of a host with a PIN: somebody takes their time, somebody edits the command line, somebody does not know it."""

import json
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.lab import leaks
from tests.lab.console import ConsoleError
from tests.lab.machine import SENT, Machine, agent_commands, report
from tests.lab.stories import CAPPED, checked, measured, outcomes, pcr, status, unseal_as_root, up

pytestmark = [pytest.mark.vm, pytest.mark.always]

PIN = "tulip 4711"
THINKS = 70
"""Seconds: longer than any deadline of the boot scripts."""
WITH_PIN = frozenset((*SENT, "PCR_Read", "PolicyAuthValue"))


@pytest.fixture
def story(tmp_path: Path) -> Iterator[Machine]:
    """A clone of the enrolled machine."""
    yield measured().clone(tmp_path / "machine")
    shutil.rmtree(tmp_path / "machine", ignore_errors=True)


def test_a_pin_that_is_thought_about_mistyped_never_asked_for_and_forgotten(
    story: Machine, record_property: Callable[[str, object], None]
) -> None:
    with story.boot() as booted:
        console = up(booted)
        console.write("/run/pin", f"{PIN}\n".encode(), 0o600)
        for _ in range(2):  # twice is once
            console.sh("unlock policy set --pin-file /run/pin", timeout=120)
        assert json.loads(console.sh("unlock policy show --json").out)["pin"] is True
        assert "unattended" in console.sh("unlock check", check=False, timeout=240).out
        console.sh("rm /run/pin")
        booted.poweroff()

    with story.boot() as booted:
        booted.console.expect("unlock: PIN: ", 300)
        with pytest.raises(ConsoleError, match="not in"):  # nothing else has the console meanwhile
            booted.console.expect("recovery key: |unlock disk root|powering off", THINKS)
        booted.console.send("tulip 4712\n")
        booted.console.expect("wrong PIN, 2 more tries; PIN: ", 60)
        booted.console.send(f"{PIN}\n")
        console = up(booted)
        found = report(console)
        assert found["verdict"] == "unsealed" and found["facts"]["pin"] is True
        assert outcomes(console) == dict.fromkeys(("root", "d1", "d2", "d3"), "opened")
        assert status(console) == {"root": "open", "data": "open"}
        console.sh("sha256sum --quiet -c /root/sums && systemctl is-active app-data.service srv-data.mount")
        assert pcr(console, 15) == CAPPED
        assert unseal_as_root(console) == "pcr-mismatch"
        assert "recovery" not in booted.console.text and "unlock disk root" not in booted.console.text
        assert checked(console) == {"": "safe", "root": "safe", "data": "safe"}
        ours = [name for name in agent_commands(booted) if name in WITH_PIN]
        wrong = ["StartAuthSession", "PolicyPCR", "PolicyOR", "PolicyAuthValue", "Unseal"]
        right = [*ours[:5], *ours[-6:]]
        assert right == [*SENT[:4], "PCR_Read", *wrong, "PCR_Extend"]
        assert len(ours) - len(wrong) <= 12
        sent = f"{len(ours) - len(wrong)} TPM commands sent, {len(ours)} with a wrong PIN before"
        record_property("shown", f"early boot with a PIN: {sent}")
        wanted = {"PIN": PIN.encode(), "another": b"tulip 4712"}
        for command, shown in leaks.shown(console):
            assert not leaks.search(shown, wanted), command
        assert PIN not in booted.console.text
        console.sh("unlock policy set --pcrs 4,7,9", timeout=120)  # unattended: the key cache has what the PIN makes
        assert json.loads(console.sh("unlock policy show --json").out)["pin"] is True
        assert "unlock:pin-auth" in console.sh("unlock cache show").out
        booted.poweroff()

    with story.boot(append="audit=0") as booted:
        booted.console.expect("cannot unseal: .*PCR", 300)
        booted.console.expect("recovery key: ", 60)
        assert "PIN: " not in booted.console.text
        booted.kill()

    with story.boot() as booted:
        booted.console.expect("unlock: PIN: ", 300)
        booted.console.send("tulip 4713\n")
        booted.console.expect("2 more tries; PIN: ", 60)
        booted.console.send("tulip 4714\n")
        # the software TPM locks itself after three, and one was typed before: the third is counted or not taken
        if booted.console.expect("1 more try; PIN: |cannot unseal: ", 60)[0].endswith("PIN: "):
            booted.console.send("tulip 4715\n")
            booted.console.expect("cannot unseal: ", 60)
        booted.console.expect("recovery key: ", 60)
        booted.console.send(story.recovery_key + "\n")
        console = up(booted)
        found = report(console)
        assert found["verdict"] in ("pin-wrong", "pin-lockout")
        assert status(console) == {"root": "open", "data": "open"}
        console.sh("sha256sum --quiet -c /root/sums")
        assert console.sh("keyctl list @u; true").out.count("unlock:") == 0
        assert pcr(console, 15) == CAPPED
        assert unseal_as_root(console) == "pcr-mismatch"
        said = console.sh("unlock explain").out
        assert "PIN" in said and "recovery key" in said
        booted.poweroff()
