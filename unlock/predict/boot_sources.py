# SPDX-License-Identifier: Apache-2.0
"""Tells files from which boot files are made: kernels, initramfs files, unified kernel images, unsigned EFI programs.

kernel-install, ukify, sbsign, dracut and others copy such a file below /boot into one of another name, which is then
this system's own in every respect but its content.
"""

import os
import re

from ..errors import Malformed
from . import boot_files, pe
from .boot_tree import BootTree

_NAMES = re.compile(r"(?i)(vmlinu|initr|initramfs|linux|kernel|b?zimage|image)|.*(\.efi|\.img|\.cpio|ucode.*)$")
_ARCHIVES = (
    b"0707", b"\x1f\x8b", b"\x28\xb5\x2f\xfd", b"\xfd7zXZ", b"BZh", b"\x89LZO", b"\x5d\0\0", b"\x02\x21\x4c\x18",
    b"\x04\x22\x4d\x18",
)  # fmt: skip
"""How initramfs files begin: cpio, gzip, zstd, xz, bzip2, lzo, lzma, lz4."""
_KERNELS = ((0x202, b"HdrS"), (0x38, b"ARM\x64"), (4, b"zimg"), (0x30, b"RISCV"))
"""Offset and text: boot protocols of x86, arm64 (and its compressed EFI form), RISC-V."""


def is_source(tree: BootTree, path: str) -> bool:
    """Whether the file is of such a kind, by its content or its name. One that cannot be read is."""
    data = tree.read(path)
    if data is None:
        return True
    text = data[:64].lstrip(b"\0")  # Linux skips zeros before an archive
    is_kernel = any(data[at : at + len(magic)] == magic for at, magic in _KERNELS)
    if is_kernel or text.startswith(_ARCHIVES) or not text:
        return bool(data)
    if data[:2] != b"MZ":
        return _NAMES.match(os.path.basename(path)) is not None
    try:
        if pe.read_section(data, pe.read_layout(data), ".linux") is not None:
            return True
    except Malformed:
        return True
    return not boot_files.signers_digest(tree, path)
