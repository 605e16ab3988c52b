# SPDX-License-Identifier: Apache-2.0
"""What the re-encryption of an open disk leaves in device-mapper when its process is killed, and how the mapping gets
back onto the disk, in use.

    NAME ──linear──> NAME-overlay ──crypt──> the disk
                                  └─crypt──> NAME-hotzone-forward ──linear──> the disk

libcryptsetup (2.6 to 2.8) loads into the overlay the table with the new volume key over the next hotzone, suspends the
hotzone, moves its data, writes the header, and resumes the hotzone. Who reads or writes there waits meanwhile. So a
hotzone that is suspended must not be resumed before its data is new: what waits is encrypted with the new key already.
It is finished first, by another block device over the disk, as libcryptsetup refuses one that is in use.
"""

import os
import re
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

from ..disks import disk_keys, luks, raw_header, reencrypt, reencrypt_plan
from ..disks.reencrypt_plan import CRASH, Plan
from ..errors import DiskFailed, Refused
from ..host.keyring import Lent
from ..protect import hold_in_memory
from ..run import run

_SECTOR = 512
_TIMEOUT = 60.0
"""Seconds for a call of dmsetup, which waits for what is being written."""


def is_left(name: str) -> bool:
    """Whether a killed process has left something beside the mapping."""
    return luks.is_active(f"{name}-overlay") or luks.is_active(_hotzone(name))


def refuse_left(name: str, verb: str) -> None:
    """Raises Refused where a killed process has left something beside the mapping, amid a step that nothing finishes in
    use: what waits at it is as the data will be, and the data there may not be yet. `name`: '' for a disk that is
    closed. `verb`: what the process did."""
    if name and is_left(name):
        raise Refused(
            f"{name}: the process that {verb} it was killed, and its mapping stands in the middle of a step",
            "reboot: it opens by itself, and what was begun goes on",
            code="killed-run",
        )


def relink(device: str, name: str, plan: Plan, keys: disk_keys.ReencryptionKeys) -> None:
    """Finishes the hotzone that the killed process was at, and puts the mapping on the disk again. Nothing is left
    suspended. May be killed and run again. Raises DiskFailed, CommandFailed, Tampered."""
    hold_in_memory()  # what is read from the disk may wait
    overlay, hotzone = f"{name}-overlay", _hotzone(name)
    stack = _stack()
    if overlay in stack:
        if stack[overlay]:  # it has its former table, and the next one is loaded
            _dmsetup("clear", overlay)
            if hotzone in stack:
                _dmsetup("clear", hotzone)
            _resume(overlay)
        if stack.get(hotzone):
            _finish_hotzone(device, overlay, hotzone, plan, keys)
            _resume(hotzone)
        _load(device, name, overlay, plan, keys)
        _dmsetup("remove", "--retry", overlay)
    if hotzone in stack:
        _dmsetup("remove", "--retry", hotzone)


def remove_temporary(device: str) -> None:
    """Removes mappings over a disk by which a killed process has moved data: ciphers that libcryptsetup leaves to the
    kernel. Raises CommandFailed."""
    number = _number(device)
    for name in _stack():
        found = re.fullmatch(r"temporary-cryptsetup-(\d+)-\d+", name)
        if found and not os.path.exists(f"/proc/{found[1]}") and number in _dmsetup("table", name).split():
            _dmsetup("remove", "--retry", name)


def _hotzone(name: str) -> str:
    return f"{name}-hotzone-forward"


def _finish_hotzone(device: str, overlay: str, hotzone: str, plan: Plan, keys: disk_keys.ReencryptionKeys) -> None:
    """Raises DiskFailed where the header does not go with the overlay's table."""
    number = _dmsetup("info", "-c", "--noheadings", "-o", "major,minor", "--separator", ":", hotzone).strip()
    rows = [row.split() for row in _dmsetup("table", overlay).splitlines()]
    over = [row for row in rows if row[2] == "crypt" and row[6] == number]
    if not over:  # the first step of the run, whose table is not in use yet
        return
    start, length = int(over[0][0]) * _SECTOR, int(over[0][1]) * _SECTOR
    with _alias(device) as data:
        reencrypt.settle(device, plan, keys.operation, data)
        if _new_bytes(device, plan) == start:  # no data has been moved
            reencrypt.step(device, keys.operation, length, data)
    done = _new_bytes(device, plan)
    if done not in (start + length, -1):
        raise DiskFailed(
            f"{device}: {done} bytes are re-encrypted, and its mapping waits at {start + length}",
            "reboot: it opens by itself, and goes on then",
            code="killed-run",
        )


def _new_bytes(device: str, plan: Plan) -> int:
    """How much from the start of the data is new; -1 for all."""
    parts = reencrypt_plan.parts(raw_header.read_valid_copies(device)[0].metadata(device), plan)
    for digest, segment in parts:
        if digest != plan.new or "flags" in segment:
            return int(segment["offset"]) - int(parts[0][1]["offset"])
    return -1


def _load(device: str, name: str, overlay: str, plan: Plan, keys: disk_keys.ReencryptionKeys) -> None:
    """Gives the mapping the table that the header means, with the options of the present one."""
    copy = raw_header.read_valid_copies(device)[0]
    metadata = copy.metadata(device)
    if reencrypt_plan.phase_of(metadata, plan, device) == CRASH:
        raise DiskFailed(f"{device}: its hotzone is in use", "reboot: it opens by itself", code="killed-run")
    rows = [row.split() for row in _dmsetup("table", overlay).splitlines()]
    options = next(row[8:] for row in rows if row[2] == "crypt")
    end = int(rows[-1][0]) + int(rows[-1][1])
    uuid = copy.content[168:208].rstrip(b"\0").decode()
    with ExitStack() as lent:
        lent.enter_context(Lent(_description(uuid, plan.old), keys.old))
        lent.enter_context(Lent(_description(uuid, plan.new), keys.new))
        parts = reencrypt_plan.parts(metadata, plan)
        table = _table(parts, uuid, len(keys.new), _number(device), end, options)
        _dmsetup("load", name, table=table)
        _dmsetup("suspend", "--noflush", "--nolockfs", name)
        _resume(name)


def _table(
    parts: Sequence[tuple[int, Any]], uuid: str, key_size: int, number: str, end: int, options: list[str]
) -> str:
    """In the form of dmsetup(8). `end`: sectors of the mapping."""
    base = int(parts[0][1]["offset"])
    starts = [(int(segment["offset"]) - base) // _SECTOR for _, segment in parts]
    rows = []
    for (digest, segment), start, after in zip(parts, starts, [*starts[1:], end], strict=True):
        key = f":{key_size}:logon:{_description(uuid, digest)}"
        rows.append(
            f"{start} {after - start} crypt {segment['encryption']} {key} {segment['iv_tweak']} {number} "
            + " ".join([str(int(segment["offset"]) // _SECTOR), *options])
        )
    return "\n".join(rows) + "\n"


def _description(uuid: str, digest: int) -> str:
    """Of a volume key, as libcryptsetup names it in the kernel's keyring."""
    return f"cryptsetup:{uuid}-d{digest}"


@contextmanager
def _alias(device: str) -> Iterator[str]:
    """Another block device over a disk, past the page cache."""
    node = run(["losetup", "--find", "--show", "--direct-io=on", device], timeout=_TIMEOUT).strip()
    try:
        yield node
    finally:
        run(["losetup", "--detach", node], timeout=_TIMEOUT)


def _stack() -> dict[str, bool]:
    """Name of each mapping -> whether it is suspended."""
    if not os.path.exists("/sys/class/misc/device-mapper"):
        return {}  # the driver is not even loaded
    lines = _dmsetup("info", "-c", "--noheadings", "-o", "name,suspended", "--separator", "/").splitlines()
    return {name: state == "Suspended" for name, _, state in (line.partition("/") for line in lines) if state}


def _resume(name: str) -> None:
    _dmsetup("resume", "--noflush", "--nolockfs", name)


def _dmsetup(*arguments: str, table: str = "") -> str:
    return run(["dmsetup", "--noudevsync", *arguments], table.encode(), _TIMEOUT)


def _number(device: str) -> str:
    number = os.stat(device).st_rdev
    return f"{os.major(number)}:{os.minor(number)}"
