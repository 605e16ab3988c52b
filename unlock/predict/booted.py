# SPDX-License-Identifier: Apache-2.0
"""Finds the files on disk that this boot has read, and records them before an update replaces them.

    event log: a name, a digest ──> a file on /boot or the EFI system partition that has this digest ──> BootedFiles
    BootedFiles ──record_booted_files──> /var/lib/unlock/booted.json, after each good boot

The predictions start from these files. The record counts only as far as the event log of the same boot has the same
digests.

JSON, version 1: {"version", "boot": boot id, "files": NAME -> [PATH, 64 hex digits], "texts": NAME -> content,
"images": [[64 hex digits, PATH], ...], "signed": PATH -> 64 hex digits or "", "initrd": PATH, "uki": [64 hex digits],
"beside": NAME -> 64 hex digits, "foreign": PATH -> 64 hex digits, "disks": [DEVICE, ...]}.
NAME is GRUB's, PATH below the root directory.
"""

import json
import os
from collections.abc import Mapping
from hashlib import sha256
from typing import NamedTuple, TypedDict

from ..errors import Malformed, NewerFormat
from ..measured import eventlog
from ..measured.baseline import parse_digest
from ..measured.eventlog import Event, Log
from ..paths import Paths, write_atomically
from . import boot_files, grub_parser, grub_replay, grub_script, trusted_files, uki_replay
from .boot_files import without_counter
from .trusted_files import parse_text

BOOTED_MAX = 2 << 20
"""Bytes of booted.json."""
_VERSION = 1


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
    foreign: dict[str, str]
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
    foreign: Mapping[str, bytes]
    """Files that may have been changed while the host was off -> digest: see trusted_files."""
    disks: tuple[str, ...]
    """Where the whole disks are, below /sys/devices."""

    def is_foreign(self, path: str, digest: bytes) -> bool:
        """Whether this file is one of `foreign`, under a name with another boot counter too."""
        name = without_counter(path)
        return any(digest == each and name == without_counter(other) for other, each in self.foreign.items())

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
            "foreign": {path: digest.hex() for path, digest in self.foreign.items()},
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
                signed={
                    parse_text(path): parse_digest(hexed) if hexed != "" else b""
                    for path, hexed in fields["signed"].items()
                },
                initrd=parse_text(fields["initrd"]),
                uki=tuple(map(parse_digest, fields["uki"])),
                beside={parse_text(name): parse_digest(hexed) for name, hexed in fields["beside"].items()},
                foreign={parse_text(path): parse_digest(hexed) for path, hexed in fields["foreign"].items()},
                disks=tuple(map(parse_text, fields["disks"])),
            )
        except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
            raise Malformed(f"booted.json: cannot be read: {type(error).__name__}") from None


def _parse_file(fields: list[object]) -> tuple[str, bytes]:
    path, hexed = fields
    return parse_text(path), parse_digest(hexed)


def record_booted_files(paths: Paths, log: Log) -> BootedFiles:
    """Writes booted.json. What was recorded earlier in this boot stays: an update may have replaced files since.

    Raises OSError, Malformed.
    """
    booted = load_booted_files(paths, log)
    save_booted_files(paths, booted)
    return booted


def save_booted_files(paths: Paths, booted: BootedFiles) -> None:
    """Raises OSError, Malformed."""
    write_atomically(paths.booted, booted.encode())


def load_booted_files(paths: Paths, log: Log) -> BootedFiles:
    """The record of this boot; without one that can be read, what the files on disk still tell."""
    try:
        with open(paths.booted, "rb") as file:
            booted = BootedFiles.decode(file.read(BOOTED_MAX + 1))
        if booted.boot == read_boot_id(paths):
            return booted
    except (OSError, Malformed):
        pass
    return find_booted_files(paths, log)


def read_boot_id(paths: Paths) -> str:
    """The kernel's id of this boot; "" when it cannot be read."""
    try:
        with open(paths.boot_id, encoding="ascii") as file:
            return file.read(64).strip()
    except (OSError, ValueError):
        return ""


def find_booted_files(paths: Paths, log: Log) -> BootedFiles:
    """The files on disk that have the digests of the log."""
    files, texts = _find_grub_files(paths, log)
    images = _find_programs(paths, log, {path for path, _ in files.values()})
    uki = _uki_digests(paths, log, images)
    booted = BootedFiles(
        boot=read_boot_id(paths),
        files=files,
        texts=texts,
        images=tuple(images),
        signed={path: boot_files.signers_digest(paths, path) or b"" for _, path in images},
        initrd=_find_initrd(paths, log),
        uki=uki,
        beside=boot_files.sidecar_digests(paths, images[-1][1]) if uki else {},
        foreign={},
        disks=boot_files.disk_locations(paths),
    )
    return booted._replace(foreign=_find_foreign_files(paths, booted.measured_files()))


def _find_grub_files(paths: Paths, log: Log) -> tuple[dict[str, tuple[str, bytes]], dict[str, str]]:
    """`files` and `texts` of BootedFiles."""
    files: dict[str, tuple[str, bytes]] = {}
    texts: dict[str, str] = {}
    for event in log.events:
        name, digest = grub_replay.grub_file(event), event.digest or b""
        for path in boot_files.paths_of_grub_name(name) if name else ():
            data = boot_files.read_file(paths, path)
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
    """The text of grubenv as GRUB has read it, before it wrote to it in this boot; "" when that is not known."""
    text = data.decode("utf-8", "surrogateescape")
    commands = filter(None, map(grub_replay.grub_command, log.events))
    values = {each.removeprefix("set default=") for each in commands if each.startswith("set default=")}
    for name in ("next_entry", "saved_entry"):
        for value in values:
            before = grub_script.set_environment_variable(text, name, value)
            if sha256(grub_replay.encode_text(before)).digest() == digest:
                return before
    return ""


def _find_programs(paths: Paths, log: Log, read_by_grub: set[str]) -> list[tuple[bytes, str]]:
    """`images` of BootedFiles."""
    images: list[tuple[bytes, str]] = []
    programs = [event for event in log.events if event.kind == eventlog.EFI_APPLICATION]
    for event in programs:
        if event.pcr == 4 and not uki_replay.is_addon(event) and (path := boot_files.find_started_file(paths, event)):
            images.append((event.digest or b"", path))
    others = {event.digest for event in programs} - {digest for digest, _ in images}
    for path in sorted(read_by_grub) if others else ():
        image = boot_files.authenticode(paths, path)
        images += [(image, path)] if image and image in others else []
    return images


def _find_initrd(paths: Paths, log: Log) -> str:
    measured = [event for event in log.events if event.kind == eventlog.EVENT_TAG and _is_initrd(event)]
    if not measured:
        return ""
    digest = measured[-1].digest or b""
    return next((each for each in boot_files.list_initrds(paths) if boot_files.file_sha256(paths, each) == digest), "")


def _is_initrd(event: Event) -> bool:
    return event.data[:4] == eventlog.INITRD


def _find_foreign_files(paths: Paths, measured: set[str]) -> dict[str, bytes]:
    trusted = trusted_files.load_trusted_files(paths)
    if trusted is None:
        return {}
    return {
        path: digest
        for path, digest in boot_files.list_files(paths)
        if path not in measured and (without_counter(path), digest) not in trusted
    }


def _uki_digests(paths: Paths, log: Log, images: list[tuple[bytes, str]]) -> tuple[bytes, ...]:
    measured = tuple(event.digest or b"" for event in log.events if event.pcr == 11 and event.kind == eventlog.IPL)
    try:
        data = boot_files.read_file(paths, images[-1][1]) if images and measured else None
        return measured if data is not None and tuple(uki_replay.section_digests(data)) == measured else ()
    except Malformed:
        return ()


def trust_boot_files(paths: Paths, booted: BootedFiles) -> None:
    """Records the files as this system has them now, without those that are still foreign, as trusted.

    Records nothing when a folder of this boot's files is gone: its file system is not mounted. Raises OSError.
    """
    folders = (os.path.dirname(path) for path in booted.measured_files())
    if all(os.path.isdir(os.path.join(paths.root, folder)) for folder in folders):
        files = {path: each for path, each in boot_files.list_files(paths) if not booted.is_foreign(path, each)}
        trusted_files.save_trusted_files(paths, files)
