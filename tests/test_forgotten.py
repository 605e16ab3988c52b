# SPDX-License-Identifier: Apache-2.0
"""A disk that was forgotten and is plugged in again: told as what it is, with what to type, and never opened."""

from pathlib import Path

import pytest

from tests.flowfixture import HOST, Host
from tests.test_degraded import names, opener
from unlock.boot import gate, journald
from unlock.boot.activation import GroupOpener
from unlock.disks import disk_keys, udev
from unlock.disks.groups import Member
from unlock.host import report, report_file
from unlock.operations import forget_disk, status


@pytest.fixture
def host(tmp_path: Path, key_cache: None) -> Host:
    """Of three disks, the last was forgotten as destroyed: its token is still under the keys of this host."""
    found = Host(tmp_path, 3)
    lost = found.disks.pop()
    assert forget_disk.forget_disk(found.paths, "data-2", destroyed=True, look=found.look)
    found.disks.append(lost)
    return found


def early_boot(host: Host) -> report.Report:
    """What early boot says of the disk, when the persistence key is another one."""
    (host.disks[0].parent / "other").touch()
    record = report.Report("early-boot")
    other = Host(host.folder / "elsewhere", 0)
    found = GroupOpener(HOST, lambda header, each: disk_keys.unwrap_volume_key(header, each, other.persistence), record)
    found.add_disk(udev.Disk(str(host.disks[2]), host.disks[2].name, "", "", "", 0, 0))
    found.read_headers()
    found.wipe()
    return record


def test_the_gate_opens_the_others_and_never_this_one(host: Host) -> None:
    found = opener(host, host.disks)
    assert found.report.outcome(str(host.disks[2])) == "forgotten"
    assert found.is_complete("data") and names(host, found) == ["data-0", "data-1"]
    found = opener(host, host.disks[2:])
    assert not found.groups, "nor by itself"
    record = report.Report("open data")
    found = gate._opener(host.state, "data", gate._by_recovery_key(host.recovery), record)
    found.add_disk(udev.Disk(str(host.disks[2]), host.disks[2].name, "", "", "", 0, 0))
    found.read_headers()
    found.wipe()
    assert record.outcome(str(host.disks[2])) == "forgotten" and not found.groups, "nor by the recovery key"


def test_status_says_which_disk_it_was_and_what_to_type(host: Host) -> None:
    found = status.read_status(host.paths, look=host.look)
    node = str(host.disks[2])
    (each,) = found.forgotten
    assert (each.name, each.group, each.device) == ("data-2", "data", node)
    text = status.to_text(found)
    assert f"{node} is data-2, which was forgotten" in text
    assert f"unlock disk erase {node}" in text and f"unlock disk add {node} --group data" in text
    assert status.to_json(found)["forgotten"] == [each._asdict()]
    del host.disks[2]
    assert not status.read_status(host.paths, look=host.look).forgotten, "not while it is away"


def test_what_early_boot_took_for_tampered_is_told_by_its_name(key_cache: None, host: Host) -> None:
    record = early_boot(host)
    node = str(host.disks[2])
    assert record.outcome(node) == "tampered", "it has no state"
    Path(host.paths.of_this_boot("report.json")).write_bytes(report_file.encode(record))
    assert status.read_boot(host.paths).outcome(node) == "forgotten"
    record.name_forgotten(host.state.forgotten)
    (entry,) = [each for each in journald.make_entries(record) if each.fields.get("UNLOCK_NODE") == node]
    assert entry.fields["UNLOCK_OUTCOME"] == "forgotten" and entry.priority == "6"


def test_a_disk_that_is_changed_and_was_not_forgotten_stays_tampered(host: Host) -> None:
    record = early_boot(host)
    record.name_forgotten(["another"])
    assert record.outcome(str(host.disks[2])) == "tampered"


def test_a_member_again_it_is_no_former_member_any_more(host: Host) -> None:
    with host.work() as work:
        (uuid,) = work.state.forgotten
        group = work.state.groups["data"]
        work.state.groups["data"] = group._replace(members=(*group.members, Member(uuid, "data-2", "")))
        work.state.save()
    assert not host.state.forgotten
