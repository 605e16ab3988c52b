# SPDX-License-Identifier: Apache-2.0
"""Lists the menu of systemd-boot, and works out which entry it starts when nobody chooses.

systemd-boot(7); the Boot Loader Specification, "Sorting".
"""

import fnmatch
import os
from collections.abc import Callable, Iterator, Mapping
from typing import Any, NamedTuple

from ..errors import Malformed
from ..measured import efivars
from . import boot_files, pe
from .boot_tree import BootTree
from .initramfs_images import version_sort_key

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


_ORDER: tuple[tuple[Callable[[LoaderEntry], Any], bool], ...] = (
    (lambda each: version_sort_key(each.id), True),
    (lambda each: version_sort_key(each.version) if each.sort_key else [], True),
    (lambda each: each.machine_id if each.sort_key else "", False),
    (lambda each: each.sort_key, False),
    (lambda each: not each.sort_key, False),
    (lambda each: (left := boot_files.COUNTER.search(each.path)) is not None and int(left[1]) == 0, False),
)
"""The keys that sort the menu, and whether the larger comes first; the most important key is last."""


def list_entries(tree: BootTree) -> list[LoaderEntry]:
    """All entries of the menu, in its order."""
    found = [*_unified_entries(tree), *_configured_entries(tree)]
    for key, reverse in _ORDER:
        found.sort(key=key, reverse=reverse)
    return found


def next_entry_ids(tree: BootTree, esp: str, listed: list[LoaderEntry]) -> set[str]:
    """The ids of the entries that may be started next: the one for one boot only, and the default one after it.

    `esp`: the mount point of the file system that systemd-boot was started from. Entries that it finds by itself
    (`auto-`) and profiles of a unified kernel image (`@`) are not in `listed`, but may be among the ids.
    """

    def matching(setting: str) -> set[str]:
        pattern = _loader_variable(tree, "LoaderEntryLastBooted") if setting == "@saved" else setting
        found = [each.id for each in listed if fnmatch.fnmatchcase(each.id, pattern)][:1]
        return set(found or ([pattern] if pattern.startswith("auto-") or "@" in pattern else []))

    configured = _parse_fields(tree.read(os.path.join(esp, "loader/loader.conf")) or b"").get("default", "").lower()
    lasting = (_loader_variable(tree, "LoaderEntryDefault"), configured, "*")
    always = next((found for each in lasting if (found := matching(each))), set())
    return matching(_loader_variable(tree, "LoaderEntryOneShot")) | always


def _loader_variable(tree: BootTree, name: str) -> str:
    return efivars.read_variable(tree.paths, name, _VENDOR).decode("utf-16-le", "replace").partition("\0")[0].lower()


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
