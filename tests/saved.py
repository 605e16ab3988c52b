# SPDX-License-Identifier: Apache-2.0
"""Files as they were, for tests that begin hundreds of times from there: what has changed since is written again, some
kilobytes of an image that is mostly holes."""

import os
from pathlib import Path

_PIECE = 64 << 10
_ZEROS = bytes(_PIECE)


class Saved:
    """`restore` makes the files what they are now. The files stay the same ones, open or not."""

    def __init__(self, *files: Path | str) -> None:
        self._contents = {Path(each): _pieces(Path(each)) for each in files}
        self._sizes = {each: each.stat().st_size for each in self._contents if each.is_file()}

    def restore(self, *files: Path | str) -> None:
        """All of them, or some."""
        for path in map(Path, files or self._contents):
            saved = self._contents[path]
            with path.open("r+b" if path.exists() else "w+b") as file:
                if path in self._sizes:
                    file.truncate(self._sizes[path])
                now = _pieces(path)
                for at in saved.keys() | now.keys():
                    if saved.get(at) != now.get(at):
                        file.seek(at)
                        file.write(saved.get(at, _ZEROS[: len(now.get(at, b""))]))


def _pieces(path: Path) -> dict[int, bytes]:
    """By offset, those that are not zeros alone."""
    found = {}
    with path.open("rb") as file:
        end = file.seek(0, os.SEEK_END)
        at = 0
        while at < end:
            if path.is_file():  # a block device has no holes
                try:
                    at = os.lseek(file.fileno(), at, os.SEEK_DATA) // _PIECE * _PIECE
                except OSError:  # ENXIO: the rest is a hole
                    break
            piece = os.pread(file.fileno(), _PIECE, at)
            if piece.strip(b"\0"):
                found[at] = piece
            at += _PIECE
    return found
