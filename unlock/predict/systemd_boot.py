# SPDX-License-Identifier: Apache-2.0
"""What systemd-boot starts when nobody is at its menu: what it was told to, else the first entry in its order
(systemd-boot(7); the Boot Loader Specification, "Sorting")."""

import fnmatch
import glob
import os
from collections.abc import Callable, Iterator, Mapping
from typing import Any, NamedTuple

from ..errors import Malformed
from ..measured import efivars
from ..paths import Paths
from . import boot_files, pe
from .initramfs_images import natural

_VENDOR = "4a67b082-0a4c-41cf-b6c7-440b29bb8c4f"
"""Of its variables: systemd.io/BOOT_LOADER_INTERFACE."""


class Listed(NamedTuple):
    """An entry of the menu."""

    id: str
    """The file's name, lower case, without the counter."""
    path: str
    """Below the root directory."""
    unified: bool
    """A unified kernel image; else a file in loader/entries."""
    sort_key: str
    machine_id: str
    version: str


_ORDER: tuple[tuple[Callable[[Listed], Any], bool], ...] = (
    (lambda each: natural(each.id), True),
    (lambda each: natural(each.version) if each.sort_key else [], True),
    (lambda each: each.machine_id if each.sort_key else "", False),
    (lambda each: each.sort_key, False),
    (lambda each: not each.sort_key, False),
    (lambda each: (left := boot_files.COUNTER.search(each.path)) is not None and int(left[1]) == 0, False),
)
"""What tells two entries apart, and whether the larger comes first; what counts most is last."""


def menu(paths: Paths) -> list[Listed]:
    """All entries in its order."""
    found = [*_unified(paths), *_configured(paths)]
    for key, reverse in _ORDER:
        found.sort(key=key, reverse=reverse)
    return found


def comes(paths: Paths, esp: str, listed: list[Listed]) -> set[str]:
    """Ids of those that may be started next: what it was told to start once, and what comes after that. `esp`: where
    the file system that it was started from is mounted. What it finds by itself (`auto-`) and the profiles of a unified
    kernel image (`@`) are not listed."""

    def matching(told: str) -> set[str]:
        pattern = _variable(paths, "LoaderEntryLastBooted") if told == "@saved" else told
        found = [each.id for each in listed if fnmatch.fnmatchcase(each.id, pattern)][:1]
        return set(found or ([pattern] if pattern.startswith("auto-") or "@" in pattern else []))

    configured = (
        _fields(boot_files.read(paths, os.path.join(esp, "loader/loader.conf")) or b"").get("default", "").lower()
    )
    lasting = (_variable(paths, "LoaderEntryDefault"), configured, "*")
    always = next((found for told in lasting if (found := matching(told))), set())
    return matching(_variable(paths, "LoaderEntryOneShot")) | always


def _variable(paths: Paths, name: str) -> str:
    return efivars.read_variable(paths, name, _VENDOR).decode("utf-16-le", "replace").partition("\0")[0].lower()


def _unified(paths: Paths) -> Iterator[Listed]:
    """Those that say which system they are. Whether there is a kernel in them, and whether they are whole, is seen when
    they are started."""
    for path in _files(paths, "EFI/Linux", "*.[eE][fF][iI]"):
        data = boot_files.read(paths, path) or b""
        try:
            said = (pe.section(data, pe.read(data, whole=False), ".osrel") or b"").rstrip(b"\0")
        except Malformed:
            continue
        if not said:
            continue
        system = {name: value.strip("\"'") for name, value in _fields(said.replace(b"=", b" ")).items()}
        sort_key = system.get("IMAGE_ID") or system.get("ID", "")
        versions = ("IMAGE_VERSION", "VERSION", "VERSION_ID", "BUILD_ID")
        version = next((system[each] for each in versions if system.get(each)), "")
        yield Listed(_id(path), path, True, sort_key, "", version)


def _configured(paths: Paths) -> Iterator[Listed]:
    """Those whose program is there."""
    for path in _files(paths, "loader/entries", "*.[cC][oO][nN][fF]"):
        fields = _fields(boot_files.read(paths, path) or b"")
        program = next((fields[each] for each in ("linux", "efi", "uki") if each in fields), "")
        if os.path.isfile(os.path.join(paths.root, boot_files.esp_of(path), program.replace("\\", "/").lstrip("/"))):
            words = (fields.get(each, "") for each in ("sort-key", "machine-id", "version"))
            yield Listed(_id(path), path, False, *words)


def _files(paths: Paths, folder: str, pattern: str) -> Iterator[str]:
    """A folder that is reached in two ways counts once."""
    folders: dict[tuple[int, int], str] = {}
    for esp in boot_files.ESPS:
        path = os.path.join(paths.root, esp, folder)
        if os.path.isdir(path):
            found = os.stat(path)
            folders.setdefault((found.st_dev, found.st_ino), path)
    for path in folders.values():
        for each in glob.glob(os.path.join(glob.escape(path), pattern)):
            yield os.path.relpath(each, paths.root)


def _id(path: str) -> str:
    return boot_files.uncounted(os.path.basename(path))


def _fields(text: bytes) -> Mapping[str, str]:
    """Of lines of a name, white space, and a value."""
    lines = (line.split(None, 1) for line in text.decode("utf-8", "replace").splitlines())
    return {words[0]: words[1].strip() for words in lines if words[1:]}
