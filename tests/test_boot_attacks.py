# SPDX-License-Identifier: Apache-2.0
"""Attacks on a boot. Each is seen to fail; and to succeed, with its defence taken out of the initramfs: so it bites."""

import base64
import shutil
from collections.abc import Iterator, Sequence
from pathlib import Path

import pytest

from tests.lab import attacks
from tests.lab.guest import Guest
from tests.lab.machine import Machine, report
from tests.lab.running import Disk, Running
from tests.lab.stories import STOCK_PROMPT, UNSEAL, begun, outcomes, unmeasured, unseal_as_root
from tests.test_boot_silence import ALTERED, UNTOLD

pytestmark = [pytest.mark.vm, pytest.mark.always]

CODE = "usr/lib/unlock/unlock"
BELIEVES = (  # what authenticates is believed without a look
    (
        f"{CODE}/wrap.py",
        "or len(key) != _KEY or not _decrypt(key, wrapped, aad, plain):",
        "or len(key) != _KEY or (_decrypt(key, wrapped, aad, plain) and False):",
    ),
    (f"{CODE}/wrap.py", "if not hmac.compare_digest(mac(key, data), expected):", "if False:"),
    (f"{CODE}/boot/handover.py", "    return NEW_ROOT in mounted and", "    return True or"),
)
EVERY_KEY = (  # each disk may be opened by any key that the TPM gives
    (f"{CODE}/tpm/slots.py", "_TELLING = ", "ALL = []\n_TELLING = "),
    (
        f"{CODE}/tpm/slots.py",
        "return Unsealed(_checked(Payload.decode(sealed), slot, record), slot, record)\n",
        "ALL.append(Unsealed(Payload.decode(sealed), slot, record))\n",
    ),
    (f"{CODE}/tpm/slots.py", "    raise min(problems", "    if ALL:\n        return ALL[0]\n    raise min(problems"),
    (
        f"{CODE}/disks/disk_keys.py",
        "    try:\n        kek = unwrap_kek(each, persistence)\n",
        "    from ..tpm.slots import ALL\n"
        "    if persistence is not ALL[-1].payload.key:\n"
        "        try:\n"
        "            return unwrap_volume_key(header, each, ALL[-1].payload.key)\n"
        "        except Tampered:\n"
        "            pass\n"
        "    try:\n        kek = unwrap_kek(each, persistence)\n",
    ),
)
NO_CAP = (
    (f"{CODE}/boot/agent.py", "                tpm.extend(pcr_policy.CAP_PCR, pcr_policy.CAP_DIGEST)\n", ""),
    ("usr/lib/unlock/functions", "&& return 0 ;;", "; return 0 ;;\n\t*) return 0 ;;"),
)
"""Together with the next: nothing locks the TPM, and any disk may be resumed from."""
CAP_SCRIPT = ("usr/lib/unlock/cap", "run=/run/unlock\n", "exit 0\nrun=/run/unlock\n")
NO_LATE_CAP = "systemd.mask=unlock-cap.service"
"""And nothing locks it in the system either."""

TRY = f"echo {base64.b64encode(UNSEAL.encode()).decode()} | base64 -d | python3 -I -"
"""What a person could try at a shell's prompt."""


@pytest.fixture
def story(tmp_path: Path) -> Iterator[Machine]:
    """A clone of the enrolled machine."""
    yield unmeasured().clone(tmp_path / "machine")
    shutil.rmtree(tmp_path / "machine", ignore_errors=True)


@pytest.fixture
def emulated(tmp_path: Path) -> Iterator[Machine]:
    """The same, of a machine that can resume an image, and start another kernel by kexec."""
    yield unmeasured("qemu").clone(tmp_path / "machine")
    shutil.rmtree(tmp_path / "machine", ignore_errors=True)


def believing(story: Machine) -> Path:
    return story.image.initramfs({}, (*BELIEVES, *UNTOLD))


def give_recovery_key(booted: Running, story: Machine) -> None:
    booted.console.expect("recovery key: ", 300)
    booted.console.send(story.recovery_key + "\n")


def in_shell(booted: Running, command: str) -> str:
    """What a command prints in the initramfs's shell, which is at its prompt."""
    booted.console.send(f'{command} >/lab.out 2>&1; echo "<$(cat /lab.out)>"\n')
    said = booted.console.expect(r"^<((.|\n)*?)>", 60)[1].strip()
    booted.console.expect(r"\(initramfs\)", 60)
    return said


def test_plaintext_behind_genuine_headers_opens_neither_by_tpm_nor_by_recovery_key(story: Machine) -> None:
    """The keyslots are genuine, so the recovery key would open the thief's disk: it is asked for, and nothing opens."""
    attacks.plaintext_root(story)
    attacks.plaintext_data(story.home / "copy-1.raw")
    attacks.swap_tokens(story.home / "twin-1.raw", story.home / "far-1.raw")
    shell = story.image.cmdline.replace("panic=-1", "")
    with story.boot(cmdline=shell) as booted:
        give_recovery_key(booted, story)
        booted.console.expect("another header than this host wrote", 120)
        booted.console.expect(r"\(initramfs\)", 60)
        tampered = in_shell(booted, "grep -B3 tampered /run/unlock/report.json")
        assert tampered.count('"tampered"') == 4, "root, copy, twin, far"
        names = set(in_shell(booted, "ls /dev/mapper").split())
        assert names.isdisjoint(("root", "copy-a", "twin-a", "far-a"))
        assert in_shell(booted, TRY) == "pcr-mismatch"
        booted.console.send("exit\n")
        booted.console.expect(r"\(initramfs\)", 240)  # no prompt that does not check the header
        assert "unlock disk" not in booted.console.text
        booted.kill()


def test_plaintext_would_open_by_tpm_without_authentication(story: Machine) -> None:
    attacks.plaintext_root(story)
    attacks.plaintext_data(story.home / "copy-1.raw")
    with story.boot(initrd=believing(story)) as booted:
        console = begun(booted)
        console.sh(f"test -e /etc/{attacks.MARK}")
        assert outcomes(console)["root"] == "opened"
        assert console.sh("blkid -o value -s LABEL /dev/mapper/copy-a").out == attacks.MARK
        booted.kill()


def test_plaintext_would_open_by_recovery_key_without_authentication(story: Machine) -> None:
    attacks.plaintext_root(story)
    with story.boot(initrd=believing(story), tpm=None) as booted:
        give_recovery_key(booted, story)
        begun(booted).sh(f"test -e /etc/{attacks.MARK}")
        booted.kill()


def test_a_thiefs_root_of_the_same_uuid_gets_no_key_and_no_disk(story: Machine) -> None:
    """The thief opens his own root disk at the stock prompt, after an honest unseal, on a host that does not know that
    its root has to have a token."""
    console = thiefs_root(story, story.image.initramfs({}, UNTOLD))
    assert console == (set(), {"root"})


def test_a_thiefs_root_of_the_same_uuid_is_told_where_the_host_knows_its_own(story: Machine) -> None:
    attacks.own_root(story)
    with story.boot() as booted:
        booted.console.expect(ALTERED, 300)
        booted.console.expect("recovery key: ", 60)
        assert "unlock disk" not in booted.console.text
        booted.kill()


def test_a_thiefs_root_would_get_all_of_it_if_keys_crossed_into_any_root(story: Machine) -> None:
    keys, mappings = thiefs_root(story, believing(story))
    assert "unlock:persistence" in keys
    assert "copy-a" in mappings


def thiefs_root(story: Machine, initrd: Path | None = None) -> tuple[set[str], set[str]]:
    """Cached keys and open disks in the thief's system."""
    attacks.own_root(story)
    with story.boot(initrd=initrd) as booted:
        booted.console.expect(STOCK_PROMPT, 300)
        booted.console.send(attacks.PASSPHRASE + "\n")
        console = begun(booted)
        console.sh(f"test -e /etc/{attacks.MARK}")
        keys = {line.split()[-2].rstrip(":") for line in console.sh("grep unlock: /proc/keys; true").out.splitlines()}
        mappings = set(console.sh("ls /dev/mapper").out.split()) - {"control"}
        booted.kill()
    return keys, mappings


def test_a_thiefs_key_in_the_tpm_opens_no_disk_of_the_host(story: Machine) -> None:
    attacks.own_key(story)
    with story.boot() as booted:
        console = begun(booted)
        console.sh(f"test -e /etc/{attacks.MARK}")  # he gets a host that boots, and reveals nothing
        found = outcomes(console)
        assert found.pop("root") == "opened"
        assert set(found.values()) == {"tampered"}
        assert set(console.sh("ls /dev/mapper").out.split()) == {"control", "root"}
        booted.kill()


def test_a_thiefs_key_would_open_them_if_keys_were_mixed(story: Machine) -> None:
    attacks.own_key(story)
    with story.boot(initrd=story.image.initramfs({}, EVERY_KEY)) as booted:
        console = begun(booted)
        console.sh(f"test -e /etc/{attacks.MARK}")
        assert set(outcomes(console).values()) == {"opened"}
        booted.kill()


SHELLS = ("modules", "premount", "mount", "mountroot", "bottom", "init")
FIRST_OF_ALL = "top"
"""The TPM of a fast machine is not there yet at this one."""


def test_no_shell_on_the_way_can_unseal(story: Machine) -> None:
    with shells(story, SHELLS) as booted:
        shell_after_shell(booted, story, SHELLS)
        booted.kill()


@pytest.mark.long(minutes=8)
def test_no_shell_no_resumed_image_and_no_kexec_can_unseal(emulated: Machine) -> None:
    every = (FIRST_OF_ALL, *SHELLS)
    with shells(emulated, every) as booted:
        shell_after_shell(booted, emulated, every)
        assert booted.guest.sh("cat /sys/power/resume").out == "0:0"
        kexec(emulated, booted)
        booted.console.expect("cannot unseal: .*PCR", 300)
        booted.kill()


def shell_after_shell(booted: Running, story: Machine, names: Sequence[str]) -> None:
    for name in names:
        if name == "bottom":  # each shell ended the agent, and the cap came before the first
            booted.console.expect("unlock disk root", 300)
            booted.console.send(story.recovery_key + "\n")
        booted.console.expect(r"\(initramfs\)", 300)
        assert in_shell(booted, TRY) == "pcr-mismatch", name
        booted.console.send("exit\n")
    console = booted.guest
    console.ready(360)
    assert console.sh("systemctl is-active emergency.target").out == "active"
    assert unseal_as_root(console) == "pcr-mismatch"
    rescue = "systemctl isolate --no-block rescue.target; until systemctl is-active -q rescue; do sleep 1; done"
    console.sh(rescue, timeout=240)
    assert unseal_as_root(console) == "pcr-mismatch"


def test_every_shell_would_unseal_without_the_cap(story: Machine) -> None:
    with shells(story, SHELLS[:1], story.image.initramfs({}, (*NO_CAP, CAP_SCRIPT)), NO_LATE_CAP) as booted:
        unsealed_in_shells(booted)
        booted.kill()


@pytest.mark.long(minutes=7)
def test_every_shell_a_resumed_image_and_kexec_would_unseal_without_the_cap(emulated: Machine) -> None:
    initrd = emulated.image.initramfs({}, (*NO_CAP, CAP_SCRIPT))
    with shells(emulated, [FIRST_OF_ALL], initrd, NO_LATE_CAP) as booted:
        console = unsealed_in_shells(booted)
        assert console.sh("cat /sys/power/resume").out != "0:0"
        kexec(emulated, booted, initrd)
        console.ready(360)
        assert report(console)["verdict"] == "unsealed"
        booted.kill()


def unsealed_in_shells(booted: Running) -> Guest:
    booted.console.expect(r"\(initramfs\)", 300)
    assert in_shell(booted, TRY) == "UNSEALED"
    booted.console.send("exit\n")
    booted.guest.ready(360)
    assert unseal_as_root(booted.guest) == "UNSEALED"
    return booted.guest


def shells(story: Machine, names: Sequence[str], initrd: Path | None = None, also: str = "") -> Running:
    """Every place at which a command line can ask for a shell, and a disk to resume from."""
    story.disks = {"swap": Disk("swap.raw", "swap")}
    swap = bytearray(64 << 20)
    swap[4086:4096] = b"SWAPSPACE2"
    swap[1024:1036] = (1).to_bytes(4, "little") + ((64 << 20) // 4096 - 1).to_bytes(4, "little") + bytes(4)
    (story.home / "swap.raw").write_bytes(swap)
    resume = story.disks["swap"].device
    append = f"break={','.join(names)} rd.break systemd.unit=emergency.target resume={resume} {also}"
    return story.boot(initrd=initrd, cmdline=story.image.cmdline.replace("panic=-1", ""), append=append)


KEXEC = """
import ctypes, os
kernel, initrd = (os.open(f"/run/{name}", os.O_RDONLY) for name in ("kernel", "initrd"))
command = open("/run/cmdline", "rb").read() + bytes(1)
libc = ctypes.CDLL(None, use_errno=True)
if libc.syscall(320, kernel, initrd, ctypes.c_long(len(command)), command, 0):  # kexec_file_load
    raise SystemExit(os.strerror(ctypes.get_errno()))
"""


def kexec(story: Machine, booted: Running, initrd: Path | None = None) -> None:
    """Starts the same kernel again, without a reset of the TPM."""
    load_kexec(story, booted, initrd)
    booted.guest.sh("systemctl kexec --no-block")


def load_kexec(story: Machine, booted: Running, initrd: Path | None = None) -> None:
    for name, source in (("kernel", story.image.kernel), ("initrd", initrd or story.image.initrd)):
        booted.guest.write(f"/run/{name}", source.read_bytes())
    booted.guest.write("/run/cmdline", story.image.cmdline.encode())
    booted.guest.sh(f"python3 -I -c '{KEXEC}'", timeout=120)
