# SPDX-License-Identifier: Apache-2.0
"""What reads or makes a secret leaves no copy of it in memory. Each works in a process of its own, whose memory is
searched from outside when the secret has been wiped."""

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.test_worker import memory
from unlock import paths
from unlock.disks import luks
from unlock.keys import recovery_key
from unlock.secret import Secret

TOP = Path(__file__).parents[1]
BEGIN = """
import os, sys
sys.path.insert(0, {top!r})
from unlock import ask, paths, run
from unlock.keys import recovery_key
from unlock.secret import Secret
"""
END = """
print("done", flush=True)
sys.stdin.read()
"""


class Child:
    """A process that does `work`, and then waits."""

    def __init__(self, work: str, stdin: bytes = b"", pass_fds: tuple[int, ...] = ()) -> None:
        program = BEGIN.format(top=str(TOP)) + work + END
        self.process = subprocess.Popen(
            [sys.executable, "-c", program], stdin=subprocess.PIPE, stdout=subprocess.PIPE, pass_fds=pass_fds
        )

    def __enter__(self) -> "Child":
        return self

    def __exit__(self, *_: object) -> None:
        self.process.kill()
        self.process.communicate()

    def said(self) -> str:
        """The lines before `done`."""
        assert self.process.stdout
        lines = []
        while (line := self.process.stdout.readline().decode()) != "done\n":
            assert line, "it has failed"
            lines.append(line)
        return "".join(lines)

    def has(self, secret: bytes) -> list[bytes]:
        """Parts of it that are in memory."""
        self.said()
        held = memory(self.process.pid)
        assert b"unlock" in held, "this is not its memory"
        half = len(secret) // 2
        return [part for part in (secret, secret[:half], secret[half:]) if part in held]


def random_text(size: int) -> bytes:
    return os.urandom(size).hex()[:size].encode()


READERS: dict[str, tuple[str, Callable[[bytes], bytes]]] = {
    "from_file": ("ask.from_file({path!r}).wipe()", lambda secret: secret + b"\n"),
    "key_file": ("ask.key_file({path!r}).wipe()", lambda secret: secret),
    "a part of a key file": (
        "ask.key_file({path!r}, offset=5, size=4000).wipe()", lambda secret: b"12345" + secret + b"more"
    ),
    "a program that prints it": ("run.run_for_secret(['cat', {path!r}], 4096, 30).wipe()", lambda secret: secret),
    "a recovery key that is typed": (
        "with ask.from_file({path!r}) as typed: recovery_key.parse(typed).wipe()",
        lambda secret: b" " + secret.replace(b"-", b" ") + b"  ",
    ),
    "one with a typing error": (
        "with ask.from_file({path!r}) as typed:\n try: recovery_key.parse(typed)\n except Exception: pass",
        lambda secret: secret[:-1] + bytes([secret[-1] ^ 1]),
    ),
}  # fmt: skip


@pytest.mark.parametrize("what", READERS)
def test_what_reads_a_secret_keeps_nothing_of_it(tmp_path: Path, what: str) -> None:
    work, content = READERS[what]
    typed = what.startswith(("a recovery", "one"))
    secret = bytes(recovery_key.new()) if typed else random_text(4000)
    path = tmp_path / "secret"
    path.write_bytes(content(secret))
    with Child(work.format(path=str(path)) + "\n") as child:
        found = child.has(secret)
        assert not found
    with Child(f"kept = open({str(path)!r}, 'rb').read()\n") as child:
        assert typed or child.has(secret), "the search finds nothing"


def test_a_recovery_key_that_is_made_and_written_leaves_nothing(tmp_path: Path) -> None:
    path = tmp_path / "key"
    with Child(f"with recovery_key.new() as key: recovery_key.write_new_file({str(path)!r}, key)\n") as child:
        child.said()
        secret = path.read_bytes()
        assert recovery_key.parse(Secret(secret)) == Secret(secret)
        held = memory(child.process.pid)
        assert not [part for part in (secret, secret[:27], secret[28:], secret.replace(b"-", b"")) if part in held]


WORKER = """
from unlock.boot.worker import Worker, WorkerHeader
from unlock.disks.udev import Disk
process = Worker(Disk({path!r}, "", "", "", "", 0, 0.0))
while not (answer := process.read()):
    pass
header = WorkerHeader(process, answer)
with Secret(b"operator") as passphrase:
    for _ in range(3):
        header.volume_key(passphrase, 0).wipe()
process.end()
"""


def test_the_agent_keeps_nothing_of_a_volume_key_that_a_worker_has_read(tmp_path: Path) -> None:
    image = tmp_path / "disk"
    with image.open("wb") as file:
        file.truncate(32 << 20)
    with Secret.random(64) as dek, luks.format(str(image), dek) as container:
        container.add_keyslot(dek, passphrase=Secret(b"operator"))
        secret = bytes(dek)
    with Child(WORKER.format(path=str(image))) as child:
        assert not child.has(secret)


# Files


@pytest.mark.parametrize("stop", [KeyboardInterrupt, MemoryError, OSError])
def test_a_file_that_is_not_written_whole_is_not_there(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, stop: type[BaseException]
) -> None:
    """Whatever ends it: a signal, too."""
    path = str(tmp_path / "key")
    real = os.fsync

    def fsync(fd: int) -> None:
        real(fd)
        raise stop

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", fsync)
        with pytest.raises(stop):
            paths.fill(paths.create(path), path, b"secret")
    assert not os.listdir(tmp_path)
    paths.fill(paths.create(path), path, b"secret" * 100000)
    assert Path(path).read_bytes() == b"secret" * 100000


def test_a_file_whose_writing_a_person_interrupts_is_not_there(tmp_path: Path) -> None:
    path = str(tmp_path / "key")
    work = f"""
import signal, threading
signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background job ignores it
real = os.write
def write(fd, data):
    count = real(fd, data[:10])
    os.kill(os.getpid(), signal.SIGINT)
    return count
os.write = write
try:
    paths.fill(paths.create({path!r}), {path!r}, b"x" * 100)
except KeyboardInterrupt:
    os.write = real
"""
    with Child(work) as child:
        child.said()
        assert not os.path.exists(path)
