# SPDX-License-Identifier: Apache-2.0
"""Parses the UEFI structures that the event log quotes, as far as a person wants to read them.

From the UEFI specification 2.10: variables and load options (3), device paths (10), signature
lists (32.4.1).
Every function raises Malformed for bytes that are not of that form, and reads each byte a bounded number of times.
"""

import struct
from typing import NamedTuple

from ..errors import Malformed
from .certificates import common_name

_X509 = bytes.fromhex("a159c0a5e494a74a87b5ab155c2bf072")  # EFI_CERT_X509_GUID
_MAX_SIGNATURES = 100_000
_MAX_NAME = 1024  # characters
_MAX_PARTITIONS = 1024
_PCI_ROOTS = (bytes.fromhex("d041030a"), bytes.fromhex("d041080a"))
"""PNP0A03 and PNP0A08, as an ACPI device path has them."""


class Variable(NamedTuple):
    """UEFI_VARIABLE_DATA; of data that is cut short, what is there."""

    name: str
    data: bytes


def parse_variable(data: bytes) -> Variable:
    """UEFI_VARIABLE_DATA."""
    try:
        name_length, size = struct.unpack_from("<QQ", data, 16)
    except struct.error:
        raise Malformed("UEFI variable: cut short") from None
    start = 32 + 2 * name_length
    if name_length > _MAX_NAME or start > len(data):
        raise Malformed("UEFI variable: a length is wrong")
    return Variable(data[32:start].decode("utf-16-le", "replace").rstrip("\0"), data[start : start + size])


class Signatures(NamedTuple):
    """What a variable such as db or dbx holds."""

    entries: int
    names: tuple[str, ...]
    """The subjects' common names, of the certificates among them."""


def parse_signature_lists(data: bytes) -> Signatures:
    """A sequence of EFI_SIGNATURE_LIST."""
    count, at = 0, 0
    names: list[str] = []
    while at < len(data):
        try:
            size, header, each = struct.unpack_from("<III", data, at + 16)
        except struct.error:
            raise Malformed("UEFI signature list: cut short") from None
        body = size - 28 - header
        if size > len(data) - at or body < 0 or each < 16 or body % each:
            raise Malformed("UEFI signature list: a size is wrong")
        count += body // each
        if count > _MAX_SIGNATURES:
            raise Malformed("UEFI signature list: too many entries")
        if data[at : at + 16] == _X509:
            first = at + 28 + header
            names += [common_name(data[here + 16 : here + each]) for here in range(first, at + size, each)]
        at += size
    return Signatures(count, tuple(names))


def signer_name(data: bytes) -> str:
    """The common name in an EFI_SIGNATURE_DATA (its owner's GUID, a certificate), or in a bare certificate."""
    for certificate in (data[16:], data):
        if certificate[:1] == b"\x30" and (name := common_name(certificate)):
            return name
    return ""


class LoadOption(NamedTuple):
    """EFI_LOAD_OPTION: an entry of the firmware's boot menu."""

    active: bool
    """Whether the firmware tries it by itself."""
    description: str
    file: str
    """What it starts: a file's path, or what else the device path ends in; '' when it has none."""
    options: bytes
    """What that gets with it."""


def parse_load_option(data: bytes) -> LoadOption:
    """Of data that is cut short after the description, what is there."""
    if len(data) < 8:
        raise Malformed("UEFI load option: cut short")
    description = decode_utf16(data[6:])
    start = 6 + len(description.encode("utf-16-le", "surrogatepass")) + 2
    end = start + int.from_bytes(data[4:6], "little")
    return LoadOption(bool(data[0] & 1), description, _device_path_text(data[start:end]), data[end:])


def parse_partition_table(data: bytes) -> tuple[str, tuple[str, ...]]:
    """UEFI_GPT_DATA, which has the table's header, a count and the entries that are used: the disk's GUID, and the
    partitions' names."""
    if len(data) < 100 or data[:8] != b"EFI PART":
        raise Malformed("UEFI partition table: not one")
    (count,) = struct.unpack_from("<Q", data, 92)
    size = int.from_bytes(data[84:88], "little")
    if size < 128 or count > _MAX_PARTITIONS or count * size > len(data) - 100:
        raise Malformed("UEFI partition table: a size is wrong")
    names = tuple(decode_utf16(data[at + 56 : at + 128]) for at in range(100, 100 + count * size, size))
    return format_guid(data[56:72]), names


def decode_utf16(data: bytes) -> str:
    """UTF-16 up to the first NUL, or the end."""
    return data[: len(data) & ~1].decode("utf-16-le", "replace").partition("\0")[0]


def parse_image_path(data: bytes) -> str:
    """Of an EFI_IMAGE_LOAD_EVENT: the file's path, or what else the device path ends in; '' when it has none."""
    if len(data) < 32:
        raise Malformed("UEFI image load event: cut short")
    (size,) = struct.unpack_from("<Q", data, 24)
    return _device_path_text(data[32 : 32 + min(size, len(data))])


def _device_path_text(data: bytes) -> str:
    files, bridges, other, offset, at = [], list[str](), "", "", 0
    while at + 4 <= len(data):
        kind, subtype, length = struct.unpack_from("<BBH", data, at)
        if kind == 0x7F or not 4 <= length <= len(data) - at:
            break
        body = data[at + 4 : at + length]
        if (kind, subtype) == (4, 4):
            files.append(decode_utf16(body))
        elif (kind, subtype) in ((4, 6), (4, 7)):
            other = f"firmware file {format_guid(body)}"
        elif (kind, subtype) == (1, 3):
            other = "memory"
        elif (kind, subtype) == (3, 24):
            other = f"network {body.decode('utf-8', 'replace')}".rstrip("\0 ")
        elif (kind, subtype) == (3, 11):
            other = f"network card {body[:6].hex(':')}"
        elif (kind, subtype) == (2, 1) and body[:4] in _PCI_ROOTS and len(body) == 8:
            bridges = [f"PciRoot({int.from_bytes(body[4:], 'little'):#x})"]
        elif (kind, subtype) == (1, 1) and len(body) == 2:
            bridges.append(f"Pci({body[1]:#x},{body[0]:#x})")
            other = f"PCI device {'/'.join(bridges)}"
        elif (kind, subtype) == (4, 8) and len(body) == 20:
            offset = f"ROM at offset {int.from_bytes(body[4:12], 'little'):#x}"
        at += length
    return "\\".join(files).replace("\\\\", "\\") or other or offset


def format_guid(data: bytes) -> str:
    """The usual text form; '' for what is shorter than 16 bytes."""
    if len(data) < 16:
        return ""
    first, second, third = struct.unpack_from("<IHH", data)
    return f"{first:08x}-{second:04x}-{third:04x}-{data[8:10].hex()}-{data[10:16].hex()}"
