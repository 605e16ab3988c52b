# SPDX-License-Identifier: Apache-2.0
"""state.json as records: reads the file, checks every field, and writes the same bytes for the same content.

docs/formats.md specifies the fields. `State` in state.py works with these records; nothing else reads the file. A field
called wrapped here is base64 of a key wrapped by the persistence key.
"""

import json
from typing import NamedTuple

from ..disks.groups import POLICIES, Away, Group, Member, is_name
from ..errors import Malformed, NewerFormat
from . import codec
from .journal import JournalEntry
from .provider_entry import ProviderEntry

VERSION = 1


class HostKey(NamedTuple):
    """The host key; the first three fields are those of `KeyEntry`."""

    id: str
    name: str
    generation: int
    wrapped: str | None
    """None where this host does not keep it."""
    former: tuple["HostKey", ...]
    """Host keys that this one has replaced, the latest last."""


class KeyEntry(NamedTuple):
    """A key at its provider: the KEK of a group, or the host key."""

    id: str
    name: str
    generation: int


class GroupEntry(NamedTuple):
    """A group, but for its name; the fields are those of `Group`."""

    kek: KeyEntry
    policy: str
    former: tuple[str, ...]
    behind: tuple[str, ...]
    manifest: int
    members: tuple[Member, ...]
    degraded: bool | None = None
    away: tuple[Away, ...] | None = None


class ReplacedKek(NamedTuple):
    """A KEK that was replaced, and that its provider has not deactivated yet."""

    id: str
    group: str


class RecoveryFacts(NamedTuple):
    """What is known of the recovery key on each disk, by LUKS UUID."""

    keyslots: dict[str, str]
    """Salt of the recovery key's keyslot."""
    former: dict[str, list[str]]
    """Salts of keyslots of earlier recovery keys, to be removed."""
    behind: dict[str, str]
    """Wrapped MAC key of the earlier recovery key that the disk still has."""
    tested: dict[str, int]
    """When the recovery key last opened the disk, in seconds since 1970."""

    def is_behind(self, uuid: str) -> bool:
        """Whether an earlier recovery key opens the disk."""
        return uuid in self.behind or uuid in self.former


class BranchFacts(NamedTuple):
    """Why the TPM's policy allows one PCR state."""

    why: str
    """Short words for a person."""
    proven: bool
    """A boot has unsealed in this state."""
    made: str
    """UTC, ISO 8601; '' when not known."""


class Window(NamedTuple):
    """A time in which the TPM's policy is over fewer PCRs, for a firmware update."""

    reboots: int
    """Good boots that are left."""
    since: str
    """UTC, ISO 8601."""
    pcrs: tuple[int, ...]
    """The full selection, for when the window closes."""
    boot: str
    """The kernel's boot_id of the last boot that was counted."""


class TpmFacts(NamedTuple):
    """What the policy record in the TPM does not say. It permits nothing: the record in the TPM does."""

    states: dict[str, BranchFacts]
    """By branch, in hex."""
    opened: str
    """The branch, in hex, that the present boot has unsealed by; ''."""
    before: str
    """The same of the boot before."""
    pcrs: tuple[int, ...]
    """The selection without a window; empty when not known."""
    window: Window | None
    unauthenticated_root: bool | None
    """The operator accepted by name that nothing authenticates the root file system; None when not known."""
    pin: bool = False
    """True before the TPM asks for a PIN, and until it does not any more."""


NOTHING_KNOWN = TpmFacts({}, "", "", (), None, None)
"""Of the TPM, in a file without it."""


class RemovedPolicy(NamedTuple):
    """The policy under which the persistence key was sealed before it was evicted from the TPM on purpose."""

    selection: tuple[int, ...]
    cap: int
    branches: tuple[str, ...]
    """In hex."""
    pin: bool = False


class FormerMember(NamedTuple):
    """A disk that `unlock disk forget` has taken out of its group. Plugged in again, it is not opened."""

    name: str
    """Of its mapping."""
    group: str


class StateFile(NamedTuple):
    """The whole file."""

    version: int
    host: str
    """Host id, 32 hex digits."""
    provider: ProviderEntry | None
    """The provider in use; None before `init` has chosen one."""
    others: dict[str, ProviderEntry]
    """By name: providers that were added or left."""
    persistence: bool
    """The provider's keys are kept on this host, wrapped."""
    host_key: HostKey | None
    mac_key: str | None
    """Wrapped; None before there is a recovery key."""
    groups: dict[str, GroupEntry]
    manifests: dict[str, int]
    """Group -> highest generation of a member list that was ever begun."""
    generations: dict[str, int]
    """Group -> highest generation of a KEK that a group of that name has had."""
    retire: tuple[ReplacedKek, ...]
    journal: JournalEntry | None
    recovery: RecoveryFacts | None = None
    tpm: TpmFacts | None = None
    removed: RemovedPolicy | None = None
    narrowed: str | None = None
    """What has narrowed a policy, in words, while the persistence key is still the one from before."""
    old_keys: dict[str, str] | None = None
    """LUKS UUID -> wrapped: the persistence key that the token of a disk is under that has been away since."""
    headers: dict[str, str] | None = None
    """LUKS UUID -> what the header of the member said when this host made its token: canonical JSON of
    `Header.facts`."""
    asked: dict[str, int] | None = None
    """Group -> generation of a KEK that a provider was asked to make, and that the group does not have yet."""
    forgotten: dict[str, FormerMember] | None = None
    """By LUKS UUID."""


def parse(content: bytes, path: str) -> StateFile:
    """Raises Malformed that names `path` and the field, NewerFormat."""
    try:
        fields = json.loads(content)
        version = fields.get("version") if isinstance(fields, dict) else None
        if type(version) is int and version > VERSION:
            raise NewerFormat(f"a later unlock wrote {path}", "install a newer unlock")
        file = codec.decode(StateFile, fields)
        for name, entry in file.groups.items():
            if not is_name(name) or entry.policy not in POLICIES:
                raise Malformed(f"group {name!r} is not a valid group")
        return file
    except NewerFormat:
        raise
    except (ValueError, RecursionError) as error:
        raise Malformed(f"{path} cannot be read", "restore it from a backup") from error
    except Malformed as error:
        raise Malformed(f"{path} cannot be read: {error}", "restore it from a backup") from error


def write(file: StateFile) -> bytes:
    """The content of state.json."""
    return json.dumps(codec.encode(file), indent=1).encode() + b"\n"


def group_of(name: str, entry: GroupEntry) -> Group:
    """A group, from its name and entry."""
    return Group(
        name=name,
        kek=entry.kek.id,
        generation=entry.kek.generation,
        manifest=entry.manifest,
        members=entry.members,
        kek_name=entry.kek.name,
        policy=entry.policy,
        former=entry.former,
        behind=entry.behind,
        degraded=bool(entry.degraded),
        away=entry.away or (),
    )


def group_entry(group: Group) -> GroupEntry:
    """The entry of a group."""
    return GroupEntry(
        kek=KeyEntry(group.kek, group.kek_name, group.generation),
        policy=group.policy,
        former=group.former,
        behind=group.behind,
        manifest=group.manifest,
        members=group.members,
        degraded=group.degraded or None,
        away=group.away or None,
    )
