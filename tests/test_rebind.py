# SPDX-License-Identifier: Apache-2.0
"""A cleared TPM, another TPM, a changed boot: `unlock rebind` with the recovery key. A software TPM, real headers."""

import os
import re
import subprocess
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from tests.eventlogs import Boot, Unmeasured
from tests.flowfixture import HOST, Host
from tests.hostfixture import Machine
from tests.killing import Killer, killed_at
from tests.kmipfixture import AUTHORITY, CLIENT
from tests.lab.kmipliar import Liar
from tests.test_disk import edit
from unlock import cli, strictjson
from unlock.disks import disk_keys, luks, token
from unlock.errors import NoKey, ProviderUnavailable, Refused, Tampered, TpmFailed, TpmRefused, UnlockError
from unlock.host import keyring, report, this_boot
from unlock.keys import access, delivery, recovery_key
from unlock.measured import diagnosis, evidence
from unlock.operations import adopt_disk, cache, init, native_backup, rebind, recovery, sync
from unlock.operations.check.disks import check_group
from unlock.operations.check.finding import UNSAFE
from unlock.operations.check.tpm import check_tpm
from unlock.secret import Secret
from unlock.tpm import pcr_policy, slots
from unlock.tpm.record import Payload

pytestmark = pytest.mark.usefixtures("key_cache")

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
    accepted: tuple[str, ...] = (),
) -> rebind.Rebound:
    choices = rebind.RebindChoices(
        recovery or host.recovery,
        file,
        Secret(PASSWORD) if file else None,
        Secret(client_key) if client_key else None,
        accept=frozenset(("unauthenticated-root", *accept)),
        accepted=frozenset(accepted),
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


# A header that its operator has changed


def cryptsetup(*command: object, key: bytes = b"") -> None:
    subprocess.run(["cryptsetup", "--batch-mode", *map(str, command)], input=key, check=True, capture_output=True)


def remove_token(host: Host, image: Path) -> None:
    cryptsetup("token", "remove", "--token-id", "0", image)


def set_flag(host: Host, image: Path) -> None:
    edit(str(image), lambda fields: fields["config"].update(flags=["allow-discards"]))


def reencrypt(host: Host, image: Path) -> None:
    """By the recovery key. cryptsetup makes the keyslot anew, as one for a password."""
    fast = ("--pbkdf", "pbkdf2", "--pbkdf-force-iterations", "2000")
    cryptsetup("reencrypt", "--force-offline-reencrypt", *fast, "--key-file", "-", image, key=bytes(host.recovery))
    with luks.Container(str(image)) as container, container.volume_key(host.recovery) as dek:
        host.deks[container.uuid] = bytes(dek)


CHANGED: list[tuple[Callable[[Host, Path], None], str]] = [
    (remove_token, "its token is gone"),
    (set_flag, 'flags was none, is ["allow-discards"]'),
    (reencrypt, "digest.digest was "),
]


@pytest.fixture
def lone(tmp_path: Path) -> Iterator[Machine]:
    """A host with one disk, whose header the state knows."""
    machine = Machine(tmp_path, OLD, disks=1)
    with Secret(PASSWORD) as password:
        native_backup.backup(machine.paths, backup(machine), password, look=machine.look)
    state = machine.state
    with luks.Container(str(machine.disks[0])) as container:
        state.headers[container.uuid] = strictjson.canonical(container.facts()).decode()
    state.save()
    yield machine
    machine.close()


@pytest.mark.parametrize(("change", "words"), CHANGED)
def test_check_says_before_the_reboot_what_was_changed_and_what_to_type(
    lone: Machine, change: Callable[[Host, Path], None], words: str
) -> None:
    (image,) = lone.disks
    change(lone, image)
    (row,) = check_group(lone.paths, lone.state, lone.group, lone.look(), lone.persistence)
    assert (row.verdict, row.do) == ("unsafe", f"unlock disk adopt {image} --group data")
    assert words in row.detail


@pytest.mark.parametrize(("change", "words"), CHANGED)
def test_a_lone_disk_whose_header_was_changed_is_bound_again_by_name(
    lone: Machine, change: Callable[[Host, Path], None], words: str
) -> None:
    """No key crossed into this boot: its root file system was opened by the recovery key."""
    (image,) = lone.disks
    change(lone, image)
    lone.boot()
    keyring.flush()
    before = image.read_bytes()[: 16 << 10], Path(lone.paths.state).read_bytes()
    for accepted in ((), ("data-1",)):
        with pytest.raises(Tampered, match=re.escape(words)) as caught:
            run(lone, backup(lone), accepted=accepted)
        assert (caught.value.code, caught.value.hint) == (
            "changed-header",
            "if you changed it: --accept-changed-header data-0",
        )
    assert (image.read_bytes()[: 16 << 10], Path(lone.paths.state).read_bytes()) == before
    found = run(lone, backup(lone), accepted=("data-0",))
    assert (found.done, found.left) == (("data-0",), {})
    boots(lone)
    assert [each.outcome for each in recovery.test_recovery_key(lone.paths, lone.recovery, lone.look)] == ["ok"]
    assert {
        each.verdict for each in check_group(lone.paths, lone.state, lone.group, lone.look(), lone.persistence)
    } == {"safe"}
    lone.boot()
    run(lone)
    boots(lone)


def test_a_command_that_finds_no_key_after_such_a_boot_names_rebind(lone: Machine) -> None:
    lone.boot()
    keyring.flush()
    early = this_boot.read_early_report(lone.paths)
    assert early
    for outcome, hint in (("no-key", "after a flush"), ("altered", "unlock rebind"), ("tampered", "unlock rebind")):
        early.set_disk("/dev/sda", outcome)
        this_boot.write_report(lone.paths, early, "report.json")
        with pytest.raises(NoKey) as caught:
            adopt_disk.adopt_disk(lone.paths, str(lone.disks[0]), "data", Secret(b"operator"), "")
        assert hint in caught.value.hint


def test_a_wrong_recovery_key_is_told_from_a_token_that_is_gone(lone: Machine) -> None:
    lone.boot()
    with pytest.raises(Refused, match="no keyslot takes the recovery key") as caught:
        run(lone, backup(lone), recovery_key.new())
    assert caught.value.code == "wrong-recovery-key" and "token" not in str(caught.value)
    remove_token(lone, lone.disks[0])
    with pytest.raises(Tampered, match="its token is gone"):
        run(lone, backup(lone))


def test_a_reencrypted_disk_that_lost_its_recovery_keyslot_is_told_how_to_get_one(lone: Machine) -> None:
    (image,) = lone.disks
    reencrypt(lone, image)
    with luks.Container(str(image)) as container:
        (slot,) = container.keyslots()
        with container.volume_key(lone.recovery) as dek:
            container.add_keyslot(dek, passphrase=Secret(b"operator"))
        container.remove_keyslot(slot)
    lone.boot()
    keyring.flush()
    with pytest.raises(Refused, match="no keyslot takes this recovery key") as caught:
        run(lone, backup(lone), accepted=("data-0",))
    assert f"cryptsetup luksAddKey {image}" in caught.value.hint
    new = lone.folder / "recovery"
    new.write_bytes(bytes(lone.recovery))
    fast = ("--pbkdf", "pbkdf2", "--pbkdf-force-iterations", "2000")
    cryptsetup("luksAddKey", *fast, "--key-file", "-", image, new, key=b"operator")
    run(lone, backup(lone), accepted=("data-0",))
    boots(lone)


def test_a_changed_header_among_others_is_left_and_named(host: Machine) -> None:
    host.clear()
    host.boot()
    remove_token(host, host.disks[1])
    found = run(host, backup(host))
    assert (found.done, found.changed) == (("data-0",), ("data-1",))
    assert "its token is gone" in found.left["data-1"]
    run(host, accepted=("data-1",))
    boots(host)


def test_another_board_that_boots_in_another_way_is_measured_by_its_own_pcrs(host: Machine) -> None:
    host.clear()
    host.write("sys/firmware/efi/efivars/StubInfo-4a67b082", b"")
    uki = Boot("uki")._replace(kernel="another")
    host.boot(uki)
    state = host.state
    state.tpm = state.tpm._replace(pcrs=(4, 7, 8, 9, 14, 15))
    state.save()
    found = run(host, backup(host))
    assert (found.selection, found.dropped) == ((4, 7, 11, 12, 13, 15), (8, 9, 14))
    boots(host, uki)


def test_chosen_pcrs_that_are_not_sealed_to_any_more_are_told(
    host: Machine, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """14 is all zero here: without a word, PCR 1, which the operator had added, would go with it."""
    host.write("sys/firmware/efi/efivars/StubInfo-4a67b082", b"")
    host.boot(Boot("uki"))
    state = host.state
    state.tpm = state.tpm._replace(pcrs=(1, 4, 7, 11, 12, 14, 15))
    state.save()
    recovery_key.write_new_file(str(host.folder / "recovery"), host.recovery)
    monkeypatch.setattr(this_boot, "tpm_device", lambda: host.chip.tcti)
    monkeypatch.setattr(rebind, "rebind", partial(rebind.rebind, look=host.look))
    (host.folder / "password").write_bytes(PASSWORD)
    words = ["rebind", "--recovery-key-file", str(host.folder / "recovery"), "--accept", "unauthenticated-root"]
    words += ["--backup", backup(host), "--backup-password-file", str(host.folder / "password")]
    capsys.readouterr()

    def typed(*more: str) -> str:
        parsed = cli._parser().parse_args([*words, *more])
        assert parsed.run(host.paths, parsed) == 0
        return capsys.readouterr().err

    told = typed()
    assert "not sealed to PCRs 1, 14 any more" in told and "unlock policy set --pcrs" in told
    assert "any more" not in typed(), "they are those of before now"
    assert "any more" not in typed("--pcrs", "1,4,7,11,12"), "chosen now"
    assert "any more" not in typed("--pcrs", "4,7,11,12"), "chosen now"


def test_the_owners_password_is_asked_for_before_the_journal_is_begun(host: Machine) -> None:
    """The storage root key is there, which needs no password: sealing does."""
    host.boot(NEW)
    host.chip.set_owner_auth(Secret(b"owner"))
    first = headers(host)
    with pytest.raises(Refused) as caught:
        run(host, backup(host))
    assert (caught.value.code, caught.value.hint) == ("owner-auth-set", "--owner-auth-file FILE")
    assert headers(host) == first and host.state.journal is None


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


@pytest.mark.turns
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


# A header that changes after it was checked: a drive, a SAN or a USB disk may answer otherwise the second time


def null_cipher(fields: dict[str, Any]) -> None:
    fields["segments"]["0"]["encryption"] = "cipher_null-ecb"


def is_authentic(image: Path, key: Secret) -> bool:
    with luks.Container(str(image)) as container:
        return any(disk_keys.is_authentic(container, each, key) for each in disk_keys.read_tokens(container, HOST))


@pytest.mark.parametrize("step", ["_find_host_key", "_add_tokens", "_rewrap_disks"])
@pytest.mark.parametrize("accepted", [(), ("data-0",)])
def test_a_header_that_changes_after_its_check_gets_no_token(
    host: Machine, monkeypatch: pytest.MonkeyPatch, step: str, accepted: tuple[str, ...]
) -> None:
    if accepted:
        set_flag(host, host.disks[0])
    host.clear()
    host.boot()
    real = getattr(rebind, step)

    def swap(*arguments: Any) -> Any:
        edit(str(host.disks[0]), null_cipher)
        return real(*arguments)

    monkeypatch.setattr(rebind, step, swap)
    found = run(host, backup(host), accepted=accepted)
    assert found.done == ("data-1",) and "changed meanwhile" in found.left["data-0"]
    assert "segments.0.encryption was aes-xts-plain64, is cipher_null-ecb" in found.left["data-0"]
    assert not is_authentic(host.disks[0], keyring.get("unlock:persistence"))
    assert "cipher_null" not in host.state.headers.get(find_uuid(host.disks[0]), "")


def find_uuid(image: Path) -> str:
    with luks.Container(str(image)) as container:
        return container.uuid


def test_what_is_accepted_at_once_is_shown(lone: Machine, capsys: pytest.CaptureFixture[str]) -> None:
    set_flag(lone, lone.disks[0])
    lone.boot()
    keyring.flush()
    capsys.readouterr()
    run(lone, backup(lone), accepted=("data-0",))
    assert 'accepted: flags was none, is ["allow-discards"]' in capsys.readouterr().err
    run(lone, backup(lone), accepted=("data-0",))
    assert "accepted" not in capsys.readouterr().err, "it is as this host wrote it"
