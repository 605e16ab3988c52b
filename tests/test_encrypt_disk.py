# SPDX-License-Identifier: Apache-2.0
"""`unlock disk encrypt`: a disk that holds data is encrypted in place. Real disks, on loop devices, a software TPM."""

import copy
import os
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.eventlogs import Boot
from tests.hostfixture import Machine
from tests.inplace import MIB, RESERVED, files_in, fill, phase, read_clear, recovery_file, sh
from unlock import cli
from unlock.boot import gate
from unlock.disks import devices, disk_keys, encrypt_plan, luks, reencrypt_plan
from unlock.disks import encrypt as encrypt_in_place
from unlock.disks.header import Header
from unlock.disks.reencrypt import Tell
from unlock.errors import Malformed, Refused, Tampered, UnlockError
from unlock.host.journal import DiskEncryption
from unlock.operations import delete_group, encrypt_disk, membership, new_persistence_key, operation, status
from unlock.operations.consent import Plan
from unlock.operations.encrypt_disk import Choices, Outcome
from unlock.secret import Secret
from unlock.strictjson import canonical

pytestmark = [pytest.mark.root, pytest.mark.usefixtures("key_cache", "cheap_passwords")]

SIZE = 100 * MIB
BOOT = Boot("direct")
Loops = Callable[..., str]


@pytest.fixture
def host(tmp_path: Path) -> Iterator[Machine]:
    machine = Machine(tmp_path, BOOT)
    yield machine
    machine.close()


@pytest.fixture
def loop(host: Machine, tmp_path: Path) -> Iterator[Loops]:
    """Makes disks. Blocks of 4096 bytes are quick to decrypt here."""
    made: list[str] = []

    def make(size: int = SIZE, block: int = 4096) -> str:
        image = tmp_path / f"disk-{len(made)}"
        with image.open("wb") as file:
            file.truncate(size)
        made.append(sh("losetup", "--find", "--show", "--sector-size", block, image))
        host.disks.append(Path(made[-1]))
        return made[-1]

    yield make
    for each in made:
        subprocess.run(["losetup", "--detach", each], stderr=subprocess.DEVNULL, check=False)


@pytest.fixture
def disk(loop: Loops) -> str:
    return loop()


def choices(host: Machine, disk: str, group: str = "photos") -> Choices:
    return Choices(disk, group, recovery_file=recovery_file(host))


def never(done: int, size: int) -> bool:
    return False


def encrypt(host: Machine, disk: str, tell: Tell = never) -> Outcome | None:
    return encrypt_disk.encrypt_disk(host.paths, choices(host, disk), tell, look=host.look, tcti=host.chip.tcti)


def resume(host: Machine, tell: Tell = never) -> Outcome | None:
    return encrypt_disk.resume(host.paths, tell, look=host.look, tcti=host.chip.tcti)


def test_the_rate_is_held_down_also_by_who_goes_on(host: Machine, loop: Loops, tmp_path: Path) -> None:
    """What waits tells again how far it is."""
    disk = loop(SIZE, 512)
    fill(disk, tmp_path, SIZE)

    def until_it_waits() -> Tell:
        told: list[int] = []

        def tell(done: int, size: int) -> bool:
            told.append(done)
            return told[-3:] == [done] * 3

        return tell

    slow = choices(host, disk)._replace(max_rate=1 << 20)
    tell = until_it_waits()
    outcome = encrypt_disk.encrypt_disk(host.paths, slow, tell, look=host.look, tcti=host.chip.tcti)
    assert outcome and outcome.outcome == "stopped"
    outcome = resume(host, until_it_waits())
    assert outcome and outcome.outcome == "stopped"


def test_a_disk_is_encrypted_in_place_and_holds_what_it_held(host: Machine, loop: Loops, tmp_path: Path) -> None:
    disk = loop(SIZE, 512)
    fill(disk, tmp_path, SIZE)
    expected = {each.name: each.read_bytes() for each in (tmp_path / "files").iterdir()}
    before = bytes(host.persistence)
    assert encrypt(host, disk) == Outcome("photos", "photos-a", "done")
    state = host.state
    assert (state.journal, state.narrowed, list(state.groups)) == (None, None, ["photos"])
    assert phase(disk) == ""
    assert host.boot() == "unsealed"
    host.take_key()
    assert bytes(host.persistence) != before
    data = read_clear(disk, host.persistence)
    assert files_in(data, tmp_path) == expected
    content = Path(disk).read_bytes()
    assert not any(each[:4096] in content for each in expected.values()), "nothing of it is left in clear"
    with luks.Container(disk) as container, container.volume_key(host.recovery):
        assert len(container.keyslots()) == 1
        assert len(container.tokens("unlock")) == 1
    assert "[group.photos]" in Path(host.paths.config).read_text()


def test_stopped_nine_times_with_a_boot_in_between_it_goes_on(host: Machine, loop: Loops, tmp_path: Path) -> None:
    """Each time the header gives the data by what early boot has."""
    disk = loop(RESERVED + 150 * MIB)
    fill(disk, tmp_path, 150 * MIB)
    expected = {each.name: each.read_bytes() for each in (tmp_path / "files").iterdir()}
    calls = 0

    def second(done: int, size: int) -> bool:
        nonlocal calls
        calls += 1
        return calls % 2 == 0

    outcome = encrypt(host, disk, second)
    stops = 0
    while outcome and outcome.outcome == "stopped":
        stops += 1
        assert host.boot() == "unsealed"
        host.take_key()
        assert isinstance(host.state.journal, DiskEncryption) and phase(disk) == "moving"
        assert files_in(read_clear(disk, host.persistence), tmp_path) == expected
        outcome = resume(host, second)
    assert stops == 9
    host.boot()
    host.take_key()
    assert files_in(read_clear(disk, host.persistence), tmp_path) == expected


# What is refused, and is then what it was


def refused(host: Machine, disk: str, work: Callable[[], object]) -> UnlockError:
    def content() -> list[bytes]:
        files = (disk, host.paths.state, host.paths.config)
        return [Path(each).read_bytes() for each in files]

    before, names = content(), sorted(os.listdir(os.path.dirname(host.paths.state)))
    with pytest.raises(UnlockError) as caught:
        work()
    assert content() == before
    assert sorted(os.listdir(os.path.dirname(host.paths.state))) == names
    assert caught.value.hint and "\n" not in str(caught.value)
    return caught.value


def not_encrypted(host: Machine, disk: str) -> UnlockError:
    return refused(host, disk, lambda: encrypt(host, disk))


def xfs(disk: str) -> None:
    """As much of a superblock as blkid looks at."""
    block = bytearray(512)
    block[:4], block[4:8], block[8:16] = b"XFSB", (4096).to_bytes(4, "big"), (25600).to_bytes(8, "big")
    block[32:48], block[80:84] = bytes(range(16)), (1).to_bytes(4, "big")
    block[84:88], block[88:92] = (6400).to_bytes(4, "big"), (4).to_bytes(4, "big")
    block[100:102], block[102:104], block[104:106] = b"\xb4\xa5", (512).to_bytes(2, "big"), (512).to_bytes(2, "big")
    block[106:108] = (8).to_bytes(2, "big")
    block[120:128] = bytes([12, 9, 9, 3, 13, 0, 0, 25])
    with open(disk, "r+b") as file:
        file.write(block)


@pytest.mark.parametrize(
    ("make", "code", "word"),
    [
        (lambda disk: None, "file-system", "no file system"),
        (xfs, "file-system", "xfs"),
        (lambda disk: sh("mkswap", disk), "file-system", "swap"),
        (lambda disk: sh("sfdisk", "--quiet", disk, text=b"label: gpt\nsize=1M\n"), "file-system", "gpt"),
        (lambda disk: luks.format(disk, Secret(bytes(64))).close(), "luks", "LUKS already"),
    ],
    ids=["empty", "xfs", "swap", "partitions", "luks"],
)
def test_what_cannot_be_made_smaller_is_left_as_it_is(
    host: Machine, disk: str, make: Callable[[str], object], code: str, word: str
) -> None:
    make(disk)
    error = not_encrypted(host, disk)
    assert (error.code, word in str(error)) == (code, True), error


def test_a_disk_of_another_host_stays_that(host: Machine, disk: str) -> None:
    with luks.format(disk, Secret(bytes(64))) as container:
        container.set_token({"type": "unlock", "host": "cd" * 16})
    assert not_encrypted(host, disk).code == "other-host"


@pytest.mark.parametrize("wrong", ["/dev/null", "/dev/unlock-test-absent"])
def test_what_is_no_disk_is_refused(host: Machine, disk: str, wrong: str) -> None:
    refused(host, disk, lambda: encrypt(host, wrong))


def test_a_reencryption_of_another_program_is_left_to_it(host: Machine, disk: str, tmp_path: Path) -> None:
    fill(disk, tmp_path, SIZE - RESERVED)
    key = tmp_path / "key"
    key.write_text("of another program")
    cheap = ("--pbkdf", "pbkdf2", "--pbkdf-force-iterations", "1000")
    sh(
        "cryptsetup",
        "reencrypt",
        "-q",
        "--encrypt",
        "--init-only",
        "--reduce-device-size",
        "32M",
        *cheap,
        "--key-file",
        key,
        disk,
    )
    error = not_encrypted(host, disk)
    assert (error.code, "--resume-only" in error.hint) == ("luks", True)


def test_a_btrfs_across_disks_is_refused(host: Machine, loop: Loops) -> None:
    first, second = loop(256 * MIB), loop(256 * MIB)
    sh("mkfs.btrfs", "-q", first, second)
    assert (not_encrypted(host, first).code, not_encrypted(host, second).code) == ("file-system",) * 2


def test_a_small_disk_is_refused(host: Machine, loop: Loops, tmp_path: Path) -> None:
    disk = loop(63 * MIB)
    fill(disk, tmp_path, 24 * MIB)
    assert not_encrypted(host, disk).code == "too-small"


def test_a_file_system_whose_end_is_in_use_is_not_made_smaller(host: Machine, disk: str, tmp_path: Path) -> None:
    """resize2fs would move it, and a power cut could ruin it."""
    (tmp_path / "files").mkdir()
    for number in range(8):
        (tmp_path / "files" / f"file-{number}").write_bytes(os.urandom(10 * MIB))
    fill(disk, tmp_path, SIZE)
    error = not_encrypted(host, disk)
    assert (error.code, "resize2fs" in error.hint) == ("no-room", True)
    command = error.hint.removeprefix("with a backup: ")
    for each in list((tmp_path / "files").iterdir())[2:]:
        sh("debugfs", "-w", "-R", f"rm {each.name}", disk)
        each.unlink()
    sh("sh", "-c", command.replace("e2fsck -f", "e2fsck -fp"))
    assert encrypt(host, disk) == Outcome("photos", "photos-a", "done")


def test_a_disk_that_a_program_holds_is_refused(host: Machine, disk: str, tmp_path: Path) -> None:
    fill(disk, tmp_path, SIZE)
    held = os.open(disk, os.O_RDONLY | os.O_EXCL)
    try:
        assert not_encrypted(host, disk).code == "in-use"
    finally:
        os.close(held)


def test_cut_off_at_the_end_the_same_command_finishes(
    host: Machine, loop: Loops, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    disk = loop()
    fill(disk, tmp_path, SIZE - RESERVED)

    def is_cut(*_: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(new_persistence_key, "replace", is_cut)
        encrypt(host, disk)
    assert (host.state.journal, host.state.narrowed) == (None, "photos-a was encrypted in place")
    assert encrypt(host, disk) == Outcome("photos", "photos-a", "done")
    assert host.state.narrowed is None


def test_a_mounted_disk_is_refused_with_what_to_type(host: Machine, disk: str, tmp_path: Path) -> None:
    fill(disk, tmp_path, SIZE)
    where = tmp_path / "mounted"
    where.mkdir()
    sh("mount", "-o", "ro", disk, where)
    try:
        error = not_encrypted(host, disk)
    finally:
        sh("umount", where)
    assert (error.code, error.hint.startswith(f"umount {where};")) == ("in-use", True)


def test_what_the_host_does_not_allow_is_refused(
    host: Machine, disk: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fill(disk, tmp_path, SIZE)
    Path(host.paths.fstab).write_text(f"{disk} /srv/photos ext4 defaults 0 2\n")
    error = not_encrypted(host, disk)
    assert (error.code, "UUID=" in error.hint) == ("fstab", True)
    Path(host.paths.fstab).write_text("UUID=1 /srv/photos ext4 defaults 0 2\n")
    kind = devices.mount_type(find_mount(tmp_path))
    monkeypatch.setattr(encrypt_disk, "VOLATILE", (kind,))
    assert not_encrypted(host, disk).code == "volatile"
    monkeypatch.undo()
    monkeypatch.setattr(encrypt_disk, "SPARE", 1 << 60)
    assert not_encrypted(host, disk).code == "no-space"
    monkeypatch.undo()
    with open(host.paths.config, "a", encoding="utf-8") as file:
        file.write('[group.photos]\npolicy = "provider"\n')
    assert not_encrypted(host, disk).code == "needs-persistence"


def find_mount(path: Path) -> str:
    while not path.is_mount():
        path = path.parent
    return str(path)


def test_a_group_that_is_there_takes_no_disk_in_place(host: Machine, disk: str, tmp_path: Path) -> None:
    fill(disk, tmp_path, SIZE)
    host.add_group("photos", 1)
    assert not_encrypted(host, disk).code == "group-exists"


def test_the_plan_is_shown_and_nothing_is_done(host: Machine, disk: str, tmp_path: Path) -> None:
    fill(disk, tmp_path, SIZE)
    before = Path(disk).read_bytes(), Path(host.paths.state).read_bytes()
    plans: list[Plan] = []

    def show(plan: Plan) -> bool:
        plans.append(plan)
        return False

    asked = choices(host, disk)
    assert encrypt_disk.encrypt_disk(host.paths, asked, never, show, host.look, tcti=host.chip.tcti) is None
    assert (Path(disk).read_bytes(), Path(host.paths.state).read_bytes()) == before
    assert [bool(each.steps) and not each.destroys for each in plans] == [True]


# A disk that was given up, or used, before it had moved


def begun(host: Machine, disk: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Killed when the journal has it."""

    def killed(*_: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(encrypt_disk, "_put_header", killed)
        encrypt(host, disk)


def test_a_file_system_that_was_mounted_before_the_header_came_is_moved_again(
    host: Machine, disk: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Cut off in between, the next boot mounts it in clear: what was moved is not what it holds any more."""
    fill(disk, tmp_path, SIZE - RESERVED)
    expected = {each.name: each.read_bytes() for each in (tmp_path / "files").iterdir()}
    begun(host, disk, monkeypatch)
    entry = host.state.journal
    assert isinstance(entry, DiskEncryption) and entry.moved and not entry.written
    (tmp_path / "new").write_bytes(b"later")
    sh("debugfs", "-w", "-R", f"write {tmp_path / 'new'} file-new", disk)
    host.boot()
    host.take_key()
    assert resume(host) == Outcome("photos", "photos-a", "done")
    host.boot()
    host.take_key()
    assert files_in(read_clear(disk, host.persistence), tmp_path) == {**expected, "file-new": b"later"}


def cut_in_put(host: Machine, disk: str, monkeypatch: pytest.MonkeyPatch, number: int) -> None:
    """Killed when so many parts of the header are on the disk."""
    write, left = encrypt_in_place._write, number

    def killed(file: int, content: bytes | bytearray, offset: int) -> None:
        nonlocal left
        if offset < encrypt_plan.SHIFT:
            left -= 1
        if left < 0:
            raise KeyboardInterrupt
        write(file, content, offset)

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(encrypt_in_place, "_write", killed)
        encrypt(host, disk)


def format_again(disk: str) -> None:
    sh("mkfs.ext4", "-q", "-F", "-E", "nodiscard", disk, f"{(SIZE - RESERVED) >> 10}K")


def partition(disk: str) -> None:
    sh("sfdisk", "--quiet", "--no-reread", disk, text=b"label: gpt\nsize=1M\n")


def write_to_end(disk: str) -> None:
    with open(disk, "r+b", buffering=0) as file:
        file.seek(SIZE - 4096)
        file.write(bytes(4096))


@pytest.mark.parametrize("number", [1, 2, 3])
@pytest.mark.parametrize("block", [512, 4096])
def test_cut_off_between_the_parts_of_the_header_it_goes_on(
    host: Machine, loop: Loops, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: int, block: int
) -> None:
    """Its superblock is gone by then, and where btrfs has its own is a directory."""
    disk = loop(SIZE, block)
    fill(disk, tmp_path, SIZE)
    with open(disk, "rb") as file:
        file.seek(64 << 10)
        assert any(file.read(512))
    expected = {each.name: each.read_bytes() for each in (tmp_path / "files").iterdir()}
    cut_in_put(host, disk, monkeypatch, number)
    host.boot()
    host.take_key()
    assert resume(host) == Outcome("photos", "photos-a", "done")
    host.boot()
    host.take_key()
    assert files_in(read_clear(disk, host.persistence), tmp_path) == expected


@pytest.mark.parametrize("harm", [format_again, partition, write_to_end])
def test_a_disk_that_another_program_wrote_to_while_its_header_was_half_written_is_left_alone(
    host: Machine, disk: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, harm: Callable[[str], None]
) -> None:
    """It looks empty by then, and somebody may take it for that."""
    fill(disk, tmp_path, SIZE)
    cut_in_put(host, disk, monkeypatch, 1)
    harm(disk)
    host.boot()
    host.take_key()
    error = refused(host, disk, lambda: resume(host))
    assert error.code == ("missing" if harm in (write_to_end, partition) else "written"), error


def test_it_is_cancelled_before_the_data_has_moved_and_not_after(
    host: Machine, disk: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fill(disk, tmp_path, SIZE - RESERVED)
    begun(host, disk, monkeypatch)
    with pytest.raises(Refused) as caught:
        encrypt_disk.cancel(host.paths, host.look)
    assert caught.value.code == "cannot-cancel"
    with host.work() as work:
        assert isinstance(work.state.journal, DiskEncryption)
        work.state.journal = work.state.journal._replace(moved="")
        work.state.save()
    assert encrypt_disk.cancel(host.paths, host.look)
    assert host.state.journal is None and not list(Path(host.paths.state).parent.glob("*.header"))
    assert encrypt(host, disk) == Outcome("photos", "photos-a", "done")


def unplugged(host: Machine, disk: str) -> None:
    sh("losetup", "--detach", disk)
    host.disks.remove(Path(disk))


@pytest.mark.parametrize("half", [False, True], ids=["header half written", "half encrypted"])
def test_a_disk_that_dies_in_between_holds_up_no_other_operation_for_ever(
    host: Machine, loop: Loops, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, half: bool
) -> None:
    disk = loop()
    fill(disk, tmp_path, SIZE - RESERVED)
    if half:
        encrypt(host, disk, lambda done, size: done > size // 2)
    else:
        cut_in_put(host, disk, monkeypatch, 1)
    with pytest.raises(Refused) as caught:
        operation.give_up(host.paths, look=host.look)
    assert caught.value.code == "present"
    old = bytes(host.persistence)
    unplugged(host, disk)
    with pytest.raises(Refused) as caught:
        operation.cancel(host.paths, look=host.look)
    assert (caught.value.code, "--lost" in caught.value.hint) == ("cannot-cancel", True)
    with pytest.raises(Refused) as caught:
        resume(host)
    assert caught.value.code == "missing"
    asked: list[Plan] = []

    def show(plan: Plan) -> bool:
        asked.append(plan)
        return False

    assert operation.give_up(host.paths, show, host.look) is None
    assert asked[0].thing == "photos-a" and asked[0].destroys and host.state.journal
    assert operation.give_up(host.paths, look=host.look)
    state = host.state
    assert (state.journal, list(state.groups)) == (None, ["photos"] if half else [])
    assert not list(Path(host.paths.state).parent.glob("encrypt*"))
    if half:
        new_persistence_key.replace_if_due(host.paths, host.chip.tcti, look=host.look)
        host.boot()
        host.take_key()
        assert bytes(host.persistence) != old and host.state.narrowed is None
        delete_group.delete_group(host.paths, "photos", look=host.look, tcti=host.chip.tcti)
    assert not host.state.groups
    other = loop()
    fill(other, tmp_path, SIZE - RESERVED)
    assert encrypt(host, other) == Outcome("photos", "photos-a", "done")


def test_lost_before_its_group_is_in_the_state_it_is_in_no_file(
    host: Machine, loop: Loops, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    disk = loop()
    fill(disk, tmp_path, SIZE - RESERVED)
    add = membership.add_to_config

    def add_and_cut(*arguments: Any) -> None:
        add(*arguments)
        raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(membership, "add_to_config", add_and_cut)
        encrypt(host, disk)
    assert "[group.photos]" in Path(host.paths.config).read_text() and not host.state.groups
    unplugged(host, disk)
    assert operation.give_up(host.paths, look=host.look)
    assert "[group.photos]" not in Path(host.paths.config).read_text()


# A header of the time before, put back


def half(host: Machine, disk: str, tmp_path: Path) -> bytes:
    """Encrypts half, keeps the header, and encrypts the rest."""
    fill(disk, tmp_path, SIZE - RESERVED)
    outcome = encrypt(host, disk, lambda done, size: done > size // 2)
    assert outcome and outcome.outcome == "stopped" and phase(disk) == "moving"
    with open(disk, "rb") as file:
        kept = file.read(encrypt_plan.SHIFT)
    assert encrypt(host, disk) == Outcome("photos", "photos-a", "done")
    return kept


def test_a_header_from_the_midst_put_back_opens_nothing(host: Machine, disk: str, tmp_path: Path) -> None:
    """It has a part in clear: whatever was written there would go out in clear."""
    old = bytes(host.persistence)
    kept = half(host, disk, tmp_path)
    host.boot()
    host.take_key()
    with open(disk, "r+b") as file:
        file.write(kept)
    state = host.state
    with luks.Container(disk) as container:
        each = disk_keys.read_tokens(container, state.host)[0]
        with pytest.raises(Tampered):
            disk_keys.unwrap_volume_key(container, each, host.persistence)
        with pytest.raises(Tampered):
            disk_keys.dek_by_checked_recovery_key(container, each, host.recovery)
        with Secret(old) as persistence, disk_keys.unwrap_kek(each, persistence) as kek:
            disk_keys.unwrap_by_kek(container, each, kek).wipe()  # so the gate must refuse what the KEK opens
            for unwrap in (
                lambda header, token: disk_keys.unwrap_by_kek(header, token, kek),
                gate._by_recovery_key(host.recovery),
            ):
                with pytest.raises(Tampered, match="half in clear"):
                    gate._refuse_put_back(state, unwrap)(container, each)
    with pytest.raises(UnlockError):
        resume(host) or encrypt(host, disk)


def shown(host: Machine, capsys: pytest.CaptureFixture[str]) -> list[str]:
    """The words of a person's commands; empty where they do not say that a disk is in clear."""
    found = status.read_status(host.paths, look=host.look)
    words = [status.to_text(found)]
    listing = cli._parser().parse_args(["disk", "list"])
    assert listing.run(host.paths, listing) == 0
    words.append(capsys.readouterr().out)
    assert [found.in_clear, status.to_json(found)["in_clear"]] == [["photos-a"] if "in clear" in words[0] else []] * 2
    return [each for each in words if "in clear" in each]


def test_while_it_is_encrypted_the_recovery_key_opens_it_and_it_is_told_to_be_in_clear(
    host: Machine, disk: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    fill(disk, tmp_path, SIZE - RESERVED)
    encrypt(host, disk, lambda done, size: done > size // 2)
    assert len(shown(host, capsys)) == 2
    with luks.Container(disk) as container:
        each = disk_keys.read_tokens(container, host.state.host)[0]
        unwrap = gate._refuse_put_back(host.state, gate._by_recovery_key(host.recovery))
        with unwrap(container, each) as key:
            assert key == host.recovery, "a passphrase of the keyslot"
    encrypt(host, disk)
    assert not shown(host, capsys)


def lin(number: str) -> Callable[[dict[str, Any]], object]:
    return lambda m: m["segments"].update({number: {"type": "linear", "offset": "33554432", "size": "1048576"}})


FORGED: dict[str, Callable[[dict[str, Any]], object]] = {
    "an encrypted part in clear": lambda m: m["segments"]["2"].update(type="linear"),
    "another part in clear": lin("6"),
    "the second part elsewhere": lambda m: m["segments"]["1"].update(offset="0"),
    "the first part elsewhere": lambda m: m["segments"]["0"].update(offset="0"),
    "the first part longer": lambda m: m["segments"]["0"].update(size="33554432"),
    "in clear at the end": lambda m: m["segments"]["4"].update(type="linear"),
    "another cipher": lambda m: m["segments"]["2"].update(encryption="cipher_null-ecb"),
    "another cipher at the end": lambda m: m["segments"]["4"].update(encryption="cipher_null-ecb"),
    "another IV": lambda m: m["segments"]["2"].update(iv_tweak="0"),
    "without its digest": lambda m: next(iter(m["digests"].values())).update(segments=["4"]),
    "another digest": lambda m: m["digests"].update({"7": {"segments": ["2"], "keyslots": []}}),
    "decrypt": lambda m: reencrypt_keyslot(m).update(mode="decrypt"),
    "reencrypt": lambda m: reencrypt_keyslot(m).update(mode="reencrypt"),
    "forward": lambda m: reencrypt_keyslot(m).update(direction="forward"),
    "another shift": lambda m: reencrypt_keyslot(m)["area"].update(shift_size="4096"),
    "another requirement": lambda m: m["config"].update(requirements={"mandatory": ["online-reencrypt"]}),
    "no requirement": lambda m: m["config"].pop("requirements"),
    "a smaller disk": lambda m: m["segments"]["3"].update(size="1048576"),
    "a part missing": lambda m: m["segments"].pop("1"),
    "a hotzone that is old": lambda m: m["segments"]["1"].update(flags=["in-reencryption"]),
}


def reencrypt_keyslot(metadata: dict[str, Any]) -> dict[str, Any]:
    found: dict[str, Any] = next(each for each in metadata["keyslots"].values() if each["type"] == "reencrypt")
    return found


def test_a_forged_header_does_not_fit(host: Machine, disk: str, tmp_path: Path) -> None:
    fill(disk, tmp_path, SIZE - RESERVED)
    encrypt(host, disk, lambda done, size: done > size // 4)
    with luks.Container(disk) as container:
        metadata, uuid = container.metadata, container.uuid
        each = disk_keys.read_tokens(container, host.state.host)[0]
    assert each.reencryption and reencrypt_plan.phase_of(metadata, each.reencryption.plan, disk) == "moving"
    for name, forge in FORGED.items():
        forged = copy.deepcopy(metadata)
        forge(forged)
        header = Header(disk, uuid, canonical(forged))
        with pytest.raises((Tampered, Malformed)):
            disk_keys.unwrap_volume_key(header, each, host.persistence).wipe()
            print(name)
    for plan in (
        each.reencryption.plan._replace(clear=each.reencryption.plan.clear - 4096),
        each.reencryption.plan._replace(new_keyslot=0),
        each.reencryption.plan._replace(clear=0, old=0),
    ):
        other = each._replace(reencryption=each.reencryption._replace(plan=plan))
        with pytest.raises(Tampered):
            disk_keys.unwrap_volume_key(Header(disk, uuid, canonical(metadata)), other, host.persistence)


def test_a_btrfs_is_made_smaller_at_a_place_of_its_own(host: Machine, loop: Loops, tmp_path: Path) -> None:
    disk, source = loop(320 * MIB), tmp_path / "files"
    source.mkdir()
    expected = {f"file-{number}": os.urandom(MIB) for number in range(8)}
    for name, content in expected.items():
        (source / name).write_bytes(content)
    sh("mkfs.btrfs", "-q", "--rootdir", source, disk)
    assert encrypt(host, disk) == Outcome("photos", "photos-a", "done")
    host.boot()
    host.take_key()
    plain, where = tmp_path / "plain", tmp_path / "mounted"
    plain.write_bytes(read_clear(disk, host.persistence))
    where.mkdir()
    sh("mount", "-o", "ro,loop", plain, where)
    try:
        assert {each.name: each.read_bytes() for each in where.iterdir()} == expected
    finally:
        sh("umount", where)
