# SPDX-License-Identifier: Apache-2.0
"""`unlock disk decrypt` in a process of its own, with a copy of what is in /var and /etc for each time that it is
durable: for logs of what it writes (tests/lab/cuts.py). Arguments: folder of the host, device, bytes of a hotzone,
folder for the copies."""

import ctypes
import os
import shutil
import sys
from pathlib import Path
from typing import Any

from tests.decrypting import look
from unlock.disks import reencrypt
from unlock.errors import TpmAbsent
from unlock.host.state import State
from unlock.operations import decrypt_disk
from unlock.paths import Paths

NO_TPM = "device:/dev/unlock-test-absent"


def keep(paths: Paths, folder: Path) -> None:
    shutil.copytree(os.path.dirname(paths.state), folder)
    shutil.copy(paths.config, folder / "unlock.toml")


def put_back(paths: Paths, folder: Path) -> None:
    var = os.path.dirname(paths.state)
    shutil.rmtree(var)
    shutil.copytree(folder, var)
    os.replace(os.path.join(var, "unlock.toml"), paths.config)


def main(home: str, node: str, hotzone: str, copies: str) -> None:
    paths = Paths(home)
    number = 0
    save = State.save

    def marked(state: Any) -> None:
        nonlocal number
        save(state)
        number += 1
        keep(paths, Path(copies, str(number)))
        ctypes.CDLL(None).writelog_mark(number)

    State.save = marked  # type: ignore[method-assign,assignment]
    reencrypt.HOTZONE = int(hotzone)
    try:
        decrypt_disk.decrypt_disk(paths, "photos-0", lambda done, size: False, look=look(node), tcti=NO_TPM)
    except TpmAbsent:
        pass


if __name__ == "__main__":
    main(*sys.argv[1:])
