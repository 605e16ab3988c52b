# SPDX-License-Identifier: Apache-2.0
"""`unlock dump enable | disable`: makes the kernel give each core to system/dump, in this boot and the next ones.

    age is there ──> recipient ──> coredump.conf.d: systemd-coredump keeps no image ──> sysctl.d ──> the running kernel

The file in sysctl.d has the name of systemd-coredump's own, which it replaces. Where something else hands cores to
systemd-coredump all the same, as its package does while it is installed, that keeps no image.
"""

import os
import shutil
from typing import NamedTuple

from ... import journald, log, messages
from ...disks import devices
from ...errors import DiskFailed, Malformed, Refused, Tampered, UnlockError, Usage
from ...host import config
from ...host.lock import exclusive
from ...host.state import State
from ...keys import access, dump_key
from ...keys.access import Work
from ...paths import Paths, write_atomically
from ...run import run
from ...secret import Secret

RISK = "plain-dumps"
MEANING = "core dumps of processes are written without encryption, with the keys and data that they have in them"
PATTERN = "|/usr/lib/unlock/dump %P %u %g %s %t 0 %h %d %F"
"""The arguments of systemd-coredump, which gets them too; 0 stands for the size that the image may have."""
_SETTINGS = {
    "kernel.core_pattern": PATTERN,
    "kernel.core_pipe_limit": "16",
    "fs.suid_dumpable": "2",
}
"""As of systemd-coredump, but for the program. The kernel waits for at most 16 at once."""
_MARK = "# unlock: see unlock(8), dump enable\n"
_SYSCTL = "etc/sysctl.d/50-coredump.conf"
_COREDUMP = "etc/systemd/coredump.conf.d/unlock.conf"
_TMPFILES = "run/tmpfiles.d/unlock.conf"
"""In the place of that of /usr/lib."""
_PATIENCE = 10.0
_TO_KEEP_NOTHING = f"{_MARK}[Coredump]\nStorage=none\nProcessSizeMax=0\n"


class Protection(NamedTuple):
    """How this host handles dumps and swap."""

    encrypted: bool
    """Dumps of processes are encrypted, or none is kept."""
    detail: str
    """In words."""
    do: str
    """What to type to change that; ''."""
    recipient: dump_key.Recipient | None
    plain_swaps: tuple[str, ...]
    """Swap areas on disks that are not encrypted."""


def refuse_without(paths: Paths) -> None:
    """Raises Refused where dumps cannot be encrypted: no age, or files of others in the place of ours."""
    if not shutil.which("age"):
        raise Refused(f"age is not installed: {MEANING}", f"apt install age; or --accept {RISK}", code=RISK)
    for name in (_SYSCTL, _COREDUMP):
        if (there := _read(paths, name)) and not there.startswith(_MARK):
            raise Refused(f"/{name} is not of unlock", f"move it away; or --accept {RISK}", code=RISK)


def enable(paths: Paths) -> None:
    """Needs the host key only where its recipient is not there. Raises Refused, NoKey, ProviderError, OSError."""
    refuse_without(paths)
    with exclusive(paths):
        ensure_recipient(paths)
        set_up(paths)
    journald.record(paths, messages.DUMPS_ENABLED, "core dumps are encrypted from now on")


def ensure_recipient(paths: Paths) -> None:
    """Writes the recipient of the present host key, where it is not there. Raises NoKey, ProviderError, OSError."""
    refresh_recipient(paths)
    recipient = dump_key.read_recipient(paths)
    if not recipient or recipient.generation != State.load(paths).host_key_ref.generation:
        with Work(paths) as work, _present_host_key(work) as host_key:
            dump_key.write_recipient(paths, work.state, host_key)


def refresh_recipient(paths: Paths) -> None:
    """Makes the recipient that of the present host key, where this boot has that: the file may be on a plain disk. The
    caller holds the lock. Raises OSError."""
    try:
        with Work(paths) as work:
            dump_key.refresh(work)
    except Tampered as error:
        log.error(str(error), error.hint)
    except UnlockError:
        pass  # without the key, the recipient is believed


def at_boot(paths: Paths) -> None:
    """What each boot does once its keys are there. A recipient that it cannot write is told. Raises OSError."""
    write_limits(paths)
    try:
        with exclusive(paths, _PATIENCE):
            refresh_recipient(paths)
    except Refused as error:
        log.note(f"{paths.dump_recipient} was not looked at: {error}")  # `unlock sync` does it too
    except OSError as error:
        log.error(f"{paths.dump_recipient}: {error.strerror}", "move it away; then: unlock dump enable")


def set_up(paths: Paths) -> None:
    """The same on a host that has its recipient. Raises OSError."""
    os.makedirs(paths.dumps, mode=0o700, exist_ok=True)
    settings = "".join(f"{name}={value}\n" for name, value in _SETTINGS.items())
    for name, text in ((_COREDUMP, _TO_KEEP_NOTHING), (_SYSCTL, _MARK + settings)):
        path = os.path.join(paths.root, name)
        os.makedirs(os.path.dirname(path), mode=0o755, exist_ok=True)
        write_atomically(path, text.encode(), mode=0o644)
    for name, value in _SETTINGS.items():
        _set(paths, name, value)
    write_limits(paths)


def write_limits(paths: Paths) -> None:
    """Tells system/dump and systemd-tmpfiles how many dumps are kept, in this boot; a wrong [dump] changes nothing.
    Raises OSError."""
    try:
        limits = config.load(paths.config).dump
    except Malformed as error:
        log.error(str(error), error.hint)
        return
    os.makedirs(paths.run, mode=0o700, exist_ok=True)
    text = f"KEEP_COUNT={limits.most}\nKEEP_MIB={limits.size}\nPER_MINUTE={limits.per_minute}\n"
    write_atomically(paths.of_this_boot("dump-limits"), text.encode())
    rule = os.path.join(paths.root, _TMPFILES)
    os.makedirs(os.path.dirname(rule), mode=0o755, exist_ok=True)
    write_atomically(rule, f"e /var/lib/unlock/dumps - - - m:{limits.age}d\n".encode(), mode=0o644)


def disable(paths: Paths, accept: frozenset[str]) -> None:
    """Leaves dumps to systemd-coredump, or to what the kernel does by itself; those that are kept stay. Raises Usage,
    OSError."""
    if RISK not in accept:
        raise Usage(MEANING, f"unlock dump disable --accept {RISK}")
    with exclusive(paths):
        for name in (_SYSCTL, _COREDUMP):
            if _read(paths, name).startswith(_MARK):
                os.unlink(os.path.join(paths.root, name))
        if _pattern(paths) == PATTERN:
            _set(paths, "fs.suid_dumpable", "0")  # the kernel warns of 2 with a name of a file
            _set(paths, "kernel.core_pattern", "core")
        if paths.root == "/":
            run(["/usr/lib/systemd/systemd-sysctl", *(f"--prefix={name}" for name in _SETTINGS)])
    journald.record(paths, messages.DUMPS_DISABLED, "core dumps are not encrypted any more")


def read_protection(paths: Paths) -> Protection:
    """Changes nothing."""
    pattern, recipient = _pattern(paths), dump_key.read_recipient(paths)
    encrypted, detail, do = False, "", "unlock dump enable"
    if pattern.split(" ")[0] == PATTERN.split(" ")[0]:
        encrypted, do = True, ""
        if not shutil.which("age"):
            detail, do = "none is kept: age is not installed", "apt install age"
        elif recipient is None:
            detail, do = "none is kept: there is no recipient", "unlock dump enable"
        elif not _read(paths, _SYSCTL).startswith(_MARK):
            encrypted, detail, do = False, "encrypted until the next boot", "unlock dump enable"
        else:
            detail = f"encrypted to host key {recipient.generation}"
    elif pattern in ("|/bin/false", "|/bin/true"):
        encrypted, detail, do = True, "none is kept: the kernel drops them", ""
    elif _read(paths, _COREDUMP).startswith(_MARK) and "systemd-coredump" in pattern:
        encrypted, detail = True, "none is kept: something gives them to systemd-coredump"
    else:
        detail = f"not encrypted: {pattern}" if pattern else "not encrypted"
    return Protection(encrypted, detail, do, recipient, tuple(plain_swaps(paths)))


def _present_host_key(work: Work) -> Secret:
    """Raises ProviderError, NoKey."""
    if kept := work.state.host_key(work.persistence):
        return kept
    entry = work.state.host_key_ref
    at = work.state.provider_of(entry.id)
    return work.provider(at).fetch(access.key_ref(at, entry.id, entry.name).id, work.opens())


def plain_swaps(paths: Paths) -> list[str]:
    """Swap areas on disks that are not encrypted: proc_swaps(5). A swap file lies on the disks of its file system;
    memory that is compressed is no disk."""
    found = []
    for line in _read(paths, "proc/swaps").splitlines()[1:]:
        node, kind = line.split()[:2]
        if kind == "file":
            numbers = devices.devices_of_mount(_mount_of(node), paths.root)
        elif os.path.basename(node).startswith("zram"):
            backing = _read(paths, f"sys/block/{os.path.basename(node)}/backing_dev").strip()
            if backing in ("", "none"):
                continue
            numbers = [_number(backing, paths)]
        else:
            numbers = [_number(node, paths)]
        if not all(each and devices.is_encrypted(each, paths.root) for each in numbers or [""]):
            found.append(node)
    return found


def _number(node: str, paths: Paths) -> str:
    """MAJOR:MINOR of a node; '' if it is none."""
    try:
        number = devices.device_number(node, paths.root)
    except DiskFailed:
        return ""
    return f"{os.major(number)}:{os.minor(number)}"


def _mount_of(path: str) -> str:
    while not os.path.ismount(path):
        path = os.path.dirname(path)
    return path


def _pattern(paths: Paths) -> str:
    return _read(paths, "proc/sys/kernel/core_pattern").strip()


def _set(paths: Paths, name: str, value: str) -> None:
    """A setting of the running kernel; none below another root directory that has none."""
    path = os.path.join(paths.root, "proc/sys", name.replace(".", "/"))
    if os.path.exists(path):
        with open(path, "w", encoding="ascii") as file:
            file.write(value)


def _read(paths: Paths, name: str) -> str:
    """A small file below the root directory; '' where it cannot be read."""
    try:
        with open(os.path.join(paths.root, name), encoding="utf-8", errors="replace") as file:
            return file.read(1 << 16)
    except OSError:
        return ""
