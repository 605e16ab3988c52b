# SPDX-License-Identifier: Apache-2.0
"""`unlock operation`."""

import argparse
from typing import TYPE_CHECKING

from .. import log
from ..errors import Refused, UnlockError
from ..paths import Paths
from . import progress
from .arguments import add_command, add_json, add_noun
from .consent import add_consent, add_dry_run, consent

if TYPE_CHECKING:
    from ..operations.operation import Resumed, Shown
    from .arguments import Commands

SERVICE = "unlock-resume.service"


def add(commands: "Commands") -> None:
    verbs = add_noun(commands, "operation", "the operation under way, or one that was interrupted")
    add_json(add_command(verbs, "show", _show, "what it is, how far it is, and what finishes it"))
    add_dry_run(add_command(verbs, "pause", _pause, "let it stop at a safe point, and wait until it is resumed"))
    resume = add_command(verbs, "resume", _resume, "go on with it")
    add_dry_run(resume)
    resume.add_argument("--background", action="store_true", help=f"leave it to {SERVICE}, which goes on after a boot")
    resume.add_argument(
        "--unattended", action="store_true", help=f"what {SERVICE} does: nothing unless it needs nobody"
    )
    cancel = add_command(verbs, "cancel", _cancel, "take it back, where that is safe")
    cancel.add_argument("--lost", action="store_true", help="end it without its disk, which is dead or gone for good")
    add_consent(cancel)


def _show(paths: Paths, options: argparse.Namespace) -> int:
    from ..operations import operation

    found = operation.show(paths)
    if options.json:
        log.show_json({"version": 1, "operation": _to_json(found) if found else None})
    elif found is None:
        log.show("no operation is under way")
    else:
        log.show(_to_text(found))
    return 0


def _to_json(found: "Shown") -> dict[str, object]:
    return {
        **found.under_way._asdict(),
        **{name: value for name, value in found._asdict().items() if name != "under_way"},
    }


def _to_text(found: "Shown") -> str:
    now = found.under_way
    goes_on = f"with {found.needs}" if found.needs else "when it is resumed"
    if now.by_itself and now.state != "paused":
        goes_on = "by itself after a boot"
    rows = [
        ("operation", now.command),
        ("state", now.describe()),
        *(("then", each) for each in now.then),
        ("goes on", "" if now.state == "running" else goes_on),
        ("pause", "unlock operation pause" if found.can_pause and now.state == "running" else ""),
        ("finish", now.finish),
        ("cancel", f"{'unlock operation cancel' if found.can_cancel else 'no'}: {found.cancelled}"),
    ]
    return log.join_lines(f"{name:<9} {text}" for name, text in rows if text)


def _pause(paths: Paths, options: argparse.Namespace) -> int:
    from ..operations import operation

    found = operation.pause(paths, consent(options))
    if found is None:
        return 0
    if options.json:
        log.show_json({"version": 1, "operation": found._asdict()})
    elif found.state == "running":
        log.note(f"`{found.command}` is to pause, and has not reached a safe point yet: unlock operation show")
    elif found.state == "finished":
        log.note(f"`{found.command}` has ended")
    else:
        log.note(f"`{found.command}`: {found.describe()}; also after a reboot, until: unlock operation resume")
    return 0


def _resume(paths: Paths, options: argparse.Namespace) -> int:
    from ..host.this_boot import tpm_device
    from ..operations import operation

    if options.background:
        return _resume_in_background(paths, options)
    with progress.shown(paths, as_json=options.json, lifts=not options.unattended) as tell:
        if options.unattended:
            found: Resumed | None = operation.resume_unattended(paths, tell, tcti=tpm_device())
        else:
            found = operation.resume(paths, tell, consent(options), tcti=tpm_device())
    if found is None:
        return 0
    _print_lines(found.lines, options)
    return 0 if found.is_finished else UnlockError.status


def _resume_in_background(paths: Paths, options: argparse.Namespace) -> int:
    from ..host.units import is_systemd_running
    from ..operations import operation
    from ..run import run

    if not is_systemd_running():
        raise Refused("there is no systemd that could go on with it", "unlock operation resume", "no-systemd")
    if operation.let_go_on(paths, consent(options)):
        run(["systemctl", "start", "--no-block", SERVICE])
        log.note(f"{SERVICE} goes on with it: unlock operation show")
    return 0


def _cancel(paths: Paths, options: argparse.Namespace) -> int:
    from ..host.this_boot import tpm_device
    from ..operations import operation

    if options.lost:
        lines = operation.give_up(paths, consent(options), tcti=tpm_device())
    else:
        lines = operation.cancel(paths, consent(options))
    if lines is not None:
        _print_lines(lines, options)
    return 0


def _print_lines(lines: list[str], options: argparse.Namespace) -> None:
    """What is left to know."""
    if options.json:
        log.show_json({"version": 1, "left": lines})
        return
    for each in lines:
        log.note(each)
