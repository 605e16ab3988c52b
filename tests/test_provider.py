# SPDX-License-Identifier: Apache-2.0
"""`unlock provider`, `persistence`, `cache` and the gates' keys, as stories. Real headers, real KMIP over TLS."""

import json
import os
import socket
import subprocess
import sys
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

import pytest

from tests.flowfixture import HOST, Host
from tests.killing import Killer
from tests.kmipfixture import AUTHORITY, CLIENT
from tests.lab.kmipliar import ACTIVE, DEACTIVATED, Liar
from tests.lab.kmipserver import KmipServer
from tests.tpmfixture import Swtpm
from unlock.boot import gate
from unlock.disks import disk_keys, luks
from unlock.disks.groups import Group
from unlock.errors import ClientAuth, NoKey, ProviderError, Refused, Tampered, UnlockError, Usage
from unlock.host import config, keyring, report, report_file
from unlock.host.state import State
from unlock.keys import access
from unlock.operations import cache, native_backup, persistence, provider, rekey, selfhosted, status, sync
from unlock.operations import switch as switching
from unlock.secret import Secret

pytestmark = pytest.mark.usefixtures("key_cache")

PASSWORD = Secret(b"of the backup")


@pytest.fixture
def host(tmp_path: Path, kms: Liar) -> Iterator[Host]:
    yield Host(tmp_path, 2, kms)
    keyring.flush()


@pytest.fixture
def native_host(tmp_path: Path) -> Iterator[Host]:
    yield Host(tmp_path, 2)
    keyring.flush()


def client(name: str = "host-1", **more: object) -> provider.Client:
    leaf = CLIENT if name == "host-1" else AUTHORITY.client(name, **more)  # type: ignore[arg-type]
    return provider.Client(leaf.certificate, Secret(leaf.key))


def settings(host: Host, *kms: Liar, name: str = "kms", client_key: str = "") -> config.ProviderConfig:
    ca = host.folder / "ca.pem"
    ca.write_text(AUTHORITY.certificate)
    return config.ProviderConfig(name, tuple(f"127.0.0.1:{each.port}" for each in kms), str(ca), client_key, 10)


def errors(proofs: list[provider.Proof]) -> list[str]:
    return [each.error.code for each in proofs if each.error]


# add, list, test


def test_a_key_manager_is_added_tested_and_listed(native_host: Host, kms: Liar) -> None:
    for _ in range(2):
        provider.add_provider(native_host.paths, settings(native_host, kms), client(), native_host.look)
    rows = provider.list_providers(native_host.paths)
    assert [(row["name"], row["kind"], row["in_use"]) for row in rows] == [
        ("native", "native", True),
        ("kms", "kmip", False),
    ]
    assert rows[0]["groups"] == ["data"]
    assert 360 < (rows[1]["certificate_days"] or 0) < 366
    assert CLIENT.key.decode().splitlines()[1] not in Path(native_host.paths.state).read_text()
    assert CLIENT.key.decode().splitlines()[1] not in Path(native_host.paths.config).read_text()
    assert errors(provider.test_provider(native_host.paths, "kms", native_host.look)) == []
    assert errors(provider.test_provider(native_host.paths, "", native_host.look)) == []


def test_a_key_manager_that_does_not_answer_is_not_added(native_host: Host, kms: Liar) -> None:
    kms.lie("silent")
    before = Path(native_host.paths.state).read_bytes(), Path(native_host.paths.config).read_bytes()
    with pytest.raises(ProviderError):
        provider.add_provider(native_host.paths, settings(native_host, kms), client(), native_host.look)
    assert (Path(native_host.paths.state).read_bytes(), Path(native_host.paths.config).read_bytes()) == before
    with pytest.raises(Refused):
        provider.add_provider(native_host.paths, settings(native_host, kms, name="native"), client(), native_host.look)


def test_the_test_finds_a_key_that_is_not_the_one_in_use(host: Host, kms: Liar) -> None:
    assert errors(provider.test_provider(host.paths, "", host.look)) == []
    before = [image.read_bytes() for image in host.disks]
    kms.lie("other key", on="Get")
    assert errors(provider.test_provider(host.paths, "", host.look)) == ["integrity", "integrity"]
    kms.honest()
    kms.stop()
    assert "provider-unavailable" in errors(provider.test_provider(host.paths, "", host.look))
    assert [image.read_bytes() for image in host.disks] == before


# switch


def test_from_the_native_provider_to_a_key_manager_and_on_to_another(native_host: Host, kms: Liar) -> None:
    host = native_host
    provider.add_provider(host.paths, settings(host, kms), client(), host.look)
    with pytest.raises(Usage, match="choice"):
        switching.switch(host.paths, "kms", None, host.look)
    (outcome,) = switching.switch(host.paths, "kms", True, host.look)
    assert len(outcome.done) == 2
    assert host.boot_opens()
    assert host.recovery_opens()
    first = host.state
    assert (first.provider.name, list(first.others), first.journal) == ("kms", ["native"], None)
    assert all(host.tokens(image) == [(host.group.kek, 2)] for image in host.disks)
    assert first.host_key_ref.id.startswith(first.provider_id)
    with pytest.raises(Refused):
        switching.switch(host.paths, "kms", True, host.look)
    with Liar(AUTHORITY) as other:
        provider.add_provider(host.paths, settings(host, other, name="second"), client(), host.look)
        old = kms.keys[host.group.kek.rpartition("/")[2]]
        switching.switch(host.paths, "second", None, host.look)
        assert old.state == DEACTIVATED, "retired where it came from"
        assert host.boot_opens()
        assert errors(provider.test_provider(host.paths, "", host.look)) == []
        assert {each.outcome for each in sync.sync(host.paths, host.look)} == {"unchanged"}
    for image in host.disks:
        with luks.Container(str(image)) as container:
            (token,) = disk_keys.read_tokens(container, HOST)
        assert disk_keys.unwrap_host_key(token, host.persistence) == host.state.host_key(host.persistence)


def test_away_from_a_key_manager_that_is_gone(host: Host, kms: Liar) -> None:
    kms.stop()
    with Liar(AUTHORITY) as other:
        provider.add_provider(host.paths, settings(host, other, name="second"), client(), host.look)
        switching.switch(host.paths, "second", None, host.look)
        assert host.boot_opens()
        assert host.state.retire, "cannot be retired where nobody answers"
        before = other.traffic()
        assert {each.outcome for each in sync.sync(host.paths, host.look)} == {"unchanged"}
        assert (other.traffic() - before).requests == 1


@pytest.mark.turns
def test_a_switch_killed_anywhere_is_finished_by_the_same_command(host: Host, killer: Killer) -> None:
    with Liar(AUTHORITY) as one, Liar(AUTHORITY) as two:
        managers = {"second": one, "third": two}
        for name, each in managers.items():
            provider.add_provider(host.paths, settings(host, each, name=name), client(), host.look)

        def target(attempt: int) -> str:
            return "second" if attempt % 2 else "third"

        def switch(attempt: int) -> None:
            switching.switch(host.paths, target(attempt), None, host.look)

        for attempt, killed in killer(lambda attempt: partial(switch, attempt)):
            assert host.boot_opens()
            assert host.recovery_opens()
            if killed and host.state.provider.name != target(attempt):
                switch(attempt)
            assert host.state.journal is None
            assert host.boot_opens()
            assert host.state.provider.name == target(attempt)


def test_a_switch_with_a_member_away(host: Host, kms: Liar) -> None:
    away = host.disks.pop()
    with Liar(AUTHORITY) as other:
        provider.add_provider(host.paths, settings(host, other, name="second"), client(), host.look)
        switching.switch(host.paths, "second", None, host.look)
    host.disks.append(away)
    assert host.boot_opens(), "no provider answers, and nothing is needed of one"
    with pytest.raises(ProviderError):
        sync.sync(host.paths, host.look)
    assert host.tokens(away) == [(host.group.kek, 2)]
    assert kms.keys[host.group.former[0].rpartition("/")[2]].state == ACTIVE, "not retired while a disk was away"


# renew


def test_a_new_certificate_is_tried_before_the_old_one_is_dropped(host: Host, kms: Liar) -> None:
    foreign = provider.Client(*_foreign())
    before = Path(host.paths.state).read_bytes()
    with pytest.raises(ProviderError) as caught:
        provider.renew_client(host.paths, foreign, "", host.look)
    assert isinstance(caught.value, ClientAuth)
    assert Path(host.paths.state).read_bytes() == before
    days = provider.renew_client(host.paths, client("host-1 again", days=(-1, 30)), "", host.look)
    assert days == 29
    assert provider.list_providers(host.paths)[0]["certificate_days"] == 29
    assert {each.outcome for each in sync.sync(host.paths, host.look)} == {"unchanged"}


def _foreign() -> tuple[str, Secret]:
    from tests.lab.pki import Authority

    leaf = Authority("another").client("host-1")
    return leaf.certificate, Secret(leaf.key)


def test_a_certificate_without_its_key_is_refused(host: Host) -> None:
    mixed = provider.Client(CLIENT.certificate, Secret(AUTHORITY.client("x").key))
    with pytest.raises(UnlockError):
        provider.renew_client(host.paths, mixed, "", host.look)
    assert {each.outcome for each in sync.sync(host.paths, host.look)} == {"unchanged"}


# backup and restore


def test_a_backup_restores_on_a_second_host_of_the_cluster(native_host: Host, tmp_path: Path) -> None:
    file = str(tmp_path / "backup")
    native_backup.backup(native_host.paths, file, PASSWORD, "", native_host.look)
    with pytest.raises(Usage):
        native_backup.backup(native_host.paths, file, PASSWORD, "", native_host.look)
    with native_host.work() as work, access.find_kek(work, native_host.group)[0] as kek:
        known = bytes(kek)
    (tmp_path / "two").mkdir()
    second = Host(tmp_path / "two", 2)
    with pytest.raises(Refused, match="fingerprint"):
        native_backup.restore(second.paths, file, PASSWORD, "native", second.look)
    with pytest.raises(Tampered):
        native_backup.restore(second.paths, file, Secret(b"wrong"), "cluster", second.look)
    for _ in range(2):
        restored = native_backup.restore(second.paths, file, PASSWORD, "cluster", second.look)
        assert restored.id == native_host.state.provider_id
    switching.switch(second.paths, "cluster", None, second.look)
    assert second.boot_opens()
    with second.work() as work:
        key_id = native_host.group.kek.partition("/")[2]
        assert bytes(work.provider().fetch(key_id)) == known, "the first host's KEK, should its disks move here"


def test_a_restore_mends_the_hosts_own_provider(native_host: Host, tmp_path: Path) -> None:
    file = str(tmp_path / "backup")
    native_backup.backup(native_host.paths, file, PASSWORD, "", native_host.look)
    state = json.loads(Path(native_host.paths.state).read_text())
    state["provider"]["kdk"] = "AAAA"
    Path(native_host.paths.state).write_text(json.dumps(state))
    assert native_host.boot_opens(), "the disks carry what opens them"
    native_backup.restore(native_host.paths, file, PASSWORD, "native", native_host.look)
    assert errors(provider.test_provider(native_host.paths, "", native_host.look)) == []


def test_a_key_manager_has_no_backup_here(host: Host, tmp_path: Path) -> None:
    with pytest.raises(Refused):
        native_backup.backup(host.paths, str(tmp_path / "backup"), PASSWORD, "", host.look)
    assert not (tmp_path / "backup").exists()


# A key manager on the disks that it opens


SERVER = """
import socket, sys, time
listener = socket.create_server(("127.0.0.1", 0))
log = open(sys.argv[1], "a")
print(listener.getsockname()[1], flush=True)
time.sleep(60)
"""


def test_a_server_with_an_open_file_on_the_group_lives_there(tmp_path: Path) -> None:
    data = tmp_path / "srv"
    data.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "none", data], check=True)
    process = subprocess.Popen([sys.executable, "-c", SERVER, data / "log"], stdout=subprocess.PIPE, text=True)
    try:
        assert process.stdout
        port = process.stdout.readline().strip()
        assert selfhosted.hosting_group(f"127.0.0.1:{port}", {str(data): "data"}) == "data"
        assert selfhosted.hosting_group(f"localhost:{port}=kms.example", {str(data): "data"}) == "data"
        assert selfhosted.hosting_group(f"127.0.0.1:{port}", {str(tmp_path / "other"): "data"}) == ""
        assert selfhosted.hosting_group("192.0.2.1:5696", {str(data): "data"}) == ""
        with socket.create_server(("127.0.0.1", 0)) as free:
            assert selfhosted.hosting_group(f"127.0.0.1:{free.getsockname()[1]}", {str(data): "data"}) == ""
    finally:
        process.kill()
        process.wait()
        subprocess.run(["umount", data], check=True)


# persistence


@pytest.fixture
def chip(host: Host) -> Iterator[Swtpm]:
    with host.tpm() as chip:
        yield chip


def disable(host: Host, chip: Swtpm) -> None:
    persistence.disable(host.paths, host.look, chip.tcti)
    host.take_key()


def test_persistence_off_and_on_again(host: Host, kms: Liar, chip: Swtpm) -> None:
    assert persistence.status(host.paths, host.look)["groups"][0]["kept_on"] == ["data-0", "data-1"]
    material = kms.keys[host.group.kek.rpartition("/")[2]].material
    host_key = bytes(host.state.host_key(host.persistence) or b"")
    for _ in range(2):
        disable(host, chip)
        found = persistence.status(host.paths, host.look)
        assert (found["enabled"], found["groups"][0]["kept_on"]) == (False, [])
        assert not any(host.opens(image) for image in host.disks)
        assert host.recovery_opens()
    for image in host.disks:
        with luks.Container(str(image)) as container:
            (each,) = disk_keys.read_tokens(container, HOST)
        assert bytes(disk_keys.unwrap_host_key(each, host.persistence)) == disk_keys.NOT_KEPT != host_key
    assert host.state.host_key(host.persistence) is None
    keyring.forget(access.cache_name(host.group.kek, 1))  # as the next boot finds it
    assert host.group.policy == "provider"
    for _ in range(2):
        persistence.enable(host.paths, host.look)
        assert host.boot_opens()
    assert bytes(host.state.host_key(host.persistence) or b"") == host_key
    with host.work() as work, access.find_kek(work, host.group)[0] as kek:
        assert bytes(kek) == material


def test_enabling_without_the_key_manager_changes_nothing(host: Host, kms: Liar, chip: Swtpm) -> None:
    disable(host, chip)
    keyring.forget(access.cache_name(host.group.kek, 1))
    kms.stop()
    with pytest.raises(ProviderError):
        persistence.enable(host.paths, host.look)
    kms.start()
    persistence.enable(host.paths, host.look)
    assert host.boot_opens()


def test_native_keys_are_always_kept(native_host: Host) -> None:
    with pytest.raises(Refused):
        persistence.disable(native_host.paths, native_host.look)
    assert native_host.boot_opens()


def test_the_tpm_is_not_emptied_while_something_hangs_on_it(host: Host, chip: Swtpm) -> None:
    with pytest.raises(Refused, match="enabled"):
        persistence.remove_all_stored_keys(host.paths, "device:/dev/absent", Secret(b""))
    disable(host, chip)
    with pytest.raises(Refused, match="client key"):
        persistence.remove_all_stored_keys(host.paths, "device:/dev/absent", Secret(b""))


def test_every_path_that_caches_a_key_is_known() -> None:
    """Each of them has persisted the key, or found it persisted, or never keeps it, before it says so."""
    package = Path(__file__).parents[1] / "unlock"
    callers = {
        f"{path.stem}: {line.strip()}"
        for path in package.rglob("*.py")
        for line in path.read_text().splitlines()
        if "keyring.put(" in line or "this_boot.cache_keys(" in line
    }
    expected = {
        # unsealed from the TPM
        'handover: this_boot.cache_keys(paths, "TPM", {"unlock:persistence": persistence})',
        # it opened the sealed object
        'handover: this_boot.cache_keys(paths, "PIN", {"unlock:pin-auth": pin_auth})',
        # from a token
        'handover: this_boot.cache_keys(paths, "TPM", {name: unwrapped})',
        # sealed next; killed, it goes on with it
        'allowed_states: this_boot.cache_keys(paths, "PIN", {PIN_AUTH: pin_auth})',
        'rebind: this_boot.cache_keys(paths, "PIN", {allowed_states.PIN_AUTH: pin_auth})',
        'rebind: this_boot.cache_keys(paths, "made", {_NEW: new})',
        # sealed before
        'init: this_boot.cache_keys(paths, "made", {"unlock:persistence": persistence})',
        'rebind: this_boot.cache_keys(paths, "made", {"unlock:persistence": new})',
        'new_persistence_key: this_boot.cache_keys(paths, "made", {"unlock:persistence": new})',
        # in state and tokens before
        'rebind: this_boot.cache_keys(paths, source, {"unlock:host": host_key})',
        # on the disks
        "rebind: this_boot.cache_keys(paths, source, {access.cache_name(group.kek, group.generation): kek})",
        "this_boot: keyring.put(name, key)",
        "rotation: this_boot.cache_keys(work.paths, source, {access.cache_name(group.kek, group.generation): kek})",
        # saved in the state before
        'init: this_boot.cache_keys(paths, "provider", {"unlock:host": host_key})',
        'rotation: this_boot.cache_keys(work.paths, "provider", {"unlock:host": key})',
        'switch: this_boot.cache_keys(work.paths, "provider", {"unlock:host": key})',
        # never kept
        "sync: this_boot.cache_keys(work.paths, source, {access.cache_name(group.kek, group.generation): kek})",
        "gate: this_boot.cache_keys(work.paths, source, {access.cache_name(group.kek, group.generation): kek})",
    }
    assert callers == expected


def test_a_key_in_the_cache_is_on_the_disks_whenever_it_is_killed(host: Host, kms: Liar, killer: Killer) -> None:
    """Only where the KEK is kept: what is cached and not on every disk that is here was not reported either."""
    cached = 0

    def begin(_: int) -> Callable[[], object]:
        kms.replace(kms.keys[host.group.kek.rpartition("/")[2]])
        return partial(sync.sync, host.paths, host.look)

    for _ in killer(begin):
        for name in keyring.names():
            if name.startswith("unlock:kek:"):
                kek_id, _, generation = name.removeprefix("unlock:kek:").rpartition(":")
                cached += 1
                assert all((kek_id, int(generation)) in host.tokens(image) for image in host.disks)
        sync.sync(host.paths, host.look)
        for name in keyring.names():
            if name.startswith("unlock:kek:"):
                keyring.forget(name)
    assert cached


# cache


def test_the_cache_tells_where_each_key_came_from_and_what_goes_with_it(host: Host, kms: Liar) -> None:
    kms.replace(kms.keys[host.group.kek.rpartition("/")[2]])
    sync.sync(host.paths, host.look)
    rows = {row["what"]: row["source"] for row in cache.list_keys(host.paths)}
    assert rows == {"persistence key": "TPM", "KEK of group data": "provider"}
    assert any("sync" in line for line in cache.describe_flush(host.paths, host.look))
    assert cache.flush(host.paths)
    assert cache.list_keys(host.paths) == []
    assert cache.flush(host.paths) == []
    assert cache.describe_flush(host.paths, host.look) == ["nothing more than now: the persistence key is not there"]


def test_a_key_that_was_in_the_cache_keeps_its_source(tmp_path: Path, kms: Liar) -> None:
    """A gate finds there what a sync has put there; a change of policy, what the disks gave."""
    host = Host(tmp_path, 1, kms, policy_of_group="provider")
    name = access.cache_name(host.group.kek, 1)

    def source() -> str:
        return {row["key"]: row["source"] for row in cache.list_keys(host.paths)}[name]

    sync.sync(host.paths, host.look)
    assert source() == "provider"
    unwrapper(host)
    with host.tpm() as chip:
        disable(host, chip)
    assert source() == "provider"
    keyring.forget(name)
    (tmp_path / "two").mkdir()
    host = Host(tmp_path / "two", 1, kms)
    name = access.cache_name(host.group.kek, 1)
    with host.tpm() as chip:
        disable(host, chip)
    assert source() == "TPM", "the token of the disk had it"
    keyring.flush()


def test_keys_in_the_cache_have_no_timeout(host: Host, kms: Liar) -> None:
    """An offline host must still heal after 60 days."""
    kms.replace(kms.keys[host.group.kek.rpartition("/")[2]])
    sync.sync(host.paths, host.look)
    rows = [line.split() for line in Path("/proc/keys").read_text().splitlines() if "unlock:" in line]
    assert len(rows) >= 2
    assert {row[3] for row in rows} == {"perm"}


# The gates


def opens_all(host: Host, group: Group, unwrap: Callable[..., Secret]) -> bool:
    for image in host.disks:
        with luks.Container(str(image)) as container:
            tokens = [each for each in disk_keys.read_tokens(container, HOST) if each.group == group.name]
            with unwrap(container, tokens[0]) as dek:
                if bytes(dek) != host.deks[container.uuid]:
                    return False
    return True


def unwrapper(host: Host, record: report.Report | None = None) -> Callable[..., Secret]:
    return gate.make_unwrap(host.paths, "data", record or report.Report("gate data"), 0, host.look)


def test_an_offline_boot_asks_nobody(host: Host, kms: Liar) -> None:
    before = kms.traffic()
    assert opens_all(host, host.group, unwrapper(host))
    assert kms.traffic() == before


def test_a_group_of_policy_provider_opens_when_the_key_manager_answers(tmp_path: Path, kms: Liar) -> None:
    host = Host(tmp_path, 2, kms, policy_of_group="provider")
    kms.stop()
    with pytest.raises(ProviderError):
        unwrapper(host)
    kms.start()
    assert opens_all(host, host.group, unwrapper(host))
    before = kms.traffic()
    assert opens_all(host, host.group, unwrapper(host))
    assert kms.traffic() == before, "cached now"
    keyring.flush()


@pytest.mark.parametrize("allowed", [False, True])
def test_the_tpm_refuses_and_the_key_manager_answers(host: Host, kms: Liar, allowed: bool) -> None:
    """An edited command line, the network up: nothing is resealed or written; what happened is recorded."""
    key_file = host.folder / "client.key"
    key_file.write_bytes(CLIENT.key)
    made = settings(host, kms, client_key=str(key_file))
    text = "[sync]\nopen_from_provider_after_refusal = true\n" if allowed else ""
    Path(host.paths.config).write_text(config.HEAD + text + config.provider_table(made))
    provider.renew_client(host.paths, client(), "", host.look)
    keyring.flush()
    early = report.Report("early-boot")
    early.set_verdict("pcr-mismatch", "PCR 9: the kernel command line changed")
    Path(host.paths.of_this_boot("report.json")).write_bytes(report_file.encode(early))
    before = [Path(host.paths.state).read_bytes(), *(image.read_bytes() for image in host.disks)]
    record = report.Report("gate data")
    if allowed:
        assert opens_all(host, host.group, unwrapper(host, record))
        assert record.facts.opened_from_provider == "data"
        assert any("command line changed" in text for _, kind, text in record.events if kind == "opened-from-provider")
        kms.lie("other key", on="Get")
        with pytest.raises(UnlockError):
            opens_all(host, host.group, unwrapper(host))
    else:
        with pytest.raises(NoKey, match="command line changed"):
            unwrapper(host, record)
    assert keyring.names() == [], "nothing is kept of it"
    assert [Path(host.paths.state).read_bytes(), *(image.read_bytes() for image in host.disks)] == before
    with pytest.raises(NoKey):
        sync.sync(host.paths, host.look)


def test_after_60_days_without_a_network_the_missing_disk_is_plugged_in(host: Host, kms: Liar) -> None:
    """Certificates have expired meanwhile; what opens disks knows no date."""
    away = host.disks.pop()
    kms.replace(kms.keys[host.group.kek.rpartition("/")[2]])
    sync.sync(host.paths, host.look)
    host.use_client(AUTHORITY.client("host-1", days=(-90, -30)))
    kms.stop()
    host.disks.append(away)
    assert opens_all(host, host.group, unwrapper(host))
    with pytest.raises(ProviderError):
        sync.sync(host.paths, host.look)
    assert host.tokens(away) == [(host.group.kek, 2)]
    assert opens_all(host, host.group, unwrapper(host))


# The command line


def test_the_command_line_speaks_for_people_and_for_scripts(host: Host) -> None:
    code = "import sys; from unlock.__main__ import main; import unlock.cli as cli\n"
    code += "here = cli.Paths(sys.argv[1]); cli.Paths = lambda: here; sys.argv[1:2] = []; sys.exit(main())"
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[1])}

    def run(*words: str) -> tuple[int, str, str]:
        command = [sys.executable, "-c", code, host.paths.root, *words]
        done = subprocess.run(command, env=environment, capture_output=True, text=True, stdin=subprocess.DEVNULL)
        return done.returncode, done.stdout, done.stderr

    for words in (["provider", "list"], ["cache", "show"], ["persistence", "status"]):
        status, said, _ = run(*words)
        assert (status, bool(said)) == (0, True), words
        assert json.loads(run(*words, "--json")[1])["version"] == 1
    status, said, trouble = run("rekey", "absent")
    assert (status, said) == (2, "")
    assert "hint: unlock status" in trouble
    status, said, again = run("rekey", "absent", "--json")
    assert (status, again) == (2, trouble)
    error = {"code": "usage", "message": "there is no group absent", "hint": "unlock status", "status": 2}
    assert json.loads(said) == {"version": 1, "error": error}
    assert State.load(host.paths).journal is None


@pytest.mark.turns
@pytest.mark.parametrize("enabling", [False, True])
def test_a_choice_of_persistence_killed_anywhere_is_finished_by_the_same_command(
    host: Host, enabling: bool, killer: Killer, chip: Swtpm
) -> None:
    choice, back = persistence.disable, persistence.enable
    if enabling:
        choice, back = back, choice

    def begin(_: int) -> Callable[[], object]:
        back(host.paths, host.look, chip.tcti)
        host.take_key()
        assert [host.opens(image) for image in host.disks] == [not enabling] * 2
        return partial(choice, host.paths, host.look, chip.tcti)

    for _ in killer(begin):
        chip.power_cycle()  # what the killed one had loaded goes: the kernel's resource manager does that on a host
        assert host.recovery_opens()
        choice(host.paths, host.look, chip.tcti)
        host.take_key()
        assert host.state.journal is None
        assert [host.opens(image) for image in host.disks] == [enabling] * 2


def test_a_client_key_that_a_refused_boot_could_not_use_is_found_by_the_test(host: Host, kms: Liar) -> None:
    host.configure(kms, more="[sync]\nopen_from_provider_after_refusal = true\n")
    assert errors(provider.test_provider(host.paths, "", host.look)) == ["refused"]


# Another implementation: PyKMIP's own server


def test_a_year_with_pykmips_server(tmp_path: Path) -> None:
    """It has no Re-key and no Link: rotation there is a new key."""
    (tmp_path / "server").mkdir()
    with KmipServer(tmp_path / "server", AUTHORITY) as server:
        host = Host(tmp_path, 2, server)
        before = server.traffic()
        assert {each.outcome for each in sync.sync(host.paths, host.look)} == {"unchanged"}
        assert server.traffic() - before == (1, 1)
        for generation in (2, 3):
            rekey.rekey(host.paths, "data", host.look)
            assert all(host.tokens(image) == [(host.group.kek, generation)] for image in host.disks)
            assert host.boot_opens()
        assert errors(provider.test_provider(host.paths, "", host.look)) == []
        server.kill()
        with pytest.raises(ProviderError):
            sync.sync(host.paths, host.look)
        assert host.boot_opens()
        server.start()
        assert {each.outcome for each in sync.sync(host.paths, host.look)} == {"unchanged"}
    keyring.flush()


def test_status_shows_the_days_left_what_is_behind_and_how_the_last_sync_went(host: Host, kms: Liar) -> None:
    provider.renew_client(host.paths, client("host-1 again", days=(-1, 20.5)), "", host.look)
    assert "not in this boot" in status.to_text(status.read_status(host.paths))
    host.disks.pop()
    kms.replace(kms.keys[host.group.kek.rpartition("/")[2]])
    sync.sync(host.paths, host.look)
    found = status.to_json(status.read_status(host.paths))
    assert found["providers"][0]["certificate_days"] == 20
    assert (found["persistence"], found["groups"][0]["behind"]) == (True, ["data-1"])
    said = status.to_text(status.read_status(host.paths))
    assert "certificate: 20 days left" in said
    assert "unlock provider renew" in said
    assert "data-1: still under an earlier key" in said
    kms.lie("denied")
    sync.sync(host.paths, host.look)
    assert "sync: data: not-found-or-denied" in status.to_text(status.read_status(host.paths))
