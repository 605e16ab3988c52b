# SPDX-License-Identifier: Apache-2.0
"""LUKS2 containers on image files, with the stock `cryptsetup` as the counterpart.

Mappings need device-mapper: activation is tested in a virtual machine.
"""

import errno
import hashlib
import json
import os
import select
import shutil
import signal
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from unlock.boot.worker import Worker
from unlock.disks import disk_keys, luks
from unlock.disks import header as luks_header
from unlock.disks.udev import Disk
from unlock.errors import DiskFailed, Malformed, NotOurs, UnlockError
from unlock.secret import Secret
from unlock.strictjson import canonical

PASSPHRASE = b"012345-678901-234567-890123-456789-012345-678901-234567"
AREA = 0x4000
"""Bytes of one header copy: 4096 binary, the rest JSON."""


def cryptsetup(*arguments: str, stdin: bytes = b"") -> "subprocess.CompletedProcess[bytes]":
    return subprocess.run(["cryptsetup", *arguments], input=stdin, capture_output=True, timeout=60)


@pytest.fixture(scope="session")
def volume_key() -> Secret:
    return Secret(bytes(range(64)))


@pytest.fixture(scope="session")
def template(tmp_path_factory: pytest.TempPathFactory, volume_key: Secret) -> Path:
    """An image with a keyslot and a token."""
    path = tmp_path_factory.mktemp("luks") / "template"
    empty(path)
    with luks.format(str(path), volume_key) as container:
        container.add_keyslot(volume_key, passphrase=Secret(PASSPHRASE))
        container.set_token({"type": "unlock", "version": 1})
    return path


@pytest.fixture(scope="session")
def memory() -> Iterator[Path]:
    """A folder in memory: the library repairs damaged headers and waits for the disk each time."""
    with tempfile.TemporaryDirectory(dir="/dev/shm") as folder:
        yield Path(folder)


@pytest.fixture
def image(tmp_path: Path, template: Path) -> Path:
    return copy(template, tmp_path / "image")


def empty(path: Path) -> Path:
    with path.open("wb") as file:
        file.truncate(20 << 20)
    return path


def copy(source: Path, target: Path) -> Path:
    """Sparse: only the header copies and the first keyslot are data."""
    subprocess.run(["cp", "--sparse=always", source, target], check=True)
    return target


def edit(path: Path, change: Callable[[bytearray], None], copies: tuple[int, ...] = (0, AREA)) -> None:
    """Changes header copies and makes their checksums right again."""
    with path.open("r+b") as file:
        for offset in copies:
            file.seek(offset)
            area = bytearray(file.read(AREA))
            change(area)
            area[448:512] = bytes(64)
            area[448:480] = hashlib.sha256(area).digest()
            file.seek(offset)
            file.write(area)


def edit_json(path: Path, change: Callable[[dict[str, Any]], object]) -> None:
    def inner(area: bytearray) -> None:
        metadata = json.loads(area[4096:].split(b"\0")[0])
        change(metadata)
        text = json.dumps(metadata).encode()
        area[4096:] = text + bytes(AREA - 4096 - len(text))

    edit(path, inner)


def ruin(path: Path, offset: int, length: int = 64) -> None:
    with path.open("r+b") as file:
        file.seek(offset)
        file.write(b"\xa5" * length)


# Our containers are everyone's containers


def test_what_we_format_opens_with_stock_cryptsetup_and_the_recovery_key(tmp_path: Path, volume_key: Secret) -> None:
    path = empty(tmp_path / "image")
    with luks.format(str(path), volume_key, uuid="12345678-1234-1234-1234-123456789abc", label="mine") as made:
        assert made.uuid == "12345678-1234-1234-1234-123456789abc"
        assert made.keyslots() == []
        slot = made.add_keyslot(volume_key, passphrase=Secret(PASSPHRASE))
    opened = cryptsetup("open", "--test-passphrase", "--key-file=-", str(path), stdin=PASSPHRASE)
    assert opened.returncode == 0, opened.stderr
    assert cryptsetup("open", "--test-passphrase", "--key-file=-", str(path), stdin=b"wrong").returncode == 2
    dump = cryptsetup("luksDump", str(path)).stdout.decode()
    assert "12345678-1234-1234-1234-123456789abc" in dump and "mine" in dump and "aes-xts-plain64" in dump
    assert slot == 0 and "512 bits" in dump


def test_what_stock_cryptsetup_formats_gives_us_its_volume_key(tmp_path: Path) -> None:
    path, key_file = empty(tmp_path / "image"), tmp_path / "key"
    made = cryptsetup(
        "luksFormat", "--type=luks2", "--pbkdf=pbkdf2", "--pbkdf-force-iterations=1000",
        "--batch-mode", "--key-file=-", str(path), stdin=PASSPHRASE,
    )  # fmt: skip
    assert made.returncode == 0, made.stderr
    dumped = cryptsetup(
        "luksDump", "--dump-volume-key", f"--volume-key-file={key_file}", "--batch-mode", "--key-file=-",
        str(path), stdin=PASSPHRASE,
    )  # fmt: skip
    assert dumped.returncode == 0, dumped.stderr
    with luks.Container(str(path)) as container, container.volume_key(Secret(PASSPHRASE)) as key:
        assert bytes(key) == key_file.read_bytes()
        container.verify_volume_key(key)


def test_our_sector_size_is_what_stock_cryptsetup_chooses(tmp_path: Path, volume_key: Secret) -> None:
    ours, stock = empty(tmp_path / "ours"), empty(tmp_path / "stock")
    cryptsetup("luksFormat", "--type=luks2", "--pbkdf=pbkdf2", "--pbkdf-force-iterations=1000",
               "--batch-mode", "--key-file=-", "--key-size=512", str(stock), stdin=PASSPHRASE)  # fmt: skip
    with luks.format(str(ours), volume_key) as one, luks.Container(str(stock)) as other:
        assert one.facts()["segments"] == other.facts()["segments"]


def test_an_adopted_disk_gets_its_recovery_keyslot_and_keeps_the_operators(tmp_path: Path) -> None:
    path = empty(tmp_path / "image")
    cryptsetup("luksFormat", "--type=luks2", "--pbkdf=pbkdf2", "--pbkdf-force-iterations=1000",
               "--batch-mode", "--key-file=-", str(path), stdin=b"the operator's")  # fmt: skip
    with luks.Container(str(path)) as container:
        before = container.facts()
        with container.volume_key(Secret(b"the operator's")) as key:
            assert container.add_keyslot(key, passphrase=Secret(PASSPHRASE)) == 1
        assert container.facts() == before, "a keyslot is not a fact"
        assert container.keyslots() == [0, 1]
        assert disk_keys.recovery_keyslot(container, Secret(b"the operator's"))[0] == 0
        assert disk_keys.recovery_keyslot(container, Secret(PASSPHRASE))[0] == 1


def test_formatting_checks_the_key_in_no_time(image: Path, volume_key: Secret) -> None:
    """The digest of a random key needs no stretching; at 125 ms a disk it would cost seconds at boot."""
    with luks.Container(str(image)) as container:
        assert container.facts()["digest"]["iterations"] == 1000
        assert container.metadata["keyslots"]["0"]["kdf"]["iterations"] == 1000
        assert container.metadata["keyslots"]["0"]["kdf"]["type"] == "pbkdf2"


# Keys


def test_a_wrong_passphrase_or_key_is_not_ours(image: Path, volume_key: Secret) -> None:
    with luks.Container(str(image)) as container:
        with pytest.raises(NotOurs):
            container.volume_key(Secret(b"wrong"))
        with pytest.raises(NotOurs):
            container.volume_key(Secret(PASSPHRASE), slot=5)
        with pytest.raises(NotOurs):
            container.volume_key(Secret(b""))
        with pytest.raises(NotOurs):
            container.verify_volume_key(Secret(bytes(64)))
        with pytest.raises(NotOurs):
            container.verify_volume_key(Secret(bytes(32)))
        with pytest.raises(NotOurs):
            container.add_keyslot(Secret(bytes(64)), passphrase=Secret(PASSPHRASE))
        with container.volume_key(Secret(PASSPHRASE)) as key:
            assert key == volume_key


def test_a_removed_keyslot_opens_nothing_and_the_volume_key_still_does(image: Path, volume_key: Secret) -> None:
    with luks.Container(str(image)) as container:
        container.remove_keyslot(0)
        with pytest.raises(NotOurs):
            container.volume_key(Secret(PASSPHRASE))
        with pytest.raises(DiskFailed):
            container.remove_keyslot(0)
        container.verify_volume_key(volume_key)
        assert container.add_keyslot(volume_key, passphrase=Secret(PASSPHRASE)) == 0


def test_secrets_stay_wipeable_and_out_of_errors(image: Path) -> None:
    with luks.Container(str(image)) as container:
        secret = Secret(b"hunter2hunter2")
        with pytest.raises(NotOurs) as caught:
            container.volume_key(secret)
        assert "hunter2" not in str(caught.value)
        del caught
        secret.wipe()
        assert not any(secret.value)


# Tokens


def test_tokens_are_written_read_replaced_and_removed(image: Path) -> None:
    with luks.Container(str(image)) as container:
        assert container.tokens("unlock") == [(0, {"type": "unlock", "version": 1, "keyslots": []})]
        assert container.set_token({"type": "unlock", "version": 2}) == 1
        assert container.set_token({"type": "other", "keyslots": ["0"]}) == 2
        assert container.set_token({"type": "unlock", "version": 3}, 0) == 0
        container.remove_token(1)
        container.remove_token(1)
    with luks.Container(str(image)) as container:
        assert [number for number, _ in container.tokens("unlock")] == [0]
        assert container.tokens("unlock")[0][1]["version"] == 3
        assert container.tokens("other")[0][0] == 2
    exported = cryptsetup("token", "export", "--token-id=0", str(image)).stdout
    assert json.loads(exported) == {"type": "unlock", "version": 3, "keyslots": []}


def test_a_token_that_stock_cryptsetup_imported_is_read(image: Path, tmp_path: Path) -> None:
    text = b'{"type":"unlock","keyslots":[],"text":"caf\\u00e9 \xe2\x82\xac"}'
    done = cryptsetup("token", "import", "--token-id=7", "--json-file=-", str(image), stdin=text)
    assert done.returncode == 0, done.stderr
    with luks.Container(str(image)) as container:
        assert container.tokens("unlock")[1] == (7, {"type": "unlock", "keyslots": [], "text": "café €"})


def test_a_token_too_large_for_the_header_is_refused_and_changes_nothing(image: Path) -> None:
    with luks.Container(str(image)) as container:
        with pytest.raises(DiskFailed, match="cannot take the token"):
            container.set_token({"type": "unlock", "data": "x" * 13_000})
        assert len(container.tokens("unlock")) == 1
        container.set_token({"type": "unlock", "data": "x" * 10_000})
    with luks.Container(str(image)) as container:
        assert len(container.tokens("unlock")) == 2


@pytest.mark.parametrize("size", ["512k", "1m", "2m", "4m"])
def test_a_header_of_any_size_that_luks2_has_is_read_and_written(tmp_path: Path, size: str) -> None:
    path = empty(tmp_path / "image")
    cryptsetup("luksFormat", "--type=luks2", "--pbkdf=pbkdf2", "--pbkdf-force-iterations=1000", "--batch-mode",
               "--key-file=-", f"--luks2-metadata-size={size}", "--luks2-keyslots-size=8m", str(path),
               stdin=PASSPHRASE)  # fmt: skip
    for _ in range(2):
        with luks.Container(str(path)) as container:
            container.set_token({"type": "other"})
    ruin(path, 0)
    with luks.Container(str(path)) as container:
        assert len(container.tokens("other")) == 2
        assert disk_keys.recovery_keyslot(container, Secret(PASSPHRASE))[0] == 0


# What is authenticated


def test_facts_change_with_what_an_attacker_would_change(image: Path, tmp_path: Path) -> None:
    with luks.Container(str(image)) as container:
        honest = canonical(container.facts())
    changes: list[Callable[[dict[str, Any]], object]] = [
        lambda m: m["segments"]["0"].update(encryption="cipher_null-ecb"),
        lambda m: m["segments"]["0"].update(sector_size=512),
        lambda m: m["segments"]["0"].update(iv_tweak="8"),
        lambda m: m["config"].update(flags=["allow-discards"]),
        lambda m: m["config"].update(requirements={"mandatory": ["something-new"]}),
        lambda m: m["digests"]["0"].update(iterations=1001),
    ]
    for change in changes:
        path = copy(image, tmp_path / "changed")
        edit_json(path, change)
        with luks.Container(str(path)) as container:
            assert canonical(container.facts()) != honest
    path = copy(image, tmp_path / "changed")
    edit(path, lambda area: area.__setitem__(slice(168, 170), b"ff"))
    with luks.Container(str(path)) as container:
        assert canonical(container.facts()) != honest, "another UUID"


def test_a_second_digest_over_the_data_is_malformed(image: Path) -> None:
    edit_json(image, lambda m: m["digests"].update({"1": {**m["digests"]["0"], "keyslots": []}}))
    with pytest.raises(Malformed), luks.Container(str(image)) as container:
        container.facts()


def test_an_unbound_digest_beside_the_datas_is_fine(image: Path) -> None:
    unbound: dict[str, list[str]] = {"keyslots": [], "segments": []}
    edit_json(image, lambda m: m["digests"].update({"1": {**m["digests"]["0"], **unbound}}))
    with luks.Container(str(image)) as container:
        assert container.facts()["digest"]["segments"] == ["0"]


@pytest.mark.parametrize("resilience", ["none", "checksum"])
def test_a_disk_that_is_being_reencrypted_says_so_and_what_to_type(tmp_path: Path, resilience: str) -> None:
    path = empty(tmp_path / "image")
    cryptsetup("luksFormat", "--type=luks2", "--pbkdf=pbkdf2", "--pbkdf-force-iterations=1000", "--batch-mode",
               "--key-file=-", str(path), stdin=PASSPHRASE)  # fmt: skip
    begun = cryptsetup("reencrypt", "--init-only", f"--resilience={resilience}", "--key-file=-", str(path),
                       stdin=PASSPHRASE)  # fmt: skip
    assert begun.returncode == 0, begun.stderr
    with luks.Container(str(path)) as container, pytest.raises(Malformed, match="being re-encrypted") as caught:
        container.facts()
    assert caught.value.hint == f"cryptsetup reencrypt --resume-only {path}"


def test_a_container_once_read_is_not_read_again(image: Path, volume_key: Secret) -> None:
    """The header that was authenticated is the one that counts, whatever the disk says a moment later."""
    with luks.Container(str(image)) as container:
        before = container.facts()
        edit_json(image, lambda m: m["segments"]["0"].update(encryption="cipher_null-ecb"))
        assert container.facts() == before
        container.verify_volume_key(volume_key)
    with luks.Container(str(image)) as container:
        assert container.facts() != before


def test_canonical_json_is_one_text_for_one_value() -> None:
    assert canonical({"b": [1, "é"], "a": None}) == b'{"a":null,"b":[1,"\\u00e9"]}'
    with pytest.raises(ValueError, match="JSON"):
        canonical(float("nan"))


@pytest.mark.parametrize(
    "text",
    [
        b'{"a":1,"a":2}', b'{"a":NaN}', b'{"a":Infinity}', b'{"a":1e999}', b'{"a":' + b"9" * 5000 + b"}",
        b"[" * 100_000, b'{"a":' * 100_000, b"[]", b"", b"\xff", b'{"a":"\xed\xa0\x80"}', b" " * (5 << 20),
    ],
    ids=range(12),
)  # fmt: skip
def test_metadata_that_is_not_strict_json_is_malformed(text: bytes) -> None:
    with pytest.raises(Malformed):
        luks_header.parse_metadata(text, "/dev/sdx")


# Damage


def older(path: Path, offset: int) -> None:
    """One copy is of an earlier write, as when another host is about to write it."""
    edit(path, lambda area: area.__setitem__(slice(16, 24), bytes(8)), (offset,))


def other_json(path: Path, offset: int) -> None:
    """One copy has a valid checksum and JSON that libcryptsetup refuses."""
    edit(path, lambda area: area.__setitem__(slice(4096, 4098), b"[]"), (offset,))


BAD_COPIES: dict[str, Callable[[Path], None]] = {
    **{f"ruined at {at}": lambda path, at=at: ruin(path, at) for at in (0, 448, 4096)},  # type: ignore[misc]
    **{f"ruined at {at}": lambda path, at=at: ruin(path, at) for at in (AREA, AREA + 448)},  # type: ignore[misc]
    "first is older": lambda path: older(path, 0),
    "second is older": lambda path: older(path, AREA),
    "first has other JSON": lambda path: other_json(path, 0),
    "second has other JSON": lambda path: other_json(path, AREA),
}


@pytest.mark.parametrize("bad", BAD_COPIES)
def test_a_disk_with_one_bad_copy_of_its_header_is_read_and_not_written_to(
    image: Path, volume_key: Secret, bad: str
) -> None:
    """It may be another host's, which is about to write the other copy."""
    BAD_COPIES[bad](image)
    before = image.read_bytes()
    with luks.Container(str(image)) as container:
        assert not container.is_whole
        assert container.tokens("unlock")
        container.verify_volume_key(volume_key)
        assert disk_keys.recovery_keyslot(container, Secret(PASSPHRASE)) == (0, volume_key)
        assert container.volume_key(Secret(PASSPHRASE)) == volume_key
    assert image.read_bytes() == before
    worker = Worker(Disk(str(image), "image", "", "", "", 0, 0.0))
    answer = None
    while not answer:
        assert select.select([worker], [], [], 10)[0]
        answer = worker.read()
    assert answer.word == "header"
    assert worker.volume_key(Secret(PASSPHRASE), 0) == volume_key
    worker.end()
    assert image.read_bytes() == before
    loop = subprocess.run(["losetup", "--find", "--show", image], check=True, capture_output=True, text=True).stdout
    try:
        with luks.Container(loop.strip()) as container:
            assert container.volume_key(Secret(PASSPHRASE)) == volume_key
        assert Path(loop.strip()).read_bytes() == before
    finally:
        subprocess.run(["losetup", "--detach", loop.strip()], check=True)


@pytest.mark.parametrize("bad", BAD_COPIES)
def test_the_first_write_makes_both_copies_of_a_header_whole(image: Path, bad: str) -> None:
    BAD_COPIES[bad](image)
    with luks.Container(str(image)) as container:
        container.set_token({"type": "other"})
    copies = [copy for _, copy in luks_header.read_copies(str(image), every=True)]
    assert all(map(luks_header.has_valid_checksum, copies))
    assert copies[0][16:24] == copies[1][16:24] and copies[0][4096:] == copies[1][4096:]
    with luks.Container(str(image)) as container:
        assert container.is_whole


def test_a_header_that_was_changed_since_it_was_read_is_not_written_to(image: Path) -> None:
    with luks.Container(str(image)) as container:
        edit_json(image, lambda m: m["config"].update(flags=["allow-discards"]))
        before = image.read_bytes()
        with pytest.raises(DiskFailed, match="changed meanwhile"):
            container.set_token({"type": "other"})
    assert image.read_bytes() == before


def test_both_copies_ruined_is_malformed_with_a_way_out(image: Path) -> None:
    ruin(image, 4096)
    ruin(image, AREA + 4096)
    with pytest.raises(Malformed, match="ruined") as caught:
        luks.Container(str(image))
    assert "luksHeaderRestore" in caught.value.hint


def test_what_is_not_luks2_is_not_ours(tmp_path: Path) -> None:
    blank = empty(tmp_path / "blank")
    short = tmp_path / "short"
    short.write_bytes(b"ten bytes\n")
    old = empty(tmp_path / "old")
    cryptsetup("luksFormat", "--type=luks1", "--pbkdf-force-iterations=1000", "--batch-mode", "--key-file=-",
               str(old), stdin=PASSPHRASE)  # fmt: skip
    for path in (blank, short, old):
        with pytest.raises(NotOurs) as caught:
            luks.Container(str(path))
        assert caught.value.code == "not-luks2"
    assert "convert" in caught.value.hint


def test_a_device_that_cannot_be_read_is_a_failed_disk(tmp_path: Path, volume_key: Secret) -> None:
    for path in (tmp_path / "absent", tmp_path, Path("/dev/null")):
        with pytest.raises(DiskFailed) as caught:
            luks.Container(str(path))
        assert str(path) in str(caught.value)
    with pytest.raises(DiskFailed):
        luks.format("/dev/null", volume_key)


def test_the_librarys_words_are_in_the_error_and_fit_for_a_terminal(tmp_path: Path, image: Path) -> None:
    with pytest.raises(DiskFailed, match="does not exist or access denied"):
        luks.format(str(tmp_path / "absent"), Secret(bytes(64)))
    with pytest.raises(DiskFailed) as caught:
        luks.format(str(tmp_path / "\x1b[2Jabsent\nnext line"), Secret(bytes(64)))
    assert "\x1b" not in luks._error_text("") and "\n" not in luks._error_text("")
    assert caught.value.code == "disk-failed"


def test_nothing_is_printed(image: Path, capfd: pytest.CaptureFixture[str]) -> None:
    ruin(image, 0, 2 * AREA)
    with pytest.raises(NotOurs):
        luks.Container(str(image))
    with pytest.raises(DiskFailed):
        luks.Container("/nowhere")
    assert capfd.readouterr() == ("", "")


def test_a_closed_container_says_so(image: Path) -> None:
    container = luks.Container(str(image))
    container.close()
    container.close()
    with pytest.raises(ValueError, match="closed"):
        container.metadata  # noqa: B018


# Processes


def test_containers_loaded_by_the_parent_work_in_forked_workers(
    image: Path, tmp_path: Path, volume_key: Secret
) -> None:
    """One disk a worker, as at boot: processes that share a context share its file offset."""
    containers = [luks.Container(str(copy(image, tmp_path / f"image-{each}"))) for each in range(4)]
    pids = []
    for container in containers:
        pid = os.fork()
        if pid == 0:
            try:
                container.verify_volume_key(volume_key)
                assert disk_keys.recovery_keyslot(container, Secret(PASSPHRASE))[0] == 0
                assert container.facts()["uuid"] == container.uuid
                container.close()
                os._exit(123)
            finally:
                os._exit(1)
        pids.append(pid)
    assert [os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) for pid in pids] == [123] * 4
    for container in containers:
        container.verify_volume_key(volume_key)
        container.close()


def test_workers_that_write_tokens_wait_for_each_others_lock(image: Path) -> None:
    pids = []
    for worker in range(4):
        pid = os.fork()
        if pid == 0:
            try:
                with luks.Container(str(image)) as container:
                    container.set_token({"type": "unlock", "worker": worker}, 10 + worker)
                os._exit(0)
            finally:
                os._exit(1)
        pids.append(pid)
    assert {os.waitpid(pid, 0)[1] for pid in pids} <= {0, 1 << 8}  # a stale context is refused, never written
    with luks.Container(str(image)) as container:
        assert container.tokens("unlock")


def test_the_lock_directory_is_made_where_an_initramfs_has_none(image: Path) -> None:
    """On a block device, since files are locked directly; in a mount namespace with an empty /run."""
    loop = subprocess.run(
        ["losetup", "--find", "--show", str(image)], check=True, capture_output=True, text=True
    ).stdout.strip()
    program = (
        "import os, sys; from unlock.disks import luks; c = luks.Container(sys.argv[1]); "
        "c.set_token({'type': 'lock'}); assert os.listdir('/run') == ['cryptsetup'], os.listdir('/run'); "
        "assert os.stat('/run/cryptsetup').st_mode & 0o777 == 0o700"
    )
    try:
        done = subprocess.run(
            ["unshare", "--mount", "sh", "-c", 'mount -t tmpfs none /run && exec "$@"', "sh",
             sys.executable, "-c", program, loop],
            capture_output=True, cwd=Path(luks.__file__).parents[2],
        )  # fmt: skip
    finally:
        subprocess.run(["losetup", "--detach", loop], check=True)
    assert done.returncode == 0, done.stderr.decode()


def test_tokens_of_others_are_never_tried(image: Path, tmp_path: Path) -> None:
    """systemd's TPM plugin would be loaded from the library's token folder, and call the TPM."""
    traced = tmp_path / "trace"
    program = (
        "import sys; from unlock.disks import luks; from unlock.secret import Secret; "
        "c = luks.Container(sys.argv[1]); c.set_token({'type': 'systemd-tpm2', 'keyslots': ['0']}); "
        "c.volume_key(Secret(sys.stdin.buffer.read()))"
    )
    done = subprocess.run(
        ["strace", "-f", "-e", "trace=openat", "-o", traced, sys.executable, "-c", program, image],
        input=PASSPHRASE, capture_output=True, cwd=Path(luks.__file__).parents[2],
    )  # fmt: skip
    assert done.returncode == 0, done.stderr.decode()
    assert "libcryptsetup.so" in traced.read_text()
    assert "libcryptsetup-token" not in traced.read_text()


# Mappings, as far as they go without device-mapper


def test_active_mappings_are_told_apart_by_their_uuid(tmp_path: Path) -> None:
    for number, name, uuid in (
        (0, "data-a", "CRYPT-LUKS2-12345678123412341234123456789abc-data-a"),
        (1, "vg-lv", "LVM-abcdefghijklmnopqrstuvwxyz0123456789"),
        (2, "bare", ""),
    ):
        folder = tmp_path / f"sys/block/dm-{number}/dm"
        folder.mkdir(parents=True)
        (folder / "name").write_text(name + "\n")
        (folder / "uuid").write_text(uuid + "\n")
    (tmp_path / "sys/block/sda").mkdir()
    assert luks.active_uuid("data-a", str(tmp_path)) == "12345678-1234-1234-1234-123456789abc"
    assert luks.active_uuid("vg-lv", str(tmp_path)) == "LVM-abcdefghijklmnopqrstuvwxyz0123456789"
    assert luks.active_uuid("bare", str(tmp_path)) == "unknown"
    assert luks.active_uuid("data-b", str(tmp_path)) is None


def test_without_device_mapper_nothing_is_active_and_activation_is_a_failed_disk(
    image: Path, volume_key: Secret
) -> None:
    if os.path.exists("/sys/class/misc/device-mapper"):
        assert luks.is_active("unlock-test-absent") is False
        return
    assert luks.is_active("data-a") is False
    assert luks.active_uuid("data-a") is None
    luks.abandon("data-a")
    with luks.Container(str(image)) as container, pytest.raises(DiskFailed, match="cannot be opened as data-a"):
        container.activate("data-a", volume_key)
    with pytest.raises(DiskFailed):
        luks.deactivate("data-a")


def test_the_removal_request_is_the_kernels_structure() -> None:
    """Sizes and offsets as a C compiler has them for struct dm_ioctl of linux/dm-ioctl.h."""
    request = luks._removal("data-a")
    assert len(request) == 312
    assert int.from_bytes(request[28:32], sys.byteorder) == 1 << 17, "flags: DM_DEFERRED_REMOVE"
    assert request[48:55] == b"data-a\0"


@pytest.mark.parametrize(
    ("number", "function", "kind", "code"),
    [
        (errno.EPERM, "crypt_activate_by_volume_key", NotOurs, "not-ours"),
        (errno.ENOENT, "crypt_volume_key_get", NotOurs, "not-ours"),
        (errno.ENOENT, "crypt_activate_by_volume_key", DiskFailed, "disk-failed"),
        (errno.EEXIST, "crypt_activate_by_volume_key", DiskFailed, "name-taken"),
        (errno.EBUSY, "crypt_deactivate_by_name", DiskFailed, "busy"),
        (errno.ENODEV, "crypt_deactivate_by_name", DiskFailed, "not-active"),
        (errno.ETXTBSY, "crypt_token_json_set", DiskFailed, "unmet-requirements"),
        (errno.EIO, "crypt_token_json_set", DiskFailed, "disk-failed"),
    ],
)
def test_what_the_library_returns_becomes_a_typed_error(
    monkeypatch: pytest.MonkeyPatch, number: int, function: str, kind: type[UnlockError], code: str
) -> None:
    library = type("Library", (), {function: staticmethod(lambda: -number)})
    monkeypatch.setattr(luks, "_library", library)
    with pytest.raises(kind) as caught:
        luks._do("/dev/sdx", "fails", function)
    assert caught.value.code == code and "/dev/sdx" in str(caught.value)


# Hostile headers


def outcome(path: Path, template: Path) -> str:
    """What boot does with a header, in a child: a crash or a hang of the library shows.

    As at boot, keys are tried only where what decides their cost (iterations, up to hours) is authentic.
    """
    with luks.Container(str(template)) as container:
        honest = container.metadata
    read, write = os.pipe()
    pid = os.fork()
    if pid == 0:
        signal.alarm(20)
        try:
            with luks.Container(str(path)) as container:
                container.tokens("unlock")
                canonical(container.facts())
                if all(container.metadata[name] == honest[name] for name in ("digests", "keyslots")):
                    container.verify_volume_key(Secret(bytes(range(64))))
                    container.volume_key(Secret(PASSPHRASE))
            os.write(write, b"opened")
        except UnlockError as error:
            os.write(write, error.code.encode())
        except BaseException as error:
            os.write(write, f"{type(error).__name__}: {error}".encode())
        finally:
            os._exit(0)
    os.close(write)
    with os.fdopen(read) as pipe:
        said = pipe.read()
    status = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
    return said if status == 0 else f"ended with status {status}"


FINE = {"opened", "not-ours", "not-luks2", "malformed", "disk-failed", "unmet-requirements"}


@settings(max_examples=100, deadline=None)
@given(
    damage=st.lists(
        st.tuples(
            st.one_of(st.integers(0, 511), st.integers(4096, 5600), st.integers(0, AREA - 1)),
            st.binary(min_size=1, max_size=8),
        ),
        min_size=1,
        max_size=6,
    ),
    checksum=st.booleans(),
    both=st.booleans(),
)
def test_random_damage_never_crashes_or_hangs(
    template: Path,
    memory: Path,
    damage: list[tuple[int, bytes]],
    checksum: bool,
    both: bool,
) -> None:
    path = copy(template, memory / "damaged")

    def change(area: bytearray) -> None:
        for offset, data in damage:
            area[offset : offset + len(data)] = data[: AREA - offset]

    if checksum:
        edit(path, change, (0, AREA) if both else (0,))
    else:
        with path.open("r+b") as file:
            for start in (0, AREA) if both else (0,):
                for offset, data in damage:
                    file.seek(start + offset)
                    file.write(data)
    assert outcome(path, template) in FINE


anything = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-(2**70), 2**70)
    | st.floats(allow_nan=False, allow_infinity=False)
    | st.text(max_size=20)
    | st.sampled_from(["0", "1", "-1", "18446744073709551616", "crypt", "linear", "dynamic", "cipher_null"]),
    lambda inner: (
        st.lists(inner, max_size=4)
        | st.dictionaries(st.text(max_size=8) | st.sampled_from(["0", "1", "99"]), inner, max_size=4)
    ),
    max_leaves=8,
)


@pytest.mark.turns
@settings(max_examples=150, deadline=None)
@given(data=st.data())
def test_metadata_of_any_shape_never_crashes_or_hangs(template: Path, memory: Path, data: st.DataObject) -> None:
    """Well-formed JSON and right checksums, with values of any kind in any place."""
    path = copy(template, memory / "shaped")

    def change(metadata: dict[str, Any]) -> None:
        place: Any = metadata
        while True:
            name = data.draw(st.sampled_from(sorted(place) if isinstance(place, dict) else range(len(place))))
            inner = place[name]
            if isinstance(inner, dict | list) and inner and data.draw(st.integers(0, 3)):
                place = inner
                continue
            place[name] = data.draw(anything)
            return

    edit_once(path, change)
    assert outcome(path, template) in FINE


def edit_once(path: Path, change: Callable[[dict[str, Any]], None]) -> None:
    """The same change in both copies; one that does not fit in the header is left out."""
    changed: list[bytes] = []

    def inner(area: bytearray) -> None:
        if not changed:
            metadata = json.loads(area[4096:].split(b"\0")[0])
            change(metadata)
            changed.append(json.dumps(metadata, ensure_ascii=False).encode("utf-8", "surrogatepass"))
        text = changed[0]
        if len(text) < AREA - 4096:
            area[4096:] = text + bytes(AREA - 4096 - len(text))

    edit(path, inner)


def test_the_counterpart_is_here() -> None:
    for program in ("cryptsetup", "losetup", "unshare", "strace"):
        assert shutil.which(program), f"{program} is not installed"
