# SPDX-License-Identifier: Apache-2.0
"""`unlock disk flags`: changes flags in the header of a member, and renews the token that binds the header.

The token for the changed header is written first, beside the present one, so that one of the two is right whenever this
is killed. The same command then finishes.
"""

import os
from typing import Any

from .. import journald, messages
from ..disks import changes, disk_keys, find, luks, token
from ..disks.groups import Group, Member
from ..errors import Refused, Tampered, Usage
from ..host.lock import exclusive
from ..host.state import State
from ..keys import access
from ..paths import Paths
from ..strictjson import canonical


def change_flags(
    paths: Paths,
    device: str,
    *,
    add: frozenset[str],
    remove: frozenset[str],
    look: find.Look = find.look,
    connect: access.Connect = access.connect,
) -> frozenset[str]:
    """Returns the flags that the header has then; they count when the disk is opened next. Writes nothing if it has
    them already. Raises Usage, Refused, NotOurs, Tampered, DiskFailed, ProviderError.
    """
    if add & remove:
        raise Usage(f"{', '.join(sorted(add & remove))}: both to be set and cleared", "unlock disk flags --help")
    node = os.path.realpath(device)
    if not os.path.exists(node):
        raise Usage(f"{device} does not exist", "lsblk")
    with exclusive(paths), access.Work(paths, look, connect) as work:
        state = work.state
        if state.journal:
            raise Refused(f"`{state.to_finish}` is not finished", "run it again first", code="unfinished")
        with luks.Container(node) as container:
            group, member = _find_member(state, container)
            _check_authentic(work, container, group)
            wanted = container.flags.union(add) - remove
            before = container.flags
            facts = container.facts()
        disk_keys.drop_tokens_not_under(node, state.host, *work.persistence_keys(member.uuid))
        if wanted != before:
            facts = _change(work, node, group, member, wanted)
        state.headers[member.uuid] = canonical(facts).decode()
        state.save()
        journald.record(
            paths,
            messages.DISK_FLAGS,
            f"{member.name} ({member.uuid}): flags {', '.join(sorted(wanted)) or 'none'}",
            disk=member.name,
            uuid=member.uuid,
            group=group.name,
            value=sorted(wanted),
        )
        return wanted


def _find_member(state: State, container: luks.Container) -> tuple[Group, Member]:
    for group in state.groups.values():
        for member in group.members:
            if member.uuid == container.uuid:
                return group, member
    raise Refused(
        f"{container.device} is in no group of this host",
        f"unlock disk adopt {container.device} --group G",
        code="not-a-member",
    )


def _check_authentic(work: access.Work, container: luks.Container, group: Group) -> None:
    """Raises Tampered for a header that this host has not made a token for: a new token would make it authentic."""
    tokens = disk_keys.read_tokens(container, work.state.host)
    keys = work.persistence_keys(container.uuid)
    if not any(disk_keys.is_authentic(container, each, key) for each in tokens for key in keys):
        raise Tampered(
            f"{container.device} has another header than this host wrote",
            f"unlock disk adopt {container.device} --group {group.name}, which shows what differs",
            "changed-header",
        )


def _change(work: access.Work, node: str, group: Group, member: Member, wanted: frozenset[str]) -> dict[str, Any]:
    """Returns the facts of the header that it wrote."""
    state = work.state
    kek, _ = access.find_kek(work, group, {member.uuid: node})
    with (
        access.token_keys(work, kek=kek, mac_key=state.mac_key(work.persistence, member.uuid)) as keys,
        luks.Container(node) as container,
        luks.Container(node) as future,
        access.find_volume_key(work, container, group) as dek,
    ):
        changes.require_unchanged(future, container.facts())  # whose token gave the volume key
        future.set_flags(wanted, in_memory=True)
        facts = future.facts()
        new = disk_keys.make_token(future, state.host, group, member, dek, keys)
        container.set_token(token.encode(new))
        container.set_flags(wanted)
        disk_keys.drop_other_tokens(node, new, dek, keys)
    state.drop_old_key(member.uuid)
    return facts
