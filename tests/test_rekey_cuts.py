# SPDX-License-Identifier: Apache-2.0
"""The power goes while a group gets a new KEK: every write and flush of every header, from a log of `unlock rekey`.

After each: with all that was not flushed, with nothing of it, and with a part. Each disk opens, by the TPM's key and by
the recovery key, and the same command finishes.
"""

import shutil
from pathlib import Path

import pytest

from tests.flowfixture import Host
from tests.test_leave_cuts import CUTS, Lab, Show, by_passphrase, by_token
from unlock.disks import disk_keys, luks
from unlock.host import keyring
from unlock.keys import rotation
from unlock.operations import rekey

pytestmark = [pytest.mark.timeout(900 + 2 * CUTS), pytest.mark.usefixtures("key_cache")]


def generations(host: Host) -> list[list[int]]:
    """Of the KEK in the tokens of each disk."""
    found = []
    for image in host.disks:
        with luks.Container(str(image)) as container:
            found.append([each.kek_generation for each in disk_keys.read_tokens(container, host.state.host)])
    return found


def test_rekey(tmp_path: Path, record_property: Show, monkeypatch: pytest.MonkeyPatch) -> None:
    host = Host(tmp_path, 3)
    state, begun = Path(host.paths.state), tmp_path / "begun"
    lab = Lab(host, record_property)

    def keep_state(*arguments: object) -> object:
        shutil.copy(state, begun)
        return rewrap(*arguments)  # type: ignore[arg-type]

    rewrap = rotation.rewrap_disks
    monkeypatch.setattr(rotation, "rewrap_disks", keep_state)
    for total in lab.states("rekey", lambda: rekey.rekey(host.paths, "data", host.look)):
        assert all(by_token(host, image, host.persistence) for image in host.disks), "each opens at the next boot"
        assert all(by_passphrase(image, host.recovery) for image in host.disks)
        found = generations(host)
        assert {number for each in found for number in each} <= {1, 2}
        total["all new"] += all(each == [2] for each in found)
        if total["states"] % 10 == 0:
            shutil.copy(begun, state)
            now = {image: image.read_bytes()[: 1 << 20] for image in host.disks}
            rekey.rekey(host.paths, "data", host.look)
            total["run again"] += 1
            assert generations(host) == [[2]] * 3 and host.state.journal is None
            for image, content in now.items():
                with image.open("r+b") as file:
                    file.write(content)
    assert generations(host) == [[2]] * 3
    keyring.flush()
