# SPDX-License-Identifier: Apache-2.0
"""Block devices: directory trees in place of /proc and /sys, and a real udevd in namespaces of its own."""

import json
import os
import shutil
import stat
import subprocess
import sys
import textwrap
from collections.abc import Iterator
from pathlib import Path

import pytest

from unlock.disks import devices, udev
from unlock.errors import CommandFailed, DiskFailed

pytestmark = pytest.mark.root

REPOSITORY = Path(devices.__file__).parents[2]


class Machine:
    """A /proc, /sys and /dev below a folder."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.root = str(folder)
        self.mounts: list[str] = []
        self.folders: dict[str, Path] = {}
        for each in ("proc/self", "sys/dev/block", "sys/devices", "sys/fs/btrfs", "dev/mapper", "run/udev"):
            (folder / each).mkdir(parents=True)
        self.swap()
        self.mount("0:21", "/proc", "proc", "proc")

    def block(self, name: str, number: str, parent: str = "", below: tuple[str, ...] = (), size: int = 2048) -> Path:
        """A block device; `below` are the names of what it is made of."""
        folder = self.folders[name] = self.folder / "sys/devices" / parent / name
        (folder / "slaves").mkdir(parents=True)
        (folder / "holders").mkdir()
        (folder / "dev").write_text(number + "\n")
        (folder / "ro").write_text("0\n")
        (folder / "size").write_text(f"{size}\n")
        if parent:
            (folder / "partition").write_text("1\n")
        (self.folder / "sys/dev/block" / number).symlink_to(os.path.relpath(folder, self.folder / "sys/dev/block"))
        for each in below:
            lower = self.folders[each]
            (folder / "slaves" / each).symlink_to(os.path.relpath(lower, folder / "slaves"))
            (lower / "holders" / name).symlink_to(os.path.relpath(folder, lower / "holders"))
        self.node(f"dev/{name}", number)
        return folder

    def disk(self, name: str, number: str, parent: str = "", **attributes: str) -> None:
        """A SCSI disk; `parent` is what it is connected to."""
        folder = self.block(name, number)
        if parent:
            moved = self.folder / "sys/devices" / parent / name
            moved.parent.mkdir(parents=True, exist_ok=True)
            link = self.folder / "sys/dev/block" / number
            link.unlink()
            link.symlink_to(os.path.relpath(folder.rename(moved), link.parent))
            self.folders[name] = folder = moved
        (folder / "device").mkdir()
        for attribute, value in attributes.items():
            (folder / "device" / attribute).write_text(f"{value}\n")

    def mapping(self, name: str, number: str, uuid: str, *below: str) -> None:
        """A device-mapper device; its sysfs name is dm-MINOR."""
        folder = self.block(f"dm-{number.split(':')[1]}", number, below=below)
        (folder / "dm").mkdir()
        (folder / "dm/name").write_text(name + "\n")
        (folder / "dm/uuid").write_text(uuid + "\n")
        self.node(f"dev/mapper/{name}", number)

    def node(self, path: str, number: str) -> None:
        major, minor = map(int, number.split(":"))
        os.mknod(self.folder / path, stat.S_IFBLK | 0o600, os.makedev(major, minor))

    def btrfs(self, uuid: str, *names: str) -> None:
        folder = self.folder / "sys/fs/btrfs" / uuid / "devices"
        folder.mkdir(parents=True)
        for each in names:
            (folder / each).symlink_to(os.path.relpath(self.folders[each], folder))

    def mount(self, number: str, where: str, source: str, kind: str = "ext4") -> None:
        self.mounts.append(f"27 1 {number} / {where} rw,relatime shared:1 - {kind} {source} rw\n")
        (self.folder / "proc/self/mountinfo").write_text("".join(self.mounts))

    def swap(self, *nodes: str) -> None:
        lines = [f"{each} partition 8388604 0 -2\n" for each in nodes]
        (self.folder / "proc/swaps").write_text("Filename Type Size Used Priority\n" + "".join(lines))


@pytest.fixture
def machine(tmp_path: Path) -> Machine:
    made = Machine(tmp_path)
    made.block("sda", "8:0")
    made.block("sda1", "8:1", parent="sda")
    made.block("sda2", "8:2", parent="sda")
    made.block("sdb", "8:16")
    return made


LUKS = "CRYPT-LUKS2-12345678123412341234123456789abc-"


# What a mounted file system stands on


def test_a_root_on_our_mapping_is_opened_by_us(machine: Machine) -> None:
    machine.mapping("root-a", "254:0", LUKS + "root-a", "sda2")
    machine.mount("254:0", "/root", "/dev/mapper/root-a")
    assert devices.devices_of_mount("/root", machine.root) == ["254:0"]
    assert devices.lies_on_mappings("/root", {"root-a"}, machine.root)
    assert not devices.lies_on_mappings("/root", {"data-a"}, machine.root)
    assert not devices.lies_on_mappings("/root", set(), machine.root)


def test_a_plain_root_is_not(machine: Machine) -> None:
    machine.mount("8:2", "/root", "/dev/sda2")
    assert not devices.lies_on_mappings("/root", {"sda2", "sda", ""}, machine.root)


def test_lvm_on_our_mapping_counts_and_lvm_over_one_foreign_disk_does_not(machine: Machine) -> None:
    machine.mapping("root-a", "254:0", LUKS + "root-a", "sda2")
    machine.mapping("vg-root", "254:1", "LVM-abc", "dm-0")
    machine.mount("254:1", "/root", "/dev/mapper/vg-root")
    assert devices.lies_on_mappings("/root", {"root-a"}, machine.root)
    assert not devices.lies_on_mappings("/root", {"vg-root"}, machine.root), "a name alone opens nothing"
    assert devices.mappings_below("/root", machine.root) == {"vg-root", "root-a"}
    machine.mapping("vg-mixed", "254:2", "LVM-def", "dm-0", "sdb")
    machine.mount("254:2", "/root", "/dev/mapper/vg-mixed")
    assert not devices.lies_on_mappings("/root", {"root-a"}, machine.root), (
        "the last mount counts, and half of it is plain"
    )


def test_what_lvm_puts_in_the_place_of_an_absent_disk_is_nobodys(machine: Machine) -> None:
    machine.mapping("root-a", "254:0", LUKS + "root-a", "sda2")
    machine.mapping("vg-root_rimage_1-missing_0_0", "254:1", "LVM-abc-missing_0_0")
    machine.mapping("vg-root", "254:2", "LVM-abc", "dm-0", "dm-1")
    machine.mount("254:2", "/root", "/dev/mapper/vg-root")
    assert devices.lies_on_mappings("/root", {"root-a"}, machine.root)
    machine.mapping("vg-other_rimage_1-missing_0_0", "254:3", "LVM-abc-missing_0_0", "sdb")
    machine.mapping("vg-other", "254:4", "LVM-abc", "dm-0", "dm-3")
    machine.mapping("vg-none", "254:5", "LVM-abc")
    for number in ("254:4", "254:5"):
        machine.mount(number, "/root", "/dev/mapper/vg-other")
        assert not devices.lies_on_mappings("/root", {"root-a"}, machine.root)


def test_raid_below_and_above_our_mappings(machine: Machine) -> None:
    machine.block("md0", "9:0", below=("sda2", "sdb"))
    machine.mapping("root-a", "254:0", LUKS + "root-a", "md0")
    machine.mapping("one", "254:1", LUKS + "one", "sda1")
    machine.block("md1", "9:1", below=("dm-0", "dm-1"))
    machine.block("md1p1", "259:0", parent="md1")
    machine.mount("254:0", "/root", "/dev/mapper/root-a")
    machine.mount("259:0", "/data", "/dev/md1p1")
    assert devices.lies_on_mappings("/root", {"root-a"}, machine.root)
    assert devices.lies_on_mappings("/data", {"root-a", "one"}, machine.root)
    assert not devices.lies_on_mappings("/data", {"root-a"}, machine.root)


def test_btrfs_counts_when_every_device_of_it_does(machine: Machine) -> None:
    machine.mapping("a", "254:0", LUKS + "a", "sda2")
    machine.mapping("b", "254:1", LUKS + "b", "sdb")
    machine.btrfs("11111111-2222-3333-4444-555555555555", "dm-0", "dm-1")
    machine.mount("0:45", "/root", "/dev/mapper/a", "btrfs")
    assert devices.devices_of_mount("/root", machine.root) == ["254:0", "254:1"]
    assert devices.lies_on_mappings("/root", {"a", "b"}, machine.root)
    assert not devices.lies_on_mappings("/root", {"a"}, machine.root)


def test_btrfs_half_on_a_plain_disk_does_not_count(machine: Machine) -> None:
    machine.mapping("a", "254:0", LUKS + "a", "sda2")
    machine.btrfs("11111111-2222-3333-4444-555555555555", "dm-0", "sdb")
    machine.mount("0:45", "/root", "/dev/mapper/a", "btrfs")
    assert not devices.lies_on_mappings("/root", {"a"}, machine.root)


def test_dm_verity_counts_by_itself(machine: Machine) -> None:
    machine.mapping("usr", "254:0", "CRYPT-VERITY-abc-usr", "sda1", "sda2")
    machine.mount("254:0", "/root", "/dev/mapper/usr")
    assert devices.lies_on_mappings("/root", set(), machine.root)


def test_other_kinds_of_mapping_do_not_count_whatever_their_name(machine: Machine) -> None:
    machine.mapping("a", "254:0", "CRYPT-PLAIN-a", "sda2")
    machine.mapping("z", "254:1", "", "sdb")
    machine.mapping("zero", "254:2", LUKS[:5])
    for number in ("254:0", "254:1", "254:2"):
        machine.mount(number, "/root", "/dev/mapper/a")
        assert not devices.lies_on_mappings("/root", {"a", "z", "zero"}, machine.root)


@pytest.mark.parametrize(("kind", "source"), [("tmpfs", "tmpfs"), ("overlay", "overlay"), ("nfs4", "host:/x"),
                                              ("btrfs", "/dev/absent"), ("zfs", "rpool/root")])  # fmt: skip
def test_what_lies_on_no_block_device_is_not_authenticated(machine: Machine, kind: str, source: str) -> None:
    machine.mount("0:50", "/root", source, kind)
    assert devices.devices_of_mount("/root", machine.root) == []
    assert not devices.lies_on_mappings("/root", {"a", ""}, machine.root)


def test_nothing_mounted_is_not_authenticated(machine: Machine) -> None:
    assert not devices.lies_on_mappings("/root", {"a"}, machine.root)


def test_mountpoints_with_spaces_are_found(machine: Machine) -> None:
    machine.mapping("a", "254:0", LUKS + "a", "sda2")
    machine.mount("254:0", "/mnt/two\\040words\\134", "/dev/mapper/a")
    assert devices.lies_on_mappings("/mnt/two words\\", {"a"}, machine.root)


def test_where_a_group_is_mounted_is_what_one_sees(machine: Machine) -> None:
    machine.block("sdc", "8:32")
    machine.mapping("a", "254:0", LUKS + "a", "sda2")
    machine.mapping("b", "254:1", LUKS + "b", "sdb")
    machine.mapping("c", "254:2", LUKS + "c", "sdc")
    machine.mapping("vg-a", "254:3", "LVM-a", "dm-0")
    machine.btrfs("11111111-2222-3333-4444-555555555555", "dm-1", "dm-2")
    machine.mount("254:3", "/srv/data", "/dev/mapper/vg-a")
    machine.mount("254:3", "/mnt/data", "/dev/mapper/vg-a")
    machine.mount("254:3", "/mnt/below", "/dev/mapper/vg-a")
    machine.mount("0:50", "/mnt/below", "tmpfs", "tmpfs")
    machine.mount("0:45", "/srv/pool", "/dev/mapper/b", "btrfs")
    assert devices.mount_points_on({"a"}, machine.root) == ["/srv/data", "/mnt/data"]
    assert devices.mount_points_on({"c"}, machine.root) == ["/srv/pool"]
    assert devices.mount_points_on(set(), machine.root) == []


def test_a_loop_among_slaves_ends(machine: Machine) -> None:
    machine.mapping("a", "254:0", "LVM-a", "sda2")
    machine.mapping("b", "254:1", "LVM-b", "dm-0")
    (machine.folder / "sys/devices/dm-0/slaves/dm-1").symlink_to("../../dm-1")
    (machine.folder / "sys/devices/dm-0/slaves/sda2").unlink()
    machine.mount("254:1", "/root", "/dev/mapper/b")
    assert not devices.lies_on_mappings("/root", {"x"}, machine.root)
    assert devices.mappings_below("/root", machine.root) == {"a", "b"}


def test_this_hosts_own_tables_can_be_read() -> None:
    assert not devices.lies_on_mappings("/", {"unlock-test-absent"})


def test_active_mappings_are_listed_with_their_luks_uuid(machine: Machine) -> None:
    machine.mapping("root-a", "254:0", LUKS + "root-a", "sda2")
    machine.mapping("vg-root", "254:1", "LVM-abc", "dm-0")
    (machine.folder / "sys/block").mkdir()
    for each in ("sda", "dm-0", "dm-1"):
        (machine.folder / "sys/block" / each).symlink_to(f"../devices/{each}")
    assert devices.active_mappings(machine.root) == {"root-a": "12345678-1234-1234-1234-123456789abc", "vg-root": ""}
    assert devices.active_mapping_name("12345678-1234-1234-1234-123456789abc", machine.root) == "root-a"
    assert devices.active_mapping_name("00000000-0000-0000-0000-000000000000", machine.root) == ""


# One disk in several devices


def distinct(machine: Machine, *found: devices.Found) -> list[str]:
    nodes = [each.node for each in devices.distinct_disks(found, machine.root)]
    assert nodes == [each.node for each in devices.distinct_disks(found[::-1], machine.root)]
    return nodes


def found(name: str, number: str, serial: str = "", size: int = 1 << 20) -> devices.Found:
    return devices.Found(f"/dev/{name}", serial, number, size)


def test_two_paths_to_one_disk_are_one(machine: Machine) -> None:
    for name, number in (("sdc", "8:32"), ("sdd", "8:48")):
        machine.disk(name, number, wwid="naa.5000c500a1b2c3d4")
        machine.block(f"{name}2", f"{number}2", parent=name)
    assert distinct(machine, found("sdc", "8:32", "S1"), found("sdd", "8:48", "S1")) == ["/dev/sdc"]
    assert distinct(machine, found("sdc2", "8:322", "S1"), found("sdd2", "8:482", "S1")) == ["/dev/sdc2"]


def test_two_paths_to_one_namespace_are_one(machine: Machine) -> None:
    """Its own name: without a multipath head each controller has a block device."""
    for name, number in (("nvme0n1", "259:0"), ("nvme1n1", "259:1")):
        machine.block(name, number).joinpath("wwid").write_text("eui.0025385b71b0a1c2\n")
    assert distinct(machine, found("nvme0n1", "259:0", "S1"), found("nvme1n1", "259:1", "S1")) == ["/dev/nvme0n1"]


def test_without_a_wwid_two_paths_have_one_serial_number_and_model(machine: Machine) -> None:
    """QEMU's SCSI disks have none."""
    for name, number in (("sdc", "8:32"), ("sdd", "8:48")):
        machine.disk(name, number, model="QEMU HARDDISK")
    assert distinct(machine, found("sdc", "8:32", "S1"), found("sdd", "8:48", "S1")) == ["/dev/sdc"]


@pytest.mark.parametrize(
    ("one", "other"),
    [
        ({"wwid": "naa.5000c500a1b2c3d4"}, {"wwid": "naa.5000c500a1b2c3d5"}),
        ({"wwid": "naa.5000c500a1b2c3d4"}, {}),
        ({"model": "A"}, {"model": "B"}),
        ({"vendor": "A"}, {"vendor": "B"}),
        ({"parent": "pci0000:00/usb2/2-1"}, {"parent": "pci0000:00/usb2/2-1"}),
        (
            {"parent": "pci0000:00/usb2/2-1", "wwid": "naa.3000000000000001"},
            {"parent": "pci0000:00/usb2/2-1", "wwid": "naa.3000000000000001"},
        ),
    ],
)
def test_disks_that_share_a_serial_number_are_two(machine: Machine, one: dict[str, str], other: dict[str, str]) -> None:
    """A bridge for two disks gives both its own."""
    machine.disk("sdc", "8:32", **one)
    machine.disk("sdd", "8:48", **other)
    assert len(distinct(machine, found("sdc", "8:32", "S1"), found("sdd", "8:48", "S1"))) == 2


@pytest.mark.parametrize("wwids", [("eui.0025385b71b0a1c2", "eui.0025385b71b0a1c3"), ("", "")])
def test_namespaces_of_one_controller_are_two(machine: Machine, wwids: tuple[str, str]) -> None:
    """They have the controller's serial number."""
    for name, number, wwid in zip(("nvme0n1", "nvme0n2"), ("259:0", "259:1"), wwids, strict=True):
        folder = machine.block(name, number)
        if wwid:
            (folder / "wwid").write_text(f"{wwid}\n")
    assert len(distinct(machine, found("nvme0n1", "259:0", "S1"), found("nvme0n2", "259:1", "S1"))) == 2


def test_copies_are_not_one_disk(machine: Machine) -> None:
    """Without a serial number, with another one, of another size, in another partition of the same disk."""
    (machine.folders["sda2"] / "partition").write_text("2\n")
    for one, other in (
        (found("sda", "8:0"), found("sdb", "8:16")),
        (found("sda", "8:0", "S1"), found("sdb", "8:16", "S2")),
        (found("sda", "8:0", "S1"), found("sdb", "8:16", "S1", 2 << 20)),
        (found("sda1", "8:1", "S1"), found("sda2", "8:2", "S1")),
        (found("sda", "8:0"), found("sda1", "8:1")),
    ):
        assert distinct(machine, one, other) == sorted([one.node, other.node])


def test_a_multipath_map_is_taken_and_its_paths_are_not(machine: Machine) -> None:
    machine.mapping("mpatha", "254:0", "mpath-36001", "sda", "sdb")
    paths = found("sda", "8:0", "S1"), found("sdb", "8:16", "S1")
    assert distinct(machine, found("dm-0", "254:0"), *paths) == ["/dev/dm-0"]


LVM = "LVM-" + "v" * 32


def test_an_lvm_volume_is_told_from_its_snapshots(machine: Machine) -> None:
    machine.mapping("vg-data-real", "254:1", f"{LVM}one-real", "sdb")
    machine.mapping("vg-snap-cow", "254:2", f"{LVM}two-cow", "sdb")
    machine.mapping("vg-more-cow", "254:3", f"{LVM}six-cow", "sdb")
    machine.mapping("vg-snap", "254:4", f"{LVM}two", "dm-1", "dm-2")
    machine.mapping("vg-data", "254:5", f"{LVM}one", "dm-1")
    machine.mapping("vg-more", "254:6", f"{LVM}six", "dm-1", "dm-3")
    volumes = [found(f"dm-{minor}", f"254:{minor}") for minor in (4, 5, 6)]
    assert distinct(machine, *volumes) == ["/dev/dm-5"]
    machine.mapping("vg-copy", "254:7", f"{LVM}ten", "sdb")
    assert distinct(machine, *volumes, found("dm-7", "254:7")) == ["/dev/dm-5", "/dev/dm-7"], "a copy is no snapshot"


def test_two_volumes_on_one_disk_are_two(machine: Machine) -> None:
    """One of them lies on a disk more: it is a copy all the same."""
    machine.mapping("vg-data", "254:1", f"{LVM}one", "sdb")
    machine.mapping("vg-copy", "254:2", f"{LVM}two", "sdb", "sda")
    assert distinct(machine, found("dm-1", "254:1"), found("dm-2", "254:2")) == ["/dev/dm-1", "/dev/dm-2"]


# What a device is used for


def test_an_unused_disk_may_be_taken(machine: Machine) -> None:
    assert devices.describe_use("/dev/sdb", machine.root) == ""


def test_a_disk_is_in_use_when_one_of_its_partitions_is(machine: Machine) -> None:
    machine.mount("8:2", "/srv/data", "/dev/sda2")
    assert devices.describe_use("/dev/sda", machine.root) == "sda2 is mounted on /srv/data"
    assert devices.describe_use("/dev/sda2", machine.root) == "sda2 is mounted on /srv/data"
    assert devices.describe_use("/dev/sda1", machine.root) == ""


def test_members_of_mappings_and_raid_are_in_use(machine: Machine) -> None:
    machine.mapping("data-a", "254:0", LUKS + "data-a", "sdb")
    machine.block("md0", "9:0", below=("sda1",))
    assert devices.describe_use("/dev/sdb", machine.root) == "sdb is part of /dev/mapper/data-a"
    assert devices.describe_use("/dev/sda", machine.root) == "sda1 is part of /dev/md0"
    assert devices.describe_use("/dev/mapper/data-a", machine.root) == ""


def test_swap_and_a_second_btrfs_device_are_in_use(machine: Machine) -> None:
    machine.swap("/dev/sda1")
    machine.btrfs("11111111-2222-3333-4444-555555555555", "sdb")
    assert devices.describe_use("/dev/sda", machine.root) == "sda1 is swap"
    assert "is part of the mounted btrfs 11111111" in devices.describe_use("/dev/sdb", machine.root)


def test_read_only_disks_and_empty_drives_are_refused(machine: Machine) -> None:
    (machine.folder / "sys/devices/sdb/ro").write_text("1\n")
    assert devices.describe_use("/dev/sdb", machine.root) == "it is read-only"
    machine.block("sr0", "11:0", size=0)
    assert devices.describe_use("/dev/sr0", machine.root) == "it has no medium"


def test_what_is_no_block_device_is_a_failed_disk(machine: Machine) -> None:
    for node in ("/dev/absent", "/dev"):
        with pytest.raises(DiskFailed, match=node):
            devices.describe_use(node, machine.root)
    machine.node("dev/gone", "8:240")
    with pytest.raises(DiskFailed, match="not there"):
        devices.describe_use("/dev/gone", machine.root)


@pytest.fixture
def loop(tmp_path: Path) -> Iterator[str]:
    image = tmp_path / "disk"
    with image.open("wb") as file:
        file.truncate(32 << 20)
    done = subprocess.run(["losetup", "--find", "--show", image], check=True, capture_output=True, text=True)
    yield done.stdout.strip()
    subprocess.run(["losetup", "--detach", done.stdout.strip()], check=True)


def test_a_device_that_a_program_holds_is_in_use(loop: str) -> None:
    assert devices.describe_use(loop) == ""
    held = os.open(loop, os.O_RDONLY | os.O_EXCL)
    try:
        assert devices.describe_use(loop) == "the kernel or another program holds it"
    finally:
        os.close(held)
    assert devices.describe_use(loop) == ""


def test_contents_name_file_systems_and_partition_tables(loop: str) -> None:
    assert devices.list_signatures(loop) == ""
    subprocess.run(["mkfs.ext4", "-q", "-L", "two words", loop], check=True)
    assert devices.list_signatures(loop) == "ext4, label two words"
    subprocess.run(["wipefs", "--all", "--quiet", loop], check=True)
    assert devices.list_signatures(loop) == ""
    with open(loop, "r+b") as disk:  # one partition of type 0x83, 1,000 sectors from 2,048 on
        disk.write(bytes(446) + bytes((0, 0, 2, 0, 0x83, 0, 0, 0, 0, 8, 0, 0, 0xE8, 3)) + bytes(50) + b"\x55\xaa")
    assert devices.list_signatures(loop) == "dos"


def test_contents_that_cannot_be_read_are_not_taken_for_none(tmp_path: Path) -> None:
    with pytest.raises(CommandFailed):
        devices.list_signatures(str(tmp_path / "absent"))


# udev


def test_the_serial_number_is_that_of_the_disk() -> None:
    scsi = {
        "ID_SERIAL": "0QEMU_QEMU_HARDDISK_drive-scsi0",
        "ID_SERIAL_SHORT": "drive-scsi0",
        "ID_SCSI_SERIAL": "D7",
    }
    assert udev.serial_number(scsi) == "D7"
    assert udev.serial_number({"ID_SERIAL": "SAMSUNG_S3Z", "ID_SERIAL_SHORT": "S3Z"}) == "S3Z"
    assert udev.serial_number({"ID_SERIAL": "virtio-7"}) == "virtio-7"
    assert udev.serial_number({"ID_SCSI_SERIAL": "  ", "DEVNAME": "/dev/loop0"}) == ""


def test_udev_is_settled_when_its_queue_is_gone(machine: Machine) -> None:
    assert udev.has_settled(machine.root)
    (machine.folder / "run/udev/queue").touch()
    assert not udev.has_settled(machine.root)


def python(program: str, *arguments: str) -> str:
    """Runs a program in a new interpreter, in namespaces of its own: nothing of it reaches this host."""
    done = subprocess.run(
        ["unshare", "--mount", "--net", "--ipc", sys.executable, "-c", textwrap.dedent(program), *arguments],
        capture_output=True, text=True, timeout=120, env={**os.environ, "PYTHONPATH": str(REPOSITORY)},
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


UDEV = """
    import json, os, select, subprocess, sys, time
    rules, image = sys.argv[1:]
    def sh(text):
        return subprocess.run(["sh", "-ec", text], check=True, stdout=subprocess.PIPE, text=True).stdout.strip()
    sh(f'''mount -t tmpfs none /run
        new=/run/dev; mkdir $new; mount -t tmpfs none $new
        cp -a /dev/null /dev/zero /dev/random /dev/urandom /dev/full /dev/loop* $new/
        mount --move $new /dev
        mount --bind {rules} $(realpath /lib/udev/rules.d)
        ! test -d /etc/udev/rules.d || mount -t tmpfs none /etc/udev/rules.d''')
    quiet = subprocess.DEVNULL
    udevd = subprocess.Popen(["/lib/systemd/systemd-udevd"], stdout=quiet, stderr=quiet)
    while not os.path.exists("/run/udev/control"):
        time.sleep(0.05)
    from unlock.disks import luks, udev
    from unlock.secret import Secret
    monitor = udev.Monitor()
    events = []
    def wait(wanted):
        end = time.monotonic() + 20
        while time.monotonic() < end:
            select.select([monitor], [], [], 0.2)
            for event in monitor.read_events():
                events.append(event)
            if wanted(): return
        raise SystemExit(f"nothing came: {events} {udev.marked_disks()}")
"""


@pytest.fixture(scope="module")
def rules(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """udev's own rules for block devices, and ours."""
    folder = tmp_path_factory.mktemp("rules")
    stock = Path("/lib/udev/rules.d/60-persistent-storage.rules")
    [ours] = (REPOSITORY / "udev").glob("*.rules")
    for each in (stock, ours):
        (folder / each.name).write_bytes(each.read_bytes())
    return folder


def test_a_luks_disk_that_appears_is_seen_marked_and_lost_again(tmp_path: Path, rules: Path) -> None:
    """A real udevd and the rule that we install."""
    image = tmp_path / "image"
    with image.open("wb") as file:
        file.truncate(32 << 20)
    story = """
    try:
        assert udev.marked_disks() == [] and monitor.read_events() == []
        luks.format(image, Secret(bytes(64))).close()
        loop = sh(f"losetup --find --show {image}")
        try:
            wait(lambda: events)
            wait(udev.has_settled)
            action, disk = events[0]
            found = udev.marked_disks()
            assert udev.find_disk(loop)[:6] == disk[:6]
            print(json.dumps([action, loop, disk, found]))
            sh(f"wipefs --all --quiet {loop}; udevadm trigger --settle --action=change {loop}")
            wait(lambda: not udev.marked_disks())
            assert udev.find_disk(loop).node == loop
        finally:
            sh(f"losetup --detach {loop}")
    finally:
        udevd.terminate()
        udevd.wait()
    """
    said = python(UDEV + story, str(rules), str(image))
    action, loop, disk, found = json.loads(said)
    assert action in ("add", "change")
    assert found == [disk], "what was announced is what is listed"
    node, sysname, number, serial, _, size, initialized = disk
    assert (node, serial, size) == (loop, "", 32 << 20)
    assert number == f"7:{sysname.removeprefix('loop')}" and initialized > 0


def test_commands_find_a_disk_that_udev_saw_before_the_rule_was_installed(tmp_path: Path, rules: Path) -> None:
    """As after an installation, until the next boot: no disk has the mark. Early boot has the rule from the start."""
    images = [tmp_path / "image", tmp_path / "old"]
    for image in images:
        with image.open("wb") as file:
            file.truncate(32 << 20)
    story = """
    from unlock.disks import find
    image, old = image.split()
    try:
        with luks.format(image, Secret(bytes(64))) as container:
            uuid = container.uuid
        sh(f"echo word | cryptsetup luksFormat --type luks1 --batch-mode --pbkdf-force-iterations=1000 {old} -")
        sh(f"mv {rules}/65-unlock.rules {rules}/65-unlock; udevadm control --reload")
        loops = [sh(f"losetup --find --show {each}") for each in (image, old)]
        try:
            sh("udevadm settle --timeout=20")
            sh(f"mv {rules}/65-unlock {rules}/65-unlock.rules; udevadm control --reload")
            assert udev.find_disk(loops[0]).initialized and udev.marked_disks() == []
            seen = {uuid: [each.node for each in found] for uuid, found in find.look().items()}
            assert seen == {uuid: loops[:1]}, seen
            assert udev.unmarked_disks() == {loops[0]}
            sh(f"udevadm trigger --settle --action=change {' '.join(loops)}")
            wait(udev.marked_disks)
            assert udev.luks2_disks() == udev.marked_disks() and not udev.unmarked_disks()
            sh(f"wipefs --all --quiet {loops[0]}; udevadm trigger --settle --action=change {loops[0]}")
            assert udev.luks2_disks() == []
            print("done")
        finally:
            for each in loops:
                sh(f"losetup --detach {each}")
    finally:
        udevd.terminate()
        udevd.wait()
    """
    own = tmp_path / "rules"
    shutil.copytree(rules, own)
    assert python(UDEV + story, str(own), " ".join(map(str, images))).strip() == "done"


def test_events_that_the_kernel_dropped_cost_no_disk(tmp_path: Path, rules: Path) -> None:
    """A monitor whose buffer is too small for a storm of events still names every marked disk."""
    image = tmp_path / "image"
    with image.open("wb") as file:
        file.truncate(32 << 20)
    story = """
    try:
        luks.format(image, Secret(bytes(64))).close()
        loop = sh(f"losetup --find --show {image}")
        try:
            wait(udev.marked_disks)
            import socket
            end = socket.socket(fileno=os.dup(monitor.fileno()))
            assert end.getsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF) >= udev.BUFFER
            end.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 1)
            for _ in range(40):
                sh(f"udevadm trigger --settle --action=change {loop}")
            seen = [disk.node for _, disk in monitor.read_events()]
            assert loop in seen, seen
            print(len(seen))
        finally:
            sh(f"losetup --detach {loop}")
    finally:
        udevd.terminate()
        udevd.wait()
    """
    assert 0 < int(python(UDEV + story, str(rules), str(image))) < 40


def test_a_device_that_udev_does_not_know_is_a_failed_disk(machine: Machine) -> None:
    with pytest.raises(DiskFailed):
        udev.find_disk("/dev/unlock-test-absent")
    with pytest.raises(DiskFailed, match="not a block device"):
        udev.find_disk("/dev/null")
