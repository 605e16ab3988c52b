# SPDX-License-Identifier: Apache-2.0
"""`unlock disk release`, `disk erase` and `group delete`: what is left of a disk, and of its group. Real headers."""

import json
import os
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.eventlogs import Boot
from tests.flowfixture import HOST, Host
from tests.hostfixture import Machine
from tests.killing import LASTING, Killer, child, killed_at
from tests.lab.kmipliar import ACTIVE, DEACTIVATED, Liar
from tests.saved import Saved
from tests.test_members import Loops, loops, recovery_file, sh
from unlock import cli
from unlock.disks import luks
from unlock.disks.groups import Member
from unlock.errors import DiskFailed, NotOurs, Refused, UnlockError, Usage
from unlock.host import config, keyring
from unlock.host.journal import DiskErasure, DiskRelease, GroupDeletion, command
from unlock.operations import delete_group, erase_disk, leaving, operation, recovery, release_disk
from unlock.operations.consent import Plan
from unlock.secret import Secret

pytestmark = [pytest.mark.timeout(900), pytest.mark.usefixtures("key_cache")]

__all__ = ["loops"]

PASSPHRASE = b"passphrase of the owner"
TABLE = '\n[group.data]\nmount = "/srv/data"\n'


PROVIDERS = pytest.mark.parametrize("host", ["native", "kms"], indirect=True)


def passphrase() -> Secret:
    return Secret(PASSPHRASE)


@pytest.fixture
def host(request: pytest.FixtureRequest, tmp_path: Path, kms: Liar) -> Iterator[Host]:
    """A group of one disk, in unlock.toml and crypttab."""
    yield with_files(Host(tmp_path, 1, *([kms] if getattr(request, "param", "") == "kms" else [])))
    keyring.flush()


@pytest.fixture
def pair(tmp_path: Path) -> Iterator[Host]:
    """A group of two."""
    yield with_files(Host(tmp_path, 2))
    keyring.flush()


def with_files(host: Host) -> Host:
    with open(host.paths.config, "a", encoding="utf-8") as file:
        file.write(TABLE)
    Path(host.paths.crypttab).parent.mkdir(parents=True, exist_ok=True)
    Path(host.paths.crypttab).write_text("data-0 UUID=0 none luks,discard,noauto\nother /dev/sdz none luks\n")
    return host


def with_passphrase(host: Host) -> None:
    """The first disk has a keyslot of its owner, as cheap as the recovery key's; the state knows which is which."""
    with luks.Container(str(host.disks[0])) as container, Secret(host.deks[container.uuid]) as dek:
        container.add_keyslot(dek, passphrase=passphrase())
    recovery.test_recovery_key(host.paths, host.recovery, host.look)


def release(host: Host, word: bytes = PASSPHRASE, **options: object) -> release_disk.Released | None:
    return release_disk.release_disk(
        host.paths,
        str(host.disks[0]),
        Secret(word),
        recovery_file=recovery_file(host),
        look=host.look,
        tcti="device:/none",
        **options,  # type: ignore[arg-type]
    )


def delete(host: Host, *, erase: bool = False, name: str = "data") -> delete_group.Deleted | None:
    return delete_group.delete_group(
        host.paths,
        name,
        erase=erase,
        recovery_file=recovery_file(host),
        look=host.look,
        tcti=host.chip.tcti if isinstance(host, Machine) else "device:/none",
    )


def opens(image: Path, word: bytes | Secret) -> bool:
    """With stock cryptsetup, that has never heard of unlock."""
    command = ["cryptsetup", "open", "--test-passphrase", "--key-file", "-", str(image)]
    return not subprocess.run(command, input=bytes(word), check=False, capture_output=True).returncode


def tokens(image: Path) -> int:
    with luks.Container(str(image)) as container:
        return len(container.tokens("unlock"))


def keyslots(image: Path) -> list[int]:
    with luks.Container(str(image)) as container:
        return container.keyslots()


def is_gone(host: Host) -> None:
    """The group, from state, configuration and key cache; the rest of the files as it was."""
    state = host.state
    assert (state.groups, state.journal, state.headers, state.recovery.keyslots) == ({}, None, {}, {})
    assert config.load(host.paths.config).groups == {}
    assert not any("kek" in name for name in keyring.names())


def contents(host: Host) -> list[bytes]:
    files = [host.paths.state, host.paths.config, host.paths.crypttab, *map(str, host.disks)]
    return [Path(path).read_bytes() for path in files if os.path.exists(path)]


def unchanged(host: Host, code: str, work: Callable[[], object], *disks: str) -> UnlockError:
    before = contents(host), [Path(each).read_bytes() for each in disks]
    with pytest.raises(UnlockError) as caught:
        work()
    assert (contents(host), [Path(each).read_bytes() for each in disks]) == before
    assert caught.value.code == code, caught.value
    assert caught.value.hint
    assert "\n" not in str(caught.value)
    return caught.value


class Start:
    """The same start each time."""

    def __init__(self, host: Host, kms: Liar | None = None) -> None:
        self.host, self.kms = host, kms
        self.keys = dict(kms.keys) if kms else {}
        self.disks = list(host.disks)
        files = [host.paths.state, host.paths.config, host.paths.crypttab, *map(str, host.disks)]
        self._saved = Saved(*files)

    def again(self) -> None:
        self._saved.restore()
        self.host.disks = list(self.disks)
        if self.kms:
            self.kms.keys = dict(self.keys)
            for key in self.kms.keys.values():
                key.state = ACTIVE


# Release


@pytest.mark.turns
@PROVIDERS
def test_a_released_disk_has_nothing_of_this_host_and_opens_with_stock_cryptsetup(host: Host, kms: Liar) -> None:
    kek, (image,) = host.group.kek, host.disks
    released = release(host)
    assert released and (released.disk, released.group, released.added) == ("data-0", "data", True)
    is_gone(host)
    assert (tokens(image), len(keyslots(image))) == (0, 1)
    assert opens(image, PASSPHRASE)
    assert not opens(image, host.recovery)
    dump = sh("cryptsetup", "luksDump", image)
    assert "argon2id" in dump
    assert "unlock" not in dump
    assert Path(host.paths.crypttab).read_text() == "data-0 UUID=0 none luks,discard\nother /dev/sdz none luks\n"
    if kms.keys:
        assert kms.keys[kek.rpartition("/")[2]].state == DEACTIVATED, "retired, not destroyed"
    unchanged(host, "not-a-member", lambda: release(host))


def test_a_passphrase_that_it_has_gets_no_second_keyslot(host: Host) -> None:
    with_passphrase(host)
    released = release(host)
    assert released and (released.keyslot, released.added) == (1, False)
    assert keyslots(host.disks[0]) == [1]
    assert opens(host.disks[0], PASSPHRASE)


def test_where_the_state_does_not_know_it_the_recovery_key_says_which_keyslot_is_its(host: Host) -> None:
    with luks.Container(str(host.disks[0])) as container, Secret(host.deks[container.uuid]) as dek:
        container.add_keyslot(dek, passphrase=Secret(b"of clevis"))
        container.add_keyslot(dek, passphrase=passphrase())
    release(host)
    assert keyslots(host.disks[0]) == [1, 2]
    assert opens(host.disks[0], b"of clevis")


@pytest.mark.turns
def test_a_disk_that_was_taken_out_of_its_group_is_released_too(host: Host) -> None:
    (image,) = host.disks
    delete(host)
    released = release(host)
    assert released and (released.group, released.added) == ("", True)
    assert not opens(image, host.recovery)
    assert opens(image, PASSPHRASE)


def test_the_plan_of_a_release_is_shown_and_nothing_done(host: Host) -> None:
    plans: list[Plan] = []

    def show(plan: Plan) -> bool:
        plans.append(plan)
        return False

    before = contents(host)
    assert release(host, consent=show) is None
    assert contents(host) == before
    assert [len(each.steps) for each in plans] == [6]
    assert not plans[0].destroys


def test_one_disk_of_several_is_not_released(pair: Host) -> None:
    error = unchanged(pair, "member", lambda: release(pair))
    assert "unlock disk remove data-0" in error.hint
    assert "unlock group delete data" in error.hint


def test_what_cannot_be_released_is_left_as_it_is(host: Host, tmp_path: Path) -> None:
    for device, code in (("/dev/none", "usage"), (str(tmp_path / "plain"), "not-luks2")):
        (tmp_path / "plain").write_bytes(bytes(1 << 20))
        with pytest.raises(UnlockError) as caught:
            release_disk.release_disk(host.paths, device, passphrase(), look=host.look)
        assert caught.value.code == code
    with pytest.raises(Usage):
        release(host, b"")
    assert host.boot_opens()


def test_a_changed_header_is_not_released(host: Host) -> None:
    with luks.Container(str(host.disks[0])) as container:
        container.set_flags(frozenset({"allow-discards"}))
    unchanged(host, "changed-header", lambda: release(host))


def test_a_table_that_cannot_be_told_from_others_is_for_a_person(host: Host) -> None:
    Path(host.paths.config).write_text('version = 1\ngroup = { data = { mount = "/srv/data" } }\n')
    error = unchanged(host, "edit-config", lambda: release(host))
    assert host.paths.config in error.hint
    unchanged(host, "edit-config", lambda: delete(host))


def test_without_room_for_a_keyslot_nothing_is_changed_for_long(host: Host) -> None:
    """The journal is closed again."""
    with luks.Container(str(host.disks[0])) as container, Secret(host.deks[container.uuid]) as dek:
        recovery.test_recovery_key(host.paths, host.recovery, host.look)
        with pytest.raises(DiskFailed):
            for number in range(33):
                container.add_keyslot(dek, passphrase=Secret(b"%d" % number))
    with pytest.raises(DiskFailed):
        release(host)
    assert (host.state.journal, list(host.state.groups)) == (None, ["data"])
    assert host.boot_opens()
    assert host.recovery_opens()


@pytest.fixture
def cheap_keyslots(monkeypatch: pytest.MonkeyPatch) -> None:
    """For what adds a person's keyslot dozens of times, and tries it: without Argon2's two seconds and 1 GiB."""
    add_keyslot = luks.Container.add_keyslot

    def cheap(self: luks.Container, key: Secret, *, passphrase: Secret, slow: bool = False) -> int:
        return add_keyslot(self, key, passphrase=passphrase)

    monkeypatch.setattr(luks.Container, "add_keyslot", cheap)


@pytest.mark.turns
@pytest.mark.usefixtures("cheap_keyslots")
@pytest.mark.parametrize(
    ("host", "has"),
    [
        ("native", True),
        ("kms", False),
        pytest.param("native", False, marks=pytest.mark.long(minutes=0.5)),
        pytest.param("kms", True, marks=pytest.mark.long(minutes=0.5)),
    ],
    indirect=["host"],
)
def test_a_release_killed_anywhere_is_finished_by_the_same_command(
    host: Host, killer: Killer, kms: Liar, has: bool
) -> None:
    (image,) = host.disks
    if has:
        with_passphrase(host)
    start = Start(host, kms)
    commands = set()

    def begin(_: int) -> Callable[[], object]:
        start.again()
        return lambda: release(host)

    for _, killed in killer(begin):
        by_passphrase, by_recovery = opens(image, PASSPHRASE), opens(image, host.recovery)
        assert by_passphrase or by_recovery
        assert by_passphrase or host.boot_opens()
        if journal := host.state.journal:
            commands.add(command(journal))
        if killed and (host.state.journal or host.state.groups):
            release(host)
        is_gone(host)
        assert (tokens(image), len(keyslots(image))) == (0, 1)
        assert opens(image, PASSPHRASE)
    with luks.Container(str(image)) as container:
        assert commands == {f"unlock disk release /dev/disk/by-uuid/{container.uuid}"}


# Group delete


def test_the_disks_of_a_deleted_group_are_plain_luks2_and_the_recovery_key_opens_them(pair: Host) -> None:
    deleted = delete(pair)
    assert deleted == delete_group.Deleted("data", ("data-0", "data-1"), {}, False)
    is_gone(pair)
    for image in pair.disks:
        assert (tokens(image), opens(image, pair.recovery)) == (0, True)
    assert "noauto" not in Path(pair.paths.crypttab).read_text()
    with pytest.raises(Usage, match="no group data"):
        delete(pair)


def test_a_later_group_of_that_name_gets_no_generation_again(pair: Host) -> None:
    delete(pair)
    assert pair.state.next_generation("data") == 2


def test_erased_nothing_opens_the_disks(pair: Host) -> None:
    deks = [pair.deks[uuid] for uuid in pair.deks]
    copies = {image: image.read_bytes() for image in pair.disks}
    deleted = delete(pair, erase=True)
    assert deleted and deleted.erased
    is_gone(pair)
    for image in pair.disks:
        with pytest.raises(NotOurs, match="not LUKS2"):
            luks.Container(str(image))
        assert image.read_bytes()[: 16 << 20] == bytes(16 << 20)
        assert not opens(image, pair.recovery)
        image.write_bytes(copies[image])
        assert opens(image, pair.recovery), "what a backup of the header does, as is said"
    assert deks


def test_the_recovery_key_is_proven_on_each_disk_before_anything_is_changed(pair: Host) -> None:
    with luks.Container(str(pair.disks[1])) as container:
        container.remove_keyslot(container.keyslots()[0])
    error = unchanged(pair, "no-key", lambda: delete(pair))
    assert "data-1" in str(error)


def test_a_group_that_is_not_there_is_not_deleted(pair: Host) -> None:
    unchanged(pair, "usage", lambda: delete(pair, name="none"))


def test_what_is_away_is_not_erased(pair: Host) -> None:
    pair.disks.pop()
    error = unchanged(pair, "missing", lambda: delete(pair, erase=True))
    assert "data-1" in str(error)


def test_the_root_file_system_of_a_host_with_other_groups_stays_unlocks(pair: Host, tmp_path: Path) -> None:
    """Else early boot would give no keys to them."""
    sysfs = tmp_path / "root-device"
    block = sysfs / "sys/devices/virtual/block/dm-0/dm"
    block.mkdir(parents=True)
    (block / "name").write_text("data-0\n")
    (sysfs / "sys/dev/block").mkdir(parents=True)
    (sysfs / "sys/dev/block/253:0").symlink_to("../../devices/virtual/block/dm-0")
    (sysfs / "proc/self").mkdir(parents=True)
    (sysfs / "proc/self/mountinfo").write_text("1 0 253:0 / / rw - ext4 /dev/mapper/data-0 rw\n")
    members = pair.group.members
    state = pair.state
    leaving.check_root(pair.paths, state, "data", members, str(sysfs))
    state.groups["more"] = pair.group._replace(name="more", members=())
    with pytest.raises(Refused, match="gives no keys to group more") as caught:
        leaving.check_root(pair.paths, state, "data", members, str(sysfs))
    assert caught.value.code == "root-holds-keys"
    leaving.check_root(pair.paths, state, "more", (), str(sysfs))


def test_a_group_whose_disk_is_lost_is_deleted_and_the_disk_opens_by_the_recovery_key_alone(tmp_path: Path) -> None:
    host = Machine(tmp_path, Boot("direct"), (), 2)
    lost = host.disks.pop()
    deleted = delete(host)
    assert deleted and list(deleted.left) == ["data-1"]
    assert host.state.narrowed is None
    assert host.boot() == "unsealed"
    host.take_key()
    assert not host.opens(lost)
    assert opens(lost, host.recovery)
    host.close()


@pytest.mark.turns
@pytest.mark.parametrize("erase", [False, True])
def test_a_deletion_killed_anywhere_is_finished_by_the_same_command(pair: Host, killer: Killer, erase: bool) -> None:
    start = Start(pair)
    commands = set()

    def begin(_: int) -> Callable[[], object]:
        start.again()
        return lambda: delete(pair, erase=erase)

    lasting = (*LASTING, luks.overwrite)
    for _, killed in killer(begin, lasting):
        state = pair.state
        assert erase or all(opens(image, pair.recovery) for image in pair.disks)
        if state.journal:
            commands.add(command(state.journal))
            assert not state.groups
        else:
            assert not state.groups or pair.boot_opens()
        if killed and (state.journal or state.groups):
            delete(pair, erase=erase and not state.journal)
        is_gone(pair)
        assert erase or [tokens(image) for image in pair.disks] == [0, 0]
        assert [opens(image, pair.recovery) for image in pair.disks] == [not erase] * 2
    assert commands == {f"unlock group delete data{' --erase' * erase}"}


# Erase


@pytest.fixture
def spare(pair: Host, loops: Loops) -> str:
    """A LUKS2 disk that is in no group, with the recovery key's keyslot and a token of this host."""
    (disk,) = loops()
    with Secret.random(64) as dek, luks.format(disk, dek) as container:
        container.add_keyslot(dek, passphrase=pair.recovery)
        container.set_token({"type": "unlock", "host": HOST})
        container.set_token({"type": "other"})
    return disk


def test_an_erased_disk_has_neither_keyslots_nor_header(pair: Host, spare: str) -> None:
    data = Path(spare).read_bytes()[16 << 20 :]
    with luks.Container(spare) as container:
        state = pair.state
        state.forget_member(Member(container.uuid, "data-2", ""), "data")
        state.save()
    assert erase_disk.erase_disk(pair.paths, spare) and not pair.state.forgotten
    content = Path(spare).read_bytes()
    assert content[: 16 << 20] == bytes(16 << 20)
    assert content[16 << 20 :] == data
    assert pair.state.journal is None
    assert pair.boot_opens()
    with pytest.raises(NotOurs):
        erase_disk.erase_disk(pair.paths, spare)


@pytest.mark.parametrize("way", ["overwrite", "discard"])
def test_the_rest_goes_too_if_wanted(pair: Host, spare: str, way: str) -> None:
    with open(spare, "r+b") as file:
        file.seek(20 << 20)
        file.write(b"x" * 4096)
    erase_disk.erase_disk(pair.paths, spare, overwrite=way == "overwrite", discard=way == "discard")
    assert not any(Path(spare).read_bytes())


def test_a_member_or_what_is_in_use_is_not_erased(pair: Host, spare: str, loops: Loops) -> None:
    error = unchanged(pair, "member", lambda: erase_disk.erase_disk(pair.paths, str(pair.disks[0])))
    assert "unlock disk remove data-0" in error.hint
    held = os.open(spare, os.O_RDONLY | os.O_EXCL)
    try:
        unchanged(pair, "in-use", lambda: erase_disk.erase_disk(pair.paths, spare), spare)
    finally:
        os.close(held)
    with luks.Container(spare) as container:
        container.set_token({"type": "unlock", "host": "cd" * 16})
    unchanged(pair, "other-host", lambda: erase_disk.erase_disk(pair.paths, spare), spare)
    other = lambda: release_disk.release_disk(pair.paths, spare, passphrase(), look=pair.look)  # noqa: E731
    unchanged(pair, "other-host", other, spare)
    (plain,) = loops()
    with pytest.raises(NotOurs, match="is not LUKS2"):
        erase_disk.erase_disk(pair.paths, plain)
    with pytest.raises(Usage):
        erase_disk.erase_disk(pair.paths, "/dev/none")


def test_nobody_agreed_and_nothing_is_erased(pair: Host, spare: str) -> None:
    plans: list[Plan] = []

    def show(plan: Plan) -> bool:
        plans.append(plan)
        return False

    before = contents(pair), Path(spare).read_bytes()
    assert not erase_disk.erase_disk(pair.paths, spare, discard=True, overwrite=True, consent=show)
    assert (contents(pair), Path(spare).read_bytes()) == before
    assert (len(plans[0].steps), len(plans[0].destroys), plans[0].thing) == (4, 1, spare)


@pytest.mark.turns
def test_an_erasure_killed_anywhere_is_finished_by_the_same_command(pair: Host, spare: str, killer: Killer) -> None:
    start, content = Start(pair), Path(spare).read_bytes()
    with luks.Container(spare) as container:
        name = f"/dev/disk/by-uuid/{container.uuid}"
    commands = set()

    def begin(_: int) -> Callable[[], object]:
        start.again()
        Path(spare).write_bytes(content)
        return lambda: erase_disk.erase_disk(pair.paths, spare)

    for _ in killer(begin, (*LASTING, luks.overwrite)):
        if journal := pair.state.journal:
            commands.add(command(journal))
        try:
            erase_disk.erase_disk(pair.paths, spare)
        except NotOurs:  # its header was gone
            if pair.state.journal:
                assert erase_disk.erase_disk(pair.paths, name)
        assert pair.state.journal is None
        assert not any(Path(spare).read_bytes()[: 16 << 20])
    assert commands == {f"unlock disk erase {name}"}


def test_an_erasure_of_a_disk_that_is_taken_out_blocks_nothing(pair: Host) -> None:
    with pair.work() as work:
        work.state.begin(DiskErasure("disk erase", "/dev/disk/by-uuid/none", False))
    unchanged(pair, "unfinished", lambda: delete(pair))
    assert erase_disk.erase_disk(pair.paths, "/dev/disk/by-uuid/none")
    assert pair.state.journal is None
    assert delete(pair)


# What else


def test_journal_entries_are_read_as_they_were_written(pair: Host) -> None:
    member = pair.group.members[0]
    for entry in (
        GroupDeletion("group delete", "data", "--erase", pair.group.kek, pair.group.members, True),
        DiskRelease("disk release", "/dev/disk/by-uuid/x", "data", pair.group.kek, member),
    ):
        with pair.work() as work:
            work.state.begin(entry)
        assert pair.state.journal == entry
        with pair.work() as work:
            work.state.journal = None
            work.state.save()


@pytest.mark.parametrize(
    ("before", "after"),
    [
        ("[group.data]\nmount = '/a'\n", ""),
        ("# top\n\n[group.data] # it\nmount = '/a'\n# inside\ndeadline = 5\n", "# top\n"),
        ("[sync]\n\n# mine\n[group.data]\n\n# of other\n[group.other]\nmount = '/b'\n",
         "[sync]\n\n# mine\n\n# of other\n[group.other]\nmount = '/b'\n"),
        ("[group.other]\nmount = '''\n[group.x]\n'''\n[ group . 'data' ]\nmount = '/a'",
         "[group.other]\nmount = '''\n[group.x]\n'''"),
    ],
)  # fmt: skip
def test_a_table_goes_and_what_is_around_it_stays(pair: Host, before: str, after: str) -> None:
    Path(pair.paths.config).write_text("version = 1\n" + before)
    config.remove_group(pair.paths.config, "data")
    assert Path(pair.paths.config).read_text() == "version = 1\n" + after
    config.remove_group(pair.paths.config, "data")


def test_a_line_in_a_string_is_no_table(pair: Host) -> None:
    text = "[group.other]\nmount = '''\n[group.data]\n'''\n[group.data]\nmount = '/a'\n"
    Path(pair.paths.config).write_text(text)
    with pytest.raises(Refused):
        config.remove_group(pair.paths.config, "data")
    assert Path(pair.paths.config).read_text() == text


# What is typed


def typed(host: Host, *words: str) -> int:
    options = cli._parser().parse_args(words)
    return int(options.run(host.paths, options))


def test_erase_is_typed_by_name_or_with_yes(pair: Host, spare: str, capsys: pytest.CaptureFixture[str]) -> None:
    def nobody() -> None:
        """Without a terminal."""
        os.setsid()
        try:
            typed(pair, "disk", "erase", spare)
        except Refused as error:
            assert (error.code, error.hint) == ("not-confirmed", "--yes")
            return
        raise AssertionError("it was erased")

    before = contents(pair), Path(spare).read_bytes()
    assert child(nobody) == 0
    assert typed(pair, "disk", "erase", spare, "--dry-run", "--json") == 0
    plan = json.loads(capsys.readouterr().out)
    assert (plan["dry_run"], len(plan["steps"]), len(plan["destroys"])) == (True, 2, 1)
    assert f"all data on {spare} (crypto_LUKS" in plan["destroys"][0]
    assert (contents(pair), Path(spare).read_bytes()) == before
    assert typed(pair, "disk", "erase", spare, "--yes", "--json") == 0
    shown = capsys.readouterr()
    assert json.loads(shown.out) == {"version": 1, "erased": spare}
    assert "a backup of its header that somebody has" in shown.err
    assert not any(Path(spare).read_bytes()[: 16 << 20])


def test_a_group_without_disks_here_is_deleted_from_the_command_line(
    pair: Host, capsys: pytest.CaptureFixture[str]
) -> None:
    assert typed(pair, "group", "delete", "data", "--dry-run") == 0
    assert "3. a new persistence key, as data-0, data-1 is not here" in capsys.readouterr().out
    with pytest.raises(UnlockError, match="has its token still, but earlier headers still open"):
        typed(pair, "group", "delete", "data", "--json")
    is_gone(pair)


def test_disks_and_groups_are_listed(pair: Host, capsys: pytest.CaptureFixture[str]) -> None:
    for noun, rows in (("disk", ["data-0", "data-1"]), ("group", ["data"])):
        assert typed(pair, noun, "list") == 0
        lines = capsys.readouterr().out.splitlines()
        assert [line.split()[0] for line in lines] == [noun.upper(), *rows]
        assert typed(pair, noun, "list", "--json") == 0
        found = json.loads(capsys.readouterr().out)
        assert [each["name"] for each in found[f"{noun}s"]] == rows


@pytest.mark.parametrize(
    "words", ["disk forget data-1", "disk release DEV --passphrase-file FILE", "group delete none", "disk erase DEV"]
)
def test_what_is_refused_is_refused_with_words(pair: Host, words: str, tmp_path: Path) -> None:
    (tmp_path / "passphrase").write_bytes(PASSPHRASE)
    words = words.replace("DEV", str(pair.disks[0])).replace("FILE", str(tmp_path / "passphrase"))
    before = contents(pair)
    with pytest.raises(UnlockError) as caught:
        typed(pair, *words.split())
    assert contents(pair) == before
    assert caught.value.hint


@pytest.mark.parametrize("erase", [False, True])
def test_a_deletion_that_was_killed_goes_on_by_operation_resume(pair: Host, erase: bool) -> None:
    """It needs nothing: the recovery key was proven before."""
    number = 1
    while not pair.state.journal:
        assert killed_at(number, lambda: delete(pair, erase=erase), LASTING)
        number += 1
    assert operation.resume(pair.paths, lambda *_: False, look=pair.look, tcti="device:/none") == operation.Resumed(
        [], True
    )
    is_gone(pair)
    assert [opens(image, pair.recovery) for image in pair.disks] == [not erase] * 2
