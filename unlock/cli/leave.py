# SPDX-License-Identifier: Apache-2.0
"""`unlock disk forget | release | erase` and `unlock group delete`: how disks and groups leave."""

import argparse
from typing import TYPE_CHECKING

from .. import log
from ..paths import Paths
from .arguments import (
    PASSPHRASE,
    RECOVERY_KEY_SOURCE,
    add_command,
    add_owner_auth,
    new_secret,
    owner_auth,
)
from .consent import add_consent, consent

if TYPE_CHECKING:
    from .arguments import Commands


def add_to_disk(verbs: "Commands") -> None:
    forget = add_command(verbs, "forget", _forget, "a member that is dead, lost or stolen leaves its group")
    forget.add_argument("disk", metavar="DISK", help="its LUKS UUID, mapping name or device; it is not here")
    forget.add_argument(
        "--destroyed", action="store_true", help="nobody can have it any more: keep the keys that it was opened by"
    )
    forget.add_argument(
        "--accept",
        action="append",
        default=[],
        choices=("data-loss",),
        metavar="RISK",
        help="data-loss: a part of the file system was on that disk alone",
    )
    add_owner_auth(forget)
    add_consent(forget)
    release = add_command(verbs, "release", _release, "give a disk back: plain LUKS2, by a passphrase")
    release.add_argument("device", metavar="DEV")
    release.add_argument(
        "--passphrase-file",
        metavar="FILE",
        help=f"what opens it from then on, a passphrase that it has or a new one; default: credential {PASSPHRASE}, "
        "else you are asked",
    )
    release.add_argument("--recovery-key-file", default="", metavar="FILE", help=RECOVERY_KEY_SOURCE)
    add_consent(release)
    erase = add_command(verbs, "erase", _erase, "destroy what opens a disk that is in no group")
    erase.add_argument("device", metavar="DEV")
    erase.add_argument("--discard", action="store_true", help="then tell the disk that no block is used (TRIM)")
    erase.add_argument("--overwrite", action="store_true", help="then write zeros to every block")
    add_consent(erase)


def add_to_group(verbs: "Commands") -> None:
    delete = add_command(verbs, "delete", _delete, "end a group; its disks stay, and the recovery key opens them")
    delete.add_argument("name", metavar="GROUP")
    delete.add_argument("--erase", action="store_true", help="destroy what opens its disks; all data is lost")
    delete.add_argument("--recovery-key-file", default="", metavar="FILE", help=RECOVERY_KEY_SOURCE)
    add_owner_auth(delete)
    add_consent(delete)


def _forget(paths: Paths, options: argparse.Namespace) -> int:
    from ..host import this_boot
    from ..operations import forget_disk

    with owner_auth(options) as owner:
        forgotten = forget_disk.forget_disk(
            paths,
            options.disk,
            destroyed=options.destroyed,
            accept_loss="data-loss" in options.accept,
            consent=consent(options),
            tcti=this_boot.tpm_device(),
            owner_auth=owner,
        )
    if forgotten:
        forget_disk.tell(forgotten)
        if options.json:
            log.show_json({"version": 1, **forgotten._asdict()})
    return 0


def _release(paths: Paths, options: argparse.Namespace) -> int:
    from ..host import this_boot
    from ..operations import release_disk

    with new_secret(
        options.passphrase_file,
        credential=PASSPHRASE,
        prompt=f"passphrase that opens {options.device} from then on",
        flag="--passphrase-file",
    ) as passphrase:
        released = release_disk.release_disk(
            paths,
            options.device,
            passphrase,
            recovery_file=options.recovery_key_file,
            consent=consent(options),
            tcti=this_boot.tpm_device(),
        )
    if released:
        how = "a new keyslot" if released.added else "keyslot"
        log.note(f"{options.device} is plain LUKS2: the passphrase opens it, by {how} {released.keyslot}")
        log.note("an earlier backup of its header still opens by the recovery key")
        if options.json:
            log.show_json({"version": 1, **released._asdict()})
    return 0


def _erase(paths: Paths, options: argparse.Namespace) -> int:
    from ..operations import erase_disk

    done = erase_disk.erase_disk(
        paths, options.device, discard=options.discard, overwrite=options.overwrite, consent=consent(options)
    )
    if done:
        log.note(f"{options.device}: nothing on it opens its data")
        log.note(erase_disk.COPIES)
        if options.json:
            log.show_json({"version": 1, "erased": options.device})
    return 0


def _delete(paths: Paths, options: argparse.Namespace) -> int:
    from ..host import this_boot
    from ..operations import delete_group, erase_disk

    with owner_auth(options) as owner:
        deleted = delete_group.delete_group(
            paths,
            options.name,
            erase=options.erase,
            recovery_file=options.recovery_key_file,
            consent=consent(options),
            tcti=this_boot.tpm_device(),
            owner_auth=owner,
        )
    if deleted:
        how = "erased" if deleted.erased else "plain LUKS2, and the recovery key opens them"
        log.note(f"group {deleted.group} is deleted; {', '.join(deleted.done) or 'none of its disks'}: {how}")
        for name, why in deleted.left.items():
            log.error(f"{name}: {why}: it has its token still", "when it is here: unlock disk release DEV")
        if deleted.erased:
            log.note(erase_disk.COPIES)
        if options.json:
            log.show_json({"version": 1, **deleted._asdict()})
    return 0
