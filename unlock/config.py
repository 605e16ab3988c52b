# SPDX-License-Identifier: Apache-2.0
"""/etc/unlock/unlock.toml: what a person edits."""

import os
from typing import Any, NamedTuple, TypeVar

from .errors import Malformed, NewerFormat, Usage
from .groups import is_name

T = TypeVar("T")
VERSION = 1
DEADLINE = 90
"""Seconds that the gate of a group waits for its members, as systemd waits for a device."""

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


class Config(NamedTuple):
    groups: dict[str, GroupConfig]


def parse(text: str) -> Config:
    """Raises Malformed that names the key, NewerFormat."""
    import tomllib

    try:
        top = tomllib.loads(text)
    except (tomllib.TOMLDecodeError, RecursionError) as error:
        raise Malformed(f"unlock.toml: {error}", "edit /etc/unlock/unlock.toml") from error
    version = top.get("version", VERSION)
    if type(version) is not int or version > VERSION:
        raise NewerFormat(f"unlock.toml has version {version!r}; this unlock reads {VERSION}")
    _only(top, {"version", "group"}, "")
    groups = {}
    for name, table in _table(top, "group", "").items():
        where = f"group.{name}."
        if not is_name(name) or not isinstance(table, dict):
            raise Malformed(f"unlock.toml: [group.{name}] is not a group", "edit /etc/unlock/unlock.toml")
        _only(table, {"mount", "type", "options", "deadline"}, where)
        mount = _get(table, "mount", "", where)
        if mount and (not mount.startswith("/") or os.path.normpath(mount) != mount or mount == "/"):
            raise Malformed(f"unlock.toml: {where}mount is not an absolute path", "edit /etc/unlock/unlock.toml")
        deadline = _get(table, "deadline", DEADLINE, where)
        if deadline < 1:
            raise Malformed(f"unlock.toml: {where}deadline is not at least 1", "edit /etc/unlock/unlock.toml")
        groups[name] = GroupConfig(
            name, mount, _get(table, "type", "", where), _get(table, "options", "", where), deadline
        )
    return Config(groups)


def load(path: str) -> Config:
    """The configuration, or the defaults when there is no file. Raises Malformed."""
    try:
        with open(path, encoding="utf-8") as file:
            return parse(file.read())
    except FileNotFoundError:
        return Config({})
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
    return "\n".join(lines) + "\n"


def check_mount_point(path: str) -> str:
    """Raises Usage when a group cannot be mounted there."""
    if not path.startswith("/") or os.path.normpath(path) != path or path == "/" or not path.isprintable():
        raise Usage(f"{path!r} cannot be a mount point", "give an absolute path")
    return path


def _quoted(text: str) -> str:
    return '"' + text.replace("\\", "\\\\").replace('"', '\\"') + '"'


def _only(table: dict[str, Any], known: set[str], where: str) -> None:
    for key in table.keys() - known:
        raise Malformed(f"unlock.toml: {where}{key} is not a known setting", "edit /etc/unlock/unlock.toml")


def _table(top: dict[str, Any], key: str, where: str) -> dict[str, Any]:
    return _get(top, key, {}, where)


def _get(table: dict[str, Any], key: str, default: T, where: str) -> T:
    value = table.get(key, default)
    if type(value) is not type(default):
        raise Malformed(f"unlock.toml: {where}{key} is not a {type(default).__name__}", "edit /etc/unlock/unlock.toml")
    return value
