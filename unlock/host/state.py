# SPDX-License-Identifier: Apache-2.0
"""/var/lib/unlock/state.json: what this host keeps, every key in it wrapped by the persistence key.

    version     1
    host        host id, 32 hex digits
    provider    the one in use: {"name", "kind", "id"}; native: "scope", "kdk": wrapped; kmip: "client_key": wrapped,
                or null when it stays in a file, "client_cert": PEM, "client_until": seconds since 1970,
                "password": wrapped, where the key manager wants one
    others      NAME -> the same, of providers that were added or left
    persistence whether the provider's keys are kept on this host, wrapped
    host_key    {"id", "name", "generation", "wrapped": null when it is not kept, "former": [the same]}
    mac_key     wrapped, or null before there is a recovery key
    groups      NAME -> {"kek": {"id", "name", "generation"}, "policy", "former", "behind", "manifest",
                "members": [{"uuid", "name", "serial"}]}
    manifests   NAME -> highest generation of a member list that was ever begun
    generations NAME -> highest generation of a KEK that a group of that name has had
    retire      [{"id", "group"}]: replaced KEKs, until the provider has deactivated them
    removed     {"selection", "cap", "branches", "pin"}: the policy of what was evicted from the TPM on purpose; else
                absent
    recovery    {"keyslots": UUID -> salt of the recovery key's keyslot on that disk,
                "former": UUID -> salts of keyslots that go, those of earlier recovery keys,
                "behind": UUID -> wrapped, the MAC key of an earlier recovery key that the disk still has,
                "tested": UUID -> when the recovery key last opened it, seconds since 1970}
    tpm         what the policy record in the TPM does not say; absent in older files. {"states": BRANCH, hex -> {"why",
                "proven", "made"}, "opened", "before": BRANCH or "", "pcrs": [PCR], "window": null or {"reboots",
                "since", "pcrs", "boot"}, "unauthenticated_root", "pin": absent in older files; before the TPM asks for
                one, and until it does not any more}
    journal     the operation under way, or null

The file is replaced whole. The one journal: an operation writes what it is about to do before it starts,
and the save that records its result clears the entry, in the same rename.
"""

import fcntl
import json
import os
import time
from base64 import b64encode
from binascii import Error as Base64Error
from binascii import a2b_base64
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from .. import log, wrap
from ..disks import token
from ..disks.groups import POLICIES, Group, Member, is_name
from ..errors import Malformed, NewerFormat, Refused
from ..paths import Paths, write_atomically
from ..secret import Secret

VERSION = 1
PATIENCE = 120.0
"""Seconds for another command to end."""


class State:
    """The state of an initialised host. Changing it does nothing before `save`."""

    def __init__(self, path: str, fields: dict[str, Any]) -> None:
        self._path = path
        self._fields = fields
        fields.setdefault("recovery", {"keyslots": {}, "former": {}, "behind": {}, "tested": {}})
        self.groups = {name: _group(name, entry) for name, entry in fields["groups"].items()}

    @classmethod
    def new(cls, paths: Paths, host: str) -> "State":
        return cls(
            paths.state,
            {
                "version": VERSION,
                "host": host,
                "provider": None,
                "others": {},
                "persistence": True,
                "host_key": None,
                "mac_key": None,
                "groups": {},
                "manifests": {},
                "generations": {},
                "retire": [],
                "journal": None,
            },
        )

    @classmethod
    def load(cls, paths: Paths) -> "State":
        """Raises Refused when the host is not initialised, Malformed, NewerFormat."""
        try:
            with open(paths.state, "rb") as file:
                fields = json.load(file)
        except FileNotFoundError as error:
            raise Refused("this host is not initialised", "unlock init", code="not-initialised") from error
        except (ValueError, RecursionError) as error:
            raise Malformed(f"{paths.state} cannot be read", "restore it from a backup") from error
        try:
            if fields["version"] > VERSION:
                raise NewerFormat(f"a later unlock wrote {paths.state}", "install a newer unlock")
            return cls(paths.state, fields)
        except (KeyError, TypeError, AttributeError) as error:
            raise Malformed(f"{paths.state} lacks {error}", "restore it from a backup") from error

    def save(self) -> None:
        """Durable when it returns. Raises OSError; the old state is then still there."""
        self._fields["groups"] = {group.name: _entry(group) for group in self.groups.values()}
        for group in self.groups.values():
            highest = self._fields["generations"].get(group.name, 0)
            self._fields["generations"][group.name] = max(highest, group.generation)
        write_atomically(self._path, self._encoded())

    def save_if_changed(self) -> None:
        """Writes nothing when the file says the same already."""
        with open(self._path, "rb") as file:
            if file.read() == self._encoded():
                return
        self.save()

    def _encoded(self) -> bytes:
        return json.dumps(self._fields, indent=1).encode() + b"\n"

    @property
    def host(self) -> str:
        host: str = self._fields["host"]
        return host

    @property
    def journal(self) -> dict[str, Any] | None:
        journal: dict[str, Any] | None = self._fields["journal"]
        return journal

    @journal.setter
    def journal(self, entry: dict[str, Any] | None) -> None:
        self._fields["journal"] = entry

    def begin(self, operation: str, about: str, **more: Any) -> None:
        """Journals an operation, durably: `about` tells it from others of its kind. Raises Refused when another one is
        unfinished.
        """
        if self.journal and (self.journal["operation"], self.journal["about"]) != (operation, about):
            raise Refused(f"`{self.to_finish}` is not finished", "run it again first", code="unfinished")
        self.journal = {"operation": operation, "about": about, **more}
        self.save()

    def unfinished(self, operation: str, about: str) -> dict[str, Any] | None:
        """The journal entry of the same operation, killed earlier."""
        entry = self.journal
        return entry if entry and (entry["operation"], entry["about"]) == (operation, about) else None

    @property
    def to_finish(self) -> str:
        """What a person types to finish what is journaled: `unlock OPERATION ABOUT`, and the entry's `options`, if any;
        '' when nothing is unfinished."""
        entry = self.journal or {}
        words = [entry[each] for each in ("operation", "about", "options") if entry.get(each)]
        return " ".join(["unlock", *words]) if words else ""

    def next_manifest(self, group: str) -> int:
        """A generation of a member list that no disk has seen, whatever became of earlier attempts."""
        highest: int = max(
            self._fields["manifests"].get(group, 0), self.groups[group].manifest if group in self.groups else 0
        )
        self._fields["manifests"][group] = highest + 1
        return highest + 1

    def next_generation(self, group: str) -> int:
        """A generation that no KEK of a group of that name has had. It is taken when the group is saved with it: an
        attempt that came to nothing leaves its name, and the key that it may have made, to the next."""
        generation: int = self._fields["generations"].get(group, 0)
        return 1 + max(generation, self.groups[group].generation if group in self.groups else 0)

    def skip_generation(self, group: str, generation: int) -> None:
        """The key of that generation was revoked before it was used: its name is spent."""
        self._fields["generations"][group] = max(generation, self._fields["generations"].get(group, 0))

    @property
    def tpm(self) -> dict[str, Any]:
        """Why each state of the TPM's policy is allowed. It permits nothing: the record in the TPM does."""
        empty: dict[str, Any] = {
            "states": {},
            "opened": "",
            "before": "",
            "pcrs": [],
            "window": None,
            "unauthenticated_root": None,
            "pin": False,
        }
        tpm: dict[str, Any] = self._fields.setdefault("tpm", empty)
        return tpm

    # Providers

    @property
    def provider(self) -> dict[str, Any]:
        """The entry of the provider in use."""
        entry: dict[str, Any] = self._fields["provider"]
        return entry

    @property
    def provider_id(self) -> str:
        return str(self._fields["provider"]["id"]) if self._fields["provider"] else ""

    @property
    def others(self) -> dict[str, dict[str, Any]]:
        """Name -> entry of the providers that are not in use."""
        others: dict[str, dict[str, Any]] = self._fields["others"]
        return others

    def use_provider(self, entry: dict[str, Any]) -> None:
        """The one in use from now on; what was in use stays with the others."""
        if self._fields["provider"]:
            self.others[self.provider["name"]] = self.provider
        self.others.pop(entry["name"], None)
        self._fields["provider"] = entry

    def native_entry(self, name: str, provider_id: str, scope: str, persistence: Secret, kdk: Secret) -> dict[str, Any]:
        wrapped = self._wrapped(persistence, "kdk", kdk)
        return {"name": name, "kind": "native", "id": provider_id, "scope": scope, "kdk": wrapped}

    def kmip_entry(
        self,
        name: str,
        provider_id: str,
        certificate: str,
        until: int,
        persistence: Secret,
        key: Secret | None,
        password: Secret | None = None,
    ) -> dict[str, Any]:
        """`key` is the client's, as PEM; None when it stays in a file. `until`: when the certificate ends, in seconds
        since 1970. `password`: of its user name, where it has one."""
        wrapped = self._wrapped(persistence, "client-key", key) if key else None
        client: dict[str, Any] = {"client_cert": certificate, "client_until": until, "client_key": wrapped}
        if password:
            client["password"] = self._wrapped(persistence, "client-password", password)
        return {"name": name, "kind": "kmip", "id": provider_id, **client}

    def kdk(self, persistence: Secret, entry: dict[str, Any] | None = None) -> Secret:
        """A native provider's KDK. Raises Tampered."""
        return self._unwrapped(persistence, "kdk", (entry or self.provider)["kdk"])

    def client_key(self, persistence: Secret, entry: dict[str, Any]) -> Secret:
        """A KMIP client's private key, as PEM. Raises Tampered."""
        return self._unwrapped(persistence, "client-key", entry["client_key"])

    def client_password(self, persistence: Secret, entry: dict[str, Any]) -> Secret | None:
        """The password of a KMIP client's user name; None where there is none. Raises Tampered."""
        wrapped = entry.get("password")
        return self._unwrapped(persistence, "client-password", wrapped) if wrapped else None

    @property
    def retire(self) -> list[dict[str, str]]:
        """KEKs that were replaced, and that the provider has not deactivated yet."""
        retire: list[dict[str, str]] = self._fields["retire"]
        return retire

    def not_retired(self, entry: dict[str, Any]) -> list[dict[str, str]]:
        """Those of one provider."""
        return [each for each in self.retire if each["id"].startswith(f"{entry['id']}/")]

    @property
    def removed(self) -> dict[str, Any] | None:
        """The policy under which the persistence key was sealed, when the TPM does not have it any more."""
        removed: dict[str, Any] | None = self._fields.get("removed")
        return removed

    @removed.setter
    def removed(self, sealed: dict[str, Any] | None) -> None:
        self._fields.pop("removed", None)
        if sealed:
            self._fields["removed"] = sealed

    # Keys

    def prove(self, persistence: Secret) -> None:
        """Raises Tampered unless this is the key that wraps what the state keeps."""
        for kind, wrapped in (
            ("kdk", self.provider.get("kdk")),
            ("client-key", self.provider.get("client_key")),
            ("client-password", self.provider.get("password")),
            ("host-key", self._fields["host_key"]["wrapped"]),
            ("mac-key", self._fields["mac_key"]),
        ):
            if wrapped:
                self._unwrapped(persistence, kind, wrapped).wipe()

    @property
    def persistent(self) -> bool:
        """Whether the provider's keys are kept on this host."""
        return bool(self._fields["persistence"])

    @persistent.setter
    def persistent(self, kept: bool) -> None:
        self._fields["persistence"] = kept

    def set_host_key(
        self, key_id: str, name: str, generation: int, persistence: Secret, key: Secret, former: bool = True
    ) -> None:
        """The host key, in place of another one, which dumps may still need (`former`)."""
        old = self._fields["host_key"]
        self._fields["host_key"] = {
            "id": key_id,
            "name": name,
            "generation": generation,
            "wrapped": self._wrapped(persistence, "host-key", key) if self.persistent else None,
            "former": [*old["former"], {**old, "former": []}] if old and former else (old or {}).get("former", []),
        }

    def drop_host_key(self) -> None:
        """The host key is not kept any more; the provider has it."""
        self._fields["host_key"]["wrapped"] = None

    @property
    def host_key_ref(self) -> tuple[str, str, int]:
        """Id, name and generation of the host key."""
        entry = self._fields["host_key"]
        return str(entry["id"]), str(entry["name"]), int(entry["generation"])

    def had_host_key(self, key_id: str) -> bool:
        """Whether it was this host's before the present one."""
        return any(each["id"] == key_id for each in self._fields["host_key"]["former"])

    def host_key(self, persistence: Secret) -> Secret | None:
        """None where it is not kept on this host. Raises Tampered."""
        wrapped = self._fields["host_key"]["wrapped"]
        return self._unwrapped(persistence, "host-key", wrapped) if wrapped else None

    @property
    def has_recovery_key(self) -> bool:
        return self._fields["mac_key"] is not None

    def set_mac_key(self, persistence: Secret, key: Secret) -> None:
        self._fields["mac_key"] = self._wrapped(persistence, "mac-key", key)

    def mac_key(self, persistence: Secret, uuid: str = "") -> Secret:
        """The key of the headers' recovery MACs; with `uuid`, the one that fits the recovery key that this disk has.
        Raises Tampered."""
        return self._unwrapped(persistence, "mac-key", self.recovery["behind"].get(uuid, self._fields["mac_key"]))

    @property
    def recovery(self) -> dict[str, dict[str, Any]]:
        """What is known of the recovery key on each disk, by LUKS UUID."""
        recovery: dict[str, dict[str, Any]] = self._fields["recovery"]
        return recovery

    def change_mac_key(self, persistence: Secret, key: Secret, behind: list[str]) -> None:
        """Another recovery key; the disks `behind` still have the one before, or one before that."""
        for uuid in behind:
            self.recovery["behind"].setdefault(uuid, self._fields["mac_key"])
        self.set_mac_key(persistence, key)

    def wrapped_recovery_key(self, persistence: Secret, key: Secret) -> str:
        """For the journal alone, while the key is brought to the disks."""
        return self._wrapped(persistence, "recovery-key", key)

    def unwrapped_recovery_key(self, persistence: Secret, wrapped: str) -> Secret:
        """Raises Tampered."""
        return self._unwrapped(persistence, "recovery-key", wrapped)

    def rewrap(self, old: Secret | None, new: Secret) -> list[str]:
        """What `old` wraps is wrapped by `new`. Without it, host keys are not kept any more; gives the names of the
        providers whose own key is lost. Saves nothing. Raises Tampered."""
        lost = []
        for entry in filter(None, (self.provider, *self.others.values())):
            for field, kind in (("kdk", "kdk"), ("client_key", "client-key"), ("password", "client-password")):
                if entry.get(field) and old:
                    entry[field] = self._again(old, new, kind, entry[field])
                elif entry.get(field):
                    lost.append(str(entry["name"]))
        for entry in (self._fields["host_key"], *self._fields["host_key"]["former"]):
            entry["wrapped"] = self._again(old, new, "host-key", entry["wrapped"]) if entry["wrapped"] and old else None
        behind = self.recovery["behind"]
        self.recovery["behind"] = {uuid: self._again(old, new, "mac-key", behind[uuid]) for uuid in behind if old}
        return list(dict.fromkeys(lost))

    def hide(self, new: Secret, old: Secret | None) -> str:
        """The old persistence key, or none, wrapped by the new one: for the journal of a rebind."""
        return self._wrapped(new, "rebind", old or Secret(bytes(32)))

    def unhide(self, new: Secret, text: str) -> Secret | None:
        """Raises Tampered when it is another key than the one of that rebind."""
        old = self._unwrapped(new, "rebind", text)
        return old if any(old.value) else None

    def _again(self, old: Secret, new: Secret, kind: str, text: str) -> str:
        with self._unwrapped(old, kind, text) as key:
            return self._wrapped(new, kind, key)

    def _wrapped(self, persistence: Secret, kind: str, key: Secret) -> str:
        return b64encode(wrap.wrap(persistence, key, token.key_aad(self.host, kind))).decode()

    def _unwrapped(self, persistence: Secret, kind: str, text: str) -> Secret:
        try:
            wrapped = a2b_base64(text, strict_mode=True)
        except (Base64Error, TypeError, ValueError) as error:
            raise Malformed(f"the wrapped {kind} in {self._path} is not base64") from error
        return wrap.unwrap(persistence, wrapped, token.key_aad(self.host, kind))


@contextmanager
def exclusive(paths: Paths, patience: float = PATIENCE) -> Iterator[None]:
    """One changing operation at a time on this host; the sync of the timer is one. Raises Refused when another is still
    running after `patience`, in seconds."""
    os.makedirs(paths.run, mode=0o700, exist_ok=True)
    fd = os.open(paths.of_this_boot("lock"), os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    end = time.monotonic() + patience
    try:
        said = False
        while not _locked(fd):
            if not said:
                log.note("waiting for another unlock command to end")
                said = True
            if time.monotonic() >= end:
                raise Refused("another unlock command is changing this host", "run it again later", code="busy")
            time.sleep(0.2)
        yield
    finally:
        fcntl.flock(fd, fcntl.LOCK_UN)  # a forked process that a device holds has the file open too
        os.close(fd)


@contextmanager
def changing(paths: Paths, patience: float = PATIENCE) -> Iterator[State]:
    """The same, with the state as no other operation changes it. Raises what `State.load` raises, before anything else
    is asked."""
    with exclusive(paths, patience):
        yield State.load(paths)


def _locked(fd: int) -> bool:
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        return False
    return True


def _group(name: str, entry: dict[str, Any]) -> Group:
    if not is_name(name) or entry["policy"] not in POLICIES:
        raise KeyError("a valid group")
    members = tuple(Member(str(m["uuid"]), str(m["name"]), str(m["serial"])) for m in entry["members"])
    return Group(
        name,
        str(entry["kek"]["id"]),
        int(entry["kek"]["generation"]),
        int(entry["manifest"]),
        members,
        str(entry["kek"]["name"]),
        str(entry["policy"]),
        tuple(map(str, entry["former"])),
        tuple(map(str, entry["behind"])),
    )


def _entry(group: Group) -> dict[str, Any]:
    return {
        "kek": {"id": group.kek, "name": group.kek_name, "generation": group.generation},
        "policy": group.policy,
        "former": list(group.former),
        "behind": list(group.behind),
        "manifest": group.manifest,
        "members": [member._asdict() for member in group.members],
    }
