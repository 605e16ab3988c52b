# SPDX-License-Identifier: Apache-2.0
"""`unlock disk adopt` killed anywhere: the disk still opens, other commands say what to type, and the same command
finishes, or takes away what the killed one had added."""

import errno
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from tests.flowfixture import Host
from tests.killing import Killer, killed_at
from tests.saved import Saved
from tests.test_members import OPERATOR, Loops, host, loops, luks_format, recovery_file
from unlock.disks import disk_keys, luks, token
from unlock.errors import DiskFailed, Refused
from unlock.host.journal import DiskAdoption
from unlock.operations import adopt_disk
from unlock.operations.check import host as check_host
from unlock.secret import Secret

__all__ = ["host", "loops"]

pytestmark = [pytest.mark.timeout(900), pytest.mark.usefixtures("key_cache")]


def adopt(host: Host, disk: str, name: str = "photos") -> None:
    adopt_disk.adopt_disk(host.paths, disk, "data", Secret(OPERATOR), recovery_file(host), name)


def uuid_of(disk: str) -> str:
    with luks.Container(disk) as container:
        return container.uuid


def header(disk: str) -> tuple[frozenset[str], list[int]]:
    with luks.Container(disk) as container:
        return container.flags, container.keyslots()


def tokens(disk: str) -> int:
    with luks.Container(disk) as container:
        return len(container.tokens(token.TYPE))


class Start:
    """The same start each time: a disk that has `discard` in crypttab, and one beside it."""

    def __init__(self, host: Host, loops: Loops) -> None:
        self.host = host
        self.disk, self.other = loops(2)
        for each in (self.disk, self.other):
            luks_format(each)
        Path(host.paths.crypttab).write_text(f"photos {self.disk} none luks,discard\n")
        recovery_file(host)
        self._saved = Saved(host.paths.state, host.paths.config, host.paths.crypttab, self.disk, self.other)
        self.before = header(self.disk)

    def again(self) -> None:
        """An adoption of a disk that was adopted before does nothing, and cannot be killed in between."""
        self._saved.restore()
        for each in (self.disk, self.other):
            assert (header(each), tokens(each)) == (self.before, 0), f"{each} is not as it was"
        assert not self.host.state.groups and not self.host.state.journal

    def begin(self, _: int) -> Callable[[], object]:
        self.again()
        return partial(adopt, self.host, self.disk)


@pytest.fixture
def start(host: Host, loops: Loops) -> Start:
    return Start(host, loops)


def refused_meanwhile(start: Start) -> None:
    """Another command begins nothing, and names the one to type, as status and check do."""
    with pytest.raises(Refused) as caught:
        adopt(start.host, start.other, "other")
    words = f"unlock disk adopt /dev/disk/by-uuid/{uuid_of(start.disk)} --group data"
    assert caught.value.code == "unfinished" and words in str(caught.value)
    assert start.host.state.to_finish == words
    assert header(start.other)[1] == [0]


def test_killed_anywhere_the_same_command_finishes(start: Start, killer: Killer) -> None:
    host = start.host
    left: set[tuple[bool, int, int]] = set()
    for _, killed in killer(start.begin):
        left.add((host.state.journal is not None, len(header(start.disk)[1]), tokens(start.disk)))
        with luks.Container(start.disk) as container:
            container.volume_key(Secret(OPERATOR)).wipe()
        if host.state.journal:
            assert killed
            refused_meanwhile(start)
        adopt(host, start.disk, "")
        assert host.state.journal is None
        [member] = host.state.groups["data"].members
        assert (member.uuid, member.name) == (uuid_of(start.disk), "photos")
        with luks.Container(start.disk) as container:
            assert container.flags == frozenset({"allow-discards"})
            assert container.keyslots() == [0, 1] and len(container.tokens(token.TYPE)) == 1
            assert disk_keys.recovery_keyslot(container, host.recovery)[0] == 1
            with container.volume_key(Secret(OPERATOR)) as dek:
                host.deks[container.uuid] = bytes(dek)
        host.disks = [Path(start.disk)]
        assert host.boot_opens() and host.recovery_opens()
    started = {(True, 1, 0), (True, 2, 0), (True, 2, 1)}
    assert started | {(False, 1, 0), (False, 2, 1)} <= left, "killed before and after the journal, keyslot and token"


class Failing:
    """libcryptsetup, whose calls that write a token fail."""

    def __init__(self) -> None:
        self._library = luks._lib()

    def __getattr__(self, name: str) -> Any:
        return (lambda *_: -errno.ENOSPC) if name == "crypt_token_json_set" else getattr(self._library, name)


def test_killed_anywhere_the_same_command_takes_back_what_it_cannot_finish(
    start: Start, killer: Killer, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The keyslot and the flag of the killed run: the second one has not added them."""
    host, seen = start.host, set()
    for _, _ in killer(start.begin):
        if not host.state.journal or tokens(start.disk):
            continue
        seen.add(header(start.disk)[1] == [0])
        with monkeypatch.context() as patch:
            patch.setattr(luks, "_library", Failing())
            with pytest.raises(DiskFailed):
                adopt(host, start.disk)
        assert header(start.disk) == start.before
        assert host.state.journal is None and not host.state.groups
        adopt(host, start.other, "other")
    assert seen == {True, False}


def test_a_keyslot_that_the_disk_had_before_stays(start: Start, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of the recovery key too, and what was added meanwhile with another passphrase."""
    start.again()
    with luks.Container(start.disk) as container, container.volume_key(Secret(OPERATOR)) as dek:
        container.add_keyslot(dek, passphrase=start.host.recovery)
    killed_at(1, partial(adopt, start.host, start.disk), (luks.Container.set_flags,))
    assert isinstance(start.host.state.journal, DiskAdoption)
    with luks.Container(start.disk) as container, container.volume_key(Secret(OPERATOR)) as dek:
        container.add_keyslot(dek, passphrase=Secret(b"meanwhile"))
    with monkeypatch.context() as patch:
        patch.setattr(luks, "_library", Failing())
        with pytest.raises(DiskFailed):
            adopt(start.host, start.disk)
    assert header(start.disk)[1] == [0, 1, 2]


def test_check_says_what_to_type_after_a_kill(start: Start) -> None:
    killed_at(1, start.begin(0), (luks.Container.set_token,))
    [found] = check_host.check_operation(start.host.paths, start.host.state, start.host.look)
    assert found.do.startswith("unlock disk adopt /dev/disk/by-uuid/") and found.do.endswith(" --group data")


def test_the_same_command_without_its_name_keeps_the_name(start: Start) -> None:
    start.again()
    Path(start.host.paths.crypttab).write_text("")
    assert killed_at(1, partial(adopt, start.host, start.disk, "mine"), (luks.Container.set_token,))
    adopt(start.host, start.disk, "")
    assert [each.name for each in start.host.state.groups["data"].members] == ["mine"]
