# SPDX-License-Identifier: Apache-2.0
"""What an operation says before it changes anything, and how a person agrees.

An operation makes all of its checks, then calls its `Consent` with the `Plan`, and only then begins: it writes its
journal record and takes the first step. A plan that is only shown (`--dry-run`) ends there.
"""

from collections.abc import Callable
from typing import NamedTuple


class Plan(NamedTuple):
    """What an operation is about to do."""

    steps: tuple[str, ...]
    """In order, one sentence each, without a full stop: `new tokens on data-a, data-b`."""
    destroys: tuple[str, ...] = ()
    """What is lost for good, one thing each: `all data on /dev/sdb (ext4)`. Empty when nothing is."""
    thing: str = ""
    """The disk or group that a person types to agree to that."""


Consent = Callable[[Plan], bool]
"""Returns True when the operation is to go on, False when the plan was only to be shown. Raises Refused, code
`not-confirmed`, when nobody agreed to what would be lost."""


def agree(plan: Plan) -> bool:
    """The consent of a caller that has asked already, or that destroys nothing."""
    return True
