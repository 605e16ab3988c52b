# SPDX-License-Identifier: Apache-2.0
"""The slot pair: one persistence key in the TPM, and how its policy is replaced without an unusable instant.

A slot is complete when its record describes its object. The complete slot of the highest generation is the
current one. It is not touched until the other one is complete; then it is evicted, object first, so that the
old policy ends before its record does.
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
from .record import SLOTS, Payload, Record, Slot

_TELLING = (TpmRefused, Tampered, NewerFormat, Malformed, NoSlot)
PIN_TRIES = 3
"""In one boot. Many TPMs lock themselves after not many more."""

Ask = Callable[[int], Secret]
"""Asks a person for the PIN: with how many tries are left, from PIN_TRIES down. PinWrong gives up."""


class Unsealed(NamedTuple):
    payload: Payload
    slot: Slot
    record: Record
    pin_auth: Secret | None = None
    """The value that the PIN made, where there is one."""


def no_pin(_left: int) -> Secret:
    """Where nobody can be asked."""
    raise PinWrong("the TPM asks for a PIN, and nobody can be asked for it here")


def unseal(tpm: Tpm, ask: Ask = no_pin, meanwhile: Meanwhile = None) -> Unsealed:
    """Unseal the current slot: 8 TPM commands in either slot, at most 14 when the other must be tried too.

    `meanwhile` is called while the TPM or a person is waited for: perhaps not at all, perhaps twice.

    Where a slot has a PIN 10, or 12: the PCRs are read first, so that nobody is asked in a boot that is not allowed.
    One more for a policy over more than 8 PCRs, and one where the TPM wants the first command that it counts sent again
    (TPM_RC_RETRY). Each wrong PIN costs 6.

    TpmRefused, Tampered, Malformed or NoSlot, the most telling of the two slots; PinWrong, PinLockout and TpmFailed at
    once, as they say nothing of a slot.
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
                return Unsealed(Payload.decode(sealed), slot, record)
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
                return Unsealed(Payload.decode(sealed), slot, record, auth)
        except PinWrong:
            auth.wipe()
        except BaseException:
            auth.wipe()
            raise
    raise PinWrong(f"the PIN was wrong {PIN_TRIES} times", "reboot, or type the recovery key")


def current_slot(tpm: Tpm) -> tuple[Slot, Record]:
    """The complete slot of the highest generation. NV_Read and ReadPublic, each twice. NoSlot, NewerFormat."""
    complete = _complete({slot: tpm.slot_state(slot) for slot in SLOTS})
    if not complete:
        raise NoSlot("the TPM holds no persistence key of this host", hint="unlock explain")
    return max(complete.items(), key=lambda pair: pair[1].generation)


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
    """Seal `payload` under the policy in the slot that is not current, prove the pair, then evict the other.

    With `pin_auth` a boot asks for the PIN that makes this value.
    Killed anywhere, one slot or both open; run again, it finishes. Refused, unless `replace`, while a slot
    holds the key of another host.
    """
    selection = select(selection, cap)
    states = {slot: tpm.slot_state(slot) for slot in SLOTS}
    complete = _complete(states)
    if not replace and any(record.host != host for record in complete.values()):
        raise Refused("the TPM keeps the key of another installation", "unlock rebind --accept slots-in-use")
    current = max(complete, key=lambda slot: complete[slot].generation, default=SLOTS[1])
    target = _other(current)

    srk_name = tpm.srk(owner_auth)
    with payload.encode() as sealed:
        object_name = tpm.seal(target, branches, sealed, owner_auth=owner_auth, pin_auth=pin_auth)
    generation = 1 + (complete[current].generation if current in complete else 0)
    record = Record(generation, host, selection, cap, tuple(branches), srk_name, object_name, pin_auth is not None)
    tpm.write_record(target, record, owner_auth)
    state = tpm.slot_state(target)
    if state.record != record or not state.complete:
        raise TpmFailed(f"slot {target.name} does not read back as it was written")
    tpm.evict(current, owner_auth)
    return record


def evict_older_policy(tpm: Tpm, current: Slot, host: bytes) -> None:
    """Evicts what a `persist` that was killed has left beside the current slot: an older policy of this host, perhaps
    one without the PIN. NV_Read, ReadPublic, and what `Tpm.evict` sends. Raises TpmFailed."""
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
    """Evict both slots: what they sealed is lost, and every key that it wraps. Finishes when run again."""
    for slot in SLOTS:
        tpm.evict(slot, owner_auth)


def _rank(problem: UnlockError) -> int:
    return next(rank for rank, kind in enumerate(_TELLING) if isinstance(problem, kind))
