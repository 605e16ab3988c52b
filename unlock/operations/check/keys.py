# SPDX-License-Identifier: Apache-2.0
"""Checks the keys that the TPM does not keep: the recovery key, and the key manager."""

from collections.abc import Iterator
from contextlib import closing

from ...errors import UnlockError
from ...host.state import State
from ...keys import access
from ...paths import Paths
from ...secret import Secret
from .finding import NOTE, SAFE, UNPROVEN, Finding


def check_recovery_key(state: State) -> Iterator[Finding]:
    """No disk that opens by itself needs it. A disk that does not, opens with nothing else."""
    if not state.has_recovery_key:
        yield Finding("recovery key", UNPROVEN, "there is none: a refused boot is the end", "unlock disk adopt")
        return
    uuids = [member.uuid for group in state.groups.values() for member in group.members]
    tested = sum(uuid in state.recovery.tested for uuid in uuids)
    if state.recovery.behind:
        yield Finding("recovery key", UNPROVEN, "some disks still have an earlier one", "unlock recovery new")
    elif tested < len(uuids):
        yield Finding("recovery key", NOTE, f"tested on {tested} of {len(uuids)} disk(s)", "unlock recovery test")
    else:
        yield Finding("recovery key", SAFE, "tested on every disk")


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
