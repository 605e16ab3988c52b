# SPDX-License-Identifier: Apache-2.0
"""GRUB's script language: which commands a grub.cfg runs, in order, up to the kernel's start.

    Script(text) ──run──> commands as GRUB measures them, menu entries ──choose an entry──> its commands

GRUB measures each command before it runs it: its words, expanded, joined by a space; a block with its braces as it is
written. What a command does to the script is known for those that grub-mkconfig writes (set, test, load_env, source
...); whether another one succeeds, and whether a file is there, is told by `World`. From the GRUB manual, "Writing full
configuration files directly", and grub-core/script/execute.c. A construct that is not known is Unknown, never guessed.
"""

import re
from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

MAX_COMMANDS = 20_000
MAX_TEXT = 256 << 10
"""Characters of a configuration file, and of a command."""
_DEPTH = 30
_NAME = re.compile(r"[A-Za-z_][A-Za-z0-9_]*")
_VARIABLE = re.compile(r"\{([A-Za-z_][A-Za-z0-9_]*|\d+|[?#@*])\}|([A-Za-z_][A-Za-z0-9_]*|\d|[?#@*])")
_VALUED = {
    "--class", "--users", "--hotkey", "--id", "--source",
}  # fmt: skip
"""Options of menuentry and submenu that take a value: grub-core/commands/menuentry.c."""
_FEATURES = (
    "chainloader_bpb", "ntldr", "platform_search_hint", "default_font_path", "all_video_module", "menuentry_id",
    "menuentry_options", "200_final", "nativedisk_cmd", "timeout_style",
)  # fmt: skip
"""What grub-core/normal/main.c sets to y."""


class Unknown(Exception):
    """What GRUB will do cannot be told; the text says where."""


class Elsewhere(Unknown):
    """A file is on no file system that is mounted here: in GRUB's memory, most often."""


class World(NamedTuple):
    """What a script depends on."""

    variables: dict[str, str]
    read: Callable[[str], str]
    """The content of a file that GRUB names. Raises Unknown."""
    succeeds: Callable[[str], bool]
    """Whether a command succeeds: a file test (`-f FILE`), or any command, as measured. Raises Unknown."""


class Entry(NamedTuple):
    words: tuple[str, ...]
    """The command, expanded: menuentry or submenu, title, options."""
    body: str
    """Without its braces."""

    @property
    def is_menu(self) -> bool:
        return self.words[0] == "submenu"

    @property
    def title(self) -> str:
        skip = False
        for word in self.words[1:]:
            if skip or word in _VALUED or word == "--unrestricted":
                skip = word in _VALUED and not skip
            else:
                return word
        return ""

    @property
    def id(self) -> str:
        return next((b for a, b in zip(self.words, self.words[1:], strict=False) if a == "--id"), self.title)


def variables(config: str) -> dict[str, str]:
    """GRUB's own, when it reads the configuration of that path on an x86-64 PC with UEFI."""
    folder = config.rpartition("/")[0]
    own = {"grub_platform": "efi", "grub_cpu": "x86_64", "config_directory": folder, "config_file": config}
    return {**own, "prefix": folder, **{f"feature_{each}": "y" for each in _FEATURES}}


def with_variable(environment: str, name: str, value: str) -> str:
    """grubenv after GRUB's `save_env` of a variable that it has: its size stays (grub-core/lib/envblk.c)."""
    changed = re.sub(rf"(?m)^{name}=.*$", lambda _: f"{name}={value}", environment.rstrip("#"))
    return changed.ljust(len(environment), "#")


class Run:
    """One run of a configuration. `commands` grows."""

    def __init__(self, world: World) -> None:
        self.commands: list[str] = []
        self.consulted: list[tuple[int, str]] = []
        """Number of commands so far, and what `World.succeeds` was asked."""
        self.entries: list[Entry] = []
        self._world = world
        self._variables = dict(world.variables)
        self.functions: dict[str, list[_Node]] = {}
        self._status = 0
        self._pending = ""
        self._depth = 0

    def config(self, text: str) -> None:
        """Runs a configuration file. Raises Unknown."""
        self._run(parse(text), ())

    def choose(self, entry: Entry) -> None:
        """Runs the entry; of a submenu, `entries` are then those in it. Raises Unknown."""
        chosen = self._variables.get("chosen", "")
        self._variables["chosen"] = f"{chosen}>{entry.id}" if chosen else entry.id
        if entry.is_menu:
            self.entries = []
        self._command(["setparams", entry.title])
        self._run(parse(entry.body), (entry.title,))

    def variable(self, name: str) -> str:
        return self._variables.get(name, "")

    @property
    def default(self) -> list[Entry]:
        """The way to the default entry: a submenu and an entry in it, or an entry. Raises Unknown."""
        wanted = self._variables.get("default", "") or "0"
        first, _, rest = wanted.partition(">")
        found = [each for number, each in enumerate(self.entries) if first in (str(number), each.id, each.title)]
        if not found:  # a number too high, or a title that is gone: the first entry
            found, rest = self.entries[:1], ""
        if not found:
            raise Unknown("grub.cfg has no menu entry")
        if not found[0].is_menu:
            return found[:1]
        inside = entries_of(found[0], self)
        chosen = [each for number, each in enumerate(inside) if (rest or "0") in (str(number), each.id, each.title)]
        if not chosen or chosen[0].is_menu:
            raise Unknown(f"the default entry {wanted!r} is not found")
        return [found[0], chosen[0]]

    # nodes

    def _run(self, nodes: "list[_Node]", arguments: Sequence[str]) -> None:
        self._depth += 1
        if self._depth > _DEPTH:
            raise Unknown("functions call each other without end")
        for node in nodes:
            if isinstance(node, _If):
                self._if(node, arguments)
            elif isinstance(node, _Function):
                self.functions[node.name] = node.body
            else:
                self._command([part for word in node.words for part in self._expand(word, arguments)], node.negated)
        self._depth -= 1

    def _if(self, node: "_If", arguments: Sequence[str]) -> None:
        for condition, body in node.branches:
            self._run(condition, arguments)
            if self._succeeded():
                self._run(body, arguments)
                return
        self._run(node.otherwise, arguments)

    def _succeeded(self) -> bool:
        """Whether the last command did; asks the world only now, as most results matter to nobody."""
        if self._pending:
            about, self._pending = self._pending, ""
            self.consulted.append((len(self.commands), about))
            self._status = 0 if self._world.succeeds(about) else 1
        return self._status == 0

    # commands

    def _command(self, words: list[str], negated: bool = False) -> None:
        if not words:
            return
        text = " ".join(words)
        self.commands.append(text)
        if len(self.commands) > MAX_COMMANDS or len(text) > MAX_TEXT:
            raise Unknown("it runs too many commands, or too long ones")
        self._pending = ""
        self._status = 0
        name, arguments = words[0], words[1:]
        variable, equals, value = name.partition("=")
        if equals and _NAME.fullmatch(variable):
            self._variables[variable] = value
        elif name in self.functions:
            self._run(self.functions[name], arguments)
        elif name in ("menuentry", "submenu"):
            if not arguments or not words[-1].startswith("{"):
                raise Unknown(f"`{text[:60]}` is not understood")
            self.entries.append(Entry(tuple(words[:-1]), words[-1][1:-1]))
        elif name == "set":
            for each in arguments[:1]:
                variable, _, value = each.partition("=")
                self._variables[variable] = value
        elif name == "unset":
            for each in arguments:
                self._variables.pop(each, None)
        elif name in ("[", "test"):
            self._status = 0 if self._test(arguments[:-1] if name == "[" else arguments) else 1
        elif name == "false":
            self._status = 1
        elif name in ("source", ".", "configfile"):
            self._source(name, arguments)
        elif name == "load_env":
            self._load_env(arguments)
        elif name not in ("true", "export", "setparams", "save_env"):
            self._pending = text
        if negated:
            self._status = 1 if self._succeeded() else 0

    def _source(self, name: str, arguments: list[str]) -> None:
        if len(arguments) != 1:
            raise Unknown(f"`{name}` is not understood")
        if name == "configfile":
            self.entries = []
        self._run(parse(self._world.read(arguments[0])), ())

    def _load_env(self, arguments: list[str]) -> None:
        path = f"{self._variables.get('prefix', '')}/grubenv"
        names = list(arguments)
        while names and names[0].startswith("-"):
            option = names.pop(0)
            if option in ("--file", "-f") and names:
                path = names.pop(0)
            elif option.startswith("--file="):
                path = option.partition("=")[2]
        for line in self._world.read(path).splitlines():
            variable, equals, value = line.partition("=")
            if equals and not line.startswith("#") and (not names or variable in names):
                self._variables[variable] = re.sub(r"\\(.)", r"\1", value)

    def _test(self, words: list[str]) -> bool:
        """test(1), as far as scripts use it; -o binds weakest."""
        return any(all(self._simple(part) for part in _split(each, "-a")) for each in _split(words, "-o"))

    def _simple(self, words: list[str]) -> bool:
        if words[:1] == ["!"]:
            return not self._simple(words[1:])
        match words:
            case []:
                return False
            case [text]:
                return bool(text)
            case ["-z", text]:
                return not text
            case ["-n", text]:
                return bool(text)
            case [("-e" | "-f" | "-s" | "-d") as kind, path]:
                self.consulted.append((len(self.commands), f"{kind} {path}"))
                return self._world.succeeds(f"{kind} {path}")
            case [left, ("=" | "=="), right]:
                return left == right
            case [left, "!=", right]:
                return left != right
        raise Unknown(f"`[ {' '.join(words)} ]` is not understood")

    # words

    def _expand(self, word: str, arguments: Sequence[str]) -> list[str]:
        """One written word as GRUB passes it on: none, one, or several."""
        if word.startswith("{"):
            return [word]
        parts: list[str] = [""]
        some = False  # quotes make an empty word a word
        at = 0
        while at < len(word):
            char = word[at]
            if char == "'":
                end = word.index("'", at + 1)
                parts[-1] += word[at + 1 : end]
                at, some = end + 1, True
            elif char == '"':
                text, at = self._quoted(word, at + 1, arguments)
                parts[-1] += text
                some = True
            elif char == "\\":
                parts[-1] += word[at + 1 : at + 2].replace("\n", "")
                at += 2
            elif char == "$" and (found := _VARIABLE.match(word, at + 1)):
                pieces = self._value(found[1] or found[2], arguments).split(" ")
                parts[-1] += pieces[0]
                parts += pieces[1:]
                at = found.end()
            else:
                parts[-1] += char
                at += 1
        return [part for part in parts if part] or ([""] if some else [])

    def _quoted(self, word: str, at: int, arguments: Sequence[str]) -> tuple[str, int]:
        text = ""
        while word[at] != '"':
            if word[at] == "\\" and word[at + 1] in '"\\$\n':
                text += word[at + 1].replace("\n", "")
                at += 2
            elif word[at] == "$" and (found := _VARIABLE.match(word, at + 1)):
                text += self._value(found[1] or found[2], arguments)
                at = found.end()
            else:
                text += word[at]
                at += 1
        return text, at + 1

    def _value(self, name: str, arguments: Sequence[str]) -> str:
        if name == "?":
            return str(0 if self._succeeded() else 1)
        if name == "#":
            return str(len(arguments))
        if name in "@*":
            return " ".join(arguments)
        if name.isdigit():
            return arguments[int(name) - 1] if 0 < int(name) <= len(arguments) else ""
        return self._variables.get(name, "")


def entries_of(menu: Entry, before: Run) -> list[Entry]:
    """The entries in a submenu. Raises Unknown."""
    inside = Run(before._world)
    inside._variables = dict(before._variables)
    inside.functions = before.functions
    inside.choose(menu)
    return inside.entries


def _split(words: list[str], at: str) -> Iterator[list[str]]:
    part: list[str] = []
    for word in words:
        if word == at:
            yield part
            part = []
        else:
            part.append(word)
    yield part


# Parsing ----------------------------------------------------------------------------------------------------


class _Command(NamedTuple):
    words: tuple[str, ...]
    """As written, quotes and variables included; a block is one word."""
    negated: bool


class _If(NamedTuple):
    branches: "tuple[tuple[list[_Node], list[_Node]], ...]"
    otherwise: "list[_Node]"


class _Function(NamedTuple):
    name: str
    body: "list[_Node]"


_Node = _Command | _If | _Function
_UNSUPPORTED = {"while", "until", "for", "case", "select", "time"}
_END = "\n"


def parse(text: str) -> "list[_Node]":
    """Raises Unknown for what is no script, or uses loops."""
    if len(text) > MAX_TEXT:
        raise Unknown("grub.cfg: it is too long")
    tokens = list(_tokens(text))
    try:
        nodes, at = _nodes(tokens, 0, frozenset())
    except RecursionError:
        raise Unknown("grub.cfg: it is nested too deeply") from None
    if at != len(tokens):
        raise Unknown(f"grub.cfg: `{tokens[at]}` is out of place")
    return nodes


def _tokens(text: str) -> Iterator[str]:
    """Words as written, a block as one of them, and _END for the end of a command."""
    at = 0
    while at < len(text):
        char = text[at]
        if char in " \t":
            at += 1
        elif char in "\n;":
            yield _END
            at += 1
        elif char == "#":
            at = text.find("\n", at)
            at = len(text) if at < 0 else at
        elif text.startswith("\\\n", at):
            at += 2
        elif char in "&|<>()" and not re.match(r"\(\S*\)", text[at:]):
            raise Unknown(f"grub.cfg: `{char}` is not understood")
        else:
            end = _block_end(text, at) if char == "{" else _word_end(text, at)
            yield text[at:end]
            at = end


def _word_end(text: str, at: int) -> int:
    while at < len(text) and text[at] not in " \t\n;":
        if text[at] == "\\":
            at += 1
        elif text[at] in "'\"":
            at = _quote_end(text, at)
        elif text.startswith("${", at):
            found = _VARIABLE.match(text, at + 1)
            if not found:
                raise Unknown("grub.cfg: `${` is not understood")
            at = found.end() - 1
        at += 1
    if not 0 <= at <= len(text):
        raise Unknown("grub.cfg: it ends within a word")
    return at


def _quote_end(text: str, at: int) -> int:
    """The place of the closing quote."""
    quote = text[at]
    at += 1
    while at < len(text) and text[at] != quote:
        at += 2 if text[at] == "\\" and quote == '"' else 1
    if at >= len(text):
        raise Unknown("grub.cfg: a quote does not end")
    return at


def _block_end(text: str, at: int) -> int:
    depth = 0
    fresh = True  # where a word may begin: `#` is a comment there
    while at < len(text):
        char = text[at]
        if char == "\\":
            at += 1
        elif char in "'\"":
            at = _quote_end(text, at)
        elif char == "#" and fresh:
            at = text.find("\n", at)
            if at < 0:
                break
        elif char == "{":
            depth += 1
        elif char == "}":
            depth -= 1
            if not depth:
                return at + 1
        fresh = text[at : at + 1] in " \t\n;{"
        at += 1
    raise Unknown("grub.cfg: a block does not end")


def _nodes(tokens: list[str], at: int, until: frozenset[str]) -> "tuple[list[_Node], int]":
    """Commands up to one of the words `until`, which is not consumed."""
    nodes: list[_Node] = []
    while at < len(tokens):
        word = tokens[at]
        if word == _END:
            at += 1
        elif word in until:
            break
        elif word == "if":
            node, at = _parse_if(tokens, at)
            nodes.append(node)
        elif word == "function":
            if at + 2 >= len(tokens) or not tokens[at + 2].startswith("{"):
                raise Unknown("grub.cfg: a function has no body")
            nodes.append(_Function(tokens[at + 1], parse(tokens[at + 2][1:-1])))
            at += 3
        elif word in _UNSUPPORTED or word in ("then", "else", "elif", "fi", "}") or re.match(r"\{|\w+\(\)", word):
            raise Unknown(f"grub.cfg: `{word[:20]}` is not understood")
        else:
            end = next((i for i in range(at, len(tokens)) if tokens[i] == _END), len(tokens))
            negated = word == "!"
            nodes.append(_Command(tuple(tokens[at + negated : end]), negated))
            at = end
    return nodes, at


def _parse_if(tokens: list[str], at: int) -> tuple[_If, int]:
    branches = []
    while tokens[at] in ("if", "elif"):
        condition, at = _nodes(tokens, at + 1, frozenset({"then"}))
        body, at = _nodes(tokens, _past(tokens, at, "then"), frozenset({"elif", "else", "fi"}))
        branches.append((condition, body))
        if at >= len(tokens):
            raise Unknown("grub.cfg: an `if` does not end")
    otherwise: list[_Node] = []
    if tokens[at] == "else":
        otherwise, at = _nodes(tokens, at + 1, frozenset({"fi"}))
    return _If(tuple(branches), otherwise), _past(tokens, at, "fi")


def _past(tokens: list[str], at: int, word: str) -> int:
    if at >= len(tokens) or tokens[at] != word:
        raise Unknown(f"grub.cfg: `{word}` is missing")
    return at + 1
