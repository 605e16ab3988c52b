# SPDX-License-Identifier: Apache-2.0
"""What `rekey --deep`, `disk encrypt` and `disk decrypt` share: they move all data of a disk while it may be in use.

no initramfs that could not open it ──> prepared: a token with the plan ──> begun: hotzone by hotzone
"""

import os
from collections.abc import Container
from typing import NamedTuple

from ..disks import disk_keys, find, luks, reencrypt, reencrypt_plan, token
from ..disks.groups import Member
from ..disks.reencrypt import Tell
from ..disks.reencrypt_plan import Plan
from ..errors import Refused
from ..keys.access import Work
from ..predict import initramfs_images
from ..predict.boot_tree import BootTree
from ..protect import hold_in_memory
from ..secret import Secret


class Begun(NamedTuple):
    """A disk whose header is where its data can move."""

    node: str
    plan: Plan
    operation: Secret
    mapping: str
    """'' for a disk that is closed."""

    def move(self, tell: Tell, hotzone: int = 0) -> None:
        """Until the end, or until `tell` returns True. `hotzone`: see reencrypt.Disk.run. Wipes the operation key."""
        with self.operation, reencrypt.Disk(self.node) as half:
            hold_in_memory()
            half.run(self.mapping, self.operation, tell, hotzone)


def require_initramfs(tree: BootTree) -> None:
    """Raises Refused, code `old-initramfs`, when an installed image does not read tokens of version 2. One without
    unlock opens no disk, and does not count. Raises CommandFailed for one that cannot be read."""
    for image in initramfs_images.list_images(tree):
        found = initramfs_images.read_contents(tree, image)
        if found.unlock and found.reads.get("token", 0) < token.VERSION:
            raise Refused(
                f"the unlock in {os.path.basename(image)} could not open a half re-encrypted disk",
                initramfs_images.how_to_rebuild(tree, image),
                code="old-initramfs",
            )


def require_node(work: Work, member: Member) -> str:
    """The node of the disk. Raises Refused when it is not here."""
    node = find.find_node(work.look(), member)
    if not node:
        raise Refused(f"{member.name} is not here", "plug it in; then: unlock operation resume", code="missing")
    return node


def find_plan_token(work: Work, container: luks.Container) -> token.Token | None:
    """The authentic token with the plan of a re-encryption. None where there is none. Raises Tampered when there is one
    that is not authentic and no other that is."""
    found = [each for each in disk_keys.read_tokens(container, work.state.host) if each.reencryption]
    for each in found:
        if disk_keys.is_authentic(container, each, work.persistence):
            return each
    if found:
        disk_keys.unwrap_volume_key(container, found[0], work.persistence).wipe()
    return None


def read_phase(work: Work, node: str) -> str:
    """'' where the disk has no token with a plan. Raises Tampered."""
    with luks.Container(node) as container:
        each = find_plan_token(work, container)
        return reencrypt_plan.phase(container, each.reencryption.plan) if each and each.reencryption else ""


def remove_preparation(work: Work, node: str, keyslots: Container[int]) -> None:
    """Removes the token with the plan from a disk of which no data has moved, and all but these keyslots."""
    with luks.Container(node) as container:
        for number, fields in container.tokens(token.TYPE):
            if fields.get("host") == work.state.host and fields.get("reencrypt"):
                container.remove_token(number)
        for slot in container.keyslots():
            if slot not in keyslots:
                container.remove_keyslot(slot)
