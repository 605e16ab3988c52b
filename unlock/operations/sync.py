# SPDX-License-Identifier: Apache-2.0
"""`unlock sync`, after boot and on a timer: what changed at the key manager reaches the disks.

    members that are back ──> what was killed ──> resolve all keys, one request ──> each key: unchanged, replaced,
    blocked, unknown ──> a replaced one: fetch, validate, prove, rotation ──> keys that only the provider keeps: cached

It never touches the TPM. Nothing leaves cache or disks because a server said `not found`, `denied` or nothing: only a
state that the operator's `drop_on` names does that. When nothing changed, nothing is written.
"""

import time
from collections.abc import Callable
from typing import NamedTuple

from ..disks import devices, find
from ..disks.groups import Group
from ..errors import ClockWrong, NoKey, UnlockError
from ..host import clock, keyring, this_boot
from ..host.journal import Rekey
from ..host.lock import exclusive
from ..keys import access, rotation
from ..keys.access import Work
from ..paths import Paths
from ..providers import BLOCKED, Ref, Status
from ..run import run

VERSION = 1


class Line(NamedTuple):
    """One key, and what came of it."""

    key: str
    """Of a group, by its name; or `host key`."""
    outcome: str
    """unchanged, replaced, caught-up, finished, cached, dropped, lagging; or an error's code."""
    detail: str = ""
    error: UnlockError | None = None


def sync(
    paths: Paths,
    look: find.Look = find.look,
    connect: access.Connect = access.connect,
    wait_for_clock: Callable[[], bool] = clock.wait,
) -> list[Line]:
    """One sync; its record is /run/unlock/sync.json. Raises what kept all of it from being done, ProviderError, NoKey,
    Refused; trouble with one key is in its line."""
    try:
        try:
            lines = _sync(paths, look, connect)
        except ClockWrong:
            if not wait_for_clock():
                raise
            lines = _sync(paths, look, connect)
    except UnlockError as error:
        _record(paths, [Line("all", error.code, str(error), error)])
        if isinstance(error, NoKey):  # a gate may be allowed to ask without it, and the network is up now
            _heal(paths)
        raise
    _record(paths, lines)
    _heal(paths)
    return lines


def _sync(paths: Paths, look: find.Look, connect: access.Connect) -> list[Line]:
    with exclusive(paths), Work(paths, look, connect) as work:
        lines = [*_local(work), *_finish(work), *_ask(work)]
        rotation.retire(work)
        return lines


def _local(work: Work) -> list[Line]:
    """What needs no network: disks that are back."""
    return [
        Line(each.group, "caught-up", ", ".join(each.done) or "; ".join(each.behind.values()))
        for each in rotation.catch_up(work)
    ]


def _ask(work: Work) -> list[Line]:
    lines = []
    groups = list(work.state.groups.values())
    mine = [group for group in groups if work.state.provider_of(group.kek) == work.state.provider]
    refs = [access.key_ref(work.state.provider, group.kek, group.kek_name) for group in mine]
    host_key = work.state.host_key_ref
    refs.append(access.key_ref(work.state.provider, host_key.id, host_key.name))
    statuses = work.provider().resolve(refs)
    for group, status in zip(mine, statuses, strict=False):
        try:
            lines.append(_judge(work, group, status))
        except UnlockError as error:
            lines.append(Line(group.name, error.code, str(error), error))
    try:
        lines.append(_judge_host_key(work, statuses[-1]))
    except UnlockError as error:
        lines.append(Line("host key", error.code, str(error), error))
    return lines


def _finish(work: Work) -> list[Line]:
    """A rotation that was killed; what keeps it from its end is its own trouble."""
    journal = work.state.journal
    if not isinstance(journal, Rekey):
        return []
    try:
        outcome = rotation.rotate(work, journal.about)
    except UnlockError as error:
        return [Line(journal.about, error.code, str(error), error)]
    return [Line(outcome.group, "finished", _behind(outcome))]


def _judge(work: Work, group: Group, status: Status) -> Line:
    """Raises ProviderError, DiskFailed."""
    if status.problem:
        return Line(group.name, status.problem.code, str(status.problem), status.problem)
    if status.changed:
        return _follow(work, group, status.current)
    if status.state in work.settings.sync.drop_on:
        return _drop(work, group, status.state)
    wanted = access.wanted_policy(work, group)
    if group.policy != wanted:
        return Line(group.name, wanted, _behind(rotation.set_policy(work, group, wanted)))
    if group.policy == "provider" and not _is_cached(group):
        kek, source = access.find_kek(work, group)
        with kek:
            this_boot.remember(work.paths, source, {access.cached(group.kek, group.generation): kek})
        return Line(group.name, "cached")
    if status.state in BLOCKED:
        return Line(group.name, "state-blocked", f"the key is {status.state}; its disks still open")
    return Line(group.name, "unchanged")


def _follow(work: Work, group: Group, current: str) -> Line:
    """The KMS names another key in the place of ours."""
    if f"{work.state.provider_id}/{current}" in group.former:
        return Line(group.name, "lagging", "the server offers a key that this group has left behind")
    outcome = rotation.rotate(work, group.name, Ref(current, group.kek_name))
    return Line(group.name, "replaced", _behind(outcome))


def _drop(work: Work, group: Group, state: str) -> Line:
    """The operator's revocation policy: the key is not kept any more. What is open stays open until it is closed."""
    if group.policy == "provider" and not group.behind:
        keyring.forget(access.cached(group.kek, group.generation))
        return Line(group.name, "dropped", f"the key is {state}")
    if any(member.name in devices.mappings_below("/") for member in group.members):
        return Line(group.name, "state-blocked", f"the key is {state}, and kept: the root file system needs it")
    outcome = rotation.set_policy(work, group, "provider")
    keyring.forget(access.cached(group.kek, group.generation))
    return Line(group.name, "dropped", f"the key is {state}" + _behind(outcome))


def _is_cached(group: Group) -> bool:
    try:
        keyring.get(access.cached(group.kek, group.generation)).wipe()
    except NoKey:
        return False
    return True


def _judge_host_key(work: Work, status: Status) -> Line:
    """A new one; dumps of the old one stay readable: it is kept with the former ones."""
    if status.problem:
        return Line("host key", status.problem.code, str(status.problem), status.problem)
    if not status.changed:
        return Line("host key", "unchanged")
    if work.state.had_host_key(f"{work.state.provider_id}/{status.current}"):
        return Line("host key", "lagging", "the server offers a key that this host has left behind")
    with work.provider().fetch(status.current) as key:
        rotation.set_host_key(work, work.state.provider_id, Ref(status.current, status.ref.name), key)
    return Line("host key", "replaced")


def _heal(paths: Paths) -> None:
    """Groups whose gate gave up may open now."""
    if paths.root == "/" and this_boot.failed_groups(paths):
        run(["systemctl", "start", "--no-block", "unlock-heal@sync.service"])


def _behind(outcome: rotation.Outcome) -> str:
    return "; ".join(f"{name}: {why}" for name, why in outcome.behind.items())


def _record(paths: Paths, lines: list[Line]) -> None:
    keys = [{"key": each.key, "outcome": each.outcome, "detail": each.detail} for each in lines]
    this_boot.write_json(paths, "sync.json", {"version": VERSION, "at": int(time.time()), "keys": keys})
