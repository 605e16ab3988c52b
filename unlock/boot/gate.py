# SPDX-License-Identifier: Apache-2.0
"""The real root: opens each group at its gate, on request, or when a late disk completes it.

    gate(G)         unlock-group@G runs it: returns when the group is open, raises at its deadline
    open_group(G)   `unlock open`: opens the group at once, with the disks that are here

Where its policy allows it, a group is opened without all of its members, after its patience; by hand, at once. Who was
away is in the state before the group is marked as open, and so before it is mounted: a btrfs is never opened again with
a disk that lacks what the others have, until that is healed (operations/heal_group.py).
    heal()          udev starts it for a new disk, a sync for a new key: runs failed gates again that can succeed now

The volume keys are unwrapped with keys from the key cache, or by the recovery key. The provider is asked only for
groups whose KEK it alone keeps and, if the operator's `open_from_provider_after_refusal` allows it, for data groups
after a boot that the TPM refused. In that case no key is cached, and nothing is sealed or written.
"""

import fcntl
import json
import os
import random
import shlex
import time
from collections.abc import Callable, Sequence
from contextlib import closing

from .. import journald, log, messages
from ..disks import devices, disk_keys, find, forget, luks, spoofed, udev
from ..disks.groups import Away, Group
from ..disks.header import Header
from ..disks.token import Token
from ..errors import (
    ClockWrong,
    CommandFailed,
    NoKey,
    NotOurs,
    ProviderProtocol,
    ProviderUnavailable,
    Tampered,
    UnlockError,
    Usage,
)
from ..host import config, keyring, report, this_boot, units
from ..host.journal import DiskDecryption, DiskEncryption, Rebind
from ..host.lock import exclusive, try_lock
from ..host.state import State
from ..keys import access, rotation
from ..paths import Paths
from ..protect import protect
from ..run import run
from ..secret import Secret
from .activation import ACTIVATION_TIMEOUT, GroupOpener, Unwrap, open_present, run_once, wait_readable
from .degraded import look_again
from .pauses import SHORTEST, SharedPause, pause_before_retry

_POLL = 0.2
"""Seconds between two looks whether the gate that asks the provider has the key."""

_PASSING = (ProviderUnavailable, ProviderProtocol, ClockWrong)
"""Errors of a provider that is unreachable or just coming up: the network may be too."""


ANY_DISK = "sync"
"""The instance of unlock-heal@ that a sync starts: a key is new, not a disk."""


def gate(paths: Paths, name: str) -> int:
    """Waits for the group's members and opens it. Raises UnlockError with what is missing."""
    protect()
    try:
        return _gate(paths, name)
    except UnlockError as error:
        this_boot.is_news(paths, name, _name_group(name, error))
        raise


def _name_group(name: str, error: UnlockError) -> str:
    """The message, which begins with the group."""
    message = str(error)
    return message if message.startswith(f"group {name}") else f"group {name}: {message}"


def _gate(paths: Paths, name: str) -> int:
    settings = config.load(paths.config).group(name)
    began = report.now()
    end = began + (settings.deadline if settings else config.DEADLINE)
    degraded_from = None
    if settings and settings.degraded == "allow" and name in State.load(paths).groups:
        degraded_from = min(began + settings.degraded_after, end)
    _close_left_out(paths, name)
    if _is_open_already(paths, name):
        return 0
    record = report.Report(f"gate {name}")
    monitor = udev.Monitor()
    _bring_on_disks_that_were_away(paths)
    try:
        unwrap = make_unwrap(paths, name, record, end)
    except UnlockError:
        _mark_failed(paths, name)
        raise
    opener = _opener(State.load(paths), name, unwrap, record)
    _open_until(opener, monitor, name, end, degraded_from)
    if not _is_open(record, name):
        _mark_failed(paths, name)
        done = run_once(opener, monitor, list_disks=True)
        while not done and report.now() < end + ACTIVATION_TIMEOUT:
            wait_readable(opener.worker_fds(), 0.05)
            done = run_once(opener, monitor, list_disks=False)
    opener.stop(ACTIVATION_TIMEOUT)
    opener.wipe()
    this_boot.write_report(paths, record, f"gate-{name}.json")
    if not _is_open(record, name):
        raise UnlockError(*_explain_failure(paths, record, name, opener.why_not_enough(name)), code="group-incomplete")
    _refuse_active_copies(paths, name, record.groups[name].mappings)
    if _put_in_service(paths, opener, name):
        words = describe_degraded(State.load(paths), name, record.groups[name].mappings)
        log.console(words)
        log.error(words, f"unlock group heal {name}")
    return 0


def _put_in_service(paths: Paths, opener: GroupOpener, name: str) -> bool:
    """Marks a group as open, so that it can be mounted. True if it lacks members: who they are is in the state first.
    Closes the group again, and raises UnlockError, where that cannot be written."""
    row = opener.report.groups[name]
    is_degraded = row.outcome == "degraded"
    group = State.load(paths).groups.get(name)
    if is_degraded or (group and group.away):
        try:
            _record_away(paths, row)
        except (UnlockError, OSError) as error:
            opener.close_all()
            words = f"group {name} stays closed: who is away cannot be written down: {error}"
            raise UnlockError(words, "unlock check", "group-incomplete") from error
    this_boot.mark_open(paths, name, row.mappings, row if is_degraded else None)
    this_boot.unmark(paths, "failed-groups", name)
    if is_degraded:
        words = describe_degraded(State.load(paths), name, row.mappings)
        journald.record(paths, messages.GROUP_DEGRADED, words, group=name)
        _bring_up(row)
    return is_degraded


def _bring_up(row: report.GroupRow) -> None:
    """Has what lies on the members that are here start without the others: LVM and md are told to, and udev looks at
    each mapping again, as systemd waits for all devices of a btrfs else. Best effort: what depends on it says more."""
    nodes = [f"/dev/mapper/{name}" for name in row.mappings]
    of_these = " || ".join(f"pv_name={node}" for node in nodes)
    arrays = sorted({array for node in nodes for array in devices.holders(node)})
    commands = {
        "btrfs": [look_again(row.mappings)],
        "LVM2_member": [["vgchange", "--activate", "ay", "--activationmode", "degraded", "--select", of_these]],
        "linux_raid_member": [["mdadm", "--run", array] for array in arrays],
    }
    for command in commands.get(row.kind or "", []):
        try:
            run(command, timeout=60)
        except CommandFailed as error:
            log.error(f"group {row.name}: {error}", shlex.join(command))


def describe_degraded(state: State, name: str, mappings: Sequence[str]) -> str:
    """Which members a group is open without, in words."""
    away = [each for each in state.groups[name].members if each.name not in mappings]
    names = ", ".join(f"{each.name} (serial {each.serial or 'unknown'})" for each in away)
    return f"group {name} is open degraded, without {names}"


def _record_away(paths: Paths, row: report.GroupRow) -> bool:
    """Writes into the state without whom a group was opened; and that nobody is away, where all of md, LVM or ZFS are
    here: those mend themselves. False where the state says so already. Raises Refused, OSError."""
    with exclusive(paths):
        state = State.load(paths)
        group = state.groups[row.name]
        known = {each.uuid: each for each in group.away}
        missing = [each for each in group.members if each.name not in row.mappings]
        new = tuple(known.get(each.uuid, Away(each.uuid, row.kind or "", row.generation or 0)) for each in missing)
        if new == group.away:
            return False
        state.groups[row.name] = group._replace(away=new)
        state.save()
        return True


def record_early_groups(paths: Paths) -> None:
    """Writes down who was away when early boot opened a group degraded: it has no state. Logs what fails."""
    opened = this_boot.open_groups(paths)
    for name, row in this_boot.degraded_groups(paths).items():
        try:
            state = State.load(paths)
            if name in state.groups and name in opened:
                mappings = tuple(sorted(opened[name]))
                if _record_away(paths, row._replace(mappings=mappings)):
                    log.error(describe_degraded(state, name, mappings), f"unlock group heal {name}")
        except (UnlockError, OSError) as error:
            log.error(f"group {name}: who is away cannot be written down: {error}", "unlock check")


def _close_left_out(paths: Paths, name: str) -> None:
    """Closes members that early boot has opened with the others, and that were away while the group was written: early
    boot does not know the state. Nothing is mounted before the gate. Raises DiskFailed when one is in use."""
    group = State.load(paths).groups.get(name)
    left_out = group.left_out() if group else frozenset()
    names = [each.name for each in group.members if each.uuid in left_out] if group else []
    opened = [each for each in names if devices.dm_uuid(each) is not None]
    if not group or not opened or devices.mount_points_on({each.name for each in group.members}):
        return
    this_boot.unmark(paths, "open", name)
    for each in opened:
        forget.forget_file_system(each)
        luks.deactivate(each)


def _refuse_active_copies(paths: Paths, name: str, mappings: Sequence[str]) -> None:
    """Raises Tampered when another physical volume with the UUID of the group's is in use: what is mounted by a logical
    volume's name would lie on that one."""
    if copies := spoofed.find_active_volumes(mappings):
        nodes = ", ".join(each.node for each in copies)
        words = f"group {name}: {nodes} has the LVM UUID of its disks, and its volume group is active"
        this_boot.mark_spoofed(paths, name, words)
        _mark_failed(paths, name)
        raise Tampered(words, f"vgchange -an; take {nodes} out; then: systemctl start unlock-group@{name}", "spoofed")
    this_boot.unmark(paths, "spoofed", name)


def _open_until(opener: GroupOpener, monitor: udev.Monitor, name: str, end: float, degraded_from: float | None) -> None:
    """Opens disks as they appear until the group is open, has failed, or `end` (report.now()) has come. From
    `degraded_from` on, or when nobody else is expected, it is opened without all of its members."""
    list_disks = True
    while not _is_open(opener.report, name) and not opener.has_failed(name):
        done = run_once(opener, monitor, list_disks=list_disks)
        list_disks = False
        if done and degraded_from is not None:
            expects_nobody = opener.expected_uuids <= opener.present_uuids(name)
            if expects_nobody or report.now() >= degraded_from:
                done = not opener.start_degraded(name, settled=True)
        if report.now() >= end and not opener.is_opening(name):
            return
        if not _is_open(opener.report, name):
            fds = [monitor.fileno(), *opener.worker_fds()]
            until = end if degraded_from is None or report.now() >= degraded_from else degraded_from
            wait_readable(fds, min(1.0, until - report.now()) if done else 0.05)


def _is_open_already(paths: Paths, name: str) -> bool:
    """Whether every member has its mapping already, opened by hand perhaps; or, where it was opened degraded, those
    that were here then. The group is marked open. Raises Tampered."""
    group = State.load(paths).groups.get(name)
    if not group:
        return False
    if row := this_boot.degraded_groups(paths).get(name):
        has = sorted(this_boot.open_groups(paths).get(name, ()))
        if not has or any(devices.dm_uuid(each) is None for each in has):
            return False
        this_boot.mark_open(paths, name, has, row)
        return True
    if group.left_out() or any(devices.active_mapping_name(each.uuid) != each.name for each in group.members):
        return False
    mappings = [each.name for each in group.members]
    _refuse_active_copies(paths, name, mappings)
    if group.away:
        _record_away(paths, report.GroupRow(name, "open", mappings=tuple(mappings)))
    this_boot.mark_open(paths, name, mappings)
    this_boot.unmark(paths, "failed-groups", name)
    return True


def open_group(paths: Paths, name: str, *recovery: Secret, degraded: bool = False) -> str:
    """Opens and mounts a group whose disks are all here, with `degraded` one that lacks some; mounts one that is open
    already. Returns what it lacks, in words; '' if nothing.

    With recovery keys, headers are authenticated by them, and no other key is needed. Raises Usage, NoKey,
    Tampered, NotOurs for a wrong key, UnlockError with what is missing.
    """
    state = State.load(paths)
    if name not in state.groups:
        raise Usage(f"there is no group {name}", "unlock status")
    settings = config.load(paths.config).group(name)
    _close_left_out(paths, name)
    if not _is_open_already(paths, name):
        record = report.Report(f"open {name}")
        unwrap = _by_recovery_key(*recovery) if recovery else make_unwrap(paths, name, record, report.now())
        monitor = udev.Monitor()
        opener = _opener(state, name, unwrap, record)
        open_present(opener, monitor, [name] if degraded else [])
        this_boot.write_report(paths, record, f"open-{name}.json")
        if not _is_open(record, name):
            raise _make_error(paths, record, name, opener.why_not_enough(name))
        _put_in_service(paths, opener, name)
        if recovery:
            words = f"group {name} was opened by the recovery key"
            journald.record(paths, messages.RECOVERY_KEY_USED, words, group=name)
    if units.is_systemd_running() and paths.root == "/":
        units.start_group(name, settings.mount if settings else "")
    if name not in this_boot.degraded_groups(paths):
        return ""
    return describe_degraded(State.load(paths), name, sorted(this_boot.open_groups(paths)[name]))


def _opener(state: State, name: str, unwrap: Unwrap, record: report.Report) -> GroupOpener:
    group = state.groups.get(name)
    unwrap = _refuse_put_back(state, unwrap)
    forgotten = frozenset(state.forgotten)
    if not group:
        return GroupOpener(state.host, unwrap, record, only=name, forgotten=forgotten)
    return GroupOpener(
        state.host,
        unwrap,
        record,
        only=name,
        members=group.members,
        manifest=group.manifest,
        left_out=group.left_out(),
        forgotten=forgotten,
    )


def _refuse_put_back(state: State, unwrap: Unwrap) -> Unwrap:
    """The same, but raises Tampered for a header that says that its disk is half in clear when the journal does not:
    the recovery key and the KEK, unlike the persistence key, are what they were then."""
    entry = state.journal.before if isinstance(state.journal, Rebind) else state.journal
    moving = entry.member.uuid if isinstance(entry, DiskEncryption | DiskDecryption) else ""

    def checked(header: Header, token: Token) -> Secret:
        if header.uuid != moving and disk_keys.is_half_in_clear(header, token):
            raise Tampered(
                "its header is from the time when the disk was half in clear",
                f"a later one: cryptsetup luksHeaderRestore {header.device} --header-backup-file FILE",
            )
        return unwrap(header, token)

    return checked


def _by_recovery_key(*recovery: Secret) -> Unwrap:
    return lambda header, token: disk_keys.dek_by_checked_recovery_key(header, token, *recovery, in_clear=True)


def _make_error(paths: Paths, record: report.Report, name: str, why_not: str = "") -> UnlockError:
    """The error for a group that did not open: the worst outcome of its disks."""
    message, hint = _explain_failure(paths, record, name, why_not)
    outcomes = {each.outcome for each in record.disks.values()}
    if outcomes & {"tampered", "altered"}:
        return Tampered(message, hint)
    if "no-key" in outcomes:
        hint = "give the key before it as well: --recovery-key-file twice" if "waiting" in outcomes else hint
        return NotOurs(message, hint, "no-key")
    return UnlockError(message, hint, "group-incomplete")


def heal(paths: Paths, disk: str) -> int:
    """Starts, for each failed group whose members are all here, its gate, its mount, and the units that had waited.
    Looks only at the group that a disk which appeared is a member of. `disk`: its kernel name, or ANY_DISK."""
    protect()
    _bring_on_disks_that_were_away(paths)
    with open(paths.of_this_boot("heal.lock"), "w") as lock:  # one at a time: the second sees what the first did
        fcntl.flock(lock, fcntl.LOCK_EX)
        try:
            for name in _groups_to_heal(paths, disk):
                _heal_group(paths, name)
            return 0
        finally:
            fcntl.flock(lock, fcntl.LOCK_UN)  # a worker whose device hangs has the file open too


def _bring_on_disks_that_were_away(
    paths: Paths, look: find.Look = find.look, connect: access.Connect = access.connect
) -> None:
    """Brings disks that are back under the persistence key that was made while they were away: a gate knows that one
    alone. Does nothing unless one was made. Logs what fails: a sync tries again."""
    try:
        if not State.load(paths).has_old_keys:
            return
        with exclusive(paths), access.Work(paths, look, connect) as work:
            for outcome in rotation.catch_up_disks(work):
                for disk, why in outcome.behind.items():
                    log.error(f"{disk}: {why}", "unlock sync")
    except UnlockError as error:
        log.error(f"disks that were away: {error}", error.hint or "unlock sync")


def _groups_to_heal(paths: Paths, disk: str) -> list[str]:
    """The failed groups that this disk may have completed: that of which it is a member, by its LUKS UUID. All of them
    where that cannot be told."""
    failed = this_boot.failed_groups(paths)
    if disk == ANY_DISK or not failed:
        return failed
    try:
        uuids = {udev.file_system(each.node).uuid for each in udev.luks2_disks() if each.sysname == disk}
        groups = State.load(paths).groups
    except UnlockError:
        return failed
    return [name for name in failed if name in groups and uuids & {each.uuid for each in groups[name].members}]


def _heal_group(paths: Paths, name: str) -> None:
    """Starts a failed group that is complete. Logs what keeps it closed, once."""
    record = report.Report(f"heal {name}")
    try:
        unwrap = make_unwrap(paths, name, record, 0)
        opener = _opener(State.load(paths), name, unwrap, record)
    except UnlockError as error:
        _log_once(paths, name, error, error.hint)
        return
    for disk in udev.luks2_disks():
        opener.add_disk(disk)
    opener.read_headers()
    complete = opener.is_complete(name) or _may_go_on_degraded(paths, opener, name)
    opener.wipe()
    if not complete:
        return
    waiting = _read_waiting_units(paths, name)
    try:
        settings = config.load(paths.config).group(name)
        run(["systemctl", "start", units.gate_unit(name)])
        if settings and settings.mount:
            run(["systemctl", "start", "--no-block", units.mount_unit(settings.mount)])
        if waiting:
            run(["systemctl", "start", "--no-block", *waiting])
    except UnlockError as error:
        _log_once(paths, name, error, error.hint or f"systemctl status {units.gate_unit(name)}")


def _log_once(paths: Paths, name: str, error: UnlockError, hint: str) -> None:
    message = _name_group(name, error)
    if this_boot.is_news(paths, name, message):
        log.error(message, hint)


def _may_go_on_degraded(paths: Paths, opener: GroupOpener, name: str) -> bool:
    """Whether its gate would open a group without those that were away."""
    try:
        settings = config.load(paths.config).group(name)
    except UnlockError:
        return False
    allowed = settings is not None and settings.degraded == "allow"
    return allowed and opener.expected_uuids <= opener.present_uuids(name)


def make_unwrap(
    paths: Paths,
    name: str,
    record: report.Report,
    end: float,
    look: find.Look = find.look,
    connect: access.Connect = access.connect,
) -> Unwrap:
    """A function that unwraps the volume keys of a group's disks. Asks a provider, where it may, until `end`
    (report.now()).

    Raises NoKey, ProviderError, Refused.
    """
    state = State.load(paths)
    group = state.groups.get(name)
    try:
        persistence = keyring.get("unlock:persistence")
    except NoKey as error:
        if group and _may_ask_provider(paths, state, group):
            return _make_provider_unwrap(paths, state, group, record, end, connect)
        raise NoKey(f"group {name}: no key: {_explain_missing_key(paths)}", f"unlock open {name} --recovery") from error
    if group and group.policy == "provider" and not _is_cached(group):
        _await_kek(paths, group, end, look, connect)

    def unwrap(header: Header, token: Token) -> Secret:
        try:
            return disk_keys.unwrap_volume_key(header, token, persistence)
        except NoKey:
            with keyring.get(access.cache_name(token.kek_id, token.kek_generation)) as kek:
                return disk_keys.unwrap_by_kek(header, token, kek)

    return unwrap


def _await_kek(paths: Paths, group: Group, end: float, look: find.Look, connect: access.Connect) -> None:
    """Gets the KEK that only the provider keeps into the key cache. One gate of this host at a time asks a provider, on
    one connection and for all such groups of it; the gates share the pauses in between. Raises ProviderError at the
    end, NoKey, Refused."""
    began = report.now()
    name = State.load(paths).provider_of(group.kek).name
    failed: UnlockError = ProviderUnavailable(
        f"group {group.name}: another gate asks provider {name} and has no answer", "unlock provider test"
    )
    fd = os.open(paths.of_this_boot(f"provider-{name}.lock"), os.O_RDWR | os.O_CREAT, 0o600)
    with open(fd, "r+b", buffering=0):
        before = SharedPause.read(fd)
        while not _is_cached(group):
            if try_lock(fd):
                try:
                    pause = SharedPause.read(fd)
                    if report.now() >= end and pause != before:  # somebody asked since, for this group too
                        raise failed
                    if report.now() >= min(pause.until, end):
                        failed = _try_once(paths, group, end, look, connect, fd) or failed
                finally:
                    fcntl.flock(fd, fcntl.LOCK_UN)  # a worker whose device hangs has the file open too
            elif report.now() >= max(end, began + config.TIMEOUT):
                raise failed
            if not _is_cached(group):
                time.sleep(_POLL)


def _try_once(
    paths: Paths, group: Group, end: float, look: find.Look, connect: access.Connect, fd: int
) -> UnlockError | None:
    """Asks the provider for the KEKs; returns the error after which it may be asked again. Raises ProviderError when
    there is no time for that, NoKey. `fd`: of the lock."""
    began = report.now()
    try:
        _fetch_keks(paths, group, look, connect)
    except _PASSING as error:
        now, tries = report.now(), SharedPause.read(fd).tries + 1
        pause = pause_before_retry(tries=tries, took=now - began, left=end - now, random=random.random())
        SharedPause(tries, now + (SHORTEST if pause is None else pause)).write(fd)
        if pause is None:
            raise
        return error
    SharedPause(0, 0.0).write(fd)
    return None


def _fetch_keks(paths: Paths, group: Group, look: find.Look, connect: access.Connect) -> None:
    """Caches the KEK of the group, and those of other groups that only the same provider keeps. What fails for another
    group is for its own gate to tell. Raises ProviderError, NoKey, when all were tried."""
    failed: UnlockError | None = None
    with access.Work(paths, look, connect) as work:
        entry = work.state.provider_of(group.kek)
        try:
            _cache_kek(work, group)
        except UnlockError as error:
            failed = error
        for other in work.state.groups.values():
            if other.policy != "provider" or other.name == group.name or _is_cached(other):
                continue
            try:
                if work.state.provider_of(other.kek) == entry:
                    _cache_kek(work, other)
            except UnlockError:
                continue
    if failed:
        raise failed


def _cache_kek(work: access.Work, group: Group) -> None:
    kek, source = access.find_kek(work, group)
    with kek:
        this_boot.cache_keys(work.paths, source, {access.cache_name(group.kek, group.generation): kek})


def _is_cached(group: Group) -> bool:
    return access.cache_name(group.kek, group.generation) in keyring.names()


def _may_ask_provider(paths: Paths, state: State, group: Group) -> bool:
    """Whether the provider may open the group without the persistence key: a data group, if the operator allows it."""
    allowed = config.load(paths.config).sync.open_from_provider_after_refusal or not state.persistent
    return allowed and not any(member.name in devices.mappings_below("/") for member in group.members)


def _make_provider_unwrap(
    paths: Paths,
    state: State,
    group: Group,
    record: report.Report,
    end: float,
    connect: access.Connect,
) -> Unwrap:
    """A function that unwraps by a KEK fetched from the provider, which is not cached; it authenticates the header."""
    keks: dict[tuple[str, int], Secret] = {}
    opens = access.OPENS - config.load(paths.config).sync.drop_on

    def fetch_kek(kek_id: str, generation: int) -> Secret:
        if (kek_id, generation) not in keks:
            entry = state.provider_of(kek_id)
            with closing(connect(paths, state, None, entry)) as provider:
                keks[kek_id, generation] = provider.fetch(access.key_ref(entry, kek_id, "").id, opens)
        return keks[kek_id, generation]

    def unwrap(header: Header, token: Token) -> Secret:
        return disk_keys.unwrap_by_kek(header, token, fetch_kek(token.kek_id, token.kek_generation))

    _retry_until(end, lambda: fetch_kek(group.kek, group.generation))
    record.add_event("opened-from-provider", f"{group.name}: {_explain_missing_key(paths)}")
    record.facts = record.facts._replace(opened_from_provider=group.name)
    log.note(f"group {group.name}: opened from the key manager after: {_explain_missing_key(paths)}")
    return unwrap


def _retry_until(end: float, ask: Callable[[], object]) -> None:
    """Asks again after errors that may pass. Raises ProviderError at the end."""
    tries = 0
    while True:
        began = report.now()
        try:
            ask()
            return
        except _PASSING:
            tries += 1
            now = report.now()
            pause = pause_before_retry(tries=tries, took=now - began, left=end - now, random=random.random())
            if pause is None:
                raise
            time.sleep(pause)


def _explain_missing_key(paths: Paths) -> str:
    """Why early boot left no persistence key."""
    early = this_boot.read_early_report(paths)
    if early is None:
        return "early boot left no report"
    if early.verdict == "unsealed":
        return "early boot did not hand its keys over"
    return early.describe_verdict()


def _is_open(record: report.Report, name: str) -> bool:
    return record.group_outcome(name) in report.GROUP_OPEN


def _explain_failure(paths: Paths, record: report.Report, name: str, why_not: str = "") -> tuple[str, str]:
    """Message and hint, which name the members that are missing or failed. `why_not`: why the others do not suffice."""
    group = State.load(paths).groups.get(name)
    if group is None:
        return f"there is no group {name}", "unlock status"
    rows = {row.uuid: row for row in record.disks.values()}
    parts = []
    hint = "unlock status"
    for member in group.members:
        row = rows.get(member.uuid)
        if row is None:
            if udev.unmarked_disks():
                hint = f"udevadm trigger --settle --subsystem-match=block; then unlock open {name}"
            parts.append(f"{member.name} (serial {member.serial or 'unknown'}) is missing")
        elif row.outcome not in ("waiting", "closed-again", *report.OPEN):
            parts.append(f"{member.name} ({row.node}): {row.describe()}")
    if why_not:
        parts.append(why_not)
    elif hint == "unlock status" and {row.outcome for row in rows.values()} - {"was-away"} == {"waiting"}:
        hint = f"unlock open {name} --degraded"
    return f"group {name} is not open: " + ("; ".join(parts) or "it did not open in time"), hint


def _mark_failed(paths: Paths, name: str) -> None:
    """Records the units that wait for this group now and are about to fail by dependency."""
    waiting: list[str] = []
    mount = ""
    try:
        settings = config.load(paths.config).group(name)
        if settings and settings.mount:
            mount = units.mount_unit(settings.mount)
            jobs = run(["systemctl", "list-jobs", "--no-legend", "--plain"])
            queued = {line.split()[1] for line in jobs.splitlines() if len(line.split()) > 2}
            waiting = sorted(queued & _dependents(mount))
    except UnlockError as error:
        what = f"group {name}: what waits for it will not start with it: {error}"
        log.error(what, f"systemctl list-dependencies --reverse {mount or units.gate_unit(name)}")
    if name in this_boot.failed_groups(paths):
        waiting = sorted({*waiting, *_read_waiting_units(paths, name)})
    this_boot.mark_failed(paths, name, waiting)


def _dependents(unit: str) -> set[str]:
    """Units that require `unit`, directly or through others."""
    found: set[str] = set()
    new = {unit}
    while new:
        found |= new
        listed = run(["systemctl", "show", "-p", "RequiredBy", "-p", "BoundBy", "--value", *sorted(new)])
        new = set(listed.split()) - found
    return found - {unit}


def _read_waiting_units(paths: Paths, name: str) -> list[str]:
    """The units that waited for a failed group."""
    with open(os.path.join(paths.of_this_boot("failed-groups"), name), "rb") as file:
        units: list[str] = json.load(file)
    return units
