# SPDX-License-Identifier: Apache-2.0
"""A host whose keys come from a key manager beside it: it moves there, it is refused, it is offline."""

import json
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.kmipfixture import AUTHORITY, add_command, join, rotate_there
from tests.lab.guest import Guest
from tests.lab.image import PASSPHRASE
from tests.lab.kmipserver import KmipServer, Traffic
from tests.lab.machine import SENT, Machine, agent_commands, report
from tests.lab.running import Running
from tests.lab.stories import begun, checked, measured, outcomes, status, up

pytestmark = [pytest.mark.vm, pytest.mark.always]

SETTINGS = "\n[sync]\nopen_from_provider_after_refusal = true\n"
SEALING = {"Create", "EvictControl", "NV_DefineSpace", "NV_Write", "NV_UndefineSpace"}
"""TPM commands without which nothing is sealed."""


@pytest.fixture
def story(tmp_path: Path) -> Iterator[Machine]:
    """A clone of the enrolled machine."""
    yield measured().clone(tmp_path / "machine")
    shutil.rmtree(tmp_path / "machine", ignore_errors=True)


def synced(console: Guest) -> dict[str, str]:
    """Runs the service, in its sandbox; key -> outcome."""
    console.sh("systemctl start unlock-sync.service", timeout=120)
    assert console.sh("systemctl show -P Result unlock-sync.service").out == "success"
    return {each["key"]: each["outcome"] for each in json.loads(console.read("/run/unlock/sync.json"))["keys"]}


@pytest.fixture
def kms(story: Machine, tmp_path: Path) -> Iterator[KmipServer]:
    """A key manager that the machine moves its keys to; then the power goes."""
    vault = story.disk("vault", 40)
    with KmipServer(tmp_path / "kms", AUTHORITY) as kms:
        with story.boot(network=True) as booted:
            moves_to_it(booted, kms, story, vault)
            booted.kill()
        yield kms


def test_keys_move_to_a_key_manager_and_outlive_it(story: Machine, kms: KmipServer) -> None:
    before = kms.traffic()
    with story.boot(clock="2027-02-24T12:00:00", without=("d2",)) as booted:
        is_offline_for_months(booted, story)
        booted.kill()
    assert kms.traffic() == before


def test_a_refused_host_opens_its_data_from_the_key_manager_and_seals_nothing(story: Machine, kms: KmipServer) -> None:
    before = kms.traffic()
    with story.boot(network=True, append="audit=0") as booted:
        is_refused_and_reseals_nothing(booted, story)
        booted.poweroff()
    assert kms.traffic().requests > before.requests


def moves_to_it(booted: Running, kms: KmipServer, story: Machine, vault: str) -> None:
    """`provider add`, `test` and `switch` while the groups are mounted; then a KEK is rotated at the key manager."""
    console = up(booted)
    join(console, kms)
    console.sh(add_command(kms), timeout=120)
    console.sh("unlock provider switch kms --persistence enabled", timeout=180)
    assert status(console) == {"root": "open", "data": "open"}
    console.write("/run/recovery", story.recovery_key.encode(), 0o600)
    create = f"unlock group create vault --disk {vault} --mount /srv/vault --policy provider"
    console.sh(f"{create} --recovery-key-file /run/recovery", timeout=240)
    tested = console.sh("unlock provider test", timeout=120).out.splitlines()
    assert tested and all(line.endswith(": good") for line in tested)

    unchanged = dict.fromkeys(("root", "data", "vault", "host key"), "unchanged")
    assert synced(console) == unchanged | {"vault": "cached"}
    before = kms.traffic()
    assert synced(console) == unchanged
    assert kms.traffic() - before == Traffic(connections=1, requests=1)
    host = json.loads(console.read("/var/lib/unlock/state.json"))["host"]
    rotate_there(kms, host, "data", 2)
    assert synced(console) == unchanged | {"data": "replaced"}
    assert synced(console) == unchanged
    console.sh(f"printf '{SETTINGS}' >>/etc/unlock/unlock.toml; sync")
    kept = json.loads(console.sh("unlock persistence status --json").out)["groups"]
    assert {each["name"]: len(each["kept_on"]) for each in kept} == {"root": 1, "data": 3, "vault": 0}
    assert checked(console) == {"": "unproven", "root": "safe", "data": "safe", "vault": "unproven"}


def is_refused_and_reseals_nothing(booted: Running, story: Machine) -> None:
    """The root disk opens by its own passphrase at the stock prompt, the data groups from the key manager."""
    booted.console.expect("cannot unseal: .*PCR", 300)
    booted.console.expect("recovery key: ", 60)
    booted.console.send("\n")
    booted.console.expect("unlock disk root", 120)
    booted.console.send(PASSPHRASE + "\n")
    console = up(booted)
    assert report(console)["verdict"] == "pcr-mismatch"
    assert status(console) == {"root": "open", "data": "open", "vault": "open"}
    assert checked(console)[""] == "unsafe"
    console.sh("sha256sum --quiet -c /root/sums")
    before = console.sh("sha256sum /var/lib/unlock/state.json").out
    refused = console.sh("unlock sync", check=False, timeout=120)
    assert refused.code != 0 and "Traceback" not in refused.err
    assert console.sh("sha256sum /var/lib/unlock/state.json").out == before
    assert "the kernel command line" in console.sh("unlock explain", check=False).out
    assert not console.sh("grep unlock: /proc/keys", check=False).out
    assert not SEALING & {command.name for command in booted.tpm_commands()}


def is_offline_for_months(booted: Running, story: Machine) -> None:
    """No card, the clock three months on. A missing disk comes back: its group opens, with the KEK of the rotation."""
    console = begun(booted)
    console.booted(600)
    assert report(console)["verdict"] == "unsealed"
    assert console.sh("date +%Y-%m").out == "2027-02"
    assert console.sh("ls /sys/class/net").out == "lo"
    assert status(console)["root"] == "open"
    assert status(console)["data"] != "open"
    assert outcomes(console)["vault"] == "provider"
    booted.plug(story.disks["d2"])
    console.sh("until systemctl is-active --quiet app-data.service; do sleep 1; done", timeout=240)
    assert status(console)["data"] == "open"
    console.sh("sha256sum --quiet -c /root/sums")
    assert [name for name in agent_commands(booted) if name in SENT] == list(SENT)
