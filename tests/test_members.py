# SPDX-License-Identifier: Apache-2.0
"""What `group create` and `disk adopt` refuse, and that a refused disk is as it was. Real disks, on loop devices."""

import errno
import json
import os
import struct
import subprocess
import tempfile
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from tests.flowfixture import Host
from tests.test_devices import UDEV, python, rules
from tests.test_disk import edit
from unlock import ask, cli
from unlock.boot import gate
from unlock.cli import disk as cli_disk
from unlock.disks import btrfs, changes, disk_keys, luks, token, udev
from unlock.disks.groups import Member
from unlock.errors import DiskFailed, NotOurs, Refused, Tampered, UnlockError, Usage
from unlock.host import config, report, this_boot
from unlock.host.journal import GroupCreation
from unlock.keys import access, delivery, recovery_key, rotation
from unlock.operations import adopt_disk, create_group, membership, recovery
from unlock.operations import flags as flags_operations
from unlock.operations.create_group import NewGroup
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
    return Unchanged(host, *disks).after(lambda: create_group.create_group(host.paths, asked))


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
        create_group.create_group(host.paths, asked)
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
    for where in ("/usr", "/usr/lib", "/var", "/var/", "/var//lib", "/var/lib/unlock/x", "/etc", "/run/x",
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
        create_group.create_group(host.paths, wanted(host, "/dev/null", mount=str(host.folder / "empty")))


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

    for profile, needs in btrfs.PROFILES.items():
        assert takes(profile, needs.least), profile
        assert needs.least == 1 or not takes(profile, needs.least - 1), profile


# group create: its name, and what was begun


def test_a_creation_that_fails_is_undone_and_another_may_follow(host: Host, loops: Loops) -> None:
    for name in ("data", "other"):
        with pytest.raises(DiskFailed):
            create_group.create_group(host.paths, wanted(host, *loops(1, 1 << 20), name=name))
        assert (host.state.groups, host.state.journal) == ({}, None)


def test_a_group_that_exists_is_not_created_again(tmp_path: Path, loops: Loops) -> None:
    host = Host(tmp_path, 1)
    assert not_created(host, wanted(host, *loops())).code == "group-exists"
    assert host.boot_opens()


def test_a_name_that_is_no_name_is_refused(host: Host) -> None:
    work = Unchanged(host)
    for name in ("", "../x", "Data", "_data", ".data", "-data", "a b", "a%b", "ü", "a" * 65):
        for command in (
            lambda name=name: create_group.create_group(host.paths, wanted(host, "/dev/null", name=name)),
            lambda name=name: adopt_disk.adopt_disk(host.paths, "/dev/null", name, host.recovery, ""),
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
    return work.after(lambda: adopt_disk.adopt_disk(host.paths, disk, group, passphrase, recovery, **more))


def adopt(host: Host, disk: str, group: str = "data", name: str = "") -> None:
    adopt_disk.adopt_disk(host.paths, disk, group, Secret(OPERATOR), recovery_file(host), name)


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
        adopt_disk.adopt_disk(host.paths, disk, "data", Secret(b"wrong"), recovery_file(host))
    assert (host.state.groups, host.state.journal) == ({}, None)


def test_another_hosts_recovery_key_adopts_nothing(host: Host, loops: Loops) -> None:
    (disk,) = loops()
    luks_format(disk)
    other = host.folder / "other"
    recovery_key.write_new_file(str(other), recovery_key.new())
    assert not_adopted(host, disk, recovery=str(other)).code == "recovery-key"


def begin_reencryption(disk: str, *options: str) -> None:
    luks_format(disk)
    sh("cryptsetup", "reencrypt", "--init-only", *options, "--key-file=-", disk, text=OPERATOR)


def changed(change: Callable[[Any], object]) -> Callable[[str], object]:
    """A new disk whose header is changed so."""

    def make(disk: str) -> None:
        luks_format(disk)
        edit(disk, change)

    return make


def requires(name: str, **segment: str) -> Callable[[str], object]:
    def change(fields: Any) -> None:
        fields["config"]["requirements"] = {"mandatory": [name]}
        fields["segments"]["0"].update(segment)

    return changed(change)


def add_integrity(fields: Any) -> None:
    """A volume key of 64 bytes: half for aes-xts, half for the MAC."""
    fields["segments"]["0"]["integrity"] = {
        "type": "hmac(sha256)",
        "journal_encryption": "none",
        "journal_integrity": "none",
    }


def detach(disk: str) -> None:
    with tempfile.NamedTemporaryFile() as data:
        data.truncate(64 << 20)
        luks_format(data.name, "--type=luks2", f"--header={disk}")


def import_tokens(disk: str, count: int, filler: str = "") -> None:
    luks_format(disk)
    text = json.dumps({"type": "clevis", "keyslots": ["0"], "jwe": filler}).encode()
    for _ in range(count):
        sh("cryptsetup", "token", "import", "--json-file=-", disk, text=text)


def fill_keyslots(disk: str, size: str, count: int) -> None:
    luks_format(disk, "--type=luks2", f"--luks2-keyslots-size={size}")
    with luks.Container(disk) as container, container.volume_key(Secret(OPERATOR)) as dek:
        for number in range(1, count):
            container.add_keyslot(dek, passphrase=Secret(b"p%d" % number))


def begin_encryption(disk: str) -> None:
    options = ["--encrypt", "--init-only", "--reduce-device-size=16M", "--batch-mode", "--key-file=-"]
    fast = ["--pbkdf=pbkdf2", "--pbkdf-force-iterations=1000"]
    sh("cryptsetup", "reencrypt", *options, *fast, disk, text=OPERATOR)


OPAL = {"type": "hw-opal-crypt", "opal_segment_number": "1", "opal_key_size": "32", "opal_segment_size": "16777216"}
UNUSUAL: dict[str, tuple[Callable[[str], object], str, str, str]] = {
    "re-encryption": (
        lambda disk: begin_reencryption(disk, "--resilience=none"),
        "reencrypting", "being re-encrypted", "cryptsetup reencrypt --resume-only /dev/loop",
    ),
    "re-encryption with checksums": (
        lambda disk: begin_reencryption(disk, "--resilience=checksum"),
        "reencrypting", "being re-encrypted", "cryptsetup reencrypt --resume-only /dev/loop",
    ),
    "encryption of plain data": (
        begin_encryption, "reencrypting", "being re-encrypted", "cryptsetup reencrypt --resume-only /dev/loop",
    ),
    "OPAL beside dm-crypt": (requires("opal", **OPAL), "not-supported", "OPAL", "unlock group create"),
    "OPAL": (requires("opal"), "not-supported", "OPAL", "unlock group create"),
    "inline tags": (requires("inline-hw-tags"), "not-supported", "integrity tags", "unlock group create"),
    "a feature of tomorrow": (requires("magic"), "not-supported", "the feature 'magic'", "cryptsetup luksDump /dev/"),
    "integrity": (changed(add_integrity), "not-supported", "integrity protection", "unlock group create"),
    "a detached header": (detach, "not-supported", "detached header", "unlock group create"),
    "data beyond the disk": (
        changed(lambda f: f["segments"]["0"].update(offset=str(SMALL))), "not-supported", "cut off", "lsblk",
    ),
    "data of a size beyond the disk": (
        changed(lambda f: f["segments"]["0"].update(size=str(SMALL))), "not-supported", "cut off", "lsblk",
    ),
    "32 tokens": (lambda disk: import_tokens(disk, 32), "no-room", "32 tokens", "token remove --token-id N /dev/loop"),
    "31 tokens": (lambda disk: import_tokens(disk, 31), "no-room", "31 tokens", "0 (clevis"),
    "no bytes for a token": (
        lambda disk: import_tokens(disk, 1, "x" * 10_000), "no-room", "bytes are free", "0 (clevis, 100",
    ),
    "no bytes for a second token": (
        lambda disk: import_tokens(disk, 1, "x" * 7_000), "no-room", "bytes are free", "0 (clevis, 70",
    ),
    "a full area of keyslots": (
        lambda disk: fill_keyslots(disk, "1m", 4), "no-room", "2 more keyslots", "luksKillSlot /dev/loop",
    ),
    "room for one keyslot": (
        lambda disk: fill_keyslots(disk, "1m", 3), "no-room", "2 more keyslots", "luksKillSlot /dev/loop",
    ),
    "room for the only keyslot": (
        lambda disk: fill_keyslots(disk, "256k", 1), "no-room", "2 more keyslots", "unlock group create",
    ),
    **{
        f"the cipher {cipher}": (
            changed(lambda f, cipher=cipher: f["segments"]["0"].update(encryption=cipher)),  # type: ignore[misc]
            "not-encrypted", f"its cipher is {cipher}", "cryptsetup reencrypt --cipher aes-xts-plain64",
        )
        for cipher in ("null", "null-ecb", "cipher_null", "cipher_null-ecb", "capi:ecb(cipher_null)-plain")
    },
}  # fmt: skip


@pytest.mark.parametrize("what", UNUSUAL)
def test_an_unusual_disk_is_refused_by_name_and_stays_as_it_is(host: Host, loops: Loops, what: str) -> None:
    (disk,) = loops()
    make, code, words, hint = UNUSUAL[what]
    make(disk)
    error = not_adopted(host, disk)
    assert error.code == code, error
    assert words in str(error) and disk in str(error)
    assert hint in error.hint


@pytest.mark.parametrize("size", ["512k", "1m", "2m", "4m"])
def test_a_disk_with_much_room_for_metadata_is_adopted(host: Host, loops: Loops, size: str) -> None:
    (disk,) = loops()
    luks_format(disk, "--type=luks2", f"--luks2-metadata-size={size}", "--luks2-keyslots-size=8m")
    adopt(host, disk)
    take_in(host, disk)
    assert host.boot_opens() and host.recovery_opens()


def take_in(host: Host, disk: str) -> None:
    """The disk and its volume key, for what `host` says of its disks."""
    host.disks.append(Path(disk))
    with luks.Container(disk) as container, container.volume_key(Secret(OPERATOR)) as dek:
        host.deks[container.uuid] = bytes(dek)


def test_a_header_with_just_enough_room_is_adopted_and_its_keys_are_replaced(host: Host, loops: Loops) -> None:
    (disk,) = loops()
    luks_format(disk, "--type=luks2", "--luks2-keyslots-size=1m")
    with luks.Container(disk) as container, container.volume_key(Secret(OPERATOR)) as dek:
        container.add_keyslot(dek, passphrase=Secret(b"another"))
        for _ in range(15):
            container.set_token({"type": "clevis", "keyslots": ["0"], "jwe": "x" * 250})
    adopt(host, disk)
    take_in(host, disk)
    rotation.rewrap_disks(work := host.work(), host.group, access.find_kek(work, host.group)[0])
    recovery.rotate_recovery_key(host.paths, delivery.Keeper(str(host.folder / "new"), None), host.look)
    assert host.boot_opens()


class Failing:
    """libcryptsetup, of which the first call of one function fails."""

    def __init__(self, call: str) -> None:
        self._library, self._call, self._failed = luks._lib(), call, False

    def __getattr__(self, name: str) -> Any:
        if name == self._call and not self._failed:
            self._failed = True
            return lambda *_: -errno.ENOSPC
        return getattr(self._library, name)


@pytest.mark.parametrize("had", [frozenset(), frozenset({"same-cpu-crypt"})], ids=["plain", "with a flag"])
@pytest.mark.parametrize(
    "call", ["crypt_keyslot_add_by_volume_key", "crypt_token_json_set", "crypt_persistent_flags_set"]
)
def test_an_adoption_that_fails_leaves_no_keyslot_and_no_flag(
    host: Host, loops: Loops, monkeypatch: pytest.MonkeyPatch, call: str, had: frozenset[str]
) -> None:
    (disk,) = loops()
    luks_format(disk)
    if had:
        with luks.Container(disk) as container:
            container.set_flags(had)
    Path(host.paths.crypttab).write_text(f"photos {disk} none luks,discard\n")
    with luks.Container(disk) as container:
        before = container.flags, container.keyslots()
    monkeypatch.setattr(luks, "_library", Failing(call))
    with pytest.raises(DiskFailed):
        adopt(host, disk)
    with luks.Container(disk) as container:
        assert (container.flags, container.keyslots(), container.tokens(token.TYPE)) == (*before, [])
    assert (host.state.groups, host.state.journal) == ({}, None)
    adopt(host, disk)


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
    "data beside a null cipher": (lambda f: f["segments"]["0"].update(encryption="null-ecb"), "not-encrypted"),
    "a requirement of tomorrow": (lambda f: f["config"].update(requirements={"mandatory": ["magic"]}), "not-supported"),
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


# What else is on it: crypttab's options, signatures, tokens of others


CRYPTTAB_OPTIONS: dict[str, tuple[list[str], str]] = {
    "luks,discard": (["allow-discards"], ""),
    "luks,nofail,discard,tries=3,x-systemd.device-timeout=10s": (["allow-discards"], ""),
    "no-read-workqueue,no-write-workqueue,same-cpu-crypt,submit-from-crypt-cpus": (
        ["no-read-workqueue", "no-write-workqueue", "same-cpu-crypt", "submit-from-crypt-cpus"], "",
    ),
    "luks,discard,read-only": (["allow-discards"], "read-only"),
    "readonly,key-slot=1,magic=2": ([], "readonly, magic=2"),
    "luks": ([], ""),
}  # fmt: skip


@pytest.mark.parametrize("options", CRYPTTAB_OPTIONS)
def test_the_options_of_crypttab_go_into_the_header_or_are_said(
    host: Host, loops: Loops, capsys: pytest.CaptureFixture[str], options: str
) -> None:
    (disk,) = loops()
    luks_format(disk)
    Path(host.paths.crypttab).write_text(f"photos {disk} none {options}\n")
    adopt(host, disk)
    take_in(host, disk)
    flags, lost = CRYPTTAB_OPTIONS[options]
    with luks.Container(disk) as container:
        assert sorted(container.flags) == sorted(container.facts()["flags"] or []) == sorted(flags)
    dump = sh("cryptsetup", "luksDump", disk)
    assert all(each in dump for each in flags)
    assert host.boot_opens()
    told = capsys.readouterr().err
    assert ("without effect" in told) == bool(lost) and lost in told
    assert ("into its header" in told) == bool(flags) and all(each in told for each in flags)


KEY_FILES: dict[str, tuple[bytes, int, int]] = {
    "a last newline": (b"secret\n", 0, 0),
    "a newline inside": (b"two\nlines", 0, 0),
    "newlines alone": (b"\n\n", 0, 0),
    "blanks alone": (b"   \t", 0, 0),
    "a zero byte first": (b"\0secret", 0, 0),
    "4096 bytes": (bytes(range(256)) * 16, 0, 0),
    "more than 4096 bytes": (b"k" * 5000, 0, 0),
    "a megabyte": (b"k" * (1 << 20), 0, 0),
    "a part": (b"before" + b"the key\n" + b"after", 6, 8),
    "all from an offset on": (b"before" + b"the key\n", 6, 0),
    "the beginning": (b"the key\n" + b"after", 0, 8),
    "a part behind 4096 bytes": (bytes(8000) + b"the key\n" + bytes(10), 8000, 8),
}


def container_opens(disk: str, passphrase: Secret) -> None:
    with luks.Container(disk) as container:
        container.volume_key(passphrase)


@pytest.mark.parametrize("what", KEY_FILES)
def test_a_key_file_is_taken_as_cryptsetup_takes_it(tmp_path: Path, loops: Loops, what: str) -> None:
    """The disk was formatted with it by cryptsetup."""
    content, offset, size = KEY_FILES[what]
    (disk,) = loops()
    file = tmp_path / "key"
    file.write_bytes(content)
    options = [f"--keyfile-offset={offset}"] * bool(offset) + [f"--keyfile-size={size}"] * bool(size)
    fast = ["--pbkdf=pbkdf2", "--pbkdf-force-iterations=1000", "--batch-mode", "--type=luks2"]
    sh("cryptsetup", "luksFormat", *fast, *options, f"--key-file={file}", disk)
    parsed = cli._parser().parse_args(["disk", "adopt", disk, "--group", "data", "--key-file", str(file), *options])
    with cli_disk._passphrase(parsed) as passphrase:
        container_opens(disk, passphrase)
    pipe, end = os.pipe()
    if len(content) < 60_000:
        os.write(end, content)
        os.close(end)
        with ask.key_file(f"/proc/self/fd/{pipe}", offset=offset, size=size) as piped:
            container_opens(disk, piped)
    os.close(pipe)


@pytest.mark.parametrize("content", [b"secret\n", b"  \n", b"k" * 5000])
def test_a_key_file_that_is_named_as_a_passphrase_gets_the_right_option_as_its_hint(
    host: Host, loops: Loops, tmp_path: Path, content: bytes
) -> None:
    (disk,) = loops()
    file = tmp_path / "key"
    file.write_bytes(content)
    fast = ["--pbkdf=pbkdf2", "--pbkdf-force-iterations=1000", "--batch-mode", "--type=luks2"]
    sh("cryptsetup", "luksFormat", *fast, f"--key-file={file}", disk)
    words = ["disk", "adopt", disk, "--group", "data", "--passphrase-file", str(file)]
    words += ["--recovery-key-file", recovery_file(host)]
    parsed = cli._parser().parse_args(words)
    with pytest.raises(UnlockError) as caught:
        cli_disk._adopt(host.paths, parsed)
    assert f"--key-file {file}" in caught.value.hint


def test_a_key_file_that_cannot_be_taken_is_a_mistake_that_is_named(tmp_path: Path) -> None:
    empty, short, huge = tmp_path / "empty", tmp_path / "short", tmp_path / "huge"
    empty.touch()
    short.write_bytes(b"12345")
    huge.write_bytes(bytes((8 << 20) + 1))
    for words in (
        ["--key-file", str(empty)],
        ["--key-file", str(tmp_path / "absent")],
        ["--key-file", str(huge)],
        ["--key-file", str(short), "--keyfile-size", "6"],
        ["--key-file", str(short), "--keyfile-offset", "5"],
        ["--key-file", str(short), "--keyfile-offset", "-1"],
        ["--key-file", str(short), "--passphrase-file", str(short)],
        ["--passphrase-file", str(short), "--keyfile-size", "2"],
    ):
        parsed = cli._parser().parse_args(["disk", "adopt", "/dev/null", "--group", "data", *words])
        with pytest.raises(Usage):
            cli_disk._passphrase(parsed)


def test_tokens_of_clevis_and_systemd_stay_through_all_that_happens_to_ours(host: Host, loops: Loops) -> None:
    (disk,) = loops()
    luks_format(disk)
    others: list[dict[str, Any]] = [
        {"type": "clevis", "keyslots": ["1"], "jwe": {"ciphertext": "x" * 300, "protected": "é"}},
        {"type": "systemd-tpm2", "keyslots": ["2"], "tpm2-blob": "y" * 400, "tpm2-pcrs": [7]},
        {"type": "systemd-recovery", "keyslots": ["0"]},
    ]
    with luks.Container(disk) as container, container.volume_key(Secret(OPERATOR)) as dek:
        for number, text in enumerate((b"by clevis", b"by systemd"), 1):
            assert container.add_keyslot(dek, passphrase=Secret(text)) == number
        for number, each in zip((0, 5, 31), others, strict=True):
            container.set_token(each, number)
    exported = [sh("cryptsetup", "token", "export", f"--token-id={number}", disk) for number in (0, 5, 31)]
    adopt(host, disk)
    take_in(host, disk)
    adopt(host, disk)
    rotation.rewrap_disks(work := host.work(), host.group, access.find_kek(work, host.group)[0])
    flags_operations.change_flags(
        host.paths, disk, add=frozenset({"allow-discards"}), remove=frozenset(), look=host.look
    )
    recovery.rotate_recovery_key(host.paths, delivery.Keeper(str(host.folder / "new"), None), host.look)
    assert host.boot_opens()
    assert [sh("cryptsetup", "token", "export", f"--token-id={n}", disk) for n in (0, 5, 31)] == exported
    for slot, text in enumerate((OPERATOR, b"by clevis", b"by systemd")):
        sh("cryptsetup", "open", "--test-passphrase", f"--key-slot={slot}", "--key-file=-", disk, text=text)


def enroll(disk: str) -> bytes:
    """A recovery key of systemd's, which has a token."""
    command = ["systemd-cryptenroll", "--recovery-key", disk]
    env = {**os.environ, "PASSWORD": OPERATOR.decode()}
    return subprocess.run(command, env=env, capture_output=True, check=True).stdout.strip()


def test_systemd_cryptenroll_works_before_and_after_an_adoption(host: Host, loops: Loops) -> None:
    (disk,) = loops()
    luks_format(disk)
    before = enroll(disk)
    adopt(host, disk)
    take_in(host, disk)
    after = enroll(disk)
    assert host.boot_opens() and host.recovery_opens()
    for key in (before, after):
        sh("cryptsetup", "open", "--test-passphrase", "--key-file=-", disk, text=key)
    sh("systemd-cryptenroll", "--wipe-slot=recovery", disk)
    assert host.boot_opens() and host.recovery_opens()
    with luks.Container(disk) as container:
        assert container.tokens("systemd-recovery") == []


def write_md_superblock(disk: str, version: int) -> None:
    """Of version 0.90 or 1.0, which lie at the end of a member: linux/raid/md_p.h."""
    size = os.stat(disk).st_size or int(sh("blockdev", "--getsize64", disk))
    if version == 0:
        at = (size & ~0xFFFF) - 0x10000
        block = struct.pack("<17I", 0xA92B4EFC, 0, 90, 0, 0, 1, 2, 1, 1024, 2, 2, 0, 0, 2, 3, 4, 5)
    else:
        at = (size // 512 - 16) // 8 * 8 * 512
        block = struct.pack("<4I16s32sQ4I", 0xA92B4EFC, 1, 0, 0, b"u" * 16, b"host:0", 0, 1, 0, 0, 2)
        block = block.ljust(144, b"\0")[:144] + struct.pack("<Q", at // 512)
        block = block.ljust(256, b"\0")
    with open(disk, "r+b") as file:
        file.seek(at)
        file.write(block)


OTHERS: dict[str, tuple[Callable[[str], object], str]] = {
    "a former md member": (lambda disk: write_md_superblock(disk, 0), "linux_raid_member"),
    "a former md member, format 1.0": (lambda disk: write_md_superblock(disk, 1), "linux_raid_member"),
    "a former member of a firmware RAID": (lambda disk: write_ddf_header(disk), "ddf_raid_member"),
}


def write_ddf_header(disk: str) -> None:
    """SNIA's DDF, in the last sector."""
    size = int(sh("blockdev", "--getsize64", disk))
    block = struct.pack(">I4s24s8s", 0xDE11DE11, b"\0" * 4, b"LSI     0123456789abcdef", b"01.02.00")
    with open(disk, "r+b") as file:
        file.seek(size - 512)
        file.write(block.ljust(512, b"\0"))


@pytest.mark.parametrize("what", OTHERS)
def test_a_disk_that_udev_takes_for_something_else_is_not_adopted(host: Host, loops: Loops, what: str) -> None:
    """Its header is never looked at: udev's rule goes by what blkid finds first."""
    (disk,) = loops()
    luks_format(disk)
    make, kind = OTHERS[what]
    make(disk)
    error = not_adopted(host, disk)
    assert (error.code, kind in str(error)) == ("other-signature", True)
    command = error.hint.rpartition(": ")[2]
    assert command.startswith("wipefs ") and command.endswith(disk)
    sh(*command.replace("--backup ", "").split())
    adopt(host, disk)


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


def test_a_disk_that_the_groups_file_system_cannot_use_is_taken_by_name_alone(
    host: Host, loops: Loops, tmp_path: Path
) -> None:
    """The group's own disk is away, so that it goes no further."""
    (disk,) = loops()
    luks_format(disk)
    host.add_group("data", 1)
    host.configure(more='[group.data]\nmount = "/srv/data"\ntype = "ext4"\n')
    file = tmp_path / "passphrase"
    file.write_bytes(OPERATOR)
    words = ["disk", "adopt", disk, "--group", "data", "--passphrase-file", str(file)]
    words += ["--recovery-key-file", recovery_file(host)]
    for more, code in ([], "separate-disk"), (["--accept", "separate-disk"], "missing"):
        parsed = cli._parser().parse_args([*words, *more])
        error = Unchanged(host, disk).after(partial(cli_disk._adopt, host.paths, parsed))
        assert error.code == code


def test_a_group_whose_disks_udev_has_not_marked_fails_with_what_to_type(
    host: Host, monkeypatch: pytest.MonkeyPatch
) -> None:
    host.add_group("data", 1)
    hints = []
    for unmarked in ({"/dev/sda"}, set()):
        monkeypatch.setattr(udev, "unmarked_disks", lambda found=unmarked: found)
        message, hint = gate._explain_failure(host.paths, report.Report("open data"), "data")
        assert "data-0 (serial unknown) is missing" in message
        hints.append(hint)
    assert hints == ["udevadm trigger --settle --subsystem-match=block; then unlock open data", "unlock status"]


def accept(host: Host, image: Path) -> None:
    """Whatever was changed in its header."""
    with luks.Container(str(image)) as container:
        (name,) = (each.name for each in host.group.members if each.uuid == container.uuid)
    adopt_disk.adopt_disk(host.paths, str(image), "data", Secret(OPERATOR), recovery_file(host), accepted=[name])


@pytest.mark.parametrize("what", ["a member", "one that was accepted", "a new disk"])
@pytest.mark.parametrize("step", ["obtain_recovery_key", "write_member_list"])
def test_a_header_that_changes_after_its_check_gets_no_token(
    member: tuple[Host, Path], loops: Loops, monkeypatch: pytest.MonkeyPatch, what: str, step: str
) -> None:
    """A drive, a SAN or a USB disk may answer otherwise the second time."""
    host, image = member
    disk, group = str(image), "data"
    if what == "a new disk":
        (disk,) = loops()
        luks_format(disk)
        group = "more"
    if what == "one that was accepted":
        edit(disk, flags)
    real = getattr(membership, step)

    def swap(*arguments: Any, **named: Any) -> Any:
        edit(disk, lambda fields: fields["segments"]["0"].update(encryption="cipher_null-ecb"))
        return real(*arguments, **named)

    monkeypatch.setattr(membership, step, swap)
    with pytest.raises(Tampered, match="changed meanwhile") as caught:
        adopt_disk.adopt_disk(host.paths, disk, group, Secret(OPERATOR), recovery_file(host), accepted=["data-0"])
    assert caught.value.code == "changed-header"
    with luks.Container(disk) as container:
        tokens = [token.decode(fields) for _, fields in container.tokens(token.TYPE)]
        assert not any(disk_keys.is_authentic(container, each, host.persistence) for each in tokens)
        assert "cipher_null" not in host.state.headers.get(container.uuid, "")
    assert host.state.journal is None


def test_what_is_accepted_at_once_is_shown(member: tuple[Host, Path], capsys: pytest.CaptureFixture[str]) -> None:
    host, image = member
    edit(str(image), flags)
    accept(host, image)
    assert 'accepted: flags was none, is ["allow-discards"]' in capsys.readouterr().err


def test_a_member_is_accepted_only_with_a_header_that_protects_its_data(tmp_path: Path) -> None:
    """Of the disk that is named, and of each other member."""
    host = Host(tmp_path, 2)
    first, second = host.disks
    with luks.Container(str(first)) as container, Secret(host.deks[container.uuid]) as dek:
        container.add_keyslot(dek, passphrase=Secret(OPERATOR))
    edit(str(second), lambda fields: fields["segments"]["0"].update(encryption="cipher_null-ecb"))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(access, "Work", partial(access.Work, look=host.look))
        with pytest.raises(Refused, match="not encrypted"):
            adopt_disk.adopt_disk(
                host.paths, str(first), "data", Secret(OPERATOR), recovery_file(host), accepted=["data-1"]
            )


def test_a_member_that_lost_its_token_alone_is_mended_without_a_question(member: tuple[Host, Path]) -> None:
    host, image = member
    edit(str(image), lambda fields: fields["tokens"].clear())
    with pytest.raises(NotOurs):
        host.boot_opens()
    adopt(host, str(image))
    assert host.boot_opens()


def test_a_member_with_a_changed_token_alone_is_mended_without_a_question(member: tuple[Host, Path]) -> None:
    """The state knows its header."""
    host, image = member
    with luks.Container(str(image)) as container:
        ((number, fields),) = container.tokens(token.TYPE)
        container.remove_token(number)
        container.set_token({**fields, "name": "root"})
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
