# SPDX-License-Identifier: Apache-2.0
"""Many hosts, one key manager: after a power failure they do not all come at once, by the timer that is installed."""

import configparser
import threading
import time
from pathlib import Path

from tests.kmipfixture import AUTHORITY, connect
from tests.lab.kmipserver import KmipServer, Traffic
from unlock.errors import ProviderError
from unlock.providers import KeyStatus, Ref

SYSTEMD = Path(__file__).parents[1] / "system"
SITE = 1000
"""Hosts that the window of the timer must be long enough for."""
HOSTS, KEYS = 24, 5
"""Clients of the test, and how many keys each asks for: those of four groups and the host key."""


def unit(name: str) -> configparser.ConfigParser:
    parser = configparser.ConfigParser(interpolation=None, delimiters="=", strict=False)
    parser.optionxform = str  # type: ignore[method-assign,assignment]
    parser.read(SYSTEMD / name)
    return parser


def seconds(text: str) -> float:
    return float(text.removesuffix("min")) * 60 if text.endswith("min") else float(text.removesuffix("s"))


def test_the_window_of_the_timer_is_long_enough_for_a_site(tmp_path: Path) -> None:
    """Real clients at a real server, all at once: what each costs it, and that none is turned away. At that price the
    hosts of a site, which systemd spreads over the window (systemd.timer(5)), keep the server busy for a part of it.
    """
    timer = unit("unlock-sync.timer")["Timer"]
    assert timer["FixedRandomDelay"] == "yes"
    assert seconds(timer["AccuracySec"]) <= 1, "systemd may gather what is this close"
    with KmipServer(tmp_path, AUTHORITY) as server:
        with connect(server) as admin:
            refs = [admin.create(f"key-{number}") for number in range(KEYS)]
        before, begun = server.traffic(), time.monotonic()
        found = ask_at_once(server, refs)
        each = (time.monotonic() - begun) / HOSTS
        assert server.traffic() - before == Traffic(connections=HOSTS, requests=HOSTS)
    assert [[(status.found, status.changed) for status in statuses] for statuses in found] == [
        [(True, False)] * KEYS
    ] * HOSTS
    assert SITE * each < seconds(timer["RandomizedDelaySec"]) / 4


def ask_at_once(server: KmipServer, refs: list[Ref]) -> list[list[KeyStatus]]:
    """What each client is told of the keys; nothing for one that is turned away."""
    found: list[list[KeyStatus]] = []
    start = threading.Barrier(HOSTS)

    def host() -> None:
        with connect(server) as kmip:
            start.wait()
            try:
                found.append(kmip.resolve(refs))
            except ProviderError:
                found.append([])

    threads = [threading.Thread(target=host) for _ in range(HOSTS)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return found


def test_the_service_reads_the_key_cache_and_reaches_no_tpm() -> None:
    service = unit("unlock-sync.service")["Service"]
    assert service["KeyringMode"] == "shared"
    assert "/dev/tpmrm0" in service["InaccessiblePaths"]
    assert service["SuccessExitStatus"] == "20", "a key manager that is away is no failure"
