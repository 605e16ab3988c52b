# SPDX-License-Identifier: Apache-2.0
"""Stories on a software TPM: seal, unseal, cap, and what must be refused."""

import struct
import subprocess
import sys
import threading
from collections.abc import Iterator
from hashlib import sha256
from pathlib import Path
from textwrap import dedent
from typing import Any

import pytest

from tests.tpmfixture import Swtpm
from unlock.errors import (
    Malformed,
    NewerFormat,
    NoSlot,
    Refused,
    Tampered,
    TpmAbsent,
    TpmFailed,
    TpmLockout,
    TpmRefused,
    Usage,
)
from unlock.secret import Secret
from unlock.tpm import answers, pcr_policy, public_area
from unlock.tpm import chip as tpm_chip
from unlock.tpm.chip import ResponseError, Tpm
from unlock.tpm.record import RECORD_SIZE, SRK, A, B, Record, Slot

SELECTION = pcr_policy.select([4, 7, 9])


@pytest.fixture
def chip(tmp_path: Path) -> Iterator[Swtpm]:
    with Swtpm(tmp_path / "tpm") as chip:
        yield chip


def enroll(tpm: Tpm, slot: Slot, payload: Secret, auth: Secret | None = None, **changes: Any) -> Record:
    branches = (pcr_policy.branch(SELECTION, tpm.read_pcrs(SELECTION)),)
    srk_name = tpm.ensure_srk(auth)
    name = tpm.seal(slot, branches, payload, owner_auth=auth)
    record = Record(1, b"h" * 16, SELECTION, pcr_policy.CAP_PCR, branches, srk_name, name)._replace(**changes)
    tpm.write_record(slot, record, auth)
    return record


class Raw:
    """Bytes that are written as if they were a record."""

    def __init__(self, data: bytes) -> None:
        self.data = data

    def encode(self) -> bytes:
        return self.data


def write_raw(tpm: Tpm, slot: Slot, data: bytes) -> None:
    tpm.write_record(slot, Raw(data))  # type: ignore[arg-type]


def unsealed(tpm: Tpm, slot: Slot = A) -> bytes:
    record = tpm.read_record(slot)
    with tpm.unseal(tpm.verify(slot, record), record) as payload:
        return bytes(payload)


def test_sealed_today_opens_at_every_boot(chip: Swtpm) -> None:
    with chip.open() as tpm, Secret.random(34) as payload:
        record = enroll(tpm, A, payload)
        secret = bytes(payload)
        assert tpm.read_record(A) == record
    for _ in range(2):
        chip.power_cycle()
        with chip.open() as tpm:
            assert unsealed(tpm) == secret
            tpm.extend(pcr_policy.CAP_PCR, pcr_policy.CAP_DIGEST)


@pytest.mark.parametrize("size", [1, 128])
def test_every_size_up_to_the_limit(chip: Swtpm, size: int) -> None:
    with chip.open() as tpm:
        enroll(tpm, A, Secret(b"p" * size))
        assert unsealed(tpm) == b"p" * size


def test_more_than_fits_is_refused_before_the_tpm_is_asked(chip: Swtpm) -> None:
    with chip.open() as tpm:
        tpm.ensure_srk()
        with pytest.raises(Malformed):
            tpm.seal(A, (b"1" * 32,), Secret(bytes(129)))


def test_after_the_cap_nothing_unseals(chip: Swtpm) -> None:
    with chip.open() as tpm:
        enroll(tpm, A, Secret(b"payload"))
        tpm.extend(pcr_policy.CAP_PCR, pcr_policy.CAP_DIGEST)
        with pytest.raises(TpmRefused):
            unsealed(tpm)


def test_a_changed_boot_is_refused(chip: Swtpm) -> None:
    with chip.open() as tpm:
        enroll(tpm, A, Secret(b"payload"))
        tpm.extend(8, bytes(32))  # not in the policy
        assert unsealed(tpm) == b"payload"
        tpm.extend(9, bytes(32))
        with pytest.raises(TpmRefused):
            unsealed(tpm)


def test_any_of_eight_states_opens(chip: Swtpm) -> None:
    with chip.open() as tpm:
        now = pcr_policy.branch(SELECTION, tpm.read_pcrs(SELECTION))
        branches = (*(bytes([n]) * 32 for n in range(7)), now)
        name = tpm.ensure_srk() and tpm.seal(A, branches, Secret(b"payload"))
        tpm.write_record(A, Record(1, b"h" * 16, SELECTION, 15, branches, tpm.ensure_srk(), name))
        assert unsealed(tpm) == b"payload"


def test_another_tpm_has_no_slot(chip: Swtpm, tmp_path: Path) -> None:
    with chip.open() as tpm:
        enroll(tpm, A, Secret(b"payload"))
    with Swtpm(tmp_path / "other") as other, other.open() as tpm, pytest.raises(NoSlot):
        tpm.read_record(A)


def test_no_tpm_at_all() -> None:
    for tcti in ("device:/dev/there-is-none", "swtpm:host=127.0.0.1,port=1", "nonsense:"):
        with pytest.raises(TpmAbsent) as caught:
            Tpm(tcti)
        assert caught.value.hint == "unlock explain"


def test_an_object_swapped_under_the_record(chip: Swtpm) -> None:
    with chip.open() as tpm:
        record = enroll(tpm, A, Secret(b"payload"))
        tpm.seal(A, record.branches, Secret(b"attacker"))
        with pytest.raises(Tampered):
            unsealed(tpm)


def test_an_owner_can_seal_a_key_of_his_own(chip: Swtpm) -> None:
    """A stated limit: so the caller must prove the key on the disks, and use one key per boot."""
    with chip.open() as tpm:
        enroll(tpm, A, Secret(b"payload"))
        enroll(tpm, A, Secret(b"attacker"))
        assert unsealed(tpm) == b"attacker"


def test_a_record_with_another_policy_than_the_object(chip: Swtpm) -> None:
    with chip.open() as tpm:
        record = enroll(tpm, A, Secret(b"payload"))
        tpm.write_record(A, record._replace(branches=(*record.branches, b"x" * 32)))
        with pytest.raises(Tampered):
            unsealed(tpm)


def test_an_object_with_a_password_is_not_ours(chip: Swtpm, monkeypatch: pytest.MonkeyPatch) -> None:
    with chip.open() as tpm:
        template = public_area.sealed_template
        with monkeypatch.context() as patch:
            patch.setattr(
                public_area,
                "sealed_template",
                lambda *sealed: struct.pack(">HHI", 8, 0xB, 0x452) + template(*sealed)[8:],
            )
            enroll(tpm, A, Secret(b"payload"))
        with pytest.raises(Tampered):
            unsealed(tpm)


def test_an_object_without_its_record_and_a_record_without_its_object(chip: Swtpm) -> None:
    with chip.open() as tpm:
        record = enroll(tpm, A, Secret(b"payload"))
        tpm.seal(B, record.branches, Secret(b"payload"))
        with pytest.raises(NoSlot):
            tpm.read_record(B)
        tpm._evict_object(A, None)
        with pytest.raises(NoSlot):
            unsealed(tpm)
        assert not tpm.slot_state(A).complete
        assert not tpm.slot_state(B).complete


def test_a_record_that_was_never_written(chip: Swtpm) -> None:
    """A power cut between NV_DefineSpace and NV_Write."""
    with chip.open() as tpm:
        tpm._define(A, None)
        with pytest.raises(NoSlot):
            tpm.read_record(A)
        record = enroll(tpm, A, Secret(b"payload"))
        assert tpm.read_record(A) == record


def test_damaged_records(chip: Swtpm) -> None:
    with chip.open() as tpm:
        good = enroll(tpm, A, Secret(b"payload")).encode()
        for data in (
            bytes(448),
            good[:200] + bytes(248),
            good[:-1] + b"\0",
            b"\xff" + good[1:],
            bytes(range(224)) * 2,
        ):
            write_raw(tpm, A, data)
            with pytest.raises(Malformed):
                tpm.read_record(A)
        write_raw(tpm, A, good)
        assert unsealed(tpm) == b"payload"


def test_a_newer_record(chip: Swtpm) -> None:
    with chip.open() as tpm:
        body = bytearray(enroll(tpm, A, Secret(b"payload")).encode()[:-32])
        body[7] = 3
        write_raw(tpm, A, bytes(body) + sha256(body).digest())
        with pytest.raises(NewerFormat):
            tpm.read_record(A)


@pytest.mark.parametrize(
    ("size", "attributes", "error"),
    [(64, 0x02060002, Malformed), (448, 0x02020002, Tampered), (448, 0x40006, Tampered)],
)
def test_a_foreign_index_at_our_handle_is_replaced(
    chip: Swtpm, size: int, attributes: int, error: type[Exception]
) -> None:
    """Too short, without AUTHREAD, and with a password: the last has no NO_DA either."""
    with chip.open() as tpm:
        public = struct.pack(">IHIHH", A.nv, 0xB, attributes, 0, size)
        auth = tpm._ffi.new("TPM2B_AUTH *", {"size": 4, "buffer": b"pass"} if attributes == 0x40006 else {})
        index = tpm._ffi.new("ESYS_TR *")
        info = tpm._unmarshal("TPM2B_NV_PUBLIC", public)
        tpm._send("NV_DefineSpace", 0x101, 0xFF, 0xFFF, 0xFFF, auth, info, index)
        with pytest.raises(NoSlot):  # nothing written yet
            tpm.read_record(A) if attributes == 0x02060002 else tpm.read_record(B)
        data = tpm._ffi.new("TPM2B_MAX_NV_BUFFER *", {"size": size, "buffer": bytes(size)})
        tpm._send("NV_Write", 0x101, index[0], 0xFF, 0xFFF, 0xFFF, data, 0)
        with pytest.raises(error):
            tpm.read_record(A)
        record = enroll(tpm, A, Secret(b"payload"))
        assert tpm.read_record(A) == record


def make_srk(tpm: Tpm, monkeypatch: pytest.MonkeyPatch, template: bytes) -> None:
    with monkeypatch.context() as patch:
        patch.setattr(public_area, "srk_template", lambda: template)
        tpm._make_srk(None)


def rsa_template(attributes: int = 0x30472) -> bytes:
    return struct.pack(">HHIH HHHHHI H", 1, 0xB, attributes, 0, 6, 128, 0x43, 0x10, 2048, 0, 0)


def test_an_rsa_srk_is_accepted(chip: Swtpm, monkeypatch: pytest.MonkeyPatch) -> None:
    with chip.open() as tpm:
        make_srk(tpm, monkeypatch, rsa_template())
        enroll(tpm, A, Secret(b"payload"))
        tpm.try_sealing(SELECTION)
        assert unsealed(tpm) == b"payload"


def test_a_key_that_is_no_srk_is_refused(chip: Swtpm, monkeypatch: pytest.MonkeyPatch) -> None:
    signing = struct.pack(">HHIH HHHHH H", 1, 0xB, 0x40472, 0, 0x10, 0x10, 2048, 0, 0, 0)
    with chip.open() as tpm:
        make_srk(tpm, monkeypatch, signing)
        with pytest.raises(Refused):
            tpm.ensure_srk()


def test_the_srk_is_made_once(chip: Swtpm) -> None:
    with chip.open() as tpm:
        name = tpm.ensure_srk()
        chip.proxy.clear()
        assert tpm.ensure_srk() == name
        assert chip.proxy.commands == ["ReadPublic"]


def test_another_srk_is_found_before_it_is_used(chip: Swtpm, monkeypatch: pytest.MonkeyPatch) -> None:
    with chip.open() as tpm:
        enroll(tpm, A, Secret(b"payload"))
        tpm._keep(tpm._public(SRK, "")[0], SRK, None)
        with pytest.raises(Tampered):  # none
            unsealed(tpm)
        make_srk(tpm, monkeypatch, rsa_template())
        chip.proxy.clear()
        with pytest.raises(Tampered):  # another
            unsealed(tpm)
        assert "StartAuthSession" not in chip.proxy.commands


def test_an_srk_that_may_leave_the_tpm_is_not_salted_to_whatever_the_record_says(
    chip: Swtpm, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The owner can make one that he may duplicate, and name it in the record: he would read the salt on the bus."""
    with chip.open() as tpm:
        record = enroll(tpm, A, Secret(b"payload"))
        tpm._keep(tpm._public(SRK, "")[0], SRK, None)
        make_srk(tpm, monkeypatch, rsa_template(0x30472 & ~0x12))  # neither fixedTPM nor fixedParent
        tpm.write_record(A, record._replace(srk_name=tpm.srk_name()))
        chip.proxy.clear()
        with pytest.raises(Tampered, match="storage root key"):
            unsealed(tpm)
        assert "StartAuthSession" not in chip.proxy.commands


def test_a_public_area_under_a_false_name(chip: Swtpm) -> None:
    """An interposer shows its own key under the pinned name: ESYS would salt to it."""

    def swap_point(command: str, answer: bytes) -> bytes:
        return answer[:60] + bytes([answer[60] ^ 1]) + answer[61:] if command == "ReadPublic" else answer

    with chip.open() as tpm:
        enroll(tpm, A, Secret(b"payload"))
        chip.proxy.tamper = swap_point
        chip.proxy.clear()
        with pytest.raises(Tampered):
            unsealed(tpm)
        assert "StartAuthSession" not in chip.proxy.commands


def test_a_changed_answer_to_unseal(chip: Swtpm) -> None:
    with chip.open() as tpm:
        enroll(tpm, A, Secret(b"payload"))
        chip.proxy.tamper = lambda command, answer: answer[:20] + b"x" + answer[21:] if command == "Unseal" else answer
        with pytest.raises(TpmFailed):
            unsealed(tpm)


def test_owner_authorization(chip: Swtpm) -> None:
    auth = Secret(b"owner's own password")
    chip.set_owner_auth(auth)
    with chip.open() as tpm:
        assert tpm.facts().owner_auth_set
        with pytest.raises(TpmFailed) as failure:
            tpm.ensure_srk()
        assert "the owner authorization is wrong" in str(failure.value)
        assert failure.value.hint == "--owner-auth-file FILE"
        with pytest.raises(TpmFailed):
            tpm.ensure_srk(Secret(b"wrong"))
        with pytest.raises(Usage):
            tpm.ensure_srk(Secret(bytes(65)))
        chip.proxy.clear()
        enroll(tpm, A, Secret(b"payload"), auth)
        assert unsealed(tpm) == b"payload"
        with pytest.raises(TpmFailed):
            tpm.evict(A, Secret(b"wrong"))
        assert unsealed(tpm) == b"payload"
        tpm.evict(A, auth)
        assert bytes(auth) not in chip.proxy.traffic
    assert chip.handles(0x02000000) == chip.handles(0x80000000) == ()


def test_a_listener_learns_nothing(chip: Swtpm) -> None:
    with chip.open() as tpm, Secret.random(34) as payload:
        enroll(tpm, A, payload)
        assert unsealed(tpm) == bytes(payload)
        tpm.try_sealing(SELECTION)
        assert len(chip.proxy.traffic) > 1000
        for at in range(0, 34 - 8):
            assert bytes(payload)[at : at + 8] not in chip.proxy.traffic


def test_the_listener_would_hear_it_without_encryption(chip: Swtpm, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("unlock.tpm.chip._ENCRYPT", 0)
    with chip.open() as tpm, Secret.random(34) as payload:
        enroll(tpm, A, payload)
        assert bytes(payload) not in chip.proxy.traffic, "sealing encrypts the other way"
        assert unsealed(tpm) == bytes(payload)
        assert bytes(payload) in chip.proxy.traffic


def test_no_session_and_no_object_is_left(chip: Swtpm) -> None:
    with chip.open() as tpm:
        record = enroll(tpm, A, Secret(b"payload"))
        for _ in range(24):
            tpm.unseal(tpm.verify(A, record), record).wipe()
            tpm.try_sealing(SELECTION)
        tpm.extend(9, bytes(32))
        for _ in range(24):
            with pytest.raises(TpmRefused):
                tpm.unseal(tpm.verify(A, record), record)
        for first in (0x02000000, 0x03000000, 0x80000000):
            assert tpm._handles(first) == ()


def test_a_pcr_that_changes_meanwhile_is_tried_again(chip: Swtpm) -> None:
    with chip.open() as tpm:
        enroll(tpm, A, Secret(b"payload"))
        chip.proxy.answer("Unseal", 0x128)
        chip.proxy.answer("PolicyOR", 0x128)
        assert unsealed(tpm) == b"payload"
        for _ in range(3):
            chip.proxy.answer("Unseal", 0x128)
        with pytest.raises(TpmFailed):
            unsealed(tpm)
        assert tpm._handles(0x02000000) == ()


@pytest.mark.parametrize("code", [0x922, 0x908, 0x90A])
def test_a_busy_tpm_is_waited_for(chip: Swtpm, code: int) -> None:
    with chip.open() as tpm:
        enroll(tpm, A, Secret(b"payload"))
        for command in ("NV_Read", "ReadPublic", "StartAuthSession", "Unseal", "PCR_Extend"):
            for _ in range(7):
                chip.proxy.answer(command, code)
        assert unsealed(tpm) == b"payload"
        tpm.extend(pcr_policy.CAP_PCR, pcr_policy.CAP_DIGEST)
        assert tpm.read_pcrs([pcr_policy.CAP_PCR]) == {15: sha256(bytes(32) + pcr_policy.CAP_DIGEST).digest()}


def test_there_is_something_else_to_do_while_the_tpm_makes_the_session(chip: Swtpm) -> None:
    """The TPM's answer stays away until it is done."""
    done = threading.Event()

    def late(command: str, answer: bytes) -> bytes:
        assert command != "StartAuthSession" or done.wait(30), "the answer is waited for first"
        return answer

    with chip.open() as tpm:
        record = enroll(tpm, A, Secret(b"payload"))
        objects = tpm.verify(A, record)
        chip.proxy.commands.clear()
        chip.proxy.tamper = late
        with tpm.unseal(objects, record, meanwhile=done.set) as found:
            assert bytes(found) == b"payload"
        assert chip.proxy.commands == ["StartAuthSession", "PolicyPCR", "PolicyOR", "Unseal"]
        assert tpm._handles(0x02000000) == ()


@pytest.mark.parametrize("code", [0x922, 0x90A, 0x101])
def test_a_session_that_is_not_made_at_once_is_made_later(chip: Swtpm, code: int) -> None:
    calls: list[None] = []
    with chip.open() as tpm:
        record = enroll(tpm, A, Secret(b"payload"))
        for _ in range(1 if code == 0x101 else 7):
            chip.proxy.answer("StartAuthSession", code)
        with tpm.unseal(tpm.verify(A, record), record, meanwhile=lambda: calls.append(None)) as found:
            assert bytes(found) == b"payload"
    assert len(calls) == 1


def test_a_failing_tpm_is_named(chip: Swtpm) -> None:
    with chip.open() as tpm:
        record = enroll(tpm, A, Secret(b"payload"))
        for command in ("NV_Read", "ReadPublic", "StartAuthSession", "PolicyPCR", "PolicyOR", "Unseal"):
            chip.proxy.answer(command, 0x101)
            with pytest.raises(TpmFailed, match=rf"TPM2_{command} failed: .* failure mode \(0x101\)"):
                unsealed(tpm)
        chip.proxy.answer("PCR_Extend", 0x101)
        with pytest.raises(TpmFailed):
            tpm.extend(15, pcr_policy.CAP_DIGEST)
        assert tpm.unseal(tpm.verify(A, record), record) == Secret(b"payload")


# Each answer in words ---------------------------------------------------------------------------------------


def told(tpm: Tpm) -> TpmFailed:
    with pytest.raises(TpmFailed) as caught:
        tpm.read_pcrs([0])
    return caught.value


def numbered(code: int) -> list[int]:
    """A code as TPMs send it: of format 1 with the number of a handle, a session, a parameter."""
    return [code, code | 0x200, code | 0x900, code | 0x2C0] if code & 0x80 else [code]


@pytest.mark.parametrize("code", answers.ANSWERS, ids=hex)
def test_every_answer_has_a_sentence_of_its_own(chip: Swtpm, monkeypatch: pytest.MonkeyPatch, code: int) -> None:
    monkeypatch.setattr(tpm_chip, "_PAUSES", (0, 0))  # of a busy TPM
    for rc in numbered(code):
        with chip.open() as tpm:
            for _ in range(100 if rc in answers.BUSY else 1):  # ESYS itself sends it several times
                chip.proxy.answer("PCR_Read", rc) if rc else chip.proxy.break_at("PCR_Read")
            failure = told(tpm)
            chip.proxy.forget_answers()
        words, hint = answers.ANSWERS[code]
        number = f"{rc:#x}" if rc else "0xa000a"
        assert (str(failure), failure.hint) == (f"TPM2_PCR_Read failed: {words} ({number})", hint)
    assert [each.words for each in answers.ANSWERS.values()].count(words) == 1
    assert " " in words and ". " not in words and words[0].islower() and words[-1].isalnum()


@pytest.mark.parametrize(("command", "code"), answers.OF_A_COMMAND)
def test_what_an_answer_means_of_one_command(command: str, code: int) -> None:
    for rc in numbered(code):
        words, hint = answers.OF_A_COMMAND[command, code]
        failure = ResponseError(command, rc)
        assert (str(failure), failure.hint) == (f"TPM2_{command} failed: {words} ({rc:#x})", hint)
        assert hint and words != answers.ANSWERS[code].words


@pytest.mark.parametrize(
    ("rc", "words"),
    [
        (0x921, "the TPM is in lockout after wrong authorizations"),
        (0x2D6, "the TPM does not offer AES-128 here"),
        (0x9A2, "the authorization is wrong"),
        (0x101, "the TPM is in failure mode"),
        (0x914, "an object is not loaded"),
        (0x91E, "a session is not loaded"),
        (0x7FE, "the TPM refuses it"),
    ],
)
def test_answers_that_came_bare(chip: Swtpm, rc: int, words: str) -> None:
    with chip.open() as tpm:
        chip.proxy.answer("PCR_Read", rc)
        assert str(told(tpm)) == f"TPM2_PCR_Read failed: {words} ({rc:#x})"


NOT_TO_US = """
    AUTH_CONTEXT AUTH_MISSING AUTH_TYPE BAD_CONTEXT BAD_TAG BINDING COMMAND_SIZE CPHASH ECC_POINT EXPIRED FW_LIMITED
    HMAC MGF NONCE NOT_USED NO_RESULT NV_SIZE PARENT PCR POLICY POLICY_CC PP PRIVATE SELECTOR SENSITIVE SEQUENCE
    SIGNATURE SVN_LIMITED TAG TICKET UNBALANCED
"""
"""Answers to commands, and to mistakes in them, that unlock does not make."""


def test_every_answer_of_the_specification_has_one() -> None:
    """As tpm2-pytss lists them, without its masks."""
    from tpm2_pytss.constants import TPM2_RC

    masks = {"FMT1", "MAX_FM0", "N_MASK", "P", "RC", "S", "WARN", *"ABCDEF", *(f"RC{n}" for n in range(10))}
    listed = {name: int(getattr(TPM2_RC, name)) for name in dir(TPM2_RC) if name.isupper() and name[0] != "_"}
    bare = {name for name, rc in listed.items() if answers.code_of(rc) not in answers.ANSWERS}
    assert bare - masks <= set(NOT_TO_US.split())


def test_an_srk_with_a_password_is_not_told_as_the_owners(chip: Swtpm) -> None:
    """The hint helps, and the key stays the same."""
    key = str(chip.state / "srk")
    attributes = "fixedtpm|fixedparent|sensitivedataorigin|userwithauth|noda|restricted|decrypt"
    make = ["tpm2_createprimary", "-T", chip.tcti, "-G", "ecc256:null:aes128cfb", "-a", attributes, "-c", key]
    subprocess.run([*make, "-p", "a password"], check=True, capture_output=True)
    subprocess.run(["tpm2_evictcontrol", "-T", chip.tcti, "-c", key, hex(SRK)], check=True, capture_output=True)
    chip.power_cycle()  # else the transient one is left
    with chip.open() as tpm:
        name = tpm.ensure_srk()
        for do in (lambda: tpm.try_sealing(SELECTION), lambda: enroll(tpm, A, Secret(b"payload"))):
            with pytest.raises(TpmFailed, match="the storage root key has a password") as caught:
                do()
            assert "owner" not in str(caught.value) + caught.value.hint
        command = caught.value.hint.partition(": ")[2].partition(",")[0].split()
        subprocess.run([*command, "-T", chip.tcti], check=True, capture_output=True)
        assert tpm.ensure_srk() == name
        enroll(tpm, A, Secret(b"payload"))
        assert unsealed(tpm) == b"payload"


def test_a_tpm_without_room_for_a_persistent_object_says_what_to_free(chip: Swtpm) -> None:
    with chip.open() as tpm:
        tpm.ensure_srk()
        key, handles = tpm._primary(0x101, tpm._owner(None)), iter(range(0x81010000, 0x81010100))
        with pytest.raises(TpmFailed) as filled:
            while True:
                last = next(handles)
                tpm._keep(key, last, None)
        with pytest.raises(TpmFailed, match="no room for one more persistent object") as caught:
            enroll(tpm, A, Secret(b"payload"))
        assert str(filled.value) == str(caught.value)
        assert "tpm2_getcap handles-persistent" in caught.value.hint and "nv-index" not in caught.value.hint
        for each in (last - 1, last - 2):  # the software TPM keeps NV indexes in the same memory
            tpm._keep(tpm._find(each), each, None)
        enroll(tpm, A, Secret(b"payload"))


def test_a_lockout_at_the_record_is_not_told_as_tampered(chip: Swtpm) -> None:
    """Somebody's index with a password is at our handle: in lockout the TPM does not say whether it is ours."""
    with chip.open() as tpm:
        public = tpm._unmarshal("TPM2B_NV_PUBLIC", struct.pack(">IHIHH", A.nv, 0xB, 0x40006, 0, 448))
        auth, index = tpm._ffi.new("TPM2B_AUTH *", {"size": 4, "buffer": b"pass"}), tpm._ffi.new("ESYS_TR *")
        tpm._send("NV_DefineSpace", 0x101, 0xFF, 0xFFF, 0xFFF, auth, public, index)
        data = tpm._ffi.new("TPM2B_MAX_NV_BUFFER *", {"size": 448, "buffer": bytes(448)})
        tpm._send("NV_Write", 0x101, index[0], 0xFF, 0xFFF, 0xFFF, data, 0)
    chip.set_lockout(1)
    with chip.open() as tpm:
        with pytest.raises(Tampered):
            tpm.read_record(A)  # a wrong password for it: now it is locked
        assert tpm.facts().in_lockout
        with pytest.raises(TpmLockout, match="in lockout") as caught:
            tpm.read_record(A)
        assert (caught.value.code, caught.value.status) == ("tpm-lockout", 9)
        assert "tpm2_dictionarylockout" in caught.value.hint
        assert isinstance(tpm.slot_state(A).problem, TpmLockout)
        record = enroll(tpm, A, Secret(b"payload"))
        assert tpm.read_record(A) == record


def test_a_line_that_breaks(chip: Swtpm) -> None:
    with chip.open() as tpm:
        enroll(tpm, A, Secret(b"payload"))
        chip.proxy.cut_after(3)
        with pytest.raises(TpmFailed):
            unsealed(tpm)


def test_trial_leaves_nothing_and_needs_an_srk(chip: Swtpm) -> None:
    with chip.open() as tpm:
        with pytest.raises(NoSlot):
            tpm.try_sealing(SELECTION)
        tpm.ensure_srk()
        tpm.extend(pcr_policy.CAP_PCR, pcr_policy.CAP_DIGEST)  # it is about the TPM, not about the cap
        before = tpm._handles(0x81000000)
        tpm.try_sealing(range(24))
        assert tpm._handles(0x81000000) == before
        chip.proxy.answer("Unseal", 0x101)
        with pytest.raises(TpmFailed):
            tpm.try_sealing(SELECTION)
        assert tpm._handles(0x80000000) == ()


def test_an_object_of_another_hash_is_not_ours_and_is_replaced(chip: Swtpm, monkeypatch: pytest.MonkeyPatch) -> None:
    with chip.open() as tpm:
        record = enroll(tpm, A, Secret(b"payload"))
        template = public_area.sealed_template
        with monkeypatch.context() as patch:
            patch.setattr(public_area, "sealed_template", lambda *_: struct.pack(">HHIHHH", 8, 0xC, 0x452, 0, 0x10, 0))
            patch.setattr(Tpm, "_area", lambda tpm, resource: tpm._shown(resource)[1])
            tpm.seal(A, record.branches, Secret(b"payload"))
        assert public_area.sealed_template is template
        assert not tpm.slot_state(A).complete
        with pytest.raises(Tampered):
            unsealed(tpm)
        enroll(tpm, A, Secret(b"payload"))
        assert unsealed(tpm) == b"payload"


def test_facts(chip: Swtpm) -> None:
    with chip.open() as tpm:
        facts = tpm.facts()
        assert facts.manufacturer == "IBM"
        assert facts.sha256_bank and not facts.srk and not facts.in_lockout and not facts.owner_auth_set
        assert facts.persistent_free >= 3
        assert facts.nv_buffer >= RECORD_SIZE <= facts.nv_index_size
        assert facts.taken == ()
        enroll(tpm, B, Secret(b"payload"))
        assert tpm.facts().srk and tpm.facts().taken == (B.object, B.nv)


def test_evict_finishes_what_was_cut(chip: Swtpm) -> None:
    with chip.open() as tpm:
        for _ in range(2):
            tpm.evict(A)
        enroll(tpm, A, Secret(b"payload"))
        tpm._evict_object(A, None)
        tpm.evict(A)
        assert tpm.facts().taken == ()


def test_the_index_that_esys_is_told_is_the_one_it_reads(chip: Swtpm) -> None:
    with chip.open() as tpm:
        enroll(tpm, A, Secret(b"payload"))
        assert tpm._public(A.nv, "")[1] == public_area.nv_public(A, written=True)


def test_esys_forgets_what_it_knew_of_a_handle(chip: Swtpm) -> None:
    """libtss2 returns the ESYS_TR that it has for a handle, with the public area of then."""
    with chip.open() as tpm, chip.open() as other:
        enroll(tpm, A, Secret(b"payload"))
        tpm.read_record(A)
        before = tpm._public(SRK, "")[1], tpm._public(A.object, "")[1]
        other.evict(A)
        other.seal(A, (b"1" * 32,), Secret(b"another"))
        short = other._unmarshal("TPM2B_NV_PUBLIC", struct.pack(">IHIHH", A.nv, 0xB, 0x02060002, 0, 64))
        auth, index = other._ffi.new("TPM2B_AUTH *"), other._ffi.new("ESYS_TR *")
        other._send("NV_DefineSpace", 0x101, 0xFF, 0xFFF, 0xFFF, auth, short, index)
        assert tpm._public(SRK, "")[1] == before[0]
        assert tpm._public(A.object, "")[1] != before[1]
        assert tpm._public(A.nv, "")[1][-2:] == b"\0\x40"


@pytest.mark.usefixtures("unmeasured")
def test_loading_brings_only_what_boot_uses() -> None:
    code = (
        "import sys; sys.path[:0] = sys.argv[1:]; from unlock.tpm import chip, slots; chip._load();print(*sys.modules)"
    )
    banned = "tpm2_pytss logging argparse asyncio subprocess dataclasses inspect importlib.metadata cryptography"
    done = subprocess.run(
        [sys.executable, "-I", "-c", code, str(Path(__file__).parents[1])],
        capture_output=True,
        text=True,
        check=True,
    )
    assert set(done.stdout.split()).isdisjoint(banned.split())


FORKS = """
    import sys, threading
    from pathlib import Path
    from tests.killing import child
    from tests.tpmfixture import Swtpm

    def use() -> None:
        with chip.open() as tpm:
            tpm.read_pcrs([0])

    with Swtpm(Path(sys.argv[1])) as chip:
        for _ in range(3):
            use()
            assert child(use) == 0
"""


def test_a_fork_while_a_line_to_the_tpm_is_being_closed_does_not_keep_it_open(tmp_path: Path) -> None:
    """A child that did would wait for itself: every close(2) takes 5 ms here."""
    slow = ["strace", "-f", "-qq", "-o", "/dev/null", "-e", "trace=close", "-e", "inject=close:delay_enter=5000"]
    subprocess.run([*slow, sys.executable, "-c", dedent(FORKS), tmp_path / "tpm"], check=True, timeout=60)
