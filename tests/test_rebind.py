# SPDX-License-Identifier: Apache-2.0
"""A cleared TPM, another TPM, a changed boot: `unlock rebind` with the recovery key. A software TPM, real headers."""

import os
import subprocess
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

import pytest

from tests.eventlogs import Boot, Unmeasured
from tests.hostfixture import Machine
from tests.killing import Killer, killed_at
from tests.kmipfixture import AUTHORITY, CLIENT
from tests.lab.kmipliar import Liar
from unlock.disks import luks, token
from unlock.errors import ProviderUnavailable, Refused, TpmFailed, TpmRefused, UnlockError
from unlock.host import keyring, report, this_boot
from unlock.keys import access, delivery, recovery_key
from unlock.measured import diagnosis, evidence
from unlock.operations import cache, init, native_backup, rebind, recovery, sync
from unlock.operations.check.finding import UNSAFE
from unlock.operations.check.tpm import check_tpm
from unlock.secret import Secret
from unlock.tpm import pcr_policy, slots
from unlock.tpm.record import Payload

pytestmark = pytest.mark.usefixtures("key_cache", "cheap_passwords")

OLD, NEW = Boot("direct"), Boot("direct", kernel="another", initrd="another")
PASSWORD = b"of the backup"


@pytest.fixture
def host(tmp_path: Path) -> Iterator[Machine]:
    machine = Machine(tmp_path, OLD, disks=2)
    with Secret(PASSWORD) as password:
        native_backup.backup(machine.paths, backup(machine), password, look=machine.look)
    yield machine
    machine.close()


def backup(host: Machine, name: str = "backup") -> str:
    return str(host.folder / name)


def run(
    host: Machine,
    file: str = "",
    recovery: Secret | None = None,
    client_key: bytes = b"",
    accept: tuple[str, ...] = (),
) -> rebind.Rebound:
    choices = rebind.RebindChoices(
        recovery or host.recovery,
        file,
        Secret(PASSWORD) if file else None,
        Secret(client_key) if client_key else None,
        accept=frozenset(("unauthenticated-root", *accept)),
        tcti=host.chip.tcti,
    )
    return rebind.rebind(host.paths, choices, host.look)


def test_an_initramfs_that_is_not_measured_is_not_accepted_in_silence(host: Machine) -> None:
    host.write("sys/firmware/efi/fw_platform_size", b"64\n")
    host.boot(Unmeasured("direct"))
    with pytest.raises(UnlockError) as caught:
        run(host, backup(host))
    assert caught.value.code == "unmeasured-boot"
    assert host.state.journal is None
    run(host, backup(host), accept=("unmeasured-boot",))
    boots(host)


def boots(host: Machine, boot: Boot | None = None) -> None:
    """The TPM releases one key, which opens every disk that is here and the state."""
    assert host.boot(boot) == "unsealed"
    host.persistence = keyring.get("unlock:persistence")
    host.state.prove(host.persistence)
    assert host.state.journal is None
    assert host.boot_opens() and host.recovery_opens()
    assert all(len(host.tokens(image)) == 1 for image in host.disks)


def sources(host: Machine) -> dict[str, str]:
    return {row["what"]: row["source"] for row in cache.list_keys(host.paths)}


def headers(host: Machine) -> list[bytes]:
    return [image.read_bytes()[: 16 << 10] for image in host.disks]


@pytest.mark.parametrize("what", ["cleared", "changed boot", "both"])
def test_the_recovery_key_and_the_backup_bring_the_host_back(host: Machine, what: str) -> None:
    old, before = bytes(host.persistence), host.state.provider_id
    if what != "changed boot":
        host.clear()
    boot = OLD if what == "cleared" else NEW
    assert host.boot(boot) in ("no-slot", "pcr-mismatch")
    found = run(host, backup(host))
    assert len(found.done) == 2 and not found.left and not found.lost
    host.state.prove(keyring.get("unlock:persistence"))
    assert host.reasons() == ["this boot"]
    assert sources(host) == {"persistence key": "made", "KEK of group data": "provider", "host key": "provider"}
    boots(host, boot)
    assert bytes(host.persistence) != old and host.state.provider_id == before
    if what != "cleared":
        assert host.boot(OLD) == "pcr-mismatch"
    host.boot(boot)
    assert all(each.error is None for each in sync.sync(host.paths, host.look))


def test_without_the_backup_a_new_key_gets_a_new_backup(host: Machine) -> None:
    before, file = host.state.provider_id, backup(host, "new")
    host.clear()
    host.boot()
    with pytest.raises(Refused) as caught:
        run(host)
    assert caught.value.code == "backup-needed" and host.state.journal is None
    run(host, file)
    assert host.state.provider_id != before and os.path.exists(file)
    boots(host)
    assert sources(host) == {"persistence key": "TPM"}
    run(host, file)
    assert sources(host) == {"persistence key": "made", "KEK of group data": "TPM", "host key": "TPM"}
    assert host.group.generation == 2
    run(host, file)
    boots(host)


def test_run_again_with_the_key_at_hand_it_makes_another(host: Machine) -> None:
    first = bytes(host.persistence)
    host.boot()
    run(host)
    boots(host)
    second = bytes(host.persistence)
    run(host)
    boots(host)
    assert len({first, second, bytes(host.persistence)}) == 3
    assert host.group.generation == 1


def rotation_killed(host: Machine) -> Callable[[], recovery.Changed]:
    """A rotation of the recovery key that was killed between its disks; what finishes it."""
    recovery.test_recovery_key(host.paths, host.recovery, host.look)

    def rotate() -> recovery.Changed:
        return recovery.rotate_recovery_key(host.paths, delivery.Keeper(str(host.folder / "new-key")), host.look)

    assert killed_at(3, rotate, [luks.Container.add_keyslot])
    assert host.state.journal
    return rotate


def test_a_rotation_of_the_recovery_key_goes_on_after_it(host: Machine) -> None:
    host.boot()
    rotate = rotation_killed(host)
    run(host)
    assert len(rotate().done) == 2
    host.recovery = delivery.read_recovery_key(str(host.folder / "new-key"))
    boots(host)


def test_a_rotation_of_the_recovery_key_whose_key_is_lost_is_given_up(host: Machine) -> None:
    rotate = rotation_killed(host)
    host.clear()
    host.boot()
    run(host, backup(host))
    boots(host)
    os.unlink(host.folder / "new-key")
    assert len(rotate().done) == 2
    host.recovery = delivery.read_recovery_key(str(host.folder / "new-key"))
    boots(host)


def test_a_wrong_recovery_key_or_password_changes_nothing(host: Machine) -> None:
    host.clear()
    host.boot()
    before = headers(host), Path(host.paths.state).read_bytes()
    with pytest.raises(UnlockError):
        run(host, backup(host), recovery_key.new())
    choices = rebind.RebindChoices(
        host.recovery, backup(host), Secret(b"wrong"), accept=frozenset(("unauthenticated-root",)), tcti=host.chip.tcti
    )
    with pytest.raises(UnlockError):
        rebind.rebind(host.paths, choices, host.look)
    with pytest.raises(Refused) as caught:
        rebind.rebind(host.paths, choices._replace(accept=frozenset()), host.look)
    assert caught.value.code == "unauthenticated-root"
    assert (headers(host), Path(host.paths.state).read_bytes()) == before
    assert host.boot() == "no-slot"


def test_a_disk_that_was_away_opens_by_the_recovery_key_and_heals_when_it_is_back(host: Machine) -> None:
    host.clear()
    host.boot()
    away = host.disks.pop()
    found = run(host, backup(host))
    assert (found.done, found.left) == (("data-0",), {"data-1": "it is not here"})
    boots(host)
    host.disks.append(away)
    assert not host.opens(away) and host.recovery_opens()
    sync.sync(host.paths, host.look)
    boots(host)


def test_a_header_that_was_changed_is_left_alone(host: Machine) -> None:
    host.clear()
    host.boot()
    with luks.Container(str(host.disks[1])) as container:
        ((number, fields),) = container.tokens(token.TYPE)
        container.remove_token(number)
        container.set_token({**fields, "name": "root"})
    before = headers(host)[1]
    found = run(host, backup(host))
    assert found.done == ("data-0",) and "header" in found.left["data-1"]
    assert headers(host)[1] == before


def test_another_board_that_boots_in_another_way_is_measured_by_its_own_pcrs(host: Machine) -> None:
    host.clear()
    host.write("sys/firmware/efi/efivars/StubInfo-4a67b082", b"")
    uki = Boot("uki")._replace(kernel="another")
    host.boot(uki)
    state = host.state
    state.tpm = state.tpm._replace(pcrs=(4, 7, 8, 9, 14, 15))
    state.save()
    assert run(host, backup(host)).selection == (4, 7, 11, 12, 15)
    boots(host, uki)


def test_a_tpm_that_another_host_uses_is_not_overwritten_unasked(host: Machine) -> None:
    host.clear()
    host.boot()
    with host.chip.open() as tpm:
        theirs = Payload(Secret(bytes(32)))
        kept = slots.seal_slot(tpm, b"x" * 16, (7, 15), (pcr_policy.branch((7, 15), {7: bytes(32)}),), theirs)
    with pytest.raises(Refused) as caught:
        run(host, backup(host))
    assert caught.value.code == "slots-in-use" and host.allows().record == kept
    choices = rebind.RebindChoices(
        host.recovery,
        backup(host),
        Secret(PASSWORD),
        accept=frozenset(("unauthenticated-root", "slots-in-use")),
        tcti=host.chip.tcti,
    )
    rebind.rebind(host.paths, choices, host.look)
    boots(host)


def test_the_backup_of_another_host_is_refused(host: Machine) -> None:
    host.clear()
    host.boot()
    file = backup(host, "foreign")
    from unlock.providers import native

    with native.Native(Secret.random(32), "cd" * 16) as other, Secret(PASSWORD) as password:
        native.write_backup(file, other, password)
    with pytest.raises(Refused) as caught:
        run(host, file)
    assert caught.value.code == "fingerprint" and host.state.journal is None


def test_a_key_manager_gives_the_keys_again(tmp_path: Path) -> None:
    with Liar(AUTHORITY) as kms:
        host = Machine(tmp_path, OLD, (), 2, kms)
        host.clear()
        host.boot()
        with pytest.raises(Refused) as caught:
            run(host)
        assert caught.value.code == "client-key" and host.state.journal is None
        run(host, client_key=CLIENT.key)
        boots(host)
        assert host.group.generation == 1
        with access.Work(host.paths, host.look) as work:
            assert work.provider().health().endpoints
        host.clear()
        host.boot()
    before = headers(host)
    with pytest.raises(ProviderUnavailable):
        run(host, client_key=CLIENT.key)
    assert host.state.journal is None and headers(host) == before
    host.close()


@pytest.mark.parametrize("how", ["with its backup", "with a new key", "with the old key at hand"])
def test_killed_anywhere_every_disk_still_opens_and_it_finishes(host: Machine, how: str, killer: Killer) -> None:
    def file(attempt: int) -> str:
        return {"with its backup": backup(host), "with a new key": backup(host, f"new-{attempt}")}.get(how, "")

    def begin(attempt: int) -> Callable[[], object]:
        if how != "with the old key at hand":
            host.clear()
            host.boot()
        return partial(run, host, file(attempt))

    for attempt, killed in killer(begin):
        assert host.recovery_opens()
        if attempt % 2 and host.boot() == "unsealed":  # a power cut, not a mere kill
            host.persistence = keyring.get("unlock:persistence")
            assert host.boot_opens()
        if killed:
            run(host, file(attempt))
        boots(host)


@pytest.mark.parametrize("banks", ["sha1:all+sha256:none", "sha1:all+sha256:0,1,2,3,4,5,6,7"])
def test_a_sha256_bank_that_was_switched_off_is_told_alike_by_every_command(host: Machine, banks: str) -> None:
    """As by a firmware update. The TPM says only that the PCRs are wrong."""
    subprocess.run(["tpm2_pcrallocate", "-T", host.chip.tcti, banks], check=True, capture_output=True)
    host.chip.power_cycle()
    words, hint = "the TPM's SHA-256 PCR bank is off", "turn it on in the firmware's setup"
    early = report.Report("early-boot")
    with host.chip.open() as tpm:
        with pytest.raises(TpmRefused) as refused:
            slots.unseal(tpm)
        early.set_verdict(refused.value.code, str(refused.value))
        this_boot.write_report(host.paths, early, "report.json")
        choices = init.InitChoices("", Secret(b""), frozenset(), (), Secret(b""), host.chip.tcti)
        with pytest.raises(Refused) as by_init:
            init.preflight(host.paths, tpm, choices, again=True)
    with pytest.raises(TpmFailed) as by_rebind:
        run(host, backup(host))
    for each in (by_init.value, by_rebind.value):
        assert (str(each), each.hint, each.code) == (words, hint, "no-sha256-bank")
    assert host.state.journal is None
    found = diagnosis.diagnose(evidence.gather_evidence(host.paths, host.chip.tcti))
    assert found.summary == words and [each.code for each in found.causes] == ["no-sha256-bank"]
    assert found.causes[0].do.startswith(hint)
    (checked,) = check_tpm(host.paths, host.state, host.chip.tcti, UnlockError("nothing is predicted"), None)
    assert (checked.verdict, checked.detail, checked.do) == (UNSAFE, words, hint)

    subprocess.run(["tpm2_pcrallocate", "-T", host.chip.tcti, "sha256:all"], check=True, capture_output=True)
    boots(host)


def test_a_boot_with_a_pin_and_the_bank_off_says_so_too(host: Machine) -> None:
    """It reads the PCRs before it asks."""
    early = report.Report("early-boot")
    early.set_verdict("tpm-failed", "the TPM's SHA-256 PCR bank is off")
    this_boot.write_report(host.paths, early, "report.json")
    subprocess.run(["tpm2_pcrallocate", "-T", host.chip.tcti, "sha256:none"], check=True, capture_output=True)
    host.chip.power_cycle()
    found = diagnosis.diagnose(evidence.gather_evidence(host.paths, host.chip.tcti))
    assert [each.code for each in found.causes] == ["no-sha256-bank"]
