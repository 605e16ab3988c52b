# SPDX-License-Identifier: Apache-2.0
"""`unlock explain`: says why the TPM refused this boot, as text or as JSON.

    evidence.gather_evidence() ──> diagnosis.diagnose() ──> to_text(), to_json()

The command works in the booted system and in the recovery shell of the initramfs.
"""

import os
from typing import TypedDict

from .. import log
from ..errors import Refused
from ..host import report, this_boot
from ..paths import Paths
from .diagnosis import Cause, Explanation, diagnose
from .evidence import gather_evidence


class ExplanationJson(TypedDict):
    """What `unlock explain --json` prints."""

    version: int
    verdict: str
    summary: str
    causes: list[dict[str, object]]
    """The fields of diagnosis.Cause."""
    notes: list[str]
    copied: bool
    pcrs: dict[str, str]


def explain(paths: Paths, as_json: bool) -> int:
    """Prints the explanation; exit status 0. Raises Refused without root."""
    if os.geteuid() != 0:
        raise Refused("unlock needs root", "sudo unlock explain", code="not-root")
    found = diagnose(gather_evidence(paths, this_boot.tpm_device()))
    if as_json:
        log.show_json(to_json(found))
    else:
        log.show(to_text(found))
    return 0


def to_json(found: Explanation) -> ExplanationJson:
    """For scripts."""
    return {
        "version": 1,
        "verdict": found.verdict,
        "summary": found.summary,
        "causes": [each._asdict() for each in found.causes],
        "notes": list(found.notes),
        "copied": found.copied,
        "pcrs": {str(pcr): status for pcr, status in found.pcrs.items()},
    }


def to_text(found: Explanation) -> str:
    """For people: the first event of each kind in each PCR."""
    lines = [found.summary]
    if found.verdict not in ("", "unsealed"):
        lines.insert(0, f"verdict   {report.VERDICTS.get(found.verdict, found.verdict)}")
    kinds: dict[tuple[str, int | None], list[Cause]] = {}
    for cause in found.causes:
        kinds.setdefault((cause.code, cause.pcr), []).append(cause)
    for number, (cause, *more) in enumerate(kinds.values(), 1):
        also = f"{len(more)} more such event{'s' if more[1:] else ''}: --json lists them" if more else ""
        lines += ["", f"{number}. {cause.title}"]
        rows = [("was", cause.old), ("is", cause.new), ("and", also), ("usually", cause.usually), ("do", cause.do)]
        lines += [f"   {name:<8} {value}" for name, value in rows if value]
    if found.notes:
        lines += ["", *(f"note: {each}" for each in found.notes)]
    return log.join_lines(lines)
