# SPDX-License-Identifier: Apache-2.0
"""A reader of unlock's formats that knows nothing but docs/formats.md: `cryptography` and the standard library, no
line of unlock. That it opens the data of tests/data/formats proves the document."""

import hashlib
import hmac
import json
import re
import struct
from base64 import b64decode
from collections.abc import Iterator
from typing import Any

from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey
from cryptography.hazmat.primitives.ciphers import Cipher, algorithms, modes
from cryptography.hazmat.primitives.ciphers.aead import AESGCM
from cryptography.hazmat.primitives.hashes import SHA256
from cryptography.hazmat.primitives.kdf.hkdf import HKDF
from cryptography.hazmat.primitives.kdf.scrypt import Scrypt

# Common parts


def canonical(value: Any) -> bytes:
    return json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=True).encode("ascii")


def unwrap(key: bytes, wrapped: bytes, aad: bytes) -> bytes:
    assert len(key) == 32
    return AESGCM(key).decrypt(wrapped[:12], wrapped[12:], aad)


def derive(key: bytes, salt: bytes, info: bytes, size: int = 32) -> bytes:
    return HKDF(SHA256(), size, salt, info).derive(key)


def key_aad(host: str, kind: str) -> bytes:
    return canonical({"format": f"unlock-{kind}-1", "host": host})


# The recovery key


def recovery_key_is_well_formed(text: str) -> bool:
    if not re.fullmatch(r"\d{6}(-\d{6}){7}", text):
        return False
    numbers = [int(each) for each in text.split("-")]
    return all(n % 11 == place and n // 11 <= 65535 for place, n in enumerate(numbers, 1))


def mac_key(recovery: str, host: str) -> bytes:
    return derive(recovery.encode("ascii"), bytes.fromhex(host), b"unlock-header-mac-1")


# boot-files.json


def boot_files_mac(persistence: bytes, said: dict[str, Any]) -> bytes:
    rest = {name: value for name, value in said.items() if name != "mac"}
    return hmac.digest(derive(persistence, b"", b"unlock-boot-files-1"), canonical(rest), "sha256")


# The LUKS2 header


def header(image: bytes) -> dict[str, Any]:
    """The JSON of the first copy."""
    magic, version, size = struct.unpack_from(">6sHQ", image)
    assert magic == b"LUKS\xba\xbe" and version == 2
    whole = image[:448] + bytes(64) + image[512:size]
    assert image[448:480] == hashlib.sha256(whole).digest()
    found: dict[str, Any] = json.loads(image[4096:size].partition(b"\0")[0])
    found["uuid"] = image[168:208].partition(b"\0")[0].decode("ascii")
    return found


def data_digest(found: dict[str, Any]) -> dict[str, Any]:
    (digest,) = (each for each in found["digests"].values() if sorted(each["segments"]) == sorted(found["segments"]))
    return dict(digest)


def header_facts(found: dict[str, Any]) -> dict[str, Any]:
    return {
        "uuid": found["uuid"],
        "segments": found["segments"],
        "requirements": found["config"].get("requirements"),
        "flags": found["config"].get("flags"),
        "digest": {name: value for name, value in data_digest(found).items() if name != "keyslots"},
    }


def volume_key_of_keyslot(image: bytes, passphrase: str) -> bytes:
    """By the LUKS2 On-Disk Format Specification: PBKDF2, AES-XTS, anti-forensic merge; proven by the digest."""
    found = header(image)
    (slot,) = found["keyslots"].values()
    kdf, area, size = slot["kdf"], slot["area"], slot["key_size"]
    assert (kdf["type"], kdf["hash"], kdf["iterations"]) == ("pbkdf2", "sha256", 1000)
    assert area["encryption"] == "aes-xts-plain64"
    key = hashlib.pbkdf2_hmac("sha256", passphrase.encode("ascii"), b64decode(kdf["salt"]), 1000, area["key_size"])
    at, stripes = int(area["offset"]), slot["af"]["stripes"]
    material = b""
    for number in range(-(-size * stripes // 512)):
        sector = image[at + 512 * number : at + 512 * (number + 1)]
        decryptor = Cipher(algorithms.AES(key), modes.XTS(struct.pack("<QQ", number, 0))).decryptor()
        material += decryptor.update(sector)
    block = bytes(size)
    for number in range(stripes):
        block = bytes(a ^ b for a, b in zip(block, material[number * size : (number + 1) * size], strict=True))
        if number < stripes - 1:
            block = b"".join(
                hashlib.sha256(struct.pack(">I", i) + block[i * 32 : i * 32 + 32]).digest() for i in range(size // 32)
            )
    digest = data_digest(found)
    made = hashlib.pbkdf2_hmac("sha256", block, b64decode(digest["salt"]), digest["iterations"])
    assert made == b64decode(digest["digest"])
    return block


# The token

TOKEN_FACTS = ("host", "group", "members", "manifest", "name", "serial")


def dek_aad(token: dict[str, Any], facts: dict[str, Any]) -> bytes:
    return canonical(
        {
            "format": "unlock-dek-1",
            "token": {name: token[name] for name in TOKEN_FACTS},
            "kek": [token["kek"]["id"], token["kek"]["generation"]],
            "header": facts,
        }
    )


def kek(token: dict[str, Any], persistence: bytes) -> bytes:
    aad = {"format": "unlock-kek-1", "host": token["host"], "kek": [token["kek"]["id"], token["kek"]["generation"]]}
    return unwrap(persistence, b64decode(token["kek"]["wrapped"]), canonical(aad))


def elsewhere(token: dict[str, Any], persistence: bytes, facts: dict[str, Any]) -> bytes:
    aad = canonical({"format": "unlock-kek-elsewhere-1", "dek": dek_aad(token, facts).decode("ascii")})
    return unwrap(persistence, b64decode(token["kek"]["wrapped"]), aad)


def dek(token: dict[str, Any], key: bytes, facts: dict[str, Any]) -> bytes:
    return unwrap(key, b64decode(token["dek"]), dek_aad(token, facts))


def host_key(token: dict[str, Any], persistence: bytes) -> bytes:
    return unwrap(persistence, b64decode(token["host_key"]), key_aad(token["host"], "host-key"))


def header_mac(token: dict[str, Any], key: bytes, facts: dict[str, Any]) -> bytes:
    said = {"format": "unlock-mac-1", "token": {name: token[name] for name in TOKEN_FACTS}, "header": facts}
    return hmac.digest(key, canonical(said), "sha256")


# The native provider and its backup


def native_id(kdk: bytes) -> str:
    return f"native-{derive(kdk, b'', b'unlock-native-fingerprint-1', 16).hex()}"


def native_key(kdk: bytes, scope: str, name: str, generation: int) -> bytes:
    info = canonical({"format": "unlock-native-1", "scope": scope, "name": name, "generation": generation})
    return derive(kdk, native_id(kdk).encode("ascii"), info)


def backup(text: bytes, password: str) -> tuple[dict[str, Any], bytes]:
    """What the backup says, and the KDK."""
    fields = json.loads(text)
    assert list(fields) == ["unlock", "version", "provider", "scope", "salt", "kdk"]
    salt = b64decode(fields.pop("salt"))
    assert len(salt) == 16
    key = Scrypt(salt=salt, length=32, n=131072, r=8, p=1).derive(password.encode())
    kdk = unwrap(key, b64decode(fields.pop("kdk")), canonical(fields))
    assert native_id(kdk) == fields["provider"]
    return fields, kdk


# state.json


def state_wraps(state: dict[str, Any]) -> Iterator[tuple[str, str]]:
    """(kind, wrapped) of every key in a state, by the persistence key in use."""
    for entry in (state["provider"], *state["others"].values()):
        yield from (
            (kind, entry[field])
            for field, kind in (("kdk", "kdk"), ("client_key", "client-key"), ("password", "client-password"))
            if entry.get(field)
        )
    for entry in (state["host_key"], *state["host_key"]["former"]):
        if entry["wrapped"]:
            yield "host-key", entry["wrapped"]
    yield from (("mac-key", each) for each in (state["mac_key"], *state["recovery"]["behind"].values()) if each)


# Core dumps


def dump_identity(host_key: bytes, host: str) -> bytes:
    return derive(host_key, bytes.fromhex(host), b"unlock-dump-1")


def dump_recipient(identity: bytes) -> str:
    public = X25519PrivateKey.from_private_bytes(identity).public_key().public_bytes_raw()
    return bech32("age", public)


def age_identity(identity: bytes) -> str:
    return bech32("age-secret-key-", identity).upper()


def dump_fingerprint(recipient: str) -> str:
    return hashlib.sha256(recipient.encode("ascii")).hexdigest()[:16]


def bech32(prefix: str, data: bytes) -> str:
    """BIP 173."""
    number, size = int.from_bytes(data, "big"), -(-len(data) * 8 // 5)
    number <<= size * 5 - len(data) * 8
    words = [number >> 5 * (size - 1 - i) & 31 for i in range(size)]
    check = 1
    for word in [*(ord(c) >> 5 for c in prefix), 0, *(ord(c) & 31 for c in prefix), *words, *[0] * 6]:
        top = check >> 25
        check = (check & 0x1FFFFFF) << 5 ^ word
        for i, each in enumerate((0x3B6A57B2, 0x26508E6D, 0x1EA119FA, 0x3D4233DD, 0x2A1462B3)):
            check ^= each if top >> i & 1 else 0
    words += [(check ^ 1) >> 5 * (5 - i) & 31 for i in range(6)]
    return prefix + "1" + "".join("qpzry9x8gf2tvdw0s3jn54khce6mua7l"[word] for word in words)


# The TPM


def policy_pcr(selection: list[int], values: dict[int, bytes]) -> bytes:
    bitmap = sum(1 << pcr for pcr in selection).to_bytes(3, "little")
    pcrs = b"\0\0\0\1" + b"\0\x0b" + b"\3" + bitmap
    composite = hashlib.sha256(b"".join(values[pcr] for pcr in sorted(selection))).digest()
    return hashlib.sha256(bytes(32) + b"\0\0\1\x7f" + pcrs + composite).digest()


def policy_or(branches: list[bytes]) -> bytes:
    listed = branches * 2 if len(branches) == 1 else branches
    return hashlib.sha256(bytes(32) + b"\0\0\1\x71" + b"".join(listed)).digest()


def policy_auth_value(digest: bytes) -> bytes:
    return hashlib.sha256(digest + b"\0\0\1\x6b").digest()


def cap_digest() -> bytes:
    return hashlib.sha256(b"unlock cap").digest()


def pin_auth(host: str, pin: str) -> bytes:
    return hashlib.sha256(b"unlock PIN\0" + bytes.fromhex(host) + pin.encode()).digest()


def sealed_template(auth_policy: bytes, pin: bool) -> bytes:
    return struct.pack(">HHIH32sHH", 8, 0x0B, 0x12 if pin else 0x412, 32, auth_policy, 0x10, 0)


def srk_template() -> bytes:
    return struct.pack(">HHIHHHHHHHHH", 0x23, 0x0B, 0x30472, 0, 6, 128, 0x43, 0x10, 3, 0x10, 0, 0)


def nv_public(index: int) -> bytes:
    return struct.pack(">IHIHH", index, 0x0B, 0x22060002, 0, 448)


def nv_record(data: bytes) -> dict[str, Any]:
    assert len(data) == 448 and data[416:] == hashlib.sha256(data[:416]).digest()
    magic, version, generation, host, cap, count, bitmap, flags, needed, zero, srk, name = struct.unpack_from(
        ">7sBQ16sBB3sBBB34s34s", data
    )
    assert magic == b"unlock\0" and zero == 0 and 1 <= count <= 8
    assert not any(data[108 + 32 * count : 364]) and not any(data[412:416])
    assert (version, flags) in ((1, 0), (2, 1))
    bits = int.from_bytes(bitmap, "little")
    return {
        "generation": generation,
        "host": host.hex(),
        "cap": cap,
        "selection": [pcr for pcr in range(24) if bits >> pcr & 1],
        "pin": bool(flags & 1),
        "srk": srk,
        "object": name,
        "branches": [data[108 + 32 * each : 140 + 32 * each] for each in range(count)],
        "needs": needs(needed, data[364:412]),
    }


def payload(data: bytes) -> tuple[bytes, bool, list[bytes] | None]:
    """The persistence key, whether the root file system may be one that nothing authenticated, and what it needs."""
    version, flags, key, needed, rest = struct.unpack(">BB32sB48s", data)
    assert version == 1 and flags in (0, 1)
    return key, bool(flags), needs(needed, rest)


def needs(number: int, data: bytes) -> list[bytes] | None:
    """None for each disk of the initramfs's crypttab."""
    count = 0 if number == 255 else number
    assert count <= 12 and not any(data[4 * count :])
    found = [data[4 * each : 4 * each + 4] for each in range(count)]
    assert found == sorted(set(found))
    return None if number == 255 else found


def need(name: str) -> bytes:
    return hashlib.sha256(b"unlock needs " + name.encode()).digest()[:4]
