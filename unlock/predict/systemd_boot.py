# SPDX-License-Identifier: Apache-2.0
"""Lists the menu of systemd-boot, and works out which entry it starts when nobody chooses.

systemd-boot(7); the Boot Loader Specification, "Sorting".
"""

import fnmatch
import os
import re
from collections.abc import Iterator, Mapping
from functools import cmp_to_key
from typing import NamedTuple

from ..errors import Malformed
from ..measured import efivars
from . import boot_files, pe
from .boot_tree import BootTree

_VENDOR = "4a67b082-0a4c-41cf-b6c7-440b29bb8c4f"
"""Of its variables: systemd.io/BOOT_LOADER_INTERFACE."""


class LoaderEntry(NamedTuple):
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

    @property
    def is_bad(self) -> bool:
        """Whether no try is left: systemd's automatic boot assessment."""
        left = boot_files.COUNTER.search(self.path)
        return left is not None and int(left[1]) == 0


_NO_VERSION = re.compile("^[^A-Za-z0-9~^.-]+")
_VERSION_NUMBER, _VERSION_WORD = re.compile("[0-9]+"), re.compile("[A-Za-z]+")
_HONOURS_PREFERRED = 1 << 19
"""A bit of LoaderFeatures: systemd.io/BOOT_LOADER_INTERFACE."""


def list_entries(tree: BootTree) -> list[LoaderEntry]:
    """All entries of the menu, in its order."""
    return sorted([*_unified_entries(tree), *_configured_entries(tree)], key=cmp_to_key(_compare_entries))


def _compare_entries(one: LoaderEntry, other: LoaderEntry) -> int:
    """Less than 0 when `one` comes first."""
    ours, theirs = ((e.is_bad, not e.sort_key, e.sort_key, e.sort_key and e.machine_id) for e in (one, other))
    if ours != theirs:
        return -1 if ours < theirs else 1
    newer = one.sort_key and compare_versions(other.version, one.version)
    return newer or compare_versions(other.id, one.id)


def next_entry_ids(tree: BootTree, esp: str, listed: list[LoaderEntry]) -> set[str]:
    """The ids of the entries that may be started next: the one for one boot only, and the default one after it.

    `esp`: the mount point of the file system that systemd-boot was started from. Entries that it finds by itself
    (`auto-`) and profiles of a unified kernel image (`@`) are not in `listed`, but may be among the ids.
    """

    def matching(setting: str, *, bad: bool = True) -> set[str]:
        pattern = _loader_variable(tree, "LoaderEntryLastBooted") if setting == "@saved" else setting
        fitting = (each for each in listed if bad or not each.is_bad)
        found = [each.id for each in fitting if fnmatch.fnmatchcase(each.id, pattern)][:1]
        return set(found or ([pattern] if pattern.startswith("auto-") or "@" in pattern else []))

    def first_match(setting: str, *, bad: bool = True) -> set[str]:
        lasting = (_loader_variable(tree, f"LoaderEntry{setting.title()}"), configured.get(setting, "").lower())
        return next((found for each in lasting if (found := matching(each, bad=bad))), set())

    configured = _parse_fields(tree.read(os.path.join(esp, "loader/loader.conf")) or b"")
    preferred = first_match("preferred", bad=False)
    default = first_match("default") or matching("*")
    features = int.from_bytes(efivars.read_variable(tree.paths, "LoaderFeatures", _VENDOR)[:8], "little")
    always = (preferred or default) if features & _HONOURS_PREFERRED else preferred | default
    return matching(_loader_variable(tree, "LoaderEntryOneShot")) | always


def _loader_variable(tree: BootTree, name: str) -> str:
    return efivars.read_variable(tree.paths, name, _VENDOR).decode("utf-16-le", "replace").partition("\0")[0].lower()


def compare_versions(one: str, other: str) -> int:
    """Less than 0, 0, or more than 0: `one` is older, the same, or newer. UAPI.10 Version Format Specification."""
    while True:
        one, other = (_NO_VERSION.sub("", each) for each in (one, other))
        for mark in ("~", "", "-", "^", "."):  # the one with the mark is older; "" is the end
            if not mark and not (one and other):
                return bool(one) - bool(other)
            marked = [bool(mark) and each.startswith(mark) for each in (one, other)]
            if marked[0] != marked[1]:
                return marked[1] - marked[0]
            if marked[0]:
                one, other = one[1:], other[1:]
        parts = [_VERSION_NUMBER.match(each) for each in (one, other)]
        if parts[0] or parts[1]:
            if not (parts[0] and parts[1]):
                return bool(parts[0]) - bool(parts[1])
            left, right = (each[0].lstrip("0") for each in parts if each)
            left, right = left.zfill(len(right)), right.zfill(len(left))
        else:
            parts = [_VERSION_WORD.match(each) for each in (one, other)]
            left, right = (each[0] if each else "" for each in parts)
        if left != right:
            return 1 if left > right else -1
        one, other = (text[part.end() :] if part else text for text, part in zip((one, other), parts, strict=True))


def _unified_entries(tree: BootTree) -> Iterator[LoaderEntry]:
    """Unified kernel images with a section .osrel. systemd-boot looks at no more before it starts one."""
    for path in _entry_files(tree, "EFI/Linux", ".efi"):
        data = tree.read(path) or b""
        try:
            release = (pe.read_section(data, pe.read_layout(data, whole=False), ".osrel") or b"").rstrip(b"\0")
        except Malformed:
            continue
        if not release:
            continue
        system = {name: value.strip("\"'") for name, value in _parse_fields(release.replace(b"=", b" ")).items()}
        sort_key = system.get("IMAGE_ID") or system.get("ID", "")
        versions = ("IMAGE_VERSION", "VERSION", "VERSION_ID", "BUILD_ID")
        version = next((system[each] for each in versions if system.get(each)), "")
        yield LoaderEntry(_entry_id(path), path, True, sort_key, "", version)


def _configured_entries(tree: BootTree) -> Iterator[LoaderEntry]:
    """Files in loader/entries whose program exists."""
    for path in _entry_files(tree, "loader/entries", ".conf"):
        fields = _parse_fields(tree.read(path) or b"")
        program = next((fields[each] for each in ("linux", "efi", "uki") if each in fields), "")
        if tree.is_file(os.path.join(boot_files.mount_point_of(path), program.replace("\\", "/").lstrip("/"))):
            words = (fields.get(each, "") for each in ("sort-key", "machine-id", "version"))
            yield LoaderEntry(_entry_id(path), path, False, *words)


def _entry_files(tree: BootTree, folder: str, suffix: str) -> Iterator[str]:
    """The files in a folder of each boot file system; a folder with two paths counts once."""
    folders: dict[tuple[int, int], str] = {}
    for path in (os.path.join(esp, folder) for esp in boot_files.ESPS):
        if identity := tree.folder_id(path):
            folders.setdefault(identity, path)
    for path in folders.values():
        for name in tree.list_names(path):
            if name.lower().endswith(suffix):
                yield os.path.join(path, name)


def _entry_id(path: str) -> str:
    return boot_files.without_counter(os.path.basename(path))


def _parse_fields(text: bytes) -> Mapping[str, str]:
    """Name -> value, from lines of a name, white space, and a value."""
    lines = (line.split(None, 1) for line in text.decode("utf-8", "replace").splitlines())
    return {words[0]: words[1].strip() for words in lines if words[1:]}
