# SPDX-License-Identifier: Apache-2.0
"""Runs a grub.cfg: which commands GRUB executes, in order, up to the kernel's start.

    ScriptRun(ScriptInput).run_file(text) ──> commands as GRUB measures them, menu entries
                          .choose_entry(entry) ──> the commands of an entry

GRUB measures each command before it executes it: its words, expanded, joined by a space; a block with its braces as it
is written. ScriptRun knows what those commands do that grub-mkconfig writes (set, test, load_env, source ...). Whether
another command succeeds, and whether a file exists, it asks ScriptInput. A construct that is not known is Unknown,
never guessed. From the GRUB manual, "Writing full configuration files directly", and grub-core/script/execute.c.
"""

import re
from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

from .grub_parser import MAX_TEXT, VARIABLE, Function, If, Node, Unknown, parse_script

MAX_COMMANDS = 20_000
_DEPTH = 30
_NAME = re.compile(r"[A-Za-z_][A-Za-z0-9_]*")
_VALUED = {
    "--class", "--users", "--hotkey", "--id", "--source",
}  # fmt: skip
"""Options of menuentry and submenu that take a value: grub-core/commands/menuentry.c."""
_FEATURES = (
    "chainloader_bpb", "ntldr", "platform_search_hint", "default_font_path", "all_video_module", "menuentry_id",
    "menuentry_options", "200_final", "nativedisk_cmd", "timeout_style",
)  # fmt: skip
"""What grub-core/normal/main.c sets to y."""


class NotOnDisk(Unknown):
    """A file that GRUB names is on no file system that is mounted here; most often it is in GRUB's memory."""


class ScriptInput(NamedTuple):
    """What the commands of a script depend on. Construct it by keywords."""

    variables: dict[str, str]
    read: Callable[[str], str]
    """The content of a file that GRUB names. Raises Unknown."""
    succeeds: Callable[[str], bool]
    """Whether a command succeeds: a file test (`-f FILE`), or any command, as measured. Raises Unknown."""


class MenuEntry(NamedTuple):
    """An entry of the menu, or a submenu."""

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


def initial_variables(config: str) -> dict[str, str]:
    """GRUB's own variables when it reads the configuration file `config`, on an x86-64 PC with UEFI."""
    folder = config.rpartition("/")[0]
    own = {"grub_platform": "efi", "grub_cpu": "x86_64", "config_directory": folder, "config_file": config}
    return {**own, "prefix": folder, **{f"feature_{each}": "y" for each in _FEATURES}}


def set_environment_variable(environment: str, name: str, value: str) -> str:
    """grubenv after GRUB's `save_env` of a variable that it has: its size stays (grub-core/lib/envblk.c)."""
    changed = re.sub(rf"(?m)^{name}=.*$", lambda _: f"{name}={value}", environment.rstrip("#"))
    return changed.ljust(len(environment), "#")


class ScriptRun:
    """One run of a configuration: the commands so far, the menu entries, and the state of the script."""

    def __init__(self, given: ScriptInput) -> None:
        self.commands: list[str] = []
        self.consulted: list[tuple[int, str]] = []
        """What `ScriptInput.succeeds` was asked, and after how many commands."""
        self.entries: list[MenuEntry] = []
        self._input = given
        self._variables = dict(given.variables)
        self.functions: dict[str, list[Node]] = {}
        self._status = 0
        self._pending = ""
        self._depth = 0

    def run_file(self, text: str) -> None:
        """Runs a configuration file. Raises Unknown."""
        self._run(parse_script(text), ())

    def choose_entry(self, entry: MenuEntry) -> None:
        """Runs the entry; of a submenu, `entries` are then those in it. Raises Unknown."""
        chosen = self._variables.get("chosen", "")
        self._variables["chosen"] = f"{chosen}>{entry.id}" if chosen else entry.id
        if entry.is_menu:
            self.entries = []
        self._command(["setparams", entry.title])
        self._run(parse_script(entry.body), (entry.title,))

    def variable(self, name: str) -> str:
        """The value of a variable; "" when it is not set."""
        return self._variables.get(name, "")

    @property
    def default_entry(self) -> list[MenuEntry]:
        """The entries to choose on the way to the default one: it alone, or its submenu and it. Raises Unknown."""
        wanted = self._variables.get("default", "") or "0"
        first, _, rest = wanted.partition(">")
        found = [each for number, each in enumerate(self.entries) if first in (str(number), each.id, each.title)]
        if not found:  # a number too high, or a title that is gone: the first entry
            found, rest = self.entries[:1], ""
        if not found:
            raise Unknown("grub.cfg has no menu entry")
        if not found[0].is_menu:
            return found[:1]
        inside = submenu_entries(found[0], self)
        chosen = [each for number, each in enumerate(inside) if (rest or "0") in (str(number), each.id, each.title)]
        if not chosen or chosen[0].is_menu:
            raise Unknown(f"the default entry {wanted!r} is not found")
        return [found[0], chosen[0]]

    # Nodes

    def _run(self, nodes: list[Node], arguments: Sequence[str]) -> None:
        self._depth += 1
        if self._depth > _DEPTH:
            raise Unknown("functions call each other without end")
        for node in nodes:
            if isinstance(node, If):
                self._if(node, arguments)
            elif isinstance(node, Function):
                self.functions[node.name] = node.body
            else:
                self._command([part for word in node.words for part in self._expand(word, arguments)], node.negated)
        self._depth -= 1

    def _if(self, node: If, arguments: Sequence[str]) -> None:
        for condition, body in node.branches:
            self._run(condition, arguments)
            if self._succeeded():
                self._run(body, arguments)
                return
        self._run(node.otherwise, arguments)

    def _succeeded(self) -> bool:
        """Whether the last command did; asks ScriptInput only now, as most results matter to no command."""
        if self._pending:
            about, self._pending = self._pending, ""
            self.consulted.append((len(self.commands), about))
            self._status = 0 if self._input.succeeds(about) else 1
        return self._status == 0

    # Commands

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
            self.entries.append(MenuEntry(tuple(words[:-1]), words[-1][1:-1]))
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
        self._run(parse_script(self._input.read(arguments[0])), ())

    def _load_env(self, arguments: list[str]) -> None:
        path = f"{self._variables.get('prefix', '')}/grubenv"
        names = list(arguments)
        while names and names[0].startswith("-"):
            option = names.pop(0)
            if option in ("--file", "-f") and names:
                path = names.pop(0)
            elif option.startswith("--file="):
                path = option.partition("=")[2]
        for line in self._input.read(path).splitlines():
            variable, equals, value = line.partition("=")
            if equals and not line.startswith("#") and (not names or variable in names):
                self._variables[variable] = re.sub(r"\\(.)", r"\1", value)

    def _test(self, words: list[str]) -> bool:
        """test(1), as far as scripts use it; -o binds weakest."""
        return any(all(self._simple(part) for part in _split_words(each, "-a")) for each in _split_words(words, "-o"))

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
                return self._input.succeeds(f"{kind} {path}")
            case [left, ("=" | "=="), right]:
                return left == right
            case [left, "!=", right]:
                return left != right
        raise Unknown(f"`[ {' '.join(words)} ]` is not understood")

    # Words

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
            elif char == "$" and (found := VARIABLE.match(word, at + 1)):
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
            elif word[at] == "$" and (found := VARIABLE.match(word, at + 1)):
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


def submenu_entries(menu: MenuEntry, before: ScriptRun) -> list[MenuEntry]:
    """The entries in a submenu. Raises Unknown."""
    inside = ScriptRun(before._input)
    inside._variables = dict(before._variables)
    inside.functions = before.functions
    inside.choose_entry(menu)
    return inside.entries


def _split_words(words: list[str], at: str) -> Iterator[list[str]]:
    part: list[str] = []
    for word in words:
        if word == at:
            yield part
            part = []
        else:
            part.append(word)
    yield part
