# SPDX-License-Identifier: Apache-2.0
"""`make soak`: every property of every test module in turn, from random seeds, for SECONDS (3600).

`python -m tests.soak NAME SEED CASE` runs one case again. Then CUTS random power cuts of each operation of POWER_CUTS.
"""

import importlib
import os
import secrets
import subprocess
import sys
import time
from pathlib import Path

from tests.properties import BATCH, NOTHING, Property, run, told

CUTS = 1000
POWER_CUTS = {
    "root": ("tests/test_rekey_deep_cuts.py::test_after_a_cut_it_opens_and_finishes",),
    "not root": (
        "tests/test_decrypt_cuts.py::test_power_cuts",
        "tests/test_encrypt_cuts.py::test_power_cuts",
        "tests/test_group_disks_cuts.py",
        "tests/test_heal_cuts.py",
        "tests/test_leave_cuts.py",
        "tests/test_rekey_cuts.py",
    ),
}
"""By their marker: tests that try as many random cuts as UNLOCK_CUTS says, of each operation; in `make test` 100, or
each write four times."""


def registered() -> dict[str, Property]:
    """PROPERTIES of all test modules that have them, by name."""
    found: dict[str, Property] = {}
    for path in sorted(Path(__file__).parent.glob("test_*.py")):
        if "PROPERTIES" in path.read_text():
            found |= {each.name: each for each in importlib.import_module(f"tests.{path.stem}").PROPERTIES}
    return found


def main() -> None:
    properties = registered()
    if sys.argv[1:]:
        name, its_seed, number = sys.argv[1:]
        print(run(properties[name], int(its_seed), [int(number)]))
        return
    seconds = int(os.environ.get("SECONDS") or 3600)
    print(f"{', '.join(properties)}: for {seconds} s", flush=True)
    end = time.monotonic() + seconds
    results = dict.fromkeys(properties.values(), NOTHING)
    while time.monotonic() < end:
        seed = secrets.randbelow(1 << 32)
        for name, each in properties.items():
            try:
                results[each] += run(each, seed, range(BATCH))
            except AssertionError as error:
                sys.exit(f"{error}\nagain: python -m tests.soak {name} {seed} CASE")
    print("\n".join(told(results, "random")), flush=True)
    sys.exit(cut_power())


def cut_power() -> int:
    """The worst exit status of pytest."""
    environment = {**os.environ, "UNLOCK_CUTS": str(CUTS)}
    worst = 0
    for marker, tests in POWER_CUTS.items():
        # what needs no root has a key cache of its own
        workers = ["-n0"] if marker == "root" else ["--alone", "-n1"]
        command = [sys.executable, "-m", "pytest", "-q", *workers, "-m", marker, *tests]
        worst = max(worst, subprocess.run(command, env=environment, check=False).returncode)
    return worst


if __name__ == "__main__":
    main()
