# SPDX-License-Identifier: Apache-2.0
"""system/dump: what it keeps of a core is encrypted and whole, or is not there."""

import contextlib
import fcntl
import os
import re
import shutil
import signal
import subprocess
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.dumps import TOP, Crashing, Writer
from unlock.keys import dump_key
from unlock.operations.dump import kept, protection

SECRET = b"of the process that crashed 4711"
IDENTITY = "AGE-SECRET-KEY-1SV5WY2KN9ZNRK7EWFJNTHZGRUQL3LMGJ2KPJTC4FD7HW68D9SEQQKVJLZ7"
RECIPIENT = "age1ylaxnphjttuucslwnp7pzgqm26f56kng2ymmhs2zjs4a9eezvcds0qpzh5"
FINGERPRINT = "0123456789abcdef"


@pytest.fixture(scope="module")
def crashed(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Crashing]:
    with Crashing(tmp_path_factory.mktemp("crashing"), SECRET) as crashing:
        assert SECRET in crashing.core.read_bytes()
        yield crashing


@pytest.fixture
def writer(tmp_path: Path) -> Writer:
    made = Writer(tmp_path)
    Path(made.paths.dump_recipient).write_text(f"# unlock: host key 3 {FINGERPRINT}\n{RECIPIENT}\n")
    return made


def opened(path: Path) -> bytes:
    """By stock tools."""
    command = 'printf %s "$0" | age -d -i - "$1" | zstd -d -q'
    return subprocess.run(
        ["bash", "-ec", f"set -o pipefail; {command}", IDENTITY, path], capture_output=True, check=True
    ).stdout


def test_a_core_is_kept_encrypted_under_a_name_that_says_what_it_is(crashed: Crashing, writer: Writer) -> None:
    assert writer.write(crashed.core, crashed.process.pid) == 0
    (file,) = writer.files()
    (dump,) = kept.list_dumps(writer.paths)
    assert (dump.comm, dump.uid, dump.pid, dump.signal, dump.generation) == ("sleep", 1000, crashed.process.pid, 11, 3)
    assert (dump.fingerprint, dump.packed, dump.size) == (FINGERPRINT, True, file.stat().st_size)
    assert abs(dump.time - time.time()) < 60
    assert file.stat().st_mode & 0o777 == 0o600
    assert SECRET not in file.read_bytes()
    assert opened(file) == crashed.core.read_bytes()
    assert writer.said() == [
        f"<5>unlock: process {dump.pid} (sleep), signal 11: dump encrypted to host key 3: {file.name}"
    ]


def test_no_program_of_it_writes_a_piece_of_the_core_to_a_file(
    crashed: Crashing, writer: Writer, tmp_path: Path
) -> None:
    """All write calls: the core goes through pipes alone. With cat in age's place it is seen in a file."""
    trace = tmp_path / "trace"
    strace = (
        "strace",
        "-f",
        "-y",
        "-s",
        "100000",
        "-e",
        "trace=write,writev,pwrite64,sendto,sendmsg",
        "-o",
        str(trace),
    )

    def leaks() -> list[str]:
        lines = [line for line in trace.read_text(errors="replace").splitlines() if SECRET.decode() in line]
        assert lines or not list(writer.files())
        return [line for line in lines if not re.search(r"\(\d+<pipe:", line)]

    text = writer.script.read_text()
    writer.script.write_text(text.replace("zstd -q -1 --single-thread -c", "cat"))
    writer.write(crashed.core, crashed.process.pid, strace)
    assert writer.files() and not leaks()
    writer.script.write_text(writer.script.read_text().replace('age --recipient "$recipient"', "cat"))
    writer.write(crashed.core, crashed.process.pid, strace)
    assert leaks(), "the control"


@pytest.mark.parametrize(
    "text",
    ["", "age1\n", f"{RECIPIENT}\n", f"# unlock: host key 3 ../../x\n{RECIPIENT}\n", "# unlock: host key 3 ab\n\n",
     f"# unlock: host key x {FINGERPRINT}\n{RECIPIENT}\n", f"# unlock: host key 3 {FINGERPRINT}\nage1wrong\n", None],
)  # fmt: skip
def test_without_a_recipient_nothing_is_written(text: str | None, crashed: Crashing, writer: Writer) -> None:
    if text is None:
        os.unlink(writer.paths.dump_recipient)
    else:
        Path(writer.paths.dump_recipient).write_text(text)
    assert writer.write(crashed.core, crashed.process.pid) == 0
    assert not writer.files()
    (said,) = writer.said()
    assert said.startswith(f"<3>unlock: process {crashed.process.pid} (sleep), signal 11: no dump is kept: ")


@pytest.mark.parametrize("kind", ["fifo", "folder", "loop", "device"])
def test_what_stands_in_the_place_of_the_recipient_stops_no_crash(kind: str, crashed: Crashing, writer: Writer) -> None:
    to = Path(writer.paths.dump_recipient)
    to.unlink()
    if kind == "fifo":
        os.mkfifo(to)
    elif kind == "folder":
        to.mkdir()
    else:
        to.symlink_to(to if kind == "loop" else "/dev/zero")
    assert dump_key.read_recipient(writer.paths) is None
    assert writer.write(crashed.core, crashed.process.pid) == 0
    assert not writer.files() and "no dump is kept" in writer.said()[0]


def test_what_stands_in_the_place_of_a_turn_is_told(crashed: Crashing, writer: Writer, tmp_path: Path) -> None:
    for place in "123":
        (tmp_path / f"run/unlock/dump-{place}").mkdir(parents=True)
    assert writer.write(crashed.core, crashed.process.pid) == 0
    assert not writer.files() and "no dump is kept" in writer.said()[0]


def test_without_age_nothing_is_written(crashed: Crashing, writer: Writer, tmp_path: Path) -> None:
    programs = tmp_path / "bin"
    programs.mkdir()
    for name in (
        "sh",
        "mkdir",
        "find",
        "flock",
        "wc",
        "stat",
        "sync",
        "mv",
        "rm",
        "zstd",
        "sort",
        "cat",
        "cksum",
        "awk",
        "timeout",
    ):
        (programs / name).symlink_to(shutil.which(name) or "")
    writer.write(crashed.core, crashed.process.pid, path=str(programs))
    assert not writer.files() and "age is not installed" in writer.said()[0]
    (programs / "age").symlink_to(shutil.which("age") or "")
    (programs / "zstd").unlink()
    writer.write(crashed.core, crashed.process.pid, path=str(programs))
    (dump,) = kept.list_dumps(writer.paths)
    assert not dump.packed


def test_a_process_that_may_leave_no_core_leaves_none(crashed: Crashing, writer: Writer) -> None:
    with subprocess.Popen(["sh", "-c", "ulimit -c 0; exec sleep 1000"]) as shy:
        time.sleep(0.2)
        writer.write(crashed.core, shy.pid)
        shy.kill()
    assert not writer.files() and not writer.said()


def test_systemd_coredump_gets_the_metadata_and_no_core(crashed: Crashing, writer: Writer) -> None:
    """Its program, with %c as 0. It has the pipe, at its end, or the kernel would not wait."""
    program = writer.top / "usr/lib/systemd/systemd-coredump"
    program.parent.mkdir(parents=True)
    told = {"called": 'echo "$@"', "size": "wc -c", "files": "readlink /proc/$$/fd/0"}
    told["turn"] = f"flock -n {writer.top}/run/unlock/dump-1 echo free"
    program.write_text("#!/bin/sh\n" + "".join(f"{what} >{writer.top}/{name}\n" for name, what in told.items()))
    program.chmod(0o755)
    writer.write(crashed.core, crashed.process.pid)
    words = (writer.top / "called").read_text().split()
    assert words[:4] == [str(crashed.process.pid), "1000", "1000", "11"] and words[5:] == ["0", "host", "1"]
    os.unlink(writer.paths.dump_recipient)
    for _ in range(2):  # with what was not read for want of a recipient
        assert (writer.top / "size").read_text().strip() == "0"
        assert (writer.top / "turn").read_text() == "free\n"
        assert (writer.top / "files").read_text() == f"{crashed.core}\n"
        writer.write(crashed.core, crashed.process.pid)
    assert len(writer.files()) == 1
    assert protection.PATTERN.split()[1:] == ["%P", "%u", "%g", "%s", "%t", "0", "%h", "%d", "%F"]


def test_a_name_that_a_process_gives_itself_is_only_a_name(crashed: Crashing, writer: Writer, tmp_path: Path) -> None:
    name = "../x .\\$(id)\n;é"
    with subprocess.Popen(
        [
            "python3",
            "-c",
            f"open('/proc/self/comm','w').write({name!r}); print(flush=True); import time; time.sleep(99)",
        ],
        stdout=subprocess.PIPE,
    ) as odd:
        assert odd.stdout
        odd.stdout.readline()
        writer.write(crashed.core, odd.pid)
        odd.kill()
    (dump,) = kept.list_dumps(writer.paths)
    assert re.fullmatch("[A-Za-z0-9_]+", dump.comm) and dump.comm.startswith("___x__")


# Killed, full


@pytest.mark.parametrize("victim", ["timeout", "zstd", "age", "dump"])
def test_a_killed_writer_leaves_nothing_that_is_a_dump(victim: str, crashed: Crashing, writer: Writer) -> None:
    """Each of them in the middle of a core."""
    read, write = os.pipe()
    handler = writer.start(crashed.process.pid, read)
    os.close(read)
    core = crashed.core.read_bytes()
    os.write(write, core[:4096])
    until = time.monotonic() + 20
    while not (found := _below(handler.pid, victim)) or not writer.files():
        assert time.monotonic() < until
        time.sleep(0.02)
    os.kill(found, signal.SIGKILL)
    try:
        with os.fdopen(write, "wb") as rest:
            rest.write(core[4096:])
    except BrokenPipeError:
        pass
    handler.wait(30)
    time.sleep(0.3)
    assert not kept.list_dumps(writer.paths)
    assert all(each.name.startswith(".core.") and SECRET not in each.read_bytes() for each in writer.files())
    assert (victim == "dump") or (not writer.files() and "no dump is kept" in writer.said()[0])


def _below(pid: int, name: str) -> int:
    if name == "dump":
        return pid if Path(f"/proc/{pid}/comm").read_text().strip() == "dump" else 0
    done = subprocess.run(["pgrep", "--session", str(pid), "-x", name], capture_output=True, text=True)
    return int(done.stdout.split()[0]) if done.stdout else 0


def test_what_a_killed_writer_left_goes_an_hour_later(crashed: Crashing, writer: Writer) -> None:
    Path(writer.paths.dumps).mkdir(parents=True)
    old, new = (Path(writer.paths.dumps, f".core.x.0.{pid}.1.11.3.{FINGERPRINT}.zst.age") for pid in (1, 2))
    for each in old, new:
        each.touch()
    os.utime(old, (time.time() - 4000,) * 2)
    writer.write(crashed.core, crashed.process.pid)
    assert not old.exists() and new.exists() and len(kept.list_dumps(writer.paths)) == 1


def test_a_core_that_is_larger_than_its_room_is_not_kept(crashed: Crashing, writer: Writer, tmp_path: Path) -> None:
    noise = tmp_path / "noise"
    noise.write_bytes(os.urandom(3 << 20))
    writer.settings(KEEP_MIB=2)
    writer.write(noise, crashed.process.pid)
    assert not writer.files() and "no room" in writer.said()[0]
    writer.write(crashed.core, crashed.process.pid)
    assert len(writer.files()) == 1


@pytest.mark.root
def test_a_full_disk_keeps_no_dump(crashed: Crashing, writer: Writer) -> None:
    os.makedirs(writer.paths.dumps)
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=64k", "none", writer.paths.dumps], check=True)
    try:
        for half in ("1024", "1"):  # ulimit ends age, or the file system does
            writer.script.write_text(writer.script.read_text().replace("%S / 1024'", f"%S / {half}'"))
            writer.write(crashed.core, crashed.process.pid)
            assert not writer.files() and "no room" in writer.said()[-1]
    finally:
        subprocess.run(["umount", writer.paths.dumps], check=True)


# Retention, and a storm


def test_the_oldest_go_when_there_are_too_many_or_too_much(crashed: Crashing, writer: Writer, tmp_path: Path) -> None:
    os.makedirs(writer.paths.dumps)
    for number in range(6):
        path = Path(writer.paths.dumps, f"core.x.0.{number + 1}.1.11.3.{FINGERPRINT}.zst.age")
        path.write_bytes(bytes(400 << 10))
        os.utime(path, (time.time() - 1000 + number,) * 2)
    other = Path(writer.paths.dumps, "core.note")
    other.touch()
    writer.settings(KEEP_COUNT=5)
    writer.write(crashed.core, crashed.process.pid)
    assert [each.pid for each in kept.list_dumps(writer.paths)] == [3, 4, 5, 6, crashed.process.pid]
    writer.settings(KEEP_MIB=1)
    writer.write(crashed.core, crashed.process.pid)
    left = kept.list_dumps(writer.paths)
    assert sum(each.size for each in left) <= 1 << 20 and left[-1].pid == crashed.process.pid
    assert other.exists()


def test_the_dumps_of_one_user_push_out_no_other(crashed: Crashing, writer: Writer) -> None:
    os.makedirs(writer.paths.dumps)
    for number, uid in enumerate((0, 0, 0, 100, 1000, 1000, 1000, 1000)):
        path = Path(writer.paths.dumps, f"core.x.{uid}.{number}.1.11.3.{FINGERPRINT}.zst.age")
        path.touch()
        os.utime(path, (time.time() - 1000 + number,) * 2)
    writer.settings(KEEP_COUNT=6)
    writer.write(crashed.core, crashed.process.pid, uid=1000)
    assert sorted(each.pid for each in kept.list_dumps(writer.paths)) == [1, 2, 3, 6, 7, crashed.process.pid]


def test_files_of_others_among_the_dumps_are_not_touched(crashed: Crashing, writer: Writer) -> None:
    """Of whoever had the disk of a plain /var: a name with a line end in it names no other file, a time in the future
    is not one of this minute."""
    os.makedirs(writer.paths.dumps)
    other = writer.top / "escrow.age"
    other.touch()
    evil = Path(writer.paths.dumps, f"core.x\n1 99999999999 {other}".replace("/", "\n"))
    for name in (evil.name, "core.x\n1 99999999999 note.age", "core.x 1.age", "core.\n1 x[$(id)] y.age"):
        Path(writer.paths.dumps, name).touch()
        os.utime(Path(writer.paths.dumps, name), (time.time() - 1000,) * 2)
    note = Path(writer.paths.dumps, "note.age")
    note.touch()
    for number in range(9):
        ahead = Path(writer.paths.dumps, f"core.x.0.{number + 1}.1.11.3.{FINGERPRINT}.zst.age")
        ahead.touch()
        os.utime(ahead, (time.time() + 10_000,) * 2)
    before = len(writer.files())
    writer.settings(KEEP_COUNT=20)
    writer.write(crashed.core, crashed.process.pid)
    assert len(writer.files()) == before + 1, writer.said()
    writer.settings(KEEP_COUNT=1)
    writer.write(crashed.core, crashed.process.pid)
    assert other.exists() and note.exists() and len(kept.list_dumps(writer.paths)) == 1


def test_a_storm_of_crashes_keeps_a_few(crashed: Crashing, writer: Writer) -> None:
    writer.settings(PER_MINUTE=3)
    for _ in range(6):
        with subprocess.Popen(["sleep", "1000"]) as one:
            writer.write(crashed.core, one.pid)
            one.kill()
    assert len(writer.files()) == 3
    assert [("more than 3 of user ID 1000 in a minute" in line) for line in writer.said()] == [False] * 3 + [True] * 3


def test_a_storm_that_comes_at_once_takes_turns(crashed: Crashing, writer: Writer) -> None:
    """Of five services, each of whose twelve cores the kernel is slow to write: all together take little memory."""
    writer.settings(PER_MINUTE=100)
    core = crashed.core.read_bytes()
    crashing = [subprocess.Popen(["sleep", "1000"]) for _ in range(12)]
    writing, kernel = [], []
    for number, one in enumerate(crashing):
        writer.group(one.pid, f"/system.slice/some{number % 5}.service")
        read, write = os.pipe()
        writing.append(writer.start(one.pid, read))
        os.close(read)
        kernel.append(write)
    while _count("flock", writing) < 9 or _count("age", writing) < 3 or _count("zstd", writing) < 3:
        time.sleep(0.1)
    assert _count("age", writing) == _count("zstd", writing) == 3
    for write in kernel:
        threading.Thread(target=_give, args=(write, core)).start()
    assert [each.wait(60) for each in writing] == [0] * 12
    assert len(kept.list_dumps(writer.paths)) == 12
    for one in crashing:
        one.kill()
        one.wait()


@pytest.mark.parametrize("by", ["user ID", "control group"])
def test_a_user_whose_processes_crash_at_once_keeps_out_no_other(by: str, crashed: Crashing, writer: Writer) -> None:
    """Sixteen, whose cores do not end: one is written, three wait, and the others give back their places in the
    kernel. Where systemd has a control group for each user, other user IDs of one do not count."""
    crashing = [subprocess.Popen(["sleep", "1000"]) for _ in range(16)]
    writing, kernel = [], []
    for number, one in enumerate(crashing):
        if by == "control group":
            writer.group(one.pid, f"/user.slice/user-1000.slice/user@1000.service/app.slice/{number}.scope")
        read, write = os.pipe()
        writing.append(writer.start(one.pid, read, uid=1000 if by == "user ID" else 100_000 + number))
        os.close(read)
        kernel.append(write)
    try:
        until = time.monotonic() + 30
        while sum(each.poll() is None for each in writing) > 4 or _count("age", writing) < 1:
            assert time.monotonic() < until
            time.sleep(0.1)
        if by == "control group":
            writer.group(crashed.process.pid, "/user.slice/user-1001.slice/session-3.scope")
        begun = time.monotonic()
        assert writer.write(crashed.core, crashed.process.pid, uid=1001) == 0
        assert [each.uid for each in kept.list_dumps(writer.paths)] == [1001]
        assert time.monotonic() - begun < 10
        assert _count("age", writing) == 1 and sum(each.poll() is None for each in writing) == 4
        assert sum("others of its user or service" in line for line in writer.said()) == 12
    finally:
        for write in kernel:
            os.close(write)
        for each in (*writing, *crashing):
            each.kill()
            each.wait()


def test_a_user_whose_processes_crash_each_second_keeps_out_no_other(crashed: Crashing, writer: Writer) -> None:
    writer.settings(PER_MINUTE=1)
    for uid in (1000, 1000, 100, 1001):
        writer.write(crashed.core, crashed.process.pid, uid=uid)
        time.sleep(1.1)  # the second is in a dump's name
    assert sorted(each.uid for each in kept.list_dumps(writer.paths)) == [100, 1000, 1001]
    assert [line for line in writer.said() if "more than 1 of user ID 1000 in a minute" in line] == [writer.said()[1]]


def test_a_core_that_does_not_end_gives_up_its_turn(crashed: Crashing, writer: Writer) -> None:
    """Of a process with terabytes of nothing: /dev/zero is one."""
    text = writer.script.read_text()
    assert text.count("timeout 300") == 2
    writer.script.write_text(text.replace("timeout 300", "timeout 1"))
    begun = time.monotonic()
    assert writer.write(Path("/dev/zero"), crashed.process.pid) == 0
    assert time.monotonic() - begun < 10
    assert not writer.files() and "it took 5 minutes" in writer.said()[0]


def _count(name: str, writing: "list[subprocess.Popen[bytes]]") -> int:
    return sum(bool(_below(each.pid, name)) for each in writing if each.poll() is None)


def _give(write: int, core: bytes) -> None:
    with os.fdopen(write, "wb") as pipe:
        pipe.write(core)


def test_a_writer_whose_turn_does_not_come_keeps_nothing(crashed: Crashing, writer: Writer) -> None:
    writer.script.write_text(writer.script.read_text().replace("flock -w 60 9", "flock -w 1 9"))
    with contextlib.ExitStack() as held:
        for place in (1, 2, 3):
            file = held.enter_context(open(writer.top / f"run/unlock/dump-{place}", "w"))
            fcntl.flock(file, fcntl.LOCK_EX)
        writer.write(crashed.core, crashed.process.pid)
    assert not kept.list_dumps(writer.paths) and "were being written" in writer.said()[0]


# The rule


def test_only_age_writes_to_a_file() -> None:
    """Of all redirections, one is to a file on a disk, and it is of age's output."""
    code = [line for line in (TOP / "system/dump").read_text().splitlines() if not line.lstrip().startswith("#")]
    text = "\n".join(code).replace("<$1>", "")
    assert not re.search(r"\b(tee|dd|cp|head|tail|mktemp|gcore|coredumpctl)\b", text)
    targets = re.findall(r">+ *([^\s;}]+)", text)
    assert set(targets) - {"/dev/null", "&3", "&1", "&-", "/dev/kmsg"} == {
        "$group/memory.swap.max",
        "$group/cgroup.procs",
        "$run/dump-of-$owner-$place",
        "$run/dump-of-$owner-0",
        "$run/dump-$place",
        "$run/dump-$((pid",
        '".$name"',
    }
    assert targets.count('".$name"') == 1 and 'age --recipient "$recipient" >".$name"' in text
    assert code[-3:] == ["timeout 1 cat >/dev/null", "[ -x $coredump ] || exit 0", 'exec $coredump "$@"']
