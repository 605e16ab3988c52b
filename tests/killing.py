# SPDX-License-Identifier: Apache-2.0
"""SIGKILL for a flow: at each of its steps that changes something lasting, and at a sample of all the others.

Such a step is a call of `LASTING`, before it and after it. The others are all calls and returns of our functions, ten
thousands in a flow: `SAMPLE` of them, others for another commit. UNLOCK_KILLS=1000 tries more of them.
"""

import mmap
import os
import random
import re
import signal
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Collection, Iterator
from functools import cache
from pathlib import Path
from types import FrameType, FunctionType

from unlock.disks import luks
from unlock.host import keyring
from unlock.providers.kmip import key_operations
from unlock.providers.kmip.failover import Failover
from unlock.tpm import chip

CHECKOUT = Path(__file__).parents[1]
PACKAGE = str(CHECKOUT / "unlock")
SAMPLE = int(os.environ.get("UNLOCK_KILLS", "5"))

Step = Callable[..., object]
LASTING: tuple[Step, ...] = (
    os.replace,
    os.rename,
    os.unlink,
    os.symlink,
    keyring.put,
    keyring.forget,
    luks.Container.set_token,
    luks.Container.remove_token,
    luks.Container.add_keyslot,
    luks.Container.remove_keyslot,
    luks.Container.set_flags,
    chip.Tpm.write_record,
    chip.Tpm._keep,
    chip.Tpm._define,
    chip.Tpm._undefine,
    Failover.change,
    Failover.change_unasked,
    key_operations.activate_key,
    key_operations.deactivate_key,
)
"""What changes a file, the key cache, a header, the TPM or the key manager."""


@cache
def commit() -> str:
    """What chooses the sample: the same for all who test a commit."""
    done = subprocess.run(["git", "rev-parse", "HEAD"], cwd=CHECKOUT, capture_output=True, text=True, check=False)
    return done.stdout.strip()


class Killer:
    """`for attempt, killed in killer(begin)` kills what `begin(attempt)` returns, once at each step. Who iterates looks
    at what it has left, and finishes it. `killed` is False in the attempt that needed no more steps."""

    def __init__(self, tell: Callable[[str], None]) -> None:
        self._tell = tell

    def __call__(
        self, begin: Callable[[int], Callable[[], object]], lasting: Collection[Step] = LASTING
    ) -> Iterator[tuple[int, bool]]:
        attempt = 1
        while (total := _calls(attempt, begin(attempt), lasting)) is None:
            yield attempt, True
            attempt += 1
        yield attempt, False
        assert attempt > 3, "it has hardly a step"
        sample = random.Random(commit()).sample(range(1, total + 1), min(SAMPLE, total))
        for number in sample:
            attempt += 1
            yield attempt, killed_at(number, begin(attempt), ())
        self._tell(f"killed at {attempt - 1 - len(sample)} steps that last and {len(sample)} of {total} others")


def killed_at(number: int, work: Callable[[], object], steps: Collection[Step]) -> bool:
    """Runs `work` in a child that kills itself at the Nth call or return of `steps`, or of anything of ours when there
    are none; False when it had ended before."""
    return _calls(number, work, steps) is None


def _calls(number: int, work: Callable[[], object], steps: Collection[Step]) -> int | None:
    """All calls and returns of ours in such a child that has ended; None when it was killed."""
    wanted = {step.__code__ if isinstance(step, FunctionType) else step for step in steps}
    left = number

    def event(frame: FrameType, kind: str, called: object) -> None:
        nonlocal left
        if not frame.f_code.co_filename.startswith(PACKAGE):
            return
        ours = kind in ("call", "return")
        all_calls[0] += ours
        if (frame.f_code if ours else called) in wanted or (ours and not wanted):
            left -= 1
            if not left:
                os.kill(os.getpid(), signal.SIGKILL)

    def run() -> None:
        sys.settrace(None)  # coverage has nothing of a child that is killed
        sys.setprofile(event)
        work()
        sys.setprofile(None)

    with mmap.mmap(-1, 8) as shared, memoryview(shared).cast("q") as all_calls:
        code = child(run)
        assert code in (0, -signal.SIGKILL), f"the child ended with {code}"
        return None if code else all_calls[0]


def killed_in(call: str, number: int, work: Callable[[], object]) -> bool:
    """The same as it enters its Nth system call of that name, in the middle of a library too, whatever the load."""
    return _traced(["-e", f"trace={call}", "-e", f"inject={call}:signal=KILL:when={number}"], work) == -signal.SIGKILL


def calls_of(work: Callable[[], object]) -> dict[str, int]:
    """The system calls of a child that runs `work`, by name."""
    with tempfile.NamedTemporaryFile("r") as file:
        code = _traced(["-c", "-U", "calls,name", "-o", file.name], work)
        assert code == 0, f"the child ended with {code}"
        counts = re.findall(r"^ *(\d+) +([a-z]\w*)$", file.read(), re.MULTILINE)
    return {name: int(count) for count, name in counts if name != "total"}


def trace_of(calls: str, work: Callable[[], object]) -> list[str]:
    """A line for each of these system calls of a child that runs `work`, as strace(1) prints them, with the paths of
    descriptors and without what was written."""
    with tempfile.NamedTemporaryFile("r") as file:
        code = _traced(["-f", "-y", "-s", "0", "-e", f"trace={calls}", "-o", file.name], work)
        assert code == 0, f"the child ended with {code}"
        return file.read().splitlines()


def _traced(options: list[str], work: Callable[[], object]) -> int:
    """The exit code of a child whose main thread strace(1) watches from before it begins."""
    waits, go = os.pipe()

    def begin() -> None:
        os.close(go)
        os.read(waits, 1)
        work()

    pid = _fork(begin)
    os.close(waits)
    output = [] if "-o" in options else ["-o", "/dev/null"]
    with subprocess.Popen(["strace", "-qq", "-p", str(pid), *output, *options], stderr=subprocess.PIPE) as tracer:
        while "TracerPid:\t0\n" in Path(f"/proc/{pid}/status").read_text():
            assert tracer.poll() is None, tracer.communicate()[1].decode()
            time.sleep(0.001)
        os.write(go, b"!")
        os.close(go)
        return _ended(pid)


def child(work: Callable[[], object]) -> int:
    """The exit code of a forked child that runs `work`: 0, 1 for an exception, or minus a signal."""
    return _ended(_fork(work))


def _ended(pid: int) -> int:
    try:
        return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
    except BaseException:  # the test's time is over
        os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)
        raise


def _fork(work: Callable[[], object]) -> int:
    pid = os.fork()
    if pid == 0:
        code = 1
        try:
            work()
            code = 0
        except BaseException:
            traceback.print_exc()
        finally:
            os._exit(code)
    return pid
