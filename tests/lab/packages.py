# SPDX-License-Identifier: Apache-2.0
"""The Debian packages of the checkout as it is now, built once for each content."""

import hashlib
import shutil
import subprocess
from pathlib import Path
from typing import NamedTuple

from . import cache

CHECKOUT = Path(__file__).resolve().parents[2]
SOURCES = ("Makefile", "pyproject.toml", "debian", "unlock", "initramfs", "system", "udev", "man", "completion")
"""What packages are made from."""
NEXT = """\
unlock ({}) unstable; urgency=medium

  * The next release.

 -- unlock maintainers <unlock@users.noreply.github.com>  Sun, 29 Nov 2026 13:00:00 +0000

"""


class Packages(NamedTuple):
    directory: Path

    @property
    def core(self) -> Path:
        return self._one("unlock")

    @property
    def initramfs(self) -> Path:
        """For initramfs-tools."""
        return self._one("unlock-initramfs")

    @property
    def dracut(self) -> Path:
        return self._one("unlock-dracut")

    def _one(self, name: str) -> Path:
        (found,) = self.directory.glob(f"{name}_*.deb")
        return found


def packages(version: str = "") -> Packages:
    """Of the checkout. `version`: of a release that has the same code, for upgrades."""
    digest = hashlib.sha256(version.encode())
    for path in sources():
        digest.update(f"{path.relative_to(CHECKOUT)}\0{path.stat().st_mode:o}\0".encode() + path.read_bytes() + b"\0")
    cache.prune("debs-")
    return Packages(cache.entry(f"debs-{digest.hexdigest()[:16]}", lambda work: _build(work, version)))


def sources() -> list[Path]:
    """Files of the checkout, without what was compiled."""
    found = []
    for name in SOURCES:
        top = CHECKOUT / name
        found += [top] if top.is_file() else [each for each in top.rglob("*") if each.is_file()]
    return sorted(each for each in found if each.suffix != ".pyc")


def _build(work: Path, version: str) -> None:
    with cache.scratch() as source:
        for path in sources():
            target = source / path.relative_to(CHECKOUT)
            target.parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(path, target)
        if version:
            changelog = source / "debian/changelog"
            changelog.write_text(NEXT.format(version) + changelog.read_text())
        command: list[str | Path] = ["make", "--quiet", "-C", source, "deb", f"DEBS={work}"]
        done = subprocess.run(command, capture_output=True, text=True)
        if done.returncode:
            raise RuntimeError(f"make deb:\n{done.stdout[-4000:]}\n{done.stderr[-4000:]}")
