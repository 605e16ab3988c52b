# SPDX-License-Identifier: Apache-2.0
"""`unlock boot prompt` in the initramfs: asks for the recovery key and opens every disk whose header it authenticates.

The boot scripts run it when the root disk did not open. The recovery shell opens disks by `open_all` too.
"""

import os
from collections.abc import Sequence

from .. import ask, log
from ..disks import disk_keys, token, udev
from ..disks.header import Header
from ..errors import Tampered, Usage
from ..host import needed, report, this_boot
from ..keys import recovery_key
from ..paths import Paths
from ..protect import protect
from ..secret import Secret
from . import unmeasured
from .activation import GroupOpener, open_present
from .degraded import bring_up_early

TRIES = 5
ANOTHER_KEY = "a member is missing, or takes an earlier recovery key: type that too"
"""For a disk that is authentic and waits for its group: a member is away, or was when the key was rotated."""
NOT_OF_ROOT = "this recovery key does not authenticate the root's disk: it is not its key, or its header was changed"


def prompt(paths: Paths) -> int:
    """Asks until a group is open, at most TRIES times.

    Returns 0 when a group opened, and when the person skips this prompt with an empty line: the stock prompt comes
    next, where there is one. Returns the status of Tampered when a header is not the one that this host wrote, or when
    no key that was typed proves the header of a disk that the root needs: no prompt may follow that does not check the
    header.
    """
    protect()
    needed.list_needed(paths)  # an agent that has crashed may have done so before the scripts knew what to ask for
    happened = _explain_boot(paths)
    log.console(happened)
    if not os.path.exists(paths.of_this_boot("told")):  # `unlock boot why` has shown more
        ask.show_on_splash(happened)
    if unmeasured_input := unmeasured.close_channels(paths):
        log.console(f"{unmeasured_input}: whoever set that controls the system that starts next")
    early = this_boot.read_early_report(paths)
    tampered = early is not None and early.has_changed_disk()
    log.console(f"type the recovery key (8 groups of 6 digits), or Enter alone {what_enter_does(paths, tampered)}")
    keys: list[Secret] = []
    unproven = False
    try:
        for _ in range(TRIES):
            with ask.ask_in_initramfs("unlock: recovery key: ") as typed:
                if not len(typed):
                    break
                try:
                    keys.append(recovery_key.parse(typed))
                except Usage as error:
                    _show(str(error))
                    continue
            found = open_all(paths, *keys)
            if found.has_changed_disk():
                tampered = True
                break
            unproven = needed.is_unproven(paths, found)
            if found.has_open_group() and not unproven:
                return 0
            if unproven:
                _show(NOT_OF_ROOT)
            else:
                _show(ANOTHER_KEY if found.has_disk("waiting") else "this recovery key opens no disk here")
    finally:
        for each in keys:
            each.wipe()
    return Tampered.status if tampered or unproven else 0


def what_enter_does(paths: Paths, tampered: bool) -> str:
    """What follows an empty line, in words."""
    if os.path.exists(paths.of_this_boot("uncapped")):
        return "to power off: the TPM did not confirm that it is locked, so no other prompt may follow"
    if tampered:
        return "to give up"
    if not needed.has_stock_prompt(paths):
        return "to give up: no other prompt follows, as the initramfs has no crypttab and the command line no rd.luks"
    return "for the stock prompt, which does not check the disk's header"


def _show(line: str) -> None:
    log.console(line)
    ask.show_on_splash(line)


def open_all(paths: Paths, *recovery: Secret, degraded: Sequence[str] = ()) -> report.Report:
    """Opens every group whose members these recovery keys authenticate, those of `degraded` without all of their
    members too. The result replaces this boot's report."""

    def unwrap(header: Header, each: token.Token) -> Secret:
        return disk_keys.dek_by_checked_recovery_key(header, each, *recovery)

    record = report.Report("recovery", announce=log.console)
    this_boot.unmark(paths, "ended")
    this_boot.mark(paths, "recovered")
    _continue_report(paths, record)
    monitor = udev.Monitor()
    open_present(GroupOpener("", unwrap, record), monitor, degraded)
    bring_up_early(paths, record)
    this_boot.publish(paths, record)
    return record


def _continue_report(paths: Paths, record: report.Report) -> None:
    """Takes over verdict, facts and events of the agent's report; outcomes of disks start anew."""
    before = this_boot.read_early_report(paths)
    if before:
        record.verdict, record.detail, record.facts = before.verdict, before.detail, before.facts
        record.events = before.events
        record.add_event("recovery")


def _explain_boot(paths: Paths) -> str:
    """Why a person is asked: the verdict, or the disks that did not open."""
    before = this_boot.read_early_report(paths)
    if before is None:
        return "early boot left no report"
    said = [] if before.verdict == "unsealed" else [f"cannot unseal: {before.describe_verdict()}"]
    harmless = report.HARMLESS | {"closed-again"} | ({"no-key"} if said else set())
    said += [
        f"{row.name or row.node}: {row.describe()}" for row in before.disks.values() if row.outcome not in harmless
    ]
    return "; ".join(said)
