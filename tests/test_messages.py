# SPDX-License-Identifier: Apache-2.0
"""The MESSAGE_IDs: one table, explained in the catalog and in unlock-journal(7); what operations write, and a journald
that gets it."""

import ast
import json
import os
import re
import shlex
import socket
import subprocess
import sys
import tempfile
from base64 import b64encode
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.dumps import MOVED
from tests.eventlogs import Boot
from tests.flowfixture import Host
from tests.hostfixture import Machine
from tests.lab.kmipliar import Liar
from tests.test_man import COMMANDS, PAGES
from unlock import journald, messages
from unlock.host import keyring, report, this_boot
from unlock.keys import delivery
from unlock.messages import Message
from unlock.operations import cache, policy, recovery, rekey, sync
from unlock.paths import Paths
from unlock.predict.allowed_states import Pin
from unlock.secret import Secret

TOP = Path(__file__).parents[1]
CATALOG = TOP / "system/unlock.catalog"
ALL = {name: each for name, each in vars(messages).items() if isinstance(each, Message)}
BY_ID = {each.id: name for name, each in ALL.items()}


def fields_of(message: Message) -> set[str]:
    return {f"UNLOCK_{each}" for each in message.fields.split()}


# The table, the catalog and the page


def entries() -> dict[str, tuple[dict[str, str], str]]:
    """Id -> the head of an entry of the catalog, and its text."""
    found = {}
    for part in re.split(r"^-- ", CATALOG.read_text(), flags=re.MULTILINE)[1:]:
        head, _, text = part.partition("\n\n")
        message_id, *lines = head.splitlines()
        assert message_id not in found
        found[message_id] = (dict(line.split(": ", 1) for line in lines), text)
    return found


def test_every_id_is_in_the_catalog_and_in_the_page_and_no_other() -> None:
    assert len(BY_ID) == len(ALL) and all(re.fullmatch("[0-9a-f]{32}", each) for each in BY_ID)
    assert entries().keys() == BY_ID.keys()
    assert set(re.findall(r"^\*\*([0-9a-f]{32})\*\*$", PAGES["unlock-journal.7"], re.MULTILINE)) == BY_ID.keys()
    in_scripts = re.findall(r"\b[0-9a-f]{32}\b", (TOP / "system/dump").read_text())
    assert [BY_ID[each] for each in in_scripts] == ["DUMP_WRITTEN", "DUMP_LOST"]


@pytest.mark.parametrize("name", ALL)
def test_an_entry_of_the_catalog_explains_and_says_what_to_type(name: str) -> None:
    head, text = entries()[ALL[name].id]
    assert head.keys() == {"Subject", "Defined-By", "Documentation"}
    assert head["Documentation"] == "man:unlock-journal(7)"
    assert {f"UNLOCK_{each}" for each in re.findall(r"@UNLOCK_([A-Z_]+)@", head["Subject"] + text)} <= fields_of(
        ALL[name]
    )
    typed = re.findall(r"\b(?:unlock|cryptsetup) [a-z]+(?: [a-z]+){0,2}", text)
    assert typed
    for each in typed:
        program, *words = each.split()
        assert program == "cryptsetup" or any(tuple(words[:size]) in COMMANDS for size in (1, 2, 3)), each


@pytest.mark.parametrize("name", ALL)
def test_the_page_names_the_fields_of_a_message(name: str) -> None:
    text = PAGES["unlock-journal.7"].partition(f"**{ALL[name].id}**\n:   ")[2].partition("\n\n")[0]
    _, _, listed = " ".join(text.split()).partition("Fields: ")
    assert set(re.findall(r"UNLOCK_[A-Z]+", listed)) == fields_of(ALL[name])


def records() -> Iterator[tuple[str, set[str]]]:
    """The message and the fields of each call that writes one."""
    for path in (TOP / "unlock").rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Call) and ast.unparse(node.func) == "journald.record":
                yield ast.unparse(node.args[1]), {f"UNLOCK_{each.arg}".upper() for each in node.keywords}


def test_every_message_is_written_somewhere_with_fields_that_it_has() -> None:
    written = set()
    for message, fields in records():
        name = message.removeprefix("messages.")
        if name == "message":  # recovery._record
            assert fields <= fields_of(messages.RECOVERY_KEY_ROTATED) & fields_of(messages.RECOVERY_KEY_WRITTEN)
            continue
        written.add(name)
        assert fields <= fields_of(ALL[name]), name
    early = (TOP / "unlock/boot/journald.py").read_text() + (TOP / "unlock/operations/recovery.py").read_text()
    written |= set(re.findall(r"messages\.([A-Z_]+)\b", early)) | {"DUMP_WRITTEN", "DUMP_LOST"}
    assert written == ALL.keys()


def test_journalctl_reads_the_catalog(tmp_path: Path) -> None:
    for name in ("usr/lib", "var/lib"):
        (tmp_path / name / "systemd/catalog").mkdir(parents=True)
    (tmp_path / "usr/lib/systemd/catalog/unlock.catalog").write_bytes(CATALOG.read_bytes())
    journalctl = ["journalctl", f"--root={tmp_path}"]
    made = subprocess.run([*journalctl, "--update-catalog"], capture_output=True, text=True, check=True)
    assert not made.stderr
    shown = subprocess.run([*journalctl, "--dump-catalog"], capture_output=True, text=True, check=True).stdout
    assert set(re.findall(r"^-- ([0-9a-f]{32})$", shown, re.MULTILINE)) == BY_ID.keys()


# What operations write


class Journal:
    """What a journald gets, of a host whose socket it is."""

    def __init__(self, paths: Paths) -> None:
        self._folder = tempfile.TemporaryDirectory(dir="/tmp")  # the path of a socket is short
        paths.journald = f"{self._folder.name}/socket"
        self._socket = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
        self._socket.bind(paths.journald)
        self._socket.setblocking(False)
        self.raw = b""

    def read(self) -> list[dict[str, str]]:
        """The entries since the last time, and what each is called."""
        found: list[dict[str, str]] = []
        while True:
            try:
                data = self._socket.recv(1 << 18)
            except BlockingIOError:
                return found
            self.raw += data
            entry = dict(line.split("=", 1) for line in data.decode().removesuffix("\n").split("\n"))
            assert entry["SYSLOG_IDENTIFIER"] == "unlock" and entry["MESSAGE"]
            found.append({"is": BY_ID[entry["MESSAGE_ID"]], **entry})

    def close(self) -> None:
        self._socket.close()
        self._folder.cleanup()

    def __enter__(self) -> "Journal":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def kinds(journal: Journal) -> list[str]:
    return [each["is"] for each in journal.read()]


@pytest.mark.usefixtures("key_cache")
def test_what_changes_keys_and_policies_is_recorded_once_and_without_a_secret(tmp_path: Path) -> None:
    host = Machine(tmp_path, Boot("direct"), disks=2)
    tcti, new_key = host.chip.tcti, str(tmp_path / "new-key")
    with Journal(host.paths) as journal:
        secrets = [host.persistence, host.recovery]
        rekey.rekey(host.paths, "data", host.look)
        (entry,) = journal.read()
        assert (entry["is"], entry["UNLOCK_GROUP"], entry["UNLOCK_GENERATION"]) == ("KEK_REPLACED", "data", "2")
        assert entry["UNLOCK_DISKS"].count(", ") == 1 and "UNLOCK_BEHIND" not in entry

        policy.open_window(host.paths, 1, (), tcti)
        (entry,) = journal.read()
        assert (entry["is"], entry["UNLOCK_PCRS"], entry["UNLOCK_REBOOTS"]) == ("WINDOW_OPENED", "9, 15", "1")
        policy.close_window(host.paths, tcti, look=host.look)
        assert kinds(journal) == ["WINDOW_CLOSED", "PERSISTENCE_KEY_REPLACED"]
        policy.set_policy(host.paths, pin=Pin(Secret(b"a PIN of 4711")), tcti=tcti, look=host.look)
        entry, _ = journal.read()
        assert (entry["is"], entry["UNLOCK_PIN"]) == ("POLICY_SET", "yes")

        recovery.test_recovery_key(host.paths, host.recovery, host.look)
        recovery.rotate_recovery_key(host.paths, delivery.Keeper(new_key), host.look)
        secrets.append(delivery.read_recovery_key(new_key))
        assert kinds(journal) == ["RECOVERY_KEY_ROTATED"]
        recovery.renew_keyslots(host.paths, secrets[-1], host.look)
        assert kinds(journal) == ["RECOVERY_KEY_WRITTEN"]
        rekey.rekey_fresh(host.paths, "", tcti, Secret(b""), host.look)
        assert kinds(journal) == ["PERSISTENCE_KEY_REPLACED", "KEK_REPLACED"]
        for name in keyring.names():
            secrets.append(keyring.get(name))
        cache.flush(host.paths)
        assert kinds(journal) == ["CACHE_FLUSHED"]
        for each in (bytes(secret) for secret in secrets):
            assert each not in journal.raw
            assert each.hex().encode() not in journal.raw and b64encode(each) not in journal.raw
        assert b"a PIN of" not in journal.raw
    host.close()


@pytest.mark.usefixtures("key_cache")
def test_what_a_key_manager_changes_is_recorded_and_what_it_does_not_is_not(tmp_path: Path, kms: Liar) -> None:
    host = Host(tmp_path, 2, kms)
    with Journal(host.paths) as journal:
        sync.sync(host.paths, host.look)
        assert not journal.read()
        kms.replace(kms.keys[host.group.kek.rpartition("/")[2]])
        sync.sync(host.paths, host.look)
        (entry,) = journal.read()
        assert (entry["is"], entry["UNLOCK_GENERATION"]) == ("KEK_REPLACED", "2")
    keyring.flush()


def test_a_journal_that_takes_nothing_or_is_not_there_stops_nothing(tmp_path: Path) -> None:
    paths = Paths(str(tmp_path))
    journald.record(paths, messages.CACHE_FLUSHED, "x")
    with Journal(paths) as journal:
        for _ in range(2000):  # its queue is full long before
            with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as other:
                other.setblocking(False)
                try:
                    other.sendto(b"MESSAGE=x\n", paths.journald)
                except BlockingIOError:
                    break
        else:
            pytest.fail("the queue takes everything")
        journald.record(paths, messages.CACHE_FLUSHED, "x")
        journal.close()
    Path(paths.journald).parent.mkdir(parents=True)
    Path(paths.journald).touch()
    journald.record(paths, messages.CACHE_FLUSHED, "x")


def test_a_value_that_somebody_else_chose_is_one_value(tmp_path: Path) -> None:
    with Journal(paths := Paths(str(tmp_path))) as journal:
        journald.record(paths, messages.DISK_ERASED, "a\nPRIORITY=0", disk="x\nMESSAGE_ID=0\x1b[31m")
        (entry,) = journal.read()
        assert entry["PRIORITY"] == "5" and entry["UNLOCK_DISK"] == "x?MESSAGE_ID=0?[31m"


# A journald

STORY = """
set -e
mount -t tmpfs tmpfs /run
mkdir -p /run/systemd/journal /run/log/journal /run/catalog /run/database
cp {catalog} /run/catalog/
mount --bind /run/catalog /usr/lib/systemd/catalog
mount --bind /run/database /var/lib/systemd/catalog
/usr/lib/systemd/systemd-journald &
journald=$!
trap 'kill $journald' EXIT
for try in $(seq 100); do [ -S /run/systemd/journal/socket ] && break; sleep 0.1; done
{python} -c {early}
{dump} $$ 1000 1000 11 1700000000 0 host 1 '' </dev/null
journalctl --sync
journalctl --update-catalog
journalctl --directory /run/log/journal -t unlock -o json >{out}/json
journalctl --directory /run/log/journal -t unlock -x --no-pager >{out}/text
journalctl --directory /run/log/journal -u unlock-early-boot -o cat --no-pager >{out}/unit
"""
EARLY = """
import sys
sys.path.insert(0, {top!r})
from unlock import journald, messages
from unlock.boot.journald import write_early_report
from unlock.paths import Paths
paths = Paths({root!r})
paths.journald = "/run/systemd/journal/socket"
write_early_report(paths)
journald.record(paths, messages.GROUP_DEGRADED, "group data is open degraded, without data-b", group="data")
"""


def test_journalctl_x_explains_what_a_journald_got_and_says_what_to_type(tmp_path: Path) -> None:
    """A journald in mounts of its own gets the record of early boot, an operation's entry, and a crash's."""
    paths = Paths(str(tmp_path / "root"))
    os.makedirs(paths.run)
    early = report.Report("early-boot")
    early.set_verdict("pcr-mismatch", "PCR 9 differs")
    early.set_group("data", "degraded", present=1, members=2, mappings=("data-a",), kind="btrfs", generation=7)
    this_boot.publish(paths, early)
    text = (TOP / "system/dump").read_text()
    for name in set(MOVED) - {"/run/systemd"}:
        text = text.replace(name, f"{tmp_path}{name}").replace(f"{tmp_path}{tmp_path}", str(tmp_path))
    dump = tmp_path / "dump"
    dump.write_text(text)
    dump.chmod(0o755)
    story = STORY.format(
        catalog=CATALOG,
        python=sys.executable,
        early=shlex.quote(EARLY.format(top=str(TOP), root=paths.root)),
        dump=dump,
        out=tmp_path,
    )
    subprocess.run(["unshare", "--mount", "--propagation", "private", "bash", "-c", story], check=True, timeout=60)
    found = [json.loads(each) for each in (tmp_path / "json").read_text().splitlines()]
    assert [BY_ID[each["MESSAGE_ID"]] for each in found] == [
        "VERDICT",
        "BOOT_REFUSED",
        "GROUP",
        "GROUP_DEGRADED",
        "DUMP_LOST",
    ]
    assert found[2]["UNLOCK_OUTCOME"] == "degraded" and found[4]["UNLOCK_DETAIL"].endswith("dump-recipient is no file")
    assert found[4]["PRIORITY"] == "3"
    shown = (tmp_path / "text").read_text()
    for words in (
        "Subject: The TPM has refused this boot: pcr-mismatch",
        "unlock explain",
        "unlock group heal data",
        "Are dumps kept at all? unlock dump test",
    ):
        assert words in shown
    assert (tmp_path / "unit").read_text().count("\n") == 3
