# SPDX-License-Identifier: Apache-2.0
"""Unseals the persistence key, and replaces its policy so that at every instant one slot of the TPM can be unsealed.

Early boot unseals; `init`, `rebind` and every change of the policy seal. There are two slots. A slot is complete when
its record describes its object. The complete slot of the highest generation is the current one. Sealing does not touch
it until the other slot is complete; then it is evicted, object first, so that the old policy ends before its record
does.
"""

from ..errors import (
    Malformed,
    NewerFormat,
    NoSlot,
    PinWrong,
    Refused,
    Tampered,
    TpmFailed,
    TpmRefused,
    UnlockError,
    Usage,
)
from ..light import Callable, Mapping, NamedTuple, Sequence
from ..secret import Secret
from . import pcr_policy
from .chip import Meanwhile, SlotState, Tpm, pcr_refusal
from .pcr_policy import CAP_PCR, select
from .record import SLOTS, Needs, Payload, Record, Slot

_TELLING = (TpmRefused, Tampered, NewerFormat, Malformed, NoSlot)
PIN_TRIES = 3
"""In one boot. Many TPMs lock themselves after not many more."""

Ask = Callable[[int], Secret]
"""Asks a person for the PIN: with how many tries are left, from PIN_TRIES down. PinWrong gives up."""


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


def unseal(tpm: Tpm, ask: Ask = no_pin, meanwhile: Meanwhile = None) -> Unsealed:
    """Unseals the current slot, or the other one where that fails. `meanwhile` is called while the TPM works or a
    person is asked: perhaps not at all, perhaps twice.

    Sends 8 TPM commands, at most 14 when the other slot must be tried too. Where a slot has a PIN, 10 or 12: the PCRs
    are read first, so that nobody is asked in a boot that is not allowed; 6 more for each wrong PIN. One more for a
    policy over more than 8 PCRs, and one where the TPM wants the first command that it counts sent again
    (TPM_RC_RETRY).

    Raises TpmRefused, Tampered, Malformed or NoSlot, the most telling of the two slots; PinWrong, PinLockout and
    TpmFailed at once, as they concern no single slot.
    """
    found: list[tuple[Slot, Record]] = []
    problems: list[UnlockError] = []
    for slot in SLOTS:
        try:
            found.append((slot, tpm.read_record(slot)))
        except (NoSlot, Malformed, Tampered) as problem:
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
                return _by_pin(tpm, slot, record, objects, ask)
            with tpm.unseal(objects, record, meanwhile=meanwhile) as sealed:
                return Unsealed(_checked(Payload.decode(sealed), slot, record), slot, record)
        except (NoSlot, Malformed, Tampered, TpmRefused) as problem:
            problems.append(problem)
    raise min(problems, key=_rank)


def _by_pin(tpm: Tpm, slot: Slot, record: Record, objects: tuple[int, int], ask: Ask) -> Unsealed:
    for left in range(PIN_TRIES, 0, -1):
        with ask(left) as pin:
            try:
                auth = pcr_policy.pin_auth(record.host, pin)
            except Usage:  # no PIN is that short or long: the TPM need not count it
                continue
        try:
            with tpm.unseal(objects, record, auth) as sealed:
                return Unsealed(_checked(Payload.decode(sealed), slot, record), slot, record, auth)
        except PinWrong:
            auth.wipe()
        except BaseException:
            auth.wipe()
            raise
    raise PinWrong(f"the PIN was wrong {PIN_TRIES} times", "reboot, or type the recovery key")


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
