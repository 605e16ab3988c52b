# SPDX-License-Identifier: Apache-2.0
"""The slot pair: what a boot sends, what it believes, and a cut at every TPM command."""

import contextlib
import os
import random
import shutil
from collections import Counter
from collections.abc import Callable, Iterator
from hashlib import sha256
from pathlib import Path

import pytest

from tests.tpmfixture import Swtpm
from unlock.boot import agent
from unlock.errors import (
    Malformed,
    NewerFormat,
    NoSlot,
    Refused,
    Tampered,
    TpmFailed,
    TpmLockout,
    TpmRefused,
    UnlockError,
)
from unlock.host import report, this_boot
from unlock.paths import Paths
from unlock.secret import Secret
from unlock.tpm import pcr_policy, slots
from unlock.tpm.chip import Tpm
from unlock.tpm.record import SLOTS, A, B, Needs, Payload, Record

HOST = b"h" * 16
SELECTION = pcr_policy.select([4, 7, 9])
NOW = (pcr_policy.branch(SELECTION, {4: bytes(32), 7: bytes(32), 9: bytes(32)}),)
LATER = (b"later".ljust(32),)
BOOT = [
    "NV_Read",
    "NV_Read",
    "ReadPublic",
    "ReadPublic",
    "StartAuthSession",
    "PolicyPCR",
    "PolicyOR",
    "Unseal",
    "PCR_Extend",
]


@pytest.fixture
def chip(tmp_path: Path) -> Iterator[Swtpm]:
    with Swtpm(tmp_path / "tpm") as chip:
        yield chip


def payload(number: int) -> Payload:
    return Payload(Secret(bytes([number]) * 32))


def persist(
    tpm: Tpm, number: int, branches: tuple[bytes, ...] = NOW, host: bytes = HOST, *, replace: bool = False
) -> Record:
    return slots.seal_slot(tpm, host, SELECTION, branches, payload(number), replace=replace)


def found(tpm: Tpm) -> int:
    """The number of the payload that a boot gets."""
    return bytes(slots.unseal(tpm).payload.key)[0]


def complete(tpm: Tpm) -> str:
    return "".join(slot.name for slot in SLOTS if tpm.slot_state(slot).complete)


def two_complete(tpm: Tpm, older: int, newer: int, newer_branches: tuple[bytes, ...] = NOW) -> None:
    """The older in A, the newer in B: the state before the last step of `persist`."""
    persist(tpm, older)
    record = tpm.read_record(A)
    with payload(newer).encode() as sealed:
        name = tpm.seal(B, newer_branches, sealed)
    tpm.write_record(B, record._replace(generation=record.generation + 1, branches=newer_branches, object_name=name))


def test_a_boot_sends_nine_commands_in_either_slot(chip: Swtpm) -> None:
    with chip.open() as tpm:
        for slot in ("A", "B", "A"):
            persist(tpm, 1)
            assert complete(tpm) == slot
    for _ in range(2):
        chip.power_cycle()
        with chip.open() as tpm:
            chip.proxy.clear()
            assert slots.unseal(tpm).payload == payload(1)
            tpm.extend(pcr_policy.CAP_PCR, pcr_policy.CAP_DIGEST)
            assert chip.proxy.commands == BOOT
            with pytest.raises(TpmRefused):
                slots.unseal(tpm)


def test_two_slots_newest_first(chip: Swtpm) -> None:
    with chip.open() as tpm:
        two_complete(tpm, 1, 2)
        chip.proxy.clear()
        assert found(tpm) == 2
        assert len(chip.proxy.commands) == 8


def test_the_other_slot_when_the_newest_is_refused(chip: Swtpm) -> None:
    with chip.open() as tpm:
        two_complete(tpm, 1, 2, LATER)
        chip.proxy.clear()
        assert found(tpm) == 1
        assert len(chip.proxy.commands) == 14  # and the extend: 15


def test_the_most_telling_reason(chip: Swtpm) -> None:
    with chip.open() as tpm:
        with pytest.raises(NoSlot):
            slots.unseal(tpm)
        two_complete(tpm, 1, 2)
        tpm._evict_object(A, None)
        tpm.extend(9, bytes(32))
        with pytest.raises(TpmRefused):  # A: no object
            slots.unseal(tpm)
        tpm._evict_object(B, None)
        with pytest.raises(NoSlot):
            slots.unseal(tpm)
        tpm.seal(A, NOW, Secret(b"another"))
        with pytest.raises(Tampered):
            slots.unseal(tpm)
        chip.proxy.clear()
        chip.proxy.answer("ReadPublic", 0x101)
        with pytest.raises(TpmFailed):
            slots.unseal(tpm)
        assert len(chip.proxy.commands) == 3


def test_an_old_record_replayed(chip: Swtpm) -> None:
    """The attacker kept the old record and raises its generation; the object that it names is gone."""
    with chip.open() as tpm:
        old = persist(tpm, 1)
        persist(tpm, 2)
        for record in (old, old._replace(generation=1 << 63)):
            tpm.write_record(A, record)
            assert found(tpm) == 2
            tpm.seal(A, NOW, Secret(b"attacker"))
            assert found(tpm) == 2
        assert complete(tpm) == "B"
        persist(tpm, 3)
        assert found(tpm) == 3 and complete(tpm) == "A"


def test_an_old_policy_would_open_again_if_it_were_not_evicted(chip: Swtpm, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Tpm, "evict", lambda *_: None)
    with chip.open() as tpm:
        old = persist(tpm, 1)
        persist(tpm, 2, LATER)
        with pytest.raises(TpmRefused):
            record = tpm.read_record(B)
            tpm.unseal(tpm.verify(B, record), record)
        tpm.write_record(A, old._replace(generation=1 << 63))
        assert found(tpm) == 1


def test_a_foreign_payload_in_the_newest_slot(chip: Swtpm) -> None:
    with chip.open() as tpm:
        persist(tpm, 1)
        record = tpm.read_record(A)
        name = tpm.seal(B, NOW, Secret(b"not a payload"))
        tpm.write_record(B, record._replace(generation=9, object_name=name))
        assert found(tpm) == 1


def test_what_the_record_says_of_the_root_is_what_is_sealed(chip: Swtpm) -> None:
    """The TPM's owner can write the record, and mend its checksum."""
    with chip.open() as tpm:
        needs = Needs.of(["root"])
        record = slots.seal_slot(tpm, HOST, SELECTION, NOW, payload(1)._replace(needs=needs))
        assert slots.read_needs(tpm) == slots.unseal(tpm).payload.needs == needs
        for changed in Needs(), Needs.of(["root", "more"]), Needs.of(map(str, range(13))):
            tpm.write_record(A, record._replace(needs=changed))
            assert slots.read_needs(tpm) == changed, "where the TPM refuses, nothing authenticates it"
            with pytest.raises(Tampered, match="another root file system"):
                slots.unseal(tpm)
        slots.evict_all(tpm)
        assert not slots.read_needs(tpm)


def test_damage_costs_only_its_slot(chip: Swtpm) -> None:
    class Damaged:
        def encode(self) -> bytes:
            return bytes(448)

    with chip.open() as tpm:
        two_complete(tpm, 1, 2)
        tpm.write_record(B, Damaged())  # type: ignore[arg-type]
        assert found(tpm) == 1
        tpm.write_record(A, Damaged())  # type: ignore[arg-type]
        with pytest.raises(Malformed):
            slots.unseal(tpm)
        persist(tpm, 3)
        assert found(tpm) == 3 and len(complete(tpm)) == 1


def test_a_newer_format_is_never_overwritten(chip: Swtpm) -> None:
    class Newer:
        def encode(self) -> bytes:
            body = b"unlock\0\x03".ljust(416, b"\xff")
            return body + sha256(body).digest()

    with chip.open() as tpm:
        persist(tpm, 1)
        tpm.write_record(B, Newer())  # type: ignore[arg-type]
        with pytest.raises(NewerFormat):
            persist(tpm, 2)
        assert found(tpm) == 1


def test_another_hosts_key_is_replaced_only_by_name(chip: Swtpm) -> None:
    with chip.open() as tpm:
        persist(tpm, 1, host=b"o" * 16)
        with pytest.raises(Refused) as caught:
            persist(tpm, 2)
        assert caught.value.hint == "unlock rebind --accept slots-in-use"
        assert found(tpm) == 1
        persist(tpm, 2, replace=True)
        assert found(tpm) == 2 and len(complete(tpm)) == 1


def test_remove_twice(chip: Swtpm) -> None:
    with chip.open() as tpm:
        two_complete(tpm, 1, 2)
        for _ in range(2):
            slots.evict_all(tpm)
            assert tpm.facts().taken == ()
        with pytest.raises(NoSlot):
            slots.unseal(tpm)
        persist(tpm, 3)
        assert found(tpm) == 3


def test_the_owner_authorization_is_used_and_needed(chip: Swtpm) -> None:
    auth = Secret(b"owner")
    chip.set_owner_auth(auth)
    with chip.open() as tpm:
        for number in (1, 2):
            slots.seal_slot(tpm, HOST, SELECTION, NOW, payload(number), owner_auth=auth)
            assert found(tpm) == number
        with pytest.raises(TpmFailed):
            persist(tpm, 3)
        assert found(tpm) == 2
        slots.evict_all(tpm, auth)


def test_a_slot_that_does_not_read_back_costs_nothing(chip: Swtpm) -> None:
    with chip.open() as tpm:
        persist(tpm, 1)

        def lie(command: str, answer: bytes) -> bytes:
            written = "NV_Write" in chip.proxy.commands
            return answer[:40] + b"X" + answer[41:] if command == "NV_Read" and written else answer

        chip.proxy.clear()
        chip.proxy.tamper = lie
        with pytest.raises(TpmFailed):
            persist(tpm, 2)
        chip.proxy.tamper = lambda _command, answer: answer
        assert complete(tpm) == "AB"
        persist(tpm, 3)
        assert found(tpm) == 3 and len(complete(tpm)) == 1


# A failure that passes -----------------------------------------------------------------------------------------


NOWHERE = "swtpm:host=127.0.0.1,port=1"
BROKEN = 0
"""The line breaks before the TPM has the command; else the TPM's own answer."""
TRANSIENT = [BROKEN, 0x909, 0x903, 0x902, 0x901, 0x923, 0x904, 0x905, 0x906, 0x910, 0x918]


def fail(chip: Swtpm, command: str, code: int) -> None:
    chip.proxy.answer(command, code) if code else chip.proxy.break_at(command)


@pytest.fixture
def at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(slots, "PAUSES", (0, 0, 0))


@pytest.mark.parametrize("code", TRANSIENT, ids=hex)
@pytest.mark.usefixtures("at_once")
def test_a_failure_that_passes_at_any_command_of_the_unseal_is_not_final(chip: Swtpm, code: int) -> None:
    with chip.open() as tpm:
        persist(tpm, 1)
    for command in dict.fromkeys(BOOT[:-1]):
        for times in (1, 3 if code else 2):  # no resource manager here: the sessions of a broken line are left
            chip.power_cycle()
            failures: list[UnlockError] = []
            with chip.open() as tpm:
                for _ in range(times):
                    fail(chip, command, code)
                assert slots.unseal(tpm, again=failures.append).payload == payload(1)
                assert len(failures) == times and all(command in str(each) for each in failures)
                tpm.extend(pcr_policy.CAP_PCR, pcr_policy.CAP_DIGEST)
                with pytest.raises(TpmRefused):
                    slots.unseal(tpm)
            for first in (0x02000000, 0x03000000, 0x80000000):
                assert not code or chip.handles(first) == ()


@pytest.mark.parametrize("command", dict.fromkeys(BOOT[:-1]))
@pytest.mark.usefixtures("at_once")
def test_an_answer_that_is_lost_at_any_command_is_asked_for_again(chip: Swtpm, command: str) -> None:
    with chip.open() as tpm:
        persist(tpm, 1)
        chip.proxy.lose(command)
        assert found(tpm) == 1


@pytest.mark.usefixtures("at_once")
def test_a_failure_that_does_not_pass_is_told_after_four_tries_and_the_tpm_can_still_be_locked(chip: Swtpm) -> None:
    with chip.open() as tpm:
        persist(tpm, 1)
        for _ in range(4):
            chip.proxy.answer("NV_Read", 0x903)
        chip.proxy.clear()
        with pytest.raises(TpmFailed, match="no room for one more session"):
            slots.unseal(tpm)
        assert chip.proxy.commands == ["NV_Read"] * 4
        tpm.extend(pcr_policy.CAP_PCR, pcr_policy.CAP_DIGEST)


def test_a_tpm_that_is_away_for_a_moment_is_opened_again(chip: Swtpm) -> None:
    """With the pauses as they are."""
    failures: list[UnlockError] = []

    def comes_back(failure: UnlockError) -> None:
        failures.append(failure)
        tpm._name = NOWHERE if len(failures) == 1 else chip.tcti

    with chip.open() as tpm:
        persist(tpm, 1)
        chip.proxy.break_at("StartAuthSession")
        assert slots.unseal(tpm, again=comes_back).payload == payload(1)
    assert [each.code for each in failures] == ["tpm-failed", "no-tpm"]


@pytest.mark.parametrize("code", [0x101, 0x921, 0x907, 0x12F, 0x130, 0x14A, 0x98E, 0x99D, 0x1C4, 0x18B])
@pytest.mark.usefixtures("at_once")
def test_what_does_not_pass_is_not_asked_again(chip: Swtpm, code: int) -> None:
    """What speaks of the slot, of PCRs, of an authorization, and a TPM in failure mode."""
    with chip.open() as tpm:
        persist(tpm, 1)
        for command in dict.fromkeys(BOOT[:-1]):
            chip.proxy.answer(command, code)
            chip.proxy.clear()
            with contextlib.suppress(UnlockError):  # an NV_Read of the other slot says that it is empty
                slots.unseal(tpm, again=lambda failure: pytest.fail(str(failure)))
            assert all(chip.proxy.commands.count(each) <= 2 for each in BOOT)
            chip.proxy.forget_answers()


def test_a_slot_that_the_tpm_in_lockout_does_not_show_costs_only_itself(chip: Swtpm) -> None:
    with chip.open() as tpm:
        two_complete(tpm, 1, 2)
        chip.proxy.answer("NV_Read", 0x921)
        assert found(tpm) == 2
        slots.evict_all(tpm)
        chip.proxy.answer("NV_Read", 0x921)
        with pytest.raises(TpmLockout):  # the other one is empty
            slots.unseal(tpm)


@pytest.fixture
def early(chip: Swtpm, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Paths:
    """Early boot, whose only TPM is this one."""
    monkeypatch.setattr(this_boot, "list_tpms", lambda: ["tpmrm0"])
    monkeypatch.setattr(this_boot, "tcti", lambda _name: chip.tcti)
    with chip.open() as tpm:
        persist(tpm, 1)
    chip.power_cycle()
    paths = Paths(str(tmp_path / "root"))
    os.makedirs(paths.run)
    return paths


@pytest.mark.parametrize("command", ["", *dict.fromkeys(BOOT)])
@pytest.mark.usefixtures("at_once")
def test_the_agent_unseals_in_spite_of_it_locks_the_tpm_and_keeps_a_record(
    chip: Swtpm, early: Paths, monkeypatch: pytest.MonkeyPatch, command: str
) -> None:
    """Without a command it is the opening of the TPM that fails."""
    if command:
        chip.proxy.break_at(command)
    else:
        opened = iter((NOWHERE, chip.tcti))
        monkeypatch.setattr(this_boot, "tcti", lambda _name: next(opened))
    record = report.Report("early-boot", announce=lambda _line: None)
    meanwhile: list[None] = []
    key = agent.unseal_once(early, record, meanwhile=lambda: meanwhile.append(None))
    assert key and key.persistence == payload(1).key and record.verdict == "unsealed" and meanwhile
    again = [each.text for each in record.events if each.kind == "tpm-again"]
    events = [each.kind for each in record.events]
    if command == "PCR_Extend":  # initramfs/cap sends it again
        assert "not-capped" in events and not again
    else:
        assert "capped" in events and len(again) == 1 and command in again[0]


@pytest.mark.parametrize("accepted", [True, False])
@pytest.mark.usefixtures("at_once")
def test_the_agent_leaves_word_that_a_root_was_accepted_even_if_the_tpm_fails_after_that(
    chip: Swtpm, early: Paths, accepted: bool
) -> None:
    with chip.open() as tpm:
        slots.seal_slot(tpm, HOST, SELECTION, NOW, Payload(payload(1).key, accepted), replace=True)
    chip.power_cycle()
    chip.proxy.answer("PCR_Extend", 0x101)
    record = report.Report("early-boot")
    key = agent.unseal_once(early, record)
    assert record.verdict in ("unsealed", "unmeasured-input") and "not-capped" in [each.kind for each in record.events]
    assert os.path.exists(early.of_this_boot("accepted-root")) is bool(key and accepted)
    assert key or not accepted


def test_the_agent_in_failure_mode_does_not_ask_again_and_says_so(chip: Swtpm, early: Paths) -> None:
    for command in BOOT:
        chip.proxy.answer(command, 0x101)
    record = report.Report("early-boot")
    assert agent.unseal_once(early, record) is None
    assert record.verdict == "tpm-failed" and "the TPM is in failure mode" in record.detail
    assert [each.kind for each in record.events] == ["tpm", "key", "not-capped"]


# A cut at every command -------------------------------------------------------------------------------------


def nothing(_tpm: Tpm) -> None:
    pass


def in_a(tpm: Tpm) -> None:
    persist(tpm, 1)


def in_b(tpm: Tpm) -> None:
    persist(tpm, 9)
    persist(tpm, 1)


def half_done(tpm: Tpm) -> None:
    """A change that was cut before its eviction: the newest counts."""
    two_complete(tpm, 9, 1)


@pytest.mark.turns
@pytest.mark.parametrize("power", [False, True], ids=["killed", "power-cut"])
@pytest.mark.parametrize("start", [nothing, in_a, in_b, half_done])
def test_a_cut_after_every_command(tmp_path: Path, start: Callable[[Tpm], None], power: bool) -> None:
    with Swtpm(tmp_path / "start") as chip, chip.open() as tpm:
        start(tpm)
    shutil.copytree(tmp_path / "start", tmp_path / "whole")
    with Swtpm(tmp_path / "whole") as chip, chip.open() as tpm:
        chip.proxy.clear()
        persist(tpm, 2)
        total = len(chip.proxy.commands)
    assert total >= 15

    outcomes = []
    for count in range(total + 1):
        state = tmp_path / f"cut{count}"
        shutil.copytree(tmp_path / "start", state)
        with Swtpm(state) as chip:
            outcomes.append(cut(chip, count, power, first=start is nothing))
        shutil.rmtree(state)
    assert outcomes == sorted(outcomes), "the new payload, once seen, stays"
    assert outcomes[-1] == 2


def cut(chip: Swtpm, count: int, power: bool, first: bool) -> int:
    """Lose the line after `count` commands; what a boot gets then, 0 for nothing. Another run must finish."""
    with chip.open() as tpm:
        chip.proxy.cut_after(count)
        with pytest.raises(UnlockError):
            persist(tpm, 2)
            raise NoSlot("the last command was done: nothing left to cut")
        assert len(chip.proxy.commands) == count
    if power:
        chip.power_cycle()
    chip.proxy.restore()
    with chip.open() as tpm:
        outcome = boot(tpm, first)
        persist(tpm, 3)
        assert found(tpm) == 3
        assert len(complete(tpm)) == 1 and len(tpm.facts().taken) == 2
    return outcome


def boot(tpm: Tpm, first: bool) -> int:
    try:
        return found(tpm)
    except (NoSlot, Tampered):
        assert first, "the old payload is lost"
        return 0


def test_a_change_of_policy_cut_after_every_command(
    tmp_path: Path, record_property: Callable[[str, object], None]
) -> None:
    """The new policy is for another boot: the old opens until it is evicted, then the PCRs are the reason."""
    with Swtpm(tmp_path / "start") as chip, chip.open() as tpm:
        persist(tpm, 1)
    reasons = []
    for count in range(1, 26):
        state = tmp_path / f"cut{count}"
        shutil.copytree(tmp_path / "start", state)
        with Swtpm(state) as chip:
            with chip.open() as tpm:
                chip.proxy.cut_after(count)
                with pytest.raises(UnlockError):
                    persist(tpm, 2, LATER)
                    raise NoSlot("nothing left to cut")
            chip.proxy.restore()
            with chip.open() as tpm:
                chip.proxy.clear()
                try:
                    reasons.append(str(found(tpm)))
                except UnlockError as error:
                    reasons.append(error.code)
                assert len(chip.proxy.commands) <= 14
                persist(tpm, 2, LATER)
                assert len(complete(tpm)) == 1
        shutil.rmtree(state)
    record_property("shown", f"change of policy: cut after each of {len(reasons)} TPM commands; {Counter(reasons)}")
    assert reasons == sorted(reasons)
    assert set(reasons) == {"1", "pcr-mismatch"}


@pytest.mark.parametrize("seed", range(3))
def test_cut_again_and_again(chip: Swtpm, seed: int) -> None:
    """Each attempt is cut at a random command, after which the host boots with what it finds."""
    chance = random.Random(seed)
    with chip.open() as tpm:
        persist(tpm, 1)
    last = 1
    for number in range(2, 22):
        with chip.open() as tpm:
            chip.proxy.cut_after(chance.randint(1, 24))
            try:
                persist(tpm, number)
                done = True
            except UnlockError:
                done = False
        chip.power_cycle()
        with chip.open() as tpm:
            now = found(tpm)
        assert now in (last, number) and (now == number or not done)
        last = now
    with chip.open() as tpm:
        persist(tpm, 99)
        assert found(tpm) == 99 and len(complete(tpm)) == 1 and len(tpm.facts().taken) == 2


def test_remove_cut_after_every_command(tmp_path: Path) -> None:
    with Swtpm(tmp_path / "start") as chip, chip.open() as tpm:
        two_complete(tpm, 1, 2)
    for count in range(9):
        state = tmp_path / f"cut{count}"
        shutil.copytree(tmp_path / "start", state)
        with Swtpm(state) as chip:
            with chip.open() as tpm:
                chip.proxy.cut_after(count)
                with pytest.raises(UnlockError):
                    slots.evict_all(tpm)
                    raise NoSlot("nothing left to cut")
            chip.proxy.restore()
            with chip.open() as tpm:
                slots.evict_all(tpm)
                assert tpm.facts().taken == ()
        shutil.rmtree(state)
