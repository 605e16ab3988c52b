# SPDX-License-Identifier: Apache-2.0
"""`unlock rekey --deep` on real disks: loop devices, closed, re-encrypted by libcryptsetup itself."""

import os
import shutil
import subprocess
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from itertools import pairwise
from pathlib import Path

import pytest

from tests.deepfixture import HEADER, DeepHost, judge, metadata, read_plain
from tests.killing import LASTING, Killer
from unlock.disks import disk_keys, luks, raw_header, reencrypt, reencrypt_plan
from unlock.disks.reencrypt_plan import MOVING
from unlock.errors import DiskFailed, Malformed, NoKey, Refused, UnlockError, Usage
from unlock.host import keyring, this_boot
from unlock.host.journal import DeepRekey
from unlock.keys import recovery_key, rotation
from unlock.operations import forget_disk, new_persistence_key, operation, rebind, rekey, rekey_deep, sync, throttled
from unlock.operations.consent import Plan
from unlock.predict import initramfs_images
from unlock.secret import Secret

pytestmark = [pytest.mark.root, pytest.mark.timeout(900), pytest.mark.usefixtures("key_cache")]


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


@pytest.mark.parametrize(("seconds", "rate", "expected"), [(3.0, 0, 512), (0.0, 0, 256), (3.0, 1 << 40, 256)])
def test_a_step_is_as_large_as_the_disk_is_fast(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, seconds: float, rate: int, expected: int
) -> None:
    """KiB: small for a slow disk, and where a rate is to be held."""
    monkeypatch.setattr(reencrypt, "HOTZONE", 256 << 10)
    monkeypatch.setattr(reencrypt, "STEP_SECONDS", seconds)
    told: list[int] = []

    def tell(done: int, _: int) -> bool:
        told.append(done)
        return False

    with DeepHost(tmp_path, 1, sector=512).plugged_in() as host:
        choices = host.choices()._replace(max_rate=rate)
        rekey_deep.rekey_deep(host.paths, choices, tell, look=host.look)
        assert_done(host, host.disks[0])
    assert max(after - before for before, after in pairwise(sorted(told))) == expected << 10


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
    throttled.Throttled.tell,
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


# What is refused, with words, and nothing changed


@pytest.fixture
def one(tmp_path: Path) -> Iterator[DeepHost]:
    with DeepHost(tmp_path, 1).plugged_in() as found:
        yield found
    keyring.flush()


def refused(host: DeepHost, choices: rekey_deep.Choices, error: type[UnlockError] = Refused) -> UnlockError:
    """The error of a command that changes nothing: no disk, nor the state."""
    before = [image.read_bytes() for image in host.disks], Path(host.paths.state).read_bytes()
    with pytest.raises(error) as raised:
        rekey_deep.rekey_deep(host.paths, choices, lambda done, total: False, look=host.look)
    assert ([image.read_bytes() for image in host.disks], Path(host.paths.state).read_bytes()) == before
    assert raised.value.hint
    return raised.value


def test_another_recovery_key_is_refused(one: DeepHost) -> None:
    assert refused(one, one.choices(recovery=recovery_key.new())).code == "recovery-key"


def test_a_group_that_is_not_there_is_refused(one: DeepHost) -> None:
    refused(one, one.choices()._replace(group="other"), Usage)


def test_disks_that_are_away_are_refused(one: DeepHost) -> None:
    nodes, one.nodes = one.nodes, {}
    assert refused(one, one.choices()).code == "missing"
    one.nodes = nodes


def test_an_operators_keyslot_is_named(one: DeepHost) -> None:
    slot = add_operators_keyslot(one, b"of an operator")
    error = refused(one, one.choices(Secret(b"another one")))
    assert (error.code, f"keyslot {slot}" in str(error)) == ("keyslots", True)


def test_a_full_header_is_refused(one: DeepHost) -> None:
    with luks.Container(one.nodes[one.disks[0]]) as container:
        for number in range(5, 12):
            container.set_token({"type": "of-another-program", "much": "x" * 1000}, number)
    assert refused(one, one.choices()).code == "no-room"


def test_a_disk_that_cryptsetup_re_encrypts_is_refused(one: DeepHost) -> None:
    """Its header is not one of ours: it opens by hand alone, and nothing of it is written."""
    command = ["cryptsetup", "reencrypt", "--init-only", "--batch-mode", "--force-offline-reencrypt", "--key-file", "-"]
    command += ["--pbkdf", "pbkdf2", "--pbkdf-force-iterations", "1000", one.nodes[one.disks[0]]]
    subprocess.run(command, input=bytes(one.recovery), check=True, capture_output=True)
    error = refused(one, one.choices(), Malformed)
    assert "is being re-encrypted" in str(error) or "says that it is being re-encrypted" in str(error)


def test_an_initramfs_that_could_not_open_it_is_refused(one: DeepHost, monkeypatch: pytest.MonkeyPatch) -> None:
    Path(one.paths.root, "boot").mkdir()
    Path(one.paths.root, "boot/initrd.img-6.1").touch()
    for reads, code in ((1, "old-initramfs"), (2, "")):
        names = f"usr/lib/unlock/unlock/boot/agent.pyc usr/lib/unlock/reads/token-{reads}"
        listing = initramfs_images.ImageContents(True, {"token": reads}, True)
        assert names
        monkeypatch.setattr(initramfs_images, "read_contents", lambda tree, image, found=listing: found)
        if code:
            assert refused(one, one.choices()).code == code
        else:
            assert one.rekey()[0].outcome == "done"


def test_while_a_run_goes_on_another_is_refused(one: DeepHost) -> None:
    found: list[str] = []

    def tell(done: int, total: int) -> bool:
        if not found:
            with pytest.raises(Refused) as raised:
                rekey_deep.resume(one.paths, tell, one.look)
            found.append(raised.value.code)
        return False

    assert [each.outcome for each in one.rekey(tell)] == ["done"]
    assert found == ["busy"]


def test_a_plan_that_is_only_shown_changes_nothing(one: DeepHost) -> None:
    plans: list[Plan] = []

    def show(plan: Plan) -> bool:
        plans.append(plan)
        return False

    before = one.disks[0].read_bytes(), Path(one.paths.state).read_bytes()
    assert one.rekey(consent=show) == []
    assert (one.disks[0].read_bytes(), Path(one.paths.state).read_bytes()) == before
    (plan,) = plans
    assert any("re-encrypt data-0" in step for step in plan.steps) and not plan.destroys


# What is kept, taken back, and left to others


def add_operators_keyslot(host: DeepHost, passphrase: bytes) -> int:
    node = host.nodes[host.disks[0]]
    with luks.Container(node) as container, Secret(host.dek(host.disks[0])) as dek:
        return container.add_keyslot(dek, passphrase=Secret(passphrase))


def test_an_operators_keyslot_is_kept_by_its_passphrase(one: DeepHost) -> None:
    (image,) = one.disks
    add_operators_keyslot(one, b"of an operator")
    choices = one.choices(Secret(b"another one"), Secret(b"of an operator"))
    (outcome,) = rekey_deep.rekey_deep(one.paths, choices, lambda done, total: False, look=one.look)
    assert outcome.outcome == "done"
    dek = new_key(one, image)
    with luks.Container(str(image)) as container:
        assert len(container.keyslots()) == 2
        for passphrase in Secret(b"of an operator"), one.recovery:
            with container.volume_key(passphrase) as found:
                assert bytes(found) == dek != one.dek(image)


def test_what_is_prepared_can_be_cancelled_and_what_has_moved_cannot(host: DeepHost) -> None:
    first, second = host.disks
    host.rekey(lambda done, total: True)
    assert judge(host, Path(shutil.copy(first, first.with_name("copy"))), host.plain[first]) == MOVING
    with pytest.raises(Refused) as raised:
        rekey_deep.cancel(host.paths, host.look)
    assert raised.value.code == "cannot-cancel"
    host.resume(lambda done, total: done >= 4 << 20)
    assert_done(host, first)
    with luks.Container(str(second)) as container:
        assert len(container.keyslots()) > 1
    assert rekey_deep.cancel(host.paths, host.look) == ["data-1"]
    assert host.state.journal is None
    with luks.Container(str(second)) as container:
        assert len(container.keyslots()) == len(container.tokens("unlock")) == len(container.metadata["digests"]) == 1
        assert new_key(host, second) == host.dek(second)
    assert [each.outcome for each in host.rekey()] == ["done", "done"]


def test_other_commands_leave_a_disk_alone_that_is_to_get_a_new_key(host: DeepHost) -> None:
    host.rekey(lambda done, total: True)
    before = [image.read_bytes() for image in host.disks]
    with pytest.raises(Refused):
        rekey.rekey(host.paths, "data", host.look)
    sync.sync(host.paths, host.look)
    with host.tpm() as chip, pytest.raises(Refused):
        new_persistence_key.replace(host.paths, chip.tcti, look=host.look)
    with host.work() as work, work.host_key() as key, pytest.raises((Refused, DiskFailed)):
        rotation.rewrap_disks(work, host.group, key)
    assert [image.read_bytes() for image in host.disks] == before
    assert [each.outcome for each in host.resume()] == ["done", "done"]


def test_a_rebind_says_what_comes_first(one: DeepHost) -> None:
    """Where this boot has no key to go on with, cryptsetup and the recovery key end it; the command then cleans up."""
    (image,) = one.disks
    node = one.nodes[image]
    one.rekey(lambda done, total: done > 0)
    before = image.read_bytes(), Path(one.paths.state).read_bytes()
    with one.tpm() as chip:
        choices = rebind.RebindChoices(one.recovery, tcti=chip.tcti)
        for first in "unlock operation resume", f"cryptsetup reencrypt --resume-only {node}":
            with pytest.raises(Refused) as raised:
                rebind.rebind(one.paths, choices, one.look)
            assert (raised.value.code, first in raised.value.hint) == ("reencrypting", True)
            keyring.forget("unlock:persistence")
    assert (image.read_bytes(), Path(one.paths.state).read_bytes()) == before
    stock = ["cryptsetup", "reencrypt", "--resume-only", "--batch-mode", "--key-file", "-", node]
    subprocess.run(stock, input=bytes(one.recovery), check=True, capture_output=True)
    this_boot.cache_keys(one.paths, "TPM", {"unlock:persistence": one.persistence})
    assert [each.outcome for each in one.resume()] == ["done"]
    assert_done(one, image)


def test_a_key_that_this_host_does_not_keep(tmp_path: Path) -> None:
    """Policy `provider`: the tokens say so during the run too, and the KEK comes from the cache or the provider."""
    with DeepHost(tmp_path, 1).plugged_in() as host:
        with host.work() as work:
            rotation.set_policy(work, host.group, "provider")
        assert [each.outcome for each in host.rekey(lambda done, total: done > 0)] == ["stopped"]
        with luks.Container(str(host.disks[0])) as container:
            each = next(each for each in disk_keys.read_tokens(container, "") if each.reencryption)
            with pytest.raises(NoKey):
                disk_keys.unwrap_volume_key(container, each, host.persistence)
        assert [each.outcome for each in host.resume()] == ["done"]
    keyring.flush()


def test_the_rate_is_held_down(one: DeepHost) -> None:
    began = time.monotonic()
    choices = one.choices()._replace(max_rate=2 << 20)
    (outcome,) = rekey_deep.rekey_deep(one.paths, choices, lambda done, total: False, look=one.look)
    assert outcome.outcome == "done"
    assert time.monotonic() - began > 1.9


def test_nothing_old_opens_anything_afterwards(one: DeepHost, tmp_path: Path) -> None:
    """Earlier headers, put back: the first, and one from the midst of the run."""
    (image,) = one.disks
    headers = [image.read_bytes()[:HEADER]]
    one.rekey(lambda done, total: done > 0)
    headers.append(image.read_bytes()[:HEADER])
    one.resume()
    assert_done(one, image)
    for header in headers:
        copy = Path(shutil.copy(image, tmp_path / "copy"))
        with copy.open("r+b") as file:
            file.write(header)
        with pytest.raises(AssertionError):
            judge(one, copy, one.plain[image])


# A disk that is lost meanwhile


def test_a_disk_that_died_is_given_up_and_the_others_go_on(host: DeepHost) -> None:
    first, second = host.disks
    host.rekey(lambda done, total: True)
    refused = pytest.raises(Refused)
    with refused as raised:
        operation.give_up(host.paths, look=host.look)
    assert raised.value.code == "present" and raised.value.hint
    with without(host, first):
        with refused as raised:
            rekey_deep.cancel(host.paths, host.look)
        assert (raised.value.code, "--lost" in raised.value.hint) == ("missing", True)
        asked: list[Plan] = []

        def show(plan: Plan) -> bool:
            asked.append(plan)
            return False

        assert operation.give_up(host.paths, show, host.look) is None
        assert asked[0].thing == "data-0" and asked[0].destroys and isinstance(host.state.journal, DeepRekey)
        lines = operation.give_up(host.paths, look=host.look)
        assert lines and "disk replace data-0 NEW" in lines[0] and "operation resume" in lines[1]
        assert [each.outcome for each in host.resume()] == ["done"]
        assert host.state.journal is None
        assert_done(host, second)
        assert forget_disk.forget_disk(host.paths, "data-0", destroyed=True, look=host.look), "others may begin"
    copy = Path(shutil.copy(first, first.with_name("copy")))
    assert judge(host, copy, host.plain[first]) == MOVING, "it holds what it held"


def test_a_disk_that_comes_back_before_it_is_given_up_goes_on(one: DeepHost) -> None:
    one.rekey(lambda done, total: True)
    with without(one, one.disks[0]), pytest.raises(Refused) as raised:
        rekey_deep.cancel(one.paths, one.look)
    assert raised.value.code == "missing" and isinstance(one.state.journal, DeepRekey)
    assert [each.outcome for each in one.resume()] == ["done"]
    assert_done(one, one.disks[0])


@contextmanager
def without(host: DeepHost, image: Path) -> Iterator[None]:
    """While the disk is unplugged."""
    nodes = dict(host.nodes)
    del host.nodes[image]
    yield
    host.nodes = nodes
