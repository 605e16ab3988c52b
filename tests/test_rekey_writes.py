# SPDX-License-Identifier: Apache-2.0
"""What a shallow rekey of 24 disks writes and asks for, counted beside `cryptsetup luksChangeKey` of one disk.

A header write is an update of both copies of the LUKS2 header: the JSON of each once, each followed by a flush. The
headers have the default size: 4096 bytes, then 12288 of JSON.
"""

import re
import subprocess
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import pytest

from tests.flowfixture import Host
from tests.killing import trace_of
from tests.kmipfixture import AUTHORITY
from tests.lab.kmipliar import Liar
from tests.lab.kmipserver import KmipServer, Traffic
from unlock.keys import access
from unlock.operations import rekey
from unlock.providers import ACTIVE, DEACTIVATED, Ref

pytestmark = pytest.mark.usefixtures("key_cache")

DISKS = 24
JSON = 12288
CHANGE = ("cryptsetup", "luksChangeKey", "--batch-mode", "--pbkdf=pbkdf2", "--pbkdf-force-iterations=1000")
"""The least that a passphrase costs, as a recovery key: what is left is the work on the header."""


class Cost(NamedTuple):
    """Of one disk."""

    headers: float
    """Header writes."""
    written: int
    """Bytes."""
    flushes: int


def costs(work: Callable[[], object], disks: list[Path]) -> list[Cost]:
    """Of each disk."""
    sizes: dict[str, list[int]] = {str(each): [] for each in disks}
    flushes: Counter[str] = Counter()
    for line in trace_of("write,pwrite64,writev,pwritev,pwritev2,fsync,fdatasync,sync_file_range,mmap", work):
        found = re.search(r" (\w+)\(.*?<([^>]*)>.* = (\d+)$", line)
        if found and found[2] in sizes:
            assert found[1] in ("write", "pwrite64", "fsync", "fdatasync") or "MAP_SHARED" not in line, line
            if "sync" in found[1]:
                flushes[found[2]] += 1
            elif "write" in found[1]:
                sizes[found[2]].append(int(found[3]))
    return [
        Cost(headers=size.count(JSON) / 2, written=sum(size), flushes=flushes[name]) for name, size in sizes.items()
    ]


def change_key(image: Path, old: Path, new: Path) -> Callable[[], object]:
    return lambda: subprocess.run([*CHANGE, f"--key-file={old}", str(image), str(new)], check=True)


@pytest.fixture
def keys(tmp_path: Path) -> tuple[Path, Path]:
    made = tmp_path / "old", tmp_path / "new"
    for each in made:
        each.write_text(each.name)
    return made


@pytest.fixture
def peer(tmp_path: Path, keys: tuple[Path, Path]) -> Path:
    """A disk of cryptsetup's, of the same size."""
    image = tmp_path / "peer"
    with image.open("wb") as file:
        file.truncate(32 << 20)
    fast = ["--batch-mode", "--pbkdf=pbkdf2", "--pbkdf-force-iterations=1000", f"--key-file={keys[0]}"]
    subprocess.run(["cryptsetup", "luksFormat", "--type=luks2", *fast, str(image)], check=True)
    return image


def asked(kms: Liar) -> list[list[str]]:
    return [list(request) for request in kms.asked]


READ = ["Get Attributes", "Get"]
RETIRED = ["Revoke", "Get Attributes"]
REQUESTS = {
    "Create": [["Create", *READ], ["Activate", "Get Attributes"], RETIRED],
    "Re-key": [["Get Attributes", "Locate"], ["Re-key", *READ], RETIRED],
}
"""All that a rekey asks for. PyKMIP's server knows no Activate without an id, which the first answer gives. The old key
is retired when the last disk has the new one. Whether a key has a replacement already is known before a Re-key makes
one."""


def test_a_rekey_of_24_disks_is_3_requests_on_one_connection(
    tmp_path: Path, record_property: Callable[..., None]
) -> None:
    with KmipServer(tmp_path / "kms", AUTHORITY) as server:
        host = Host(tmp_path, DISKS, server)
        old = host.group.kek
        before = server.traffic()
        rekey.rekey(host.paths, "data", host.look)
        traffic = server.traffic() - before
        assert traffic == Traffic(connections=1, requests=3)
        with host.work() as work:
            status = {each.ref.id: each.state for each in work.provider().resolve(refs(work, old, host.group.kek))}
        assert list(status.values()) == [DEACTIVATED, ACTIVE]
    assert host.group.generation == 2 and host.boot_opens() and host.recovery_opens() and not host.state.retire
    record_property("shown", f"shallow rekey of {DISKS} disks: {traffic.requests} requests to PyKMIP's server")


def refs(work: access.Work, *keks: str) -> list[Ref]:
    return [access.key_ref(work.state.provider, each, "") for each in keks]


@pytest.mark.parametrize("changes", ["Create", "Re-key"])
def test_24_disks_cost_two_header_writes_each_and_one_key_of_the_provider(
    tmp_path: Path, kms: Liar, peer: Path, keys: tuple[Path, Path], changes: str, record_property: Callable[..., None]
) -> None:
    kms.rekey = changes == "Re-key"
    host = Host(tmp_path, DISKS, kms)
    host.add_group("small", 1)
    (change,) = costs(change_key(peer, *keys), [peer])
    begun = len(kms.asked)
    each = costs(lambda: rekey.rekey(host.paths, "data", host.look), host.disks[:DISKS])
    requests = asked(kms)[begun:]
    assert each == [Cost(headers=2, written=4 * (JSON + 2 * 4096), flushes=4)] * DISKS
    assert all(mine <= theirs for mine, theirs in zip(each[0], change, strict=True)), f"{each[0]} beside {change}"
    assert host.group.generation == 2 and host.boot_opens() and host.recovery_opens()

    assert requests == REQUESTS[changes]
    begun = len(kms.asked)
    rekey.rekey(host.paths, "small", host.look)
    assert asked(kms)[begun:] == requests, "as many requests as for one disk"

    begun_at = time.monotonic()
    rekey.rekey(host.paths, "data", host.look)
    ours = time.monotonic() - begun_at
    begun_at = time.monotonic()
    change_key(peer, keys[1], keys[0])()
    theirs = time.monotonic() - begun_at
    record_property(
        "shown",
        f"shallow rekey of {DISKS} disks, {changes}: {ours:.2f} s, {ours / theirs:.1f} times luksChangeKey of one; "
        f"a disk: {each[0].headers:.0f} header writes, {each[0].written >> 10} KiB, {each[0].flushes} flushes, beside "
        f"{change.headers:.0f}, {change.written >> 10} KiB, {change.flushes}; {len(requests)} requests",
    )


def test_a_rekey_that_is_run_again_writes_two_headers_again_and_sync_none(tmp_path: Path, kms: Liar) -> None:
    from unlock.operations import sync

    host = Host(tmp_path, 2, kms)
    rekey.rekey(host.paths, "data", host.look)
    assert [each.headers for each in costs(lambda: rekey.rekey(host.paths, "data", host.look), host.disks)] == [2, 2]
    nothing = [Cost(headers=0, written=0, flushes=0)] * 2
    assert costs(lambda: sync.sync(host.paths, host.look), host.disks) == nothing
