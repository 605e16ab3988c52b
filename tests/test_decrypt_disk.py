# SPDX-License-Identifier: Apache-2.0
"""`unlock disk decrypt`: a disk is decrypted in place and becomes a plain partition. Real LUKS2 disks on loop devices,
a software TPM."""

import os
import subprocess
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest

from tests.decrypting import AFTER, BEFORE, HEADER, Loop, fitting_token, phase, protect, read_half
from tests.deepfixture import stock_opens
from tests.eventlogs import Boot
from tests.hostfixture import Machine
from tests.inplace import MIB, files_in, sh
from unlock.disks import adoptable, devices, disk_keys, luks, partition_table, raw_header, reencrypt
from unlock.disks.header import Header
from unlock.disks.place import Place
from unlock.disks.reencrypt import Tell
from unlock.errors import Malformed, Refused, Tampered, UnlockError
from unlock.host import config, keyring
from unlock.host.journal import DiskDecryption
from unlock.operations import decrypt_disk, leaving, new_persistence_key, operation, status
from unlock.operations.consent import Plan
from unlock.operations.decrypt_disk import Outcome
from unlock.secret import Secret
from unlock.strictjson import canonical

pytestmark = [pytest.mark.root, pytest.mark.usefixtures("key_cache", "cheap_passwords")]

DATA = 24 * MIB
BOOT = Boot("direct")
Loops = Callable[..., Loop]


@pytest.fixture(autouse=True)
def small_steps(monkeypatch: pytest.MonkeyPatch) -> None:
    """A disk of some MiB has several hotzones."""
    monkeypatch.setattr(reencrypt, "HOTZONE", 4 * MIB)


@pytest.fixture
def host(tmp_path: Path) -> Iterator[Machine]:
    machine = Machine(tmp_path, BOOT)
    yield machine
    machine.close()


@pytest.fixture
def loops(tmp_path: Path) -> Iterator[Loops]:
    made: list[Loop] = []

    def make(table: str, data: int = DATA) -> Loop:
        made.append(Loop(tmp_path, table, data, name=f"disk-{len(made)}"))
        return made[-1]

    yield make
    for each in made:
        each.detach()


def never(done: int, size: int) -> bool:
    return False


def decrypt(host: Machine, disk: str = "photos-0", tell: Tell = never) -> Outcome | None:
    return decrypt_disk.decrypt_disk(host.paths, disk, tell, look=host.look, tcti=host.chip.tcti)


def resume(host: Machine, tell: Tell = never) -> Outcome | None:
    return decrypt_disk.resume(host.paths, tell, look=host.look, tcti=host.chip.tcti)


def add_to_config(host: Machine) -> None:
    config.append_table(host.paths.config, config.group_table(config.GroupConfig("photos", "", "", "", 60)))


def assert_plain(loop: Loop, data: bytes, folder: Path) -> None:
    """Stock programs find the partition, and the file system in it; nothing of the header is left."""
    assert loop.plain() == data
    rows = [(HEADER, loop.data)]
    if loop.table != "none":
        rows = [(MIB, BEFORE), (loop.start + HEADER, loop.data), (loop.start + HEADER + loop.data, AFTER)]
    assert loop.partitions() == rows
    assert sh("sfdisk", "--verify", loop.disk)
    kind = sh("sfdisk", "--part-type", loop.disk, 1 if loop.table == "none" else 2).lower()
    assert kind in ("83", "0fc63daf-8483-4772-8e79-3d69d8477de4")
    at = f"--offset={loop.start + HEADER}"
    assert sh("blkid", "-p", "-s", "LABEL", "-o", "value", at, f"--size={loop.data}", loop.disk) == "photos"
    assert "LUKS" not in sh("wipefs", "--no-act", loop.disk)
    with open(loop.disk, "rb") as file:
        file.seek(loop.start or 512)
        assert not file.read(HEADER - (0 if loop.start else 512)).strip(b"\0")
    assert files_in(loop.plain(), folder) == {each.name: each.read_bytes() for each in (folder / "files").iterdir()}


@pytest.mark.parametrize("table", ["none", "gpt", "dos"])
def test_a_disk_is_decrypted_in_place_and_is_a_plain_partition(
    host: Machine, loops: Loops, tmp_path: Path, table: str
) -> None:
    loop = loops(table)
    data = protect(host, loop, tmp_path)
    add_to_config(host)
    before = bytes(host.persistence)
    told: list[tuple[int, int]] = []

    def tell(done: int, size: int) -> bool:
        told.append((done, size))
        assert status.read_status(host.paths, host.chip.tcti, host.look).in_clear == ["photos-0"]
        return False

    partition = f"{loop.disk}p{1 if table == 'none' else 2}"
    assert decrypt(host, loop.node, tell) == Outcome("photos", "photos-0", "done", partition)
    assert told == sorted(told) and told[-1] == (DATA, DATA) and len(told) > 5
    state = host.state
    assert (state.journal, state.narrowed, state.groups, state.headers) == (None, None, {}, {})
    assert_plain(loop, data, tmp_path)
    if table != "none":  # the kernel knows it already
        assert Path(f"/sys/class/block/{Path(partition).name}/start").read_text() == f"{(loop.start + HEADER) // 512}\n"
        assert Path(partition).stat()
        assert sh("blkid", "-p", "-s", "TYPE", "-o", "value", partition) == "ext4"
    assert "[group.photos]" not in Path(host.paths.config).read_text()
    host.boot()
    host.take_key()
    assert bytes(host.persistence) != before
    with pytest.raises(Refused):
        decrypt(host)


@pytest.mark.parametrize("named_by", ["name", "uuid", "device"])
def test_cut_off_at_the_end_the_same_command_finishes(
    host: Machine, loops: Loops, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, named_by: str
) -> None:
    loop = loops("none")
    data = protect(host, loop, tmp_path)
    member = host.state.groups["photos"].members[0]
    named = {"name": "photos-0", "uuid": member.uuid, "device": loop.node}[named_by]
    for module, function in (leaving, "end_group"), (new_persistence_key, "replace"):
        with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
            patch.setattr(module, function, is_cut)
            decrypt(host, named)
        if function == "end_group":
            assert not host.state.groups and isinstance(host.state.journal, DiskDecryption)
    assert (host.state.journal, host.state.narrowed) == (None, "photos-0 was decrypted in place")
    assert decrypt(host) == Outcome("", "photos-0", "done", "")
    assert host.state.narrowed is None and loop.plain() == data


@pytest.mark.parametrize("table", ["none", "gpt"])
@pytest.mark.parametrize("cut", ["on the way", "before the table", "after the table", "once the journal says so"])
def test_another_disk_with_such_a_partition_is_not_taken_for_it(
    host: Machine, loops: Loops, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, table: str, cut: str
) -> None:
    """Wherever the run was cut off, while the disk itself is unplugged, and beside it. Whoever makes the other disk
    knows all but what is on the disk."""
    loop, other = loops(table), loops(table)
    data = protect(host, loop, tmp_path)
    table_before = loop.image.read_bytes()
    put = partition_table.put

    def put_and_cut(*arguments: Any) -> None:
        put(*arguments)
        is_cut()

    if cut == "on the way":
        assert decrypt(host, tell=lambda done, size: done > 0)
    else:
        where = (decrypt_disk, "_finish") if cut == "once the journal says so" else (partition_table, "put")
        with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
            patch.setattr(*where, put_and_cut if cut == "after the table" else is_cut)
            decrypt(host)
    entry = host.state.journal
    assert isinstance(entry, DiskDecryption) and (bool(entry.trace), entry.placed) == (
        cut != "on the way",
        cut == "once the journal says so",
    )
    craft(other, table_before, entry.place)
    before = other.image.read_bytes()
    loop.detach()
    with pytest.raises(Refused) as caught:
        resume(host)
    assert caught.value.code == ("another-disk" if entry.trace else "missing") and caught.value.hint
    assert other.image.read_bytes() == before
    assert "photos" in host.state.groups and host.state.journal == entry
    loop.attach()
    host.disks[0] = Path(loop.node)
    assert resume(host)
    assert other.image.read_bytes() == before
    assert_plain(loop, data, tmp_path)


def craft(other: Loop, table: bytes, place: Place) -> None:
    """Gives another disk the partition that the decrypted one is to have, or has, and something like a header.
    `table`: the disk before."""
    with open(other.disk, "r+b", buffering=0) as disk:
        disk.write(table[:MIB] if other.table == "gpt" else bytes([0x5A]) * HEADER)
        if other.table == "gpt":
            disk.seek(-MIB, os.SEEK_END)
            disk.write(table[-MIB:])
    with partition_table._Disk(other.disk, os.O_RDWR) as opened:
        if other.table == "none":
            opened.write(0, opened._dos_sector(place, partition_table._empty_table(place, 512)))
        else:
            opened.switch(place)
    assert partition_table.is_placed(place, other.disk)


def test_another_disk_that_cryptsetup_seems_to_have_decrypted_is_not_taken_for_it(
    host: Machine, loops: Loops, tmp_path: Path
) -> None:
    """Nothing opens such a header. Whoever makes it knows the UUID."""
    loop, other = loops("none"), loops("none")
    data = protect(host, loop, tmp_path)
    assert decrypt(host, tell=lambda done, size: done > 0)
    entry = host.state.journal
    assert isinstance(entry, DiskDecryption)
    luks.format(other.node, Secret(bytes(64)), uuid=entry.member.uuid).close()
    copy = raw_header.read_valid_copies(other.node)[0]
    linear = {"type": "linear", "offset": str(HEADER), "size": "dynamic"}
    ended = {**copy.metadata(other.node), "segments": {"0": linear}, "keyslots": {}, "digests": {}}
    raw_header.write_header(other.node, ended, copy, copy.sequence + 1)
    sh("mkfs.ext4", "-q", "-F", "-E", f"offset={HEADER}", other.node, f"{DATA >> 10}K")
    before = other.image.read_bytes()
    loop.detach()
    host.disks[0] = Path(other.node)
    with pytest.raises(Refused) as caught:
        resume(host)
    assert caught.value.code == "another-disk" and other.image.read_bytes() == before
    assert "photos" in host.state.groups and host.state.journal == entry
    loop.attach()
    host.disks[0] = Path(loop.node)
    assert resume(host)
    assert_plain(loop, data, tmp_path)


def test_two_disks_that_are_it_are_refused(
    host: Machine, loops: Loops, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    loop, other = loops("none"), loops("none")
    data = protect(host, loop, tmp_path)
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(decrypt_disk, "_finish", is_cut)
        decrypt(host)
    before = loop.image.read_bytes()
    with open(other.disk, "r+b", buffering=0) as disk:
        disk.write(before)
    with pytest.raises(Refused) as caught:
        resume(host)
    assert caught.value.code == "duplicate" and other.image.read_bytes() == before == loop.image.read_bytes()
    other.detach()
    assert resume(host)
    assert_plain(loop, data, tmp_path)


def test_lost_with_another_in_its_place_it_is_given_up(
    host: Machine, loops: Loops, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    loop, other = loops("none"), loops("none")
    protect(host, loop, tmp_path)
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(decrypt_disk, "_finish", is_cut)
        decrypt(host)
    entry = host.state.journal
    assert isinstance(entry, DiskDecryption)
    craft(other, b"", entry.place)
    host.disks.clear()
    loop.detach()
    assert operation.give_up(host.paths, look=host.look, tcti=host.chip.tcti)
    assert host.state.journal is None


def is_cut(*_: object, **__: object) -> None:
    raise KeyboardInterrupt


@pytest.mark.root
@pytest.mark.parametrize("table", ["gpt", "dos"])
def test_cut_off_after_its_table_is_written_it_goes_on(
    host: Machine, loops: Loops, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, table: str
) -> None:
    """The node of the partition still shows the old header. After a boot it does not, and is in use already."""
    loop = loops(table)
    data = protect(host, loop, tmp_path)
    put = partition_table.put

    def put_and_cut(*arguments: Any) -> None:
        put(*arguments)
        is_cut()

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(partition_table, "put", put_and_cut)
        decrypt(host)
    entry = host.state.journal
    assert isinstance(entry, DiskDecryption) and not entry.placed and host.look()
    assert resume(host)
    assert_plain(loop, data, tmp_path)


def test_a_partition_that_a_boot_has_found_needs_no_other(
    host: Machine, loops: Loops, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    loop = loops("gpt")
    data = protect(host, loop, tmp_path)
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(partition_table, "tidy", is_cut)
        decrypt(host)
    sh("delpart", loop.disk, 2)
    sh("addpart", loop.disk, 2, (loop.start + HEADER) // 512, DATA // 512)
    held = os.open(loop.node, os.O_RDONLY | os.O_EXCL)  # as a mount does
    try:
        assert resume(host)
    finally:
        os.close(held)
    assert "does not know" not in capsys.readouterr().err
    assert_plain(loop, data, tmp_path)


def test_lost_at_its_end_nothing_of_the_group_is_left(
    host: Machine, loops: Loops, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    loop = loops("none")
    protect(host, loop, tmp_path)
    add_to_config(host)
    kek = host.state.groups["photos"].kek
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(leaving, "end_group", is_cut)
        decrypt(host)
    assert not host.state.groups and "[group.photos]" in Path(host.paths.config).read_text()
    host.disks.clear()
    loop.detach()
    lines = operation.give_up(host.paths, look=host.look, tcti=host.chip.tcti)
    assert lines and not any("group delete" in each for each in lines)
    assert "[group.photos]" not in Path(host.paths.config).read_text()
    assert (host.state.journal, host.state.headers) == (None, {})
    assert not [each for each in keyring.names() if each.startswith(f"unlock:kek:{kek}:")]
    assert host.state.narrowed


def test_a_keyslot_where_the_new_table_lies_for_a_moment_is_refused(
    host: Machine, loops: Loops, tmp_path: Path
) -> None:
    """As in headers that were LUKS1, which have no room behind the last keyslot."""
    loop = loops("gpt")
    protect(host, loop, tmp_path)
    (copy, *_) = raw_header.read_valid_copies(loop.node)
    header = copy.metadata(loop.node)
    area = header["keyslots"]["0"]["area"]
    other = {**header["keyslots"]["0"], "area": {**area, "offset": str(HEADER - int(area["size"]))}}
    digest = {**header["digests"]["0"], "keyslots": ["0", "1"]}
    changed = {**header, "keyslots": {**header["keyslots"], "1": other}, "digests": {"0": digest}}
    raw_header.write_header(loop.node, changed, copy, copy.sequence + 1)
    error = refused(host, loop)
    assert (error.code, error.hint[-26:]) == ("no-room", "unlock group delete photos")


def test_the_next_keyslot_goes_where_it_is_expected(tmp_path: Path) -> None:
    """In the first room that is large enough, as libcryptsetup does it."""
    image = tmp_path / "image"
    image.write_bytes(bytes(HEADER + MIB))
    with luks.format(str(image), Secret(bytes(64))) as made, Secret(bytes(64)) as dek:
        uuid = made.uuid
        for number in range(5):
            if number in (3, 4):
                made.remove_keyslot(number - 2)
            expected = adoptable.areas_of_keys(made, 64, more=1)[-1]
            slot = made.add_keyslot(dek, passphrase=Secret(b"x"))
            with luks.Container(str(image)) as again:
                assert again.uuid == uuid
                area = again.metadata["keyslots"][str(slot)]["area"]
            assert range(int(area["offset"]), int(area["offset"]) + int(area["size"])) == expected


def test_a_mapping_that_fstab_mounts_is_refused_first(host: Machine, loops: Loops, tmp_path: Path) -> None:
    loop = loops("none")
    protect(host, loop, tmp_path)
    before = Path(loop.node).read_bytes()
    Path(host.paths.fstab).parent.mkdir(parents=True, exist_ok=True)
    Path(host.paths.fstab).write_text("/dev/mapper/photos-0 /srv ext4 defaults 0 0\n")
    with pytest.raises(Refused) as caught:
        decrypt(host)
    assert caught.value.code == "fstab" and host.state.journal is None and Path(loop.node).read_bytes() == before


def test_stopped_after_each_hotzone_with_a_boot_in_between_it_goes_on(
    host: Machine, loops: Loops, tmp_path: Path
) -> None:
    """Each time the header gives the data by what early boot has, and by the recovery key while the journal has it."""
    loop = loops("none")
    data = protect(host, loop, tmp_path, sector=512)
    calls = 0

    def second(done: int, size: int) -> bool:
        nonlocal calls
        calls += 1
        return calls % 2 == 0

    outcome = decrypt(host, tell=second)
    stops = 0
    while outcome and outcome.outcome == "stopped":
        stops += 1
        assert host.boot() == "unsealed"
        host.take_key()
        assert isinstance(host.state.journal, DiskDecryption) and phase(loop.node) == "moving"
        assert read_half(loop.node, host.persistence) == data
        with luks.Container(loop.node) as container:
            each = fitting_token(container, host.persistence)
            with pytest.raises(Tampered):
                disk_keys.dek_by_checked_recovery_key(container, each, host.recovery)
            with disk_keys.dek_by_checked_recovery_key(container, each, host.recovery, in_clear=True) as key:
                assert key == host.recovery
        outcome = resume(host, second)
    assert stops == 5
    assert_plain(loop, data, tmp_path)


def test_an_operators_keyslot_opens_it_on_the_way(host: Machine, loops: Loops, tmp_path: Path) -> None:
    loop = loops("none")
    data = protect(host, loop, tmp_path)
    with luks.Container(loop.node) as container, Secret(host.deks[container.uuid]) as dek:
        container.add_keyslot(dek, passphrase=Secret(b"of an operator"))
    decrypt(host, tell=lambda done, size: done > 0)
    stock_opens(Path(loop.node), Secret(b"of an operator"))
    assert resume(host) and loop.plain() == data


# What is refused, and is then what it was


def refused(host: Machine, loop: Loop, disk: str = "photos-0") -> UnlockError:
    def content() -> list[bytes]:
        return [Path(each).read_bytes() for each in (loop.image, host.paths.state, host.paths.config)]

    before = content()
    with pytest.raises(UnlockError) as caught:
        decrypt(host, disk)
    assert content() == before
    assert caught.value.hint and "\n" not in str(caught.value)
    return caught.value


def test_what_cannot_be_decrypted_is_refused(
    host: Machine, loops: Loops, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    loop = loops("none")
    data = protect(host, loop, tmp_path)
    assert refused(host, loop, "/dev/null").code == "not-a-member"
    assert refused(host, loop, "photos-1").code == "not-a-member"
    host.add_group("more", 2)
    assert refused(host, loop, "more-0").code == "member"
    host.add_group("image", 1)
    error = refused(host, loop, "image-0")
    assert error.code == "no-partition" and error.hint.endswith("unlock group delete image")
    with monkeypatch.context() as patch:
        patch.setattr(devices, "mount_points_on", lambda names: ["/srv", "/var"])
        error = refused(host, loop)
        assert (error.code, "/var" in str(error), "/srv" in str(error)) == ("root-disk", True, False)
    host.disks, kept = [], host.disks
    assert refused(host, loop).code == "missing"
    host.disks = kept
    with host.work() as work:
        work.state.groups["photos"] = work.state.groups["photos"]._replace(policy="provider")
        work.state.save()
    assert refused(host, loop).code == "needs-persistence"
    with host.work() as work:
        work.state.groups["photos"] = work.state.groups["photos"]._replace(policy="persistent")
        work.state.save()
    sh("losetup", "--detach", loop.disk)
    loop.disk = loop.node = sh("losetup", "--find", "--show", loop.image)  # takes no partitions
    host.disks[0] = Path(loop.node)
    assert refused(host, loop).code == "no-partition"
    sh("losetup", "--detach", loop.disk)
    loop.disk = loop.node = sh("losetup", "--find", "--show", "--partscan", loop.image)
    host.disks[0] = Path(loop.node)
    with pytest.raises(Refused) as caught:
        partition_table.whole_disk(loop.disk, 3 << 40, HEADER, "photos")
    assert caught.value.code == "not-supported"
    assert decrypt(host) and loop.plain() == data


@pytest.mark.parametrize(
    ("make", "word"),
    [
        (lambda sector: sector[:450] + b"\x05" + sector[451:], "logical"),
        (lambda sector: sector[:510] + bytes(2), "no partition table"),
        (lambda sector: sector[:466] + b"\x83" + sector[467:], "hybrid"),
    ],
    ids=["no-gpt", "no-table", "hybrid"],
)
def test_a_table_that_is_not_one_is_refused(
    tmp_path: Path, loops: Loops, make: Callable[[bytes], bytes], word: str
) -> None:
    loop = Loop(tmp_path, "gpt", DATA, name="odd", partition=False)
    try:
        with open(loop.disk, "r+b", buffering=0) as disk:
            sector = disk.read(512)
            disk.seek(0)
            disk.write(make(sector))
        with partition_table._Disk(loop.disk, os.O_RDONLY) as opened, pytest.raises(Refused) as caught:
            opened.find(2, loop.start, HEADER + DATA, HEADER, "photos")
        assert caught.value.hint and word in str(caught.value)
    finally:
        loop.detach()


@pytest.mark.parametrize("at", [512 + 20, 1024 + 128 + 40, -512 + 20])
def test_a_damaged_gpt_is_refused(tmp_path: Path, at: int) -> None:
    """A header, an entry, the backup."""
    loop = Loop(tmp_path, "gpt", DATA, name="odd", partition=False)
    try:
        size = loop.image.stat().st_size
        with open(loop.disk, "r+b", buffering=0) as disk:
            disk.seek(at % size // 512 * 512)
            sector = bytearray(disk.read(512))
            sector[at % 512] ^= 1
            disk.seek(at % size // 512 * 512)
            disk.write(sector)
        with partition_table._Disk(loop.disk, os.O_RDONLY) as opened, pytest.raises(Refused) as caught:
            opened.find(2, loop.start, HEADER + DATA, HEADER, "photos")
        assert caught.value.code == "no-partition" and "--verify" in caught.value.hint
    finally:
        loop.detach()


def test_a_logical_partition_is_refused(tmp_path: Path) -> None:
    image = tmp_path / "odd"
    image.write_bytes(bytes(8 * MIB))
    sh("sfdisk", "--quiet", image, text=b"label: dos\nstart=2048,size=4096,type=5\nstart=4096,size=1024\n")
    with partition_table._Disk(str(image), os.O_RDONLY) as opened, pytest.raises(Refused) as caught:
        opened.find(5, 4096 * 512, 1024 * 512, MIB // 2, "photos")
    assert caught.value.code == "no-partition" and "logical" in str(caught.value)


def test_the_plan_is_shown_and_nothing_is_done(host: Machine, loops: Loops, tmp_path: Path) -> None:
    loop = loops("none")
    protect(host, loop, tmp_path)
    before = Path(loop.disk).read_bytes(), Path(host.paths.state).read_bytes()
    plans: list[Plan] = []

    def show(plan: Plan) -> bool:
        plans.append(plan)
        return False

    assert decrypt_disk.decrypt_disk(host.paths, "photos-0", never, show, host.look, tcti=host.chip.tcti) is None
    assert (Path(loop.disk).read_bytes(), Path(host.paths.state).read_bytes()) == before
    (plan,) = plans
    assert len(plan.steps) == 5 and "encryption of photos-0" in plan.destroys[0] and plan.thing == "photos-0"


# What a header can do that is put back


def test_a_header_from_the_way_opens_nothing_after_the_end(host: Machine, loops: Loops, tmp_path: Path) -> None:
    """Neither by what a boot unseals then, nor by the recovery key; nor is a linear part taken without a plan."""
    loop = loops("none")
    protect(host, loop, tmp_path)
    assert decrypt(host, tell=lambda done, size: done > 0)
    kept = Path(loop.disk).read_bytes()[:HEADER]
    old = Secret(bytes(host.persistence))
    assert resume(host)
    host.boot()
    host.take_key()
    with open(loop.disk, "r+b", buffering=0) as disk:
        disk.write(kept)
    with luks.Container(loop.node) as container:
        each = next(each for each in disk_keys.read_tokens(container, "") if each.reencryption)
        disk_keys.unwrap_volume_key(container, each, old).wipe()
        for one in disk_keys.read_tokens(container, ""):
            with pytest.raises((Tampered, Malformed)):
                disk_keys.unwrap_volume_key(container, one, host.persistence)
            with pytest.raises((Tampered, Malformed)):
                disk_keys.dek_by_checked_recovery_key(container, one, host.recovery)


@pytest.mark.parametrize("started", [False, True])
def test_cancelled_before_it_has_begun_and_not_later(
    host: Machine, loops: Loops, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, started: bool
) -> None:
    """The token with the plan was on the disk: a copy of it must open nothing later either."""
    loop = loops("none")
    data = protect(host, loop, tmp_path)

    def killed(*_: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(reencrypt.Disk, "run" if started else "start", killed)
        decrypt(host)
    assert phase(loop.node) == ("moving" if started else "old")
    if started:
        with pytest.raises(Refused) as caught:
            operation.cancel(host.paths, look=host.look)
        assert caught.value.code == "cannot-cancel"
        with pytest.raises(Refused) as caught:
            operation.give_up(host.paths, look=host.look)
        assert caught.value.code == "present"
        host.disks.clear()
        loop.detach()
        assert operation.give_up(host.paths, look=host.look)
        assert host.state.journal is None and host.state.narrowed
        return
    assert operation.cancel(host.paths, look=host.look)
    state = host.state
    assert state.journal is None and state.narrowed == "photos-0 was to be decrypted, and is not"
    with luks.Container(loop.node) as container:
        assert len(container.keyslots()) == len(container.tokens("unlock")) == 1
    assert read_half(loop.node, host.persistence) == data
    assert decrypt(host) and loop.plain() == data


def test_a_null_cipher_or_a_linear_part_that_no_plan_names_is_refused(
    host: Machine, loops: Loops, tmp_path: Path
) -> None:
    """With the token of this host, with a plan to decrypt and without one."""
    loop = loops("none")
    protect(host, loop, tmp_path)
    at_rest = raw_header.read_valid_copies(loop.node)[0]
    decrypt(host, tell=lambda done, size: done > 0)
    copy = raw_header.read_valid_copies(loop.node)[0]
    moving = copy.metadata(loop.node)
    linear = {"type": "linear", "offset": str(HEADER), "size": "dynamic"}
    null = {**at_rest.metadata(loop.node)["segments"]["0"], "encryption": "cipher_null-ecb"}
    segments = moving["segments"]
    flagged = {number: each for number, each in segments.items() if number > "1"}
    attacks: dict[str, tuple[object, dict[str, object]]] = {
        "null, no plan": (at_rest, {"segments": {"0": null}}),
        "linear, no plan": (at_rest, {"segments": {"0": linear}}),
        "the way, no plan": (at_rest, {"segments": segments, "config": moving["config"]}),
        "null part": (copy, {"segments": {**segments, "0": {**null, "size": segments["0"]["size"]}}}),
        "null in the end": (copy, {"segments": {**segments, "3": {**null, "flags": ["backup-final"]}}}),
        "null at the start": (copy, {"segments": {**segments, "2": {**null, "flags": ["backup-previous"]}}}),
        "another place": (copy, {"segments": {**segments, "0": {**segments["0"], "offset": "0"}}}),
        "clear after encrypted": (
            copy,
            {"segments": {"0": segments["1"], "1": segments["0"], **flagged}},
        ),
        "finished in clear": (copy, {"segments": {"0": linear}, "config": {**moving["config"], "requirements": {}}}),
        "no requirement": (copy, {"config": {**moving["config"], "requirements": {}}}),
        "of another mode": (copy, {"keyslots": with_mode(moving["keyslots"], mode="encrypt")}),
        "backward": (copy, {"keyslots": with_mode(moving["keyslots"], direction="backward")}),
    }
    opened = []
    for name, (like, changes) in attacks.items():
        assert isinstance(like, raw_header.Copy)
        header = Header(loop.node, str(luks_uuid(copy)), canonical({**like.metadata(loop.node), **changes}))
        for each in disk_keys.read_tokens(header, ""):
            with suppress(Tampered, Malformed):
                disk_keys.unwrap_volume_key(header, each, host.persistence).wipe()
                opened.append(name)
            with suppress(Tampered, Malformed), disk_keys.mac_key(host.recovery, host.state.host) as key:
                disk_keys.check_recovery(header, each, key)
                opened.append(name)
    assert not opened
    header = Header(loop.node, luks_uuid(copy), canonical(moving))
    assert fitting_token(header, host.persistence).reencryption


def with_mode(keyslots: dict[str, Any], **fields: str) -> dict[str, Any]:
    return {number: {**each, **(fields if each["type"] == "reencrypt" else {})} for number, each in keyslots.items()}


def luks_uuid(copy: raw_header.Copy) -> str:
    return copy.content[168:208].rstrip(b"\0").decode()


def test_cryptsetup_may_end_it(host: Machine, loops: Loops, tmp_path: Path) -> None:
    """With the recovery key, where this boot has no key; nothing opens the disk then, until the command is run again.
    Not without a file system where the data is."""
    loop = loops("none")
    data = protect(host, loop, tmp_path)
    decrypt(host, tell=lambda done, size: done > 0)
    stock = ["cryptsetup", "reencrypt", "--resume-only", "--batch-mode", "--key-file", "-", loop.node]
    subprocess.run(stock, input=bytes(host.recovery), check=True, capture_output=True)
    with open(loop.disk, "r+b", buffering=0) as disk:
        disk.seek(HEADER)
        disk.write(bytes(MIB))
    with pytest.raises(Refused) as caught:
        resume(host)
    assert caught.value.code == "not-supported"
    with open(loop.disk, "r+b", buffering=0) as disk:
        disk.seek(HEADER)
        disk.write(data[:MIB])
    assert resume(host) and loop.plain() == data
    assert_plain(loop, data, tmp_path)
