# SPDX-License-Identifier: Apache-2.0
"""The recovery shell's screen and words, `unlock open`, and how a recovery key is asked for. Real headers."""

import json
import os
import shutil
import socket
import subprocess
import sys
import threading
import time
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path
from random import Random
from typing import Any

import pytest

from tests.flowfixture import HOST, Host
from tests.formats import a_report
from tests.test_disk import edit
from tests.test_recovery_rotate import change_flags
from unlock import ask, cli
from unlock.boot import activation, gate, plot, prompt, shell
from unlock.disks import udev
from unlock.errors import Malformed, NotOurs, Refused, Tampered, UnlockError, Usage
from unlock.host import keyring, report, report_file, this_boot
from unlock.keys import delivery, recovery_key
from unlock.operations import recovery, status
from unlock.paths import Paths
from unlock.secret import Secret
from unlock.tpm import pcr_policy

TOP = Path(__file__).parents[1]


@pytest.fixture
def paths(tmp_path: Path) -> Paths:
    paths = Paths(str(tmp_path / "root"))
    os.makedirs(paths.run)
    return paths


def refused(count: int = 2, verdict: str = "pcr-mismatch") -> report.Report:
    """What early boot leaves when the TPM says no."""
    record = report.Report("early-boot")
    record.facts = report.BootFacts(cap_pcr_before=pcr_policy.UNSET.hex())
    record.set_verdict(verdict, "the TPM refuses: PCR values do not match")
    for number in range(count):
        record.set_disk(f"/dev/sd{chr(97 + number)}", "no-key", record.describe_verdict(), uuid=f"uuid-{number}")
    return record


def told(paths: Paths, record: report.Report | None) -> list[str]:
    if record:
        this_boot.write_report(paths, record, "report.json")
    lines = shell.screen_lines(paths)
    assert len(lines) <= 24
    assert all(len(line) <= 80 and line.isprintable() for line in lines)
    return lines


# The screen


def test_the_screen_says_what_happened_and_what_to_type(paths: Paths) -> None:
    text = "\n".join(told(paths, refused()))
    for words in (
        "pcr-mismatch",
        "2 without a key: /dev/sda /dev/sdb",
        "unlock status",
        "unlock explain",
        "unlock open --recovery",
        "exit",
    ):
        assert words in text


def test_a_later_prompt_shows_what_is_new_alone(paths: Paths) -> None:
    record = refused()
    told(paths, record)
    assert told(paths, record)[0] == "new       nothing since the last prompt"
    record.set_disk("/dev/sdc", "tampered", "header or token are not what this host wrote", name="data-c")
    again = told(paths, record)
    assert again[0] == "new       /dev/sdc data-c: header or token are not what this host wrote"
    assert not any("sda" in line for line in again)


@pytest.mark.parametrize("count", [1, 30, 300])
def test_it_fits_the_smallest_console_whatever_the_disks_say(paths: Paths, count: int) -> None:
    record = refused(count)
    for number in range(count):
        record.set_disk(f"/dev/vd{number}", "failed", "\x1b[2Jbad " * 40, name="x" * 64)
    lines = told(paths, record)
    assert any("exit" in line for line in lines), "what to type is never cut off"
    assert count < 7 or any(line.endswith("more: unlock status") for line in lines)


def test_an_ordinary_host_sees_nothing(paths: Paths) -> None:
    assert told(paths, refused(0, "no-slot")) == []


def test_without_a_report_it_still_says_what_to_type(paths: Paths) -> None:
    lines = told(paths, None)
    assert "left no report" in lines[0]
    assert all(line in lines for line in shell.HELP.splitlines()), "none is cut off"


def mangled(value: Any, random: Random) -> Any:
    """The value with one thing in it removed or replaced."""
    if isinstance(value, (dict, list)) and value and random.random() < 0.8:
        value = value.copy()
        key = random.choice(list(value) if isinstance(value, dict) else range(len(value)))
        if random.random() < 0.2:
            del value[key]
        else:
            value[key] = mangled(value[key], random)
        return value
    return random.choice([None, True, -1, 1e300, 10**15, "", "a b", "\ud800", [], [1], {}, {"a": 1}])


def test_a_mangled_report_is_refused_or_shown(paths: Paths) -> None:
    random, whole = Random(1), report_file.to_json(a_report())
    shown = 0
    for _ in range(3000):
        text = json.dumps(mangled(whole, random)).encode()
        Path(paths.of_this_boot("report.json")).write_bytes(text)
        if found := this_boot.read_early_report(paths):
            shown += 1
            for text_of in (status.boot_to_text, plot.svg, lambda found: shell.status_text(found, [])):
                text_of(found).encode()
            report_file.encode(found)
            told(paths, None)
    assert shown > 100
    assert report_file.encode(report_file.decode(report_file.encode(a_report()), "")) == report_file.encode(a_report())


# Its words


def test_status_shows_what_headers_say(tmp_path: Path, key_cache: None) -> None:
    host = Host(tmp_path, 2)
    record = refused(0)
    disks = [udev.Disk(str(image), image.name, "", "", "", 0, 0) for image in host.disks]
    record.set_disk(disks[0].node, "no-key", record.describe_verdict(), uuid="x")
    host.disks[1].write_bytes(bytes(1 << 20))
    this_boot.write_report(host.paths, record, "report.json")
    found = shell.read_disks(record, lambda: disks)
    assert [(each.name, each.group, each.state) for each in found] == [
        ("data-0", "data", "no-key"),
        ("", "", "damaged"),
    ]
    assert "pcr-mismatch" in shell.status_text(record, found)


def test_words_that_do_not_work_in_it_name_help(paths: Paths, capsys: pytest.CaptureFixture[str]) -> None:
    for words in ([], ["help"], ["status", "--help"], ["explain", "--help"], ["open", "--help"]):
        assert shell.shell(paths, words) == 0
        assert "unlock open --recovery" in capsys.readouterr().out
    for words in (["rekey"], ["status", "--boot"], ["open", "--recovery", "data"], ["explain", "x"]):
        with pytest.raises(Usage):
            shell.shell(paths, words)
    with pytest.raises(Refused):
        shell.shell(paths, ["open"])


def test_open_in_it_takes_a_file_and_tells_a_typo_and_a_key_that_opens_nothing(paths: Paths, tmp_path: Path) -> None:
    file = tmp_path / "key"
    key = bytearray(bytes(recovery_key.new()))
    recovery_key.write_new_file(str(file), Secret(key))
    with pytest.raises(NotOurs):
        shell.shell(paths, ["open", "--recovery", "--recovery-key-file", str(file)])
    assert os.path.exists(paths.of_this_boot("recovered"))
    key[10] = key[10] ^ 1
    file.write_bytes(key)
    with pytest.raises(Usage, match="group 2 "):
        shell.shell(paths, ["open", "--recovery", "--recovery-key-file", str(file)])


@pytest.mark.usefixtures("unmeasured")
def test_without_the_cli_the_same_program_is_the_shell(tmp_path: Path) -> None:
    """As in the image: no cli, and none of what is heavy is imported for its words."""
    package = tmp_path / "unlock"
    for source in (TOP / "unlock").rglob("*.py"):
        target = package / source.relative_to(TOP / "unlock")
        if "cli" not in source.parts:
            target.parent.mkdir(exist_ok=True, parents=True)
            target.write_bytes(source.read_bytes())
    code = (
        "import sys; sys.path.insert(0, sys.argv.pop(1)); from unlock.__main__ import main; main(); print(*sys.modules)"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, str(tmp_path), "help"], capture_output=True, text=True, check=True
    )
    assert "exit" in done.stdout
    loaded = set(done.stdout.splitlines()[-1].split())
    assert not {"argparse", "asyncio", "logging", "importlib.metadata", "kmip", "tomllib"} & loaded


def test_help_in_the_booted_system_names_every_command(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.cli(["help"]) == 0
    said = capsys.readouterr().out
    assert all(word in said for word in ("open", "recovery", "status", "explain"))


# Open


def look(host: Host, image: Path, *keys: Secret) -> report.Report:
    """The disk under its recovery key, without device-mapper."""
    record = report.Report("open data")
    groups = activation.GroupOpener(HOST, gate._by_recovery_key(*keys), record, only="data")
    groups.add_disk(udev.Disk(str(image), image.name, "", "", "", 0, 0))
    groups.read_headers()
    groups.wipe()
    return record


class Slow:
    """Many disks, as `open_present` sees them: there is work for some seconds, each step of it in time."""

    def __init__(self, seconds: float) -> None:
        self.end = time.monotonic() + seconds
        self.left = True

    def add_present_disks(self, monitor: udev.Monitor) -> None: ...
    def add_disk(self, disk: udev.Disk) -> None: ...
    def take_answers(self) -> None: ...
    def start_complete_groups(self, settled: bool) -> None: ...
    def wipe(self) -> None: ...
    def worker_fds(self) -> list[int]:
        return []

    def is_busy(self) -> bool:
        return time.monotonic() < self.end

    def stop(self, patience: float) -> None:
        self.left = self.is_busy()


def test_many_disks_may_take_longer_than_one(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(activation, "ACTIVATION_TIMEOUT", 0.3)
    disks = Slow(1.5)
    activation.open_present(disks, udev.Monitor())  # type: ignore[arg-type]
    assert not disks.left


def test_open_authenticates_the_header_before_it_opens(tmp_path: Path, key_cache: None) -> None:
    host = Host(tmp_path, 1)
    (image,) = host.disks
    wrong = look(host, image, recovery_key.new())
    assert look(host, image, host.recovery).disks[str(image)].outcome == "waiting"
    assert isinstance(gate._make_error(host.paths, wrong, "data"), NotOurs)
    change_flags(image)
    changed = look(host, image, host.recovery)
    assert changed.disks[str(image)].outcome == "tampered"
    trouble = gate._make_error(host.paths, changed, "data")
    assert isinstance(trouble, Tampered)
    assert "data-0" in str(trouble)


def without_token(image: Path) -> None:
    def change(fields: dict[str, Any]) -> None:
        fields["segments"]["0"]["encryption"] = "cipher_null-ecb"
        fields["tokens"].clear()

    edit(str(image), change)


def another_host(image: Path) -> None:
    edit(str(image), lambda fields: fields["tokens"][min(fields["tokens"])].update(host="0" * 32))


def uuid_of_its_own(image: Path) -> None:
    """The disk is known by its serial number."""
    without_token(image)
    rename(image)


def rename(image: Path) -> None:
    subprocess.run(["cryptsetup", "luksUUID", "-q", image, "--uuid", str(uuid.uuid4())], check=True)


@pytest.mark.parametrize("change", [without_token, another_host, uuid_of_its_own])
def test_a_member_without_its_token_is_told_as_altered(
    tmp_path: Path, key_cache: None, change: Callable[[Path], None]
) -> None:
    """By the recovery key and by the persistence key; a disk of the same kind that is no member is left alone."""
    host = Host(tmp_path, 2)
    state = host.state
    first, second = state.groups["data"].members
    state.groups["data"] = state.groups["data"]._replace(members=(first._replace(serial="S1"), second))
    state.save()
    image, stranger = host.disks[0], tmp_path / "stranger"
    shutil.copyfile(image, stranger)
    change(image)
    without_token(stranger)
    rename(stranger)
    for unwrap in (gate._by_recovery_key(host.recovery), gate.make_unwrap(host.paths, "data", report.Report("x"), 0)):
        record = report.Report("open data")
        opener = gate._opener(host.state, "data", unwrap, record)
        for path, serial in ((image, "S1"), (stranger, "S2")):
            opener.add_disk(udev.Disk(str(path), path.name, "", serial, "", 0, 0))
        opener.read_headers()
        opener.wipe()
        assert (record.outcome(str(image)), record.outcome(str(stranger))) == ("altered", "foreign")
        trouble = gate._make_error(host.paths, record, "data")
        assert isinstance(trouble, Tampered)
        assert f"data-0 ({image}): its header is not the one that this host wrote" in str(trouble)


def test_a_member_that_was_away_at_a_rotation_opens_beside_the_others_when_both_keys_are_given(
    tmp_path: Path, key_cache: None
) -> None:
    host = Host(tmp_path, 2)
    recovery.test_recovery_key(host.paths, host.recovery, host.look)
    away = host.disks.pop()
    recovery.rotate_recovery_key(host.paths, delivery.Keeper(str(tmp_path / "new")), host.look)
    new = delivery.read_recovery_key(str(tmp_path / "new"))
    outcome = {
        (image.name, len(keys)): look(host, image, *keys).disks[str(image)].outcome
        for image in (*host.disks, away)
        for keys in ((new,), (new, host.recovery), (host.recovery, new, recovery_key.new()))
    }
    assert outcome == {
        ("data-0", 1): "waiting",
        ("data-0", 2): "waiting",
        ("data-0", 3): "waiting",
        ("data-1", 1): "no-key",
        ("data-1", 2): "waiting",
        ("data-1", 3): "waiting",
    }
    change_flags(away)
    assert look(host, away, new, host.recovery).disks[str(away)].outcome == "tampered"


def test_open_says_at_once_what_is_missing(tmp_path: Path, key_cache: None) -> None:
    host = Host(tmp_path, 1)
    for keys in ((), (host.recovery,)):
        with pytest.raises(UnlockError, match=r"data-0 .* is missing"):
            gate.open_group(host.paths, "data", *keys)
    with pytest.raises(Usage, match="no group other"):
        gate.open_group(host.paths, "other")
    keyring.flush()
    with pytest.raises(UnlockError) as caught:
        gate.open_group(host.paths, "data")
    assert (caught.value.code, caught.value.hint) == ("no-key", "unlock open data --recovery")
    with pytest.raises(UnlockError, match="missing"):
        gate.open_group(host.paths, "data", host.recovery)


def test_a_group_that_is_wrong_in_unlock_toml_stops_no_other(tmp_path: Path, key_cache: None) -> None:
    host = Host(tmp_path, 1)
    host.add_group("bad", 1)
    host.configure(more='[group.data]\nmount = "/srv/data"\n[group.bad]\nmount = "/srv/bad"\noptions = ["noatime"]\n')
    for operation in (gate.open_group, gate.gate):
        with pytest.raises(Malformed, match=r"group\.bad\.options") as wrong:
            operation(host.paths, "bad")
        assert wrong.value.hint == "edit /etc/unlock/unlock.toml"
    with pytest.raises(UnlockError, match=r"data-0 .* is missing"):
        gate.open_group(host.paths, "data")
    found = status.read_status(host.paths)
    assert [group.mount for group in found.groups] == ["/srv/data", ""]
    assert status.to_json(found)["wrong_settings"] == ["unlock.toml: group.bad.options is not a str"]
    assert "group.bad.options is not a str: edit /etc/unlock/unlock.toml" in status.to_text(found)
    host.configure(more="[group.data\n")
    assert "unlock.toml" in status.to_text(status.read_status(host.paths))


# Asking

ASK = """
import os, sys
from unlock import ask
from unlock.errors import Usage
from unlock.keys import delivery
try:
    print(bytes(eval(sys.argv[1])).decode())
except Usage as error:
    print(error, "/", error.hint)
"""


def asked(expression: str, **environment: str) -> str:
    """In a process without a terminal."""
    done = subprocess.run(
        [sys.executable, "-c", ASK, expression],
        env={**os.environ, "PYTHONPATH": str(TOP), **environment},
        capture_output=True,
        text=True,
        start_new_session=True,
        stdin=subprocess.DEVNULL,
        check=True,
    )
    return done.stdout.strip()


def test_a_credential_is_taken_without_a_terminal(tmp_path: Path) -> None:
    key = recovery_key.new()
    (tmp_path / "unlock.recovery-key").write_bytes(bytes(key).replace(b"-", b" ") + b"\n")
    assert asked("delivery.read_recovery_key()", CREDENTIALS_DIRECTORY=str(tmp_path)) == bytes(key).decode()


def test_who_mistypes_the_recovery_key_is_asked_again(capsys: pytest.CaptureFixture[str]) -> None:
    key = recovery_key.new()
    answers = [b"1", bytes(key)[::-1], bytes(key)]
    assert delivery.type_recovery_key(lambda: Secret(answers.pop(0))) == key
    assert "1 digits were typed" in capsys.readouterr().err and not answers
    asked = []
    with pytest.raises(Usage, match="digits were typed"):
        delivery.type_recovery_key(lambda: asked.append(1) or Secret(b"1"))  # type: ignore[func-returns-value]
    assert len(asked) == 5


def test_without_terminal_file_or_credential_the_flag_is_named() -> None:
    for expression in ("delivery.read_recovery_key()", "ask.anyone('recovery key', '--recovery-key-file')"):
        assert "--recovery-key-file FILE" in asked(expression)


def test_the_kernel_command_line_is_no_place_for_a_key() -> None:
    readers = {path.stem for path in (TOP / "unlock").rglob("*.py") if "cmdline" in path.read_text()}
    assert readers == {
        "evidence",
        "diagnosis",
        "baseline",
        "causes",
        "crash_kernel",
        "describe_ipl",
        "efistub",
        "paths",
        "uki_replay",
        "unmeasured",
    }


@pytest.fixture
def agent() -> Iterator[list[str]]:
    """One of systemd's agents that answers every question; what it was asked."""
    folder = Path("/run/systemd/ask-password")
    made = not folder.exists()
    folder.mkdir(parents=True, exist_ok=True)
    questions: list[str] = []
    stop = threading.Event()

    def answer() -> None:
        while not stop.is_set():
            for path in folder.glob("ask.*"):
                if path.name in questions:
                    continue
                text = path.read_text()
                if "Socket=" in text and "unlock:" in text:
                    questions.extend((path.name, text))
                    to = next(line[7:] for line in text.splitlines() if line.startswith("Socket="))
                    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as connection:
                        connection.sendto(b"+the answer", to)
            time.sleep(0.05)

    thread = threading.Thread(target=answer)
    thread.start()
    yield questions
    stop.set()
    thread.join()
    if made:
        folder.rmdir()


@pytest.mark.skipif(not os.path.exists("/usr/bin/systemd-ask-password"), reason="not installed: systemd")
def test_systemds_agents_are_asked_without_echo(agent: list[str]) -> None:
    assert asked("ask._run_prompt([*ask._AGENTS, 'unlock: recovery key:'])") == "the answer"
    assert "Id=unlock:recovery-key" in agent[1]
    assert "Echo=1" not in agent[1]


def test_the_command_line_tells_test_results_and_an_exit_status(
    tmp_path: Path, key_cache: None, capsys: pytest.CaptureFixture[str]
) -> None:
    """No disk is marked here by udev, so all are absent."""
    host = Host(tmp_path, 2)
    recovery_key.write_new_file(str(tmp_path / "key"), host.recovery)
    options = cli._parser().parse_args(["recovery", "test", "--recovery-key-file", str(tmp_path / "key"), "--json"])
    assert options.run(host.paths, options) == 1
    said = json.loads(capsys.readouterr().out)
    assert [each["outcome"] for each in said["disks"]] == ["absent", "absent"]
    options = cli._parser().parse_args(["recovery", "rotate", "--escrow-to", "x"])
    with pytest.raises(Usage, match="escrow needs"):
        options.run(host.paths, options)
    assert ask.from_file(str(tmp_path / "key")) == host.recovery


def test_the_prompt_says_what_follows_where_nobody_knows_the_key(paths: Paths) -> None:
    assert prompt.what_enter_does(paths, tampered=False).startswith("to give up: no other prompt follows")
    Path(paths.of_this_boot("lines")).write_text("root\n")
    assert prompt.what_enter_does(paths, tampered=False).startswith("for the stock prompt")
    assert prompt.what_enter_does(paths, tampered=True) == "to give up"
    this_boot.mark(paths, "uncapped")
    for tampered in (False, True):
        assert prompt.what_enter_does(paths, tampered).startswith("to power off: the TPM did not confirm")
