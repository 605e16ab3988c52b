# SPDX-License-Identifier: Apache-2.0
"""`make soak`: every property of every test module in turn, from random seeds, for SECONDS (3600).

`python -m tests.soak NAME SEED CASE` runs one case again. Then CUTS random power cuts of each of POWER_CUTS.
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
POWER_CUTS = ("tests/test_rekey_deep_cuts.py::test_after_a_cut_it_opens_and_finishes",)
"""Tests that try as many random cuts as UNLOCK_CUTS says, 100 in `make test`. They need root."""


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
    """The exit status of pytest."""
    command = [sys.executable, "-m", "pytest", "-q", "-n0", "-m", "root", *POWER_CUTS]
    return subprocess.run(command, env={**os.environ, "UNLOCK_CUTS": str(CUTS)}, check=False).returncode


if __name__ == "__main__":
    main()
