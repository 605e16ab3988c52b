# SPDX-License-Identifier: Apache-2.0
"""What an unlock.toml that is wrong still names. The generator writes mount units that fail for these mount points, so
that a service which requires one does not start and write into the bare directory.

It finds too many rather than too few: a mount unit that fails where nobody has a group does no harm.
"""

import os
import re
from collections.abc import Iterator

from ..errors import Usage
from .config import holds_what_boot_needs, normalise_place

_FILES = ("ca", "client_key")
"""Settings whose value is a path and never a mount point."""

_NAME = re.compile(r"""\bgroup\s*\.\s*(?:"([^"\n]*)"|'([^'\n]*)'|([\w-]+))""")
_PATHS = (
    re.compile(r"""\bmount["']?\s*=\s*"([^"]+)"|"\s*(/[^"]*)\""""),
    re.compile(r"""\bmount["']?\s*=\s*'([^']+)'|'\s*(/[^']*)'"""),
    re.compile(r"""(?:^|[\s"'=\[{,(:#])[^\s"'=\[{,(:#/]*(/[^"'#,}\]]*)"""),
)
"""In basic strings, in literal strings, and without quotation marks: where one is missing, what is inside of a string
cannot be told from what is outside."""
_FILE = re.compile(rf"""\b(?:{"|".join(_FILES)})["']?\s*=\s*["']?$""")


def find_mount_points(value: object) -> set[str]:
    """The mount points that a TOML value may name: what a `mount` says, be it relative or in a list; where a table has
    none, each absolute path. Without those that a boot needs."""
    found = set()
    left: list[tuple[object, bool]] = [(value, False)]
    while left:  # no recursion: a.a.a... may nest deeper than Python can
        each, is_mount = left.pop()
        if isinstance(each, dict):
            has_mount = isinstance(each.get("mount"), str)
            left += [
                (below, is_mount or key == "mount")
                for key, below in each.items()
                if key == "mount" or (key not in _FILES and not (has_mount and isinstance(below, str)))
            ]
        elif isinstance(each, list):
            left += [(below, is_mount) for below in each]
        elif isinstance(each, str) and (is_mount or each.lstrip().startswith("/")):
            found.add(_as_mount_point(each))
    return found - {""}


def find_in_text(text: str) -> tuple[set[str], set[str]]:
    """The names of groups and the mount points in a file that is not TOML."""
    text = text.replace("\0", "")  # UTF-16 that was read as UTF-8
    names = {next(filter(None, found.groups()), "") for found in _NAME.finditer(text)}
    return names, {where for line in text.splitlines() for where in _find_in_line(line)} - {""}


def _find_in_line(line: str) -> Iterator[str]:
    for pattern in _PATHS if not line.lstrip().startswith("#") else ():
        for found in pattern.finditer(line):
            text = found[found.lastindex or 0]
            if not _FILE.search(line[: found.start(found.lastindex or 0)]):
                yield _as_mount_point(_unescape(text) if pattern is _PATHS[0] else text)


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
