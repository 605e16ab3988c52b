# SPDX-License-Identifier: Apache-2.0
"""What coverage(1) keeps of a forked child: what the child itself has run.

Otherwise each child that ends writes all that its parent had run too, a fifth of a second for some hundred kilobytes.
"""

import os

import coverage


def forget_the_parent() -> None:
    """For this process, in each child that it forks."""
    recorder = coverage.Coverage.current()
    collector = getattr(recorder, "_collector", None)
    finder = getattr(recorder, "_inorout", None)
    if collector is None or finder is None:
        return

    def forget() -> None:
        for lines in collector.data.values():
            lines.clear()  # the same sets: functions that run now go on writing into them
        finder.find_possibly_unexecuted_files = lambda: ()  # the parent lists them

    os.register_at_fork(after_in_child=forget)
