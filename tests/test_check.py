# SPDX-License-Identifier: Apache-2.0
"""Is it safe to reboot? Real headers, a software TPM, a key manager, initramfs images; directories for /proc, /sys."""

import gzip
import json
import os
import struct
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests import eventlogs, pefile
from tests.flowfixture import HOST, Host
from tests.kmipfixture import AUTHORITY
from tests.lab.kmipliar import Liar
from tests.test_devices import Machine
from tests.tpmfixture import Swtpm
from unlock.boot import unmeasured
from unlock.disks import disk_keys, luks, token
from unlock.errors import CommandFailed, UnlockError
from unlock.host import keyring, report, report_file
from unlock.host.journal import Rekey
from unlock.keys import recovery_key, rotation
from unlock.operations import baseline, check, recovery
from unlock.operations.check.finding import NOTE, SAFE, UNPROVEN, UNSAFE
from unlock.predict import initramfs_images
from unlock.predict.boot_tree import BootTree
from unlock.secret import Secret
from unlock.tpm import pcr_policy, slots
from unlock.tpm.record import RECORD_VERSION, SLOTS, Needs, Payload

pytestmark = [pytest.mark.usefixtures("key_cache"), pytest.mark.root]

CODE = "usr/lib/unlock/unlock/boot/agent.pyc"
READS = ("usr/lib/unlock/reads/token-1", "usr/lib/unlock/reads/record-1")


def findings(world: "World") -> dict[str, tuple[str, str, str]]:
    """All that is found: what -> verdict, detail, command."""
    found = check.check(world.host.paths, world.chip.tcti, world.host.look)
    return {each.what: (each.verdict, each.detail, each.do) for each in found.findings}


class World:
    """A host that is well: two disks, a sealed key, an image with unlock in it, an encrypted root."""

    def __init__(self, folder: Path, chip: Swtpm, *kms: Liar, policy_of_group: str = "persistent") -> None:
        self.host = Host(folder, 2, *kms, policy_of_group=policy_of_group)
        self.chip = chip
        self.root = folder / "root"
        self.machine = Machine(self.root)
        self.machine.block("sda", "8:0")
        self.machine.block("sdb", "8:16")
        self.machine.mapping("data-0", "253:0", "CRYPT-LUKS2-" + "0" * 32 + "-data-0", "sda")
        self.machine.mount("253:0", "/", "/dev/mapper/data-0", "ext4")
        self.image("6.12.1-amd64", CODE, *READS)
        selection = pcr_policy.select((7,))
        with chip.open() as tpm:
            branch = pcr_policy.branch(selection, tpm.read_pcrs(selection))
            slots.seal_slot(
                tpm,
                bytes.fromhex(HOST),
                selection,
                (branch,),
                Payload(Secret(bytes(self.host.persistence)), needs=Needs.of(["data-0"])),
            )

    def image(self, version: str, *names: str) -> None:
        """An initramfs with these files in it."""
        tree = self.root / "tree"
        for name in names:
            (tree / name).parent.mkdir(parents=True, exist_ok=True)
            (tree / name).touch()
        (self.root / "boot").mkdir(exist_ok=True)
        made = subprocess.run(
            ["cpio", "--quiet", "-o", "-H", "newc"], input="\n".join(names).encode(), capture_output=True, cwd=tree
        )
        (self.root / f"boot/initrd.img-{version}").write_bytes(gzip.compress(made.stdout))

    def write(self, name: str, text: str) -> None:
        path = self.root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)

    def check(self) -> tuple[str, dict[str, tuple[str, str]]]:
        """The verdict, and what is not safe."""
        found = check.check(self.host.paths, self.chip.tcti, self.host.look)
        again = check.check(self.host.paths, self.chip.tcti, self.host.look)
        assert json.loads(json.dumps(check.to_json(found))) == json.loads(json.dumps(check.to_json(again)))
        said = check.to_text(found)
        assert said.isprintable() or all(line.isprintable() for line in said.splitlines())
        assert said.splitlines()[-1].startswith(found.verdict)
        return found.verdict, {
            each.what: (each.verdict, each.detail) for each in found.findings if each.verdict not in (SAFE, NOTE)
        }


@pytest.fixture
def chip(tmp_path: Path) -> Iterator[Swtpm]:
    with Swtpm(tmp_path / "tpm") as chip:
        yield chip


@pytest.fixture
def world(tmp_path: Path, chip: Swtpm) -> World:
    return World(tmp_path, chip)


def test_a_host_that_is_well_is_safe_and_nothing_is_written(world: World) -> None:
    def contents() -> dict[Path, bytes]:
        return {path: path.read_bytes() for path in world.host.folder.rglob("*") if path.is_file()}

    world.chip.proxy.clear()
    before = contents()
    found = check.check(world.host.paths, world.chip.tcti, world.host.look)
    assert (found.verdict, world.check()) == (SAFE, (SAFE, {}))
    assert {each.what for each in found.findings} == {
        "TPM",
        "next boot",
        "group data",
        "root",
        "initrd.img-6.12.1-amd64",
        "recovery key",
        "core dumps",
    }
    assert {name for name, data in contents().items() if before.get(name) != data} <= {
        world.chip.state / "tpm2-00.permall"
    }
    assert not {"Unseal", "NV_Write", "Create", "EvictControl"} & set(world.chip.proxy.commands)


def test_a_missing_disk_keeps_its_whole_group_closed(world: World) -> None:
    world.host.disks.pop()
    verdict, wrong = world.check()
    assert verdict == UNSAFE
    assert list(wrong) == ["group data, disk data-1"] and "not here" in wrong["group data, disk data-1"][1]


@pytest.mark.parametrize("at", [0, 448, 0x4000, 0x4000 + 4096])
def test_a_header_with_one_good_copy_is_told_until_it_is_repaired(world: World, at: int) -> None:
    image = world.host.disks[1]
    with image.open("r+b") as file:
        file.seek(at)
        file.write(bytes(64))
    before = image.read_bytes()

    def notes() -> list[tuple[str, str]]:
        found = check.check(world.host.paths, world.chip.tcti, world.host.look)
        assert found.verdict == SAFE
        return [(each.what, each.do) for each in found.findings if "copies" in each.detail]

    assert notes() == [("group data, disk data-1", f"cryptsetup repair {image}")]
    assert image.read_bytes() == before
    subprocess.run(notes()[0][1].split(), check=True, input=b"YES\n", capture_output=True)
    assert notes() == []


def test_two_disks_of_one_uuid_are_neither(world: World) -> None:
    copy = world.host.folder / "copy"
    copy.write_bytes(world.host.disks[0].read_bytes())
    world.host.disks.append(copy)
    verdict, wrong = world.check()
    assert verdict == UNSAFE and "several disks" in wrong["group data, disk data-0"][1]


def test_a_token_that_another_key_wrapped(world: World) -> None:
    path = str(world.host.disks[0])
    with luks.Container(path) as container:
        [(number, fields)] = container.tokens(token.TYPE)
        each = token.decode(fields)
        container.set_token(token.encode(each._replace(kek=bytes(reversed(each.kek)))), number)
    verdict, wrong = world.check()
    assert verdict == UNSAFE and wrong["group data, disk data-0"][0] == UNSAFE


def test_a_disk_of_an_older_member_list(world: World) -> None:
    with world.host.work() as work:
        group = work.state.groups["data"]
        work.state.groups["data"] = group._replace(manifest=group.manifest + 1)
        work.state.save()
    verdict, wrong = world.check()
    assert verdict == UNSAFE and "as it is now" in wrong["group data"][1]


def test_an_empty_key_cache_proves_nothing(world: World) -> None:
    keyring.flush()
    verdict, wrong = world.check()
    assert verdict == UNPROVEN and "cache is empty" in wrong["group data"][1]


def test_a_tpm_that_was_cleared_or_is_gone(world: World) -> None:
    world.chip.kill()
    os.unlink(world.chip.state / "tpm2-00.permall")
    world.chip.start()
    verdict, wrong = world.check()
    assert verdict == UNSAFE and "nothing of this host" in wrong["TPM"][1]
    world.chip.kill()
    found = check.check(world.host.paths, world.chip.tcti, world.host.look)
    assert found.verdict == UNSAFE and found.findings[0].what == "TPM"


def test_a_tpm_that_serves_another_installation(world: World) -> None:
    with world.chip.open() as tpm, Secret.random(32) as key:
        branch = pcr_policy.branch((7,), tpm.read_pcrs((7, 15)))
        slots.seal_slot(tpm, b"another host....", (7,), (branch,), Payload(key), replace=True)
    verdict, wrong = world.check()
    assert verdict == UNSAFE and "another installation" in wrong["TPM"][1]


def test_after_a_refused_boot_the_next_is_refused_too(world: World) -> None:
    early = report.Report("early-boot")
    early.set_verdict("pcr-mismatch")
    Path(world.host.paths.of_this_boot("report.json")).write_bytes(report_file.encode(early))
    verdict, wrong = world.check()  # sealed since then, to what this boot has measured
    assert verdict == UNPROVEN and "has not been asked yet" in wrong["this boot"][1]
    world.chip.extend(7)
    verdict, wrong = world.check()
    assert verdict == UNSAFE and list(wrong) == ["this boot"]


def test_a_tpm_that_does_not_know_the_root(world: World) -> None:
    def said() -> list[str]:
        found = check.check(world.host.paths, world.chip.tcti, world.host.look)
        return [each.detail for each in found.findings if (each.what, each.verdict) == ("TPM", NOTE)]

    assert not said()
    with world.chip.open() as tpm:
        unsealed = slots.unseal(tpm)
        payload = unsealed.payload._replace(needs=Needs())
        slots.seal_slot(tpm, unsealed.record.host, unsealed.record.selection, unsealed.record.branches, payload)
    assert ["does not say which disks the root needs" in each for each in said()] == [True]


def test_an_operation_that_was_stopped(world: World) -> None:
    with world.host.work() as work:
        work.state.begin(Rekey("rekey", "data", generation=2, made=None, theirs=False))
    assert world.check()[0] == UNPROVEN


def test_the_newest_image_needs_unlock_and_the_formats_that_are_in_use(world: World) -> None:
    world.image("6.9.3-amd64", "bin/sh")  # an older kernel's
    found = check.check(world.host.paths, world.chip.tcti, world.host.look)
    assert found.verdict == SAFE
    assert [each.detail for each in found.findings if each.what == "initrd.img-6.9.3-amd64"] == ["unlock is not in it"]
    world.image("6.13.0-amd64", CODE, READS[0])
    verdict, wrong = world.check()
    assert verdict == UNSAFE and "does not read records of version 1" in wrong["initrd.img-6.13.0-amd64"][1]
    world.image("6.13.0-amd64", "bin/sh")
    assert world.check()[1]["initrd.img-6.13.0-amd64"] == (UNSAFE, "unlock is not in it")
    (world.root / "boot/initrd.img-6.13.0-amd64").write_bytes(b"\x1f\x8bnot an image")
    assert world.check()[0] == UNSAFE
    for image in (world.root / "boot").iterdir():
        image.unlink()
    assert world.check()[0] == UNPROVEN


def test_where_a_pin_is_set_the_image_must_read_that_and_ask(world: World) -> None:
    auth = pcr_policy.pin_auth(bytes.fromhex(HOST), Secret(b"4711"))
    with world.chip.open() as tpm:
        unsealed = slots.unseal(tpm)
        record = unsealed.record
        slots.seal_slot(tpm, record.host, record.selection, record.branches, unsealed.payload, pin_auth=auth)
    what, newer, asks = "initrd.img-6.12.1-amd64", "usr/lib/unlock/reads/record-2", "usr/lib/cryptsetup/askpass"
    assert "does not read records of version 2" in world.check()[1][what][1]
    world.image("6.12.1-amd64", CODE, READS[0], newer)
    assert "asks for the PIN" in world.check()[1][what][1]
    world.image("6.12.1-amd64", CODE, READS[0], newer, asks)
    verdict, wrong = world.check()
    assert verdict == SAFE and what not in wrong
    world.chip.set_lockout(1, 1234)
    with world.chip.open() as tpm, pytest.raises(UnlockError):
        slots.unseal(tpm, lambda _: Secret(b"another"))
    verdict, wrong = world.check()
    assert verdict == UNSAFE and "forgets one in 1234 s" in wrong["PIN"][1]


def test_an_image_must_read_the_tokens_that_are_there_and_no_newer_ones(world: World) -> None:
    """READS is what an earlier unlock reads."""
    what = "initrd.img-6.12.1-amd64"
    assert world.check() == (SAFE, {})
    with world.host.work() as work:
        rotation.set_degraded(work, work.state.groups["data"], True)
    assert world.check() == (UNSAFE, {what: (UNSAFE, "the unlock in it does not read tokens of version 2")})
    world.image("6.12.1-amd64", CODE, READS[1], "usr/lib/unlock/reads/token-2")
    assert world.check() == (SAFE, {})
    world.image("6.12.1-amd64", CODE, *READS)
    with world.host.work() as work:
        rotation.set_degraded(work, work.state.groups["data"], False)
    assert world.check() == (SAFE, {})


def test_the_manifest_says_which_formats_the_code_reads() -> None:
    manifest = (Path(__file__).parents[1] / "initramfs/manifest").read_text()
    names = {line.split()[1] for line in manifest.splitlines() if line.startswith("reads ")}
    assert names == {f"token-{token.VERSION}", f"record-{RECORD_VERSION}"}


def test_a_recovery_key_that_was_tested_and_one_that_is_another_by_now(world: World) -> None:
    def said() -> str:
        found = check.check(world.host.paths, world.chip.tcti, world.host.look)
        return next(each.detail for each in found.findings if each.what == "recovery key")

    assert said() == "tested on 0 of 2 disk(s)"
    recovery.test_recovery_key(world.host.paths, world.host.recovery, world.host.look)
    assert said() == "tested on every disk"
    with world.host.work() as work:
        work.state.recovery.behind["uuid"] = ""
        work.state.save()
    assert world.check() == (
        UNPROVEN,
        {"recovery key": (UNPROVEN, "some disks still have an earlier one")},
    )


def cryptsetup(*command: object, key: bytes = b"") -> None:
    subprocess.run(["cryptsetup", "--batch-mode", *map(str, command)], input=key, check=True, capture_output=True)


def change_key(image: Path, recovery: bytes) -> None:
    fast = ("--pbkdf", "pbkdf2", "--pbkdf-force-iterations", "1000")
    (image.parent / "old").write_bytes(recovery)
    cryptsetup("luksChangeKey", *fast, "--key-slot", "0", "--key-file", image.parent / "old", image, key=b"another\n")


KEYSLOT_CHANGES: dict[str, Callable[[Path, bytes], None]] = {
    "erased": lambda image, _: cryptsetup("luksErase", image),
    "killed": lambda image, _: cryptsetup("luksKillSlot", image, "0"),
    "changed": change_key,
    "restored": lambda image, _: cryptsetup(
        "luksHeaderRestore", "--header-backup-file", image.parent / "header", image
    ),
}


@pytest.mark.parametrize("change", KEYSLOT_CHANGES)
def test_a_recovery_key_whose_keyslot_went_after_the_test(world: World, change: str) -> None:
    image = world.host.disks[1]
    recovery.test_recovery_key(world.host.paths, world.host.recovery, world.host.look)
    assert world.check() == (SAFE, {})
    cryptsetup("luksHeaderBackup", "--header-backup-file", image.parent / "header", image)
    if change == "restored":  # from a time when the keyslot was another
        with luks.Container(str(image)) as container, Secret(world.host.deks[container.uuid]) as dek:
            container.remove_keyslot(0)
            container.add_keyslot(dek, passphrase=world.host.recovery)
        assert recovery.test_recovery_key(world.host.paths, world.host.recovery, world.host.look)[1].outcome == "ok"
    KEYSLOT_CHANGES[change](image, bytes(world.host.recovery))
    verdict, wrong = world.check()
    assert (verdict, wrong) == (
        UNPROVEN,
        {"recovery key": (UNPROVEN, "its keyslot is gone from data-1, or was changed")},
    )
    recovery.renew_keyslots(world.host.paths, world.host.recovery, world.host.look)
    assert world.check() == (SAFE, {})


def test_a_test_that_fails_takes_the_word_back(world: World) -> None:
    recovery.test_recovery_key(world.host.paths, world.host.recovery, world.host.look)
    recovery.test_recovery_key(world.host.paths, recovery_key.new(), world.host.look)
    assert findings(world)["recovery key"][1] == "tested on 0 of 2 disk(s)"
    recovery.test_recovery_key(world.host.paths, world.host.recovery, world.host.look)
    away = world.host.disks.pop()
    recovery.test_recovery_key(world.host.paths, world.host.recovery, world.host.look)
    assert findings(world)["recovery key"][1] == "tested on 1 of 2 disk(s)", "it cannot be looked at"
    world.host.disks.append(away)
    assert findings(world)["recovery key"][1] == "tested on every disk"


def test_a_loaded_kexec_kernel(world: World) -> None:
    world.write("sys/kernel/kexec_loaded", "1\n")
    verdict, wrong = world.check()
    assert verdict == UNSAFE and list(wrong) == ["kexec"]


@pytest.mark.parametrize(("number", "verdict"), [("0:0", SAFE), ("253:1", SAFE), ("8:16", UNSAFE), ("9:9", UNSAFE)])
def test_hibernation_only_to_an_encrypted_disk(world: World, number: str, verdict: str) -> None:
    world.machine.mapping("vg-swap", "253:1", "LVM-abc", "dm-0")
    world.write("sys/power/resume", f"{number}\n")
    assert world.check()[0] == verdict


def test_hibernation_to_a_disk_that_somebody_else_opens(world: World) -> None:
    world.machine.mapping("swap", "253:1", "CRYPT-LUKS2-" + "1" * 32 + "-swap", "sdb")
    world.write("sys/power/resume", "253:1\n")
    verdict, _ = world.check()
    assert verdict == SAFE
    assert findings(world)["hibernation"][0] == NOTE


def test_file_systems_beside_the_root_are_named(world: World) -> None:
    """/var on a plain disk runs as root too; what has no content of its own, or is a group's, is no matter."""
    world.machine.mount("8:16", "/var", "/dev/sdb", "ext4")
    world.machine.mount("0:40", "/usr/local", "server:/export", "nfs4")
    world.machine.mount("0:41", "/var/tmp", "tmpfs", "tmpfs")
    world.machine.mount("8:16", "/srv", "/dev/sdb", "ext4")
    world.machine.mount("253:0", "/var/lib/data", "/dev/mapper/data-0", "ext4")
    named = {what: verdict for what, (verdict, *_) in findings(world).items() if what.startswith("/")}
    assert named == {"/var": NOTE, "/usr/local": NOTE}


def test_what_systemd_obeys_beside_the_command_line(world: World) -> None:
    world.write(f"sys/firmware/efi/efivars/{unmeasured.OPTIONS}", "x")
    assert findings(world)["systemd"][0] == NOTE  # the next boot deletes it
    (world.root / f"sys/firmware/efi/efivars/{unmeasured.OPTIONS}").unlink()
    world.write("sys/firmware/dmi/tables/DMI", "io.systemd.credential:passwd.hashed-password.root=x")
    verdict, wrong = world.check()
    assert verdict == UNSAFE and "passwd.hashed-password.root" in wrong["systemd"][1]
    world.write("proc/cmdline", "root=/dev/mapper/root systemd.import_credentials=no\n")
    assert world.check() == (SAFE, {})


@pytest.mark.parametrize(("password", "said"), [("", True), ("!", False), ("$y$j9T$abc", False)])
def test_a_console_that_gives_a_shell_without_a_password(world: World, password: str, said: bool) -> None:
    world.write("etc/shadow", f"daemon::1::::::\nroot:{password}:20000:0:99999:7:::\n")
    assert ("console" in findings(world)) == said
    world.write("etc/systemd/system/emergency.service.d/x.conf", "[Service]\nEnvironment=SYSTEMD_SULOGIN_FORCE=1\n")
    assert findings(world)["console"][0] == NOTE


def test_a_root_that_somebody_else_opens(world: World) -> None:
    world.machine.mapping("luks-root", "253:1", "CRYPT-LUKS2-" + "1" * 32 + "-luks-root", "sdb")
    world.machine.mount("253:1", "/", "/dev/mapper/luks-root", "ext4")
    verdict, wrong = world.check()
    assert (verdict, list(wrong)) == (UNSAFE, ["root"]) and "closes all disks" in wrong["root"][1]


def test_a_plain_root_is_safe_only_when_it_was_accepted(world: World) -> None:
    """Early boot gives it no keys, and closes what it has opened: as handover.hand_over does."""
    world.machine.mount("8:16", "/", "/dev/sdb", "ext4")
    assert world.check()[1]["root"][0] == UNSAFE
    with world.host.work() as work:
        work.state.tpm = work.state.tpm._replace(unauthenticated_root=True)
        work.state.save()
    assert world.check() == (SAFE, {})


def test_a_power_cut_while_the_policy_was_replaced_leaves_the_other_slot(world: World) -> None:
    class Cut:
        def encode(self) -> bytes:
            return bytes(448)

    with world.chip.open() as tpm:
        [other] = [slot for slot in SLOTS if slot != slots.current_slot(tpm)[0]]
        tpm.write_record(other, Cut())  # type: ignore[arg-type]
        assert slots.unseal(tpm).slot != other
    assert world.check() == (SAFE, {})


def test_kexec_tools_that_load_a_kernel_at_shutdown(world: World) -> None:
    world.write("etc/default/kexec", "# kexec-tools\nLOAD_KEXEC=false\nKERNEL_IMAGE=/vmlinuz\n")
    assert world.check() == (SAFE, {})
    world.write("etc/default/kexec", "LOAD_KEXEC=true\n")
    verdict, wrong = world.check()
    assert verdict == UNSAFE and list(wrong) == ["kexec"]


def test_a_configuration_that_nobody_can_read_mounts_nothing(world: World) -> None:
    world.write("etc/unlock/unlock.toml", "[group.data\n")
    verdict, wrong = world.check()
    assert verdict == UNSAFE and list(wrong) == ["unlock.toml"]


def test_each_wrong_table_of_the_configuration_is_named(world: World) -> None:
    world.write("etc/unlock/unlock.toml", "[group.data]\nmount = '/srv'\n[group.bad]\noptions = ['x']\n[gruop.more]\n")
    found = check.check(world.host.paths, world.chip.tcti, world.host.look)
    wrong = [each.detail for each in found.findings if each.what == "unlock.toml"]
    assert wrong == [
        "group bad is not mounted: unlock.toml: group.bad.options is not a str",
        "unlock.toml: gruop is not a known setting",
    ]
    assert found.verdict == UNSAFE


GLOBAL, SHIM = "8be4df61-93ca-11d2-aa0d-00e098032b8c", "605dab50-e046-4300-abb6-3dd810dd8b23"
IMAGE_SECURITY = "d719b2cb-3d3a-4596-a3bc-dad00e67656f"


def set_variable(world: World, name: str, data: bytes, vendor: str = GLOBAL) -> None:
    world.write(f"sys/firmware/efi/efivars/{name}-{vendor}", "")
    (world.root / f"sys/firmware/efi/efivars/{name}-{vendor}").write_bytes(b"\7\0\0\0" + data)


def measured(world: World, *events: eventlogs.Entry) -> None:
    log = world.root / "sys/kernel/security/tpm0/binary_bios_measurements"
    log.parent.mkdir(parents=True, exist_ok=True)
    log.write_bytes(eventlogs.log(list(events)))
    baseline.record_good_boot(world.host.paths, world.chip.tcti, first=True)  # init


def test_the_firmware_is_told_to_start_something_else(world: World) -> None:
    """A firmware update that waits, another system that put itself first: the log has the order of this boot."""
    entry = b"\1\0\0\0\2\0D\0\0\0pp"
    measured(
        world,
        eventlogs.variable(1, "BootOrder", b"\2\0\1\0", 0x80000002),
        eventlogs.variable(1, "Boot0001", entry, 0x80000002),
    )
    set_variable(world, "BootCurrent", b"\1\0")
    set_variable(world, "BootOrder", b"\2\0\1\0")
    set_variable(world, "Boot0001", entry)
    set_variable(world, "OsIndications", bytes(8))
    assert world.check() == (SAFE, {})
    set_variable(world, "BootNext", b"\1\0")
    assert world.check() == (SAFE, {})
    for name, data, good, why in (
        ("BootNext", b"\3\0", b"\1\0", "start Boot0003 once"),
        ("BootOrder", b"\3\0\2\0\1\0", b"\2\0\1\0", "its boot order has changed"),
        ("Boot0001", entry + b"options", entry, "its boot entry Boot0001 has changed"),
        ("OsIndications", b"\4" + bytes(7), bytes(8), "an update of it waits"),
        ("OsIndications", b"\1" + bytes(7), bytes(8), "its setup"),
    ):
        set_variable(world, name, data)
        verdict, wrong = world.check()
        assert verdict == UNPROVEN and why in wrong["firmware"][1]
        set_variable(world, name, good)
    assert world.check() == (SAFE, {})


def test_this_boot_was_chosen_by_hand_and_another_comes_by_itself(world: World) -> None:
    """At the firmware's menu, for once. What comes first and cannot start, the network or a disk that was taken out,
    is no reason for doubt; nor is a second entry for the same file."""

    def option(path: bytes, attributes: int = 1) -> bytes:
        return struct.pack("<IH", attributes, len(path)) + "x\0".encode("utf-16-le") + path

    shim = eventlogs.file_path("\\EFI\\debian\\shimx64.efi")
    other = eventlogs.file_path("\\EFI\\other\\grubx64.efi")
    world.write("boot/efi/EFI/debian/shimx64.efi", "")
    network = struct.pack("<BBH", 3, 11, 37) + bytes(33) + struct.pack("<BBH", 0x7F, 0xFF, 4)
    for name, data in {"1": option(shim), "2": option(network), "3": option(other), "4": option(shim)}.items():
        set_variable(world, f"Boot000{name}", data)
    set_variable(world, "BootCurrent", b"\1\0")
    set_variable(world, "BootOrder", b"\2\0\3\0\4\0\1\0")
    assert world.check() == (SAFE, {})
    world.write("boot/efi/EFI/OTHER/GRUBX64.EFI", "")
    verdict, wrong = world.check()
    assert verdict == UNPROVEN and "Boot0003, boot/efi/EFI/OTHER/GRUBX64.EFI, comes before it" in wrong["firmware"][1]
    set_variable(world, "Boot0003", option(other, 0))
    assert world.check() == (SAFE, {})
    set_variable(world, "Boot0003", option(other))
    set_variable(world, "BootOrder", b"\1\0\3\0")
    assert world.check() == (SAFE, {})
    set_variable(world, "BootOrder", b"\2\0\3\0")
    verdict, wrong = world.check()
    assert verdict == UNPROVEN and "Boot0001, which is not in its boot order" in wrong["firmware"][1]
    set_variable(world, "BootNext", b"\1\0")
    assert world.check() == (SAFE, {}), "it is told to start it again"


def test_keys_of_secure_boot_were_updated_and_the_next_boot_measures_that(world: World) -> None:
    """fwupd writes dbx, mokutil leaves a request for MokManager; both while the host runs."""
    revoked = eventlogs.signature_list(eventlogs.SHA256, [bytes(32)])
    dbx = eventlogs.variable(7, "dbx", revoked, vendor=eventlogs.IMAGE_SECURITY)
    measured(world, dbx)
    set_variable(world, "dbx", revoked, IMAGE_SECURITY)
    assert world.check() == (SAFE, {})
    set_variable(world, "dbx", revoked * 2, IMAGE_SECURITY)
    verdict, wrong = world.check()
    assert verdict == UNSAFE and "dbx was updated" in wrong["Secure Boot"][1]
    set_variable(world, "dbx", revoked, IMAGE_SECURITY)
    set_variable(world, "MokNew", b"x", SHIM)
    assert world.check() == (SAFE, {}), "PCRs 4 and 14 are not in the policy"
    selection = pcr_policy.select((7, 14))
    with world.chip.open() as tpm:
        unsealed = slots.unseal(tpm)
        branch = pcr_policy.branch(selection, tpm.read_pcrs(selection))
        slots.seal_slot(tpm, unsealed.record.host, selection, (branch,), unsealed.payload)
    assert world.check()[0] != UNSAFE, "without shim there is no MokManager"
    measured(world, dbx, eventlogs.shim(14, "MokList", b"keys"))
    verdict, wrong = world.check()
    assert verdict == UNSAFE and "MokManager comes first (MokNew)" in wrong["Secure Boot"][1]
    (world.root / f"sys/firmware/efi/efivars/MokNew-{SHIM}").unlink()
    assert "Secure Boot" not in world.check()[1]
    set_variable(world, "MokListTrustedNew", b"x", SHIM)
    assert "MokManager comes first (MokListTrustedNew)" in world.check()[1]["Secure Boot"][1]
    (world.root / f"sys/firmware/efi/efivars/MokListTrustedNew-{SHIM}").unlink()
    set_variable(world, "SbatPolicy", b"\1", SHIM)
    verdict, why = world.check()[1]["Secure Boot"]
    assert verdict == UNPROVEN and "SbatPolicy" in why
    measured(world, dbx)
    assert "Secure Boot" not in world.check()[1], "without shim nobody reads it"


def test_an_initramfs_that_nothing_measures_is_told(world: World) -> None:
    """PCRs 4 and 9 have the kernel and its command line, and no event says that the initramfs was measured."""
    (world.root / "sys/firmware/efi").mkdir(parents=True)
    with world.chip.open() as tpm:
        for pcr in (4, 9):
            tpm.extend(pcr, bytes(32))
    found = check.check(world.host.paths, world.chip.tcti, world.host.look)
    assert found.verdict == SAFE
    assert next(each.detail for each in found.findings if each.what == "initramfs").startswith("nothing measures it")


def test_a_mount_point_that_fstab_has_too(world: World) -> None:
    world.write("etc/unlock/unlock.toml", 'version = 1\n[group.data]\nmount = "/srv"\n')
    assert world.check() == (SAFE, {})
    world.write("etc/fstab", "LABEL=x /srv ext4 defaults 0 0\n")
    verdict, wrong = world.check()
    assert verdict == UNSAFE and "/etc/fstab or another group has /srv" in wrong["unlock.toml"][1]


def test_a_mount_point_that_no_group_can_have(world: World) -> None:
    world.write("etc/unlock/unlock.toml", 'version = 1\n[group.data]\nmount = "/var"\n')
    verdict, wrong = world.check()
    assert verdict == UNSAFE and "/var is needed before groups are mounted" in wrong["unlock.toml"][1]


def test_a_data_group_that_holds_what_its_gate_waits_for(world: World) -> None:
    world.machine.mapping("vg-var", "253:1", "LVM-1", "dm-0")
    world.machine.mount("253:1", "/var", "/dev/mapper/vg-var")
    assert world.check() == (SAFE, {}), "it is opened with the root, in early boot"
    world.machine.mount("8:16", "/", "/dev/sdb")
    assert "data-0 holds /var, which its gate waits for" in world.check()[1]["group data"][1]


def test_the_initramfs_in_a_unified_kernel_image(world: World) -> None:
    good = (world.root / "boot/initrd.img-6.12.1-amd64").read_bytes()
    image = world.root / "boot/efi/EFI/Linux/debian.efi"
    image.parent.mkdir(parents=True)
    image.write_bytes(pefile.build({".linux": b"kernel", ".initrd": good}))
    assert initramfs_images.read_contents(BootTree(world.host.paths), "boot/efi/EFI/Linux/debian.efi").unlock
    image.write_bytes(pefile.build({".linux": b"kernel"}))
    for data in (b"", b"MZ", image.read_bytes()):
        image.write_bytes(data)
        with pytest.raises(CommandFailed):
            initramfs_images.read_contents(BootTree(world.host.paths), "boot/efi/EFI/Linux/debian.efi")


def test_pcrs_of_files_where_nothing_measures_the_kernel(world: World) -> None:
    """A new boot loader changes PCR 4, whatever measures the kernel."""
    selection = pcr_policy.select((4, 7))
    with world.chip.open() as tpm:
        branch = pcr_policy.branch(selection, tpm.read_pcrs(selection))
        payload = Payload(Secret(bytes(world.host.persistence)))
        slots.seal_slot(tpm, bytes.fromhex(HOST), selection, (branch,), payload)
    assert world.check()[1]["next boot"][0] == UNPROVEN


def test_a_group_that_only_the_key_manager_opens(tmp_path: Path, chip: Swtpm) -> None:
    with Liar(AUTHORITY) as kms:
        world = World(tmp_path, chip, kms, policy_of_group="provider")
        verdict, wrong = world.check()
        assert (verdict, list(wrong)) == (UNPROVEN, ["group data"])
        assert "key manager" in wrong["group data"][1]
    verdict, wrong = world.check()
    assert (verdict, sorted(wrong)) == (UNPROVEN, ["group data", "provider kms"])


def test_a_key_manager_that_nobody_needs_may_be_away(tmp_path: Path, chip: Swtpm) -> None:
    with Liar(AUTHORITY) as kms:
        world = World(tmp_path, chip, kms)
        assert world.check() == (SAFE, {})
    assert world.check() == (SAFE, {})


def test_check_agrees_with_what_the_next_boot_finds(world: World) -> None:
    """SAFE for a disk means: the sealed key gives its volume key."""
    assert world.check()[0] == SAFE
    world.chip.power_cycle()
    with world.chip.open() as tpm:
        unsealed = slots.unseal(tpm)
    for image in world.host.disks:
        with luks.Container(str(image)) as container:
            [each] = disk_keys.read_tokens(container, unsealed.record.host.hex())
            with disk_keys.unwrap_volume_key(container, each, unsealed.payload.key) as dek:
                container.verify_volume_key(dek)
