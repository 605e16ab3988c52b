# SPDX-License-Identifier: Apache-2.0
"""Disks appear; groups open when all their members are there and proven. Nothing half-open is left behind.

    saw(disk)   a worker of its own reads the disk's header
    collect()   takes in headers: a token is found, its volume key unwrapped; and activations that are done
    advance()   the workers of groups that are complete get their volume keys, at most one a core at a time
    stop()      no new activation, running ones joined or killed

A worker keeps the context that its header came from, and activates that one: no header is read twice.
"""

import os
import select

from ..disks import forget, luks, token
from ..disks.header import Header
from ..disks.udev import Disk, Monitor
from ..disks.udev import has_settled as settled_now
from ..errors import Malformed, NotOurs, Tampered, UnlockError
from ..host.report import OPEN, OUTCOMES, Report, now
from ..light import Callable, NamedTuple
from ..secret import Secret
from .worker import Ended, Worker, WorkerHeader

ACTIVATION_TIMEOUT = 20.0
"""Seconds for one activation; libcryptsetup waits in it for udev."""
READ_TIMEOUT = 10.0
"""Seconds until a disk has told its header, or a part of it."""


class Candidate(NamedTuple):
    """A disk whose header is authentic, with what opens it."""

    disk: Disk
    header: WorkerHeader
    token: token.Token
    dek: Secret


Unwrap = Callable[[Header, token.Token], Secret]
"""Gives a disk's volume key once header and token are authentic. Raises Tampered and other UnlockErrors."""


class Opening:
    """Opens groups of one host. Without `unwrap` there is no key: disks are only told apart.

    `host` is a host id, or '' when it is not known; `only` limits it to one group; `workers` 0 is one a core.
    """

    def __init__(self, host: str, unwrap: Unwrap | None, report: Report, only: str = "", workers: int = 0) -> None:
        self.host = host
        self.unwrap = unwrap
        self.report = report
        self.only = only
        self.parallel = workers or len(os.sched_getaffinity(0))
        self.seen: dict[str, str] = {}
        """Node -> LUKS UUID of each disk with an outcome."""
        self.reading: dict[int, Worker] = {}
        """By file descriptor: workers whose header is awaited."""
        self.read_timeout = READ_TIMEOUT
        self.candidates: dict[str, list[Candidate]] = {}
        """Group -> authentic disks that are not open; a disk with two tokens is in it twice."""
        self.queue: list[Candidate] = []
        self.activating: dict[int, Candidate] = {}
        """By file descriptor of their workers: disks that have got their keys."""
        self.opened: dict[str, dict[str, str]] = {}
        """Group -> mapping name -> node, of what this process opened."""
        self.wanted: dict[str, set[str]] = {}
        """Group -> nodes that are being opened together."""
        self.open_uuids: dict[str, str] = {}
        self.failed: set[str] = set()
        self.looked = False

    # Disks

    def look(self, monitor: Monitor) -> None:
        """All marked disks that are there; what appears or changes from now on, the monitor tells."""
        for found in monitor.marked_disks():
            self.saw(found)
        self.looked = True

    def saw(self, found: Disk) -> None:
        """One disk, for the first time or again after a change. Nothing about one disk stops the others."""
        if self.report.outcome(found.node) not in ("", "foreign", "damaged", "failed"):
            return
        if any(each.disk.node == found.node for each in self.reading.values()):
            return
        try:
            worker = Worker(found)
        except (UnlockError, OSError) as error:
            self.report.set_disk(found.node, "failed", f"no worker: {error}")
            return
        worker.deadline = now() + self.read_timeout
        self.reading[worker.fileno()] = worker

    def read_all(self) -> None:
        """Looks at every disk that was seen, for a caller without a loop."""
        while self.reading:
            self.collect(wait=1.0)

    def _look(self, worker: Worker) -> None:
        """What the worker says of its disk, or a part of it."""
        node, fd = worker.disk.node, worker.fileno()
        answer = None
        try:
            answer = worker.read()
            if not answer:
                worker.deadline = now() + self.read_timeout
                return
            if self._examine(worker.disk, WorkerHeader(worker, answer)):
                del self.reading[fd]
                return
        except NotOurs as error:
            outcome = "foreign" if error.code == "not-luks2" else error.code
            self.report.set_disk(node, outcome if outcome in OUTCOMES else "failed", str(error))
        except Malformed as error:
            outcome = error.code if answer else "damaged"
            self.report.set_disk(node, outcome, str(error))
        except Tampered as error:
            self.report.set_disk(node, "tampered", str(error))
        except UnlockError as error:
            self.report.set_disk(node, error.code if error.code in OUTCOMES else "failed", str(error))
        except Exception as error:  # whatever a hostile disk makes of us, it is alone
            self.report.set_disk(node, "failed", type(error).__name__)
        del self.reading[fd]
        worker.end()

    def _examine(self, found: Disk, header: WorkerHeader) -> bool:
        """True when the disk is a candidate now, and its worker stays."""
        from ..disks import disk_keys  # loaded when the first workers have been forked: they need none of it

        uuid = header.uuid
        tokens = disk_keys.tokens(header, self.host)
        if self.only and all(each.group != self.only for each in tokens):
            return False
        if not self.unwrap:
            self.report.set_disk(found.node, "no-key", self.report.describe_verdict(), uuid=uuid)
            return False
        if uuid in self.open_uuids:
            self.report.set_disk(found.node, "duplicate", f"{self.open_uuids[uuid]} is open", uuid=uuid)
            return False
        proven: list[Candidate] = []
        trouble: UnlockError | None = None
        for each in tokens:
            try:
                proven.append(Candidate(found, header, each, self.unwrap(header, each)))
            except UnlockError as error:
                trouble = error
        if not proven:
            assert trouble
            raise trouble
        first = proven[0].token  # authentic, unlike one that did not unwrap
        self.report.set_disk(
            found.node,
            "already-open" if luks.active_uuid(first.name) == uuid else "waiting",
            uuid=uuid,
            name=first.name,
            group=first.group,
            seen=found.initialized or None,
        )
        for candidate in proven:
            self.candidates.setdefault(candidate.token.group, []).append(candidate)
        return True

    def gone(self, node: str) -> None:
        """A disk was unplugged: what waits for its group waits without it."""
        for fd, worker in list(self.reading.items()):
            if worker.disk.node == node:
                self.reading.pop(fd).end()
        for group, candidates in self.candidates.items():
            self.candidates[group] = [each for each in candidates if each.disk.node != node]
            for each in candidates:
                if each.disk.node == node and each.header.worker.fileno() not in self.activating:
                    each.header.worker.end()
        if self.report.outcome(node) not in OPEN:
            self.report.disks.pop(node, None)

    # Groups

    def advance(self, settled: bool) -> None:
        """Starts what can start. `settled`: udev knows of no disk that it has not shown yet."""
        settled = settled and not self.reading
        for group in list(self.candidates):
            if group not in self.wanted:
                try:
                    self._consider(group, settled)
                except (UnlockError, OSError) as error:
                    self.report.add_event("trouble", f"group {group}: {error}")
        while self.queue and len(self.activating) < self.parallel:
            self._start(self.queue.pop(0))

    def _consider(self, group: str, settled: bool) -> None:
        if chosen := self._complete(group, settled):
            self._open(group, chosen)

    def _complete(self, group: str, settled: bool) -> list[Candidate]:
        """One disk for each member, under the newest member list of which all are there; else none."""
        by_manifest: dict[int, list[Candidate]] = {}
        for candidate in self.candidates[group]:
            by_manifest.setdefault(candidate.token.manifest, []).append(candidate)
        for manifest in sorted(by_manifest, reverse=True):
            chosen = self._members(by_manifest[manifest], settled)
            if chosen and len(chosen) == chosen[0].token.members:
                return chosen
        return []

    def _members(self, candidates: list[Candidate], settled: bool) -> list[Candidate]:
        """One disk a UUID. A disk without the serial that its token names counts only when udev has settled,
        so that the right one, if it is there, is seen first."""
        by_uuid: dict[str, list[Candidate]] = {}
        for candidate in {each.disk.node: each for each in candidates}.values():
            by_uuid.setdefault(candidate.header.uuid, []).append(candidate)
        chosen = []
        for same in by_uuid.values():
            named = [each for each in same if each.token.serial and each.token.serial == each.disk.serial]
            if len(named) == 1:
                chosen += named
                losers = [each for each in same if each is not named[0]]
            elif len(same) == 1:
                chosen += same if settled else []
                losers = []
            else:
                losers = same
            for loser in losers:
                if settled and self.report.outcome(loser.disk.node) != "duplicate":
                    self.report.set_disk(loser.disk.node, "duplicate", f"UUID {loser.header.uuid}")
        return chosen

    def _open(self, group: str, chosen: list[Candidate]) -> None:
        names = [each.token.name for each in chosen]
        active = {each.token.name: luks.active_uuid(each.token.name) for each in chosen}
        self.opened.setdefault(group, {})
        self.wanted[group] = {each.disk.node for each in chosen}
        blocked = [each for each in chosen if active[each.token.name] not in (None, each.header.uuid)]
        if blocked or len(set(names)) != len(names):
            for each in blocked or chosen:
                self.report.set_disk(each.disk.node, "name-taken", f"/dev/mapper/{each.token.name}")
            self._fail(group)
            return
        self.queue += [each for each in chosen if active[each.token.name] is None]
        for each in chosen:
            self.open_uuids[each.header.uuid] = each.disk.node
        for each in self.candidates[group]:
            if each.disk.node not in self.wanted[group] and each.header.uuid in self.open_uuids:
                self.report.set_disk(each.disk.node, "duplicate", f"{self.open_uuids[each.header.uuid]} is opened")
        self._finish(group)

    def _finish(self, group: str) -> None:
        """When all members are through: the group is open, or what was opened is closed again."""
        nodes = self.wanted[group]
        if any(each.disk.node in nodes for each in self.queue):
            return
        if any(each.disk.node in nodes for each in self.activating.values()):
            return
        if all(self.report.outcome(node) in OPEN for node in nodes):
            mappings = tuple(sorted(self.report.disks[node].name for node in nodes))
            self.report.set_group(group, "open", members=len(nodes), mappings=mappings)
        else:
            self._fail(group)

    def _fail(self, group: str) -> None:
        self.failed.add(group)
        self.open_uuids = {uuid: node for uuid, node in self.open_uuids.items() if node not in self.wanted[group]}
        self.close_group(group)
        self.report.set_group(group, "failed", members=len(self.wanted[group]))

    def close_group(self, group: str) -> None:
        """Closes what this process opened of a group; nothing of it is mounted."""
        opened = self.opened.get(group, {})
        for name in opened:
            forget.forget(name)
        for name, node in list(opened.items()):
            try:
                luks.deactivate(name)
                self.report.set_disk(node, "closed-again")
                del opened[name]
            except UnlockError as error:
                self.report.set_disk(node, "failed", f"cannot be closed: {error}")

    def close_all(self) -> bool:
        """Closes everything that this process opened. True when nothing is left open."""
        for group, opened in self.opened.items():
            if opened:
                self.close_group(group)
                self.report.set_group(group, "failed")
        return not any(self.opened.values())

    # Workers

    def _start(self, candidate: Candidate) -> None:
        worker = candidate.header.worker
        try:
            worker.activate(candidate.token.name, candidate.dek)
        except Ended as error:
            self._result(candidate, str(error))
            return
        worker.deadline = now() + ACTIVATION_TIMEOUT
        self.activating[worker.fileno()] = candidate

    def pipes(self) -> list[int]:
        """File descriptors that become readable when a disk has answered or is activated."""
        return [*self.reading, *self.activating]

    def collect(self, wait: float = 0) -> None:
        """Takes in what workers say, and ends those past their deadline; waits up to `wait` seconds for one."""
        poll = select.poll()
        for fd in self.pipes():
            poll.register(fd, select.POLLIN | select.POLLHUP)
        for fd, _ in poll.poll(wait * 1000) if self.pipes() else []:
            if fd in self.reading:
                self._look(self.reading[fd])
            else:
                self._activated(fd)
        for fd, worker in list(self.reading.items()):
            if now() > worker.deadline:
                self.reading.pop(fd).end()
                self.report.set_disk(worker.disk.node, "timed-out", f"does not answer for {self.read_timeout:.0f} s")
        for fd, candidate in list(self.activating.items()):
            if now() > candidate.header.worker.deadline:
                self._kill(fd)

    def _activated(self, fd: int) -> None:
        candidate = self.activating[fd]
        trouble = ""
        try:
            if not candidate.header.worker.read():
                return
        except UnlockError as error:
            trouble = str(error)
        del self.activating[fd]
        candidate.header.worker.end()
        self._result(candidate, trouble)

    def _result(self, candidate: Candidate, trouble: str) -> None:
        group, node = candidate.token.group, candidate.disk.node
        if trouble:
            self.report.set_disk(node, "failed", trouble)
        else:
            self.opened[group][candidate.token.name] = node
            self.report.set_disk(node, "opened", opened=round(now(), 4))
        self._finish(group)

    def _kill(self, fd: int) -> None:
        """Ends an activation that hangs: the process, its udev cookie, its mapping."""
        candidate = self.activating.pop(fd)
        candidate.header.worker.end()
        luks.abandon(candidate.token.name)
        self.report.set_disk(candidate.disk.node, "timed-out", f"after {ACTIVATION_TIMEOUT:.0f} s")
        self._finish(candidate.token.group)

    def busy(self) -> bool:
        return bool(self.queue or self.activating or self.reading)

    def stop(self, patience: float) -> None:
        """No new activation; running ones get `patience` seconds. What did not open is closed again."""
        for worker in self.reading.values():
            worker.end()
            self.report.set_disk(worker.disk.node, "timed-out", "early boot ended before it answered")
        self.reading.clear()
        for each in self.queue:
            self.report.set_disk(each.disk.node, "timed-out", "early boot ended before it was opened")
        self.queue.clear()
        end = now() + patience
        while self.activating and now() < end:
            self.collect(wait=0.1)
        for fd in list(self.activating):
            self._kill(fd)
        for group in self.wanted:
            if not self.report.group_outcome(group):
                self._finish(group)
        for group in self.candidates:
            if group not in self.wanted:
                present, members = self._counts(group)
                self.report.set_group(group, "incomplete", present=present, members=members)

    def _counts(self, group: str) -> tuple[int, int]:
        present = {each.header.uuid for each in self.candidates[group]}
        members = max((each.token.members for each in self.candidates[group]), default=0)
        return len(present), members

    def ready(self, group: str) -> bool:
        """All members of the group are there and proven, and no other disk passes for one of them."""
        return group in self.candidates and bool(self._complete(group, settled=True))

    def tokens(self) -> list[token.Token]:
        """The authenticated tokens of the disks that this process opened."""
        names = {name for opened in self.opened.values() for name in opened}
        return [each.token for group in self.candidates.values() for each in group if each.token.name in names]

    def wipe(self) -> None:
        """Forgets the keys of all disks, and ends what waits for them."""
        for candidates in self.candidates.values():
            for each in candidates:
                each.dek.wipe()
                each.header.worker.end()


def turn(groups: Opening, monitor: Monitor, look: bool) -> bool:
    """One turn of the loop that both early boot and the gates run: what udev says, what can open, what has opened.

    `look` reads every disk again. True when there is nothing left to do for the disks that are there.
    """
    settled = settled_now()
    if look:
        groups.look(monitor)
    for action, found in monitor.read_events():
        if action == "remove":
            groups.gone(found.node)
        else:
            groups.saw(found)
    groups.collect()
    groups.advance(settled)
    return settled and not groups.busy()


def open_present(groups: Opening, monitor: Monitor) -> None:
    """Opens what can be opened of the disks that are here now; waits for no other. Their keys are forgotten then.

    Each disk has its own deadline, so many of them take as long as they take; udev is not waited for without end.
    """
    done = turn(groups, monitor, look=True)
    end = now() + ACTIVATION_TIMEOUT
    while not done and now() < end:
        wait([monitor.fileno(), *groups.pipes()], 0.05)
        done = turn(groups, monitor, look=False)
        if groups.busy():
            end = now() + ACTIVATION_TIMEOUT
    groups.stop(ACTIVATION_TIMEOUT)
    groups.wipe()


def wait(fds: list[int], seconds: float) -> None:
    """Until one of `fds` is readable, or `seconds` have passed."""
    poll = select.poll()
    for fd in fds:
        poll.register(fd, select.POLLIN)
    poll.poll(max(0.0, seconds) * 1000)
