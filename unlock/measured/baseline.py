# SPDX-License-Identifier: Apache-2.0
"""The baseline: what a good boot measured, as a file, which `unlock explain` compares a refused boot with.

Baseline ──encode──> /var/lib/unlock/baseline.json, and its copy on the EFI partition ──decode──> Baseline
"""

import json
from collections.abc import Mapping
from typing import Any, NamedTuple

from ..errors import Malformed, NewerFormat
from . import eventlog
from .causes import CAUSES
from .describe import Item
from .log_text import TEXT_MAX, printable

BASELINE_MAX = 2 << 20
"""Bytes."""
_VERSION = 1


class TpmIdentity(NamedTuple):
    """Which TPM it was."""

    srk: str
    """The SRK's name, in hex: another one after TPM2_Clear."""
    identity: str
    """The name of a key of the endorsement hierarchy, in hex: the same for good, in one TPM. '' when not known."""


class Baseline(NamedTuple):
    """A good boot: its verified PCRs as they were when the TPM released the key, and the events behind them.

    As JSON, version 1: {"version", "kernel", "cmdline", "chip": {"srk", "identity"}, "pcrs": NUMBER -> 64 hex digits,
    "events": [[pcr, kind, digest, cause, text], ...]}. It proves nothing: it explains.
    """

    kernel: str
    """`uname -r`."""
    cmdline: str
    chip: TpmIdentity
    pcrs: Mapping[int, bytes]
    items: tuple[Item, ...]

    def encode(self) -> bytes:
        """The file's content. Raises Malformed for one too long for `decode`."""
        data = json.dumps(
            {
                "version": _VERSION,
                "kernel": self.kernel,
                "cmdline": self.cmdline,
                "chip": self.chip._asdict(),
                "pcrs": {str(pcr): value.hex() for pcr, value in sorted(self.pcrs.items())},
                "events": [[each.pcr, each.kind, each.digest.hex(), each.cause, each.text] for each in self.items],
            },
            separators=(",", ":"),
        ).encode()
        if len(data) > BASELINE_MAX:
            raise Malformed(f"the event log of this boot is too long to keep: {len(data)} bytes")
        return data

    @classmethod
    def decode(cls, data: bytes) -> "Baseline":
        """Raises Malformed or NewerFormat for anything that `encode` did not write."""
        if len(data) > BASELINE_MAX:
            raise Malformed("event-log baseline: too long")
        try:
            fields = json.loads(data)
            version = fields["version"]
            if type(version) is int and version > _VERSION:
                raise NewerFormat("event-log baseline: written by a newer version", hint="update unlock")
            if version != _VERSION:
                raise ValueError("its version")
            srk, identity = (_parse_text(fields["chip"][name], 68) for name in ("srk", "identity"))
            pcrs = {_parse_pcr(int(pcr)): parse_digest(value) for pcr, value in fields["pcrs"].items()}
            items = tuple(_parse_item(*each) for each in fields["events"])
            return cls(
                kernel=_parse_text(fields["kernel"], 256),
                cmdline=_parse_text(fields["cmdline"], TEXT_MAX),
                chip=TpmIdentity(srk, identity),
                pcrs=pcrs,
                items=items,
            )
        except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
            raise Malformed("event-log baseline: it is not as unlock writes it") from None


def _parse_item(pcr: Any, kind: Any, digest: Any, cause: Any, text: Any) -> Item:
    if type(kind) is not int or cause not in CAUSES:
        raise ValueError
    return Item(
        pcr=_parse_pcr(pcr), kind=kind, digest=parse_digest(digest), cause=cause, text=_parse_text(text, TEXT_MAX)
    )


def _parse_pcr(value: Any) -> int:
    if type(value) is not int or not 0 <= value < eventlog.PCRS:
        raise ValueError
    return value


def parse_digest(value: Any) -> bytes:
    """A SHA-256 digest from hex. Raises ValueError, TypeError."""
    digest = bytes.fromhex(value)
    if len(digest) != 32:
        raise ValueError
    return digest


def _parse_text(value: Any, limit: int) -> str:
    if type(value) is not str or printable(value, limit) != value:
        raise ValueError
    return value
