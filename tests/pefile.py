# SPDX-License-Identifier: Apache-2.0
"""Builds small EFI programs, unified kernel images among them."""

import struct
from collections.abc import Mapping

ALIGN = 512


def build(sections: Mapping[str, bytes], *, signature: bytes = b"", trailing: bytes = b"", checksum: int = 0) -> bytes:
    """PE32+ for x86-64, as the UEFI specification and Microsoft's "PE Format" lay it out."""
    count = len(sections)
    header_size = -(-(64 + 4 + 20 + 240 + 40 * count) // ALIGN) * ALIGN
    table, body, at = b"", b"", header_size
    for name, content in sections.items():
        raw = -(-len(content) // ALIGN) * ALIGN
        table += struct.pack("<8sIIIIIIHHI", name.encode(), len(content), 0x1000 + at, raw, at, 0, 0, 0, 0, 0x40000040)
        body += content.ljust(raw, b"\0")
        at += raw
    body += trailing
    directories = [(0, 0)] * 16
    if signature:
        directories[4] = (at + len(trailing), len(signature))
    optional = struct.pack("<HBBIIIII", 0x20B, 0, 0, 0, 0, 0, 0, 0x1000)
    optional += struct.pack("<QIIHHHHHHIIIIHH", 0, 4096, ALIGN, 0, 0, 0, 0, 0, 0, 0, at, header_size, checksum, 10, 0)
    optional += struct.pack("<QQQQII", 0, 0, 0, 0, 0, 16) + b"".join(struct.pack("<II", *each) for each in directories)
    coff = struct.pack("<HHIIIHH", 0x8664, count, 0, 0, 0, len(optional), 0x22)
    head = b"MZ".ljust(0x3C, b"\0") + struct.pack("<I", 64) + b"PE\0\0" + coff + optional + table
    return head.ljust(header_size, b"\0") + body + signature
