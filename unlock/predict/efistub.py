# SPDX-License-Identifier: Apache-2.0
"""What the firmware starts next when it starts the kernel by itself: this boot's kernel, initramfs and command line, as
they are now."""

import os
import re
from collections.abc import Iterator
from hashlib import sha256

from ..errors import Malformed
from ..measured import efivars, eventlog, logs, uefi
from . import boot_files, replay
from .entry import Entry, World, loaders, predicted, version_of


def entries(world: World) -> Iterator[Entry]:
    """One. A kernel that is not on disk (QEMU -kernel) stays as it is. Raises Refused."""
    if loaders(world):
        raise replay.cannot("entries of systemd-boot that are no unified kernel images are not understood")
    changes, words = [], []
    version = ""
    for digest, path in world.before.images[-1:]:
        now = boot_files.authenticode(world.paths, path)
        version = version_of(path)
        if now is None:
            raise replay.cannot(f"the kernel {path} is not there any more")
        if now != digest:
            changes.append(replay.Change("the kernel", digest, now))
            words.append(f"kernel {version} was replaced")
    if path := world.before.initrd:
        old = [e.digest for e in world.log.events if e.kind == eventlog.EVENT_TAG and e.data[:4] == eventlog.INITRD]
        data = boot_files.read(world.paths, path)
        if data is None:
            raise replay.cannot(f"the initramfs {path} is not there any more")
        version = version or version_of(path)
        if old[-1] and sha256(data).digest() != old[-1]:
            changes.append(replay.Change("the initramfs", old[-1], sha256(data).digest()))
            words.append(f"initramfs of {version_of(path)}")
    if line := _options(world):
        changes.append(line)
        words.append("kernel command line")
    if not world.before.images and not world.before.initrd:
        raise replay.cannot("neither the kernel nor the initramfs of this boot is a file on disk")
    kernel = world.before.images[-1][1] if world.before.images else ""
    entry = predicted(world, f"kernel {version}", words, replay.changed(world.log, changes), True, kernel)
    yield entry._replace(initrd=world.before.initrd or _named_initrd(world))


def _named_initrd(world: World) -> str:
    """The file that `initrd=` names, on the EFI system partition that the kernel is on; "" when it is not there."""
    name = re.search(r"(?:^|\s)initrd=(\S+)", logs.read_up_to(world.paths.cmdline, 4096).decode("utf-8", "replace"))
    kernel = world.before.images[-1][1] if world.before.images else ""
    for esp in boot_files.ESPS if name and kernel else ():
        path = os.path.join(esp, name[1].replace("\\", "/").lstrip("/"))  # type: ignore[index]
        if kernel.startswith(f"{esp}/") and os.path.isfile(os.path.join(world.paths.root, path)):
            return path
    return ""


def _options(world: World) -> replay.Change | None:
    """The kernel command line, when it was changed in the boot entry by which the firmware has started the kernel."""
    entry = efivars.boot_entry_name(world.paths)
    try:
        was = uefi.load_option(efivars.measured_variables(world.log).get(entry, b"")).options
        now = uefi.load_option(efivars.read_variable(world.paths, entry)).options
    except Malformed:  # nothing was started by an entry, or it is gone
        return None
    return replay.command_line(was, now) if was != now else None
