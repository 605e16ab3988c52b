# SPDX-License-Identifier: Apache-2.0
"""`unlock boot journal`: puts the report of early boot into the systemd journal, once in a boot, so that it is there
after the next one too. unlock-early-boot.service runs it; `journalctl -b -1 -u unlock-early-boot` shows it.

An entry for the verdict, one for a boot that the TPM refused, and one for each group, each disk and each error. The
messages and their fields: unlock-journal(7).
"""

import contextlib
import os

from .. import journald, messages
from ..errors import UnlockError
from ..host import report, this_boot
from ..host.state import State
from ..light import NamedTuple
from ..messages import INFO, NOTICE, WARNING, Message
from ..paths import Paths

_UNIT = "unlock-early-boot.service"
_NOT_REFUSED = ("unsealed", "handed-over", "no-tpm", "no-slot", "no-key", "tpm-failed", "")
"""Verdicts of a boot in which the TPM gave the key, was not asked for one of this host, or does not work."""


class Entry(NamedTuple):
    """An entry of the journal. Fields that are empty are left out."""

    message: Message
    priority: str
    text: str
    fields: dict[str, str]


def write_early_report(paths: Paths) -> int:
    """Raises OSError without a journal."""
    if os.path.exists(paths.of_this_boot("journaled")):
        return 0
    with journald.connect(paths) as journal:
        early = this_boot.read_early_report(paths)
        if early:
            with contextlib.suppress(UnlockError):
                early.name_forgotten(State.load(paths).forgotten)
        for each in make_entries(early):
            # `journalctl -u` finds the entry even if journald looks for this process after its end.
            fields = {"OBJECT_SYSTEMD_UNIT": _UNIT, **each.fields}
            journal.send(journald.encode(each.message, each.text, fields, each.priority))
    this_boot.mark(paths, "journaled")
    return 0


def make_entries(early: report.Report | None) -> list[Entry]:
    """The entries for a report; None where there is none that can be read."""
    if early is None:
        return [Entry(messages.VERDICT, WARNING, "early boot left no report", {})]
    priority = {"unsealed": INFO, "no-slot": NOTICE, "no-tpm": NOTICE}.get(early.verdict, WARNING)
    verdict = {"UNLOCK_VERDICT": early.verdict, "UNLOCK_DETAIL": early.detail}
    words = f"{early.verdict or 'no verdict'}: {early.describe_verdict()}"
    found = [Entry(messages.VERDICT, priority, words, {**verdict, "UNLOCK_PHASE": early.phase})]
    if early.verdict not in _NOT_REFUSED:
        found.append(Entry(messages.BOOT_REFUSED, WARNING, "the TPM refused this boot: unlock explain", verdict))
    found += [_group_entry(each) for each in early.groups.values()]
    found += [_disk_entry(each) for each in early.disks.values()]
    for _, kind, text in early.events:
        if kind in report.ERROR_EVENTS:
            words = f"{kind}: {text}".rstrip(": ")
            fields = {"UNLOCK_ERROR": kind, "UNLOCK_DETAIL": text}
            found.append(Entry(messages.TROUBLE, WARNING, words, fields))
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
    return Entry(messages.GROUP, INFO if row.outcome == "open" else WARNING, words, fields)


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
    return Entry(messages.DISK, INFO if row.outcome in report.HARMLESS else WARNING, words, fields)
