# SPDX-License-Identifier: Apache-2.0
"""`unlock init` and `unlock disk adopt`: refused by name, run twice, killed at every step. A real TPM, real headers."""

import json
import os
import subprocess
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from functools import partial
from pathlib import Path

import pytest

from tests.killing import Killer, child, killed_in
from tests.kmipfixture import AUTHORITY, CLIENT
from tests.lab.kmipliar import Liar
from tests.saved import Saved
from tests.test_devices import Machine
from tests.test_members import Failing
from tests.tpmfixture import Swtpm
from unlock.disks import disk_keys, luks
from unlock.errors import ClientAuth, PinWrong, Refused, TpmFailed, UnlockError, Usage
from unlock.host import config, keyring, report, report_file
from unlock.host.journal import DiskAdoption
from unlock.host.provider_entry import NativeEntry
from unlock.host.state import State
from unlock.initramfs import DRACUT, INITRAMFS_TOOLS
from unlock.keys import dump_key, recovery_key
from unlock.operations import adopt_disk, cache, init, membership, status, sync
from unlock.operations.dump import protection
from unlock.operations.provider import Client
from unlock.paths import Paths
from unlock.providers import native
from unlock.secret import Secret
from unlock.tpm import pcr_policy, slots
from unlock.tpm.chip import Tpm
from unlock.tpm.record import RECORD_SIZE, A, Payload

PASSWORD = b"of the backup"
ACCEPTED = frozenset(("unmeasured-boot", "unauthenticated-root"))


@pytest.fixture
def chip(tmp_path: Path) -> Iterator[Swtpm]:
    with Swtpm(tmp_path / "tpm") as chip:
        yield chip


@pytest.fixture
def host(tmp_path: Path, key_cache: None) -> Paths:
    """A host whose early boot ran unlock and found no slot."""
    paths = Paths(str(tmp_path / "root"))
    os.makedirs(paths.run)
    early = report.Report("early-boot")
    early.set_verdict("no-slot")
    early.facts = report.BootFacts(cap_pcr_before=pcr_policy.UNSET.hex())
    Path(paths.of_this_boot("report.json")).write_bytes(report_file.encode(early))
    return paths


def choices(paths: Paths, chip: Swtpm, accept: frozenset[str] = ACCEPTED, owner: bytes = b"") -> init.InitChoices:
    backup = os.path.join(paths.root, "backup")
    return init.InitChoices(backup, Secret(PASSWORD), accept, (), Secret(owner), chip.tcti)


def unwrap_kdk(paths: Paths, persistence: Secret) -> None:
    """Raises Tampered when the persistence key is not the one of the state."""
    state = State.load(paths)
    assert isinstance(state.provider, NativeEntry)
    state.kdk(persistence, state.provider).wipe()


def refused(paths: Paths, asked: init.InitChoices) -> str:
    with pytest.raises(Refused) as caught:
        init.init(paths, asked)
    assert not os.path.exists(asked.backup)
    return caught.value.code


def test_init_seals_backs_up_and_leaves_no_key_in_a_file(host: Paths, chip: Swtpm) -> None:
    asked = choices(host, chip)
    init.init(host, asked)
    with chip.open() as tpm:
        unsealed = slots.unseal(tpm)
    persistence = unsealed.payload.key
    assert unsealed.slot is A
    assert unsealed.payload.unauthenticated_root
    assert keyring.get("unlock:persistence") == persistence
    sources = {row["what"]: row["source"] for row in cache.list_keys(host)}
    assert sources == {"persistence key": "made", "host key": "provider"}
    state = State.load(host)
    assert (state.journal, state.has_recovery_key) == (None, False)
    with open(asked.backup, "rb") as file, native.restore(file.read(), asked.password) as restored:
        assert restored.id == state.provider_id
        kdk = bytes(restored.kdk)
    host_secret = state.host_key(persistence)
    assert host_secret
    host_key = bytes(host_secret)
    for path in Path(host.root).rglob("*"):
        content = path.read_bytes() if path.is_file() else b""
        for secret in (bytes(persistence), kdk, host_key, PASSWORD):
            assert secret not in content, path
            assert secret.hex().encode() not in content, path


@pytest.mark.parametrize("version", ["38.0.4", "42.0.8"])
def test_init_on_debian_12_is_refused_by_name(
    host: Paths, chip: Swtpm, version: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("cryptography.__version__", version)
    assert refused(host, choices(host, chip)) == "old-cryptography"
    assert not os.path.exists(host.state)


def test_init_a_second_time_is_refused(host: Paths, chip: Swtpm) -> None:
    init.init(host, choices(host, chip))
    with pytest.raises(Refused) as caught:
        init.init(host, choices(host, chip))
    assert caught.value.code == "initialised"


def test_without_the_package_of_its_builder_a_host_is_told_to_install_it(host: Paths, chip: Swtpm) -> None:
    Path(host.of_this_boot("report.json")).unlink()
    for builder in (INITRAMFS_TOOLS, DRACUT):
        if builder is DRACUT:
            program = Path(host.root, "usr/bin/dracut")
            program.parent.mkdir(parents=True)
            program.touch()
        with pytest.raises(Refused) as caught:
            init.init(host, choices(host, chip))
        assert caught.value.code == "initramfs-without-unlock" and f"apt install {builder.package}" in caught.value.hint
        hook = Path(host.root, builder.hook)
        hook.parent.mkdir(parents=True)
        hook.touch()
        with pytest.raises(Refused) as caught:
            init.init(host, choices(host, chip))
        assert builder.rebuild_all in caught.value.hint and "apt" not in caught.value.hint


def test_each_refusal_has_its_name(host: Paths, chip: Swtpm) -> None:
    assert refused(host, choices(host, chip, frozenset())) == "unmeasured-boot"
    assert refused(host, choices(host, chip, frozenset(("unmeasured-boot",)))) == "unauthenticated-root"
    early = Path(host.of_this_boot("report.json"))
    saved = early.read_bytes()
    early.unlink()
    assert refused(host, choices(host, chip)) == "initramfs-without-unlock"
    early.write_bytes(saved.replace(b"00000000", b"00000001", 1))
    assert refused(host, choices(host, chip)) == "cap-pcr-used"
    early.write_bytes(saved)
    with chip.open() as tpm:
        other = Payload(Secret(bytes(32)))
        slots.seal_slot(tpm, b"x" * 16, pcr_policy.select([7]), (pcr_policy.branch((7, 15), {7: bytes(32)}),), other)
    assert refused(host, choices(host, chip)) == "slots-in-use"
    chip.set_owner_auth(Secret(b"owner"))
    assert refused(host, choices(host, chip)) == "owner-auth-set"
    init.init(host, choices(host, chip, ACCEPTED | {"slots-in-use"}, b"owner"))


# init where the state is away


def test_init_encrypts_core_dumps_unless_that_is_declined_by_name(
    host: Paths, chip: Swtpm, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pattern, setting = (
        Path(host.root, each) for each in ("proc/sys/kernel/core_pattern", "etc/sysctl.d/50-coredump.conf")
    )
    pattern.parent.mkdir(parents=True)
    pattern.write_text("core\n")
    programs = os.environ["PATH"]
    monkeypatch.setenv("PATH", str(tmp_path))
    assert refused(host, choices(host, chip)) == "plain-dumps", "age is not installed"
    init.init(host, choices(host, chip, ACCEPTED | {"plain-dumps"}))
    assert pattern.read_text() == "core\n" and not setting.exists()
    found = status.read_status(host, chip.tcti)
    assert "core dumps: not encrypted: core: unlock dump enable" in status.to_text(found)
    assert status.to_json(found)["dumps"]["encrypted"] is False
    monkeypatch.setenv("PATH", programs)
    protection.enable(host)
    assert pattern.read_text() == protection.PATTERN and setting.exists()
    found = status.read_status(host, chip.tcti)
    assert "dumps     encrypted to host key 1" in status.to_text(found)
    Path(host.root, "proc/swaps").write_text("Filename Type Size Used Priority\n/dev/sda3 partition 1 0 -2\n")
    assert "swap on a disk that is not encrypted: /dev/sda3" in status.to_text(status.read_status(host, chip.tcti))


def test_init_itself_sets_up_core_dumps(host: Paths, chip: Swtpm) -> None:
    init.init(host, choices(host, chip))
    assert "kernel.core_pattern=|/usr/lib/unlock/dump" in Path(host.root, "etc/sysctl.d/50-coredump.conf").read_text()
    to = dump_key.read_recipient(host)
    assert to and to.generation == 1


def set_verdict(paths: Paths, verdict: str) -> None:
    early = report.Report("early-boot")
    early.set_verdict(verdict)
    early.facts = report.BootFacts(cap_pcr_before=pcr_policy.UNSET.hex())
    Path(paths.of_this_boot("report.json")).write_bytes(report_file.encode(early))


def lose_state(paths: Paths) -> None:
    Path(paths.state).unlink()
    os.unlink(os.path.join(paths.root, "backup"))


@pytest.mark.parametrize("sign", ["group", "unsealed", "pcr-mismatch", "pin-wrong"])
def test_a_host_whose_state_is_away_is_not_initialised_again(host: Paths, chip: Swtpm, sign: str) -> None:
    init.init(host, choices(host, chip))
    lose_state(host)
    if sign == "group":
        config.append_table(host.config, config.group_table(config.GroupConfig("data", "", "", "", 90)))
    else:
        set_verdict(host, sign)
    with chip.open() as tpm:
        before = slots.current_record(tpm)
    with pytest.raises(Refused, match=f"{host.state} is missing, and this host was initialised") as told:
        State.load(host)
    assert told.value.code == "lost-state" and os.path.dirname(host.state) in told.value.hint
    assert refused(host, choices(host, chip, ACCEPTED | {"slots-in-use"})) == "lost-state"
    with chip.open() as tpm:
        assert slots.current_record(tpm) == before
    init.init(host, choices(host, chip, ACCEPTED | {"slots-in-use", "lost-state"}))
    assert State.load(host).journal is None


def test_a_tpm_that_keeps_a_key_alone_is_told_as_what_it_may_be(host: Paths, chip: Swtpm) -> None:
    """Another installation's, which is no matter of this host's state; or this host's own."""
    init.init(host, choices(host, chip))
    lose_state(host)
    with pytest.raises(Refused, match="if its /var/lib/unlock is only away") as caught:
        init.init(host, choices(host, chip))
    assert caught.value.code == "slots-in-use"


@pytest.mark.parametrize("where", ["/var", "/var/lib/", "/var/lib/unlock"])
def test_nothing_is_initialised_below_a_mount_point_where_nothing_is_mounted(
    host: Paths, chip: Swtpm, where: str
) -> None:
    machine = Machine(Path(host.root))
    os.makedirs(os.path.dirname(host.fstab))
    Path(host.fstab).write_text(f"UUID=1 / ext4 defaults 0 1\nUUID=2 {where} ext4 defaults 0 2\n")
    accepted = ACCEPTED | {"slots-in-use", "lost-state"}
    with pytest.raises(Refused, match=f"{where.rstrip('/')} is not mounted") as caught:
        init.init(host, choices(host, chip, accepted))
    assert (caught.value.code, caught.value.hint) == ("not-mounted", f"mount {where.rstrip('/')}")
    assert not os.path.lexists(host.state)
    machine.mount("8:1", where.rstrip("/"), "/dev/sda1")
    init.init(host, choices(host, chip, accepted))


def goes_on(paths: Paths, asked: init.InitChoices) -> init.Preflight:
    with Tpm(asked.tcti) as tpm:
        return init.preflight(paths, tpm, asked, again=False)


def test_a_locked_out_tpm_is_waited_for(host: Paths, chip: Swtpm) -> None:
    with chip.open() as tpm:
        right, wrong = Secret(b"right".ljust(32)), Secret(b"wrong".ljust(32))
        branch = pcr_policy.branch(pcr_policy.select([7]), tpm.read_pcrs(range(16)))
        slots.seal_slot(tpm, b"x" * 16, pcr_policy.select([7]), (branch,), Payload(Secret(bytes(32))), pin_auth=right)
    chip.set_lockout(1, 1234)
    with chip.open() as tpm:
        record = tpm.read_record(A)
        with pytest.raises(PinWrong):
            tpm.unseal(tpm.verify(A, record), record, wrong)
        tpm.evict(A)
    with pytest.raises(Refused, match="locked out after 1 wrong") as caught:
        init.init(host, choices(host, chip))
    assert (caught.value.code, "1234 s" in caught.value.hint) == ("tpm-lockout", True)
    chip.set_lockout(32)
    assert goes_on(host, choices(host, chip))


def pcr_banks(chip: Swtpm, banks: str) -> None:
    """What the firmware's setup turns on; it counts from the next start."""
    subprocess.run(["tpm2_pcrallocate", "-T", chip.tcti, banks], check=True, capture_output=True)
    chip.power_cycle()


def test_a_tpm_whose_sha256_bank_is_off_measures_nothing_that_counts(host: Paths, chip: Swtpm) -> None:
    for banks in ("sha1:all+sha256:none", "sha1:all+sha256:0,1,2,3,4,5,6,7"):
        pcr_banks(chip, banks)
        assert refused(host, choices(host, chip)) == "no-sha256-bank"
    pcr_banks(chip, "sha256:all")
    assert goes_on(host, choices(host, chip))


def test_a_tpm_without_room_for_a_second_sealed_object_is_refused_before_the_first_policy_change(
    host: Paths, chip: Swtpm
) -> None:
    with chip.open() as tpm:
        key = tpm._primary(0x101, tpm._owner(None))
        handles = iter(range(0x81010000, 0x81010100))
        used = []
        while tpm.facts().persistent_free > 2:
            used.append(next(handles))
            tpm._keep(key, used[-1], None)
    assert refused(host, choices(host, chip)) == "tpm-full", "an SRK and two sealed objects are three"
    with chip.open() as tpm:
        assert not tpm.facts().srk, "nothing was made"
        tpm._keep(tpm._find(used[-1]), used[-1], None)
    assert goes_on(host, choices(host, chip))


def test_what_an_earlier_installation_left_in_a_full_tpm_makes_room_for_one_object(host: Paths, chip: Swtpm) -> None:
    with chip.open() as tpm:
        branch = pcr_policy.branch(pcr_policy.select([7]), tpm.read_pcrs(range(16)))
        slots.seal_slot(tpm, b"x" * 16, pcr_policy.select([7]), (branch,), Payload(Secret(bytes(32))))
        key = tpm._primary(0x101, tpm._owner(None))
        handles = iter(range(0x81010000, 0x81010100))
        while tpm.facts().persistent_free:
            last = next(handles)
            tpm._keep(key, last, None)
    accepted = ACCEPTED | {"slots-in-use"}
    assert refused(host, choices(host, chip, accepted)) == "tpm-full", "its record is no room for a second object"
    with chip.open() as tpm:
        tpm._keep(tpm._find(last), last, None)
    assert goes_on(host, choices(host, chip, accepted))


@pytest.mark.parametrize("what", [0x117, 0x12C])
def test_a_tpm_that_cannot_keep_or_read_a_whole_record_is_refused(host: Paths, chip: Swtpm, what: int) -> None:
    """TPM_PT_NV_INDEX_MAX and TPM_PT_NV_BUFFER_MAX of another make."""

    def small(command: str, answer: bytes) -> bytes:
        at = answer.find(what.to_bytes(4, "big")) if command == "GetCapability" else -1
        return answer[: at + 4] + (RECORD_SIZE - 1).to_bytes(4, "big") + answer[at + 8 :] if at > 0 else answer

    honest, chip.proxy.tamper = chip.proxy.tamper, small
    assert refused(host, choices(host, chip)) == "tpm-full"
    chip.proxy.tamper = honest
    assert goes_on(host, choices(host, chip))


def test_a_tpm_without_room_for_a_record_says_what_to_free(chip: Swtpm) -> None:
    """It does not tell beforehand how many more NV indexes fit."""
    defined, free = [], iter(range(0x1500010, 0x1500100))
    for size in ("2048", "512", "128", "16"):
        while True:
            index = hex(next(free))
            command = ["tpm2_nvdefine", "-T", chip.tcti, "-s", size, index]
            if subprocess.run(command, capture_output=True, check=False).returncode:
                break
            defined.append(index)
    with chip.open() as tpm:
        selection, payload = pcr_policy.select([7]), Payload(Secret.random(32))
        branch = pcr_policy.branch(selection, tpm.read_pcrs(range(16)))
        with pytest.raises(TpmFailed) as caught:
            slots.seal_slot(tpm, b"x" * 16, selection, (branch,), payload)
        assert "tpm2_getcap handles-nv-index" in caught.value.hint
        subprocess.run(["tpm2_nvundefine", "-T", chip.tcti, defined[0]], check=True, capture_output=True)
        slots.seal_slot(tpm, b"x" * 16, selection, (branch,), payload, replace=True)
        assert slots.unseal(tpm).payload.key == payload.key


def test_a_tpm_that_does_not_unseal_what_it_has_sealed_gets_no_key(host: Paths, chip: Swtpm) -> None:
    chip.proxy.answer("Unseal", 0x101)  # TPM_RC_FAILURE
    with pytest.raises(TpmFailed):
        init.init(host, choices(host, chip))
    assert not os.path.exists(choices(host, chip).backup)
    with chip.open() as tpm:
        assert tpm.facts().taken == ()
    assert goes_on(host, choices(host, chip))


def test_an_object_in_the_place_of_the_storage_root_key_is_refused(host: Paths, chip: Swtpm) -> None:
    make = ["tpm2_createprimary", "-T", chip.tcti, "-c", f"{host.root}/key", "-G", "ecc"]
    subprocess.run([*make, "-a", "fixedtpm|fixedparent|sensitivedataorigin|userwithauth|sign"], check=True)
    keep = ["tpm2_evictcontrol", "-T", chip.tcti, "-c", f"{host.root}/key", "0x81000001"]
    subprocess.run(keep, check=True, capture_output=True)
    with pytest.raises(Refused, match="no storage root key"):
        init.init(host, choices(host, chip))
    assert not os.path.exists(choices(host, chip).backup)


def test_without_a_report_of_early_boot_the_cap_pcr_itself_is_looked_at(host: Paths, chip: Swtpm) -> None:
    os.unlink(host.of_this_boot("report.json"))
    accepted = ACCEPTED | {"initramfs-without-unlock"}
    chip.extend(pcr_policy.CAP_PCR)
    assert refused(host, choices(host, chip, accepted)) == "cap-pcr-used"
    chip.power_cycle()
    chip.extend(pcr_policy.CAP_PCR, pcr_policy.CAP_DIGEST)
    assert goes_on(host, choices(host, chip, accepted))


def test_an_existing_backup_file_is_never_overwritten(host: Paths, chip: Swtpm) -> None:
    asked = choices(host, chip)
    Path(asked.backup).write_text("precious")
    for _ in range(2):
        with pytest.raises(Usage, match="exists already"):
            init.init(host, asked)
        assert Path(asked.backup).read_text() == "precious"


def test_a_wrong_password_does_not_restore_the_backup(host: Paths, chip: Swtpm) -> None:
    init.init(host, choices(host, chip))
    backup = Path(choices(host, chip).backup).read_bytes()
    with pytest.raises(UnlockError, match="password"):
        native.restore(backup, Secret(b"another"))
    for end in range(0, len(backup), 37):
        with pytest.raises(UnlockError):
            native.restore(backup[:end], Secret(PASSWORD))


def test_init_cut_off_at_any_tpm_command_finishes_when_run_again(
    tmp_path: Path, host: Paths, record_property: Callable[[str, object], None]
) -> None:
    for count in range(1, 200):
        with Swtpm(tmp_path / f"tpm-{count}") as chip:
            chip.proxy.cut_after(count)
            try:
                init.init(host, choices(host, chip))
                whole = True
            except UnlockError:
                whole = False
            chip.proxy.restore()
            chip.power_cycle()
            if not whole:
                init.init(host, choices(host, chip))
            with chip.open() as tpm:
                persistence = slots.unseal(tpm).payload.key
            unwrap_kdk(host, persistence)
            os.unlink(choices(host, chip).backup)
            os.unlink(host.state)
            if whole:
                record_property("shown", f"init: cut off after each of {count - 1} TPM commands, and run again")
                assert count > 20
                return
    raise AssertionError("init never ended")


def test_init_killed_at_any_step_finishes_when_run_again(tmp_path: Path, host: Paths, killer: Killer) -> None:
    with ExitStack() as chips:
        chip = Swtpm(tmp_path)

        def begin(attempt: int) -> Callable[[], object]:
            nonlocal chip
            chip = chips.enter_context(Swtpm(tmp_path / f"tpm-{attempt}"))
            return partial(init.init, host, choices(host, chip))

        for _, killed in killer(begin):
            chip.power_cycle()
            if killed:
                try:
                    init.init(host, choices(host, chip))
                except Refused as error:  # killed in its last step, it was whole
                    assert error.code == "initialised"
            with chip.open() as tpm, slots.unseal(tpm).payload.key as persistence:
                unwrap_kdk(host, persistence)
            os.unlink(choices(host, chip).backup)
            os.unlink(host.state)
            chips.close()


# Adopting a disk


@pytest.fixture
def enrolled(host: Paths, chip: Swtpm) -> Paths:
    init.init(host, choices(host, chip))
    return host


@pytest.fixture
def device(tmp_path: Path) -> Iterator[str]:
    """A LUKS2 disk of an operator, on a loop device."""
    path = tmp_path / "disk"
    with path.open("wb") as file:
        file.truncate(32 << 20)
    options = ["--batch-mode", "--type=luks2", "--pbkdf=pbkdf2", "--pbkdf-force-iterations=1000", "--key-file=-"]
    subprocess.run(["cryptsetup", "luksFormat", *options, path], input=b"operator", check=True)
    loop = subprocess.run(["losetup", "--find", "--show", path], capture_output=True, text=True, check=True)
    yield loop.stdout.strip()
    subprocess.run(["losetup", "--detach", loop.stdout.strip()], check=True)


def adopting(paths: Paths, device: str) -> Callable[[], object]:
    file = os.path.join(paths.root, "recovery")
    return partial(adopt_disk.adopt_disk, Paths(paths.root), device, "data", Secret(b"operator"), file)


def adopt(paths: Paths, device: str) -> int:
    return child(adopting(paths, device))


def opens_with(device: str, key: bytes) -> bool:
    command = ["cryptsetup", "open", "--test-passphrase", "--key-file=-", device]
    return subprocess.run(command, input=key, capture_output=True, check=False).returncode == 0


def test_adopting_leaves_the_operators_keyslot_and_adds_ours(enrolled: Paths, device: str) -> None:
    with luks.Container(device) as container:
        before = container.metadata["keyslots"]["0"]
    for _ in range(2):
        assert adopt(enrolled, device) == 0
        with luks.Container(device) as container:
            assert container.metadata["keyslots"]["0"] == before
            assert len(container.keyslots()) == 2
            assert len(container.tokens("unlock")) == 1
    recovery = Path(enrolled.root, "recovery").read_bytes().strip()
    assert opens_with(device, recovery)
    assert opens_with(device, b"operator")
    assert State.load(enrolled).groups["data"].manifest == 1


def test_adopting_with_a_wrong_passphrase_changes_nothing(enrolled: Paths, device: str) -> None:
    before = Path(device).read_bytes()
    with pytest.raises(UnlockError):
        adopt_disk.adopt_disk(enrolled, device, "data", Secret(b"wrong"), os.path.join(enrolled.root, "recovery"))
    assert Path(device).read_bytes() == before
    assert not State.load(enrolled).groups


def test_adopting_a_member_again_mends_its_token_and_its_keyslot(enrolled: Paths, device: str) -> None:
    assert adopt(enrolled, device) == 0
    recovery = Path(enrolled.root, "recovery").read_bytes().strip()
    with luks.Container(device) as container:
        for number, _ in container.tokens("unlock"):
            container.remove_token(number)
        container.remove_keyslot(disk_keys.recovery_keyslot(container, Secret(recovery))[0])
    assert not opens_with(device, recovery)
    assert adopt(enrolled, device) == 0
    assert opens_with(device, recovery)
    with luks.Container(device) as container:
        assert len(container.tokens("unlock")) == 1


def test_another_disk_cannot_take_the_place_of_one_whose_adoption_was_killed(
    enrolled: Paths, device: str, tmp_path: Path
) -> None:
    state = State.load(enrolled)
    state.begin(DiskAdoption("disk adopt", "/dev/other --group data", manifest=state.next_manifest("data")))
    with pytest.raises(Refused, match="disk adopt /dev/other --group data"):
        adopt_disk.adopt_disk(enrolled, device, "data", Secret(b"operator"), str(tmp_path / "recovery"))


def test_an_adoption_that_fails_is_undone_and_its_number_is_not_used_again(
    enrolled: Paths, device: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nothing is left half done, and other work may go on."""
    with monkeypatch.context() as patch:
        patch.setattr(luks, "_library", Failing("crypt_token_json_set"))
        assert adopt(enrolled, device) != 0
    assert State.load(enrolled).journal is None
    assert State.load(enrolled).next_manifest("data") == 2
    with luks.Container(device) as container:
        assert container.keyslots() == [0]
    assert opens_with(device, b"operator")
    assert adopt(enrolled, device) == 0


def test_adopting_with_another_hosts_recovery_key_is_refused(enrolled: Paths, device: str, tmp_path: Path) -> None:
    assert adopt(enrolled, device) == 0
    other = tmp_path / "other"
    recovery_key.write_new_file(str(other), recovery_key.new())
    with pytest.raises(Refused, match="not the recovery key"):
        membership.obtain_recovery_key(State.load(enrolled), keyring.get("unlock:persistence"), str(other))


@pytest.mark.parametrize("call", ["fsync", "rename", "write"])
def test_adopting_killed_at_any_step_finishes_when_run_again(
    enrolled: Paths, device: str, call: str, record_property: Callable[[str, object], None]
) -> None:
    """SIGKILL at the Nth call of each kind that makes something durable, then the same command again."""
    recovery = Path(enrolled.root, "recovery")
    saved = Saved(device, enrolled.state)

    def again() -> None:
        saved.restore()
        recovery.unlink(missing_ok=True)

    number, killed = 0, True
    while killed:
        again()
        number += 1
        killed = killed_in(call, number, adopting(enrolled, device))
        assert opens_with(device, b"operator"), f"killed at {call} {number}"
        assert adopt(enrolled, device) == 0, f"run again after {call} {number}"
        with luks.Container(device) as container:
            assert len(container.tokens("unlock")) == 1
        assert opens_with(device, recovery.read_bytes().strip())
        assert json.loads(Path(enrolled.state).read_text())["journal"] is None
    assert number > 2
    record_property("shown", f"disk adopt: killed at each of {number - 1} calls of {call}, and run again")


# A key manager from the start


def kmip_choices(paths: Paths, chip: Swtpm, kms: Liar, persistent: bool = True) -> init.InitChoices:
    ca = os.path.join(paths.root, "ca.pem")
    Path(ca).write_text(AUTHORITY.certificate)
    settings = config.ProviderConfig("kms", (f"127.0.0.1:{kms.port}",), ca, "", 10)
    client = init.KeyManager(settings, Client(CLIENT.certificate, Secret(CLIENT.key)), persistent)
    return init.InitChoices("", Secret(b""), ACCEPTED, (), Secret(b""), chip.tcti, client)


@pytest.mark.parametrize("persistent", [True, False])
def test_init_with_a_key_manager_needs_no_native_provider(
    host: Paths, chip: Swtpm, kms: Liar, persistent: bool
) -> None:
    init.init(host, kmip_choices(host, chip, kms, persistent))
    state = State.load(host)
    assert state.provider.kind == "kmip"
    assert (state.others, state.persistent, state.journal) == ({}, persistent, None)
    (key,) = kms.keys.values()
    assert key.names == [f"unlock/{state.host}/host/1"]
    assert keyring.get("unlock:host").value == key.material
    with chip.open() as tpm:
        persistence = slots.unseal(tpm).payload.key
    kept = state.host_key(persistence)
    assert (bytes(kept) if kept else None) == (key.material if persistent else None)
    client_key = state.client_key(persistence, state.provider)
    assert client_key and bytes(client_key) == CLIENT.key
    for path in Path(host.root).rglob("*"):
        content = path.read_bytes() if path.is_file() else b""
        assert CLIENT.key.splitlines()[1] not in content, path
    assert [line.outcome for line in sync.sync(host)] == ["unchanged"]


def test_init_with_a_key_manager_that_wants_a_password(host: Paths, chip: Swtpm, kms: Liar) -> None:
    kms.credential = ("host-1", "of the client")
    choices = kmip_choices(host, chip, kms)
    assert choices.kms
    with_user = choices.kms._replace(settings=choices.kms.settings._replace(username="host-1"))
    with pytest.raises(ClientAuth):
        init.init(host, choices._replace(kms=with_user))
    client = with_user.client._replace(password=Secret(b"of the client"))
    init.init(host, choices._replace(kms=with_user._replace(client=client)))
    assert [line.outcome for line in sync.sync(host)] == ["unchanged"]
    for path in Path(host.root).rglob("*"):
        assert b"of the client" not in (path.read_bytes() if path.is_file() else b""), path


@pytest.mark.parametrize("fault", ["silent", "denied", "zero key"])
def test_init_with_a_key_manager_that_fails_starts_over(host: Paths, chip: Swtpm, kms: Liar, fault: str) -> None:
    kms.lie(fault, on="Get")
    for _ in range(2):
        with pytest.raises(UnlockError):
            init.init(host, kmip_choices(host, chip, kms))
    kms.honest()
    init.init(host, kmip_choices(host, chip, kms))
    assert len(kms.keys) == 1, "the key of the attempts that failed"
    with chip.open() as tpm:
        assert keyring.get("unlock:persistence") == slots.unseal(tpm).payload.key


def test_a_disk_is_adopted_under_a_key_managers_kek(host: Paths, chip: Swtpm, kms: Liar, device: str) -> None:
    init.init(host, kmip_choices(host, chip, kms))
    for _ in range(2):
        assert adopt(host, device) == 0
    state = State.load(host)
    group = state.groups["data"]
    assert group.kek_name == f"unlock/{state.host}/kek/data/1"
    kms.stop()
    with luks.Container(device) as container:
        (token,) = disk_keys.read_tokens(container, state.host)
        persistence = keyring.get("unlock:persistence")
        with (
            disk_keys.unwrap_volume_key(container, token, persistence) as dek,
            container.volume_key(Secret(b"operator")) as same,
        ):
            assert dek == same
    assert adopt(host, device) == 0, "the disk carries its KEK: no key manager is asked"


def test_a_new_group_without_its_key_manager_leaves_the_disk_alone(
    host: Paths, chip: Swtpm, kms: Liar, device: str
) -> None:
    init.init(host, kmip_choices(host, chip, kms))
    kms.stop()
    assert adopt(host, device) != 0
    assert State.load(host).journal is None
    with luks.Container(device) as container:
        assert not container.tokens("unlock")
    kms.start()
    assert adopt(host, device) == 0
