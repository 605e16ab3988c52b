# SPDX-License-Identifier: Apache-2.0
"""The provider `kmip` against servers that are right in their own way: each gets a whole life of keys."""

from collections.abc import Iterator
from typing import Any

import pytest

from tests.kmipfixture import AUTHORITY, connect
from tests.lab import kmipliar
from tests.lab.kmipliar import Liar
from unlock.errors import NotFoundOrDenied, Unsupported
from unlock.providers import Ref

EXTRAS = b"".join(
    [
        kmipliar.text(0x540001, "a vendor's own"),
        kmipliar.structure(0x540002, kmipliar.blob(0x540003, b"\xff" * 9), kmipliar.number(0x540004, -1)),
        kmipliar._ttlv(0x540005, 7, b"\xff\xfe not UTF-8"),
        kmipliar._ttlv(0x540006, 0x0B, bytes(8)),
        kmipliar.number(0x4200D5, 1),
    ]
)


@pytest.fixture
def liar() -> Iterator[Liar]:
    with Liar(AUTHORITY) as liar:
        yield liar


@pytest.mark.parametrize(
    "how",
    [
        {"stops": True},
        {"most": 1, "refuses_by_id": True},
        {"most": 4, "refuses_by_id": True},
        {"echoes_ids": False},
        {"echoes_ids": False, "most": 3},
        {"hangs_up_after_each": True},
        {"backwards": True},
        {"picky": True},
        {"picky": True, "lacks": {"Link"}},
        {"extras": EXTRAS},
        {"lacks": {"Link", "Object Type", "Cryptographic Algorithm", "Cryptographic Length"}},
        {"chatty": True, "filters": False, "backwards": True, "rekey": False},
        {"versions": [(1, 2)], "refuses_as": (2, 0), "discovers": False},
        {"takes_continuation": False},
        {"stops": True, "cancels": True},
        {"stops": True, "cancels": True, "backwards": True},
        {"picky": True, "picky_as": 0x01},
        {"picky": True, "picky_as": 0x1F, "lacks": {"Link"}},
        {"wants_export": True},
        {"takes_export": False},
        {"respell": str.upper},
        {"respell": str.upper, "filters": False, "moves_names": False},
    ],
    ids=lambda how: ", ".join(how),
)
def test_a_life_of_keys(liar: Liar, how: dict[str, Any]) -> None:
    vars(liar).update(how)
    with connect(liar) as kmip:
        ref = kmip.create("k-1")
        for _ in range(2):
            kmip.activate(ref.id)
        new = kmip.rotate(ref, "k-2")
        assert kmip.rotate(ref, "k-2") == new
        for _ in range(2):
            kmip.retire(ref.id)
        refs = [Ref("gone", "never"), *(kmip.create(f"k{at}") for at in range(5)), new]
        assert [each.found for each in kmip.resolve(refs)] == [False, *[True] * 6]
        assert not any(each.changed for each in kmip.resolve(refs))
        assert bytes(kmip.fetch(new.id)) == liar.key(new.id).material
        assert kmip.locate("none") is None
        with pytest.raises(NotFoundOrDenied):
            kmip.fetch("none")
        [health] = kmip.health().endpoints
        assert health.problem is None
    assert len(liar.keys) == 7, "no key was made twice"


@pytest.mark.parametrize("discovers", [True, False])
def test_a_server_of_kmip_2_only_is_told_by_name(liar: Liar, discovers: bool) -> None:
    liar.versions, liar.discovers = [(2, 1), (2, 0)], discovers
    with connect(liar) as kmip, pytest.raises(Unsupported, match=r"1\.1 to 1\.4"):
        kmip.fetch("id-1")


def test_a_server_that_knows_its_keys_well_is_asked_once(liar: Liar) -> None:
    """The ways round are for those who need them."""
    refs = [Ref(liar.add(f"k{at}").id, f"k{at}") for at in range(50)]
    with connect(liar) as kmip:
        kmip.resolve(refs)
        assert liar.traffic() == (1, 1)
