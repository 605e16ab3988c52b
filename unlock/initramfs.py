# SPDX-License-Identifier: Apache-2.0
"""What differs between the programs that build initramfs images, initramfs-tools and dracut.

`of_image` says which one has built the image that this process runs in, `of_host` which one builds this host's images.
Their scripts are in initramfs/, a folder for each.
"""

import os

from .light import NamedTuple

MARK = "/usr/lib/unlock/builder"
"""Exists in an image alone, with the builder's name."""
ASKPASS = "/lib/cryptsetup/askpass"
"""cryptsetup's, which Debian ships for initramfs-tools: it asks through Plymouth, systemd or the console."""


class Builder(NamedTuple):
    """One of the programs."""

    name: str
    new_root: str
    """Where its images mount the root file system."""
    asks: tuple[str, ...]
    """The command of its images that asks a person and prints the answer; the question follows."""
    listing: tuple[str, ...]
    """The command that lists the files in an image; the image follows."""
    lists_links: bool
    """That takes a name in /proc/PID/fd, and any other link."""
    rebuild_all: str
    """What a person types to make the images anew."""
    rebuild_every: str
    """The same for those of older kernels too."""
    rebuild_one: str
    """The same for one image, with its {version} and {image}."""
    package: str
    """Of Debian, which puts unlock into its images."""
    hook: str
    """What that installs, as `make install` does."""
    lists_root: bool
    """Its images have the crypttab line of each disk that the root file system needs."""

    def rebuild(self, *, version: str, image: str) -> str:
        """What a person types to make this image anew. `image`: its path below the root directory."""
        return self.rebuild_one.format(version=version, image=f"/{image.lstrip('/')}")


INITRAMFS_TOOLS = Builder(
    name="initramfs-tools",
    new_root="/root",
    asks=(ASKPASS,),
    listing=("lsinitramfs",),
    lists_links=True,
    rebuild_all="update-initramfs -u",
    rebuild_every="update-initramfs -u -k all",
    rebuild_one="update-initramfs -u -k {version}",
    package="unlock-initramfs",
    hook="usr/share/initramfs-tools/hooks/unlock",
    lists_root=True,
)
DRACUT = Builder(
    name="dracut",
    new_root="/sysroot",
    # through the agents of systemd: the console's, and Plymouth's
    asks=("/usr/bin/systemd-ask-password", "--no-tty", "--timeout=0"),
    listing=("lsinitrd",),
    lists_links=False,
    rebuild_all="dracut -f --regenerate-all",
    rebuild_every="dracut -f --regenerate-all",
    rebuild_one="dracut -f {image} {version}",
    package="unlock-dracut",
    hook="usr/lib/dracut/modules.d/90unlock/module-setup.sh",
    lists_root=False,
)


def of_image() -> Builder | None:
    """The builder of the image that this process runs in; None in the real root."""
    try:
        with open(MARK, encoding="ascii") as file:
            name = file.read(64).strip()
    except (OSError, ValueError):
        return None
    return DRACUT if name == DRACUT.name else INITRAMFS_TOOLS


def of_host(root: str = "/") -> Builder:
    """The builder of the images of the host whose root directory this is. dracut can be installed beside
    initramfs-tools without building any: what its package adds for kernels decides."""

    def exists(*names: str) -> bool:
        return any(os.path.exists(os.path.join(root, each)) for each in names)

    if exists("usr/sbin/mkinitramfs") and not exists("etc/kernel/postinst.d/dracut"):
        return INITRAMFS_TOOLS
    return DRACUT if exists("usr/bin/dracut", "usr/sbin/dracut") else INITRAMFS_TOOLS
