# SPDX-License-Identifier: Apache-2.0
"""`unlock disk erase`: nothing on the disk opens its data any more.

    journal ──> each keyslot overwritten and removed ──> each token removed ──> both copies of the header and the
    keyslots' areas overwritten ──> journal closed

From the first keyslot on the data is lost. With `overwrite` or `discard` the journal is closed, and other commands may
run, before all of the disk is overwritten; its header, by which the same command finds it again, goes last.

Needs no key: it works where the key cache is empty.
"""

import os
import time
from collections.abc import Callable

from .. import journald, log, messages
from ..disks import devices, luks, token
from ..disks.luks import Container
from ..errors import NotOurs, Refused, UnlockError
from ..host.journal import DiskErasure
from ..host.lock import exclusive
from ..host.state import State
from ..paths import Paths
from ..run import run
from . import membership
from .consent import Consent, Plan, agree

COPIES = (
    "a backup of its header that somebody has (cryptsetup luksHeaderBackup, an image of the disk) still opens the data "
    "with the keys of then"
)
"""What a destroyed header does not undo."""
_COPIES = 1 << 20
"""Bytes from the start of a disk in which both copies of a header of the default size are."""
_TELL = 60.0
"""Seconds between two lines about progress."""


def erase_disk(
    paths: Paths, device: str, *, discard: bool = False, overwrite: bool = False, consent: Consent = agree
) -> bool:
    """Destroys all keyslots, tokens and the header of a LUKS2 disk that is in no group. False for a plan that was only
    to be shown. `overwrite`: then writes zeros to every block; `discard`: tells the disk that none is used.

    Killed, the same command finishes. Raises Usage, NotOurs, Refused, DiskFailed, CommandFailed.
    """
    with exclusive(paths):
        state = State.load(paths)
        if _has_finished(state, device):
            return True
        node = membership.device_node(device)
        with luks.Container(node) as container:
            about = f"/dev/disk/by-uuid/{container.uuid}"
            state.refuse_other("disk erase", about)
            _check(state, container, device)
        if not consent(_plan(node, device, discard=discard, overwrite=overwrite)):
            return False
        state.begin(DiskErasure("disk erase", about, keyless=False))
        destroy_keys(node)
        state.forgotten.pop(os.path.basename(about), None)
        state.journal = DiskErasure("disk erase", about, keyless=True)
        state.save()
        if not (discard or overwrite):
            overwrite_header(node)
        state.journal = None
        state.save()
        journald.record(paths, messages.DISK_ERASED, f"{device}: nothing on it opens its data", disk=device)
    if overwrite:
        size = luks.disk_size(node)
        luks.overwrite(node, _end_of_header(node), size, _teller(node, size))
    if discard:
        run(["blkdiscard", "--force", "--offset", str(_end_of_header(node)), node])
    if discard or overwrite:
        overwrite_header(node)
    return True


def destroy_keys(node: str) -> None:
    """Destroys all keyslots and tokens. Raises DiskFailed."""
    with luks.Container(node) as container:
        container.destroy_keys()


def overwrite_header(node: str) -> None:
    """Overwrites both copies of the header, and the keyslots' areas, with zeros; the copies last. Raises DiskFailed."""
    end = _end_of_header(node)
    copies = min(end, _COPIES)
    luks.overwrite(node, copies, end)
    luks.overwrite(node, 0, copies)


def _end_of_header(node: str) -> int:
    with luks.Container(node) as container:
        return container.areas_end


def _has_finished(state: State, device: str) -> bool:
    """Whether a run that was killed had overwritten the header, by which the disk is found no more; the journal is
    closed then. Also where the disk was taken out: nothing waits for it for ever."""
    entry = state.journal
    if not isinstance(entry, DiskErasure) or device != entry.about or _exists(device):
        return False
    if not entry.keyless:
        log.error(f"{device} was taken out, with keyslots that open it", "when it is back: the same command")
    state.journal = None
    state.save()
    return True


def _exists(device: str) -> bool:
    try:
        membership.device_node(device)
    except UnlockError:
        return False
    return True


def _check(state: State, container: Container, device: str) -> None:
    """Raises Refused, NotOurs."""
    for group in state.groups.values():
        for member in group.members:
            if member.uuid == container.uuid:
                last = len(group.members) == 1
                raise Refused(
                    f"{device} is {member.name} of group {group.name}",
                    f"unlock group delete {group.name} --erase" if last else f"unlock disk remove {member.name}",
                    code="member",
                )
    hosts = {fields.get("host") for _, fields in container.tokens(token.TYPE)}
    if hosts - {state.host}:
        raise NotOurs(f"{device} belongs to another unlock host", "erase it there", code="other-host")
    if used := devices.describe_use(container.device):
        raise Refused(f"{device} is in use: {used}", f"lsblk {device}", code="in-use")


def _plan(node: str, device: str, *, discard: bool, overwrite: bool) -> Plan:
    steps = [
        f"every keyslot and token of {device} is destroyed",
        "both copies of its header and the keyslots' areas are overwritten with zeros",
    ]
    if discard:
        steps.append(
            "the disk is told that no block is used: it may erase them now, later or never, and does not say; most "
            "read as zeros at once"
        )
    if overwrite:
        steps.append(
            "zeros are written to every block that the disk shows: blocks that it has set aside, as worn or bad ones "
            "of an SSD, keep what they have"
        )
    content = devices.list_signatures(node)
    size = luks.disk_size(node) >> 30
    return Plan(tuple(steps), (f"all data on {device} ({content}, {size} GiB)",), device)


def _teller(node: str, size: int) -> Callable[[int], None]:
    told = time.monotonic()

    def tell(at: int) -> None:
        nonlocal told
        if time.monotonic() - told > _TELL:
            told = time.monotonic()
            log.note(f"{node}: {100 * at // size} % overwritten")

    return tell
