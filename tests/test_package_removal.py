# SPDX-License-Identifier: Apache-2.0
"""`unlock boot removal`, which the packages' scripts run: what is lost, whether its names are accepted, and what it
leaves for a host without unlock. The generator that reads it."""

import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.flowfixture import Host
from tests.killing import Killer
from unlock.errors import Refused
from unlock.host import config, keyring
from unlock.host.journal import DiskRelease
from unlock.initramfs import DRACUT, INITRAMFS_TOOLS, Builder
from unlock.operations import removal
from unlock.paths import Paths

pytestmark = pytest.mark.usefixtures("key_cache")

GENERATOR = Path(__file__).parents[1] / "debian/unlock-guard"
TABLES = '[group.data]\nmount = "/srv/data"\n[group.other]\nmount = "/srv/a b%n"\n'


@pytest.fixture
def host(tmp_path: Path) -> Iterator[Host]:
    """A group `data` in state.json and unlock.toml, and a group that only unlock.toml names."""
    host = Host(tmp_path, 2)
    host.configure(more=TABLES)
    yield host
    keyring.flush()


def guards(paths: Paths) -> dict[str, str]:
    return {each.name: each.read_text() for each in Path(paths.config).parent.glob("guards/*")}


def written(paths: Paths) -> set[str]:
    return {str(each) for each in Path(paths.root).rglob("*") if each.is_file()}


@pytest.mark.parametrize("accepted", [[], ["data"], ["other"], ["date", "other"], ["all"]])
def test_each_group_is_to_be_named(host: Host, accepted: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    before = written(host.paths)
    with pytest.raises(Refused) as caught:
        removal.removal(host.paths, accepted)
    assert caught.value.code == "groups-stay-closed"
    assert "unlock unlock/remove string data other" in caught.value.hint
    said = capsys.readouterr().err
    assert "group data (data-0, data-1): without unlock, no boot opens it; nothing is mounted at /srv/data" in said
    assert "nothing is mounted at /srv/a b%n" in said and "cryptsetup open DEVICE NAME" in said
    assert written(host.paths) == before


def test_accepted_it_leaves_guards_and_what_a_purge_has_to_tell(host: Host) -> None:
    for _ in range(2):
        assert removal.removal(host.paths, ["other", "data"]) == 0
        found = guards(host.paths)
        assert found.keys() == {"srv-data.mount", "srv-a\\x20b\\x25n.mount"}
        assert "Where=/srv/a b%%n\nType=unlock\n" in found["srv-a\\x20b\\x25n.mount"]
    told = (Path(host.paths.state).parent / "after-removal").read_text()
    for words in ("0x81104c41", "0x1814c42", "on disk data-0 (UUID ", "/srv/data is a bare directory"):
        assert words in told
    assert host.state.groups.keys() == {"data"} and host.recovery_opens()


def test_killed_anywhere_it_is_done_by_another_run_and_the_host_is_as_before(host: Host, killer: Killer) -> None:
    state = Path(host.paths.state).read_bytes()
    for _ in killer(lambda _: lambda: removal.removal(host.paths, ["other", "data"])):
        assert Path(host.paths.state).read_bytes() == state
        assert set(guards(host.paths)) <= {"srv-data.mount", "srv-a\\x20b\\x25n.mount", "srv-data.mount.new"} | {
            "srv-a\\x20b\\x25n.mount.new"
        }
        assert removal.removal(host.paths, ["other", "data"]) == 0
        assert guards(host.paths).keys() == {"srv-data.mount", "srv-a\\x20b\\x25n.mount"}


def test_a_host_that_was_never_initialised_loses_nothing(tmp_path: Path) -> None:
    paths = Paths(str(tmp_path))
    assert removal.removal(paths, []) == 0
    assert not written(paths)


@pytest.mark.parametrize("builder", [INITRAMFS_TOOLS, DRACUT])
def test_images_of_older_kernels_are_named(host: Host, builder: Builder, capsys: pytest.CaptureFixture[str]) -> None:
    """dpkg's trigger makes the newest anew alone."""
    boot = Path(host.paths.root, "boot")
    boot.mkdir()
    (boot / "initrd.img-6.12.9").touch()
    if builder is DRACUT:
        (boot.parent / "usr/bin").mkdir(parents=True)
        (boot.parent / "usr/bin/dracut").touch()
    removal.removal(host.paths, ["other", "data"])
    assert "initrd.img" not in capsys.readouterr().err
    (boot / "initrd.img-6.12.10").touch()
    removal.removal(host.paths, ["other", "data"])
    assert f"unlock may stay in initrd.img-6.12.9 until: {builder.rebuild_every}" in capsys.readouterr().err


def test_an_operation_under_way_has_a_name_of_its_own(host: Host) -> None:
    state = host.state
    state.begin(DiskRelease("disk release", "data-0", "data", "", state.groups["data"].members[0]))
    with pytest.raises(Refused, match=removal.UNFINISHED):
        removal.removal(host.paths, ["other", "data"])
    assert removal.removal(host.paths, ["other", "data", removal.UNFINISHED]) == 0


@pytest.mark.parametrize("content", ["", "{", '{"version": 99}'])
def test_a_state_that_cannot_be_read_may_have_other_groups(host: Host, content: str) -> None:
    Path(host.paths.state).write_text(content)
    with pytest.raises(Refused, match=removal.UNKNOWN):
        removal.removal(host.paths, ["other", "data"])
    assert removal.removal(host.paths, ["other", "data", removal.UNKNOWN]) == 0


@pytest.mark.parametrize("missing", [False, True])
@pytest.mark.parametrize(
    "wrong", ['[group.data]\nmuont = 1\nmount = "/srv/data"\n', '[group.data\nmount = "/srv/data"\n']
)
def test_a_configuration_that_is_wrong_is_guarded_too(host: Host, wrong: str, missing: bool) -> None:
    Path(host.paths.config).write_text(config.HEAD + wrong)
    if missing:
        Path(host.paths.state).unlink()
    with pytest.raises(Refused):
        removal.removal(host.paths, [])
    assert removal.removal(host.paths, ["data"]) == 0
    assert guards(host.paths).keys() == {"srv-data.mount"}


def generate(paths: Paths, to: Path) -> set[str]:
    """What the generator that stays gives to systemd."""
    to.mkdir()
    text = GENERATOR.read_text()
    assert text.count("/etc/unlock") >= 3
    script = to.parent / "unlock-guard"
    script.write_text(text.replace("/etc/unlock", str(Path(paths.config).parent)))
    for shell in ("dash", "bash"):
        subprocess.run([shell, script, "/nowhere", "/nowhere", to], check=True)
    return {str(each.relative_to(to)) for each in to.rglob("*") if not each.is_dir()}


def test_a_mount_point_is_guarded_while_unlock_toml_names_it(host: Host, tmp_path: Path) -> None:
    assert not generate(host.paths, tmp_path / "before")
    removal.removal(host.paths, ["other", "data"])
    names = {"srv-data.mount", "srv-a\\x20b\\x25n.mount"}
    wants = {f"local-fs.target.wants/{each}" for each in names}
    assert generate(host.paths, tmp_path / "both") == names | wants
    assert (tmp_path / "both/local-fs.target.wants/srv-data.mount").resolve() == tmp_path / "both/srv-data.mount"
    host.configure(more='[group.data]\nmount = "/srv/data"\n')
    assert generate(host.paths, tmp_path / "one") == {"srv-data.mount", "local-fs.target.wants/srv-data.mount"}
    Path(host.paths.config).unlink()
    assert not generate(host.paths, tmp_path / "none")


def test_systemd_accepts_a_guard(host: Host, tmp_path: Path) -> None:
    removal.removal(host.paths, ["other", "data"])
    generate(host.paths, tmp_path / "late")
    names = [each for each in (tmp_path / "late").iterdir() if each.suffix == ".mount"]
    done = subprocess.run(["systemd-analyze", "verify", "--man=no", *names], capture_output=True, text=True)
    assert not [line for line in done.stderr.splitlines() if "srv-" in line]
