# SPDX-License-Identifier: Apache-2.0
"""The files outside the package: boot scripts, the cap, udev rules, units and their generator, make install."""

import hashlib
import os
import re
import shutil
import socket
import subprocess
import sys
import threading
import time
import tomllib
import tty
from collections.abc import Iterator
from importlib.machinery import SourceFileLoader
from importlib.util import module_from_spec, spec_from_loader
from pathlib import Path

import pytest

from unlock.boot.mount import find_group
from unlock.errors import Usage
from unlock.host import config, units
from unlock.paths import Paths

TOP = Path(__file__).resolve().parent.parent
GENERATOR = TOP / "system/unlock-generator"
STAGES = ["init-premount", "local-top", "local-block", "local-bottom", "panic"]
TOOLS = TOP / "initramfs/initramfs-tools"
SCRIPTS = [*(TOOLS / name for name in ("hook", *STAGES, "local-premount")), TOP / "initramfs/cap"]
DRACUT = [TOP / "initramfs/dracut" / name for name in ("init", "early", "settled.sh", "module-setup.sh")]
HOOKS = [TOP / "system" / name for name in ("predict", "after-update", "dump")]
SHELLS = [["dash"], ["busybox", "sh"], ["/usr/lib/klibc/bin/sh"], ["bash"]]


def needs(*programs: str) -> pytest.MarkDecorator:
    absent = [program for program in programs if not shutil.which(program)]
    return pytest.mark.skipif(bool(absent) and "CI" not in os.environ, reason=f"not installed: {', '.join(absent)}")


# scripts


@needs("shellcheck")
def test_scripts_are_clean() -> None:
    scripts = [*SCRIPTS, *DRACUT, TOOLS / "functions", TOP / "initramfs/functions", *HOOKS]
    subprocess.run(["shellcheck", "-x", *scripts], check=True, cwd=TOP)


@pytest.mark.parametrize("script", SCRIPTS[:-1], ids=lambda path: path.name)
def test_scripts_name_their_prerequisites_and_do_nothing_else(script: Path) -> None:
    done = subprocess.run([script, "prereqs"], capture_output=True, text=True, check=True)
    assert done.stdout.count("\n") == 1 and not done.stderr
    assert script.name == "hook" or "cryptroot" not in done.stdout  # it would have to wait for itself in local-top


def test_hooks_of_dracut_have_names_that_it_runs() -> None:
    """Its loops run what ends in .sh, and copy whatever they are given."""
    hooks = re.findall(r'inst_hook \S+ \d+ "\$moddir/(.+)"', (TOP / "initramfs/dracut/module-setup.sh").read_text())
    assert hooks and [name for name in hooks if not name.endswith(".sh")] == []


def test_nothing_runs_in_init_bottom() -> None:
    assert "init-bottom" not in (TOP / "Makefile").read_text()


# the cap

EXTEND = (
    bytes.fromhex(  # TCG TPM 2.0 Library, Part 3, TPM2_PCR_Extend
        "8002 00000041 00000182"  # TPM_ST_SESSIONS, size, TPM_CC_PCR_Extend
        "0000000f"  # PCR 15
        "00000009 40000009 0000 01 0000"  # authorisation: TPM_RS_PW, no nonce, continueSession, no password
        "00000001 000b"  # one digest, TPM_ALG_SHA256
    )
    + hashlib.sha256(b"unlock cap").digest()
)
EXTENDED = bytes.fromhex("8002 00000013 00000000 00000000 0000 01 0000")
RETRY = bytes.fromhex("8001 0000000a 00000922")
FAILED = bytes.fromhex("8001 0000000a 00000101")


class FakeTpm:
    """A character device that answers each command in turn with the next of `answers`, then with the last."""

    def __init__(self, *answers: bytes, to: socket.socket | None = None) -> None:
        self.commands: list[bytes] = []
        self._answers = list(answers)
        self._to = to
        self._master, self._slave = os.openpty()
        tty.setraw(self._slave)
        self.path = os.ttyname(self._slave)
        threading.Thread(target=self._serve, daemon=True).start()

    def _serve(self) -> None:
        while True:
            command = os.read(self._master, 4096)
            while len(command) < int.from_bytes(command[2:6], "big"):
                command += os.read(self._master, 4096)
            self.commands.append(command)
            os.write(self._master, ask(self._to, command) if self._to else self._answers[0])
            del self._answers[: len(self._answers) > 1]


def ask(tpm: socket.socket, command: bytes) -> bytes:
    tpm.sendall(command)
    return tpm.recv(4096)


class Cap:
    """initramfs/cap with its paths in a directory, and no power to switch off."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self.device = directory / "tpmrm0"
        self.run_directory = directory / "run"
        self.console = directory / "console"
        (directory / "bin").mkdir()
        for name in ("poweroff", "modprobe"):
            self.program(name, f"echo {name} >>{directory}/called; kill $PPID" if name == "poweroff" else "exit 1")
        self.console.touch()
        text = (TOP / "initramfs/cap").read_text()
        for path, to in {
            "/run/unlock": self.run_directory,
            "/sys/firmware/acpi/tables/TPM2": directory / "acpi",
            "/dev/tpm": directory / "tpm",
            "/sys/class/tpm/tpm${device##*[!0-9]}/tpm_version_major": f"{directory}/version${{device##*[!0-9]}}",
            "/dev/console": self.console,
            "/proc/sysrq-trigger": directory / "sysrq",
            "tenths=100": "tenths=20",
            "sleep 0.25": "sleep 0.01",
            "sleep 3": "sleep 0",
        }.items():
            assert path in text
            text = text.replace(path, str(to))
        self.script = directory / "cap"
        self.script.write_text(text)

    def program(self, name: str, body: str) -> None:
        file = self.directory / "bin" / name
        file.write_text(f"#!/bin/sh\n{body}\n")
        file.chmod(0o755)

    def run(self, shell: list[str], *mode: str) -> int:
        path = f"{self.directory}/bin:/usr/sbin:/usr/bin:/sbin:/bin"
        done = subprocess.run([*shell, self.script, *mode], env={"PATH": path}, capture_output=True, timeout=60)
        assert (done.stderr == b"") == (mode != ("late",) or done.returncode == 0)
        return done.returncode

    @property
    def capped(self) -> bool:
        return (self.run_directory / "capped").exists()


@pytest.fixture
def cap(tmp_path: Path) -> Cap:
    return Cap(tmp_path)


@pytest.fixture(params=[shell for shell in SHELLS if shutil.which(shell[0])], ids=" ".join)
def shell(request: pytest.FixtureRequest) -> list[str]:
    assert isinstance(request.param, list)
    return request.param


def test_cap_sends_one_extend(cap: Cap, shell: list[str]) -> None:
    tpm = FakeTpm(EXTENDED)
    cap.device.symlink_to(tpm.path)
    assert cap.run(shell) == 0
    assert cap.capped
    assert tpm.commands == [EXTEND]


def test_cap_is_sent_once_a_boot(cap: Cap, shell: list[str]) -> None:
    tpm = FakeTpm(EXTENDED)
    cap.device.symlink_to(tpm.path)
    assert cap.run(shell) == cap.run(shell) == 0
    assert len(tpm.commands) == 1


def test_cap_locks_every_tpm(cap: Cap, shell: list[str]) -> None:
    """A second one, one without a resource manager, and one that comes later: each once."""
    tpms = [FakeTpm(EXTENDED) for _ in range(4)]
    for name, tpm in zip(("tpmrm0", "tpmrm1", "tpm1", "tpm2"), (tpms[0], tpms[1], tpms[1], tpms[2]), strict=True):
        (cap.directory / name).symlink_to(tpm.path)
    assert cap.run(shell) == 0
    (cap.directory / "tpmrm3").symlink_to(tpms[3].path)
    assert cap.run(shell, "late") == 0
    assert [tpm.commands for tpm in tpms] == [[EXTEND]] * 4
    assert (cap.run_directory / "capped").read_text().split() == ["tpmrm0", "tpmrm1", "tpm2", "tpmrm3"]


def test_cap_of_a_late_tpm_that_does_not_confirm_fails_its_unit(cap: Cap, shell: list[str]) -> None:
    cap.device.symlink_to(FakeTpm(FAILED).path)
    assert cap.run(shell, "late") == 1
    assert not cap.capped and not (cap.directory / "called").exists()


def test_cap_repeats_until_the_tpm_is_ready(cap: Cap, shell: list[str]) -> None:
    tpm = FakeTpm(RETRY, RETRY, EXTENDED)
    cap.device.symlink_to(tpm.path)
    assert cap.run(shell) == 0
    assert cap.capped
    assert tpm.commands == [EXTEND] * 3


def test_cap_without_confirmation_powers_off(cap: Cap, shell: list[str]) -> None:
    tpm = FakeTpm(FAILED)
    cap.device.symlink_to(tpm.path)
    assert cap.run(shell) != 0  # ended by our poweroff; it never returns by itself
    assert not cap.capped
    assert (cap.directory / "called").read_text() == "poweroff\n"
    assert "powering off" in cap.console.read_text()
    assert len(tpm.commands) == 41


def test_cap_before_our_prompt_does_not_power_off_and_locks_the_others(cap: Cap, shell: list[str]) -> None:
    """What comes next may authenticate what it opens. What does not, asks for the cap again."""
    failing, sound = FakeTpm(FAILED), FakeTpm(EXTENDED)
    cap.device.symlink_to(failing.path)
    (cap.directory / "tpmrm1").symlink_to(sound.path)
    for _ in range(2):
        assert cap.run(shell, "try") == 1
        assert (cap.run_directory / "capped").read_text() == "tpmrm1\n"
        assert (cap.run_directory / "uncapped").exists() and not (cap.directory / "called").exists()
    assert sound.commands == [EXTEND] and len(failing.commands) == 82
    assert "the TPM tpmrm0 did not confirm" in cap.console.read_text()
    assert cap.run(shell) != 0
    assert (cap.directory / "called").read_text() == "poweroff\n"
    assert "turn the TPM off in the firmware's setup" in cap.console.read_text()


def test_cap_of_a_tpm_that_works_again(cap: Cap, shell: list[str]) -> None:
    cap.device.symlink_to(FakeTpm(*[FAILED] * 41, EXTENDED).path)
    assert cap.run(shell, "try") == 1
    assert cap.run(shell, "try") == cap.run(shell) == 0
    assert cap.capped and not (cap.run_directory / "uncapped").exists()


@pytest.mark.parametrize("other", [True, False])
@pytest.mark.parametrize("mode", ["", "shell", "try", "late"])
def test_a_tpm_that_did_not_confirm_and_is_gone_is_not_locked(cap: Cap, mode: str, other: bool) -> None:
    cap.device.symlink_to(FakeTpm(FAILED).path)
    if other:
        (cap.directory / "tpmrm1").symlink_to(FakeTpm(EXTENDED).path)
    assert cap.run(["dash"], "try") == 1
    cap.device.unlink()
    assert cap.run(["dash"], *filter(None, [mode])) != 0
    assert (cap.directory / "called").exists() == (mode in ("", "shell"))


def test_cap_without_a_tpm_does_nothing(cap: Cap, shell: list[str]) -> None:
    assert cap.run(shell) == 0
    assert not cap.capped


def test_cap_waits_once_for_the_driver_of_a_promised_tpm(cap: Cap) -> None:
    (cap.directory / "acpi").touch()
    tpm = FakeTpm(EXTENDED)
    late = f"(sleep 0.5; ln -s {tpm.path} {cap.device}) >/dev/null 2>&1 &"
    cap.program("modprobe", f'{late}\n[ "$*" = "-a -q tpm_crb tpm_tis" ]')
    assert cap.run(["dash"]) == 0
    assert cap.capped


def test_cap_gives_up_on_a_promised_tpm_once(cap: Cap) -> None:
    (cap.directory / "acpi").touch()
    assert cap.run(["dash"]) == 0
    start = time.monotonic()
    assert cap.run(["dash"]) == 0
    assert time.monotonic() - start < 1.5
    assert not cap.capped


def test_cap_leaves_a_tpm_12_alone(cap: Cap, shell: list[str]) -> None:
    tpm = FakeTpm(FAILED)
    (cap.directory / "tpm0").symlink_to(tpm.path)
    (cap.directory / "version0").write_text("1\n")
    assert cap.run(shell) == 0
    assert not tpm.commands


@pytest.fixture
def swtpm(tmp_path: Path) -> Iterator[socket.socket]:
    path = tmp_path / "sock"
    state = tmp_path / "state"
    state.mkdir()
    command = ["swtpm", "socket", "--tpm2", "--tpmstate", f"dir={state}", "--server", f"type=unixio,path={path}"]
    process = subprocess.Popen([*command, "--flags", "not-need-init,startup-clear"])
    try:
        for _ in range(100):
            if path.exists():
                break
            time.sleep(0.05)
        with socket.socket(socket.AF_UNIX) as tpm:
            tpm.settimeout(30)
            tpm.connect(str(path))
            yield tpm
    finally:
        process.kill()
        process.wait()


@needs("swtpm")
def test_cap_extends_a_real_tpm(cap: Cap, swtpm: socket.socket) -> None:
    cap.device.symlink_to(FakeTpm(to=swtpm).path)
    assert cap.run(["dash"]) == 0
    assert cap.capped
    # TPM2_PCR_Read, sha256, PCR 15; the digest is the end of the response
    read = ask(swtpm, bytes.fromhex("8001 00000014 0000017e 00000001 000b 03 008000"))
    assert read[6:10] == bytes(4)
    assert read[-32:] == hashlib.sha256(bytes(32) + hashlib.sha256(b"unlock cap").digest()).digest()


# the generator


class Host:
    """A root directory for the generator, and what it made."""

    def __init__(self, directory: Path) -> None:
        self.root = directory / "root"
        self.out = directory / "out"
        self.errors = ""
        self.generator = directory / "usr/lib/systemd/system-generators/unlock-generator"
        (self.root / "etc/unlock").mkdir(parents=True)
        self.generator.parent.mkdir(parents=True)
        self.generator.symlink_to(GENERATOR)
        (directory / "usr/lib/unlock").symlink_to(TOP)

    def generate(self, config: str | bytes | None, fstab: str | None = None) -> set[str]:
        """Runs it; the paths of what it made."""
        if config is not None:
            content = config.encode() if isinstance(config, str) else config
            (self.root / "etc/unlock/unlock.toml").write_bytes(content)
        if fstab is not None:
            (self.root / "etc/fstab").write_text(fstab)
        shutil.rmtree(self.out, ignore_errors=True)
        self.out.mkdir()
        command: list[str | Path] = [sys.executable, "-IS", self.generator, self.out, self.out, self.out, self.root]
        done = subprocess.run(command, capture_output=True, text=True, check=True)
        self.errors = done.stderr
        return {str(path.relative_to(self.out)) for path in self.out.rglob("*") if not path.is_dir()}

    def read(self, name: str) -> list[str]:
        return (self.out / name).read_text().splitlines()


@pytest.fixture
def host(tmp_path: Path) -> Host:
    return Host(tmp_path)


FAILS = "What=/etc/unlock/unlock.toml"
"""In a mount unit that fails, whatever is open."""

DATA = '[group.data]\nmount = "/srv/data"\ntype = "btrfs"\noptions = "noatime,compress=zstd"\ndeadline = 30\n'
GATE = "local-fs.target.wants/unlock-group@data.service"
MOUNT = {GATE, "srv-data.mount", "local-fs.target.wants/srv-data.mount"}


def test_a_group_gets_a_gate_and_a_mount(host: Host) -> None:
    assert host.generate(DATA) == MOUNT
    unit = host.read("srv-data.mount")
    for line in (
        "DefaultDependencies=no",
        "Requires=unlock-group@data.service",
        "After=unlock-group@data.service local-fs-pre.target",
        "Conflicts=umount.target",
        "Before=umount.target",
        "What=/run/unlock/open/data",
        "Where=/srv/data",
        "Type=unlock.btrfs",
        "Options=noatime,compress=zstd",
    ):
        assert line in unit
    assert (host.out / GATE).readlink() == Path("/usr/lib/systemd/system/unlock-group@.service")
    assert (host.out / "local-fs.target.wants/srv-data.mount").resolve() == (host.out / "srv-data.mount").resolve()
    assert not host.errors


def test_what_systemd_reads_alike_is_the_same_unit(host: Host) -> None:
    host.generate(DATA)
    unit = host.read("srv-data.mount")
    wide = DATA.replace('"btrfs"', '" btrfs "').replace("compress=zstd", "compress=zstd ").replace("30", "31536000")
    assert host.generate(wide) == MOUNT and not host.errors
    assert host.read("srv-data.mount") == unit


def test_a_group_without_a_mount_gets_a_gate(host: Host) -> None:
    assert host.generate("[group.data]\n") == {GATE}


def test_paths_are_escaped_and_names_need_not_be(host: Host) -> None:
    made = host.generate('[group."my-data.2"]\nmount = "/srv//my data/./ü-x/"\n', '{"groups": {}}')
    assert "local-fs.target.wants/unlock-group@my-data.2.service" in made
    assert "srv-my\\x20data-\\xc3\\xbc\\x2dx.mount" in made
    assert "Requires=unlock-group@my-data.2.service" in host.read("srv-my\\x20data-\\xc3\\xbc\\x2dx.mount")
    assert "Where=/srv/my data/ü-x" in host.read("srv-my\\x20data-\\xc3\\xbc\\x2dx.mount")


@needs("systemd-escape")
@pytest.mark.parametrize("path", ["/", "/a", "/.a/.b", "/srv/a-b_c:d.e", "/a b/%x/ü/\\", "//a//b/"])
def test_escape_is_that_of_systemd(path: str) -> None:
    theirs = subprocess.run(["systemd-escape", "--path", path], capture_output=True, text=True, check=True).stdout
    assert units.escape_path("/" + "/".join(part for part in path.split("/") if part)) == theirs.rstrip("\n")


def test_a_target_of_fstab_is_refused(host: Host) -> None:
    fstab = "# /srv/data is ours\n/dev/sda1 / ext4 defaults 0 1\nUUID=1 /srv/data/ ext4 nofail 0 2\n"
    assert host.generate(DATA, fstab) == {GATE}
    assert "/srv/data is mounted by /etc/fstab" in host.errors


def test_a_target_of_fstab_is_known_however_it_is_written(host: Host) -> None:
    named = {"two words": "two\\040words", "back\\slash": "back\\134slash", "a\\040b": "a\\134040b", "ü": "\\303\\274",
             "nu#ll": "nu\\043ll", "twice": "/twice//", "dot": "./dot/."}  # fmt: skip
    table = "".join(f"UUID=1 /srv/{written} ext4 nofail 0 2\n" for written in named.values())
    groups = "".join(f"[group.g{i}]\nmount = '/srv/{where}'\n" for i, where in enumerate(named))
    made = host.generate(groups, table)
    assert not [each for each in made if each.endswith(".mount")]
    assert host.errors.count("mounted by /etc/fstab") == len(named)


NAMES = ["data", "my-data.2", "0", "_data", ".data", "-data", "Data", "a b", "../x", "ü", "a" * 64, "a" * 65, ""]
SETTINGS = [
    'mount = "/srv/x"', 'mount = "/srv//x/./y/"', 'mount = "/srv/.../y"', 'mount = "/srv/ü y"', 'mount = "srv"',
    'mount = "/"', 'mount = "//."', 'mount = "/srv/../x"', 'mount = "/srv/.."', 'mount = "/a\\nb"', 'mount = "/a\\tb"',
    "mount = 3", 'mount = "/srv/x"\ntype = "a\\nb"', 'mount = "/srv/x"\noptions = "a\\nb"',
    'mount = "/var"', 'mount = "/var/lib/unlock/x"', 'mount = "/usr"', 'mount = "//etc/."', 'mount = "/boot"',
    'mount = "/var/lib/data"', 'mount = "/var/log"', 'mount = "/opt"', 'mount = "/library"',
    'mount = "/srv/x"\noptions = 3', 'mount = "/srv/x"\noptions = "a,b c"',
]  # fmt: skip


@pytest.mark.parametrize("which", ["names", "settings"])
def test_generator_and_commands_say_the_same_of_a_group(host: Host, which: str) -> None:
    """A gate whose command does not know the group would fail; a mount point that only one of them accepts would have a
    unit of another name."""
    groups = [(name, 'mount = "/srv/x"') for name in NAMES]
    if which == "settings":
        groups = [("data", setting) for setting in SETTINGS]
    accepted = 0
    for name, setting in groups:
        text = f'[group."{name}"]\n{setting}\n'
        host.generate(text)
        mounts = {each.name for each in host.out.glob("*.mount") if FAILS not in each.read_text()}
        settings = config.parse(text)
        expected = {units.mount_unit(group.mount) for group in settings.groups.values()}
        assert mounts == expected, text
        assert bool(host.errors) == bool(settings.faults)
        accepted += bool(mounts)
    assert 0 < accepted < len(groups)


def test_two_groups_cannot_share_a_target(host: Host) -> None:
    made = host.generate(DATA + '[group.more]\nmount = "/srv/data/"\n')
    assert made == MOUNT | {"local-fs.target.wants/unlock-group@more.service"}
    assert "group 'more'" in host.errors


def test_no_configuration_is_no_error(host: Host) -> None:
    assert host.generate(None) == set()
    assert not host.errors


@pytest.mark.parametrize("config", [b"\xff\xfe", "group = 3", '[group."a b"]\n', f"[group.{'a' * 65}]\n", "[[group]]"])
def test_a_file_that_names_no_group_makes_nothing(host: Host, config: str | bytes) -> None:
    assert host.generate(config) == set()
    assert host.errors


BAD = "local-fs.target.wants/unlock-group@bad.service"
MORE = "[group.more]\nmount = '/srv/more'\n"


def failing(*mounts: str) -> set[str]:
    return {f"{mount}.mount" for mount in mounts} | {f"local-fs.target.wants/{mount}.mount" for mount in mounts}


@pytest.mark.parametrize(
    ("setting", "where"),
    [
        ('mount = "/srv/bad"\noptions = ["noatime"]', "srv-bad"),
        ('mount = "/srv/bad"\noptions = "x\\n[Install]"', "srv-bad"),
        ('mount = "/srv/bad"\ndeadline = "90"', "srv-bad"),
        ('mount = "/srv/bad"\ncolor = "/etc/x"', "srv-bad"),
        ('mount = "srv/bad"', "srv-bad"),
        ('mount = ["/srv/bad"]', "srv-bad"),
        ('mount.point = "/srv/bad"', "srv-bad"),
        ('mount = "/srv/../srv/bad"', "srv-bad"),
        ('mount = " /srv/bad "', "srv-bad"),
        ('muont = "/srv/bad"', "srv-bad"),
        ('Mount = "/srv/bad"', "srv-bad"),
        ('[group.bad.bad]\nmount = "/srv/bad"', "srv-bad"),
        ('mount = "/"', ""),
        ('mount = "/a\\nb"', ""),
        ("mount = 3", ""),
        ('ca = "/srv/ca.pem"', ""),
        (f"mount = '/srv/{'x' * 300}'", ""),
    ],
)
def test_a_group_that_is_wrong_has_a_mount_that_fails_and_the_others_have_theirs(
    host: Host, setting: str, where: str
) -> None:
    made = host.generate(f"[group.bad]\n{setting}\n{DATA}")
    assert made == MOUNT | {BAD} | (failing(where) if where else set())
    assert FAILS not in "\n".join(host.read("srv-data.mount"))
    assert not where or FAILS in host.read(f"{where}.mount")
    assert "group.bad" in host.errors


@pytest.mark.parametrize(
    "bad",
    [
        "[gruop.bad]\nmount = '/srv/bad'",
        "[group.'../x']\nmount = '/srv/bad'",
        "[group.'a b']\nmount = '/srv/bad'",
        "[[group.bad]]\nmount = '/srv/bad'",
        "[provider.kms]\nmount = '/srv/bad'\nca = '/srv/ca.pem'\nendpoints = ['kms']",
        "[sync]\nmount = '/srv/bad'\nfile = '/opt'",
        "[gruop.type]\nmount = '/srv/bad'",
        f"[group.bad{'.a' * 3000}]\nmount = '/srv/bad'",
    ],
)
def test_a_mount_point_in_a_wrong_place_of_the_file_fails(host: Host, bad: str) -> None:
    assert host.generate(f"{DATA}{bad}\n") - {BAD} == MOUNT | failing("srv-bad")
    assert FAILS in host.read("srv-bad.mount")


@pytest.mark.parametrize("what", ["group", "mount", "group = 3\nmount"])
def test_a_mount_point_without_a_table_fails(host: Host, what: str) -> None:
    assert host.generate(f"{what} = '/srv/bad'\n{DATA if what == 'mount' else ''}") >= failing("srv-bad")


@pytest.mark.parametrize(
    "wrong",
    [
        b"[group.bad\n",
        b"version = 2\n",
        b"version = 'x'\n",
        b"version = 1" + b"0" * 5000 + b"\n",
        b"version" + b".a" * 3000 + b" = 1\n",
        b"x = " + b"[" * 5000 + b"\n",
        b"# \xff\n",
        b"\xef\xbb\xbf",
    ],
)
def test_where_no_group_can_be_told_from_another_each_has_a_mount_that_fails(host: Host, wrong: bytes) -> None:
    made = host.generate(wrong + DATA.encode() + MORE.encode())
    gates = {f"local-fs.target.wants/unlock-group@{name}.service" for name in ("data", "more")}
    assert made - {BAD} == failing("srv-data", "srv-more") | gates
    assert FAILS in host.read("srv-data.mount") and FAILS in host.read("srv-more.mount")
    assert host.errors


BROKEN = "[group.bad\n"


@pytest.mark.parametrize(
    "line",
    [
        'options = "subvol=/home"',
        "options = 'noatime,subvol=/home'",
        'options = "noatime,subvol=/home',
        "options = noatime,subvol=/home",
        'options = ["/home"]',
        "options='/home'",
        '"options" = "/home"',
        'more = { type = "/home", options = "x=/home" }',
        "deadline = 60 # from /home",
        'deadline = "60" # don\'t use /home',
        'mount = "/srv/more" # it was mount = "/home"',
        "drop_on = [] # see /home",
        "[group.more] # /home",
        "  # /home",
        'options = "noatime,mount=/home"',
        "endpoints = ['kms', '/home']",
        'ca = "/home"',
        'client_key = "/home',
    ],
)
def test_what_is_no_mount_point_in_a_file_that_is_not_toml_fails_nowhere(host: Host, line: str) -> None:
    made = host.generate(f"{BROKEN}mount = '/srv/bad'\n{line}\n")
    assert {each for each in made if each.endswith(".mount")} - failing("srv-more") == failing("srv-bad")


@pytest.mark.parametrize(
    "line",
    [
        'more = { options = "noatime, mount = "/srv/more" }',
        "more = { options = 'noatime', mount = '/srv/more' }",
        "more = { options = noatime', mount = '/srv/more' }",
        "more = { type = 'ext4, mount = /srv/more }",
        'more = { "type" = "ext4", "mount" = "/srv/more" }',
        "more = { options = [, mount = '/srv/more' }",
        "group.type = { mount = '/srv/more' }",
        "version = 1'group.more.mount = '/srv/more'",
        "more.mount =#'/srv/more'",
        "more.mo#nt = '/srv/more'",
        "more = {# mount = '/srv/more' }",
        "mount = '/srv/more#",
        'mount = "/srv/more" # the "data',
    ],
)
def test_a_mount_point_beside_another_setting_fails(host: Host, line: str) -> None:
    assert host.generate(f"{BROKEN}{line}\n") >= failing("srv-more")


SHARED = (
    "UUID=1 /home/shared ext4 defaults 0 2\n",
    "/home /srv/home none bind 0 0\n",
    "/home/image /srv/x ext4 loop 0 2\n",
)


@pytest.mark.parametrize("wrong", ["[group.bad\nwhere = '/home'\n", "[group.bad]\nmuont = '/home'\n"])
def test_a_mount_that_fstab_needs_fails_only_if_the_file_says_that_it_is_one(host: Host, wrong: str) -> None:
    """A mount requires those above it and above its source, and the boot those of fstab."""
    assert failing("home") <= host.generate(wrong, "UUID=1 /homes/shared ext4 defaults 0 2\n")
    named = wrong.replace("where", "mount").replace("muont", "mount")
    for fstab in SHARED:
        assert not failing("home") & host.generate(wrong, fstab), fstab
        assert failing("home") <= host.generate(named, fstab), fstab


@pytest.mark.parametrize("table", ["[provider.kms]", "[sync]"])
def test_a_path_in_the_table_of_no_group_fails_nowhere(host: Host, table: str) -> None:
    assert host.generate(f"{DATA}{table}\nca_file = '/opt'\nfiles = ['/home']\n") == MOUNT
    assert table.strip("[]") in host.errors


def test_a_file_of_another_encoding_has_mounts_that_fail(host: Host) -> None:
    assert host.generate((DATA + MORE).encode("utf-16")) >= failing("srv-data", "srv-more")


def test_a_mount_that_fails_has_nothing_that_could_open(host: Host) -> None:
    """Also not a group of the name that a placeholder would have."""
    host.generate("[group.unknown]\nmount = '/srv/unknown'\n[group.bad\n")
    unit = "\n".join(host.read("srv-unknown.mount"))
    assert "Requires" not in unit and "/run/unlock/open" not in unit
    with pytest.raises(Usage, match=r"unlock\.toml is wrong"):
        find_group(Paths(), "/etc/unlock/unlock.toml")


def test_a_mount_that_fails_takes_no_place_of_fstab(host: Host) -> None:
    made = host.generate("[group.bad]\nmount = '/srv/bad'\ncolor = 1\n", "UUID=1 /srv/bad ext4 nofail 0 2\n")
    assert made == {BAD}


@pytest.mark.parametrize("table", ["absent", "folder"])
def test_groups_have_their_units_whatever_fstab_is(host: Host, table: str) -> None:
    if table == "folder":
        (host.root / "etc/fstab").mkdir()
    assert host.generate(DATA) == MOUNT


STYLES = {
    "dotted": "version = 1\ngroup.data.mount = '/srv/data'\ngroup.more = { mount = \"/srv/more\", deadline = 30 }\n",
    "inline": "group = { data = { mount = '/srv/data' }, more = { mount = '/srv/more', type = 'ext4' } }\n",
    "tables": f"[provider.kms]\nendpoints = ['kms']\nca = '/srv/ca.pem'\n{DATA}[sync]\ndrop_on = []\n{MORE}",
}


def named(content: str) -> set[str]:
    """What is named below /srv, outside of comments: in a value, or in the text of a file that is not TOML."""
    try:
        text = repr(tomllib.loads(content.encode("latin-1").decode()))
    except (tomllib.TOMLDecodeError, UnicodeDecodeError):
        text = "\n".join(line for line in content.splitlines() if not line.lstrip().startswith("#"))
    return set(re.findall("/srv/([a-z]+)(?=[\"',\\s}#\\]])", text))


@pytest.mark.parametrize("style", STYLES)
def test_no_change_of_the_file_leaves_a_group_without_a_unit(
    host: Host, style: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each character left out and replaced; each line left out."""
    monkeypatch.setattr(sys, "path", [*sys.path])
    spec = spec_from_loader("generator", SourceFileLoader("generator", str(GENERATOR)))
    assert spec and spec.loader
    generator = module_from_spec(spec)
    spec.loader.exec_module(generator)
    monkeypatch.setattr(generator, "complain", lambda message: None)
    text = STYLES[style]
    lines = text.splitlines(keepends=True)
    changed = {"".join(lines[:i] + lines[i + 1 :]) for i in range(len(lines))}
    for i in range(len(text)):
        for other in ("", *"\"'#\n]\xff"):
            changed.add(text[:i] + other + text[i + 1 :])
    for number, content in enumerate(sorted(changed)):
        (host.root / "etc/unlock/unlock.toml").write_bytes(content.encode("latin-1"))
        generator.main(str(host.out / str(number)), str(host.root))
        made = {path.name for path in (host.out / str(number)).glob("*.mount")}
        for name in named(content) & {"data", "more"}:
            assert f"srv-{name}.mount" in made, content


def test_no_mount_unit_is_made_where_the_gate_would_wait_for_it(host: Host) -> None:
    """A gate is ordered after /var/lib/unlock: a mount of /var that waits for the gate is a cycle."""
    gates = {"local-fs.target.wants/unlock-group@data.service"}
    for where in ("/var", "/var/", "/etc", "/usr", "/var/lib", "/boot"):
        assert host.generate(f'[group.data]\nmount = "{where}"\n') == gates, where
        assert f"{where.rstrip('/')} is needed before groups are mounted" in host.errors
        assert host.generate(f'[group.data\nmount = "{where}"\n') == gates, "not valid TOML"


@pytest.mark.parametrize("where", ["/usr/local/pgsql", "/boot/data", "/lib/firmware/data"])
def test_a_group_below_what_a_boot_needs_is_mounted_or_its_mount_fails(host: Host, where: str) -> None:
    unit = f"{units.escape_path(where)}.mount"
    assert host.generate(f"[group.data]\nmount = '{where}'\n") == {GATE, unit, f"local-fs.target.wants/{unit}"}
    assert not host.errors and "What=/run/unlock/open/data" in host.read(unit)
    for wrong in (f"[group.data]\nmount = '{where}'\ncolor = 1\n", f"[group.data\nmount = '{where}'\n"):
        assert host.generate(wrong) == {GATE, unit, f"local-fs.target.wants/{unit}"}
        assert FAILS in host.read(unit)


@pytest.mark.parametrize("where", ["/run/data", "/var/lib/unlock/data", "/etc/unlock/data"])
def test_a_group_where_none_can_be_has_a_mount_that_fails(host: Host, where: str) -> None:
    """No unit of the boot needs it, and a service may."""
    assert host.generate(f"[group.data]\nmount = '{where}'\n") == {GATE} | failing(units.escape_path(where))
    assert FAILS in host.read(units.mount_unit(where)) and "is needed before groups are mounted" in host.errors


def test_percent_is_no_specifier(host: Host) -> None:
    host.generate('[group.data]\nmount = "/srv/50%n"\noptions = "x=%h"\n')
    unit = host.read("srv-50\\x25n.mount")
    assert "Where=/srv/50%%n" in unit
    assert "Options=x=%%h" in unit


@needs("systemd-analyze")
def test_systemd_accepts_the_units(host: Host, tmp_path: Path) -> None:
    host.generate(DATA + '[group.my-data]\nmount = "/srv/a b"\n[group.bad]\nmount = "/srv/50%n"\ncolor = 1\n')
    units = tmp_path / "units"
    shutil.copytree(host.out, units, symlinks=True)
    for unit in ("unlock-group@.service", "unlock-heal@.service", "unlock-resume.service"):
        text = (
            (TOP / "system" / unit)
            .read_text()
            .replace("/usr/sbin/unlock", "/bin/true")
            .replace("/usr/lib/unlock/gate", "/bin/true")
        )
        (units / unit).write_text(text.replace("Documentation=man:unlock(8)", ""))
    mounts = [units / f"srv-{each}.mount" for each in ("data", "a\\x20b", "50\\x25n")]
    for mount in mounts:
        mount.write_text(mount.read_text().replace("Documentation=man:unlock(8)", ""))
    instances = [units / f"{each}.service" for each in ("unlock-group@my-data", "unlock-heal@sda", "unlock-resume")]
    command: list[str | Path] = ["systemd-analyze", "verify", "--man=no", *mounts, *instances]
    done = subprocess.run(command, capture_output=True, text=True, env={**os.environ, "SYSTEMD_UNIT_PATH": f"{units}:"})
    ours = [line for line in done.stderr.splitlines() if "unlock" in line or "srv-" in line]
    assert not ours


# resume


@pytest.mark.parametrize("shell", SHELLS, ids=lambda shell: shell[0].split("/")[-1])
def test_a_resume_disk_is_ours_when_all_below_it_is(shell: list[str], tmp_path: Path) -> None:
    below = {"sda": [], "sdb": [], "dm-0": ["sda"], "dm-1": ["dm-0"], "dm-2": ["dm-0", "sdb"], "dm-3": ["dm-1", "dm-0"]}
    below |= {"dm-4": ["sdb"], "dm-5": ["dm-4"], "dm-6": ["sdb"]}
    below |= {"dm-7": [], "dm-8": ["dm-0", "dm-7"], "dm-9": ["sdb"], "dm-10": []}  # of a raid that lacks a disk
    names = {"dm-0": "root", "dm-1": "vg-swap", "dm-4": "of-a-thief", "dm-6": "root-2"}
    uuids = {name: "CRYPT-LUKS2-x" if name in ("dm-0", "dm-4") else "LVM-x" for name in below if name.startswith("dm")}
    uuids["dm-6"] = "CRYPT-PLAIN-root-2"  # of a name that unlock has opened
    uuids |= {"dm-7": "LVM-x-missing_0_0", "dm-9": "LVM-x-missing_0_0"}
    for name, slaves in below.items():
        (tmp_path / name / "slaves").mkdir(parents=True)
        for each in slaves:
            (tmp_path / name / "slaves" / each).symlink_to(tmp_path / each)
        if name in uuids:
            (tmp_path / name / "dm").mkdir()
            (tmp_path / name / "dm/uuid").write_text(f"{uuids[name]}\n")
            (tmp_path / name / "dm/name").write_text(f"{names.get(name, name)}\n")
    (tmp_path / "run/members").mkdir(parents=True)
    (tmp_path / "run/members/root").write_text("/dev/mapper/root\n/dev/mapper/root-2\n")
    functions = (TOP / "initramfs/functions").read_text()
    assert functions.count("/sys/class/block/") == 6
    script = tmp_path / "script"
    script.write_text(
        functions.replace("/sys/class/block/", f"{tmp_path}/").replace("=/run/unlock", f"={tmp_path}/run")
        + "for each in sda sdb dm-0 dm-1 dm-2 dm-3 dm-4 dm-5 dm-6 dm-8 dm-9 dm-10 gone ''; do\n"
        + 'unlock_ours "$each" && echo $each; done; true\n'
    )
    done = subprocess.run([*shell, script], capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["dm-0", "dm-1", "dm-3", "dm-8"] and not done.stderr


# the root that is mounted


@pytest.mark.parametrize("shell", SHELLS, ids=lambda shell: shell[0].split("/")[-1])
def test_a_root_is_the_hosts_own_if_a_disk_that_it_needs_is_below_it(shell: list[str], tmp_path: Path) -> None:
    below = {"sda": [], "sdb": [], "dm-0": ["sda"], "dm-1": ["dm-0"], "dm-2": ["sdb", "dm-0"], "dm-4": ["sdb"]}
    names = {"dm-0": "root", "dm-1": "vg-root", "dm-2": "vg-two", "dm-4": "of-a-thief"}
    for name, slaves in below.items():
        (tmp_path / name / "slaves").mkdir(parents=True)
        for each in slaves:
            (tmp_path / name / "slaves" / each).symlink_to(tmp_path / each)
        if name in names:
            (tmp_path / name / "dm").mkdir()
            kind = "CRYPT-LUKS2-x" if name in ("dm-0", "dm-4") else "LVM-x"
            (tmp_path / name / "dm/uuid").write_text(f"{kind}\n")
            (tmp_path / name / "dm/name").write_text(f"{names[name]}\n")
    (tmp_path / "run").mkdir()
    functions = (TOP / "initramfs/functions").read_text()
    script = tmp_path / "script"
    script.write_text(
        functions.replace("/sys/class/block/", f"{tmp_path}/")
        .replace("=/run/unlock", f"={tmp_path}/run")
        .replace("/proc/mounts", f"{tmp_path}/mounts")
        .replace("/dev/\\*)", "/*)")
        + "for each in sda sdb dm-0 dm-1 dm-2 dm-4 gone; do\n"
        + f'echo "/dev/$each /root ext4 rw 0 0" >{tmp_path}/mounts\n'
        + "unlock_own_root && echo $each; done; true\n"
    )

    def own() -> list[str]:
        done = subprocess.run([*shell, script], capture_output=True, text=True, check=True)
        assert not done.stderr
        return done.stdout.split()

    assert len(own()) == 7, "a host whose root was never adopted"
    (tmp_path / "run/needed").write_text("usr\nroot\n")
    assert own() == ["dm-0", "dm-1", "dm-2"]
    script.write_text(script.read_text().replace('"/dev/$each /root', '"tmpfs /root'))
    assert len(own()) == 7, "what lies on no block device cannot be told"


# install


def test_install_and_uninstall(tmp_path: Path) -> None:
    for target in ("install", "uninstall"):
        subprocess.run(["make", "--quiet", "-C", TOP, target, f"DESTDIR={tmp_path}"], check=True)
        files = {str(path.relative_to(tmp_path)): path for path in tmp_path.rglob("*") if path.is_file()}
        if target == "install":
            programs = {name for name, path in files.items() if path.stat().st_mode & 0o111}
            assert programs == {
                "usr/sbin/unlock",
                "usr/sbin/mount.unlock",
                "usr/lib/unlock/cap",
                "usr/lib/unlock/gate",
                "usr/lib/unlock/predict",
                "usr/lib/unlock/crash-init",
                "usr/lib/unlock/dump",
                "etc/kernel/postinst.d/zzz-unlock",
                "etc/kernel/postrm.d/zzz-unlock",
                "etc/initramfs/post-update.d/zzz-unlock",
                "usr/lib/unlock/initramfs/collect",
                "usr/lib/systemd/system-generators/unlock-generator",
                *(f"usr/lib/dracut/modules.d/90unlock/{script.name}" for script in DRACUT),
                "usr/lib/kernel/install.d/99-unlock.install",
                "usr/share/initramfs-tools/hooks/unlock",
                *(f"usr/share/initramfs-tools/scripts/{stage}/unlock" for stage in STAGES),
                "usr/share/initramfs-tools/scripts/local-premount/check-resume",
            }
            assert "usr/lib/unlock/unlock/__main__.py" in files
            wanted = tmp_path / "usr/lib/systemd/system/multi-user.target.wants/unlock-baseline.service"
            assert "boot baseline" in wanted.read_text()
            assert "operation resume" in wanted.with_name("unlock-resume.service").read_text()
    assert not files
