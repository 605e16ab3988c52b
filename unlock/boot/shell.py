# SPDX-License-Identifier: Apache-2.0
"""The recovery shell of the initramfs: the screen before its prompt, and the commands that work in it.

    why()               before the recovery prompt: prints which measurement made the TPM refuse
    screen()            prints what happened, what differs and what to type; at a later prompt, what is new
    shell(ARGUMENTS)    status, explain, open --recovery, help

The initramfs has neither configuration nor state, and no argparse, to stay small: disks are shown by what their headers
say, unauthenticated.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

from .. import ask, log
from ..disks import devices, disk_keys, luks, udev
from ..errors import NotOurs, Refused, Tampered, UnlockError, Usage
from ..host import report, this_boot
from ..keys import recovery_key
from ..measured import diagnosis, evidence, explain
from ..measured.log_text import printable_line
from ..paths import Paths
from ..protect import protect
from ..secret import Secret
from . import prompt

COLUMNS = 80
"""Columns of the smallest console, which has 24 lines."""
_ERRORS_MAX = 6
"""Errors that one screen lists; the whole screen has 20 lines at most."""

HELP = """\
unlock status            groups and disks, as far as they are known here
unlock explain           what differs from the last good boot, in full; --json
unlock open --recovery   opens all disks by the recovery key, headers checked
                         --recovery-key-file FILE, else it is asked for
                         --degraded GROUP: that one without its missing members
exit                     goes on booting, with what is open then"""


def shell(paths: Paths, argv: list[str]) -> int:
    """Runs one command and returns its exit status. Raises UnlockError."""
    word, rest = argv[:1], argv[1:]
    if word in ([], ["help"]) or "--help" in argv:
        log.show(HELP)
        return 0
    if word == ["explain"] and rest in ([], ["--json"]):
        return explain.explain(paths, as_json=bool(rest))
    if word == ["status"] and rest in ([], ["--json"]):
        early = this_boot.read_early_report(paths)
        disks = read_disks(early)
        if rest:
            log.show_json(status_json(early, disks))
        else:
            log.show(status_text(early, disks))
        return 0
    if word == ["open"]:
        return _open(paths, rest)
    raise Usage(f"{' '.join(argv)!r} does not work in this shell", "unlock help")


def _open(paths: Paths, options: list[str]) -> int:
    if "--recovery" not in options:
        raise Refused("the TPM is locked, and no key is left in memory", "unlock open --recovery", code="no-key")
    values: dict[str, str] = {}
    words = [each for each in options if each != "--recovery"]
    while len(words) > 1 and words[0] in ("--recovery-key-file", "--degraded"):
        option, value, *words = words
        values[option] = value
    file, degraded = (values.get(each, "") for each in ("--recovery-key-file", "--degraded"))
    if words:
        takes = "[--recovery-key-file FILE] [--degraded GROUP]"
        raise Usage("every group is opened here", f"unlock open --recovery {takes}")
    protect()
    keys: list[Secret] = []
    try:
        while True:
            with ask.from_file(file) if file else ask.anyone("recovery key", "--recovery-key-file") as typed:
                keys.append(recovery_key.parse(typed))
            found = prompt.open_all(paths, *keys, degraded=[degraded] if degraded else [])
            if found.has_changed_disk():
                raise Tampered("a header is not the one that this host wrote: that disk stays closed", "unlock status")
            if found.has_open_group():
                log.show('open; "exit" goes on booting')
                return 0
            if file or not found.has_disk("waiting"):
                raise NotOurs("this recovery key opens no group here", "unlock status", "no-key")
            log.show(prompt.ANOTHER_KEY)
    finally:
        for key in keys:
            key.wipe()


# Status


class DiskInfo(NamedTuple):
    """A LUKS2 disk and what its header says of it, which is not authenticated."""

    device: str
    name: str
    """Name of its mapping, or ''."""
    group: str
    state: str
    """open, closed, or a word of report.OUTCOMES"""


def read_disks(
    early: report.Report | None, list_disks: Callable[[], list[udev.Disk]] = udev.marked_disks
) -> list[DiskInfo]:
    """The LUKS2 disks that are here. `early`: the report of early boot, if it left one."""
    mapping_names = {uuid: name for name, uuid in devices.active_mappings().items() if uuid}
    return [_read_disk(disk.node, early.outcome(disk.node) if early else "", mapping_names) for disk in list_disks()]


def _read_disk(node: str, outcome: str, mapping_names: dict[str, str]) -> DiskInfo:
    name, group, state = "", "", outcome
    try:
        with luks.Container(node) as container:
            if container.uuid in mapping_names:
                name, state = mapping_names[container.uuid], "open"
            newest = disk_keys.read_tokens(container, "")[0]
            name, group, state = name or newest.name, newest.group, state or "closed"
    except UnlockError as error:
        state = state or (error.code if error.code in report.OUTCOMES else "damaged")
    return DiskInfo(node, name, group, state)


def status_json(early: report.Report | None, disks: list[DiskInfo]) -> dict[str, Any]:
    """For scripts."""
    boot = {"verdict": early.verdict if early else "", "detail": _describe_boot(early)}
    return {"version": 1, "boot": boot, "disks": [each._asdict() for each in disks]}


def status_text(early: report.Report | None, disks: list[DiskInfo]) -> str:
    """For people."""
    verdict = early.verdict if early else ""
    lines = [f"boot      {verdict or 'unknown'}: {_describe_boot(early)}", ""]
    if not disks:
        return log.join_lines([*lines, "no LUKS2 disk is here"])
    rows = [(each.device, each.name or "-", each.group or "-", each.state) for each in disks]
    return log.join_lines([*lines, *log.columns([("DEVICE", "DISK", "GROUP", "STATE"), *rows])])


def _describe_boot(early: report.Report | None) -> str:
    return early.describe_verdict() if early else "early boot left no report"


# The screen


def why(paths: Paths) -> int:
    """Prints the first difference from the last good boot, if it is known."""
    found = diagnosis.diagnose(evidence.gather_evidence(paths, this_boot.tpm_device()))
    if found.causes:
        log.show(log.join_lines(_printable(_cause_lines(found))))
        ask.show_on_splash(printable_line(found.causes[0].title, COLUMNS))
        this_boot.mark(paths, "told")
    return 0


def screen(paths: Paths) -> int:
    """Prints the screen; nothing on a host that does not use unlock."""
    lines = screen_lines(paths)
    if lines:
        log.show(log.join_lines(lines))
    return 0


def screen_lines(paths: Paths) -> list[str]:
    """At most 20 lines of COLUMNS characters. The errors shown are recorded: the next screen shows only new ones."""
    early = this_boot.read_early_report(paths)
    shown = this_boot.read_json(paths, "shown.json").get("troubles")
    errors = _errors(early)
    if early and early.verdict in ("no-slot", "no-tpm") and not errors:
        return []
    this_boot.write_json(paths, "shown.json", {"troubles": errors})
    if shown is None:
        lines = [*_verdict_lines(early), *_first_difference_lines(paths, early), *_list_lines("disks", errors)]
    else:
        new = [each for each in errors if each not in shown]
        lines = _list_lines("new", new) or ["new       nothing since the last prompt"]
    ends = ["", *HELP.splitlines()]
    return _printable([*lines, *ends])


def _printable(lines: list[str]) -> list[str]:
    return [printable_line(line, COLUMNS) for line in lines]


def _verdict_lines(early: report.Report | None) -> list[str]:
    if early is None:
        return ["boot      unlock's part of early boot left no report"]
    words = report.VERDICTS.get(early.verdict, "")
    rows = [("boot", f"{early.verdict or 'unknown'}: {words}".rstrip(": "))]
    if early.detail and early.detail != words:
        rows.append(("", early.detail))
    return [f"{name:<10}{text}" for name, text in rows]


def _first_difference_lines(paths: Paths, early: report.Report | None) -> list[str]:
    """The first event that differs from the last good boot; nothing after an unseal."""
    if early and early.verdict in ("unsealed", "handed-over"):
        return []
    try:
        found = diagnosis.diagnose(evidence.gather_evidence(paths, this_boot.tpm_device()))
    except (UnlockError, OSError) as error:
        return [f"{'first':<10}unknown: {error}"]
    if not found.causes:
        return [f"{'first':<10}{found.summary}"]
    return _cause_lines(found)


def _cause_lines(found: diagnosis.Explanation) -> list[str]:
    cause = found.causes[0]
    old, new = diagnosis.excerpts(cause.old, cause.new, COLUMNS - 13)  # beside the title, and both ellipses
    rows = [("first", cause.title), ("was", old), ("is", new), ("usually", cause.usually)]
    if found.copied:
        rows.append(("", diagnosis.COPIED))
    return [f"{name:<10}{text}" for name, text in rows if text]


def _errors(early: report.Report | None) -> list[str]:
    """Disks that did not open, those without a key in one line; and events that are errors."""
    if early is None:
        return []
    found = []
    without_key = [row.node for row in early.disks.values() if row.outcome == "no-key"]
    if without_key:
        found.append(f"{len(without_key)} without a key: {' '.join(without_key)}")
    for row in early.disks.values():
        if row.outcome not in report.HARMLESS | {"no-key", "closed-again"}:
            found.append(" ".join(filter(None, (row.node, row.name))) + f": {row.describe()}")
    return found + [f"{kind}: {text}".rstrip(": ") for _, kind, text in early.events if kind in report.ERROR_EVENTS]


def _list_lines(title: str, texts: list[str]) -> list[str]:
    lines = [f"{title if i == 0 else '':<10}{text}" for i, text in enumerate(texts[:_ERRORS_MAX])]
    if len(texts) > _ERRORS_MAX:
        lines.append(f"{'':<10}and {len(texts) - _ERRORS_MAX} more: unlock status")
    return lines
