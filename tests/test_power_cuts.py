# SPDX-License-Identifier: Apache-2.0
"""The power goes, or a process is killed, while disks are enrolled.

Every state that a header can be left in comes from a log of each write; the commands themselves are cut off in a VM.
"""

import re
import shutil
import subprocess
import time
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.lab import image, writes
from tests.lab.luks import DATA_OFFSET
from tests.lab.machine import RECOVERY, Machine
from tests.lab.stories import SECRETS, UNMEASURED, begun, outcomes, status, take_in_root, unmeasured
from unlock.disks import disk_keys, luks
from unlock.errors import Malformed, NotOurs, UnlockError
from unlock.secret import Secret

pytestmark = [pytest.mark.vm, pytest.mark.always]

Show = Callable[[str, object], None]
HEADER = 1 << 20
"""Bytes: both copies of the metadata and the keyslots in use."""


@pytest.fixture(scope="module")
def enrolled() -> Machine:
    return unmeasured()


@pytest.fixture
def story(tmp_path: Path) -> Iterator[Machine]:
    """A clone of the enrolled machine."""
    yield unmeasured().clone(tmp_path / "machine")
    shutil.rmtree(tmp_path / "machine", ignore_errors=True)


@pytest.fixture(scope="module")
def adopted(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Machine]:
    """A host of which nothing but the root disk was taken in."""
    built = image.build("luks")
    machine = Machine(tmp_path_factory.mktemp("adopted"), built)
    subprocess.run(["cp", built.disk, machine.home / "root.raw"], check=True)
    with machine.boot(log_writes=True) as booted:
        console = take_in_root(booted, machine, UNMEASURED)
        (machine.home / "secrets.json").write_bytes(console.sh(f"python3 -I -c '{SECRETS}'").stdout)
        booted.kill()
    yield machine
    shutil.rmtree(machine.home)


def left(enrolled: Machine, serial: str, start: bytes, path: Path) -> Iterator[None]:
    """Each state of a disk, as a file that libcryptsetup reads; then its last."""
    with path.open("wb") as file:
        file.truncate(DATA_OFFSET + (1 << 20))
    with path.open("r+b") as file:
        for state in writes.states(start, writes.read(enrolled.home / f"{serial}.raw.writes", HEADER)):
            file.seek(0)
            file.write(state)
            file.flush()
            yield


def judge(path: Path, enrolled: Machine, passphrase: bytes) -> Counter[str]:
    """What the disk is good for in this state. No token may be there that does not open it."""
    found: Counter[str] = Counter()
    persistence = Secret(bytes.fromhex(enrolled.secrets()["unlock:persistence"]))
    recovery = Secret(enrolled.recovery_key.encode())
    try:
        with luks.Container(str(path)) as container:
            found["readable"] += 1
            if passphrase:
                container.volume_key(Secret(passphrase), 0).wipe()
                found["passphrase"] += 1
            try:
                disk_keys.dek_by_recovery_key(container, recovery).wipe()
                found["recovery key"] += 1
            except NotOurs:
                pass
            for _, fields in container.tokens("unlock"):
                assert fields["group"]
                (each,) = disk_keys.read_tokens(container, "")
                disk_keys.unwrap_volume_key(container, each, persistence).wipe()
                found["token"] += 1
    except (NotOurs, Malformed):
        found["nothing"] += 1
    return found


def test_an_adopted_root_opens_after_a_cut_at_any_write(
    adopted: Machine, tmp_path: Path, record_property: Show
) -> None:
    """With its passphrase always, and by TPM or recovery key as soon as they are there."""
    with adopted.image.disk.open("rb") as file:
        start = file.read(HEADER)
    total: Counter[str] = Counter()
    for _ in left(adopted, "root", start, tmp_path / "disk"):
        found = judge(tmp_path / "disk", adopted, image.PASSPHRASE.encode())
        assert found["passphrase"]
        assert found["recovery key"] or not found["token"], "a token comes after the recovery keyslot"
        total += found
    assert found == {"readable": 1, "passphrase": 1, "recovery key": 1, "token": 1}
    record_property("shown", f"disk adopt: power cut in {total['readable']} states of the root disk: {dict(total)}")
    assert total["token"] < total["recovery key"] < total["passphrase"] == total["readable"]


@pytest.mark.parametrize("serial", ("late-1", "pair-1", "pair-2"))
def test_a_disk_of_a_new_group_is_whole_or_nothing(
    enrolled: Machine, tmp_path: Path, serial: str, record_property: Show
) -> None:
    total: Counter[str] = Counter()
    for _ in left(enrolled, serial, bytes(HEADER), tmp_path / "disk"):
        found = judge(tmp_path / "disk", enrolled, b"")
        assert found["recovery key"] or not found["token"], "a token comes after the recovery keyslot"
        assert not (total["token"] and found["nothing"]), "what was whole stays so"
        total += found
    assert found == {"readable": 1, "recovery key": 1, "token": 1}
    states = total["readable"] + total["nothing"]
    record_property("shown", f"group create: power cut in {states} states of {serial}: {dict(total)}")


def test_the_search_finds_a_token_that_comes_too_early(enrolled: Machine, tmp_path: Path) -> None:
    """Were the token there before the keyslot that the recovery key opens, a cut between them would show it."""
    log = list(writes.read(enrolled.home / "late-1.raw.writes", HEADER))
    last = max(i for i, each in enumerate(log) if not each.flush)
    token = [each for each in log[last - 5 : last + 1] if not each.flush]
    keyslot = next(i for i, each in enumerate(log) if each.offset == 0x8000 and any(each.data))
    reordered = [*log[:keyslot], *token, writes.Write(0, b"", True), *log[keyslot:]]
    path = tmp_path / "disk"
    found = []
    for state in writes.states(bytes(HEADER), iter(reordered)):
        path.write_bytes(state)
        with path.open("r+b") as file:
            file.truncate(DATA_OFFSET + (1 << 20))
        try:
            found.append(judge(path, enrolled, b""))
        except UnlockError:
            continue
    assert any(each["token"] and not each["recovery key"] for each in found)


CREATE = f"unlock group create kill --mount /srv/kill --recovery-key-file {RECOVERY}"
KILLS = """
disk={disk}
as_before() {{
    systemctl --quiet stop srv-kill.mount || true
    dmsetup remove --retry kill-a 2>/dev/null || true
    wipefs -qa $disk
    rm -rf /var/lib/unlock
    cp -a /root/saved /var/lib/unlock
    cp -a /root/saved.toml /etc/unlock/unlock.toml
}}
for call in rename fsync; do
    number=1
    while :; do
        as_before
        code=0
        strace -qq -o /dev/null -e trace=$call -e inject=$call:signal=KILL:when=$number \\
            {create} --disk $disk >/root/out 2>&1 || code=$?
        [ $code != 0 ] || break
        unlock status >/dev/null
        # killed in its last call, it was whole
        {create} --disk $disk --erase $disk 2>/root/err || grep -q "there is a group kill already" /root/err
        mountpoint -q /srv/kill
        unlock status | grep -q kill-a.*open
        echo "killed $call"
        number=$((number + 1))
    done
done
"""


def test_group_create_cut_off_when_the_first_header_is_written_finishes_when_run_again(story: Machine) -> None:
    device = with_a_disk(story)
    path = story.home / "kill.raw"
    with story.boot() as booted:
        console = begun(booted)
        console.write(RECOVERY, story.recovery_key.encode(), 0o600)
        console.sh(f"sync; {CREATE} --disk {device} >/dev/null 2>&1 &")
        until(lambda: b'"keyslots":{"0"' in header(path))
        booted.kill()
    with story.boot() as booted:
        console = begun(booted)
        assert set(outcomes(console).values()) == {"opened", "foreign"}
        assert "run it again" in console.sh("unlock status").out
        console.write(RECOVERY, story.recovery_key.encode(), 0o600)
        console.sh(f"{CREATE} --disk {device}", timeout=240)
        assert status(console)["kill"] == "open"
        booted.kill()


def test_group_create_killed_again_and_again_finishes_when_run_again(story: Machine, record_property: Show) -> None:
    """SIGKILL before each rename, which is what makes the state's next step visible, and at each fsync, which are of
    headers too."""
    device = with_a_disk(story)
    with story.boot(limit=1800) as booted:
        console = begun(booted)
        console.write(RECOVERY, story.recovery_key.encode(), 0o600)
        console.sh("cp -a /etc/unlock/unlock.toml /root/saved.toml; cp -a /var/lib/unlock /root/saved")
        done = console.sh("set -e" + KILLS.format(disk=device, create=CREATE), timeout=1500)
        kills = Counter(re.findall("^killed (.*)", done.out, re.MULTILINE))
        record_property("shown", f"group create: killed at {dict(kills)} and run again")
        assert min(kills["rename"], kills["fsync"]) >= 3
        booted.kill()


def with_a_disk(story: Machine) -> str:
    """One that is of no group yet."""
    return story.disk("kill", 40)


def header(path: Path) -> bytes:
    with path.open("rb") as file:
        return file.read(32768)


def until(seen: Callable[[], bool], patience: float = 120) -> None:
    end = time.monotonic() + patience
    while not seen():
        assert time.monotonic() < end, "it did not happen"
        time.sleep(0.01)
