# SPDX-License-Identifier: Apache-2.0
"""Headers full of tokens that have our type and that nobody can read, this host's or another's: what is told, what goes
on, and that nothing grows."""

import subprocess
from pathlib import Path
from typing import Any

import pytest

from tests.eventlogs import Boot
from tests.flowfixture import HOST, Host
from tests.hostfixture import Machine
from unlock.boot.activation import GroupOpener
from unlock.disks import disk_keys, luks, token
from unlock.disks.udev import Disk
from unlock.errors import DiskFailed
from unlock.host.report import Report
from unlock.operations import new_persistence_key, rekey, sync

pytestmark = pytest.mark.usefixtures("key_cache")

KINDS: dict[str, dict[str, Any]] = {
    "ours": {"host": HOST},
    "of another host": {"host": "f" * 32},
    "of nobody": {},
    "of no type": {"host": 5, "version": "x", "group": None, "kek": []},
}


def fill(image: Path, kind: str, room: int = 0) -> list[int]:
    """Numbers of the tokens that were added: all that fit, but for `room`."""
    with luks.Container(str(image)) as container:
        numbers = []
        while True:
            try:
                numbers.append(container.set_token({"type": token.TYPE, **KINDS[kind]}))
            except DiskFailed:
                break
        for number in numbers[:room]:
            container.remove_token(number)
        return numbers[room:]


def tokens(image: Path) -> int:
    with luks.Container(str(image)) as container:
        return len(container.tokens(token.TYPE))


def opens_early(host: Host) -> set[str]:
    """What early boot makes of the disks that are here."""
    record = Report("test")

    def unwrap(header: Any, each: token.Token) -> Any:
        return disk_keys.unwrap_volume_key(header, each, host.persistence)

    opener = GroupOpener(HOST, unwrap, record)
    for image in host.disks:
        opener.add_disk(Disk(str(image), image.name, "", "", "", 0, 0.0))
    opener.read_headers()
    complete = opener.is_complete("data")
    opener.wipe()
    assert complete
    return {row.outcome for row in record.disks.values()}


@pytest.mark.parametrize("kind", KINDS)
def test_a_disk_without_room_keeps_its_old_key_and_says_what_to_type_and_the_others_go_on(
    tmp_path: Path, kind: str
) -> None:
    host = Host(tmp_path, 2)
    numbers = fill(host.disks[0], kind)
    assert len(numbers) == 31 and opens_early(host) == {"waiting"}
    [outcome] = rekey.rekey(host.paths, "data", host.look)
    assert outcome.done == ("data-1",) and list(outcome.behind) == ["data-0"]
    [later] = filter(None, (each.detail for each in sync.sync(host.paths, host.look)))
    for why in (outcome.behind["data-0"], later):
        assert "no room for a token: 31 of type unlock cannot be read" in why
        assert f"cryptsetup token remove --token-id {numbers[0]} {host.disks[0]}" in why
    assert host.boot_opens() and host.recovery_opens() and tokens(host.disks[0]) == 32
    assert opens_early(host) == {"waiting"} and host.state.journal is None
    command = ["cryptsetup", "token", "remove", f"--token-id={numbers[0]}", str(host.disks[0])]
    subprocess.run(command, check=True)
    sync.sync(host.paths, host.look)
    assert host.group.behind == () and host.boot_opens()
    assert tokens(host.disks[0]) == (1 if kind == "ours" else 31)


@pytest.mark.parametrize("kind", KINDS)
def test_with_room_for_one_a_key_is_replaced_again_and_again(tmp_path: Path, kind: str) -> None:
    host = Host(tmp_path, 2)
    fill(host.disks[0], kind, room=1)
    for generation in (2, 3, 4):
        [outcome] = rekey.rekey(host.paths, "data", host.look)
        assert (outcome.generation, outcome.behind) == (generation, {})
        assert host.boot_opens() and host.recovery_opens()
        assert tokens(host.disks[0]) == (1 if kind == "ours" else 31), "only what is ours goes, and nothing is added"


@pytest.mark.parametrize("kind", KINDS)
def test_a_new_persistence_key_is_refused_before_the_tpm_has_it(tmp_path: Path, kind: str) -> None:
    host = Machine(tmp_path, Boot("direct"), disks=2)
    try:
        numbers = fill(host.disks[0], kind)
        with pytest.raises(DiskFailed) as caught:
            new_persistence_key.replace(host.paths, host.chip.tcti, look=host.look)
        assert caught.value.code == "no-room" and f"--token-id {numbers[0]} " in caught.value.hint
        assert host.state.journal is None and host.boot() == "unsealed" and host.boot_opens()
        assert [tokens(image) for image in host.disks] == [1 if kind == "ours" else 32, 1]
    finally:
        host.close()
