# SPDX-License-Identifier: Apache-2.0
"""Runs other programs without a shell, in a fixed environment. Secrets go only through standard input."""

from .errors import CommandFailed

_ENVIRONMENT = {"PATH": "/usr/sbin:/usr/bin:/sbin:/bin", "LC_ALL": "C"}
_LINE = 300
"""Characters of a program's error message that are passed on."""


def run(argv: list[str], stdin: bytes = b"", timeout: float = 600) -> str:
    """Runs a program and returns its standard output. `timeout` is in seconds.

    Raises CommandFailed with the line of standard error that has the word error, else with its last line.
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
        said = next((line for line in words if "error" in line.lower()), words[-1])
        raise CommandFailed(f"{' '.join(argv[:2])}: {said[:_LINE]}")
    return done.stdout.decode("utf-8", "replace")
