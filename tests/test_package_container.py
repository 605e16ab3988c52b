# SPDX-License-Identifier: Apache-2.0
"""The packages' system, under a real systemd in a container: it is installed and never initialised, removed, installed
again, purged. What a service with RequiresMountsFor= does after each. tests/test_boot_package.py has whole boots."""

import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import pytest

from tests.lab import image
from tests.lab.image import Builder
from tests.lab.packages import packages
from tests.test_boot_package import MADE, SERVICE

pytestmark = pytest.mark.vm

REPORT = """\
[Unit]
After=multi-user.target
[Service]
Type=oneshot
ExecStart=/bin/sh -c 'systemctl list-units --plain --no-legend --full >/report'
ExecStart=systemctl poweroff --no-block
[Install]
WantedBy=graphical.target
"""
GROUP = '[group.data]\nmount = "/srv/data"\ndeadline = 1\n'


class Boot(NamedTuple):
    units: dict[str, str]
    """Name -> state, of what is active or has failed."""
    ran: bool
    """The service wrote into the directory."""


class Container:
    def __init__(self, tree: Path, builder: Builder) -> None:
        self.tree, self.package = tree, f"unlock-{MADE[builder].deb}"
        for name, text in (("app", SERVICE), ("report", REPORT)):
            (tree / f"etc/systemd/system/{name}.service").write_text(text)
        self.sh("systemctl --quiet enable app report; systemctl --quiet mask lab-agent; mkdir -p /srv/data")
        for name in ("fstab", "crypttab"):
            (tree / "etc" / name).write_text("")
        if builder == "initramfs-tools":
            (tree / "etc/initramfs-tools/update-initramfs.conf").write_text("update_initramfs=no\n")

    def sh(self, command: str) -> None:
        image._chroot(self.tree, command)

    def remove(self, how: str, words: str) -> None:
        """No initramfs is made."""
        set_words = f"echo 'unlock unlock/remove string {words}' | debconf-set-selections"
        self.sh(f"{set_words}; INITRD=No DEBIAN_FRONTEND=noninteractive apt-get -y {how} unlock {self.package}")

    def boot(self) -> Boot:
        (self.tree / "report").unlink(missing_ok=True)
        ran = self.tree / "srv/data/ran"
        ran.unlink(missing_ok=True)
        command = ["systemd-nspawn", "--quiet", "--register=no", "--keep-unit", "--boot", f"--directory={self.tree}"]
        subprocess.run(command, stdin=subprocess.DEVNULL, capture_output=True, timeout=200)
        lines = [line.split() for line in (self.tree / "report").read_text().splitlines()]
        units = {line[0]: line[2] for line in lines if line[2] in ("active", "failed")}
        return Boot(
            {name: state for name, state in units.items() if not name.endswith((".device", ".scope"))}, ran.exists()
        )


@pytest.fixture(params=MADE)
def container(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Container]:
    tree = tmp_path / "tree"
    built = image.build("luks", builder=request.param).directory / "tree"
    subprocess.run(["cp", "-a", "--reflink=auto", built, tree], check=True)
    yield Container(tree, request.param)
    shutil.rmtree(tree)


def test_from_the_installation_to_the_purge(container: Container) -> None:
    installed = container.boot()
    assert installed.ran and installed.units["app.service"] == "active"
    ours = {name for name in installed.units if "unlock" in name}
    assert ours == {"unlock-predict.service", "unlock-sync.timer"}

    settings = container.tree / "etc/unlock/unlock.toml"
    settings.parent.mkdir()
    settings.write_text(GROUP)
    container.remove("remove", "data")
    removed = container.boot()
    assert not removed.ran and "app.service" not in removed.units
    assert removed.units["srv-data.mount"] == "failed"
    assert removed.units.keys() == installed.units.keys() - ours - {"app.service"} | {"srv-data.mount"}

    debs = packages()
    image.install(container.tree, debs.core, debs.dracut if "dracut" in container.package else debs.initramfs)
    again = container.boot()
    assert not again.ran and again.units["unlock-group@data.service"] == "failed"
    assert "srv-data.mount" not in again.units, "its gate has failed, so it was not tried"

    container.remove("purge", "data")
    purged = container.boot()
    assert purged.ran
    assert purged.units == {name: state for name, state in installed.units.items() if name not in ours}
