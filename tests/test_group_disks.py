# SPDX-License-Identifier: Apache-2.0
"""`disk add`, `disk remove`, `disk replace` without their btrfs: headers, member lists and journal, killed anywhere.
Real headers. With dm-crypt and btrfs: test_boot_group_disks.py.
"""

import os
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.flowfixture import Host
from tests.killing import LASTING, Killer
from tests.saved import Saved
from tests.test_member_list import complete, fill, lists
from tests.test_members import SMALL, Loops, loops, sh
from unlock.disks import disk_keys, luks
from unlock.disks.groups import Member
from unlock.errors import DiskFailed, Refused, UnlockError, Usage
from unlock.host.journal import DiskAddition, DiskRemoval, DiskReplacement, command
from unlock.operations import add_disk, group_disks, operation, rekey, remove_disk, replace_disk
from unlock.run import run

pytestmark = [pytest.mark.timeout(900), pytest.mark.usefixtures("key_cache")]

__all__ = ["loops"]

NEW = Member("0c5e2d0c-5a4f-4a34-9a6b-2f8f8f1d7a11", "data-new", "")
STEPS = (*LASTING, luks.format, run)


@pytest.fixture
def host(tmp_path: Path) -> Host:
    return Host(tmp_path, 2)


def image(host: Host) -> Path:
    path = host.folder / "new"
    with path.open("wb") as file:
        file.truncate(SMALL)
    return path


class Start:
    """The same start each time."""

    def __init__(self, host: Host, *images: Path) -> None:
        self.host = host
        self._saved = Saved(*images, host.paths.state)

    def again(self) -> None:
        self._saved.restore()


def add(host: Host, new: Path) -> None:
    """What `disk add` does before it opens the disk."""
    with host.work() as work:
        state = work.state
        entry = state.unfinished(DiskAddition, "--group data")
        group = state.groups["data"]
        if not entry:
            entry = DiskAddition("disk add", "--group data", NEW, state.next_manifest("data"), str(new))
            state.begin(entry)
        nodes = work.nodes(group)
        old = tuple(each for each in group.members if each != NEW)
        listed = group._replace(members=(*old, NEW), manifest=entry.manifest)
        add_disk.make_member(work, listed, NEW, {**nodes, NEW.uuid: str(new)}, host.recovery)
        state.journal = None
        state.save()


def recovery_opens(host: Host, disk: Path) -> bytes:
    with luks.Container(str(disk)) as container, disk_keys.dek_by_recovery_key(container, host.recovery) as dek:
        return bytes(dek)


@pytest.mark.turns
def test_a_disk_is_added_whatever_kills_it(host: Host, killer: Killer) -> None:
    new = image(host)
    with luks.Container(str(host.disks[0])) as container:
        assert not container.flags
    start = Start(host, new, *host.disks)

    def begin(_: int) -> Callable[[], object]:
        start.again()
        return lambda: add(host, new)

    for _ in killer(begin, STEPS):
        assert complete(host, [*host.disks, new] if has_token(new) else host.disks)
        assert host.recovery_opens()
        if host.state.journal:
            assert command(host.state.journal) == f"unlock disk add --group data {new}"
            add(host, new)
        if len(host.group.members) == 2:
            add(host, new)
        assert [lists(host, disk) for disk in (*host.disks, new)] == [[(2, 3)]] * 3 or host.group.manifest > 2
        assert host.group.members[2] == NEW and host.group.behind == ()
        host.deks[NEW.uuid] = recovery_opens(host, new)
        assert host.opens(new) and host.boot_opens()
        assert host.state.headers.keys() >= {NEW.uuid}


def has_token(disk: Path) -> bool:
    try:
        with luks.Container(str(disk)) as container:
            return bool(container.tokens("unlock"))
    except UnlockError:
        return False


def test_a_new_disk_has_the_flags_that_all_others_have(host: Host) -> None:
    new = image(host)
    for number, disk in enumerate(host.disks):
        with luks.Container(str(disk)) as container:
            more = {"allow-discards"} if number else {"allow-discards", "no-read-workqueue"}
            container.set_flags(frozenset(more))
    nodes = [str(disk) for disk in host.disks]
    assert group_disks.common_flags(nodes) == {"allow-discards"}
    with group_disks.format_member(str(new), NEW, host.recovery, frozenset({"allow-discards"})):
        pass
    with luks.Container(str(new)) as container:
        assert container.flags == {"allow-discards"}


def test_an_error_before_the_list_is_on_a_disk_leaves_no_journal(host: Host) -> None:
    """The header of a member is full."""
    fill(host.disks[1])
    with pytest.raises(DiskFailed):
        add(host, image(host))
    assert (host.state.journal, len(host.group.members)) == (None, 2)
    assert NEW.uuid not in host.state.headers
    assert [lists(host, disk) for disk in host.disks] == [[(1, 2)]] * 2


def test_a_finished_header_is_not_made_again(host: Host) -> None:
    """Other disks may rely on it: their list has it."""
    new = image(host)
    with group_disks.format_member(str(new), NEW, host.recovery, frozenset()) as first:
        with group_disks.format_member(str(new), NEW, host.recovery, frozenset()) as second:
            assert first == second
        with luks.Container(str(new)) as container:
            container.remove_keyslot(0)
        with group_disks.format_member(str(new), NEW, host.recovery, frozenset()) as third:
            assert first != third


# remove


def remove(host: Host, member: Member) -> None:
    """What `disk remove` does, but for btrfs."""
    with host.work() as work:
        state = work.state
        if not state.unfinished(DiskRemoval, member.name):
            state.begin(DiskRemoval("disk remove", member.name, "data", manifest=state.next_manifest("data")))
        removal = remove_disk._Removal(state.groups["data"], member, "")
        remove_disk._finish(work, removal)


def test_a_disk_is_removed_whatever_kills_it(host: Host, killer: Killer) -> None:
    start = Start(host, *host.disks)
    gone = host.group.members[1]
    left, taken = host.disks[:1], host.disks[1]

    def begin(_: int) -> Callable[[], object]:
        start.again()
        return lambda: remove(host, gone)

    for _ in killer(begin):
        tokened = [each for each in host.disks if has_token(each)]
        assert complete(host, tokened)
        assert all(recovery_opens(host, each) for each in host.disks)
        if host.state.journal:
            assert command(host.state.journal) == f"unlock disk remove {gone.name}"
        if gone in host.group.members:
            remove(host, gone)
        assert [lists(host, disk) for disk in left] == [[(2, 1)]]
        assert [each.name for each in host.group.members] == ["data-0"]
        assert not has_token(taken) and recovery_opens(host, taken) == host.deks[gone.uuid]
        assert gone.uuid not in host.state.headers
        assert host.state.journal is None


def test_an_operation_under_way_keeps_others_out(host: Host) -> None:
    with host.work() as work:
        work.state.begin(DiskRemoval("disk remove", "data-1", "data", manifest=2))
    with pytest.raises(Refused) as caught:
        remove_disk.remove_disk(host.paths, "data-0", look=host.look)
    assert (caught.value.code, "unlock disk remove data-1" in str(caught.value)) == ("unfinished", True)


# replace


def replace(host: Host, old: Member, new: Path, *, absent: bool) -> None:
    """What `disk replace` does, but for btrfs."""
    with host.work() as work:
        state = work.state
        entry = state.unfinished(DiskReplacement, old.name)
        group = state.groups["data"]
        if not entry:
            manifests = state.next_manifest("data"), state.next_manifest("data")
            entry = DiskReplacement("disk replace", old.name, "data", old, NEW, manifests, absent, str(new))
            state.begin(entry)
        if NEW not in group.members:
            left = tuple(each for each in group.members if not absent or each != old)
            nodes = {**work.nodes(group), NEW.uuid: str(new)}
            replace_disk._take_in(work, group._replace(members=left), entry, nodes, host.recovery)
    host.disks.append(new)
    try:
        with host.work() as work:
            replace_disk._finish(work, entry, "")
    finally:
        host.disks.remove(new)


@pytest.mark.turns
@pytest.mark.parametrize("absent", [False, True])
def test_a_disk_is_replaced_whatever_kills_it(host: Host, killer: Killer, absent: bool) -> None:
    new = image(host)
    start = Start(host, new, *host.disks)
    old, gone = host.group.members[0], host.disks[0]
    present = host.disks[1:] if absent else list(host.disks)
    host.disks[:] = present

    def begin(_: int) -> Callable[[], object]:
        start.again()
        return lambda: replace(host, old, new, absent=absent)

    for _ in killer(begin, STEPS):
        if not absent:
            assert complete(host, [each for each in (*present, new) if has_token(each)])
        assert all(recovery_opens(host, each) for each in (*host.disks, gone))
        journal = host.state.journal
        if isinstance(journal, DiskReplacement):
            assert command(journal) == f"unlock disk replace {old.name} {new}"
            replace(host, old, new, absent=absent)
        elif journal:
            assert command(journal) == "unlock rekey data"
            host.disks.append(new)
            rekey.rekey(host.paths, "data", host.look)
            host.disks.remove(new)
        elif NEW not in host.group.members:
            replace(host, old, new, absent=absent)
        after = [*(each for each in host.disks if each != gone), new]
        manifest = host.group.manifest
        assert [lists(host, disk) for disk in after] == [[(manifest, 2)]] * 2
        assert {each.name for each in host.group.members} == {"data-1", "data-new"}
        assert host.group.generation == (2 if absent else 1)
        assert absent or not has_token(gone)
        assert (host.state.journal, host.state.headers.get(old.uuid)) == (None, None)
        host.deks[NEW.uuid] = recovery_opens(host, new)
        assert host.boot_opens(after)


# what is refused


def check(host: Host, node: str, **changes: object) -> UnlockError:
    before = Path(node).read_bytes() if os.path.exists(node) else b""
    asked: dict[str, object] = {"erase": (), "least": SMALL, "begun": None, **changes}
    with host.work() as work, pytest.raises(UnlockError) as caught:
        group_disks.check_new_disk(work.state, node, **asked)  # type: ignore[arg-type]
    assert Path(node).read_bytes() == before
    assert caught.value.hint
    return caught.value


def test_what_cannot_be_a_new_disk_is_refused_by_name(host: Host, loops: Loops) -> None:
    empty, used, other = loops(3)
    with host.work() as work:
        assert group_disks.check_new_disk(work.state, empty, (), least=SMALL, begun=None) == ""
    assert check(host, empty, least=SMALL + 1).code == "too-small"
    assert check(host, empty, erase=[used]).code == "usage"
    assert check(host, empty, begun=NEW._replace(serial="S-1")).code == "unfinished"
    sh("mkfs.ext4", "-q", used)
    error = check(host, used)
    assert (error.code, "ext4" in str(error), error.hint) == ("has-data", True, f"--erase {used} if it may go")
    held = os.open(used, os.O_RDONLY | os.O_EXCL)
    assert check(host, used, erase=[used]).code == "in-use"
    os.close(held)
    with host.work() as work:
        assert "ext4" in group_disks.check_new_disk(work.state, used, [used], least=SMALL, begun=None)
    Path(other).write_bytes(host.disks[0].read_bytes())
    assert check(host, other, erase=[other]).code == "member"
    with host.work() as work:
        work.state.groups.clear()
        work.state.host = "cd" * 16
        with pytest.raises(Refused, match="a disk of another host that has unlock") as caught:
            group_disks.check_new_disk(work.state, other, (), least=SMALL, begun=None)
        assert caught.value.code == "has-data"


def test_a_member_is_named_in_each_way(host: Host, loops: Loops) -> None:
    (disk,) = loops()
    Path(disk).write_bytes(host.disks[1].read_bytes())
    wanted = host.group.members[1]
    link = host.folder / "by-id"
    link.symlink_to(disk)
    for text in (disk, str(link), wanted.name, f"/dev/mapper/{wanted.name}", wanted.uuid, wanted.uuid.upper()):
        assert group_disks.find_member(host.state, text) == (host.group, wanted), text
    for text in ("data-9", "/dev/null", "", "0c5e2d0c-5a4f-4a34-9a6b-2f8f8f1d7a11"):
        with pytest.raises(Refused) as caught:
            group_disks.find_member(host.state, text)
        assert caught.value.code == "not-a-member"
    with pytest.raises(Usage):
        group_disks.find_group(host.state, "other")


def test_a_group_that_is_not_open_is_not_changed(host: Host) -> None:
    state = Path(host.paths.state).read_bytes()
    contents = [each.read_bytes() for each in host.disks]
    work: list[Callable[[], object]] = [
        lambda: remove_disk.remove_disk(host.paths, "data-0", look=host.look),
        lambda: remove_disk.remove_disk(host.paths, "data-0", migrate=False, look=host.look),
        lambda: add_disk.add_disk(
            host.paths, add_disk.NewDisk(str(host.disks[0]), "data", frozenset(), ""), look=host.look
        ),
        lambda: replace_disk.replace_disk(
            host.paths, replace_disk.Replacing("data-0", str(host.disks[1]), frozenset(), ""), look=host.look
        ),
    ]
    for each in work:
        with pytest.raises(Refused) as caught:
            each()
        assert (caught.value.code, caught.value.hint) == ("not-open", "unlock open data")
    assert Path(host.paths.state).read_bytes() == state
    assert [each.read_bytes() for each in host.disks] == contents


def test_the_last_disk_of_a_group_stays(tmp_path: Path) -> None:
    host = Host(tmp_path, 1)
    with pytest.raises(Refused) as caught:
        remove_disk.remove_disk(host.paths, "data-0", look=host.look)
    assert (caught.value.code, caught.value.hint) == ("last-member", "unlock group delete data")


# taken back, and gone on with


def test_an_addition_is_taken_back_until_a_disk_has_the_list(host: Host) -> None:
    new = image(host)
    entry = DiskAddition("disk add", "--group data", NEW, manifest=2, options=str(new))
    host.state.begin(entry)
    assert operation.cancel(host.paths, look=host.look) == []
    assert (host.state.journal, host.group.members) == (None, host.group.members[:2])
    add(host, new)
    state = host.state
    state.journal = entry
    state.save()
    with pytest.raises(Refused) as caught:
        operation.cancel(host.paths, look=host.look)
    assert (caught.value.code, "unlock disk remove data-new" in caught.value.hint) == ("not-cancellable", True)
    assert host.state.journal == entry


def test_what_goes_on_by_itself_says_what_it_needs(host: Host) -> None:
    host.state.begin(DiskRemoval("disk remove", "data-1", "data", manifest=2))
    with pytest.raises(Refused) as caught:
        operation.resume(host.paths, lambda *_: False, look=host.look)
    assert (caught.value.code, caught.value.hint) == ("not-open", "unlock open data")
    old = host.group.members[1]
    state = host.state
    state.journal = DiskReplacement("disk replace", old.name, "data", old, NEW, (2, 3), False, "/dev/sdb")
    state.save()
    with pytest.raises(Refused) as caught:
        operation.resume(host.paths, lambda *_: False, look=host.look)
    assert (caught.value.code, caught.value.hint) == ("by-command", "unlock disk replace data-1 /dev/sdb")
    assert [lists(host, disk) for disk in host.disks] == [[(1, 2)]] * 2
