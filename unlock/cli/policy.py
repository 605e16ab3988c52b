# SPDX-License-Identifier: Apache-2.0
"""`unlock policy show | window | close | set`; `predict` has a file of its own."""

import argparse
from typing import TYPE_CHECKING

from .. import log
from ..errors import Usage
from ..paths import Paths
from ..secret import Secret
from . import predict
from .arguments import add_accept, add_command, add_json, add_noun, add_owner_auth, add_pcrs, owner_auth
from .pin import add_pin, new_pin

if TYPE_CHECKING:
    from .arguments import Commands


_RISKS = ("unmeasured-boot", "unmeasured-drivers")


def add(commands: "Commands") -> None:
    verbs = add_noun(commands, "policy", "which boots the TPM allows")
    add_json(add_command(verbs, "show", _show, "the states that the TPM allows, and why each"))
    predict.add(verbs)
    window = add_command(verbs, "window", _window, "check fewer PCRs for some boots, for a firmware update")
    window.add_argument("--reboots", type=int, required=True, metavar="N", help="good boots until it closes")
    add_pcrs(window, "--keep", "PCRs of 0 to 7 that are still checked")
    close = add_command(verbs, "close", _close, "close the window: allow this boot's state alone, over all PCRs")
    chosen = add_command(verbs, "set", _set, "choose other PCRs, for this boot's state alone; or a PIN")
    add_pcrs(chosen, "--pcrs", "PCRs to check; PCR 15 is always added")
    add_accept(chosen, _RISKS, "choose these PCRs")
    add_pin(chosen)
    for each in (window, close, chosen):
        add_owner_auth(each)


def _show(paths: Paths, options: argparse.Namespace) -> int:
    from ..host import this_boot
    from ..operations import policy

    found = policy.show(paths, this_boot.tpm_device())
    if options.json:
        log.show_json(found)
    else:
        log.show(policy.table(found))
    return 0


def _window(paths: Paths, options: argparse.Namespace) -> int:
    from ..host import this_boot
    from ..operations import policy

    with owner_auth(options) as owner:
        found = policy.open_window(paths, options.reboots, options.keep, this_boot.tpm_device(), owner)
        by_hand = len(owner) > 0
    log.note(f"the window is open: the TPM checks only PCRs {', '.join(map(str, found.record.selection))}")
    log.note(f"until it closes, {policy.describe_window_risk(found.record.selection)}")
    log.note("the predicted state of the next boot, and the state of the boot before, are no longer allowed")
    if by_hand:
        log.note("the TPM's owner has a password, so the window stays open until: unlock policy close")
    else:
        log.note(f"it closes by itself after {options.reboots} good boot(s); now: unlock policy close")
    return 0


def _close(paths: Paths, options: argparse.Namespace) -> int:
    from ..host import this_boot
    from ..operations import policy

    with owner_auth(options) as owner:
        found = policy.close_window(paths, this_boot.tpm_device(), owner)
    _note_selection(found.record.selection)
    return 0


def _set(paths: Paths, options: argparse.Namespace) -> int:
    from ..host import this_boot
    from ..operations import policy

    pin = new_pin(options)
    if not options.pcrs and pin is None:
        raise Usage("unlock policy set has nothing to set", "give --pcrs N,N, --pin, --pin-file FILE, or --no-pin")
    with owner_auth(options) as owner, (pin and pin.typed) or Secret(b""):
        tcti = this_boot.tpm_device()
        found = policy.set_policy(paths, options.pcrs, pin, tcti, owner, accept=options.accept)
    if options.pcrs:
        _note_selection(found.record.selection)
    if found.record.pin:
        log.note("the TPM asks for the PIN at every boot: this host does not boot unattended")
    elif pin:
        log.note("the TPM asks for no PIN")
    return 0


def _note_selection(selection: tuple[int, ...]) -> None:
    log.note(f"the TPM allows the state of this boot alone, over PCRs {', '.join(map(str, selection))}")
