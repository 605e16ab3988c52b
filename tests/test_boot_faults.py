# SPDX-License-Identifier: Apache-2.0
"""Boots with something wrong: disks, the TPM, the agent. The firmware measures nothing, so the PCRs stay the same."""

import os
import re
import shutil
import uuid
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.lab import guest, leaks, luks
from tests.lab.machine import REACHED, Machine, agent_commands, report
from tests.lab.running import Disk
from tests.lab.stories import (
    CAPPED,
    STOCK_PROMPT,
    begun,
    checked,
    outcomes,
    pcr,
    status,
    unmeasured,
    unseal_as_root,
    up,
)
from tests.lab.uml.files import FIRST, START_TPM
from tests.lab.uml.machine import Uml

pytestmark = pytest.mark.vm


@pytest.fixture
def story(tmp_path: Path) -> Iterator[Machine]:
    """A clone of the enrolled machine."""
    yield unmeasured().clone(tmp_path / "machine")
    shutil.rmtree(tmp_path / "machine", ignore_errors=True)


def test_one_boot_with_many_faults(story: Machine, tmp_path: Path) -> None:
    """Every group has a fault of its own, and no fault reaches another group."""
    home = story.home
    luks.ruin(home / "copy-1.raw", copy=0)
    with (home / "ruined-1.raw").open("r+b") as ruined:  # udev still sees LUKS2
        for copy in (0, 1):
            ruined.seek(copy * luks.COPY_SIZE + 4096)
            ruined.write(b"\xa5" * 4096)
    shutil.copyfile(home / "twin-1.raw", home / "twin-2.raw")
    story.disks["twin-2"] = Disk("twin-2.raw", "twin-2")
    shutil.copyfile(home / "far-1.raw", home / "far-a.raw")  # both copies have serials that the token does not name
    shutil.copyfile(home / "far-1.raw", home / "far-b.raw")
    del story.disks["far-1"]
    story.disks |= {each: Disk(f"{each}.raw", each) for each in ("far-a", "far-b")}
    luks.format_disk(home / "foreign.raw", "of somebody else")
    story.disks["foreign"] = Disk("foreign.raw", "foreign")
    other_host(home / "twin-1.raw", home / "other.raw")
    story.disks = {"other": Disk("other.raw", "other")} | story.disks
    before = {each: (home / f"{each}.raw").read_bytes() for each in ("foreign", "other", "twin-2", "far-a", "far-b")}

    with story.boot(without=("late-1", "pair-2")) as booted:
        console = begun(booted)
        found = outcomes(console)
        assert found == {
            "root": "opened",
            "copy-1": "opened",
            "twin-1": "opened",
            "twin-2": "duplicate",
            "far-a": "duplicate",
            "far-b": "duplicate",
            "pair-1": "waiting",
            "foreign": "foreign",
            "other": "other-host",
            "ruined-1": "damaged",
        }
        # a disk that comes late: until then its service has not written into the bare directory
        assert console.sh("systemctl is-active app-late.service", check=False).out in ("inactive", "activating")
        assert console.sh("ls -A /srv/late").out == ""
        booted.plug(story.disks["late-1"])
        console.sh("until systemctl is-active --quiet app-late.service; do sleep 1; done", timeout=240)
        console.sh("mountpoint -q /srv/late && until [ -e /srv/late/ran ]; do sleep 0.1; done")

        # members that never come: the service fails by dependency, within the deadline, and the host is up
        console.sh("systemctl is-system-running --wait", check=False, timeout=300)
        assert console.sh("systemctl list-jobs --no-legend").out == ""
        assert console.sh("systemctl is-active multi-user.target").out == "active"
        for group in ("pair", "ruined", "far"):
            assert console.sh(f"systemctl is-active unlock-group@{group}", check=False).out == "failed"
            assert console.sh(f"systemctl is-active app-{group}.service", check=False).out == "inactive"
            assert console.sh(f"ls -A /srv/{group}").out == ""
        assert "pair-b (serial pair-2) is missing" in console.sh("journalctl -b -u unlock-group@pair --no-pager").out
        assert console.sh("ls /dev/mapper").out.split() == ["control", "copy-a", "late-a", "root", "twin-a"]
        states = status(console)
        assert (states["pair"], states["ruined"], states["late"]) == ("missing", "missing", "open")
        # with these disks the next boot is as this one was: what check says of a group is what became of it
        opened = {each: "safe" if state == "open" else "unsafe" for each, state in states.items()}
        assert checked(console) == opened | {"": "unsafe"}

        # it heals, service included, when the disk is plugged in
        booted.plug(story.disks["pair-2"])
        console.sh("until systemctl is-active --quiet app-pair.service; do sleep 1; done", timeout=240)
        console.sh("mountpoint -q /srv/pair && until [ -e /srv/pair/ran ]; do sleep 0.1; done")
        console.sh("grep pair /root/sums | sha256sum --quiet -c")
        assert status(console)["pair"] == "open"
        assert checked(console)["pair"] == "safe"
        assert console.sh("systemctl is-active app-ruined.service", check=False).out == "inactive"
        booted.poweroff()
    for each, content in before.items():
        assert (home / f"{each}.raw").read_bytes() == content, f"{each} was written to"


def other_host(source: Path, target: Path) -> None:
    """A disk like `source`, in a group of the same name, of another unlock host."""
    from tests.test_disk import edit

    shutil.copyfile(source, target)
    with target.open("r+b") as file:  # another UUID, as another host would have made it
        area = file.read(32768)
        old = re.search(rb"[0-9a-f]{8}-[0-9a-f-]{27}", area[:4096])
        assert old
        file.seek(0)
        file.write(area.replace(old[0], str(uuid.uuid4()).encode()))
    edit(str(target), lambda fields: [each.update(host="0" * 32) for each in fields["tokens"].values()])


def test_without_its_tpm_the_host_asks_for_the_recovery_key(story: Machine) -> None:
    with story.boot(tpm=None) as booted:
        booted.console.expect("no TPM", 300)
        booted.console.expect("recovery key: ", 60)
        booted.console.send("\n")  # skip ours: the stock prompt takes it too
        booted.console.expect(STOCK_PROMPT, 60)
        booted.console.send(story.recovery_key + "\n")
        console = begun(booted)
        assert report(console)["verdict"] == "no-tpm"
        assert outcomes(console)["root"] == "no-key"
        console.sh("until systemctl is-failed --quiet unlock-group@copy; do sleep 1; done")
        assert console.sh("systemctl is-active app-copy.service", check=False).out == "inactive"
        assert "there is no TPM" in console.sh("journalctl -b -u unlock-group@copy --no-pager").out
        booted.kill()


def test_on_another_board_nothing_opens_by_itself(story: Machine) -> None:
    with story.boot(tpm="another") as booted:
        booted.console.expect("recovery key: ", 300)
        assert "first     the TPM was cleared, or is another one" in booted.console.text
        booted.console.send(story.recovery_key.replace("-", "") + "\n")  # without the dashes
        console = up(booted)
        assert report(console)["verdict"] == "no-slot"
        assert set(status(console).values()) == {"open"}
        assert checked(console)[""] == "unsafe"
        console.sh("sha256sum --quiet -c /root/sums")
        assert pcr(console, 15) == CAPPED
        assert unseal_as_root(console) == "no-slot"
        booted.kill()


LATE = """
(
    until [ -e /run/unlock/agent.pid ]; do sleep 0.1; done
    sleep 2 # it has looked, and waits: ACPI says that there is a TPM
    : >/run/lab.waited
    /usr/lib/lab/vtpm /dev/ttyS3 </dev/null
) >/dev/null 2>&1 &
"""
TPM_LATE = """#!/bin/sh
[ "$1" != prereqs ] || exit 0
cd /sys/bus/acpi/drivers/tpm_crb
device=$(echo MSFT*)
echo "$device" > unbind
(
    until agent=$(cat /run/unlock/agent.pid) && grep -q "^230 " "/proc/$agent/syscall"; do sleep 0.1; done  # it sleeps
    echo "$device" > bind
    : >/run/lab.waited
) >/dev/null 2>&1 &
"""


def test_of_two_tpms_the_second_has_the_key_and_both_are_locked(story: Machine) -> None:
    with story.boot(tpm_before="other") as booted:
        console = up(booted)
        assert report(console)["verdict"] == "unsealed"
        assert set(status(console).values()) == {"open"}
        assert [console.sh(f"cat /sys/class/tpm/tpm{each}/pcr-sha256/15").out for each in (0, 1)] == [CAPPED, CAPPED]
        assert console.sh("cat /run/unlock/capped").out.split() == ["tpmrm0", "tpmrm1"]
        assert checked(console)[""] == "safe"
        console.sh("unlock policy show && unlock policy predict --dry-run && unlock explain")
        booted.kill()


def test_a_tpm_that_comes_after_early_boot_is_locked(story: Machine) -> None:
    promised = ": >/sys/firmware/acpi/tables/TPM2\n"
    assert promised in FIRST and START_TPM in FIRST
    never = story.image.initramfs({"scripts/init-top/lab-first": FIRST.replace(promised, "").replace(START_TPM, ":")})
    with story.boot(initrd=never) as booted:
        booted.console.expect("recovery key: ", 120)
        booted.console.send(story.recovery_key + "\n")
        console = begun(booted)
        assert report(console)["verdict"] == "no-tpm"
        console.sh(START_TPM)
        console.sh("until [ -s /run/unlock/capped ]; do sleep 0.1; done")
        assert pcr(console, 15) == CAPPED
        assert unseal_as_root(console) != "UNSEALED"
        console.sh("systemctl start unlock-cap.service")  # again is once
        assert pcr(console, 15) == CAPPED
        booted.kill()


def test_a_tpm_that_comes_late_is_waited_for_and_nothing_leaks(story: Machine) -> None:
    """All of this with `debug`: every key of this boot is searched for in whatever it shows and writes."""
    late = story.image.initramfs({"scripts/init-top/lab-first": FIRST.replace(START_TPM, LATE)})
    secrets = leaks.secrets(story)
    story.disks = {"copy-1": story.disks["copy-1"]}
    luks.format_disk(story.home / "foreign.raw", "of somebody else")
    story.disks["foreign"] = Disk("foreign.raw", "foreign")
    story.disk("swap", 512)
    with story.boot(initrd=late, append="debug initramfs.debug systemd.log_level=info") as booted:
        console = begun(booted)
        found = report(console)
        console.sh("test -e /run/lab.waited")  # it came when the agent had looked for it in vain
        assert found["verdict"] == "unsealed"
        assert outcomes(console) == {"root": "opened", "copy-1": "opened", "foreign": "foreign"}
        assert agent_commands(booted) == list(REACHED)
        planted = {"planted": secrets_of_its_own(console, story)}
        for command, output in leaks.shown(console):
            assert not leaks.search(output, secrets), command
            assert leaks.search(output, planted), f"{command}: the search finds nothing"
        console.sh("sync")
        booted.kill()
    with_plant = set()
    for name, content in leaks.stored(story, secrets):
        assert not leaks.search(content, secrets), name
        with_plant |= {name} if leaks.search(content, planted) else set()
    assert {"root, decrypted", "swap.raw"} < with_plant
    assert any(name.startswith("console-") for name in with_plant)


@pytest.mark.long(minutes=5)
def test_a_tpm_driver_that_comes_late_is_waited_for(tmp_path: Path) -> None:
    story = unmeasured("qemu").clone(tmp_path / "machine")
    with story.boot(initrd=story.image.initramfs({"scripts/init-top/late": TPM_LATE})) as booted:
        console = begun(booted)
        console.sh("test -e /run/lab.waited")
        assert report(console)["verdict"] == "unsealed"
        assert agent_commands(booted) == list(REACHED)
        booted.kill()
    shutil.rmtree(story.home)


def secrets_of_its_own(console: guest.Guest, story: Machine) -> bytes:
    """Puts a secret wherever the search looks; it swaps, too."""
    secret = os.urandom(64)
    console.write("/root/planted", secret)
    swap, foreign = story.devices("swap"), story.devices("foreign")
    console.sh(f"mkswap -q {swap} && swapon {swap}")
    hold = "import sys, time; x = sys.stdin.buffer.read() * 500000; open('/run/held', 'w'); time.sleep(900)"
    console.sh(f'python3 -c "{hold}" </root/planted >/dev/null 2>&1 & until [ -e /run/held ]; do sleep 0.5; done')
    console.sh("""python3 -c 'x = bytearray(500 << 20)'""", timeout=240)  # more than there is memory left
    console.sh(
        f"""key=$(od -An -v -tx1 /root/planted | tr -d ' \\n')
        logger "$key"; echo "$key" | tee /run/planted /dev/kmsg >/dev/console
        PLANTED=$key sleep 900 >/dev/null 2>&1 &
        dmsetup create planted --readonly --table "0 8 crypt aes-xts-plain64 $key 0 {foreign} 0"
        """
    )
    return secret


DUMP = """
import os, resource, signal, sys, time
while not os.path.exists(sys.argv[2]):
    time.sleep(0.002)
process = int(open(sys.argv[1]).read())
resource.prlimit(process, resource.RLIMIT_CORE, (-1, -1))
os.kill(process, signal.SIGABRT)
"""
"""The process of a file with its number may write a core of any size, and aborts when another file is there."""
ABORT_AGENT = f"""#!/bin/sh
[ "$1" != prereqs ] || exit 0
echo /run/core.%p >/proc/sys/kernel/core_pattern
python3 -I -c '{DUMP}' /run/unlock/agent.pid /run/unlock/verdict >/dev/null 2>&1 &  # it holds the persistence key
"""


def test_a_tpm_in_failure_mode_and_the_recovery_key(story: Machine) -> None:
    """It fails when the agent asks, and at each command after that: it is never locked."""
    with story.boot(tpm_fails_from="NV_Read") as booted:
        booted.console.expect("did not confirm that it is locked", 300)
        booted.console.expect("Enter alone to power off", 60)
        booted.console.expect("recovery key: ", 60)
        booted.console.send(story.recovery_key + "\n")
        console = up(booted)
        assert report(console)["verdict"] == "tpm-failed"
        assert set(status(console).values()) == {"open"}
        console.sh("sha256sum --quiet -c /root/sums && test -e /run/unlock/uncapped")
        assert console.sh("systemctl is-failed unlock-cap.service").out == "failed"
        assert checked(console)[""] == "unsafe"
        assert "TPM does not work" in console.sh("unlock explain").out
        assert isinstance(booted, Uml)
        booted.tpm_line.fails_from = ""  # as after a reset
        console.sh("systemctl restart unlock-cap.service && test ! -e /run/unlock/uncapped")
        assert pcr(console, 15) == CAPPED
        assert unseal_as_root(console) == "pcr-mismatch"
        booted.kill()


def test_a_tpm_in_failure_mode_and_nobody_who_knows_the_key(story: Machine) -> None:
    with story.boot(tpm_fails_from="NV_Read") as booted:
        booted.console.expect("recovery key: ", 300)
        booted.console.send("\n")
        booted.console.expect("powering off", 60)
        booted.wait()
        assert "unlock disk root" not in booted.console.text and "(initramfs)" not in booted.console.text


def test_a_tpm_that_fails_when_it_has_released_the_key(story: Machine) -> None:
    with story.boot(tpm_fails_from="PCR_Extend") as booted:
        console = up(booted)
        assert report(console)["verdict"] == "unsealed"
        assert set(status(console).values()) == {"open"}
        assert checked(console)[""] == "unsafe"
        assert "recovery key: " not in booted.console.text
        booted.kill()


def test_the_agent_aborts_and_the_stock_prompt_takes_the_recovery_key(story: Machine) -> None:
    """It leaves no core, though it may write one of any size. A process that is not protected does."""
    initrd = story.image.initramfs({"scripts/init-top/abort": ABORT_AGENT})
    with story.boot(initrd=initrd, without=("late-1",)) as booted:
        booted.console.expect("recovery key: ", 300)
        booted.console.send("\n")
        booted.console.expect(STOCK_PROMPT, 60)
        booted.console.send(story.recovery_key + "\n")
        console = begun(booted)
        assert "core." not in console.sh("ls /run").out
        console.sh("echo /run/core.%p >/proc/sys/kernel/core_pattern")  # systemd has turned it off
        console.sh(f"sleep 100 & echo $! >/run/pid; python3 -I -c '{DUMP}' /run/pid /run; wait $! || ls /run/core.$!")
        assert pcr(console, 15) == CAPPED
        assert unseal_as_root(console) == "pcr-mismatch"
        assert console.sh("keyctl list @u; true").out.count("unlock:") == 0
        booted.kill()


def test_the_panic_shell_finds_a_capped_tpm_and_closed_disks(story: Machine) -> None:
    early = story.image.initramfs(guest.EARLY)
    cmdline = story.image.cmdline.replace("panic=-1", "")
    with story.boot(initrd=early, cmdline=cmdline, append="break=bottom", without=("late-1",)) as booted:
        booted.console.expect(r"\(initramfs\)", 300)
        shell = booted.early
        shell.ready()
        assert shell.sh("cat /sys/class/tpm/tpm0/pcr-sha256/15").out == CAPPED
        assert unseal_as_root(shell) == "pcr-mismatch"
        mapped = set(shell.sh("ls /dev/mapper").out.split())
        assert mapped == {"control"}, "what the TPM opened is closed, the root file system too"
        assert "/root " not in shell.sh("cat /proc/mounts").out
        assert "unlock:" not in shell.sh("cat /proc/keys").out
        booted.kill()
