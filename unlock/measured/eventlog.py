# SPDX-License-Identifier: Apache-2.0
"""Parses and replays the TCG event log: what the firmware, and programs after it, extended the PCRs with.

    binary_bios_measurements ──parse──> Log ──replay──> PCR values, which `verify` compares with the live ones
    tpm2-measure.log ──parse_systemd──> the Events that systemd added later

The log lies in memory that anybody may have written: every length is checked against what is left, and one pass
reads it. Pure. Formats: TCG "PC Client Platform Firmware Profile" 1.06, section 10; integers are little-endian.
"""

import json
import struct
from collections.abc import Iterable
from hashlib import sha256
from typing import Any, NamedTuple

from ..errors import Malformed

MAX_LOG = 8 << 20
"""Bytes. Firmware sets aside some 64 KiB to 1 MiB."""
MAX_EVENTS = 20_000
MAX_SYSTEMD_LOG = 1 << 20
PCRS = 24

NO_ACTION, SEPARATOR, ACTION, EVENT_TAG, CRTM_VERSION, CPU_MICROCODE, IPL = 0x03, 0x04, 0x05, 0x06, 0x08, 0x09, 0x0D
EFI_VARIABLE_DRIVER_CONFIG, EFI_VARIABLE_BOOT, EFI_APPLICATION = 0x80000001, 0x80000002, 0x80000003
EFI_BOOT_DRIVER, EFI_RUNTIME_DRIVER, EFI_GPT, EFI_ACTION = 0x80000004, 0x80000005, 0x80000006, 0x80000007
EFI_BLOB2, EFI_TABLES2 = 0x8000000A, 0x8000000B
EFI_VARIABLE_BOOT2, EFI_GPT2, EFI_VARIABLE_AUTHORITY = 0x8000000C, 0x8000000D, 0x800000E0
INITRD, LOAD_OPTIONS = ((0x8F3B22EC).to_bytes(4, "little"), (0x8F3B22ED).to_bytes(4, "little"))
"""How the data of an EVENT_TAG begins that the kernel's EFI stub has measured: linux
drivers/firmware/efi/libstub/efistub.h."""
SYSTEMD = -1
"""The kind of an event that systemd logged; its data is systemd's own kind, NUL, what was measured."""
OS_SEPARATOR = "os-separator"
"""What systemd 261 and later, in an initrd with systemd, extends the PCRs of the firmware and the boot loader with:
systemd-pcrosseparator.service(8)."""

_SHA1, _SHA256 = 0x0004, 0x000B
_NAMES = {_SHA1: "SHA-1", 0x0C: "SHA-384", 0x0D: "SHA-512", 0x12: "SM3-256"}
_SIZES = {0x04: 20, _SHA256: 32, 0x0C: 48, 0x0D: 64, 0x12: 32, 0x27: 32, 0x28: 48, 0x29: 64}
"""Digest sizes by algorithm (TCG Algorithm Registry): some firmware uses one that is not in the log's header."""
_HEADER = struct.Struct("<II20sI")
_SIGNATURE = b"Spec ID Event03\0"
_LOCALITY = b"StartupLocality\0"
_REST = bytes(16)
"""Where the unused rest of the buffer begins: an event of type 0 without digests and data, as in Linux."""
_MAX_BANKS = 16
_SHA256_HINT = "turn on the SHA-256 PCR bank in the firmware's setup"


class Event(NamedTuple):
    """One extension of one PCR."""

    pcr: int
    kind: int
    digest: bytes | None
    """Of the SHA-256 bank; None when the log has none for this event."""
    data: bytes
    """What the log says of it. Only the digest was measured: the firmware, or an attacker, may say anything here."""
    time: float = 0.0
    """Seconds since the kernel started, of what systemd logged."""


class Log(NamedTuple):
    """The firmware's event log."""

    events: tuple[Event, ...]
    """In the order in which they were extended; those that extend nothing are left out."""
    locality: int
    """Of the TPM's startup: 0, 3, or 4 when a hardware root of trust came first. PCR 0 starts with it."""
    problem: str
    """Why reading stopped before the end; empty when it did not. What was read may be right all the same."""


def parse_event_log(data: bytes) -> Log:
    """A crypto-agile log. Raises Malformed when nothing of it can be used: code `event-log-sha1` or
    `event-log-no-sha256` without SHA-256."""
    if len(data) > MAX_LOG:
        raise Malformed(f"the event log is larger than {MAX_LOG >> 20} MiB")
    sizes, at = _parse_header(data)
    events: list[Event] = []
    locality: int | None = None
    problem = ""
    end = len(data.rstrip(b"\0\xff"))  # padding; the last event may end in such bytes too: they stay in `data`
    while at < end and data[at : at + 16] != _REST:
        if len(events) == MAX_EVENTS:
            problem = f"there are more than {MAX_EVENTS} events"
            break
        try:
            event, at = _parse_event(data, at, sizes)
        except struct.error:
            problem = f"after {len(events)} events: it is cut short"
            break
        except ValueError as error:
            problem = f"after {len(events)} events: {error}"
            break
        if event.kind != NO_ACTION:
            events.append(event)
        elif locality is None and event.data[:16] == _LOCALITY and len(event.data) > 16:
            locality = event.data[16]
    return Log(tuple(events), locality or 0, problem)


def _parse_header(data: bytes) -> tuple[dict[int, int], int]:
    """Digest sizes by algorithm, from the first event, and where the second one starts."""
    try:
        _, kind, _, size = _HEADER.unpack_from(data)
    except struct.error:
        raise Malformed("the event log is empty") from None
    spec = data[_HEADER.size : _HEADER.size + size]
    if kind != NO_ACTION or not spec.startswith(_SIGNATURE):
        raise Malformed("the event log has SHA-1 digests only", hint=_SHA256_HINT, code="event-log-sha1")
    try:
        (count,) = struct.unpack_from("<I", spec, 24)
        if count > _MAX_BANKS:
            raise Malformed(f"the event log names {count} hash algorithms")
        sizes = dict(struct.unpack_from("<HH", spec, 28 + 4 * each) for each in range(count))
    except struct.error:
        raise Malformed("the event log's first event is cut short") from None
    if _SHA256 not in sizes:
        names = " and ".join(_NAMES.get(each, f"algorithm {each:#x}") for each in sizes)
        code = "event-log-sha1" if set(sizes) == {_SHA1} else "event-log-no-sha256"
        raise Malformed(f"the event log has {names + ' digests only' if names else 'no digests'}", _SHA256_HINT, code)
    if sizes[_SHA256] != 32:
        raise Malformed(f"the event log has SHA-256 digests of {sizes[_SHA256]} bytes")
    return _SIZES | sizes, _HEADER.size + size


def _parse_event(data: bytes, at: int, sizes: dict[int, int]) -> tuple[Event, int]:
    """A TCG_PCR_EVENT2, and where the next one starts. Raises struct.error, ValueError."""
    pcr, kind, count = struct.unpack_from("<III", data, at)
    at += 12
    if count > _MAX_BANKS:
        raise ValueError(f"an event has {count} digests")
    digest = None
    for _ in range(count):
        (algorithm,) = struct.unpack_from("<H", data, at)
        if algorithm not in sizes:
            raise ValueError(f"an event has a digest of the unknown algorithm {algorithm:#x}")
        if algorithm == _SHA256:
            (digest,) = struct.unpack_from("32s", data, at + 2)
        at += 2 + sizes[algorithm]
    (size,) = struct.unpack_from("<I", data, at)
    at += 4
    if size > len(data) - at:
        raise ValueError(f"an event of {size} bytes where {len(data) - at} are left")
    if pcr >= PCRS and kind != NO_ACTION:
        raise ValueError(f"an event of PCR {pcr}")
    return Event(pcr, kind, digest, data[at : at + size]), at + size


def parse_systemd_log(data: bytes) -> tuple[Event, ...]:
    """/run/log/systemd/tpm2-measure.log of systemd 255 and later; older ones keep none.

    RFC 7464 records, each an object of the TCG "Canonical Event Log" in JSON: pcr, digests, content_type, content.
    Never fails: what is no record of a PCR (systemd's NV indexes have some) is left out.
    """
    found = []
    for record in data[:MAX_SYSTEMD_LOG].split(b"\x1e"):
        try:
            fields = json.loads(record)
            found.append(_systemd_event(fields))
        except (ValueError, KeyError, TypeError, RecursionError):
            continue
    return tuple(found)


def _systemd_event(fields: Any) -> Event:
    pcr = fields["pcr"]
    (digest,) = (bytes.fromhex(each["digest"]) for each in fields["digests"] if each["hashAlg"] == "sha256")
    if type(pcr) is not int or not 0 <= pcr < PCRS or len(digest) != 32:
        raise ValueError
    content = fields.get("content")
    content = content if isinstance(content, dict) else {}
    kind, text, stamp = (content.get(name) for name in ("eventType", "string", "timestamp"))
    time = stamp / 1e6 if type(stamp) is int and 0 <= stamp < 1 << 63 else 0.0
    return Event(pcr, SYSTEMD, digest, f"{kind or ''}\0{text or ''}".encode("utf-8", "replace"), time)


def initial_pcrs(locality: int = 0) -> dict[int, bytes]:
    """PCR values after the TPM's startup at `locality`. 17 to 22 are all ones until a dynamic launch."""
    values = {pcr: (b"\xff" if 17 <= pcr <= 22 else b"\0") * 32 for pcr in range(PCRS)}
    values[0] = bytes(31) + bytes([locality])
    return values


def extend(value: bytes, digest: bytes) -> bytes:
    """A PCR after one more extension."""
    return sha256(value + digest).digest()


def replay(events: Iterable[Event], locality: int = 0) -> dict[int, bytes]:
    """PCR values after these events. A PCR is left out when one of its events has no digest."""
    values = initial_pcrs(locality)
    unknown = set()
    for event in events:
        if event.digest is None:
            unknown.add(event.pcr)
        else:
            values[event.pcr] = extend(values[event.pcr], event.digest)
    return {pcr: value for pcr, value in values.items() if pcr not in unknown}
