# SPDX-License-Identifier: Apache-2.0
"""A host boots well, then something changes, and the TPM refuses: `explain` names it. On a software TPM."""

import json
import shutil
from collections.abc import Iterable, Iterator
from hashlib import sha256
from pathlib import Path
from typing import Any

import pytest

from tests.eventlogs import (
    IMAGE_SECURITY,
    LOGGED,
    SHA256,
    SHIM_LOCK,
    Boot,
    Entry,
    Real,
    authority,
    grub,
    grub_file,
    header,
    log,
    machine,
    one_as_another,
    plain,
    real,
    shim,
    signature_list,
    systemd_log,
    values,
    variable,
)
from tests.hostfixture import MEASURED_BY, Measures
from tests.tpmfixture import Swtpm
from unlock import cli
from unlock.errors import Malformed, Refused, UnlockError
from unlock.host import report, this_boot
from unlock.measured import at_unseal, causes, describe, diagnosis, eventlog, evidence, explain, verify
from unlock.measured.baseline import Baseline, TpmIdentity
from unlock.measured.diagnosis import Explanation
from unlock.measured.evidence import Evidence
from unlock.operations import baseline
from unlock.paths import Paths
from unlock.secret import Secret
from unlock.tpm import pcr_policy, slots
from unlock.tpm.record import SRK, Payload, Record

HOST = b"h" * 16


class Host(Measures):
    """A TPM and what of a running system `explain` reads."""

    def __init__(self, home: Path) -> None:
        self.home = home
        self.paths = Paths(str(home / "root"))
        self.chip = Swtpm(home / "tpm")
        self.chip.start()

    def boot(self, boot: Boot, *, before: dict[int, bytes] | None = None, log: bool = True, noted: bool = True) -> str:
        """Power on, firmware, boot loader, kernel, early boot. The verdict."""
        self.chip.power_cycle()
        shutil.rmtree(self.home / "root/run", ignore_errors=True)
        self.files(boot, log)
        self.extend([(entry.pcr, entry.sha256) for entry in boot.entries()])
        self.extend(list((before or {}).items()))
        return self.early(noted)

    def kexec(self) -> str:
        """Another kernel, the same TPM session."""
        shutil.rmtree(self.home / "root/run")
        self.write("proc/sys/kernel/bootloader_type", b"208\n")
        return self.early()

    def early(self, noted: bool = True) -> str:
        """As unlock.boot.agent does it; without `noted` as that of an image from before it noted the PCRs."""
        record = report.Report("early-boot")
        with self.chip.open() as tpm:
            before = tpm.read_pcrs([pcr_policy.CAP_PCR])[pcr_policy.CAP_PCR].hex()
            try:
                slots.unseal(tpm).payload.key.wipe()
                record.set_verdict("unsealed")
            except UnlockError as error:
                record.facts = report.BootFacts(cap_pcr_before=before)
                record.set_verdict(error.code, str(error))
            tpm.extend(pcr_policy.CAP_PCR, pcr_policy.CAP_DIGEST)
            (self.home / "root/run/unlock").mkdir(parents=True)
            if noted:
                this_boot.note_pcrs(self.paths, tpm.read_pcrs(pcr_policy.NOTED))
        this_boot.write_report(self.paths, record, "report.json")
        return record.verdict

    def enroll(self, boot: Boot, pcrs: tuple[int, ...] = ()) -> None:
        self.boot(boot)
        selection = pcr_policy.select(pcrs or MEASURED_BY[boot.kind])
        with self.chip.open() as tpm, Secret.random(32) as key:
            branch = pcr_policy.branch(selection, tpm.read_pcrs(selection))
            slots.seal_slot(tpm, HOST, selection, (branch,), Payload(key))

    def keep(self) -> Baseline | None:
        return baseline.record_baseline(self.paths, self.chip.tcti)

    def explain(self) -> Explanation:
        found = diagnosis.diagnose(evidence.gather_evidence(self.paths, self.chip.tcti))
        assert json.loads(json.dumps(explain.to_json(found)))["summary"] == found.summary
        assert all(line.isprintable() for line in explain.to_text(found).splitlines())
        return found


@pytest.fixture
def host(tmp_path: Path) -> Iterator[Host]:
    host = Host(tmp_path)
    yield host
    host.chip.kill()
    host.chip.proxy.close()


def good(host: Host, boot: Boot) -> None:
    host.enroll(boot)
    assert host.boot(boot) == "unsealed"
    assert host.keep()
    assert host.explain().causes == ()


STORIES: list[tuple[str, dict[str, Any], str, int, tuple[str, str]]] = [
    # how it boots, what changed, the first cause, its PCR, what the person sees of old and new
    ("direct", {"kernel": "another"}, "kernel", 4, ("", "")),
    ("direct", {"initrd": "another"}, "initrd", 9, ("", "")),
    ("direct", {"cmdline": "root=/dev/mapper/root ro init=/bin/sh"}, "command-line", 9, ("quiet", "init=/bin/sh")),
    ("grub", {"kernel": "another"}, "kernel", 9, ("vmlinuz-6.12.1", "vmlinuz-6.12.1")),
    ("grub", {"initrd": "another"}, "initrd", 9, ("initrd.img-6.12.1", "")),
    ("grub", {"menu": "set timeout=5\nset debug=all"}, "boot-loader-config", 9, ("grub.cfg", "grub.cfg")),
    ("grub", {"loader": "grub 2.12-2"}, "boot-loader", 4, ("grubx64.efi", "grubx64.efi")),
    ("grub", {"shim": "shim 16"}, "boot-loader", 4, ("shimx64.efi", "shimx64.efi")),
    ("grub", {"secure_boot": False}, "secure-boot", 7, ("Secure Boot on", "Secure Boot off")),
    ("grub", {"dbx": 230}, "dbx", 7, ("200 entries", "230 entries")),
    ("grub", {"mok": ("Debian Secure Boot CA", "DKMS key")}, "mok", 14, ("MokList", "MokList")),
    ("grub", {"signer": "Microsoft UEFI CA 2023"}, "secure-boot-keys", 7, ("CA 2011", "CA 2023")),
    ("uki", {"kernel": "another"}, "uki", 4, ("debian.efi", "debian.efi")),
    ("uki", {"cmdline": "quiet init=/bin/sh"}, "uki", 4, ("debian.efi", "debian.efi")),
    ("uki", {"secure_boot": False}, "secure-boot", 7, ("on", "off")),
]


@pytest.mark.parametrize("kind,change,code,pcr,words", STORIES, ids=[f"{s[0]}-{next(iter(s[1]))}" for s in STORIES])
def test_the_first_event_that_changed_is_named(
    host: Host, kind: str, change: dict[str, Any], code: str, pcr: int, words: tuple[str, str]
) -> None:
    boot = Boot(kind)
    good(host, boot)
    assert host.boot(boot._replace(**change)) == "pcr-mismatch"
    found = host.explain()
    first = found.causes[0]
    assert (first.code, first.pcr) == (code, pcr), explain.to_text(found)
    assert words[0] in first.old and words[1] in first.new
    assert first.usually and first.do
    assert found.pcrs[pcr] == "changed"
    assert found.notes == ()
    assert host.boot(boot) == "unsealed"


def test_a_kernel_update_under_grub_shows_all_that_came_with_it(host: Host) -> None:
    boot = Boot("grub")
    good(host, boot)
    host.boot(boot._replace(version="6.12.2"))
    found = host.explain()
    codes = [cause.code for cause in found.causes]
    assert codes[0] == "boot-loader-config" and {"kernel", "initrd"} <= set(codes)
    assert found.causes[0].usually.startswith("a kernel update")
    assert "the kernel" in found.summary
    assert any("6.12.1" in cause.old and "6.12.2" in cause.new for cause in found.causes)
    assert "command-line" not in codes
    told = explain.to_text(found)
    assert told.count("\n   usually ") == len({(each.code, each.pcr) for each in found.causes}) < len(codes)
    assert "more such event" in told and "image that a boot loader handed on: the kernel (SHA-256 " in told
    assert found.pcrs == {4: "changed", 7: "same", 8: "changed", 9: "changed", 14: "same"}


MENU = (
    "menuentry Debian --id gnulinux-simple { linux /vmlinuz-6.12.1 root=x; initrd /initrd.img-6.12.1 }",
    "submenu Advanced { menuentry Debian, with Linux 6.12.1 { linux /vmlinuz-6.12.1 root=x } }",
    "echo Loading Linux 6.12.1 ...",
    "initrd /initrd.img-6.12.1",
)
ELSEWHERE = "GRUB looks on another file system"
KERNEL_UPDATE = "a kernel update"


def usual(old: Iterable[Entry], new: Iterable[Entry]) -> dict[str, str]:
    """What `explain` calls each difference, by its new text."""
    before, now = [*old, grub_file("(hd0)/vmlinuz-6.12.1", "1")], [*new, grub_file("(hd0)/vmlinuz-6.12.2", "2")]
    found = diagnosis.diagnose(refused(log(now), values(now), good_machine(before)))
    assert "kernel" in [each.code for each in found.causes]
    return {each.new or each.old: each.usually for each in found.causes if each.code == "boot-loader-config"}


def test_the_menu_lines_of_a_new_kernel_are_a_kernel_update() -> None:
    config = [grub_file(path, "1") for path in ("(hd0)/EFI/debian/grub.cfg", "(hd1)/grub/grub.cfg")]
    old = [*config, *(grub("grub_cmd", each) for each in MENU)]
    new = [grub("grub_cmd", each.replace("6.12.1", "6.12.2")) for each in MENU]
    found = usual(old, [config[0], grub_file("(hd1)/grub/grub.cfg", "2"), *new])
    assert len(found) == 5 and all(each.startswith(KERNEL_UPDATE) for each in found.values())
    longer = new[1]._replace(
        data=new[1].data[:-2] + b" menuentry Debian, with Linux 6.12.1 { linux /vmlinuz-6.12.1 } }\0"
    )
    assert usual([old[3]], [longer]).popitem()[1].startswith(KERNEL_UPDATE)


@pytest.mark.parametrize(
    "old,new",
    [
        ("set prefix=(hd0)/grub", "set prefix=(hd1)/grub"),
        ("set root=hd0", "set root=hd1"),
        ("root=hd0", "root=hd1"),
        ("search.fs_uuid 12-34 root hd0,gpt2", "search.fs_uuid 56-78 root hd0,gpt2"),
        ("search --no-floppy --fs-uuid --set=root 12-34", "search --no-floppy --fs-uuid --set=root 56-78"),
        ("configfile (hd0)/grub/grub.cfg", "configfile (hd1)/grub/grub.cfg"),
    ],
)
def test_another_file_system_is_no_kernel_update(old: str, new: str) -> None:
    """The kernel is another too, and the main grub.cfg; a file of another system may have this system's name."""
    menu = grub("grub_cmd", MENU[0]), grub("grub_cmd", MENU[0].replace("6.12.1", "6.12.2"))
    before, now = (
        [grub_file("(hd1)/grub/grub.cfg", text), grub("grub_cmd", text), line]
        for text, line in zip((old, new), menu, strict=True)
    )
    found = usual(before, now)
    assert found.pop(f"GRUB command {new}").startswith(ELSEWHERE)
    assert found.pop("GRUB command " + MENU[0].replace("6.12.1", "6.12.2")).startswith(KERNEL_UPDATE)
    assert [each == causes.USUAL["boot-loader-config"][0] for each in found.values()] == [True]


def test_other_changes_of_grubs_configuration_are_no_kernel_update() -> None:
    plain = causes.USUAL["boot-loader-config"][0]
    first = "(hd0,gpt1)/EFI/debian/grub.cfg"
    assert [each[: len(ELSEWHERE)] for each in usual([grub_file(first, "1")], [grub_file(first, "2")]).values()] == [
        ELSEWHERE
    ]
    for old, new in (
        ("set superusers=root", "set superusers="),
        (MENU[0], MENU[0].replace("6.12.1", "6.12.2").replace("root=x", "root=x init=/bin/sh")),
        (MENU[0], MENU[0].replace("{", "{ search --set=root 56-78;")),
        ("menuentry other { true }", "menuentry other { false }"),
        ("set default=0", "set default=1>6.12.2"),
    ):
        assert list(usual([grub("grub_cmd", old)], [grub("grub_cmd", new)]).values()) == [plain], new
    assert list(usual([], [grub("grub_cmd", MENU[0].replace("6.12.1", "6.12.2"))]).values()) == [plain]


def told(old: Entry | None, new: Entry | None) -> diagnosis.Cause:
    before, now = ([plain(7, 4, bytes(4)), *([each] if each else [])] for each in (old, new))
    (cause,) = diagnosis.diagnose(refused(log(now), values(now), good_machine(before))).causes
    return cause


def test_what_revokes_less_than_before_is_no_update() -> None:
    def dbx(entries: int) -> Entry:
        return variable(7, "dbx", signature_list(SHA256, [bytes([each]) * 32 for each in range(1, entries + 1)]))

    def sbat(day: int) -> Entry:
        return authority("SbatLevel", f"sbat,1,{day}\nshim,4\n".encode(), SHIM_LOCK)

    for old, new, code in ((dbx(2), dbx(3), "dbx"), (sbat(2022052400), sbat(2024010900), "sbat")):
        for before, now in ((old, new), (None, new)):
            assert "update" in told(before, now).usually and "rollback" not in told(before, now).usually
        for before, gone in ((new, old), (new, None)):
            found = told(before, gone)
            assert found.code == code and "rollback" in found.usually and found.do.startswith("mokutil")
    empty = variable(7, "dbx", b"")
    assert "rollback" in told(dbx(1), empty).usually and "rollback" not in told(empty, dbx(1)).usually


def test_the_deny_list_of_shim_is_not_its_keys() -> None:
    for event in (shim(14, "MokListX", b"x"), authority("MokListX", b"x", SHIM_LOCK)):
        found = told(event, event._replace(measured=b"y"))
        assert found.code == "mok" and "deny list (MokListX) changed" in found.title and "--mokx" in found.do
    assert "--mokx" not in told(shim(14, "MokList", b"x"), shim(14, "MokList", b"y")).do


def test_a_line_edited_in_the_boot_menu_is_not_taken_for_a_changed_configuration(host: Host) -> None:
    good(host, Boot("direct"))
    host.boot(Boot("direct", cmdline="root=/dev/mapper/root ro quiet break=bottom"))
    (cause,) = host.explain().causes
    assert cause.code == "command-line" and cause.new.endswith("break=bottom")


def test_a_section_of_a_unified_kernel_image_is_named(host: Host) -> None:
    good(host, Boot("uki"))
    host.boot(Boot("uki", initrd="another"))
    found = host.explain()
    assert [(each.code, each.pcr) for each in found.causes] == [("uki", 4), ("initrd", 11)]
    assert found.causes[0].title == "PCR 4: the unified kernel image changed"


@pytest.mark.parametrize("pcr", [7, 9, 12])
def test_a_pcr_extended_by_hand(host: Host, pcr: int) -> None:
    boot = Boot("uki" if pcr == 12 else "grub")
    good(host, boot)
    assert host.boot(boot, before={pcr: b"x" * 32}) == "pcr-mismatch"
    found = host.explain()
    assert [(each.code, each.pcr) for each in found.causes] == [("pcr-extended", pcr)]
    assert f"PCR {pcr} was extended by something that is not in the event log" in found.summary


def test_a_pcr_extended_by_hand_is_found_without_a_baseline(host: Host) -> None:
    """As in the recovery shell: the policy record tells that the log alone would have been right."""
    boot = Boot("grub")
    good(host, boot)
    (host.home / "root/var/lib/unlock/baseline.json").unlink()
    host.boot(boot, before={8: b"x" * 32})
    found = host.explain()
    assert [(each.code, each.pcr) for each in found.causes] == [("pcr-extended", 8)]


def test_the_cap_pcr_extended_by_hand(host: Host) -> None:
    good(host, Boot("grub"))
    assert host.boot(Boot("grub"), before={pcr_policy.CAP_PCR: b"x" * 32}) == "pcr-mismatch"
    assert [each.code for each in host.explain().causes] == ["cap-pcr-extended"]


def test_kexec(host: Host) -> None:
    good(host, Boot("grub"))
    host.systemd((15, "machine-id", "machine-id:1234", 20.0), (11, "phase", "ready", 30.0))
    assert host.kexec() == "pcr-mismatch"
    found = host.explain()
    assert [each.code for each in found.causes] == ["kexec"]
    assert found.causes[0].do == "reboot, not kexec"


def test_kexec_where_the_architecture_does_not_tell(host: Host) -> None:
    good(host, Boot("grub"))
    host.kexec()
    host.write("proc/sys/kernel/bootloader_type", b"")
    assert [each.code for each in host.explain().causes] == ["cap-pcr-extended"]


def clear(chip: Swtpm) -> None:
    """TPM2_Clear, with the empty lockout authorization."""
    with chip.open() as tpm:
        tpm._send("Clear", 0x10A, 0xFF, 0xFFF, 0xFFF)


def test_the_tpm_was_cleared(host: Host) -> None:
    good(host, Boot("grub"))
    clear(host.chip)
    assert host.boot(Boot("grub")) == "no-slot"
    assert [each.code for each in host.explain().causes] == ["tpm-cleared"]
    with host.chip.open() as tpm:
        tpm.ensure_srk()  # as systemd makes one at each boot
    assert [each.code for each in host.explain().causes] == ["tpm-cleared"]
    (host.home / "root/var/lib/unlock/baseline.json").unlink()
    clear(host.chip)
    assert [each.code for each in host.explain().causes] == ["tpm-cleared-or-replaced"]


def test_the_tpm_was_replaced(host: Host, tmp_path: Path) -> None:
    good(host, Boot("grub"))
    host.chip.kill()
    host.chip.state = tmp_path / "another"
    host.chip.state.mkdir()
    host.chip.start()
    assert host.boot(Boot("grub")) == "no-slot"
    assert [each.code for each in host.explain().causes] == ["tpm-replaced"]


def test_the_slot_is_gone(host: Host) -> None:
    good(host, Boot("grub"))
    with host.chip.open() as tpm:
        slots.evict_all(tpm)
    assert host.boot(Boot("grub")) == "no-slot"
    assert [each.code for each in host.explain().causes] == ["slot-gone"]


def test_the_storage_root_key_is_gone(host: Host) -> None:
    good(host, Boot("grub"))
    with host.chip.open() as tpm:
        tpm._keep(tpm._find(SRK), SRK, None)
    assert host.boot(Boot("grub")) == "tampered"
    assert [each.code for each in host.explain().causes] == ["srk-changed"]


def typed(host: Host, monkeypatch: pytest.MonkeyPatch) -> int:
    monkeypatch.setattr(this_boot, "tpm_device", lambda: host.chip.tcti)
    parsed = cli._parser().parse_args(["explain"])
    return int(parsed.run(host.paths, parsed))


def test_a_host_that_was_never_initialised_is_told_so_and_not_that_its_tpm_was_cleared(
    host: Host, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert host.boot(Boot("grub")) == "no-slot"
    with pytest.raises(Refused) as caught:
        typed(host, monkeypatch)
    assert (caught.value.code, caught.value.hint) == ("not-initialised", "unlock init")


def test_a_host_whose_state_is_away_is_explained_and_told_so(
    host: Host, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    good(host, Boot("grub"))
    Path(host.paths.baseline).unlink()
    assert host.boot(Boot("grub", kernel="another")) == "pcr-mismatch"
    assert typed(host, monkeypatch) == 0
    out, err = capsys.readouterr()
    assert "cannot be told" in out and "this host was initialised" in err
    host.write("etc/unlock/unlock.toml", b'[group.data]\nmount = "/srv/data"\n')
    clear(host.chip)
    assert host.boot(Boot("grub")) == "no-slot"
    assert typed(host, monkeypatch) == 0
    out, err = capsys.readouterr()
    assert "the TPM was cleared" in out and "unlock.toml names group data" in err


def test_the_tpm_is_locked_out(host: Host) -> None:
    good(host, Boot("grub"))
    with host.chip.open() as tpm:  # as after wrong passwords: none is allowed, one is forgotten in 1000 s
        tpm._send("DictionaryAttackParameters", 0x10A, 0xFF, 0xFFF, 0xFFF, 0, 1000, 1000)
    record = report.Report("early-boot")
    record.set_verdict("tpm-failed", "TPM2_Unseal failed: 0x921")
    this_boot.write_report(host.paths, record, "report.json")
    found = host.explain()
    assert [each.code for each in found.causes] == ["tpm-lockout"]
    assert "every 1000 s" in found.notes[0]


def test_it_leaves_nothing_in_the_tpm(host: Host) -> None:
    good(host, Boot("grub"))
    assert [host.chip.handles(kind) for kind in (0x02000000, 0x03000000, 0x80000000)] == [(), (), ()]


def test_there_is_no_tpm(host: Host) -> None:
    good(host, Boot("grub"))
    record = report.Report("early-boot")
    record.set_verdict("no-tpm")
    this_boot.write_report(host.paths, record, "report.json")
    host.chip.kill()
    host.chip.proxy.close()
    assert [each.code for each in host.explain().causes] == ["no-tpm"]


# What real machines log


ONE_EVENT = {
    # what is measured otherwise: the cause, what the person reads of it
    "hcrtm": ("firmware", "hardware root of trust HCRTM"),
    "crtm": ("firmware", "firmware root of trust Boot Guard Measured S-CRTM"),
    "version": ("firmware", "firmware version N32ET75W"),
    "blob": ("firmware", "firmware volume"),
    "volume": ("firmware", "firmware volume Fv(8C8CE578)"),
    "acpi": ("firmware", "firmware code (POST) ACPI DATA"),
    "post": ("firmware", "firmware code (POST)"),
    "microcode": ("firmware", "CPU microcode"),
    "straps": ("firmware-settings", "platform configuration CPUSTRAP"),
    "devices": ("firmware-settings", "table of devices SPD"),
    "tables": ("firmware-settings", "firmware tables (SMBIOS)"),
    "smbios": ("firmware-settings", "firmware tables SmbiosTable"),
    "setup": ("firmware-settings", "UEFI variable Setup"),
    "authority": ("firmware", "Boot Guard Measured S-CRTM"),
    "secure boot": ("secure-boot", "Secure Boot on"),
    "platform key": ("secure-boot-keys", "PK: 1 entry (SUPERMICRO PK CA 2018)"),
    "exchange key": ("secure-boot-keys", "KEK: 17 bytes"),
    "keys": ("secure-boot-keys", "db: 1 entry (A CA)"),
    "revoked": ("dbx", "dbx: 0 entries"),
    "dma": ("firmware-settings", "the protection against devices that read memory is off (DMA Protection Disabled)"),
    "end of 7": ("boot-path", "separator"),
    "network card": ("option-rom", "driver PCI device PciRoot(0x0)/Pci(0x1c,0x0)/Pci(0x3,0x0)"),
    "disk controller": ("option-rom", "driver PCI device PciRoot(0x0)/Pci(0x1c,0x0)/Pci(0x4,0x0)"),
    "device": ("option-rom", "firmware of a device (SPDM)"),
    "device settings": ("option-rom", "settings of a device (SPDM)"),
    "vendor": ("firmware", "Dell Configuration Information 1"),
    "own kind": ("firmware-settings", "event of type 0x90000001"),
    "boot order": ("boot-order", "BootOrder: 0001 0000"),
    "boot entry": ("boot-order", "Boot0001: rhel"),
    "omitted": ("boot-path", "BOOT ATTEMPTS OMITTED"),
    "attempt": ("boot-path", "Calling EFI Application from Boot Option"),
    "partitions": ("partition-table", "no name, data, data"),
    "signer": ("signer", "db: Microsoft Corporation UEFI CA 2011"),
    "shim": ("boot-loader", "\\EFI\\redhat\\shimx64.efi"),
    "moks": ("mok", "MokList"),
    "trusted": ("mok", "MokListTrusted"),
    "sbat": ("sbat", "SbatLevel: sbat,1,2024010900 shim,4"),
    "vendor key": ("signer", "Shim: Red Hat Secure Boot CA 5"),
    "grub": ("boot-loader", "\\EFI\\redhat\\grubx64.efi"),
    "command": ("boot-loader-config", "GRUB command set default=0"),
    "load": ("command-line", "command line (hd0,gpt2)/vmlinuz-4.18.0 root=/dev/mapper/root"),
    "kernel": ("kernel", "kernel file Kernel"),
    "handed on": ("kernel", "image that a boot loader handed on: the kernel"),
    "line": ("command-line", "command line (hd0,gpt2)/vmlinuz-4.18.0 root=/dev/mapper/root"),
    "initrd": ("initrd", "initramfs file Initrd"),
    "options": ("command-line", "command line, as the kernel got it"),
    "leave": ("boot-path", "Exit Boot Services Invocation"),
    "left": ("boot-path", "Exit Boot Services Returned with Failure"),
    **{f"end of {pcr}": ("boot-path", "separator") for pcr in range(7)},
}


def refused(now: bytes, live: dict[int, bytes], before: Baseline | None) -> Evidence:
    """What `explain` finds after a refusal."""
    found, problem = None, ""
    try:
        found = verify.repair_log(eventlog.parse_event_log(now), (), live)
    except Malformed as error:
        problem = str(error)
    early = report.Report("early-boot")
    early.set_verdict("pcr-mismatch")
    return Evidence(
        early=early,
        record=None,
        live=live,
        tpm_problem="",
        log=found,
        log_problem=problem,
        later=(),
        baseline=before,
        baseline_problem="",
        chip=TpmIdentity("", ""),
        lockout=0,
        kexec=False,
        kernel="6",
        cmdline="",
        copied=False,
    )


def good_machine(entries: list[Entry]) -> Baseline:
    found = eventlog.parse_event_log(log(entries))
    return Baseline("6", "", TpmIdentity("", ""), values(entries), tuple(map(describe.describe_event, found.events)))


def test_every_kind_of_event_of_a_machine_has_a_story() -> None:
    assert ONE_EVENT.keys() == machine().keys()


@pytest.mark.parametrize("name", ONE_EVENT)
def test_one_event_of_a_machine_changes(name: str) -> None:
    entries = list(machine().values())
    at = list(machine()).index(name)
    changed = one_as_another(entries, at)
    found = diagnosis.diagnose(refused(log(changed), values(changed), good_machine(entries)))
    (cause,) = found.causes
    code, words = ONE_EVENT[name]
    assert (cause.code, cause.pcr) == (code, entries[at].pcr)
    assert words in cause.old and words in cause.new and cause.old != cause.new, explain.to_text(found)
    assert cause.title.startswith(f"PCR {cause.pcr}: ") and cause.usually and cause.do
    assert {pcr for pcr, status in found.pcrs.items() if status != "same"} == {cause.pcr}


@pytest.mark.parametrize("name", ONE_EVENT)
def test_one_event_of_a_machine_comes_or_goes(name: str) -> None:
    """Each kind: a device that is there for the first time, a boot that failed before this one."""
    whole = list(machine().values())
    at = list(machine()).index(name)
    less = whole[:at] + whole[at + 1 :]
    for old, new in ((less, whole), (whole, less)):
        found = diagnosis.diagnose(refused(log(new), values(new), good_machine(old)))
        assert found.causes[0].pcr == whole[at].pcr
        assert found.causes[0].code == ONE_EVENT[name][0] and any(
            words in found.causes[0].title for words in ("an event is", "Secure Boot was switched")
        )


# Real boots: what firmware, shim, GRUB, systemd-boot and the kernel logged of them

BETWEEN = [
    # the good boot, the refused one, the first cause, its PCR, what the person sees of old and new, what else differs
    ("direct-0", "direct-1", "command-line", 9, ("initrd=initrd", "audit=0"), set()),
    ("direct-1", "direct-0", "command-line", 9, ("audit=0", "initrd=initrd"), set()),
    # the new grub.cfg is read before any of its commands runs, and before what they load
    ("grub-0", "grub-1", "boot-loader-config", 9, ("grub.cfg", "grub.cfg"), {"kernel", "initrd"}),
    ("grub-1", "grub-0", "boot-loader-config", 9, ("grub.cfg", "grub.cfg"), {"kernel", "initrd"}),
    # the same kernel, by another grub.cfg, and its initramfs built anew
    ("grub-0", "grub-2", "boot-loader-config", 9, ("grub.cfg", "grub.cfg"), {"command-line", "initrd"}),
    ("grub-2", "grub-0", "boot-loader-config", 9, ("grub.cfg", "grub.cfg"), {"command-line", "initrd"}),
    # the same files: another entry was chosen
    ("grub-1", "grub-2", "boot-loader-config", 8, ("Debian", "Advanced options"), {"kernel", "initrd"}),
    ("grub-2", "grub-1", "boot-loader-config", 8, ("Advanced options", "Debian"), {"kernel", "initrd"}),
    # the same grub.cfg, which tests for grubenv; that is read before the command that notes that it is there
    ("grub-0", "grub-3", "grubenv", 9, ("", "grubenv"), {"boot-loader-config"}),
    ("grub-3", "grub-0", "grubenv", 9, ("grubenv", ""), {"boot-loader-config"}),
    ("grub-1", "grub-3", "boot-loader-config", 9, ("grub.cfg", "grub.cfg"), {"grubenv", "kernel", "initrd"}),
    ("grub-3", "grub-1", "boot-loader-config", 9, ("grub.cfg", "grub.cfg"), {"grubenv", "kernel", "initrd"}),
    ("grub-2", "grub-3", "boot-loader-config", 9, ("grub.cfg", "grub.cfg"), {"grubenv", "command-line", "initrd"}),
    ("grub-3", "grub-2", "boot-loader-config", 9, ("grub.cfg", "grub.cfg"), {"grubenv", "command-line", "initrd"}),
    # the image as the firmware starts it, before the stub measures its sections
    ("uki-0", "uki-1", "uki", 4, ("debian.efi", "debian.efi"), {"kernel", "command-line", "initrd"}),
    ("uki-1", "uki-0", "uki", 4, ("debian.efi", "debian.efi"), {"kernel", "command-line", "initrd"}),
]


def good_boot(name: str) -> Baseline:
    made = real(name)
    found = verify.verified_events(eventlog.parse_event_log(made.log), (), made.pcrs)
    kept = {pcr: made.pcrs[pcr] for pcr in found}
    before = refused(made.log, made.pcrs, None)._replace(cmdline=made.cmdline)
    items = before.measured_items(found)
    return Baseline("6", made.cmdline, TpmIdentity("", ""), kept, items)


def refused_boot(now: Real, before: Baseline) -> Evidence:
    """Under a policy that allows the good boot alone, over all that the firmware's log accounts for."""
    branch = pcr_policy.branch(LOGGED, before.pcrs)
    record = Record(1, HOST, pcr_policy.select(LOGGED), pcr_policy.CAP_PCR, (branch,), bytes(34), bytes(34))
    return refused(now.log, now.pcrs, before)._replace(cmdline=now.cmdline, record=record)


def test_each_pair_of_real_boots_of_a_kind_has_a_story() -> None:
    names = [f"{kind}-{number}" for kind, count in (("direct", 2), ("grub", 4), ("uki", 2)) for number in range(count)]
    pairs = {(a, b) for a in names for b in names if a != b and a.partition("-")[0] == b.partition("-")[0]}
    assert {(before, now) for before, now, *_ in BETWEEN} == pairs


@pytest.mark.parametrize("before,now,code,pcr,words,also", BETWEEN, ids=[f"{s[0]}-then-{s[1]}" for s in BETWEEN])
def test_between_two_real_boots_the_first_cause_is_named(
    before: str, now: str, code: str, pcr: int, words: tuple[str, str], also: set[str]
) -> None:
    found = diagnosis.diagnose(refused_boot(real(now), good_boot(before)))
    first = found.causes[0]
    assert (first.code, first.pcr) == (code, pcr), explain.to_text(found)
    assert words[0] in first.old and words[1] in first.new
    assert {each.code for each in found.causes} >= also
    differ = {pcr for pcr in found.pcrs if real(before).pcrs[pcr] != real(now).pcrs[pcr]}
    assert {pcr for pcr, status in found.pcrs.items() if status != "same"} == differ
    assert {each.pcr for each in found.causes} == differ and found.notes == ()


REAL = ("direct-0", "direct-1", "grub-0", "grub-1", "grub-2", "grub-3", "secure-0", "uki-0", "uki-1")


@pytest.mark.parametrize("name", REAL)
def test_a_real_boot_as_it_was_differs_in_nothing(name: str) -> None:
    found = diagnosis.diagnose(refused_boot(real(name), good_boot(name)))
    assert found.causes == () and set(found.pcrs.values()) == {"same"}


@pytest.mark.parametrize("pcr", [0, 4, 7, 8, 9, 11, 14])
@pytest.mark.parametrize("name", REAL)
def test_after_a_real_boot_a_pcr_was_extended_by_hand(name: str, pcr: int) -> None:
    made = real(name)
    live = made.pcrs | {pcr: eventlog.extend(made.pcrs[pcr], b"x" * 32)}
    (cause,) = diagnosis.diagnose(refused_boot(made._replace(pcrs=live), good_boot(name))).causes
    assert (cause.code, cause.pcr) == ("pcr-extended", pcr)


@pytest.mark.parametrize("name", REAL)
def test_after_a_real_boot_kexec(name: str) -> None:
    """The firmware's log and the PCRs stay; the kernel's command line is another."""
    world = refused_boot(real(name), good_boot(name))._replace(kexec=True, cmdline="root=/dev/mapper/root")
    found = diagnosis.diagnose(world)
    assert [each.code for each in found.causes] == ["kexec"] and found.causes[0].do == "reboot, not kexec"


def replaced(made: Real, at: int, event: Entry) -> Real:
    """The same boot, one event of it another one; what nothing logs stays as it was."""
    entries = [
        Entry(each.pcr, each.kind, b"", each.data, each.digest) for each in eventlog.parse_event_log(made.log).events
    ]
    entries[at] = event
    new, old = values(entries), eventlog.replay(eventlog.parse_event_log(made.log).events)
    return made._replace(log=log(entries), pcrs=made.pcrs | {pcr: new[pcr] for pcr in new if new[pcr] != old[pcr]})


def another(event: eventlog.Event) -> Entry:
    """Of something that the log has by its digest alone."""
    return Entry(event.pcr, event.kind, b"", event.data, sha256(event.digest or b"").digest())


BOOT_LOADER = "EFI program \\EFI\\BOOT\\BOOTX64.EFI"
DBX = variable(7, "dbx", signature_list(SHA256, [bytes(32)] * 9), vendor=IMAGE_SECURITY)
CHANGES = [
    # which boots, the event's words, what it is instead, the first cause, its PCR
    ("direct grub secure uki", "dbx", DBX, "dbx", 7),
    ("direct grub", "Secure Boot off", variable(7, "SecureBoot", b"\1"), "secure-boot", 7),
    ("secure uki", "Secure Boot on", variable(7, "SecureBoot", b"\0"), "secure-boot", 7),
    ("secure", "SbatLevel", None, "sbat", 7),
    ("secure", "MokListRT", None, "mok", 7),
    ("grub secure", "MokList", shim(14, "MokList", b"another key"), "mok", 14),
    ("grub secure uki", BOOT_LOADER, None, "boot-loader", 4),
    ("grub secure", "EFI program \\EFI\\BOOT\\grubx64.efi", None, "boot-loader", 4),
    ("direct", "kernel image", None, "kernel", 4),
    ("grub secure", "kernel file", None, "kernel", 9),
    ("uki", "unified kernel image", None, "uki", 4),
    ("direct grub secure uki", "initramfs, as the kernel got it", None, "initrd", 9),
    ("grub secure", "initramfs file", None, "initrd", 9),
]


@pytest.mark.parametrize(
    "name,words,event,code,pcr",
    [(name, *rest) for kinds, *rest in CHANGES for name in REAL if name.partition("-")[0] in kinds.split()],
)
def test_one_event_of_a_real_boot_changes(name: str, words: str, event: Entry | None, code: str, pcr: int) -> None:
    made = real(name)
    events = eventlog.parse_event_log(made.log).events
    at = next(at for at, each in enumerate(events) if describe.describe_event(each).text.startswith(words))
    found = diagnosis.diagnose(refused_boot(replaced(made, at, event or another(events[at])), good_boot(name)))
    (cause,) = found.causes
    assert (cause.code, cause.pcr) == (code, pcr) and cause.old != cause.new, explain.to_text(found)
    assert {each for each, status in found.pcrs.items() if status != "same"} == {pcr}


def test_a_log_that_ends_too_early_is_believed_for_the_pcrs_that_it_has_whole() -> None:
    """The kernel and some firmware keep 64 KiB; here, up to GRUB's first command."""
    entries = list(machine().values())
    names = list(machine())
    cut = names.index("command")
    changed = one_as_another(one_as_another(entries, names.index("shim")), names.index("initrd"))
    found = diagnosis.diagnose(refused(log(changed[:cut]), values(changed), good_machine(entries)))
    assert found.pcrs[7] == found.pcrs[14] == "same" and found.pcrs[8] == "same"
    assert [(each.code, each.pcr) for each in found.causes] == [("log-mismatch", 4), ("log-mismatch", 9)]
    assert found.causes[1].title.startswith("PCR 9, the files that GRUB read, the initramfs: ")


@pytest.mark.parametrize(
    "now,words",
    [
        (b"", "the event log is empty"),
        (header([(12, 48)]), "has SHA-384 digests only"),
        (header([(4, 20)]), "has SHA-1 digests only"),
        (header()[32:] * 2, "SHA-1 digests only"),
    ],
    ids=["none", "sha384", "sha1", "old"],
)
def test_without_a_log_that_can_be_used_the_pcr_is_named(now: bytes, words: str) -> None:
    entries = list(machine().values())
    changed = one_as_another(entries, list(machine()).index("initrd"))
    found = diagnosis.diagnose(refused(now, values(changed), good_machine(entries)))
    assert [(each.code, each.pcr) for each in found.causes] == [("pcr-changed", 9)]
    assert "the files that GRUB read" in found.summary and words in found.notes[-1]


def test_a_firmware_whose_log_is_never_right(host: Host) -> None:
    """Of a PCR that the log does not account for, the value is known: the TPM has released the key for it."""
    boot = Boot("grub")
    wrong = [entry for entry in boot.entries() if entry.pcr != 4 or entry.kind != 0x80000007]
    host.enroll(boot)
    for now, expected in (
        (boot, []),
        (boot._replace(menu="x"), [("boot-loader-config", 9), ("boot-loader-config", 8)]),
    ):
        verdict = host.boot(now)
        now_wrong = [entry for entry in now.entries() if entry.pcr != 4 or entry.kind != 0x80000007]
        host.write("sys/kernel/security/tpm0/binary_bios_measurements", log(now_wrong))
        if verdict == "unsealed":
            kept = host.keep()
            assert kept and 4 in kept.pcrs and not any(item.pcr == 4 for item in kept.items)
        else:
            found = host.explain()
            assert [(each.code, each.pcr) for each in found.causes][:2] == expected and found.pcrs[4] == "same"
    host.boot(boot._replace(loader="another"))
    host.write("sys/kernel/security/tpm0/binary_bios_measurements", log(wrong))
    found = host.explain()
    assert [(each.code, each.pcr) for each in found.causes] == [("pcr-changed", 4)]
    assert found.causes[0].title == f"PCR 4, {causes.HOLDS[4]}: it is not what it was"


def test_the_boot_loader_passed_no_event_log(host: Host) -> None:
    boot = Boot("grub")
    host.enroll(boot)
    assert host.boot(boot, log=False) == "unsealed"
    kept = host.keep()
    assert kept and not kept.items and kept.pcrs[8] != bytes(32)
    host.boot(boot._replace(menu="set timeout=0"), log=False)
    found = host.explain()
    assert [(each.code, each.pcr) for each in found.causes] == [("pcr-changed", 8), ("pcr-changed", 9)]
    assert "no event log (GRUB before 2.12" in found.notes[0]
    host.boot(boot._replace(menu="set timeout=0"))  # a newer GRUB passes one; the baseline has values alone
    assert [(each.code, each.pcr) for each in host.explain().causes] == [("pcr-changed", 8), ("pcr-changed", 9)]


def test_the_baseline_is_found_on_the_root_that_a_recovery_key_opened(host: Host) -> None:
    """In the initramfs, where the root file system is at /root."""
    good(host, Boot("direct"))
    root = host.home / "root"
    (root / "root/var/lib").mkdir(parents=True)
    (root / "var/lib/unlock").rename(root / "root/var/lib/unlock")
    host.boot(Boot("direct", initrd="another"))
    assert [each.code for each in host.explain().causes] == ["initrd"]


def test_without_a_good_boot_it_says_so(host: Host) -> None:
    host.enroll(Boot("grub"))
    host.boot(Boot("grub", kernel="another"))
    found = host.explain()
    assert found.causes == () and found.summary == "what differs from the last good boot cannot be told"
    assert "no record of a good boot" in found.notes[0]


def test_a_log_that_was_tampered_with_is_not_believed(host: Host) -> None:
    good(host, Boot("grub"))
    host.boot(Boot("grub", kernel="another", cmdline="init=/bin/sh"))
    host.write("sys/kernel/security/tpm0/binary_bios_measurements", Boot("grub", menu="set x=1").log())
    found = host.explain()
    assert {each.code for each in found.causes} == {"log-mismatch", "pcr-extended"}
    assert found.pcrs[9] == found.pcrs[8] == "unexplained"


def test_a_baseline_is_kept_by_pcr_and_only_after_a_good_boot(host: Host) -> None:
    boot = Boot("grub")
    host.enroll(boot)
    assert host.boot(boot._replace(kernel="another")) == "pcr-mismatch"
    assert host.keep() is None and not (host.home / "root/var/lib/unlock/baseline.json").exists()
    assert host.boot(boot) == "unsealed"
    host.extend([(5, b"x" * 32)])  # not in the log: this PCR is not believed
    kept = host.keep()
    assert kept and 5 not in kept.pcrs and {4, 7, 8, 9, 14} <= kept.pcrs.keys()
    before = (host.home / "root/var/lib/unlock/baseline.json").stat()
    assert host.keep() == kept
    assert (host.home / "root/var/lib/unlock/baseline.json").stat().st_ino == before.st_ino  # not written again


def test_what_systemd_measured_after_the_unseal_is_no_difference(host: Host) -> None:
    boot = Boot("uki")
    host.enroll(boot)
    assert host.boot(boot) == "unsealed"
    late = 1e9
    machine = (15, "machine-id", "machine-id:12", late)
    host.systemd((11, "phase", "sysinit", late), machine, (11, "phase", "ready", late))
    kept = host.keep()
    assert kept and 11 in kept.pcrs and 15 in kept.pcrs
    assert not any(item.cause == "systemd" for item in kept.items)
    host.boot(boot._replace(initrd="another"))
    host.systemd((11, "phase", "sysinit", late))
    assert [each.pcr for each in host.explain().causes] == [4, 11]


def test_what_systemd_measures_while_the_log_is_read(host: Host) -> None:
    boot = Boot("uki")
    host.enroll(boot)
    assert host.boot(boot) == "unsealed"
    host.systemd((11, "phase", "sysinit", 1e9), (15, "machine-id", "machine-id:12", 1e9))
    more = systemd_log([(11, "phase", "ready", 1e9), (15, "file-system", "file-system:/", 1e9)])
    log = host.home / "root/run/log/systemd/tpm2-measure.log"
    log.write_bytes(log.read_bytes() + more)  # extended after the PCRs were read
    kept = host.keep()
    assert kept and {11, 15} <= kept.pcrs.keys()


def test_ima_in_the_policy(host: Host) -> None:
    """It has a log of its own, and differs from boot to boot."""
    host.enroll(Boot("direct"), (4, 10))
    assert host.boot(Boot("direct")) == "unsealed"
    host.keep()
    assert host.boot(Boot("direct"), before={10: b"boot_aggregate".ljust(32)}) == "pcr-mismatch"
    assert [(each.code, each.pcr) for each in host.explain().causes] == [("ima", 10)]


def test_phases_that_systemd_252_does_not_log(host: Host) -> None:
    boot = Boot("uki")
    host.enroll(boot)
    assert host.boot(boot) == "unsealed"
    host.extend([(11, sha256(b"sysinit").digest()), (11, sha256(b"ready").digest())])
    kept = host.keep()
    assert kept and 11 in kept.pcrs and not any(item.cause == "systemd" for item in kept.items)


SEPARATED = (*range(8), 9, 12, 13, 14)


def test_the_separator_of_systemd_261(host: Host) -> None:
    """Before the unseal it is one of the measurements; after it, it is taken off; a boot without it is told from one
    with it."""
    boot = Boot("grub")
    early, late = ([(pcr, "os-separator", "os-separator", time) for pcr in SEPARATED] for time in (0.0, 1e9))
    good(host, boot)
    host.systemd(*late)
    kept = host.keep()
    assert kept and set(SEPARATED) <= kept.pcrs.keys() and not any(each.cause == "systemd" for each in kept.items)
    assert kept.pcrs[7] == eventlog.replay(eventlog.parse_event_log(boot.log()).events)[7]
    separator = sha256(b"os-separator").digest()
    assert host.boot(boot, before=dict.fromkeys(SEPARATED, separator)) == "pcr-mismatch"
    host.write("run/log/systemd/tpm2-measure.log", systemd_log(early))
    found = host.explain()
    assert {(each.code, each.pcr) for each in found.causes} == {
        ("systemd", pcr) for pcr in MEASURED_BY["grub"] if pcr != 8
    }
    assert "separator after the boot loader" in found.causes[0].new


def test_a_separator_of_systemd_that_no_log_has(host: Host) -> None:
    """Without a note, whether it came before the unseal cannot be told: nothing is sealed to those PCRs."""
    good(host, Boot("grub"))
    assert host.boot(Boot("grub"), noted=False) == "unsealed"
    host.extend([(pcr, sha256(b"os-separator").digest()) for pcr in SEPARATED])
    with host.chip.open() as tpm:
        known = at_unseal.read_pcrs(host.paths, tpm)
    assert known.keys() == set(range(16)) - set(SEPARATED)
    with pytest.raises(Refused, match="cannot be told"):
        at_unseal.known_values((7,), known)
    host.keep()
    assert host.boot(Boot("grub", initrd="another"), noted=False) == "pcr-mismatch"
    host.extend([(pcr, sha256(b"os-separator").digest()) for pcr in SEPARATED])
    assert {each.code for each in host.explain().causes} == {"initrd"}


@pytest.mark.parametrize("log", [True, False], ids=["", "and no log of the firmware"])
def test_what_early_boot_noted_is_known_whatever_systemd_measures_later(host: Host, log: bool) -> None:
    """Its separator and phases, none of which it logs. What else extends a PCR is not taken for the noted value."""
    boot = Boot("uki")
    host.write("sys/firmware/efi/efivars/StubInfo-4a67b082", b"")
    host.enroll(boot)
    assert host.boot(boot, log=log) == "unsealed"
    with host.chip.open() as tpm:
        values = tpm.read_pcrs(range(15))
        host.extend([(pcr, sha256(b"os-separator").digest()) for pcr in SEPARATED])
        host.extend([(11, sha256(phase).digest()) for phase in (b"enter-initrd", b"leave-initrd", b"sysinit")])
        known = at_unseal.read_pcrs(host.paths, tpm)
        assert known == {**values, 15: bytes(32)}
        assert at_unseal.boot_method(host.paths, known) == "UKI"
        kept = host.keep()
        assert kept and {4, 7, 9, 11, 12, 13} <= kept.pcrs.keys()
        assert all(kept.pcrs[pcr] == value for pcr, value in values.items() if pcr in kept.pcrs)
        assert host.explain().causes == ()
        host.extend([(13, bytes(32))])
        assert at_unseal.read_pcrs(host.paths, tpm) == {pcr: value for pcr, value in known.items() if pcr != 13}
        host.extend([(11, bytes(32))])
        known = at_unseal.read_pcrs(host.paths, tpm)
        assert 11 not in known and at_unseal.boot_method(host.paths, known) == "UKI", "no other PCRs in silence"


def test_a_separator_is_no_boot_loader_that_measures(host: Host) -> None:
    """GRUB without its TPM module measures nothing of kernel and initramfs; the separator is in PCR 9 nevertheless."""
    boot = Boot("grub")
    host.write("sys/firmware/efi/runtime", b"")
    host.chip.power_cycle()
    host.files(boot, False)
    host.extend([(entry.pcr, entry.sha256) for entry in boot.entries() if entry.pcr not in (8, 9)])
    host.early()
    host.extend([(pcr, sha256(b"os-separator").digest()) for pcr in SEPARATED])
    with host.chip.open() as tpm:
        assert at_unseal.boot_method(host.paths, at_unseal.read_pcrs(host.paths, tpm)) == "unmeasured"
        assert at_unseal.boot_method(host.paths, tpm.read_pcrs(range(16))) == "direct kernel"


def test_a_damaged_baseline_is_told_and_nothing_fails(host: Host) -> None:
    good(host, Boot("grub"))
    host.write("var/lib/unlock/baseline.json", b'{"version":1')
    host.boot(Boot("grub", kernel="another"))
    found = host.explain()
    assert "baseline" in found.notes[0] and found.causes == ()


def test_a_later_format_of_the_baseline_is_told_from_a_broken_one() -> None:
    with pytest.raises(Malformed) as caught:
        Baseline.decode(b'{"version":2,"more":[]}')
    assert caught.value.code == "newer-format"


def test_every_cause_has_words() -> None:
    assert causes.USUAL.keys() == causes.TITLES.keys() >= causes.CAUSES.keys()


def test_long_texts_are_shown_where_they_differ() -> None:
    head, tail = "a b " * 200, " d" * 200
    old, new = diagnosis.excerpts(head + "old" + tail, head + "new" + tail)
    assert "old" in old and "new" in new and len(old) < 200 and old.startswith("… ") and old.endswith("…")
    assert diagnosis.excerpts("short", "text") == ("short", "text")
    line = "root=x ro module_blacklist=" + "x_tables," * 30
    for cmdline in (line, "root=x ro quiet module_blacklist=ip_tables,x_tables"):
        old, new = diagnosis.excerpts(cmdline, cmdline + " init=/bin/sh", 67)
        assert new.endswith(" init=/bin/sh") and max(len(old), len(new)) <= 70
