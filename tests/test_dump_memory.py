# SPDX-License-Identifier: Apache-2.0
"""A dump of 1 GiB: what all processes of the writer, and of `dump extract`, have in memory at the most."""

import hashlib
import os
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.dumps import Writer
from tests.flowfixture import Host
from unlock.operations.dump import kept, protection

pytestmark = [pytest.mark.usefixtures("key_cache", "unmeasured"), pytest.mark.long(minutes=2)]

MIB = 1 << 20
SIZE = 1 << 30
MOST = 64 * MIB
EXTRACT = """
import sys
sys.argv = ["unlock", "dump", "extract", sys.argv[2], "--accept", "cut-dump"]
import unlock.cli, unlock.__main__ as program
from unlock.paths import Paths
unlock.cli.protect = lambda: None
unlock.cli.Paths = lambda: Paths(ROOT)
sys.exit(program.main())
"""


class Peak(threading.Thread):
    """The largest sum, of the processes of a session that live at once, of what each has had in memory at the most."""

    def __init__(self, session: int) -> None:
        super().__init__(daemon=True)
        self.session, self.most, self.ended = session, 0, False

    def run(self) -> None:
        while not self.ended:
            together = 0
            for folder in Path("/proc").glob("[0-9]*"):
                try:
                    if int((folder / "stat").read_text().rpartition(")")[2].split()[3]) == self.session:
                        words = (folder / "status").read_text().partition("VmHWM:")[2].split()
                        together += int(words[0]) << 10 if words else 0  # none of one that has ended
                except (OSError, ValueError, IndexError):
                    pass
            self.most = max(self.most, together)
            time.sleep(0.05)

    def stop(self) -> int:
        self.ended = True
        self.join()
        return self.most


def pieces() -> "list[bytes]":
    """Of 1 GiB: a quarter is noise, the rest compresses."""
    noise = os.urandom(MIB // 4)
    return [noise[number:] + noise[:number] + bytes(MIB // 4) + b"some text \n" * (MIB // 22) for number in range(64)]


def test_a_gigabyte_goes_through_64_mib(tmp_path: Path, record_property: Callable[[str, object], None]) -> None:
    host = Host(tmp_path, 1)
    protection.enable(host.paths)
    writer = Writer(Path(host.paths.root))
    some, wanted, given = pieces(), hashlib.sha256(), 0
    read, write = os.pipe()
    with subprocess.Popen(["sleep", "1000"]) as crashed:
        begun = time.monotonic()
        handler = writer.start(crashed.pid, read)
        os.close(read)
        peak = Peak(handler.pid)
        peak.start()
        with os.fdopen(write, "wb") as core:
            while given < SIZE:
                piece = some[given // MIB % len(some)]
                core.write(piece)
                wanted.update(piece)
                given += len(piece)
        assert handler.wait(300) == 0
        took, written = time.monotonic() - begun, peak.stop()
        crashed.kill()
    (dump,) = kept.list_dumps(host.paths)
    code = EXTRACT.replace("ROOT", repr(host.paths.root))
    command = [sys.executable, "-c", code, "", dump.name]
    with subprocess.Popen(command, stdout=subprocess.PIPE, start_new_session=True, env=dict(os.environ)) as extract:
        assert extract.stdout
        peak = Peak(extract.pid)
        peak.start()
        found = hashlib.sha256()
        while piece := extract.stdout.read(MIB):
            found.update(piece)
        opened = peak.stop()
    assert extract.returncode == 0 and found.digest() == wanted.digest()
    told = f"1 GiB: writer {written >> 20} MiB, {took:.1f} s; extract {opened >> 20} MiB"
    record_property("shown", told)
    assert 0 < written <= MOST and 0 < opened <= MOST, told
