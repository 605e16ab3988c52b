# SPDX-License-Identifier: Apache-2.0
"""Secret: bytes that are wiped at the end of their `with`, or when nobody has them any more, and that no repr shows.

Best effort: Python and the libraries below may have copied the bytes elsewhere in memory.
"""

import os

_live: dict[int, bytearray] = {}
"""The bytes of every Secret in this process, by id."""


class Secret:
    """Key material. `value` is the bytearray itself: keep no reference to it after the `with`."""

    __slots__ = ("value",)

    def __init__(self, value: bytes | bytearray | memoryview) -> None:
        self.value = _live[id(self)] = bytearray(value)

    def __del__(self) -> None:
        if value := _live.pop(id(self), None):  # an error may have kept it from its `with`
            value[:] = bytes(len(value))

    @classmethod
    def random(cls, size: int) -> "Secret":
        """`size` bytes from the kernel's random number generator."""
        return cls(os.urandom(size))

    def copy(self, start: int = 0, stop: int | None = None) -> "Secret":
        """The bytes from `start` to `stop`. A slice would leave them in freed memory, which nobody wipes."""
        with memoryview(self.value) as whole, whole[start:stop] as part:
            return Secret(part)

    def wipe(self) -> None:
        self.value[:] = bytes(len(self.value))

    def __enter__(self) -> "Secret":
        return self

    def __exit__(self, *_: object) -> None:
        self.wipe()

    def __len__(self) -> int:
        return len(self.value)

    def __bytes__(self) -> bytes:
        return bytes(self.value)

    def __eq__(self, other: object) -> bool:
        """Constant time."""
        import hmac

        return isinstance(other, Secret) and hmac.compare_digest(self.value, other.value)

    __hash__ = None  # type: ignore[assignment]

    def __repr__(self) -> str:
        return f"<Secret of {len(self.value)} bytes>"

    def __reduce__(self) -> str:
        raise TypeError("a Secret is never serialised")


def taken(buffer: bytearray, size: int) -> Secret:
    """The first bytes of a buffer, which is wiped. A bytearray that grows leaves copies behind: a secret is read into
    one that is large enough."""
    try:
        with memoryview(buffer) as whole, whole[:size] as part:
            return Secret(part)
    finally:
        buffer[:] = bytes(len(buffer))


def wipe_all() -> None:
    """Wipes every Secret of this process; a forked one wipes all that it inherited."""
    for value in _live.values():
        value[:] = bytes(len(value))
