# SPDX-License-Identifier: Apache-2.0
"""What unlock adds to an initramfs: its size, and that its python runs there with nothing else."""

import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.bench import boots
from tests.lab import image
from tests.lab.image import Builder

pytestmark = pytest.mark.vm

GROWTH_MAX = 7_000_000
"""Bytes, compressed."""


@pytest.mark.parametrize("builder", boots.BUILDERS)
def test_the_initramfs_grows_by_at_most_7_mb(builder: Builder, record_property: Callable[[str, object], None]) -> None:
    """The same tree, with unlock's part and without it, compressed by zstd."""
    size = boots.sizes(builder)
    more = f"{size.whole} bytes, {size.whole - size.without} more than without unlock"
    record_property("shown", f"initramfs of {builder}: {more}")
    assert 1_000_000 < size.whole - size.without <= GROWTH_MAX


def test_early_boots_python_runs_in_the_unpacked_initramfs(tmp_path: Path) -> None:
    """All modules that early boot may import are there, nothing heavy is loaded, and event logs can be told."""
    initrd = image.build("luks", runs="qemu").initrd
    subprocess.run(["unmkinitramfs", initrd, tmp_path], check=True)
    tree = tmp_path / "main" if (tmp_path / "main").exists() else tmp_path
    order = (tree / "scripts/local-premount/ORDER").read_text()
    assert order.index("check-resume") < order.index("local-premount/resume")
    shutil.copytree(Path(__file__).parent / "data/eventlogs", tree / "logs")
    code = (
        "import os, sys; sys.path.insert(0, '/usr/lib/unlock'); import unlock.__main__, unlock.boot.agent; "
        "import unlock.boot.prompt, unlock.measured.explain, unlock.boot.shell; "
        "from unlock import wrap; from unlock.disks import luks, udev; from unlock.tpm import chip; "
        "udev.libudev(); luks.prepare(); chip._load()\n"
        "print(*sys.modules)\n"
        "from unlock.measured import describe, eventlog\n"
        "for name in os.listdir('/logs'):\n"
        "    if name.endswith('.bin'):\n"
        "        log = eventlog.parse_event_log(open(f'/logs/{name}', 'rb').read())\n"
        "        describe.with_command_line(describe.describe_events(log.events), 'quiet')\n"
    )
    environment = {"PATH": "/usr/sbin:/usr/bin:/sbin:/bin", "CRYPTOGRAPHY_OPENSSL_NO_LEGACY": "1"}
    command = ["chroot", str(tree), "/usr/bin/python3", "-I", "-c", code]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, check=False)
    assert done.returncode == 0, done.stderr
    assert not {"argparse", "asyncio", "logging", "importlib.metadata", "kmip", "tomllib"} & set(done.stdout.split())
