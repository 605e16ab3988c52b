# SPDX-License-Identifier: Apache-2.0
"""The provider `kmip` against servers that fail, lie, lag or are somebody else: a typed error, never a wrong key."""

import random
import time
from collections.abc import Callable, Iterator

import pytest

from tests.kmipfixture import AUTHORITY, Clock, connect, half, settings
from tests.lab.kmipliar import COMPROMISED, DEACTIVATED, DESTROYED, DESTROYED_COMPROMISED, Key, Liar
from tests.lab.kmipserver import Traffic
from tests.lab.pki import Authority, Leaf
from unlock.endpoint import Endpoint
from unlock.errors import (
    ClientAuth,
    ClockWrong,
    Integrity,
    NotFoundOrDenied,
    PeerUntrusted,
    ProviderError,
    ProviderProtocol,
    ProviderUnavailable,
    StateBlocked,
    Tampered,
    Unsupported,
    Usage,
)
from unlock.providers import Ref
from unlock.providers.kmip.provider import KmipProvider
from unlock.secret import Secret

FAULTS = [
    ("black hole", ProviderUnavailable),
    ("silent", ProviderUnavailable),
    ("hang", ProviderUnavailable),
    ("drip", ProviderUnavailable),
    ("failure", ProviderUnavailable),
    ("truncated", ProviderProtocol),
    ("garbage", ProviderProtocol),
    ("http", ProviderProtocol),
    ("huge", ProviderProtocol),
    ("stale", ProviderProtocol),
    ("wrong batch id", ProviderProtocol),
    ("swapped answers", ProviderProtocol),
    ("wrong count", ProviderProtocol),
    ("version 2", ProviderProtocol),
    ("unknown reason", ProviderProtocol),
    ("two keys", ProviderProtocol),
    ("wrong id", Integrity),
    ("wrong length", Integrity),
    ("zero key", Integrity),
    ("wrong type", Integrity),
    ("wrong label", Integrity),
    ("wrong algorithm", Integrity),
    ("wrapped", Integrity),
    ("no bytes", Integrity),
    ("not found", NotFoundOrDenied),
    ("denied", NotFoundOrDenied),
    ("no message", NotFoundOrDenied),
    ("evil message", NotFoundOrDenied),
    ("auth", ClientAuth),
    ("unsupported", Unsupported),
]


def patience(fault: str) -> float:
    """Seconds: of a deadline that is to pass, or of one that is not."""
    return 3.0 if fault in ("black hole", "hang", "drip") else 60.0


@pytest.fixture
def liar() -> Iterator[Liar]:
    with Liar(AUTHORITY) as liar:
        yield liar


def proof_of(key: Key) -> Callable[[Secret], None]:
    """What the flows do: the key must unwrap something known."""

    def prove(found: Secret) -> None:
        if bytes(found) != key.material:
            raise Tampered("a wrapped key does not authenticate")

    return prove


@pytest.mark.parametrize(("fault", "kind"), FAULTS)
def test_a_fault_is_a_typed_error(liar: Liar, fault: str, kind: type[ProviderError]) -> None:
    key = liar.add("k")
    with connect(liar, timeout=patience(fault)) as kmip:
        if fault in ("stale", "silent"):
            kmip.fetch(key.id)
        liar.lie(fault)
        with pytest.raises(kind) as failed:
            kmip.fetch(key.id)
    told = str(failed.value) + failed.value.hint
    assert type(failed.value) is kind and failed.value.hint
    assert told.isprintable() and len(told) < 400 and key.material.hex() not in told


@pytest.mark.parametrize(("fault", "kind"), FAULTS)
def test_after_any_fault_the_next_endpoint_gives_the_right_key(
    liar: Liar, fault: str, kind: type[ProviderError]
) -> None:
    key = liar.add("k")
    with liar.replica() as honest, connect(liar, honest, timeout=patience(fault)) as kmip:
        if fault == "stale":
            kmip.fetch(key.id)
        liar.lie(fault)
        assert bytes(kmip.fetch(key.id)) == key.material
        assert [(each.found, each.changed) for each in kmip.resolve([Ref(key.id, "k")])] == [(True, False)]


@pytest.mark.parametrize(("fault", "kind"), FAULTS)
def test_after_a_fault_the_same_endpoint_is_believed_again_but_not_after_a_wrong_key(
    liar: Liar, fault: str, kind: type[ProviderError]
) -> None:
    key = liar.add("k")
    ahead = 0.0
    with KmipProvider(settings(liar, timeout=patience(fault)), clock=lambda: time.monotonic() + ahead) as kmip:
        if fault != "black hole":
            kmip.fetch(key.id)
        liar.lie(fault)
        with pytest.raises(kind):
            kmip.fetch(key.id)
        liar.honest()
        ahead = 1000.0
        if kind is Integrity:
            with pytest.raises(Integrity):
                kmip.fetch(key.id)
        else:
            assert bytes(kmip.fetch(key.id)) == key.material


def test_refused(liar: Liar) -> None:
    liar.stop()
    with connect(liar) as kmip, pytest.raises(ProviderUnavailable):
        kmip.fetch("id-1")


def test_a_name_that_does_not_resolve() -> None:
    with connect(Endpoint("no-such-host.invalid")) as kmip, pytest.raises(ProviderUnavailable):
        kmip.fetch("id-1")


@pytest.mark.parametrize("state", [DEACTIVATED, COMPROMISED, DESTROYED, DESTROYED_COMPROMISED])
def test_blocked_states(liar: Liar, state: int) -> None:
    key = liar.add("k", state)
    with connect(liar) as kmip:
        with pytest.raises(StateBlocked):
            kmip.fetch(key.id)
        [status] = kmip.resolve([Ref(key.id, "k")])
        assert status.found and not status.changed
        assert status.state == {3: "deactivated", 4: "compromised", 5: "destroyed", 6: "destroyed"}[state]
        assert kmip.locate("k") is None


def test_what_one_endpoint_calls_compromised_is_not_fetched_from_another(liar: Liar) -> None:
    key = liar.add("k")
    with liar.replica() as lagging, connect(liar, lagging) as kmip:
        key.state = COMPROMISED
        with pytest.raises(StateBlocked):
            kmip.fetch(key.id)


# Who is who.


@pytest.mark.parametrize(
    ("authority", "names", "days", "kind"),
    [
        (AUTHORITY, ("kms2.example",), (-1, 365), PeerUntrusted),
        (AUTHORITY, ("127.0.0.2",), (-1, 365), PeerUntrusted),
        (AUTHORITY, ("127.0.0.1",), (-30, -1), PeerUntrusted),
        (AUTHORITY, ("127.0.0.1",), (1, 365), ClockWrong),
        (Authority(), ("127.0.0.1",), (-1, 365), PeerUntrusted),
    ],
    ids=["another host's", "another address'", "expired", "not yet valid", "unknown CA"],
)
@pytest.mark.parametrize("tls", ["TLSv1_2", "TLSv1_3"])
def test_a_server_certificate_that_is_wrong(
    authority: Authority, names: tuple[str, ...], days: tuple[float, float], kind: type[ProviderError], tls: str
) -> None:
    with Liar(AUTHORITY, authority.server(*names, days=days), tls=tls) as liar, connect(liar) as kmip:
        liar.add("k")
        with pytest.raises(kind):
            kmip.fetch("id-1")
        assert not liar.asked


@pytest.mark.parametrize(
    ("client", "kind"),
    [
        (Authority().client("host-1"), ClientAuth),
        (AUTHORITY.client("host-1", days=(-30, -1)), ClientAuth),
        (AUTHORITY.server("host-1"), ClientAuth),
        (AUTHORITY.client("host-1", days=(1, 30)), ClockWrong),
    ],
    ids=["unknown CA", "expired", "a server's", "not yet valid"],
)
@pytest.mark.parametrize("tls", ["TLSv1_2", "TLSv1_3"])
def test_a_client_certificate_that_the_server_refuses(client: Leaf, kind: type[ProviderError], tls: str) -> None:
    with Liar(AUTHORITY, tls=tls) as liar, connect(liar, client=client) as kmip:
        liar.add("k")
        for _ in range(2):
            with pytest.raises(kind):
                kmip.fetch("id-1")
        assert liar.traffic() == Traffic(connections=1, requests=0)


def test_each_endpoint_has_its_own_port_and_server_name() -> None:
    leaves = [AUTHORITY.server("kms1.example"), AUTHORITY.server("kms2.example")]
    with Liar(AUTHORITY, leaves[0]) as one, Liar(AUTHORITY, leaves[1]) as two:
        key = two.add("k")
        right = [Endpoint("127.0.0.1", one.port, "kms1.example"), Endpoint("localhost", two.port, "kms2.example")]
        with connect(*right) as kmip:
            assert bytes(kmip.fetch(key.id)) == key.material
        wrong = [each._replace(server_name="kms3.example") for each in right]
        with connect(*wrong) as kmip, pytest.raises(PeerUntrusted):
            kmip.fetch(key.id)


def test_user_name_and_password(liar: Liar) -> None:
    key = liar.add("k")
    liar.credential = ("host-1", "secret")
    with connect(liar, username="host-1", password=Secret(b"secret")) as kmip:
        assert bytes(kmip.fetch(key.id)) == key.material
    for credential in ({}, {"username": "host-1"}, {"username": "host-1", "password": Secret(b"guess")}):
        with connect(liar, **credential) as kmip, pytest.raises(ClientAuth):
            kmip.fetch(key.id)


@pytest.mark.parametrize(
    ("text", "endpoint"),
    [
        ("kms", Endpoint("kms")),
        ("kms:9998", Endpoint("kms", 9998)),
        ("kms:9998=kms.example", Endpoint("kms", 9998, "kms.example")),
        ("10.0.0.1=kms.example", Endpoint("10.0.0.1", 5696, "kms.example")),
        ("[2001:db8::1]:9998", Endpoint("2001:db8::1", 9998)),
        ("[2001:db8::1]", Endpoint("2001:db8::1")),
        ("2001:db8::1", Endpoint("2001:db8::1")),
    ],
)
def test_endpoints_are_read_and_written(text: str, endpoint: Endpoint) -> None:
    assert Endpoint.parse(text) == endpoint == Endpoint.parse(str(endpoint))


@pytest.mark.parametrize("text", ["", ":5696", "kms:0", "kms:65536", "kms:x", "kms:", "a b", "[::1]x", "=name", "[]:1"])
def test_what_is_no_endpoint(text: str) -> None:
    with pytest.raises(Usage):
        Endpoint.parse(text)


# Several endpoints.


def test_an_endpoint_that_dies_between_resolve_and_fetch(liar: Liar) -> None:
    key = liar.add("k")
    with liar.replica() as other, connect(liar, other) as kmip:
        [status] = kmip.resolve([Ref(key.id, "k")])
        assert status.found and liar.asked and not other.asked
        liar.stop()
        assert bytes(kmip.fetch(key.id)) == key.material
        assert other.asked
        other.stop()
        with pytest.raises(ProviderUnavailable):
            kmip.fetch(key.id)


def test_two_endpoints_that_disagree_about_a_key(liar: Liar) -> None:
    """The one whose key unwraps what is known is believed; the other is not asked again."""
    key = liar.add("k")
    with liar.replica() as liars_friend, connect(liars_friend, liar) as kmip:
        liars_friend.lie("other key", on="Get")
        assert bytes(kmip.fetch(key.id, prove=proof_of(key))) == key.material
        asked = len(liars_friend.asked)
        liar.stop()
        with pytest.raises(Integrity):
            kmip.fetch(key.id, prove=proof_of(key))
        assert len(liars_friend.asked) == asked


def test_a_lagging_replica_never_takes_a_key_back(liar: Liar) -> None:
    old = liar.add("k")
    with liar.replica() as lagging:
        new = liar.replace(old)
        with connect(lagging) as kmip:
            [status] = kmip.resolve([Ref(new.id, "k")])
            assert not status.found and status.current == new.id and isinstance(status.problem, NotFoundOrDenied)
            with pytest.raises(NotFoundOrDenied):
                kmip.fetch(new.id)
        with connect(lagging, liar) as kmip:
            [status] = kmip.resolve([Ref(new.id, "k")])
            assert status.found and not status.changed
            assert bytes(kmip.fetch(new.id)) == new.material


def test_a_server_that_was_replaced_by_an_empty_one_takes_nothing(liar: Liar) -> None:
    refs = [Ref(f"old-{at}", f"name-{at}") for at in range(3)]
    liar.add("name-0")
    with connect(liar) as kmip:
        assert [(each.found, each.current) for each in kmip.resolve(refs)] == [(False, ref.id) for ref in refs]


def test_one_sick_key_does_not_stop_the_others(liar: Liar) -> None:
    keys = [liar.add(f"k{at}") for at in range(3)]
    del liar.keys[keys[1].id]
    with connect(liar) as kmip:
        assert [each.found for each in kmip.resolve([Ref(key.id, f"k{at}") for at, key in enumerate(keys)])] == [
            True,
            False,
            True,
        ]


def test_an_endpoint_that_failed_rests_longer_each_time(liar: Liar) -> None:
    clock = Clock()
    liar.lie("silent")
    with KmipProvider(settings(liar), clock=clock, random=half) as kmip:
        rests = []
        for _ in range(4):
            with pytest.raises(ProviderProtocol) as failed:
                kmip.fetch("id-1")
            connections = liar.traffic().connections
            with pytest.raises(ProviderProtocol):
                kmip.fetch("id-1")
            assert liar.traffic().connections == connections
            rests.append(failed.value.retry_after)
            clock.now += rests[-1]
    assert rests == [1.5, 3.0, 6.0, 12.0]


def test_a_server_that_hangs_up_on_an_idle_connection_is_asked_once_more(liar: Liar) -> None:
    key = liar.add("k")
    with connect(liar) as kmip:
        kmip.fetch(key.id)
        liar.stop()
        liar.start()
        assert bytes(kmip.fetch(key.id)) == key.material


@pytest.mark.parametrize("seed", range(8))
def test_mangled_answers_are_refused_or_harmless(liar: Liar, seed: int) -> None:
    dice = random.Random(seed)
    key = liar.add("k")

    def mangle(answer: bytes) -> bytes:
        answer_ = bytearray(answer)
        for _ in range(dice.choice([1, 1, 2, 30])):
            answer_[dice.randrange(8, len(answer_))] = dice.choice(
                [0, 1, 2, 7, 8, 9, 0x42, 0x7F, 0x80, 0xFF, dice.randrange(256)]
            )
        return bytes(answer_)

    liar.mangle = mangle
    for _ in range(25):
        with connect(liar) as kmip:
            try:
                assert bytes(kmip.fetch(key.id, prove=proof_of(key))) == key.material
            except ProviderError as error:
                assert str(error).isprintable()
            try:
                [status] = kmip.resolve([Ref(key.id, "k")])
                assert status.current == key.id
            except ProviderError as error:
                assert str(error).isprintable()
