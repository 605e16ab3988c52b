# SPDX-License-Identifier: Apache-2.0
"""`unlock status`: groups, disks, their states, and where each key would come from."""

import calendar
import time
from typing import Any

from ..disks import devices, disk_keys, luks, token
from ..errors import Malformed, NoKey, NotOurs, UnlockError
from ..host import config, keyring, report, this_boot
from ..host.provider_entry import days_left
from ..host.state import State
from ..paths import Paths
from ..secret import Secret


def status(paths: Paths) -> dict[str, Any]:
    """Everything as plain values. Changes nothing; a disk that cannot be read is a row, not an error.

    disks[].state: open, closed, missing, or an outcome of report.OUTCOMES; disks[].key: where its key would come
    from now: `key cache`, `provider`, or `recovery key` when nothing else is left before the next boot.
    """
    state = State.load(paths)
    settings = config.load(paths.config)
    try:
        persistence: Secret | None = keyring.get("unlock:persistence")
    except NoKey:
        persistence = None
    seen = _seen(state.host, persistence)
    early = this_boot.read_early_report(paths)
    groups = []
    for group in state.groups.values():
        disks = [_disk(member, seen) for member in group.members]
        setting = settings.groups.get(group.name)
        groups.append(
            {
                "name": group.name,
                "state": _summary([each["state"] for each in disks]),
                "mount": setting.mount if setting else "",
                "kek": {"id": group.kek, "generation": group.generation},
                "policy": group.policy,
                "behind": [member.name for member in group.members if member.uuid in group.behind],
                "disks": disks,
            }
        )
    return {
        "version": 1,
        "host": state.host,
        "provider": state.provider_id,
        "providers": _providers(state),
        "persistence": state.persistent,
        "sync": this_boot.read_json(paths, "sync.json"),
        "waiting_to_retire": len(state.retire),
        "keys": {
            "persistence key": _persistence_key(state, persistence),
            "recovery key": "made" if state.has_recovery_key else "none yet",
        },
        "boot": {
            "verdict": early["verdict"] if early else "",
            "detail": early["detail"] or report.VERDICTS.get(early["verdict"], "") if early else "no early boot report",
            "facts": early["facts"] if early else {},
        },
        "recovery": {
            "tested": state.recovery.tested,
            "behind": [
                each.name
                for group in state.groups.values()
                for each in group.members
                if state.recovery.is_behind(each.uuid)
            ],
        },
        "unfinished": ({"operation": state.journal.operation, "about": state.journal.about} if state.journal else None),
        "to_finish": state.to_finish,
        "window": _window(state),
        "pin": state.tpm.pin,
        "groups": groups,
    }


def table(found: dict[str, Any]) -> str:
    """The same for people."""
    boot = found["boot"]
    lines = [f"boot      {boot['verdict'] or 'unknown'}: {boot['detail']}"]
    if boot["facts"].get("unauthenticated_root"):
        lines.append(
            "warning   the root file system is not encrypted: persistence protects lost disks, not a stolen host"
        )
    if found["to_finish"]:
        lines.append(f"warning   `{found['to_finish']}` is not finished: run it again")
    lines += [f"warning   {text}" for text in _warnings(found)]
    lines += [
        f"{name:<9} {where}"
        for name, where in (
            ("key", found["keys"]["persistence key"]),
            ("PIN", "asked for at every boot" if found["pin"] else "none"),
            ("recovery", found["keys"]["recovery key"]),
            ("provider", found["providers"][0]["said"]),
            ("sync", _last_sync(found["sync"])),
        )
    ]
    lines += [
        f"left      {each['left']} replaced key(s) still active at {each['name']}: unlock provider test {each['name']}"
        for each in found["providers"]
        if each["left"]
    ]
    rows = [("GROUP", "DISK", "DEVICE", "STATE", "KEY FROM", "MOUNT")]
    for group in found["groups"]:
        for i, each in enumerate(group["disks"]):
            first = (group["name"], group["mount"]) if i == 0 else ("", "")
            rows.append((first[0], each["name"], each["device"] or "-", each["state"], each["key"], first[1]))
    if len(rows) == 1:
        return "\n".join([*lines, "no groups yet: unlock group create, or unlock disk adopt"])
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    lines.append("")
    lines += ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows]
    return "\n".join(lines)


def _persistence_key(state: State, cached: Secret | None) -> str:
    if cached:
        return "key cache" if not state.removed else "key cache until the next boot: the TPM keeps nothing"
    return "TPM, at the next boot" if not state.removed else "none: the TPM keeps nothing"


def _providers(state: State) -> list[dict[str, Any]]:
    """The one in use first; certificate_days is None for one without a certificate."""
    rows = []
    for entry in state.providers:
        days = days_left(entry)
        said = f"{entry.name} ({entry.kind})" + (f", certificate: {days} days left" if days is not None else "")
        left = 0 if entry.id == state.provider_id else len(state.not_retired(entry))
        rows.append({"name": entry.name, "kind": entry.kind, "certificate_days": days, "said": said, "left": left})
    return rows


CERTIFICATE_DAYS = 30
"""Days before its end from which a client certificate is warned of."""


WINDOW_DAYS = 7
"""Days after which an open window is no oversight any more."""


def _window(state: State) -> dict[str, Any] | None:
    """Of the TPM's policy, when one is open: `since` when and for how many good boots more."""
    window = state.tpm.window
    if not window:
        return None
    days = int((time.time() - calendar.timegm(time.strptime(window.since, "%Y-%m-%dT%H:%M:%SZ"))) // 86400)
    return {"since": window.since, "days": days, "reboots": window.reboots}


def _warnings(found: dict[str, Any]) -> list[str]:
    days = found["providers"][0]["certificate_days"]
    warnings = []
    if window := found["window"]:
        loud = f"THE WINDOW IS STILL OPEN after {window['days']} days" if window["days"] >= WINDOW_DAYS else ""
        said = loud or f"a window is open since {window['since']}"
        warnings.append(f"{said}: the TPM asks for fewer PCRs: reboot, or unlock policy close")
    if days is not None and days < CERTIFICATE_DAYS:
        warnings.append(f"the client certificate ends in {days} days: unlock provider renew")
    for group in found["groups"]:
        if group["behind"]:
            warnings.append(f"{', '.join(group['behind'])}: still under an earlier KEK; done when back, by unlock sync")
    if found["recovery"]["behind"]:
        names = ", ".join(found["recovery"]["behind"])
        warnings.append(f"{names}: opens with an earlier recovery key too, or alone: unlock recovery new")
    for each in found["sync"].get("keys", ()):
        if each["outcome"] not in _CALM:
            warnings.append(f"sync: {each['key']}: {each['outcome']}: {each['detail']}")
    return warnings


_CALM = frozenset(("unchanged", "replaced", "caught-up", "finished", "cached", "persistent"))


def _last_sync(record: dict[str, Any]) -> str:
    if not record:
        return "not in this boot"
    return f"{int(time.time() - record['at'])} s ago: {', '.join(sorted({each['outcome'] for each in record['keys']}))}"


def _seen(host: str, persistence: Secret | None) -> dict[str, dict[str, str]]:
    """LUKS UUID -> node and what its header says, of this host's disks that are here."""
    seen: dict[str, dict[str, str]] = {}
    for found in devices.marked():
        entry = {"node": found.node, "trouble": "", "key": "recovery key"}
        try:
            with luks.Container(found.node) as container:
                uuid = container.uuid
                entry["trouble"], entry["key"] = _judge(container, host, persistence)
        except UnlockError as error:
            continue_with = error.code if error.code in report.OUTCOMES else "damaged"
            uuid, entry["trouble"] = found.node, continue_with
        if uuid in seen and not entry["trouble"]:
            entry["trouble"] = "duplicate"
        seen.setdefault(uuid, entry)
    return seen


def _judge(container: luks.Container, host: str, persistence: Secret | None) -> tuple[str, str]:
    """(outcome or '', where the key would come from)."""
    try:
        tokens: list[token.Token] = disk_keys.tokens(container, host)
    except NotOurs as error:
        return error.code, "recovery key"
    except Malformed as error:
        return error.code, "recovery key"
    if persistence is None:
        return "", "recovery key"
    for each in tokens:
        try:
            disk_keys.volume_key(container, each, persistence).wipe()
            return "", "key cache"
        except NoKey:
            return "", "provider"
        except UnlockError:
            continue
    return "tampered", "recovery key"


def _disk(member: Any, seen: dict[str, dict[str, str]]) -> dict[str, str]:
    entry = seen.get(member.uuid)
    row = {
        "name": member.name,
        "uuid": member.uuid,
        "serial": member.serial,
        "device": "",
        "state": "missing",
        "key": "-",
    }
    if entry:
        opened = devices.mapping_of(member.uuid) == member.name
        row.update(device=entry["node"], key=entry["key"], state=entry["trouble"] or ("open" if opened else "closed"))
    return row


def _summary(states: list[str]) -> str:
    """The worst of a group's disks: what is missing or broken before what is merely closed."""
    trouble = [state for state in states if state not in ("open", "closed")]
    return trouble[0] if trouble else "open" if set(states) == {"open"} else "closed"


def boot(paths: Paths) -> dict[str, Any]:
    """The report of this boot's early phase. Raises NoSlot when there is none."""
    found = this_boot.read_early_report(paths)
    if found is None:
        raise UnlockError("early boot left no report", "update-initramfs -u, and reboot", code="no-report")
    return found


def timeline(found: dict[str, Any]) -> str:
    """A report as lines of time and event; seconds since the kernel started."""
    rows = [
        (time, _said(kind, text))
        for time, kind, text in found["events"]
        if (kind, text.split()[-1:]) != ("disk", ["waiting"])
    ]
    for each in found["disks"]:
        if each.get("seen"):
            rows.append((each["seen"], f"disk seen            {each['node']} {each.get('name', '')}".rstrip()))
    return "\n".join(f"{time:9.3f} s  {text}" for time, text in sorted(rows))


def _said(kind: str, text: str) -> str:
    words = {
        "start": "agent started",
        "tpm": "TPM is there",
        "capped": "TPM locked for the rest of this boot (cap)",
        "handed-over": "keys handed over to the key cache",
        "stop": "early boot is over",
    }
    if kind == "key":
        return f"{text:<20} {report.VERDICTS.get(text, '')}"
    if kind == "disk":
        node, *rest = text.split()
        return f"disk {rest[-1]:<15} {node} {' '.join(rest[:-1])}".rstrip()
    if kind == "group":
        name, outcome = text.rsplit(" ", 1)
        return f"group {outcome:<14} {name}"
    return " ".join(filter(None, (words.get(kind, kind), text)))
