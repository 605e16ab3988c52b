# SPDX-License-Identifier: Apache-2.0
"""The recovery shell of the initramfs: the screen before its prompt, and the words that work in it.

why()               before the recovery prompt: which measurement made the TPM refuse
screen()            what happened, what differs, what to type; at a later prompt, what is new
shell(ARGUMENTS)    status, explain, open --recovery, help: as in the booted system, with what is known here

There is no configuration and no state here, and no argparse: the image is small. What a disk says of itself is shown
as such.
"""

import json
from collections.abc import Callable
from typing import Any

from .. import ask
from ..disks import devices, disk_keys, luks
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
"""Of the smallest console, which has 24 lines."""
_TROUBLES = 6
"""Lines of them at one prompt; all of it is 20 lines at most."""
_TELLING = frozenset(("crashed", "trouble", "not-capped", "root-not-authenticated"))
"""Events of a report that are errors."""

HELP = """\
unlock status            groups and disks, as far as they can be told here
unlock explain           what differs from the last good boot, in full; --json
unlock open --recovery   opens all disks by the recovery key, headers checked
                         --recovery-key-file FILE, else it is asked for
exit                     goes on booting, with what is open then"""


def shell(paths: Paths, argv: list[str]) -> int:
    """One command. Raises UnlockError."""
    word, rest = argv[:1], argv[1:]
    if word in ([], ["help"]) or "--help" in argv:
        print(HELP)
        return 0
    if word == ["explain"] and rest in ([], ["--json"]):
        return explain.explain(paths, as_json=bool(rest))
    if word == ["status"] and rest in ([], ["--json"]):
        found = status(paths)
        print(json.dumps(found, indent=1) if rest else table(found))
        return 0
    if word == ["open"]:
        return _open(paths, rest)
    raise Usage(f"{' '.join(argv)!r} does not work in this shell", "unlock help")


def _open(paths: Paths, options: list[str]) -> int:
    if "--recovery" not in options:
        raise Refused("the TPM is locked, and no key is left in memory", "unlock open --recovery", code="no-key")
    options = [each for each in options if each != "--recovery"]
    file = options[1] if options[:1] == ["--recovery-key-file"] and len(options) == 2 else ""
    if options and not file:
        raise Usage("every group is opened here", "unlock open --recovery [--recovery-key-file FILE]")
    protect()
    keys: list[Secret] = []
    try:
        while True:
            with ask.from_file(file) if file else ask.anyone("recovery key", "--recovery-key-file") as typed:
                keys.append(recovery_key.parse(typed))
            found = prompt.open_all(paths, *keys)
            if any(each["outcome"] == "tampered" for each in found["disks"]):
                raise Tampered("a header is not the one that this host wrote: that disk stays closed", "unlock status")
            if any(each["outcome"] == "open" for each in found["groups"]):
                print('open; "exit" goes on booting')
                return 0
            if file or not prompt.waits(found):
                raise NotOurs("this recovery key opens no group here", "unlock status", "no-key")
            print(prompt.ANOTHER)
    finally:
        for key in keys:
            key.wipe()


# Status


def status(paths: Paths, marked: Callable[[], list[devices.Disk]] = devices.marked) -> dict[str, Any]:
    """Plain values: the verdict, and each LUKS2 disk with what its header says of it, which is not authenticated."""
    early = this_boot.early(paths) or {"verdict": "", "detail": "early boot left no report", "disks": []}
    outcomes = {each["node"]: each for each in early["disks"]}
    opened = {uuid: name for name, uuid in devices.mappings().items() if uuid}
    rows = [_row(found.node, outcomes.get(found.node, {}), opened) for found in marked()]
    detail = early["detail"] or report.VERDICTS.get(early["verdict"], "")
    return {"version": 1, "boot": {"verdict": early["verdict"], "detail": detail}, "disks": rows}


def _row(node: str, known: dict[str, Any], opened: dict[str, str]) -> dict[str, str]:
    row = {"device": node, "name": "", "group": "", "state": known.get("outcome", "")}
    try:
        with luks.Container(node) as container:
            if name := opened.get(container.uuid):
                row.update(name=name, state="open")
            each = disk_keys.tokens(container, "")[0]
            row.update(name=row["name"] or each.name, group=each.group, state=row["state"] or "closed")
    except UnlockError as error:
        row["state"] = row["state"] or (error.code if error.code in report.OUTCOMES else "damaged")
    return row


def table(found: dict[str, Any]) -> str:
    """The same for people."""
    lines = [f"boot      {found['boot']['verdict'] or 'unknown'}: {found['boot']['detail']}", ""]
    rows = [("DEVICE", "DISK", "GROUP", "STATE")]
    rows += [(each["device"], each["name"] or "-", each["group"] or "-", each["state"]) for each in found["disks"]]
    if len(rows) == 1:
        return "\n".join([*lines, "no LUKS2 disk is here"])
    widths = [max(len(row[i]) for row in rows) for i in range(4)]
    lines += ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows]
    return "\n".join(lines)


# The screen


def why(paths: Paths) -> int:
    """Prints what differs first from the last good boot; nothing where that cannot be told."""
    found = diagnosis.diagnose(evidence.gather_evidence(paths, this_boot.tpm_device()))
    if found.causes:
        print("\n".join(_printable(_cause(found))), flush=True)
        ask.tell(printable_line(found.causes[0].title, COLUMNS))
        this_boot.mark(paths, "told")
    return 0


def screen(paths: Paths) -> int:
    """Prints it; nothing on a host that unlock has no part in."""
    lines = screen_lines(paths)
    if lines:
        print("\n".join(lines), flush=True)
    return 0


def screen_lines(paths: Paths) -> list[str]:
    """At most 20 lines of COLUMNS. What was told is remembered, so that the next prompt tells what is new."""
    early = this_boot.early(paths)
    shown = this_boot.read_json(paths, "shown.json").get("troubles")
    troubles = _troubles(early)
    if early and early["verdict"] in ("no-slot", "no-tpm") and not troubles:
        return []
    this_boot.write_json(paths, "shown.json", {"troubles": troubles})
    if shown is None:
        lines = [*_what(early), *_first(paths, early), *_listed("disks", troubles)]
    else:
        new = [each for each in troubles if each not in shown]
        lines = _listed("new", new) or ["new       nothing since the last prompt"]
    ends = ["", *HELP.splitlines()]
    return _printable([*lines, *ends])


def _printable(lines: list[str]) -> list[str]:
    return [printable_line(line, COLUMNS) for line in lines]


def _what(early: dict[str, Any] | None) -> list[str]:
    if early is None:
        return ["boot      unlock's part of early boot left no report"]
    words = report.VERDICTS.get(early["verdict"], "")
    rows = [("boot", f"{early['verdict'] or 'unknown'}: {words}".rstrip(": "))]
    if early["detail"] and early["detail"] != words:
        rows.append(("", early["detail"]))
    return [f"{name:<10}{text}" for name, text in rows]


def _first(paths: Paths, early: dict[str, Any] | None) -> list[str]:
    """The first event that differs from the last good boot."""
    if early and early["verdict"] in ("unsealed", "handed-over"):
        return []
    try:
        found = diagnosis.diagnose(evidence.gather_evidence(paths, this_boot.tpm_device()))
    except (UnlockError, OSError) as error:
        return [f"{'first':<10}cannot be told: {error}"]
    if not found.causes:
        return [f"{'first':<10}{found.summary}"]
    return _cause(found)


def _cause(found: diagnosis.Explanation) -> list[str]:
    cause = found.causes[0]
    old, new = diagnosis.excerpts(cause.old, cause.new, COLUMNS - 13)  # beside the title, and both ellipses
    rows = [("first", cause.title), ("was", old), ("is", new), ("usually", cause.usually)]
    if found.copied:
        rows.append(("", diagnosis.COPIED))
    return [f"{name:<10}{text}" for name, text in rows if text]


def _troubles(early: dict[str, Any] | None) -> list[str]:
    """Disks that did not open, those without a key together; and what else went wrong."""
    if early is None:
        return []
    found = []
    waiting = [each["node"] for each in early["disks"] if each["outcome"] == "no-key"]
    if waiting:
        found.append(f"{len(waiting)} without a key: {' '.join(waiting)}")
    for each in early["disks"]:
        if each["outcome"] not in report.HARMLESS | {"no-key", "closed-again"}:
            name = f" {each['name']}" if each.get("name") else ""
            found.append(f"{each['node']}{name}: {each['detail'] or report.OUTCOMES.get(each['outcome'], '')}")
    return found + [f"{kind}: {text}".rstrip(": ") for _, kind, text in early["events"] if kind in _TELLING]


def _listed(title: str, texts: list[str]) -> list[str]:
    lines = [f"{title if i == 0 else '':<10}{text}" for i, text in enumerate(texts[:_TROUBLES])]
    if len(texts) > _TROUBLES:
        lines.append(f"{'':<10}and {len(texts) - _TROUBLES} more: unlock status")
    return lines
