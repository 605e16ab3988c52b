# SPDX-License-Identifier: Apache-2.0
"""What `group delete` and `disk release` share: a group ends, and its disks stay or are erased.

    state: no such group ──> crypttab, unlock.toml ──> TPM: the root does not need these disks ──> each disk: its token
    goes ──> state: nothing of the disks, the KEK to be retired; the journal closed ──> the KEK retired

So a boot in between never waits for a group that is half gone, and takes no disk for a tampered one.
"""

from collections.abc import Sequence

from .. import log
from ..disks import devices, find, fstab, luks, token
from ..disks.groups import Member
from ..errors import Refused
from ..host import config, this_boot, units
from ..host.state import State
from ..host.state_file import ReplacedKek
from ..keys import rotation
from ..keys.access import Work
from ..paths import Paths
from ..predict import allowed_states
from ..run import run


def check_root(paths: Paths, state: State, group: str, members: Sequence[Member], root: str = "/") -> None:
    """Raises Refused where the root file system lies on these disks, and other groups get their keys because unlock
    opens it."""
    others = sorted(state.groups.keys() - {group})
    if others and holds_root(members, root) and not allowed_states.unauthenticated_root(paths, state):
        raise Refused(
            f"the root file system lies on group {group}: when unlock does not open it, early boot gives no keys to "
            f"group {', '.join(others)}",
            f"unlock group delete {others[0]}",
            code="root-holds-keys",
        )


def holds_root(members: Sequence[Member], root: str = "/") -> bool:
    return not devices.mappings_below("/", root).isdisjoint(each.name for each in members)


def end_group(work: Work, name: str, members: Sequence[Member], tcti: str, *, stay: bool) -> None:
    """What goes before the tokens do, once the state has no such group. `stay`: the disks are opened by crypttab from
    now on, where they have a line. Raises Refused, TpmFailed."""
    paths = work.paths
    for kind in ("open", "members", "failed-groups", "spoofed"):
        this_boot.unmark(paths, kind, name)
    for each in members if stay and not holds_root(members) else ():
        if fstab.clear_noauto(paths.crypttab, each.name):
            log.note(f"{each.name}: noauto is out of its line in crypttab: the next boot asks for its passphrase")
    config.remove_group(paths.config, name)
    if units.is_systemd_running() and paths.root == "/":
        run(["systemctl", "daemon-reload"])
    allowed_states.tell_root(paths, work.state, work.persistence, tcti)


def remove_tokens(node: str, host: str) -> None:
    """Removes every token of this host, durably. Raises DiskFailed."""
    with luks.Container(node) as container:
        for number, fields in container.tokens(token.TYPE):
            if fields.get("host") == host:
                container.remove_token(number)


def close(work: Work, name: str, members: Sequence[Member], kek: str) -> None:
    """Closes the journal: the state has nothing of the disks any more. Then the KEK is retired; what its provider does
    not do now, a sync tries again."""
    state = work.state
    for each in members:
        state.drop_disk(each.uuid)
    if kek and all(group.kek != kek for group in state.groups.values()):
        state.retire.append(ReplacedKek(kek, name))
        rotation.forget_cached(kek)
    state.journal = None
    state.save()
    rotation.retire_or_tell(work)


def describe_mounts(paths: Paths, name: str) -> str:
    """What mounted the group's file system until now; '' for nothing of ours."""
    settings = config.load(paths.config).groups.get(name)
    return settings.mount if settings else ""


def tell_how_to_open(paths: Paths, members: Sequence[Member], mount: str) -> None:
    """Notes for a person whose disks unlock does not open any more."""
    lined = fstab.crypttab_names(paths.crypttab)
    for each in members:
        if each.name not in lined:
            log.note(f"to open {each.name} at boot, a line of crypttab: {each.name} UUID={each.uuid} none luks")
    if mount:
        log.note(f"{mount} is not mounted at the next boot: it needs a line of fstab")


def find_nodes(work: Work, members: Sequence[Member]) -> dict[str, str]:
    """LUKS UUID -> node of those that are here. Raises Refused for one that is there twice."""
    seen = work.look()
    nodes = {each.uuid: find.find_node(seen, each) for each in members}
    for each in members:
        if not nodes[each.uuid] and seen.get(each.uuid):
            raise Refused(f"{each.name} is there twice", "take out the copy, and then the same command", "missing")
    return {uuid: node for uuid, node in nodes.items() if node}
