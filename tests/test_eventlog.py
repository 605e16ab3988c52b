# SPDX-License-Identifier: Apache-2.0
"""The event log's forms, its replay, and what a hostile one can do: nothing."""

import json
import random
import re
import resource
import struct
import subprocess
import sys
from collections.abc import Iterator
from hashlib import sha256
from pathlib import Path

import pytest

from tests.eventlogs import (
    DATA,
    LOGGED,
    OWNER,
    SHA256,
    X509,
    Boot,
    Entry,
    certificate,
    described,
    event2,
    grub,
    grub_file,
    header,
    log,
    machine,
    no_action,
    option_rom,
    partition_table,
    plain,
    program,
    real,
    shim,
    signature_list,
    systemd_log,
    tagged,
    values,
    variable,
)
from tests.properties import Property
from unlock.errors import Malformed
from unlock.measured import certificates, compare, describe, eventlog, verify
from unlock.measured.baseline import Baseline, TpmIdentity
from unlock.measured.describe import Item
from unlock.measured.log_text import TEXT_MAX, printable

KINDS = ("grub", "uki", "direct")


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("locality", [None, 0, 3, 4])
def test_the_replay_is_what_a_tpm_has(kind: str, locality: int | None) -> None:
    entries = Boot(kind).entries()
    found = eventlog.parse_event_log(log(entries, locality))
    assert (found.problem, found.locality) == ("", locality or 0)
    assert eventlog.replay(found.events, found.locality) == values(entries, locality or 0)


@pytest.mark.parametrize("name", ["direct-0", "direct-1"])
def test_the_replay_of_a_real_log_is_what_the_tpm_had(name: str) -> None:
    boot = real(name)
    found = eventlog.parse_event_log(boot.log)
    reached = eventlog.replay(found.events, found.locality)
    assert found.problem == ""
    assert {pcr: reached[pcr] for pcr in LOGGED} == {pcr: boot.pcrs[pcr] for pcr in LOGGED}
    trusted = verify.verified_events(found, (), boot.pcrs)
    assert set(range(24)) - trusted.keys() == {10}  # IMA's; the cap is known


def test_between_two_real_boots_the_command_line_has_changed() -> None:
    before, now = (
        describe.with_command_line(
            map(describe.describe_event, eventlog.parse_event_log(boot.log).events), boot.cmdline
        )
        for boot in (real("direct-0"), real("direct-1"))
    )
    (found,) = compare.compare_boots(before, now, range(16))
    assert (found.pcr, found.cause) == (9, "command-line")
    assert found.old and found.new and "audit=0" in found.new.text and "audit=0" not in found.old.text
    assert {item.cause for item in now if item.pcr == 4} == {"kernel", "boot-path"}


def test_forms_that_firmware_is_known_to_write() -> None:
    one = plain(7, 0x04, bytes(4))
    for data in (
        header(vendor=b"vendor") + event2(one),
        header() + event2(one) + bytes(5000),  # the rest of the firmware's buffer
        header() + event2(one) + b"\xff" * 5000,
        header() + no_action(b"anything", pcr=0xFFFFFFFF) + event2(one),
        header() + no_action(b"") + event2(one),
        header() + no_action(b"StartupLocality\0" + bytes(34)) + event2(one),  # coreboot: each event in as much room
        header() + event2(one) + bytes(500) + event2(one)[:30],  # what was in the buffer before
        header([(4, 20), (11, 32), (12, 48), (0x12, 32)]) + event2(one, [4, 11, 12]),
        header([(11, 32)]) + event2(one, [11]),
        header([(11, 32), (12, 48)]) + event2(one, [12, 11]),
        header([(11, 32)]) + event2(one, [4, 12, 11]),  # banks that its header does not name
    ):
        found = eventlog.parse_event_log(data)
        assert (found.problem, [event.digest for event in found.events]) == ("", [one.sha256])


@pytest.mark.parametrize("size", [17, 50])
def test_the_locality_of_the_startup_is_read(size: int) -> None:
    entries = list(machine().values())
    told = no_action((b"StartupLocality\0\3").ljust(size, b"\0"))
    found = eventlog.parse_event_log(header() + told + b"".join(map(event2, entries)))
    assert eventlog.replay(found.events, found.locality) == values(entries, 3)


def test_a_machine_as_one_can_buy_it() -> None:
    entries = list(machine().values())
    for banks in ([4, 11], [11], [4, 11, 12, 0x12], [0x12, 11]):
        sizes = {4: 20, 11: 32, 12: 48, 0x12: 32}
        data = header([(bank, sizes[bank]) for bank in banks]) + b"".join(event2(each, banks) for each in entries)
        found = eventlog.parse_event_log(data)
        assert (found.problem, len(found.events)) == ("", len(entries))
        assert eventlog.replay(found.events) == values(entries)
        assert verify.repair_log(found, (), values(entries)) == found
    assert not [item for item in map(describe.describe_event, found.events) if item.cause == "other" or not item.text]


@pytest.mark.parametrize("locality", [3, 4])
def test_a_locality_that_the_firmware_does_not_tell(locality: int) -> None:
    entries = list(machine().values())
    live = values(entries, locality)
    found = verify.repair_log(eventlog.parse_event_log(log(entries)), (), live)
    assert found.locality == locality and verify.verified_events(found, (), live).keys() == set(range(24))


@pytest.mark.parametrize("count", [1, 2, 15])
def test_final_events_that_the_kernel_appended_a_second_time(count: int) -> None:
    """What came after the log was asked for is in the table of final events; an old kernel appends all of it."""
    entries = Boot("grub", menu="set a=1\nset a=1\nset b=1").entries()
    before, end = entries[:-4], entries[-4:]
    data = log([*before, *before[-count:], *end])
    live = values(entries)
    assert verify.verified_events(eventlog.parse_event_log(data), (), live).keys() != set(range(24))
    found = verify.repair_log(eventlog.parse_event_log(data), (), live)
    assert eventlog.replay(found.events) == live


def test_a_log_is_not_bent_to_what_the_tpm_has() -> None:
    entries = list(machine().values())
    live = values(entries) | {9: b"x" * 32}
    found = eventlog.parse_event_log(log(entries))
    assert verify.repair_log(found, (), live) == found
    assert set(range(24)) - verify.verified_events(found, (), live).keys() == {9}


def test_what_another_program_extends_makes_no_other_pcr_unbelieved() -> None:
    """IMA, systemd without a log, a dynamic launch."""
    entries = list(machine().values())
    live = values(entries) | {pcr: bytes([pcr]) * 32 for pcr in (10, 11, 12, 13, 15, 17, 18, 19, 22)}
    assert verify.verified_events(eventlog.parse_event_log(log(entries)), (), live).keys() == {
        *range(10),
        14,
        16,
        20,
        21,
        23,
    }


def test_a_pcr_whose_event_has_no_sha256_digest_is_not_replayed() -> None:
    data = header() + event2(plain(7, 4, bytes(4))) + event2(plain(4, 4, bytes(4)), [4])
    found = eventlog.replay(eventlog.parse_event_log(data).events)
    assert 4 not in found and 7 in found


def test_a_log_of_sha1_alone_has_a_code_of_its_own() -> None:
    old = struct.pack("<II20sI", 4, 4, bytes(20), 4) + bytes(4)
    first = struct.pack("<II20sI", 0, 3, bytes(20), 17) + b"StartupLocality\0\3"
    for data in (old, first + old, header([(4, 20)]) + event2(plain(7, 4, b""), [4])):
        with pytest.raises(Malformed, match="SHA-1 digests only") as caught:
            eventlog.parse_event_log(data)
        assert caught.value.code == "event-log-sha1" and caught.value.hint


@pytest.mark.parametrize(
    "banks,words",
    [
        ([(12, 48)], "SHA-384 digests only"),
        ([(4, 20), (12, 48)], "SHA-1 and SHA-384 digests only"),
        ([(0x99, 7)], "algorithm 0x99 digests only"),
        ([], "no digests"),
    ],
)
def test_a_log_without_sha256_says_what_it_has(banks: list[tuple[int, int]], words: str) -> None:
    with pytest.raises(Malformed, match=f"the event log has {words}$") as caught:
        eventlog.parse_event_log(header(banks))
    assert caught.value.code == "event-log-no-sha256" and caught.value.hint


@pytest.mark.parametrize(
    "data",
    [b"", b"\0" * 31, header()[:40], header([(11, 20)]), header([(11, 32)] * 17), bytes(eventlog.MAX_LOG + 1)],
    ids=["empty", "short", "cut", "sizes", "banks", "long"],
)
def test_what_is_no_log(data: bytes) -> None:
    with pytest.raises(Malformed):
        eventlog.parse_event_log(data)


@pytest.mark.parametrize(
    "bad",
    [
        event2(plain(24, 4, b"")),
        event2(plain(7, 4, b"data"))[:-1],
        event2(plain(7, 4, b""))[:-4] + b"\xff\xff\xff\xff",
        struct.pack("<III", 7, 4, 0x7FFFFFFF) + bytes(9) + b"x",
        struct.pack("<IIIH", 7, 4, 1, 0x99) + bytes(40) + b"x",
    ],
    ids=["pcr", "cut", "size", "count", "algorithm"],
)
def test_what_comes_before_a_broken_event_is_kept(bad: bytes) -> None:
    found = eventlog.parse_event_log(header() + event2(plain(7, 4, b"good")) + bad)
    assert len(found.events) == 1 and found.problem.startswith("after 1 events: ")


def test_a_log_that_ends_anywhere_is_told_in_our_words() -> None:
    whole = header() + event2(plain(7, 4, b"good")) + event2(plain(7, 4, b"data"))
    start = len(header() + event2(plain(7, 4, b"good")))
    problems = {eventlog.parse_event_log(whole[:end]).problem for end in range(start + 1, len(whole))}
    ends = r"after 1 events: (it is cut short|an event of 4 bytes where \d are left)"
    assert all(re.fullmatch(ends, each) for each in problems if each) and len(problems) > 2


def test_events_beyond_any_reason_are_not_read() -> None:
    tiny = struct.pack("<IIII", 0, 4, 0, 1) + b"x"
    found = eventlog.parse_event_log(header() + tiny * (eventlog.MAX_EVENTS + 1))
    assert len(found.events) == eventlog.MAX_EVENTS and "more than" in found.problem


# systemd


def test_what_systemd_measured_is_read() -> None:
    found = eventlog.parse_systemd_log(systemd_log([(11, "phase", "enter-initrd", 1.5), (15, "machine-id", "id", 9)]))
    assert [(each.pcr, each.time) for each in found] == [(11, 1.5), (15, 9.0)]
    assert found[0].digest == sha256(b"enter-initrd").digest()
    assert describe.describe_event(found[0]).text == "systemd phase: enter-initrd"


@pytest.mark.parametrize(
    "record",
    [
        b"", b"{", b"[]", b"null", b"[" * 100_000, b'{"pcr":11}', b'{"pcr":99,"digests":[]}',
        b'{"pcr":true,"digests":[{"hashAlg":"sha256","digest":"00"}]}', b'{"nv_index":1,"digests":[]}',
        b'{"pcr":11,"digests":[{"hashAlg":"sha256","digest":"zz"}]}', b"9" * 10_000, b"\xff\xfe",
        b'{"pcr":11,"digests":[{"hashAlg":"sha1","digest":"00"}],"content":7}', b'{"pcr":11,"digests":7}',
    ],
)  # fmt: skip
def test_records_that_are_none_of_ours_are_left_out(record: bytes) -> None:
    good = systemd_log([(11, "phase", "ready", 1)])
    assert len(eventlog.parse_systemd_log(b"\x1e" + record + b"\n" + good)) == 1


# words

OFFSET = struct.pack("<BBHIQQ", 4, 8, 24, 0, 0x15C00, 0x3FF)


def driver(path: bytes) -> Entry:
    path += struct.pack("<BBH", 0x7F, 0xFF, 4)
    return Entry(2, 0x80000004, b"rom", struct.pack("<QQQQ", 0, 0, 0, len(path)) + path)


@pytest.mark.parametrize(
    "entry,cause,text",
    [
        (variable(7, "SecureBoot", b"\1"), "secure-boot", "Secure Boot on"),
        (variable(7, "SecureBoot", b""), "secure-boot", "Secure Boot off"),
        (variable(7, "db", signature_list(X509, [certificate("A CA")])), "secure-boot-keys", "db: 1 entry (A CA)"),
        (variable(7, "dbx", signature_list(SHA256, [bytes(32)] * 3)), "dbx", "dbx: 3 entries"),
        (variable(7, "dbx", b""), "dbx", "dbx: 0 entries"),
        (variable(7, "MokList", OWNER + certificate("K"), 0x800000E0), "mok", "MokList: K"),
        (variable(7, "Shim", certificate("Debian"), 0x800000E0), "signer", "Shim: Debian"),
        (variable(1, "BootOrder", b"\1\0\x0a\0", 0x80000002), "boot-order", "BootOrder: 0001 000A"),
        (grub("grub_cmd", "linux /vmlinuz-6 root=x"), "command-line", "command line /vmlinuz-6 root=x"),
        (grub("kernel_cmdline", "/vmlinuz-6 root=x"), "command-line", "command line /vmlinuz-6 root=x"),
        (grub("grub_cmd", "set a=b"), "boot-loader-config", "GRUB command set a=b"),
        (Entry(9, 0x0D, b"", b"/boot/grub/grub.cfg\0"), "boot-loader-config", "GRUB configuration /boot/grub/grub.cfg"),
        (Entry(9, 0x0D, b"", b"(hd0)/grub/grubenv\0"), "grubenv", "GRUB environment (hd0)/grub/grubenv"),
        (Entry(9, 0x0D, b"", b"(hd0,gpt2)/x/linux.mod\0"), "boot-loader-files", "file (hd0,gpt2)/x/linux.mod"),
        (Entry(9, 0x0D, b"", b"(hd0)/initrd.img-6.1\0"), "initrd", "initramfs file (hd0)/initrd.img-6.1"),
        (Entry(12, 0x0D, b"", " quiet".encode("utf-16-le") + b"\0\0"), "command-line", "command line quiet"),
        (Entry(12, 0x0D, b"", b"Credentials initrd\0"), "extension", "Credentials initrd"),
        (tagged(9, 0x8F3B22EC, "Linux initrd", b""), "initrd", "initramfs, as the kernel got it"),
        (plain(4, 0x80000007, b"Calling EFI Application from Boot Option"), "boot-path", "Calling EFI Application"),
        (plain(7, 4, b"\1\0\0\0"), "boot-path", "separator: an error"),
        (plain(7, 0x80000001, b"\xff\xff\xff"), "secure-boot-keys", "event of type 0x80000001"),
        (plain(7, 4, bytes(4))._replace(data=bytes(50)), "boot-path", "separator"),
        (plain(7, 0x80000007, b"DMA Protection Disabled\0"), "firmware-settings", "the protection against"),
        (plain(7, 0x80000007, b"UEFI Debug Mode"), "firmware-settings", "the firmware can be debugged"),
        (plain(5, 0x80000007, b"Exit Boot Services Returned with Failure"), "boot-path", "Exit Boot Services Returned"),
        (variable(7, "dbx", b"no list"), "dbx", "dbx: 7 bytes"),
        (plain(1, 0x80000001, variable(1, "Setup", b"12345678").data[:-4]), "firmware-settings", "UEFI variable Setup"),
        (plain(7, 0x80000001, "Boot Guard Measured S-CRTM\0".encode("utf-16-le")), "firmware", "Boot Guard Measured"),
        (plain(0, 0x08, "N32ET75W  \0".encode("utf-16-le")), "firmware", "firmware version N32ET75W"),
        (plain(0, 0x08, bytes.fromhex("1efb6b540c1d5540a4ad4ef4bf17b83a")), "firmware", "firmware version 546bfb1e"),
        (plain(0, 0x08, b""), "firmware", "firmware version"),
        (Entry(0, 0x01, b"", b"SMM CODE"), "firmware", "firmware code (POST) SMM CODE"),
        (described(0, 0x8000000A, "Fv(8C8CE578)", b""), "firmware", "firmware volume Fv(8C8CE578)"),
        (described(2, 0x8000000A, "Oprom", b""), "option-rom", "firmware volume Oprom"),
        (described(1, 0x8000000B, "ACPI DATA", b""), "firmware-settings", "firmware tables ACPI DATA"),
        (plain(6, 0x0C, b"Dell Configuration Information 1"), "firmware", "firmware, compact hash Dell Configuration"),
        (plain(4, 0x12, b"BOOT ATTEMPTS OMITTED"), "boot-path", "boot devices left out BOOT ATTEMPTS OMITTED"),
        (plain(5, 0x0E, bytes(64)), "partition-table", "partition of the boot loader"),
        (plain(2, 0x800000E1, b"SPDM Device Sec2"), "option-rom", "firmware of a device (SPDM)"),
        (option_rom(3, "rom"), "option-rom", "driver PCI device PciRoot(0x0)/Pci(0x1c,0x0)/Pci(0x3,0x0)"),
        (driver(OFFSET), "option-rom", "driver ROM at offset 0x15c00"),
        (driver(b"\2\1\x0c\0\xd0\x41\x08\x0a\2\0\0\0\1\1\6\0\1\2"), "option-rom",
         "driver PCI device PciRoot(0x2)/Pci(0x2,0x1)"),
        (driver(b"\1\1\6\0\0\3" + OFFSET), "option-rom", "driver PCI device Pci(0x3,0x0)"),
        (program("", "x", OFFSET), "firmware", "EFI program from ROM at offset 0x15c00"),
        (program("System_Services", "x"), "firmware", "EFI program from System_Services"),
        (program("BOOTX64.EFI", "x"), "boot-loader", "EFI program BOOTX64.EFI"),
        (Entry(1, 0x09, b"", b"CPU Microcode"), "firmware", "CPU microcode"),
        (plain(12, 4, b"WBCL"), "other", "separator"),
        (plain(14, 4, b"\xff\xff\xff\xff"), "other", "separator"),
        (plain(14, 0x80000007, b"something"), "other", "something"),
        (plain(3, 4, b"WBCL"), "boot-path", "separator: an error of the firmware"),
        (Entry(11, 0x0D, b".linux\0", ".linux\0".encode("utf-16-le")), "kernel", "section .linux, its name"),
        (Entry(11, 0x0D, b"code", ".linux\0".encode("utf-16-le")), "kernel", "section .linux"),
        (partition_table(["EFI System", ""]), "partition-table",
         "partition table of disk 03020100-0504-0706-0809-0a0b0c0d0e0f: EFI System, no name"),
        (plain(5, 0x8000000D, b"EFI PART"), "partition-table", "partition table of the boot disk"),
        (program("", "x", struct.pack("<BBH", 3, 24, 4 + 14) + b"http://host/a\0"), "boot-loader",
         "EFI program network http://host/a"),
        (program("\\EFI\\debian\\fwupdx64.efi", "x"), "boot-path", "EFI program \\EFI\\debian\\fwupdx64.efi, which"),
        (program("\\EFI\\debian\\mmx64.efi", "x"), "boot-path", "EFI program \\EFI\\debian\\mmx64.efi, which runs"),
        (program("\\EFI\\refind\\refind_x64.efi", "x"), "boot-loader", "EFI program \\EFI\\refind\\refind_x64.efi"),
        (program("\\EFI\\Linux\\a.efi.extra.d\\b.addon.efi", "x"), "extension", "add-on \\EFI\\Linux\\a.efi.extra.d"),
        (program("\\boot\\vmlinuz-6.12", "x"), "kernel", "kernel image \\boot\\vmlinuz-6.12"),
        (program("\\EFI\\xen.efi", "x"), "kernel", "kernel image \\EFI\\xen.efi"),
        (Entry(4, 0x80000003, b"", bytes(32) + bytes.fromhex("0090150000a01500af")), "kernel", "image that a"),
        (Entry(8, 0x0D, b"", b"grub_cmd linux (hd0)/vmlinuz-4 ro\0"), "command-line", "command line (hd0)/vmlinuz"),
        (Entry(8, 0x0D, b"", b"grub_kernel_cmdline (hd0)/vmlinuz-4 ro\0"), "command-line", "command line (hd0)/vml"),
        (Entry(9, 0x0D, b"", b"grub_linuxefi Kernel\0"), "kernel", "kernel file Kernel"),
        (Entry(9, 0x0D, b"", b"grub_linuxefi Initrd\0"), "initrd", "initramfs file Initrd"),
        (Entry(8, 0x0D, b"", "root=x".encode("utf-16-le") + b"\0"), "command-line", "command line root=x"),
        (grub("grub_cmd", "module2 /vmlinuz-6 root=x"), "command-line", "command line /vmlinuz-6 root=x"),
        (grub("grub_cmd", "module2 /initrd.img-6"), "boot-loader-config", "GRUB command module2 /initrd.img-6"),
        (grub("module_cmdline", "/vmlinuz-6 root=x"), "command-line", "command line /vmlinuz-6 root=x"),
        (Entry(9, 0x0D, b"", b"(hd0)/boot/xen-4.17.gz\0"), "kernel", "kernel file (hd0)/boot/xen-4.17.gz"),
        (Entry(9, 0x0D, b"", b"(hd0)/amd-ucode.img\0"), "initrd", "initramfs file (hd0)/amd-ucode.img"),
        (shim(14, "MokListTrusted", b"\1"), "mok", "MokListTrusted"),
        (shim(14, "", b"\1"), "mok", "nothing said"),
        (Entry(11, 0x0D, b"x", b".ucode\0"), "uki", "section .ucode"),
        (tagged(12, 0x13AED6DB, "profile", b"x"), "uki", "profile of the unified kernel image"),
        (tagged(5, 0xF5BC582A, "loader.conf", b"x"), "boot-loader-config", "systemd-boot's loader.conf"),
        (plain(0, 0x08, b"x"), "firmware", "firmware version"),
        (plain(3, 0x12345678, b"x"), "firmware-settings", "event of type 0x12345678"),
    ],
)  # fmt: skip
def test_events_in_words(entry: Entry, cause: str, text: str) -> None:
    (event,) = eventlog.parse_event_log(header() + event2(entry)).events
    item = describe.describe_event(event)
    assert (item.cause, item.text[: len(text)]) == (cause, text)


def test_an_image_without_a_name_is_the_boot_loader_before_grub() -> None:
    """Old shims give none. After GRUB has begun it is the kernel, and where there is no GRUB."""
    nameless = [program("", "a"), program("", "b")]
    shim, command, file = program("\\EFI\\x\\shimx64.efi", "s"), grub("grub_cmd", "set a=b"), grub_file("/x.mod", "")

    def causes(*entries: Entry) -> list[str]:
        events = eventlog.parse_event_log(log(entries)).events
        return [each.cause for each in describe.describe_events(events) if each.kind == eventlog.EFI_APPLICATION]

    for first in (command, file):
        assert causes(shim, nameless[0], first, nameless[1]) == ["boot-loader", "boot-loader", "kernel"]
    assert causes(shim, nameless[0]) == ["boot-loader", "kernel"]
    stub = Entry(11, 0x0D, b".linux\0", ".linux\0".encode("utf-16-le"))
    assert causes(shim, stub, nameless[0], plain(5, 0x80000007, b"Exit")) == ["boot-loader", "kernel"]


def test_the_sections_of_a_real_unified_kernel_image_are_told_from_their_names() -> None:
    texts = [each.text for each in map(describe.describe_event, eventlog.parse_event_log(real("uki-0").log).events)]
    sections = [each for each in texts if each.startswith("section ")]
    assert sections[:2] == ["section .linux, its name", "section .linux"]
    assert sum(each.endswith("its name") for each in sections) * 2 == len(sections)


def test_a_terminal_takes_nothing_in_a_text_for_a_command() -> None:
    hostile = "\x1b[2J\x9b31m\u202ecfg\r\n\0\ud800"
    item = describe.describe_event(
        eventlog.Event(8, 0x0D, bytes(32), f"grub_cmd: {hostile}".encode("utf-8", "replace"))
    )
    assert item.text.isprintable()
    assert printable("a" * 9999, 10) == "a" * 10
    assert printable(printable("a b\t\u00a0 c", 4), 4) == printable("a b\t\u00a0 c", 4)


def test_the_subject_of_a_certificate_not_its_issuer() -> None:
    assert certificates.common_name(certificate("the subject", "the issuer")) == "the subject"
    assert certificates.common_name(b"\x30\x82\xff") == certificates.common_name(b"") == ""


# comparing


def items(*texts: str, pcr: int = 8) -> list[Item]:
    return [
        Item(pcr, 0x0D, sha256(text.encode()).digest(), "boot-loader-config", f"GRUB command {text}") for text in texts
    ]


@pytest.mark.parametrize(
    "old,new,expected",
    [
        ("a b c", "a b c", []),
        ("a b c", "a x b c", [(None, "x")]),
        ("a b c", "a c", [("b", None)]),
        ("a b c", "a b", [("c", None)]),
        ("a b", "a b c", [(None, "c")]),
        ("a a b", "a b", [("a", None)]),
        ("a b c", "a c b", [("b", "c")]),
        ("", "a", [(None, "a")]),
    ],
)
def test_what_came_what_went(old: str, new: str, expected: list[tuple[str | None, str | None]]) -> None:
    found = compare.compare_boots(items(*old.split()), items(*new.split()), [8])
    words = [tuple(each and each.text.removeprefix("GRUB command ") for each in (d.old, d.new)) for d in found]
    assert words == expected


def test_the_first_difference_in_the_log_comes_first_whatever_its_pcr() -> None:
    now = [*items("x", pcr=9), *items("y", pcr=4)]
    assert [each.pcr for each in compare.compare_boots([], now, [4, 9])] == [9, 4]


def test_an_event_that_is_gone_comes_where_it_was_whatever_its_pcr() -> None:
    same, end = items("a", pcr=8), [*items("z", pcr=8), *items("z", pcr=9)]
    old = [*same, *items("file", pcr=9), *items("set b=1", pcr=8), *end]
    found = compare.compare_boots(old, [*same, *end], [8, 9])
    assert [(each.pcr, each.new) for each in found] == [(9, None), (8, None)]
    changed = compare.compare_boots([*items("set b=1"), *old], [*items("set b=2"), *same, *end], [8, 9])
    assert [(each.pcr, each.new is None) for each in changed] == [(8, False), (9, True), (8, True)]


def test_pairs_are_about_the_same_thing() -> None:
    old, new = items("set a=1", "menuentry A { old }", "set c=1"), items("menuentry B { new }", "set b=2", "set c=2")
    pairs = [(d.old.text, d.new.text) for d in compare.compare_boots(old, new, [8]) if d.old and d.new]
    assert pairs == [
        ("GRUB command menuentry A { old }", "GRUB command menuentry B { new }"),
        ("GRUB command set c=1", "GRUB command set c=2"),
    ]


@pytest.mark.parametrize(
    "old,new,paired",
    [
        ("[ 0 = 1 ]", "[ 1 = 1 ]", True),
        ("[ y = y ]", "[ -s (hd0)/grub/grubenv ]", False),
        ("[ efi = xen ]", "[ 1 = 2 ]", False),
        ("[ -f /a ]", "[ -f /b ]", False),
        ("test 0 = 1", "[ 2 = 1 ]", True),
        ("[ 1>2 ]", "[ 0 ]", True),
        ("[ 0 != 5 -a x = x ]", "[ 1 != 5 ]", False),
        ("a=1", "a=2", True),
        ("a=1", "set a=2", True),
        ("a=1", "b=2", False),
        ("", "[", False),
    ],
)
def test_a_changed_test_or_variable_is_paired_with_itself_alone(old: str, new: str, paired: bool) -> None:
    found = compare.compare_boots(items(old), items(new), [8])
    assert [bool(each.old and each.new) for each in found] == ([True] if paired else [False, False])


# the baseline


def baseline(kind: str) -> Baseline:
    found = eventlog.parse_event_log(Boot(kind).log())
    kept = tuple(map(describe.describe_event, found.events))
    return Baseline("6.12.1", "root=x", TpmIdentity("00" * 34, ""), eventlog.replay(found.events), kept)


@pytest.mark.parametrize("kind", KINDS)
def test_a_baseline_is_read_as_it_was_written(kind: str) -> None:
    assert Baseline.decode(baseline(kind).encode()) == baseline(kind)


def test_a_baseline_of_the_first_format_still_explains() -> None:
    """The file is what version 1 wrote on the first of the two real boots."""
    kept = Baseline.decode((DATA / "baseline-1.json").read_bytes())
    now = real("direct-1")
    items = describe.with_command_line(
        map(describe.describe_event, eventlog.parse_event_log(now.log).events), now.cmdline
    )
    (found,) = compare.compare_boots(kept.items, items, kept.pcrs)
    assert found.cause == "command-line" and found.old and found.old.text == f"command line {kept.cmdline}"
    assert kept.pcrs[9] == real("direct-0").pcrs[9] and 10 not in kept.pcrs and kept.chip.srk and kept.chip.identity


@pytest.mark.parametrize("field", ["kernel", "cmdline", "chip", "pcrs", "events", "version"])
@pytest.mark.parametrize("value", [None, 7, "\x1b[2J", [[]], {"99": ""}, {"4": "00"}, [[8, 13, "00", "kernel", "x"]]])
def test_a_baseline_with_another_field_is_malformed(field: str, value: object) -> None:
    fields = json.loads(baseline("direct").encode()) | {field: value}
    with pytest.raises(Malformed, match=r"it is not as unlock writes it|newer version"):
        Baseline.decode(json.dumps(fields).encode())


# hostile input


def fuzz(seed: int, cases: int) -> bool:
    """Mutated logs through everything that reads them: no exception but Malformed, and no text that is no line."""
    dice = random.Random(seed)
    seeds = [*(Boot(kind).log() for kind in KINDS), real("direct-0").log, log(machine().values(), 3)]
    kept = [baseline(kind).encode() for kind in KINDS]
    systemd = systemd_log([(11, "phase", "ready", 1.0)] * 3)
    before = Baseline.decode(kept[0])
    for _ in range(cases):
        data = mutated(dice, dice.choice(seeds))
        later = eventlog.parse_systemd_log(mutated(dice, systemd))
        try:
            found = eventlog.parse_event_log(data)
        except Malformed:
            found = None
        if found:
            reached = eventlog.replay(found.events, found.locality)
            believed = verify.verified_events(found, later, reached)
            assert believed.keys() == reached.keys()
            if dice.random() < 0.25:
                verify.repair_log(found, later, dict.fromkeys(range(24), bytes(32)))
            now = tuple(describe.describe_event(event) for event in (*found.events, *later) if event.digest)
            assert all(item.text == printable(item.text, TEXT_MAX) for item in now)
            compare.compare_boots(before.items, now, range(eventlog.PCRS))
            again = before._replace(items=now, pcrs=reached)
            assert Baseline.decode(again.encode()) == again
        try:
            Baseline.decode(mutated(dice, dice.choice(kept)))
        except Malformed:
            pass
    return True


def mutated(dice: random.Random, data: bytes) -> bytes:
    """Some bytes changed, cut, doubled, moved; a length field often, as those do the most harm."""
    work = bytearray(data)
    for _ in range(dice.choice((1, 1, 2, 4, 16))):
        at = dice.randrange(len(work) + 1)
        match dice.randrange(7):
            case 0 if work:
                work[at % len(work)] ^= 1 << dice.randrange(8)
            case 1:
                work[at : at + 4] = struct.pack("<I", dice.choice((0, 1, 0x7FFFFFFF, 0xFFFFFFFF, dice.getrandbits(32))))
            case 2:
                del work[at:]
            case 3:
                del work[at : at + dice.randrange(64)]
            case 4:
                work[at:at] = work[at : at + dice.randrange(256)] * dice.choice((1, 2, 8))
            case 5:
                work[at:at] = dice.randbytes(dice.randrange(32))
            case 6:
                work[at : at + 8] = struct.pack("<Q", dice.choice((0, 1 << 63, (1 << 64) - 1, len(work))))
    return bytes(work)


CHILD = """
import resource, sys
sys.path[:0] = {path!r}
from tests.test_eventlog import *
used = int(open("/proc/self/statm").read().split()[0]) * resource.getpagesize()
resource.setrlimit(resource.RLIMIT_AS, (used + (64 << 20), used + (64 << 20)))
resource.setrlimit(resource.RLIMIT_CPU, ({cpu}, {cpu}))
{call}
"""


def bounded(call: str, cpu: int) -> None:
    """In a child with 64 MiB on top of what its imports take, and `cpu` seconds."""
    code = CHILD.format(path=[str(Path(__file__).parents[1])], call=call, cpu=cpu)
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]


@pytest.mark.turns
@pytest.mark.usefixtures("unmeasured")
def test_5000_mutated_logs_neither_crash_nor_hang() -> None:
    bounded("fuzz(seed=20, cases=5000)", cpu=240)


def worst() -> None:
    """The largest logs that are accepted, of the kinds that cost the most."""
    room = eventlog.MAX_LOG - len(header())
    tiny = event2(plain(8, 0x0D, b""))
    certificates = [certificate("x" * 20)] * 20_000

    def bodies() -> Iterator[bytes]:
        yield tiny * (room // len(tiny))
        yield b"".join(event2(grub("grub_cmd", f"set x={at}")) for at in range(eventlog.MAX_EVENTS))
        yield event2(variable(7, "dbx", signature_list(SHA256, [bytes(32)] * 90_000)))
        yield event2(variable(7, "db", signature_list(X509, certificates)))
        yield event2(Entry(8, 0x0D, b"", b"\n" * (room - 200)))
        yield event2(partition_table(["x" * 36] * 1024)) * (room // (128 * 1024 + 200))
        yield event2(Entry(9, 0x0D, b"", b"x" * (room - 200)))
        yield event2(Entry(9, 0x0D, b"", b"x\0" * (room // 2 - 200)))

    for body in bodies():
        found = eventlog.parse_event_log((header() + body)[: eventlog.MAX_LOG])
        now = tuple(map(describe.describe_event, found.events))
        compare.compare_boots(now[::2], now[1::2], [7, 8, 9])
        compare.compare_boots(now, now[::-1], [7, 8, 9])
        verify.verified_events(found, (), eventlog.replay(found.events))
        verify.repair_log(found, (), dict.fromkeys(range(24), b"x" * 32))


def test_the_largest_logs_take_bounded_memory_and_time() -> None:
    bounded("worst()", cpu=60)


def test_the_bound_is_one() -> None:
    with pytest.raises(AssertionError):
        bounded("mutated(random.Random(0), bytes(80 << 20))", cpu=60)
    assert resource.getrlimit(resource.RLIMIT_AS)[0] == resource.RLIM_INFINITY


PROPERTIES = (Property("event logs", 0, lambda _: None, lambda _, dice: fuzz(dice.randrange(1 << 32), 50)),)
"""For `make soak`: each case is fifty, so a round is 50,000 at least; `make test` runs its own above."""
