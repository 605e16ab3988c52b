# SPDX-License-Identifier: Apache-2.0
"""`unlock disk forget`: a disk that is gone leaves its group. Real headers, a real key manager's protocol, a TPM."""

import json
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.eventlogs import Boot
from tests.flowfixture import HOST, Host
from tests.hostfixture import Machine
from tests.killing import LASTING, Killer, killed_at
from tests.kmipfixture import AUTHORITY
from tests.lab.kmipliar import ACTIVE, DEACTIVATED, Liar
from tests.saved import Saved
from tests.test_member_list import complete, fill, lists
from tests.test_members import Loops, loops, mounted, sh
from unlock.disks import disk_keys, luks
from unlock.errors import DiskFailed, ProviderError, Refused, Tampered, UnlockError
from unlock.host import keyring
from unlock.host.journal import DiskForgetting, command
from unlock.keys import access
from unlock.operations import forget_disk, new_persistence_key, operation, rekey
from unlock.operations.consent import Plan
from unlock.operations.forget_disk import Forgotten

pytestmark = [pytest.mark.timeout(900), pytest.mark.usefixtures("key_cache")]

__all__ = ["loops", "mounted"]


@pytest.fixture
def kms() -> Iterator[Liar]:
    with Liar(AUTHORITY, rekey=False) as liar:
        yield liar


@pytest.fixture(params=["native", "kms"])
def host(request: pytest.FixtureRequest, tmp_path: Path, kms: Liar) -> Iterator[Machine]:
    """It has a TPM, and a group of three."""
    machine = Machine(tmp_path, Boot("direct"), (), 3, *([] if request.param == "native" else [kms]))
    yield machine
    machine.close()


def lose(host: Host) -> tuple[Path, str]:
    """The image and the UUID of the last disk, which is away now."""
    return host.disks.pop(), host.group.members[2].uuid


def forget(host: Host, thing: str, *, destroyed: bool = False) -> Forgotten | None:
    tcti = host.chip.tcti if isinstance(host, Machine) else "device:/none"
    return forget_disk.forget_disk(host.paths, thing, look=host.look, tcti=tcti, destroyed=destroyed)


def boots(host: Machine) -> None:
    """The TPM gives one key; the fixture takes it for what opens disks."""
    assert host.boot() == "unsealed"
    host.take_key()


def test_a_lost_disk_is_in_no_list_and_opens_by_the_recovery_key_alone(host: Machine, kms: Liar) -> None:
    before = host.group
    lost, uuid = lose(host)
    assert not complete(host, host.disks)
    old_key = bytes(host.persistence)
    found = forget(host, uuid)
    assert found == Forgotten("data", "data-2", ("data-0", "data-1"), 2)
    assert (host.group.kek != before.kek, host.group.behind, host.state.journal) == (True, (), None)
    boots(host)
    assert bytes(host.persistence) != old_key
    assert complete(host, host.disks)
    assert host.boot_opens()
    assert host.recovery_opens()
    host.disks.append(lost)
    assert not host.opens(lost), "neither by the TPM's new key"
    assert host.recovery_opens()
    if kms.keys:
        states = [kms.keys[kek.rpartition("/")[2]].state for kek in (before.kek, host.group.kek)]
        assert states == [DEACTIVATED, ACTIVE], "retired, not destroyed"
    state = json.loads(Path(host.paths.state).read_text())
    assert [*state.pop("forgotten")] == [uuid] and uuid not in json.dumps(state)


def test_the_old_keys_do_not_open_what_is_there_now(host: Machine) -> None:
    with host.work() as work:
        old_kek = access.find_kek(work, host.group)[0]
    old_key = host.persistence
    _, uuid = lose(host)
    forget(host, uuid)
    for image in host.disks:
        with luks.Container(str(image)) as container:
            (each,) = disk_keys.read_tokens(container, HOST)
            with pytest.raises(Tampered):
                disk_keys.unwrap_volume_key(container, each, old_key)
            with pytest.raises(Tampered):
                disk_keys.unwrap_by_kek(container, each, old_kek)


def test_a_destroyed_disk_needs_neither_key_manager_nor_tpm(tmp_path: Path, kms: Liar) -> None:
    host = Host(tmp_path, 3, kms)
    kms.stop()
    before = host.group
    lost, _ = lose(host)
    found = forget(host, "data-2", destroyed=True)
    assert found and found.generation == 1
    assert (host.group.kek, host.state.narrowed, host.state.journal) == (before.kek, None, None)
    assert complete(host, host.disks)
    assert host.boot_opens()
    assert not complete(host, [lost]), "by itself it opens as nothing"
    keyring.flush()


def test_run_twice_the_second_says_that_there_is_no_such_disk(host: Machine) -> None:
    _, uuid = lose(host)
    forget(host, f"/dev/disk/by-uuid/{uuid}")
    unchanged(host, "not-a-member", lambda: forget(host, uuid))


@pytest.mark.parametrize("name", ["uuid", "/dev/disk/by-uuid/uuid", "data-2", "/dev/mapper/data-2"])
def test_it_is_named_by_uuid_or_mapping(host: Machine, name: str) -> None:
    _, uuid = lose(host)
    assert forget(host, name.replace("uuid", uuid) if name != "/dev/disk/by-uuid/uuid" else f"{name[:-4]}{uuid}")


def test_the_plan_is_shown_and_nothing_done(host: Machine) -> None:
    lose(host)
    plans: list[Plan] = []

    def show(plan: Plan) -> bool:
        plans.append(plan)
        return False

    before = contents(host)
    assert forget_disk.forget_disk(host.paths, "data-2", look=host.look, consent=show) is None
    assert contents(host) == before
    (plan,) = plans
    assert len(plan.steps) == 4
    assert not plan.destroys
    forget_disk.forget_disk(host.paths, "data-2", destroyed=True, look=host.look, consent=show)
    assert [len(each.steps) for each in plans] == [4, 2]


# Bad input


def contents(host: Host) -> list[bytes]:
    return [Path(path).read_bytes() for path in [host.paths.state, host.paths.config, *map(str, host.disks)]]


def unchanged(host: Host, code: str, work: Callable[[], object]) -> UnlockError:
    before = contents(host)
    with pytest.raises(UnlockError) as caught:
        work()
    assert contents(host) == before
    assert (caught.value.code, bool(caught.value.hint), "\n" in str(caught.value)) == (code, True, False)
    return caught.value


def test_a_disk_that_is_here_is_not_forgotten(host: Machine) -> None:
    for thing in ("data-2", str(host.disks[2])):
        error = unchanged(host, "present", lambda thing=thing: forget(host, thing))  # type: ignore[misc]
        assert "unlock disk remove data-2" in error.hint


def test_what_is_no_member_is_not_forgotten(host: Machine, tmp_path: Path) -> None:
    lose(host)
    (tmp_path / "plain").write_bytes(bytes(1 << 20))
    for thing in ("data-9", "/dev/none", str(tmp_path / "plain")):
        unchanged(host, "not-a-member", lambda thing=thing: forget(host, thing))  # type: ignore[misc]


def test_nothing_is_forgotten_while_another_member_is_away(host: Machine) -> None:
    lose(host)
    host.disks.pop()
    error = unchanged(host, "missing", lambda: forget(host, "data-2"))
    assert "data-1" in str(error)


def test_the_last_member_is_not_forgotten(tmp_path: Path) -> None:
    host = Host(tmp_path, 1)
    host.disks.pop()
    error = unchanged(host, "last-member", lambda: forget(host, "data-0"))
    assert error.hint == "unlock group delete data"


def test_a_changed_header_of_another_member_is_not_made_authentic(host: Machine) -> None:
    lose(host)
    with luks.Container(str(host.disks[0])) as container:
        container.set_flags(frozenset({"allow-discards"}))
    unchanged(host, "changed-header", lambda: forget(host, "data-2"))


def test_another_operation_is_finished_first(host: Machine) -> None:
    lose(host)
    with host.work() as work:
        work.state.begin(DiskForgetting("disk forget", "another", None, 5, 5, None))
    unchanged(host, "unfinished", lambda: forget(host, "data-2"))


def test_a_key_manager_that_is_away_leaves_all_as_it_was(tmp_path: Path, kms: Liar) -> None:
    host = Host(tmp_path, 3, kms)
    lose(host)
    kms.stop()
    before = contents(host)[2:]
    with pytest.raises(ProviderError):
        forget(host, "data-2")
    assert contents(host)[2:] == before
    assert (host.state.journal, len(host.group.members), host.state.narrowed) == (None, 3, None)
    kms.start()
    rekey.rekey(host.paths, "data", host.look)
    keyring.flush()


def test_a_full_header_leaves_all_as_it_was_and_the_same_command_then_works(host: Machine) -> None:
    lose(host)
    fill(host.disks[1])
    with pytest.raises(DiskFailed):
        forget(host, "data-2")
    assert [lists(host, image) for image in host.disks] == [[(1, 3)], [(1, 3)]]
    assert (host.state.journal, len(host.group.members), host.state.narrowed) == (None, 3, None)
    with luks.Container(str(host.disks[1])) as container:
        for number, _ in container.tokens("other"):
            container.remove_token(number)
    assert forget(host, "data-2")
    boots(host)
    assert complete(host, host.disks)


# Killed


@pytest.mark.turns
@pytest.mark.parametrize("host", ["kms", pytest.param("native", marks=pytest.mark.long(minutes=1))], indirect=True)
def test_killed_anywhere_it_is_finished_by_the_same_command(host: Machine, killer: Killer, kms: Liar) -> None:
    """The disks open before and after, by what the TPM then has, and by the recovery key."""
    lost, uuid = lose(host)
    saved, keys = Saved(*host.disks, lost, host.paths.state), dict(kms.keys)
    host.chip.kill()
    shutil.copytree(host.chip.state, host.folder / "saved-tpm")
    host.chip.start()

    def begin(_: int) -> Callable[[], object]:
        saved.restore()
        kms.keys = dict(keys)
        for key in kms.keys.values():
            key.state = ACTIVE
        host.clear()
        host.chip.kill()
        shutil.copytree(host.folder / "saved-tpm", host.chip.state, dirs_exist_ok=True)
        host.chip.start()
        boots(host)
        return lambda: forget(host, uuid)

    commands = set()
    for _ in killer(begin):
        boots(host)
        assert host.boot_opens()
        assert host.recovery_opens()
        if journal := host.state.journal:
            commands.add(command(journal))
        assert len(host.group.members) == 3 or complete(host, host.disks)
        if len(host.group.members) == 3 or new_persistence_key.is_due(host.state):
            forget(host, uuid)
        boots(host)
        assert (host.state.journal, host.state.narrowed, len(host.group.members)) == (None, None, 2)
        assert complete(host, host.disks)
        assert [len(host.tokens(image)) for image in host.disks] == [1, 1]
        assert not host.opens(lost)
        if keys:
            assert len(kms.keys) == len(keys) + 1, "one key, however often it is tried"
    assert commands == {f"unlock disk forget {uuid}", "unlock rekey --fresh"}


def test_killed_with_a_destroyed_disk_it_is_finished_by_the_same_command(tmp_path: Path, killer: Killer) -> None:
    host = Host(tmp_path, 3)
    lost, uuid = lose(host)
    saved = Saved(*host.disks, lost, host.paths.state)

    def begin(_: int) -> Callable[[], object]:
        saved.restore()
        return lambda: forget(host, uuid, destroyed=True)

    for _ in killer(begin):
        assert host.boot_opens()
        assert host.recovery_opens()
        if journal := host.state.journal:
            assert command(journal) == f"unlock disk forget {uuid} --destroyed"
            forget(host, uuid)
        elif len(host.group.members) == 3:
            forget(host, uuid, destroyed=True)
        assert (host.state.journal, len(host.group.members), host.group.generation) == (None, 2, 1)
        assert complete(host, host.disks)
    with pytest.raises(Refused):
        forget(host, uuid)
    keyring.flush()


def test_killed_it_goes_on_by_operation_resume(host: Machine) -> None:
    _, uuid = lose(host)
    number = 1
    while not isinstance(host.state.journal, DiskForgetting):
        assert killed_at(number, lambda: forget(host, uuid), LASTING)
        number += 1
    assert operation.resume(host.paths, lambda *_: False, look=host.look, tcti=host.chip.tcti)
    boots(host)
    after = host.state
    assert (after.journal, after.narrowed, len(host.group.members)) == (None, None, 2)
    assert complete(host, host.disks)


# What a btrfs can spare


@pytest.mark.root
@pytest.mark.parametrize(("profile", "short"), [("raid1", []), ("single", ["single"]), ("raid0", ["raid0"])])
def test_the_kernel_says_what_a_btrfs_loses_without_a_disk(
    loops: Loops, mounted: Callable[..., Path], profile: str, short: list[str]
) -> None:
    disks = loops(2, 256 << 20)
    sh("mkfs.btrfs", "-q", "-d", profile, "-m", "raid1", *disks)
    sh("btrfs", "device", "scan", *disks)
    assert forget_disk.profiles_that_lose_data(str(mounted(disks[0]))) == short


@pytest.mark.root
def test_missing_devices_are_counted(loops: Loops, mounted: Callable[..., Path]) -> None:
    disks = loops(3, 256 << 20)
    sh("mkfs.btrfs", "-q", "-d", "raid1c3", "-m", "raid1c3", *disks)
    sh("btrfs", "device", "scan", "--forget")
    for each in disks[1:]:
        sh("wipefs", "-qa", each)
    where = mounted("-o", "ro,degraded", disks[0])
    assert forget_disk.profiles_that_lose_data(str(where)) == []
