# SPDX-License-Identifier: Apache-2.0
"""What a passive listener on the TPM's bus can do later with what he has recorded: load the sealed object of an old
policy again, or guess the owner's authorization. Each attack succeeds where the encryption is taken away."""

import hmac
import socket
import struct
from collections.abc import Iterator
from hashlib import sha256
from pathlib import Path
from typing import NamedTuple

import pytest

from tests.tpmfixture import COMMANDS, Swtpm
from unlock.errors import PinWrong, TpmFailed
from unlock.secret import Secret
from unlock.tpm import chip as tpm_chip
from unlock.tpm import pcr_policy, slots
from unlock.tpm.chip import Tpm
from unlock.tpm.record import SLOTS, SRK, Payload, Record, Slot

HOST = b"h" * 16
SELECTION = pcr_policy.select([4, 7, 9])
NOW = pcr_policy.branch(SELECTION, {4: bytes(32), 7: bytes(32), 9: bytes(32)})
KEY = b"k" * 32
PASSWORD = struct.pack(">IIHBH", 9, 0x40000009, 0, 0, 0)  # an authorization area: TPM_RS_PW, empty


@pytest.fixture
def chip(tmp_path: Path) -> Iterator[Swtpm]:
    with Swtpm(tmp_path / "tpm") as chip:
        yield chip


class Exchange(NamedTuple):
    """A command and its answer, as bytes on the bus."""

    name: str
    command: bytes
    answer: bytes

    @property
    def parameters(self) -> bytes:
        """Of the command: behind handle and authorization area."""
        size = int.from_bytes(self.command[14:18], "big")
        return self.command[18 + size :]

    @property
    def results(self) -> bytes:
        """Of the answer: behind handle (Load alone has one) and parameterSize."""
        return self.answer[18 if self.name == "Load" else 14 :]


def recorded(chip: Swtpm) -> list[Exchange]:
    found, rest = [], bytes(chip.proxy.traffic)
    while rest:
        pair = []
        for _ in range(2):
            size = int.from_bytes(rest[2:6], "big")
            pair.append(rest[:size])
            rest = rest[size:]
        found.append(Exchange(COMMANDS.get(int.from_bytes(pair[0][6:10], "big"), "?"), *pair))
    return found


def sized(data: bytes) -> tuple[bytes, bytes]:
    """The content of a TPM2B, and what follows."""
    end = 2 + int.from_bytes(data[:2], "big")
    return data[2:end], data[end:]


def reseal(tpm: Tpm, pin: bytes = b"") -> Record:
    auth = pcr_policy.pin_auth(HOST, Secret(pin)) if pin else None
    return slots.seal_slot(tpm, HOST, SELECTION, (NOW,), Payload(Secret(KEY)), pin_auth=auth)


def send(chip: Swtpm, code: int, body: bytes, tag: int = 0x8002) -> bytes:
    """The answer of the TPM to a command of the attacker's own."""
    with socket.socket(socket.AF_UNIX) as line:
        line.connect(str(chip.proxy.data))
        line.sendall(struct.pack(">HII", tag, 10 + len(body), code) + body)
        return line.recv(4096)


def works(answer: bytes) -> bool:
    return answer[6:10] == bytes(4)


def put_back(chip: Swtpm, private: bytes, public: bytes, record: Record, slot: Slot) -> bool:
    """The thief's part, with the empty owner authorization: the old object into a slot, and its record with a higher
    generation. False where the TPM does not load it."""
    blobs = b"".join(struct.pack(">H", len(each)) + each for each in (private, public))
    loaded = send(chip, 0x157, struct.pack(">I", SRK) + PASSWORD + blobs)
    if not works(loaded):
        return False
    for transient in (struct.pack(">I", slot.object), loaded[10:14]):  # the first one takes out what is there
        assert works(send(chip, 0x120, struct.pack(">I", 0x40000001) + transient + PASSWORD + slot.object.to_bytes(4)))
    with chip.open() as tpm:
        tpm.write_record(slot, record._replace(generation=record.generation + 7))
    return True


def replay_everything(chip: Swtpm, heard: list[Exchange], record: Record) -> bool:
    """Whether a boot opens without the PIN after the thief has tried whatever he has heard."""
    publics = {sized(sized(each.parameters)[1])[0] for each in heard if each.name == "Load"}
    privates = {sized(each.parameters)[0] for each in heard if each.name == "Load"}
    privates |= {sized(each.results)[0] for each in heard if each.name == "Create"}
    assert privates and publics
    with chip.open() as tpm:
        slot, _ = slots.current_slot(tpm)
    for private in privates:
        for public in publics:
            if put_back(chip, private, public, record, slot):
                chip.power_cycle()
                with chip.open() as tpm:
                    return bytes(slots.unseal(tpm).payload.key) == KEY
    for each in heard:  # word for word
        if each.name in ("Create", "Load"):
            assert not works(send(chip, int.from_bytes(each.command[6:10], "big"), each.command[10:]))
    chip.power_cycle()
    with chip.open() as tpm, pytest.raises(PinWrong):
        slots.unseal(tpm)
    return False


def test_a_recorded_reseal_does_not_bring_back_a_policy_without_the_pin(chip: Swtpm) -> None:
    with chip.open() as tpm:
        reseal(tpm)
        chip.proxy.clear()
        without = reseal(tpm)
        heard = recorded(chip)
        reseal(tpm, b"correct horse")
    assert not replay_everything(chip, heard, without)


def test_in_clear_it_does(chip: Swtpm, monkeypatch: pytest.MonkeyPatch) -> None:
    with chip.open() as tpm:
        reseal(tpm)
        chip.proxy.clear()
        with monkeypatch.context() as patch:
            in_clear(patch)
            without = reseal(tpm)
        heard = recorded(chip)
        reseal(tpm, b"correct horse")
    assert replay_everything(chip, heard, without)


def in_clear(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(tpm_chip, "_ENCRYPT", 0)
    patch.setattr(tpm_chip, "_DECRYPT", 0)


@pytest.mark.parametrize("encrypted", [True, False])
@pytest.mark.parametrize("pin", [b"", b"correct horse"])
def test_no_part_of_the_object_is_on_the_bus(
    chip: Swtpm, monkeypatch: pytest.MonkeyPatch, pin: bytes, encrypted: bool
) -> None:
    if not encrypted:
        in_clear(monkeypatch)
    with chip.open() as tpm:
        privates = private_parts(tpm, monkeypatch)
        reseal(tpm, pin)
        tpm.try_sealing(SELECTION)
    assert len(privates) == 2
    secrets = [*privates, KEY]
    if pin:
        secrets.append(bytes(pcr_policy.pin_auth(HOST, Secret(pin))))
    for secret in secrets:
        parts = {secret[at : at + 8] for at in range(len(secret) - 7)}
        found = sum(part in chip.proxy.traffic for part in parts)
        assert found == (0 if encrypted else len(parts))
    for each in recorded(chip):
        if each.name in ("Create", "Load"):
            assert each.command[18:22] != PASSWORD[4:8], "an HMAC session authorizes it"


def private_parts(tpm: Tpm, monkeypatch: pytest.MonkeyPatch) -> list[bytes]:
    """What ESYS is given to load, in clear: filled as the TPM is used."""
    found: list[bytes] = []
    send_to_tpm = tpm._send

    def listening(call: str, *arguments: object) -> None:
        if call == "Load":
            private = arguments[4]
            found.append(bytes(tpm._ffi.buffer(private.buffer, private.size)))  # type: ignore[attr-defined]
        send_to_tpm(call, *arguments)

    monkeypatch.setattr(tpm, "_send", listening)
    return found


def test_a_reseal_sends_no_more_commands_than_it_did(chip: Swtpm) -> None:
    """One session for Create and Load."""
    with chip.open() as tpm:
        reseal(tpm)
        chip.proxy.clear()
        reseal(tpm)
    names = [each.name for each in recorded(chip)]
    assert (names.count("StartAuthSession"), names.count("Create"), names.count("Load")) == (1, 1, 1)
    for first in (0x02000000, 0x03000000, 0x80000000):
        assert chip.handles(first) == ()


@pytest.mark.parametrize("command", ["Create", "Load"])
def test_a_failure_leaves_no_session(chip: Swtpm, command: str) -> None:
    with chip.open() as tpm:
        tpm.ensure_srk()
        chip.proxy.answer(command, 0x101)
        with pytest.raises(TpmFailed):
            reseal(tpm)
        reseal(tpm)
    for first in (0x02000000, 0x03000000, 0x80000000):
        assert chip.handles(first) == ()


def guess_owner(heard: list[Exchange], guess: bytes) -> bool:
    """Whether the proof in an EvictControl fits this owner authorization. Part 1, "HMAC Computation"; the session is
    neither bound nor salted, if that is to be told."""
    nonces = [each.answer[16:48] for each in heard if each.name == "StartAuthSession"]
    for each in heard:
        if each.name != "EvictControl":
            continue
        area = each.command[22:]  # behind both handles and authorizationSize
        caller, rest = sized(area[4:])
        attributes, proof = rest[:1], sized(rest[1:])[0]
        handles = each.command[10:18]
        names = handles[:4] + object_name(heard, handles[4:])
        cp = sha256(each.command[6:10] + names + each.command[-4:]).digest()
        for nonce in nonces:
            if hmac.digest(guess, cp + caller + nonce + attributes, "sha256") == proof:
                return True
    return False


def object_name(heard: list[Exchange], handle: bytes) -> bytes:
    """Of the object at a persistent handle, by the ReadPublic that was heard."""
    for each in heard:
        if each.name == "ReadPublic" and each.command[10:14] == handle and works(each.answer):
            public = sized(each.answer[10:])[0]
            return b"\0\x0b" + sha256(public).digest()
    return handle


@pytest.mark.parametrize("salted", [True, False])
def test_the_owners_authorization_cannot_be_guessed_from_its_proof(
    chip: Swtpm, monkeypatch: pytest.MonkeyPatch, salted: bool
) -> None:
    auth = Secret(b"owner")
    with chip.open() as tpm:
        tpm.ensure_srk()
        chip.set_owner_auth(auth)
        slots.seal_slot(tpm, HOST, SELECTION, (NOW,), Payload(Secret(KEY)), owner_auth=auth)
        if not salted:
            session = tpm._session
            monkeypatch.setattr(tpm, "_session", lambda _salt, *rest: session(0xFFF, *rest))
        chip.proxy.clear()
        slots.evict_all(tpm, auth)
        assert not any(tpm.slot_state(slot).complete for slot in SLOTS)
    heard = recorded(chip)
    assert not guess_owner(heard, b"other")
    assert guess_owner(heard, b"owner") is not salted
