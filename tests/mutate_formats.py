# SPDX-License-Identifier: Apache-2.0
"""`make mutate-formats`: each label, derivation, parameter and field that docs/formats.md lists is changed once, alone,
in a copy of the tree; tests/test_formats.py must see each of them. Prints a table; exit status 1 when it saw one not.

    python -m tests.mutate_formats [WORD]     only those whose name has the word

A change is made wherever the text stands, so that the code still agrees with itself: that is the change which all other
tests let through.
"""

import contextlib
import gc
import importlib
import os
import re
import shutil
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

TOP = Path(__file__).parents[1]
CODE = ("unlock", "initramfs")
PARTS = (*CODE, "docs", "tests/data/formats", "tests/lab")
FILES = ("pyproject.toml", *(f"tests/{each.name}" for each in (TOP / "tests").glob("*.py")))
PRELOADED = (
    "cryptography.hazmat.primitives.ciphers.aead",
    "cryptography.hazmat.primitives.kdf.hkdf",
    "cryptography.hazmat.primitives.kdf.scrypt",
    "cryptography.hazmat.primitives.serialization.pkcs7",
    "cryptography.x509",
    "tpm2_pytss._libtpm2_pytss",
    "subprocess",
    "tomllib",
)
"""Libraries that each run would import anew: nothing of unlock."""

LATER = 2**31
"""Seconds since 1970: the time of a changed file."""

Change = tuple[str, str, str]
"""Name of the files, text, other text."""

LABELS = (
    "unlock-dek-1",
    "unlock-mac-1",
    "unlock-kek-1",
    "unlock-kek-elsewhere-1",
    "unlock-header-mac-1",
    "unlock-boot-files-1",
    "unlock-dump-1",
    "unlock-native-fingerprint-1",
    "unlock-native-1",
    "kdk-backup",
    "unlock cap",
    "unlock PIN",
    "unlock:persistence",
    "unlock:pin-auth",
    "unlock:host",
    "unlock:kek:",
)
"""Changed wherever they stand."""

CHANGES: dict[str, list[Change]] = {
    # wraps
    "AES-256-GCM": [("wrap.py", "AESGCM", "ChaCha20Poly1305")],
    "nonce size": [("wrap.py", "_NONCE, _TAG = 12,", "_NONCE, _TAG = 16,")],
    "nonce before ciphertext": [
        (
            "wrap.py",
            "nonce + AESGCM(key.value).encrypt(nonce, plain.value, aad)",
            "AESGCM(key.value).encrypt(nonce, plain.value, aad) + nonce",
        ),
        (
            "wrap.py",
            "wrapped[:_NONCE], wrapped[_NONCE:-_TAG], wrapped[-_TAG:]",
            "wrapped[-_NONCE:], wrapped[: -_TAG - _NONCE], wrapped[-_TAG - _NONCE : -_NONCE]",
        ),
    ],
    "HKDF hash": [("wrap.py", "SHA256", "SHA512")],
    "HKDF size": [("wrap.py", "size: int = 32", "size: int = 16")],
    "HMAC hash": [("wrap.py", '"sha256"', '"sha512"')],
    "scrypt N": [("wrap.py", '"n": 2**17', '"n": 2**16')],
    "scrypt r": [("wrap.py", '"r": 8', '"r": 9')],
    "scrypt p": [("wrap.py", '"p": 1', '"p": 2')],
    "scrypt size": [("wrap.py", "length=32", "length=16")],
    "canonical: names sorted": [("strictjson.py", '":", ",", True', '":", ",", False')],
    "canonical: no blanks": [("strictjson.py", '":", ",", True', '":", ", ", True')],
    "canonical: ASCII": [
        ("strictjson.py", "import encode_basestring_ascii,", "import encode_basestring as encode_basestring_ascii,")
    ],
    "base64": [("disks/token.py", "newline=False).decode()", 'newline=False).decode().replace("+", "-")')],
    # AADs
    "`unlock-KIND-1`": [("disks/token.py", 'f"unlock-{kind}-1"', 'f"unlock-{kind}-2"')],
    "KIND `host-key`": [("*.py", '"host-key"', '"host-kez"')],
    "KIND `kdk`": [("host/state.py", '"kdk"', '"kdl"')],
    "KIND `client-key`": [("host/state.py", '"client-key"', '"client-kez"')],
    "KIND `client-password`": [("host/state.py", '"client-password"', '"client-passwore"')],
    "KIND `mac-key`": [("host/state.py", '"mac-key"', '"mac-kez"')],
    "KIND `recovery-key`": [("host/state.py", '"recovery-key"', '"recovery-kez"')],
    "KIND `rebind`": [("host/state.py", '"rebind"', '"rebine"')],
    "KIND `persistence`": [("host/state.py", '"persistence"', '"persistencf"')],
    "AAD of KIND: host": [("disks/token.py", '-{kind}-1", "host": host', '-{kind}-1"')],
    "AAD of kek: host": [("disks/token.py", '"host": host, "kek": [', '"kek": [')],
    "AAD of kek: id, generation": [("disks/token.py", ', "kek": [kek_id, generation]', "")],
    "AAD of dek: kek": [("disks/token.py", '"kek": [token.kek_id, token.kek_generation],', "")],
    "AAD of dek: header": [("disks/token.py", '"header": header,\n', "")],
    "AAD of elsewhere: dek": [("disks/token.py", ', "dek": dek_aad(token, header).decode()', "")],
    "data of mac: header": [("disks/token.py", ', "header": header}', "}")],
    **{
        f"facts of token: {name}": [
            ("disks/token.py", '"token": token.facts()', f'"token": {{**token.facts(), "{name}": 0}}'),
        ]
        for name in ("host", "group", "members", "manifest", "name", "serial")
    },
    **{
        f"facts of header: {name}": [("disks/header.py", f'            "{name}": {value},\n', "")]
        for name, value in (
            ("uuid", "self.uuid"),
            ("segments", '_get_object(metadata, "segments", self.device)'),
            ("requirements", 'config.get("requirements")'),
            ("flags", 'config.get("flags")'),
            ("digest", '{name: value for name, value in digest.items() if name != "keyslots"}'),
        )
    },
    "digest without keyslots": [("disks/header.py", 'if name != "keyslots"', "")],
    "zero key for elsewhere": [("disks/disk_keys.py", "NOT_KEPT = bytes(32)", 'NOT_KEPT = b"1" * 32')],
    "salt of the MAC key": [("disks/disk_keys.py", "bytes.fromhex(host)", "host.encode()")],
    # the disk
    "token type": [("disks/token.py", 'TYPE = "unlock"', 'TYPE = "unlocked"')],
    "token version": [("disks/token.py", "\nVERSION = 2", "\nVERSION = 3")],
    "token oldest version": [("disks/token.py", "OLDEST_VERSION = 1", "OLDEST_VERSION = 0")],
    "token size": [("disks/token.py", "SIZE = 2048", "SIZE = 2000")],
    "keyslot iterations": [("disks/header.py", "KEYSLOT_ITERATIONS = 1000", "KEYSLOT_ITERATIONS = 1001")],
    "keyslot hash": [("disks/luks.py", 'b"sha256", 0', 'b"sha512", 0')],
    "keyslot cipher": [("disks/header.py", '_KEYSLOT_CIPHER = "aes-xts-plain64"', '_KEYSLOT_CIPHER = "aes-xts-plain"')],
    "data cipher": [("disks/luks.py", 'b"xts-plain64"', 'b"xts-plain"')],
    # the recovery key
    "recovery key: 11": [
        ("keys/recovery_key.py", "* 11 + i", "* 13 + i"),
        ("keys/recovery_key.py", "number, 11", "number, 13"),
    ],
    "recovery key: place": [
        ("keys/recovery_key.py", "* 11 + i + 1", "* 11 + i + 2"),
        ("keys/recovery_key.py", "place + 1", "place + 2"),
    ],
    "recovery key: most": [("keys/recovery_key.py", "<= 0xFFFF", "<= 0x1FFFF")],
    "recovery key: groups": [("keys/recovery_key.py", "GROUPS = 8", "GROUPS = 7")],
    "recovery key: digits": [("keys/recovery_key.py", "DIGITS = 6", "DIGITS = 7")],
    "recovery key: dash": [("keys/recovery_key.py", '0x1B, ord("-")', '0x1B, ord(" ")')],
    "escrow: CMS binary": [("keys/escrow.py", "PKCS7Options.Binary", "PKCS7Options.Text")],
    "escrow: no line end": [
        ("keys/escrow.py", "bytes(key)", 'bytes(key) + b"\\n"'),
        ("keys/escrow.py", "len(key)", "len(key) + 1"),
    ],
    "escrow: age armor": [("keys/escrow.py", '"--armor", ', "")],
    # core dumps
    "dump key: salt": [("keys/dump_key.py", "bytes.fromhex(host), LABEL", 'b"", LABEL')],
    "dump recipient: X25519": [("wrap.py", "public_key().public_bytes_raw()", "private_bytes_raw()")],
    "dump recipient: bech32": [("keys/dump_key.py", "_checksum([*expanded", "1 + _checksum([*expanded")],
    "dump recipient: prefix": [("keys/dump_key.py", 'b"age", Secret', 'b"agf", Secret')],
    "dump identity: prefix": [("keys/dump_key.py", 'b"age-secret-key-"', 'b"age-private-key-"')],
    "dump fingerprint": [("keys/dump_key.py", "hexdigest()[:16]", "hexdigest()[16:32]")],
    "dump-recipient: first line": [("keys/dump_key.py", "# unlock: host key", "# unlock: host-key")],
    "dump name: order": [
        ("operations/dump/kept.py", "dump.uid, dump.pid,", "dump.pid, dump.uid,"),
        ("operations/dump/kept.py", "uid, pid, time, signal_number", "pid, uid, time, signal_number"),
    ],
    "dump name: `.zst`": [("operations/dump/kept.py", ".zst", ".zstd")],
    "kernel dump name: order": [
        ("operations/dump/kept.py", "{dump.time}.{dump.generation}", "{dump.generation}.{dump.time}"),
        ("operations/dump/kept.py", "release, when, of_key,", "release, of_key, when,"),
    ],
    "kernel dump: magic": [("operations/dump/kernel_partition.py", '"unlock kernel dump"', '"unlock crash dump"')],
    "kernel dump: header size": [("operations/dump/kernel_partition.py", "HEADER_SIZE = 4096", "HEADER_SIZE = 8192")],
    "kernel dump: place of the age file": [
        ("operations/dump/kernel_partition.py", "DATA_OFFSET = 1 << 20", "DATA_OFFSET = 1 << 21")
    ],
    "kernel dump: states": [
        ("operations/dump/kernel_partition.py", '"empty", "writing", "whole"', '"void", "begun", "ended"')
    ],
    **{
        f"kernel dump: `{name}`": [("operations/dump/kernel_partition.py", f'"{name}"', f'"x{name}"')]
        for name in ("time", "kernel", "generation", "fingerprint", "size")
    },
    "kernel log: name": [("operations/dump/kept.py", "kernel(-log)?", "kernel(-text)?")],
    "kernel log: magic": [("operations/dump/kernel_partition.py", '"unlock kernel log"', '"unlock crash log"')],
    "kernel log: places": [
        (
            "operations/dump/kernel_partition.py",
            "LOG_HEADER_OFFSET, LOG_OFFSET = 4096, 8192",
            "LOG_HEADER_OFFSET, LOG_OFFSET = 8192, 16384",
        )
    ],
    # the native provider
    "fingerprint size": [("native.py", 'fingerprint-1", 16', 'fingerprint-1", 20')],
    "provider id `native-`": [("native.py", 'f"native-{', 'f"nativ-{')],
    "native key: salt": [("native.py", "self.id.encode(), info", 'b"", info')],
    "native key: scope": [("native.py", '"scope": self.scope, "name"', '"name"')],
    "native key: name": [("native.py", '"name": name, ', "")],
    "native key: generation": [("native.py", ', "generation": generation}', "}")],
    "native key: size": [("native.py", "self.id.encode(), info)", "self.id.encode(), info, 16)")],
    "key name": [("keys/access.py", 'f"unlock/{host}/{kind}/{generation}"', 'f"unlock/{kind}/{host}/{generation}"')],
    "backup version": [("native.py", "BACKUP_VERSION = 1", "BACKUP_VERSION = 2")],
    "backup salt size": [("native.py", "_SALT = 16", "_SALT = 32")],
    "backup AAD": [("native.py", "canonical(head)", 'canonical({**head, "scope": ""})')],
    # the TPM
    "hash": [("tpm/pcr_policy.py", "BANK = 0x000B", "BANK = 0x000C")],
    "cap PCR": [("tpm/pcr_policy.py", "CAP_PCR = 15", "CAP_PCR = 14")],
    "cap digest in initramfs/cap": [("cap", r"digest='\147", r"digest='\146")],
    "cap PCR counts as zeros": [("tpm/pcr_policy.py", "{**values, cap: UNSET}", "{**values, cap: CAPPED}")],
    "PolicyPCR": [("tpm/pcr_policy.py", "0x17F", "0x17E")],
    "PolicyOR": [("tpm/pcr_policy.py", "0x171", "0x172")],
    "PolicyAuthValue": [("tpm/pcr_policy.py", "0x16B", "0x16C")],
    "PCR selection size": [
        ("tpm/pcr_policy.py", "1, BANK, 3)", "1, BANK, 4)"),
        ("tpm/pcr_policy.py", "to_bytes(3", "to_bytes(4"),
    ],
    "PCR bitmap": [("tpm/pcr_policy.py", '"little"', '"big"')],
    "PCR order": [("tpm/pcr_policy.py", "chosen = sorted(selection)", "chosen = sorted(selection)[::-1]")],
    "one branch twice": [("tpm/pcr_policy.py", "(branches[0], branches[0]) if", "(branches[0], bytes(32)) if")],
    "most branches": [("tpm/pcr_policy.py", "MAX_BRANCHES = 8", "MAX_BRANCHES = 7")],
    "PIN: host id": [("tpm/pcr_policy.py", "+ host + pin.value", "+ pin.value")],
    "SRK handle": [("tpm/record.py", "SRK = 0x81000001", "SRK = 0x81000002")],
    "slot A object": [("tpm/record.py", "0x81104C41", "0x81104C51")],
    "slot A NV": [("tpm/record.py", "0x01814C41", "0x01814C51")],
    "slot B object": [("tpm/record.py", "0x81104C42", "0x81104C52")],
    "slot B NV": [("tpm/record.py", "0x01814C42", "0x01814C52")],
    "SRK curve": [("tpm/public_area.py", "_P256 = 0x06, 0x43, 0x10, 0x03", "_P256 = 0x06, 0x43, 0x10, 0x04")],
    "SRK attributes": [("tpm/public_area.py", "| 0x10000 | 0x20000", "| 0x20000")],
    "sealed object outside of the lockout": [
        ("tpm/public_area.py", "if pin else _FIXED | _NO_DA", "if pin else _FIXED")
    ],
    "sealed object: attributes": [("tpm/public_area.py", "_FIXED = 0x02 | 0x10", "_FIXED = 0x02")],
    "NV attributes": [("tpm/public_area.py", "| 0x02000000  #", "#")],
    "record size": [("tpm/record.py", "RECORD_SIZE = 448", "RECORD_SIZE = 480")],
    "record magic": [("tpm/record.py", 'b"unlock\\0"', 'b"Unlock\\0"')],
    "record version without PIN": [("tpm/record.py", "return 2 if self.pin else 1", "return 2")],
    "record version with PIN": [
        ("tpm/record.py", "return 2 if", "return 3 if"),
        ("tpm/record.py", "VERSION = 2", "VERSION = 3"),
    ],
    "record flag PIN": [("tpm/record.py", "_PIN = 0x01", "_PIN = 0x02")],
    "record byte order": [("tpm/record.py", '">7sBQ', '"<7sBQ')],
    "record names": [
        ("tpm/record.py", "self.srk_name, self.object_name,", "self.object_name, self.srk_name,"),
        ("tpm/record.py", "needed, srk_name, object_name, digests", "needed, object_name, srk_name, digests"),
    ],
    "record checksum": [("tpm/record.py", "sha256(body)", 'sha256(body + b"1")')],
    "payload version": [("tpm/record.py", "\n_VERSION = 1", "\n_VERSION = 2")],
    "payload flag": [("tpm/record.py", "_UNAUTHENTICATED_ROOT = 0x01", "_UNAUTHENTICATED_ROOT = 0x02")],
    "payload key": [
        ("tpm/record.py", "data.value[2:34] = self.key.value", "data.value[2:34] = self.key.value[::-1]"),
        ("tpm/record.py", "data.copy(2, 34)", "Secret(value[2:34][::-1])"),
    ],
    "need: label": [("tpm/record.py", 'b"unlock needs "', 'b"unlock need "')],
    "need: size": [
        ("tpm/record.py", "digest()[:4]", "digest()[:3]"),
        ("tpm/record.py", "at + 4]", "at + 3]"),
        ("tpm/record.py", "1 + 4 * count, 4)", "1 + 3 * count, 3)"),
    ],
    "needs: most": [("tpm/record.py", "NEEDS_MAX = 12", "NEEDS_MAX = 13")],
    "needs: more than that": [("tpm/record.py", "_ALL = 0xFF", "_ALL = 0xFE")],
    # files
    "state version": [("host/state_file.py", "\nVERSION = 1", "\nVERSION = 2")],
    "state indent": [("host/state_file.py", "indent=1", "indent=2")],
    "baseline version": [("measured/baseline.py", "_VERSION = 1", "_VERSION = 2")],
    "baseline order of an event": [
        ("measured/baseline.py", "[each.pcr, each.kind,", "[each.kind, each.pcr,"),
        ("measured/baseline.py", "def _parse_item(pcr: Any, kind: Any,", "def _parse_item(kind: Any, pcr: Any,"),
    ],
    "booted version": [("predict/booted.py", "_VERSION = 1", "_VERSION = 2")],
    "report version": [("host/report_file.py", "VERSION = 1", "VERSION = 2")],
    "sync version": [("operations/sync.py", "VERSION = 1", "VERSION = 2")],
    "verdict line end": [("boot/agent.py", 'record.verdict + "\\n"', "record.verdict")],
    "path `var/lib/unlock/state.json`": [("paths.py", "unlock/state.json", "unlock/state")],
    "path `var/lib/unlock/baseline.json`": [("paths.py", "unlock/baseline.json", "unlock/baseline")],
    "path `var/lib/unlock/booted.json`": [("paths.py", "unlock/booted.json", "unlock/booted")],
    "path `var/lib/unlock/boot-files.json`": [("paths.py", "unlock/boot-files.json", "unlock/boot-files")],
    "path `var/lib/unlock/under-way`": [("host/resumption.py", '"under-way"', '"underway"')],
    "path `var/lib/unlock/paused.json`": [("host/resumption.py", '"paused.json"', '"pause.json"')],
    "path `var/lib/unlock/dump-recipient`": [("paths.py", "unlock/dump-recipient", "unlock/dump-to")],
    "path `var/lib/unlock/dumps`": [("paths.py", "unlock/dumps", "unlock/cores")],
    "path `var/lib/unlock/kernel-dump`": [("paths.py", "unlock/kernel-dump", "unlock/crash")],
    "path `run/unlock`": [("paths.py", "run/unlock", "run/unlocked")],
    "path `EFI/unlock/baseline.json`": [("measured/esp_copy.py", "EFI/unlock/", "EFI/Unlock/")],
    "path `run/unlock/report.json`": [("*.py", '"report.json"', '"rapport.json"')],
    "path `run/unlock/verdict`": [("*.py", '"verdict")', '"verdicts")')],
    "path `run/unlock/sync.json`": [("*.py", '"sync.json"', '"synced.json"')],
    "path `run/unlock/keys.json`": [("*.py", '"keys.json"', '"key.json"')],
    "path `run/unlock/members/GROUP`": [("*.py", '"members", group', '"member", group')],
    "path `run/unlock/failed-groups/GROUP`": [("*.py", '"failed-groups"', '"failed-group"')],
    "initramfs reads token": [("manifest", "reads token-2", "reads token-3")],
    "initramfs reads record": [("manifest", "reads record-2", "reads record-3")],
}

FIELDS = {
    "token": "disks/token.py",
    "backup": "native.py",
    "state": "host/state_file.py host/journal.py host/provider_entry.py disks/groups.py",
    "baseline": "measured/baseline.py",
    "booted": "predict/booted.py",
    "boot-files": "predict/trusted_files.py",
    "report": "host/report_file.py",
    "sync": "operations/sync.py",
}
"""Format -> where the names of its fields stand."""
NAMED = {
    "baseline: srk": [
        ("measured/baseline.py", "    srk: str", "    sro: str"),
        ("measured/baseline.py", '"srk"', '"sro"'),
    ],
    "baseline: identity": [
        ("measured/baseline.py", "    identity: str", "    identite: str"),
        ("measured/baseline.py", '"identity"', '"identite"'),
    ],
    "kernel-dump: version": [("operations/dump/kernel.py", '"version"', '"versio"')],
    "kernel-dump: id": [
        ("operations/dump/kernel.py", '"id"', '"ident"'),
        ("operations/dump/kernel.py", "    id: str", "    ident: str"),
    ],
    "kernel-dump: device": [
        ("operations/dump/kernel.py", '"device"', '"disk"'),
        ("operations/dump/kernel.py", "    device: str", "    disk: str"),
    ],
    "paused: version": [("host/resumption.py", "    version: int", "    versio: int")],
    "paused: operation": [
        ("host/resumption.py", "    operation: str", "    operatio: str"),
        ("host/resumption.py", "self.operation", "self.operatio"),
    ],
    "paused: about": [
        ("host/resumption.py", "    about: str", "    abou: str"),
        ("host/resumption.py", "self.about", "self.abou"),
    ],
    "paused: at": [("host/resumption.py", "    at: float", "    av: float")],
}
"""Fields that are those of a tuple."""


def listed() -> list[str]:
    """What the document's last section lists: an item a row; of a row `fields of F`, an item for each of them."""
    section = (TOP / "docs/formats.md").read_text().partition("\n## Everything that is frozen\n")[2]
    found = []
    for item, values in re.findall(r"^\| ([^|]+) \| (.+) \|$", section, re.M):
        if item.startswith("fields of "):
            found += [f"{item.removeprefix('fields of ')}: {name}" for name in re.findall("`([^`]+)`", values)]
        elif item not in ("Item", "---"):
            found.append(item)
    return found


def changes(item: str) -> list[Change]:
    if item in CHANGES:
        return CHANGES[item]
    if item in NAMED:
        return NAMED[item]
    if item.strip("`") in LABELS:
        label = item.strip("`")
        return [("*.py", label, label[:-2] + "xx")]
    form, _, name = item.partition(": ")
    if form == "state":  # a field of a record: it stands there, and has another name in the JSON
        field, read, write = f"    {name}: ", "json.loads(content)", "indent=1).encode()"
        old, new = f'"{name}":', f'"{name}q":'
        renamed = f"content.replace(b'{old}', b'\"\":').replace(b'{new}', b'{old}')"
        return [
            (FIELDS[form], field, field),
            ("host/state_file.py", read, f"json.loads({renamed})"),
            ("host/state_file.py", write, f"indent=1).replace('{old}', '{new}').encode()"),
        ]
    return [(FIELDS[form], f"{quote}{name}{quote}", f"{quote}{name}q{quote}") for quote in "\"'"]


def places(tree: Path, item: str) -> Iterator[tuple[Path, str, str]]:
    """Files that a change is made in, its text and the other one. Raises LookupError when it stands nowhere."""
    nowhere = True
    for names, old, new in changes(item):
        files = {each for name in names.split() for part in CODE for each in (tree / part).rglob(name)}
        found = [each for each in sorted(files) if old.encode() in each.read_bytes()]
        if not found and (item in CHANGES or item in NAMED or item.startswith("state: ")):
            raise LookupError(f"{item}: {old!r} stands nowhere in {names}")
        nowhere = nowhere and not found
        yield from ((each, old, new) for each in found)
    if nowhere:
        raise LookupError(f"{item} stands nowhere")


def disagreement() -> str:
    """What docs/formats.md lists and is not changed here, or the other way round; "" when nothing."""
    items = listed()
    known = {*CHANGES, *NAMED, *(f"`{each}`" for each in LABELS)}
    unknown = [each for each in items if each not in known and each.partition(": ")[0] not in FIELDS]
    twice = [each for each in items if items.count(each) > 1]
    return ", ".join([*unknown, *twice, *sorted(known - set(items))])


@contextlib.contextmanager
def changed(tree: Path, item: str) -> Iterator[None]:
    """The tree with one change, in files of another time: no bytecode that is there fits them."""
    before: dict[Path, tuple[bytes, int]] = {}
    try:
        for each, old, new in list(places(tree, item)):
            before.setdefault(each, (each.read_bytes(), each.stat().st_mtime_ns))
            each.write_bytes(each.read_bytes().replace(old.encode(), new.encode()))
            os.utime(each, (LATER, LATER))
        yield
    finally:
        for each, (content, time_ns) in before.items():
            each.write_bytes(content)
            os.utime(each, ns=(time_ns, time_ns))


class Seen:
    """A plugin of pytest that keeps the first test that failed, and how."""

    def __init__(self) -> None:
        self.first = ""

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        if report.failed and not self.first:
            crash = getattr(report.longrepr, "reprcrash", None)
            why = crash.message.splitlines()[0] if crash else ""
            self.first = f"{report.nodeid.rpartition('::')[2]} | {why.replace('|', '/')[:60]}"

    def pytest_collectreport(self, report: pytest.CollectReport) -> None:
        if report.failed:
            self.first = self.first or "(not even loaded) | " + str(report.longrepr).strip().splitlines()[-1][:60]


def run(tree: Path) -> str:
    """The first test that fails there; "" when all are green. In a forked child: nothing of it is left here."""
    read, write = os.pipe()
    child = os.fork()
    if not child:
        try:
            os.close(read)
            os.chdir(tree)
            sink = os.open(os.devnull, os.O_WRONLY)
            os.dup2(sink, 1)
            os.dup2(sink, 2)
            sys.path[:] = [str(tree), str(tree / "tests"), *sys.path[1:]]
            for name in [each for each in sys.modules if each == "tests" or each.startswith("tests.")]:
                del sys.modules[name]
            seen = Seen()
            options = [
                "-x",
                "-q",
                "--tb=line",
                *("-p", "no:cacheprovider", "-p", "xdist.plugin", "-p", "pytest_timeout"),
                "--rootdir",
                str(tree),
                "--basetemp",
                str(tree / "tmp"),
            ]
            status = pytest.main([*options, "tests/test_formats.py"], [seen])
            told = seen.first or ("" if status == 0 else f"pytest ends with {int(status)} |")
            os.write(write, told.encode())
        finally:
            os._exit(0)
    os.close(write)
    with os.fdopen(read, "rb") as answers:
        told = answers.read().decode()
    _, status = os.waitpid(child, 0)
    return told or ("" if status == 0 else f"killed: {status} |")


def main() -> None:
    words = sys.argv[1:]
    if found := disagreement():
        sys.exit(f"docs/formats.md and tests/mutate_formats.py do not list the same: {found}")
    os.environ["PYTEST_DISABLE_PLUGIN_AUTOLOAD"] = "1"
    sys.dont_write_bytecode = False
    for name in PRELOADED:
        importlib.import_module(name)
    gc.freeze()
    begun = time.monotonic()
    green = []
    with tempfile.TemporaryDirectory() as place:
        tree = Path(place)
        for part in PARTS:
            shutil.copytree(TOP / part, tree / part, ignore=shutil.ignore_patterns("__pycache__"))
        for file in FILES:
            shutil.copy(TOP / file, tree / file)
        if told := run(tree):
            sys.exit(f"without a change a test fails: {told}")
        sys.dont_write_bytecode = True  # what that first run left is good for all
        chosen = [each for each in listed() if not words or words[0] in each]
        print("| change | first test that fails | how |\n| --- | --- | --- |")
        for item in chosen:
            with changed(tree, item):
                told = run(tree)
            print(f"| {item} | {told or '**none** |'} |", flush=True)
            green += [] if told else [item]
    print(f"\n{len(chosen) - len(green)} of {len(chosen)} changes are seen, in {time.monotonic() - begun:.0f} s")
    if green:
        sys.exit(f"not seen: {', '.join(green)}")


if __name__ == "__main__":
    main()
