# SPDX-License-Identifier: Apache-2.0
"""Drivers that the firmware runs before the boot loader, where Secure Boot is off: PCRs 0 to 3 see them, and are chosen
then. A software TPM, event logs; logs of real boots."""

import os
import struct
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.eventlogs import Boot, Entry, file_path, option_rom, real, variable
from tests.hostfixture import Machine
from unlock.errors import Refused, UnlockError
from unlock.host import this_boot
from unlock.measured import at_unseal, diagnosis, eventlog, evidence, explain, logs
from unlock.operations import baseline, init, policy, rebind, status
from unlock.operations.check.finding import Finding
from unlock.operations.check.tpm import check_tpm
from unlock.secret import Secret

pytestmark = pytest.mark.usefixtures("key_cache")

KINDS = {"grub": (4, 7, 8, 9, 14), "direct": (4, 7, 9), "uki": (4, 7, 11, 12, 13)}


class DriverVariable(Boot):
    """Somebody has set DriverOrder and Driver0001: the firmware runs that file of the ESP before the boot loader."""

    def _firmware(self) -> list[Entry]:
        option = struct.pack("<IH", 1, 4) + "thief".encode("utf-16-le") + b"\0\0"
        path = file_path("\\thief.efi")
        where = (
            (0x1000).to_bytes(8, "little") + (4096).to_bytes(8, "little") + bytes(8) + len(path).to_bytes(8, "little")
        )
        return [
            variable(1, "DriverOrder", b"\1\0", 0x80000002),
            variable(1, "Driver0001", option, 0x80000002),
            Entry(2, 0x80000004, b"the thief's driver", where + path),
            *super()._firmware(),
        ]


class OptionRom(Boot):
    """Somebody has plugged in a card whose option ROM is his."""

    def _firmware(self) -> list[Entry]:
        return [option_rom(3, "the thief's ROM"), *super()._firmware()]


THIEVES = (DriverVariable, OptionRom)


def initialised(home: Path, boot: Boot, *accept: str, pcrs: tuple[int, ...] = ()) -> tuple[Machine, init.Preflight]:
    """A host whose `init` has run in this boot."""
    host = Machine(home, boot)
    os.unlink(host.paths.state)
    host.clear()
    host.write("sys/firmware/efi/fw_platform_size", b"64\n")
    if boot.kind == "uki":
        host.write("sys/firmware/efi/efivars/StubInfo-4a67b082", b"")
    assert host.boot() == "no-slot"
    accepted = frozenset(("unauthenticated-root", *accept))
    choices = init.InitChoices(str(home / "backup"), Secret(b"password"), accepted, pcrs, Secret(b""), host.chip.tcti)
    try:
        return host, init.init(host.paths, choices)
    except Refused:
        host.close()
        raise


@pytest.fixture
def insecure(tmp_path: Path) -> Iterator[Machine]:
    host, _ = initialised(tmp_path, Boot("grub", secure_boot=False))
    yield host
    host.close()


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("secure", [True, False])
def test_init_chooses_them_where_secure_boot_is_off_and_says_why(tmp_path: Path, kind: str, secure: bool) -> None:
    host, found = initialised(tmp_path, Boot(kind, secure_boot=secure))
    assert found.selection == (*((0, 1, 2, 3) if not secure else ()), *KINDS[kind], 15)
    assert ("Secure Boot is on" if secure else "Secure Boot is off") in found.why
    assert host.boot() == "unsealed"
    host.close()


@pytest.mark.parametrize("thief", THIEVES)
@pytest.mark.parametrize("kind", KINDS)
def test_a_driver_that_runs_before_the_boot_loader_gets_no_key(tmp_path: Path, kind: str, thief: type[Boot]) -> None:
    host, _ = initialised(tmp_path, Boot(kind, secure_boot=False))
    assert host.boot(thief(kind, secure_boot=False)) == "pcr-mismatch"
    assert host.boot(Boot(kind, secure_boot=False)) == "unsealed"
    host.close()


@pytest.mark.parametrize("thief", THIEVES)
@pytest.mark.parametrize("kind", KINDS)
def test_without_them_it_does(tmp_path: Path, kind: str, thief: type[Boot]) -> None:
    boot = Boot(kind, secure_boot=False)
    with pytest.raises(Refused) as caught:
        initialised(tmp_path, boot, pcrs=KINDS[kind])
    assert caught.value.code == "unmeasured-drivers" and "0, 1, 2, 3" in caught.value.hint
    host, found = initialised(tmp_path / "accepted", boot, "unmeasured-drivers", pcrs=KINDS[kind])
    assert "--pcrs" in found.why
    assert host.boot(thief(kind, secure_boot=False)) == "unsealed"
    host.close()


def test_some_of_them_are_not_enough(tmp_path: Path) -> None:
    with pytest.raises(Refused) as caught:
        initialised(tmp_path, Boot("direct", secure_boot=False), pcrs=(2, 4, 7, 9))
    assert caught.value.code == "unmeasured-drivers" and "0, 1, 3" in caught.value.hint


def test_an_update_is_predicted_and_windows_and_other_pcrs_work_on_them(insecure: Machine) -> None:
    host, new = insecure, Boot("grub", secure_boot=False, kernel="another")
    host.boot()
    host.predict(("kernel another", new))
    assert host.boot(DriverVariable("grub", secure_boot=False, kernel="another")) == "pcr-mismatch"
    assert host.boot(new) == "unsealed"
    policy.open_window(host.paths, 1, (), host.chip.tcti)
    updated = new._replace(firmware="2.0", setup="others")
    assert host.boot(updated) == "unsealed"
    policy.good_boot(host.paths, host.chip.tcti, host.look)
    assert policy.show(host.paths, host.chip.tcti)["pcrs"] == [0, 1, 2, 3, 4, 7, 8, 9, 14, 15]
    assert host.boot(OptionRom(**updated._asdict())) == "pcr-mismatch"
    assert host.boot(updated) == "unsealed"
    accept = ("unmeasured-drivers",)
    policy.set_policy(host.paths, (0, 2, 4, 7, 8, 9), None, host.chip.tcti, look=host.look, accept=accept)
    assert host.boot(updated._replace(boot_order=(2, 1))) == "unsealed"
    assert host.boot(OptionRom(**updated._asdict())) == "pcr-mismatch"


@pytest.mark.parametrize("thief", THIEVES)
def test_explain_names_the_driver(insecure: Machine, thief: type[Boot]) -> None:
    host = insecure
    host.boot()
    baseline.record_good_boot(host.paths, host.chip.tcti)
    assert host.boot(thief("grub", secure_boot=False)) == "pcr-mismatch"
    said = explain.to_text(diagnosis.diagnose(evidence.gather_evidence(host.paths, host.chip.tcti)))
    assert "PCR 2" in said and "driver" in said
    assert ("the firmware runs drivers before any boot loader" in said) == (thief is DriverVariable)


def test_check_says_when_they_are_not_checked(insecure: Machine) -> None:
    host = insecure
    host.write("proc/self/mountinfo", b"")

    def told() -> list[Finding]:
        log, _ = logs.read_event_log(host.paths)
        found = check_tpm(host.paths, host.state, host.chip.tcti, UnlockError("not predicted"), log)
        return [each for each in found if "drivers run unseen" in each.detail]

    host.boot()
    assert not told()
    policy.open_window(host.paths, 1, (), host.chip.tcti)
    assert not told(), "the window is told, and closes"
    accept = ("unmeasured-drivers",)
    policy.set_policy(host.paths, (2, 4, 7, 8, 9), None, host.chip.tcti, look=host.look, accept=accept)
    [found] = told()
    assert "PCRs 0, 1, 3" in found.detail


def test_rebind_adds_them_when_secure_boot_was_turned_off(tmp_path: Path) -> None:
    host = Machine(tmp_path, Boot("direct"), disks=1)
    host.write("sys/firmware/efi/fw_platform_size", b"64\n")
    off = Boot("direct", secure_boot=False)
    host.boot()
    host.boot(off)
    this_boot.cache_keys(host.paths, "TPM", {"unlock:persistence": host.persistence})
    choices = rebind.RebindChoices(
        host.recovery, pcrs=(4, 7, 9), accept=frozenset(("unauthenticated-root",)), tcti=host.chip.tcti
    )
    with pytest.raises(Refused) as caught:
        rebind.rebind(host.paths, choices, host.look)
    assert caught.value.code == "unmeasured-drivers"
    found = rebind.rebind(host.paths, choices._replace(pcrs=()), host.look)
    assert found.selection == (0, 1, 2, 3, 4, 7, 9, 15)
    assert host.boot(DriverVariable("direct", secure_boot=False)) == "pcr-mismatch"
    assert host.boot(off) == "unsealed"
    host.close()


@pytest.mark.parametrize(
    ("name", "secure"), [("grub-0", False), ("grub-3", False), ("secure-0", True), ("uki-0", True), ("direct-0", False)]
)
def test_real_logs_say_whether_it_is_on(name: str, secure: bool) -> None:
    log = eventlog.parse_event_log(real(name).log)
    assert at_unseal.is_secure_boot_on(log) == secure
    for boot, pcrs in at_unseal.MEASURED_BY.items():
        assert at_unseal.default_pcrs(boot, log) == (*(() if secure else (0, 1, 2, 3)), *pcrs)


def test_without_a_log_it_counts_as_off() -> None:
    assert at_unseal.default_pcrs("UKI", None) == (0, 1, 2, 3, 4, 7, 11, 12, 13)
    assert at_unseal.default_pcrs("unmeasured", None) == (7,)


# PCRs that leave kernel, initramfs or command line out


@pytest.mark.parametrize(
    ("kind", "secure", "chosen", "missing"),
    [
        ("shim+GRUB", True, (7,), (8, 9)),
        ("shim+GRUB", True, (7, 9), (8,)),
        ("shim+GRUB", True, (7, 8), (9,)),
        ("shim+GRUB", True, (7, 8, 9), ()),
        ("shim+GRUB", True, (8, 9), (4,)),
        ("shim+GRUB", True, (4, 8, 9), ()),
        ("shim+GRUB", False, (7, 8, 9), (4,)),
        ("UKI", True, (7,), (11, 12)),
        ("UKI", True, (7, 11), (12,)),
        ("UKI", True, (7, 11, 12), ()),
        ("UKI", True, (4, 12), ()),
        ("UKI", False, (7, 11, 12), (4,)),
        ("direct kernel", True, (7,), (4, 9)),
        ("direct kernel", True, (7, 9), (4,)),
        ("direct kernel", True, (4, 9), ()),
        ("unmeasured", True, (7,), ()),
    ],
)
def test_which_pcrs_a_selection_lacks_to_notice_another_kernel(
    kind: str, secure: bool, chosen: tuple[int, ...], missing: tuple[int, ...]
) -> None:
    log = eventlog.parse_event_log(Boot(secure_boot=secure).log())
    assert at_unseal.missing_for_kernel(kind, log, chosen) == missing
    assert not at_unseal.risks(kind, log, at_unseal.default_pcrs(kind, log))
    if kind in at_unseal.MEASURED_BY and 4 not in chosen:
        assert 4 in at_unseal.missing_for_kernel(kind, None, chosen), "Secure Boot cannot be told"


@pytest.mark.parametrize("kind", KINDS)
def test_init_does_not_leave_the_command_line_out_unless_that_is_accepted(tmp_path: Path, kind: str) -> None:
    edited = Boot(kind, cmdline="init=/bin/sh", initrd="initrd" if kind != "uki" else "another")
    with pytest.raises(Refused) as caught:
        initialised(tmp_path, Boot(kind), pcrs=(7,))
    assert caught.value.code == "unmeasured-boot" and "add PCRs" in caught.value.hint
    host, _ = initialised(tmp_path / "chosen", Boot(kind))
    assert host.boot(edited) == "pcr-mismatch"
    host.close()
    host, _ = initialised(tmp_path / "accepted", Boot(kind), "unmeasured-boot", pcrs=(7,))
    assert host.boot(edited) == "unsealed"
    host.close()


def test_policy_set_wants_both_risks_accepted_by_name(insecure: Machine) -> None:
    host = insecure
    host.boot()
    before = Path(host.paths.state).read_bytes(), host.allows()

    def choose(*accept: str) -> None:
        policy.set_policy(host.paths, (7,), None, host.chip.tcti, look=host.look, accept=accept)

    for accept, risk in (((), "unmeasured-boot"), (("unmeasured-boot",), "unmeasured-drivers")):
        with pytest.raises(Refused) as caught:
            choose(*accept)
        assert caught.value.code == risk and f"--accept {risk}" in caught.value.hint
        assert (Path(host.paths.state).read_bytes(), host.allows()) == before
    choose("unmeasured-boot", "unmeasured-drivers")
    assert host.allows().record.selection == (7, 15)


def test_show_check_and_status_say_what_is_not_checked(tmp_path: Path) -> None:
    host, _ = initialised(tmp_path, Boot())
    host.write("proc/self/mountinfo", b"")
    host.boot()

    def told() -> list[str]:
        log, _ = logs.read_event_log(host.paths)
        shown = policy.show(host.paths, host.chip.tcti)
        found = status.read_status(host.paths, host.chip.tcti)
        assert shown["not_checked"] == status.to_json(found)["not_checked"]
        findings = check_tpm(host.paths, host.state, host.chip.tcti, UnlockError("not predicted"), log)
        texts = [policy.table(shown), status.to_text(found), *(each.detail for each in findings)]
        return [each for each in texts if "are not checked: whoever edits kernel" in each]

    assert not told()
    policy.open_window(host.paths, 1, (4,), host.chip.tcti)
    assert not told(), "the window is told, and closes"
    policy.set_policy(host.paths, (7, 9), None, host.chip.tcti, look=host.look, accept=("unmeasured-boot",))
    assert len(told()) == 3 and all("PCRs 8 " in each for each in told())
    host.close()


def test_rebind_does_not_leave_the_command_line_out_unless_that_is_accepted(tmp_path: Path) -> None:
    host = Machine(tmp_path, Boot(), pcrs=(7, 9), disks=1)
    host.write("sys/firmware/efi/fw_platform_size", b"64\n")

    def rebound(*accept: str, pcrs: tuple[int, ...] = ()) -> tuple[int, ...]:
        accepted = frozenset(("unauthenticated-root", *accept))
        choices = rebind.RebindChoices(host.recovery, pcrs=pcrs, accept=accepted, tcti=host.chip.tcti)
        return rebind.rebind(host.paths, choices, host.look).selection

    with pytest.raises(Refused) as caught:
        rebound(pcrs=(7,))
    assert caught.value.code == "unmeasured-boot" and "8, 9" in caught.value.hint
    assert rebound("unmeasured-boot") == (7, 9, 15), "as before"
    assert rebound() == (7, 8, 9, 15)
    host.close()
