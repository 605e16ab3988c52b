# SPDX-License-Identifier: Apache-2.0
"""`unlock persistence`: chooses whether a key manager's keys are kept on this host, so that it boots without network.

enable     puts every KEK on every disk, wrapped by the persistence key, and the host key into the state
disable    takes every KEK off the disks, and makes a new persistence key, so that earlier copies of headers open
           nothing; from the next boot on, groups open when the key manager answers
remove     evicts the persistence key from the TPM after `disable`; until the next boot, `enable` seals it again under
           the same policy
"""

from contextlib import suppress
from typing import TypedDict

from .. import journald, messages
from ..disks import devices, disk_keys, find, luks
from ..errors import NoKey, Refused, TpmAbsent, UnlockError
from ..host import keyring
from ..host.journal import PersistenceChange, StoredKeysRemoval
from ..host.lock import exclusive
from ..host.state import State
from ..host.state_file import RemovedPolicy
from ..keys import access, rotation
from ..paths import TPM_DEVICE, Paths
from ..predict import allowed_states
from ..secret import Secret
from ..tpm import slots
from ..tpm.chip import Tpm
from . import new_persistence_key


class PersistenceRow(TypedDict):
    """One group in `unlock persistence status --json`."""

    name: str
    policy: str
    members: int
    kept_on: list[str]
    """Mapping names of the members that carry the KEK."""


class PersistenceReport(TypedDict):
    """`unlock persistence status --json`."""

    version: int
    provider: str
    """Kind of the provider in use."""
    enabled: bool
    groups: list[PersistenceRow]


def status(paths: Paths, look: find.Look = find.look) -> PersistenceReport:
    """Reads from each disk whether it carries its KEK. Raises NoKey, Refused."""
    with access.Work(paths, look) as work:
        groups: list[PersistenceRow] = []
        for group in work.state.groups.values():
            nodes = work.nodes(group)
            kept = [member.name for member in group.members if _keeps(work, nodes.get(member.uuid, ""))]
            groups.append({"name": group.name, "policy": group.policy, "members": len(group.members), "kept_on": kept})
        return {
            "version": 1,
            "provider": work.state.provider.kind,
            "enabled": work.state.persistent,
            "groups": groups,
        }


def _keeps(work: access.Work, node: str) -> bool:
    if not node:
        return False
    try:
        with luks.Container(node) as container:
            for each in disk_keys.read_tokens(container, work.state.host):
                disk_keys.unwrap_kek(each, work.persistence).wipe()
                return True
    except UnlockError:
        pass
    return False


def enable(
    paths: Paths, look: find.Look = find.look, tcti: str = TPM_DEVICE, owner_auth: Secret | None = None
) -> list[rotation.Outcome]:
    """Keeps all keys on this host. Asks the TPM only where its keys were removed. Raises ProviderError, NoKey,
    DiskFailed, Refused, TpmFailed."""
    with exclusive(paths), access.Work(paths, look) as work:
        work.settings.check()
        for group in work.state.groups.values():
            access.find_kek(work, group)[0].wipe()  # before anything is changed
        with _host_key(work) as host_key:
            if work.state.removed:
                _seal_again(work, work.state.removed, tcti, owner_auth)
            work.state.removed = None
            if isinstance(work.state.journal, StoredKeysRemoval):  # it is taken back
                work.state.journal = None
            work.state.begin(PersistenceChange("persistence", "enable"))
            work.state.persistent = True
            work.state.set_host_key(
                work.state.host_key_ref, persistence=work.persistence, key=host_key, keep_former=False
            )
        outcomes = _apply_policies(work)
    journald.record(paths, messages.PERSISTENCE_ENABLED, "keys are kept on this host from now on")
    return outcomes


def _seal_again(work: access.Work, sealed: RemovedPolicy, tcti: str, owner_auth: Secret | None) -> None:
    """Seals the persistence key under the policy from before its removal, unless the TPM holds a key of this host.
    Raises Refused, TpmFailed."""
    host = bytes.fromhex(work.state.host)
    payload = allowed_states.payload_for(work.paths, work.state, work.persistence)
    with Tpm(tcti) as tpm:
        found = slots.current_record(tpm)
        if found and found.host == host:
            return
        branches = [bytes.fromhex(each) for each in sealed.branches]
        with allowed_states.auth_for(work.state.host, sealed.pin) as auth:
            slots.seal_slot(
                tpm, host, sealed.selection, branches, payload, owner_auth=owner_auth, pin_auth=auth, cap=sealed.cap
            )


def disable(
    paths: Paths, look: find.Look = find.look, tcti: str = TPM_DEVICE, owner_auth: Secret | None = None
) -> list[rotation.Outcome]:
    """Keeps no keys on this host any more. Raises Refused where the host could not boot or reach its key manager
    then; TpmFailed and others when that is done and the new persistence key is not made."""
    new_persistence_key.finish(paths, tcti, owner_auth, look)
    with exclusive(paths), access.Work(paths, look) as work:
        refuse_without_kept_keys(work.state)
        if isinstance(work.state.journal, StoredKeysRemoval):  # it is disabled
            return _set_policies(work)
        if work.state.persistent and not work.state.removed:
            with suppress(TpmAbsent), Tpm(tcti) as tpm:
                slots.require_owner_auth(tpm, owner_auth)  # before anything is begun
        if work.state.persistent:
            work.state.narrowed = "keys are not kept on this host any more"
        work.state.begin(PersistenceChange("persistence", "disable"))
        work.state.persistent = False
        work.state.drop_host_key()
        outcomes = _apply_policies(work)
        removed = work.state.removed is not None
    journald.record(paths, messages.PERSISTENCE_DISABLED, "keys are not kept on this host any more")
    if not removed:
        new_persistence_key.replace_if_due(paths, tcti, owner_auth, look)
    return outcomes


def refuse_without_kept_keys(state: State) -> None:
    """Raises Refused when this host could not boot or work without the keys that it keeps."""
    if state.provider.kind == "native":
        raise Refused(
            "the native provider's keys are made on this host: they are kept", "unlock provider switch", code="native"
        )
    below = devices.mappings_below("/")
    for group in state.groups.values():
        if any(member.name in below for member in group.members):
            raise Refused(
                f"group {group.name} holds the root file system, which cannot wait for the network",
                "unlock persistence status",
                code="root-needs-persistence",
            )


def _host_key(work: access.Work) -> Secret:
    """The host key: from the state, the key cache or the provider. Raises ProviderError."""
    kept = work.state.host_key(work.persistence)
    if kept:
        return kept
    try:
        return keyring.get("unlock:host")
    except NoKey:
        key = work.state.host_key_ref
        entry = work.state.provider_of(key.id)
        return work.provider(entry).fetch(access.key_ref(entry, key.id, key.name).id, work.opens())


def _apply_policies(work: access.Work) -> list[rotation.Outcome]:
    """Gives each group the policy that the host's choice and configuration ask for, then closes the journal."""
    outcomes = _set_policies(work)
    work.state.journal = None
    work.state.save()
    return outcomes


def _set_policies(work: access.Work) -> list[rotation.Outcome]:
    groups = list(work.state.groups.values())
    return [rotation.set_policy(work, group, access.wanted_policy(work, group)) for group in groups]


def remove_all_stored_keys(paths: Paths, tcti: str = TPM_DEVICE, owner_auth: Secret | None = None) -> None:
    """Evicts the sealed objects from the TPM, after `disable`. From the next boot on nothing unwraps what is wrapped on
    the disks and in the state. Finishes when run again. Raises Refused, TpmFailed."""
    with exclusive(paths):
        state = State.load(paths)
        _refuse_removal(state)
        with Tpm(tcti) as tpm:
            found = slots.current_record(tpm)
            if found and found.host != bytes.fromhex(state.host):
                raise Refused(
                    "the TPM keeps the persistence key of another installation", "unlock status", code="not-ours"
                )
            slots.require_owner_auth(tpm, owner_auth)
            if found:
                branches = tuple(each.hex() for each in found.branches)
                state.removed = RemovedPolicy(found.selection, found.cap, branches, found.pin)
                state.begin(StoredKeysRemoval("persistence", "disable --remove-all-stored-keys"))
            slots.evict_all(tpm, owner_auth)
        if state.journal:
            state.journal = None
            state.save()
    journald.record(paths, messages.STORED_KEYS_REMOVED, "the TPM keeps nothing of this host any more")


def _refuse_removal(state: State) -> None:
    """Raises Refused while this host still needs the persistence key."""
    if state.persistent or (state.journal and not isinstance(state.journal, StoredKeysRemoval)):
        raise Refused("persistence is enabled", "unlock persistence disable", code="persistent")
    provider = state.provider
    if provider.kind == "kmip" and provider.client_key is not None:
        raise Refused(
            "the client key is wrapped by the persistence key: without it this host cannot ask its key manager",
            "give [provider] a client_key file, and run unlock provider renew",
            code="client-key",
        )
    if provider.kind == "kmip" and provider.password:
        raise Refused(
            "the key manager's password is wrapped by the persistence key: without it this host cannot ask",
            "let the key manager accept the certificate alone, take username out of unlock.toml, and run "
            "unlock provider renew",
            code="password",
        )
