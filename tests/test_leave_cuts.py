# SPDX-License-Identifier: Apache-2.0
"""The power goes while disks and groups leave: every write and flush of every header, from a log of the command.

After each: with all that was not flushed, with nothing of it, and with a part. Each disk that stays somebody's opens.
"""

import os
import random
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.eventlogs import Boot
from tests.flowfixture import Host
from tests.hostfixture import Machine
from tests.killing import commit
from tests.lab import tracelog
from tests.test_forget import forget
from tests.test_leave import PASSPHRASE, delete, release, with_files, with_passphrase
from unlock.disks import disk_keys, luks, token
from unlock.errors import Malformed, NotOurs, Tampered
from unlock.host import keyring
from unlock.operations import forget_disk
from unlock.secret import Secret

CUTS = int(os.environ.get("UNLOCK_CUTS", "0"))
"""So many at random, in place of each."""
pytestmark = [pytest.mark.timeout(900 + 2 * CUTS), pytest.mark.usefixtures("key_cache")]

Show = Callable[[str, object], None]
IMPORTED = (forget_disk,)


def by_token(host: Host, image: Path, *persistence: Secret) -> list[tuple[int, int]]:
    """(generation, members) of the list in each token that one of these keys opens."""
    with luks.Container(str(image)) as container:
        try:
            found = disk_keys.read_tokens(container, host.state.host)
        except NotOurs:
            return []
        return [(t.manifest, t.members) for t in found if any(is_by(container, t, key) for key in persistence)]


def is_by(container: luks.Container, each: token.Token, key: Secret) -> bool:
    try:
        disk_keys.unwrap_volume_key(container, each, key).wipe()
    except Tampered:
        return False
    return True


def by_passphrase(image: Path, word: bytes | Secret) -> bool:
    try:
        with luks.Container(str(image)) as container:
            container.volume_key(Secret(bytes(word))).wipe()
            return True
    except (NotOurs, Malformed):
        return False


class Lab:
    """The states that a power cut leaves, written to the images one after the other."""

    def __init__(self, host: Host, show: Show) -> None:
        self.host, self.show = host, show
        self.before = {image: image.read_bytes() for image in host.disks}

    def states(self, name: str, work: Callable[[], object]) -> Iterator[Counter[str]]:
        """What is counted goes into the counter."""
        log = tracelog.record(self.host.disks, work)
        assert any(each.write.flush for each in log)
        end = max(each.write.offset + len(each.write.data) for each in log)
        start = {image: content[:end] for image, content in self.before.items()}
        for image, content in self.before.items():
            image.write_bytes(content)
        total: Counter[str] = Counter()
        last: dict[Path, bytes] = {}
        for cut in tracelog.cuts(start, log, random.Random(commit()), CUTS):
            total["cuts"] += 1
            total["with writes lost"] += cut.lost > 0
            if cut.contents != last:
                last = cut.contents
                for image, content in cut.contents.items():
                    with image.open("r+b") as file:
                        file.write(content)
                total["states"] += 1
                yield total
        assert 2 * total["with writes lost"] >= total["cuts"], "unflushed writes are really lost in half of the cuts"
        self.show("shown", f"{name}: power cut in {len(log)} writes and flushes: {dict(total)}")


def test_forget(tmp_path: Path, record_property: Show) -> None:
    """The next boot has the old persistence key or the new one. The list that it finds complete is the new one, or none
    yet: the disk is away, and so the group was not whole."""
    host = Machine(tmp_path, Boot("direct"), (), 3)
    host.disks.pop()
    old = host.persistence.copy()
    lab = Lab(host, record_property)

    def work() -> None:
        forget(host, "data-2")
        (tmp_path / "key").write_bytes(bytes(keyring.get("unlock:persistence")))

    for total in lab.states("disk forget", work):
        new = Secret((tmp_path / "key").read_bytes())
        lists = [by_token(host, image, old, new) for image in host.disks]
        assert all(lists), "each opens by one of the keys"
        assert all(by_passphrase(image, host.recovery) for image in host.disks)
        complete = all((2, 2) in each for each in lists)
        assert complete or all((1, 3) in each for each in lists), "no old list goes before the new one is everywhere"
        total["new list complete"] += complete
    host.close()


@pytest.mark.parametrize("has", [True, False])
def test_release(tmp_path: Path, record_property: Show, monkeypatch: pytest.MonkeyPatch, has: bool) -> None:
    host = with_files(Host(tmp_path, 1))
    (image,) = host.disks
    add = luks.Container.add_keyslot
    monkeypatch.setattr(luks.Container, "add_keyslot", lambda self, key, passphrase, slow=False: add(
        self, key, passphrase=passphrase))  # fmt: skip
    if has:
        with_passphrase(host)
    lab = Lab(host, record_property)
    for total in lab.states(f"disk release, {'an old' if has else 'a new'} passphrase", lambda: release(host)):
        opened = {
            "passphrase": by_passphrase(image, PASSPHRASE),
            "recovery key": by_passphrase(image, host.recovery),
            "token": bool(by_token(host, image, host.persistence)),
        }
        assert opened["passphrase"] or (opened["recovery key"] and opened["token"])
        total += Counter({name: int(each) for name, each in opened.items()})
    assert opened == {"passphrase": True, "recovery key": False, "token": False}
    keyring.flush()


def test_group_delete(tmp_path: Path, record_property: Show) -> None:
    host = with_files(Host(tmp_path, 2))
    lab = Lab(host, record_property)
    for total in lab.states("group delete", lambda: delete(host)):
        assert all(by_passphrase(image, host.recovery) for image in host.disks)
        total["tokens"] += sum(bool(by_token(host, image, host.persistence)) for image in host.disks)
    assert not any(by_token(host, image, host.persistence) for image in host.disks)
    keyring.flush()


@pytest.mark.turns
def test_group_delete_with_erase(tmp_path: Path, record_property: Show) -> None:
    """What is lost stays lost, and no header of a disk goes while another has keyslots: the same command finds all."""
    host = with_files(Host(tmp_path, 2))
    lab = Lab(host, record_property)
    for total in lab.states("group delete --erase", lambda: delete(host, erase=True)):
        opened = [by_passphrase(image, host.recovery) for image in host.disks]
        found = [is_luks(image) for image in host.disks]
        assert all(found) or not any(opened)
        total["opens"] += sum(opened)
        total["headers"] += sum(found)
    assert not any(found)
    keyring.flush()


def is_luks(image: Path) -> bool:
    try:
        luks.Container(str(image)).close()
    except (NotOurs, Malformed):
        return False
    return True
