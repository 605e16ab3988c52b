# SPDX-License-Identifier: Apache-2.0
"""`unlock rekey --fresh` killed between its two halves, or in either: the same command finishes both."""

from collections.abc import Iterator
from functools import partial
from pathlib import Path

import pytest

from tests.eventlogs import Boot
from tests.hostfixture import Machine
from tests.killing import Step, killed_at
from unlock.disks import disk_keys, luks
from unlock.host import keyring
from unlock.keys import rotation
from unlock.operations import new_persistence_key
from unlock.operations.rekey import rekey_fresh
from unlock.tpm import chip

pytestmark = pytest.mark.usefixtures("key_cache")


@pytest.fixture
def host(tmp_path: Path) -> Iterator[Machine]:
    machine = Machine(tmp_path, Boot("direct"), disks=2)
    machine.add_group("more", 1)
    yield machine
    machine.close()


def run(host: Machine) -> list[rotation.Outcome]:
    return rekey_fresh(host.paths, tcti=host.chip.tcti, look=host.look)


STEPS: dict[str, tuple[Step, int]] = {
    "nothing is done": (disk_keys.add_rewrapped_tokens, 1),
    "some disks have two tokens": (luks.Container.set_token, 4),
    "the TPM has the key": (chip.Tpm.write_record, 2),
    "the persistence key is new, no group is rotated": (rotation.rotate_kek, 1),
    "one group is rotated": (rotation.rotate_kek, 3),
    "the last group is rotated": (rotation.retire_keks, 1),
}


@pytest.mark.parametrize("where", STEPS)
def test_killed_the_same_command_finishes_both_halves(host: Machine, where: str) -> None:
    step, number = STEPS[where]
    first = bytes(host.persistence)
    copies = {image: image.read_bytes()[: 16 << 20] for image in host.disks}
    assert killed_at(number, partial(run, host), (step,))
    assert host.boot() == "unsealed"
    host.persistence = keyring.get("unlock:persistence")
    assert host.boot_opens() and host.recovery_opens(), "as it was left"
    outcomes = run(host)
    assert {each.group for each in outcomes} == {"data", "more"} and not any(each.behind for each in outcomes)
    assert all(group.generation >= 2 for group in host.state.groups.values())
    assert host.state.journal is None and not new_persistence_key.is_due(host.state)
    assert host.boot() == "unsealed"
    host.persistence = keyring.get("unlock:persistence")
    assert bytes(host.persistence) != first
    assert host.boot_opens() and host.recovery_opens()
    assert all(len(host.tokens(image)) == 1 for image in host.disks)
    for image, content in copies.items():
        with image.open("r+b") as file:
            file.write(content)
    assert not any(host.opens(image) for image in host.disks), "an earlier header opens nothing"
