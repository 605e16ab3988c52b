# SPDX-License-Identifier: Apache-2.0
"""Replays a boot of a unified kernel image with another image: itself and its kernel (PCR 4), its sections (PCR 11).

another image ──digest_uki──> UkiDigests, and this boot's log ──replace_uki──> events
"""

from hashlib import sha256
from typing import NamedTuple

from ..errors import Malformed
from ..measured import eventlog, uefi
from ..measured.eventlog import Event, Log
from . import pe
from .replay import cannot_predict

SECTIONS = (
    ".linux", ".osrel", ".cmdline", ".initrd", ".ucode", ".splash", ".dtb", ".uname", ".sbat", ".pcrpkey",
    ".profile", ".dtbauto", ".hwids", ".efifw",
)  # fmt: skip
"""What systemd-stub measures into PCR 11, in this order: systemd src/fundamental/uki.c. .pcrsig signs it, so is not."""


class UkiDigests(NamedTuple):
    """What is measured of a unified kernel image: SHA-256 digests."""

    image: bytes
    """Authenticode, by the firmware."""
    kernel: bytes
    """Authenticode of the kernel in it."""
    sections: tuple[bytes, ...]
    """By systemd-stub, into PCR 11."""


def digest_uki(data: bytes) -> UkiDigests:
    """Of the image's file. Raises Malformed."""
    kernel = pe.authenticode(_measured_sections(data)[".linux"])
    return UkiDigests(image=pe.authenticode(data), kernel=kernel, sections=tuple(section_digests(data)))


def replace_uki(log: Log, *, old: bytes, new: UkiDigests) -> list[Event]:
    """The log's events when the image `new` is booted in the place of `old`, which has the Authenticode digest.

    What the kernel's EFI stub measures (PCR 9) stays: systemd-stub adds to command line and initramfs.
    Raises Refused when this boot did not start `old`.
    """
    programs = (at for at, event in enumerate(log.events) if event.pcr == 4 and event.kind == eventlog.EFI_APPLICATION)
    images = [at for at in programs if not is_addon(log.events[at])]
    own = next((at for at in images if log.events[at].digest == old), None)
    kernels = [at for at in images if own is not None and at > own]  # systemd-stub 257 starts the kernel by itself
    if own is None or len(kernels) > 1:
        raise cannot_predict("this boot has not started the unified kernel image, and at most a kernel after it")
    renewed = {own: new.image, **dict.fromkeys(kernels, new.kernel)}
    sections = [Event(11, eventlog.IPL, digest, b"") for digest in new.sections]
    events: list[Event] = []
    for at, event in enumerate(log.events):
        if event.pcr == 11 and event.kind == eventlog.IPL:
            events += sections
            sections = []
        else:
            events.append(event._replace(digest=renewed.get(at, event.digest)))
    return events


def is_addon(program: Event) -> bool:
    """Whether the started program is an add-on of systemd-stub(7) for the unified kernel image."""
    try:
        return uefi.parse_image_path(program.data).lower().endswith(".addon.efi")
    except Malformed:
        return False


def section_digests(data: bytes) -> list[bytes]:
    """What systemd-stub extends PCR 11 with: for each section its name with NUL, then its content. Raises Malformed."""
    parts: list[bytes] = []
    for name, content in _measured_sections(data).items():
        parts += [f"{name}\0".encode(), content]
    return [sha256(part).digest() for part in parts]


def _measured_sections(data: bytes) -> dict[str, bytes]:
    layout = pe.read_layout(data)
    found = {name: pe.read_section(data, layout, name) for name in SECTIONS}
    if found[".linux"] is None:
        raise Malformed("not a unified kernel image: it has no section .linux")
    return {name: content for name, content in found.items() if content is not None}
