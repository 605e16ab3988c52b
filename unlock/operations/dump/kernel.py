# SPDX-License-Identifier: Apache-2.0
"""`unlock dump kernel enable | disable | status | test`, and what each boot does for dumps of the kernel.

    enable: programs, partition ──> kdump-tools masked ──> header on the partition ──> kernel-dump ──> the crash kernel
    boot:   dump on the partition ──> /var/lib/unlock/dumps ──> partition empty again ──> the crash kernel

What is killed in between is done again by the same command, or at the next boot. A dump that was moved is whole and
durable under its name before the partition is empty.
"""

import os
import re
import time
import uuid
from typing import NamedTuple

from ... import journald, log, messages, strictjson
from ...disks import devices
from ...errors import DiskFailed, Malformed, NewerFormat, Refused, Tampered, UnlockError, Usage
from ...host.lock import exclusive
from ...keys import dump_key
from ...keys.access import Work
from ...paths import Paths, sync_folder, write_atomically
from ...run import run
from ...secret import Secret
from ..consent import Consent, Plan
from . import crash_kernel, kept, kernel_partition, protection
from .crash_image import Config, refuse_without_programs
from .extract import give_name, new_file, write_all
from .kept import Dump
from .kernel_partition import DATA_OFFSET, EMPTY, LOG_OFFSET, SIZE_MIN, WHOLE, Header
from .opened import read_packed
from .rewrap import encrypt

RISK = protection.RISK
MEANING = "dumps of the kernel are left to kdump-tools, which writes them without encryption, with all keys in them"
KEEP_COUNT = 4
"""Dumps of the kernel that are kept, the newest."""
_VERSION = 1
_AGE = b"age-encryption.org/v1\n"
_MASKED = (
    "etc/systemd/system/kdump-tools.service",
    "etc/systemd/system/kdump-tools-dump.service",
    "etc/udev/rules.d/50-kdump-tools.rules",
)
"""What loads a crash kernel of kdump-tools, and what writes a dump in it. A link to /dev/null in /etc outlasts each
update of the package. Who loads one all the same is refused by the kernel: crash_kernel.py."""
_KDUMP_TOOLS = ("lib/systemd/system/kdump-tools.service", "usr/lib/systemd/system/kdump-tools.service")
_VIRTUAL = ("dm-", "drbd", "loop", "md", "nbd", "ram", "rbd", "zd", "zram")
"""Disks that need more than a driver."""


class Setup(NamedTuple):
    """/var/lib/unlock/kernel-dump."""

    id: str
    """Of the partition's header."""
    device: str
    """By which it is found, as a link of udev where there is one."""


class KernelProtection(NamedTuple):
    """How this host handles dumps of the kernel."""

    encrypted: bool
    """They are encrypted, or none is kept."""
    detail: str
    """In words."""
    do: str
    """What to type to change that; ''."""
    device: str
    """The partition; '' where none is set up."""
    state: str
    """Of the partition: `empty`, `writing`, `whole`; `missing`, or '' where none is set up."""
    memory: int
    """Bytes that are kept for a crash kernel."""
    loaded: bool
    """A crash kernel of unlock is loaded."""
    locked: bool
    """No other can be loaded in this boot."""
    generation: int
    """Of the host key that it encrypts to; 0 where none is loaded."""


# enable, disable


def enable(paths: Paths, device: str, consent: Consent) -> None:
    """Erases the partition, unless it is one for kernel dumps. Raises Refused, Usage, DiskFailed, NoKey, OSError."""
    refuse_without_programs()
    with exclusive(paths):
        node = check_partition(device)
        if not set_up(paths, node, device, consent):
            return
        if not crash_kernel.reserved(paths):
            log.note(
                "no memory is kept for a crash kernel yet: put "
                f"crashkernel={crash_kernel.MEMORY} on the kernel's command line, and reboot"
            )
        elif crash_kernel.is_locked(paths):
            log.note("this boot has its crash kernel already: the next boot loads the new one")
        else:
            _collect_and_load(paths)


def set_up(paths: Paths, node: str, device: str, consent: Consent) -> bool:
    """All of it but the crash kernel; False where the plan was only to be shown."""
    for path in _below(paths, _MASKED):
        if os.path.lexists(path) and not _is_masked(path):
            raise Refused(f"{path} is not of unlock", "move it away", code="kdump-tools")
    before, header = _read_setup_if_whole(paths), _read_any_header(node)
    id = header.id if header and (header.state != WHOLE or (before and before.id == header.id)) else ""
    steps = ["kdump-tools is masked", *([] if id else [f"{device} is for kernel dumps"]), "the crash kernel is loaded"]
    destroys = () if id else (f"all data on {device} ({_describe(node, header)}, {_size(node) >> 20} MiB)",)
    if not consent(Plan(tuple(steps), destroys, device)):
        return False
    protection.ensure_recipient(paths)
    for path in _below(paths, _MASKED):
        _mask(path)
    _reload_systemd(paths)
    if not id:
        id = uuid.uuid4().hex
        run(["wipefs", "--all", "--quiet", node])
        kernel_partition.write_empty(node, id)
    _write_setup(paths, Setup(id, _lasting_name(node, device)))
    journald.record(paths, messages.KERNEL_DUMPS_ENABLED, "dumps of the kernel are encrypted from now on")
    return True


def disable(paths: Paths, accept: frozenset[str]) -> None:
    """From the next boot on there is no crash kernel of ours, and kdump-tools may have one. Dumps that are kept stay.
    Raises Usage, OSError."""
    if RISK not in accept:
        raise Usage(MEANING, f"unlock dump kernel disable --accept {RISK}")
    with exclusive(paths):
        if setup := read_setup(paths):
            _collect(paths, setup)
            os.unlink(paths.kernel_dump)
            sync_folder(os.path.dirname(paths.kernel_dump))
        for path in filter(_is_masked, _below(paths, _MASKED)):
            os.unlink(path)
        _reload_systemd(paths)
    journald.record(paths, messages.KERNEL_DUMPS_DISABLED, "dumps of the kernel are not encrypted any more")


def _reload_systemd(paths: Paths) -> None:
    if paths.root == "/":
        run(["systemctl", "daemon-reload"])


def check_partition(device: str) -> str:
    """The node of a device that kernel dumps can go to. Raises Usage, Refused, DiskFailed."""
    node = os.path.realpath(device)
    if not os.path.exists(node):
        raise Usage(f"{device} does not exist", "lsblk")
    if os.path.basename(node).startswith(_VIRTUAL):
        raise Refused(
            f"{device} is not a partition of a disk: the crash kernel has nothing but the disk's driver",
            "a partition, or a whole disk",
            code="not-supported",
        )
    if used := devices.describe_use(node):
        raise Refused(f"{device}: {used}", "another partition", code="in-use")
    size = _size(node)
    if size < SIZE_MIN:
        raise Refused(f"{device} has {size >> 20} MiB", f"a partition of at least {SIZE_MIN >> 20} MiB", "too-small")
    return node


# Each boot


def boot(paths: Paths) -> int:
    """Moves the dump of a crash to the others, and loads the crash kernel. Raises Refused, DiskFailed, CommandFailed,
    OSError."""
    if not read_setup(paths):
        return 0
    with exclusive(paths):
        _collect_and_load(paths)
    return 0


def _collect_and_load(paths: Paths) -> None:
    setup = read_setup(paths)
    assert setup
    protection.refresh_recipient(paths)
    recipient = dump_key.read_recipient(paths)
    if not recipient:
        raise Refused("there is no recipient that dumps are encrypted to", "unlock dump enable", code="no-recipient")
    _collect(paths, setup)
    crash_kernel.load(paths, find_partition(paths, setup), Config(setup.id, recipient))
    log.note(f"dumps of the kernel are encrypted to host key {recipient.generation}, on {setup.device}")


def find_partition(paths: Paths, setup: Setup) -> str:
    """The node of the partition that was set up. Raises Refused."""
    node = os.path.realpath(devices.path_below(paths.root, setup.device))
    header = None
    try:
        header = kernel_partition.read_header(node)
    except UnlockError as error:
        why = str(error)
    else:
        why = f"{setup.device} is not the partition that was set up"
    if header and header.id == setup.id:
        return node
    raise Refused(why, f"plug it in, or unlock dump kernel enable {setup.device}", code="missing")


def _collect(paths: Paths, setup: Setup) -> Dump | None:
    """Moves a whole dump from the partition to the others. Half of one goes. Raises Refused where there is no room for
    it, DiskFailed, OSError; then it stays."""
    node = find_partition(paths, setup)
    header = kernel_partition.read_header(node)
    assert header
    if header.state == EMPTY:
        return None
    words = f"the kernel crashed at {_when(header)}"
    kernel_log = _keep_log(paths, node, header)
    dump = None
    if header.state == WHOLE and _has_stream(node, header.size, DATA_OFFSET):
        dump = _move(paths, node, header, "kernel", DATA_OFFSET)
        log.note(f"{words}: {dump.name}")
    else:
        log.note(f"{words}, and its dump on {setup.device} is not whole: it is not kept")
    if kernel_log:
        words += f"; its log is {kernel_log.name}"
    kernel_partition.write_empty(node, setup.id)
    journald.record(paths, messages.KERNEL_CRASHED, words, dump=dump.name if dump else "")
    for kind in ("kernel", "kernel-log"):
        for old in [each for each in kept.list_dumps(paths) if each.kind == kind][:-KEEP_COUNT]:
            os.unlink(old.path)
    return dump


def _keep_log(paths: Paths, node: str, crash: Header) -> Dump | None:
    header = kernel_partition.read_log_header(node, crash)
    if header is None or not _has_stream(node, header.size, LOG_OFFSET):
        return None
    return _move(paths, node, header, "kernel-log", LOG_OFFSET)


def _has_stream(node: str, size: int, offset: int) -> bool:
    """Whether the age file that a header names can be there."""
    if offset + size > _size(node):
        return False
    with open(node, "rb") as disk:
        disk.seek(offset)
        return disk.read(len(_AGE)) == _AGE


def _move(paths: Paths, node: str, header: Header, kind: str, offset: int) -> Dump:
    os.makedirs(paths.dumps, mode=0o700, exist_ok=True)
    said = (header.kernel, header.time, header.generation, header.fingerprint, header.size)
    dump = kept.kernel_dump(paths.dumps, *said, kind=kind)
    if os.path.lexists(dump.path) and os.stat(dump.path).st_size == header.size:
        return dump  # a boot was cut after it had its name
    found = os.statvfs(paths.dumps)
    if header.size > found.f_bavail * found.f_frsize // 2:
        raise Refused(
            f"{node} has a {kind} of {header.size >> 10} KiB, more than half of what is free in {paths.dumps}",
            "make room, then systemctl restart unlock-crash-kernel",
            code="no-room",
        )
    with new_file(dump.path) as fd:
        for piece in kernel_partition.read_stream(node, header.size, offset):
            write_all(fd, piece)
        os.utime(fd, (header.time, header.time))
        give_name(fd, dump.path)
    return dump


# status


def read_kernel_protection(paths: Paths) -> KernelProtection:
    """Changes nothing."""
    setup, memory = read_setup(paths), crash_kernel.reserved(paths)
    ours = crash_kernel.loaded_config(paths)
    any_loaded = crash_kernel.is_loaded(paths)
    state, encrypted, detail, do = "", True, "none is kept: there is no crash kernel", ""
    if any_loaded and not ours:
        encrypted, detail = False, "not encrypted: a crash kernel is loaded, and unlock did not load it"
        do = "unlock dump kernel enable DEV"
    elif setup is None and any(map(os.path.exists, _below(paths, _KDUMP_TOOLS))) and not _all_masked(paths):
        encrypted, detail = False, "not encrypted: kdump-tools writes them"
        do = "unlock dump kernel enable DEV, or apt remove kdump-tools"
    elif setup is None and ours:
        detail = f"encrypted to host key {ours.recipient.generation} until the next boot"
    elif setup:
        try:
            header = kernel_partition.read_header(find_partition(paths, setup))
            state = header.state if header else "missing"
        except UnlockError as error:
            state, detail, do = "missing", f"none is kept: {error}", f"unlock dump kernel enable {setup.device}"
        else:
            detail, do = _describe_setup(setup, memory, ours, state)
        if not _all_masked(paths):
            do = do or f"unlock dump kernel enable {setup.device}"
            encrypted, detail = False, "kdump-tools is not masked: it may write them without encryption"
    return KernelProtection(
        encrypted=encrypted,
        detail=detail,
        do=do,
        device=setup.device if setup else "",
        state=state,
        memory=memory,
        loaded=any_loaded and ours is not None,
        locked=crash_kernel.is_locked(paths),
        generation=ours.recipient.generation if ours and any_loaded else 0,
    )


def _describe_setup(setup: Setup, memory: int, ours: Config | None, state: str) -> tuple[str, str]:
    again = "systemctl restart unlock-crash-kernel"
    if not memory:
        wanted = f"crashkernel={crash_kernel.MEMORY} on the kernel's command line, and a reboot"
        return "none is kept: no memory is kept for a crash kernel", wanted
    if ours is None:
        return "none is kept: the crash kernel is not loaded", again
    detail = f"encrypted to host key {ours.recipient.generation}, on {setup.device}"
    if ours.id != setup.id:
        return f"{detail}: the crash kernel of this boot is for another partition", "reboot"
    if state != EMPTY:
        return f"{detail}, where one is that was not moved to the others", again
    return detail, ""


# test


class KernelTrial(NamedTuple):
    """What was seen."""

    device: str
    generation: int
    memory: int
    estimate: int
    """Bytes of memory that are the kernel's own now, before they are compressed."""


def test(work: Work) -> KernelTrial:
    """Proves all but the crash itself. Raises Refused, NoKey, Tampered, CommandFailed."""
    paths = work.paths
    found, config = read_kernel_protection(paths), crash_kernel.loaded_config(paths)
    if not found.loaded or config is None or found.do or not found.encrypted:
        raise Refused(f"dumps of the kernel: {found.detail}", found.do, code=RISK)
    mark = os.urandom(32)
    with dump_key.find_identity(work, config.recipient.fingerprint, config.recipient.generation) as identity:
        _prove(config, identity, mark)
    setup = read_setup(paths)
    assert setup
    room = _size(find_partition(paths, setup)) - DATA_OFFSET
    estimate = crash_kernel.estimate(paths)
    if estimate > room:
        log.note(f"{setup.device} has room for {room >> 20} MiB, and the memory of the kernel is {estimate >> 20} MiB")
    return KernelTrial(setup.device, config.recipient.generation, found.memory, estimate)


def _prove(config: Config, identity: Secret, mark: bytes) -> None:
    """What is encrypted to the recipient in the crash kernel opens with the host key."""
    fd = os.memfd_create("dump", os.MFD_CLOEXEC)
    try:
        encrypt([mark], ["--recipient", config.recipient.text], fd)
        size = os.fstat(fd).st_size
        to = config.recipient
        dump = kept.kernel_dump("", "test", 0, to.generation, to.fingerprint, size)
        if b"".join(read_packed(dump._replace(path=f"/proc/self/fd/{fd}"), identity)) != mark:
            raise Tampered("the host key does not open what the crash kernel would encrypt", "unlock check")
    finally:
        os.close(fd)


def panic(paths: Paths, consent: Consent) -> None:
    """Crashes the kernel. What the disks' file systems have not written is lost, after a sync. Raises Refused."""
    plan = Plan(
        ("all file systems are written", "the kernel crashes", "the crash kernel writes its dump and reboots"),
        ("what programs that run now have not saved",),
        "panic",
    )
    if not consent(plan):
        return
    os.sync()
    with open(os.path.join(paths.root, "proc/sysrq-trigger"), "w", encoding="ascii") as file:
        file.write("c")


# The setup


def read_setup(paths: Paths) -> Setup | None:
    """None where kernel dumps are not set up. Raises Malformed, NewerFormat."""
    try:
        with open(paths.kernel_dump, encoding="utf-8", opener=_without_waiting) as file:
            text = file.read(4096)
    except FileNotFoundError:
        return None
    try:
        found = strictjson.parse(text)
        version, setup = found.pop("version"), Setup(found.pop("id"), found.pop("device"))
        whole = not found and isinstance(version, int) and isinstance(setup.device, str)
        whole = whole and re.fullmatch("[0-9a-f]{32}", setup.id) is not None
    except (ValueError, LookupError, AttributeError, TypeError):
        whole = False
    else:
        if isinstance(version, int) and version > _VERSION:
            raise NewerFormat(f"{paths.kernel_dump} has format {version}; this unlock reads {_VERSION}")
    if not whole:
        raise Malformed(f"{paths.kernel_dump} is not as unlock writes it", "unlock dump kernel enable DEV")
    return setup


def _without_waiting(path: str, flags: int) -> int:
    """Opens a FIFO too, which nobody writes to."""
    return os.open(path, flags | os.O_NONBLOCK)


def _read_setup_if_whole(paths: Paths) -> Setup | None:
    """None for one that cannot be read, too: it is written anew."""
    try:
        return read_setup(paths)
    except Malformed:
        return None


def _write_setup(paths: Paths, setup: Setup) -> None:
    text = strictjson.indented({"version": _VERSION, **setup._asdict()}) + "\n"
    write_atomically(paths.kernel_dump, text.encode(), mode=0o644)


def _read_any_header(node: str) -> Header | None:
    """None where it cannot be read either: what is there goes."""
    try:
        return kernel_partition.read_header(node)
    except (Malformed, NewerFormat):
        return None


def _describe(node: str, header: Header | None) -> str:
    if header:
        return f"a dump of a kernel of {_when(header)}"
    return devices.list_signatures(node) or "no file system"


def _when(header: Header) -> str:
    return time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime(header.time))


def _size(node: str) -> int:
    """Raises DiskFailed."""
    try:
        with open(node, "rb") as disk:
            return disk.seek(0, os.SEEK_END)
    except OSError as error:
        raise DiskFailed(f"{node}: {error.strerror}") from error


def _lasting_name(node: str, given: str) -> str:
    """A link of udev by which the partition is found in each boot; `given` where there is none."""
    for folder in ("by-partuuid", "by-id"):
        links = f"/dev/disk/{folder}"
        for name in sorted(os.listdir(links)) if os.path.isdir(links) else []:
            if os.path.realpath(f"{links}/{name}") == node:
                return f"{links}/{name}"
    return given


# kdump-tools


def _below(paths: Paths, names: tuple[str, ...]) -> list[str]:
    return [os.path.join(paths.root, name) for name in names]


def _all_masked(paths: Paths) -> bool:
    return all(map(_is_masked, _below(paths, _MASKED)))


def _is_masked(path: str) -> bool:
    return os.path.islink(path) and os.readlink(path) == "/dev/null"


def _mask(path: str) -> None:
    if not _is_masked(path):
        os.makedirs(os.path.dirname(path), mode=0o755, exist_ok=True)
        os.symlink("/dev/null", path)
        sync_folder(os.path.dirname(path))
