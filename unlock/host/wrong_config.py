# SPDX-License-Identifier: Apache-2.0
"""What an unlock.toml that is wrong still names. The generator writes mount units that fail for these mount points, so
that a service which requires one does not start and write into the bare directory.

It finds too many rather than too few, but not in comments and in settings that hold no mount point: a mount unit that
fails stops what is mounted below it, too.
"""

import os
import re
from collections.abc import Iterator
from typing import NamedTuple

from ..errors import Usage
from .config import holds_what_boot_needs, normalise_place

_OTHER_SETTINGS = (
    "ca",
    "client_key",
    "common_name",
    "deadline",
    "degraded",
    "degraded_after",
    "drop_on",
    "endpoints",
    "key_names",
    "open_from_provider_after_refusal",
    "options",
    "policy",
    "timeout",
    "type",
    "username",
    "version",
)
"""Whose value is never a mount point."""

_NAME = re.compile(r"""\bgroup\s*\.\s*(?:"([^"\n]*)"|'([^'\n]*)'|([\w-]+))""")
_PATHS = (
    re.compile(r"""\bmount["']?\s*=\s*"([^"]+)"|"\s*(/[^"]*)\""""),
    re.compile(r"""\bmount["']?\s*=\s*'([^']+)'|'\s*(/[^']*)'"""),
    re.compile(r"""(?:^|[\s"'=\[{,(:#])[^\s"'=\[{,(:#/]*(/[^"'#,}\]]*)"""),
)
"""In basic strings, in literal strings, and without quotation marks: where one is missing, what is inside of a string
cannot be told from what is outside."""
_AFTER_MOUNT = re.compile(r"""(?<![\w-])mount["']?\s*=[\s"'\[]*$""")
_NO_MOUNT = r"""(?![,{]\s+["']?mount["']?\s*=|\bmount["']?\s*=\s*["'\[])"""
_OTHER = re.compile(
    rf"""(?:^|[\s,{{.])["']?(?:{"|".join(_OTHER_SETTINGS)})["']?\s*=\s*"""
    rf"""(?:"(?:{_NO_MOUNT}[^"])*"|'(?:{_NO_MOUNT}[^'])*'|\[(?:{_NO_MOUNT}[^\]])*\]|(?:{_NO_MOUNT}[^}}])*)"""
)
"""A setting without a mount point; where its end is missing, up to the end of the table or a `mount`."""
_TOKEN = re.compile(r""""(?:\\.|[^"\\])*"|'[^']*'|.""")


class Places(NamedTuple):
    """Mount points that a file may mean."""

    named: set[str]
    """By a `mount`."""
    guessed: set[str]
    """Other paths."""


def find_mount_points(value: object) -> Places:
    """The mount points that a TOML value may name: what a `mount` says, be it relative or in a list; where a table has
    none, each absolute path. Without those that a boot needs."""
    found = []
    left: list[tuple[object, bool]] = [(value, False)]
    while left:  # no recursion: a.a.a... may nest deeper than Python can
        each, is_mount = left.pop()
        if isinstance(each, dict):
            has_mount = isinstance(each.get("mount"), str)
            left += [
                (below, is_mount or key == "mount")
                for key, below in each.items()
                if key == "mount"
                or isinstance(below, dict)
                or (key not in _OTHER_SETTINGS and not (has_mount and isinstance(below, str)))
            ]
        elif isinstance(each, list):
            left += [(below, is_mount) for below in each]
        elif isinstance(each, str) and (is_mount or each.lstrip().startswith("/")):
            found.append((_as_mount_point(each), is_mount))
    return _places(found)


def find_in_text(text: str) -> tuple[set[str], Places]:
    """The names of groups and the mount points in a file that is not TOML."""
    text = text.replace("\0", "")  # UTF-16 that was read as UTF-8
    names = {next(filter(None, found.groups()), "") for found in _NAME.finditer(text)}
    return names, _places([each for line in text.splitlines() for each in _find_in_line(line)])


def _find_in_line(line: str) -> Iterator[tuple[str, bool]]:
    """Mount points, and whether a `mount` names them."""
    line = _OTHER.sub(" ", _without_comment(line))
    for pattern in _PATHS:
        for found in pattern.finditer(line):
            text = found[found.lastindex or 0]
            is_mount = _AFTER_MOUNT.search(line[: found.start(found.lastindex or 0)]) is not None
            yield _as_mount_point(_unescape(text) if pattern is _PATHS[0] else text), is_mount


def _without_comment(line: str) -> str:
    """A `#` begins no comment where the text before it is no whole line: there, it may be a typing error."""
    first = last = ""
    has_equals, open_tables = False, 0
    for token in _TOKEN.finditer(line):
        text = token[0]
        is_whole = not first or (has_equals and last != "=") or (first == "[" and last == "]")
        if text == "#" and is_whole and not open_tables:
            return line[: token.start()]
        if not text.isspace():
            first, last = first or text, text
            has_equals |= text == "="
            open_tables += (text == "{") - (text == "}")
    return line


def _places(found: list[tuple[str, bool]]) -> Places:
    named, guessed = ({where for where, is_mount in found if where and is_mount is which} for which in (True, False))
    return Places(named, guessed - named)


def _unescape(text: str) -> str:
    """A basic string of TOML, as far as it is one."""
    import tomllib

    try:
        return str(tomllib.loads(f'x = "{text}"')["x"])
    except ValueError:
        return text


def _as_mount_point(text: str) -> str:
    """The mount point that is meant; '' for none, and where a mount that fails would stop the boot."""
    try:
        where = normalise_place(os.path.normpath(f"/{text.strip().lstrip('/')}"))
    except Usage:
        return ""
    return "" if holds_what_boot_needs(where) else where
