# SPDX-License-Identifier: Apache-2.0
"""Finds the files on disk that this boot has read, and records them before an update replaces them.

    event log: a name, a digest ──> a file on /boot or the EFI system partition that has this digest ──> BootedFiles
    every name there, at the same look ──> known: measured, or as this host left it; or foreign
    BootedFiles ──record_booted_files──> /var/lib/unlock/booted.json, after each good boot

The predictions start from these files. The record counts only as far as the event log of the same boot has the same
digests.

What is foreign stays so in this boot, whatever its content is later, until the operator accepts all that is
foreign. A file that is not known is vouched for only if this look has found nothing of its name, or a known file, and
nothing foreign that a program of this system could have made it from.

booted.json needs no MAC, though /var may be plain. It counts only in the boot whose id it has, which the kernel draws
at random (122 bits): who edits it while the host is off writes the record of another boot, and the files are looked at
anew. While the host is up only root writes there.

JSON, version 1: {"version", "boot": boot id, "files": NAME -> [PATH, 64 hex digits], "texts": NAME -> content,
"images": [[64 hex digits, PATH], ...], "signed": PATH -> 64 hex digits or "", "initrd": PATH, "uki": [64 hex digits],
"beside": NAME -> 64 hex digits, "known": PATH -> 64 hex digits, "foreign": PATH -> 64 hex digits or "",
"sources": [PATH, ...], "looked": PATH -> DEVICE NUMBER, "disks": [DEVICE, ...]}.
NAME is GRUB's, PATH below the root directory.
"""

import json
import os
from collections.abc import Iterator, Mapping, Sequence
from hashlib import sha256
from itertools import combinations, islice
from typing import NamedTuple, TypedDict

from ..errors import Malformed, NewerFormat
from ..measured import eventlog
from ..measured.baseline import parse_digest
from ..measured.eventlog import Event, Log
from ..paths import Paths, write_atomically
from . import boot_files, boot_sources, boot_tree, grub_parser, grub_replay, grub_script, trusted_files, uki_replay
from .boot_files import without_counter
from .boot_tree import TOPS, BootTree
from .trusted_files import TrustedFiles, parse_text

BOOTED_MAX = 2 << 20
"""Bytes of booted.json."""
ACCEPT = "unlock policy predict --trust-files"
_VERSION = 1
_GRUB_SAVES = ("next_entry", "saved_entry", "prev_saved_entry", "prev_entry", "recordfail", "initrdfail")
"""The variables that the grub.cfg of Debian and Ubuntu saves in grubenv."""
_TRIES = 50_000


class _BootedJson(TypedDict):
    """booted.json; digests in hex."""

    version: int
    boot: str
    files: dict[str, list[str]]
    texts: dict[str, str]
    images: list[list[str]]
    signed: dict[str, str]
    initrd: str
    uki: list[str]
    beside: dict[str, str]
    known: dict[str, str]
    foreign: dict[str, str]
    sources: list[str]
    looked: dict[str, str]
    disks: list[str]


class BootedFiles(NamedTuple):
    """The files that this boot has read. Digests are SHA-256; files are paths below the root directory."""

    boot: str
    """The kernel's id of this boot."""
    files: Mapping[str, tuple[str, bytes]]
    """GRUB's name -> file, digest."""
    texts: Mapping[str, str]
    """GRUB's name -> content, of configuration files."""
    images: tuple[tuple[bytes, str], ...]
    """EFI programs in the order in which they were started: Authenticode, file. A kernel that GRUB read comes last."""
    signed: Mapping[str, bytes]
    """EFI program -> boot_files.signers_digest; b"" for one that is not signed."""
    initrd: str
    """The initramfs that the kernel's EFI stub got as it is; "" when that is no file."""
    uki: tuple[bytes, ...]
    """What systemd-stub extended PCR 11 with, when the last of `images` is a unified kernel image and says the same."""
    beside: Mapping[str, bytes]
    """What systemd-stub adds to the unified kernel image: boot_files.sidecar_digests."""
    known: Mapping[str, bytes]
    """Files that this boot has measured, or that are as this host left them -> digest."""
    foreign: Mapping[str, bytes]
    """Everything else that was there -> digest; b"" for what is no file, or not the only one of its name."""
    sources: tuple[str, ...]
    """Those of `foreign` from which a program of this system may make boot files."""
    looked: Mapping[str, str]
    """Mount point -> device number of the file system that was looked at."""
    disks: tuple[str, ...]
    """Where the whole disks are, below /sys/devices."""

    def measured_files(self) -> set[str]:
        """The files that this boot has measured; "" may be among them."""
        return {*dict(self.files.values()), *(path for _, path in self.images), self.initrd}

    def encode(self) -> bytes:
        """The content of booted.json. Raises Malformed when it would be too long for `decode`."""
        fields: _BootedJson = {
            "version": _VERSION,
            "boot": self.boot,
            "files": {name: [path, digest.hex()] for name, (path, digest) in self.files.items()},
            "texts": dict(self.texts),
            "images": [[digest.hex(), path] for digest, path in self.images],
            "signed": {path: digest.hex() for path, digest in self.signed.items()},
            "initrd": self.initrd,
            "uki": [digest.hex() for digest in self.uki],
            "beside": {name: digest.hex() for name, digest in self.beside.items()},
            "known": {path: digest.hex() for path, digest in self.known.items()},
            "foreign": {path: digest.hex() for path, digest in self.foreign.items()},
            "sources": list(self.sources),
            "looked": dict(self.looked),
            "disks": list(self.disks),
        }
        data = json.dumps(fields, separators=(",", ":")).encode()
        if len(data) > BOOTED_MAX:
            raise Malformed(f"the files of this boot take too much room to keep: {len(data)} bytes")
        return data

    @classmethod
    def decode(cls, data: bytes) -> "BootedFiles":
        """Raises Malformed or NewerFormat for anything that `encode` did not write."""
        try:
            fields = json.loads(data[: BOOTED_MAX + 1])
            if type(fields["version"]) is int and fields["version"] > _VERSION:
                raise NewerFormat("booted.json: written by a newer version", hint="update unlock")
            return cls(
                boot=parse_text(fields["boot"]),
                files={parse_text(name): _parse_file(each) for name, each in fields["files"].items()},
                texts={parse_text(name): parse_text(content) for name, content in fields["texts"].items()},
                images=tuple((parse_digest(hexed), parse_text(path)) for hexed, path in fields["images"]),
                signed={parse_text(path): _parse_optional(hexed) for path, hexed in fields["signed"].items()},
                initrd=parse_text(fields["initrd"]),
                uki=tuple(map(parse_digest, fields["uki"])),
                beside={parse_text(name): parse_digest(hexed) for name, hexed in fields["beside"].items()},
                known={parse_text(path): parse_digest(hexed) for path, hexed in fields["known"].items()},
                foreign={parse_text(path): _parse_optional(hexed) for path, hexed in fields["foreign"].items()},
                sources=tuple(map(parse_text, fields["sources"])),
                looked={parse_text(path): parse_text(number) for path, number in fields["looked"].items()},
                disks=tuple(map(parse_text, fields["disks"])),
            )
        except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
            raise Malformed("booted.json: it is not as unlock writes it") from None


def _parse_optional(hexed: object) -> bytes:
    return b"" if hexed == "" else parse_digest(hexed)


def _parse_file(fields: list[object]) -> tuple[str, bytes]:
    path, hexed = fields
    return parse_text(path), parse_digest(hexed)


def record_booted_files(tree: BootTree, log: Log) -> BootedFiles:
    """Writes booted.json. What was recorded earlier in this boot stays: an update may have replaced files since.

    Raises OSError, Malformed, Refused.
    """
    booted = load_booted_files(tree, log)
    save_booted_files(tree.paths, booted)
    return booted


def save_booted_files(paths: Paths, booted: BootedFiles) -> None:
    """Raises OSError, Malformed."""
    write_atomically(paths.booted, booted.encode())


def load_booted_files(tree: BootTree, log: Log) -> BootedFiles:
    """The record of this boot; without one that can be read, what the files on disk still tell. Raises Refused."""
    return read_booted_files(tree.paths) or find_booted_files(tree, log)


def read_booted_files(paths: Paths) -> BootedFiles | None:
    """The record of this boot; None without one that can be read."""
    try:
        booted = BootedFiles.decode(trusted_files.read_own_file(paths.booted, BOOTED_MAX))
    except Malformed:
        return None
    return booted if booted.boot and booted.boot == read_boot_id(paths) else None


def read_boot_id(paths: Paths) -> str:
    """The kernel's id of this boot; "" when it cannot be read."""
    try:
        with open(paths.boot_id, encoding="ascii") as file:
            return file.read(64).strip()
    except (OSError, ValueError):
        return ""


def find_booted_files(tree: BootTree, log: Log) -> BootedFiles:
    """The files on disk that have the digests of the log, and what else is there. Raises Refused."""
    files, texts = _find_grub_files(tree, log)
    images = _find_programs(tree, log, {path for path, _ in files.values()})
    uki = _uki_digests(tree, log, images)
    booted = BootedFiles(
        boot=read_boot_id(tree.paths),
        files=files,
        texts=texts,
        images=tuple(images),
        signed={path: boot_files.signers_digest(tree, path) or b"" for _, path in images},
        initrd=_find_initrd(tree, log),
        uki=uki,
        beside=boot_files.sidecar_digests(tree, images[-1][1]) if uki else {},
        known={},
        foreign={},
        sources=(),
        looked={top: number for top in TOPS if (number := tree.device_of(top))},
        disks=boot_files.disk_locations(tree.paths),
    )
    return _look_at_all(tree, booted)


def _look_at_all(tree: BootTree, booted: BootedFiles) -> BootedFiles:
    """With `known`, `foreign` and `sources`."""
    trusted = trusted_files.load_trusted_files(tree.paths) or TrustedFiles({}, {})
    left = {(without_counter(path), digest) for path, digest in trusted.files.items()}
    measured = {path.lower(): tree.digest(path) for path in booted.measured_files() if path}
    known: dict[str, bytes] = {}
    foreign: dict[str, bytes] = {}
    for each in tree.names():
        is_measured = measured.get(each.path.lower()) == each.digest
        if each.digest and (is_measured or (without_counter(each.path), each.digest) in left):
            known[each.path] = each.digest
        elif not each.target or trusted.links.get(each.path) != each.target:
            foreign[each.path] = each.digest
    sources = tuple(path for path, digest in foreign.items() if not digest or boot_sources.is_source(tree, path))
    return booted._replace(known=known, foreign=foreign, sources=sources)


def _find_grub_files(tree: BootTree, log: Log) -> tuple[dict[str, tuple[str, bytes]], dict[str, str]]:
    """`files` and `texts` of BootedFiles."""
    files: dict[str, tuple[str, bytes]] = {}
    texts: dict[str, str] = {}
    for event in log.events:
        name, digest = grub_replay.grub_file(event), event.digest or b""
        for path in boot_files.paths_of_grub_name(name) if name else ():
            data = tree.read(path)
            if data is not None and sha256(data).digest() == digest:
                files[name] = path, digest
                if name.endswith((".cfg", "/grubenv")) and len(data) <= grub_parser.MAX_TEXT:
                    texts[name] = data.decode("utf-8", "surrogateescape")
                break
            if data is not None and name.endswith("/grubenv") and (before := _grubenv_as_read(data, digest, log)):
                files[name], texts[name] = (path, digest), before
                break
    return files, texts


def _grubenv_as_read(data: bytes, digest: bytes, log: Log) -> str:
    """The text of grubenv as GRUB has read it, before GRUB wrote to it in this boot, and before a service of Ubuntu's
    took a flag out of it; "" when that is not known."""
    text = data.decode("utf-8", "surrogateescape")
    commands = [each for each in map(grub_replay.grub_command, log.events) if each]
    values: dict[str | None, None] = {None: None, "": None, "1": None, "2": None}
    for command in commands:
        name, _, value = command.removeprefix("set ").partition("=")
        if name in ("default", *_GRUB_SAVES):
            values[value] = None
    saved = {each for command in commands if command.startswith("save_env ") for each in command.split()[1:]}
    names = sorted(_GRUB_SAVES, key=lambda each: each not in saved)
    tries = (
        before
        for count in (1, 2, 3)
        for changed in combinations(names, count)
        for before in _earlier_environments(text, changed, tuple(values))
    )
    for before in islice(tries, _TRIES):
        if sha256(grub_replay.encode_text(before)).digest() == digest:
            return before
    return ""


def _earlier_environments(text: str, names: Sequence[str], values: Sequence[str | None]) -> Iterator[str]:
    """The texts of grubenv from which this one may have come, when these variables have changed."""
    if not names:
        yield text
        return
    name, rest = names[0], names[1:]
    lines = text.rstrip("#").splitlines(keepends=True)
    there = any(line.startswith(f"{name}=") for line in lines)
    for value in values:
        places = range(1, len(lines) + 1) if not there and value is not None else ()
        for before in (
            *([grub_script.set_environment_variable(text, name, value)] if there else ()),
            *("".join([*lines[:at], f"{name}={value}\n", *lines[at:]]).ljust(len(text), "#") for at in places),
        ):
            yield from _earlier_environments(before, rest, values)


def _find_programs(tree: BootTree, log: Log, read_by_grub: set[str]) -> list[tuple[bytes, str]]:
    """`images` of BootedFiles."""
    images: list[tuple[bytes, str]] = []
    programs = [event for event in log.events if event.kind == eventlog.EFI_APPLICATION]
    for event in programs:
        if event.pcr == 4 and not uki_replay.is_addon(event) and (path := boot_files.find_started_file(tree, event)):
            images.append((event.digest or b"", path))
    others = {event.digest for event in programs} - {digest for digest, _ in images}
    for path in sorted(read_by_grub) if others else ():
        image = boot_files.authenticode(tree, path)
        images += [(image, path)] if image and image in others else []
    return images


def _find_initrd(tree: BootTree, log: Log) -> str:
    measured = [event for event in log.events if event.kind == eventlog.EVENT_TAG and _is_initrd(event)]
    if not measured:
        return ""
    digest = measured[-1].digest or b""
    return next((each for each in boot_files.list_initrds(tree) if tree.digest(each) == digest), "")


def _is_initrd(event: Event) -> bool:
    return event.data[:4] == eventlog.INITRD


def _uki_digests(tree: BootTree, log: Log, images: list[tuple[bytes, str]]) -> tuple[bytes, ...]:
    measured = tuple(event.digest or b"" for event in log.events if event.pcr == 11 and event.kind == eventlog.IPL)
    try:
        data = tree.read(images[-1][1]) if images and measured else None
        return measured if data is not None and tuple(uki_replay.section_digests(data)) == measured else ()
    except Malformed:
        return ()


class Judge:
    """Says whom the files are by, as this boot's look has found them."""

    def __init__(self, tree: BootTree, booted: BootedFiles) -> None:
        self._tree, self._booted = tree, booted
        self._known = {(without_counter(path), digest) for path, digest in booted.known.items()}
        self._foreign = {without_counter(path): digest for path, digest in booted.foreign.items()}

    def why_foreign(self, path: str, digest: bytes) -> str:
        """Why nothing vouches for this file; "" when it is this host's, or outside of TOPS."""
        top = boot_tree.top_of(path)
        if not top or (without_counter(path), digest) in self._known:
            return ""
        if why := self._why_foreign_name(without_counter(path)):
            return f"{path} {why}: {ACCEPT} if by you"
        if self._booted.looked.get(top, "") != self._tree.device_of(path):
            return f"{path} is on a file system that was not there when this boot was looked at: {ACCEPT} if by you"
        if self._booted.sources:
            source = self._booted.sources[0]
            why = self._why_foreign_name(without_counter(source))
            return f"{path} is new, and may be made from {source}, which {why}: {ACCEPT} if by you"
        return ""

    def foreign_sources(self) -> dict[str, str]:
        """Of BootedFiles.sources: path -> why nothing vouches for it."""
        sources = self._booted.sources
        return {path: f"{path} {self._why_foreign_name(without_counter(path))}: {ACCEPT} if by you" for path in sources}

    def may_link(self, path: str) -> bool:
        """Whether a link of this name is this host's."""
        return not self._why_foreign_name(without_counter(path))

    def _why_foreign_name(self, name: str) -> str:
        while name:
            if name in self._foreign:
                changed = "was changed while this host was off, or before it was looked at"
                other = "was no file that can be trusted when this boot was looked at: a link, a device, one of two"
                return changed if self._foreign[name] else other
            name = os.path.dirname(name)
        return ""


def accept_boot_files(tree: BootTree, booted: BootedFiles) -> tuple[BootedFiles, dict[str, str], dict[str, str]]:
    """The operator vouches for what is there now: the files, what was foreign (path -> what it is now), and what
    nobody can vouch for (path -> why). Saves nothing. Raises Refused."""
    known, links, left = {}, {}, {}
    for each in tree.names():
        if each.digest:
            known[each.path] = each.digest
        elif each.target:
            links[each.path] = each.target
        else:
            left[each.path] = each.why
    now = {path: f"SHA-256 {digest.hex()}" for path, digest in known.items()}
    now |= {path: f"a link to {target}" for path, target in links.items()}
    accepted = {path: now.get(path, "it is gone") for path in booted.foreign if path not in left}
    looked = {top: number for top in TOPS if (number := tree.device_of(top))}
    foreign = dict.fromkeys(left, b"")
    return booted._replace(known=known, foreign=foreign, sources=tuple(left), looked=looked), accepted, left


def trust_boot_files(tree: BootTree, booted: BootedFiles) -> None:
    """Records the files as this system has them now, without those that nothing vouches for, as trusted.

    Records nothing when a folder of this boot's files is gone: its file system is not mounted. What was recorded of a
    mount point that has nothing in it stays, too. Raises OSError, NoKey, Malformed, Refused.
    """
    if not all(map(tree.folder_id, filter(None, map(os.path.dirname, booted.measured_files())))):
        return
    judge, files, links = Judge(tree, booted), dict[str, bytes](), dict[str, str]()
    for each in tree.names():
        if each.digest and not judge.why_foreign(each.path, each.digest):
            files[each.path] = each.digest
        elif each.target and judge.may_link(each.path):
            links[each.path] = each.target
    seen = {boot_tree.top_of(path) for path in (*files, *links, *booted.foreign)}
    if before := trusted_files.load_trusted_files(tree.paths):
        files = {path: each for path, each in before.files.items() if boot_tree.top_of(path) not in seen} | files
        links = {path: each for path, each in before.links.items() if boot_tree.top_of(path) not in seen} | links
    trusted_files.save_trusted_files(tree.paths, TrustedFiles(files, links))
