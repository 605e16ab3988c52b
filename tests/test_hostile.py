# SPDX-License-Identifier: Apache-2.0
"""Hostile headers: whatever an attacker writes on a disk, it alone stays closed, and says why.

Each is judged where boot and the recovery prompt look at disks, before an authentic disk that must still open.
"""

import copy
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from hashlib import sha256
from pathlib import Path
from random import Random
from typing import Any

import pytest

from tests.killing import commit
from tests.lab.hostile import (
    AREA,
    EVIL,
    HOST,
    WEIRD,
    Again,
    Lab,
    Row,
    add_keyslot,
    bind,
    damage,
    evil_stripes,
    foreign_digest,
    header,
    huge,
    mutate,
    render,
)  # fmt: skip
from tests.properties import BATCH, NOTHING, Property, run, told
from unlock import strictjson
from unlock.boot.activation import GroupOpener
from unlock.disks import disk_keys, luks, token
from unlock.disks import header as luks_header
from unlock.disks.udev import Disk
from unlock.errors import Malformed, NotOurs, Tampered, UnlockError
from unlock.host.report import Report
from unlock.secret import Secret
from unlock.strictjson import canonical
from unlock.tpm import pcr_policy
from unlock.tpm.record import RECORD_SIZE, Needs, Payload, Record

SEED = int.from_bytes(sha256(commit().encode()).digest()[:4])
"""Other cases for another commit; a failure names its own."""


@pytest.fixture(autouse=True)
def bounded() -> Iterator[None]:
    """What would take hours ends the process."""
    signal.setitimer(signal.ITIMER_PROF, 30)
    yield
    signal.setitimer(signal.ITIMER_PROF, 0)


@pytest.fixture(scope="module")
def lab() -> Iterator[Lab]:
    """On a disk: of a file in memory that is too short libcryptsetup has other words."""
    with tempfile.TemporaryDirectory(dir="/var/tmp") as folder:
        yield Lab(Path(folder))


def segment(**change: Any) -> Callable[[Lab, dict[str, Any]], object]:
    return lambda lab, fields: fields["segments"]["0"].update(change)


def config(**change: Any) -> Callable[[Lab, dict[str, Any]], object]:
    return lambda lab, fields: fields["config"].update(change)


def digest(**change: Any) -> Callable[[Lab, dict[str, Any]], object]:
    return lambda lab, fields: fields["digests"]["0"].update(change)


def add_null_keyslot(_: Lab, fields: dict[str, Any]) -> None:
    add_keyslot(fields, first=True, encryption="null")
    bind(fields, "0")


def ours(**change: Any) -> Callable[[Lab, dict[str, Any]], object]:
    return lambda lab, fields: fields["tokens"]["0"].update(change)


def kek(**change: Any) -> Callable[[Lab, dict[str, Any]], object]:
    return lambda lab, fields: fields["tokens"]["0"]["kek"].update(change)


def again(section: str, name: str, value: Any) -> Callable[[Lab, dict[str, Any]], object]:
    """A name for the second time: the library takes the later value."""
    return lambda lab, fields: fields[section]["0"].update({Again(name): value})


def nested(depth: int) -> Any:
    return "@raw " + "[" * depth + "]" * depth


UNAUTHENTIC = "does not authenticate"

CHANGED_JSON = {
    "nothing": Row(lambda lab, fields: None, "waiting", ""),
    # the data
    "cipher_null": Row(segment(encryption="cipher_null-ecb"), "tampered", UNAUTHENTIC),
    "another cipher": Row(segment(encryption="aes-cbc-essiv:sha256"), "tampered", UNAUTHENTIC),
    "sector size": Row(segment(sector_size=512), "tampered", UNAUTHENTIC),
    "impossible sector size": Row(segment(sector_size=513), "damaged", "ruined"),
    "offset": Row(segment(offset=str((16 << 20) + 4096)), "tampered", UNAUTHENTIC),
    "offset beyond the disk": Row(segment(offset=str(1 << 50)), "tampered", UNAUTHENTIC),
    "iv_tweak": Row(segment(iv_tweak="8"), "tampered", UNAUTHENTIC),
    "size": Row(segment(size=str(1 << 20)), "tampered", UNAUTHENTIC),
    "integrity": Row(
        segment(integrity={"type": "hmac(sha256)", "journal_encryption": "none", "journal_integrity": "none"}),
        "tampered", UNAUTHENTIC,
    ),
    "linear": Row(segment(type="linear"), "tampered", UNAUTHENTIC),
    "a second segment": Row(
        lambda lab, fields: fields["segments"].update({"1": {**fields["segments"]["0"], "offset": str(24 << 20)}}),
        "damaged", "ruined",
    ),
    "no segment": Row(lambda lab, fields: fields["segments"].clear(), "damaged", "ruined"),
    "requirements": Row(config(requirements={"mandatory": ["online-reencrypt-v2"]}), "damaged", "ruined"),
    "requirements of tomorrow": Row(config(requirements={"mandatory": ["magic"]}), "tampered", UNAUTHENTIC),
    "flags": Row(config(flags=["allow-discards"]), "tampered", UNAUTHENTIC),
    # its key
    "a foreign volume key's digest": Row(
        lambda lab, fields: fields["digests"].update({"0": foreign_digest(fields)}), "tampered", UNAUTHENTIC
    ),
    "a foreign volume key's digest beside": Row(
        lambda lab, fields: fields["digests"].update({"1": {**foreign_digest(fields), "keyslots": []}}),
        "malformed", "not exactly one digest",
    ),
    "a digest of another hash": Row(digest(hash="sha512"), "tampered", UNAUTHENTIC),
    "a digest that takes hours": Row(digest(iterations=2**31 - 1), "tampered", UNAUTHENTIC),
    "no digest": Row(lambda lab, fields: fields["digests"].clear(), "damaged", "ruined"),
    "cipher_null keyslot": Row(
        lambda lab, fields: fields["keyslots"]["0"]["area"].update(encryption="cipher_null-ecb"),
        "tampered", "keyslot 0 is not encrypted",
    ),
    "cipher_null keyslot beside": Row(
        add_null_keyslot,
        "tampered", "keyslot 0 is not encrypted",
    ),
    "a keyslot of two digests": Row(lambda lab, fields: bind(fields, "0"), "damaged", "ruined"),
    # the token
    "no token": Row(lambda lab, fields: fields["tokens"].clear(), "foreign", "no unlock token"),
    "token of another disk": Row(
        lambda lab, fields: fields["tokens"].update({"0": lab.foreign_tokens[0]}), "tampered", UNAUTHENTIC
    ),
    "token of another host": Row(
        lambda lab, fields: fields["tokens"].update({"0": lab.foreign_tokens[1]}), "other-host", "another host"
    ),
    "another group": Row(ours(group="safe"), "tampered", UNAUTHENTIC),
    "another mapping name": Row(ours(name="root"), "tampered", UNAUTHENTIC),
    "a path as mapping name": Row(ours(name="../../etc"), "malformed", "name"),
    "another serial number": Row(ours(serial="S1"), "tampered", UNAUTHENTIC),
    "more members": Row(ours(members=2), "tampered", UNAUTHENTIC),
    "newer member list": Row(ours(manifest=2), "tampered", UNAUTHENTIC),
    "another KEK": Row(kek(id="kek/other"), "tampered", UNAUTHENTIC, recovery="waiting"),
    "newer KEK": Row(kek(generation=2), "tampered", UNAUTHENTIC, recovery="waiting"),
    "the KEK of another group": Row(
        lambda lab, fields: fields["tokens"]["0"].update(kek=lab.foreign_tokens[0]["kek"]),
        "tampered", UNAUTHENTIC, recovery="waiting",
    ),
    "the key of another disk": Row(
        lambda lab, fields: fields["tokens"]["0"].update(dek=lab.foreign_tokens[0]["dek"]),
        "tampered", UNAUTHENTIC, recovery="waiting",
    ),
    "the MAC of another disk": Row(
        lambda lab, fields: fields["tokens"]["0"].update(mac=lab.foreign_tokens[0]["mac"]),
        "waiting", "", recovery="tampered",
    ),
    "older format": Row(ours(version=0), "malformed", "format of its version"),
    "a format that it does not need": Row(ours(version=2), "malformed", "fields"),
    "newer format": Row(ours(version=3), "newer-format", "format 3"),
    "newer format with news": Row(ours(version=7, news=[1], kek="elsewhere"), "newer-format", "format 7"),
    "huge version": Row(ours(version=10**30), "malformed", "version"),
    "huge integer": Row(ours(members=10**30), "malformed", "members"),
    "negative integer": Row(ours(manifest=-1), "malformed", "manifest"),
    "a fraction": Row(ours(manifest=1.0), "malformed", "manifest"),
    "true for one": Row(ours(members=True), "malformed", "members"),
    "a field more": Row(ours(more=1), "malformed", "fields"),
    "a field less": Row(lambda lab, fields: fields["tokens"]["0"].pop("mac"), "malformed", "fields"),
    "a pad that is not blank": Row(ours(pad="\x1b[2J"), "malformed", "pad"),
    "oversized field": Row(ours(serial="s" * 5000), "malformed", "serial"),
    "key cut short": Row(ours(dek="AAAA"), "malformed", "dek has 3 bytes"),
    "not base64": Row(ours(dek="?" * 120), "malformed", "base64"),
    "bound to a keyslot": Row(ours(keyslots=["0"]), "malformed", "format of its version"),
    # JSON
    "field twice": Row(again("tokens", "group", "safe"), "tampered", UNAUTHENTIC),
    "cipher twice": Row(again("segments", "encryption", "cipher_null-ecb"), "tampered", UNAUTHENTIC),
    "field twice, the same": Row(again("tokens", "group", "data"), "waiting", ""),
    "section twice": Row(lambda lab, fields: fields.update({Again("tokens"): {}}), "foreign", "no unlock token"),
    "deep nesting": Row(ours(serial=nested(20)), "malformed", "serial"),
    "deeper nesting": Row(ours(serial=nested(5000)), "damaged", "ruined"),
    "endless nesting": Row(ours(serial="@raw " + "[" * 8000), "damaged", "ruined"),
    "NUL in a string": Row(segment(encryption="aes-xts-plain64\0-ecb"), "tampered", UNAUTHENTIC),
    "not a number": Row(ours(members="@raw NaN"), "malformed", "JSON"),
    "infinite": Row(ours(members="@raw 1e999"), "malformed", "JSON"),
    "a token that is a list": Row(lambda lab, fields: fields["tokens"].update({"0": []}), "damaged", "ruined"),
    "tokens without a number": Row(lambda lab, fields: fields["tokens"].update(x={}), "damaged", "ruined"),
    "an array instead of all": Row(lambda lab, fields: fields.clear(), "damaged", "ruined"),
}  # fmt: skip


@pytest.mark.parametrize("name", CHANGED_JSON)
def test_a_changed_header_stays_closed_by_the_tpm_and_by_the_recovery_key(lab: Lab, name: str) -> None:
    row = CHANGED_JSON[name]
    fields = copy.deepcopy(lab.fields)
    row.change(lab, fields)
    lab.put(header(lab.front, render(fields, Random(0))))
    outcome, detail = lab.judge(lab.by_tpm)
    assert outcome == row.outcome, detail
    assert row.words in detail
    outcome, detail = lab.judge(lab.by_recovery)
    assert outcome == (row.recovery or row.outcome), detail


def binary(at: int, value: bytes) -> Callable[[Lab], None]:
    """Other bytes in the binary part of both copies, checksums right."""
    return lambda lab: lab.put(
        header(
            lab.front, json.dumps(lab.fields).encode(), lambda area: area.__setitem__(slice(at, at + len(value)), value)
        )
    )


def flipped(*places: int) -> Callable[[Lab], None]:
    """Bytes flipped, checksums as they were."""

    def change(lab: Lab) -> None:
        front = bytearray(lab.front[: 2 * AREA])
        for place in places:
            front[place] ^= 0xFF
        lab.put(bytes(front))

    return change


def cut(size: int) -> Callable[[Lab], None]:
    def change(lab: Lab) -> None:
        lab.put(b"")
        os.truncate(lab.victim, size)

    return change


CHANGED_BYTES = {
    "truncated to nothing": (cut(0), "foreign", "is not LUKS2"),
    "truncated in the binary header": (cut(300), "failed", "cannot be read"),
    "truncated in the JSON": (cut(4096 + 512), "failed", "cannot be read"),
    "truncated after the first copy": (cut(AREA), "damaged", "ruined"),
    "truncated before the keyslots": (cut(2 * AREA), "damaged", "ruined"),
    "bad checksum in one copy": (flipped(448), "waiting", ""),
    "bad checksums": (flipped(448, AREA + 448), "damaged", "ruined"),
    "changed under the checksums": (flipped(5000, AREA + 5000), "damaged", "ruined"),
    "no magic": (flipped(0, AREA), "foreign", "is not LUKS2"),
    "LUKS1": (lambda lab: lab.put(b"LUKS\xba\xbe\0\1" + bytes(2 * AREA)), "foreign", "is LUKS1"),
    "LUKS3": (binary(6, b"\0\3"), "damaged", "ruined"),
    "another UUID": (binary(168, b"12345678-1234-1234-1234-123456789abc\0"), "tampered", UNAUTHENTIC),
    "no UUID": (binary(168, bytes(40)), "tampered", UNAUTHENTIC),
    "an endless UUID": (binary(168, b"\xff" * 40), "tampered", UNAUTHENTIC),
    "unknown checksum": (binary(72, b"md5\0\0\0\0"), "damaged", "ruined"),
    "a header that claims 2^63 bytes": (binary(8, (1 << 63).to_bytes(8, "big")), "damaged", "claims more"),
    "a header that claims nothing": (binary(8, bytes(8)), "damaged", "ruined"),
    "oversized JSON": (lambda lab: lab.put(huge(lab.front, 4 << 20, second=False)), "damaged", "bytes of JSON"),
    "oversized JSON in the second copy": (
        lambda lab: (lab.put(bytes(2 * AREA)), lab.add(huge(lab.front, 4 << 20, second=True), 4 << 20)),
        "damaged", "bytes of JSON",
    ),
    "the largest JSON that is read": (
        lambda lab: lab.put(huge(lab.front, 4096 + luks_header.MAX_TEXT, second=False)), "malformed", "too large"
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", CHANGED_BYTES)
def test_a_damaged_header_stays_closed_by_the_tpm_and_by_the_recovery_key(lab: Lab, name: str) -> None:
    change, wanted, words = CHANGED_BYTES[name]
    for door in (lab.by_tpm, lab.by_recovery):
        change(lab)
        outcome, detail = lab.judge(door)
        assert outcome == wanted, detail
        assert words in detail


# What is beside the authentic does no harm


def test_a_hostile_token_beside_hides_nothing(lab: Lab) -> None:
    fields = copy.deepcopy(lab.fields)
    honest = fields["tokens"]["0"]
    fields["tokens"] = {"0": {**honest, "group": "safe"}, "1": {**honest, "version": 9}, "7": lab.foreign_tokens[0]}
    fields["tokens"] |= {"3": {"type": "unlock", "keyslots": []}, "5": honest, "6": lab.foreign_tokens[1]}
    lab.put(header(lab.front, json.dumps(fields).encode()))
    assert lab.judge(lab.by_tpm)[0] == lab.judge(lab.by_recovery)[0] == "waiting"


KEYSLOTS_BESIDE: dict[str, dict[str, Any]] = {
    "that takes hours": {"iterations": 2**31 - 1},
    "that takes the memory": {"type": "argon2id", "time": 4, "memory": 4 << 20, "cpus": 4},
    "of a cipher that the kernel would have to load": {"encryption": "capi:xts(serpent)-plain64"},
    "of no cipher": {"encryption": "nosuch-xts-plain64"},
    "of another hash": {"hash": "whirlpool"},
}


@pytest.mark.parametrize("name", KEYSLOTS_BESIDE)
def test_a_keyslot_beside_the_recovery_keys_own_costs_nothing_and_hides_nothing(lab: Lab, name: str) -> None:
    """Before it in order, and bound to the same digest."""
    fields = copy.deepcopy(lab.fields)
    add_keyslot(fields, first=True, **KEYSLOTS_BESIDE[name])
    if name == "that takes the memory":
        for name in "hash", "iterations":
            del fields["keyslots"]["0"]["kdf"][name]
    fields["digests"]["0"]["keyslots"] = ["0", "1"]
    lab.put(header(lab.front, json.dumps(fields).encode()))
    assert lab.judge(lab.by_recovery)[0] == "waiting"
    with luks.Container(str(lab.victim)) as container:
        assert container.cheap_keyslots() in ([1], [0, 1])


def test_a_keyslot_of_another_digest_is_not_tried(lab: Lab) -> None:
    """Else its digest, which nothing authenticates, decides how long it takes and which key is right."""
    fields = copy.deepcopy(lab.fields)
    add_keyslot(fields, first=True)
    bind(fields, "0", iterations=2**31 - 1)
    lab.put(header(lab.front, json.dumps(fields).encode()))
    assert lab.judge(lab.by_recovery)[0] == "waiting"
    with luks.Container(str(lab.victim)) as container:
        assert container.keyslots() == [0, 1] and container.cheap_keyslots() == [1]


@pytest.mark.parametrize("encryption", ["cipher_null-ecb", "cipher_null", "null", "capi:ecb(cipher_null)-null"])
def test_a_keyslot_that_any_passphrase_opens_gives_the_recovery_path_nothing(lab: Lab, encryption: str) -> None:
    """The attacker's own volume key lies in it, split as LUKS splits keys, with its digest beside."""
    fields = copy.deepcopy(lab.fields)
    add_keyslot(fields, first=True, encryption=encryption)
    bind(fields, "0")
    lab.put(header(lab.front, json.dumps(fields).encode()))
    lab.add(evil_stripes(), int(fields["keyslots"]["0"]["area"]["offset"]))
    with luks.Container(str(lab.victim)) as container:
        with pytest.raises(Tampered, match="keyslot 0") as caught:
            disk_keys.dek_by_recovery_key(container, lab.recovery)
        assert caught.value.hint == f"cryptsetup luksKillSlot {lab.victim} 0"
        try:  # the empty passphrase shows that the library would take the key out of it
            assert bytes(container.volume_key(Secret(b""), 0)) == EVIL
        except UnlockError as error:
            assert "cipher" in str(error) or isinstance(error, NotOurs)


def test_a_keyslot_that_cannot_be_read_does_not_hide_the_one_behind_it(lab: Lab) -> None:
    fields = copy.deepcopy(lab.fields)
    add_keyslot(fields, first=True)
    fields["digests"]["0"]["keyslots"] = ["0", "1"]
    fields["keyslots"]["0"]["kdf"]["hash"] = "nosuch"
    lab.put(header(lab.front, json.dumps(fields).encode()))
    with luks.Container(str(lab.victim)) as container:
        assert disk_keys.dek_by_recovery_key(container, lab.recovery) == lab.dek


# A disk that answers differently at the second read


SECOND_READ = """
import os, sys
from unlock.disks import disk_keys, luks, token
from unlock.secret import Secret
from unlock.strictjson import canonical
path, host, persistence = sys.argv[1], sys.argv[2], Secret(bytes.fromhex(sys.stdin.read()))
luks.only_read()  # as early boot's workers
with luks.Container(path) as container:
    os.access("/first-read-done", os.F_OK)
    for each in disk_keys.read_tokens(container, host):
        with disk_keys.unwrap_volume_key(container, each, persistence) as key:
            container.verify_volume_key(key)
            try:
                container.activate("unlock-test-hostile", key)
                luks.deactivate("unlock-test-hostile")
            except luks.DiskFailed:
                pass
    os.access("/end", os.F_OK)
"""


def test_nothing_is_read_from_the_disk_after_its_header_was_loaded(lab: Lab, tmp_path: Path) -> None:
    lab.put(b"")
    trace = tmp_path / "trace"
    subprocess.run(
        ["strace", "-f", "-y", "-o", trace, sys.executable, "-c", SECOND_READ, lab.victim, HOST],
        input=bytes(lab.keys.persistence).hex(), text=True, check=True, cwd=Path(luks.__file__).parents[2],
    )  # fmt: skip
    before, after = trace.read_text().split("/first-read-done")
    after, _ = after.split('"/end"')
    read = ("read(", "pread64(", "readv(", "preadv", "mmap(", "io_submit(")
    touched = [[line for line in part.splitlines() if str(lab.victim) in line] for part in (before, after)]
    assert [line for line in touched[0] if any(call in line for call in read)]
    assert not [line for line in touched[1] if any(call in line for call in read)]


def test_a_disk_that_answers_differently_later_opens_with_what_was_authenticated(lab: Lab) -> None:
    """And the other way round: what is hostile when it is read stays so, whatever is there a moment later."""
    fields = copy.deepcopy(lab.fields)
    CHANGED_JSON["cipher_null"].change(lab, fields)
    hostile = header(lab.front, json.dumps(fields).encode())
    lab.put(b"")
    with luks.Container(str(lab.victim)) as container:
        lab.put(hostile)
        (each,) = disk_keys.read_tokens(container, HOST)
        with disk_keys.unwrap_volume_key(container, each, lab.keys.persistence) as key:
            container.verify_volume_key(key)
        assert container.metadata["segments"] == lab.authentic["segments"]
    lab.put(hostile)
    with luks.Container(str(lab.victim)) as container:
        lab.put(b"")
        (each,) = disk_keys.read_tokens(container, HOST)
        with pytest.raises(Tampered):
            disk_keys.unwrap_volume_key(container, each, lab.keys.persistence)


# A disk that does not answer


def test_a_disk_that_does_not_answer_holds_up_no_other(lab: Lab, tmp_path: Path) -> None:
    """Opening a pipe that nobody writes to blocks as a read of a dead disk does."""
    stalled = [tmp_path / name for name in ("a", "z")]
    for path in stalled:
        os.mkfifo(path)
    lab.put(b"")
    report = Report("test")
    opening = GroupOpener(HOST, lab.by_tpm, report)
    opening.workers, opening.read_timeout = 0, 0.3
    for path in (stalled[0], lab.victim, stalled[1], tmp_path / "absent", lab.honest):
        opening.add_disk(Disk(str(path), path.name, "", "", "", 0, 0.0))
    assert opening.is_busy() and not report.disks
    opening.read_headers()
    outcomes = {Path(node).name: each.outcome for node, each in report.disks.items()}
    assert (outcomes["a"], outcomes["z"], outcomes["absent"]) == ("timed-out", "timed-out", "failed")
    assert (outcomes["victim"], outcomes["honest"]) == ("waiting", "waiting")
    opening.start_complete_groups(settled=True)
    assert sorted(each.disk.sysname for each in opening.queue) == ["honest", "victim"]
    assert not opening.worker_fds()
    opening.wipe()


def test_early_boot_ends_while_a_disk_does_not_answer(lab: Lab, tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "stalled")
    report = Report("test")
    opening = GroupOpener(HOST, lab.by_tpm, report)
    opening.add_disk(Disk(str(tmp_path / "stalled"), "stalled", "", "", "", 0, 0.0))
    opening.take_answers()
    opening.stop(0)
    assert not opening.is_busy() and not opening.worker_fds()
    assert [each.outcome for each in report.disks.values()] == ["timed-out"]


def test_a_disk_that_is_looked_at_again_while_early_boot_ends_keeps_its_outcome(lab: Lab, tmp_path: Path) -> None:
    """udev reports a change of a disk of somebody else: that is no failure of this boot."""
    os.mkfifo(tmp_path / "foreign")
    report = Report("test")
    report.set_disk(str(tmp_path / "foreign"), "foreign")
    opening = GroupOpener(HOST, lab.by_tpm, report)
    opening.add_disk(Disk(str(tmp_path / "foreign"), "foreign", "", "", "", 0, 0.0))
    opening.take_answers()
    assert opening.is_busy()
    opening.stop(0)
    assert [each.outcome for each in report.disks.values()] == ["foreign"] and not report.failed_nodes()


def test_a_disk_that_is_gone_before_it_answers_is_not_looked_at(lab: Lab) -> None:
    report = Report("test")
    opening = GroupOpener(HOST, lab.by_tpm, report)
    for path in (lab.victim, lab.honest):
        opening.add_disk(Disk(str(path), path.name, "", "", "", 0, 0.0))
    opening.take_answers()
    opening.remove_disk(str(lab.victim))
    opening.read_headers()
    assert list(report.disks) == [str(lab.honest)]
    opening.wipe()


def test_a_group_that_another_disk_passes_for_is_not_ready_to_heal(lab: Lab, tmp_path: Path) -> None:
    """Both have a serial number that the token does not name: which is the right one cannot be told."""
    copy = tmp_path / "copy"
    shutil.copyfile(lab.honest, copy)
    for count, nodes in ((True, (lab.honest,)), (False, (lab.honest, copy))):
        opening = GroupOpener(HOST, lab.by_tpm, Report("test"))
        for path in nodes:
            opening.add_disk(Disk(str(path), path.name, "", "", "", 0, 0.0))
        opening.read_headers()
        assert opening.is_complete("safe") is count
        opening.wipe()


# Many made-up ones

OUTSIDE = {"damaged", "failed", "foreign"}
"""Outcomes of disks whose header the library refused, or that have none of our tokens."""


def a_header(lab: Lab, random: Random) -> bool:
    """Any header: no error without a type, no candidate that is not authentic, the disk beside it opens."""
    door = lab.by_recovery if random.random() < 0.2 else lab.by_tpm
    if random.random() < 0.03:
        random.choice(list(CHANGED_BYTES.values()))[0](lab)
        return lab.judge(door)[0] not in OUTSIDE
    fields = copy.deepcopy(lab.fields)
    start = random.random()
    if start < 0.3:
        random.choice(list(CHANGED_JSON.values())).change(lab, fields)
        fields = copy.deepcopy(fields)
    elif start < 0.4:
        add_keyslot(fields, first=random.random() < 0.5, iterations=random.choice((1000, 1000, 2**31 - 1)))
        bind(fields, "0", iterations=random.choice((1000, 2**31 - 1)))
        fields["digests"]["0"]["keyslots"] = ["1"]
        mutate(fields["keyslots"], random, lab.foreign_tokens)
    for _ in range(random.choice((0, 1, 1, 1, 2, 3)) if start > 0.2 else 0):
        mutate(fields.get("tokens") if random.random() < 0.7 else fields, random, lab.foreign_tokens)
    text = render(fields, random)
    if random.random() < 0.05:
        text = damage(text, random)
    changed, place, value = random.random() < 0.1, random.randrange(448), random.randbytes(random.choice((1, 8, 40)))
    whole = header(lab.front, text, lambda area: changed and area.__setitem__(slice(place, place + len(value)), value))
    lab.put(damage(whole, random) if random.random() < 0.03 else whole)
    outcome, detail = lab.judge(door)
    return outcome not in OUTSIDE or "no unlock token" in detail


def a_token(lab: Lab, random: Random) -> bool:
    """Any token on the authentic header: only the authentic one gives a key, and that key is the disk's."""
    fields = copy.deepcopy(random.choice([lab.fields["tokens"]["0"]] * 8 + lab.foreign_tokens))
    for _ in range(random.choice((0, 1, 1, 1, 2))):
        mutate(fields, random, lab.foreign_tokens)
    try:
        parsed = luks_header.parse_metadata(render(fields, random), "/dev/sdx")
    except Malformed:
        return False
    try:
        each = token.decode(parsed)
        assert token.decode(token.encode(each)) == each and {**token.encode(each), "pad": ""} == {**parsed, "pad": ""}
        with lab.by_tpm(lab.loaded, each) as key:
            assert key == lab.dek and each._replace(mac=b"", host_key=b"") == lab.token._replace(mac=b"", host_key=b"")
    except UnlockError as error:
        assert str(error).isprintable() and len(str(error)) < 200
    return True


def a_text(lab: Lab, random: Random) -> bool:
    """Any text as metadata: an object that has one canonical text, or Malformed."""
    fields = copy.deepcopy(lab.fields)
    for _ in range(random.choice((1, 1, 2, 5))):
        mutate(fields, random, [*lab.foreign_tokens, *WEIRD])
    text = render(fields, random)
    if random.random() < 0.3:
        text = damage(text, random)
    elif random.random() < 0.02:
        text = random.choice((b"[" + text + b"]", text * 2, text + b" " * luks_header.MAX_METADATA))
    try:
        parsed = luks_header.parse_metadata(text, "/dev/sdx")
    except Malformed:
        return False
    assert luks_header.parse_metadata(canonical(parsed), "/dev/sdx") == parsed
    json.loads(text, object_pairs_hook=_each_once)
    return True


def _each_once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    assert len(dict(pairs)) == len(pairs), "a name twice"
    return dict(pairs)


RECORD = Record(7, b"h" * 16, (4, 7, 9, 15), 15, (b"1" * 32, b"2" * 32), b"\0\x0b" + b"s" * 32, b"\0\x0b" + b"o" * 32)


def a_record(_: object, random: Random) -> bool:
    """Any policy record, and any sealed payload: read as it would be written, or Malformed."""
    data = bytearray(
        RECORD._replace(
            branches=tuple(random.randbytes(32) for _ in range(random.randrange(1, 9))),
            pin=random.random() < 0.5,
            needs=Needs.of(map(str, range(random.choice((0, 1, 12, 13))))),
        ).encode()
    )
    for _ in range(random.choice((0, 1, 1, 2, 3))):
        at = random.choice((7, 8, 15, 16, 32, 33, 34, 35, 37, 38, 40, 41, 74, 108, random.randrange(416)))
        value = random.choice((b"\0", b"\1", b"\2", b"\x0f", b"\x10", b"\xff", b"\xff" * 8, random.randbytes(4)))
        data[at : at + len(value)] = value
    body = bytes(data[:416])
    whole = body + sha256(body).digest()
    if random.random() < 0.1:
        whole = damage(whole, random)
    try:
        assert Record.decode(whole).encode() == whole
    except Malformed:
        pass
    payload = bytearray(Payload(Secret(b"k" * 32), random.random() < 0.5).encode().value)
    payload[random.randrange(2)] = random.choice((0, 1, 2, 255))
    shorter = Secret(bytes(payload) if random.random() < 0.8 else damage(payload, random))
    try:
        assert Payload.decode(shorter).encode() == shorter
    except Malformed as error:
        assert "kkkk" not in str(error)
    return len(whole) == RECORD_SIZE and whole[:7] == b"unlock\0" and sha256(whole[:-32]).digest() == whole[-32:]


OF_LUKS = (
    strictjson.parse, strictjson._no_duplicates, strictjson._bounded, strictjson._finite,
    luks_header.parse_metadata, luks_header._get_object, luks_header._get_numbered, luks_header._data_digest,
    luks_header.read_copies, luks_header.has_valid_checksum, luks_header.read_luks_version,
    luks.Container.__init__, luks.Container._load, luks.Container.metadata,
    luks.Container.tokens, luks.Container.facts, luks.Container.cheap_keyslots,
    disk_keys.read_tokens, disk_keys.unwrap_volume_key, disk_keys.unwrap_kek, disk_keys.check_recovery,
    disk_keys.dek_by_recovery_key,
)  # fmt: skip
OF_TOKEN = (token.decode, token._get_int, token._get_string, token._get_bytes)
OF_POLICY = (Record.decode, Record._problem, pcr_policy.selection_problem, Payload.decode, Needs.decode)

PROPERTIES = (
    Property("headers", 2000, Lab, a_header, OF_LUKS + OF_TOKEN),
    Property("tokens", 8000, Lab, a_token, OF_TOKEN),
    Property("metadata texts", 6000, Lab, a_text, OF_LUKS),
    Property("policy records", 14000, lambda folder: None, a_record, OF_POLICY),
)


@pytest.mark.turns
@pytest.mark.timeout(900)
def test_properties(record_property: Callable[[str, object], None]) -> None:
    results = {}
    for each in PROPERTIES:
        results[each] = NOTHING
        for first in range(0, each.cases, BATCH):
            results[each] += run(each, SEED, range(first, first + BATCH))
    for line in told(results, SEED):
        record_property("shown", line)
    assert sum(result.cases for result in results.values()) >= 30_000
    assert all(result.inside >= result.cases / 2 for result in results.values())
