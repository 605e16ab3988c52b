# SPDX-License-Identifier: Apache-2.0
"""Replays a boot through GRUB with other files: runs grub.cfg again, and computes what GRUB then measures.

    GrubBoot (this boot, by grub_learn), grub.cfg and files as they are now
      ──list_menu──> the entries of the menu ──measure_entry──> the events of one of them, up to the kernel

GRUB measures each command into PCR 8 and each file that it reads into PCR 9. Which files a command reads is taken from
this boot's log. A command that this boot has not run, and that may read files, is Unknown, never guessed.
"""

import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from hashlib import sha256
from typing import NamedTuple

from ..measured import eventlog
from ..measured.eventlog import Event
from . import grub_script
from .grub_parser import Unknown
from .grub_script import MenuEntry, ScriptInput, ScriptRun
from .replay import cannot_predict

_COMMAND = b"grub_cmd: "
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
OPTIONS_ENDS = ("", "\0")
"""How the kernel's load options end: GRUB 2.12 leaves the NUL out, others do not."""


class GrubFiles(NamedTuple):
    """Reads files by GRUB's names for them: (hd0,gpt2)/grub/grub.cfg. Each function raises Unknown where it cannot."""

    content: Callable[[str], bytes]
    sha256: Callable[[str], bytes]
    image: Callable[[str], bytes]
    """What the firmware measures of an EFI program: Authenticode."""
    test: Callable[[str, str], bool]
    """GRUB's `test` of a file: d, e, f or s."""


class GrubKernel(NamedTuple):
    """The kernel and initramfs that GRUB starts."""

    words: tuple[str, ...]
    """The arguments of the command `linux`, the kernel's name first."""
    image: bytes
    """What the firmware measures of it, where GRUB hands it on: Authenticode."""
    initrds: tuple[str, ...]


class GrubBoot(NamedTuple):
    """A boot through GRUB whose grub.cfg, run again, gives the commands in its log."""

    before: tuple[Event, ...]
    """The events before GRUB read grub.cfg."""
    config: Event
    """GRUB's measurement of grub.cfg."""
    config_name: str
    """GRUB's name of it."""
    variables: Mapping[str, str]
    exported: frozenset[str]
    outcomes: Mapping[str, bool]
    """What `ScriptInput.succeeds` answered."""
    reads: Mapping[str, tuple[tuple[Event, ...], ...]]
    """Command -> what else was measured between it and the next one, for each time that it was run; "" before any."""
    tail: tuple[Event, ...]
    """The events after the last command and the files that it read."""
    kernel: GrubKernel
    titles: tuple[str, ...]
    """Of what was booted: a menu entry, or a submenu and an entry in it."""


def list_menu(boot: GrubBoot, text: str, files: GrubFiles) -> Iterator[tuple[str, tuple[str, ...]]]:
    """The entries of the grub.cfg `text`: title, and the titles to choose on the way to it.

    The default entry comes first, whatever it starts; then the others that start a kernel, without those for repair
    (recovery mode). Raises Refused.
    """
    try:
        run = run_config(boot, text, files)
        choices = [run.default_entry, *_list_choices(run, ())]
    except Unknown as problem:
        raise cannot_predict(str(problem)) from None
    listed: set[tuple[str, ...]] = set()
    for choice in choices:
        titles = tuple(each.title for each in choice)
        if titles not in listed and (not listed or _starts_kernel(choice[-1])):
            listed.add(titles)
            yield titles[-1], titles


def saved_by_default(boot: GrubBoot, text: str, files: GrubFiles) -> dict[str, str | None]:
    """What GRUB saves in its environment when it boots the default entry; {} when that is not known."""
    try:
        run = run_config(boot, text, files)
        for entry in run.default_entry:
            run.choose_entry(entry)
    except Unknown:
        return {}
    return run.saved


def _list_choices(run: ScriptRun, way: Sequence[MenuEntry]) -> Iterator[list[MenuEntry]]:
    """The entries of the menu and of its submenus, each after the submenus to choose on the way to it. A submenu that
    cannot be run stands for what is in it."""
    for entry in run.entries:
        here = [*way, entry]
        if not entry.is_menu or len(here) == grub_script.MAX_SUBMENUS:
            yield here
            continue
        try:
            inside = run.after_choice(entry)
        except Unknown:
            yield here
        else:
            yield from _list_choices(inside, here)


def _starts_kernel(entry: MenuEntry) -> bool:
    lines = [line.split() for line in entry.body.splitlines()]
    loads = [line for line in lines if line and line[0] in ("linux", "linuxefi")]
    return bool(loads) and not any({"single", "recovery"} & set(line) for line in loads)


def measure_entry(boot: GrubBoot, text: str, titles: Sequence[str], files: GrubFiles) -> tuple[list[Event], GrubKernel]:
    """The events when this grub.cfg boots the entry of these titles, up to the kernel. Raises Refused."""
    try:
        run = run_config(boot, text, files)
        choose_entry(run, titles)
        return measure_run(boot, run, text, files)
    except Unknown as problem:
        raise cannot_predict(str(problem)) from None


def run_config(boot: GrubBoot, text: str, files: GrubFiles) -> ScriptRun:
    """A run of this grub.cfg up to its menu. Raises Unknown."""

    def succeeds(about: str) -> bool:
        if about[0] == "-":
            return files.test(about[1], about[3:])
        if about not in boot.outcomes:
            raise Unknown(f"whether GRUB's `{about[:80]}` succeeds is not known")
        return boot.outcomes[about]

    def read(name: str) -> str:
        return files.content(name).decode("utf-8", "replace")

    given = ScriptInput(variables=dict(boot.variables), exported=boot.exported, read=read, succeeds=succeeds)
    run = ScriptRun(given)
    run.run_file(text)
    return run


def choose_entry(run: ScriptRun, titles: Iterable[str]) -> None:
    """Runs the entry of these titles. Raises Unknown, StopIteration for a title that the menu does not have."""
    for title in titles:
        found = [each for each in run.entries if each.title == title]
        if any(each != found[0] for each in found):
            raise Unknown(f"the menu has several entries {title!r}")
        run.choose_entry(next(iter(found)))


def measure_run(boot: GrubBoot, run: ScriptRun, text: str, files: GrubFiles) -> tuple[list[Event], GrubKernel]:
    """The events of a run of the grub.cfg `text` that has started a kernel. Raises Unknown."""
    words, initrds = loader_arguments(run.commands, "linux"), loader_arguments(run.commands, "initrd")
    kernel = GrubKernel(words, files.image(words[0]), initrds)
    renewed = _Renewed(boot, kernel, files)
    config = boot.config._replace(digest=sha256(encode_text(text)).digest())
    events = [*renewed.events(boot.before), config, *renewed.events(boot.reads[""][0])]
    times: dict[str, int] = {}
    for command in run.commands:
        events.append(Event(8, eventlog.IPL, sha256(encode_text(command)).digest(), _COMMAND + encode_text(command)))
        known = _as_booted(boot, command)
        if known in boot.reads and not _is_understood(known):
            reads = boot.reads[known]
            events += renewed.events(reads[min(times.get(known, 0), len(reads) - 1)])
            times[known] = times.get(known, 0) + 1
        else:
            events += renewed.events_of_command(command, run)
    for event in renewed.events(boot.tail):
        initrd = initrds and event.kind == eventlog.EVENT_TAG and event.data[:4] == eventlog.INITRD
        events.append(event._replace(digest=files.sha256(initrds[0])) if initrd else event)
    return events, kernel


def _as_booted(boot: GrubBoot, command: str) -> str:
    """The command of this boot that finds and reads the same. grub-mkconfig hints at a disk by the letter that the
    kernel gave it, which another boot may have given to another; `search --fs-uuid` finds the file system
    nevertheless."""
    if command in boot.reads or not command.startswith("search ") or "--fs-uuid" not in command.split():
        return command
    return next((each for each in boot.reads if _without_hints(each) == _without_hints(command)), command)


def _without_hints(command: str) -> list[str]:
    return [word for word in command.split() if not re.match(r"--hint(-[a-z0-9]+)?=", word)]


def _is_understood(command: str) -> bool:
    """Whether the files that it reads follow from its words."""
    word = command.partition(" ")[0]
    return word in _LOADS or word in ("[", "test") or command == "load_env"


class _Renewed:
    """The events of this boot as another kernel, and the files as they are now, make them."""

    def __init__(self, boot: GrubBoot, kernel: GrubKernel, files: GrubFiles) -> None:
        self._boot, self._kernel, self._files = boot, kernel, files
        old, new = boot.kernel.words, kernel.words
        self._replaced = {
            sha256(encode_text(" ".join(old))).digest(): sha256(encode_text(" ".join(new))).digest(),
            **{load_options_digest(old, end): load_options_digest(new, end) for end in OPTIONS_ENDS},
            boot.kernel.image: kernel.image,
        }

    def events(self, old: Iterable[Event]) -> Iterator[Event]:
        """Raises Unknown for a file that is not on disk any more."""
        for event in old:
            name = grub_file(event)
            name = self._kernel.words[0] if name == self._boot.kernel.words[0] else name
            if name:
                yield event._replace(digest=self._digest_now(name, event), data=name.encode())
            else:
                yield event._replace(digest=self._replaced.get(event.digest or b"", event.digest))

    def _digest_now(self, name: str, event: Event) -> bytes | None:
        """A file in GRUB's memory keeps its digest."""
        try:
            return self._files.sha256(name)
        except grub_script.NotOnDisk:
            return event.digest

    def events_of_command(self, command: str, run: ScriptRun) -> Iterable[Event]:
        """What GRUB measures when it runs a command that is understood, or new. Raises Unknown."""
        word = command.partition(" ")[0]
        if _LOADS.get(word) == "linux":
            loaded = next(each for each in self._boot.reads if _LOADS.get(each.partition(" ")[0]) == "linux")
            return self.events(self._boot.reads[loaded][0])
        if _LOADS.get(word) == "initrd":
            return map(self._read, self._kernel.initrds)
        if word in ("[", "test") or command == "load_env":
            names = _SIZED.findall(command) if word != "load_env" else [f"{run.variable('prefix')}/grubenv"]
            return map(self._read, [name for name in names if self._files.test("s", name)])
        if _CATALOG.match(command) or (word not in _SILENT and word not in run.functions and "=" not in word):
            raise Unknown(f"what GRUB's `{command[:80]}` reads is not known")
        return ()

    def _read(self, name: str) -> Event:
        return Event(9, eventlog.IPL, self._files.sha256(name), name.encode())


def loader_arguments(commands: Sequence[str], loads: str) -> tuple[str, ...]:
    """The arguments of the one command that loads the kernel ("linux"), or the initramfs ("initrd"). Raises Unknown."""
    found = [each.split(" ")[1:] for each in commands if _LOADS.get(each.partition(" ")[0]) == loads]
    words = found[0] if found else []
    if len(found) > 1 or (not words if loads == "linux" else len(words) > 1):
        raise Unknown("not one kernel and at most one initramfs are loaded")
    return tuple(words)


def load_options_digest(words: Sequence[str], end: str) -> bytes:
    """What the kernel's EFI stub measures of the load options that GRUB gives it."""
    return sha256(f"BOOT_IMAGE={' '.join(words)}{end}".encode("utf-16-le", "replace")).digest()


def grub_command(event: Event) -> str | None:
    """The command that GRUB measured; None for another event, and where the text does not have the digest."""
    if event.kind == eventlog.IPL and event.pcr == 8 and event.data.startswith(_COMMAND):
        text = event.data[len(_COMMAND) :].partition(b"\0")[0]
        return text.decode("utf-8", "surrogateescape") if sha256(text).digest() == event.digest else None
    return None


def grub_file(event: Event) -> str:
    """GRUB's name of the file that it read; '' for another event."""
    if event.kind != eventlog.IPL or event.pcr != 9:
        return ""
    return event.data.partition(b"\0")[0].decode("utf-8", "surrogateescape")


def encode_text(text: str) -> bytes:
    """The bytes of a file or command that was read as text."""
    return text.encode("utf-8", "surrogateescape")
