# SPDX-License-Identifier: Apache-2.0
"""`unlock boot names KIND`: the names that a shell completes, one a line; nothing for whoever cannot read them.

It runs at each press of a key, so it imports little, reads one file and asks no disk, TPM or key manager.
"""

import os

from .. import log, strictjson
from ..disks.groups import is_name
from ..light import Any
from ..paths import Paths

KINDS = ("groups", "disks", "providers", "dumps")


def print_names(paths: Paths, kind: str) -> int:
    """Prints the names of one of KINDS. Returns 0 in any case."""
    try:
        found = _names(paths, kind)
    except (OSError, ValueError, RecursionError, LookupError, TypeError, AttributeError):
        found = []
    for name in sorted(found):
        log.show(name)
    return 0


def _names(paths: Paths, kind: str) -> list[str]:
    """Raises OSError, and what a file raises that is not as it should be."""
    if kind == "dumps":
        return [each for each in os.listdir(paths.dumps) if each.startswith(("core.", "kernel.")) and each.isascii()]
    with open(paths.state, encoding="ascii") as file:
        state: Any = strictjson.parse(file.read())
    if kind == "groups":
        found = list(state["groups"])
    elif kind == "disks":
        found = [member["name"] for group in state["groups"].values() for member in group["members"]]
    else:
        found = [state["provider"]["name"], *state["others"]]
    return [each for each in found if is_name(each)]
