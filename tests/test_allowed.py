# SPDX-License-Identifier: Apache-2.0
"""Which boots the TPM allows and why: predicted, booted, gone again; killed at every step. On a software TPM."""

import os
from collections.abc import Iterator
from functools import partial
from pathlib import Path

import pytest

from tests.eventlogs import Boot, Unmeasured
from tests.hostfixture import Machine
from tests.killing import Killer
from unlock.errors import NoKey, Tampered, UnlockError, Usage
from unlock.host import keyring
from unlock.operations import init
from unlock.predict import allowed_states
from unlock.secret import Secret
from unlock.tpm import pcr_policy

pytestmark = pytest.mark.usefixtures("key_cache")

OLD, NEW = Boot("direct"), Boot("direct", kernel="another", initrd="another")
WRITES = {"NV_Write", "EvictControl", "Create", "NV_DefineSpace", "NV_UndefineSpace"}


@pytest.fixture
def host(tmp_path: Path) -> Iterator[Machine]:
    machine = Machine(tmp_path, OLD)
    yield machine
    machine.close()


def test_a_predicted_kernel_boots_and_the_old_one_still_does(host: Machine) -> None:
    assert host.reasons() == ["this boot"]
    host.predict(("kernel 6.12.48", NEW))
    assert host.reasons() == ["this boot", "predicted: kernel 6.12.48"]
    assert host.boot(Boot("direct", kernel="an attacker's")) == "pcr-mismatch"
    assert host.boot(NEW) == "unsealed"
    assert host.reasons() == ["the boot before", "this boot"]
    assert host.boot(OLD) == "unsealed"


def test_predictions_replace_each_other_and_leave_what_has_booted(host: Machine) -> None:
    first = host.allows().record.branches[0]
    third = Boot("direct", kernel="third")
    host.predict(("second", NEW))
    host.predict(("third", third))
    assert host.reasons() == ["this boot", "predicted: third"]
    assert host.boot(NEW) == "pcr-mismatch"
    assert host.boot(third) == "unsealed"
    found = host.predict(("second", NEW))
    assert [each.why for each in found.states] == ["the boot before", "this boot", "predicted: second"]
    assert found.record.branches[0] == first
    assert [each.why for each in host.predict().states] == ["the boot before", "this boot"]
    assert host.boot(OLD) == "unsealed"


def test_the_same_prediction_again_writes_nothing(host: Machine) -> None:
    host.predict(("kernel", NEW))
    host.chip.proxy.clear()
    file = Path(host.paths.state).stat()
    host.predict(("kernel", NEW))
    host.predict(("kernel", NEW), ("the same again", NEW), ("as now", OLD))
    assert not WRITES & set(host.chip.proxy.commands)
    assert Path(host.paths.state).stat().st_ino == file.st_ino


def test_there_is_room_for_eight(host: Machine) -> None:
    boots = [(f"kernel {i}", Boot("direct", kernel=f"kernel {i}")) for i in range(8)]
    with pytest.raises(Usage, match="7 have room"):
        host.predict(*boots)
    assert host.reasons() == ["this boot"]
    host.predict(*boots[:7])
    assert len(host.reasons()) == 8
    assert host.boot(boots[6][1]) == "unsealed"


def test_without_its_reason_a_state_still_opens_and_is_unknown(host: Machine) -> None:
    host.predict(("kernel", NEW))
    state = host.state
    state.tpm = state.tpm._replace(states={})
    state.save()
    assert host.reasons() == ["this boot", "unknown"]
    host.predict(("kernel", NEW))
    assert host.reasons() == ["this boot", "predicted: kernel"]


def test_another_key_in_the_cache_is_never_sealed(host: Machine) -> None:
    before = host.allows().record
    keyring.put("unlock:persistence", Secret(bytes(32)))
    with pytest.raises(Tampered):
        host.predict(("kernel", NEW))
    keyring.flush()
    with pytest.raises(NoKey):
        host.predict(("kernel", NEW))
    assert host.allows().record == before


def test_a_boot_whose_state_cannot_be_told_keeps_every_state(tmp_path: Path) -> None:
    """systemd extends PCR 11, and no log accounts for it."""
    uki = Boot("uki")
    host = Machine(tmp_path, uki)
    host.boot(uki, log=False)
    assert not host.allows().opened
    for number in range(7):
        found = host.predict((f"{number}", Boot("uki", kernel=f"{number}")))
        assert len(found.states) == number + 2
    with pytest.raises(UnlockError) as caught:
        host.predict(("7", Boot("uki", kernel="7")))
    assert caught.value.code == "pcr-unknown"
    assert host.boot(uki) == "unsealed"
    assert len(host.predict().states) == 1
    host.close()


def test_a_unified_kernel_image_is_sealed_to_what_it_was_before_systemd_went_on(tmp_path: Path) -> None:
    host = Machine(tmp_path, Boot("uki"))
    assert host.boot() == "unsealed"
    assert host.allows().opened == pcr_policy.branch((4, 7, 11, 12, 15), host.values(Boot("uki")))
    host.close()


def test_init_on_a_unified_kernel_image_seals_what_the_next_boot_has(tmp_path: Path) -> None:
    host = Machine(tmp_path, Boot("uki"))
    os.unlink(host.paths.state)
    host.clear()
    host.write("sys/firmware/efi/efivars/StubInfo-4a67b082", b"")
    assert host.boot() == "no-slot"
    accepted = frozenset(("unauthenticated-root",))
    asked = init.InitChoices(str(tmp_path / "backup"), Secret(b"password"), accepted, (), Secret(b""), host.chip.tcti)
    assert init.init(host.paths, asked).boot == "UKI"
    assert host.reasons() == ["this boot"]
    assert host.boot() == "unsealed"
    assert host.boot(Boot("uki", initrd="another")) == "pcr-mismatch"
    host.close()


def test_init_refuses_an_initramfs_that_is_not_measured(tmp_path: Path) -> None:
    host = Machine(tmp_path, Unmeasured("direct"))
    os.unlink(host.paths.state)
    host.clear()
    assert host.boot() == "no-slot"
    host.write("sys/firmware/efi/fw_platform_size", b"64\n")

    def asked(*accepted: str) -> init.InitChoices:
        risks = frozenset(("unauthenticated-root", *accepted))
        return init.InitChoices(str(tmp_path / "backup"), Secret(b"password"), risks, (), Secret(b""), host.chip.tcti)

    with pytest.raises(UnlockError) as caught:
        init.init(host.paths, asked())
    assert caught.value.code == "unmeasured-boot" and "initrd=" in caught.value.hint
    assert init.init(host.paths, asked("unmeasured-boot")).boot == "direct kernel"
    assert host.boot() == "unsealed"
    host.close()


def test_init_refuses_a_pcr_whose_value_at_the_unseal_cannot_be_told(tmp_path: Path) -> None:
    host = Machine(tmp_path, Boot("uki"))
    os.unlink(host.paths.state)
    host.clear()
    host.boot(log=False)
    accepted = frozenset(("unauthenticated-root", "unmeasured-boot"))
    asked = init.InitChoices(
        str(tmp_path / "backup"), Secret(b"password"), accepted, (7, 11), Secret(b""), host.chip.tcti
    )
    with pytest.raises(UnlockError) as caught:
        init.init(host.paths, asked)
    assert caught.value.code == "pcr-unknown"
    host.close()


def test_killed_anywhere_both_boots_open_and_it_finishes(tmp_path: Path, killer: Killer) -> None:
    host = Machine(tmp_path, OLD)

    def coming(attempt: int) -> tuple[str, Boot]:
        return f"kernel {attempt}", Boot("direct", kernel=f"{attempt}")

    for attempt, _ in killer(lambda attempt: partial(host.predict, coming(attempt))):
        assert host.boot(OLD) == "unsealed"
        assert host.reasons()[0] == "this boot" and allowed_states.UNKNOWN not in host.reasons()
        host.predict(coming(attempt))
        assert host.reasons() == ["this boot", f"predicted: kernel {attempt}"]
    host.close()
