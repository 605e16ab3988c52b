# SPDX-License-Identifier: Apache-2.0
"""`unlock sync`, after boot and on a timer: brings to the disks what changed at the key manager.

    members that are back ──> what was killed ──> resolve all keys, one request ──> each key: unchanged, replaced,
    blocked, unknown ──> a replaced one: fetch, validate, prove, rotation ──> keys that only the provider keeps: cached

It touches the TPM only where a group's key is not kept any more: then this host gets a new persistence key, under the
same policy. The sync of the timer cannot reach the TPM, and fails with that until somebody else has made the key.

It removes no key from cache or disks because a server answers `not found` or `denied`, or does not answer: only for a
state of the key that the operator's `drop_on` names. When nothing changed, it writes nothing.
"""

import time
from collections.abc import Callable
from typing import NamedTuple

from .. import journald, messages
from ..disks import devices, find
from ..disks.groups import Group
from ..errors import ClockWrong, NoKey, StateBlocked, UnlockError
from ..host import clock, keyring, this_boot
from ..host.journal import NewPersistenceKey, Rekey
from ..host.lock import exclusive
from ..host.state import State
from ..keys import access, dump_key, rotation
from ..keys.access import Work
from ..paths import Paths
from ..providers import BLOCKED, KeyStatus, Ref
from ..run import run

VERSION = 1


class SyncLine(NamedTuple):
    """The result for one key."""

    key: str
    """Of a group, by its name; or `host key`, `replaced key`."""
    outcome: str
    """unchanged, replaced, caught-up, finished, cached, persistent, provider, dropped, lagging, still-active; or an
    error's code."""
    detail: str = ""
    error: UnlockError | None = None


def sync(
    paths: Paths,
    look: find.Look = find.look,
    connect: access.Connect = access.connect,
    wait_for_clock: Callable[[], bool] = clock.wait_until_set,
    tcti: str = "",
) -> list[SyncLine]:
    """Runs one sync and records it in /run/unlock/sync.json. Raises ProviderError, NoKey or Refused when nothing could
    be done; a failure with one key is in that key's line."""
    try:
        first = _replace_persistence_key(paths, look, tcti)
        try:
            lines = _sync(paths, look, connect)
        except ClockWrong:
            if not wait_for_clock():
                raise
            lines = _sync(paths, look, connect)
        lines += first or _replace_persistence_key(paths, look, tcti)
    except UnlockError as error:
        _write_record(paths, [SyncLine("all", error.code, str(error), error)])
        if isinstance(error, NoKey):  # a gate may be allowed to ask without it, and the network is up now
            _start_failed_groups(paths)
        raise
    _write_record(paths, lines)
    _start_failed_groups(paths)
    return lines


def _sync(paths: Paths, look: find.Look, connect: access.Connect) -> list[SyncLine]:
    with exclusive(paths), Work(paths, look, connect) as work:
        dump_key.refresh(work)
        lines = [*_catch_up(work), *_finish_rotation(work), *_ask_provider(work)]
        lines += [SyncLine("replaced key", "still-active", each.describe()) for each in rotation.retire_keks(work)]
        return lines


def _replace_persistence_key(paths: Paths, look: find.Look, tcti: str) -> list[SyncLine]:
    """A new persistence key where one is due. Imports what speaks with the TPM only then."""
    state = State.load(paths)
    if state.removed is not None or (state.narrowed is None and not isinstance(state.journal, NewPersistenceKey)):
        return []
    from . import new_persistence_key

    try:
        found = new_persistence_key.replace_if_due(paths, tcti or this_boot.tpm_device(), look=look)
    except UnlockError as error:
        return [SyncLine("persistence key", error.code, str(error), error)]
    return [SyncLine("persistence key", "replaced", "; ".join(found.behind))] if found else []


def _catch_up(work: Work) -> list[SyncLine]:
    """Rewrites the tokens of disks that are back; needs no network where cache or disks have the KEK."""
    return [
        SyncLine(each.group, "caught-up", ", ".join(each.done) or "; ".join(each.behind.values()))
        for each in rotation.catch_up_disks(work)
    ]


def _ask_provider(work: Work) -> list[SyncLine]:
    lines = []
    groups = list(work.state.groups.values())
    mine = [group for group in groups if work.state.provider_of(group.kek) == work.state.provider]
    refs = [access.key_ref(work.state.provider, group.kek, group.kek_name) for group in mine]
    host_key = work.state.host_key_ref
    refs.append(access.key_ref(work.state.provider, host_key.id, host_key.name))
    statuses = work.provider().resolve(refs)
    for group, status in zip(mine, statuses, strict=False):
        try:
            lines.append(_follow_status(work, group, status))
        except UnlockError as error:
            lines.append(SyncLine(group.name, error.code, str(error), error))
    try:
        lines.append(_follow_host_key(work, statuses[-1]))
    except UnlockError as error:
        lines.append(SyncLine("host key", error.code, str(error), error))
    return lines


def _finish_rotation(work: Work) -> list[SyncLine]:
    """Finishes a rotation that was killed. Its failure does not stop the sync of other keys."""
    journal = work.state.journal
    if not isinstance(journal, Rekey):
        return []
    try:
        outcome = rotation.rotate_kek(work, journal.about)
    except UnlockError as error:
        return [SyncLine(journal.about, error.code, str(error), error)]
    return [SyncLine(outcome.group, "finished", _describe_behind(outcome))]


def _follow_status(work: Work, group: Group, status: KeyStatus) -> SyncLine:
    """Raises ProviderError, DiskFailed."""
    if status.problem:
        return SyncLine(group.name, status.problem.code, str(status.problem), status.problem)
    if status.changed:
        return _follow_replacement(work, group, status.current)
    if status.state in work.settings.sync.drop_on:
        return _drop_kek(work, group, status.state)
    line = _follow_policy(work, group)
    if status.state in BLOCKED and not line.error:
        done = "" if line.outcome == "unchanged" else f"; {line.outcome}"
        return _blocked(
            group.name, f"the key is {status.state}; its disks still open{done}", f"unlock rekey {group.name}"
        )
    return line


def _follow_policy(work: Work, group: Group) -> SyncLine:
    """Puts the KEK where the configuration wants it. Raises ProviderError, DiskFailed."""
    wanted = access.wanted_policy(work, group)
    if group.policy != wanted:
        return SyncLine(group.name, wanted, _describe_behind(rotation.set_policy(work, group, wanted)))
    if group.policy == "provider" and not _is_cached(group):
        kek, source = access.find_kek(work, group)
        with kek:
            this_boot.cache_keys(work.paths, source, {access.cache_name(group.kek, group.generation): kek})
        return SyncLine(group.name, "cached")
    return SyncLine(group.name, "unchanged")


def _blocked(key: str, detail: str, hint: str) -> SyncLine:
    error = StateBlocked(detail, hint)
    return SyncLine(key, error.code, detail, error)


def _follow_replacement(work: Work, group: Group, current: str) -> SyncLine:
    """Rotates the group to the key that the key manager names in place of its KEK."""
    if f"{work.state.provider_id}/{current}".lower() in map(str.lower, group.former):
        return SyncLine(group.name, "lagging", "the server offers a key that this group has left behind")
    outcome = rotation.rotate_kek(work, group.name, Ref(current, group.kek_name))
    return SyncLine(group.name, "replaced", _describe_behind(outcome))


def _drop_kek(work: Work, group: Group, state: str) -> SyncLine:
    """Stops keeping the KEK, by the operator's `drop_on`. What is open stays open until it is closed."""
    if group.policy == "provider" and not group.behind:
        keyring.forget(access.cache_name(group.kek, group.generation))
        _record_dropped(work, group, state)
        return SyncLine(group.name, "dropped", f"the key is {state}")
    if any(member.name in devices.mappings_below("/") for member in group.members):
        detail = f"the key is {state}, and kept: the root file system needs it"
        return _blocked(group.name, detail, f"unlock rekey {group.name}")
    outcome = rotation.set_policy(work, group, "provider")
    keyring.forget(access.cache_name(group.kek, group.generation))
    _record_dropped(work, group, state)
    return SyncLine(group.name, "dropped", f"the key is {state}" + _describe_behind(outcome))


def _record_dropped(work: Work, group: Group, state: str) -> None:
    words = f"the key of group {group.name} is {state} at its provider, and not kept any more"
    journald.record(work.paths, messages.KEK_DROPPED, words, group=group.name, detail=state)


def _is_cached(group: Group) -> bool:
    try:
        keyring.get(access.cache_name(group.kek, group.generation)).wipe()
    except NoKey:
        return False
    return True


def _follow_host_key(work: Work, status: KeyStatus) -> SyncLine:
    """Takes a new host key over. The state keeps the old one, so that its dumps stay readable."""
    if status.problem:
        return SyncLine("host key", status.problem.code, str(status.problem), status.problem)
    if not status.changed and status.state in BLOCKED:
        detail = f"the key is {status.state}; what it protects can still be read"
        return _blocked("host key", detail, "give it a replacement in the key manager, then: unlock sync")
    if not status.changed:
        return SyncLine("host key", "unchanged")
    if work.state.had_host_key(f"{work.state.provider_id}/{status.current}"):
        return SyncLine("host key", "lagging", "the server offers a key that this host has left behind")
    with work.provider().fetch(status.current) as key:
        rotation.set_host_key(work, work.state.provider_id, Ref(status.current, status.ref.name), key)
    return SyncLine("host key", "replaced")


def _start_failed_groups(paths: Paths) -> None:
    """Starts the units that open groups whose gate has failed: they may open now."""
    if paths.root == "/" and this_boot.failed_groups(paths):
        run(["systemctl", "start", "--no-block", "unlock-heal@sync.service"])


def _describe_behind(outcome: rotation.Outcome) -> str:
    return "; ".join(f"{name}: {why}" for name, why in outcome.behind.items())


def _write_record(paths: Paths, lines: list[SyncLine]) -> None:
    keys = [{"key": each.key, "outcome": each.outcome, "detail": each.detail} for each in lines]
    this_boot.write_json(paths, "sync.json", {"version": VERSION, "at": int(time.time()), "keys": keys})
