# SPDX-License-Identifier: Apache-2.0
"""The rules of the layout: imports point one way, each outside library has one door, early boot stays light."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.usefixtures("unmeasured")

PACKAGE = Path(__file__).parents[1] / "unlock"

ROWS = [
    {"errors", "secret", "paths", "run", "log", "protect", "ask", "groups", "clock", "endpoint"}
    | {"light", "strictjson"},
    {"config", "token", "recoverykey", "policy", "report", "units", "tables", "plot", "eventlog", "uefi", "pe", "grub"}
    | {"providers.ttlv"},
    {"measured", "predict"},
    {"tpm", "wrap", "escrow", "devices", "luks", "keyring", "mount", "providers.tls"},
    {"slots", "state", "disk", "thisboot", "worker", "handout", "bootcopy"}
    | {"providers", "providers.native", "providers.kmip"},
    {"opening", "present", "selfhosted", "atunseal", "booted", "images"},
    {"provide", "sdboot", "nextboot", "handover"},
    {"rotation", "allowed", "nextgrub", "nextuki", "nextkernel"},
    {"boot", "late", "recovery", "enroll", "members", "status", "explain"}
    | {"cache", "kdk", "keymanager", "persistence", "recoveryops", "rekey", "switch", "sync"}
    | {"window", "rebind"},
    {"foresee"},
    {"check"},
    {"cli", "clikeys", "clipolicy", "clipredict", "clirecovery", "shell", "__main__"},
]
"""Lowest first: a module imports from lower rows only; in the lowest row and at the top, from its own too."""

DOORS = {
    "tpm2_pytss": {"tpm"},
    "cryptography": {"wrap", "escrow"},
    "libudev": {"devices"},
    "libcrypto": {"wrap"},
    "libcryptsetup": {"luks"},
    "kmip": {"providers.kmip"},
}

HEAVY = {"argparse", "asyncio", "logging", "importlib.metadata", "kmip", "tomllib", "dataclasses", "subprocess"}


def modules() -> dict[str, Path]:
    found = {}
    for path in PACKAGE.rglob("*.py"):
        name = ".".join(path.relative_to(PACKAGE).with_suffix("").parts).removesuffix(".__init__")
        if name != "__init__":
            found[name] = path
    return found


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


def ours(path: Path, name: str) -> set[str]:
    package = "unlock.providers" if name.startswith("providers") else "unlock"
    names = {each.removeprefix("unlock.") for each in imports(path, package) if each.startswith("unlock.")}
    return names & modules().keys()


def row(name: str) -> int:
    return next(i for i, names in enumerate(ROWS) if name in names)


def test_every_module_has_its_row() -> None:
    assert set().union(*ROWS) == modules().keys()


@pytest.mark.parametrize("name", sorted(modules()))
def test_imports_point_down(name: str) -> None:
    here = row(name)
    for other in ours(modules()[name], name):
        allowed = row(other) < here or (row(other) == here and here in (0, len(ROWS) - 1)) or other == "providers"
        assert allowed, f"{name} imports {other}"


@pytest.mark.parametrize("library", sorted(DOORS))
def test_an_outside_library_has_one_door(library: str) -> None:
    for name, path in modules().items():
        if name not in DOORS[library]:
            assert not any(each.split(".")[0] == library for each in imports(path, "unlock")), name
            assert f"{library}.so" not in path.read_text(), name


def test_early_boot_imports_nothing_heavy() -> None:
    code = (
        "import sys; before = set(sys.modules); import unlock.__main__, unlock.boot; print(*set(sys.modules) - before)"
    )
    done = subprocess.run(
        [sys.executable, "-c", code + "\nimport unlock.devices; unlock.devices._udev(); print(*sys.modules)"],
        capture_output=True,
        text=True,
        check=True,
        cwd=PACKAGE.parent,
    )
    assert not HEAVY & set(done.stdout.split())


def test_early_boot_starts_without_half_of_the_standard_library() -> None:
    """As bin/unlock starts it. Each of these costs a boot some milliseconds, or brings others that do."""
    code = (
        "import sys; sys.path[:0] = sys.argv[1:]; import unlock.__main__, unlock.boot, unlock.opening, unlock.disk; "
        "from unlock import devices, luks, tpm; devices._udev(); luks.prepare(); tpm._load(); print(*sys.modules)"
    )
    command = [sys.executable, "-IS", "-c", code, str(PACKAGE.parent), *filter(None, sys.path)]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    loaded = set(done.stdout.split())
    assert "unlock.opening" in loaded
    assert not {"typing", "collections", "functools", "enum", "signal", "re", "json", "glob", "cryptography"} & loaded
    assert len(loaded) < 100


def test_nothing_that_the_tpm_does_not_need_is_loaded_before_it_works() -> None:
    code = "import unlock.__main__, unlock.boot, sys; print(*sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=PACKAGE.parent)
    late = {"unlock.opening", "unlock.disk", "unlock.luks", "unlock.devices", "unlock.wrap", "cryptography", "_json"}
    assert not late & set(done.stdout.split())


def test_nothing_speaks_of_this_machine() -> None:
    top = PACKAGE.parent
    files = subprocess.run(["git", "ls-files", "-z"], cwd=top, capture_output=True, text=True, check=True)
    for name in filter(None, files.stdout.split("\0")):
        path = top / name
        if path.is_file():
            assert f"{top}/" not in path.read_text(errors="replace"), name
