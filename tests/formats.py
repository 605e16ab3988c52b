# SPDX-License-Identifier: Apache-2.0
"""One of each format of docs/formats.md, made by the code as it is: the data that tests/test_formats.py holds it to.

    python -m tests.formats          makes tests/data/formats/v1 anew

All keys in it are test keys, in keys.json. `fixed` is what comes out the same each time; what has a nonce, a salt or a
random key in it is new with each run.
"""

import datetime
import json
import lzma
import os
import shutil
import subprocess
import tempfile
from hashlib import sha256
from pathlib import Path
from typing import Any

from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec, rsa

from tests.flowfixture import key_cache_alone
from tests.tpmfixture import Swtpm
from unlock.boot import agent
from unlock.disks import disk_keys, luks, token
from unlock.disks.groups import Group, Member
from unlock.host import keyring, report, this_boot
from unlock.host.journal import Rebind, RecoveryRotation, Rekey
from unlock.host.provider_entry import Offers
from unlock.host.state import State
from unlock.host.state_file import KeyEntry, RemovedPolicy, ReplacedKek, Window
from unlock.keys import access, dump_key
from unlock.keys.escrow import Escrow, write_escrow
from unlock.measured import describe, esp_copy
from unlock.measured.baseline import Baseline, TpmIdentity
from unlock.operations import sync
from unlock.paths import Paths
from unlock.predict import allowed_states, booted
from unlock.predict.trusted_files import TrustedFiles
from unlock.providers import native
from unlock.secret import Secret
from unlock.strictjson import canonical
from unlock.tpm import pcr_policy, public_area, slots
from unlock.tpm.record import SLOTS, SRK, Needs, Payload, Record

FOLDER = Path(__file__).parent / "data/formats/v1"
WARNING = "test keys, known to everybody: they protect nothing"
HOST = "00112233445566778899aabbccddeeff"
UUIDS = ("5ee1c0de-0000-4000-8000-000000000001", "5ee1c0de-0000-4000-8000-000000000002")
FORGOTTEN = "5ee1c0de-0000-4000-8000-000000000003"
MEMBERS = (Member(UUIDS[0], "data-a", "TEST-SERIAL-1"), Member(UUIDS[1], "data-b", ""))
IMAGE_SIZE = 16 << 20
"""Bytes: where the data of a LUKS2 disk begins."""
AREAS = 0x8000 + 258048
"""Bytes of the image that are kept: both copies of the header, and the area of its one keyslot."""
MEASURED = {4: "boot loader", 7: "Secure Boot", 8: "command line", 9: "kernel and initramfs", 14: "MOK"}
"""PCR -> what it was extended with once: the SHA-256 of `test data: ...`."""
BRANCHES = 8
"""Of the policy record with a PIN."""
NEEDED = ("root", "usr")
"""What its root file system lies on."""
DUMP = "core.test.1000.4711.1700000000.11.1.46666ac9dcecb5b0.zst.age"
DUMPED = b"test data: a core\n" * 64


def _key(name: str, size: int = 32) -> bytes:
    return b"".join(sha256(f"unlock test key: {name} {i}".encode()).digest() for i in range(-(-size // 32)))[:size]


def made_keys() -> dict[str, str]:
    """keys.json: all that opens the rest, hex but for texts."""
    client = ec.generate_private_key(ec.SECP256R1()).private_bytes(
        serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
    )
    words = [int.from_bytes(_key("recovery")[2 * i : 2 * i + 2], "big") for i in range(8)]
    words[1], words[2] = 0, 0xFFFF
    return {
        "warning": WARNING,
        "persistence": _key("persistence").hex(),
        "next_persistence": _key("next persistence").hex(),
        "dek": _key("volume key", 64).hex(),
        "kdk": _key("key-derivation key").hex(),
        "kmip_host_key": _key("host key of a key manager").hex(),
        "recovery": "-".join(f"{word * 11 + i + 1:06}" for i, word in enumerate(words)),
        "next_recovery": "-".join(f"{word * 11 + i + 1:06}" for i, word in enumerate(reversed(words))),
        "pin": "2468 test",
        "backup_password": "password of the test backup",
        "client_key": client.decode(),
        "client_password": "password of the test client",
    }


class Keys:
    """keys.json, and what the code derives from it."""

    def __init__(self, said: dict[str, str]) -> None:
        self.said = said
        self.persistence, self.next_persistence = self.raw("persistence"), self.raw("next_persistence")
        self.dek, self.kdk = self.raw("dek"), self.raw("kdk")
        self.recovery, self.next_recovery = self.text("recovery"), self.text("next_recovery")
        self.provider = native.Native(self.kdk, HOST)
        self.host_name = access.key_name(HOST, "host", 1)
        self.kek_name = access.key_name(HOST, "kek/data", 1)
        self.host_key, self.kek = self.provider.fetch(self.host_name), self.provider.fetch(self.kek_name)
        self.mac_key = disk_keys.mac_key(self.recovery, HOST)
        self.pin_auth = pcr_policy.pin_auth(bytes.fromhex(HOST), self.text("pin"))

    def raw(self, name: str) -> Secret:
        return Secret(bytes.fromhex(self.said[name]))

    def text(self, name: str) -> Secret:
        return Secret(self.said[name].encode())

    def group(self, policy_of_group: str = "persistent") -> Group:
        name = f"{self.provider.id}/{self.kek_name}"
        return Group("data", name, 1, 2, MEMBERS, self.kek_name, policy_of_group)

    def wraps(self) -> disk_keys.Keys:
        return disk_keys.Keys(self.persistence, self.host_key, self.kek, self.mac_key)


def frozen_keys() -> Keys:
    return Keys(json.loads((FOLDER / "keys.json").read_text()))


# The TPM


def digests() -> list[tuple[int, bytes]]:
    """What a test boot extends."""
    return [(pcr, sha256(f"test data: {what}".encode()).digest()) for pcr, what in MEASURED.items()]


def values() -> dict[int, bytes]:
    """The PCRs after it."""
    return {pcr: bytes(32) for pcr in range(16)} | {
        pcr: sha256(bytes(32) + digest).digest() for pcr, digest in digests()
    }


def branches(count: int) -> tuple[bytes, ...]:
    """Of this boot, and of others."""
    other = [{**values(), 9: bytes([number]) * 32} for number in range(count - 1)]
    return tuple(pcr_policy.branch(pcr_policy.select(MEASURED), each) for each in (values(), *other))


def record(pin: bool = False) -> Record:
    name = b"\0\x0b" + bytes(range(32))
    many = branches(BRANCHES if pin else 1)
    return Record(
        7,
        bytes.fromhex(HOST),
        pcr_policy.select(MEASURED),
        pcr_policy.CAP_PCR,
        many,
        name,
        b"\0\x0b" + bytes(range(32, 64)),
        pin,
        Needs.of(NEEDED) if pin else Needs(),
    )


def policies(keys: Keys) -> dict[str, Any]:
    """Digests and public areas that the TPM makes or compares."""
    one, many = branches(1), branches(BRANCHES)
    return {
        "selection": list(pcr_policy.select(MEASURED)),
        "selection_bytes": pcr_policy.selection_bytes(pcr_policy.select(MEASURED)).hex(),
        "pcrs": {str(pcr): values()[pcr].hex() for pcr in pcr_policy.select(MEASURED)},
        "branches": [each.hex() for each in many],
        "one": {"alternatives": len(pcr_policy.alternatives(one)), "digest": pcr_policy.policy_or(one).hex()},
        "several": {"alternatives": len(pcr_policy.alternatives(many)), "digest": pcr_policy.policy_or(many).hex()},
        "with_pin": pcr_policy.auth_policy(many, True).hex(),
        "pin_auth": keys.pin_auth.value.hex(),
        "cap": {"pcr": pcr_policy.CAP_PCR, "digest": pcr_policy.CAP_DIGEST.hex(), "capped": pcr_policy.CAPPED.hex()},
        "srk": {"handle": SRK, "template": public_area.srk_template().hex()},
        "sealed": {
            "template": public_area.sealed_template(one).hex(),
            "with_pin": public_area.sealed_template(many, True).hex(),
        },
        "slots": {
            slot.name: {"object": slot.object, "nv": slot.nv, "nv_public": public_area.nv_public(slot, True).hex()}
            for slot in SLOTS
        },
    }


def sealed(chip: Swtpm, keys: Keys, pin: bool) -> None:
    """Seals the persistence key in slot A; with a PIN, once more, in slot B."""
    with chip.open() as tpm:
        for pcr, digest in digests():
            tpm.extend(pcr, digest)
        payload, selection = Payload(keys.persistence, unauthenticated_root=pin), pcr_policy.select(MEASURED)
        slots.seal_slot(tpm, bytes.fromhex(HOST), selection, branches(1), payload)
        if pin:
            slots.seal_slot(tpm, bytes.fromhex(HOST), selection, branches(BRANCHES), payload, pin_auth=keys.pin_auth)


# The disk


def formatted(path: Path, keys: Keys) -> None:
    """A LUKS2 image with the keyslot of the recovery key; no token."""
    with path.open("wb") as file:
        file.truncate(IMAGE_SIZE)
    with luks.format(str(path), keys.dek, uuid=UUIDS[0]) as container:
        container.add_keyslot(keys.dek, passphrase=keys.recovery)


def tokens(image: Path, keys: Keys) -> dict[str, dict[str, Any]]:
    """A token for this disk of each policy that a group may have."""
    with luks.Container(str(image)) as container:
        return {
            each: token.encode(
                disk_keys.make_token(container, HOST, keys.group(each), MEMBERS[0], keys.dek, keys.wraps())
            )
            for each in ("persistent", "provider")
        }


def unpacked(path: Path) -> Path:
    """The frozen image, in a new file."""
    with path.open("wb") as file:
        file.write(lzma.decompress((FOLDER / "disk.img.xz").read_bytes()))
        file.truncate(IMAGE_SIZE)
    return path


# state.json


def use_native(state: State, keys: Keys) -> None:
    entry = state.native_entry(
        name="native", provider_id=keys.provider.id, scope=HOST, persistence=keys.persistence, kdk=keys.kdk
    )
    state.use_provider(entry)


def native_state(paths: Paths, keys: Keys) -> None:
    """A host of the native provider in the midst of a rebind, which found a rotation of the recovery key unfinished."""
    state = State.new(paths, HOST)
    use_native(state, keys)
    old, name = KeyEntry(f"{keys.provider.id}/{keys.host_name}", keys.host_name, 1), access.key_name(HOST, "host", 2)
    state.set_host_key(old, persistence=keys.persistence, key=keys.host_key)
    new = KeyEntry(f"{keys.provider.id}/{name}", name, 2)
    state.set_host_key(new, persistence=keys.persistence, key=keys.provider.fetch(name))
    state.set_mac_key(persistence=keys.persistence, mac_key=keys.mac_key)
    state.groups["data"] = keys.group()._replace(former=("kmip-gone/17",), behind=(UUIDS[1],))
    state.next_manifest("data")
    state.recovery.keyslots[UUIDS[0]] = "dGVzdCBkYXRhOiBhIHNhbHQ="
    state.recovery.former[UUIDS[0]] = ["dGVzdCBkYXRhOiBhbm90aGVyIHNhbHQ="]
    state.recovery.tested[UUIDS[0]] = 1700000000
    with disk_keys.mac_key(keys.next_recovery, HOST) as mac_key:
        state.change_mac_key(persistence=keys.persistence, mac_key=mac_key, behind=[UUIDS[1]])
    state.narrowed = "a PIN was set"
    state.keep_old_key(UUIDS[1], new=keys.persistence, old=keys.next_persistence)
    (branch,) = branches(1)
    allowed_states.begin(state, pcr_policy.select(MEASURED), branch, False, pin=True)
    when, full = "2026-01-02T03:04:05Z", (0, *pcr_policy.select(MEASURED))
    state.tpm = state.tpm._replace(
        states={branch.hex(): state.tpm.states[branch.hex()]._replace(made=when)},
        window=Window(reboots=2, since=when, pcrs=full, boot="test-boot"),
    )
    rotation = RecoveryRotation(
        "recovery",
        "rotate",
        key=state.wrap_recovery_key(persistence=keys.persistence, recovery=keys.next_recovery),
        file="/media/usb/key",
        escrow="",
        kept=True,
        written=False,
    )
    state.journal = Rebind(
        "rebind",
        "--backup /media/usb/backup",
        new=state.wrap_old_persistence_key(new=keys.next_persistence, old=keys.persistence),
        backup="/media/usb/backup",
        before=rotation,
    )
    state.save()


def kmip_state(paths: Paths, keys: Keys) -> None:
    """A host of a key manager whose TPM keeps nothing on purpose, in the midst of a rekey."""
    state = State.new(paths, HOST)
    use_native(state, keys)
    state.use_provider(
        state.kmip_entry(
            name="kms",
            provider_id="kmip-00",
            certificate="-----a test certificate-----\n",
            until=1800000000,
            persistence=keys.persistence,
            key=keys.text("client_key"),
            password=keys.text("client_password"),
            offers=Offers((1, 4), rekey=True),
        )
    )
    state.persistent = False
    host_key = KeyEntry("kmip-00/4", keys.host_name, 1)
    state.set_host_key(host_key, persistence=keys.persistence, key=keys.raw("kmip_host_key"))
    state.set_mac_key(persistence=keys.persistence, mac_key=keys.mac_key)
    state.groups["data"] = keys.group("provider")._replace(kek="kmip-00/5")
    state.retire.append(ReplacedKek(f"{keys.provider.id}/{keys.kek_name}", "data"))
    state.headers[UUIDS[0]] = '{"uuid":"of the test"}'
    state.removed = RemovedPolicy(
        selection=pcr_policy.select(MEASURED),
        cap=pcr_policy.CAP_PCR,
        branches=tuple(each.hex() for each in branches(1)),
        pin=False,
    )
    state.forget_member(Member(FORGOTTEN, "data-c", "TEST-SERIAL-3"), "data")
    state.take_name("data", 2)
    state.begin(Rekey("rekey", "data", generation=2, made=("6", "unlock/name"), theirs=False))


# Files of this boot, and of good boots


def a_report() -> report.Report:
    """With each outcome that a disk can have; times are made up."""
    record = report.Report("early-boot")
    record.add_event("start")
    record.set_verdict("unsealed")
    record.facts = report.BootFacts(slot="A", generation=7, unauthenticated_root=False, pin=False)
    for number, outcome in enumerate(WORDS["outcomes"]):
        record.set_disk(f"/dev/test{number}", outcome, "", uuid=UUIDS[0], name=f"data-{number}", group="data")
    record.set_group("data", "open", members=2, mappings=("data-a", "data-b"))
    record.events = [report.BootEvent(number / 4, kind, text) for number, (_, kind, text) in enumerate(record.events)]
    return record


WORDS = {
    "verdicts": [
        "unsealed",
        "handed-over",
        "no-tpm",
        "no-slot",
        "pcr-mismatch",
        "tampered",
        "malformed",
        "newer-format",
        "pin-wrong",
        "pin-lockout",
        "unmeasured-input",
        "tpm-failed",
        "no-key",
    ],
    "outcomes": [
        "opened",
        "already-open",
        "waiting",
        "foreign",
        "other-host",
        "duplicate",
        "damaged",
        "malformed",
        "newer-format",
        "tampered",
        "altered",
        "no-key",
        "provider",
        "name-taken",
        "failed",
        "timed-out",
        "closed-again",
        "stale",
    ],
    "causes": [
        "firmware",
        "firmware-settings",
        "option-rom",
        "boot-order",
        "boot-path",
        "partition-table",
        "secure-boot",
        "secure-boot-keys",
        "dbx",
        "signer",
        "sbat",
        "mok",
        "boot-loader",
        "boot-loader-files",
        "boot-loader-config",
        "grubenv",
        "kernel",
        "initrd",
        "command-line",
        "uki",
        "extension",
        "ima",
        "systemd",
        "other",
    ],
}
"""The words of verdict, report.json and baseline.json. Others may be added."""


def baseline() -> Baseline:
    items = tuple(
        describe.Item(number % 16, 0x80000003, sha256(cause.encode()).digest(), cause, f"test data: {cause}")
        for number, cause in enumerate(WORDS["causes"])
    )
    pcrs = {pcr: values()[pcr] for pcr in MEASURED}
    return Baseline("6.12.0-test", "root=/dev/test", TpmIdentity("000b" + "5a" * 32, ""), pcrs, items)


def of_boot() -> booted.BootedFiles:
    one, two = sha256(b"1").digest(), sha256(b"2").digest()
    return booted.BootedFiles(
        "test-boot",
        {"(hd0,gpt2)/vmlinuz": ("boot/vmlinuz", one)},
        {"(hd0,gpt2)/grub/grub.cfg": "set default=0\n"},
        ((two, "boot/efi/EFI/test/shimx64.efi"),),
        {"boot/efi/EFI/test/shimx64.efi": two, "boot/vmlinuz": b""},
        "boot/initrd.img",
        (one, two),
        {"addon.efi": one},
        {"boot/vmlinuz": sha256(b"a kernel").digest(), "boot/initrd.img": sha256(b"an initramfs").digest()},
        {"boot/old": sha256(b"a file that may be a thief's").digest(), "boot/link": b""},
        ("boot/link",),
        {"boot": "8:1"},
        ("pci0000:00/test",),
    )


def host_key_state(paths: Paths, keys: Keys) -> State:
    """A host of which nothing is told but its host key; not saved."""
    state = State.new(paths, HOST)
    use_native(state, keys)
    entry = KeyEntry(f"{keys.provider.id}/{keys.host_name}", keys.host_name, 1)
    state.set_host_key(entry, persistence=keys.persistence, key=keys.host_key)
    return state


def trusted() -> TrustedFiles:
    return TrustedFiles(of_boot().known, {"boot/current": "vmlinuz"})


def tree(paths: Paths) -> None:
    """/boot with an EFI system partition."""
    files = {
        "boot/vmlinuz": b"a kernel",
        "boot/initrd.img": b"an initramfs",
        "boot/old": b"a file that may be a thief's",
        "boot/efi/EFI/test/shimx64.efi": b"a boot loader",
        "proc/self/mountinfo": b"36 25 8:1 / /boot/efi rw - vfat /dev/test1 rw\n",
    }
    for name, content in files.items():
        path = Path(paths.root, name)
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content)


def fixed(paths: Paths, keys: Keys) -> dict[str, bytes]:
    """Name -> content of what comes out the same each time. `paths` are those of an empty tree."""
    os.makedirs(paths.run)
    tree(paths)
    this_boot.write_report(paths, a_report(), "report.json")
    agent.write_verdict(paths, a_report())
    this_boot.mark_open(paths, "data", ["data-a", "data-b"])
    this_boot.mark_failed(paths, "data", ["nginx.service"])
    booted.save_booted_files(paths, of_boot())
    copied = esp_copy.write_copy(paths, baseline().encode())
    dump_key.write_recipient(paths, host_key_state(paths, keys), keys.host_key)
    run = Path(paths.run)
    return {
        "record-1.bin": record().encode(),
        "record-2.bin": record(pin=True).encode(),
        "payload-0.bin": bytes(Payload(keys.persistence).encode()),
        "payload-1.bin": bytes(Payload(keys.persistence, True, Needs.of(NEEDED)).encode()),
        "payload-2.bin": bytes(Payload(keys.persistence, False, Needs.of(map(str, range(13)))).encode()),
        "policy.json": json.dumps(policies(keys), indent=1).encode(),
        "baseline.json": baseline().encode(),
        os.path.relpath(copied, paths.root): Path(copied).read_bytes(),
        "booted.json": Path(paths.booted).read_bytes(),
        "boot-files.json": trusted().encode(keys.persistence),
        "dump-recipient": Path(paths.dump_recipient).read_bytes(),
        "run/report.json": (run / "report.json").read_bytes(),
        "run/verdict": (run / "verdict").read_bytes(),
        "run/members/data": (run / "members/data").read_bytes(),
        "run/failed-groups/data": (run / "failed-groups/data").read_bytes(),
    }


def synced(paths: Paths, keys: Keys) -> dict[str, bytes]:
    """What a sync leaves of a native host without groups. The key cache is this caller's alone."""
    state = State.new(paths, HOST)
    use_native(state, keys)
    host_key = KeyEntry(f"{keys.provider.id}/{keys.host_name}", keys.host_name, 1)
    state.set_host_key(host_key, persistence=keys.persistence, key=keys.host_key)
    state.retire.append(ReplacedKek(f"{keys.provider.id}/{keys.kek_name}", "gone"))
    state.save()
    this_boot.cache_keys(paths, "TPM", {"unlock:persistence": keys.persistence})
    sync.sync(paths, look=dict)
    return {f"run/{name}": Path(paths.of_this_boot(name)).read_bytes() for name in ("sync.json", "keys.json")}


# Escrow


def organisation(folder: Path) -> None:
    """A certificate and an age identity, with their private keys."""
    key = rsa.generate_private_key(65537, 2048)
    name = x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, "unlock test data")])
    certificate = (
        x509.CertificateBuilder()
        .subject_name(name)
        .issuer_name(name)
        .public_key(key.public_key())
        .serial_number(1)
        .not_valid_before(datetime.datetime(2020, 1, 1))
        .not_valid_after(datetime.datetime(2999, 1, 1))
        .sign(key, hashes.SHA256())
    )
    (folder / "certificate.pem").write_bytes(certificate.public_bytes(serialization.Encoding.PEM))
    plain = serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
    (folder / "certificate-key.pem").write_bytes(key.private_bytes(serialization.Encoding.PEM, *plain))
    made = subprocess.run(["age-keygen"], capture_output=True, check=True, text=True).stdout
    (folder / "age-identity").write_text(made)


def recipient(folder: Path) -> str:
    """The public part of the age identity."""
    lines = (folder / "age-identity").read_text().splitlines()
    return next(each for each in lines if "public key" in each).rpartition(" ")[2]


def escrowed(folder: Path, to: Path, keys: Keys) -> None:
    """The recovery key for the organisation in `folder`."""
    write_escrow(Escrow(str(folder / "certificate.pem"), str(to / "escrow.pem")), keys.recovery)
    write_escrow(Escrow(recipient(folder), str(to / "escrow.age")), keys.recovery)


# Core dumps


def dumped(recipient_file: Path, folder: Path) -> None:
    """A file as system/dump makes it, of what stands for a core."""
    recipient_of_host = recipient_file.read_text().splitlines()[1]
    packed = subprocess.run(["zstd", "-q", "-c"], input=DUMPED, capture_output=True, check=True).stdout
    command = ["age", "--recipient", recipient_of_host]
    sealed_dump = subprocess.run(command, input=packed, capture_output=True, check=True).stdout
    put(folder / DUMP, sealed_dump)


def of_kernel(folder: Path) -> None:
    """What system/crash-init writes before the age file, and what is kept of its partition."""
    size, fingerprint = (folder / DUMP).stat().st_size, DUMP.split(".")[7]
    lines = ["unlock kernel dump 1", "id " + "5a" * 16, "state whole", "time 1700000000", "kernel 6.12.0-1-amd64"]
    lines += ["generation 1", f"fingerprint {fingerprint}", f"size {size}"]
    for name, count, state in (("kernel-partition.bin", 8, "whole"), ("kernel-partition-empty.bin", 3, "empty")):
        text = "".join(f"{line}\n" for line in lines[:count]).replace("whole", state)
        put(folder / name, text.encode().ljust(4096, b"\0"))
    of_log = "".join(f"{line}\n" for line in lines).replace("kernel dump", "kernel log")
    put(folder / "kernel-partition-log.bin", of_log.encode().ljust(4096, b"\0"))
    said = {"version": 1, "id": "5a" * 16, "device": "/dev/disk/by-partuuid/1234"}
    put(folder / "kernel-dump", json.dumps(said, indent=1).encode() + b"\n")


# All of it


def make(folder: Path) -> None:
    """One of each."""
    said = made_keys()
    folder.mkdir(parents=True)
    (folder / "keys.json").write_text(json.dumps(said, indent=1) + "\n")
    keys = Keys(said)
    with tempfile.TemporaryDirectory() as scratch:
        place = Path(scratch)
        for name, content in fixed(Paths(f"{scratch}/fixed"), keys).items():
            if name != esp_copy.NAME and not name.endswith(esp_copy.NAME):
                put(folder / name, content)
        keyring.flush()
        for name, content in synced(Paths(f"{scratch}/synced"), keys).items():
            put(folder / name, content)
        keyring.flush()
        formatted(place / "disk", keys)
        for each, fields in tokens(place / "disk", keys).items():
            put(folder / f"token-{each}.json", canonical(fields) + b"\n")
        with luks.Container(str(place / "disk")) as container:
            container.set_token(json.loads((folder / "token-persistent.json").read_bytes()))
        put(folder / "disk.img.xz", lzma.compress((place / "disk").read_bytes()[:AREAS]))
        for name, write_state in (("native", native_state), ("kmip", kmip_state)):
            paths = Paths(f"{scratch}/{name}")
            write_state(paths, keys)
            put(folder / f"state-{name}.json", Path(paths.state).read_bytes())
        native.write_backup(str(folder / "kdk.backup"), keys.provider, keys.text("backup_password"))
        put(folder / "recovery-key", bytes(keys.recovery) + b"\n")
        dumped(folder / "dump-recipient", folder)
        of_kernel(folder)
        organisation(folder)
        escrowed(folder, folder, keys)
        for name, pin in (("tpm", False), ("tpm-pin", True)):
            with Swtpm(place / name) as chip:
                sealed(chip, keys, pin)
            put(folder / f"{name}.xz", lzma.compress((place / name / "tpm2-00.permall").read_bytes()))


def put(path: Path, content: bytes) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content)


def main() -> None:
    shutil.rmtree(FOLDER, ignore_errors=True)
    with key_cache_alone():
        make(FOLDER)
    print(f"{FOLDER}: {sum(each.stat().st_size for each in FOLDER.rglob('*') if each.is_file())} bytes")


if __name__ == "__main__":
    main()
