# SPDX-License-Identifier: Apache-2.0
"""`unlock disk encrypt` in a process of its own, with a copy of /var/lib/unlock for each time that it is durable: for
logs of what it writes (tests/lab/cuts.py). Arguments: folder of the host, disk, file of the recovery key, folder for
the copies."""

import ctypes
import os
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from unlock.disks import encrypt, find
from unlock.errors import TpmAbsent
from unlock.host.state import State
from unlock.operations import encrypt_disk
from unlock.paths import Paths
from unlock.run import ENVIRONMENT

NO_TPM = "device:/dev/unlock-test-absent"


def look(disk: str) -> find.Look:
    return lambda: find.read_headers([find.Found(disk, "")])


def main(home: str, disk: str, recovery: str, copies: str) -> None:
    paths = Paths(home)
    number = 0

    def marked(work: Callable[..., Any]) -> Callable[..., Any]:
        def then(*arguments: Any) -> Any:
            nonlocal number
            result = work(*arguments)
            number += 1
            shutil.copytree(os.path.dirname(paths.state), Path(copies, str(number)))
            ctypes.CDLL(None).writelog_mark(number)
            return result

        return then

    ENVIRONMENT.update(
        {name: value for name, value in os.environ.items() if "WRITELOG" in name or name == "LD_PRELOAD"}
    )
    encrypt_disk.VOLATILE = ()  # all of this host is in memory
    State.save = marked(State.save)  # type: ignore[method-assign]
    encrypt.sync = marked(encrypt.sync)
    encrypt_disk.sync_folder = marked(encrypt_disk.sync_folder)  # type: ignore[attr-defined]
    choices = encrypt_disk.Choices(disk, "photos", recovery_file=recovery)
    try:
        encrypt_disk.encrypt_disk(paths, choices, lambda done, size: False, look=look(disk), tcti=NO_TPM)
    except TpmAbsent:
        pass


if __name__ == "__main__":
    main(*sys.argv[1:])
