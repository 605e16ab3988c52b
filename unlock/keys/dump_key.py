# SPDX-License-Identifier: Apache-2.0
"""The keys that core dumps are encrypted to: an age identity (age-encryption.org/v1, X25519) for each host key.

    host key ──HKDF──> identity ──X25519──> recipient ──> /var/lib/unlock/dump-recipient

Whoever writes a dump needs the recipient alone, which is public. The identity is never kept: it is derived again when a
dump is opened, from the present host key or from one that it has replaced.
"""

import os
from collections.abc import Iterator
from hashlib import sha256
from typing import NamedTuple

from .. import log, wrap
from ..errors import NoKey, Tampered, UnlockError
from ..host import keyring
from ..host.state import State
from ..host.state_file import HostKey
from ..paths import Paths, write_atomically
from ..secret import Secret
from . import access

LABEL = b"unlock-dump-1"
_ALPHABET = b"qpzry9x8gf2tvdw0s3jn54khce6mua7l"
_GENERATOR = (0x3B6A57B2, 0x26508E6D, 0x1EA119FA, 0x3D4233DD, 0x2A1462B3)


class Recipient(NamedTuple):
    """What dumps are encrypted to."""

    generation: int
    """Of the host key."""
    text: str
    """age1..."""

    @property
    def fingerprint(self) -> str:
        """16 hex digits, which each dump has in its name."""
        return fingerprint(self.text)


class DumpKey(NamedTuple):
    """A host key that dumps may be encrypted by, and where it is now."""

    generation: int
    fingerprint: str
    """'' when the host key is not at hand: only its provider knows it."""
    key_id: str
    """The host key's, PROVIDER-ID/KEY."""


# Derivation


def derive_identity(host_key: Secret, host: str) -> Secret:
    """The X25519 private key of an age identity, 32 bytes. `host` is the host id."""
    return wrap.derive(host_key, bytes.fromhex(host), LABEL)


def recipient_of(identity: Secret) -> str:
    """age1..."""
    with _bech32(b"age", Secret(wrap.x25519_public(identity))) as text:
        return text.value.decode()


def identity_file(identity: Secret) -> Secret:
    """What age(1) reads as --identity: AGE-SECRET-KEY-1..."""
    with _bech32(b"age-secret-key-", identity) as text:
        line = Secret(bytes(len(text) + 1))
        for i, byte in enumerate(text.value):
            line.value[i] = byte - 32 if 97 <= byte <= 122 else byte
        line.value[-1:] = b"\n"
    return line


def fingerprint(recipient: str) -> str:
    """The first 8 bytes of SHA-256 of the recipient's text, in hex."""
    return sha256(recipient.encode()).hexdigest()[:16]


def _bech32(prefix: bytes, data: Secret) -> Secret:
    """BIP 173, in lower case, and of any length, as age has it."""
    size = -(-len(data) * 8 // 5)
    text = Secret(prefix + b"1" + bytes(size + 6))
    start = len(prefix) + 1
    bits = count = 0
    at = start
    for byte in [*data.value, 0]:
        bits, count = (bits << 8 | byte) & 0xFFF, count + 8
        while count >= 5 and at < start + size:
            count -= 5
            text.value[at] = bits >> count & 31
            at += 1
    expanded = [*(byte >> 5 for byte in prefix), 0, *(byte & 31 for byte in prefix)]
    check = _checksum([*expanded, *text.value[start:]]) ^ 1
    for i in range(6):
        text.value[at + i] = check >> 5 * (5 - i) & 31
    for i in range(start, len(text)):
        text.value[i] = _ALPHABET[text.value[i]]
    return text


def _checksum(values: list[int]) -> int:
    found = 1
    for value in values:
        top = found >> 25
        found = (found & 0x1FFFFFF) << 5 ^ value
        for i, each in enumerate(_GENERATOR):
            if top >> i & 1:
                found ^= each
    return found


# The recipient in use


def write_recipient(paths: Paths, state: State, host_key: Secret) -> Recipient:
    """From now on dumps are encrypted to the identity of this host key, which the state has as the present one: call it
    when that is durable. Writes nothing where the recipient is the same. Raises OSError."""
    with derive_identity(host_key, state.host) as identity:
        new = Recipient(state.host_key_ref.generation, recipient_of(identity))
    if read_recipient(paths) != new:
        text = f"# unlock: host key {new.generation} {new.fingerprint}\n{new.text}\n"
        write_atomically(paths.dump_recipient, text.encode(), mode=0o644)
    return new


def read_recipient(paths: Paths) -> Recipient | None:
    """None where there is none, or the file is not as `write_recipient` makes it."""
    try:
        with open(paths.dump_recipient, encoding="ascii", opener=_without_waiting) as file:
            head, text, *rest = file.read(4096).split("\n")
        words = head.split(" ")
        found = Recipient(int(words[4]), text)
    except (OSError, ValueError, IndexError):
        return None
    same = [*words[:4], *words[5:]] == ["#", "unlock:", "host", "key", found.fingerprint] and rest == [""]
    return found if same else None


def _without_waiting(path: str, flags: int) -> int:
    """Opens a FIFO too, which nobody writes to."""
    return os.open(path, flags | os.O_NONBLOCK)


def refresh(work: access.Work) -> None:
    """Writes the recipient of the present host key, where a command was killed before it did, or where somebody has put
    another one in its place on a disk that is not encrypted. Does nothing where this host does not keep the host key.
    Raises Tampered, OSError."""
    if host_key := work.state.host_key(work.persistence):
        before = read_recipient(work.paths)
        with host_key:
            now = write_recipient(work.paths, work.state, host_key)
        known = {each.generation: each.fingerprint for each in known_keys(work.state, work.persistence)}
        # '' for a key that is elsewhere
        if before and before != now and known.get(before.generation) not in ("", before.fingerprint):
            log.error(
                f"{work.paths.dump_recipient} was changed: dumps of fingerprint {before.fingerprint} are encrypted to "
                f"somebody else; new ones are encrypted to host key {now.generation} again",
                "unlock dump list",
            )


# Identities of dumps that are kept


def known_keys(state: State, persistence: Secret | None) -> list[DumpKey]:
    """All host keys that this host has had, the newest first."""
    found = []
    for entry, key in _host_keys(state, persistence):
        said = ""
        if key:
            with key, derive_identity(key, state.host) as identity:
                said = fingerprint(recipient_of(identity))
        found.append(DumpKey(entry.generation, said, entry.id))
    return found


def find_identity(work: access.Work, wanted: str, generation: int) -> Secret:
    """The identity with a fingerprint: of a host key that this host has, else of one that a provider gives. Raises
    NoKey that names the generation and where its key is."""
    elsewhere = []
    for entry, key in _host_keys(work.state, work.persistence):
        if key is None:
            elsewhere.append(entry)
        elif identity := _identity_if(wanted, key, work.state.host):
            return identity
    why, hint = "no key that this host has had is it", "unlock dump list"
    for entry in sorted(elsewhere, key=lambda each: each.generation != generation):
        try:
            at = work.state.provider_of(entry.id)
            fetched = work.provider(at).fetch(access.key_ref(at, entry.id, entry.name).id, access.OPENS)
        except UnlockError as error:
            if entry.generation == generation:
                why, hint = f"key {entry.id}: {error}", error.hint or "unlock provider list"
            continue
        if identity := _identity_if(wanted, fetched, work.state.host):
            return identity
    raise NoKey(f"the dump needs host key {generation} (fingerprint {wanted}), which is not here: {why}", hint)


def _identity_if(wanted: str, host_key: Secret, host: str) -> Secret | None:
    """The identity of a host key, if it has this fingerprint. Wipes the host key."""
    with host_key:
        identity = derive_identity(host_key, host)
    if fingerprint(recipient_of(identity)) == wanted:
        return identity
    identity.wipe()
    return None


def _host_keys(state: State, persistence: Secret | None) -> Iterator[tuple[HostKey, Secret | None]]:
    """Each host key that this host has had, the newest first; None for one that is not at hand."""
    for number, entry in enumerate(state.host_keys):
        key = None
        try:
            if entry.wrapped and persistence:
                key = state.unwrap_host_key(persistence, entry)
            elif number == 0:
                key = keyring.get("unlock:host")
        except (NoKey, Tampered):
            pass
        yield entry, key
