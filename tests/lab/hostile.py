# SPDX-License-Identifier: Apache-2.0
"""Headers in the hands of an attacker who can compute checksums, and the real door that they are judged at."""

import copy
import json
from base64 import b64encode
from collections.abc import Callable
from hashlib import pbkdf2_hmac, sha256
from pathlib import Path
from random import Random
from typing import Any, NamedTuple

from unlock.boot.activation import GroupOpener
from unlock.disks import disk_keys, luks, token
from unlock.disks.groups import Group, Member
from unlock.disks.header import Header
from unlock.disks.udev import Disk
from unlock.host.report import OUTCOMES, Report
from unlock.keys import recovery_key
from unlock.secret import Secret

HOST = "ab" * 16
AREA = 0x4000
"""Bytes of one copy of the header: 4096 binary, the rest JSON."""
KEYSLOT = 4000 * 64
"""Bytes of a keyslot's key material: LUKS's anti-forensic stripes of a 64 byte key."""
FRONT = 2 * AREA + 2 * KEYSLOT
"""Bytes at the front of a disk that say something: header, keyslot, room for one more."""
SIZE = 32 << 20
EVIL = b"E" * 64
"""A volume key that the attacker knows."""


class Lab:
    """A disk `honest` that must always open, and `victim`, whose header cases change; one host, one recovery key.

    `other` is a disk of another group of this host, `stranger` one of another host.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.recovery = recovery_key.new()
        self.keys = disk_keys.Keys(
            Secret.random(32), Secret.random(32), Secret.random(32), disk_keys.mac_key(self.recovery, HOST)
        )
        self.dek = Secret.random(64)
        self.victim = self._make("victim", "data", self.dek)
        self.honest = self._make("honest", "safe", Secret.random(64))
        self.other = self._make("other", "spare", Secret.random(64))
        self.stranger = self._make("stranger", "data", Secret.random(64), "cd" * 16)
        self.front = self.victim.read_bytes()[:FRONT]
        self.fields = fields_of(self.front)
        self.loaded = luks.Container(str(self.victim))
        """Read before anything was changed."""
        self.uuid, self.authentic = self.loaded.uuid, self.loaded.metadata
        (self.token,) = disk_keys.read_tokens(self.loaded, HOST)
        self.foreign_tokens = [fields_of(path.read_bytes())["tokens"]["0"] for path in (self.other, self.stranger)]

    def _make(self, name: str, group: str, dek: Secret, host: str = HOST) -> Path:
        path = self.folder / name
        with path.open("wb") as file:
            file.truncate(SIZE)
        with luks.format(str(path), dek) as container:
            container.add_keyslot(dek, passphrase=self.recovery)
            member = Member(container.uuid, f"{group}-a", "")
            each = disk_keys.make_token(
                container, host, Group(group, f"kek/{group}", 1, 1, (member,)), member, dek, self.keys
            )
            container.set_token(token.encode(each))
        return path

    def put(self, header: bytes) -> None:
        """The victim as it was, but for `header`."""
        with self.victim.open("wb") as file:
            file.truncate(SIZE)
            file.write(self.front)
        self.add(header, 0)

    def add(self, data: bytes, at: int) -> None:
        with self.victim.open("r+b") as file:
            file.seek(at)
            file.write(data)

    # The doors

    def by_tpm(self, container: Header, each: token.Token) -> Secret:
        """As early boot and the gates unwrap."""
        return disk_keys.unwrap_volume_key(container, each, self.keys.persistence)

    def by_recovery(self, container: Header, each: token.Token) -> Secret:
        """As the recovery prompt does."""
        disk_keys.check_recovery(container, each, self.keys.mac_key)
        return disk_keys.dek_by_recovery_key(container, self.recovery)

    def judge(self, door: Callable[[luks.Container, token.Token], Secret]) -> tuple[str, str]:
        """(outcome, detail) of the victim, seen before the honest disk; what must hold whatever the victim is."""
        report = Report("test")
        opening = GroupOpener(
            HOST, lambda *what: (door if what[0].device == str(self.victim) else self.by_tpm)(*what), report
        )
        opening.workers = 0  # what would be activated stays in the queue
        for path in (self.victim, self.honest):
            opening.add_disk(Disk(str(path), path.name, "", "", "", SIZE, 0.0))
        opening.read_headers()
        opening.start_complete_groups(settled=True)
        entry = report.disks[str(self.victim)]
        outcome, detail = entry.outcome, entry.detail
        try:
            queued = {each.disk.sysname: each for each in opening.queue}
            assert "honest" in queued and report.disks[str(self.honest)].outcome == "waiting"
            assert outcome in OUTCOMES and detail.isprintable() and len(detail) < 1000, (outcome, detail)
            assert not detail.isidentifier(), f"an error without a type of ours: {detail}"
            assert (outcome == "waiting") == ("victim" in queued), outcome
            if "victim" in queued:
                self._is_authentic(queued["victim"].header, queued["victim"].token)
                assert queued["victim"].dek == self.dek
        finally:
            opening.wipe()
        return outcome, detail

    def _is_authentic(self, container: Header, each: token.Token) -> None:
        """By comparison with what was written, not by what was authenticated."""
        now, then = container.metadata, self.authentic
        assert container.uuid == self.uuid
        assert now["segments"] == then["segments"]
        assert now["config"].get("flags") is None and now["config"].get("requirements") is None
        assert [_unlisted(value) for value in now["digests"].values() if value["segments"]] == [
            _unlisted(then["digests"]["0"])
        ]
        assert each.facts() == self.token.facts()


def _unlisted(digest: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in digest.items() if name != "keyslots"}


def fields_of(front: bytes) -> dict[str, Any]:
    """The JSON of the first copy."""
    fields: dict[str, Any] = json.loads(front[4096:AREA].split(b"\0", 1)[0])
    return fields


def header(front: bytes, text: bytes, change: Callable[[bytearray], object] = lambda area: None) -> bytes:
    """Both copies with this JSON and a change of the binary part, checksums right (LUKS2 on-disk format 1.1.3)."""
    copies = []
    for offset in (0, AREA):
        area = bytearray(front[offset : offset + AREA])
        area[4096:] = text[: AREA - 4096].ljust(AREA - 4096, b"\0")
        change(area)
        copies.append(summed(area))
    return b"".join(copies)


def summed(area: bytearray) -> bytearray:
    area[448:512] = bytes(64)
    area[448:480] = sha256(area).digest()
    return area


def huge(front: bytes, size: int, second: bool) -> bytes:
    """One copy of `size` bytes, whole, full of a token of numbers."""
    fields = fields_of(front)
    fields["config"].update(json_size=str(size - 4096), keyslots_size=str((16 << 20) - 2 * size))
    fields["keyslots"] = {}
    fields["digests"]["0"]["keyslots"] = []
    fields["tokens"]["1"] = {"type": "x", "keyslots": [], "junk": [0] * ((size - 16384) // 2)}
    area = bytearray(size)
    start = AREA if second else 0
    area[:4096] = front[start : start + 4096]
    area[8:16] = size.to_bytes(8, "big")
    area[256:264] = (size if second else 0).to_bytes(8, "big")
    text = json.dumps(fields, separators=(",", ":")).encode()
    area[4096 : 4096 + len(text)] = text
    return bytes(summed(area[:size]))


def foreign_digest(fields: dict[str, Any]) -> dict[str, Any]:
    """The digest of the attacker's volume key."""
    digest = pbkdf2_hmac("sha256", EVIL, b"s" * 32, 1000)
    text = {"salt": b64encode(b"s" * 32).decode(), "digest": b64encode(digest).decode()}
    return {**fields["digests"]["0"], **text}


def add_keyslot(fields: dict[str, Any], *, first: bool, encryption: str = "aes-xts-plain64", **kdf: Any) -> None:
    """One more keyslot, on the next place; before the honest one if `first`, as the library tries them in order."""
    slots = fields["keyslots"]
    new = copy.deepcopy(slots["0"])
    new["area"].update(offset=str(int(new["area"]["offset"]) + int(new["area"]["size"])), encryption=encryption)
    new["kdf"].update(kdf)
    if first:
        slots["1"] = slots.pop("0")
        fields["digests"]["0"]["keyslots"] = ["1"]
    slots["0" if first else "1"] = new


def bind(fields: dict[str, Any], slot: str, **digest: Any) -> None:
    """A digest of the attacker's key, for one keyslot and no data."""
    fields["digests"]["1"] = {**foreign_digest(fields), "keyslots": [slot], "segments": [], **digest}


def evil_stripes() -> bytes:
    """The attacker's key as LUKS splits it, for a keyslot that nothing encrypts (LUKS1 on-disk format, "AF")."""
    block = bytes(64)
    for _ in range(3999):
        block = b"".join(sha256(at.to_bytes(4, "big") + block[at * 32 : at * 32 + 32]).digest() for at in range(2))
    return bytes(64 * 3999) + bytes(a ^ b for a, b in zip(block, EVIL, strict=True))


# Mutation


class Again(str):
    """A name that a dict takes twice."""

    __slots__ = ()
    __hash__ = object.__hash__

    def __eq__(self, other: object) -> bool:
        return self is other


_RAW = "@raw "


def render(fields: Any, random: Random) -> bytes:
    """JSON text; a string that begins with `@raw ` stands there without its quotes."""
    text = json.dumps(fields, ensure_ascii=random.random() < 0.8, indent=random.choice((None, None, None, 1)))
    parts = text.split(f'"{_RAW}')
    text = parts[0] + "".join(part.replace('"', "", 1) for part in parts[1:])
    return text.encode("utf-8", "surrogatepass")


WEIRD: list[Any] = [
    None, True, False, 0, 1, -1, 2, 2**31, 2**32 - 1, 2**53, 2**63 - 1, 2**63, 2**64, 10**30, 0.5, -0.0, 1e300,
    "", "0", "1", "-1", "18446744073709551615", "18446744073709551616", "0x10", " 1", "é", "€", "\0", "\ud800",
    "\x1b[2J", "\n", "x" * 300, "cipher_null-ecb", "aes-cbc-essiv:sha256", "crypt", "linear", "dynamic",
    "argon2id", "pbkdf2", "luks2", "unlock", "reencrypt", "online-reencrypt-v2",
    "root", "../x", "A" * 43 + "=", [], {}, [[]], [0], ["0"],
    ["0", "0"], {"0": {}}, {"": None}, [{}] * 50, {"0": {"0": {"0": {"0": []}}}},
    *(_RAW + each for each in (
        "1e999", "-0", "1.0", "NaN", "Infinity", "9" * 400, "9" * 5000, "01", "'x'", "/*x*/0", "[" * 40 + "]" * 40,
        "[" * 3000, "tru", "\\\\u0030",
    )),
]  # fmt: skip


def mutate(root: Any, random: Random, donors: list[Any]) -> None:
    """Changes one thing at any depth of a JSON value, in place."""
    place = root
    while True:
        if not isinstance(place, dict | list) or not place:
            return
        key = random.choice(list(place)) if isinstance(place, dict) else random.randrange(len(place))
        if isinstance(place[key], dict | list) and place[key] and random.random() < 0.8:
            place = place[key]
            continue
        break
    old, weird = place[key], copy.deepcopy(random.choice(WEIRD))
    kind = random.randrange(10)
    if kind == 0:
        del place[key]
    elif kind == 1:
        place[key] = weird
    elif kind == 2 and isinstance(place, dict):
        place[Again(key)] = random.choice([old, weird])
    elif kind == 3 and isinstance(place, dict):
        place[random.choice(["0", "1", "99", "", "x", "keyslots", "type", "\0", str(key) + "2"])] = weird
    elif kind == 4:
        place[key] = [old] if random.random() < 0.5 else {"0": old}
    elif kind == 5 and isinstance(place, list):
        place.insert(key, weird)
    elif kind == 6:
        donor = copy.deepcopy(random.choice(donors))
        place[key] = donor.get(key, donor) if isinstance(donor, dict) else donor
    else:
        place[key] = _near(old, random)


def _near(value: Any, random: Random) -> Any:
    """A value of the same kind, or the same value as another kind."""
    if isinstance(value, bool) or value is None:
        return not value
    if isinstance(value, int | float):
        return random.choice(
            [value + 1, value - 1, -value, value * 2, int(value) << 40, str(value), value / 2, [value]]
        )
    if isinstance(value, str):
        at = random.randrange(len(value) + 1)
        changed = value[:at] + random.choice("0A/=+ -_.\0é") + value[at + 1 :]
        shorter, longer = value[:at], value + value[:at]
        number = (
            str(int(value) + random.choice((-4096, -1, 1, 512, 4096, 2**40))) if value.isdecimal() else value.upper()
        )
        return random.choice([changed, changed, shorter, longer, number, value + " ", [value], {value: value}])
    if isinstance(value, list):
        return random.choice([value * 2, value[::-1], value[:-1], {str(n): each for n, each in enumerate(value)}])
    return random.choice(
        [list(value.values()), {}, {**value, "0": value}, {name.upper(): value[name] for name in value}]
    )


def damage(data: bytes | bytearray, random: Random) -> bytes:
    """Bytes flipped, cut out, doubled, overwritten, added."""
    out = bytearray(data)
    for _ in range(random.randrange(1, 4)):
        at, length = random.randrange(len(out) + 1), random.choice((1, 1, 2, 4, 8, 60))
        kind = random.randrange(5)
        if kind == 0 and at < len(out):
            out[at] ^= 1 << random.randrange(8)
        elif kind == 1:
            del out[at : at + length]
        elif kind == 2:
            out[at:at] = out[at : at + length]
        elif kind == 3:
            out[at : at + length] = random.randbytes(length)
        else:
            out[at:at] = random.choice(
                (b"\0", b'"', b"{", b"[" * 2000, b"}", b",", b"\\u0000", b"\xed\xa0\x80", b"9" * 30)
            )
    return bytes(out)


class Row(NamedTuple):
    """How a header is changed, and what becomes of the disk: the outcome in the report, words of the detail."""

    change: Callable[[Lab, dict[str, Any]], object]
    outcome: str
    words: str
    recovery: str = ""
    """The outcome by the recovery key where it is another one."""
