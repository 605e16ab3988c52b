# SPDX-License-Identifier: Apache-2.0
"""The end of early boot: which keys and open disks cross into the real root, and what is closed."""

import os

from .. import log
from ..disks import devices, disk_keys, forget, luks
from ..errors import UnlockError
from ..host import keyring, report, this_boot
from ..paths import Paths
from ..secret import Secret
from . import activation

NEW_ROOT = "/root"
"""Where initramfs-tools mounts the root file system."""


def hand_over(
    paths: Paths, groups: activation.Opening, persistence: Secret, pin_auth: Secret | None, record: report.Report
) -> bool:
    """Keys and open disks cross into the real root only if that root came from a disk that this process opened,
    or from dm-verity. Else everything is closed: a thief's root file system gets nothing. False if that failed."""
    ours = {name for opened in groups.opened.values() for name in opened}
    if not record.facts["unauthenticated_root"] and not authentic(ours):
        record.event("root-not-authenticated")
        if ours:
            log.console("the root file system is not authenticated: disks closed, keys dropped")
        return groups.close_all()
    this_boot.cache_keys(paths, "TPM", {"unlock:persistence": persistence})
    if pin_auth:
        this_boot.cache_keys(paths, "PIN", {"unlock:pin-auth": pin_auth})
    for token in groups.tokens():
        kek_name = f"unlock:kek:{token.kek_id}:{token.kek_generation}"
        for name, unwrap in ((kek_name, disk_keys.unwrap_kek), ("unlock:host", disk_keys.unwrap_host_key)):
            try:
                with unwrap(token, persistence) as unwrapped:
                    if bytes(unwrapped) != disk_keys.ELSEWHERE:
                        this_boot.cache_keys(paths, "TPM", {name: unwrapped})
            except UnlockError as error:
                record.event("trouble", f"{token.name}: {error}")
    record.event("handed-over")
    return True


def authentic(names: set[str]) -> bool:
    """Whether the new root, and its /usr where that is another file system, lie on these mappings alone."""
    usr = os.path.join(NEW_ROOT, "usr")
    return devices.opened_by(NEW_ROOT, names) and (not devices.root_chain(usr) or devices.opened_by(usr, names))


def secure(paths: Paths) -> int:
    """Before the real root, when the agent did not end in order: after the recovery prompt, or a crash.

    What a recovery key opened stays only below a root that it opened too. Else all but the root's own disks are
    closed. 1 when one stays open.
    """
    early = this_boot.read_early_report(paths)
    recovered = early["disks"] if early and early["phase"] == "recovery" else []
    if authentic({each["name"] for each in recovered if each["outcome"] in ("opened", "already-open")}):
        return 0
    return drop(keep=devices.names_below(NEW_ROOT))


def drop(keep: set[str]) -> int:
    """Closes every LUKS2 disk but `keep`, and forgets the keys. 1 when one stays open.

    By what the kernel knows, not by a report; without waiting for udev, which may have ended.
    """
    for name, uuid in devices.mappings().items():
        if uuid and name not in keep:
            forget.forget(name)
            luks.abandon(name)
    try:
        keyring.flush()
    except UnlockError as error:
        log.console(str(error))
    left = [name for name, uuid in devices.mappings().items() if uuid and name not in keep]
    for name in left:
        log.console(f"{name} stays open")
    return 1 if left else 0
