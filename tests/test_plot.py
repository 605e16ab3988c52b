# SPDX-License-Identifier: Apache-2.0
"""The picture of a boot: well formed, a row for each disk and group, whatever the report says."""

import xml.etree.ElementTree as xml

import pytest

from unlock.boot import plot
from unlock.host import report

SVG = "{http://www.w3.org/2000/svg}"


def texts(record: report.Report) -> list[str]:
    return [each.text or "" for each in xml.fromstring(plot.svg(record)).iter(f"{SVG}text")]


def test_a_boot_is_a_picture_with_a_row_for_each_disk_and_group() -> None:
    record = report.Report("early-boot")
    for kind in ("start", "tpm"):
        record.add_event(kind)
    record.set_verdict("unsealed")
    record.add_event("capped")
    for name in ("data-a", "data-b"):
        record.set_disk(f"/dev/{name}", "waiting", name=name, seen=report.now() - 1)
    record.set_disk("/dev/data-a", "opened")
    record.set_disk("/dev/data-b", "timed-out", "after 20 s")
    record.set_group("data", "failed")
    found = texts(record)
    assert {"agent", "data-a", "data-b", "group data", "timed-out"} < set(found)
    assert found[0].startswith("unlock: unsealed, 1 of 2 disks open")
    drawn = plot.svg(record)
    assert drawn.count("<title>activation:") == 1
    assert all(f"<title>{each}" in drawn for each in ("waits for the TPM", "unseal", "cap", "header read"))


def test_a_boot_that_came_to_nothing_is_a_picture_too() -> None:
    record = report.Report("early-boot")
    assert texts(record)[0].startswith("unlock: no verdict, 0 of 0")
    record.add_event("start")
    record.set_verdict("no-tpm")
    record.set_disk("/dev/<x>&", "foreign")
    assert "/dev/<x>&" in texts(record)


@pytest.mark.parametrize("arguments", (["--svg"], ["--svg", "--boot", "--json"]))
def test_the_picture_is_of_a_boot_and_nothing_else(arguments: list[str]) -> None:
    from unlock import cli
    from unlock.errors import Usage

    with pytest.raises(Usage, match="--svg"):
        cli.cli(["status", *arguments])
