# SPDX-License-Identifier: Apache-2.0
"""Predicts the boots that GRUB may start: runs its menu again, with its files as they are now on disk."""

import os
from collections.abc import Callable, Iterator, Mapping
from hashlib import sha256
from typing import NamedTuple

from ..errors import UnlockError
from . import boot_files, grub_script
from .grub_learn import learn_grub_boot
from .grub_parser import Unknown
from .grub_replay import GrubBoot, GrubFiles, GrubKernel, encode_text, list_menu, measure_entry, saved_by_default
from .next_boot import NextBoot, PredictionInput, not_predicted, predict_boot, version_in_name, why_untrusted
from .replay import cannot_predict

_FAILED = ("recordfail", "initrdfail")


def next_boots(inputs: PredictionInput) -> Iterator[NextBoot]:
    """The entries of GRUB's menu, the default one first. Raises Refused."""
    booted = inputs.booted
    images = {path: digest for digest, path in booted.images}

    def image(name: str) -> bytes:
        return images.get(booted.files.get(name, ("", b""))[0], b"")

    boot = learn_grub_boot(inputs.log, booted.texts, image)
    find_path = _path_finder(inputs)
    used: set[str] = set()
    files = _files_on_disk(inputs, find_path, used)
    for name in booted.texts:
        if name != boot.config_name and name.endswith(".cfg") and _has_changed(inputs, name):
            raise cannot_predict(f"{booted.files[name][0]} has changed, and GRUB reads it before its menu")
    try:
        text = files.content(boot.config_name).decode("utf-8", "surrogateescape")
    except Unknown as problem:
        raise cannot_predict(str(problem)) from None
    menu = _Menu(inputs=inputs, boot=boot, text=text, files=files, find_path=find_path, used=used)
    later = _files_after_next_boot(files, f"{boot.variables['prefix']}/grubenv", saved_by_default(boot, text, files))
    for number, (title, titles) in enumerate(list_menu(boot, text, files)):
        yield _predict_entry(menu, title, titles, default=not number)
        if later and not number:
            title, titles = next(list_menu(boot, text, later))
            after = _predict_entry(menu._replace(files=later), title, titles, default=False)
            yield after._replace(words=f"{after.words}, after the next boot")


class _Menu(NamedTuple):
    """The menu that is predicted from."""

    inputs: PredictionInput
    boot: GrubBoot
    text: str
    """Of the grub.cfg on disk now."""
    files: GrubFiles
    find_path: Callable[[str], str]
    used: set[str]
    """The paths that `files` has read."""


def _predict_entry(menu: _Menu, title: str, titles: tuple[str, ...], *, default: bool) -> NextBoot:
    inputs, boot = menu.inputs, menu.boot
    menu.used.clear()
    try:
        events, kernel = measure_entry(boot, menu.text, titles, menu.files)
    except UnlockError as problem:
        return not_predicted(f"menu entry {title}", str(problem), default=default)
    changes = _kernel_changes(inputs, boot.kernel, kernel)
    if menu.text != inputs.booted.texts[boot.config_name]:
        changes.append("grub.cfg")
    if titles != boot.titles:
        changes.append("another menu entry")
    words = f"kernel {version_in_name(kernel.words[0])}" + ("" if default else f", menu entry {title}")
    if boot.kernel.initrds and not kernel.initrds:
        why = "it starts no initramfs, so nothing opens a disk"
        return not_predicted(words, why, default=default, changes=changes)
    loaded = [menu.find_path(name) for name in (kernel.words[0], *kernel.initrds)]
    if why := why_untrusted(inputs, [*loaded, menu.find_path(boot.config_name), *sorted(menu.used)]):
        return not_predicted(words, why, default=default, changes=changes)
    found = predict_boot(inputs, words, changes, events, default=default, kernel=loaded[0])
    return found._replace(initrd=loaded[1]) if loaded[1:] else found


def _kernel_changes(inputs: PredictionInput, old: GrubKernel, new: GrubKernel) -> list[str]:
    """What differs in kernel, initramfs and command line, in words."""
    changes = []
    version, before = version_in_name(new.words[0]), version_in_name(old.words[0])
    if version != before:
        changes.append(f"kernel {version} instead of {before}")
    elif _has_changed(inputs, new.words[0]):
        changes.append(f"kernel {version} was replaced")
    for name in new.initrds:
        if name in old.initrds and _has_changed(inputs, name):
            changes.append(f"initramfs of {version_in_name(name)}")
    if new.words[1:] != old.words[1:]:
        changes.append("kernel command line")
    return changes


def _has_changed(inputs: PredictionInput, name: str) -> bool:
    """Whether the file that this boot has read by GRUB's name is another one now, or gone."""
    path, digest = inputs.booted.files.get(name, ("", b""))
    data = inputs.tree.read(path) if path else None
    return data is None or sha256(data).digest() != digest


# Files ------------------------------------------------------------------------------------------------------


def _path_finder(inputs: PredictionInput) -> Callable[[str], str]:
    """A function from GRUB's names for files to paths below the root directory.

    The files of this boot show where GRUB's devices are mounted. The function raises NotOnDisk for another device.
    """
    places = {}
    for name, (path, _) in inputs.booted.files.items():
        device, rest = _split_device(name)
        if path.endswith(rest.lstrip("/")):
            places[device] = path[: len(path) - len(rest.lstrip("/"))]

    def find_path(name: str) -> str:
        device, rest = _split_device(name)
        if device not in places or not rest.startswith("/") or ".." in rest.split("/"):
            raise grub_script.NotOnDisk(f"where {name} is on disk is not known")
        return os.path.join(places[device], rest.lstrip("/"))

    return find_path


def _files_on_disk(inputs: PredictionInput, find_path: Callable[[str], str], used: set[str]) -> GrubFiles:
    """Adds the paths that are read to `used`."""

    def content(name: str) -> bytes:
        data = inputs.tree.read(path := find_path(name))
        if data is None:
            raise Unknown(f"{name} is not on disk: {inputs.tree.why_unreadable(path)}")
        used.add(path)
        return data

    def digest(name: str) -> bytes:
        return sha256(content(name)).digest()

    def test(kind: str, name: str) -> bool:
        path, tree = find_path(name), inputs.tree
        size, is_folder = tree.size(path), tree.folder_id(path) is not None
        if size is None and not is_folder and tree.is_there(path):
            raise Unknown(f"{name} is no file that can be read: {tree.why_unreadable(path)}")
        return {"d": is_folder, "e": is_folder or size is not None, "f": size is not None, "s": bool(size)}[kind]

    def image(name: str) -> bytes:
        digest = boot_files.authenticode(inputs.tree, path := find_path(name))
        if digest is None:
            raise Unknown(f"{name} is no kernel that is on disk")
        used.add(path)
        return digest

    return GrubFiles(content=content, sha256=digest, image=image, test=test)


def _files_after_next_boot(files: GrubFiles, environment: str, saved: Mapping[str, str | None]) -> GrubFiles | None:
    """The files that the boot after the next one finds; None when they are the same.

    `saved`: what GRUB saves in its environment; after `grub-reboot` it takes the entry for one boot out. The flags of
    a boot that failed are taken back by Ubuntu's services.
    """
    try:
        old = files.content(environment).decode("utf-8", "surrogateescape")
    except Unknown:
        return None
    text = old
    for name, value in saved.items():
        if name not in _FAILED:
            text = grub_script.set_environment_variable(text, name, value)
    if text == old:
        return None
    new = encode_text(text)
    return files._replace(
        content=lambda name: new if name == environment else files.content(name),
        sha256=lambda name: sha256(new).digest() if name == environment else files.sha256(name),
    )


def _split_device(name: str) -> tuple[str, str]:
    """(hd0,gpt2)/grub/grub.cfg: the device, which may be none, and the rest."""
    if name.startswith("("):
        device, _, rest = name.partition(")")
        return f"{device})", rest
    return "", name
