# SPDX-License-Identifier: Apache-2.0
"""`unlock recovery test, new, rotate`: real headers; run twice, killed anywhere, disks away, disks that fail."""

import ctypes
import json
import os
import subprocess
from collections import Counter
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from tests.flowfixture import HOST, Host
from tests.killing import LASTING, Killer, child, killed_at
from tests.test_disk import edit
from tests.test_escrow import decrypted, organisation
from unlock.disks import disk_keys, find, luks
from unlock.errors import NotOurs, Refused, Tampered, UnlockError, Usage
from unlock.host import keyring
from unlock.host.journal import RecoveryRotation
from unlock.keys import access, delivery, recovery_key
from unlock.keys.escrow import Escrow
from unlock.operations import recovery, rekey, status, sync
from unlock.secret import Secret

pytestmark = pytest.mark.usefixtures("key_cache")


@pytest.fixture
def host(tmp_path: Path) -> Iterator[Host]:
    host = Host(tmp_path, 3)
    assert all(each.outcome == "ok" for each in look_at(host, host.recovery))
    yield host
    keyring.flush()


def look_at(host: Host, key: Secret) -> list[recovery.Tested]:
    return recovery.test_recovery_key(host.paths, key, host.look)


def outcomes(host: Host, key: Secret) -> list[str]:
    return [each.outcome for each in look_at(host, key)]


def file_of(host: Host, name: str = "new-key") -> str:
    return str(host.folder / name)


def rotate(host: Host, name: str = "new-key") -> recovery.Changed:
    return recovery.rotate_recovery_key(host.paths, delivery.Keeper(file_of(host, name)), host.look)


def key_of(host: Host, name: str = "new-key") -> Secret:
    return delivery.read_recovery_key(file_of(host, name))


def authentic(image: Path, key: Secret) -> bool:
    """As the prompt of early boot would open it: by some token whose MAC fits."""
    with luks.Container(str(image)) as container:
        for each in disk_keys.read_tokens(container, HOST):
            try:
                with disk_keys.dek_by_checked_recovery_key(container, each, key):
                    return True
            except UnlockError:
                continue
    return False


def opens_with_cryptsetup(image: Path, key: Secret) -> bool:
    command = ["cryptsetup", "open", "--test-passphrase", "--key-file=-", str(image)]
    return subprocess.run(command, input=bytes(key), capture_output=True, check=False).returncode == 0


def slots(image: Path) -> int:
    with luks.Container(str(image)) as container:
        return len(container.keyslots())


# Test


def test_the_right_key_is_ok_on_every_disk_and_when_is_remembered(host: Host) -> None:
    before = [image.read_bytes() for image in host.disks]
    assert outcomes(host, host.recovery) == ["ok"] * 3
    assert set(host.state.recovery.tested) == set(host.deks)
    assert [image.read_bytes() for image in host.disks] == before, "nothing is written to a disk"


def test_another_hosts_key_is_told_from_a_changed_header_and_an_absent_disk(host: Host) -> None:
    assert outcomes(host, recovery_key.new()) == ["wrong-key"] * 3
    change_flags(host.disks[0])
    host.disks.pop(2)
    found = look_at(host, host.recovery)
    assert [each.outcome for each in found] == ["altered", "ok", "absent"]
    assert recovery.exit_status(found) == Tampered.status
    assert recovery.exit_status(look_at(host, recovery_key.new())) == NotOurs.status
    assert recovery.exit_status(found[1:]) == 1


def change_flags(image: Path) -> None:
    """What a thief could do with stock cryptsetup: the keyslot still opens."""
    with luks.Container(str(image)) as container:
        container.set_flags(frozenset({"allow-discards"}))


def test_a_disk_without_its_token_is_altered_for_the_right_key_alone(host: Host) -> None:
    with luks.Container(str(host.disks[0])) as container:
        for number, _ in container.tokens("unlock"):
            container.remove_token(number)
    assert outcomes(host, host.recovery) == ["altered", "ok", "ok"]
    assert outcomes(host, recovery_key.new()) == ["wrong-key"] * 3


def test_two_disks_with_one_uuid_are_not_taken_for_the_member(host: Host) -> None:
    twin = host.folder / "twin"
    twin.write_bytes(host.disks[0].read_bytes())
    host.disks.append(twin)
    found = look_at(host, host.recovery)
    assert (found[0].outcome, found[0].detail) == ("absent", "2 disks have its UUID")


# Rotate


def test_after_a_rotation_the_new_key_opens_everything_and_the_old_one_nothing(host: Host) -> None:
    assert rotate(host) == (("data-0", "data-1", "data-2"), ())
    new = key_of(host)
    assert host.state.recovery.tested == {}
    assert outcomes(host, new) == ["ok"] * 3
    assert outcomes(host, host.recovery) == ["wrong-key"] * 3
    for image in host.disks:
        assert opens_with_cryptsetup(image, new)
        assert not opens_with_cryptsetup(image, host.recovery)
        assert (slots(image), len(host.tokens(image))) == (1, 1)
    assert host.boot_opens()
    assert host.state.journal is None
    assert "key" not in json.loads(Path(host.paths.state).read_text())["recovery"]


def test_each_rotation_needs_a_new_file(host: Host) -> None:
    rotate(host)
    rotate(host, "next")
    for former in ("new-key", "next"):
        with pytest.raises(Usage, match="exists already"):
            rotate(host, former)
    assert outcomes(host, key_of(host, "next")) == ["ok"] * 3
    assert outcomes(host, key_of(host)) == ["wrong-key"] * 3


def test_an_operators_keyslots_stay_also_those_that_are_as_cheap(host: Host) -> None:
    """clevis and systemd make such."""
    for image in host.disks:
        with luks.Container(str(image)) as container, Secret(host.deks[container.uuid]) as dek:
            container.add_keyslot(dek, passphrase=Secret(b"clevis"))
    rotate(host)
    assert all(opens_with_cryptsetup(image, Secret(b"clevis")) for image in host.disks)
    assert all(not opens_with_cryptsetup(image, host.recovery) for image in host.disks)


def test_without_knowing_the_old_keyslot_nothing_is_begun(host: Host) -> None:
    state = host.state
    state.recovery.keyslots.clear()
    state.save()
    with pytest.raises(Refused) as caught:
        rotate(host)
    assert caught.value.code == "unknown-keyslot"
    assert not Path(file_of(host)).exists()
    assert outcomes(host, host.recovery) == ["ok"] * 3, "which tells it"
    rotate(host)


def test_a_disk_that_was_away_keeps_the_old_key_until_new_finds_it(host: Host) -> None:
    away = host.disks.pop()
    assert rotate(host) == (("data-0", "data-1"), ("data-2",))
    host.disks.append(away)
    new = key_of(host)
    assert authentic(away, host.recovery)
    found = look_at(host, new)
    assert (found[2].outcome, found[2].detail) == (
        "wrong-key",
        "it was away when the key was rotated: unlock recovery new",
    )
    rekey.rekey(host.paths, "data", host.look)
    assert authentic(away, host.recovery), "a new KEK leaves it with the MAC of the key that it has"
    assert recovery.renew_keyslots(host.paths, new, host.look) == (("data-0", "data-1", "data-2"), ())
    assert outcomes(host, new) == ["ok"] * 3
    assert not authentic(away, host.recovery)
    assert slots(away) == 1


def test_a_disk_that_was_away_twice_gets_the_newest(host: Host) -> None:
    away = host.disks.pop()
    rotate(host)
    rotate(host, "next")
    host.disks.append(away)
    sync.sync(host.paths, host.look)
    assert authentic(away, host.recovery)
    rotate(host, "third")
    assert outcomes(host, key_of(host, "third")) == ["ok"] * 3
    assert all(slots(image) == 1 for image in host.disks)


def test_new_gives_a_lost_keyslot_back_and_is_nothing_where_none_is_lost(host: Host) -> None:
    with luks.Container(str(host.disks[1])) as container:
        container.remove_keyslot(disk_keys.recovery_keyslot(container, host.recovery)[0])
    assert outcomes(host, host.recovery) == ["ok", "wrong-key", "ok"]
    recovery.renew_keyslots(host.paths, host.recovery, host.look)
    assert outcomes(host, host.recovery) == ["ok"] * 3
    before = [image.read_bytes() for image in host.disks]
    recovery.renew_keyslots(host.paths, host.recovery, host.look)
    assert [image.read_bytes() for image in host.disks] == before
    with pytest.raises(Refused, match="not the recovery key"):
        recovery.renew_keyslots(host.paths, recovery_key.new(), host.look)


def test_a_changed_header_is_never_blessed(host: Host) -> None:
    change_flags(host.disks[1])
    changes: tuple[Callable[[], object], ...] = (
        lambda: rotate(host),
        lambda: recovery.renew_keyslots(host.paths, host.recovery, host.look),
    )
    for change in changes:
        with pytest.raises(Tampered):
            change()
        assert not authentic(host.disks[1], host.recovery)
        assert host.state.journal is None, "other work may go on"
    assert [authentic(image, host.recovery) for image in host.disks] == [True, False, True]


def killed_before_the_first_keyslot(host: Host, keep: delivery.Keeper) -> None:
    assert killed_at(1, lambda: recovery.rotate_recovery_key(host.paths, keep, host.look), [luks.Container.add_keyslot])


@pytest.mark.parametrize("step", ["ensure_recovery_keyslot", "make_token"])
def test_a_header_that_changes_after_its_check_is_not_blessed(
    host: Host, monkeypatch: pytest.MonkeyPatch, step: str
) -> None:
    """For all readings from that of the step on, as a disk may answer."""
    image = host.disks[0]
    real, real_key = luks.Container.__init__, access.find_volume_key
    left = {"ensure_recovery_keyslot": 1, "make_token": 3}[step]
    checked = False

    def find_volume_key(*arguments: Any) -> Secret:
        nonlocal checked
        checked = True
        return real_key(*arguments)

    def swap(container: luks.Container, device: str) -> None:
        nonlocal left
        if checked and device == str(image):
            left -= 1
            if left == 0:
                edit(str(image), null_cipher)
        real(container, device)

    monkeypatch.setattr(access, "find_volume_key", find_volume_key)
    monkeypatch.setattr(luks.Container, "__init__", swap)
    with pytest.raises(Tampered, match="changed meanwhile"):
        rotate(host)
    monkeypatch.undo()
    assert not authentic(image, host.recovery) and not authentic(image, key_of(host))
    with luks.Container(str(image)) as container:
        for each in disk_keys.read_tokens(container, HOST):
            assert not disk_keys.is_authentic(container, each, host.persistence)


def null_cipher(fields: dict[str, Any]) -> None:
    fields["segments"]["0"]["encryption"] = "cipher_null-ecb"


def test_who_finishes_a_rotation_gets_its_key_wherever_they_ask_for_it(host: Host) -> None:
    certificate, private = organisation(host.folder)
    killed_before_the_first_keyslot(host, delivery.Keeper(file_of(host)))
    recovery_key.write_new_file(file_of(host, "another"), recovery_key.new())
    with pytest.raises(Usage, match="another key"):
        rotate(host, "another")
    escrow = Escrow(certificate, file_of(host, "e"))
    recovery.rotate_recovery_key(host.paths, delivery.Keeper(file_of(host, "copy"), escrow), host.look)
    assert key_of(host, "copy") == key_of(host) == Secret(decrypted(escrow.file, private))
    assert outcomes(host, key_of(host)) == ["ok"] * 3


@pytest.mark.parametrize("into", ["file", "escrow"])
def test_a_rotation_whose_key_went_with_the_power_does_not_end_without_it(host: Host, into: str) -> None:
    """It was on a file system in memory. The old key may go only when somebody has the new one."""
    certificate, private = organisation(host.folder)
    lost = Path(file_of(host))
    keep = delivery.Keeper(str(lost)) if into == "file" else delivery.Keeper(escrow=Escrow(certificate, str(lost)))
    killed_before_the_first_keyslot(host, keep)
    lost.unlink()
    with pytest.raises(Refused) as caught:
        recovery.rotate_recovery_key(host.paths, delivery.Keeper(), host.look)
    assert caught.value.code == "recovery-key-gone"
    assert outcomes(host, host.recovery) == ["ok"] * 3
    recovery.rotate_recovery_key(host.paths, keep, host.look)
    new = key_of(host) if into == "file" else Secret(decrypted(str(lost), private))
    assert outcomes(host, new) == ["ok"] * 3


def test_without_options_a_rotation_ends_that_left_its_key_where_it_is(host: Host) -> None:
    killed_before_the_first_keyslot(host, delivery.Keeper(file_of(host)))
    recovery.rotate_recovery_key(host.paths, delivery.Keeper(), host.look)
    assert outcomes(host, key_of(host)) == ["ok"] * 3


def test_a_key_that_cannot_be_handed_out_leaves_nothing_under_way(host: Host) -> None:
    for keep in (
        delivery.Keeper(str(host.folder / "none" / "key")),
        delivery.Keeper(str(host.folder / "data-0" / "key")),
    ):
        with pytest.raises((OSError, UnlockError)):
            recovery.rotate_recovery_key(host.paths, keep, host.look)
        assert host.state.journal is None
    assert outcomes(host, host.recovery) == ["ok"] * 3


def test_status_tells_what_is_under_way_and_no_key_not_even_a_wrapped_one(host: Host) -> None:
    killed_before_the_first_keyslot(host, delivery.Keeper(file_of(host)))
    assert isinstance(host.state.journal, RecoveryRotation) and host.state.journal.key
    assert status.read_status(host.paths).unfinished == {"operation": "recovery", "about": "rotate"}


def test_without_a_disk_nothing_is_rotated(host: Host) -> None:
    host.disks.clear()
    with pytest.raises(Refused, match="no disk"):
        rotate(host)
    assert not Path(file_of(host)).exists()


def test_a_rotation_that_one_disk_cannot_take_is_undone(host: Host) -> None:
    """The header of the last disk is full."""
    with luks.Container(str(host.disks[2])) as container, Secret(host.deks[container.uuid]) as dek:
        number = 0
        with pytest.raises(UnlockError):
            while number := number + 1:
                container.add_keyslot(dek, passphrase=Secret(b"more %d" % number))
    with pytest.raises(UnlockError):
        rotate(host)
    assert host.state.journal is None
    assert outcomes(host, host.recovery) == ["ok"] * 3
    new = key_of(host)
    assert all(not opens_with_cryptsetup(image, new) for image in host.disks)
    assert [len(host.tokens(image)) for image in host.disks] == [1, 1, 1]
    assert host.boot_opens()


def test_a_disk_that_lost_its_token_stops_a_rotation_by_name_and_nothing_is_left_under_way(host: Host) -> None:
    with luks.Container(str(host.disks[1])) as container:
        for number, _ in container.tokens("unlock"):
            container.remove_token(number)
    with pytest.raises(NotOurs, match="data-1: it has no unlock token"):
        rotate(host)
    assert host.state.journal is None
    assert outcomes(host, host.recovery) == ["ok", "altered", "ok"]
    assert [slots(image) for image in host.disks] == [1, 1, 1]


def test_a_rotation_into_escrow_alone(host: Host) -> None:
    certificate, private = organisation(host.folder)
    escrow = Escrow(certificate, file_of(host, "escrow.pem"))
    recovery.rotate_recovery_key(host.paths, delivery.Keeper(escrow=escrow), host.look)
    assert outcomes(host, Secret(decrypted(escrow.file, private))) == ["ok"] * 3


def test_a_group_whose_key_only_the_provider_keeps(tmp_path: Path) -> None:
    host = Host(tmp_path, 2, policy_of_group="provider")
    look_at(host, host.recovery)
    rotate(host)
    assert outcomes(host, key_of(host)) == ["ok"] * 2
    keyring.flush()


def test_without_the_key_cache_it_says_so_and_begins_nothing(host: Host) -> None:
    keyring.flush()
    with pytest.raises(UnlockError) as caught:
        rotate(host)
    assert caught.value.code == "no-key"
    assert not Path(file_of(host)).exists()


# Killed


class Start:
    """The same start each time."""

    def __init__(self, host: Host) -> None:
        self.host = host
        self._images = {image: image.read_bytes()[: 1 << 20] for image in host.disks}
        self._state = Path(host.paths.state).read_bytes()

    def again(self, keep: bool = False) -> None:
        """`keep`: the file with the key."""
        for image, content in self._images.items():
            with image.open("r+b") as file:
                file.write(content)
        Path(self.host.paths.state).write_bytes(self._state)
        if not keep:
            Path(file_of(self.host)).unlink(missing_ok=True)


def step(host: Host) -> str:
    """How far a rotation came."""
    journal = host.state.journal
    if journal is None:
        return "done" if host.state.recovery.tested == {} else "nothing"
    counts = tuple((slots(image), len(host.tokens(image))) for image in host.disks)
    return f"{'new' if isinstance(journal, RecoveryRotation) and journal.written else 'old'} counts {counts}"


@pytest.mark.turns
def test_killed_at_every_boundary_each_disk_opens_and_the_same_command_finishes(host: Host, killer: Killer) -> None:
    """With one disk away."""
    away = host.disks.pop()
    start = Start(host)
    seen: Counter[str] = Counter()

    def begin(_: int) -> Callable[[], object]:
        start.again()
        return partial(rotate, host)

    for attempt, _ in killer(begin):
        at = step(host)
        seen[at] += 1
        keys = [host.recovery] + ([key_of(host)] if Path(file_of(host)).exists() else [])
        journal = host.state.journal
        written = isinstance(journal, RecoveryRotation) and journal.written
        valid = keys[-1] if written or at == "done" else host.recovery
        assert all(authentic(image, valid) for image in host.disks), f"attempt {attempt}, {at}"
        assert all(opens_with_cryptsetup(image, valid) for image in host.disks)
        assert authentic(away, host.recovery)
        assert host.boot_opens()
        assert "altered" not in outcomes(host, host.recovery), "an earlier key is a wrong key, not a sign of a thief"
        if at != "done":
            rotate(host)
        assert host.state.journal is None
        assert outcomes(host, key_of(host)) == ["ok", "ok", "absent"]
        assert [(slots(image), len(host.tokens(image))) for image in host.disks] == [(1, 1)] * 2
    print("\n" + "\n".join(f"{count:4} {at}" for at, count in seen.items()))
    wanted = {
        "nothing",
        "old counts ((1, 1), (1, 1))",
        "old counts ((2, 1), (1, 1))",
        "old counts ((2, 2), (1, 1))",
        "old counts ((2, 2), (2, 2))",
        "new counts ((2, 2), (2, 2))",
        "new counts ((1, 2), (2, 2))",
        "new counts ((1, 1), (2, 2))",
        "new counts ((1, 1), (1, 1))",
        "done",
    }
    assert wanted <= seen.keys()


def test_killed_and_the_disks_that_are_here_have_changed_meanwhile(host: Host) -> None:
    """One that took part is away when it is run again, one that was away is back: nobody is left with the old key."""
    third = host.disks.pop()
    number = 1
    while "new counts" not in step(host):
        number += 1
        assert killed_at(number, lambda: rotate(host), LASTING)
    first = host.disks.pop(0)
    host.disks.append(third)
    assert rotate(host) == (("data-1", "data-2"), ("data-0",))
    new = key_of(host)
    assert authentic(first, new)
    host.disks.append(first)
    assert recovery.renew_keyslots(host.paths, new, host.look).behind == ()
    assert outcomes(host, new) == ["ok"] * 3
    assert all((slots(image), len(host.tokens(image))) == (1, 1) for image in host.disks)


@pytest.mark.turns
def test_a_rotation_into_escrow_alone_killed_at_every_boundary_is_finished_by_the_same_command(
    host: Host, killer: Killer
) -> None:
    certificate, private = organisation(host.folder)
    escrow = Escrow(certificate, file_of(host, "escrow.pem"))
    start = Start(host)

    def rotate() -> recovery.Changed:
        return recovery.rotate_recovery_key(host.paths, delivery.Keeper(escrow=escrow), host.look)

    def begin(_: int) -> Callable[[], object]:
        start.again()
        Path(escrow.file).unlink(missing_ok=True)
        return rotate

    for attempt, _ in killer(begin):
        keys = [host.recovery]
        if Path(escrow.file).exists():
            keys.append(Secret(decrypted(escrow.file, private)))
        assert all(any(authentic(image, key) for key in keys) for image in host.disks), f"attempt {attempt}"
        if step(host) != "done":
            rotate()
        assert outcomes(host, Secret(decrypted(escrow.file, private))) == ["ok"] * 3, f"attempt {attempt}"


@pytest.mark.turns
def test_new_killed_at_every_boundary_finishes(host: Host, killer: Killer) -> None:
    """On a disk that was away."""
    away = host.disks.pop()
    rotate(host)
    host.disks.append(away)
    new = key_of(host)
    start = Start(host)

    def begin(_: int) -> Callable[[], object]:
        start.again(keep=True)
        return partial(recovery.renew_keyslots, host.paths, new, host.look)

    for attempt, _ in killer(begin):
        assert authentic(away, host.recovery) or authentic(away, new), f"attempt {attempt}"
        assert host.boot_opens()
        recovery.renew_keyslots(host.paths, new, host.look)
        assert (slots(away), len(host.tokens(away))) == (1, 1)
        assert authentic(away, new)
        assert host.state.journal is None and not host.state.recovery.behind and not host.state.recovery.former


def test_a_disk_that_udev_shows_and_cannot_be_read_is_away(host: Host) -> None:
    host.disks[0].write_bytes(bytes(1 << 20))
    assert find.find_node(host.look(), host.group.members[0]) == ""
    assert rotate(host).behind == ("data-0",)


# A state that is not as the disks are


@pytest.mark.root
@pytest.mark.parametrize(("fault", "why"), [("full", "No space left"), ("ro", "Read-only file system")])
def test_the_answer_of_a_test_does_not_need_room_on_the_disk(
    host: Host, capfd: pytest.CaptureFixture[str], fault: str, why: str
) -> None:
    folder = os.path.dirname(host.paths.state)
    state = Path(host.paths.state).read_bytes()

    def work() -> None:
        assert ctypes.CDLL(None).unshare(0x20000) == 0  # CLONE_NEWNS
        for command in (["--make-rprivate", "/"], ["-t", "tmpfs", "-o", "size=64k", "none", folder]):
            subprocess.run(["mount", *command], check=True)
        Path(host.paths.state).write_bytes(state)
        if fault == "ro":
            subprocess.run(["mount", "-o", "remount,ro", folder], check=True)
        else:
            with pytest.raises(OSError, match="No space left"), open(f"{folder}/rest", "wb", buffering=0) as rest:
                while rest.write(bytes(4096)):
                    pass
        assert outcomes(host, host.recovery) == ["ok"] * 3
        assert outcomes(host, recovery_key.new()) == ["wrong-key"] * 3

    capfd.readouterr()
    assert child(work) == 0
    heard = capfd.readouterr().err
    assert heard.count(f"the test is not recorded: {host.paths.state} cannot be written: {why}") == 2


def test_a_root_from_before_a_rotation_takes_the_key_of_the_disks(host: Host) -> None:
    old = Path(host.paths.state).read_bytes()
    rotate(host)
    new = key_of(host)
    Path(host.paths.state).write_bytes(old)
    with pytest.raises(Refused, match="not the recovery key"):
        recovery.renew_keyslots(host.paths, recovery_key.new(), host.look)
    assert Path(host.paths.state).read_bytes() == old
    assert len(recovery.renew_keyslots(host.paths, new, host.look).done) == 3
    assert outcomes(host, new) == ["ok"] * 3
    host.recovery = new
    assert host.recovery_opens() and host.boot_opens()
    assert all(slots(image) == 1 for image in host.disks)
    rotate(host, "third")
    assert outcomes(host, key_of(host, "third")) == ["ok"] * 3


def test_a_disk_from_before_a_rotation_does_not_bring_its_key_back(host: Host) -> None:
    """One that was away, which the state knows; and one whose header was brought back, which it does not."""
    away = host.disks.pop()
    header = host.disks[0].read_bytes()[: 16 << 20]
    rotate(host)
    host.disks, present = [away], host.disks
    with pytest.raises(Refused, match="not the recovery key"):
        recovery.renew_keyslots(host.paths, host.recovery, host.look)
    with present[0].open("r+b") as file:
        file.write(header)
    host.disks = present
    with pytest.raises(Refused, match="not the recovery key"):
        recovery.renew_keyslots(host.paths, host.recovery, host.look)
