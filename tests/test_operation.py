# SPDX-License-Identifier: Apache-2.0
"""The operation under way: shown, paused over a reboot, resumed, cancelled; of every kind of journal entry.

The long operation is one that only tells how far it is, in the place of `rekey` in the table of operations.
"""

import argparse
import json
import os
import pty
import shlex
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import get_args

import pytest

from tests.flowfixture import Host
from tests.killing import Killer, child
from tests.saved import Saved
from unlock import cli, log
from unlock.cli import operation as cli_operation
from unlock.cli import progress as cli_progress
from unlock.disks import disk_keys, luks, token
from unlock.disks.groups import Member
from unlock.disks.place import Place
from unlock.errors import Refused, Stopped, UnlockError
from unlock.host import journal, keyring, progress, resumption, this_boot, units
from unlock.host.journal import (
    DeepRekey,
    DeepRekeyDisk,
    DiskAddition,
    DiskAdoption,
    DiskDecryption,
    DiskEncryption,
    DiskErasure,
    DiskForgetting,
    DiskRelease,
    DiskRemoval,
    DiskReplacement,
    GroupCreation,
    GroupDeletion,
    Init,
    JournalEntry,
    NewPersistenceKey,
    PersistenceChange,
    ProviderSwitch,
    Rebind,
    RecoveryRenewal,
    RecoveryRotation,
    Rekey,
    StoredKeysRemoval,
)
from unlock.host.lock import exclusive, is_held
from unlock.host.state import State
from unlock.keys import rotation
from unlock.operations import operation, rekey, status, under_way
from unlock.operations.check.host import check_operation
from unlock.operations.operation import Handling, Run
from unlock.paths import Paths

pytestmark = pytest.mark.usefixtures("key_cache")

REKEY = Rekey("rekey", "data", generation=2, made=None, theirs=False)
ENTRIES: tuple[JournalEntry, ...] = (
    Init("init", "--backup kdk"),
    GroupCreation("group create", "other", members=(), options="--disk /dev/sdb --mount /srv/other"),
    DiskAdoption("disk adopt", "/dev/disk/by-uuid/1 --group data", manifest=2),
    DiskAddition("disk add", "--group data", Member("1", "data-2", ""), manifest=2, options="/dev/sdb"),
    DiskForgetting("disk forget", "1", options=None, manifest=2, generation=2, made=None),
    DiskRelease("disk release", "/dev/sdb", "data", "", Member("1", "data-1", "")),
    DiskErasure("disk erase", "/dev/sdb", keyless=False),
    GroupDeletion("group delete", "data", options=None, kek="", members=(), keyless=False),
    DiskRemoval("disk remove", "data-1", "data", manifest=2),
    DiskReplacement(
        "disk replace",
        "data-1",
        "data",
        Member("1", "data-1", ""),
        Member("2", "data-2", ""),
        manifests=(2, 3),
        absent=False,
        options="/dev/sdb",
    ),
    DiskEncryption(
        "disk encrypt",
        "/dev/sdb --group other",
        "other",
        kek=("1", "kek"),
        generation=1,
        manifest=1,
        member=Member("1", "other-a", ""),
        recovery="",
        node="/dev/sdb",
        file_system="2",
        size=1 << 30,
        first="",
        moved="",
        written=False,
    ),
    DiskDecryption(
        "disk decrypt",
        "other-a",
        "other",
        kek="1",
        member=Member("1", "other-a", ""),
        keyslots=(0,),
        place=Place("/dev/sdb", "gpt", 1, "ab", start=1 << 20, size=1 << 30, offset=16 << 20, entries=(2, 9)),
        placed=False,
    ),
    REKEY,
    DeepRekey("rekey --deep", "data", (DeepRekeyDisk("1", (0,), ""),), prepared=True, rate=0),
    RecoveryRotation("recovery", "rotate", key="", file="", escrow="", kept=False, written=False),
    RecoveryRenewal("recovery", "new"),
    PersistenceChange("persistence", "enable"),
    StoredKeysRemoval("persistence", "disable --remove-all-stored-keys"),
    ProviderSwitch("provider switch", "kms"),
    Rebind("rebind", "--backup kdk", new="", backup="kdk", before=REKEY),
    NewPersistenceKey("rekey --fresh", "", new="", old="", sealed=False, before=REKEY),
)
"""One of each kind."""
SIZE = 1000


@pytest.fixture
def host(tmp_path: Path) -> Iterator[Host]:
    yield Host(tmp_path, 2)
    keyring.flush()


def journaled(host: Host, entry: JournalEntry) -> State:
    state = host.state
    state.journal = entry
    state.save()
    return host.state


# Every kind


def test_there_is_one_of_each_kind_and_the_table_has_each() -> None:
    kinds = set(get_args(JournalEntry))
    assert {type(each) for each in ENTRIES} == kinds
    assert operation._HANDLINGS.keys() == kinds
    for kind, how in operation._HANDLINGS.items():
        assert how.cancelled and bool(how.go_on) != bool(how.needs), kind
        assert how.go_on or kind not in journal.GOES_ON_BY_ITSELF, "nobody is there to give it anything"


def test_a_deep_rekey_goes_on_by_itself_once_its_disks_are_prepared() -> None:
    entry = next(each for each in ENTRIES if isinstance(each, DeepRekey))
    assert journal.goes_on_by_itself(entry)
    assert not journal.goes_on_by_itself(entry._replace(prepared=False))


@pytest.mark.parametrize("entry", ENTRIES, ids=lambda entry: type(entry).__name__)
def test_status_and_check_name_what_is_under_way_and_what_finishes_it(host: Host, entry: JournalEntry) -> None:
    state = journaled(host, entry)
    words = journal.command(entry)
    typed = cli._parser().parse_args(shlex.split(words.replace("unlock init", "unlock init --pcrs 7"))[1:])
    assert typed.run
    found = status.read_status(host.paths, look=host.look)
    text, fields = status.to_text(found), status.to_json(found)
    assert f"`{words}` is not finished" in text and f"{words}: interrupted" in text
    assert fields["operation"]["command"] == fields["to_finish"] == words
    assert fields["unfinished"] == {"operation": entry.operation, "about": entry.about}
    findings = list(check_operation(host.paths, state, host.look))
    finish = "unlock operation resume" if journal.goes_on_by_itself(entry) else words
    assert findings[0].verdict == "unproven" and (findings[0].do, words in findings[0].detail) == (finish, True)
    shown = operation.show(host.paths, host.look)
    assert shown and shown.under_way.finish == finish
    before = getattr(entry, "before", None)
    if before:
        assert "unlock rekey data" in text and shown.under_way.then == ("unlock rekey data",)
        assert findings[1].do == "unlock rekey data"
    json.dumps(cli_operation._to_json(shown))


def test_nothing_is_under_way(host: Host) -> None:
    found = status.read_status(host.paths, look=host.look)
    assert found.operation is None and "operation" not in status.to_text(found)
    assert not list(check_operation(host.paths, host.state, host.look))
    assert operation.show(host.paths, host.look) is None
    for command in (lambda: operation.pause(host.paths), lambda: operation.cancel(host.paths), lambda: again(host)):
        with pytest.raises(Refused) as caught:
            command()
        assert caught.value.code == "no-operation"
    assert operation.resume_unattended(host.paths, lambda done, total: False) == ([], True)


def again(host: Host) -> list[str]:
    found = operation.resume(host.paths, lambda done, total: False, look=host.look)
    assert found and found.is_finished
    return found.lines


@pytest.mark.parametrize("entry", [each for each in ENTRIES if operation.handling(each).needs], ids=str)
def test_what_needs_a_person_is_named_and_nothing_changes(host: Host, entry: JournalEntry) -> None:
    journaled(host, entry)
    before = Path(host.paths.state).read_bytes()
    with pytest.raises(Refused) as caught:
        again(host)
    assert (caught.value.code, caught.value.hint) == ("by-command", journal.command(entry))
    assert Path(host.paths.state).read_bytes() == before


@pytest.mark.parametrize(
    "entry", [each for each in ENTRIES if operation.handling(each).cancel is None], ids=lambda each: type(each).__name__
)
def test_what_cannot_be_cancelled_says_what_will_be_and_nothing_changes(host: Host, entry: JournalEntry) -> None:
    journaled(host, entry)
    before = Path(host.paths.state).read_bytes()
    finish = "unlock operation resume" if journal.goes_on_by_itself(entry) else journal.command(entry)
    with pytest.raises(Refused) as caught:
        operation.cancel(host.paths, look=host.look)
    assert (caught.value.code, caught.value.hint) == ("not-cancellable", finish)
    assert operation.handling(entry).cancelled in str(caught.value)
    with pytest.raises(Refused) as caught:
        operation.give_up(host.paths, look=host.look)
    assert (caught.value.code, caught.value.hint) == ("not-cancellable", finish)
    assert Path(host.paths.state).read_bytes() == before


def test_a_rotation_that_was_killed_goes_on(host: Host) -> None:
    host.state.begin(REKEY)
    assert again(host) == []
    assert (host.state.journal, host.group.generation) == (None, 2)
    assert host.boot_opens() and host.recovery_opens()


def test_one_that_needs_a_person_after_it_is_named_at_the_end(host: Host, monkeypatch: pytest.MonkeyPatch) -> None:
    renewal = RecoveryRenewal("recovery", "new")
    journaled(host, NewPersistenceKey("rekey --fresh", "", new="", old="", sealed=True, before=renewal))

    def close(run: Run) -> list[str]:
        journaled(host, renewal)
        return ["data-1: it is not here"]

    monkeypatch.setitem(operation._HANDLINGS, NewPersistenceKey, Handling(go_on=close))
    assert again(host) == [
        "data-1: it is not here",
        "`unlock recovery new` needs the recovery key: unlock recovery new",
    ]


def test_a_command_that_holds_the_lock_runs(host: Host) -> None:
    state = journaled(host, REKEY)
    with exclusive(host.paths):
        found = under_way.read(host.paths, state, host.look)
        assert found and (found.state, found.finish) == ("running", "")
        with pytest.raises(Refused) as caught:
            again(host)
        assert caught.value.code == "busy"
    assert not is_held(host.paths)


# Cancel


def keyslots_open(host: Host) -> bool:
    for image in host.disks:
        with luks.Container(str(image)) as container:
            disk_keys.dek_by_recovery_key(container, host.recovery).wipe()
    return True


def tokens(image: Path) -> int:
    with luks.Container(str(image)) as container:
        return len(container.tokens(token.TYPE))


def contents(host: Host) -> list[bytes]:
    return [image.read_bytes() for image in host.disks]


def test_a_rotation_is_taken_back_until_a_disk_has_the_new_key(host: Host) -> None:
    host.state.begin(REKEY)
    before = contents(host)
    assert operation.cancel(host.paths, lambda plan: not plan.steps, host.look) is None
    assert host.state.journal == REKEY and contents(host) == before, "a plan was shown alone"
    assert operation.cancel(host.paths, look=host.look) == []
    assert not host.state.journal and contents(host) == before
    assert host.group.generation == 1
    assert host.boot_opens()
    rekey.rekey(host.paths, "data", host.look)
    assert host.group.generation == 2 and host.boot_opens()


@pytest.mark.parametrize("why", ["a disk has it", "a disk is away"])
def test_a_rotation_that_a_disk_may_have_is_not_taken_back(host: Host, why: str) -> None:
    entry = REKEY
    host.state.begin(entry)
    image = host.disks[0]
    with host.work() as work:
        new = rotation.successor(
            host.group, work.provider().id, rotation.make_successor(work, host.group, entry, unasked=False), 2
        )
        with rotation.fetch_new_kek(work, new) as kek:
            rotation.rewrap_disk(work, new, host.group.members[0], str(image), kek)
    if why == "a disk is away":
        host.disks.remove(image)
    before, state = contents(host), Path(host.paths.state).read_bytes()
    with pytest.raises(Refused) as caught:
        operation.cancel(host.paths, look=host.look)
    assert (caught.value.code, caught.value.hint) == ("not-cancellable", "unlock rekey data")
    assert (contents(host), Path(host.paths.state).read_bytes()) == (before, state)
    host.disks = [image, *(each for each in host.disks if each != image)]
    assert host.boot_opens()
    again(host)
    assert host.group.generation == 2 and host.boot_opens()


def test_a_group_that_was_begun_is_forgotten(host: Host) -> None:
    """As a kill before the group is in the state leaves it: its disks formatted, one with a token."""
    other = host.add_group("other", 2)
    state = host.state
    del state.groups["other"]
    entry = GroupCreation("group create", "other", members=other.members, options="--disk /dev/sdb --mount /srv/other")
    state.journal = entry
    state.save()
    away = host.disks.pop()
    assert operation.cancel(host.paths, look=host.look) == ["other-1: it is not here, and may keep a token"]
    assert host.state.journal is None and set(host.state.groups) == {"data"}
    with luks.Container(str(host.disks[2])) as container:
        assert not container.tokens(token.TYPE)
        disk_keys.dek_by_recovery_key(container, host.recovery).wipe()
    assert host.boot_opens(host.disks[:2])
    assert away.exists()


def test_killed_while_it_takes_a_group_back_it_does_the_rest_when_it_is_run_again(host: Host, killer: Killer) -> None:
    other = host.add_group("other", 2)
    state = host.state
    del state.groups["other"]
    state.journal = GroupCreation("group create", "other", members=other.members, options="--mount /srv/other")
    state.save()
    saved = Saved(*host.disks, host.paths.state)

    def begin(_: int) -> Callable[[], object]:
        saved.restore()
        return lambda: operation.cancel(host.paths, look=host.look)

    for attempt, _ in killer(begin):
        assert host.boot_opens(host.disks[:2]) and keyslots_open(host), attempt
        if host.state.journal:
            assert operation.cancel(host.paths, look=host.look) == []
        assert host.state.journal is None and set(host.state.groups) == {"data"}
        assert [tokens(image) for image in host.disks] == [1, 1, 0, 0]


def test_a_group_that_is_made_is_not_forgotten(host: Host) -> None:
    journaled(host, GroupCreation("group create", "data", members=host.group.members, options="--mount /srv/data"))
    before = contents(host)
    with pytest.raises(Refused) as caught:
        operation.cancel(host.paths, look=host.look)
    assert caught.value.code == "not-cancellable" and contents(host) == before


# A long operation


class Long:
    """A host whose rotation takes its time. What it has done lies on a disk."""

    def __init__(self, host: Host) -> None:
        self.host = host
        self.done = host.folder / "done"
        self.done.write_text("0")
        self.pause = 0.01
        host.state.begin(REKEY)

    def go_on(self, run: Run) -> list[str]:
        with exclusive(run.paths):
            done = int(self.done.read_text())
            while not run.tell(done, SIZE):
                if done == SIZE:
                    state = State.load(run.paths)
                    state.journal = None
                    state.save()
                    return []
                time.sleep(self.pause)
                done += 1
                new = self.done.with_suffix(".new")
                new.write_text(str(done))
                new.replace(self.done)
        return []

    def resume(self) -> None:
        """As the command does, in this process."""
        with cli_progress.shown(self.host.paths) as tell:
            operation.resume(self.host.paths, tell, look=self.host.look)

    def boot(self) -> list[str]:
        """A reboot, and what the service does then."""
        shutil.rmtree(self.host.paths.run)
        os.makedirs(self.host.paths.run)
        with cli_progress.shown(self.host.paths, lifts=False) as tell:
            return operation.resume_unattended(self.host.paths, tell, self.host.look).lines

    def start(self, work: Callable[[], object]) -> int:
        """A child that runs it, and has told of it."""
        pid = os.fork()
        if pid == 0:
            code = 1
            try:
                code = child_status(work)
            finally:
                os._exit(code)
        end = time.monotonic() + 30
        while not ((told := progress.read(self.host.paths)) and told.done > 5 and told.is_running):
            assert time.monotonic() < end, "it tells nothing"
            time.sleep(0.02)
        return pid

    @property
    def shown(self) -> under_way.UnderWay:
        found = under_way.read(self.host.paths, self.host.state, self.host.look)
        assert found
        return found


def child_status(work: Callable[[], object]) -> int:
    """As the program's exit status."""
    try:
        work()
    except UnlockError as error:
        return error.status
    return 0


def ended(pid: int) -> int:
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


@pytest.fixture
def long(host: Host, monkeypatch: pytest.MonkeyPatch) -> Long:
    monkeypatch.setattr(journal, "GOES_ON_BY_ITSELF", (Rekey,))
    made = Long(host)
    monkeypatch.setitem(operation._HANDLINGS, Rekey, Handling(go_on=made.go_on, pausable=True, cancelled="x"))
    return made


def mark(host: Host) -> Path:
    return Path(host.paths.state).with_name("under-way")


def test_it_is_paused_over_a_reboot_and_resumed(long: Long) -> None:
    host = long.host
    pid = long.start(long.resume)
    now = long.shown
    assert (now.state, now.total, now.by_itself) == ("running", SIZE, True)
    assert 0 < now.done < SIZE and now.finish == ""
    assert "is under way" in next(check_operation(host.paths, host.state, host.look)).detail
    assert "running" in status.to_text(status.read_status(host.paths, look=host.look))
    paused = operation.pause(host.paths, look=host.look)
    assert paused and (paused.state, paused.finish) == ("paused", "unlock operation resume")
    assert ended(pid) == Stopped.status
    done = int(long.done.read_text())
    assert 0 < done < SIZE and host.state.journal == REKEY
    for _ in range(2):
        assert long.boot() == ["`unlock rekey data` is paused: unlock operation resume"]
    assert int(long.done.read_text()) == done and long.shown.state == "paused"
    assert "is paused" in next(check_operation(host.paths, host.state, host.look)).detail
    long.pause = 0
    long.resume()
    assert host.state.journal is None and long.done.read_text() == str(SIZE)
    folder = Path(host.paths.state).parent
    assert not {"under-way", "paused.json"} & {each.name for each in folder.iterdir()}
    assert progress.read(host.paths) is None


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_stops_it_and_the_next_boot_goes_on_with_it(long: Long, number: int) -> None:
    pid = long.start(long.resume)
    os.kill(pid, number)
    assert ended(pid) == Stopped.status
    done = int(long.done.read_text())
    now = long.shown
    assert (now.state, now.finish, now.done > 0) == ("interrupted", "unlock operation resume", True)
    assert mark(long.host).exists(), "the condition of the service"
    long.pause = 0
    assert long.boot() == []
    assert done < SIZE and long.done.read_text() == str(SIZE)
    assert long.host.state.journal is None and not mark(long.host).exists()


def test_one_that_is_not_finished_fails_the_service_which_tries_again(
    long: Long, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    away = Handling(go_on=lambda run: ["data-1: it is not here"], cancelled="x")
    monkeypatch.setitem(operation._HANDLINGS, Rekey, away)
    options = cli._parser().parse_args(["operation", "resume", "--unattended"])
    assert options.run(long.host.paths, options) == 1
    assert capsys.readouterr().err == "data-1: it is not here\n"
    assert long.host.state.journal == REKEY and mark(long.host).exists()


def test_without_systemd_there_is_no_background(long: Long, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(units, "is_systemd_running", lambda: False)
    options = cli._parser().parse_args(["operation", "resume", "--background"])
    with pytest.raises(Refused) as caught:
        options.run(long.host.paths, options)
    assert (caught.value.code, caught.value.hint) == ("no-systemd", "unlock operation resume")


def test_a_lost_terminal_does_not_stop_it(long: Long) -> None:
    long.pause = 0.002
    pid = long.start(long.resume)
    os.kill(pid, signal.SIGHUP)
    assert ended(pid) == 0 and long.host.state.journal is None


def test_killed_it_is_interrupted_and_may_go_on(long: Long) -> None:
    pid = long.start(long.resume)
    os.kill(pid, signal.SIGKILL)
    assert ended(pid) == -signal.SIGKILL
    assert long.shown.state == "interrupted" and 0 < long.shown.done < SIZE
    long.pause = 0
    long.resume()
    assert long.host.state.journal is None


def test_a_cut_while_it_is_to_pause_leaves_it_paused(long: Long) -> None:
    resumption.pause(long.host.paths, REKEY)
    assert long.boot() == ["`unlock rekey data` is paused: unlock operation resume"]
    assert operation.let_go_on(long.host.paths, look=long.host.look)
    long.pause = 0
    assert long.boot() == [] and long.host.state.journal is None


def test_the_pause_of_another_operation_stops_nothing(long: Long) -> None:
    resumption.pause(long.host.paths, REKEY._replace(about="other"))
    assert long.shown.state == "interrupted"
    long.pause = 0
    assert long.boot() == [] and long.host.state.journal is None


@pytest.mark.parametrize("content", [b"", b"{", b"[]", b'{"version": 1, "operation": 7}', b"\xff" * 100, b"[" * 10000])
def test_a_pause_that_cannot_be_read_is_none(long: Long, content: bytes) -> None:
    Path(long.host.paths.state).with_name("paused.json").write_bytes(content)
    Path(long.host.paths.of_this_boot(progress.FILE)).write_bytes(content)
    assert long.shown.state == "interrupted" and progress.read(long.host.paths) is None


def test_a_command_that_is_refused_lifts_no_pause(long: Long) -> None:
    resumption.pause(long.host.paths, REKEY)
    with pytest.raises(Refused), cli_progress.shown(long.host.paths):
        raise Refused("another command, that this operation is in the way of")
    assert long.shown.state == "paused"


def test_another_operation_lifts_no_pause_of_this_one(long: Long) -> None:
    """One that is begun while it waits, as a new persistence key."""
    resumption.pause(long.host.paths, REKEY)
    reporter = progress.Reporter(long.host.paths, lambda told: None, lifts=True)
    journaled(long.host, NewPersistenceKey("rekey --fresh", "", new="", old="", sealed=False, before=REKEY))
    assert reporter.tell(1, SIZE) is False and not reporter.has_stopped
    assert long.shown.state == "running"
    reporter.end()
    assert long.shown.state == "paused"
    journaled(long.host, REKEY)
    assert long.boot() == ["`unlock rekey data` is paused: unlock operation resume"]


def test_only_an_operation_with_safe_points_is_paused(host: Host) -> None:
    host.state.begin(REKEY)
    with pytest.raises(Refused) as caught:
        operation.pause(host.paths, look=host.look)
    assert (caught.value.code, caught.value.hint) == ("not-pausable", "unlock rekey data")
    assert resumption.read_pause(host.paths) is None


def test_a_plan_of_a_pause_changes_nothing(long: Long) -> None:
    assert operation.pause(long.host.paths, lambda plan: False, long.host.look) is None
    assert operation.let_go_on(long.host.paths, lambda plan: False, long.host.look) is False
    assert operation.resume(long.host.paths, lambda *_: False, lambda plan: False, long.host.look) is None
    assert resumption.read_pause(long.host.paths) is None and long.done.read_text() == "0"


def test_another_process_with_its_number_is_not_taken_for_it(long: Long) -> None:
    told = progress.Progress(1, "rekey", "data", 5, SIZE, time.time(), 1.0, os.getpid(), 1)
    this_boot.write_json(long.host.paths, progress.FILE, told._asdict())
    assert long.shown.state == "interrupted"


# How far it is


def test_the_rate_is_that_of_late(long: Long) -> None:
    """100 bytes a second for a minute, then 10."""
    clock = [0.0]
    shown: list[progress.Progress] = []
    reporter = progress.Reporter(long.host.paths, shown.append, lifts=False, now=lambda: clock[0])
    done = 0
    for rate in (100, 10):
        for _ in range(600):
            reporter.tell(done, 10**6)
            clock[0] += 0.1
            done += rate // 10
        assert shown[-1].rate == pytest.approx(rate, rel=0.05)
    assert 110 <= len(shown) <= 120, "a record a second"
    reporter.tell(0, 10**6)
    assert reporter.last and reporter.last.rate == 0, "another disk begins"


def test_what_cannot_be_recorded_stops_nothing(long: Long) -> None:
    def fail(told: progress.Progress) -> None:
        raise OSError("the terminal is gone")

    reporter = progress.Reporter(long.host.paths, fail, lifts=False)
    assert reporter.tell(1, SIZE) is False
    shutil.rmtree(long.host.paths.run)
    Path(long.host.paths.run).write_text("no folder")
    time.sleep(progress.INTERVAL)
    assert reporter.tell(2, SIZE) is False
    os.unlink(long.host.paths.run)
    reporter.stop()
    assert reporter.tell(3, SIZE) is True


def test_percent_is_100_for_all_of_it_alone() -> None:
    assert [progress.percent(done, SIZE) for done in (0, 9, 10, 999, 1000, 2000)] == [0, 0, 1, 99, 100, 100]
    assert (progress.percent(0, 0), progress.seconds_left(0, 10, 0.0)) == (0, None)
    words = [progress.describe_time(each) for each in (0, 59, 60, 3540, 3600, 7800, 172800, 273600)]
    assert words == ["0 s", "59 s", "1 min", "59 min", "1 h 0 min", "2 h 10 min", "2 d 0 h", "3 d 4 h"]


def errors_of(work: Callable[[], object], *, terminal: bool) -> str:
    """What `work` prints to standard error, on a terminal or a pipe."""
    ours, theirs = pty.openpty() if terminal else os.pipe()

    def run() -> None:
        sys.stderr = os.fdopen(theirs, "w")
        work()

    try:
        assert child(run) == 0
        os.close(theirs)
        text = b""
        while True:
            try:
                text += (more := os.read(ours, 65536))
            except OSError:  # a terminal that nobody has open any more
                break
            if not more:
                break
        return text.decode()
    finally:
        os.close(ours)


def test_at_a_terminal_there_is_one_line(long: Long) -> None:
    long.pause = 0.0025
    text = errors_of(long.resume, terminal=True)
    assert text.count("\n") == 1 and "\x1b" not in text
    lines = [each.strip() for each in text.split("\r") if each.strip()]
    assert len(lines) > 2 and lines[0].startswith("unlock rekey data  [") and lines[-1].endswith("]  100 %")
    assert "#" * 24 in lines[-1]


@pytest.mark.parametrize("as_json", [False, True])
def test_elsewhere_there_are_lines(long: Long, as_json: bool) -> None:
    long.pause = 0.0025

    def run() -> None:
        with cli_progress.shown(long.host.paths, as_json=as_json) as tell:
            operation.resume(long.host.paths, tell, look=long.host.look)

    lines = errors_of(run, terminal=False).splitlines()
    if as_json:
        told = [json.loads(each)["progress"] for each in lines]
        assert len(told) > 2 and (told[-1]["done"], told[-1]["about"]) == (SIZE, "data")
    else:
        assert len(lines) == 2, "the first and the last of a minute"
        assert all(each.startswith("unlock rekey data: ") and log.printable(each) == each for each in lines)


def test_after_a_reboot_the_disks_say_how_far_it_is(long: Long, tmp_path: Path) -> None:
    """A real header, of a re-encryption that was stopped."""
    image = long.host.disks[0]
    key = tmp_path / "key"
    key.write_bytes(bytes(long.host.recovery))
    with image.open("r+b") as file:
        file.truncate(200 << 20)
    fast = [
        "--pbkdf=pbkdf2",
        "--pbkdf-force-iterations=1000",
        "--batch-mode",
        "--hotzone-size=1M",
        "--force-offline-reencrypt",
    ]
    command = ["cryptsetup", "reencrypt", *fast, "--resilience=checksum", f"--key-file={key}", str(image)]
    with luks.Container(str(image)) as container:
        slot = container.keyslots()[0]
    with subprocess.Popen([*command, f"--key-slot={slot}"], stderr=subprocess.PIPE, stdout=subprocess.PIPE) as process:
        end = time.monotonic() + 60
        while "online-reencrypt" not in dump(image) or long.shown.done == 0:
            assert process.poll() is None and time.monotonic() < end, process.communicate()
        process.send_signal(signal.SIGINT)
        process.wait()
    now = long.shown
    assert now.state == "interrupted" and 0 < now.done < now.total == (200 << 20) - (16 << 20)
    assert f"{progress.percent(now.done, now.total)} %" in status.to_text(
        status.read_status(long.host.paths, look=long.host.look)
    )
    subprocess.run([*command, "--resume-only"], check=True, capture_output=True)
    assert long.shown.total == 0


def dump(image: Path) -> str:
    with image.open("rb") as file:
        return file.read(32 << 10).decode("latin-1")


# The command line


def test_the_commands_say_what_they_did(long: Long, capsys: pytest.CaptureFixture[str]) -> None:
    def run(words: str) -> str:
        options: argparse.Namespace = cli._parser().parse_args(["operation", *words.split()])
        command: Callable[[Paths, argparse.Namespace], int] = options.run
        assert command(long.host.paths, options) == 0
        printed = capsys.readouterr()
        return printed.out or printed.err

    assert "state     interrupted" in run("show") and "by itself after a boot" in run("show")
    assert json.loads(run("show --json"))["operation"]["command"] == "unlock rekey data"
    assert "1. mark" in run("pause --dry-run") and json.loads(run("pause --dry-run --json"))["dry_run"]
    assert "until: unlock operation resume" in run("pause")
    assert "state     paused" in run("show") and "goes on   when it is resumed" in run("show")
    assert "is paused" in run("resume --unattended")
    assert "1. finish `unlock rekey data`" in run("resume --dry-run")
    long.pause = 0
    run("resume")
    assert run("show") == "no operation is under way\n"
    assert json.loads(run("show --json"))["operation"] is None


# The service


def test_the_service_starts_for_such_an_operation_alone_and_is_never_killed(long: Long) -> None:
    unit = (Path(__file__).parents[1] / "system/unlock-resume.service").read_text().splitlines()
    assert f"ConditionPathExists=/var/lib/unlock/{mark(long.host).name}" in unit
    assert {"KillMode=process", "SendSIGKILL=no", "OOMScoreAdjust=-1000", "KeyringMode=shared"} <= set(unit)
    assert f"SuccessExitStatus={Stopped.status}" in unit
    (command,) = [each for each in unit if each.startswith("ExecStart=")]
    assert cli._parser().parse_args(command.split()[1:]).unattended
    private = ("Private", "Protect", "ReadWritePaths", "ReadOnlyPaths", "InaccessiblePaths", "BindPaths")
    assert not [each for each in unit if each.startswith(private)], "no mount namespace"
    assert not [each for each in unit if each.startswith(("Wants=network", "Type=oneshot"))]


def test_a_member_that_is_journaled_before_is_marked(host: Host, monkeypatch: pytest.MonkeyPatch) -> None:
    """The mark is there whenever the state says so; it goes with the operation."""
    monkeypatch.setattr(journal, "GOES_ON_BY_ITSELF", (Rekey,))
    for entry in ENTRIES:
        journaled(host, entry)
        assert mark(host).exists() == (entry is REKEY or getattr(entry, "before", None) is REKEY)
    state = host.state
    state.journal = None
    state.save()
    assert not mark(host).exists()
