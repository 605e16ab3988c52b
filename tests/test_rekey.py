# SPDX-License-Identifier: Apache-2.0
"""`unlock rekey`: every disk opens before, during and after, whatever is away, fails or is killed. Real headers."""

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.flowfixture import Host
from tests.lab.kmipliar import ACTIVE, DEACTIVATED, Liar
from unlock.errors import ProviderError, Refused, UnlockError, Usage
from unlock.host import keyring
from unlock.keys import access, rotation
from unlock.operations import rekey

pytestmark = pytest.mark.usefixtures("key_cache")


@pytest.fixture(params=["native", "kms", "kms with Re-key"])
def host(request: pytest.FixtureRequest, tmp_path: Path, kms: Liar) -> Iterator[Host]:
    kms.rekey = "Re-key" in request.param
    yield Host(tmp_path, 2, *([] if request.param == "native" else [kms]))
    keyring.flush()


@pytest.fixture
def kms_host(tmp_path: Path, kms: Liar) -> Iterator[Host]:
    kms.rekey = False
    yield Host(tmp_path, 3, kms)
    keyring.flush()


def again(host: Host, name: str = "") -> list[rotation.Outcome]:
    return rekey.rekey(host.paths, name, host.look)


def asked(kms: Liar) -> list[str]:
    return [operation for request in kms.asked for operation in request]


def test_each_rekey_gives_a_new_kek_and_leaves_one_token_that_opens(host: Host, kms: Liar) -> None:
    seen = {host.group.kek}
    for generation in (2, 3):
        (outcome,) = again(host)
        assert (outcome.generation, outcome.behind, len(outcome.done)) == (generation, {}, 2)
        assert host.group.kek not in seen
        seen.add(host.group.kek)
        assert all(host.tokens(image) == [(host.group.kek, generation)] for image in host.disks)
        assert host.boot_opens()
        assert host.recovery_opens()
        assert host.state.journal is None
        assert not host.state.retire
    if kms.keys:
        states = [kms.keys[kek.rpartition("/")[2]].state for kek in (*host.group.former, host.group.kek)]
        assert states == [DEACTIVATED, DEACTIVATED, ACTIVE], "retired, never destroyed"


def test_the_old_kek_does_not_open_what_the_new_one_wraps(host: Host) -> None:
    with host.work() as work:
        old, _ = access.find_kek(work, host.group)
    again(host)
    with host.work() as work, pytest.raises(UnlockError):
        access.kek_prover(work, host.group, work.nodes(host.group))(old)


def test_a_member_that_is_away_still_opens_when_it_is_back_and_gets_the_new_kek_then(host: Host, kms: Liar) -> None:
    away = host.disks.pop()
    again(host)
    assert host.group.behind
    assert "Revoke" not in asked(kms), "a disk may still need the old KEK"
    again(host)
    assert len(host.state.retire) == 2
    host.disks.append(away)
    assert host.boot_opens()
    with host.work() as work:
        (outcome,) = rotation.catch_up_disks(work)
        assert outcome.done == ("data-1",)
        assert rotation.catch_up_disks(work) == []
        rotation.retire_keks(work)
    assert host.tokens(away) == [(host.group.kek, 3)]
    assert host.boot_opens()
    assert not host.state.retire


def test_a_group_with_no_disk_here_and_one_that_does_not_exist_are_refused_and_nothing_changes(host: Host) -> None:
    away, host.disks = host.disks, []
    before = Path(host.paths.state).read_bytes()
    with pytest.raises(Refused):
        again(host, "data")
    with pytest.raises(Usage):
        again(host, "other")
    assert again(host) == []
    assert Path(host.paths.state).read_bytes() == before
    host.disks = away
    assert host.boot_opens()


@pytest.mark.parametrize("operation", ["Create", "Activate", "Get", "Revoke"])
@pytest.mark.parametrize("fault", ["silent", "lost", "denied"])
def test_a_kms_that_dies_costs_nothing_and_the_next_try_takes_the_key_that_was_made(
    kms_host: Host, kms: Liar, operation: str, fault: str
) -> None:
    before = len(kms.keys)
    kms.lie(fault, on=operation)
    if operation == "Revoke":
        again(kms_host)
        assert len(kms_host.state.retire) == 1, "kept until the key manager says that it is out of use"
    else:
        with pytest.raises(ProviderError):
            again(kms_host)
        assert kms_host.group.generation == 1
    assert kms_host.state.journal is None
    assert kms_host.boot_opens()
    kms.honest()
    again(kms_host)
    assert kms_host.boot_opens()
    assert not kms_host.state.retire
    rotations = 2 if operation == "Revoke" else 1
    assert len(kms.keys) == before + rotations, "no key is left over"


def test_one_disk_without_room_stays_as_it_is_and_the_others_go_on(kms_host: Host) -> None:
    """Its header is full: the new token has no place beside the old one."""
    from unlock.disks import luks

    full = kms_host.disks[1]
    with luks.Container(str(full)) as container:
        for size in (4000, 2000, 1000, 500, 200):
            try:
                while True:
                    container.set_token({"type": "operator", "fill": "x" * size})
            except UnlockError:
                continue
    (outcome,) = again(kms_host)
    assert set(outcome.behind) == {"data-1"}
    assert kms_host.boot_opens()
    assert kms_host.tokens(full) == [(kms_host.group.former[0], 1)]
    with luks.Container(str(full)) as container:
        for number, _ in container.tokens("operator"):
            container.remove_token(number)
    again(kms_host)
    assert not kms_host.group.behind
    assert kms_host.boot_opens()


def test_a_run_over_all_groups_that_did_not_finish_goes_on_where_it_was(
    kms_host: Host, kms: Liar, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """By an error; killed, it is the same: what it needs is written before the first group."""
    rotate = rotation.rotate_kek

    def refused_from_the_second_on(work: access.Work, name: str) -> rotation.Outcome:
        if name == "data":
            kms.lie("denied", on="Create")
        return rotate(work, name)

    def stopped() -> None:
        monkeypatch.setattr(rotation, "rotate_kek", refused_from_the_second_on)
        with pytest.raises(ProviderError):
            again(kms_host)
        monkeypatch.setattr(rotation, "rotate_kek", rotate)
        kms.honest()

    def generations() -> list[int]:
        return [kms_host.state.groups[name].generation for name in ("aaa", "data", "more")]

    kms_host.add_group("aaa", 1)
    kms_host.add_group("more", 1)
    stopped()
    assert generations() == [2, 1, 1]
    capsys.readouterr()
    assert [each.group for each in again(kms_host)] == ["data", "more"]
    assert "group aaa: rotated already" in capsys.readouterr().err
    assert generations() == [2, 2, 2]
    again(kms_host)
    assert generations() == [3, 3, 3], "a run that finished is over"
    stopped()
    again(kms_host, "aaa")
    assert generations() == [5, 3, 3], "by name, as often as it is typed"
    rekey.rekey(kms_host.paths, "", kms_host.look, anew=True)
    assert generations() == [6, 4, 4]
    assert kms_host.boot_opens()
