# SPDX-License-Identifier: Apache-2.0
"""The provider `kmip` and servers that refuse, restrict or alter what they are asked: what is done instead, and when
nothing can be, an error that says what to do."""

import itertools
from collections.abc import Callable, Iterator
from typing import Any

import pytest

from tests.kmipfixture import AUTHORITY, connect
from tests.lab import kmipliar
from tests.lab.kmipliar import ACTIVE, DEACTIVATED, PRE_ACTIVE, Liar
from unlock.endpoint import Endpoint
from unlock.errors import (
    ClientAuth,
    Integrity,
    NotFoundOrDenied,
    ProviderError,
    ProviderProtocol,
    ProviderUnavailable,
    StateBlocked,
)
from unlock.providers import Capabilities, Ref
from unlock.providers.kmip import server
from unlock.secret import Secret


@pytest.fixture
def liar() -> Iterator[Liar]:
    with Liar(AUTHORITY) as liar:
        yield liar


def refused(call: Callable[[], object]) -> ProviderError:
    with pytest.raises(ProviderError) as caught:
        call()
    told = str(caught.value) + caught.value.hint
    assert caught.value.hint and told.isprintable() and told.isascii() and len(told) < 500
    return caught.value


# Ids


ODD_IDS = ["x" * 219, "x" * 5000, "a\nb", "\x00", "\x1b[2J", "schl\u00fcssel", "\u202e", "\U0001f511", "a\x7f"]


@pytest.mark.parametrize("odd", ODD_IDS, ids=ascii)
@pytest.mark.parametrize("links", [True, False])
def test_a_key_with_an_id_that_no_token_can_keep_is_an_error_of_that_key(liar: Liar, odd: str, links: bool) -> None:
    """A token has room for 256 printable ASCII characters, the provider's id among them."""
    liar.moves_names, liar.links = not links, links
    mine, other = liar.add("k"), liar.add("other")
    liar.id_of = lambda _: odd
    liar.replace(mine)
    with connect(liar) as kmip:
        status, same = kmip.resolve([Ref(mine.id, "k"), Ref(other.id, "other")])
        assert not status.changed and isinstance(status.problem, ProviderProtocol)
        assert "printable ASCII" in str(status.problem) and str(status.problem).isprintable()
        assert same.found and same.problem is None
        assert isinstance(refused(lambda: kmip.fetch(odd)), NotFoundOrDenied)


@pytest.mark.parametrize("odd", ODD_IDS, ids=ascii)
def test_a_key_that_is_made_with_such_an_id_is_made_once(liar: Liar, odd: str) -> None:
    numbers = itertools.count()
    old = liar.add("k-0")
    liar.id_of = lambda _: f"{odd}{next(numbers)}"
    with connect(liar) as kmip:
        for _ in range(3):
            assert isinstance(refused(lambda: kmip.create("k-1")), ProviderProtocol)
    assert len(liar.keys) == 2
    with connect(liar) as kmip:
        for _ in range(3):
            assert isinstance(refused(lambda: kmip.rotate(Ref(old.id, "k-0"), "k-2")), ProviderProtocol)
    assert len(liar.keys) == 3


@pytest.mark.parametrize("length", [1, 36, 218])
def test_ids_that_fit_are_taken(liar: Liar, length: int) -> None:
    liar.id_of = lambda number: str(number).rjust(length, "~")
    with connect(liar) as kmip:
        assert kmip.create("k").id == "1".rjust(length, "~")


# Nothing but a ProviderError


def deep(tag: int) -> bytes:
    value = b""
    for _ in range(40):
        value = kmipliar.structure(tag, value)
    return value


VALUES: dict[str, Callable[[int], bytes]] = {
    "nothing": lambda tag: b"",
    "empty text": lambda tag: kmipliar.text(tag, ""),
    "text": lambda tag: kmipliar.text(tag, "x"),
    "long text": lambda tag: kmipliar.text(tag, "x" * 70_000),
    "not ASCII": lambda tag: kmipliar.text(tag, "\u00fc\U0001f511"),
    "control": lambda tag: kmipliar.text(tag, "\n\x1b[2J\x00"),
    "not UTF-8": lambda tag: kmipliar._ttlv(tag, 7, b"\xff\xfe"),
    "no bytes": lambda tag: kmipliar.blob(tag, b""),
    "bytes": lambda tag: kmipliar.blob(tag, bytes(40)),
    "zero": lambda tag: kmipliar.number(tag, 0),
    "negative": lambda tag: kmipliar.number(tag, -1),
    "large": lambda tag: kmipliar.enumeration(tag, 0xFFFFFFFF),
    "long number": lambda tag: kmipliar._ttlv(tag, 3, b"\x7f" + b"\xff" * 7),
    "big number": lambda tag: kmipliar._ttlv(tag, 4, b"\xff" * 512),
    "true": lambda tag: kmipliar._ttlv(tag, 6, (1).to_bytes(8)),
    "far date": lambda tag: kmipliar.date(tag, 2**63 - 1),
    "empty structure": lambda tag: kmipliar.structure(tag),
    "itself": lambda tag: kmipliar.structure(tag, kmipliar.structure(tag, kmipliar.number(tag, 1))),
    "deep": deep,
    "unknown type": lambda tag: kmipliar._ttlv(tag, 0x0F, bytes(8)),
    "wrong length": lambda tag: kmipliar._ttlv(tag, 2, bytes(8)),
    "too long": lambda tag: (tag << 8 | 7).to_bytes(4) + b"\x7f\xff\xff\xff" + bytes(8),
}
"""What a field may hold that it must not, by the tag that it keeps."""


def places(data: bytes, at: int = 0) -> Iterator[tuple[tuple[int, int, int], ...]]:
    """The path of each item: (tag, begin, end) of itself and of all structures around it."""
    while at < len(data):
        tag, kind, length = int.from_bytes(data[at : at + 3]), data[at + 3], int.from_bytes(data[at + 4 : at + 8])
        end = at + 8 + length + -length % 8
        yield ((tag, at, end),)
        if kind == 1:
            for path in places(data[: at + 8 + length], at + 8):
                yield ((tag, at, end), *path)
        at = end


def with_field(data: bytes, number: int, value: Callable[[int], bytes]) -> bytes:
    """A message with one item replaced, and the lengths of all around it mended."""
    path = list(places(data))[number]
    tag, begin, end = path[-1]
    new = data[:begin] + value(tag) + data[end:]
    for _, outer, outer_end in reversed(path[:-1]):
        length = outer_end - outer - 8 + len(new) - len(data)
        new = new[: outer + 4] + length.to_bytes(4) + new[outer + 8 :]
    return new


class Wire:
    """A connection to the liar without a network, which replaces the field number `at` of each answer."""

    def __init__(self, liar: Liar, value: Callable[[int], bytes]) -> None:
        self._liar, self._value = liar, value
        self.at, self.most = 0, 0

    def exchange(self, request: bytes, _: object) -> Secret:
        answer, _operations = self._liar._handle(request)
        count = len(list(places(answer)))
        self.most = max(self.most, count)
        return Secret(with_field(answer, self.at, self._value) if self.at < count else answer)

    def close(self) -> None:
        """Nothing is open."""


@pytest.mark.turns
@pytest.mark.parametrize("bad", VALUES)
def test_each_bad_value_in_each_field_of_each_answer_is_a_provider_error_or_harmless(
    liar: Liar, bad: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """All fields of all answers to a call, one at a time. The answers come without TLS, which has its own tests."""
    key, blocked = liar.add("k"), liar.add("gone", DEACTIVATED)
    liar.add("spare", PRE_ACTIVE)
    liar.replace(liar.add("old"))
    calls: list[Callable[[Any], object]] = [
        lambda kmip: kmip.resolve([Ref(key.id, "k"), Ref("id-4", "old"), Ref("none", "none")]),
        lambda kmip: bytes(kmip.fetch(key.id)) == key.material or pytest.fail("a wrong key"),
        lambda kmip: kmip.fetch(blocked.id),
        lambda kmip: kmip.capabilities(),
        lambda kmip: kmip.locate("k"),
        lambda kmip: kmip.health(),
        lambda kmip: kmip.rotate(Ref(key.id, "k"), "k-2"),
        lambda kmip: kmip.retire("id-3"),
    ]
    line = Wire(liar, VALUES[bad])
    monkeypatch.setattr(server, "TlsConnection", lambda *_: line)
    tried = 0
    for call in calls:
        line.at, line.most = 1, 2  # the message itself is for the connection to check
        while line.at < line.most:
            with connect(liar) as kmip:
                try:
                    call(kmip)
                except ProviderError as error:
                    assert str(error).isprintable() and str(error).isascii()
            line.at += 1
            tried += 1
    assert tried > 100


@pytest.mark.parametrize("name", ["a..b", ".a", "a" * 64 + ".example"])
def test_a_server_name_that_is_none_is_an_error_of_that_endpoint(liar: Liar, name: str) -> None:
    key = liar.add("k")
    wrong = Endpoint("127.0.0.1", liar.port, name)
    with connect(wrong) as kmip:
        refused(lambda: kmip.fetch(key.id))
    with connect(wrong, liar) as kmip:
        assert bytes(kmip.fetch(key.id)) == key.material


# Refusals that are no answer


@pytest.mark.parametrize("fault", ["denied", "no message", "unsupported", "invalid", "archived", "unknown reason"])
def test_a_locate_that_is_refused_is_not_taken_for_none_found(liar: Liar, fault: str) -> None:
    key = liar.add("k")
    liar.lie(fault, on="Locate")
    with connect(liar) as kmip:
        refused(lambda: kmip.create("k"))
        refused(lambda: kmip.locate("k"))
        refused(lambda: kmip.rotate(Ref(key.id, "k"), "k-2"))
    assert len(liar.keys) == 1


def test_a_locate_that_says_item_not_found_is_none_found(liar: Liar) -> None:
    liar.lie("not found", on="Locate")
    with connect(liar) as kmip:
        assert kmip.locate("k") is None
        assert kmip.create("k")


@pytest.mark.parametrize("fault", ["denied", "failure", "unknown reason"])
def test_a_namesake_that_may_not_be_read_is_no_reason_to_make_another_key(liar: Liar, fault: str) -> None:
    key = liar.add("k")
    liar.lie(fault, on="Get Attributes")
    with connect(liar) as kmip:
        refused(lambda: kmip.create("k"))
        refused(lambda: kmip.rotate(Ref("gone", "was"), "k"))
    assert ["Create"] not in liar.asked
    assert list(liar.keys) == [key.id]


def test_a_key_made_for_a_server_that_gives_out_only_what_is_for_export(liar: Liar) -> None:
    liar.wants_export = True
    with connect(liar) as kmip:
        ref = kmip.create("k")
        kmip.activate(ref.id)
        assert bytes(kmip.fetch(ref.id)) == liar.keys[ref.id].material
        new = kmip.rotate(ref, "k-2")
        assert kmip.fetch(new.id)


def test_a_server_that_does_not_know_export_makes_the_key_without(liar: Liar) -> None:
    liar.takes_export = False
    with connect(liar) as kmip:
        assert liar.keys[kmip.create("k").id].usage == kmipliar.ENCRYPT | kmipliar.DECRYPT
    assert len(liar.keys) == 1


def test_a_revoke_that_did_nothing_is_told(liar: Liar) -> None:
    key = liar.add("k")
    liar.revokes = False
    with connect(liar) as kmip:
        assert "still active" in str(refused(lambda: kmip.retire(key.id)))
    liar.revokes = True
    with connect(liar) as kmip:
        kmip.retire(key.id)


@pytest.mark.parametrize("fault", ["invalid", "denied", "unsupported", "unknown reason"])
def test_a_rekey_that_is_refused_is_a_new_key(liar: Liar, fault: str) -> None:
    old = liar.add("k-1")
    liar.lie(fault, on="Re-key")
    with connect(liar) as kmip:
        new = kmip.rotate(Ref(old.id, "k-1"), "k-2")
        assert kmip.rotate(Ref(old.id, "k-1"), "k-2") == new == Ref(new.id, "k-2")
    assert len(liar.keys) == 2


@pytest.mark.parametrize("fault", ["invalid", "denied", "unsupported", "unknown reason", "auth"])
def test_a_query_that_is_refused(liar: Liar, fault: str) -> None:
    liar.lie(fault, on="Query")
    with connect(liar) as kmip:
        if fault == "auth":
            assert isinstance(refused(kmip.capabilities), ClientAuth)
        else:
            assert kmip.capabilities() == Capabilities(create=True, rekey=False)


def test_a_rekey_that_copies_that_a_key_is_out_of_use(liar: Liar) -> None:
    old = liar.add("k-1", DEACTIVATED)
    liar.rekeys_any_state = True
    with connect(liar) as kmip:
        new = kmip.rotate(Ref(old.id, "k-1"), "k-2")
        assert liar.keys[new.id].state == ACTIVE
        assert kmip.rotate(Ref(old.id, "k-1"), "k-2") == new


def test_ids_in_another_case_are_the_same_ids(liar: Liar) -> None:
    liar.respell = str.upper
    refs = [Ref(liar.add(f"k{at}").id, f"k{at}") for at in range(3)]
    with connect(liar) as kmip:
        assert [(each.found, each.changed, each.problem) for each in kmip.resolve(refs)] == [(True, False, None)] * 3
        assert kmip.fetch(refs[0].id)
        new = liar.replace(liar.keys[refs[1].id])
        assert [each.changed for each in kmip.resolve(refs)] == [False, True, False]
        assert kmip.resolve(refs)[1].current == new.id.upper()
        assert kmip.create("k2").id == refs[2].id.upper()


@pytest.mark.parametrize("operation", ["Create", "Activate", "Re-key", "Revoke"])
def test_a_change_that_a_read_only_replica_refuses_goes_to_the_next_endpoint(liar: Liar, operation: str) -> None:
    key = liar.add("k-1")
    fresh = liar.add("fresh", PRE_ACTIVE)
    with liar.replica() as replica:
        replica.keys = liar.keys
        for each in ("Create", "Activate", "Re-key", "Revoke"):
            replica.lie("denied", on=each)
        with connect(replica, liar) as kmip:
            match operation:
                case "Create":
                    assert kmip.create("new").id in liar.keys
                case "Activate":
                    kmip.activate(fresh.id)
                    assert liar.keys[fresh.id].state == ACTIVE
                case "Re-key":
                    assert kmip.rotate(Ref(key.id, "k-1"), "k-2").name == "k-1"
                case _:
                    kmip.retire(key.id)
                    assert liar.keys[key.id].state == DEACTIVATED
        sent = [each for request in liar.asked + replica.asked for each in request]
        assert sent.count(operation) == 2
    assert len(liar.keys) == 2 + (operation in ("Create", "Re-key"))


def test_a_change_that_all_endpoints_refuse(liar: Liar) -> None:
    with liar.replica() as other, connect(liar, other) as kmip:
        liar.lie("denied", on="Create")
        other.lie("invalid", on="Create")
        assert isinstance(refused(lambda: kmip.create("k")), NotFoundOrDenied)
    assert not liar.keys and not other.keys


@pytest.mark.parametrize("fault", ["lost", "silent", "failure"])
def test_a_change_without_a_definite_refusal_goes_to_no_other_endpoint(liar: Liar, fault: str) -> None:
    with liar.replica() as other, connect(liar, other) as kmip:
        liar.lie(fault, on="Create")
        refused(lambda: kmip.create("k"))
        assert not other.keys


@pytest.mark.parametrize("count", [101, 400])
def test_a_locate_that_ignores_the_name_among_many_keys(liar: Liar, count: int) -> None:
    liar.filters = False
    for at in range(count):
        liar.add(f"k{at}")
    key = next(iter(liar.keys.values()))
    with connect(liar) as kmip:
        [status] = kmip.resolve([Ref(key.id, "k0")])
        assert not status.changed and status.problem is None
        new = liar.replace(key)
        assert kmip.resolve([Ref(key.id, "k0")])[0].current == new.id
        assert kmip.locate("k77") and kmip.locate("none") is None
        assert kmip.create("new").id == list(liar.keys)[-1]


@pytest.mark.parametrize("alter", [str.upper, lambda name: name.replace("/", "_"), lambda name: name[:10]], ids="ABC")
def test_a_name_that_comes_back_altered_makes_no_second_key(liar: Liar, alter: Callable[[str], str]) -> None:
    liar.alter = alter
    with connect(liar) as kmip:
        ref = kmip.create("unlock/host/kek/data/1")
        error = refused(lambda: kmip.create("unlock/host/kek/data/1"))
        assert isinstance(error, Integrity) and "key_names" in error.hint
        kmip.activate(ref.id)
        [status] = kmip.resolve([ref])
        assert status.found and not status.changed
    assert len(liar.keys) == 1


@pytest.mark.parametrize("fault", ["invalid", "lifecycle"])
def test_a_key_that_is_active_already(liar: Liar, fault: str) -> None:
    """A server that names no state refuses to activate a key twice."""
    liar.lacks = {"State"}
    key = liar.add("k")
    liar.lie(fault, on="Activate")
    with connect(liar) as kmip:
        kmip.activate(key.id)
        assert kmip.fetch(key.id)
    liar.lacks = set()
    key.state = PRE_ACTIVE
    with connect(liar) as kmip:
        refused(lambda: kmip.activate(key.id))


# What to do


@pytest.mark.parametrize("fault", ["invalid", "exists", "unknown reason"])
def test_a_well_formed_refusal_is_not_told_as_another_protocol(liar: Liar, fault: str) -> None:
    liar.lie(fault, on="Create")
    with connect(liar) as kmip:
        error = refused(lambda: kmip.create("unlock/host/kek/data/1"))
        assert isinstance(error, ProviderProtocol)
        assert "KMIP server" not in error.hint
        assert ("key_names" in error.hint) == (fault == "invalid")


def test_what_is_not_kmip_is_told_so(liar: Liar) -> None:
    liar.lie("http")
    with connect(liar) as kmip:
        assert "KMIP server" in refused(lambda: kmip.fetch("id-1")).hint


@pytest.mark.parametrize(("fault", "word"), [("archived", "archive"), ("no bytes here", "restore")])
def test_a_key_without_its_bytes_is_not_told_as_revoked(liar: Liar, fault: str, word: str) -> None:
    key = liar.add("k")
    liar.lie(fault, on="Get")
    with connect(liar) as kmip:
        error = refused(lambda: kmip.fetch(key.id))
        assert isinstance(error, StateBlocked) and word in error.hint and "revoked" not in error.hint


@pytest.mark.parametrize("reason", [0x03, 0x0C, 0x25, 0x39])
def test_a_wrong_password_by_each_of_its_codes(liar: Liar, reason: int) -> None:
    key = liar.add("k")
    liar.credential, liar.refuses_credential_as = ("host-1", "right"), reason
    with connect(liar, username="host-1", password=Secret(b"wrong")) as kmip:
        error = refused(lambda: kmip.fetch(key.id))
        assert isinstance(error, ClientAuth) and "--password-file" in error.hint
        refused(lambda: kmip.resolve([Ref(key.id, "k")]))
    assert len(liar.asked) == 1, "servers lock out clients that insist"
    with connect(liar, username="host-1", password=Secret(b"right")) as kmip:
        assert kmip.fetch(key.id)


def test_one_key_that_is_denied_is_no_wrong_password(liar: Liar) -> None:
    key = liar.add("k")
    liar.credential = ("host-1", "right")
    liar.lie("denied", on="Get")
    with connect(liar, username="host-1", password=Secret(b"right")) as kmip:
        assert isinstance(refused(lambda: kmip.fetch(key.id)), NotFoundOrDenied)


def test_a_server_that_hangs_up_after_the_question_is_not_told_as_away(liar: Liar) -> None:
    """Exit status 20 leaves the unit green; a client that is refused so must be seen."""
    key = liar.add("k")
    liar.lie("silent")
    with connect(liar) as kmip:
        error = refused(lambda: kmip.fetch(key.id))
        assert isinstance(error, ProviderProtocol) and "refuse this client" in error.hint
    liar.honest()
    with connect(liar) as kmip:
        kmip.fetch(key.id)
        liar.lie("silent")
        assert isinstance(refused(lambda: kmip.fetch(key.id)), ProviderUnavailable), (
            "it has answered this client before"
        )
