# SPDX-License-Identifier: Apache-2.0
"""Predicts the boot of a kernel that the firmware starts by itself: this boot's kernel, initramfs and command line, as
they are now."""

import os
import re
from collections.abc import Iterator
from hashlib import sha256

from ..errors import Malformed
from ..measured import efivars, eventlog, logs, uefi
from . import boot_files, replay
from .next_boot import (
    NextBoot,
    PredictionInput,
    boot_loaders,
    not_predicted,
    predict_boot,
    version_in_name,
    why_untrusted,
)


def next_boots(inputs: PredictionInput) -> Iterator[NextBoot]:
    """One boot. A kernel that is not on disk (QEMU -kernel) stays as it is. Raises Refused."""
    if boot_loaders(inputs):
        raise replay.cannot_predict("entries of systemd-boot that are no unified kernel images are not understood")
    kernel = inputs.booted.images[-1][1] if inputs.booted.images else ""
    initrd = inputs.booted.initrd
    changes = {}
    if kernel and (change := _kernel_change(inputs)):
        changes[f"kernel {version_in_name(kernel)} was replaced"] = change
    if initrd and (change := _initramfs_change(inputs)):
        changes[f"initramfs of {version_in_name(initrd)}"] = change
    if change := _command_line_change(inputs):
        changes["kernel command line"] = change
    if not kernel and not initrd:
        raise replay.cannot_predict("neither the kernel nor the initramfs of this boot is a file on disk")
    words = f"kernel {version_in_name(kernel) or version_in_name(initrd)}"
    initrd = initrd or _find_named_initrd(inputs)
    if why := why_untrusted(inputs, filter(None, (kernel, initrd))):
        yield not_predicted(words, why, default=True, changes=changes)
        return
    events = replay.apply_changes(inputs.log, changes.values())
    found = predict_boot(inputs, words, changes, events, default=True, kernel=kernel)
    yield found._replace(initrd=initrd)


def _kernel_change(inputs: PredictionInput) -> replay.Change | None:
    digest, path = inputs.booted.images[-1]
    now = boot_files.authenticode(inputs.tree, path)
    if now is None:
        raise replay.cannot_predict(f"the kernel {path} is not there any more")
    return replay.Change(what="the kernel", old=digest, new=now) if now != digest else None


def _initramfs_change(inputs: PredictionInput) -> replay.Change | None:
    path = inputs.booted.initrd
    tags = [event for event in inputs.log.events if event.kind == eventlog.EVENT_TAG]
    old = [event.digest for event in tags if event.data[:4] == eventlog.INITRD][-1]
    data = inputs.tree.read(path)
    if data is None:
        raise replay.cannot_predict(f"the initramfs {path} is not there any more")
    new = sha256(data).digest()
    return replay.Change(what="the initramfs", old=old, new=new) if old and new != old else None


def _find_named_initrd(inputs: PredictionInput) -> str:
    """The file that `initrd=` names, on the EFI system partition that the kernel is on; "" when it is not there."""
    name = re.search(r"(?:^|\s)initrd=(\S+)", logs.read_up_to(inputs.paths.cmdline, 4096).decode("utf-8", "replace"))
    kernel = inputs.booted.images[-1][1] if inputs.booted.images else ""
    for esp in boot_files.ESPS if name and kernel else ():
        path = os.path.join(esp, name[1].replace("\\", "/").lstrip("/"))  # type: ignore[index]
        if kernel.startswith(f"{esp}/") and inputs.tree.is_file(path):
            return path
    return ""


def _command_line_change(inputs: PredictionInput) -> replay.Change | None:
    """Another command line in the boot entry by which the firmware has started the kernel."""
    entry = efivars.boot_entry_name(inputs.paths)
    try:
        was = uefi.parse_load_option(efivars.measured_variables(inputs.log).get(entry, b"")).options
        now = uefi.parse_load_option(efivars.read_variable(inputs.paths, entry)).options
    except Malformed:  # nothing was started by an entry, or it is gone
        return None
    return replay.command_line_change(old=was, new=now) if was != now else None
