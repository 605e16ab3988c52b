# SPDX-License-Identifier: Apache-2.0
"""The power goes while a disk is added, removed or replaced: every write and flush of every header, from a log.

After each: with all that was not flushed, with nothing of it, and with a part. The next boot finds a complete member
list, the recovery key opens every disk that has data, and the same command finishes.
"""

from collections import Counter
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.flowfixture import Host
from tests.test_group_disks import NEW, add, image, remove, replace
from tests.test_leave_cuts import CUTS, IMPORTED, Lab, Show, by_passphrase, by_token, is_luks
from unlock.disks.groups import Member
from unlock.host import keyring
from unlock.operations import add_disk, replace_disk

pytestmark = [pytest.mark.usefixtures("key_cache"), pytest.mark.timeout(600 + 2 * CUTS)]
LOADED = (*IMPORTED, add_disk, replace_disk)


@pytest.fixture
def host(tmp_path: Path) -> Host:
    return Host(tmp_path, 2)


def finishes(total: Counter[str], every: int, work: Callable[[], object]) -> None:
    """Runs the command again at a sample of the states."""
    if total["states"] % every == 0:
        work()
        total["run again"] += 1


def lists(host: Host, disks: list[Path]) -> list[list[tuple[int, int]]]:
    return [by_token(host, each, host.persistence) if is_luks(each) else [] for each in disks]


def complete(found: list[list[tuple[int, int]]]) -> bool:
    """Whether early boot finds a member list of which all disks are here."""
    each = [entry for disk in found for entry in disk]
    return any(each.count(entry) == entry[1] for entry in each)


@pytest.mark.long(minutes=2)
def test_add(host: Host, record_property: Show) -> None:
    old, new = list(host.disks), image(host)
    state = Path(host.paths.state)
    host.disks.append(new)
    lab = Lab(host, record_property)
    before = state.read_bytes()

    def work() -> None:
        host.disks[:] = old
        add(host, new)

    for total in lab.states("disk add", work):
        host.disks[:] = [*old, new]
        assert complete(lists(host, host.disks))
        assert all(by_passphrase(each, host.recovery) for each in old)
        total["new list complete"] += [(2, 3)] in lists(host, old)
        now = {each: each.read_bytes()[: 1 << 20] for each in host.disks}
        state.write_bytes(before)
        finishes(total, 25, work)
        if total["states"] % 25 == 0:
            assert lists(host, [*old, new]) == [[(2, 3)]] * 3
        for each, content in now.items():
            with each.open("r+b") as file:
                file.write(content)
        host.disks[:] = [*old, new]
    keyring.flush()


def test_remove(host: Host, record_property: Show) -> None:
    gone = host.group.members[1]
    lab = Lab(host, record_property)
    for total in lab.states("disk remove", lambda: remove(host, gone)):
        assert complete(lists(host, host.disks))
        assert all(by_passphrase(each, host.recovery) for each in host.disks)
        total["without the disk"] += (2, 1) in lists(host, host.disks)[0]
    assert lists(host, host.disks) == [[(2, 1)], []]
    keyring.flush()


@pytest.mark.long(minutes=2)
def test_replace(host: Host, record_property: Show) -> None:
    old: Member = host.group.members[0]
    present, new = list(host.disks), image(host)
    host.disks.append(new)
    lab = Lab(host, record_property)

    def work() -> None:
        host.disks[:] = present
        replace(host, old, new, absent=False)

    for total in lab.states("disk replace", work):
        host.disks[:] = [*present, new]
        found = lists(host, host.disks)
        assert complete(found)
        assert all(by_passphrase(each, host.recovery) for each in present)
        both = all((2, 3) in each for each in found)
        total["both disks"] += both
        total["without the old one"] += all((3, 2) in each for each in found[1:])
        assert found[0] or all((3, 2) in each for each in found[1:]), "its tokens go last"
    assert lists(host, host.disks) == [[], [(3, 2)], [(3, 2)]]
    assert NEW.uuid
    keyring.flush()
