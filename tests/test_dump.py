# SPDX-License-Identifier: Apache-2.0
"""`unlock dump`: dumps that system/dump wrote are opened, moved to another host key, given to others; a changed one
never is."""

import argparse
import functools
import json
import os
import pty
import shutil
import signal
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.dumps import TOP, Crashing, Writer
from tests.eventlogs import Boot
from tests.flowfixture import HOST, Host
from tests.hostfixture import Machine
from tests.killing import LASTING, Killer
from tests.lab.kmipliar import Liar
from unlock import cli
from unlock.errors import CommandFailed, Malformed, NoKey, Refused, Tampered, Usage
from unlock.host import keyring, this_boot
from unlock.host.state import State
from unlock.keys import access, dump_key, rotation
from unlock.operations import native_backup, rebind, sync
from unlock.operations.check import dumps as check_dumps
from unlock.operations.dump import delete, extract, kept, listing, memory, opened, protection, rewrap
from unlock.operations.dump.core import Core
from unlock.operations.dump.kept import Dump
from unlock.secret import Secret

pytestmark = pytest.mark.usefixtures("key_cache")

SECRET = b"of the process that crashed 4711"
PLAIN = frozenset(("plain-dumps",))


@pytest.fixture(scope="module")
def crashed(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Crashing]:
    with Crashing(tmp_path_factory.mktemp("crashing"), SECRET) as crashing:
        yield crashing


@pytest.fixture
def host(tmp_path: Path) -> Host:
    """Its dumps are encrypted."""
    made = Host(tmp_path, 1)
    put(made, "proc/sys/kernel/core_pattern", "core\n")
    put(made, "proc/meminfo", "MemTotal: 8000000 kB\nMemAvailable: 4000000 kB\n")
    protection.enable(made.paths)
    return made


def put(host: Host, name: str, text: str) -> Path:
    path = Path(host.paths.root, name)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)
    return path


def crash(host: Host, crashed: Crashing, core: Path | None = None) -> Dump:
    """The dump that a crash leaves."""
    before = set(kept.list_dumps(host.paths))
    writer = Writer(Path(host.paths.root))
    with subprocess.Popen(["sleep", "1000"]) as one:
        writer.write(core or crashed.core, one.pid)
        one.kill()
    (new,) = set(kept.list_dumps(host.paths)) - before
    return new


def rotate(host: Host) -> None:
    """The host key, as a sync does it."""
    with host.work() as work:
        generation = work.state.host_key_ref.generation + 1
        ref, key = access.make_key(work.provider(), access.key_name(HOST, "host", generation))
        with key:
            rotation.set_host_key(work, work.state.provider_id, ref, key)


def core_of(host: Host, dump: Dump, accept: frozenset[str] = PLAIN) -> bytes:
    """By `extract --output`."""
    path = host.folder / "extracted"
    with host.work() as work:
        extract.to_file(work, dump, str(path), accept)
    content = path.read_bytes()
    path.unlink()
    return content


# Opened


def test_a_dump_is_extracted_as_the_core_that_it_was(host: Host, crashed: Crashing) -> None:
    dump = crash(host, crashed)
    assert dump.generation == 1 and SECRET not in Path(dump.path).read_bytes()
    assert core_of(host, dump) == crashed.core.read_bytes()


def test_a_core_goes_to_no_plain_disk_unasked(host: Host, crashed: Crashing) -> None:
    dump = crash(host, crashed)
    with tempfile.TemporaryDirectory(dir="/var/tmp") as folder:  # those of other tests may be in memory
        path = Path(folder, "core")
        if extract.is_protected(folder):
            pytest.skip("/var/tmp is on an encrypted disk")
        with host.work() as work, pytest.raises(Refused) as caught:
            extract.to_file(work, dump, str(path), frozenset())
        assert caught.value.code == "plain-dumps" and not path.exists()
    with pytest.raises(Usage), host.work() as work:
        extract.to_file(work, dump, dump.path, PLAIN)
    assert extract.is_protected("/dev/shm")


def run(host: Host, *words: str, stdin: str = "") -> "subprocess.CompletedProcess[bytes]":
    """A command of `unlock dump` in a process of its own."""
    code = f"import sys; sys.argv = ['unlock', 'dump', *{list(words)!r}]\n"
    code += "import unlock.cli, unlock.__main__ as program\n"
    code += "unlock.cli.protect = lambda: None\n"
    code += "from unlock.paths import Paths\n"
    code += f"unlock.cli.Paths = lambda: Paths({host.paths.root!r})\n"
    code += "sys.exit(program.main())"
    environment = {**os.environ, "PYTHONPATH": str(TOP)}
    command = [sys.executable, "-c", code]
    return subprocess.run(command, input=stdin.encode(), capture_output=True, timeout=120, env=environment)


def test_a_core_goes_through_a_pipe_or_into_gdb(host: Host, crashed: Crashing) -> None:
    dump = crash(host, crashed)
    assert run(host, "extract", str(dump.pid)).stdout == crashed.core.read_bytes()
    done = run(host, "extract", str(dump.pid), "--gdb", stdin="bt\np secret\nquit\n")
    words = done.stdout.decode()
    assert [
        "#0  0x" in words and "in inner (x=" in words,
        "in outer (x=" in words and "in main ()" in words,
        SECRET.decode() in words,
    ] == [True] * 3, words
    _change(Path(dump.path), -1)
    refused_pipe = run(host, "extract", str(dump.pid))
    assert (refused_pipe.returncode, refused_pipe.stdout) == (6, b"")
    assert run(host, "extract", str(dump.pid), "--gdb", stdin="bt\n").returncode == 6


def test_gdb_gets_no_core_that_memory_has_no_room_for(host: Host, crashed: Crashing, tmp_path: Path) -> None:
    """Half of what is available, by the core's headers; or, where they do not tell, when it is reached."""
    dump, size = crash(host, crashed), crashed.core.stat().st_size
    put(host, "proc/meminfo", f"MemAvailable: {size // 512 - 8} kB\n")
    done = run(host, "extract", str(dump.pid), "--gdb", stdin="quit\n")
    assert (done.returncode, done.stdout) == (3, b"") and b"MiB of memory are available" in done.stderr
    assert b"--output FILE" in done.stderr
    put(host, "proc/meminfo", f"MemAvailable: {size // 512 + 8} kB\n")
    assert b"inner" in run(host, "extract", str(dump.pid), "--gdb", stdin="bt\nquit\n").stdout
    room = memory.Room(host.paths, "x")
    with pytest.raises(Refused):
        room.take(crashed.core.read_bytes()[:4096] + bytes(size))
    with pytest.raises(Refused):
        memory.Room(host.paths, "x").take(b"\x7fELF\2\1" + bytes(size + 65536))
    put(host, "proc/meminfo", "MemAvailable: 64 kB\n")
    with pytest.raises(Refused, match=r"has 0 MiB or more"):
        memory.Room(host.paths, "x").take(crashed.core.read_bytes()[:4096])


def test_a_core_in_memory_goes_to_no_plain_swap(host: Host, crashed: Crashing) -> None:
    """It is in a control group that has none; where the kernel has no such groups, a plain swap is refused."""
    dump = crash(host, crashed)
    put(host, "proc/swaps", "Filename\tType\tSize\tUsed\tPriority\n/dev/sda3 partition 1 0 -2\n")
    group = Path(host.paths.root, "sys/fs/cgroup/unlock-dump")
    shutil.rmtree(group)  # of the writer
    group.touch()
    refused = run(host, "extract", str(dump.pid), "--gdb", stdin="quit\n")
    assert refused.returncode == 3 and b"/dev/sda3, which is not encrypted" in refused.stderr
    to = f"/dev/shm/unlock-test-{os.getpid()}"
    assert run(host, "extract", str(dump.pid), "--output", to).returncode == 3 and not os.path.exists(to)
    accepted = run(host, "extract", str(dump.pid), "--gdb", "--accept", "plain-dumps", stdin="bt\nquit\n")
    assert b"inner" in accepted.stdout
    group.unlink()
    for name in ("memory.swap.max", "cgroup.procs"):
        put(host, f"sys/fs/cgroup/unlock-dump/{name}", "max")
    assert b"inner" in run(host, "extract", str(dump.pid), "--gdb", stdin="bt\nquit\n").stdout
    assert (group / "memory.swap.max").read_text() == "0ax" and (group / "cgroup.procs").read_text() != "max"
    assert run(host, "extract", str(dump.pid), "--output", to).returncode == 3, "it stays when the command has ended"
    put(host, "proc/swaps", "Filename\tType\tSize\tUsed\tPriority\n")
    try:
        assert run(host, "extract", str(dump.pid), "--output", to).returncode == 0
    finally:
        Path(to).unlink(missing_ok=True)


def test_where_what_passes_may_be_swapped_out_that_is_told(
    host: Host, crashed: Crashing, capfd: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    """A file, a pipe, a copy and a move: they go on. With an encrypted swap, or a control group, there is nothing to
    tell."""
    dump, group = crash(host, crashed), Path(host.paths.root, "sys/fs/cgroup/unlock-dump")
    shutil.rmtree(group)  # of the writer
    made = subprocess.run(["age-keygen"], capture_output=True, check=True, text=True).stdout
    other = next(line.split()[-1] for line in made.splitlines() if "public key" in line)

    def copy() -> None:
        with host.work() as work:
            rewrap.for_others(work, dump, str(tmp_path / "copy"), recipient=other)
        (tmp_path / "copy").unlink()

    def pipe() -> None:
        with host.work() as work:
            extract.to_output(work, dump, PLAIN)

    def move() -> None:
        with host.work() as work:
            rewrap.rewrap_all(work)

    def told() -> list[bool]:
        found = []
        for command in (lambda: core_of(host, dump), pipe, copy, move):
            command()
            found.append("the swap /dev/sda3 is not encrypted, and the kernel cannot keep" in capfd.readouterr().err)
        return found

    group.touch()
    assert told() == [False] * 4
    put(host, "proc/swaps", "Filename\tType\tSize\tUsed\tPriority\n/dev/sda3 partition 1 0 -2\n")
    assert told() == [True] * 4
    group.unlink()
    for name in ("memory.swap.max", "cgroup.procs"):
        put(host, f"sys/fs/cgroup/unlock-dump/{name}", "max")
    assert told() == [False] * 4


def test_a_core_is_not_written_to_a_terminal(host: Host, crashed: Crashing, monkeypatch: pytest.MonkeyPatch) -> None:
    dump = crash(host, crashed)
    ours, theirs = pty.openpty()
    monkeypatch.setattr(extract, "_OUTPUT", theirs)
    with host.work() as work, pytest.raises(Usage, match="is a terminal"):
        extract.to_output(work, dump, frozenset())
    os.close(theirs)
    os.close(ours)


def _change(path: Path, at: int) -> None:
    data = bytearray(path.read_bytes())
    data[at] ^= 1
    path.write_bytes(data)


def test_each_byte_each_cut_and_each_splice_of_a_dump_is_refused(host: Host, tmp_path: Path) -> None:
    """Of two small dumps, by the real age; a whole one is opened. Nothing is ever released of what was changed."""
    core = tmp_path / "core"
    core.write_bytes(b"\x7fELF\2\1\1" + bytes(57))
    path = tmp_path / "core.x.0.1.1.11.1.0123456789abcdef.age"
    with host.work() as work:
        found = work.host_key()
        identity = dump_key.derive_identity(found, HOST)
    to = dump_key.recipient_of(identity)

    def encrypted(content: bytes) -> bytes:
        return subprocess.run(["age", "-r", to], input=content, capture_output=True, check=True).stdout

    one, two = encrypted(core.read_bytes()), encrypted(core.read_bytes())

    def release(content: bytes) -> bytes:
        path.write_bytes(content)
        dump = kept.parse_name(str(path), len(content))
        assert dump
        out = b""
        for piece in opened.read_dump(dump, identity):
            out += piece
        return out

    assert release(one) == release(two) == core.read_bytes()
    body = one.index(b"\n---") + 1
    body = one.index(b"\n", body) + 1
    other = two.index(b"\n", two.index(b"\n---") + 1) + 1
    changed = [one[:at] + bytes([one[at] ^ 1 << at % 8]) + one[at + 1 :] for at in range(len(one))]
    cut = [one[:at] for at in range(len(one))]
    spliced = [one[:body] + two[other:], two[:other] + one[body:], one + one, one + b"\0", one + one[body:]]
    spliced += [one[:at] + two[at:] for at in range(body + 1, len(one), 7)]
    spliced += [one[:at] + one[at + 1 :] for at in range(0, len(one), 5)]
    for kind, contents in (("changed", changed), ("cut", cut), ("spliced", spliced)):
        for number, content in enumerate(contents):
            with pytest.raises(Tampered):
                raise AssertionError(f"{kind} {number}: {release(content)!r}")


def test_a_large_dump_that_is_cut_between_its_chunks_is_refused(host: Host, tmp_path: Path, crashed: Crashing) -> None:
    """age's chunks are 64 KiB; also in another order, and without the last."""
    noise = tmp_path / "noise"
    noise.write_bytes(crashed.core.read_bytes() + os.urandom(300_000))
    dump = crash(host, crashed, noise)
    whole = Path(dump.path).read_bytes()
    body = whole.index(b"\n", whole.index(b"\n---") + 1) + 1 + 16
    chunk = 65536 + 16
    chunks = [whole[body + i : body + i + chunk] for i in range(0, len(whole) - body, chunk)]
    assert len(chunks) > 4
    swapped = [chunks[1], chunks[0], *chunks[2:]]
    for pieces in (chunks[:-1], chunks[:2], swapped, [*chunks[:2], *chunks[3:]], [*chunks, chunks[-1]]):
        Path(dump.path).write_bytes(whole[:body] + b"".join(pieces))
        with pytest.raises(Tampered):
            core_of(host, dump)
    Path(dump.path).write_bytes(whole)
    assert core_of(host, dump) == noise.read_bytes()
    assert os.listdir(host.folder).count("extracted") == 0


@pytest.mark.parametrize("victim", ["age", "zstd"])
def test_what_a_killed_program_gave_is_not_believed(victim: str, host: Host, crashed: Crashing, tmp_path: Path) -> None:
    """Of `extract`, in the middle."""
    noise = tmp_path / "noise"
    noise.write_bytes(crashed.core.read_bytes() + os.urandom(8 << 20))
    dump = crash(host, crashed, noise)
    with host.work() as work, dump_key.find_identity(work, dump.fingerprint, dump.generation) as identity:
        pieces = opened.read_dump(dump, identity)
        got = next(pieces)
        pid = subprocess.run(["pgrep", "-P", str(os.getpid()), "-x", victim], capture_output=True, check=True).stdout
        os.kill(int(pid), signal.SIGKILL)
        with pytest.raises(Tampered):
            for piece in pieces:
                got += piece
    assert noise.read_bytes().startswith(got) and len(got) < noise.stat().st_size


def test_gdb_is_given_no_program_but_a_file(
    host: Host, crashed: Crashing, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The core names it, and whoever writes to the disk can make a core."""
    forged, name = tmp_path / "forged", os.fsencode(crashed.program)
    monkeypatch.chdir(tmp_path)
    option = "--eval-command=shell echo >opened"
    Path(option).touch()
    forged.write_bytes(crashed.core.read_bytes().replace(name, os.fsencode(option).ljust(len(name), b"\0")))
    done = run(host, "extract", crash(host, crashed, forged).name, "--gdb", stdin="quit\n")
    assert done.returncode == 0 and not Path("opened").exists()
    assert b"Reading symbols" not in done.stdout


def test_a_core_that_the_kernel_did_not_finish_is_refused(host: Host, crashed: Crashing, tmp_path: Path) -> None:
    short = tmp_path / "short"
    short.write_bytes(crashed.core.read_bytes()[:-4096])
    dump = crash(host, crashed, short)
    with pytest.raises(Malformed) as caught:
        core_of(host, dump)
    assert caught.value.code == "cut-dump" and "it ends after" in str(caught.value)
    assert core_of(host, dump, PLAIN | {"cut-dump"}) == short.read_bytes()
    text = tmp_path / "text"
    text.write_text("this is no core")
    with pytest.raises(Malformed):
        core_of(host, crash(host, crashed, text))
    for bad in (b"", b"\x7fELF", b"\x7fELF\2\1" + bytes(20), b"\x7fELF\7\1" + bytes(99), os.urandom(4096)):
        core = Core()
        core.add(bad)
        assert core.problem() and core.program() == ""


# Host keys


def test_dumps_of_former_host_keys_open_and_are_moved(host: Host, crashed: Crashing) -> None:
    dumps = [crash(host, crashed)]
    for _ in range(2):
        rotate(host)
        dumps.append(crash(host, crashed))
    assert [each.generation for each in dumps] == [1, 2, 3] and len({each.fingerprint for each in dumps}) == 3
    assert [(row.dump.generation, row.key) for row in listing.list_rows(host.paths)] == [
        (1, "here"),
        (2, "here"),
        (3, "here"),
    ]
    for each in dumps:
        assert core_of(host, each) == crashed.core.read_bytes()
    with host.work() as work:
        moved = rewrap.rewrap_all(work)
        assert sorted(each.outcome for each in moved) == ["rewrapped", "rewrapped", "unchanged"]
        assert {each.outcome for each in rewrap.rewrap_all(work)} == {"unchanged"}
    left = kept.list_dumps(host.paths)
    assert [each.generation for each in left] == [3, 3, 3] and {each.pid for each in left} == {
        each.pid for each in dumps
    }
    for each in left:
        assert core_of(host, each) == crashed.core.read_bytes()


def test_a_dump_that_cannot_be_moved_stays_and_stops_no_other(host: Host, crashed: Crashing) -> None:
    bad, good = crash(host, crashed), crash(host, crashed)
    _change(Path(bad.path), -1)
    was = Path(bad.path).read_bytes()
    rotate(host)
    with host.work() as work:
        outcomes = {each.name.split(".")[3]: each.outcome for each in rewrap.rewrap_all(work)}
    assert outcomes == {str(bad.pid): "tampered", str(good.pid): "rewrapped"}
    assert Path(bad.path).read_bytes() == was
    assert len(os.listdir(host.paths.dumps)) == 2
    (moved,) = [each for each in kept.list_dumps(host.paths) if each.pid == good.pid]
    rotate(host)
    to = dump_key.read_recipient(host.paths)
    assert to
    next_name = kept.dump_name(moved._replace(generation=to.generation, fingerprint=to.fingerprint))
    Path(host.paths.dumps, next_name).write_bytes(b"what was put there, or half of it")
    with host.work() as work:
        assert {each.outcome for each in rewrap.rewrap_all(work)} == {"tampered", "unchanged"}
    assert core_of(host, moved) == crashed.core.read_bytes()


def test_a_recipient_that_nobody_has_the_key_of_costs_no_dump(host: Host, crashed: Crashing) -> None:
    """On a host that does not keep its host key, and so cannot see that the recipient is another's."""
    dump = crash(host, crashed)
    made = subprocess.run(["age-keygen"], capture_output=True, check=True, text=True).stdout
    other = next(line.split()[-1] for line in made.splitlines() if "public key" in line)
    text = f"# unlock: host key 1 {dump_key.fingerprint(other)}\n{other}\n"
    Path(host.paths.dump_recipient).write_text(text)
    state = State.load(host.paths)
    state.persistent = False
    state.drop_host_key()
    state.save()
    with host.work() as work:
        (moved,) = rewrap.rewrap_all(work)
    assert moved.outcome == "no-key" and kept.list_dumps(host.paths) == [dump]
    assert core_of(host, dump) == crashed.core.read_bytes() and len(os.listdir(host.paths.dumps)) == 1


def test_moving_is_killed_at_each_step(host: Host, crashed: Crashing, killer: Killer) -> None:
    """Each dump opens then, by the old or the new key; the next run finishes."""
    crash(host, crashed)
    rotate(host)
    original = {each.name: Path(each.path).read_bytes() for each in kept.list_dumps(host.paths)}

    def begin(attempt: int) -> Callable[[], object]:
        for each in Path(host.paths.dumps).iterdir():
            each.unlink()
        for name, content in original.items():
            Path(host.paths.dumps, name).write_bytes(content)
        return move

    def move() -> None:
        with host.work() as work:
            assert not [each for each in rewrap.rewrap_all(work) if each.error]

    for _ in killer(begin, (*LASTING, os.link)):
        left = kept.list_dumps(host.paths)
        assert left
        for each in left:
            assert core_of(host, each) == crashed.core.read_bytes()
        move()
        (one,) = kept.list_dumps(host.paths)
        assert one.generation == 2 and core_of(host, one) == crashed.core.read_bytes()


def test_a_dump_says_which_host_key_it_needs_and_where_that_is(host: Host, crashed: Crashing) -> None:
    """The native provider gives a key that this host does not keep; without one the dump says what is missing."""
    one = crash(host, crashed)
    rotate(host)
    two = crash(host, crashed)
    raw = json.loads(Path(host.paths.state).read_text())
    raw["host_key"]["former"][0]["wrapped"] = None
    Path(host.paths.state).write_text(json.dumps(raw))
    assert [row.key for row in listing.list_rows(host.paths)] == ["at the provider", "here"]
    assert core_of(host, one) == crashed.core.read_bytes()
    raw["host_key"]["former"][0]["id"] = "kmip-gone/17"
    Path(host.paths.state).write_text(json.dumps(raw))
    assert [row.key for row in listing.list_rows(host.paths)] == ["unknown", "here"]
    with pytest.raises(NoKey, match=r"needs host key 1 .* kmip-gone/17") as caught:
        core_of(host, one)
    assert caught.value.hint == "unlock provider list"
    raw["host_key"]["former"] = []
    Path(host.paths.state).write_text(json.dumps(raw))
    with pytest.raises(NoKey, match="no key that this host has had"):
        core_of(host, one)
    assert core_of(host, two) == crashed.core.read_bytes()


def test_a_key_managers_host_key_is_fetched_where_it_is_not_kept(tmp_path: Path, kms: Liar, crashed: Crashing) -> None:
    host = Host(tmp_path, 0, kms)
    protection.enable(host.paths)
    dump = crash(host, crashed)
    state = State.load(host.paths)
    state.persistent = False
    state.drop_host_key()
    state.save()
    assert core_of(host, dump) == crashed.core.read_bytes()
    os.unlink(host.paths.dump_recipient)
    protection.enable(host.paths)
    assert crash(host, crashed).fingerprint == dump.fingerprint


def test_without_keys_in_the_cache_a_crash_is_encrypted_and_not_opened(host: Host, crashed: Crashing) -> None:
    keyring.flush()
    protection.enable(host.paths)
    dump = crash(host, crashed)
    assert [row.key for row in listing.list_rows(host.paths)] == ["not in the key cache"]
    with pytest.raises(NoKey) as caught:
        core_of(host, dump)
    assert "reboot" in caught.value.hint
    this_boot.cache_keys(host.paths, "TPM", {"unlock:persistence": host.persistence})
    assert core_of(host, dump) == crashed.core.read_bytes()


def test_a_rotation_that_was_killed_before_the_recipient_is_caught_up_by_sync(host: Host, crashed: Crashing) -> None:
    before = Path(host.paths.dump_recipient).read_bytes()
    rotate(host)
    after = Path(host.paths.dump_recipient).read_bytes()
    assert before != after
    Path(host.paths.dump_recipient).write_bytes(before)
    dump = crash(host, crashed)
    (finding,) = check_dumps.check_dumps(host.paths, host.state)
    assert (finding.verdict, finding.do) == ("note", "unlock sync")
    sync.sync(host.paths, look=host.look)
    assert Path(host.paths.dump_recipient).read_bytes() == after
    assert core_of(host, dump) == crashed.core.read_bytes()


def test_a_recipient_that_somebody_has_put_there_is_replaced(
    host: Host, crashed: Crashing, capsys: pytest.CaptureFixture[str]
) -> None:
    """On a plain /var, under the same generation or another. At each boot, by enable and by sync; check tells it."""
    good = Path(host.paths.dump_recipient).read_bytes()
    made = subprocess.run(["age-keygen"], capture_output=True, check=True, text=True).stdout
    other = next(line.split()[-1] for line in made.splitlines() if "public key" in line)

    def attack(generation: int = 1) -> None:
        text = f"# unlock: host key {generation} {dump_key.fingerprint(other)}\n{other}\n"
        Path(host.paths.dump_recipient).write_text(text)

    def enable() -> None:
        protection.enable(host.paths)

    def boot() -> None:
        protection.at_boot(host.paths)

    def synchronise() -> None:
        sync.sync(host.paths, look=host.look)

    for defend, generation, do in (
        (enable, 1, "unlock dump enable"),
        (boot, 1, "unlock dump enable"),
        (synchronise, 1, "unlock dump enable"),
        (boot, 7, "unlock sync"),
    ):
        attack(generation)
        assert found(host) == ("note", do)
        defend()
        assert Path(host.paths.dump_recipient).read_bytes() == good and found(host) == ("safe", "")
        assert f"dumps of fingerprint {dump_key.fingerprint(other)}" in capsys.readouterr().err
    attack()
    keyring.flush()
    protection.at_boot(host.paths)
    assert other in Path(host.paths.dump_recipient).read_text() and found(host) == ("safe", ""), "nobody can tell"
    this_boot.cache_keys(host.paths, "TPM", {"unlock:persistence": host.persistence})
    theirs = crash(host, crashed)
    assert [row.key for row in listing.list_rows(host.paths)] == ["unknown"]
    protection.at_boot(host.paths)
    assert crash(host, crashed).fingerprint != theirs.fingerprint


def test_what_stands_in_the_place_of_the_recipient_stops_no_boot(
    host: Host, capsys: pytest.CaptureFixture[str]
) -> None:
    recipient = Path(host.paths.dump_recipient)
    recipient.unlink()
    recipient.mkdir()
    protection.at_boot(host.paths)
    assert f"{recipient}: Is a directory" in capsys.readouterr().err


@pytest.mark.parametrize("kept_backup", [True, False])
def test_dumps_open_after_the_tpm_was_cleared(kept_backup: bool, tmp_path: Path, crashed: Crashing) -> None:
    """By the provider's backup, given at the rebind, or restored later: until then a dump says what it needs."""
    machine = Machine(tmp_path, Boot("direct"), disks=1)
    backup, password = str(tmp_path / "backup"), b"of the backup"
    with Secret(password) as secret:
        native_backup.backup(machine.paths, backup, secret, look=machine.look)
    protection.enable(machine.paths)
    dumps = [crash(machine, crashed)]
    rotate(machine)
    dumps.append(crash(machine, crashed))
    machine.clear()
    machine.boot()
    file = backup if kept_backup else str(tmp_path / "another")
    choices = rebind.RebindChoices(
        machine.recovery,
        file,
        Secret(password),
        None,
        accept=frozenset(("unauthenticated-root",)),
        tcti=machine.chip.tcti,
    )
    rebind.rebind(machine.paths, choices, machine.look)
    last = crash(machine, crashed)
    assert last.generation == machine.state.host_key_ref.generation == (2 if kept_backup else 3)
    if not kept_backup:
        for each in dumps:
            with pytest.raises(NoKey, match=f"needs host key {each.generation} "):
                core_of(machine, each)
        with Secret(password) as secret:
            native_backup.restore(machine.paths, backup, secret, "former", look=machine.look)
    for each in (*dumps, last):
        assert core_of(machine, each) == crashed.core.read_bytes()
    machine.close()


# For others


def test_a_copy_opens_elsewhere_and_not_with_the_host_key(host: Host, crashed: Crashing, tmp_path: Path) -> None:
    dump, copy = crash(host, crashed), tmp_path / "bundle.age"
    made = subprocess.run(["age-keygen"], capture_output=True, check=True, text=True).stdout
    (tmp_path / "identity").write_text(made)
    recipient = next(line.split()[-1] for line in made.splitlines() if "public key" in line)
    with host.work() as work:
        rewrap.for_others(work, dump, str(copy), recipient=recipient)
        identity = dump_key.find_identity(work, dump.fingerprint, dump.generation)
    age = subprocess.run(["age", "-d", "-i", tmp_path / "identity", copy], capture_output=True, check=True)
    zstd = subprocess.run(["zstd", "-d", "-q"], input=age.stdout, capture_output=True, check=True)
    assert zstd.stdout == crashed.core.read_bytes()
    with pytest.raises(Tampered):
        list(opened.read_dump(dump._replace(path=str(copy)), identity))
    for to in ("age1nonsense", "--help", recipient[:-1]):
        with host.work() as work, pytest.raises(CommandFailed):
            rewrap.for_others(work, dump, str(tmp_path / "none"), recipient=to)
    _change(Path(dump.path), -1)
    with host.work() as work, pytest.raises(Tampered):
        rewrap.for_others(work, dump, str(tmp_path / "none"), recipient=recipient)
    assert not (tmp_path / "none").exists()


def test_a_copy_opens_with_a_password(host: Host, crashed: Crashing, tmp_path: Path) -> None:
    """age asks for it, at the terminal."""
    dump, copy = crash(host, crashed), tmp_path / "bundle.age"
    with host.work() as work:
        _at_terminal(lambda: rewrap.for_others(work, dump, str(copy)))
    found = tmp_path / "core"

    def decrypt() -> None:
        subprocess.run(["age", "-d", "-o", found, copy], check=True)

    _at_terminal(decrypt)
    assert subprocess.run(["zstd", "-dcq", found], capture_output=True).stdout == crashed.core.read_bytes()


def test_a_copy_opens_with_a_password_from_a_file_or_a_pipe(host: Host, crashed: Crashing, tmp_path: Path) -> None:
    """Without a terminal; a wrong word opens nothing."""
    dump = crash(host, crashed)
    (tmp_path / "password").write_text("password of the bundle\n")
    for source, text in ((str(tmp_path / "password"), ""), ("/dev/stdin", "password of the bundle\n")):
        copy, found = tmp_path / "bundle.age", tmp_path / "core"
        done = run(host, "rewrap", str(dump.pid), "--password-file", source, "--output", str(copy), stdin=text)
        assert done.returncode == 0, done.stderr
        assert b"of the bundle" not in done.stdout + done.stderr
        _at_terminal(functools.partial(subprocess.run, ["age", "-d", "-o", found, copy], check=True))
        assert subprocess.run(["zstd", "-dcq", found], capture_output=True).stdout == crashed.core.read_bytes()
        copy.unlink()
        found.unlink()
    (tmp_path / "password").write_text("\n")
    done = run(host, "rewrap", str(dump.pid), "--password-file", str(tmp_path / "password"), "--output", str(copy))
    assert done.returncode == 2 and not copy.exists()


def _at_terminal(work: Callable[[], object]) -> None:
    pid, terminal = pty.fork()
    if not pid:
        code = 1
        try:
            work()
            code = 0
        finally:
            os._exit(code)
    said = b""
    while True:
        try:
            said += os.read(terminal, 4096)
        except OSError:
            break
        if b"passphrase" in said:
            said = b""
            os.write(terminal, b"password of the bundle\n")
    os.close(terminal)
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 0


# Lists


def test_a_dump_is_named_by_pid_or_file(host: Host, crashed: Crashing) -> None:
    one, two = crash(host, crashed), crash(host, crashed)
    assert kept.find_dump(host.paths, str(one.pid)) == one and kept.find_dump(host.paths, two.name) == two
    other = Path(host.paths.dumps, kept.dump_name(one._replace(time=5)))
    other.write_bytes(b"")
    for word in ("1", "", one.path, str(one.pid)):
        with pytest.raises(Refused) as caught:
            kept.find_dump(host.paths, word)
        assert caught.value.code == "no-dump"
    for name in (".core.x", "core.x", "core.a.b.c", f"{one.name}.part", f"x{one.name}", one.name.replace("11", "x")):
        Path(host.paths.dumps, name).write_bytes(b"")
        assert kept.parse_name(name, 0) is None
    Path(host.paths.dumps, "core.l.0.9.1.11.1.0123456789abcdef.age").symlink_to(one.path)
    os.mkfifo(Path(host.paths.dumps, "core.f.0.9.1.11.1.0123456789abcdef.age"))
    Path(host.paths.dumps, "core.d.0.9.1.11.1.0123456789abcdef.age").mkdir()
    Path(host.paths.dumps, f"core.t.0.9.{10**19}.11.1.0123456789abcdef.age").touch()
    assert len(kept.list_dumps(host.paths)) == 3
    info = json.loads(run(host, "info", two.name, "--json").stdout)
    assert (info["pid"], info["signal"], info["comm"], info["key"], info["size"]) == (
        two.pid,
        11,
        "sleep",
        "here",
        Path(two.path).stat().st_size,
    )
    text = run(host, "list").stdout.decode()
    assert str(two.pid) in text and "SIGSEGV" in text and "1, here" in text


def test_dumps_are_deleted_by_name_or_all(host: Host, crashed: Crashing) -> None:
    one, two, three = (crash(host, crashed) for _ in range(3))
    assert run(host, "delete").returncode == 2
    assert run(host, "delete", "1", str(one.pid), "--yes").returncode == 3
    assert run(host, "delete", str(one.pid)).returncode == 3, "nobody agreed"
    assert len(json.loads(run(host, "delete", "--all", "--dry-run", "--json").stdout)["destroys"]) == 3
    assert len(kept.list_dumps(host.paths)) == 3
    done = json.loads(run(host, "delete", str(one.pid), "--yes", "--json").stdout)
    assert done["deleted"] == [one.name] and kept.list_dumps(host.paths) == [two, three]
    run(host, "delete", "--all", "--yes")
    assert not kept.list_dumps(host.paths) and delete.delete(host.paths, [], lambda plan: True) == []


# Limits


def test_how_many_are_kept_is_in_unlock_toml(host: Host, crashed: Crashing) -> None:
    """The writer and systemd-tmpfiles are told; what is wrong there changes nothing."""
    limits = Path(host.paths.of_this_boot("dump-limits"))
    rule = Path(host.paths.root, "run/tmpfiles.d/unlock.conf")
    assert limits.read_text() == "KEEP_COUNT=64\nKEEP_MIB=4096\nPER_MINUTE=8\n"
    assert rule.read_text() == "e /var/lib/unlock/dumps - - - m:30d\n"
    put(host, "etc/unlock/unlock.toml", "[dump]\ncount = 2\nsize = 100\nage = 7\nper_minute = 20\n")
    protection.enable(host.paths)
    assert limits.read_text() == "KEEP_COUNT=2\nKEEP_MIB=100\nPER_MINUTE=20\n"
    assert rule.read_text() == "e /var/lib/unlock/dumps - - - m:7d\n"
    for _ in range(3):
        crash_again = crash(host, crashed)
    assert len(kept.list_dumps(host.paths)) == 2 and kept.list_dumps(host.paths)[-1] == crash_again
    put(host, "etc/unlock/unlock.toml", "[dump]\ncount = 'x'\n")
    protection.write_limits(host.paths)
    assert limits.read_text() == "KEEP_COUNT=2\nKEEP_MIB=100\nPER_MINUTE=20\n"


# Enabled, disabled, checked


def found(host: Host) -> tuple[str, str]:
    (finding,) = check_dumps.check_dumps(host.paths, host.state)
    return finding.verdict, finding.do


def test_dumps_are_on_and_off_by_name(host: Host, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    pattern = Path(host.paths.root, "proc/sys/kernel/core_pattern")
    assert pattern.read_text() == protection.PATTERN and len(protection.PATTERN) < 128
    sysctl = Path(host.paths.root, "etc/sysctl.d/50-coredump.conf").read_text()
    assert f"\nkernel.core_pattern={protection.PATTERN}\n" in sysctl
    assert "\nStorage=none\n" in Path(host.paths.root, "etc/systemd/coredump.conf.d/unlock.conf").read_text()
    protection.enable(host.paths)
    assert found(host) == ("safe", "")
    os.unlink(host.paths.dump_recipient)
    assert found(host) == ("note", "unlock dump enable")
    protection.enable(host.paths)
    with pytest.raises(Usage):
        protection.disable(host.paths, frozenset())
    assert found(host) == ("safe", "")
    protection.disable(host.paths, frozenset((protection.RISK,)))
    protection.disable(host.paths, frozenset((protection.RISK,)))
    assert found(host) == ("note", "unlock dump enable") and pattern.read_text() == "core"
    pattern.write_text("|/usr/lib/systemd/systemd-coredump %P")
    assert found(host) == ("note", "unlock dump enable")
    mine = put(host, "etc/sysctl.d/50-coredump.conf", "kernel.core_pattern=mine\n")
    with pytest.raises(Refused, match="not of unlock"):
        protection.enable(host.paths)
    protection.disable(host.paths, frozenset((protection.RISK,)))
    assert mine.read_text() == "kernel.core_pattern=mine\n"
    mine.unlink()
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(Refused, match="age is not installed"):
        protection.enable(host.paths)


def test_a_swap_on_a_plain_disk_is_named(host: Host) -> None:
    rows = "/dev/sda3 partition 1 0 -2\n/dev/zram0 partition 1 0 5\n"
    put(host, "proc/swaps", f"Filename\tType\tSize\tUsed\tPriority\n{rows}")
    dumps, swap = check_dumps.check_dumps(host.paths, host.state)
    assert (dumps.verdict, swap.verdict) == ("safe", "note") and "/dev/sda3" in swap.detail
    put(host, "sys/block/zram0/backing_dev", "/dev/sda4\n")
    assert len(list(check_dumps.check_dumps(host.paths, host.state))) == 3


def test_each_command_is_there() -> None:
    parser = cli._parser()
    assert isinstance(parser.parse_args(["dump", "list", "--json"]), argparse.Namespace)
    with pytest.raises(SystemExit):
        parser.parse_args(["dump", "rewrap", "1"])
