# SPDX-License-Identifier: Apache-2.0
"""Runs a grub.cfg: which commands GRUB executes, in order, up to the kernel's start.

    ScriptRun(ScriptInput).run_file(text) ──> commands as GRUB measures them, menu entries
                          .choose_entry(entry) ──> the commands of an entry

GRUB measures each command before it executes it: its words, expanded, joined by a space; a block with its braces as it
is written. ScriptRun knows what those commands do that grub-mkconfig writes (set, test, load_env, source ...). Whether
another command succeeds, and whether a file exists, it asks ScriptInput. A construct that is not known is Unknown,
never guessed; so is a variable whose value GRUB alone knows. From the GRUB manual, "Writing full configuration files
directly", and grub-core: script/execute.c, normal/menu.c, normal/context.c. Red Hat's GRUB differs: a submenu gets all
variables there, and an entry's id counts before its number.
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
EXPORTED = {
    "root", "prefix", "config_file", "config_directory", "chosen", "grub_cpu", "grub_platform", "pager", "color_normal",
    "color_highlight", "lang", "locale_dir", "secondary_locale_dir", "fw_path", "shim_lock", "lockdown",
    "check_signatures", *(f"feature_{each}" for each in _FEATURES),
}  # fmt: skip
"""The variables that GRUB itself exports: a submenu, and a file that `configfile` reads, gets these."""
_GRUBS_OWN = {
    "root", "cmdpath", "fw_path", "shim_lock", "lockdown", "check_signatures", "color_normal", "color_highlight",
    "config_file", "config_directory",
}  # fmt: skip
"""Variables that GRUB sets to values of its own."""
_DATE = {"YEAR", "MONTH", "DAY", "HOUR", "MINUTE", "SECOND", "WEEKDAY"}
"""Variables that GRUB works out when they are read: grub-core/hook/datehook.c."""
_SET_BY_COMMAND = re.compile(r"(?:--set=|--set |-s )(?:\d+:)?([A-Za-z_][A-Za-z0-9_]*)")
MAX_SUBMENUS = 8
_BAD_ARGUMENT = 18
"""GRUB_ERR_BAD_ARGUMENT: include/grub/err.h."""
_BEYOND = {
    "blscfg", "legacy_source", "legacy_configfile", "syslinux_source", "syslinux_configfile", "eval", "normal", "exit",
    "halt", "reboot", "return", "break", "continue", "shift",
}  # fmt: skip
"""Commands that add menu entries, run other commands, or end the script."""


class NotOnDisk(Unknown):
    """A file that GRUB names is on no file system that is mounted here; most often it is in GRUB's memory."""


class ScriptInput(NamedTuple):
    """What the commands of a script depend on. Construct it by keywords."""

    variables: dict[str, str]
    exported: frozenset[str]
    """Those of the variables that were exported; those that GRUB exports itself need not be among them."""
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
            if skip or word.startswith("--"):
                skip = word in _VALUED and not skip
            else:
                return word
        return ""

    @property
    def id(self) -> str:
        given = [word.removeprefix("--id=") for word in self.words if word.startswith("--id=")]
        given += [b for a, b in zip(self.words, self.words[1:], strict=False) if a == "--id"]
        return given[0] if given else self.title


class _MenuShown(Exception):
    """`configfile` has read a menu: GRUB shows it, and what follows is not run."""


def initial_variables(config: str) -> dict[str, str]:
    """GRUB's own variables when it reads the configuration file `config`, on an x86-64 PC with UEFI."""
    folder = config.rpartition("/")[0]
    own = {"grub_platform": "efi", "grub_cpu": "x86_64", "config_directory": folder, "config_file": config}
    return {**own, "prefix": folder, **{f"feature_{each}": "y" for each in _FEATURES}}


def set_environment_variable(environment: str, name: str, value: str | None) -> str:
    """grubenv after GRUB's `save_env` of a variable; None for one that is not set. Its size stays; a variable that
    finds no room is not saved (grub-core/lib/envblk.c)."""
    escaped = re.sub(r"([\\\n])", r"\\\1", value or "")
    line = f"{name}={escaped}\n" if value is not None else ""
    used = environment.rstrip("#")
    found = re.search(rf"(?m)^{re.escape(name)}=(?:[^\\\n]|\\(?s:.))*\n", used)
    changed = used[: found.start()] + line + used[found.end() :] if found else used + line
    return changed.ljust(len(environment), "#") if len(changed) <= len(environment) else environment


class ScriptRun:
    """One run of a configuration: the commands so far, the menu entries, and the state of the script."""

    def __init__(self, given: ScriptInput) -> None:
        self.commands: list[str] = []
        self.consulted: list[tuple[int, str]] = []
        """What `ScriptInput.succeeds` was asked, and after how many commands."""
        self.entries: list[MenuEntry] = []
        self.saved: dict[str, str | None] = {}
        """What `save_env` has saved; None for a variable that was not set."""
        self._input = given
        self._variables = dict(given.variables)
        self._exported = {*EXPORTED, *given.exported}
        self._hidden = {*_GRUBS_OWN, *_DATE} - set(given.variables)
        """Variables whose value is not known."""
        self.functions: dict[str, list[Node]] = {}
        self._status = 0
        self._pending = ""
        self._depth = 0

    def run_file(self, text: str) -> None:
        """Runs a configuration file up to its menu. Raises Unknown."""
        self._run_to_menu(parse_script(text), None)
        for name in ("config_file", "config_directory"):  # those of the file before are back
            self._hide(name)

    def choose_entry(self, entry: MenuEntry) -> None:
        """Runs the entry; of a submenu, `entries` are then those in it. Raises Unknown."""
        chosen, (_, rest) = self._variables.get("chosen", ""), _split_path(self.variable("default"))
        if entry.is_menu:
            self._open_context()
        self._hide("timeout")  # GRUB counts it down
        name = entry.id.replace(">", ">>")
        self._set("chosen", f"{chosen}>{name}" if chosen else name)
        self._exported.add("chosen")
        self._unset("default")
        if rest:
            self._set("default", rest)
        self._command(["setparams", entry.title])
        self._run_to_menu(parse_script(entry.body), (entry.title,))

    def variable(self, name: str) -> str:
        """The value of a variable; "" when it is not set. Raises Unknown."""
        if name in self._hidden:
            raise Unknown(f"the value of GRUB's variable {name} is not known")
        return self._variables.get(name, "")

    @property
    def default_entry(self) -> list[MenuEntry]:
        """The entries to choose on the way to the default one: submenus, and it. Raises Unknown."""
        run, chosen = self, [_default_of(self.entries, self.variable("default"))]
        while chosen[-1].is_menu and len(chosen) < MAX_SUBMENUS:
            run = run.after_choice(chosen[-1])
            chosen.append(_default_of(run.entries, run.variable("default")))
        return chosen

    def after_choice(self, entry: MenuEntry) -> "ScriptRun":
        """Another run, which has gone on from here into this entry. Raises Unknown."""
        run = ScriptRun(self._input)
        run.entries, run.functions, run.saved = list(self.entries), dict(self.functions), dict(self.saved)
        run._variables, run._exported, run._hidden = dict(self._variables), set(self._exported), set(self._hidden)
        run.choose_entry(entry)
        return run

    # Variables

    def _set(self, name: str, value: str) -> None:
        self._variables[name] = value
        self._hidden.discard(name)

    def _unset(self, name: str) -> None:
        self._variables.pop(name, None)
        self._hidden.discard(name)
        if name not in EXPORTED:
            self._exported.discard(name)

    def _hide(self, name: str) -> None:
        self._variables.pop(name, None)
        self._hidden.add(name)

    def _open_context(self) -> None:
        """That of a submenu, or of `configfile`: with the exported variables, and no menu."""
        self._variables = {name: value for name, value in self._variables.items() if name in self._exported}
        self._hidden = self._hidden & self._exported
        self._exported = set(self._exported)
        self.entries = []

    # Nodes

    def _run_to_menu(self, nodes: list[Node], arguments: Sequence[str] | None) -> None:
        try:
            self._run(nodes, arguments)
        except _MenuShown:
            self._depth = 0

    def _run(self, nodes: list[Node], arguments: Sequence[str] | None) -> None:
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

    def _if(self, node: If, arguments: Sequence[str] | None) -> None:
        for condition, body in node.branches:
            self._run(condition, arguments)
            if self._succeeded():
                self._run(body, arguments)
                return
        self._pending, self._status = "", 0
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
            self._set(variable, value)
        elif name in self.functions:
            self._run(self.functions[name], arguments)
        elif name in ("menuentry", "submenu"):
            if not arguments or not words[-1].startswith("{"):
                raise Unknown(f"`{text[:60]}` is not understood")
            self.entries.append(MenuEntry(tuple(words[:-1]), words[-1][1:-1]))
        elif name == "set":
            variable, equals, value = arguments[0].partition("=") if arguments else ("", "", "")
            if equals:
                self._set(variable, value)
            self._status = _BAD_ARGUMENT if arguments and not equals else 0
        elif name == "unset":
            for each in arguments[:1]:
                self._unset(each)
        elif name == "export":
            for each in arguments:
                self._exported.add(each)
                if each not in self._hidden:
                    self._variables.setdefault(each, "")
        elif name in ("[", "test"):
            self._status = 0 if self._test(arguments[:-1] if name == "[" else arguments) else 1
        elif name == "false":
            self._status = 1
        elif name in ("source", ".", "configfile"):
            self._source(name, arguments)
        elif name == "load_env":
            self._load_env(arguments)
        elif name == "save_env":
            self._save_env(arguments)
        elif name in _BEYOND or name.startswith("extract_"):
            raise Unknown(f"`{text[:60]}` is not understood")
        elif name not in ("true", "setparams"):
            self._hide_results(name, arguments)
            self._pending = text
        if negated:
            self._status = 1 if self._succeeded() else 0

    def _source(self, name: str, arguments: list[str]) -> None:
        if len(arguments) != 1:
            raise Unknown(f"`{name}` is not understood")
        before = self._variables, self._exported, self._hidden, self.entries
        if name == "configfile":
            self._open_context()
        self._read_file(arguments[0])
        if name == "configfile" and self.entries:
            raise _MenuShown
        if name == "configfile":
            self._variables, self._exported, self._hidden, self.entries = before

    def _read_file(self, path: str) -> None:
        names = ("config_file", "config_directory")
        before = [self._variables.get(name) for name in names]
        whole = path if path.startswith("(") or "root" in self._hidden else f"({self.variable('root')}){path}"
        for name, value in zip(names, (whole, whole.rpartition("/")[0]), strict=True):
            if whole.startswith("("):
                self._set(name, value)
            else:
                self._hide(name)
        self._run(parse_script(self._input.read(path)), None)
        for name, was in zip(names, before, strict=True):
            if was is None:
                self._hide(name)
            else:
                self._set(name, was)

    def _environment_file(self, arguments: list[str]) -> tuple[str, list[str]]:
        """The file of `load_env` and `save_env`, and the names of variables."""
        path = f"{self.variable('prefix')}/grubenv"
        names = list(arguments)
        while names and names[0].startswith("-"):
            option = names.pop(0)
            if option in ("--file", "-f") and names:
                path = names.pop(0)
            elif option.startswith("--file="):
                path = option.partition("=")[2]
        return path, names

    def _load_env(self, arguments: list[str]) -> None:
        path, names = self._environment_file(arguments)
        for line in self._input.read(path).splitlines():
            variable, equals, value = line.partition("=")
            if equals and not line.startswith("#") and (not names or variable in names):
                self._set(variable, re.sub(r"\\(.)", r"\1", value))

    def _save_env(self, arguments: list[str]) -> None:
        path, names = self._environment_file(arguments)
        if path == f"{self.variable('prefix')}/grubenv":
            self.saved |= {each: self._variables.get(each) for each in names if each not in self._hidden}

    def _hide_results(self, name: str, arguments: list[str]) -> None:
        """The variables in which other commands leave what they found."""
        for found in _SET_BY_COMMAND.finditer(" ".join(arguments)):
            self._hide(found[1])
        if name == "search":
            self._hide("root")
        elif name.startswith("search."):
            self._hide(arguments[1] if arguments[1:] else "root")
        elif name in ("read", "increment", "decrement", "getenv"):
            for each in arguments:
                self._hide(each)

    def _test(self, words: list[str]) -> bool:
        """test(1), as far as scripts use it; -o binds weakest."""
        return any(all(self._simple(part) for part in _split_words(each, "-a")) for each in _split_words(words, "-o"))

    def _simple(self, words: list[str]) -> bool:
        if words[:1] == ["!"] and words[1:]:
            return not self._simple(words[1:])
        match words:
            case []:  # true for GRUB, unlike test(1)
                return True
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

    def _expand(self, word: str, arguments: Sequence[str] | None) -> list[str]:
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

    def _quoted(self, word: str, at: int, arguments: Sequence[str] | None) -> tuple[str, int]:
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

    def _value(self, name: str, arguments: Sequence[str] | None) -> str:
        if name == "?":
            asked = bool(self._pending)
            if not self._succeeded() and asked:
                raise Unknown("the number of an error is not known")
            return str(self._status)
        if arguments is None and (name in "#@*" or name.isdigit()):  # outside of functions and menu entries
            return ""
        arguments = arguments or ()
        if name == "#":
            return str(len(arguments))
        if name in "@*":
            return " ".join(arguments)
        if name.isdigit():
            return arguments[int(name) - 1] if 0 < int(name) <= len(arguments) else ""
        return self.variable(name)


def _default_of(entries: Sequence[MenuEntry], wanted: str) -> MenuEntry:
    """The entry that the variable `default` names: a number, else an id or a title. The first one where there is none.

    Red Hat's GRUB takes an id or a title before a number. Raises Unknown where that is another entry.
    """
    if not entries:
        raise Unknown("grub.cfg has no menu entry")
    first, _ = _split_path(wanted)
    number = _leading_number(wanted)
    named = next((at for at, each in enumerate(entries) if first in (each.title, each.id)), None)
    if number is not None and named not in (None, number):
        raise Unknown(f"the default entry {wanted!r} is a number, and the name of another entry")
    at = named if number is None else number
    return entries[at if at is not None and at < len(entries) else 0]


def _leading_number(text: str) -> int | None:
    """The number that a text begins with, as GRUB reads it: hexadecimal after 0x, octal after 0. None without one."""
    found = re.match(r"[ \t\r\n]*(?:0x(?P<hex>[0-9A-Fa-f]+)|0(?P<octal>[0-7]+)|(?!0x)(?P<decimal>[0-9]+))", text)
    if not found:
        return None
    base, digits = next((base, found[name]) for name, base in _BASES.items() if found[name])
    number = int(digits, base)
    return number & 0xFFFFFFFF if number < 1 << 64 else 1 << 64  # GRUB keeps 32 bits; too large is none of the entries


_BASES = {"hex": 16, "octal": 8, "decimal": 10}


def _split_path(path: str) -> tuple[str, str]:
    """The first name in a path of menu entries, and the rest of the path; `>>` is a `>` in a name."""
    found = re.match(r"(?s)((?:[^>]|>>)*)>?(.*)", path)
    assert found
    return found[1].replace(">>", ">"), found[2]


def _split_words(words: list[str], at: str) -> Iterator[list[str]]:
    part: list[str] = []
    for word in words:
        if word == at:
            yield part
            part = []
        else:
            part.append(word)
    yield part
