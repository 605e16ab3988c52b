# SPDX-License-Identifier: Apache-2.0
"""The report of early boot in the systemd journal, and the errors of units: a line for each, with what to type."""

import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from unlock import messages
from unlock.boot import gate, journald
from unlock.host import report, this_boot
from unlock.host.state import State
from unlock.paths import Paths

HINT = "from unlock import log; log.error('group data: no key', 'unlock open data --recovery')"


@pytest.fixture
def paths(tmp_path: Path) -> Paths:
    found = Paths(str(tmp_path))
    os.makedirs(found.run)
    os.makedirs(os.path.dirname(found.journald))
    return found


def written(paths: Paths) -> list[dict[str, str]]:
    """What a journald gets."""
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as journal:
        Path(paths.journald).unlink(missing_ok=True)
        journal.bind(paths.journald)
        assert journald.write_early_report(paths) == 0
        journal.setblocking(False)
        found: list[dict[str, str]] = []
        while True:
            try:
                text = journal.recv(1 << 16).decode()
            except BlockingIOError:
                return found
            assert text.endswith("\n")
            found.append(dict(line.split("=", 1) for line in text.removesuffix("\n").split("\n")))


def refused() -> report.Report:
    early = report.Report("early-boot")
    early.set_verdict("pcr-mismatch", "PCR 9 differs")
    early.set_disk("/dev/sda", "opened", uuid="11", name="data-a", group="data")
    early.set_disk("/dev/sdb", "tampered", "its header\nUNLOCK_OUTCOME=opened", uuid="22", name="data-b", group="data")
    early.set_disk("/dev/sdc", "foreign")
    early.set_group("data", "incomplete", present=1, members=2)
    early.add_event("not-capped", "tpmrm0 answers 0x101")
    early.add_event("tpm-again", "once")
    return early


def test_each_part_of_the_report_is_an_entry_with_its_fields(paths: Paths) -> None:
    this_boot.publish(paths, refused())
    found = written(paths)
    assert [(each["MESSAGE_ID"], each["PRIORITY"], each["MESSAGE"]) for each in found] == [
        (messages.VERDICT.id, "4", "pcr-mismatch: PCR 9 differs"),
        (messages.BOOT_REFUSED.id, "4", "the TPM refused this boot: unlock explain"),
        (messages.GROUP.id, "4", "group data: incomplete, 1 of 2 disks"),
        (messages.DISK.id, "6", "data-a (/dev/sda): opened: open"),
        (messages.DISK.id, "4", "data-b (/dev/sdb): tampered: its header?UNLOCK_OUTCOME=opened"),
        (messages.DISK.id, "6", "/dev/sdc: foreign: LUKS2 without an unlock token: left alone"),
        (messages.TROUBLE.id, "4", "not-capped: tpmrm0 answers 0x101"),
    ]
    assert found[4]["UNLOCK_OUTCOME"] == "tampered" and found[4]["UNLOCK_DISK"] == "data-b"
    assert found[5]["UNLOCK_DISK"] == "/dev/sdc" and "UNLOCK_UUID" not in found[5]
    assert found[2]["UNLOCK_GROUP"] == "data" and found[0]["UNLOCK_VERDICT"] == "pcr-mismatch"
    assert {each["OBJECT_SYSTEMD_UNIT"] for each in found} == {"unlock-early-boot.service"}
    assert not written(paths), "once in a boot"


def test_a_report_that_cannot_be_read_is_told(paths: Paths) -> None:
    Path(paths.of_this_boot("report.json")).write_text("{")
    assert [each["MESSAGE"] for each in written(paths)] == ["early boot left no report"]


def test_without_a_journal_the_unit_fails_and_may_run_again(paths: Paths) -> None:
    this_boot.publish(paths, refused())
    with pytest.raises(FileNotFoundError):
        journald.write_early_report(paths)
    assert len(written(paths)) == 7


def stderr_of_a_unit(stream: str = "") -> str:
    """What a unit writes to its stream to the journal; `stream` is JOURNAL_STREAM, if not that of the stream."""
    ours, theirs = socket.socketpair()
    with ours, theirs:
        found = os.fstat(theirs.fileno())
        env = {**os.environ, "JOURNAL_STREAM": stream or f"{found.st_dev}:{found.st_ino}"}
        subprocess.run([sys.executable, "-c", HINT], stderr=theirs.fileno(), env=env, check=True)
        theirs.shutdown(socket.SHUT_WR)
        text = b""
        while piece := ours.recv(4096):
            text += piece
        return text.decode()


def test_an_error_in_a_unit_is_one_line_of_the_journal_and_has_its_priority() -> None:
    assert stderr_of_a_unit() == "<3>unlock: group data: no key (hint: unlock open data --recovery)\n"
    assert stderr_of_a_unit("8:1") == "unlock: group data: no key\nhint: unlock open data --recovery\n"


def test_the_same_error_of_a_group_is_news_once(paths: Paths) -> None:
    said = [this_boot.is_news(paths, "data", each) for each in ("a longer line", "a longer line", "b", "b", "a")]
    assert said == [True, False, True, False, True]
    assert this_boot.is_news(paths, "other", "a")


def test_where_the_state_cannot_be_read_a_disk_that_appears_looks_at_every_failed_group(paths: Paths) -> None:
    """As where /var is not mounted: each then says what is wrong, once."""
    for name in ("data", "more"):
        this_boot.mark_failed(paths, name, [])
    assert gate._groups_to_heal(paths, "sda") == ["data", "more"] == gate._groups_to_heal(paths, gate.ANY_DISK)
    os.makedirs(os.path.dirname(paths.state))
    State.new(paths, "ab" * 16).save()
    assert gate._groups_to_heal(paths, "sda") == []
    assert gate._groups_to_heal(paths, gate.ANY_DISK) == ["data", "more"]
