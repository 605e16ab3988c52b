# SPDX-License-Identifier: Apache-2.0
"""A host for the flows after boot: real LUKS2 images, real keyring, real state; and a KMS at the provider's interface.

The KMS is one JSON file, so that it outlives a killed command and may be looked at from another process. It does what
servers do (lag, lie, deny, forget, die between two questions) when its `faults` say so.
"""

import json
import os
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

from unlock import config, disk, keyring, luks, policy, present, provide, recoverykey, report
from unlock.errors import (
    ClientAuth,
    ClockWrong,
    Integrity,
    NotFoundOrDenied,
    ProviderUnavailable,
    StateBlocked,
    Tampered,
)
from unlock.groups import Group, Member
from unlock.paths import Paths, write_atomically
from unlock.providers import ACTIVE, BLOCKED, PRE_ACTIVE, UNKNOWN, USABLE, Capabilities, Health, Ref, Status, no_proof
from unlock.providers.native import Native
from unlock.secret import Secret
from unlock.state import State

HOST = "ab" * 16


class Kms:
    """`unlock.providers.Provider`, over a file. `rekey`: rotation keeps the name, as a server's Re-key does."""

    def __init__(self, path: Path, provider_id: str = "kmip-one", rekey: bool = False) -> None:
        self.path = path
        self.id = provider_id
        self.rekey = rekey
        self.requests: list[str] = []
        self.connections = 0
        self.faults: dict[str, str] = {}
        """Operation -> unavailable, not-found, clock, denied, wrong-key, lag, integrity; `all` for every one."""
        if not path.exists():
            self._save({})

    # What the operator of the KMS does

    @property
    def keys(self) -> dict[str, dict[str, Any]]:
        found: dict[str, dict[str, Any]] = json.loads(self.path.read_text())
        return found

    def set(self, key_id: str, **facts: Any) -> None:
        self._save({**self.keys, key_id: {**self.keys[key_id], **facts}})

    def replace(self, key_id: str) -> str:
        """Re-key at the KMS: the name moves on, the old key is deactivated."""
        old = self.keys[key_id]
        new = self._add(old["name"], ACTIVE)
        self.set(key_id, name="", state="deactivated", replaced_by=new)
        return new

    # The interface

    def __enter__(self) -> "Kms":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        pass

    def capabilities(self) -> Capabilities:
        return Capabilities(True, self.rekey)

    def resolve(self, refs: Sequence[Ref]) -> list[Status]:
        fault = self._asked("resolve")
        statuses = []
        for ref in refs:
            entry = self.keys.get(ref.id)
            if entry is None or fault == "not-found":
                statuses.append(Status(ref, False, UNKNOWN, ref.id, NotFoundOrDenied(f"no key {ref.id}")))
                continue
            current = ref.id
            while fault != "lag" and (follower := self.keys[current].get("replaced_by")):
                current = follower
            statuses.append(Status(ref, True, entry["state"], self.faults.get("current", current)))
        return statuses

    def fetch(self, key_id: str, states: frozenset[str] = USABLE, prove: Callable[[Secret], None] = no_proof) -> Secret:
        fault = self._asked("fetch")
        entry = self.keys.get(key_id)
        if entry is None or fault == "not-found":
            raise NotFoundOrDenied(f"no key {key_id}")
        if entry["state"] not in states:
            raise StateBlocked(f"{key_id} is {entry['state']}")
        key = Secret(os.urandom(32) if fault == "wrong-key" else bytes.fromhex(entry["key"]))
        try:
            prove(key)
        except Tampered as error:
            raise Integrity(f"{key_id}: {error}") from error
        return key

    def health(self) -> Health:
        return Health((), 365)

    def locate(self, name: str) -> Ref | None:
        self._asked("locate")
        found = [Ref(i, name) for i, each in self.keys.items() if each["name"] == name and each["state"] not in BLOCKED]
        if len(found) > 1:
            raise Integrity(f"two keys are named {name}")
        return found[0] if found else None

    def create(self, name: str) -> Ref:
        found = self.locate(name)
        if found:
            return found
        self._asked("create")
        return Ref(self._add(name, PRE_ACTIVE), name)

    def activate(self, key_id: str) -> None:
        self._asked("activate")
        self.set(key_id, state=ACTIVE)

    def rotate(self, ref: Ref, name: str) -> Ref:
        self._asked("rotate")
        if self.rekey:
            follower = self.keys[ref.id].get("replaced_by")
            return Ref(follower or self.replace(ref.id), ref.name)
        made = self.create(name)
        self.activate(made.id)
        return made

    def retire(self, key_id: str) -> None:
        self._asked("retire")
        if key_id not in self.keys:
            raise NotFoundOrDenied(f"no key {key_id}")
        self.set(key_id, state="deactivated")

    def _asked(self, operation: str) -> str:
        self.requests.append(operation)
        fault = self.faults.get(operation) or self.faults.get("all", "")
        if fault == "unavailable":
            raise ProviderUnavailable("nothing answers")
        if fault == "clock":
            raise ClockWrong("the certificate is not valid yet")
        if fault == "denied":
            raise NotFoundOrDenied("no")
        if fault == "client":
            raise ClientAuth("your certificate is refused")
        if fault == "integrity":
            raise Integrity("two endpoints give two keys")
        return fault

    def _add(self, name: str, state: str) -> str:
        keys = self.keys
        key_id = f"uid-{len(keys) + 1}"
        self._save({**keys, key_id: {"name": name, "state": state, "key": os.urandom(32).hex()}})
        return key_id

    def _save(self, keys: dict[str, dict[str, Any]]) -> None:
        write_atomically(str(self.path), json.dumps(keys).encode())


class Host:
    """An initialised host with a group `data`, whose early boot unsealed. `disks`: the images that are plugged in."""

    def __init__(
        self, folder: Path, count: int = 2, kms: Kms | None = None, policy_of_group: str = "persistent"
    ) -> None:
        self.folder = folder
        self.paths = Paths(str(folder / "root"))
        self.kms = kms
        self.recovery = recoverykey.new()
        self.persistence = Secret.random(32)
        self.refused = False
        keyring.flush()
        keyring.put("unlock:persistence", self.persistence)
        os.makedirs(self.paths.run)
        early = report.Report("early-boot")
        early.judge("unsealed")
        early.facts = {"unauthenticated_root": False, "cap_pcr_before": policy.UNSET.hex()}
        Path(self.paths.of_this_boot("report.json")).write_bytes(early.encode())
        write_atomically(self.paths.config, config.HEAD.encode())
        state = State.new(self.paths, HOST)
        self._provide(state)
        with disk.mac_key(self.recovery, HOST) as mac_key:
            state.set_mac_key(self.persistence, mac_key)
        state.save()
        self.disks: list[Path] = []
        self.deks: dict[str, bytes] = {}
        if count:
            self.add_group("data", count, policy_of_group)
        if kms:
            kms.requests.clear()

    def _provide(self, state: State) -> None:
        if self.kms:
            entry = state.kmip_entry("kms", self.kms.id, "", self.persistence, Secret(b"PEM"))
        else:
            with Secret.random(32) as kdk, Native(Secret(bytes(kdk)), HOST) as made:
                entry = state.native_entry("native", made.id, HOST, self.persistence, kdk)
        state.use_provider(entry)
        name = provide.key_name(HOST, "host", 1)
        with self.connect(self.paths, state, self.persistence, entry) as provider:
            ref, key = provide.new_key(provider, name)
            with key:
                state.set_host_key(f"{provider.id}/{ref.id}", ref.name, 1, self.persistence, key)

    def add_group(self, name: str, count: int, policy_of_group: str = "persistent") -> Group:
        images = []
        for number in range(count):
            image = self.folder / f"{name}-{number}"
            with image.open("wb") as file:
                file.truncate(32 << 20)
            with Secret.random(64) as dek, luks.format(str(image), dek) as container:
                container.add_keyslot(dek, self.recovery)
                self.deks[container.uuid] = bytes(dek)
                images.append((image, container.uuid))
        members = tuple(Member(uuid, f"{name}-{i}", "") for i, (_, uuid) in enumerate(images))
        self.disks += [image for image, _ in images]
        with self.work() as work:
            provider = work.provider()
            ref, kek = provide.new_key(provider, provide.key_name(HOST, f"kek/{name}", 1))
            group = Group(name, f"{provider.id}/{ref.id}", 1, 1, members, ref.name, policy_of_group)
            with kek, disk.mac_key(self.recovery, HOST) as mac_key, work.host_key() as host_key:
                keys = disk.Keys(self.persistence, host_key, kek, mac_key)
                for image, uuid in images:
                    member = next(each for each in members if each.uuid == uuid)
                    with luks.Container(str(image)) as container, Secret(self.deks[uuid]) as dek:
                        token = disk.make_token(container, HOST, group, member, dek, keys)
                        disk.write_token(str(image), token, dek, keys)
            work.state.groups[name] = group
            work.state.save()
        if policy_of_group == "provider":
            with open(self.paths.config, "a", encoding="utf-8") as file:
                file.write(f'[group.{name}]\npolicy = "provider"\n')
        return group

    # What a flow is given

    def look(self) -> dict[str, list[present.Found]]:
        return present.read(present.Found(str(image), "") for image in self.disks)

    def connect(self, paths: Paths, state: State, persistence: Secret | None, entry: dict[str, Any]) -> Any:
        if entry["kind"] == "native" or self.kms is None:
            return provide.connect(paths, state, persistence, entry)
        self.kms.connections += 1
        return self.kms

    def work(self) -> provide.Work:
        return provide.Work(self.paths, self.look, self.connect)

    # What is true

    @property
    def state(self) -> State:
        return State.load(self.paths)

    @property
    def group(self) -> Group:
        return self.state.groups["data"]

    def tokens(self, image: Path) -> list[tuple[str, int]]:
        with luks.Container(str(image)) as container:
            return [(each.kek_id, each.kek_generation) for each in disk.tokens(container, HOST)]

    def boot_opens(self, images: Iterable[Path] | None = None) -> bool:
        """As early boot would: every disk gives its volume key by the persistence key alone."""
        return all(self.opens(image) for image in images or self.disks)

    def opens(self, image: Path) -> bool:
        with luks.Container(str(image)) as container:
            for each in disk.tokens(container, HOST):
                try:
                    with disk.volume_key(container, each, self.persistence) as dek:
                        return bytes(dek) == self.deks[container.uuid]
                except Exception:  # the next token
                    continue
        return False

    def recovery_opens(self) -> bool:
        for image in self.disks:
            with luks.Container(str(image)) as container, disk.by_recovery_key(container, self.recovery) as dek:
                if bytes(dek) != self.deks[container.uuid]:
                    return False
                with disk.mac_key(self.recovery, HOST) as mac_key:
                    for each in disk.tokens(container, HOST):
                        disk.check_recovery(container, each, mac_key)
        return True
