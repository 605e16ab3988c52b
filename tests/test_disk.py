# SPDX-License-Identifier: Apache-2.0
"""A token on a real LUKS2 header opens that disk, as it was, and nothing else."""

import json
import os
import shutil
import struct
from hashlib import sha256
from pathlib import Path
from typing import Any

import pytest

from tests import blank
from unlock import wrap
from unlock.disks import disk_keys, luks, token
from unlock.disks.groups import Group, Member
from unlock.errors import DiskFailed, NotOurs, Tampered, UnlockError
from unlock.keys import recovery_key
from unlock.secret import Secret

HOST = "ab" * 16


class Protected:
    """A disk in a group of one, with all its keys."""

    def __init__(self, path: Path) -> None:
        self.path = str(path)
        made = blank.disk(path, 32 << 20)
        self.recovery = recovery_key.new()
        self.dek = Secret(made.volume_key)
        self.keys = disk_keys.Keys(
            Secret.random(32), Secret.random(32), Secret.random(32), disk_keys.mac_key(self.recovery, HOST)
        )
        with luks.Container(self.path) as container:
            container.add_keyslot(self.dek, passphrase=self.recovery)
            self.member = Member(container.uuid, "data-a", "SERIAL")
        self.group = Group("data", "native-0/kek/data", 1, 1, (self.member,))
        self.write(self.group)

    def write(self, group: Group) -> token.Token:
        with luks.Container(self.path) as container:
            each = disk_keys.make_token(container, HOST, group, self.member, self.dek, self.keys)
        disk_keys.write_token(self.path, each, self.dek, self.keys)
        return each

    def open(self, path: str = "") -> Secret:
        with luks.Container(path or self.path) as container:
            (each,) = disk_keys.read_tokens(container, HOST)
            return disk_keys.unwrap_volume_key(container, each, self.keys.persistence)


@pytest.fixture
def protected(tmp_path: Path) -> Protected:
    return Protected(tmp_path / "disk")


def edit(path: str, change: Any) -> None:
    """An attacker rewrites both copies of the header's JSON, checksums and all (LUKS2 on-disk format 1.1.3)."""
    with open(path, "r+b") as file:
        for offset in (0, 16384):
            file.seek(offset)
            area = bytearray(file.read(16384))
            fields = json.loads(area[4096:].split(b"\0", 1)[0])
            change(fields)
            text = json.dumps(fields).encode()
            area[4096:] = text.ljust(len(area) - 4096, b"\0")
            area[0x1C0:0x200] = bytes(64)
            area[0x1C0:0x1E0] = sha256(area).digest()
            file.seek(offset)
            file.write(area)


def test_the_token_gives_the_volume_key_again_and_again(protected: Protected) -> None:
    assert protected.open() == protected.dek
    assert protected.open() == protected.dek


def test_writing_the_same_token_twice_changes_nothing(protected: Protected) -> None:
    before = Path(protected.path).read_bytes()
    with luks.Container(protected.path) as container:
        (each,) = disk_keys.read_tokens(container, HOST)
    disk_keys.write_token(protected.path, each, protected.dek, protected.keys)
    assert Path(protected.path).read_bytes() == before


def test_a_new_member_list_is_written_beside_the_old_one_which_goes_last(protected: Protected) -> None:
    newer = protected.group._replace(manifest=2, members=(*protected.group.members, Member("x", "data-b", "")))
    each = protected.write(newer)
    with luks.Container(protected.path) as container:
        assert [found.manifest for found in disk_keys.read_tokens(container, HOST)] == [2, 1]
    disk_keys.drop_other_tokens(protected.path, each, protected.dek, protected.keys)
    with luks.Container(protected.path) as container:
        assert [found.manifest for found in disk_keys.read_tokens(container, HOST)] == [2]


def generations(protected: Protected, host: str = HOST) -> list[int]:
    with luks.Container(protected.path) as container:
        return [each.manifest for each in disk_keys.read_tokens(container, host)]


def newer(protected: Protected) -> token.Token:
    """A token with a later member list, which is on no disk yet."""
    with luks.Container(protected.path) as container:
        group = protected.group._replace(manifest=2)
        return disk_keys.make_token(container, HOST, group, protected.member, protected.dek, protected.keys)


def drop(protected: Protected, keep: token.Token) -> None:
    disk_keys.drop_other_tokens(protected.path, keep, protected.dek, protected.keys)


def test_the_old_token_stays_when_the_new_one_did_not_reach_the_disk(protected: Protected) -> None:
    with pytest.raises(DiskFailed, match="the old one stays"):
        drop(protected, newer(protected))
    assert generations(protected) == [1]
    assert protected.open() == protected.dek


@pytest.mark.parametrize("field", ["dek", "host_key", "mac"])
def test_the_old_token_stays_when_the_new_one_reads_back_wrong(protected: Protected, field: str) -> None:
    each = newer(protected)
    zeros: dict[str, Any] = {field: bytes(len(getattr(each, field)))}
    wrong = each._replace(**zeros)
    with luks.Container(protected.path) as container:
        container.set_token(token.encode(wrong))
    with pytest.raises(DiskFailed, match="the old one stays"):
        drop(protected, each)
    assert generations(protected) == [2, 1]


@pytest.mark.parametrize("which", ["persistence", "host_key", "kek"])
def test_the_old_token_stays_when_the_new_one_gives_other_keys(protected: Protected, which: str) -> None:
    """As the next boot would find it: sealed is another persistence key, or the KEK is not the one that is kept."""
    each = newer(protected)
    with luks.Container(protected.path) as container:
        container.set_token(token.encode(each))
    right = protected.keys
    protected.keys = right._replace(**{which: Secret.random(32)})
    if which == "kek":  # the token keeps it
        each = each._replace(kek=wrap.wrap(right.persistence, plain=Secret.random(32), aad=b"of something else"))
    with pytest.raises(DiskFailed):
        drop(protected, each)
    assert generations(protected) == [2, 1]


def test_a_token_of_another_host_stays_when_ours_is_replaced(protected: Protected) -> None:
    """Its host reads its own, should the disk go back to it."""
    other = "cd" * 16
    with luks.Container(protected.path) as container:
        (ours,) = disk_keys.read_tokens(container, HOST)
        container.set_token(token.encode(ours._replace(host=other)))
    each = newer(protected)
    disk_keys.write_token(protected.path, each, protected.dek, protected.keys)
    drop(protected, each)
    assert (generations(protected), generations(protected, other)) == ([2], [1])


def test_a_token_that_does_not_give_what_it_should_is_not_taken_for_written(protected: Protected) -> None:
    with pytest.raises(DiskFailed, match="does not read back"):
        disk_keys.write_token(protected.path, newer(protected), Secret.random(64), protected.keys)


def test_a_disk_of_another_host_and_a_foreign_one_are_left_alone(protected: Protected, tmp_path: Path) -> None:
    with luks.Container(protected.path) as container, pytest.raises(NotOurs) as caught:
        disk_keys.read_tokens(container, "cd" * 16)
    assert caught.value.code == "other-host"
    foreign = Protected(tmp_path / "foreign")
    with luks.Container(foreign.path) as container:
        container.remove_token(0)
    with luks.Container(foreign.path) as container, pytest.raises(NotOurs) as caught:
        disk_keys.read_tokens(container, HOST)
    assert caught.value.code == "foreign"


def test_a_token_moved_to_another_disk_opens_nothing(protected: Protected, tmp_path: Path) -> None:
    other = str(tmp_path / "other")
    with open(other, "wb") as file:
        file.truncate(32 << 20)
    with luks.Container(protected.path) as source, luks.format(other, Secret.random(64)) as target:
        target.set_token(source.tokens(token.TYPE)[0][1])
    with pytest.raises(Tampered):
        protected.open(other)


CHANGES = {
    "cipher_null": lambda f: f["segments"]["0"].update(encryption="cipher_null-ecb"),
    "cipher": lambda f: f["segments"]["0"].update(encryption="aes-cbc-essiv:sha256"),
    "offset": lambda f: f["segments"]["0"].update(offset=str(int(f["segments"]["0"]["offset"]) + 4096)),
    "sector size": lambda f: f["segments"]["0"].update(
        sector_size=512 if f["segments"]["0"]["sector_size"] != 512 else 1024
    ),
    "iv_tweak": lambda f: f["segments"]["0"].update(iv_tweak="8"),
    "size": lambda f: f["segments"]["0"].update(size=str(1 << 20)),
    "flags": lambda f: f["config"].update(flags=["allow-discards"]),
    "volume key digest": lambda f: f["digests"]["0"].update(salt=f["digests"]["0"]["digest"]),
    "digest iterations": lambda f: f["digests"]["0"].update(iterations=f["digests"]["0"]["iterations"] + 1),
    "group": lambda f: f["tokens"]["0"].update(group="other"),
    "mapping name": lambda f: f["tokens"]["0"].update(name="root"),
    "members": lambda f: f["tokens"]["0"].update(members=2),
    "manifest": lambda f: f["tokens"]["0"].update(manifest=9),
    "serial": lambda f: f["tokens"]["0"].update(serial="OTHER"),
    "KEK id": lambda f: f["tokens"]["0"]["kek"].update(id="native-0/kek/other"),
    "KEK generation": lambda f: f["tokens"]["0"]["kek"].update(generation=2),
}


@pytest.mark.parametrize("what", sorted(CHANGES))
def test_a_changed_header_opens_nothing(protected: Protected, what: str) -> None:
    edit(protected.path, CHANGES[what])
    with pytest.raises(UnlockError) as caught:
        protected.open()
    assert caught.value.code in ("tampered", "malformed", "disk-failed")


def test_an_unchanged_header_survives_the_same_rewriting(protected: Protected) -> None:
    edit(protected.path, lambda fields: None)
    assert protected.open() == protected.dek


def test_an_operators_own_keyslot_does_not_disturb_the_token(protected: Protected) -> None:
    with luks.Container(protected.path) as container:
        container.add_keyslot(protected.dek, passphrase=Secret(b"the operator's own"))
    assert protected.open() == protected.dek


def test_the_recovery_key_authenticates_the_header_and_opens_the_disk(protected: Protected) -> None:
    with luks.Container(protected.path) as container:
        (each,) = disk_keys.read_tokens(container, HOST)
        disk_keys.check_recovery(container, each, protected.keys.mac_key)
        assert container.volume_key(protected.recovery) == protected.dek


@pytest.mark.parametrize("what", ["cipher_null", "flags", "size", "mapping name", "serial", "volume key digest"])
def test_the_recovery_path_refuses_a_changed_header_too(protected: Protected, what: str) -> None:
    edit(protected.path, CHANGES[what])
    with pytest.raises(UnlockError), luks.Container(protected.path) as container:
        (each,) = disk_keys.read_tokens(container, HOST)
        disk_keys.check_recovery(container, each, protected.keys.mac_key)


@pytest.mark.parametrize("copy", [0, 1])
def test_one_ruined_metadata_copy_costs_nothing(protected: Protected, copy: int) -> None:
    with open(protected.path, "r+b") as file:
        file.seek(copy * 16384)
        file.write(os.urandom(16384))
    assert protected.open() == protected.dek


def test_stock_cryptsetup_takes_the_recovery_key_as_printed(protected: Protected) -> None:
    import subprocess

    assert shutil.which("cryptsetup")
    subprocess.run(
        ["cryptsetup", "open", "--test-passphrase", "--key-file=-", protected.path],
        input=bytes(protected.recovery),
        check=True,
    )
    assert struct.unpack(">H", Path(protected.path).read_bytes()[6:8]) == (2,)
