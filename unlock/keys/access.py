# SPDX-License-Identifier: Apache-2.0
"""Gets the keys that a command on the running host needs: from the key cache, else from the disks, else from a
provider.

`Work` is one run of a command or service that needs keys: it holds the state, the persistence key, the disks and the
connections to providers. It asks a provider only when neither key cache nor disks have the key.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager

from .. import ask
from ..disks import devices, disk_keys, find, luks, token
from ..disks.groups import POLICIES, Group
from ..errors import DiskFailed, NoKey, Refused, Tampered, UnlockError, Usage
from ..host import config, keyring, this_boot
from ..host.provider_entry import KmipEntry, Offers, ProviderEntry
from ..host.state import State
from ..paths import Paths
from ..providers import COMPROMISED, DEACTIVATED, PRE_ACTIVE, USABLE, Provider, Ref, native
from ..secret import Secret

OPENS = USABLE | {PRE_ACTIVE, DEACTIVATED, COMPROMISED}
"""States in which a key that is in use still opens disks, unless the operator's `drop_on` says otherwise."""

Connect = Callable[[Paths, State, Secret | None, ProviderEntry], Provider]
"""Connects to the provider of an entry of the state. Raises UnlockError."""


def connect(paths: Paths, state: State, persistence: Secret | None, entry: ProviderEntry) -> Provider:
    """The provider of an entry. `persistence` is None when the TPM refused: then only a key manager whose client key is
    in a file can be asked. Raises NoKey, Tampered, Usage, Refused, Malformed."""
    if entry.kind == "native":
        if persistence is None:
            raise NoKey("the native provider's key is wrapped by the persistence key", "unlock status")
        return native.Native(state.kdk(persistence, entry), entry.scope)
    settings = provider_settings(paths, entry)
    return connect_kmip(
        settings,
        provider_id=entry.id,
        certificate=entry.client_cert,
        key=_client_key(state, persistence, settings, entry),
        password=_client_password(state, persistence, settings, entry),
        offers=entry.offers,
    )


def _client_key(state: State, persistence: Secret | None, settings: config.ProviderConfig, entry: KmipEntry) -> Secret:
    """From the state, or from the file that unlock.toml names. Raises NoKey, Usage."""
    if persistence is None and entry.client_key:
        raise NoKey("the client key is wrapped by the persistence key", "give [provider] a client_key file")
    kept = state.client_key(persistence, entry) if persistence else None
    return kept or ask.from_file(settings.client_key)


def _client_password(
    state: State, persistence: Secret | None, settings: config.ProviderConfig, entry: KmipEntry
) -> Secret | None:
    """The password of the user name in unlock.toml; None without a user name. Raises NoKey."""
    if not settings.username or not entry.password:
        return None
    if persistence is None:
        raise NoKey("the key manager's password is wrapped by the persistence key", "unlock status")
    return state.client_password(persistence, entry)


def provider_settings(paths: Paths, entry: KmipEntry) -> config.ProviderConfig:
    """The [provider.NAME] of a key manager in unlock.toml. Raises Refused where there is none."""
    settings = config.load(paths.config).provider(entry.name)
    if settings is None:
        raise Refused(f"unlock.toml has no [provider.{entry.name}]", f"edit {paths.config}", code="no-provider")
    return settings


def connect_kmip(
    settings: config.ProviderConfig,
    *,
    provider_id: str,
    certificate: str,
    key: Secret,
    password: Secret | None = None,
    offers: Offers | None = None,
) -> Provider:
    """A KMIP provider, which takes key and password over and wipes them. `certificate` and `key` are PEM. Raises Usage,
    Malformed."""
    from ..endpoint import Endpoint
    from ..providers.kmip.provider import KmipProvider, KmipSettings  # post-boot only

    return KmipProvider(
        KmipSettings(
            id=provider_id,
            endpoints=tuple(map(Endpoint.parse, settings.endpoints)),
            ca=read_public_pem(settings.ca),
            certificate=certificate,
            key=key,
            username=settings.username,
            password=password,
            timeout=settings.timeout,
            plain_names=settings.key_names == "plain",
            common_name=settings.common_name,
            offers=offers,
        )
    )


def certificate_end(certificate: str) -> int:
    """When a PEM certificate ends, in seconds since 1970. Raises Malformed."""
    from ..providers.kmip import tls

    return int(tls.validity(certificate)[1])


def read_public_pem(path: str) -> str:
    """The text of a PEM file that holds no secrets. Raises Usage."""
    try:
        with open(path, encoding="ascii") as file:
            return file.read(1 << 20)
    except (OSError, UnicodeDecodeError) as error:
        raise Usage(f"{path} cannot be read: {error}", "give a PEM file") from error


class Work:
    """One run of a command that needs keys. The constructor raises Refused when the host is not initialised, NoKey as
    `read_persistence_key` does."""

    def __init__(self, paths: Paths, look: find.Look = find.look, connect: Connect = connect) -> None:
        self.paths = paths
        self.state = State.load(paths)
        self.settings = config.load(paths.config)
        try:
            self.persistence = read_persistence_key(self.state)
        except NoKey as error:
            early = this_boot.read_early_report(paths)
            if early and early.has_changed_disk():
                error.hint = "a disk's header was changed, so that early boot gave no keys: unlock rebind"
            raise
        self.look = look
        self._connect = connect
        self._providers: dict[str, Provider] = {}
        self.fetched: dict[tuple[str, int], Secret] = {}
        """KEKs that only a provider had, so that each is asked for once."""
        self._old_keys: dict[str, Secret] = {}

    def __enter__(self) -> "Work":
        return self

    def __exit__(self, *_: object) -> None:
        for each in self._providers.values():
            each.close()
        for key in (self.persistence, *self.fetched.values(), *self._old_keys.values()):
            key.wipe()

    def provider(self, entry: ProviderEntry | None = None) -> Provider:
        """The provider in use, or that of an entry; one connection for the whole of the work."""
        entry = entry or self.state.provider
        if entry.name not in self._providers:
            self._providers[entry.name] = self._connect(self.paths, self.state, self.persistence, entry)
        return self._providers[entry.name]

    def nodes(self, group: Group) -> dict[str, str]:
        """LUKS UUID -> node of the members that are here."""
        seen = self.look()
        found = {member.uuid: find.find_node(seen, member) for member in group.members}
        return {uuid: node for uuid, node in found.items() if node}

    def persistence_keys(self, uuid: str) -> list[Secret]:
        """Those that the token of a disk may be under: the present one, and, for a disk that was away when that was
        made, the one before. They stay this object's. Raises Tampered."""
        if uuid not in self._old_keys and (old := self.state.old_key(self.persistence, uuid)):
            self._old_keys[uuid] = old
        return [self.persistence, *([self._old_keys[uuid]] if uuid in self._old_keys else [])]

    def host_key(self) -> Secret:
        """The host key from the state; NOT_KEPT where this host does not keep it, so that tokens do not carry it."""
        return self.state.host_key(self.persistence) or Secret(disk_keys.NOT_KEPT)

    def opens(self) -> frozenset[str]:
        """The states of a provider's key in which it may open disks."""
        return OPENS - self.settings.sync.drop_on


def read_persistence_key(state: State) -> Secret:
    """The persistence key that wraps what the state keeps, by the key cache. Raises NoKey when this boot was not
    unsealed, or the cache was flushed; Tampered."""
    try:
        return state.own_key(keyring.get("unlock:persistence"))
    except NoKey as error:
        raise NoKey(
            "the persistence key is not in the key cache, so nothing can be sealed or unwrapped: it was flushed, or "
            "this boot was not unsealed",
            "after a flush: reboot; else: unlock explain",
        ) from error


def keep_offers(work: Work) -> None:
    """Notes in the state what the key manager in use offers, where that is not known yet. Raises ProviderError."""
    entry = work.state.provider
    if entry.kind == "kmip" and entry.offers is None:
        work.state.put_provider(entry._replace(offers=work.provider().offers()))


def key_ref(entry: ProviderEntry, key_id: str, name: str) -> Ref:
    """A key as its provider knows it; `key_id` is PROVIDER/ID."""
    return Ref(key_id.removeprefix(f"{entry.id}/"), name)


def key_name(host: str, kind: str, generation: int) -> str:
    """The name of a key at the provider, which no other key has. `kind` is `host` or `kek/GROUP`."""
    return f"unlock/{host}/{kind}/{generation}"


def cache_name(kek_id: str, generation: int) -> str:
    """The name of a KEK in the key cache; each generation has its own."""
    return f"unlock:kek:{kek_id}:{generation}"


def find_kek(
    work: Work, group: Group, nodes: dict[str, str] | None = None, states: frozenset[str] | None = None
) -> tuple[Secret, str]:
    """The KEK of a group and where it came from: `cache`, `TPM` (a disk's token) or `provider`. Raises ProviderError.

    `nodes`: LUKS UUID -> node of members, where the caller knows them. `states`: the states of the key in which the
    provider may give it; by default those in which it opens disks.
    """
    try:
        return keyring.get(cache_name(group.kek, group.generation)), "cache"
    except NoKey:
        pass
    nodes = work.nodes(group) if nodes is None else nodes
    for uuid, node in nodes.items():
        for each in _tokens(work, node, group):
            for key in work.persistence_keys(uuid):
                try:
                    return disk_keys.unwrap_kek(each, key), "TPM"
                except Tampered:
                    continue
    which = (group.kek, group.generation)
    if which not in work.fetched:
        entry = work.state.provider_of(group.kek)
        kek_id = key_ref(entry, group.kek, group.kek_name).id
        work.fetched[which] = work.provider(entry).fetch(kek_id, states or work.opens(), kek_prover(work, group, nodes))
    return work.fetched[which].copy(), "provider"


def kek_prover(work: Work, group: Group, nodes: dict[str, str]) -> Callable[[Secret], None]:
    """A check for a key from a provider: the group's KEK must unwrap the volume key of some member. A member that was
    tampered with does not hold up the others. The check raises Tampered."""

    def prove(kek: Secret) -> None:
        trouble = None
        for node in nodes.values():
            for each in _tokens(work, node, group):
                try:
                    with luks.Container(node) as container:
                        disk_keys.unwrap_by_kek(container, each, kek).wipe()
                    return
                except UnlockError as error:
                    trouble = error
        if trouble:
            raise Tampered(f"the key does not unwrap what the KEK of group {group.name} wraps") from trouble

    return prove


def _tokens(work: Work, node: str, group: Group) -> list[token.Token]:
    """The tokens of a disk whose fields name this KEK of the group."""
    try:
        with luks.Container(node) as container:
            found = disk_keys.read_tokens(container, work.state.host)
    except UnlockError:
        return []
    said = (group.name, group.kek, group.generation)
    return [each for each in found if (each.group, each.kek_id, each.kek_generation) == said]


@contextmanager
def token_keys(work: Work, *, kek: Secret, mac_key: Secret) -> Iterator[disk_keys.Keys]:
    """The keys that a token is made with. Takes `kek` and `mac_key` over and wipes them."""
    with kek, mac_key, work.host_key() as host_key:
        yield disk_keys.Keys(persistence=work.persistence, host_key=host_key, kek=kek, mac_key=mac_key)


def is_recovery_key(state: State, *, persistence: Secret, recovery: Secret) -> bool:
    """Whether this is the present recovery key of this host, by its MAC key. Raises Tampered, Malformed."""
    with disk_keys.mac_key(recovery, state.host) as mac_key, state.mac_key(persistence) as expected:
        return mac_key == expected


def wanted_policy(work: Work, group: Group) -> str:
    """`persistent` or `provider`, as configuration and `unlock persistence` say. A group with the root file system is
    always persistent: it cannot wait for a network. Raises Malformed if the configuration of the group is wrong."""
    if any(member.name in devices.mappings_below("/") for member in group.members):
        return "persistent"
    if not work.state.persistent:
        return "provider"
    setting = work.settings.group(group.name)
    return setting.policy if setting else POLICIES[0]


def make_key(provider: Provider, name: str, prove: Callable[[Secret], None] | None = None) -> tuple[Ref, Secret]:
    """Makes a key at the provider under a name, activates and fetches it; after a kill, finds it by that name. Raises
    ProviderError."""
    made = provider.create(name)
    provider.activate(made.id)
    return made, provider.fetch(made.id, prove=prove) if prove else provider.fetch(made.id)


def find_volume_key(work: Work, container: luks.Container, group: Group) -> Secret:
    """The volume key of a member, from the first of its tokens, old or new, that gives it.

    Raises Tampered, ProviderError, NotOurs.
    """
    trouble: UnlockError | None = None
    for each in disk_keys.read_tokens(container, work.state.host):
        try:
            return _volume_key(work, container, each, group)
        except UnlockError as error:
            trouble = error
    assert trouble
    raise trouble


def _volume_key(work: Work, container: luks.Container, each: token.Token, group: Group) -> Secret:
    if disk_keys.is_moving(container, each):
        raise DiskFailed(f"{container.device} is being re-encrypted", "unlock status", "unmet-requirements")
    kek = None
    for key in work.persistence_keys(container.uuid):
        try:
            return disk_keys.unwrap_volume_key(container, each, key)
        except NoKey:
            earlier = group._replace(kek=each.kek_id, generation=each.kek_generation, kek_name="")
            kek, _ = find_kek(work, earlier)
            break
        except Tampered as error:  # or it was away while this host got another persistence key
            trouble = error
    if kek is None:
        if (each.kek_id, each.kek_generation) != (group.kek, group.generation):
            raise trouble
        kek, _ = find_kek(work, group)
    with kek:
        return disk_keys.unwrap_by_kek(container, each, kek)
