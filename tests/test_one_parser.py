# SPDX-License-Identifier: Apache-2.0
"""What several parts of unlock read is read alike by all of them, and as the program that it is written for reads it:
fstab(5), mountinfo, names of groups, endpoints."""

import json
import os
import subprocess
from collections.abc import Callable
from functools import partial
from pathlib import Path

import pytest

from tests.test_integration_files import GATE, Host
from unlock import cli
from unlock.disks import devices, fstab, groups
from unlock.endpoint import Endpoint
from unlock.errors import Malformed, Usage
from unlock.host import config, units, wrong_config

PLACES = {
    r"/srv/back\134slash": "/srv/back\\slash",
    r"/srv/two\040words": "/srv/two words",
    r"/srv/tab\011stop": "/srv/tab\tstop",
    r"/srv/a\134040b": "/srv/a\\040b",
    r"/srv/nu\043ll": "/srv/nu#ll",
    "/srv/no\u00a0break": "/srv/no\u00a0break",
    "/srv/next\u0085line": "/srv/next\u0085line",
    "/srv/file\x1cseparator": "/srv/file\x1cseparator",
    "/srv/vertical\x0btab": "/srv/vertical\x0btab",
    "/srv/carriage\rreturn": "/srv/carriage\rreturn",
    "/srv/wide\u3000blank": "/srv/wide\u3000blank",
    r"/srv/\303\274": "/srv/ü",
    r"/srv/half\04": "/srv/half\\04",
    r"/srv/nine\09x": "/srv/nine\\09x",
    "/srv//twice/": "/srv/twice",
}
"""A mount point as fstab has it -> what it is."""


@pytest.mark.parametrize("written", PLACES)
@pytest.mark.parametrize("separator", [" ", "\t", " \t "], ids=["blank", "tab", "both"])
def test_a_line_of_fstab_is_read_as_by_mount(tmp_path: Path, written: str, separator: str) -> None:
    table = tmp_path / "fstab"
    table.write_text(separator.join(("/dev/sdz1", written, "ext4", "nofail", "0", "2")) + "\n", newline="\n")
    command: list[str | Path] = ["findmnt", "--tab-file", table, "--json", "--output", "TARGET"]
    theirs = json.loads(subprocess.run(command, capture_output=True, check=True).stdout)["filesystems"][0]["target"]
    assert os.path.normpath(theirs) == PLACES[written]
    assert fstab.fstab_targets(str(table)) == {PLACES[written]}
    assert fstab.fstab_sources(str(table)) == {"/dev/sdz1"}


@pytest.mark.parametrize("written", PLACES)
def test_generator_and_commands_find_a_place_of_fstab_taken(tmp_path: Path, written: str) -> None:
    """Those that a group can be mounted at; what follows them in the file is read, too."""
    host, place = Host(tmp_path), PLACES[written]
    (host.root / "etc/fstab").write_text(f"/dev/sdz1 {written} ext4 nofail 0 2\nUUID=1 /srv/last ext4\n", newline="\n")
    try:
        config.normalise_mount_point(place)
    except Usage:
        place = "/srv/last"
    for where in (place, "/srv/last"):
        made = host.generate(f"[group.data]\nmount = {json.dumps(where)}\n")
        assert made == {GATE} and "mounted by /etc/fstab" in host.errors
        assert where in fstab.fstab_targets(str(host.root / "etc/fstab"))


@pytest.mark.parametrize("written", [each for each in PLACES if "//" not in each])
def test_a_line_of_mountinfo_is_one_line_whatever_is_in_it(tmp_path: Path, written: str) -> None:
    """The kernel escapes blank, tab, line feed, backslash and #; anyone who may mount chooses the rest."""
    (tmp_path / "proc/self").mkdir(parents=True)
    lines = (
        f"36 35 98:0 / {written} rw,noatime master:1 - fuse.x {written} rw\n",
        "37 35 98:1 / /srv/last rw - ext4 /dev/sdb rw\n",
    )
    (tmp_path / "proc/self/mountinfo").write_text("".join(lines), newline="\n")
    assert devices._mounts(str(tmp_path)) == [
        ("98:0", PLACES[written], PLACES[written], "fuse.x"),
        ("98:1", "/srv/last", "/dev/sdb", "ext4"),
    ]


def test_crypttab_keeps_every_byte_that_is_not_noauto(tmp_path: Path) -> None:
    table = tmp_path / "crypttab"
    before = b"# caf\xe9\r\nother UUID=2 none luks\r\n\nname\tUUID=1 /key\xc2\xa0file luks,discard\n"
    table.write_bytes(before)
    assert fstab.set_noauto(str(table), "name")
    after = b"name UUID=1 /key\xc2\xa0file luks,discard,noauto\n"
    assert table.read_bytes() == before[: before.index(b"name\t")] + after


NAMES = [
    "data",
    "a.b",
    "0",
    "_x",
    "-x",
    ".x",
    "A",
    "a b",
    "a/b",
    "a\\b",
    "a%b",
    "ü",
    "a\n",
    "a@b",
    "",
    "x" * 64,
    "x" * 65,
]


@pytest.mark.parametrize("name", NAMES)
def test_a_name_is_that_of_a_group_for_all_or_for_none(tmp_path: Path, name: str) -> None:
    host, table = Host(tmp_path), json.dumps(name)
    good = groups.is_name(name)
    text = f'[group.{table}]\nmount = "/srv/x"\n'
    assert (name in config.parse(text).groups) is good
    made = {each for each in host.generate(text) if "unlock-group@" in each}
    assert made == ({f"local-fs.target.wants/{units.gate_unit(name)}"} if good else set())
    broken = {each for each in host.generate(f"{text}x = \n") if "unlock-group@" in each}
    assert broken == made, "where the file is no TOML"
    try:
        assert groups.check_name(name) == name and good
    except Usage:
        assert not good
    assert not good or name in wrong_config.find_in_text(text)[0]


ENDPOINTS = [
    "kms", "kms:1", "kms:9998=name", "[::1]:1", "[::1]", "::1", "[::1]=kms", "fe80::1%eth0", " kms ", "kms=",
    "kms:65536", "kms:0", "kms:-1", "kms:+1", "kms: 1", "kms:٣", "[::1", "::1]", "[::1]5696", "[::1]x",
    "[::1]:", "kms:", ":1", "", "a b", "a\nb", "a\tb", "kms=a b", "kms=a\x00", "kms\u00a0x", "https://kms",
    "https://kms:1/", "kms/", "kms:1:2", "[a]b]:1", "[kms]:1", "x" * 300,
]  # fmt: skip


def accepts(read: Callable[[], object]) -> bool:
    try:
        read()
    except (Usage, Malformed):
        return False
    return True


@pytest.mark.parametrize("text", ENDPOINTS)
def test_an_endpoint_is_one_for_all_or_for_none(tmp_path: Path, text: str) -> None:
    good = accepts(lambda: Endpoint.parse(text))
    table = config.provider_table(config.ProviderConfig("kms", (text,), "/ca", "", config.TIMEOUT))
    try:
        parsed = config.parse(table)
    except Malformed:  # no TOML
        assert not good
        return
    assert ("kms" in parsed.providers) is good
    if good:
        found = Endpoint.parse(text)
        assert Endpoint.parse(str(found)) == found
        assert parsed.providers["kms"].endpoints == (text,)
        assert found.host.isprintable() and found.server_name.isprintable()
        assert not {*"[]/ "} & {*found.host}


def test_the_command_line_reads_endpoints_by_the_same_parser(tmp_path: Path) -> None:
    for text in ENDPOINTS:
        parsed = cli._parser().parse_args(["provider", "add", "kms", f"--endpoint={text}"])
        assert parsed.endpoint == [text], "as it is: config.append_table parses what is written"
        table = config.provider_table(config.ProviderConfig("kms", (text,), "/ca", "", config.TIMEOUT))
        file = str(tmp_path / "unlock.toml")
        Path(file).unlink(missing_ok=True)
        good = accepts(partial(Endpoint.parse, text))
        assert accepts(partial(config.append_table, file, table)) is good
        assert os.path.exists(file) is good
