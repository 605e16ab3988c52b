# SPDX-License-Identifier: Apache-2.0
"""Predicts the boots of unified kernel images, which the firmware starts, or systemd-boot from its menu."""

import os
from collections.abc import Iterable, Iterator

from ..errors import Malformed
from ..measured import eventlog
from . import boot_files, systemd_boot, uki_replay
from .next_boot import NextBoot, PredictionInput, boot_loaders, not_predicted, predict_boot, why_untrusted
from .replay import cannot_predict


def next_boots(inputs: PredictionInput) -> Iterator[NextBoot]:
    """This boot's unified kernel image, as it is now, and the others of the menu. Raises Refused."""
    booted = inputs.booted
    if not booted.uki:
        raise cannot_predict("the unified kernel image of this boot is not on disk as it was booted")
    listed = systemd_boot.list_entries(inputs.tree)
    own = _current_name(booted.images[-1][1], listed)
    defaults = systemd_boot.next_entry_ids(inputs.tree, _started_from(inputs), listed) if _has_menu(inputs) else set()
    unified = {each.path: each.id for each in listed if each.unified}
    for name in sorted(defaults - set(unified.values())):
        yield not_predicted(f"boot entry {name}", "it is no unified kernel image like this boot's", default=True)
    for path in [own, *(each for each in unified if each != own)]:
        data = inputs.tree.read(path)
        if data is None and path == own and inputs.tree.is_there(path):
            why = f"{path}: {inputs.tree.why_unreadable(path)}"
            yield not_predicted(f"unified kernel image {os.path.basename(path)}", why, default=True)
        elif data is not None:  # else its kernel was removed
            yield _predict_image(inputs, path, data, own=path == own, default=path == own or unified[path] in defaults)


def _predict_image(inputs: PredictionInput, path: str, data: bytes, *, own: bool, default: bool) -> NextBoot:
    """`own`: it is this boot's image."""
    booted_digest = inputs.booted.images[-1][0]
    words = f"unified kernel image {os.path.basename(path)}"
    try:
        image = uki_replay.digest_uki(data)
    except Malformed as problem:
        return not_predicted(words, str(problem), default=default)
    events = uki_replay.replace_uki(inputs.log, old=booted_digest, new=image)
    changes = [] if image.image == booted_digest else ["unified kernel image"]
    if not own:
        changes.append("another menu entry")
    why = why_untrusted(inputs, [path])
    if not why and boot_files.sidecar_digests(inputs.tree, path) != inputs.booted.beside:
        why = "add-ons or credentials beside it are not those of this boot"
    if why:
        return not_predicted(words, why, default=default, changes=changes)
    found = predict_boot(inputs, words, changes, events, default=default, kernel=path)
    if changes and found.values is not None:  # systemd-stub adds to what the kernel's own stub measures
        found = found._replace(values={pcr: value for pcr, value in found.values.items() if pcr != 9})
    return found._replace(initrd=path)


def _current_name(own: str, listed: Iterable[systemd_boot.LoaderEntry]) -> str:
    """The name of this boot's image now: after a good boot systemd takes the boot counter out of it."""
    names = [each.path for each in listed if boot_files.without_counter(each.path) == boot_files.without_counter(own)]
    return names[0] if names and own not in names else own


def _has_menu(inputs: PredictionInput) -> bool:
    """Whether systemd-boot, and not the firmware, has started the unified kernel image."""
    programs = (each.digest for each in inputs.log.events if each.kind == eventlog.EFI_APPLICATION and each.pcr == 4)
    return next(programs, b"") != inputs.booted.images[-1][0]


def _started_from(inputs: PredictionInput) -> str:
    """Where the file system with systemd-boot is mounted. The image may lie on another: an extended boot loader
    partition."""
    return [boot_files.mount_point_of(path) for _, path in (inputs.booted.images[-1], *boot_loaders(inputs))][-1]
