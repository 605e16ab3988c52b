# SPDX-License-Identifier: Apache-2.0
"""What happens before a shell, before the recovery prompt and before the real root, and in which order. The scripts,
with stand-ins for what they start."""

import contextlib
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

TOP = Path(__file__).parents[1]
SHELLS = [shell for shell in (["dash"], ["busybox", "sh"], ["bash"]) if shutil.which(shell[0])]


class Stage:
    """A directory in the place of the initramfs. `failing`: words of `unlock boot` that fail."""

    def __init__(self, home: Path, failing: str = "none") -> None:
        self.home = home
        self.run_folder = home / "run"
        self.run_folder.mkdir(exist_ok=True)
        self.console = home / "console"
        self.console.touch()
        self.log = home / "log"
        self.log.touch()
        self.program("unlock", f'echo "$*" >>{self.log}; case "$*" in *{failing}*) exit 1 ;; esac')
        self.program("cap", f'echo "cap $*" >>{self.log}')
        self.program("poweroff", f"echo poweroff >>{self.log}; kill $PPID")
        self.program("umount", f'echo "umount" >>{self.log}; exit 1')
        self.program("udevadm", "")
        (home / "dev").mkdir(exist_ok=True)
        (home / "initramfs-functions").write_text(
            f'resolve_device() {{ [ -e "$1" ] && echo "$1"; }}\nget_fstype() {{ :; }}\n'
            f"panic() {{ echo panic >>{self.log}; {home}/panic; }}\n"
        )
        (home / "cryptsetup-functions").write_text(
            "crypttab_foreach_entry() {\n"
            "while read -r _CRYPTTAB_NAME _CRYPTTAB_SOURCE _CRYPTTAB_KEY _CRYPTTAB_OPTIONS; do\n"
            '"$@"; done <"$TABFILE"; }\n'
            f"crypttab_resolve_source() {{ CRYPTTAB_SOURCE={home}/dev/$_CRYPTTAB_SOURCE\n"
            '[ -e "$CRYPTTAB_SOURCE" ]; }\n'
        )
        tools = TOP / "initramfs/initramfs-tools"
        scripts = {name: tools / name for name in ("functions", "panic", "local-top", "local-premount", "local-bottom")}
        for name, script in (*scripts.items(), ("common", TOP / "initramfs/functions")):
            text = script.read_text()
            for path, to in {
                "/scripts/unlock-functions": home / "functions",
                "/usr/lib/unlock/functions": home / "common",
                ". /scripts/functions": f". {home}/initramfs-functions",
                ". /scripts/local": f". {home}/initramfs-functions",
                "/sys/class/block/": f"{home}/block/",
                "#/dev/}": f"#{home}/dev/}}",
                "/dev/* |": "/* |",
                "/lib/cryptsetup/functions": home / "cryptsetup-functions",
                "/conf/param.conf": home / "param.conf",
                "/cryptroot/crypttab": home / "crypttab",
                "/usr/sbin/unlock": home / "unlock",
                "/usr/lib/unlock/cap": home / "cap",
                "/dev/console": self.console,
                "unlock_run=/run/unlock": f"unlock_run={self.run_folder}",
                "/proc/sysrq-trigger": home / "sysrq",
                "/proc/mounts": home / "mounts",
                "sleep 3": "sleep 0",
                "sleep 0.1": "sleep 0.01",
            }.items():
                text = text.replace(path, str(to))
            (home / name).write_text(text)
            (home / name).chmod(0o755)

    def fail_to_lock(self) -> None:
        """The TPM confirms nothing from now on."""
        off = f"echo poweroff >>{self.log}; kill $PPID"
        self.program(
            "cap", f'echo "cap $*" >>{self.log}\ncase $* in try) : >{self.run_folder}/uncapped; exit 1 ;; esac\n{off}'
        )

    def opens(self, word: str) -> None:
        """`unlock boot WORD` opens the root disk; what it opens `secure` finds authentic."""
        opened = f"mkdir -p {self.run_folder}/open; ln -s x {self.run_folder}/open/root; {self.home}/open-root"
        self.program("open-root", self._root_disk("root"))
        marks = f": >{self.run_folder}/recovered"
        secure = f"secure) : >{self.run_folder}/authentic ;;"
        self.program("unlock", f'echo "$*" >>{self.log}; case "$2" in {word}) {opened}; {marks} ;; {secure} esac')

    def thief_brings_a_root_disk(self) -> None:
        self.program("open-root", self._root_disk("of-a-thief"))
        subprocess.run([self.home / "open-root"], check=True)

    def _root_disk(self, mapping: str) -> str:
        dm = f"{self.home}/block/dm-0/dm"
        members = f"mkdir -p {self.run_folder}/members; echo /dev/mapper/root >{self.run_folder}/members/root"
        node = f"echo CRYPT-LUKS2-x >{dm}/uuid; echo {mapping} >{dm}/name; : >{self.home}/dev/dm-0"
        return f"mkdir -p {dm}; {node}; {members}"

    @contextlib.contextmanager
    def agent(self) -> Iterator[None]:
        """One that has dealt with every disk."""
        loop = f"trap ': >{self.run_folder}/idle' USR1; while :; do sleep 0.01; done"
        with subprocess.Popen(["sh", "-c", loop]) as process:
            (self.run_folder / "agent.pid").write_text(f"{process.pid}\n")
            try:
                yield
            finally:
                process.kill()

    def program(self, name: str, body: str) -> None:
        path = self.home / name
        path.write_text(f"#!/bin/sh\n{body}\n")
        path.chmod(0o755)

    def panic(self, shell: list[str]) -> list[str]:
        """What was started, in order."""
        return self.started([*shell, str(self.home / "panic")])

    def gives_up(self, shell: list[str]) -> list[str]:
        """The same, when root does not open by itself."""
        names = ("initramfs-functions", "cryptsetup-functions", "functions")
        functions = "; ".join(f". {self.home}/{each}" for each in names)
        return self.started([*shell, "-c", f"{functions}; unlock_give_up"])

    def script(self, shell: list[str], name: str) -> list[str]:
        return self.started([*shell, str(self.home / name)])

    def started(self, command: list[str]) -> list[str]:
        self.log.write_text("")
        path = f"{self.home}:/usr/sbin:/usr/bin:/sbin:/bin"
        env = {"PATH": path, "ROOT": f"{self.home}/dev/dm-0", "resume": "/dev/swap"}
        subprocess.run(command, env=env, timeout=60, check=False)
        return self.log.read_text().splitlines()


@pytest.fixture(params=SHELLS, ids=" ".join)
def shell(request: pytest.FixtureRequest) -> list[str]:
    assert isinstance(request.param, list)
    return request.param


def test_after_a_refused_boot_the_cap_comes_first_and_then_the_screen(tmp_path: Path, shell: list[str]) -> None:
    stage = Stage(tmp_path)
    (stage.run_folder / "verdict").write_text("pcr-mismatch\n")
    assert stage.panic(shell) == ["cap shell", "boot screen"]


def test_what_the_tpm_opened_is_closed_before_the_screen(tmp_path: Path, shell: list[str]) -> None:
    stage = Stage(tmp_path)
    (stage.run_folder / "verdict").write_text("unsealed\n")
    assert stage.panic(shell) == ["cap shell", "umount", "boot drop", "boot screen"]


@pytest.mark.parametrize("verdict", ["unsealed", "unmeasured-input", ""])
def test_free_memory_is_overwritten_once_before_the_first_shell(tmp_path: Path, shell: list[str], verdict: str) -> None:
    stage = Stage(tmp_path)
    (stage.run_folder / "unsealing").touch()
    (stage.run_folder / "verdict").write_text(f"{verdict}\n" if verdict else "")
    assert stage.panic(shell)[-2:] == ["boot scrub", "boot screen"]
    assert "boot scrub" not in stage.panic(shell)


def test_where_it_cannot_be_there_is_no_shell(tmp_path: Path, shell: list[str]) -> None:
    stage = Stage(tmp_path, failing="scrub")
    (stage.run_folder / "unsealing").touch()
    (stage.run_folder / "verdict").write_text("unsealed\n")
    said = stage.panic(shell)
    assert said[-1] == "poweroff" and "boot screen" not in said
    assert "keys may be left in memory" in stage.console.read_text()


@pytest.mark.parametrize("asked", [True, False])
def test_it_is_not_where_the_tpm_has_released_nothing(tmp_path: Path, shell: list[str], asked: bool) -> None:
    stage = Stage(tmp_path, failing="scrub")
    if asked:
        (stage.run_folder / "unsealing").touch()
        (stage.run_folder / "verdict").write_text("pcr-mismatch\n")
    assert stage.panic(shell) == ["cap shell", "boot screen"]


def test_what_a_person_opened_at_the_first_prompt_stays_open_at_the_second(tmp_path: Path, shell: list[str]) -> None:
    stage = Stage(tmp_path)
    (stage.run_folder / "verdict").write_text("unsealed\n")
    stage.panic(shell)
    assert stage.panic(shell) == ["cap shell", "boot screen"]


def test_disks_that_cannot_be_closed_power_off_and_the_next_prompt_would_try_again(
    tmp_path: Path, shell: list[str]
) -> None:
    stage = Stage(tmp_path, failing="drop")
    (stage.run_folder / "verdict").write_text("unsealed\n")
    said = stage.panic(shell)
    assert said[-1] == "poweroff"
    assert "boot screen" not in said
    assert not (stage.run_folder / "dropped").exists()


def test_without_a_working_python_the_console_still_says_what_to_type(tmp_path: Path, shell: list[str]) -> None:
    stage = Stage(tmp_path, failing="screen")
    (stage.run_folder / "verdict").write_text("pcr-mismatch\n")
    stage.panic(shell)
    assert "unlock open --recovery" in stage.console.read_text()


def test_before_the_recovery_key_is_asked_for_the_prompt_says_why(tmp_path: Path, shell: list[str]) -> None:
    stage = Stage(tmp_path)
    (stage.run_folder / "verdict").write_text("pcr-mismatch\n")
    assert stage.gives_up(shell) == ["cap try", "boot why", "boot prompt"]
    (stage.run_folder / "verdict").write_text("unsealed\n")  # the disk is what is wrong
    assert stage.gives_up(shell) == ["cap try", "boot prompt"]


def test_the_prompt_comes_when_the_reason_does_not(tmp_path: Path, shell: list[str]) -> None:
    stage = Stage(tmp_path, failing="why")
    (stage.run_folder / "verdict").write_text("pcr-mismatch\n")
    assert stage.gives_up(shell)[-1] == "boot prompt"
    stage.program("unlock", f'echo "$*" >>{stage.log}; case "$*" in *why) exec sleep 600 ;; esac')
    assert stage.gives_up(shell)[-1] == "boot prompt"


def test_what_was_looked_into_for_the_reason_is_not_left_mounted(tmp_path: Path, shell: list[str]) -> None:
    stage = Stage(tmp_path, failing="why")
    (stage.run_folder / "verdict").write_text("pcr-mismatch\n")
    (tmp_path / "mounts").write_text(f"/dev/sda1 {stage.run_folder}/efi vfat ro 0 0\n")
    assert stage.gives_up(shell) == ["cap try", "boot why", "umount", "boot prompt"]


# A TPM that does not confirm that it is locked, as in failure mode: it answers each command with 0x101


@pytest.mark.parametrize("verdict", ["tpm-failed", "no-tpm", ""])
def test_the_recovery_prompt_comes_and_what_it_opens_boots_on(tmp_path: Path, shell: list[str], verdict: str) -> None:
    """Without a verdict the agent was killed: it hung in a command."""
    stage = Stage(tmp_path)
    stage.fail_to_lock()
    if verdict:
        (stage.run_folder / "verdict").write_text(f"{verdict}\n")
    stage.opens("prompt")
    assert stage.gives_up(shell) == ["cap try", *(["boot why"] if verdict else []), "boot prompt"]
    assert stage.script(shell, "local-premount") == []
    done = stage.script(shell, "local-bottom")
    assert done[:2] == ["cap try", "boot secure"]
    assert "cap " not in done and "poweroff" not in done


def test_where_the_prompt_opens_nothing_no_other_follows(tmp_path: Path, shell: list[str]) -> None:
    stage = Stage(tmp_path)
    stage.fail_to_lock()
    (stage.run_folder / "verdict").write_text("tpm-failed\n")
    assert stage.gives_up(shell) == ["cap try", "boot why", "boot prompt", "cap ", "poweroff"]


@pytest.mark.parametrize("shown", [True, False])
def test_where_another_group_alone_is_open_no_stock_prompt_for_the_root_follows(
    tmp_path: Path, shell: list[str], shown: bool
) -> None:
    """That prompt asks for what its crypttab lists. The boot goes on: the root may lie on LVM, whose volumes appear
    later. Before it is mounted, it is checked."""
    stage = Stage(tmp_path)
    stage.fail_to_lock()
    (stage.run_folder / "verdict").write_text("tpm-failed\n")
    (stage.run_folder / "open").mkdir()
    (stage.run_folder / "open/data").symlink_to("x")
    (stage.run_folder / "crypttab").write_text("root UUID=1 none luks\n")
    if shown:
        (tmp_path / "crypttab").write_text("root UUID=1 none luks\n")
    assert stage.gives_up(shell) == ["cap try", "boot why", "boot prompt"]
    assert not (tmp_path / "crypttab").exists() or not (tmp_path / "crypttab").read_text()
    stage.thief_brings_a_root_disk()
    assert stage.script(shell, "local-premount") == ["cap ", "poweroff"]


@pytest.mark.parametrize("locked", [True, False])
def test_the_stock_prompt_has_its_crypttab_back_where_the_tpm_is_locked_or_the_root_is_there(
    tmp_path: Path, shell: list[str], locked: bool
) -> None:
    stage = Stage(tmp_path)
    (stage.run_folder / "verdict").write_text("tpm-failed\n")
    (stage.run_folder / "crypttab").write_text("root UUID=1 none luks\n")
    if not locked:
        stage.fail_to_lock()
        stage.opens("prompt")
    stage.gives_up(shell)
    assert (tmp_path / "crypttab").read_text() == "root UUID=1 none luks\n"


@pytest.mark.parametrize("asked", [False, True])
def test_the_stock_prompt_asks_for_no_disk_whose_header_was_changed(
    tmp_path: Path, shell: list[str], asked: bool
) -> None:
    """One that the root does not need, so that the boot goes on. A person has opened the root where one was asked."""
    stage = Stage(tmp_path)
    (tmp_path / "dev/data").touch()
    (stage.run_folder / "changed").write_text(f"{tmp_path}/dev/data\n")
    lines = ("late UUID=1 none luks\n", "data data none luks,initramfs\n", "other data-2 none luks\n")
    (tmp_path / "dev/data-2").touch()
    (tmp_path / "crypttab").write_text("".join(lines))
    (stage.run_folder / "verdict").write_text("unsealed\n")
    with stage.agent():
        if asked:
            (stage.run_folder / "failed").touch()
            stage.opens("prompt")
        assert stage.script(shell, "local-top") == ["cap try", *(["boot prompt"] if asked else [])]
    assert (tmp_path / "crypttab").read_text() == (lines[0] if asked else "") + lines[2]
    stage.script(shell, "panic")
    assert (tmp_path / "crypttab").read_text() == lines[0] + lines[2]


def test_a_disk_that_was_changed_is_told_and_no_shell_follows(tmp_path: Path, shell: list[str]) -> None:
    stage = Stage(tmp_path, failing="prompt")
    stage.fail_to_lock()
    (stage.run_folder / "verdict").write_text("tpm-failed\n")
    (stage.run_folder / "altered").touch()
    done = stage.gives_up(shell)
    assert done[done.index("panic") :][1:3] == ["cap shell", "poweroff"]


def test_a_root_disk_that_unlock_did_not_open_is_not_mounted(tmp_path: Path, shell: list[str]) -> None:
    """A thief's, with the UUID of the host's."""
    stage = Stage(tmp_path)
    stage.fail_to_lock()
    (stage.run_folder / "verdict").write_text("tpm-failed\n")
    stage.thief_brings_a_root_disk()
    assert stage.gives_up(shell) == ["cap try"], "cryptroot would not ask either: the root is there"
    assert stage.script(shell, "local-premount") == ["cap ", "poweroff"]


@pytest.mark.parametrize("accepted", [True, False])
def test_a_root_that_is_not_encrypted_starts_only_if_the_tpm_said_that_it_may(
    tmp_path: Path, shell: list[str], accepted: bool
) -> None:
    """The TPM fails at the first command, or when it has released what says that this root was accepted."""
    stage = Stage(tmp_path)
    stage.fail_to_lock()
    (tmp_path / "dev/dm-0").touch()
    (tmp_path / "block/dm-0").mkdir(parents=True)
    (stage.run_folder / "verdict").write_text("unsealed\n" if accepted else "tpm-failed\n")
    if accepted:
        (stage.run_folder / "accepted-root").touch()
        (stage.run_folder / "authentic").touch()
        (stage.run_folder / "ended").touch()
    with stage.agent():
        assert stage.script(shell, "local-top") == ["cap try"]
    assert stage.script(shell, "local-premount") == ([] if accepted else ["cap ", "poweroff"])
    if accepted:
        assert "poweroff" not in stage.script(shell, "local-bottom")


@pytest.mark.parametrize("ended", [True, False])
def test_a_system_that_is_not_authentic_does_not_start(tmp_path: Path, shell: list[str], ended: bool) -> None:
    stage = Stage(tmp_path)
    stage.fail_to_lock()
    (stage.run_folder / "verdict").write_text("unsealed\n")
    if ended:
        (stage.run_folder / "ended").touch()
    assert stage.script(shell, "local-bottom")[-2:] == ["cap ", "poweroff"]


@pytest.mark.parametrize("verdict", ["unsealed", "no-slot"])
def test_what_the_agent_opened_boots_on_and_nothing_is_resumed_unseen(
    tmp_path: Path, shell: list[str], verdict: str
) -> None:
    """The TPM breaks when it has released the key. Or one lies that it has no slot, for a thief's hibernation image."""
    stage = Stage(tmp_path)
    stage.fail_to_lock()
    (stage.run_folder / "verdict").write_text(f"{verdict}\n")
    with stage.agent():
        assert stage.script(shell, "local-top") == ["cap try"]
    assert (stage.run_folder / "resume").read_text() == "/dev/swap\n"


def test_before_a_shell_it_powers_off(tmp_path: Path, shell: list[str]) -> None:
    stage = Stage(tmp_path)
    stage.fail_to_lock()
    assert stage.panic(shell) == ["cap shell", "poweroff"]


@pytest.mark.parametrize("script", ["local-premount", "local-bottom"])
def test_a_tpm_that_is_locked_holds_up_nothing(tmp_path: Path, shell: list[str], script: str) -> None:
    stage = Stage(tmp_path)
    stage.thief_brings_a_root_disk()
    (stage.run_folder / "verdict").write_text("no-slot\n")
    assert stage.script(shell, script) == (["cap try"] if script == "local-bottom" else [])


@pytest.mark.parametrize("flags", ["", "-o subvol=@"])
def test_a_btrfs_root_that_lacks_disks_mounts_degraded(tmp_path: Path, shell: list[str], flags: str) -> None:
    """Only where unlock opened the group of the root without all of its disks."""
    stage = Stage(tmp_path)
    functions = (tmp_path / "initramfs-functions").read_text()
    node, conf = tmp_path / "dev/dm-0", tmp_path / "param.conf"
    node.touch()
    (stage.run_folder / "members").mkdir()
    (stage.run_folder / "members/root").write_text(f"{node}\n")
    (stage.run_folder / "degraded").mkdir()
    for kind, degraded, expected in (
        ("btrfs", False, ""),
        ("ext4", True, ""),
        ("btrfs", True, f"ROOTFLAGS='{flags or '-o defaults'},degraded'\n"),
    ):
        (tmp_path / "initramfs-functions").write_text(
            functions.replace("get_fstype() { :; }", f"get_fstype() {{ echo {kind}; }}") + f"ROOTFLAGS='{flags}'\n"
        )
        mark = stage.run_folder / "degraded/root"
        mark.touch() if degraded else mark.unlink(missing_ok=True)
        stage.script(shell, "local-premount")
        assert (conf.read_text() if conf.exists() else "") == expected
