# SPDX-License-Identifier: Apache-2.0
"""A host for the flows after boot: real LUKS2 images, keyring and state, and a scripted key manager over TLS."""

import fcntl
import os
import tempfile
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path

from tests import blank
from tests.kmipfixture import AUTHORITY, CLIENT
from tests.lab.kmipliar import Liar
from tests.lab.kmipserver import KmipServer
from tests.lab.pki import Leaf
from tests.tpmfixture import Swtpm
from unlock.disks import disk_keys, find, luks
from unlock.disks.groups import Group, Member
from unlock.errors import UnlockError
from unlock.host import config, keyring, report, report_file, this_boot
from unlock.host.provider_entry import KmipEntry, ProviderEntry
from unlock.host.state import State
from unlock.host.state_file import KeyEntry
from unlock.keys import access, recovery_key
from unlock.paths import Paths, write_atomically
from unlock.providers import native
from unlock.secret import Secret
from unlock.tpm import pcr_policy, slots
from unlock.tpm.record import Payload

HOST = "ab" * 16
Server = Liar | KmipServer


@contextmanager
def key_cache_alone() -> Iterator[None]:
    """The user keyring is one for all processes of root in a user namespace: whoever puts keys into it is alone."""
    namespace = os.stat("/proc/self/ns/user").st_ino
    with Path(tempfile.gettempdir(), f"unlock-test-keyring-{namespace}.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        keyring.flush()
        yield
        keyring.flush()


class Host:
    """An initialised host with a group `data`, whose early boot unsealed. `disks`: the images that are plugged in."""

    disk_bytes = 32 << 20
    """Of an image. Not a multiple of 4096: it gets encryption sectors of 512."""

    def __init__(
        self, folder: Path, count: int = 2, *kms: Liar | KmipServer, policy_of_group: str = "persistent"
    ) -> None:
        self.folder = folder
        self.paths = Paths(str(folder / "root"))
        self.recovery = recovery_key.new()
        self.persistence = Secret.random(32)
        self.refused = False
        keyring.flush()
        os.makedirs(self.paths.run)
        this_boot.cache_keys(self.paths, "TPM", {"unlock:persistence": self.persistence})
        early = report.Report("early-boot")
        early.set_verdict("unsealed")
        early.facts = report.BootFacts(unauthenticated_root=False, cap_pcr_before=pcr_policy.UNSET.hex())
        Path(self.paths.of_this_boot("report.json")).write_bytes(report_file.encode(early))
        self.configure(*kms)
        state = State.new(self.paths, HOST)
        self._provide(state, bool(kms))
        with disk_keys.mac_key(self.recovery, HOST) as mac_key:
            state.set_mac_key(persistence=self.persistence, mac_key=mac_key)
        state.save()
        self.disks: list[Path] = []
        self.deks: dict[str, bytes] = {}
        if count:
            self.add_group("data", count, policy_of_group)

    def configure(self, *kms: Server, more: str = "") -> None:
        """unlock.toml: `kms` are the endpoints of the provider `kms`, in that order."""
        text = config.HEAD + more
        if kms:
            endpoints = tuple(f"127.0.0.1:{each.port}" for each in kms)
            text += config.provider_table(config.ProviderConfig("kms", endpoints, self.ca(), "", config.TIMEOUT))
        write_atomically(self.paths.config, text.encode())

    def ca(self) -> str:
        """A file with the key managers' CA."""
        ca = self.folder / "ca.pem"
        ca.write_text(AUTHORITY.certificate)
        return str(ca)

    def _provide(self, state: State, kmip: bool) -> None:
        if kmip:
            entry: ProviderEntry = self._kmip_entry(state, "kmip-one", CLIENT, self.persistence)
        else:
            with Secret.random(32) as kdk, native.Native(Secret(bytes(kdk)), HOST) as made:
                entry = state.native_entry(
                    name="native", provider_id=made.id, scope=HOST, persistence=self.persistence, kdk=kdk
                )
        state.use_provider(entry)
        name = access.key_name(HOST, "host", 1)
        with access.connect(self.paths, state, self.persistence, entry) as provider:
            ref, key = access.make_key(provider, name)
            if entry.kind == "kmip":
                state.use_provider(entry._replace(offers=provider.offers()))
            with key:
                host_key = KeyEntry(f"{provider.id}/{ref.id}", ref.name, 1)
                state.set_host_key(host_key, persistence=self.persistence, key=key)

    def _kmip_entry(self, state: State, provider_id: str, leaf: Leaf, persistence: Secret) -> KmipEntry:
        return state.kmip_entry(
            name="kms",
            provider_id=provider_id,
            certificate=leaf.certificate,
            until=0,
            persistence=persistence,
            key=Secret(leaf.key),
        )

    def add_group(self, name: str, count: int, policy_of_group: str = "persistent") -> Group:
        images = []
        for number in range(count):
            image = self.folder / f"{name}-{number}"
            made = blank.disk(image, self.disk_bytes)
            with luks.Container(str(image)) as container, Secret(made.volume_key) as dek:
                container.add_keyslot(dek, passphrase=self.recovery)
            self.deks[made.uuid] = made.volume_key
            images.append((image, made.uuid))
        members = tuple(Member(uuid, f"{name}-{i}", "") for i, (_, uuid) in enumerate(images))
        self.disks += [image for image, _ in images]
        with self.work() as work:
            provider = work.provider()
            ref, kek = access.make_key(provider, access.key_name(HOST, f"kek/{name}", 1))
            group = Group(name, f"{provider.id}/{ref.id}", 1, 1, members, ref.name, policy_of_group)
            with kek, disk_keys.mac_key(self.recovery, HOST) as mac_key, work.host_key() as host_key:
                keys = disk_keys.Keys(self.persistence, host_key, kek, mac_key)
                for image, uuid in images:
                    member = next(each for each in members if each.uuid == uuid)
                    with luks.Container(str(image)) as container, Secret(self.deks[uuid]) as dek:
                        token = disk_keys.make_token(container, HOST, group, member, dek, keys)
                        disk_keys.write_token(str(image), token, dek, keys)
            work.state.groups[name] = group
            work.state.save()
        if policy_of_group == "provider":
            with open(self.paths.config, "a", encoding="utf-8") as file:
                file.write(f'[group.{name}]\npolicy = "provider"\n')
        return group

    def use_client(self, leaf: Leaf) -> None:
        """Another client certificate, and its key."""
        with self.work() as work:
            old = work.state.provider
            assert old.kind == "kmip"
            new = self._kmip_entry(work.state, old.id, leaf, work.persistence)
            work.state.put_provider(new._replace(password=old.password))
            work.state.save()

    # What a flow is given

    def look(self) -> dict[str, list[find.Found]]:
        return find.read_headers(find.Found(str(image), "") for image in self.disks)

    def work(self) -> access.Work:
        return access.Work(self.paths, self.look)

    def take_key(self) -> None:
        """After a new persistence key was made: what the next boot has."""
        self.persistence = keyring.get("unlock:persistence")

    @contextmanager
    def tpm(self) -> Iterator[Swtpm]:
        """A TPM that has the persistence key, for any boot like this one."""
        with Swtpm(self.folder / "chip") as chip:
            with chip.open() as tpm:
                selection = pcr_policy.select((7,))
                branch = pcr_policy.branch(selection, tpm.read_pcrs(range(16)))
                payload = Payload(Secret(bytes(self.persistence)))
                slots.seal_slot(tpm, bytes.fromhex(HOST), selection, (branch,), payload)
            yield chip

    # What is true

    @property
    def state(self) -> State:
        return State.load(self.paths)

    @property
    def group(self) -> Group:
        return self.state.groups["data"]

    def tokens(self, image: Path) -> list[tuple[str, int]]:
        with luks.Container(str(image)) as container:
            return [(each.kek_id, each.kek_generation) for each in disk_keys.read_tokens(container, HOST)]

    def boot_opens(self, images: Iterable[Path] | None = None) -> bool:
        """As early boot would: every disk gives its volume key by the persistence key alone."""
        return all(self.opens(image) for image in images or self.disks)

    def opens(self, image: Path) -> bool:
        with luks.Container(str(image)) as container:
            for each in disk_keys.read_tokens(container, HOST):
                try:
                    with disk_keys.unwrap_volume_key(container, each, self.persistence) as dek:
                        return bytes(dek) == self.deks[container.uuid]
                except UnlockError:
                    continue
        return False

    def recovery_opens(self) -> bool:
        for image in self.disks:
            with (
                luks.Container(str(image)) as container,
                disk_keys.dek_by_recovery_key(container, self.recovery) as dek,
            ):
                if bytes(dek) != self.deks[container.uuid]:
                    return False
                with disk_keys.mac_key(self.recovery, HOST) as mac_key:
                    for each in disk_keys.read_tokens(container, HOST):
                        disk_keys.check_recovery(container, each, mac_key)
        return True
