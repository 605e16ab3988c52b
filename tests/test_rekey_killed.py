# SPDX-License-Identifier: Apache-2.0
"""`unlock rekey` killed anywhere: every disk still opens, and the same command finishes. Real headers, real KMIP."""

import random
from collections import Counter
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

import pytest
from cryptography import x509

from tests.flowfixture import Host
from tests.killing import LASTING, SAMPLE, Killer, calls_of, commit, killed_at, killed_in
from tests.kmipfixture import AUTHORITY
from tests.lab.kmipliar import ACTIVE, DEACTIVATED, PRE_ACTIVE, Liar
from tests.saved import Saved
from unlock.errors import ProviderError, StateBlocked
from unlock.host import keyring
from unlock.host.journal import Rekey
from unlock.keys import access
from unlock.operations import rekey
from unlock.providers.kmip.provider import KmipProvider

IMPORTED = (x509, KmipProvider)
"""Before any child begins: the system calls of their import are no points of interest."""

pytestmark = pytest.mark.usefixtures("key_cache")

BOUNDARIES = (
    "nothing done",
    "journaled",
    "key made",
    "key active",
    "key in the journal",
    "two tokens on a disk",
    "some disks done",
    "all disks done",
    "state saved",
    "cached",
    "retired",
    "done",
)


@pytest.fixture
def kms() -> Iterator[Liar]:
    with Liar(AUTHORITY, rekey=False) as liar:
        yield liar


@pytest.fixture
def host(tmp_path: Path, kms: Liar) -> Iterator[Host]:
    yield Host(tmp_path, 3, kms)
    keyring.flush()


def run(host: Host) -> None:
    rekey.rekey(host.paths, "data", host.look)


def reached(host: Host, kms: Liar, generation: int) -> str:
    """The last boundary of the rotation to `generation` that was passed."""
    state = host.state
    if state.journal:
        tokens = [host.tokens(image) for image in host.disks]
        done = sum(each[0][1] == generation and len(each) == 1 for each in tokens)
        made = [key for key in kms.keys.values() if f"kek/data/{generation}" in "".join(key.names)]
        if done == len(tokens):
            return "all disks done"
        if any(len(each) == 2 for each in tokens):
            return "two tokens on a disk"
        if done:
            return "some disks done"
        if isinstance(state.journal, Rekey) and state.journal.made:
            return "key in the journal"
        return {None: "journaled", PRE_ACTIVE: "key made", ACTIVE: "key active"}[made[0].state if made else None]
    if state.groups["data"].generation < generation:
        return "nothing done"
    if not state.retire:
        return "done"
    if kms.keys[state.retire[0].id.rpartition("/")[2]].state == DEACTIVATED:
        return "retired"
    return "cached" if access.cache_name(host.group.kek, generation) in keyring.names() else "state saved"


class Start:
    """The same start each time."""

    def __init__(self, host: Host, kms: Liar) -> None:
        self.host, self.kms = host, kms
        self._saved = Saved(*host.disks, host.paths.state)
        self.keys = dict(kms.keys)

    def again(self) -> None:
        self._saved.restore()
        self.kms.keys = dict(self.keys)
        for key in self.kms.keys.values():
            key.state = ACTIVE
        for name in keyring.names():
            if name.startswith("unlock:kek:"):
                keyring.forget(name)


def test_killed_at_every_boundary(host: Host, kms: Liar, killer: Killer) -> None:
    """Then everything is still there, and run again it finishes."""
    start = Start(host, kms)

    def begin(_: int) -> Callable[[], object]:
        start.again()
        return partial(run, host)

    histogram: Counter[str] = Counter()
    for attempt, _ in killer(begin):
        histogram[reached(host, kms, 2)] += 1
        assert host.boot_opens(), f"attempt {attempt}"
        assert host.recovery_opens()
        if host.state.journal:
            run(host)
            assert host.group.generation == 2
            assert host.boot_opens()
            assert all(len(host.tokens(image)) == 1 for image in host.disks)
            assert len(kms.keys) == len(start.keys) + 1, "one key, however often it is tried"
    print("\n" + "\n".join(f"{histogram[each]:5} {each}" for each in BOUNDARIES))
    assert histogram.keys() == set(BOUNDARIES)


def test_killed_at_random_points_again_and_again(host: Host, kms: Liar) -> None:
    """At system calls, in the middle of anything, one rotation after another on the same disks. Each kind of call is
    as likely, the few that change something as the many that read; how busy the machine is does not matter."""
    dice = random.Random(commit())
    histogram: Counter[str] = Counter()
    counts = calls_of(lambda: run(host))
    names = sorted(counts)
    assert counts["fsync"] > 10
    while histogram.total() < 4 * SAMPLE:
        generation = host.group.generation + 1
        name = dice.choice(names)
        if killed_in(name, dice.randint(1, counts[name]), lambda: run(host)):
            histogram[reached(host, kms, generation)] += 1
        assert host.boot_opens()
        assert host.recovery_opens()
        run(host)
        assert host.boot_opens()
        assert all(host.tokens(image) == [(host.group.kek, host.group.generation)] for image in host.disks)
    print("\n".join(f"{histogram[each]:5} {each}" for each in BOUNDARIES))


def test_a_new_key_that_was_revoked_before_it_was_used_is_not_used(host: Host, kms: Liar) -> None:
    number = 1
    while reached(host, kms, 2) != "key in the journal":
        number += 1
        assert killed_at(number, lambda: run(host), LASTING)
    revoked = next(key for key in kms.keys.values() if "kek/data/2" in "".join(key.names))
    revoked.state = DEACTIVATED
    with pytest.raises(StateBlocked):
        run(host)
    assert (host.group.generation, host.state.journal) == (1, None)
    assert host.boot_opens()
    run(host)
    assert host.group.generation == 3, "the name of generation 2 is taken for good"
    assert host.group.kek.rpartition("/")[2] != revoked.id
    assert host.boot_opens()


def test_a_rotation_that_has_reached_a_disk_stays_in_the_journal_until_it_can_go_on(tmp_path: Path, kms: Liar) -> None:
    """Policy `provider`: killed, the cache lost by a reboot, and the key manager away."""
    host = Host(tmp_path, 3, kms, policy_of_group="provider")
    number = 1
    while not any(tokens[0][1] == 2 for tokens in map(host.tokens, host.disks)):
        number += 1
        assert killed_at(number, lambda: run(host), LASTING)
    for name in keyring.names():
        if name.startswith("unlock:kek:"):
            keyring.forget(name)
    kms.stop()
    for _ in range(2):
        with pytest.raises(ProviderError):
            run(host)
        assert host.state.journal
    kms.start()
    run(host)
    assert host.state.journal is None
    assert all(host.tokens(image) == [(host.group.kek, 2)] for image in host.disks)
    keyring.flush()
