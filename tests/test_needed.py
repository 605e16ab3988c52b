# SPDX-License-Identifier: Apache-2.0
"""The disks that the root needs: whatever a header became, no prompt follows that does not check it. Real headers."""

import copy
import json
import os
from collections.abc import Callable
from pathlib import Path
from random import Random
from typing import Any

import pytest

from tests.lab.hostile import HOST, SIZE, Lab, header, render
from tests.test_hostile import CHANGED_BYTES, CHANGED_JSON
from unlock.boot.activation import GroupOpener, Unwrap
from unlock.disks import disk_keys
from unlock.disks.udev import Disk
from unlock.host import needed, this_boot
from unlock.host.report import HARMLESS, Report
from unlock.paths import Paths
from unlock.tpm.record import Needs

ROOT = "data-a"
"""The mapping of the victim."""


@pytest.fixture(scope="module")
def lab(tmp_path_factory: pytest.TempPathFactory) -> Lab:
    return Lab(tmp_path_factory.mktemp("lab"))


class Early:
    """A boot whose crypttab has a line for the victim. `needs`: what the TPM says."""

    def __init__(self, folder: Path, lab: Lab, needs: Needs, name: str = ROOT) -> None:
        self.lab, self.paths = lab, Paths(str(folder))
        os.makedirs(self.paths.run)
        Path(self.paths.of_this_boot("lines")).write_text(f"{name} {lab.victim}\nusr\n")
        needed.write_needs(self.paths, needs)

    def sees(self, unwrap: Unwrap | None, host: str = HOST, marked: bool = True) -> str:
        """The outcome of the victim. `marked`: udev takes it for LUKS2."""
        self.record = record = Report("test")
        opener = GroupOpener(host, unwrap, record)
        for path in (self.lab.victim, self.lab.honest) if marked else (self.lab.honest,):
            opener.add_disk(Disk(str(path), path.name, "", "", "", SIZE, 0.0))
        opener.read_headers()
        opener.wipe()
        this_boot.publish(self.paths, record)
        return record.outcome(str(self.lab.victim))

    @property
    def stock_prompt(self) -> bool:
        """Whether the boot scripts let it follow."""
        return not os.path.exists(self.paths.of_this_boot("altered"))


def changed(lab: Lab, name: str) -> str:
    """Writes a hostile header; what early boot says of it where the root does not need it."""
    if name in CHANGED_BYTES:
        CHANGED_BYTES[name][0](lab)
        return CHANGED_BYTES[name][1]
    fields = copy.deepcopy(lab.fields)
    CHANGED_JSON[name].change(lab, fields)
    lab.put(header(lab.front, render(fields, Random(0))))
    return CHANGED_JSON[name].outcome


@pytest.mark.parametrize("name", [*CHANGED_JSON, *CHANGED_BYTES])
def test_no_header_of_a_root_disk_that_this_host_did_not_write_is_harmless(lab: Lab, name: str, tmp_path: Path) -> None:
    """Unsealed, and refused with the recovery key typed: either it opens, or it is altered, or the key is not its."""
    outcome = changed(lab, name)
    unsealed = Early(tmp_path / "unsealed", lab, Needs.of([ROOT]))
    found = unsealed.sees(lab.by_tpm)
    assert found == (outcome if outcome in ("waiting", "tampered") else "altered")
    assert unsealed.stock_prompt == (outcome == "waiting")
    assert (found in HARMLESS) == (outcome == "waiting")
    refused = Early(tmp_path / "refused", lab, Needs.of([ROOT]))
    found = refused.sees(None, host="")
    assert found in ("no-key", "altered")
    assert refused.stock_prompt == (found == "no-key")

    def by_recovery_key(header: Any, each: Any) -> Any:
        return disk_keys.dek_by_checked_recovery_key(header, each, lab.recovery)

    found = refused.sees(by_recovery_key, host="")
    assert found in ("waiting", "no-key") or not refused.stock_prompt
    assert needed.is_unproven(refused.paths, refused.record) == (found == "no-key"), "the prompt lets none follow"


def no_token(lab: Lab, fields: dict[str, Any]) -> None:
    """What the thief of the issue does: plain text behind genuine keyslots, and no token."""
    fields["segments"]["0"]["encryption"] = "cipher_null-ecb"
    fields["tokens"].clear()


def another_digest(lab: Lab, fields: dict[str, Any]) -> None:
    """Two digests cover the data: stock cryptsetup opens it by the first."""
    fields["segments"]["0"]["encryption"] = "cipher_null-ecb"
    fields["digests"]["1"] = {**fields["digests"]["0"], "keyslots": []}


def another_host(lab: Lab, fields: dict[str, Any]) -> None:
    fields["segments"]["0"]["encryption"] = "cipher_null-ecb"
    fields["tokens"]["0"]["host"] = "cd" * 16


def another_name_of_the_cipher(lab: Lab, fields: dict[str, Any]) -> None:
    """The recovery key's keyslot is not one that our prompt would try; stock cryptsetup tries it."""
    fields["segments"]["0"]["encryption"] = "cipher_null-ecb"
    fields["keyslots"]["0"]["area"]["encryption"] = "capi:xts(aes)-plain64"


def test_a_typed_key_that_proves_nothing_is_not_followed_by_a_prompt_that_checks_nothing(
    lab: Lab, tmp_path: Path
) -> None:
    fields = copy.deepcopy(lab.fields)
    another_name_of_the_cipher(lab, fields)
    lab.put(header(lab.front, json.dumps(fields).encode()))
    early = Early(tmp_path, lab, Needs.of([ROOT]))
    assert early.sees(lambda container, each: disk_keys.dek_by_checked_recovery_key(container, each, lab.recovery))
    assert early.record.outcome(str(lab.victim)) == "no-key"
    assert needed.is_unproven(early.paths, early.record)
    needed.write_needs(early.paths, Needs())
    assert not needed.is_unproven(early.paths, early.record)


@pytest.mark.parametrize("change", [no_token, another_digest, another_host])
def test_plaintext_behind_genuine_keyslots_is_told_and_without_the_tpms_word_it_is_not(
    lab: Lab, change: Callable[[Lab, dict[str, Any]], None], tmp_path: Path
) -> None:
    fields = copy.deepcopy(lab.fields)
    change(lab, fields)
    lab.put(header(lab.front, json.dumps(fields).encode()))
    told = Early(tmp_path / "told", lab, Needs.of([ROOT]))
    assert (told.sees(lab.by_tpm), told.stock_prompt) == ("altered", False)
    silent = Early(tmp_path / "silent", lab, Needs())
    assert silent.sees(lab.by_tpm) in ("foreign", "malformed", "other-host") and silent.stock_prompt


@pytest.mark.parametrize("needs", [Needs(), Needs.of(["root", "usr"])], ids=["data alone", "another root"])
def test_a_disk_that_was_never_adopted_is_left_alone(lab: Lab, needs: Needs, tmp_path: Path) -> None:
    """A swap disk in the initramfs's crypttab; a host of data groups alone."""
    changed(lab, "no token")
    early = Early(tmp_path, lab, needs)
    assert (early.sees(lab.by_tpm), early.stock_prompt) == ("foreign", True)


def test_more_than_the_tpm_has_room_for_means_every_line(lab: Lab, tmp_path: Path) -> None:
    changed(lab, "no token")
    early = Early(tmp_path, lab, Needs.of(map(str, range(13))))
    assert (early.sees(lab.by_tpm), early.stock_prompt) == ("altered", False)


def test_what_is_not_luks2_at_all_is_altered(lab: Lab, tmp_path: Path) -> None:
    """udev does not mark it, so early boot reads nothing of it: LUKS1, or a file system with the UUID of crypttab."""
    changed(lab, "LUKS1")
    early = Early(tmp_path, lab, Needs.of([ROOT]))
    assert (early.sees(lab.by_tpm, marked=False), early.stock_prompt) == ("altered", False)


def test_a_copy_is_no_matter_once_the_root_is_open(lab: Lab, tmp_path: Path) -> None:
    """crypttab's UUID leads to a copy without a token, beside the disk itself."""
    changed(lab, "no token")
    early = Early(tmp_path, lab, Needs.of([ROOT]))
    record = Report("test")
    record.set_disk("/dev/genuine", "opened", name=ROOT)
    record.set_disk(str(lab.victim), "foreign")
    this_boot.publish(early.paths, record)
    assert early.stock_prompt and record.outcome(str(lab.victim)) == "foreign"


def test_the_boot_scripts_get_the_names_of_what_the_root_needs_also_of_disks_that_are_not_here(
    lab: Lab, tmp_path: Path
) -> None:
    early = Early(tmp_path, lab, Needs.of(["usr"]))
    changed(lab, "nothing")
    early.sees(lab.by_tpm)
    assert Path(early.paths.of_this_boot("needed")).read_text() == "usr\n"


def test_the_names_of_a_crashed_agent_are_corrected_before_the_prompt(lab: Lab, tmp_path: Path) -> None:
    """It has ended before the scripts of dracut listed what a stock prompt would open."""
    early = Early(tmp_path, lab, Needs.of([ROOT]))
    listed, names = (Path(early.paths.of_this_boot(each)) for each in ("lines", "needed"))
    lines = listed.read_text()
    listed.unlink()
    names.write_text("\n")
    assert needed.list_needed(early.paths) == [] and names.read_text() == "\n"
    listed.write_text(lines)
    assert needed.list_needed(early.paths) == [(ROOT, str(lab.victim))] and names.read_text() == f"{ROOT}\n"


@pytest.mark.parametrize("text", [None, "", "xyz", "00", "ff" * 49, "0d" + "00" * 48])
def test_what_the_tpm_says_may_be_missing(tmp_path: Path, text: str | None) -> None:
    paths = Paths(str(tmp_path))
    os.makedirs(paths.run)
    if text is not None:
        Path(paths.of_this_boot("needs")).write_text(text)
    assert needed.read_needs(paths) == Needs()
