# SPDX-License-Identifier: Apache-2.0
"""Which program builds the images of a host, and what it says to type."""

import subprocess
from pathlib import Path

import pytest

from unlock import initramfs


@pytest.mark.parametrize(
    ("files", "builder"),
    [
        ((), "initramfs-tools"),
        (("usr/sbin/mkinitramfs",), "initramfs-tools"),
        (("usr/bin/dracut", "etc/kernel/postinst.d/dracut"), "dracut"),
        (("usr/sbin/dracut",), "dracut"),  # where no kernel hook is its own
        (("usr/sbin/mkinitramfs", "usr/bin/dracut"), "initramfs-tools"),  # dracut-core alone
        (("usr/sbin/mkinitramfs", "usr/bin/dracut", "etc/kernel/postinst.d/dracut"), "dracut"),
    ],
)
def test_the_builder_of_a_host(files: tuple[str, ...], builder: str, tmp_path: Path) -> None:
    for each in files:
        (tmp_path / each).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / each).touch()
    assert initramfs.of_host(str(tmp_path)).name == builder


def test_what_a_person_types_to_make_an_image_anew() -> None:
    words = [
        each.rebuild(version="6.12.48", image="boot/initrd.img-6.12.48")
        for each in (initramfs.INITRAMFS_TOOLS, initramfs.DRACUT)
    ]
    assert words == ["update-initramfs -u -k 6.12.48", "dracut -f /boot/initrd.img-6.12.48 6.12.48"]


@pytest.mark.parametrize(("mark", "root"), [("dracut\n", "/sysroot"), ("initramfs-tools\n", "/root"), (None, "")])
def test_the_builder_of_an_image(mark: str | None, root: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(initramfs, "MARK", str(tmp_path / "builder"))
    if mark:
        (tmp_path / "builder").write_text(mark)
    builder = initramfs.of_image()
    assert (builder.new_root if builder else "") == root


def test_the_builders_are_installed_apart(tmp_path: Path) -> None:
    top = Path(__file__).resolve().parents[1]
    found = {}
    for part in ("core", "initramfs-tools", "dracut"):
        to = tmp_path / part
        subprocess.run(["make", "--quiet", "-C", top, f"install-{part}", f"DESTDIR={to}"], check=True)
        found[part] = {str(each.relative_to(to)) for each in to.rglob("*") if each.is_file()}
    assert not found["core"] & found["dracut"] and not found["core"] & found["initramfs-tools"]
    assert all("initramfs" in each for each in found["initramfs-tools"])
    assert "usr/lib/dracut/modules.d/90unlock/module-setup.sh" in found["dracut"]
    assert "usr/lib/unlock/functions" in found["core"]
