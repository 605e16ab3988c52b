# SPDX-License-Identifier: Apache-2.0
"""Trouble with one key is that key's, and keys that were left at a dead key manager are no trouble. Real headers."""

import argparse
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.flowfixture import HOST, Host
from tests.killing import LASTING, killed_at
from tests.kmipfixture import AUTHORITY, CLIENT, connect
from tests.lab.kmipliar import ACTIVE, COMPROMISED, DEACTIVATED, DESTROYED, Liar
from unlock.cli import provider as provider_command
from unlock.disks import disk_keys, luks
from unlock.errors import DiskFailed, ProviderUnavailable, Refused
from unlock.host import config, keyring
from unlock.host.journal import Rekey
from unlock.keys import access
from unlock.operations import provider, rekey, status, sync
from unlock.operations import switch as switching
from unlock.providers import Ref
from unlock.secret import Secret

pytestmark = pytest.mark.usefixtures("key_cache")


@pytest.fixture
def host(tmp_path: Path, kms: Liar) -> Iterator[Host]:
    """Groups `data` and `more`."""
    host = Host(tmp_path, 1, kms)
    host.add_group("more", 1)
    yield host
    keyring.flush()


def run(host: Host) -> dict[str, str]:
    return {each.key: each.outcome for each in sync.sync(host.paths, host.look)}


def key_id(host: Host, group: str) -> str:
    return host.state.groups[group].kek.rpartition("/")[2]


SICK = [
    ("failure", "provider-unavailable"),
    ("unknown reason", "provider-protocol"),
    ("denied", "not-found-or-denied"),
    ("garbled", "provider-protocol"),
]


@pytest.mark.parametrize(("fault", "code"), SICK)
def test_attributes_of_one_key_fail_and_the_others_are_followed(host: Host, kms: Liar, fault: str, code: str) -> None:
    kms.replace(kms.keys[key_id(host, "more")])
    kms.sick[key_id(host, "data")] = fault
    for more in ("replaced", "unchanged"):
        assert run(host) == {"data": code, "more": more, "host key": "unchanged"}
        assert host.boot_opens()
    kms.sick.clear()
    assert set(run(host).values()) == {"unchanged"}


@pytest.mark.parametrize(("fault", "code"), SICK[:2])
def test_a_search_for_one_name_fails_and_the_others_are_followed(host: Host, kms: Liar, fault: str, code: str) -> None:
    kms.replace(kms.keys[key_id(host, "more")])
    kms.sick[f"unlock/{HOST}/kek/data/1"] = fault
    assert run(host) == {"data": code, "more": "replaced", "host key": "unchanged"}
    assert host.boot_opens()


@pytest.mark.parametrize("where", ["id", "name"])
def test_what_one_endpoint_fails_to_say_the_next_one_says(kms: Liar, where: str) -> None:
    keys = [kms.add(f"k{at}") for at in range(3)]
    with kms.replica() as other, connect(kms, other) as kmip:
        kms.sick[keys[1].id if where == "id" else "k1"] = "failure"
        statuses = kmip.resolve([Ref(key.id, f"k{at}") for at, key in enumerate(keys)])
        assert [(each.found, each.state, each.problem) for each in statuses] == [(True, "active", None)] * 3
        assert len(other.asked) == 1


def test_a_namesake_that_cannot_be_read_is_no_reason_to_make_another_key(kms: Liar) -> None:
    kms.sick[kms.add("k").id] = "failure"
    with connect(kms) as kmip, pytest.raises(ProviderUnavailable):
        kmip.create("k")
    assert len(kms.keys) == 1


def test_a_host_key_that_cannot_be_fetched_does_not_undo_what_was_said_of_the_groups(host: Host, kms: Liar) -> None:
    new = kms.replace(kms.keys[host.state.host_key_ref.id.rpartition("/")[2]])
    kms.replace(kms.keys[key_id(host, "data")])
    with kms.replica() as other:
        host.configure(other)
        other.keys[new.id].material = bytes(32)
        assert run(host) == {"data": "replaced", "more": "unchanged", "host key": "integrity"}
        assert host.boot_opens()


def test_a_rotation_that_cannot_be_finished_holds_up_no_other_group(host: Host, kms: Liar) -> None:
    number = 1
    while not (isinstance(journal := host.state.journal, Rekey) and journal.made):
        assert killed_at(number, lambda: rekey.rekey(host.paths, "data", host.look), LASTING)
        number += 1
    kms.sick[journal.made[0]] = "failure"
    found = run(host)
    assert found["more"] == "unchanged"
    assert host.boot_opens()
    kms.sick.clear()
    run(host)
    assert host.state.journal is None
    assert host.boot_opens()


# What was left behind


def left(host: Host) -> Liar:
    """The host has gone to another key manager; the first one was dead."""
    other = Liar(AUTHORITY)
    settings = config.ProviderConfig("second", (f"127.0.0.1:{other.port}",), host.ca(), "", config.TIMEOUT)
    client = provider.Client(CLIENT.certificate, Secret(CLIENT.key))
    provider.add_provider(host.paths, settings, client, host.look)
    switching.switch(host.paths, "second", None, host.look)
    return other


def test_keys_left_at_a_dead_key_manager_are_no_trouble_and_are_told_once(
    host: Host, kms: Liar, capsys: pytest.CaptureFixture[str]
) -> None:
    kms.stop()
    with left(host) as other:
        assert len(host.state.retire) == 2
        for _ in range(3):
            before = other.traffic()
            lines = sync.sync(host.paths, host.look)
            assert {each.outcome for each in lines} == {"unchanged"}
            assert not [each for each in lines if each.error]
            assert other.traffic() - before == (1, 1)
        rekey.rekey(host.paths, "data", host.look)
        assert {each["name"]: each["not_retired"] for each in provider.list_providers(host.paths)} == {
            "second": 0,
            "kms": 2,
        }
        provider_command._list(host.paths, argparse.Namespace(json=False))
        assert capsys.readouterr().out.count("replaced keys still active there: 2") == 1
        said = status.to_text(status.read_status(host.paths))
        assert said.count("2 replaced key(s) still active at kms") == 1
        assert "warning   2" not in said
        assert host.boot_opens()


def test_when_the_key_manager_that_was_left_answers_again_the_keys_are_deactivated_there(host: Host, kms: Liar) -> None:
    kms.stop()
    with left(host):
        provider.test_provider(host.paths, "kms", host.look)
        assert len(host.state.retire) == 2
        kms.start()
        provider.test_provider(host.paths, "kms", host.look)
        assert host.state.retire == []
        states = [key.state for key in kms.keys.values() if "/kek/" in "".join(key.names)]
        assert states == [DEACTIVATED, DEACTIVATED]
        assert "left " not in status.to_text(status.read_status(host.paths))


def test_a_key_manager_that_was_left_and_taken_out_of_unlock_toml_is_no_trouble(host: Host, kms: Liar) -> None:
    kms.stop()
    with left(host) as other:
        settings = config.ProviderConfig("second", (f"127.0.0.1:{other.port}",), host.ca(), "", config.TIMEOUT)
        Path(host.paths.config).write_text(config.HEAD + config.provider_table(settings))
        assert set(run(host).values()) == {"unchanged"}
        rekey.rekey(host.paths, "", host.look)
        assert len(host.state.retire) == 2
        assert status.to_text(status.read_status(host.paths))
        assert host.boot_opens()
        assert all(key.state == ACTIVE for key in kms.keys.values())
        with pytest.raises(Refused):
            provider.test_provider(host.paths, "kms", host.look)


# A key manager that is right in its own way


@pytest.mark.parametrize("odd", ["x" * 300, "schl\u00fcssel", "a\nb"], ids=ascii)
def test_a_replacement_whose_id_no_token_can_keep_costs_that_key_its_sync_and_no_disk_anything(
    host: Host, kms: Liar, odd: str
) -> None:
    kms.replace(kms.keys[key_id(host, "more")])
    kms.id_of = lambda _: odd
    kms.replace(kms.keys[key_id(host, "data")])
    tokens = [host.tokens(image) for image in host.disks[:1]]
    for more in ("replaced", "unchanged", "unchanged"):
        assert run(host) == {"data": "provider-protocol", "more": more, "host key": "unchanged"}
        assert [host.tokens(image) for image in host.disks[:1]] == tokens
        assert host.state.journal is None
        assert host.boot_opens()


def test_a_token_that_does_not_read_back_is_taken_away(host: Host) -> None:
    image = host.disks[0]
    with luks.Container(str(image)) as container:
        before = [number for number, _ in container.tokens("unlock")]
        (there,) = disk_keys.read_tokens(container, HOST)
        with host.work() as work, access.find_kek(work, host.group)[0] as kek, work.host_key() as host_key:
            mac_key = work.state.mac_key(work.persistence)
            with Secret(host.deks[container.uuid]) as dek:
                keys = disk_keys.Keys(work.persistence, host_key, kek, mac_key)
                unreadable = there._replace(kek_id="x" * 300)
                for _ in range(3):
                    with pytest.raises(DiskFailed, match="does not read back"):
                        disk_keys.write_token(str(image), unreadable, dek, keys)
    with luks.Container(str(image)) as container:
        assert [number for number, _ in container.tokens("unlock")] == before
    assert host.boot_opens()


@pytest.mark.parametrize("fault", ["denied", "unsupported", "not found", "lifecycle"])
def test_a_revoke_that_is_refused_is_kept_and_told_until_the_key_is_out_of_use(
    host: Host, kms: Liar, fault: str, capsys: pytest.CaptureFixture[str]
) -> None:
    old = kms.keys[key_id(host, "data")]
    kms.lie(fault, on="Revoke")
    rekey.rekey(host.paths, "data", host.look)
    assert old.id in capsys.readouterr().err
    for _ in range(2):
        assert run(host) == {**dict.fromkeys(("data", "more", "host key"), "unchanged"), "replaced key": "still-active"}
        assert [each.id for each in host.state.retire] == [f"kmip-one/{old.id}"]
        assert old.id in status.to_text(status.read_status(host.paths))
    old.state = DEACTIVATED
    assert set(run(host).values()) == {"unchanged"}
    assert host.state.retire == []


def test_a_replaced_key_that_was_purged_is_out_of_use_and_told_once(
    host: Host, kms: Liar, capsys: pytest.CaptureFixture[str]
) -> None:
    old = kms.keys[key_id(host, "data")]
    kms.lie("denied", on="Revoke")
    rekey.rekey(host.paths, "data", host.look)
    kms.honest()
    del kms.keys[old.id]
    capsys.readouterr()
    assert set(run(host).values()) == {"unchanged"}
    assert host.state.retire == []
    assert old.id in capsys.readouterr().err
    run(host)
    assert old.id not in capsys.readouterr().err
    assert host.boot_opens()


@pytest.mark.parametrize("other_endpoint", ["has it", "is away", "denies it"])
def test_a_replaced_key_is_gone_only_where_every_endpoint_says_so(host: Host, kms: Liar, other_endpoint: str) -> None:
    old = kms.keys[key_id(host, "data")]
    kms.lie("denied", on="Revoke")
    rekey.rekey(host.paths, "data", host.look)
    with kms.replica() as other:
        host.configure(kms, other)
        del kms.keys[old.id]
        if other_endpoint == "is away":
            other.stop()
        elif other_endpoint == "denies it":
            other.sick[old.id] = "denied"
        else:
            other.lie("denied", on="Revoke")
        assert run(host)["replaced key"] == "still-active"
        assert [each.id for each in host.state.retire] == [f"kmip-one/{old.id}"]
        if other_endpoint == "has it":
            other.honest()
            assert set(run(host).values()) == {"unchanged"}
            assert other.keys[old.id].state == DEACTIVATED


def test_a_replaced_key_that_the_key_manager_denies_is_told(host: Host, kms: Liar) -> None:
    old = kms.keys[key_id(host, "data")]
    kms.sick[old.id] = "denied"
    rekey.rekey(host.paths, "data", host.look)
    assert run(host)["replaced key"] == "still-active"


@pytest.mark.parametrize("state", [DEACTIVATED, COMPROMISED, DESTROYED])
@pytest.mark.parametrize("which", ["data", "host key"])
def test_a_key_out_of_use_is_told_and_the_unit_is_not_green(host: Host, kms: Liar, which: str, state: int) -> None:
    ref = host.state.host_key_ref.id if which == "host key" else host.state.groups[which].kek
    kms.keys[ref.rpartition("/")[2]].state = state
    lines = {each.key: each for each in sync.sync(host.paths, host.look)}
    assert {name: each.outcome for name, each in lines.items()} == {
        **dict.fromkeys(("data", "more", "host key"), "unchanged"),
        which: "state-blocked",
    }
    error = lines[which].error
    assert error and error.status == 27 and error.hint
    assert f"sync: {which}: state-blocked" in status.to_text(status.read_status(host.paths))
    assert host.boot_opens()


def test_a_key_out_of_use_is_told_also_when_it_was_just_cached(tmp_path: Path, kms: Liar) -> None:
    host = Host(tmp_path, 1, kms, policy_of_group="provider")
    kms.keys[key_id(host, "data")].state = DEACTIVATED
    for _ in range(2):
        (line,) = (each for each in sync.sync(host.paths, host.look) if each.key == "data")
        assert line.outcome == "state-blocked" and line.error
    keyring.flush()
