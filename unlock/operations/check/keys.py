# SPDX-License-Identifier: Apache-2.0
"""Checks the keys that the TPM does not keep: the recovery key, and the key manager."""

from collections.abc import Iterator
from contextlib import closing

from ...disks import find, luks
from ...disks.groups import Member
from ...errors import UnlockError
from ...host.state import State
from ...keys import access
from ...paths import Paths
from ...secret import Secret
from .finding import NOTE, SAFE, UNPROVEN, Finding


def check_recovery_key(state: State, present: dict[str, list[find.Found]]) -> Iterator[Finding]:
    """No disk that opens by itself needs it. A disk that does not, opens with nothing else. A test counts while the
    header still has the keyslot that was tested."""
    if not state.has_recovery_key:
        yield Finding("recovery key", UNPROVEN, "there is none: a refused boot is the end", "unlock disk adopt")
        return
    members = [member for group in state.groups.values() for member in group.members]
    kept = {each.uuid: _has_recovery_keyslot(state, each, present) for each in members}
    tested = sum(each.uuid in state.recovery.tested and kept[each.uuid] is True for each in members)
    lost = [each.name for each in members if kept[each.uuid] is False]
    if lost:
        gone = f"its keyslot is gone from {', '.join(lost)}, or was changed"
        yield Finding("recovery key", UNPROVEN, gone, "unlock recovery new")
    elif state.recovery.behind:
        yield Finding("recovery key", UNPROVEN, "some disks still have an earlier one", "unlock recovery new")
    elif tested < len(members):
        yield Finding("recovery key", NOTE, f"tested on {tested} of {len(members)} disk(s)", "unlock recovery test")
    else:
        yield Finding("recovery key", SAFE, "tested on every disk")


def _has_recovery_keyslot(state: State, member: Member, present: dict[str, list[find.Found]]) -> bool | None:
    """Whether the disk has the keyslot that took the recovery key; None where that cannot be told."""
    node, salt = find.find_node(present, member), state.recovery.keyslots.get(member.uuid)
    if not node or not salt:
        return None
    try:
        with luks.Container(node) as container:
            return salt in map(container.salt, container.cheap_keyslots())
    except UnlockError:
        return None


def check_provider(
    paths: Paths, state: State, persistence: Secret | None, connect: access.Connect
) -> Iterator[Finding]:
    """Only a group with the policy `provider` needs the key manager to open."""
    needed = [group.name for group in state.groups.values() if group.policy == "provider"]
    what = f"provider {state.provider.name}"
    if state.provider.kind == "native":
        return
    try:
        with closing(connect(paths, state, persistence, state.provider)) as provider:
            health = provider.health()
        problems = [each.problem for each in health.endpoints if each.problem]
        good = len(health.endpoints) - len(problems)
        answer = f"{good} of {len(health.endpoints)} endpoint(s) answer"
        problem = str(problems[0]) if problems and not good else ""
    except UnlockError as error:
        good, answer, problem = 0, "it cannot be asked", str(error)
    if not needed:
        yield Finding(what, SAFE, f"{answer}; no group needs it to open")
    elif good:
        yield Finding(what, SAFE, f"{answer}; needed by {', '.join(needed)}")
    else:
        yield Finding(what, UNPROVEN, f"{problem}; needed by {', '.join(needed)}", "unlock provider test")
