# SPDX-License-Identifier: Apache-2.0
"""Reads /etc/crypttab and /etc/fstab, which are the operator's. The only changes to them: `noauto`
in crypttab, and a line there when unlock is removed."""

import os
import stat

from ..light import NamedTuple
from ..paths import write_atomically


class CrypttabLine(NamedTuple):
    """A disk in crypttab(5)."""

    name: str
    """Of its mapping."""
    options: tuple[str, ...]
    """`discard`, `key-slot=1`"""


def find_crypttab_line(path: str, *, node: str, luks_uuid: str) -> CrypttabLine | None:
    """The first line of this disk."""
    for fields in filter(None, map(_split_line, _read_lines(path))):
        source = fields[1].strip('"')
        if source.startswith("UUID="):
            found = source.removeprefix("UUID=").strip('"').lower() == luks_uuid
        elif source.startswith("/dev/"):
            found = os.path.realpath(source) == node
        else:
            kind, _, value = source.partition("=")
            link = f"/dev/disk/by-{kind.lower()}/{value.strip(chr(34))}"
            found = kind in ("LABEL", "PARTUUID", "PARTLABEL") and os.path.realpath(link) == node
        if found:
            return CrypttabLine(fields[0], tuple(filter(None, fields[3].split(","))) if len(fields) > 3 else ())
    return None


def crypttab_names(path: str) -> set[str]:
    """The names of the mappings in crypttab(5)."""
    return {fields[0] for fields in filter(None, map(_split_line, _read_lines(path)))}


def fstab_targets(path: str) -> set[str]:
    """The mount points in fstab(5), normalised."""
    return _fstab_paths(path, 1)


def fstab_sources(path: str) -> set[str]:
    """The devices, directories and files that fstab(5) mounts by their paths, normalised."""
    return _fstab_paths(path, 0)


def source_of_node(path: str, node: str) -> str:
    """What fstab(5) mounts, as written there, if that names a device by its path or partition and not by what is on it;
    '' for none."""
    for fields in filter(None, map(_split_line, _read_lines(path))):
        source = unescape(fields[0])
        kind, _, value = source.partition("=")
        link = f"/dev/disk/by-{kind.lower()}/{value.strip(chr(34))}" if kind in ("PARTUUID", "PARTLABEL") else source
        if link.startswith("/dev/") and os.path.realpath(link) == node and "/by-uuid/" not in link:
            return source
    return ""


def _fstab_paths(path: str, column: int) -> set[str]:
    named = [unescape(fields[column]) for fields in filter(None, map(_split_line, _read_lines(path)))]
    return {os.path.normpath(f"/{where.lstrip('/')}") for where in named if where.startswith("/")}


def unescape(field: str) -> str:
    """A field of fstab(5) or of a table in /proc, in which blanks and backslashes are octal escapes."""
    if "\\" not in field:
        return field
    import re

    return os.fsdecode(re.sub(rb"\\([0-3][0-7]{2})", lambda found: bytes([int(found[1], 8)]), os.fsencode(field)))


def set_noauto(path: str, name: str) -> bool:
    """Adds the option noauto to a mapping's line in crypttab(5). True when the file changed."""
    lines = _read_lines(path)
    changed = False
    for i, line in enumerate(lines):
        fields = _split_line(line)
        if fields and fields[0] == name:
            options = fields[3].split(",") if len(fields) > 3 else ["luks"]
            if "noauto" not in options:
                key = fields[2] if len(fields) > 2 else "none"
                lines[i] = " ".join((fields[0], fields[1], key, ",".join([*options, "noauto"]))) + "\n"
                changed = True
    if changed:
        mode = stat.S_IMODE(os.stat(path).st_mode)
        write_atomically(path, "".join(lines).encode("utf-8", "surrogateescape"), mode)
    return changed


def add_crypttab_line(path: str, line: str) -> None:
    """Adds a line at the end of crypttab(5), which is made where it is not there. Raises OSError."""
    text = "".join(_read_lines(path))
    mode = stat.S_IMODE(os.stat(path).st_mode) if os.path.exists(path) else 0o644
    text = f"{text.rstrip(chr(10))}\n" if text.strip() else text
    write_atomically(path, f"{text}{line}\n".encode("utf-8", "surrogateescape"), mode)


def clear_noauto(path: str, name: str) -> bool:
    """Takes the option noauto out of a mapping's line in crypttab(5). True when the file changed."""
    lines = _read_lines(path)
    changed = False
    for i, line in enumerate(lines):
        fields = _split_line(line)
        options = fields[3].split(",") if len(fields) > 3 else []
        if fields and fields[0] == name and "noauto" in options:
            left = [each for each in options if each != "noauto"] or ["luks"]
            lines[i] = " ".join((*fields[:3], ",".join(left))) + "\n"
            changed = True
    if changed:
        mode = stat.S_IMODE(os.stat(path).st_mode)
        write_atomically(path, "".join(lines).encode("utf-8", "surrogateescape"), mode)
    return changed


def _read_lines(path: str) -> list[str]:
    try:
        return read_table(path)
    except FileNotFoundError:
        return []


def read_table(path: str) -> list[str]:
    """The lines of a table in /etc or /proc. Nothing but a line feed ends one: a name may have any other character.
    Raises OSError."""
    with open(path, encoding="utf-8", errors="surrogateescape", newline="\n") as file:
        return file.readlines()


def split_fields(line: str) -> list[str]:
    """The fields of a line, which blanks and tabs alone separate, as the kernel and libmount have it."""
    return list(filter(None, line.rstrip("\n").replace("\t", " ").split(" ")))


def _split_line(line: str) -> list[str]:
    fields = split_fields(line)
    return fields if len(fields) > 1 and not fields[0].startswith("#") else []
