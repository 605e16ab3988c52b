# SPDX-License-Identifier: Apache-2.0
"""What was measured, in words, and how one boot differs from another.

    Event ──describe──> Item: what a person calls it, and a stable code of what it stands for
    Items of the last good boot, Items of this one ──compare──> Differences, the first event first
    Baseline: the Items of a good boot, as a file

Everything here is pure; the texts come from a log that anybody may have written, and are made printable.
"""

import json
import re
from collections import Counter, deque
from collections.abc import Iterable, Iterator, Mapping, Sequence
from hashlib import sha256
from itertools import islice
from typing import Any, NamedTuple

from ..errors import Malformed, NewerFormat
from ..tpm import pcr_policy
from . import eventlog, uefi
from .eventlog import Event, Log

CAUSES = {
    "firmware": "the firmware",
    "firmware-settings": "a setting of the firmware",
    "option-rom": "the firmware of a device",
    "boot-order": "the firmware's boot order",
    "boot-path": "the way in which the firmware came to the boot loader",
    "partition-table": "a partition table",
    "secure-boot": "the Secure Boot mode",
    "secure-boot-keys": "the Secure Boot keys",
    "dbx": "the Secure Boot revocation list (dbx)",
    "signer": "the certificate that a boot program was accepted by",
    "sbat": "shim's revocation level (SBAT)",
    "mok": "the Machine Owner Keys (MOK) of shim",
    "boot-loader": "the boot loader",
    "boot-loader-files": "a file of the boot loader",
    "boot-loader-config": "the boot loader's configuration",
    "grubenv": "GRUB's environment (grubenv)",
    "kernel": "the kernel",
    "initrd": "the initramfs",
    "command-line": "the kernel command line",
    "uki": "the unified kernel image",
    "extension": "a credential, add-on or extension image beside the kernel",
    "ima": "what IMA measured",
    "systemd": "what systemd measured",
    "other": "something else",
}
"""What an event stands for. The codes are an interface for scripts; they never change meaning."""

TEXT_MAX = 4096
"""Characters of one text that are kept: GRUB logs whole menu entries."""
BASELINE_MAX = 2 << 20
"""Bytes."""
_VERSION = 1
_ON = b"\x01"
_SEPARATORS = (sha256(bytes(4)).digest(), sha256(b"\xff" * 4).digest())
_GROWING = (10, 11)
"""PCRs that IMA, and systemd without a log of it, extend after early boot."""
_PHASES = ("enter-initrd", "leave-initrd", "sysinit", "ready")


class Item(NamedTuple):
    """One event, reduced to what is worth keeping."""

    pcr: int
    kind: int
    digest: bytes
    cause: str
    """A key of CAUSES."""
    text: str


# Words ------------------------------------------------------------------------------------------------------


def describe(event: Event) -> Item:
    """Never fails: what is not of the documented form gets a plain name."""
    try:
        cause, text = _describe(event)
    except Malformed:
        cause, text = _by_pcr(event)
    return Item(event.pcr, event.kind, event.digest or b"", cause, printable(text, TEXT_MAX))


def printable(text: str, limit: int) -> str:
    """One line that no terminal takes for a command."""
    line = " ".join(text[: 4 * limit].split())
    return "".join(each if each.isprintable() else "?" for each in line)[:limit].rstrip()


def printable_line(text: str, limit: int) -> str:
    """The same, its blanks as they are."""
    return "".join(each if each.isprintable() else "?" for each in text[:limit]).rstrip()


def _describe(event: Event) -> tuple[str, str]:
    kind, pcr = event.kind, event.pcr
    if kind == eventlog.SYSTEMD:
        return _systemd(event.data)
    if kind in (eventlog.EFI_VARIABLE_DRIVER_CONFIG, eventlog.EFI_VARIABLE_BOOT, eventlog.EFI_VARIABLE_BOOT2):
        return _variable(event)
    if kind == eventlog.EFI_VARIABLE_AUTHORITY:
        return _authority(event)
    if kind == eventlog.EFI_APPLICATION:
        return _program(uefi.image_path(event.data))
    if kind in (eventlog.EFI_BOOT_DRIVER, eventlog.EFI_RUNTIME_DRIVER):
        path = uefi.image_path(event.data)
        return ("option-rom" if pcr == 2 else "firmware"), f"driver {path}".rstrip()
    if kind == eventlog.IPL:
        return _loader(event)
    if kind == eventlog.EVENT_TAG:
        return _tagged(event)
    if kind == eventlog.SEPARATOR:
        wrong = event.digest not in _SEPARATORS
        return "boot-path", "separator: an error of the firmware" if wrong else "separator"
    if kind in (eventlog.ACTION, eventlog.EFI_ACTION):
        return _action(event)
    if kind in (eventlog.EFI_GPT, eventlog.EFI_GPT2):
        return "partition-table", _partitions(event.data)
    return _firmware(event)


def _partitions(data: bytes) -> str:
    try:
        disk, names = uefi.partitions(data)
    except Malformed:
        return "partition table of the boot disk"
    more = f", and {len(names) - _NAMES} more" if len(names) > _NAMES else ""
    return f"partition table of disk {disk}: {', '.join(name or 'no name' for name in names[:_NAMES])}{more}"


_NAMES = 8


def _by_pcr(event: Event) -> tuple[str, str]:
    """For an event whose data is not of the documented form."""
    return _BY_PCR.get(event.pcr, "other"), f"event of type {event.kind:#x}"


_BY_PCR = {
    0: "firmware",
    1: "firmware-settings",
    2: "option-rom",
    3: "firmware-settings",
    4: "boot-loader",
    5: "partition-table",
    6: "firmware",
    7: "secure-boot-keys",
}


def _action(event: Event) -> tuple[str, str]:
    text = _text(event.data)
    if text in _SWITCHES:
        return "firmware-settings", f"{_SWITCHES[text]} ({text})"
    return ("secure-boot" if event.pcr == 7 else "boot-path"), text or "nothing said"


_SWITCHES = {
    "DMA Protection Disabled": "the protection against devices that read memory is off",
    "UEFI Debug Mode": "the firmware can be debugged",
}
"""In PCR 7, and no part of Secure Boot."""


def _firmware(event: Event) -> tuple[str, str]:
    """Kinds that have a name, and perhaps a word of the firmware's: a version, or what is in a volume."""
    if event.kind not in _FIRMWARE:
        return _by_pcr(event)
    cause, text = _FIRMWARE[event.kind]
    if cause == "firmware":
        cause = {1: "firmware-settings", 2: "option-rom", 3: "firmware-settings"}.get(event.pcr, cause)
    data = event.data
    if event.kind in (eventlog.EFI_BLOB2, eventlog.EFI_TABLES2):
        data = data[1 : 1 + data[0]] if data else b""
    said = _said(data)
    if not said and event.kind == eventlog.CRTM_VERSION and len(data) == 16:
        said = uefi.guid(data)
    return cause, f"{text} {said}".rstrip()


def _said(data: bytes) -> str:
    """A text, when it looks like one."""
    text = _text(data).strip()
    return text if len(text) > 2 and text.isascii() and text.isprintable() else ""


_FIRMWARE = {
    0x00: ("firmware", "firmware, before its code"),
    0x01: ("firmware", "firmware code (POST)"),
    0x07: ("firmware", "firmware root of trust"),
    0x08: ("firmware", "firmware version"),
    0x09: ("firmware", "CPU microcode"),
    0x0A: ("firmware-settings", "platform configuration"),
    0x0B: ("firmware-settings", "table of devices"),
    0x0C: ("firmware", "firmware, compact hash"),
    0x0E: ("partition-table", "partition of the boot loader"),
    0x0F: ("option-rom", "code of another processor"),
    0x10: ("firmware-settings", "settings of another processor"),
    0x11: ("firmware", "information about another processor"),
    0x12: ("boot-path", "boot devices left out"),
    0x13: ("firmware", "firmware code (POST)"),
    0x80000008: ("firmware", "firmware volume"),
    0x80000009: ("firmware-settings", "firmware tables (SMBIOS)"),
    0x8000000A: ("firmware", "firmware volume"),
    0x8000000B: ("firmware-settings", "firmware tables"),
    0x80000010: ("firmware", "hardware root of trust"),
    0x800000E1: ("option-rom", "firmware of a device (SPDM)"),
    0x800000E2: ("option-rom", "settings of a device (SPDM)"),
    0x800000E3: ("option-rom", "policy for devices (SPDM)"),
    0x800000E4: ("option-rom", "identity of a device (SPDM)"),
}


def _variable(event: Event) -> tuple[str, str]:
    try:
        name, data = uefi.variable(event.data)
    except Malformed:  # Intel Boot Guard logs a string instead
        said = _said(event.data)
        return ("firmware", said) if said else _by_pcr(event)
    if name in ("SecureBoot", "AuditMode", "DeployedMode", "SetupMode"):
        title = "Secure Boot" if name == "SecureBoot" else name
        return "secure-boot", f"{title} {'on' if data[:1] == _ON else 'off'}"
    if name in ("PK", "KEK", "db", "dbx", "dbt", "dbr"):
        return ("dbx" if name == "dbx" else "secure-boot-keys"), f"{name}: {_signatures(data)}"
    if name == "BootOrder":
        numbers = (f"{data[at + 1]:02X}{data[at]:02X}" for at in range(0, len(data) & ~1, 2))
        return "boot-order", f"BootOrder: {' '.join(numbers)}"
    if re.fullmatch("Boot[0-9A-F]{4}", name):
        return "boot-order", f"{name}: {uefi.load_option(data).description}"
    return ("secure-boot-keys" if event.pcr == 7 else "firmware-settings"), f"UEFI variable {name}"


def _signatures(data: bytes) -> str:
    try:
        found = uefi.signatures(data)
    except Malformed:
        return f"{len(data)} bytes"
    many = f"{found.entries} entr{'y' if found.entries == 1 else 'ies'}"
    return many + (f" ({'; '.join(each or 'no name' for each in found.names)})" if found.names else "")


def _authority(event: Event) -> tuple[str, str]:
    name, data = uefi.variable(event.data)
    if name == "SbatLevel":
        return "sbat", f"SbatLevel: {_text(data)}"
    if name.startswith("Mok") and name != "MokList":
        return "mok", name
    who = uefi.signer(data)
    return ("mok" if name == "MokList" else "signer"), f"{name}: {who or 'a hash'}"


def _program(path: str) -> tuple[str, str]:
    """An EFI program, by its file's name: nothing else in the log says what it is."""
    file = path.replace("/", "\\").rpartition("\\")[2].lower()
    if "\\efi\\linux\\" in path.lower():
        return "uki", f"unified kernel image {path}"
    if _is_kernel(file):
        return "kernel", f"kernel image {path}"
    if not path or path == "memory":
        return "kernel", "image that a boot loader handed on: the kernel"
    if path.startswith(("firmware file", "PCI device")):
        return "firmware", f"EFI program from {path}"
    if file.startswith(_ONCE):
        return "boot-path", f"EFI program {path}, which runs for one boot"
    return "boot-loader", f"EFI program {path}"


_ONCE = ("fwupd", "mmx64", "mmaa64", "fbx64", "fbaa64", "mokmanager", "fallback")
"""A firmware update of fwupd's, shim's MokManager, and shim's fallback that makes the boot entries anew."""


def _is_kernel(file: str) -> bool:
    return bool(re.match(r"(vmlinu|bzimage|kernel|linux|image|xen[-.])", file)) and not file.endswith(
        (".cfg", ".mod", ".conf")
    )


def _is_initrd(file: str) -> bool:
    return bool(re.match(r"(initrd|initramfs|ramdisk|booster)", file)) or file.endswith(("ucode.img", "ucode.cpio"))


def _loader(event: Event) -> tuple[str, str]:
    text = _text(event.data)
    if event.pcr == 11 and text.startswith("."):
        name = event.digest == sha256(event.data).digest()
        return _SECTIONS.get(text, "uki"), f"section {text}{', its name' if name else ''}"
    if event.pcr == 14 or text.startswith("Mok"):
        return "mok", text or "nothing said"
    for prefix in ("kernel_cmdline", "grub_kernel_cmdline", "module_cmdline"):  # grub_: of the GRUB of RHEL 8
        if text.startswith(prefix):
            return "command-line", f"command line {text[len(prefix) :].lstrip(': ')}"
    if text.startswith("grub_cmd"):
        return _command(text[len("grub_cmd") :].lstrip(": "))
    if event.pcr == 12:
        return ("extension", text) if _EXTENSION.search(text) else ("command-line", f"command line {text}")
    if event.pcr == 13:
        return "extension", text or "nothing said"
    if event.pcr == 9 and text:
        return _file(text.removeprefix("grub_linuxefi "))
    if event.pcr == 8:  # systemd before 251
        return "command-line", f"command line {text}"
    return ("boot-loader" if event.pcr in (4, 5) else "other"), text or "nothing said"


_EXTENSION = re.compile(r"credential|extension|initrd", re.IGNORECASE)

_SECTIONS = {
    ".linux": "kernel",
    ".uname": "kernel",
    ".osrel": "kernel",
    ".initrd": "initrd",
    ".cmdline": "command-line",
}


def _command(line: str) -> tuple[str, str]:
    word, _, rest = line.partition(" ")
    loaded = _is_kernel(rest.partition(" ")[0].rpartition("/")[2].lower())
    if word in ("linux", "linuxefi", "linux16") or (word in ("module", "module2", "xen_module") and loaded):
        return "command-line", f"command line {rest}"
    return "boot-loader-config", f"GRUB command {line}"


def _file(path: str) -> tuple[str, str]:
    file = path.rpartition("/")[2].lower()
    if _is_kernel(file):
        return "kernel", f"kernel file {path}"
    if _is_initrd(file):
        return "initrd", f"initramfs file {path}"
    if file == "grubenv":
        return "grubenv", f"GRUB environment {path}"
    if file.endswith((".cfg", ".conf")):
        return "boot-loader-config", f"GRUB configuration {path}"
    return "boot-loader-files", f"file {path}"


_TAGS = {
    0x8F3B22EC: ("initrd", "initramfs, as the kernel got it"),
    0x8F3B22ED: ("command-line", "command line, as the kernel got it"),
    0xF5BC582A: ("boot-loader-config", "systemd-boot's loader.conf"),
    0x6C46F751: ("extension", "device tree add-on"),
    0x49DFFE0F: ("extension", "initrd add-on"),
    0xDAC08E1A: ("extension", "microcode add-on"),
    0x13AED6DB: ("uki", "profile of the unified kernel image"),
    0xD5CB7CBC: ("firmware-settings", "SMBIOS system information"),
    0xE0D47BC8: ("firmware-settings", "SMBIOS board information"),
    0xC0B3BD23: ("extension", "SMBIOS vendor strings"),
}
"""TCG_PCClientTaggedEvent ids: linux drivers/firmware/efi/libstub/efistub.h, systemd src/fundamental/tpm2-pcr.h."""


def _tagged(event: Event) -> tuple[str, str]:
    tag = int.from_bytes(event.data[:4], "little")
    return _TAGS.get(tag) or (_BY_PCR.get(event.pcr, "other"), f"tagged event {tag:#x}")


def _systemd(data: bytes) -> tuple[str, str]:
    kind, _, text = data.decode("utf-8", "replace").partition("\0")
    return "systemd", f"systemd {kind}: {text}"


def _text(data: bytes) -> str:
    """A string as the log has it, or its beginning: ASCII or UTF-16, with or without NUL."""
    data = data[: 4 * TEXT_MAX]
    if len(data) >= 4 and not any(data[1:64:2]) and any(data[:64:2]):
        return uefi.utf16(data)
    return data.partition(b"\0")[0].decode("utf-8", "replace")


def with_command_line(items: Iterable[Item], command_line: str) -> tuple[Item, ...]:
    """Adds the text to the events that have its digest: the kernel's EFI stub logs only that there was one."""
    texts = {sha256((command_line + end).encode("utf-16-le", "replace")).digest() for end in ("\0", "")}
    line = printable(f"command line {command_line}", TEXT_MAX)
    return tuple(item._replace(text=line) if item.digest in texts else item for item in items)


# What is believed -------------------------------------------------------------------------------------------


def believed(log: Log, later: Sequence[Event], live: Mapping[int, bytes]) -> dict[int, tuple[Event, ...]]:
    """By PCR, the events whose replay equals the live value; our own cap is no event. Other PCRs are left out.

    `later` is what systemd logged.
    """
    found = {}
    for pcr, (events, value) in replayed(log).items():
        if pcr in live:
            more = continued(pcr, value, later, live[pcr])
            if more is not None:
                found[pcr] = (*events, *more)
    return found


def settled(log: Log, later: Sequence[Event], live: Mapping[int, bytes]) -> Log:
    """The log without two flaws that are known: a startup locality that the firmware did not tell, and events that the
    kernel has appended a second time, from the firmware's table of final events. Each is taken out only where more
    PCRs then replay to their live values, which proves it."""
    best, count = log, len(believed(log, later, live))
    for made in (_localities, _without_repeats):
        for other in made(best):
            if len(live) > count < (more := len(believed(other, later, live))):
                best, count = other, more
    return best


def _localities(log: Log) -> Iterator[Log]:
    return (log._replace(locality=each) for each in (0, 3, 4) if each != log.locality)


def _without_repeats(log: Log) -> Iterator[Log]:
    """Without one run of events that comes again at once: among the last events, the longest runs first."""
    keys = [(event.pcr, event.digest) for event in log.events]
    places: dict[tuple[int, bytes | None], list[int]] = {}
    pairs = []
    for at in range(max(0, len(keys) - _TAIL), len(keys)):
        earlier = places.setdefault(keys[at], [])
        pairs += [(at - each, at) for each in earlier]
        earlier.append(at)
    runs = (
        (at, length)
        for length, at in sorted(pairs, reverse=True)[:_PAIRS]
        if keys[at - length : at] == keys[at : at + length]
    )
    for at, length in islice(runs, _RUNS):
        yield log._replace(events=log.events[:at] + log.events[at + length :])


_TAIL, _PAIRS, _RUNS = 500, 4096, 16
"""How far a repetition is looked for."""


def at(asked: float, log: Log | None, later: Sequence[Event], live: Mapping[int, bytes]) -> dict[int, bytes]:
    """PCRs 0 to 15 as they were at the time `asked`, in seconds since the kernel started: believed PCRs without what
    systemd added since; of the others those that nothing extends after early boot. What cannot be told is left out."""
    trusted = believed(log, later, live) if log else {}
    events = (
        event for kept in trusted.values() for event in kept if event.kind != eventlog.SYSTEMD or event.time < asked
    )
    then = eventlog.replay(events, log.locality if log else 0)
    touched = {event.pcr for event in later}
    quiet = {pcr for pcr in range(16) if pcr not in touched and (pcr not in _GROWING or live[pcr] == pcr_policy.UNSET)}
    return {pcr: then[pcr] if pcr in trusted else live[pcr] for pcr in range(16) if pcr in trusted or pcr in quiet}


def replayed(log: Log) -> dict[int, tuple[tuple[Event, ...], bytes]]:
    """Events and value of each PCR that can be replayed."""
    events: dict[int, list[Event]] = {pcr: [] for pcr in range(eventlog.PCRS)}
    for event in log.events:
        events[event.pcr].append(event)
    return {pcr: (tuple(events[pcr]), value) for pcr, value in eventlog.replay(log.events, log.locality).items()}


def continued(pcr: int, value: bytes, later: Sequence[Event], live: bytes) -> tuple[Event, ...] | None:
    """What extended this PCR from `value` to what it is now: the first events of `later`, and our cap before or after
    them; None if they did not. (The last ones may have come after the PCR was read.)

    systemd 252 to 254 extends PCR 11 with the boot phases and logs nothing: those are tried.
    """
    logged = tuple(event for event in later if event.pcr == pcr)
    ways: list[tuple[Event, ...]] = [logged, *(_phases() if pcr == 11 else ())]
    cap = pcr == pcr_policy.CAP_PCR
    for events in ways:
        for start in (value, eventlog.extended(value, pcr_policy.CAP_DIGEST)) if cap else (value,):
            reached = start
            for count in range(len(events) + 1):
                if reached == live or (cap and eventlog.extended(reached, pcr_policy.CAP_DIGEST) == live):
                    return events[:count]
                if count < len(events):
                    reached = eventlog.extended(reached, events[count].digest or b"")
    return None


def _phases() -> Iterator[tuple[Event, ...]]:
    return (tuple(map(_phase, _PHASES[first:])) for first in range(len(_PHASES)))


def _phase(name: str) -> Event:
    time = 0.0 if name == "enter-initrd" else float("inf")
    return Event(11, eventlog.SYSTEMD, sha256(name.encode()).digest(), f"phase\0{name}".encode(), time)


# Comparing --------------------------------------------------------------------------------------------------


class Difference(NamedTuple):
    """One event that is not as it was. `old` or `new` is None for an event that came or went."""

    pcr: int
    cause: str
    old: Item | None
    new: Item | None
    place: int
    """Where in the new log: differences are sorted by it."""

    @property
    def moved(self) -> bool:
        """The same events in another order."""
        return self.old is not None and self.new is not None and self.old.digest == self.new.digest


def compare(old: Sequence[Item], new: Sequence[Item], pcrs: Iterable[int]) -> tuple[Difference, ...]:
    """All differences in these PCRs, in the order of the new log, an event that is gone behind the last one before it
    that is not; linear in the number of events.

    In each PCR, events with the same digest are the same, wherever they are. Of the rest, those about the same
    thing (a variable, a file, a command) belong together: old and new.
    """
    found: list[Difference] = []
    there: dict[int, int] = {}
    wanted = set(pcrs)
    for pcr in sorted(wanted):
        before, now = ([each for each in enumerate(items) if each[1].pcr == pcr] for items in (old, new))
        found += _differences(pcr, before, now, there)
    place = 0
    for at, item in enumerate(old):
        if at in there:
            place = there[at] + 1
        elif item.pcr in wanted:
            found.append(Difference(item.pcr, item.cause, item, None, place))
    return tuple(sorted(found, key=lambda each: each.place))


def _differences(
    pcr: int, old: list[tuple[int, Item]], new: list[tuple[int, Item]], there: dict[int, int]
) -> list[Difference]:
    """What came or changed. `there` gets the places in the old log of what is not gone, and those in the new one."""
    same = 0
    while same < min(len(old), len(new)) and old[same][1].digest == new[same][1].digest:
        same += 1
    there |= {before: now for (before, _), (now, _) in zip(old[:same], new[:same], strict=True)}
    old, new = old[same:], new[same:]
    before, now = [item for _, item in old], [item for _, item in new]
    gone, came = _unmatched(before, now), _unmatched(now, before)
    kept = _without(old, gone), _without(new, came)
    there |= {at: place for (at, _), (place, _) in zip(*kept, strict=True)}
    if old and not gone and not came:
        (place, item), (_, was) = new[0], old[0]
        return [Difference(pcr, item.cause, was, item, place)]
    waiting: dict[tuple[Any, ...], deque[int]] = {}
    for at in gone:
        waiting.setdefault(_subject(before[at]), deque()).append(at)
    found = []
    for at in came:
        place, item = new[at]
        partner = None
        if partners := waiting.get(_subject(item)):
            replaced, partner = old[partners.popleft()]
            there[replaced] = place
        found.append(Difference(pcr, _cause(partner, item), partner, item, place))
    return found


def _without(these: list[tuple[int, Item]], left_out: Iterable[int]) -> list[tuple[int, Item]]:
    out = set(left_out)
    return [each for at, each in enumerate(these) if at not in out]


def _unmatched(these: list[Item], others: list[Item]) -> list[int]:
    """Indices in `these` of what `others` lacks; a digest that both have is matched as often as both have it, and first
    where the text is the same: two network cards have one option ROM."""
    exact = Counter((item.digest, item.text) for item in others)
    left = []
    for at, item in enumerate(these):
        if exact[item.digest, item.text]:
            exact[item.digest, item.text] -= 1
        else:
            left.append(at)
    count: Counter[bytes] = Counter()
    for (digest, _), many in exact.items():
        count[digest] += many
    lacking = []
    for at in left:
        if count[these[at].digest]:
            count[these[at].digest] -= 1
        else:
            lacking.append(at)
    return lacking


def _subject(item: Item) -> tuple[Any, ...]:
    """What an event is about, whatever it says of it."""
    if item.text.startswith("section "):
        return item.kind, item.text
    if item.cause in ("kernel", "initrd", "command-line"):  # a file of a version has another name in the next
        return item.kind, item.cause, item.text.partition(" ")[0]
    if item.kind == eventlog.IPL and item.cause == "boot-loader-config":
        words = item.text.split(" ")  # GRUB command set NAME=VALUE
        return item.kind, *words[:3], words[3].partition("=")[0] if words[2:3] == ["set"] and words[3:] else ""
    if item.kind in (eventlog.EFI_VARIABLE_DRIVER_CONFIG, eventlog.EFI_VARIABLE_BOOT, eventlog.EFI_VARIABLE_BOOT2):
        return item.kind, re.split("[: ]", item.text)[0]
    if item.kind in _ONE_OF_ITS_CAUSE:
        return item.kind, item.cause
    return item.kind, item.text


_ONE_OF_ITS_CAUSE = (
    eventlog.EFI_VARIABLE_AUTHORITY, eventlog.EFI_APPLICATION, eventlog.SYSTEMD, eventlog.CRTM_VERSION,
    eventlog.EFI_GPT, eventlog.EFI_GPT2, eventlog.SEPARATOR,
)  # fmt: skip
"""Kinds whose text is what changes, not the name of a thing."""


_KERNEL_BEFORE = re.compile("^command line (BOOT_IMAGE=)?")


def _cause(old: Item | None, new: Item) -> str:
    """GRUB has kernel and command line in one line: which of them changed?"""
    if old and new.cause == "command-line":
        before, now = (_KERNEL_BEFORE.sub("", item.text).partition(" ")[0] for item in (old, new))
        if "/" in now and "=" not in now and before != now:
            return "kernel"
    return new.cause


# Baseline ---------------------------------------------------------------------------------------------------


class Chip(NamedTuple):
    """Which TPM it was."""

    srk: str
    """The SRK's name, in hex: another one after TPM2_Clear."""
    identity: str
    """The name of a key of the endorsement hierarchy, in hex: the same for good, in one TPM. '' when not known."""


class Baseline(NamedTuple):
    """A good boot: the believed PCRs as they were when the TPM released the key, and the events behind them.

    As JSON, version 1: {"version", "kernel", "cmdline", "chip": {"srk", "identity"}, "pcrs": NUMBER -> 64 hex digits,
    "events": [[pcr, kind, digest, cause, text], ...]}. It proves nothing: it explains.
    """

    kernel: str
    """`uname -r`."""
    cmdline: str
    chip: Chip
    pcrs: Mapping[int, bytes]
    items: tuple[Item, ...]

    def encode(self) -> bytes:
        """Malformed for what would be too long for `decode`."""
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
        """Malformed, or NewerFormat, for anything that `encode` did not write."""
        if len(data) > BASELINE_MAX:
            raise Malformed("event-log baseline: too long")
        try:
            fields = json.loads(data)
            version = fields["version"]
            if type(version) is int and version > _VERSION:
                raise NewerFormat("event-log baseline: written by a newer version", hint="update unlock")
            if version != _VERSION:
                raise ValueError("its version")
            chip = Chip(_string(fields["chip"]["srk"], 68), _string(fields["chip"]["identity"], 68))
            pcrs = {_pcr(int(pcr)): digest_of(value) for pcr, value in fields["pcrs"].items()}
            items = tuple(_item(*each) for each in fields["events"])
            return cls(_string(fields["kernel"], 256), _string(fields["cmdline"], TEXT_MAX), chip, pcrs, items)
        except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
            raise Malformed(f"event-log baseline: cannot be read: {type(error).__name__}") from None


def _item(pcr: Any, kind: Any, digest: Any, cause: Any, text: Any) -> Item:
    if type(kind) is not int or cause not in CAUSES:
        raise ValueError
    return Item(_pcr(pcr), kind, digest_of(digest), cause, _string(text, TEXT_MAX))


def _pcr(value: Any) -> int:
    if type(value) is not int or not 0 <= value < eventlog.PCRS:
        raise ValueError
    return value


def digest_of(value: Any) -> bytes:
    """A SHA-256 from hex. Raises ValueError, TypeError."""
    digest = bytes.fromhex(value)
    if len(digest) != 32:
        raise ValueError
    return digest


def _string(value: Any, limit: int) -> str:
    if type(value) is not str or printable(value, limit) != value:
        raise ValueError
    return value
