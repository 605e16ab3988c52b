# SPDX-License-Identifier: Apache-2.0
"""`unlock dump kernel`: what is on the partition, what is believed of it, what the crash kernel carries and does."""

import contextlib
import json
import os
import re
import shlex
import shutil
import signal
import struct
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.flowfixture import HOST, Host
from tests.killing import LASTING, Killer
from unlock.errors import DiskFailed, Malformed, NewerFormat, Refused, Usage
from unlock.keys import access, dump_key, rotation
from unlock.operations.check import dumps as check_dumps
from unlock.operations.consent import Plan, agree
from unlock.operations.dump import (
    crash_image,
    crash_kernel,
    extract,
    kept,
    kernel,
    kernel_partition,
    protection,
    rewrap,
)
from unlock.operations.dump.crash_image import Config
from unlock.operations.dump.kernel_partition import DATA_OFFSET, HEADER_SIZE, Header
from unlock.operations.dump.vmcore import VmCore

pytestmark = pytest.mark.usefixtures("key_cache")

TOP = Path(__file__).parents[1]
ID = "0123456789abcdef" * 2
SECRET = b"of the kernel that crashed 4711"
RECORD = struct.Struct(">qq")
CORE = (
    b"makedumpfile".ljust(16, b"\0") + bytes(4080)
    + b"".join(RECORD.pack(at, len(SECRET)) + SECRET for at in (0, 4096)) + RECORD.pack(-1, -1)
)  # fmt: skip
"""As makedumpfile -F writes it."""
LOG = "[    1.000000] of the log of the kernel 4711\n[    2.000000] Kernel panic - not syncing\n"
SIZE = 4 << 20


@pytest.fixture
def host(tmp_path: Path) -> Host:
    """Its dumps are encrypted."""
    made = Host(tmp_path, 1)
    protection.enable(made.paths)
    (init := Path(made.paths.root, crash_image.INIT)).parent.mkdir(parents=True)
    shutil.copy(TOP / "system/crash-init", init)
    Path(made.paths.root, "proc").mkdir(exist_ok=True)
    partition(made).touch()
    os.truncate(partition(made), SIZE)
    return made


def partition(host: Host) -> Path:
    """A file stands for it: what is done with it is open, read and write."""
    return Path(host.paths.root, "var/lib/unlock/partition")


def set_up(host: Host, consent: Callable[[Plan], bool] = agree) -> None:
    kernel.set_up(host.paths, str(partition(host)), "/var/lib/unlock/partition", consent)


def show(plans: list[Plan]) -> Callable[[Plan], bool]:
    """As `--dry-run`."""

    def decide(plan: Plan) -> bool:
        plans.append(plan)
        return False

    return decide


def recipient(host: Host) -> dump_key.Recipient:
    found = dump_key.read_recipient(host.paths)
    assert found
    return found


# system/crash-init, with its paths below a directory


class CrashKernel:
    """Runs system/crash-init up to the reboot, with the programs that its image has."""

    def __init__(self, host: Host, top: Path, core: bytes = CORE) -> None:
        self.host, self.top = host, top
        setup = kernel.read_setup(host.paths)
        assert setup
        image = crash_image.make_image(host.paths, Config(setup.id, recipient(host)), [])
        unpack(image, top)
        self.partition = top / "dev/sdz9"
        self.partition.symlink_to(partition(host))
        for name in ("sda", "sdz9"):
            (top / "sys/class/block" / name).mkdir(parents=True)
        (top / "dev/sda").write_bytes(os.urandom(1 << 20))  # a disk of others
        self.others = (top / "dev/sda").read_bytes()
        (top / "proc/sys/vm").mkdir(parents=True)
        (top / "proc/vmcore").write_bytes(core)
        self.makedumpfile()

    def makedumpfile(self, dump: str = 'cat "$7"', log: str = 'printf %s "$LOG" >"$5"') -> None:
        """Its two uses: it writes a dump to its output, or the log to a file."""
        text = f"LOG={shlex.quote(LOG)}; case $3 in --dump-dmesg) {log} ;; *) {dump} ;; esac"
        self.program("makedumpfile", text)

    def program(self, name: str, text: str) -> None:
        """Another one in its place."""
        path = self.top / "bin" / name
        path.unlink(missing_ok=True)
        path.write_text(f"#!{self.top}/bin/sh\n{text}\n")
        path.chmod(0o755)

    def run(self, most: int = 10_000_000) -> str:
        """What it says. `most`: MiB for a file, as of a partition that is full."""
        text = (self.top / "init").read_text()
        first, last = text.index("mount -t proc"), text.index("\nsay()")
        text = text[:first] + text[last:]
        end = text.index("\nif keep; then")
        assert "sysrq-trigger" not in text[end:] and text.count("echo b >/proc/sysrq-trigger") == 1
        text = text[:end].replace("echo b >/proc/sysrq-trigger", "exit 1") + "\nkeep\n"
        for name in ("/sys/", "/dev/", "/config", "/modules", "/zero", "/counted", "/size", "/log", "/proc/"):
            text = re.sub(rf'(?<=[ "<>=]){name}', f"{self.top}{name}", text)
        text = text.replace(f"{self.top}/dev/zero", "/dev/zero").replace(f"{self.top}/dev/console", "/dev/stdout")
        text = text.replace("PATH=/bin", f"PATH={self.top}/bin").replace('[ -b "$node" ]', '[ -f "$node" ]')
        text = text.replace("tries=60", "tries=0")
        script = self.top / "script"
        script.write_text(text)
        limited = f'ulimit -S -f {most}; exec "$0" sh "$1"'
        command = ["bash", "-c", limited, str(self.top / "bin/busybox"), str(script)]
        said = self.top / "said"
        with said.open("wb") as file:
            shell = subprocess.Popen(command, stdout=file, stderr=file, start_new_session=True)
            shell.wait(60)
            with contextlib.suppress(ProcessLookupError):
                os.killpg(shell.pid, signal.SIGKILL)  # a reader of what no one writes; the reboot ends it
        assert (self.top / "dev/sda").read_bytes() == self.others, "another disk stays as it is"
        return said.read_text()


def unpack(image: bytes, top: Path) -> None:
    top.mkdir()
    command = "gzip -d | cpio --extract --quiet --make-directories --no-absolute-filenames"
    subprocess.run(["sh", "-c", command], input=image, cwd=top, check=True)


def crash(host: Host, tmp_path: Path, core: bytes = CORE) -> str:
    shutil.rmtree(tmp_path / "crashed", ignore_errors=True)
    return CrashKernel(host, tmp_path / "crashed", core).run()


def header(host: Host) -> Header:
    found = kernel_partition.read_header(str(partition(host)))
    assert found
    return found


def core_of(host: Host, dump: kept.Dump, accept: frozenset[str] = frozenset()) -> bytes:
    path = host.folder / "extracted"
    with host.work() as work:
        extract.to_file(work, dump, str(path), accept | {"plain-dumps"})
    content = path.read_bytes()
    path.unlink()
    return content


def boot(host: Host) -> list[kept.Dump]:
    """What unlock-crash-kernel.service does, without a kernel to load; the dumps that are kept then, beside logs."""
    with pytest.raises(Refused) as caught:
        kernel.boot(host.paths)
    assert caught.value.code == "no-crash-memory"
    return [each for each in kept.list_dumps(host.paths) if not each.is_log]


def logs(host: Host) -> list[str]:
    """What the logs have in them that are kept."""
    return [core_of(host, each).decode() for each in kept.list_dumps(host.paths) if each.is_log]


# A crash, and the next boot


def test_a_dump_goes_to_the_partition_and_is_opened_after_the_next_boot(host: Host, tmp_path: Path) -> None:
    set_up(host)
    assert header(host).state == "empty" and not boot(host)
    said = crash(host, tmp_path)
    assert "the dump is whole" in said and "not found" not in said
    now = header(host)
    to = recipient(host)
    assert (now.state, now.kernel, now.generation, now.fingerprint) == ("whole", os.uname().release, 1, to.fingerprint)
    raw = partition(host).read_bytes()
    assert SECRET not in raw and raw[DATA_OFFSET:].startswith(b"age-encryption.org/v1\n")
    assert kernel.read_kernel_protection(host.paths).state == "whole"
    (dump,) = boot(host)
    assert header(host).state == "empty"
    assert (dump.of_kernel, dump.comm, dump.size, dump.time) == (True, now.kernel, now.size, now.time)
    assert dump.name == f"kernel.{now.kernel}.{now.time}.1.{to.fingerprint}.age"
    assert core_of(host, dump) == CORE
    assert boot(host) == [dump], "once"
    assert logs(host) == [LOG] and LOG.encode() not in raw
    (log,) = [each for each in kept.list_dumps(host.paths) if each.is_log]
    assert log.name == dump.name.replace("kernel.", "kernel-log.", 1) and log == kept.find_dump(host.paths, log.name)
    assert (log.kind, log.time, log.comm, dump.kind) == ("kernel-log", dump.time, dump.comm, "kernel")
    with host.work() as work, pytest.raises(Usage):
        extract.to_gdb(work, dump, frozenset())


def test_a_dump_of_a_former_host_key_opens_and_is_moved(host: Host, tmp_path: Path) -> None:
    set_up(host)
    crash(host, tmp_path)
    (dump,) = boot(host)
    with host.work() as work:
        ref, key = access.make_key(work.provider(), access.key_name(HOST, "host", 2))
        with key:
            rotation.set_host_key(work, work.state.provider_id, ref, key)
    assert core_of(host, dump) == CORE
    with host.work() as work:
        moved, _ = sorted(rewrap.rewrap_all(work), key=lambda each: "log" in each.name)
    (now,) = boot(host)
    assert logs(host) == [LOG]
    assert (moved.outcome, moved.name, now.generation, now.comm) == ("rewrapped", now.name, 2, dump.comm)
    assert core_of(host, now) == CORE


def test_a_second_crash_before_the_boot_keeps_the_first_dump(host: Host, tmp_path: Path) -> None:
    set_up(host)
    crash(host, tmp_path)
    before = partition(host).read_bytes()
    assert "a dump that nobody has read" in crash(host, tmp_path)
    assert partition(host).read_bytes() == before


@pytest.mark.parametrize("victim", ["makedumpfile", "age", "tee", "dd"])
@pytest.mark.parametrize("end", ["exit 1", "kill -9 $$", "kill -9 $PPID"])
def test_what_did_not_end_is_not_believed(victim: str, end: str, host: Host, tmp_path: Path) -> None:
    """It fails, is killed, or what would say that it failed is killed. The kernel's log was there before."""
    set_up(host)
    crashed = CrashKernel(host, tmp_path / "crashed")
    if victim == "makedumpfile":
        crashed.makedumpfile(f'head -c 3000 "$7"; {end}')
    elif victim == "dd":  # the header is written; the stream is not
        dump, real = f"cat >/dev/null; {end}", f'exec {crashed.top}/bin/busybox dd "$@"'
        crashed.program(victim, f'case "$*" in *bs=1M*) {dump} ;; esac; {real}')
    else:
        marker, age = crashed.top / "second", shutil.which("age")
        real = f'exec {age} "$@"' if victim == "age" else f'exec {crashed.top}/bin/busybox tee "$@"'
        crashed.program(victim, f"[ -e {marker} ] && {{ cat >/dev/null; {end}; }}; : >{marker}; {real}")
    said = crashed.run()
    assert "the dump is not whole" in said and ("once more" in said) == (victim == "makedumpfile"), said
    assert header(host).state == "writing" and SECRET not in partition(host).read_bytes()
    assert LOG.encode() not in partition(host).read_bytes()
    assert not boot(host) and header(host).state == "empty" and logs(host) == [LOG]


def test_a_kernel_of_which_no_page_can_be_left_out_is_dumped_with_all(host: Host, tmp_path: Path) -> None:
    set_up(host)
    crashed = CrashKernel(host, tmp_path / "crashed")
    crashed.makedumpfile('head -c 3000 "$7"; [ $6 = 31 ] && exit 1; tail -c +3001 "$7"')
    said = crashed.run()
    assert "once more, with all pages" in said and "the dump is whole" in said
    (dump,) = boot(host)
    assert core_of(host, dump) == CORE and logs(host) == [LOG]


def test_a_dump_is_whole_without_a_log(host: Host, tmp_path: Path) -> None:
    """And a log that is too long is the end of it."""
    set_up(host)
    crashed = CrashKernel(host, tmp_path / "crashed")
    crashed.makedumpfile(log="exit 1")
    assert "its log is not there" in crashed.run()
    (dump,) = boot(host)
    assert core_of(host, dump) == CORE and not logs(host)
    long = CrashKernel(host, tmp_path / "long")
    long.makedumpfile(log='{ head -c 1500000 /dev/urandom; printf %s "$LOG"; } >"$5"')
    assert "the dump is whole" in long.run()
    assert core_of(host, boot(host)[-1]) == CORE
    (log,) = [each for each in kept.list_dumps(host.paths) if each.is_log]
    content = core_of(host, log)
    assert len(content) == 1_000_000 and content.endswith(LOG.encode())


def test_a_log_without_end_does_not_fill_the_memory(host: Host, tmp_path: Path) -> None:
    """makedumpfile is ended at 16 MiB. The dump comes after it."""
    set_up(host)
    crashed = CrashKernel(host, tmp_path / "crashed")
    crashed.makedumpfile(log=f'head -c 40000000 /dev/zero >"$5"; code=$?; wc -c <"$5" >{crashed.top}/seen; exit $code')
    assert "its log is not there: more than 16 MiB" in crashed.run()
    assert int((crashed.top / "seen").read_text()) == 16 << 20
    (dump,) = boot(host)
    assert core_of(host, dump) == CORE and not logs(host)


def test_a_log_moves_nothing_on_a_terminal(host: Host, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whoever writes to the disk can encrypt one of his own. A pipe gets it as it is."""
    set_up(host)
    evil = "[1.0] a\x1b]0;title\x07 b\r\x1b[2J\x9b1m \u00e9\tc\n[2.0] d\n"
    to = recipient(host)
    path = kept.kernel_dump(host.paths.dumps, "6.1", 5, to.generation, to.fingerprint, 0, kind="kernel-log").path
    subprocess.run(["age", "-r", to.text, "-o", path], input=evil.encode("latin-1"), check=True)
    (log,) = kept.list_dumps(host.paths)

    def shown(ours: int, theirs: int) -> bytes:
        with monkeypatch.context() as patch, host.work() as work:
            patch.setattr(extract, "_OUTPUT", theirs)
            extract.to_output(work, log, frozenset())
        os.close(theirs)
        with open(ours, "rb", closefd=False) as file, contextlib.suppress(OSError):  # EIO of a terminal
            return file.read1()
        return b""

    ours, theirs = os.openpty()
    on_terminal = shown(ours, theirs)
    wanted = "[1.0] a\\x1b]0;title\\x07 b\\x0d\\x1b[2J\\x9b1m \\xe9\tc\r\n[2.0] d\r\n"
    assert on_terminal.decode("latin-1").expandtabs() == wanted.expandtabs()
    assert shown(*os.pipe()) == evil.encode("latin-1")


def test_a_partition_that_is_too_small_keeps_no_half_dump(host: Host, tmp_path: Path) -> None:
    set_up(host)
    crashed = CrashKernel(host, tmp_path / "crashed", CORE + os.urandom(3 << 20))
    said = crashed.run(most=2 << 10)  # blocks of 1024 bytes
    assert "the dump is not whole" in said and "once more" not in said
    assert header(host).state == "writing" and not boot(host) and logs(host) == [LOG]


def test_a_log_that_is_not_of_this_crash_is_not_believed(host: Host, tmp_path: Path) -> None:
    set_up(host)
    crash(host, tmp_path)
    good, whole = partition(host).read_bytes(), header(host)
    place = kernel_partition.LOG_HEADER_OFFSET
    log = good[place : place + HEADER_SIZE]
    assert kernel_partition.read_log_header(str(partition(host)), whole)
    for bad in (
        bytes(HEADER_SIZE),
        log.replace(b"state whole", b"state writing"),
        log.replace(b"kernel log 1", b"kernel log 2"),
        log.replace(b"kernel log", b"kernel dump"),
        log.replace(whole.id.encode(), b"f" * 32),
        log.replace(b"generation 1", b"generation 2"),
        log.replace(f"time {whole.time}".encode(), b"time 5"),
        re.sub(rb"size \d+", b"size 9999999", log),
    ):
        assert bad != log
        partition(host).write_bytes(
            good[:place] + bad[:HEADER_SIZE].ljust(HEADER_SIZE, b"\0") + good[place + HEADER_SIZE :]
        )
        assert kernel_partition.read_log_header(str(partition(host)), whole) is None
    assert len(boot(host)) == 1 and not logs(host)


def test_another_partition_is_never_written(host: Host, tmp_path: Path) -> None:
    set_up(host)
    crashed = CrashKernel(host, tmp_path / "crashed")
    kernel_partition.write_empty(str(partition(host)), "f" * 32)
    before = partition(host).read_bytes()
    assert "is not there" in crashed.run()
    assert partition(host).read_bytes() == before
    with pytest.raises(Refused, match="is not the partition that was set up"):
        kernel.boot(host.paths)


def test_what_the_header_names_and_is_not_there_is_not_kept(host: Host) -> None:
    set_up(host)
    setup = kernel.read_setup(host.paths)
    assert setup
    for size, stream in ((1 << 40, b"age-encryption.org/v1\n"), (4096, b"something else")):
        words = f"unlock kernel dump 1\nid {setup.id}\nstate whole\ntime 5\nkernel 6.1\ngeneration 1\n"
        words += f"fingerprint {'0' * 16}\nsize {size}\n"
        with partition(host).open("r+b") as file:
            file.write(words.encode().ljust(HEADER_SIZE, b"\0"))
            file.seek(DATA_OFFSET)
            file.write(stream)
        assert not boot(host) and header(host).state == "empty"


def test_moving_a_dump_is_killed_at_each_step(host: Host, tmp_path: Path, killer: Killer) -> None:
    """It is on the partition or with the others, whole; the next boot has it once."""
    set_up(host)
    crash(host, tmp_path)
    crashed = partition(host).read_bytes()

    def begin(attempt: int) -> Callable[[], object]:
        for each in Path(host.paths.dumps).iterdir():
            each.unlink()
        partition(host).write_bytes(crashed)
        return lambda: boot(host)

    for _ in killer(begin, (*LASTING, os.link, kernel_partition.write_empty)):
        assert header(host).state == "whole" or len(kept.list_dumps(host.paths)) == 2
        (dump,) = boot(host)
        assert core_of(host, dump) == CORE and header(host).state == "empty" and logs(host) == [LOG]


def test_a_dump_without_room_stays_on_the_partition(
    host: Host, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    set_up(host)
    crash(host, tmp_path)
    real = os.statvfs

    def full(path: str) -> os.statvfs_result:
        found = list(real(path))
        found[4] = 1  # f_bavail
        return os.statvfs_result(found)

    with monkeypatch.context() as patch:
        patch.setattr(os, "statvfs", full)
        with pytest.raises(Refused) as caught:
            kernel.boot(host.paths)
    assert caught.value.code == "no-room" and header(host).state == "whole"
    assert core_of(host, boot(host)[0]) == CORE


def test_the_oldest_dumps_of_the_kernel_go(host: Host, tmp_path: Path) -> None:
    set_up(host)
    for number in range(5):
        old = kept.kernel_dump(host.paths.dumps, "6.1", number, 1, "0" * 16, 0)
        Path(old.path).touch()
    crash(host, tmp_path)
    assert [each.time for each in boot(host)][:-1] == [2, 3, 4]


# The content


def test_a_dump_of_the_kernel_is_whole_or_not() -> None:
    def problem(content: bytes, step: int) -> str:
        core = VmCore()
        for at in range(0, len(content), step):
            core.add(content[at : at + step])
        return core.problem()

    for step in (1, 7, 4096, 1 << 20):
        assert problem(CORE, step) == ""
        assert "before its end mark" in problem(CORE[:-1], step)
        assert problem(CORE + b"\0", step) == problem(b"\x7fELF" + CORE, step) == "it is no dump of a kernel"
    for cut in range(4096, len(CORE)):
        assert problem(CORE[:cut], 64)
    assert problem(b"", 1)


def test_a_dump_whose_writer_was_cut_is_refused(host: Host, tmp_path: Path) -> None:
    set_up(host)
    crash(host, tmp_path, CORE[:-16])
    (dump,) = boot(host)
    with pytest.raises(Malformed) as caught:
        core_of(host, dump)
    assert caught.value.code == "cut-dump" and "makedumpfile did not end" in str(caught.value)
    assert core_of(host, dump, frozenset({"cut-dump"})) == CORE[:-16]


# The header


def test_a_header_is_read_as_it_is_written_or_not_at_all() -> None:
    parse = kernel_partition.parse_header
    empty = kernel_partition.empty_header(ID)
    assert parse(empty) == Header(ID, "empty") and len(empty) == HEADER_SIZE
    whole = empty.replace(
        b"state empty\n", b"state whole\ntime 1\nkernel 6.1.0-x\ngeneration 2\nfingerprint " + b"a" * 16
    )
    whole = whole.rstrip(b"\0") + b"\nsize 77\n"
    assert parse(whole) == Header(ID, "whole", 1, "6.1.0-x", 2, "a" * 16, 77)
    for other in (b"", bytes(4096), os.urandom(4096), b"\x7fELF", b"unlock kernel\n"):
        assert parse(other) is None
    with pytest.raises(NewerFormat):
        parse(empty.replace(b"dump 1\n", b"dump 2\n"))
    for old, new in ((b"dump 1", b"dump x"), (b"id ", b"ib "), (b"whole", b"hole"), (b"6.1.0-x", b"../../x"),
                     (b"size 77\n", b"size 77"), (b"size 77\n", b"size -7\n"), (b"size 77\n", b"size 77\nsize 8\n"),
                     (b"time 1\n", b""), (b"time 1\n", b"time 9999999999999\n"),
                     (b"state whole", b"state empty"), (b"a" * 16, b"a" * 15)):  # fmt: skip
        assert whole.count(old) == 1
        with pytest.raises(Malformed):
            parse(whole.replace(old, new))


# What is in the crash kernel


def test_its_initramfs_has_what_it_needs_and_no_key(host: Host, tmp_path: Path) -> None:
    set_up(host)
    with host.work() as work, work.host_key() as host_key, dump_key.derive_identity(host_key, HOST) as identity:
        secrets = [bytes(each.value) for each in (host_key, identity, host.persistence, host.recovery)]
        with dump_key.identity_file(identity) as line:
            secrets.append(bytes(line.value).strip())
    module = tmp_path / "x.ko.xz"
    module.write_bytes(subprocess.run(["xz"], input=b"a driver", capture_output=True, check=True).stdout)
    made = [crash_image.make_image(host.paths, Config(ID, recipient(host)), [str(module)]) for _ in range(2)]
    assert made[0] == made[1] and len(made[0]) < 32 << 20
    unpack(made[0], top := tmp_path / "unpacked")
    files = {str(each.relative_to(top)): each for each in top.rglob("*") if each.is_file()}
    libraries = {
        name
        for name in files
        if re.fullmatch(r"(usr/)?lib(64|/[a-z0-9_-]+)?/(lib[a-z0-9_+-]+|ld-[a-z0-9-]+)\.so.*", name)
    }
    assert set(files) - libraries == {
        "init", "config", "modules/order", "modules/x.ko", "bin/busybox", "bin/age", "bin/makedumpfile",
        *(f"bin/{each}" for each in crash_image.APPLETS),
    }  # fmt: skip
    assert not [name for name in libraries if re.search("crypt|tss2|tpm|python|keyutils|device-?mapper", name)]
    assert (top / "modules/x.ko").read_bytes() == b"a driver"
    content = b"".join(each.read_bytes() for each in files.values() if not each.is_symlink())
    for secret in secrets:
        assert len(secret) >= 32 and secret not in content and secret.hex().encode() not in content
    assert recipient(host).text.encode() in content


def test_age_alone_writes_to_the_disk() -> None:
    """Of the script, which has no other way to a disk."""
    text = (TOP / "system/crash-init").read_text()
    code = "\n".join(line for line in text.splitlines() if not line.lstrip().startswith("#"))
    targets = re.findall(r">+ *([^\s;}&)]+)", code)
    assert sorted(set(targets)) == [
        "/dev/console", "/dev/null", "/proc/sys/vm/dirty_bytes", "/proc/sysrq-trigger", "/size", "/zeros",
    ], targets  # fmt: skip
    writers = re.findall(r"dd of=\S+[^;|}]*", code)
    assert len(writers) == 2
    assert re.search(r"\{ \"\$@\"[^|]*\|\s*\{ age --recipient \"\$recipient\"[^|]*\|\s*\{ tee [^|]*\|\s*\{ dd ", code)
    sources = [line.strip() for line in code.splitlines() if "makedumpfile -" in line or "/log" in line]
    assert len(sources) == 4 and sources[0] == (
        "(ulimit -f 32768 && makedumpfile --message-level 4 --dump-dmesg /proc/vmcore /log >&2) && tail -c 1000000 /log"
    ), sources  # in memory, and on
    assert sources[1] == "rm -f /log"
    assert all(re.search(r"\bwrite 1M makedumpfile ", line) for line in sources[2:]), sources
    assert not re.search(r"\b(cp|cryptsetup|nc|scp|ssh|udhcpc|losetup|dmsetup|sh -c|tpm\w*)\b", code)
    assert re.findall(r"mount -t (\w+)", code) == ["proc", "sysfs", "devtmpfs"]


def test_the_drivers_of_a_disk_are_loaded_after_those_that_they_need(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    device = tmp_path / "sys/devices/pci0/virtio0/host0/target0/0:0:0:0/block/sda/sda1"
    device.mkdir(parents=True)
    (tmp_path / "sys/dev/block").mkdir(parents=True)
    (tmp_path / "sys/dev/block/8:1").symlink_to(device)
    for place, module in (
        ("pci0", "virtio_pci"),
        ("pci0/virtio0", "virtio_scsi"),
        ("pci0/virtio0/host0/target0/0:0:0:0", "sd_mod"),
    ):
        (tmp_path / "sys/module" / module).mkdir(parents=True)
        driver = tmp_path / "sys/devices" / place / "driver"
        driver.mkdir()
        (driver / "module").symlink_to(tmp_path / "sys/module" / module)
    needs = {"virtio_pci": "builtin virtio_pci\n", "virtio_scsi": "insmod /m/scsi.ko \ninsmod /m/virtio_scsi.ko \n",
             "sd_mod": "insmod /m/scsi.ko \ninsmod /m/sd_mod.ko x=1\n"}  # fmt: skip
    monkeypatch.setattr(crash_image, "run", lambda command: needs[command[-1]])
    assert crash_image.modules_of("8:1", "6.1", str(tmp_path)) == ["/m/scsi.ko", "/m/virtio_scsi.ko", "/m/sd_mod.ko"]


def test_its_command_line_starts_nothing_and_keeps_the_console(host: Host) -> None:
    Path(host.paths.cmdline).parent.mkdir(parents=True, exist_ok=True)
    Path(host.paths.cmdline).write_text(
        "BOOT_IMAGE=/vmlinuz root=/dev/mapper/root ro quiet console=ttyS0,115200 crashkernel=256M init=/bin/sh "
        "rdinit=/x break=init systemd.unit=rescue.target intel_iommu=on panic=-1 hugepages=4096 nokaslr\n"
    )
    assert crash_kernel._command_line(host.paths) == f"console=ttyS0,115200 intel_iommu=on {crash_kernel._APPENDED}"


# enable, disable, status


def found(host: Host) -> tuple[str, str] | None:
    rows = [each for each in check_dumps.check_dumps(host.paths, host.state) if each.what == "kernel dumps"]
    return (rows[0].verdict, rows[0].do) if rows else None


def test_erasing_a_partition_is_asked_for(host: Host) -> None:
    subprocess.run(["mkfs.ext4", "-q", "-F", partition(host)], check=True)
    before = partition(host).read_bytes()
    plans: list[Plan] = []
    set_up(host, show(plans))
    assert "ext4" in plans[0].destroys[0] and plans[0].thing == "/var/lib/unlock/partition"
    assert partition(host).read_bytes() == before and kernel.read_setup(host.paths) is None

    def refuse(plan: Plan) -> bool:
        raise Refused("no", code="not-confirmed")

    with pytest.raises(Refused):
        set_up(host, refuse)
    assert partition(host).read_bytes() == before
    set_up(host)
    assert header(host).state == "empty"
    assert not subprocess.run(["wipefs", partition(host)], capture_output=True).stdout
    set_up(host, lambda plan: not plan.destroys)  # the second time it is ours
    assert header(host).id == kernel.read_setup(host.paths).id  # type: ignore[union-attr]


def test_a_dump_of_another_host_is_not_erased_unasked(host: Host, tmp_path: Path) -> None:
    set_up(host)
    crash(host, tmp_path)
    os.unlink(host.paths.kernel_dump)
    plans: list[Plan] = []
    set_up(host, show(plans))
    assert "a dump of a kernel of" in plans[0].destroys[0] and header(host).state == "whole"


def test_enabling_is_killed_at_each_step(host: Host, killer: Killer) -> None:
    """The same command finishes, and asks no second time once the partition is ours."""

    def begin(attempt: int) -> Callable[[], object]:
        for path in (host.paths.kernel_dump, *(f"{host.paths.root}/{name}" for name in kernel._MASKED)):
            if os.path.lexists(path):
                os.unlink(path)
        partition(host).write_bytes(bytes(SIZE))
        return lambda: set_up(host)

    for _ in killer(begin, (*LASTING, kernel_partition.write_empty)):
        if kernel.read_setup(host.paths):
            assert all(os.path.lexists(f"{host.paths.root}/{name}") for name in kernel._MASKED)
            assert header(host).state == "empty"
        set_up(host)
        assert header(host).id == kernel.read_setup(host.paths).id  # type: ignore[union-attr]


def test_what_is_no_partition_is_refused(host: Host, tmp_path: Path) -> None:
    with pytest.raises(Usage):
        kernel.check_partition("/dev/none")
    with pytest.raises(DiskFailed):
        kernel.check_partition(str(partition(host)))
    for name in ("dm-3", "md127", "loop0"):
        (tmp_path / name).touch()
        with pytest.raises(Refused) as caught:
            kernel.check_partition(str(tmp_path / name))
        assert caught.value.code == "not-supported"


def test_kdump_tools_stays_masked_and_gives_way_by_name(host: Host) -> None:
    root = Path(host.paths.root)
    assert found(host) is None
    unit = root / "usr/lib/systemd/system/kdump-tools.service"
    unit.parent.mkdir(parents=True)
    unit.touch()
    assert found(host) == ("note", "unlock dump kernel enable DEV, or apt remove kdump-tools")
    own = root / kernel._MASKED[0]
    own.parent.mkdir(parents=True, exist_ok=True)
    own.write_text("of the operator")
    with pytest.raises(Refused) as caught:
        set_up(host)
    assert caught.value.code == "kdump-tools" and own.read_text() == "of the operator"
    own.unlink()
    set_up(host)
    assert all(os.readlink(root / name) == "/dev/null" for name in kernel._MASKED)
    (root / "sys/kernel").mkdir(parents=True, exist_ok=True)
    assert found(host) == ("note", f"crashkernel={crash_kernel.MEMORY} on the kernel's command line, and a reboot")
    (root / "sys/kernel/kexec_crash_size").write_text(f"{256 << 20}\n")
    assert found(host) == ("note", "systemctl restart unlock-crash-kernel")
    (root / "sys/kernel/kexec_crash_loaded").write_text("1\n")
    assert found(host) == ("note", "unlock dump kernel enable DEV"), "of others"
    setup = kernel.read_setup(host.paths)
    assert setup
    Path(host.paths.of_this_boot("crash-kernel")).write_text(Config(setup.id, recipient(host)).in_shell())
    assert found(host) == ("safe", "")
    os.unlink(root / kernel._MASKED[2])
    assert found(host) == ("note", "unlock dump kernel enable /var/lib/unlock/partition")
    with pytest.raises(Usage):
        kernel.disable(host.paths, frozenset())
    kernel.disable(host.paths, frozenset(("plain-dumps",)))
    assert not any((root / name).is_symlink() for name in kernel._MASKED) and kernel.read_setup(host.paths) is None
    kernel.disable(host.paths, frozenset(("plain-dumps",)))
    os.unlink(unit)
    shown = kernel.read_kernel_protection(host.paths)
    assert (shown.encrypted, shown.loaded, shown.generation) == (True, True, 1), "until the next boot"


def test_a_test_opens_what_the_crash_kernel_would_encrypt(host: Host) -> None:
    set_up(host)
    root = Path(host.paths.root)
    with host.work() as work, pytest.raises(Refused) as caught:
        kernel.test(work)
    assert caught.value.code == "plain-dumps"
    (root / "sys/kernel").mkdir(parents=True, exist_ok=True)
    (root / "sys/kernel/kexec_crash_size").write_text(f"{256 << 20}\n")
    (root / "sys/kernel/kexec_crash_loaded").write_text("1\n")
    (root / "proc/meminfo").write_text("MemTotal: 1000 kB\nMemFree: 300 kB\nCached: 100 kB\nAnonPages: 50 kB\n")
    setup = kernel.read_setup(host.paths)
    assert setup
    loaded = Path(host.paths.of_this_boot("crash-kernel"))
    loaded.write_text(Config(setup.id, recipient(host)).in_shell())
    with host.work() as work:
        done = kernel.test(work)
    assert (done.generation, done.memory, done.estimate) == (1, 256 << 20, 550 << 10)
    identity = subprocess.run(["age-keygen"], capture_output=True, text=True, check=True).stdout
    other = next(line.split()[-1] for line in identity.splitlines() if "public key" in line)
    loaded.write_text(Config(setup.id, dump_key.Recipient(1, other)).in_shell())
    with host.work() as work, pytest.raises(Exception, match="which is not here"):
        kernel.test(work)


def test_no_crash_kernel_starts_beside_a_tpm_that_is_not_locked(host: Host) -> None:
    set_up(host)
    root = Path(host.paths.root)
    (root / "sys/kernel").mkdir(parents=True, exist_ok=True)
    (root / "sys/kernel/kexec_crash_size").write_text(f"{256 << 20}\n")
    Path(host.paths.of_this_boot("uncapped")).write_text("tpmrm0\n")
    with pytest.raises(Refused) as caught:
        kernel.boot(host.paths)
    assert caught.value.code == "not-capped"


def test_the_setup_is_read_as_it_is_written_or_not_at_all(host: Host) -> None:
    set_up(host)
    path = Path(host.paths.kernel_dump)
    good = json.loads(path.read_text())
    wrong: list[object] = [
        [],
        {},
        {**good, "id": "x"},
        {**good, "more": 1},
        {**good, "device": 5},
        {**good, "version": "1"},
    ]
    for bad in wrong:
        path.write_text(json.dumps(bad))
        with pytest.raises(Malformed):
            kernel.read_setup(host.paths)
    path.unlink()
    os.mkfifo(path)
    with pytest.raises(Malformed):
        kernel.read_setup(host.paths)
    path.unlink()
    path.write_text(json.dumps({**good, "version": 2}))
    with pytest.raises(NewerFormat):
        kernel.read_setup(host.paths)
