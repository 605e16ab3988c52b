# SPDX-License-Identifier: Apache-2.0
"""`python alone.py ...` is that Python in a user namespace of its own, with every uid and gid in it.

Root is root there, of a user keyring of its own and of mounts of its own: two workers need not wait for each other.
What it cannot do is make device nodes and hear the kernel's events: tests that do are marked `root`.

The folder that UNLOCK_TEST_MEMORY names is in memory there, with a folder `files`: headers and states are flushed some
ten thousand times.
"""

import ctypes
import os
import sys

CLONE_NEWNS, CLONE_NEWUSER = 0x20000, 0x10000000


def main() -> None:
    inside, begun = os.getpid(), os.pipe()
    outside = os.fork()
    if not outside:
        os.close(begun[1])
        os.read(begun[0], 1)  # until the namespace is there
        for kind in "uid", "gid":
            with open(f"/proc/{inside}/{kind}_map", "w") as file:
                file.write(f"0 0 {2**32 - 1}")
        os._exit(0)
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.unshare(CLONE_NEWUSER | CLONE_NEWNS):
        raise OSError(ctypes.get_errno(), "no user namespace of its own")
    os.close(begun[1])
    if os.waitpid(outside, 0)[1]:
        raise OSError("the user namespace has no users")
    os.close(begun[0])
    if folder := os.environ.get("UNLOCK_TEST_MEMORY"):
        if libc.mount(b"none", os.fsencode(folder), b"tmpfs", 0, b"mode=700"):
            raise OSError(ctypes.get_errno(), f"no memory at {folder}")
        os.mkdir(f"{folder}/files", 0o700)
    os.execv(sys.executable, [sys.executable, *sys.argv[1:]])


if __name__ == "__main__":
    main()
