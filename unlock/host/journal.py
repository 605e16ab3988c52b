# SPDX-License-Identifier: Apache-2.0
"""The journal of state.json: the one operation under way, a record for each kind of operation.

An operation writes its record before its first step. The save that stores its result clears the record in the same
rename. After a kill, the same command finds its own record and finishes; every other operation refuses to begin.
`operation`, `about` and `options` make that command.
"""

from typing import Literal, NamedTuple

from ..disks.groups import Member
from ..disks.place import Place


class Init(NamedTuple):
    """`unlock init`."""

    operation: Literal["init"]
    about: str
    """`--backup FILE`, or `--provider kmip`."""


class GroupCreation(NamedTuple):
    """`unlock group create`."""

    operation: Literal["group create"]
    about: str
    """Name of the group."""
    members: tuple[Member, ...]
    options: str | None = None
    """The words of the command after the group's name."""


class DiskAdoption(NamedTuple):
    """`unlock disk adopt`."""

    operation: Literal["disk adopt"]
    about: str
    """`/dev/disk/by-uuid/UUID --group GROUP`."""
    manifest: int
    """Generation of the member list with this disk."""
    name: str | None = None
    """Of its mapping; this and what follows is None in what an earlier unlock wrote."""
    keyslots: tuple[int, ...] | None = None
    """Those that the disk had before."""
    flags: tuple[str, ...] | None = None
    """Those that its header had before."""


class DiskAddition(NamedTuple):
    """`unlock disk add`."""

    operation: Literal["disk add"]
    about: str
    """`--group GROUP`."""
    member: Member
    """What the new disk is to be."""
    manifest: int
    """Generation of the member list with it."""
    options: str
    """The words of the command after the group's name."""


class DiskRemoval(NamedTuple):
    """`unlock disk remove`."""

    operation: Literal["disk remove"]
    about: str
    """Mapping name of the member."""
    group: str
    manifest: int
    """Generation of the member list without it."""


class DiskReplacement(NamedTuple):
    """`unlock disk replace`."""

    operation: Literal["disk replace"]
    about: str
    """Mapping name of the old member."""
    group: str
    old: Member
    new: Member
    manifests: tuple[int, int]
    """Generations of the member list with the new disk, and of the last one, without the old disk."""
    absent: bool
    """The old disk is dead or away."""
    options: str
    """The words of the command after the old disk."""


class DiskEncryption(NamedTuple):
    """`unlock disk encrypt`. The keys are in the token of the header, which is in a file before it is on the disk."""

    operation: Literal["disk encrypt"]
    about: str
    """`DEV --group GROUP`."""
    group: str
    kek: tuple[str, str]
    """Id and name of the group's KEK at the provider."""
    generation: int
    """Of the KEK."""
    manifest: int
    member: Member
    recovery: str
    """Salt of the recovery key's keyslot."""
    node: str
    """Where the disk was."""
    file_system: str
    """UUID of the file system on it."""
    size: int
    """Bytes of the disk."""
    first: str
    """SHA-256, in hex, of the first part of the data, which makes room for the header."""
    moved: str
    """The same of this part where it was moved to, changed for a smaller file system; '' before that is durable."""
    written: bool
    """The header is on the disk."""
    rate: int = 0
    """Bytes a second at most; 0 for no limit."""


class DiskDecryption(NamedTuple):
    """`unlock disk decrypt`. How far the data is its header says; the token has the key."""

    operation: Literal["disk decrypt"]
    about: str
    """Mapping name of the disk."""
    group: str
    """The group that ends with it."""
    kek: str
    """The provider's id of the group's KEK."""
    member: Member
    keyslots: tuple[int, ...]
    """Those that the disk had before."""
    place: Place
    placed: bool
    """The data is a partition, and the disk has no header that counts."""
    trace: str = ""
    """`partition_table.read_trace` of the disk; '' before all is in clear and the partition may be written."""


class Rekey(NamedTuple):
    """A new KEK for a group: `unlock rekey`, or `unlock sync` when the key manager has replaced the KEK."""

    operation: Literal["rekey"]
    about: str
    """Name of the group."""
    generation: int
    """Of the new KEK."""
    made: tuple[str, str] | None
    """Id and name of the new KEK at the provider; None before the provider has made it."""
    theirs: bool
    """The key manager made the new KEK by itself."""


class DeepRekeyDisk(NamedTuple):
    """A disk that is to get a new volume key."""

    uuid: str
    keyslots: tuple[int, ...]
    """Those that it had before."""
    recovery: str
    """Salt of the recovery key's keyslot for the new volume key; '' before it is prepared."""


class DeepRekey(NamedTuple):
    """`unlock rekey --deep`. The tokens have the keys, and how far a disk is its header says."""

    operation: Literal["rekey --deep"]
    about: str
    """Name of the group, or `--all`."""
    disks: tuple[DeepRekeyDisk, ...]
    """Those that are left to do, in order."""
    prepared: bool
    """Every one has its keyslots and its token: what is left needs no person."""
    rate: int
    """Bytes a second at most; 0 for no limit."""


class RecoveryRotation(NamedTuple):
    """`unlock recovery rotate`."""

    operation: Literal["recovery"]
    about: Literal["rotate"]
    key: str
    """The new recovery key, wrapped by the persistence key."""
    file: str
    """Where the new recovery key was written; '' for no file."""
    escrow: str
    """Where its escrow file was written; '' for none."""
    kept: bool
    """The new recovery key is in `file` or `escrow`, or a person has typed it back."""
    written: bool
    """Every disk that is here takes the new recovery key."""


class RecoveryRenewal(NamedTuple):
    """`unlock recovery new`: the present recovery key for disks that lack it."""

    operation: Literal["recovery"]
    about: Literal["new"]


class PersistenceChange(NamedTuple):
    """`unlock persistence enable` or `disable`."""

    operation: Literal["persistence"]
    about: Literal["enable", "disable"]


class StoredKeysRemoval(NamedTuple):
    """`unlock persistence disable --remove-all-stored-keys`, once persistence is disabled: until its end the TPM may
    keep the persistence key."""

    operation: Literal["persistence"]
    about: Literal["disable --remove-all-stored-keys"]


class ProviderSwitch(NamedTuple):
    """`unlock provider switch`."""

    operation: Literal["provider switch"]
    about: str
    """Name of the provider to be used."""


class Rebind(NamedTuple):
    """`unlock rebind`."""

    operation: Literal["rebind"]
    about: str
    """`--backup FILE`, or ''."""
    new: str
    """The old persistence key, or 32 zero bytes for none, wrapped by the new one."""
    backup: str
    """The file that gets the backup of a new KDK; ''."""
    before: "JournalEntry | None"
    """The operation that was under way when the rebind began, and goes on after it."""


class NewPersistenceKey(NamedTuple):
    """`unlock rekey --fresh`, and what follows when a policy narrows."""

    operation: Literal["rekey --fresh"]
    about: Literal[""]
    new: str
    """The new persistence key, wrapped by the old one."""
    old: str
    """The old persistence key, wrapped by the new one."""
    sealed: bool
    """The TPM has the new key, and the state is under it: what is left is to remove the old tokens."""
    before: "JournalEntry | None"
    """The operation that was under way when this one began, and goes on after it."""


class DiskForgetting(NamedTuple):
    """`unlock disk forget`: an absent member leaves the list."""

    operation: Literal["disk forget"]
    about: str
    """LUKS UUID of the disk."""
    options: str | None
    """`--destroyed`, or None: the KEK is replaced, and then the persistence key."""
    manifest: int
    """Generation of the member list without the disk."""
    generation: int
    """Of the KEK of the group then."""
    made: tuple[str, str] | None
    """Id and name of the new KEK at the provider; None before the provider has made it, and with `--destroyed`."""


class GroupDeletion(NamedTuple):
    """`unlock group delete`. The group is in no other part of the state any more."""

    operation: Literal["group delete"]
    about: str
    """Name of the group."""
    options: str | None
    """`--erase`, or None: the disks stay plain LUKS2."""
    kek: str
    """The provider's id of the KEK."""
    members: tuple[Member, ...]
    keyless: bool
    """With `--erase`: no disk has a keyslot or a token any more. What is left is to overwrite headers, by which the
    disks are found."""


class DiskRelease(NamedTuple):
    """`unlock disk release`: the disk stays plain LUKS2 with a passphrase. Its group, if it had one, is in no other
    part of the state any more."""

    operation: Literal["disk release"]
    about: str
    """`/dev/disk/by-uuid/UUID`."""
    group: str
    """Name of the group that ends with it; '' for a disk that was in none."""
    kek: str
    """The provider's id of the group's KEK; ''."""
    member: Member


class DiskErasure(NamedTuple):
    """`unlock disk erase`."""

    operation: Literal["disk erase"]
    about: str
    """`/dev/disk/by-uuid/UUID`."""
    keyless: bool
    """As of `GroupDeletion`."""


JournalEntry = (
    Init
    | GroupCreation
    | DiskAdoption
    | DiskAddition
    | DiskRemoval
    | DiskReplacement
    | DiskEncryption
    | DiskDecryption
    | Rekey
    | DeepRekey
    | RecoveryRotation
    | RecoveryRenewal
    | PersistenceChange
    | StoredKeysRemoval
    | ProviderSwitch
    | Rebind
    | NewPersistenceKey
    | DiskForgetting
    | GroupDeletion
    | DiskRelease
    | DiskErasure
)

GOES_ON_BY_ITSELF: tuple[type[JournalEntry], ...] = (
    DiskRemoval,
    DiskReplacement,
    DeepRekey,
    DiskEncryption,
    DiskDecryption,
)
"""Records of operations that unlock-resume.service goes on with after a boot: they need nothing from a person."""


def goes_on_by_itself(entry: JournalEntry | None) -> bool:
    """Whether this operation, or one that goes on after it, needs nobody after a boot. Not a deep rekey that was cut
    off while its disks were prepared: that is taken back."""
    return any(
        isinstance(each, GOES_ON_BY_ITSELF) and not (isinstance(each, DeepRekey) and not each.prepared)
        for each in chain(entry)
    )


def chain(entry: JournalEntry | None) -> tuple[JournalEntry, ...]:
    """The operation, then those that go on after it. Empty for None."""
    if entry is None:
        return ()
    return (entry, *chain(entry.before if isinstance(entry, Rebind | NewPersistenceKey) else None))


IN_CLEAR = "its data is in clear, as a whole or in part"
"""What is told of such a disk."""


def disks_in_clear(entry: JournalEntry | None) -> list[str]:
    """Mapping names of the disks of which a part is in clear while the operation is under way."""
    return [each.member.name for each in chain(entry) if isinstance(each, DiskEncryption | DiskDecryption)]


def command(entry: JournalEntry) -> str:
    """What a person types to finish the operation."""
    kinds = GroupCreation | DiskAddition | DiskReplacement | DiskForgetting | GroupDeletion
    options = entry.options if isinstance(entry, kinds) else None
    return " ".join(filter(None, ("unlock", entry.operation, entry.about, options)))
