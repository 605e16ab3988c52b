# SPDX-License-Identifier: Apache-2.0
"""The record of one boot: every outcome is one of a closed set of reasons; scripts may rely on the words."""

import time

from ..errors import Malformed
from ..light import Any, Callable

VERSION = 1

VERDICTS = {
    "unsealed": "the TPM released the persistence key",
    "handed-over": "the persistence key came from the key cache",
    "no-tpm": "there is no TPM, or its driver did not appear",
    "no-slot": "the TPM holds nothing of this host: never enrolled, cleared, or another TPM",
    "pcr-mismatch": "the TPM refused: this boot is not one that the policy allows",
    "tampered": "the TPM's slot is not what its record says",
    "malformed": "the TPM's record cannot be read",
    "newer-format": "a later unlock wrote the TPM's record",
    "pin-wrong": "no PIN was typed that is right",
    "pin-lockout": "the TPM is locked out: too many wrong PINs",
    "tpm-failed": "the TPM does not work as it should",
    "no-key": "the persistence key is not in the key cache",
}

OUTCOMES = {
    "opened": "open",
    "already-open": "was open before",
    "waiting": "ready, but members of its group are missing",
    "foreign": "LUKS2 without an unlock token: left alone",
    "other-host": "belongs to another unlock host: left alone",
    "duplicate": "another disk has the same UUID",
    "damaged": "its LUKS2 header cannot be read",
    "malformed": "its token cannot be read",
    "newer-format": "a later unlock wrote its token",
    "tampered": "header or token are not what this host wrote",
    "no-key": "there is no key to open it with",
    "provider": "its key is kept by the key manager only: it opens when that answers",
    "name-taken": "its mapping name is in use",
    "failed": "the kernel or the device refused to open it",
    "timed-out": "opening it took too long and was stopped",
    "closed-again": "closed again: another member failed, or the root file system is not authenticated",
    "stale": "its token is older than that of the rest of the group",
}

HARMLESS = frozenset(("opened", "already-open", "waiting", "foreign", "other-host", "provider"))
"""Outcomes that are no failure of a disk of this host that is present."""

_ANYBODYS = frozenset(("damaged", "duplicate"))

_SILENT = frozenset(("waiting", "foreign", "other-host", "already-open", "no-key", "provider"))


def now() -> float:
    """Seconds since the kernel started."""
    return time.clock_gettime(time.CLOCK_BOOTTIME)


class Report:
    """What happened, in the order in which it happened. Holds no secrets.

    `announce` gets a line for each disk and group as it comes out, for the console.
    """

    def __init__(self, phase: str, announce: Callable[[str], None] | None = None) -> None:
        self.phase = phase
        self._announce = announce
        self.verdict = ""
        self.detail = ""
        self.events: list[tuple[float, str, str]] = []
        self.disks: dict[str, dict[str, Any]] = {}
        self.groups: dict[str, dict[str, Any]] = {}
        self.facts: dict[str, Any] = {}

    def event(self, kind: str, text: str = "") -> None:
        self.events.append((round(now(), 4), kind, text))

    def judge(self, verdict: str, detail: str = "") -> None:
        """How the one persistence key of this boot was got, or why not."""
        assert verdict in VERDICTS, verdict
        self.verdict, self.detail = verdict, detail
        self.event("key", verdict)

    def why(self) -> str:
        """The verdict in words."""
        return self.detail or VERDICTS.get(self.verdict, "")

    def disk(self, node: str, outcome: str, detail: str = "", **more: Any) -> None:
        """The latest outcome for the disk at `node`."""
        assert outcome in OUTCOMES, outcome
        entry = self.disks.setdefault(node, {"node": node})
        entry.update(more, outcome=outcome, detail=detail)
        self.event("disk", " ".join(filter(None, (node, entry.get("name"), outcome))))
        if self._announce and outcome not in _SILENT:
            self._announce(f"{entry.get('name') or node}: {detail or OUTCOMES[outcome]}")

    def group(self, name: str, outcome: str, **more: Any) -> None:
        """`outcome`: open, incomplete or failed."""
        self.groups.setdefault(name, {"name": name}).update(more, outcome=outcome)
        self.event("group", f"{name} {outcome}")
        if self._announce:
            self._announce(f"group {name}: {outcome}")

    def failures(self) -> list[str]:
        """Nodes of disks that are present and could not be opened, as far as they are known to be this host's."""
        return [node for node, disk in self.disks.items() if disk["outcome"] not in HARMLESS | _ANYBODYS]

    def plain(self) -> dict[str, Any]:
        """The report as `read` gives it."""
        return {
            "version": VERSION,
            "phase": self.phase,
            "verdict": self.verdict,
            "detail": self.detail,
            "disks": list(self.disks.values()),
            "groups": list(self.groups.values()),
            "facts": self.facts,
            "events": self.events,
        }

    def encode(self) -> bytes:
        import json

        return json.dumps(self.plain(), indent=1).encode()


def read(path: str) -> dict[str, Any]:
    """A report that an earlier stage of this boot wrote. Raises OSError, Malformed."""
    import json

    with open(path, "rb") as file:
        try:
            report: dict[str, Any] = json.load(file)
        except ValueError as error:
            raise Malformed(f"{path} is not a report: {error}") from error
    if not isinstance(report, dict) or report.get("version") != VERSION:
        raise Malformed(f"{path} is not a report of a known version")
    return report
