# SPDX-License-Identifier: Apache-2.0
"""Runs other programs without a shell, in a fixed environment. Secrets go only through standard input and output."""

import os

from .errors import CommandFailed
from .secret import Secret, taken

ENVIRONMENT = {"PATH": "/usr/sbin:/usr/bin:/sbin:/bin", "LC_ALL": "C"}
_LINE = 300
"""Characters of a program's error message that are passed on."""


def run(argv: list[str], stdin: bytes = b"", timeout: float = 600) -> str:
    """Runs a program and returns its standard output. `timeout` is in seconds.

    Raises CommandFailed with the line of standard error that has the word error, else with its last line.
    """
    import subprocess  # 10 ms, and early boot rarely needs it

    try:
        done = subprocess.run(argv, input=stdin, capture_output=True, env=ENVIRONMENT, timeout=timeout)
    except FileNotFoundError as error:
        raise CommandFailed(f"{argv[0]} is not installed", code="command-missing") from error
    except subprocess.TimeoutExpired as error:
        raise CommandFailed(f"{argv[0]} did not finish in {timeout:.0f} s") from error
    if done.returncode:
        words = done.stderr.decode("utf-8", "replace").strip().splitlines() or [f"status {done.returncode}"]
        said = next((line for line in words if "error" in line.lower()), words[-1])
        raise CommandFailed(f"{' '.join(argv[:2])}: {said[:_LINE]}")
    return done.stdout.decode("utf-8", "replace")


def run_for_secret(argv: list[str], most: int, timeout: float) -> Secret:
    """Runs a program that prints a secret of at most `most` bytes, and returns that byte by byte. It gets no terminal:
    it must not ask. After `timeout` seconds it is killed with what it started.

    Raises CommandFailed with its last line of standard error, also when it prints nothing or too much.
    """
    import select
    import signal
    import subprocess
    import tempfile
    import time

    answer = bytearray(most + 1)
    size, end = 0, time.monotonic() + timeout
    with tempfile.TemporaryFile() as words:
        try:
            program = subprocess.Popen(
                argv,
                stdin=subprocess.DEVNULL,
                stdout=subprocess.PIPE,
                stderr=words,
                env=ENVIRONMENT,
                start_new_session=True,
            )
        except FileNotFoundError as error:
            raise CommandFailed(f"{argv[0]} is not installed", code="command-missing") from error
        try:
            assert program.stdout
            with memoryview(answer) as room, program.stdout:
                while select.select([program.stdout], [], [], max(0.0, end - time.monotonic()))[0]:
                    count = os.readv(program.stdout.fileno(), [room[size:]]) if size <= most else 0
                    if not count:
                        break
                    size += count
                else:
                    raise CommandFailed(f"{argv[0]} did not finish in {timeout:.0f} s")
            status = program.wait(max(0.1, end - time.monotonic()))
            if status or not 0 < size <= most:
                words.seek(0)
                lines = words.read(1 << 16).decode("utf-8", "replace").strip().splitlines()
                said = lines[-1] if lines else f"status {status}" if status else f"it printed {size} bytes"
                raise CommandFailed(f"{' '.join(argv[:3])}: {said[:_LINE]}")
            return taken(answer, size)
        except subprocess.TimeoutExpired as error:
            raise CommandFailed(f"{argv[0]} did not finish in {timeout:.0f} s") from error
        finally:
            answer[:] = bytes(len(answer))
            if program.poll() is None:
                os.killpg(program.pid, signal.SIGKILL)
                program.wait()
