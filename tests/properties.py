# SPDX-License-Identifier: Apache-2.0
"""Properties over many made-up cases, each batch in a child whose CPU time and memory are limited.

A test module registers its own in `PROPERTIES`; `make test` runs each from a seed of the commit, `make soak` all
of them for an hour from random ones. A case is a function of the seed and its number, so that one that fails runs
again.
"""

import json
import mmap
import os
import resource
import signal
import struct
import sys
import tempfile
import traceback
from collections.abc import Callable, Iterable
from pathlib import Path
from random import Random
from types import CodeType, FunctionType
from typing import Any, NamedTuple

CPU = 3.0
"""Seconds for one case; a usual one takes some milliseconds."""
WALL = 1800
"""Seconds for one batch, for what hangs without using the CPU."""
MEMORY = 64 << 20
"""Bytes that a batch may add to what the process has, at the worst moment of any case."""
BATCH = 1000
TRACED = 5
"""One case in so many is traced for the line coverage, which makes it slow."""


class Property(NamedTuple):
    """`prepare` makes in a folder in memory what the cases of a batch share; `case` gives whether the outer checks
    let it through, and raises AssertionError when the property does not hold."""

    name: str
    cases: int
    """How many `make test` runs; a multiple of BATCH."""
    prepare: Callable[[Path], Any]
    case: Callable[[Any, Random], bool]
    parsers: tuple[Any, ...] = ()
    """Functions whose line coverage is told: what these and the other properties of one run reach together."""


class Result(NamedTuple):
    cases: int
    inside: int
    """Cases that got past the outer checks."""
    lines: frozenset[tuple[str, int]]
    """(file, line) of its parsers that were run."""

    def __add__(self, other: Any) -> "Result":
        return Result(self.cases + other.cases, self.inside + other.inside, self.lines | other.lines)


NOTHING = Result(0, 0, frozenset())


def run(each: Property, seed: int, numbers: Iterable[int]) -> Result:
    """One batch. Raises AssertionError that names seed and case, also when the child was killed for its greed."""
    at = mmap.mmap(-1, 8)
    with tempfile.TemporaryDirectory(dir="/dev/shm") as folder:
        read, write = os.pipe()
        pid = os.fork()
        if pid == 0:
            status = 1
            try:
                os.close(read)
                try:
                    said = json.dumps(_batch(each, seed, numbers, Path(folder), at))
                    status = 0
                except BaseException:
                    said = traceback.format_exc()
                with os.fdopen(write, "w") as pipe:
                    pipe.write(said)
            finally:
                os._exit(status)
        os.close(write)
        try:
            with os.fdopen(read) as pipe:
                said = pipe.read()
        except BaseException:  # the test's time is over
            os.kill(pid, signal.SIGKILL)
            raise
        finally:
            status = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
    if status:
        (number,) = struct.unpack("q", at)
        raise AssertionError(f"{each.name}: seed {seed} case {number}: status {status}\n{said}")
    cases, inside, lines = json.loads(said)
    return Result(cases, inside, frozenset((file, line) for file, line in lines))


def _batch(
    each: Property, seed: int, numbers: Iterable[int], folder: Path, at: mmap.mmap
) -> tuple[int, int, list[tuple[str, int]]]:
    shared = each.prepare(folder)
    size = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (size + 16 * MEMORY, resource.RLIM_INFINITY))
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    signal.signal(signal.SIGPROF, signal.SIG_DFL)
    signal.alarm(WALL)
    codes = {code for function in each.parsers for code in _codes(function)}
    lines: set[tuple[str, int]] = set()
    cases = inside = 0
    for number in numbers:
        at[:] = struct.pack("q", number)
        signal.setitimer(signal.ITIMER_PROF, CPU)
        if number % TRACED == 0:
            sys.settrace(_tracer(codes, lines))
        try:
            inside += each.case(shared, Random(f"{each.name} {seed} {number}"))
        finally:
            sys.settrace(None)
        assert (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) << 10 < MEMORY, "it took too much memory"
        cases += 1
    return cases, inside, sorted(lines)


# Line coverage


def executable(function: Any) -> set[tuple[str, int]]:
    """(file, line) of every line in the body of a function, and in those inside it."""
    return {
        (code.co_filename, line)
        for code in _codes(function)
        for _, _, line in code.co_lines()
        if line is not None and line != code.co_firstlineno
    }


def _codes(function: Any) -> list[CodeType]:
    function = function.fget if isinstance(function, property) else getattr(function, "__func__", function)
    assert isinstance(function, FunctionType), function
    found, new = [], [function.__code__]
    while new:
        code = new.pop()
        found.append(code)
        new += [each for each in code.co_consts if isinstance(each, CodeType)]
    return found


def _tracer(codes: set[CodeType], lines: set[tuple[str, int]]) -> Any:
    def inside(frame: Any, event: str, _: object) -> Any:
        if event == "line":
            lines.add((frame.f_code.co_filename, frame.f_lineno))
        return inside

    return lambda frame, event, _: inside if frame.f_code in codes else None


def told(results: dict[Property, Result], seed: int | str) -> list[str]:
    """What to print of a run."""
    said = [
        f"{each.name}: {result.cases} cases from seed {seed}, {result.inside} past the outer checks"
        for each, result in results.items()
    ]
    whole = {line for each in results for function in each.parsers for line in executable(function)}
    run = {line for result in results.values() for line in result.lines}
    for file in sorted({file for file, _ in whole}):
        of_file = {line for name, line in whole if name == file}
        missing = sorted(line for line in of_file if (file, line) not in run)
        missed = f" (not {', '.join(map(str, missing))})" if missing else ""
        said.append(f"parsers in {Path(file).name}: {len(of_file) - len(missing)} of {len(of_file)} lines{missed}")
    return said
