# SPDX-License-Identifier: Apache-2.0
"""Reads EFI programs: the hash that the firmware measures, signatures, and sections.

Microsoft "PE Format" and "Windows Authenticode Portable Executable Signature Format": all of the file but the
checksum, the directory entry of the signatures, and the signatures themselves. Integers are little-endian.
"""

import struct
from hashlib import sha256
from typing import NamedTuple

from ..errors import Malformed

MAX_SECTIONS = 96
"""What Windows' loader and shim take."""
MAX_PADDING = 1 << 20
"""Bytes by which a section may be larger in memory than in the file."""
_SECTION = struct.Struct("<8sIIII")
_SECTION_SIZE = 40
_SECURITY = 4  # the data directory of the signatures


class Section(NamedTuple):
    """A row of the section table."""

    name: str
    size: int
    """In memory: what was meant; the file pads it."""
    raw: int
    """Bytes in the file."""
    offset: int


class PeLayout(NamedTuple):
    """Where the parts of an EFI program are in the file."""

    checksum: int
    """Offset of the checksum in the file, 4 bytes."""
    security: int
    """Offset of the directory entry of the signatures, 8 bytes; 0 when there is none."""
    headers: int
    """Bytes before the first section."""
    signatures: int
    """Bytes of signatures at the end of the file."""
    sections: tuple[Section, ...]


def read_layout(data: bytes, whole: bool = True) -> PeLayout:
    """The layout of a PE32 or PE32+ file. Raises Malformed.

    Without `whole`, a file that is cut short behind its headers is read too.
    """
    try:
        return _read_layout(data, whole)
    except struct.error:
        raise Malformed("not an EFI program: cut short") from None


def _read_layout(data: bytes, whole: bool) -> PeLayout:
    (pe,) = struct.unpack_from("<I", data, 0x3C)
    if data[:2] != b"MZ" or data[pe : pe + 4] != b"PE\0\0":
        raise Malformed("not an EFI program")
    (count,) = struct.unpack_from("<H", data, pe + 6)
    (optional_size,) = struct.unpack_from("<H", data, pe + 20)
    optional = pe + 24
    (magic,) = struct.unpack_from("<H", data, optional)
    directories = {0x10B: 96, 0x20B: 112}.get(magic, 0)
    if not directories or count > MAX_SECTIONS:
        raise Malformed("not an EFI program: an unknown kind, or too many sections")
    (headers,) = struct.unpack_from("<I", data, optional + 60)
    (entries,) = struct.unpack_from("<I", data, optional + directories - 4)
    security = optional + directories + 8 * _SECURITY if entries > _SECURITY else 0
    start, signatures = struct.unpack_from("<II", data, security) if security else (0, 0)
    sections = []
    for each in range(count):
        name, size, _, raw, offset = _SECTION.unpack_from(data, optional + optional_size + _SECTION_SIZE * each)
        if whole and raw and offset + raw > len(data):
            raise Malformed("not an EFI program: a section lies outside the file")
        sections.append(Section(name.rstrip(b"\0").decode("ascii", "replace"), size, raw, offset))
    if headers > len(data) or security + 8 > headers or (whole and start + signatures > len(data)):
        raise Malformed("not an EFI program: a size is wrong")
    return PeLayout(optional + 64, security, headers, signatures, tuple(sections))


def authenticode(data: bytes) -> bytes:
    """The SHA-256 that the firmware measures into PCR 4 when it loads this file. Raises Malformed."""
    image, view = read_layout(data), memoryview(data)
    digest = sha256(view[: image.checksum])
    if image.security:
        digest.update(view[image.checksum + 4 : image.security])
        digest.update(view[image.security + 8 : image.headers])
    else:
        digest.update(view[image.checksum + 4 : image.headers])
    hashed = image.headers
    for section in sorted((each for each in image.sections if each.raw), key=lambda each: each.offset):
        digest.update(view[section.offset : section.offset + section.raw])
        hashed += section.raw
    if hashed + image.signatures < len(data):  # what comes after the sections, up to the signatures
        digest.update(view[hashed : len(data) - image.signatures])
    return digest.digest()


def read_signatures(data: bytes) -> bytes:
    """The table of signatures of an EFI program; b"" when it has none. Raises Malformed."""
    image = read_layout(data)
    start = struct.unpack_from("<I", data, image.security)[0] if image.security else 0
    return data[start : start + image.signatures]


def read_section(data: bytes, image: PeLayout, name: str) -> bytes | None:
    """The content of a section as it is in memory, with its zeros at the end; None when there is no such section.
    Raises Malformed."""
    for each in image.sections:
        if each.name == name:
            content = data[each.offset : each.offset + min(each.raw, each.size)]
            if each.size - len(content) > MAX_PADDING:
                raise Malformed(f"EFI program: its section {name} is larger than the file has it")
            return content.ljust(each.size, b"\0")
    return None
