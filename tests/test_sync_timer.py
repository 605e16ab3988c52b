# SPDX-License-Identifier: Apache-2.0
"""Many hosts, one key manager: after a power failure they do not all come at once, by the timer that is installed."""

import configparser
import random
from collections import Counter
from pathlib import Path

SYSTEMD = Path(__file__).parents[1] / "system"
HOSTS = 1000
SYNC = 1.0
"""Seconds that one host's connection stays open: far more than a sync with nothing changed."""


def unit(name: str) -> configparser.ConfigParser:
    parser = configparser.ConfigParser(interpolation=None, delimiters="=", strict=False)
    parser.optionxform = str  # type: ignore[method-assign,assignment]
    parser.read(SYSTEMD / name)
    return parser


def seconds(text: str) -> float:
    return float(text.removesuffix("min")) * 60 if text.endswith("min") else float(text.removesuffix("s"))


def test_a_thousand_hosts_spread_over_the_window_of_the_timer() -> None:
    """systemd draws a host's fixed delay evenly from RandomizedDelaySec (systemd.timer(5))."""
    timer = unit("unlock-sync.timer")["Timer"]
    assert timer["FixedRandomDelay"] == "yes"
    window = seconds(timer["RandomizedDelaySec"])
    assert seconds(timer["AccuracySec"]) <= 1, "systemd may gather what is this close"
    peaks = []
    for seed in range(20):
        dice = random.Random(seed)
        starts = sorted(dice.uniform(0, window) for _ in range(HOSTS))
        minutes = Counter(int(start // 60) for start in starts)
        concurrent = max(
            sum(start <= at < start + SYNC for start in starts[max(0, i - 50) : i + 1]) for i, at in enumerate(starts)
        )
        peaks.append((max(minutes.values()) / (HOSTS * 60 / window), concurrent))
    print(
        f"\npeak minute / mean: {max(peak for peak, _ in peaks):.2f}; connections at once: {max(c for _, c in peaks)}"
    )
    assert max(peak for peak, _ in peaks) <= 2
    assert max(concurrent for _, concurrent in peaks) <= HOSTS // 50


def test_the_service_reads_the_key_cache_and_reaches_no_tpm() -> None:
    service = unit("unlock-sync.service")["Service"]
    assert service["KeyringMode"] == "shared"
    assert "/dev/tpmrm0" in service["InaccessiblePaths"]
    assert service["SuccessExitStatus"] == "20", "a key manager that is away is no failure"
