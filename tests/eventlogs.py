# SPDX-License-Identifier: Apache-2.0
"""Builds event logs as the firmware, shim, GRUB, systemd-stub and the kernel's EFI stub write them.

By the TCG "PC Client Platform Firmware Profile" and the UEFI specification, not by the code under test.
"""

import json
import re
import struct
from collections.abc import Iterable
from hashlib import sha1, sha256
from pathlib import Path
from typing import NamedTuple

GLOBAL = bytes.fromhex("61dfe48bca93d211aa0d00e098032b8c")
IMAGE_SECURITY = bytes.fromhex("cbb219d73a3d9645a3bcdad00e67656f")
SHIM_LOCK = bytes.fromhex("50ab5d6046e00043abb63dd810dd8b23")
X509 = bytes.fromhex("a159c0a5e494a74a87b5ab155c2bf072")
SHA256 = bytes.fromhex("2616c4c14c509240aca941f936934328")
OWNER = bytes(range(16))


class Entry(NamedTuple):
    pcr: int
    kind: int
    measured: bytes
    """What was hashed."""
    data: bytes
    digest: bytes | None = None
    """Instead of the hash of `measured`."""

    @property
    def sha256(self) -> bytes:
        return self.digest or sha256(self.measured).digest()


def header(banks: Iterable[tuple[int, int]] = ((4, 20), (11, 32)), vendor: bytes = b"") -> bytes:
    banks = list(banks)
    spec = b"Spec ID Event03\0" + struct.pack("<IBBBBI", 0, 0, 2, 0, 2, len(banks))
    spec += b"".join(struct.pack("<HH", *bank) for bank in banks) + bytes([len(vendor)]) + vendor
    return struct.pack("<II20sI", 0, 3, bytes(20), len(spec)) + spec


def event2(entry: Entry, banks: Iterable[int] = (4, 11)) -> bytes:
    digests = {4: sha1(entry.measured).digest(), 11: entry.sha256, 12: bytes(48), 0x12: bytes(32)}
    listed = list(banks)
    body = struct.pack("<III", entry.pcr, entry.kind, len(listed))
    body += b"".join(struct.pack("<H", bank) + digests[bank] for bank in listed)
    return body + struct.pack("<I", len(entry.data)) + entry.data


def no_action(data: bytes, pcr: int = 0) -> bytes:
    return (
        struct.pack("<III", pcr, 3, 2)
        + struct.pack("<H20sH32s", 4, bytes(20), 11, bytes(32))
        + struct.pack("<I", len(data))
        + data
    )


def log(entries: Iterable[Entry], locality: int | None = None) -> bytes:
    start = b"" if locality is None else no_action(b"StartupLocality\0" + bytes([locality]))
    return header() + start + b"".join(map(event2, entries))


def values(entries: Iterable[Entry], locality: int = 0) -> dict[int, bytes]:
    """What a TPM has after them."""
    pcrs = {pcr: bytes(32) if not 17 <= pcr <= 22 else b"\xff" * 32 for pcr in range(24)}
    pcrs[0] = bytes(31) + bytes([locality])
    for entry in entries:
        pcrs[entry.pcr] = sha256(pcrs[entry.pcr] + entry.sha256).digest()
    return pcrs


# Events -----------------------------------------------------------------------------------------------------


def plain(pcr: int, kind: int, data: bytes) -> Entry:
    return Entry(pcr, kind, data, data)


def variable(pcr: int, name: str, data: bytes, kind: int = 0x80000001, vendor: bytes = GLOBAL) -> Entry:
    text = name.encode("utf-16-le")
    return plain(pcr, kind, vendor + struct.pack("<QQ", len(name), len(data)) + text + data)


def signature_list(kind: bytes, entries: Iterable[bytes]) -> bytes:
    entries = list(entries)
    size = 16 + len(entries[0])
    return kind + struct.pack("<III", 28 + size * len(entries), 0, size) + b"".join(OWNER + each for each in entries)


def der(tag: int, content: bytes) -> bytes:
    size = len(content)
    length = bytes([size]) if size < 128 else bytes([0x82]) + size.to_bytes(2, "big")
    return bytes([tag]) + length + content


def certificate(subject: str, issuer: str = "Some CA") -> bytes:
    """As much of an X.509 certificate as has names."""

    def name(text: str) -> bytes:
        return der(0x30, der(0x31, der(0x30, bytes.fromhex("0603550403") + der(0x0C, text.encode()))))

    algorithm = der(0x30, bytes.fromhex("06092a864886f70d01010b0500"))
    body = der(0xA0, der(2, b"\2")) + der(2, b"\1") + algorithm + name(issuer) + der(0x30, b"") + name(subject)
    return der(0x30, der(0x30, body) + algorithm + der(3, bytes(17)))


def file_path(path: str) -> bytes:
    text = path.encode("utf-16-le") + b"\0\0"
    disk = struct.pack("<BBH", 2, 1, 12) + bytes(8)
    return disk + struct.pack("<BBH", 4, 4, 4 + len(text)) + text + struct.pack("<BBH", 0x7F, 0xFF, 4)


def program(path: str, content: str, device: bytes | None = None) -> Entry:
    """An EFI program that was loaded: its hash is Authenticode's, of a file that these tests do not have."""
    device = device if device is not None else file_path(path) if path else b""
    return Entry(4, 0x80000003, content.encode(), struct.pack("<QQQQ", 0x1000, 4096, 0, len(device)) + device)


def grub(prefix: str, text: str) -> Entry:
    return Entry(8, 0x0D, text.encode(), f"{prefix}: {text}".encode() + b"\0")


def grub_file(path: str, content: str) -> Entry:
    return Entry(9, 0x0D, content.encode(), path.encode() + b"\0")


def tagged(pcr: int, tag: int, name: str, content: bytes) -> Entry:
    text = name.encode() + b"\0"
    return Entry(pcr, 0x06, content, struct.pack("<II", tag, len(text)) + text)


def shim(pcr: int, name: str, content: bytes) -> Entry:
    return Entry(pcr, 0x0D, content, name.encode() + b"\0")


def authority(name: str, data: bytes, vendor: bytes = IMAGE_SECURITY) -> Entry:
    return variable(7, name, data, 0x800000E0, vendor)


def described(pcr: int, kind: int, name: str, content: bytes) -> Entry:
    """UEFI_PLATFORM_FIRMWARE_BLOB2, UEFI_HANDOFF_TABLE_POINTERS2: they begin with a description."""
    return Entry(pcr, kind, content, bytes([len(name)]) + name.encode() + struct.pack("<QQ", 0xFF000000, len(content)))


def partition_table(names: Iterable[str], kind: int = 0x80000006) -> Entry:
    """UEFI_GPT_DATA: the header, how many entries are used, and those."""
    head = struct.pack("<8sIIIIQQQQ16sQIII", b"EFI PART", 0x10000, 92, 0, 0, 1, 9, 34, 99, OWNER, 2, 128, 128, 0)
    entries = [bytes(56) + name.encode("utf-16-le").ljust(72, b"\0") for name in names]
    return plain(5, kind, head + struct.pack("<Q", len(entries)) + b"".join(entries))


def option_rom(slot: int, content: str, kind: int = 0x80000004) -> Entry:
    """Of a PCI device behind a bridge: ACPI(PNP0A03), Pci(1c,0), Pci(SLOT,0), Offset(...)."""
    path = bytes.fromhex("02010c00d041030a0000000001010600001c") + struct.pack("<BBHBB", 1, 1, 6, 0, slot)
    path += struct.pack("<BBHIQQ", 4, 8, 24, 0, 0x15C00, 0x3FF) + struct.pack("<BBH", 0x7F, 0xFF, 4)
    return Entry(2, kind, content.encode(), struct.pack("<QQQQ", 0xBEEED018, 205768, 0, len(path)) + path)


def one_as_another(entries: Iterable[Entry], at: int) -> list[Entry]:
    """The same boot, one of its events measured otherwise."""
    changed = list(entries)
    changed[at] = changed[at]._replace(measured=changed[at].measured + b"!")
    return changed


# Boots ------------------------------------------------------------------------------------------------------


class Boot(NamedTuple):
    """What a host boots with. Each field that changes is a story."""

    kind: str = "grub"
    """grub, uki or direct."""
    firmware: str = "1.0"
    setup: str = "defaults"
    secure_boot: bool = True
    dbx: int = 200
    boot_order: tuple[int, ...] = (1, 2)
    shim: str = "shim 15.8"
    loader: str = "grub 2.12"
    signer: str = "Microsoft Corporation UEFI CA 2011"
    mok: tuple[str, ...] = ("Debian Secure Boot CA",)
    menu: str = "set timeout=5"
    version: str = "6.12.1"
    kernel: str = "kernel"
    initrd: str = "initrd"
    cmdline: str = "root=/dev/mapper/root ro quiet"
    osrel: str = "Debian 13"

    def entries(self) -> list[Entry]:
        return [*self._firmware(), *getattr(self, f"_{self.kind}")(), *_LEAVE]

    def log(self) -> bytes:
        return log(self.entries())

    def full_cmdline(self) -> str:
        """/proc/cmdline."""
        return f"BOOT_IMAGE=/vmlinuz-{self.version} {self.cmdline}" if self.kind == "grub" else self.cmdline

    def _firmware(self) -> list[Entry]:
        order = b"".join(struct.pack("<H", each) for each in self.boot_order)
        option = struct.pack("<IH", 1, 4) + "debian".encode("utf-16-le") + b"\0\0"
        revoked = [struct.pack(">32s", str(each).encode()) for each in range(self.dbx)]
        return [
            plain(0, 0x08, self.firmware.encode("utf-16-le") + b"\0\0"),
            Entry(0, 0x80000008, self.firmware.encode(), struct.pack("<QQ", 0xFF000000, 0x100000)),
            variable(1, "Setup", self.setup.encode(), vendor=OWNER),
            variable(7, "SecureBoot", bytes([self.secure_boot])),
            variable(7, "PK", signature_list(X509, [certificate("Vendor PK")])),
            variable(7, "KEK", signature_list(X509, [certificate("Microsoft Corporation KEK CA 2011")])),
            variable(7, "db", signature_list(X509, [certificate(self.signer)]), vendor=IMAGE_SECURITY),
            variable(7, "dbx", signature_list(SHA256, revoked), vendor=IMAGE_SECURITY),
            plain(7, 0x04, bytes(4)),
            variable(1, "BootOrder", order, 0x80000002),
            variable(1, "Boot0001", option, 0x80000002),
            plain(4, 0x80000007, b"Calling EFI Application from Boot Option"),
            *(plain(pcr, 0x04, bytes(4)) for pcr in (0, 1, 2, 3, 4, 5, 6)),
        ]

    def _grub(self) -> list[Entry]:
        kernel, initrd = f"/vmlinuz-{self.version}", f"/initrd.img-{self.version}"
        line = f"{kernel} {self.cmdline}"
        menu = f"{self.menu}\nmenuentry Debian {{ linux {line} }}"
        accepted = [authority("db", OWNER + certificate(self.signer))] if self.secure_boot else []
        keys = b"".join(signature_list(X509, [certificate(each)]) for each in self.mok)
        return [
            *accepted,
            program("\\EFI\\debian\\shimx64.efi", self.shim),
            authority("SbatLevel", b"sbat,1,2024010900\n", SHIM_LOCK),
            shim(14, "MokList", keys),
            shim(14, "MokListX", b"x"),
            authority("MokList", OWNER + certificate(self.mok[0]), SHIM_LOCK),
            program("\\EFI\\debian\\grubx64.efi", self.loader),
            grub_file("(hd0,gpt1)/EFI/debian/grub.cfg", "search; configfile"),
            grub("grub_cmd", "search --fs-uuid --set=root 1234"),
            grub_file("(hd0,gpt2)/grub/x86_64-efi/linux.mod", "linux.mod"),
            grub_file("(hd0,gpt2)/grub/grub.cfg", menu),
            *(grub("grub_cmd", each) for each in self.menu.splitlines()),
            grub("grub_cmd", f"menuentry Debian {{\n\tlinux {line}\n\tinitrd {initrd}\n}}"),
            grub("grub_cmd", f"linux {line}"),
            grub_file(f"(hd0,gpt2){kernel}", f"{self.kernel} {self.version}"),
            program("", f"authenticode of {self.kernel} {self.version}"),
            grub("kernel_cmdline", line),
            grub("grub_cmd", f"initrd {initrd}"),
            grub_file(f"(hd0,gpt2){initrd}", f"{self.initrd} {self.version}"),
            self._stub("BOOT_IMAGE=" + line),
            tagged(9, 0x8F3B22EC, "Linux initrd", f"{self.initrd} {self.version}".encode()),
        ]

    def _direct(self) -> list[Entry]:
        return [
            program("\\vmlinuz.efi", f"{self.kernel} {self.version}"),
            self._stub(self.cmdline),
            tagged(9, 0x8F3B22EC, "Linux initrd", f"{self.initrd} {self.version}".encode()),
        ]

    def _uki(self) -> list[Entry]:
        contents = {
            ".linux": f"{self.kernel} {self.version}",
            ".osrel": self.osrel,
            ".cmdline": self.cmdline,
            ".initrd": self.initrd,
            ".uname": self.version,
        }
        sections = []
        for name, content in contents.items():
            text = name.encode() + b"\0"
            sections += [Entry(11, 0x0D, text, text), Entry(11, 0x0D, content.encode(), text)]
        whole = f"{self.loader} {contents}"
        return [
            program("\\EFI\\Linux\\debian.efi", whole),
            *sections,
            program("", contents[".linux"], device=b""),
        ]

    def _stub(self, line: str) -> Entry:
        return tagged(9, 0x8F3B22ED, "LOADED_IMAGE::LoadOptions", line.encode("utf-16-le") + b"\0\0")


_LEAVE = [
    plain(5, 0x80000007, b"Exit Boot Services Invocation"),
    plain(5, 0x80000007, b"Exit Boot Services Returned with Success"),
]


def machine() -> dict[str, Entry]:
    """A boot of a machine that one can buy, by what each event is about: Boot Guard, option ROMs, devices that measure
    themselves, kinds of a vendor's own, names that no firmware of a VM logs; then shim and the GRUB of RHEL 8."""
    guard = "Boot Guard Measured S-CRTM\0"
    line = "(hd0,gpt2)/vmlinuz-4.18.0 root=/dev/mapper/root ro quiet"
    accepted = OWNER + certificate("Microsoft Corporation UEFI CA 2011")
    return {
        "hcrtm": Entry(0, 0x80000010, b"hcrtm", b"HCRTM"),
        "crtm": Entry(0, 0x07, b"the ACM's registers", guard.encode()),
        "version": plain(0, 0x08, "N32ET75W \0".encode("utf-16-le")),
        "blob": Entry(0, 0x80000008, b"volume", struct.pack("<QQ", 0xFF970000, 0x3C0000)),
        "volume": described(0, 0x8000000A, "Fv(8C8CE578)", b"another volume"),
        "acpi": Entry(0, 0x01, b"tables", b"ACPI DATA"),
        "post": Entry(0, 0x13, b"code", b"\x09POST CODE" + bytes(16)),
        "microcode": Entry(1, 0x09, b"microcode", b"CPU Microcode"),
        "straps": Entry(1, 0x0A, b"straps", b"CPUSTRAP"),
        "devices": Entry(1, 0x0B, b"devices", b"SPD"),
        "tables": Entry(1, 0x80000009, b"old tables", struct.pack("<Q", 1) + bytes(24)),
        "smbios": described(1, 0x8000000B, "SmbiosTable", b"smbios"),
        "setup": variable(1, "Setup", b"", vendor=OWNER),
        "authority": Entry(7, 0x80000001, b"who signed the ACM", guard.encode("utf-16-le")),
        "secure boot": variable(7, "SecureBoot", b"\1"),
        "platform key": variable(7, "PK", signature_list(X509, [certificate("SUPERMICRO PK CA 2018")])),
        "exchange key": variable(7, "KEK", b"no signature list"),
        "keys": variable(7, "db", signature_list(X509, [certificate("A CA")]), vendor=IMAGE_SECURITY),
        "revoked": variable(7, "dbx", b"", vendor=IMAGE_SECURITY),
        "dma": plain(7, 0x80000007, b"DMA Protection Disabled\0"),
        "end of 7": plain(7, 0x04, bytes(4)),
        "network card": option_rom(3, "rom"),
        "disk controller": option_rom(4, "rom", 0x80000005),
        "device": Entry(2, 0x800000E1, b"measurement", b"SPDM Device Sec2" + bytes(64)),
        "device settings": Entry(3, 0x800000E2, b"measurement", b"SPDM Device Sec2" + bytes(64)),
        "vendor": plain(6, 0x0C, b"Dell Configuration Information 1"),
        "own kind": Entry(1, 0x90000001, b"what?", b"\xff\xfe\x00" * 30_000),
        "boot order": variable(1, "BootOrder", b"\1\0\0\0", 0x80000002),
        "boot entry": variable(1, "Boot0001", struct.pack("<IH", 1, 0) + "rhel\0".encode("utf-16-le"), 0x8000000C),
        "omitted": plain(4, 0x12, b"BOOT ATTEMPTS OMITTED"),
        "attempt": plain(4, 0x80000007, b"Calling EFI Application from Boot Option"),
        **{f"end of {pcr}": plain(pcr, 0x04, b"\xff\xff\xff\xff") for pcr in range(7)},
        "partitions": partition_table(["EFI System Partition", "", *("data" for _ in range(126))]),
        "signer": authority("db", accepted),
        "shim": program("\\EFI\\redhat\\shimx64.efi", "shim"),
        "moks": shim(14, "MokList", b"keys"),
        "trusted": shim(14, "MokListTrusted", b"\1"),
        "sbat": authority("SbatLevel", b"sbat,1,2024010900\nshim,4\n", SHIM_LOCK),
        "vendor key": authority("Shim", certificate("Red Hat Secure Boot CA 5"), SHIM_LOCK),
        "grub": program("\\EFI\\redhat\\grubx64.efi", "grub"),
        "command": Entry(8, 0x0D, b"set default=0", b"grub_cmd set default=0\0"),
        "load": Entry(8, 0x0D, f"linux {line}".encode(), f"grub_cmd linux {line}\0".encode()),
        "kernel": Entry(9, 0x0D, b"kernel", b"grub_linuxefi Kernel\0"),
        "handed on": Entry(4, 0x80000003, b"authenticode", bytes(32) + bytes.fromhex("0090150000a01500af")),
        "line": Entry(8, 0x0D, line.encode(), f"grub_kernel_cmdline {line}\0".encode()),
        "initrd": Entry(9, 0x0D, b"initrd", b"grub_linuxefi Initrd\0"),
        "options": tagged(9, 0x8F3B22ED, "LOADED_IMAGE::LoadOptions", b"options"),
        "leave": plain(5, 0x80000007, b"Exit Boot Services Invocation"),
        "left": plain(5, 0x80000007, b"Exit Boot Services Returned with Failure"),
    }


def systemd_log(events: Iterable[tuple[int, str, str, float]]) -> bytes:
    """/run/log/systemd/tpm2-measure.log: (PCR, kind, text, seconds)."""
    records = []
    for pcr, kind, text, seconds in events:
        content = {"string": text, "bootId": "0" * 32, "timestamp": int(seconds * 1e6), "eventType": kind}
        digests = [{"hashAlg": "sha256", "digest": sha256(text.encode()).hexdigest()}]
        records.append({"pcr": pcr, "digests": digests, "content_type": "systemd", "content": content})
    return b"".join(b"\x1e" + json.dumps(each).encode() + b"\n" for each in records)


# Logs of real boots -----------------------------------------------------------------------------------------

DATA = Path(__file__).parent / "data/eventlogs"
LOGGED = (*range(10), 11, 12, 13, 14)
"""PCRs that nothing but the firmware, the boot loader and the kernel's EFI stub extends: not IMA's, not the cap's."""


class Real(NamedTuple):
    log: bytes
    """binary_bios_measurements."""
    pcrs: dict[int, bytes]
    """What the TPM had when it was read."""
    cmdline: str
    """/proc/cmdline."""


class Unmeasured(Boot):
    """The kernel's command line names the initramfs, which Linux does not measure."""

    def entries(self) -> list[Entry]:
        return [each for each in super().entries() if b"Linux initrd" not in each.data]


def real(name: str) -> Real:
    """Of a boot in a VM.

    direct-0, direct-1: OVMF starts Debian 13's kernel; the second boot has another word on its command line.

    grub-0, -1, -2: shim and GRUB 2.12 of Debian 13, without Secure Boot; before and after another kernel, other
    initramfs files and another command line, and then the older kernel, from the submenu. NAME.cfg is its grub.cfg
    (grub-2 has that of grub-1), grub-first.cfg the one on the EFI partition, grub-files.json the files' hashes.
    grub-3: as grub-0, with GRUB's environment file (grub-3.env).
    secure-0: shim and GRUB under Secure Boot, by Microsoft's keys.
    uki-0, -1: systemd-boot and a unified kernel image of systemd-stub 257, Secure Boot; the second has another kernel,
    initramfs and command line in it. uki-files.json has what is measured of each.
    """
    pcrs = re.findall(r"^(\d+) (\w{64})$", (DATA / f"{name}.pcrs").read_text(), re.MULTILINE)
    cmdline = (DATA / f"{name}.cmdline").read_text().rstrip("\n")
    return Real((DATA / f"{name}.bin").read_bytes(), {int(a): bytes.fromhex(b) for a, b in pcrs}, cmdline)
