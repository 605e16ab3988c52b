# SPDX-License-Identifier: Apache-2.0
"""What a tree needs beside Debian, whose initramfs is made by dracut: a dracut module that does what the lab's scripts
for initramfs-tools do, before systemd starts."""

from collections.abc import Mapping

MODULE = "usr/lib/dracut/modules.d/99lab"
SETUP = """#!/bin/bash
check() { return 0; }
install() {
    # what the product's module has put there, or systemd
    mv "$initdir/init" "$initdir/init.next"
    inst_script "$moddir/init" /init
    inst_multiple base64 cat cp cut date find grep head ls mkdir mount ps rm sh sleep stty tail timeout tr wc
    inst_multiple -o cryptsetup systemd-cryptsetup keyctl
    inst_rules 61-lab.rules
    inst_script /usr/lib/lab/agent
    [ ! -e /usr/lib/lab/vtpm ] || inst_binary /usr/lib/lab/vtpm
    mkdir -p "$initdir/lab.first"
    for each in "$moddir/first/"*; do
        [ ! -e "$each" ] || inst_script "$each" "/lab.first/${each##*/}"
    done
}
"""
INIT = """#!/bin/sh
# The first program: mounts as systemd does, which leaves that as it is, and runs the lab's scripts.
PATH=/usr/sbin:/usr/bin:/sbin:/bin
export PATH
mount -t proc -o nosuid,nodev,noexec proc /proc
mount -t sysfs -o nosuid,nodev,noexec sysfs /sys
mount -t devtmpfs -o nosuid,mode=0755 devtmpfs /dev
mount -t tmpfs -o nosuid,nodev,mode=0755 tmpfs /run
for each in /lab.first/*; do
    [ ! -e "$each" ] || "$each"
done
exec /init.next "$@"
"""
CONF = """hostonly="no"
early_microcode="no"
"""
"""dracut reads all its files by their names: 50-hostonly.conf, which kernel-install adds, is to come after it."""


def files(wanted: Mapping[str, str]) -> dict[str, str]:
    """Files of the tree, for those that initramfs-tools would have in /etc/initramfs-tools: its scripts of init-top
    run before systemd. Hooks have no use here, and what init-bottom would
    stop systemd ends."""
    found = {
        f"{MODULE}/module-setup.sh": SETUP,
        f"{MODULE}/init": INIT,
        "etc/dracut.conf.d/10-lab.conf": CONF,
    }
    for path, text in wanted.items():
        folder, _, name = path.rpartition("/")
        if folder == "scripts/init-top":
            found[f"{MODULE}/first/{'0' if name == 'lab-first' else '1'}-{name}"] = text
        elif folder == "dracut.conf.d":
            found[f"etc/{path}"] = text
    return found


def command(image: str, release: str) -> str:
    """What makes the initramfs, for sh in the tree."""
    return f"dracut --quiet --force {image} {release}"
