# SPDX-License-Identifier: Apache-2.0
"""unlock's formats are frozen: the code as it is opens what was written once, writes the same, and docs/formats.md says
truly how. A test that fails here means that an enrolled host would be shut out, or that its owner would be."""

import json
import lzma
import os
import re
import subprocess
import sys
from base64 import b64decode
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from hashlib import sha256
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from tests import formatreader as reader
from tests import formats
from tests.formats import FOLDER, HOST, UUIDS, Keys
from tests.tpmfixture import Swtpm
from unlock.boot import handover
from unlock.disks import disk_keys, luks, token
from unlock.errors import Malformed, NewerFormat, NoKey, Tampered, UnlockError, Usage
from unlock.host import journal, keyring, report, report_file, resumption, this_boot
from unlock.host.journal import Rebind, RecoveryRotation
from unlock.host.provider_entry import KmipEntry, NativeEntry
from unlock.host.state import State
from unlock.host.state_file import RemovedPolicy
from unlock.keys import access, dump_key, recovery_key
from unlock.measured import causes, esp_copy
from unlock.measured.baseline import Baseline
from unlock.operations import persistence, policy
from unlock.operations.dump import kept, kernel, kernel_partition, opened
from unlock.paths import Paths
from unlock.predict import allowed_states, booted
from unlock.predict.trusted_files import TrustedFiles
from unlock.providers import native
from unlock.secret import Secret
from unlock.strictjson import canonical
from unlock.tpm import pcr_policy, slots
from unlock.tpm.record import RECORD_VERSION, Payload, Record

TOP = Path(__file__).parents[1]
KEYS = json.loads((FOLDER / "keys.json").read_text())
DOCUMENT = (TOP / "docs/formats.md").read_text()

pytestmark = pytest.mark.real_passwords


@pytest.fixture
def keys() -> Keys:
    return formats.frozen_keys()


def frozen(name: str) -> bytes:
    return (FOLDER / name).read_bytes()


def said(name: str) -> dict[str, Any]:
    found: dict[str, Any] = json.loads(frozen(name))
    return found


def raw(name: str) -> bytes:
    return bytes.fromhex(KEYS[name])


def image() -> bytes:
    return lzma.decompress(frozen("disk.img.xz"))


def derived(generation: int = 1, what: str = "kek/data") -> bytes:
    return reader.native_key(raw("kdk"), HOST, f"unlock/{HOST}/{what}", generation)


# One text for each value


def test_a_json_value_has_one_text() -> None:
    for value in {"b": [1, None, True], "a": {"é": "ä\n", "A": ""}}, [2**53, -1, "\x7f"], {}:
        assert canonical(value) == reader.canonical(value)


# What comes out the same each time


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    return formats.fixed(Paths(str(tmp_path_factory.mktemp("fixed"))), formats.frozen_keys())


@pytest.mark.parametrize(
    "name",
    [
        "record-1.bin",
        "record-2.bin",
        "payload-0.bin",
        "payload-1.bin",
        "payload-2.bin",
        "policy.json",
        "baseline.json",
        "booted.json",
        "boot-files.json",
        "dump-recipient",
        "run/report.json",
        "run/verdict",
        "run/members/data",
        "run/failed-groups/data",
    ],
)
def test_the_same_bytes_are_written(name: str, made: dict[str, bytes]) -> None:
    assert made[name] == frozen(name)


def test_the_copy_on_the_efi_partition_is_the_baseline_itself(made: dict[str, bytes]) -> None:
    assert made["boot/efi/EFI/unlock/baseline.json"] == frozen("baseline.json")


def test_the_shell_script_caps_with_the_digest_of_the_document() -> None:
    """And initramfs/cap is without python: it has the bytes themselves."""
    text = (TOP / "initramfs/cap").read_text()
    (octal,) = re.findall(r"^digest='([\\0-7]+)'$", text, re.M)
    assert bytes(int(each, 8) for each in octal.split("\\")[1:]) == reader.cap_digest()


# Code as it is opens it


def test_a_record_is_read() -> None:
    for version, pin in ((1, False), (2, True)):
        assert Record.decode(frozen(f"record-{version}.bin")) == formats.record(pin)


def test_a_payload_is_read() -> None:
    for flag in 0, 1:
        found = Payload.decode(Secret(frozen(f"payload-{flag}.bin")))
        assert (bytes(found.key), found.unauthenticated_root) == (raw("persistence"), bool(flag))


def test_the_native_provider_makes_the_same_keys(keys: Keys) -> None:
    assert keys.provider.id == reader.native_id(raw("kdk"))
    assert bytes(keys.kek) == derived() and bytes(keys.host_key) == derived(what="host")
    assert (keys.kek_name, keys.host_name) == (f"unlock/{HOST}/kek/data/1", f"unlock/{HOST}/host/1")


def test_a_baseline_is_read() -> None:
    assert Baseline.decode(frozen("baseline.json")) == formats.baseline()


def test_a_record_of_boot_is_read(keys: Keys) -> None:
    assert booted.BootedFiles.decode(frozen("booted.json")) == formats.of_boot()
    assert TrustedFiles.decode(frozen("boot-files.json"), keys.persistence) == formats.trusted()
    said = {**json.loads(frozen("boot-files.json"))}
    assert reader.boot_files_mac(raw("persistence"), said).hex() == said["mac"]
    changes: tuple[dict[str, object], ...] = ({"files": {}}, {"links": {}}, {"mac": "00" * 32}, {"version": 2})
    for changed in changes:
        with pytest.raises(Tampered):
            TrustedFiles.decode(json.dumps({**said, **changed}).encode(), keys.persistence)


@pytest.fixture
def plugged(tmp_path: Path) -> Path:
    """The frozen disk."""
    return formats.unpacked(tmp_path / "disk")


def test_a_disk_opens_by_the_persistence_key(plugged: Path, keys: Keys) -> None:
    with luks.Container(str(plugged)) as container:
        (each,) = disk_keys.read_tokens(container, HOST)
        assert bytes(disk_keys.unwrap_volume_key(container, each, keys.persistence)) == raw("dek")
        assert disk_keys.unwrap_host_key(each, keys.persistence) == keys.host_key
        container.verify_volume_key(keys.dek)


def test_a_disk_whose_kek_only_the_provider_keeps_opens_by_that_kek(plugged: Path, keys: Keys) -> None:
    each = token.decode(said("token-provider.json"))
    with luks.Container(str(plugged)) as container:
        with pytest.raises(NoKey):
            disk_keys.unwrap_volume_key(container, each, keys.persistence)
        assert bytes(disk_keys.unwrap_by_kek(container, each, keys.kek)) == raw("dek")
    assert bytes(32) == disk_keys.NOT_KEPT


def test_a_disk_opens_by_the_recovery_key_its_header_authenticated(plugged: Path, keys: Keys) -> None:
    with luks.Container(str(plugged)) as container:
        (each,) = disk_keys.read_tokens(container, HOST)
        assert bytes(disk_keys.dek_by_checked_recovery_key(container, each, keys.recovery)) == raw("dek")


def test_a_cheap_keyslot_of_a_disk_with_another_cipher_is_tried(plugged: Path) -> None:
    """libcryptsetup falls back to aes-xts-plain64 for it where it cannot use the cipher of the data."""
    data = bytearray(plugged.read_bytes()[: 1 << 15])
    for at in 0, 1 << 14:
        text = bytes(data[at + 4096 : at + (1 << 14)])
        other = text.replace(
            b'"encryption":"aes-xts-plain64","sector_size"', b'"encryption":"aes-cbc-plain64","sector_size"'
        )
        assert other != text
        data[at + 4096 : at + (1 << 14)] = other
        data[at + 448 : at + 512] = bytes(64)
        data[at + 448 : at + 480] = sha256(data[at : at + (1 << 14)]).digest()
    with plugged.open("r+b") as file:
        file.write(data)
    with luks.Container(str(plugged)) as container:
        assert container.facts()["segments"]["0"]["encryption"] == "aes-cbc-plain64"
        assert container.cheap_keyslots() == [0]


def test_a_new_disk_has_the_same_form(tmp_path: Path, keys: Keys) -> None:
    """libcryptsetup draws salts; where it puts the areas is its own."""

    def form(found: dict[str, Any]) -> list[Any]:
        (slot,), (segment,), digest = found["keyslots"].values(), found["segments"].values(), reader.data_digest(found)
        kdf = {name: slot["kdf"][name] for name in ("type", "hash", "iterations")}
        cipher = slot["area"]["encryption"], slot["area"]["key_size"], segment["encryption"], slot["key_size"]
        return [found["uuid"], kdf, cipher, digest["type"], digest["hash"], digest["iterations"]]

    formats.formatted(tmp_path / "new", keys)
    with (tmp_path / "new").open("rb") as file:
        assert form(reader.header(file.read(1 << 14))) == form(reader.header(image()))


def test_new_tokens_say_the_same_and_wrap_the_same(plugged: Path, keys: Keys) -> None:
    """All but the nonces."""
    facts = reader.header_facts(reader.header(image()))
    for name, written in formats.tokens(plugged, keys).items():
        was = said(f"token-{name}.json")
        opened = [
            (
                reader.host_key(each, raw("persistence")),
                reader.dek(each, derived(), facts),
                *((reader.kek(each, raw("persistence")),) if name == "persistent" else ()),
                *((reader.elsewhere(each, raw("persistence"), facts),) if name == "provider" else ()),
            )
            for each in (was, written)
        ]
        assert opened[0] == opened[1]
        plain = [
            each | dict.fromkeys(("dek", "host_key")) | {"kek": each["kek"] | {"wrapped": 0}} for each in (was, written)
        ]
        assert plain[0] == plain[1]
        assert len(canonical(written)) == len(frozen(f"token-{name}.json").strip()) == 2048
        assert token.encode(token.decode(was)) == was


# state.json


@pytest.mark.parametrize("name", ["native", "kmip"])
def test_a_state_is_read_and_saved_as_it_was(name: str, tmp_path: Path, keys: Keys) -> None:
    place = Paths(str(tmp_path))
    formats.put(Path(place.state), frozen(f"state-{name}.json"))
    state = State.load(place)
    state.prove(keys.persistence)
    found = state.provider_named("native")
    assert isinstance(found, NativeEntry) and bytes(state.kdk(keys.persistence, found)) == raw("kdk")
    if name == "native":
        assert bytes(state.host_key(keys.persistence) or b"") == derived(2, "host")
        assert state.mac_key(keys.persistence, UUIDS[1]) == keys.mac_key
        assert state.narrowed == "a PIN was set"
        assert state.old_key(keys.persistence, UUIDS[1]) == keys.next_persistence
        assert state.old_key(keys.persistence, UUIDS[0]) is None
        journal = state.journal
        assert isinstance(journal, Rebind) and isinstance(journal.before, RecoveryRotation)
        assert state.unwrap_old_persistence_key(keys.next_persistence, journal.new) == keys.persistence
        assert state.unwrap_recovery_key(keys.persistence, journal.before.key) == keys.next_recovery
    else:
        assert isinstance(state.provider, KmipEntry)
        assert state.client_key(keys.persistence, state.provider) == keys.text("client_key")
        assert state.client_password(keys.persistence, state.provider) == keys.text("client_password")
    state.save()
    assert Path(place.state).read_bytes() == frozen(f"state-{name}.json")


@pytest.mark.parametrize("name", ["native", "kmip"])
def test_a_new_state_is_the_same_but_for_its_nonces(name: str, tmp_path: Path, keys: Keys) -> None:
    """And in the same order."""
    place = Paths(str(tmp_path))
    {"native": formats.native_state, "kmip": formats.kmip_state}[name](place, keys)
    written = Path(place.state).read_text()
    wraps = re.compile(r'("[a-z_]+"|"5ee1c0de-[-0-9]+"): "[A-Za-z0-9+/]{70,}=*"')
    assert wraps.sub(r"\1: wrapped", written) == wraps.sub(r"\1: wrapped", frozen(f"state-{name}.json").decode())
    unwrapped = [
        [(kind, reader.unwrap(raw("persistence"), b64decode(text), reader.key_aad(HOST, kind))) for kind, text in each]
        for each in map(reader.state_wraps, (json.loads(written), said(f"state-{name}.json")))
    ]
    assert unwrapped[0] == unwrapped[1]


# The recovery key, in escrow too


def test_the_recovery_key_is_read_as_it_was_printed() -> None:
    text = frozen("recovery-key").decode().strip()
    assert text == KEYS["recovery"] and reader.recovery_key_is_well_formed(text)
    for typed in text, text.replace("-", ""), f" {text.replace('-', ' ')}\n":
        assert bytes(recovery_key.parse(Secret(typed.encode()))) == text.encode()


def test_a_new_recovery_key_is_of_the_documents_form() -> None:
    for _ in range(20):
        assert reader.recovery_key_is_well_formed(bytes(recovery_key.new()).decode())


def test_one_wrong_digit_and_two_groups_in_another_order_are_found() -> None:
    groups = KEYS["recovery"].split("-")
    swapped, typo = [groups[1], groups[0], *groups[2:]], [f"{(int(groups[0][0]) + 1) % 10}{groups[0][1:]}", *groups[1:]]
    too_large = [f"{65536 * 11 + 1}", *groups[1:]]
    for wrong in swapped, typo, too_large:
        assert not reader.recovery_key_is_well_formed("-".join(wrong))
        with pytest.raises(Usage):
            recovery_key.parse(Secret("-".join(wrong).encode()))


def decrypted(folder: Path) -> list[bytes]:
    """By stock tools and the organisation's private keys."""
    commands: tuple[list[str | Path], ...] = (
        [
            "openssl",
            "cms",
            "-decrypt",
            "-inform",
            "PEM",
            "-in",
            folder / "escrow.pem",
            "-inkey",
            FOLDER / "certificate-key.pem",
        ],
        ["age", "--decrypt", "--identity", FOLDER / "age-identity", folder / "escrow.age"],
    )
    return [subprocess.run(command, capture_output=True, check=True).stdout for command in commands]


def test_an_escrow_file_gives_the_recovery_key_to_stock_tools(tmp_path: Path, keys: Keys) -> None:
    assert decrypted(FOLDER) == [KEYS["recovery"].encode()] * 2
    formats.escrowed(FOLDER, tmp_path, keys)
    assert decrypted(tmp_path) == [KEYS["recovery"].encode()] * 2
    for name in "escrow.pem", "escrow.age":
        assert (tmp_path / name).read_bytes().splitlines()[0] == frozen(name).splitlines()[0]


# Core dumps


def test_a_dump_is_opened(tmp_path: Path, key_cache: None, keys: Keys) -> None:
    """By the key that the state has, and by its name alone it says which that is."""
    place = Paths(str(tmp_path))
    state = formats.host_key_state(place, keys)
    state.save()
    formats.put(Path(place.dumps, formats.DUMP), frozen(formats.DUMP))
    os.makedirs(place.run)
    this_boot.cache_keys(place, "TPM", {"unlock:persistence": keys.persistence})
    dump = kept.find_dump(place, "4711")
    assert dump[1:9] == ("test", 1000, 4711, 1700000000, 11, 1, frozen("dump-recipient").split()[5].decode(), True)
    assert kept.dump_name(dump) == formats.DUMP
    with access.Work(place) as work:
        identity = dump_key.find_identity(work, dump.fingerprint, dump.generation)
    assert b"".join(opened.read_dump(dump, identity)) == formats.DUMPED


def test_a_dump_of_the_kernel_is_found(tmp_path: Path) -> None:
    """On its partition, by its name, and by what says where the partition is."""
    partition = tmp_path / "partition"
    stream = frozen(formats.DUMP)
    log_header = frozen("kernel-partition-log.bin")
    head = frozen("kernel-partition.bin").ljust(4096, b"\xff") + log_header.ljust(4096, b"\xff") + stream
    partition.write_bytes(head.ljust(1 << 20, b"\xff") + stream)
    header = kernel_partition.read_header(str(partition))
    assert header == ("5a" * 16, "whole", 1700000000, "6.12.0-1-amd64", 1, formats.DUMP.split(".")[7], len(stream))
    assert b"".join(kernel_partition.read_stream(str(partition), header.size)) == stream
    assert kernel_partition.read_log_header(str(partition), header) == header
    assert b"".join(kernel_partition.read_stream(str(partition), header.size, kernel_partition.LOG_OFFSET)) == stream
    kernel_partition.write_empty(str(partition), header.id)
    assert partition.read_bytes()[:4096] == frozen("kernel-partition-empty.bin")
    name = f"kernel.6.12.0-1-amd64.1700000000.1.{header.fingerprint}.age"
    dump = kept.parse_name(name, 7)
    assert dump and dump[1:] == ("6.12.0-1-amd64", 0, 0, 1700000000, 0, 1, header.fingerprint, False, 7)
    assert kept.dump_name(dump) == name
    log = kept.parse_name(name.replace("kernel.", "kernel-log.", 1), 7)
    assert log and log.is_log and kept.dump_name(log) == f"kernel-log.{name.removeprefix('kernel.')}"
    place = Paths(str(tmp_path))
    kernel._write_setup(place, kernel.Setup("5a" * 16, "/dev/disk/by-partuuid/1234"))
    assert Path(place.kernel_dump).read_bytes() == frozen("kernel-dump")
    assert kernel.read_setup(place) == ("5a" * 16, "/dev/disk/by-partuuid/1234")


def test_the_document_tells_how_a_dump_is_opened_by_stock_tools(tmp_path: Path) -> None:
    identity = reader.dump_identity(derived(what="host"), HOST)
    recipient = reader.dump_recipient(identity)
    (head, text) = frozen("dump-recipient").decode().splitlines()
    fingerprint = reader.dump_fingerprint(recipient)
    assert (head, text) == (f"# unlock: host key 1 {fingerprint}", recipient)
    assert formats.DUMP.split(".")[7] == fingerprint
    (tmp_path / "identity").write_text(reader.age_identity(identity) + "\n")
    age = ["age", "--decrypt", "--identity", str(tmp_path / "identity"), str(FOLDER / formats.DUMP)]
    packed = subprocess.run(age, capture_output=True, check=True).stdout
    assert subprocess.run(["zstd", "-q", "-d"], input=packed, capture_output=True, check=True).stdout == formats.DUMPED


# /run/unlock and the key cache: between an initramfs and the system, which may have another version


def test_a_report_is_read() -> None:
    found = report_file.read(str(FOLDER / "run/report.json"))
    assert found.verdict == "unsealed" and len(found.disks) == len(formats.WORDS["outcomes"])


def test_every_word_still_has_its_meaning() -> None:
    assert set(formats.WORDS["verdicts"]) <= report.VERDICTS.keys()
    assert set(formats.WORDS["outcomes"]) <= report.OUTCOMES.keys()
    assert set(formats.WORDS["causes"]) <= causes.CAUSES.keys()
    for words in formats.WORDS.values():
        assert all(f"`{word}`" in DOCUMENT for word in words)


def test_a_paused_operation_stays_so_and_is_found(tmp_path: Path) -> None:
    """Across an update of unlock too."""
    paths = Paths(str(tmp_path))
    folder = tmp_path / "var/lib/unlock"
    folder.mkdir(parents=True)
    text = '{\n "version": 1,\n "operation": "rekey --deep",\n "about": "data",\n "at": 1.5\n}\n'
    (folder / "paused.json").write_text(text)
    found = resumption.read_pause(paths)
    assert found and tuple(found) == (1, "rekey --deep", "data", 1.5)
    entry = journal.Rekey("rekey", "data", generation=2, made=None, theirs=False)
    assert not resumption.is_paused(paths, entry)
    resumption.pause(paths, entry)
    assert resumption.is_paused(paths, entry)
    fields = json.loads((folder / "paused.json").read_text())
    assert (fields.pop("at") > 1e9, fields) == (True, {"version": 1, "operation": "rekey", "about": "data"})
    resumption.mark(paths.state)
    assert sorted(each.name for each in folder.iterdir()) == ["paused.json", "under-way"]


def test_a_sync_leaves_the_same_record(tmp_path: Path, key_cache: None, keys: Keys) -> None:
    """All but the time."""
    written = formats.synced(Paths(str(tmp_path)), keys)
    assert written["run/keys.json"] == frozen("run/keys.json")
    time = re.compile(rb'"at": \d{10}')
    assert time.sub(b"", written["run/sync.json"]) == time.sub(b"", frozen("run/sync.json")) != frozen("run/sync.json")
    assert State.load(Paths(str(tmp_path))).retire == []


def test_keys_cross_into_the_system_under_the_same_names(tmp_path: Path, key_cache: None, keys: Keys) -> None:
    record = report.Report("early-boot")
    record.facts = report.BootFacts(unauthenticated_root=True)
    os.makedirs(Paths(str(tmp_path)).run)
    opened: Any = SimpleNamespace(
        opened_mappings=set, opened_tokens=lambda: [token.decode(said("token-persistent.json"))]
    )
    handover.hand_over(Paths(str(tmp_path)), opened, record, persistence=keys.persistence, pin_auth=keys.pin_auth)
    kek = f"unlock:kek:{reader.native_id(raw('kdk'))}/unlock/{HOST}/kek/data/1:1"
    assert keyring.names() == sorted([kek, "unlock:host", "unlock:persistence", "unlock:pin-auth"])
    assert (keyring.get("unlock:persistence"), keyring.get(allowed_states.PIN_AUTH)) == (
        keys.persistence,
        keys.pin_auth,
    )
    assert keyring.get(access.cache_name(keys.group().kek, 1)) == keys.kek
    assert keyring.get("unlock:host") == keys.host_key


def test_the_files_are_where_they_were() -> None:
    place = Paths()
    assert [
        place.state,
        place.baseline,
        place.booted,
        place.boot_files,
        place.dump_recipient,
        place.dumps,
        place.kernel_dump,
        place.run,
    ] == [
        "/var/lib/unlock/state.json",
        "/var/lib/unlock/baseline.json",
        "/var/lib/unlock/booted.json",
        "/var/lib/unlock/boot-files.json",
        "/var/lib/unlock/dump-recipient",
        "/var/lib/unlock/dumps",
        "/var/lib/unlock/kernel-dump",
        "/run/unlock",
    ]
    assert esp_copy.NAME == "EFI/unlock/baseline.json"


# The document's reader opens all of it: no code of unlock is tried by these


def test_the_reader_of_the_document_has_no_line_of_unlock() -> None:
    text = (TOP / "tests/formatreader.py").read_text()
    imported = {line.split()[1].split(".")[0] for line in text.splitlines() if re.match("(import|from) ", line)}
    assert imported <= {"cryptography", *sys.stdlib_module_names}


def test_the_data_says_that_its_keys_are_test_keys() -> None:
    assert KEYS["warning"] == formats.WARNING


def test_the_document_tells_how_a_disk_is_opened_at_boot() -> None:
    found = reader.header(image())
    facts = reader.header_facts(found)
    (written,) = (each for each in found["tokens"].values() if each["type"] == "unlock")
    assert written == said("token-persistent.json")
    kek = reader.kek(written, raw("persistence"))
    assert kek == derived()
    assert reader.dek(written, kek, facts) == raw("dek")
    assert reader.host_key(written, raw("persistence")) == derived(what="host")


def test_the_document_tells_what_stands_for_a_kek_that_only_the_provider_keeps() -> None:
    written, facts = said("token-provider.json"), reader.header_facts(reader.header(image()))
    assert reader.elsewhere(written, raw("persistence"), facts) == bytes(32)
    assert reader.dek(written, derived(), facts) == raw("dek")


def test_the_document_tells_how_the_recovery_key_authenticates_and_opens_a_disk() -> None:
    facts, key = reader.header_facts(reader.header(image())), reader.mac_key(KEYS["recovery"], HOST)
    for name in "persistent", "provider":
        written = said(f"token-{name}.json")
        assert reader.header_mac(written, key, facts) == b64decode(written["mac"])
    assert reader.volume_key_of_keyslot(image(), KEYS["recovery"]) == raw("dek")


def test_the_document_tells_what_the_tpm_keeps() -> None:
    one, two = (reader.nv_record(frozen(f"record-{version}.bin")) for version in (1, 2))
    made = said("policy.json")
    values = {int(pcr): bytes.fromhex(value) for pcr, value in made["pcrs"].items()}
    assert one["selection"] == two["selection"] == made["selection"]
    assert one["branches"] == [reader.policy_pcr(one["selection"], values)]
    assert [each.hex() for each in two["branches"]] == made["branches"]
    assert made["one"]["digest"] == reader.policy_or(one["branches"]).hex()
    assert made["several"]["digest"] == reader.policy_or(two["branches"]).hex()
    auth_policy = reader.policy_auth_value(reader.policy_or(two["branches"]))
    assert made["with_pin"] == auth_policy.hex()
    assert made["sealed"] == {
        "template": reader.sealed_template(reader.policy_or(one["branches"]), False).hex(),
        "with_pin": reader.sealed_template(auth_policy, True).hex(),
    }
    assert made["cap"]["digest"] == reader.cap_digest().hex()
    assert made["pin_auth"] == reader.pin_auth(HOST, KEYS["pin"]).hex()
    assert made["srk"] == {"handle": 0x81000001, "template": reader.srk_template().hex()}
    assert made["slots"] == {
        "A": {"object": 0x81104C41, "nv": 0x01814C41, "nv_public": reader.nv_public(0x01814C41).hex()},
        "B": {"object": 0x81104C42, "nv": 0x01814C42, "nv_public": reader.nv_public(0x01814C42).hex()},
    }
    needs = sorted(map(reader.need, formats.NEEDED))
    assert (one["needs"], two["needs"]) == ([], needs)
    for number, expected in enumerate([(False, []), (True, needs), (False, None)]):
        assert reader.payload(frozen(f"payload-{number}.bin")) == (raw("persistence"), *expected)


def test_the_document_tells_how_every_key_in_the_state_is_unwrapped() -> None:
    found, kmip = said("state-native.json"), said("state-kmip.json")

    def unwrapped(kind: str, text: str, key: str = "persistence") -> bytes:
        return reader.unwrap(raw(key), b64decode(text), reader.key_aad(HOST, kind))

    mac_key, next_mac_key = (reader.mac_key(KEYS[name], HOST) for name in ("recovery", "next_recovery"))
    assert [(kind, unwrapped(kind, text)) for kind, text in reader.state_wraps(found)] == [
        ("kdk", raw("kdk")),
        ("host-key", derived(2, "host")),
        ("host-key", derived(1, "host")),
        ("mac-key", next_mac_key),
        ("mac-key", mac_key),
    ]
    assert unwrapped("persistence", found["old_keys"][UUIDS[1]]) == raw("next_persistence")
    assert unwrapped("rebind", found["journal"]["new"], "next_persistence") == raw("persistence")
    assert unwrapped("recovery-key", found["journal"]["before"]["key"]) == KEYS["next_recovery"].encode()
    assert [(kind, unwrapped(kind, text)) for kind, text in reader.state_wraps(kmip)] == [
        ("client-key", KEYS["client_key"].encode()),
        ("client-password", KEYS["client_password"].encode()),
        ("kdk", raw("kdk")),
        ("mac-key", mac_key),
    ]


# A TPM that was sealed once


@contextmanager
def board(name: str, folder: Path, changed: int | None = None) -> Iterator[Swtpm]:
    """A frozen TPM in a boot that is as it was, or in which one PCR is not."""
    formats.put(folder / name / "tpm2-00.permall", lzma.decompress(frozen(f"{name}.xz")))
    with Swtpm(folder / name) as chip, chip.open() as tpm:
        for pcr, digest in formats.digests():
            tpm.extend(pcr, bytes(32) if pcr == changed else digest)
        yield chip


def test_a_tpm_unseals(tmp_path: Path) -> None:
    with board("tpm", tmp_path) as chip, chip.open() as tpm:
        found = slots.unseal(tpm)
        assert bytes(found.payload.key) == raw("persistence") and not found.payload.unauthenticated_root
        record = found.record
        assert (found.slot.name, record.generation, record.host.hex(), record.pin) == ("A", 1, HOST, False)
        assert reader.nv_record(record.encode())["branches"] == [bytes.fromhex(said("policy.json")["branches"][0])]
        assert tpm.ensure_srk() == record.srk_name
        tpm.extend(pcr_policy.CAP_PCR, pcr_policy.CAP_DIGEST)
        with pytest.raises(UnlockError):
            slots.unseal(tpm)


def test_a_tpm_unseals_by_its_pin(tmp_path: Path) -> None:
    with board("tpm-pin", tmp_path) as chip, chip.open() as tpm:
        found = slots.unseal(tpm, lambda _left: Secret(KEYS["pin"].encode()))
        assert bytes(found.payload.key) == raw("persistence") and found.payload.unauthenticated_root
        assert (found.slot.name, found.record.generation, found.record.pin) == ("B", 2, True)
        assert bytes(found.pin_auth or b"") == reader.pin_auth(HOST, KEYS["pin"])


def test_a_tpm_refuses_another_boot(tmp_path: Path) -> None:
    with board("tpm", tmp_path, changed=8) as chip, chip.open() as tpm, pytest.raises(UnlockError):
        slots.unseal(tpm)


def test_the_state_says_why_a_policy_is_as_it_is(tmp_path: Path) -> None:
    """And a good boot is written down."""
    place = Paths(str(tmp_path / "root"))
    formats.put(Path(place.state), frozen("state-native.json"))
    formats.put(Path(place.of_this_boot("report.json")), frozen("run/report.json"))
    formats.put(Path(place.boot_id), b"another-boot\n")
    was = said("state-native.json")["tpm"]
    (entry,) = was["states"].values()
    with board("tpm", tmp_path) as chip:
        shown = policy.show(place, chip.tcti)
        assert shown["window"] == {name: was["window"][name] for name in ("reboots", "since", "pcrs")}
        assert [(each["why"], each["proven"], each["made"]) for each in shown["states"]] == [tuple(entry.values())]
        policy.good_boot(place, chip.tcti)
    now = json.loads(Path(place.state).read_bytes())["tpm"]
    proven = {branch: {**entry, "proven": True} for branch in was["states"]}
    assert now == {**was, "states": proven, "window": {**was["window"], "reboots": 1, "boot": "another-boot"}}


def test_the_state_says_what_was_taken_out_of_a_tpm(tmp_path: Path) -> None:
    place = Paths(str(tmp_path / "root"))
    formats.put(Path(place.state), frozen("state-kmip.json"))
    state = State.load(place)
    state.journal, state.removed = None, None
    assert isinstance(state.provider, KmipEntry)
    state.put_provider(state.provider._replace(client_key=None, password=None))
    state.save()
    with board("tpm", tmp_path) as chip:
        persistence.remove_all_stored_keys(place, chip.tcti, Secret(b""))
    removed = said("state-kmip.json")["removed"]
    policy_of_tpm = RemovedPolicy(tuple(removed["selection"]), removed["cap"], tuple(removed["branches"]), False)
    assert State.load(place).removed == policy_of_tpm


# The backup; scrypt takes half a second each time


def test_a_backup_is_restored(keys: Keys) -> None:
    with native.restore(frozen("kdk.backup"), keys.text("backup_password")) as restored:
        assert (bytes(restored.kdk), restored.scope) == (raw("kdk"), HOST)


def test_the_document_tells_how_a_new_backup_is_opened(keys: Keys) -> None:
    written = keys.provider.backup(keys.text("backup_password"))
    drawn = re.compile(rb'"(salt|kdk)": "[A-Za-z0-9+/]+=*"')
    assert drawn.sub(b"", written) == drawn.sub(b"", frozen("kdk.backup"))
    head, kdk = reader.backup(written, KEYS["backup_password"])
    assert kdk == raw("kdk")
    assert head == {"unlock": "kdk-backup", "version": 1, "provider": reader.native_id(kdk), "scope": HOST}


# A newer version


def in_state(text: bytes, folder: Path) -> None:
    place = Paths(str(folder))
    formats.put(Path(place.state), text)
    State.load(place)


def in_report(text: bytes, folder: Path) -> None:
    (folder / "report").write_bytes(text)
    report_file.read(str(folder / "report"))


READERS: dict[str, Callable[[bytes, Path], object]] = {
    "token-persistent.json": lambda text, _: token.decode(json.loads(text)),
    "state-native.json": in_state,
    "kdk.backup": lambda text, _: native.restore(text, Secret(b"")),
    "baseline.json": lambda text, _: Baseline.decode(text),
    "booted.json": lambda text, _: booted.BootedFiles.decode(text),
    "run/report.json": in_report,
}


@pytest.mark.parametrize("name", READERS)
def test_a_newer_version_is_refused_by_name(name: str, tmp_path: Path) -> None:
    newer = re.sub(rb'"version": ?1\b', b'"version":3', frozen(name), count=1)
    assert newer != frozen(name)
    with pytest.raises(Malformed if name == "run/report.json" else NewerFormat):
        READERS[name](newer, tmp_path)


def test_a_newer_record_or_payload_in_the_tpm_is_refused_by_name() -> None:
    body = frozen("record-2.bin")[:7] + b"\3" + frozen("record-2.bin")[8:416]
    with pytest.raises(NewerFormat):
        Record.decode(body + sha256(body).digest())
    for newer in b"\2" + frozen("payload-0.bin")[1:], b"\1\2" + frozen("payload-0.bin")[2:]:
        with pytest.raises(NewerFormat):
            Payload.decode(Secret(newer))


def test_an_initramfs_says_what_it_reads() -> None:
    manifest = (TOP / "initramfs/manifest").read_text()
    assert set(re.findall(r"^reads (\S+)$", manifest, re.M)) == {"token-2", "record-2"}
    assert (token.OLDEST_VERSION, token.VERSION, RECORD_VERSION) == (1, 2, 2)


def test_what_is_changed_is_found(plugged: Path, keys: Keys) -> None:
    """The data is no accident: one bit, and nothing opens."""
    changed = {**said("token-persistent.json"), "members": 3}
    with luks.Container(str(plugged)) as container:
        attempts: tuple[Callable[[], object], ...] = (
            lambda: disk_keys.unwrap_volume_key(container, token.decode(changed), keys.persistence),
            lambda: disk_keys.dek_by_checked_recovery_key(container, token.decode(changed), keys.recovery),
        )
        for attempt in attempts:
            with pytest.raises(Tampered):
                attempt()
