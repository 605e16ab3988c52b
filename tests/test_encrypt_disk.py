# SPDX-License-Identifier: Apache-2.0
"""`unlock disk encrypt`: a disk that holds data is encrypted in place. Real disks, on loop devices, a software TPM."""

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.eventlogs import Boot
from tests.hostfixture import Machine
from tests.inplace import MIB, RESERVED, files_in, fill, phase, read_clear, recovery_file, sh
from unlock.disks import luks
from unlock.disks.reencrypt import Tell
from unlock.host.journal import DiskEncryption
from unlock.operations import encrypt_disk
from unlock.operations.encrypt_disk import Choices, Outcome

pytestmark = pytest.mark.usefixtures("key_cache", "cheap_passwords")

SIZE = 100 * MIB
BOOT = Boot("direct")
Loops = Callable[..., str]


@pytest.fixture
def host(tmp_path: Path) -> Iterator[Machine]:
    machine = Machine(tmp_path, BOOT)
    yield machine
    machine.close()


@pytest.fixture
def loop(host: Machine, tmp_path: Path) -> Iterator[Loops]:
    """Makes disks. Blocks of 4096 bytes are quick to decrypt here."""
    made: list[str] = []

    def make(size: int = SIZE, block: int = 4096) -> str:
        image = tmp_path / f"disk-{len(made)}"
        with image.open("wb") as file:
            file.truncate(size)
        made.append(sh("losetup", "--find", "--show", "--sector-size", block, image))
        host.disks.append(Path(made[-1]))
        return made[-1]

    yield make
    for each in made:
        sh("losetup", "--detach", each)


@pytest.fixture
def disk(loop: Loops) -> str:
    return loop()


def choices(host: Machine, disk: str, group: str = "photos") -> Choices:
    return Choices(disk, group, recovery_file=recovery_file(host))


def never(done: int, size: int) -> bool:
    return False


def encrypt(host: Machine, disk: str, tell: Tell = never) -> Outcome | None:
    return encrypt_disk.encrypt_disk(host.paths, choices(host, disk), tell, look=host.look, tcti=host.chip.tcti)


def resume(host: Machine, tell: Tell = never) -> Outcome | None:
    return encrypt_disk.resume(host.paths, tell, look=host.look, tcti=host.chip.tcti)


def test_a_disk_is_encrypted_in_place_and_holds_what_it_held(host: Machine, loop: Loops, tmp_path: Path) -> None:
    disk = loop(SIZE, 512)
    fill(disk, tmp_path, SIZE)
    expected = {each.name: each.read_bytes() for each in (tmp_path / "files").iterdir()}
    before = bytes(host.persistence)
    assert encrypt(host, disk) == Outcome("photos", "photos-a", "done")
    state = host.state
    assert (state.journal, state.narrowed, list(state.groups)) == (None, None, ["photos"])
    assert phase(disk) == ""
    assert host.boot() == "unsealed"
    host.take_key()
    assert bytes(host.persistence) != before
    data = read_clear(disk, host.persistence)
    assert files_in(data, tmp_path) == expected
    content = Path(disk).read_bytes()
    assert not any(each[:4096] in content for each in expected.values()), "nothing of it is left in clear"
    with luks.Container(disk) as container, container.volume_key(host.recovery):
        assert len(container.keyslots()) == 1
        assert len(container.tokens("unlock")) == 1
    assert "[group.photos]" in Path(host.paths.config).read_text()


def test_stopped_nine_times_with_a_boot_in_between_it_goes_on(host: Machine, loop: Loops, tmp_path: Path) -> None:
    """Each time the header gives the data by what early boot has."""
    disk = loop(RESERVED + 150 * MIB)
    fill(disk, tmp_path, 150 * MIB)
    expected = {each.name: each.read_bytes() for each in (tmp_path / "files").iterdir()}
    calls = 0

    def second(done: int, size: int) -> bool:
        nonlocal calls
        calls += 1
        return calls % 2 == 0

    outcome = encrypt(host, disk, second)
    stops = 0
    while outcome and outcome.outcome == "stopped":
        stops += 1
        assert host.boot() == "unsealed"
        host.take_key()
        assert isinstance(host.state.journal, DiskEncryption) and phase(disk) == "moving"
        assert files_in(read_clear(disk, host.persistence), tmp_path) == expected
        outcome = resume(host, second)
    assert stops == 9
    host.boot()
    host.take_key()
    assert files_in(read_clear(disk, host.persistence), tmp_path) == expected
