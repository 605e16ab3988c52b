# SPDX-License-Identifier: Apache-2.0
"""A site of hosts after a power cut, whose groups are all at one key manager: how many gates miss their deadline.

The server is simulated; the pauses are the product's own. And with a real server: the gates of one host ask once.
"""

import heapq
import random
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from tests.flowfixture import Host
from tests.kmipfixture import AUTHORITY, CLIENT
from tests.lab.kmipliar import Liar
from unlock.boot import gate
from unlock.boot.pauses import pause_before_retry
from unlock.errors import ProviderUnavailable
from unlock.host import config, keyring, report
from unlock.secret import Secret

HOSTS, GROUPS = 10_000, 4
HANDSHAKES = 300.0
"""That the server does in a second, one after the other, also for clients that have gone."""

Pause = Callable[[int, float, float, float], float | None]


def product(tries: int, took: float, left: float, dice: float) -> float | None:
    return pause_before_retry(tries=tries, took=took, left=left, random=dice)


def every_5_s(_tries: int, _took: float, left: float, _dice: float) -> float | None:
    return 5.0 if left >= 5.0 else None


def missed(clients: int, pause: Pause, *, spread: float, seed: int) -> int:
    """How many of the clients have no key at their deadline. They begin within `spread` seconds."""
    dice = random.Random(seed)
    queue = [(dice.uniform(0, spread), client, 0) for client in range(clients)]
    ends = {client: start + config.DEADLINE for start, client, _ in queue}
    heapq.heapify(queue)
    server_free, late = 0.0, 0
    while queue:
        now, client, tries = heapq.heappop(queue)
        server_free = max(server_free, now) + 1 / HANDSHAKES
        if server_free <= now + config.TIMEOUT:
            late += server_free > ends[client]
            continue
        failed = now + config.TIMEOUT
        again = pause(tries + 1, config.TIMEOUT, ends[client] - failed, dice.random())
        if again is None:
            late += 1
        else:
            heapq.heappush(queue, (failed + again, client, tries + 1))
    return late


@pytest.mark.parametrize("spread", [2.0, 10.0, 30.0])
def test_no_gate_of_10_000_hosts_misses_its_deadline(spread: float) -> None:
    assert [missed(HOSTS, product, spread=spread, seed=seed) for seed in range(3)] == [0, 0, 0]


def test_it_takes_both_one_connection_a_host_and_pauses_that_spread() -> None:
    """The server that is simulated is no easy one."""
    assert missed(HOSTS * GROUPS, every_5_s, spread=10.0, seed=0) > 30_000
    assert missed(HOSTS * GROUPS, product, spread=10.0, seed=0) > 30_000
    assert missed(HOSTS, every_5_s, spread=10.0, seed=0) > 5_000


@pytest.mark.parametrize("took", [0.0, 0.1, 10.0])
@pytest.mark.parametrize("dice", [0.0, 0.5, 1.0])
def test_pauses_double_are_random_and_end_before_the_deadline(took: float, dice: float) -> None:
    now, tries, pauses = 0.0, 0, []
    while (pause := pause_before_retry(tries=tries + 1, took=took, left=90.0 - now, random=dice)) is not None:
        now, tries = now + pause + took, tries + 1
        pauses.append(pause)
    assert pauses[0] >= max(took, 1.0)
    assert sum(pauses) + took * (len(pauses) - 1) <= 90.0, "each try begins before the deadline"
    assert len(pauses) <= 90
    if dice == 1.0 and took < 1.0:
        assert pauses[:4] == [3.0, 5.0, 9.0, 17.0]


def test_a_deadline_of_days_is_no_end_to_the_pauses() -> None:
    assert pause_before_retry(tries=5000, took=0.1, left=86400.0, random=1.0) == 31.0


# One host


@pytest.fixture
def host(tmp_path: Path, kms: Liar) -> Iterator[Host]:
    """Four groups whose KEKs only the key manager keeps."""
    host = Host(tmp_path, 1, kms, policy_of_group="provider")
    for name in ("b", "c", "d"):
        host.add_group(name, 1, "provider")
    yield host
    keyring.flush()


def gates(host: Host, seconds: float) -> list[Exception | None]:
    """Runs what the gates of all groups do to get their keys, side by side."""
    found: list[Exception | None] = []

    threads = [
        threading.Thread(target=lambda name: found.append(one_gate(host, name, seconds)), args=(name,))
        for name in host.state.groups
    ]
    for each in threads:
        each.start()
    for each in threads:
        each.join()
    return found


def one_gate(host: Host, name: str, seconds: float) -> Exception | None:
    try:
        gate.make_unwrap(host.paths, name, report.Report(f"gate {name}"), report.now() + seconds, host.look)
    except Exception as error:
        return error
    return None


@contextmanager
def gate_in_vain(host: Host, name: str, seconds: float) -> Iterator[None]:
    """The gate of a group asks all the while, and gets no key."""
    found: list[Exception | None] = []
    asking = threading.Thread(target=lambda: found.append(one_gate(host, name, seconds)))
    asking.start()
    time.sleep(0.7)
    try:
        yield
        assert not found, "it asks still"
    finally:
        asking.join()
    assert isinstance(found[0], ProviderUnavailable)
    assert "another gate" not in str(found[0]), "each tells what it was told"


@pytest.mark.usefixtures("key_cache")
def test_the_gates_of_one_host_ask_on_one_connection(host: Host, kms: Liar) -> None:
    before = kms.traffic()
    assert gates(host, 60.0) == [None] * 4
    traffic = kms.traffic() - before
    assert (traffic.connections, traffic.requests) == (1, 4)
    assert len([name for name in keyring.names() if name.startswith("unlock:kek:")]) == 4


@pytest.mark.usefixtures("key_cache")
def test_a_group_whose_key_is_denied_holds_up_no_other(host: Host, kms: Liar) -> None:
    kms.sick[host.group.kek.rpartition("/")[2]] = "denied"
    assert sorted(str(type(each).__name__) for each in gates(host, 60.0)) == ["NoneType"] * 3 + ["NotFoundOrDenied"]


@pytest.mark.usefixtures("key_cache")
def test_a_key_manager_that_comes_back_is_found_and_one_that_does_not_is_told_at_the_deadline(
    host: Host, kms: Liar
) -> None:
    kms.stop()
    begun = report.now()
    assert all(isinstance(each, ProviderUnavailable) for each in gates(host, 4.0))
    assert 2.0 < report.now() - begun < 30.0
    timer = threading.Timer(2.0, kms.start)
    timer.start()
    assert gates(host, 60.0) == [None] * 4
    timer.join()


@pytest.mark.usefixtures("key_cache")
def test_a_key_manager_that_hangs_up_while_it_comes_up_is_asked_again(host: Host, kms: Liar) -> None:
    kms.lie("silent")
    timer = threading.Timer(2.0, kms.honest)
    timer.start()
    assert gates(host, 60.0) == [None] * 4
    timer.join()


@pytest.mark.usefixtures("key_cache")
def test_a_group_whose_key_alone_fails_holds_up_no_other(host: Host, kms: Liar) -> None:
    kms.sick[host.group.kek.rpartition("/")[2]] = "failure"
    with gate_in_vain(host, "data", 5.0):
        assert [one_gate(host, name, 2.0) for name in ("b", "c", "d")] == [None] * 3


@pytest.mark.usefixtures("key_cache")
@pytest.mark.parametrize("seconds", [0.0, 20.0])
def test_a_group_whose_key_is_there_again_opens_while_another_asks_in_vain(
    host: Host, kms: Liar, seconds: float
) -> None:
    """Without a deadline, as `unlock open` does, it waits for no pause of others."""
    kms.sick.update({group.kek.rpartition("/")[2]: "failure" for group in host.state.groups.values()})
    with gate_in_vain(host, "data", 8.0):
        del kms.sick[host.state.groups["b"].kek.rpartition("/")[2]]
        assert one_gate(host, "b", seconds) is None


@pytest.mark.usefixtures("key_cache")
def test_a_group_at_another_key_manager_waits_for_none_that_is_dead(host: Host, kms: Liar) -> None:
    with Liar(AUTHORITY) as other:
        table = config.ProviderConfig("second", (f"127.0.0.1:{other.port}",), host.ca(), "", config.TIMEOUT)
        with Path(host.paths.config).open("a") as file:
            file.write(config.provider_table(table))
        with host.work() as work:
            entry = work.state.kmip_entry(
                name="second",
                provider_id="kmip-two",
                certificate=CLIENT.certificate,
                until=0,
                persistence=host.persistence,
                key=Secret(CLIENT.key),
            )
            work.state.use_provider(entry)
            work.state.save()
        host.add_group("e", 1, "provider")
        kms.lie("black hole")
        with gate_in_vain(host, "data", 4.0):
            began = report.now()
            assert one_gate(host, "e", 0.0) is None
            assert report.now() - began < 2.0


@pytest.mark.usefixtures("key_cache")
def test_the_gates_of_one_host_ask_no_more_often_than_one_would(host: Host, kms: Liar) -> None:
    kms.lie("failure", on="Get")
    before = kms.traffic()
    assert all(isinstance(each, ProviderUnavailable) for each in gates(host, 6.0))
    assert 2 <= (kms.traffic() - before).connections <= 6
