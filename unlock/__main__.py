# SPDX-License-Identifier: Apache-2.0
"""The entry point. `unlock boot ...` imports only the module that it runs: early boot has no argparse and is fast."""

import errno
import os
import sys

from . import log
from .errors import UnlockError, Usage
from .paths import Paths


def main() -> int:
    try:
        if sys.argv[1:2] == ["boot"]:
            return _boot(sys.argv[2:])
        try:
            from .cli import cli
        except ModuleNotFoundError as error:
            if error.name != "unlock.cli":
                raise
            from .boot.shell import shell  # the initramfs has no cli

            return shell(Paths(), sys.argv[1:])
        return cli(sys.argv[1:])
    except UnlockError as error:
        return _show_error(error)
    except KeyboardInterrupt:
        return 130
    except BrokenPipeError:
        return 141
    except OSError as error:
        return _show_error(_in_words(error))


def _show_error(error: UnlockError) -> int:
    """Returns the exit status."""
    log.error(str(error), error.hint)
    if "--json" in sys.argv[1:]:
        log.show_json({"version": 1, "error": error.to_json()})
    return error.status


def _in_words(error: OSError) -> UnlockError:
    """The path, and the file system where that is at fault."""
    path = os.path.abspath(os.fsdecode(error.filename)) if isinstance(error.filename, str | bytes) else ""
    message = f"{path or 'system'}: {error.strerror}"
    if error.errno not in (errno.ENOSPC, errno.EDQUOT, errno.EROFS):
        return UnlockError(message)
    if not path:
        return UnlockError(message, "df")
    where = path
    while not os.path.ismount(where):
        where = os.path.dirname(where)
    if error.errno == errno.EROFS:
        return UnlockError(f"{path} cannot be written: the file system {where} is read-only", f"findmnt {where}")
    return UnlockError(f"{path} cannot be written: the file system {where} is full, or over quota", f"df {where}")


def _boot(argv: list[str]) -> int:
    """The commands of the initramfs scripts, the systemd units and the shells' completion; they are not for people."""
    paths = Paths()
    if argv == ["agent"]:
        from .boot.agent import agent

        return agent(paths)
    if argv == ["prompt"]:
        from .boot.prompt import prompt

        return prompt(paths)
    if argv == ["why"]:
        from .boot.shell import why

        return why(paths)
    if argv == ["screen"]:
        from .boot.shell import screen

        return screen(paths)
    if argv == ["close-channels"]:
        from .boot.unmeasured import close_before_systemd

        return close_before_systemd(paths)
    if argv == ["drop"]:
        from .boot.handover import drop

        return drop(keep=set())
    if argv == ["scrub"]:
        from .boot.scrub import scrub

        return scrub()
    if argv == ["secure"]:
        from .boot.handover import secure

        return secure(paths)
    if len(argv) == 2 and argv[0] == "heal":
        from .boot.gate import heal

        return heal(paths, argv[1])
    if argv == ["journal"]:
        from .boot.journald import write_early_report

        return write_early_report(paths)
    if argv == ["baseline"]:
        from .boot.gate import record_early_groups
        from .host.this_boot import tpm_device
        from .operations.baseline import record_good_boot
        from .operations.dump.protection import at_boot
        from .operations.policy import good_boot

        try:
            at_boot(paths)
            record_early_groups(paths)
            record_good_boot(paths, tpm_device())
        finally:  # a window is closed even if no baseline can be recorded
            good_boot(paths)
        return 0
    if argv == ["predict"]:
        from .host.this_boot import tpm_device
        from .operations.predict import predict_after_update

        return predict_after_update(paths, tpm_device())
    if argv[:1] == ["mount"]:
        from .boot.mount import mount

        return mount(paths, argv[1:])
    if argv[:1] == ["removal"]:
        from .operations.removal import removal

        return removal(paths, " ".join(argv[1:]).replace(",", " ").split())
    if len(argv) == 2 and argv[0] == "names":
        from .host.names import print_names

        return print_names(paths, argv[1])
    if argv == ["crash-kernel"]:
        from .operations.dump import kernel

        return kernel.boot(paths)
    if len(argv) == 2 and argv[0] == "gate":
        from .boot.gate import gate

        return gate(paths, argv[1])
    words = (
        "agent|close-channels|why|prompt|screen|secure|drop|scrub|heal DISK|journal|baseline|predict|names KIND|"
        "crash-kernel|gate GROUP|mount SOURCE DIRECTORY|removal [WORD ...]"
    )
    raise Usage(f"usage: unlock boot {words}")


if __name__ == "__main__":
    sys.exit(main())
