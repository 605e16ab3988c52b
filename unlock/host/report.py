# SPDX-License-Identifier: Apache-2.0
"""The report of one boot: the verdict on the unseal, the outcome of each disk and group, and events with their times.

Early boot, the recovery prompt and the gates fill a `Report` and write it below /run/unlock; later stages of the same
boot, `status` and `explain` read it. Its JSON is in host.report_file. VERDICTS and OUTCOMES are closed sets of words,
which scripts may rely on.
"""

import time

from ..light import Callable, Iterable, NamedTuple

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
    "unmeasured-input": "the system that starts next would obey what no PCR measures",
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
    "altered": "this host adopted it, and its token is gone",
    "no-key": "there is no key to open it with",
    "provider": "its key is kept by the key manager only: it opens when that answers",
    "name-taken": "its mapping name is in use",
    "failed": "the kernel or the device refused to open it",
    "timed-out": "opening it took too long and was stopped",
    "closed-again": "closed again: another member failed, or the root file system is not authenticated",
    "stale": "its token is older than that of the rest of the group",
    "forgotten": "it was taken out of its group by `unlock disk forget`: left alone",
    "was-away": "its group was written while it was away: left out until it is healed",
}

HARMLESS = frozenset(
    ("opened", "already-open", "waiting", "foreign", "other-host", "provider", "was-away", "forgotten")
)
"""Outcomes that are no failure of a disk of this host that is present."""

OPEN = ("opened", "already-open")
"""Outcomes of a disk that is open."""

CHANGED = ("tampered", "altered")
"""Outcomes of a disk that has another header than this host wrote."""

GROUP_OPEN = ("open", "degraded")
"""Outcomes of a group that is open."""

_ANY_HOST = frozenset(("damaged", "duplicate"))
"""Outcomes of disks that may belong to any host."""

ERROR_EVENTS = frozenset(("crashed", "trouble", "not-capped", "root-not-authenticated"))
"""Events of a report that are errors."""

_SILENT = frozenset(("waiting", "foreign", "other-host", "already-open", "no-key", "provider"))
"""Outcomes that are not announced on the console."""


def now() -> float:
    """Seconds since the kernel started."""
    return time.clock_gettime(time.CLOCK_BOOTTIME)


class BootEvent(NamedTuple):
    """Something that happened in a boot."""

    time: float
    """Seconds since the kernel started."""
    kind: str
    text: str


class DiskRow(NamedTuple):
    """The latest outcome of a disk."""

    node: str
    outcome: str
    """A word of OUTCOMES; a later version of unlock may have added others."""
    detail: str = ""
    uuid: str = ""
    """LUKS UUID; '' while it is not known, as `name` and `group`."""
    name: str = ""
    """Name of the mapping."""
    group: str = ""
    seen: float | None = None
    """When udev first finished with the disk; None if that is not known. Both in seconds since the kernel started."""
    opened: float | None = None
    """When its mapping was active; None if this boot did not open it."""

    def describe(self) -> str:
        """The detail, else the outcome in words."""
        return self.detail or OUTCOMES.get(self.outcome, self.outcome)


class GroupRow(NamedTuple):
    """The latest outcome of a group."""

    name: str
    outcome: str
    """open, degraded, incomplete or failed"""
    present: int | None = None
    """Disks that are here; None unless it is degraded or incomplete."""
    members: int | None = None
    """Disks that it has."""
    mappings: tuple[str, ...] = ()
    """Names of its mappings, if it is open."""
    kind: str | None = None
    """What lies on them, and `generation`, how far its btrfs was written, as Away has both; None unless degraded."""
    generation: int | None = None


class BootFacts(NamedTuple):
    """What the TPM's policy record said in an unseal, and what else later stages ask for. None is not known."""

    slot: str | None = None
    generation: int | None = None
    unauthenticated_root: bool | None = None
    """The operator accepted a root file system that is not encrypted."""
    pin: bool | None = None
    cap_pcr_before: str | None = None
    """Hex value of the cap PCR before early boot extended it; only when the TPM refused."""
    opened_from_provider: str | None = None
    """The group that a gate opened by the provider's key alone."""


class Report:
    """What happened in one phase of a boot. Holds no secrets.

    `announce` gets a line for each disk and group when its outcome is set, for the console.
    """

    def __init__(self, phase: str, announce: Callable[[str], None] | None = None) -> None:
        self.phase = phase
        self._announce = announce
        self._said: dict[str, str] = {}
        """Node -> the last line of it."""
        self.verdict = ""
        self.detail = ""
        self.events: list[BootEvent] = []
        self.disks: dict[str, DiskRow] = {}
        """By node."""
        self.groups: dict[str, GroupRow] = {}
        """By name."""
        self.facts = BootFacts()

    def add_event(self, kind: str, text: str = "") -> None:
        """Something that happened now."""
        self.events.append(BootEvent(round(now(), 4), kind, text))

    def set_verdict(self, verdict: str, detail: str = "") -> None:
        """How this boot got its persistence key, or why it did not: a word of VERDICTS."""
        assert verdict in VERDICTS, verdict
        self.verdict, self.detail = verdict, detail
        self.add_event("key", verdict)

    def describe_verdict(self) -> str:
        """The detail, else the verdict in words."""
        return self.detail or VERDICTS.get(self.verdict, self.verdict)

    def set_disk(
        self,
        node: str,
        outcome: str,
        detail: str = "",
        *,
        uuid: str = "",
        name: str = "",
        group: str = "",
        seen: float | None = None,
        opened: float | None = None,
    ) -> None:
        """The latest outcome of the disk at `node`. What is not given stays as it was."""
        assert outcome in OUTCOMES, outcome
        old = self.disks.get(node) or DiskRow(node, outcome)
        row = self.disks[node] = DiskRow(
            node,
            outcome,
            detail,
            uuid or old.uuid,
            name or old.name,
            group or old.group,
            old.seen if seen is None else seen,
            old.opened if opened is None else opened,
        )
        self.add_event("disk", " ".join(filter(None, (node, row.name, outcome))))
        line = f"{row.name or node}: {row.describe()}"
        if self._announce and outcome not in _SILENT and self._said.get(node) != line:  # it may be looked at again
            self._said[node] = line
            self._announce(line)

    def set_group(
        self,
        name: str,
        outcome: str,
        *,
        present: int | None = None,
        members: int | None = None,
        mappings: tuple[str, ...] = (),
        kind: str | None = None,
        generation: int | None = None,
    ) -> None:
        """The latest outcome of a group: a word of GROUP_OPEN, incomplete or failed. What is not given stays as it
        was."""
        old = self.groups.get(name) or GroupRow(name, outcome)
        self.groups[name] = GroupRow(
            name,
            outcome,
            old.present if present is None else present,
            old.members if members is None else members,
            mappings or old.mappings,
            old.kind if kind is None else kind,
            old.generation if generation is None else generation,
        )
        self.add_event("group", f"{name} {outcome}")
        row = self.groups[name]
        how = f" with {row.present} of {row.members} disks" if outcome == "degraded" else ""
        if self._announce:
            self._announce(f"group {name}: {outcome}{how}")

    def name_forgotten(self, uuids: Iterable[str]) -> None:
        """Gives the outcome `forgotten` to former members: early boot, without the state, can only say that the key of
        their tokens is not this host's."""
        former = frozenset(uuids)
        for row in list(self.disks.values()):
            if row.uuid in former and row.outcome not in OPEN:
                self.disks[row.node] = row._replace(outcome="forgotten", detail="")

    def outcome(self, node: str) -> str:
        """The latest outcome of the disk at `node`; '' while it has none."""
        row = self.disks.get(node)
        return row.outcome if row else ""

    def group_outcome(self, name: str) -> str:
        """The latest outcome of a group; '' while it has none."""
        row = self.groups.get(name)
        return row.outcome if row else ""

    def has_disk(self, outcome: str) -> bool:
        """Whether a disk has this outcome."""
        return any(row.outcome == outcome for row in self.disks.values())

    def has_changed_disk(self) -> bool:
        """Whether a disk's header is known not to be the one that this host wrote."""
        return any(row.outcome in CHANGED for row in self.disks.values())

    def has_open_group(self) -> bool:
        """Whether a group is open."""
        return any(row.outcome in GROUP_OPEN for row in self.groups.values())

    def failed_nodes(self) -> list[str]:
        """Nodes of disks that are present and did not open, as far as they are known to be this host's."""
        return [row.node for row in self.disks.values() if row.outcome not in HARMLESS | _ANY_HOST]
