# SPDX-License-Identifier: Apache-2.0
"""The measurements of the next boot, predicted and then made."""

import random
import shutil
import subprocess
from hashlib import sha256
from pathlib import Path

import pefile
import pytest
from eventlogs import LOGGED, Entry, grub, grub_file, log, plain, program, real, tagged, values

from tests.lab import cache
from tests.properties import Property
from unlock import eventlog, pe, predict
from unlock.errors import Malformed, Refused
from unlock.eventlog import Log

SEPARATORS = [plain(pcr, 4, bytes(4)) for pcr in range(8)]


def parsed(entries: list[Entry]) -> Log:
    return eventlog.parse(log(entries))


def same(predicted: dict[int, bytes], entries: list[Entry], *pcrs: int) -> None:
    made = values(entries)
    assert {pcr: predicted[pcr] for pcr in pcrs} == {pcr: made[pcr] for pcr in pcrs}


# logs of real boots


def test_a_command_line_was_predicted_as_the_next_boot_measured_it() -> None:
    change = predict.command_line(real("direct-0").cmdline, real("direct-1").cmdline)
    found = predict.predict(eventlog.parse(real("direct-0").log), [change])
    made = real("direct-1").pcrs
    assert found[9] != real("direct-0").pcrs[9]
    assert {pcr: found[pcr] for pcr in LOGGED} == {pcr: made[pcr] for pcr in LOGGED}


# a kernel that the firmware starts


def direct(kernel: bytes, initrd: bytes, line: str) -> list[Entry]:
    return [
        *SEPARATORS,
        program("\\vmlinuz.efi", "")._replace(digest=pe.authenticode(kernel)),
        tagged(9, 0x8F3B22ED, "LOADED_IMAGE::LoadOptions", line.encode("utf-16-le") + b"\0\0"),
        tagged(9, 0x8F3B22EC, "Linux initrd", initrd),
    ]


def test_kernel_initramfs_and_command_line_of_a_direct_boot() -> None:
    old, new = (pefile.build({".text": code * 700}) for code in (b"old", b"new"))
    now = parsed(direct(old, b"initrd 1", "root=x quiet"))
    changes = [
        predict.image("the kernel", old, new),
        predict.file("the initramfs", b"initrd 1", b"initrd 2"),
        predict.command_line("root=x quiet", "root=x"),
    ]
    same(predict.predict(now, changes), direct(new, b"initrd 2", "root=x"), 4, 7, 9)
    same(predict.predict(now, changes[:1]), direct(new, b"initrd 1", "root=x quiet"), 4, 7, 9)
    same(predict.predict(now, []), direct(old, b"initrd 1", "root=x quiet"), 4, 7, 9)


def test_what_this_boot_did_not_measure_cannot_be_predicted() -> None:
    now = parsed(direct(pefile.build({".text": b"x"}), b"initrd", "quiet"))
    with pytest.raises(Refused) as caught:
        predict.predict(now, [predict.file("the initramfs", b"another", b"new")])
    assert caught.value.code == "cannot-predict" and "the initramfs" in str(caught.value)


# Authenticode


def test_checksum_and_signature_are_not_measured_and_all_else_is() -> None:
    sections = {".text": b"a" * 700, ".data": b"b" * 100}
    plain_image = pefile.build(sections)
    assert pe.authenticode(plain_image) == pe.authenticode(pefile.build(sections, checksum=77))
    assert pe.authenticode(plain_image) == pe.authenticode(pefile.build(sections, signature=b"s" * 64))
    at = {name: plain_image.index(content) for name, content in sections.items()}
    for place in (2, 0x60, at[".text"], at[".data"] + 50, len(plain_image) - 1):
        changed = bytearray(plain_image)
        changed[place] ^= 1
        assert pe.authenticode(bytes(changed)) != pe.authenticode(plain_image), place
    more = pefile.build(sections, trailing=b"tail")
    assert pe.authenticode(more) != pe.authenticode(plain_image)
    assert pe.authenticode(more) == pe.authenticode(pefile.build(sections, trailing=b"tail", signature=b"s" * 64))


def test_a_signed_kernel_has_the_hash_that_its_signer_signed() -> None:
    """The distribution's signature quotes the hash: an answer that is not ours."""
    kernels = [*Path("/boot").glob("vmlinuz-*"), *cache.ROOT.glob("rootfs-*/root/boot/vmlinuz-*")]
    signed = [data for data in (path.read_bytes() for path in kernels) if pe.read(data).signatures]
    if not signed:
        pytest.skip("no signed kernel here: make test builds an image that has one")
    for data in signed:
        assert pe.authenticode(data) in data[-pe.read(data).signatures :]


def fuzz(seed: int, cases: int) -> None:
    """Mutated programs: a hash, or Malformed."""
    dice = random.Random(seed)
    good = pefile.build({".linux": b"a" * 700, ".cmdline": b"b" * 100}, signature=b"s" * 64)
    for _ in range(cases):
        work = bytearray(good)
        for _ in range(dice.choice((1, 2, 8))):
            at = dice.randrange(600)
            work[at : at + 4] = dice.choice((b"\0\0\0\0", b"\xff\xff\xff\xff", b"\xff\xff\xff\x7f", dice.randbytes(4)))
        data = bytes(work[: dice.choice((len(work), dice.randrange(len(work))))])
        try:
            assert len(pe.authenticode(data)) == 32
            predict.uki_measurements(data)
        except Malformed:
            pass


def test_mutated_programs() -> None:
    fuzz(seed=21, cases=5000)


# unified kernel images


def unified(**sections: bytes) -> bytes:
    inner = pefile.build({".text": sections.pop("kernel") * 300})
    return pefile.build({".text": b"stub", ".linux": inner} | {f".{name}": each for name, each in sections.items()})


def uki(image: bytes) -> list[Entry]:
    linux = pe.section(image, pe.read(image), ".linux")
    assert linux
    measured = [Entry(11, 0x0D, b"", b"", digest) for digest in predict.uki_measurements(image)]
    return [
        *SEPARATORS,
        program("\\EFI\\Linux\\x.efi", "")._replace(digest=pe.authenticode(image)),
        *measured,
        program("", "")._replace(digest=pe.authenticode(linux)),
    ]


def test_a_unified_kernel_image() -> None:
    old = unified(kernel=b"old", osrel=b"Debian", cmdline=b"quiet", initrd=b"1" * 5000, uname=b"6.1", pcrsig=b"sig")
    new = unified(kernel=b"new", osrel=b"Debian", cmdline=b"quiet", initrd=b"2" * 7000, uname=b"6.2", pcrsig=b"gis")
    same(predict.predict(parsed(uki(old)), predict.uki(old, new)), uki(new), 4, 7, 11)
    with pytest.raises(Refused):
        predict.uki(old, unified(kernel=b"new", osrel=b"Debian"))
    with pytest.raises(Malformed):
        predict.uki(pefile.build({".text": b"x"}), new)


MEASURE = "/usr/lib/systemd/systemd-measure"


@pytest.mark.skipif(not shutil.which(MEASURE), reason="no systemd-measure here")
def test_systemd_measure_says_the_same_of_a_unified_kernel_image(tmp_path: Path) -> None:
    contents = {"linux": b"kernel" * 99, "osrel": b"ID=debian\n", "cmdline": b"quiet\0", "initrd": b"i" * 999}
    contents |= {"splash": b"BM", "dtb": b"d" * 40, "pcrpkey": b"key"}
    options = []
    for name, content in contents.items():
        (tmp_path / name).write_bytes(content)
        options.append(f"--{name}={tmp_path / name}")
    done = subprocess.run(
        [MEASURE, "calculate", "--bank=sha256", "--phase=enter-initrd", "--json=short", *options],
        capture_output=True,
        text=True,
        check=True,
    )
    value = bytes(32)
    image = pefile.build({f".{name}": content for name, content in contents.items()})
    for digest in [*predict.uki_measurements(image), sha256(b"enter-initrd").digest()]:
        value = eventlog.extended(value, digest)
    assert value.hex() in done.stdout


# GRUB

CONFIG = """\
if [ -s $prefix/grubenv ]; then
  load_env
fi
menuentry_id_option="--id"
function load_video {{ insmod all_video; }}
menuentry 'Debian' --class gnu-linux $menuentry_id_option 'gnulinux-simple-12' {{
\tload_video
\tif [ x$grub_platform = xxen ]; then insmod xzio; fi
\techo\t'Loading Linux {new} ...'
\tlinux\t/vmlinuz-{new} root=UUID=12 ro  quiet
\tinitrd\t/initrd.img-{new}
}}
submenu 'Advanced options' $menuentry_id_option 'gnulinux-advanced-12' {{
{nested}}}
if [ "$grub_platform" = "efi" ]; then
\tmenuentry 'UEFI Firmware Settings' $menuentry_id_option 'uefi-firmware' {{
\t\tfwsetup
\t}}
fi
"""
NESTED = """\
\tmenuentry 'Debian, with Linux {0}' --class gnu-linux $menuentry_id_option 'x-{0}' {{
\t\tlinux\t/vmlinuz-{0} root=UUID=12 ro  quiet
\t}}
"""


def config(*versions: str) -> str:
    return CONFIG.format(new=versions[0], nested="".join(NESTED.format(each) for each in versions))


def grub_boot(kernel: bytes, initrd: bytes, *versions: str) -> list[Entry]:
    """As GRUB 2.12 on Debian 13 runs this configuration."""
    new = versions[0]
    line = f"/vmlinuz-{new} root=UUID=12 ro quiet"
    nested = "".join(NESTED.format(each) for each in versions)
    body = config(*versions).partition("'gnulinux-simple-12' ")[2].partition("\n}\n")[0] + "\n}"
    said = [
        "[ -s (hd0,gpt2)/grub/grubenv ]", "load_env", "menuentry_id_option=--id",
        f"menuentry Debian --class gnu-linux --id gnulinux-simple-12 {body}",
        f"submenu Advanced options --id gnulinux-advanced-12 {{\n{nested}}}",
        "[ efi = efi ]", "menuentry UEFI Firmware Settings --id uefi-firmware {\n\t\tfwsetup\n\t}",
        "setparams Debian", "load_video", "insmod all_video", "[ xefi = xxen ]",
        f"echo Loading Linux {new} ...", f"linux {line}",
    ]  # fmt: skip
    return [
        *SEPARATORS,
        program("\\EFI\\debian\\grubx64.efi", "grub"),
        grub_file("(hd0,gpt2)/grub/grub.cfg", config(*versions)),
        *(grub("grub_cmd", each) for each in said),
        grub_file(f"(hd0,gpt2)/vmlinuz-{new}", "")._replace(digest=sha256(kernel).digest()),
        program("", "")._replace(digest=pe.authenticode(kernel)),
        grub("kernel_cmdline", line),
        grub("grub_cmd", f"initrd /initrd.img-{new}"),
        grub_file(f"(hd0,gpt2)/initrd.img-{new}", "")._replace(digest=sha256(initrd).digest()),
        tagged(9, 0x8F3B22ED, "LOADED_IMAGE::LoadOptions", f"BOOT_IMAGE={line}".encode("utf-16-le") + b"\0\0"),
        tagged(9, 0x8F3B22EC, "Linux initrd", b"")._replace(digest=sha256(initrd).digest()),
    ]


def test_a_kernel_update_under_grub() -> None:
    old, new = (pefile.build({".text": code * 700}) for code in (b"old", b"new"))
    now = parsed(grub_boot(old, b"initrd 1", "6.1"))
    changes = [
        predict.image("the kernel", old, new),
        predict.file("the kernel", old, new),
        predict.file("the initramfs", b"initrd 1", b"initrd 2"),
        *predict.grub_menu(now, config("6.1"), config("6.2", "6.1")),
    ]
    same(predict.predict(now, changes), grub_boot(new, b"initrd 2", "6.2", "6.1"), 4, 7, 8, 9)


@pytest.mark.parametrize(
    "old,new",
    [
        (config("6.1"), config("6.1").replace("load_env", "load_env --skip-sig")),  # outside the menu
        (config("6.1"), config("6.1") + "\nmenuentry 'More' {\n}\n"),
        (config("6.0"), config("6.2")),  # not what was booted
        (config("6.1"), config("6.1").replace("\tinitrd\t", "\tinitrd\t/more ").replace("\tload_video\n", "", 1)),
        (config("6.1"), config("6.1").replace("echo\t'Loading", "echo\t\t'Load")),
    ],
    ids=["script", "entries", "another", "commands", "fine"],
)
def test_what_grub_will_do_is_never_guessed(old: str, new: str, request: pytest.FixtureRequest) -> None:
    now = parsed(grub_boot(pefile.build({".text": b"k"}), b"initrd", "6.1"))
    if request.node.callspec.id == "fine":
        assert predict.predict(now, predict.grub_menu(now, old, new))[8]
        return
    with pytest.raises(Refused):
        predict.grub_menu(now, old, new)


def test_a_line_that_grub_ran_in_a_way_that_is_not_understood() -> None:
    """A variable that the log does not show: the command cannot be reproduced, so it is not predicted."""
    lines = grub_boot(pefile.build({".text": b"k"}), b"initrd", "6.1")
    odd = [
        grub("grub_cmd", each.data[10:-1].decode() + " # odd") if b"linux /vm" in each.data else each for each in lines
    ]
    with pytest.raises(Refused, match="is not understood"):
        predict.grub_menu(parsed(odd), config("6.1"), config("6.2"))


def test_a_boot_from_the_submenu() -> None:
    lines = grub_boot(pefile.build({".text": b"k"}), b"initrd", "6.1")
    lines = [grub("grub_cmd", "setparams Advanced options") if b"setparams" in each.data else each for each in lines]
    with pytest.raises(Refused, match="submenu"):
        predict.grub_menu(parsed(lines), config("6.1"), config("6.2"))


PROPERTIES = (Property("EFI programs", 0, lambda _: None, lambda _, dice: not fuzz(dice.randrange(1 << 32), 20)),)
"""For `make soak`: each case is twenty; `make test` runs its own above."""
