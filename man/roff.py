#!/usr/bin/python3
# SPDX-License-Identifier: Apache-2.0
"""roff.py PAGE.md ... FOLDER: makes each manual page from its Markdown; `make man` runs it.

The Markdown is a small part of what pandoc(1) reads: a title, headings, paragraphs, lists, definitions, tables, blocks
of code, **bold** and *italic*. What is not of that part is an error, never a page that lacks something. go-md2man 2.0.2
joins the paragraphs of a definition, and lowdown 1.0 makes a dash of `--`; this program needs only Python.
"""

import re
import sys
from collections.abc import Iterator
from pathlib import Path

_TITLE = re.compile(r"% (?P<name>\S+)\((?P<section>\d)\) \| (?P<manual>.+)")
_BULLET = re.compile(r"- |\d+\. ")
_INLINE = re.compile(r"\\(?P<escaped>[*\\_])|\*\*(?P<bold>(?:[^*\\]|\\.)+)\*\*|\*(?P<italic>(?:[^*\\]|\\.)+)\*")
_OPTION = re.compile(r"(\[\*\*--[a-z-]+\*\*) (\*[^][ ]+\*\])")
_GLUE = "\N{NO-BREAK SPACE}"
"""Between an option and its argument in a synopsis."""
_SPECIAL = {_GLUE: r"\~", "\\": r"\e", "'": r"\(aq", "`": r"\(ga", "^": r"\(ha", "~": r"\(ti"}


class Wrong(Exception):
    """The page has what this program does not know. The text says which line."""


def page(text: str, version: str) -> str:
    """The page in the macros of man(7). Raises Wrong."""
    title, _, body = text.partition("\n")
    found = _TITLE.fullmatch(title)
    if not found:
        raise Wrong(f"not a title: {title}")
    words = (found["name"], found["section"], "", f"unlock {version}", found["manual"])
    head = [
        "'\\\" t",
        '.\\" Made by man/roff.py.',
        ".TH " + " ".join(f'"{each}"' for each in words),
        ".nr HY 0",
        ".nh",
        ".ad l",
    ]
    lines = []
    for name, content in sections(body):
        lines.append(f".SH {plain(name)}")
        if name == "NAME":  # apropos(1) reads it
            lines.append("\n".join(content).strip().replace(" - ", r" \- ", 1))
        else:
            lines += synopsis(content) if name == "SYNOPSIS" else blocks(content, first=True)
    return "\n".join([*head, *lines, ""])


def sections(body: str) -> Iterator[tuple[str, list[str]]]:
    before, *parts = re.split(r"^# ", body, flags=re.MULTILINE)
    if before.strip():
        raise Wrong(f"text before the first heading: {before.strip()}")
    for part in parts:
        name, _, content = part.partition("\n")
        yield name.strip(), content.split("\n")


def synopsis(lines: list[str]) -> Iterator[str]:
    """A paragraph for each form of a command: its words, then its arguments, which are indented."""
    for paragraph in "\n".join(lines).strip().split("\n\n"):
        found = re.match(r"\*\*(unlock[^*]*)\*\*(.*)", paragraph, re.DOTALL)
        if not found:
            raise Wrong(f"not a synopsis: {paragraph}")
        yield f'.SY "{plain(found[1])}"'
        if found[2].strip():
            yield from filled([_OPTION.sub(rf"\1{_GLUE}\2", " ".join(found[2].split()))])
        yield ".YS"


def blocks(lines: list[str], *, first: bool, within: bool = False) -> Iterator[str]:
    """`first`: a heading, a term or a bullet is before, and no empty line is wanted. `within`: in the text of a
    definition or a list."""
    at = 0
    while at < len(lines):
        line = lines[at]
        if not line.strip():
            at += 1
            continue
        end = at + 1
        if line.startswith("    "):
            end = end_of_indented(lines, at, 4)
            yield from code([each[4:] for each in lines[at:end]])
        elif line.startswith("|"):
            while end < len(lines) and lines[end].startswith("|"):
                end += 1
            if not first:
                yield ".IP" if within else ".PP"
            yield from table(lines[at:end])
        elif found := _BULLET.match(line):
            width = len(found[0])
            end = end_of_indented(lines, at + 1, width)
            yield from item(found[0].strip(), [line[width:], *(each[width:] for each in lines[at + 1 : end])], within)
        elif end < len(lines) and lines[end].startswith(":   "):
            end = end_of_indented(lines, at + 2, 4)
            text = [each[4:] for each in lines[at + 1 : end]]
            yield ".TP 7"
            yield start_of_line(inline(line))
            yield from blocks(text, first=True, within=True)
        elif line.startswith((" ", "#", ">", "<")):
            raise Wrong(f"not known: {line}")
        else:
            while end < len(lines) and lines[end].strip() and not _BULLET.match(lines[end]):
                end += 1
            if not first:
                yield ".IP" if within else ".PP"
            yield from filled([each.strip() for each in lines[at:end]])
        at, first = end, False


def end_of_indented(lines: list[str], at: int, width: int) -> int:
    """Where the lines end that are empty or have this many blanks before them."""
    while at < len(lines) and (not lines[at].strip() or lines[at].startswith(" " * width)):
        at += 1
    return at


def item(mark: str, text: list[str], within: bool) -> Iterator[str]:
    if within:
        yield ".RS"
    yield f".IP {plain(mark)} 4" if mark != "-" else r".IP \(bu 2"
    yield from blocks(text, first=True, within=True)
    if within:
        yield ".RE"


def code(lines: list[str]) -> Iterator[str]:
    while not lines[-1].strip():
        lines = lines[:-1]
    yield from (".sp", ".RS 4", ".EX")
    yield from (start_of_line(plain(each).replace("-", r"\-")) for each in lines)
    yield from (".EE", ".RE")


def table(lines: list[str]) -> Iterator[str]:
    """The first column is as wide as it is; the others share what is left."""
    rows = [[cell.strip() for cell in line.strip("|").split(" | ")] for line in lines]
    head, rule, *rows = rows
    if not all(re.fullmatch(r"[-| ]+", each) for each in rule) or any(len(row) != len(head) for row in rows):
        raise Wrong(f"not a table: {lines[0]}")
    yield from (".TS", "tab(@);")
    yield " ".join(["lb"] * len(head))
    yield " ".join(["l", *["lx"] * (len(head) - 1)]) + "."
    for row in [head, *rows]:
        cells = [inline(each) for each in row]
        if any("@" in each for each in cells):
            raise Wrong(f"@ in a table: {row}")
        yield "@".join([cells[0], *(f"T{{\n{start_of_line(each)}\nT}}" for each in cells[1:])])
    yield ".TE"


def filled(lines: list[str]) -> Iterator[str]:
    """Running text, which is filled: a line for each part of a sentence, at most 80 bytes where blanks allow it."""
    line = ""
    for word in inline(" ".join(lines)).split(" "):
        if line and len(line) + len(word) > 78:
            yield start_of_line(line)
            line = word
        else:
            line = f"{line} {word}" if line else word
    yield start_of_line(line)


def inline(text: str) -> str:
    """Text with its bold and italic parts."""
    found, at = "", 0
    for part in _INLINE.finditer(text):
        found += plain(checked(text[at : part.start()]))
        if part["escaped"]:
            found += plain(part["escaped"])
        elif part["bold"]:
            found += r"\fB" + literal(unescaped(part["bold"])) + r"\fR"
        else:
            found += r"\fI" + literal(unescaped(part["italic"])) + r"\fR"
        at = part.end()
    return found + plain(checked(text[at:]))


def checked(text: str) -> str:
    if re.search(r"[*`\\]|\]\(", text):
        raise Wrong(f"not known: {text}")
    return text


def unescaped(text: str) -> str:
    return re.sub(r"\\(.)", r"\1", text)


def plain(text: str) -> str:
    return "".join(_SPECIAL.get(each, each) for each in text)


def literal(text: str) -> str:
    """What a person may copy: each - is a minus."""
    return plain(text).replace("-", r"\-")


def start_of_line(text: str) -> str:
    """Text is no request to roff."""
    return rf"\&{text}" if text.startswith((".", "'")) else text


def main(sources: list[str], folder: str) -> int:
    root = Path(__file__).resolve().parents[1]
    found = re.search(r'^version = "(.+)"', (root / "pyproject.toml").read_text(), re.MULTILINE)
    version = found[1] if found else ""
    Path(folder).mkdir(parents=True, exist_ok=True)
    for source in map(Path, sources):
        try:
            text = page(source.read_text(), version)
        except Wrong as error:
            print(f"{source}: {error}", file=sys.stderr)
            return 1
        (Path(folder) / source.name.removesuffix(".md")).write_text(text)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:-1], sys.argv[-1]))
