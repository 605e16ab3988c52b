# SPDX-License-Identifier: Apache-2.0
"""The process of one disk: what it knows, and that nothing it does holds up the agent."""

import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.lab.hostile import HOST, Lab
from tests.test_slots import NOW, SELECTION
from tests.tpmfixture import Swtpm
from unlock.boot import worker
from unlock.boot.activation import GroupOpener
from unlock.boot.worker import Worker, WorkerHeader
from unlock.disks import disk_keys, find, luks
from unlock.disks.groups import Member
from unlock.disks.udev import Disk
from unlock.errors import DiskFailed, NotOurs, UnlockError
from unlock.host.report import Report
from unlock.secret import Secret
from unlock.tpm import slots
from unlock.tpm.record import Payload


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


def traces(pid: int, *keys: bytes) -> list[bytes]:
    """Those of the keys of which a half or more is in a process's memory."""
    held = memory(pid)
    return [key for key in keys if key[: len(key) // 2] in held or key[len(key) // 2 :] in held]


def await_call(pid: int, name: str) -> None:
    """Waits until a process is in a system call."""
    while Path(f"/proc/{pid}/syscall").read_text().split()[0] != {"write": "1", "readv": "19"}[name]:
        time.sleep(0.01)


PREMOUNT = Path(__file__).parents[1] / "initramfs/initramfs-tools/init-premount"
AS_IN_EARLY_BOOT = {
    **os.environ,
    **dict(re.findall(r"(\w+)=(\w+) /usr/sbin/unlock boot agent", PREMOUNT.read_text())),
    "PYTHONPATH": str(Path(__file__).parents[1]),
}
"""The environment that early boot gives the agent."""

AGENT = """
import os, signal, sys
from unlock.boot.worker import Worker, WorkerHeader
from unlock.disks import disk_keys
from unlock.disks.udev import Disk
from unlock.secret import Secret
from unlock.tpm import pcr_policy, slots
from unlock.tpm.chip import Tpm

def start():
    worker = Worker(Disk(sys.argv[2], "disk", "", "", "", 0, 0.0))
    while not (answer := worker.read()):
        pass
    return worker, WorkerHeader(worker, answer)

with Tpm(sys.argv[1]) as tpm:
    unsealed = slots.unseal(tpm)
    tpm.extend(pcr_policy.CAP_PCR, pcr_policy.CAP_DIGEST)  # ESYS has the answer until the next command is in its place
worker, header = start()
(each,) = disk_keys.read_tokens(header, "")
with disk_keys.unwrap_kek(each, unsealed.payload.key) as kek:
    dek = disk_keys.unwrap_by_kek(header, each, kek)
late, its = start()
print(os.getpid(), worker.pid, late.pid, flush=True)

with Secret(sys.stdin.buffer.readline().rstrip()) as recovery, its.volume_key(recovery, 0) as key:
    assert key == dek
print("it has read its key by the recovery key", flush=True)
sys.stdin.buffer.readline()

os.kill(worker.pid, signal.SIGSTOP)
pipe = os.stat(worker.fileno()).st_ino
(end,) = (each for each in os.scandir(f"/proc/{worker.pid}/fd") if os.stat(each.path).st_ino == pipe)
full = os.open(end.path, os.O_WRONLY | os.O_NONBLOCK)
try:
    while True:
        os.write(full, bytes(4096))
except BlockingIOError:
    worker.activate("unlock-test", dek)
os.kill(worker.pid, signal.SIGCONT)
print("it has got its key, and cannot say what came of it", flush=True)
sys.stdin.buffer.readline()
"""
"""Unseals as the agent does, and sees two disks after that. A line on standard input is awaited before each step."""


def test_a_worker_has_no_trace_of_a_key_when_it_waits_or_ends(lab: Lab, tmp_path: Path) -> None:
    """Not only what a Secret holds: libtss2, libcrypto and libcryptsetup have had the keys, too. The agent kills a
    worker after its last answer, and nothing wipes the pages of a process that was killed."""
    keys = [bytes(lab.keys.persistence), bytes(lab.keys.kek), bytes(lab.dek), bytes(lab.recovery)]
    with Swtpm(tmp_path / "tpm") as chip:
        with chip.open() as tpm:
            slots.seal_slot(tpm, bytes.fromhex(HOST), SELECTION, NOW, Payload(Secret(keys[0])))
        command = [sys.executable, "-c", AGENT, chip.tcti, str(lab.victim)]
        with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, env=AS_IN_EARLY_BOOT) as agent:
            assert agent.stdin and agent.stdout
            main, worker, late = map(int, agent.stdout.readline().split())
            assert traces(main, *keys) == [keys[0], keys[2]], "this is not the agent's memory"
            assert [traces(each, *keys) for each in (worker, late)] == [[], []], "forked after the unseal"
            agent.stdin.write(keys[3] + b"\n")
            agent.stdin.flush()
            assert agent.stdout.readline()
            await_call(late, "readv")
            assert traces(late, *keys) == [], "what it gave is not what it keeps"
            agent.stdin.write(b"\n")
            agent.stdin.flush()
            assert agent.stdout.readline()
            await_call(worker, "write")
            assert traces(worker, *keys) == [], "when it ends"
            agent.stdin.close()


DECODES = """
import os
from unlock.secret import Secret
from unlock.tpm.record import Payload

with Secret(bytes(SIZE)) as sealed:
    os.readv(0, [sealed.value])
    payload = Payload.decode(sealed)
payload.key.wipe()
os.write(1, b"wiped")
os.read(0, 1)
"""


def test_what_was_unsealed_is_not_found_when_it_is_wiped() -> None:
    """ld.so, which binds a function at its first call, would leave on the stack what copying left in registers."""
    key = os.urandom(32)
    sealed = bytes(Payload(Secret(key)).encode())
    command = [sys.executable, "-c", DECODES.replace("SIZE", str(len(sealed)))]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, env=AS_IN_EARLY_BOOT) as process:
        assert process.stdin and process.stdout
        process.stdin.write(sealed)
        process.stdin.flush()
        assert process.stdout.read(5) == b"wiped"
        assert traces(process.pid, key) == []
        process.stdin.close()


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


@pytest.mark.parametrize(
    ("serials", "complete"),
    [(("S1", "S1"), True), (("", ""), False), (("S1", "S2"), False), (("S1", "S1", "S2"), False)],
)
def test_a_disk_with_two_paths_is_opened_by_one_of_them(
    lab: Lab, tmp_path: Path, serials: tuple[str, ...], complete: bool
) -> None:
    """Another disk with its UUID is a copy, and which of them to open is not known."""
    report = Report("test")
    opening = GroupOpener(HOST, lab.by_tpm, report)
    for number, serial in enumerate(serials):
        path = tmp_path / f"path-{number}"
        path.symlink_to(lab.honest)
        opening.add_disk(at(path)._replace(serial=serial))
    opening.read_headers()
    assert opening.is_complete("safe") == complete
    opening.start_complete_groups(settled=True)
    opened = opening.groups["safe"].nodes
    assert opened == ({str(tmp_path / "path-0")} if complete else set())
    outcomes = [report.disks[str(tmp_path / f"path-{number}")].outcome for number in range(len(serials))]
    if complete:
        assert report.disks[str(tmp_path / "path-1")].detail == f"{tmp_path}/path-0 is opened"
        for each in opening.groups["safe"].candidates:
            os.kill(each.header.worker.pid, signal.SIGKILL)  # there is no device-mapper to wait for
    else:
        assert "duplicate" in outcomes
    opening.stop(5)
    opening.wipe()


def test_a_member_with_two_paths_is_here_on_the_running_system() -> None:
    member = Member("uuid", "data-a", "")
    paths = [find.Found("/dev/sdb", "S1"), find.Found("/dev/sda", "S1")]
    assert find.find_node({"uuid": paths}, member) == "/dev/sda"
    copy = find.Found("/dev/sdc", "S2")
    assert find.find_node({"uuid": [*paths, copy]}, member) == ""
    assert find.find_node({"uuid": [*paths, copy]}, member._replace(serial="S2")) == "/dev/sdc"
    assert find.find_node({"uuid": [*paths, copy]}, member._replace(serial="S1")) == "/dev/sda"
