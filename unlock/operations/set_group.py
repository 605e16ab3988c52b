# SPDX-License-Identifier: Apache-2.0
"""`unlock group set`: whether a boot opens a group without all of its members.

Of a group that the real root opens, unlock.toml says it: its gate reads that. Early boot has no unlock.toml, and root's
group is open before there is one. So the tokens of that group say it, authenticated as all that is in them; they are of
format 2 then, which an older initramfs does not read. No other token is.
"""

import re

from .. import journald, messages
from ..disks import devices, find
from ..disks.groups import Group
from ..errors import Malformed, Refused, Usage
from ..host import config
from ..host.lock import exclusive
from ..keys import access, rotation
from ..paths import Paths, write_atomically
from ..predict import initramfs_images
from ..predict.boot_tree import BootTree
from .consent import Consent, Plan
from .membership import mounts_needed_before_groups

TOKEN_VERSION = 2
"""The oldest format of a token that has the policy."""


def set_degraded(paths: Paths, name: str, wanted: str, consent: Consent, look: find.Look = find.look) -> list[str]:
    """Sets the policy, `allow` or `never`. Returns the names of members that get it when they are back.

    Raises Usage; Refused, code `old-initramfs`, where an installed initramfs would not open the disks; Malformed where
    unlock.toml cannot be edited; DiskFailed.
    """
    with exclusive(paths), access.Work(paths, look) as work:
        if name not in work.state.groups:
            raise Usage(f"there is no group {name}", "unlock status")
        group = work.state.groups[name]
        if not _is_opened_early(paths, group):
            if _edit_settings(paths, name, wanted, consent):
                _record(paths, name, wanted)
            return []
        if wanted == "allow":
            initramfs_images.require_tokens(BootTree(paths), TOKEN_VERSION)
        names = ", ".join(each.name for each in group.members)
        if not consent(Plan((f"new tokens on {names}",))):
            return []
        behind = sorted(rotation.set_degraded(work, group, wanted == "allow").behind)
        _record(paths, name, wanted)
        return behind


def _record(paths: Paths, name: str, wanted: str) -> None:
    words = f"group {name}: degraded = {wanted}"
    journald.record(paths, messages.GROUP_CHANGED, words, group=name, setting="degraded", value=wanted)


def _is_opened_early(paths: Paths, group: Group) -> bool:
    """Whether nothing but early boot can open the group in time."""
    names = {each.name for each in group.members}
    if names & devices.mappings_below("/", paths.root):
        return True
    return any(mounts_needed_before_groups(each, paths.root) for each in names)


def _edit_settings(paths: Paths, name: str, wanted: str, consent: Consent) -> bool:
    """Writes the setting into the group's table of unlock.toml, and leaves everything else as it is. False where it is
    not changed. Raises Refused."""
    before = config.load(paths.config)
    group = before.group(name)
    if group and group.degraded == wanted:
        return False
    line = f'degraded = "{wanted}"'
    if not consent(Plan((f"{line} into [group.{name}] of {paths.config}",))):
        return False
    if not group:
        group = config.GroupConfig(name, "", "", "", config.DEADLINE, degraded=wanted)
        config.append_table(paths.config, config.group_table(group))
        return True
    with open(paths.config, encoding="utf-8") as file:
        text = file.read()
    edited = _with_setting(text, name, line)
    expected = before._replace(groups={**before.groups, name: group._replace(degraded=wanted)})
    try:
        good = config.parse(edited) == expected
    except Malformed:
        good = False
    if not good:
        raise Refused(
            f"{paths.config} is written in a way that is not edited here", f"write {line} there", "not-edited"
        )
    write_atomically(paths.config, edited.encode(), mode=0o644)
    return True


def _with_setting(text: str, name: str, line: str) -> str:
    """The text with the line below the table's head, and without another such line in the table."""
    head = re.compile(rf'\s*\[\s*group\s*\.\s*"?{re.escape(name)}"?\s*\]\s*(#.*)?')
    lines: list[str] = []
    inside = False
    for each in text.splitlines():
        if re.match(r"\s*\[", each):
            inside = False
        if inside and re.match(r"\s*degraded\s*=", each):
            continue
        lines.append(each)
        if head.fullmatch(each):
            inside = True
            lines.append(line)
    return "\n".join(lines) + "\n"
