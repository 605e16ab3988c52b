# SPDX-License-Identifier: Apache-2.0
"""The LUKS2 token `unlock`, format versions 1 and 2: what a disk's header carries so that this host can open the disk.

    type, keyslots          as LUKS2 demands; keyslots is always []
    version                 1; 2 for a token with one of the two fields that version 1 lacks
    host                    host id, 32 hex digits
    group, members          name of the group, how many disks it has
    manifest                generation of the list of members
    name                    mapping name in /dev/mapper
    serial                  serial number of the device, or ''
    kek                     {"id", "generation", "wrapped"}: wrapped by the persistence key; for a KEK that only the
                            provider keeps, 32 zero bytes, wrapped with an AAD of their own that binds the header
    dek                     the volume key, wrapped by the KEK
    host_key                wrapped by the persistence key
    mac                     HMAC-SHA256 over the facts, by a key derived from the recovery key
    degraded                version 2: true when the group may open without all of its members
    reencrypt               version 2: null, or, while the disk gets a new volume key, {"old", "new", "keyslots", "dek",
                            "key"}: number and SHA-256 of the digest of the old volume key, and of the new; the
                            numbers of the operation key's keyslots; the new volume key and the operation key, wrapped
                            by the KEK. `dek` is the old volume key. While a disk is encrypted in place, old is the
                            number of bytes that were in clear, both keyslots are one, and `dek` is the only one; while
                            it is decrypted in place, new is null, and the same holds
    pad                     spaces up to SIZE bytes: a longer token later needs no more room

Wrapped keys are AES-256-GCM: 12 bytes of nonce, the ciphertext, 16 bytes of tag; base64.
"""

from binascii import Error as Base64Error
from binascii import a2b_base64, b2a_base64

from ..errors import Malformed, NewerFormat
from ..light import Any, Mapping, NamedTuple
from ..strictjson import canonical
from .groups import MEMBERS_MAX, SERIAL_MAX, is_name
from .reencrypt_plan import NO_DIGEST, Plan

TYPE = "unlock"
VERSION = 2
OLDEST_VERSION = 1
SIZE = 2048
"""Bytes of a token's JSON; a header of the default size has room for five."""
GENERATION_MAX = 2**53 - 1
_KEK_ID_MAX = 256
_CLEAR_MAX = 2**60
DEK_MAX = 64
"""Bytes of the longest volume key: aes-xts, 512 bit."""
_OVERHEAD = 12 + 16
_NAMES = "type keyslots version host group members manifest name serial kek dek host_key mac pad"
_FIELDS = {1: frozenset(_NAMES.split()), 2: frozenset([*_NAMES.split(), "degraded", "reencrypt"])}
"""By version."""


class Reencryption(NamedTuple):
    """What opens a disk while it gets a new volume key."""

    plan: Plan
    dek: bytes
    """The new volume key, wrapped."""
    key: bytes
    """The operation key, wrapped."""


class Token(NamedTuple):
    """One token. Its form is checked; it is not authentic before its DEK is unwrapped."""

    host: str
    group: str
    members: int
    manifest: int
    name: str
    serial: str
    kek_id: str
    kek_generation: int
    kek: bytes
    """The KEK, wrapped."""
    dek: bytes
    """The DEK, wrapped."""
    host_key: bytes
    """The host key, wrapped."""
    mac: bytes
    degraded: bool = False
    """The group may open without all of its members."""
    reencryption: Reencryption | None = None
    """The disk gets a new volume key."""

    @property
    def version(self) -> int:
        """The oldest format that has what this token says: an older initramfs reads what it can."""
        return 2 if self.degraded or self.reencryption else 1

    def facts(self) -> dict[str, Any]:
        """The fields that the DEK's AAD and the recovery MAC bind."""
        more: dict[str, Any] = {"degraded": True} if self.degraded else {}
        if self.reencryption:
            more |= {"reencrypt": [*self.reencryption.plan.digests, self.reencryption.plan.keyslots]}
        return {
            "host": self.host,
            "group": self.group,
            "members": self.members,
            "manifest": self.manifest,
            "name": self.name,
            "serial": self.serial,
            **more,
        }


def dek_aad(token: Token, header: Mapping[str, Any]) -> bytes:
    """The AAD of the wrapped DEK: the token's facts, the KEK's id and generation, the header's facts."""
    return canonical(
        {
            "format": "unlock-dek-1",
            "token": token.facts(),
            "kek": [token.kek_id, token.kek_generation],
            "header": header,
        }
    )


def mac_data(token: Token, header: Mapping[str, Any]) -> bytes:
    """The data of the recovery MAC: the same facts without the KEK, which a rekey replaces."""
    return canonical({"format": "unlock-mac-1", "token": token.facts(), "header": header})


def kek_aad(host: str, kek_id: str, generation: int) -> bytes:
    """The AAD of a wrapped KEK."""
    return canonical({"format": "unlock-kek-1", "host": host, "kek": [kek_id, generation]})


def not_kept_aad(token: Token, header: Mapping[str, Any]) -> bytes:
    """The AAD of the zero bytes instead of a KEK that this host does not keep.

    It binds the disk, so the statement cannot be moved to another one. A version of unlock that does not know it
    finds a KEK that does not authenticate.
    """
    return canonical({"format": "unlock-kek-elsewhere-1", "dek": dek_aad(token, header).decode()})


def new_dek_aad(token: Token, header: Mapping[str, Any]) -> bytes:
    """The AAD of the new volume key while a disk is re-encrypted: what binds the old one."""
    return canonical({"format": "unlock-new-dek-1", "dek": dek_aad(token, header).decode()})


def operation_key_aad(token: Token, header: Mapping[str, Any]) -> bytes:
    """The AAD of the operation key: the same."""
    return canonical({"format": "unlock-operation-key-1", "dek": dek_aad(token, header).decode()})


def key_aad(host: str, kind: str) -> bytes:
    """The AAD of any other key that the persistence key wraps; `kind` names the key."""
    return canonical({"format": f"unlock-{kind}-1", "host": host})


def encode(token: Token) -> dict[str, Any]:
    """The token as a JSON object of SIZE bytes."""
    fields: dict[str, Any] = {
        "type": TYPE,
        "keyslots": [],
        "version": token.version,
        **token._replace(reencryption=None).facts(),
        "kek": {"id": token.kek_id, "generation": token.kek_generation, "wrapped": _encode_base64(token.kek)},
        "dek": _encode_base64(token.dek),
        "host_key": _encode_base64(token.host_key),
        "mac": _encode_base64(token.mac),
        "pad": "",
    }
    if token.version > 1:
        fields |= {"degraded": token.degraded, "reencrypt": _encode_reencryption(token.reencryption)}
    fields["pad"] = " " * max(0, SIZE - len(canonical(fields)))
    return fields


def decode(fields: Mapping[str, Any]) -> Token:
    """Checks a token's JSON object. Raises Malformed, or NewerFormat when a later version of unlock wrote it."""
    version = _get_int(fields, "version", 2**31)
    if version > VERSION:
        raise NewerFormat(
            f"the token has format {version}; this unlock reads up to {VERSION}", "install a newer unlock"
        )
    if version < OLDEST_VERSION or fields.get("type") != TYPE or fields.get("keyslots") != []:
        raise Malformed("the token is not in the format of its version")
    if fields.keys() != _FIELDS[version] or not isinstance(fields.get("degraded", False), bool):
        raise Malformed("the token's fields are not those of its format")
    kek = fields["kek"]
    if not isinstance(kek, dict) or kek.keys() != {"id", "generation", "wrapped"}:
        raise Malformed("the token's kek is not in the format of its version")
    for field in "group", "name":
        if not is_name(fields[field]):
            raise Malformed(f"the token's {field} is not a valid name")
    if _get_string(fields, "pad", SIZE).strip(" "):
        raise Malformed("the token's pad is not blank")
    host = _get_string(fields, "host", 32)
    if len(host) != 32 or not set("0123456789abcdef").issuperset(host):
        raise Malformed("the token's host id is not 32 hex digits")
    found = Token(
        host=host,
        group=fields["group"],
        members=_get_int(fields, "members", MEMBERS_MAX, least=1),
        manifest=_get_int(fields, "manifest", GENERATION_MAX, least=1),
        name=fields["name"],
        serial=_get_string(fields, "serial", SERIAL_MAX),
        kek_id=_get_string(kek, "id", _KEK_ID_MAX),
        kek_generation=_get_int(kek, "generation", GENERATION_MAX, least=1),
        kek=_get_bytes(kek, "wrapped", 32 + _OVERHEAD),
        dek=_get_bytes(fields, "dek", DEK_MAX + _OVERHEAD, least=16 + _OVERHEAD),
        host_key=_get_bytes(fields, "host_key", 32 + _OVERHEAD),
        mac=_get_bytes(fields, "mac", 32),
        degraded=fields.get("degraded", False),
        reencryption=_decode_reencryption(fields.get("reencrypt")),
    )
    if found.version != version:
        raise Malformed("the token has a later format than it needs")
    return found


def _encode_reencryption(found: Reencryption | None) -> dict[str, Any] | None:
    if not found:
        return None
    old, new = found.plan.digests
    wraps = {"dek": _encode_base64(found.dek), "key": _encode_base64(found.key)}
    return {"old": old, "new": new, "keyslots": found.plan.keyslots, **wraps}


def _decode_reencryption(fields: Any) -> Reencryption | None:
    if fields is None:
        return None
    if not isinstance(fields, dict) or fields.keys() != {"old", "new", "keyslots", "dek", "key"}:
        raise Malformed("the token's reencrypt is not in the format of its version")
    clear = _get_int(fields, "old", _CLEAR_MAX, least=1) if isinstance(fields["old"], int) else 0
    old, old_facts = (NO_DIGEST, "") if clear else _get_digest(fields, "old")
    new, new_facts = _get_digest(fields, "new") if fields["new"] is not None else (NO_DIGEST, "")
    keyslots = fields["keyslots"]
    if not isinstance(keyslots, list) or len(keyslots) != 2 or not all(map(_is_number, keyslots)) or old == new:
        raise Malformed("the token's reencrypt has no two keyslots and digests")
    return Reencryption(
        plan=Plan(old, old_facts, new, new_facts, keyslots[0], keyslots[1], clear),
        dek=_get_bytes(fields, "dek", DEK_MAX + _OVERHEAD, least=16 + _OVERHEAD),
        key=_get_bytes(fields, "key", 32 + _OVERHEAD),
    )


def _get_digest(fields: Mapping[str, Any], name: str) -> tuple[int, str]:
    found = fields[name]
    if isinstance(found, list) and len(found) == 2 and _is_number(found[0]) and isinstance(found[1], str):
        number, facts = found
        if len(facts) == 64 and set("0123456789abcdef").issuperset(facts):
            return number, facts
    raise Malformed(f"the token's {name} is not a digest")


def _is_number(value: Any) -> bool:
    """Of a digest or keyslot."""
    return type(value) is int and 0 <= value < 32


def _encode_base64(value: bytes) -> str:
    return b2a_base64(value, newline=False).decode()


def _get_int(fields: Mapping[str, Any], name: str, most: int, least: int = 0) -> int:
    value = fields.get(name)
    if type(value) is not int or not least <= value <= most:
        raise Malformed(f"the token's {name} is not a whole number from {least} to {most}")
    return value


def _get_string(fields: Mapping[str, Any], name: str, most: int) -> str:
    value = fields.get(name)
    if not isinstance(value, str) or len(value) > most or not (value.isascii() and value.isprintable()):
        raise Malformed(f"the token's {name} is not a string of at most {most} printable ASCII characters")
    return value


def _get_bytes(fields: Mapping[str, Any], name: str, most: int, least: int = 0) -> bytes:
    text = _get_string(fields, name, 4 * most)
    try:
        value = a2b_base64(text, strict_mode=True)
    except Base64Error as error:
        raise Malformed(f"the token's {name} is not base64") from error
    if _encode_base64(value) != text:  # unused bits of the last character are set
        raise Malformed(f"the token's {name} is not canonical base64")
    if not (least or most) <= len(value) <= most:
        raise Malformed(f"the token's {name} has {len(value)} bytes")
    return value
