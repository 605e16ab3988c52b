# SPDX-License-Identifier: Apache-2.0
"""The process of one disk: what it knows, and that nothing it does holds up the agent."""

import os
import signal
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.lab.hostile import HOST, Lab
from unlock.boot import worker
from unlock.boot.activation import GroupOpener
from unlock.boot.worker import Worker, WorkerHeader
from unlock.disks import disk_keys, luks
from unlock.disks.udev import Disk
from unlock.errors import DiskFailed, NotOurs, UnlockError
from unlock.host.report import Report
from unlock.secret import Secret


@pytest.fixture(scope="module")
def lab(tmp_path_factory: pytest.TempPathFactory) -> Lab:
    return Lab(tmp_path_factory.mktemp("lab"))


def at(path: Path) -> Disk:
    return Disk(str(path), path.name, "", "", "", 0, 0.0)


@pytest.fixture
def process(lab: Lab) -> Iterator[Worker]:
    made = Worker(at(lab.victim))
    yield made
    made.end()


def header_of(process: Worker) -> WorkerHeader:
    while not (answer := process.read()):
        pass
    return WorkerHeader(process, answer)


def memory(pid: int) -> bytes:
    """All that a process has and could write to."""
    found = []
    with open(f"/proc/{pid}/maps") as maps, open(f"/proc/{pid}/mem", "rb", buffering=0) as file:
        for line in maps:
            span, rights = line.split()[:2]
            start, end = (int(each, 16) for each in span.split("-"))
            if rights.startswith("rw"):
                file.seek(start)
                found.append(file.read(end - start))
    return b"".join(found)


def test_a_worker_gives_the_header_of_the_context_that_it_keeps(lab: Lab, process: Worker) -> None:
    header = header_of(process)
    with luks.Container(str(lab.victim)) as container:
        assert header.metadata == container.metadata
        assert header.facts() == container.facts()
        assert header.uuid == container.uuid
    (each,) = disk_keys.read_tokens(header, HOST)
    assert disk_keys.unwrap_volume_key(header, each, lab.keys.persistence) == lab.dek


def test_a_worker_has_no_key_of_the_agent_and_gets_its_disks_own_alone(lab: Lab) -> None:
    """Forked after the unseal, as for a disk that comes late: this process holds the keys of the whole host."""
    process = Worker(at(lab.victim))
    header = header_of(process)
    (each,) = disk_keys.read_tokens(header, HOST)
    dek = disk_keys.unwrap_volume_key(header, each, lab.keys.persistence)
    keys = [bytes(each) for each in lab.keys]
    before = memory(process.pid)
    assert b"unlock" in before, "this is not the worker's memory"
    assert not [key for key in keys if key in before]
    assert bytes(dek) not in before
    os.kill(process.pid, signal.SIGSTOP)
    process.activate("unlock-test", dek)  # in the pipe; nobody else has it
    os.kill(process.pid, signal.SIGCONT)
    with pytest.raises(UnlockError, match="cannot be opened as unlock-test"):
        while True:
            process.read()
    process.end()


def test_a_worker_has_no_descriptor_but_its_pipes_and_its_disk(lab: Lab) -> None:
    read, write = os.pipe()
    other = Worker(at(lab.honest))
    process = Worker(at(lab.victim))
    header_of(process)
    pipes = {f"pipe:[{os.fstat(fd).st_ino}]" for fd in (process._requests, process.fileno())}
    held = {os.readlink(f"/proc/{process.pid}/fd/{fd}") for fd in os.listdir(f"/proc/{process.pid}/fd") if int(fd) > 2}
    assert held - pipes <= {str(lab.victim)}, "the TPM, udev and the other disks are not its business"
    for each in (other, process):
        each.end()
    os.close(read)
    os.close(write)


def test_the_recovery_key_opens_a_keyslot_in_the_worker(lab: Lab, process: Worker) -> None:
    header = header_of(process)
    assert disk_keys.dek_by_recovery_key(header, lab.recovery) == lab.dek
    with pytest.raises(NotOurs):
        header.volume_key(Secret(b"another"), 0)
    assert disk_keys.dek_by_recovery_key(header, lab.recovery) == lab.dek, "a wrong key ends no worker"


def test_an_error_crosses_with_its_kind_its_code_and_its_hint(tmp_path: Path) -> None:
    (tmp_path / "empty").write_bytes(bytes(1 << 20))
    process = Worker(at(tmp_path / "empty"))
    with pytest.raises(NotOurs, match="is not LUKS2") as caught:
        header_of(process)
    assert caught.value.code == "not-luks2"
    process.end()


def test_a_worker_that_is_killed_costs_its_own_disk_alone(lab: Lab, tmp_path: Path) -> None:
    """By the kernel for want of memory, or for a crash in libcryptsetup; while it reads, and later."""
    os.mkfifo(tmp_path / "stalled")  # opening it blocks, as reading a dead disk does
    report = Report("test")
    opening = GroupOpener(HOST, lab.by_tpm, report)
    for path in (tmp_path / "stalled", lab.honest):
        opening.add_disk(at(path))
    stalled = next(each for each in opening.reading.values() if each.disk.sysname == "stalled")
    os.kill(stalled.pid, signal.SIGKILL)
    opening.read_headers()
    entry = report.disks[stalled.disk.node]
    assert (entry.outcome, entry.detail) == ("failed", "the worker ended without an answer")
    assert report.disks[str(lab.honest)].outcome == "waiting"
    (honest,) = opening.groups["safe"].candidates
    os.kill(honest.header.worker.pid, signal.SIGKILL)
    opening.start_complete_groups(settled=True)
    while opening.is_busy():
        opening.take_answers(0.1)
    assert report.disks[str(lab.honest)].outcome == "failed"
    assert report.groups["safe"].outcome == "failed"


def test_an_activation_that_hangs_is_killed_at_its_deadline(lab: Lab, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("unlock.boot.activation.ACTIVATION_TIMEOUT", 0.2)
    report = Report("test")
    opening = GroupOpener(HOST, lab.by_tpm, report)
    opening.add_disk(at(lab.honest))
    opening.read_headers()
    (honest,) = opening.groups["safe"].candidates
    pid = honest.header.worker.pid
    os.kill(pid, signal.SIGSTOP)  # as one that waits for a device
    opening.start_complete_groups(settled=True)
    while opening.is_busy():
        opening.take_answers(0.1)
    assert report.disks[str(lab.honest)].outcome == "timed-out"
    for _ in range(100):
        try:
            os.waitpid(pid, os.WNOHANG)
        except ChildProcessError:
            break
        time.sleep(0.05)
    assert not os.path.exists(f"/proc/{pid}")


def test_a_disk_is_read_before_there_is_a_key(lab: Lab) -> None:
    """As at boot: workers start while the TPM works, and what they say is looked at when the key is there."""
    report = Report("test")
    opening = GroupOpener("", None, report)
    opening.add_disk(at(lab.honest))
    opening.add_disk(at(lab.honest))
    assert len(opening.reading) == 1
    (process,) = opening.reading.values()
    opening.host, opening.unwrap = HOST, lab.by_tpm
    opening.read_headers()
    assert report.disks[str(lab.honest)].outcome == "waiting"
    assert opening.groups["safe"].candidates[0].header.worker is process
    opening.wipe()


def test_a_keyslot_that_takes_for_ever_is_given_up(lab: Lab, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(worker, "ANSWER_TIMEOUT", 0.2)
    process = Worker(at(lab.victim))
    header = header_of(process)
    os.kill(process.pid, signal.SIGSTOP)
    with pytest.raises(DiskFailed, match="does not answer"):
        header.volume_key(lab.recovery, 0)
    process.end()
