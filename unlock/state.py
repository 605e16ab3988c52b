# SPDX-License-Identifier: Apache-2.0
"""/var/lib/unlock/state.json: what this host keeps, every key in it wrapped by the persistence key.

    version     1
    host        host id, 32 hex digits
    provider    {"kind": "native", "id", "kdk": wrapped}
    host_key    {"id", "generation", "wrapped"}
    mac_key     wrapped, or null before there is a recovery key
    groups      NAME -> {"kek": {"id", "generation"}, "manifest", "members": [{"uuid", "name", "serial"}]}
    manifests   NAME -> highest generation of a member list that was ever begun
    manifests   NAME -> highest generation of a member list that was ever begun
journal     the operation under way, or null

The file is replaced whole. The one journal: an operation writes what it is about to do before it starts,
and the save that records its result clears the entry, in the same rename.
"""

import fcntl
import json
import os
from base64 import b64encode
from binascii import Error as Base64Error
from binascii import a2b_base64
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from . import token, wrap
from .errors import Malformed, NewerFormat, Refused
from .groups import Group, Member, is_name
from .paths import Paths, write_atomically
from .secret import Secret

VERSION = 1


class State:
    """The state of an initialised host. Changing it does nothing before `save`."""

    def __init__(self, path: str, fields: dict[str, Any]) -> None:
        self._path = path
        self._fields = fields
        self.groups = {name: _group(name, entry) for name, entry in fields["groups"].items()}

    @classmethod
    def new(cls, paths: Paths, host: str) -> "State":
        return cls(
            paths.state,
            {
                "version": VERSION,
                "host": host,
                "provider": None,
                "host_key": None,
                "mac_key": None,
                "groups": {},
                "manifests": {},
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
        write_atomically(self._path, json.dumps(self._fields, indent=1).encode() + b"\n")

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
        """Journals an operation, durably. Raises Refused when another one is unfinished.

        `unlock OPERATION ABOUT` is what a person types to finish it.
        """
        if self.journal and (self.journal["operation"], self.journal["about"]) != (operation, about):
            unfinished = f"{self.journal['operation']} {self.journal['about']}"
            raise Refused(f"`unlock {unfinished}` is not finished", "run it again first", code="unfinished")
        self.journal = {"operation": operation, "about": about, **more}
        self.save()

    def unfinished(self, operation: str, about: str) -> dict[str, Any] | None:
        """The journal entry of the same operation, killed earlier."""
        entry = self.journal
        return entry if entry and (entry["operation"], entry["about"]) == (operation, about) else None

    def next_manifest(self, group: str) -> int:
        """A generation of a member list that no disk has seen, whatever became of earlier attempts."""
        highest: int = max(
            self._fields["manifests"].get(group, 0), self.groups[group].manifest if group in self.groups else 0
        )
        self._fields["manifests"][group] = highest + 1
        return highest + 1

    def set_provider(self, kind: str, provider_id: str, persistence: Secret, kdk: Secret) -> None:
        self._fields["provider"] = {
            "kind": kind,
            "id": provider_id,
            "kdk": self._wrapped(persistence, "kdk", kdk),
        }

    @property
    def provider_id(self) -> str:
        return str(self._fields["provider"]["id"]) if self._fields["provider"] else ""

    def kdk(self, persistence: Secret) -> Secret:
        """The native provider's KDK. Raises Tampered."""
        return self._unwrapped(persistence, "kdk", self._fields["provider"]["kdk"])

    def set_host_key(self, key_id: str, generation: int, persistence: Secret, key: Secret) -> None:
        self._fields["host_key"] = {
            "id": key_id,
            "generation": generation,
            "wrapped": self._wrapped(persistence, "host-key", key),
        }

    def host_key(self, persistence: Secret) -> Secret:
        """Raises Tampered."""
        return self._unwrapped(persistence, "host-key", self._fields["host_key"]["wrapped"])

    @property
    def has_recovery_key(self) -> bool:
        return self._fields["mac_key"] is not None

    def set_mac_key(self, persistence: Secret, key: Secret) -> None:
        self._fields["mac_key"] = self._wrapped(persistence, "mac-key", key)

    def mac_key(self, persistence: Secret) -> Secret:
        """The key of the headers' recovery MACs. Raises Tampered."""
        return self._unwrapped(persistence, "mac-key", self._fields["mac_key"])

    def _wrapped(self, persistence: Secret, kind: str, key: Secret) -> str:
        return b64encode(wrap.wrap(persistence, key, token.key_aad(self.host, kind))).decode()

    def _unwrapped(self, persistence: Secret, kind: str, text: str) -> Secret:
        try:
            wrapped = a2b_base64(text, strict_mode=True)
        except (Base64Error, TypeError, ValueError) as error:
            raise Malformed(f"the wrapped {kind} in {self._path} is not base64") from error
        return wrap.unwrap(persistence, wrapped, token.key_aad(self.host, kind))


@contextmanager
def exclusive(paths: Paths) -> Iterator[None]:
    """One changing operation at a time on this host. Raises Refused at once when one is running."""
    os.makedirs(paths.run, mode=0o700, exist_ok=True)
    fd = os.open(paths.of_this_boot("lock"), os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    try:
        try:
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            raise Refused("another unlock command is changing this host", "wait for it", code="busy") from error
        yield
    finally:
        os.close(fd)


def _group(name: str, entry: dict[str, Any]) -> Group:
    if not is_name(name):
        raise KeyError("a valid group name")
    members = tuple(Member(str(m["uuid"]), str(m["name"]), str(m["serial"])) for m in entry["members"])
    return Group(name, str(entry["kek"]["id"]), int(entry["kek"]["generation"]), int(entry["manifest"]), members)


def _entry(group: Group) -> dict[str, Any]:
    return {
        "kek": {"id": group.kek, "generation": group.generation},
        "manifest": group.manifest,
        "members": [member._asdict() for member in group.members],
    }
