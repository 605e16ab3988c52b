# SPDX-License-Identifier: Apache-2.0
"""`unlock dump delete`."""

import os

from ... import journald, messages
from ...paths import Paths, sync_folder
from ..consent import Consent, Plan
from . import kept


def delete(paths: Paths, words: list[str], consent: Consent) -> list[str]:
    """Removes the dumps with these PIDs or names, without any all of them; returns their names. Raises Refused where
    one is not there: then all stay."""
    dumps = [kept.find_dump(paths, word) for word in words] if words else kept.list_dumps(paths)
    names = tuple(dict.fromkeys(each.name for each in dumps))
    plan = Plan(tuple(f"remove {name}" for name in names), names, words[0] if len(words) == 1 else "all")
    if not names or not consent(plan):
        return []
    for name in names:
        os.unlink(os.path.join(paths.dumps, name))
    sync_folder(paths.dumps)
    journald.record(paths, messages.DUMPS_DELETED, f"{len(names)} core dump(s) were deleted", dumps=names)
    return list(names)
