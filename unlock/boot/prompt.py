# SPDX-License-Identifier: Apache-2.0
"""Opening disks with the recovery key, header authenticated first: `unlock boot prompt` in the initramfs."""

import os
from typing import Any

from .. import ask, log
from ..disks import devices, disk_keys, luks, token
from ..errors import Tampered, Usage
from ..host import report, this_boot
from ..keys import recovery_key
from ..paths import Paths
from ..protect import protect
from ..secret import Secret
from . import activation

TRIES = 5
ANOTHER = "a member is missing, or takes an earlier recovery key: type that too"


def prompt(paths: Paths) -> int:
    """Asks for the recovery key; one entry opens every disk that it authenticates.

    0 when disks opened, or when the person skips this prompt with an empty line: the stock one comes next.
    The status of Tampered when a header is not the one that this host wrote: no prompt may follow that does not
    check it.
    """
    protect()
    happened = _what_happened(paths)
    log.console(happened)
    if not os.path.exists(paths.of_this_boot("told")):  # more than that, by `unlock boot why`
        ask.tell(happened)
    altered = _altered(this_boot.read_early_report(paths))
    other = "to give up" if altered else "for the stock prompt, which does not check the disk's header"
    log.console(f"type the recovery key (8 groups of 6 digits), or Enter alone {other}")
    keys: list[Secret] = []
    try:
        for _ in range(TRIES):
            with ask.askpass("unlock: recovery key: ") as typed:
                if not len(typed):
                    break
                try:
                    keys.append(recovery_key.parse(typed))
                except Usage as error:
                    _say(str(error))
                    continue
            found = open_all(paths, *keys)
            if _altered(found):
                altered = True
                break
            if any(each["outcome"] == "open" for each in found["groups"]):
                return 0
            _say(ANOTHER if waits(found) else "this recovery key opens no disk here")
    finally:
        for each in keys:
            each.wipe()
    return Tampered.status if altered else 0


def _say(line: str) -> None:
    log.console(line)
    ask.tell(line)


def waits(found: dict[str, Any]) -> bool:
    """Whether a disk is authentic and its group cannot open: another member was away when the key was rotated."""
    return any(each["outcome"] == "waiting" for each in found["disks"])


def _altered(found: dict[str, Any] | None) -> bool:
    return found is not None and any(each["outcome"] == "tampered" for each in found["disks"])


def open_all(paths: Paths, *recovery: Secret) -> dict[str, Any]:
    """Every group whose members these recovery keys authenticate; the result is this boot's report from then on."""

    def unwrap(header: luks.Header, each: token.Token) -> Secret:
        return disk_keys.by_checked_recovery_key(header, each, *recovery)

    record = report.Report("recovery", announce=log.console)
    this_boot.unmark(paths, "ended")
    this_boot.mark(paths, "recovered")
    _continue_report(paths, record)
    monitor = devices.Monitor()
    activation.open_present(activation.Opening("", unwrap, record), monitor)
    this_boot.publish(paths, record)
    return record.plain()


def _continue_report(paths: Paths, record: report.Report) -> None:
    """Verdict, facts and events of the agent stay in the record; disks are looked at again."""
    before = this_boot.read_early_report(paths)
    if before:
        record.verdict, record.detail, record.facts = before["verdict"], before["detail"], before["facts"]
        record.events = [(time, kind, text) for time, kind, text in before["events"]]
        record.event("recovery")


def _what_happened(paths: Paths) -> str:
    before = this_boot.read_early_report(paths)
    if before is None:
        return "early boot left no report"
    if before["verdict"] != "unsealed":
        return f"cannot unseal: {before['detail'] or report.VERDICTS.get(before['verdict'], before['verdict'])}"
    return "; ".join(
        f"{each.get('name') or each['node']}: {each['detail'] or report.OUTCOMES[each['outcome']]}"
        for each in before["disks"]
        if each["outcome"] not in report.HARMLESS and each["outcome"] != "closed-again"
    )
