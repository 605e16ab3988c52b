# SPDX-License-Identifier: Apache-2.0
"""`unlock provider switch NAME`: moves the host to another provider while its groups stay mounted.

journal ──> new host key ──> each group: new KEK, its disks as in every rotation ──> the new provider is in use ──>
old KEKs retired, where the old provider still answers ──> a new persistence key, where the new provider's keys are not
kept on this host as the old one's were
"""

from .. import journald, messages
from ..disks import find
from ..errors import Refused, Usage
from ..host import this_boot
from ..host.journal import ProviderSwitch
from ..host.lock import exclusive
from ..host.provider_entry import ProviderEntry, has_made
from ..host.state import State
from ..host.state_file import KeyEntry
from ..keys import access, dump_key, rotation
from ..paths import TPM_DEVICE, Paths
from ..providers import Provider
from ..secret import Secret
from . import new_persistence_key, selfhosted


def switch(
    paths: Paths,
    name: str,
    persistent: bool | None = None,
    look: find.Look = find.look,
    tcti: str = TPM_DEVICE,
    owner_auth: Secret | None = None,
) -> list[rotation.Outcome]:
    """Moves the host to another provider: makes a new host key and new KEKs there, and rewrites the tokens.

    Killed, it goes on when it is called again; each group is then on one provider or the other, and opens. Raises
    Usage, Refused, ProviderError.
    """
    new_persistence_key.finish(paths, tcti, owner_auth, look)
    with exclusive(paths), access.Work(paths, look) as work:
        work.settings.check()
        state = work.state
        if name == state.provider.name and not state.unfinished(ProviderSwitch, name):
            raise Refused(f"provider {name} is in use already", "unlock provider list", code="in-use")
        entry = state.provider_named(name)
        kept = _persistence_with(state, entry, persistent)
        if kept and state.removed:
            raise Refused("the TPM keeps nothing of this host", "unlock persistence enable", code="removed")
        if entry.kind == "kmip":
            selfhosted.refuse_self_hosted(state.groups, access.provider_settings(paths, entry).endpoints)
        provider = work.provider(entry)
        if state.persistent and not kept:
            state.narrowed = "keys are not kept on this host any more"
        rotation.retire_or_tell(work)
        state.begin(ProviderSwitch("provider switch", name))
        state.persistent = kept
        if not has_made(entry, state.host_key_ref.id):
            _new_host_key(work, entry, provider)
        outcomes = [
            _move(work, entry, provider, group.name)
            for group in list(state.groups.values())
            if not has_made(entry, group.kek)
        ]
        state.use_provider(entry)
        state.journal = None
        state.save()
        words = f"keys come from provider {name} from now on"
        journald.record(paths, messages.PROVIDER_SWITCHED, words, provider=name)
        rotation.retire_keks(work, left=True)
        removed = state.removed is not None
    if not removed:
        new_persistence_key.replace_if_due(paths, tcti, owner_auth, look)
    return outcomes


def _persistence_with(state: State, entry: ProviderEntry, persistent: bool | None) -> bool:
    """Whether this host keeps its keys under that provider. For a key manager the operator must choose. Raises
    Usage."""
    if entry.kind == "native":
        return True
    begun = state.unfinished(ProviderSwitch, entry.name)
    if persistent is None and state.provider.kind == "native" and not begun:
        raise Usage(
            "whether the key manager's keys are kept on this host is a choice",
            "--persistence enabled (it boots without the network, for whoever takes all of it too) or disabled",
        )
    return state.persistent if persistent is None else persistent


def _new_host_key(work: access.Work, entry: ProviderEntry, provider: Provider) -> None:
    state = work.state
    generation = state.host_key_ref.generation + 1
    made, key = access.make_key(provider, access.key_name(state.host, "host", generation))
    with key:
        new = KeyEntry(f"{entry.id}/{made.id}", made.name, generation)
        state.set_host_key(new, persistence=work.persistence, key=key)
        state.save()
        rotation.record_host_key(work)
        dump_key.write_recipient(work.paths, state, key)
        this_boot.cache_keys(work.paths, "provider", {"unlock:host": key})


def _move(work: access.Work, entry: ProviderEntry, provider: Provider, name: str) -> rotation.Outcome:
    state = work.state
    group = state.groups[name]
    generation = state.next_generation(name)
    made, kek = access.make_key(provider, access.key_name(state.host, f"kek/{name}", generation))
    with kek:
        new = rotation.successor(group, entry.id, made, generation)
        new = new._replace(policy=access.wanted_policy(work, group))
        if (group.policy, new.policy) == ("persistent", "provider"):
            state.narrowed = state.narrowed or f"the key of group {name} is not kept any more"
        return rotation.replace_kek(work, group, new, kek, journal=state.journal)
