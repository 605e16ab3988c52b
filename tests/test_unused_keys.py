# SPDX-License-Identifier: Apache-2.0
"""A group that does not come, as its operation fails or is taken back, leaves no key in use: neither at the provider
nor in the key cache, killed anywhere."""

from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path

import pytest
from cryptography import x509

from tests.flowfixture import HOST, Host
from tests.inplace import MIB, RESERVED, fill, recovery_file, sh
from tests.killing import Killer
from tests.kmipfixture import AUTHORITY
from tests.lab.kmipliar import ACTIVE, Liar
from tests.saved import Saved
from unlock.disks import luks
from unlock.disks.groups import Member
from unlock.errors import DiskFailed
from unlock.host import keyring, this_boot
from unlock.host.journal import GroupCreation
from unlock.keys import access
from unlock.operations import create_group, encrypt_disk, membership, operation, sync
from unlock.operations.create_group import NewGroup
from unlock.providers.kmip.provider import KmipProvider

IMPORTED = (x509, KmipProvider)
"""Before any child begins."""

pytestmark = pytest.mark.usefixtures("key_cache", "cheap_passwords")

SIZE = RESERVED + 36 * MIB


@pytest.fixture(params=[True, False], ids=["a server with Re-key", "a server without"])
def kms(request: pytest.FixtureRequest) -> Iterator[Liar]:
    with Liar(AUTHORITY, rekey=request.param) as liar:
        yield liar


@pytest.fixture
def host(tmp_path: Path, kms: Liar) -> Host:
    return Host(tmp_path, 1, kms)


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[str]:
    image = tmp_path / "disk"
    with image.open("wb") as file:
        file.truncate(SIZE)
    loop = sh("losetup", "--find", "--show", "--sector-size", 4096, image)
    yield loop
    sh("losetup", "--detach", loop)


def in_use(kms: Liar) -> set[str]:
    """A key that was never activated stays so: KMIP has no other way but to destroy it."""
    return {key.id for key in kms.keys.values() if key.state == ACTIVE}


def assert_none_unused(host: Host, kms: Liar | None = None) -> None:
    state = host.state
    known = {state.host_key_ref.id, *(group.kek for group in state.groups.values())}
    if kms:
        assert {f"{state.provider.id}/{each}" for each in in_use(kms)} == known
    keks = {each.removeprefix("unlock:kek:").rpartition(":")[0] for each in keyring.names() if ":kek:" in each}
    assert keks <= known
    assert (state.journal, state.unused_names(), state.retire) == (None, {}, [])
    assert host.boot_opens(host.disks[:1])


def half_made(host: Host, name: str = "other") -> None:
    """Killed when its disks have tokens; then early boot has opened them."""
    with host.work() as work:
        member = Member("00000000-0000-0000-0000-000000000000", f"{name}-a", "")
        work.state.begin(GroupCreation("group create", name, members=(member,), options="--mount /srv/other"))
        group, kek = membership.new_group(work, name, (member,), 1)
        this_boot.cache_keys(host.paths, "TPM", {access.cache_name(group.kek, group.generation): kek})


def finish(host: Host) -> None:
    """What is typed after a kill, and what the next sync does."""
    if host.state.journal:
        operation.cancel(host.paths, look=host.look)
    sync.sync(host.paths, host.look)


def again(host: Host, kms: Liar, *files: str) -> Callable[[], None]:
    """Gives host and key manager what they have now, as often as it is called."""
    saved, keys = Saved(host.paths.state, *files), set(kms.keys)

    def restore() -> None:
        saved.restore()
        for each in set(kms.keys) - keys:
            del kms.keys[each]

    return restore


def test_killed_while_a_group_is_taken_back(host: Host, kms: Liar, killer: Killer) -> None:
    restore = again(host, kms)

    def begin(_: int) -> Callable[[], object]:
        restore()
        half_made(host)
        return lambda: operation.cancel(host.paths, look=host.look)

    for _, killed in killer(begin):
        if killed:
            finish(host)
        assert_none_unused(host, kms)


def test_killed_while_a_group_is_made_that_fails(
    host: Host, kms: Liar, disk: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, killer: Killer
) -> None:
    monkeypatch.setattr(luks.Container, "activate", fails)
    restore = again(host, kms)
    wanted = NewGroup("other", (disk,), str(tmp_path / "srv"), "", frozenset({disk}), recovery_file(host))

    def begin(_: int) -> Callable[[], object]:
        restore()
        return run

    def run() -> None:
        with suppress(DiskFailed):
            create_group.create_group(host.paths, wanted)

    for _, killed in killer(begin):
        if killed:
            finish(host)
        assert_none_unused(host, kms)


def fails(*_: object, **__: object) -> None:
    raise DiskFailed("it fails", "lsblk")


def test_killed_while_an_encryption_begins_and_is_taken_back(
    host: Host, kms: Liar, disk: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, killer: Killer
) -> None:
    monkeypatch.setattr(encrypt_disk, "VOLATILE", ())
    monkeypatch.setattr(encrypt_disk, "_make_room_and_move", is_cut)
    fill(disk, tmp_path, SIZE - RESERVED)
    restore = again(host, kms, host.paths.config)
    choices = encrypt_disk.Choices(disk, "photos", recovery_file=recovery_file(host))

    def begin(_: int) -> Callable[[], object]:
        restore()
        return run

    def run() -> None:
        with suppress(KeyboardInterrupt):
            encrypt_disk.encrypt_disk(host.paths, choices, lambda done, size: False, look=host.look)
        operation.cancel(host.paths, look=host.look)

    for _, killed in killer(begin):
        if killed:
            finish(host)
        assert_none_unused(host, kms)


def is_cut(*_: object) -> None:
    raise KeyboardInterrupt


def test_an_encryption_that_fails_before_it_has_begun(
    host: Host, kms: Liar, disk: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(encrypt_disk, "VOLATILE", ())
    monkeypatch.setattr(encrypt_disk, "_prove", fails)
    fill(disk, tmp_path, SIZE - RESERVED)
    choices = encrypt_disk.Choices(disk, "photos", recovery_file=recovery_file(host))
    with pytest.raises(DiskFailed):
        encrypt_disk.encrypt_disk(host.paths, choices, lambda done, size: False, look=host.look)
    assert_none_unused(host, kms)


def test_a_provider_that_does_not_answer_is_asked_again_by_a_sync(host: Host, kms: Liar) -> None:
    half_made(host)
    kms.lie("failure", on="Locate")
    assert operation.cancel(host.paths, look=host.look)
    assert len(in_use(kms)) == 3 and host.state.unused_names() == {"other": 1}
    lines = sync.sync(host.paths, host.look)
    assert [each.key for each in lines if each.outcome == "still-active"] == ["replaced key"]
    kms.honest()
    kms.lie("failure", on="Revoke")
    sync.sync(host.paths, host.look)
    assert len(host.state.retire) == 1
    kms.honest()
    sync.sync(host.paths, host.look)
    assert_none_unused(host, kms)


def test_the_next_group_of_that_name_has_another_key(host: Host, kms: Liar) -> None:
    half_made(host)
    assert operation.cancel(host.paths, look=host.look)
    with host.work() as work:
        group, kek = membership.new_group(work, "other", (), 1)
        kek.wipe()
    assert group.generation == 2 and f"{host.state.provider.id}/" in group.kek


def test_a_group_that_is_made_keeps_its_key(host: Host, kms: Liar) -> None:
    half_made(host)
    with host.work() as work:
        generation = work.state.next_generation("other")
        group, kek = membership.new_group(work, "other", (), 1)
        kek.wipe()
        work.state.groups["other"] = group
        work.state.journal = None
        work.state.save()
    sync.sync(host.paths, host.look)
    assert generation == group.generation == 1 and len(in_use(kms)) == 3 and not host.state.unused_names()


def test_keys_of_the_native_provider(tmp_path: Path, killer: Killer) -> None:
    host = Host(tmp_path, 1)
    saved = Saved(host.paths.state)

    def begin(_: int) -> Callable[[], object]:
        saved.restore()
        half_made(host)
        return lambda: operation.cancel(host.paths, look=host.look)

    for _, killed in killer(begin):
        if killed:
            finish(host)
        assert_none_unused(host)
        with host.work() as work:
            group, kek = membership.new_group(work, "other", (), 1)
            kek.wipe()
        assert group.generation == 2 and HOST in group.kek_name


def test_without_keys_in_this_boot_it_is_taken_back_and_told(
    host: Host, kms: Liar, capsys: pytest.CaptureFixture[str]
) -> None:
    half_made(host)
    keyring.forget("unlock:persistence")
    assert operation.cancel(host.paths, look=host.look)
    assert "may still be active" in capsys.readouterr().err
    assert host.state.journal is None and host.state.unused_names() == {"other": 1}
