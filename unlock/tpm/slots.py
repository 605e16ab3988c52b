# SPDX-License-Identifier: Apache-2.0
"""Unseals the persistence key, and replaces its policy so that at every instant one slot of the TPM can be unsealed.

Early boot unseals; `init`, `rebind` and every change of the policy seal. There are two slots. A slot is complete when
its record describes its object. The complete slot of the highest generation is the current one. Sealing does not touch
it until the other slot is complete; then it is evicted, object first, so that the old policy ends before its record
does.
"""

import time

from ..errors import (
    Malformed,
    NewerFormat,
    NoSlot,
    PinWrong,
    Refused,
    Tampered,
    TpmFailed,
    TpmLockout,
    TpmRefused,
    UnlockError,
    Usage,
)
from ..light import TYPE_CHECKING, Callable, Mapping, NamedTuple, Sequence
from ..secret import Secret
from . import answers, pcr_policy
from .chip import Meanwhile, ResponseError, SlotState, Tpm, pcr_refusal
from .pcr_policy import CAP_PCR, select
from .record import SLOTS, Needs, Payload, Record, Slot

if TYPE_CHECKING:
    from typing import TypeVar

    Result = TypeVar("Result")

_TELLING = (TpmRefused, Tampered, NewerFormat, Malformed, TpmLockout, NoSlot)
PIN_TRIES = 3
"""In one boot. Many TPMs lock themselves after not many more."""

PAUSES = (0.1, 0.3, 1.0)
"""Seconds before each further try of what a TPM could not do for a moment."""

Ask = Callable[[int], Secret]
"""Asks a person for the PIN: with how many tries are left, from PIN_TRIES down. PinWrong gives up."""
Again = Callable[[UnlockError], None]
"""Told of a failure after which the TPM is asked again."""


class Unsealed(NamedTuple):
    """The result of `unseal`."""

    payload: Payload
    slot: Slot
    record: Record
    pin_auth: Secret | None = None
    """The auth value that the PIN made; None where there is no PIN."""


def no_pin(_left: int) -> Secret:
    """The `Ask` for where nobody can be asked."""
    raise PinWrong("the TPM asks for a PIN, and nobody can be asked for it here")


def not_told(_failure: UnlockError) -> None:
    """The `Again` for where nobody needs to know."""


class _Person:
    """The PIN over the tries of one unseal. One that the TPM has not judged yet is not asked for again."""

    def __init__(self, ask: Ask) -> None:
        self._ask = ask
        self.left = PIN_TRIES
        self.auth: Secret | None = None

    def type(self, host: bytes) -> None:
        """Sets `auth`, unless all that is typed is no PIN. Raises what the `Ask` does."""
        while self.left and self.auth is None:
            with self._ask(self.left) as pin:
                try:
                    self.auth = pcr_policy.pin_auth(host, pin)
                except Usage:  # no PIN is that short or long: the TPM need not count it
                    self.left -= 1

    def forget(self) -> None:
        if self.auth:
            self.auth.wipe()
        self.auth = None


def unseal(tpm: Tpm, ask: Ask = no_pin, meanwhile: Meanwhile = None, again: Again = not_told) -> Unsealed:
    """Unseals the current slot, or the other one where that fails. `meanwhile` is called while the TPM works or a
    person is asked: perhaps not at all, perhaps more than once.

    Sends 8 TPM commands, at most 14 when the other slot must be tried too. Where a slot has a PIN, 10 or 12: the PCRs
    are read first, so that nobody is asked in a boot that is not allowed; 6 more for each wrong PIN, one more for a
    policy over more than 8 PCRs, and one where the TPM wants the first command that it counts sent again
    (TPM_RC_RETRY). A failure that may pass is followed by a new connection and another try, as often as PAUSES has;
    a PIN whose answer was lost may have been counted, so it is asked for anew instead of sent twice.

    Raises TpmRefused, Tampered, Malformed, TpmLockout or NoSlot, the most telling of the two slots; PinWrong,
    PinLockout and TpmFailed at once, as they concern no single slot; TpmAbsent where no new connection is made.
    """
    person = _Person(ask)

    def attempt() -> Unsealed:
        tpm.open()
        return _unseal_once(tpm, person, meanwhile)

    def failed(failure: UnlockError) -> None:
        again(failure)
        tpm.close()

    try:
        return patiently(attempt, failed)
    finally:
        person.forget()


def patiently(do: "Callable[[], Result]", again: Again) -> "Result":
    """What `do` returns; it is done again after each failure that may pass, after each of PAUSES."""
    for pause in PAUSES:
        try:
            return do()
        except UnlockError as failure:
            if not failure.transient:
                raise
            again(failure)
        time.sleep(pause)
    return do()


def _unseal_once(tpm: Tpm, person: _Person, meanwhile: Meanwhile) -> Unsealed:
    found: list[tuple[Slot, Record]] = []
    problems: list[UnlockError] = []
    for slot in SLOTS:
        try:
            found.append((slot, tpm.read_record(slot)))
        except (NoSlot, Malformed, Tampered, TpmLockout) as problem:
            problems.append(problem)
    read = sorted({pcr for _, each in found for pcr in each.selection}) if any(each.pin for _, each in found) else []
    pcrs: dict[int, bytes] = {}
    for slot, record in sorted(found, key=lambda pair: pair[1].generation, reverse=True):
        try:
            objects = tpm.verify(slot, record)
            pcrs = pcrs or tpm.read_pcrs(read)
            if read and pcr_policy.policy_pcr(record.selection, pcrs) not in record.branches:
                raise pcr_refusal(record.selection)
            if record.pin:
                if meanwhile:
                    meanwhile()
                return _by_pin(tpm, slot, record, objects, person)
            with tpm.unseal(objects, record, meanwhile=meanwhile) as sealed:
                return Unsealed(_checked(Payload.decode(sealed), slot, record), slot, record)
        except (NoSlot, Malformed, Tampered, TpmRefused) as problem:
            problems.append(problem)
    raise min(problems, key=_rank)


def _by_pin(tpm: Tpm, slot: Slot, record: Record, objects: tuple[int, int], person: _Person) -> Unsealed:
    while True:
        person.type(record.host)
        if person.auth is None:
            raise PinWrong(f"the PIN was wrong {PIN_TRIES} times", "reboot, or type the recovery key")
        try:
            with tpm.unseal(objects, record, person.auth) as sealed:
                payload = _checked(Payload.decode(sealed), slot, record)
        except PinWrong:
            person.left -= 1
            person.forget()
        except ResponseError as failure:
            if failure.command == "Unseal" and failure.answer == answers.NOT_THE_TPM:  # it may have counted it
                person.forget()
            raise
        except BaseException:
            person.forget()
            raise
        else:
            auth, person.auth = person.auth, None
            return Unsealed(payload, slot, record, auth)


def _checked(payload: Payload, slot: Slot, record: Record) -> Payload:
    """The payload, if the record beside it tells the same of the root. Raises Tampered."""
    if payload.needs != record.needs:
        payload.key.wipe()
        raise Tampered(f"the record of slot {slot.name} tells of another root file system than what is sealed")
    return payload


def read_needs(tpm: Tpm) -> Needs:
    """What the newest record that can be read says of the root, which nothing authenticates where the TPM refuses.
    NV_Read, twice."""
    found: list[Record] = []
    for slot in SLOTS:
        try:
            found.append(tpm.read_record(slot))
        except UnlockError:
            continue
    return max(found, key=lambda each: each.generation).needs if found else Needs()


def current_slot(tpm: Tpm) -> tuple[Slot, Record]:
    """The complete slot of the highest generation. NV_Read and ReadPublic, each twice. Raises NoSlot, NewerFormat."""
    complete = _complete({slot: tpm.slot_state(slot) for slot in SLOTS})
    if not complete:
        raise NoSlot("the TPM holds no persistence key of this host", hint="unlock explain")
    return max(complete.items(), key=lambda pair: pair[1].generation)


def current_record(tpm: Tpm) -> Record | None:
    """The record of the current slot; None where the TPM holds no persistence key. Sends what `current_slot` does.
    Raises NewerFormat."""
    try:
        return current_slot(tpm)[1]
    except NoSlot:
        return None


def seal_slot(
    tpm: Tpm,
    host: bytes,
    selection: tuple[int, ...],
    branches: Sequence[bytes],
    payload: Payload,
    *,
    owner_auth: Secret | None = None,
    pin_auth: Secret | None = None,
    cap: int = CAP_PCR,
    replace: bool = False,
) -> Record:
    """Seals `payload` under the policy in the slot that is not current, reads record and object back, then evicts the
    other slot. Returns the new record.

    With a `pin_auth`, which may be empty for none, a boot asks for the PIN that makes this value. Killed anywhere, one
    slot or both can be unsealed; run again, it finishes. Raises Refused, unless `replace`, while a slot holds the key
    of another host; TpmFailed.
    """
    pin_auth = pin_auth if pin_auth and len(pin_auth) else None
    selection = select(selection, cap)
    states = {slot: tpm.slot_state(slot) for slot in SLOTS}
    complete = _complete(states)
    if not replace and any(record.host != host for record in complete.values()):
        raise Refused("the TPM keeps the key of another installation", "unlock rebind --accept slots-in-use")
    current = max(complete, key=lambda slot: complete[slot].generation, default=SLOTS[1])
    target = _other(current)

    srk_name = tpm.ensure_srk(owner_auth)
    with payload.encode() as sealed:
        object_name = tpm.seal(target, branches, sealed, owner_auth=owner_auth, pin_auth=pin_auth)
    generation = 1 + (complete[current].generation if current in complete else 0)
    record = Record(
        generation, host, selection, cap, tuple(branches), srk_name, object_name, pin_auth is not None, payload.needs
    )
    tpm.write_record(target, record, owner_auth)
    state = tpm.slot_state(target)
    if state.record != record or not state.complete:
        raise TpmFailed(f"slot {target.name} does not read back as it was written")
    tpm.evict(current, owner_auth)
    return record


def require_owner_auth(tpm: Tpm, owner_auth: Secret | None, hint: str = "--owner-auth-file FILE") -> None:
    """Raises Refused where the TPM's owner has a password and none was given, TpmFailed where another one was: before
    anything is written."""
    if owner_auth and len(owner_auth):
        tpm.prove_owner(owner_auth)
    elif tpm.facts().owner_auth_set:
        raise Refused("the TPM's owner has a password", hint, code="owner-auth-set")


def evict_older_policy(tpm: Tpm, current: Slot, host: bytes) -> None:
    """Evicts the older policy of this host, perhaps one without the PIN, that a killed `seal_slot` has left beside the
    current slot. NV_Read, ReadPublic, and what `Tpm.evict` sends. Raises TpmFailed."""
    other = _other(current)
    record = tpm.slot_state(other).record
    if record and record.host == host:
        tpm.evict(other)


def _other(slot: Slot) -> Slot:
    return SLOTS[0] if slot is SLOTS[1] else SLOTS[1]


def _complete(states: Mapping[Slot, SlotState]) -> dict[Slot, Record]:
    for state in states.values():
        if isinstance(state.problem, NewerFormat):
            raise state.problem
    return {slot: state.record for slot, state in states.items() if state.record and state.complete}


def evict_all(tpm: Tpm, owner_auth: Secret | None = None) -> None:
    """Evicts both slots. The persistence key in them is lost, and every key that it wraps. Finishes when run again."""
    for slot in SLOTS:
        tpm.evict(slot, owner_auth)


def _rank(problem: UnlockError) -> int:
    return next(rank for rank, kind in enumerate(_TELLING) if isinstance(problem, kind))
