# SPDX-License-Identifier: Apache-2.0
"""The dumps that are kept, by the names of their files: system/dump has written those of processes, the crash kernel
those of a kernel. Nothing here decrypts."""

import os
import re
import signal
from typing import NamedTuple

from ...errors import Refused
from ...paths import Paths

_NAME = re.compile(
    r"core\.([A-Za-z0-9_+-]{1,64})\.(\d{1,10})\.(\d{1,10})\.(\d{1,12})\.(\d{1,3})\.(\d{1,16})\.([0-9a-f]{16})(\.zst)?\.age",
    re.A,
)
_KERNEL = re.compile(r"kernel(-log)?\.([A-Za-z0-9._+~-]{1,64})\.(\d{1,12})\.(\d{1,16})\.([0-9a-f]{16})\.age", re.A)


class Dump(NamedTuple):
    """A dump, by its name. Nothing in the name is authentic: what the file has in it, age proves."""

    path: str
    comm: str
    """Of the process, 15 of A-Z a-z 0-9 _ + -; the release of a kernel."""
    uid: int
    """Of the process, as `pid` and `signal`; 0 for a kernel."""
    pid: int
    time: int
    """Of the crash, in seconds since 1970."""
    signal: int
    generation: int
    """Of the host key that it is encrypted to."""
    fingerprint: str
    """Of the recipient."""
    packed: bool
    """zstd has compressed it before the encryption."""
    size: int
    """Of the file, in bytes."""

    @property
    def name(self) -> str:
        return os.path.basename(self.path)

    @property
    def kind(self) -> str:
        """`process`, `kernel`, or `kernel-log`: the messages of a kernel that crashed, as text."""
        kind = self.name.partition(".")[0]
        return kind if kind in ("kernel", "kernel-log") else "process"

    @property
    def of_kernel(self) -> bool:
        return self.kind != "process"

    @property
    def is_log(self) -> bool:
        return self.kind == "kernel-log"

    @property
    def signal_name(self) -> str:
        if self.of_kernel:
            return "panic"
        try:
            return signal.Signals(self.signal).name
        except ValueError:
            return str(self.signal)


def dump_name(dump: Dump) -> str:
    """The name of the file of a dump."""
    if dump.of_kernel:
        return f"{dump.kind}.{dump.comm}.{dump.time}.{dump.generation}.{dump.fingerprint}.age"
    parts = ("core", dump.comm, dump.uid, dump.pid, dump.time, dump.signal, dump.generation, dump.fingerprint)
    return ".".join(map(str, parts)) + (".zst.age" if dump.packed else ".age")


def kernel_dump(
    folder: str, release: str, time: int, generation: int, fingerprint: str, size: int, *, kind: str = "kernel"
) -> Dump:
    """The dump of a kernel, or its log, where it is kept. `release` is of A-Z a-z 0-9 . _ + ~ -."""
    dump = Dump(f"{kind}.", release, 0, 0, time, 0, generation, fingerprint, False, size)
    return dump._replace(path=os.path.join(folder, dump_name(dump)))


def parse_name(path: str, size: int) -> Dump | None:
    """None for a file that is no dump."""
    if found := _KERNEL.fullmatch(os.path.basename(path)):
        _, release, when, of_key, fingerprint = found.groups()
        return Dump(path, release, 0, 0, int(when), 0, int(of_key), fingerprint, False, size)
    found = _NAME.fullmatch(os.path.basename(path))
    if not found:
        return None
    comm, *numbers, fingerprint, packed = found.groups()
    uid, pid, time, signal_number, generation = map(int, numbers)
    return Dump(path, comm, uid, pid, time, signal_number, generation, fingerprint, bool(packed), size)


def list_dumps(paths: Paths) -> list[Dump]:
    """The oldest first. Raises OSError."""
    found = []
    try:
        entries = list(os.scandir(paths.dumps))
    except FileNotFoundError:
        return []
    for entry in entries:
        try:
            size = entry.stat(follow_symlinks=False).st_size if entry.is_file(follow_symlinks=False) else -1
        except FileNotFoundError:
            continue  # system/dump has removed it
        dump = parse_name(entry.path, size) if size >= 0 else None
        found += [dump] if dump else []
    return sorted(found, key=lambda each: (each.time, each.pid))


def find_dump(paths: Paths, word: str) -> Dump:
    """The one dump with this PID or file name. Raises Refused for none, or for several."""
    found = [each for each in list_dumps(paths) if word in (each.name, "" if each.of_kernel else str(each.pid))]
    if not found:
        raise Refused(f"there is no dump {word}", "unlock dump list", code="no-dump")
    if len(found) > 1:
        names = ", ".join(each.name for each in found)
        raise Refused(f"there are {len(found)} dumps of a process {word}: {names}", "name one of them", code="no-dump")
    return found[0]
