# SPDX-License-Identifier: Apache-2.0
"""`make soak`: every property of every test module in turn, from random seeds, for SECONDS (3600).

`python -m tests.soak NAME SEED CASE` runs one case again.
"""

import importlib
import os
import secrets
import sys
import time
from pathlib import Path

from tests.properties import BATCH, NOTHING, Property, run, told


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
    print("\n".join(told(results, "random")))


if __name__ == "__main__":
    main()
