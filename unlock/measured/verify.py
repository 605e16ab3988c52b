# SPDX-License-Identifier: Apache-2.0
"""Checks the event logs against the PCRs, which alone are proof: the log lies in memory that anybody may have written.

    firmware's log ──replay, then systemd's log──> the live PCR    its events are verified
                                                   another value   no event of this PCR counts

values_at_unseal() takes off what systemd added after early boot asked the TPM.
confirm_note() needs no log of the firmware: early boot has noted what the TPM said.
"""

from collections.abc import Iterator, Mapping, Sequence
from hashlib import sha256
from itertools import islice

from ..tpm import pcr_policy
from . import eventlog
from .eventlog import Event, Log

_GROWING = (10, 11)
"""PCRs that IMA, and systemd without a log of it, extend after early boot."""
_PHASES = ("enter-initrd", "leave-initrd", "sysinit", "ready")
"""What systemd-pcrphase extends PCR 11 with: systemd-pcrphase.service(8)."""
_SEPARATED = (*range(8), 9, 12, 13, 14)
"""PCRs that systemd extends with eventlog.OS_SEPARATOR."""
_UNKNOWN_TIME = -1.0
_TAIL, _PAIRS, _RUNS = 500, 4096, 16
"""How far a repetition is looked for: events, pairs of equal events, repeated runs."""


def verified_events(log: Log, later: Sequence[Event], live: Mapping[int, bytes]) -> dict[int, tuple[Event, ...]]:
    """The events of each PCR whose replay equals its live value; the cap is no event. Other PCRs are left out.

    `later`: what systemd logged. `live`: the PCRs now.
    """
    found = {}
    for pcr, (events, value) in replay_each_pcr(log).items():
        if pcr in live:
            more = extensions_between(pcr, value, later, live[pcr])
            if more is not None:
                found[pcr] = (*events, *more)
    return found


def repair_log(log: Log, later: Sequence[Event], live: Mapping[int, bytes]) -> Log:
    """The log without two known flaws, each removed only if more PCRs then replay to their live values: that proves it.

    Some firmware does not log the TPM's startup locality. Some kernels append events a second time, from the
    firmware's table of final events.
    """
    best, count = log, len(verified_events(log, later, live))
    for candidates in (_with_other_localities, _without_repeats):
        for other in candidates(best):
            if len(live) > count < (more := len(verified_events(other, later, live))):
                best, count = other, more
    return best


def _with_other_localities(log: Log) -> Iterator[Log]:
    return (log._replace(locality=each) for each in (0, 3, 4) if each != log.locality)


def _without_repeats(log: Log) -> Iterator[Log]:
    """The log without one run of events that is repeated at once: among the last events, the longest runs first."""
    keys = [(event.pcr, event.digest) for event in log.events]
    places: dict[tuple[int, bytes | None], list[int]] = {}
    pairs = []
    for at in range(max(0, len(keys) - _TAIL), len(keys)):
        earlier = places.setdefault(keys[at], [])
        pairs += [(at - each, at) for each in earlier]
        earlier.append(at)
    runs = (
        (at, length)
        for length, at in sorted(pairs, reverse=True)[:_PAIRS]
        if keys[at - length : at] == keys[at : at + length]
    )
    for at, length in islice(runs, _RUNS):
        yield log._replace(events=log.events[:at] + log.events[at + length :])


def values_at_unseal(
    asked: float, log: Log | None, later: Sequence[Event], live: Mapping[int, bytes]
) -> dict[int, bytes]:
    """PCRs 0 to 15 as they were at the time `asked`, in seconds since the kernel started.

    A verified PCR is replayed without what systemd added after `asked`. Another one has its live value, if nothing
    extends it after early boot. A PCR that is neither is left out, and so is one that has been extended at a time that
    is not known.
    """
    verified = verified_events(log, later, live) if log else {}
    undated = {pcr for pcr, each in verified.items() if any(event.time == _UNKNOWN_TIME for event in each)}
    events = (
        event for each in verified.values() for event in each if event.kind != eventlog.SYSTEMD or event.time < asked
    )
    then = eventlog.replay(events, log.locality if log else 0)
    touched = {event.pcr for event in later}
    quiet = {pcr for pcr in range(16) if pcr not in touched and (pcr not in _GROWING or live[pcr] == pcr_policy.UNSET)}
    known = [pcr for pcr in range(16) if pcr not in undated and (pcr in verified or pcr in quiet)]
    return {pcr: then[pcr] if pcr in verified else live[pcr] for pcr in known}


def confirm_note(note: Mapping[int, bytes], later: Sequence[Event], live: Mapping[int, bytes]) -> dict[int, bytes]:
    """Those of the PCRs that early boot has noted whose live value is the noted one, extended with nothing but what
    systemd measures later. That proves them, with a log of the firmware or without."""
    found = {}
    for pcr, value in note.items():
        logged = [event for event in later if event.pcr == pcr]
        rests = (logged[first:] for first in range(len(logged) + 1))
        if pcr in live and any(extensions_between(pcr, value, rest, live[pcr]) is not None for rest in rests):
            found[pcr] = value
    return found


def replay_each_pcr(log: Log) -> dict[int, tuple[tuple[Event, ...], bytes]]:
    """PCR -> its events, and its value after them; a PCR with an event without a SHA-256 digest is left out."""
    events: dict[int, list[Event]] = {pcr: [] for pcr in range(eventlog.PCRS)}
    for event in log.events:
        events[event.pcr].append(event)
    return {pcr: (tuple(events[pcr]), value) for pcr, value in eventlog.replay(log.events, log.locality).items()}


def extensions_between(pcr: int, value: bytes, later: Sequence[Event], live: bytes) -> tuple[Event, ...] | None:
    """The first events of `later` that extend this PCR from `value` to `live`; None when they do not.

    The last events may have come after the PCR was read. The cap may come before or after them.
    systemd 252 to 254 extends PCR 11 with the boot phases and logs nothing: those are tried, and its separator.
    """
    logged = tuple(event for event in later if event.pcr == pcr)
    candidates: list[tuple[Event, ...]] = [logged, *(_phase_sequences() if pcr == 11 else ())]
    separator = _systemd_event(pcr, eventlog.OS_SEPARATOR, _UNKNOWN_TIME)
    if pcr in _SEPARATED and all(event.digest != separator.digest for event in logged):
        candidates.append((separator, *logged))
    cap = pcr == pcr_policy.CAP_PCR
    for events in candidates:
        for start in (value, eventlog.extend(value, pcr_policy.CAP_DIGEST)) if cap else (value,):
            reached = start
            for count in range(len(events) + 1):
                if reached == live or (cap and eventlog.extend(reached, pcr_policy.CAP_DIGEST) == live):
                    return events[:count]
                if count < len(events):
                    reached = eventlog.extend(reached, events[count].digest or b"")
    return None


def _phase_sequences() -> Iterator[tuple[Event, ...]]:
    phases = [_systemd_event(11, name, 0.0 if name == "enter-initrd" else float("inf")) for name in _PHASES]
    return (tuple(phases[first:]) for first in range(len(phases)))


def _systemd_event(pcr: int, name: str, time: float) -> Event:
    """An event that systemd has not logged."""
    kind = "phase" if name in _PHASES else name
    return Event(pcr, eventlog.SYSTEMD, sha256(name.encode()).digest(), f"{kind}\0{name}".encode(), time)
