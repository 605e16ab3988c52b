# SPDX-License-Identifier: Apache-2.0
"""The measurements of the next boot, predicted and then made."""

import random
import shutil
import struct
import subprocess
from hashlib import sha256
from pathlib import Path

import pytest

from tests import pefile
from tests.eventlogs import LOGGED, Entry, log, plain, program, real, tagged, values
from tests.lab import cache
from tests.properties import Property
from unlock.errors import Malformed, Refused
from unlock.measured import certificates, eventlog
from unlock.measured.eventlog import Log
from unlock.predict import pe, replay, uki_replay

SEPARATORS = [plain(pcr, 4, bytes(4)) for pcr in range(8)]


def parsed(entries: list[Entry]) -> Log:
    return eventlog.parse_event_log(log(entries))


def same(predicted: dict[int, bytes], entries: list[Entry], *pcrs: int) -> None:
    made = values(entries)
    assert {pcr: predicted[pcr] for pcr in pcrs} == {pcr: made[pcr] for pcr in pcrs}


def predicted(log: Log, changes: list[replay.Change]) -> dict[int, bytes]:
    return eventlog.replay(replay.apply_changes(log, changes), log.locality)


# logs of real boots


def test_a_command_line_was_predicted_as_the_next_boot_measured_it() -> None:
    def options(boot: str) -> bytes:
        return f"{real(boot).cmdline}\0".encode("utf-16-le")

    change = replay.command_line_change(old=options("direct-0"), new=options("direct-1"))
    found = predicted(eventlog.parse_event_log(real("direct-0").log), [change])
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
        replay.Change("the kernel", pe.authenticode(old), pe.authenticode(new)),
        replay.Change("the initramfs", sha256(b"initrd 1").digest(), sha256(b"initrd 2").digest()),
        replay.command_line_change(old="root=x quiet\0".encode("utf-16-le"), new="root=x\0".encode("utf-16-le")),
    ]
    same(predicted(now, changes), direct(new, b"initrd 2", "root=x"), 4, 7, 9)
    same(predicted(now, changes[:1]), direct(new, b"initrd 1", "root=x quiet"), 4, 7, 9)
    same(predicted(now, []), direct(old, b"initrd 1", "root=x quiet"), 4, 7, 9)


def test_what_this_boot_did_not_measure_cannot_be_predicted() -> None:
    now = parsed(direct(pefile.build({".text": b"x"}), b"initrd", "quiet"))
    with pytest.raises(Refused) as caught:
        predicted(now, [replay.Change("the initramfs", bytes(32), bytes(32))])
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
    signed = [data for data in (path.read_bytes() for path in kernels) if pe.read_layout(data).signatures]
    if not signed:
        pytest.skip("no signed kernel here: make test builds an image that has one")
    for data in signed:
        assert pe.authenticode(data) in data[-pe.read_layout(data).signatures :]


def fuzz(seed: int, cases: int) -> bool:
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
            assert (
                len(pe.read_section(data, pe.read_layout(data, whole=False), ".cmdline") or b"")
                <= len(data) + pe.MAX_PADDING
            )
            certificates.signing_authorities(pe.read_signatures(data))
            assert len(pe.authenticode(data)) == 32
            uki_replay.section_digests(data)
        except Malformed:
            pass
    return True


def test_mutated_programs() -> None:
    fuzz(seed=21, cases=5000)


# unified kernel images


def unified(**sections: bytes) -> bytes:
    inner = pefile.build({".text": sections.pop("kernel") * 300})
    return pefile.build({".text": b"stub", ".linux": inner} | {f".{name}": each for name, each in sections.items()})


def uki(image: bytes) -> list[Entry]:
    linux = pe.read_section(image, pe.read_layout(image), ".linux")
    assert linux
    measured = [Entry(11, 0x0D, b"", b"", digest) for digest in uki_replay.section_digests(image)]
    return [
        *SEPARATORS,
        program("\\EFI\\Linux\\x.efi", "")._replace(digest=pe.authenticode(image)),
        *measured,
        program("", "")._replace(digest=pe.authenticode(linux)),
    ]


def test_a_unified_kernel_image() -> None:
    old = unified(kernel=b"old", osrel=b"Debian", cmdline=b"quiet", initrd=b"1" * 5000, uname=b"6.1", pcrsig=b"sig")
    new = unified(kernel=b"new", osrel=b"Debian", cmdline=b"quiet", initrd=b"2" * 7000, uname=b"6.2", pcrsig=b"gis")
    now = parsed(uki(old))
    for other in (new, unified(kernel=b"new", osrel=b"Debian"), old):
        same(
            eventlog.replay(uki_replay.replace_uki(now, old=pe.authenticode(old), new=uki_replay.digest_uki(other))),
            uki(other),
            4,
            7,
            11,
        )
    with pytest.raises(Refused):
        uki_replay.replace_uki(now, old=pe.authenticode(new), new=uki_replay.digest_uki(new))
    with pytest.raises(Malformed):
        uki_replay.digest_uki(pefile.build({".text": b"x"}))


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
    for digest in [*uki_replay.section_digests(image), sha256(b"enter-initrd").digest()]:
        value = eventlog.extend(value, digest)
    assert value.hex() in done.stdout


PROPERTIES = (Property("EFI programs", 0, lambda _: None, lambda _, dice: fuzz(dice.randrange(1 << 32), 20)),)
"""For `make soak`: each case is twenty; `make test` runs its own above."""


def test_a_section_that_claims_more_than_the_file_has_takes_no_memory() -> None:
    """A boot menu reads the headers of a file that was cut short."""
    image = bytearray(pefile.build({".osrel": b"ID=debian"}))
    at = image.index(b".osrel\0\0") + 8
    for field in (at, at + 8):
        struct.pack_into("<I", image, field, 1 << 26)
    layout = pe.read_layout(bytes(image), whole=False)
    with pytest.raises(Malformed, match="larger than the file has it"):
        pe.read_section(bytes(image), layout, ".osrel")
