# SPDX-License-Identifier: Apache-2.0
"""`unlock sync` while the key manager, or whoever answers in its place, does its worst: every disk still opens, nothing
is lost and nothing adopted; and when it is well again, the key that it had put in the place of ours arrives."""

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.flowfixture import Host
from tests.kmipfixture import AUTHORITY, CLIENT
from tests.lab.kmipliar import Liar
from tests.lab.pki import Authority, Leaf
from unlock.errors import ProviderError
from unlock.host import config, keyring
from unlock.operations import sync

pytestmark = pytest.mark.usefixtures("key_cache")


@pytest.fixture
def host(tmp_path: Path, kms: Liar) -> Iterator[Host]:
    """Its key has been replaced at the key manager."""
    host = Host(tmp_path, 2, kms)
    kms.replace(kms.keys[host.group.kek.rpartition("/")[2]])
    yield host
    keyring.flush()


def ask(host: Host, kms: Liar, seconds: int = config.TIMEOUT) -> set[str]:
    """What a sync says, with so much patience for one request."""
    settings = config.ProviderConfig("kms", (f"127.0.0.1:{kms.port}",), host.ca(), "", seconds)
    Path(host.paths.config).write_text(config.HEAD + config.provider_table(settings))
    try:
        lines = sync.sync(host.paths, host.look, wait_for_clock=lambda: False)
    except ProviderError as error:
        return {error.code}
    return {each.outcome for each in lines}


def harmless(host: Host, kms: Liar, seconds: int = config.TIMEOUT) -> set[str]:
    """Asks twice; then all is as it was."""
    before = {path: path.read_bytes() for path in (Path(host.paths.state), *host.disks)}
    cached = keyring.names()
    said = ask(host, kms, seconds) | ask(host, kms, seconds)
    assert {path: path.read_bytes() for path in before} == before
    assert keyring.names() == cached
    assert host.boot_opens()
    assert host.recovery_opens()
    return said


def recovers(host: Host, kms: Liar) -> None:
    kms.honest()
    assert "replaced" in ask(host, kms)
    assert host.group.generation == 2
    assert host.boot_opens()
    assert host.recovery_opens()
    assert ask(host, kms) == {"unchanged"}


@pytest.mark.parametrize("fault", ["black hole", "hang", "drip"])
def test_a_key_manager_that_never_comes_to_an_end(host: Host, kms: Liar, fault: str) -> None:
    kms.lie(fault)
    assert harmless(host, kms, seconds=1) == {"provider-unavailable"}
    recovers(host, kms)


@pytest.mark.parametrize("fault", ["huge", "stale", "http", "wrong batch id", "wrong count", "version 2"])
def test_answers_that_are_not_to_the_question(host: Host, kms: Liar, fault: str) -> None:
    kms.lie(fault)
    assert harmless(host, kms) == {"provider-protocol"}
    recovers(host, kms)


@pytest.mark.parametrize("fault", ["swapped answers", "wrong id"])
def test_answers_about_other_keys(host: Host, kms: Liar, fault: str) -> None:
    kms.lie(fault)
    assert harmless(host, kms) <= {"integrity", "provider-protocol"}
    recovers(host, kms)


@pytest.mark.parametrize("fault", ["wrong label", "wrong algorithm", "two keys", "hang"])
def test_what_cannot_be_a_key_is_not_adopted(host: Host, kms: Liar, fault: str) -> None:
    kms.lie(fault, on="Get")
    assert "replaced" not in ask(host, kms, seconds=2 if fault == "hang" else config.TIMEOUT)
    assert (host.group.generation, host.state.journal) == (1, None)
    assert host.boot_opens()
    assert host.recovery_opens()
    recovers(host, kms)


@pytest.mark.parametrize(
    ("authority", "names", "days", "code"),
    [
        (AUTHORITY, ("kms2.example",), (-1, 365), "peer-untrusted"),
        (AUTHORITY, ("127.0.0.1",), (-30, -1), "peer-untrusted"),
        (AUTHORITY, ("127.0.0.1",), (1, 365), "clock-wrong"),
        (Authority(), ("127.0.0.1",), (-1, 365), "peer-untrusted"),
    ],
    ids=["another host's", "expired", "not yet valid", "unknown CA"],
)
def test_somebody_else_answers(
    host: Host, kms: Liar, authority: Authority, names: tuple[str, ...], days: tuple[float, float], code: str
) -> None:
    with Liar(AUTHORITY, authority.server(*names, days=days)) as impostor:
        impostor.keys = kms.keys
        assert harmless(host, impostor) == {code}
        assert not impostor.asked, "nothing was said to it"
    recovers(host, kms)


@pytest.mark.parametrize(
    "client",
    [Authority().client("host-1"), AUTHORITY.client("host-1", days=(-30, -1)), AUTHORITY.server("host-1")],
    ids=["unknown CA", "expired", "a server's"],
)
@pytest.mark.parametrize("tls", ["TLSv1_2", "TLSv1_3"])
def test_the_key_manager_does_not_know_this_host_any_more(host: Host, kms: Liar, client: Leaf, tls: str) -> None:
    with Liar(AUTHORITY, tls=tls) as strict:
        strict.keys = kms.keys
        host.use_client(client)
        assert harmless(host, strict) == {"client-auth"}
        host.use_client(CLIENT)
        recovers(host, strict)


def test_two_endpoints_that_disagree_and_both_lag(host: Host, kms: Liar) -> None:
    """One has the key as it was, the other as it is: whoever is asked first, the host goes forward only."""
    with kms.replica() as lagging:
        for key in lagging.keys.values():
            if "/kek/" in "".join(key.names):
                key.names = []
        lagging.keys[host.group.kek.rpartition("/")[2]].links.clear()
        assert ask(host, lagging) == {"unchanged"}
        recovers(host, kms)
        assert "replaced" not in ask(host, lagging)
        assert host.group.generation == 2
        assert host.boot_opens()
