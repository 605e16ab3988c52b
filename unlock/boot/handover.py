# SPDX-License-Identifier: Apache-2.0
"""The end of early boot: hands keys and open disks over to the real root, or closes and drops them.

`hand_over` is for the agent, when it ends in order. `secure` and `drop` are for the initramfs scripts: after the
recovery prompt or a crash, and before a shell.
"""

from .. import initramfs, log
from ..disks import devices, disk_keys, forget, luks
from ..errors import UnlockError
from ..host import keyring, report, this_boot
from ..paths import Paths
from ..secret import Secret
from .activation import GroupOpener

NEW_ROOT = (initramfs.of_image() or initramfs.INITRAMFS_TOOLS).new_root
"""Where this initramfs mounts the root file system."""


def hand_over(
    paths: Paths, opener: GroupOpener, record: report.Report, *, persistence: Secret, pin_auth: Secret | None
) -> bool:
    """Puts the keys into the key cache, if the new root lies on disks that this process opened or on dm-verity.

    Else closes everything that was opened: a thief's root file system gets nothing. False if a disk stays open then.
    """
    ours = opener.opened_mappings()
    if not record.facts.unauthenticated_root and not is_root_authentic(ours):
        record.add_event("root-not-authenticated")
        if ours:
            log.console("the root file system is not authenticated: disks closed, keys dropped")
        return opener.close_all()
    this_boot.mark(paths, "authentic")
    this_boot.cache_keys(paths, "TPM", {"unlock:persistence": persistence})
    if pin_auth:
        this_boot.cache_keys(paths, "PIN", {"unlock:pin-auth": pin_auth})
    handed: set[str] = set()
    for token in opener.opened_tokens():
        kek_name = f"unlock:kek:{token.kek_id}:{token.kek_generation}"
        for name, unwrap in ((kek_name, disk_keys.unwrap_kek), ("unlock:host", disk_keys.unwrap_host_key)):
            if name in handed:  # by the token of another disk
                continue
            try:
                with unwrap(token, persistence) as unwrapped:
                    if unwrapped.value != disk_keys.NOT_KEPT:
                        this_boot.cache_keys(paths, "TPM", {name: unwrapped})
                        handed.add(name)
            except UnlockError as error:
                record.add_event("trouble", f"{token.name}: {error}")
    record.add_event("handed-over")
    return True


def is_root_authentic(names: set[str]) -> bool:
    """Whether the new root, and whatever is mounted in it (/usr), lie on these mappings or dm-verity alone. What lies
    on no block device (tmpfs, nfs, overlay) does not."""
    mounted = [each for each in devices.mount_points() if f"{each}/".startswith(f"{NEW_ROOT}/")]
    return NEW_ROOT in mounted and all(devices.lies_on_mappings(each, names) for each in mounted)


def secure(paths: Paths) -> int:
    """What the initramfs runs before the real root when the agent did not end in order: after the recovery prompt, or a
    crash. Returns 1 when a disk stays open that should not.

    Disks that a recovery key opened stay open only if it opened the root too. Else every disk is closed on which the
    root does not lie.
    """
    early = this_boot.read_early_report(paths)
    recovered = early.disks.values() if early and early.phase == "recovery" else ()
    if is_root_authentic({each.name for each in recovered if each.outcome in report.OPEN}):
        this_boot.mark(paths, "authentic")
        return 0
    return drop(keep=devices.mappings_below(NEW_ROOT))


def drop(keep: set[str]) -> int:
    """Closes every LUKS2 mapping but those named in `keep`, and flushes the key cache. Returns 1 when one stays open.

    It goes by what the kernel says, not by a report, and does not wait for udev, which may have ended.
    """
    for name, uuid in devices.active_mappings().items():
        if uuid and name not in keep:
            forget.forget_file_system(name)
            luks.abandon(name)
    try:
        keyring.flush()
    except UnlockError as error:
        log.console(str(error))
    left = [name for name, uuid in devices.active_mappings().items() if uuid and name not in keep]
    for name in left:
        log.console(f"{name} stays open")
    return 1 if left else 0
