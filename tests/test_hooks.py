# SPDX-License-Identifier: Apache-2.0
"""What runs after an update: the scripts as they are, with their paths moved below a directory."""

import os
import subprocess
from pathlib import Path

import pytest

TOP = Path(__file__).parents[1]


class Host:
    def __init__(self, top: Path) -> None:
        self.top = top
        for name in ("boot", "efi", "run/unlock", "var/lib/unlock", "usr/sbin", "usr/share/initramfs-tools/hooks"):
            (top / name).mkdir(parents=True)
        (top / "boot/initrd.img").write_bytes(b"one")
        (top / "var/lib/unlock/state.json").write_text("{}")
        (top / "usr/share/initramfs-tools/hooks/unlock").touch()
        self.answer(0)
        sync = top / "usr/sbin/sync"
        sync.write_text(f'#!/bin/sh\n[ ! -e {top}/ran ] && echo "$@" >>{top}/synced\n')
        sync.chmod(0o755)

    def answer(self, status: int) -> None:
        program = self.top / "usr/sbin/unlock"
        program.write_text(f'#!/bin/sh\necho "$@" >>{self.top}/ran\nexit {status}\n')
        program.chmod(0o755)

    def hook(self, *words: str, **environment: str) -> int:
        """Runs it; how often `unlock boot predict` has run so far."""
        text = (TOP / "system/predict").read_text()
        for name in (
            "/run/unlock",
            "/var/lib/unlock",
            "/usr/sbin/unlock",
            "/boot /efi",
            "/usr/share/",
            "/usr/lib/dracut/",
        ):
            moved = " ".join(f"{self.top}{part}" for part in name.split())
            assert name in text
            text = text.replace(name, moved)
        path = f"{self.top}/usr/sbin:{os.environ['PATH']}"
        command = ["sh", "-c", text, "predict", *words]
        subprocess.run(command, env={**os.environ, "PATH": path, **environment}, check=True)
        ran = self.top / "ran"
        lines = ran.read_text().splitlines() if ran.exists() else []
        assert set(lines) <= {"boot predict"}
        return len(lines)


@pytest.fixture
def host(tmp_path: Path) -> Host:
    return Host(tmp_path)


def test_it_runs_again_only_after_a_change_and_always_at_shutdown(host: Host) -> None:
    assert host.hook() == 1
    assert host.hook() == 1
    (host.top / "boot/initrd.img").write_bytes(b"two")
    assert host.hook() == 2
    assert host.hook() == 2
    (host.top / "boot/initrd.img").unlink()
    assert host.hook() == 3
    assert host.hook("always") == 4


@pytest.mark.parametrize("clock", [0.0, -3600.0, 3600.0])
def test_a_change_is_seen_whatever_the_clock_did_meanwhile(host: Host, clock: float) -> None:
    """The clock was an hour ahead when the stamp was made, and was set right; or it was behind."""
    assert host.hook() == 1
    stamp = host.top / "run/unlock/predicted"
    time = stamp.stat().st_mtime - clock
    os.utime(stamp, (time, time))
    assert host.hook() == 1
    (host.top / "boot/initrd.img").write_bytes(b"two")
    assert host.hook() == 2
    (host.top / "boot/vmlinuz").write_bytes(b"new")
    assert host.hook() == 3
    (host.top / "boot/vmlinuz").rename(host.top / "boot/vmlinuz.old")
    assert host.hook() == 4
    assert host.hook() == 4


def test_a_failure_fails_no_package_operation_and_is_tried_again(host: Host) -> None:
    host.answer(3)
    assert host.hook() == 1
    assert host.hook() == 2


def test_a_boot_without_unlock_in_its_initramfs_fails_no_package_operation(host: Host) -> None:
    (host.top / "run/unlock").rmdir()
    assert host.hook() == 1
    assert host.hook("always") == 2


def test_a_kernel_package_does_not_wait_for_all_others(host: Host) -> None:
    """Its grub.cfg is there; power may be cut long before dpkg ends."""
    assert host.hook(DPKG_MAINTSCRIPT_PACKAGE="linux-image") == 1
    assert host.hook() == 1


def test_what_the_tpm_allows_is_on_disk_first(host: Host) -> None:
    host.hook()
    wanted = {f"{option}{host.top / name}" for name in ("boot", "efi") for option in ("-f ", "")}
    assert wanted <= set((host.top / "synced").read_text().splitlines())


def test_a_host_that_is_not_initialised_is_left_alone(host: Host) -> None:
    (host.top / "var/lib/unlock/state.json").unlink()
    assert host.hook("always") == 0


@pytest.mark.parametrize("other", ["", "usr/lib/dracut/modules.d/90unlock"])
def test_an_image_that_is_made_without_unlock_is_not_allowed(host: Host, other: str) -> None:
    (host.top / "usr/share/initramfs-tools/hooks/unlock").unlink()
    if other:
        (host.top / other).mkdir(parents=True)
    assert host.hook("always") == (1 if other else 0)


def test_dpkg_calls_it(tmp_path: Path) -> None:
    """dpkg's own reading of the line in its configuration."""
    line = next(each for each in (TOP / "system/dpkg.cfg").read_text().splitlines() if each.startswith("post-invoke="))
    program = tmp_path / "predict"
    program.write_text(f"#!/bin/sh\necho done >{tmp_path}/ran\n")
    program.chmod(0o755)
    root = tmp_path / "root"
    (root / "var/lib/dpkg/updates").mkdir(parents=True)
    (root / "var/lib/dpkg/status").write_text("")
    command = line.removeprefix("post-invoke=").replace("/usr/lib/unlock/predict", str(program))
    subprocess.run(["dpkg", f"--root={root}", f"--post-invoke={command}", "--configure", "-a"], check=True)
    assert (tmp_path / "ran").exists()


def test_what_is_no_folder_is_not_opened(host: Host) -> None:
    """A thief's pipe blocks nothing, and his link is not followed."""
    (host.top / "efi").rmdir()
    (host.top / "efi").symlink_to("/dev")
    os.mkfifo(host.top / "boot/efi")
    os.mkfifo(host.top / "boot/pipe")
    (host.top / "boot/endless").symlink_to("/dev/zero")
    assert host.hook() == 1
    os.mkfifo(host.top / "boot/another")
    assert host.hook() == 2
    assert set((host.top / "synced").read_text().split()) == {"-f", str(host.top / "boot")}
