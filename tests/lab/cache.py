# SPDX-License-Identifier: Apache-2.0
"""A cache of directories that are slow to build. Removing it costs only time."""

import fcntl
import hashlib
import os
import shutil
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

ROOT = Path(os.environ.get("UNLOCK_CACHE", "/var/cache/unlock-lab"))
UNUSED = 3 * 3600  # seconds after which an entry is dropped that nobody asked for; longer than a test run


def key(*parts: str | bytes) -> str:
    """A short name for everything that goes into an entry."""
    digest = hashlib.sha256()
    for part in parts:
        data = part.encode() if isinstance(part, str) else part
        digest.update(len(data).to_bytes(8, "big") + data)
    return digest.hexdigest()[:16]


def entry(name: str, make: Callable[[Path], None]) -> Path:
    """The directory `name` of the cache, made by `make(directory)` if it is not there.

    It appears whole or not at all; a second process that wants the same one waits for the first.
    """
    ROOT.mkdir(parents=True, exist_ok=True)
    final = ROOT / name
    with _locked(ROOT / f"{name}.lock"):
        if not final.exists():
            work = ROOT / f"{name}.new"
            shutil.rmtree(work, ignore_errors=True)  # what an interrupted run left
            work.mkdir()
            make(work)
            work.rename(final)
        os.utime(final)
    return final


def prune(prefix: str) -> None:
    """Drop the entries `prefix`* that have not been asked for in UNUSED seconds."""
    for old in ROOT.glob(f"{prefix}*"):
        if old.is_dir() and time.time() - old.stat().st_mtime > UNUSED:
            shutil.rmtree(old, ignore_errors=True)


@contextmanager
def scratch() -> Iterator[Path]:
    """An empty directory, gone afterwards."""
    with tempfile.TemporaryDirectory(prefix="scratch-", dir=ROOT) as directory:
        yield Path(directory)


@contextmanager
def _locked(path: Path) -> Iterator[None]:
    with path.open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield
