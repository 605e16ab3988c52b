# SPDX-License-Identifier: Apache-2.0
"""`unlock persistence disable --remove-all-stored-keys`, and `enable` afterwards, on a real software TPM."""

import json
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.flowfixture import HOST, Host
from tests.killing import Killer
from tests.kmipfixture import AUTHORITY, CLIENT
from tests.lab.kmipliar import Liar
from tests.tpmfixture import Swtpm
from unlock.errors import NoKey, NoSlot, Refused, TpmRefused, UnlockError
from unlock.host import config, keyring
from unlock.host.journal import PersistenceChange
from unlock.operations import operation, persistence, provider, status, sync
from unlock.operations import switch as switching
from unlock.secret import Secret
from unlock.tpm import pcr_policy, slots
from unlock.tpm.pcr_policy import CAP_DIGEST, CAP_PCR
from unlock.tpm.record import Payload, Record

pytestmark = pytest.mark.usefixtures("key_cache")

SELECTION = pcr_policy.select((4, 7, 9))
OTHER_BRANCH = b"\x07" * 32
"""A boot that was predicted when the host was sealed."""


@pytest.fixture
def chip(tmp_path: Path) -> Iterator[Swtpm]:
    with Swtpm(tmp_path / "chip") as chip:
        yield chip


@pytest.fixture
def host(tmp_path: Path, kms: Liar, chip: Swtpm) -> Iterator[Host]:
    """Sealed, booted and capped; its client key is in a file."""
    host = Host(tmp_path, 2, kms)
    key_file = host.folder / "client.key"
    key_file.write_bytes(CLIENT.key)
    stays = config.ProviderConfig("kms", (f"127.0.0.1:{kms.port}",), host.ca(), str(key_file), config.TIMEOUT)
    Path(host.paths.config).write_text(config.HEAD + config.provider_table(stays))
    provider.renew_client(host.paths, provider.Client(CLIENT.certificate, Secret(CLIENT.key)), "", host.look)
    with chip.open() as tpm:
        branch = pcr_policy.branch(SELECTION, tpm.read_pcrs(range(16)))
        payload = Payload(Secret(bytes(host.persistence)))
        slots.seal_slot(tpm, bytes.fromhex(HOST), SELECTION, (branch, OTHER_BRANCH), payload)
        tpm.extend(CAP_PCR, CAP_DIGEST)
    yield host
    keyring.flush()


def remove(host: Host, chip: Swtpm) -> None:
    persistence.remove_all_stored_keys(host.paths, chip.tcti, Secret(b""))


def enable(host: Host, chip: Swtpm) -> None:
    persistence.enable(host.paths, host.look, chip.tcti)


def disable(host: Host, chip: Swtpm) -> None:
    persistence.disable(host.paths, host.look, chip.tcti)
    host.persistence = keyring.get("unlock:persistence")


def record(chip: Swtpm) -> Record | None:
    with chip.open() as tpm:
        try:
            return slots.current_slot(tpm)[1]
        except NoSlot:
            return None


def boot_gives(chip: Swtpm) -> bytes:
    """What the next boot unseals."""
    chip.power_cycle()
    with chip.open() as tpm:
        try:
            return bytes(slots.unseal(tpm).payload.key)
        finally:
            tpm.extend(CAP_PCR, CAP_DIGEST)


def test_removed_the_tpm_keeps_nothing_and_the_disks_need_the_key_manager(host: Host, chip: Swtpm) -> None:
    disable(host, chip)
    for _ in range(2):
        remove(host, chip)
        with chip.open() as tpm:
            assert tpm.facts().taken == ()
            with pytest.raises(NoSlot):
                slots.unseal(tpm)
    with pytest.raises(NoSlot):
        boot_gives(chip)
    assert "key       key cache until the next boot: the TPM keeps nothing" in status.to_text(
        status.read_status(host.paths)
    )
    assert not any(host.opens(image) for image in host.disks)
    assert {each.outcome for each in sync.sync(host.paths, host.look)} == {"unchanged"}
    assert host.recovery_opens()
    keyring.flush()  # as the next boot finds it
    assert "key       none: the TPM keeps nothing" in status.to_text(status.read_status(host.paths))
    with pytest.raises(NoKey):
        enable(host, chip)
    with chip.open() as tpm:
        assert tpm.facts().taken == ()


def test_enabled_again_the_same_key_is_sealed_under_the_same_policy(host: Host, chip: Swtpm) -> None:
    before = record(chip)
    assert before
    disable(host, chip)
    remove(host, chip)
    for _ in range(2):
        enable(host, chip)
        after = record(chip)
        assert after and after[1:5] == before[1:5]
        assert host.boot_opens()
    assert host.state.removed is None
    assert boot_gives(chip) == bytes(host.persistence)
    chip.power_cycle()
    chip.extend(9)
    with chip.open() as tpm, pytest.raises(TpmRefused):
        slots.unseal(tpm)


def test_a_policy_that_came_after_the_removal_is_not_replaced_by_the_old_one(host: Host, chip: Swtpm) -> None:
    disable(host, chip)
    remove(host, chip)
    with chip.open() as tpm:
        newer = pcr_policy.branch(SELECTION, tpm.read_pcrs(range(16)))
        slots.seal_slot(tpm, bytes.fromhex(HOST), SELECTION, (newer,), Payload(Secret(bytes(host.persistence))))
    enable(host, chip)
    after = record(chip)
    assert after and after.branches == (newer,)


def test_while_the_tpm_keeps_nothing_no_other_way_leads_back(host: Host, kms: Liar, chip: Swtpm) -> None:
    disable(host, chip)
    with Liar(AUTHORITY) as other:
        settings = config.ProviderConfig("second", (f"127.0.0.1:{other.port}",), host.ca(), "", config.TIMEOUT)
        client = provider.Client(CLIENT.certificate, Secret(CLIENT.key))
        provider.add_provider(host.paths, settings, client, host.look)
        remove(host, chip)
        with pytest.raises(Refused, match="keeps nothing"):
            switching.switch(host.paths, "second", True, host.look)
        assert host.state.journal is None
        enable(host, chip)
        switching.switch(host.paths, "second", True, host.look)
        assert boot_gives(chip) == bytes(host.persistence)
        assert host.boot_opens()


def test_another_installations_key_is_not_removed(host: Host, chip: Swtpm) -> None:
    disable(host, chip)
    with chip.open() as tpm:
        branch = pcr_policy.branch(SELECTION, tpm.read_pcrs(range(16)))
        slots.seal_slot(tpm, b"h" * 16, SELECTION, (branch,), Payload(Secret.random(32)), replace=True)
    with pytest.raises(Refused, match="another installation"):
        remove(host, chip)
    with chip.open() as tpm:
        assert len(tpm.facts().taken) == 2


def test_nothing_is_removed_while_the_password_hangs_on_it(host: Host, chip: Swtpm) -> None:
    path = Path(host.paths.config)
    path.write_text(path.read_text() + 'username = "host-1"\n')
    client = provider.Client(CLIENT.certificate, Secret(CLIENT.key), Secret(b"password"))
    provider.renew_client(host.paths, client, "", host.look)
    disable(host, chip)
    with pytest.raises(Refused, match="password"):
        remove(host, chip)
    path.write_text(path.read_text().replace('username = "host-1"\n', ""))
    provider.renew_client(host.paths, client._replace(password=None), "", host.look)
    remove(host, chip)


def cut_at_every_command(chip: Swtpm, work: Callable[[], None], again: Callable[[], None]) -> int:
    """The answer to the TPM's Nth command is lost, for each N until there is nothing left to cut."""
    for count in range(40):
        chip.proxy.cut_after(count)
        try:
            work()
            return count
        except UnlockError:
            pass
        finally:
            chip.proxy.restore()
        again()
    raise AssertionError("it never ends")


def test_removal_cut_at_every_tpm_command_is_finished_by_the_same_command(host: Host, chip: Swtpm) -> None:
    disable(host, chip)
    unfinished = []

    def again() -> None:
        with chip.open() as tpm:
            keeps = tpm.facts().taken != ()
        found = status.read_status(host.paths, look=host.look)
        if host.state.removed and keeps:
            assert found.operation and "keeps nothing" not in found.persistence_key
            unfinished.append(found.operation.command)
            assert operation.resume(host.paths, lambda *_: False, look=host.look, tcti=chip.tcti) == ([], True)
        remove(host, chip)
        with chip.open() as tpm:
            assert tpm.facts().taken == ()
        assert host.state.removed and not host.state.journal
        enable(host, chip)
        disable(host, chip)

    assert cut_at_every_command(chip, lambda: remove(host, chip), again) > 8
    assert set(unfinished) == {"unlock persistence disable --remove-all-stored-keys"}


def test_enabling_cut_at_every_tpm_command_claims_nothing_and_is_finished_by_the_same_command(
    host: Host, chip: Swtpm
) -> None:
    disable(host, chip)
    remove(host, chip)

    def again() -> None:
        state = json.loads(Path(host.paths.state).read_text())
        assert (state["persistence"], "removed" in state) == (False, True)
        assert not any(host.opens(image) for image in host.disks)
        enable(host, chip)
        assert boot_gives(chip) == bytes(host.persistence)
        assert host.boot_opens()
        disable(host, chip)
        remove(host, chip)

    assert cut_at_every_command(chip, lambda: enable(host, chip), again) > 12


@pytest.mark.parametrize("code", [0x922, 0x908, 0x920])
def test_a_busy_tpm_is_waited_for(host: Host, chip: Swtpm, code: int) -> None:
    disable(host, chip)
    for command in ("EvictControl", "NV_UndefineSpace", "Create", "NV_Write"):
        chip.proxy.answer(command, code)
    remove(host, chip)
    enable(host, chip)
    assert boot_gives(chip) == bytes(host.persistence)
    assert host.boot_opens()


@pytest.mark.turns
def test_removal_and_enabling_killed_anywhere_are_finished_by_the_same_command(
    host: Host, chip: Swtpm, killer: Killer
) -> None:
    """Whenever the state says that keys are kept, the next boot has what they are wrapped with."""

    def both() -> None:
        disable(host, chip)
        remove(host, chip)
        enable(host, chip)

    for _ in killer(lambda _: both):
        chip.power_cycle()  # what the killed one had loaded goes: the kernel's resource manager does that on a host
        if host.state.persistent and not host.state.journal:
            found = record(chip)
            assert found and found.host == bytes.fromhex(HOST)
        assert host.recovery_opens()
        if host.state.unfinished(PersistenceChange, "enable"):
            enable(host, chip)
        both()
        assert host.boot_opens()
    assert boot_gives(chip) == bytes(host.persistence)
