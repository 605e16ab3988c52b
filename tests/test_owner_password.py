# SPDX-License-Identifier: Apache-2.0
"""A wrong password of the TPM's owner is told before a command has begun anything."""

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.eventlogs import Boot
from tests.hostfixture import Machine
from tests.kmipfixture import CLIENT
from tests.lab.kmipliar import Liar
from tests.tpmfixture import Swtpm
from unlock.errors import TpmFailed, UnlockError, Usage
from unlock.host import config
from unlock.operations import new_persistence_key, persistence, policy, rebind
from unlock.predict.allowed_states import Pin
from unlock.secret import Secret

pytestmark = pytest.mark.usefixtures("key_cache")

OWNER = b"owner"
CHANGES = {"NV_Write", "EvictControl", "NV_DefineSpace", "NV_UndefineSpace", "CreatePrimary", "Create"}


@pytest.fixture
def chip(tmp_path: Path) -> Iterator[Swtpm]:
    with Swtpm(tmp_path / "tpm") as chip:
        yield chip


@pytest.mark.parametrize("has_srk", [True, False])
@pytest.mark.parametrize(
    ("password", "given", "good"),
    [(b"", b"", True), (OWNER, OWNER, True), (OWNER, b"other", False), (OWNER, b"", False), (b"", OWNER, False)],
)
def test_a_password_is_proven_by_a_command_that_changes_nothing(
    chip: Swtpm, password: bytes, given: bytes, good: bool, has_srk: bool
) -> None:
    with chip.open() as tpm:
        if has_srk:
            tpm.ensure_srk()
    chip.set_owner_auth(Secret(password))
    with chip.open() as tpm:
        before = tpm.facts()
        chip.proxy.clear()
        for _ in range(40):  # nor does it leave a session behind, or count for a lockout
            try:
                tpm.prove_owner(Secret(given))
                assert good
            except TpmFailed as error:
                assert not good and "the owner authorization is wrong" in str(error)
                assert error.hint == "--owner-auth-file FILE"
        assert not CHANGES & set(chip.proxy.commands) and "PolicySecret" in chip.proxy.commands
        assert tpm.facts() == before
        with pytest.raises(Usage):
            tpm.prove_owner(Secret(bytes(65)))


@pytest.fixture
def managed(tmp_path: Path, kms: Liar) -> Iterator[Machine]:
    machine = Machine(tmp_path / "host", Boot("direct"), (), 2, kms)
    machine.chip.set_owner_auth(Secret(OWNER))
    yield machine
    machine.close()


def as_it_was(host: Machine) -> list[bytes]:
    headers = [image.read_bytes()[: 1 << 20] for image in host.disks]
    return [*headers, Path(host.paths.state).read_bytes(), Path(host.paths.config).read_bytes()]


def _rebind(host: Machine, password: Secret) -> object:
    choices = rebind.RebindChoices(
        host.recovery, owner_auth=password, accept=frozenset(("unauthenticated-root",)), tcti=host.chip.tcti
    )
    return rebind.rebind(host.paths, choices, host.look)


COMMANDS: dict[str, Callable[[Machine, Secret], object]] = {
    "rebind": _rebind,
    "rekey --fresh": lambda host, password: new_persistence_key.replace(
        host.paths, host.chip.tcti, password, host.look
    ),
    "persistence disable": lambda host, password: persistence.disable(host.paths, host.look, host.chip.tcti, password),
    "policy set --pin": lambda host, password: policy.set_policy(
        host.paths, pin=Pin(Secret(b"correct horse")), tcti=host.chip.tcti, owner_auth=password, look=host.look
    ),
}


@pytest.mark.parametrize("command", COMMANDS)
@pytest.mark.parametrize("given", [b"other", b""], ids=["wrong", "none"])
def test_nothing_is_begun_with_a_wrong_password(managed: Machine, command: str, given: bytes) -> None:
    before = as_it_was(managed)
    with pytest.raises(UnlockError) as caught:
        COMMANDS[command](managed, Secret(given))
    assert "owner" in str(caught.value) and "--owner-auth-file" in caught.value.hint
    assert as_it_was(managed) == before and managed.state.journal is None
    assert managed.boot() == "unsealed"
    assert not new_persistence_key.is_due(managed.state)


def test_all_stored_keys_are_removed_with_the_right_password_alone(managed: Machine) -> None:
    key_file = managed.folder / "client.key"
    key_file.write_bytes(CLIENT.key)
    settings = config.load(managed.paths.config).providers["kms"]._replace(client_key=str(key_file))
    Path(managed.paths.config).write_text(config.HEAD + config.provider_table(settings))
    with managed.work() as work:
        assert work.state.provider.kind == "kmip"
        work.state.put_provider(work.state.provider._replace(client_key=None))
        work.state.save()
    persistence.disable(managed.paths, managed.look, managed.chip.tcti, Secret(OWNER))
    before = as_it_was(managed)
    for given in (b"other", b""):
        with pytest.raises(UnlockError, match="owner"):
            persistence.remove_all_stored_keys(managed.paths, managed.chip.tcti, Secret(given))
        assert as_it_was(managed) == before, "the state does not say that they are removed"
    persistence.remove_all_stored_keys(managed.paths, managed.chip.tcti, Secret(OWNER))
    assert managed.state.removed
