# SPDX-License-Identifier: Apache-2.0
"""PCR values of a boot that has not happened: the log of this one, replayed with what changed on disk.

    direct kernel (4, 9)       image(), initrd(), command_line()
    shim + GRUB (4, 8, 9)      image() and file() of the kernel, file() of the initramfs, grub_menu()
    UKI, systemd-stub (4, 11)  uki()
    ──> Changes, each from a digest that the log has to one that it will have ──predict──> PCR values

Every change names the old content too, and its digest must be in the log: what this boot measured is reproduced from
the files before anything is said of the next one. Where it is not, the answer is Refused, never a guess.
"""

import re
from collections.abc import Iterable, Iterator, Sequence
from hashlib import sha256
from typing import NamedTuple

from . import eventlog, pe
from .errors import Malformed, Refused
from .eventlog import Event, Log

SECTIONS = (
    ".linux", ".osrel", ".cmdline", ".initrd", ".ucode", ".splash", ".dtb", ".uname", ".sbat", ".pcrpkey",
    ".profile", ".dtbauto", ".hwids", ".efifw",
)  # fmt: skip
"""What systemd-stub measures into PCR 11, in this order: systemd src/fundamental/uki.c. .pcrsig signs it, so is not."""
_GRUB_PREFIXES = (b"grub_cmd: ", b"kernel_cmdline: ")
_WORD = re.compile(r"""(?:[^\s'"\\]|\\.|'[^']*'|"(?:[^"\\]|\\.)*")+""")
_PIECE = re.compile(r"""'([^']*)'|"((?:[^"\\]|\\.)*)"|\\(.)|([^'"\\]+)""", re.DOTALL)


class Change(NamedTuple):
    """A measured thing, as it was and as it will be: SHA-256 digests."""

    what: str
    old: bytes
    new: bytes


def predict(log: Log, changes: Iterable[Change], later: Sequence[Event] = ()) -> dict[int, bytes]:
    """PCR values after the log's events with these changes, then `later`: what systemd measures before the unseal.

    Refused when a change's old digest is not in the log, or two changes contradict each other.
    """
    replaced: dict[bytes, Change] = {}
    for change in changes:
        before = replaced.setdefault(change.old, change)
        if before.new != change.new:
            raise _cannot(f"{change.what} and {before.what} are measured alike now, and not later")
    seen = {event.digest for event in log.events}
    for change in replaced.values():
        if change.old not in seen:
            raise _cannot(f"this boot has not measured {change.what} as it is on disk")
    events = [
        event._replace(digest=replaced[event.digest].new) if event.digest in replaced else event for event in log.events
    ]
    return eventlog.replay([*events, *later], log.locality)


def _cannot(why: str) -> Refused:
    return Refused(
        f"the next boot's measurements cannot be predicted: {why}", "boot once with the recovery key", "cannot-predict"
    )


# What changes -----------------------------------------------------------------------------------------------


def image(what: str, old: bytes, new: bytes) -> Change:
    """An EFI program that the firmware or shim loads (PCR 4). Malformed."""
    return Change(what, pe.authenticode(old), pe.authenticode(new))


def file(what: str, old: bytes, new: bytes) -> Change:
    """A file that GRUB reads, or an initramfs that the kernel's EFI stub gets (PCR 9)."""
    return Change(what, sha256(old).digest(), sha256(new).digest())


def command_line(old: str, new: str) -> Change:
    """Load options: what the kernel's EFI stub measures (PCR 9), UTF-16 with its NUL."""
    return Change("the kernel command line", *(sha256(f"{each}\0".encode("utf-16-le")).digest() for each in (old, new)))


def uki(old: bytes, new: bytes) -> tuple[Change, ...]:
    """A unified kernel image: itself and the kernel in it (PCR 4), its sections (PCR 11).

    Refused when the two have not the same sections. Malformed.
    """
    before, now = (_sections(each) for each in (old, new))
    if before.keys() != now.keys():
        raise _cannot("the unified kernel image has other sections than before")
    changes = [image("the unified kernel image", old, new)]
    changes += [file(f"section {name}", before[name], now[name]) for name in before]
    return (*changes, image("the kernel in the unified kernel image", before[".linux"], now[".linux"]))


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


class Block(NamedTuple):
    """A menuentry or a submenu of grub.cfg."""

    words: tuple[str, ...]
    """As written, quotes and variables included."""
    body: str
    """From brace to brace."""


def grub_menu(log: Log, old: str, new: str) -> tuple[Change, ...]:
    """grub.cfg was generated anew, and only what its menu entries say has changed (PCRs 8 and 9).

    GRUB measures each command before it runs it: an entry with its words expanded and its body as written, when it is
    defined; the commands in the body of the chosen entry, when it is booted. Both are found in the log by the old text
    and replaced. Refused for any other change.
    """
    before, rest_before = _blocks(old)
    now, rest_now = _blocks(new)
    if rest_before != rest_now or len(before) != len(now):
        raise _cannot("grub.cfg has changed outside its menu entries")
    commands = [text for event in log.events if event.pcr == 8 if (text := grub_command(event)) is not None]
    said, variables = set(commands), dict(_assignments(commands))
    changes = [file("grub.cfg", old.encode(), new.encode())]
    stale: set[str] = set()
    for was, will in zip(before, now, strict=True):
        shown = _render(was, variables)
        if was == will:
            said.discard(shown)
            continue
        if shown not in said:
            raise _cannot(f"GRUB has not measured the entry {' '.join(was.words[1:2])} as it is in grub.cfg")
        changes.append(_text("a menu entry", shown, _render(will, variables)))
        if f"setparams {_expanded(was.words[1:2], variables)}" in said:
            if was.words[0] == "submenu":
                raise _cannot("this boot was chosen from a submenu")
            stale |= set(_WORD.findall(was.body)) - set(_WORD.findall(will.body))
            changes += _booted(log, was.body, will.body, said, variables)
    replaced = {each.old for each in changes}
    if left := [text for text in said if stale & set(text.split()) and sha256(_bytes(text)).digest() not in replaced]:
        raise _cannot(f"GRUB's command `{left[0][:80]}` is not understood")
    return tuple(dict.fromkeys(change for change in changes if change.old != change.new))


def grub_command(event: Event) -> str | None:
    """The command or the command line that GRUB measured, when the log says it truly: the text has the digest."""
    for prefix in _GRUB_PREFIXES:
        if event.kind == eventlog.IPL and event.data.startswith(prefix):
            text = event.data[len(prefix) :].partition(b"\0")[0]
            return text.decode("utf-8", "surrogateescape") if sha256(text).digest() == event.digest else None
    return None


def _text(what: str, old: str, new: str) -> Change:
    return Change(what, sha256(_bytes(old)).digest(), sha256(_bytes(new)).digest())


def _bytes(text: str) -> bytes:
    return text.encode("utf-8", "surrogateescape")


def _blocks(text: str) -> tuple[list[Block], str]:
    """The outermost menu entries and submenus, and all that is around them."""
    blocks, rest, at = [], [], 0
    for found in re.finditer(r"^[ \t]*(?:menuentry|submenu)\b[^\n]*?(\{)[ \t]*$", text, re.MULTILINE):
        if found.start() < at:
            continue  # inside the one before
        end = _closing(text, found.start(1))
        header = text[found.start() : found.start(1)]
        blocks.append(Block(tuple(_WORD.findall(header)), text[found.start(1) : end]))
        rest.append(text[at : found.start()])
        at = end
    return blocks, "\n".join([*rest, text[at:]])


def _closing(text: str, at: int) -> int:
    """Where the block that opens here ends."""
    depth, quote = 0, ""
    while at < len(text):
        char = text[at]
        if char == "\\" and quote != "'":
            at += 1
        elif quote:
            quote = "" if char == quote else quote
        elif char in "'\"":
            quote = char
        elif char == "{":
            depth += 1
        elif char == "}":
            depth -= 1
            if not depth:
                return at + 1
        at += 1
    raise Malformed("grub.cfg: a menu entry does not end")


def _assignments(said: Iterable[str]) -> Iterator[tuple[str, str]]:
    for text in said:
        name, equals, value = text.removeprefix("set ").partition("=")
        if equals and re.fullmatch(r"\w+", name):
            yield name, value


def _render(block: Block, variables: dict[str, str]) -> str:
    return f"{_expanded(block.words, variables)} {block.body}"


def _expanded(words: Iterable[str], variables: dict[str, str]) -> str:
    return " ".join(_word(each, variables) for each in words)


def _word(word: str, variables: dict[str, str]) -> str:
    """Quotes taken away and variables filled in, as GRUB's script does it."""

    def fill(text: str) -> str:
        return re.sub(r"\$\{?(\w+)\}?", lambda found: variables.get(found[1], ""), text)

    parts = []
    for single, double, escaped, plain in _PIECE.findall(word):
        parts.append(single or escaped or fill(re.sub(r'\\(["\\$])', r"\1", double)) or fill(plain))
    return "".join(parts)


def _booted(log: Log, old: str, new: str, said: set[str], variables: dict[str, str]) -> Iterator[Change]:
    """The lines of the booted entry that changed, as they were run; and the command line that the kernel got."""
    before, now = old.splitlines(), new.splitlines()
    if len(before) != len(now):
        raise _cannot("the menu entry of this boot has other commands than before")
    digests = {event.digest for event in log.events}
    for was, will in (
        (_expanded(_WORD.findall(line), variables) for line in pair) for pair in zip(before, now, strict=True)
    ):
        if was == will or was not in said:  # or in a branch that is not taken
            continue
        yield _text("a command of the menu entry", was, will)
        if was.startswith("linux ") and will.startswith("linux "):
            arguments = was.removeprefix("linux "), will.removeprefix("linux ")
            options = command_line(*(f"BOOT_IMAGE={each}" for each in arguments))
            if arguments[0] in said:
                yield _text("the kernel command line", *arguments)
            if options.old in digests:  # GRUB 2.12 starts the kernel as an EFI program
                yield options
