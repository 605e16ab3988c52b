# SPDX-License-Identifier: Apache-2.0
"""A firmware update and its window: opened, booted through, closed; refused, cut off and killed. On a software TPM."""

import json
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

import pytest

from tests.eventlogs import Boot
from tests.hostfixture import Machine
from tests.killing import Killer
from unlock import cli
from unlock.errors import NoKey, Refused, Usage
from unlock.host import keyring
from unlock.operations import check, policy, predict, rebind, status
from unlock.paths import Paths
from unlock.predict import allowed_states
from unlock.secret import Secret

pytestmark = pytest.mark.usefixtures("key_cache")

OLD = Boot("direct")
UPDATED = Boot("direct", dbx=230)
"""The firmware measures something else into PCR 7."""
THIEF = Boot("direct", initrd="a thief's")
WRITES = {"NV_Write", "EvictControl", "Create", "NV_DefineSpace", "NV_UndefineSpace"}


@pytest.fixture
def host(tmp_path: Path) -> Iterator[Machine]:
    machine = Machine(tmp_path, OLD)
    yield machine
    machine.close()


def good(host: Machine, boot: Boot | None = None) -> None:
    assert host.boot(boot) == "unsealed"
    policy.good_boot(host.paths, host.chip.tcti)


def opened(host: Machine) -> allowed_states.Allowed:
    return policy.open_window(host.paths, 1, (), host.chip.tcti)


def shown(host: Machine) -> policy.PolicyReport:
    found = policy.show(host.paths, host.chip.tcti)
    assert json.loads(json.dumps(found)) == found
    assert policy.table(found)
    return found


def test_a_firmware_update_goes_through_a_window_that_closes_itself(host: Machine) -> None:
    assert host.boot(UPDATED) == "pcr-mismatch"
    good(host, OLD)
    found = opened(host)
    assert found.record.selection == (9, 15)
    assert shown(host)["window"]
    policy.good_boot(host.paths, host.chip.tcti)  # the same boot: not one of those that count
    assert shown(host)["window"]
    assert host.boot(THIEF) == "pcr-mismatch"  # what the kernel measures still counts
    policy.good_boot(host.paths, host.chip.tcti)
    assert host.boot(UPDATED) == "unsealed"
    assert "OPEN" in policy.table(shown(host))
    policy.good_boot(host.paths, host.chip.tcti)
    assert shown(host)["window"] is None and shown(host)["pcrs"] == [4, 7, 9, 15]
    assert host.reasons() == ["this boot"] and not host.allows().states[0].proven
    assert host.boot(OLD) == "pcr-mismatch"
    good(host, UPDATED)
    assert host.allows().states[0].proven


def test_a_window_of_two_boots_and_the_pcr_that_was_kept(host: Machine) -> None:
    policy.open_window(host.paths, 2, (4,), host.chip.tcti)
    assert host.allows().record.selection == (4, 9, 15)
    good(host, UPDATED)
    assert shown(host)["window"]
    good(host, UPDATED)
    assert shown(host)["window"] is None
    for boots, keep in ((1, (3,)), (0, ()), (9, ())):
        with pytest.raises(Usage):
            policy.open_window(host.paths, boots, keep, host.chip.tcti)


def test_closed_by_hand_it_is_closed_and_only_this_boot_is_left(host: Machine) -> None:
    host.predict(("kernel", Boot("direct", kernel="another")))
    opened(host)
    good(host, UPDATED)
    policy.close_window(host.paths, host.chip.tcti)
    host.predict(("kernel", Boot("direct", kernel="another", dbx=230)))
    assert host.boot(Boot("direct", kernel="another", dbx=230)) == "unsealed"
    for _ in range(2):
        policy.close_window(host.paths, host.chip.tcti)
        assert host.reasons() == ["this boot"]
    assert host.boot(UPDATED) == "pcr-mismatch"


def test_other_pcrs(host: Machine) -> None:
    for _ in range(2):
        policy.set_policy(host.paths, (7, 9), tcti=host.chip.tcti)
        assert host.allows().record.selection == (7, 9, 15) and host.reasons() == ["this boot"]
    good(host)
    opened(host)
    good(host)
    assert shown(host)["pcrs"] == [7, 9, 15]
    assert host.boot(Boot("direct", kernel="another")) == "unsealed"  # PCR 4 counts no more
    with pytest.raises(Usage):
        policy.set_policy(host.paths, (16,), tcti=host.chip.tcti)
    assert host.boot(THIEF) == "pcr-mismatch"


def test_a_good_boot_with_nothing_new_writes_nothing(host: Machine) -> None:
    good(host)
    assert host.allows().states[0].proven
    file = Path(host.paths.state).stat()
    good(host)
    policy.good_boot(host.paths, host.chip.tcti)
    assert not WRITES & set(host.chip.proxy.commands)
    assert Path(host.paths.state).stat().st_ino == file.st_ino


def test_the_predicted_state_that_booted_is_proven_and_the_former_is_the_boot_before(host: Machine) -> None:
    new = Boot("direct", kernel="another")
    good(host)
    host.predict(("kernel 2", new))
    good(host, new)
    states = host.allows().states
    assert [(each.why, each.proven) for each in states] == [("the boot before", True), ("this boot", True)]
    good(host, OLD)
    assert host.reasons() == ["this boot", "the boot before"]


def test_the_key_cache_was_flushed(host: Machine) -> None:
    opened(host)
    assert host.boot(UPDATED) == "unsealed"
    keyring.flush()
    with pytest.raises(NoKey) as caught:
        policy.good_boot(host.paths, host.chip.tcti)
    assert "it was flushed" in str(caught.value) and caught.value.hint.startswith("after a flush: reboot")
    with pytest.raises(NoKey):
        policy.close_window(host.paths, host.chip.tcti)
    good(host, UPDATED)
    assert shown(host)["window"] is None


def test_a_boot_that_is_not_allowed_closes_nothing(host: Machine) -> None:
    key = keyring.get("unlock:persistence")
    assert host.boot(UPDATED) == "pcr-mismatch"
    keyring.put("unlock:persistence", key)  # however it came there
    with pytest.raises(Refused):
        policy.close_window(host.paths, host.chip.tcti)
    with pytest.raises(Refused):
        opened(host)
    assert host.boot(OLD) == "unsealed"


def test_status_says_loudly_that_a_window_is_open(host: Machine) -> None:
    assert "window" not in status.to_text(status.read_status(host.paths))
    opened(host)
    assert "a window is open" in status.to_text(status.read_status(host.paths))
    state = host.state
    assert state.tpm.window
    state.tpm = state.tpm._replace(window=state.tpm.window._replace(since="2020-01-01T00:00:00Z"))
    state.save()
    assert "WINDOW" in status.to_text(status.read_status(host.paths))


def test_what_was_predicted_outlives_a_closing_that_was_killed_in_its_last_step(host: Machine) -> None:
    new = Boot("direct", kernel="another")
    opened(host)
    before = host.state.tpm.window
    policy.close_window(host.paths, host.chip.tcti)
    state = host.state
    state.tpm = state.tpm._replace(window=before)
    state.save()
    host.predict(("kernel", new))
    good(host)
    assert host.reasons() == ["this boot", "predicted: kernel"] and not host.state.tpm.window


@pytest.mark.turns
@pytest.mark.parametrize("what", ["opening", "closing"])
def test_killed_anywhere_a_window_is_never_forgotten(host: Machine, what: str, killer: Killer) -> None:
    def begin(_: int) -> Callable[[], object]:
        if what == "opening":
            return partial(opened, host)
        opened(host)
        return partial(policy.close_window, host.paths, host.chip.tcti)

    for _ in killer(begin):
        found = host.allows()
        assert found.window or found.record.selection == (4, 7, 9, 15)
        assert host.boot(OLD) == "unsealed"
        policy.good_boot(host.paths, host.chip.tcti)
        assert host.allows().record.selection == (4, 7, 9, 15) and not host.state.tpm.window
        assert allowed_states.UNKNOWN not in host.reasons()


@pytest.mark.parametrize(
    "command",
    [
        check.check,
        policy.show,
        lambda paths, tcti: policy.open_window(paths, 1, (), tcti),
        policy.close_window,
        lambda paths, tcti: policy.set_policy(paths, (4,), None, tcti),
        predict.predict_and_allow,
        rebind.needs_pin,
        lambda paths, tcti: rebind.rebind(paths, rebind.RebindChoices(Secret(b""), tcti=tcti)),
    ],
)
def test_a_host_that_is_not_initialised_is_told_so_before_its_tpm_is_asked(
    tmp_path: Path, command: Callable[[Paths, str], object]
) -> None:
    with pytest.raises(Refused, match="not initialised") as caught:
        command(Paths(str(tmp_path)), "device:/dev/there-is-none")
    assert (caught.value.code, caught.value.hint) == ("not-initialised", "unlock init")


@pytest.mark.parametrize(
    "line",
    [
        "policy show --json",
        "policy window --reboots 1 --keep 4,7",
        "policy close --owner-auth-file FILE",
        "policy set --pcrs 4,7,9",
        "rebind --recovery-key-file R --backup B --backup-password-file P --accept unauthenticated-root",
        "rebind --client-key K --pcrs 7,9",
    ],
)
def test_the_words_of_the_command_line(line: str) -> None:
    assert cli._parser().parse_args(line.split()).run.__module__ == f"unlock.cli.{line.split()[0]}"


@pytest.mark.parametrize(
    "option", ["policy window --reboots 1 --keep", "policy set --pcrs", "rebind --pcrs", "init --pcrs"]
)
def test_what_is_no_list_of_pcrs_is_said_in_words(option: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        cli._parser().parse_args([*option.split(), "4;7"])
    assert "'4;7': PCR numbers are wanted, as in 4,7,9" in capsys.readouterr().err
