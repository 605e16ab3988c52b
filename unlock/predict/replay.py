# SPDX-License-Identifier: Apache-2.0
"""PCR values of a boot that has not happened: the log of this one, replayed with what changed on disk.

    direct kernel (4, 9)       image(), initrd(), command_line()
    shim + GRUB (4, 8, 9)      learn() this boot's log and grub.cfg ──boot──> events of an entry of the new one
    UKI, systemd-stub (4, 11)  unified()
    ──> Changes, each from a digest that the log has to one that it will have ──predict──> PCR values

Every change names the old content too, and its digest must be in the log: what this boot measured is reproduced from
the files before anything is said of the next one. Where it is not, the answer is Refused, never a guess.
"""

import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from hashlib import sha256
from typing import NamedTuple

from ..errors import Malformed, Refused
from ..measured import eventlog, uefi
from ..measured.eventlog import Event, Log
from . import grub_script, pe

SECTIONS = (
    ".linux", ".osrel", ".cmdline", ".initrd", ".ucode", ".splash", ".dtb", ".uname", ".sbat", ".pcrpkey",
    ".profile", ".dtbauto", ".hwids", ".efifw",
)  # fmt: skip
"""What systemd-stub measures into PCR 11, in this order: systemd src/fundamental/uki.c. .pcrsig signs it, so is not."""
_COMMAND, _KERNEL = b"grub_cmd: ", b"kernel_cmdline: "
_LOADS = {"linux": "linux", "linuxefi": "linux", "initrd": "initrd", "initrdefi": "initrd"}
_SILENT = {
    "[", "test", "set", "unset", "export", "echo", "menuentry", "submenu", "setparams", "true", "false",
    "terminal_input", "terminal_output", "save_env", "fwsetup",
}  # fmt: skip
"""Commands that read no file, so that GRUB measures nothing but their words."""
_CATALOG = re.compile(r"(?:set )?(?:lang|locale_dir|secondary_locale_dir|theme)=")
"""GRUB reads a catalog, or a theme, when these are set; which, it alone knows."""
_SIZED = re.compile(r"(?:^| )-s (\S+)")
"""GRUB's `test -s` opens the file; -e, -f and -d look into its directory."""
_FLIPS = 100
_ENDS = ("", "\0")
"""Of the kernel's load options: GRUB 2.12 leaves the NUL out, others do not."""


class Change(NamedTuple):
    """A measured thing, as it was and as it will be: SHA-256 digests."""

    what: str
    old: bytes
    new: bytes


def changed(log: Log, changes: Iterable[Change]) -> list[Event]:
    """The log's events with these changes.

    Refused when a change's old digest is not in the log, or two changes contradict each other.
    """
    replaced: dict[bytes, Change] = {}
    for change in changes:
        before = replaced.setdefault(change.old, change)
        if before.new != change.new:
            raise cannot(f"{change.what} and {before.what} are measured alike now, and not later")
    seen = {event.digest for event in log.events}
    for change in replaced.values():
        if change.old not in seen:
            raise cannot(f"this boot has not measured {change.what} as it is on disk")
    return [
        event._replace(digest=replaced[event.digest].new) if event.digest in replaced else event for event in log.events
    ]


def predict(log: Log, changes: Iterable[Change], later: Sequence[Event] = ()) -> dict[int, bytes]:
    """PCR values after the log's events with these changes, then `later`: what systemd measures before the unseal.

    Raises as `changed`.
    """
    return eventlog.replay([*changed(log, changes), *later], log.locality)


def cannot(why: str) -> Refused:
    """Refused, code `cannot-predict`."""
    return Refused(
        f"the next boot's measurements cannot be predicted: {why}", "unlock policy window --reboots 1", "cannot-predict"
    )


# What changes -----------------------------------------------------------------------------------------------


def image(what: str, old: bytes, new: bytes) -> Change:
    """An EFI program that the firmware or shim loads (PCR 4). Malformed."""
    return Change(what, pe.authenticode(old), pe.authenticode(new))


def file(what: str, old: bytes, new: bytes) -> Change:
    """A file that GRUB reads, or an initramfs that the kernel's EFI stub gets (PCR 9)."""
    return Change(what, sha256(old).digest(), sha256(new).digest())


def command_line(old: bytes, new: bytes) -> Change:
    """Load options, which the kernel's EFI stub measures as they are (PCR 9): UTF-16, most often with its NUL."""
    return Change("the kernel command line", sha256(old).digest(), sha256(new).digest())


class Unified(NamedTuple):
    """What is measured of a unified kernel image."""

    image: bytes
    kernel: bytes
    sections: tuple[bytes, ...]
    """By systemd-stub, into PCR 11."""


def read_unified(data: bytes) -> Unified:
    """Raises Malformed."""
    kernel = pe.authenticode(_sections(data)[".linux"])
    return Unified(pe.authenticode(data), kernel, tuple(uki_measurements(data)))


def unified(log: Log, old: bytes, new: Unified) -> list[Event]:
    """The log's events when another unified kernel image is booted: itself and the kernel in it (PCR 4), its sections
    (PCR 11). `old`: what the firmware measured of the one before.

    Refused when this boot did not start `old`. What the kernel's EFI stub measures then (PCR 9) stays: systemd-stub
    adds to command line and initramfs.
    """
    programs = (at for at, event in enumerate(log.events) if event.pcr == 4 and event.kind == eventlog.EFI_APPLICATION)
    images = [at for at in programs if not is_addon(log.events[at])]
    own = next((at for at in images if log.events[at].digest == old), None)
    handed = [at for at in images if own is not None and at > own]  # systemd-stub 257 starts the kernel by itself
    if own is None or len(handed) > 1:
        raise cannot("this boot has not started the unified kernel image, and at most a kernel after it")
    renewed = {own: new.image, **dict.fromkeys(handed, new.kernel)}
    sections = [Event(11, eventlog.IPL, digest, b"") for digest in new.sections]
    events: list[Event] = []
    for at, event in enumerate(log.events):
        if event.pcr == 11 and event.kind == eventlog.IPL:
            events += sections
            sections = []
        else:
            events.append(event._replace(digest=renewed.get(at, event.digest)))
    return events


def is_addon(program: Event) -> bool:
    """Whether it is no program, but what systemd-stub adds to the unified kernel image: systemd-stub(7)."""
    try:
        return uefi.image_path(program.data).lower().endswith(".addon.efi")
    except Malformed:
        return False


def _sections(data: bytes) -> dict[str, bytes]:
    layout = pe.read(data)
    found = {name: pe.section(data, layout, name) for name in SECTIONS}
    if found[".linux"] is None:
        raise Malformed("not a unified kernel image: it has no section .linux")
    return {name: content for name, content in found.items() if content is not None}


def uki_measurements(data: bytes) -> list[bytes]:
    """The digests that systemd-stub extends PCR 11 with: of each section its name with NUL, then its content."""
    return [
        sha256(part).digest() for name, content in _sections(data).items() for part in (f"{name}\0".encode(), content)
    ]


# GRUB -------------------------------------------------------------------------------------------------------


class Disk(NamedTuple):
    """What GRUB would find now, by the name that it has for a file: (hd0,gpt2)/grub/grub.cfg. Each raises
    grub.Unknown for what it cannot tell."""

    content: Callable[[str], bytes]
    sha256: Callable[[str], bytes]
    image: Callable[[str], bytes]
    """What the firmware measures of an EFI program: Authenticode."""
    test: Callable[[str, str], bool]
    """GRUB's `test` of a file: d, e, f or s."""


class Kernel(NamedTuple):
    """The files that GRUB starts. `words` are those of the command `linux`, the kernel's name first."""

    words: tuple[str, ...]
    image: bytes
    """What the firmware measures of it, where GRUB hands it on: Authenticode."""
    initrds: tuple[str, ...]


class Learned(NamedTuple):
    """A boot through GRUB, understood: running its grub.cfg again gives the commands that its log has."""

    events: tuple[Event, ...]
    """Before GRUB read grub.cfg."""
    config: Event
    name: str
    """GRUB's, of grub.cfg."""
    variables: Mapping[str, str]
    outcomes: Mapping[str, bool]
    sides: Mapping[str, tuple[tuple[Event, ...], ...]]
    """Command -> what else was measured, each time that it was run, before the next one."""
    tail: tuple[Event, ...]
    """After the last command."""
    kernel: Kernel
    way: tuple[str, ...]
    """Titles of what was booted: a menu entry, or a submenu and an entry in it."""


def learn(log: Log, texts: Mapping[str, str], image: Callable[[str], bytes]) -> Learned:
    """`texts`: by GRUB's name, the configuration files that this boot has read; `image`: the hash of a kernel file.

    Refused when the log is not what GRUB makes of them.
    """
    try:
        return _learn(log, texts, image)
    except grub_script.Unknown as problem:
        raise cannot(f"GRUB's part of this boot is not understood: {problem}") from None


def _learn(log: Log, texts: Mapping[str, str], image: Callable[[str], bytes]) -> Learned:
    names = {at: name for at, event in enumerate(log.events) if (name := grub_file(event)) in texts}
    if not names:
        raise grub_script.Unknown("no grub.cfg that is on disk was read")
    start = max(at for at, name in names.items() if name.endswith("/grub.cfg"))
    before, config, after = log.events[:start], log.events[start], log.events[start + 1 :]
    variables = grub_script.variables(names[start]) | dict(_assignments(map(grub_command, before)))
    segments: list[tuple[str, list[Event]]] = [("", [])]
    for event in after:
        command = grub_command(event)
        if command is None:
            segments[-1][1].append(event)
        else:
            segments.append((command, []))
    said = [command for command, _ in segments[1:]]
    way, outcomes = _follow(names[start], texts, variables, said)
    last = segments[-1][1]
    own = next((at for at, event in enumerate(last) if not grub_file(event)), len(last))
    segments[-1], tail = (said[-1], last[:own]), tuple(last[own:])
    sides: dict[str, tuple[tuple[Event, ...], ...]] = {}
    for command, found in segments:
        sides[command] = (*sides.get(command, ()), tuple(found))
    words = _words(said, "linux")
    kernel = Kernel(words, image(words[0]), _words(said, "initrd"))
    handed = {event.digest for event in after if event.kind == eventlog.EFI_APPLICATION}
    if handed and kernel.image not in handed:
        raise grub_script.Unknown(f"the kernel {words[0]} is not on disk as it was booted")
    options = {
        event.digest for event in tail if event.kind == eventlog.EVENT_TAG and event.data[:4] == eventlog.LOAD_OPTIONS
    }
    if options - {_options(words, end) for end in _ENDS}:
        raise grub_script.Unknown("the kernel's command line is not that of GRUB's command")
    learned = Learned(before, config, names[start], variables, outcomes, sides, tail, kernel, way)
    _check(log, learned, texts, image)
    return learned


def _check(log: Log, learned: Learned, texts: Mapping[str, str], image: Callable[[str], bytes]) -> None:
    """The same boot again, from what the log says of the files, must give the same PCRs."""
    digests = {name: event.digest or b"" for event in log.events if (name := grub_file(event))}

    def content(name: str) -> bytes:
        if name not in texts:
            raise grub_script.Unknown(f"{name} is not on disk")
        return _bytes(texts[name])

    def digest(name: str) -> bytes:
        if name not in digests:
            raise grub_script.Unknown(f"this boot has not read {name}")
        return digests[name]

    disk = Disk(content, digest, image, lambda kind, name: learned.outcomes.get(f"-{kind} {name}", False))
    text = texts[learned.name]
    run = _run(learned, text, disk)
    for title in learned.way:
        run.choose(next(each for each in run.entries if each.title == title))
    events, _ = _measured(learned, run, text, disk)
    again, was = (eventlog.replay(each, log.locality) for each in (events, log.events))
    if again != was:
        raise grub_script.Unknown(
            f"PCRs {', '.join(str(pcr) for pcr in was if again.get(pcr) != was[pcr])} come out otherwise"
        )


def _follow(
    name: str, texts: Mapping[str, str], variables: dict[str, str], said: list[str]
) -> tuple[tuple[str, ...], dict[str, bool]]:
    """Which entry was booted, and which commands succeeded: found by trying, each at most once the other way."""
    outcomes: dict[str, bool] = {}
    flipped: set[str] = set()

    def read(path: str) -> str:
        if path not in texts:
            raise grub_script.Unknown(f"{path} is not on disk")
        return texts[path]

    for _ in range(_FLIPS):
        run = grub_script.Run(
            grub_script.World(variables, read, lambda about: outcomes.setdefault(about, not about.startswith("-")))
        )
        way: list[str] = []
        try:
            run.config(texts[name])
            while len(run.commands) < len(said) and run.commands == said[: len(run.commands)]:
                title = said[len(run.commands)].removeprefix("setparams ")
                way.append(title)
                run.choose(next(each for each in run.entries if each.title == title))
        except (grub_script.Unknown, StopIteration):
            pass
        if run.commands == said:
            return tuple(way), outcomes
        same = next((at for at, (a, b) in enumerate(zip(run.commands, said, strict=False)) if a != b), None)
        same = min(len(run.commands), len(said)) if same is None else same
        doubtful = [about for count, about in run.consulted if count <= same and about not in flipped]
        if not doubtful:
            raise grub_script.Unknown(
                f"`{said[same][:80]}` was not expected" if same < len(said) else "it ends too early"
            )
        flipped.add(doubtful[-1])
        outcomes[doubtful[-1]] = not outcomes[doubtful[-1]]
    raise grub_script.Unknown("too many commands whose result is not known")


def menu(learned: Learned, text: str, disk: Disk) -> Iterator[tuple[str, tuple[str, ...]]]:
    """The default entry of a grub.cfg, whatever it starts, and the others that start a kernel: title, and titles on
    the way to it. Others for repair (recovery mode) are left out. Raises Refused."""
    try:
        run = _run(learned, text, disk)
        ways = [run.default]
        for entry in run.entries:
            inside = grub_script.entries_of(entry, run) if entry.is_menu else []
            ways += [[entry, each] for each in inside] if entry.is_menu else [[entry]]
    except grub_script.Unknown as problem:
        raise cannot(str(problem)) from None
    seen: set[tuple[str, ...]] = set()
    for way in ways:
        titles = tuple(each.title for each in way)
        lines = [line.split() for line in way[-1].body.splitlines()]
        loads = [line for line in lines if line and line[0] in ("linux", "linuxefi")]
        usual = loads and not any({"single", "recovery"} & set(line) for line in loads)
        if titles not in seen and (usual or not seen):
            seen.add(titles)
            yield titles[-1], titles


def boot(learned: Learned, text: str, titles: Sequence[str], disk: Disk) -> tuple[list[Event], Kernel]:
    """What is measured when this grub.cfg boots the entry of these titles, up to the kernel. Raises Refused."""
    try:
        run = _run(learned, text, disk)
        for title in titles:
            run.choose(next(each for each in run.entries if each.title == title))
        return _measured(learned, run, text, disk)
    except grub_script.Unknown as problem:
        raise cannot(str(problem)) from None


def _run(learned: Learned, text: str, disk: Disk) -> grub_script.Run:
    def succeeds(about: str) -> bool:
        if about[0] == "-":
            return disk.test(about[1], about[3:])
        if about not in learned.outcomes:
            raise grub_script.Unknown(f"whether GRUB's `{about[:80]}` succeeds is not known")
        return learned.outcomes[about]

    read = disk.content
    run = grub_script.Run(
        grub_script.World(dict(learned.variables), lambda name: read(name).decode("utf-8", "replace"), succeeds)
    )
    run.config(text)
    return run


def _measured(learned: Learned, run: grub_script.Run, text: str, disk: Disk) -> tuple[list[Event], Kernel]:
    words, initrds = _words(run.commands, "linux"), _words(run.commands, "initrd")
    kernel = Kernel(words, disk.image(words[0]), initrds)
    old = learned.kernel
    replaced = {
        sha256(_line(old.words)).digest(): sha256(_line(words)).digest(),
        **{_options(old.words, end): _options(words, end) for end in _ENDS},
        old.image: kernel.image,
    }

    def again(events: Iterable[Event]) -> Iterator[Event]:
        for event in events:
            name = grub_file(event)
            name = words[0] if name == old.words[0] else name
            if name:
                yield event._replace(digest=_renewed(name, event, disk), data=name.encode())
            else:
                yield event._replace(digest=replaced.get(event.digest or b"", event.digest))

    config = learned.config._replace(digest=sha256(text.encode("utf-8", "surrogateescape")).digest())
    events = [*again(learned.events), config, *again(learned.sides[""][0])]
    times: dict[str, int] = {}
    loaded = next(command for command in learned.sides if _LOADS.get(command.partition(" ")[0]) == "linux")
    for command in run.commands:
        events.append(Event(8, eventlog.IPL, sha256(_bytes(command)).digest(), _COMMAND + _bytes(command)))
        word = command.partition(" ")[0]
        if _LOADS.get(word) == "linux":
            events += again(learned.sides[loaded][0])
        elif _LOADS.get(word) == "initrd":
            events += [Event(9, eventlog.IPL, disk.sha256(name), name.encode()) for name in initrds]
        elif word in ("[", "test") or command == "load_env":
            names = _SIZED.findall(command) if word != "load_env" else [f"{run.variable('prefix')}/grubenv"]
            found = [name for name in names if disk.test("s", name)]
            events += [Event(9, eventlog.IPL, disk.sha256(name), name.encode()) for name in found]
        elif command in learned.sides:
            sides = learned.sides[command]
            events += again(sides[min(times.get(command, 0), len(sides) - 1)])
            times[command] = times.get(command, 0) + 1
        elif _CATALOG.match(command) or (word not in _SILENT and word not in run.functions and "=" not in word):
            raise grub_script.Unknown(f"what GRUB's `{command[:80]}` reads is not known")
    for event in again(learned.tail):
        initrd = initrds and event.kind == eventlog.EVENT_TAG and event.data[:4] == eventlog.INITRD
        events.append(event._replace(digest=disk.sha256(initrds[0])) if initrd else event)
    return events, kernel


def _renewed(name: str, event: Event, disk: Disk) -> bytes | None:
    """Of a file in GRUB's memory the digest stays. Raises Unknown for one that is not on disk any more."""
    try:
        return disk.sha256(name)
    except grub_script.Elsewhere:
        return event.digest


def _words(commands: Sequence[str], what: str) -> tuple[str, ...]:
    """The arguments of the one command that loads a kernel, or an initramfs."""
    found = [each.split(" ")[1:] for each in commands if _LOADS.get(each.partition(" ")[0]) == what]
    words = found[0] if found else []
    if len(found) > 1 or (not words if what == "linux" else len(words) > 1):
        raise grub_script.Unknown("not one kernel and at most one initramfs are loaded")
    return tuple(words)


def _line(words: Sequence[str]) -> bytes:
    return _bytes(" ".join(words))


def _options(words: Sequence[str], end: str) -> bytes:
    """What the kernel's EFI stub gets from GRUB, and measures."""
    return sha256(f"BOOT_IMAGE={' '.join(words)}{end}".encode("utf-16-le", "replace")).digest()


def grub_command(event: Event) -> str | None:
    """The command that GRUB measured, when the log says it truly: the text has the digest."""
    if event.kind == eventlog.IPL and event.pcr == 8 and event.data.startswith(_COMMAND):
        text = event.data[len(_COMMAND) :].partition(b"\0")[0]
        return text.decode("utf-8", "surrogateescape") if sha256(text).digest() == event.digest else None
    return None


def grub_file(event: Event) -> str:
    """GRUB's name of the file that it read; '' for another event."""
    if event.kind != eventlog.IPL or event.pcr != 9:
        return ""
    return event.data.partition(b"\0")[0].decode("utf-8", "surrogateescape")


def _bytes(text: str) -> bytes:
    return text.encode("utf-8", "surrogateescape")


def _assignments(said: Iterable[str | None]) -> Iterator[tuple[str, str]]:
    for text in said:
        name, equals, value = (text or "").removeprefix("set ").partition("=")
        if equals and name.isidentifier():
            yield name, value
