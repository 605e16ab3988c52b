# SPDX-License-Identifier: Apache-2.0
"""What happens before a shell, and before the recovery prompt, and in which order. The scripts, with stand-ins for what
they start."""

import shutil
import subprocess
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
        for name in ("functions", "panic"):
            text = (TOP / "initramfs" / name).read_text()
            for path, to in {
                "/scripts/unlock-functions": home / "functions",
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

    def program(self, name: str, body: str) -> None:
        path = self.home / name
        path.write_text(f"#!/bin/sh\n{body}\n")
        path.chmod(0o755)

    def panic(self, shell: list[str]) -> list[str]:
        """What was started, in order."""
        return self.started([*shell, str(self.home / "panic")])

    def gives_up(self, shell: list[str]) -> list[str]:
        """The same, when root does not open by itself."""
        return self.started([*shell, "-c", f". {self.home}/functions; unlock_give_up"])

    def started(self, command: list[str]) -> list[str]:
        self.log.write_text("")
        path = f"{self.home}:/usr/sbin:/usr/bin:/sbin:/bin"
        subprocess.run(command, env={"PATH": path}, timeout=60, check=False)
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
    assert stage.gives_up(shell) == ["cap ", "boot why", "boot prompt"]
    (stage.run_folder / "verdict").write_text("unsealed\n")  # the disk is what is wrong
    assert stage.gives_up(shell) == ["cap ", "boot prompt"]


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
    assert stage.gives_up(shell) == ["cap ", "boot why", "umount", "boot prompt"]
