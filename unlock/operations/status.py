# SPDX-License-Identifier: Apache-2.0
"""`unlock status`: groups and disks, their states, and where each key would come from now.

`read_status` collects everything once and changes nothing; `to_json` and `to_text` give it to scripts and to people.
`unlock status --boot` prints the report of early boot (host.report) as a timeline.
"""

import calendar
import time
from contextlib import suppress
from typing import Any, NamedTuple

from .. import initramfs, log
from ..disks import arrays, devices, disk_keys, find, luks, spoofed, token, udev
from ..disks.arrays import Array
from ..disks.groups import Group, Member
from ..errors import Malformed, NoKey, NotOurs, UnlockError
from ..host import config, keyring, report, report_file, this_boot
from ..host.journal import IN_CLEAR, StoredKeysRemoval, disks_in_clear
from ..host.provider_entry import days_left
from ..host.state import State
from ..paths import Paths
from ..secret import Secret
from . import policy, under_way
from .dump.kept import list_dumps
from .dump.kernel import KernelProtection, read_kernel_protection
from .dump.protection import Protection, read_protection

CERTIFICATE_DAYS = 30
"""Days before the end of a client certificate from which on there is a warning."""
WINDOW_DAYS = 7
"""Days after which an open window is taken for forgotten."""
_GOOD_SYNCS = frozenset(("unchanged", "replaced", "caught-up", "finished", "cached", "persistent"))
"""Outcomes of a sync that need no warning."""


class DiskStatus(NamedTuple):
    """One member of a group."""

    name: str
    uuid: str
    serial: str
    device: str
    """Its node; '' when it is not here."""
    state: str
    """open, closed, missing, or a word of report.OUTCOMES"""
    key: str
    """Where its key would come from now: `key cache`, `provider`, or `recovery key` when nothing else is left before
    the next boot; `-` when it is not here."""


class GroupStatus(NamedTuple):
    name: str
    state: str
    """The worst of its disks'; spoofed when other disks pass for them, degraded when it is open without all of them, or
    an array on them is."""
    mount: str
    """Its mount point in unlock.toml, or ''."""
    mounted: list[str]
    """Where its file systems are mounted now."""
    kek_id: str
    kek_generation: int
    policy: str
    behind: list[str]
    """Names of members whose token may still hold an earlier KEK."""
    spoofed: str
    """What passes for its disks, in words; ''."""
    degraded: str
    """`allow` or `never`: whether a boot opens it without all of its disks."""
    away: list[str]
    """Names of members without which it was opened, and that are not healed yet."""
    arrays: list[Array]
    """Of md, on its disks, that lack some."""
    disks: list[DiskStatus]

    def describe_mount(self) -> str:
        """In words: where it is mounted, and where unlock.toml would mount it if that is another place."""
        now = ", ".join(self.mounted)
        if not self.mount or self.mount in self.mounted:
            return now
        return f"{now} (unlock.toml: {self.mount})" if now else f"not mounted ({self.mount})"


class ProviderStatus(NamedTuple):
    name: str
    kind: str
    certificate_days: int | None
    """Days that its client certificate is still valid; None without one."""
    not_retired: int
    """Replaced keys that are still active there."""

    def describe(self) -> str:
        """In words."""
        days = f", certificate: {self.certificate_days} days left" if self.certificate_days is not None else ""
        return f"{self.name} ({self.kind}){days}"


class WindowStatus(NamedTuple):
    """An open window of the TPM's policy."""

    since: str
    """UTC, ISO 8601"""
    days: int
    """Whole days since then."""
    reboots: int
    """Good boots after which it closes."""


class ForgottenDisk(NamedTuple):
    """A former member that is plugged in."""

    name: str
    group: str
    uuid: str
    device: str

    def describe(self) -> str:
        return (
            f"{self.device} is {self.name}, which was forgotten: group {self.group} does not open it: unlock disk "
            f"erase {self.device}; to use it again, then: unlock disk add {self.device} --group {self.group}"
        )


class Status(NamedTuple):
    """Everything that `unlock status` prints."""

    host: str
    provider_id: str
    providers: list[ProviderStatus]
    """The one in use first."""
    persistent: bool
    sync: dict[str, Any]
    """sync.json as it is: how the last sync of this boot went; empty without one."""
    waiting_to_retire: int
    persistence_key: str
    """Where the persistence key is, in words."""
    recovery_key: str
    boot: report.Report | None
    """The report of early boot."""
    recovery_tested: dict[str, int]
    """LUKS UUID -> when the recovery key last opened the disk, seconds since 1970."""
    recovery_behind: list[str]
    """Names of members that an earlier recovery key opens."""
    operation: under_way.UnderWay | None
    """The operation that runs now or was interrupted."""
    in_clear: list[str]
    """Mapping names of disks whose data is in clear until the operation has ended."""
    narrowed: str
    """What has narrowed a policy, while the new persistence key is still to come; ''."""
    window: WindowStatus | None
    pin: bool
    not_checked: list[int]
    """PCRs that measure kernel, initramfs or command line on this host, and that the TPM's policy leaves out."""
    wrong_settings: list[str]
    """What is wrong in unlock.toml."""
    dumps: Protection
    """Of core dumps and swap."""
    kernel_dumps: KernelProtection
    kept_dumps: int
    groups: list[GroupStatus]
    forgotten: list[ForgottenDisk]
    """Those that are here."""

    @property
    def unfinished(self) -> dict[str, str] | None:
        """`operation` and `about` of the journal entry."""
        now = self.operation
        return {"operation": now.operation, "about": now.about} if now else None


def read_status(paths: Paths, tcti: str = "", look: find.Look = find.look) -> Status:
    """Changes nothing. Without `tcti` the TPM is not asked. A disk that cannot be read is a row, not an error. Raises
    NoKey and others when the host is not initialised."""
    state = State.load(paths)
    settings, wrong_settings = _read_settings(paths)
    try:
        persistence: Secret | None = keyring.get("unlock:persistence")
    except NoKey:
        persistence = None
    present = _read_disks(state.host, persistence)
    spoofed_groups, degraded_groups = this_boot.spoofed_groups(paths), this_boot.degraded_groups(paths)
    groups = []
    for group in state.groups.values():
        setting = settings.groups.get(group.name)
        words = spoofed_groups.get(group.name) or _describe_copies(group)
        mount, policy = (setting.mount, setting.degraded) if setting else ("", config.DEGRADED[0])
        policy = "allow" if group.degraded else policy
        lacking = arrays.find_degraded({each.name for each in group.members}, paths.root)
        groups.append(_group_status(group, mount, words, present, policy, group.name in degraded_groups, lacking))
    return Status(
        host=state.host,
        provider_id=state.provider_id,
        providers=_provider_rows(state),
        persistent=state.persistent,
        sync=this_boot.read_json(paths, "sync.json"),
        waiting_to_retire=len(state.retire),
        persistence_key=_describe_persistence_key(state, persistence),
        recovery_key="made" if state.has_recovery_key else "none yet",
        boot=this_boot.read_early_report(paths),
        recovery_tested=state.recovery.tested,
        recovery_behind=[
            each.name for group in state.groups.values() for each in group.members if _has_old_recovery_key(state, each)
        ],
        operation=under_way.read(paths, state, look),
        in_clear=disks_in_clear(state.journal),
        narrowed=state.narrowed or "",
        window=_window(state),
        pin=state.tpm.pin,
        not_checked=_pcrs_not_checked(paths, tcti) if tcti else [],
        wrong_settings=wrong_settings,
        dumps=read_protection(paths),
        kernel_dumps=read_kernel_protection(paths),
        kept_dumps=len(list_dumps(paths)),
        groups=groups,
        forgotten=_forgotten_disks(state, look),
    )


def _forgotten_disks(state: State, look: find.Look) -> list[ForgottenDisk]:
    seen = look() if state.forgotten else {}
    return [
        ForgottenDisk(former.name, former.group, uuid, each.node)
        for uuid, former in state.forgotten.items()
        for each in seen.get(uuid, ())
    ]


def to_json(found: Status) -> dict[str, Any]:
    """For scripts."""
    return {
        "version": 1,
        "host": found.host,
        "provider": found.provider_id,
        "providers": [
            {
                "name": each.name,
                "kind": each.kind,
                "certificate_days": each.certificate_days,
                "said": each.describe(),
                "left": each.not_retired,
            }
            for each in found.providers
        ],
        "persistence": found.persistent,
        "sync": found.sync,
        "waiting_to_retire": found.waiting_to_retire,
        "keys": {"persistence key": found.persistence_key, "recovery key": found.recovery_key},
        "boot": {
            "verdict": found.boot.verdict if found.boot else "",
            "detail": _describe_boot(found.boot),
            "facts": report_file.facts_to_json(found.boot.facts) if found.boot else {},
        },
        "recovery": {"tested": found.recovery_tested, "behind": found.recovery_behind},
        "unfinished": found.unfinished,
        "to_finish": found.operation.command if found.operation else "",
        "operation": found.operation._asdict() if found.operation else None,
        "in_clear": found.in_clear,
        "narrowed": found.narrowed,
        "window": found.window._asdict() if found.window else None,
        "pin": found.pin,
        "not_checked": found.not_checked,
        "wrong_settings": found.wrong_settings,
        "dumps": {
            "encrypted": found.dumps.encrypted,
            "detail": found.dumps.detail,
            "generation": found.dumps.recipient.generation if found.dumps.recipient else None,
            "kept": found.kept_dumps,
            "plain_swaps": found.dumps.plain_swaps,
            "kernel": found.kernel_dumps._asdict(),
        },
        "groups": [
            {
                "name": group.name,
                "state": group.state,
                "mount": group.mount,
                "mounted": group.mounted,
                "kek": {"id": group.kek_id, "generation": group.kek_generation},
                "policy": group.policy,
                "behind": group.behind,
                "spoofed": group.spoofed,
                "degraded": group.degraded,
                "away": group.away,
                "arrays": [each._asdict() for each in group.arrays],
                "disks": [each._asdict() for each in group.disks],
            }
            for group in found.groups
        ],
        "forgotten": [each._asdict() for each in found.forgotten],
    }


def to_text(found: Status) -> str:
    """For people: facts, warnings, and a table of the disks."""
    verdict = found.boot.verdict if found.boot else ""
    lines = [f"boot      {verdict or 'unknown'}: {_describe_boot(found.boot)}"]
    lines += [f"warning   {text}" for text in _warnings(found)]
    facts = (
        *_describe_operation(found.operation),
        ("key", found.persistence_key),
        ("PIN", "asked for at every boot" if found.pin else "none"),
        ("recovery", found.recovery_key),
        ("provider", found.providers[0].describe()),
        ("sync", _describe_sync(found.sync)),
        ("dumps", f"{found.dumps.detail}; {found.kept_dumps} kept" if found.kept_dumps else found.dumps.detail),
    )
    lines += [f"{name:<9} {text}" for name, text in facts]
    if found.kernel_dumps.device:
        lines.append(f"{'kernel':<9} dumps of it: {found.kernel_dumps.detail}")
    lines += [
        f"left      {each.not_retired} replaced key(s) still active at {each.name}: unlock provider test {each.name}"
        for each in found.providers
        if each.not_retired
    ]
    rows = []
    for group in found.groups:
        for i, each in enumerate(group.disks):
            name, mount = ("", "") if i else (group.name, group.describe_mount())
            rows.append((name, each.name, each.device or "-", each.state, each.key, mount))
    if not rows:
        return log.join_lines([*lines, "no groups yet: unlock group create, or unlock disk adopt"])
    return log.join_lines(
        [*lines, "", *log.columns([("GROUP", "DISK", "DEVICE", "STATE", "KEY FROM", "MOUNT"), *rows])]
    )


def _read_settings(paths: Paths) -> tuple[config.Config, list[str]]:
    """unlock.toml and what is wrong in it; empty where it cannot be read."""
    try:
        settings = config.load(paths.config)
    except Malformed as error:
        return config.NOTHING, [str(error)]
    return settings, [str(each.error) for each in settings.faults.values()]


def _pcrs_not_checked(paths: Paths, tcti: str) -> list[int]:
    """Of the TPM's policy; empty where the TPM does not answer."""
    try:
        return policy.show(paths, tcti)["not_checked"]
    except UnlockError:
        return []


def _warnings(found: Status) -> list[str]:
    warnings = []
    if found.boot and found.boot.facts.unauthenticated_root:
        warnings.append("the root file system is not encrypted: persistence protects lost disks, not a stolen host")
    warnings += [f"{name}: {IN_CLEAR}" for name in found.in_clear]
    if found.narrowed:
        warnings.append(f"{found.narrowed}, but earlier copies of headers still open: unlock rekey --fresh")
    if (now := found.operation) and now.state == "interrupted":
        again = "run it again" if now.finish == now.command else now.finish
        warnings.append(f"`{now.command}` is not finished: {again}")
    if found.not_checked:
        warnings.append(f"{policy.describe_not_checked(found.not_checked)}: unlock policy set --pcrs N,N")
    if window := found.window:
        long = f"THE WINDOW IS STILL OPEN after {window.days} days" if window.days >= WINDOW_DAYS else ""
        text = long or f"a window is open since {window.since}"
        warnings.append(f"{text}: the TPM asks for fewer PCRs: reboot, or unlock policy close")
    days = found.providers[0].certificate_days
    if days is not None and days < CERTIFICATE_DAYS:
        warnings.append(f"the client certificate ends in {days} days: unlock provider renew")
    if found.dumps.do:
        warnings.append(f"core dumps: {found.dumps.detail}: {found.dumps.do}")
    if found.kernel_dumps.do:
        warnings.append(f"kernel dumps: {found.kernel_dumps.detail}: {found.kernel_dumps.do}")
    if found.dumps.plain_swaps:
        warnings.append(f"swap on a disk that is not encrypted: {', '.join(found.dumps.plain_swaps)}: unlock check")
    warnings += [f"{text}: edit /etc/unlock/unlock.toml" for text in found.wrong_settings]
    for group in found.groups:
        if group.spoofed:
            warnings.append(f"group {group.name} is spoofed: {group.spoofed}")
        if group.state == "degraded":
            if names := ", ".join(each.name for each in group.disks if each.state != "open"):
                warnings.append(f"group {group.name} is open degraded, without {names}")
            warnings += [f"group {group.name}: {each.describe()}: {each.hint}" for each in group.arrays]
        if group.away:
            warnings.append(_describe_away(group))
        if group.behind:
            warnings.append(f"{', '.join(group.behind)}: still under an earlier key; done when back, by unlock sync")
    if found.recovery_behind:
        names = ", ".join(found.recovery_behind)
        warnings.append(f"{names}: opens with an earlier recovery key too, or alone: unlock recovery new")
    warnings += [each.describe() for each in found.forgotten]
    for each in found.sync.get("keys", ()):
        if each["outcome"] not in _GOOD_SYNCS:
            warnings.append(f"sync: {each['key']}: {each['outcome']}: {each['detail']}")
    return warnings


def _describe_away(group: GroupStatus) -> str:
    """Which members lack what the others have, and what brings them back."""
    back = [each.name for each in group.disks if each.name in group.away and each.state != "missing"]
    words = f"{', '.join(group.away)}: away while group {group.name} was written"
    return f"{words}: unlock group heal {group.name}" if back else words


def _describe_boot(early: report.Report | None) -> str:
    return early.describe_verdict() if early else "no early boot report"


def _describe_operation(now: under_way.UnderWay | None) -> tuple[tuple[str, str], ...]:
    if now is None:
        return ()
    do = {"running": ": unlock operation show", "paused": f": {now.finish}"}.get(now.state, "")
    return ("operation", f"{now.command}: {now.describe()}{do}"), *(("then", each) for each in now.then)


def _describe_persistence_key(state: State, cached: Secret | None) -> str:
    if isinstance(state.journal, StoredKeysRemoval):
        return "the TPM may keep it still: its removal is not finished"
    if cached:
        return "key cache" if not state.removed else "key cache until the next boot: the TPM keeps nothing"
    return "TPM, at the next boot" if not state.removed else "none: the TPM keeps nothing"


def _describe_sync(record: dict[str, Any]) -> str:
    if not record:
        return "not in this boot"
    return f"{int(time.time() - record['at'])} s ago: {', '.join(sorted({each['outcome'] for each in record['keys']}))}"


def _provider_rows(state: State) -> list[ProviderStatus]:
    """The one in use first."""
    rows = []
    for entry in state.providers:
        not_retired = 0 if entry.id == state.provider_id else len(state.not_retired(entry))
        rows.append(ProviderStatus(entry.name, entry.kind, days_left(entry), not_retired))
    return rows


def _window(state: State) -> WindowStatus | None:
    window = state.tpm.window
    if not window:
        return None
    days = int((time.time() - calendar.timegm(time.strptime(window.since, "%Y-%m-%dT%H:%M:%SZ"))) // 86400)
    return WindowStatus(window.since, days, window.reboots)


def _has_old_recovery_key(state: State, member: Member) -> bool:
    return member.uuid in state.recovery.behind or member.uuid in state.recovery.former


# Disks


class _Present(NamedTuple):
    """A disk of this host that is here."""

    node: str
    trouble: str
    """A word of report.OUTCOMES; '' if its header is authentic, or cannot be authenticated now."""
    key: str
    """As DiskStatus.key."""


def _read_disks(host: str, persistence: Secret | None) -> dict[str, _Present]:
    """By LUKS UUID; a disk whose header cannot be read by its node."""
    present: dict[str, _Present] = {}
    for disk in udev.luks2_disks():
        try:
            with luks.Container(disk.node) as container:
                uuid = container.uuid
                trouble, key = _judge(container, host, persistence)
        except UnlockError as error:
            uuid, key = disk.node, "recovery key"
            trouble = error.code if error.code in report.OUTCOMES else "damaged"
        present.setdefault(uuid, _Present(disk.node, trouble, key))
    return present


def _judge(container: luks.Container, host: str, persistence: Secret | None) -> tuple[str, str]:
    """(outcome or '', where the key would come from)."""
    try:
        tokens: list[token.Token] = disk_keys.read_tokens(container, host)
    except (NotOurs, Malformed) as error:
        return error.code, "recovery key"
    if persistence is None:
        return "", "recovery key"
    for each in tokens:
        try:
            disk_keys.unwrap_volume_key(container, each, persistence).wipe()
            return "", "key cache"
        except NoKey:
            return "", "provider"
        except UnlockError:
            continue
    return "tampered", "recovery key"


def _describe_copies(group: Group) -> str:
    """What is mounted from other disks that have the UUIDs of the group's file system; '' for nothing."""
    mounts = spoofed.mounts_of_copies(each.name for each in group.members)
    return "; ".join(f"{where} lies on {', '.join(nodes)}, no disk of the group" for where, nodes in mounts.items())


def _group_status(
    group: Group,
    mount: str,
    words: str,
    present: dict[str, _Present],
    policy: str,
    is_degraded: bool,
    lacking: list[Array],
) -> GroupStatus:
    disks = [_disk_status(member, present.get(member.uuid)) for member in group.members]
    state = "degraded" if is_degraded or lacking else _worst([each.state for each in disks])
    return GroupStatus(
        name=group.name,
        state="spoofed" if words else state,
        mount=mount,
        mounted=devices.mount_points_on({each.name for each in group.members}),
        kek_id=group.kek,
        kek_generation=group.generation,
        policy=group.policy,
        behind=[member.name for member in group.members if member.uuid in group.behind],
        spoofed=words,
        degraded=policy,
        away=[member.name for member in group.members if member.uuid in {each.uuid for each in group.away}],
        arrays=lacking,
        disks=disks,
    )


def _disk_status(member: Member, present: _Present | None) -> DiskStatus:
    if not present:
        return DiskStatus(member.name, member.uuid, member.serial, "", "missing", "-")
    is_open = devices.active_mapping_name(member.uuid) == member.name
    state = present.trouble or ("open" if is_open else "closed")
    return DiskStatus(member.name, member.uuid, member.serial, present.node, state, present.key)


def _worst(states: list[str]) -> str:
    """Of a group's disks: one that is missing or broken before one that is closed."""
    trouble = [state for state in states if state not in ("open", "closed")]
    return trouble[0] if trouble else "open" if set(states) == {"open"} else "closed"


# The timeline of early boot


def read_boot(paths: Paths) -> report.Report:
    """The report of this boot's early phase. Raises UnlockError ("no-report") when there is none."""
    found = this_boot.read_early_report(paths)
    if found is None:
        rebuild = initramfs.of_host(paths.root).rebuild_all
        raise UnlockError("early boot left no report", f"{rebuild}, and reboot", code="no-report")
    with suppress(UnlockError):  # never initialised, or damaged: just then it is wanted
        found.name_forgotten(State.load(paths).forgotten)
    return found


def boot_to_text(record: report.Report) -> str:
    """One line for each event, with the seconds since the kernel started."""
    rows = [
        (event.time, _describe_event(event))
        for event in record.events
        if (event.kind, event.text.split()[-1:]) != ("disk", ["waiting"])
    ]
    rows += [
        (row.seen, f"disk seen            {row.node} {row.name}".rstrip()) for row in record.disks.values() if row.seen
    ]
    return log.join_lines(f"{time:9.3f} s  {text}" for time, text in sorted(rows))


_EVENTS = {
    "start": "agent started",
    "tpm": "TPM is there",
    "tpm-again": "TPM is asked again:",
    "capped": "TPM locked for the rest of this boot (cap)",
    "handed-over": "keys handed over to the key cache",
    "stop": "early boot is over",
}


def _describe_event(event: report.BootEvent) -> str:
    if event.kind == "key":
        return f"{event.text:<20} {report.VERDICTS.get(event.text, '')}"
    if event.kind == "disk":
        node, *rest = event.text.split()
        return f"disk {rest[-1]:<15} {node} {' '.join(rest[:-1])}".rstrip()
    if event.kind == "group":
        name, outcome = event.text.rsplit(" ", 1)
        return f"group {outcome:<14} {name}"
    return " ".join(filter(None, (_EVENTS.get(event.kind, event.kind), event.text)))
