# SPDX-License-Identifier: Apache-2.0
"""A file that cannot be written: the command says which, and which file system is at fault. Real file systems."""

import ctypes
import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

import unlock.__main__
from tests.killing import child
from unlock import cli
from unlock.keys import recovery_key
from unlock.paths import write_atomically
from unlock.providers import native
from unlock.secret import Secret

CLONE_NEWNS = 0x20000


def write_backup(path: str) -> None:
    with native.Native(Secret.random(32), "ab" * 16) as provider, Secret(b"word") as password:
        native.write_backup(path, provider, password)


def write_file(path: str) -> None:
    write_atomically(path, b"new")


def write_key(path: str) -> None:
    with recovery_key.new() as key:
        recovery_key.write_new_file(path, key)


WRITERS = {"state.json": write_file, "backup": write_backup, "key": write_key}


@pytest.fixture
def typed(monkeypatch: pytest.MonkeyPatch) -> Callable[[Callable[[], object]], int]:
    """The exit status of a command that does this."""

    def run(work: Callable[[], object]) -> int:
        def command(argv: list[str]) -> int:
            work()
            return 0

        monkeypatch.setattr(cli, "cli", command)
        monkeypatch.setattr(sys, "argv", ["unlock", "status", "--json"])
        return unlock.__main__.main()

    return run


@pytest.mark.root
@pytest.mark.parametrize("name", WRITERS)
@pytest.mark.parametrize(("fault", "words"), [("full", "is full, or over quota"), ("read-only", "is read-only")])
def test_a_full_or_read_only_file_system_is_named_and_nothing_is_left_over(
    tmp_path: Path,
    capfd: pytest.CaptureFixture[str],
    typed: Callable[[Callable[[], object]], int],
    name: str,
    fault: str,
    words: str,
) -> None:
    path = tmp_path / "sub" / name

    def work() -> None:
        assert ctypes.CDLL(None).unshare(CLONE_NEWNS) == 0
        for command in (["--make-rprivate", "/"], ["-t", "tmpfs", "-o", "size=64k", "none", str(tmp_path)]):
            subprocess.run(["mount", *command], check=True)
        path.parent.mkdir()
        if fault == "full":
            with open(tmp_path / "rest", "wb", buffering=0) as rest:
                try:
                    while rest.write(bytes(4096)):
                        pass
                except OSError:
                    pass
        else:
            subprocess.run(["mount", "-o", "remount,ro", str(tmp_path)], check=True)
        assert typed(lambda: WRITERS[name](str(path))) == 1
        assert os.listdir(path.parent) == []

    assert child(work) == 0
    out, err = capfd.readouterr()
    assert f"{path}" in err and f"cannot be written: the file system {tmp_path} {words}" in err
    assert f"hint: {'df' if fault == 'full' else 'findmnt'} {tmp_path}" in err
    assert words in json.loads(out)["error"]["message"]


def test_any_other_error_of_the_system_names_the_path(
    tmp_path: Path, capfd: pytest.CaptureFixture[str], typed: Callable[[Callable[[], object]], int]
) -> None:
    (tmp_path / "file").touch()
    path = tmp_path / "file" / "state.json"
    assert typed(lambda: write_atomically(str(path), b"")) == 1
    out, err = capfd.readouterr()
    assert str(tmp_path / "file") in err
    assert json.loads(out)["error"]["status"] == 1
