# SPDX-License-Identifier: Apache-2.0
"""A policy that narrows makes a new persistence key: an earlier copy of a header does not undo it. Killed, cut off,
with disks that are away. A software TPM, real headers, a scripted key manager."""

import random
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

import pytest

from tests.eventlogs import Boot
from tests.flowfixture import Host
from tests.hostfixture import Machine
from tests.killing import Killer, commit, killed_at
from tests.kmipfixture import AUTHORITY, CLIENT
from tests.lab.kmipliar import COMPROMISED, Liar
from unlock.boot import gate
from unlock.disks import disk_keys, luks
from unlock.errors import DiskFailed, NoKey, Refused, UnlockError
from unlock.host import config, keyring
from unlock.host.journal import NewPersistenceKey
from unlock.keys import access, delivery
from unlock.operations import (
    native_backup,
    new_persistence_key,
    persistence,
    policy,
    provider,
    rebind,
    recovery,
    rekey,
    status,
    switch,
    sync,
)
from unlock.predict import allowed_states, trusted_files
from unlock.predict.allowed_states import Pin
from unlock.secret import Secret
from unlock.tpm import chip, slots
from unlock.tpm.record import Needs

pytestmark = pytest.mark.usefixtures("key_cache")

BOOT = Boot("direct")
PIN = "correct horse"
REBIND = rebind.RebindChoices(Secret(b""), accept=frozenset(("unauthenticated-root",)))
REBIND_STEPS = (luks.Container.set_token, chip.Tpm.write_record, luks.Container.remove_token)
TRUSTED = trusted_files.TrustedFiles({"boot/vmlinuz": bytes(32)}, {})


@pytest.fixture
def host(tmp_path: Path) -> Iterator[Machine]:
    machine = Machine(tmp_path, BOOT, disks=2)
    trusted_files.save_trusted_files(machine.paths, TRUSTED)
    yield machine
    machine.close()


@pytest.fixture
def managed(tmp_path: Path, kms: Liar) -> Iterator[Machine]:
    machine = Machine(tmp_path, BOOT, (), 2, kms)
    yield machine
    machine.close()


def headers(host: Host) -> dict[Path, bytes]:
    return {image: image.read_bytes()[: 16 << 20] for image in host.disks}


def put_back(copies: dict[Path, bytes]) -> None:
    for image, content in copies.items():
        with image.open("r+b") as file:
            file.write(content)


def boots(host: Machine, boot: Boot | None = None) -> None:
    """The TPM gives one key; the fixture takes it for what opens disks."""
    assert host.boot(boot) == "unsealed"
    host.persistence = keyring.get("unlock:persistence")


def is_whole(host: Machine) -> None:
    boots(host)
    state = host.state
    state.prove(host.persistence)
    assert state.journal is None and not new_persistence_key.is_due(state)
    assert host.boot_opens() and host.recovery_opens()
    assert all(len(host.tokens(image)) == 1 for image in host.disks)
    if Path(host.paths.boot_files).exists():  # what vouches for /boot has come along
        assert trusted_files.load_trusted_files(host.paths) == TRUSTED


def replace(host: Machine) -> new_persistence_key.Replaced:
    return new_persistence_key.replace(host.paths, host.chip.tcti, look=host.look)


def run_sync(host: Machine) -> dict[str, str]:
    return {each.key: each.outcome for each in sync.sync(host.paths, host.look, tcti=host.chip.tcti)}


# Each narrowing


def set_pin(host: Machine, pin: str = PIN) -> None:
    host.types = [pin]
    policy.set_policy(host.paths, (), Pin(Secret(pin.encode())), host.chip.tcti, look=host.look)


def change_pin(host: Machine) -> None:
    set_pin(host, "another PIN")


def choose_pcrs(host: Machine) -> None:
    policy.set_policy(host.paths, (4, 7, 9, 14), None, host.chip.tcti, look=host.look)


def close_by_hand(host: Machine) -> None:
    policy.close_window(host.paths, host.chip.tcti, look=host.look)


def close_by_itself(host: Machine) -> None:
    assert host.boot() == "unsealed"
    policy.good_boot(host.paths, host.chip.tcti, host.look)
    assert host.state.tpm.window is None


def rekey_fresh(host: Machine) -> None:
    replace(host)
    rekey.rekey(host.paths, "data", host.look)


def rotate_leaked(host: Machine) -> None:
    recovery.test_recovery_key(host.paths, host.recovery, host.look)
    keep = delivery.Keeper(str(host.folder / "new-key"))
    recovery.rotate_recovery_key(host.paths, keep, host.look, leaked=True, tcti=host.chip.tcti)
    host.recovery = delivery.read_recovery_key(str(host.folder / "new-key"))


def nothing(_host: Machine) -> None:
    pass


def open_window(host: Machine) -> None:
    policy.open_window(host.paths, 1, (), host.chip.tcti)


NARROWINGS: dict[str, tuple[Callable[[Machine], None], Callable[[Machine], None]]] = {
    "a PIN": (nothing, set_pin),
    "another PIN": (set_pin, change_pin),
    "other PCRs": (nothing, choose_pcrs),
    "a window closed by hand": (open_window, close_by_hand),
    "a window closed by itself": (open_window, close_by_itself),
    "a leaked recovery key": (nothing, rotate_leaked),
    "rekey --fresh": (nothing, rekey_fresh),
}


def disable(host: Machine) -> None:
    persistence.disable(host.paths, host.look, host.chip.tcti)


def use_policy_provider(host: Machine, kms: Liar) -> None:
    host.configure(kms, more='[group.data]\npolicy = "provider"\n')
    assert run_sync(host)["data"] == "provider"


def drop(host: Machine, kms: Liar) -> None:
    host.configure(kms, more='[sync]\ndrop_on = ["compromised"]\n')
    kms.keys[host.group.kek.rpartition("/")[2]].state = COMPROMISED
    assert run_sync(host)["data"] == "dropped"


def switch_without_keeping(host: Machine, _kms: Liar) -> None:
    with Liar(AUTHORITY) as other:
        settings = config.ProviderConfig("second", (f"127.0.0.1:{other.port}",), host.ca(), "", config.TIMEOUT)
        client = provider.Client(CLIENT.certificate, Secret(CLIENT.key))
        provider.add_provider(host.paths, settings, client, host.look)
        switch.switch(host.paths, "second", False, host.look, host.chip.tcti)


KEPT_NO_MORE: dict[str, Callable[[Machine, Liar], None]] = {
    "persistence disable": lambda host, _kms: disable(host),
    "policy provider": use_policy_provider,
    "drop_on": drop,
    "another provider, nothing kept": switch_without_keeping,
}


@pytest.mark.parametrize("what", NARROWINGS)
def test_an_earlier_header_opens_nothing_once_the_policy_is_narrower(host: Machine, what: str) -> None:
    before, narrow = NARROWINGS[what]
    before(host)
    first, copies = bytes(keyring.get("unlock:persistence")), headers(host)
    narrow(host)
    is_whole(host)
    assert bytes(host.persistence) != first
    now = headers(host)
    put_back(copies)
    assert not any(host.opens(image) for image in host.disks)
    assert run_sync(host)["data"] == "unchanged"
    assert not any(host.opens(image) for image in host.disks), "nor does a sync bring it on"
    put_back(now)
    is_whole(host)


@pytest.mark.parametrize("what", NARROWINGS)
def test_under_the_same_key_it_would(host: Machine, monkeypatch: pytest.MonkeyPatch, what: str) -> None:
    before, narrow = NARROWINGS[what]
    before(host)
    copies = headers(host)
    monkeypatch.setattr(new_persistence_key, "replace_if_due", lambda *_, **__: None)
    monkeypatch.setattr(new_persistence_key, "replace", lambda *_, **__: None)
    narrow(host)
    put_back(copies)
    boots(host)
    assert host.boot_opens()


@pytest.mark.parametrize("what", KEPT_NO_MORE)
def test_an_earlier_header_brings_no_key_back_that_is_not_kept_any_more(managed: Machine, kms: Liar, what: str) -> None:
    copies = headers(managed)
    KEPT_NO_MORE[what](managed, kms)
    boots(managed)
    assert managed.state.journal is None and not new_persistence_key.is_due(managed.state)
    assert not any(managed.opens(image) for image in managed.disks)
    put_back(copies)
    assert not any(managed.opens(image) for image in managed.disks)
    assert managed.recovery_opens()


@pytest.mark.parametrize("what", KEPT_NO_MORE)
def test_under_the_same_key_it_would_bring_it_back(
    managed: Machine, kms: Liar, monkeypatch: pytest.MonkeyPatch, what: str
) -> None:
    copies = headers(managed)
    monkeypatch.setattr(new_persistence_key, "replace_if_due", lambda *_, **__: None)
    KEPT_NO_MORE[what](managed, kms)
    boots(managed)
    assert not any(managed.opens(image) for image in managed.disks)
    put_back(copies)
    assert managed.boot_opens()


def test_a_plain_rekey_leaves_the_key_and_says_nothing_else(host: Machine) -> None:
    """What README says of it: an earlier header still opens in a boot that the TPM allows."""
    copies = headers(host)
    rekey.rekey(host.paths, "data", host.look)
    put_back(copies)
    boots(host)
    assert host.boot_opens()


def test_widening_keeps_the_key(host: Machine) -> None:
    set_pin(host)
    first = bytes(keyring.get("unlock:persistence"))
    policy.set_policy(host.paths, (), Pin(None), host.chip.tcti, look=host.look)
    open_window(host)
    assert not new_persistence_key.is_due(host.state)
    assert bytes(keyring.get("unlock:persistence")) == first


def test_a_group_that_only_the_key_manager_opens_needs_none_for_it(managed: Machine, kms: Liar) -> None:
    use_policy_provider(managed, kms)
    first = bytes(keyring.get("unlock:persistence"))
    kms.stop()
    replace(managed)
    kms.start()
    boots(managed)
    assert bytes(managed.persistence) != first
    for image in managed.disks:
        with (
            luks.Container(str(image)) as container,
            managed.work() as work,
            access.find_volume_key(work, container, managed.group) as dek,
        ):
            assert bytes(dek) == managed.deks[container.uuid]
    assert run_sync(managed)["data"] in ("cached", "unchanged")


def test_what_the_root_needs_is_sealed_with_the_new_key(host: Machine, monkeypatch: pytest.MonkeyPatch) -> None:
    needs = Needs.of(["data-0"])
    monkeypatch.setattr(allowed_states, "needs_of_root", lambda _: needs)
    replace(host)
    assert host.allows().record.needs == needs
    host.chip.power_cycle()
    host.extend([(entry.pcr, entry.sha256) for entry in BOOT.entries()])
    with host.chip.open() as tpm:
        assert slots.unseal(tpm).payload.needs == needs


# Disks that are away


def test_a_disk_that_was_away_is_brought_on_when_it_is_back(host: Machine) -> None:
    away = host.disks.pop()
    set_pin(host)
    is_whole(host)
    assert host.state.has_old_keys and list(host.group.behind)
    host.disks.append(away)
    assert not host.opens(away)
    run_sync(host)
    assert host.state.has_old_keys is False and not host.group.behind
    is_whole(host)


def test_away_while_there_were_three_and_a_rekey(host: Machine) -> None:
    away = host.disks.pop()
    for _ in range(3):
        replace(host)
        rekey.rekey(host.paths, "data", host.look)
    host.disks.append(away)
    boots(host)
    run_sync(host)
    is_whole(host)
    assert not host.state.has_old_keys


def test_a_group_that_was_wholly_away_needs_no_key_manager_to_come_back(managed: Machine, kms: Liar) -> None:
    away, managed.disks = managed.disks, []
    replace(managed)
    kms.stop()
    managed.disks = away
    boots(managed)
    assert not any(managed.opens(image) for image in managed.disks)
    with pytest.raises(UnlockError):
        run_sync(managed)
    is_whole(managed)
    kms.start()


def test_a_gate_brings_on_what_is_back_and_nothing_else(host: Machine, capfd: pytest.CaptureFixture[str]) -> None:
    copies = headers(host)
    away = host.disks.pop()
    replace(host)
    boots(host)
    put_back({image: content for image, content in copies.items() if image != away})
    host.disks.append(away)
    gate._bring_on_disks_that_were_away(host.paths, host.look)
    assert host.opens(away)
    assert not host.opens(host.disks[0]), "the old key is for the disk that was away alone"
    gate._bring_on_disks_that_were_away(host.paths, host.look)
    assert not capfd.readouterr().err


def test_while_the_old_key_is_kept_an_old_header_of_another_disk_opens_nothing(host: Machine) -> None:
    copies = headers(host)
    away = host.disks.pop()
    replace(host)
    assert host.state.has_old_keys
    put_back({host.disks[0]: copies[host.disks[0]]})
    boots(host)
    run_sync(host)
    assert not host.opens(host.disks[0])
    with host.work() as work, luks.Container(str(host.disks[0])) as container:
        assert len(work.persistence_keys(container.uuid)) == 1
    host.disks.append(away)


def test_a_kek_is_not_kept_by_a_disk_that_comes_back_to_a_group_of_the_key_manager(managed: Machine, kms: Liar) -> None:
    away = managed.disks.pop()
    use_policy_provider(managed, kms)
    managed.disks.append(away)
    boots(managed)
    assert not managed.opens(away)
    run_sync(managed)
    boots(managed)
    assert not managed.opens(away)
    with luks.Container(str(away)) as container:
        assert disk_keys.read_tokens(container, managed.state.host)
    assert not managed.state.has_old_keys


# Killed, cut off, refused

LONG = pytest.mark.long(minutes=0.5)
KILLED: dict[str, Callable[[Machine], object]] = {
    "rekey --fresh": replace,
    "policy set --pin": set_pin,
    "policy close": close_by_hand,
    "the end of a window": lambda host: policy.good_boot(host.paths, host.chip.tcti, host.look),
}


@pytest.mark.turns
@pytest.mark.parametrize("what", KILLED)
@pytest.mark.parametrize(
    "power",
    [(True, False), pytest.param((True,), marks=LONG), pytest.param((False,), marks=LONG)],
    ids=["by turns", "with a boot", "without"],
)
def test_killed_anywhere_every_disk_opens_at_the_next_boot_and_the_same_command_finishes(
    host: Machine, killer: Killer, what: str, power: tuple[bool, ...]
) -> None:
    """A boot comes between the kill and the same command, or none: by turns, the other way round for another commit."""
    first = random.Random(commit()).randrange(len(power))
    away = host.disks.pop()
    steps = 0

    def begin(_: int) -> Callable[[], object]:
        if "window" in what or "close" in what:
            open_window(host)
            boots(host)
        return partial(KILLED[what], host)

    host.types = [PIN]
    for attempt, killed in killer(begin):
        host.chip.set_lockout(32)  # it counts a power cut after a PIN as a wrong one
        if power[(first + attempt) % len(power)]:
            boots(host)
            assert host.boot_opens() and host.recovery_opens()
            assert trusted_files.load_trusted_files(host.paths) == TRUSTED
        steps += host.state.journal is not None
        if killed:
            KILLED[what](host)
        is_whole(host)
    assert steps > 5
    host.disks.append(away)
    close_by_hand(host)
    boots(host)
    run_sync(host)
    is_whole(host)


@pytest.mark.turns
def test_persistence_disable_killed_anywhere_is_finished_by_itself_or_the_same_command(
    managed: Machine, killer: Killer
) -> None:
    """By turns, the other way round for another commit."""
    first = random.Random(commit()).randrange(2)

    def begin(_: int) -> Callable[[], object]:
        persistence.enable(managed.paths, managed.look, managed.chip.tcti)
        return partial(disable, managed)

    for attempt, _ in killer(begin):
        boots(managed)
        assert managed.recovery_opens()
        if (first + attempt) % 2:
            disable(managed)
        else:
            policy.good_boot(managed.paths, managed.chip.tcti, managed.look)
            if managed.state.journal:
                disable(managed)
        boots(managed)
        state = managed.state
        state.prove(managed.persistence)
        assert state.journal is None and not new_persistence_key.is_due(state)
        assert all(len(managed.tokens(image)) == 1 for image in managed.disks)


@pytest.mark.turns
def test_the_line_to_the_tpm_cut_at_every_command(host: Machine) -> None:
    for count in range(60):
        host.chip.proxy.cut_after(count)
        try:
            replace(host)
            break
        except UnlockError:
            pass
        finally:
            host.chip.proxy.restore()
        host.chip.power_cycle()
        boots(host)
        assert host.boot_opens() and host.recovery_opens()
        replace(host)
        is_whole(host)
    assert count > 20


def test_while_it_is_unfinished_the_rest_of_the_host_goes_on(host: Machine) -> None:
    """Predictions, syncs and status work by either key; no disk loses one of its two tokens."""
    number = 1
    seen = set()
    while killed_at(number, partial(replace, host), KILLS):
        boots(host)
        journal = host.state.journal
        if isinstance(journal, NewPersistenceKey):
            seen.add((journal.sealed, bytes(keyring.get("unlock:persistence"))))
            host.predict((f"kernel {number}", Boot("direct", kernel=f"kernel {number}")))
            with pytest.raises(Refused) as caught:
                rekey.rekey(host.paths, "data", host.look)
            assert caught.value.code == "unfinished" and "rekey --fresh" in str(caught.value)
            assert status.to_text(status.read_status(host.paths))
        boots(host)
        assert host.boot_opens()
        assert run_sync(host)["data"] == "unchanged"
        is_whole(host)
        number += 1
    assert {sealed for sealed, _ in seen} == {True, False}


KILLS = (luks.Container.set_token, luks.Container.remove_token, keyring.put)


def test_a_disk_that_does_not_take_the_token_keeps_the_old_key_for_all(
    host: Machine, monkeypatch: pytest.MonkeyPatch
) -> None:
    first, copies = bytes(host.persistence), headers(host)
    set_token = luks.Container.set_token

    def fails(container: luks.Container, *arguments: object) -> int:
        if container.device == str(host.disks[1]):
            raise DiskFailed("it is write-protected")
        return set_token(container, *arguments)  # type: ignore[arg-type]

    with monkeypatch.context() as patch:
        patch.setattr(luks.Container, "set_token", fails)
        with pytest.raises(DiskFailed) as caught:
            set_pin(host)
    assert "a PIN was set" in str(caught.value) and caught.value.hint
    assert host.state.narrowed and host.state.journal is None
    assert "a PIN was set" in status.to_text(status.read_status(host.paths))
    boots(host)
    assert bytes(host.persistence) == first and host.boot_opens()
    assert all(len(host.tokens(image)) == 1 for image in host.disks)
    policy.good_boot(host.paths, host.chip.tcti, host.look)
    is_whole(host)
    put_back(copies)
    assert not any(host.opens(image) for image in host.disks)


def test_a_header_that_does_not_open_holds_up_nothing(host: Machine) -> None:
    with luks.Container(str(host.disks[1])) as container:
        ((number, fields),) = container.tokens("unlock")
        container.remove_token(number)
        container.set_token({**fields, "name": "root"})
    found = replace(host)
    assert found.done == ("data-0",) and "data-1" in found.behind
    boots(host)
    assert host.opens(host.disks[0]) and not host.opens(host.disks[1])


def test_the_owners_password_is_asked_for_before_anything_is_written(host: Machine) -> None:
    first = headers(host)
    host.chip.set_owner_auth(Secret(b"owner"))
    with pytest.raises(Refused) as caught:
        replace(host)
    assert caught.value.code == "owner-auth-set" and headers(host) == first and host.state.journal is None
    new_persistence_key.replace(host.paths, host.chip.tcti, Secret(b"owner"), host.look)
    is_whole(host)


def test_without_the_key_at_hand_nothing_is_replaced(host: Machine) -> None:
    keyring.flush()
    with pytest.raises(NoKey):
        replace(host)
    assert host.state.journal is None
    host.clear()
    host.boot()
    with pytest.raises(Refused) as caught:
        replace(host)
    assert caught.value.code == "removed"


# What was under way goes on


def test_a_rotation_of_the_recovery_key_goes_on(host: Machine) -> None:
    recovery.test_recovery_key(host.paths, host.recovery, host.look)
    keep = delivery.Keeper(str(host.folder / "new-key"))
    rotate = partial(recovery.rotate_recovery_key, host.paths, keep, host.look)
    assert killed_at(3, rotate, [luks.Container.add_keyslot])
    replace(host)
    assert host.state.journal
    assert len(rotate().done) == 2
    host.recovery = delivery.read_recovery_key(str(host.folder / "new-key"))
    is_whole(host)


def test_a_rekey_goes_on(host: Machine) -> None:
    again = partial(rekey.rekey, host.paths, "data", host.look)
    assert killed_at(2, again, [luks.Container.set_token])
    replace(host)
    boots(host)
    assert host.boot_opens()
    again()
    is_whole(host)
    assert host.group.generation == 2


def test_a_policy_that_narrows_after_a_killed_replacement_gets_a_key_of_its_own(host: Machine) -> None:
    """The key of the killed run may be in a recording from before."""
    assert killed_at(3, partial(replace, host), [luks.Container.remove_token])
    boots(host)
    recorded, copies = bytes(keyring.get("unlock:persistence")), headers(host)
    set_pin(host)
    is_whole(host)
    assert bytes(host.persistence) != recorded
    put_back(copies)
    assert not any(host.opens(image) for image in host.disks)


@pytest.mark.turns
@pytest.mark.timeout(900)
def test_a_leaked_recovery_key_is_rotated_by_the_same_command_killed_anywhere(host: Machine, killer: Killer) -> None:
    recovery.test_recovery_key(host.paths, host.recovery, host.look)

    def rotate(attempt: int) -> None:
        keep = delivery.Keeper(str(host.folder / f"key-{attempt}"))
        recovery.rotate_recovery_key(host.paths, keep, host.look, leaked=True, tcti=host.chip.tcti)

    def begin(attempt: int) -> Callable[[], object]:
        known.append(bytes(keyring.get("unlock:persistence")))
        return partial(rotate, attempt)

    known: list[bytes] = []
    for attempt, killed in killer(begin):
        boots(host)
        assert host.boot_opens()
        file = host.folder / f"key-{attempt}"
        if killed and (host.state.journal or new_persistence_key.is_due(host.state) or not file.exists()):
            rotate(attempt)
        host.recovery = delivery.read_recovery_key(str(file))
        is_whole(host)
        assert bytes(host.persistence) != known[-1]


def test_a_leaked_recovery_key_that_was_rotated_is_not_in_another_place(host: Machine) -> None:
    recovery.test_recovery_key(host.paths, host.recovery, host.look)

    def rotate(name: str) -> recovery.Changed:
        keep = delivery.Keeper(str(host.folder / name))
        return recovery.rotate_recovery_key(host.paths, keep, host.look, leaked=True, tcti=host.chip.tcti)

    assert killed_at(1, partial(rotate, "new-key"), [chip.Tpm.write_record])
    with pytest.raises(Refused) as caught:
        rotate("elsewhere")
    assert caught.value.code == "unfinished" and not (host.folder / "elsewhere").exists()
    assert len(rotate("new-key").done) == 2
    host.recovery = delivery.read_recovery_key(str(host.folder / "new-key"))
    is_whole(host)


def test_a_provider_whose_key_was_lost_in_a_rebind_holds_up_no_replacement(host: Machine) -> None:
    with Secret(b"of the backup") as password:
        native_backup.backup(host.paths, str(host.folder / "backup"), password, look=host.look)
        state = host.state
        state.put_provider(
            state.native_entry(
                name="left",
                provider_id="native-" + "0" * 32,
                scope=state.host,
                persistence=host.persistence,
                kdk=Secret.random(32),
            )
        )
        state.save()
        host.clear()
        host.boot()
        choices = REBIND._replace(
            recovery=host.recovery, backup=str(host.folder / "backup"), password=password, tcti=host.chip.tcti
        )
        assert rebind.rebind(host.paths, choices, host.look).lost == ("left",)
    Path(host.paths.boot_files).unlink()  # the command begins another
    for narrow in (replace, set_pin):
        narrow(host)
        boots(host)
        assert host.state.journal is None and host.boot_opens() and host.recovery_opens()
        assert list(host.state.others) == ["left"]
    rekey.rekey(host.paths, "data", host.look)


CUTS: dict[str, tuple[int, Callable[..., object]]] = {
    "not sealed": (3, luks.Container.set_token),
    "sealed, and the journal does not know": (2, chip.Tpm.write_record),
    "sealed": (3, luks.Container.remove_token),
}


@pytest.mark.parametrize("cut", CUTS)
def test_a_rebind_takes_the_place_of_one_that_is_unfinished(host: Machine, cut: str) -> None:
    with Secret(b"of the backup") as password:
        native_backup.backup(host.paths, str(host.folder / "backup"), password, look=host.look)
    number, step = CUTS[cut]
    assert killed_at(number, partial(replace, host), [step])
    assert isinstance(journal := host.state.journal, NewPersistenceKey) and journal.sealed == (cut == "sealed")
    boots(host)
    again = partial(rebind.rebind, host.paths, REBIND._replace(recovery=host.recovery, tcti=host.chip.tcti), host.look)
    for step in REBIND_STEPS:
        assert killed_at(1, again, [step])
        boots(host)
        assert host.boot_opens() and host.recovery_opens(), step
    again()
    is_whole(host)
