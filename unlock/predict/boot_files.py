# SPDX-License-Identifier: Apache-2.0
"""Which files on disk this boot has read, and what was in them: an update replaces them before they can be asked.

    event log: a name, a digest ──> a file on /boot or the EFI system partition that has this digest ──> Booted
    /var/lib/unlock/booted.json: Booted, as a file, made after each good boot

JSON, version 1: {"version", "boot": boot id, "files": NAME -> [PATH, 64 hex digits], "texts": NAME -> content,
"images": [[64 hex digits, PATH], ...], "signed": PATH -> 64 hex digits or "", "initrd": PATH, "uki": [64 hex digits],
"beside": NAME -> 64 hex digits, "foreign": PATH -> 64 hex digits, "disks": [DEVICE, ...]}.
NAME is GRUB's, PATH below the root directory. What it says is believed only as far as the event log of the same boot
has the same digests.

Nothing authenticates /boot and the EFI system partition, and this boot has measured only what it has read. So a file of
another entry (an older kernel's initramfs) may be a thief's who had the disk while the host was off: such a file is
`foreign`, unless it is as /var/lib/unlock/boot-files.json has it from the last time that this host ran. One that has
changed since this boot was changed by this system. boot-files.json, version 1: {"version", "files": PATH -> 64 hex
digits}.
"""

import glob
import json
import os
import re
from collections.abc import Iterator, Mapping
from hashlib import file_digest, sha256
from typing import NamedTuple

from ..errors import Malformed, NewerFormat
from ..measured import certificates, eventlog, uefi
from ..measured.baseline import parse_digest
from ..measured.eventlog import Event, Log
from ..paths import Paths, write_atomically
from . import grub_script, pe, replay

MAX = 2 << 20
"""Bytes of booted.json."""
MAX_FILE = 1 << 30
ESPS = ("boot/efi", "efi", "boot")
"""Where the EFI system partition is mounted, and an extended boot loader partition."""
BASES = ("boot", "boot/efi", "efi", "")
"""What GRUB's names may be relative to."""
COUNTER = re.compile(r"\+(\d+)(-\d+)?(?=\.(efi|conf)$)", re.I)
"""systemd's automatic boot assessment: tries left, tries done; taken out of the name after a boot that was good."""
_VERSION = 1


class Booted(NamedTuple):
    boot: str
    """The kernel's id of this boot."""
    files: Mapping[str, tuple[str, bytes]]
    """GRUB's name -> file, SHA-256."""
    texts: Mapping[str, str]
    """GRUB's name -> content, of configuration files."""
    images: tuple[tuple[bytes, str], ...]
    """EFI programs in the order in which they were started: Authenticode, file. A kernel that GRUB read comes last."""
    signed: Mapping[str, bytes]
    """Who has signed them, by file: `signed`."""
    initrd: str
    """The file that the kernel's EFI stub got as it is; "" when that is none."""
    uki: tuple[bytes, ...]
    """What systemd-stub extended PCR 11 with, when the last of `images` is a unified kernel image and says the same."""
    beside: Mapping[str, bytes]
    """What systemd-stub adds to the unified kernel image: `beside`."""
    foreign: Mapping[str, bytes]
    """Files below /boot and on the EFI system partition that may have been changed while the host was off: SHA-256."""
    disks: tuple[str, ...]
    """Where the whole disks are, below /sys/devices."""

    def is_foreign(self, path: str, digest: bytes) -> bool:
        """Whether this file is one of `foreign`, under a name with another counter too."""
        return any(digest == each and uncounted(path) == uncounted(name) for name, each in self.foreign.items())

    def encode(self) -> bytes:
        """Malformed for what would be too long for `decode`."""
        fields = {
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
        if len(data) > MAX:
            raise Malformed(f"the files of this boot take too much room to keep: {len(data)} bytes")
        return data

    @classmethod
    def decode(cls, data: bytes) -> "Booted":
        """Malformed, or NewerFormat, for anything that `encode` did not write."""
        try:
            fields = json.loads(data[: MAX + 1])
            if type(fields["version"]) is int and fields["version"] > _VERSION:
                raise NewerFormat("booted.json: written by a newer version", hint="update unlock")
            return cls(
                _text(fields["boot"]),
                {_text(name): (_text(path), parse_digest(hexed)) for name, (path, hexed) in fields["files"].items()},
                {_text(name): _text(content) for name, content in fields["texts"].items()},
                tuple((parse_digest(hexed), _text(path)) for hexed, path in fields["images"]),
                {_text(path): parse_digest(hexed) if hexed != "" else b"" for path, hexed in fields["signed"].items()},
                _text(fields["initrd"]),
                tuple(map(parse_digest, fields["uki"])),
                {_text(name): parse_digest(hexed) for name, hexed in fields["beside"].items()},
                {_text(path): parse_digest(hexed) for path, hexed in fields["foreign"].items()},
                tuple(map(_text, fields["disks"])),
            )
        except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
            raise Malformed(f"booted.json: cannot be read: {type(error).__name__}") from None


def keep(paths: Paths, log: Log) -> Booted:
    """For the predictions of this boot; what was kept of it before an update stays. Raises OSError, Malformed."""
    found = load(paths, log)
    save(paths, found)
    return found


def save(paths: Paths, found: Booted) -> None:
    write_atomically(paths.booted, found.encode())


def load(paths: Paths, log: Log) -> Booted:
    """What was kept of this boot; when nothing was that can be read, what the files still tell."""
    try:
        with open(paths.booted, "rb") as file:
            found = Booted.decode(file.read(MAX + 1))
        if found.boot == boot_id(paths):
            return found
    except (OSError, Malformed):
        pass
    return look(paths, log)


def boot_id(paths: Paths) -> str:
    try:
        with open(paths.boot_id, encoding="ascii") as file:
            return file.read(64).strip()
    except (OSError, ValueError):
        return ""


def look(paths: Paths, log: Log) -> Booted:
    """The files that have the digests of the log."""
    files: dict[str, tuple[str, bytes]] = {}
    texts = {}
    images: list[tuple[bytes, str]] = []
    initrd = ""
    for event in log.events:
        digest = event.digest or b""
        if name := replay.grub_file(event):
            for path in _named(name):
                data = read(paths, path)
                if data is not None and sha256(data).digest() == digest:
                    files[name] = path, digest
                    if name.endswith((".cfg", "/grubenv")) and len(data) <= grub_script.MAX_TEXT:
                        texts[name] = data.decode("utf-8", "surrogateescape")
                    break
                if data is not None and name.endswith("/grubenv") and (before := _before_grub(data, digest, log)):
                    files[name], texts[name] = (path, digest), before
                    break
        elif event.kind == eventlog.EFI_APPLICATION and event.pcr == 4 and not replay.is_addon(event):
            path = started(paths, event)
            images += [(digest, path)] if path else []
        elif event.kind == eventlog.EVENT_TAG and event.data[:4] == eventlog.INITRD:
            initrd = next((each for each in _initrds(paths) if _sha256(paths, each) == digest), "")
    uki = _uki(paths, log, images)
    handed = {event.digest for event in log.events if event.kind == eventlog.EFI_APPLICATION} - {a for a, _ in images}
    paths_read = {path for path, _ in files.values()} if handed else set()
    for path in sorted(paths_read):
        image = authenticode(paths, path)
        images += [(image, path)] if image and image in handed else []
    measured = {*dict(files.values()), *(path for _, path in images), initrd}
    known = _known(paths)
    foreign = {} if known is None else {
        path: digest
        for path, digest in everything(paths)
        if path not in measured and (uncounted(path), digest) not in known
    }  # fmt: skip
    added = beside(paths, images[-1][1]) if uki else {}
    who = {path: signed(paths, path) or b"" for _, path in images}
    return Booted(boot_id(paths), files, texts, tuple(images), who, initrd, uki, added, foreign, disks(paths))


def _before_grub(data: bytes, digest: bytes, log: Log) -> str:
    """The text of grubenv as GRUB has read it, before it wrote to it in this boot; "" when that is not known."""
    text = data.decode("utf-8", "surrogateescape")
    said = filter(None, map(replay.grub_command, log.events))
    values = {each.removeprefix("set default=") for each in said if each.startswith("set default=")}
    for name in ("next_entry", "saved_entry"):
        for value in values:
            before = grub_script.with_variable(text, name, value)
            if sha256(before.encode("utf-8", "surrogateescape")).digest() == digest:
                return before
    return ""


def beside(paths: Paths, image: str) -> dict[str, bytes]:
    """Add-ons, extensions and credentials that systemd-stub(7) measures with this image: name, SHA-256."""
    found = {}
    for folder in (
        f"{COUNTER.sub('', image)}.extra.d",
        *(os.path.join(esp_of(image), "loader", each) for each in ("addons", "credentials")),
    ):
        for path in sorted(glob.glob(os.path.join(glob.escape(os.path.join(paths.root, folder)), "*"))):
            found[os.path.basename(path)] = _sha256(paths, os.path.relpath(path, paths.root)) or bytes(32)
    return found


def disks(paths: Paths) -> tuple[str, ...]:
    """Where the whole disks are that the firmware may number: below /sys/devices, without their kernel names."""
    top = os.path.realpath(os.path.join(paths.root, "sys/devices"))
    found = [os.path.realpath(each) for each in glob.glob(os.path.join(glob.escape(paths.root), "sys/block/*"))]
    hard = (each for each in found if not each.startswith(f"{top}/virtual/block/"))
    disks = (each for each in hard if not os.path.basename(each).startswith(("sr", "fd")))
    return tuple(sorted(os.path.relpath(os.path.dirname(each), top) for each in disks))


def esp_of(path: str) -> str:
    """Where the file system of a file in EFI/Linux, EFI/BOOT or loader/entries is mounted."""
    return os.path.dirname(os.path.dirname(os.path.dirname(path)))


def uncounted(path: str) -> str:
    """The same for all names that a file has while systemd-boot counts its tries; FAT does not tell upper from lower
    case."""
    return COUNTER.sub("", path).lower()


def everything(paths: Paths) -> Iterator[tuple[str, bytes]]:
    """All files below /boot and on the EFI system partition: path, SHA-256."""
    for top in ("boot", "efi"):
        for folder, _, names in os.walk(os.path.join(paths.root, top)):
            for name in sorted(names):
                path = os.path.relpath(os.path.join(folder, name), paths.root)
                if os.path.isfile(os.path.join(paths.root, path)) and (digest := _sha256(paths, path)):
                    yield path, digest


def vouch(paths: Paths, before: Booted) -> None:
    """For the next boot: the files as this system has them now, without those that are foreign still. Nothing where a
    folder of this boot's files is gone: the others are not all there to be seen."""
    measured = {*(path for path, _ in before.files.values()), *(path for _, path in before.images), before.initrd}
    if not all(os.path.isdir(os.path.join(paths.root, os.path.dirname(path))) for path in measured):
        return
    files = {path: digest.hex() for path, digest in everything(paths) if not before.is_foreign(path, digest)}
    data = json.dumps({"version": _VERSION, "files": files}, separators=(",", ":")).encode()
    if _read_own(paths.boot_files) != data:
        write_atomically(paths.boot_files, data)


def _known(paths: Paths) -> set[tuple[str, bytes]] | None:
    """Names without a counter, SHA-256. None before `init` and the first prediction: what is on disk then is taken as
    it is. What cannot be read vouches for nothing."""
    data = _read_own(paths.boot_files)
    if data is None:
        return None
    try:
        return {(uncounted(_text(path)), parse_digest(hexed)) for path, hexed in json.loads(data)["files"].items()}
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
        return set()


def _read_own(path: str) -> bytes | None:
    try:
        with open(path, "rb") as file:
            return file.read(MAX + 1)
    except FileNotFoundError:
        return None


def read(paths: Paths, path: str) -> bytes | None:
    """A file below the root directory; None when there is none, or it is too large."""
    try:
        with open(os.path.join(paths.root, path), "rb") as file:
            return file.read() if os.fstat(file.fileno()).st_size <= MAX_FILE else None
    except (OSError, ValueError):
        return None


def authenticode(paths: Paths, path: str) -> bytes | None:
    """None for a file that is not there, or no EFI program."""
    data = read(paths, path)
    try:
        return pe.authenticode(data) if data is not None else None
    except Malformed:
        return None


def signed(paths: Paths, path: str) -> bytes | None:
    """SHA-256 of who has signed an EFI program; b"" when nobody has, None for a file that is not there, or none."""
    try:
        found = sorted(certificates.signing_authorities(pe.signatures(read(paths, path) or b"")))
    except Malformed:
        return None
    return sha256(b"".join(sha256(each).digest() for each in found)).digest() if found else b""


def _sha256(paths: Paths, path: str) -> bytes | None:
    try:
        with open(os.path.join(paths.root, path), "rb") as file:
            return file_digest(file, "sha256").digest()
    except (OSError, ValueError):
        return None


def _named(name: str) -> Iterator[str]:
    """Where a file that GRUB names may be."""
    _, inside, rest = name.partition(")") if name.startswith("(") else ("", "", name)
    if rest.startswith("/") and ".." not in rest.split("/") and (inside or not name.startswith("(")):
        yield from (os.path.join(base, rest.lstrip("/")) for base in BASES)


def started(paths: Paths, event: Event) -> str:
    """The file of an EFI program that was started; "" when none is as it was."""
    found = programs(paths, program(event))
    return next((path for path in found if authenticode(paths, path) == event.digest), "")


def program(event: Event) -> str:
    """The name of an EFI program that was started: \\EFI\\debian\\shimx64.efi, or where else it came from."""
    try:
        return uefi.image_path(event.data)
    except Malformed:
        return ""


def programs(paths: Paths, name: str) -> Iterator[str]:
    """Files on the EFI system partition that have this name."""
    name = name.replace("\\", "/").lstrip("/")
    if name and ".." not in name.split("/"):
        for esp in ESPS:
            yield from _uncounted_in(paths, esp, uncounted(name).split("/"))


def _uncounted_in(paths: Paths, folder: str, parts: list[str]) -> Iterator[str]:
    try:
        names = os.listdir(os.path.join(paths.root, folder))
    except OSError:
        return
    for name in names:
        if uncounted(name) == parts[0]:
            path = os.path.join(folder, name)
            if parts[1:]:
                yield from _uncounted_in(paths, path, parts[1:])
            else:
                yield path


def _initrds(paths: Paths) -> Iterator[str]:
    for pattern in ("boot/initr*", "boot/efi/initr*", "efi/initr*", "boot/efi/EFI/*/initr*", "efi/EFI/*/initr*"):
        for path in sorted(glob.glob(os.path.join(paths.root, pattern))):
            yield os.path.relpath(path, paths.root)


def _uki(paths: Paths, log: Log, images: list[tuple[bytes, str]]) -> tuple[bytes, ...]:
    said = tuple(event.digest or b"" for event in log.events if event.pcr == 11 and event.kind == eventlog.IPL)
    try:
        data = read(paths, images[-1][1]) if images and said else None
        return said if data is not None and tuple(replay.uki_measurements(data)) == said else ()
    except Malformed:
        return ()


def _text(value: object) -> str:
    if type(value) is not str:
        raise ValueError
    return value
