# SPDX-License-Identifier: Apache-2.0
"""`unlock policy predict`: an update must not lock the host out.

    Booted (what this boot has read), its event log, the files as they are now
      ──foresee──> for each entry that may come next: words, what changed, PCR values or why they cannot be told
      ──predict──> allowed.predicted: the TPM releases the key to those boots too

Only a boot that the TPM allowed may predict, and only from files that it has measured, or that this system has written
since: nothing else vouches for /boot (unlock.booted). What a file does not tell (firmware, its settings, a new shim) is
never guessed: those PCRs stay as they are, or it is Refused.
"""

import os
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from hashlib import sha256
from typing import Any, NamedTuple

from . import (
    allowed,
    atunseal,
    booted,
    eventlog,
    explain,
    grub,
    log,
    measured,
    policy,
    predict,
    sdboot,
    thisboot,
    uefi,
)
from .booted import Booted
from .errors import Malformed, Refused, UnlockError
from .eventlog import Event, Log
from .paths import Paths
from .state import State
from .tpm import Tpm

MOST = 6
"""Entries that are predicted: a policy holds eight states, and two are this boot's and the one before."""

_BY_FILES = {4, 5, 8, 9, 11, 12, 13}
"""PCRs in which programs, configuration, kernel and initramfs are measured."""
_UNSIGNED = "it is not signed, and Secure Boot is on"
_SOME = b"\xff" * 32
"""Of a PCR that was extended, and by what cannot be told."""


class Entry(NamedTuple):
    """A boot that may come next."""

    words: str
    """kernel 6.12.48; with the boot menu's title for all but the default entry."""
    changes: tuple[str, ...]
    """What differs from this boot."""
    values: Mapping[int, bytes] | None
    """PCRs 0 to 15 when early boot asks the TPM; None when they cannot be told."""
    why: str
    """Why not; empty when they can."""
    default: bool
    initrd: str = ""
    """The file with its initramfs, or the unified kernel image that it is in, below the root directory; "" when that is
    not known."""
    doubt: str = ""
    """What the values depend on; "" when that is nothing."""


class World(NamedTuple):
    """All that is looked at."""

    paths: Paths
    log: Log
    before: Booted
    later: tuple[Event, ...]
    """What systemd measured before early boot asked the TPM."""
    values: Mapping[int, bytes]
    """PCRs of this boot at that time."""
    secure: bool
    """Whether Secure Boot is on, and who signed counts: the policy has PCR 7."""


class Foreseen(NamedTuple):
    entries: tuple[Entry, ...]
    notes: tuple[str, ...]
    states: int
    """How many the policy has now."""
    doubts: tuple[str, ...] = ()
    """Those of the notes that what is predicted depends on."""
    needed: bool = True
    """Whether the TPM looks at what an update of files changes; else there are no entries."""


# Foreseeing -------------------------------------------------------------------------------------------------


def foresee(world: World) -> tuple[list[Entry], list[str], list[str]]:
    """The entries that may boot next, the default one first, what that depends on, and what else is worth knowing.
    Raises Refused."""
    doubts, notes = _programs(world), list[str]()
    kind = atunseal.how_booted(world.paths, {pcr: world.values.get(pcr, _SOME) for pcr in range(16)})
    if kind == "shim+GRUB":
        found = _grub(world)
        if world.before.disks != booted.disks(world.paths):
            doubts.append("disks came or went since this boot: GRUB measures their numbers, which may be others then")
    elif kind == "UKI":
        found = _ukis(world)
    elif kind == "direct kernel":
        found = _direct(world)
    else:
        raise predict.cannot("how this host boots is not known")
    entries = sorted(found, key=lambda each: not each.default)
    if not entries or not entries[0].default:
        raise predict.cannot("what it would start by itself is not there any more")
    doubts += dict.fromkeys(each.doubt for each in entries if each.doubt and each.default)
    notes += dict.fromkeys(each.doubt for each in entries if each.doubt and each.doubt not in doubts)
    if len(entries) > MOST:
        left = ", ".join(each.words for each in entries[MOST:])
        notes.append(f"the policy has no room for all entries of the boot menu; not predicted: {left}")
    return entries[:MOST], doubts, notes


def _programs(world: World) -> list[str]:
    """What is said of a GRUB or systemd-boot that is new, or not on disk as it was booted. Refused for such a shim."""
    notes = []
    shim = any(event.pcr == 14 and event.data.startswith(b"MokList") for event in world.log.events)
    loaders, images = dict(_loaders(world)), dict(world.before.images)
    started = [each for each in world.log.events if each.kind == eventlog.EFI_APPLICATION and each.pcr == 4]
    files = [(each, name) for each in started if "\\" in (name := booted.program(each))]
    for number, (event, name) in enumerate(files):
        digest = event.digest or b""
        path = images.get(digest) or booted.started(world.paths, event)
        if path and (digest not in loaders or booted.authenticode(world.paths, path) == digest):
            continue
        there = path or next(booted.programs(world.paths, name), "")
        if shim and not number and there:
            why = "is not this boot's: which revocations a new shim measures is not known"
            raise predict.cannot(f"{there} {why}")
        if path:
            notes.append(f"{path} is not this boot's: predicted as if it did the same")
        elif there:
            notes.append(f"{there} is not on disk as it was booted")
        else:
            notes.append(f"{name} cannot be seen: is the EFI system partition mounted?")
    for path in loaders.values():
        why, doubt = _signed(world, path, path)
        if why:
            raise predict.cannot(f"{path}: {why}")
        notes += [doubt] if doubt else []
    return notes


def _signed(world: World, old: str, new: str) -> tuple[str, str]:
    """Why a program that comes in the place of another will not start, and what is doubtful about it."""
    was = world.before.signed.get(old)
    if not world.secure or not was or (now := booted.signed(world.paths, new)) in (was, None):
        return "", ""
    return ("", f"{new} is signed by another key: PCR 7 may change") if now else (_UNSIGNED, "")


def _loaders(world: World) -> list[tuple[bytes, str]]:
    """The programs before the kernel, or before the unified kernel image: shim, and what has a boot menu."""
    read = {path for path, _ in world.before.files.values()}
    found = [(digest, path) for digest, path in world.before.images if path not in read]
    return found if world.before.files else found[:-1]


def _grub(world: World) -> Iterator[Entry]:
    before = world.before
    images = {path: digest for digest, path in before.images}

    learned = predict.learn(world.log, before.texts, lambda name: images.get(before.files.get(name, ("", b""))[0], b""))
    where = _places(world)
    disk = _disk(world, where)
    for name in before.texts:
        if name != learned.name and name.endswith(".cfg") and _changed(world, name):
            raise predict.cannot(f"{before.files[name][0]} has changed, and GRUB reads it before its menu")
    try:
        text = disk.content(learned.name).decode("utf-8", "surrogateescape")
    except grub.Unknown as problem:
        raise predict.cannot(str(problem)) from None
    later = _without_once(disk, f"{learned.variables['prefix']}/grubenv")
    for number, (title, titles) in enumerate(predict.menu(learned, text, disk)):
        yield _grub_entry(world, learned, text, title, titles, disk, where, not number)
        if later and not number:
            title, titles = next(predict.menu(learned, text, later))
            after = _grub_entry(world, learned, text, title, titles, later, where, False)
            yield after._replace(words=f"{after.words}, after the next boot")


def _grub_entry(
    world: World,
    learned: predict.Learned,
    text: str,
    title: str,
    titles: Sequence[str],
    disk: predict.Disk,
    where: Callable[[str], str],
    default: bool,
) -> Entry:
    try:
        events, kernel = predict.boot(learned, text, titles, disk)
    except UnlockError as problem:
        return Entry(f"menu entry {title}", (), None, str(problem), default)
    old = learned.kernel
    version, before = (_version(each.words[0]) for each in (kernel, old))
    changes = []
    if version != before:
        changes.append(f"kernel {version} instead of {before}")
    elif _changed(world, kernel.words[0]):
        changes.append(f"kernel {version} was replaced")
    for name in kernel.initrds:
        if name in old.initrds and _changed(world, name):
            changes.append(f"initramfs of {_version(name)}")
    if kernel.words[1:] != old.words[1:]:
        changes.append("kernel command line")
    if text != world.before.texts[learned.name]:
        changes.append("grub.cfg")
    if tuple(titles) != learned.way:
        changes.append("another menu entry")
    words = f"kernel {version}" + ("" if default else f", menu entry {title}")
    if old.initrds and not kernel.initrds:
        return Entry(words, tuple(changes), None, "it starts no initramfs, so nothing opens a disk", default)
    loaded = [where(name) for name in (kernel.words[0], *kernel.initrds)]
    if foreign := _foreign(world, loaded):
        return Entry(words, tuple(changes), None, foreign, default)
    entry = _entry(world, words, changes, events, default, loaded[0])
    return entry._replace(initrd=loaded[1]) if loaded[1:] else entry


def _changed(world: World, name: str) -> bool:
    path, digest = world.before.files.get(name, ("", b""))
    data = booted.read(world.paths, path) if path else None
    return data is None or sha256(data).digest() != digest


def _version(name: str) -> str:
    """Of /vmlinuz-6.12.48 or /initrd.img-6.12.48."""
    return os.path.basename(name).partition("-")[2] or os.path.basename(name)


def _foreign(world: World, loaded: Iterable[str]) -> str:
    """Why nothing vouches for one of these files; empty when something does."""
    for path in loaded:
        data = booted.read(world.paths, path) or b""
        real = os.path.relpath(
            os.path.realpath(os.path.join(world.paths.root, path)), os.path.realpath(world.paths.root)
        )
        digest = sha256(data).digest()
        if any(world.before.is_foreign(name, digest) for name in (path, real)):
            return f"{path} was changed while this host was off, or before it was looked at: --trust-files if by you"
    return ""


def _places(world: World) -> Callable[[str], str]:
    """GRUB's names for files -> paths below the root directory, as far as this boot's show where they are mounted."""
    places = {}
    for name, (path, _) in world.before.files.items():
        device, rest = _parted(name)
        if path.endswith(rest.lstrip("/")):
            places[device] = path[: len(path) - len(rest.lstrip("/"))]

    def where(name: str) -> str:
        device, rest = _parted(name)
        if device not in places or not rest.startswith("/") or ".." in rest.split("/"):
            raise grub.Elsewhere(f"where {name} is on disk is not known")
        return os.path.join(places[device], rest.lstrip("/"))

    return where


def _disk(world: World, where: Callable[[str], str]) -> predict.Disk:
    def content(name: str) -> bytes:
        data = booted.read(world.paths, where(name))
        if data is None:
            raise grub.Unknown(f"{name} is not on disk")
        return data

    def test(kind: str, name: str) -> bool:
        path = os.path.join(world.paths.root, where(name))
        if kind == "s":
            return os.path.isfile(path) and os.path.getsize(path) > 0
        return {"d": os.path.isdir, "e": os.path.exists, "f": os.path.isfile}[kind](path)

    def image(name: str) -> bytes:
        digest = booted.authenticode(world.paths, where(name))
        if digest is None:
            raise grub.Unknown(f"{name} is no kernel that is on disk")
        return digest

    return predict.Disk(content, lambda name: sha256(content(name)).digest(), image, test)


def _without_once(disk: predict.Disk, environment: str) -> predict.Disk | None:
    """What the boot after `grub-reboot` will have found: GRUB takes the entry out of its environment. None without."""
    try:
        old = disk.content(environment).decode("utf-8", "surrogateescape")
    except grub.Unknown:
        return None
    new = grub.with_variable(old, "next_entry", "").encode("utf-8", "surrogateescape")
    if new.decode("utf-8", "surrogateescape") == old:
        return None
    return disk._replace(
        content=lambda name: new if name == environment else disk.content(name),
        sha256=lambda name: sha256(new).digest() if name == environment else disk.sha256(name),
    )


def _parted(name: str) -> tuple[str, str]:
    """(hd0,gpt2)/grub/grub.cfg: the device, which may be none, and the rest."""
    if name.startswith("("):
        device, _, rest = name.partition(")")
        return f"{device})", rest
    return "", name


def _direct(world: World) -> Iterator[Entry]:
    """The firmware starts the kernel. A kernel that is not on disk (QEMU -kernel) stays as it is."""
    if _loaders(world):
        raise predict.cannot("entries of systemd-boot that are no unified kernel images are not understood")
    changes, words = [], []
    version = ""
    for digest, path in world.before.images[-1:]:
        now = booted.authenticode(world.paths, path)
        version = _version(path)
        if now is None:
            raise predict.cannot(f"the kernel {path} is not there any more")
        if now != digest:
            changes.append(predict.Change("the kernel", digest, now))
            words.append(f"kernel {version} was replaced")
    if path := world.before.initrd:
        old = [e.digest for e in world.log.events if e.kind == eventlog.EVENT_TAG and e.data[:4] == eventlog.INITRD]
        data = booted.read(world.paths, path)
        if data is None:
            raise predict.cannot(f"the initramfs {path} is not there any more")
        version = version or _version(path)
        if old[-1] and sha256(data).digest() != old[-1]:
            changes.append(predict.Change("the initramfs", old[-1], sha256(data).digest()))
            words.append(f"initramfs of {_version(path)}")
    if line := _options(world):
        changes.append(line)
        words.append("kernel command line")
    if not world.before.images and not world.before.initrd:
        raise predict.cannot("neither the kernel nor the initramfs of this boot is a file on disk")
    kernel = world.before.images[-1][1] if world.before.images else ""
    entry = _entry(world, f"kernel {version}", words, predict.changed(world.log, changes), True, kernel)
    yield entry._replace(initrd=world.before.initrd or _named_initrd(world))


def _named_initrd(world: World) -> str:
    """The file that `initrd=` names, on the EFI system partition that the kernel is on; "" when it is not there."""
    name = re.search(r"(?:^|\s)initrd=(\S+)", atunseal.read(world.paths.cmdline, 4096).decode("utf-8", "replace"))
    kernel = world.before.images[-1][1] if world.before.images else ""
    for esp in booted.ESPS if name and kernel else ():
        path = os.path.join(esp, name[1].replace("\\", "/").lstrip("/"))  # type: ignore[index]
        if kernel.startswith(f"{esp}/") and os.path.isfile(os.path.join(world.paths.root, path)):
            return path
    return ""


def _options(world: World) -> predict.Change | None:
    """The kernel command line, when it was changed in the boot entry by which the firmware has started the kernel."""
    entry = atunseal.boot_entry(world.paths)
    try:
        was = uefi.load_option(atunseal.variables(world.log).get(entry, b"")).options
        now = uefi.load_option(atunseal.variable(world.paths, entry)).options
    except Malformed:  # nothing was started by an entry, or it is gone
        return None
    return predict.command_line(was, now) if was != now else None


def _ukis(world: World) -> Iterator[Entry]:
    """The unified kernel image that was booted, as it is now, and the others of the menu, what comes by itself among
    them."""
    before = world.before
    if not before.uki:
        raise predict.cannot("the unified kernel image of this boot is not on disk as it was booted")
    listed = sdboot.menu(world.paths)
    own = _now_named(before.images[-1][1], listed)
    comes = sdboot.comes(world.paths, _started_from(world), listed) if _has_menu(world) else set()
    unified = {each.path: each.id for each in listed if each.unified}
    for name in sorted(comes - set(unified.values())):
        yield Entry(f"boot entry {name}", (), None, "it is no unified kernel image like this boot's", True)
    for path in [own, *(each for each in unified if each != own)]:
        default = path == own or unified[path] in comes
        data = booted.read(world.paths, path)
        if data is None:  # its kernel was removed
            continue
        words = f"unified kernel image {os.path.basename(path)}"
        try:
            image = predict.read_unified(data)
        except Malformed as problem:
            yield Entry(words, (), None, str(problem), default)
            continue
        events = predict.unified(world.log, before.images[-1][0], image)
        changes = [] if image.image == before.images[-1][0] else ["unified kernel image"]
        if path != own:
            changes.append("another menu entry")
        if foreign := _foreign(world, [path]):
            yield Entry(words, tuple(changes), None, foreign, default)
            continue
        if booted.beside(world.paths, path) != before.beside:
            other = "add-ons or credentials beside it are not those of this boot"
            yield Entry(words, tuple(changes), None, other, default)
            continue
        entry = _entry(world, words, changes, events, default, path)
        if changes and entry.values is not None:  # systemd-stub adds to what the kernel's own stub measures
            entry = entry._replace(values={pcr: value for pcr, value in entry.values.items() if pcr != 9})
        yield entry._replace(initrd=path)


def _now_named(own: str, listed: Iterable[sdboot.Listed]) -> str:
    """This boot's image; after a boot that was good its name has no counter any more."""
    names = [each.path for each in listed if booted.uncounted(each.path) == booted.uncounted(own)]
    return names[0] if names and own not in names else own


def _has_menu(world: World) -> bool:
    """Whether a program has started the unified kernel image: systemd-boot, and not the firmware."""
    programs = (each.digest for each in world.log.events if each.kind == eventlog.EFI_APPLICATION and each.pcr == 4)
    return next(programs, b"") != world.before.images[-1][0]


def _started_from(world: World) -> str:
    """Where the file system with systemd-boot is mounted. The image may lie on another: an extended boot loader
    partition."""
    return [booted.esp_of(path) for _, path in (world.before.images[-1], *_loaders(world))][-1]


def _entry(
    world: World, words: str, changes: Iterable[str], events: Iterable[Event], default: bool, kernel: str
) -> Entry:
    """PCRs that are as the log has them now keep their value, whatever that is; of the others, the log must account.
    `kernel`: the file that comes in the place of this boot's kernel, or unified kernel image; "" for one on no disk."""
    loaders = _loaders(world)
    old = next((path for digest, path in reversed(world.before.images) if (digest, path) not in loaders), "")
    unsigned, doubt = _signed(world, old, kernel)
    if unsigned:
        return Entry(words, tuple(changes), None, unsigned, default)
    programs = {digest: booted.authenticode(world.paths, path) or digest for digest, path in loaders}
    changes = [*changes, *(["boot loader"] if any(was != now for was, now in programs.items()) else [])]
    events = [each._replace(digest=programs.get(each.digest or b"", each.digest)) for each in events]
    was = eventlog.replay([*world.log.events, *world.later], world.log.locality)
    will = eventlog.replay([*events, *world.later], world.log.locality)
    values = dict(world.values)
    for pcr in range(16):
        if pcr == policy.CAP_PCR or was.get(pcr) == will.get(pcr):
            continue
        if was.get(pcr) != world.values.get(pcr) or pcr not in will:
            return Entry(words, tuple(changes), None, f"the event log does not account for PCR {pcr}", default)
        values[pcr] = will[pcr]
    return Entry(words, tuple(changes), values, "", default, doubt=doubt)


# The host ---------------------------------------------------------------------------------------------------


def gather(paths: Paths, tpm: Tpm) -> World:
    """Refused when this boot left no log, or one that does not account for what files change, or is none that the TPM
    allows. Sends reading commands alone."""
    later = eventlog.parse_systemd(atunseal.read(paths.systemd_log, eventlog.MAX_SYSTEMD_LOG))
    live = tpm.read_pcrs(range(eventlog.PCRS))
    found, problem = atunseal.event_log(paths, later, live)
    if found is None:
        raise predict.cannot(problem)
    allows = allowed.current(paths, tpm)
    if not allows.opened:
        raise Refused(
            "this boot is none that the TPM allows: nothing is predicted from it", "unlock explain", "boot-not-allowed"
        )
    unknown = _BY_FILES & set(allows.record.selection) - measured.believed(found, later, live).keys()
    if unknown:
        raise predict.cannot(f"the event log does not account for PCR {min(unknown)}: what is measured is not known")
    asked = atunseal.asked(thisboot.early(paths), 0.0)
    early = tuple(event for event in later if event.time < asked)
    secure = 7 in allows.record.selection and atunseal.variables(found).get("SecureBoot") == b"\1"
    return World(paths, found, booted.load(paths, found), early, atunseal.values(paths, tpm), secure)


def run(paths: Paths, tcti: str, dry_run: bool = False, trust_files: bool = False) -> Foreseen:
    """Foresees, and reseals. `trust_files`: the operator vouches for those that are foreign. An entry that cannot be
    predicted leaves out no other. Raises Refused, and whatever `allowed.predicted` raises."""
    State.load(paths)
    with Tpm(tcti) as tpm:
        found = allowed.current(paths, tpm)
        if not _BY_FILES & set(found.record.selection):
            note = "no update of files changes what the TPM looks at: there is nothing to predict"
            return Foreseen((), (note,), len(found.states), needed=False)
        world = gather(paths, tpm)
        if trust_files:
            world = world._replace(before=world.before._replace(foreign={}))
        entries, doubts, notes = foresee(world)
        entries = [_told(each, found.record.selection) for each in entries]
        states = len(allowed.current(paths, tpm).states)
    good = {each.words: each.values for each in entries if each.values is not None}
    if good and not dry_run:
        states = len(allowed.predicted(paths, good, tcti).states)
    if not dry_run:
        if trust_files:
            booted.save(paths, world.before)
        booted.vouch(paths, world.before)
    return Foreseen(tuple(entries), (*doubts, *notes), states, tuple(doubts))


def _told(entry: Entry, selection: Iterable[int]) -> Entry:
    """Not predicted when a PCR of the policy is not told."""
    try:
        atunseal.of(selection, entry.values or {})
    except Refused:
        if entry.values is not None:
            unknown = min(set(selection) - entry.values.keys())
            return entry._replace(values=None, why=f"what it will measure into PCR {unknown} cannot be told")
    return entry


def refused(found: Foreseen) -> Refused | None:
    """When the default entry cannot be predicted."""
    bad = [each for each in found.entries if each.default and each.values is None]
    return (
        predict.cannot(bad[0].why.removeprefix("the next boot's measurements cannot be predicted: ")) if bad else None
    )


def keep(paths: Paths, tcti: str) -> None:
    """After a boot that the TPM allowed, and when the key was sealed to this one: what was measured, and which files it
    came from, before an update replaces them."""
    sealed = allowed.this_boot(paths, tcti)
    found, _ = atunseal.event_log(paths)
    try:
        explain.keep_baseline(paths, tcti, sealed)
        if sealed and found:
            before = booted.keep(paths, found)
            if not os.path.exists(paths.boot_files):
                booted.vouch(paths, before)
    except (OSError, Malformed) as problem:
        log.error(f"what this boot has measured cannot be kept: {problem}", "unlock check")


def hook(paths: Paths, tcti: str) -> int:
    """`unlock boot predict`, after an update: says on stderr what the next boot will do. 1 when it is worth
    trying again though no file changes: another command was at work, or the TPM failed."""
    if not os.path.exists(paths.state):
        return 0
    try:
        found = run(paths, tcti)
    except UnlockError as problem:
        if problem.code == "not-initialised":
            return 0
        _warn(problem)
        return 0 if problem.code in ("cannot-predict", "boot-not-allowed", "no-key", "pin-needed") else 1
    except OSError as problem:
        _warn(predict.cannot(str(problem)))
        return 1
    for each in found.entries:
        if each.values is not None and each.changes:
            log.note(f"unlock: next boot: {each.words} is predicted: {', '.join(each.changes)}")
    for note in found.notes:
        log.note(f"unlock: {note}")
    if bad := refused(found):
        _warn(bad)
    return 0


def _warn(problem: UnlockError) -> None:
    log.error(str(problem), problem.hint)
    log.note("unlock: at the next boot the TPM may refuse; the recovery key opens the disks then")


def fields(found: Foreseen) -> dict[str, Any]:
    """For scripts."""
    return {
        "version": 1,
        "entries": [
            {
                "words": each.words,
                "default": each.default,
                "predicted": each.values is not None,
                "changes": list(each.changes),
                "why": each.why,
                "pcrs": {str(pcr): value.hex() for pcr, value in sorted((each.values or {}).items())},
            }
            for each in found.entries
        ],
        "notes": list(found.notes),
        "states": found.states,
    }


def text(found: Foreseen) -> str:
    lines = []
    for each in found.entries:
        what = ", ".join(each.changes) or "as this boot"
        lines.append(f"{each.words}: " + (f"predicted: {what}" if each.values is not None else f"not: {each.why}"))
    return "\n".join([*lines, *(f"note: {each}" for each in found.notes)])
