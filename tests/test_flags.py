# SPDX-License-Identifier: Apache-2.0
"""`unlock disk flags` and `group create --discard`: flags in a header, and the token that binds the header."""

import contextlib
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from tests import test_members
from tests.flowfixture import HOST, Host
from tests.killing import Killer
from tests.lab.kmipliar import Liar
from tests.saved import Saved
from tests.test_disk import edit
from tests.test_members import Loops, adopt, luks_format, recovery_file, sh, wanted
from unlock import cli
from unlock.disks import disk_keys, luks
from unlock.errors import NotOurs, Refused, Tampered, UnlockError, Usage
from unlock.host import this_boot
from unlock.host.journal import GroupCreation
from unlock.keys import access
from unlock.operations import create_group, flags
from unlock.operations.check.disks import check_group
from unlock.secret import Secret

pytestmark = pytest.mark.usefixtures("key_cache")

DISCARD = frozenset({"allow-discards"})
NONE: frozenset[str] = frozenset()
loops, mounted = test_members.loops, test_members.mounted


def change(host: Host, image: Path, add: frozenset[str] = NONE, remove: frozenset[str] = NONE) -> frozenset[str]:
    return flags.change_flags(host.paths, str(image), add=add, remove=remove, look=host.look)


def flags_of(image: Path) -> frozenset[str]:
    with luks.Container(str(image)) as container:
        return container.flags


def opens_by_recovery_key(host: Host, image: Path) -> bool:
    """As the recovery prompt does: by the token that is for the header."""
    with luks.Container(str(image)) as container:
        for each in disk_keys.read_tokens(container, HOST):
            try:
                with disk_keys.dek_by_checked_recovery_key(container, each, host.recovery) as dek:
                    return bytes(dek) == host.deks[container.uuid]
            except Tampered:
                continue
    return False


def test_flags_of_a_member_are_changed_and_it_opens_by_tpm_and_by_recovery_key(tmp_path: Path) -> None:
    host = Host(tmp_path, 2)
    first, second = host.disks
    assert change(host, first, DISCARD | {"same-cpu-crypt"}) == DISCARD | {"same-cpu-crypt"}
    assert change(host, first, frozenset({"no-read-workqueue"}), frozenset({"same-cpu-crypt"})) == flags_of(first)
    assert flags_of(first) == DISCARD | {"no-read-workqueue"} and flags_of(second) == NONE
    dump = sh("cryptsetup", "luksDump", first)
    assert "allow-discards" in dump and "no-read-workqueue" in dump and "same-cpu-crypt" not in dump
    assert host.boot_opens() and host.recovery_opens()
    assert [len(host.tokens(image)) for image in host.disks] == [1, 1]
    assert change(host, first, NONE, DISCARD | {"no-read-workqueue"}) == NONE
    assert host.boot_opens() and host.recovery_opens()


def test_flags_that_are_there_already_are_not_written(tmp_path: Path) -> None:
    host = Host(tmp_path, 1)
    change(host, host.disks[0], DISCARD)
    before = host.disks[0].read_bytes()
    assert change(host, host.disks[0], DISCARD) == DISCARD
    assert host.disks[0].read_bytes() == before


def test_what_is_changed_so_is_what_this_host_wrote(tmp_path: Path) -> None:
    """No --accept-changed-header afterwards."""
    host = Host(tmp_path, 1)
    (image,) = host.disks
    with luks.Container(str(image)) as container, Secret(host.deks[container.uuid]) as dek:
        container.add_keyslot(dek, passphrase=Secret(test_members.OPERATOR))
    adopt(host, str(image))
    change(host, image, DISCARD)
    adopt(host, str(image))
    assert host.boot_opens() and flags_of(image) == DISCARD


def test_a_member_of_a_group_whose_key_the_key_manager_keeps(tmp_path: Path, kms: Liar) -> None:
    host = Host(tmp_path, 1, kms, policy_of_group="provider")
    (image,) = host.disks
    assert change(host, image, DISCARD) == DISCARD
    with luks.Container(str(image)) as container:
        (each,) = disk_keys.read_tokens(container, HOST)
        assert disk_keys.is_authentic(container, each, host.persistence)
        with host.work() as work, access.find_volume_key(work, container, host.group) as dek:
            assert bytes(dek) == host.deks[container.uuid]


def test_a_member_that_is_back_under_an_earlier_persistence_key(tmp_path: Path) -> None:
    host = Host(tmp_path, 1)
    state, new = host.state, Secret.random(32)
    state.rewrap(old=host.persistence, new=new)
    for uuid in host.deks:
        state.keep_old_key(uuid, new=new, old=host.persistence)
    state.save()
    this_boot.cache_keys(host.paths, "TPM", {"unlock:persistence": new})
    change(host, host.disks[0], DISCARD)
    host.take_key()
    assert host.boot_opens() and not host.state.has_old_keys


@pytest.mark.parametrize("add", [True, False])
def test_killed_at_every_boundary_the_disk_opens_and_the_same_command_finishes(
    tmp_path: Path, killer: Killer, add: bool
) -> None:
    host = Host(tmp_path, 1)
    (image,) = host.disks
    if not add:
        change(host, image, DISCARD)
    saved = Saved(image, host.paths.state)
    wants = (DISCARD, NONE) if add else (NONE, DISCARD)

    def begin(_: int) -> Callable[[], object]:
        saved.restore()
        return lambda: change(host, image, *wants)

    for _ in killer(begin):
        assert host.boot_opens() and opens_by_recovery_key(host, image)
        change(host, image, *wants)
        assert flags_of(image) == wants[0] and len(host.tokens(image)) == 1
        assert host.boot_opens() and host.recovery_opens()


def test_a_header_that_somebody_else_changed_is_not_made_authentic(tmp_path: Path) -> None:
    host = Host(tmp_path, 1)
    (image,) = host.disks
    edit(str(image), lambda fields: fields["segments"]["0"].update(encryption="aes-ecb"))
    before = image.read_bytes()
    with pytest.raises(Tampered) as caught:
        change(host, image, DISCARD)
    assert "unlock disk adopt" in caught.value.hint
    assert image.read_bytes() == before


def test_a_change_that_was_cut_off_is_one_that_this_host_made(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """After the flags, before the state. The token is for the header, so nothing is wrong."""
    host = Host(tmp_path, 1)
    (image,) = host.disks
    with luks.Container(str(image)) as container, Secret(host.deks[container.uuid]) as dek:
        container.add_keyslot(dek, passphrase=Secret(test_members.OPERATOR))
    adopt(host, str(image))

    def cut(*_: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(disk_keys, "drop_other_tokens", cut)
        with pytest.raises(KeyboardInterrupt):
            change(host, image, DISCARD)
    assert flags_of(image) == DISCARD and len(host.tokens(image)) == 2
    assert "allow-discards" not in str(host.state.headers)
    assert {
        each.verdict for each in check_group(host.paths, host.state, host.group, host.look(), host.persistence)
    } == {"safe"}
    adopt(host, str(image))
    assert host.boot_opens() and len(host.tokens(image)) == 1
    assert "allow-discards" in str(host.state.headers)


def null_cipher(fields: dict[str, Any]) -> None:
    fields["segments"]["0"]["encryption"] = "cipher_null-ecb"


def set_flags(names: list[str], fields: dict[str, Any]) -> None:
    fields["config"]["flags"] = names


@pytest.mark.parametrize("when", range(1, 7))
def test_a_header_that_changes_after_its_check_gets_no_token(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, when: int
) -> None:
    """For its Nth reading after the check alone."""
    host = Host(tmp_path, 1)
    (image,) = host.disks
    real, real_change, left = luks.Container.__init__, flags._change, when

    def swap(container: luks.Container, device: str) -> None:
        nonlocal left
        left -= 1
        before = b"" if left else image.read_bytes()
        if before:
            edit(str(image), null_cipher)
        real(container, device)
        if before:
            image.write_bytes(before)

    def begin(*arguments: Any) -> Any:
        monkeypatch.setattr(luks.Container, "__init__", swap)
        return real_change(*arguments)

    monkeypatch.setattr(flags, "_change", begin)
    with contextlib.suppress(UnlockError):
        change(host, image, DISCARD)
    monkeypatch.undo()
    assert "cipher_null" not in str(host.state.headers)
    for flag in ([], ["allow-discards"]):
        edit(str(image), partial(set_flags, flag))
        edit(str(image), null_cipher)
        with luks.Container(str(image)) as container:
            tokens = disk_keys.read_tokens(container, HOST)
            assert not any(disk_keys.is_authentic(container, each, host.persistence) for each in tokens)


def test_a_disk_that_is_no_member_is_left_alone(tmp_path: Path) -> None:
    host = Host(tmp_path, 1)
    other = tmp_path / "other"
    with other.open("wb") as file:
        file.truncate(32 << 20)
    with pytest.raises(NotOurs):
        change(host, other, DISCARD)
    luks_format(str(other))
    before = other.read_bytes()
    with pytest.raises(Refused) as caught:
        change(host, other, DISCARD)
    assert caught.value.code == "not-a-member" and other.read_bytes() == before
    with pytest.raises(Usage):
        change(host, tmp_path / "absent", DISCARD)
    with pytest.raises(Usage):
        change(host, host.disks[0], DISCARD, DISCARD)


def test_nothing_is_changed_while_another_command_is_not_finished(tmp_path: Path) -> None:
    host = Host(tmp_path, 1)
    host.state.begin(GroupCreation("group create", "more", members=(), options=""))
    before = host.disks[0].read_bytes()
    with pytest.raises(Refused, match="not finished"):
        change(host, host.disks[0], DISCARD)
    assert host.disks[0].read_bytes() == before


def test_a_flag_that_is_not_ours_to_set_stays(tmp_path: Path) -> None:
    path = tmp_path / "image"
    with path.open("wb") as file:
        file.truncate(32 << 20)
    with luks.format(str(path), Secret(bytes(64))) as container:
        container.set_flags(frozenset({"same-cpu-crypt"}))
        container._do("cannot take flags", "crypt_persistent_flags_set", 0, 1 << 12 | 1 << 6)
        container.set_flags(DISCARD)
        assert sorted(container.facts()["flags"]) == ["allow-discards", "no-journal"]


def test_flags_are_named_as_cryptsetup_names_them(tmp_path: Path) -> None:
    path = tmp_path / "image"
    with path.open("wb") as file:
        file.truncate(32 << 20)
    with luks.format(str(path), Secret(bytes(64))) as container:
        for name in luks.FLAGS:
            container.set_flags(frozenset({name}))
            assert container.facts()["flags"] == [name]


@pytest.mark.parametrize("words", [[], ["--set", "discard"], ["--clear", "no-journal"]])
def test_what_is_no_flag_is_named_with_those_that_there_are(words: list[str]) -> None:
    with pytest.raises(Usage) as caught:
        cli.cli(["disk", "flags", "/dev/unlock-test-absent", *words])
    told = f"{caught.value}; {caught.value.hint}"
    assert "allow-discards" in told and all(word in told for word in words[1:])


def test_a_group_is_created_with_discards(
    tmp_path: Path,
    loops: Loops,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Without device-mapper, and so without a file system."""
    host = Host(tmp_path, 0)
    monkeypatch.setattr(luks.Container, "activate", lambda *_: None)
    monkeypatch.setattr(create_group, "_make_file_system", lambda *_: None)
    monkeypatch.setattr(create_group, "_start", lambda _: None)
    for name, discard in (("fast", True), ("plain", False)):
        (disk,) = loops()
        asked = wanted(host, disk, name=name, mount=str(tmp_path / name), discard=discard)
        assert ("--discard" in create_group._options(asked)) == discard
        create_group.create_group(host.paths, asked)
        assert flags_of(Path(disk)) == (DISCARD if discard else NONE)
        with luks.Container(disk) as container:
            (each,) = disk_keys.read_tokens(container, HOST)
            assert disk_keys.is_authentic(container, each, host.persistence)
    assert recovery_file(host)


def test_a_new_disk_whose_header_changes_before_its_token_gets_none(
    tmp_path: Path,
    loops: Loops,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    host = Host(tmp_path, 0)
    (disk,) = loops()
    monkeypatch.setattr(luks.Container, "activate", lambda *_: None)
    monkeypatch.setattr(create_group, "_make_file_system", lambda *_: edit(disk, null_cipher))
    monkeypatch.setattr(create_group, "_start", lambda _: None)
    with pytest.raises(Tampered, match="changed meanwhile"):
        create_group.create_group(host.paths, wanted(host, disk, mount=str(tmp_path / "srv")))
    with luks.Container(disk) as container, pytest.raises(NotOurs):
        disk_keys.read_tokens(container, HOST)
    assert not host.state.groups
