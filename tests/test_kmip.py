# SPDX-License-Identifier: Apache-2.0
"""The provider `kmip` against a real KMIP server, PyKMIP's, over mutual TLS."""

import os
import subprocess
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from tests.kmipfixture import AUTHORITY, CLIENT, connect, settings
from tests.lab.kmipserver import KmipServer, Traffic
from tests.lab.pki import Authority, Leaf
from unlock.errors import ClientAuth, Malformed, NotFoundOrDenied, ProviderUnavailable, StateBlocked
from unlock.providers import ACTIVE, DEACTIVATED, PRE_ACTIVE, Ref
from unlock.providers.kmip.provider import KmipProvider
from unlock.secret import Secret


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[KmipServer]:
    with KmipServer(tmp_path_factory.mktemp("kmip"), AUTHORITY) as server:
        yield server


@pytest.fixture
def kmip(server: KmipServer) -> Iterator[KmipProvider]:
    with connect(server) as kmip:
        yield kmip


def test_the_life_of_a_key_each_step_twice(kmip: KmipProvider) -> None:
    old = kmip.create("life-1")
    assert kmip.create("life-1") == old
    assert [status.state for status in kmip.resolve([old])] == [PRE_ACTIVE]
    for _ in range(2):
        kmip.activate(old.id)
    first, again = kmip.fetch(old.id), kmip.fetch(old.id)
    assert first == again and len(first) == 32

    new = kmip.rotate(old, "life-2")
    assert kmip.rotate(old, "life-2") == new == Ref(new.id, "life-2")
    assert new.id != old.id and kmip.fetch(new.id) != first

    for _ in range(2):
        kmip.retire(old.id)
    assert [(each.state, each.changed, each.problem) for each in kmip.resolve([old, new])] == [
        (DEACTIVATED, False, None),
        (ACTIVE, False, None),
    ]


def test_a_retired_key_opens_what_it_must_and_wraps_nothing_new(kmip: KmipProvider) -> None:
    key = kmip.create("retired")
    kmip.activate(key.id)
    before = kmip.fetch(key.id)
    kmip.retire(key.id)
    with pytest.raises(StateBlocked):
        kmip.fetch(key.id)
    assert kmip.fetch(key.id, frozenset({ACTIVE, DEACTIVATED})) == before
    with pytest.raises(StateBlocked):
        kmip.activate(key.id)


def test_resolve_of_50_unchanged_keys_is_one_request(server: KmipServer, kmip: KmipProvider) -> None:
    refs = [kmip.create(f"many-{at}") for at in range(50)]
    with connect(server) as fresh:
        before = server.traffic()
        statuses = fresh.resolve(refs)
        assert server.traffic() - before == Traffic(connections=1, requests=1)
    assert [status.ref for status in statuses] == refs
    assert all(status.found and not status.changed for status in statuses)


def test_more_keys_take_more_requests_on_the_same_connection(server: KmipServer, kmip: KmipProvider) -> None:
    ref = kmip.create("over-and-over")
    with connect(server) as fresh:
        before = server.traffic()
        assert len(fresh.resolve([ref] * 101)) == 101
        assert server.traffic() - before == Traffic(connections=1, requests=3)


def test_threads_that_share_a_provider_get_their_own_keys(kmip: KmipProvider) -> None:
    refs = [kmip.create(f"thread-{at}") for at in range(8)]
    for ref in refs:
        kmip.activate(ref.id)
    right = [kmip.fetch(ref.id) for ref in refs]
    with ThreadPoolExecutor(8) as pool:
        assert list(pool.map(lambda ref: kmip.fetch(ref.id), refs * 5)) == right * 5


def test_a_server_that_restarts_is_found_again(tmp_path: Path) -> None:
    with KmipServer(tmp_path, AUTHORITY) as server, connect(server) as kmip:
        ref = kmip.create("restart")
        kmip.activate(ref.id)
        before = kmip.fetch(ref.id)
        server.kill()
        server.start()
        assert kmip.fetch(ref.id) == before
        assert kmip.create("restart") == ref


def test_a_key_of_another_client_is_not_found_or_denied(server: KmipServer, kmip: KmipProvider) -> None:
    ref = kmip.create("mine")
    with connect(server, client=AUTHORITY.client("host-2")) as other:
        with pytest.raises(NotFoundOrDenied):
            other.fetch(ref.id)
        [status] = other.resolve([ref])
        assert not status.found and not status.changed and isinstance(status.problem, NotFoundOrDenied)
    assert kmip.fetch(ref.id, frozenset({PRE_ACTIVE}))


def test_health_names_each_endpoint(server: KmipServer, tmp_path: Path) -> None:
    dead = KmipServer(tmp_path, AUTHORITY)
    dead.kill()
    with connect(dead, server, client=AUTHORITY.client("host-1", days=(-1, 30.5))) as kmip:
        health = kmip.health()
    assert [(each.protocol, type(each.problem)) for each in health.endpoints] == [
        ("", ProviderUnavailable),
        ("KMIP 1.4", type(None)),
    ]
    assert health.certificate_days == 30


@pytest.mark.parametrize("tls", ["1.2", "1.3"])
@pytest.mark.parametrize("client", [Authority().client("host-1"), AUTHORITY.client("host-1", days=(-30, -1))])
def test_a_client_certificate_that_is_refused(tmp_path: Path, tls: str, client: Leaf) -> None:
    """With TLS 1.3 it shows only when the first answer is read."""
    with KmipServer(tmp_path, AUTHORITY, tls) as server, connect(server, client=client) as kmip:
        with pytest.raises(ClientAuth) as refused:
            kmip.resolve([Ref("1", "any")])
        assert refused.value.retry_after > 20
        with pytest.raises(ClientAuth):
            kmip.resolve([Ref("1", "any")])
        assert server.traffic().connections == 1


def test_no_secret_is_logged_or_written_anywhere(
    server: KmipServer, tmp_path: Path, caplog: pytest.LogCaptureFixture, capfd: pytest.CaptureFixture[str]
) -> None:
    caplog.set_level(1)
    keylog = tmp_path / "keylog"
    os.environ["SSLKEYLOGFILE"] = str(keylog)
    try:
        with connect(server, username="host", password=Secret(b"the password")) as kmip:
            ref = kmip.create("quiet")
            kmip.activate(ref.id)
            key = kmip.fetch(ref.id)
            kmip.rotate(ref, "quiet-2")
            kmip.retire(ref.id)
            with pytest.raises(StateBlocked) as blocked:
                kmip.fetch(ref.id)
    finally:
        del os.environ["SSLKEYLOGFILE"]
    told = caplog.text + "".join(capfd.readouterr()) + repr(blocked.value) + repr(key) + repr(kmip) + repr(vars(kmip))
    forms = [bytes(key).hex(), repr(bytes(key)), "the password", "PRIVATE KEY", CLIENT.key.decode().splitlines()[1]]
    assert not [form for form in forms if form in told]
    assert not keylog.exists()


def test_close_wipes_what_it_was_given(server: KmipServer) -> None:
    given = settings(server, username="host", password=Secret(b"the password"))
    with KmipProvider(given):
        pass
    assert given.password and not any(given.key.value) and not any(given.password.value)


def test_the_client_key_is_in_no_file_and_no_descriptor(server: KmipServer) -> None:
    before = sorted(os.listdir("/proc/self/fd"))
    with connect(server):
        assert sorted(os.listdir("/proc/self/fd")) == before


def test_certificates_that_cannot_be_used(server: KmipServer) -> None:
    other = AUTHORITY.client("host-1")
    locked = b"-----BEGIN ENCRYPTED PRIVATE KEY-----\nMIIB\n-----END ENCRYPTED PRIVATE KEY-----\n"
    for client, ca in [
        (Leaf(CLIENT.certificate, other.key), AUTHORITY.certificate),
        (Leaf(CLIENT.certificate, locked), AUTHORITY.certificate),
        (Leaf("", CLIENT.key), AUTHORITY.certificate),
        (Leaf("-----BEGIN CERTIFICATE-----\nMIIB\n-----END CERTIFICATE-----\n", CLIENT.key), AUTHORITY.certificate),
        (CLIENT, ""),
        (CLIENT, "no PEM"),
    ]:
        with pytest.raises(Malformed):
            connect(server, client=client, ca=ca)


@pytest.mark.usefixtures("unmeasured")
def test_pykmip_is_not_imported() -> None:
    """It is the other side of the tests."""
    code = "import sys, unlock.providers.kmip.provider; print(*sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert not {"kmip", "sqlalchemy", "requests"} & set(done.stdout.split())
