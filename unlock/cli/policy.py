# SPDX-License-Identifier: Apache-2.0
"""The command line's words for the TPM's policy: policy, rebind. Imports a flow only when chosen."""

import argparse
import json
import os
from typing import TYPE_CHECKING

from .. import ask, log
from ..errors import Usage
from ..paths import Paths
from ..secret import Secret
from . import keys, predict

if TYPE_CHECKING:
    from ..predict import allowed_states

    Words = argparse._SubParsersAction[argparse.ArgumentParser]


def add(words: "Words") -> None:
    """Adds the commands to the top parser."""
    verbs = words.add_parser("policy", help="which boots the TPM allows").add_subparsers(metavar="VERB", required=True)
    show = verbs.add_parser("show", help="the allowed states, and why each", allow_abbrev=False)
    show.set_defaults(run=_show)
    show.add_argument("--json", action="store_true")
    window = verbs.add_parser("window", help="fewer PCRs for a firmware update", allow_abbrev=False)
    window.set_defaults(run=_window)
    window.add_argument("--reboots", type=int, required=True, metavar="N", help="good boots until it closes")
    window.add_argument("--keep", type=pcrs, default=(), metavar="N,N", help="PCRs of 0 to 7 that still count")
    close = verbs.add_parser("close", help="this boot's state alone, over all PCRs", allow_abbrev=False)
    close.set_defaults(run=_close)
    chosen = verbs.add_parser("set", help="other PCRs, for this boot's state; or a PIN", allow_abbrev=False)
    chosen.set_defaults(run=_set)
    chosen.add_argument("--pcrs", type=pcrs, default=(), metavar="N,N", help="the cap PCR comes on top")
    predict.add(verbs)
    rebind = words.add_parser("rebind", help="another board or TPM, or a changed boot", allow_abbrev=False)
    rebind.set_defaults(run=_rebind)
    rebind.add_argument("--recovery-key-file", metavar="FILE", help="else credential unlock.recovery-key, else asked")
    rebind.add_argument("--backup", default="", metavar="FILE", help="native: its backup, or a new file for a new key")
    rebind.add_argument(
        "--backup-password-file", metavar="FILE", help="else credential unlock.backup-password, else asked"
    )
    rebind.add_argument("--client-key", metavar="FILE", help="kmip: PEM, where it was wrapped by the TPM's key")
    rebind.add_argument("--password-file", metavar="FILE", help="kmip: of the user name, where there is one")
    rebind.add_argument("--pcrs", type=pcrs, default=(), metavar="N,N", help="default: as before")
    risks = ("unmeasured-boot", "unauthenticated-root", "slots-in-use")
    rebind.add_argument("--accept", action="append", default=[], choices=risks, metavar="RISK", help="as for init")
    for each in (chosen, rebind):
        _pin(each)
    for each in (window, close, chosen, rebind):
        _owner_auth(each)


def pcrs(text: str) -> tuple[int, ...]:
    """A type of an argument. Raises ArgumentTypeError."""
    try:
        return tuple(int(part) for part in text.split(","))
    except ValueError as error:
        raise argparse.ArgumentTypeError(f"{text!r}: PCR numbers are wanted, as in 4,7,9") from error


def _pin(parser: argparse.ArgumentParser) -> None:
    one = parser.add_mutually_exclusive_group()
    one.add_argument("--pin", action="store_true", help="the TPM asks for one: credential unlock.pin, else asked twice")
    one.add_argument("--pin-file", metavar="FILE", help="the TPM asks for the one in this file")
    one.add_argument("--no-pin", action="store_true", help="the TPM asks for none any more")


def _chosen_pin(options: argparse.Namespace, needed: bool = False) -> "allowed_states.Pin | None":
    """Raises Usage when two PINs that were typed differ, or there is no terminal."""
    from ..predict.allowed_states import Pin

    if options.no_pin:
        return Pin(None)
    if options.pin or options.pin_file or needed:
        return Pin(keys.new_secret(options.pin_file, "unlock.pin", "new PIN", "--pin-file"))
    return None


def _owner_auth(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--owner-auth-file", metavar="FILE", help="password of the TPM's owner, where one is set")


def _owner(options: argparse.Namespace) -> Secret:
    return ask.from_file(options.owner_auth_file) if options.owner_auth_file else Secret(b"")


# Flows


def _show(paths: Paths, options: argparse.Namespace) -> int:
    from ..host import this_boot
    from ..operations import policy

    found = policy.show(paths, this_boot.tpm_device())
    print(json.dumps(found, indent=1) if options.json else policy.table(found))
    return 0


def _window(paths: Paths, options: argparse.Namespace) -> int:
    from ..host import this_boot
    from ..operations import policy

    with _owner(options) as owner:
        found = policy.open_window(paths, options.reboots, options.keep, this_boot.tpm_device(), owner)
        by_hand = len(owner) > 0
    log.note(f"the window is open: only PCRs {', '.join(map(str, found.record.selection))} count")
    log.note(f"until it closes, {policy.describe_window_risk(found.record.selection)}")
    log.note("what was predicted for the next boot, and the state of the boot before, are dropped")
    if by_hand:
        log.note("the TPM's owner has a password: it is not closed by itself, but by unlock policy close")
    else:
        log.note(f"it closes by itself after {options.reboots} good boot(s), or now by unlock policy close")
    return 0


def _close(paths: Paths, options: argparse.Namespace) -> int:
    from ..host import this_boot
    from ..operations import policy

    with _owner(options) as owner:
        found = policy.close_window(paths, this_boot.tpm_device(), owner)
    log.note(f"the TPM allows the state of this boot alone, over PCRs {', '.join(map(str, found.record.selection))}")
    return 0


def _set(paths: Paths, options: argparse.Namespace) -> int:
    from ..host import this_boot
    from ..operations import policy

    pin = _chosen_pin(options)
    if not options.pcrs and pin is None:
        raise Usage("what is to be set?", "--pcrs N,N, --pin, or --no-pin")
    with _owner(options) as owner, (pin and pin.typed) or Secret(b""):
        found = policy.set_policy(paths, options.pcrs, pin, this_boot.tpm_device(), owner)
    if options.pcrs:
        numbers = ", ".join(map(str, found.record.selection))
        log.note(f"the TPM allows the state of this boot alone, over PCRs {numbers}")
    if found.record.pin:
        log.note("the TPM asks for the PIN at every boot: this host does not boot unattended")
    elif pin:
        log.note("the TPM asks for no PIN")
    return 0


def _rebind(paths: Paths, options: argparse.Namespace) -> int:
    from ..host import this_boot
    from ..host.state import State
    from ..keys import recovery_key
    from ..measured import diagnosis, evidence, explain
    from ..operations import baseline, rebind

    State.load(paths)
    tcti = this_boot.tpm_device()
    log.note("this boot, as the TPM sees it, is what will be allowed:")
    print(explain.to_text(diagnosis.diagnose(evidence.gather_evidence(paths, tcti))))
    pin = _chosen_pin(options)
    if pin is None and rebind.needs_pin(paths, tcti):
        log.note("a PIN is set, and the key cache lacks what it makes: the same one again, another one, or --no-pin")
        pin = _chosen_pin(options, needed=True)
    with (
        (pin and pin.typed) or Secret(b""),
        keys.secret(options.recovery_key_file, "unlock.recovery-key", "recovery key", "--recovery-key-file") as typed,
        recovery_key.parse(typed) as recovery,
        _password(options) as password,
        ask.from_file(options.client_key) if options.client_key else Secret(b"") as client_key,
        ask.from_file(options.password_file) if options.password_file else Secret(b"") as client_password,
        _owner(options) as owner,
    ):
        found = rebind.rebind(
            paths,
            rebind.RebindChoices(
                recovery,
                options.backup,
                password if len(password) else None,
                client_key if len(client_key) else None,
                client_password if len(client_password) else None,
                options.pcrs,
                pin,
                frozenset(options.accept),
                owner,
                tcti,
            ),
        )
    baseline.record_good_boot(paths, tcti)
    log.note(f"sealed to this boot, under PCRs {', '.join(map(str, found.selection))}: {len(found.done)} disk(s)")
    for name, why in found.left.items():
        log.error(f"{name}: {why}: it opens with the recovery key", "when it is back: unlock sync, or unlock rebind")
    for name in found.lost:
        log.error(f"provider {name}: the key that it is asked with is gone", "unlock provider list")
    return 0


def _password(options: argparse.Namespace) -> Secret:
    """Of the backup; twice for one that is new."""
    if not options.backup:
        return Secret(b"")
    if not os.path.exists(options.backup):
        return keys.new_password(options.backup_password_file)
    flag = "--backup-password-file"
    return keys.secret(options.backup_password_file, "unlock.backup-password", "password of the backup", flag)
