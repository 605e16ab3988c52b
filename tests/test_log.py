# SPDX-License-Identifier: Apache-2.0
"""Words from an attacker reach a terminal as words: each line that is printed goes through one function."""

import ast
import os
import pty
import re
import subprocess
import sys
from pathlib import Path

import pytest

from tests.hostfixture import Machine
from tests.test_next_boots import LOADER, enrolled, uki, unified
from unlock import log
from unlock.operations import policy, predict
from unlock.operations.check.finding import result_of, to_text
from unlock.operations.check.tpm import check_next_boot, predict_or_error
from unlock.tpm import slots

EVIL = "\x1b[2J\x1b]0;x\x07\r\nsafe: what opens by itself now opens by itself at the next boot\n\u202egnp\x9b"
"""Clears the screen, sets a title, forges a line that says safe, turns the text around, and begins a sequence again."""
TOP = Path(__file__).parents[1]
PRINTS = {"print", "input", "write_text", "writelines"}


def clean(text: str) -> bool:
    return all(each.isprintable() for each in text.split("\n"))


@pytest.mark.parametrize("say", [log.error, log.note, log.show, lambda text: log.error("x", text)])
def test_no_line_is_more_than_a_line(say: object, capsys: pytest.CaptureFixture[str]) -> None:
    assert callable(say)
    say("file " + EVIL.replace("\n", "") + ".efi")
    printed = capsys.readouterr()
    assert clean(printed.out + printed.err) and ".efi" in printed.out + printed.err


def test_a_text_of_several_lines_has_no_more_of_them_than_were_joined(capsys: pytest.CaptureFixture[str]) -> None:
    log.show(log.join_lines([f"unsafe {EVIL}", "unsafe: something will not"]))
    printed = capsys.readouterr().out
    assert clean(printed) and len(printed.splitlines()) == 2
    table = log.columns([("STATE", "WHY"), ("1", EVIL)])
    assert len(log.join_lines(table).splitlines()) == 2 and clean("\n".join(table))
    log.show_json({"why": EVIL})
    assert clean(capsys.readouterr().out)


def test_on_a_pipe_lines_come_in_the_order_in_which_they_were_printed() -> None:
    """Python keeps what it writes to a pipe, unless it is flushed; `rebind` shows what is sealed before it says so."""
    work = "log.note('1'); log.show('2'); log.error('3', '4'); log.show_json({'version': 5}); log.note('6')"
    command = [sys.executable, "-c", f"from unlock import log; {work}"]
    done = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, check=True)
    assert re.findall(r"\d", done.stdout) == list("123456")


def test_nothing_but_the_door_prints() -> None:
    """So every string goes through it, wherever it comes from: a disk, the firmware, a key manager."""
    doors = {"log.py", "ask.py"}
    for path in (TOP / "unlock").rglob("*.py"):
        if path.name in doors and path.parent == TOP / "unlock":
            continue
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Name):
                assert node.id not in ("print", "input"), path
            if isinstance(node, ast.Attribute):
                assert node.attr not in ("stdout", "stderr") or ast.unparse(node.value) != "sys", path


def test_the_console_gets_one_line() -> None:
    ours, theirs = pty.openpty()
    try:
        os.write(theirs, f"unlock: {log.printable(EVIL)}\r\n".encode())
        assert clean(os.read(ours, 4096).decode().replace("\r", "").rstrip("\n"))
    finally:
        os.close(ours)
        os.close(theirs)


def test_the_name_of_a_file_on_the_efi_partition_forges_no_line(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    old, newer = unified(b"old"), unified(b"newer")
    linux, now = "boot/efi/EFI/Linux", uki(old, "debian-6.9.efi")
    host: Machine = enrolled(tmp_path, now, {f"{linux}/debian-6.9.efi": old, "boot/efi/EFI/BOOT/BOOTX64.EFI": LOADER})
    host.write(f"{linux}/debian-6.12{EVIL}.efi", newer)
    predict.predict_after_update(host.paths, host.chip.tcti)
    assert "debian-6.12" in (said := capsys.readouterr().err) and clean(said)
    assert not any(line.startswith("safe") for line in said.splitlines())
    shown = policy.table(policy.show(host.paths, host.chip.tcti))
    assert "debian-6.12" in shown and clean(shown)
    with host.chip.open() as tpm:
        record = slots.current_slot(tpm)[1]
    findings = check_next_boot(predict_or_error(host.paths, host.chip.tcti), record)
    text = to_text(result_of(list(findings)))
    assert "debian-6.12" in text and clean(text)
    host.close()
