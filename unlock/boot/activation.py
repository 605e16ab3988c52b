# SPDX-License-Identifier: Apache-2.0
"""Opens groups: authenticates disks as they appear, activates those of a group when all of them are here.

    add_disk(disk)             a worker of its own reads the disk's header
    take_answers()             takes in headers, finds the token, unwraps the volume key; takes in activations
    start_complete_groups()    gives the workers of complete groups their volume keys, at most one a core at a time
    start_degraded(name)       the same for the members of a group that are here; then looks whether they suffice
    stop()                     starts no more activations, waits for running ones or kills them, closes failed groups

Early boot, the recovery prompt and the gates of the real root use it, each with its own way to unwrap volume keys. A
worker keeps the libcryptsetup context that its header came from and activates with it: no header is read twice.
"""

import os
import select

from ..disks import forget, luks
from ..disks.groups import Member
from ..disks.header import Header
from ..disks.token import Token
from ..disks.udev import Disk, Monitor, has_settled
from ..errors import Malformed, NotOurs, Tampered, UnlockError
from ..host.report import OPEN, OUTCOMES, Report, now
from ..light import Callable, Sequence
from ..secret import Secret
from . import degraded
from .candidates import Candidate, choose_members, choose_present
from .worker import Ended, Worker, WorkerHeader

ACTIVATION_TIMEOUT = 20.0
"""Seconds for one activation, in which libcryptsetup waits for udev."""
READ_TIMEOUT = 10.0
"""Seconds until a worker has sent a disk's header, or the next part of it."""

_TOKEN_GONE = frozenset(("foreign", "other-host", "damaged", "malformed", "newer-format"))
"""Outcomes that a member's header does not have as this host wrote it."""

Unwrap = Callable[[Header, Token], Secret]
"""Returns a disk's volume key once header and token are authentic. Raises Tampered and other UnlockErrors."""


class _Group:
    """A group of which at least one disk is authentic."""

    def __init__(self, name: str) -> None:
        self.name = name
        self.candidates: list[Candidate] = []
        """Its authentic disks; a disk with two tokens is in it twice."""
        self.nodes: set[str] = set()
        """Nodes of the members that are opened together; empty until all are here."""
        self.opened: dict[str, str] = {}
        """Mapping name -> node, of what this process opened and has not closed."""
        self.failed = False
        self.degraded = False
        """It is opened without all of its members."""
        self.why_not = ""
        """Why those that were here did not suffice, in words."""


class GroupOpener:
    """Opens the groups of one host. Without `unwrap` there is no key, and disks are only identified.

    `host` is a host id, or '' for any host; `only` limits it to one group; `workers` 0 is one activation a core.
    `members`: disks that have a token of this host, where the caller knows them: one without is `altered`.
    `manifest`: the generation of the member list, where the caller knows it: an older token is `stale`. `left_out`:
    LUKS UUIDs of disks that are not opened with the others; `forgotten`: of those that are never opened again.
    """

    def __init__(
        self,
        host: str,
        unwrap: Unwrap | None,
        report: Report,
        *,
        only: str = "",
        workers: int = 0,
        members: Sequence[Member] = (),
        manifest: int = 0,
        left_out: frozenset[str] = frozenset(),
        forgotten: frozenset[str] = frozenset(),
    ) -> None:
        self.host = host
        self.unwrap = unwrap
        self.report = report
        self.only = only
        self._members = members
        self._manifest, self._left_out, self._forgotten = manifest, left_out, forgotten
        self.workers = workers or len(os.sched_getaffinity(0))
        self.read_timeout = READ_TIMEOUT
        self.has_listed_disks = False
        """Whether `add_present_disks` was done at least once."""
        self.groups: dict[str, _Group] = {}
        """By name, in the order in which their first disks were authenticated."""
        self.begun: list[_Group] = []
        """Those whose members were all here, in the order in which that happened."""
        self.reading: dict[int, Worker] = {}
        """By file descriptor: workers whose header has not arrived."""
        self.queue: list[Candidate] = []
        """Disks that wait for a free worker slot to be activated."""
        self.activating: dict[int, Candidate] = {}
        """By file descriptor of their workers: disks whose workers have got the volume key."""
        self._node_of_uuid: dict[str, str] = {}
        """LUKS UUID -> node, of disks that are open or being opened."""

    # Disks

    def add_present_disks(self, monitor: Monitor) -> None:
        """Adds every tagged disk that is here; `monitor` reports those that appear or change from now on."""
        for disk in monitor.marked_disks():
            self.add_disk(disk)
        self.has_listed_disks = True

    def add_disk(self, disk: Disk) -> None:
        """Starts to read a disk that appeared or changed. An error with one disk does not stop the others."""
        if self.report.outcome(disk.node) not in ("", "foreign", "damaged", "failed", "altered"):
            return
        if any(each.disk.node == disk.node for each in self.reading.values()):
            return
        try:
            worker = Worker(disk)
        except (UnlockError, OSError) as error:
            self.report.set_disk(disk.node, "failed", f"no worker: {error}")
            return
        worker.deadline = now() + self.read_timeout
        self.reading[worker.fileno()] = worker

    def read_headers(self) -> None:
        """Waits until every disk that was added has an outcome, for a caller without a loop."""
        while self.reading:
            self.take_answers(wait=1.0)

    def remove_disk(self, node: str) -> None:
        """A disk was unplugged: it is not a candidate any more."""
        for fd, worker in list(self.reading.items()):
            if worker.disk.node == node:
                self.reading.pop(fd).end()
        for group in self.groups.values():
            removed = [each for each in group.candidates if each.disk.node == node]
            group.candidates = [each for each in group.candidates if each.disk.node != node]
            for each in removed:
                if each.header.worker.fileno() not in self.activating:
                    each.header.worker.end()
        if self.report.outcome(node) not in OPEN:
            self.report.disks.pop(node, None)

    def _take_header(self, worker: Worker) -> None:
        """Takes what a worker has sent: its disk's header, a part of it, or an error."""
        node, fd = worker.disk.node, worker.fileno()
        answer = None
        try:
            answer = worker.read()
            if not answer:
                worker.deadline = now() + self.read_timeout
                return
            if self._authenticate(worker.disk, WorkerHeader(worker, answer)):
                del self.reading[fd]
                return
        except NotOurs as error:
            outcome = "foreign" if error.code == "not-luks2" else error.code
            self.report.set_disk(node, outcome if outcome in OUTCOMES else "failed", str(error))
        except Malformed as error:
            outcome = error.code if answer else "damaged"
            self.report.set_disk(node, outcome, str(error))
        except Tampered as error:
            self.report.set_disk(node, "tampered", str(error), uuid=answer.argument if answer else "")
        except UnlockError as error:
            self.report.set_disk(node, error.code if error.code in OUTCOMES else "failed", str(error))
        except Exception as error:  # an unforeseen header must not stop the other disks
            self.report.set_disk(node, "failed", type(error).__name__)
        del self.reading[fd]
        worker.end()
        self._recognise(worker.disk, answer.argument if answer else "")

    def _recognise(self, disk: Disk, uuid: str) -> None:
        """Makes it `altered` if it is a member, by LUKS UUID or serial number, and has no token of this host."""
        row = self.report.disks.get(disk.node)
        for each in self._members if row and row.outcome in _TOKEN_GONE else ():
            if each.uuid == uuid or (each.serial and each.serial == disk.serial):
                assert row
                words = f"its header is not the one that this host wrote: {row.describe()}"
                self.report.set_disk(disk.node, "altered", words, uuid=each.uuid, name=each.name)
                return

    def _authenticate(self, disk: Disk, header: WorkerHeader) -> bool:
        """Unwraps the volume key by each token. True when the disk is a candidate now, and its worker stays."""
        from ..disks import disk_keys  # not before the first workers are forked, which do not need it

        uuid = header.uuid
        tokens = disk_keys.read_tokens(header, self.host)
        if self.only and all(each.group != self.only for each in tokens):
            return False
        if uuid in self._forgotten:
            self.report.set_disk(disk.node, "forgotten", uuid=uuid)
            return False
        if not self.unwrap:
            self.report.set_disk(disk.node, "no-key", self.report.describe_verdict(), uuid=uuid)
            return False
        if uuid in self._node_of_uuid:
            self.report.set_disk(disk.node, "duplicate", f"{self._node_of_uuid[uuid]} is open", uuid=uuid)
            return False
        authentic: list[Candidate] = []
        trouble: UnlockError | None = None
        for each in tokens:
            try:
                authentic.append(Candidate(disk, header, each, self.unwrap(header, each)))
            except UnlockError as error:  # of a half re-encrypted disk, the token before does not fit the header
                trouble = trouble if isinstance(trouble, Tampered) else error
        if not authentic:
            assert trouble
            raise trouble
        authentic = [each for each in authentic if each.token.manifest >= self._manifest]
        if not authentic:
            words = f"its member list has generation {tokens[0].manifest}, and that of the group {self._manifest}"
            raise UnlockError(words, code="stale")
        first = authentic[0].token  # a token that did not unwrap is not authentic
        if uuid in self._left_out:
            self.report.set_disk(disk.node, "was-away", uuid=uuid, name=first.name, group=first.group)
            return False
        self.report.set_disk(
            disk.node,
            "already-open" if luks.active_uuid(first.name) == uuid else "waiting",
            uuid=uuid,
            name=first.name,
            group=first.group,
            seen=disk.initialized or None,
        )
        for candidate in authentic:
            name = candidate.token.group
            self.groups.setdefault(name, _Group(name)).candidates.append(candidate)
        return True

    # Groups

    def start_complete_groups(self, settled: bool) -> None:
        """Begins to open each group whose members are all here. `settled`: udev has processed every event."""
        settled = settled and not self.reading
        for group in self.groups.values():
            if not group.nodes:
                try:
                    if members := self._complete_members(group, settled):
                        self._begin(group, members)
                except (UnlockError, OSError) as error:
                    self.report.add_event("trouble", f"group {group.name}: {error}")
        while self.queue and len(self.activating) < self.workers:
            self._activate(self.queue.pop(0))

    def _complete_members(self, group: _Group, settled: bool) -> list[Candidate]:
        """The members of a group, if all are here; reports duplicates once udev has settled."""
        members, duplicates = choose_members(group.candidates, settled)
        for each in duplicates:
            if settled and self.report.outcome(each.disk.node) != "duplicate":
                self.report.set_disk(each.disk.node, "duplicate", f"UUID {each.header.uuid}")
        return members

    def start_degraded(self, name: str, settled: bool) -> bool:
        """Begins to open a group with its members that are here. False where none is, or it has begun."""
        group = self.groups.get(name)
        if not group or group.nodes or self.reading:
            return False
        members = choose_present(group.candidates, settled).members
        if members:
            group.degraded = True
            self._begin(group, members)
        return bool(members)

    def present_uuids(self, name: str) -> set[str]:
        """LUKS UUIDs of the members that `start_degraded` would open."""
        candidates = self.groups[name].candidates if name in self.groups else []
        return {each.header.uuid for each in choose_present(candidates, settled=True).members}

    def may_open_degraded(self, name: str) -> bool:
        """Whether each member that is here says so, authenticated by its token."""
        group = self.groups[name]
        members = choose_present(group.candidates, settled=True).members
        return not group.nodes and bool(members) and all(each.token.degraded for each in members)

    def _begin(self, group: _Group, members: list[Candidate]) -> None:
        """Queues the members for activation, unless a mapping of another disk has the name of one."""
        names = [each.token.name for each in members]
        active = {each.token.name: luks.active_uuid(each.token.name) for each in members}
        group.nodes = {each.disk.node for each in members}
        self.begun.append(group)
        blocked = [each for each in members if active[each.token.name] not in (None, each.header.uuid)]
        if blocked or len(set(names)) != len(names):
            for each in blocked or members:
                self.report.set_disk(each.disk.node, "name-taken", f"/dev/mapper/{each.token.name}")
            self._fail(group)
            return
        self.queue += [each for each in members if active[each.token.name] is None]
        for each in members:
            self._node_of_uuid[each.header.uuid] = each.disk.node
        for each in group.candidates:
            node = self._node_of_uuid.get(each.header.uuid)
            if each.disk.node not in group.nodes and node:
                self.report.set_disk(each.disk.node, "duplicate", f"{node} is opened")
        self._finish(group)

    def _finish(self, group: _Group) -> None:
        """Once no activation of the group is left: reports it open, or closes what was opened of it."""
        if any(each.disk.node in group.nodes for each in self.queue):
            return
        if any(each.disk.node in group.nodes for each in self.activating.values()):
            return
        if not all(self.report.outcome(node) in OPEN for node in group.nodes):
            self._fail(group)
            return
        tokens = [each.token for each in group.candidates if each.disk.node in group.nodes]
        if all(each.degraded for each in tokens):
            self._leave_out_lagging(group)
            group.why_not = degraded.find_written_apart(self.report.disks[node].name for node in group.nodes)
            if group.why_not:
                self.report.add_event("trouble", f"group {group.name}: {group.why_not}")
                self._fail(group)
                return
        mappings = tuple(sorted(self.report.disks[node].name for node in group.nodes))
        if not group.degraded:
            self.report.set_group(group.name, "open", members=len(group.nodes), mappings=mappings)
            return
        found = degraded.judge(mappings)
        if found.why_not:
            group.why_not = found.why_not
            self._fail(group)
            return
        self.report.set_group(
            group.name,
            "degraded",
            present=len(mappings),
            members=max(each.members for each in tokens),
            mappings=mappings,
            kind=found.kind,
            generation=found.generation,
        )

    def _leave_out_lagging(self, group: _Group) -> None:
        """Early boot does not know who was away while the group was written. So a btrfs that may have been mounted
        without one of its devices is opened without those that lack what the others have."""
        names = {self.report.disks[node].name: node for node in group.nodes}
        for name in degraded.find_lagging(names):
            if name in group.opened:
                self._close_mapping(group, name, "was-away")
                group.nodes.discard(names[name])
                group.degraded = True

    def _fail(self, group: _Group) -> None:
        group.failed = True
        self._node_of_uuid = {uuid: node for uuid, node in self._node_of_uuid.items() if node not in group.nodes}
        self._close(group)
        self.report.set_group(group.name, "failed", members=len(group.nodes))

    def _close(self, group: _Group) -> None:
        """Closes what this process opened of a group; none of it is mounted."""
        for name in group.opened:
            forget.forget_file_system(name)
        for name in list(group.opened):
            self._close_mapping(group, name, "closed-again")

    def _close_mapping(self, group: _Group, name: str, outcome: str) -> None:
        node = group.opened[name]
        forget.forget_file_system(name)
        try:
            luks.deactivate(name)
            self.report.set_disk(node, outcome)
            del group.opened[name]
        except UnlockError as error:
            self.report.set_disk(node, "failed", f"cannot be closed: {error}")

    def close_all(self) -> bool:
        """Closes everything that this process opened. False when something stays open."""
        for group in self.begun:
            if group.opened:
                self._close(group)
                self.report.set_group(group.name, "failed")
        return not any(group.opened for group in self.begun)

    # Activations

    def _activate(self, candidate: Candidate) -> None:
        from ..disks import disk_keys

        worker, token = candidate.header.worker, candidate.token
        try:
            if token.reencryption and disk_keys.is_moving(candidate.header, token):
                worker.activate_half(token.name, token.reencryption.plan, candidate.dek)
            else:
                worker.activate(token.name, candidate.dek)
        except Ended as error:
            self._end_activation(candidate, str(error))
            return
        worker.deadline = now() + ACTIVATION_TIMEOUT
        self.activating[worker.fileno()] = candidate

    def _take_activation(self, fd: int) -> None:
        """Takes what the worker of an activation has sent: a part, `done`, or an error."""
        candidate = self.activating[fd]
        trouble = ""
        try:
            if not candidate.header.worker.read():
                return
        except UnlockError as error:
            trouble = str(error)
        del self.activating[fd]
        candidate.header.worker.end()
        self._end_activation(candidate, trouble)

    def _end_activation(self, candidate: Candidate, trouble: str) -> None:
        """Records the outcome. `trouble` is '' when the disk is open."""
        group, node = self.groups[candidate.token.group], candidate.disk.node
        if trouble:
            self.report.set_disk(node, "failed", trouble)
        else:
            group.opened[candidate.token.name] = node
            self.report.set_disk(node, "opened", opened=round(now(), 4))
        self._finish(group)

    def _kill_activation(self, fd: int) -> None:
        """Ends an activation that hangs: the process, its udev cookie, its mapping."""
        candidate = self.activating.pop(fd)
        candidate.header.worker.end()
        luks.abandon(candidate.token.name)
        self.report.set_disk(candidate.disk.node, "timed-out", f"after {ACTIVATION_TIMEOUT:.0f} s")
        self._finish(self.groups[candidate.token.group])

    # The caller's loop

    def worker_fds(self) -> list[int]:
        """File descriptors that become readable when a worker has sent something."""
        return [*self.reading, *self.activating]

    def take_answers(self, wait: float = 0) -> None:
        """Takes what workers have sent, and ends those past their deadline; waits up to `wait` seconds for one."""
        poll = select.poll()
        for fd in self.worker_fds():
            poll.register(fd, select.POLLIN | select.POLLHUP)
        for fd, _ in poll.poll(wait * 1000) if self.worker_fds() else []:
            if fd in self.reading:
                self._take_header(self.reading[fd])
            else:
                self._take_activation(fd)
        for fd, worker in list(self.reading.items()):
            if now() > worker.deadline:
                self.reading.pop(fd).end()
                self.report.set_disk(worker.disk.node, "timed-out", f"does not answer for {self.read_timeout:.0f} s")
        for fd, candidate in list(self.activating.items()):
            if now() > candidate.header.worker.deadline:
                self._kill_activation(fd)

    def is_busy(self) -> bool:
        """Whether a worker reads or activates a disk, or a disk waits for that."""
        return bool(self.queue or self.activating or self.reading)

    def stop(self, patience: float) -> None:
        """Starts no more activations; running ones get `patience` seconds. Closes the groups that did not open."""
        for worker in self.reading.values():
            worker.end()
            if not self.report.outcome(worker.disk.node):  # else it was looked at again, as udev reported a change
                self.report.set_disk(worker.disk.node, "timed-out", "early boot ended before it answered")
        self.reading.clear()
        for each in self.queue:
            self.report.set_disk(each.disk.node, "timed-out", "early boot ended before it was opened")
        self.queue.clear()
        end = now() + patience
        while self.activating and now() < end:
            self.take_answers(wait=0.1)
        for fd in list(self.activating):
            self._kill_activation(fd)
        for group in self.begun:
            if not self.report.group_outcome(group.name):
                self._finish(group)
        for group in self.groups.values():
            if not group.nodes:
                present = len({each.header.uuid for each in group.candidates})
                members = max((each.token.members for each in group.candidates), default=0)
                self.report.set_group(group.name, "incomplete", present=present, members=members)

    # What the caller asks for

    @property
    def expected_uuids(self) -> set[str]:
        """LUKS UUIDs of the members that are opened together when they are here."""
        return {each.uuid for each in self._members} - self._left_out

    def is_opening(self, name: str) -> bool:
        """Whether the group has begun to open, and is neither open nor failed yet."""
        return name in self.groups and bool(self.groups[name].nodes) and not self.report.group_outcome(name)

    def why_not_enough(self, name: str) -> str:
        """Why the members that were here did not suffice, in words; ''."""
        return self.groups[name].why_not if name in self.groups else ""

    def has_failed(self, name: str) -> bool:
        """Whether the group's members were all here, and it did not open."""
        return name in self.groups and self.groups[name].failed

    def is_complete(self, name: str) -> bool:
        """Whether all members of the group are here and authentic, and no other disk passes for one of them."""
        return name in self.groups and bool(self._complete_members(self.groups[name], settled=True))

    def opened_mappings(self) -> set[str]:
        """Names of the mappings that this process opened and has not closed."""
        return {name for group in self.begun for name in group.opened}

    def opened_tokens(self) -> list[Token]:
        """The authentic tokens of the disks that this process opened."""
        names = self.opened_mappings()
        tokens = [each.token for group in self.groups.values() for each in group.candidates]
        return [each for each in tokens if each.name in names]

    def wipe(self) -> None:
        """Wipes the volume keys of all disks, and ends their workers."""
        for group in self.groups.values():
            for each in group.candidates:
                each.dek.wipe()
                each.header.worker.end()


def run_once(opener: GroupOpener, monitor: Monitor, *, list_disks: bool) -> bool:
    """One pass of the loop of early boot and the gates: takes udev's events, starts what is complete, takes answers.

    `list_disks` adds every disk that is here again. True when nothing is left to do for the disks that are here.
    """
    settled = has_settled()
    if list_disks:
        opener.add_present_disks(monitor)
    for action, disk in monitor.read_events():
        if action == "remove":
            opener.remove_disk(disk.node)
        else:
            opener.add_disk(disk)
    opener.take_answers()
    opener.start_complete_groups(settled)
    return settled and not opener.is_busy()


def open_present(opener: GroupOpener, monitor: Monitor, degraded: Sequence[str] = ()) -> None:
    """Opens what can be opened of the disks that are here now, without waiting for others. Wipes the volume keys.
    `degraded`: groups that are opened without all of their members.

    Each disk has a deadline of its own, so many disks may take long together; the wait for udev is bounded.
    """
    done = run_once(opener, monitor, list_disks=True)
    end = now() + ACTIVATION_TIMEOUT
    while (not done or any(opener.start_degraded(each, settled=True) for each in degraded)) and now() < end:
        wait_readable([monitor.fileno(), *opener.worker_fds()], 0.05)
        done = run_once(opener, monitor, list_disks=False)
        if opener.is_busy():
            end = now() + ACTIVATION_TIMEOUT
    opener.stop(ACTIVATION_TIMEOUT)
    opener.wipe()


def wait_readable(fds: list[int], seconds: float) -> None:
    """Waits until one of `fds` is readable, or `seconds` have passed."""
    poll = select.poll()
    for fd in fds:
        poll.register(fd, select.POLLIN)
    poll.poll(max(0.0, seconds) * 1000)
