# SPDX-License-Identifier: Apache-2.0
"""What `group create` and `disk adopt` refuse, and that a refused disk is as it was. Real disks, on loop devices."""

import json
import os
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.flowfixture import Host
from tests.test_devices import UDEV, python, rules
from tests.test_disk import edit
from unlock.disks import changes, luks, token
from unlock.disks.groups import Member
from unlock.errors import DiskFailed, NotOurs, Refused, Tampered, UnlockError, Usage
from unlock.host import config, this_boot
from unlock.host.journal import GroupCreation
from unlock.keys import recovery_key
from unlock.operations import group as group_operations
from unlock.operations.group import NewGroup
from unlock.secret import Secret

pytestmark = pytest.mark.usefixtures("key_cache")

__all__ = ["rules"]

SMALL, BTRFS = 32 << 20, 256 << 20
OPERATOR = b"operator"
Loops = Callable[..., list[str]]


def sh(*command: object, text: bytes = b"") -> str:
    done = subprocess.run(list(map(str, command)), input=text, capture_output=True, check=False)
    assert done.returncode == 0, done.stderr.decode()
    return done.stdout.decode().strip()


@pytest.fixture
def host(tmp_path: Path) -> Host:
    """Initialised; it has a recovery key and no group yet."""
    return Host(tmp_path, 0)


@pytest.fixture
def loops(tmp_path: Path) -> Iterator[Loops]:
    """Makes empty disks."""
    made: list[str] = []

    def make(count: int = 1, size: int = SMALL) -> list[str]:
        for _ in range(count):
            image = tmp_path / f"disk-{len(made)}"
            with image.open("wb") as file:
                file.truncate(size)
            made.append(sh("losetup", "--find", "--show", image))
        return made[-count:]

    yield make
    for each in made:
        sh("losetup", "--detach", each)


@pytest.fixture
def mounted(tmp_path: Path) -> Iterator[Callable[..., Path]]:
    made: list[Path] = []

    def mount(*arguments: str) -> Path:
        where = tmp_path / f"mounted-{len(made)}"
        where.mkdir()
        sh("mount", *arguments, where)
        made.append(where)
        return where

    yield mount
    for each in made:
        sh("umount", each)


def recovery_file(host: Host) -> str:
    path = host.folder / "recovery"
    if not path.exists():
        recovery_key.write_new_file(str(path), host.recovery)
    return str(path)


def wanted(host: Host, *disks: str, **changes: Any) -> NewGroup:
    asked = NewGroup("data", disks, str(host.folder / "srv"), "", frozenset(), recovery_file(host))
    return asked._replace(**changes)


class Unchanged:
    """A command fails; disks and state are then what they were."""

    def __init__(self, host: Host, *disks: str) -> None:
        self.host, self.disks = host, disks
        self.before = self.content()

    def content(self) -> list[bytes]:
        return [Path(path).read_bytes() for path in (self.host.paths.state, self.host.paths.config, *self.disks)]

    def after(self, work: Callable[[], object]) -> UnlockError:
        with pytest.raises(UnlockError) as caught:
            work()
        assert self.content() == self.before
        assert caught.value.hint or isinstance(caught.value, Usage), f"what to type after: {caught.value}"
        return caught.value


def not_created(host: Host, asked: NewGroup) -> UnlockError:
    disks = [each for each in asked.devices if os.path.exists(each)]
    return Unchanged(host, *disks).after(lambda: group_operations.create_group(host.paths, asked))


# group create: a disk that is in use


@pytest.mark.root
def test_a_mounted_disk_is_not_formatted_whatever_may_be_erased(
    host: Host, loops: Loops, mounted: Callable[..., Path]
) -> None:
    (disk,) = loops()
    sh("mkfs.ext4", "-q", disk)
    where = mounted("-o", "ro", disk)
    error = not_created(host, wanted(host, disk, erase=frozenset({disk})))
    assert (error.code, f"is mounted on {where}" in str(error)) == ("in-use", True)


def test_a_disk_that_a_program_holds_is_not_formatted(host: Host, loops: Loops) -> None:
    free, disk = loops(2)
    held = os.open(disk, os.O_RDONLY | os.O_EXCL)
    try:
        error = not_created(host, wanted(host, free, disk))
    finally:
        os.close(held)
    assert (error.code, disk in str(error)) == ("in-use", True)


@pytest.mark.root
def test_the_other_disk_of_a_mounted_btrfs_is_not_formatted(
    host: Host, loops: Loops, mounted: Callable[..., Path]
) -> None:
    first, second = loops(2, BTRFS)
    sh("mkfs.btrfs", "-q", "-d", "raid1", "-m", "raid1", first, second)
    mounted("-o", f"ro,device={second}", first)
    asked = wanted(host, second, erase=frozenset({second}))
    with pytest.raises(Refused) as caught:
        group_operations.create_group(host.paths, asked)
    assert (caught.value.code, "mounted btrfs" in str(caught.value)) == ("in-use", True)


# group create: a disk that holds data


@pytest.mark.parametrize("kind", ["ext4", "LUKS2", "partitions"])
def test_a_disk_with_data_is_not_formatted_unless_it_is_named_with_erase(host: Host, loops: Loops, kind: str) -> None:
    goes, stays = loops(2)
    sh("mkfs.ext4", "-q", goes)
    if kind == "ext4":
        sh("mkfs.ext4", "-q", "-L", "photos", stays)
    elif kind == "LUKS2":
        luks_format(stays)
    else:
        sh("sfdisk", "--quiet", stays, text=b"label: gpt\nsize=1M\n")
    error = not_created(host, wanted(host, goes, stays, erase=frozenset({goes})))
    assert (error.code, stays in str(error), f"--erase {stays}" in error.hint) == ("has-data", True, True)


def test_erase_names_only_disks_of_the_group_and_each_disk_is_named_once(host: Host, loops: Loops) -> None:
    disk, other = loops(2)
    assert not_created(host, wanted(host, disk, erase=frozenset({other}))).code == "usage"
    link = host.folder / "by-id"
    link.symlink_to(disk)
    assert not_created(host, wanted(host, disk, str(link))).code == "usage"
    assert not_created(host, wanted(host, "/dev/unlock-test-absent")).code == "usage"


@pytest.mark.parametrize(
    "wrong", ["[group.other]\nmount = 'srv'\n", "[provider.kms]\n", "[gruop.other]\n", "[group.other"]
)
def test_no_disk_is_touched_while_unlock_toml_is_wrong_anywhere(host: Host, wrong: str) -> None:
    """The group could not be added to it, and what else is mounted where cannot be told."""
    host.configure(more=wrong)
    disk = host.folder / "disk"
    disk.write_bytes(bytes(SMALL))
    assert not_created(host, wanted(host, str(disk))).code == "malformed"
    assert not_adopted(host, str(disk)).code == "malformed"


# group create: a mount point that is taken


def test_what_is_no_absolute_path_is_no_mount_point(host: Host) -> None:
    for where in ("", "srv/data", "/", "//", "/srv/../etc", "/srv/data/..", "/srv/da\nta"):
        assert not_created(host, wanted(host, "/dev/null", mount=where)).code == "usage", where


def test_nothing_is_mounted_over_what_a_boot_needs_before_its_groups(host: Host) -> None:
    for where in ("/usr", "/usr/share/data", "/var", "/var/", "/var//lib", "/var/lib/unlock/x", "/etc", "/run/x",
                  "/boot", "/boot/efi", "/dev/shm", "/proc", "/sys", "/lib64", "/bin", "/var/run/x"):  # fmt: skip
        error = not_created(host, wanted(host, "/dev/null", mount=where))
        assert (error.code, "needed" in str(error)) == ("mount-taken", True), where


def test_a_mount_point_of_fstab_is_taken_however_it_is_written(host: Host) -> None:
    top = host.folder / "mnt"
    for written, means in {"data": "data", "data/": "data", ".//more/.": "more", "my\\040data": "my data",
                           "a\\134b": "a\\b", "a\\134040b": "a\\040b", "nu\\043ll": "nu#ll", "\\303\\274": "ü",
                           }.items():  # fmt: skip
        Path(host.paths.fstab).write_text(
            f"# a comment\n\nUUID=1 {top}/{written} ext4 nofail 0 2\nUUID=2 none swap sw\n"
        )
        for where in (f"{top}/{means}", f"{top}//{means}/"):
            error = not_created(host, wanted(host, "/dev/null", mount=where))
            assert (error.code, "mounts something" in str(error)) == ("mount-taken", True), written


def test_a_mount_point_of_another_group_is_taken(host: Host) -> None:
    where = str(host.folder / "srv")
    config.append_table(host.paths.config, config.group_table(config.GroupConfig("other", where, "", "", 90)))
    error = not_created(host, wanted(host, "/dev/null", mount=where))
    assert (error.code, "group other" in str(error)) == ("mount-taken", True)


def test_a_mount_point_that_is_no_free_directory_is_taken(host: Host, mounted: Callable[..., Path]) -> None:
    file, full, link = (host.folder / name for name in ("file", "full", "link"))
    file.touch()
    (full / "of data").mkdir(parents=True)
    (host.folder / "empty").mkdir()
    link.symlink_to(host.folder / "empty")
    used = mounted("-t", "tmpfs", "none")
    for where in (file, full, link, link / "below", used):
        assert not_created(host, wanted(host, "/dev/null", mount=str(where))).code == "mount-taken", where
    with pytest.raises(DiskFailed, match="/dev/null is not a block device"):
        group_operations.create_group(host.paths, wanted(host, "/dev/null", mount=str(host.folder / "empty")))


# group create: a profile


def test_a_profile_that_the_disks_are_too_few_for_costs_no_disk(host: Host, loops: Loops) -> None:
    disks = loops(3, 1 << 20)
    sh("mkfs.ext4", "-q", disks[0])
    for profile, count in (("raid1", 1), ("raid10", 1), ("raid1c3", 2), ("raid6", 2), ("raid1c4", 3), ("raid-1", 3)):
        error = not_created(host, wanted(host, *disks[:count], profile=profile, erase=frozenset(disks[:1])))
        assert (error.code, profile in str(error)) == ("usage", True), profile


def test_a_profile_needs_as_many_disks_as_mkfs_btrfs_says(tmp_path: Path) -> None:
    files = [tmp_path / str(number) for number in range(4)]
    for each in files:
        with each.open("wb") as file:
            file.truncate(512 << 20)

    def takes(profile: str, count: int) -> bool:
        options = ["-q", "-f", "-K", "-d", profile, "-m", "single"]
        done = subprocess.run(["mkfs.btrfs", *options, *files[:count]], capture_output=True, check=False)
        return done.returncode == 0

    for profile, least in group_operations.PROFILES.items():
        assert takes(profile, least), profile
        assert least == 1 or not takes(profile, least - 1), profile


# group create: its name, and what was begun


def test_a_creation_that_fails_is_undone_and_another_may_follow(host: Host, loops: Loops) -> None:
    for name in ("data", "other"):
        with pytest.raises(DiskFailed):
            group_operations.create_group(host.paths, wanted(host, *loops(1, 1 << 20), name=name))
        assert (host.state.groups, host.state.journal) == ({}, None)


def test_a_group_that_exists_is_not_created_again(tmp_path: Path, loops: Loops) -> None:
    host = Host(tmp_path, 1)
    assert not_created(host, wanted(host, *loops())).code == "group-exists"
    assert host.boot_opens()


def test_a_name_that_is_no_name_is_refused(host: Host) -> None:
    work = Unchanged(host)
    for name in ("", "../x", "Data", "_data", ".data", "-data", "a b", "a%b", "ü", "a" * 65):
        for command in (
            lambda name=name: group_operations.create_group(host.paths, wanted(host, "/dev/null", name=name)),
            lambda name=name: group_operations.adopt_disk(host.paths, "/dev/null", name, host.recovery, ""),
        ):
            error = work.after(command)
            assert (error.code, "name of a group" in str(error)) == ("usage", True), name


def begun(host: Host, *serials: str) -> None:
    state = host.state
    members = tuple(Member(f"{number:036}", f"data-{number}", serial) for number, serial in enumerate(serials))
    state.begin(GroupCreation("group create", "data", members=members, options=""))


def test_a_group_that_was_begun_goes_on_with_its_own_disks_alone(host: Host, loops: Loops) -> None:
    """After a kill the names may be those of other disks."""
    first, second = loops(2)
    begun(host, "", "")
    error = not_created(host, wanted(host, first))
    assert (error.code, "2 disks" in str(error)) == ("unfinished", True)
    error = not_created(host, wanted(host, first, second, name="other"))
    assert (error.code, "not finished" in str(error)) == ("unfinished", True)


def test_a_disk_in_the_place_of_one_that_was_begun_with_is_told_by_its_serial(host: Host, loops: Loops) -> None:
    begun(host, "", "S-2")
    error = not_created(host, wanted(host, *loops(2)))
    assert (error.code, "S-2" in str(error)) == ("unfinished", True)


def test_a_disk_in_the_place_of_one_that_was_begun_with_keeps_its_data(host: Host, loops: Loops) -> None:
    begun(host, "")
    (disk,) = loops()
    luks_format(disk)
    assert not_created(host, wanted(host, disk)).code == "has-data"


# disk adopt


def luks_format(disk: str, *options: str) -> None:
    fast = ["--pbkdf=pbkdf2", "--pbkdf-force-iterations=1000"]
    kind = options or ("--type=luks2",)
    sh("cryptsetup", "luksFormat", "--batch-mode", *fast, *kind, "--key-file=-", disk, text=OPERATOR)


def not_adopted(host: Host, disk: str, group: str = "data", **more: Any) -> UnlockError:
    passphrase = more.pop("passphrase", Secret(OPERATOR))
    recovery = more.pop("recovery", recovery_file(host))
    work = Unchanged(host, *([disk] if os.path.exists(disk) else []))
    return work.after(lambda: group_operations.adopt_disk(host.paths, disk, group, passphrase, recovery, **more))


def adopt(host: Host, disk: str, group: str = "data", name: str = "") -> None:
    group_operations.adopt_disk(host.paths, disk, group, Secret(OPERATOR), recovery_file(host), name)


def test_what_is_not_luks2_is_not_adopted(host: Host, loops: Loops) -> None:
    plain, old, ruined = loops(3)
    sh("mkfs.ext4", "-q", plain)
    luks_format(old, "--type=luks1")
    luks_format(ruined)
    with open(ruined, "r+b") as file:
        for offset in (4096, 16384 + 4096):
            file.seek(offset)
            file.write(b"no JSON")
    with pytest.raises(NotOurs, match="not LUKS2"):
        adopt(host, plain)
    assert not_adopted(host, ruined).code == "malformed"
    error = not_adopted(host, old)
    assert (error.code, "cryptsetup convert" in error.hint) == ("not-luks2", True)
    assert not_adopted(host, "/dev/unlock-test-absent").code == "usage"


def test_a_disk_whose_header_is_elsewhere_is_not_adopted(host: Host, loops: Loops, tmp_path: Path) -> None:
    (disk,) = loops()
    luks_format(disk, "--type=luks2", f"--header={tmp_path}/header")
    with pytest.raises(NotOurs) as caught:
        adopt(host, disk)
    assert caught.value.code == "not-luks2"


def test_a_wrong_passphrase_adopts_nothing(host: Host, loops: Loops) -> None:
    (disk,) = loops()
    luks_format(disk)
    with pytest.raises(NotOurs):
        group_operations.adopt_disk(host.paths, disk, "data", Secret(b"wrong"), recovery_file(host))
    assert (host.state.groups, host.state.journal) == ({}, None)


def test_another_hosts_recovery_key_adopts_nothing(host: Host, loops: Loops) -> None:
    (disk,) = loops()
    luks_format(disk)
    other = host.folder / "other"
    recovery_key.write_new_file(str(other), recovery_key.new())
    assert not_adopted(host, disk, recovery=str(other)).code == "recovery-key"


def test_a_disk_that_is_being_reencrypted_is_not_adopted(host: Host, loops: Loops) -> None:
    (disk,) = loops()
    luks_format(disk)
    sh("cryptsetup", "reencrypt", "--init-only", "--resilience=none", "--key-file=-", disk, text=OPERATOR)
    error = not_adopted(host, disk)
    assert error.code == "reencrypting"
    assert "--resume-only" in error.hint


HEADERS: dict[str, tuple[Callable[[Any], object], str]] = {
    "data that is not encrypted": (lambda f: f["segments"]["0"].update(encryption="cipher_null-ecb"), "not-encrypted"),
    "data that is mapped as it is": (lambda f: f["segments"]["0"].update(type="linear"), "not-encrypted"),
    "a keyslot that is not encrypted": (
        lambda f: f["keyslots"]["0"]["area"].update(encryption="cipher_null-ecb"), "tampered"
    ),
    "a longer volume key": (
        lambda f: (f["keyslots"]["0"].update(key_size=96), f["keyslots"]["0"]["area"].update(size="385024")),
        "not-supported",
    ),
    "a requirement of tomorrow": (lambda f: f["config"].update(requirements={"mandatory": ["magic"]}), "reencrypting"),
    "two digests": (lambda f: f["digests"].update({"1": {**f["digests"]["0"], "keyslots": []}}), "malformed"),
}  # fmt: skip


def test_a_header_that_does_not_protect_the_data_is_not_adopted(host: Host, loops: Loops) -> None:
    (disk,) = loops()
    luks_format(disk)
    good = Path(disk).read_bytes()[:32768]
    for what, (change, code) in HEADERS.items():
        edit(disk, change)
        with pytest.raises(UnlockError) as caught:
            adopt(host, disk)
        assert (caught.value.code, host.state.groups) == (code, {}), what
        with open(disk, "r+b") as file:
            file.write(good)
    adopt(host, disk)


def test_a_member_of_one_group_does_not_become_one_of_another(host: Host, loops: Loops) -> None:
    (disk,) = loops()
    luks_format(disk)
    adopt(host, disk)
    error = not_adopted(host, disk, "other")
    assert (error.code, "group data" in str(error)) == ("member", True)
    with luks.Container(disk) as container:
        assert [fields["group"] for _, fields in container.tokens(token.TYPE)] == ["data"]


def test_two_disks_never_get_one_mapping_name(host: Host, loops: Loops) -> None:
    first, second = loops(2)
    for each in (first, second):
        luks_format(each)
    adopt(host, first, "one", "vault")
    error = not_adopted(host, second, "two", name="vault")
    assert (error.code, "vault" in str(error)) == ("name-taken", True)
    assert not_adopted(host, second, "two", name="../vault").code == "usage"
    Path(host.paths.crypttab).write_text(f"vault {second} none luks\n")
    assert not_adopted(host, second, "two").code == "name-taken", "crypttab calls it so"


def test_a_disk_keeps_the_name_that_crypttab_gives_it(host: Host, loops: Loops) -> None:
    (disk,) = loops()
    luks_format(disk)
    with luks.Container(disk) as container:
        Path(host.paths.crypttab).write_text(f"photos UUID={container.uuid} none luks\n")
    error = not_adopted(host, disk, name="data-a")
    assert (error.code, "photos" in str(error)) == ("name-taken", True)
    adopt(host, disk)
    assert [each.name for each in host.group.members] == ["photos"]


def test_a_group_takes_in_no_disk_while_one_of_its_members_is_missing(host: Host, loops: Loops) -> None:
    first, second = loops(2)
    for each in (first, second):
        luks_format(each)
    adopt(host, first)
    error = not_adopted(host, second)  # no udev here has marked the first
    assert (error.code, "data-a" in str(error)) == ("missing", True)
    assert [each.name for each in host.group.members] == ["data-a"]


GROWING = """
    from tests.flowfixture import Host
    from tests.test_members import accept, adopt, luks_format
    from tests.test_recovery_rotate import change_flags
    from pathlib import Path
    from unlock.disks import disk_keys
    from unlock.errors import UnlockError
    from unlock.keys import recovery_key

    host, made = Host(Path(image), 0), []

    def disk(copied=""):
        path = f"{image}/disk-{len(made)}"
        if copied:
            sh(f"cp --sparse=always {copied} {path}")
        else:
            sh(f"truncate --size=32M {path}")
            luks_format(path)
        made.append(sh(f"losetup --find --show {path}"))
        wait(lambda: made[-1] in [each.node for each in udev.marked_disks()])
        return made[-1]

    def refused(node):
        before = host.state.groups
        try:
            adopt(host, node)
        except UnlockError as error:
            assert (host.state.groups, host.state.journal) == (before, None)
            return [error.code, str(error), error.hint]

    def tokens():
        return [host.tokens(Path(each)) for each in made]

    try:
        first, second = disk(), disk()
        adopt(host, first)
        adopt(host, second)
        found = [sorted(each.name for each in host.group.members), tokens()]
        third = disk()
        twin = disk(f"{image}/disk-1")
        found.append(refused(third))
        sh(f"losetup --detach {made.pop()}")
        wait(lambda: twin not in [each.node for each in udev.marked_disks()])
        with luks.Container(first) as container:
            container.remove_keyslot(disk_keys.recovery_keyslot(container, host.recovery)[0])
        found.append(refused(third))
        adopt(host, first)
        change_flags(Path(first))
        found.append(refused(third))
        accept(host, Path(first))
        adopt(host, third)
        print(json.dumps([*found, tokens(), host.group.manifest]))
    finally:
        for each in made:
            sh(f"losetup --detach {each}")
        udevd.terminate()
        udevd.wait()
"""


@pytest.fixture
def member(tmp_path: Path) -> tuple[Host, Path]:
    """A host with one member, which the operator's passphrase opens too; adopted once, as the state has its header."""
    made = Host(tmp_path, 1)
    (image,) = made.disks
    with luks.Container(str(image)) as container, Secret(made.deks[container.uuid]) as dek:
        container.add_keyslot(dek, passphrase=Secret(OPERATOR))
    adopt(made, str(image))
    return made, image


def flags(fields: dict[str, Any]) -> None:
    fields["config"]["flags"] = ["allow-discards"]


def cipher(fields: dict[str, Any]) -> None:
    fields["segments"]["0"]["encryption"] = "aes-ecb"


def cipher_without_token(fields: dict[str, Any]) -> None:
    cipher(fields)
    fields["tokens"].clear()


CHANGES = [
    (flags, 'flags was none, is ["allow-discards"]'),
    (cipher, "segments.0.encryption was aes-xts-plain64, is aes-ecb"),
    (cipher_without_token, "segments.0.encryption was aes-xts-plain64, is aes-ecb"),
]


@pytest.mark.parametrize(("change", "words"), CHANGES)
@pytest.mark.parametrize("known", [True, False], ids=["known", "not known"])
def test_a_changed_header_of_a_member_is_shown_and_not_made_authentic_unless_it_is_accepted_by_name(
    member: tuple[Host, Path], change: Callable[[dict[str, Any]], None], words: str, known: bool
) -> None:
    """By what the state has of it; where the state has nothing, by its token."""
    host, image = member
    if not known:
        state = host.state
        state.headers.clear()
        state.save()
        words = "its token is gone" if change is cipher_without_token else "what it was is not known"
    edit(str(image), change)
    error = not_adopted(host, str(image))
    assert isinstance(error, Tampered)
    assert (error.code, error.status) == ("changed-header", 6)
    assert words in str(error) and "data-0" in str(error)
    assert error.hint == "if you changed it: --accept-changed-header data-0"
    assert not_adopted(host, str(image), accepted=["data-1"]).code == "changed-header"
    accept(host, image)
    assert host.boot_opens()
    adopt(host, str(image))  # now it is the header that this host wrote


def accept(host: Host, image: Path) -> None:
    """Whatever was changed in its header."""
    with luks.Container(str(image)) as container:
        (name,) = (each.name for each in host.group.members if each.uuid == container.uuid)
    group_operations.adopt_disk(host.paths, str(image), "data", Secret(OPERATOR), recovery_file(host), accepted=[name])


def test_a_member_that_lost_its_token_alone_is_mended_without_a_question(member: tuple[Host, Path]) -> None:
    host, image = member
    edit(str(image), lambda fields: fields["tokens"].clear())
    with pytest.raises(NotOurs):
        host.boot_opens()
    adopt(host, str(image))
    assert host.boot_opens()


def test_a_member_that_is_back_under_an_earlier_persistence_key_is_adopted_and_that_key_is_kept_no_more(
    member: tuple[Host, Path],
) -> None:
    host, image = member
    state, new = host.state, Secret.random(32)
    state.rewrap(old=host.persistence, new=new)
    for uuid in host.deks:
        state.keep_old_key(uuid, new=new, old=host.persistence)
    state.headers.clear()
    state.save()
    this_boot.cache_keys(host.paths, "TPM", {"unlock:persistence": new})
    adopt(host, str(image))
    assert not host.state.has_old_keys
    host.take_key()
    assert host.boot_opens()


def test_what_differs_in_a_header_is_told_by_its_place_and_is_printable() -> None:
    before = {"flags": None, "segments": {"0": {"encryption": "aes-xts-plain64", "size": "dynamic"}}, "uuid": "x"}
    now = {"flags": ["\x1b[2J\n"], "segments": {"0": {"encryption": "a" * 500}, "1\n": {}}, "uuid": "x"}
    found = changes.describe_changes(before, now)
    assert found == [
        'flags was none, is ["\\u001b[2J\\n"]',
        f"segments.0.encryption was aes-xts-plain64, is {'a' * 100}...",
        "segments.0.size was dynamic, is none",
        "segments.1\\n was none, is {}",
    ]
    assert changes.describe_changes(before, before) == []


@pytest.mark.root
def test_a_group_grows_only_while_every_member_is_here_once_and_takes_the_recovery_key(
    tmp_path: Path, rules: Path
) -> None:
    """A real udevd marks the disks; all members are rewritten when one comes."""
    names, two, twice, no_key, changed, three, manifest = json.loads(python(UDEV + GROWING, str(rules), str(tmp_path)))
    assert names == ["data-a", "data-b"]
    assert [len(each) for each in two] == [1, 1] and [len(each) for each in three] == [1, 1, 1]
    assert (twice[0], "data-b of the group is there twice" in twice[1]) == ("missing", True)
    assert (changed[0], changed[2]) == ("changed-header", "if you changed it: --accept-changed-header data-a")
    assert (no_key[0], no_key[2]) == ("no-key", "unlock recovery new")
    assert manifest >= 4, "no number of a member list is used twice"
