# SPDX-License-Identifier: Apache-2.0
"""Reads DER, the encoding of certificates and signatures: ITU-T X.690.

For the few places where `cryptography.x509` is not the tool: it takes 70 ms and 140 modules, which the recovery shell
of the initramfs does without; and it refuses a certificate for faults that do not matter where a name is read.
"""

from collections.abc import Iterator
from typing import NamedTuple


class Element(NamedTuple):
    """One element of DER."""

    tag: int
    content: bytes
    whole: bytes
    """With tag and length."""


def elements(data: bytes) -> Iterator[Element]:
    """The elements in `data`, one after the other. Raises ValueError, IndexError where it reads none."""
    at = 0
    while at < len(data):
        size, start = data[at + 1], at + 2
        if size & 0x80:
            octets = size & 0x7F
            if not 1 <= octets <= 4:
                raise ValueError("not a length of DER")
            start += octets
            size = int.from_bytes(data[at + 2 : start], "big")
        end = start + size
        if end > len(data):
            raise ValueError("an element of DER is longer than the data")
        yield Element(data[at], data[start:end], data[at:end])
        at = end
