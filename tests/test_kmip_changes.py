# SPDX-License-Identifier: Apache-2.0
"""The provider `kmip`: which key is current, rotation with and without Re-key, and servers that differ."""

from collections.abc import Iterator
from typing import Any

import pytest

from tests.kmipfixture import AUTHORITY, connect
from tests.lab.kmipliar import ACTIVE, DEACTIVATED, OPERATIONS, PRE_ACTIVE, REPLACED, REPLACEMENT, Liar
from tests.lab.kmipserver import Traffic
from unlock.errors import Integrity, NotFoundOrDenied, ProviderError, ProviderUnavailable, Unsupported
from unlock.providers import Capabilities, KeyStatus, Ref


@pytest.fixture
def liar() -> Iterator[Liar]:
    with Liar(AUTHORITY) as liar:
        yield liar


def resolved(liar: Liar, ref: Ref) -> KeyStatus:
    with connect(liar) as kmip:
        [status] = kmip.resolve([ref])
    return status


# What has changed.


def test_nothing_changed_is_one_request_on_one_connection(liar: Liar) -> None:
    refs = [Ref(liar.add(f"k{at}").id, f"k{at}") for at in range(50)]
    with connect(liar) as kmip:
        assert [(each.ref, each.found, each.current) for each in kmip.resolve(refs)] == [
            (ref, True, ref.id) for ref in refs
        ]
        assert liar.traffic() == Traffic(connections=1, requests=1)


@pytest.mark.parametrize(
    "how", [{}, {"moves_names": False}, {"links": False}, {"chatty": True}], ids=["both", "link", "name", "chatty"]
)
def test_a_key_that_the_server_replaced(liar: Liar, how: dict[str, Any]) -> None:
    """A conforming Re-key moves the name and links both keys; others do one of the two."""
    vars(liar).update(how)
    key = liar.add("k")
    other = liar.add("other")
    new = liar.replace(key)
    with connect(liar) as kmip:
        changed, same = kmip.resolve([Ref(key.id, "k"), Ref(other.id, "other")])
        assert (changed.current, changed.problem) == (new.id, None) and not same.changed
        assert bytes(kmip.fetch(changed.current)) == new.material
        [after] = kmip.resolve([Ref(new.id, "k")])
        assert not after.changed and after.problem is None
    assert liar.traffic() == Traffic(connections=1, requests=4 if liar.moves_names else 5)


@pytest.mark.parametrize("moves_names", [True, False])
def test_a_key_that_was_replaced_three_times(liar: Liar, moves_names: bool) -> None:
    liar.moves_names = moves_names
    first = liar.add("k")
    second = liar.replace(first)
    last = liar.replace(liar.replace(second))
    for key in (first, second):
        assert resolved(liar, Ref(key.id, "k")).current == last.id
    assert not resolved(liar, Ref(last.id, "k")).changed


def test_links_in_a_circle_lead_nowhere(liar: Liar) -> None:
    one, two = liar.add("k"), liar.add("")
    one.links[REPLACEMENT], two.links[REPLACEMENT] = two.id, one.id
    with connect(liar) as kmip:
        assert not kmip.resolve([Ref(one.id, "k")])[0].changed


def test_a_key_without_a_name_is_known_by_its_id(liar: Liar) -> None:
    """As vCenter makes them: no name, x- attributes, no Re-key."""
    liar.names, liar.chatty, liar.rekey = False, True, False
    key = liar.add("ignored")
    with connect(liar) as kmip:
        for ref in (Ref(key.id, ""), Ref(key.id, "ignored")):
            [status] = kmip.resolve([ref])
            assert status.found and not status.changed and status.problem is None


def test_a_replacement_that_is_not_active_yet_is_not_current(liar: Liar) -> None:
    liar.activates = False
    key = liar.add("k")
    new = liar.replace(key)
    assert not resolved(liar, Ref(key.id, "k")).changed
    new.state = ACTIVE
    assert resolved(liar, Ref(key.id, "k")).current == new.id


def test_two_keys_with_one_name_the_known_one_stays_and_the_doubt_is_told(liar: Liar) -> None:
    older, known, newer = (liar.add("k") for _ in range(3))
    older.date, newer.date = known.date - 1000, known.date + 1000
    status = resolved(liar, Ref(known.id, "k"))
    assert status.found and not status.changed and isinstance(status.problem, Integrity)
    with connect(liar) as kmip:
        for ask in (kmip.locate, kmip.create):
            with pytest.raises(Integrity):
                ask("k")
        with pytest.raises(Integrity):
            kmip.rotate(Ref("gone", "k"), "k")
        assert bytes(kmip.fetch(known.id)) == known.material


def test_a_deactivated_key_gives_way_to_the_one_that_has_its_name(liar: Liar) -> None:
    known, new = liar.add("k", DEACTIVATED), liar.add("k")
    assert resolved(liar, Ref(known.id, "k")).current == new.id
    liar.add("k")
    status = resolved(liar, Ref(known.id, "k"))
    assert not status.changed and isinstance(status.problem, Integrity)


def test_a_link_and_a_name_that_point_to_different_keys(liar: Liar) -> None:
    known = liar.add("k")
    liar.replace(known)
    liar.add("k")
    status = resolved(liar, Ref(known.id, "k"))
    assert not status.changed and isinstance(status.problem, Integrity)


def test_a_key_that_is_gone_has_an_heir_only_by_a_link(liar: Liar) -> None:
    new = liar.add("k")
    assert not resolved(liar, Ref("gone", "k")).changed
    new.links[REPLACED] = "gone"
    status = resolved(liar, Ref("gone", "k"))
    assert (status.found, status.current) == (False, new.id)


def test_a_key_of_another_kind_is_no_replacement(liar: Liar) -> None:
    key = liar.add("k")
    new = liar.replace(key)
    new.length = 128
    status = resolved(liar, Ref(key.id, "k"))
    assert not status.changed


def test_a_server_that_ignores_what_it_is_asked_to_filter_by(liar: Liar) -> None:
    liar.filters = False
    keys = [liar.add(f"k{at}") for at in range(20)]
    assert not resolved(liar, Ref(keys[3].id, "k3")).changed
    with connect(liar) as kmip:
        assert kmip.locate("k7") == Ref(keys[7].id, "k7")
        assert kmip.locate("k77") is None


def test_answers_that_are_swapped_between_keys(liar: Liar) -> None:
    one, two = liar.add("k1"), liar.add("k2", DEACTIVATED)
    liar.lie("swapped answers")
    with connect(liar) as kmip, pytest.raises(Integrity):
        kmip.resolve([Ref(one.id, ""), Ref(two.id, "")])


def test_an_empty_id_is_never_sent(liar: Liar) -> None:
    with connect(liar) as kmip, pytest.raises(NotFoundOrDenied):
        kmip.fetch("")
    assert not liar.asked


# Rotation.


@pytest.fixture(params=["re-key", "re-key, inactive", "re-key, name stays", "new key", "re-key denied"])
def rotator(request: pytest.FixtureRequest, liar: Liar) -> Liar:
    liar.rekey = request.param != "new key"
    liar.activates = request.param != "re-key, inactive"
    liar.moves_names = request.param != "re-key, name stays"
    if request.param == "re-key denied":
        liar.lie("denied", on="Re-key")
    return liar


def test_rotation_twice_is_one_new_key(rotator: Liar) -> None:
    old = rotator.add("k-1")
    ref = Ref(old.id, "k-1")
    with connect(rotator) as kmip:
        new = kmip.rotate(ref, "k-2")
        assert kmip.rotate(ref, "k-2") == new
        assert bytes(kmip.fetch(new.id)) == rotator.keys[new.id].material
        third = kmip.rotate(new, "k-3")
        assert [each.changed for each in kmip.resolve([third])] == [False]
    assert list(rotator.keys) == [old.id, new.id, third.id]


@pytest.mark.parametrize("operation", OPERATIONS.values())
@pytest.mark.parametrize("fault", ["lost", "silent"])
def test_rotation_killed_at_each_step_is_one_new_key(rotator: Liar, operation: str, fault: str) -> None:
    """What was asked for is done, or not, and nobody hears of it; then another process does the same."""
    old = rotator.add("k-1")
    ref = Ref(old.id, "k-1")
    rotator.lie(fault, on=operation)
    with connect(rotator) as kmip:
        try:
            kmip.rotate(ref, "k-2")
        except ProviderUnavailable:
            """Killed here."""
    rotator.honest()
    with connect(rotator) as kmip:
        new = kmip.rotate(ref, "k-2")
        assert bytes(kmip.fetch(new.id)) == rotator.keys[new.id].material
    assert list(rotator.keys) == [old.id, new.id]


@pytest.mark.parametrize("fault", ["lost", "silent"])
def test_a_change_is_never_sent_twice_by_itself(liar: Liar, fault: str) -> None:
    liar.lie(fault, on="Create")
    with liar.replica() as other, connect(liar, other) as kmip, pytest.raises(ProviderUnavailable):
        kmip.create("k")
    assert sum(each == ["Create"] for each in liar.asked + other.asked) == 1


def test_a_change_goes_to_the_next_endpoint_when_the_first_is_not_there(liar: Liar) -> None:
    with liar.replica() as other, connect(liar, other) as kmip:
        liar.stop()
        ref = kmip.create("k")
        kmip.activate(ref.id)
        assert bytes(kmip.fetch(ref.id)) == other.keys[ref.id].material


def test_retire_what_was_never_active(liar: Liar) -> None:
    key = liar.add("k", PRE_ACTIVE)
    with connect(liar) as kmip:
        kmip.retire(key.id)
    assert key.state == PRE_ACTIVE


# Servers differ.


@pytest.mark.parametrize(
    "how",
    [
        {"versions": [(1, 3)]},
        {"versions": [(1, 2), (1, 1)]},
        {"versions": [(1, 1)]},
        {"versions": [(1, 1)], "discovers": False},
        {"versions": [(1, 2)], "hangs_up_on_versions": True},
        {"versions": [(1, 1)], "hangs_up_on_versions": True},
        {"most": 1},
        {"most": 7},
        {"most": 1, "echoes_single_id": False},
        {"most": 3, "versions": [(1, 2)]},
        {"chatty": True, "rekey": False},
    ],
    ids=str,
)
def test_servers_that_differ(liar: Liar, how: dict[str, Any]) -> None:
    vars(liar).update(how)
    with connect(liar) as kmip:
        ref = kmip.create("k-1")
        kmip.activate(ref.id)
        new = kmip.rotate(ref, "k-2")
        kmip.retire(ref.id)
        refs = [ref, new, *(kmip.create(f"k{at}") for at in range(5))]
        assert [each.found for each in kmip.resolve(refs)] == [True] * 7
        assert bytes(kmip.fetch(new.id)) == liar.keys[new.id].material
        assert kmip.locate("none") is None
        with pytest.raises(NotFoundOrDenied):
            kmip.fetch("none")
        [health] = kmip.health().endpoints
        assert health.problem is None and health.protocol == "KMIP {}.{}".format(*liar.versions[0])


def test_a_server_that_speaks_only_2_0(liar: Liar) -> None:
    liar.versions = [(2, 0)]
    with connect(liar) as kmip, pytest.raises(ProviderError) as failed:
        kmip.fetch("id-1")
    assert failed.value.code in ("unsupported", "provider-protocol")


def test_what_a_server_offers(liar: Liar) -> None:
    with connect(liar) as kmip:
        assert kmip.capabilities() == kmip.capabilities() == Capabilities(create=True, rekey=True)
    assert liar.asked == [["Query"]]
    liar.lie("unsupported", on="Query")
    with connect(liar) as kmip:
        assert kmip.capabilities() == Capabilities(create=True, rekey=False)


def test_create_where_it_is_not_offered(liar: Liar) -> None:
    liar.lie("unsupported", on="Create")
    with connect(liar) as kmip, pytest.raises(Unsupported):
        kmip.create("k")
