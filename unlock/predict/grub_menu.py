# SPDX-License-Identifier: Apache-2.0
"""What GRUB may start next: its menu is read again, with its files as they are now."""

import os
from collections.abc import Callable, Iterator, Sequence
from hashlib import sha256

from ..errors import UnlockError
from . import boot_files, grub_script, replay
from .entry import Entry, World, predicted, unvouched, version_of


def entries(world: World) -> Iterator[Entry]:
    """The entries of GRUB's menu, first the one that it starts by itself. Raises Refused."""
    before = world.before
    images = {path: digest for digest, path in before.images}

    learned = replay.learn(world.log, before.texts, lambda name: images.get(before.files.get(name, ("", b""))[0], b""))
    where = _places(world)
    disk = _disk(world, where)
    for name in before.texts:
        if name != learned.name and name.endswith(".cfg") and _changed(world, name):
            raise replay.cannot(f"{before.files[name][0]} has changed, and GRUB reads it before its menu")
    try:
        text = disk.content(learned.name).decode("utf-8", "surrogateescape")
    except grub_script.Unknown as problem:
        raise replay.cannot(str(problem)) from None
    later = _without_once(disk, f"{learned.variables['prefix']}/grubenv")
    for number, (title, titles) in enumerate(replay.menu(learned, text, disk)):
        yield _menu_entry(world, learned, text, title, titles, disk, where, not number)
        if later and not number:
            title, titles = next(replay.menu(learned, text, later))
            after = _menu_entry(world, learned, text, title, titles, later, where, False)
            yield after._replace(words=f"{after.words}, after the next boot")


def _menu_entry(
    world: World,
    learned: replay.Learned,
    text: str,
    title: str,
    titles: Sequence[str],
    disk: replay.Disk,
    where: Callable[[str], str],
    default: bool,
) -> Entry:
    try:
        events, kernel = replay.boot(learned, text, titles, disk)
    except UnlockError as problem:
        return Entry(f"menu entry {title}", (), None, str(problem), default)
    old = learned.kernel
    version, before = (version_of(each.words[0]) for each in (kernel, old))
    changes = []
    if version != before:
        changes.append(f"kernel {version} instead of {before}")
    elif _changed(world, kernel.words[0]):
        changes.append(f"kernel {version} was replaced")
    for name in kernel.initrds:
        if name in old.initrds and _changed(world, name):
            changes.append(f"initramfs of {version_of(name)}")
    if kernel.words[1:] != old.words[1:]:
        changes.append("kernel command line")
    if text != world.before.texts[learned.name]:
        changes.append("grub.cfg")
    if tuple(titles) != learned.way:
        changes.append("another menu entry")
    words = f"kernel {version}" + ("" if default else f", menu entry {title}")
    if old.initrds and not kernel.initrds:
        return Entry(words, tuple(changes), None, "it starts no initramfs, so nothing opens a disk", default)
    loaded = [where(name) for name in (kernel.words[0], *kernel.initrds)]
    if foreign := unvouched(world, loaded):
        return Entry(words, tuple(changes), None, foreign, default)
    entry = predicted(world, words, changes, events, default, loaded[0])
    return entry._replace(initrd=loaded[1]) if loaded[1:] else entry


def _changed(world: World, name: str) -> bool:
    path, digest = world.before.files.get(name, ("", b""))
    data = boot_files.read(world.paths, path) if path else None
    return data is None or sha256(data).digest() != digest


def _places(world: World) -> Callable[[str], str]:
    """GRUB's names for files -> paths below the root directory, as far as this boot's show where they are mounted."""
    places = {}
    for name, (path, _) in world.before.files.items():
        device, rest = _parted(name)
        if path.endswith(rest.lstrip("/")):
            places[device] = path[: len(path) - len(rest.lstrip("/"))]

    def where(name: str) -> str:
        device, rest = _parted(name)
        if device not in places or not rest.startswith("/") or ".." in rest.split("/"):
            raise grub_script.Elsewhere(f"where {name} is on disk is not known")
        return os.path.join(places[device], rest.lstrip("/"))

    return where


def _disk(world: World, where: Callable[[str], str]) -> replay.Disk:
    def content(name: str) -> bytes:
        data = boot_files.read(world.paths, where(name))
        if data is None:
            raise grub_script.Unknown(f"{name} is not on disk")
        return data

    def test(kind: str, name: str) -> bool:
        path = os.path.join(world.paths.root, where(name))
        if kind == "s":
            return os.path.isfile(path) and os.path.getsize(path) > 0
        return {"d": os.path.isdir, "e": os.path.exists, "f": os.path.isfile}[kind](path)

    def image(name: str) -> bytes:
        digest = boot_files.authenticode(world.paths, where(name))
        if digest is None:
            raise grub_script.Unknown(f"{name} is no kernel that is on disk")
        return digest

    return replay.Disk(content, lambda name: sha256(content(name)).digest(), image, test)


def _without_once(disk: replay.Disk, environment: str) -> replay.Disk | None:
    """What the boot after `grub-reboot` will have found: GRUB takes the entry out of its environment. None without."""
    try:
        old = disk.content(environment).decode("utf-8", "surrogateescape")
    except grub_script.Unknown:
        return None
    new = grub_script.with_variable(old, "next_entry", "").encode("utf-8", "surrogateescape")
    if new.decode("utf-8", "surrogateescape") == old:
        return None
    return disk._replace(
        content=lambda name: new if name == environment else disk.content(name),
        sha256=lambda name: sha256(new).digest() if name == environment else disk.sha256(name),
    )


def _parted(name: str) -> tuple[str, str]:
    """(hd0,gpt2)/grub/grub.cfg: the device, which may be none, and the rest."""
    if name.startswith("("):
        device, _, rest = name.partition(")")
        return f"{device})", rest
    return "", name
