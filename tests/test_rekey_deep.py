# SPDX-License-Identifier: Apache-2.0
"""`unlock rekey --deep` on real disks: loop devices, closed, re-encrypted by libcryptsetup itself."""

import os
import shutil
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.deepfixture import DeepHost, judge, metadata, read_plain
from tests.killing import LASTING, Killer
from unlock.disks import disk_keys, luks, raw_header, reencrypt, reencrypt_plan
from unlock.host import keyring
from unlock.operations import rekey_deep

pytestmark = [pytest.mark.root, pytest.mark.usefixtures("key_cache")]


@pytest.fixture(autouse=True)
def small_steps(monkeypatch: pytest.MonkeyPatch) -> None:
    """A disk of some MiB has several hotzones."""
    monkeypatch.setattr(reencrypt, "HOTZONE", 1 << 20)


@pytest.fixture
def host(tmp_path: Path) -> Iterator[DeepHost]:
    with DeepHost(tmp_path, 2).plugged_in() as found:
        yield found
    keyring.flush()


def new_key(host: DeepHost, image: Path) -> bytes:
    """The volume key of a disk that is done, as early boot gets it."""
    with luks.Container(str(image)) as container:
        (each,) = disk_keys.read_tokens(container, "")
        assert each.version == 1
        with disk_keys.unwrap_volume_key(container, each, host.persistence) as dek:
            container.verify_volume_key(dek)
            return bytes(dek)


def assert_done(host: DeepHost, image: Path) -> None:
    """One volume key, another than before, which opens everything, and nothing of the run is left."""
    dek = new_key(host, image)
    assert dek != host.dek(image)
    header = metadata(image)
    assert len(header["digests"]) == len(header["segments"]) == 1
    assert len(header["keyslots"]) == 1 and "requirements" not in header["config"]
    assert read_plain(image, dict.fromkeys(header["digests"], dek)) == host.plain[image]
    with luks.Container(str(image)) as container, disk_keys.mac_key(host.recovery, host.state.host) as mac_key:
        assert container.is_whole
        (each,) = disk_keys.read_tokens(container, "")
        disk_keys.check_recovery(container, each, mac_key)
        with disk_keys.dek_by_recovery_key(container, host.recovery) as found:
            assert bytes(found) == dek
        assert host.state.recovery.keyslots[container.uuid] == container.salt(container.keyslots()[0])


def test_a_group_gets_new_volume_keys(host: DeepHost) -> None:
    told: list[tuple[int, int]] = []

    def tell(done: int, total: int) -> bool:
        told.append((done, total))
        return False

    outcomes = host.rekey(tell)
    assert [(each.disk, each.outcome) for each in outcomes] == [("data-0", "done"), ("data-1", "done")]
    assert told == sorted(told) and told[-1] == (8 << 20, 8 << 20) and len(told) > 8
    assert (host.group.generation, host.state.journal) == (2, None)
    for image in host.disks:
        assert_done(host, image)


def test_stopped_after_each_hotzone_it_opens_and_goes_on(host: DeepHost, tmp_path: Path) -> None:
    phases: Counter[str] = Counter()
    host.rekey(lambda done, total: True)
    while host.state.journal:
        for image in host.disks:
            phases[judge(host, copied(image, tmp_path), host.plain[image])] += 1
        host.resume(stop_after(2))
    for image in host.disks:
        assert_done(host, image)
    assert min(phases[reencrypt_plan.MOVING], phases[reencrypt_plan.OLD], phases[""]) > 1


def test_killed_at_each_lasting_step_it_opens_and_finishes(tmp_path: Path, killer: Killer) -> None:
    """What a killed run has prepared is taken back; what it has begun goes on."""
    phases: Counter[str] = Counter()
    with DeepHost(tmp_path, 1).plugged_in() as host:
        (image,) = host.disks
        start = Start(host)

        def begin(_: int) -> Callable[[], object]:
            start.again()
            return host.rekey

        for attempt, killed in killer(begin, [*LASTING, *STEPS]):
            phase = judge(host, copied(image, tmp_path), host.plain[image])
            phases[phase or ("killed" if killed else "done")] += 1
            if host.state.journal:
                done = host.rekey()
                assert [each.outcome for each in done] == ["done"], attempt
                assert_done(host, image)
    print(dict(phases))
    assert {"killed", "old", "moving", "whole", "new", "done"} <= phases.keys()


STEPS = (
    reencrypt.Disk.add_unbound_keyslot,
    reencrypt.Disk.prefer_keyslot,
    reencrypt.Disk.start,
    reencrypt.Disk.run,
    raw_header.write_header,
    raw_header.flush,
    os.mkdir,
    os.rmdir,
    rekey_deep._Progress.tell,
)
"""What changes something beside LASTING."""


class Start:
    """The same start each time."""

    def __init__(self, host: DeepHost) -> None:
        self._host = host
        self._disks = {node: image.read_bytes() for image, node in host.nodes.items()}
        self._state = Path(host.paths.state).read_bytes()

    def again(self) -> None:
        for node, content in self._disks.items():
            with open(node, "r+b") as disk:
                disk.write(content)
                os.fsync(disk.fileno())
        Path(self._host.paths.state).write_bytes(self._state)
        for name in keyring.names():
            if name.startswith("unlock:kek:"):
                keyring.forget(name)


def copied(image: Path, folder: Path) -> Path:
    """A copy, to be changed."""
    return Path(shutil.copy(image, folder / "copy"))


def stop_after(count: int) -> Callable[[int, int], bool]:
    """A `Tell` that stops the run at its Nth call."""
    left = iter(range(count - 1))
    return lambda done, total: next(left, None) is None
