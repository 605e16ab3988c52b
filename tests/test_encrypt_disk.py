# SPDX-License-Identifier: Apache-2.0
"""`unlock disk encrypt`: a disk that holds data is encrypted in place. Real disks, on loop devices, a software TPM."""

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.eventlogs import Boot
from tests.hostfixture import Machine
from tests.inplace import MIB, RESERVED, files_in, fill, phase, read_clear, recovery_file, sh
from unlock.disks import luks
from unlock.host import keyring
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
def disk(host: Machine, tmp_path: Path) -> Iterator[str]:
    image = tmp_path / "disk"
    with image.open("wb") as file:
        file.truncate(SIZE)
    loop = sh("losetup", "--find", "--show", image)
    host.disks.append(Path(loop))
    yield loop
    sh("losetup", "--detach", loop)


def choices(host: Machine, disk: str, group: str = "photos") -> Choices:
    return Choices(disk, group, recovery_file=recovery_file(host))


def never(done: int, size: int) -> bool:
    return False


def encrypt(host: Machine, disk: str, tell: encrypt_disk.Tell = never) -> Outcome | None:
    return encrypt_disk.encrypt_disk(host.paths, choices(host, disk), tell, look=host.look, tcti=host.chip.tcti)


def resume(host: Machine, tell: encrypt_disk.Tell = never) -> Outcome | None:
    return encrypt_disk.resume(host.paths, tell, look=host.look, tcti=host.chip.tcti)


def test_a_disk_is_encrypted_in_place_and_holds_what_it_held(host: Machine, disk: str, tmp_path: Path) -> None:
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


def test_stopped_nine_times_with_a_boot_in_between_it_goes_on(host: Machine, disk: str, tmp_path: Path) -> None:
    """Each time the header gives the data by what early boot has."""
    fill(disk, tmp_path, SIZE - RESERVED)
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
    assert stops >= 4
    host.boot()
    host.take_key()
    assert files_in(read_clear(disk, host.persistence), tmp_path) == expected
