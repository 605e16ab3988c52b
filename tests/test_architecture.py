# SPDX-License-Identifier: Apache-2.0
"""The rules of the layout: imports point one way, each outside library has one door, early boot stays light."""

import ast
import re
import subprocess
import sys
from functools import cache
from pathlib import Path

import pytest

pytestmark = pytest.mark.usefixtures("unmeasured")

PACKAGE = Path(__file__).parents[1] / "unlock"

ROOMS = ("cli", "operations", "predict", "boot", "measured", "keys", "providers", "host", "disks", "tpm")
"""The folders: each imports from those after it and from the ground, never from one before it."""

GROUND = {
    "ask",
    "der",
    "endpoint",
    "errors",
    "initramfs",
    "journald",
    "light",
    "log",
    "messages",
    "paths",
    "protect",
    "run",
    "secret",
    "strictjson",
    "wrap",
}
"""The modules that no folder has: they import from the ground alone."""

DOORS = {
    "tpm2_pytss": {"tpm.chip"},
    "cryptography": {"wrap", "keys.escrow", "providers.kmip.tls"},
    "libudev": {"disks.udev"},
    "libcrypto": {"wrap"},
    "libcryptsetup": {"disks.luks"},  # disks.reencrypt calls it too, through that
    "kmip": set(),  # PyKMIP is for the tests alone
}

HEAVY = {"argparse", "asyncio", "logging", "importlib.metadata", "kmip", "tomllib", "dataclasses", "subprocess"}


@cache
def modules() -> dict[str, Path]:
    found = {}
    for path in PACKAGE.rglob("*.py"):
        name = ".".join(path.relative_to(PACKAGE).with_suffix("").parts).removesuffix(".__init__")
        if name != "__init__":
            found[name] = path
    return found


@cache
def imports(path: Path, package: str) -> set[str]:
    """Dotted names of all imports, those inside functions too; our own without `unlock.`."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            parts = package.split(".")
            base = parts[: len(parts) - node.level + 1] if node.level else []
            module = ".".join([*base, *filter(None, [node.module])])
            found |= {f"{module}.{alias.name}" for alias in node.names} | {module}
    return found


@cache
def ours(name: str) -> set[str]:
    """The modules of unlock that this one imports."""
    path = modules()[name]
    package = f"unlock.{name}" if path.name == "__init__.py" else f"unlock.{name}".rpartition(".")[0]
    names = {each.removeprefix("unlock.") for each in imports(path, package) if each.startswith("unlock.")}
    return (names & modules().keys()) - {name}


def height(name: str) -> int:
    """What may import it: all that is higher."""
    if name == "__main__":
        return len(ROOMS) + 1
    room = name.partition(".")[0]
    return len(ROOMS) - ROOMS.index(room) if room in ROOMS else 0


def test_every_module_is_in_a_room_or_of_the_ground() -> None:
    assert {name for name in modules() if height(name) == 0} == GROUND
    assert {path.name for path in PACKAGE.iterdir() if path.is_dir()} - {"__pycache__"} == set(ROOMS)


@pytest.mark.parametrize("name", sorted(modules()))
def test_imports_point_down(name: str) -> None:
    for other in ours(name):
        assert height(other) <= height(name), f"{name} imports {other}"


@pytest.mark.parametrize("room", ["", *ROOMS])
def test_no_circle_in_a_room(room: str) -> None:
    inside = {name for name in modules() if (name.partition(".")[0] if height(name) else "") == room}
    left = {name: (ours(name) & inside) - {room} for name in inside}
    while free := {name for name, needs in left.items() if not needs & left.keys()}:
        left = {name: needs for name, needs in left.items() if name not in free}
    assert not left


@pytest.mark.parametrize("library", sorted(DOORS))
def test_an_outside_library_has_one_door(library: str) -> None:
    for name, path in modules().items():
        if name not in DOORS[library]:
            assert not any(each.split(".")[0] == library for each in imports(path, "unlock")), name
            assert f"{library}.so" not in path.read_text(), name


def test_no_other_file_names_a_function_of_libcryptsetup() -> None:
    calls = {name for name, path in modules().items() if '"crypt_' in path.read_text()}
    assert calls == {"disks.luks", "disks.reencrypt", "disks.encrypt"}


def test_early_boot_imports_nothing_heavy() -> None:
    code = "import sys; before = set(sys.modules); import unlock.__main__, unlock.boot.agent; "
    code += "print(*set(sys.modules) - before)"
    done = subprocess.run(
        [sys.executable, "-c", code + "\nfrom unlock.disks import udev; udev.libudev(); print(*sys.modules)"],
        capture_output=True,
        text=True,
        check=True,
        cwd=PACKAGE.parent,
    )
    assert not HEAVY & set(done.stdout.split())


def test_early_boot_starts_without_half_of_the_standard_library() -> None:
    """As system/unlock starts it. Each of these costs a boot some milliseconds, or brings others that do."""
    code = (
        "import sys; sys.path[:0] = sys.argv[1:]; import unlock.__main__, unlock.boot.agent, unlock.boot.activation; "
        "from unlock.disks import disk_keys, luks, udev; from unlock.tpm import chip; "
        "from unlock.host import report, report_file, this_boot; from unlock.paths import Paths; "
        "udev.libudev(); luks.prepare(); chip._load(); report_file.encode(report.Report('early-boot')); "
        "this_boot.key_sources(Paths('/nowhere')); print(*sys.modules)"
    )
    command = [sys.executable, "-IS", "-c", code, str(PACKAGE.parent), *filter(None, sys.path)]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    loaded = set(done.stdout.split())
    assert "unlock.boot.activation" in loaded
    assert not {"typing", "collections", "functools", "enum", "signal", "re", "json", "glob", "cryptography"} & loaded
    assert len(loaded) < 100


def test_nothing_that_the_tpm_does_not_need_is_loaded_before_it_works() -> None:
    code = "import unlock.__main__, unlock.boot.agent, sys; print(*sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=PACKAGE.parent)
    late = {"unlock.boot.activation", "unlock.boot.worker", "unlock.disks", "unlock.wrap", "cryptography", "_json"}
    assert not late & set(done.stdout.split())


def test_nothing_speaks_of_this_machine() -> None:
    top = PACKAGE.parent
    files = subprocess.run(["git", "ls-files", "-z"], cwd=top, capture_output=True, text=True, check=True)
    for name in filter(None, files.stdout.split("\0")):
        path = top / name
        if path.is_file():
            assert f"{top}/" not in path.read_text(errors="replace"), name


@pytest.mark.parametrize(
    "page", ["README.md", "SECURITY.md", "CONTRIBUTING.md", "docs/architecture.md", "docs/design.md"]
)
def test_the_files_that_a_page_names_are_there(page: str) -> None:
    top = PACKAGE.parent
    text = (top / page).read_text()
    named = re.findall(r"`((?:unlock|initramfs|system|udev|tests|docs|man)/[\w./@-]*[\w/])`", text)
    links = re.findall(r"\]\(([\w./-]+)\)", text)
    assert named or links
    missing = [each for each in named if not (top / each).exists()]
    missing += [each for each in links if not (top / page).parent.joinpath(each).exists()]
    assert not missing


def test_the_controls_of_attacks_change_code_that_is_there() -> None:
    """Each removes a defence by its text in a virtual machine. A text that is gone, or a syntax error, shows here."""
    from tests import test_boot_attacks, test_boot_memory, test_boot_silence, test_boot_unmeasured

    installed = {
        "usr/lib/unlock/unlock/": "unlock/",
        "usr/lib/unlock/cap": "initramfs/cap",
        "usr/lib/unlock/functions": "initramfs/functions",
    }
    changes = [
        *test_boot_attacks.BELIEVES,
        *test_boot_attacks.EVERY_KEY,
        *test_boot_attacks.NO_CAP,
        test_boot_attacks.CAP_SCRIPT,
        *test_boot_unmeasured.BLIND,
        *test_boot_silence.UNTOLD,
        *test_boot_memory.KEPT,
    ]
    for path, old, new in changes:
        start = next(each for each in installed if path.startswith(each))
        source = PACKAGE.parent / path.replace(start, installed[start])
        assert source.read_text().count(old) == 1, f"{source} has not exactly one {old!r}"
        changed = source.read_text().replace(old, new)
        if source.suffix == ".py":
            ast.parse(changed, path)
        else:
            subprocess.run(["sh", "-n"], input=changed, text=True, check=True)
