# SPDX-License-Identifier: Apache-2.0
"""What a header may say while a disk is re-encrypted: what a run of ours leaves, and nothing that somebody put there
(CVE-2021-4122)."""

import copy
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.deepfixture import DeepHost, metadata
from unlock.disks import disk_keys, luks, raw_header, reencrypt, reencrypt_plan
from unlock.disks.reencrypt_plan import CRASH, MOVING, NEW, OLD, WHOLE, Plan
from unlock.errors import DiskFailed, Malformed, NotOurs, Tampered
from unlock.host import keyring
from unlock.secret import Secret
from unlock.strictjson import canonical

pytestmark = [pytest.mark.root, pytest.mark.usefixtures("key_cache")]

Header = dict[str, Any]


@pytest.fixture
def host(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[DeepHost]:
    """Stopped when a part of its disk is new."""
    monkeypatch.setattr(reencrypt, "HOTZONE", 1 << 20)
    with DeepHost(tmp_path).plugged_in() as found:
        found.rekey(lambda done, total: done > 1 << 20)
        yield found
    keyring.flush()


@pytest.fixture
def half(host: DeepHost) -> Header:
    return metadata(host.disks[0])


@pytest.fixture
def plan(host: DeepHost) -> Plan:
    return plan_of(host.disks[0])


def plan_of(image: Path) -> Plan:
    with luks.Container(str(image)) as container:
        plans = [each.reencryption.plan for each in disk_keys.read_tokens(container, "") if each.reencryption]
    return plans[0]


def parts(header: Header) -> tuple[Header, Header]:
    """The new and the old part of the data."""
    return header["segments"]["0"], header["segments"]["1"]


def backup(header: Header, flag: str) -> Header:
    return next(each for each in header["segments"].values() if each.get("flags") == [flag])


def keyslot(header: Header) -> Header:
    return next(each for each in header["keyslots"].values() if each["type"] == "reencrypt")


def linear(segment: Header) -> None:
    segment["type"] = "linear"
    for name in "encryption", "iv_tweak", "sector_size":
        del segment[name]


def swap_digests(header: Header) -> None:
    old, new = header["digests"]["0"], header["digests"]["1"]
    old["segments"], new["segments"] = new["segments"], old["segments"]


def as_datashift(header: Header) -> None:
    keyslot(header)["area"].update(type="datashift", shift_size="4096")


def move_a_segment(header: Header) -> None:
    moved = {name: value for name, value in parts(header)[1].items() if name != "flags"}
    header["segments"]["4"] = {**moved, "flags": ["backup-moved-segment"]}


def without_old_part(header: Header) -> None:
    """The new part alone, as if the rest of the disk were not there."""
    del header["segments"]["1"]
    header["digests"]["0"]["segments"].remove("1")


ATTACKS: dict[str, Callable[[Header], object]] = {
    "the old part in clear": lambda header: linear(parts(header)[1]),
    "the new part in clear": lambda header: linear(parts(header)[0]),
    "decryption": lambda header: keyslot(header).update(mode="decrypt"),
    "backwards": lambda header: keyslot(header).update(direction="backward"),
    "to end in clear": lambda header: linear(backup(header, "backup-final")),
    "to end without a cipher": lambda header: backup(header, "backup-final").update(encryption="cipher_null-ecb"),
    "all without a cipher": lambda header: [
        each.update(encryption="cipher_null-ecb") for each in header["segments"].values()
    ],
    "the earlier requirement": lambda header: header["config"].update(requirements={"mandatory": ["online-reencrypt"]}),
    "one more requirement": lambda header: header["config"]["requirements"]["mandatory"].append("inline-hw-tags"),
    "shifted data": as_datashift,
    "a moved segment": move_a_segment,
    "swapped digests": swap_digests,
    "a third digest": lambda header: header["digests"].update({"7": {"segments": ["1"], "keyslots": []}}),
    "another old volume key": lambda header: header["digests"]["0"].update(digest="AAAA"),
    "another new volume key": lambda header: header["digests"]["1"].update(digest="AAAA"),
    "another IV": lambda header: parts(header)[1].update(iv_tweak="8"),
    "another sector size": lambda header: parts(header)[1].update(sector_size=512),
    "a part left out": without_old_part,
    "no backup": lambda header: header["segments"].pop(str(len(header["segments"]) - 1)),
    "no keyslot of the run": lambda header: header["keyslots"].pop(
        next(number for number, each in header["keyslots"].items() if each["type"] == "reencrypt")
    ),
    "a keyslot that anybody opens": lambda header: header["keyslots"]["0"]["area"].update(encryption="cipher_null-ecb"),
    "other flags": lambda header: header["config"].update(flags=["allow-discards"]),
}


@pytest.mark.parametrize("attack", ATTACKS)
def test_what_somebody_put_into_the_header_is_refused(attack: str, host: DeepHost, half: Header) -> None:
    """By the TPM's key and by the recovery key; nothing is written."""
    (image,) = host.disks
    changed = copy.deepcopy(half)
    ATTACKS[attack](changed)
    assert changed != half
    newest = raw_header.read_valid_copies(str(image))[0]
    raw_header.write_header(host.nodes[image], changed, newest, newest.sequence + 1)
    before = image.read_bytes()
    with pytest.raises((Tampered, Malformed, DiskFailed)):
        opens(host, image)
    with pytest.raises((Tampered, Malformed, DiskFailed, NotOurs)):
        opens(host, image, host.recovery)
    (outcome,) = host.resume()
    assert outcome.outcome not in ("done", "stopped")
    assert image.read_bytes() == before


def opens(host: DeepHost, image: Path, recovery: Secret | None = None) -> None:
    with luks.Container(str(image)) as container:
        each = next(each for each in disk_keys.read_tokens(container, "") if each.reencryption)
        if recovery:
            disk_keys.dek_by_checked_recovery_key(container, each, recovery).wipe()
        else:
            disk_keys.unwrap_volume_key(container, each, host.persistence).wipe()


def test_without_an_attack_it_opens(host: DeepHost) -> None:
    opens(host, host.disks[0])
    opens(host, host.disks[0], host.recovery)


def test_the_two_that_cannot_be_told_read_garbage_and_nothing_in_clear(plan: Plan, half: Header) -> None:
    """A run of ours writes them too. The data is under the volume keys in both."""
    moved, ended = copy.deepcopy(half), copy.deepcopy(half)
    new, old = parts(moved)
    new["size"] = str(int(new["size"]) + (1 << 20))
    old.update(offset=str(int(old["offset"]) + (1 << 20)), iv_tweak=str(int(old["iv_tweak"]) + 2048))
    whole = reencrypt_plan.all_new(ended, plan)
    found = [(moved, MOVING), (whole, WHOLE), (reencrypt_plan.finished(whole, plan), NEW)]
    for header, phase in found:
        assert reencrypt_plan.phase_of(header, plan, "disk") == phase
        assert {each["type"] for each in header["segments"].values()} == {"crypt"}


def test_a_token_of_another_disk_does_not_open(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(reencrypt, "HOTZONE", 1 << 20)
    with DeepHost(tmp_path, 2).plugged_in() as host:
        host.rekey(lambda done, total: True)
        first, second = host.disks
        theirs, mine = metadata(first)["tokens"], metadata(second)
        newest = raw_header.read_valid_copies(str(second))[0]
        swapped = {**mine, "tokens": theirs}
        raw_header.write_header(str(second), swapped, newest, newest.sequence + 1)
        with pytest.raises(Tampered):
            opens(host, second)
        with pytest.raises(Tampered):
            opens(host, second, host.recovery)
    keyring.flush()


@pytest.mark.parametrize("torn", [False, True])
def test_a_hotzone_whose_header_has_not_reached_both_copies_was_not_begun(
    host: DeepHost, plan: Plan, half: Header, torn: bool
) -> None:
    """The older copy is right: the checksums of the hotzone may not have reached the disk."""
    (image,) = host.disks
    crash = with_hotzone(half, plan)
    assert reencrypt_plan.phase_of(crash, plan, "disk") == CRASH
    assert reencrypt_plan.without_hotzone(crash, plan)["segments"] == half["segments"]
    newest = raw_header.read_valid_copies(str(image))[0]
    size = len(newest.content)
    first = raw_header.copy_content(newest.content, canonical(crash), 0, newest.sequence + 1)
    second = raw_header.copy_content(newest.content, canonical(half), size, newest.sequence)
    with image.open("r+b") as file:
        file.write(first)
        file.seek(size)
        file.write(second[:6000] + bytes(2000) + second[8000:] if torn else second)
    assert reencrypt.settle(str(image), plan, None) == MOVING
    found = metadata(image)
    assert found["segments"] == half["segments"] and found["digests"] == half["digests"]
    with luks.Container(str(image)) as container:
        assert container.is_whole


def with_hotzone(header: Header, plan: Plan) -> Header:
    """The header when the first MiB of the old part is moved."""
    crash = copy.deepcopy(header)
    segments = [each for _, each in sorted(crash["segments"].items())]
    new, old, before, after = segments
    hot = {**old, "size": str(1 << 20), "flags": ["in-reencryption"]}
    old.update(offset=str(int(old["offset"]) + (1 << 20)), iv_tweak=str(int(old["iv_tweak"]) + 2048))
    crash["segments"] = {str(number): each for number, each in enumerate((new, hot, old, before, after))}
    crash["digests"][str(plan.old)]["segments"] = ["1", "2", "3"]
    crash["digests"][str(plan.new)]["segments"] = ["0", "1", "4"]
    return crash


def test_phases_at_rest(host: DeepHost, plan: Plan, half: Header) -> None:
    ended = reencrypt_plan.finished(reencrypt_plan.all_new(half, plan), plan)
    assert reencrypt_plan.phase_of(ended, plan, "disk") == NEW
    before = copy.deepcopy(ended)
    before["digests"][str(plan.old)]["segments"], before["digests"][str(plan.new)]["segments"] = ["0"], []
    assert reencrypt_plan.phase_of(before, plan, "disk") == OLD
    for number in str(plan.old), str(plan.new):
        both = copy.deepcopy(before)
        both["digests"][number]["segments"] = ["0"]
        both["digests"][str(plan.old)]["segments"] = ["0"]
        if number == str(plan.new):
            with pytest.raises(Tampered):
                reencrypt_plan.phase_of(both, plan, "disk")
