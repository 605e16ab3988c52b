# SPDX-License-Identifier: Apache-2.0
"""Which unified kernel images may be started next, by the firmware or from systemd-boot's menu."""

import os
from collections.abc import Iterable, Iterator

from ..errors import Malformed
from ..measured import eventlog
from . import boot_files, replay, systemd_boot
from .entry import Entry, World, loaders, predicted, unvouched


def entries(world: World) -> Iterator[Entry]:
    """The unified kernel image that was booted, as it is now, and the others of the menu, what comes by itself among
    them. Raises Refused."""
    before = world.before
    if not before.uki:
        raise replay.cannot("the unified kernel image of this boot is not on disk as it was booted")
    listed = systemd_boot.menu(world.paths)
    own = _now_named(before.images[-1][1], listed)
    comes = systemd_boot.comes(world.paths, _started_from(world), listed) if _has_menu(world) else set()
    unified = {each.path: each.id for each in listed if each.unified}
    for name in sorted(comes - set(unified.values())):
        yield Entry(f"boot entry {name}", (), None, "it is no unified kernel image like this boot's", True)
    for path in [own, *(each for each in unified if each != own)]:
        default = path == own or unified[path] in comes
        data = boot_files.read(world.paths, path)
        if data is None:  # its kernel was removed
            continue
        words = f"unified kernel image {os.path.basename(path)}"
        try:
            image = replay.read_unified(data)
        except Malformed as problem:
            yield Entry(words, (), None, str(problem), default)
            continue
        events = replay.unified(world.log, before.images[-1][0], image)
        changes = [] if image.image == before.images[-1][0] else ["unified kernel image"]
        if path != own:
            changes.append("another menu entry")
        if foreign := unvouched(world, [path]):
            yield Entry(words, tuple(changes), None, foreign, default)
            continue
        if boot_files.beside(world.paths, path) != before.beside:
            other = "add-ons or credentials beside it are not those of this boot"
            yield Entry(words, tuple(changes), None, other, default)
            continue
        entry = predicted(world, words, changes, events, default, path)
        if changes and entry.values is not None:  # systemd-stub adds to what the kernel's own stub measures
            entry = entry._replace(values={pcr: value for pcr, value in entry.values.items() if pcr != 9})
        yield entry._replace(initrd=path)


def _now_named(own: str, listed: Iterable[systemd_boot.Listed]) -> str:
    """This boot's image; after a boot that was good its name has no counter any more."""
    names = [each.path for each in listed if boot_files.uncounted(each.path) == boot_files.uncounted(own)]
    return names[0] if names and own not in names else own


def _has_menu(world: World) -> bool:
    """Whether a program has started the unified kernel image: systemd-boot, and not the firmware."""
    programs = (each.digest for each in world.log.events if each.kind == eventlog.EFI_APPLICATION and each.pcr == 4)
    return next(programs, b"") != world.before.images[-1][0]


def _started_from(world: World) -> str:
    """Where the file system with systemd-boot is mounted. The image may lie on another: an extended boot loader
    partition."""
    return [boot_files.esp_of(path) for _, path in (world.before.images[-1], *loaders(world))][-1]
