# SPDX-License-Identifier: Apache-2.0
"""Opening disks with the recovery key, header authenticated first: `unlock boot prompt` in the initramfs."""

from . import ask, devices, disk, log, luks, opening, recoverykey, report, thisboot, token
from .errors import Usage
from .paths import Paths
from .protect import protect
from .secret import Secret

TRIES = 5


def prompt(paths: Paths) -> int:
    """Asks for the recovery key; one entry opens every disk that it authenticates.

    0 when disks opened, or when the person skips this prompt with an empty line: the stock one comes next.
    """
    protect()
    log.console(_what_happened(paths))
    log.console("type the recovery key (8 groups of 6 digits), or Enter alone for the stock prompt")
    for _ in range(TRIES):
        with ask.askpass("unlock: recovery key: ") as typed:
            if not len(typed):
                return 0
            try:
                with recoverykey.parse(typed) as recovery:
                    record = open_all(paths, recovery)
            except Usage as error:
                log.console(str(error))
                continue
        if any(each["outcome"] == "open" for each in record.groups.values()):
            return 0
        log.console("this recovery key opens no disk here")
    return 1


def open_all(paths: Paths, recovery: Secret) -> report.Report:
    """Every group whose members this recovery key authenticates; adds the result to this boot's report."""

    def unwrap(container: luks.Container, each: token.Token) -> Secret:
        with disk.mac_key(recovery, each.host) as mac_key:
            disk.check_recovery(container, each, mac_key)
        return disk.by_recovery_key(container, recovery)

    record = report.Report("recovery", announce=log.console)
    thisboot.unmark(paths, "ended")
    thisboot.mark(paths, "recovered")
    _continue_report(paths, record)
    monitor = devices.Monitor()
    groups = opening.Opening("", unwrap, record)
    done = opening.turn(groups, monitor, look=True)
    end = report.now() + opening.ACTIVATION_TIMEOUT
    while not done and report.now() < end:
        opening.wait([monitor.fileno(), *groups.pipes()], 0.05)
        done = opening.turn(groups, monitor, look=False)
    groups.stop(opening.ACTIVATION_TIMEOUT)
    groups.wipe()
    thisboot.tell(paths, record)
    return record


def _continue_report(paths: Paths, record: report.Report) -> None:
    """Verdict, facts and events of the agent stay in the record; disks are looked at again."""
    before = thisboot.early(paths)
    if before:
        record.verdict, record.detail, record.facts = before["verdict"], before["detail"], before["facts"]
        record.events = [(time, kind, text) for time, kind, text in before["events"]]
        record.event("recovery")


def _what_happened(paths: Paths) -> str:
    before = thisboot.early(paths)
    if before is None:
        return "early boot left no report"
    if before["verdict"] != "unsealed":
        return f"cannot unseal: {before['detail'] or report.VERDICTS.get(before['verdict'], before['verdict'])}"
    return "; ".join(
        f"{each.get('name') or each['node']}: {each['detail'] or report.OUTCOMES[each['outcome']]}"
        for each in before["disks"]
        if each["outcome"] not in report.HARMLESS
    )
