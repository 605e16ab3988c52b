# SPDX-License-Identifier: Apache-2.0
"""The Debian packages: what `make deb` makes of this checkout, and what lintian says."""

import hashlib
import os
import re
import shutil
import stat
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.lab import image
from tests.lab.packages import Packages, packages
from unlock import __version__
from unlock.operations import init

TOP = Path(__file__).resolve().parents[1]
ALONE = {"usr/lib/unlock/ask-removal", "etc/systemd/system-generators/unlock-guard"}
"""What only a package has: it is for its removal."""
NOT_HERE = ("usr/share/doc/", "usr/share/lintian/", "usr/share/python3/runtime.d/")
"""What debhelper adds."""
PLACES = (
    "etc/",
    "usr/lib/unlock/",
    "usr/lib/systemd/",
    "usr/lib/udev/rules.d/",
    "usr/lib/tmpfiles.d/",
    "usr/lib/kernel/install.d/",
)
BUILDERS = {"initramfs": "usr/share/initramfs-tools/", "dracut": "usr/lib/dracut/"}


@pytest.fixture(scope="module")
def debs() -> Packages:
    return packages()


def all_of(debs: Packages) -> dict[str, Path]:
    return {"core": debs.core, "initramfs": debs.initramfs, "dracut": debs.dracut}


def unpack(deb: Path, to: Path) -> dict[str, tuple[int, bytes]]:
    """Path -> its mode and what is in it."""
    subprocess.run(["dpkg-deb", "-x", deb, to], check=True)
    return read_tree(to)


def read_tree(top: Path) -> dict[str, tuple[int, bytes]]:
    found = {}
    for path in top.rglob("*"):
        if path.is_symlink():
            found[str(path.relative_to(top))] = (0, os.readlink(path).encode())
        elif path.is_file():
            found[str(path.relative_to(top))] = (stat.S_IMODE(path.stat().st_mode), path.read_bytes())
    return found


def field(deb: Path, name: str) -> str:
    return subprocess.run(["dpkg-deb", "-f", deb, name], capture_output=True, text=True, check=True).stdout.strip()


def test_together_they_are_what_make_install_installs(debs: Packages, tmp_path: Path) -> None:
    subprocess.run(["make", "--quiet", "-C", TOP, "install", f"DESTDIR={tmp_path}/make"], check=True)
    installed = read_tree(tmp_path / "make")
    packed: dict[str, tuple[int, bytes]] = {}
    for name, deb in all_of(debs).items():
        files = unpack(deb, tmp_path / name)
        assert not packed.keys() & files.keys(), "in two packages"
        packed |= files
        if name != "core":
            allowed = (BUILDERS[name], "etc/initramfs/", "usr/lib/kernel/", "usr/share/doc/", "usr/share/lintian/")
            assert all(each.startswith(allowed) for each in files), name
    packed = {each: what for each, what in packed.items() if not each.startswith(NOT_HERE)}
    gz = {each for each in packed if each.endswith(".gz")}  # man pages
    assert packed.keys() - installed.keys() - gz == ALONE
    assert {f"{each}.gz" for each in installed if "/man/" in each} == gz
    assert {each: what for each, what in packed.items() if each not in ALONE | gz} == {
        each: what for each, what in installed.items() if f"{each}.gz" not in gz
    }
    elsewhere = [
        each for each in packed if not each.startswith((*PLACES, *BUILDERS.values(), "usr/sbin/", "usr/share/"))
    ]
    assert not elsewhere


@pytest.mark.turns
def test_a_build_elsewhere_by_somebody_else_is_the_same(debs: Packages, tmp_path: Path) -> None:
    """By git's list of files, in another folder, with another umask, clock, language and order of files."""
    copy = tmp_path / "another folder"
    command = ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"]
    names = subprocess.run(command, cwd=TOP, capture_output=True, check=True).stdout.decode().split("\0")
    for name in sorted(filter(None, names), reverse=True):
        if (TOP / name).is_file() and not name.startswith("tests/"):
            (copy / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(TOP / name, copy / name)
            (copy / name).chmod((TOP / name).stat().st_mode & 0o700)
    environment = {**os.environ, "TZ": "Asia/Tokyo", "LC_ALL": "C.UTF-8"}
    subprocess.run(["git", "init", "--quiet", copy], check=True)
    script = 'umask 077; exec make --quiet -C "$1" deb'
    done = subprocess.run(["sh", "-c", script, "sh", copy], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    again = Packages(copy / "build/deb")
    for name, deb in all_of(debs).items():
        first, second = (hashlib.sha256(each.read_bytes()).hexdigest() for each in (deb, all_of(again)[name]))
        assert first == second, name


def test_lintian_has_no_error_and_no_warning(debs: Packages) -> None:
    (changes,) = debs.directory.glob("*.changes")
    command: list[str | Path] = ["lintian", "--allow-root", "--no-cfg", "--fail-on=none", changes]
    said = subprocess.run(command, capture_output=True, text=True, check=True).stdout.splitlines()
    found = [line for line in said if re.match("[EW]: ", line)]
    if "\ncompletion:" not in (TOP / "Makefile").read_text():  # nor `make man`
        found.remove("W: unlock: no-manual-page [usr/sbin/unlock]")
    if not (TOP / "initramfs/dracut").exists():
        found.remove("W: unlock-dracut: empty-binary-package")
    assert not found


def test_the_version_is_the_programs(debs: Packages) -> None:
    assert {field(deb, "Version") for deb in all_of(debs).values()} == {__version__}


def test_the_builders_exclude_each_other_and_need_this_program(debs: Packages) -> None:
    for deb, builder, other in ((debs.initramfs, "initramfs-tools", "dracut"), (debs.dracut, "dracut", "initramfs")):
        assert f"unlock (= {__version__})" in field(deb, "Depends") and builder in field(deb, "Depends")
        assert field(deb, "Conflicts") == f"unlock-{other}"
    assert f"unlock-initramfs (= {__version__}) | unlock-dracut" in field(debs.core, "Recommends")


def test_what_the_program_imports_is_a_dependency(debs: Packages) -> None:
    depends = field(debs.core, "Depends")
    wanted = {
        "tpm2_pytss": "python3-tpm2-pytss",
        "cryptography": "python3-cryptography",
        "libcryptsetup.so.12": "libcryptsetup12",
        "libudev.so.1": "libudev1",
        "libcrypto.so.3": "libssl3t64",
        "libtss2-tcti-device.so.0": "libtss2-tcti-device0t64",
    }
    manifest = (TOP / "initramfs/manifest").read_text()
    assert set(re.findall(r"^library (\S+)", manifest, re.MULTILINE)) <= wanted.keys()
    found = set(re.findall(r"^program /usr/s?bin/(\S+)", manifest, re.MULTILINE))
    assert found == {"python3", "dmsetup"}
    for package in (*wanted.values(), *found):
        assert re.search(rf"(^|, ){re.escape(package)}\b", depends), package
    outside = set()
    for path in (TOP / "unlock").rglob("*.py"):
        outside |= set(re.findall(r"^\s*(?:import|from) ([a-z0-9_]+)", path.read_text(), re.MULTILINE))
    assert outside - sys.stdlib_module_names <= {"cryptography", "tpm2_pytss"}


def test_the_oldest_libraries_are_the_same_everywhere(debs: Packages) -> None:
    project = (TOP / "pyproject.toml").read_text()
    for name, oldest in (("tpm2-pytss", "2.3"), ("cryptography", str(init.CRYPTOGRAPHY))):
        assert f"python3-{name} (>= {oldest})" in field(debs.core, "Depends")
        assert f'"{name}>={oldest}"' in project


DEBIAN_12 = {
    "cryptsetup-bin": "2:2.6.1-4~deb12u2",
    "dmsetup": "2:1.02.185-2",
    "libcryptsetup12": "2:2.6.1-4~deb12u2",
    "libssl3": "3.0.17-1~deb12u2",
    "libtss2-tcti-device0": "3.2.1-3",
    "libudev1": "252.39-1~deb12u2",
    "python3": "3.11.2-1+b1",
    "python3-cryptography": "38.0.4-3+deb12u1",
    "python3-tpm2-pytss": "1.2.0-3",
    "systemd": "252.39-1~deb12u2",
    "udev": "252.39-1~deb12u2",
    "debconf": "1.5.82",
}
"""What it has of the package's dependencies."""


@pytest.mark.parametrize(
    ("more", "lacks"),
    [
        ({}, {"python3-cryptography", "python3-tpm2-pytss"}),
        ({"python3-cryptography": "43", "python3-tpm2-pytss": "2.3"}, set()),
    ],
)
def test_apt_on_debian_12_names_what_is_too_old(
    debs: Packages, tmp_path: Path, more: dict[str, str], lacks: set[str]
) -> None:
    """With both it would install: nothing else is missing there."""
    entry = "Package: {}\nStatus: install ok installed\nArchitecture: amd64\nMulti-Arch: allowed\nVersion: {}\n"
    (tmp_path / "status").write_text("\n".join(entry.format(*each) for each in (DEBIAN_12 | more).items()))
    (tmp_path / "lists/partial").mkdir(parents=True)
    places = {"State::Status": "status", "State::Lists": "lists", "Cache": "cache", "Etc": "etc"}
    options = [f"-oDir::{name}={tmp_path / where}" for name, where in places.items()]
    command: list[str | Path] = ["apt-get", "-s", "--no-install-recommends", "-oAPT::Architecture=amd64", *options]
    command += ["install", debs.core]
    done = subprocess.run(command, capture_output=True, text=True, env={**os.environ, "LC_ALL": "C"})
    assert set(re.findall(r"Depends: (\S+) \(>= [0-9.]+\) but", done.stdout)) == lacks, done.stdout + done.stderr
    assert (done.returncode != 0) == bool(lacks), done.stdout + done.stderr


def test_maintainer_scripts_are_clean(debs: Packages, tmp_path: Path) -> None:
    """As they are installed, with what debhelper has added."""
    for name, deb in all_of(debs).items():
        subprocess.run(["dpkg-deb", "-e", deb, tmp_path / name], check=True)
    scripts = [each for each in tmp_path.glob("*/*") if each.read_bytes().startswith(b"#!")]
    assert len(scripts) == 9
    for each in scripts:
        assert each.read_text().startswith("#!/bin/sh\n") and "\nset -e\n" in each.read_text(), each
        subprocess.run(["dash", "-n", each], check=True)
    sources = [TOP / "debian" / name for name in ("ask-removal", "unlock-guard")]
    sources += [each for each in (TOP / "debian").glob("*.*") if each.suffix in (".prerm", ".postinst", ".postrm")]
    sources += [each for each in (TOP / "debian/tests").iterdir() if each.read_bytes().startswith(b"#!")]
    subprocess.run(["shellcheck", "-x", *sources], check=True, cwd=TOP)


@pytest.fixture
def tree(tmp_path: Path) -> Iterator[Path]:
    """Of the lab's image, which has the packages."""
    tree = tmp_path / "tree"
    subprocess.run(["cp", "-a", "--reflink=auto", image.build("luks").directory / "tree", tree], check=True)
    yield tree
    shutil.rmtree(tree)


@pytest.mark.vm
def test_autopkgtest_in_a_system_that_has_them(tree: Path) -> None:
    """debian/tests/smoke."""
    shutil.copy(TOP / "debian/tests/smoke", tree / "root/smoke")
    image._chroot(tree, "/root/smoke")


@pytest.mark.vm
def test_an_upgrade_makes_one_initramfs_and_is_predicted_after_it(tree: Path) -> None:
    """What is predicted is an error here, as the host's state is none."""
    (tree / "var/lib/unlock").mkdir(parents=True)
    (tree / "var/lib/unlock/state.json").write_text("{}")
    (release,) = (tree / "usr/lib/modules").iterdir()
    (tree / f"boot/vmlinuz-{release.name}").touch()  # the image has it beside its tree
    newer = packages("0.1.1")
    for deb in (newer.core, newer.initramfs):
        shutil.copy(deb, tree / "root")
    image._chroot(tree, "DEBIAN_FRONTEND=noninteractive apt-get -y install /root/*.deb >/said 2>&1")
    said = (tree / "said").read_text()
    assert said.count("update-initramfs: Generating") == 1, said
    at = said.index("update-initramfs: Generating")
    assert said.count("the recovery key opens the disks then", at) == 2, said  # update-initramfs' own hook, and dpkg's
