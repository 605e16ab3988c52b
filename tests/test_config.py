# SPDX-License-Identifier: Apache-2.0
"""unlock.toml, crypttab and state.json: what is written is read, and what is mangled is said by name."""

import json
import os
import re
import shlex
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.formats import FOLDER
from unlock import cli
from unlock.disks import fstab
from unlock.endpoint import Endpoint
from unlock.errors import Malformed, NewerFormat, Refused, Usage
from unlock.host import config
from unlock.host.journal import DiskAdoption, GroupCreation
from unlock.host.state import State
from unlock.keys.escrow import Escrow
from unlock.measured.explain import explain
from unlock.operations import create_group
from unlock.operations.check import host as check_host
from unlock.operations.create_group import NewGroup
from unlock.paths import Paths


def test_a_group_that_is_added_is_read_back_and_the_operators_text_stays() -> None:
    text = config.HEAD + "# mine\n[group.other]\ndeadline = 5\n"
    for name in ("data", "my-data.2"):
        added = config.GroupConfig(name, '/srv/"a\\b', "btrfs", "noatime", 30)
        whole = text + config.group_table(added)
        assert config.parse(whole).groups[name] == added
        assert config.parse(whole).groups["other"].deadline == 5
        assert whole.startswith(text)


NEEDED = ("/var", "/etc", "/usr", "/var/lib", "/var/lib/unlock", "/boot", "/boot/efi", "/run", "/lib", "/sbin",
          "/usr/lib", "/usr/bin", "/run/data", "/dev/x", "/etc/unlock/x")  # fmt: skip
KMS = "[provider.kms]\nendpoints = ['kms', '[::1]:5697=kms']\nca = '/ca.pem'\n"


def test_a_file_that_is_not_utf8_is_said_by_its_name(tmp_path: Path) -> None:
    path = tmp_path / "unlock.toml"
    path.write_bytes(b"[group.data]\nmount = '/srv/\xff'\n")
    with pytest.raises(Malformed, match=f"{path} is not UTF-8"):
        config.load(str(path))


def test_a_mount_point_and_an_endpoint_are_read_as_they_are_used() -> None:
    found = config.parse(f"[group.data]\nmount = '/srv//data/./'\n{KMS}timeout = 300\nclient_key = '/host.key'\n")
    assert found.groups["data"].mount == "/srv/data"
    endpoints = [Endpoint.parse(each) for each in found.providers["kms"].endpoints]
    assert endpoints == [Endpoint("kms"), Endpoint("::1", 5697, "kms")]
    assert [Endpoint.parse(str(each)) for each in endpoints] == endpoints


@pytest.mark.parametrize(
    ("text", "named"),
    [
        ("[group.data", "unlock.toml"),
        ("version = 'x'", "version"),
        ("color = 1", "color"),
        ("group = 3", "group"),
        ("[group.data]\nmuont = '/srv'", "muont"),
        ("[group.data]\nmount = 3", "mount"),
        ("[group.data]\nmount = 'srv'", "mount"),
        ("[group.data]\nmount = '/srv/../etc'", "mount"),
        ("[group.data]\ndeadline = 0", "deadline"),
        ("[group.data]\ndeadline = true", "deadline"),
        ("[group.'../x']", "../x"),
        ("group.data = 3", "data"),
        ("[group.data]\ndeadline = '90'", "deadline"),
        ("[group.data]\nmount = '/'", "mount"),
        *((f"[group.data]\nmount = '{where}'", f"data.mount: {where} is needed") for where in NEEDED),
        ('[group.data]\ntype = "a\\nb"', "type"),
        ('[group.data]\noptions = "a\\nb"', "options"),
        ("[group.data]\npolicy = 'sometimes'", "policy"),
        ("version = true", "version"),
        ("provider = 3", "provider"),
        ("[provider.'../x']", "../x"),
        ("provider.kms = 3", "kms"),
        (f"{KMS}color = 1", "color"),
        ("[provider.kms]\nca = '/ca.pem'", "endpoints"),
        ("[provider.kms]\nca = '/ca.pem'\nendpoints = []", "endpoints"),
        ("[provider.kms]\nca = '/ca.pem'\nendpoints = [3]", "endpoints"),
        ("[provider.kms]\nca = '/ca.pem'\nendpoints = ['']", "endpoints"),
        ("[provider.kms]\nca = '/ca.pem'\nendpoints = ['one', 'kms:0']", "kms:0"),
        ("[provider.kms]\nca = '/ca.pem'\nendpoints = ['kms:65536']", "kms:65536"),
        ("[provider.kms]\nca = '/ca.pem'\nendpoints = ['[::1]5696x']", "5696x"),
        ("[provider.kms]\nendpoints = ['kms']", "ca"),
        ("[provider.kms]\nendpoints = ['kms']\nca = 'ca.pem'", "ca"),
        (f"{KMS}client_key = 'host.key'", "client_key"),
        (f"{KMS}timeout = 0", "timeout"),
        (f"{KMS}timeout = 301", "timeout"),
        (f"{KMS}username = 'ü'", "username"),
        (f"{KMS}username = '{'x' * 256}'", "username"),
        ("[sync]\ncolor = 1", "color"),
        ("[sync]\ndrop_on = ['active']", "drop_on"),
        ("[sync]\nopen_from_provider_after_refusal = 1", "open_from_provider"),
        ("[dump]\ncolor = 1", "color"),
        ("[dump]\ncount = 0", "dump.count"),
        ("[dump]\nsize = '1G'", "dump.size"),
        ("[dump]\nage = 3.5", "dump.age"),
        ("dump = 3", "dump"),
    ],
)
def test_a_mistake_is_named(text: str, named: str) -> None:
    with pytest.raises(Malformed, match=re.escape(named)):
        config.parse(text).check()


def test_a_wrong_table_is_an_error_for_those_who_need_it() -> None:
    text = f"[group.data]\nmount = '/srv/data'\n{KMS}[group.bad]\noptions = ['x']\n"
    found = config.parse(f"{text}[provider.bad]\n[sync]\ndrop_on = 3\n[gruop.more]\n")
    data, kms = found.group("data"), found.provider("kms")
    assert data and data.mount == "/srv/data" and kms and kms.ca == "/ca.pem"
    assert found.group("absent") is None and found.provider("absent") is None
    for ask in (lambda: found.group("bad"), lambda: found.provider("bad"), lambda: found.sync, found.check):
        with pytest.raises(Malformed) as caught:
            ask()
        assert caught.value.hint == "edit /etc/unlock/unlock.toml"
    assert found.faults.keys() == {"group.bad", "provider.bad", "sync", "gruop"}
    for kind, whole in (("group", config.parse("group = 3")), ("provider", config.parse("provider = 3"))):
        with pytest.raises(Malformed):
            getattr(whole, kind)("data")


def test_no_table_is_added_to_a_file_that_is_wrong_elsewhere(tmp_path: Path) -> None:
    path = tmp_path / "unlock.toml"
    path.write_text("[group.bad]\noptions = ['x']\n")
    before = path.read_bytes()
    with pytest.raises(Malformed, match=r"group\.bad\.options"):
        config.append_table(str(path), config.group_table(config.GroupConfig("data", "/srv", "", "", 90)))
    assert path.read_bytes() == before


@pytest.mark.parametrize(
    "text", ["version = 1" + "0" * 5000, "[group.data]\ndeadline = 1" + "0" * 5000, "version" + ".a" * 5000 + " = 1"]
)
def test_what_python_cannot_hold_is_a_mistake_as_any_other(text: str) -> None:
    with pytest.raises(Malformed):
        config.parse(text).check()


@pytest.mark.parametrize("where", [f"/srv/{'x' * 300}", "/srv/x ", "/srv/x\\", f"/srv/{'-' * 100}"])
def test_a_mount_point_that_no_unit_can_have_is_a_mistake(where: str) -> None:
    with pytest.raises(Malformed, match=r"cannot be a mount point|not a line of text"):
        config.parse(f"[group.data]\nmount = '{where}'\n").check()
    with pytest.raises(Usage):
        config.normalise_mount_point(where)


@pytest.mark.parametrize("where", ["/usr/local", "/usr/local/pgsql", "/usr/share/data", "/boot/data", "/lib/data"])
def test_a_group_may_be_below_what_a_boot_needs_for_itself(where: str) -> None:
    """As /usr: its own mount does not wait for what is mounted in it."""
    found = config.parse(config.HEAD + f"[group.data]\nmount = '{where}'\n")
    found.check()
    assert found.groups["data"].mount == where == config.normalise_mount_point(where)


@pytest.mark.parametrize("seconds", [604800, 604801, 31536000, 10**18])
def test_a_longer_deadline_is_one_of_a_week(seconds: int) -> None:
    found = config.parse(f"[group.data]\nmount = '/srv/data'\ndeadline = {seconds}\n")
    found.check()
    assert found.groups["data"].deadline == 604800


@pytest.mark.parametrize("seconds", [90, 604800, 604801, 10**18])
def test_check_says_that_a_deadline_is_taken_for_a_week(tmp_path: Path, seconds: int) -> None:
    paths = Paths(str(tmp_path))
    os.makedirs(os.path.dirname(paths.config))
    Path(paths.config).write_text(f"[group.data]\nmount = '/srv/data'\ndeadline = {seconds}\n")
    found = [(each.verdict, each.detail) for each in check_host.check_configuration(paths)]
    told = f"group data: its deadline of {seconds} s is taken for 604800 s, a week"
    assert found == ([("note", told)] if seconds > 604800 else [])


@pytest.mark.parametrize("key", ["options", "type"])
def test_blanks_around_a_setting_are_no_part_of_it(key: str) -> None:
    """As systemd reads a line of a unit."""
    for written, meant in {"x ": "x", "  x": "x", " x y ": "x y", " ": ""}.items():
        found = config.parse(f"[group.data]\nmount = '/srv/data'\n{key} = '{written}'\n")
        found.check()
        assert getattr(found.groups["data"], key) == meant
    for wrong in ("x\\", "x\\ ", "x\u00a0"):
        with pytest.raises(Malformed, match=key):
            config.parse(f"[group.data]\n{key} = '{wrong}'\n").check()


def test_a_later_version_is_told_from_a_mistake() -> None:
    with pytest.raises(NewerFormat):
        config.parse("version = 2\nnews = true")


CRYPTTAB = """# <target name> <source device> <key file> <options>
root UUID=0f0f none luks,discard
data  UUID="ABCD-12"   none   luks
"""


def test_crypttab_gets_noauto_on_one_line_once(tmp_path: Path) -> None:
    path = tmp_path / "crypttab"
    path.write_text(CRYPTTAB)
    assert fstab.find_crypttab_line(str(path), node="/dev/none", luks_uuid="abcd-12") == ("data", ("luks",))
    assert fstab.find_crypttab_line(str(path), node="/dev/none", luks_uuid="0f0f") == ("root", ("luks", "discard"))
    assert fstab.find_crypttab_line(str(path), node="/dev/none", luks_uuid="ffff") is None
    assert fstab.set_noauto(str(path), "data")
    assert path.read_text() == CRYPTTAB.replace(
        'data  UUID="ABCD-12"   none   luks', 'data UUID="ABCD-12" none luks,noauto'
    )
    assert not fstab.set_noauto(str(path), "data")
    assert not fstab.set_noauto(str(tmp_path / "absent"), "data")


def test_state_is_whole_or_refused(tmp_path: Path) -> None:
    paths = Paths(str(tmp_path))
    with pytest.raises(Refused, match="not initialised"):
        State.load(paths)
    state = State.new(paths, "ab" * 16)
    begun = GroupCreation("group create", "data", members=())
    state.begin(begun)
    whole = Path(paths.state).read_bytes()
    loaded = State.load(paths)
    assert loaded.unfinished(GroupCreation, "data") == begun
    assert loaded.unfinished(GroupCreation, "other") is None
    with pytest.raises(Refused, match="`unlock group create data` is not finished"):
        loaded.begin(DiskAdoption("disk adopt", "/dev/sdb --group data", manifest=1))
    for end in range(len(whole) - 1):
        Path(paths.state).write_bytes(whole[:end])
        with pytest.raises(Malformed):
            State.load(paths)
    Path(paths.state).write_text(json.dumps({**json.loads(whole), "version": 2}))
    with pytest.raises(NewerFormat):
        State.load(paths)


def places(value: Any) -> Iterator[tuple[Any, Any]]:
    """(container, key) of every value below a JSON value."""
    for key in list(value) if isinstance(value, dict) else range(len(value)) if isinstance(value, list) else ():
        yield value, key
        yield from places(value[key])


@pytest.mark.parametrize("name", ["native", "kmip"])
def test_a_state_with_a_wrong_or_a_missing_field_is_refused_when_it_is_loaded(tmp_path: Path, name: str) -> None:
    """As Malformed, and nothing else; or it is loaded and saved without trouble."""
    paths = Paths(str(tmp_path))
    Path(paths.state).parent.mkdir(parents=True)
    fields = json.loads((FOLDER / f"state-{name}.json").read_bytes())
    refused = loaded = 0

    def load() -> None:
        nonlocal refused, loaded
        Path(paths.state).write_text(json.dumps(fields))
        try:
            State.load(paths).save()
            loaded += 1
        except Malformed as error:
            assert error.hint
            refused += 1

    for container, key in places(fields):
        was = container[key]
        for other in (None, True, 7, 0.5, "text", [], ["text"], {}, {"text": "text"}):
            container[key] = other
            load()
        container[key] = was
    for container, key in list(places(fields)):
        if isinstance(container, dict):
            was = dict(container)
            del container[key]
            load()
            container.clear()
            container.update(was)
    assert refused > 5 * loaded > 0


@pytest.mark.parametrize(
    "wanted",
    [
        NewGroup("data", ("/dev/sdb",), "/srv/data", "", frozenset(), ""),
        NewGroup("data", ("/dev/sdb", "/dev/sdc"), "/srv/my data", "raid0", frozenset(), "/root/key", "provider"),
        NewGroup(
            "data", ("/dev/sdb",), "/srv/data", "", frozenset({"/dev/sdb"}), "", escrow=Escrow("age1x", "/root/e")
        ),
    ],
)
def test_what_finishes_a_group_that_was_begun_can_be_typed(tmp_path: Path, wanted: NewGroup) -> None:
    state = State.new(Paths(str(tmp_path)), "ab" * 16)
    assert not state.to_finish
    state.begin(GroupCreation("group create", wanted.name, members=(), options=create_group._options(wanted)))
    typed = cli._parser().parse_args(shlex.split(State.load(Paths(str(tmp_path))).to_finish)[1:])
    assert cli.group.wanted(typed) == wanted._replace(erase=frozenset())


def test_what_finishes_a_group_that_was_begun_can_be_typed_in_another_directory() -> None:
    wanted = NewGroup("data", ("/dev/sdb",), "/srv/data", "", frozenset(), "key", escrow=Escrow("ours.pem", "e"))
    words = shlex.split(create_group._options(wanted))
    named = {words[words.index(option) + 1] for option in ("--recovery-key-file", "--escrow-to", "--escrow-file")}
    assert named == {os.path.abspath(name) for name in ("key", "ours.pem", "e")}


@pytest.mark.parametrize("command", ["status", "init --backup b", "explain", "cache flush --yes"])
def test_nobody_but_root_gets_past_the_command_line(command: str) -> None:
    before = os.geteuid()
    os.seteuid(65534 if before == 0 else before)
    try:
        with pytest.raises(Refused) as caught:
            cli.cli(command.split())
        assert (caught.value.code, caught.value.hint) == ("not-root", f"sudo unlock {command}")
        with pytest.raises(Refused) as caught:
            explain(Paths(), as_json=True)
        assert caught.value.code == "not-root"
    finally:
        os.seteuid(before)
