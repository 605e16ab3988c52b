# SPDX-License-Identifier: Apache-2.0
"""The state of this host, /var/lib/unlock/state.json: its keys, each wrapped by the persistence key, and its groups.

A command loads the state, changes it in memory, and saves the whole file at once. The one journal tells what a killed
command had begun: journal.py. What the file holds and how it is checked: state_file.py.
"""

from base64 import b64encode
from binascii import Error as Base64Error
from binascii import a2b_base64
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import TypeVar

from .. import wrap
from ..disks import token
from ..disks.groups import Member
from ..errors import Malformed, Refused, Tampered, Usage
from ..paths import Paths, write_atomically
from ..secret import Secret
from . import resumption, state_file
from .journal import JournalEntry, NewPersistenceKey, Rebind, RecoveryRotation, command, goes_on_by_itself
from .lock import PATIENCE, exclusive
from .provider_entry import KmipEntry, NativeEntry, Offers, ProviderEntry, has_made
from .state_file import NOTHING_KNOWN, FormerMember, HostKey, KeyEntry, RecoveryFacts, ReplacedKek, StateFile, TpmFacts

Journaled = TypeVar("Journaled", bound=JournalEntry)


class State:
    """The state of an initialised host. Changing it does nothing before `save`."""

    def __init__(self, path: str, file: StateFile) -> None:
        self._path = path
        self.host = file.host
        """Host id, 32 hex digits."""
        self._provider = file.provider
        self.others = file.others
        """Name -> entry of the providers that are not in use."""
        self.persistent = file.persistence
        """Whether the provider's keys are kept on this host."""
        self._host_key = file.host_key
        self._mac_key = file.mac_key
        self.groups = {name: state_file.group_of(name, entry) for name, entry in file.groups.items()}
        self._manifests, self._generations = file.manifests, file.generations
        self._asked = dict(file.asked or {})
        self.forgotten = dict(file.forgotten or {})
        """LUKS UUID -> what the disk was: members that were forgotten, wherever they are now."""
        self.retire = list(file.retire)
        """KEKs that were replaced, and that their provider has not deactivated yet."""
        self.journal = file.journal
        """The operation under way."""
        self.recovery = file.recovery or RecoveryFacts({}, {}, {}, {})
        self._tpm = file.tpm
        self.headers = file.headers or {}
        """LUKS UUID -> the header's facts when this host made the member's token, as canonical JSON."""
        self.removed = file.removed
        """The policy under which the persistence key was sealed, when the TPM does not have it any more."""
        self.narrowed = file.narrowed
        """What has narrowed a policy, in words, until there is a new persistence key; None."""
        self._old_keys = dict(file.old_keys or {})

    @classmethod
    def new(cls, paths: Paths, host: str) -> "State":
        """The state of a host that has no provider and no keys yet. Saves nothing."""
        file = StateFile(
            version=state_file.VERSION,
            host=host,
            provider=None,
            others={},
            persistence=True,
            host_key=None,
            mac_key=None,
            groups={},
            manifests={},
            generations={},
            retire=(),
            journal=None,
        )
        return cls(paths.state, file)

    @classmethod
    def load(cls, paths: Paths) -> "State":
        """Raises Refused when the host is not initialised, or was and its state is away; Malformed, NewerFormat."""
        try:
            with open(paths.state, "rb") as file:
                content = file.read()
        except FileNotFoundError as error:
            from .missing_state import explain_missing_state

            raise explain_missing_state(paths) from error
        return cls(paths.state, state_file.parse(content, paths.state))

    def save(self) -> None:
        """Durable when it returns. Raises OSError; the old state is then still there."""
        for group in self.groups.values():
            self.skip_generation(group.name, group.generation)
            if self._asked.get(group.name, 0) <= group.generation:
                self._asked.pop(group.name, None)
            for member in group.members:
                self.forgotten.pop(member.uuid, None)
        if goes_on_by_itself(self.journal):
            resumption.mark(self._path)
        write_atomically(self._path, self._content())
        if not goes_on_by_itself(self.journal):
            resumption.unmark(self._path)
        if not self.journal:
            resumption.lift_pause(self._path)

    def save_if_changed(self) -> None:
        """Writes nothing when the file has the same content already."""
        with open(self._path, "rb") as file:
            if file.read() == self._content():
                return
        self.save()

    def _content(self) -> bytes:
        file = StateFile(
            version=state_file.VERSION,
            host=self.host,
            provider=self._provider,
            others=self.others,
            persistence=self.persistent,
            host_key=self._host_key,
            mac_key=self._mac_key,
            groups={group.name: state_file.group_entry(group) for group in self.groups.values()},
            manifests=self._manifests,
            generations=self._generations,
            retire=tuple(self.retire),
            journal=self.journal,
            recovery=self.recovery,
            tpm=self._tpm,
            removed=self.removed,
            narrowed=self.narrowed,
            old_keys=self._old_keys or None,
            headers=self.headers or None,
            asked=self._asked or None,
            forgotten=self.forgotten or None,
        )
        return state_file.write(file)

    # The journal

    def begin(self, entry: JournalEntry) -> None:
        """Journals an operation, durably. Raises Refused when another one is unfinished."""
        self.refuse_other(entry.operation, entry.about)
        self.journal = entry
        self.save()

    def refuse_other(self, operation: str, about: str) -> None:
        """Raises Refused when an operation is unfinished that is not this one."""
        if self.journal and (self.journal.operation, self.journal.about) != (operation, about):
            raise Refused(f"`{self.to_finish}` is not finished", "run it again first", code="unfinished")

    def unfinished(self, kind: type[Journaled], about: str) -> Journaled | None:
        """The journal entry of the same operation, killed earlier."""
        return self.journal if isinstance(self.journal, kind) and self.journal.about == about else None

    @property
    def to_finish(self) -> str:
        """What a person types to finish the operation in the journal; '' when nothing is unfinished."""
        return command(self.journal) if self.journal else ""

    # Generations

    def next_manifest(self, group: str) -> int:
        """A generation of a member list that no disk has seen, whatever became of earlier attempts."""
        highest = max(self._manifests.get(group, 0), self.groups[group].manifest if group in self.groups else 0)
        self._manifests[group] = highest + 1
        return highest + 1

    def next_generation(self, group: str) -> int:
        """A generation that no KEK of a group of that name has had. It is taken when the group is saved with it: an
        attempt that came to nothing leaves its name, and the key that it may have made, to the next."""
        generation = self._generations.get(group, 0)
        return 1 + max(generation, self.groups[group].generation if group in self.groups else 0)

    def take_name(self, group: str, generation: int) -> bool:
        """Whether no provider was asked yet for the KEK of that generation; from the next save on, one was."""
        unasked = self._asked.get(group) != generation
        self._asked[group] = generation
        return unasked

    def unused_names(self) -> dict[str, int]:
        """Groups that are not there, and the generation of a KEK that a provider was asked to make for them."""
        return {group: generation for group, generation in self._asked.items() if group not in self.groups}

    def drop_name(self, group: str) -> None:
        """The KEK that was asked for is none of the group's, and no later one gets its generation."""
        self.skip_generation(group, self._asked.pop(group))

    def skip_generation(self, group: str, generation: int) -> None:
        """No later KEK of the group gets this generation, or one below it."""
        self._generations[group] = max(generation, self._generations.get(group, 0))

    # The TPM

    @property
    def tpm(self) -> TpmFacts:
        """Why each state of the TPM's policy is allowed. It permits nothing: the record in the TPM does."""
        return self._tpm or NOTHING_KNOWN

    @tpm.setter
    def tpm(self, facts: TpmFacts) -> None:
        self._tpm = facts

    # Providers

    @property
    def provider(self) -> ProviderEntry:
        """The entry of the provider in use. Raises Refused where `init` was killed before it chose one."""
        if self._provider is None:
            raise _not_initialised()
        return self._provider

    @property
    def provider_id(self) -> str:
        """'' where there is no provider yet."""
        return self._provider.id if self._provider else ""

    @property
    def providers(self) -> list[ProviderEntry]:
        """The entries of all providers, the one in use first."""
        return [*([self._provider] if self._provider else []), *self.others.values()]

    def provider_named(self, name: str = "") -> ProviderEntry:
        """A provider's entry by its name; '' is the one in use. Raises Usage."""
        if name in ("", self.provider.name):
            return self.provider
        if name not in self.others:
            raise Usage(f"there is no provider {name}", "unlock provider list")
        return self.others[name]

    def provider_of(self, key_id: str) -> ProviderEntry:
        """The entry of the provider that has made a key. Raises Refused when that provider was removed."""
        for entry in self.providers:
            if has_made(entry, key_id):
                return entry
        raise Refused(f"the provider of {key_id} is not known", "unlock provider list", code="no-provider")

    def use_provider(self, entry: ProviderEntry) -> None:
        """The one in use from now on; what was in use stays with the others."""
        if self._provider:
            self.others[self._provider.name] = self._provider
        self.others.pop(entry.name, None)
        self._provider = entry

    def put_provider(self, entry: ProviderEntry) -> None:
        """Replaces the entry of the provider of that name, or adds it to those that are not in use."""
        if self._provider and self._provider.name == entry.name:
            self._provider = entry
        else:
            self.others[entry.name] = entry

    def native_entry(self, *, name: str, provider_id: str, scope: str, persistence: Secret, kdk: Secret) -> NativeEntry:
        """The entry of a native provider, its KDK wrapped."""
        wrapped = self._wrapped(persistence, "kdk", kdk)
        return NativeEntry(name=name, kind="native", id=provider_id, scope=scope, kdk=wrapped)

    def kmip_entry(
        self,
        *,
        name: str,
        provider_id: str,
        certificate: str,
        until: int,
        persistence: Secret,
        key: Secret | None,
        password: Secret | None = None,
        offers: Offers | None = None,
    ) -> KmipEntry:
        """The entry of a key manager. `certificate` and `key` are the client's, as PEM; `key` is None when it stays in
        a file. `until`: when the certificate ends, in seconds since 1970. `password`: of its user name, where it has
        one."""
        return KmipEntry(
            name=name,
            kind="kmip",
            id=provider_id,
            client_cert=certificate,
            client_until=until,
            client_key=self._wrapped(persistence, "client-key", key) if key else None,
            password=self._wrapped(persistence, "client-password", password) if password else None,
            offers=offers,
        )

    def kdk(self, persistence: Secret, entry: NativeEntry) -> Secret:
        """A native provider's KDK. Raises Tampered."""
        return self._unwrapped(persistence, "kdk", entry.kdk)

    def client_key(self, persistence: Secret, entry: KmipEntry) -> Secret | None:
        """A KMIP client's private key, as PEM; None where it stays in a file. Raises Tampered."""
        return self._unwrapped(persistence, "client-key", entry.client_key) if entry.client_key else None

    def client_password(self, persistence: Secret, entry: KmipEntry) -> Secret | None:
        """The password of a KMIP client's user name; None where there is none. Raises Tampered."""
        return self._unwrapped(persistence, "client-password", entry.password) if entry.password else None

    def not_retired(self, entry: ProviderEntry) -> list[ReplacedKek]:
        """The replaced KEKs that one provider has not deactivated yet."""
        return [each for each in self.retire if has_made(entry, each.id)]

    # The host key

    @property
    def _present_host_key(self) -> HostKey:
        if self._host_key is None:
            raise _not_initialised()
        return self._host_key

    def set_host_key(self, entry: KeyEntry, *, persistence: Secret, key: Secret, keep_former: bool = True) -> None:
        """The host key, in place of another one, which dumps may still need (`keep_former`)."""
        old = self._host_key
        former = old.former if old else ()
        self._host_key = HostKey(
            *entry,
            wrapped=self._wrapped(persistence, "host-key", key) if self.persistent else None,
            former=(*former, old._replace(former=())) if old and keep_former else former,
        )

    def drop_host_key(self) -> None:
        """The host key is not kept any more; the provider has it."""
        self._host_key = self._present_host_key._replace(wrapped=None)

    @property
    def host_key_ref(self) -> KeyEntry:
        """Where the host key is at its provider. Raises Refused where `init` was killed before it had one."""
        key = self._present_host_key
        return KeyEntry(key.id, key.name, key.generation)

    def had_host_key(self, key_id: str) -> bool:
        """Whether it was this host's before the present one."""
        return any(each.id == key_id for each in self._present_host_key.former)

    @property
    def host_keys(self) -> list[HostKey]:
        """The present one, then those that it has replaced, the latest first. Raises Refused as `host_key_ref`."""
        return [self._present_host_key, *reversed(self._present_host_key.former)]

    def unwrap_host_key(self, persistence: Secret, entry: HostKey) -> Secret:
        """One of `host_keys` that this host keeps. Raises Tampered."""
        return self._unwrapped(persistence, "host-key", entry.wrapped or "")

    def host_key(self, persistence: Secret) -> Secret | None:
        """None where it is not kept on this host. Raises Tampered."""
        wrapped = self._present_host_key.wrapped
        return self._unwrapped(persistence, "host-key", wrapped) if wrapped else None

    # The recovery key

    @property
    def has_recovery_key(self) -> bool:
        """Whether this host has a recovery key. The key itself is never in the state, but for a rotation's journal."""
        return self._mac_key is not None

    def set_mac_key(self, *, persistence: Secret, mac_key: Secret) -> None:
        """The MAC key of the present recovery key."""
        self._mac_key = self._wrapped(persistence, "mac-key", mac_key)

    def mac_key(self, persistence: Secret, uuid: str = "") -> Secret:
        """The key of the headers' recovery MACs; with `uuid`, the one that fits the recovery key that this disk has.
        Raises Tampered, Malformed when there is none."""
        wrapped = self.recovery.behind.get(uuid, self._mac_key)
        if wrapped is None:
            raise Malformed(f"{self._path} has no mac_key")
        return self._unwrapped(persistence, "mac-key", wrapped)

    def change_mac_key(self, *, persistence: Secret, mac_key: Secret, behind: list[str]) -> None:
        """Another recovery key; the disks `behind`, by LUKS UUID, still have the one before, or one before that."""
        assert self._mac_key
        for uuid in behind:
            self.recovery.behind.setdefault(uuid, self._mac_key)
        self.set_mac_key(persistence=persistence, mac_key=mac_key)

    def wrap_recovery_key(self, *, persistence: Secret, recovery: Secret) -> str:
        """The recovery key wrapped: for the journal alone, while the key is brought to the disks."""
        return self._wrapped(persistence, "recovery-key", recovery)

    def unwrap_recovery_key(self, persistence: Secret, wrapped: str) -> Secret:
        """Raises Tampered."""
        return self._unwrapped(persistence, "recovery-key", wrapped)

    # The persistence key

    def prove(self, persistence: Secret) -> None:
        """Raises Tampered unless this is the key that wraps what the state keeps."""
        wraps = [
            *_wrapped_keys(self.provider).items(),
            ("host-key", self._present_host_key.wrapped),
            ("mac-key", self._mac_key),
        ]
        for kind, wrapped in wraps:
            if wrapped:
                self._unwrapped(persistence, kind, wrapped).wipe()

    def rewrap(self, *, old: Secret | None, new: Secret) -> list[str]:
        """Wraps by `new` what `old` wraps, but for the journal. Without `old`, host keys and the old keys of absent
        disks are not kept any more; returns the names of the providers whose own key is lost, now or in an earlier
        rebind: their entries stay as they are. Saves nothing. Raises Tampered."""
        lost = [entry.name for entry in self.providers if _wrapped_keys(entry) and not old]

        def again(kind: str, wrapped: str) -> str:
            assert old
            with self._unwrapped(old, kind, wrapped) as key:
                return self._wrapped(new, kind, key)

        def host_key_again(key: HostKey) -> HostKey:
            return key._replace(wrapped=again("host-key", key.wrapped) if key.wrapped and old else None)

        if old:
            for entry in self.providers:
                try:
                    wraps = {kind: again(kind, wrapped) for kind, wrapped in _wrapped_keys(entry).items()}
                except Tampered:
                    if entry.name == self.provider.name:
                        raise
                    lost.append(entry.name)
                else:
                    self.put_provider(_with_wrapped_keys(entry, wraps))
        present = host_key_again(self._present_host_key)
        self._host_key = present._replace(former=tuple(host_key_again(each) for each in present.former))
        if old and self._mac_key:
            self._mac_key = again("mac-key", self._mac_key)
        behind = {uuid: again("mac-key", wrapped) for uuid, wrapped in self.recovery.behind.items() if old}
        self.recovery = self.recovery._replace(behind=behind)
        self._old_keys = {uuid: again("persistence", wrapped) for uuid, wrapped in self._old_keys.items() if old}
        return lost

    def rewrapped(self, entry: JournalEntry | None, *, old: Secret | None, new: Secret) -> JournalEntry | None:
        """A journal entry with its key wrapped by `new`. None for a rotation of the recovery key whose new key is lost.
        Raises Tampered."""
        if not isinstance(entry, RecoveryRotation):
            return entry
        if old is None:
            return None
        with self.unwrap_recovery_key(old, entry.key) as recovery:
            return entry._replace(key=self.wrap_recovery_key(persistence=new, recovery=recovery))

    def wrap_pair(self, *, old: Secret, new: Secret) -> tuple[str, str]:
        """The new persistence key wrapped by the old one, and the old one wrapped by the new one: for the journal."""
        return self._wrapped(old, "persistence", new), self._wrapped(new, "persistence", old)

    def unwrap_pair(self, entry: NewPersistenceKey, either: Secret) -> tuple[Secret, Secret]:
        """The old and the new persistence key of a replacement under way, by the one that the TPM gave. Raises
        Tampered."""
        try:
            return either.copy(), self._unwrapped(either, "persistence", entry.new)
        except Tampered:
            return self._unwrapped(either, "persistence", entry.old), either.copy()

    def own_key(self, cached: Secret) -> Secret:
        """The persistence key that wraps what the state keeps: `cached`, or, while one replaces the other, perhaps the
        other. Takes `cached` over. Raises Tampered."""
        entry = self._replacement
        if not entry:
            return cached
        with cached:
            old, new = self.unwrap_pair(entry, cached)
        mine, other = (new, old) if entry.sealed else (old, new)
        other.wipe()
        return mine

    def known_keys(self, cached: Secret) -> list[Secret]:
        """`cached`, and the other persistence key while one replaces the other. Takes `cached` over. Raises
        Tampered."""
        if entry := self._replacement:
            with cached:
                return list(self.unwrap_pair(entry, cached))
        if isinstance(self.journal, Rebind):
            with suppress(Tampered):
                if old := self.unwrap_old_persistence_key(cached, self.journal.new):
                    return [cached, old]
        return [cached]

    @property
    def _replacement(self) -> NewPersistenceKey | None:
        """A replacement of the persistence key that is not finished; a rebind goes on from it."""
        entry = self.journal.before if isinstance(self.journal, Rebind) else self.journal
        return entry if isinstance(entry, NewPersistenceKey) else None

    # Old persistence keys: a disk that was away when there was a new one needs the old one, once

    @property
    def has_old_keys(self) -> bool:
        """Whether a disk may come back whose token is under an earlier persistence key."""
        return bool(self._old_keys)

    def keep_old_key(self, uuid: str, *, new: Secret, old: Secret) -> None:
        """Keeps, wrapped by `new`, the persistence key that the token of an absent disk is under; an earlier one that
        is kept for it stays."""
        self._old_keys.setdefault(uuid, self._wrapped(new, "persistence", old))

    def drop_old_key(self, uuid: str) -> None:
        """The disk is under the present persistence key, or is none of this host's any more."""
        self._old_keys.pop(uuid, None)

    def old_key(self, persistence: Secret, uuid: str) -> Secret | None:
        """The persistence key that the token of a disk is under which was away; None for every other disk. Raises
        Tampered."""
        wrapped = self._old_keys.get(uuid)
        return self._unwrapped(persistence, "persistence", wrapped) if wrapped else None

    def drop_disk(self, uuid: str) -> None:
        """The disk is no member any more: what is known of its header and keys goes."""
        known = self.recovery
        for each in (self.headers, self._old_keys, known.keyslots, known.former, known.behind, known.tested):
            each.pop(uuid, None)
        self.forgotten.pop(uuid, None)

    def forget_member(self, member: Member, group: str) -> None:
        """The disk is no member any more, and may come back."""
        self.drop_disk(member.uuid)
        self.forgotten[member.uuid] = FormerMember(member.name, group)

    def forget_strangers(self) -> None:
        """Drops the old keys of disks that are in no group."""
        known = {member.uuid for group in self.groups.values() for member in group.members}
        self._old_keys = {uuid: wrapped for uuid, wrapped in self._old_keys.items() if uuid in known}

    def wrap_old_persistence_key(self, *, new: Secret, old: Secret | None) -> str:
        """The old persistence key, or 32 zero bytes for none, wrapped by the new one: for the journal of a rebind."""
        return self._wrapped(new, "rebind", old or Secret(bytes(32)))

    def unwrap_old_persistence_key(self, new: Secret, wrapped: str) -> Secret | None:
        """None where the rebind had no old persistence key. Raises Tampered when `new` is not that rebind's."""
        old = self._unwrapped(new, "rebind", wrapped)
        return old if any(old.value) else None

    def _wrapped(self, persistence: Secret, kind: str, key: Secret) -> str:
        return b64encode(wrap.wrap(persistence, plain=key, aad=token.key_aad(self.host, kind))).decode()

    def _unwrapped(self, persistence: Secret, kind: str, text: str) -> Secret:
        try:
            wrapped = a2b_base64(text, strict_mode=True)
        except (Base64Error, ValueError) as error:
            raise Malformed(f"the wrapped {kind} in {self._path} is not base64") from error
        return wrap.unwrap(persistence, wrapped, token.key_aad(self.host, kind))


@contextmanager
def changing(paths: Paths, patience: float = PATIENCE) -> Iterator[State]:
    """Holds the lock; gives the state as no other command changes it. Raises what `State.load` raises, and Refused as
    `exclusive` does."""
    with exclusive(paths, patience):
        yield State.load(paths)


def _not_initialised() -> Refused:
    return Refused("`unlock init` is not finished", "run it again first", code="unfinished")


def _wrapped_keys(entry: ProviderEntry) -> dict[str, str]:
    """Kind -> wrapped key, of the keys that the entry has."""
    if entry.kind == "native":
        return {"kdk": entry.kdk}
    wraps = {"client-key": entry.client_key, "client-password": entry.password}
    return {kind: wrapped for kind, wrapped in wraps.items() if wrapped}


def _with_wrapped_keys(entry: ProviderEntry, wraps: dict[str, str]) -> ProviderEntry:
    """The entry with these wrapped keys, of `_wrapped_keys`."""
    if entry.kind == "native":
        return entry._replace(kdk=wraps["kdk"])
    return entry._replace(client_key=wraps.get("client-key"), password=wraps.get("client-password"))
