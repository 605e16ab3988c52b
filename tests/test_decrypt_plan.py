# SPDX-License-Identifier: Apache-2.0
"""What headers may say while a disk is decrypted in place: those that libcryptsetup writes, and changed ones. And what
is frozen of it: the token, the journal's record, what is bound."""

import copy
from collections.abc import Callable
from typing import Any

import pytest

from unlock.disks import reencrypt_plan, token
from unlock.disks.groups import Member
from unlock.disks.header import Header
from unlock.disks.place import Place
from unlock.disks.reencrypt_plan import CRASH, MOVING, NO_DIGEST, OLD, WHOLE, Plan
from unlock.errors import Malformed, Tampered
from unlock.host import codec
from unlock.host.journal import DiskDecryption, command
from unlock.strictjson import canonical

START, PART = 16 << 20, 1 << 20
AES = "aes-xts-plain64"
Json = dict[str, Any]


def crypt(offset: int, size: str = "dynamic", **more: Any) -> Json:
    tweak = str((offset - START) // 512)
    fields = {"type": "crypt", "offset": str(offset), "size": size, "iv_tweak": tweak, "encryption": AES}
    return {**fields, "sector_size": 512, **more}


def linear(offset: int, size: str = "dynamic", **more: Any) -> Json:
    return {"type": "linear", "offset": str(offset), "size": size, **more}


BACKUPS = crypt(START, flags=["backup-previous"]), linear(START, flags=["backup-final"])
DIGEST = {"type": "pbkdf2", "keyslots": ["0", "1"], "hash": "sha256", "digest": "ZA==", "salt": "cw=="}
PLAN = Plan(0, reencrypt_plan.digest_facts(DIGEST), NO_DIGEST, "", 1, 1)
MOVE = {"type": "reencrypt", "mode": "decrypt", "direction": "forward", "key_size": 1, "area": {"type": "checksum"}}


def header(*parts: Json, covered: list[int], moves: bool = True) -> Json:
    segments = [*parts, *(BACKUPS if moves else ())]
    slot: Json = {"type": "luks2", "area": {"encryption": AES}}
    requirements = {"requirements": {"mandatory": ["online-reencrypt-v2"]}} if moves else {}
    return {
        "keyslots": {"0": slot, "1": slot, **({"2": MOVE} if moves else {})},
        "tokens": {},
        "segments": {str(number): each for number, each in enumerate(segments)},
        "digests": {
            "0": {**DIGEST, "segments": [str(each) for each in covered]},
            **({"1": {**DIGEST, "keyslots": ["2"], "digest": "eQ==", "segments": []}} if moves else {}),
        },
        "config": {"json_size": "12288", "keyslots_size": "16744448", **requirements},
    }


AT_REST = header(crypt(START), covered=[0], moves=False)
BEGUN = header(crypt(START), covered=[0, 1])
FIRST = header(linear(START, str(PART), flags=["in-reencryption"]), crypt(START + PART), covered=[1, 2])
HALF = header(linear(START, str(PART)), crypt(START + PART), covered=[1, 2])
IN_FIGURES = header(linear(START, str(PART)), crypt(START + PART, str(PART)), covered=[1, 2])
HOT = header(
    linear(START, str(PART)),
    linear(START + PART, str(PART), flags=["in-reencryption"]),
    crypt(START + 2 * PART),
    covered=[2, 3],
)
LAST = header(linear(START, str(PART)), linear(START + PART, str(PART), flags=["in-reencryption"]), covered=[2])
ALL = header(linear(START), covered=[1])


@pytest.mark.parametrize(
    ("metadata", "phase"),
    [
        (AT_REST, OLD),
        (BEGUN, MOVING),
        (FIRST, CRASH),
        (HALF, MOVING),
        (IN_FIGURES, MOVING),
        (HOT, CRASH),
        (LAST, CRASH),
        (ALL, WHOLE),
    ],
)
def test_a_header_of_a_run_fits_and_binds_the_same(metadata: Json, phase: str) -> None:
    found = Header("disk", "1-2", canonical(metadata))
    assert reencrypt_plan.phase(found, PLAN) == phase
    assert reencrypt_plan.plan_facts(found, PLAN) == {
        "uuid": "1-2",
        "segment": crypt(START),
        "flags": None,
        "reencrypt": {"mode": "decrypt", "direction": "forward"},
    }


def test_what_a_header_becomes_where_libcryptsetup_does_not_write_it() -> None:
    assert reencrypt_plan.without_hotzone(HOT, PLAN)["segments"] == {
        **{str(number): each for number, each in enumerate([linear(START, str(PART)), crypt(START + PART), *BACKUPS])}
    }
    assert reencrypt_plan.phase_of(reencrypt_plan.without_hotzone(FIRST, PLAN), PLAN, "disk") == MOVING
    assert reencrypt_plan.all_new(LAST, PLAN) == ALL


def put(*path: str, value: Any) -> Callable[[Json], None]:
    def change(metadata: Json) -> None:
        for name in path[:-1]:
            metadata = metadata[name]
        metadata[path[-1]] = value

    return change


NULL = {**crypt(START), "encryption": "cipher_null-ecb"}
CHANGES: dict[str, tuple[Json, Callable[[Json], None]]] = {
    "at rest, in clear": (AT_REST, put("segments", "0", value=linear(START))),
    "at rest, by a null cipher": (AT_REST, put("segments", "0", value=NULL)),
    "another volume key": (AT_REST, put("digests", "0", "digest", value="eA==")),
    "a null cipher": (HALF, put("segments", "1", "encryption", value="cipher_null-ecb")),
    "a null cipher at the start": (ALL, put("segments", "1", "encryption", value="cipher_null-ecb")),
    "a null cipher at the end": (HALF, put("segments", "3", value={**NULL, "flags": ["backup-final"]})),
    "another cipher": (HALF, put("segments", "1", "encryption", value="aes-cbc-plain64")),
    "another IV": (HALF, put("segments", "1", "iv_tweak", value="0")),
    "a part elsewhere": (HALF, put("segments", "0", "offset", value="0")),
    "a gap": (HALF, put("segments", "0", "size", value=str(PART - 512))),
    "no size": (HALF, put("segments", "0", "size", value="0")),
    "of any size, before another": (HALF, put("segments", "0", "size", value="dynamic")),
    "the end elsewhere": (HALF, put("segments", "3", "offset", value="0")),
    "of figures at the end": (ALL, put("segments", "0", "size", value=str(PART))),
    "in clear after what is encrypted": (BEGUN, put("segments", "3", value=linear(START + PART))),
    "two hotzones": (HOT, put("segments", "0", "flags", value=["in-reencryption"])),
    "another flag": (HALF, put("segments", "0", "flags", value=["other"])),
    "not covered": (HALF, put("digests", "0", "segments", value=["2"])),
    "what is in clear is covered": (HALF, put("digests", "0", "segments", value=["0", "1", "2"])),
    "covered by another": (HALF, put("digests", "1", "segments", value=["1"])),
    "a moved part": (HALF, put("segments", "4", value=linear(0, str(PART), flags=["backup-moved-segment"]))),
    "of another mode": (HALF, put("keyslots", "2", "mode", value="reencrypt")),
    "backward": (HALF, put("keyslots", "2", "direction", value="backward")),
    "without a net": (HALF, put("keyslots", "2", "area", value={"type": "none"})),
    "a shift": (HALF, put("keyslots", "2", "area", value={"type": "checksum", "shift_size": "1"})),
    "no requirement": (HALF, put("config", "requirements", value={})),
    "another requirement": (HALF, put("config", "requirements", value={"mandatory": ["online-reencrypt"]})),
    "finished": (header(linear(START), covered=[], moves=False), lambda metadata: None),
}


@pytest.mark.parametrize("name", CHANGES)
def test_a_header_that_no_run_leaves_is_refused(name: str) -> None:
    start, change = CHANGES[name]
    metadata = copy.deepcopy(start)
    change(metadata)
    with pytest.raises((Tampered, Malformed)):
        reencrypt_plan.plan_facts(Header("disk", "1-2", canonical(metadata)), PLAN)


def test_headers_of_a_run_fit_no_plan_of_another_kind() -> None:
    other = PLAN._replace(new=1, new_facts=reencrypt_plan.digest_facts({**DIGEST, "digest": "eQ=="}), new_keyslot=2)
    for metadata in BEGUN, FIRST, HALF, HOT, LAST, ALL:
        for plan in other, other._replace(old=NO_DIGEST, old_facts="", clear=1 << 30):
            with pytest.raises((Tampered, Malformed)):
                reencrypt_plan.phase_of(metadata, plan, "disk")


# Frozen


def test_a_token_is_read_and_written_as_it_was() -> None:
    facts = {"host": "ab" * 16, "group": "data", "members": 1, "manifest": 3, "name": "data-a", "serial": ""}
    text = "AAAA" * 20
    fields: Json = {
        "type": "unlock",
        "keyslots": [],
        "version": 2,
        **facts,
        "kek": {"id": "p/1", "generation": 1, "wrapped": text},
        "dek": text,
        "host_key": text,
        "mac": "A" * 43 + "=",
        "degraded": False,
        "reencrypt": {"old": [0, "cd" * 32], "new": None, "keyslots": [1, 1], "dek": text, "key": text},
        "pad": "",
    }
    found = token.decode(fields)
    assert found.reencryption
    assert found.reencryption.plan == Plan(0, "cd" * 32, NO_DIGEST, "", 1, 1)
    assert {**token.encode(found), "pad": ""} == fields
    assert found.facts() == {**facts, "reencrypt": [[0, "cd" * 32], None, [1, 1]]}


def test_the_journal_is_read_and_written_as_it_was() -> None:
    place = Place("/dev/sdb", "gpt", 2, "ef" * 16, 1 << 20, 1 << 30, START, (2, 99))
    entry = DiskDecryption(
        "disk decrypt", "data-a", "data", "p/1", Member("1-2", "data-a", "S"), (0, 3), place, placed=False
    )
    text: Json = {
        "operation": "disk decrypt",
        "about": "data-a",
        "group": "data",
        "kek": "p/1",
        "member": {"uuid": "1-2", "name": "data-a", "serial": "S"},
        "keyslots": [0, 3],
        "place": {
            "disk": "/dev/sdb",
            "table": "gpt",
            "number": 2,
            "identity": "ef" * 16,
            "start": 1048576,
            "size": 1073741824,
            "offset": 16777216,
            "entries": [2, 99],
        },
        "placed": False,
    }
    assert codec.encode(entry) == {**text, "trace": ""}
    assert codec.decode(DiskDecryption, text) == entry  # as written before there were traces
    assert codec.decode(DiskDecryption, {**text, "trace": "ab" * 32}) == entry._replace(trace="ab" * 32)
    assert command(entry) == "unlock disk decrypt data-a"
    assert place.partition == "/dev/sdb2" and place._replace(disk="/dev/nvme0n1").partition == "/dev/nvme0n1p2"
