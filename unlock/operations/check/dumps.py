# SPDX-License-Identifier: Apache-2.0
"""Checks what of the memory reaches a disk: dumps of processes and of the kernel, and swap. None of it is about the
next boot."""

from collections.abc import Iterator

from ...errors import NoKey
from ...host.state import State
from ...keys import access, dump_key
from ...paths import Paths
from ..dump.kernel import read_kernel_protection
from ..dump.protection import read_protection
from .finding import NOTE, SAFE, Finding


def check_dumps(paths: Paths, state: State) -> Iterator[Finding]:
    """Whether core dumps and swap are encrypted."""
    found = read_protection(paths)
    if not found.encrypted:
        why = f"dumps of processes are {found.detail}: whoever has the disk reads what was in memory"
        yield Finding("core dumps", NOTE, why, found.do)
    elif found.do:
        yield Finding("core dumps", NOTE, f"dumps of processes: {found.detail}", found.do)
    elif found.recipient and found.recipient.generation != state.host_key_ref.generation:
        why = f"they are encrypted to host key {found.recipient.generation}, which is not the present one"
        yield Finding("core dumps", NOTE, why, "unlock sync")
    elif found.recipient and _is_of_others(found.recipient, state):
        why = f"{paths.dump_recipient} was changed: they are encrypted to somebody else, and not to the host key"
        yield Finding("core dumps", NOTE, why, "unlock dump enable")
    else:
        yield Finding("core dumps", SAFE, f"dumps of processes: {found.detail}")
    kernel = read_kernel_protection(paths)
    if kernel.do or kernel.device or not kernel.encrypted:
        verdict = SAFE if kernel.encrypted and not kernel.do else NOTE
        yield Finding("kernel dumps", verdict, f"dumps of the kernel: {kernel.detail}", kernel.do)
    for each in found.plain_swaps:
        why = f"swap {each} is on a disk that is not encrypted: memory of processes, with keys, is there in plain"
        yield Finding("swap", NOTE, why, "swapoff, and put the swap on an encrypted disk: crypttab(5), option swap")


def _is_of_others(recipient: dump_key.Recipient, state: State) -> bool:
    """Whether the host key, where this host keeps it and this boot can open it, has another recipient."""
    try:
        with access.read_persistence_key(state) as persistence:
            known = dump_key.known_keys(state, persistence)
    except NoKey:
        return False
    return any(each.fingerprint not in ("", recipient.fingerprint) for each in known[:1])
