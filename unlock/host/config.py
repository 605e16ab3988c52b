# SPDX-License-Identifier: Apache-2.0
"""Reads /etc/unlock/unlock.toml, the configuration that a person edits, and appends tables to it.

Every command reads it; `init`, `group create`, `disk adopt` and `provider add` append, `group delete` and
`disk release` take a group out. unlock.toml(5) is its reference.
"""

import os
from collections.abc import Callable
from typing import Any, NamedTuple, TypeVar

from ..disks.groups import POLICIES, is_name
from ..endpoint import Endpoint
from ..errors import Malformed, NewerFormat, Refused, Usage
from ..paths import write_atomically
from .units import mount_unit

T = TypeVar("T")
VERSION = 1
DEADLINE = 90
"""Seconds that the gate of a group waits for its members, as systemd waits for a device."""
DEADLINE_MAX = 604800
DEGRADED_AFTER = 30
"""Seconds that the gate of a group that may open degraded waits for all of its members."""
DEGRADED = ("never", "allow")

TIMEOUT = 10
"""Seconds for one request to one endpoint of a provider."""
USERNAME_MAX = 255
_NEEDED_WITH_ALL_BELOW = ("/dev", "/etc/unlock", "/proc", "/run", "/sys", "/var/lib/unlock", "/var/lock", "/var/run")
_NEEDED_BY_ITSELF = (
    "/bin",
    "/boot",
    "/boot/efi",
    "/efi",
    "/lib",
    "/lib32",
    "/lib64",
    "/sbin",
    "/usr",
    "/usr/bin",
    "/usr/lib",
    "/usr/lib/systemd",
    "/usr/lib/unlock",
    "/usr/lib32",
    "/usr/lib64",
    "/usr/sbin",
)
"""What a boot needs before its groups are mounted, with what is above. A group may be below these, as at /usr/local."""
UNIT_NAME_MAX = 255
KEY_NAMES = ("path", "plain")
DROP_ON = ("deactivated", "compromised", "destroyed")

HEAD = """\
# unlock.toml: see unlock.toml(5)
version = 1
"""


class GroupConfig(NamedTuple):
    """One [group.NAME]."""

    name: str
    mount: str
    """Mount point, or '' when something else mounts it."""
    type: str
    options: str
    deadline: int
    """Seconds."""

    policy: str = "persistent"
    """`provider`: the group's KEK is never kept on this host."""
    degraded: str = "never"
    """`allow`: the gate opens it without all of its members, if its file system can do without the others."""
    degraded_after: int = DEGRADED_AFTER
    """Seconds that the gate waits for them first."""
    deadline_asked: int = 0
    """What the file has, where that is more than DEADLINE_MAX; else 0."""


class ProviderConfig(NamedTuple):
    """One [provider.NAME]: a KMIP server, or several that hold the same keys."""

    name: str
    endpoints: tuple[str, ...]
    """What Endpoint.parse reads, in the order in which they are asked."""
    ca: str
    """PEM file of the CAs that may sign the servers' certificates."""
    client_key: str
    """PEM file of the client's key; '' when it is kept in the state, wrapped by the persistence key."""
    timeout: int
    """Seconds for one request to one endpoint."""
    username: str = ""
    """What the servers want beside the certificate, with a password that is in the state; '' for nothing."""
    key_names: str = "path"
    """`plain`: new keys get names of at most 64 of A-Z a-z 0-9 . _ -; else `unlock/HOST/KIND/N`."""
    common_name: bool = False
    """A server's certificate without a Subject Alternative Name is for the name that is its Common Name."""


class SyncConfig(NamedTuple):
    """[sync]."""

    open_from_provider_after_refusal: bool = False
    """Data groups only."""
    drop_on: frozenset[str] = frozenset()
    """States of a key at the KMS on which this host stops keeping it."""


class DumpConfig(NamedTuple):
    """[dump]: how many core dumps are kept."""

    most: int = 64
    """`count`: dumps of processes."""
    size: int = 4096
    """MiB of all."""
    age: int = 30
    """Days."""
    per_minute: int = 8


class Fault(NamedTuple):
    """A table, or a setting outside of all tables, that is wrong."""

    error: Malformed
    value: object
    """As it is in the file."""


class Config(NamedTuple):
    """The whole file. A wrong table is an error for those who need that table, and for nobody else."""

    groups: dict[str, GroupConfig]
    """Without those that are wrong."""
    providers: dict[str, ProviderConfig]
    """Without those that are wrong."""
    parsed_sync: SyncConfig
    parsed_dump: DumpConfig
    faults: dict[str, Fault]
    """By the name of the table: `group.NAME`, `provider.NAME`, `sync`, `dump`, or another word at the top."""

    def group(self, name: str) -> GroupConfig | None:
        """Raises Malformed if it is wrong."""
        self.check("group", f"group.{name}")
        return self.groups.get(name)

    def provider(self, name: str) -> ProviderConfig | None:
        """Raises Malformed if it is wrong."""
        self.check("provider", f"provider.{name}")
        return self.providers.get(name)

    @property
    def sync(self) -> SyncConfig:
        """Raises Malformed if it is wrong."""
        self.check("sync")
        return self.parsed_sync

    @property
    def dump(self) -> DumpConfig:
        """Raises Malformed if it is wrong."""
        self.check("dump")
        return self.parsed_dump

    def check(self, *tables: str) -> None:
        """Raises Malformed if one of these tables is wrong; without arguments, if any is."""
        for table in tables or self.faults:
            if table in self.faults:
                raise self.faults[table].error


NOTHING = Config({}, {}, SyncConfig(), DumpConfig(), {})
"""Of a host without the file."""


def parse(text: str) -> Config:
    """The configuration in a file's text. Raises Malformed where no table can be told from another, NewerFormat."""
    import tomllib

    try:
        top = tomllib.loads(text)
    except (ValueError, RecursionError) as error:  # ValueError: also an integer of more than 4300 digits
        raise Malformed(f"unlock.toml: {error}", "edit /etc/unlock/unlock.toml") from error
    version = top.get("version", VERSION)
    if type(version) is not int:
        raise _bad("version is not an int")
    if version > VERSION:
        raise NewerFormat(f"unlock.toml has version {version}; this unlock reads {VERSION}")
    faults: dict[str, Fault] = {}
    groups = _tables(top, "group", _group, faults)
    providers = _tables(top, "provider", _provider, faults)
    sync = SyncConfig()
    try:
        sync = _sync(_table(top, "sync", ""))
    except Malformed as error:
        faults["sync"] = Fault(error, top["sync"])
    dump = DumpConfig()
    try:
        dump = _dump(_table(top, "dump", ""))
    except Malformed as error:
        faults["dump"] = Fault(error, top["dump"])
    for key in top.keys() - {"version", "group", "provider", "sync", "dump"}:
        faults[key] = Fault(_bad(f"{key} is not a known setting"), top[key])
    return Config(groups, providers, sync, dump, faults)


def _tables(top: dict[str, Any], kind: str, read: Callable[[str, Any], T], faults: dict[str, Fault]) -> dict[str, T]:
    """The tables [KIND.NAME] by their names. Those that are wrong go to `faults`."""
    found: dict[str, T] = {}
    try:
        tables = _table(top, kind, "")
    except Malformed as error:
        faults[kind] = Fault(error, top[kind])
        return found
    for name, table in tables.items():
        try:
            found[name] = read(name, table)
        except Malformed as error:
            faults[f"{kind}.{name}"] = Fault(error, table)
    return found


def _group(name: str, table: Any) -> GroupConfig:
    where = f"group.{name}."
    if not is_name(name) or not isinstance(table, dict):
        raise _bad(f"[group.{name}] is not a group")
    _only(table, {"mount", "type", "options", "deadline", "policy", "degraded", "degraded_after"}, where)
    mount = _line(table, "mount", where)
    try:
        mount = mount and normalise_mount_point(mount)
    except Usage as error:
        raise _bad(f"{where}mount: {error}") from error
    deadline = _get(table, "deadline", DEADLINE, where)
    if deadline < 1:
        raise _bad(f"{where}deadline is not at least 1")
    policy = _get(table, "policy", POLICIES[0], where)
    if policy not in POLICIES:
        raise _bad(f"{where}policy is not one of {', '.join(POLICIES)}")
    degraded = _get(table, "degraded", DEGRADED[0], where)
    if degraded not in DEGRADED:
        raise _bad(f"{where}degraded is not one of {', '.join(DEGRADED)}")
    degraded_after = _get(table, "degraded_after", DEGRADED_AFTER, where)
    if degraded_after < 0:
        raise _bad(f"{where}degraded_after is negative")
    kind, options = (_line(table, key, where, strip=True) for key in ("type", "options"))
    asked = deadline if deadline > DEADLINE_MAX else 0
    deadline, degraded_after = (min(each, DEADLINE_MAX) for each in (deadline, degraded_after))
    return GroupConfig(name, mount, kind, options, deadline, policy, degraded, degraded_after, asked)


def _provider(name: str, table: Any) -> ProviderConfig:
    where = f"provider.{name}."
    if not is_name(name) or not isinstance(table, dict):
        raise _bad(f"[provider.{name}] is not a provider")
    _only(table, {"endpoints", "ca", "client_key", "timeout", "username", "key_names", "common_name"}, where)
    endpoints: list[str] = _get(table, "endpoints", [], where)
    if not endpoints or not all(isinstance(each, str) for each in endpoints):
        raise _bad(f"{where}endpoints is not a list of HOST:PORT")
    try:
        for each in endpoints:
            Endpoint.parse(each)
    except Usage as error:
        raise _bad(f"{where}endpoints: {error}") from error
    files = {key: _get(table, key, "", where) for key in ("ca", "client_key")}
    for key, path in files.items():
        if not os.path.isabs(path or "/") or not files["ca"]:
            raise _bad(f"{where}{key} is not an absolute path")
    timeout = _get(table, "timeout", TIMEOUT, where)
    if not 1 <= timeout <= 300:
        raise _bad(f"{where}timeout is not from 1 to 300")
    try:
        user = check_username(_get(table, "username", "", where))
    except Usage as error:
        raise _bad(f"{where}username: {error}") from error
    key_names = _get(table, "key_names", KEY_NAMES[0], where)
    if key_names not in KEY_NAMES:
        raise _bad(f"{where}key_names is not one of {', '.join(KEY_NAMES)}")
    common_name = _get(table, "common_name", False, where)
    return ProviderConfig(
        name, tuple(endpoints), files["ca"], files["client_key"], timeout, user, key_names, common_name
    )


def _sync(table: dict[str, Any]) -> SyncConfig:
    _only(table, {"open_from_provider_after_refusal", "drop_on"}, "sync.")
    drop_on: list[str] = _get(table, "drop_on", [], "sync.")
    if not all(each in DROP_ON for each in drop_on):
        raise _bad(f"sync.drop_on is not a list of {', '.join(DROP_ON)}")
    return SyncConfig(_get(table, "open_from_provider_after_refusal", False, "sync."), frozenset(drop_on))


def _dump(table: dict[str, Any]) -> DumpConfig:
    names = ("count", "size", "age", "per_minute")
    _only(table, {*names}, "dump.")
    values = [_get(table, name, value, "dump.") for name, value in zip(names, DumpConfig(), strict=True)]
    for name, value in zip(names, values, strict=True):
        if not 1 <= value <= 1 << 20:
            raise _bad(f"dump.{name} is not from 1 to {1 << 20}")
    return DumpConfig(*values)


def load(path: str) -> Config:
    """The configuration, or the defaults when there is no file. Raises Malformed."""
    try:
        with open(path, encoding="utf-8") as file:
            return parse(file.read())
    except FileNotFoundError:
        return NOTHING
    except UnicodeDecodeError as error:
        raise Malformed(f"{path} is not UTF-8", f"edit {path}") from error


def group_table(group: GroupConfig) -> str:
    """The text of one [group.NAME], to be appended to the file."""
    key = _quoted(group.name) if "." in group.name else group.name
    lines = [f"\n[group.{key}]"]
    if group.mount:
        lines.append(f"mount = {_quoted(group.mount)}")
    if group.type:
        lines.append(f"type = {_quoted(group.type)}")
    if group.options:
        lines.append(f"options = {_quoted(group.options)}")
    if group.deadline != DEADLINE:
        lines.append(f"deadline = {group.deadline}")
    if group.policy != POLICIES[0]:
        lines.append(f"policy = {_quoted(group.policy)}")
    if group.degraded != DEGRADED[0]:
        lines.append(f"degraded = {_quoted(group.degraded)}")
    if group.degraded_after != DEGRADED_AFTER:
        lines.append(f"degraded_after = {group.degraded_after}")
    return "\n".join(lines) + "\n"


def provider_table(provider: ProviderConfig) -> str:
    """The text of one [provider.NAME], to be appended to the file."""
    key = _quoted(provider.name) if "." in provider.name else provider.name
    endpoints = ", ".join(map(_quoted, provider.endpoints))
    lines = [f"\n[provider.{key}]", f"endpoints = [{endpoints}]", f"ca = {_quoted(provider.ca)}"]
    if provider.client_key:
        lines.append(f"client_key = {_quoted(provider.client_key)}")
    if provider.username:
        lines.append(f"username = {_quoted(provider.username)}")
    if provider.key_names != KEY_NAMES[0]:
        lines.append(f"key_names = {_quoted(provider.key_names)}")
    if provider.common_name:
        lines.append("common_name = true")
    if provider.timeout != TIMEOUT:
        lines.append(f"timeout = {provider.timeout}")
    return "\n".join(lines) + "\n"


def append_table(path: str, table: str) -> None:
    """Adds a table to the file; the text that is there stays as it is. Raises Malformed, OSError."""
    try:
        with open(path, encoding="utf-8") as file:
            text = file.read()
    except FileNotFoundError:
        text = HEAD
    text = text.rstrip("\n") + "\n" + table
    parse(text).check()
    write_atomically(path, text.encode(), mode=0o644)


def remove_group(path: str, name: str) -> None:
    """Takes [group.NAME] out of the file; what is around it stays, comments too. Does nothing where it is not there.
    Raises Refused, as `check_removable`; OSError."""
    text = _text_without_group(path, name)
    if text is not None:
        write_atomically(path, text.encode(), mode=0o644)


def check_removable(path: str, name: str) -> None:
    """Raises Refused, code `edit-config`, where `remove_group` cannot tell the group's lines from others."""
    _text_without_group(path, name)


def _text_without_group(path: str, name: str) -> str | None:
    """None where the file has no such group."""
    import re
    import tomllib

    try:
        with open(path, encoding="utf-8") as file:
            text = file.read()
    except FileNotFoundError:
        return None
    wanted = tomllib.loads(text)
    if name not in wanted.get("group", {}):
        return None
    del wanted["group"][name]
    lines = text.split("\n")
    header = re.compile(rf"\s*\[\s*group\s*\.\s*([\"']?){re.escape(name)}\1\s*\]\s*(#.*)?$")
    first = next((i for i, line in enumerate(lines) if header.match(line)), None)
    if first is not None:
        after = next((i for i in range(first + 1, len(lines)) if lines[i].lstrip().startswith("[")), len(lines))
        while lines[after - 1].strip() == "" or lines[after - 1].lstrip().startswith("#"):  # about what follows
            after -= 1
        if first and not lines[first - 1].strip() and after < len(lines) and not lines[after].strip():
            after += 1
        left = "\n".join([*lines[:first], *lines[after:]])
        try:
            if tomllib.loads(left) | {"group": {}} == wanted | {"group": {}} and (
                tomllib.loads(left).get("group", {}) == wanted["group"]
            ):
                return left
        except ValueError:
            pass
    raise Refused(
        f"{path} has group {name} in another form than a table [group.{name}] of its own",
        f"take the group out of {path}, and then the same command",
        code="edit-config",
    )


def check_username(text: str) -> str:
    """A user name of a key manager's client, unchanged. Raises Usage for one that cannot be."""
    if not (text.isascii() and text.isprintable()) or len(text) > USERNAME_MAX:
        raise Usage(f"{text!r} cannot be a user name", f"up to {USERNAME_MAX} printable ASCII characters")
    return text


def normalise_mount_point(path: str) -> str:
    """The mount point of a group, normalised. Raises Usage, also where no group can be mounted."""
    where = normalise_place(path)
    if is_needed_before_groups(where):
        raise Usage(f"{where} is needed before groups are mounted", "another mount point", code="mount-taken")
    return where


def normalise_place(path: str) -> str:
    """A mount point without empty parts, `.` and the last slash, as systemd names its mount unit. Raises Usage."""
    parts = [part for part in path.split("/") if part not in ("", ".")]
    if not path.startswith("/") or not parts or ".." in parts or not _can_be_in_a_unit(path):
        raise Usage(f"{path!r} cannot be a mount point", "give an absolute path")
    where = "/" + "/".join(parts)
    if len(mount_unit(where)) > UNIT_NAME_MAX:
        raise Usage(f"{path!r} cannot be a mount point: it is too long", "give a shorter path")
    return where


def is_needed_before_groups(where: str) -> bool:
    """Whether a boot needs the file system at a mount point before it can mount a group: the gate, which the mount
    waits for, would wait for the mount."""
    return holds_what_boot_needs(where) or any(where.startswith(f"{needed}/") for needed in _NEEDED_WITH_ALL_BELOW)


def holds_what_boot_needs(where: str) -> bool:
    """Whether a boot stops where the mount of this mount point fails."""
    needed = (*_NEEDED_WITH_ALL_BELOW, *_NEEDED_BY_ITSELF)
    return any(f"{each}/".startswith(f"{where.rstrip('/')}/") for each in needed)


def _can_be_in_a_unit(text: str) -> bool:
    """Whether systemd reads a setting in a unit file as this text: it strips blanks, and a backslash at the end of a
    line joins the next one."""
    return text.isprintable() and text == text.strip() and not text.endswith("\\")


def _quoted(text: str) -> str:
    return '"' + text.replace("\\", "\\\\").replace('"', '\\"') + '"'


def _bad(message: str) -> Malformed:
    return Malformed(f"unlock.toml: {message}", "edit /etc/unlock/unlock.toml")


def _only(table: dict[str, Any], known: set[str], where: str) -> None:
    for key in table.keys() - known:
        raise Malformed(f"unlock.toml: {where}{key} is not a known setting", "edit /etc/unlock/unlock.toml")


def _table(top: dict[str, Any], key: str, where: str) -> dict[str, Any]:
    return _get(top, key, {}, where)


def _line(table: dict[str, Any], key: str, where: str, *, strip: bool = False) -> str:
    value = _get(table, key, "", where)
    if strip:  # as systemd does
        value = value.strip(" ")
    if not _can_be_in_a_unit(value):
        raise _bad(f"{where}{key} is not a line of text")
    return value


def _get(table: dict[str, Any], key: str, default: T, where: str) -> T:
    value = table.get(key, default)
    if type(value) is not type(default):
        raise Malformed(f"unlock.toml: {where}{key} is not a {type(default).__name__}", "edit /etc/unlock/unlock.toml")
    return value
