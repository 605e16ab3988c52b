# SPDX-License-Identifier: Apache-2.0
"""What a thief left below /boot and on the EFI system partition while the host was off: no prediction blesses it.

Each attack is followed to its end: the thief's boot is made, and the TPM is asked. It ends in `unsealed` where the
defence is not there.
"""

import json
import os
import socket
import subprocess
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from hashlib import sha256
from pathlib import Path

import pytest

from tests import pefile
from tests.hostfixture import Machine
from tests.test_next_boots import (
    AFTER,
    BEFORE,
    CONFIG,
    LOADER,
    NEW,
    NEXT,
    OLD,
    Made,
    RealBoot,
    boot,
    enrolled,
    install,
    place,
    stub,
    uki,
    unified,
)
from tests.test_next_boots import host as host  # a fixture
from unlock.errors import Refused
from unlock.measured import eventlog
from unlock.operations import baseline, check, predict
from unlock.predict import boot_tree, booted, pe
from unlock.predict.boot_tree import BootTree
from unlock.predict.trusted_files import TrustedFiles
from unlock.secret import Secret

pytestmark = pytest.mark.usefixtures("key_cache")

IMAGE, KERNEL = f"/initrd.img-{OLD}", f"/vmlinuz-{OLD}"
EVIL = b"sends the keys away".ljust(4096, b".")
"""As long as some sectors of a disk."""
HIS: dict[str, bytes] = {
    IMAGE: EVIL,
    KERNEL: pefile.build({".text": b"the thief's" * 90}),
}


def look(host: Machine, now: RealBoot | Made = NEXT) -> None:
    """A boot that the TPM allows, and what its baseline service does."""
    assert boot(host, now) == "unsealed"
    baseline.record_good_boot(host.paths, host.chip.tcti)


def updated(host: Machine) -> None:
    """To the newer kernel; the older one is in the menu."""
    install(host, AFTER)
    predict.predict_and_allow(host.paths, host.chip.tcti)
    look(host)
    predict.predict_and_allow(host.paths, host.chip.tcti)


def predict_all(host: Machine) -> list[str]:
    """Why each boot of the menu is not predicted; empty when nothing is."""
    try:
        return [each.why for each in predict.predict_and_allow(host.paths, host.chip.tcti).boots]
    except Refused:
        return []


def in_boot(host: Machine, name: str) -> Path:
    return Path(host.paths.root, place(name))


def stolen(host: Machine, name: str) -> str:
    """The thief puts his file there, the host off, and starts it by the menu. The verdict."""
    path = in_boot(host, name)
    if os.path.lexists(path):
        path.unlink()
    path.write_bytes(HIS[name])
    return boot(host, RealBoot("grub-2", {**AFTER, name: HIS[name]}))


@contextmanager
def block_device(file: Path) -> Iterator[str]:
    """A disk with this content."""
    made = subprocess.run(["losetup", "--find", "--show", file], capture_output=True, text=True, check=True)
    try:
        yield made.stdout.strip()
    finally:
        subprocess.run(["losetup", "--detach", made.stdout.strip()], check=True)


# Links and devices


@pytest.mark.parametrize("name", [IMAGE, KERNEL])
def test_a_link_to_what_the_thief_can_change(host: Machine, name: str) -> None:
    """His partition has the good file when the host boots. The boot loader follows the link, so the boot is honest."""
    updated(host)
    elsewhere = host.folder / "his-partition"
    elsewhere.write_bytes(AFTER[name])
    in_boot(host, name).unlink()
    in_boot(host, name).symlink_to(elsewhere)
    look(host)
    elsewhere.write_bytes(HIS[name])
    assert any(predict_all(host))
    in_boot(host, name).unlink()
    in_boot(host, name).write_bytes(HIS[name])
    assert any(predict_all(host)), "nor as a file of that name, in the same boot"
    assert stolen(host, name) == "pcr-mismatch"


@pytest.mark.root
@pytest.mark.parametrize("linked", [True, False])
def test_a_device_that_has_the_thiefs_file(host: Machine, linked: bool) -> None:
    """By a link, or as a node of its own."""
    updated(host)
    disk = host.folder / "disk"
    disk.write_bytes(EVIL)
    in_boot(host, IMAGE).unlink()
    with block_device(disk) as device:
        if linked:
            in_boot(host, IMAGE).symlink_to(device)
        else:
            os.mknod(in_boot(host, IMAGE), 0o60600, os.stat(device).st_rdev)
        look(host)
        assert any(predict_all(host))
    assert stolen(host, IMAGE) == "pcr-mismatch"


@pytest.mark.parametrize("folder", [False, True])
def test_a_link_that_leads_nowhere_until_later(host: Machine, folder: bool) -> None:
    """Of the file, or of the folder that it is in."""
    updated(host)
    elsewhere = host.folder / "later"
    if folder:
        subdued = Path(host.paths.root, "boot/efi/EFI/Linux")
        subdued.symlink_to(elsewhere)
        look(host)
        subdued.unlink()
        host.write("boot/efi/EFI/Linux/6.13.efi", unified(b"a thief's"))
        tree = BootTree(host.paths)
        judge = booted.Judge(tree, booted.load_booted_files(tree, parsed(NEXT)))
        path = "boot/efi/EFI/Linux/6.13.efi"
        assert "was no file that can be trusted" in judge.why_foreign(path, tree.digest(path) or b"")
        return
    in_boot(host, IMAGE).unlink()
    in_boot(host, IMAGE).symlink_to(elsewhere)
    look(host)
    elsewhere.write_bytes(EVIL)
    assert any(predict_all(host))
    assert stolen(host, IMAGE) == "pcr-mismatch"


def parsed(now: RealBoot) -> eventlog.Log:
    return eventlog.parse_event_log(now.log())


def test_a_configuration_of_grub_that_is_a_link(host: Machine) -> None:
    """What it says decides the command line. Found by itself: the input of the attack above, for another file."""
    updated(host)
    elsewhere = host.folder / "grub.cfg"
    elsewhere.write_bytes(AFTER[CONFIG])
    in_boot(host, CONFIG).unlink()
    in_boot(host, CONFIG).symlink_to(elsewhere)
    look(host)
    elsewhere.write_bytes(AFTER[CONFIG].replace(b" ro ", b" ro init=/bin/sh "))
    assert all(predict_all(host))


# Two files of one name


@contextmanager
def mounted(image: Path, where: Path) -> Iterator[None]:
    subprocess.run(["mount", "-o", "loop", image, where], check=True)
    try:
        yield
    finally:
        subprocess.run(["umount", where], check=True)


def remove(path: Path) -> None:
    """As dpkg and update-initramfs do: the kernel does not remember then that the name is gone."""
    path.rename(path.with_name("old")).unlink()


@contextmanager
def twice(host: Machine, path: Path, his: bytes) -> Iterator[None]:
    """A real ext4 is mounted as /boot, whose folder has two entries of this name; the thief's comes second."""
    root, image = Path(host.paths.root, "boot"), host.folder / "boot.img"
    features = "^metadata_csum,^dir_index,^has_journal"
    subprocess.run(["mke2fs", "-q", "-t", "ext4", "-O", features, "-d", root, image, "16M"], check=True)
    hidden = path.with_name(f"{path.name[:-1]}~")
    with mounted(image, root):
        hidden.write_bytes(his)
    content = image.read_bytes()
    assert content.count(hidden.name.encode()) == 1
    image.write_bytes(content.replace(hidden.name.encode(), path.name.encode()))
    with mounted(image, root):
        assert os.listdir(path.parent).count(path.name) == 2
        yield


@pytest.mark.root
@pytest.mark.parametrize("name", [IMAGE, KERNEL])
def test_a_file_that_its_folder_has_twice(host: Machine, name: str) -> None:
    """After the host has removed its own, the other one appears."""
    updated(host)
    with twice(host, in_boot(host, name), HIS[name]):
        assert in_boot(host, name).read_bytes() == AFTER[name]
        look(host)
        remove(in_boot(host, name))
        assert in_boot(host, name).read_bytes() == HIS[name]
        assert any(predict_all(host))
        assert boot(host, RealBoot("grub-2", {**AFTER, name: HIS[name]})) == "pcr-mismatch"


@pytest.mark.root
def test_a_configuration_that_its_folder_has_twice(host: Machine) -> None:
    """Of GRUB; the host has replaced its own by update-grub, and removed it. Nothing is sealed to what appears then."""
    updated(host)
    before = host.reasons()
    his = AFTER[CONFIG].replace(b" ro ", b" ro init=/bin/sh ")
    assert his != AFTER[CONFIG]
    with twice(host, in_boot(host, CONFIG), his):
        look(host)
        remove(in_boot(host, CONFIG))
        assert in_boot(host, CONFIG).read_bytes() == his
        assert all(predict_all(host))
        assert len(host.reasons()) <= len(before)


@pytest.mark.root
def test_a_boot_loader_that_its_folder_has_twice(tmp_path: Path) -> None:
    """Found by itself: no way of booting asked whose the boot loader is."""
    image, his = unified(b"kernel"), pefile.build({".text": b"the thief's boot loader" * 50})
    now, loader = uki(image, "debian.efi"), "boot/efi/EFI/BOOT/BOOTX64.EFI"
    host = enrolled(tmp_path, now, {"boot/efi/EFI/Linux/debian.efi": image, loader: LOADER})
    path = Path(host.paths.root, loader)
    digests = {pe.authenticode(LOADER): pe.authenticode(his)}
    changed = [each._replace(digest=digests.get(each.sha256, each.sha256)) for each in now.made]
    with twice(host, path, his):
        look(host, now)
        remove(path)
        assert path.read_bytes() == his
        predict_all(host)
        assert boot(host, Made(changed, "uki")) == "pcr-mismatch"
    host.close()


@pytest.mark.root
def test_a_folder_that_its_folder_has_twice(host: Machine) -> None:
    """kernel-install removes the folder of a kernel with all that is in it, and makes it again for the next one."""
    updated(host)
    folder = Path(host.paths.root, "boot/machine-id")
    folder.mkdir()
    with twice(host, folder, b""):
        look(host)
        tree = BootTree(host.paths)
        host.write("boot/machine-id-2/linux", HIS[KERNEL])
        found = {each.path: each.why for each in tree.names() if each.why}
        assert found == {"boot/machine-id": boot_tree.TWICE}
        judge = booted.Judge(tree, booted.load_booted_files(tree, parsed(NEXT)))
        assert "was no file" in judge.why_foreign("boot/machine-id/6.13/linux", bytes(32))


@pytest.mark.root
def test_another_file_than_the_folder_lists(host: Machine) -> None:
    """What is opened by the name must be what is listed by it: a file that is mounted over it stands for an index of
    the folder that leads elsewhere."""
    path, his = in_boot(host, IMAGE), host.folder / "his"
    his.write_bytes(EVIL)
    subprocess.run(["mount", "--bind", his, path], check=True)
    try:
        assert path.read_bytes() == EVIL
        assert "lists another file" in BootTree(host.paths).why_unreadable(place(IMAGE))
        assert BootTree(host.paths).read(place(IMAGE)) is None
    finally:
        subprocess.run(["umount", path], check=True)
    assert BootTree(host.paths).read(place(IMAGE)) == BEFORE[IMAGE]


def test_names_that_differ_in_their_case(host: Machine) -> None:
    """Where the folder heeds it, they are two files; else it decides which one a name means."""
    host.write("boot/Initrd", b"one")
    host.write("boot/initrd", b"two")
    assert BootTree(host.paths).read("boot/Initrd") == b"one"
    assert BootTree(host.paths).read("boot/INITRD") is None
    os.unlink(os.path.join(host.paths.root, "boot/initrd"))
    os.link(os.path.join(host.paths.root, "boot/Initrd"), os.path.join(host.paths.root, "boot/initrd"))
    tree = BootTree(host.paths)  # as FAT answers: the first one, for both names
    assert tree.read("boot/initrd") is None and tree.why_unreadable("boot/Initrd") == boot_tree.TWICE


# Another file system


@pytest.mark.root
def test_a_file_system_that_was_not_there_when_the_boot_was_looked_at(tmp_path: Path) -> None:
    """The ESP is mounted on demand, and a stick with the same UUID is faster the second time."""
    old, his = unified(b"old"), unified(b"a thief's")
    now, linux = uki(old, "6.9.efi"), "boot/efi/EFI/Linux"
    host = enrolled(tmp_path, now, {f"{linux}/6.9.efi": old, "boot/efi/EFI/BOOT/BOOTX64.EFI": LOADER})
    look(host, now)
    esp = Path(host.paths.root, "boot/efi")
    subprocess.run(["mount", "-t", "tmpfs", "none", esp], check=True)
    try:
        for name, data in (("Linux/6.9.efi", old), ("Linux/6.12.efi", his), ("BOOT/BOOTX64.EFI", LOADER)):
            host.write(f"boot/efi/EFI/{name}", data)
        assert any("was not there when this boot was looked at" in why for why in predict_all(host))
        assert boot(host, uki(his, "6.12.efi")) == "pcr-mismatch"
    finally:
        subprocess.run(["umount", esp], check=True)
    host.close()


@pytest.mark.root
def test_what_is_mounted_below_does_not_count(host: Machine) -> None:
    grub = Path(host.paths.root, "boot/grub")
    subprocess.run(["mount", "-t", "tmpfs", "none", grub], check=True)
    try:
        host.write("boot/grub/grub.cfg", b"set default=0")
        assert "another file system" in BootTree(host.paths).why_unreadable("boot/grub/grub.cfg")
    finally:
        subprocess.run(["umount", grub], check=True)


# What never ends


def bounded(act: Callable[[], object]) -> None:
    start = time.monotonic()
    act()
    assert time.monotonic() - start < 60


def pipe(path: Path) -> None:
    os.mkfifo(path)


def sock(path: Path) -> None:
    here = os.getcwd()
    os.chdir(path.parent)
    try:
        socket.socket(socket.AF_UNIX).bind(path.name)
    finally:
        os.chdir(here)


def endless(path: Path) -> None:
    path.symlink_to("/dev/zero")


def endless_node(path: Path) -> None:
    os.mknod(path, 0o20666, os.makedev(1, 5))


def sparse(path: Path) -> None:
    with path.open("wb") as file:
        file.truncate(1 << 42)


STOPS = {"a pipe": pipe, "a socket": sock, "a link": endless, "a device": endless_node, "too large": sparse}


@pytest.mark.root
@pytest.mark.timeout(120)
@pytest.mark.parametrize("why", STOPS)
def test_what_never_ends_blocks_nothing(host: Machine, why: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Neither the look at boot, nor the hook, nor check: in the place of an initramfs, beside it, and in /var."""
    updated(host)
    in_boot(host, IMAGE).unlink()
    STOPS[why](in_boot(host, IMAGE))
    STOPS[why](in_boot(host, "/initrd.img-0-beside"))
    host.write("proc/self/mountinfo", b"")
    assert boot(host, NEXT) == "unsealed"
    bounded(lambda: baseline.record_good_boot(host.paths, host.chip.tcti))
    bounded(lambda: predict.predict_after_update(host.paths, host.chip.tcti))
    found = booted.read_booted_files(host.paths)
    assert found and {place(IMAGE), "boot/initrd.img-0-beside"} <= set(found.sources)
    assert why in BootTree(host.paths).why_unreadable(place(IMAGE)) or why == "too large"
    start = time.monotonic()
    said = check.check(host.paths, host.chip.tcti, dict)
    assert time.monotonic() - start < 60
    assert f"/{place(IMAGE)}" in {each.what for each in said.findings}
    for path in (host.paths.booted, host.paths.boot_files):
        os.unlink(path)
        STOPS[why](Path(path))
    bounded(lambda: predict.predict_after_update(host.paths, host.chip.tcti))


def test_the_bounds(host: Machine, monkeypatch: pytest.MonkeyPatch) -> None:
    for number in range(50):
        host.write(f"boot/many/{number}", b"x")
    host.write("boot/" + "deep/" * 20 + "file", b"x")
    assert "boot/" + "deep/" * 15 + "deep" in {each.path for each in BootTree(host.paths).names() if each.why}
    for name, value, why in (("MAX_NAMES", 30, "more than 30 names"), ("MAX_LOOK", 1000, "too large")):
        with monkeypatch.context() as smaller:
            smaller.setattr(boot_tree, name, value)
            assert any(why in each.why for each in BootTree(host.paths).names()), name


def test_a_file_that_changes_while_it_is_read(host: Machine) -> None:
    """One prediction sees one content."""
    for act in (lambda path: path.write_bytes(b"another"), Path.unlink):
        tree = BootTree(host.paths)
        assert tree.read(place(IMAGE)) == in_boot(host, IMAGE).read_bytes()
        act(in_boot(host, IMAGE))
        with pytest.raises(Refused, match="was changed while it was read"):
            tree.read(place(IMAGE))


# The records


def test_an_edited_record_on_a_plain_var(host: Machine) -> None:
    """He adds what he has put into /boot: the record says then that this host has left it so."""
    updated(host)
    record = json.loads(Path(host.paths.boot_files).read_bytes())
    record["files"][place(IMAGE)] = sha256(EVIL).hexdigest()
    Path(host.paths.boot_files).write_text(json.dumps(record))
    in_boot(host, IMAGE).write_bytes(EVIL)
    look(host)
    assert any(predict_all(host))
    assert stolen(host, IMAGE) == "pcr-mismatch"


def test_a_record_under_a_key_of_his_own(host: Machine) -> None:
    updated(host)
    files = json.loads(Path(host.paths.boot_files).read_bytes())["files"]
    known = {path: bytes.fromhex(hexed) for path, hexed in files.items()}
    his = TrustedFiles({**known, place(IMAGE): sha256(EVIL).digest()}, {})
    Path(host.paths.boot_files).write_bytes(his.encode(Secret.random(32)))
    in_boot(host, IMAGE).write_bytes(EVIL)
    look(host)
    assert any(predict_all(host))
    assert stolen(host, IMAGE) == "pcr-mismatch"


@pytest.mark.parametrize("gone", [("boot_files",), ("boot_files", "booted")])
def test_a_record_that_he_has_deleted(host: Machine, gone: tuple[str, ...], capsys: pytest.CaptureFixture[str]) -> None:
    updated(host)
    for name in gone:
        os.unlink(getattr(host.paths, name))
    in_boot(host, IMAGE).write_bytes(EVIL)
    look(host)
    assert "is not there, or was changed" in capsys.readouterr().err
    assert any(predict_all(host))
    assert stolen(host, IMAGE) == "pcr-mismatch"


@pytest.mark.parametrize("boot_id", ["", "of another boot"])
def test_a_record_of_this_boot_that_he_has_written(host: Machine, boot_id: str) -> None:
    """He cannot know the boot's id; and none that cannot be read is one."""
    updated(host)
    found = booted.read_booted_files(host.paths)
    assert found
    known = {**found.known, place(IMAGE): sha256(EVIL).digest()}
    his = found._replace(boot=boot_id, known=known, foreign={}, sources=())
    in_boot(host, IMAGE).write_bytes(EVIL)
    assert boot(host, NEXT) == "unsealed"
    if not boot_id:
        Path(host.paths.boot_id).write_text("")
    Path(host.paths.booted).write_bytes(his.encode())
    baseline.record_good_boot(host.paths, host.chip.tcti)
    assert any(predict_all(host))
    assert stolen(host, IMAGE) == "pcr-mismatch"


def test_a_boot_that_is_looked_at_late(host: Machine) -> None:
    """The look at boot has failed, and an update has come before: nothing vouches for what it wrote, or for his."""
    updated(host)
    in_boot(host, IMAGE).write_bytes(EVIL)
    assert boot(host, NEXT) == "unsealed"
    assert any(predict_all(host))
    assert stolen(host, IMAGE) == "pcr-mismatch"


# What is made from his


def test_a_kernel_image_that_is_made_from_a_file_of_his(tmp_path: Path) -> None:
    """kernel-install, dracut, ukify: they take what is below /boot, and what they make is this system's own."""
    old, made = unified(b"old"), unified(b"a thief's")
    now, linux = uki(old, "6.9.efi"), "boot/efi/EFI/Linux"
    host = enrolled(tmp_path, now, {f"{linux}/6.9.efi": old, "boot/efi/EFI/BOOT/BOOTX64.EFI": LOADER})
    host.write("boot/vmlinuz-6.12", HIS[KERNEL])
    look(host, now)
    host.write(f"{linux}/6.12.efi", made)
    (own, other) = predict.predict_and_allow(host.paths, host.chip.tcti).boots
    assert not own.why and "may be made from boot/vmlinuz-6.12, which was changed" in other.why
    assert booted.ACCEPT in other.why
    assert boot(host, uki(made, "6.12.efi")) == "pcr-mismatch"
    look(host, now)
    assert any(predict_all(host)), "nor after the next boot"
    Path(host.paths.root, "boot/vmlinuz-6.12").unlink()
    assert any(predict_all(host)), "nor when the source is gone"
    host.close()


SOURCES: dict[str, tuple[bytes, bool]] = {
    "vmlinuz-6.12": (b"\0" * 0x202 + b"HdrS", True),
    "initrd-6.12": (b"070701", True),
    "some-name": (bytes(4) + b"070701", True),
    "zeros": (bytes(4096), True),
    "x.zst": (b"\x28\xb5\x2f\xfd", True),
    "shell.bin": (pefile.build({".text": b"unsigned"}), True),
    "cut.bin": (b"MZ", True),
    "6.12.efi": (unified(b"x"), True),
    "README": (b"text", False),
    "grub/x86_64-efi/ext2.mod": (b"\x7fELF", False),
    "loader/random-seed": (b"\7" * 32, False),
    "empty": (b"", False),
}


@pytest.mark.parametrize("name", SOURCES)
def test_what_a_boot_file_may_be_made_from(host: Machine, name: str) -> None:
    data, is_source = SOURCES[name]
    updated(host)
    host.write(f"boot/{name}", data)
    look(host)
    found = booted.read_booted_files(host.paths)
    assert found and f"boot/{name}" in found.foreign
    assert (f"boot/{name}" in found.sources) == is_source


def test_a_kernel_that_the_firmware_starts_and_a_hook_has_copied(tmp_path: Path) -> None:
    """From /boot to the EFI partition, over the one that this boot has measured. That way asked nobody."""
    old, his = pefile.build({".text": b"old" * 300}), HIS[KERNEL]
    kernel, initrd = "boot/efi/EFI/debian/vmlinuz-6.1", "boot/efi/EFI/debian/initrd.img-6.1"
    host = enrolled(tmp_path, stub(old, b"one"), {kernel: old, initrd: b"one", "boot/vmlinuz-6.1": old})
    host.write("boot/vmlinuz-6.1", his)
    look(host, stub(old, b"one"))
    host.write(kernel, his)
    (entry,) = predict.predict_and_allow(host.paths, host.chip.tcti).boots
    assert "may be made from boot/vmlinuz-6.1" in entry.why
    assert boot(host, stub(his, b"one")) == "pcr-mismatch"
    host.close()


def test_an_initramfs_of_such_a_kernel(tmp_path: Path) -> None:
    """Its link leads to another partition: the firmware has measured what was there."""
    code = pefile.build({".text": b"kernel" * 300})
    kernel, initrd = "boot/efi/EFI/debian/vmlinuz-6.1", "boot/efi/EFI/debian/initrd.img-6.1"
    host = enrolled(tmp_path, stub(code, b"one"), {kernel: code, initrd: b"one"})
    elsewhere = tmp_path / "his-partition"
    elsewhere.write_bytes(b"one")
    Path(host.paths.root, initrd).unlink()
    Path(host.paths.root, initrd).symlink_to(elsewhere)
    look(host, stub(code, b"one"))
    elsewhere.write_bytes(EVIL)
    predict_all(host)
    assert boot(host, stub(code, EVIL)) == "pcr-mismatch"
    host.close()


# The operator


def test_who_accepts_is_told_what(host: Machine, capsys: pytest.CaptureFixture[str]) -> None:
    """By name; a pipe is none that anybody can accept. `check` names them too, and each boot that depends on one."""
    updated(host)
    in_boot(host, IMAGE).write_bytes(b"from the rescue system")
    Path(host.paths.root, "boot/vmlinuz").symlink_to(f"vmlinuz-{NEW}")
    os.mkfifo(Path(host.paths.root, "boot/pipe"))
    host.write("boot/vmlinuz; id", HIS[KERNEL])
    host.write("proc/self/mountinfo", b"")
    look(host)
    findings = {each.what: each for each in check.check(host.paths, host.chip.tcti, dict).findings}
    assert {f"/{place(IMAGE)}", "/boot/vmlinuz", "/boot/pipe"} <= findings.keys()
    assert booted.ACCEPT in findings[f"/{place(IMAGE)}"].do
    assert findings["/boot/vmlinuz; id"].do.startswith("rm '/boot/vmlinuz; id', or ")
    capsys.readouterr()
    predict.predict_and_allow(host.paths, host.chip.tcti, trust_files=True)
    said = capsys.readouterr().err
    assert f"trusted from now on: {place(IMAGE)}: SHA-256 {sha256(b'from the rescue system').hexdigest()}" in said
    assert f"trusted from now on: boot/vmlinuz: a link to vmlinuz-{NEW}" in said
    assert "boot/pipe cannot be trusted: it is a pipe" in said
    found = booted.read_booted_files(host.paths)
    assert found and found.sources == ("boot/pipe",)
    Path(host.paths.root, "boot/pipe").unlink()
    look(host)
    found = booted.read_booted_files(host.paths)
    assert found and not found.foreign and not any(predict_all(host))


def test_a_link_of_this_hosts_is_no_thiefs(host: Machine) -> None:
    """Distributions keep /boot/vmlinuz as a link. Where it leads elsewhere one day, it is his."""
    link = Path(host.paths.root, "boot/vmlinuz")
    link.symlink_to(f"vmlinuz-{OLD}")
    updated(host)
    found = booted.read_booted_files(host.paths)
    assert found and not found.foreign
    link.unlink()
    link.symlink_to("../etc/passwd")
    look(host)
    found = booted.read_booted_files(host.paths)
    assert found and found.sources == ("boot/vmlinuz",)


def test_rebind_keeps_what_this_boot_has_found(host: Machine) -> None:
    """Somebody is there who vouches for this boot, and not for what its look has called a thief's."""
    updated(host)
    in_boot(host, IMAGE).write_bytes(EVIL)
    look(host)
    baseline.record_good_boot(host.paths, host.chip.tcti, first=True)
    assert any(predict_all(host))
    assert stolen(host, IMAGE) == "pcr-mismatch"
