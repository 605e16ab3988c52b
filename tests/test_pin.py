# SPDX-License-Identifier: Apache-2.0
"""The PIN: what the TPM is asked and how often, wrong ones, lockout, and that every change of the policy keeps it."""

import gzip
import json
import os
import shutil
import signal
import struct
import subprocess
import threading
import time
from collections.abc import Callable, Iterator
from functools import partial
from hashlib import sha256
from pathlib import Path

import pytest

from tests.eventlogs import Boot
from tests.hostfixture import Machine
from tests.killing import Killer, killed_at
from tests.tpmfixture import Swtpm
from unlock import initramfs
from unlock.boot import agent
from unlock.errors import (
    Malformed,
    NewerFormat,
    PinLockout,
    PinWrong,
    Refused,
    Tampered,
    TpmFailed,
    TpmRefused,
    UnlockError,
    Usage,
)
from unlock.host import keyring, report
from unlock.measured import causes, diagnosis, evidence, explain
from unlock.operations import baseline, cache, check, policy, predict, rebind, status
from unlock.predict import allowed_states, initramfs_images
from unlock.predict.allowed_states import Pin
from unlock.predict.boot_tree import BootTree
from unlock.secret import Secret
from unlock.tpm import pcr_policy, public_area, slots
from unlock.tpm.chip import Tpm
from unlock.tpm.record import SLOTS, SRK, A, B, Payload, Record

pytestmark = pytest.mark.usefixtures("key_cache")

TOP = Path(__file__).parents[1]
HOST = b"h" * 16
SELECTION = pcr_policy.select([4, 7, 9])
NOW = (pcr_policy.branch(SELECTION, {4: bytes(32), 7: bytes(32), 9: bytes(32)}),)
PIN = "tulip 4711"
OLD = Boot("direct")
NEW = Boot("direct", kernel="another")
BOOT = [
    "NV_Read", "NV_Read", "ReadPublic", "ReadPublic", "PCR_Read",
    "StartAuthSession", "PolicyPCR", "PolicyOR", "PolicyAuthValue", "Unseal", "Unseal", "PCR_Extend",
]  # fmt: skip
"""Since power on, the first command that the TPM would count is sent twice: it notes first that it counts."""
VERSION_1 = bytes.fromhex("756e6c6f636b00010000000000000007" + "68" * 16 + "0f02908200000000")


@pytest.fixture
def chip(tmp_path: Path) -> Iterator[Swtpm]:
    with Swtpm(tmp_path / "tpm") as chip:
        chip.set_lockout(32)
        yield chip


@pytest.fixture
def host(tmp_path: Path) -> Iterator[Machine]:
    machine = Machine(tmp_path, OLD)
    yield machine
    machine.close()


class Person:
    """Types these, one after the other; then Enter alone."""

    def __init__(self, *types: str) -> None:
        self.types = list(types)
        self.left: list[int] = []

    def __call__(self, left: int) -> Secret:
        self.left.append(left)
        if not self.types:
            raise PinWrong("no PIN was typed")
        return Secret(self.types.pop(0).encode())


def persist(chip: Swtpm, pin: str = PIN, number: int = ord("k")) -> Record:
    auth = pcr_policy.pin_auth(HOST, Secret(pin.encode())) if pin else None
    with chip.open() as tpm:
        return slots.seal_slot(tpm, HOST, SELECTION, NOW, Payload(Secret(bytes([number]) * 32)), pin_auth=auth)


def set_pin(host: Machine, pin: str | None = PIN) -> allowed_states.Allowed:
    chosen = Pin(Secret(pin.encode()) if pin is not None else None)
    return policy.set_policy(host.paths, pin=chosen, tcti=host.chip.tcti)


# The TPM ----------------------------------------------------------------------------------------------------


def test_a_boot_with_the_right_pin_sends_twelve_commands_in_either_slot(chip: Swtpm) -> None:
    for _ in range(2):
        persist(chip)
        chip.power_cycle()
        with chip.open() as tpm:
            chip.proxy.clear()
            found = slots.unseal(tpm, Person(PIN))
            tpm.extend(pcr_policy.CAP_PCR, pcr_policy.CAP_DIGEST)
            assert chip.proxy.commands == BOOT
            assert found.payload.key == Secret(b"k" * 32)
            assert found.pin_auth == pcr_policy.pin_auth(HOST, Secret(PIN.encode()))
        for first in (0x02000000, 0x03000000):
            assert chip.handles(first) == ()


@pytest.mark.parametrize(("pcrs", "sent"), [((4, 7, 9), 14), (tuple(range(16)), 15)])
def test_at_most_fifteen_when_the_other_slot_must_be_tried(chip: Swtpm, pcrs: tuple[int, ...], sent: int) -> None:
    selection, auth = pcr_policy.select(pcrs), pcr_policy.pin_auth(HOST, Secret(PIN.encode()))
    with chip.open() as tpm, Payload(Secret(b"x" * 32)).encode() as sealed:
        branches = (pcr_policy.branch(selection, tpm.read_pcrs(selection)),)
        record = slots.seal_slot(tpm, HOST, selection, branches, Payload(Secret(b"k" * 32)), pin_auth=auth)
        name = tpm.seal(B, (b"later".ljust(32),), sealed, pin_auth=auth)
        tpm.write_record(B, record._replace(generation=9, branches=(b"later".ljust(32),), object_name=name))
    chip.power_cycle()
    with chip.open() as tpm:
        chip.proxy.clear()
        person = Person(PIN)
        assert slots.unseal(tpm, person).slot is A
        tpm.extend(pcr_policy.CAP_PCR, pcr_policy.CAP_DIGEST)
        assert person.left == [3]
        assert len(chip.proxy.commands) == sent


def test_at_most_fifteen_when_the_newer_slot_has_no_pin_and_is_of_another_state(chip: Swtpm) -> None:
    """Killed while `policy set --pcrs --no-pin` evicted the old one, and booted in a state that the old one allows."""
    selection, auth = pcr_policy.select(range(16)), pcr_policy.pin_auth(HOST, Secret(PIN.encode()))
    with chip.open() as tpm, Payload(Secret(b"x" * 32)).encode() as sealed:
        branches = (pcr_policy.branch(selection, tpm.read_pcrs(selection)),)
        record = slots.seal_slot(tpm, HOST, selection, branches, Payload(Secret(b"k" * 32)), pin_auth=auth)
        name = tpm.seal(B, (b"later".ljust(32),), sealed)
        later = record._replace(generation=9, branches=(b"later".ljust(32),), object_name=name, pin=False)
        tpm.write_record(B, later)
    chip.power_cycle()
    with chip.open() as tpm:
        chip.proxy.clear()
        assert slots.unseal(tpm, Person(PIN)).slot is A
        tpm.extend(pcr_policy.CAP_PCR, pcr_policy.CAP_DIGEST)
        assert len(chip.proxy.commands) == 15


def test_what_is_typed_never_crosses_the_bus(chip: Swtpm) -> None:
    auth = bytes(pcr_policy.pin_auth(HOST, Secret(PIN.encode())))
    chip.proxy.clear()
    persist(chip)
    with chip.open() as tpm:
        slots.unseal(tpm, Person(PIN))
    assert "Create" in chip.proxy.commands and "Unseal" in chip.proxy.commands
    assert auth not in chip.proxy.traffic and PIN.encode() not in chip.proxy.traffic


def test_a_value_that_ends_in_zeros_is_one_like_any_other(chip: Swtpm) -> None:
    pins = (f"{number:04}" for number in range(10_000))
    pin = next(each for each in pins if bytes(pcr_policy.pin_auth(HOST, Secret(each.encode())))[-1] == 0)
    persist(chip, pin)
    with chip.open() as tpm:
        assert slots.unseal(tpm, Person(pin)).payload.key == Secret(b"k" * 32)


def test_wrong_once_then_right(chip: Swtpm) -> None:
    persist(chip)
    with chip.open() as tpm:
        person = Person("tulip 4712", PIN)
        chip.proxy.clear()
        slots.unseal(tpm, person)
        assert person.left == [3, 2]
        assert len(chip.proxy.commands) == len(BOOT) - 1 + 6
        assert tpm.facts().lockout_counter == 1


def test_three_tries_and_no_more_and_an_empty_line_ends_them(chip: Swtpm) -> None:
    persist(chip)
    with chip.open() as tpm:
        person = Person("wrong", "wrong again", "and again", PIN)
        with pytest.raises(PinWrong) as caught:
            slots.unseal(tpm, person)
        assert (caught.value.code, caught.value.status, person.types) == ("pin-wrong", 14, [PIN])
        assert tpm.facts().lockout_counter == 3
        with pytest.raises(PinWrong):
            slots.unseal(tpm, Person())
        with pytest.raises(PinWrong):
            slots.unseal(tpm)
        assert tpm.facts().lockout_counter == 3
        chip.proxy.clear()
        with pytest.raises(PinWrong):
            slots.unseal(tpm, Person("abc", "x" * 257, ""))  # no PIN is like that: the TPM need not count it
        assert "Unseal" not in chip.proxy.commands
        for first in (0x02000000, 0x03000000):
            assert tpm._handles(first) == ()


def test_a_right_pin_takes_no_wrong_one_back_and_a_power_cut_after_it_counts(chip: Swtpm) -> None:
    """As the manual says of it."""
    persist(chip)
    for counted, pins in ((0, ("wrong", PIN)), (2, (PIN,)), (3, ())):
        with chip.open() as tpm:
            assert tpm.facts().lockout_counter == counted
            if pins:
                slots.unseal(tpm, Person(*pins))
        chip.power_cycle()


def test_a_tpm_that_is_locked_out_says_for_how_long(chip: Swtpm) -> None:
    persist(chip)
    chip.set_lockout(2, 1234)
    with chip.open() as tpm:
        person = Person("wrong", "wrong", PIN)
        with pytest.raises(PinLockout, match="1234 s") as caught:
            slots.unseal(tpm, person)
        assert (caught.value.code, caught.value.status) == ("pin-lockout", 15)
        with pytest.raises(PinLockout):
            slots.unseal(tpm, Person(PIN))
    chip.set_lockout(32)
    with chip.open() as tpm:
        slots.unseal(tpm, Person(PIN))


def test_a_boot_that_is_not_allowed_asks_nobody_and_costs_no_try(chip: Swtpm) -> None:
    persist(chip)
    chip.extend(9)
    with chip.open() as tpm:
        person = Person(PIN)
        with pytest.raises(TpmRefused):
            slots.unseal(tpm, person)
        assert person.left == [] and tpm.facts().lockout_counter == 0


def test_a_pcr_that_changes_while_somebody_types(chip: Swtpm) -> None:
    """One of the policy: refused, and no try is spent. Another one: it opens."""
    persist(chip)

    def types_when(pcr: int) -> Callable[[int], Secret]:
        def typed(_left: int) -> Secret:
            chip.extend(pcr)
            return Secret(PIN.encode())

        return typed

    with chip.open() as tpm:
        slots.unseal(tpm, types_when(10))
        with pytest.raises(TpmRefused):
            slots.unseal(tpm, types_when(9))
        assert tpm.facts().lockout_counter == 0


@pytest.fixture
def at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(slots, "PAUSES", (0, 0, 0))


@pytest.mark.parametrize("command", dict.fromkeys(BOOT[:-1]))
@pytest.mark.parametrize("code", [0x903, 0x909, 0])
@pytest.mark.usefixtures("at_once")
def test_a_failure_that_passes_asks_nobody_twice_and_counts_no_try(chip: Swtpm, command: str, code: int) -> None:
    """But for a line that breaks at the Unseal: whether the TPM has counted is not known."""
    persist(chip)
    for pins in ((PIN,), ("wrong", PIN)):
        with chip.open() as tpm:
            before = tpm.facts().lockout_counter
            chip.proxy.answer(command, code) if code else chip.proxy.break_at(command)
            anew = command == "Unseal" and not code
            person = Person(*pins[:1], *pins) if anew else Person(*pins)
            slots.unseal(tpm, person)
            assert person.types == [] and person.left == [3] * anew + [3, 2][: len(pins)]
            assert tpm.facts().lockout_counter == before + len(pins) - 1


@pytest.mark.usefixtures("at_once")
def test_a_pin_whose_answer_was_lost_is_not_sent_twice(chip: Swtpm) -> None:
    """The TPM has counted it: each time that somebody types is one try of the TPM's, at most."""
    persist(chip)
    with chip.open() as tpm:
        tpm.facts()
        slots.unseal(tpm, Person(PIN))  # from now on the TPM counts without TPM_RC_RETRY
        chip.proxy.lose("Unseal")
        person = Person("wrong", "wrong again", PIN)
        slots.unseal(tpm, person)
        assert person.left == [3, 3, 2] and tpm.facts().lockout_counter == 2


@pytest.mark.usefixtures("at_once")
def test_wrong_pins_before_a_failure_stay_counted(chip: Swtpm) -> None:
    persist(chip)
    with chip.open() as tpm:
        tpm.facts()
        person = Person("wrong", "wrong again", "and again", PIN)

        def types(left: int) -> Secret:
            if left == 1:
                chip.proxy.answer("StartAuthSession", 0x903)
            return person(left)

        with pytest.raises(PinWrong):
            slots.unseal(tpm, types)
        assert person.left == [3, 2, 1] and person.types == [PIN]
        assert tpm.facts().lockout_counter == 3


def test_after_the_cap_the_right_pin_opens_nothing(chip: Swtpm) -> None:
    persist(chip)
    with chip.open() as tpm:
        record = tpm.read_record(A)
        tpm.extend(pcr_policy.CAP_PCR, pcr_policy.CAP_DIGEST)
        person = Person(PIN)
        with pytest.raises(TpmRefused):
            slots.unseal(tpm, person)
        assert person.left == []
        with pytest.raises(TpmRefused):
            tpm.unseal(tpm.verify(A, record), record, pcr_policy.pin_auth(HOST, Secret(PIN.encode())))


# An attacker who may write with the owner's authorization, which is empty -----------------------------------


def test_a_record_whose_flag_was_taken_away_or_given_is_not_the_objects(chip: Swtpm) -> None:
    for pin in (PIN, ""):
        record = persist(chip, pin)
        with chip.open() as tpm:
            slot = next(each for each in SLOTS if tpm.slot_state(each).complete)
            tpm.write_record(slot, record._replace(pin=not pin))
            person = Person(PIN)
            with pytest.raises(Tampered, match="another policy"):
                slots.unseal(tpm, person)
            assert person.left == [] and tpm.facts().lockout_counter == 0
            slots.evict_all(tpm)


def test_the_policy_of_an_object_is_with_the_pin_or_without() -> None:
    plain, asked = (public_area.sealed_template(NOW, pin) for pin in (False, True))
    assert pcr_policy.auth_policy(NOW, True) == sha256(pcr_policy.policy_or(NOW) + struct.pack(">I", 0x16B)).digest()
    attributes = [struct.unpack_from(">I", each, 4)[0] for each in (plain, asked)]
    assert attributes == [0x412, 0x12]  # fixedTPM, fixedParent; noDA without a PIN alone; userWithAuth never
    for template, pin in ((plain, False), (asked, True)):
        public = template[:-2] + struct.pack(">H", 32) + bytes(32)
        assert public_area.is_sealed_under(public, NOW, pin)
        assert not public_area.is_sealed_under(public, NOW, not pin)


def test_a_thief_in_another_system_tries_all_short_pins_unless_the_lockout_has_a_password(chip: Swtpm) -> None:
    """As the manual says: any TPM answers whether a value is an object's, in any state, and only counts."""

    def tries(tpm: Tpm, pin: int) -> int:
        srk, sealed = (tpm._public(handle, "")[0] for handle in (SRK, A.object))
        tpm._set_auth(sealed, pcr_policy.pin_auth(HOST, Secret(f"{pin:04}".encode())))
        out, new = tpm._ffi.new("TPM2B_PRIVATE **"), tpm._ffi.new("TPM2B_AUTH *")
        return int(tpm._lib.Esys_ObjectChangeAuth(tpm._context[0], sealed, srk, 0xFF, 0xFFF, 0xFFF, new, out)) & 0xFBF

    persist(chip, "0009")
    chip.set_lockout(2)
    chip.extend(9)
    wrong, locked = 0x98E & 0xFBF, 0x921
    with chip.open() as tpm:
        answers = []
        for pin in range(10):
            answers.append(tries(tpm, pin))
            tpm._send("DictionaryAttackLockReset", 0x10A, 0xFF, 0xFFF, 0xFFF)
        assert answers == [wrong] * 9 + [0]
    chip.set_lockout_auth(Secret(b"only the owner knows"))
    with chip.open() as tpm:
        assert [tries(tpm, 0), tries(tpm, 1), tries(tpm, 9)] == [wrong, wrong, locked & 0xFBF]
        with pytest.raises(TpmFailed):
            tpm._send("DictionaryAttackLockReset", 0x10A, 0xFF, 0xFFF, 0xFFF)


def summed(body: bytes) -> bytes:
    return body[:416] + sha256(body[:416]).digest()


def test_records_of_both_versions() -> None:
    names = struct.pack(">H", 0xB) + b"s" * 32, struct.pack(">H", 0xB) + b"o" * 32
    old = summed((VERSION_1 + b"".join(names) + b"1" * 32 + b"2" * 32).ljust(416, b"\0"))
    record = Record.decode(old)
    assert not record.pin and record.version == 1 and record.encode() == old
    new = record._replace(pin=True).encode()
    assert new[7] == 2 and new[37] == 1 and new[:7] == old[:7] and new[8:37] == old[8:37] and new[38:416] == old[38:416]
    assert Record.decode(new) == record._replace(pin=True)
    for at, value, kind in (
        (37, 0, "malformed"),  # version 2 without a PIN is never written
        (37, 2, "newer-format"),
        (37, 3, "newer-format"),
        (37, 0x81, "newer-format"),
        (38, 13, "malformed"),  # more needs than there is room for
        (7, 1, "malformed"),  # version 1 with a flag
        (7, 3, "newer-format"),
    ):
        with pytest.raises(Malformed) as caught:
            Record.decode(summed(new[:at] + bytes([value]) + new[at + 1 :]))
        assert caught.value.code == kind, (at, value)
    with pytest.raises(NewerFormat):
        Record.decode(summed(new[:37] + b"\x80" + new[38:]))


@pytest.mark.parametrize("pin", ["", "123", "x" * 257])
def test_a_pin_that_is_too_short_or_too_long(pin: str) -> None:
    with pytest.raises(Usage):
        pcr_policy.pin_auth(HOST, Secret(pin.encode()))


def test_the_value_is_of_this_host_and_this_pin() -> None:
    value = bytes(pcr_policy.pin_auth(HOST, Secret("grüße".encode())))
    assert value == sha256(b"unlock PIN\0" + HOST + "grüße".encode()).digest()
    assert value != bytes(pcr_policy.pin_auth(b"o" * 16, Secret("grüße".encode())))


# A cut at every command -------------------------------------------------------------------------------------


@pytest.mark.parametrize(("before", "after", "power"), [("", PIN, True), (PIN, "", False), (PIN, "another", True)])
def test_a_cut_after_every_command_leaves_the_old_or_the_new(
    tmp_path: Path, before: str, after: str, power: bool, record_property: Callable[[str, object], None]
) -> None:
    with Swtpm(tmp_path / "start") as chip:
        chip.set_lockout(32)
        persist(chip, before, 1)
    outcomes = []
    for count in range(1, 26):
        shutil.copytree(tmp_path / "start", tmp_path / "cut")
        with Swtpm(tmp_path / "cut") as chip:
            chip.proxy.cut_after(count)
            try:
                persist(chip, after, 2)
                raise AssertionError("nothing left to cut")
            except (AssertionError, UnlockError):
                pass
            if power:
                chip.power_cycle()
            chip.proxy.restore()
            with chip.open() as tpm:
                person = Person(*filter(None, (before, after)))
                outcome = bytes(slots.unseal(tpm, person).payload.key)[0]
                assert bool(person.left) == bool((before, after)[outcome - 1])
                outcomes.append(outcome)
            persist(chip, after, 2)
            with chip.open() as tpm:
                slots.unseal(tpm, Person(after) if after else slots.no_pin)
                assert len(tpm.facts().taken) == 2
        shutil.rmtree(tmp_path / "cut")
    assert outcomes == sorted(outcomes) and set(outcomes) == {1, 2}
    record_property("shown", f"PIN {bool(before)} -> {bool(after)}: cut after each of {len(outcomes)} TPM commands")


# A host -----------------------------------------------------------------------------------------------------


def test_set_and_asked_for_at_every_boot_until_it_is_taken_away(host: Machine) -> None:
    for _ in range(2):
        assert set_pin(host).record.pin
        assert host.reasons() == ["this boot"]
    shown = policy.show(host.paths, host.chip.tcti)
    assert shown["pin"] is True and "asks for it" in policy.table(shown)
    assert status.read_status(host.paths).pin and "asked for at every boot" in status.to_text(
        status.read_status(host.paths)
    )
    host.types = []
    assert host.boot() == "pin-wrong"
    host.types = ["wrong one", PIN]
    assert host.boot() == "unsealed" and host.asked == 2
    policy.good_boot(host.paths, host.chip.tcti)
    for _ in range(2):
        assert not set_pin(host, None).record.pin
        assert "unlock:pin-auth" not in keyring.names()
    assert policy.show(host.paths, host.chip.tcti)["pin"] is False
    assert not status.read_status(host.paths).pin
    assert host.boot() == "unsealed" and host.asked == 0


def test_another_pin_in_its_place(host: Machine) -> None:
    set_pin(host)
    set_pin(host, "another one")
    host.types = [PIN, "another one"]
    assert host.boot() == "unsealed" and host.asked == 2


def test_every_unattended_change_of_the_policy_keeps_it(host: Machine) -> None:
    set_pin(host)
    host.types = [PIN]
    assert host.boot() == "unsealed"
    host.predict(("kernel 2", NEW))
    assert host.boot(NEW) == "unsealed" and host.asked == 1
    policy.open_window(host.paths, 1, (), host.chip.tcti)
    assert host.allows().record.pin
    assert host.boot(Boot("direct", kernel="another", dbx=230)) == "unsealed" and host.asked == 1
    policy.good_boot(host.paths, host.chip.tcti)
    assert host.allows().record.pin and not host.allows().window
    policy.set_policy(host.paths, (7, 9), tcti=host.chip.tcti)
    assert host.allows().record.pin and host.allows().record.selection == (7, 9, 15)
    assert host.boot() == "unsealed" and host.asked == 1


def test_pcrs_and_a_pin_at_once(host: Machine) -> None:
    found = policy.set_policy(host.paths, (7, 9), Pin(Secret(PIN.encode())), host.chip.tcti)
    assert found.record.pin and found.record.selection == (7, 9, 15)
    policy.set_policy(host.paths, (7, 9), Pin(None), host.chip.tcti)
    assert not host.allows().record.pin


def test_without_what_it_makes_nothing_is_sealed_anew_and_the_pin_is_never_dropped(host: Machine) -> None:
    set_pin(host)
    keyring.forget("unlock:pin-auth")
    before = host.chip.proxy.commands[:]
    changes: tuple[Callable[[], object], ...] = (
        lambda: host.predict(("kernel 2", NEW)),
        lambda: policy.open_window(host.paths, 1, (), host.chip.tcti),
        lambda: policy.set_policy(host.paths, (7, 9), tcti=host.chip.tcti),
    )
    for change in changes:
        with pytest.raises(Refused) as caught:
            change()
        assert (caught.value.code, caught.value.hint) == ("pin-needed", "unlock policy set --pin")
    assert "EvictControl" not in host.chip.proxy.commands[len(before) :]
    host.predict()  # nothing changes: nothing is needed
    assert host.allows().record.pin
    set_pin(host)
    host.predict(("kernel 2", NEW))
    host.types = [PIN]
    assert host.boot(NEW) == "unsealed"


def test_a_power_cut_before_the_old_slot_went_leaves_no_way_around_the_pin(host: Machine) -> None:
    """The boot asks for the PIN, so the operator takes it for done; the owner could evict the newer slot."""
    assert killed_at(1, lambda: set_pin(host), [Tpm.evict])
    host.types = [PIN]
    assert host.boot() == "unsealed" and host.asked == 1
    policy.good_boot(host.paths, host.chip.tcti)
    with host.chip.open() as tpm:
        assert host.allows().record.pin
        chosen = host.allows().slot
        others = [slot for slot in SLOTS if slot != chosen and tpm.slot_state(slot).complete]
        assert not others, "what needs no PIN is still there"
        host.chip.proxy.clear()
        policy.good_boot(host.paths, host.chip.tcti)
        assert "EvictControl" not in host.chip.proxy.commands
        assert tpm.slot_state(chosen).complete


def test_a_pin_that_could_not_be_set_is_not_set_by_a_later_change(host: Machine) -> None:
    """The old one counts; nothing is sealed with another until somebody says which."""
    set_pin(host)
    host.chip.proxy.answer("EvictControl", 0x9A2)
    with pytest.raises(TpmFailed):
        set_pin(host, "another one")
    with pytest.raises(Refused) as caught:
        host.predict(("kernel 2", NEW))
    assert caught.value.code == "pin-needed"
    host.types = ["another one", PIN]
    assert host.boot() == "unsealed" and host.asked == 2
    host.predict(("kernel 2", NEW))
    host.types = [PIN]
    assert host.boot(NEW) == "unsealed"


def test_a_refused_boot_leaves_nothing_to_seal_with(host: Machine) -> None:
    set_pin(host)
    host.types = ["wrong"] * 3
    assert host.boot() == "pin-wrong" and host.asked == 3
    assert keyring.names() == []
    with pytest.raises(UnlockError) as caught:
        set_pin(host)
    assert caught.value.code == "no-key"


def test_an_edited_boot_is_explained_as_ever_and_asks_nobody(host: Machine) -> None:
    assert host.boot() == "unsealed"
    assert baseline.record_baseline(host.paths, host.chip.tcti)
    set_pin(host)
    host.types = [PIN]
    assert host.boot(Boot("direct", initrd="a thief's")) == "pcr-mismatch" and host.asked == 0
    assert diagnosis.diagnose(evidence.gather_evidence(host.paths, host.chip.tcti)).causes[0].code == "initrd"


def test_explain_names_a_wrong_pin_and_a_lockout(host: Machine) -> None:
    set_pin(host)
    host.types = ["wrong"] * 3
    host.boot()
    found = diagnosis.diagnose(evidence.gather_evidence(host.paths, host.chip.tcti))
    assert found.causes[0].code == "pin-wrong" and "rebind --pin" in found.causes[0].do
    host.chip.set_lockout(1, 777)
    assert host.boot() == "pin-lockout"
    found = diagnosis.diagnose(evidence.gather_evidence(host.paths, host.chip.tcti))
    said = explain.to_text(found)
    assert found.causes[0].code == "pin-lockout" and "777 s" in said and "recovery key" in said


def test_check_says_that_somebody_must_type(host: Machine) -> None:
    def notes() -> list[str]:
        found = check.check(host.paths, host.chip.tcti, host.look)
        return [each.detail for each in found.findings if each.what == "PIN"]

    host.write("proc/self/mountinfo", b"")
    assert notes() == []
    set_pin(host)
    assert len(notes()) == 2 and "unattended" in notes()[0] and "clears the count" in notes()[1]
    host.chip.set_lockout_auth(Secret(b"only the owner knows"))
    assert len(notes()) == 1 and "unattended" in notes()[0]
    keyring.forget("unlock:pin-auth")
    assert len(notes()) == 2


def test_the_cache_has_what_it_makes_and_says_so(host: Machine) -> None:
    set_pin(host)
    assert {"key": "unlock:pin-auth", "what": "what the PIN makes", "source": "PIN"} in cache.list_keys(host.paths)
    assert any("PIN" in line for line in cache.describe_flush(host.paths, host.look))
    cache.flush(host.paths)
    assert "unlock:pin-auth" not in keyring.names()


def test_a_hook_says_what_to_type_and_fails_nothing(
    host: Machine, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    set_pin(host)

    def needed(*_: object, **__: object) -> predict.Prediction:
        keyring.forget("unlock:pin-auth")
        host.predict(("kernel 2", NEW))
        raise AssertionError

    monkeypatch.setattr(predict, "predict_and_allow", needed)
    assert predict.predict_after_update(host.paths, host.chip.tcti) == 0
    assert "unlock policy set --pin" in capsys.readouterr().err


@pytest.mark.turns
@pytest.mark.parametrize("to", [PIN, None])
def test_killed_anywhere_the_old_or_the_new_and_the_same_command_finishes(
    host: Machine, to: str | None, killer: Killer
) -> None:
    from_pin = "before 1" if to is None else None

    def begin(_: int) -> Callable[[], object]:
        set_pin(host, from_pin)
        return partial(set_pin, host, to)

    for _ in killer(begin):
        assert host.allows().record.pin in (to is not None, from_pin is not None)
        assert not host.allows().record.pin or host.state.tpm.pin, "a PIN is never forgotten"
        host.types = [each for each in (to, from_pin) if each]
        assert host.boot() == "unsealed"
        set_pin(host, to)
        host.types = [to] if to else []
        assert host.boot() == "unsealed" and host.asked == (1 if to else 0)
        host.chip.set_lockout(32)


# rebind -----------------------------------------------------------------------------------------------------


@pytest.fixture
def disks(tmp_path: Path) -> Iterator[Machine]:
    machine = Machine(tmp_path, OLD, disks=1)
    yield machine
    machine.close()


def rebound(host: Machine, pin: Pin | None = None) -> rebind.Rebound:
    accept = frozenset(("unauthenticated-root", "unmeasured-boot"))
    return rebind.rebind(
        host.paths,
        rebind.RebindChoices(host.recovery, pcrs=(7,), pin=pin, accept=accept, tcti=host.chip.tcti),
        host.look,
    )


def test_rebind_keeps_the_pin_of_a_tpm_that_was_cleared(disks: Machine) -> None:
    set_pin(disks)
    disks.clear()
    disks.extend([(entry.pcr, entry.sha256) for entry in OLD.entries()])
    assert not rebind.needs_pin(disks.paths, disks.chip.tcti)
    rebound(disks)
    assert disks.allows().record.pin and disks.state.tpm.pin
    disks.chip.set_lockout(32)
    disks.types = [PIN]
    assert disks.boot() == "unsealed" and disks.asked == 1


def test_rebind_never_drops_a_pin_in_silence(disks: Machine) -> None:
    set_pin(disks)
    keyring.forget("unlock:pin-auth")
    disks.clear()
    disks.extend([(entry.pcr, entry.sha256) for entry in OLD.entries()])
    assert rebind.needs_pin(disks.paths, disks.chip.tcti)
    with pytest.raises(Refused) as caught:
        rebound(disks)
    assert caught.value.code == "pin-needed" and "--no-pin" in caught.value.hint
    assert not disks.state.journal
    rebound(disks, Pin(Secret(b"a new one")))
    disks.chip.set_lockout(32)
    disks.types = ["a new one"]
    assert disks.boot() == "unsealed" and disks.asked == 1
    rebound(disks, Pin(None))
    assert not disks.allows().record.pin and not disks.state.tpm.pin
    assert not rebind.needs_pin(disks.paths, disks.chip.tcti)
    assert disks.boot() == "unsealed" and disks.asked == 0


@pytest.mark.turns
def test_rebind_with_another_pin_killed_anywhere_keeps_the_one_or_the_other(disks: Machine, killer: Killer) -> None:
    """And no PIN is dropped: without --pin it goes on only where it knows which of the two the TPM has."""
    set_pin(disks)
    before, kept = PIN, set()

    def chosen(attempt: int) -> Pin:
        return Pin(Secret(f"pin {attempt}".encode()))

    for attempt, killed in killer(lambda attempt: partial(rebound, disks, chosen(attempt))):
        assert disks.allows().record.pin
        if killed:
            try:
                rebound(disks)
                disks.types = [before, f"pin {attempt}"]
                assert disks.boot() == "unsealed"
                kept.add(disks.asked)
            except Refused as error:
                assert error.code == "pin-needed"
                kept.add(0)
            rebound(disks, chosen(attempt))
        disks.types = [before := f"pin {attempt}"]
        assert disks.boot() == "unsealed" and disks.asked == 1
        disks.chip.set_lockout(32)
    assert kept == {0, 1, 2}, "asked for a PIN, the old one, the new one"


# Images -----------------------------------------------------------------------------------------------------

AGENT = "usr/lib/unlock/unlock/boot/agent.pyc"


@pytest.mark.parametrize(
    ("names", "why"),
    [
        ((AGENT, "usr/lib/unlock/reads/record-1", "usr/lib/cryptsetup/askpass"), "does not read"),
        ((AGENT, "usr/lib/unlock/reads/record-2"), "no program"),
        ((AGENT, "usr/lib/unlock/reads/record-2", "usr/lib/cryptsetup/askpass"), ""),
        (("usr/lib/unlock/reads/record-1",), ""),  # unlock is not in it
    ],
)
def test_no_pin_that_an_installed_initramfs_cannot_ask_for(host: Machine, names: tuple[str, ...], why: str) -> None:
    host.write("boot/initrd.img-6.12.1-amd64", b"")
    assert initramfs_images.list_images(BootTree(host.paths))

    def listing(_argv: list[str]) -> str:
        return "\n".join(names)

    if not why:
        initramfs_images.require_pin_support(BootTree(host.paths), listing)
        return
    with pytest.raises(Refused, match=why) as caught:
        initramfs_images.require_pin_support(BootTree(host.paths), listing)
    assert caught.value.hint == "update-initramfs -u -k 6.12.1-amd64"


def test_a_real_image_of_an_older_unlock_refuses_the_command(host: Machine, tmp_path: Path) -> None:
    tree = tmp_path / "tree"
    for name in (AGENT, "usr/lib/unlock/reads/record-1", "usr/lib/cryptsetup/askpass"):
        (tree / name).parent.mkdir(parents=True, exist_ok=True)
        (tree / name).touch()
    names = "\n".join(str(each.relative_to(tree)) for each in tree.rglob("*") if each.is_file())
    made = subprocess.run(["cpio", "--quiet", "-o", "-H", "newc"], input=names.encode(), capture_output=True, cwd=tree)
    host.write("boot/initrd.img-6.12.1-amd64", gzip.compress(made.stdout))
    with pytest.raises(Refused) as caught:
        set_pin(host)
    assert caught.value.code == "old-initramfs" and not host.allows().record.pin
    set_pin(host, None)


# The prompt of early boot -----------------------------------------------------------------------------------


class Prompt:
    """boot.pin_prompt, with a script in the place of askpass, and the boot scripts that wait or not."""

    def __init__(self, home: Path, body: str) -> None:
        from unlock.paths import Paths

        self.paths = Paths(str(home))
        os.makedirs(self.paths.run)
        self.program = home / "askpass"
        self.program.write_text(f"#!/bin/sh\n{body}\n")
        self.program.chmod(0o755)
        self.stop = False
        self.typed = agent.pin_prompt(self.paths, lambda: self.stop, str(self.program))

    def has(self, name: str) -> bool:
        return os.path.exists(self.paths.of_this_boot(name))

    def ready(self) -> None:
        Path(self.paths.of_this_boot("waiting")).touch()


def test_the_prompt_waits_for_the_boot_scripts_and_they_see_that_somebody_is_asked(tmp_path: Path) -> None:
    prompt = Prompt(tmp_path, f'echo "$1" >>{tmp_path}/asked; sleep 1; echo "{PIN}"')
    found: list[Secret] = []
    thread = threading.Thread(target=lambda: found.append(prompt.typed(3)))
    thread.start()
    time.sleep(0.5)
    assert prompt.has("asking") and not (tmp_path / "asked").exists()
    prompt.ready()
    thread.join(30)
    assert found == [Secret(PIN.encode())] and not prompt.has("asking")
    prompt.typed(2)
    prompt.typed(1)
    assert (tmp_path / "asked").read_text().splitlines() == [
        "unlock: PIN: ",
        "unlock: wrong PIN, 2 more tries; PIN: ",
        "unlock: wrong PIN, 1 more try; PIN: ",
    ]


@pytest.mark.parametrize("body", ["echo", "exit 1", "true"])
def test_an_empty_line_or_nothing_that_asks_is_no_pin(tmp_path: Path, body: str) -> None:
    prompt = Prompt(tmp_path, body)
    prompt.ready()
    with pytest.raises(PinWrong):
        prompt.typed(3)
    assert not prompt.has("asking")


@pytest.mark.parametrize("ready", [True, False])
def test_a_shell_that_ends_the_agent_ends_the_prompt_too(tmp_path: Path, ready: bool) -> None:
    prompt = Prompt(tmp_path, "exec sleep 600")
    if ready:
        prompt.ready()
    caught: list[BaseException] = []

    def typed() -> None:
        try:
            prompt.typed(3)
        except PinWrong as error:
            caught.append(error)

    thread = threading.Thread(target=typed)
    thread.start()
    time.sleep(0.5)
    prompt.stop = True
    thread.join(10)
    assert caught and not thread.is_alive() and not prompt.has("asking")


def alive(pid: str) -> bool:
    try:
        return "\nState:\tZ" not in Path(f"/proc/{pid}/status").read_text()
    except FileNotFoundError:
        return False


@pytest.mark.parametrize("stop", ["term", "kill"])
def test_nothing_goes_on_asking_at_the_console_when_the_agent_is_gone(tmp_path: Path, stop: str) -> None:
    """Else it and the prompt for the recovery key get every second line each. Ended in order, not even what askpass has
    started, which is plymouth's."""
    prompt = Prompt(tmp_path, f"sleep 600 & echo $! >{tmp_path}/plymouth; echo $$ >{tmp_path}/pid; wait")
    prompt.ready()
    pid = os.fork()
    if pid == 0:
        signals = agent.Signals()
        try:
            agent.pin_prompt(prompt.paths, lambda: signals.stop, str(prompt.program))(3)
        except PinWrong:
            os._exit(0)
    asks = tmp_path / "pid"
    while not (asks.exists() and asks.read_text().strip()):
        time.sleep(0.05)
    os.kill(pid, signal.SIGTERM if stop == "term" else signal.SIGKILL)
    os.waitpid(pid, 0)
    left = [asks.read_text().strip(), (tmp_path / "plymouth").read_text().strip()]
    try:
        end = time.monotonic() + 10
        gone = left if stop == "term" else left[:1]
        while any(map(alive, gone)) and time.monotonic() < end:
            time.sleep(0.05)
        assert not any(map(alive, gone))
    finally:
        for each in filter(alive, left):
            os.kill(int(each), signal.SIGKILL)


SHELLS = [shell for shell in (["dash"], ["busybox", "sh"]) if shutil.which(shell[0])]


@pytest.mark.parametrize("shell", SHELLS, ids=" ".join)
def test_no_deadline_of_the_boot_scripts_runs_while_somebody_types(tmp_path: Path, shell: list[str]) -> None:
    """unlock_poll with 5 tenths, and a person who takes 20: then the disks have their time."""
    text = (TOP / "initramfs/functions").read_text()
    text = text.replace("unlock_run=/run/unlock", f"unlock_run={tmp_path}")
    (tmp_path / "functions").write_text(text)
    agent = subprocess.Popen(["sleep", "60"])
    (tmp_path / "agent.pid").write_text(f"{agent.pid}\n")
    (tmp_path / "asking").touch()

    def polled() -> subprocess.Popen[bytes]:
        return subprocess.Popen([*shell, "-c", f". {tmp_path}/functions; unlock_poll 5 unlock_idle"])

    try:
        waits = polled()
        time.sleep(2)
        assert waits.poll() is None
        (tmp_path / "asking").unlink()
        assert waits.wait(30) != 0  # the agent says nothing: the time runs again
        (tmp_path / "asking").touch()
        waits = polled()
        time.sleep(1)
        (tmp_path / "idle").touch()
        assert waits.wait(30) == 0
    finally:
        agent.kill()
        agent.wait()


# No secret is told ------------------------------------------------------------------------------------------


def test_a_pin_is_in_no_report_state_output_or_command_line(
    host: Machine, capfd: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    from unlock import cli

    auth = pcr_policy.pin_auth(bytes.fromhex(host.state.host), Secret(PIN.encode()))
    file = tmp_path / "pin"
    file.write_text(f"{PIN}\n")
    set_pin(host)
    host.types = ["tulip 4712", PIN]
    host.boot()
    told = json.dumps(policy.show(host.paths, host.chip.tcti)) + json.dumps(
        status.to_json(status.read_status(host.paths))
    )
    told += json.dumps(explain.to_json(diagnosis.diagnose(evidence.gather_evidence(host.paths, host.chip.tcti))))
    told += Path(host.paths.state).read_text() + Path(host.paths.of_this_boot("report.json")).read_text()
    told += json.dumps(cache.list_keys(host.paths)) + repr(auth) + repr(Pin(Secret(PIN.encode())))
    for wrong in ("abc", "x" * 257):
        with pytest.raises(Usage) as caught:
            pcr_policy.pin_auth(HOST, Secret(wrong.encode()))
        assert wrong not in str(caught.value) + caught.value.hint
    out, err = capfd.readouterr()
    for secret in (PIN, "tulip", bytes(auth).hex()):
        assert secret not in told + out + err
    parser = cli._parser()
    assert parser.parse_args(["policy", "set", "--pin"]).pin is True  # a flag: the PIN itself cannot be an argument
    with pytest.raises(SystemExit):
        parser.parse_args(["policy", "set", "--pin", PIN])


@pytest.mark.parametrize(
    "line",
    [
        "policy set --pin",
        "policy set --pin-file F --pcrs 7,9",
        "policy set --no-pin",
        "rebind --pin",
        "rebind --no-pin",
    ],
)
def test_the_words_of_the_command_line(line: str) -> None:
    from unlock import cli

    assert cli._parser().parse_args(line.split()).run.__module__ == f"unlock.cli.{line.split()[0]}"


def test_each_verdict_of_a_pin_has_words() -> None:
    assert {PinWrong.code, PinLockout.code} <= report.VERDICTS.keys()
    assert {PinWrong.code, PinLockout.code} <= causes.USUAL.keys() & causes.TITLES.keys()
    assert initramfs.ASKPASS.endswith("askpass")
