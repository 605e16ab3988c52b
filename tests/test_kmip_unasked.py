# SPDX-License-Identifier: Apache-2.0
"""A key that is made in one request, for servers that do it and for those that do not: the host ends with one key."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.flowfixture import Host
from tests.kmipfixture import AUTHORITY, connect
from tests.lab.kmipliar import ACTIVE, DEACTIVATED, PRE_ACTIVE, Liar
from unlock.errors import ProviderError, ProviderUnavailable, UnlockError
from unlock.host.journal import Rekey
from unlock.host.provider_entry import Offers
from unlock.keys import rotation
from unlock.operations import operation, rekey
from unlock.providers import Ref
from unlock.secret import Secret

pytestmark = pytest.mark.usefixtures("key_cache")

AT_ONCE = ["Create", "Get Attributes", "Get"]


def states(liar: Liar) -> list[int]:
    return [each.state for each in liar.keys.values()]


def no_placeholder(liar: Liar) -> None:
    liar.placeholder = False


def no_batches(liar: Liar) -> None:
    liar.most = 1


def no_option(liar: Liar) -> None:
    liar.takes_continuation = False


def no_usage(liar: Liar) -> None:
    liar.takes_export = False


def older(liar: Liar) -> None:
    liar.versions = [(1, 2)]


@pytest.mark.parametrize("change", [no_placeholder, no_batches, no_option, no_usage, older])
def test_a_server_that_does_not_do_it_is_asked_step_by_step(change: Callable[[Liar], None]) -> None:
    with Liar(AUTHORITY, rekey=False) as liar:
        old = liar.add("k-1")
        change(liar)
        with connect(liar, offers=Offers((1, 4), rekey=False)) as kmip:
            new, key = kmip.rotate_unasked(Ref(old.id, "k-1"), "k-2")
            if key is None:
                key = kmip.fetch(new.id)
        assert liar.asked[0] == AT_ONCE and len(liar.asked) > 2
        assert bytes(key) == liar.keys[new.id].material and states(liar) == [ACTIVE, ACTIVE]


@pytest.mark.parametrize("activates", [True, False])
def test_a_rekey_that_makes_a_key_that_is_not_active_yet(activates: bool) -> None:
    with Liar(AUTHORITY, activates=activates) as liar:
        old = liar.add("k-1")
        with connect(liar, offers=Offers((1, 4), rekey=True)) as kmip:
            new, key = kmip.rotate_unasked(Ref(old.id, "k-1"), "k-2")
        assert key and liar.asked[1:2] == [["Re-key", "Get Attributes", "Get"]] and new.name == "k-1"
        assert len(liar.asked) == (2 if activates else 3)
        assert len(liar.keys) == 2 and liar.keys[new.id].state == ACTIVE


def test_a_client_that_may_not_rekey_makes_a_new_key() -> None:
    """One refusal among three is told as one of the client; the refusal of a single request is not."""
    with Liar(AUTHORITY) as liar:
        old = liar.add("k-1")
        liar.lie("denied", on="Re-key")
        offers, password = Offers((1, 4), rekey=True), Secret(b"of the host")
        with connect(liar, offers=offers, username="host-1", password=password) as kmip:
            new, _ = kmip.rotate_unasked(Ref(old.id, "k-1"), "k-2")
        assert (new.name, liar.keys[new.id].state, len(liar.keys)) == ("k-2", ACTIVE, 2)


def test_a_key_that_the_key_manager_has_replaced_gets_no_second_replacement() -> None:
    with Liar(AUTHORITY) as liar:
        old = liar.add("k-1")
        theirs = liar.replace(old)
        with connect(liar, offers=Offers((1, 4), rekey=True)) as kmip:
            assert kmip.rotate_unasked(Ref(old.id, "k-1"), "k-2") == (Ref(theirs.id, "k-1"), None)
        assert len(liar.keys) == 2


def test_an_endpoint_that_takes_no_connection_is_passed_by() -> None:
    with Liar(AUTHORITY, rekey=False) as dead, Liar(AUTHORITY, rekey=False) as liar:
        dead.stop()
        old = liar.add("k-1")
        with connect(dead, liar, offers=Offers((1, 4), rekey=False)) as kmip:
            _, key = kmip.rotate_unasked(Ref(old.id, "k-1"), "k-2")
        assert key and liar.asked == [AT_ONCE, ["Activate", "Get Attributes"]]


@pytest.fixture
def host(tmp_path: Path, kms: Liar) -> Host:
    kms.rekey = False
    return Host(tmp_path, 2, kms)


@pytest.mark.parametrize("fault", ["lost", "silent", "hang"])
def test_an_answer_that_is_lost_makes_no_second_key(host: Host, kms: Liar, fault: str) -> None:
    begun = len(kms.keys)
    kms.lie(fault, on="Create")
    with pytest.raises(ProviderError):
        rekey.rekey(host.paths, "data", host.look)
    assert len(kms.keys) - begun == (fault != "silent") and host.group.generation == 1 and not host.state.journal
    kms.honest()
    kms.asked.clear()
    rekey.rekey(host.paths, "data", host.look)
    assert kms.asked[0] == ["Query"] and len(kms.keys) - begun == 1
    assert host.group.generation == 2 and host.boot_opens()
    assert "asked" not in json.loads(Path(host.paths.state).read_text())
    kms.asked.clear()
    rekey.rekey(host.paths, "data", host.look)
    assert [each[0] for each in kms.asked] == ["Create", "Activate", "Revoke"], "the next name was never asked for"


def test_a_key_of_a_cancelled_rekey_is_found_by_the_next(host: Host, kms: Liar) -> None:
    begun = len(kms.keys)
    with host.work() as work:
        entry = Rekey("rekey", "data", generation=2, made=None, theirs=False)
        unasked = work.state.take_name("data", 2)
        work.state.begin(entry)
        rotation.make_successor(work, host.group, entry, unasked)
    operation.cancel(host.paths, look=host.look)
    rekey.rekey(host.paths, "data", host.look)
    assert len(kms.keys) - begun == 1 and host.group.generation == 2 and host.boot_opens()


@pytest.mark.parametrize("fault", ["wrong id", "other key", "zero key", "denied", "unsupported", "garbage"])
@pytest.mark.parametrize("on", ["Create", "Activate", "Get Attributes", "Get"])
def test_no_lie_changes_a_disk_or_makes_a_second_key(host: Host, kms: Liar, on: str, fault: str) -> None:
    begun = len(kms.keys)
    kms.lie(fault, on=on)
    try:
        rekey.rekey(host.paths, "data", host.look)
    except UnlockError:
        assert host.group.generation == 1
    assert host.boot_opens()
    kms.honest()
    if host.group.generation == 1:
        rekey.rekey(host.paths, "data", host.look)
    assert len(kms.keys) - begun == 1 and host.group.generation == 2 and host.boot_opens()


def test_a_retired_key_is_retired_again_in_one_request() -> None:
    with Liar(AUTHORITY) as liar, connect(liar) as kmip:
        for state in (ACTIVE, DEACTIVATED, PRE_ACTIVE):
            key = liar.add(f"k-{state}", state)
            before = liar.traffic()
            kmip.retire(key.id)
            assert (liar.traffic() - before).requests == 1 and key.state != ACTIVE
        liar.lie("failure", on="Revoke")
        with pytest.raises(ProviderUnavailable):
            kmip.retire(liar.add("k").id)
