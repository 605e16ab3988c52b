# SPDX-License-Identifier: Apache-2.0
"""What of unlock a machine runs: `make coverage`, which sets UNLOCK_COVER_MACHINES.

Such an image has the package python3-coverage, its initramfs too, and a launcher that records. A process leaves its
data file in the directory `coverage` that machine and host share. What is killed leaves none.
"""

import os
import shutil
from collections.abc import Callable
from pathlib import Path

from .uml.line import SHARED

WANTED = bool(os.environ.get("UNLOCK_COVER_MACHINES"))
PACKAGE = (
    "apt-get update -qq && DEBIAN_FRONTEND=noninteractive apt-get install -y -qq --no-install-recommends "
    "python3-coverage"
)
START = "from unlock.__main__ import main\n"
RECORD = f"""\
def record():
    import atexit, coverage
    place, ours = "{SHARED}/coverage/machine", "/usr/lib/unlock/unlock/*"
    recorder = coverage.Coverage(data_file=place, data_suffix=True, branch=True, include=[ours], config_file=False)
    end = os._exit

    def save(status=None):
        recorder.stop()
        try:
            recorder.save()
        except Exception as error:  # a unit that may not write there
            print(f"not recorded: {{error}}", file=sys.stderr)
        if status is not None:
            end(status)

    atexit.register(save)
    os._exit = save
    recorder.start()


if os.path.isdir("{SHARED}/coverage"):
    record()
"""


def prepare(tree: Path, chroot: Callable[[Path, str], None]) -> None:
    """Makes the tree one that records."""
    chroot(tree, PACKAGE)
    launcher = tree / "usr/sbin/unlock"
    text = launcher.read_text()
    assert text.count(START) == 1, f"{launcher} starts otherwise than it did"
    launcher.write_text(text.replace(START, RECORD + START))
    with (tree / "usr/lib/unlock/initramfs/manifest").open("a") as manifest:
        manifest.write("import coverage\nimport coverage.tracer\nimport coverage.sqldata\nimport sqlite3\n")


def begin(shared: Path) -> None:
    """Before a boot: where its processes leave what they record."""
    if WANTED:
        (shared / "coverage").mkdir()


def collect(shared: Path) -> None:
    """After a boot: its data files go to UNLOCK_COVERAGE."""
    if WANTED and (shared / "coverage").is_dir():
        for each in (shared / "coverage").iterdir():
            if not each.name.endswith("-journal"):
                shutil.move(each, Path(os.environ["UNLOCK_COVERAGE"], f"{shared.parent.parent.name}-{each.name}"))
        shutil.rmtree(shared / "coverage")
