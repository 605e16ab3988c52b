# SPDX-License-Identifier: Apache-2.0
"""`unlock sync`: what changed at the key manager reaches the disks; a key manager that is down, slow, lying or lagging
costs no key. Real headers, real KMIP over TLS; faults are the key manager's."""

import json
import os
import signal
import struct
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

import pytest

from tests.flowfixture import HOST, Host
from tests.killing import Killer, child
from tests.kmipfixture import AUTHORITY, CLIENT
from tests.lab.kmipliar import ACTIVE, COMPROMISED, DEACTIVATED, DESTROYED, Liar
from unlock.disks import disk_keys, luks
from unlock.disks.groups import Group, Member
from unlock.errors import ClockWrong, NoKey, ProviderError, Refused, UnlockError
from unlock.host import keyring, this_boot
from unlock.host.lock import exclusive
from unlock.keys import access, rotation
from unlock.operations import sync
from unlock.providers import native

pytestmark = pytest.mark.usefixtures("key_cache")


@pytest.fixture
def host(tmp_path: Path, kms: Liar) -> Iterator[Host]:
    yield Host(tmp_path, 2, kms)
    keyring.flush()


def run(host: Host, clock: Callable[[], bool] = lambda: False) -> dict[str, str]:
    """Key -> outcome."""
    return {each.key: each.outcome for each in sync.sync(host.paths, host.look, wait_for_clock=clock)}


def key_id(host: Host) -> str:
    return host.group.kek.rpartition("/")[2]


def content(host: Host) -> dict[str, bytes]:
    files = [Path(host.paths.state), Path(host.paths.config), *host.disks]
    return {str(path): path.read_bytes() for path in files}


def header_writes(image: Path) -> int:
    """LUKS2 counts them: seqid of the first header (on-disk format 1.1, 2.1)."""
    with image.open("rb") as file:
        file.seek(16)
        number: int = struct.unpack(">Q", file.read(8))[0]
    return number


# Nothing changed


def test_nothing_changed_is_one_request_for_50_keys_and_no_write(host: Host, kms: Liar) -> None:
    with host.work() as work:
        for number in range(48):
            name = f"g{number}"
            made = kms.add(f"unlock/{HOST}/kek/{name}/1")
            member = Member(f"00000000-0000-0000-0000-{number:012}", f"{name}-a", "")
            work.state.groups[name] = Group(name, f"kmip-one/{made.id}", 1, 1, (member,), made.names[0])
        work.state.save()
    for _ in range(2):
        before, traffic = content(host), kms.traffic()
        outcomes = run(host)
        assert set(outcomes.values()) == {"unchanged"}
        assert len(outcomes) == 50
        assert kms.traffic() - traffic == (1, 1)
        assert content(host) == before


def test_a_command_waits_for_the_sync_that_the_timer_has_started(host: Host, capfd: pytest.CaptureFixture[str]) -> None:
    """The second has the lock when the first has ended, and not before; a third that has no patience is refused."""
    go, ended = os.pipe(), host.folder / "ended"

    def first() -> None:
        with exclusive(host.paths):
            os.write(go[1], b"!")
            time.sleep(1)
            ended.touch()

    runner = threading.Thread(target=lambda: child(first))
    runner.start()
    os.read(go[0], 1)
    with pytest.raises(Refused, match="another unlock command"), exclusive(host.paths, 0):
        pass
    with exclusive(host.paths):
        assert ended.exists()
    runner.join()
    assert "waiting for another unlock command" in capfd.readouterr().err


def test_a_process_that_a_dead_disk_holds_does_not_keep_the_lock_of_its_command(host: Host) -> None:
    with exclusive(host.paths):
        pid = os.fork()
        if not pid:
            time.sleep(600)
    try:
        with exclusive(host.paths, 0):
            pass
    finally:
        os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)


@pytest.mark.usefixtures("unmeasured")
def test_sync_imports_nothing_that_speaks_with_a_tpm() -> None:
    code = "import sys, unlock.operations.sync; print(*sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert not {"unlock.tpm.chip", "unlock.tpm.slots", "tpm2_pytss"} & set(done.stdout.split())


def test_a_host_of_the_native_provider_syncs_without_a_server(tmp_path: Path) -> None:
    host = Host(tmp_path)
    before = content(host)
    assert run(host) == {"data": "unchanged", "host key": "unchanged"}
    assert content(host) == before
    keyring.flush()


# What changed reaches the disks


def test_a_rotated_kek_on_24_disks_is_3_requests_and_2_header_writes_a_disk(tmp_path: Path, kms: Liar) -> None:
    host = Host(tmp_path, 24, kms)
    kms.replace(kms.keys[key_id(host)])
    before, traffic = [header_writes(image) for image in host.disks], kms.traffic()
    assert run(host)["data"] == "replaced"
    assert kms.traffic() - traffic == (1, 3)
    assert [header_writes(image) - earlier for image, earlier in zip(host.disks, before, strict=True)] == [2] * 24
    assert all(host.tokens(image) == [(host.group.kek, 2)] for image in host.disks)
    assert host.boot_opens()
    assert host.recovery_opens()
    assert run(host)["data"] == "unchanged"
    keyring.flush()


def test_a_replaced_host_key_reaches_state_cache_and_tokens_and_the_former_one_is_kept(host: Host, kms: Liar) -> None:
    old = bytes(host.state.host_key(host.persistence) or b"")
    new = kms.replace(kms.keys[host.state.host_key_ref.id.rpartition("/")[2]])
    assert run(host)["host key"] == "replaced"
    assert bytes(keyring.get("unlock:host")) == new.material != old
    for image in host.disks:
        with luks.Container(str(image)) as container:
            (each,) = disk_keys.read_tokens(container, HOST)
        assert bytes(disk_keys.unwrap_host_key(each, host.persistence)) == new.material
    assert len(json.loads(Path(host.paths.state).read_text())["host_key"]["former"]) == 1
    assert host.boot_opens()
    assert run(host) == {"data": "unchanged", "host key": "unchanged"}


def test_a_disk_that_was_away_during_two_rotations_gets_the_kek_when_it_is_back_without_the_kms(
    host: Host, kms: Liar
) -> None:
    away = host.disks.pop()
    for _ in range(2):
        kms.replace(kms.keys[key_id(host)])
        assert run(host)["data"] == "replaced"
    kms.stop()
    host.disks.append(away)
    assert host.boot_opens(), "its old token opens it"
    with pytest.raises(ProviderError):
        run(host)
    assert host.tokens(away) == [(host.group.kek, 3)]
    assert not host.group.behind
    assert host.boot_opens()


def test_killed_anywhere_sync_finishes_when_it_runs_again(host: Host, kms: Liar, killer: Killer) -> None:
    def begin(_: int) -> Callable[[], object]:
        kms.replace(kms.keys[key_id(host)])
        return partial(run, host)

    for _ in killer(begin):
        assert host.boot_opens()
        assert host.recovery_opens()
        run(host)
        assert host.boot_opens()
        assert host.state.journal is None
        assert run(host)["data"] == "unchanged"
        assert all(host.tokens(image) == [(host.group.kek, host.group.generation)] for image in host.disks)
        assert key_id(host) == next(each.id for each in kms.keys.values() if each.names and "kek" in each.names[0])


# Key managers that lie, lag and die: nothing is lost, nothing is adopted


FAULTS = ["not found", "denied", "auth", "unsupported", "failure", "no message", "silent", "garbage", "truncated"]


@pytest.mark.parametrize("fault", FAULTS)
@pytest.mark.parametrize("changed", [False, True])
def test_a_kms_that_says_no_or_nothing_changes_nothing(host: Host, kms: Liar, fault: str, changed: bool) -> None:
    if changed:
        kms.replace(kms.keys[key_id(host)])
    before = content(host)
    cached = keyring.names()
    kms.lie(fault)
    for _ in range(2):
        try:
            assert "unchanged" not in run(host).values()
        except ProviderError:
            pass
        assert content(host) == before
        assert keyring.names() == cached
        assert host.boot_opens()
    record = this_boot.read_json(host.paths, "sync.json")
    assert all(each["outcome"] != "unchanged" and each["detail"] for each in record["keys"])
    kms.honest()
    assert run(host)["data"] == ("replaced" if changed else "unchanged")


def test_a_key_manager_that_is_off_costs_nothing(host: Host, kms: Liar) -> None:
    before = content(host)
    kms.stop()
    with pytest.raises(ProviderError):
        run(host)
    assert content(host) == before
    assert host.boot_opens()


@pytest.mark.parametrize("state", [DEACTIVATED, COMPROMISED, DESTROYED])
def test_a_blocked_key_is_reported_and_stays_in_use(host: Host, kms: Liar, state: int) -> None:
    kms.keys[key_id(host)].state = state
    before = content(host)
    assert run(host)["data"] == "state-blocked"
    assert content(host) == before
    assert host.boot_opens()


@pytest.mark.parametrize(
    "fault", ["wrong id", "wrong length", "zero key", "wrong type", "wrapped", "no bytes", "denied"]
)
def test_what_cannot_be_the_new_kek_is_not_adopted(host: Host, kms: Liar, fault: str) -> None:
    kms.replace(kms.keys[key_id(host)])
    before = content(host)
    kms.lie(fault, on="Get")
    assert run(host)["data"] != "replaced"
    assert {**content(host), host.paths.state: b""} == {**before, host.paths.state: b""}
    assert (host.group.generation, host.state.journal) == (1, None)
    assert host.boot_opens()
    kms.honest()
    assert run(host)["data"] == "replaced"
    assert host.boot_opens()


def test_the_endpoint_that_dies_between_resolve_and_fetch(host: Host, kms: Liar) -> None:
    kms.replace(kms.keys[key_id(host)])
    kms.lie("silent", on="Get")
    assert run(host)["data"] == "provider-unavailable"
    assert host.boot_opens()
    with kms.replica() as other:
        host.configure(kms, other)
        assert run(host)["data"] == "replaced", "the other endpoint has it"
    assert host.boot_opens()


def test_a_lagging_replica_does_not_roll_a_generation_back(host: Host, kms: Liar) -> None:
    with kms.replica() as lagging:
        kms.replace(kms.keys[key_id(host)])
        assert run(host)["data"] == "replaced"
        host.configure(lagging)
        before = content(host)
        assert run(host)["data"] != "replaced"
        assert content(host) == before
        assert host.boot_opens()


def test_a_server_that_offers_a_kek_that_was_left_behind_is_not_believed(host: Host, kms: Liar) -> None:
    """A restored backup of the key manager: the old key has the name again, and the new one is gone."""
    old = kms.keys[key_id(host)]
    new = kms.replace(old)
    run(host)
    before = content(host)
    new.state, new.links, new.names = DEACTIVATED, {0x106: old.id}, []
    old.state, old.links, old.names = ACTIVE, {0x107: new.id}, [host.group.kek_name]
    assert run(host)["data"] == "lagging"
    assert content(host) == before
    assert host.boot_opens()


def test_two_endpoints_that_disagree_on_who_replaces_a_key(host: Host, kms: Liar) -> None:
    with kms.replica() as other:
        kms.replace(kms.keys[key_id(host)])
        other.replace(other.keys[key_id(host)])
        host.configure(kms, other)
        run(host)
        kept = host.group.kek
        host.configure(other, kms)
        run(host)
        assert host.group.kek == kept, "what is adopted stays"
        assert host.boot_opens()


def test_a_wrong_key_for_a_known_id_is_not_cached(tmp_path: Path, kms: Liar) -> None:
    host = Host(tmp_path, 2, kms, policy_of_group="provider")
    kms.lie("other key", on="Get")
    assert run(host)["data"] == "integrity"
    assert not [name for name in keyring.names() if name.startswith("unlock:kek:")]
    kms.honest()
    assert run(host)["data"] == "cached"
    keyring.flush()


def test_a_wrong_key_at_one_endpoint_is_fetched_from_the_next(tmp_path: Path, kms: Liar) -> None:
    host = Host(tmp_path, 2, kms, policy_of_group="provider")
    with kms.replica() as other:
        kms.lie("other key", on="Get")
        host.configure(kms, other, more='[group.data]\npolicy = "provider"\n')
        assert run(host)["data"] == "cached"
    keyring.flush()


# This host's own troubles


def test_a_full_disk_under_the_state_leaves_everything_openable(host: Host, kms: Liar, tmp_path: Path) -> None:
    folder = os.path.dirname(host.paths.state)
    saved = Path(host.paths.state).read_bytes()
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=64k", "none", folder], check=True)
    try:
        Path(host.paths.state).write_bytes(saved)
        for number in range(1, 4):
            fill = Path(folder, "fill")
            kms.replace(kms.keys[key_id(host)])
            room = os.statvfs(folder).f_bavail * 4096
            fill.write_bytes(bytes(max(0, room - (number % 3) * 4096)))
            try:
                run(host)
            except OSError:
                pass
            assert host.boot_opens()
            fill.unlink()
            run(host)
            assert host.boot_opens()
            assert all(host.tokens(image) == [(host.group.kek, host.group.generation)] for image in host.disks)
    finally:
        subprocess.run(["umount", folder], check=True)


def test_a_disk_with_a_ruined_header_holds_up_no_other(host: Host, kms: Liar) -> None:
    kms.replace(kms.keys[key_id(host)])
    ruined = host.disks[0]
    saved = ruined.read_bytes()
    with ruined.open("r+b") as file:
        file.write(bytes(1 << 20))
    assert run(host)["data"] == "replaced"
    assert host.boot_opens(host.disks[1:])
    ruined.write_bytes(saved)
    assert host.boot_opens()
    assert run(host)["data"] == "caught-up" or not host.group.behind
    assert host.boot_opens()


def test_before_the_clock_is_set_sync_waits_and_then_goes_on(host: Host, kms: Liar) -> None:
    """The client certificate is valid from tomorrow on: the clock is behind. A test cannot set it, so that the time has
    come is shown by a certificate that is valid now."""
    host.use_client(AUTHORITY.client("host-1", days=(1, 365)))
    before = content(host)
    with pytest.raises(ClockWrong):
        run(host, lambda: False)
    assert content(host) == before
    waited = []

    def clock() -> bool:
        waited.append(host.boot_opens())
        host.use_client(CLIENT)
        return True

    assert run(host, clock)["data"] == "unchanged"
    assert waited == [True]


def test_after_a_boot_that_was_not_unsealed_sync_does_nothing_and_says_why(host: Host, kms: Liar) -> None:
    keyring.flush()
    before, traffic = content(host), kms.traffic()
    with pytest.raises(NoKey):
        run(host)
    assert content(host) == before
    assert kms.traffic() == traffic
    assert this_boot.read_json(host.paths, "sync.json")["keys"][0]["outcome"] == "no-key"


# The operator's revocation policy


@pytest.mark.parametrize("state", [COMPROMISED, DESTROYED])
def test_a_revoked_key_is_dropped_when_the_operator_said_so_and_only_then(host: Host, kms: Liar, state: int) -> None:
    host.configure(kms, more='[sync]\ndrop_on = ["compromised", "destroyed"]\n')
    kms.lie("not found")
    run(host)
    assert host.boot_opens(), "not found is no revocation"
    kms.honest()
    kms.keys[key_id(host)].state = state
    for _ in range(2):
        assert run(host)["data"] == "dropped"
        assert not any(host.opens(image) for image in host.disks)
        assert not [name for name in keyring.names() if name.startswith("unlock:kek:")]
    assert host.recovery_opens(), "the recovery key is not the key manager's"


# The policy `provider`


def test_a_kek_of_policy_provider_is_on_no_disk_and_opens_with_the_kms(tmp_path: Path, kms: Liar) -> None:
    host = Host(tmp_path, 2, kms, policy_of_group="provider")
    material = kms.keys[key_id(host)].material
    for image in host.disks:
        with luks.Container(str(image)) as container:
            (each,) = disk_keys.read_tokens(container, HOST)
            with pytest.raises(NoKey) as caught:
                disk_keys.unwrap_volume_key(container, each, host.persistence)
            assert caught.value.code == "provider"
    assert run(host)["data"] == "cached"
    assert run(host)["data"] == "unchanged"
    kms.replace(kms.keys[key_id(host)])
    assert run(host)["data"] == "replaced"
    with host.work() as work, access.find_kek(work, host.group)[0] as kek:
        assert bytes(kek) != material
        for image in host.disks:
            with luks.Container(str(image)) as container, access.find_volume_key(work, container, host.group) as dek:
                assert bytes(dek) == host.deks[container.uuid]
    keyring.flush()


def test_the_operator_turns_a_group_to_policy_provider_and_back(host: Host, kms: Liar) -> None:
    host.configure(kms, more='[group.data]\npolicy = "provider"\n')
    assert run(host)["data"] == "provider"
    assert not any(host.opens(image) for image in host.disks)
    host.configure(kms)
    assert run(host)["data"] == "persistent"
    assert host.boot_opens()
    assert run(host)["data"] == "unchanged"


def test_a_group_whose_settings_are_wrong_keeps_its_policy_and_the_other_gets_its_own(
    tmp_path: Path, kms: Liar
) -> None:
    host = Host(tmp_path, 0, kms)
    host.add_group("bad", 1, "provider")
    host.add_group("data", 1)
    more = '[group.bad]\npolicy = "provider"\nmount = "srv"\n[group.data]\npolicy = "provider"\n'
    host.configure(kms, more=more)
    outcomes = run(host)
    assert (outcomes["bad"], outcomes["data"]) == ("malformed", "provider")
    assert {name: group.policy for name, group in host.state.groups.items()} == {"bad": "provider", "data": "provider"}
    keyring.flush()


def test_nobody_but_this_host_can_say_that_a_key_is_kept_elsewhere(tmp_path: Path, kms: Liar) -> None:
    """A thief copies what says so from one disk's token to another's: that disk is tampered with, not waiting."""
    host = Host(tmp_path, 0, kms)
    host.add_group("data", 1)
    host.add_group("vault", 1, "provider")
    data, vault = host.disks
    with luks.Container(str(vault)) as container:
        marker = container.tokens("unlock")[0][1]["kek"]["wrapped"]
    with luks.Container(str(data)) as container:
        number, fields = container.tokens("unlock")[0]
        container.set_token({**fields, "kek": {**fields["kek"], "wrapped": marker}}, number)
    with luks.Container(str(data)) as container:
        (each,) = disk_keys.read_tokens(container, HOST)
        with pytest.raises(UnlockError) as caught:
            disk_keys.unwrap_volume_key(container, each, host.persistence)
        assert caught.value.code == "tampered"
    keyring.flush()


def test_native_keys_are_made_again_from_name_and_generation(tmp_path: Path) -> None:
    host = Host(tmp_path)
    with host.work() as work:
        provider = work.provider()
        assert isinstance(provider, native.Native)
        rotation.rotate_kek(work, "data")
        with (
            provider.fetch(f"unlock/{HOST}/kek/data/2") as again,
            access.find_kek(work, work.state.groups["data"])[0] as kek,
        ):
            assert again == kek
    keyring.flush()


def test_a_group_of_policy_provider_with_many_disks_asks_for_the_old_kek_once(tmp_path: Path, kms: Liar) -> None:
    host = Host(tmp_path, 4, kms, policy_of_group="provider")
    kms.replace(kms.keys[key_id(host)])
    before = len(kms.asked)
    assert run(host)["data"] == "replaced"
    assert sum("Get" in request for request in kms.asked[before:]) == 2, "the old one and the new one"
    keyring.flush()


def test_a_full_keyring_costs_no_key(kms: Liar) -> None:
    """Users who are not root have 200 keys: one of them plays root here, with all of the host's files."""
    uid = 100_000 + os.getpid()

    def story(host: Host) -> None:
        os.setresgid(uid, uid, uid)
        os.setresuid(uid, uid, uid)
        keyring.put("unlock:persistence", host.persistence)
        with pytest.raises(UnlockError) as caught:
            for number in range(300):
                keyring.put(f"unlock:filler:{number}", host.persistence)
        assert caught.value.code == "keyring-full"
        assert run(host)["data"] == "replaced"
        assert access.cache_name(host.group.kek, 2) not in keyring.names()
        keyring.flush()

    with tempfile.TemporaryDirectory() as folder:
        host = Host(Path(folder), 2, kms)
        for path in [host.folder, *host.folder.rglob("*")]:
            os.chown(path, uid, uid)
        kms.replace(kms.keys[key_id(host)])
        assert child(lambda: story(host)) == 0
        assert host.boot_opens()
        assert host.group.generation == 2
        keyring.flush()
