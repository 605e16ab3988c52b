# SPDX-License-Identifier: Apache-2.0
"""`unlock status --boot --svg`: draws the report of early boot as a timeline, like `systemd-analyze plot`."""

from html import escape
from typing import NamedTuple

from ..host.report import OPEN, Report

_ROW, _BAR, _LABEL, _WIDTH, _FOOT = 22, 14, 150, 900, 40  # pixels
_COLOURS = {
    "waits": "#d9d9d9",
    "unseals": "#e8a33d",
    "locks the TPM": "#8c510a",
    "reads": "#9ecae1",
    "opens": "#3182bd",
    "open": "#31a354",
    "not opened": "#de2d26",
}


class Bar(NamedTuple):
    """A span of one row, in seconds since the kernel started."""

    row: str
    begin: float
    end: float
    colour: str
    note: str


def svg(record: Report) -> str:
    """An SVG 1.1 document without scripts: one row for the agent, one for each disk, one for each group."""
    bars = [*_agent(record), *_disks(record), *_groups(record)]
    rows = list(dict.fromkeys(bar.row for bar in bars))
    first = min((bar.begin for bar in bars), default=0.0)
    last = max((bar.end for bar in bars), default=first)
    scale = _WIDTH / max(last - first, 0.001)
    top = 2 * _ROW
    height = top + _ROW * len(rows) + _FOOT
    lines = [
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{_LABEL + _WIDTH + 170}" height="{height}"'
        ' font-family="sans-serif" font-size="12">',
        f'<rect width="100%" height="100%" fill="white"/><text x="8" y="18" font-size="14">{_title(record)}</text>',
    ]
    for step in range(11):
        x = _LABEL + _WIDTH * step / 10
        lines.append(f'<line x1="{x:.1f}" y1="{top - 4}" x2="{x:.1f}" y2="{height - _FOOT}" stroke="#eeeeee"/>')
        lines.append(f'<text x="{x:.1f}" y="{top - 8}" fill="#777777">{first + step / 10 / scale * _WIDTH:.2f}</text>')
    for number, row in enumerate(rows):
        lines.append(f'<text x="8" y="{top + number * _ROW + _BAR}">{escape(row)}</text>')
    for bar in bars:
        x, y = _LABEL + (bar.begin - first) * scale, top + rows.index(bar.row) * _ROW + 3
        width = max(2.0, (bar.end - bar.begin) * scale)
        lines.append(
            f'<rect x="{x:.1f}" y="{y}" width="{width:.1f}" height="{_BAR}" fill="{_COLOURS[bar.colour]}">'
            f"<title>{escape(bar.note)}: {bar.end - bar.begin:.3f} s</title></rect>"
        )
        if bar.colour in ("open", "not opened"):
            lines.append(f'<text x="{x + width + 4:.1f}" y="{y + _BAR - 3}" fill="#555555">{escape(bar.note)}</text>')
    for number, (word, colour) in enumerate(_COLOURS.items()):
        x, y = _LABEL + 110 * number, height - 24
        lines.append(f'<rect x="{x}" y="{y}" width="12" height="12" fill="{colour}"/>')
        lines.append(f'<text x="{x + 18}" y="{y + 11}">{word}</text>')
    return "\n".join([*lines, "</svg>"]) + "\n"


def _title(record: Report) -> str:
    opened = sum(row.outcome in OPEN for row in record.disks.values())
    verdict = record.verdict or "no verdict"
    return escape(f"unlock: {verdict}, {opened} of {len(record.disks)} disks open; seconds since the kernel started")


def _agent(record: Report) -> list[Bar]:
    """The spans start ──> tpm ──> key ──> capped, as far as there are events."""
    at = {kind: time for time, kind, _ in reversed(record.events)}
    spans = (
        ("start", "tpm", "waits", "waits for the TPM"),
        ("tpm", "key", "unseals", "unseal"),
        ("key", "capped", "locks the TPM", "cap"),
    )
    return [
        Bar("agent", at[begin], at[end], colour, note)
        for begin, end, colour, note in spans
        if begin in at and end in at
    ]


def _disks(record: Report) -> list[Bar]:
    """Seen by udev ──> key unsealed ──> header authenticated ──> opened, or the outcome instead."""
    bars = []
    key = next((time for time, kind, _ in record.events if kind == "key"), 0.0)
    for disk in record.disks.values():
        row = disk.name or disk.node
        texts = [(time, text.split()) for time, kind, text in record.events if kind == "disk"]
        times = {words[-1]: time for time, words in texts if words[0] == disk.node}
        proven, ended = times.get("waiting"), times.get(disk.outcome)
        if proven is not None:
            seen = min(disk.seen or proven, proven)
            reads = min(max(seen, key), proven)
            bars.append(Bar(row, seen, reads, "waits", "waits for the key"))
            bars.append(Bar(row, reads, proven, "reads", "header read and authenticated"))
        if ended is not None and disk.outcome in OPEN:
            bars.append(Bar(row, proven or ended, ended, "opens", "activation"))
            bars.append(Bar(row, ended, ended, "open", ""))
        elif ended is not None:
            bars.append(Bar(row, ended, ended, "not opened", disk.outcome))
    return bars


def _groups(record: Report) -> list[Bar]:
    return [
        Bar(
            f"group {text.split()[0]}", time, time, "open" if text.endswith(" open") else "not opened", text.split()[-1]
        )
        for time, kind, text in record.events
        if kind == "group"
    ]
