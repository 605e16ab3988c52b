# SPDX-License-Identifier: Apache-2.0
"""The command line: nouns first, verbs after. Imports a flow only when it was chosen."""

import argparse
import json
import os
from collections.abc import Callable
from typing import TYPE_CHECKING

from .. import __version__, ask, log
from ..errors import Refused, Usage
from ..paths import Paths
from ..protect import protect
from ..secret import Secret
from . import keys, policy, recovery

if TYPE_CHECKING:
    from ..operations.group import NewGroup


def cli(argv: list[str]) -> int:
    """One command. Raises UnlockError; argparse exits with 2 by itself."""
    options = _parser().parse_args(argv)
    if os.geteuid() != 0:
        raise Refused("unlock needs root", f"sudo unlock {' '.join(argv)}", code="not-root")
    protect()
    run: Callable[[Paths, argparse.Namespace], int] = options.run
    return run(Paths(), options)


def _parser() -> argparse.ArgumentParser:
    top = argparse.ArgumentParser(
        prog="unlock",
        description="Opens this host's encrypted disks at boot, with no network.",
        allow_abbrev=False,
    )
    top.add_argument("--version", action="version", version=f"unlock {__version__}")
    words = top.add_subparsers(metavar="COMMAND", required=True)

    init = words.add_parser("init", help="make this host's keys and seal them to the TPM", allow_abbrev=False)
    init.set_defaults(run=_init)
    init.add_argument("--backup", default="", metavar="FILE", help="native: new file for the key-derivation key")
    init.add_argument(
        "--backup-password-file", metavar="FILE", help="else credential unlock.backup-password, else asked"
    )
    init.add_argument(
        "--accept", action="append", default=[], metavar="RISK", help="a refusal that you accept, by name"
    )
    init.add_argument("--pcrs", type=policy.pcrs, default=(), metavar="N,N", help="default: by how this host boots")
    init.add_argument("--owner-auth-file", metavar="FILE", help="password of the TPM's owner, where one is set")

    keys.add_client(init)
    init.add_argument("--provider", choices=("native", "kmip"), default="native", help="where keys come from")
    init.add_argument("--name", default="kms", help="kmip: the provider's name on this host")
    init.add_argument("--persistence", choices=("enabled", "disabled"), help="kmip: a choice to be made by name")

    status = words.add_parser("status", help="groups, disks, and where each key would come from", allow_abbrev=False)
    status.set_defaults(run=_status)
    status.add_argument("--json", action="store_true")
    status.add_argument("--boot", action="store_true", help="the timeline of this boot")
    status.add_argument("--svg", action="store_true", help="with --boot: the timeline as a picture")

    explain = words.add_parser("explain", help="why the TPM refused, and what to do", allow_abbrev=False)
    explain.set_defaults(run=_explain)
    explain.add_argument("--json", action="store_true")

    check = words.add_parser("check", help="is it safe to reboot?", allow_abbrev=False)
    check.set_defaults(run=_check)
    check.add_argument("--json", action="store_true")

    group = words.add_parser("group", help="groups of disks").add_subparsers(metavar="VERB", required=True)
    create = group.add_parser("create", help="format disks and make them a group", allow_abbrev=False)
    create.set_defaults(run=_group_create)
    create.add_argument("name")
    create.add_argument("--disk", nargs="+", action="extend", required=True, metavar="DEV")
    create.add_argument("--mount", required=True, metavar="DIR")
    create.add_argument(
        "--policy",
        choices=("persistent", "provider"),
        default="persistent",
        help="provider: its KEK is never kept here",
    )
    create.add_argument("--profile", default="", help="btrfs data profile (raid1 for two disks or more)")
    create.add_argument(
        "--erase", nargs="+", action="extend", default=[], metavar="DEV", help="a disk whose data may go"
    )
    recovery.add_keep(create)

    disk = words.add_parser("disk", help="single disks").add_subparsers(metavar="VERB", required=True)
    adopt = disk.add_parser("adopt", help="take in an existing LUKS2 disk, data untouched", allow_abbrev=False)
    adopt.set_defaults(run=_disk_adopt)
    adopt.add_argument("device")
    adopt.add_argument("--group", required=True, metavar="G")
    adopt.add_argument("--name", default="", help="mapping name (default: the one it has)")
    adopt.add_argument("--passphrase-file", metavar="FILE", help="else credential unlock.passphrase, else asked")
    recovery.add_keep(adopt)
    keys.add(words)
    recovery.add(words, top)
    policy.add(words)
    return top


def _init(paths: Paths, options: argparse.Namespace) -> int:
    from ..host import this_boot
    from ..operations import baseline
    from ..operations.init import OVERRIDES, InitChoices, init

    unknown = set(options.accept) - OVERRIDES.keys()
    if unknown:
        raise Usage(f"there is no risk named {sorted(unknown)[0]!r}", f"--accept takes {', '.join(OVERRIDES)}")
    kms = keys.kmip_at_init(options) if options.provider == "kmip" else None
    if not kms and not options.backup:
        raise Usage("the native provider's key is backed up before anything depends on it", "--backup FILE")
    password = Secret(b"") if kms else keys.new_password(options.backup_password_file)
    owner = ask.from_file(options.owner_auth_file) if options.owner_auth_file else Secret(b"")
    with password, owner:
        found = init(
            paths,
            InitChoices(
                options.backup,
                password,
                frozenset(options.accept),
                options.pcrs,
                owner,
                kms=kms,
            ),
        )
    baseline.record_good_boot(paths, this_boot.tpm_device())
    log.note(f"boot: {found.boot}; sealed under PCRs {', '.join(map(str, found.selection))}")
    if kms:
        log.note(f"keys come from {', '.join(kms.settings.endpoints)}; the host key was made and fetched")
        keys.tell_key_file(options)
    else:
        log.note(f"backup written and test-restored: {options.backup}; move it off this host")
    log.note("next: unlock disk adopt (for an encrypted root), unlock group create")
    return 0


def _status(paths: Paths, options: argparse.Namespace) -> int:
    from ..host import report
    from ..operations import status

    if options.svg and not (options.boot and not options.json):
        raise Usage("--svg goes with --boot alone", "unlock status --boot --svg")
    if options.boot:
        record = status.read_boot(paths)
        if options.svg:
            from ..boot import plot

            print(plot.svg(record), end="")
        else:
            print(json.dumps(report.to_json(record), indent=1) if options.json else status.boot_to_text(record))
        return 0
    found = status.read_status(paths)
    print(json.dumps(status.to_json(found), indent=1) if options.json else status.to_text(found))
    return 0


def _explain(paths: Paths, options: argparse.Namespace) -> int:
    from ..measured.explain import explain

    return explain(paths, options.json)


def _check(paths: Paths, options: argparse.Namespace) -> int:
    from ..operations import check

    found = check.check(paths)
    print(json.dumps(check.to_json(found), indent=1) if options.json else check.to_text(found))
    return check.EXIT_STATUS[found.verdict]


def _group_create(paths: Paths, options: argparse.Namespace) -> int:
    from ..operations.group import create_group

    group = create_group(paths, _wanted(options))
    log.note(f"group {group.name}: {len(group.members)} disk(s) at {options.mount}")
    return 0


def _wanted(options: argparse.Namespace) -> "NewGroup":
    from ..operations.group import NewGroup

    return NewGroup(
        options.name,
        tuple(options.disk),
        options.mount,
        options.profile,
        frozenset(options.erase),
        options.recovery_key_file,
        options.policy,
        recovery.escrow(options),
    )


def _disk_adopt(paths: Paths, options: argparse.Namespace) -> int:
    from ..operations.group import adopt_disk

    with keys.secret(
        options.passphrase_file, "unlock.passphrase", f"passphrase of {options.device}", "--passphrase-file"
    ) as passphrase:
        group = adopt_disk(
            paths,
            options.device,
            options.group,
            passphrase,
            options.recovery_key_file,
            options.name,
            recovery.escrow(options),
        )
    log.note(f"{options.device} is in group {group.name}; its data, keyslots and name are untouched")
    return 0
