# SPDX-License-Identifier: Apache-2.0
"""A forked process for each disk, which reads the disk's header and activates the disk when it gets the volume key.

    agent                             worker
    Worker(disk)        ──fork──>     reads and validates the header
    read()             <──header──    keeps the context that this header came from
    activate(name, dek) ──key───>     activates that context, and ends
    read()             <──done────

A disk that is half re-encrypted has a header that changes when its hotzone is recovered: `activate_half` activates what
the worker reads then, if it fits the plan that the agent has authenticated.

Only the worker touches the disk. A disk that never answers blocks its own worker alone, and a header that crashes
libcryptsetup ends its own worker alone. A worker has no key but its disk's: it is forked before there are keys, or
wipes those that it inherits; and it has none any more when it gives its last answer. libcryptsetup is not thread-safe,
so disks are activated in parallel by their workers.
"""

import os
import select

from .. import errors
from ..disks import luks
from ..disks.header import ANY, MAX_METADATA, Header
from ..disks.udev import Disk
from ..errors import DiskFailed, UnlockError
from ..host.report import now
from ..light import TYPE_CHECKING, NamedTuple, signal
from ..protect import end_with_parent
from ..secret import Secret, wipe_all

if TYPE_CHECKING:
    from ..disks.reencrypt_plan import Plan

ANSWER_TIMEOUT = 10.0
"""Seconds for one answer to `volume_key`."""
_HEAD_MAX = 1 << 16
_ANSWER_MAX = MAX_METADATA + 1
"""Bytes of an answer. Metadata that is cut off at this size is too large for `parse_metadata` anyway."""


class Answer(NamedTuple):
    """`word` is `header` (its argument is the UUID), `done` or `key`."""

    word: str
    argument: str
    data: bytearray


class Ended(DiskFailed):
    """The worker ended without an answer: libcryptsetup crashed, or the kernel killed the worker."""


class Worker:
    """The agent's end of one worker."""

    def __init__(self, disk: Disk) -> None:
        """Raises DiskFailed without libcryptsetup, OSError where the kernel gives no process or pipe."""
        luks.prepare()
        self.disk = disk
        self.deadline = 0.0
        """When the awaited answer is overdue, in the time of `report.now()`."""
        self._sizes, self._received, self._count = bytearray(8), bytearray(), 0
        """The sizes at the beginning of an answer, the rest of it once they are known, and how much of both is here."""
        requests, self._requests = os.pipe()
        self._answers, answers = os.pipe()
        try:
            self.pid = os.fork()
        except OSError:
            self._close()
            raise
        finally:
            if getattr(self, "pid", -1) == 0:
                _serve(disk.node, requests, answers)
            os.close(requests)
            os.close(answers)

    def fileno(self) -> int:
        """The pipe of answers: readable when `read` can take something."""
        return self._answers

    def read(self) -> Answer | None:
        """Takes what has arrived; None while the answer is not complete. Raises the worker's error, or Ended."""
        in_sizes = self._count < len(self._sizes)
        buffer, at = (self._sizes, self._count) if in_sizes else (self._received, self._count - len(self._sizes))
        with memoryview(buffer) as room:
            count = os.readv(self._answers, [room[at:]])
        if not count:
            raise Ended("the worker ended without an answer")
        self._count += count
        head, body = (int.from_bytes(self._sizes[at : at + 4], "big") for at in (0, 4))
        if self._count == len(self._sizes):
            if head > _HEAD_MAX or body > _ANSWER_MAX:
                raise DiskFailed(f"its worker sends more than {_ANSWER_MAX} bytes")
            self._received = bytearray(head + body)  # it does not grow: that would leave copies of a key
        if self._count < len(self._sizes) + head + body:
            return None
        word, _, argument = self._received[:head].decode("utf-8", "replace").partition(" ")
        data = self._received[head:]
        self._received[:] = bytes(len(self._received))
        self._received, self._count = bytearray(), 0
        if word == "error":
            raise _decode_error(argument, data)
        return Answer(word, argument, data)

    def activate(self, name: str, dek: Secret) -> None:
        """Requests the mapping /dev/mapper/NAME; the answer will be `done`. Raises Ended."""
        self._ask(f"activate {name}", dek)

    def activate_half(self, name: str, plan: "Plan", passphrase: Secret) -> None:
        """The same for a half re-encrypted disk, by a passphrase of both volume keys; what a power cut has left is
        recovered first. Raises Ended."""
        self._ask(f"activate-half {name} {' '.join(map(str, plan))}", passphrase)

    def volume_key(self, passphrase: Secret, slot: int) -> Secret:
        """Requests the volume key from a keyslot, and waits for it. Raises NotOurs, DiskFailed."""
        self._ask(f"volume-key {slot}", passphrase)
        end = now() + ANSWER_TIMEOUT
        poll = select.poll()
        poll.register(self._answers, select.POLLIN)
        while poll.poll(max(0.0, end - now()) * 1000):
            if answer := self.read():
                try:
                    return Secret(answer.data)
                finally:
                    answer.data[:] = bytes(len(answer.data))
        raise DiskFailed(f"{self.disk.node} does not answer for {ANSWER_TIMEOUT:.0f} s", code="timed-out")

    def end(self) -> None:
        """Kills the worker without waiting for it, as its device may never answer. May be repeated."""
        self._close()
        if self.pid:
            os.kill(self.pid, signal.SIGKILL)
            os.waitpid(self.pid, os.WNOHANG)
            self.pid = 0

    def _close(self) -> None:
        for fd in (self._requests, self._answers):
            if fd >= 0:
                os.close(fd)
        self._requests = self._answers = -1

    def _ask(self, head: str, secret: Secret) -> None:
        try:
            _send(self._requests, head, secret.value)
        except OSError:
            raise Ended("the worker has ended") from None


class WorkerHeader(Header):
    """The header that a worker has sent; its context stays in the worker."""

    def __init__(self, worker: Worker, answer: Answer) -> None:
        super().__init__(worker.disk.node, answer.argument, bytes(answer.data))
        self.worker = worker

    def volume_key(self, passphrase: Secret, slot: int = ANY) -> Secret:
        return self.worker.volume_key(passphrase, slot)


# In the worker


def _serve(node: str, requests: int, answers: int) -> None:
    """The worker's whole life; never returns."""
    try:
        _isolate(requests, answers)
        luks.only_read()
        with luks.Container(node) as container:
            _send(answers, f"header {container.uuid}", container.dump()[:_ANSWER_MAX])
            while (request := _receive(requests)) and (going_on := _carry_out(container, *request, answers)):
                pass
        if request and not going_on:
            _send(answers, "done")  # now that no key is left here: the agent kills the worker
    except UnlockError as error:
        _send(answers, *_encode_error(error))
    except BaseException as error:
        _send(answers, *_encode_error(UnlockError(type(error).__name__)))
    finally:
        os._exit(0)


def _isolate(requests: int, answers: int) -> None:
    """Drops what the worker inherits from the agent: keys, descriptors (the TPM, udev, other workers), and the wakeup
    descriptor for signals, whose number may soon be a disk's."""
    end_with_parent()
    if os.getppid() == 1:
        os._exit(1)
    wipe_all()
    signal.set_wakeup_fd(-1)
    low, high = sorted((requests, answers))
    os.closerange(3, low)
    os.closerange(low + 1, high)
    os.closerange(high + 1, os.sysconf("SC_OPEN_MAX"))


def _carry_out(container: luks.Container, head: str, secret: Secret, answers: int) -> bool:
    """Carries out a request, and answers unless it was the last one: False."""
    word, _, rest = head.partition(" ")
    with secret:
        if word == "activate":
            container.activate(rest, secret)
            return False
        if word == "activate-half":
            _activate_half(container, *rest.split(" "), passphrase=secret)
            return False
        try:
            with container.volume_key(secret, int(rest)) as key:
                _send(answers, "key", key.value)
        except UnlockError as error:
            _send(answers, *_encode_error(error))
    return True


def _activate_half(container: luks.Container, name: str, *fields: str, passphrase: Secret) -> None:
    """Raises Tampered, NotOurs, DiskFailed."""
    from ..disks import reencrypt, reencrypt_plan

    old, old_facts, new, new_facts, *numbers = fields
    plan = reencrypt_plan.Plan(int(old), old_facts, int(new), new_facts, *map(int, numbers))
    expected = reencrypt_plan.plan_facts(container, plan)
    reencrypt.activate(container.device, name, plan, passphrase, expected)


# Messages: two sizes of 4 bytes each, a word with its argument, and data


def _send(fd: int, head: str, data: bytes | bytearray = b"") -> None:
    text = head.encode()
    for part in (len(text).to_bytes(4, "big") + len(data).to_bytes(4, "big") + text, data):
        left = memoryview(part)
        while left:
            left = left[os.write(fd, left) :]


def _receive(fd: int) -> tuple[str, Secret] | None:
    """The next request and its secret; None when the agent has closed the pipe."""
    sizes = bytearray(8)
    if not _fill(fd, sizes):
        return None
    head = bytearray(int.from_bytes(sizes[:4], "big"))
    secret = Secret(bytes(int.from_bytes(sizes[4:], "big")))
    if _fill(fd, head) and _fill(fd, secret.value):
        return head.decode(), secret
    secret.wipe()
    return None


def _fill(fd: int, data: bytearray) -> bool:
    """Reads until `data` is full. False when the pipe ends before."""
    with memoryview(data) as left:
        at = 0
        while at < len(data):
            count = os.readv(fd, [left[at:]])
            if not count:
                return False
            at += count
    return True


def _encode_error(error: UnlockError) -> tuple[str, bytes]:
    return f"error {type(error).__name__} {error.code}", f"{error}\0{error.hint}".encode()[:4000]


def _decode_error(kind: str, data: bytearray) -> UnlockError:
    name, _, code = kind.partition(" ")
    message, _, hint = data.decode("utf-8", "replace").partition("\0")
    found = getattr(errors, name, UnlockError)
    return found(message, hint, code) if issubclass(found, UnlockError) else UnlockError(message, hint, code)
