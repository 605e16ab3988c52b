# SPDX-License-Identifier: Apache-2.0
"""The real root: the gate of each group, and healing when a disk comes late. Fed from the key cache.

gate(G)   what unlock-group@G runs: done when the group is open, failed at its deadline
open_group(G)   `unlock open`: at once, with what is here, from the key cache or by the recovery key
heal()    what udev starts for a new disk, or a sync for a new key, while a gate has failed

Keys come from the cache. The provider is asked for two kinds of groups alone: those whose KEK only it keeps, and, if
the operator's `open_from_provider_after_refusal` allows it, data groups after a boot that the TPM refused. Then no
key is cached, and nothing is sealed or written.
"""

import fcntl
import json
import os
import time
from collections.abc import Callable
from contextlib import closing

from .. import log
from ..disks import devices, disk_keys, find, luks
from ..disks.groups import Group
from ..disks.token import Token
from ..errors import ClockWrong, CommandFailed, NoKey, NotOurs, ProviderUnavailable, Tampered, UnlockError, Usage
from ..host import config, keyring, report, this_boot, units
from ..host.state import State
from ..keys import access
from ..paths import Paths
from ..protect import protect
from ..run import run
from ..secret import Secret
from . import activation

RETRY = 5.0
"""Seconds between two tries to reach a provider that is away."""


def gate(paths: Paths, name: str) -> int:
    """Waits for the group's members and opens it. Raises UnlockError with what is missing."""
    protect()
    settings = config.load(paths.config).groups.get(name)
    end = report.now() + (settings.deadline if settings else config.DEADLINE)
    if _opened_by_hand(paths, name):
        return 0
    record = report.Report(f"gate {name}")
    monitor = devices.Monitor()
    try:
        unwrap = unwrapper(paths, name, record, end)
    except UnlockError:
        _mark_failed(paths, name)
        raise
    groups = activation.Opening(State.load(paths).host, unwrap, record, name)
    look = True
    while not _is_open(record, name) and report.now() < end and name not in groups.failed:
        done = activation.turn(groups, monitor, look)
        look = False
        if not _is_open(record, name):
            activation.wait([monitor.fileno(), *groups.pipes()], min(1.0, end - report.now()) if done else 0.05)
    if not _is_open(record, name):
        _mark_failed(paths, name)
        done = activation.turn(groups, monitor, look=True)
        while not done and report.now() < end + activation.ACTIVATION_TIMEOUT:
            activation.wait(groups.pipes(), 0.05)
            done = activation.turn(groups, monitor, look=False)
    groups.stop(activation.ACTIVATION_TIMEOUT)
    groups.wipe()
    this_boot.write_report(paths, record, f"gate-{name}.json")
    if not _is_open(record, name):
        raise UnlockError(*_why(paths, record, name), code="group-incomplete")
    this_boot.mark_open(paths, name, record.groups[name]["mappings"])
    this_boot.unmark(paths, "failed-groups", name)
    return 0


def _opened_by_hand(paths: Paths, name: str) -> bool:
    """Somebody opened every member under its name, with cryptsetup and the recovery key perhaps."""
    group = State.load(paths).groups.get(name)
    if not group or any(devices.mapping_of(each.uuid) != each.name for each in group.members):
        return False
    this_boot.mark_open(paths, name, [each.name for each in group.members])
    this_boot.unmark(paths, "failed-groups", name)
    return True


def open_group(paths: Paths, name: str, *recovery: Secret) -> None:
    """Opens and mounts a group whose disks are all here, at once; one that is open already is mounted.

    With recovery keys, headers are authenticated by them, and no other key is needed. Raises Usage, NoKey,
    Tampered, NotOurs for a wrong key, UnlockError with what is missing.
    """
    state = State.load(paths)
    if name not in state.groups:
        raise Usage(f"there is no group {name}", "unlock status")
    if not _opened_by_hand(paths, name):
        record = report.Report(f"open {name}")
        unwrap = _by_recovery_key(*recovery) if recovery else unwrapper(paths, name, record, report.now())
        monitor = devices.Monitor()
        activation.open_present(activation.Opening(state.host, unwrap, record, name), monitor)
        this_boot.write_report(paths, record, f"open-{name}.json")
        if not _is_open(record, name):
            raise _trouble(paths, record, name)
        this_boot.mark_open(paths, name, record.groups[name]["mappings"])
        this_boot.unmark(paths, "failed-groups", name)
    settings = config.load(paths.config).groups.get(name)
    if units.is_systemd_running() and paths.root == "/":
        units.start_group(name, settings.mount if settings else "")


def _by_recovery_key(*recovery: Secret) -> activation.Unwrap:
    return lambda header, token: disk_keys.by_checked_recovery_key(header, token, *recovery)


def _trouble(paths: Paths, record: report.Report, name: str) -> UnlockError:
    """The worst of what its disks say."""
    message, hint = _why(paths, record, name)
    outcomes = {each["outcome"] for each in record.disks.values()}
    if "tampered" in outcomes:
        return Tampered(message, hint)
    if "no-key" in outcomes:
        hint = "give the key before it as well: --recovery-key-file twice" if "waiting" in outcomes else hint
        return NotOurs(message, hint, "no-key")
    return UnlockError(message, hint, "group-incomplete")


def heal(paths: Paths) -> int:
    """For each failed group that could open now: its gate again, its mount, then what had waited for them."""
    protect()
    with open(paths.of_this_boot("heal.lock"), "w") as lock:  # one at a time; who waited sees what the other did
        fcntl.flock(lock, fcntl.LOCK_EX)
        try:
            return _heal(paths)
        finally:
            fcntl.flock(lock, fcntl.LOCK_UN)  # a reader that a device holds has the file open too


def _heal(paths: Paths) -> int:
    for name in this_boot.failed_groups(paths):
        record = report.Report(f"heal {name}")
        try:
            groups = activation.Opening(State.load(paths).host, unwrapper(paths, name, record, 0), record, name)
        except UnlockError as error:
            log.error(f"group {name}: {error}", error.hint)
            continue
        for found in devices.marked():
            groups.saw(found)
        groups.read_all()
        ready = groups.ready(name)
        groups.wipe()
        if not ready:
            continue
        waiting = _waiting(paths, name)
        settings = config.load(paths.config).groups.get(name)
        try:
            run(["systemctl", "start", units.gate_unit(name)])
            if settings and settings.mount:
                run(["systemctl", "start", "--no-block", units.mount_unit(settings.mount)])
            if waiting:
                run(["systemctl", "start", "--no-block", *waiting])
        except CommandFailed as error:
            log.error(f"group {name}: {error}", f"systemctl status {units.gate_unit(name)}")
    return 0


def unwrapper(
    paths: Paths,
    name: str,
    record: report.Report,
    end: float,
    look: find.Look = find.look,
    connect: access.Connect = access.connect,
) -> activation.Unwrap:
    """What gives the volume keys of a group's disks. Asks a provider, where it may, until `end` (report.now()).

    Raises NoKey, ProviderError, Refused.
    """
    state = State.load(paths)
    group = state.groups.get(name)
    try:
        persistence = keyring.get("unlock:persistence")
    except NoKey as error:
        if group and _may_ask(paths, state, group):
            return _from_provider(paths, state, group, record, end, look, connect)
        early = _early_verdict(paths)
        raise NoKey(f"group {name}: no key: {early}", "reboot and type the recovery key") from error
    if group and group.policy == "provider":
        _await_kek(paths, group, end, look, connect)

    def unwrap(header: luks.Header, token: Token) -> Secret:
        try:
            return disk_keys.volume_key(header, token, persistence)
        except NoKey:
            with keyring.get(access.cache_name(token.kek_id, token.kek_generation)) as kek:
                return disk_keys.by_kek(header, token, kek)

    return unwrap


def _await_kek(paths: Paths, group: Group, end: float, look: find.Look, connect: access.Connect) -> None:
    """The KEK that only the provider keeps is in the cache. Raises ProviderError at the end, NoKey."""

    def fetch() -> None:
        with access.Work(paths, look, connect) as work:
            kek, source = access.find_kek(work, group)
            with kek:
                this_boot.cache_keys(paths, source, {access.cache_name(group.kek, group.generation): kek})

    _until(end, fetch)


def _may_ask(paths: Paths, state: State, group: Group) -> bool:
    """Without the persistence key: data groups alone, and only as the operator has set it."""
    allowed = config.load(paths.config).sync.open_from_provider_after_refusal or not state.persistent
    return allowed and not any(member.name in devices.names_below("/") for member in group.members)


def _from_provider(
    paths: Paths,
    state: State,
    group: Group,
    record: report.Report,
    end: float,
    look: find.Look,
    connect: access.Connect,
) -> activation.Unwrap:
    """The KEK is used here and goes nowhere. The header is authenticated by it as ever."""
    keks: dict[tuple[str, int], Secret] = {}
    opens = access.OPENS - config.load(paths.config).sync.drop_on

    def kek_of(kek_id: str, generation: int) -> Secret:
        if (kek_id, generation) not in keks:
            entry = state.provider_of(kek_id)
            with closing(connect(paths, state, None, entry)) as provider:
                keks[kek_id, generation] = provider.fetch(access.key_ref(entry, kek_id, "").id, opens)
        return keks[kek_id, generation]

    def unwrap(header: luks.Header, token: Token) -> Secret:
        return disk_keys.by_kek(header, token, kek_of(token.kek_id, token.kek_generation))

    _until(end, lambda: kek_of(group.kek, group.generation))
    record.event("opened-from-provider", f"{group.name}: {_early_verdict(paths)}")
    record.facts["opened_from_provider"] = group.name
    log.note(f"group {group.name}: opened from the key manager after: {_early_verdict(paths)}")
    return unwrap


def _until(end: float, ask: Callable[[], object]) -> None:
    """Asks again while the provider is only away; the network may come yet. Raises ProviderError at the end."""
    while True:
        try:
            ask()
            return
        except (ProviderUnavailable, ClockWrong):
            if report.now() + RETRY > end:
                raise
            time.sleep(RETRY)


def _early_verdict(paths: Paths) -> str:
    early = this_boot.read_early_report(paths)
    if early is None:
        return "early boot left no report"
    if early["verdict"] == "unsealed":
        return "early boot did not hand its keys over"
    return str(early["detail"] or report.VERDICTS.get(early["verdict"], early["verdict"]))


def _is_open(record: report.Report, name: str) -> bool:
    return record.groups.get(name, {}).get("outcome") == "open"


def _why(paths: Paths, record: report.Report, name: str) -> tuple[str, str]:
    """Message and hint: the members that are missing or failed."""
    group = State.load(paths).groups.get(name)
    if group is None:
        return f"there is no group {name}", "unlock status"
    outcomes = {entry.get("uuid"): entry for entry in record.disks.values()}
    parts = []
    for member in group.members:
        entry = outcomes.get(member.uuid)
        if entry is None:
            parts.append(f"{member.name} (serial {member.serial or 'unknown'}) is missing")
        elif entry["outcome"] not in ("waiting", "opened", "already-open", "closed-again"):
            parts.append(f"{member.name} ({entry['node']}): {entry['detail'] or report.OUTCOMES[entry['outcome']]}")
    return f"group {name} is not open: " + ("; ".join(parts) or "it did not open in time"), "unlock status"


def _mark_failed(paths: Paths, name: str) -> None:
    """Notes what waits for this group now: these are the units that fail by dependency in a moment."""
    waiting: list[str] = []
    mount = ""
    try:
        settings = config.load(paths.config).groups.get(name)
        if settings and settings.mount:
            mount = units.mount_unit(settings.mount)
            jobs = run(["systemctl", "list-jobs", "--no-legend", "--plain"])
            queued = {line.split()[1] for line in jobs.splitlines() if len(line.split()) > 2}
            waiting = sorted(queued & _dependents(mount))
    except UnlockError as error:
        what = f"group {name}: what waits for it will not start with it: {error}"
        log.error(what, f"systemctl list-dependencies --reverse {mount or units.gate_unit(name)}")
    if name in this_boot.failed_groups(paths):
        waiting = sorted({*waiting, *_waiting(paths, name)})
    this_boot.mark_failed(paths, name, waiting)


def _dependents(unit: str) -> set[str]:
    """Units that require `unit`, and what requires those."""
    found: set[str] = set()
    new = {unit}
    while new:
        found |= new
        listed = run(["systemctl", "show", "-p", "RequiredBy", "-p", "BoundBy", "--value", *sorted(new)])
        new = set(listed.split()) - found
    return found - {unit}


def _waiting(paths: Paths, name: str) -> list[str]:
    with open(os.path.join(paths.of_this_boot("failed-groups"), name), "rb") as file:
        units: list[str] = json.load(file)
    return units
