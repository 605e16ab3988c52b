# SPDX-License-Identifier: Apache-2.0
"""`unlock cache`: lists the keys in the key cache and where each came from, and flushes them."""

from .. import journald, messages
from ..disks import find
from ..errors import NoKey
from ..host import keyring, this_boot
from ..host.lock import exclusive
from ..host.state import State
from ..keys import access
from ..paths import Paths
from ..predict import allowed_states

_MEANING = {
    "unlock:persistence": "persistence key",
    "unlock:host": "host key",
    allowed_states.PIN_AUTH: "what the PIN makes",
}


def list_keys(paths: Paths) -> list[dict[str, str]]:
    """Each cached key: `key`, its name; `what`, its meaning; `source`. Never the key itself."""
    state = State.load(paths)
    sources = this_boot.key_sources(paths)
    keks = {access.cache_name(group.kek, group.generation): group.name for group in state.groups.values()}
    rows = []
    for name in keyring.names():
        what = _MEANING.get(name, "")
        if name in keks:
            what = f"KEK of group {keks[name]}"
        rows.append({"key": name, "what": what or "a former KEK", "source": sources.get(name, "not recorded")})
    return rows


def describe_flush(paths: Paths, look: find.Look = find.look) -> list[str]:
    """What this host cannot do until the next boot once the cache is flushed, a line each."""
    lines = [
        "no disk that comes late opens, and no group that is closed now",
        "no sync, rekey, switch, adopt or renew: they need the persistence key",
        "no change of the TPM's policy: no prediction for a new kernel, no window, and none that is open closes",
    ]
    try:
        work = access.Work(paths, look)
    except NoKey:
        return ["nothing more than now: the persistence key is not there"]
    if allowed_states.PIN_AUTH in keyring.names():
        lines.append("the PIN stays as it is, and is asked for at the next boot")
    with work:
        for group in work.state.groups.values():
            if group.behind:
                lines.append(f"group {group.name}: {len(group.behind)} disk(s) keep an earlier KEK")
            if group.policy == "provider":
                lines.append(f"group {group.name}: opens again only with the key manager")
    return lines


def flush(paths: Paths) -> list[str]:
    """Removes all of unlock's keys from the key cache; returns their names. What is open stays open."""
    with exclusive(paths):
        names = keyring.names()
        keyring.flush()
    journald.record(paths, messages.CACHE_FLUSHED, "the keys are out of the key cache until the next boot")
    return names
