# SPDX-License-Identifier: Apache-2.0
"""`unlock dump`: dumps of processes and of the kernel, which are encrypted to the host key."""

import argparse
import time
from typing import TYPE_CHECKING

from .. import ask, log
from ..errors import Usage
from ..paths import Paths
from ..secret import Secret
from .arguments import add_accept, add_command, add_json, add_noun
from .consent import add_consent, consent

if TYPE_CHECKING:
    from ..operations.dump.kept import Dump
    from .arguments import Commands

_PLAIN = "plain-dumps"
_WHICH = "PID of the process, or name of the file, as `dump list` shows them"


def add(commands: "Commands") -> None:
    verbs = add_noun(commands, "dump", "core dumps, encrypted to the host key")
    add_command(verbs, "enable", _enable, "encrypt core dumps from now on", "unlock dump test")
    disable = add_command(verbs, "disable", _disable, "leave core dumps to systemd-coredump, or to the kernel")
    add_accept(disable, (_PLAIN,), "do it although")
    add_json(add_command(verbs, "list", _list, "the dumps that are kept, and the host key that each needs"))
    info = add_command(verbs, "info", _info, "what is known of a dump without decrypting it")
    info.add_argument("dump", metavar="DUMP", help=_WHICH)
    add_json(info)
    extract = add_command(verbs, "extract", _extract, "decrypt a dump: to a file, standard output or gdb")
    extract.add_argument("dump", metavar="DUMP", help=_WHICH)
    to = extract.add_mutually_exclusive_group()
    to.add_argument("--output", default="-", metavar="FILE", help="new file; default: standard output")
    to.add_argument("--gdb", action="store_true", help="open it in gdb, from memory")
    add_accept(extract, (_PLAIN, "cut-dump"))
    rewrap = add_command(verbs, "rewrap", _rewrap, "encrypt a copy for others, or all dumps to the present host key")
    rewrap.add_argument("dump", nargs="?", default="", metavar="DUMP", help=_WHICH)
    whom = rewrap.add_mutually_exclusive_group(required=True)
    whom.add_argument("--to", default="", metavar="RECIPIENT", help="age recipient (age1...) or SSH public key")
    whom.add_argument("--password", action="store_true", help="age asks for a password")
    whom.add_argument("--password-file", default="", metavar="FILE", help="the password is in a file; /dev/stdin too")
    whom.add_argument("--all", action="store_true", help="all dumps of former host keys")
    rewrap.add_argument("--output", default="", metavar="FILE", help="new file for the copy")
    add_json(rewrap)
    delete = add_command(verbs, "delete", _delete, "remove dumps")
    delete.add_argument("dumps", nargs="*", metavar="DUMP", help=_WHICH)
    delete.add_argument("--all", action="store_true", help="all of them")
    add_consent(delete)
    add_json(add_command(verbs, "test", _test, "crash a process, and follow its memory to a dump and back"))
    _add_kernel(add_noun(verbs, "kernel", "dumps of the kernel, by a crash kernel that encrypts them"))


def _add_kernel(verbs: "Commands") -> None:
    then = "unlock dump kernel test"
    enable = add_command(verbs, "enable", _kernel_enable, "encrypt dumps of the kernel to a partition", then)
    enable.add_argument("device", metavar="DEV", help="a partition, or a whole disk, that may be plain; it is erased")
    add_consent(enable)
    disable = add_command(verbs, "disable", _kernel_disable, "leave dumps of the kernel to kdump-tools, or have none")
    add_accept(disable, (_PLAIN,), "do it although")
    add_json(add_command(verbs, "status", _kernel_status, "whether dumps of the kernel are encrypted, and where to"))
    test = add_command(verbs, "test", _kernel_test, "prove all but the crash, or crash")
    test.add_argument("--panic", action="store_true", help="crash the kernel, for a dump after the next boot")
    add_consent(test)


def _enable(paths: Paths, options: argparse.Namespace) -> int:
    from ..operations.dump import protection

    protection.enable(paths)
    found = protection.read_protection(paths)
    log.note(f"dumps of processes: {found.detail}")
    return 0


def _disable(paths: Paths, options: argparse.Namespace) -> int:
    from ..operations.dump import protection

    protection.disable(paths, frozenset(options.accept))
    log.note("core dumps are not encrypted any more; those that are kept stay")
    return 0


def _list(paths: Paths, options: argparse.Namespace) -> int:
    from ..operations.dump import listing

    rows = listing.list_rows(paths)
    if options.json:
        log.show_json({"version": 1, "dumps": [_to_json(each.dump, each.key) for each in rows]})
        return 0
    cells = [
        (
            _when(each.dump),
            "-" if each.dump.of_kernel else str(each.dump.pid),
            "-" if each.dump.of_kernel else str(each.dump.uid),
            each.dump.signal_name,
            f"{each.dump.kind} {each.dump.comm}" if each.dump.of_kernel else each.dump.comm,
            _size(each.dump.size),
            f"{each.dump.generation}, {each.key}",
        )
        for each in rows
    ]
    if not cells:
        log.show("no dumps")
        return 0
    for line in log.columns([("TIME", "PID", "UID", "SIGNAL", "PROCESS", "SIZE", "HOST KEY"), *cells]):
        log.show(line)
    return 0


def _info(paths: Paths, options: argparse.Namespace) -> int:
    from ..operations.dump import listing

    row = listing.find_row(paths, options.dump)
    if options.json:
        log.show_json({"version": 1, **_to_json(row.dump, row.key)})
        return 0
    dump = row.dump
    for name, value in (
        ("file", dump.path),
        ("time", _when(dump)),
        *(
            [(dump.kind.replace("-", " "), dump.comm)]
            if dump.of_kernel
            else [
                ("process", f"{dump.comm}, PID {dump.pid}, UID {dump.uid}"),
                ("signal", f"{dump.signal} ({dump.signal_name})"),
            ]
        ),
        ("size", f"{_size(dump.size)}, {'compressed, ' if dump.packed else ''}encrypted"),
        ("host key", f"generation {dump.generation}, fingerprint {dump.fingerprint}: {row.key}"),
    ):
        log.show(f"{name:<10} {value}")
    return 0


def _extract(paths: Paths, options: argparse.Namespace) -> int:
    from ..keys.access import Work
    from ..operations.dump import extract, kept

    dump, accept = kept.find_dump(paths, options.dump), frozenset(options.accept)
    with Work(paths) as work:
        if options.gdb:
            return extract.to_gdb(work, dump, accept)
        if options.output == "-":
            extract.to_output(work, dump, accept)
        else:
            extract.to_file(work, dump, options.output, accept)
    return 0


def _rewrap(paths: Paths, options: argparse.Namespace) -> int:
    from ..host.lock import exclusive
    from ..keys.access import Work
    from ..operations.dump import kept, rewrap

    if options.all:
        if options.dump or options.output:
            raise Usage("--all moves all dumps where they are", "unlock dump rewrap --all")
        with exclusive(paths), Work(paths) as work:
            rows = rewrap.rewrap_all(work)
        if options.json:
            log.show_json({"version": 1, "dumps": [{"name": each.name, "outcome": each.outcome} for each in rows]})
        for each in rows:
            if not options.json:
                log.show(f"{each.outcome}: {each.name}")
            if each.error:
                log.error(str(each.error), each.error.hint)
        return max((each.error.status for each in rows if each.error), default=0)
    if not options.dump or not options.output:
        raise Usage("a copy needs a dump and a new file", "unlock dump rewrap DUMP --to RECIPIENT --output FILE")
    dump = kept.find_dump(paths, options.dump)
    with Work(paths) as work, ask.from_file(options.password_file) if options.password_file else Secret(b"") as given:
        rewrap.for_others(work, dump, options.output, recipient=options.to, password=given or None)
    if options.json:
        log.show_json({"version": 1, "file": options.output})
    else:
        log.note(f"to open it: age --decrypt {options.output}{' | zstd -d' if dump.packed else ''}")
    return 0


def _delete(paths: Paths, options: argparse.Namespace) -> int:
    from ..operations.dump import delete

    if bool(options.dumps) == options.all:
        raise Usage("name dumps, or give --all", "unlock dump list")
    gone = delete.delete(paths, options.dumps, consent(options))
    if options.json and not options.dry_run:
        log.show_json({"version": 1, "deleted": gone})
    elif not options.dry_run:
        for name in gone:
            log.show(f"deleted: {name}")
    return 0


def _test(paths: Paths, options: argparse.Namespace) -> int:
    from ..keys.access import Work
    from ..operations.dump import trial

    with Work(paths) as work:
        found = trial.test(work)
    if options.json:
        log.show_json({"version": 1, **found._asdict()})
        return 0
    log.show(
        f"good: a process crashed, its dump of {_size(found.size)} was there after {found.seconds:.1f} s, encrypted to "
        f"host key {found.generation}, which opens it"
    )
    return 0


def _kernel_enable(paths: Paths, options: argparse.Namespace) -> int:
    from ..operations.dump import kernel

    kernel.enable(paths, options.device, consent(options))
    return 0 if options.dry_run else _kernel_status(paths, options)


def _kernel_disable(paths: Paths, options: argparse.Namespace) -> int:
    from ..operations.dump import kernel

    kernel.disable(paths, frozenset(options.accept))
    log.note("from the next boot on unlock has no crash kernel; dumps that are kept stay")
    return 0


def _kernel_status(paths: Paths, options: argparse.Namespace) -> int:
    from ..operations.dump import kernel

    found = kernel.read_kernel_protection(paths)
    if options.json:
        log.show_json({"version": 1, **found._asdict()})
        return 0
    log.show(f"dumps of the kernel: {found.detail}")
    for name, value in (
        ("partition", f"{found.device}: {found.state}" if found.device else "none"),
        ("memory", f"{_size(found.memory)} for a crash kernel" if found.memory else "none for a crash kernel"),
        ("loaded", "yes" if found.loaded else "no"),
        ("locked", "no other can be loaded in this boot" if found.locked else "no"),
    ):
        log.show(f"{name:<9} {value}")
    if found.do:
        log.show(f"to do     {found.do}")
    return 0


def _kernel_test(paths: Paths, options: argparse.Namespace) -> int:
    from ..keys.access import Work
    from ..operations.dump import kernel

    with Work(paths) as work:
        found = kernel.test(work)
    if options.panic:
        kernel.panic(paths, consent(options))
        return 0
    if options.json:
        log.show_json({"version": 1, **found._asdict()})
        return 0
    log.show(
        f"good: the crash kernel is loaded, in {_size(found.memory)}; it encrypts to host key {found.generation}, which"
        f" opens that, on {found.device}; the kernel itself uses {_size(found.estimate)} now"
    )
    return 0


def _to_json(dump: "Dump", key: str) -> dict[str, object]:
    fields = ("pid", "uid", "comm", "time", "signal", "size", "generation", "fingerprint")
    said = {name: getattr(dump, name) for name in fields}
    return {"name": dump.name, "kind": dump.kind, **said, "compressed": dump.packed, "key": key}


def _when(dump: "Dump") -> str:
    return time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime(dump.time))


def _size(size: int) -> str:
    return f"{size >> 20} MiB" if size >= 10 << 20 else f"{-(-size // 1024)} KiB"
