# SPDX-License-Identifier: Apache-2.0
"""An update, the prediction, the next boot: event logs of real boots by shim and GRUB, on a software TPM.

Kernels and initramfs files are too large to be kept: small ones take their place, on disk and in the log.
"""

import datetime
import gzip
import json
import re
import struct
import subprocess
from argparse import Namespace
from collections.abc import Callable, Iterable, Iterator
from hashlib import sha256
from pathlib import Path
from typing import NamedTuple

import pytest
from cryptography import x509
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.hashes import SHA256
from cryptography.hazmat.primitives.serialization import Encoding, pkcs7

from tests import pefile
from tests.eventlogs import DATA, LOGGED, Entry, log, plain, program, real, tagged, variable
from tests.hostfixture import Machine
from unlock.cli import predict as cli_predict
from unlock.errors import Refused, UnlockError
from unlock.host import this_boot
from unlock.measured import at_unseal, certificates, diagnosis, efivars, eventlog, evidence, uefi
from unlock.operations import baseline, cache, check, predict
from unlock.operations.check.finding import NOTE, SAFE, UNPROVEN, UNSAFE
from unlock.operations.check.tpm import check_next_boot, predict_or_error
from unlock.paths import Paths
from unlock.predict import booted, grub_learn, grub_replay, grub_script, pe, uki_replay
from unlock.predict.boot_tree import BootTree
from unlock.tpm import slots

pytestmark = pytest.mark.usefixtures("key_cache")

READS = ("usr/lib/unlock/reads/token-1", "usr/lib/unlock/reads/record-1")
WINDOW = "unlock policy window --reboots 1"
OLD, NEW = "6.12.117+deb13-cloud-amd64", "6.12.118+deb13-cloud-amd64"
CONFIG, FIRST = "(hd1)/grub/grub.cfg", "(hd0)/EFI/debian/grub.cfg"
FILES: dict[str, dict[str, list[str]]] = json.loads((DATA / "grub-files.json").read_text())
"""Name of the boot -> GRUB's name of a file -> SHA-256, Authenticode where it is a program."""


SAME_CONFIG = {"grub-2": "grub-1", "grub-3": "grub-0"}
ENV = "(hd1)/grub/grubenv"


def text(name: str) -> str:
    return (DATA / f"{SAME_CONFIG.get(name, name)}.cfg").read_text()


# from the logs alone


@pytest.mark.parametrize("name", ["grub-0", "grub-1", "grub-2", "grub-3", "secure-0", "uki-0", "uki-1"])
def test_the_log_accounts_for_the_pcrs(name: str) -> None:
    made = real(name)
    found = eventlog.parse_event_log(made.log)
    assert found.problem == ""
    replayed = eventlog.replay(found.events, found.locality)
    assert {pcr: replayed[pcr] for pcr in LOGGED} == {pcr: made.pcrs[pcr] for pcr in LOGGED}


def disk(name: str) -> grub_replay.GrubFiles:
    files = FILES[name]

    def known(place: int) -> Callable[[str], bytes]:
        def of(file: str) -> bytes:
            if file not in files:
                raise grub_script.NotOnDisk(file)
            return bytes.fromhex(files[file][place])

        return of

    config = texts(name)
    return grub_replay.GrubFiles(lambda file: config[file].encode(), known(0), known(1), lambda _, file: file in config)


def texts(name: str) -> dict[str, str]:
    """Configuration files, by GRUB's name."""
    env = {ENV: (DATA / f"{name}.env").read_text()} if ENV in FILES[name] else {}
    return {CONFIG: text(name), FIRST: text("grub-first"), **env}


def learned(name: str = "grub-0") -> grub_replay.GrubBoot:
    return grub_learn.learn_grub_boot(eventlog.parse_event_log(real(name).log), texts(name), disk(name).image)


WAYS = {
    "grub-0": ("Debian GNU/Linux",),
    "grub-1": ("Debian GNU/Linux",),
    "grub-2": ("Advanced options for Debian GNU/Linux", f"Debian GNU/Linux, with Linux {OLD}"),
    "grub-3": ("Debian GNU/Linux",),
}


@pytest.mark.parametrize("now", WAYS)
@pytest.mark.parametrize("then", WAYS)
def test_each_boot_predicts_each_other(now: str, then: str) -> None:
    """Also back to what was before the update, from an entry of the submenu, and with GRUB's environment file, which
    grub-common makes after the first boot."""
    assert learned(now).titles == WAYS[now]
    events, _ = grub_replay.measure_entry(learned(now), text(then), WAYS[then], disk(then))
    found, made = eventlog.replay(events), real(then).pcrs
    assert {pcr: found[pcr] for pcr in LOGGED} == {pcr: made[pcr] for pcr in LOGGED}


def test_kernel_initramfs_menu_and_command_line_were_predicted_as_the_next_boots_measured_them() -> None:
    """Another kernel is the default now, both initramfs files and the command line are new; then its older brother is
    chosen from the submenu, by hand."""
    ways = list(grub_replay.list_menu(learned(), text("grub-1"), disk("grub-1")))
    assert [title for title, _ in ways] == [
        "Debian GNU/Linux",
        f"Debian GNU/Linux, with Linux {NEW}",
        f"Debian GNU/Linux, with Linux {OLD}",
    ]
    for name, (_, titles) in (("grub-1", ways[0]), ("grub-2", ways[2])):
        events, kernel = grub_replay.measure_entry(learned(), text("grub-1"), titles, disk("grub-1"))
        found, made = eventlog.replay(events), real(name).pcrs
        assert {pcr: found[pcr] for pcr in LOGGED} == {pcr: made[pcr] for pcr in LOGGED}
        assert kernel.words[0] == f"/vmlinuz-{NEW if name == 'grub-1' else OLD}"
        assert f"BOOT_IMAGE={' '.join(kernel.words)}".split() == real(name).cmdline.split()


@pytest.mark.parametrize("now,then", [("uki-0", "uki-1"), ("uki-1", "uki-0")])
def test_a_unified_kernel_image_was_predicted_as_the_next_boot_measured_it(now: str, then: str) -> None:
    """systemd-boot, Secure Boot; another kernel, initramfs and command line in it."""
    images = {}
    for name, each in json.loads((DATA / "uki-files.json").read_text()).items():
        sections = tuple(map(bytes.fromhex, each["sections"]))
        images[name] = uki_replay.UkiDigests(bytes.fromhex(each["image"]), bytes.fromhex(each["kernel"]), sections)
    events = uki_replay.replace_uki(eventlog.parse_event_log(real(now).log), old=images[now].image, new=images[then])
    found, made = eventlog.replay(events), real(then).pcrs
    own = set(LOGGED) - {9}
    assert {pcr: found[pcr] for pcr in own} == {pcr: made[pcr] for pcr in own}
    assert found[11] != real(now).pcrs[11] and found[4] != real(now).pcrs[4]


def test_update_grub_hints_at_another_disk_letter() -> None:
    """Which the kernel gave the same disk in this boot; the file system is found by its UUID."""
    changed = re.sub(r"--hint-([a-z]+)=(hd|ahci)\d", r"--hint-\1=\g<2>7", text("grub-1"))
    assert changed != text("grub-1")
    found, _ = grub_replay.measure_entry(learned(), changed, ["Debian GNU/Linux"], disk("grub-1"))
    as_before, _ = grub_replay.measure_entry(learned(), text("grub-1"), ["Debian GNU/Linux"], disk("grub-1"))
    assert [each.data for each in found if b"--hint-efi=hd7" in each.data]
    assert [each.data for each in found if each.pcr == 9] == [each.data for each in as_before if each.pcr == 9]
    another = re.sub(r"(search .*) (\S+)", r"\1 another", text("grub-1"))
    with pytest.raises(Refused, match="reads is not known"):
        grub_replay.measure_entry(learned(), another, ["Debian GNU/Linux"], disk("grub-1"))


@pytest.mark.parametrize(
    "old,new,why",
    [
        ("terminal_input console", "for i in 1 2; do echo $i; done", "`for` is not understood"),
        ("insmod gzio", "insmod xfs", "`insmod xfs` reads is not known"),
        ("terminal_input console", "if keystatus --shift; then true; fi", "whether GRUB's `keystatus --shift`"),
        ("\tlinux\t/", "\tchainloader\t/", "not one kernel"),
        ("set default=\"0\"", "set default=\"nothing>9\"", ""),
        (f"/vmlinuz-{NEW} ", "/vmlinuz-6.99 ", "6.99"),
    ],
)  # fmt: skip
def test_what_grub_will_do_is_never_guessed(old: str, new: str, why: str) -> None:
    changed = text("grub-1").replace(old, new)
    assert changed != text("grub-1")
    if not why:
        assert next(grub_replay.list_menu(learned(), changed, disk("grub-1")))[0] == "Debian GNU/Linux"
        return
    with pytest.raises(Refused, match=why) as caught:
        grub_replay.measure_entry(learned(), changed, ["Debian GNU/Linux"], disk("grub-1"))
    assert caught.value.code == "cannot-predict"


def test_a_log_that_grub_cfg_does_not_explain() -> None:
    """A command typed at GRUB's prompt, another grub.cfg than the one that was read."""
    image = disk("grub-0").image
    with pytest.raises(Refused, match="is not understood"):
        grub_learn.learn_grub_boot(eventlog.parse_event_log(real("grub-0").log), {CONFIG: text("grub-1")}, image)
    found = eventlog.parse_event_log(real("grub-0").log)
    at = next(i for i, event in enumerate(found.events) if grub_replay.grub_command(event) == "insmod gzio")
    typed = found.events[at]._replace(data=b"grub_cmd: ls\0", digest=sha256(b"ls").digest())
    events = (*found.events[:at], typed, *found.events[at:])
    with pytest.raises(Refused, match="was not expected"):
        grub_learn.learn_grub_boot(found._replace(events=events), {CONFIG: text("grub-0")}, image)


def test_a_log_that_comes_out_otherwise() -> None:
    """The kernel got another initramfs than GRUB has read."""
    found = eventlog.parse_event_log(real("grub-0").log)
    events = tuple(
        each._replace(digest=bytes(32)) if each.data[:4] == eventlog.INITRD else each for each in found.events
    )
    with pytest.raises(Refused, match="PCRs 9 come out otherwise"):
        grub_learn.learn_grub_boot(found._replace(events=events), texts("grub-0"), disk("grub-0").image)


# a host


LOADERS = {
    path: pefile.build({".text": path.encode() * 9})
    for path in ("\\EFI\\BOOT\\BOOTX64.EFI", "\\EFI\\BOOT\\grubx64.efi")
}


class RealBoot(NamedTuple):
    """A recorded boot with small files in the place of large ones. Stands in for eventlogs.Boot."""

    name: str
    contents: dict[str, bytes]
    kind: str = "grub"

    def entries(self) -> list[Entry]:
        return self.small(eventlog.parse_event_log(real(self.name).log).events)

    def small(self, events: Iterable[eventlog.Event]) -> list[Entry]:
        replaced = {}
        for file, digests in FILES[self.name].items():
            data = self.contents[file]
            replaced[bytes.fromhex(digests[0])] = sha256(data).digest()
            if digests[1:]:
                replaced[bytes.fromhex(digests[1])] = pe.authenticode(data)
        events = list(events)
        for event in events:
            if event.kind == eventlog.EFI_APPLICATION and (path := uefi.parse_image_path(event.data)) in LOADERS:
                replaced[event.digest or b""] = pe.authenticode(LOADERS[path])
        return [
            Entry(e.pcr, e.kind, b"", e.data, replaced.get(e.digest or b"", e.digest))
            for e in events
        ]  # fmt: skip

    def log(self) -> bytes:
        return log(self.entries())

    def full_cmdline(self) -> str:
        return real(self.name).cmdline


class Made(NamedTuple):
    """A boot that was made up."""

    made: list[Entry]
    kind: str
    name: str = "made"

    def entries(self) -> list[Entry]:
        return self.made

    def log(self) -> bytes:
        return log(self.made)

    def full_cmdline(self) -> str:
        return "root=x"


PLACES = {"(hd0)/": "boot/efi/", "(hd1)/": "boot/", "/": "boot/"}


def place(name: str) -> str:
    device = name[: name.index("/") + 1]
    return PLACES[device] + name[len(device) :]


def contents(config: str, **more: bytes) -> dict[str, bytes]:
    """What is on disk, by GRUB's name."""
    programs = {file: pefile.build({".text": file.encode() * 30}) for file in FILES["grub-1"] if "vmlinuz" in file}
    initrds = {file: more.get(config, b"") + file.encode() for file in FILES["grub-1"] if "initrd" in file}
    files = {**programs, **initrds, CONFIG: text(config).encode(), FIRST: text("grub-first").encode()}
    rest = {name: name.encode() for each in FILES.values() for name in each if name not in (*files, ENV)}
    return {**rest, **files}


BEFORE = contents("grub-0")
AFTER = contents("grub-1", **{"grub-1": b"new"})
NOW = RealBoot("grub-0", BEFORE)
NEXT, OLDER = RealBoot("grub-1", AFTER), RealBoot("grub-2", AFTER)


def install(host: Machine, files: dict[str, bytes]) -> None:
    for name, data in files.items():
        if name.startswith(("/", "(hd")):
            host.write(place(name), data)


def boot(host: Machine, next_boot: RealBoot | Made) -> str:
    host.write("proc/sys/kernel/random/boot_id", sha256(next_boot.name.encode()).hexdigest().encode())
    return host.boot(next_boot)  # type: ignore[arg-type]


@pytest.fixture
def host(tmp_path: Path) -> Iterator[Machine]:
    """It has booted once since it was enrolled, and kept what it read."""
    machine = Machine(tmp_path, NOW)  # type: ignore[arg-type]
    machine.write("sys/firmware/efi/fw_platform_size", b"64\n")
    for path, data in LOADERS.items():
        machine.write("boot/efi" + path.replace("\\", "/"), data)
    install(machine, {name: data for name, data in BEFORE.items() if NEW not in name})
    assert boot(machine, NOW) == "unsealed"
    baseline.record_good_boot(machine.paths, machine.chip.tcti, first=True)
    yield machine
    machine.close()


def run(host: Machine, dry_run: bool = False) -> predict.Prediction:
    return predict.predict_and_allow(host.paths, host.chip.tcti, dry_run)


def checked(host: Machine) -> list[str]:
    """What `unlock check` says of the entries that may come next."""
    with host.chip.open() as tpm:
        record = slots.current_slot(tpm)[1]
    return [each.verdict for each in check_next_boot(predict_or_error(host.paths, host.chip.tcti), record)]


def test_what_this_boot_has_read_is_kept_while_an_update_replaces_it(host: Machine) -> None:
    """`rebind` after the update keeps again what this boot has measured."""
    install(host, AFTER)
    baseline.record_good_boot(host.paths, host.chip.tcti)
    assert len(run(host).boots) == 3
    assert boot(host, NEXT) == "unsealed"


def test_an_update_of_everything_and_the_host_boots_without_a_prompt(host: Machine) -> None:
    assert checked(host) == [SAFE, NOTE]
    install(host, AFTER)
    assert checked(host) == [UNSAFE, NOTE, NOTE]
    assert len(run(host, dry_run=True).boots) == 3
    assert host.reasons() == ["this boot"]
    found = run(host)
    assert predict.default_boot_refusal(found) is None
    assert found.boots[0].words == f"kernel {NEW}"
    assert found.boots[0].changes == (f"kernel {NEW} instead of {OLD}", "kernel command line", "grub.cfg")
    assert [each.default for each in found.boots] == [True, False, False]
    assert f"initramfs of {OLD}" in found.boots[2].changes
    assert run(host) == found
    assert checked(host) == [SAFE] * 3
    assert boot(host, NEXT) == "unsealed"
    assert boot(host, OLDER) == "unsealed"
    assert boot(host, NOW) == "unsealed"


def test_an_initramfs_that_was_built_again(host: Machine) -> None:
    """An update of unlock, or update-initramfs -u, changes nothing else."""
    changed = {**BEFORE, f"/initrd.img-{OLD}": b"with a newer unlock"}
    install(host, {f"/initrd.img-{OLD}": b"with a newer unlock"})
    assert boot_after(host, lambda: None, RealBoot("grub-0", changed)) == "pcr-mismatch"
    install(host, {f"/initrd.img-{OLD}": BEFORE[f"/initrd.img-{OLD}"]})
    assert boot(host, NOW) == "unsealed"
    baseline.record_good_boot(host.paths, host.chip.tcti)
    install(host, {f"/initrd.img-{OLD}": b"with a newer unlock"})
    found = run(host)
    assert found.boots[0].changes == (f"initramfs of {OLD}",)
    assert boot(host, RealBoot("grub-0", changed)) == "unsealed"


def boot_after(host: Machine, act: Callable[[], object], next_boot: RealBoot) -> str:
    act()
    return boot(host, next_boot)


def test_grub_reboot_once_and_the_boot_after_it(host: Machine) -> None:
    """GRUB itself takes next_entry out of its environment, after it has measured it."""
    env = texts("grub-3")[ENV]
    once, after = (f"{env.rstrip('#')}next_entry={value}\n".ljust(1024, "#") for value in ("0", ""))

    def like(content: str) -> Made:
        now = RealBoot("grub-3", {**BEFORE, ENV: env.encode()})
        files = disk("grub-3")
        files = files._replace(
            content=lambda name: content.encode() if name == ENV else disk("grub-3").content(name),
            sha256=lambda name: sha256(content.encode()).digest() if name == ENV else disk("grub-3").sha256(name),
        )
        events, _ = grub_replay.measure_entry(learned("grub-3"), text("grub-3"), WAYS["grub-3"], files)
        return Made(now.small(events), "grub", content)

    install(host, {ENV: env.encode()})
    run(host)
    assert boot(host, like(env)) == "unsealed"
    baseline.record_good_boot(host.paths, host.chip.tcti)
    install(host, {ENV: once.encode()})
    assert [each.words for each in run(host).boots if each.default] == [f"kernel {OLD}"]
    assert boot(host, like(once)) == "unsealed"
    install(host, {ENV: after.encode()})
    assert boot(host, like(after)) == "unsealed"  # by a power cut: nothing was predicted in between
    install(host, {ENV: once.encode()})
    assert boot(host, like(once)) == "unsealed"
    install(host, {ENV: after.encode()})
    baseline.record_good_boot(host.paths, host.chip.tcti)
    assert checked(host)[0] == SAFE and predict.default_boot_refusal(run(host)) is None
    assert boot(host, like(after)) == "unsealed"


def environment(*lines: str) -> str:
    return "".join(f"{each}\n" for each in ("# GRUB Environment Block", *lines)).ljust(1024, "#")


@pytest.mark.parametrize(
    "read,commands,now",
    [
        ((), "set recordfail=1; save_env recordfail", ("recordfail=1",)),
        (("recordfail=1", "next_entry="), "set recordfail=1; save_env recordfail", ("next_entry=",)),
        (("saved_entry=x", "recordfail=1"), "set default=x", ("saved_entry=x",)),
        (
            ("saved_entry=new", "prev_saved_entry=old"),
            "set default=new; set saved_entry=old; save_env saved_entry; set prev_saved_entry=;"
            " save_env prev_saved_entry",
            ("saved_entry=old", "prev_saved_entry="),
        ),
        (
            ("initrdfail=1", "prev_entry=a>b"),
            "set next_entry=a>b; set prev_entry=; save_env prev_entry; set initrdfail=2; set default=a>b;"
            " set next_entry=; save_env next_entry; save_env initrdfail",
            ("prev_entry=", "next_entry="),
        ),
        (("saved_entry=x",), "set default=x; saved_entry=y>z; save_env saved_entry", ("saved_entry=y>z",)),
        (("next_entry=1>2", "other=\\\\"), "set default=1>2; save_env next_entry", ("next_entry=", "other=\\\\")),
    ],
)  # fmt: skip
def test_grubs_environment_as_it_was_read(
    tmp_path: Path, read: tuple[str, ...], commands: str, now: tuple[str, ...]
) -> None:
    """GRUB has saved variables since, and Ubuntu's grub-common.service and grub-initrd-fallback.service have taken out
    those of a boot that failed."""
    paths = Paths(str(tmp_path))
    (tmp_path / "boot/grub").mkdir(parents=True)
    (tmp_path / "boot/grub/grubenv").write_text(environment(*now))
    events = [eventlog.Event(9, eventlog.IPL, sha256(environment(*read).encode()).digest(), ENV.encode())]
    for each in commands.split("; "):
        events.append(eventlog.Event(8, eventlog.IPL, sha256(each.encode()).digest(), f"grub_cmd: {each}".encode()))
    found = booted.find_booted_files(BootTree(paths), eventlog.Log(tuple(events), 0, ""))
    assert found.texts == {ENV: environment(*read)}
    other = eventlog.Log((events[0]._replace(digest=bytes(32)), *events[1:]), 0, "")
    assert booted.find_booted_files(BootTree(paths), other).texts == {}


RECORDFAIL = """\
function recordfail {
  set recordfail=1
  if [ -n "${have_grubenv}" ]; then if [ -z "${boot_once}" ]; then save_env recordfail; fi; fi
}
"""


def test_ubuntus_flag_of_a_boot_that_failed(host: Machine) -> None:
    """GRUB sets it after it has read its environment; in a submenu it does not, as `have_grubenv` is not exported."""
    ubuntu = (
        text("grub-3")
        .replace("menuentry ", RECORDFAIL + "menuentry ", 1)
        .replace("\tload_video\n", "\trecordfail\n\tload_video\n")
    )
    ubuntu = ubuntu.replace("\tload_video\n", "\trecordfail\n\tload_video\n")
    titles = (*WAYS["grub-2"][:1], f"Debian GNU/Linux, with Linux {OLD}")
    clean, failed = environment("saved_entry=0"), environment("saved_entry=0", "recordfail=1")

    def like(content: str, way: tuple[str, ...], name: str) -> Made:
        now = RealBoot("grub-3", {**BEFORE, ENV: texts("grub-3")[ENV].encode()})
        given = {ENV: content.encode(), CONFIG: ubuntu.encode()}
        files = disk("grub-3")
        files = files._replace(
            content=lambda name: given[name] if name in given else disk("grub-3").content(name),
            sha256=lambda name: sha256(given[name]).digest() if name in given else disk("grub-3").sha256(name),
        )
        events, _ = grub_replay.measure_entry(learned("grub-3"), ubuntu, way, files)
        return Made(now.small(events), "grub", name)

    first, older = like(clean, WAYS["grub-3"], "first"), like(clean, titles, "older")
    assert [any(b"save_env recordfail" in each.data for each in way.made) for way in (first, older)] == [True, False]
    install(host, {CONFIG: ubuntu.encode(), ENV: clean.encode()})
    run(host)
    assert boot(host, first) == "unsealed"
    install(host, {ENV: failed.encode()})  # GRUB wrote it
    baseline.record_good_boot(host.paths, host.chip.tcti)
    install(host, {ENV: clean.encode()})  # grub-common.service
    found = run(host)
    assert [each.why for each in found.boots] == ["", ""]
    assert boot(host, older) == "unsealed"
    baseline.record_good_boot(host.paths, host.chip.tcti)
    assert [each.why for each in run(host).boots] == ["", ""]
    assert boot(host, like(clean, WAYS["grub-3"], "again")) == "unsealed"


def test_a_kernel_of_the_same_name(host: Machine) -> None:
    """Nothing on disk tells any more what the old one was: that was kept after the boot."""
    kernel = {f"/vmlinuz-{OLD}": pefile.build({".text": b"a security update" * 9})}
    install(host, kernel)
    assert run(host).boots[0].changes == (f"kernel {OLD} was replaced",)
    assert boot(host, RealBoot("grub-0", {**BEFORE, **kernel})) == "unsealed"


def test_what_a_thief_changes_is_not_predicted_and_explained(host: Machine) -> None:
    run(host)
    assert boot(host, RealBoot("grub-1", AFTER)) == "pcr-mismatch"
    found = diagnosis.diagnose(evidence.gather_evidence(host.paths, host.chip.tcti))
    assert {"kernel", "boot-loader-config"} & {cause.code for cause in found.causes}
    with pytest.raises(Refused) as caught:
        run(host)
    assert caught.value.code == "boot-not-allowed"
    assert boot(host, NOW) == "unsealed"


def test_what_a_thief_put_beside_while_the_host_was_off_is_never_allowed(host: Machine) -> None:
    """He has the disk for a night, and leaves alone what the host will boot: it boots, and is updated some day."""
    install(host, AFTER)
    run(host)
    assert boot(host, NEXT) == "unsealed"
    booted.record_booted_files(BootTree(host.paths), eventlog.parse_event_log(NEXT.log()))
    assert [each.why for each in run(host).boots] == ["", "", ""]
    thief = {**AFTER, f"/initrd.img-{OLD}": b"sends the keys away"}
    install(host, thief)
    assert boot(host, NEXT) == "unsealed"
    booted.record_booted_files(BootTree(host.paths), eventlog.parse_event_log(NEXT.log()))
    for _ in range(2):
        found = run(host)
        assert "while this host was off" in found.boots[2].why and predict.default_boot_refusal(found) is None
        assert not found.boots[0].why and not found.boots[1].why
    assert boot(host, RealBoot("grub-2", thief)) == "pcr-mismatch"
    assert boot(host, NEXT) == "unsealed"
    booted.record_booted_files(BootTree(host.paths), eventlog.parse_event_log(NEXT.log()))
    assert run(host).boots[2].why
    again = {**AFTER, f"/initrd.img-{OLD}": b"built again"}
    install(host, again)
    assert run(host).boots[2].why, "the name is his, until somebody says otherwise"
    assert not predict.predict_and_allow(host.paths, host.chip.tcti, trust_files=True).boots[2].why
    assert boot(host, RealBoot("grub-2", again)) == "unsealed"


def test_nor_what_he_put_there_before_the_first_prediction(host: Machine) -> None:
    """He pulls the plug of a host that was only just initialised: neither an update nor a shutdown has predicted."""
    install(host, AFTER)
    run(host)
    assert boot(host, NEXT) == "unsealed"
    for path in (host.paths.boot_files, host.paths.booted):
        Path(path).unlink()
    baseline.record_good_boot(host.paths, host.chip.tcti, first=True)  # init
    install(host, {**AFTER, f"/initrd.img-{OLD}": b"sends the keys away"})
    assert boot(host, NEXT) == "unsealed"
    baseline.record_good_boot(host.paths, host.chip.tcti)
    assert "while this host was off" in run(host).boots[2].why


def test_files_that_cannot_be_seen_at_shutdown_stay_vouched_for(host: Machine) -> None:
    run(host)
    before = Path(host.paths.boot_files).read_bytes()
    folder = Path(host.paths.root, "boot")
    folder.rename(folder.with_name("unmounted"))
    folder.mkdir()
    predict.predict_after_update(host.paths, host.chip.tcti)
    tree = BootTree(host.paths)
    booted.trust_boot_files(tree, booted.load_booted_files(tree, eventlog.parse_event_log(NOW.log())))
    assert Path(host.paths.boot_files).read_bytes() == before


def test_the_operator_vouches_for_a_file(host: Machine) -> None:
    install(host, AFTER)
    run(host)
    assert boot(host, NEXT) == "unsealed"
    changed = {**AFTER, f"/initrd.img-{OLD}": b"from the rescue system"}
    install(host, changed)
    booted.record_booted_files(BootTree(host.paths), eventlog.parse_event_log(NEXT.log()))
    assert run(host).boots[2].why
    assert not predict.predict_and_allow(host.paths, host.chip.tcti, trust_files=True).boots[2].why
    assert not run(host).boots[2].why
    assert boot(host, RealBoot("grub-2", changed)) == "unsealed"


def test_a_file_that_was_replaced_before_it_was_kept(host: Machine) -> None:
    Path(host.paths.booted).unlink()
    assert run(host, dry_run=True).boots
    install(host, AFTER)
    with pytest.raises(Refused) as caught:
        run(host)
    assert caught.value.code == "cannot-predict" and caught.value.hint == WINDOW
    assert host.reasons() == ["this boot"]


def test_another_default_entry_is_not_hidden_by_those_that_are_understood(
    host: Machine, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """xen-hypervisor's entry comes first once it is installed; recovery mode may be the saved entry."""
    first = text("grub-0").index("menuentry ")
    xen = "menuentry 'Debian GNU/Linux, with Xen hypervisor' {\n\tmultiboot2 /xen.gz\n\tmodule2 /vmlinuz\n}\n"
    install(host, {CONFIG: (text("grub-0")[:first] + xen + text("grub-0")[first:]).encode()})
    assert checked(host)[0] == UNSAFE
    assert (bad := predict.default_boot_refusal(run(host))) and "not one kernel" in str(bad)
    monkeypatch.setattr(this_boot, "tpm_device", lambda: host.chip.tcti)
    capsys.readouterr()
    options = Namespace(json=True, dry_run=True, trust_files=False)
    assert cli_predict._predict(host.paths, options) == bad.status
    shown = json.loads(capsys.readouterr().out)
    assert shown["version"] and shown["error"]["code"] == bad.code, "one object, with the error in it"
    saved = f"Advanced options for Debian GNU/Linux>Debian GNU/Linux, with Linux {OLD} (recovery mode)"
    install(host, {CONFIG: text("grub-0").replace('set default="0"', f'set default="{saved}"').encode()})
    assert checked(host)[0] == UNSAFE
    assert "recovery mode" not in run(host).boots[0].why and checked(host)[0] == SAFE


def initramfs(folder: Path, *names: str) -> bytes:
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).touch()
    cpio = ["cpio", "--quiet", "-o", "-H", "newc"]
    made = subprocess.run(cpio, input="\n".join(names).encode(), capture_output=True, cwd=folder)
    return gzip.compress(made.stdout)


def about_images(host: Machine) -> dict[str, str]:
    found = check.check(host.paths, host.chip.tcti, dict).findings
    return {each.what: each.verdict for each in found if each.what.startswith("initr")}


def test_the_image_that_counts_is_that_of_the_default_entry(host: Machine, tmp_path: Path) -> None:
    """A kernel that is older, and a rescue image that sorts behind them all."""
    host.write("proc/self/mountinfo", b"")
    with_unlock = initramfs(tmp_path / "tree", "usr/lib/unlock/unlock/boot/agent.pyc", *READS)
    without = initramfs(tmp_path / "tree", "bin/sh")
    files = {**AFTER, f"/initrd.img-{NEW}": with_unlock, f"/initrd.img-{OLD}": without, "/initrd.img-rescue": without}
    install(host, files)
    run(host)
    assert boot(host, RealBoot("grub-1", files)) == "unsealed"
    baseline.record_good_boot(host.paths, host.chip.tcti)
    new, old, rescue = f"initrd.img-{NEW}", f"initrd.img-{OLD}", "initrd.img-rescue"
    assert about_images(host) == {new: SAFE, old: NOTE, rescue: NOTE}
    older = f"Advanced options for Debian GNU/Linux>Debian GNU/Linux, with Linux {OLD}"
    install(host, {CONFIG: text("grub-1").replace('set default="0"', f'set default="{older}"').encode()})
    assert run(host).boots[0].words == f"kernel {OLD}" and checked(host)[0] == UNSAFE
    assert about_images(host) == {new: SAFE, old: UNSAFE, rescue: NOTE}


def test_a_boot_whose_initramfs_lacks_unlock_is_not_allowed(host: Machine, tmp_path: Path) -> None:
    """Nothing in it would lock the TPM."""
    with_unlock = initramfs(tmp_path / "tree", "usr/lib/unlock/unlock/boot/agent.pyc", *READS)
    without = initramfs(tmp_path / "tree", "bin/sh")
    files = {**AFTER, f"/initrd.img-{NEW}": without, f"/initrd.img-{OLD}": without}
    install(host, files)
    found = run(host)
    assert found.boots and not any(each.values for each in found.boots)
    refusal = predict.default_boot_refusal(found)
    assert refusal and f"unlock is not in initrd.img-{NEW}" in str(refusal)
    assert f"update-initramfs -u -k {NEW}" in str(refusal)
    rebuilt = {**files, f"/initrd.img-{NEW}": with_unlock}
    install(host, rebuilt)
    assert [bool(each.values) for each in run(host).boots] == [True, True, False]
    assert boot(host, RealBoot("grub-1", files)) == "pcr-mismatch"
    assert boot(host, RealBoot("grub-1", rebuilt)) == "unsealed"


def test_an_initramfs_that_cannot_be_listed_is_named(host: Machine) -> None:
    install(host, {**AFTER, f"/initrd.img-{NEW}": b"no archive"})
    found = run(host)
    assert found.boots[0].values and any(
        f"whether unlock is in initrd.img-{NEW} is not known" in n for n in found.notes
    )


def test_boot_is_not_mounted(host: Machine, capsys: pytest.CaptureFixture[str]) -> None:
    Path(host.paths.root, "boot/grub").rename(Path(host.paths.root, "elsewhere"))
    assert checked(host) == [UNPROVEN]
    assert predict.predict_after_update(host.paths, host.chip.tcti) == 0
    assert "not on disk" in capsys.readouterr().err


def test_the_hook_never_fails_and_says_what_comes(host: Machine, capsys: pytest.CaptureFixture[str]) -> None:
    assert predict.predict_after_update(Paths(str(host.folder / "nowhere")), host.chip.tcti) == 0
    install(host, AFTER)
    assert predict.predict_after_update(host.paths, host.chip.tcti) == 0
    assert f"next boot: kernel {NEW} is predicted" in capsys.readouterr().err
    install(host, {CONFIG: text("grub-1").replace("terminal_input console", "while true; do true; done").encode()})
    assert predict.predict_after_update(host.paths, host.chip.tcti) == 0
    said = capsys.readouterr().err
    assert "cannot be predicted" in said and WINDOW in said and "recovery key" in said
    host.chip.kill()
    assert predict.predict_after_update(host.paths, host.chip.tcti) == 1  # the next hook tries again
    assert "unlock:" in capsys.readouterr().err


def test_after_a_flush_of_the_key_cache_the_hook_says_that_nothing_can_be_sealed(
    host: Machine, capsys: pytest.CaptureFixture[str]
) -> None:
    cache.flush(host.paths)
    install(host, AFTER)
    assert predict.predict_after_update(host.paths, host.chip.tcti) == 0  # tried again it would say the same
    said = capsys.readouterr().err
    assert "nothing can be sealed" in said and "it was flushed" in said and "after a flush: reboot" in said
    assert "recovery key opens the disks" in said and "is predicted" not in said
    assert host.reasons() == ["this boot"]
    assert boot(host, NEXT) == "pcr-mismatch"


def test_after_a_boot_that_the_tpm_refused_the_hook_says_so(host: Machine, capsys: pytest.CaptureFixture[str]) -> None:
    cache.flush(host.paths)
    assert boot(host, NEXT) == "pcr-mismatch"
    install(host, AFTER)
    assert predict.predict_after_update(host.paths, host.chip.tcti) == 0
    said = capsys.readouterr().err
    assert "none that the TPM allows" in said and "unlock explain" in said and "key cache" not in said


def test_where_no_update_matters_nothing_is_predicted(tmp_path: Path) -> None:
    host = Machine(tmp_path, NOW, (7,))  # type: ignore[arg-type]
    host.write("sys/firmware/efi/x", b"")
    found = run(host)
    assert checked(host) == [SAFE]
    assert found.boots == () and "nothing to predict" in found.notes[0] and predict.default_boot_refusal(found) is None
    host.close()


def test_a_new_first_configuration_is_not_guessed(host: Machine) -> None:
    install(host, {FIRST: b"configfile /elsewhere\n"})
    with pytest.raises(Refused, match="GRUB reads it before its menu"):
        run(host)


def test_the_kept_files_are_read_as_written_and_nothing_else(host: Machine) -> None:
    data = Path(host.paths.booted).read_bytes()
    found = booted.BootedFiles.decode(data)
    assert found.encode() == data
    assert found.files[CONFIG][0] == "boot/grub/grub.cfg" and CONFIG in found.texts
    newer = json.dumps({**json.loads(data), "version": 2}).encode()
    unsigned = b'"signed":{"boot/x":"",'
    assert booted.BootedFiles.decode(data.replace(b'"signed":{', unsigned)).signed["boot/x"] == b""
    wrong = [
        data.replace(b'"images":[', b'"images":[7,'),
        *(data.replace(b'"signed":{', unsigned.replace(b'""', each)) for each in (b"null", b'"7"')),
    ]
    for bad in (b"", b"{}", data[:-9], newer, *wrong):
        with pytest.raises(UnlockError):
            booted.BootedFiles.decode(bad)


# without GRUB


def enrolled(tmp_path: Path, now: RealBoot | Made, files: dict[str, bytes], pcrs: tuple[int, ...] = ()) -> Machine:
    machine = Machine(tmp_path, now, pcrs)  # type: ignore[arg-type]
    machine.write("sys/firmware/efi/efivars/StubInfo-1" if now.kind == "uki" else "sys/firmware/efi/x", b"")
    for path, data in files.items():
        machine.write(path, data)
    assert boot(machine, now) == "unsealed"
    baseline.record_good_boot(machine.paths, machine.chip.tcti, first=True)
    return machine


def boot_entry(options: str, path: str = "kernel") -> bytes:
    """EFI_LOAD_OPTION."""
    start = struct.pack("<IH", 1, len(path)) + "Debian\0".encode("utf-16-le") + path.encode()
    return start + f"{options}\0".encode("utf-16-le")


def stub(kernel: bytes, initrd: bytes, options: str = "root=x") -> Made:
    """The firmware starts a kernel of the EFI partition by its entry Boot0007."""
    entries = [
        variable(1, "Boot0007", boot_entry(options), 0x80000002),
        *(plain(pcr, 4, bytes(4)) for pcr in range(8)),
        program("\\EFI\\debian\\VMLINUZ-6.1", "")._replace(digest=pe.authenticode(kernel)),
        tagged(9, 0x8F3B22ED, "LOADED_IMAGE::LoadOptions", f"{options}\0".encode("utf-16-le")),
        tagged(9, 0x8F3B22EC, "Linux initrd", initrd),
    ]
    return Made(entries, "direct")


def test_a_kernel_that_the_firmware_starts(tmp_path: Path) -> None:
    old, new = (pefile.build({".text": code * 300}) for code in (b"old", b"new"))
    kernel, initrd = "boot/efi/EFI/debian/vmlinuz-6.1", "boot/efi/EFI/debian/initrd.img-6.1"
    host = enrolled(tmp_path, stub(old, b"one"), {kernel: old, initrd: b"one"})
    for path, data in ((kernel, new), (initrd, b"two")):
        host.write(path, data)
    (entry,) = run(host).boots
    assert (entry.words, entry.changes) == ("kernel 6.1", ("kernel 6.1 was replaced", "initramfs of 6.1"))
    assert boot(host, stub(new, b"another")) == "pcr-mismatch"
    assert boot(host, stub(new, b"two")) == "unsealed"
    assert boot(host, stub(old, b"one")) == "unsealed"
    host.close()


def test_an_initramfs_that_the_command_line_names_is_not_measured(tmp_path: Path) -> None:
    """It is found, so that `check` can look into it; what it is changes nothing that the TPM sees."""
    program = pefile.build({".text": b"kernel" * 300})
    kernel, initrd = "boot/efi/EFI/debian/vmlinuz-6.1", "boot/efi/EFI/debian/initrd.img"
    now = stub(program, b"")
    now = Made([each for each in now.entries() if b"Linux initrd" not in each.data], "direct")
    host = enrolled(tmp_path, now, {kernel: program, initrd: b"one"})
    host.write("proc/cmdline", b"root=x initrd=\\EFI\\debian\\initrd.img quiet")
    host.write(initrd, b"a thief's")
    (entry,) = run(host).boots
    assert (entry.changes, entry.initrd) == ((), initrd)
    assert boot(host, now) == "unsealed"
    host.close()


@pytest.mark.parametrize("name", ["direct-0", "uki-0", "grub-0"])
def test_whether_the_initramfs_was_measured_is_told_by_the_log(name: str) -> None:
    kind = {"direct": "direct kernel", "uki": "UKI", "grub": "shim+GRUB"}[name[:-2]]
    found = eventlog.parse_event_log(real(name).log)
    assert not at_unseal.initramfs_unmeasured(kind, found)
    less = found._replace(events=tuple(each for each in found.events if each.data[:4] != eventlog.INITRD))
    assert at_unseal.initramfs_unmeasured(kind, less) == (kind == "direct kernel"), (
        "GRUB and systemd-stub measure it too"
    )
    assert at_unseal.initramfs_unmeasured(kind, None) == (kind == "direct kernel")


def test_a_kernel_command_line_in_the_entry_of_the_firmware(tmp_path: Path) -> None:
    """efibootmgr has changed it; an entry that is new, or has another name, changes nothing."""
    program = pefile.build({".text": b"kernel" * 300})
    kernel, initrd = "boot/efi/EFI/debian/vmlinuz-6.1", "boot/efi/EFI/debian/initrd.img-6.1"
    host = enrolled(tmp_path, stub(program, b"one"), {kernel: program, initrd: b"one"})
    for name, data in {"BootCurrent": b"\7\0", "Boot0007": boot_entry("root=x"), "Boot0001": boot_entry("y")}.items():
        host.write(f"sys/firmware/efi/efivars/{name}-{efivars.GLOBAL}", bytes(4) + data)
    assert run(host).boots[0].changes == ()
    host.write(f"sys/firmware/efi/efivars/Boot0007-{efivars.GLOBAL}", bytes(4) + boot_entry("root=x quiet"))
    assert boot(host, stub(program, b"one", "root=x quiet")) == "pcr-mismatch"
    assert boot(host, stub(program, b"one")) == "unsealed"
    assert run(host).boots[0].changes == ("kernel command line",)
    assert boot(host, stub(program, b"one", "root=x quiet")) == "unsealed"
    host.close()


ALL = (0, 1, 2, 3, 4, 7, 9)
"""As `init` chooses them where Secure Boot is off."""


def test_an_entry_of_the_firmware_is_predicted_in_pcr_1_too(tmp_path: Path) -> None:
    """Its content is measured there, and the command line that is in it again by the kernel."""
    program = pefile.build({".text": b"kernel" * 300})
    kernel, initrd = "boot/efi/EFI/debian/vmlinuz-6.1", "boot/efi/EFI/debian/initrd.img-6.1"
    host = enrolled(tmp_path, stub(program, b"one"), {kernel: program, initrd: b"one"}, ALL)
    for name, data in {"BootCurrent": b"\7\0", "Boot0007": boot_entry("root=x")}.items():
        host.write(f"sys/firmware/efi/efivars/{name}-{efivars.GLOBAL}", bytes(4) + data)
    assert run(host).boots[0].changes == ()
    host.write(f"sys/firmware/efi/efivars/Boot0007-{efivars.GLOBAL}", bytes(4) + boot_entry("root=x quiet"))
    host.write(initrd, b"two")
    found = run(host).boots[0]
    assert "kernel command line" in found.changes
    assert boot(host, stub(program, b"two", "root=x quiet")) == "unsealed"
    host.close()


@pytest.mark.parametrize("pcrs", [(), (0, 1, 2, 3, 4, 7, 8, 9, 14)])
def test_an_update_of_everything_leaves_the_firmwares_pcrs_as_they_are(tmp_path: Path, pcrs: tuple[int, ...]) -> None:
    files = {place(name): data for name, data in BEFORE.items() if NEW not in name and name.startswith(("/", "(hd"))}
    files |= {"boot/efi" + path.replace("\\", "/"): data for path, data in LOADERS.items()}
    host = enrolled(tmp_path, NOW, files, pcrs)
    install(host, AFTER)
    assert run(host).boots[0].words == f"kernel {NEW}"
    assert boot(host, NEXT) == "unsealed"
    assert boot(host, NOW) == "unsealed"
    host.close()


class Untidy(Made):
    """Its log is followed by what is none."""

    def log(self) -> bytes:
        return super().log() + b"\1" * 60


class Cut(Made):
    """Its log ends before the last event."""

    def log(self) -> bytes:
        return log(self.made[:-1])


@pytest.mark.parametrize("form,predicted", [(Untidy, True), (Cut, False)])
def test_a_log_is_good_for_the_pcrs_that_it_accounts_for(tmp_path: Path, form: type[Made], predicted: bool) -> None:
    kernel, initrd = "boot/efi/EFI/debian/vmlinuz-6.1", "boot/efi/EFI/debian/initrd.img-6.1"
    code = pefile.build({".text": b"code" * 300})
    now = form(*stub(code, b"one"))
    host = enrolled(tmp_path, now, {kernel: code, initrd: b"one"})
    host.write(initrd, b"two")
    if predicted:
        assert [each.values is not None for each in run(host).boots] == [True]
    else:
        with pytest.raises(Refused, match="does not account for PCR 9"):
            run(host)
    assert boot(host, form(*stub(code, b"two"))) == ("unsealed" if predicted else "pcr-mismatch")
    host.close()


def test_a_host_that_was_initialised_in_this_boot_may_be_updated_before_the_next(tmp_path: Path) -> None:
    """Its files are kept, as `init` does it, before they are replaced; and a refusal at the first boot is explained."""
    old, new = (pefile.build({".text": code * 300}) for code in (b"old", b"new"))
    host = Machine(tmp_path, stub(old, b"one"))  # type: ignore[arg-type]
    host.write("sys/firmware/efi/x", b"")
    for path, data in (("vmlinuz-6.1", old), ("initrd.img-6.1", b"one")):
        host.write(f"boot/efi/EFI/debian/{path}", data)
    baseline.record_good_boot(host.paths, host.chip.tcti)
    found = diagnosis.diagnose(evidence.gather_evidence(host.paths, host.chip.tcti))
    assert (found.verdict, found.causes) == ("no-slot", ())
    host.write("boot/efi/EFI/debian/vmlinuz-6.1", new)
    (entry,) = run(host).boots
    assert entry.changes == ("kernel 6.1 was replaced",)
    assert boot(host, stub(new, b"another")) == "pcr-mismatch"
    baseline.record_good_boot(host.paths, host.chip.tcti)  # teaches nothing
    found = diagnosis.diagnose(evidence.gather_evidence(host.paths, host.chip.tcti))
    assert [each.code for each in found.causes] == ["kernel", "initrd"]
    assert boot(host, stub(new, b"one")) == "unsealed"
    host.close()


def test_a_kernel_that_is_on_no_disk_stays_and_its_initramfs_is_predicted(tmp_path: Path) -> None:
    """QEMU -kernel; a real log, the initramfs replaced."""
    events = eventlog.parse_event_log(real("direct-0").log).events
    made = [Entry(each.pcr, each.kind, b"", each.data, each.digest) for each in events]

    def with_initrd(data: bytes) -> Made:
        new = sha256(data).digest()
        tag = eventlog.INITRD
        return Made([each._replace(digest=new) if each.data[:4] == tag else each for each in made], "direct")

    host = enrolled(tmp_path, with_initrd(b"one"), {"boot/initrd.img-6.12": b"one"})
    host.write("boot/initrd.img-6.12", b"two")
    (entry,) = run(host).boots
    assert (entry.words, entry.changes) == ("kernel 6.12", ("initramfs of 6.12",))
    assert boot(host, with_initrd(b"two")) == "unsealed"
    host.close()


def unified(code: bytes, system: bytes = b'ID=debian\nVERSION_ID="13"\n', signature: bytes = b"") -> bytes:
    inner = pefile.build({".text": code * 300})
    sections = {".text": b"stub", ".osrel": system, ".linux": inner, ".cmdline": b"root=x", ".initrd": code * 99}
    return pefile.build(sections, signature=signature)


def uki(image: bytes, name: str) -> Made:
    linux = pe.read_section(image, pe.read_layout(image), ".linux")
    assert linux
    entries = [
        *(plain(pcr, 4, bytes(4)) for pcr in range(8)),
        program("\\EFI\\BOOT\\BOOTX64.EFI", "")._replace(digest=pe.authenticode(LOADER)),
        program(f"\\EFI\\Linux\\{name}", "")._replace(digest=pe.authenticode(image)),
        *(Entry(11, 0x0D, b"", b"", digest) for digest in uki_replay.section_digests(image)),
        program("", "")._replace(digest=pe.authenticode(linux)),
    ]
    return Made(entries, "uki")


LOADER = pefile.build({".text": b"systemd-boot"})


def test_unified_kernel_images(tmp_path: Path) -> None:
    """One is built again under its name, another comes beside it: systemd-boot may start either by itself."""
    older, old, again, newer = (unified(code) for code in (b"older", b"old", b"again", b"newer"))
    now, linux = uki(old, "debian-6.9.efi"), "boot/efi/EFI/Linux"
    host = enrolled(tmp_path, now, {f"{linux}/debian-6.9.efi": old, "boot/efi/EFI/BOOT/BOOTX64.EFI": LOADER})
    host.write(f"{linux}/debian-6.9.efi", again)
    host.write(f"{linux}/debian-6.12.efi", newer)
    host.write(f"{linux}/debian-6.1\N{SUPERSCRIPT TWO}.efi", older)
    host.write(f"{linux}/addon.efi", b"no image")
    found = run(host)
    assert [each.words.split()[-1] for each in found.boots] == [
        "debian-6.9.efi",
        "debian-6.12.efi",
        "debian-6.1\N{SUPERSCRIPT TWO}.efi",
    ]
    assert [each.default for each in found.boots] == [True, True, False]
    assert boot(host, uki(newer, "debian-6.12.efi")) == "unsealed"
    assert boot(host, uki(again, "debian-6.9.efi")) == "unsealed"
    assert boot(host, uki(unified(b"a thief's"), "debian-6.9.efi")) == "pcr-mismatch"
    host.close()


def test_what_systemd_boot_was_told_to_start_is_what_comes(tmp_path: Path) -> None:
    """By bootctl set-oneshot and loader.conf; try counters are no part of an entry's name."""
    old, older, newer = (unified(code) for code in (b"old", b"older", b"newer"))
    now, linux = uki(old, "b-6.9.efi"), "boot/efi/EFI/Linux"
    host = enrolled(tmp_path, now, {f"{linux}/b-6.9.efi": old, "boot/efi/EFI/BOOT/BOOTX64.EFI": LOADER})

    def defaults() -> list[str]:
        return [each.words.split()[-1] for each in run(host, dry_run=True).boots if each.default]

    host.write(f"{linux}/b-6.1+2-1.efi", older)
    host.write(f"{linux}/a-6.2.efi", newer)
    assert defaults() == ["b-6.9.efi"]
    host.write("boot/efi/loader/loader.conf", b"timeout 3\ndefault A-6*\n")
    assert defaults() == ["b-6.9.efi", "a-6.2.efi"]
    host.write("boot/efi/loader/loader.conf", b"default b-*\n")
    assert defaults() == ["b-6.9.efi"]
    host.write("boot/efi/loader/loader.conf", b"timeout 3\ndefault A-6*\n")
    once = "sys/firmware/efi/efivars/LoaderEntryOneShot-4a67b082-0a4c-41cf-b6c7-440b29bb8c4f"
    host.write(once, bytes(4) + "b-6.1.efi\0".encode("utf-16-le"))
    assert defaults() == ["b-6.9.efi", "b-6.1+2-1.efi", "a-6.2.efi"]
    for name in ("auto-windows", "b-6.9.efi@1"):  # another system, a profile of a unified kernel image
        host.write(once, bytes(4) + f"{name}\0".encode("utf-16-le"))
        assert checked(host)[0] == UNSAFE and defaults() == [name, "b-6.9.efi", "a-6.2.efi"]
    host.write(once.replace("OneShot", "Default"), bytes(4) + "b-6.9.efi@2\0".encode("utf-16-le"))
    assert defaults() == ["b-6.9.efi@1", "b-6.9.efi@2", "b-6.9.efi"]
    host.write(f"{linux}/b-6.9.efi@2.efi", older)
    host.write(once.replace("OneShot", "Default"), bytes(4) + "b-6.9.efi@2.efi\0".encode("utf-16-le"))
    assert defaults() == ["b-6.9.efi@1", "b-6.9.efi", "b-6.9.efi@2.efi"]
    host.close()


def test_what_systemd_boot_was_told_to_prefer(tmp_path: Path) -> None:
    """By systemd 260 and later: it comes before the default, but not when it has no try left. An older systemd-boot
    does not know the word."""
    now, linux = uki(unified(b"old"), "1.efi"), "boot/efi/EFI/Linux"
    host = enrolled(tmp_path, now, {f"{linux}/1.efi": unified(b"old"), "boot/efi/EFI/BOOT/BOOTX64.EFI": LOADER})

    def defaults() -> list[str]:
        return [each.words.split()[-1] for each in run(host, dry_run=True).boots if each.default][1:]

    def variable(name: str, value: bytes) -> None:
        host.write(f"sys/firmware/efi/efivars/{name}-4a67b082-0a4c-41cf-b6c7-440b29bb8c4f", bytes(4) + value)

    for name in ("2.efi", "3.efi", "4+0-3.efi"):
        host.write(f"{linux}/{name}", unified(name.encode()))
    host.write("boot/efi/loader/loader.conf", b"default 2.efi\npreferred [34].efi\n")
    assert defaults() == ["3.efi", "2.efi"]
    variable("LoaderFeatures", (0x7FFFF).to_bytes(8, "little"))
    assert defaults() == ["3.efi", "2.efi"]
    variable("LoaderFeatures", (0xFFFFF).to_bytes(8, "little"))
    assert defaults() == ["3.efi"]
    host.write("boot/efi/loader/loader.conf", b"default 2.efi\npreferred 4.efi\n")
    assert defaults() == ["2.efi"]
    variable("LoaderEntryPreferred", "3.efi\0".encode("utf-16-le"))
    assert defaults() == ["3.efi"]
    variable("LoaderEntryDefault", "4.efi\0".encode("utf-16-le"))
    assert defaults() == ["3.efi"]
    variable("LoaderEntryPreferred", "gone.efi\0".encode("utf-16-le"))
    assert defaults() == ["4+0-3.efi"]
    variable("LoaderEntryOneShot", "2.efi\0".encode("utf-16-le"))
    assert defaults() == ["2.efi", "4+0-3.efi"]
    host.close()


def test_unified_kernel_images_on_an_extended_boot_loader_partition(tmp_path: Path) -> None:
    """systemd-boot and what it was told are on the EFI system partition, which may hold images too."""
    old, newer, newest = (unified(code) for code in (b"old", b"newer", b"newest"))
    now, linux = uki(newer, "6.12.efi"), "boot/EFI/Linux"
    host = enrolled(tmp_path, now, {f"{linux}/6.12.efi": newer, "efi/EFI/BOOT/BOOTX64.EFI": LOADER})
    host.write(f"{linux}/6.9.efi", old)
    host.write("boot/loader/loader.conf", b"default nobody-reads-this\n")
    assert checked(host) == [SAFE, NOTE]
    host.write("efi/loader/loader.conf", b"default 6.9*\n")
    assert checked(host) == [SAFE, UNSAFE]
    host.write("efi/loader/loader.conf", b"timeout 3\n")
    host.write("efi/EFI/Linux/6.13.efi", newest)
    assert checked(host) == [SAFE, UNSAFE, NOTE]
    Path(host.paths.root, "boot/efi").symlink_to("../efi")  # an image that is reached twice
    run(host)
    assert checked(host) == [SAFE] * 3
    assert boot(host, uki(newest, "6.13.efi")) == "unsealed"
    host.close()


def test_the_default_entry_is_among_those_that_there_is_room_for(tmp_path: Path) -> None:
    image, linux = {f"{number}.efi": unified(b"%d" % number) for number in range(1, 10)}, "boot/efi/EFI/Linux"
    files = {f"{linux}/{name}": data for name, data in image.items()}
    host = enrolled(tmp_path, uki(image["9.efi"], "9.efi"), {**files, "boot/efi/EFI/BOOT/BOOTX64.EFI": LOADER})
    host.write("boot/efi/loader/loader.conf", b"default 1.efi\n")
    assert len(run(host).boots) == predict.BOOTS_MAX
    assert boot(host, uki(image["1.efi"], "1.efi")) == "unsealed"
    host.close()


def test_programs_in_the_menu_that_would_not_start_as_they_should(tmp_path: Path) -> None:
    """systemd-boot lists what says which system it is: an image that is cut short, as the partition is full, and a
    program without a kernel."""
    linux, later = "boot/efi/EFI/Linux", b'ID=debian\nVERSION_ID="14"\n'
    signed = pefile.build({".osrel": later, ".linux": pefile.build({".text": b"kernel"})}, signature=bytes(2000))
    now, cut = uki(unified(b"old"), "6.9.efi"), unified(b"newer", later)[:-200]
    host = enrolled(tmp_path, now, {f"{linux}/6.9.efi": unified(b"old"), "boot/efi/EFI/BOOT/BOOTX64.EFI": LOADER})
    host.write(f"{linux}/memtest.efi", pefile.build({".text": b"of no system, so in no menu"}))
    assert checked(host) == [SAFE]
    host.write(f"{linux}/none.efi", pefile.build({".osrel": b"ID=z\n", ".text": b"no kernel"}))
    assert checked(host) == [SAFE, NOTE]
    host.write("boot/efi/loader/loader.conf", b"default none*\n")
    assert checked(host) == [SAFE, UNSAFE]
    Path(host.paths.root, linux, "none.efi").unlink()
    for data in (cut, signed[:-200]):
        host.write(f"{linux}/6.12.efi", data)
        assert run(host).boots[1].why and checked(host) == [SAFE, UNSAFE]
    Path(host.paths.root, linux, "6.12.efi").unlink()
    Path(host.paths.root, linux, "6.9.efi").unlink()
    assert checked(host) == [UNPROVEN]
    host.close()


def test_a_unified_kernel_image_that_the_firmware_starts(tmp_path: Path) -> None:
    """It has no menu: what lies beside it does not come by itself, and nothing does when it is gone."""
    old, newer = unified(b"old"), unified(b"newer")
    now, linux = uki(old, "6.9.efi"), "boot/efi/EFI/Linux"
    now.made.remove(next(each for each in now.made if each.digest == pe.authenticode(LOADER)))
    host = enrolled(tmp_path, now, {f"{linux}/6.9.efi": old})
    host.write(f"{linux}/6.12.efi", newer)
    assert checked(host) == [SAFE, NOTE]
    run(host)
    Path(host.paths.root, linux, "6.9.efi").unlink()
    assert checked(host) == [UNPROVEN]
    host.close()


def test_the_order_of_systemd_boots_menu(tmp_path: Path) -> None:
    """It says what comes where nothing was told: sort key, machine, version and name, in this order, and what has no
    try left last. An entry that is no unified kernel image counts where it comes first."""
    linux, entries = "boot/efi/EFI/Linux", "boot/efi/loader/entries"
    now = uki(unified(b"old"), "b.efi")
    host = enrolled(tmp_path, now, {f"{linux}/b.efi": unified(b"old"), "boot/efi/EFI/BOOT/BOOTX64.EFI": LOADER})

    def defaults() -> list[str]:
        return [each.words.split()[-1] for each in run(host, dry_run=True).boots if each.default]

    def entry(name: str, *lines: str) -> None:
        host.write(f"{entries}/{name}", "\n".join(("title x", "linux /EFI/Linux/b.efi", *lines)).encode())

    assert defaults() == ["b.efi"]
    host.write(f"{linux}/a.efi", unified(b"14", b"ID=debian\nVERSION_ID=14\n"))  # a later release, whatever its name
    assert defaults() == ["b.efi", "a.efi"]
    host.write(f"{linux}/z.efi", unified(b"fedora", b"ID=fedora\nVERSION_ID=99\n"))
    host.write(f"{linux}/zz+0-3.efi", unified(b"failed", b"ID=debian\nVERSION_ID=15\n"))
    host.write(f"{linux}/zzz.efi", unified(b"of nobody", b"NAME=x\n"))
    entry("z.conf", "version 99")
    entry("y.conf", "sort-key debian", "machine-id 0123", "version 99")
    entry("x.conf", "sort-key e", "version 99")
    entry("gone.conf", "sort-key a", "linux /EFI/gone")
    host.write(f"{entries}/w.conf", b"sort-key a\ntitle without a program\n")
    assert defaults() == ["b.efi", "a.efi"]
    entry("v.conf", "sort-key debian", "version 13")
    assert defaults() == ["b.efi", "a.efi"]
    entry("v.conf", "sort-key debian", "version 15")
    assert defaults() == ["v.conf", "b.efi"] and checked(host)[0] == UNSAFE
    entry("u+2.conf", "sort-key cloud")
    assert defaults() == ["u.conf", "b.efi"]
    host.write("boot/efi/loader/loader.conf", b"default @saved\n")
    assert defaults() == ["u.conf", "b.efi"]
    last = "sys/firmware/efi/efivars/LoaderEntryLastBooted-4a67b082-0a4c-41cf-b6c7-440b29bb8c4f"
    host.write(last, bytes(4) + "b.efi\0".encode("utf-16-le"))
    assert defaults() == ["b.efi"]
    told = last.replace("LastBooted", "Default")
    host.write(told, bytes(4) + "v*\0".encode("utf-16-le"))
    assert defaults() == ["v.conf", "b.efi"]
    host.write("boot/efi/loader/loader.conf", b"default v*\n")
    host.write(told, bytes(4) + "@saved\0".encode("utf-16-le"))
    assert defaults() == ["b.efi"]
    host.close()


def test_the_unified_kernel_image_of_this_boot_was_removed(tmp_path: Path) -> None:
    """With its kernel: the other one comes. Without another, nothing is predicted."""
    old, newer = unified(b"old"), unified(b"newer")
    now, linux = uki(old, "6.9.efi"), "boot/efi/EFI/Linux"
    host = enrolled(tmp_path, now, {f"{linux}/6.9.efi": old, "boot/efi/EFI/BOOT/BOOTX64.EFI": LOADER})
    host.write(f"{linux}/6.12.efi", newer)
    run(host)
    assert checked(host) == [SAFE, SAFE]
    Path(host.paths.root, linux, "6.9.efi").unlink()
    assert checked(host) == [SAFE]
    Path(host.paths.root, linux, "6.12.efi").unlink()
    assert checked(host) == [UNPROVEN]
    host.close()


def test_an_add_on_or_a_credential_beside_a_unified_kernel_image_is_measured_too(tmp_path: Path) -> None:
    image, linux = unified(b"code"), "boot/efi/EFI/Linux"
    now, addon = uki(image, "debian.efi"), f"{linux}/debian.efi.extra.d/quiet.addon.efi"
    host = enrolled(
        tmp_path, now, {f"{linux}/debian.efi": image, "boot/efi/EFI/BOOT/BOOTX64.EFI": LOADER, addon: b"quiet"}
    )
    assert checked(host) == [SAFE]
    host.write("boot/efi/loader/credentials/x.cred", b"secret")
    assert checked(host) == [UNSAFE]
    Path(host.paths.root, "boot/efi/loader/credentials/x.cred").unlink()
    assert checked(host) == [SAFE]
    host.write(addon, b"not quiet")
    assert checked(host) == [UNSAFE] and "add-ons" in run(host).boots[0].why
    host.close()


@pytest.mark.parametrize("handed", [True, False])
def test_an_add_on_is_a_program_too_and_stays_as_it_is(tmp_path: Path, handed: bool) -> None:
    """The firmware measures it between the image and its kernel, or last, where systemd-stub starts the kernel."""
    old, newer, addon = unified(b"old"), unified(b"newer"), pefile.build({".cmdline": b"quiet"})
    linux = "boot/efi/EFI/Linux"

    def with_addon(image: bytes, name: str) -> Made:
        *made, kernel = uki(image, name).made
        added = program(f"\\EFI\\Linux\\{name}.extra.d\\quiet.ADDON.EFI", "")._replace(digest=pe.authenticode(addon))
        return Made([*made, added, *([kernel] if handed else [])], "uki")

    now = with_addon(old, "6.9.efi")
    files = {f"{linux}/6.9.efi": old, "boot/efi/EFI/BOOT/BOOTX64.EFI": LOADER}
    host = enrolled(tmp_path, now, {**files, f"{linux}/6.9.efi.extra.d/quiet.ADDON.EFI": addon})
    assert checked(host) == [SAFE]
    for name, data in ((f"{linux}/6.12.efi", newer), (f"{linux}/6.12.efi.extra.d/quiet.ADDON.EFI", addon)):
        host.write(name, data)
    run(host)
    assert checked(host) == [SAFE, SAFE]
    assert boot(host, with_addon(newer, "6.12.efi")) == "unsealed"
    host.close()


def test_a_boot_that_was_blessed_has_another_name(tmp_path: Path) -> None:
    """systemd-bless-boot takes the counter away after the boot."""
    image, linux = unified(b"code"), "boot/efi/EFI/Linux"
    now = uki(image, "debian+2-1.efi")
    host = enrolled(tmp_path, now, {f"{linux}/debian+2-1.efi": image, "boot/efi/EFI/BOOT/BOOTX64.EFI": LOADER})
    host.write(f"{linux}/debian.efi.extra.d/x.cred", b"one")
    assert checked(host) == [UNSAFE]
    booted.save_booted_files(
        host.paths, booted.find_booted_files(BootTree(host.paths), eventlog.parse_event_log(now.log()))
    )
    assert checked(host) == [SAFE]
    Path(host.paths.root, f"{linux}/debian+2-1.efi").rename(Path(host.paths.root, f"{linux}/debian.efi"))
    assert checked(host) == [SAFE]
    Path(host.paths.booted).unlink()
    assert checked(host) == [SAFE]
    host.close()


def test_a_trial_that_failed_is_the_file_that_it_was(tmp_path: Path) -> None:
    """systemd-boot has counted it in its name, and the operator has chosen the old one. What a thief has put there
    stays his, whatever is counted."""
    old, newer, his = (unified(code) for code in (b"old", b"newer", b"a thief's"))
    now, linux = uki(old, "6.9.efi"), "boot/efi/EFI/Linux"
    host = enrolled(tmp_path, now, {f"{linux}/6.9.efi": old, "boot/efi/EFI/BOOT/BOOTX64.EFI": LOADER})

    def again() -> list[str]:
        assert boot(host, now) == "unsealed"
        baseline.record_good_boot(host.paths, host.chip.tcti)
        return checked(host)

    def renamed(name: str, to: str) -> None:
        Path(host.paths.root, linux, name).rename(Path(host.paths.root, linux, to))

    host.write(f"{linux}/6.12+3.efi", newer)
    run(host)
    renamed("6.12+3.efi", "6.12+2-1.efi")
    assert again() == [SAFE, SAFE]
    host.write(f"{linux}/6.12+2-1.efi", his)
    assert again() == [SAFE, UNSAFE]
    renamed("6.12+2-1.efi", "6.12+1-2.EFI")
    for _ in range(2):
        assert "while this host was off" in run(host).boots[1].why
        assert again() == [SAFE, UNSAFE]
    assert boot(host, uki(his, "6.12+1-2.EFI")) == "pcr-mismatch"
    host.close()


def test_a_policy_over_a_pcr_that_cannot_be_foreseen_leaves_out_that_entry_alone(tmp_path: Path) -> None:
    """PCR 9 of another unified kernel image."""
    old, newer = unified(b"old"), unified(b"newer")
    now, linux = uki(old, "debian-6.9.efi"), "boot/efi/EFI/Linux"
    now.made.append(tagged(9, 0x8F3B22EC, "Linux initrd", b"initrd"))
    host = Machine(tmp_path, now, (4, 9, 11))  # type: ignore[arg-type]
    host.write("sys/firmware/efi/efivars/StubInfo-1", b"")
    for path, data in ((f"{linux}/debian-6.9.efi", old), ("boot/efi/EFI/BOOT/BOOTX64.EFI", LOADER)):
        host.write(path, data)
    assert boot(host, now) == "unsealed"
    baseline.record_good_boot(host.paths, host.chip.tcti)
    host.write(f"{linux}/debian-6.12.efi", newer)
    assert checked(host) == [SAFE, UNSAFE]
    assert ["PCR 9" in each.why for each in run(host).boots] == [False, True]
    host.close()


def test_a_new_boot_loader(tmp_path: Path) -> None:
    """systemd-boot is predicted to do the same, and that is said."""
    image, newer = unified(b"kernel"), pefile.build({".text": b"newer systemd-boot" * 50})
    now = uki(image, "debian.efi")
    disks = {"boot/efi/EFI/Linux/debian.efi": image, "boot/efi/EFI/BOOT/BOOTX64.EFI": LOADER}
    host = enrolled(tmp_path, now, disks)
    host.write("boot/efi/EFI/BOOT/BOOTX64.EFI", newer)
    assert "as if it did the same" in run(host).notes[0]
    digests = {pe.authenticode(LOADER): pe.authenticode(newer)}
    updated = [each._replace(digest=digests.get(each.sha256, each.sha256)) for each in now.made]
    assert boot(host, Made(updated, "uki")) == "unsealed"
    host.close()


def test_what_grub_would_read_of_its_own_accord_is_not_guessed(tmp_path: Path) -> None:
    """A language or a theme may be a file. An empty custom.cfg is one, too, and `test -f` finds it. What GRUB has read
    in this boot must be there to be read again."""
    english = text("grub-0").replace("terminal_input console", "set lang=en_US\nterminal_input console")
    german = english.replace("en_US", "de_DE")
    assert english != text("grub-0")
    events, _ = grub_replay.measure_entry(learned("grub-0"), text("grub-0"), WAYS["grub-0"], disk("grub-0"))
    said = next(event for event in events if event.data == b"grub_cmd: terminal_input console")
    lang = b"set lang=en_US"
    at = events.index(said)
    events.insert(at, said._replace(digest=sha256(lang).digest(), data=b"grub_cmd: " + lang))
    font = eventlog.Event(9, eventlog.IPL, sha256(b"font").digest(), b"(hd1)/grub/fonts/unicode.pf2\0")
    events.insert(at + 2, font)
    config = next(at for at, event in enumerate(events) if event.data.partition(b"\0")[0] == CONFIG.encode())
    events[config] = events[config]._replace(digest=sha256(english.encode()).digest())
    host = Machine(tmp_path, Made(NOW.small(events), "grub"))  # type: ignore[arg-type]
    host.write("sys/firmware/efi/fw_platform_size", b"64\n")
    for path, data in LOADERS.items():
        host.write("boot/efi" + path.replace("\\", "/"), data)
    files = {**BEFORE, CONFIG: english.encode(), "(hd1)/grub/fonts/unicode.pf2": b"font"}
    install(host, {name: data for name, data in files.items() if NEW not in name})
    baseline.record_good_boot(host.paths, host.chip.tcti)
    assert {each.why for each in run(host).boots} == {""}
    install(host, {CONFIG: german.encode()})
    assert "`set lang=de_DE` reads is not known" in run(host).boots[0].why
    install(host, {CONFIG: english.encode()})
    host.write("boot/grub/custom.cfg", b"")
    assert "custom.cfg" in run(host).boots[0].why
    Path(host.paths.root, "boot/grub/custom.cfg").unlink()
    assert {each.why for each in run(host).boots} == {""}
    Path(host.paths.root, "boot/grub/fonts/unicode.pf2").unlink()
    assert "is not on disk" in run(host).boots[0].why
    host.close()


def test_a_menu_entry_without_an_initramfs_opens_nothing(host: Machine) -> None:
    """/boot was full when it was made, and update-grub has left it out."""
    lines = [line for line in text("grub-1").splitlines(keepends=True) if f"initrd\t/initrd.img-{NEW}" not in line]
    install(host, {**AFTER, CONFIG: "".join(lines).encode()})
    assert "no initramfs" in run(host).boots[0].why
    assert checked(host)[0] == UNSAFE


def test_a_disk_that_came_or_went_may_have_renumbered_those_of_grub(host: Machine) -> None:
    def plug(name: str, at: str) -> None:
        host.write(f"sys/devices/{at}/{name}/size", b"")
        Path(host.paths.root, "sys/block").mkdir(exist_ok=True)
        Path(host.paths.root, "sys/block", name).symlink_to(f"../devices/{at}/{name}")

    for name, at in (("dm-0", "virtual/block"), ("loop0", "virtual/block"), ("sr0", "pci0000:00/ata1/block")):
        plug(name, at)
    assert UNPROVEN not in checked(host)
    plug("sdb", "pci0000:00/usb1/host2/block")
    assert UNPROVEN in checked(host) and "disks came or went" in run(host).doubts[0]
    Path(host.paths.root, "sys/block/sdb").unlink()
    plug("nvme0n1", "virtual/nvme-subsystem/nvme-subsys0")
    assert UNPROVEN in checked(host)


def test_a_new_shim_is_not_guessed_and_a_new_grub_is_said(host: Machine) -> None:
    host.write("boot/efi/EFI/BOOT/grubx64.efi", pefile.build({".text": b"grub 2.13" * 50}))
    (note,) = run(host).notes
    assert "grubx64.efi" in note
    assert checked(host) == [SAFE, SAFE, UNPROVEN]
    host.write("boot/efi/EFI/BOOT/BOOTX64.EFI", pefile.build({".text": b"shim 17" * 50}))
    with pytest.raises(Refused, match="new shim"):
        run(host)


EFI = "boot/efi/EFI/BOOT"


def test_a_boot_loader_that_could_not_be_looked_at_when_the_boot_was_recorded(host: Machine) -> None:
    """The EFI partition is mounted later: what is on it then is compared with the log. A new one was never this
    boot's."""
    Path(host.paths.booted).unlink()
    esp, away = Path(host.paths.root, "boot/efi"), Path(host.paths.root, "not-mounted")
    esp.rename(away)
    esp.mkdir()
    baseline.record_good_boot(host.paths, host.chip.tcti)
    assert UNPROVEN in checked(host)
    doubts = run(host, dry_run=True).doubts
    assert ["is the EFI system partition mounted" in each for each in doubts] == [True, True]
    esp.rmdir()
    away.rename(esp)
    assert checked(host) == [SAFE, NOTE]
    host.write(f"{EFI}/grubx64.efi", pefile.build({".text": b"grub 2.13" * 50}))
    assert checked(host) == [SAFE, NOTE, UNPROVEN]
    (note,) = run(host).notes
    assert "grubx64.efi is not on disk as it was booted" in note
    host.write(f"{EFI}/BOOTX64.EFI", pefile.build({".text": b"shim 17" * 50}))
    assert checked(host) == [UNPROVEN]
    with pytest.raises(Refused, match="new shim"):
        run(host)


def test_systemd_boot_was_updated_before_the_boot_was_recorded(tmp_path: Path) -> None:
    image, newer = unified(b"kernel"), pefile.build({".text": b"newer systemd-boot" * 50})
    now = uki(image, "debian.efi")
    host = enrolled(tmp_path, now, {"boot/efi/EFI/Linux/debian.efi": image, f"{EFI}/BOOTX64.EFI": LOADER})
    assert checked(host) == [SAFE]
    Path(host.paths.booted).unlink()
    host.write(f"{EFI}/BOOTX64.EFI", newer)
    baseline.record_good_boot(host.paths, host.chip.tcti)
    assert checked(host) == [SAFE, UNPROVEN]
    host.close()


# Secure Boot


def signature(subject: str, issuer: str = "") -> bytes:
    """A table with one signature (WIN_CERTIFICATE, PKCS #7), by a certificate of this issuer or by one of its own."""
    key = ec.generate_private_key(ec.SECP256R1())
    names = [x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, each)]) for each in (subject, issuer or subject)]
    day = datetime.datetime(2025, 1, 1)
    made = x509.CertificateBuilder(names[1], names[0], key.public_key(), 7, day, day + datetime.timedelta(days=9000))
    own = made.sign(key, SHA256())
    signer = pkcs7.PKCS7SignatureBuilder().set_data(b"x").add_signer(own, key, SHA256())
    data = signer.sign(Encoding.DER, [pkcs7.PKCS7Options.Binary])
    data += bytes(-len(data) % 8)
    return struct.pack("<IHH", len(data) + 8, 0x200, 2) + data


def secure(now: Made) -> Made:
    on = variable(7, "SecureBoot", b"\1")
    return now._replace(made=[on, *(each for each in now.made if b"S\0e\0c\0u\0r\0e\0B" not in each.data)])


def test_who_signed_a_unified_kernel_image(tmp_path: Path) -> None:
    """Another signer of the same authority is an update like any other. Another authority is another event in PCR 7.
    What nobody has signed does not start. The image of this boot is gone from the disk by then."""
    image = "boot/efi/EFI/Linux/debian.efi"
    old = unified(b"old", signature=signature("Signer 2022", "CA"))
    now = secure(uki(old, "debian.efi"))
    host = enrolled(tmp_path, now, {image: old, f"{EFI}/BOOTX64.EFI": LOADER})

    def after(table: bytes) -> list[str]:
        host.write(image, unified(b"new", signature=table))
        run(host)
        return checked(host)

    assert checked(host) == [SAFE]
    assert after(signature("Signer 2025", "CA")) == [SAFE]
    assert after(signature("Signer 2022", "Another CA")) == [SAFE, UNPROVEN]
    assert f"{image} is signed by another key: PCR 7 may change" in run(host).notes
    assert after(signature("CA")) == [SAFE, UNPROVEN]
    assert after(struct.pack("<IHH", 64, 0x200, 2) + b"\xff" * 56) == [SAFE, UNPROVEN]
    for nothing in (b"\1", bytes(64), signature("Signer 2025", "CA")[:-60], b""):
        assert after(nothing) == [UNSAFE]
    assert run(host).boots[0].why == "it is not signed, and Secure Boot is on"
    host.close()


def test_signatures_that_cannot_be_read_are_those_of_nobody_known() -> None:
    table = signature("Signer", "CA")
    (ca,) = certificates.signing_authorities(table)
    assert ca.endswith(b"CA") and certificates.signing_authorities(table + signature("Another signer", "CA")) == {ca}
    assert len(certificates.signing_authorities(table + signature("CA", "Root"))) == 2
    for at in range(len(table)):
        assert certificates.signing_authorities(table[:at]) == set()
        for value in (0, 0x80, 0x84, 0xFF):
            certificates.signing_authorities(table[:at] + bytes([value]) + table[at + 1 :])


def test_where_secure_boot_is_off_nobody_asks_who_signed(tmp_path: Path) -> None:
    image = "boot/efi/EFI/Linux/debian.efi"
    old = unified(b"old", signature=signature("Signer", "CA"))
    host = enrolled(tmp_path, uki(old, "debian.efi"), {image: old, f"{EFI}/BOOTX64.EFI": LOADER})
    host.write(image, unified(b"new"))
    run(host)
    assert checked(host) == [SAFE]
    host.close()


def test_who_signed_a_boot_loader(tmp_path: Path) -> None:
    image, loader = unified(b"kernel"), f"{EFI}/BOOTX64.EFI"

    def systemd_boot(code: bytes, table: bytes = b"") -> bytes:
        return pefile.build({".text": code * 50}, signature=table)

    old = systemd_boot(b"systemd-boot 257", signature("of this host"))
    now = uki(image, "debian.efi")
    made = [each._replace(digest=pe.authenticode(old)) if b"B\0O\0O\0T\0X" in each.data else each for each in now.made]
    host = enrolled(tmp_path, secure(now._replace(made=made)), {"boot/efi/EFI/Linux/debian.efi": image, loader: old})
    assert checked(host) == [SAFE]
    host.write(loader, systemd_boot(b"systemd-boot 257", signature("of this host")))  # another key of that name
    assert checked(host) == [SAFE, UNPROVEN]
    host.write(loader, systemd_boot(b"systemd-boot 258"))
    assert checked(host) == [UNPROVEN]
    with pytest.raises(Refused, match="it is not signed, and Secure Boot is on"):
        run(host)
    Path(host.paths.root, loader).unlink()
    assert checked(host) == [SAFE, UNPROVEN]
    host.close()


def test_who_signed_a_kernel_that_the_firmware_starts(tmp_path: Path) -> None:
    kernel, initrd = "boot/efi/EFI/debian/vmlinuz-6.1", "boot/efi/EFI/debian/initrd.img-6.1"
    old = pefile.build({".text": b"old" * 300}, signature=signature("of this host"))
    host = enrolled(tmp_path, secure(stub(old, b"one")), {kernel: old, initrd: b"one"})
    assert checked(host) == [SAFE]
    host.write(kernel, pefile.build({".text": b"new" * 300}, signature=signature("of this host")))
    run(host)
    assert checked(host) == [SAFE, UNPROVEN]
    host.write(kernel, pefile.build({".text": b"new" * 300}))
    assert checked(host) == [UNSAFE]
    host.close()


def test_who_signed_a_kernel_that_grub_starts(tmp_path: Path) -> None:
    """shim measures it, and asks who signed. A kernel that one has built oneself, and not signed, is the default."""
    old, new = (
        {f"/vmlinuz-{version}": pefile.build({".text": version.encode() * 9}, signature=signature("of Debian", "CA"))}
        for version in (OLD, NEW)
    )
    files = {**BEFORE, **old}
    entries = RealBoot("grub-0", files).entries()
    at = next(i for i, each in enumerate(entries) if each.data.startswith(b"grub_cmd: linux"))
    handed = program("", "")._replace(digest=pe.authenticode(old[f"/vmlinuz-{OLD}"]))
    now = secure(Made([*entries[: at + 1], handed, *entries[at + 1 :]], "grub"))
    disks = {f"boot/efi{path.replace(chr(92), '/')}": data for path, data in LOADERS.items()}
    disks |= {place(name): data for name, data in files.items() if NEW not in name and name.startswith(("/", "(hd"))}
    host = enrolled(tmp_path, now, disks)
    assert checked(host)[0] == SAFE
    install(host, {**AFTER, **old, **new})
    assert run(host).boots[0].words == f"kernel {NEW}" and checked(host) == [SAFE] * 3
    install(host, {f"/vmlinuz-{NEW}": AFTER[f"/vmlinuz-{NEW}"]})
    assert checked(host)[:2] == [UNSAFE, NOTE]
    assert run(host).boots[0].why == "it is not signed, and Secure Boot is on"
    host.close()
