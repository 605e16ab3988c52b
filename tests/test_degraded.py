# SPDX-License-Identifier: Apache-2.0
"""Which disks a group opens with when some are away: what a btrfs can do without, which member list counts, who is left
out because the group was written without him. Real headers and tokens, real btrfs; nothing is mounted."""

import gzip
import shutil
import subprocess
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

import pytest

from tests.flowfixture import HOST, Host
from tests.killing import Killer
from tests.saved import Saved
from tests.test_devices import Machine
from tests.test_disk import edit
from unlock import cli
from unlock.boot import gate
from unlock.boot.activation import GroupOpener
from unlock.disks import arrays, btrfs_layout, disk_keys, luks, token, udev
from unlock.disks.btrfs_layout import Device
from unlock.disks.groups import Away, Group
from unlock.errors import Malformed, Refused, UnlockError, Usage
from unlock.host import config, keyring, report, this_boot
from unlock.host.state import State
from unlock.keys import access, rotation
from unlock.operations import create_group, status
from unlock.operations.check.disks import check_arrays, check_group
from unlock.operations.consent import Plan, agree
from unlock.operations.create_group import NewGroup
from unlock.operations.heal_group import heal_group
from unlock.operations.set_group import set_degraded
from unlock.secret import Secret

# What a btrfs can do without


def btrfs(folder: Path, data: str, metadata: str, count: int) -> list[Device]:
    images = [folder / f"disk-{number}" for number in range(count)]
    for image in images:
        with image.open("wb") as file:
            file.truncate(256 << 20)
    subprocess.run(["mkfs.btrfs", "-q", "-f", "-d", data, "-m", metadata, *images], check=True, capture_output=True)
    return [device for image in images if (device := btrfs_layout.read_device(str(image)))]


@pytest.mark.parametrize(
    ("data", "metadata", "count", "can_lose"),
    [
        ("raid1", "raid1", 2, 1),
        ("raid1c3", "raid1c3", 3, 2),
        ("raid10", "raid1", 4, 1),
        ("raid5", "raid1", 3, 1),
        ("raid6", "raid1c3", 4, 2),
        ("raid0", "raid1", 2, 0),
        ("single", "dup", 1, 0),
    ],
)
def test_a_btrfs_can_lose_as_many_devices_as_its_profiles_allow(
    tmp_path: Path, data: str, metadata: str, count: int, can_lose: int
) -> None:
    devices = btrfs(tmp_path, data, metadata, count)
    assert [(each.devid, each.devices) for each in devices] == [(n + 1, count) for n in range(count)]
    assert btrfs_layout.why_not_enough(devices) == ""
    for left in (devices[lost:] for lost in range(1, count)):
        try:
            words = btrfs_layout.why_not_enough(left)
        except Malformed:
            words = "its chunk tree is on the others"
        assert bool(words) == (count - len(left) > can_lose), words


def test_what_counts_is_where_the_chunks_are(tmp_path: Path) -> None:
    """Metadata without a second device are on one of the two, and the kernel mounts by that one alone."""
    words = []
    for device in btrfs(tmp_path, "raid1", "dup", 2):
        try:
            words.append(btrfs_layout.why_not_enough([device]))
        except Malformed as error:
            words.append(str(error))
    assert sorted(map(bool, words)) == [False, True]


def test_what_is_no_btrfs_or_a_broken_one_is_told_apart(tmp_path: Path) -> None:
    first, _ = btrfs(tmp_path, "raid1", "raid1", 2)
    empty = tmp_path / "empty"
    empty.write_bytes(bytes(1 << 20))
    assert btrfs_layout.read_device(str(empty)) is None
    (tmp_path / "short").write_bytes(b"")
    assert btrfs_layout.read_device(str(tmp_path / "short")) is None
    for at, value in ((0x94, b"\1\0\0\0"), (0x32B, bytes(17)), (0xA0, b"\xff\xff\0\0")):
        with open(first.node, "r+b") as file:
            file.seek(65536 + at)
            before = file.read(len(value))
            file.seek(65536 + at)
            file.write(value)
        with pytest.raises(Malformed):
            btrfs_layout.why_not_enough([btrfs_layout.read_device(first.node) or first])
        with open(first.node, "r+b") as file:
            file.seek(65536 + at)
            file.write(before)
    with pytest.raises(Malformed, match="no device that is here has a readable copy"):
        btrfs_layout.why_not_enough([first._replace(chunk_root=1)])
    with pytest.raises(Malformed, match="no device that is here has a readable copy"):
        btrfs_layout.why_not_enough([first._replace(chunk_root_generation=10**6)])


# Which members


def opener(host: Host, images: Iterable[Path]) -> GroupOpener:
    """A gate that has read the headers of these disks."""
    record = report.Report("gate data")
    found = gate._opener(host.state, "data", gate.make_unwrap(host.paths, "data", record, 0), record)
    for image in images:
        found.add_disk(udev.Disk(str(image), image.name, "", "", "", 0, 0))
    found.read_headers()
    found.wipe()
    return found


def names(host: Host, found: GroupOpener) -> list[str]:
    """The members that would be opened degraded."""
    return sorted(each.name for each in host.group.members if each.uuid in found.present_uuids("data"))


def write_list(host: Host, image: Path, group: Group, *, keeps_old: bool = False) -> None:
    """A token of another member list."""
    with host.work() as work, disk_keys.mac_key(host.recovery, HOST) as mac_key:
        kek, _ = access.find_kek(work, group)
        with access.token_keys(work, kek=kek, mac_key=mac_key.copy()) as keys:
            with luks.Container(str(image)) as container:
                member = next(each for each in group.members if each.uuid == container.uuid)
                dek = Secret(host.deks[container.uuid])
                made = disk_keys.make_token(container, HOST, group, member, dek, keys)
            disk_keys.write_token(str(image), made, dek, keys)
            if not keeps_old:
                disk_keys.drop_other_tokens(str(image), made, dek, keys)


@pytest.fixture
def trio(tmp_path: Path, key_cache: None) -> Host:
    return Host(tmp_path, 3)


def test_those_that_are_here_are_opened_by_the_newest_list_that_is_known(trio: Host) -> None:
    first, second, third = trio.disks
    assert names(trio, opener(trio, [first, third])) == ["data-0", "data-2"]
    assert names(trio, opener(trio, [third])) == ["data-2"]
    assert names(trio, opener(trio, [])) == []
    newer = trio.group._replace(manifest=2, members=trio.group.members[:2])
    write_list(trio, first, newer)
    assert names(trio, opener(trio, trio.disks)) == ["data-0"], "however many have the older one"
    write_list(trio, second, newer)
    assert names(trio, opener(trio, [first, third])) == ["data-0"], "the disk that left the list is not opened"
    assert names(trio, opener(trio, [second, third])) == ["data-1"]


def test_a_list_that_is_being_written_does_not_take_away_those_that_have_the_old_one(trio: Host) -> None:
    """Killed after the first token of a new list: that disk has both, and the others have the old one alone."""
    first, second, third = trio.disks
    newer = trio.group._replace(manifest=2)
    write_list(trio, first, newer, keeps_old=True)
    assert names(trio, opener(trio, [first, second])) == ["data-0", "data-1"]
    write_list(trio, second, newer, keeps_old=True)
    assert names(trio, opener(trio, [first, second])) == ["data-0", "data-1"]
    write_list(trio, first, newer)
    assert names(trio, opener(trio, [first, second, third])) == ["data-0", "data-1"]


def test_unplugging_the_newest_disks_does_not_bring_an_older_list_back(trio: Host) -> None:
    """The state knows the newest list: a disk that has an older one alone is `stale`, were its list complete or not."""
    first, second, third = trio.disks
    with trio.work() as work:
        work.state.groups["data"] = trio.group._replace(manifest=2, members=trio.group.members[:2])
        work.state.save()
    newer = trio.group
    write_list(trio, first, newer)
    write_list(trio, second, newer)
    found = opener(trio, [third])
    assert found.report.outcome(str(third)) == "stale" and names(trio, found) == []
    assert "generation 1, and that of the group 2" in found.report.disks[str(third)].detail
    lone = trio.group._replace(manifest=3, members=trio.group.members[:1])
    with trio.work() as work:
        work.state.groups["data"] = lone
        work.state.save()
    found = opener(trio, [first, second])  # complete by the list before
    assert not found.is_complete("data") and found.report.outcome(str(first)) == "stale"
    write_list(trio, first, lone)
    assert opener(trio, [first, second]).is_complete("data")


def test_one_of_two_disks_with_one_uuid_is_no_member(trio: Host) -> None:
    first, second, _ = trio.disks
    copy = trio.folder / "copy"
    shutil.copyfile(second, copy)
    assert names(trio, opener(trio, [first, second, copy])) == ["data-0"]


def leave_out(host: Host, *away: tuple[int, str]) -> None:
    """These members were away while the group was written."""
    with host.work() as work:
        members = host.group.members
        entries = tuple(Away(members[number].uuid, kind, 10) for number, kind in away)
        work.state.groups["data"] = host.group._replace(away=entries)
        work.state.save()


def test_who_was_away_while_the_group_was_written_is_not_opened_with_the_others(trio: Host) -> None:
    first, second, third = trio.disks
    leave_out(trio, (1, "btrfs"))
    found = opener(trio, trio.disks)
    assert not found.is_complete("data") and names(trio, found) == ["data-0", "data-2"]
    assert found.report.outcome(str(second)) == "was-away"
    assert found.expected_uuids <= found.present_uuids("data"), "nobody else is waited for"
    found = opener(trio, [second])
    assert names(trio, found) == [], "by itself it would bring back what is old"
    message, hint = gate._explain_failure(trio.paths, found.report, "data")
    assert "data-0 (serial unknown) is missing" in message
    assert f"data-1 ({second}): its group was written while it was away" in message
    assert hint == "unlock status"
    found = opener(trio, [first, second])
    assert not found.expected_uuids <= found.present_uuids("data"), "data-2 may still come"
    assert third.exists()


def test_md_lvm_and_zfs_get_a_disk_back_as_it_is(trio: Host) -> None:
    leave_out(trio, (1, "linux_raid_member"))
    assert opener(trio, trio.disks).is_complete("data")


def test_who_is_away_is_kept_until_he_is_healed_and_since_when(trio: Host) -> None:
    def opened(*mappings: str, generation: int = 20) -> tuple[tuple[str, str, int], ...]:
        row = report.GroupRow("data", "degraded", mappings=mappings, kind="btrfs", generation=generation)
        gate._record_away(trio.paths, row)
        return tuple((each.uuid, each.kind, each.generation) for each in trio.group.away)

    uuids = [each.uuid for each in trio.group.members]
    assert opened("data-0", "data-1") == ((uuids[2], "btrfs", 20),)
    assert opened("data-0", generation=30) == ((uuids[1], "btrfs", 30), (uuids[2], "btrfs", 20))
    assert opened("data-0", generation=40) == ((uuids[1], "btrfs", 30), (uuids[2], "btrfs", 20))
    assert State.load(trio.paths).groups["data"] == trio.group
    assert opened("data-0", "data-1", "data-2") == ()


def test_only_a_group_whose_tokens_all_say_so_opens_degraded_in_early_boot(trio: Host) -> None:
    """Early boot has no unlock.toml."""
    first, second, _ = trio.disks
    assert not opener(trio, [first, second]).may_open_degraded("data")
    with trio.work() as work:
        rotation.set_degraded(work, work.state.groups["data"], True)
    assert opener(trio, [first, second]).may_open_degraded("data")
    assert trio.boot_opens() and trio.recovery_opens()
    write_list(trio, second, trio.group._replace(degraded=False))
    assert not opener(trio, [first, second]).may_open_degraded("data")
    with trio.work() as work:
        work.state.groups["data"] = trio.group._replace(behind=tuple(each.uuid for each in trio.group.members))
        rotation.catch_up_disks(work)
    assert opener(trio, [first, second]).may_open_degraded("data")


def test_a_disk_that_is_away_when_the_policy_changes_gets_its_token_when_it_is_back(trio: Host) -> None:
    away = trio.disks.pop()
    with trio.work() as work:
        outcome = rotation.set_degraded(work, work.state.groups["data"], True)
        assert list(outcome.behind) == ["data-2"]
    trio.disks.append(away)
    with trio.work() as work:
        rotation.catch_up_disks(work)
    with luks.Container(str(away)) as container:
        assert [each.degraded for each in disk_keys.read_tokens(container, HOST)] == [True]
    assert trio.group.behind == () and trio.boot_opens()


# Configuration, status, check, heal


def test_the_policy_is_never_where_nobody_says_anything(tmp_path: Path) -> None:
    def group(text: str) -> config.GroupConfig:
        found = config.parse(f"[group.data]\n{text}\n").group("data")
        assert found
        return found

    assert (group("").degraded, group("").degraded_after) == ("never", 30)
    assert (group('degraded = "allow"\ndegraded_after = 0').degraded_after) == 0
    assert group("degraded_after = 99999999").degraded_after == config.DEADLINE_MAX
    for wrong in ('degraded = "yes"', "degraded = true", "degraded_after = -1", 'degraded_after = "30"'):
        with pytest.raises(Malformed, match=r"group\.data\.degraded"):
            group(wrong)
    written = config.GroupConfig("data", "/srv", "btrfs", "", 90, degraded="allow", degraded_after=5)
    assert config.parse(config.group_table(written)).groups == {"data": written}


def shown(host: Host) -> status.GroupStatus:
    (found,) = status.read_status(host.paths).groups
    return found


def test_status_says_who_is_away_and_json_has_it(trio: Host) -> None:
    assert (shown(trio).degraded, shown(trio).away) == ("never", [])
    leave_out(trio, (1, "btrfs"))
    row = report.GroupRow("data", "degraded", mappings=("data-0",), kind="btrfs", generation=10)
    this_boot.mark_open(trio.paths, "data", ["data-0"], row)
    found = shown(trio)
    assert (found.state, found.away) == ("degraded", ["data-1"])
    said = status.to_text(status.read_status(trio.paths))
    assert "data-1: away while group data was written" in said and "group data is open degraded" in said
    (as_json,) = status.to_json(status.read_status(trio.paths))["groups"]
    assert (as_json["degraded"], as_json["away"], as_json["state"]) == ("never", ["data-1"], "degraded")
    this_boot.mark_open(trio.paths, "data", ["data-0", "data-1", "data-2"])
    assert shown(trio).state != "degraded" and not list(Path(trio.paths.of_this_boot("degraded-disks")).iterdir())


def checked(host: Host) -> list[tuple[str, str, str]]:
    keys = keyring.get("unlock:persistence")
    found = check_group(host.paths, host.state, host.group, host.look(), keys)
    return [(each.what.partition(", disk ")[2], each.verdict, each.do) for each in found]


def test_check_tells_whether_a_boot_opens_a_group_without_a_dead_disk(trio: Host) -> None:
    dead = trio.disks.pop()
    assert checked(trio) == [("data-2", "unsafe", "unlock status")]
    trio.configure(more='[group.data]\ndegraded = "allow"\n')
    assert checked(trio) == [("data-2", "unproven", "unlock status")], "whether the others suffice is not known"
    row = report.GroupRow("data", "degraded", mappings=("data-0", "data-1"), kind="btrfs", generation=10)
    this_boot.mark_open(trio.paths, "data", ["data-0", "data-1"], row)
    assert checked(trio) == [("data-2", "note", "unlock status")]
    leave_out(trio, (2, "btrfs"))
    trio.disks.append(dead)
    assert checked(trio) == [("data-2", "note", "unlock group heal data")]
    trio.configure()
    assert checked(trio) == [("data-2", "unsafe", "unlock group heal data")]


@pytest.mark.root
@pytest.mark.parametrize("rebuilding", [False, True])
def test_an_array_that_lacks_a_disk_is_told_though_all_are_open(trio: Host, rebuilding: bool) -> None:
    """`[U_]` in /proc/mdstat, when the disk that was away is back."""
    machine = Machine(trio.folder / "root")
    for number, member in enumerate(trio.group.members):
        machine.block(f"sd{number}", f"8:{number}")
        uuid = f"CRYPT-LUKS2-{member.uuid.replace('-', '')}-{member.name}"
        machine.mapping(member.name, f"253:{number}", uuid, f"sd{number}")
    machine.block("sdz", "8:9")
    files = {"degraded": "1", "raid_disks": "3 (2)", "sync_action": "recover" if rebuilding else "idle"}
    for name, device, below in ("md127", "9:127", ("dm-0", "dm-1")), ("md1", "9:1", ("dm-2", "sdz")):
        folder = machine.block(name, device, below=below) / "md"
        folder.mkdir()
        for file, text in files.items():
            (folder / file).write_text(f"{text}\n")
    blocks = trio.folder / "root/sys/block"
    blocks.mkdir()
    for name, folder in machine.folders.items():
        (blocks / name).symlink_to(folder)
    words = "/dev/md127 lacks 1 of its 3 disks" + (", and is being rebuilt" if rebuilding else "")
    do = "cat /proc/mdstat" if rebuilding else "mdadm --detail /dev/md127"
    found = status.read_status(trio.paths)
    assert f"group data: {words}: {do}" in status.to_text(found)
    (as_json,) = status.to_json(found)["groups"]
    told = {"node": "/dev/md127", "lacks": 1, "disks": 3, "rebuilding": rebuilding, "hint": do}
    assert as_json["arrays"] == [told]
    assert as_json["state"] == "degraded"
    assert list(check_arrays(trio.paths, trio.state)) == [("group data", "note", words, do)]


@pytest.mark.parametrize(
    ("health", "action", "lacks"),
    [("AA", "idle", 0), ("DA", "idle", 1), ("-A", "idle", 1), ("aA", "recover", 1), ("aa", "resync", 0)],
)
def test_what_a_raid_of_lvm_lacks_is_what_the_kernel_says(health: str, action: str, lacks: int) -> None:
    text = f"root: 0 2097152 crypt\npool-data: 0 131072 raid raid1 2 {health} 131072/131072 {action} 0 0 -\n"
    ((name, raid),) = arrays.read_raids(text)
    assert (name, raid.node, raid.lacks, raid.disks) == ("pool-data", "/dev/mapper/pool-data", lacks, 2)
    assert raid.rebuilding == (action == "recover")


def test_heal_has_nothing_to_do_or_says_what_it_needs(trio: Host) -> None:
    with pytest.raises(Usage, match="no group other"):
        heal_group(trio.paths, "other", agree, trio.look)
    assert heal_group(trio.paths, "data", agree, trio.look) == ((), ())
    leave_out(trio, (1, "btrfs"))
    before = Path(trio.paths.state).read_bytes()
    with pytest.raises(Exception, match="not mounted for writing") as caught:
        heal_group(trio.paths, "data", agree, trio.look)
    assert (caught.value.code, caught.value.hint) == ("not-mounted", "unlock open data --degraded")  # type: ignore[attr-defined]
    assert Path(trio.paths.state).read_bytes() == before


def test_a_token_says_degraded_and_an_earlier_unlock_reads_those_that_do_not(trio: Host) -> None:
    with luks.Container(str(trio.disks[0])) as container:
        assert [fields["version"] for _, fields in container.tokens(token.TYPE)] == [1]


@pytest.mark.root
def test_set_edits_one_line_of_unlock_toml_for_a_group_that_the_real_root_opens(trio: Host) -> None:
    def text() -> str:
        return Path(trio.paths.config).read_text()

    def only_shown(plan: Plan) -> bool:
        steps.extend(plan.steps)
        return False

    machine = Machine(trio.folder / "root")
    machine.block("sda", "8:0")
    machine.mount("8:0", "/", "/dev/sda", "ext4")
    more = '# mine\n[group.data] # the data\nmount = "/srv/data" # here\ndegraded_after = 5\n\n[sync]\n'
    trio.configure(more=more)
    before = text()
    steps: list[str] = []
    set_degraded(trio.paths, "data", "allow", only_shown, trio.look)
    assert text() == before and 'degraded = "allow"' in steps[0]
    for wanted in ("allow", "allow", "never"):
        assert set_degraded(trio.paths, "data", wanted, agree, trio.look) == []
        group = config.load(trio.paths.config).group("data")
        assert group == config.GroupConfig("data", "/srv/data", "", "", 90, degraded=wanted, degraded_after=5)
        assert text().replace(f'degraded = "{wanted}"\n', "") == before
    with luks.Container(str(trio.disks[0])) as container:
        assert [fields["version"] for _, fields in container.tokens(token.TYPE)] == [1], "no token has it"
    trio.configure(more='group = { data = { mount = "/srv/data" } }\n')
    before = text()
    with pytest.raises(Refused) as caught:
        set_degraded(trio.paths, "data", "allow", agree, trio.look)
    assert caught.value.code == "not-edited" and text() == before
    trio.configure()
    set_degraded(trio.paths, "data", "allow", agree, trio.look)
    assert config.load(trio.paths.config).groups["data"].degraded == "allow"


@pytest.mark.root
def test_the_tokens_of_roots_group_have_the_policy_if_every_initramfs_reads_that(trio: Host) -> None:
    machine = Machine(trio.folder / "root")
    machine.block("sda", "8:0")
    machine.mapping("data-0", "253:0", "CRYPT-LUKS2-" + "0" * 32 + "-data-0", "sda")
    machine.mount("253:0", "/", "/dev/mapper/data-0", "ext4")
    old = put_image(trio, "6.1.0-amd64", "usr/lib/unlock/reads/token-1")
    before = [each.read_bytes() for each in trio.disks]
    with pytest.raises(Refused) as caught:
        set_degraded(trio.paths, "data", "allow", agree, trio.look)
    assert (caught.value.code, caught.value.hint) == ("old-initramfs", "update-initramfs -u -k 6.1.0-amd64")
    assert [each.read_bytes() for each in trio.disks] == before
    old.unlink()
    put_image(trio, "6.12.0-amd64", "usr/lib/unlock/reads/token-2")
    for wanted in ("allow", "allow", "never"):
        assert set_degraded(trio.paths, "data", wanted, agree, trio.look) == []
        assert trio.group.degraded == (wanted == "allow")
        for image in trio.disks:
            with luks.Container(str(image)) as container:
                versions = [fields["version"] for _, fields in container.tokens(token.TYPE)]
                assert versions == [2 if wanted == "allow" else 1]
        assert trio.boot_opens() and trio.recovery_opens()


def put_image(host: Host, version: str, *names: str) -> Path:
    """An initramfs with unlock in it, and these files."""
    tree, image = host.folder / "root/tree", host.folder / f"root/boot/initrd.img-{version}"
    names = ("usr/lib/unlock/unlock/boot/agent.pyc", *names)
    for name in names:
        (tree / name).parent.mkdir(parents=True, exist_ok=True)
        (tree / name).touch()
    image.parent.mkdir(exist_ok=True)
    listed = "\n".join(names).encode()
    made = subprocess.run(["cpio", "--quiet", "-o", "-H", "newc"], input=listed, capture_output=True, cwd=tree)
    image.write_bytes(gzip.compress(made.stdout))
    return image


# Written apart


@pytest.fixture
def pair(tmp_path: Path) -> Iterator[Callable[..., list[Device]]]:
    """A raid1 of two. Calling it writes to those disks alone, so many times; what both superblocks say then."""
    images = [tmp_path / f"disk-{number}" for number in (0, 1)]
    btrfs(tmp_path, "raid1", "raid1", 2)
    where = tmp_path / "mounted"
    where.mkdir()

    def write(*numbers: int, times: int = 1) -> list[Device]:
        for _ in range(times):
            loops = [sh("losetup", "--find", "--show", images[number]) for number in numbers]
            sh("btrfs", "device", "scan", "--forget", check=False)
            sh("btrfs", "device", "scan", *loops)
            sh("mount", "-o", "degraded", loops[0], where)
            (where / f"by-{'-'.join(map(str, numbers))}").write_text("x")
            sh("umount", where)
            for each in loops:
                sh("btrfs", "device", "scan", "--forget", each)
                sh("losetup", "--detach", each)
        return [device for image in images if (device := btrfs_layout.read_device(str(image)))]

    yield write


def sh(*command: object, check: bool = True) -> str:
    done = subprocess.run(list(map(str, command)), capture_output=True, check=False)
    assert done.returncode == 0 or not check, done.stderr.decode()
    return done.stdout.decode().strip()


@pytest.mark.root
def test_two_disks_that_were_written_apart_are_told_from_one_that_lags(pair: Callable[..., list[Device]]) -> None:
    both = pair(0, 1)
    assert both[0].generation == both[1].generation and btrfs_layout.written_apart(both) == []
    assert btrfs_layout.lagging(both) == []
    first = pair(0)
    assert first[0].generation == first[1].generation + 1, "one short mount is one commit"
    assert btrfs_layout.lagging(first) == [first[1]] and btrfs_layout.written_apart(first) == []
    apart = pair(1)
    assert abs(apart[0].generation - apart[1].generation) <= 1, "by their generations nobody could tell"
    assert len(btrfs_layout.written_apart(apart)) == 1


@pytest.mark.root
def test_a_block_that_one_disk_lost_is_no_split_brain(pair: Callable[..., list[Device]]) -> None:
    first, second = pair(0, 1)
    (chunk,) = [
        each for each in btrfs_layout.read_chunks([first]) if each.start <= first.root < each.start + each.length
    ]
    (at,) = [offset for devid, offset in chunk.stripes if devid == second.devid]
    with open(second.node, "r+b") as file:
        file.seek(at + first.root - chunk.start)
        file.write(bytes(first.node_size))
    assert btrfs_layout.written_apart([first, second]) == []


@pytest.mark.root
def test_a_crash_within_a_commit_leaves_no_disk_behind(pair: Callable[..., list[Device]], tmp_path: Path) -> None:
    """One superblock of two is written, and every block that it needs is on both."""
    before = (tmp_path / "disk-1").read_bytes()[65536 : 65536 + 4096]
    first, second = pair(0, 1)
    with open(second.node, "r+b") as file:
        file.seek(65536)
        file.write(before)
    torn = btrfs_layout.read_device(second.node)
    assert torn and torn.generation == first.generation - 1
    assert btrfs_layout.lagging([first, torn]) == [] and btrfs_layout.written_apart([first, torn]) == []


@pytest.mark.root
def test_what_was_synced_by_one_disk_alone_is_what_the_other_lacks(pair: Callable[..., list[Device]]) -> None:
    """fsync writes a superblock of the same generation, which names a log."""
    first, second = pair(0, 1)
    assert btrfs_layout.lagging([first._replace(log_root=second.root), second]) == [], "it has that block"
    chunk = next(each for each in btrfs_layout.read_chunks([first]) if each.kind == "metadata")
    with open(first.node, "r+b") as file:
        file.seek(dict(chunk.stripes)[first.devid] + chunk.length - first.node_size)
        file.write(b"log" * 100)
    with_log = first._replace(log_root=chunk.start + chunk.length - first.node_size)
    assert btrfs_layout.lagging([second, with_log]) == [second]


def test_the_policy_of_the_tokens_killed_at_every_step(trio: Host, killer: Killer) -> None:
    """Every disk opens as before, and the same command finishes."""
    saved = Saved(*trio.disks, trio.paths.state)

    def allow() -> None:
        with trio.work() as work:
            rotation.set_degraded(work, work.state.groups["data"], True)

    def begin(_: int) -> Callable[[], object]:
        saved.restore()
        return allow

    for attempt, _ in killer(begin):
        assert trio.boot_opens() and trio.recovery_opens(), attempt
        assert opener(trio, trio.disks).is_complete("data"), attempt
        allow()
        assert trio.group.degraded and not trio.group.behind
        assert opener(trio, trio.disks[:1]).may_open_degraded("data")
        assert all(len(trio.tokens(image)) == 1 for image in trio.disks)


def test_a_group_is_created_with_its_policy_and_the_command_that_finishes_it_has_it() -> None:
    group = NewGroup("data", ("/dev/sdb", "/dev/sdc"), "/srv", "", frozenset(), "", degraded="allow")
    assert create_group._options(group).endswith("--degraded allow")
    assert "--degraded" not in create_group._options(group._replace(degraded="never"))


def test_open_degraded_wants_the_name_of_the_group(trio: Host) -> None:
    with pytest.raises(UnlockError, match=r"data-0 .* is missing.*data-1 .* is missing"):
        gate.open_group(trio.paths, "data", degraded=True)
    with pytest.raises(Usage, match="groups that are named"):
        cli.cli(["open", "--degraded"])


def test_to_open_without_a_disk_is_a_hint_only_where_the_others_are_well(trio: Host) -> None:
    def hint() -> str:
        found = opener(trio, trio.disks[:2])
        return gate._explain_failure(trio.paths, found.report, "data")[1]

    assert hint() == "unlock open data --degraded"
    leave_out(trio, (1, "btrfs"))
    assert hint() == "unlock open data --degraded"
    edit(str(trio.disks[0]), lambda fields: fields["config"].update(flags=["allow-discards"]))
    assert hint() == "unlock status"


def test_early_boot_lets_the_state_know_who_was_away(trio: Host) -> None:
    row = report.GroupRow("data", "degraded", mappings=("data-0",), kind="btrfs", generation=10)
    this_boot.mark_open(trio.paths, "data", ["data-0"], row)
    for _ in range(2):
        gate.record_early_groups(trio.paths)
        assert [(each.kind, each.generation) for each in trio.group.away] == [("btrfs", 10)] * 2
        assert trio.group.left_out() == {each.uuid for each in trio.group.members[1:]}
