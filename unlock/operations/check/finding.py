# SPDX-License-Identifier: Apache-2.0
"""What `unlock check` finds: findings, each with a verdict, and the verdict of them all."""

from collections.abc import Iterable
from typing import NamedTuple, TypedDict

from ... import log

NOTE, SAFE, UNPROVEN, UNSAFE = "note", "safe", "unproven", "unsafe"
"""A note is worth knowing, and is not about the next boot."""
EXIT_STATUS = {SAFE: 0, UNPROVEN: 30, UNSAFE: 31}
"""Exit statuses, worst last."""
_RANK = (NOTE, SAFE, UNPROVEN, UNSAFE)
MEANING = {
    SAFE: "what opens by itself now opens by itself at the next boot",
    UNPROVEN: "nothing speaks against it, and not all of it can be proven",
    UNSAFE: "something that is meant to open by itself will not",
}


class Finding(NamedTuple):
    """One thing that was looked at."""

    what: str
    verdict: str
    detail: str
    do: str = ""
    """What to type; '' where there is nothing to do."""


class CheckResult(NamedTuple):
    """All findings, and the worst of their verdicts."""

    verdict: str
    findings: tuple[Finding, ...]


def result_of(findings: Iterable[Finding]) -> CheckResult:
    """The result of a check with these findings."""
    findings = tuple(findings)
    return CheckResult(max((each.verdict for each in findings), key=_RANK.index), findings)


class CheckJson(TypedDict):
    """What `unlock check --json` prints."""

    version: int
    verdict: str
    findings: list[dict[str, object]]
    """The fields of Finding."""


def to_json(result: CheckResult) -> CheckJson:
    """For scripts."""
    return {"version": 1, "verdict": result.verdict, "findings": [each._asdict() for each in result.findings]}


def to_text(result: CheckResult) -> str:
    """For people: the worst findings first, the verdict last."""
    lines = []
    for each in sorted(result.findings, key=lambda each: -_RANK.index(each.verdict)):
        lines.append(f"{each.verdict:<9} {each.what}: {each.detail}")
        if each.do:
            lines.append(f"{'':<9} > {each.do}")
    return log.join_lines([*lines, f"{result.verdict}: {MEANING[result.verdict]}"])
