# SPDX-License-Identifier: Apache-2.0
"""The packages on a fresh Debian: installed, initialised, upgraded, removed, installed again, purged. Each is followed
by a boot of the initramfs that the guest has made then, and a look at a service that requires a mount point."""

import re
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import pytest

from tests.lab import image
from tests.lab.guest import Guest
from tests.lab.image import Builder
from tests.lab.machine import RECOVERY, Machine, report
from tests.lab.packages import Packages, packages
from tests.lab.running import Running
from tests.lab.stories import UNMEASURED, measured, status, take_in_root, up
from tests.test_boot_updates import taken_in, unsealed

pytestmark = pytest.mark.vm

APT = "DEBIAN_FRONTEND=noninteractive apt-get --quiet --yes --no-install-recommends"
SERVICE = """\
[Unit]
RequiresMountsFor=/srv/data
[Service]
ExecStart=/bin/sh -c 'touch /srv/data/ran; exec sleep infinity'
[Install]
WantedBy=multi-user.target
"""


class Made(NamedTuple):
    """How a builder's initramfs is made in the guest."""

    deb: str
    quick: str
    """The guest takes minutes for an initramfs."""
    says: str
    """When it begins with one."""
    asks: str
    """Without unlock, for the root's passphrase."""
    lists: str
    """What shows the files in one."""


MADE: dict[Builder, Made] = {
    "initramfs-tools": Made(
        "initramfs",
        "echo COMPRESS=zstd COMPRESSLEVEL=1 | tr ' ' '\\n' >/etc/initramfs-tools/conf.d/lab",
        "update-initramfs: Generating",
        "Please unlock disk root",
        "lsinitramfs",
    ),
    "dracut": Made(
        "dracut",
        "echo 'compress=\"zstd -1\"' >/etc/dracut.conf.d/quick.conf",
        "dracut: Generating",
        "passphrase for disk .*root",
        "lsinitrd",
    ),
}
BESIDE = " man-db bash-completion clevis-luks clevis-tpm2 clevis-systemd tpm2-tools"
"""Packages that a host may have beside unlock."""
ALL_OF_PACKAGES = "rm /etc/dpkg/dpkg.cfg.d/99mmdebstrap"
"""Their manual pages too."""
OTHERS = {
    "file": "",
    "chip": "PASSWORD=$key systemd-cryptenroll --tpm2-device=auto --tpm2-pcrs=7 $dev",
    "clevis": """printf %s "$key" | clevis luks bind -f -k - -d $dev tpm2 '{"pcr_ids":"7"}'""",
}
"""Disks that unlock does not know, and how each is enrolled: they open by a file, by systemd and the TPM, by clevis and
the TPM."""
CRYPTTAB = {"file": "/etc/extra.key luks", "chip": "none luks,tpm2-device=auto", "clevis": "none luks"}
TYPED = r"""
printf '%s\n' '. /usr/share/bash-completion/bash_completion' 'unlock() { echo "$*" >>/run/typed; }' >/run/bashrc
printf 'unlock gro\tdel\tda\t\nunlock rekey --de\tdat\t\nexit\n' |
    TERM=dumb script -qec 'bash --rcfile /run/bashrc -i' /dev/null >/dev/null
cat /run/typed
"""
"""What a person types in bash, each \\t a tab."""
TWO = "data root"
"""What is accepted by name."""


@pytest.fixture
def home(tmp_path: Path) -> Iterator[Path]:
    yield tmp_path / "machine"
    shutil.rmtree(tmp_path / "machine", ignore_errors=True)


class Story:
    """A machine whose initramfs is the one that its guest has made last."""

    def __init__(self, machine: Machine) -> None:
        self.machine, self.initrd = machine, machine.image.initrd

    def boot(self) -> Running:
        return self.machine.boot(initrd=self.initrd, limit=1100)

    def off(self, booted: Running) -> None:
        """Takes the initramfs along."""
        release = booted.guest.sh("uname -r").out
        content = booted.guest.read(f"/boot/initrd.img-{release}")
        self.initrd = self.machine.home / f"initrd-{booted.boot}"
        self.initrd.write_bytes(content)
        booted.poweroff()

    def stock(self, booted: Running, key: str) -> Guest:
        """A boot in which a person types a key at the stock prompt."""
        booted.console.expect(MADE[self.machine.image.builder].asks, 120)
        booted.console.send(f"{key}\n")
        return up(booted)


def install(console: Guest, debs: Packages, builder: Builder = "initramfs-tools") -> str:
    """By apt, offline; the initramfs is made once."""
    names = ("core", MADE[builder].deb)
    for name in names:
        deb: Path = getattr(debs, name)
        console.write(f"/root/{deb.name}", deb.read_bytes())
    files = " ".join(f"/root/{getattr(debs, name).name}" for name in names)
    return apt(console, f"install {files}", builder)


def apt(console: Guest, what: str, builder: Builder = "initramfs-tools") -> str:
    """What it says. The initramfs is made once; the trigger of dracut's package wants a kernel in /boot, which the lab
    has elsewhere."""
    if builder == "dracut":
        console.sh("touch /boot/vmlinuz-$(uname -r)")
    said = console.sh(f"{APT} {what} 2>&1", timeout=900).out
    assert said.count(MADE[builder].says) == 1, said
    return said


def units(console: Guest) -> dict[str, str]:
    """Unit -> its state, of those that are active or have failed and are not unlock's."""
    lines = console.sh("systemctl list-units --plain --no-legend --full").out.splitlines()
    found = {line.split()[0]: line.split()[2] for line in lines if line.strip()}
    return {name: state for name, state in found.items() if "unlock" not in name and not name.endswith(".device")}


def app(console: Guest) -> str:
    """State of the service that requires /srv/data."""
    return console.sh("systemctl is-active app-data", check=False).out


def lines(booted: Running) -> list[str]:
    """The console so far, without times; without e2fsck, which counts files, and what clevis answers."""
    text = re.sub(r"\[ *\d+\.\d+\] ", "", booted.console.text.replace("\r", ""))
    return [line for line in text.splitlines() if line.strip() and not re.search(": clean, |disk clevis", line)]


def opened(booted: Running) -> Guest:
    """A boot in which nobody typed anything."""
    console = up(booted)
    assert report(console)["verdict"] == "unsealed"
    asked = "|".join(("recovery key", *(each.asks for each in MADE.values())))
    assert not re.search(asked, booted.console.text)
    assert app(console) == "active"
    console.sh("sha256sum --quiet -c /root/sums")
    return console


def enroll_others(console: Guest, story: Story) -> None:
    """Disks that open without unlock at each boot."""
    console.write("/etc/extra.key", image.PASSPHRASE.encode(), 0o600)
    for name, enroll in OTHERS.items():
        device = story.machine.disks[name].device
        console.sh(f"cryptsetup luksFormat -q --pbkdf pbkdf2 --pbkdf-force-iterations 1000 {device} /etc/extra.key")
        console.sh(f"key=$(cat /etc/extra.key) dev={device}; export key dev\n{enroll}", timeout=240)
        how, _, options = CRYPTTAB[name].partition(" ")
        console.sh(f"echo {name} {device} {how} {options},nofail >>/etc/crypttab")


def others_are_open(console: Guest) -> None:
    for name in OTHERS:
        console.sh(f"systemctl --no-ask-password start systemd-cryptsetup@{name}", timeout=240)  # waits for its job


def journal_of_early_boot(console: Guest) -> str:
    """As `journalctl -x` explains what early boot did."""
    return console.sh("journalctl -b -x --no-pager MESSAGE_ID=7bc9be723c834694b00f16372297cc8e").out


@pytest.mark.long(minutes=16)
@pytest.mark.parametrize("builder", MADE)
def test_a_fresh_host_and_an_upgrade(home: Path, builder: Builder) -> None:
    """Installed by apt: before `init` a boot is as it was; after it, nothing is typed, nor after an upgrade. Disks of
    clevis, systemd-cryptenroll and a key file open in each. Pages, completion and catalog are there."""
    commands = [MADE[builder].quick, ALL_OF_PACKAGES]
    built = image.build("luks", product=False, builder=builder, programs=BESIDE, commands=commands)
    story = Story(Machine(home, built))
    for name in OTHERS:
        story.machine.disk(name, 40)
    disk = story.machine.disk("d1", 60)
    with story.boot() as booted:
        enroll_others(story.stock(booted, image.PASSPHRASE), story)
        booted.poweroff()

    with story.boot() as booted:
        console = story.stock(booted, image.PASSPHRASE)
        others_are_open(console)
        before, shown = units(console), lines(booted)
        install(console, packages(), builder)
        assert console.sh("systemctl is-system-running", check=False).out == "running"
        story.off(booted)

    with story.boot() as booted:
        console = story.stock(booted, image.PASSPHRASE)
        others_are_open(console)
        assert units(console) == before
        assert lines(booted) == shown
        booted.poweroff()

    with story.boot() as booted:
        console = take_in_root(booted, story.machine, UNMEASURED)
        console.sh(
            f"unlock group create data --disk {disk} --mount /srv/data --recovery-key-file {RECOVERY}", timeout=240
        )
        console.write("/etc/systemd/system/app-data.service", SERVICE.encode())
        console.sh("systemctl --quiet enable app-data; head -c 100000 /dev/urandom >/srv/data/blob")
        console.sh("sha256sum /srv/data/blob >/root/sums; sync")
        booted.poweroff()

    with story.boot() as booted:
        console = opened(booted)
        others_are_open(console)
        for page in ("unlock", "unlock-disk"):
            assert re.search(r"^NAME\n +" + page + " - ", console.sh(f"man {page} | cat", timeout=60).out, re.MULTILINE)
        assert console.sh(TYPED, timeout=60).out.splitlines() == ["group delete data", "rekey --deep data"]
        explained = journal_of_early_boot(console)
        assert "The TPM's answer in early boot: unsealed" in explained
        assert "If it is another: unlock explain" in explained
        said = install(console, packages("0.1.1"), builder)
        assert "Setting up unlock (0.1.1)" in said
        assert app(booted.guest) == "active"
        story.off(booted)

    with story.boot() as booted:
        console = opened(booted)
        others_are_open(console)
        assert console.sh("dpkg-query -W -f '${Version}' unlock").out == "0.1.1"
        booted.poweroff()


@pytest.mark.long(minutes=11)
@pytest.mark.parametrize("builder", MADE)
def test_removal_another_installation_and_a_purge(home: Path, builder: Builder) -> None:
    """test_package_container.py has it without an initramfs."""
    made = MADE[builder]
    package = f"unlock-{made.deb}"
    story = Story(measured(builder=builder).clone(home))
    recovery = story.machine.recovery_key
    with story.boot() as booted:
        console = opened(booted)
        console.sh(made.quick)
        refused = console.sh(f"{APT} remove unlock 2>&1", check=False, timeout=240)
        assert refused.code == 100
        for words in ("group data (data-", "without unlock, no boot opens it; nothing is mounted at /srv/data", TWO):
            assert words in refused.out
        assert console.sh(f"dpkg-query -W -f '${{Status}} ' unlock {package}").out == "install ok installed " * 2
        assert status(console) == {"root": "open", "data": "open"}
        # A host whose root opened without its line in crypttab.
        console.sh("sed -i /^root/d /etc/crypttab")
        console.sh(f"echo 'unlock unlock/remove string {TWO}' | debconf-set-selections")
        apt(console, "remove unlock", builder)
        assert f"root UUID={image.LUKS_UUID} none luks,initramfs" in console.read("/etc/crypttab").decode()
        assert app(console) == "active"
        story.off(booted)

    # Removed: the stock prompt takes the recovery key, and the service did not start on the bare directory.
    with story.boot() as booted:
        console = story.stock(booted, recovery)
        assert app(console) == "inactive"
        assert console.sh("systemctl is-failed srv-data.mount", check=False).out == "failed"
        assert console.sh("ls -A /srv/data").out == ""
        assert console.sh("systemctl is-active multi-user.target").out == "active"
        install(console, packages(), builder)
        story.off(booted)

    # Installed again: this boot is none that the TPM allows, and unlock asks.
    with story.boot() as booted:
        booted.console.expect("unlock: recovery key: ", 120)
        booted.console.send(f"{recovery}\n")
        console = up(booted)
        assert app(console) == "active"
        console.sh("sha256sum --quiet -c /root/sums")
        refused = console.sh(f"{APT} purge unlock {package} 2>&1", check=False, timeout=240)
        assert refused.code == 100, "the names of the first removal are for that alone"
        console.sh("echo 'unlock unlock/remove string root,data' | debconf-set-selections")
        said = apt(console, f"purge unlock {package}", builder)
        for words in ("tpm2_evictcontrol -C o -c 0x81104c4", "tpm2_nvundefine", "on disk root", "/srv/data is a bare"):
            assert words in said, said
        left = console.sh("find / -xdev -path '*unlock*' -not -path '/run/*' -not -path '/root/*'").out.splitlines()
        assert not [each for each in left if "cryptroot-unlock" not in each], left
        story.off(booted)

    # Purged: no key material, no guard; the disks open by the recovery key.
    with story.boot() as booted:
        console = story.stock(booted, recovery)
        assert app(console) == "active"
        assert console.sh("ls -A /srv/data").out == "ran"
        assert "unlock" not in console.sh(f"{made.lists} /boot/initrd.img-*", timeout=240).out.replace(
            "cryptroot-unlock", ""
        )
        for disk in ("d1", "d2", "d3"):
            device = story.machine.disks[disk].device
            console.sh(f"cryptsetup open --test-passphrase {device}", stdin=recovery.encode())
        booted.poweroff()


@pytest.mark.long(minutes=16)
def test_a_host_that_boots_by_grub_is_upgraded(home: Path) -> None:
    """The initramfs is made once, when dpkg ends; then the TPM is told what it will measure, and the next boot
    asks nobody."""
    story = Machine(home, image.build("luks", boots="grub"))
    with story.boot(limit=1800) as booted:
        console = taken_in(booted, story)
        said = install(console, packages("0.1.1"))
        _, _, after = said.partition("update-initramfs: Generating")
        assert re.search("unlock: next boot: .* is predicted: initramfs of ", after), said
        booted.poweroff(300)
    with story.boot(limit=900) as booted:
        assert unsealed(booted).sh("dpkg-query -W -f '${Version}' unlock").out == "0.1.1"
