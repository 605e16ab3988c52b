# SPDX-License-Identifier: Apache-2.0
"""`unlock boot journal`: puts the report of early boot into the systemd journal, once in a boot, so that it is there
after the next one too. unlock-early-boot.service runs it; `journalctl -b -1 -u unlock-early-boot` shows it.

An entry for the verdict, each group, each disk and each error, in the native protocol of systemd-journald
(systemd.io/JOURNAL_NATIVE_PROTOCOL). The fields and message ids are listed in docs/formats.md.
"""

import os
import socket
from typing import NamedTuple

from ..host import report, this_boot
from ..log import printable
from ..paths import Paths

VERDICT_ID = "7bc9be723c834694b00f16372297cc8e"
GROUP_ID = "5ac807bfd3b94038810bed48898f879a"
DISK_ID = "ff9e8cd6be4b4dd0a39b14f603027f2b"
ERROR_ID = "17356c55f60b4adcad91ede2a0668a18"
_UNIT = "unlock-early-boot.service"
_WARNING, _NOTICE, _INFO = "4", "5", "6"
"""Priorities of syslog(3)."""


class Entry(NamedTuple):
    """An entry of the journal. Fields that are empty are left out."""

    message_id: str
    priority: str
    message: str
    fields: dict[str, str]


def write_early_report(paths: Paths) -> int:
    """Raises OSError without a journal."""
    if os.path.exists(paths.of_this_boot("journaled")):
        return 0
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as journal:
        journal.connect(paths.journald)
        for each in make_entries(this_boot.read_early_report(paths)):
            journal.send(encode(each))
    this_boot.mark(paths, "journaled")
    return 0


def make_entries(early: report.Report | None) -> list[Entry]:
    """The entries for a report; None where there is none that can be read."""
    if early is None:
        return [Entry(VERDICT_ID, _WARNING, "early boot left no report", {})]
    priority = {"unsealed": _INFO, "no-slot": _NOTICE, "no-tpm": _NOTICE}.get(early.verdict, _WARNING)
    fields = {"UNLOCK_VERDICT": early.verdict, "UNLOCK_DETAIL": early.detail, "UNLOCK_PHASE": early.phase}
    found = [Entry(VERDICT_ID, priority, f"{early.verdict or 'no verdict'}: {early.describe_verdict()}", fields)]
    found += [_group_entry(each) for each in early.groups.values()]
    found += [_disk_entry(each) for each in early.disks.values()]
    for _, kind, text in early.events:
        if kind in report.ERROR_EVENTS:
            words = f"{kind}: {text}".rstrip(": ")
            found.append(Entry(ERROR_ID, _WARNING, words, {"UNLOCK_ERROR": kind, "UNLOCK_DETAIL": text}))
    return found


def _group_entry(row: report.GroupRow) -> Entry:
    words = f"group {row.name}: {row.outcome}"
    if row.present is not None:
        words += f", {row.present} of {row.members} disks"
    fields = {
        "UNLOCK_GROUP": row.name,
        "UNLOCK_OUTCOME": row.outcome,
        "UNLOCK_PRESENT": "" if row.present is None else str(row.present),
        "UNLOCK_MEMBERS": "" if row.members is None else str(row.members),
    }
    return Entry(GROUP_ID, _INFO if row.outcome == "open" else _WARNING, words, fields)


def _disk_entry(row: report.DiskRow) -> Entry:
    name = f"{row.name} ({row.node})" if row.name else row.node
    fields = {
        "UNLOCK_DISK": row.name or row.node,
        "UNLOCK_NODE": row.node,
        "UNLOCK_UUID": row.uuid,
        "UNLOCK_GROUP": row.group,
        "UNLOCK_OUTCOME": row.outcome,
        "UNLOCK_DETAIL": row.detail,
    }
    words = f"{name}: {row.outcome}: {row.describe()}"
    return Entry(DISK_ID, _INFO if row.outcome in report.HARMLESS else _WARNING, words, fields)


def encode(entry: Entry) -> bytes:
    """One datagram. No value has a line break in it, so none needs the binary form. With OBJECT_SYSTEMD_UNIT,
    `journalctl -u` finds the entry even if journald looks for this process after its end."""
    fields = {
        "MESSAGE": entry.message,
        "MESSAGE_ID": entry.message_id,
        "PRIORITY": entry.priority,
        "SYSLOG_IDENTIFIER": "unlock",
        "OBJECT_SYSTEMD_UNIT": _UNIT,
        **entry.fields,
    }
    text = "".join(f"{name}={printable(value)}\n" for name, value in fields.items() if value)
    return text.encode("utf-8", "replace")
