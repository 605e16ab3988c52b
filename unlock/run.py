# SPDX-License-Identifier: Apache-2.0
"""Starts other programs: no shell, a fixed environment, secrets only through standard input."""

from .errors import CommandFailed

_ENVIRONMENT = {"PATH": "/usr/sbin:/usr/bin:/sbin:/bin", "LC_ALL": "C"}


def run(argv: list[str], stdin: bytes = b"", timeout: float = 600) -> str:
    """Runs a program and gives its standard output.

    `timeout` is in seconds. Raises CommandFailed with the program's own last words.
    """
    import subprocess  # 10 ms, and early boot rarely needs it

    try:
        done = subprocess.run(argv, input=stdin, capture_output=True, env=_ENVIRONMENT, timeout=timeout)
    except FileNotFoundError as error:
        raise CommandFailed(f"{argv[0]} is not installed", code="command-missing") from error
    except subprocess.TimeoutExpired as error:
        raise CommandFailed(f"{argv[0]} did not finish in {timeout:.0f} s") from error
    if done.returncode:
        words = done.stderr.decode("utf-8", "replace").strip().splitlines() or [f"status {done.returncode}"]
        raise CommandFailed(f"{' '.join(argv[:2])}: {words[-1]}")
    return done.stdout.decode("utf-8", "replace")
