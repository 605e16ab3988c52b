# SPDX-License-Identifier: Apache-2.0
"""A new member list without the recovery key: on every disk before any old one goes. Real headers."""

from collections.abc import Callable
from pathlib import Path

import pytest

from tests.flowfixture import Host
from tests.killing import Killer
from unlock.disks import disk_keys, luks
from unlock.disks.groups import Group
from unlock.errors import DiskFailed, UnlockError
from unlock.keys import access, rotation
from unlock.operations import membership
from unlock.secret import Secret

pytestmark = pytest.mark.usefixtures("key_cache")


@pytest.fixture
def host(tmp_path: Path) -> Host:
    return Host(tmp_path, 3)


def without_the_last(host: Host) -> Group:
    return host.group._replace(members=host.group.members[:2], manifest=2)


def rewrite(host: Host, group: Group) -> Group:
    with host.work() as work, access.find_kek(work, group)[0] as kek:
        written = membership.rewrite_member_list(work, group, work.nodes(group), kek=kek)
        work.state.groups[group.name] = written
        work.state.save()
        return written


def lists(host: Host, image: Path) -> list[tuple[int, int]]:
    """(generation, members) of the member list in each token that opens the disk as early boot does."""
    found = []
    with luks.Container(str(image)) as container:
        for each in disk_keys.read_tokens(container, host.state.host):
            if disk_keys.is_authentic(container, each, host.persistence):
                found.append((each.manifest, each.members))
    return found


def complete(host: Host, images: list[Path]) -> bool:
    """Whether early boot finds a member list of which all disks are here."""
    found = [each for image in images for each in lists(host, image)]
    return any(found.count(each) == each[1] for each in found)


def test_it_is_on_every_disk_and_nothing_else_is(host: Host) -> None:
    left = host.disks.pop()
    group = without_the_last(host)
    for _ in range(2):
        assert rewrite(host, group).behind == ()
        assert [lists(host, image) for image in host.disks] == [[(2, 2)], [(2, 2)]]
        assert host.boot_opens()
        assert host.recovery_opens()
    assert lists(host, left) == [(1, 3)]


def test_a_member_that_is_away_is_behind_and_gets_it_when_it_is_back(host: Host) -> None:
    away = host.disks.pop()
    group = host.group._replace(manifest=2)
    assert rewrite(host, group).behind == (group.members[2].uuid,)
    host.disks.append(away)
    with host.work() as work:
        (outcome,) = rotation.catch_up_disks(work)
    assert outcome.done == ("data-2",)
    assert [lists(host, image) for image in host.disks] == [[(2, 3)]] * 3


def test_a_new_member_gets_its_first_token(host: Host) -> None:
    with luks.Container(str(host.disks[2])) as container:
        container.remove_token(0)
        uuid = container.uuid
    group = host.group._replace(manifest=2)
    with host.work() as work, access.find_kek(work, group)[0] as kek, Secret(host.deks[uuid]) as dek:
        membership.rewrite_member_list(work, group, work.nodes(group), kek=kek, new={uuid: dek})
        assert bytes(dek) == host.deks[uuid], "it is still the caller's"
    assert [lists(host, image) for image in host.disks] == [[(2, 3)]] * 3


def test_killed_anywhere_a_list_is_complete_and_it_finishes(host: Host, killer: Killer) -> None:
    contents = [image.read_bytes() for image in host.disks]
    spare = host.disks[:2]
    group = without_the_last(host)

    def begin(_: int) -> Callable[[], object]:
        for image, content in zip(host.disks, contents, strict=True):
            image.write_bytes(content)
        return lambda: rewrite(host, group)

    for _ in killer(begin):
        assert complete(host, host.disks)
        assert host.recovery_opens()
        rewrite(host, group)
        assert complete(host, spare)
        assert [lists(host, image) for image in spare] == [[(2, 2)], [(2, 2)]]


def test_a_disk_that_does_not_take_it_leaves_all_as_they_were(host: Host) -> None:
    """Its header is full."""
    fill(host.disks[1])
    host.disks.pop()
    group = without_the_last(host)
    with pytest.raises(DiskFailed, match="cannot take the token"):
        rewrite(host, group)
    assert [lists(host, image) for image in host.disks] == [[(1, 3)], [(1, 3)]]
    with host.work() as work:
        assert not membership.has_member_list(work.state, group, work.nodes(group))


def test_what_is_half_done_is_not_taken_back(host: Host) -> None:
    """The first disk has the new list alone: without it there the other list would not be complete either."""
    group = without_the_last(host)
    host.disks.pop()
    old = host.disks[1].read_bytes()
    rewrite(host, group)
    host.disks[1].write_bytes(old)
    fill(host.disks[1])
    with pytest.raises(UnlockError):
        rewrite(host, group)
    assert lists(host, host.disks[0]) == [(2, 2)]
    with host.work() as work:
        assert membership.has_member_list(work.state, group, work.nodes(group))


def fill(image: Path) -> None:
    with luks.Container(str(image)) as container:
        for _ in range(30):
            try:
                container.set_token({"type": "other", "x": "x" * 1500})
            except DiskFailed:
                return
